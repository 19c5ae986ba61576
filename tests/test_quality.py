"""What the benchmarks of quality compute: text held out, a model's features in another order, shares and their intervals,
codes of moments, the picture."""

from __future__ import annotations

import itertools
import json
import pathlib
import subprocess
import sys

import pytest
import torch

import qlite
from benchmarks import adapter_starts, bases, loss_plot, moment_codes, qlora_parity, quantization_loss
from qlite.adamw_8bit import AdamWRule
from qlite.data import ASSETS

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny() -> qlite.Falcon:
    return qlite.load_falcon(ASSETS / "tiny-falcon", dtype=torch.float32)


# Models and text.


def test_no_text_is_both_trained_on_and_held_out():
    kept, held_out = bases.sources()
    assert len(kept) > 1000 and len(held_out) > 40
    assert not set(kept) & set(held_out)


def test_a_document_of_bytes_ends_with_a_byte_of_none():
    assert bases.encode("small", ["ab", "é"]).tolist() == [97, 98, 0, 0xC3, 0xA9, 0]


@pytest.mark.parametrize(("name", "millions"), [("small", 30), ("medium", 96)])
def test_the_trained_models_have_the_sizes_that_are_told(name, millions):
    model = qlite.Falcon(bases.TRAINED[name][0], device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_training_learns_a_pattern(monkeypatch):
    monkeypatch.setattr(bases, "BATCH", 2)
    ticks = itertools.count()
    monkeypatch.setattr(bases.time, "perf_counter", lambda: 0.02 * next(ticks))  # so that a slow machine takes as many steps
    row = torch.arange(2000) % 5
    model, steps = bases.train(bases._of_bytes(64, 1), row, seconds=4, lr=1e-2)
    with torch.no_grad():
        loss = bases.train_tiny_base.loss_of(model, row[None, :201])
    assert steps > 1 and loss < 1.6 < torch.tensor(256.0).log()  # the logarithm of 5: no more than the five bytes


def test_a_reordered_model_computes_the_same_by_other_blocks(tiny):
    other, ids = bases.reordered(tiny, 1), torch.randint(4096, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(other(ids), tiny(ids), atol=1e-3)
    for name, layer in adapter_starts.linears(other).items():
        before = tiny.get_submodule(name).weight
        absmax = [qlite.quantize_nf4(weight, double_quant=False).absmax for weight in (before, layer.weight)]
        assert not torch.equal(before, layer.weight), name
        if name.endswith(("query_key_value", "4h", "4h_to_h")):  # a head's values stay in the block that they are
            assert not torch.equal(
                absmax[0].sort(dim=1).values.sort(dim=0).values, absmax[1].sort(dim=1).values.sort(dim=0).values
            )


# Losses.


def test_windows_are_at_equal_distances_and_overlap_in_one_token():
    row = torch.arange(quantization_loss.WINDOW * 9 + 1)
    every = quantization_loss.windows(row, 100)
    assert len(every) == 9 and every[1, 0] == every[0, -1] == quantization_loss.WINDOW
    assert quantization_loss.windows(row, 3)[:, 0].tolist() == [0, 4 * quantization_loss.WINDOW, 8 * quantization_loss.WINDOW]


def test_a_share_is_of_the_gap_and_its_interval_holds_the_truth():
    torch.manual_seed(0)
    reference = 0.1 + 0.05 * torch.randn(4, 200, dtype=torch.float64)
    gap = 0.7 * reference + 0.01 * torch.randn(4, 200, dtype=torch.float64)
    found = quantization_loss.share(gap, reference)
    assert found["share_low"] < 0.7 < found["share_high"] and found["share_high"] - found["share_low"] < 0.03
    assert quantization_loss.share(reference, reference) == {"share": 1.0, "share_low": 1.0, "share_high": 1.0}


def test_the_interval_of_a_share_counts_the_draws():
    torch.manual_seed(0)
    reference = torch.full((4, 200), 0.1, dtype=torch.float64)
    gap = reference * torch.tensor([0.4, 0.6, 0.8, 1.0], dtype=torch.float64)[:, None]
    found = quantization_loss.share(gap, reference)
    assert found["share"] == 0.7 and found["share_low"] < 0.6 and found["share_high"] > 0.8


def test_without_a_gap_there_is_no_share():
    torch.manual_seed(0)
    assert quantization_loss.share(torch.ones(2, 50), torch.randn(2, 50)) == {}


def test_the_gap_of_fewer_bits_is_larger(tiny, monkeypatch):
    monkeypatch.setattr(
        quantization_loss, "FORMATS", {"nf4": {}, "coarse": {"block_size": 4096, "levels": [-1.0] * 8 + [1.0] * 8}}
    )
    texts = {"source": quantization_loss.windows(bases.encode("tiny", [pathlib.Path(bases.__file__).read_text()]), 2)}
    dense = {"source": quantization_loss.losses(tiny, texts["source"])}
    found = quantization_loss.gaps(tiny, texts, dense, draws=2)["source"]
    assert found["nf4"].shape == (2, 2) and not torch.equal(*found["nf4"])
    assert found["coarse"].mean() > 10 * found["nf4"].mean().abs()


def rows_of_results() -> list[dict]:
    line = {"text": "library", "share_low": 0.5, "share_high": 1.0}
    return [
        {**line, "model": "medium", "parameters": 96e6, "format": "nf4 searched", "share": 0.9},
        {**line, "model": "tiny", "parameters": 4e6, "format": "fp4", "share": 0.8},
        {**line, "model": "tiny", "parameters": 4e6, "format": "nf4 searched", "share": 0.6},
        {**line, "model": "tiny", "parameters": 4e6, "format": "nf4 searched", "share": 0.7},
        {"text": "library", "model": "tiny", "parameters": 4e6, "format": "nf4 blocks of 32"},
        {**line, "text": "support", "model": "small", "parameters": 30e6, "format": "nf4 searched", "share": 0.7},
    ]


def test_the_newest_share_of_a_model_counts_and_models_stand_by_size():
    found = loss_plot.newest(rows_of_results(), "library")
    assert list(found) == ["tiny", "medium"] and set(found["tiny"]) == {"fp4", "nf4 searched"}
    numbers, shares, (below, above) = loss_plot.bars(found, "nf4 searched")
    assert numbers == [0, 1] and shares == [0.7, 0.9]
    assert below == pytest.approx([0.2, 0.4]) and above == pytest.approx([0.3, 0.1])
    with pytest.raises(ValueError, match="no line"):
        loss_plot.newest(rows_of_results(), "poems")


def test_the_picture_of_shares_is_drawn(tmp_path):
    loss_plot.draw(rows_of_results(), tmp_path / "loss.png")
    content = (tmp_path / "loss.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000


def test_a_picture_alone_measures_nothing(tmp_path):
    command = [sys.executable, "-m", "benchmarks.quantization_loss", "--plot", str(tmp_path / "loss.png"), "--plot-only"]
    done = subprocess.run(command, cwd=ROOT, check=True, timeout=240, capture_output=True, text=True)
    assert (tmp_path / "loss.png").exists() and done.stdout == ""


# Fine-tuning.


def test_a_difference_is_relative_to_the_dense_run_of_its_seed():
    assert set(qlora_parity.summary([1.0] * 5, [1.0] * 5).values()) == {0.0}
    found = qlora_parity.summary([1.01, 2.04, 1.03, 2.0, 1.02], [1.0, 2.0, 1.0, 2.0, 1.0])
    assert found["difference"] == 0.016
    # Student's t with 4 degrees of freedom: 2.776 standard errors of (1, 2, 3, 0, 2) %.
    assert found["difference_high"] - 0.016 == pytest.approx(2.776 * 0.0114018 / 5**0.5, abs=2e-5)
    assert found["difference_low"] < 0.016


def test_a_batch_of_windows_counts_what_its_loss_counts(tiny):
    batch = qlora_parity.of_windows(torch.randint(4096, (3, 9)))
    assert batch.n_tokens == 3 * 8 and (batch.labels[:, 1:] != -100).sum() == 24
    logits = torch.nn.functional.cross_entropy(tiny(batch.input_ids[:, :-1]).flatten(0, 1), batch.input_ids[:, 1:].flatten())
    assert qlora_parity.loss_of(tiny, [batch]) == pytest.approx(logits.item(), rel=1e-4)


def test_the_articles_that_are_learnt_are_those_of_a_seed():
    one, again, other = (qlora_parity.articles(seed)[0] for seed in (0, 0, 1))
    assert len(one) == qlora_parity.ARTICLES[0]
    assert torch.equal(one[3].input_ids, again[3].input_ids) and not torch.equal(one[3].input_ids, other[3].input_ids)


# Starts of adapters.


def test_the_leading_share_of_noise_and_of_a_product():
    assert adapter_starts.leading_share([torch.randn(30, 1) @ torch.randn(1, 20)], 1) == pytest.approx(1.0)
    assert adapter_starts.leading_share([torch.eye(20)], 5) == pytest.approx(0.25)
    torch.manual_seed(0)
    exact = adapter_starts.leading_share([torch.randn(500, 300)], 4)
    assert adapter_starts.noise_share([(500, 300)], 4) == pytest.approx(exact, rel=0.1)


def test_loftq_is_nearer_to_the_dense_model_and_pissa_is_not(tiny):
    ids = torch.randint(4096, (1, 65), generator=torch.Generator().manual_seed(0))
    plain, pissa, loftq = adapter_starts.measure(tiny, ids, [("nf4", start, 16) for start in ("kaiming", "pissa", "loftq")])
    for key in ("weight", "layer", "logits"):
        assert loftq[key] < 0.95 * plain[key], key
        assert pissa[key] == pytest.approx(plain[key], rel=1e-3), key
    assert loftq["weight"] == pytest.approx((1 - loftq["spectrum"]) * plain["weight"], rel=0.01)


# Codes of moments.


@pytest.mark.parametrize("octaves", [16, 24])
def test_log_spaced_levels_are_within_half_a_ratio_and_never_zero_above_it(octaves):
    v = torch.rand(1000, generator=torch.Generator().manual_seed(0)).clamp(min=0.01)
    found = moment_codes.log_spaced(v, octaves)
    assert ((found / v).log2().abs() <= octaves / 254 / 2 + 1e-4).all()
    assert len(moment_codes.log_spaced(torch.exp2(-torch.linspace(0, octaves, 255)), octaves).unique()) == 255
    ends = moment_codes.log_spaced(torch.tensor([0.0, 1e-30, 1.0]), octaves)
    assert ends.tolist() == [0.0, pytest.approx(2.0**-octaves), 1.0]


def test_moments_that_are_not_encoded_step_as_torch_does():
    rule = AdamWRule(lr=1.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=1)
    follower = moment_codes.Follower(lambda m: m, lambda v: v, [torch.zeros(9)], [torch.zeros(9)])
    parameter = torch.nn.Parameter(torch.zeros(9))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, weight_decay=0.0)
    for step in (1, 2, 3):
        before, parameter.grad = parameter.detach().clone(), torch.randn(9)
        optimizer.step()
        rule = AdamWRule(**{**vars(rule), "step": step})
        (update,) = follower.updates([parameter.grad], rule)
        assert torch.allclose(update, before - parameter.detach(), atol=1e-6)


def test_the_errors_of_moments_are_those_of_their_codes():
    generator = torch.Generator().manual_seed(0)
    rows = {row["code"]: row for row in moment_codes.measure([torch.randn(512, generator=generator)] for _ in range(12))}
    assert rows["float32"]["mean_error"] == rows["float32"]["rms_error"] == 0
    assert 0.001 < rows["float32 v"]["mean_error"] < rows["log v, 32"]["mean_error"] < 0.2
    assert json.dumps(list(rows.values()))

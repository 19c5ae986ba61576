"""Scales that are searched for: never a worse block, the error that is promised, the same format everywhere."""

from __future__ import annotations

import functools
import json
import pathlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qlite
from benchmarks import derive_table
from qlite import cli, nf4
from qlite.data import ASSETS
from qlite.nf4 import FP4_LEVELS, LS4_LEVELS, NF4_LEVELS, TABLES
from tests.strategies import DTYPES, block_sizes, tables, weights


def squares_by_block(values, block_size):
    """Sums of squares of each block, float64 (rows, blocks)."""
    padded = torch.nn.functional.pad(values.double(), (0, -values.shape[1] % block_size))
    return padded.view(values.shape[0], padded.shape[1] // block_size, block_size).square().sum(dim=2)


@given(weights(max_exponent=60) | weights(), tables, block_sizes)
def test_no_block_is_worse_than_by_its_absmax(w, levels, block_size):
    options = {"block_size": block_size, "levels": levels, "double_quant": False}
    plain, searched = (qlite.quantize_nf4(w, **options, search=search) for search in (False, True))
    assert [t.shape for t in (plain.codes, plain.absmax)] == [t.shape for t in (searched.codes, searched.absmax)]
    before, after = (squares_by_block(q.dequantize(torch.float32) - w, block_size) for q in (plain, searched))
    # What is compared in the search are float32 sums of squares, of a size of the block's own.
    assert searched.absmax.isfinite().all() and (after <= before + 2.0**-20 * squares_by_block(w, block_size) + 1e-80).all()
    assert not searched.absmax[squares_by_block(w, block_size) == 0].any()


@given(weights(max_exponent=20), tables, block_sizes)
def test_codes_are_the_nearest_for_the_scales_that_are_there(w, levels, block_size):
    q = qlite.quantize_nf4(w, block_size=block_size, levels=levels, search=True)
    scales = nf4.dequantize_absmax(q.absmax, q.absmax_scale, q.absmax_offset).double()
    spread = scales.repeat_interleave(block_size, dim=1)[:, : w.shape[1]]
    off = (q.dequantize(torch.float32).double() - w.double()).abs()
    nearest = ((spread[:, :, None] * torch.tensor(levels).double()) - w.double()[:, :, None]).abs().amin(dim=2)
    # Shares are rounded where they are compared with midpoints, and levels times scale where they are decoded.
    assert (off <= nearest + 2.0**-21 * (spread.abs() + w.double().abs()) + 1e-37).all()


def relative_error(w, **options):
    q = qlite.quantize_nf4(w, **options)
    return ((q.dequantize(torch.float32) - w).square().sum() / w.square().sum()).item()


def normal(rows=512, columns=4544):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_the_error_of_normal_weights_falls_by_a_fifth_in_the_same_bits():
    w = normal()
    plain, searched = relative_error(w), relative_error(w, search=True)
    assert plain == pytest.approx(0.00847, abs=3e-5) and searched <= 0.00692
    assert qlite.quantize_nf4(w, search=True).bits_per_weight == qlite.quantize_nf4(w).bits_per_weight
    # A mirrored table is the same one here.
    assert relative_error(w, search=True, levels=FP4_LEVELS) < 0.88 * relative_error(w, levels=FP4_LEVELS)


def test_our_own_table_is_the_derived_one_and_has_less_error_still():
    line = json.loads(
        (pathlib.Path(__file__).parents[1] / "benchmarks/results/derive_table.jsonl").read_text().splitlines()[-1]
    )
    assert tuple(line["levels"]) == LS4_LEVELS
    assert relative_error(normal(), search=True, levels=LS4_LEVELS) <= 0.00653
    # One more step on other weights hardly moves it.
    w = torch.randn(256, 4096, generator=torch.Generator().manual_seed(4))
    levels = torch.tensor(LS4_LEVELS)
    assert (derive_table.improved(w, levels, 1.0) - levels).abs().max() < 0.005


@pytest.mark.parametrize(
    ("name", "derived", "bound"), [("af4", derive_table.abnormal_float, 1e-7), ("bof4-s", derive_table.optimal_float, 2e-4)]
)
def test_the_published_tables_follow_from_their_definitions(name, derived, bound):
    assert (derived() - torch.tensor(TABLES[name], dtype=torch.float64)).abs().max() < bound


def test_tables_go_by_name():
    w = normal(4, 640)
    for name, table in TABLES.items():
        by_name, by_values = (qlite.quantize_nf4(w, levels=levels, search=True) for levels in (name, table))
        assert torch.equal(by_name.codes, by_values.codes) and by_name.levels.tolist() == by_values.levels.tolist()
        assert nf4.name_of(by_name.levels.tolist()) == name
    assert nf4.name_of(NF4_LEVELS[::-1]) is None
    with pytest.raises(ValueError, match=r"'nf5'; wanted one of nf4, fp4, af4, bof4-s, ls4, or 16 values"):
        qlite.quantize_nf4(w, levels="nf5")


def test_published_tables_have_the_errors_that_are_said_of_them():
    # AF4 by absmax: more squared error than NF4 (its aim is the absolute one). BOF4-S with searched scales: hardly over ls4.
    assert relative_error(normal(), levels="af4") == pytest.approx(0.00915, abs=5e-5)
    assert 0.0064 < relative_error(normal(), levels="bof4-s", search=True) <= 0.00661


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_best_table_is_the_one_with_the_least_error(dtype, search):
    chosen = set()
    tails = torch.distributions.StudentT(3.0)
    torch.manual_seed(0)
    for w in (normal(32, 640), tails.sample((32, 640)), torch.rand(32, 640) * 2 - 1):
        w = w.to(dtype)
        errors = {name: qlite.quantize_nf4(w, levels=name, search=search).squared_error(w) for name in nf4.CANDIDATES}
        best = qlite.quantize_nf4(w, levels="best", search=search)
        name = nf4.name_of(best.levels.tolist())
        assert errors[name] == min(errors.values()) == best.squared_error(w)
        chosen.add(name)
    assert len(chosen) > 1 or not search


def test_layers_choose_their_tables_apart_and_files_say_which(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(640, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8), torch.nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.copy_(normal(64, 640))
        model[2].weight.copy_(torch.tensor([-1.0, 1.0, 0.7229568362236023, -0.6961928009986877]).repeat(8, 16))
    qlite.quantize_model(model, functools.partial(qlite.Linear4bit, levels="best", search=True), skip=["3"])
    formats = [model[place].config()["format"] for place in (0, 2)]
    assert formats == ["ls4", "nf4"] and all(model[place].config()["search"] for place in (0, 2))
    x = torch.randn(3, 640)
    expected = torch.nn.functional.linear(x, model[0].dequantize(), model[0].bias)
    assert torch.allclose(model[0](x), expected, atol=1e-5)
    folder = tmp_path / "best"
    assert cli.main(["quantize", "--output", str(folder), "--quantize", "best", "--search", "--dtype", "float32"]) == 0
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    assert {layer["format"] for layer in layers.values()} <= set(nf4.CANDIDATES)
    loaded = qlite.load_falcon(folder)
    for name, layer in loaded.named_modules():
        if isinstance(layer, qlite.Linear4bit):
            assert layer.config() == layers[name] and nf4.name_of(layer.levels.tolist()) == layers[name]["format"]


def test_weights_of_columns_lower_the_error_that_they_weigh():
    w, weighting = normal(64, 640), torch.linspace(-4, 4, 640).exp()[torch.randperm(640)]
    plain, weighed = (qlite.quantize_nf4(w, search=True, weighting=of) for of in (None, weighting))
    assert weighed.squared_error(w, weighting) < 0.97 * plain.squared_error(w, weighting)
    assert weighed.squared_error(w) > plain.squared_error(w)
    # Only their proportions count; all alike are none.
    same = qlite.quantize_nf4(w, search=True, weighting=torch.full((640,), 3.0))
    assert torch.equal(same.codes, plain.codes) and torch.equal(same.absmax, plain.absmax)
    layer = qlite.Linear4bit(640, 64, search=True).quantize_(w, weighting=1e3 * weighting)
    assert torch.equal(layer.weight, weighed.codes)
    flat = qlite.quantize_nf4(w, search=True, weighting=weighting, flat=True)
    assert torch.equal(flat.codes.view(64, -1), weighed.codes)


@pytest.mark.parametrize(
    "weighting", [torch.ones(639), torch.zeros(640), -torch.ones(640), torch.full((640,), torch.inf), torch.ones(1, 640)]
)
def test_weights_of_columns_that_make_no_sense_are_refused(weighting):
    with pytest.raises(ValueError, match="weighting"):
        qlite.quantize_nf4(normal(2, 640), search=True, weighting=weighting)
    with pytest.raises(ValueError, match="search=True"):
        qlite.quantize_nf4(normal(2, 640), weighting=torch.ones(640))


@pytest.mark.parametrize("block", [0, 255, 256, 639])
def test_a_block_far_above_the_others_flips_no_sign(block):
    # Beside it double quantization leaves scales of any size and sign; codes are chosen for what it leaves.
    w = normal(16, 64 * 64)
    w.view(-1, 64)[block] *= 1e4
    q = qlite.quantize_nf4(w, search=True)
    scales = nf4.dequantize_absmax(q.absmax, q.absmax_scale, q.absmax_offset)
    wanted = nf4.search(w, q.levels, 64)
    assert (scales * wanted < 0).float().mean() > 0.02  # signs of scales do flip: what is below is worth asking
    assert (q.dequantize() * w >= 0).all()
    left = nf4.dequantize(nf4.encode(w, wanted, q.levels, 64), scales, None, None, q.levels, w.shape[1], 64, w.dtype)
    assert (left * w < 0).any()  # had the codes been chosen for the scales before


@pytest.mark.parametrize("factor", [1e2, 1e4, 1e8])
def test_a_block_far_above_the_others_costs_them_no_more_than_without_a_search(factor):
    w = normal(4, 64 * 64)
    w[1, 640:704] *= factor
    ordinary = torch.ones_like(w, dtype=torch.bool)
    ordinary[1, 640:704] = False
    errors = [
        (qlite.quantize_nf4(w, search=search).dequantize() - w)[ordinary].square().mean().item() for search in (False, True)
    ]
    assert errors[1] <= errors[0]


def test_without_it_the_bits_are_as_they_were():
    w = normal(8, 640)
    assert all(
        torch.equal(getattr(qlite.quantize_nf4(w), name), getattr(qlite.quantize_nf4(w, search=False), name))
        for name in ("codes", "absmax", "absmax_scale", "absmax_offset")
    )


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_decode_scales_of_either_sign(dtype, double_quant):
    codec = pytest.importorskip("qlite.kernels.nf4_codec", reason="Triton is not built for this platform")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q = qlite.quantize_nf4(normal(40, 192), search=True, double_quant=double_quant)
    assert (nf4.dequantize_absmax(q.absmax, q.absmax_scale, q.absmax_offset) < 0).float().mean() > 0.3
    moved = q.to(device)
    parts = (moved.codes, moved.absmax, moved.absmax_scale, moved.absmax_offset, moved.levels)
    assert torch.equal(codec.dequantize(*parts, 192, 64, dtype).cpu(), q.dequantize(dtype))


@given(st.integers(1, 5), st.integers(1, 200))
def test_a_flat_tensor_is_searched_as_one_row(rows, columns):
    w = torch.randn(rows, columns)
    flat, row = qlite.quantize_nf4(w, flat=True, search=True), qlite.quantize_nf4(w.view(1, -1), search=True)
    assert torch.equal(flat.codes, row.codes) and torch.equal(flat.dequantize().view(-1), row.dequantize().view(-1))


def test_files_say_that_scales_were_searched_for(tmp_path):
    folder = tmp_path / "searched"
    assert cli.main(["quantize", "--output", str(folder), "--search", "--dtype", "float32"]) == 0
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    assert all(layer["search"] is True for layer in layers.values())
    model, plain = qlite.load_falcon(folder), qlite.load_falcon(ASSETS / "tiny-falcon", quantize=qlite.Linear4bit)
    dense = qlite.load_falcon(ASSETS / "tiny-falcon")
    errors = {}
    for name, kind in (("searched", model), ("plain", plain)):
        there = dict(kind.named_modules())
        errors[name] = sum(
            (there[key].dequantize().float() - layer.weight.float()).square().sum().item()
            for key, layer in dense.named_modules()
            if isinstance(there[key], qlite.Linear4bit)
        )
    assert errors["searched"] < 0.9 * errors["plain"]
    again = next(module for module in model.modules() if isinstance(module, qlite.Linear4bit))
    assert again.search and again.config()["search"] is True
    assert "search" not in next(m for m in plain.modules() if isinstance(m, qlite.Linear4bit)).config()


def test_a_layer_with_other_scales_is_trained_and_loaded_as_any_other(tmp_path):
    layer = qlite.Linear4bit(128, 64, search=True).quantize_(torch.randn(64, 128))
    other = qlite.Linear4bit(128, 64)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 128, requires_grad=True)
    layer(x).sum().backward()
    assert torch.equal(other(x), layer(x)) and torch.allclose(x.grad, layer.dequantize().sum(0).expand(3, -1), atol=1e-5)
    assert tuple(layer.levels.tolist()) == pytest.approx(NF4_LEVELS)

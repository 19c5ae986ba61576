"""The training loop: what a step computes, what it leaves alone, and what it writes down."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import itertools
import json
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qlite
from qlite.data import ASSETS, IGNORED, Batch
from qlite.journal import plot_losses, read_metrics
from qlite.train import SCHEDULES, answer_loss, learning_rate_factor
from tests.toys import (
    BAD_GRADIENT,
    BAD_LOSS,
    GOOD,
    OPTIMIZERS,
    PAIRS,
    VOCABULARY,
    Toy,
    batch_of,
    bits,
    faq,
    one_thread,  # noqa: F401 (a fixture for every test here)
    sgd,
    tiny_falcon,
    trained_parameters,
    tune,
)

# The learning rate

shares = st.one_of(st.sampled_from((0.0, 0.05, 1.0)), st.floats(0, 1))


@given(st.integers(1, 300), st.sampled_from(SCHEDULES), shares)
def test_the_factor_rises_to_one_and_never_rises_again(steps, schedule, warmup):
    factors = [learning_rate_factor(step, steps, schedule, warmup) for step in range(steps)]
    rising = math.ceil(warmup * steps)
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:rising] == [(step + 1) / rising for step in range(rising)]
    assert max(factors) == factors[max(0, rising - 1)] == 1.0
    assert all(one >= other for one, other in itertools.pairwise(factors[max(0, rising - 1) :]))
    if schedule == "constant":
        assert set(factors[rising:]) <= {1.0}


@given(st.integers(2, 300), shares)
def test_cosine_and_line_end_one_step_before_zero_and_meet_halfway(steps, warmup):
    rising = math.ceil(warmup * steps)
    falling = steps - rising
    if falling == 0:
        return
    # 1e-12: a handful of float64 roundings of numbers up to 1.
    line = learning_rate_factor(steps - 1, steps, "linear", warmup)
    assert line == pytest.approx(1 / falling, abs=1e-12)
    cosine = learning_rate_factor(steps - 1, steps, "cosine", warmup)
    assert cosine == pytest.approx(math.sin(math.pi / 2 / falling) ** 2, abs=1e-12)  # sin^2(x/2) = (1 - cos x) / 2
    if falling % 2 == 0:
        middle = rising + falling // 2
        assert [learning_rate_factor(middle, steps, s, warmup) for s in ("linear", "cosine")] == pytest.approx([0.5] * 2)


def recorded(optimizer):
    """A list that gets the learning rates of every step that the optimizer makes."""
    rates = []
    optimizer.register_step_pre_hook(lambda opt, *_: rates.append([group["lr"] for group in opt.param_groups]))
    return rates


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_group_follows_the_schedule_from_its_own_peak(schedule):
    model = Toy()
    optimizer = torch.optim.SGD(
        [{"params": [model.shift], "lr": 0.5}, {"params": [model.factor, model.unused], "lr": 2}], lr=9.0
    )
    rates = recorded(optimizer)
    tune(model, GOOD, optimizer, steps=10, schedule=schedule, warmup=0.25)
    factors = [learning_rate_factor(step, 10, schedule, 0.25) for step in range(10)]
    assert rates == [[0.5 * factor, 2 * factor] for factor in factors]


def test_a_second_run_starts_from_the_peak_and_a_new_lr_is_taken():
    model = Toy()
    optimizer = sgd(model, lr=0.5)
    rates = recorded(optimizer)
    tune(model, GOOD, optimizer, steps=3, schedule="cosine")
    tune(model, GOOD, optimizer, steps=3, schedule="cosine")
    assert rates[3:] == rates[:3] and rates[0] == [0.5]
    optimizer.param_groups[0]["lr"] = 0.25
    tune(model, GOOD, optimizer, steps=1)
    assert rates[6:] == [[0.25]]


# The loss and its gradient


@pytest.mark.parametrize("quantize", [None, qlite.Linear4bit])
def test_the_loss_is_cross_entropy_over_all_positions_with_ignore_index(quantize):
    model = tiny_falcon(quantize=quantize, dropout=0.0)
    for parameter in trained_parameters(model):
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    for batch in faq(PAIRS[:6], batch_size=3, shuffle=False):
        found = answer_loss(model, batch)
        logits = model(batch.input_ids)[:, :-1].float()
        wanted = nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), batch.labels[:, 1:].reshape(-1), ignore_index=IGNORED, reduction="sum"
        )
        assert found.dtype == torch.float32 and found.ndim == 0 and batch.n_tokens > 20
        # Under 200 float32 terms in another order, and products over other rows: 200 * 2^-24 is 1.2e-5.
        torch.testing.assert_close(found, wanted, rtol=1.2e-5, atol=0)
        gradients = [torch.autograd.grad(loss, trained_parameters(model)) for loss in (answer_loss(model, batch), wanted)]
        for one, other in zip(*gradients, strict=True):
            # Relative Frobenius error; sums of a few hundred float32 products.
            assert (one - other).norm() <= 1e-5 * other.norm()


def test_logits_are_computed_for_counted_positions_alone():
    model, seen = Toy(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    answer_loss(model, batch_of(([1, 2, 3], [4]), ([1], [5, 6])))
    assert seen == [(3, 8)]


rows = st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.lists(st.integers(1, 9), min_size=1, max_size=9))


@given(st.lists(st.lists(rows, min_size=1, max_size=3), min_size=2, max_size=5))
def test_a_window_of_uneven_batches_weighs_as_one_big_batch(window):
    batches = [batch_of(*group) for group in window]
    whole = batch_of(*(row for group in window for row in group))
    models = [Toy().double(), Toy().double()]
    results = [
        tune(models[0], batches, steps=1, accumulate=len(batches), max_grad_norm=None),
        tune(models[1], [whole], steps=1, max_grad_norm=None),
    ]
    # The loss is float32: under 20 roundings of 2^-24.
    assert results[0].losses[0] == pytest.approx(results[1].losses[0], rel=20 * 2**-24)
    for one, other in zip(*map(trained_parameters, models), strict=True):
        # The logits are rounded to float32, at up to 60 * 2^-24; 25 bounds what reaches a weight from them, 0.1 is the lr.
        assert (one - other).detach().abs().max() <= 25 * 0.1 * 60 * 2**-24


def test_a_window_on_a_falcon_weighs_as_one_big_batch():
    batches = [batch_of(*group) for group in ([([5], [7])], [([9, 10, 11], [12] * 30), ([4, 5], [6, 7])], [([8], [9] * 3)])]
    whole = batch_of(([5], [7]), ([9, 10, 11], [12] * 30), ([4, 5], [6, 7]), ([8], [9] * 3))
    gradients = []
    for window in (batches, [whole], batches[:2]):
        model = tiny_falcon(dropout=0.0)
        start = [p.detach().clone() for p in trained_parameters(model)]
        tune(model, window, sgd(model, lr=1.0), steps=1, accumulate=len(window), max_grad_norm=None)
        moved = [old - new for old, new in zip(start, trained_parameters(model), strict=True)]
        gradients.append(torch.cat([m.flatten() for m in moved]))
    # Float32 sums in another order, and the subtraction above; a batch too little or a mean of means is off by percents.
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()
    assert (gradients[2] - gradients[1]).norm() > 1e-2 * gradients[1].norm()


@pytest.mark.parametrize("limit", [1e-3, 0.1, 1e6])
def test_gradients_are_clipped_as_torch_clips_them(limit, tmp_path):
    model, other = Toy(), Toy()
    (answer_loss(other, GOOD[0]) / GOOD[0].n_tokens).backward()
    gradients = [p.grad for p in trained_parameters(other) if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(trained_parameters(other), limit)
    seen = []
    optimizer = sgd(model)
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad for p in trained_parameters(model) if p.grad is not None))
    tune(model, GOOD, optimizer, steps=1, max_grad_norm=limit, output_dir=tmp_path)
    assert len(seen) == 2 and all(torch.equal(one, two) for one, two in zip(seen, gradients, strict=True))
    total = torch.cat([g.flatten() for g in seen]).norm().item()
    assert (0.01 < norm.item() < 100) and total == pytest.approx(min(limit, norm.item()), rel=1e-2 if limit < 1e-2 else 1e-4)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["grad_norm"] == norm.item()  # as it was before it was clipped


def test_no_limit_clips_nothing():
    model, other = Toy(gain=30.0), Toy(gain=30.0)
    (answer_loss(other, GOOD[0]) / GOOD[0].n_tokens).backward()
    optimizer = sgd(model)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(model.shift.grad))
    tune(model, GOOD, optimizer, steps=1, max_grad_norm=None)
    assert other.shift.grad.norm() > 10 and torch.equal(seen[0], other.shift.grad)


def test_gradients_left_from_before_do_not_count():
    model, clean = Toy(), Toy()
    model.shift.grad = torch.full_like(model.shift, 1e3)
    assert tune(model, GOOD, steps=2).losses == tune(clean, GOOD, steps=2).losses
    assert bits(model.state_dict()) == bits(clean.state_dict())
    assert model.shift.grad is None


# What changes, and what does not


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("quantize", [qlite.Linear4bit, qlite.Linear8bit])
def test_only_what_is_trained_changes_and_no_byte_of_the_base(name, quantize):
    model = tiny_falcon(quantize=quantize)
    before = bits(model.state_dict())
    result = tune(model, faq(), OPTIMIZERS[name](qlite.lora_parameters(model), lr=1e-2), steps=4, accumulate=2)
    after = bits(model.state_dict())
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {key for key, p in model.named_parameters() if p.requires_grad} and len(changed) == 16
    assert after.keys() == before.keys() and len(result.losses) == 4
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_lowers_the_loss_on_the_tiny_base(name):
    model = qlite.load_falcon(ASSETS / "tiny-falcon", quantize=qlite.Linear4bit, dtype=torch.float32)
    qlite.add_lora(model, qlite.LoRAConfig(r=8), seed=0)
    batches = faq(PAIRS[:4], batch_size=4)
    optimizer = OPTIMIZERS[name](qlite.lora_parameters(model), lr=5e-3, weight_decay=0.0)
    result = qlite.finetune(model, batches, optimizer, steps=6, accumulate=1, progress=False)
    # The same four answers six times: the first three steps were seen to take their loss from 12.6 to 2.6.
    assert result.losses[-1] < 0.5 * result.losses[0]
    longest = max(len(prompt) + len(answer) for prompt, answer in batches.rows)
    assert (result.skipped, result.tokens) == (0, 6 * 4 * longest) and result.seconds > 0


@pytest.mark.parametrize("training", [True, False])
def test_the_model_trains_in_training_mode_and_is_put_back(training):
    model = Toy().train(training)
    tune(model, GOOD, steps=3)
    assert model.modes == [True] * 3 and model.training is training
    with pytest.raises(FloatingPointError):
        tune(model, [BAD_LOSS], steps=1)
    assert model.training is training


@pytest.mark.parametrize("batches", [GOOD, [BAD_LOSS]])
def test_global_random_state_and_learning_rate_are_put_back(batches):
    model = Toy(dropout=0.5)
    optimizer = sgd(model, lr=0.5)
    before = torch.get_rng_state()
    try:
        tune(model, batches, optimizer, steps=12, schedule="linear", warmup=0.5)
    except FloatingPointError:
        assert batches is not GOOD
    assert torch.equal(torch.get_rng_state(), before)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]


def test_dropout_depends_on_the_seed_alone():
    losses = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(noise)
            losses.append(tune(Toy(dropout=0.5), GOOD, steps=6, seed=seed).losses)
    assert losses[0] == losses[1] and losses[0] != losses[2]


# How long


class Counted:
    """Batches that count how many were given out."""

    def __init__(self, batches):
        self.batches, self.given = batches, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            self.given += 1
            yield batch


@pytest.mark.parametrize(
    ("length", "accumulate", "wanted"),
    [
        ({"steps": 7}, 3, 7),
        ({"epochs": 1}, 4, 6),
        ({"epochs": 1}, 5, 5),  # 24 batches in windows of 5: the last one reaches into the next epoch
        ({"epochs": 2.5}, 1, 60),
        ({"epochs": 0.01}, 1, 1),
        ({}, 1, 80),
        ({"steps": None, "epochs": None}, 1, 80),
    ],
)
def test_steps_are_counted_and_epochs_are_rounded_up_to_steps(length, accumulate, wanted):
    batches = Counted(GOOD)
    result = tune(Toy(), batches, accumulate=accumulate, **length)
    assert len(result.losses) == wanted and batches.given == wanted * accumulate
    assert result.tokens == wanted * accumulate * 3


def test_batches_come_in_their_order_epoch_after_epoch():
    model, seen = Toy(), []
    batches = faq([("a", "b"), ("c", "d e"), ("f", "g h i")], seed=2)
    plain, model.hidden_states = model.hidden_states, lambda ids: seen.append(ids.tolist()) or plain(ids % 9)
    model.lm_head.forward = lambda x: torch.zeros(len(x), 4096) + x.sum()
    tune(model, batches, steps=4, accumulate=2)
    order = [index for epoch in range(3) for index in batches.order(epoch)][:8]
    assert [ids[0] for ids in seen] == [batches.rows[i][0] + batches.rows[i][1] for i in order]


# Steps that are skipped


def state_of(model, optimizer):
    state = optimizer.state_dict()["state"]
    tensors = {f"{i}.{key}": v for i, entry in state.items() for key, v in entry.items() if isinstance(v, torch.Tensor)}
    numbers = {f"{i}.{key}": v for i, entry in state.items() for key, v in entry.items() if not isinstance(v, torch.Tensor)}
    return bits(model.state_dict()), bits(tensors), numbers


@pytest.mark.parametrize("bad", [BAD_LOSS, BAD_GRADIENT], ids=["loss", "gradient"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing(name, bad, accumulate, tmp_path):
    def run(batches, folder):
        model = Toy()
        optimizer = OPTIMIZERS[name](trained_parameters(model), lr=0.1)
        options = {"steps": 3, "accumulate": accumulate, "schedule": "cosine", "output_dir": folder}
        return tune(model, batches, optimizer, **options), state_of(model, optimizer)

    # The second window has the bad batch, at its end; without it, the run is the same bit for bit.
    first, second, third, last = (GOOD[i : i + accumulate] for i in (0, 2, 4, 6))
    skipped, state = run([*first, *second[:-1], bad, *third, *last], tmp_path / "a")
    clean, wanted = run([*first, *third, *last], tmp_path / "b")
    assert state == wanted and skipped.losses == clean.losses
    assert (skipped.skipped, clean.skipped) == (1, 0)
    keys = ("step", "loss", "lr", "grad_norm")
    written = [[{key: row[key] for key in keys} for row in read_metrics(tmp_path / x / "metrics.jsonl")] for x in "ab"]
    assert written[0] == written[1]


@pytest.mark.parametrize("bad", [BAD_LOSS, BAD_GRADIENT], ids=["loss", "gradient"])
def test_ten_bad_steps_in_a_row_end_the_run_and_leave_the_model_as_it_was(bad):
    model = Toy()
    before = bits(model.state_dict())
    batches = Counted([bad])
    with pytest.raises(FloatingPointError, match="10 steps in a row at step 0 had no finite loss and gradient"):
        tune(model, batches, steps=20)
    assert bits(model.state_dict()) == before and batches.given == 10
    assert all(p.grad is None for p in model.parameters())


def test_bad_steps_that_are_not_in_a_row_are_only_counted():
    result = tune(Toy(), ([BAD_LOSS] * 9 + GOOD[:1]) * 3, steps=3)
    assert (len(result.losses), result.skipped) == (3, 27)


# float16


def half_toy():
    """Computes in float16, where its gradients overflow at the first loss scale and not at a smaller one (tested below)."""
    return Toy(dtype=torch.float16, gain=2.0)


@pytest.fixture
def scales(monkeypatch):
    """The loss scale of every window, read off the gradient that reaches the summed loss."""
    seen = []
    plain = qlite.train.answer_loss

    def observed(model, batch):
        loss = plain(model, batch)
        loss.register_hook(lambda gradient: seen.append(round(gradient.item() * batch.n_tokens)))
        return loss

    monkeypatch.setattr(qlite.train, "answer_loss", observed)
    return seen


def test_the_loss_scale_halves_until_the_gradients_fit_float16(scales):
    model = half_toy()
    before = bits(model.state_dict())
    result = tune(model, GOOD[:1], sgd(model, lr=0.0), steps=4)
    assert scales == [2**16 >> i for i in range(result.skipped)] + [2**16 >> result.skipped] * 4
    assert 1 <= result.skipped < 9 and len(result.losses) == 4 and bits(model.state_dict()) == before


def test_the_scale_does_not_show_in_the_step(scales, monkeypatch):
    moved = []
    for first in (2.0**9, 2.0**3):
        monkeypatch.setattr(qlite.train, "FIRST_LOSS_SCALE", first)
        model = half_toy()
        start = model.shift.detach().clone()
        tune(model, GOOD, sgd(model, lr=1.0), steps=1, max_grad_norm=None)
        moved.append(start - model.shift.detach())
    assert scales == [2**9, 2**3]
    # Scaling by a power of two is exact but for what underflows float16 at the smaller scale: 2^-25 / 2^3 each.
    torch.testing.assert_close(moved[0], moved[1], rtol=2e-3, atol=1e-6)


def test_the_loss_scale_doubles_after_200_good_steps(scales, monkeypatch):
    monkeypatch.setattr(qlite.train, "FIRST_LOSS_SCALE", 2.0**6)
    bad = [BAD_LOSS if i == 50 else GOOD[i % 24] for i in range(600)]
    tune(half_toy(), bad, steps=460)
    # 50 good, one bad (halves, and the count starts anew), 200 good, doubled, 200 good, doubled, the rest.
    assert [(scale, len(list(group))) for scale, group in itertools.groupby(scales)] == [
        (2**6, 51), (2**5, 200), (2**6, 200), (2**7, 10),
    ]  # fmt: skip


def test_float32_has_no_loss_scale(scales):
    tune(Toy(), [*GOOD * 10, BAD_LOSS], steps=250)  # a bad one after 240, so that both ways to another scale are tried
    assert set(scales) == {1}


def test_the_loss_scale_comes_up_from_its_least(scales, monkeypatch):
    monkeypatch.setattr(qlite.train, "FIRST_LOSS_SCALE", 2.0)
    tune(half_toy(), [*[BAD_LOSS] * 3, *GOOD * 10], steps=201)
    assert scales == [2, 1, 1, *[1] * 200, 2]


def test_what_a_model_computes_in_is_not_the_dtype_of_codes_or_of_adapters():
    class Encoded(Toy):  # its first parameter holds codes, and the first float one is trained
        def __init__(self):
            super().__init__(dtype=torch.float16)
            self.base = nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)
            self.lm_head = qlite.Linear4bit(8, VOCABULARY, False, dtype=torch.float16).quantize_(self.lm_head.weight.detach())

        def hidden_states(self, input_ids):
            return torch.ones(*input_ids.shape, 8, dtype=torch.float16) * self.factor.half() + self.shift.half()

    assert tune(Encoded(), GOOD, steps=1).facts["dtype"] == "torch.float16"
    assert tune(Toy(), GOOD, steps=1).facts["dtype"] == "torch.float32"


def test_a_float16_falcon_trains():
    model = tiny_falcon(dtype=torch.float16, r=4)
    optimizer = qlite.PagedAdamW8bit(qlite.lora_parameters(model), lr=2e-2)
    result = tune(model, faq(PAIRS[:2], batch_size=2), optimizer, steps=8)
    assert result.losses[-1] < result.losses[0] - 0.05 and all(p.dtype == torch.float32 for p in qlite.lora_parameters(model))


# What is written down


def test_metrics_have_one_row_a_step(tmp_path):
    result = tune(Toy(), GOOD, steps=6, accumulate=2, schedule="linear", output_dir=tmp_path / "new" / "run")
    rows = read_metrics(tmp_path / "new" / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == result.losses
    assert [row["lr"] for row in rows] == [0.1 * (1 - step / 6) for step in range(6)]
    assert all(row.keys() == {"step", "loss", "lr", "grad_norm", "tokens_per_second"} for row in rows)
    assert all(math.isfinite(v) and v > 0 for row in rows for v in row.values())


def test_a_row_is_in_the_file_when_the_next_step_begins(tmp_path):
    model, seen = Toy(), []
    optimizer = sgd(model)
    optimizer.register_step_pre_hook(lambda *_: seen.append(len(read_metrics(tmp_path / "metrics.jsonl"))))
    tune(model, GOOD, optimizer, steps=4, output_dir=tmp_path)
    assert seen == [0, 1, 2, 3]


def test_a_new_run_does_not_replace_the_metrics_of_an_earlier_one(tmp_path):
    tune(Toy(), GOOD, steps=3, output_dir=tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl is of an earlier run"):
        tune(Toy(), GOOD, steps=5, output_dir=tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tune(Toy(), GOOD, steps=2)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr() == ("", "")


def test_tensorboard_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tune(Toy(), GOOD, steps=9, output_dir=tmp_path, tensorboard=True)
    (tmp_path / "metrics.jsonl").unlink()
    tune(Toy(), GOOD, steps=5, output_dir=tmp_path, tensorboard=True)  # a new run takes the place of the old one
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert sorted(events.Tags()["scalars"]) == ["grad_norm", "loss", "lr", "tokens_per_second"]
    for key in events.Tags()["scalars"]:
        found = [(event.step, event.value) for event in events.Scalars(key)]
        # TensorBoard keeps float32.
        assert found == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows]


def test_the_loss_curve_is_a_png(tmp_path):
    from matplotlib.image import imread

    tune(Toy(), GOOD, steps=5, output_dir=tmp_path)
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(tmp_path / "loss.png")
    assert pixels.shape == (480, 840, 4) and 0 < (pixels[..., :3] < 0.9).mean() < 0.5  # something is drawn on white


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("torch.utils.tensorboard", lambda folder: tune(Toy(), GOOD, steps=1, output_dir=folder, tensorboard=True)),
        ("matplotlib.figure", lambda folder: plot_losses(folder / "metrics.jsonl", folder / "loss.png")),
    ],
)
def test_a_package_that_is_not_installed_is_named(module, call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"is not installed; pip install 'qlite\["):
        call(tmp_path)


def test_the_progress_line_shows_loss_rate_and_speed(capsys):
    result = tune(Toy(), GOOD, steps=5, progress=True)
    printed, shown = capsys.readouterr()
    last = shown.split("\r")[-1]
    assert printed == "" and "5/5" in last
    assert f"loss={result.losses[-1]:.4f}" in last and "lr=1.00e-01" in last and "tok/s=" in last and "peak" not in last


# What is refused, before anything happens


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": -1.0}, "epochs is -1.0"),
        ({"epochs": math.nan}, "epochs is nan"),
        ({"epochs": math.inf}, "epochs is inf"),
        ({"steps": 1, "epochs": 1}, "give steps or epochs, not both"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"accumulate": 1.5}, "accumulate is 1.5"),
        ({"schedule": "cosin"}, "schedule is 'cosin'; wanted one of cosine, linear, constant"),
        ({"warmup": -0.1}, "warmup is -0.1"),
        ({"warmup": 1.1}, "warmup is 1.1"),
        ({"warmup": math.nan}, "warmup is nan"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm is nan"),
        ({"save_every": 0, "output_dir": "run"}, "save_every is 0"),
        ({"save_every": -1, "output_dir": "run"}, "save_every is -1"),
        ({"save_every": 1, "save_total_limit": 0, "output_dir": "run"}, "save_total_limit is 0"),
        ({"save_every": 1}, "save_every, resume and tensorboard need an output_dir"),
        ({"resume": True}, "need an output_dir"),
        ({"tensorboard": True}, "need an output_dir"),
        ({"save_every": 1, "output_dir": "run"}, "batches is a list without state_dict"),
        ({"resume": True, "output_dir": "run"}, "batches is a list without state_dict"),
    ],
)
def test_bad_options_are_refused_by_name(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Toy()
    optimizer = sgd(model)
    before = bits(model.state_dict())
    with pytest.raises(ValueError, match=f"finetune: .*{words}"):
        tune(model, GOOD, optimizer, **options)
    assert bits(model.state_dict()) == before and model.modes == [] and list(tmp_path.iterdir()) == []
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]


def test_a_model_without_trained_parameters_is_refused():
    model = Toy()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match="no parameter of the model has requires_grad; call add_lora first"):
        tune(model.requires_grad_(False), GOOD, optimizer)


def test_an_optimizer_over_other_parameters_is_refused():
    model = Toy()
    with pytest.raises(ValueError, match="the optimizer lacks 3 of 3 trained parameters"):
        tune(model, GOOD, sgd(copy.deepcopy(model)))
    with pytest.raises(ValueError, match=r"lacks 1 of 3 trained parameters \(factor first\); make it after add_lora"):
        tune(model, GOOD, torch.optim.SGD([model.shift, model.unused], lr=0.1))
    assert model.modes == []


@pytest.mark.parametrize("batches", [[], iter(GOOD)], ids=["a list", "a generator"])
def test_batches_that_come_to_an_end_are_an_error(batches):
    with pytest.raises(ValueError, match="batches is empty"):
        tune(Toy(), batches, steps=30)


def test_a_window_without_a_labelled_token_is_an_error():
    batch = dataclasses.replace(GOOD[0], labels=torch.full_like(GOOD[0].labels, IGNORED), n_tokens=0)
    assert isinstance(batch, Batch)
    with pytest.raises(ValueError, match="has no labelled token"):
        tune(Toy(), [batch], steps=1)


def test_a_result_is_plain_numbers():
    result = tune(Toy(), GOOD, steps=2)
    assert json.loads(json.dumps(dataclasses.asdict(result)))["losses"] == result.losses


# What a model card is written from


def test_a_run_tells_its_facts(tmp_path):
    model = tiny_falcon()
    batches = faq(batch_size=2)
    optimizer = qlite.AdamW8bit(qlite.lora_parameters(model), lr=1e-3, weight_decay=0.1)
    result = tune(model, batches, optimizer, steps=3, accumulate=2, schedule="linear", warmup=0.5, seed=7)
    facts = json.loads(json.dumps(result.facts))
    assert facts["loss"] == {"first": result.losses[0], "last": result.losses[-1]}
    settings = {"steps": 3, "accumulate": 2, "schedule": "linear", "warmup": 0.5, "max_grad_norm": 1.0, "seed": 7}
    assert settings.items() <= facts.items()
    assert facts["optimizer"] == {"name": "AdamW8bit", "lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}
    assert (facts["questions"], facts["batch_size"], facts["left_out"]) == (len(batches.rows), 2, len(batches.skipped))
    assert facts["prompt"] == "Question: {question}\nAnswer:" and facts["lora"]["r"] == model.lora_config.r
    assert facts["dtype"] == "torch.float32" and facts["versions"]["torch"] == torch.__version__


def test_a_run_over_other_batches_claims_nothing_about_questions():
    facts = tune(Toy(), GOOD, steps=2).facts
    assert not {"questions", "batch_size", "prompt"} & facts.keys() and facts["layers"] == [] and facts["lora"] is None


def test_a_result_is_saved_for_the_card(tmp_path):
    result = tune(Toy(), GOOD, steps=4)
    written = result.save(tmp_path / "new" / "adapter")
    assert [path.name for path in written] == ["training.json", "loss.png"] and sorted(written) == sorted(
        written[0].parent.iterdir()
    )
    assert json.loads(written[0].read_text()) == json.loads(json.dumps(result.facts))
    plot_losses_of(result, tmp_path)
    assert written[1].read_bytes() == (tmp_path / "loss.png").read_bytes()


def plot_losses_of(result, folder):
    rows = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(result.losses, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(rows))
    plot_losses(folder / "metrics.jsonl", folder / "loss.png")


def test_without_matplotlib_a_result_is_saved_without_a_curve(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert [path.name for path in tune(Toy(), GOOD, steps=1).save(tmp_path)] == ["training.json"]

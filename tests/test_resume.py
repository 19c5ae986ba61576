"""A run that was cut off goes on bit for bit, whatever the moment, and a checkpoint is there whole or not at all."""

from __future__ import annotations

import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import qlite
from qlite import resume
from qlite.journal import read_metrics
from tests.toys import (
    BAD_LOSS,
    GOOD,
    OPTIMIZERS,
    PAIRS,
    Toy,
    bits,
    faq,
    one_thread,  # noqa: F401 (a fixture for every test here)
    sgd,
    tiny_falcon,
)

FILES = {"state.json", "state.safetensors", "manifest.json"}


class Cut(Exception):
    """What ends a run early in these tests."""


def job(optimizer="paged_adamw_8bit", *, pairs=PAIRS[:10], seed=0, quantize=qlite.Linear4bit, lora=None, data=None, **settings):
    """What a new process makes before it calls finetune: 5 batches an epoch, so 2.5 steps of two batches."""
    model = tiny_falcon(quantize=quantize, **{"dropout": 0.1, "r": 4, **(lora or {})})
    # Some of the adapters' tensors are large enough for 8-bit codes, some are not.
    eight_bit = {} if optimizer == "adamw" else {"min_8bit_size": 512}
    settings = {"lr": 1e-2, "weight_decay": 0.01, **eight_bit, **settings}
    optimizer = OPTIMIZERS[optimizer](qlite.lora_parameters(model), **settings)
    batches = faq(pairs, **{"batch_size": 2, "seed": seed, **(data or {})})
    return types.SimpleNamespace(model=model, optimizer=optimizer, batches=batches)


def go(job, folder, *, steps=10, cut=None, **options):
    """Trains; cut=(n, moment) ends the run in its n-th step: half-way to the gradient, before the update or after it."""
    options = {"accumulate": 2, "warmup": 0.1, "progress": False, "output_dir": folder, "steps": steps, **options}
    if cut is None:
        return qlite.finetune(job.model, job.batches, job.optimizer, **options)
    last, moment = cut
    made = itertools.count(1)

    def end_it(*_):
        if next(made) == last:
            raise Cut

    handles = {
        # The second batch of the window: the gradient is half there.
        "gradient": lambda: job.model.lm_head.register_forward_hook(
            lambda *_: end_it() if job.model.lm_head.calls() % 2 == 1 else None
        ),
        "before": lambda: job.optimizer.register_step_pre_hook(end_it),
        "after": lambda: job.optimizer.register_step_post_hook(end_it),
    }
    job.model.lm_head.calls = functools.partial(next, itertools.count())
    handle = handles[moment]()
    with pytest.raises(Cut):
        qlite.finetune(job.model, job.batches, job.optimizer, **options)
    handle.remove()
    return None


def state_of(job):
    """All that a run changes, bit for bit."""
    state = job.optimizer.state_dict()
    parts = {f"{i} {key}": v for i, entry in state["state"].items() for key, v in entry.items()}
    tensors = {key: value for key, value in parts.items() if isinstance(value, torch.Tensor)}
    return {
        "model": bits(job.model.state_dict()),
        "moments": bits(tensors),
        "numbers": {key: value for key, value in parts.items() if key not in tensors},
        "groups": json.loads(json.dumps(state["param_groups"])),
        "data": job.batches.state_dict(),
    }


def figures(folder):
    return [{key: v for key, v in row.items() if key != "tokens_per_second"} for row in read_metrics(folder / "metrics.jsonl")]


@functools.cache
def uninterrupted(steps=10, optimizer="paged_adamw_8bit"):
    """The losses and the last state of a run that nothing disturbs and that saves nothing."""
    whole = job(optimizer)
    losses = go(whole, None, steps=steps).losses
    return losses, state_of(whole)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Bit for bit


@pytest.mark.parametrize(("optimizer", "half"), [("paged_adamw_8bit", 40), ("adamw_8bit", 6), ("adamw", 6)])
def test_forty_steps_and_forty_more_are_eighty(tmp_path, optimizer, half):
    whole, first, second = 2 * half, f"checkpoint-{half:06d}", f"checkpoint-{2 * half:06d}"
    go(job(optimizer), tmp_path, steps=whole, save_every=half, cut=(half + 1, "before"))
    assert names(tmp_path) == [first, "metrics.jsonl"]
    again = job(optimizer)
    result = go(again, tmp_path, steps=whole, save_every=half, resume=True)
    assert (result.losses, state_of(again)) == uninterrupted(whole, optimizer)
    assert names(tmp_path) == [first, second, "metrics.jsonl"]
    assert [row["step"] for row in figures(tmp_path)] == list(range(1, whole + 1))


# Ten steps of two batches over epochs of five: step 5 and step 10 end with an epoch, step 3 and step 8 reach over one.
@pytest.mark.parametrize(
    ("last", "moment"),
    [*((last, "gradient") for last in range(2, 11)), *itertools.product((3, 6, 10), ("before", "after"))],
)
def test_a_run_cut_off_in_any_step_goes_on_as_if_nothing_had_been(tmp_path, last, moment):
    go(job(), tmp_path, save_every=1, cut=(last, moment))
    # The step in which it ended is not saved.
    assert resume.checkpoints(tmp_path)[0].name == f"checkpoint-{last - 1:06d}"
    again = job()
    result = go(again, tmp_path, save_every=1, resume=True)
    assert (result.losses, state_of(again)) == uninterrupted()


@pytest.mark.parametrize("every", [2, 3, 5, 7])
def test_what_came_after_the_checkpoint_is_done_again_and_written_once(tmp_path, every):
    go(job(), tmp_path / "cut", save_every=every, cut=(9, "gradient"))
    assert [row["step"] for row in figures(tmp_path / "cut")] == list(range(1, 9))
    again = job()
    result = go(again, tmp_path / "cut", save_every=every, resume=True)
    assert (result.losses, state_of(again)) == uninterrupted()
    go(job(), tmp_path / "whole")
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")
    # Tokens are those of this call, the losses those of the whole run.
    newest = 8 // every * every
    assert 0 < result.tokens < 300 * (10 - newest) and len(result.losses) == 10


def test_a_run_may_be_cut_off_again_and_again(tmp_path):
    for last in (1, 2, 2, 4, 1, 3):  # counted from each start
        go(job(), tmp_path, save_every=1, resume=True, cut=(last, "before"))
    assert resume.checkpoints(tmp_path)[0].name == "checkpoint-000007"
    again = job()
    result = go(again, tmp_path, resume=True)
    assert (result.losses, state_of(again)) == uninterrupted()
    assert [row["step"] for row in figures(tmp_path)] == list(range(1, 11))


@pytest.mark.parametrize("moment", ["gradient", "before", "after"])
def test_the_same_objects_may_go_on_in_the_same_process(tmp_path, moment):
    one = job()
    go(one, tmp_path, save_every=3, cut=(6, moment))
    torch.randn(7)  # whoever drew in between
    result = go(one, tmp_path, save_every=3, resume=True)
    assert (result.losses, state_of(one)) == uninterrupted()


def test_a_failure_in_the_data_is_a_moment_like_any_other(tmp_path):
    one = job()
    plain = one.batches.order
    one.batches.order = lambda epoch: plain(epoch) if epoch < 1 else (_ for _ in ()).throw(Cut())
    with pytest.raises(Cut):
        go(one, tmp_path, save_every=1)
    again = job()
    assert (go(again, tmp_path, resume=True).losses, state_of(again)) == uninterrupted()


def test_resuming_where_there_is_nothing_starts_at_the_start(tmp_path):
    one = job()
    result = go(one, tmp_path / "new", save_every=5, resume=True)
    assert (result.losses, state_of(one)) == uninterrupted()


def test_resuming_a_run_that_is_done_does_nothing(tmp_path):
    go(job(), tmp_path, save_every=5)
    before = figures(tmp_path)
    again = job()
    result = go(again, tmp_path, save_every=5, resume=True)
    assert (result.losses, state_of(again)) == uninterrupted()
    assert figures(tmp_path) == before and result.tokens == 0


def test_resident_state_goes_on_paged(tmp_path):
    go(job("adamw_8bit"), tmp_path, save_every=5, cut=(7, "before"))
    again = job("paged_adamw_8bit")
    assert (go(again, tmp_path, resume=True).losses, state_of(again)) == uninterrupted()


def test_the_learning_rate_goes_on_along_its_schedule_and_ends_at_its_peak(tmp_path):
    go(job(), tmp_path, save_every=5, schedule="linear", warmup=0.0, cut=(7, "before"))
    again = job()
    go(again, tmp_path, schedule="linear", warmup=0.0, resume=True)
    # 1e-15: a few roundings of float64 at this size.
    assert [row["lr"] for row in figures(tmp_path)] == pytest.approx([1e-2 * (1 - i / 10) for i in range(10)], abs=1e-15)
    assert [group["lr"] for group in again.optimizer.param_groups] == [1e-2]


def test_skipped_steps_and_the_loss_scale_go_on(tmp_path):
    class Listed:
        """Toy batches with a state."""

        def __init__(self):
            self.batches, self.place = [*GOOD[:4], BAD_LOSS, *GOOD[4:9], BAD_LOSS, *GOOD[9:]], 0

        def __iter__(self):
            while self.place < len(self.batches):
                self.place += 1
                yield self.batches[self.place - 1]
            self.place = 0

        def state_dict(self):
            return {"place": self.place}

        def load_state_dict(self, state):
            self.place = state["place"]

    def toy_job():
        model = Toy(dtype=torch.float16, dropout=0.5, gain=2.0)
        return types.SimpleNamespace(model=model, optimizer=sgd(model), batches=Listed())

    options = {"steps": 12, "accumulate": 1, "save_every": 1}
    whole, again = toy_job(), toy_job()
    wanted = go(whole, tmp_path / "whole", **options)
    go(toy_job(), tmp_path / "cut", **options, cut=(7, "before"))
    found = go(again, tmp_path / "cut", **options, resume=True)
    assert (found.losses, found.skipped, state_of(again)) == (wanted.losses, wanted.skipped, state_of(whole))
    last = [json.loads((tmp_path / x / "checkpoint-000012" / "state.json").read_text()) for x in ("whole", "cut")]
    assert last[0]["progress"] == last[1]["progress"] and wanted.skipped > 2
    assert last[0]["progress"]["loss_scale"] == 2.0 ** (16 - wanted.skipped)


def test_tensorboard_shows_each_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    go(job(), tmp_path, save_every=3, tensorboard=True, cut=(9, "before"))
    go(job(), tmp_path, save_every=3, tensorboard=True, resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in events] == list(range(1, 11))


@pytest.mark.parametrize("torn", ['{"step": 9, "lo', '{"step": 9', "\x00\x00\x00"])
def test_a_torn_line_in_the_journal_does_not_matter(tmp_path, torn):
    go(job(), tmp_path, save_every=4, cut=(9, "before"))
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(torn)
    go(job(), tmp_path, resume=True)
    assert [row["step"] for row in figures(tmp_path)] == list(range(1, 11))


# What is on the disk


def test_a_checkpoint_is_json_and_safetensors_and_nothing_else(tmp_path):
    one = job()
    go(one, tmp_path, save_every=10)
    checkpoint = tmp_path / "checkpoint-000010"
    assert {path.name for path in checkpoint.iterdir()} == FILES and names(tmp_path) == [checkpoint.name, "metrics.jsonl"]
    state, manifest = (json.loads((checkpoint / name).read_bytes()) for name in ("state.json", "manifest.json"))
    tensors = load_file(checkpoint / "state.safetensors")
    trained = {name: p for name, p in one.model.named_parameters() if p.requires_grad}
    assert {f"parameter/{name}" for name in trained} == {name for name in tensors if name.startswith("parameter/")}
    assert all(torch.equal(tensors[f"parameter/{name}"], p) for name, p in trained.items())
    assert state["progress"]["step"] == 10 and len(state["progress"]["losses"]) == 10
    assert manifest == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name in ("state.json", "state.safetensors")
        for content in [(checkpoint / name).read_bytes()]
    }


@dataclasses.dataclass
class Place:
    """The least of a data set that has a state."""

    at: int = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def small_run(step=0, size=4, **settings):
    """A run whose one tensor tells its step."""
    weight = nn.Parameter(torch.full((size,), float(step)))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    run = resume.Run({"weight": weight}, optimizer, Place(step), {"lr": [0.5], **settings})
    run.progress["step"] = step
    return run


def loaded(folder):
    """The step that a new run finds, after a look at all its parts."""
    run = small_run()
    assert resume.load_newest(folder, run) is not None
    step = run.progress["step"]
    assert run.batches.at == step and run.parameters["weight"].tolist() == [float(step)] * 4
    return step


@pytest.mark.parametrize("steps", [(9, 10), (99, 100), (999_999, 1_000_000), (1_000_000, 9_999_999, 10_000_000)])
@pytest.mark.parametrize("backwards", [False, True])
def test_the_newest_is_that_of_the_highest_step_and_not_the_last_by_name_or_time(tmp_path, steps, backwards):
    for step in steps[::-1] if backwards else steps:
        resume.save(tmp_path, small_run(step), 9)
    for step in steps:
        os.utime(tmp_path / f"checkpoint-{step:06d}", (10**9 - step, 10**9 - step))
    assert loaded(tmp_path) == steps[-1]
    assert [int(path.name[11:]) for path in resume.checkpoints(tmp_path)] == sorted(steps, reverse=True)


@given(st.integers(1, 3), st.lists(st.integers(1, 3), min_size=1, max_size=5))
def test_the_newest_few_stay(tmp_path_factory, limit, gaps):
    folder = tmp_path_factory.mktemp("run")
    steps = list(itertools.accumulate(gaps))
    for made, step in enumerate(steps, 1):
        saved = resume.save(folder, small_run(step), limit)
        assert saved == folder / f"checkpoint-{step:06d}"
        assert names(folder) == [f"checkpoint-{s:06d}" for s in steps[max(0, made - limit) : made]]
    assert loaded(folder) == steps[-1]


def test_a_run_keeps_as_many_as_it_is_told(tmp_path):
    go(job(), tmp_path, save_every=2, save_total_limit=3)
    assert names(tmp_path) == [*(f"checkpoint-{step:06d}" for step in (6, 8, 10)), "metrics.jsonl"]


def test_folders_of_other_names_are_neither_read_nor_removed(tmp_path):
    for name in ("checkpoint-best-000050", "checkpoint-", "checkpoint-7b", "old-checkpoint-000060", "checkpoint-\u00b2"):
        (tmp_path / name).mkdir()
    others = names(tmp_path)
    for step in (1, 2, 3):
        resume.save(tmp_path, small_run(step), 1)
    assert names(tmp_path) == sorted([*others, "checkpoint-000003"]) and loaded(tmp_path) == 3


def test_a_new_run_does_not_mix_its_checkpoints_with_those_of_an_earlier_one(tmp_path):
    go(job(), tmp_path, save_every=5, save_total_limit=1)
    before = figures(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-000010 is of an earlier run.*resume=True.*another output_dir"):
        go(job(), tmp_path, save_every=2, save_total_limit=1)
    assert figures(tmp_path) == before and names(tmp_path) == ["checkpoint-000010", "metrics.jsonl"]


# Damage


def flip(path, byte, bit):
    content = bytearray(path.read_bytes())
    content[byte % len(content)] ^= 1 << bit
    path.write_bytes(content)


def saved_twice(folder):
    for step in (4, 5):
        resume.save(folder, small_run(step), 2)
    return folder / "checkpoint-000005"


@given(st.sampled_from(sorted(FILES)), st.integers(0, 10_000), st.integers(0, 7))
def test_a_checkpoint_with_any_bit_flipped_is_passed_over_with_a_warning(tmp_path_factory, name, byte, bit):
    folder = tmp_path_factory.mktemp("run")
    flip(saved_twice(folder) / name, byte, bit)
    with pytest.warns(UserWarning, match=r"resuming from .*checkpoint-000004; passed over: .*checkpoint-000005: damaged"):
        assert loaded(folder) == 4


@given(st.sampled_from(sorted(FILES)), st.floats(0, 1, exclude_max=True))
def test_a_checkpoint_cut_short_is_passed_over_with_a_warning(tmp_path_factory, name, share):
    folder = tmp_path_factory.mktemp("run")
    path = saved_twice(folder) / name
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.warns(UserWarning, match="passed over: .*checkpoint-000005: damaged"):
        assert loaded(folder) == 4


def nothing_left(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.write_text("")


def swapped(checkpoint):
    """The state of one step with the tensors of another, each file whole."""
    shutil.copy(checkpoint.with_name("checkpoint-000004") / "state.json", checkpoint / "state.json")


@pytest.mark.parametrize(
    "harm",
    [
        *(pytest.param(lambda checkpoint, name=name: (checkpoint / name).unlink(), id=f"no {name}") for name in sorted(FILES)),
        pytest.param(lambda checkpoint: (checkpoint / "manifest.json").write_text("[]"), id="a list as manifest"),
        pytest.param(lambda checkpoint: (checkpoint / "manifest.json").write_text("{}"), id="an empty manifest"),
        pytest.param(nothing_left, id="a file of that name"),
        pytest.param(swapped, id="the state of another step"),
    ],
)
def test_a_checkpoint_that_lacks_a_part_is_passed_over(tmp_path, harm):
    harm(saved_twice(tmp_path))
    with pytest.warns(UserWarning, match="passed over: .*checkpoint-000005: damaged"):
        assert loaded(tmp_path) == 4


def test_two_damaged_ones_are_both_named(tmp_path):
    for step in (1, 2, 3):
        resume.save(tmp_path, small_run(step), 3)
    for step in (2, 3):
        flip(tmp_path / f"checkpoint-{step:06d}" / "state.safetensors", 300, 0)
    with pytest.warns(UserWarning, match=r"checkpoint-000003: damaged \(state.safetensors is not.*checkpoint-000002: damaged"):
        assert loaded(tmp_path) == 1


def test_if_all_are_damaged_the_run_is_refused_and_unchanged(tmp_path):
    go(job(), tmp_path, save_every=4, cut=(9, "before"))
    for step in (4, 8):
        flip(tmp_path / f"checkpoint-{step:06d}" / "state.json", 99, 3)
    again = job()
    before, written = state_of(again), figures(tmp_path)
    with pytest.raises(ValueError, match=r"no whole checkpoint in .*checkpoint-000008: damaged.*checkpoint-000004: damaged"):
        go(again, tmp_path, resume=True)
    assert state_of(again) == before and figures(tmp_path) == written


@pytest.mark.parametrize("limit", [1, 2])
def test_a_damaged_newer_one_does_not_push_out_what_is_whole(tmp_path, limit):
    go(job(), tmp_path, save_every=4, cut=(9, "before"))
    flip(tmp_path / "checkpoint-000008" / "state.safetensors", 99, 3)
    with pytest.warns(UserWarning, match="passed over: .*checkpoint-000008"):
        go(job(), tmp_path, save_every=1, save_total_limit=limit, resume=True, cut=(4, "before"))  # in step 8
    with pytest.warns(UserWarning, match=r"resuming from .*checkpoint-000007; passed over: .*checkpoint-000008"):
        go(job(), tmp_path, save_every=1, save_total_limit=limit, resume=True, cut=(2, "before"))  # in step 9
    again = job()
    assert (go(again, tmp_path, resume=True).losses, state_of(again)) == uninterrupted()  # 8 is whole now: no warning
    assert resume.checkpoints(tmp_path)[0].name == "checkpoint-000008" and len(resume.checkpoints(tmp_path)) == limit


# Another run


OTHERS = {
    "steps": ({}, {"steps": 12}, "steps was 10, is 12"),
    "accumulation": ({}, {"accumulate": 1}, "accumulate was 2, is 1"),
    "schedule": ({}, {"schedule": "linear"}, "schedule was 'cosine', is 'linear'"),
    "warmup": ({}, {"warmup": 0.2}, "warmup was 0.1, is 0.2"),
    "clipping": ({}, {"max_grad_norm": None}, "max_grad_norm was 1.0, is None"),
    "seed of dropout": ({}, {"seed": 1}, "seed was 0, is 1"),
    "learning rate": ({"lr": 2e-2}, {}, r"lr was \[0.01\], is \[0.02\]"),
    "weight decay": ({"weight_decay": 0.0}, {}, "group 0 weight_decay was 0.01, is 0.0"),
    "optimizer": ({"optimizer": "adamw"}, {}, "group 0 min_8bit_size was 512, is None"),
    "seed of the order": ({"seed": 1}, {}, "it has seed=1, not 0"),
    "batch size": ({"data": {"batch_size": 1}}, {}, "it has batch_size=1, not 2"),
    "questions": ({"pairs": PAIRS[:9]}, {}, "it has rows=9, not 10"),
    "an answer": ({"pairs": [*PAIRS[:9], (PAIRS[9][0], "No.")]}, {}, "it has sha256="),
    "rank": ({"lora": {"r": 8}}, {}, r"parameter transformer.h.0.*lora_A was 'torch.float32 \(4, 64\)', is '.* \(8, 64\)'"),
    "dropout": ({"lora": {"dropout": 0.2}}, {}, "lora dropout was 0.1, is 0.2"),
    "format of the base": ({"quantize": qlite.Linear8bit}, {}, "layers was .*nf4.*, is .*int8"),
    "dtype": ({"lora": {"dtype": torch.bfloat16}}, {}, "dtype was 'torch.float32', is 'torch.bfloat16'"),
}


@pytest.fixture(scope="module")
def five_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("five")
    go(job(), folder, save_every=5, cut=(6, "before"))
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused_with_the_differences_and_unchanged(tmp_path, five_steps, name):
    made, options, words = OTHERS[name]
    folder = shutil.copytree(five_steps, tmp_path / "run")
    other = job(**made)
    before, written, noise = state_of(other), figures(folder), torch.get_rng_state()
    with pytest.raises(ValueError, match=words):
        go(other, folder, save_every=1, resume=True, **options)
    assert state_of(other) == before and figures(folder) == written and torch.equal(torch.get_rng_state(), noise)
    assert names(folder) == ["checkpoint-000005", "metrics.jsonl"]


def test_another_base_is_refused(tmp_path):
    one, other = job(), job()
    one.model.base_fingerprint, other.model.base_fingerprint = "a" * 64, "b" * 64
    go(one, tmp_path, save_every=5, cut=(6, "before"))
    before = state_of(other)
    with pytest.raises(ValueError, match=r"checkpoint-000005: saved by another run: base was 'aa*', is 'bb*'$"):
        go(other, tmp_path, resume=True)
    assert state_of(other) == before


def test_parameters_in_another_order_are_refused(tmp_path, five_steps):
    other = job()
    order = other.optimizer.param_groups[0]["params"]
    order[0], order[2] = order[2], order[0]
    with pytest.raises(ValueError, match=r"saved by another run: group 0 params was \["):
        go(other, shutil.copytree(five_steps, tmp_path / "run"), resume=True)


def test_all_differences_are_listed_or_counted(five_steps):
    with pytest.raises(
        ValueError, match=r"accumulate was 2, is 3; .*seed was 0, is 1; steps was 10, is 11; warmup was 0.1, is 0.3"
    ):
        go(job(), five_steps, resume=True, steps=11, accumulate=3, seed=1, warmup=0.3)
    with pytest.raises(ValueError, match=r"; and \d+ more$"):
        go(job(lora={"r": 2}), five_steps, resume=True)


def test_an_optimizer_that_takes_no_state_leaves_the_run_unchanged(five_steps, monkeypatch):
    again = job()
    before = state_of(again)

    def refuse(state):
        raise ValueError("not mine")

    monkeypatch.setattr(again.optimizer, "load_state_dict", refuse)
    with pytest.raises(ValueError, match="not mine"):
        go(again, five_steps, resume=True)
    assert state_of(again) == before


def test_a_run_of_a_gpu_goes_on_without_one(tmp_path, monkeypatch):
    checkpoint = resume.save(tmp_path, small_run(3), 1)
    tensors = load_file(checkpoint / "state.safetensors")
    save_file({**tensors, "random/cuda": torch.zeros(16, dtype=torch.uint8)}, checkpoint / "state.safetensors")
    content = (checkpoint / "state.safetensors").read_bytes()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["state.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    # Without a GPU torch only notes the call for later; where there is one, it would change a generator that is not ours.
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: pytest.fail("a generator of a GPU was set"))
    assert loaded(tmp_path) == 3


# Crashes


def disk_full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["save_file", "sync", "pathlib.Path.write_text", "pathlib.Path.rename", "pathlib.Path.mkdir"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch, where):
    go(job(), tmp_path, save_every=4, save_total_limit=1, cut=(8, "before"))
    with monkeypatch.context() as patch:
        owner = functools.reduce(getattr, where.split(".")[:-1], resume)
        plain = getattr(owner, where.rpartition(".")[2])
        # Only what touches a checkpoint: the journal is written too.
        patch.setattr(
            owner,
            where.rpartition(".")[2],
            lambda *args, **kwargs: disk_full() if "checkpoint" in str(args) else plain(*args, **kwargs),
        )
        with pytest.raises(OSError, match="No space left"):
            go(job(), tmp_path, save_every=4, save_total_limit=1, resume=True)
    assert [path.name for path in resume.checkpoints(tmp_path)] == ["checkpoint-000004"]
    again = job()
    assert (go(again, tmp_path, save_every=4, resume=True).losses, state_of(again)) == uninterrupted()
    assert names(tmp_path) == ["checkpoint-000004", "checkpoint-000008", "metrics.jsonl"]  # and no leftovers


def observed(monkeypatch, after):
    """Calls after(name, path) once each operation of `save` on the disk is done."""

    def wrap(owner, name, path_of):
        plain = getattr(owner, name)

        def operation(*args, **kwargs):
            result = plain(*args, **kwargs)
            after(name, pathlib.Path(path_of(args)))
            return result

        monkeypatch.setattr(owner, name, operation)

    wrap(resume, "save_file", lambda args: args[1])
    wrap(resume, "sync", lambda args: args[0])
    wrap(resume.shutil, "rmtree", lambda args: args[0])
    for name in ("write_text", "mkdir", "rename"):
        wrap(pathlib.Path, name, lambda args: args[0])


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    resume.save(tmp_path, small_run(1), 1)
    done = []
    observed(monkeypatch, lambda name, path: done.append((name, path.name)))
    resume.save(tmp_path, small_run(2), 1)
    hidden = ".checkpoint-000002.tmp"
    named = done.index(("rename", hidden))
    synced = [path for name, path in done[:named] if name == "sync"]
    written = max(i for i, (name, _) in enumerate(done) if name in ("save_file", "write_text"))
    assert {*FILES, hidden} <= set(synced) and written < done.index(("sync", "state.safetensors"))
    assert synced[-1] == hidden  # the folder after the files in it
    # The new name is on the disk before the old checkpoint is removed.
    assert done[named + 1] == ("sync", tmp_path.name) and done.index(("rmtree", "checkpoint-000001")) > named + 1


@pytest.mark.parametrize("limit", [1, 2])
def test_a_crash_after_any_operation_leaves_the_old_or_the_new_checkpoint_whole(tmp_path, monkeypatch, limit):
    for last in itertools.count(1):
        folder = tmp_path / str(last)
        for step in (3, 4):
            resume.save(folder, small_run(step), limit)
        made = itertools.count(1)
        ended = False

        def crash(name, path, made=made, last=last):
            if next(made) == last:
                raise Cut

        with monkeypatch.context() as patch:
            observed(patch, crash)
            try:
                resume.save(folder, small_run(5), limit)
                ended = True
            except Cut:
                pass
        # No warning, which would be an error here: what is there under its name is whole.
        assert loaded(folder) in ((4, 5) if not ended else (5,))
        resume.save(folder, small_run(6), limit)
        assert loaded(folder) == 6 and not [name for name in names(folder) if name.endswith(".tmp")]
        if ended:
            break
    assert last > 8


@pytest.mark.parametrize("content", [None, "state.json"])
def test_a_leftover_of_a_killed_save_is_not_read_and_goes_with_the_next(tmp_path, content):
    resume.save(tmp_path, small_run(3), 2)
    leftover = tmp_path / ".checkpoint-000004.tmp"
    leftover.mkdir()
    if content:
        (leftover / content).write_text("{")
    assert loaded(tmp_path) == 3
    resume.save(tmp_path, small_run(5), 2)
    assert names(tmp_path) == ["checkpoint-000003", "checkpoint-000005"]


# A process that saves one checkpoint after another, killed at a random instant by the one that started it, which then looks
# at what is there; twenty times. Both are forks of one interpreter: importing torch takes longer than all of the rest.
KILLS = """
import itertools, json, os, pathlib, random, signal, sys, time, warnings
import torch
from tests.test_resume import small_run
from qlite import resume

warnings.simplefilter("error")
torch.set_num_threads(1)
folder, size = pathlib.Path(sys.argv[1]), 200_000
chance = random.Random(0)
newest, halved, steps = 0, 0, []
for _ in range(20):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        for step in itertools.count(newest + 1):
            resume.save(folder, small_run(step, size), 2)
            os.write(writer, step.to_bytes(4, "big"))
    os.close(writer)
    promised = int.from_bytes(os.read(reader, 4), "big")
    time.sleep(chance.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reader, 4):
        promised = int.from_bytes(more, "big")
    os.close(reader)
    halved += any(folder.glob(".checkpoint-*.tmp"))
    run = small_run(0, size)
    assert resume.load_newest(folder, run) is not None
    step = run.progress["step"]
    assert promised <= step <= promised + 1, (promised, step)
    assert run.batches.at == step and bool((run.parameters["weight"] == step).all())
    newest = step
print(json.dumps({"newest": newest, "halved": halved}))
"""


def test_a_process_killed_at_any_instant_leaves_the_newest_checkpoint_whole(tmp_path):
    command = [sys.executable, "-c", KILLS, str(tmp_path)]
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    # It was killed in the middle of a save, and more than once, or this has tested nothing.
    assert seen["halved"] >= 5 and seen["newest"] >= 20


def test_the_docstring_names_the_files(tmp_path):
    found = set(re.findall(r"\w+\.(?:json|safetensors)", resume.__doc__))
    checkpoint = resume.save(tmp_path, small_run(1), 1)
    assert found == FILES == set(names(checkpoint))

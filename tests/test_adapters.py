"""Adapters as files: what is written comes back bit for bit, what does not fit is refused by name, what is merged is exact."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import tempfile

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import qlite
from qlite import adapters
from qlite.adapters import CONFIG, FINGERPRINT, PREFIX, TENSORS
from qlite.storage import read_metadata
from tests.adapted import KINDS, UP, A, B, adapt, adapted, base_of, edit, edit_tensors, kinds, logits, stored_bytes

TARGETS = (
    "all-linear",
    ["query_key_value"],
    ["dense"],
    ["dense_4h_to_h", "query_key_value"],
    ["transformer.h.1.mlp.dense_h_to_4h"],
    ["h.0.mlp.dense_h_to_4h", "dense"],
    r".*\.h\.1\..*dense.*",
    r"transformer\.h\.0\.self_attention\.dense|.*4h_to_h",
)


def state_of(model):
    """All that a refused adapter must leave alone."""
    tensors = {name: (t.dtype, tuple(t.shape), t.detach().flatten().tolist()) for name, t in model.state_dict().items()}
    rates = {name: (module.scaling, module.dropout.p) for name, module in adapted(model).items()}
    return tensors, rates, getattr(model, "lora_config", None), [p.requires_grad for p in model.parameters()]


# Saved and loaded.


@settings(max_examples=40)  # each waits for the disk, four times
@given(
    st.sampled_from(list(KINDS)), st.sampled_from(TARGETS), st.integers(1, 6), st.floats(0.1, 64), st.sampled_from((0.0, 0.3))
)
def test_an_adapter_comes_back_bit_for_bit(kind, targets, r, alpha, dropout):
    model = base_of(KINDS[kind])
    added = adapt(model, targets=targets, r=r, alpha=alpha, dropout=dropout)
    with tempfile.TemporaryDirectory() as folder:
        assert qlite.save_adapter(model, folder) == pathlib.Path(folder)
        again = base_of(KINDS[kind])
        report = qlite.load_adapter(again, folder)
        assert report == added
        assert torch.equal(logits(again.eval()), logits(model.eval()))
        assert state_of(again)[:2] == state_of(model)[:2]
        config = again.lora_config
        assert (config.r, config.alpha, config.dropout) == (r, alpha, dropout)
        qlite.save_adapter(again, pathlib.Path(folder) / "again")
        for name in (CONFIG, TENSORS):
            assert (pathlib.Path(folder) / "again" / name).read_bytes() == (pathlib.Path(folder) / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flavour", ["40b", "11b", "rw"])
def test_every_flavour_and_dtype_comes_back(flavour, dtype, tmp_path):
    model = base_of(qlite.Linear4bit, flavour, dtype)
    adapt(model, targets="all-linear")
    qlite.save_adapter(model, tmp_path)
    again = base_of(qlite.Linear4bit, flavour, dtype)
    qlite.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert len(adapted(again)) == 8 and not any(name.startswith("lm_head") for name in adapted(again))


def test_the_files_are_those_of_peft(tmp_path):
    model = base_of(qlite.Linear4bit)
    adapt(model, targets=["dense", "query_key_value"], r=2, alpha=5.0, dropout=0.25)
    model.base_fingerprint, model.base_id = "abc", "tiiuae/falcon-7b"
    qlite.save_adapter(model, tmp_path / "a" / "b")
    assert set(stored_bytes(tmp_path / "a" / "b")) == {CONFIG, TENSORS}
    tensors = load_file(tmp_path / "a" / "b" / TENSORS)
    shapes = {}
    for layer in (f"transformer.h.{i}.self_attention" for i in range(2)):
        for name, rows in (("query_key_value", 80), ("dense", 48)):
            shapes[f"base_model.model.{layer}.{name}.lora_A.weight"] = (2, 48)
            shapes[f"base_model.model.{layer}.{name}.lora_B.weight"] = (rows, 2)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert read_metadata(tmp_path / "a" / "b" / TENSORS) == {"format": "pt", "qlite_base_fingerprint": "abc"}
    assert json.loads((tmp_path / "a" / "b" / CONFIG).read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiiuae/falcon-7b",
        "r": 2,
        "lora_alpha": 5.0,
        "lora_dropout": 0.25,
        "target_modules": ["dense", "query_key_value"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": None,
        "use_dora": False,
        "use_rslora": False,
    }
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a" / "b").iterdir()} == {0o644}


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_the_file_is_float32_whatever_the_model_was_cast_to(cast, tmp_path):
    model = base_of()
    adapt(model)
    getattr(model, cast)()
    qlite.save_adapter(model, tmp_path)
    stored = load_file(tmp_path / TENSORS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert torch.equal(stored[f"{PREFIX}{UP}.lora_B.weight"], adapted(model)[UP].lora_B.float())


def test_the_base_may_be_named_and_the_name_that_load_falcon_was_given_is_the_default(tmp_path):
    qlite.save_checkpoint(base_of(), tmp_path / "base")
    model = qlite.load_falcon(tmp_path / "base")
    adapt(model)
    qlite.save_adapter(model, tmp_path / "one")
    qlite.save_adapter(model, tmp_path / "other", base_id="me/mine")
    names = [json.loads((tmp_path / name / CONFIG).read_text())["base_model_name_or_path"] for name in ("one", "other")]
    assert names == [str(tmp_path / "base"), "me/mine"]


def test_a_loaded_adapter_goes_on_training_and_the_base_does_not(tmp_path):
    model = base_of(qlite.Linear4bit)
    adapt(model)
    qlite.save_adapter(model, tmp_path)
    again = base_of(qlite.Linear4bit)
    qlite.load_adapter(again, tmp_path)
    trained = [name for name, parameter in again.named_parameters() if parameter.requires_grad]
    assert trained == [name for name in again.state_dict() if "lora_" in name]
    logits(again).sum().backward()
    assert all(parameter.grad is not None for parameter in qlite.lora_parameters(again))


def test_saving_over_an_adapter_replaces_it_and_keeps_the_other_files(tmp_path):
    first, second = base_of(), base_of()
    adapt(first, r=2, targets=["dense"])
    adapt(second, r=5, seed=9)
    qlite.save_adapter(first, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "checkpoint-5").mkdir()
    qlite.save_adapter(second, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", CONFIG, TENSORS, "checkpoint-5"}
    assert (tmp_path / "README.md").read_text() == "mine"
    again = base_of()
    qlite.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(second))


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()], ids=["disk full", "interrupt"])
@pytest.mark.parametrize(
    ("module", "step"),
    [(adapters, "save_file"), (pathlib.Path, "write_text"), (adapters, "read_header"), (adapters, "sync"), (os, "replace")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_interrupted_save_keeps_the_old_adapter_whole(error, module, step, tmp_path, monkeypatch):
    first, second = base_of(), base_of()
    adapt(first)
    adapt(second, r=5, alpha=1.0, seed=9)
    qlite.save_adapter(first, tmp_path)
    before = stored_bytes(tmp_path)

    def breaks(*arguments, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, step, breaks)
        with pytest.raises(type(error)):
            qlite.save_adapter(second, tmp_path)
    assert stored_bytes(tmp_path) == before


def test_the_bytes_are_on_the_disk_before_the_names_are(tmp_path, monkeypatch):
    model = base_of()
    adapt(model)
    seen = []
    monkeypatch.setattr(adapters, "sync", lambda path: seen.append((path.name, (tmp_path / TENSORS).exists())))
    qlite.save_adapter(model, tmp_path)
    assert sorted(seen) == [(f".{CONFIG}.tmp", False), (f".{TENSORS}.tmp", False)]


def test_a_model_without_adapters_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="Falcon has no adapters; call add_lora first"):
        qlite.save_adapter(base_of(), tmp_path / "a")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_an_adapter_that_is_not_finite_is_not_saved(key, value, tmp_path):
    model = base_of()
    adapt(model)
    qlite.save_adapter(model, tmp_path)
    before = stored_bytes(tmp_path)
    getattr(adapted(model)[UP], key).data[-1, -1] = value
    with pytest.raises(ValueError, match=rf"{UP}\.{key} holds a non-finite value; nothing was written"):
        qlite.save_adapter(model, tmp_path)
    assert stored_bytes(tmp_path) == before


KINDS_OF_ADAPTER = {
    "rank-stabilised": {"rslora": True},
    "DoRA": {"dora": True},
    "ranks of their own": {"rank_pattern": {"dense": 5, r"h\.1\.mlp\..*": 2}, "alpha_pattern": {"query_key_value": 3.0}},
    "a norm and the tied head": {"modules_to_save": ["ln_f", "lm_head"]},
    "some blocks": {"layers": [1], "exclude": ["dense"]},
    "all at once": {"dora": True, "rslora": True, "rank_pattern": {"dense": 1}, "modules_to_save": ["h.0.input_layernorm"]},
}
kinds_of_adapter = pytest.mark.parametrize("options", KINDS_OF_ADAPTER.values(), ids=KINDS_OF_ADAPTER)


@kinds_of_adapter
@kinds
def test_every_kind_of_adapter_comes_back_bit_for_bit(kind, options, tmp_path):
    model, again = base_of(kind), base_of(kind)
    adapt(model, **options)
    trained = qlite.lora_parameters(model)
    for parameter in trained:
        parameter.data += 0.1
    qlite.save_adapter(model, tmp_path / "one")
    report = qlite.load_adapter(again, tmp_path / "one")
    assert set(report.targets) == set(adapted(again)) == set(adapted(model))
    assert torch.equal(logits(again), logits(model))
    assert (logits(model) - logits(base_of(kind))).abs().max() > 0.01
    assert [p.shape for p in qlite.lora_parameters(again)] == [p.shape for p in trained]
    assert all(p.requires_grad for p in qlite.lora_parameters(again))
    # Over one that is there, and out again.
    with torch.no_grad():
        for parameter in qlite.lora_parameters(again):
            parameter.zero_()
    assert qlite.load_adapter(again, tmp_path / "one") is None and torch.equal(logits(again), logits(model))
    qlite.save_adapter(again, tmp_path / "two")
    assert stored_bytes(tmp_path / "two")[TENSORS] == stored_bytes(tmp_path / "one")[TENSORS]
    third = base_of(kind)
    qlite.load_adapter(third, tmp_path / "two")
    assert torch.equal(logits(third), logits(model))


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_began_as_pissa_is_saved_as_one_of_twice_the_rank_that_fits_the_base(rslora, tmp_path):
    model, again = base_of(qlite.Linear4bit), base_of(qlite.Linear4bit)
    config = qlite.LoRAConfig(r=3, alpha=6.0, dropout=0.0, init="pissa", rslora=rslora, rank_pattern={"dense": 2})
    config = dataclasses.replace(config, alpha_pattern={"query_key_value": 1.5})
    qlite.add_lora(model, config, seed=0)
    for parameter in qlite.lora_parameters(model):
        parameter.data *= 1.2
    qlite.save_adapter(model, tmp_path)
    qlite.load_adapter(again, tmp_path)
    assert adapted(again)[UP].lora_A.shape[0] == 6 and again.lora_config.rank_pattern == {"dense": 4}
    assert again.lora_config.scaling == pytest.approx(config.scaling, rel=2**-50)
    # The same two products, by a scaling that may differ in its last bit.
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="on other layers or of another rank"):
        qlite.load_adapter(model, tmp_path)


def test_an_untrained_adapter_is_saved_with_a_warning(tmp_path):
    model = base_of()
    qlite.add_lora(model, qlite.LoRAConfig(r=2), seed=0)
    with pytest.warns(UserWarning, match="every lora_B is zero: the adapter was not trained"):
        qlite.save_adapter(model, tmp_path)
    qlite.load_adapter(base_of(), tmp_path)


def test_a_disk_that_gives_back_other_bytes_is_told_and_the_old_adapter_stays(tmp_path, monkeypatch):
    model = base_of()
    adapt(model)
    qlite.save_adapter(model, tmp_path)
    before = stored_bytes(tmp_path)
    monkeypatch.setattr(adapters, "read_tensor", lambda stored: torch.zeros(stored.shape))
    with pytest.raises(OSError, match="does not hold what was written to it"):
        qlite.save_adapter(model, tmp_path)
    assert stored_bytes(tmp_path) == before


def test_a_whole_module_too_large_for_the_dtype_of_the_model_is_refused(tmp_path):
    model = base_of()
    adapt(model, modules_to_save=["ln_f"])
    model.transformer.ln_f.weight.data[0] = 1e30
    qlite.save_adapter(model, tmp_path)
    half = base_of(dtype=torch.float16)
    before = state_of(half)
    with pytest.raises(ValueError, match=r"ln_f\.weight holds a value that is not finite in .*float16"):
        qlite.load_adapter(half, tmp_path)
    assert state_of(half) == before


def test_the_revision_of_the_base_is_kept_unless_the_base_is_named_otherwise(tmp_path):
    model = base_of()
    adapt(model)
    model.base_id, model.base_revision = "tiiuae/falcon-7b", "c0ffee"
    for name, options in (("one", {}), ("two", {"base_id": "me/mine"})):
        qlite.save_adapter(model, tmp_path / name, **options)
    found = [json.loads((tmp_path / name / CONFIG).read_text())["revision"] for name in ("one", "two")]
    assert found == ["c0ffee", None]


# Which layers it is on.


@pytest.mark.parametrize(
    ("targets", "written"),
    [
        ("all-linear", ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]),
        (["query_key_value", "dense"], ["dense", "query_key_value"]),
        (["h.0.mlp.dense_h_to_4h", "dense"], ["dense", "h.0.mlp.dense_h_to_4h"]),
        (r".*query_key_value", ["query_key_value"]),
        (r".*\.1\.mlp\..*", ["transformer.h.1.mlp.dense_4h_to_h", "transformer.h.1.mlp.dense_h_to_4h"]),
    ],
)
def test_target_modules_are_last_parts_of_names_where_those_are_exact(targets, written, tmp_path):
    model = base_of()
    adapt(model, targets=targets)
    qlite.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == written


class Nested(nn.Module):
    """Names that end other names, and a container that is called like a layer."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"up": nn.Linear(4, 4), "inner": nn.ModuleDict({"up": nn.Linear(4, 4)})})
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(self.block["inner"]["up"](self.block["up"](self.up(x))))


NAMES = ("up", "block.up", "block.inner.up", "inner")


@pytest.mark.parametrize("names", [names for n in range(1, 5) for names in itertools.combinations(NAMES, n)], ids=" ".join)
def test_names_that_end_other_names_come_back_as_the_same_layers(names, tmp_path):
    names = set(names)
    torch.manual_seed(0)
    model, again = Nested(), Nested()
    again.load_state_dict(model.state_dict())
    adapt(model, targets="|".join(name.replace(".", r"\.") for name in sorted(names)))
    assert set(adapted(model)) == names
    qlite.save_adapter(model, tmp_path)
    report = qlite.load_adapter(again, tmp_path)
    assert set(adapted(again)) == names == set(report.targets)
    assert torch.equal(again(torch.ones(2, 4)), model(torch.ones(2, 4)))


def test_a_rank_of_its_own_is_not_that_of_a_name_that_ends_in_it(tmp_path):
    # "a" comes first in the file, and ends the other's name.
    model, again = (nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.ModuleDict({"a": nn.Linear(4, 4)})}) for _ in range(2))
    adapt(model, targets=["a"], rank_pattern={r"b\.a": 2, "a": 5})
    qlite.save_adapter(model, tmp_path)
    qlite.load_adapter(again, tmp_path)
    assert [module.lora_A.shape[0] for module in adapted(again).values()] == [5, 2]


@pytest.mark.parametrize("name", ["a+", "(", "[a", "a|b", "all-linear", "base", "dropout"])
def test_any_name_of_a_layer_comes_back(name, tmp_path):
    # As expressions, "a+" is "a" and not itself, and "(" is none. A LoRALinear has parts of its own called base and dropout.
    model, again = (nn.ModuleDict({key: nn.Linear(4, 4) for key in (name, "a", "b", "aa", "lm_head")}) for _ in range(2))
    adapt(model, targets=[name])
    assert set(adapted(model)) == {name}
    qlite.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == [name]
    qlite.load_adapter(again, tmp_path)
    assert set(adapted(again)) == {name}


def test_an_adapter_on_some_layers_of_a_kind_names_them_when_it_is_saved_again(tmp_path):
    model = base_of()
    adapt(model, targets=["transformer.h.1.mlp.dense_h_to_4h"])
    qlite.save_adapter(model, tmp_path)
    # As peft writes layers_to_transform=[1]: the list alone would mean every layer of the name.
    edit(tmp_path, target_modules=["dense_h_to_4h"], layers_to_transform=[1])
    again = base_of()
    qlite.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    qlite.save_adapter(again, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == ["transformer.h.1.mlp.dense_h_to_4h"]


@pytest.mark.parametrize("expression", ["(", "(a+)+$", ".*", "nothing", "all-linear", r"(?:.*?(?:layers).*?)"])
def test_an_expression_from_a_file_is_never_run(expression, tmp_path):
    model = base_of()
    adapt(model, targets=["dense"])
    qlite.save_adapter(model, tmp_path)
    edit(tmp_path, target_modules=expression)
    again = base_of()
    qlite.load_adapter(again, tmp_path)
    assert set(adapted(again)) == set(adapted(model)) and torch.equal(logits(again), logits(model))
    assert again.lora_config.targets == "all-linear"


# Over an adapter that is there.


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_loading_over_adapters_replaces_them_and_what_is_saved_then_is_the_same(dropout, tmp_path):
    model, other = base_of(qlite.Linear4bit), base_of(qlite.Linear4bit)
    adapt(model, alpha=8.0, dropout=dropout)
    adapt(other, alpha=32.0, dropout=0.1, seed=9)
    qlite.save_adapter(model, tmp_path / "one")
    assert qlite.load_adapter(other, tmp_path / "one") is None
    assert torch.equal(logits(other.eval()), logits(model.eval())) and state_of(other)[:2] == state_of(model)[:2]
    qlite.save_adapter(other, tmp_path / "other")
    assert stored_bytes(tmp_path / "other") == stored_bytes(tmp_path / "one")


@pytest.mark.parametrize("options", [{"targets": ["dense"]}, {"targets": ["dense", "query_key_value"]}, {"r": 4}], ids=str)
def test_adapters_of_another_rank_or_on_other_layers_are_not_mixed(options, tmp_path):
    model, other = base_of(), base_of()
    adapt(model, **{"targets": ["query_key_value"], **options})
    qlite.save_adapter(model, tmp_path)
    adapt(other, targets=["query_key_value"])
    before = state_of(other)
    with pytest.raises(ValueError, match="carries adapters on other layers or of another rank; load a fresh base"):
        qlite.load_adapter(other, tmp_path)
    assert state_of(other) == before


# Of another base.


def test_an_adapter_of_another_base_is_refused_and_both_are_named(tmp_path):
    for seed in (0, 1):
        qlite.save_checkpoint(base_of(seed=seed), tmp_path / f"base-{seed}")
    model, other = (qlite.load_falcon(tmp_path / f"base-{seed}", quantize=qlite.Linear4bit) for seed in (0, 1))
    adapt(model)
    qlite.save_adapter(model, tmp_path / "adapter")
    before = state_of(other)
    with pytest.raises(ValueError, match="made for another base") as caught:
        qlite.load_adapter(other, tmp_path / "adapter")
    named = (str(tmp_path / "base-0"), str(tmp_path / "base-1"), model.base_fingerprint[:12], other.base_fingerprint[:12])
    assert all(name in str(caught.value) for name in named)
    assert state_of(other) == before


@kinds
def test_the_base_of_an_adapter_is_the_same_however_it_is_encoded(kind, tmp_path):
    qlite.save_checkpoint(base_of(), tmp_path / "base")
    model = qlite.load_falcon(tmp_path / "base", quantize=qlite.Linear4bit)
    adapt(model)
    qlite.save_adapter(model, tmp_path / "adapter")
    assert read_metadata(tmp_path / "adapter" / TENSORS)[FINGERPRINT] == model.base_fingerprint
    again = qlite.load_falcon(tmp_path / "base", quantize=kind, dtype=torch.float32)
    qlite.save_checkpoint(again, tmp_path / "again", max_shard_bytes=20_000)
    again = qlite.load_falcon(tmp_path / "again")
    qlite.load_adapter(again, tmp_path / "adapter")
    assert len(adapted(again)) == 8


@pytest.mark.parametrize("forgotten", ["the adapter", "the model"])
def test_where_one_of_them_has_no_fingerprint_the_shapes_decide(forgotten, tmp_path):
    model, again = base_of(), base_of()
    adapt(model)
    if forgotten == "the model":
        model.base_fingerprint = "a" * 64
    else:
        again.base_fingerprint = "a" * 64
    qlite.save_adapter(model, tmp_path)
    qlite.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


# Bad input.


UNSUPPORTED = [
    ("bias", "all"), ("bias", "lora_only"), ("lora_bias", True), ("use_qalora", True), ("ensure_weight_tying", True),
    ("use_dora", 1), ("use_rslora", "yes"), ("fan_in_fan_out", [0]), ("modules_to_save", "lm_head"), ("modules_to_save", [1]),
    ("modules_to_save", ["lm_head"]), ("rank_pattern", ["dense"]), ("alpha_pattern", {"dense": "4"}),
    ("alpha_pattern", {"dense": True}), ("trainable_token_indices", [1]), ("layer_replication", [[0, 1]]),
    ("target_parameters", ["mlp.weight"]), ("alora_invocation_tokens", [1, 2]), ("use_bdlora", {"nblocks": 2}),
    ("arrow_config", {"top_k": 3}), ("kasa_config", {}), ("monteclora_config", {}), ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"), ("init_lora_weights", "loftq"),
    ("init_lora_weights", "corda"), ("init_lora_weights", "lora_ga"),
]  # fmt: skip
CONFIG_FAULTS = {
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
    "no method": ({"peft_type": ...}, "peft_type is None"),
    "rank 0": ({"r": 0}, "r is 0"),
    "a negative rank": ({"r": -3}, "r is -3"),
    "a rank that is text": ({"r": "3"}, "r is '3'; wanted an int"),
    "a rank that is a float": ({"r": 3.0}, r"r is 3\.0; wanted an int"),
    "a rank that is a bool": ({"r": True}, "r is True; wanted an int"),
    "another rank": ({"r": 4}, r"wanted rank 4, as adapter_config\.json says"),
    "a huge rank": ({"r": 10**9}, "wanted rank 1000000000"),
    "no rank": ({"r": ...}, "wanted rank 8"),
    "an alpha that is text": ({"lora_alpha": "16"}, "lora_alpha is '16'; wanted a number"),
    "an alpha that is a bool": ({"lora_alpha": True}, "lora_alpha is True; wanted a number"),
    "an alpha that is NaN": ({"lora_alpha": float("nan")}, "alpha is nan"),
    "an infinite alpha": ({"lora_alpha": float("inf")}, "alpha is inf"),
    "an alpha beyond floats": ({"lora_alpha": 10**400}, "too large"),
    "a negative alpha": ({"lora_alpha": -1}, "alpha is -1"),
    "dropout beyond 1": ({"lora_dropout": 2}, "dropout is 2"),
    "dropout that is text": ({"lora_dropout": "0"}, "lora_dropout is '0'; wanted a number"),
    "no targets": ({"target_modules": None}, "target_modules is None"),
    "an empty list of targets": ({"target_modules": []}, r"target_modules is \[\]"),
    "targets that are numbers": ({"target_modules": [1]}, r"target_modules is \[1\]"),
    "targets that are a table": ({"target_modules": {"dense": 1}}, "target_modules is {"),
    "a rank of a layer that its tensors have not": ({"rank_pattern": {"mlp.dense_h_to_4h": 4}}, "wanted rank 4"),
    "a rank of 0 for a layer": ({"rank_pattern": {"dense": 0}}, "dense is 0"),
    "a rank of a layer that is a float": ({"rank_pattern": {"dense": 3.0}}, r"dense is 3\.0; wanted an int"),
    "an alpha of a layer that is negative": ({"alpha_pattern": {"dense": -1}}, "dense is -1"),
    "a pattern that is no expression": ({"alpha_pattern": {"(": 1}}, r"the pattern '\(' is no regular expression"),
    "a pattern that takes for ever": ({"alpha_pattern": {"(a+)+b": 1}}, r"the pattern '\(a\+\)\+b' repeats a group"),
    "a pattern of many repetitions": ({"alpha_pattern": {".*a.*b.*c.*d": 1}}, "repeats a group or too much"),
    "DoRA without its magnitudes": ({"use_dora": True}, "has no lora_magnitude_vector, and adapter_config.json says use_dora"),
    "a module to save that is not there": (
        {"modules_to_save": ["ln_f"]},
        r"modules_to_save is \['ln_f'\]; the tensors are \[\]",
    ),
}
TENSOR_FAULTS = {
    "another rank": ({A: torch.ones(2, 48), B: torch.ones(192, 2)}, r"lora_A\.weight has shape \(2, 48\); wanted rank 3"),
    "another size in": (
        {A: torch.ones(3, 47)},
        rf"made for another base: {UP}\.lora_A is \(3, 47\); this model wants \(3, 48\)",
    ),
    "another size out": ({B: torch.ones(191, 3)}, rf"made for another base: {UP}\.lora_B is \(191, 3\)"),
    "one dimension": ({A: torch.ones(3)}, r"lora_A\.weight has shape \(3,\)"),
    "no A": ({A: None}, rf"wanted rank 3, as adapter_config\.json says, and base_model\.model\.{A} too"),
    "no B": ({B: None}, rf"and base_model\.model\.{B} too"),
    "a layer that is not there": (
        {"transformer.h.7.mlp.lora_A.weight": torch.ones(3, 48), "transformer.h.7.mlp.lora_B.weight": torch.ones(48, 3)},
        r"made for another base: this model has no linear layer transformer\.h\.7\.mlp",
    ),
    "a layer that is not linear": (
        {"transformer.ln_f.lora_A.weight": torch.ones(3, 48), "transformer.ln_f.lora_B.weight": torch.ones(48, 3)},
        r"this model has no linear layer transformer\.ln_f",
    ),
    "the model itself": ({"lora_A.weight": torch.ones(3, 48), "lora_B.weight": torch.ones(48, 3)}, "is not a LoRA weight"),
    "not finite": ({A: torch.full((3, 48), float("nan"))}, r"lora_A\.weight holds a non-finite value"),
    "infinite": ({B: torch.full((192, 3), float("inf"))}, r"lora_B\.weight holds a non-finite value"),
    "integers": ({A: torch.ones(3, 48).int()}, r"lora_A\.weight is I32; wanted a float"),
    "a magnitude of DoRA": ({f"{UP}.lora_magnitude_vector": torch.ones(192)}, r"lora_magnitude_vector has shape \(192,\)"),
    "a bias of B": ({f"{UP}.lora_B.bias": torch.ones(192)}, r"lora_B\.bias is not a LoRA weight"),
    "an embedding": ({"transformer.word_embeddings.lora_embedding_A": torch.ones(3, 61)}, "is not a LoRA weight"),
    "a dense head": ({"lm_head.weight": torch.ones(61, 48)}, r"lm_head\.weight is not a LoRA weight"),
}
FAULTS = {
    **{f"{key}: {value}": (functools.partial(edit, **{key: value}), f"{key} is ") for key, value in UNSUPPORTED},
    **{name: (functools.partial(edit, **changes), words) for name, (changes, words) in CONFIG_FAULTS.items()},
    **{name: (lambda f, c=changes: edit_tensors(f, c), words) for name, (changes, words) in TENSOR_FAULTS.items()},
    "another layout": (
        lambda f: save_file({n.removeprefix(PREFIX): t for n, t in load_file(f / TENSORS).items()}, f / TENSORS),
        "is not a LoRA weight in PEFT's layout",
    ),
    "no tensors": (lambda f: save_file({}, f / TENSORS), "holds no tensors"),
    "short": (lambda f: os.truncate(f / TENSORS, 3000), "truncated"),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), "not JSON"),
    "a key twice": (lambda f: (f / CONFIG).write_text('{"r": 3, "r": 3}'), "'r' stands twice"),
}


@pytest.mark.parametrize("carries", [False, True], ids=["fresh base", "with adapters"])
@pytest.mark.parametrize(("damage", "words"), FAULTS.values(), ids=FAULTS)
def test_what_is_damaged_or_not_supported_is_refused_by_name_and_the_model_is_as_it_was(damage, words, carries, tmp_path):
    model, other = base_of(), base_of()
    adapt(model)
    qlite.save_adapter(model, tmp_path)
    damage(tmp_path)
    if carries:
        adapt(other, seed=9)
    before = state_of(other)
    with pytest.raises(ValueError, match=words) as caught:
        qlite.load_adapter(other, tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert state_of(other) == before


@pytest.mark.parametrize("missing", [CONFIG, TENSORS])
def test_a_missing_file_is_not_found(missing, tmp_path):
    model = base_of()
    adapt(model)
    qlite.save_adapter(model, tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        qlite.load_adapter(base_of(), tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "init_lora_weights": "gaussian"},
        {"use_rslora": None, "layer_replication": None, "target_parameters": [], "init_lora_weights": False},
        {"auto_mapping": None, "peft_version": "0.21.2", "revision": "main", "megatron_core": "megatron.core", "unheard": 1},
        {"bias": ..., "lora_dropout": ..., "task_type": ..., "base_model_name_or_path": ...},
    ],
)
def test_options_that_change_no_number_are_no_reason_to_refuse(values, tmp_path):
    model, again = base_of(), base_of()
    adapt(model)
    qlite.save_adapter(model, tmp_path)
    edit(tmp_path, **values)
    qlite.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


json_values = st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.integers(-2, 9) | st.floats() | st.text(max_size=5)
json_values |= st.lists(json_values, max_size=2) | st.dictionaries(st.text(max_size=5), json_values, max_size=2)
keys = st.sampled_from(("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path"))
keys |= st.sampled_from(sorted(adapters.REQUIRED))


@given(st.dictionaries(keys, json_values, min_size=1, max_size=2))
def test_whatever_a_config_says_the_answer_is_an_adapter_or_a_value_error(changes):
    model = nn.Sequential(nn.Linear(4, 4))
    adapt(model)
    with tempfile.TemporaryDirectory() as name:
        folder = qlite.save_adapter(model, name)
        edit(folder, **changes)
        again = nn.Sequential(nn.Linear(4, 4))
        try:
            qlite.load_adapter(again, folder)
        except ValueError as error:
            assert str(folder) in str(error) and not adapted(again)
        else:
            assert torch.equal(again[0].lora_B, model[0].lora_B)


def test_a_hub_id_is_downloaded(tmp_path, monkeypatch):
    model, again = base_of(), base_of()
    adapt(model)
    qlite.save_adapter(model, tmp_path)
    asked = []
    download = lambda repo_id, *, revision, **patterns: asked.append((repo_id, revision)) or str(tmp_path)  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    qlite.load_adapter(again, "me/faq", revision="v1")
    assert asked == [("me/faq", "v1")] and torch.equal(logits(again), logits(model))

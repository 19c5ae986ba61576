"""Merging: the sum is exact to its rounding, reported as it was, and the merged model says what the adapted one said."""

import dataclasses
import itertools
import json
import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qlite
from qlite import storage
from qlite.adapters import CONFIG, FINGERPRINT, TENSORS
from qlite.linear import QuantizedLinear
from qlite.merge import BESIDE, WeightChange
from qlite.storage import read_json, read_metadata, read_tensor, stored_tensors
from tests.adapted import KINDS, adapt, adapted, base_of, kinds, logits, stored_bytes
from tests.falcons import FLAVOURS, falcon_of


def layer_of(kind, dtype, in_features=64, out_features=32):
    generator = torch.Generator().manual_seed(4)
    dense = nn.Linear(in_features, out_features, dtype=dtype)
    dense.weight.data = torch.randn(out_features, in_features, generator=generator).to(dtype)
    dense.bias.data = torch.randn(out_features, generator=generator).to(dtype)
    model = nn.Sequential(dense)
    if kind is not None:
        qlite.quantize_model(model, kind)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(
    kind=st.sampled_from(list(KINDS)), r=st.integers(1, 6), alpha=st.floats(0.1, 64), sizes=st.tuples(*[st.integers(1, 70)] * 2)
)
def test_a_merged_weight_is_the_sum_rounded_once(dtype, kind, r, alpha, sizes):
    model = layer_of(KINDS[kind], dtype, *sizes)
    adapt(model, r=r, alpha=alpha)
    layer = model[0]
    dense = layer.base.weight if kind == "dense" else layer.base.dequantize()
    a, b = layer.lora_A.double(), layer.lora_B.double()
    exact = dense.double() + layer.scaling * b @ a
    report = qlite.merge_adapter(model)
    merged = model[0]
    # The product of r terms and the scale round r + 1 times and the sum once, all in float32, relative to the magnitudes
    # that are added; then the result once, to its dtype. Below the smallest normal number a step is the smallest subnormal.
    terms = (r + 3) * 2**-24 * (dense.double().abs() + layer.scaling * b.abs() @ a.abs())
    last = torch.finfo(dtype).eps / 2 * (exact.abs() + terms) + torch.finfo(dtype).smallest_normal
    assert bool(((merged.weight.double() - exact).abs() <= terms + last).all())
    assert merged.weight.dtype == dtype
    change, update = report.changes["0"], (exact - dense.double()).abs()
    # The change is the difference of two float32 numbers, each as far off as above.
    assert abs(change.largest - update.max()) <= terms.max() and abs(change.mean - update.mean()) <= terms.max()
    assert abs(change.norm - update.norm()) <= terms.norm() and change.weights == update.numel()
    rounding = (merged.weight.double() - exact).norm()
    assert abs(change.rounding - rounding) <= terms.norm() and (change.rounding == 0) == (dtype == torch.float32)


@kinds
@pytest.mark.parametrize("flavour", ["7b", "rw"])
def test_a_merged_model_says_what_the_adapted_one_says(kind, flavour, tmp_path):
    model = base_of(kind, flavour)
    adapt(model)
    before, layers = logits(model), adapted(model)
    report = qlite.merge_adapter(model)
    assert list(report.changes) == list(layers) and not adapted(model)
    # Two models of float32 weights that differ by a rounding, through two blocks: 2^-24 times the sums of a few hundred
    # terms in six matrix products each.
    assert (logits(model) - before).norm() <= 2**-18 * before.norm()
    qlite.save_checkpoint(model, tmp_path / "merged")
    assert torch.equal(logits(qlite.load_falcon(tmp_path / "merged", dtype=torch.float32)), logits(model))


def test_merging_leaves_plain_frozen_linears_with_their_biases_and_the_other_layers_encoded():
    model = base_of(qlite.Linear4bit, "rw")
    adapt(model, targets=["dense"])
    others = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    biases = {name: module.base.bias for name, module in adapted(model).items()}
    before = {name: module.weight.clone() for name, module in others.items()}
    qlite.merge_adapter(model)
    for name, bias in biases.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear and layer.bias is bias and not layer.weight.requires_grad
        assert (layer.in_features, layer.out_features) == (48, 48) and not layer.training
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            assert module is others[name] and torch.equal(module.weight, before[name])
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 6


def test_a_merged_model_takes_new_adapters_and_is_another_base(tmp_path):
    qlite.save_checkpoint(base_of(), tmp_path / "base")
    model = qlite.load_falcon(tmp_path / "base", quantize=qlite.Linear4bit)
    old = model.base_fingerprint
    adapt(model, targets=["dense"])
    qlite.merge_adapter(model)
    assert not hasattr(model, "lora_config")
    qlite.save_checkpoint(model, tmp_path / "merged")
    merged = qlite.load_falcon(tmp_path / "merged")
    assert merged.base_fingerprint != old
    adapt(model, seed=9)
    qlite.save_adapter(model, tmp_path / "adapter")
    assert FINGERPRINT not in read_metadata(tmp_path / "adapter" / TENSORS)
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["base_model_name_or_path"] is None
    qlite.load_adapter(merged, tmp_path / "adapter")
    assert torch.equal(logits(merged), logits(model))


@pytest.mark.parametrize(
    "call", [qlite.merge_adapter, lambda model: qlite.save_merged(model, "merged")], ids=["model", "folder"]
)
def test_there_must_be_something_to_merge(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="Sequential has no adapters"):
        call(nn.Sequential(nn.Linear(4, 4)))
    assert not list(tmp_path.iterdir())


class Foreign(nn.Module):
    """Looks like a linear layer, and keeps its weight in a way that nobody here knows."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features, self.kept = 4, 4, nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.kept


def test_an_adapter_on_a_layer_that_cannot_be_merged_is_an_error_and_nothing_is_merged():
    model = nn.Sequential(nn.Linear(4, 4), Foreign())
    adapt(model)
    before = model(torch.ones(1, 4))
    with pytest.raises(TypeError, match="1 adapts a Foreign; wanted a linear layer"):
        qlite.merge_adapter(model)
    with pytest.raises(TypeError, match="1 adapts a Foreign; wanted a linear layer"):
        qlite.save_merged(model, "merged")
    assert len(adapted(model)) == 2 and torch.equal(model(torch.ones(1, 4)), before)


class Conv1D(nn.Module):
    """A linear layer laid out as GPT-2's: weight (in_features, out_features)."""

    def __init__(self, out_features, in_features):
        super().__init__()
        self.nx, self.nf = in_features, out_features
        self.weight, self.bias = nn.Parameter(torch.randn(in_features, out_features)), nn.Parameter(torch.randn(out_features))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_a_layer_that_keeps_its_weight_transposed_keeps_it_so():
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(5, 3))
    adapt(model, r=2)
    layer = model[0]
    exact = layer.merged(layer.base.weight.T).T
    qlite.merge_adapter(model)
    assert type(model[0]) is Conv1D and torch.equal(model[0].weight, exact) and model[0].weight.shape == (3, 5)


# What the report says.


def test_an_update_that_sixteen_bits_cannot_hold_is_reported_as_lost():
    model = nn.Sequential(nn.Linear(4, 4, bias=False, dtype=torch.bfloat16), nn.Linear(4, 4, bias=False, dtype=torch.bfloat16))
    adapt(model, r=1, alpha=1.0)
    for layer, size in zip(model, (2**-10, 2**-3), strict=True):
        layer.base.weight.data.fill_(1.0)
        layer.lora_A.data.fill_(1.0)
        layer.lora_B.data.fill_(size)
    report = qlite.merge_adapter(model)
    # Between 1 and 2 bfloat16 has steps of 2^-7: the first update is gone, the second is held exactly.
    assert torch.equal(model[0].weight, torch.ones(4, 4, dtype=torch.bfloat16)) and bool((model[1].weight == 1.125).all())
    assert report.changes == {
        "0": WeightChange(largest=2**-10, mean=2**-10, norm=4 * 2**-10, rounding=4 * 2**-10, weights=16),
        "1": WeightChange(largest=2**-3, mean=2**-3, norm=4 * 2**-3, rounding=0.0, weights=16),
    }
    assert report.changes["0"].lost == 1.0 and report.changes["1"].lost == 0.0
    assert report.lost == 2**-10 / math.hypot(2**-10, 2**-3)
    assert str(report) == (
        "merged 2 layers into their decoded weights, in bfloat16\n"
        "largest change of a weight: 0.125 (1); mean 0.063\n"
        "rounding takes 0.78 % of the change; most in 0: 1e+02 %"
    )


def test_an_adapter_that_changes_nothing_is_reported_as_such():
    model = layer_of(None, torch.bfloat16)
    qlite.add_lora(model, qlite.LoRAConfig(r=2))
    before = model[0].base.weight.clone()
    report = qlite.merge_adapter(model)
    assert torch.equal(model[0].weight, before)
    assert report.changes["0"] == WeightChange(0.0, 0.0, 0.0, 0.0, 64 * 32) and report.lost == 0.0


def test_layers_are_compared_whole_however_many_pieces_they_are_compared_in(monkeypatch):
    reports = []
    for piece in (2**22, 100, 1):
        monkeypatch.setattr("qlite.merge.COMPARED", piece)
        model = layer_of(None, torch.bfloat16)
        adapt(model)
        reports.append(qlite.merge_adapter(model).changes["0"])
    for other in reports[1:]:
        assert dataclasses.astuple(other) == pytest.approx(dataclasses.astuple(reports[0]), rel=1e-12)  # sums of float64


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_outputs_is_merged_into_one_without_outputs():
    model = nn.Sequential(nn.Linear(3, 0, bias=False))
    adapt(model, r=1)
    report = qlite.merge_adapter(model)
    assert report.changes == {"0": WeightChange(0.0, 0.0, 0.0, 0.0, 0)} and "mean 0\n" in str(report)
    assert model[0].weight.shape == (0, 3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_a_weight_that_would_not_be_finite_is_refused_and_nothing_is_merged(value, tmp_path):
    model = base_of(None, dtype=torch.float16)
    adapt(model)
    before = logits(model)
    last = list(adapted(model))[-1]
    layer = adapted(model)[last]
    kept = layer.lora_B.data.clone()
    layer.lora_B.data[0] = value
    with pytest.raises(ValueError, match=f"merge_adapter: {last} becomes non-finite in torch.float16; nothing was merged"):
        qlite.merge_adapter(model)
    with pytest.raises(ValueError, match=f"save_merged: {last} becomes non-finite in torch.float16"):
        qlite.save_merged(model, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
    layer.lora_B.data = kept
    assert len(adapted(model)) == 8 and torch.equal(logits(model), before)


# The original weights in place of the decoded ones.


@pytest.fixture
def folder(tmp_path):
    """A dense checkpoint, and all that lies beside one on the hub."""
    qlite.save_checkpoint(falcon_of(FLAVOURS["11b"]), tmp_path / "base")
    for name in (*BESIDE, "modeling.py", "pytorch_model.bin", "README.md"):
        (tmp_path / "base" / name).write_text(f"its {name}")
    return tmp_path / "base"


def encoded_of(folder, kind=qlite.Linear4bit, **options):
    model = qlite.load_falcon(folder, quantize=kind, dtype=torch.float32)
    adapt(model, **options)
    return model


def tensors_of(folder):
    return {name: read_tensor(stored) for name, stored in stored_tensors(folder).items()}


@pytest.mark.parametrize("kind", [qlite.Linear4bit, qlite.Linear8bit])
def test_with_the_original_each_adapted_layer_is_its_weight_plus_the_update(kind, folder):
    model = encoded_of(folder, kind, targets=["dense"])
    dense, layers = tensors_of(folder), adapted(model)
    wanted = {name: layer.merged(dense[f"{name}.weight"]) for name, layer in layers.items()}
    others = [module for module in model.modules() if isinstance(module, kind)]
    report = qlite.merge_adapter(model, original=folder)
    for name, weight in wanted.items():
        assert torch.equal(model.get_submodule(name).weight, weight)
        assert abs(report.changes[name].largest - (weight - dense[f"{name}.weight"]).abs().max()) <= 1e-6
    assert report.base == str(folder) and f"the weights of {folder}" in str(report)
    assert sum(isinstance(module, kind) for module in model.modules()) == len(others) - len(wanted)


def test_a_module_that_was_trained_whole_is_the_models_and_not_the_originals(folder, tmp_path):
    model = encoded_of(folder, targets=["dense"], modules_to_save=["lm_head", "ln_f"])
    model.lm_head.weight.data += 1
    model.transformer.ln_f.bias.data += 1
    qlite.save_merged(model, tmp_path / "merged", original=folder)
    found = tensors_of(tmp_path / "merged")
    assert torch.equal(found["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(found["transformer.ln_f.bias"], model.transformer.ln_f.bias)


def test_an_adapted_layer_that_is_dense_is_the_models_and_not_the_originals(folder, tmp_path):
    model = qlite.load_falcon(folder, dtype=torch.float32)
    qlite.quantize_model(model, skip=["lm_head", "dense"])
    name = "transformer.h.1.self_attention.dense"
    model.get_submodule(name).weight.data += 1
    adapt(model, targets=["dense"])
    wanted = adapted(model)[name].merged(model.get_submodule(name).base.weight)
    qlite.save_merged(model, tmp_path / "merged", original=folder)
    assert torch.equal(tensors_of(tmp_path / "merged")[f"{name}.weight"], wanted)


def test_a_folder_that_is_merged_into_the_original_holds_its_weights_bit_for_bit(folder, tmp_path):
    model = encoded_of(folder, targets=["dense"])
    layers = adapted(model)
    qlite.save_merged(model, tmp_path / "merged", original=folder)
    dense, found = tensors_of(folder), tensors_of(tmp_path / "merged")
    assert found.keys() == dense.keys()
    for name, weight in found.items():
        layer = layers.get(name.removesuffix(".weight"))
        assert torch.equal(weight, dense[name] if layer is None else layer.merged(dense[name])), name


@pytest.mark.parametrize("call", [qlite.merge_adapter, lambda model, **o: qlite.save_merged(model, "merged", **o)])
def test_an_original_that_is_another_base_is_refused_with_both_named(call, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = encoded_of(folder)
    qlite.save_checkpoint(falcon_of(FLAVOURS["11b"], seed=1), tmp_path / "other")
    with pytest.raises(ValueError, match=rf"other \(fingerprint \w+\.\.\.\) is not what .*{folder}, fingerprint \w+") as error:
        call(model, original=tmp_path / "other")
    assert model.base_fingerprint[:12] in str(error.value)
    del model.base_fingerprint
    with pytest.raises(ValueError, match=r"no base_fingerprint to know .*base by; load its base with load_falcon"):
        call(model, original=folder)
    with pytest.raises(FileNotFoundError, match="nowhere is neither a folder nor a hub id"):
        call(model, original="nowhere")
    assert len(adapted(model)) == 8 and not (tmp_path / "merged").exists()


def test_an_original_that_is_encoded_itself_is_refused(folder, tmp_path):
    model = encoded_of(folder)
    qlite.save_checkpoint(qlite.load_falcon(folder, quantize=qlite.Linear4bit), tmp_path / "nf4")
    with pytest.raises(ValueError, match=r"nf4 .* is not what the model was encoded from"):
        qlite.merge_adapter(model, original=tmp_path / "nf4")
    model.base_fingerprint = "none"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=r"weight is U8 .*; wanted floats \(80, 48\)"):
        patch.setattr("qlite.merge.fingerprint", lambda stored: "none")
        qlite.merge_adapter(model, original=tmp_path / "nf4")


# Into a folder.


@kinds
@pytest.mark.parametrize("flavour", ["7b", "11b", "rw"])
def test_a_merged_folder_holds_what_merging_in_the_model_gives(kind, flavour, tmp_path):
    model = base_of(kind, flavour)
    adapt(model, targets=["query_key_value", "dense_4h_to_h"])
    before, layers = logits(model), adapted(model)
    report = qlite.save_merged(model, tmp_path / "merged")
    assert adapted(model) == layers and torch.equal(logits(model), before)  # the model is as it was
    assert read_json(tmp_path / "merged" / "config.json") == {**model.config.to_dict(), "dtype": "float32"}
    loaded = qlite.load_falcon(tmp_path / "merged", dtype=torch.float32)
    inside = qlite.merge_adapter(model)
    assert inside == report
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert torch.equal(loaded.get_submodule(name).weight, module.weight)
        elif isinstance(module, QuantizedLinear):
            assert torch.equal(loaded.get_submodule(name).weight, module.dequantize())
    # An encoded layer multiplies in the order of its own product.
    assert (logits(loaded) - before).norm() <= 2**-18 * before.norm()


ADAPTERS = {
    "dora": {"dora": True},
    "rslora": {"rslora": True},
    "patterns": {"rank_pattern": {"dense": 5}, "alpha_pattern": {"h.0.mlp.dense_h_to_4h": 3.0}},
    "pissa": {"init": "pissa"},
    "everything": {"dora": True, "rslora": True, "rank_pattern": {"dense": 5}, "modules_to_save": ["ln_f", "word_embeddings"]},
}


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("flavour", ["11b", "rw"])
def test_every_kind_of_adapter_says_merged_what_it_said_beside_its_base(options, flavour, tmp_path):
    model = base_of(qlite.Linear4bit, flavour)
    base = logits(model)
    adapt(model, **options)
    for name, parameter in model.named_parameters():
        if "magnitude" in name or (parameter.requires_grad and "lora" not in name):
            parameter.data *= 1.1
    before = logits(model)
    report = qlite.save_merged(model, tmp_path / "merged")
    found = logits(qlite.load_falcon(tmp_path / "merged", dtype=torch.float32))
    assert (before - base).norm() > 0.1 * base.norm() and len(report.changes) == 8
    # As above; the norm of a row in DoRA is the root of a sum in which the update is counted apart, twice in the forward pass.
    assert (found - before).norm() <= 2**-17 * before.norm()
    qlite.merge_adapter(model)
    assert (logits(model) - before).norm() <= 2**-17 * before.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_float_of_the_folder_is_rounded_once_to_the_dtype_asked_for(dtype, tmp_path):
    model = base_of(qlite.Linear4bit, "rw")
    adapt(model, targets=["dense"])
    report = qlite.save_merged(model, tmp_path / "merged", dtype=dtype)
    found, layers = tensors_of(tmp_path / "merged"), adapted(model)
    for name, weight in found.items():
        path, _, attribute = name.rpartition(".")
        layer = layers[path].base if path in layers else model.get_submodule(path)
        if attribute == "weight" and path in layers:
            exact = layers[path].merged(layer.dequantize())
        else:
            encoded = isinstance(layer, QuantizedLinear) and attribute == "weight"
            exact = layer.dequantize() if encoded else getattr(layer, attribute)
        assert torch.equal(weight, exact.to(dtype)), name
    assert report.dtype == dtype and 0 < report.lost < 1
    assert read_json(tmp_path / "merged" / "config.json")["dtype"] == str(dtype).removeprefix("torch.")


def test_sixteen_bits_are_what_a_model_in_sixteen_bits_gives(tmp_path):
    model = base_of(qlite.Linear4bit, dtype=torch.bfloat16)
    adapt(model)
    qlite.save_merged(model, tmp_path / "merged")
    assert {stored.dtype for stored in stored_tensors(tmp_path / "merged").values()} == {"BF16"}


@pytest.mark.parametrize("in_place", [False, True], ids=["folder", "in place"])
@pytest.mark.parametrize("change", ["an adapter on the head", "a head that is trained"])
def test_a_head_that_is_no_longer_the_embedding_is_untied_in_the_config(change, in_place, tmp_path):
    model = base_of(qlite.Linear4bit, "7b")
    assert model.config.tie_word_embeddings
    if change == "an adapter on the head":
        adapt(model, targets=["lm_head"])
    else:
        adapt(model, targets=["dense"], modules_to_save=["lm_head"])
        model.lm_head.weight.data += 1
    before = logits(model)
    if in_place:
        qlite.merge_adapter(model)
        qlite.save_checkpoint(model, tmp_path / "merged")
    else:
        qlite.save_merged(model, tmp_path / "merged")
    assert read_json(tmp_path / "merged" / "config.json")["tie_word_embeddings"] is False
    loaded = qlite.load_falcon(tmp_path / "merged", dtype=torch.float32)
    assert loaded.lm_head.weight is not loaded.transformer.word_embeddings.weight
    assert (logits(loaded) - before).norm() <= 2**-18 * before.norm()


def test_a_head_that_became_the_embedding_is_tied_in_the_config(tmp_path):
    model = base_of(None, "11b")
    adapt(model)
    model.lm_head.weight = model.transformer.word_embeddings.weight
    qlite.save_merged(model, tmp_path / "merged")
    assert read_json(tmp_path / "merged" / "config.json")["tie_word_embeddings"] is True
    loaded = qlite.load_falcon(tmp_path / "merged", dtype=torch.float32)
    assert loaded.lm_head.weight is loaded.transformer.word_embeddings.weight


def test_shards_are_as_large_as_was_asked_for_and_load_as_one_file_does(tmp_path):
    model = base_of(qlite.Linear4bit)
    adapt(model)
    qlite.save_merged(model, tmp_path / "one")
    qlite.save_merged(model, tmp_path / "many", max_shard_bytes=40_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and max(path.stat().st_size for path in files) <= 40_000 + 2_000  # a header
    one, many = (qlite.load_falcon(tmp_path / name, dtype=torch.float32) for name in ("one", "many"))
    assert torch.equal(logits(one), logits(many))


def test_a_merged_folder_can_be_quantized_by_a_call_of_its_own(tmp_path):
    model = base_of(qlite.Linear4bit)
    adapt(model)
    qlite.save_merged(model, tmp_path / "merged")
    again = qlite.load_falcon(tmp_path / "merged", quantize=qlite.Linear4bit, dtype=torch.float32)
    qlite.merge_adapter(model)
    qlite.quantize_model(model)
    assert torch.equal(logits(again), logits(model)) and again.base_fingerprint


def test_tokenizer_and_generation_files_come_from_the_folder_that_is_named_and_nothing_else_does(folder, tmp_path):
    model = encoded_of(folder)
    qlite.save_merged(model, tmp_path / "without")
    assert set(stored_bytes(tmp_path / "without")) == {"config.json", "model.safetensors"}
    qlite.save_merged(model, tmp_path / "with", files_from=folder)
    files = stored_bytes(tmp_path / "with")
    assert files.keys() == {"config.json", "model.safetensors", *BESIDE}
    assert all(files[name] == f"its {name}".encode() for name in BESIDE)
    (folder / "vocab.json").unlink()  # no base has all of them
    qlite.save_merged(model, tmp_path / "fewer", files_from=folder)
    assert set(stored_bytes(tmp_path / "fewer")) == files.keys() - {"vocab.json"}


def peak_of(call):
    """What a call asked torch's allocator for at most, in bytes, and its result."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    taken = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(taken)), result


@pytest.mark.parametrize("original", [False, True], ids=["decoded", "original"])
@pytest.mark.parametrize("layers", [1, 4])
def test_a_folder_takes_one_decoded_weight_of_memory_however_many_layers_there_are(layers, original, tmp_path, monkeypatch):
    config = dataclasses.replace(FLAVOURS["7b"], hidden_size=192, num_hidden_layers=layers)
    qlite.save_checkpoint(falcon_of(config, dtype=torch.bfloat16), tmp_path / "base")
    model = encoded_of(tmp_path / "base")
    monkeypatch.setattr("qlite.merge.COMPARED", 2**12)  # comparing and decoding take a chunk each, here of 1/36 of the weight
    monkeypatch.setattr("qlite.nf4.CHUNK", 2**12)
    options = {"original": tmp_path / "base"} if original else {}
    peak, report = peak_of(lambda: qlite.save_merged(model, tmp_path / "merged", dtype=torch.bfloat16, **options))
    largest = 4 * 4 * 192 * 192  # float32 bytes of one weight of the MLP
    assert max(change.weights for change in report.changes.values()) * 4 == largest and len(report.changes) == 4 * layers
    # Three of the base, B A, B A scaled and their sum, and half a one that comes from a file in bfloat16. All decoded weights
    # together are three such a block.
    assert largest <= peak <= (3.6 if original else 3.1) * largest


# Into a folder, gone wrong.


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()], ids=["disk full", "interrupt"])
@pytest.mark.parametrize(("module", "step"), [(storage, "write_tensors"), (storage, "sync"), (os, "replace")])
def test_an_interrupted_merge_leaves_no_folder_and_an_unchanged_model(module, step, error, tmp_path, monkeypatch):
    model = base_of(qlite.Linear4bit)
    adapt(model)
    before = logits(model)

    def breaks(*arguments, **options):
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(module, step, breaks)
        qlite.save_merged(model, tmp_path / "merged")
    assert not list(tmp_path.iterdir()) and torch.equal(logits(model), before)


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    model = base_of()
    adapt(model)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something already"):
        qlite.save_merged(model, tmp_path)
    assert stored_bytes(tmp_path) == {"note.txt": b"mine"}


def test_bad_arguments_are_refused_before_any_work(tmp_path, monkeypatch):
    model = base_of()
    adapt(model)
    monkeypatch.setattr("qlite.merge.write_shards", None)
    with pytest.raises(TypeError, match=r"dtype is torch.int8; wanted a float dtype"):
        qlite.save_merged(model, tmp_path / "merged", dtype=torch.int8)
    with pytest.raises(FileNotFoundError, match="nowhere is neither a folder"):
        qlite.save_merged(model, tmp_path / "merged", files_from="nowhere")
    bare = nn.Sequential(nn.Linear(4, 4))
    adapt(bare)
    with pytest.raises(TypeError, match="Sequential has no config with a to_dict; merge_adapter merges any model"):
        qlite.save_merged(bare, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_an_adapter_on_a_layer_that_somebody_else_encoded_is_not_merged():
    model = nn.Sequential(nn.Linear(4, 4))
    adapt(model, r=1)
    model[0].base.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"0 adapts a layer of torch\.uint8; wanted floats, or one of quantize_model's"):
        qlite.merge_adapter(model)
    assert adapted(model)


def test_a_layer_that_somebody_else_encoded_is_refused_and_its_codes_are_never_written_for_weights(tmp_path):
    model = base_of()
    adapt(model, targets=["dense"])
    model.transformer.h[1].mlp.dense_h_to_4h.weight = nn.Parameter(torch.zeros(9, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"h\.1\.mlp\.dense_h_to_4h is a Linear that holds torch\.uint8; wanted a dense layer"):
        qlite.save_merged(model, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_dense_weight_that_the_dtype_cannot_hold_is_refused_by_name(tmp_path):
    model = base_of()
    adapt(model, targets=["dense"])
    model.transformer.ln_f.weight.data[3] = 70000.0
    with pytest.raises(ValueError, match=r"transformer\.ln_f\.weight is not finite in torch\.float16; nothing was written"):
        qlite.save_merged(model, tmp_path / "merged", dtype=torch.float16)
    assert not list(tmp_path.iterdir())

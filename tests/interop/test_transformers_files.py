"""Checkpoint folders of transformers' models: dense ones are encoded while they are read, encoded ones are read as they are.

The models are made without weights, as a model that does not fit dense must be: what fills them is `load_checkpoint` alone.
"""

from __future__ import annotations

import copy
import functools
import json

import accelerate
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qlite
from qlite.experts import ExpertStack
from qlite.hub_names import StoredStack, by_names_of
from qlite.linear import QuantizedLinear
from qlite.storage import stored_tensors
from tests.interop.test_transformers_models import (
    CONFIGS,
    ENCODER_DECODERS,
    MIXTURES,
    adapt,
    dense_of,
    encoded_of,
    logits_of,
    tokens,
)

names = pytest.mark.parametrize("name", CONFIGS)
mixtures = pytest.mark.parametrize("name", MIXTURES)
KINDS = {
    "nf4": qlite.Linear4bit,
    "fp4 in one level": functools.partial(qlite.Linear4bit, levels=qlite.nf4.FP4_LEVELS, double_quant=False, block_size=32),
    "int8": qlite.Linear8bit,
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def on_meta(name):
    """The model without weights; its buffers, which no file holds, are there."""
    kind = transformers.AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else transformers.AutoModelForCausalLM
    with accelerate.init_empty_weights():
        return kind.from_config(CONFIGS[name](), dtype=torch.float32).eval()


def encoded_parts(model):
    return {n: m.state_dict() for n, m in model.named_modules() if isinstance(m, (QuantizedLinear, ExpertStack))}


def assert_same(found, wanted):
    """All tensors, bit for bit, and what they say."""
    ours, theirs = found.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    assert not [key for key in ours if ours[key].dtype != theirs[key].dtype or not torch.equal(ours[key], theirs[key])]
    ids = tokens(2, 12)
    with torch.no_grad():
        assert torch.equal(logits_of(found.eval(), ids), logits_of(wanted.eval(), ids))


@names
def test_a_dense_folder_of_transformers_fills_an_encoded_model_with_the_bytes_of_encoding_it_in_memory(name, tmp_path):
    dense = dense_of(name)
    dense.save_pretrained(tmp_path)
    model = on_meta(name)
    quantized = qlite.quantize_model(model)
    report = qlite.load_checkpoint(model, tmp_path)
    wanted = encoded_of(name)
    assert report.encoded.keys() == quantized.quantized.keys() == encoded_parts(wanted).keys()
    assert_same(model, wanted)


@mixtures
def test_a_dense_folder_of_experts_fills_a_dense_model(name, tmp_path):
    dense = dense_of(name)
    dense.save_pretrained(tmp_path)
    model = on_meta(name)
    qlite.load_checkpoint(model, tmp_path)
    assert_same(model, dense)


@names
@kinds
def test_an_encoded_model_is_saved_and_read_as_it_is_into_one_without_weights(name, kind, tmp_path):
    model = encoded_of(name, kind)
    qlite.save_checkpoint(model, tmp_path / "saved")
    for again in (on_meta(name), on_meta(name)):
        report = qlite.load_checkpoint(again, tmp_path / "saved")
        assert report.encoded.keys() == encoded_parts(model).keys()
        assert {n: type(m) for n, m in again.named_modules()} == {n: type(m) for n, m in model.named_modules()}
        assert_same(again, model)
    twice = encoded_of(name, kind)
    qlite.load_checkpoint(twice, tmp_path / "saved")
    assert_same(twice, model)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in MIXTURES])
@pytest.mark.parametrize("kind", [qlite.Linear4bit, qlite.Linear8bit])
def test_what_save_pretrained_writes_of_an_encoded_model_is_read_as_it_is(name, kind, tmp_path):
    model = encoded_of(name, kind)
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    factory = transformers.AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else transformers.AutoModelForCausalLM
    with accelerate.init_empty_weights():
        again = factory.from_config(config, dtype=torch.float32)
    qlite.load_checkpoint(again, tmp_path)
    assert_same(again, model)


@mixtures
def test_what_came_from_files_is_trained_saved_and_loaded_as_any_other(name, tmp_path):
    model = encoded_of(name)
    qlite.save_checkpoint(model, tmp_path / "base")
    qlite.load_checkpoint(model := on_meta(name), tmp_path / "base")
    before = copy.deepcopy(encoded_parts(model))
    adapt(model, name, seed=2)
    loss = model(input_ids=tokens(2, 12), labels=tokens(2, 12)).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in qlite.lora_parameters(model)) and encoded_parts(model).keys()
    qlite.save_adapter(model, tmp_path / "adapter")
    qlite.load_checkpoint(again := on_meta(name), tmp_path / "base")
    qlite.load_adapter(again, tmp_path / "adapter")
    assert_same(again, model)
    after = {key.removesuffix(".base"): value for key, value in encoded_parts(again).items()}
    assert all(torch.equal(after[n][key], tensor) for n, state in before.items() for key, tensor in state.items())


@mixtures
def test_the_original_of_a_mixture_is_the_folder_of_the_hub_with_its_experts_one_by_one(name, tmp_path):
    dense = dense_of(name)
    dense.save_pretrained(tmp_path / "dense")
    model = on_meta(name)
    qlite.quantize_model(model)
    qlite.load_checkpoint(model, tmp_path / "dense")
    adapt(model, name, seed=2)
    qlite.save_merged(model, tmp_path / "merged", original=tmp_path / "dense")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    for key, weight in dense.state_dict().items():
        adapted = any(key == f"{layer}.weight" for layer in qlite.adapters.adapted_layers(model))
        assert torch.equal(merged[key], weight) != adapted, key


@pytest.mark.parametrize("name", [*MIXTURES, "gpt_neox"])
@pytest.mark.parametrize("experts", ["encoded", "dense"])
def test_a_merged_folder_has_the_names_and_shapes_that_transformers_writes_and_the_same_logits(name, experts, tmp_path):
    model, ids = dense_of(name), tokens(2, 12)
    qlite.quantize_model(model, skip=["lm_head"] + ["experts"] * (experts == "dense"))
    adapt(model, name, seed=2)
    qlite.save_merged(model, tmp_path / "merged", max_shard_bytes=10**5)
    dense_of(name).save_pretrained(tmp_path / "theirs")
    found, wanted = stored_tensors(tmp_path / "merged"), stored_tensors(tmp_path / "theirs")
    assert {key: entry.shape for key, entry in found.items()} == {key: entry.shape for key, entry in wanted.items()}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = logits_of(model.eval(), ids)
        # float32 sums of at most 128 terms in another order, through two blocks, relative to the largest logit.
        assert (logits_of(again, ids) - logits).abs().max() <= 2**-16 * logits.abs().max()


@mixtures
def test_one_expert_at_a_time_is_read(name, tmp_path, monkeypatch):
    dense_of(name).save_pretrained(tmp_path)
    model, sizes = on_meta(name), []
    qlite.quantize_model(model)
    read = qlite.hub_names.read_tensor
    monkeypatch.setattr(qlite.hub_names, "read_tensor", lambda entry, **o: sizes.append(entry.shape) or read(entry, **o))
    qlite.load_checkpoint(model, tmp_path)
    assert len([shape for shape in sizes if len(shape) == 2]) >= 2 * 4 * 3 and not [shape for shape in sizes if len(shape) == 3]


# What does not fit.


def rewritten(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


FIRST = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{FIRST}.2.up_proj.weight"), rf"{FIRST}\.gate_up_proj is missing; .*experts\.0\.gate_proj\.weight"),
        (lambda t: t.update({f"{FIRST}.2.up_proj.weight": torch.ones(65, 64)}), rf"{FIRST}\.gate_up_proj is missing"),
        (lambda t: t.update({f"{FIRST}.2.up_proj.weight": torch.ones(64, 64).half()}), rf"{FIRST}\.gate_up_proj is missing"),
        (lambda t: t[f"{FIRST}.2.up_proj.weight"].fill_(torch.nan), rf"{FIRST}\.gate_up_proj\[2\] holds a non-finite value"),
        (lambda t: t.update({f"{FIRST}.4.up_proj.weight": torch.ones(64, 64)}), r"experts\.4\.up_proj\.weight .* is not part"),
        (
            lambda t: [t.update({n: torch.ones(48, 64)}) for n in list(t) if "layers.0.mlp.experts" in n and "up_proj" in n],
            rf"{FIRST}\.gate_up_proj has shape \(4, 112, 64\), the config wants \(4, 128, 64\)",
        ),
    ],
)
def test_experts_that_do_not_make_the_stack_are_refused_by_name(change, words, tmp_path):
    dense_of("qwen3_moe").save_pretrained(tmp_path)
    rewritten(tmp_path, change)
    model = on_meta("qwen3_moe")
    qlite.quantize_model(model)
    with pytest.raises(ValueError, match=words):
        qlite.load_checkpoint(model, tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("mixtral", lambda options: options.update(experts=5), "has 5 experts in the files, 4 in the model"),
        ("mixtral", lambda options: options.pop("experts"), "has no experts in the files, 4 in the model"),
        ("mixtral", lambda options: options.update(block_size=7), "bad options"),
        ("gpt2", lambda options: options.pop("transposed"), "has transposed=False in the files, True in the model"),
        ("llama", lambda options: options.update(transposed=True), "has transposed=True in the files, False in the model"),
        ("llama", lambda options: options.update(experts=2), "has 2 experts in the files, none in the model"),
    ],
)
def test_a_config_that_says_otherwise_is_refused_and_the_model_is_as_it_was(name, change, words, tmp_path):
    qlite.save_checkpoint(encoded_of(name), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    change(layers[next((key for key in layers if "experts" in key), next(iter(layers)))])
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    model = on_meta(name)
    model.tie_weights()
    before = {key: id(value) for key, value in model.state_dict(keep_vars=True).items()}
    with pytest.raises(ValueError, match=words):
        qlite.load_checkpoint(model, tmp_path / "saved")
    assert {key: id(value) for key, value in model.state_dict(keep_vars=True).items()} == before


def test_a_mixture_that_is_encoded_otherwise_is_not_filled(tmp_path):
    qlite.save_checkpoint(encoded_of("mixtral"), tmp_path / "saved")
    model = encoded_of("mixtral", qlite.Linear8bit)
    with pytest.raises(ValueError, match=r"is {'format': 'nf4'.* in the files and {'format': 'int8'} in the model"):
        qlite.load_checkpoint(model, tmp_path / "saved")


@mixtures
def test_the_names_of_a_folder_become_those_of_the_model_and_nothing_else_changes(name, tmp_path):
    dense = dense_of(name)
    dense.save_pretrained(tmp_path)
    found = by_names_of(dense, stored_tensors(tmp_path))
    state = dense.state_dict()
    assert found.keys() == {key for key in state if key in found} and len(found) >= len(state) - 1  # a tied head
    assert {key: entry.shape for key, entry in found.items()} == {key: tuple(state[key].shape) for key in found}
    assert sum(isinstance(entry, StoredStack) for entry in found.values()) == 4
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert sum(entry.size for entry in found.values()) == sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118

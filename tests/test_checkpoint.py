"""From files to a model and back: every byte, one tensor at a time, and a clear refusal before any work."""

import functools
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import qlite
from qlite import checkpoint, hub_names, saving, storage
from qlite.linear import QuantizedLinear
from qlite.nf4 import FP4_LEVELS
from qlite.storage import INDEX, SINGLE
from tests.falcons import FLAVOURS, falcon_of, tokens_of

TABLE = tuple((2 * i - 15) / 15 for i in range(16))
KINDS = {
    "nf4": qlite.Linear4bit,
    "fp4": functools.partial(qlite.Linear4bit, levels=FP4_LEVELS),
    "custom table": functools.partial(qlite.Linear4bit, levels=TABLE),
    "no double quantization": functools.partial(qlite.Linear4bit, double_quant=False),
    "blocks of 32": functools.partial(qlite.Linear4bit, block_size=32),
    "int8": qlite.Linear8bit,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
flavours = pytest.mark.parametrize("flavour", ["7b", "40b", "11b", "rw", "grouped, alibi, biases"])
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
layouts = pytest.mark.parametrize("shards", [1, 3], ids=["one file", "three shards"])


def write(folder, tensors, config, shards=1):
    """A checkpoint as others write it: the tensors of a layer lie in any shard, in no order."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config if isinstance(config, dict) else config.to_dict()))
    if shards == 1:
        save_file(tensors, folder / SINGLE)
        return folder
    weight_map = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name, its in weight_map.items() if its == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def tensors_of(flavour="7b", dtype=torch.float32, seed=0):
    """What a checkpoint of a random model holds; a tied head is stored once."""
    state = falcon_of(FLAVOURS[flavour], seed=seed, dtype=dtype).state_dict()
    if FLAVOURS[flavour].tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def source(folder, flavour="7b", dtype=torch.float32, shards=1, seed=0):
    return write(folder, tensors_of(flavour, dtype, seed), FLAVOURS[flavour], shards)


def bytes_of(tensors):
    flat = {name: tensor.detach().reshape(-1).view(torch.uint8).numpy() for name, tensor in tensors.items()}
    return {name: (tensor.dtype, tuple(tensor.shape), flat[name].tobytes()) for name, tensor in tensors.items()}


def logits(model):
    return model(tokens_of(model.config, 2, 7))


def stored_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# What loads.


@flavours
@layouts
@dtypes
def test_a_dense_model_holds_the_bytes_of_the_files(flavour, shards, dtype, tmp_path):
    expected = tensors_of(flavour, dtype)
    model = qlite.load_falcon(write(tmp_path / "base", expected, FLAVOURS[flavour], shards), dtype=dtype)
    state = model.state_dict()
    if FLAVOURS[flavour].tie_word_embeddings:
        expected["lm_head.weight"] = expected["transformer.word_embeddings.weight"]
    assert bytes_of(state) == bytes_of(expected)
    assert not model.training and model.config.to_dict() == FLAVOURS[flavour].to_dict()


@pytest.mark.parametrize("stored", DTYPES.values(), ids=DTYPES)
@dtypes
def test_dense_tensors_are_cast_to_the_dtype_that_is_asked_for(stored, dtype, tmp_path):
    expected = tensors_of(dtype=stored)
    state = qlite.load_falcon(write(tmp_path / "base", expected, FLAVOURS["7b"]), dtype=dtype).state_dict()
    assert bytes_of({name: state[name] for name in expected}) == bytes_of({n: t.to(dtype) for n, t in expected.items()})


def test_without_being_asked_a_model_computes_in_bfloat16_and_a_checkpoint_keeps_its_dtype(tmp_path):
    base = source(tmp_path / "base")
    assert {p.dtype for p in qlite.load_falcon(base).parameters()} == {torch.bfloat16}
    model = qlite.Falcon(FLAVOURS["7b"], device="meta")
    qlite.load_checkpoint(model, base)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@kinds
@pytest.mark.parametrize("flavour", ["7b", "11b", "rw"])
@layouts
def test_an_encoded_load_equals_encoding_the_dense_model(kind, flavour, shards, tmp_path):
    base = source(tmp_path / "base", flavour, torch.bfloat16, shards)
    dense = qlite.load_falcon(base)
    report = qlite.quantize_model(dense, kind)
    model = qlite.load_falcon(base, quantize=kind)
    assert bytes_of(model.state_dict()) == bytes_of(dense.state_dict())
    assert torch.equal(logits(model), logits(dense))
    encoded = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert encoded == set(report.quantized) and len(encoded) == 4 * model.config.num_hidden_layers


def test_a_weight_is_encoded_from_its_stored_values_and_not_from_the_rounded_ones(tmp_path):
    base = source(tmp_path / "base")
    exact, rounded = qlite.load_falcon(base, dtype=torch.float32), qlite.load_falcon(base)
    for model in (exact, rounded):
        qlite.quantize_model(model)
    found = qlite.load_falcon(base, quantize=qlite.Linear4bit)
    same = lambda other: [  # noqa: E731
        torch.equal(a.weight, b.weight)
        for a, b in zip(found.modules(), other.modules(), strict=True)
        if isinstance(a, QuantizedLinear)
    ]
    assert all(same(exact)) and not all(same(rounded))


def test_a_checkpoint_loads_into_a_model_that_has_weights_already(tmp_path):
    base = source(tmp_path / "base", "rw")
    model = falcon_of(FLAVOURS["rw"], seed=5)
    report = qlite.load_checkpoint(model, base)
    assert bytes_of(model.state_dict()).items() >= bytes_of(tensors_of("rw")).items()
    assert report.fingerprint == model.base_fingerprint and not report.encoded
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_tensors_that_hold_nothing_a_model_needs_are_passed_over(tmp_path):
    tensors = tensors_of()
    extra = {
        "transformer.h.0.self_attention.rotary_emb.inv_freq": torch.ones(8),
        "transformer.h.1.self_attention.masked_bias": torch.tensor(float("-inf")),
        "transformer.h.1.self_attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
    }
    model = qlite.load_falcon(write(tmp_path / "base", tensors | extra, FLAVOURS["7b"]), dtype=torch.float32)
    assert not set(extra) & {*model.load_report.dense, *model.state_dict()}
    assert bytes_of(model.state_dict()).items() >= bytes_of(tensors).items()


# Tied head.


@pytest.mark.parametrize("twice", [False, True], ids=["stored once", "stored twice"])
@pytest.mark.parametrize("quantize", [None, qlite.Linear4bit], ids=["dense", "nf4"])
def test_a_tied_head_is_the_embedding_however_often_it_is_stored(twice, quantize, tmp_path):
    tensors = tensors_of()
    if twice:
        tensors["lm_head.weight"] = tensors["transformer.word_embeddings.weight"].clone()
    model = qlite.load_falcon(write(tmp_path / "base", tensors, FLAVOURS["7b"], shards=2), quantize=quantize)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert "lm_head.weight" not in model.load_report.dense
    qlite.save_checkpoint(model, tmp_path / "again")
    assert "lm_head.weight" not in load_file(tmp_path / "again" / SINGLE)


@pytest.mark.parametrize("change", [lambda t: t + 1, lambda t: t.half()], ids=["values", "dtype"])
def test_a_tied_head_that_is_stored_twice_and_differs_is_refused(change, tmp_path):
    tensors = tensors_of()
    tensors["lm_head.weight"] = change(tensors["transformer.word_embeddings.weight"])
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from transformer\.word_embeddings\.weight"):
        qlite.load_falcon(write(tmp_path / "base", tensors, FLAVOURS["7b"]))


def test_a_head_of_its_own_stays_apart(tmp_path):
    model = qlite.load_falcon(source(tmp_path / "base", "11b"), dtype=torch.float32)
    assert not torch.equal(model.lm_head.weight, model.transformer.word_embeddings.weight)


# The report, the fingerprint.


@flavours
@pytest.mark.parametrize("kind", [None, qlite.Linear4bit, qlite.Linear8bit])
def test_the_report_accounts_for_every_byte_once(flavour, kind, tmp_path):
    model = qlite.load_falcon(source(tmp_path / "base", flavour), quantize=kind)
    report = model.load_report
    distinct = {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()
    assert sum(report.encoded.values()) + sum(report.dense.values()) == sum(t.numel() * t.element_size() for t in distinct)
    layers = {name: m.encoded_bytes() for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert report.encoded == layers
    dense = {name for name in tensors_of(flavour) if name.rpartition(".")[0] not in layers}
    assert set(report.dense) == dense
    assert report.left == ({} if kind is None else {"lm_head": "named in skip (lm_head)"})


def test_the_report_can_be_read(tmp_path):
    model = qlite.load_falcon(source(tmp_path / "base"), quantize=qlite.Linear4bit)
    encoded, dense = (sum(part.values()) / 1e6 for part in (model.load_report.encoded, model.load_report.dense))
    assert str(model.load_report) == (
        f"loaded 8 encoded linear layers ({encoded:,.1f} MB) and 7 dense tensors ({dense:,.1f} MB); "
        "lm_head left dense: named in skip (lm_head)"
    )


def fingerprint_by_hand(tensors):
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + str(tuple(tensors[name].shape)).encode() + bytes_of(tensors)[name][2][:256])
    return digest.hexdigest()


@pytest.mark.parametrize("quantize", [None, *KINDS.values()], ids=["dense", *KINDS])
@layouts
def test_a_base_has_one_fingerprint_however_it_is_stored_and_loaded(quantize, shards, tmp_path):
    model = qlite.load_falcon(source(tmp_path / "base", shards=shards), quantize=quantize, dtype=torch.float32)
    expected = fingerprint_by_hand(tensors_of())
    assert model.base_fingerprint == model.load_report.fingerprint == expected
    qlite.save_checkpoint(model, tmp_path / "again", max_shard_bytes=20_000)
    assert qlite.load_falcon(tmp_path / "again").base_fingerprint == expected


@pytest.mark.parametrize("change", ["a value at the start", "another seed", "a name", "a shape"])
def test_another_base_has_another_fingerprint(change, tmp_path):
    tensors = {"a": torch.arange(100.0), "b": torch.ones(3, 4)}
    save_file(tensors, tmp_path / SINGLE)
    before = storage.fingerprint(storage.stored_tensors(tmp_path))
    assert before == fingerprint_by_hand(tensors)
    if change == "a value at the start":
        tensors["a"][63] = 5
    elif change == "another seed":
        tensors["b"] = torch.randn(3, 4)
    elif change == "a name":
        tensors["c"] = tensors.pop("b")
    else:
        tensors["b"] = tensors["b"].view(4, 3)
    save_file(tensors, tmp_path / SINGLE)
    assert storage.fingerprint(storage.stored_tensors(tmp_path)) != before


def test_a_fingerprint_reads_256_bytes_of_a_tensor_at_most(tmp_path, monkeypatch):
    sizes = []
    read = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda *arguments: sizes.append(arguments[2]) or read(*arguments))
    storage.fingerprint(storage.stored_tensors(source(tmp_path / "base")))
    assert max(sizes) == 256 and len(sizes) == len(tensors_of())


# Memory.


def test_no_dense_weight_is_alive_when_the_next_one_is_read(tmp_path, monkeypatch):
    base = source(tmp_path / "base", "11b", shards=3)
    places = {(entry.file, entry.start): name for name, entry in storage.stored_tensors(base).items()}
    encoded = {name for name in places if "h_to" in places[name] or "attention" in places[name]}
    alive = {}

    def counted(stored, **options):
        held = {place for place, storage in alive.items() if not storage.expired()}
        assert not held & encoded, [places[place] for place in held & encoded]
        tensor = storage.read_tensor(stored, **options)
        alive[stored.file, stored.start] = StorageWeakRef(tensor.untyped_storage())
        return tensor

    monkeypatch.setattr(hub_names, "read_tensor", counted)
    qlite.load_falcon(base, quantize=qlite.Linear4bit, dtype=torch.float32)
    # In the order of the files, so that a disk is read from front to back.
    assert list(alive) == sorted(places) and len(encoded) == 8


MEMORY = """
import pathlib, sys, torch, qlite

class Frugal(qlite.Linear8bit):  # keeps next to nothing and takes no memory to encode: what is left is what a load takes
    def quantize_(self, dense):
        self.weight = torch.nn.Parameter(dense[:, :1].to(torch.int8), requires_grad=False)
        self.absmax = dense[:, :1].float()
        return self

def memory(line):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(found.split()[1]) * 1024 for found in lines if found.startswith(line))

qlite.load_falcon(sys.argv[2], quantize=Frugal)
before = memory("VmHWM")
assert before - memory("VmRSS") < 2**20
model = qlite.load_falcon(sys.argv[1], quantize=Frugal)
print(memory("VmHWM") - before, sum(model.load_report.dense.values()))
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").is_file(), reason="needs Linux's count of a process's memory")
def test_a_load_takes_what_the_model_keeps_and_one_dense_tensor(tmp_path):
    config = qlite.FalconConfig(vocab_size=64, hidden_size=1024, num_attention_heads=16, num_hidden_layers=5)
    shapes = {name: p.shape for name, p in qlite.Falcon(config, device="meta").named_parameters()}
    tensors = {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in shapes.items()}
    base = write(tmp_path / "base", tensors, config, shards=2)
    total, largest = (f(t.numel() * 2 for t in tensors.values()) for f in (sum, max))
    # Memory that is freed goes back to the system at once, so that the count is of what is in use.
    options = {"env": {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}}
    command = [sys.executable, "-c", MEMORY, base, source(tmp_path / "small")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, **options)
    taken, kept = map(int, result.stdout.split())
    # Half of the largest tensor, 4 MB, for what Python and the allocator do meanwhile.
    assert taken < kept + 1.5 * largest < total / 5


# Saved and loaded.


def refuse(*arguments, **options):
    pytest.fail("this is work that was not to be done")


@kinds
@dtypes
@pytest.mark.parametrize("flavour", ["7b", "11b", "rw"])
def test_an_encoded_model_comes_back_byte_for_byte_without_encoding_again(kind, dtype, flavour, tmp_path, monkeypatch):
    model = qlite.load_falcon(source(tmp_path / "base", flavour), quantize=kind, dtype=dtype)
    qlite.save_checkpoint(model, tmp_path / "saved")
    monkeypatch.setattr(qlite.Linear4bit, "quantize_", refuse)
    monkeypatch.setattr(qlite.Linear8bit, "quantize_", refuse)
    again = qlite.load_falcon(tmp_path / "saved", dtype=dtype)
    assert bytes_of(again.state_dict()) == bytes_of(model.state_dict())
    assert torch.equal(logits(again), logits(model))
    for one, other in zip(model.modules(), again.modules(), strict=True):
        assert type(one) is type(other)
        if isinstance(one, QuantizedLinear):
            assert one.config() == other.config() and one.dtype == other.dtype
    assert again.load_report == model.load_report.__class__(
        model.load_report.encoded, model.load_report.dense, model.base_fingerprint
    )


@flavours
@dtypes
def test_a_dense_model_comes_back_byte_for_byte(flavour, dtype, tmp_path):
    model = falcon_of(FLAVOURS[flavour], dtype=dtype)
    qlite.save_checkpoint(model, tmp_path / "saved")
    again = qlite.load_falcon(tmp_path / "saved", dtype=dtype)
    assert bytes_of(again.state_dict()) == bytes_of(model.state_dict())
    assert torch.equal(logits(again), logits(model))
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


@settings(max_examples=20)  # each writes up to 24 files and waits for the disk
@given(st.integers(1, 9_000), st.sampled_from((None, qlite.Linear4bit)))
def test_shards_hold_every_tensor_once_in_files_of_the_size_that_is_asked_for(most, kind):
    model = falcon_of(qlite.FalconConfig(vocab_size=20, hidden_size=16, num_attention_heads=2, num_hidden_layers=1))
    if kind is not None:
        qlite.quantize_model(model, kind)
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in expected.items()}
    with tempfile.TemporaryDirectory() as parent:
        folder = pathlib.Path(parent) / "saved"
        qlite.save_checkpoint(model, folder, max_shard_bytes=most)
        files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
        assert bytes_of({n: t for tensors in files.values() for n, t in tensors.items()}) == bytes_of(expected)
        assert sum(len(tensors) for tensors in files.values()) == len(expected)
        for tensors in files.values():
            assert len(tensors) == 1 or sum(sizes[name] for name in tensors) <= most
        if sum(sizes.values()) <= most:
            assert set(files) == {SINGLE} and not (folder / INDEX).exists()
        else:
            index = json.loads((folder / INDEX).read_text())
            assert index["metadata"]["total_size"] == sum(sizes.values())
            assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
            filled = [sum(sizes[name] for name in tensors) for _, tensors in sorted(files.items())]
            first = {file: sizes[name] for name, file in reversed(index["weight_map"].items())}
            assert all(held + first[after] > most for held, after in zip(filled, sorted(files)[1:]))
            assert sorted(files) == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        again = qlite.load_falcon(folder, dtype=torch.float32)
        assert bytes_of(again.state_dict()) == bytes_of(model.state_dict())


def test_the_same_model_gives_the_same_files_and_others_may_read_them(tmp_path):
    model = qlite.load_falcon(source(tmp_path / "base"), quantize=qlite.Linear4bit)
    for name in ("one", "other"):
        qlite.save_checkpoint(model, tmp_path / name)
    assert stored_bytes(tmp_path / "one") == stored_bytes(tmp_path / "other")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "one").iterdir()} == {0o644}


def test_the_config_of_an_encoded_checkpoint_is_as_documented(tmp_path):
    model = qlite.load_falcon(source(tmp_path / "base", dtype=torch.bfloat16), quantize=KINDS["custom table"])
    qlite.save_checkpoint(model, tmp_path / "saved")
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert values["dtype"] == "bfloat16" and qlite.FalconConfig.from_dict(values) == model.config
    stored = values["quantization_config"]
    assert stored["format"] == "qlite" and "quant_method" not in stored and stored["base_fingerprint"] == model.base_fingerprint
    expected = {"format": "custom4", "block_size": 64, "double_quant": True, "levels": list(TABLE)}
    assert stored["layers"]["transformer.h.1.mlp.dense_4h_to_h"] == expected and len(stored["layers"]) == 8


def test_an_encoded_model_that_came_from_no_files_is_known_by_its_own_bytes(tmp_path):
    model = falcon_of(FLAVOURS["7b"])
    qlite.quantize_model(model)
    qlite.save_checkpoint(model, tmp_path / "saved")
    again = qlite.load_falcon(tmp_path / "saved", dtype=torch.float32)
    assert again.base_fingerprint == fingerprint_by_hand(load_file(tmp_path / "saved" / SINGLE))


def test_layers_may_be_encoded_differently_or_not_at_all(tmp_path):
    model = falcon_of(FLAVOURS["7b"])
    qlite.quantize_model(model.transformer.h[0].mlp, qlite.Linear8bit)
    qlite.quantize_model(model.transformer.h[1], KINDS["blocks of 32"], skip=["dense"])
    qlite.save_checkpoint(model, tmp_path / "saved")
    again = qlite.load_falcon(tmp_path / "saved", dtype=torch.float32)
    assert bytes_of(again.state_dict()) == bytes_of(model.state_dict()) and torch.equal(logits(again), logits(model))


# Saving, gone wrong.


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something already"):
        qlite.save_checkpoint(falcon_of(FLAVOURS["7b"]), tmp_path)
    with pytest.raises(FileExistsError, match="holds something already"):
        qlite.save_checkpoint(falcon_of(FLAVOURS["7b"]), tmp_path / "note.txt")
    assert stored_bytes(tmp_path) == {"note.txt": b"mine"}


def test_a_model_with_adapters_is_refused(tmp_path):
    model = falcon_of(FLAVOURS["7b"])
    qlite.add_lora(model, qlite.LoRAConfig(r=2))
    with pytest.raises(ValueError, match=r"carries adapters; use save_adapter, or merge_adapter first"):
        qlite.save_checkpoint(model, tmp_path / "saved")
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_is_put_beside_and_one_that_is_not_there_is_an_error_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "its.json").write_bytes(b'{"a": "\xc3\xa4"}')
    qlite.save_checkpoint(falcon_of(FLAVOURS["7b"]), tmp_path / "saved", tokenizer_json=tmp_path / "its.json")
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == b'{"a": "\xc3\xa4"}'
    monkeypatch.setattr(saving, "write_shards", refuse)
    with pytest.raises(FileNotFoundError, match=r"absent\.json: no such file"):
        qlite.save_checkpoint(falcon_of(FLAVOURS["7b"]), tmp_path / "other", tokenizer_json=tmp_path / "absent.json")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("exists", [False, True], ids=["no folder", "an empty folder"])
@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()], ids=["disk full", "interrupt"])
@pytest.mark.parametrize(
    ("module", "step", "after"),
    [(storage, "write_tensors", 0), (storage, "write_tensors", 2), (storage, "sync", 1), (os, "replace", 0)],
    ids=["first file", "third file", "flush", "rename"],
)
def test_an_interrupted_save_leaves_nothing_and_loses_nothing(exists, error, module, step, after, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "note.txt").write_text("mine")
    if exists:
        (tmp_path / "saved").mkdir()
    calls, original = [], getattr(module, step)

    def breaks(*arguments, **options):
        calls.append(1)
        if len(calls) > after:
            raise error
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, step, breaks)
        with pytest.raises(type(error)):
            qlite.save_checkpoint(falcon_of(FLAVOURS["7b"]), tmp_path / "saved", max_shard_bytes=20_000)
    assert calls
    assert not (tmp_path / "saved").exists() or not any((tmp_path / "saved").iterdir())
    assert {path.name for path in tmp_path.iterdir()} <= {"other", "saved"}
    assert stored_bytes(tmp_path / "other") == {"note.txt": b"mine"}
    qlite.save_checkpoint(falcon_of(FLAVOURS["7b"]), tmp_path / "saved")
    assert torch.equal(logits(qlite.load_falcon(tmp_path / "saved", dtype=torch.float32)), logits(falcon_of(FLAVOURS["7b"])))


def test_what_a_killed_save_left_does_not_get_into_the_next_one(tmp_path):
    left = tmp_path / ".saved.tmp"
    left.mkdir()
    (left / INDEX).write_text("{")
    qlite.save_checkpoint(falcon_of(FLAVOURS["7b"]), tmp_path / "saved")
    assert set(stored_bytes(tmp_path / "saved")) == {"config.json", SINGLE} and not left.exists()


def test_the_folder_gets_its_name_last(tmp_path, monkeypatch):
    seen = []
    sync = storage.sync
    monkeypatch.setattr(storage, "sync", lambda path: seen.append((path.name, (tmp_path / "saved").exists())) or sync(path))
    qlite.save_checkpoint(falcon_of(FLAVOURS["7b"]), tmp_path / "saved")
    assert {".saved.tmp", "config.json", SINGLE} <= {name for name, there in seen if not there}
    assert [name for name, there in seen if there] == [tmp_path.name]  # the folder above, whose list of names has changed


# Bad input.


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Good folders, each copied before it is damaged."""
    folder = tmp_path_factory.mktemp("bases")
    source(folder / "single")
    source(folder / "sharded", shards=3)
    for name, kind in (("nf4", qlite.Linear4bit), ("custom", KINDS["custom table"]), ("int8", qlite.Linear8bit)):
        qlite.save_checkpoint(qlite.load_falcon(folder / "single", quantize=kind), folder / name)
    return folder


@pytest.fixture
def copied(bases, tmp_path):
    return lambda name: pathlib.Path(shutil.copytree(bases / name, tmp_path / "damaged"))


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, **changes):
    """Replaces tensors of the single file; None takes one away. `__` stands for a dot in a name."""
    tensors = load_file(folder / SINGLE) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / SINGLE)


def index(folder, **changes):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    edit_json(folder / INDEX, weight_map={**weight_map, **{n.replace("__", "."): s for n, s in changes.items()}})


SECOND = "model-00002-of-00003.safetensors"
NORM, UP = "transformer__ln_f__weight", "transformer__h__0__mlp__dense_h_to_4h__weight"
FILE_FAULTS = {
    "no weights": ("single", lambda f: (f / SINGLE).unlink(), FileNotFoundError, "has neither model.safetensors nor"),
    "a pickle": (
        "single",
        lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"),
        FileNotFoundError,
        r"only pytorch_model\.bin: pickle files can run code and are never loaded",
    ),
    "a shard is missing": ("sharded", lambda f: (f / SECOND).unlink(), FileNotFoundError, SECOND),
    "a shard is short": ("sharded", lambda f: os.truncate(f / SECOND, 5000), ValueError, rf"{SECOND}: truncated"),
    "a shard is empty": ("sharded", lambda f: os.truncate(f / SECOND, 0), ValueError, rf"{SECOND}: .*truncated"),
    "a shard of another format": ("sharded", lambda f: (f / SECOND).write_bytes(b"PK\3\4" * 9), ValueError, "not safetensors"),
    "the index is no JSON": ("sharded", lambda f: (f / INDEX).write_text("{"), ValueError, rf"{INDEX}: not JSON"),
    "the index has no map": ("sharded", lambda f: (f / INDEX).write_text("{}"), ValueError, "has no weight_map"),
    "the map is empty": ("sharded", lambda f: edit_json(f / INDEX, weight_map={}), ValueError, "has no weight_map"),
    "the map is a list": ("sharded", lambda f: edit_json(f / INDEX, weight_map=[1]), ValueError, "has no weight_map"),
    "a shard above": ("sharded", lambda f: index(f, a="../x.safetensors"), ValueError, r"'\.\./x\.safetensors' is not"),
    "a shard elsewhere": ("sharded", lambda f: index(f, a="/x.safetensors"), ValueError, "is not the name of a"),
    "a shard below": ("sharded", lambda f: index(f, a="b/x.safetensors"), ValueError, "is not the name of a"),
    "a shard that is a pickle": ("sharded", lambda f: index(f, a="x.bin"), ValueError, r"'x\.bin' is not the name"),
    "a shard named by a list": ("sharded", lambda f: index(f, a=[SECOND]), ValueError, "is not the name of a"),
    "a shard named by a number": ("sharded", lambda f: index(f, a=5), ValueError, "5 is not the name of a"),
    "in another shard": ("sharded", lambda f: index(f, a=SECOND), ValueError, rf"a is in {SECOND}, which does not hold it"),
    "another shape": (
        "single",
        lambda f: edit_tensors(f, **{UP: torch.zeros(192, 47)}),
        ValueError,
        r"dense_h_to_4h\.weight has shape \(192, 47\), the config wants \(192, 48\)",
    ),
    "transposed": ("single", lambda f: edit_tensors(f, **{UP: torch.zeros(48, 192)}), ValueError, r"has shape \(48, 192\)"),
    "a norm of another size": ("single", lambda f: edit_tensors(f, **{NORM: torch.ones(47)}), ValueError, r"\(47,\)"),
    "a tensor is missing": ("single", lambda f: edit_tensors(f, **{NORM: None}), ValueError, r"ln_f\.weight is missing"),
    "a weight is missing": ("single", lambda f: edit_tensors(f, **{UP: None}), ValueError, "dense_h_to_4h.weight is missing"),
    "the embedding is missing": (
        "single",
        lambda f: edit_tensors(f, transformer__word_embeddings__weight=None),
        ValueError,
        r"word_embeddings\.weight is missing",
    ),
    "a tensor too many": (
        "single",
        lambda f: edit_tensors(f, transformer__extra=torch.ones(3)),
        ValueError,
        r"transformer\.extra \(3,\) is not part of this model",
    ),
    "integers": ("single", lambda f: edit_tensors(f, **{NORM: torch.ones(48).int()}), ValueError, "is I32, wanted a float"),
    "integers of a kind that is read": (
        "single",
        lambda f: edit_tensors(f, **{UP: torch.ones(192, 48).char()}),
        ValueError,
        r"dense_h_to_4h\.weight (is I8, wanted a float|has shape)",
    ),
}
faults = pytest.mark.parametrize(("base", "damage", "error", "words"), FILE_FAULTS.values(), ids=FILE_FAULTS)


@faults
@pytest.mark.parametrize("quantize", [None, qlite.Linear4bit], ids=["dense", "nf4"])
def test_damaged_files_are_refused_before_a_tensor_is_read(base, damage, error, words, quantize, copied, monkeypatch):
    folder = copied(base)
    damage(folder)
    monkeypatch.setattr(hub_names, "read_tensor", refuse)
    with pytest.raises(error, match=words) as caught:
        qlite.load_falcon(folder, quantize=quantize)
    assert str(folder) in str(caught.value)


@faults
@pytest.mark.parametrize("quantize", [False, True], ids=["dense", "nf4"])
def test_damaged_files_leave_a_model_as_it_was(base, damage, error, words, quantize, copied):
    folder, model = copied(base), falcon_of(FLAVOURS["7b"], seed=5)
    if quantize:
        qlite.quantize_model(model)
    before = bytes_of(model.state_dict())
    damage(folder)
    with pytest.raises(error, match=words):
        qlite.load_checkpoint(model, folder)
    assert bytes_of(model.state_dict()) == before and not hasattr(model, "base_fingerprint")


CONFIG_FAULTS = {
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "has no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("falcon"), ValueError, r"config\.json: not JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), ValueError, r"config\.json: holds list"),
    "no Falcon": (lambda f: edit_json(f / "config.json", model_type="llama"), ValueError, "model_type is 'llama'"),
    "no model type": (lambda f: edit_json(f / "config.json", model_type=None), ValueError, "model_type is None"),
    "dropout": (lambda f: edit_json(f / "config.json", attention_dropout=0.1), ValueError, "attention_dropout is 0.1"),
    "a size that is text": (lambda f: edit_json(f / "config.json", hidden_size="48"), ValueError, "hidden_size is '48'"),
    "beyond floats": (lambda f: edit_json(f / "config.json", layer_norm_epsilon=10**400), ValueError, r"config\.json: "),
    "one block too many": (lambda f: edit_json(f / "config.json", num_hidden_layers=3), ValueError, "2 blocks, .* says 3"),
    "one block too few": (lambda f: edit_json(f / "config.json", num_hidden_layers=1), ValueError, "2 blocks, .* says 1"),
}


def check_refusal_before_a_tensor_is_read(folder, damage, error, words, monkeypatch):
    damage(folder)
    monkeypatch.setattr(hub_names, "read_tensor", refuse)
    with pytest.raises(error, match=words) as caught:
        qlite.load_falcon(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(("damage", "error", "words"), CONFIG_FAULTS.values(), ids=CONFIG_FAULTS)
def test_a_faulty_config_is_refused_before_a_tensor_is_read(damage, error, words, copied, monkeypatch):
    check_refusal_before_a_tensor_is_read(copied("single"), damage, error, words, monkeypatch)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 2**70},
        {"vocab_size": 10**6},
        {"vocab_size": 2**62},
        {"vocab_size": 2**70},
        {"hidden_size": 3 * 10**4},
        {"hidden_size": 3 * 10**12},
        {"ffn_hidden_size": 10**6},
        {"ffn_hidden_size": 10**30},
    ],
    ids=str,
)
def test_a_config_that_the_files_cannot_hold_is_refused_before_a_model_is_built(sizes, copied, monkeypatch):
    folder = copied("single")
    edit_json(folder / "config.json", **sizes)
    monkeypatch.setattr(checkpoint, "Falcon", refuse)
    with pytest.raises(ValueError, match=rf"its config\.json says {min(sizes.values())}|x {max(sizes.values())} weights"):
        qlite.load_falcon(folder)


json_values = (
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.integers(-2, 200) | st.floats() | st.text(max_size=5)
)
json_values |= st.lists(json_values, max_size=2) | st.dictionaries(st.text(max_size=5), json_values, max_size=2)
keys = st.sampled_from(sorted({*FLAVOURS["7b"].to_dict(), "rope_scaling", "n_head_kv", "n_layer", "quantization_config"}))


def built(config, **options):
    """A Falcon, unless a config got through that would fill the memory of whoever runs this."""
    assert config.num_hidden_layers == 2
    return qlite.Falcon(config, **options)


@given(st.dictionaries(keys, json_values, min_size=1, max_size=2))
def test_whatever_a_config_says_the_answer_is_a_model_or_a_value_error(changes):
    with tempfile.TemporaryDirectory() as folder:
        base = source(pathlib.Path(folder) / "base")
        edit_json(base / "config.json", **changes)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(checkpoint, "Falcon", built)
                model = qlite.load_falcon(base)
        except ValueError as error:
            assert str(base) in str(error)
        else:
            assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in tensors_of().values())


@given(st.text(max_size=12).map(lambda text: text + ".safetensors") | st.text(max_size=12) | json_values)
def test_whatever_an_index_names_nothing_outside_the_folder_is_opened(name):
    with tempfile.TemporaryDirectory() as folder:
        base = source(pathlib.Path(folder) / "base", shards=2)
        index(base, transformer__ln_f__weight=name)
        opened = []
        with pytest.MonkeyPatch.context() as patch:
            read = storage.read_header
            patch.setattr(storage, "read_header", lambda path: opened.append(path) or read(path))
            with pytest.raises((ValueError, FileNotFoundError), match="base"):
                qlite.load_falcon(base)
        assert all(path.resolve().parent == base.resolve() for path in opened)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["transformer.word_embeddings.weight", "transformer.h.1.mlp.dense_4h_to_h.weight"])
@pytest.mark.parametrize("quantize", [None, qlite.Linear4bit], ids=["dense", "nf4"])
def test_a_value_that_is_not_finite_is_refused_with_the_name_of_its_tensor(value, name, quantize, tmp_path):
    tensors = tensors_of()
    tensors[name][-1, -1] = value
    with pytest.raises(ValueError, match=rf"base: {name} holds a non-finite value; the checkpoint is damaged"):
        qlite.load_falcon(write(tmp_path / "base", tensors, FLAVOURS["7b"]), quantize=quantize)


@pytest.mark.parametrize("value", [1e5, -70000.0])
@pytest.mark.parametrize("name", ["transformer.ln_f.weight", "transformer.h.1.mlp.dense_4h_to_h.weight"])
@pytest.mark.parametrize("quantize", [None, qlite.Linear8bit], ids=["dense", "int8"])
def test_a_value_that_float16_cannot_hold_is_refused_with_the_name_of_its_tensor(value, name, quantize, tmp_path):
    tensors = tensors_of()
    tensors[name].view(-1)[-1] = value
    base = write(tmp_path / "base", tensors, FLAVOURS["7b"])
    with pytest.raises(ValueError, match=rf"{name} becomes non-finite in torch\.float16: it reaches {abs(value):g}"):
        qlite.load_falcon(base, quantize=quantize, dtype=torch.float16)
    assert qlite.load_falcon(base, quantize=quantize, dtype=torch.bfloat16).training is False


def layers(folder, layer="transformer.h.0.mlp.dense_h_to_4h", **changes):
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    options = stored["layers"].pop(layer, {}) | changes
    stored["layers"][layer] = {key: value for key, value in options.items() if value is not None}
    edit_json(folder / "config.json", quantization_config=stored)


def method(folder, **changes):
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_json(folder / "config.json", quantization_config=stored | changes)


ABSMAX, OFFSET = UP.replace("weight", "absmax"), UP.replace("weight", "absmax_offset")
LEVELS = UP.replace("weight", "levels")
ENCODED_FAULTS = {
    "another method": ("nf4", lambda f: method(f, quant_method="awq"), "quantized by 'awq'"),
    "no layers": ("nf4", lambda f: method(f, layers=["a"]), "a layout that qlite does not read"),
    "text": ("nf4", lambda f: edit_json(f / "config.json", quantization_config="nf4"), "quantized by 'nf4'"),
    "a layer that is not there": ("nf4", lambda f: layers(f, "transformer.h.9.mlp"), "transformer.h.9.mlp, which is no linear"),
    "a norm": ("nf4", lambda f: layers(f, "transformer.ln_f"), r"transformer\.ln_f, which is no linear layer"),
    "another format": ("nf4", lambda f: layers(f, format="nf5"), "dense_h_to_4h: bad options"),
    "no format": ("nf4", lambda f: layers(f, format=None), "unknown format"),
    "a format that is a list": ("nf4", lambda f: layers(f, format=["nf4"]), "bad options"),
    "a block size that is not one": ("nf4", lambda f: layers(f, block_size=48), "bad options"),
    "a block size that is text": ("nf4", lambda f: layers(f, block_size="64"), "bad options"),
    "an option too many": ("nf4", lambda f: layers(f, shape=[1]), "unknown format"),
    "another block size": (
        "nf4",
        lambda f: layers(f, block_size=32),
        r"absmax has shape \(192, 1\), the config wants \(192, 2",
    ),
    "no double quantization": ("nf4", lambda f: layers(f, double_quant=False), "absmax is U8, wanted torch.float32"),
    "eight bits": (
        "nf4",
        lambda f: layers(f, format="int8", block_size=None, double_quant=None),
        r"weight has shape \(192, 24",
    ),
    "dense": ("nf4", lambda f: method(f, layers={}), r"weight has shape \(192, 24\), the config wants \(192, 48\)"),
    "a custom table of none": ("custom", lambda f: layers(f, levels=None), "bad options"),
    "a custom table of text": ("custom", lambda f: layers(f, levels=["a"] * 16), "bad options"),
    "a custom table beyond 1": ("custom", lambda f: layers(f, levels=[2.0, *TABLE[1:]]), "bad options"),
    "codes of another shape": ("nf4", lambda f: edit_tensors(f, **{UP: torch.zeros(192, 48).byte()}), r"has shape \(192, 48"),
    "codes with a sign": ("nf4", lambda f: edit_tensors(f, **{UP: torch.zeros(192, 24).char()}), "is I8, wanted torch.uint8"),
    "codes without a sign": (
        "int8",
        lambda f: edit_tensors(f, **{UP: torch.zeros(192, 48).byte()}),
        "is U8, wanted torch.int8",
    ),
    "half a scale": ("int8", lambda f: edit_tensors(f, **{ABSMAX: torch.ones(192, 1).half()}), "is F16, wanted torch.float32"),
    "double a scale": ("nf4", lambda f: edit_tensors(f, **{OFFSET: torch.ones(1).double()}), "is F64, wanted torch.float32"),
    "a scale for all": ("int8", lambda f: edit_tensors(f, **{ABSMAX: torch.ones(1, 1)}), r"has shape \(1, 1\)"),
    "no scale": ("int8", lambda f: edit_tensors(f, **{ABSMAX: None}), "absmax is missing"),
    "a short table": ("nf4", lambda f: edit_tensors(f, **{LEVELS: torch.ones(15)}), r"levels has shape \(15,\)"),
}


@pytest.mark.parametrize(("base", "damage", "words"), ENCODED_FAULTS.values(), ids=ENCODED_FAULTS)
def test_a_damaged_encoded_checkpoint_is_refused_before_a_tensor_is_read(base, damage, words, copied, monkeypatch):
    check_refusal_before_a_tensor_is_read(copied(base), damage, ValueError, words, monkeypatch)


@pytest.mark.parametrize(
    ("base", "name", "value", "words"),
    [
        ("nf4", OFFSET, torch.tensor([float("nan")]), "absmax_offset holds a non-finite value"),
        ("int8", ABSMAX, torch.full((192, 1), float("inf")), "absmax holds a non-finite value"),
        ("nf4", LEVELS, torch.tensor(TABLE), r"levels is not the table of levels that config\.json says"),
        ("custom", LEVELS, torch.tensor(TABLE).flip(0), r"levels is not the table of levels that config\.json says"),
    ],
)
def test_scales_and_tables_that_cannot_be_right_are_refused_by_name(base, name, value, words, copied):
    folder = copied(base)
    edit_tensors(folder, **{name: value})
    with pytest.raises(ValueError, match=rf"{name.rpartition('__')[0].replace('__', '.')}\.{words}"):
        qlite.load_falcon(folder)


@pytest.mark.parametrize("base", ["nf4", "int8"])
@kinds
def test_encoding_an_encoded_checkpoint_is_an_error(base, kind, bases, monkeypatch):
    monkeypatch.setattr(hub_names, "read_tensor", refuse)
    with pytest.raises(ValueError, match="is quantized already; load it with quantize=None"):
        qlite.load_falcon(bases / base, quantize=kind)


def test_a_config_that_says_it_is_not_quantized_is_dense(copied):
    folder = copied("single")
    edit_json(folder / "config.json", quantization_config=None)
    assert len(qlite.load_falcon(folder, quantize=qlite.Linear4bit).load_report.encoded) == 8


@pytest.mark.parametrize(("gpus", "device"), [(0, "cuda"), (0, "cuda:0"), (1, "cuda:1"), (2, torch.device("cuda", 2))])
def test_a_gpu_that_is_not_there_is_an_error_before_any_work(gpus, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(checkpoint, "resolve_folder", refuse)
    with pytest.raises(ValueError, match=rf"this machine has {gpus} CUDA GPUs; 'cpu' goes without"):
        qlite.load_falcon("absent", device=device)


@pytest.mark.parametrize("device", ["gpu", "cuda:-1", "cuda:x", ""])
def test_a_device_that_does_not_exist_is_an_error_before_any_work(device, monkeypatch):
    monkeypatch.setattr(checkpoint, "resolve_folder", refuse)
    with pytest.raises(ValueError, match=f"device '{device}': "):
        qlite.load_falcon("absent", device=device)


def test_a_gpu_without_a_number_is_the_first_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [checkpoint.check_device(name) for name in ("cuda", "cuda:1", "cpu")] == [
        torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu"),
    ]  # fmt: skip


def test_a_module_that_is_no_falcon_loads_from_any_safetensors(tmp_path):
    tensors = {"0.weight": torch.randn(8, 64), "0.bias": torch.randn(8), "2.weight": torch.randn(2, 8)}
    save_file(tensors, tmp_path / SINGLE)
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2, bias=False))
    qlite.quantize_model(model, qlite.Linear8bit, skip=["2"])
    report = qlite.load_checkpoint(model, tmp_path)
    assert torch.equal(model[0].weight, qlite.quantize_int8(tensors["0.weight"]).codes)
    assert set(report.encoded) == {"0"} and set(report.dense) == {"2.weight"}

"""Checkpoints: safetensors in the hub's layout to a model and back, one tensor at a time.

Every name, shape and dtype is checked against the files' headers before the first tensor is read. A dense weight goes to
the device and is encoded there before the next is read, so a load needs the encoded model plus one dense tensor, on the
host and on the GPU. Files are read, not mapped: mapped pages count as memory, and a file that changes under a map kills the
process.

Not done here: pickle (`.bin`, `.pt`) of any kind; bitsandbytes' quantized layout.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qlite.falcon import Falcon, FalconConfig
from qlite.linear import Linear4bit, Linear8bit, QuantizedLinear, quantize_model
from qlite.nf4 import FP4_LEVELS, NF4_LEVELS

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {**FLOATS, "U8": torch.uint8, "I8": torch.int8}
LARGEST_HEADER = 16 * 2**20  # bytes; Falcon-180B's is under 100 kB
#: Tensors in old checkpoints that hold nothing a model needs.
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq|.*\.self_attention\.(masked_)?bias")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored, and as what: from a header, before its bytes are read."""

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did; `print` it.

    Attributes:
        encoded: name -> bytes of each linear layer held in encoded form. dense: name -> bytes of every other tensor.
        fingerprint: of the source, see `load_checkpoint`.
    """

    encoded: dict[str, int]
    dense: dict[str, int]
    fingerprint: str

    def __str__(self) -> str:
        encoded, dense = sum(self.encoded.values()), sum(self.dense.values())
        return (
            f"loaded {len(self.encoded)} encoded linear layers ({encoded / 1e6:,.1f} MB) and "
            f"{len(self.dense)} dense tensors ({dense / 1e6:,.1f} MB)"
        )


def check_device(device: torch.device | str) -> torch.device:
    """Returns the device, a GPU with its index; ValueError where it does not exist here: nothing moves to the CPU in silence."""
    device = torch.device(device)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"device {str(device)!r}: this machine has {count} CUDA GPUs; use device='cpu' to go without")
        return torch.device("cuda", device.index or 0)
    return device


def resolve_folder(path_or_repo_id: str | pathlib.Path, *, revision: str | None = None) -> pathlib.Path:
    """Returns the local folder of a path, or of a hub repository after downloading its json and safetensors files.

    Args:
        path_or_repo_id: an existing folder, or "owner/name" on the hub. revision: branch, tag or commit.

    Raises:
        FileNotFoundError: neither a folder nor of the form owner/name.
    """
    folder = pathlib.Path(path_or_repo_id)
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w\-]+/[\w.\-]+", str(path_or_repo_id)) or ".." in str(path_or_repo_id):
        raise FileNotFoundError(f"{path_or_repo_id} is neither a folder nor a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors"]
    return pathlib.Path(snapshot_download(str(path_or_repo_id), revision=revision, allow_patterns=patterns))


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file; FileNotFoundError without the file, ValueError where it is something else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    try:
        content = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}; wanted an object")
    return content


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return result


def read_header(path: pathlib.Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file by name, from its header.

    Raises:
        FileNotFoundError: no such file. ValueError: truncated, or not safetensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it is part of the checkpoint")
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > LARGEST_HEADER:
            raise ValueError(f"{path}: not safetensors, or truncated (header of {length:,} bytes)")
        header = file.read(length)
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_no_duplicates)
        entries.pop("__metadata__", None)
        stored = {n: StoredTensor(path, e["dtype"], tuple(e["shape"])) for n, e in entries.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged or truncated header ({error})") from error
    if path.stat().st_size != end:
        raise ValueError(f"{path}: truncated or damaged: {path.stat().st_size:,} bytes, its header says {end:,}")
    return stored


def stored_tensors(folder: pathlib.Path) -> dict[str, StoredTensor]:
    """Returns all tensors of a checkpoint folder by name, single file or sharded.

    Raises:
        FileNotFoundError: no safetensors there, or a shard that the index names is missing.
        ValueError: a damaged file or index, a shard outside the folder, or a tensor that is not where the index says.
    """
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX}: has no weight_map")
        for shard in set(weight_map.values()):
            if not isinstance(shard, str) or not re.fullmatch(r"[\w.\-]+\.safetensors", shard):
                raise ValueError(f"{folder / INDEX}: {shard!r} is not the name of a safetensors file in the folder")
        headers = {shard: read_header(folder / shard) for shard in sorted(set(weight_map.values()))}
        for name, shard in weight_map.items():
            if name not in headers[shard]:
                raise ValueError(f"{folder / INDEX}: says that {name} is in {shard}, which does not hold it")
        return {name: headers[shard][name] for name, shard in weight_map.items()}
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern)]
    if pickles:
        raise FileNotFoundError(
            f"{folder} has no safetensors, only {pickles[0]}: pickle files can run code and are never loaded; convert them"
        )
    raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}")


def _tensors_in_order(stored: dict[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields each tensor on the CPU, file by file in the order of the bytes; only one is held at a time."""
    files = sorted({entry.file for entry in stored.values()})
    for path in files:
        try:
            with safe_open(path, framework="pt", backend="pread") as file:
                for name in file.offset_keys():
                    if name in stored and stored[name].file == path:
                        yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged or truncated ({error})") from error


def _check_finite(name: str, tensor: Tensor, source: str) -> None:
    if tensor.numel():
        low, high = torch.aminmax(tensor)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ValueError(f"{source}: {name} holds a non-finite value; the checkpoint is damaged, or overflows its dtype")


@dataclasses.dataclass(frozen=True)
class _Target:
    """What becomes of a stored tensor: set as `owner.attribute`, or encoded into `owner`."""

    owner: nn.Module
    attribute: str
    encode: bool


def _plan(model: nn.Module, stored: dict[str, StoredTensor], where: str) -> dict[str, _Target]:
    """Returns what becomes of each stored tensor; ValueError for a missing, an unexpected or a misshapen one."""
    plan: dict[str, _Target] = {}
    problems: list[str] = []
    first_name: dict[int, str] = {}
    tied: set[str] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        if first_name.setdefault(id(tensor), name) != name:
            tied.add(name)
            continue
        entry = stored.get(name)
        encode = isinstance(owner, QuantizedLinear) and attribute == "weight" and entry is not None
        encode = encode and entry is not None and entry.dtype in FLOATS
        if isinstance(owner, QuantizedLinear) and attribute not in ("weight", "bias"):
            source = stored.get(f"{path}.weight")
            if source is not None and source.dtype in FLOATS:
                continue  # this part of an encoded weight comes from encoding the dense one
        if entry is None:
            problems.append(f"{name} is missing")
            continue
        shape = (owner.out_features, owner.in_features) if encode else tuple(tensor.shape)  # type: ignore[union-attr]
        floats = tensor.is_floating_point() or encode
        if entry.shape != shape:
            problems.append(f"{name} has shape {entry.shape}, the config wants {shape}")
        elif (entry.dtype not in FLOATS) if floats else (DTYPES.get(entry.dtype) != tensor.dtype):
            problems.append(f"{name} is {entry.dtype}, wanted {'a float' if floats else tensor.dtype}")
        plan[name] = _Target(owner, attribute, bool(encode))
    for name, entry in stored.items():
        if name not in plan and name not in tied and not IGNORED.fullmatch(name):
            problems.append(f"{name} {entry.shape} is not part of this model")
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(f"{where}: does not fit the model: {'; '.join(problems[:6])}{more}")
    return plan


def _encoded_float(owner: nn.Module, attribute: str) -> bool:
    """Whether a float is a scale of an encoded weight, which stays float32 whatever the model computes in."""
    return isinstance(owner, QuantizedLinear) and attribute != "bias"


def load_checkpoint(
    model: nn.Module, folder: str | pathlib.Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> LoadReport:
    """Returns a report, having filled the model (on meta, or anywhere) from a checkpoint folder, in place.

    Sets `model.base_fingerprint`: SHA-256 over name, shape and first 256 bytes of every tensor of the source files, which
    an adapter keeps to know its base. A checkpoint that qlite quantized keeps the fingerprint of the dense one.

    Args:
        model: its parameter names are those of the files; its QuantizedLinear layers take dense weights (and encode
            them on the device) or encoded ones.
        folder: config.json and safetensors, single file or sharded with an index.
        device: where the tensors go. dtype: of the dense ones; default: as stored.

    Raises:
        FileNotFoundError: a file is missing. ValueError: anything that does not fit, or a non-finite value (the tensor is
            named); nothing of the model was changed if it was found in a header.

    Example:
        >>> from qlite.data import ASSETS
        >>> config = qlite.FalconConfig.from_dict(json.loads((ASSETS / "tiny-falcon/config.json").read_text()))
        >>> model = qlite.Falcon(config, device="meta")
        >>> report = qlite.load_checkpoint(model, ASSETS / "tiny-falcon")
    """
    folder, device = pathlib.Path(folder), check_device(device)
    stored = stored_tensors(folder)
    plan = _plan(model, stored, str(folder))
    digest = hashlib.sha256()
    prints: dict[str, bytes] = {}
    report = LoadReport({}, {}, "")
    for name, tensor in _tensors_in_order(stored):
        prints[name] = _print(name, tensor)
        target = plan.get(name)
        if target is None:
            continue
        tensor = tensor.to(device)
        owner, attribute = target.owner, target.attribute
        if tensor.is_floating_point():
            _check_finite(name, tensor, str(folder))
            if dtype is not None and not target.encode and not _encoded_float(owner, attribute):
                tensor = tensor.to(dtype)
                _check_finite(name, tensor, f"{folder}, as {dtype}")
        if target.encode:
            assert isinstance(owner, QuantizedLinear)
            owner.quantize_(tensor)
        else:
            _assign(owner, attribute, tensor)
        path = name.rpartition(".")[0]
        if isinstance(owner, QuantizedLinear) and attribute != "bias":
            report.encoded[path] = owner.encoded_bytes()
        else:
            report.dense[name] = tensor.numel() * tensor.element_size()
        del tensor
    if isinstance(model, Falcon):
        model.tie_weights()
    left = [name for name, tensor in model.state_dict().items() if tensor.device.type == "meta"]
    assert not left, left
    for name in sorted(prints):
        digest.update(prints[name])
    fingerprint = digest.hexdigest()
    if (folder / "config.json").is_file():
        kept = read_json(folder / "config.json").get("quantization_config")
        if isinstance(kept, dict) and isinstance(kept.get("base_fingerprint"), str):
            fingerprint = kept["base_fingerprint"]
    model.base_fingerprint = fingerprint  # type: ignore[assignment]
    return dataclasses.replace(report, fingerprint=fingerprint)


def _print(name: str, tensor: Tensor) -> bytes:
    start = tensor.reshape(-1)[: 256 // tensor.element_size()].view(torch.uint8)
    return name.encode() + str(tuple(tensor.shape)).encode() + bytes(start.tolist())


def _assign(owner: nn.Module, attribute: str, tensor: Tensor) -> None:
    present = getattr(owner, attribute)
    if isinstance(present, nn.Parameter):
        setattr(owner, attribute, nn.Parameter(tensor, requires_grad=present.requires_grad))
    else:
        setattr(owner, attribute, tensor)


def _kind_of(options: Any, where: str) -> Callable[..., QuantizedLinear]:
    """Returns the constructor that a layer's stored options describe."""
    if isinstance(options, dict):
        rest = {key: value for key, value in options.items() if key != "format"}
        if options.get("format") == "int8" and not rest:
            return Linear8bit
        levels = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS, "custom4": rest.pop("levels", None)}.get(options.get("format", ""))
        if levels is not None and set(rest) == {"block_size", "double_quant"}:
            return functools.partial(Linear4bit, levels=tuple(levels), **rest)
    raise ValueError(f"{where}: unknown format of an encoded layer: {options!r}")


def _apply_quantization_config(model: nn.Module, stored: dict[str, Any], where: str) -> None:
    """Puts empty encoded layers where a checkpoint of qlite's has them."""
    if stored.get("quant_method") != "qlite" or not isinstance(stored.get("layers"), dict):
        raise ValueError(f"{where}: quantized by {stored.get('quant_method')!r}, a layout that qlite does not read")
    for name, options in stored["layers"].items():
        linear = dict(model.named_modules()).get(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{where}: quantization_config names {name}, which is no linear layer of the model")
        kind = _kind_of(options, where)
        has_bias, dtype = linear.bias is not None, linear.weight.dtype
        layer = kind(linear.in_features, linear.out_features, bias=has_bias, device="meta", dtype=dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def load_falcon(
    path_or_repo_id: str | pathlib.Path,
    *,
    quantize: Callable[..., QuantizedLinear] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    revision: str | None = None,
) -> Falcon:
    """Returns a Falcon in evaluation mode, its linears encoded as `quantize` says, from a folder or the hub.

    A folder that `save_checkpoint` wrote from an encoded model loads as it is, without encoding again. The model carries
    `load_report` (print it), `base_fingerprint` and `base_id`.

    Args:
        path_or_repo_id: a folder with config.json and safetensors, or a hub id such as "tiiuae/falcon-7b".
        quantize: qlite.Linear4bit, qlite.Linear8bit or a functools.partial of one; None: dense.
        device: "cpu", "cuda", ... dtype: what it computes in. revision: branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: no such folder or file. ValueError: no Falcon, a checkpoint that does not fit its config, a
            non-finite weight, no such device, or `quantize` for a checkpoint that is encoded already.

    Example:
        >>> from qlite.data import ASSETS
        >>> model = qlite.load_falcon(ASSETS / "tiny-falcon", quantize=qlite.Linear4bit)
    """
    device = check_device(device)
    folder = resolve_folder(path_or_repo_id, revision=revision)
    values = read_json(folder / "config.json")
    model = Falcon(FalconConfig.from_dict(values), device="meta", dtype=dtype)
    if "quantization_config" in values:
        if quantize is not None:
            raise ValueError(f"{folder}: is quantized already; load it with quantize=None")
        _apply_quantization_config(model, values["quantization_config"], str(folder / "config.json"))
    if quantize is not None:
        quantize_model(model, quantize)
    model.load_report = load_checkpoint(model, folder, device=device, dtype=dtype)  # type: ignore[assignment]
    model.base_id = str(path_or_repo_id)  # type: ignore[assignment]
    return model.eval()


def save_checkpoint(
    model: Falcon,
    folder: str | pathlib.Path,
    *,
    tokenizer_json: str | pathlib.Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model, dense or encoded, as a checkpoint folder that `load_falcon` reads.

    The folder appears whole, by renaming: an interrupted save leaves nothing under its name.

    Args:
        model: a Falcon without adapters. folder: must not exist, or be empty.
        tokenizer_json: a file to put beside it. max_shard_bytes: a larger model is cut into several files.

    Raises:
        ValueError: the model carries adapters. FileExistsError: the folder holds something.

    Example:
        >>> qlite.save_checkpoint(model, "falcon-nf4")  # doctest: +SKIP
    """
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"save_checkpoint: {folder} holds something already; choose another folder")
    state = model.state_dict(keep_vars=True)
    if any(".lora_" in name for name in state):
        raise ValueError("save_checkpoint: the model carries adapters; use save_adapter, or merge_adapter first")
    unique: dict[int, str] = {}
    for name, tensor in state.items():
        unique.setdefault(id(tensor), name)
    tensors = {name: state[name].detach() for name in unique.values()}
    values = model.config.to_dict()
    values["dtype"] = str(model.transformer.word_embeddings.weight.dtype).removeprefix("torch.")
    layers = {name: m.config() for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    if layers:
        fingerprint = getattr(model, "base_fingerprint", None)
        values["quantization_config"] = {"quant_method": "qlite", "base_fingerprint": fingerprint, "layers": layers}
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_shards(tensors, temporary, max_shard_bytes)
        (temporary / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        if tokenizer_json is not None:
            shutil.copyfile(tokenizer_json, temporary / "tokenizer.json")
        for path in temporary.iterdir():
            path.chmod(0o644)
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_shards(tensors: dict[str, Tensor], folder: pathlib.Path, max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    metadata = {"format": "pt"}
    if len(shards) == 1:
        save_file({name: t.contiguous().cpu() for name, t in shards[0].items()}, folder / SINGLE, metadata=metadata)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: t.contiguous().cpu() for name, t in shard.items()}, folder / file, metadata=metadata)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(math.prod(t.shape) * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")

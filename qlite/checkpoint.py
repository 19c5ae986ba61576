"""Checkpoints: safetensors in the hub's layout to a model and back, one tensor at a time.

Every name, shape and dtype is checked against the files' headers before the first tensor is read. A dense weight goes
to the device and is encoded there before the next is read, so a load needs the encoded model plus one dense tensor, on
the host and on the GPU. Files are read, not mapped: mapped pages count as memory, and a file that changes under a map
kills the process.

Not done here: pickle (`.bin`, `.pt`) of any kind; bitsandbytes' quantized layout.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qlite.download import commit_of, resolve_folder
from qlite.falcon import Falcon, FalconConfig
from qlite.linear import Linear4bit, Linear8bit, QuantizedLinear
from qlite.nf4 import FP4_LEVELS, NF4_LEVELS
from qlite.ops import levels_tensor
from qlite.quantize import quantize_model
from qlite.storage import (
    DTYPES,
    FLOATS,
    StoredTensor,
    read_bytes,
    read_header,
    read_json,
    read_tensor,
    same_bytes,
    sync,
)

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PRINTED_BYTES = 256  # of each tensor, in the fingerprint
#: Tensors in old checkpoints that hold nothing a model needs.
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq|.*\.self_attention\.(masked_)?bias")


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did; `print` it.

    Attributes:
        encoded: name -> bytes of each linear layer held in encoded form. dense: name -> bytes of every other tensor.
        fingerprint: of the source, see `load_checkpoint`.
        left: name -> why a linear layer was not encoded, where `load_falcon` was asked to encode.
    """

    encoded: dict[str, int]
    dense: dict[str, int]
    fingerprint: str
    left: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        encoded, dense = sum(self.encoded.values()), sum(self.dense.values())
        text = (
            f"loaded {len(self.encoded)} encoded linear layers ({encoded / 1e6:,.1f} MB) and "
            f"{len(self.dense)} dense tensors ({dense / 1e6:,.1f} MB)"
        )
        return text + "".join(f"; {name} left dense: {reason}" for name, reason in self.left.items())


def check_device(device: torch.device | str) -> torch.device:
    """Returns the device, a GPU with its index; ValueError where there is none: nothing moves to the CPU in silence."""
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"device {str(device)!r}: this machine has {count} CUDA GPUs; 'cpu' goes without")
        return torch.device("cuda", device.index or 0)
    return device


def fingerprint(stored: dict[str, StoredTensor]) -> str:
    """Returns SHA-256, in hex, over name, shape and first 256 bytes of every tensor, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(stored.items()):
        start = read_bytes(tensor, 0, min(PRINTED_BYTES, tensor.size))
        digest.update(name.encode() + str(tensor.shape).encode() + bytes(start.tolist()))
    return digest.hexdigest()


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
        for shard in weight_map.values():
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
            f"{folder} has no safetensors, only {pickles[0]}: pickle files can run code and are never loaded; "
            "save the model as safetensors"
        )
    raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}")


def _check_finite(name: str, tensor: Tensor, dtype: torch.dtype, source: str) -> None:
    """ValueError unless every value is finite, and stays so in `dtype`."""
    if tensor.numel():
        ends = torch.stack(torch.aminmax(tensor))
        if not bool(torch.isfinite(ends).all()):
            raise ValueError(f"{source}: {name} holds a non-finite value; the checkpoint is damaged")
        if not bool(torch.isfinite(ends.to(dtype)).all()):
            largest = ends.abs().max().item()
            raise ValueError(f"{source}: {name} becomes non-finite in {dtype}: it reaches {largest:.6g}")


@dataclasses.dataclass(frozen=True)
class _Target:
    """What becomes of a stored tensor: set as `owner.attribute`, or encoded into `owner`."""

    owner: nn.Module
    attribute: str
    encode: bool


def _plan(model: nn.Module, stored: dict[str, StoredTensor], where: str) -> tuple[dict[str, _Target], dict[str, str]]:
    """Returns what becomes of each stored tensor, and name -> earlier name of each parameter that the model has twice.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape or kind; or stored twice with different values.
    """
    plan: dict[str, _Target] = {}
    problems: list[str] = []
    first_name: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        if first_name.setdefault(id(tensor), name) != name:
            tied[name] = first_name[id(tensor)]
            continue
        entry = stored.get(name)
        encode = isinstance(owner, QuantizedLinear) and attribute == "weight" and entry is not None and entry.dtype in FLOATS
        if isinstance(owner, QuantizedLinear) and attribute not in ("weight", "bias"):
            source = stored.get(f"{path}.weight")
            if source is not None and source.dtype in FLOATS:
                continue  # this part of an encoded weight comes from encoding the dense one
        if entry is None:
            problems.append(f"{name} is missing")
            continue
        shape = (owner.out_features, owner.in_features) if encode else tuple(tensor.shape)  # type: ignore[union-attr]
        # Scales are used as they are stored; other floats are cast.
        exact = isinstance(owner, QuantizedLinear) and attribute not in ("weight", "bias")
        floats = (tensor.is_floating_point() and not exact) or encode
        if entry.shape != shape:
            problems.append(f"{name} has shape {entry.shape}, the config wants {shape}")
        elif (entry.dtype not in FLOATS) if floats else (DTYPES.get(entry.dtype) != tensor.dtype):
            problems.append(f"{name} is {entry.dtype}, wanted {'a float' if floats else tensor.dtype}")
        plan[name] = _Target(owner, attribute, encode)
    for name, entry in stored.items():
        if name not in plan and name not in tied and not IGNORED.fullmatch(name):
            problems.append(f"{name} {entry.shape} is not part of this model")
    for name, first in tied.items():
        # Published checkpoints store a tied head once or twice; twice and different is another model than the config's.
        if not problems and name in stored and not same_bytes(stored[name], stored[first]):
            problems.append(f"{name} differs from {first}, which the config ties to it")
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(f"{where}: does not fit the model: {'; '.join(problems[:6])}{more}")
    return plan, tied


def load_checkpoint(
    model: nn.Module,
    folder: str | pathlib.Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LoadReport:
    """Returns a report, having filled the model (on meta, or anywhere) from a checkpoint folder, in place.

    Sets `model.base_fingerprint`: SHA-256 over name, shape and first 256 bytes of every tensor of the source files,
    which an adapter keeps to know its base. A checkpoint that qlite quantized keeps the fingerprint of the dense one.

    Args:
        model: its parameter names are those of the files; its QuantizedLinear layers take dense weights (and encode
            them on the device) or encoded ones.
        folder: config.json and safetensors, single file or sharded with an index.
        device: where the tensors go. dtype: of the dense ones; default: as stored.

    Raises:
        FileNotFoundError: a file is missing. ValueError: anything that does not fit, or a value that is not finite or
            would not be in `dtype` (the tensor is named). What headers tell is found before the model is changed.

    Example:
        >>> from qlite.data import ASSETS
        >>> config = qlite.FalconConfig.from_dict(json.loads((ASSETS / "tiny-falcon/config.json").read_text()))
        >>> model = qlite.Falcon(config, device="meta")
        >>> report = qlite.load_checkpoint(model, ASSETS / "tiny-falcon")
    """
    folder, device = pathlib.Path(folder), check_device(device)
    stored = stored_tensors(folder)
    plan, tied = _plan(model, stored, str(folder))
    report = LoadReport({}, {}, _source_fingerprint(folder, stored))
    for name in sorted(plan, key=lambda name: (stored[name].file, stored[name].start)):
        target = plan[name]
        owner, attribute = target.owner, target.attribute
        tensor = read_tensor(stored[name], device=device)
        scale = isinstance(owner, QuantizedLinear) and attribute not in ("weight", "bias")
        if tensor.is_floating_point():
            _check_finite(name, tensor, tensor.dtype if scale or dtype is None else dtype, str(folder))
        if target.encode:
            assert isinstance(owner, QuantizedLinear)
            owner.quantize_(tensor)
        else:
            if scale:
                _check_levels(name, owner, attribute, tensor, str(folder))
            elif dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            _assign(owner, attribute, tensor)
        if isinstance(owner, QuantizedLinear):
            report.encoded[name.rpartition(".")[0]] = owner.encoded_bytes()
        else:
            report.dense[name] = tensor.numel() * tensor.element_size()
        del tensor
    for name, first in tied.items():
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, model.get_parameter(first))
    left = [name for name, tensor in model.state_dict().items() if tensor.device.type == "meta"]
    assert not left, left
    model.base_fingerprint = report.fingerprint  # type: ignore[assignment]
    return report


def _source_fingerprint(folder: pathlib.Path, stored: dict[str, StoredTensor]) -> str:
    """Returns the fingerprint of the dense checkpoint: the one an encoded checkpoint keeps, or that of the files."""
    if (folder / "config.json").is_file():
        kept = read_json(folder / "config.json").get("quantization_config")
        if isinstance(kept, dict) and isinstance(kept.get("base_fingerprint"), str):
            return kept["base_fingerprint"]
    return fingerprint(stored)


def _check_levels(name: str, owner: nn.Module, attribute: str, tensor: Tensor, source: str) -> None:
    """ValueError where a file's table of levels is not the one that its config names."""
    if attribute != "levels" or not isinstance(owner, Linear4bit):
        return
    if not torch.equal(tensor.cpu(), levels_tensor(_levels(owner.config()), "cpu")):
        raise ValueError(f"{source}: {name} is not the table of levels that config.json says")


def _assign(owner: nn.Module, attribute: str, tensor: Tensor) -> None:
    present = getattr(owner, attribute)
    if isinstance(present, nn.Parameter):
        setattr(owner, attribute, nn.Parameter(tensor, requires_grad=present.requires_grad))
    else:
        setattr(owner, attribute, tensor)


def _levels(options: dict[str, Any]) -> tuple[float, ...]:
    """Returns the table of levels of a layer's options; KeyError for a format that has none."""
    return {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS, "custom4": tuple(options.get("levels", ()))}[options["format"]]


def _encoded_layer(linear: nn.Linear, options: Any) -> QuantizedLinear:
    """Returns the empty layer that stored options describe, of the size of a linear one; ValueError for bad options."""
    arguments = {"bias": linear.bias is not None, "device": "meta", "dtype": linear.weight.dtype}
    if options == {"format": "int8"}:
        return Linear8bit(linear.in_features, linear.out_features, **arguments)
    try:
        if options.keys() - {"levels"} == {"format", "block_size", "double_quant"}:
            arguments |= {"block_size": options["block_size"], "double_quant": bool(options["double_quant"])}
            return Linear4bit(linear.in_features, linear.out_features, levels=_levels(options), **arguments)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"bad options of an encoded layer: {options!r:.200} ({error})") from error
    raise ValueError(f"unknown format of an encoded layer: {options!r:.200}")


def _apply_quantization_config(model: nn.Module, stored: Any, where: str) -> None:
    """Puts empty encoded layers where a checkpoint of qlite's has them."""
    method = stored.get("quant_method") if isinstance(stored, dict) else stored
    if method != "qlite" or not isinstance(stored.get("layers"), dict):
        raise ValueError(f"{where}: quantized by {method!r:.50}, a layout that qlite does not read")
    modules = dict(model.named_modules())
    for name, options in stored["layers"].items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{where}: quantization_config names {name}, which is no linear layer of the model")
        try:
            layer = _encoded_layer(linear, options)
        except ValueError as error:
            raise ValueError(f"{where}: {name}: {error}") from error
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)


def _check_size(config: FalconConfig, stored: dict[str, StoredTensor], where: str) -> None:
    """ValueError where the files cannot hold what the config says: asked before a model of the config's size is built."""
    numbers = {int(match[1]) for match in (re.match(r"transformer\.h\.(\d{1,9})\.", name) for name in stored) if match}
    if config.num_hidden_layers != len(numbers):
        raise ValueError(f"{where}: has {len(numbers)} blocks, its config.json says {config.num_hidden_layers}")
    total = sum(entry.size for entry in stored.values())
    widest = max(config.vocab_size, config.ffn, config.hidden_size)
    if config.hidden_size * widest > 2 * total:  # a weight takes at least half a byte
        raise ValueError(f"{where}: holds {total:,} bytes, its config.json says {config.hidden_size} x {widest} weights")


def load_falcon(
    path_or_repo_id: str | pathlib.Path,
    *,
    quantize: Callable[..., QuantizedLinear] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    revision: str | None = None,
) -> Falcon:
    """Returns a Falcon in evaluation mode, its linears encoded as `quantize` says, from a folder or the hub.

    A folder that `save_checkpoint` wrote from an encoded model loads as it is, without encoding again. The model
    carries `load_report` (print it), `base_fingerprint`, `base_id` and, from the hub, the commit as `base_revision`.

    Args:
        path_or_repo_id: a folder with config.json and safetensors, or a hub id such as "tiiuae/falcon-7b".
        quantize: qlite.Linear4bit, qlite.Linear8bit or a functools.partial of one; None: dense.
        device: "cpu", "cuda", ... dtype: what it computes in. revision: branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: no such folder or file. ValueError: no Falcon, a checkpoint that does not fit its config, a
            non-finite weight, no such device, or `quantize` for a checkpoint that is encoded already. PermissionError,
            ConnectionError: of the hub, see docs/sharing.md.

    Example:
        >>> from qlite.data import ASSETS
        >>> model = qlite.load_falcon(ASSETS / "tiny-falcon", quantize=qlite.Linear4bit)
    """
    device = check_device(device)
    folder = resolve_folder(path_or_repo_id, revision=revision)
    values = read_json(folder / "config.json")
    try:
        config = FalconConfig.from_dict(values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    _check_size(config, stored_tensors(folder), str(folder))
    model = Falcon(config, device="meta", dtype=dtype)
    if values.get("quantization_config") is not None:
        if quantize is not None:
            raise ValueError(f"{folder}: is quantized already; load it with quantize=None")
        _apply_quantization_config(model, values["quantization_config"], str(folder / "config.json"))
    skipped = {} if quantize is None else quantize_model(model, quantize).skipped
    report = load_checkpoint(model, folder, device=device, dtype=dtype)
    left = {name: why for name, (_, why) in skipped.items() if isinstance(model.get_submodule(name), nn.Linear)}
    model.load_report = dataclasses.replace(report, left=left)  # type: ignore[assignment]
    model.base_id = str(path_or_repo_id)  # type: ignore[assignment]
    model.base_revision = commit_of(folder)  # type: ignore[assignment]
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
        FileNotFoundError: no tokenizer_json there.

    Example:
        >>> qlite.save_checkpoint(model, "falcon-nf4")  # doctest: +SKIP
    """
    folder = pathlib.Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"save_checkpoint: {folder} holds something already; choose another folder")
    state = model.state_dict(keep_vars=True)
    if any(".lora_" in name for name in state):
        raise ValueError("save_checkpoint: the model carries adapters; use save_adapter, or merge_adapter first")
    if tokenizer_json is not None and not pathlib.Path(tokenizer_json).is_file():
        raise FileNotFoundError(f"save_checkpoint: {tokenizer_json}: no such file")
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
            shutil.copymode(temporary / "config.json", path)  # safetensors makes files for their owner alone
            sync(path)
        sync(temporary)
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

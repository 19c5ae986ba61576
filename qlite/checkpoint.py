"""Checkpoints: safetensors in the hub's layout to a model, dense or encoded, one tensor at a time.

Every name, shape and dtype is checked against the files' headers before the first tensor is read. A dense weight goes
to the device and is encoded there before the next is read, so a load needs the encoded model plus one dense tensor, on
the host and on the GPU. Files are read, not mapped: mapped pages count as memory, and a file that changes under a map
kills the process.

Encoded weights are read as they are, in our own layout, which config.json names, and in that of bitsandbytes, which the
names of the tensors tell.

Not done here: pickle (`.bin`, `.pt`) of any kind; writing (saving.py); what bitsandbytes' tensors mean (bnb_layout.py).
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlite import bnb_layout
from qlite.download import commit_of, resolve_folder
from qlite.falcon import Falcon, FalconConfig
from qlite.head import quantize_head
from qlite.linear import Linear4bit, Linear8bit, QuantizedLinear
from qlite.nf4 import TABLES
from qlite.ops import levels_tensor
from qlite.quantize import quantize_model
from qlite.storage import (
    DTYPES,
    FLOATS,
    StoredTensor,
    fingerprint,
    read_json,
    read_tensor,
    same_bytes,
    stored_tensors,
)

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
class _Encoded:
    """A layer that the files hold encoded: itself, empty, and what bitsandbytes' layout says of it, where it is in that.

    Attributes:
        parts: of bitsandbytes' layout -> name of its tensor. layout: of four bits.
    """

    layer: QuantizedLinear
    parts: dict[str, str] = dataclasses.field(default_factory=dict)
    layout: bnb_layout.Layout4bit | None = None


@dataclasses.dataclass(frozen=True)
class _Target:
    """What becomes of a stored tensor: set as `owner.attribute`, or encoded into `owner`, or decoded with its other parts."""

    owner: nn.Module
    attribute: str
    encode: bool = False
    parts: _Encoded | None = None


def _state(model: nn.Module, layers: dict[str, _Encoded]) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yields name, owner, attribute and value of what the model holds once `layers` are in it."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, _, attribute = name.rpartition(".")
        if path not in layers:
            yield name, model.get_submodule(path), attribute, tensor
    for path, encoded in layers.items():
        for attribute, tensor in encoded.layer.state_dict(keep_vars=True).items():
            yield f"{path}.{attribute}", encoded.layer, attribute, tensor


def _plan(
    model: nn.Module, stored: dict[str, StoredTensor], layers: dict[str, _Encoded], where: str
) -> tuple[dict[str, _Target], dict[str, str]]:
    """Returns what becomes of each stored tensor, and name -> earlier name of each parameter that the model has twice.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape or kind; or stored twice with different values.
    """
    plan: dict[str, _Target] = {}
    problems: list[str] = []
    first_name: dict[int, str] = {}
    tied: dict[str, str] = {}
    claimed = {name for encoded in layers.values() for name in encoded.parts.values()}
    for name, owner, attribute, tensor in _state(model, layers):
        path = name.rpartition(".")[0]
        if first_name.setdefault(id(tensor), name) != name:
            tied[name] = first_name[id(tensor)]
            continue
        if path in layers and layers[path].parts and attribute != "bias":
            if attribute == "weight":
                plan[name] = _Target(owner, attribute, parts=layers[path])
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
        if encode and owner.transposed:  # type: ignore[union-attr]
            shape = shape[::-1]
        # Scales are used as they are stored; other floats are cast.
        exact = isinstance(owner, QuantizedLinear) and attribute not in ("weight", "bias")
        floats = (tensor.is_floating_point() and not exact) or encode
        if entry.shape != shape:
            problems.append(f"{name} has shape {entry.shape}, the config wants {shape}")
        elif (entry.dtype not in FLOATS) if floats else (DTYPES.get(entry.dtype) != tensor.dtype):
            problems.append(f"{name} is {entry.dtype}, wanted {'a float' if floats else tensor.dtype}")
        plan[name] = _Target(owner, attribute, encode)
    for name, entry in stored.items():
        if name not in plan and name not in tied and name not in claimed and not IGNORED.fullmatch(name):
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

    Where the folder holds a linear layer encoded, in qlite's layout or in bitsandbytes', a Linear4bit or Linear8bit takes
    the layer's place, and nothing is encoded again.

    Sets `model.base_fingerprint`: SHA-256 over name, shape and first 256 bytes of every tensor of the source files,
    which an adapter keeps to know its base. A checkpoint that qlite quantized keeps the fingerprint of the dense one.

    Args:
        model: its parameter names are those of the files; its QuantizedLinear layers take dense weights (and encode
            them on the device) or encoded ones.
        folder: config.json and safetensors, single file or sharded with an index.
        device: where the tensors go. dtype: of the dense ones, and of what encoded ones decode to; default: as stored.

    Raises:
        FileNotFoundError: a file is missing. ValueError: anything that does not fit, or a value that is not finite or
            would not be in `dtype` (the tensor is named); a quantization of another method; a buffer on meta that no
            checkpoint holds. What headers tell is found before the model is changed.

    Example:
        >>> from qlite.data import ASSETS
        >>> config = qlite.FalconConfig.from_dict(json.loads((ASSETS / "tiny-falcon/config.json").read_text()))
        >>> model = qlite.Falcon(config, device="meta")
        >>> report = qlite.load_checkpoint(model, ASSETS / "tiny-falcon")
    """
    folder, device = pathlib.Path(folder), check_device(device)
    kept = model.state_dict()
    for name, buffer in model.named_buffers():
        if buffer.device.type == "meta" and name not in kept:
            raise ValueError(f"load_checkpoint: {name} is on meta, and no checkpoint holds it; have the model make it first")
    stored = stored_tensors(folder)
    layers = _encoded_layers(model, folder, stored, dtype)
    plan, tied = _plan(model, stored, layers, str(folder))
    for name, encoded in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, encoded.layer)
    report = LoadReport({}, {}, _source_fingerprint(folder, stored))
    for name in sorted(plan, key=lambda name: (stored[name].file, stored[name].start)):
        target = plan[name]
        owner, attribute = target.owner, target.attribute
        if target.parts is not None:
            _read_parts(target.parts, stored, device, str(folder))
            report.encoded[name.rpartition(".")[0]] = target.parts.layer.encoded_bytes()
            continue
        tensor = read_tensor(stored[name], device=device)
        scale = isinstance(owner, QuantizedLinear) and attribute not in ("weight", "bias")
        if tensor.is_floating_point():
            _check_finite(name, tensor, tensor.dtype if scale or dtype is None else dtype, str(folder))
        if target.encode:
            assert isinstance(owner, QuantizedLinear)
            owner.quantize_(tensor.T if owner.transposed else tensor)
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
    return {**TABLES, "custom4": tuple(options.get("levels", ()))}[options["format"]]


def _encoded_layer(linear: nn.Linear | QuantizedLinear, options: Any) -> QuantizedLinear:
    """Returns the empty layer that stored options describe, of the size of a linear one; ValueError for bad options."""
    arguments = {"bias": linear.bias is not None, "device": "meta", "dtype": _dtype_of(linear)}
    if options == {"format": "int8"}:
        return Linear8bit(linear.in_features, linear.out_features, **arguments)
    try:
        if options.keys() - {"levels", "flat", "search"} == {"format", "block_size", "double_quant"}:
            arguments |= {"block_size": options["block_size"], "double_quant": bool(options["double_quant"])}
            arguments |= {key: bool(options.get(key, False)) for key in ("flat", "search")}
            return Linear4bit(linear.in_features, linear.out_features, levels=_levels(options), **arguments)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"bad options of an encoded layer: {options!r:.200} ({error})") from error
    raise ValueError(f"unknown format of an encoded layer: {options!r:.200}")


def _own_layers(folder: pathlib.Path) -> dict[str, Any]:
    """Returns name -> options of the layers that qlite encoded, as config.json says; ValueError for an unknown method.

    bitsandbytes' method says nothing here: transformers writes it beside dense weights, too.
    """
    path = folder / "config.json"
    stored = read_json(path).get("quantization_config") if path.is_file() else None
    if stored is None:
        return {}
    method = stored.get("quant_method") if isinstance(stored, dict) else stored
    if method == "qlite" and isinstance(stored.get("layers"), dict):
        return stored["layers"]
    # The first configs that transformers wrote for bitsandbytes have no method.
    if method == "bitsandbytes" or (method is None and stored.keys() & {"load_in_4bit", "load_in_8bit"}):
        return {}
    raise ValueError(f"{path}: quantized by {method!r:.50}, a layout that qlite does not read")


def is_encoded(folder: pathlib.Path) -> bool:
    """Whether a checkpoint folder holds linear layers encoded, in qlite's layout or in bitsandbytes'.

    Raises:
        FileNotFoundError, ValueError: as in `stored_tensors`; no config.json, or it names a method that is not read.
    """
    read_json(folder / "config.json")
    return bool(_own_layers(folder) or bnb_layout.find_layers(stored_tensors(folder)))


def _encoded_layers(
    model: nn.Module, folder: pathlib.Path, stored: dict[str, StoredTensor], dtype: torch.dtype | None
) -> dict[str, _Encoded]:
    """Returns the layers that the files hold encoded, empty, by name; the model is left as it is.

    Raises:
        ValueError: a layer that is not linear in the model, or shares its weight there, or is encoded in another way; or
            parts that do not fit each other.
    """
    found: dict[str, _Encoded] = {}
    modules, owners = dict(model.named_modules()), {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)

    def linear(name: str, where: str) -> nn.Linear | QuantizedLinear:
        module = modules.get(name)
        if not name or not isinstance(module, (nn.Linear, QuantizedLinear)):
            raise ValueError(f"{where} {name}, which is no linear layer of the model")
        if others := [other for other in owners[id(module.weight)] if other != f"{name}.weight"]:
            raise ValueError(f"{where} {name}, whose weight is also {others[0]} in the model")
        return module

    where = f"{folder / 'config.json'}: quantization_config names"
    for name, options in _own_layers(folder).items():
        module = linear(name, where)
        try:
            found[name] = _Encoded(_encoded_layer(module, options))
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {name}: {error}") from error
    for name, parts in bnb_layout.find_layers(stored).items():
        module = linear(name, f"{folder}: bitsandbytes' tensors name")
        try:
            found[name] = _peer_layer(module, parts, stored, dtype)
        except ValueError as error:
            raise ValueError(f"{folder}: {name}.{error}") from error
    for name, encoded in found.items():
        module = modules[name]
        if isinstance(module, QuantizedLinear) and module.config() != encoded.layer.config():
            raise ValueError(
                f"{folder}: {name} is {encoded.layer.config()} in the files and {module.config()} in the model; "
                "load into a model whose layers are dense, or the same"
            )
        encoded.layer.train(module.training)
    return found


def _peer_layer(
    linear: nn.Linear | QuantizedLinear, names: dict[str, str], stored: dict[str, StoredTensor], dtype: torch.dtype | None
) -> _Encoded:
    """Returns the empty layer for bitsandbytes' parts of a weight; ValueError, from the part on, where they do not fit."""
    parts: dict[str, Tensor] = {}
    for part, name in names.items():
        entry = stored[name]
        if entry.dtype not in DTYPES or len(entry.shape) > 2:
            raise ValueError(f"{part} is {entry.dtype} of shape {entry.shape}, which is none of bitsandbytes' parts")
        if bnb_layout.is_small(part) and entry.size <= bnb_layout.SMALL:
            parts[part] = read_tensor(entry)
        else:
            parts[part] = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
    sizes = linear.in_features, linear.out_features
    arguments: dict[str, Any] = {"bias": linear.bias is not None, "device": "meta"}
    if any(part.startswith("weight.") for part in parts):
        layout = bnb_layout.check_4bit(parts)
        layer = Linear4bit(
            *sizes, block_size=layout.block_size, double_quant=layout.offset is not None, flat=layout.flat,
            levels=bnb_layout.LEVELS[layout.quant_type], dtype=dtype or layout.dtype, **arguments,
        )  # fmt: skip
        shape = layout.shape
    else:
        layout, shape = None, bnb_layout.check_8bit(parts)
        layer = Linear8bit(*sizes, dtype=dtype or _dtype_of(linear), **arguments)
    if shape != (linear.out_features, linear.in_features):
        raise ValueError(f"weight has shape {tuple(shape)}, the model wants {(linear.out_features, linear.in_features)}")
    return _Encoded(layer, names, layout)


def _dtype_of(linear: nn.Linear | QuantizedLinear) -> torch.dtype:
    return linear.dtype if isinstance(linear, QuantizedLinear) else linear.weight.dtype


def _read_parts(encoded: _Encoded, stored: dict[str, StoredTensor], device: torch.device, source: str) -> None:
    """Fills a layer from bitsandbytes' parts of its weight, as they are."""
    parts = {part: read_tensor(stored[name], device=device) for part, name in encoded.parts.items()}
    for part, name in encoded.parts.items():
        if part != "weight" and parts[part].is_floating_point():
            _check_finite(name, parts[part], parts[part].dtype, source)
    if encoded.layout is None:
        codes, absmax = bnb_layout.from_8bit(parts)
        state: dict[str, Tensor | None] = {"weight": codes, "absmax": absmax}
    else:
        value = bnb_layout.from_4bit(parts, encoded.layout)
        state = {"weight": value.codes, "levels": value.levels, "absmax": value.absmax}
        state |= {"absmax_scale": value.absmax_scale, "absmax_offset": value.absmax_offset}
    for attribute, tensor in state.items():
        if tensor is not None:
            _assign(encoded.layer, attribute, tensor)


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
    head: Callable[..., QuantizedLinear] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    revision: str | None = None,
) -> Falcon:
    """Returns a Falcon in evaluation mode, its linears encoded as `quantize` says, from a folder or the hub.

    A folder of encoded layers, in qlite's layout or bitsandbytes', loads as it is, without encoding again. The model
    carries `load_report` (print it), `base_fingerprint`, `base_id` and, from the hub, the commit as `base_revision`; with
    `head`, `head_report` too.

    Args:
        path_or_repo_id: a folder with config.json and safetensors, or a hub id such as "tiiuae/falcon-7b".
        quantize: qlite.Linear4bit, qlite.Linear8bit or a functools.partial of one; None: dense.
        head: the same for the output layer, as in `quantize_head`, which measures what it costs.
        device: "cpu", "cuda", ... dtype: what it computes in. revision: branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: no such folder or file. ValueError: no Falcon, a checkpoint that does not fit its config, a
            non-finite weight, no such device, or `quantize` or `head` for what is encoded already. PermissionError,
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
    if quantize is not None and is_encoded(folder):
        raise ValueError(f"{folder}: is quantized already; load it with quantize=None")
    skipped = {} if quantize is None else quantize_model(model, quantize).skipped
    report = load_checkpoint(model, folder, device=device, dtype=dtype)
    if head is not None:
        model.head_report = quantize_head(model, head)  # type: ignore[assignment]
    left = {name: why for name, (_, why) in skipped.items() if isinstance(model.get_submodule(name), nn.Linear)}
    model.load_report = dataclasses.replace(report, left=left)  # type: ignore[assignment]
    model.base_id = str(path_or_repo_id)  # type: ignore[assignment]
    model.base_revision = commit_of(folder)  # type: ignore[assignment]
    return model.eval()

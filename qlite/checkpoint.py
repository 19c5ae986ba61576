"""Checkpoints: safetensors in the hub's layout to a model, dense or encoded, one tensor at a time.

Every name, shape and dtype is checked against the files' headers before the first tensor is read. A dense weight goes
to the device and is encoded there before the next is read, so a load needs the encoded model plus one dense tensor, on
the host and on the GPU. Files are read, not mapped: mapped pages count as memory, and a file that changes under a map
kills the process.

Encoded weights are read as they are (encoded_files.py). A stack of experts is encoded one expert at a time, from a stack or
from the matrices that the hub keeps of each (hub_names.py).

Not done here: pickle (`.bin`, `.pt`) of any kind; writing (saving.py).
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlite.download import commit_of, resolve_folder
from qlite.encoded_files import Encoded, check_levels, decoded_parts, encoded_layers, is_encoded, tell_config
from qlite.experts import ExpertStack, use_one_at_a_time
from qlite.falcon import Falcon, FalconConfig
from qlite.head import quantize_head
from qlite.hub_names import StoredStack, by_names_of, read_experts, read_whole
from qlite.linear import QuantizedLinear
from qlite.quantize import quantize_model
from qlite.storage import DTYPES, FLOATS, StoredTensor, fingerprint, read_json, read_tensor, same_bytes, stored_tensors

#: Tensors in old checkpoints that hold nothing a model needs.
IGNORED = re.compile(r".*\.rotary_emb\.inv_freq|.*\.self_attention\.(masked_)?bias")


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did; `print` it.

    Attributes:
        encoded: name -> bytes of each linear layer and stack of experts held in encoded form. dense: name -> bytes of every
            other tensor.
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


def _finite(name: str, tensor: Tensor, dtype: torch.dtype | None, source: str) -> Tensor:
    """Returns the tensor; ValueError unless every float in it is finite, and stays so in `dtype`, where that is given."""
    if tensor.is_floating_point() and tensor.numel():
        ends = torch.stack(torch.aminmax(tensor))
        if not bool(torch.isfinite(ends).all()):
            raise ValueError(f"{source}: {name} holds a non-finite value; the checkpoint is damaged")
        if dtype is not None and not bool(torch.isfinite(ends.to(dtype)).all()):
            largest = ends.abs().max().item()
            raise ValueError(f"{source}: {name} becomes non-finite in {dtype}: it reaches {largest:.6g}")
    return tensor


@dataclasses.dataclass(frozen=True)
class _Target:
    """What becomes of a stored tensor: set as `owner.attribute`, or encoded into `owner`, or read with its other parts."""

    owner: nn.Module
    attribute: str
    encode: bool = False
    parts: Encoded | None = None


def _state(model: nn.Module, layers: dict[str, Encoded]) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yields name, owner, attribute and value of what the model holds once `layers` are in it."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, _, attribute = name.rpartition(".")
        if path not in layers and name not in layers:
            yield name, model.get_submodule(path), attribute, tensor
    for path, encoded in layers.items():
        for attribute, tensor in encoded.layer.state_dict(keep_vars=True).items():
            yield f"{path}.{attribute}", encoded.layer, attribute, tensor


def _plan(
    model: nn.Module, stored: Mapping[str, StoredTensor | StoredStack], layers: dict[str, Encoded], where: str
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
        # Where an encoded weight stands dense in the files: that of a stack has the name of the stack.
        dense = path if isinstance(owner, ExpertStack) else f"{path}.weight"
        encode = isinstance(owner, (QuantizedLinear, ExpertStack)) and attribute != "bias"
        encode = encode and dense in stored and stored[dense].dtype in FLOATS
        # A stack that the files do not have at all is missing once, and not in all its parts.
        lost = isinstance(owner, ExpertStack) and dense not in stored and f"{path}.weight" not in stored
        if (encode or lost) and attribute != "weight":
            continue  # this part of an encoded weight comes from encoding the dense one
        name = dense if encode or lost else name
        entry = stored.get(name)
        if entry is None:
            problems.append(f"{name} is missing")
            continue
        shape = _dense_shape(owner) if encode else tuple(tensor.shape)
        floats = (tensor.is_floating_point() and not _is_part(owner, attribute)) or encode
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
        if not problems and name in stored and not same_bytes(stored[name], stored[first]):  # type: ignore[arg-type]
            problems.append(f"{name} differs from {first}, which the config ties to it")
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(f"{where}: does not fit the model: {'; '.join(problems[:6])}{more}")
    return plan, tied


def _is_part(owner: nn.Module, attribute: str) -> bool:
    """Whether this is a scale or table of an encoded weight, which is used as it is stored; other floats are cast."""
    return isinstance(owner, (QuantizedLinear, ExpertStack)) and attribute not in ("weight", "bias")


def _dense_shape(owner: Any) -> tuple[int, ...]:
    """Returns the shape that files give the dense weight of an encoded layer or stack."""
    if isinstance(owner, ExpertStack):
        return (len(owner), *owner.matrix_shape)
    shape = (owner.out_features, owner.in_features)
    return shape[::-1] if owner.transposed else shape


def _fill(name: str, target: _Target, entry: Any, device: torch.device, dtype: torch.dtype | None, source: str) -> int:
    """Reads a stored tensor into its place, and returns its bytes there; ValueError for values that are not finite."""
    owner, attribute = target.owner, target.attribute
    if target.encode and isinstance(owner, ExpertStack):
        owner.quantize_(_finite(f"{name}[{i}]", one, dtype, source) for i, one in enumerate(read_experts(entry, device)))
        return owner.encoded_bytes()
    part = _is_part(owner, attribute)
    tensor = _finite(name, read_whole(entry, device), None if part else dtype, source)
    if target.encode:
        assert isinstance(owner, QuantizedLinear)
        owner.quantize_(tensor.T if owner.transposed else tensor)
        return owner.encoded_bytes()
    if part:
        check_levels(name, owner, attribute, tensor, source)
    elif dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    _assign(owner, attribute, tensor)
    return owner.encoded_bytes() if isinstance(owner, (QuantizedLinear, ExpertStack)) else tensor.nbytes


def _fill_parts(encoded: Encoded, stored: Mapping[str, Any], device: torch.device, source: str) -> int:
    """Reads bitsandbytes' parts of a weight into its layer, as they are, and returns the layer's bytes."""
    parts = {part: read_tensor(stored[name], device=device) for part, name in encoded.parts.items()}
    for part, name in encoded.parts.items():
        if part != "weight":
            _finite(name, parts[part], None, source)
    for attribute, tensor in decoded_parts(encoded, parts).items():
        _assign(encoded.layer, attribute, tensor)
    return encoded.layer.encoded_bytes()


def load_checkpoint(
    model: nn.Module,
    folder: str | pathlib.Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LoadReport:
    """Returns a report, having filled the model (on meta, or anywhere) from a checkpoint folder, in place.

    Where the folder holds a linear layer or a stack of experts encoded, in qlite's layout or in bitsandbytes', an encoded one
    takes its place, and nothing is encoded again. A model with encoded stacks is told to use one expert at a time.

    Sets `model.base_fingerprint`: SHA-256 over name, shape and first 256 bytes of every tensor of the source files,
    which an adapter keeps to know its base. A checkpoint that qlite quantized keeps the fingerprint of the dense one.

    Args:
        model: its parameter names are those of the files, apart from experts, which the hub keeps one by one; its
            QuantizedLinear layers and stacks take dense weights (and encode them on the device) or encoded ones.
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
    if any(parameter.is_meta for parameter in model.parameters()):
        getattr(model, "tie_weights", lambda: None)()  # made without weights, transformers' models have no ties yet
    kept = model.state_dict()
    for name, buffer in model.named_buffers():
        if buffer.device.type == "meta" and name not in kept:
            raise ValueError(f"load_checkpoint: {name} is on meta, and no checkpoint holds it; have the model make it first")
    files = stored_tensors(folder)
    layers = encoded_layers(model, folder, files, dtype)
    stored = by_names_of(model, files)
    plan, tied = _plan(model, stored, layers, str(folder))
    for name, encoded in layers.items():
        parent, _, child = name.rpartition(".")
        holder = model.get_submodule(parent)
        if child in holder._parameters:  # a stack of experts: a module does not take the place of a parameter
            delattr(holder, child)
        setattr(holder, child, encoded.layer)
    use_one_at_a_time(model)
    tell_config(model)
    report = LoadReport({}, {}, _source_fingerprint(folder, files))
    for name in sorted(plan, key=lambda name: (stored[name].file, stored[name].start)):
        target, owner = plan[name], plan[name].owner
        if target.parts is not None:
            size = _fill_parts(target.parts, stored, device, str(folder))
        else:
            size = _fill(name, target, stored[name], device, dtype, str(folder))
        if isinstance(owner, ExpertStack):
            report.encoded[name if target.encode else name.rpartition(".")[0]] = size
        elif isinstance(owner, QuantizedLinear):
            report.encoded[name.rpartition(".")[0]] = size
        else:
            report.dense[name] = size
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


def _assign(owner: nn.Module, attribute: str, tensor: Tensor) -> None:
    present = getattr(owner, attribute)
    if isinstance(present, nn.Parameter):
        setattr(owner, attribute, nn.Parameter(tensor, requires_grad=present.requires_grad))
    else:
        setattr(owner, attribute, tensor)


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

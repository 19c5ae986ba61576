"""What the files of a checkpoint hold encoded: in qlite's layout, which config.json names, or in that of bitsandbytes.

Each such layer is built empty, on the meta device, and its parts checked by their headers; nothing has been read by then but
bitsandbytes' small tensors. checkpoint.py puts the layers into the model and fills them.

Not done here: what bitsandbytes' tensors mean (bnb_layout.py); stacks of experts and Conv1D in bitsandbytes' layout, which has
none.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlite import bnb_layout
from qlite.experts import ExpertStack, expert_weights
from qlite.linear import Linear4bit, Linear8bit, QuantizedLinear
from qlite.linear_like import features, is_conv1d
from qlite.nf4 import TABLES
from qlite.ops import levels_tensor
from qlite.storage import DTYPES, StoredTensor, read_json, read_tensor, stored_tensors


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A layer or a stack that the files hold encoded: itself, empty, and what bitsandbytes' layout says, where it is in that.

    Attributes:
        parts: of bitsandbytes' layout -> name of its tensor. layout: of four bits.
    """

    layer: QuantizedLinear | ExpertStack
    parts: dict[str, str] = dataclasses.field(default_factory=dict)
    layout: bnb_layout.Layout4bit | None = None


def _levels(options: dict[str, Any]) -> tuple[float, ...]:
    """Returns the table of levels of a layer's options; KeyError for a format that has none."""
    return {**TABLES, "custom4": tuple(options.get("levels", ()))}[options["format"]]


def _kind(options: Any) -> Callable[..., QuantizedLinear]:
    """Returns the class of layer that stored options describe, with those options; ValueError for bad ones."""
    if options == {"format": "int8"}:
        return Linear8bit
    try:
        if options.keys() - {"levels", "flat", "search"} == {"format", "block_size", "double_quant"}:
            known = {"block_size": options["block_size"], "double_quant": bool(options["double_quant"])}
            known |= {key: bool(options.get(key, False)) for key in ("flat", "search")}
            return functools.partial(Linear4bit, levels=_levels(options), **known)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"bad options of an encoded layer: {options!r:.200} ({error})") from error
    raise ValueError(f"unknown format of an encoded layer: {options!r:.200}")


def _empty(place: Any, options: Any) -> QuantizedLinear | ExpertStack:
    """Returns what stored options describe, empty, of the size of what is in its place; ValueError for bad options."""
    said = dict(options) if isinstance(options, dict) else options
    stack = isinstance(place, (ExpertStack, nn.Parameter))
    experts = said.pop("experts", None) if isinstance(said, dict) else None
    transposed = said.pop("transposed", False) if isinstance(said, dict) else False
    if experts != (len(place) if stack else None):
        raise ValueError(f"has {experts or 'no'} experts in the files, {len(place) if stack else 'none'} in the model")
    if transposed is not (not stack and lies_transposed(place)):
        raise ValueError(f"has transposed={transposed} in the files, {not transposed} in the model")
    kind = _kind(said)
    try:
        if stack:
            shape = place.matrix_shape if isinstance(place, ExpertStack) else place.shape[1:]
            return ExpertStack(torch.empty(len(place), *shape, device="meta", dtype=place.dtype), kind)
        in_features, out_features = features(place)  # type: ignore[misc]
        layer = kind(in_features, out_features, bias=place.bias is not None, device="meta", dtype=dtype_of(place))
    except (TypeError, ValueError) as error:
        raise ValueError(f"bad options of an encoded layer: {options!r:.200} ({error})") from error
    layer.transposed = transposed
    return layer


def lies_transposed(layer: nn.Module) -> bool:
    """Whether files keep a layer's dense weight as (in_features, out_features): a Conv1D, or what took its place."""
    return layer.transposed if isinstance(layer, QuantizedLinear) else is_conv1d(layer)


def dtype_of(layer: nn.Module) -> torch.dtype:
    """Returns the dtype of a layer's weight, of an encoded one that of its decoded weight."""
    return layer.dtype if isinstance(layer, QuantizedLinear) else layer.weight.dtype  # type: ignore[union-attr,return-value]


def options_of(layer: QuantizedLinear | ExpertStack) -> dict[str, Any]:
    """Returns what config.json says of an encoded layer or stack, which `encoded_layers` builds it from."""
    if isinstance(layer, ExpertStack):
        return {**layer.config(), "experts": len(layer)}
    return layer.config() | ({"transposed": True} if layer.transposed else {})


def config_of(model: nn.Module) -> dict[str, Any] | None:
    """Returns the "quantization_config" of a model's encoded layers and stacks, by their names without adapters; None: no such.

    It has no "quant_method", and is refused by transformers for that: of a method that it does not know it only warns, and
    takes codes of eight bits for weights.
    """
    modules = {name.removesuffix(".base"): module for name, module in model.named_modules()}
    layers = {name: options_of(m) for name, m in modules.items() if isinstance(m, (QuantizedLinear, ExpertStack))}
    return {"format": "qlite", "layers": layers} if layers else None


def tell_config(model: nn.Module) -> None:
    """Has the config of one of transformers' models say what is encoded, for the config.json that save_pretrained writes."""
    config: Any = getattr(model, "config", None)
    if hasattr(model, "save_pretrained") and hasattr(config, "to_dict"):
        said = config_of(model)
        if said is not None:
            config.quantization_config = said
        elif hasattr(config, "quantization_config"):
            del config.quantization_config


def _own_layers(folder: pathlib.Path) -> dict[str, Any]:
    """Returns name -> options of the layers that qlite encoded, as config.json says; ValueError for an unknown method.

    bitsandbytes' method says nothing here: transformers writes it beside dense weights, too.
    """
    path = folder / "config.json"
    stored = read_json(path).get("quantization_config") if path.is_file() else None
    if stored is None:
        return {}
    method = stored.get("quant_method", stored.get("format")) if isinstance(stored, dict) else stored
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


def encoded_layers(
    model: nn.Module, folder: pathlib.Path, stored: dict[str, StoredTensor], dtype: torch.dtype | None
) -> dict[str, Encoded]:
    """Returns the layers and stacks that the files hold encoded, empty, by name; the model is left as it is.

    Raises:
        ValueError: a layer that is not linear in the model, or shares its weight there, or is encoded in another way; or
            parts that do not fit each other.
    """
    found: dict[str, Encoded] = {}
    places: dict[str, Any] = dict(model.named_modules())
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for path, module in model.named_modules():
        places |= {f"{path}.{key}": weight for key, weight in expert_weights(module).items()}

    def place(name: str, where: str, what: tuple[type, ...]) -> Any:
        there = places.get(name)
        if not name or not (isinstance(there, what) or (is_conv1d(there) if isinstance(there, nn.Module) else False)):
            raise ValueError(f"{where} {name}, which is no linear layer of the model")
        weight = getattr(there, "weight", None)
        if others := [other for other in owners.get(id(weight), ()) if other != f"{name}.weight"]:
            raise ValueError(f"{where} {name}, whose weight is also {others[0]} in the model")
        return there

    where = f"{folder / 'config.json'}: quantization_config names"
    for name, options in _own_layers(folder).items():
        there = place(name, where, (nn.Linear, QuantizedLinear, ExpertStack, nn.Parameter))
        try:
            found[name] = Encoded(_empty(there, options))
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {name}: {error}") from error
    for name, parts in bnb_layout.find_layers(stored).items():
        module = place(name, f"{folder}: bitsandbytes' tensors name", (nn.Linear, QuantizedLinear))
        try:
            found[name] = _peer_layer(module, parts, stored, dtype)
        except ValueError as error:
            raise ValueError(f"{folder}: {name}.{error}") from error
    for name, encoded in found.items():
        there = places[name]
        if isinstance(there, (QuantizedLinear, ExpertStack)) and there.config() != encoded.layer.config():
            raise ValueError(
                f"{folder}: {name} is {encoded.layer.config()} in the files and {there.config()} in the model; "
                "load into a model whose layers are dense, or the same"
            )
        encoded.layer.train(getattr(there, "training", False))
    return found


def _peer_layer(layer: nn.Module, names: dict[str, str], stored: dict[str, StoredTensor], dtype: torch.dtype | None) -> Encoded:
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
    sizes = features(layer)
    assert sizes is not None, type(layer)
    arguments: dict[str, Any] = {"bias": layer.bias is not None, "device": "meta"}
    if any(part.startswith("weight.") for part in parts):
        layout = bnb_layout.check_4bit(parts)
        found = Linear4bit(
            *sizes, block_size=layout.block_size, double_quant=layout.offset is not None, flat=layout.flat,
            levels=bnb_layout.LEVELS[layout.quant_type], dtype=dtype or layout.dtype, **arguments,
        )  # fmt: skip
        shape = layout.shape
    else:
        layout, shape = None, bnb_layout.check_8bit(parts)
        found = Linear8bit(*sizes, dtype=dtype or dtype_of(layer), **arguments)
    if shape != sizes[::-1]:
        raise ValueError(f"weight has shape {tuple(shape)}, the model wants {sizes[::-1]}")
    found.transposed = lies_transposed(layer)
    return Encoded(found, names, layout)


def decoded_parts(encoded: Encoded, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a layer's own tensors, by attribute, of bitsandbytes' parts of its weight, as they are."""
    if encoded.layout is None:
        codes, absmax = bnb_layout.from_8bit(parts)
        state: dict[str, Tensor | None] = {"weight": codes, "absmax": absmax}
    else:
        value = bnb_layout.from_4bit(parts, encoded.layout)
        state = {"weight": value.codes, "levels": value.levels, "absmax": value.absmax}
        state |= {"absmax_scale": value.absmax_scale, "absmax_offset": value.absmax_offset}
    return {attribute: tensor for attribute, tensor in state.items() if tensor is not None}


def check_levels(name: str, owner: nn.Module, attribute: str, tensor: Tensor, source: str) -> None:
    """ValueError where a file's table of levels, or one of a stack, is not the one that its config names."""
    config = owner.config() if isinstance(owner, (Linear4bit, ExpertStack)) else {}
    if attribute == "levels" and "block_size" in config:
        table = levels_tensor(_levels(config), "cpu")
        if not torch.equal(tensor.cpu(), table.expand(tensor.shape)):
            raise ValueError(f"{source}: {name} is not the table of levels that config.json says")

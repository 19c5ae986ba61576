"""Adapters merged into the dense weights of their base: in the model, or into a checkpoint folder.

The base is the decoded weight that the adapter was trained on or, where a call names it, the checkpoint that was encoded. The
sum is made in float32 and rounded once. An update far smaller than its weight can fall below what sixteen bits resolve, so
both calls report how much of it the rounding took.

Not done here: encoding a merged weight again. That is a call of its own, `quantize_model`, and takes far more of an update.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import shutil
from typing import Any

import torch
from torch import Tensor, nn

from qlite.adapters import adapted_layers
from qlite.download import resolve_folder
from qlite.encoded_files import tell_config
from qlite.experts import ExpertStack
from qlite.falcon import Falcon, FalconConfig
from qlite.hub_names import (
    StoredStack,
    by_names_of,
    name_in_files,
    read_expert,
    read_whole,
    stack_in_files,
    stacks_of,
)
from qlite.linear import QuantizedLinear
from qlite.linear_like import is_conv1d
from qlite.lora import LoRALinear
from qlite.storage import (
    FLOATS,
    StoredTensor,
    TensorToWrite,
    fingerprint,
    new_folder,
    stored_tensors,
    write_shards,
)
from qlite.switching import ATTRIBUTE, adapters_of, chosen, set_adapter, using

#: What a folder of the hub keeps beside weights and config.json, and a merged one needs as well: never code, never pickle.
BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
#: The tensors of a dense checkpoint, by the names that the model has for them.
Original = dict[str, StoredTensor | StoredStack]
COMPARED = 2**22  # weights that are compared at a time, in float64: 32 MB


@dataclasses.dataclass(frozen=True)
class WeightChange:
    """What merging did to one weight.

    Attributes:
        largest, mean: of the absolute change, before rounding. norm: of the change, Frobenius.
        rounding: norm of what rounding to the written dtype added. weights: how many there are.
    """

    largest: float
    mean: float
    norm: float
    rounding: float
    weights: int

    @property
    def lost(self) -> float:
        """Norm of the rounding as a share of the norm of the change; 1 where a change rounds away. 0 without a change."""
        return self.rounding / self.norm if self.norm else 0.0


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What `merge_adapter` or `save_merged` did; `print` it.

    Attributes:
        changes: name of each merged layer -> its change. base: "decoded", or the folder of the original checkpoint.
        dtype: of the merged weights.
    """

    changes: dict[str, WeightChange]
    base: str
    dtype: torch.dtype

    @property
    def lost(self) -> float:
        """As `WeightChange.lost`, of all layers together."""
        norm = math.hypot(*(change.norm for change in self.changes.values()))
        return math.hypot(*(change.rounding for change in self.changes.values())) / norm if norm else 0.0

    def __str__(self) -> str:
        most = max(self.changes, key=lambda name: self.changes[name].largest)
        worst = max(self.changes, key=lambda name: self.changes[name].lost)
        weights = sum(change.weights for change in self.changes.values())
        mean = sum(change.mean * change.weights for change in self.changes.values()) / max(weights, 1)
        base = "their decoded weights" if self.base == "decoded" else f"the weights of {self.base}"
        return (
            f"merged {len(self.changes)} layers into {base}, in {str(self.dtype).removeprefix('torch.')}\n"
            f"largest change of a weight: {self.changes[most].largest:.3g} ({most}); mean {mean:.3g}\n"
            f"rounding takes {100 * self.lost:.2g} % of the change; most in {worst}: {100 * self.changes[worst].lost:.2g} %"
        )


def _adapted(function: str, model: nn.Module) -> dict[str, LoRALinear]:
    """Returns the layers that carry an adapter; an error where there is none, or one that cannot be merged."""
    adapted = adapted_layers(model)
    if not adapted:
        raise ValueError(f"{function}: {type(model).__name__} has no adapters")
    for name, module in adapted.items():
        base = module.base
        if not isinstance(base, (QuantizedLinear, nn.Linear)) and not is_conv1d(base):
            raise TypeError(f"{function}: {name} adapts a {type(base).__name__}; wanted a linear layer")
        if not isinstance(base, QuantizedLinear) and not _dtype(base).is_floating_point:
            raise TypeError(f"{function}: {name} adapts a layer of {_dtype(base)}; wanted floats, or one of quantize_model's")
    return adapted


def _lies_transposed(layer: nn.Module) -> bool:
    """Whether files keep a layer's weight as (in_features, out_features)."""
    return layer.transposed if isinstance(layer, QuantizedLinear) else is_conv1d(layer)


def _own_name(path: str, adapted: dict[str, LoRALinear]) -> str:
    """Returns the name that a layer has without adapters: a base has that of the layer that adapts it."""
    name = path.removesuffix(".base")
    return name if name in adapted else path


def _dtype(layer: nn.Module) -> torch.dtype:
    """Returns the dtype of a layer's weight, of an encoded one that of its decoded weight."""
    return layer.dtype if isinstance(layer, QuantizedLinear) else layer.weight.dtype  # type: ignore[union-attr,return-value]


def _stored_original(function: str, model: nn.Module, original: str | pathlib.Path) -> Original:
    """Returns the tensors of the dense checkpoint that a model was encoded from; ValueError where it is another one."""
    stored = stored_tensors(resolve_folder(original))
    ours, theirs = getattr(model, "base_fingerprint", None), fingerprint(stored)
    if ours is None:
        raise ValueError(
            f"{function}: the model has no base_fingerprint to know {original} by; "
            "load its base with load_falcon or load_checkpoint, or merge without original="
        )
    if ours != theirs:
        raise ValueError(
            f"{function}: {original} (fingerprint {theirs[:12]}...) is not what the model was encoded from "
            f"({getattr(model, 'base_id', 'unknown')}, fingerprint {str(ours)[:12]}...)"
        )
    if isinstance(model, Falcon):  # whose head, encoded apart from the embedding, was one with it in the files
        stored.setdefault("lm_head.weight", stored["transformer.word_embeddings.weight"])
    adapted, found_by_name = adapted_layers(model), by_names_of(model, stored)
    for path, module in model.named_modules():
        if isinstance(module, (QuantizedLinear, ExpertStack)):
            if isinstance(module, ExpertStack):
                key, shape = path, (len(module), *module.matrix_shape)
            else:
                key, shape = f"{_own_name(path, adapted)}.weight", (module.out_features, module.in_features)
                shape = shape[::-1] if module.transposed else shape
            found = found_by_name.get(key)
            if found is None or found.shape != shape or found.dtype not in FLOATS:
                has = "is not there" if found is None else f"is {found.dtype} {found.shape}"
                raise ValueError(f"{function}: {original}: {key} {has}; wanted floats {shape}")
    return found_by_name


def _base_weight(name: str, layer: nn.Module, original: Original | None) -> Tensor:
    """Returns the dense weight (out_features, in_features) of a layer: decoded, from the original, or its own."""
    if isinstance(layer, QuantizedLinear):
        if original is None:
            return layer.dequantize()
        weight = read_whole(original[f"{name}.weight"], layer.weight.device)
    else:
        weight: Tensor = layer.weight  # type: ignore[no-redef]
    return weight.T if _lies_transposed(layer) else weight


def _compare(dense: Tensor, exact: Tensor, rounded: Tensor) -> WeightChange:
    """Returns what became of a weight, compared a few rows at a time."""
    largest, total, squares, errors = 0.0, 0.0, 0.0, 0.0
    rows = max(1, COMPARED // max(1, dense.shape[1]))
    for start in range(0, dense.shape[0] if dense.numel() else 0, rows):
        piece = slice(start, start + rows)
        sums = exact[piece].double()
        change = (sums - dense[piece]).abs_()
        error = rounded[piece] - sums
        parts = torch.stack((change.max(), change.sum(), change.square().sum(), error.square().sum())).tolist()
        largest, total, squares, errors = max(largest, parts[0]), total + parts[1], squares + parts[2], errors + parts[3]
    return WeightChange(largest, total / max(1, dense.numel()), math.sqrt(squares), math.sqrt(errors), dense.numel())


def _merged(
    function: str, name: str, module: LoRALinear, original: Original | None, dtype: torch.dtype
) -> tuple[Tensor, WeightChange]:
    """Returns the merged weight (out_features, in_features) of an adapted layer, in `dtype`, and what changed."""
    dense = _base_weight(name, module.base, original)
    exact = module.merged(dense)
    rounded = exact.to(dtype)
    change = _compare(dense, exact, rounded)
    if not math.isfinite(change.rounding):
        raise ValueError(f"{function}: {name} becomes non-finite in {dtype}; nothing was merged")
    return rounded, change


def _tied(model: nn.Module) -> bool | None:
    """Whether head and embedding are one tensor, or None for a model without them.

    What the model is, and not what its config says: an adapter on the head, or a head that is trained, unties it.
    """
    if isinstance(model, Falcon):
        embeddings, head = model.transformer.word_embeddings, model.lm_head
    else:
        embeddings, head = (getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output"))
    if embeddings is None or head is None:
        return None
    return not isinstance(head, LoRALinear) and getattr(head, "weight", None) is embeddings.weight


@torch.no_grad()
def merge_adapter(model: nn.Module, *, original: str | pathlib.Path | None = None, name: str | None = None) -> MergeReport:
    """Returns a report, having put dense layers of weight `base + scaling * B A` in place of the model's adapted ones.

    The base is the decoded weight that the adapter was trained on; the sum is made in float32 and rounded once to the
    dtype of the base. Layers without an adapter stay as they are, encoded ones encoded. The model is another base now: it
    loses `base_fingerprint` and `base_id`; where its head is no longer its embedding, its config says so. An encoded Conv1D
    becomes an nn.Linear, whose weight lies the other way round: save_merged, not save_pretrained, writes such a model.

    Args:
        model: with adapters. original: folder or hub id of the checkpoint that the model was encoded from, whose weights
            then take the place of the decoded ones.
        name: of the adapter; None: the one in use.

    Raises:
        ValueError: the model has no adapters, none of that name, or others too, which would be left without their base;
            `original` is not its base, or a merged weight is not finite; the model is unchanged. TypeError: an adapter on
            a layer that is neither dense nor encoded.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> report = qlite.add_lora(model, qlite.LoRAConfig(r=2))
        >>> print(qlite.merge_adapter(model).changes["0"].largest, type(model[0]).__name__)
        0.0 Linear
    """
    wanted, present = chosen("merge_adapter", model, name), adapters_of(model)
    others = [other for other in present.adapters if other != wanted]
    if others:
        raise ValueError(
            f"merge_adapter: the model has {', '.join(map(repr, others))} too, made for the base as it is; delete_adapter "
            "first, or write base and adapter by save_merged, which leaves the model as it is"
        )
    with using(model, wanted):
        adapted = _adapted("merge_adapter", model)
        source = None if original is None else _stored_original("merge_adapter", model, original)
        weights: dict[str, Tensor] = {}
        changes: dict[str, WeightChange] = {}
        for path, module in adapted.items():
            weights[path], changes[path] = _merged("merge_adapter", path, module, source, _dtype(module.base))
    set_adapter(model, wanted)
    for path, module in adapted.items():
        layer = module.base
        if isinstance(layer, QuantizedLinear):
            layer = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            layer.bias = module.base.bias  # type: ignore[assignment]
        weight = weights[path].T.contiguous() if is_conv1d(layer) else weights[path]
        layer.weight = nn.Parameter(weight, requires_grad=False)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.train(module.training))
    tell_config(model)
    for attribute in ("lora_config", ATTRIBUTE, "base_fingerprint", "base_id", "base_revision"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    config: Any = getattr(model, "config", None)
    if _tied(model) is False and getattr(config, "tie_word_embeddings", False):
        if isinstance(config, FalconConfig):
            model.config = dataclasses.replace(config, tie_word_embeddings=False)  # type: ignore[assignment]
        else:
            config.tie_word_embeddings = False
    return MergeReport(changes, "decoded" if original is None else str(original), next(iter(weights.values())).dtype)


def _tensors(
    model: nn.Module,
    adapted: dict[str, LoRALinear],
    original: Original | None,
    dtype: torch.dtype | None,
    changes: dict[str, WeightChange],
) -> dict[str, TensorToWrite]:
    """Returns the tensors of the merged checkpoint, each made when it is written; a merged one then adds its change."""

    def cast(key: str, tensor: Tensor, wanted: torch.dtype) -> Tensor:
        result = tensor.to(wanted)
        ends = torch.stack(torch.aminmax(result)) if result.is_floating_point() and result.numel() else torch.zeros(2)
        if not bool(torch.isfinite(ends).all()):
            raise ValueError(f"save_merged: {key} is not finite in {wanted}; nothing was written")
        return result

    def weight(name: str, layer: nn.Module, wanted: torch.dtype) -> Tensor:
        if name in adapted:
            result, changes[name] = _merged("save_merged", name, adapted[name], original, wanted)
        else:
            result = cast(f"{name}.weight", _base_weight(name, layer, original), wanted)
        return result.T.contiguous() if _lies_transposed(layer) else result

    def expert(name: str, stack: ExpertStack | Tensor, wanted: torch.dtype, index: int) -> Tensor:
        if isinstance(stack, Tensor):
            return cast(f"{name}[{index}]", stack[index], wanted)
        dense = stack.layer(index).dequantize() if original is None else read_expert(original[name], index)
        return cast(f"{name}[{index}]", dense, wanted)

    tensors: dict[str, TensorToWrite] = {}
    seen: set[int] = set()
    stacks = stacks_of(model)
    for key, tensor in model.state_dict(keep_vars=True).items():
        path, _, attribute = key.rpartition(".")
        layer = model.get_submodule(path)
        encoded = isinstance(layer, QuantizedLinear)
        name = _own_name(path, adapted)
        if isinstance(layer, LoRALinear):
            continue  # what the adapter holds itself
        if isinstance(layer, ExpertStack) or key in stacks:
            stack, shape = (
                (layer, (len(layer), *layer.matrix_shape)) if isinstance(layer, ExpertStack) else (tensor, tensor.shape)
            )
            own, wanted = key if stack is tensor else path, dtype or stack.dtype
            tensors |= stack_in_files(model, own, tuple(shape), wanted, functools.partial(expert, own, stack, wanted))
            continue
        if attribute == "weight" and (name in adapted or encoded):
            shape = (layer.out_features, layer.in_features) if encoded else tuple(tensor.shape)
            shape = shape[::-1] if encoded and _lies_transposed(layer) else shape
            wanted = dtype or _dtype(layer)
            tensors[f"{name}.weight"] = TensorToWrite(wanted, shape, functools.partial(weight, name, layer, wanted))
        elif (not encoded or attribute == "bias") and id(tensor) not in seen:
            if isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
                raise TypeError(
                    f"save_merged: {path} is a {type(layer).__name__} that holds {tensor.dtype}; wanted a dense layer, "
                    "or one that quantize_model encoded"
                )
            seen.add(id(tensor))  # a tied tensor is written once
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            own = f"{name}.{attribute}" if name else attribute
            tensors[own] = TensorToWrite(wanted, tuple(tensor.shape), functools.partial(cast, own, tensor, wanted))
    return {name_in_files(model, name): tensor for name, tensor in tensors.items()}


def _config(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Returns what config.json says of the merged model; TypeError where the model has no config to say it."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if to_dict is None:
        raise TypeError(f"save_merged: {type(model).__name__} has no config with a to_dict; merge_adapter merges any model")
    values: dict[str, Any] = to_dict()
    values.pop("quantization_config", None)
    values["architectures"] = values.get("architectures") or [type(model).__name__]
    values["dtype"] = str(dtype).removeprefix("torch.")
    tied = _tied(model)
    if tied is not None:
        values["tie_word_embeddings"] = tied
    return values


@torch.no_grad()
def save_merged(
    model: nn.Module,
    folder: str | pathlib.Path,
    *,
    original: str | pathlib.Path | None = None,
    dtype: torch.dtype | None = None,
    files_from: str | pathlib.Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
    name: str | None = None,
) -> MergeReport:
    """Returns a report, having written base and adapter as one dense checkpoint; the model stays as it is.

    One weight is decoded, merged and written at a time. The folder appears whole, by renaming: an interrupted save leaves
    nothing under its name. The hub's layout: transformers and `load_falcon` read it; experts of Mixtral and Qwen-MoE
    are written one by one, as there.

    Args:
        model: with adapters, and a config (ours, or transformers'). folder: must not exist, or be empty.
        original: folder or hub id of the checkpoint that the model was encoded from, whose weights then take the place of
            all decoded ones. dtype: of every float that is written; default: what each layer computes in.
        files_from: folder or hub id whose tokenizer and generation files are copied. max_shard_bytes: a larger model is cut
            into several files.
        name: of the adapter; None: the one in use.

    Raises:
        ValueError: the model has no adapters, none of that name, `original` is not its base, or a weight is not finite in
            `dtype`.
        TypeError: a layer that cannot be merged, a model without a config, or a dtype that is no float.
        FileExistsError: the folder holds something. FileNotFoundError: no such checkpoint or `files_from`.

    Example:
        >>> from qlite.data import ASSETS
        >>> model = qlite.load_falcon(ASSETS / "tiny-falcon", quantize=qlite.Linear4bit)
        >>> report = qlite.add_lora(model, qlite.LoRAConfig(r=2))
        >>> report = qlite.save_merged(model, "merged", files_from=ASSETS / "tiny-falcon")
        >>> len(report.changes), report.dtype
        (32, torch.bfloat16)
    """
    if dtype is not None and dtype not in FLOATS.values():
        raise TypeError(f"save_merged: dtype is {dtype!r}; wanted a float dtype")
    with using(model, chosen("save_merged", model, name)):
        adapted = _adapted("save_merged", model)
        source = None if original is None else _stored_original("save_merged", model, original)
        beside = None if files_from is None else resolve_folder(files_from, names=BESIDE)
        written = dtype or _dtype(next(iter(adapted.values())).base)
        config = _config(model, written)
        changes: dict[str, WeightChange] = {}
        tensors = _tensors(model, adapted, source, dtype, changes)
        with new_folder(folder) as temporary:
            write_shards(temporary, tensors, max_shard_bytes=max_shard_bytes)
            (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for path in [beside / name for name in BESIDE] if beside else []:
                if path.is_file():
                    shutil.copyfile(path, temporary / path.name)
    return MergeReport(changes, "decoded" if original is None else str(original), written)

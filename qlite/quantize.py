"""The call that puts encoded layers in the place of a model's dense ones, and its report.

First it is decided what becomes of every weight, and nothing has changed; then each layer is encoded, one at a time. What
was left dense is told by bytes and by reason, and a model of which most would stay dense is refused: a mixture of experts
whose nine tenths are skipped in silence is not a quantized model.

Not done here: embeddings and convolutions, which stay as they are and are reported.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qlite.encoded_files import tell_config
from qlite.experts import ExpertStack, expert_weights, takes_experts, use_one_at_a_time
from qlite.linear import Linear4bit, QuantizedLinear
from qlite.linear_like import is_conv1d

#: The reason to leave a layer that was encoded before.
ENCODED = "already quantized"
#: Modules that are no matrix products: nobody expects them to be encoded.
LOOKUPS = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """What `quantize_model` did; `print` it.

    Attributes:
        quantized: name -> (bytes before, bytes after) of each linear layer that was replaced, bias included, and of each
            stack of expert matrices.
        skipped: name -> (bytes, reason) of each module with weights of its own that was left as it was; a weight that
            several modules share is counted once, with the first.
        overridden: name -> class of each replaced layer whose class has a forward of its own, which no longer runs.
        experts: name -> number of matrices of each stack that was replaced.
    """

    quantized: dict[str, tuple[int, int]]
    skipped: dict[str, tuple[int, str]]
    overridden: dict[str, str] = dataclasses.field(default_factory=dict)
    experts: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def dense_share(self) -> float:
        """The share of the model's bytes, as they were before, that is not encoded now."""
        encoded = sum(sizes[0] for sizes in self.quantized.values())
        dense = [size for size, reason in self.skipped.values() if reason != ENCODED]
        return sum(dense) / max(1, encoded + sum(dense))

    def __str__(self) -> str:
        before = sum(sizes[0] for sizes in self.quantized.values())
        after = sum(sizes[1] for sizes in self.quantized.values())
        stacks = f" and {sum(self.experts.values())} matrices of experts" if self.experts else ""
        layers = len(self.quantized) - len(self.experts)
        lines = [f"quantized {layers} linear layers{stacks}: {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB"]
        for kind, count in sorted(collections.Counter(self.overridden.values()).items()):
            lines.append(f"{count} of them were {kind}, whose own forward no longer runs: is it more than x @ weight.T + bias?")
        return "\n".join([*lines, f"left dense: {100 * self.dense_share:.1f} % of the bytes", *_by_reason(self.skipped)])


def _by_reason(skipped: dict[str, tuple[int, str]]) -> list[str]:
    """Returns a line for each reason, the one with most bytes first."""
    reasons: dict[str, list[int]] = {}
    for size, reason in skipped.values():
        reasons.setdefault(reason, []).append(size)
    largest = sorted(reasons.items(), key=lambda entry: -sum(entry[1]))
    return [f"left {len(sizes)} x {sum(sizes) / 1e6:,.1f} MB: {reason}" for reason, sizes in largest]


def _own_forward(module: nn.Module) -> bool:
    """Returns whether a linear layer's class has a forward of its own."""
    definer = next(c for c in type(module).__mro__ if "forward" in vars(c))
    return definer is not nn.Linear and definer.__name__ != "Conv1D"


def _named(name: str, entries: Sequence[str]) -> str | None:
    """Returns the entry that is a dotted name, the end of one, or the name of something above it."""
    return next((entry for entry in entries if f".{entry}." in f".{name}."), None)


def _kept_dense(model: nn.Module) -> re.Pattern[str] | None:
    """Returns what matches the weights that the model itself keeps in float32, or None.

    transformers' classes list such names. T5 reads the dtype of the weight of its `wo`, and casts the input to it.
    """
    entries: set[str] = set()
    for module in model.modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            entries.update(getattr(module, attribute, None) or ())
    return re.compile("|".join(rf"(?:^|\.)(?:{entry})(?:$|\.)" for entry in sorted(entries))) if entries else None


@dataclasses.dataclass(frozen=True)
class _Part:
    """A layer or a stack of expert matrices, and what becomes of it.

    Attributes:
        name: dotted. size: bytes that no part before it has counted.
        reason: why it stays dense, or None. meant: that it does is what the caller or the kind of module asks for.
    """

    name: str
    size: int
    reason: str | None
    meant: bool


def _fate(name: str, module: nn.Module, skip: Sequence[str], owners: dict[int, list[str]]) -> tuple[str | None, bool]:
    """Returns why a module's own weights stay dense, None where they are to be encoded, and whether that is as meant."""
    if isinstance(module, (QuantizedLinear, ExpertStack)):
        return ENCODED, True
    entry = _named(name, skip)
    if entry is not None:
        return f"named in skip ({entry})", True
    if not name:
        return "it is the model itself", False
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        flat = all(p.ndim < 2 for p in module.parameters(recurse=False))
        return f"not a linear layer ({type(module).__name__})", flat or isinstance(module, LOOKUPS)
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "its weight is read by the module above it (torch's own attention)", False
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed, not stored", False
    shared = [owner for owner in owners[id(weight)] if owner != f"{name}.weight"]
    if shared:
        return f"its weight is also {shared[0]}", True
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}", False
    return None, False


def _plan(model: nn.Module, skip: Sequence[str]) -> list[_Part]:
    """Returns what becomes of every module with weights of its own, in the order of the modules; changes nothing."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    kept, one_at_a_time = _kept_dense(model), any(map(takes_experts, model.modules()))
    parts: list[_Part] = []
    counted: set[int] = set()
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for key in expert_weights(module):
            reason, meant = _fate_of_experts(f"{name}.{key}", skip, one_at_a_time)
            parts.append(_Part(f"{name}.{key}", own.pop(key).nbytes, reason, meant))
        if own:
            reason, meant = _fate(name, module, skip, owners)
            if reason is None and kept is not None and kept.search(f"{name}.weight"):
                reason, meant = "the model keeps it in float32 (_keep_in_fp32_modules)", True
            size = sum(p.nbytes for p in own.values() if id(p) not in counted)
            parts.append(_Part(name, size, reason, meant))
            counted.update(map(id, own.values()))
    return parts


def _fate_of_experts(name: str, skip: Sequence[str], one_at_a_time: bool) -> tuple[str | None, bool]:
    entry = _named(name, skip)
    if entry is not None:
        return f"named in skip ({entry})", True
    return (None if one_at_a_time else "experts of a model without set_experts_implementation"), False


def quantize_model(
    model: nn.Module, kind: Callable[..., QuantizedLinear] = Linear4bit, *, skip: Sequence[str] = ("lm_head",)
) -> QuantizationReport:
    """Returns a report, having replaced the model's linear layers by `kind`, in place.

    Linear layers are nn.Linear, its subclasses, and transformers' Conv1D. In transformers' mixtures of experts the stacks of
    expert matrices become ExpertStack, and `set_experts_implementation("eager")` is called: one expert is decoded at a time.

    Layers and stacks on the meta device become empty ones of `kind` there, for `load_checkpoint` to fill; others are encoded
    at once, on their device, one at a time. Embeddings and convolutions stay; a weight that is shared with another module stays
    too, and so does one that a transformers model keeps in float32. The layer's training flag is kept. A subclass's own forward
    no longer runs; the report names such layers.

    Args:
        model: any module; it may not itself be the linear layer.
        kind: Linear4bit, Linear8bit, or functools.partial of one: called with in_features, out_features, bias=, device=,
            dtype=.
        skip: names, or last parts of dotted names, of modules to leave alone, with all that is beneath them.

    Raises:
        ValueError: nothing would be quantized, or less than half of the bytes that are neither named in skip nor an
            embedding, a convolution or a shared weight (the message says why, and nothing has changed); a name in skip that
            is no layer is allowed, since models differ in having a head; a weight is not finite (the layer is named).

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
        >>> len(qlite.quantize_model(model, qlite.Linear4bit, skip=["2"]).quantized)
        1
    """
    parts = _plan(model, skip)
    skipped = {part.name: (part.size, part.reason) for part in parts if part.reason is not None}
    _check_enough(parts, skipped, type(model).__name__)
    report = QuantizationReport({}, skipped)
    for part in parts:
        if part.reason is not None:
            continue
        parent, _, child = part.name.rpartition(".")
        holder = model.get_submodule(parent)
        dense = getattr(holder, child)
        try:
            encoded = _quantized(dense, kind) if isinstance(dense, nn.Module) else ExpertStack(dense, kind)
        except ValueError as error:
            raise ValueError(f"quantize_model: {part.name}: {error}") from error
        if isinstance(encoded, ExpertStack):
            delattr(holder, child)  # a module does not take the place of a parameter
            report.experts[part.name] = len(encoded)
        elif _own_forward(dense):
            report.overridden[part.name] = type(dense).__name__
        setattr(holder, child, encoded)
        report.quantized[part.name] = (part.size, encoded.encoded_bytes())
    use_one_at_a_time(model)
    tell_config(model)
    return report


def _check_enough(parts: list[_Part], skipped: dict[str, tuple[int, str]], model: str) -> None:
    """ValueError where nothing is to be encoded, or less than what stays dense though nobody asked for that."""
    encoded = sum(part.size for part in parts if part.reason is None)
    if all(part.reason is not None for part in parts):
        raise ValueError("\n".join([f"quantize_model: no linear layer of {model} was quantized.", *_by_reason(skipped)]))
    dense = {part.name: skipped[part.name] for part in parts if part.reason is not None and not part.meant}
    left = sum(size for size, _ in dense.values())
    if left > encoded:
        share = 100 * left / (left + encoded)
        reasons = "\n".join([*_by_reason(dense), f"the largest is {max(dense, key=dense.__getitem__)}"])
        raise ValueError(
            f"quantize_model: {share:.0f} % of the weights of {model} would stay dense; name them in skip if that is meant."
            f"\n{reasons}"
        )


def _quantized(linear: Any, kind: Callable[..., QuantizedLinear]) -> QuantizedLinear:
    """Returns the layer of `kind` that takes the place of an nn.Linear or a Conv1D."""
    weight = linear.weight.T if is_conv1d(linear) else linear.weight
    has_bias = linear.bias is not None
    out_features, in_features = weight.shape
    layer = kind(in_features, out_features, bias=has_bias, device="meta", dtype=weight.dtype)
    if weight.device.type != "meta":
        layer.quantize_(weight.detach())
    if has_bias:
        layer.bias = linear.bias
    layer.transposed = is_conv1d(linear)
    return layer.train(linear.training)

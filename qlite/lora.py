"""Low-rank adapters beside frozen layers: y = base(x) + scaling * B A dropout(x).

Hu et al., LoRA (arXiv 2106.09685), section 4.1; with rank-stabilised scaling (arXiv 2312.03732) and, on request, DoRA's
trained row norms (arXiv 2402.09353). The wrapper is blind to what it wraps: it needs sizes and a call, dense or encoded.
An adapter starts as a change of nothing (lora_init.py has the other starts). The adapter weights are float32 whatever the
base computes in; the products run in the dtype of the base's output.

Not done here: files (adapters.py), merging a whole model (merge.py), adapters on embeddings, convolutions or biases.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import qlite.model_ops  # noqa: F401  declares the op
from qlite import lora_init
from qlite.experts import ExpertStack, expert_weights
from qlite.linear_like import features
from qlite.operators import without_derivatives
from qlite.switching import DEFAULT, Adapter, adapters_of, chosen, insert, set_adapter

ALL_LINEAR = "all-linear"
#: Features at a time when the rows of a weight are asked for by way of its layer.
CHUNK = 2048


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which layers get an adapter, and of what size.

    Attributes:
        r: rank, >= 1. alpha: the adapter's output is scaled by alpha / r. dropout: probability on the adapter's input.
        targets: "all-linear" (every linear layer but the output head; the default, since adapters on all of a block's
            layers are what matches full fine-tuning: arXiv 2305.14314, section 4), a list of exact names or last parts
            of dotted names, or any other string: a regular expression that must match the whole name.
        exclude: layers to leave out of the targets: names or an expression, as in targets.
        layers: numbers of the blocks to adapt (the first number in a dotted name); None: all. Not with an expression.
        rank_pattern, alpha_pattern: r and alpha of the layers whose dotted name ends in a key; keys are regular
            expressions, and the first that matches counts.
        modules_to_save: names, or last parts of names, of modules that are trained and saved whole, such as "lm_head": a
            copy of each, so that the base's stays.
        rslora: scale by alpha / sqrt(r) instead. dora: train the norm of each row of the weight too.
        init: "kaiming" (A uniform, B zero), "gaussian" (A normal, B zero), "pissa" (the leading singular vectors of the
            base), "loftq" (those of what encoding took from it); lora_init.py tells them apart.

    Raises:
        ValueError: r < 1, alpha not finite and positive, dropout outside [0, 1), no targets, layers with an expression, a
            pattern that is no expression or could take long to match, an unknown init.
        TypeError: r is not an int.

    Example:
        >>> qlite.LoRAConfig(r=8, targets=["query_key_value"]).scaling
        4.0
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: str | tuple[str, ...] = ALL_LINEAR
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False
    init: str = "kaiming"

    def __post_init__(self) -> None:
        for key, r in {"r": self.r, **self.rank_pattern}.items():
            if not isinstance(r, int) or isinstance(r, bool):
                raise TypeError(f"LoRAConfig: {key} is {r!r}; wanted an int")
            if r < 1:
                raise ValueError(f"LoRAConfig: {key} is {r}; wanted at least 1")
        for key, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not (math.isfinite(alpha) and alpha > 0):
                raise ValueError(f"LoRAConfig: {key} is {alpha}; wanted a finite number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRAConfig: dropout is {self.dropout}; wanted 0 <= dropout < 1")
        for key in ("targets", "exclude", "modules_to_save", "layers"):
            if not isinstance(getattr(self, key), (str, type(None))):
                object.__setattr__(self, key, tuple(getattr(self, key)))
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"LoRAConfig: modules_to_save is {self.modules_to_save!r}; wanted a list of names")
        if not self.targets:
            raise ValueError("LoRAConfig: targets is empty; name layers, or use 'all-linear'")
        if self.layers is not None and isinstance(self.targets, str) and self.targets != ALL_LINEAR:
            raise ValueError("LoRAConfig: layers goes with names or 'all-linear'; an expression can hold the numbers itself")
        for key in (*self.rank_pattern, *self.alpha_pattern):
            _check_pattern(key)
        if self.init not in lora_init.STARTS:
            raise ValueError(f"LoRAConfig: init is {self.init!r}; wanted one of {', '.join(lora_init.STARTS)}")

    @classmethod
    def qlora_2023(cls) -> LoRAConfig:
        """Returns the widely copied Falcon recipe of 2023: r=16, alpha=32, dropout 0.05 on query_key_value alone."""
        return cls(targets=("query_key_value",))

    @property
    def scaling(self) -> float:
        """The factor on the adapter's output, alpha / r, or alpha / sqrt(r) under rslora."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def of_layer(self, name: str) -> LoRAConfig:
        """Returns this config with the r and alpha that the patterns give a layer, and no patterns."""
        r, alpha = _first_match(self.rank_pattern, name, self.r), _first_match(self.alpha_pattern, name, self.alpha)
        return dataclasses.replace(self, r=r, alpha=alpha, rank_pattern={}, alpha_pattern={})


def _check_pattern(pattern: str) -> None:
    """ValueError for what is no regular expression, or one that could take longer than a moment on some name."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"LoRAConfig: the pattern {pattern!r} is no regular expression ({error})") from error
    # Without a repeated group the time is a polynomial in the length of a name, of the number of repetitions as degree.
    if re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3 or len(pattern) > 500:
        raise ValueError(f"LoRAConfig: the pattern {pattern[:80]!r} repeats a group or too much; name the layers instead")


def _first_match(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", name)), default)


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update.

    Args:
        base: a linear layer: in_features, out_features (or transformers' Conv1D) and a call on (..., in_features).
        config: rank, scale, dropout and start; patterns are add_lora's matter.
        generator: for the random start (CPU), or None for PyTorch's global one.
        dense: the weight (out_features, in_features) that the base encodes; for the start "loftq" alone.

    Attributes:
        base: the wrapped layer. lora_A: float32 Parameter (r, in_features). lora_B: float32 Parameter (out_features, r).
        start_A, start_B: float32 buffers of the same shapes, whose product is subtracted: the start "pissa", else None.
        magnitude: float32 Parameter (out_features,), the row norms that DoRA trains, else None.

    Raises:
        ValueError: a start or DoRA that needs the base's weight, and the base is on the meta device.

    Source: arXiv 2106.09685, section 4.1, eq. 3; DoRA: arXiv 2402.09353, eq. 5, the norm held constant (section 4.3).

    Example:
        >>> layer = qlite.LoRALinear(torch.nn.Linear(64, 32), qlite.LoRAConfig(r=4))
        >>> layer.lora_A.shape, layer.lora_B.shape
        (torch.Size([4, 64]), torch.Size([32, 4]))
    """

    start_A: Tensor | None
    start_B: Tensor | None
    base_norm: Tensor

    def __init__(
        self,
        base: nn.Module,
        config: LoRAConfig,
        *,
        generator: torch.Generator | None = None,
        dense: Tensor | None = None,
    ):
        super().__init__()
        sizes = features(base)
        assert sizes is not None, type(base)
        self.base = base
        self.in_features, self.out_features = sizes
        self.scaling = config.scaling
        self.dropout = nn.Dropout(config.dropout)
        device = next(base.parameters()).device
        needs_weight = config.dora or config.init in lora_init.FROM_WEIGHT
        if needs_weight and device.type == "meta":
            raise ValueError(f"LoRALinear: init={config.init!r}, dora={config.dora} need the base's weight; load it first")
        if config.init in lora_init.FROM_WEIGHT:
            weight = torch.cat(list(self._columns()), dim=1)
            a, b = lora_init.from_weight(config.init, weight, dense, config.r, self.scaling, generator)
        else:
            a, b = lora_init.at_zero(config.init, self.in_features, self.out_features, config.r, generator)
        self.lora_A, self.lora_B = (nn.Parameter(t.to(device)) for t in (a, b))
        subtracted = config.init == "pissa"
        self.register_buffer("start_A", self.lora_A.detach().clone() if subtracted else None)
        self.register_buffer("start_B", self.lora_B.detach().clone() if subtracted else None)
        self.magnitude = None
        if config.dora:
            squared = sum(columns.square().sum(dim=1) for columns in self._columns())
            assert isinstance(squared, Tensor)
            self.register_buffer("base_norm", squared.sqrt(), persistent=False)
            self.magnitude = nn.Parameter(self._norm())

    @property
    def weight(self) -> Tensor:
        """An empty tensor (0,), of the dtype and device that the base computes in: for a model that asks a layer for those.

        The weight itself is the base's and the adapter's together. Whoever multiplied by the base's would lose the adapter
        in silence; a product with this one fails.
        """
        weight: Any = self.base.weight
        return weight.new_empty(0, dtype=getattr(self.base, "dtype", weight.dtype))

    def _of_base(self, x: Tensor) -> Tensor:
        """Returns x @ weight.T for the base's weight, float32: its answer without the bias, outside of any autocast."""
        weight: Any = self.base.weight
        dtype = weight.dtype if weight.is_floating_point() else torch.float32  # an encoded layer takes any
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            result = self.base(x.to(dtype)).float()
            bias: Any = getattr(self.base, "bias", None)
            return result if bias is None else result - bias.float()

    def _columns(self) -> Iterator[Tensor]:
        """Yields the base's weight in float32, CHUNK columns at a time, (out_features, up to CHUNK)."""
        device = next(self.base.parameters()).device
        for first in range(0, self.in_features, CHUNK):
            unit = torch.zeros(min(CHUNK, self.in_features - first), self.in_features, device=device)
            unit[:, first:].fill_diagonal_(1)
            yield self._of_base(unit).T

    def factors(self) -> tuple[Tensor, Tensor]:
        """Returns A and B of the update: (r, in_features) and (out_features, r), or of rank 2 r with a start to subtract."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return torch.cat((self.lora_A, self.start_A)), torch.cat((self.lora_B, -self.start_B), dim=1)

    def _norm(self) -> Tensor:
        """Returns the norm of each row of base + update, (out_features,), from three products of rank r."""
        a, b = (factor.detach().float() for factor in self.factors())
        mixed = (b * self._of_base(a).T).sum(dim=1)
        update = ((b @ (a @ a.T)) * b).sum(dim=1)
        squared = self.base_norm.float().square() + 2 * self.scaling * mixed + self.scaling**2 * update
        # A row of zeros has norm and magnitude zero; their quotient must not be 0 / 0.
        return squared.clamp(min=torch.finfo(torch.float32).tiny).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """Returns base(x) + scaling * B A dropout(x), (..., out_features), in the dtype of base(x).

        Under DoRA, what is not bias is multiplied by magnitude / norm, row by row.
        """
        result = self.base(x)
        a, b = self.factors()
        if without_derivatives() and self.magnitude is None and not (self.dropout.training and self.dropout.p):
            return torch.ops.qlite.lora_add(result, x, a, b, self.scaling)
        # Cast to what the base computed in: under autocast that is not the dtype of x.
        low_rank = nn.functional.linear(self.dropout(x).to(result.dtype), a.to(result.dtype))
        update = nn.functional.linear(low_rank, b.to(result.dtype)) * self.scaling
        if self.magnitude is None:
            return result + update
        gain = (self.magnitude / self._norm()).to(result.dtype)
        bias: Any = getattr(self.base, "bias", None)
        product = result if bias is None else result - bias.to(result.dtype)
        return result + (product * (gain - 1) + update * gain)

    def merged(self, dense: Tensor) -> Tensor:
        """Returns the weight that does what base and adapter do together, float32 (out_features, in_features).

        Args:
            dense: the weight of the base, (out_features, in_features).
        """
        a, b = self.factors()
        weight = (b @ a).mul_(self.scaling).add_(dense)  # in place: it is as large as the weight
        if self.magnitude is None:
            return weight
        norm = weight.norm(dim=1).clamp(min=math.sqrt(torch.finfo(torch.float32).tiny))
        return weight * (self.magnitude / norm)[:, None]

    def extra_repr(self) -> str:
        """Returns what `print(module)` shows beside the children."""
        dora = "" if self.magnitude is None else ", dora"
        return f"r={self.lora_A.shape[0]}, scaling={self.scaling:g}{dora}"


@dataclasses.dataclass(frozen=True)
class AdapterReport:
    """What `add_lora` did; `print` it.

    Attributes:
        targets: names of the layers that carry an adapter. saved: names of the modules that are trained whole.
        trainable: trainable parameters. total: all parameters, a 4-bit weight counted as the weights it stands for.
        experts: names of the stacks of experts, which get no adapter and stay as they are.
    """

    targets: tuple[str, ...]
    trainable: int
    total: int
    saved: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        whole = f" and all of {', '.join(self.saved)}" if self.saved else ""
        text = f"LoRA on {len(self.targets)} layers{whole}: trainable {self.trainable:,} of {self.total:,} ({share:.3f} %)"
        return text + (f"; none on {len(self.experts)} stacks of experts, which stay frozen" if self.experts else "")


def _count_parameters(model: nn.Module) -> int:
    """Returns the number of logical parameters: an encoded linear counts out * in, and its scales count nothing."""
    total: int = 0
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, ExpertStack):
            out_features, in_features = module.matrix_shape
            total += len(module) * out_features * in_features
            continue
        weight, sizes = module._parameters.get("weight"), features(module)
        encoded = sizes is not None and weight is not None and not weight.is_floating_point()
        if encoded and sizes is not None:
            total += sizes[0] * sizes[1]
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen and not (encoded and not parameter.is_floating_point()):
                total += parameter.numel()
            seen.add(id(parameter))
    return total


def _matches(name: str, targets: str | tuple[str, ...]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def _stacks(model: nn.Module) -> list[str]:
    """Returns the names of a model's stacks of experts, dense or encoded."""
    found = [name for name, module in model.named_modules() if isinstance(module, ExpertStack)]
    return found + [f"{name}.{key}" for name, module in model.named_modules() for key in expert_weights(module)]


def _check_each(what: str, targets: str | tuple[str, ...], names: list[str], kind: str, stacks: Sequence[str] = ()) -> None:
    """ValueError for an expression that is none, or for a target that matches no name, or only stacks of experts."""
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"add_lora: {what} is no regular expression: {targets!r} ({error})") from error
    for target in (targets,) if isinstance(targets, str) else targets:
        if not any(_matches(name, target if isinstance(targets, str) else (target,)) for name in names):
            stack = next((n for n in stacks if _matches(n, target if isinstance(targets, str) else (target,))), None)
            if stack is not None:
                raise ValueError(f"add_lora: {what} {target!r} is {stack}, a stack of experts; no adapters are made on those")
            known = sorted({name.rpartition(".")[2] for name in names})
            close = difflib.get_close_matches(target, [*known, *names], n=3, cutoff=0.4) or known[:8]
            raise ValueError(f"add_lora: {what} {target!r} matches no {kind}; close names: {', '.join(close)}")


def _in_layers(name: str, layers: tuple[int, ...] | None) -> bool:
    number = next((int(part) for part in name.split(".") if part.isdigit()), None)
    return layers is None or number in layers


def _find_targets(model: nn.Module, linears: list[str], saved: dict[str, nn.Module], config: LoRAConfig) -> list[str]:
    """Returns the names that the config selects; ValueError for a part of it that selects none."""
    inside = tuple(f"{name}." for name in saved)
    names = [name for name in linears if name not in saved and not name.startswith(inside)]
    if config.targets == ALL_LINEAR:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        head = {name for name, module in model.named_modules() if output is not None and module is output}
        chosen = [name for name in names if name.rpartition(".")[2] != "lm_head" and name not in head]
    else:
        _check_each("target", config.targets, names, "linear layer", _stacks(model))
        chosen = [name for name in names if _matches(name, config.targets)]
    if config.exclude:
        _check_each("exclude", config.exclude, linears, "linear layer")
        chosen = [name for name in chosen if not _matches(name, config.exclude)]
    for layer in config.layers or ():
        if not any(_in_layers(name, (layer,)) for name in chosen):
            raise ValueError(f"add_lora: layers names block {layer}, and no target is in one of that number")
    chosen = [name for name in chosen if _in_layers(name, config.layers)]
    if not chosen:
        raise ValueError("add_lora: exclude leaves no layer to adapt")
    for key in (*config.rank_pattern, *config.alpha_pattern):
        if not any(_first_match({key: True}, name, False) for name in chosen):
            raise ValueError(f"add_lora: the pattern {key!r} matches no layer that gets an adapter")
    return chosen


def saved_modules(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """Returns the modules that config.modules_to_save names, by name, in the order of the modules."""
    return {name: module for name, module in model.named_modules() if name and _matches(name, config.modules_to_save)}


def _check_saved(model: nn.Module, saved: dict[str, nn.Module], config: LoRAConfig) -> None:
    _check_each("modules_to_save", config.modules_to_save, [name for name, _ in model.named_modules() if name], "module")
    for name, module in saved.items():
        frozen = [key for key, p in module.named_parameters() if not p.is_floating_point()]
        if frozen or not any(True for _ in module.parameters()):
            why = f"{frozen[0]} is encoded: leave it dense with quantize_model's skip" if frozen else "it has no parameter"
            raise ValueError(f"add_lora: {name} of modules_to_save cannot be trained: {why}")
        if any(other != name and other.startswith(f"{name}.") for other in saved):
            raise ValueError(f"add_lora: {name} of modules_to_save holds another one")


def _made(
    model: nn.Module, config: LoRAConfig, generator: torch.Generator | None, dense: Callable[[str], Tensor] | None
) -> Adapter:
    """Returns the adapter that a config asks for, made of a model that has none in use; the model is left as it is."""
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("add_lora: the model has adapters already, which add_lora did not put there; load a fresh base")
    linears = {name: module for name, module in model.named_modules() if name and features(module) is not None}
    if not linears:
        raise ValueError(f"add_lora: {type(model).__name__} has no linear layer to adapt")
    saved = saved_modules(model, config)
    _check_saved(model, saved, config)
    wrappers: dict[str, nn.Module] = {}
    for name in _find_targets(model, list(linears), saved, config):
        original = None if dense is None else dense(name)
        wrappers[name] = LoRALinear(linears[name], config.of_layer(name), generator=generator, dense=original)
    whole = {name: copy.deepcopy(module).requires_grad_(True) for name, module in saved.items()}
    return Adapter(config, wrappers, whole)


def add_lora(
    model: nn.Module,
    config: LoRAConfig,
    *,
    seed: int | None = None,
    dense: Callable[[str], Tensor] | None = None,
    name: str = DEFAULT,
) -> AdapterReport:
    """Returns a report, having frozen the model and wrapped every target layer in a LoRALinear, in place.

    Sets `model.lora_config`. Layers that hold an encoded or dense weight are treated alike. An adapter of another name that
    was in use waits until `set_adapter` names it again.

    Args:
        model: any module with linear layers. config: rank, targets and start.
        seed: for the random start of the adapters; None draws from PyTorch's global generator.
        dense: gives the weight (out_features, in_features), of any device, that the layer of a name was encoded from; for
            the start "loftq", and only for it.
        name: of the adapter, where the model is to have several.

    Raises:
        ValueError: the model has adapters of that name already, or a target matches no linear layer (close names are
            given), a module to save is encoded, a start that needs the base's weight and it is on meta, "loftq" without
            dense; the model is unchanged.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> print(qlite.add_lora(model, qlite.LoRAConfig(r=4)))
        LoRA on 1 layers: trainable 512 of 4,672 (10.959 %)
    """
    present = adapters_of(model)
    if name in present.adapters:
        raise ValueError(
            f"add_lora: the model has adapters already, named {name!r}; give these another name, delete_adapter or "
            "merge_adapter first, or load a fresh base"
        )
    if (config.init == "loftq") != (dense is not None):
        raise ValueError(f"add_lora: init is {config.init!r}; dense goes with 'loftq', which cannot do without it")
    with contextlib.ExitStack() as undo:
        undo.callback(set_adapter, model, present.active)
        set_adapter(model, None)
        adapter = _made(model, config, None if seed is None else torch.Generator().manual_seed(seed), dense)
        undo.pop_all()
    model.requires_grad_(False)
    insert(model, name, adapter)
    trainable = sum(parameter.numel() for parameter in lora_parameters(model))
    of = _count_parameters(model)
    return AdapterReport(tuple(adapter.wrappers), trainable, of, tuple(adapter.whole), tuple(_stacks(model)))


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns what the model's adapter in use trains, in the order of the modules: lora_A, lora_B and, under DoRA, magnitude of
    each layer, then the parameters of the modules that are saved whole.

    Raises:
        ValueError: the model has no adapter in use.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> report = qlite.add_lora(model, qlite.LoRAConfig(r=4))
        >>> len(qlite.lora_parameters(model))
        2
    """
    adapted = [module for module in model.modules() if isinstance(module, LoRALinear)]
    chosen("lora_parameters", model, None)
    if not adapted:
        raise ValueError(f"lora_parameters: {type(model).__name__} has no adapters; call add_lora first")
    found = [p for module in adapted for p in (module.lora_A, module.lora_B, module.magnitude) if p is not None]
    config: LoRAConfig = model.lora_config  # type: ignore[assignment]
    return found + [p for module in saved_modules(model, config).values() for p in module.parameters()]

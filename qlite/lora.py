"""Low-rank adapters beside frozen layers: y = base(x) + (alpha / r) * B A dropout(x).

Hu et al., LoRA (arXiv 2106.09685), section 4.1. The wrapper is blind to what it wraps: anything with `in_features`,
`out_features` and a call, dense or encoded. A starts uniform and B at zero, so an untrained adapter changes nothing. The
adapter weights are float32 whatever the base computes in; the products run in the dtype of x.

Not done here: files (adapters.py), merging a whole model (merge.py), DoRA and other relatives.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which layers get an adapter, and of what size.

    Attributes:
        r: rank, >= 1. alpha: the adapter's output is scaled by alpha / r. dropout: probability on the adapter's input.
        targets: "all-linear" (every linear layer but the output head; the default, since adapters on all of a block's
            layers are what matches full fine-tuning: arXiv 2305.14314, section 4), a list of exact names or last parts
            of dotted names, or any other string: a regular expression that must match the whole name.

    Raises:
        ValueError: r < 1, alpha not finite and positive, dropout outside [0, 1), or no targets.
        TypeError: r is not an int.

    Example:
        >>> qlite.LoRAConfig(r=8, targets=["query_key_value"]).scaling
        4.0
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: str | tuple[str, ...] = ALL_LINEAR

    def __post_init__(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool):
            raise TypeError(f"LoRAConfig: r is {self.r!r}; wanted an int")
        if self.r < 1:
            raise ValueError(f"LoRAConfig: r is {self.r}; wanted at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"LoRAConfig: alpha is {self.alpha}; wanted a finite number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRAConfig: dropout is {self.dropout}; wanted 0 <= dropout < 1")
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        if not self.targets:
            raise ValueError("LoRAConfig: targets is empty; name layers, or use 'all-linear'")

    @classmethod
    def qlora_2023(cls) -> LoRAConfig:
        """Returns the widely copied Falcon recipe of 2023: r=16, alpha=32, dropout 0.05 on query_key_value alone."""
        return cls(targets=("query_key_value",))

    @property
    def scaling(self) -> float:
        """The factor on the adapter's output, alpha / r."""
        return self.alpha / self.r


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank update.

    Args:
        base: a module with in_features, out_features and a call on (..., in_features).
        config: rank, scale and dropout.
        generator: for the random start of A (CPU), or None for PyTorch's global one.

    Attributes:
        base: the wrapped layer. lora_A: float32 Parameter (r, in_features). lora_B: float32 Parameter (out_features, r).

    Source: arXiv 2106.09685, section 4.1, eq. 3.

    Example:
        >>> layer = qlite.LoRALinear(torch.nn.Linear(64, 32), qlite.LoRAConfig(r=4))
        >>> layer.lora_A.shape, layer.lora_B.shape
        (torch.Size([4, 64]), torch.Size([32, 4]))
    """

    def __init__(self, base: nn.Module, config: LoRAConfig, *, generator: torch.Generator | None = None):
        super().__init__()
        self.base = base
        self.in_features: int = base.in_features  # type: ignore[assignment]
        self.out_features: int = base.out_features  # type: ignore[assignment]
        self.scaling = config.scaling
        self.dropout = nn.Dropout(config.dropout)
        device = next(base.parameters()).device
        # Kaiming's bound with a = sqrt(5), which the reference implementation of LoRA uses, is 1 / sqrt(in_features).
        bound = 1 / math.sqrt(self.in_features)
        start = torch.rand(config.r, self.in_features, generator=generator, dtype=torch.float32)
        self.lora_A = nn.Parameter(((start * 2 - 1) * bound).to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, config.r, device=device, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Returns base(x) + scaling * B A dropout(x), (..., out_features), in the dtype of base(x)."""
        result = self.base(x)
        # Cast to what the base computed in: under autocast that is not the dtype of x.
        low_rank = nn.functional.linear(self.dropout(x).to(result.dtype), self.lora_A.to(result.dtype))
        update = nn.functional.linear(low_rank, self.lora_B.to(result.dtype))
        return result + update * self.scaling

    def merged(self, dense: Tensor) -> Tensor:
        """Returns the weight that does what base and adapter do together, float32 (out_features, in_features).

        Args:
            dense: the weight of the base, (out_features, in_features).
        """
        return dense.float() + (self.lora_B @ self.lora_A) * self.scaling

    def extra_repr(self) -> str:
        """Returns what `print(module)` shows beside the children."""
        return f"r={self.lora_A.shape[0]}, scaling={self.scaling:g}"


@dataclasses.dataclass(frozen=True)
class AdapterReport:
    """What `add_lora` did; `print` it.

    Attributes:
        targets: names of the layers that carry an adapter.
        trainable: trainable parameters. total: all parameters, a 4-bit weight counted as the weights it stands for.
    """

    targets: tuple[str, ...]
    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        return f"LoRA on {len(self.targets)} layers: trainable {self.trainable:,} of {self.total:,} ({share:.3f} %)"


def _is_linear(module: nn.Module) -> bool:
    in_features, out_features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    # torch's own attention reads the weight of its output layer, which a wrapper has not.
    others = isinstance(module, (nn.Bilinear, NonDynamicallyQuantizableLinear))
    return isinstance(in_features, int) and isinstance(out_features, int) and not others


def _count_parameters(model: nn.Module) -> int:
    """Returns the number of logical parameters: an encoded linear counts out * in, and its scales count nothing."""
    total: int = 0
    seen: set[int] = set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        encoded = _is_linear(module) and isinstance(weight, Tensor) and not weight.is_floating_point()
        if encoded:
            total += int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen and not (encoded and not parameter.is_floating_point()):
                total += parameter.numel()
            seen.add(id(parameter))
    return total


def _matches(name: str, targets: str | tuple[str, ...]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def _find_targets(linears: dict[str, nn.Module], config: LoRAConfig) -> list[str]:
    """Returns the names that config.targets selects; ValueError for a target that selects none."""
    targets = config.targets
    if targets == ALL_LINEAR:
        return [name for name in linears if name.rpartition(".")[2] != "lm_head"]
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"add_lora: targets is no regular expression: {targets!r} ({error})") from error
    for target in (targets,) if isinstance(targets, str) else targets:
        if not any(_matches(name, target if isinstance(targets, str) else (target,)) for name in linears):
            known = sorted({name.rpartition(".")[2] for name in linears})
            close = difflib.get_close_matches(target, [*known, *linears], n=3, cutoff=0.4) or known[:8]
            raise ValueError(f"add_lora: target {target!r} matches no linear layer; close names: {', '.join(close)}")
    return [name for name in linears if _matches(name, targets)]


def add_lora(model: nn.Module, config: LoRAConfig, *, seed: int | None = None) -> AdapterReport:
    """Returns a report, having frozen the model and wrapped every target layer in a LoRALinear, in place.

    Sets `model.lora_config`. Layers that hold an encoded or dense weight are treated alike.

    Args:
        model: any module with linear layers. config: rank and targets.
        seed: for the random start of the adapters; None draws from PyTorch's global generator.

    Raises:
        ValueError: the model has adapters already, or a target matches no linear layer (close names are given).

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> print(qlite.add_lora(model, qlite.LoRAConfig(r=4)))
        LoRA on 1 layers: trainable 512 of 4,672 (10.959 %)
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("add_lora: the model has adapters already; load a fresh base, or merge_adapter first")
    linears = {name: module for name, module in model.named_modules() if name and _is_linear(module)}
    if not linears:
        raise ValueError(f"add_lora: {type(model).__name__} has no linear layer to adapt")
    names = _find_targets(linears, config)
    model.requires_grad_(False)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for name in names:
        parent, _, child = name.rpartition(".")
        adapted = LoRALinear(linears[name], config, generator=generator).train(linears[name].training)
        setattr(model.get_submodule(parent), child, adapted)
    model.lora_config = config  # type: ignore[assignment]
    trainable = sum(parameter.numel() for parameter in lora_parameters(model))
    return AdapterReport(tuple(names), trainable, _count_parameters(model))


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the adapters' parameters, lora_A before lora_B, in the order of the modules.

    Raises:
        ValueError: the model has no adapter.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> report = qlite.add_lora(model, qlite.LoRAConfig(r=4))
        >>> len(qlite.lora_parameters(model))
        2
    """
    adapted = [module for module in model.modules() if isinstance(module, LoRALinear)]
    if not adapted:
        raise ValueError(f"lora_parameters: {type(model).__name__} has no adapters; call add_lora first")
    return [parameter for module in adapted for parameter in (module.lora_A, module.lora_B)]

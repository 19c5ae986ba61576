"""What counts as a linear layer: nn.Linear, whatever has its sizes, and transformers' Conv1D.

Not done here: anything with such a layer (quantize.py encodes it, lora.py puts an adapter beside it).
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, GPT-2's linear layer: sizes nx and nf, a weight (nx, nf), x @ weight."""
    sizes, weight = (getattr(module, "nx", None), getattr(module, "nf", None)), module._parameters.get("weight")
    return any(c.__name__ == "Conv1D" for c in type(module).__mro__) and weight is not None and tuple(weight.shape) == sizes


def features(module: nn.Module) -> tuple[int, int] | None:
    """Returns `(in_features, out_features)` of a linear layer, or None for another module.

    transformers' Conv1D, which keeps its weight as (in_features, out_features), is a linear layer too.
    """
    # torch's own attention reads the weight of its output layer, which a wrapper has not.
    if isinstance(module, (nn.Bilinear, NonDynamicallyQuantizableLinear)):
        return None
    if is_conv1d(module):
        weight: Any = module.weight
        return tuple(weight.shape)
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return sizes if isinstance(sizes[0], int) and isinstance(sizes[1], int) else None  # type: ignore[return-value]

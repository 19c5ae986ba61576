"""Adapters merged into the dense weights of their base."""

from __future__ import annotations

import torch
from torch import nn

from qlite.adapters import adapted_layers
from qlite.linear import QuantizedLinear


@torch.no_grad()
def merge_adapter(model: nn.Module) -> nn.Module:
    """Returns the model, its adapted layers replaced in place by dense ones of weight `base + scaling * B A`.

    The base is the decoded weight that the adapter was trained on; the sum is made in float32 and rounded once to the
    dtype of the base. Layers without an adapter stay as they are, encoded ones encoded. The model is another base now: it
    loses `base_fingerprint` and `base_id`.

    Raises:
        ValueError: the model has no adapters. TypeError: an adapter on a layer that is neither dense nor encoded.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> report = qlite.add_lora(model, qlite.LoRAConfig(r=2))
        >>> type(qlite.merge_adapter(model)[0]).__name__
        'Linear'
    """
    adapted = adapted_layers(model)
    if not adapted:
        raise ValueError(f"merge_adapter: {type(model).__name__} has no adapters")
    for name, module in adapted.items():
        if not isinstance(module.base, (QuantizedLinear, nn.Linear)):
            raise TypeError(f"merge_adapter: {name} adapts a {type(module.base).__name__}; wanted a linear layer")
    for name, module in adapted.items():
        base = module.base
        assert isinstance(base, (QuantizedLinear, nn.Linear))
        dense = base.dequantize() if isinstance(base, QuantizedLinear) else base.weight
        merged = nn.Linear(base.in_features, base.out_features, bias=False, device="meta", dtype=dense.dtype)
        merged.weight = nn.Parameter(module.merged(dense).to(dense.dtype), requires_grad=False)
        merged.bias = base.bias  # type: ignore[assignment]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, merged.train(module.training))
    for attribute in ("lora_config", "base_fingerprint", "base_id"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    return model

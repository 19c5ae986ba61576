"""What AdamW keeps for a parameter: names, shapes and dtypes of the state, and checks of it and of the settings.

Not done here: the step (adamw_8bit.py), and where the state lives (optim.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

#: The code of 0.0 in the signed table.
SIGNED_ZERO_CODE = 127
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SETTINGS = ("lr", "betas", "eps", "weight_decay", "block_size", "min_8bit_size")
#: For each name of a parameter's state its shape and dtype.
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def layout(param: Tensor, block_size: int, *, encoded: bool) -> Layout:
    """Returns what the state of a parameter looks like, apart from its step."""
    shape = tuple(param.shape)
    if not encoded:
        return {"exp_avg": (shape, torch.float32), "exp_avg_sq": (shape, torch.float32)}
    blocks = (-(-param.numel() // block_size),)
    return {
        "exp_avg": (shape, torch.uint8),
        "exp_avg_absmax": (blocks, torch.float32),
        "exp_avg_sq": (shape, torch.uint8),
        "exp_avg_sq_absmax": (blocks, torch.float32),
    }


def layout_of(entry: Mapping[str, Any]) -> Layout:
    """Returns the layout of a state that exists."""
    return {name: (tuple(value.shape), value.dtype) for name, value in entry.items() if name != "step"}


def resident(param: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Returns zeros of a layout on the device of the parameter."""
    return {name: torch.zeros(shape, dtype=dtype, device=param.device) for name, (shape, dtype) in layout.items()}


def check_scale(scale: Any, who: str) -> None:
    """Raises TypeError or ValueError unless a scale of gradients is None or one float32."""
    if scale is not None and not (isinstance(scale, Tensor) and scale.dtype == torch.float32):
        found = scale.dtype if isinstance(scale, Tensor) else type(scale).__name__
        raise TypeError(f"{who}: grad_scale is {found}; wanted None or a float32 tensor")
    if scale is not None and scale.numel() != 1:
        raise ValueError(f"{who}: grad_scale has {scale.numel()} elements; wanted one")


def check_dtype(param: Tensor, where: str) -> None:
    """Raises TypeError for a parameter of a dtype not offered."""
    if param.dtype not in DTYPES:
        raise TypeError(
            f"8-bit AdamW: {where}, is {param.dtype}; wanted float32, bfloat16 or float16. Use torch.optim.AdamW for it"
        )


def check_settings(group: Mapping[str, Any], who: str) -> None:
    """Raises ValueError for a setting that is missing or out of range."""
    missing = [name for name in SETTINGS if name not in group]
    if missing:
        raise ValueError(f"{who}: a group has no {', '.join(missing)}; wanted the state of AdamW8bit or PagedAdamW8bit")
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{who}: {name} is {value!r}; wanted a finite number, 0 or more")
    betas = group["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{who}: betas are {betas!r}; wanted two numbers, 0 <= beta < 1")
    for name, least in (("block_size", 1), ("min_8bit_size", 0)):
        value = group[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{who}: {name} is {value!r}; wanted a whole number, {least} or more")


def check_state(param: Tensor, entry: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """Raises ValueError for a loaded state that does not fit its parameter."""
    encoded = "exp_avg_absmax" in entry
    wanted = layout(param, group["block_size"], encoded=encoded)
    if set(entry) != {"step", *wanted}:
        raise ValueError(
            f"8-bit AdamW: a loaded state holds {sorted(entry)}; wanted {sorted(['step', *wanted])}, as AdamW8bit or "
            "PagedAdamW8bit saves them"
        )
    for name, (shape, dtype) in wanted.items():
        value = entry[name]
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise ValueError(
                f"8-bit AdamW: the loaded {name} of a parameter of shape {tuple(param.shape)} is {value.dtype} "
                f"{tuple(value.shape)}; wanted {dtype} {shape}"
            )
    if int(entry["step"]) < 0:
        raise ValueError(f"8-bit AdamW: the loaded step is {entry['step']}; wanted 0 or more")

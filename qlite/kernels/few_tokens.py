"""Triton kernels around the products of a few tokens, where each launch costs more than its work: LayerNorm, LoRA's update.

    y = (x - mean) / sqrt(variance + eps) * weight + bias          a program a row
    out = y + scaling * (x @ A.T) @ B.T                             a program an element of x @ A.T, then one for some columns

Sums are float32; A and B stay float32, and what they give is rounded once, to the dtype of y.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlite.kernels.int8_codec import to_output

#: Columns of x that a program multiplies at a time, and columns of y that one adds to.
STRIP, COLUMNS = 2048, 64


@triton.jit
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, columns, eps, BLOCK: tl.constexpr, ROUND_BFLOAT16: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=there, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / columns
    x = tl.where(there, x - mean, 0.0)
    scale = tl.math.rsqrt(tl.sum(x * x, axis=0) / columns + eps)
    weight = tl.load(weight_ptr + column, mask=there, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=there, other=0.0).to(tl.float32)
    y = x * scale * weight + bias
    tl.store(y_ptr + row * columns + column, to_output(y, ROUND_BFLOAT16, y_ptr.dtype.element_ty), mask=there)


@triton.jit
def _lora_down_kernel(x_ptr, a_ptr, low_ptr, columns, rank, STRIP: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0)
    x_ptr += row * columns
    a_ptr += place * columns
    column = tl.arange(0, STRIP)
    total = tl.zeros([STRIP], dtype=tl.float32)
    first = 0
    while first < columns:  # the interpreter of Triton 3.6 takes no range of an argument
        there = first + column < columns
        x = tl.load(x_ptr + first + column, mask=there, other=0.0).to(tl.float32)
        total += x * tl.load(a_ptr + first + column, mask=there, other=0.0)
        first += STRIP
    tl.store(low_ptr + row * rank + place, tl.sum(total, axis=0))


@triton.jit
def _lora_up_kernel(
    y_ptr, low_ptr, b_ptr, out_ptr, columns, rank, scaling,
    COLUMNS: tl.constexpr, RANK: tl.constexpr, ADD: tl.constexpr, ROUND_BFLOAT16: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, RANK)
    there = column < columns
    low = tl.load(low_ptr + row * rank + place, mask=place < rank, other=0.0)
    inside = there[:, None] & (place < rank)[None]
    b = tl.load(b_ptr + column[:, None] * rank + place[None], mask=inside, other=0.0)
    y = tl.sum(b * low[None], axis=1) * scaling
    if ADD:
        y += tl.load(y_ptr + row * columns + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * columns + column, to_output(y, ROUND_BFLOAT16, out_ptr.dtype.element_ty), mask=there)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Returns the LayerNorm of x over its last dimension, all of a row in registers, in the dtype of x.

    Args:
        x: (..., columns), float32, float16 or bfloat16. weight, bias: (columns,), contiguous.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    columns = x.shape[-1]
    if x.numel():
        _layer_norm_kernel[(x.numel() // columns,)](
            x, weight, bias, y, columns, eps, BLOCK=triton.next_power_of_2(columns), num_warps=8,
            enable_fp_fusion=False,  # or a sum across threads, whose first step is x * x + y * y, differs between the two
            ROUND_BFLOAT16=x.dtype == torch.bfloat16 and not x.is_cuda,
        )  # fmt: skip
    return y


def lora_add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Returns `y + scaling * (x @ a.T) @ b.T` in the dtype of y.

    Args:
        y: (..., out_features). x: (..., in_features), the same rows. a: float32 (r, in_features). b: float32
            (out_features, r). All contiguous.
    """
    return _update(torch.empty_like(y), y, x, a, b, scaling)


def lora_update(x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Returns `scaling * (x @ a.T) @ b.T` in float32; arguments as in `lora_add`."""
    return _update(x.new_empty(*x.shape[:-1], b.shape[0], dtype=torch.float32), None, x, a, b, scaling)


def _update(out: Tensor, y: Tensor | None, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    rows, (rank, in_features), out_features = x.numel() // max(1, x.shape[-1]), a.shape, b.shape[0]
    if not out.numel():
        return out
    low = torch.empty(rows, rank, dtype=torch.float32, device=x.device)
    _lora_down_kernel[(rank, rows)](x, a, low, in_features, rank, STRIP=STRIP, num_warps=8)
    _lora_up_kernel[(triton.cdiv(out_features, COLUMNS), rows)](
        y, low, b, out, out_features, rank, scaling, COLUMNS=COLUMNS, RANK=triton.next_power_of_2(rank), ADD=y is not None,
        num_warps=4, enable_fp_fusion=False, ROUND_BFLOAT16=out.dtype == torch.bfloat16 and not out.is_cuda,
    )  # fmt: skip
    return out

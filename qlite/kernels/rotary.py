"""The Triton kernel of rotary positions, equal to rotary.rotate bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlite.kernels.int8_codec import to_output

#: Pairs that a program turns, of one token.
PAIRS = 1024


@triton.jit
def _rounded(value, ROUND_BFLOAT16: tl.constexpr, OUT: tl.constexpr):
    """Rounds float32 to OUT and back: what a product or sum of its own would have been."""
    return to_output(value, ROUND_BFLOAT16, OUT).to(tl.float32)


@triton.jit
def _rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, heads, group, tokens, batch_stride,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, HEADS: tl.constexpr, ROUND_BFLOAT16: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF_BLOCK)[None]
    there = (head < heads) & (column < HALF)
    first = (row * heads + head) * (2 * HALF) + column
    a = tl.load(x_ptr + first, mask=there, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + first + HALF, mask=there, other=0.0).to(tl.float32)
    angle = row // tokens * batch_stride + row % tokens * HALF + column
    cos = tl.load(cos_ptr + angle, mask=column < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=column < HALF, other=0.0).to(tl.float32)
    c = _rounded(a * cos, ROUND_BFLOAT16, out_ptr.dtype.element_ty) - _rounded(
        b * sin, ROUND_BFLOAT16, out_ptr.dtype.element_ty
    )
    d = _rounded(b * cos, ROUND_BFLOAT16, out_ptr.dtype.element_ty) + _rounded(
        a * sin, ROUND_BFLOAT16, out_ptr.dtype.element_ty
    )
    value = head % group == group - 1
    tl.store(out_ptr + first, to_output(tl.where(value, a, c), ROUND_BFLOAT16, out_ptr.dtype.element_ty), mask=there)
    tl.store(out_ptr + first + HALF, to_output(tl.where(value, b, d), ROUND_BFLOAT16, out_ptr.dtype.element_ty), mask=there)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns x, contiguous, with the heads of each group turned, all but the last one.

    Args:
        x: (B, T, groups, heads of a group, D), or more dimensions before B; float32, float16 or bfloat16.
        cos, sin: (B or 1, T, D/2), of that dtype.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    if not x.numel():
        return out
    tokens, groups, group, size = x.shape[-4:]
    batch = x.shape[:-4].numel()
    if cos.shape[0] != 1:
        cos, sin = (table.expand(*x.shape[:-4], *table.shape[1:]) for table in (cos, sin))
    cos, sin = cos.contiguous(), sin.contiguous()
    half_block = triton.next_power_of_2(size // 2)
    heads = max(1, PAIRS // half_block)
    _rotate_kernel[(batch * tokens, triton.cdiv(groups * group, heads))](
        x, cos, sin, out, groups * group, group, tokens, 0 if cos.shape[0] == 1 else tokens * (size // 2),
        HALF=size // 2, HALF_BLOCK=half_block, HEADS=heads, ROUND_BFLOAT16=x.dtype == torch.bfloat16 and not x.is_cuda,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out

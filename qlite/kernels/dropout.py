"""The Triton kernel of dropout by seed and position, equal to dropout.dropout bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlite.kernels.int8_codec import to_output

BLOCK = 2048


@triton.jit
def _dropout_kernel(
    x_ptr, out_ptr, seed_ptr, count, threshold, scale,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, ROUND_BFLOAT16: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    if WIDE:
        first = first.to(tl.int64)
    counter = first * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32) if WIDE else low * 0
    a, b, c, d = tl.philox(tl.load(seed_ptr), low, high, low * 0, low * 0)
    numbers = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK])
    position = first * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + position, mask=position < count, other=0.0).to(tl.float32) * scale
    kept = tl.where((numbers >> 1).to(tl.int32, bitcast=True) >= threshold, value, 0.0)
    tl.store(out_ptr + position, to_output(kept, ROUND_BFLOAT16, out_ptr.dtype.element_ty), mask=position < count)


def dropout(x: Tensor, seed: Tensor, p: float, threshold: int) -> Tensor:
    """Returns x with a share p of its elements set to zero and the others divided by 1 - p; as the reference.

    Args:
        x: float32, float16 or bfloat16, any shape. seed: int64 (1,). threshold: of 31 bits, see the reference.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    if not x.numel():
        return out
    _dropout_kernel[(triton.cdiv(x.numel(), BLOCK),)](
        x, out, seed, x.numel(), threshold, 1 / (1 - p),
        BLOCK=BLOCK, WIDE=x.numel() >= 2**31 - BLOCK, ROUND_BFLOAT16=not x.is_cuda and x.dtype == torch.bfloat16,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out

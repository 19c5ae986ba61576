"""Triton kernels that encode and decode rows of int8, equal to int8.quantize_absmax and int8.dequantize_absmax bit for bit.

    code = round_half_even(x * ((1 / absmax) * 127)),    absmax = max |x| over a row
    x_hat = round_to_dtype(code * (absmax / 127))

Layout, with R rows and C columns: x (R, C), its columns adjacent; codes int8 (R, C) and absmax float32 (R, 1), contiguous.
Each operation is rounded on its own: compiled without contraction to fused multiply-add.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Columns that quantize_rows holds in registers at once; a longer row is read twice, a share of it at a time.
WHOLE_ROW, SHARE = 32768, 8192


@triton.jit
def to_output(value, ROUND_BFLOAT16: tl.constexpr, OUT: tl.constexpr):
    """Rounds float32 to OUT; Triton's interpreter would truncate to bfloat16, so there the rounding is done on integers."""
    if ROUND_BFLOAT16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), value)
    return value.to(OUT)


@triton.jit
def _quantize_kernel(x_ptr, codes_ptr, absmax_ptr, columns, row_stride, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * row_stride
    codes_ptr += row * columns
    column = tl.arange(0, BLOCK)
    value = tl.load(x_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    # Of magnitudes the bits have the order of the numbers, and NaN comes last: no maximum loses it.
    largest = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if not WHOLE:
        for start in range(BLOCK, columns, BLOCK):
            more = tl.load(x_ptr + start + column, mask=start + column < columns, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, more.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    absmax = tl.max(largest, axis=0).to(tl.float32, bitcast=True)
    tl.store(absmax_ptr + row, absmax)
    # The numbers are those of int8.quantize_absmax: 2^-100 and 2^100.
    boost = tl.where(absmax < 7.888609052210118e-31, 1.2676506002282294e30, 1.0)
    factor = tl.math.div_rn(1.0, tl.maximum(absmax * boost, 7.888609052210118e-31)) * 127.0
    # Added to 1.5 * 2^23 a share is rounded half to even, and its low byte is the code.
    code = (value * boost * factor + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    tl.store(codes_ptr + column, code, mask=column < columns)
    if not WHOLE:
        for start in range(BLOCK, columns, BLOCK):
            more = tl.load(x_ptr + start + column, mask=start + column < columns, other=0.0).to(tl.float32)
            code = (more * boost * factor + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
            tl.store(codes_ptr + start + column, code, mask=start + column < columns)


@triton.jit
def _dequantize_kernel(
    codes_ptr, absmax_ptr, out_ptr, columns, BLOCK: tl.constexpr, ROUND_BFLOAT16: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.math.div_rn(tl.load(absmax_ptr + row), 127.0)
    code = tl.load(codes_ptr + row * columns + column, mask=column < columns, other=0)
    value = to_output(code.to(tl.float32) * scale, ROUND_BFLOAT16, out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * columns + column, value, mask=column < columns)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `(codes, absmax)` of x (M, K); see int8.quantize_absmax. Of a row that is not finite, absmax is not either."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows, columns = x.shape
    codes = torch.empty((rows, columns), dtype=torch.int8, device=x.device)
    absmax = torch.zeros((rows, 1), dtype=torch.float32, device=x.device)
    if codes.numel():
        block = triton.next_power_of_2(columns) if columns <= WHOLE_ROW else SHARE
        _quantize_kernel[(rows,)](
            x, codes, absmax, columns, x.stride(0), BLOCK=block, WHOLE=block >= columns,
            num_warps=min(32, max(1, block // 1024)), enable_fp_fusion=False,
        )  # fmt: skip
    return codes, absmax


def dequantize(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns contiguous codes (N, K) of scales absmax (N, 1) decoded into a float dtype; see int8.dequantize_absmax."""
    rows, columns = codes.shape
    out = torch.empty((rows, columns), dtype=dtype, device=codes.device)
    if out.numel():
        block = min(triton.next_power_of_2(columns), 4096)
        _dequantize_kernel[(rows, triton.cdiv(columns, block))](
            codes, absmax, out, columns, BLOCK=block, ROUND_BFLOAT16=dtype == torch.bfloat16 and not out.is_cuda,
            num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return out

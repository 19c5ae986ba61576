"""Triton kernels that encode and decode 4-bit weights, equal to nf4.quantize and nf4.dequantize bit for bit.

    absmax = max |w| over a block;    code = order[count(midpoints < w * (1 / absmax))]
    w_hat  = round_to_dtype(levels[code] * absmax),    absmax = dynamic_levels[code8] * scale + offset

Layout, with R rows, C columns and B = ceil(C / BLOCK) blocks a row: weight (R, C); codes uint8 (R, ceil(C / 2)), the first
of a pair in the high nibble; absmax (R, B) float32, or uint8 with scale float32 (ceil(R * B / 256),) and offset float32
(1,). A program works on a few whole blocks, numbered along the rows, so that one absmax is read per block, not per weight.

Multiplications and additions must stay two roundings: the kernels are compiled without contraction to fused
multiply-add. Triton's interpreter truncates float32 to bfloat16, so there the rounding is done on integers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlite.dynamic8 import SMALLEST_DIVISOR, dynamic_levels_on

ABSMAX_BLOCK = 256
#: Weights that one program encodes or decodes.
TILE = 4096


@triton.jit
def _to_bfloat16_bits(value):
    """Rounds float32 to the nearest bfloat16, ties to even, and returns it as float32 (finite input)."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def _quantize_kernel(
    weight_ptr, midpoints_ptr, order_ptr, codes_ptr, absmax_ptr,
    columns, row_stride, column_stride, blocks_a_row, blocks, smallest,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    row = block // blocks_a_row
    first = (block % blocks_a_row) * BLOCK
    column = first[:, None] + tl.arange(0, BLOCK)[None, :]
    inside = (block < blocks)[:, None] & (column < columns)
    value = tl.load(weight_ptr + row[:, None] * row_stride + column * column_stride, mask=inside, other=0.0)
    value = value.to(tl.float32)
    absmax = tl.max(tl.abs(value), axis=1)
    tl.store(absmax_ptr + block, absmax, mask=block < blocks)
    share = value * tl.math.div_rn(1.0, tl.maximum(absmax, smallest))[:, None]
    rank = tl.zeros([BLOCKS, BLOCK], dtype=tl.int32)
    for index in tl.static_range(15):
        rank += (share > tl.load(midpoints_ptr + index)).to(tl.int32)
    code = tl.load(order_ptr + rank).to(tl.uint8)
    high, low = tl.split(tl.reshape(code, [BLOCKS, BLOCK // 2, 2]))
    byte_column = first[:, None] // 2 + tl.arange(0, BLOCK // 2)[None, :]
    bytes_a_row = (columns + 1) // 2
    inside = (block < blocks)[:, None] & (byte_column < bytes_a_row)
    tl.store(codes_ptr + row[:, None] * bytes_a_row + byte_column, (high << 4) | low, mask=inside)


@triton.jit
def _dequantize_kernel(
    codes_ptr, absmax_ptr, scale_ptr, offset_ptr, dynamic_ptr, levels_ptr, out_ptr,
    columns, blocks_a_row, blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, DOUBLE_QUANT: tl.constexpr, ABSMAX_BLOCK: tl.constexpr,
    ROUND_BFLOAT16: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    row = block // blocks_a_row
    first = (block % blocks_a_row) * BLOCK
    absmax = tl.load(absmax_ptr + block, mask=block < blocks, other=0)
    if DOUBLE_QUANT:
        scale = tl.load(scale_ptr + block // ABSMAX_BLOCK, mask=block < blocks, other=0.0)
        absmax = tl.load(dynamic_ptr + absmax.to(tl.int32)) * scale + tl.load(offset_ptr)
    byte_column = first[:, None] // 2 + tl.arange(0, BLOCK // 2)[None, :]
    bytes_a_row = (columns + 1) // 2
    inside = (block < blocks)[:, None] & (byte_column < bytes_a_row)
    pair = tl.load(codes_ptr + row[:, None] * bytes_a_row + byte_column, mask=inside, other=0).to(tl.int32)
    high = tl.load(levels_ptr + (pair >> 4)) * absmax[:, None]
    low = tl.load(levels_ptr + (pair & 15)) * absmax[:, None]
    value = tl.interleave(high, low)
    if ROUND_BFLOAT16:
        value = _to_bfloat16_bits(value)
    column = first[:, None] + tl.arange(0, BLOCK)[None, :]
    inside = (block < blocks)[:, None] & (column < columns)
    tl.store(out_ptr + row[:, None] * columns + column, value.to(out_ptr.dtype.element_ty), mask=inside)


def _launch_shape(rows: int, columns: int, block_size: int) -> tuple[int, int, int]:
    """Returns (blocks in all, blocks a row, blocks a program)."""
    blocks_a_row = triton.cdiv(columns, block_size)
    return rows * blocks_a_row, blocks_a_row, max(1, TILE // block_size)


def quantize(weight: Tensor, midpoints: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Returns `(codes, absmax)` of a 2-D weight of any strides; see nf4.quantize and nf4.decision_table."""
    rows, columns = weight.shape
    blocks, blocks_a_row, blocks_a_program = _launch_shape(rows, columns, block_size)
    if weight.dtype == torch.float64:
        weight = weight.float()
    codes = torch.empty((rows, (columns + 1) // 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty((rows, blocks_a_row), dtype=torch.float32, device=weight.device)
    if blocks:
        _quantize_kernel[(triton.cdiv(blocks, blocks_a_program),)](
            weight, midpoints, order, codes, absmax,
            columns, weight.stride(0), weight.stride(1), blocks_a_row, blocks, SMALLEST_DIVISOR,
            BLOCK=block_size, BLOCKS=blocks_a_program, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, absmax


def dequantize(
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    levels: Tensor,
    in_features: int,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Returns the decoded rows (R, in_features) in float32, float16 or bfloat16; see nf4.dequantize."""
    rows = codes.shape[0]
    blocks, blocks_a_row, blocks_a_program = _launch_shape(rows, in_features, block_size)
    out = torch.empty((rows, in_features), dtype=dtype, device=codes.device)
    if blocks:
        double_quant = absmax_scale is not None
        _dequantize_kernel[(triton.cdiv(blocks, blocks_a_program),)](
            codes, absmax, absmax_scale, absmax_offset,
            dynamic_levels_on(codes.device, signed=True) if double_quant else None, levels, out,
            in_features, blocks_a_row, blocks,
            BLOCK=block_size, BLOCKS=blocks_a_program, DOUBLE_QUANT=double_quant, ABSMAX_BLOCK=ABSMAX_BLOCK,
            ROUND_BFLOAT16=dtype == torch.bfloat16 and codes.device.type == "cpu",
            num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return out

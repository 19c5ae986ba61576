"""Triton kernels that encode and decode 4-bit weights, equal to the functions of nf4.py bit for bit.

    absmax = max |w| over a block;    code = order[count(midpoints < w * (1 / absmax))]
    w_hat  = round_to_dtype(levels[code] * absmax),    absmax = dynamic_levels[code8] * scale + offset
    code8  = count(dynamic midpoints < (absmax - offset) * (1 / scale)),  offset = mean absmax,  scale = max |absmax - offset|

Where scales are given instead (nf4.encode), absmax is read, of either sign.

Layout, with R rows, C columns and B = ceil(C / BLOCK) blocks a row: weight (R, C); codes uint8 (R, ceil(C / 2)), the first
of a pair in the high nibble; absmax (R, B) float32, or uint8 with scale float32 (ceil(R * B / 256),) and offset float32
(1,). A thread holds chunks: 8 consecutive weights, one 4-byte word of codes, so that a warp reads and writes whole lines.

Multiplications and additions must stay two roundings: the kernels are compiled without contraction to fused
multiply-add. Triton's interpreter truncates float32 to bfloat16, so there the rounding is done on integers, and it knows
no inline assembly, so there the code is found without it (SHUFFLE).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlite.dynamic8 import SMALLEST_DIVISOR, dynamic_levels_on

ABSMAX_BLOCK = 256
#: Chunks that one program encodes, and chunks of 8 that it decodes: four a thread.
TILE = 1024
#: Programs that sum the absmax, at most; each program that encodes them reads all the sums.
PARTS = 1024
#: Where the decision table holds what, in 4-byte places: 16 midpoints (the last infinite), 16 codes in ascending order of
#: their levels, then for each of 32 cells its threshold and the midpoints below it, then 16 levels in ascending order, then
#: whether the cells are enough.
ORDER, THRESHOLD, BELOW, LEVEL, SIMPLE, TABLE = (tl.constexpr(place) for place in (16, 32, 64, 96, 112, 113))


# Each thread of a warp holds the entry of a table (of 32 or 16) that its number in the warp names, for shfl to fetch.
_ENTRY, _ENTRY_OF_16 = (
    tl.constexpr(
        f"{{.reg .u32 t; .reg .u64 p; mov.u32 t, %laneid; and.b32 t, t, {last}; mul.wide.u32 p, t, 4; add.u64 p, p, $1; "
        "ld.global.b32 $0, [p];}"
    )
    for last in (31, 15)
)
# Of the number $2 shfl reads the lowest four bits (16: the threads are two groups of 16).
_FETCH_OF_16 = tl.constexpr(f"shfl.sync.idx.b32 $0, $1, $2, {16 << 8 | 31}, -1;")
# $4: the cell of the share $3, of which shfl reads the lowest five bits; $1 the threshold of this thread's cell, $2 the
# midpoints below it. A share above the threshold counts one more.
_RANK = tl.constexpr(
    "{.reg .f32 t; .reg .pred q; shfl.sync.idx.b32 t, $1, $4, 31, -1; shfl.sync.idx.b32 $0, $2, $4, 31, -1; "
    "setp.gt.f32 q, $3, t; @q add.u32 $0, $0, 1;}"
)


@triton.jit
def _to_bfloat16_bits(value):
    """Rounds float32 to the nearest bfloat16, ties to even, and returns it as float32 (finite input)."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def _reciprocal(absmax, smallest):
    """Returns dynamic8.reciprocal: the interpreter of Triton 3.6 holds a `smallest` of 1e-38 in float64."""
    return tl.math.div_rn(1.0, tl.maximum(absmax, smallest).to(tl.float32))


@triton.jit
def _scattered(TILE: tl.constexpr):
    """Returns 0 .. TILE - 1, and hides from Triton that they are consecutive.

    It would give a thread four consecutive chunks, so as to load 16 bytes of codes at once; then a warp's stores would be
    64 bytes apart, or go through shared memory. A program's number is not negative, so the exclusive or costs nothing.
    """
    return (tl.arange(0, TILE) ^ (tl.program_id(0) >> 31)).to(tl.uint32)


@triton.jit
def _cell(share):
    """Returns round(15 * share) in the lowest five bits, signed: 31 cells narrower than NF4's midpoints are apart.

    Any function that does not decrease would do for exactness, with the table built by the same one.
    """
    slope, magic = tl.full(share.shape, 15.0, tl.float32), tl.full(share.shape, 12582912.0, tl.float32)  # 1.5 * 2^23
    return tl.fma(share, slope, magic).to(tl.int32, bitcast=True)


@triton.jit
def _decision_kernel(levels_ptr, table_ptr):
    """Writes nf4.decision_table of 16 levels, and its cells; one program."""
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    down, across = tl.load(levels_ptr + row), tl.load(levels_ptr + column)
    is_first_down = tl.sum(((down == across) & (column < row)).to(tl.int32), axis=1) == 0
    is_first = tl.sum(((down == across) & (row < column)).to(tl.int32), axis=0) == 0
    place = tl.sum(((down < across) & is_first_down[:, None]).to(tl.int32), axis=0)  # among the different levels
    here, after = is_first[None, :] & (place[None, :] == row), is_first[None, :] & (place[None, :] == row + 1)
    ascending = tl.sum(tl.where(here, across, 0.0), axis=1)
    following = tl.sum(tl.where(after, across, 0.0), axis=1)
    order = tl.sum(tl.where(here, column, 0), axis=1)
    different = tl.sum(is_first.to(tl.int32), axis=0)
    index = tl.arange(0, 16)
    midpoint = tl.where(index < different - 1, (ascending + following) * 0.5, float("inf"))
    midpoints_ptr = table_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(midpoints_ptr + index, midpoint)
    tl.store(table_ptr + ORDER + index, order)
    tl.store(midpoints_ptr + LEVEL + index, ascending)
    # A cell that holds one midpoint at most decides with one comparison.
    cell = tl.where(index < different - 1, (_cell(midpoint) << 27) >> 27, 100)
    each = tl.arange(0, 32)
    signed = (each << 27) >> 27
    below = tl.sum((cell[None, :] < signed[:, None]).to(tl.int32), axis=1)
    inside = tl.sum((cell[None, :] == signed[:, None]).to(tl.int32), axis=1)
    threshold = tl.sum(tl.where(index[None, :] == below[:, None], midpoint[None, :], 0.0), axis=1)
    tl.store(midpoints_ptr + THRESHOLD + each, threshold)
    tl.store(table_ptr + BELOW + each, below)
    in_order = tl.sum(((order != index) & (index < different)).to(tl.int32), axis=0) == 0
    tl.store(table_ptr + SIMPLE, (in_order & (tl.max(inside, axis=0) < 2)).to(tl.int32))


@triton.jit
def _joined(code, COUNT: tl.constexpr):
    """Returns (rows, COUNT) codes as one number a row, the first of a pair in the high nibble of its byte."""
    return tl.sum(code << (4 * (tl.arange(0, COUNT) ^ 1))[None, :], axis=1)


@triton.jit
def _rank_of(share, table_ptr):
    """Returns how many midpoints each share exceeds, for any table: a search among the sorted midpoints."""
    midpoints_ptr = table_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
    rank = tl.where(share > tl.load(midpoints_ptr + 7), 8, 0)
    rank += tl.where(share > tl.load(midpoints_ptr + rank + 3), 4, 0)
    rank += tl.where(share > tl.load(midpoints_ptr + rank + 1), 2, 0)
    rank += tl.where(share > tl.load(midpoints_ptr + rank), 1, 0)
    return rank


@triton.jit
def _codes_of(share, table_ptr):
    """Returns the code of each share, for any table."""
    return tl.load(table_ptr + ORDER + _rank_of(share, table_ptr))


@triton.jit
def _own_cell(share, table_ptr):
    """Returns what a thread keeps of the cell of its number, for `_rank_by_cell`: threshold and midpoints below, as share."""
    threshold = tl.inline_asm_elementwise(_ENTRY, "=r,l", [table_ptr + THRESHOLD], tl.float32, False, 1)
    below = tl.inline_asm_elementwise(_ENTRY, "=r,l", [table_ptr + BELOW], tl.int32, False, 1)
    return tl.broadcast_to(threshold, share.shape), tl.broadcast_to(below, share.shape)


@triton.jit
def _rank_by_cell(share, threshold, below, CLAMP: tl.constexpr):
    """Returns `_rank_of` where the cells are enough. CLAMP: shares may lie beyond 1, where there is no cell."""
    cell = _cell(tl.minimum(tl.maximum(share, -1.0), 1.0) if CLAMP else share)
    return tl.inline_asm_elementwise(_RANK, "=&r,r,r,r,r", [threshold, below, share, cell], tl.int32, False, 1)


@triton.jit
def _factor(scale, smallest):
    """Returns what nf4.encode multiplies a block by: the reciprocal of its scale, with its sign; 0 for 0."""
    inverse = _reciprocal(tl.abs(scale), smallest)
    return tl.where(scale > 0, inverse, tl.where(scale < 0, -inverse, 0.0))


@triton.jit
def _place_of(chunk, start, blocks_a_row, BLOCK: tl.constexpr):
    """Returns the row and the first column of each chunk of a tile that begins with block `start`."""
    CHUNKS: tl.constexpr = BLOCK // 8
    block = (start % blocks_a_row).to(tl.uint32) + chunk // CHUNKS
    row = block // blocks_a_row.to(tl.uint32)
    first = (block - row * blocks_a_row.to(tl.uint32)).to(tl.int64) * BLOCK + (chunk % CHUNKS) * 8
    return row + start // blocks_a_row, first


@triton.jit
def _absmax_of_chunks(value, BLOCK: tl.constexpr):
    """Returns for each of the chunks (TILE, 8) the absmax of its block."""
    CHUNKS: tl.constexpr = BLOCK // 8
    BLOCKS: tl.constexpr = value.shape[0] // CHUNKS
    absmax = tl.max(tl.reshape(tl.max(tl.abs(value), axis=1), [BLOCKS, CHUNKS]), axis=1)
    return tl.reshape(tl.broadcast_to(absmax[:, None], [BLOCKS, CHUNKS]), [BLOCKS * CHUNKS])


@triton.jit(do_not_specialize=["blocks_a_row"])
def _quantize_kernel(
    weight_ptr, table_ptr, codes_ptr, absmax_ptr,
    columns, row_stride, column_stride, blocks_a_row, blocks, smallest,
    BLOCK: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr, WORDS: tl.constexpr, SCALED: tl.constexpr,
    SHUFFLE: tl.constexpr,
):  # fmt: skip
    # WHOLE: the weight is contiguous and its rows are whole blocks. WORDS: a row of codes is whole 4-byte words.
    # SCALED: absmax is given, of either sign, and read; else it is written.
    CHUNKS: tl.constexpr = BLOCK // 8
    BLOCKS: tl.constexpr = TILE // CHUNKS
    chunk = _scattered(TILE)
    eight = tl.arange(0, 8)
    start = tl.program_id(0).to(tl.int64) * BLOCKS
    mask = chunk // CHUNKS < tl.minimum(blocks - start, BLOCKS).to(tl.uint32)
    if WHOLE:
        value = tl.load(weight_ptr + start * BLOCK + (chunk[:, None] * 8 + eight[None, :]), mask=mask[:, None], other=0.0)
    else:
        row, first = _place_of(chunk, start, blocks_a_row, BLOCK)
        column = first[:, None] + eight[None, :]
        at = weight_ptr + row[:, None] * row_stride + column * column_stride
        value = tl.load(at, mask=mask[:, None] & (column < columns), other=0.0)
    value = value.to(tl.float32)
    if SCALED:
        absmax = tl.load(absmax_ptr + start + chunk // CHUNKS, mask=mask, other=0.0)
        share = value * _factor(absmax, smallest)[:, None]
    else:
        absmax = _absmax_of_chunks(value, BLOCK)
        tl.store(absmax_ptr + start + chunk // CHUNKS, absmax, mask=mask & (chunk % CHUNKS == 0))
        share = value * _reciprocal(absmax, smallest)[:, None]
    if WORDS:
        if SHUFFLE:
            if tl.load(table_ptr + SIMPLE) != 0:
                threshold, below = _own_cell(share, table_ptr)
                word = _joined(_rank_by_cell(share, threshold, below, SCALED), 8)
            else:
                word = _joined(_codes_of(share, table_ptr), 8)
        else:
            word = _joined(_codes_of(share, table_ptr), 8)
        words_ptr = codes_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        if WHOLE:
            tl.store(words_ptr + start * CHUNKS + chunk, word, mask=mask)
        else:
            tl.store(words_ptr + (row * columns + first) // 8, word, mask=mask & (first < columns))
    else:
        byte = _joined(tl.reshape(_codes_of(share, table_ptr), [TILE * 4, 2]), 2)
        byte = tl.reshape(byte, [TILE, 4]).to(tl.uint8)
        column = first[:, None] + 2 * tl.arange(0, 4)[None, :]
        at = codes_ptr + row[:, None] * ((columns + 1) // 2) + column // 2
        tl.store(at, byte, mask=mask[:, None] & (column < columns))


@triton.jit
def _absmax_sum_kernel(absmax_ptr, sums_ptr, dynamic_ptr, midpoints_ptr, count, share, TILE: tl.constexpr):
    """Writes the sum of each program's share of the absmax, in float64; the first writes the dynamic midpoints too."""
    index = tl.arange(0, TILE)
    start = tl.program_id(0).to(tl.int64) * share
    total = tl.zeros([TILE], dtype=tl.float64)
    first = 0
    while first < share:  # the interpreter of Triton 3.6 takes no range of an argument
        mask = (first + index < share) & (start + first + index < count)
        total += tl.load(absmax_ptr + start + first + index, mask=mask, other=0.0).to(tl.float64)
        first += TILE
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, axis=0))
    if tl.program_id(0) == 0:
        code = tl.arange(0, 256)
        upper = tl.load(dynamic_ptr + code + 1, mask=code < 255, other=float("inf"))
        tl.store(midpoints_ptr + code, (tl.load(dynamic_ptr + code) + upper) * 0.5)


@triton.jit(do_not_specialize=["count"])
def _absmax_quantize_kernel(
    absmax_ptr, sums_ptr, midpoints_ptr, codes_ptr, scale_ptr, offset_ptr, count, parts, smallest,
    ABSMAX_BLOCK: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    part = tl.arange(0, PARTS)
    total = tl.sum(tl.load(sums_ptr + part, mask=part < parts, other=0.0), axis=0)
    offset = (total / count.to(tl.float64)).to(tl.float32)
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    index = group[:, None] * ABSMAX_BLOCK + tl.arange(0, ABSMAX_BLOCK)[None, :]
    mask = index < count
    value = tl.where(mask, tl.load(absmax_ptr + index, mask=mask, other=0.0) - offset, 0.0)
    scale = tl.max(tl.abs(value), axis=1)
    share = value * _reciprocal(scale, smallest)[:, None]
    code = tl.zeros([GROUPS, ABSMAX_BLOCK], dtype=tl.int32)
    for bit in tl.static_range(8):
        code += tl.where(share > tl.load(midpoints_ptr + code + ((128 >> bit) - 1)), 128 >> bit, 0)
    tl.store(codes_ptr + index, code.to(tl.uint8), mask=mask)
    tl.store(scale_ptr + group, scale, mask=group * ABSMAX_BLOCK < count)
    if tl.program_id(0) == 0:
        tl.store(offset_ptr, offset)


@triton.jit(do_not_specialize=["chunks_a_row"])
def _dequantize_kernel(
    codes_ptr, absmax_ptr, scale_ptr, offset_ptr, dynamic_ptr, levels_ptr, out_ptr,
    first_row, chunks_a_row, chunks, bytes_a_row, blocks_a_row, out_stride,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, FLAT_CODES: tl.constexpr, FLAT_OUT: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr, ABSMAX_BLOCK: tl.constexpr, SHUFFLE: tl.constexpr, ROUND_BFLOAT16: tl.constexpr,
):  # fmt: skip
    # CHUNK weights, of one row and one block, go together. Chunks are numbered along the rows of the output.
    # FLAT_CODES: the codes run on from row to row without a gap, and so do the blocks. FLAT_OUT: so do both and the output.
    # What a scalar can hold stays 64 bits wide, what differs between threads 32, and unsigned: its divisions are shifts.
    CHUNKS: tl.constexpr = BLOCK // CHUNK
    chunk = _scattered(TILE)
    start = tl.program_id(0).to(tl.int64) * TILE
    mask = chunk < tl.minimum(chunks - start, TILE).to(tl.uint32)
    if FLAT_OUT:
        at = out_ptr + start * CHUNK + chunk * CHUNK
    else:
        above = start // chunks_a_row
        column = (start - above * chunks_a_row).to(tl.uint32) + chunk
        row = column // chunks_a_row.to(tl.uint32)
        column -= row * chunks_a_row.to(tl.uint32)
        at = out_ptr + (above + row) * out_stride + column * CHUNK
    if FLAT_CODES:
        start += first_row * chunks_a_row.to(tl.int64)
        block = ((start % CHUNKS).to(tl.uint32) + chunk) // CHUNKS
        first_block = start // CHUNKS
        position = (start % 2).to(tl.uint32) + chunk if CHUNK == 1 else chunk
        first_byte = start // 2 if CHUNK == 1 else start * (CHUNK // 2)
    else:
        above += first_row
        block = row * blocks_a_row + column // CHUNKS
        first_block = above * blocks_a_row
        position = row * (bytes_a_row * 2 // CHUNK) + column
        first_byte = above * bytes_a_row
    word_type: tl.constexpr = tl.int32 if CHUNK == 8 else (tl.int16 if CHUNK == 4 else tl.uint8)
    words_ptr = (codes_ptr + first_byte).to(tl.pointer_type(word_type), bitcast=True)
    word = tl.load(words_ptr + (position // 2 if CHUNK == 1 else position), mask=mask, other=0)
    absmax = tl.load(absmax_ptr + first_block + block, mask=mask, other=0)
    if DOUBLE_QUANT:
        group = ((first_block % ABSMAX_BLOCK).to(tl.uint32) + block) // ABSMAX_BLOCK
        scale = tl.load(scale_ptr + first_block // ABSMAX_BLOCK + group, mask=mask, other=0.0)
        absmax = tl.load(dynamic_ptr + absmax.to(tl.int32)) * scale + tl.load(offset_ptr)
    each = tl.arange(0, CHUNK)[None, :]
    code = word.to(tl.int32)[:, None] >> (4 * (((position & 1)[:, None] if CHUNK == 1 else each) ^ 1))
    if SHUFFLE:
        level = tl.inline_asm_elementwise(_ENTRY_OF_16, "=r,l", [levels_ptr], tl.float32, False, 1)
        level = tl.broadcast_to(level, code.shape)
        value = tl.inline_asm_elementwise(_FETCH_OF_16, "=r,r,r", [level, code], tl.float32, True, 1)
    else:
        value = tl.load(levels_ptr + (code & 15))
    value *= absmax[:, None]
    if ROUND_BFLOAT16:
        value = _to_bfloat16_bits(value)
    tl.store(at[:, None] + each, value.to(out_ptr.dtype.element_ty), mask=mask[:, None])


def decision(levels: Tensor) -> Tensor:
    """Returns the decision table of 16 levels, int32 (TABLE,), as the kernels read it."""
    table = torch.empty(TABLE.value, dtype=torch.int32, device=levels.device)
    _decision_kernel[(1,)](levels, table, num_warps=8, enable_fp_fusion=False)
    return table


def quantize(weight: Tensor, levels: Tensor, block_size: int, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns `(codes, absmax)` of a 2-D weight of any strides; see nf4.quantize, and nf4.encode where `scales` are given."""
    rows, columns = weight.shape
    blocks_a_row = triton.cdiv(columns, block_size)
    blocks = rows * blocks_a_row
    if weight.dtype == torch.float64:
        weight = weight.float()
    codes = torch.empty((rows, (columns + 1) // 2), dtype=torch.uint8, device=weight.device)
    absmax = scales
    if absmax is None:
        absmax = torch.empty((rows, blocks_a_row), dtype=torch.float32, device=weight.device)
    if blocks:
        _quantize_kernel[(triton.cdiv(blocks * block_size, 8 * TILE),)](
            weight, decision(levels), codes, absmax.contiguous(),
            columns, weight.stride(0), weight.stride(1), blocks_a_row, blocks, SMALLEST_DIVISOR,
            BLOCK=block_size, TILE=TILE, WHOLE=weight.is_contiguous() and columns % block_size == 0,
            WORDS=columns % 8 == 0, SCALED=scales is not None, SHUFFLE=weight.device.type == "cuda",
            num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, absmax


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `(codes, scale, offset)` of float32 absmax; see nf4.quantize_absmax."""
    absmax = absmax.contiguous()
    count, device = absmax.numel(), absmax.device
    groups = triton.cdiv(count, ABSMAX_BLOCK)
    codes = torch.empty(absmax.shape, dtype=torch.uint8, device=device)
    scale = torch.empty(groups, dtype=torch.float32, device=device)
    if not count:
        return codes, scale, torch.zeros(1, dtype=torch.float32, device=device)
    offset = torch.empty(1, dtype=torch.float32, device=device)
    parts = min(PARTS, triton.cdiv(count, 1024))
    sums = torch.empty(parts, dtype=torch.float64, device=device)
    midpoints = torch.empty(256, dtype=torch.float32, device=device)
    _absmax_sum_kernel[(parts,)](
        absmax,
        sums,
        dynamic_levels_on(device, signed=True),
        midpoints,
        count,
        triton.cdiv(count, parts),
        TILE=1024,
        enable_fp_fusion=False,
    )
    _absmax_quantize_kernel[(triton.cdiv(groups, 8),)](
        absmax, sums, midpoints, codes, scale, offset, count, parts, SMALLEST_DIVISOR,
        ABSMAX_BLOCK=ABSMAX_BLOCK, GROUPS=8, PARTS=PARTS, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, scale, offset


def dequantize(
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    levels: Tensor,
    in_features: int,
    block_size: int,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
    first_row: int = 0,
) -> Tensor:
    """Returns decoded rows in float32, float16 or bfloat16; see nf4.dequantize.

    Args:
        in_features: weights that a row of codes holds.
        out: (rows, columns) of `dtype`, written and returned; its rows may lie further apart than they are long. It takes
            the rows from `first_row` on. Where the codes are one row, of a tensor that was encoded flat, its columns are
            those of the tensor. Without it, all rows are decoded.
    """
    if out is None:
        out = torch.empty((codes.shape[0], in_features), dtype=dtype, device=codes.device)
    rows, columns = out.shape
    assert out.dtype == dtype and (out.stride(1) == 1 or columns < 2)
    assert columns == in_features or codes.shape[0] == 1
    assert first_row >= 0 and (first_row + rows) * columns <= codes.shape[0] * in_features
    if not out.numel():
        return out
    codes, absmax, levels = codes.contiguous(), absmax.contiguous(), levels.contiguous()
    # Of 8 weights or 16 bytes of output, or as many as divide a row (and the address of the codes allows).
    chunk = 8 if out.element_size() == 2 else 4
    while columns % chunk or codes.data_ptr() % max(1, chunk // 2):
        chunk //= 2
    flat_codes = codes.shape[0] == 1 or columns % block_size == 0
    tile = TILE * min(4, 8 // chunk)
    double_quant = absmax_scale is not None
    _dequantize_kernel[(triton.cdiv(out.numel(), chunk * tile),)](
        codes, absmax, absmax_scale, absmax_offset,
        dynamic_levels_on(codes.device, signed=True) if double_quant else None, levels, out,
        first_row, columns // chunk, out.numel() // chunk, codes.shape[1], absmax.shape[1], out.stride(0),
        BLOCK=block_size, CHUNK=chunk, TILE=tile, FLAT_CODES=flat_codes, FLAT_OUT=flat_codes and out.is_contiguous(),
        DOUBLE_QUANT=double_quant, ABSMAX_BLOCK=ABSMAX_BLOCK, SHUFFLE=codes.device.type == "cuda",
        ROUND_BFLOAT16=dtype == torch.bfloat16 and codes.device.type == "cpu",
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return out

"""A Triton kernel that looks for each block's scale, equal to nf4.search bit for bit.

    share = w * (1 / absmax);    of the levels l that share / s takes, for s = n / 50 of either sign:
    the best is that with most (share . l)^2 / (l . l), or what (share . l) / (l . l) of it gives as s
    scale = (share . l) / (l . l) / (1 / absmax)

Layout, with R rows, C columns and B = ceil(C / BLOCK) blocks a row: weight (R, C); table as `nf4_codec.decision` makes it;
weighting float32 (period,), that of column c at c modulo period; scales float32 (R, B). A thread holds chunks of 8 weights.

Products and sums must stay two roundings, and every sum is one of pairs: see nf4_codec.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlite.dynamic8 import SMALLEST_DIVISOR
from qlite.kernels.nf4_codec import (
    _ENTRY_OF_16,
    _FETCH_OF_16,
    LEVEL,
    SIMPLE,
    _absmax_of_chunks,
    _own_cell,
    _place_of,
    _rank_by_cell,
    _rank_of,
    _reciprocal,
    _scattered,
    decision,
)

#: Chunks of 8 that one program works at: four a thread, and blocks of 4096 whole.
TILE, WARPS = 512, 4
LARGEST = torch.finfo(torch.float32).max


@triton.jit
def _sum_of_blocks(value, BLOCKS: tl.constexpr):
    """Returns the sum of each block of consecutive values, as nf4.search adds them: a sum of two is the same anywhere."""
    COUNT: tl.constexpr = value.numel
    for half in tl.static_range(1, 13):  # blocks of 4096
        if COUNT >> half >= BLOCKS:
            value = tl.sum(tl.reshape(value, [COUNT >> half, 2]), axis=1)
    return value


@triton.jit
def _fitted(share, inverse, counts, threshold, below, level, BY_CELL: tl.constexpr, BLOCKS: tl.constexpr, table_ptr):
    """Returns share . l and l . l of each block, for the levels l that 1 / inverse gives."""
    scaled = share * inverse
    if BY_CELL:
        rank = _rank_by_cell(scaled, threshold, below, True)
        taken = tl.inline_asm_elementwise(_FETCH_OF_16, "=r,r,r", [level, rank], tl.float32, True, 1)
    else:
        levels_ptr = table_ptr.to(tl.pointer_type(tl.float32), bitcast=True) + LEVEL
        taken = tl.load(levels_ptr + _rank_of(scaled, table_ptr))
    counted = taken if counts is None else taken * counts
    return _sum_of_blocks(share * counted, BLOCKS), _sum_of_blocks(taken * counted, BLOCKS)


@triton.jit
def _better(product, square, other_product, other_square):
    """Returns nf4._better."""
    more = (other_product * other_product * square > product * product * other_square) & (other_square > 0)
    return tl.where(more, other_product, product), tl.where(more, other_square, square)


@triton.jit
def _best(
    share, counts,
    FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, BY_CELL: tl.constexpr, BLOCKS: tl.constexpr, table_ptr,
):  # fmt: skip
    """Returns the best share of absmax as the scale of each block, of either sign."""
    threshold, below, level = 0.0, 0, 0.0
    if BY_CELL:
        threshold, below = _own_cell(share, table_ptr)
        level = tl.inline_asm_elementwise(_ENTRY_OF_16, "=r,l", [table_ptr + LEVEL], tl.float32, False, 1)
        level = tl.broadcast_to(level, share.shape)
    product, square = tl.zeros([BLOCKS], tl.float32), tl.full([BLOCKS], 1.0, tl.float32)
    for place in range(2 * COUNT):  # one after the other: the code of 18 at a time would not stay in the cache
        ratio = tl.zeros([1, 1], tl.float32) + (FIRST + STEP * (place % COUNT))
        inverse = tl.math.div_rn(tl.full([1, 1], 50.0, tl.float32), tl.where(place < COUNT, ratio, -ratio))
        found = _fitted(share, inverse, counts, threshold, below, level, BY_CELL, BLOCKS, table_ptr)
        product, square = _better(product, square, found[0], found[1])
    none = product == 0
    product, square = tl.where(none, 1.0, product), tl.where(none, 1.0, square)
    inverse = tl.broadcast_to(tl.math.div_rn(square, product)[:, None], [BLOCKS, share.shape[0] // BLOCKS])
    inverse = tl.reshape(inverse, [share.shape[0]])[:, None]
    found = _fitted(share, inverse, counts, threshold, below, level, BY_CELL, BLOCKS, table_ptr)
    product, square = _better(product, square, found[0], found[1])
    return tl.math.div_rn(product, square)


@triton.jit(do_not_specialize=["blocks_a_row"])
def _search_kernel(
    weight_ptr, table_ptr, weighting_ptr, scales_ptr,
    columns, row_stride, column_stride, blocks_a_row, blocks, period, smallest, largest,
    FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    WHOLE: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    # WHOLE: the weight is contiguous and its rows are whole blocks.
    CHUNKS: tl.constexpr = BLOCK // 8
    BLOCKS: tl.constexpr = TILE // CHUNKS
    chunk = _scattered(TILE)
    eight = tl.arange(0, 8)
    start = tl.program_id(0).to(tl.int64) * BLOCKS
    mask = chunk // CHUNKS < tl.minimum(blocks - start, BLOCKS).to(tl.uint32)
    counts = None
    if WHOLE:
        value = tl.load(weight_ptr + start * BLOCK + (chunk[:, None] * 8 + eight[None, :]), mask=mask[:, None], other=0.0)
        if weighting_ptr is not None:
            column = start * BLOCK + (chunk[:, None] * 8 + eight[None, :])
            counts = tl.load(weighting_ptr + column % period, mask=mask[:, None], other=0.0)
    else:
        row, first = _place_of(chunk, start, blocks_a_row, BLOCK)
        column = first[:, None] + eight[None, :]
        inside = mask[:, None] & (column < columns)
        value = tl.load(weight_ptr + row[:, None] * row_stride + column * column_stride, mask=inside, other=0.0)
        if weighting_ptr is not None:
            counts = tl.load(weighting_ptr + column % period, mask=inside, other=0.0)
        else:
            counts = inside.to(tl.float32)
    value = value.to(tl.float32)
    absmax = _absmax_of_chunks(value, BLOCK)
    share = value * _reciprocal(absmax, smallest)[:, None]
    if SHUFFLE:
        if tl.load(table_ptr + SIMPLE) != 0:
            best = _best(share, counts, FIRST, STEP, COUNT, True, BLOCKS, table_ptr)
        else:
            best = _best(share, counts, FIRST, STEP, COUNT, False, BLOCKS, table_ptr)
    else:
        best = _best(share, counts, FIRST, STEP, COUNT, False, BLOCKS, table_ptr)
    block = tl.arange(0, BLOCKS)
    absmax = tl.max(tl.reshape(absmax, [BLOCKS, CHUNKS]), axis=1)
    scale = tl.where(absmax > 0, tl.math.div_rn(best, _reciprocal(absmax, smallest)), 0.0)
    scale = tl.minimum(tl.maximum(scale, -largest), largest)
    tl.store(scales_ptr + start + block, scale, mask=block < blocks - start)


def search(weight: Tensor, levels: Tensor, block_size: int, shares: range, weighting: Tensor | None) -> Tensor:
    """Returns the scale of each block of a 2-D weight of any strides, for `shares` in fiftieths of absmax; see nf4.search."""
    rows, columns = weight.shape
    blocks_a_row = triton.cdiv(columns, block_size)
    blocks = rows * blocks_a_row
    if weight.dtype == torch.float64:
        weight = weight.float()
    scales = torch.empty((rows, blocks_a_row), dtype=torch.float32, device=weight.device)
    if blocks:
        _search_kernel[(triton.cdiv(blocks * block_size, 8 * TILE),)](
            weight, decision(levels), None if weighting is None else weighting.contiguous(), scales,
            columns, weight.stride(0), weight.stride(1), blocks_a_row, blocks,
            columns if weighting is None else len(weighting), SMALLEST_DIVISOR, LARGEST,
            FIRST=shares.start, STEP=shares.step, COUNT=len(shares), BLOCK=block_size, TILE=TILE,
            WHOLE=weight.is_contiguous() and columns % block_size == 0, SHUFFLE=weight.device.type == "cuda",
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return scales

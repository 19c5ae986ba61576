"""Triton kernels of x @ decode(W).T for few rows of x: the weight is read once, as its 4-bit codes, and never written out.

    y[m, n] = sum over blocks b of scale[n, b] * sum over k in b of levels[code[n, k]] * x[m, k]   (+ bias[n])

Layout: x (M, K) contiguous; codes uint8 (N, K / 2), the first of a pair in the high nibble, read as int32 words of eight
codes; absmax as in nf4_codec.py; y (M, N). K is a multiple of 64 and blocks hold a multiple of 64 columns: a row of codes
then is whole chunks of 32 bytes that share a scale. Sums are float32; how a sum is split is fixed by the shapes alone, so
that results do not change from run to run.

Both kernels read codes so that each thread holds what it owes the tensor core, and order the columns of x to fit, so that a
decoded weight never passes through shared memory (docs/kernels.md). With MODE "plain" they run without inline PTX: in the
interpreter, and the first on GPUs before capability 8.0, without a tensor core. The specification is nf4.linear over
nf4.dequantize.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlite.dynamic8 import dynamic_levels_on
from qlite.kernels import nf4_codec, ptx, scratch, tiles
from qlite.kernels.tiles import Tile

ABSMAX_BLOCK = 256


@triton.jit
def _round_to(value, dtype: tl.constexpr, PLAIN: tl.constexpr):
    if PLAIN and dtype == tl.bfloat16:  # the interpreter cuts float32 to bfloat16
        bits = value.to(tl.uint32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def _decoded_absmax(index, mask, offset, absmax_ptr, scale_ptr, dynamic_ptr, DOUBLE_QUANT: tl.constexpr):
    absmax = tl.load(absmax_ptr + index, mask=mask, other=0)
    if DOUBLE_QUANT:
        group = tl.load(scale_ptr + index // 256, mask=mask, other=0.0)
        absmax = tl.load(dynamic_ptr + absmax.to(tl.int32)) * group + offset
    return absmax


# One to four rows. A warp multiplies 16 rows of the weight by a chunk of two blocks; the warps of a program share the chunks
# of its 16 rows. The product has eight columns: columns 0-3 are the rows of x with the second block's part zero, columns 4-7
# with the first's, so that each can be given its own scale.


@triton.jit
def _load_chunk(
    chunk, word, end, blocks, first, second, absmax_starts, x_used, codes_ptr, x_ptr, absmax_ptr, scale_ptr,
    RATIO: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """Reads a chunk: the words of rows g and g + 8, four words of x for each, and what the scales are made of."""
    block = chunk * 2 + word // 8
    inside = (chunk < end) & (block < blocks)
    low = tl.load(codes_ptr + first + chunk * 16, mask=inside, other=0, eviction_policy="evict_first")
    high = tl.load(codes_ptr + second + chunk * 16, mask=inside, other=0, eviction_policy="evict_first")
    at = x_ptr + chunk * 64
    used = inside & x_used
    x0 = tl.load(at, mask=used, other=0)
    x1 = tl.load(at + 4, mask=used, other=0)
    x2 = tl.load(at + 8, mask=used, other=0)
    x3 = tl.load(at + 12, mask=used, other=0)
    scale_at = tl.minimum(block, blocks - 1) // RATIO
    # Not pure: a load that may move would be moved behind the products that are to hide it.
    raw = tl.inline_asm_elementwise(
        RAW, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,l,l,l,l,l,l,l,l",
        [absmax_starts[0] + scale_at, absmax_starts[1] + scale_at, absmax_ptr, scale_ptr],
        dtype=tl.int32, is_pure=False, pack=4,
    )  # fmt: skip
    return low, high, x0, x1, x2, x3, raw


@triton.jit
def _add_chunk(total, chunk, table, dynamic, offset, PAIRS: tl.constexpr, SCALES: tl.constexpr, PRODUCT: tl.constexpr):
    low, high, x0, x1, x2, x3, raw = chunk
    a0, a1, a2, a3 = _pairs(low, table, PAIRS)
    b0, b1, b2, b3 = _pairs(high, table, PAIRS)
    scales = tl.inline_asm_elementwise(
        SCALES, "=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,f,f,f,f", [raw, dynamic, offset],
        dtype=tl.float32, is_pure=True, pack=4,
    )  # fmt: skip
    product = tl.inline_asm_elementwise(
        PRODUCT, "=&f,=&f,=&f,=&f," + "r," * 47 + "r", [a0, a1, a2, a3, b0, b1, b2, b3, x0, x1, x2, x3],
        dtype=tl.float32, is_pure=False, pack=4,
    )  # fmt: skip
    return total + product * scales


@triton.jit
def _pairs(words, table, PAIRS: tl.constexpr):
    return tl.inline_asm_elementwise(
        PAIRS, "=&r,=&r,=&r,=&r,r,r", [words, table],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _plain_products(
    row, chunk, word, end, blocks, absmax_a_row, rows, in_features, offset,
    x_ptr, codes_ptr, absmax_ptr, scale_ptr, dynamic_ptr, levels_ptr,
    RATIO: tl.constexpr, DOUBLE_QUANT: tl.constexpr,
):  # fmt: skip
    """Returns the scaled products of a word of codes a thread with four rows of x: (rows of words, 16, 4)."""
    block = chunk * 2 + word // 8
    inside = (chunk < end) & (block < blocks)
    words = tl.load(codes_ptr + row.to(tl.int64) * (blocks * 8) + chunk * 16 + word, mask=inside, other=0)
    m = tl.arange(0, 4)[None, None, :]
    total = (words * 0).to(tl.float32)[:, :, None] + m * 0.0
    for byte in tl.static_range(4):
        for nibble in tl.static_range(2):
            weight = tl.load(levels_ptr + ((words >> (8 * byte + 4 - 4 * nibble)) & 15))
            column = (chunk * 128 + word * 8 + 2 * byte + nibble)[:, :, None]
            x = tl.load(x_ptr + m * in_features + column, mask=inside[:, :, None] & (m < rows), other=0.0)
            total += weight[:, :, None] * x.to(tl.float32)
    index = row * absmax_a_row + tl.minimum(block, blocks - 1) // RATIO
    scale = _decoded_absmax(index, inside, offset, absmax_ptr, scale_ptr, dynamic_ptr, DOUBLE_QUANT)
    return total * scale[:, :, None]


@triton.jit
def _few_rows_kernel(
    x_ptr, codes_ptr, absmax_ptr, scale_ptr, offset_ptr, dynamic_ptr, levels_ptr, bias_ptr, y_ptr,
    rows, out_features, in_features, blocks, absmax_a_row, units,
    WARPS: tl.constexpr, RATIO: tl.constexpr, DOUBLE_QUANT: tl.constexpr, BIAS: tl.constexpr, PLAIN: tl.constexpr,
    TABLE: tl.constexpr, PAIRS: tl.constexpr, RAW: tl.constexpr, SCALES: tl.constexpr, PRODUCT: tl.constexpr,
    SUM: tl.constexpr, LEVELS_AT: tl.constexpr, SUM_AT: tl.constexpr,
):  # fmt: skip
    warp = (tl.arange(0, WARPS * 8) // 8)[:, None]
    lane_row = (tl.arange(0, WARPS * 8) % 8)[:, None]
    word = tl.arange(0, 16)[None, :]
    end = (blocks + 1) // 2
    offset = 0.0
    if DOUBLE_QUANT:
        offset = tl.load(offset_ptr)
    if not PLAIN:
        table = tl.inline_asm_elementwise(TABLE, "=r,l,l", [levels_ptr, dynamic_ptr], dtype=tl.int32, is_pure=False, pack=1)
        lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
        dynamic = table - lane * 4 + LEVELS_AT
        # Threads that did not hold the rows and words that the PTX takes for granted would give numbers, wrong ones.
        fits = lane == lane_row * 4 + word // 4
        x_used = (word // 8 == lane_row // 4) & (lane_row % 4 < rows)
        x_at = x_ptr + (lane_row % 4) * (in_features // 2) + (word // 4) * 16 + word % 4
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        row = unit * 16
        # Rows beyond the last are read as the last, and not written.
        low = tl.minimum(row + lane_row, out_features - 1)
        high = tl.minimum(row + 8 + lane_row, out_features - 1)
        if PLAIN:
            low_sum = tl.zeros([WARPS * 8, 16, 4], dtype=tl.float32)
            high_sum = tl.zeros([WARPS * 8, 16, 4], dtype=tl.float32)
            for first in range(0, end, WARPS):
                low_sum += _plain_products(
                    low, first + warp, word, end, blocks, absmax_a_row, rows, in_features, offset,
                    x_ptr, codes_ptr, absmax_ptr, scale_ptr, dynamic_ptr, levels_ptr, RATIO, DOUBLE_QUANT,
                )  # fmt: skip
            # A loop of its own: both at once do not fit in a thread's registers.
            for first in range(0, end, WARPS):
                high_sum += _plain_products(
                    high, first + warp, word, end, blocks, absmax_a_row, rows, in_features, offset,
                    x_ptr, codes_ptr, absmax_ptr, scale_ptr, dynamic_ptr, levels_ptr, RATIO, DOUBLE_QUANT,
                )  # fmt: skip
            both = tl.join(tl.sum(low_sum, axis=1), tl.sum(high_sum, axis=1))  # warp row, m, half
            both = tl.sum(tl.reshape(both, [WARPS, 8, 4, 2]), axis=0)
            place = row + tl.arange(0, 8)[:, None, None] + 8 * tl.arange(0, 2)[None, None, :]
            m = tl.arange(0, 4)[None, :, None]
            total = both
            mask = (place < out_features) & (m < rows)
        else:
            starts = (low * absmax_a_row, high * absmax_a_row)
            first = low.to(tl.int64) * (blocks * 8) + word
            second = high.to(tl.int64) * (blocks * 8) + word
            here = _load_chunk(
                warp, word, end, blocks, first, second, starts, x_used, codes_ptr, x_at, absmax_ptr, scale_ptr, RATIO, RAW
            )
            total = tl.zeros([WARPS * 8, 16], dtype=tl.float32)
            for chunk in range(0, end, 2 * WARPS):
                # Two chunks take turns, so that one is under way while the other is multiplied.
                there = _load_chunk(
                    chunk + WARPS + warp, word, end, blocks, first, second, starts, x_used,
                    codes_ptr, x_at, absmax_ptr, scale_ptr, RATIO, RAW,
                )  # fmt: skip
                total = _add_chunk(total, here, table, dynamic, offset, PAIRS, SCALES, PRODUCT)
                here = _load_chunk(
                    chunk + 2 * WARPS + warp, word, end, blocks, first, second, starts, x_used,
                    codes_ptr, x_at, absmax_ptr, scale_ptr, RATIO, RAW,
                )  # fmt: skip
                total = _add_chunk(total, there, table, dynamic, offset, PAIRS, SCALES, PRODUCT)
            total = tl.inline_asm_elementwise(
                SUM, "=&f,=&f,=&f,=&f,f,f,f,f,r,r,r,r", [total, dynamic + (SUM_AT - LEVELS_AT)],
                dtype=tl.float32, is_pure=False, pack=4,
            )  # fmt: skip
            total = tl.where(fits, total, float("nan"))
            place = row + lane_row + (word % 4 // 2) * 8
            m = (word // 4) * 2 + word % 2
            mask = (place < out_features) & (m < rows) & (word < 8) & (warp == 0)
        if BIAS:
            total += tl.load(bias_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + m * out_features + place, _round_to(total, y_ptr.dtype.element_ty, PLAIN), mask=mask)


# More rows: tiles of the weight against tiles of x, by tl.dot. The programs share the tiles and blocks of columns evenly, a
# range each; where a tile is shared, the last program to finish adds the parts up, in the order of the programs.


@triton.jit
def _owner(place, total, programs):
    """Returns which program has a place of the `total` that are shared out."""
    return (((place + 1).to(tl.int64) * programs - 1) // total).to(tl.int32)


@triton.jit
def _operand(
    words, scale, table, dtype: tl.constexpr, levels_ptr, TILE_N: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr,
    PLAIN: tl.constexpr, LOOK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Returns the decoded weights (TILE_N, 64) of words (TILE_N, 8), rows and columns in the tensor core's order.

    A warp holds rows in eights, of eight words two a thread; the operand wants sixteens, and of each thread two columns (or
    four: WIDTH) out of eight (sixteen). Only names change here: no weight leaves its thread.
    """
    if PLAIN:
        byte = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24)) & 255  # TILE_N, 8, bits 1 and 0 of byte
        first = tl.load(levels_ptr + (byte >> 4))
        second = tl.load(levels_ptr + (byte & 15))
        if SCALED:
            first *= scale[:, None, None, None]
            second *= scale[:, None, None, None]
        first = _round_to(first, dtype, True).to(tl.float32)
        second = _round_to(second, dtype, True).to(tl.float32)
    else:
        if SCALED:
            p0, p1, p2, p3 = tl.inline_asm_elementwise(
                LOOK, "=&r,=&r,=&r,=&r,r,r,f", [words, table, tl.broadcast_to(scale[:, None], words.shape)],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            p0, p1, p2, p3 = _pairs(words, table, LOOK)
        pair = tl.join(tl.join(p0, p2), tl.join(p1, p3))
        first = (pair & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
        second = ((pair >> 16) & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    # sixteens, eight of sixteen, warp, row of eight | thread, word of two, byte's bits 1 and 0, nibble
    weights = tl.reshape(tl.join(first, second), [TILE_N // (16 * WARPS), 2, WARPS, 8, 4, 2, 2, 2, 2])
    if WIDTH == 2:
        weights = tl.permute(weights, [0, 2, 1, 3, 5, 6, 7, 4, 8])
    else:
        weights = tl.permute(weights, [0, 2, 1, 3, 5, 6, 4, 7, 8])
    return tl.reshape(weights, [TILE_N, 64])


@triton.jit
def _scale_parts(row_start, block, last, RATIO: tl.constexpr, absmax_ptr, scale_ptr, DOUBLE_QUANT: tl.constexpr):
    index = row_start + tl.minimum(block, last) // RATIO
    absmax = tl.load(absmax_ptr + index)
    group = absmax
    if DOUBLE_QUANT:
        absmax = absmax.to(tl.int32)
        group = tl.load(scale_ptr + index // 256)
    return absmax, group


@triton.jit
def _add_block(
    total, words, x, absmax, group, offset, table, dynamic, dtype: tl.constexpr, levels_ptr, dynamic_ptr,
    TILE_N: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr, DOUBLE_QUANT: tl.constexpr, PLAIN: tl.constexpr,
    LOOK: tl.constexpr, LEVEL: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    scale = absmax
    if DOUBLE_QUANT:
        if PLAIN:
            level = tl.load(dynamic_ptr + absmax)
        else:
            level = tl.inline_asm_elementwise(LEVEL, "=f,r,r", [absmax, dynamic], dtype=tl.float32, is_pure=True, pack=1)
        scale = level * group + offset
    weights = _operand(words, scale, table, dtype, levels_ptr, TILE_N, WARPS, WIDTH, PLAIN, LOOK, SCALED)
    if PLAIN:
        product = tl.dot(weights, x.to(tl.float32), input_precision="ieee")
        total += product if SCALED else product * scale[:, None]
    elif SCALED:
        total = tl.dot(weights, x, total)
    else:
        total += tl.dot(weights, x) * scale[:, None]
    return total


@triton.jit
def _store_tile(total, n, m, mask, out_features, y_ptr, bias_ptr, BIAS: tl.constexpr, PLAIN: tl.constexpr):
    if BIAS:
        total += tl.load(bias_ptr + n, mask=n < out_features, other=0.0).to(tl.float32)[:, None]
    y = _round_to(total, y_ptr.dtype.element_ty, PLAIN)
    tl.store(y_ptr + m[None, :].to(tl.int64) * out_features + n[:, None], y, mask=mask)


@triton.jit
def _small_batch_kernel(
    x_ptr, codes_ptr, absmax_ptr, scale_ptr, offset_ptr, dynamic_ptr, levels_ptr, bias_ptr, y_ptr, parts_ptr, counters_ptr,
    rows, out_features, in_features, blocks, absmax_a_row, steps, tiles_m, total_steps,
    TILE_N: tl.constexpr, TILE_M: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr, TWO: tl.constexpr,
    WIDTH: tl.constexpr, SORTED: tl.constexpr, RATIO: tl.constexpr, DOUBLE_QUANT: tl.constexpr, BIAS: tl.constexpr,
    PLAIN: tl.constexpr, SCALED: tl.constexpr, TABLE: tl.constexpr, LOOK: tl.constexpr, LEVEL: tl.constexpr,
    LANE_MASK: tl.constexpr, LANE_BYTES: tl.constexpr, LEVELS_AT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # The tile's rows in the order in which _operand names them: eights of one warp beside each other.
    r = tl.arange(0, TILE_N)
    order = (r // (16 * WARPS)) * (16 * WARPS) + ((r // 8) % WARPS) * 16 + ((r // (8 * WARPS)) % 2) * 8 + r % 8
    word = tl.arange(0, 16 if TWO else 8)
    place = tl.arange(0, 64)
    if SORTED:
        column = place
    elif WIDTH == 2:
        column = ((place // 2) % 4) * 16 + (place // 16) * 4 + ((place // 8) % 2) * 2 + place % 2
    else:
        column = ((place // 4) % 4) * 16 + (place // 16) * 4 + place % 4
    offset = 0.0
    if DOUBLE_QUANT:
        offset = tl.load(offset_ptr)
    table = 0
    dynamic = 0
    if not PLAIN:
        table = tl.inline_asm_elementwise(TABLE, "=r,l,l", [levels_ptr, dynamic_ptr], dtype=tl.int32, is_pure=False, pack=1)
        lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
        dynamic = table - (lane & LANE_MASK) * LANE_BYTES + LEVELS_AT
    start = (program.to(tl.int64) * total_steps // programs).to(tl.int32)
    stop = ((program + 1).to(tl.int64) * total_steps // programs).to(tl.int32)
    while start < stop:
        tile = start // steps
        begin = start - tile * steps
        end = tl.minimum(steps, begin + stop - start)
        row = (tile // tiles_m) * TILE_N
        m = (tile % tiles_m) * TILE_M + tl.arange(0, TILE_M)
        n = row + tl.arange(0, TILE_N)
        # Rows beyond the last are read as the last, and not written.
        shuffled = tl.minimum(order, out_features - 1 - row)
        row_start = (row + shuffled if SCALED else tl.minimum(n, out_features - 1)) * absmax_a_row
        codes_at = codes_ptr + row.to(tl.int64) * (blocks * 8) + (shuffled[:, None] * (blocks * 8) + word[None, :])
        x_at = x_ptr + (m[None, :] * in_features + column[:, None])
        total = tl.zeros([TILE_N, TILE_M], dtype=tl.float32)
        block = begin * 2 if TWO else begin
        absmax0, group0 = _scale_parts(row_start, block, blocks - 1, RATIO, absmax_ptr, scale_ptr, DOUBLE_QUANT)
        if TWO:
            absmax1, group1 = _scale_parts(row_start, block + 1, blocks - 1, RATIO, absmax_ptr, scale_ptr, DOUBLE_QUANT)
        for step in tl.range(begin, end, num_stages=STAGES):
            block = step * 2 if TWO else step
            words = tl.load(codes_at + block * 8, mask=(word + block * 8 < blocks * 8)[None, :], other=0)
            x0 = tl.load(x_at + block * 64, mask=(m < rows)[None, :], other=0.0)
            # The scales of the next step are read a step ahead: they are looked up, and that waits for them.
            after = block + 2 if TWO else block + 1
            next0 = _scale_parts(row_start, after, blocks - 1, RATIO, absmax_ptr, scale_ptr, DOUBLE_QUANT)
            if TWO:
                # No rows of it where there is no second block.
                x1 = tl.load(x_at + block * 64 + 64, mask=(m < min(rows, (blocks - 1 - block) * rows))[None, :], other=0.0)
                next1 = _scale_parts(row_start, after + 1, blocks - 1, RATIO, absmax_ptr, scale_ptr, DOUBLE_QUANT)
                words0, words1 = tl.split(tl.permute(tl.reshape(words, [TILE_N, 2, 8]), [0, 2, 1]))
                total = _add_block(
                    total, words0, x0, absmax0, group0, offset, table, dynamic, dtype, levels_ptr, dynamic_ptr,
                    TILE_N, WARPS, WIDTH, DOUBLE_QUANT, PLAIN, LOOK, LEVEL, SCALED,
                )  # fmt: skip
                total = _add_block(
                    total, words1, x1, absmax1, group1, offset, table, dynamic, dtype, levels_ptr, dynamic_ptr,
                    TILE_N, WARPS, WIDTH, DOUBLE_QUANT, PLAIN, LOOK, LEVEL, SCALED,
                )  # fmt: skip
                absmax1, group1 = next1
            else:
                total = _add_block(
                    total, words, x0, absmax0, group0, offset, table, dynamic, dtype, levels_ptr, dynamic_ptr,
                    TILE_N, WARPS, WIDTH, DOUBLE_QUANT, PLAIN, LOOK, LEVEL, SCALED,
                )  # fmt: skip
            absmax0, group0 = next0
        mask = (n < out_features)[:, None] & (m < rows)[None, :]
        if end - begin == steps:
            _store_tile(total, n, m, mask, out_features, y_ptr, bias_ptr, BIAS, PLAIN)
        else:
            inner = tl.arange(0, TILE_N)[:, None] * TILE_M + tl.arange(0, TILE_M)[None, :]
            # A program leaves at most two parts: the end of a tile, which it begins with, and the start of another.
            slot = program * 2 + (begin == 0).to(tl.int32)
            tl.store(parts_ptr + slot * (TILE_N * TILE_M) + inner, total)
            first = _owner(tile * steps, total_steps, programs)
            last = _owner(tile * steps + steps - 1, total_steps, programs)
            tl.debug_barrier()
            arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel")
            if arrived == last - first:
                at = (first * 2 + 1) * (TILE_N * TILE_M)
                sum_of_parts = tl.load(parts_ptr + at + inner, cache_modifier=".cg")
                for other in range(first + 1, last + 1):
                    at = other * (2 * TILE_N * TILE_M)
                    sum_of_parts += tl.load(parts_ptr + at + inner, cache_modifier=".cg")
                _store_tile(sum_of_parts, n, m, mask, out_features, y_ptr, bias_ptr, BIAS, PLAIN)
                tl.store(counters_ptr + tile, 0)
        start += end - begin


def linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    levels: Tensor,
    bias: Tensor | None,
    out_features: int,
    block_size: int,
) -> Tensor:
    """Returns `x @ decode(W).T + bias` (..., out_features) in the dtype of x, by the method that tiles.py names."""
    in_features = x.shape[-1]
    rows = x.numel() // max(1, in_features)
    coded = codes, absmax, absmax_scale, absmax_offset, levels
    if codes.shape[0] != out_features and in_features % block_size == 0:
        # Encoded flat, in blocks that no two rows share: the bytes are those of rows.
        coded = codes.view(out_features, -1), absmax.view(out_features, -1), *coded[2:]
    tile = None
    if coded[0].shape[0] == out_features and coded[0].data_ptr() % 16 == 0 and coded[0].is_contiguous():
        tile = tiles.linear_nf4(rows, in_features, block_size, x.dtype, x.device)
    if tile is None:
        weight = decoded(coded, out_features, in_features, block_size, x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    flat = x.reshape(rows, in_features).contiguous()
    if flat.data_ptr() % 16:
        flat = flat.clone()
    run = few_rows if tile.method == "few rows" else small_batch
    return run(flat, coded, bias, block_size, tile).view(*x.shape[:-1], out_features)


def gradient(grad: Tensor, coded: tuple[Tensor | None, ...], in_features: int, block_size: int) -> Tensor:
    """Returns `grad @ decode(W)` (..., in_features): the gradient of the input, without a transposed copy of the weight."""
    return grad @ decoded(coded, grad.shape[-1], in_features, block_size, grad.dtype)


def decoded(coded, out_features: int, in_features: int, block_size: int, dtype: torch.dtype) -> Tensor:
    """Returns the weight (out_features, in_features) in memory that the next call on this stream writes over."""
    device = coded[0].device
    weight = scratch.buffer(device, dtype, out_features * in_features).view(out_features, in_features)
    row = in_features if coded[0].shape[0] == out_features else out_features * in_features
    return nf4_codec.dequantize(*coded, row, block_size, dtype, out=weight)


def _shared_arguments(coded, bias: Tensor | None, block_size: int) -> tuple[list, dict]:
    codes, absmax, scale, offset, levels = coded
    double_quant = scale is not None
    dynamic = dynamic_levels_on(codes.device, signed=True) if double_quant else levels
    if scale is None:
        scale = offset = levels  # pointers that nothing is read from
    pointers = [codes.view(torch.int32), absmax.contiguous(), scale, offset, dynamic, levels, bias]
    constants = {
        "RATIO": block_size // 64, "DOUBLE_QUANT": double_quant, "BIAS": bias is not None,
        "PLAIN": tiles.plain(codes.device),
    }  # fmt: skip
    return pointers, constants


def few_rows(x: Tensor, coded, bias: Tensor | None, block_size: int, tile: Tile) -> Tensor:
    """Returns x (1 to 4 rows, contiguous, 16-byte aligned) times the weight of `coded`: rows of codes, blocks of 64 n."""
    (rows, in_features), out_features, warps = x.shape, coded[0].shape[0], tile.warps
    y = torch.empty((rows, out_features), dtype=x.dtype, device=x.device)
    pointers, constants = _shared_arguments(coded, bias, block_size)
    assembly = dict.fromkeys(("TABLE", "PAIRS", "RAW", "SCALES", "PRODUCT", "SUM"), "")
    if not constants["PLAIN"]:
        double_quant = constants["DOUBLE_QUANT"]
        assembly = {
            "TABLE": ptx.table(warps, x.dtype, double_quant, exchange=True), "PAIRS": ptx.pairs(),
            "RAW": ptx.raw_scales(double_quant), "SCALES": ptx.scales(double_quant), "PRODUCT": ptx.product(x.dtype),
            "SUM": ptx.sum_of_warps(warps),
        }  # fmt: skip
        x = x.view(torch.int32)
    units = triton.cdiv(out_features, 16)
    _few_rows_kernel[(min(units, tile.programs),)](
        x, *pointers, y, rows, out_features, in_features, in_features // 64, coded[1].shape[1], units,
        WARPS=warps, **constants, **assembly, LEVELS_AT=ptx.PAIRS, SUM_AT=ptx.PAIRS + ptx.LEVELS, num_warps=warps, num_stages=1,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y


def small_batch(x: Tensor, coded, bias: Tensor | None, block_size: int, tile: Tile) -> Tensor:
    """Returns x (rows, in_features; contiguous, 16-byte aligned) times the weight of `coded`, as in few_rows."""
    (rows, in_features), out_features, warps = x.shape, coded[0].shape[0], tile.warps
    device = x.device
    y = torch.empty((rows, out_features), dtype=x.dtype, device=device)
    pointers, constants = _shared_arguments(coded, bias, block_size)
    plain = constants["PLAIN"]
    assembly = {"TABLE": "", "LOOK": "", "LEVEL": ""}
    if not plain:
        look = ptx.scaled_pairs(x.dtype) if tile.scaled else ptx.pairs()
        table = ptx.table(warps, x.dtype, constants["DOUBLE_QUANT"], wide=tile.scaled)
        assembly = {"TABLE": table, "LOOK": look, "LEVEL": ptx.level_of_absmax()}
    if tile.sort:
        # thread, word of two, byte's bit 1, byte's bit 0, nibble -> the order in which _operand puts columns
        order = (0, 1, 3, 4, 5, 2, 6) if tile.width == 2 else (0, 1, 3, 4, 2, 5, 6)
        x = x.view(rows, -1, 4, 2, 2, 2, 2).permute(order).reshape(rows, in_features)
    blocks = in_features // 64
    steps = triton.cdiv(blocks, 2) if tile.two else blocks
    tiles_m = triton.cdiv(rows, tile.tile_m)
    total_steps = steps * tiles_m * triton.cdiv(out_features, tile.tile_n)
    programs = min(tile.programs, total_steps)
    parts = torch.empty(2 * programs * tile.tile_n * tile.tile_m, dtype=torch.float32, device=device)
    _small_batch_kernel[(programs,)](
        x, *pointers, y, parts, scratch.counters(device, total_steps // steps), rows, out_features, in_features,
        blocks, coded[1].shape[1], steps, tiles_m, total_steps,
        TILE_N=tile.tile_n, TILE_M=tile.tile_m, WARPS=warps, STAGES=tile.stages, TWO=tile.two, WIDTH=tile.width,
        SORTED=tile.sort, **constants, SCALED=tile.scaled, **assembly, LANE_MASK=15 if tile.scaled else 31,
        LANE_BYTES=8 if tile.scaled else 4, LEVELS_AT=ptx.PAIRS, num_warps=warps, num_stages=tile.stages,
        enable_fp_fusion=True,
    )  # fmt: skip
    return y

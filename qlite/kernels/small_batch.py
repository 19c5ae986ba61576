"""Triton kernel of x @ decode(W).T for some tens of rows of x: tiles of decoded weights against tiles of x, by tl.dot.

Formula and layout are those of few_rows.py. Each thread reads the codes of those weights that it owes the tensor core, and the
columns of x are put in an order to fit: a decoded weight never passes through shared memory. Blocks are scaled after their
product, in float32, or with SCALED before it and rounded once, as a decoded weight is: a tile of many rows of x has no
registers for a product apart.

The programs share tiles and blocks of columns evenly, a range each, so that all work to the end; where a tile is shared, the
last program to finish adds the parts up, in the order of the programs. The specification is nf4.linear over nf4.dequantize.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlite.kernels import ptx
from qlite.kernels.few_rows import arguments, begins_early
from qlite.kernels.steps import pairs_of, round_to
from qlite.kernels.tiles import Tile


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
        first = round_to(first, dtype, True).to(tl.float32)
        second = round_to(second, dtype, True).to(tl.float32)
    else:
        if SCALED:
            p0, p1, p2, p3 = tl.inline_asm_elementwise(
                LOOK, "=&r,=&r,=&r,=&r,r,r,f", [words, table, tl.broadcast_to(scale[:, None], words.shape)],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            p0, p1, p2, p3 = pairs_of(words, table, LOOK)
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
    y = round_to(total, y_ptr.dtype.element_ty, PLAIN)
    tl.store(y_ptr + m[None, :].to(tl.int64) * out_features + n[:, None], y, mask=mask)


@triton.jit
def _column(place, WIDTH: tl.constexpr):
    """Returns which of a block's 64 columns has a place in the tensor core's order."""
    if WIDTH == 2:
        return ((place // 2) % 4) * 16 + (place // 16) * 4 + ((place // 8) % 2) * 2 + place % 2
    return ((place // 4) % 4) * 16 + (place // 16) * 4 + place % 4


@triton.jit
def _sort_kernel(
    x_ptr, sorted_ptr, counters_ptr, count, counters, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """Puts the columns of x in the tensor core's order, unless count is 0, and zeros in the counters."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + place // 64 * 64 + _column(place % 64, WIDTH), mask=place < count, other=0.0)
    tl.store(sorted_ptr + place, value, mask=place < count)
    tl.store(counters_ptr + place, tl.zeros([BLOCK], tl.int32), mask=place < counters)


@triton.jit
def _small_batch_kernel(
    x_ptr, codes_ptr, absmax_ptr, scale_ptr, offset_ptr, dynamic_ptr, levels_ptr, bias_ptr, y_ptr, parts_ptr, counters_ptr,
    rows, out_features, in_features, blocks, absmax_a_row, steps, tiles_m, total_steps,
    TILE_N: tl.constexpr, TILE_M: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr, TWO: tl.constexpr,
    WIDTH: tl.constexpr, SORTED: tl.constexpr, RATIO: tl.constexpr, DOUBLE_QUANT: tl.constexpr, BIAS: tl.constexpr,
    PLAIN: tl.constexpr, SCALED: tl.constexpr, TABLE: tl.constexpr, LOOK: tl.constexpr, LEVEL: tl.constexpr,
    LANE_MASK: tl.constexpr, LANE_BYTES: tl.constexpr, LEVELS_AT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    # The tile's rows in the order in which _operand names them: eights of one warp beside each other.
    r = tl.arange(0, TILE_N)
    order = (r // (16 * WARPS)) * (16 * WARPS) + ((r // 8) % WARPS) * 16 + ((r // (8 * WARPS)) % 2) * 8 + r % 8
    word = tl.arange(0, 16 if TWO else 8)
    place = tl.arange(0, 64)
    column = place if SORTED else _column(place, WIDTH)
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
    if EARLY:
        tl.extra.cuda.gdc_wait()  # what comes before has written x, and read what is written here
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
        start += end - begin


def multiply(x: Tensor, coded, bias: Tensor | None, block_size: int, tile: Tile) -> Tensor:
    """Returns x (rows, in_features; contiguous, 16-byte aligned) times the weight of `coded`, as in few_rows.py."""
    (rows, in_features), out_features, warps = x.shape, coded[0].shape[0], tile.warps
    device = x.device
    y = torch.empty((rows, out_features), dtype=x.dtype, device=device)
    pointers, constants = arguments(coded, bias, block_size, x.dtype)
    plain = constants["PLAIN"]
    assembly = {"TABLE": "", "LOOK": "", "LEVEL": ""}
    if not plain:
        look = ptx.scaled_pairs(x.dtype) if tile.scaled else ptx.pairs()
        table = ptx.table(warps, x.dtype, constants["DOUBLE_QUANT"], wide=tile.scaled)
        assembly = {"TABLE": table, "LOOK": look, "LEVEL": ptx.level_of_absmax()}
    blocks = in_features // 64
    steps = triton.cdiv(blocks, 2) if tile.two else blocks
    tiles_m = triton.cdiv(rows, tile.tile_m)
    total_steps = steps * tiles_m * triton.cdiv(out_features, tile.tile_n)
    programs = min(tile.programs, total_steps)
    early, tiles, unsorted = begins_early(tile, coded), total_steps // steps, x
    options = {"launch_pdl": True} if early else {}
    counters, moved = torch.empty(tiles, dtype=torch.int32, device=device), 0
    if tile.sort:
        x, moved = torch.empty_like(x), x.numel()
    _sort_kernel[(triton.cdiv(max(moved, tiles), 4096),)](
        unsorted, x, counters, moved, tiles, WIDTH=tile.width, BLOCK=4096, EARLY=early, num_warps=8, **options
    )
    parts = torch.empty(2 * programs * tile.tile_n * tile.tile_m, dtype=torch.float32, device=device)
    _small_batch_kernel[(programs,)](
        x, *pointers, y, parts, counters, rows, out_features, in_features,
        blocks, coded[1].shape[1], steps, tiles_m, total_steps,
        TILE_N=tile.tile_n, TILE_M=tile.tile_m, WARPS=warps, STAGES=tile.stages, TWO=tile.two, WIDTH=tile.width,
        SORTED=tile.sort, **constants, SCALED=tile.scaled, **assembly, LANE_MASK=15 if tile.scaled else 31,
        LANE_BYTES=8 if tile.scaled else 4, LEVELS_AT=ptx.PAIRS, EARLY=early, num_warps=warps,
        num_stages=tile.stages, enable_fp_fusion=True, **options,
    )  # fmt: skip
    return y

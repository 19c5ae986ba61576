"""Five to sixteen rows of x by mma.sync: a program's range of the steps of few_rows.py.

A step is two blocks (128 columns) of 32 rows of the weight for each warp. Each block of 16 rows meets x in products of its own,
so that it can be scaled by itself; what a thread has read of x serves both sixteens. A thread reads 16 columns of a row: two
words of codes, and the same columns of a row of x, which `packed` has put where a warp reads 512 bytes beside each other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlite.kernels import tiles
from qlite.kernels.steps import SINGLE, load_scales, locate, pairs_of, store_sums

#: Rows of x, and of the weight for each warp.
ROWS, TALL = 16, 32
#: Elements that a program of _pack_kernel moves.
_BLOCK = 2048


@triton.jit
def _load_step(
    group, step, live, shape, deltas, lanes, pointers,
    RATIO: tl.constexpr, WARPS: tl.constexpr, MODE: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """Reads a step: for both sixteens the words of rows g and g + 8 in both blocks; and what the scales are made of."""
    lane, warp_id, warp, lane_row, word = lanes
    codes_ptr, _, absmax_ptr, scale_ptr = pointers
    group, step, rows, blocks, absmax_a_row, far, _ = locate(group, step, shape, deltas, MODE)
    row = group * (32 * WARPS) + warp * 32 + lane_row
    at = codes_ptr + far[0] + (step * 16 + word)
    inside0 = (word >= 0) & live
    inside1 = inside0 & (step * 2 + 1 < blocks)
    first = _load_sixteen(at, row, rows, blocks, inside0, inside1)
    second = _load_sixteen(at, row + 16, rows, blocks, inside0, inside1)
    # Thread 4 g + j reads block j % 2 for row g, or g + 8 where j is 2 or 3, of both sixteens.
    own_row = group * (32 * WARPS) + warp_id * 32 + lane // 4 + lane % 4 // 2 * 8
    own_block = min(step * 2 + lane % 2, blocks - 1) // RATIO
    raw = load_scales(own_row, own_row + 16, rows, absmax_a_row, own_block, absmax_ptr + far[2], scale_ptr + far[3], RAW)
    return first, second, raw


@triton.jit
def _load_sixteen(at, row, rows, blocks, inside0, inside1):
    # Rows beyond the last are read as the last, and not written.
    low, high = tl.minimum(row, rows - 1) * (blocks * 8), tl.minimum(row + 8, rows - 1) * (blocks * 8)
    low0 = tl.load(at + low, mask=inside0, other=0, eviction_policy="evict_first")
    low1 = tl.load(at + low + 8, mask=inside1, other=0, eviction_policy="evict_first")
    high0 = tl.load(at + high, mask=inside0, other=0, eviction_policy="evict_first")
    high1 = tl.load(at + high + 8, mask=inside1, other=0, eviction_policy="evict_first")
    return low0, high0, low1, high1


@triton.jit
def _load_x(group, step, live, shape, deltas, lanes, pointers, MODE: tl.constexpr):
    """Reads the columns of x that meet a step's words, of both blocks, and which weight the step is of."""
    _, _, _, _, word = lanes
    _, x_at, _, _ = pointers
    _, step, _, blocks, _, far, second = locate(group, step, shape, deltas, MODE)
    at = x_at + far[1] + step * 512
    inside = (word >= 0) & live
    return _load_x_block(at, inside), _load_x_block(at + 256, inside & (step * 2 + 1 < blocks)), second


@triton.jit
def _load_x_block(at, inside):
    """Reads, of rows g and g + 8 of x, the columns of a thread's first word and of its second."""
    x0 = tl.load(at, mask=inside, other=0)
    x1 = tl.load(at + 64, mask=inside, other=0)
    x2 = tl.load(at + 128, mask=inside, other=0)
    x3 = tl.load(at + 192, mask=inside, other=0)
    return x0, x1, x2, x3


@triton.jit
def _add_block(total, low, high, x, low_scale, high_scale, table, PAIRS: tl.constexpr, PRODUCT: tl.constexpr):
    """Adds the product of 16 rows of a block with x to total: rows g by rows 0 to 7 of x, g + 8 by those, by rows 8 to 15."""
    x0, x1, x2, x3 = x
    t0, t1, t2, t3 = total
    a0, a1, a2, a3 = pairs_of(low, table, PAIRS)
    b0, b1, b2, b3 = pairs_of(high, table, PAIRS)
    return tl.inline_asm_elementwise(
        PRODUCT, "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f," + "r," * 16 + "l," * 8 + "f," * 11 + "f",
        [a0, a1, a2, a3, b0, b1, b2, b3, x0, x1, x2, x3, t0, t1, t2, t3, low_scale, high_scale],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=2,
    )  # fmt: skip


@triton.jit
def _add_step(
    totals, held, x, table, dynamic, offsets,
    MODE: tl.constexpr, PAIRS: tl.constexpr, SCALES: tl.constexpr, PRODUCT: tl.constexpr, FENCE: tl.constexpr,
):  # fmt: skip
    first, second, raw = held
    x0, x1, of_second = x
    # Or the compiler would move the loads of the next step behind this one.
    tl.inline_asm_elementwise(FENCE, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    offset = offsets[0] if MODE == SINGLE else tl.where(of_second, offsets[1], offsets[0])
    s0, s1, s2, s3, s4, s5, s6, s7 = tl.inline_asm_elementwise(
        SCALES, "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,r,r,r,r,f", [raw[0], raw[1], raw[2], raw[3], dynamic, offset],
        dtype=(tl.float32,) * 8, is_pure=False, pack=1,
    )  # fmt: skip
    total0 = _add_block(totals[0], first[0], first[1], x0, s0, s1, table, PAIRS, PRODUCT)
    total1 = _add_block(totals[1], second[0], second[1], x0, s4, s5, table, PAIRS, PRODUCT)
    total0 = _add_block(total0, first[2], first[3], x1, s2, s3, table, PAIRS, PRODUCT)
    total1 = _add_block(total1, second[2], second[3], x1, s6, s7, table, PAIRS, PRODUCT)
    return total0, total1


@triton.jit
def _zeros(WARPS: tl.constexpr):
    zero = tl.zeros([WARPS * 8, 8], dtype=tl.float32)
    return (zero, zero, zero, zero), (zero, zero, zero, zero)


@triton.jit
def _side_by_side(totals, fits):
    """Returns the sums as one tensor (row of the warps' eights, word, row + 8, row + 16, row of x + 8)."""
    first, second = totals
    low0, high0 = tl.join(first[0], first[1]), tl.join(second[0], second[1])
    low1, high1 = tl.join(first[2], first[3]), tl.join(second[2], second[3])
    total = tl.join(tl.join(low0, high0), tl.join(low1, high1))
    return tl.where(fits[:, :, None, None, None], total, float("nan"))


@triton.jit
def range_of_sixteen(
    start, stop, group, step, program, programs, steps, total_steps, shape, deltas, offsets, rows, pointers, dynamic_ptr,
    levels_ptr, bias_ptr, y_ptr,
    MODE: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr, RATIO: tl.constexpr, BIAS: tl.constexpr,
    EARLY: tl.constexpr, TABLE: tl.constexpr, PAIRS: tl.constexpr, RAW: tl.constexpr, SCALES: tl.constexpr,
    PRODUCT: tl.constexpr, FENCE: tl.constexpr, LEVELS_AT: tl.constexpr,
):  # fmt: skip
    """Multiplies up to sixteen rows of x by steps `start` to `stop`, the first of them `step` of `group`; stores the sums."""
    table = tl.inline_asm_elementwise(TABLE, "=r,l,l", [levels_ptr, dynamic_ptr], dtype=tl.int32, is_pure=False, pack=1)
    lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
    thread = tl.inline_asm_elementwise("mov.u32 $0, %tid.x;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
    dynamic = table - lane * 4 + LEVELS_AT
    warp = (tl.arange(0, WARPS * 8) // 8)[:, None]
    lane_row = (tl.arange(0, WARPS * 8) % 8)[:, None]
    word = tl.arange(0, 8)[None, :]
    # Threads that did not hold the rows and words that the PTX takes for granted would give numbers, wrong ones.
    fits = (lane == lane_row * 4 + word // 2) & (thread // 32 == warp)
    lanes = lane, thread // 32, warp, lane_row, word
    codes_ptr, x_ptr, absmax_ptr, scale_ptr, _ = pointers
    pointers = codes_ptr, x_ptr + (lane_row * 8 + word), absmax_ptr, scale_ptr
    here = _load_step(group, step, start < stop, shape, deltas, lanes, pointers, RATIO, WARPS, MODE, RAW)
    if EARLY:
        tl.extra.cuda.gdc_wait()  # what comes before has written x, and read what is written here
    totals = _zeros(WARPS)
    for i in range(start, stop, 2):
        # Two steps take turns, so that one is under way while the other is multiplied.
        for turn in tl.static_range(2):
            last = (step + 1 == steps).to(tl.int32)
            next_group = group + last
            next_step = (step + 1) * (1 - last)
            # x is in the cache, but what was asked for before comes first: so it is asked for before the next codes.
            x = _load_x(group, step, i + turn < stop, shape, deltas, lanes, pointers, MODE)
            there = _load_step(
                next_group, next_step, i + turn + 1 < stop, shape, deltas, lanes, pointers, RATIO, WARPS, MODE, RAW
            )
            totals = _add_step(totals, here, x, table, dynamic, offsets, MODE, PAIRS, SCALES, PRODUCT, FENCE)
            if (i + turn < stop) & ((last == 1) | (i + turn + 1 == stop)):
                # Added to what the places are made of, or the compiler would keep all those in registers meanwhile.
                zero = tl.inline_asm_elementwise(FENCE, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
                bit = tl.arange(0, 2)
                further = bit[:, None, None] * 8 + bit[:, None] * 16
                place = (warp * 32 + lane_row + zero)[:, :, None, None, None] + further[None, None]
                m = (word + zero)[:, :, None, None, None] + bit[None, None, None, None, :] * 8
                store_sums(
                    _side_by_side(totals, fits), place, m, m >= 0, group, step, program, programs, steps, total_steps, shape,
                    rows, bias_ptr, y_ptr, 32 * WARPS, MODE, PARTS, BIAS, False, True,
                )  # fmt: skip
                totals = _zeros(WARPS)
            here = there
            group = next_group
            step = next_step


@triton.jit
def _pack_kernel(x_ptr, packed_ptr, rows, columns, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # 64 columns, eight of the rows, which of two words, row of eight, thread of four, column of eight
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = place // 1024 * 64 + place // 8 % 4 * 16 + place // 256 % 2 * 8 + place % 8
    row = place // 512 % 2 * 8 + place // 32 % 8
    there = column < columns
    value = tl.load(x_ptr + row * columns + column, mask=there & (row < rows), other=0.0)
    tl.store(packed_ptr + place, value, mask=there)


def packed(x: Tensor) -> Tensor:
    """Returns x (rows up to 16, columns) as (columns / 64, 2, 2, 8, 4, 8), with rows of zeros, in the order of the threads."""
    rows, columns = x.shape
    out = torch.empty(columns // 64, 2, 2, 8, 4, 8, dtype=x.dtype, device=x.device)
    early = tiles.early(x.device)
    _pack_kernel[(triton.cdiv(out.numel(), _BLOCK),)](
        x, out, rows, columns, BLOCK=_BLOCK, EARLY=early, num_warps=8, **({"launch_pdl": True} if early else {})
    )
    return out

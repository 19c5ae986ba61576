"""One to four rows of x by mma.sync: a program's range of the steps of few_rows.py.

A step is 256 columns of 16 rows for each warp, or (SPLIT) of the same 16 rows as many times. Of a warp, 16 rows and a chunk of
two blocks meet x. The product has eight columns: columns 0-3 are the rows of x with the second block's part zero, columns 4-7
with the first's, so that each can be given its own scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qlite.kernels.steps import SINGLE, SUMMED, load_scales, locate, pairs_of, store_sums


@triton.jit
def _load_step(
    group, step, live, shape, deltas, lanes, pointers,
    RATIO: tl.constexpr, SPLIT: tl.constexpr, WARPS: tl.constexpr, MODE: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """Reads a step: the words of rows g and g + 8 in two chunks and what the scales are made of."""
    lane, warp_id, warp, lane_row, word, _ = lanes
    codes_ptr, _, absmax_ptr, scale_ptr, _ = pointers
    group, step, rows, blocks, absmax_a_row, far, _ = locate(group, step, shape, deltas, MODE)
    if SPLIT:
        row, own_row = group * 16 + lane_row, group * 16 + lane // 4
        chunk, own_chunk = (step * WARPS + warp) * 2, (step * WARPS + warp_id) * 2
    else:
        row, own_row = group * (16 * WARPS) + warp * 16 + lane_row, group * (16 * WARPS) + warp_id * 16 + lane // 4
        chunk, own_chunk = warp * 0 + step * 2, step * 2
    # Rows beyond the last are read as the last, and not written.
    low, high = tl.minimum(row, rows - 1), tl.minimum(row + 8, rows - 1)
    at = codes_ptr + far[0] + (chunk * 16 + word)
    block = chunk * 2 + word // 8
    inside0 = live & (block < blocks)
    inside1 = live & (block + 2 < blocks)
    low0 = tl.load(at + low * (blocks * 8), mask=inside0, other=0, eviction_policy="evict_first")
    high0 = tl.load(at + high * (blocks * 8), mask=inside0, other=0, eviction_policy="evict_first")
    low1 = tl.load(at + low * (blocks * 8) + 16, mask=inside1, other=0, eviction_policy="evict_first")
    high1 = tl.load(at + high * (blocks * 8) + 16, mask=inside1, other=0, eviction_policy="evict_first")
    # Scales are the thread's own numbers, no tensors: which thread has which is the matter of ptx.scales.
    own_block = min(own_chunk * 2 + lane % 4, blocks - 1) // RATIO
    raw = load_scales(own_row, own_row + 8, rows, absmax_a_row, own_block, absmax_ptr + far[2], scale_ptr + far[3], RAW)
    return low0, high0, low1, high1, raw


@triton.jit
def _load_x(group, step, live, shape, deltas, lanes, pointers, SPLIT: tl.constexpr, WARPS: tl.constexpr, MODE: tl.constexpr):
    """Reads the columns of x that meet a step's words, in two chunks."""
    _, _, warp, lane_row, word, x_used = lanes
    _, x_at, _, _, x_rows = pointers
    _, step, _, blocks, _, far, second = locate(group, step, shape, deltas, MODE)
    chunk = (step * WARPS + warp) * 2 if SPLIT else warp * 0 + step * 2
    x_row = x_rows[0]
    if MODE == SUMMED:
        x_row = tl.where(second, x_rows[1], x_rows[0])
    at = x_at + far[1] + (lane_row % 4 * x_row + chunk * 64)
    block = chunk * 2 + word // 8
    return (
        _load_x_chunk(at, x_used & live & (block < blocks)), _load_x_chunk(at + 64, x_used & live & (block + 2 < blocks)),
        second,
    )  # fmt: skip


@triton.jit
def _load_x_chunk(at, used):
    x0 = tl.load(at, mask=used, other=0)
    x1 = tl.load(at + 4, mask=used, other=0)
    x2 = tl.load(at + 8, mask=used, other=0)
    x3 = tl.load(at + 12, mask=used, other=0)
    return x0, x1, x2, x3


@triton.jit
def _add_chunk(total, low, high, x, low_scale, high_scale, table, PAIRS: tl.constexpr, PRODUCT: tl.constexpr):
    x0, x1, x2, x3 = x
    a0, a1, a2, a3 = pairs_of(low, table, PAIRS)
    b0, b1, b2, b3 = pairs_of(high, table, PAIRS)
    return tl.inline_asm_elementwise(
        PRODUCT, "=&f,=&f,=&f,=&f," + "r," * 48 + "f," * 11 + "f",
        [a0, a1, a2, a3, b0, b1, b2, b3, x0, x1, x2, x3, total, low_scale, high_scale],
        dtype=tl.float32, is_pure=False, pack=4,
    )  # fmt: skip


@triton.jit
def _add_step(
    total, held, x, table, dynamic, offsets,
    MODE: tl.constexpr, PAIRS: tl.constexpr, SCALES: tl.constexpr, PRODUCT: tl.constexpr, FENCE: tl.constexpr,
):  # fmt: skip
    low0, high0, low1, high1, raw = held
    x0, x1, second = x
    # Or the compiler would move the loads of the next step behind this one.
    tl.inline_asm_elementwise(FENCE, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    offset = offsets[0] if MODE == SINGLE else tl.where(second, offsets[1], offsets[0])
    s0, s1, s2, s3 = tl.inline_asm_elementwise(
        SCALES, "=&f,=&f,=&f,=&f,r,r,r,r,r,f", [raw[0], raw[1], raw[2], raw[3], dynamic, offset],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
    )  # fmt: skip
    total = _add_chunk(total, low0, high0, x0, s0, s1, table, PAIRS, PRODUCT)
    return _add_chunk(total, low1, high1, x1, s2, s3, table, PAIRS, PRODUCT)


@triton.jit
def range_of_four(
    start, stop, group, step, program, programs, steps, total_steps, shape, deltas, offsets, rows, pointers, dynamic_ptr,
    levels_ptr, bias_ptr, y_ptr,
    MODE: tl.constexpr, SPLIT: tl.constexpr, TALL: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr,
    RATIO: tl.constexpr, BIAS: tl.constexpr, EARLY: tl.constexpr, TABLE: tl.constexpr, PAIRS: tl.constexpr, RAW: tl.constexpr,
    SCALES: tl.constexpr, PRODUCT: tl.constexpr, SUM: tl.constexpr, FENCE: tl.constexpr, LEVELS_AT: tl.constexpr,
    SUM_AT: tl.constexpr,
):  # fmt: skip
    """Multiplies up to four rows of x by steps `start` to `stop`, the first of them `step` of `group`; stores the sums."""
    table = tl.inline_asm_elementwise(TABLE, "=r,l,l", [levels_ptr, dynamic_ptr], dtype=tl.int32, is_pure=False, pack=1)
    lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
    thread = tl.inline_asm_elementwise("mov.u32 $0, %tid.x;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
    dynamic = table - lane * 4 + LEVELS_AT
    warp = (tl.arange(0, WARPS * 8) // 8)[:, None]
    lane_row = (tl.arange(0, WARPS * 8) % 8)[:, None]
    word = tl.arange(0, 16)[None, :]
    # Threads that did not hold the rows and words that the PTX takes for granted would give numbers, wrong ones.
    fits = lane == lane_row * 4 + word // 4
    x_used = (word // 8 == lane_row // 4) & (lane_row % 4 < rows)
    lanes = lane, thread // 32, warp, lane_row, word, x_used
    codes_ptr, x_ptr, absmax_ptr, scale_ptr, x_rows = pointers
    pointers = codes_ptr, x_ptr + ((word // 4) * 16 + word % 4), absmax_ptr, scale_ptr, x_rows
    place = warp * (0 if SPLIT else 16) + lane_row + (word % 4 // 2) * 8
    m = (word // 4) * 2 + word % 2
    written = word < 8
    if SPLIT:
        written = written & (warp == 0)
    here = _load_step(group, step, start < stop, shape, deltas, lanes, pointers, RATIO, SPLIT, WARPS, MODE, RAW)
    if EARLY:
        tl.extra.cuda.gdc_wait()  # what comes before has written x, and read what is written here
    total = tl.zeros([WARPS * 8, 16], dtype=tl.float32)
    for i in range(start, stop, 2):
        # Two steps take turns, so that one is under way while the other is multiplied.
        for turn in tl.static_range(2):
            last = (step + 1 == steps).to(tl.int32)
            next_group = group + last
            next_step = (step + 1) * (1 - last)
            # x is in the cache, but what was asked for before comes first: so it is asked for before the next codes.
            x = _load_x(group, step, i + turn < stop, shape, deltas, lanes, pointers, SPLIT, WARPS, MODE)
            there = _load_step(
                next_group, next_step, i + turn + 1 < stop, shape, deltas, lanes, pointers, RATIO, SPLIT, WARPS, MODE, RAW
            )
            total = _add_step(total, here, x, table, dynamic, offsets, MODE, PAIRS, SCALES, PRODUCT, FENCE)
            if (i + turn < stop) & ((last == 1) | (i + turn + 1 == stop)):
                if SPLIT:
                    value = tl.inline_asm_elementwise(
                        SUM, "=&f,=&f,=&f,=&f,f,f,f,f,r,r,r,r", [total, dynamic + (SUM_AT - LEVELS_AT)],
                        dtype=tl.float32, is_pure=False, pack=4,
                    )  # fmt: skip
                else:
                    value = tl.inline_asm_elementwise(
                        SUM, "=&f,=&f,=&f,=&f,f,f,f,f", [total], dtype=tl.float32, is_pure=False, pack=4
                    )
                store_sums(
                    tl.where(fits, value, float("nan")), place, m, written, group, step, program, programs, steps,
                    total_steps, shape, rows, bias_ptr, y_ptr, TALL, MODE, PARTS, BIAS, False, False,
                )  # fmt: skip
                total = tl.zeros([WARPS * 8, 16], dtype=tl.float32)
            here = there
            group = next_group
            step = next_step

"""Triton kernel of x @ decode(W).T for one to four rows of x: the weight is read once, as codes, at the speed of memory.

    y[m, n] = sum over blocks b of scale[n, b] * sum over k in b of levels[code[n, k]] * x[m, k]   (+ bias[n])

Layout: x (M, K) contiguous; codes uint8 (N, K / 2), the first of a pair in the high nibble, read as int32 words of eight
codes; absmax as in nf4_codec.py; y (M, N). K is a multiple of 64 and blocks hold a multiple of 64 columns: a row of codes
then is whole chunks of 32 bytes that share a scale. Sums are float32, in an order that the shapes alone decide.

Two weights may be multiplied in one launch, as a launch costs as much as a quarter of a product: STACKED, two weights of one x,
whose results lie beside each other; SUMMED, two weights of an x each, whose results are added.

The unit of work is a step: 256 columns of a group of 16 rows for each warp, or (SPLIT) of the same 16 rows as many times. The
groups' steps lie one after the other, and the programs take even ranges of them. So a group may be the work of several
programs: each writes its part, and what reads the product adds up the parts (a part that nobody computed is zero). Of a warp,
16 rows and a chunk of two blocks meet x in `mma.sync`. The product has eight columns: columns 0-3 are the rows of x with the
second block's part zero, columns 4-7 with the first's, so that each can be given its own scale. PLAIN is the same without
inline PTX: for the interpreter, and for GPUs before capability 8.0, where there is no tensor core that Triton uses. The
specification is nf4.linear over nf4.dequantize.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlite.dynamic8 import dynamic_levels_on
from qlite.kernels import ptx, tiles
from qlite.kernels.tiles import Tile

SINGLE, STACKED, SUMMED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def round_to(value, dtype: tl.constexpr, PLAIN: tl.constexpr):
    """Returns float32 rounded to a dtype, to the nearest."""
    if PLAIN and dtype == tl.bfloat16:  # the interpreter cuts float32 to bfloat16
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where(value == value, rounded, value)  # the bits of a NaN could overflow
    return value.to(dtype)


@triton.jit
def _place(group, step, shape, deltas, MODE: tl.constexpr):
    """Returns where a step is: which weight, its group and step there, its rows, blocks, and absmax values a row.

    Args:
        shape: (groups of the first weight, its steps, rows of both, blocks of both, absmax values a row of both).
        deltas: how far the second weight's codes, x, absmax and group scales are from the first's, in their elements.
    """
    groups0, steps0, rows0, rows1, blocks0, blocks1, absmax0, absmax1 = shape
    rows, blocks, absmax_a_row = rows0, blocks0, absmax0
    second = group < 0
    far = (0, 0, 0, 0)
    if MODE == STACKED:
        second = group >= groups0
        group = tl.where(second, group - groups0, group)
        rows = tl.where(second, rows1, rows0)
    if MODE == SUMMED:
        second = step >= steps0
        step = tl.where(second, step - steps0, step)
        blocks = tl.where(second, blocks1, blocks0)
        absmax_a_row = tl.where(second, absmax1, absmax0)
    if MODE != SINGLE:
        far = (
            tl.multiple_of(tl.where(second, deltas[0], 0), 4), tl.multiple_of(tl.where(second, deltas[1], 0), 4),
            tl.where(second, deltas[2], 0), tl.where(second, deltas[3], 0),
        )  # fmt: skip
    return group, step, rows, blocks, absmax_a_row, far, second


@triton.jit
def _load_step(
    group, step, live, shape, deltas, lanes, pointers,
    RATIO: tl.constexpr, SPLIT: tl.constexpr, WARPS: tl.constexpr, MODE: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """Reads a step: the words of rows g and g + 8 in two chunks and what the scales are made of."""
    lane, warp_id, warp, lane_row, word, _ = lanes
    codes_ptr, _, absmax_ptr, scale_ptr, _ = pointers
    group, step, rows, blocks, absmax_a_row, far, _ = _place(group, step, shape, deltas, MODE)
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
    # Not pure: a load that may move would be moved behind the products that are to hide it.
    raw = tl.inline_asm_elementwise(
        RAW, "=&r,=&r,=&r,=&r,r,r,l,l",
        [
            min(own_row, rows - 1) * absmax_a_row + own_block, min(own_row + 8, rows - 1) * absmax_a_row + own_block,
            absmax_ptr + far[2], scale_ptr + far[3],
        ],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip
    return low0, high0, low1, high1, raw


@triton.jit
def _load_x(group, step, live, shape, deltas, lanes, pointers, SPLIT: tl.constexpr, WARPS: tl.constexpr, MODE: tl.constexpr):
    """Reads the columns of x that meet a step's words, in two chunks."""
    _, _, warp, lane_row, word, x_used = lanes
    _, x_at, _, _, x_rows = pointers
    _, step, _, blocks, _, far, second = _place(group, step, shape, deltas, MODE)
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
def pairs_of(words, table, PAIRS: tl.constexpr):
    """Returns the pairs of levels of the four bytes of each word, as the inline PTX of PAIRS looks them up in a table."""
    return tl.inline_asm_elementwise(
        PAIRS, "=&r,=&r,=&r,=&r,r,r", [words, table],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


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
def _plain_step(
    total, group, step, shape, deltas, offsets, pointers, dynamic_ptr, levels_ptr, rows,
    RATIO: tl.constexpr, SPLIT: tl.constexpr, WARPS: tl.constexpr, MODE: tl.constexpr, DOUBLE_QUANT: tl.constexpr,
):  # fmt: skip
    """Adds a step's products with four rows of x to total (rows of the group, 4)."""
    codes_ptr, x_ptr, absmax_ptr, scale_ptr, x_rows = pointers
    group, step, out, blocks, absmax_a_row, far, second = _place(group, step, shape, deltas, MODE)
    TALL: tl.constexpr = 16 if SPLIT else 16 * WARPS
    CHUNKS: tl.constexpr = 2 * WARPS if SPLIT else 2
    row = tl.minimum(group * TALL + tl.arange(0, TALL), out - 1)[:, None]
    word = tl.arange(0, 16)[None, :]
    m = tl.arange(0, 4)[None, None, :]
    x_row = x_rows[0]
    if MODE == SUMMED:
        x_row = tl.where(second, x_rows[1], x_rows[0])
    x_at = x_ptr + far[1] * 2 + m * (x_row * 2)  # both are counted in words
    for part in tl.static_range(CHUNKS):
        chunk = step * CHUNKS + part
        block = chunk * 2 + word // 8
        inside = block < blocks
        words = tl.load(codes_ptr + far[0] + row.to(tl.int64) * (blocks * 8) + chunk * 16 + word, mask=inside, other=0)
        product = (words * 0).to(tl.float32)[:, :, None] + m * 0.0
        for byte in tl.static_range(4):
            for nibble in tl.static_range(2):
                weight = tl.load(levels_ptr + ((words >> (8 * byte + 4 - 4 * nibble)) & 15))
                column = (chunk * 128 + word * 8 + 2 * byte + nibble)[:, :, None]
                x = tl.load(x_at + column, mask=inside[:, :, None] & (m < rows), other=0.0)
                product += weight[:, :, None] * x.to(tl.float32)
        index = row * absmax_a_row + tl.minimum(block, blocks - 1) // RATIO
        scale = tl.load(absmax_ptr + far[2] + index)
        if DOUBLE_QUANT:
            level = tl.load(dynamic_ptr + scale.to(tl.int32))
            offset = offsets[0] if MODE == SINGLE else tl.where(second, offsets[1], offsets[0])
            scale = level * tl.load(scale_ptr + far[3] + index // 256) + offset
        total += tl.sum(product * scale[:, :, None], axis=1)
    return total


@triton.jit
def _store(
    value, place, m, mask, group, step, program, programs, steps, total_steps, shape, rows, bias_ptr, y_ptr,
    TALL: tl.constexpr, MODE: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """Writes the sums of a group, or of a program's part of one; `place` is a row in the group."""
    groups0, rows0, rows1 = shape[0], shape[2], shape[3]
    place += group * TALL
    wide, limit = rows0, rows0
    if MODE == STACKED:
        second = group >= groups0
        wide = rows0 + rows1
        place += tl.where(second, rows0 - groups0 * TALL, 0)
        limit = tl.where(second, wide, rows0)
    mask = mask & (place < limit) & (m < rows)
    at = y_ptr + m.to(tl.int64) * wide + place
    if PARTS == 1:
        if BIAS:
            value += tl.load(bias_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, round_to(value, y_ptr.dtype.element_ty, PLAIN), mask=mask)
    else:
        first = (((group * steps + 1).to(tl.int64) * programs - 1) // total_steps).to(tl.int32)
        part = program - first
        tl.store(at + part * rows * wide, value, mask=mask)
        if step == steps - 1:
            for other in tl.static_range(1, PARTS):
                tl.store(at + other * rows * wide, tl.zeros_like(value), mask=mask & (m * 0 + other > part))


@triton.jit
def _plain_range(
    start, stop, group, step, program, programs, steps, total_steps, shape, deltas, offsets, rows, pointers, dynamic_ptr,
    levels_ptr, bias_ptr, y_ptr,
    MODE: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr, RATIO: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    TALL: tl.constexpr = 16 if SPLIT else 16 * WARPS
    total = tl.zeros([TALL, 4], dtype=tl.float32)
    place, m = tl.arange(0, TALL)[:, None], tl.arange(0, 4)[None, :]
    while start < stop:
        total = _plain_step(
            total, group, step, shape, deltas, offsets, pointers, dynamic_ptr, levels_ptr, rows,
            RATIO, SPLIT, WARPS, MODE, DOUBLE_QUANT,
        )  # fmt: skip
        start += 1
        if (step + 1 == steps) | (start == stop):
            _store(
                total, place, m, m >= 0, group, step, program, programs, steps, total_steps, shape, rows, bias_ptr, y_ptr,
                TALL, MODE, PARTS, BIAS, True,
            )  # fmt: skip
            total = tl.zeros([TALL, 4], dtype=tl.float32)
        last = (step + 1 == steps).to(tl.int32)
        group += last
        step = (step + 1) * (1 - last)


@triton.jit
def _tensor_core_range(
    start, stop, group, step, program, programs, steps, total_steps, shape, deltas, offsets, rows, pointers, dynamic_ptr,
    levels_ptr, bias_ptr, y_ptr,
    MODE: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr, RATIO: tl.constexpr, BIAS: tl.constexpr,
    EARLY: tl.constexpr, TABLE: tl.constexpr, PAIRS: tl.constexpr, RAW: tl.constexpr, SCALES: tl.constexpr,
    PRODUCT: tl.constexpr, SUM: tl.constexpr, FENCE: tl.constexpr, LEVELS_AT: tl.constexpr, SUM_AT: tl.constexpr,
):  # fmt: skip
    TALL: tl.constexpr = 16 if SPLIT else 16 * WARPS
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
                _store(
                    tl.where(fits, value, float("nan")), place, m, written, group, step, program, programs, steps,
                    total_steps, shape, rows, bias_ptr, y_ptr, TALL, MODE, PARTS, BIAS, False,
                )  # fmt: skip
                total = tl.zeros([WARPS * 8, 16], dtype=tl.float32)
            here = there
            group = next_group
            step = next_step


@triton.jit
def _few_rows_kernel(
    x_ptr, codes_ptr, absmax_ptr, scale_ptr, offset_ptr, offset1_ptr, dynamic_ptr, levels_ptr, bias_ptr, y_ptr,
    codes_delta: tl.int64, x_delta: tl.int64, absmax_delta: tl.int64, scale_delta: tl.int64,
    rows, x_row0, x_row1, groups0, steps0, rows0, rows1, blocks0, blocks1,
    absmax0, absmax1, steps, total_steps,
    MODE: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr, RATIO: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr, BIAS: tl.constexpr, PLAIN: tl.constexpr, EARLY: tl.constexpr,
    TABLE: tl.constexpr, PAIRS: tl.constexpr, RAW: tl.constexpr, SCALES: tl.constexpr, PRODUCT: tl.constexpr,
    SUM: tl.constexpr, FENCE: tl.constexpr, LEVELS_AT: tl.constexpr, SUM_AT: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    program, programs = tl.program_id(0), tl.num_programs(0)
    # Where there is one part, whole groups are dealt out.
    deal = total_steps // steps if PARTS == 1 else total_steps
    unit = steps if PARTS == 1 else 1
    start = (program.to(tl.int64) * deal // programs).to(tl.int32) * unit
    stop = ((program + 1).to(tl.int64) * deal // programs).to(tl.int32) * unit
    shape = groups0, steps0, rows0, rows1, blocks0, blocks1, absmax0, absmax1
    deltas = codes_delta, x_delta, absmax_delta, scale_delta
    group = start // steps
    step = start - group * steps
    offsets = 0.0, 0.0
    if DOUBLE_QUANT:
        offsets = tl.load(offset_ptr), tl.load(offset1_ptr)
    pointers = codes_ptr, x_ptr, absmax_ptr, scale_ptr, (x_row0, x_row1)
    if PLAIN:
        _plain_range(
            start, stop, group, step, program, programs, steps, total_steps, shape, deltas, offsets, rows, pointers,
            dynamic_ptr, levels_ptr, bias_ptr, y_ptr, MODE, SPLIT, PARTS, WARPS, RATIO, DOUBLE_QUANT, BIAS,
        )  # fmt: skip
    else:
        _tensor_core_range(
            start, stop, group, step, program, programs, steps, total_steps, shape, deltas, offsets, rows, pointers,
            dynamic_ptr, levels_ptr, bias_ptr, y_ptr, MODE, SPLIT, PARTS, WARPS, RATIO, BIAS, EARLY, TABLE, PAIRS, RAW, SCALES,
            PRODUCT, SUM, FENCE, LEVELS_AT, SUM_AT,
        )  # fmt: skip


@triton.jit
def _sum_of_parts_kernel(
    parts_ptr, bias_ptr, y_ptr, count, out_features,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, PLAIN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    total = tl.load(parts_ptr + place, mask=there, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts_ptr + part * count + place, mask=there, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + place % out_features, mask=there, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, round_to(total, y_ptr.dtype.element_ty, PLAIN), mask=there)


def arguments(coded, bias: Tensor | None, block_size: int, dtype: torch.dtype) -> tuple[list, dict]:
    """Returns what this kernel and small_batch.py's are given: pointers, and constants."""
    codes, absmax, scale, offset, levels = coded
    double_quant = scale is not None
    dynamic = dynamic_levels_on(codes.device, signed=True) if double_quant else levels
    if scale is None:
        scale = offset = levels  # pointers that nothing is read from
    levels = levels.contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()
    pointers = [codes.view(torch.int32), absmax.contiguous(), scale.contiguous(), offset, dynamic, levels, bias]
    constants = {
        "RATIO": block_size // 64, "DOUBLE_QUANT": double_quant, "BIAS": bias is not None,
        "PLAIN": tiles.plain(codes.device),
    }  # fmt: skip
    return pointers, constants


def _launch(xs: list[Tensor], weights: list, mode: int, bias: Tensor | None, y: Tensor, block_size: int, tile: Tile) -> None:
    """Fills y: (rows, out_features) where tile.parts is 1, else float32 (parts, rows, out_features)."""
    (codes, absmax, scale, offset, dynamic, levels, bias), constants = arguments(weights[0], bias, block_size, xs[0].dtype)
    others = [codes, absmax, scale, offset]
    if len(weights) == 2:
        others, _ = arguments(weights[1], None, block_size, xs[0].dtype)
    warps, plain = tile.warps, constants["PLAIN"]
    tall, wide = (16, 4 * warps) if tile.split else (16 * warps, 4)
    (out0, columns0), (out1, columns1) = weights[0][0].shape, weights[-1][0].shape
    blocks0, blocks1 = columns0 // 32, columns1 // 32
    groups, steps0 = triton.cdiv(out0, tall), triton.cdiv(blocks0, wide)
    groups0, steps = groups, steps0
    if mode == STACKED:
        groups += triton.cdiv(out1, tall)
    elif mode == SUMMED:
        steps += triton.cdiv(blocks1, wide)
    # So few that no group is the work of more programs than there are parts.
    most = groups if tile.parts == 1 else min(groups * steps, groups * (tile.parts - 2))
    assembly = dict.fromkeys(("TABLE", "PAIRS", "RAW", "SCALES", "PRODUCT", "SUM", "FENCE"), "")
    options = {}
    if not plain:
        double_quant, dtype = constants["DOUBLE_QUANT"], xs[0].dtype
        assembly = {
            "TABLE": ptx.table(warps, dtype, double_quant, exchange=tile.split), "PAIRS": ptx.pairs(),
            "RAW": ptx.raw_scales(double_quant), "SCALES": ptx.scales(double_quant), "PRODUCT": ptx.product(dtype),
            "SUM": ptx.sum_of_warps(warps) if tile.split else ptx.SUM_OF_HALVES, "FENCE": ptx.FENCE,
        }  # fmt: skip
        xs = [x.view(torch.int32) for x in xs]
        options = {"maxnreg": tile.registers, "launch_pdl": tile.early}
    unit = 2 if plain else 1  # of x's elements in a word
    _few_rows_kernel[(min(tile.programs, most),)](
        xs[0], codes, absmax, scale, offset, others[3], dynamic, levels, bias, y,
        _distance(codes, others[0]), _distance(xs[0], xs[-1]) // unit, _distance(absmax, others[1]),
        _distance(scale, others[2]),
        xs[0].shape[0], xs[0].shape[1] // unit, xs[-1].shape[1] // unit, groups0, steps0, out0, out1, blocks0, blocks1,
        absmax.shape[1], others[1].shape[1], steps, groups * steps,
        MODE=mode, SPLIT=tile.split, PARTS=tile.parts, WARPS=warps, **constants, EARLY=tile.early and not plain, **assembly,
        LEVELS_AT=ptx.PAIRS, SUM_AT=ptx.PAIRS + ptx.LEVELS, num_warps=warps, num_stages=1, enable_fp_fusion=True, **options,
    )  # fmt: skip


def _distance(a: Tensor, b: Tensor) -> int:
    """Returns how many elements behind a's first b's first is."""
    apart, left = divmod(b.data_ptr() - a.data_ptr(), a.element_size())
    assert not left
    return apart


def multiply(x: Tensor, coded, bias: Tensor | None, block_size: int, tile: Tile) -> Tensor:
    """Returns x (1 to 4 rows, contiguous, 16-byte aligned) times the weight of `coded`: rows of codes, blocks of 64 n."""
    rows, out_features = x.shape[0], coded[0].shape[0]
    y = torch.empty((rows, out_features), dtype=x.dtype, device=x.device)
    if tile.parts == 1:
        _launch([x], [coded], SINGLE, bias, y, block_size, tile)
        return y
    parts = torch.empty((tile.parts, rows, out_features), dtype=torch.float32, device=x.device)
    _launch([x], [coded], SINGLE, None, parts, block_size, tile)
    plain, count = tiles.plain(x.device), rows * out_features
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    _sum_of_parts_kernel[(triton.cdiv(count, 512),)](
        parts, bias, y, count, out_features, PARTS=tile.parts, BLOCK=512, BIAS=bias is not None, PLAIN=plain,
        EARLY=tile.early and not plain, num_warps=4, **({} if plain else {"launch_pdl": tile.early}),
    )  # fmt: skip
    return y


def multiply_two(xs: list[Tensor], weights: list, block_size: int, tile: Tile) -> Tensor:
    """Returns the parts of two products, float32 (parts, rows, out_features), to be added up.

    Args:
        xs: one x (rows, in_features), as in `multiply`: the results of both weights then lie beside each other; or two, whose
            products are added. weights: two, as in `multiply`; of the same levels.
    """
    stacked = len(xs) == 1
    wide = weights[0][0].shape[0] + (weights[1][0].shape[0] if stacked else 0)
    parts = torch.empty((tile.parts, xs[0].shape[0], wide), dtype=torch.float32, device=xs[0].device)
    _launch(xs, weights, STACKED if stacked else SUMMED, None, parts, block_size, tile)
    return parts

"""Triton kernel of x @ decode(W).T for one to sixteen rows of x: the weight is read once, as codes, at the speed of memory.

    y[m, n] = sum over blocks b of scale[n, b] * sum over k in b of levels[code[n, k]] * x[m, k]   (+ bias[n])

Layout: x (M, K) contiguous; codes uint8 (N, K / 2), the first of a pair in the high nibble, read as int32 words of eight
codes; absmax as in nf4_codec.py; y (M, N). K is a multiple of 64 and blocks hold a multiple of 64 columns: a row of codes
then is whole chunks of 32 bytes that share a scale. Sums are float32, in an order that the shapes alone decide.

Two weights may be multiplied in one launch, as a launch costs as much as a quarter of a product: STACKED, two weights of one x,
whose results lie beside each other; SUMMED, two weights of an x each, whose results are added.

The unit of work is a step: some columns of a group of TALL rows. The groups' steps lie one after the other, and the programs
take even ranges of them. So a group may be the work of several programs: each writes its part, and what reads the product adds
up the parts (a part that nobody computed is zero). What a program does with its range is in four_rows.py and sixteen_rows.py.
PLAIN is the same without inline PTX: for the interpreter, and for GPUs before capability 8.0, where there is no tensor core
that Triton uses. The specification is nf4.linear over nf4.dequantize.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlite.dynamic8 import dynamic_levels_on
from qlite.kernels import ptx, sixteen_rows, tiles
from qlite.kernels.four_rows import range_of_four
from qlite.kernels.sixteen_rows import range_of_sixteen
from qlite.kernels.steps import SINGLE, STACKED, SUMMED, locate, round_to, store_sums
from qlite.kernels.tiles import Tile


@triton.jit
def _plain_step(
    total, group, step, shape, deltas, offsets, pointers, dynamic_ptr, levels_ptr, rows,
    RATIO: tl.constexpr, TALL: tl.constexpr, CHUNKS: tl.constexpr, TILE_M: tl.constexpr, MODE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
):  # fmt: skip
    """Adds a step's products with TILE_M rows of x to total (rows of the group, TILE_M)."""
    codes_ptr, x_ptr, absmax_ptr, scale_ptr, x_rows = pointers
    group, step, out, blocks, absmax_a_row, far, second = locate(group, step, shape, deltas, MODE)
    row = tl.minimum(group * TALL + tl.arange(0, TALL), out - 1)[:, None]
    word = tl.arange(0, 16)[None, :]
    m = tl.arange(0, TILE_M)[None, None, :]
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
def _plain_range(
    start, stop, group, step, program, programs, steps, total_steps, shape, deltas, offsets, rows, pointers, dynamic_ptr,
    levels_ptr, bias_ptr, y_ptr,
    MODE: tl.constexpr, TALL: tl.constexpr, CHUNKS: tl.constexpr, TILE_M: tl.constexpr, PARTS: tl.constexpr,
    RATIO: tl.constexpr, DOUBLE_QUANT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([TALL, TILE_M], dtype=tl.float32)
    place, m = tl.arange(0, TALL)[:, None], tl.arange(0, TILE_M)[None, :]
    while start < stop:
        total = _plain_step(
            total, group, step, shape, deltas, offsets, pointers, dynamic_ptr, levels_ptr, rows,
            RATIO, TALL, CHUNKS, TILE_M, MODE, DOUBLE_QUANT,
        )  # fmt: skip
        start += 1
        if (step + 1 == steps) | (start == stop):
            store_sums(
                total, place, m, m >= 0, group, step, program, programs, steps, total_steps, shape, rows, bias_ptr, y_ptr,
                TALL, MODE, PARTS, BIAS, True, TILE_M == 16,
            )  # fmt: skip
            total = tl.zeros([TALL, TILE_M], dtype=tl.float32)
        last = (step + 1 == steps).to(tl.int32)
        group += last
        step = (step + 1) * (1 - last)


@triton.jit
def _few_rows_kernel(
    x_ptr, codes_ptr, absmax_ptr, scale_ptr, offset_ptr, offset1_ptr, dynamic_ptr, levels_ptr, bias_ptr, y_ptr,
    codes_delta: tl.int64, x_delta: tl.int64, absmax_delta: tl.int64, scale_delta: tl.int64,
    rows, x_row0, x_row1, groups0, steps0, rows0, rows1, blocks0, blocks1,
    absmax0, absmax1, steps, total_steps,
    MODE: tl.constexpr, SPLIT: tl.constexpr, TALL: tl.constexpr, CHUNKS: tl.constexpr, TILE_M: tl.constexpr,
    PARTS: tl.constexpr, WARPS: tl.constexpr, RATIO: tl.constexpr,
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
            dynamic_ptr, levels_ptr, bias_ptr, y_ptr, MODE, TALL, CHUNKS, TILE_M, PARTS, RATIO, DOUBLE_QUANT, BIAS,
        )  # fmt: skip
    elif TILE_M == 16:
        range_of_sixteen(
            start, stop, group, step, program, programs, steps, total_steps, shape, deltas, offsets, rows, pointers,
            dynamic_ptr, levels_ptr, bias_ptr, y_ptr, MODE, PARTS, WARPS, RATIO, BIAS, EARLY, TABLE, PAIRS, RAW, SCALES,
            PRODUCT, FENCE, LEVELS_AT,
        )  # fmt: skip
    else:
        range_of_four(
            start, stop, group, step, program, programs, steps, total_steps, shape, deltas, offsets, rows, pointers,
            dynamic_ptr, levels_ptr, bias_ptr, y_ptr, MODE, SPLIT, TALL, PARTS, WARPS, RATIO, BIAS, EARLY, TABLE, PAIRS, RAW,
            SCALES, PRODUCT, SUM, FENCE, LEVELS_AT, SUM_AT,
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
    early = begins_early(tile, *weights)
    warps, plain, sixteen = tile.warps, constants["PLAIN"], tile.tile_m == sixteen_rows.ROWS
    if sixteen:
        tall, chunks = sixteen_rows.TALL * warps, 1
    else:
        tall, chunks = (16, 2 * warps) if tile.split else (16 * warps, 2)
    (out0, columns0), (out1, columns1) = weights[0][0].shape, weights[-1][0].shape
    blocks0, blocks1 = columns0 // 32, columns1 // 32
    groups, steps0 = triton.cdiv(out0, tall), triton.cdiv(blocks0, 2 * chunks)
    groups0, steps = groups, steps0
    if mode == STACKED:
        groups += triton.cdiv(out1, tall)
    elif mode == SUMMED:
        steps += triton.cdiv(blocks1, 2 * chunks)
    # So few that no group is the work of more programs than there are parts.
    most = groups if tile.parts == 1 else min(groups * steps, groups * (tile.parts - 1))
    rows, widths, unit = len(xs[0]), [x.shape[1] for x in xs], 2  # of x's elements in a word
    assembly, options = dict.fromkeys(("TABLE", "PAIRS", "RAW", "SCALES", "PRODUCT", "SUM", "FENCE"), ""), {}
    if not plain:
        double_quant, dtype = constants["DOUBLE_QUANT"], xs[0].dtype
        assembly = {
            "TABLE": ptx.table(warps, dtype, double_quant, exchange=tile.split), "PAIRS": ptx.pairs(),
            "RAW": ptx.raw_scales(double_quant), "SUM": ptx.sum_of_warps(warps) if tile.split else ptx.SUM_OF_HALVES,
            "SCALES": ptx.scales_of_sixteens(double_quant) if sixteen else ptx.scales(double_quant),
            "PRODUCT": ptx.product_of_sixteen(dtype) if sixteen else ptx.product(dtype), "FENCE": ptx.FENCE,
        }  # fmt: skip
        xs = [sixteen_rows.packed(x).view(torch.int64) if sixteen else x.view(torch.int32) for x in xs]
        options, unit = {"maxnreg": tile.registers, "launch_pdl": early}, 1
    _few_rows_kernel[(min(tile.programs, most),)](
        xs[0], codes, absmax, scale, offset, others[3], dynamic, levels, bias, y,
        _distance(codes, others[0]), _distance(xs[0], xs[-1]) // unit, _distance(absmax, others[1]),
        _distance(scale, others[2]),
        rows, widths[0] // 2, widths[-1] // 2, groups0, steps0, out0, out1, blocks0, blocks1,
        absmax.shape[1], others[1].shape[1], steps, groups * steps,
        MODE=mode, SPLIT=tile.split, TALL=tall, CHUNKS=chunks, TILE_M=tile.tile_m, PARTS=tile.parts, WARPS=warps, **constants,
        EARLY=early, **assembly, LEVELS_AT=ptx.PAIRS, SUM_AT=ptx.PAIRS + ptx.LEVELS,
        num_warps=warps, num_stages=1, enable_fp_fusion=True, **options,
    )  # fmt: skip


def begins_early(tile: Tile, *weights: tuple) -> bool:
    """Whether a launch may begin early: none of the parts that it reads before its wait is copied for it (tiles.early)."""
    return tile.early and all(part is None or part.is_contiguous() for weight in weights for part in weight)


def _distance(a: Tensor, b: Tensor) -> int:
    """Returns how many elements behind a's first b's first is."""
    apart, left = divmod(b.data_ptr() - a.data_ptr(), a.element_size())
    assert not left
    return apart


def multiply(x: Tensor, coded, bias: Tensor | None, block_size: int, tile: Tile) -> Tensor:
    """Returns x (contiguous, 16-byte aligned) times the weight of `coded`: rows of codes, blocks of 64 n.

    x has up to 4 rows, or up to 16 where tile.tile_m is 16.
    """
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

"""Triton kernel of x @ decode(W).T for one to four rows of x: the weight is read once, as codes, at the speed of memory.

    y[m, n] = sum over blocks b of scale[n, b] * sum over k in b of levels[code[n, k]] * x[m, k]   (+ bias[n])

Layout: x (M, K) contiguous; codes uint8 (N, K / 2), the first of a pair in the high nibble, read as int32 words of eight
codes; absmax as in nf4_codec.py; y (M, N). K is a multiple of 64 and blocks hold a multiple of 64 columns: a row of codes
then is whole chunks of 32 bytes that share a scale. Sums are float32, in an order that the shapes alone decide.

A warp multiplies 16 rows of the weight by a chunk of two blocks; the warps of a program share the chunks of its 16 rows. The
product has eight columns: columns 0-3 are the rows of x with the second block's part zero, columns 4-7 with the first's, so
that each can be given its own scale. PLAIN is the same without inline PTX: for the interpreter, and for GPUs before
capability 8.0, where there is no tensor core that Triton uses. The specification is nf4.linear over nf4.dequantize.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlite.dynamic8 import dynamic_levels_on
from qlite.kernels import ptx, tiles
from qlite.kernels.tiles import Tile


@triton.jit
def round_to(value, dtype: tl.constexpr, PLAIN: tl.constexpr):
    """Returns float32 rounded to a dtype, to the nearest."""
    if PLAIN and dtype == tl.bfloat16:  # the interpreter cuts float32 to bfloat16
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where(value == value, rounded, value)  # the bits of a NaN could overflow
    return value.to(dtype)


@triton.jit
def _decoded_absmax(index, mask, offset, absmax_ptr, scale_ptr, dynamic_ptr, DOUBLE_QUANT: tl.constexpr):
    absmax = tl.load(absmax_ptr + index, mask=mask, other=0)
    if DOUBLE_QUANT:
        group = tl.load(scale_ptr + index // 256, mask=mask, other=0.0)
        absmax = tl.load(dynamic_ptr + absmax.to(tl.int32)) * group + offset
    return absmax


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
    a0, a1, a2, a3 = pairs_of(low, table, PAIRS)
    b0, b1, b2, b3 = pairs_of(high, table, PAIRS)
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
def pairs_of(words, table, PAIRS: tl.constexpr):
    """Returns the pairs of levels of the four bytes of each word, as the inline PTX of PAIRS looks them up in a table."""
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
        tl.store(y_ptr + m * out_features + place, round_to(total, y_ptr.dtype.element_ty, PLAIN), mask=mask)


def arguments(coded, bias: Tensor | None, block_size: int, dtype: torch.dtype) -> tuple[list, dict]:
    """Returns what this kernel and small_batch.py's are given: pointers, and constants."""
    codes, absmax, scale, offset, levels = coded
    double_quant = scale is not None
    dynamic = dynamic_levels_on(codes.device, signed=True) if double_quant else levels
    if scale is None:
        scale = offset = levels  # pointers that nothing is read from
    levels = levels.contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()
    pointers = [codes.view(torch.int32), absmax.contiguous(), scale, offset, dynamic, levels, bias]
    constants = {
        "RATIO": block_size // 64, "DOUBLE_QUANT": double_quant, "BIAS": bias is not None,
        "PLAIN": tiles.plain(codes.device),
    }  # fmt: skip
    return pointers, constants


def multiply(x: Tensor, coded, bias: Tensor | None, block_size: int, tile: Tile) -> Tensor:
    """Returns x (1 to 4 rows, contiguous, 16-byte aligned) times the weight of `coded`: rows of codes, blocks of 64 n."""
    (rows, in_features), out_features, warps = x.shape, coded[0].shape[0], tile.warps
    y = torch.empty((rows, out_features), dtype=x.dtype, device=x.device)
    pointers, constants = arguments(coded, bias, block_size, x.dtype)
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

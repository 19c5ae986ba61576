"""Triton kernels of the int8 linear layer: int8 x int8 on tensor cores, and weights alone in int8.

    dynamic:      y = round_to_dtype(((sum of code_x * code_w) * (absmax_x / 127)) * (absmax_w / 127) + bias)
    weight only:  y = round_to_dtype((sum of x * code_w) * (absmax_w / 127) + bias)

Layout, with M rows, N out_features and K in_features: x (M, K) 16 bits; codes int8 (N, K) and (M, K); absmax float32 (N, 1)
and (M, 1); bias (N,) or none; y (M, N). Sums of products of codes are exact in int32, every other operation is rounded on
its own (no contraction to fused multiply-add), so the dynamic product equals int8.linear_dynamic bit for bit.

Not done here: stream-K, and a reduction of K's shares by the last block: a second launch costs 2 us, and needs no
counters that start at zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qlite.kernels.int8_codec import dequantize, quantize_rows, to_output


class FewRows(NamedTuple):
    """How a weight-only product is cut: tiles of (out, rows, in), shares of K, and the launch."""

    out: int
    rows: int
    columns: int
    shares: int
    warps: int
    stages: int


class OneRow(NamedTuple):
    """How a row is multiplied without tensor cores: tiles of (out, in), and the launch."""

    out: int
    columns: int
    warps: int
    stages: int


class ManyRows(NamedTuple):
    """How a product of codes is cut: tiles of (rows, out, in), rows of tiles that walk together, and the launch."""

    rows: int
    out: int
    columns: int
    group: int
    warps: int
    stages: int
    tensor_maps: bool


ONE_ROW = OneRow(8, 512, 4, 5)


def few_rows_tile(rows: int, out_features: int, in_features: int, capability: tuple[int, int]) -> FewRows:
    """Returns the cut of a weight-only product of up to 64 rows, from sm_80 on."""
    width = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if width == 16 and capability[0] == 9:
        shares = max(1, min(1136 // triton.cdiv(out_features, 64), triton.cdiv(in_features, 128) // 4, 8))
        return FewRows(64, 16, 128, shares, 4, 4)
    wide = width == 64 and capability >= (9, 0)
    out, stages = 256 if wide else 128, 5 if capability in ((8, 0), (9, 0), (10, 0)) else 3
    tiles, steps = triton.cdiv(out_features, out), triton.cdiv(in_features, 64)
    # About eight blocks a multiprocessor, of at least four steps each.
    shares = max(1, min(1024 // tiles, steps // 4, 4 if width == 64 else 8))
    return FewRows(out, width, 64, shares, 8 if wide else 4, stages)


def many_rows_tile(rows: int, aligned: bool, capability: tuple[int, int]) -> ManyRows:
    """Returns the cut of a product of codes, whose rows all begin at a multiple of 16 bytes or not, from sm_80 on."""
    if not aligned:  # bytes one by one: larger tiles do not fit in a thread's registers
        return ManyRows(64, 128, 64, 8, 8, 3, False)
    if capability[0] != 9:
        return ManyRows(128, 128, 64, 8, 8, 3, False)
    return ManyRows(128, 256 if rows > 512 else 128, 128, 8, 8, 3, True)


#: Four int8 codes of a word to two registers of two bfloat16: 128 + (code & 127), less 128, or 256 where the sign is set.
#: A product with one keeps the exact difference a single instruction from sm_80 on.
_WORD_TO_BFLOAT16 = tl.constexpr("""{
.reg .b32 low, sign, high, m, s, one;
and.b32 low, $2, 0x7f7f7f7f;
and.b32 sign, $2, 0x80808080;
mov.b32 high, 0xc343;
mov.b32 one, 0x3f803f80;
prmt.b32 m, low, high, 0x4140;
prmt.b32 s, sign, high, 0x5150;
fma.rn.bf16x2 $0, m, one, s;
prmt.b32 m, low, high, 0x4342;
prmt.b32 s, sign, high, 0x5352;
fma.rn.bf16x2 $1, m, one, s;
}""")
#: The same to float16, which holds 1024 + (code + 128) exactly.
_WORD_TO_FLOAT16 = tl.constexpr("""{
.reg .b32 u, m, shift;
xor.b32 u, $2, 0x80808080;
mov.b32 shift, 0x64806480;
prmt.b32 m, u, 0x64, 0x4140;
sub.rn.f16x2 $0, m, shift;
prmt.b32 m, u, 0x64, 0x4342;
sub.rn.f16x2 $1, m, shift;
}""")

#: The same to four float32, which hold 2^23 + (code + 128) exactly.
_WORD_TO_FLOAT32 = tl.constexpr("""{
.reg .b32 u, m, exponent;
xor.b32 u, $4, 0x80808080;
mov.b32 exponent, 0x4b000000;
prmt.b32 m, u, exponent, 0x7440;
sub.rn.f32 $0, m, 0f4B000080;
prmt.b32 m, u, exponent, 0x7441;
sub.rn.f32 $1, m, 0f4B000080;
prmt.b32 m, u, exponent, 0x7442;
sub.rn.f32 $2, m, 0f4B000080;
prmt.b32 m, u, exponent, 0x7443;
sub.rn.f32 $3, m, 0f4B000080;
}""")


@triton.jit
def _row_scale(absmax):
    """Returns absmax / 127, and NaN for a row that holds what is not finite."""
    return tl.where(absmax < float("inf"), tl.math.div_rn(absmax, 127.0), float("nan"))


@triton.jit
def _tile(number, tiles_down, tiles_across, GROUP: tl.constexpr):
    """Returns (tile row, tile column) so that GROUP rows of tiles walk across together and share the weights in L2."""
    in_group = GROUP * tiles_across
    first = number // in_group * GROUP
    height = min(tiles_down - first, GROUP)
    return first + number % in_group % height, number % in_group // height


@triton.jit
def _store_product(
    sums, row, column, x_absmax_ptr, absmax_ptr, bias_ptr, y_ptr, rows, out_features,
    HAS_BIAS: tl.constexpr, ROUND_BFLOAT16: tl.constexpr,
):  # fmt: skip
    x_scale = _row_scale(tl.load(x_absmax_ptr + row, mask=row < rows, other=0.0))
    scale = tl.math.div_rn(tl.load(absmax_ptr + column, mask=column < out_features, other=0.0), 127.0)
    value = sums.to(tl.float32) * x_scale[:, None] * scale[None, :]
    if HAS_BIAS:
        value += tl.load(bias_ptr + column, mask=column < out_features, other=0.0).to(tl.float32)[None, :]
    value = to_output(value, ROUND_BFLOAT16, y_ptr.dtype.element_ty)
    inside = (row < rows)[:, None] & (column < out_features)[None, :]
    tl.store(y_ptr + row.to(tl.int64)[:, None] * out_features + column[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["rows"])  # one kernel for every batch size
def _product_kernel(
    x_ptr, codes_ptr, x_absmax_ptr, absmax_ptr, bias_ptr, y_ptr, rows, out_features, in_features,
    ROWS: tl.constexpr, OUT: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
    HAS_BIAS: tl.constexpr, ROUND_BFLOAT16: tl.constexpr,
):  # fmt: skip
    down, across = _tile(tl.program_id(0), tl.cdiv(rows, ROWS), tl.cdiv(out_features, OUT), GROUP)
    row, out = down * ROWS + tl.arange(0, ROWS), across * OUT + tl.arange(0, OUT)
    column = tl.arange(0, COLUMNS)
    # Rows beyond the last are read as the last and not stored.
    x_ptr += tl.minimum(row, rows - 1).to(tl.int64)[:, None] * in_features + column[None, :]
    codes_ptr += tl.minimum(out, out_features - 1).to(tl.int64)[None, :] * in_features + column[:, None]
    sums = tl.zeros([ROWS, OUT], dtype=tl.int32)
    for start in range(0, in_features, COLUMNS):
        if WHOLE:
            x, code = tl.load(x_ptr + start), tl.load(codes_ptr + start)
        else:
            inside = column < in_features - start
            x = tl.load(x_ptr + start, mask=inside[None, :], other=0)
            code = tl.load(codes_ptr + start, mask=inside[:, None], other=0)
        sums = tl.dot(x, code, sums, out_dtype=tl.int32)
    _store_product(
        sums, row, out, x_absmax_ptr, absmax_ptr, bias_ptr, y_ptr, rows, out_features, HAS_BIAS, ROUND_BFLOAT16
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tiles", "programs"])
def _product_by_map_kernel(
    x_map, codes_map, x_absmax_ptr, absmax_ptr, bias_ptr, y_ptr, rows, out_features, in_features, tiles, programs,
    ROWS: tl.constexpr, OUT: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, ROUND_BFLOAT16: tl.constexpr,
):  # fmt: skip
    """The same over tensor maps: the copy engine fills shared memory, and writes zeros for what lies outside."""
    for number in tl.range(tl.program_id(0), tiles, programs):
        down, across = _tile(number, tl.cdiv(rows, ROWS), tl.cdiv(out_features, OUT), GROUP)
        sums = tl.zeros([ROWS, OUT], dtype=tl.int32)
        for start in range(0, in_features, COLUMNS):
            x = x_map.load([down * ROWS, start])
            code = codes_map.load([across * OUT, start])
            sums = tl.dot(x, code.T, sums, out_dtype=tl.int32)
        row, out = down * ROWS + tl.arange(0, ROWS), across * OUT + tl.arange(0, OUT)
        _store_product(
            sums, row, out, x_absmax_ptr, absmax_ptr, bias_ptr, y_ptr, rows, out_features, HAS_BIAS, ROUND_BFLOAT16
        )  # fmt: skip


@triton.jit
def _halves(pair, kind: tl.constexpr):
    """Returns the low and the high half of a register as 16-bit floats."""
    low = (pair & 0xFFFF).to(tl.uint16).to(kind, bitcast=True)
    return low, ((pair >> 16) & 0xFFFF).to(tl.uint16).to(kind, bitcast=True)


@triton.jit
def _decoded_words(word, kind: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Returns the four codes of each word of (A, B) as (A, B, 2, 2) numbers, exact: of kind in assembly, else float32.

    By bytes that are put into the mantissa of a float: conversions of integers run at an eighth of the speed.
    """
    if ASSEMBLY and kind == tl.float32:
        a, b, c, d = tl.inline_asm_elementwise(
            _WORD_TO_FLOAT32, "=r,=r,=r,=r,r", [word], dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True, pack=1,
        )  # fmt: skip
        first, second = tl.join(a, c), tl.join(b, d)
    elif ASSEMBLY:
        CODE: tl.constexpr = _WORD_TO_BFLOAT16 if kind == tl.bfloat16 else _WORD_TO_FLOAT16
        low, high = tl.inline_asm_elementwise(CODE, "=r,=r,r", [word], dtype=(tl.int32, tl.int32), is_pure=True, pack=1)
        first, second = _halves(tl.join(low, high), kind)
    else:
        word = word ^ -0x7F7F7F80
        first = ((tl.join(word, word >> 16) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
        second = ((tl.join(word >> 8, word >> 24) & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    return tl.join(first, second)


@triton.jit(do_not_specialize=["rows", "steps"])
def _few_rows_kernel(
    x_ptr, words_ptr, absmax_ptr, bias_ptr, y_ptr, parts_ptr, rows, out_features, in_features, row_stride, steps,
    OUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, WHOLE: tl.constexpr,
    SHARES: tl.constexpr, HAS_BIAS: tl.constexpr, ROUND_BFLOAT16: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Weights stand on the left, so that each lane loads what its tensor core wants of it: 16 bytes of one row.

    A lane t of four holds bytes 16 t .. 16 t + 15 of 64, and is asked for columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of each 16:
    the columns are taken in another order, the same for x, and no weight moves between lanes. The rows likewise.
    """
    tile, share = tl.program_id(0), tl.program_id(1)
    index = tl.arange(0, OUT)
    repeat = index // (8 * WARPS)
    row = tile * OUT + repeat // 2 * (16 * WARPS) + index // 8 % WARPS * 16 + repeat % 2 * 8 + index % 8
    row = tl.minimum(row, out_features - 1).to(tl.int64)
    word = tl.arange(0, COLUMNS // 4)
    words_ptr += row[:, None] * (in_features // 16 * 4) + word[None, :]
    k = tl.arange(0, COLUMNS)  # (64s, step of 16, half of 8, lane, of a pair)
    column = k // 64 * 64 + k // 2 % 4 * 16 + k // 16 % 4 * 4 + k // 8 % 2 * 2 + k % 2
    m = tl.arange(0, ROWS)
    x_ptr += m.to(tl.int64)[None, :] * row_stride + column[:, None]
    sums = tl.zeros([OUT, ROWS], dtype=tl.float32)
    for step in range(share * steps // SHARES, (share + 1) * steps // SHARES):
        start = step * COLUMNS
        if WHOLE:
            codes = tl.load(words_ptr + start // 4, eviction_policy="evict_first")
            x = tl.load(x_ptr + start, mask=m[None, :] < rows, other=0.0)
        else:
            codes = tl.load(words_ptr + start // 4, mask=word[None, :] < (in_features - start) // 16 * 4, other=0)
            x = tl.load(x_ptr + start, mask=(m[None, :] < rows) & (column[:, None] < in_features - start), other=0.0)
        weight = _decoded_words(codes, x_ptr.dtype.element_ty, ASSEMBLY)
        weight = tl.reshape(weight, [OUT // (16 * WARPS), 2, WARPS, 8, COLUMNS // 64, 4, 4, 2, 2])
        weight = tl.reshape(tl.permute(weight, [0, 2, 1, 3, 4, 6, 7, 5, 8]), [OUT, COLUMNS])
        if not ASSEMBLY:
            x = x.to(tl.float32)
        sums = tl.dot(weight, x, sums, input_precision="ieee")
    out = tile * OUT + tl.arange(0, OUT)
    inside = (out < out_features)[:, None] & (m < rows)[None, :]
    place = m.to(tl.int64)[None, :] * out_features + out[:, None]
    if SHARES == 1:
        value = sums * tl.math.div_rn(tl.load(absmax_ptr + out, mask=out < out_features, other=0.0), 127.0)[:, None]
        if HAS_BIAS:
            value += tl.load(bias_ptr + out, mask=out < out_features, other=0.0).to(tl.float32)[:, None]
        tl.store(y_ptr + place, to_output(value, ROUND_BFLOAT16, y_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(parts_ptr + share.to(tl.int64) * rows * out_features + place, sums, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _join_shares_kernel(
    parts_ptr, absmax_ptr, bias_ptr, y_ptr, rows, out_features,
    SHARES: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, ROUND_BFLOAT16: tl.constexpr,
):  # fmt: skip
    """Adds the shares of K in their order."""
    out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = out < out_features
    value = tl.zeros([BLOCK], dtype=tl.float32)
    for share in tl.static_range(SHARES):
        value += tl.load(parts_ptr + (share * rows + row) * out_features + out, mask=inside, other=0.0)
    value *= tl.math.div_rn(tl.load(absmax_ptr + out, mask=inside, other=0.0), 127.0)
    if HAS_BIAS:
        value += tl.load(bias_ptr + out, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * out_features + out, to_output(value, ROUND_BFLOAT16, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _one_row_kernel(
    x_ptr, codes_ptr, absmax_ptr, bias_ptr, y_ptr, out_features, in_features, row_stride,
    OUT: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROUND_BFLOAT16: tl.constexpr, ASSEMBLY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """No tensor cores: for one row, and for chips whose tensor cores Triton does not know. A program row for a row of x."""
    m = tl.program_id(1).to(tl.int64)
    x_ptr += m * row_stride
    out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    row = tl.minimum(out, out_features - 1).to(tl.int64)
    k = tl.arange(0, COLUMNS)
    sums = tl.zeros([OUT, COLUMNS], dtype=tl.float32)
    for start in tl.range(0, in_features, COLUMNS, num_stages=STAGES):
        x = tl.load(x_ptr + start + k) if WHOLE else tl.load(x_ptr + start + k, mask=k < in_features - start, other=0.0)
        if WORDS:
            word = tl.arange(0, COLUMNS // 4)
            place = codes_ptr + row[:, None] * (in_features // 16 * 4) + start // 4 + word[None, :]
            if WHOLE:
                codes = tl.load(place, eviction_policy="evict_first")
            else:
                codes = tl.load(place, mask=word[None, :] < (in_features - start) // 16 * 4, other=0)
            weight = tl.reshape(_decoded_words(codes, tl.float32, ASSEMBLY), [OUT, COLUMNS])
        else:
            place = codes_ptr + row[:, None] * in_features + start + k[None, :]
            weight = tl.load(place, mask=k[None, :] < in_features - start, other=0).to(tl.float32)
        sums += weight * x.to(tl.float32)[None, :]
    value = tl.sum(sums, axis=1)
    value *= tl.math.div_rn(tl.load(absmax_ptr + out, mask=out < out_features, other=0.0), 127.0)
    if HAS_BIAS:
        value += tl.load(bias_ptr + out, mask=out < out_features, other=0.0).to(tl.float32)
    value = to_output(value, ROUND_BFLOAT16, y_ptr.dtype.element_ty)
    tl.store(y_ptr + m * out_features + out, value, mask=out < out_features)


def _address(tensor: Tensor) -> bool:
    """Whether 16 bytes can be read at a time."""
    return tensor.data_ptr() % 16 == 0


def _flags(y: Tensor, bias: Tensor | None) -> dict[str, bool]:
    return {"HAS_BIAS": bias is not None, "ROUND_BFLOAT16": y.dtype == torch.bfloat16 and not y.is_cuda}


def product(
    x_codes: Tensor, x_absmax: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, dtype: torch.dtype, tile: ManyRows
) -> Tensor:
    """Returns (M, N) in `dtype` of contiguous codes (M, K) and (N, K), from sm_80 on; see int8.linear_dynamic."""
    rows, (out_features, in_features) = x_codes.shape[0], codes.shape
    y = torch.empty((rows, out_features), dtype=dtype, device=codes.device)
    if not y.numel():
        return y
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(out_features, tile.out)
    cut = {"ROWS": tile.rows, "OUT": tile.out, "COLUMNS": tile.columns, "GROUP": tile.group, **_flags(y, bias)}
    launch = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
    ends = (x_absmax, absmax, bias, y, rows, out_features, in_features)
    if tile.tensor_maps and in_features % 16 == 0 and _address(codes):
        maps = [
            TensorDescriptor.from_tensor(x_codes, [tile.rows, tile.columns]),
            TensorDescriptor.from_tensor(codes, [tile.out, tile.columns]),
        ]
        programs = tiles
        if codes.is_cuda:
            programs = min(tiles, torch.cuda.get_device_properties(codes.device).multi_processor_count)
        _product_by_map_kernel[(programs,)](*maps, *ends, tiles, programs, **cut, **launch)
    else:
        _product_kernel[(tiles,)](x_codes, codes, *ends, WHOLE=in_features % tile.columns == 0, **cut, **launch)
    return y


def few_rows(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, tile: FewRows) -> Tensor:
    """Returns (M, N) in the 16 bits of x (M, K), M <= tile.rows, K % 16 == 0, from sm_80 on; see int8.linear_weight_only."""
    rows, (out_features, in_features) = x.shape[0], codes.shape
    y = torch.empty((rows, out_features), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    parts = torch.empty((tile.shares, rows, out_features), dtype=torch.float32, device=x.device) if tile.shares > 1 else None
    _few_rows_kernel[(triton.cdiv(out_features, tile.out), tile.shares)](
        x, codes.view(torch.int32), absmax, bias, y, parts,
        rows, out_features, in_features, x.stride(0), triton.cdiv(in_features, tile.columns),
        OUT=tile.out, ROWS=tile.rows, COLUMNS=tile.columns, WARPS=tile.warps, WHOLE=in_features % tile.columns == 0,
        SHARES=tile.shares, ASSEMBLY=x.is_cuda, **_flags(y, bias),
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if parts is not None:
        _join_shares_kernel[(triton.cdiv(out_features, 512), rows)](
            parts, absmax, bias, y, rows, out_features, SHARES=tile.shares, BLOCK=512, **_flags(y, bias),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return y


def one_row(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, tile: OneRow = ONE_ROW) -> Tensor:
    """Returns (M, N) in the 16 bits of x (M, K), each row on its own and on any chip; see int8.linear_weight_only."""
    rows, (out_features, in_features) = x.shape[0], codes.shape
    y = torch.empty((rows, out_features), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    words = in_features % 16 == 0 and _address(codes)
    _one_row_kernel[(triton.cdiv(out_features, tile.out), rows)](
        x, codes.view(torch.int32) if words else codes, absmax, bias, y, out_features, in_features, x.stride(0),
        OUT=tile.out, COLUMNS=tile.columns, WORDS=words, WHOLE=in_features % tile.columns == 0, ASSEMBLY=x.is_cuda,
        STAGES=tile.stages, **_flags(y, bias), num_warps=tile.warps, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def _capability(device: torch.device) -> tuple[int, int]:
    """Returns the compute capability; for a CPU, where Triton's interpreter runs, that of an H100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _without_terms(rows: int, out_features: int, x: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_zeros(rows, out_features) if bias is None else bias.to(x.dtype).repeat(rows, 1)


def linear_weight_only(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None) -> Tensor:
    """Returns (M, N) in the 16 bits of x (M, K), codes contiguous (N, K); see int8.linear_weight_only."""
    (rows, in_features), out_features = x.shape, codes.shape[0]
    if not in_features * out_features:
        return _without_terms(rows, out_features, x, bias)
    x, capability = _unit_stride(x), _capability(x.device)
    if x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and capability < (8, 0)):
        return torch.nn.functional.linear(x, dequantize(codes, absmax, x.dtype), bias)
    if rows == 1 or (capability < (8, 0) and rows <= 2):
        return one_row(x, codes, absmax, bias)
    if rows <= 64 and capability >= (8, 0) and in_features % 16 == 0 and _address(codes):
        return few_rows(x, codes, absmax, bias, few_rows_tile(rows, out_features, in_features, capability))
    return torch.nn.functional.linear(x, dequantize(codes, absmax, x.dtype), bias)


def linear_dynamic(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None) -> Tensor:
    """Returns (M, N) in the dtype of x (M, K), codes contiguous (N, K); see int8.linear_dynamic.

    Below sm_80, whose tensor cores Triton does not know, the product of the two decoded operands: equal up to roundings.
    """
    if not x.shape[1]:
        return _without_terms(x.shape[0], codes.shape[0], x, bias)
    capability = _capability(x.device)
    x_codes, x_absmax = quantize_rows(x)
    if capability >= (8, 0):
        tile = many_rows_tile(x.shape[0], codes.shape[1] % 16 == 0 and _address(codes), capability)
        return product(x_codes, x_absmax, codes, absmax, bias, x.dtype, tile)
    finite = torch.where(x_absmax < torch.inf, x_absmax, torch.nan)
    return torch.nn.functional.linear(dequantize(x_codes, finite, x.dtype), dequantize(codes, absmax, x.dtype), bias)

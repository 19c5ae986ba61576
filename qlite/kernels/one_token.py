"""Triton kernels of what lies between a Falcon block's products for one more token a row: sums, LayerNorm, attention, GELU.

Each launch costs more than its work. So each kernel adds up the parts that the products before it left (few_rows.py), and
does all that there is to do before the next products. Sums are rounded to the dtype of the activations, as a product of its own
would have been. The specification is qlite/one_token.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlite.kernels import tiles
from qlite.kernels.steps import round_to

#: Query heads that a program attends with, keys that it reads at a time (fewer where they would take too many registers: in
#: float32, without tensor cores, and where several programs must fit a multiprocessor), columns that one applies GELU to.
HEADS, KEYS, FEWER_KEYS, COLUMNS = 16, 256, 64, 2048


@triton.jit
def _sum_parts(first, more, at, more_at, stride, more_stride, there, PARTS: tl.constexpr, MORE: tl.constexpr):
    """Returns the float32 sum of PARTS numbers, `stride` apart, and MORE others."""
    total = tl.load(first + at, mask=there, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        total += tl.load(first + part * stride + at, mask=there, other=0.0).to(tl.float32)
    for part in tl.static_range(MORE):
        total += tl.load(more + part * more_stride + more_at, mask=there, other=0.0).to(tl.float32)
    return total


@triton.jit
def _add_norm_kernel(
    x_ptr, parts_ptr, more_ptr, weight_ptr, bias_ptr, sum_ptr, y_ptr, columns, stride, row_stride, more_stride, more_row_stride,
    eps,
    PARTS: tl.constexpr, MORE: tl.constexpr, BLOCK: tl.constexpr, PLAIN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < columns
    weight = tl.load(weight_ptr + column, mask=there, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=there, other=0.0).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * columns + column, mask=there, other=0.0).to(tl.float32)
    at, more_at = row * row_stride + column, row * more_row_stride + column
    x += _sum_parts(parts_ptr, more_ptr, at, more_at, stride, more_stride, there, PARTS, MORE)
    rounded = round_to(x, sum_ptr.dtype.element_ty, PLAIN)
    tl.store(sum_ptr + row * columns + column, rounded, mask=there)
    x = rounded.to(tl.float32)
    x = tl.where(there, x - tl.sum(x, axis=0) / columns, 0.0)
    y = x * tl.math.rsqrt(tl.sum(x * x, axis=0) / columns + eps) * weight + bias
    tl.store(y_ptr + row * columns + column, round_to(y, y_ptr.dtype.element_ty, PLAIN), mask=there)


@triton.jit
def _head(fused, at, cos, sin, there, strides, PARTS: tl.constexpr, MORE: tl.constexpr, SIZE: tl.constexpr, dtype: tl.constexpr,
          PLAIN: tl.constexpr):  # fmt: skip
    """Returns the two halves of heads of a fused projection, summed and, with cos, turned; float32 that are of `dtype`."""
    first_ptr, more_ptr = fused
    stride, more_stride, row, more_row = strides
    a = _sum_parts(first_ptr, more_ptr, row + at, more_row + at, stride, more_stride, there, PARTS, MORE)
    at += SIZE // 2
    b = _sum_parts(first_ptr, more_ptr, row + at, more_row + at, stride, more_stride, there, PARTS, MORE)
    a = round_to(a, dtype, PLAIN).to(tl.float32)
    b = round_to(b, dtype, PLAIN).to(tl.float32)
    if cos is not None:
        turned = round_to(a * cos, dtype, PLAIN).to(tl.float32) - round_to(b * sin, dtype, PLAIN).to(tl.float32)
        b = round_to(b * cos, dtype, PLAIN).to(tl.float32) + round_to(a * sin, dtype, PLAIN).to(tl.float32)
        a = round_to(turned, dtype, PLAIN).to(tl.float32)
        b = round_to(b, dtype, PLAIN).to(tl.float32)
    return a, b


@triton.jit
def _kept_tokens(begin, place, kept, keys_ptr, values_ptr, visible_ptr, KEYS: tl.constexpr, SIZE: tl.constexpr):
    """Reads KEYS tokens of the cache before `place`, from `begin` on: both halves of keys and values, and which may be seen."""
    token = begin + tl.arange(0, KEYS)
    there = token < place
    at = kept + token[:, None] * SIZE + tl.arange(0, SIZE // 2)[None, :]
    keys0 = tl.load(keys_ptr + at, mask=there[:, None], other=0.0)
    keys1 = tl.load(keys_ptr + at + SIZE // 2, mask=there[:, None], other=0.0)
    values0 = tl.load(values_ptr + at, mask=there[:, None], other=0.0)
    values1 = tl.load(values_ptr + at + SIZE // 2, mask=there[:, None], other=0.0)
    return keys0, keys1, values0, values1, tl.load(visible_ptr + token, mask=there, other=0) != 0


@triton.jit
def _attend(
    fused, strides, cos_ptr, sin_ptr, keys_ptr, values_ptr, at_ptr, visible_ptr, attended_ptr, row, chunk, chunks, kv_heads,
    group, length, cos_stride, scale,
    PARTS: tl.constexpr, MORE: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, PLAIN: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = attended_ptr.dtype.element_ty
    HALF: tl.constexpr = SIZE // 2
    kv, part = chunk // chunks, chunk % chunks
    kept = (row * kv_heads + kv) * length * SIZE
    half = tl.arange(0, HALF)[None, :]
    place = tl.load(at_ptr)
    cos = tl.load(cos_ptr + row * cos_stride + half).to(tl.float32)
    sin = tl.load(sin_ptr + row * cos_stride + half).to(tl.float32)
    visible_ptr += row * length
    keys = _kept_tokens(place * 0, place, kept, keys_ptr, values_ptr, visible_ptr, KEYS, SIZE)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    head = part * HEADS + tl.arange(0, HEADS)[:, None]
    first = kv * (group + 2) * SIZE
    all_of = half >= 0
    q0, q1 = _head(fused, first + head * SIZE + half, cos, sin, head < group, strides, PARTS, MORE, SIZE, dtype, PLAIN)
    k0, k1 = _head(fused, first + group * SIZE + half, cos, sin, all_of, strides, PARTS, MORE, SIZE, dtype, PLAIN)
    v0, v1 = _head(fused, first + (group + 1) * SIZE + half, None, None, all_of, strides, PARTS, MORE, SIZE, dtype, PLAIN)
    mine = half + part * HALF < HALF
    new = kept + place * SIZE + half
    # The new token's key and value: one program keeps them for the next tokens, every one has them at hand.
    tl.store(keys_ptr + new, round_to(k0, dtype, PLAIN), mask=mine)
    tl.store(keys_ptr + new + HALF, round_to(k1, dtype, PLAIN), mask=mine)
    tl.store(values_ptr + new, round_to(v0, dtype, PLAIN), mask=mine)
    tl.store(values_ptr + new + HALF, round_to(v1, dtype, PLAIN), mask=mine)
    top = tl.sum(q0 * k0 + q1 * k1, axis=1) * scale
    weight = tl.full([HEADS], 1.0, tl.float32)
    sum0, sum1 = tl.broadcast_to(v0, [HEADS, HALF]), tl.broadcast_to(v1, [HEADS, HALF])
    if not PLAIN:
        q0, q1 = q0.to(dtype), q1.to(dtype)
    begin = place * 0
    while begin < place:
        keys0, keys1, values0, values1, seen = keys
        begin += KEYS
        keys = _kept_tokens(begin, place, kept, keys_ptr, values_ptr, visible_ptr, KEYS, SIZE)
        values0, values1 = tl.where(seen[:, None], values0, 0.0), tl.where(seen[:, None], values1, 0.0)
        if PLAIN:
            keys0, keys1 = keys0.to(tl.float32), keys1.to(tl.float32)
            values0, values1 = values0.to(tl.float32), values1.to(tl.float32)
        score = tl.dot(q0, tl.trans(keys0), input_precision="ieee") + tl.dot(q1, tl.trans(keys1), input_precision="ieee")
        score = tl.where(seen[None, :], score * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        share = tl.exp(score - higher[:, None])
        fade = tl.exp(top - higher)
        weight = weight * fade + tl.sum(share, axis=1)
        if not PLAIN:
            share = share.to(dtype)
        sum0 = sum0 * fade[:, None] + tl.dot(share, values0, input_precision="ieee")
        sum1 = sum1 * fade[:, None] + tl.dot(share, values1, input_precision="ieee")
        top = higher
    out = attended_ptr + (row * kv_heads + kv) * group * SIZE + head * SIZE + half
    tl.store(out, round_to(sum0 / weight[:, None], dtype, PLAIN), mask=head < group)
    tl.store(out + HALF, round_to(sum1 / weight[:, None], dtype, PLAIN), mask=head < group)


@triton.jit
def _between_kernel(
    fused_ptr, more_fused_ptr, up_ptr, more_up_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, at_ptr, visible_ptr, attended_ptr,
    activated_ptr, fused_stride, fused_row, more_fused_stride, more_fused_row, up_stride, up_row, more_up_stride, more_up_row,
    chunks, kv_heads, group, length, cos_stride, ffn, scale,
    FUSED: tl.constexpr, MORE_FUSED: tl.constexpr, UP: tl.constexpr, MORE_UP: tl.constexpr, SIZE: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, PLAIN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    program, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    attending = chunks * kv_heads
    if program < attending:
        strides = fused_stride, more_fused_stride, row * fused_row, row * more_fused_row
        _attend(
            (fused_ptr, more_fused_ptr), strides, cos_ptr, sin_ptr, keys_ptr, values_ptr, at_ptr, visible_ptr, attended_ptr,
            row, program, chunks, kv_heads, group, length, cos_stride, scale, FUSED, MORE_FUSED, SIZE, HEADS, KEYS, PLAIN,
            EARLY,
        )  # fmt: skip
    else:
        if EARLY:
            tl.extra.cuda.gdc_wait()
        column = (program - attending) * COLUMNS + tl.arange(0, COLUMNS)
        there = column < ffn
        up_at, more_at = row * up_row + column, row * more_up_row + column
        up = _sum_parts(up_ptr, more_up_ptr, up_at, more_at, up_stride, more_up_stride, there, UP, MORE_UP)
        up = round_to(up, activated_ptr.dtype.element_ty, PLAIN).to(tl.float32)
        active = 0.5 * up * (1.0 + tl.math.erf(up * 0.7071067811865476))
        tl.store(activated_ptr + row * ffn + column, round_to(active, activated_ptr.dtype.element_ty, PLAIN), mask=there)


def _parts(parts: list[Tensor]) -> tuple[list[Tensor], list[int], list[int]]:
    """Returns the pointers, strides (of parts and rows) and counts of one or two tensors of parts (count, B, columns)."""
    first, more = parts[0], parts[-1]
    if len(parts) > 2:
        raise ValueError(f"{len(parts)} tensors of parts; wanted one or two")
    strides = [first.stride(0), first.stride(1), more.stride(0), more.stride(1)]
    return [first, more], strides, [first.shape[0], more.shape[0] if len(parts) > 1 else 0]


def _early(x: Tensor) -> tuple[bool, bool, dict]:
    plain, early = tiles.plain(x.device), tiles.early(x.device)
    return plain, early, {"launch_pdl": True} if early else {}


def add_norm(x: Tensor, parts: list[Tensor], weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns x + the parts, and the LayerNorm of that; as one_token.add_norm. All contiguous in the last dimension."""
    total, normed = torch.empty_like(x), torch.empty_like(x)
    pointers, (stride, row, more_stride, more_row), (count, more) = _parts(parts)
    plain, early, options = _early(x)
    rows, columns = x.shape
    if rows:
        _add_norm_kernel[(rows,)](
            x, *pointers, weight, bias, total, normed, columns, stride, row, more_stride, more_row, eps,
            PARTS=count, MORE=more, BLOCK=triton.next_power_of_2(columns), PLAIN=plain, EARLY=early, num_warps=32,
            enable_fp_fusion=False, **options,  # as in few_tokens.layer_norm
        )  # fmt: skip
    return total, normed


def between(
    fused: list[Tensor], up: list[Tensor], cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: Tensor, visible: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns what was attended and the activations; as one_token.between. All contiguous in the last dimension.

    What an ordinary launch has written since (tiles.early) is read early: cos, sin, at, visible, and the cache before `at`.
    """
    batch, kv_heads, length, size = keys.shape
    heads = fused[0].shape[2] // size - 2 * kv_heads
    ffn, group = up[0].shape[2], heads // kv_heads
    attended, activated = keys.new_empty(batch, heads * size), keys.new_empty(batch, ffn)
    plain, early, options = _early(keys)
    of_fused, of_up = _parts(fused), _parts(up)
    chunks = triton.cdiv(group, HEADS)
    fewer = plain or keys.dtype == torch.float32 or batch > 4
    if batch:
        _between_kernel[(chunks * kv_heads + triton.cdiv(ffn, COLUMNS), batch)](
            *of_fused[0], *of_up[0], cos, sin, keys, values, at, visible.view(torch.int8), attended, activated,
            *of_fused[1], *of_up[1], chunks, kv_heads, group, length, 0 if cos.shape[0] == 1 else size // 2, ffn, size**-0.5,
            FUSED=of_fused[2][0], MORE_FUSED=of_fused[2][1], UP=of_up[2][0], MORE_UP=of_up[2][1], SIZE=size, HEADS=HEADS,
            KEYS=FEWER_KEYS if fewer else KEYS, COLUMNS=COLUMNS, PLAIN=plain, EARLY=early,
            num_warps=8, num_stages=1, enable_fp_fusion=False, **options,
        )  # fmt: skip
    return attended, activated

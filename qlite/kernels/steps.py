"""What the kernels of few rows share, whatever the tensor core is given: where a step is, look-ups, and where sums go."""

from __future__ import annotations

import triton
import triton.language as tl

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
def locate(group, step, shape, deltas, MODE: tl.constexpr):
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
def load_scales(one, other, rows, absmax_a_row, block, absmax_ptr, scale_ptr, RAW: tl.constexpr):
    """Reads what a thread's scales are made of, those of a block of two rows: numbers of its own, no tensors."""
    # Not pure: a load that may move would be moved behind the products that are to hide it.
    return tl.inline_asm_elementwise(
        RAW, "=&r,=&r,=&r,=&r,r,r,l,l",
        [min(one, rows - 1) * absmax_a_row + block, min(other, rows - 1) * absmax_a_row + block, absmax_ptr, scale_ptr],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def pairs_of(words, table, PAIRS: tl.constexpr):
    """Returns the pairs of levels of the four bytes of each word, as the inline PTX of PAIRS looks them up in a table."""
    return tl.inline_asm_elementwise(
        PAIRS, "=&r,=&r,=&r,=&r,r,r", [words, table],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def store_sums(
    value, place, m, mask, group, step, program, programs, steps, total_steps, shape, rows, bias_ptr, y_ptr,
    TALL: tl.constexpr, MODE: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr, PLAIN: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """Writes the sums of a group, or of a program's part of one; `place` is a row in the group.

    Args:
        LOOP: parts that nobody has are written in a loop, which takes fewer registers than as many stores.
    """
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
            if LOOP:
                for other in range(part + 1, PARTS):
                    tl.store(at + other * rows * wide, tl.zeros_like(value), mask=mask)
            else:
                for other in tl.static_range(1, PARTS):
                    tl.store(at + other * rows * wide, tl.zeros_like(value), mask=mask & (m * 0 + other > part))

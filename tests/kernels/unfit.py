"""Kernels as they should not be, which the tests of portability must find fault with."""

import triton
import triton.language as tl


@triton.jit
def fifteen_loads(weight_ptr, midpoints_ptr, codes_ptr, TILE: tl.constexpr):
    """Finds a code by one load and one comparison for each midpoint."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    share = tl.load(weight_ptr + at).to(tl.float32)
    rank = tl.zeros([TILE], dtype=tl.int32)
    for index in tl.static_range(15):
        rank += (share > tl.load(midpoints_ptr + index)).to(tl.int32)
    tl.store(codes_ptr + at, rank.to(tl.uint8))


@triton.jit
def select_tree(codes_ptr, levels_ptr, out_ptr, TILE: tl.constexpr):
    """Decodes with a selection for each level."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    code = tl.load(codes_ptr + at)
    value = tl.zeros([TILE], dtype=tl.float32)
    for index in tl.static_range(16):
        value = tl.where(code == index, tl.load(levels_ptr + index), value)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty))


@triton.jit
def spilling(x_ptr, TILE: tl.constexpr):
    """Holds more than a thread has registers for: a tile and what it is multiplied by, across a loop."""
    at = tl.arange(0, TILE)
    a = tl.load(x_ptr + at)
    b = tl.load(x_ptr + TILE + at)
    for _ in range(8):
        a, b = a * b, b + a
    tl.store(x_ptr + at, a)
    tl.store(x_ptr + TILE + at, b)


@triton.jit
def uncompilable(x_ptr, TILE: tl.constexpr):
    """Runs in the interpreter; the compiler takes a constant once."""
    for bit in tl.static_range(2):
        half: tl.constexpr = TILE >> bit
        tl.store(x_ptr + bit, half)

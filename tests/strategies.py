"""What hypothesis draws: tensors with odd sizes, zero blocks, extreme scales, awkward strides, and every float dtype.

Bulk values come from a seeded generator (fast, shrinks well); what finds faults is planted among them: zeros, the block's
extreme in both signs, values beside a decision boundary, magnitudes many powers of two apart.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from qlite.nf4 import BLOCK_SIZES, FP4_LEVELS, NF4_LEVELS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNIFORM_LEVELS = tuple((2 * i - 15) / 15 for i in range(16))
#: Tables that hold 1 and -1, so that the extreme of a block is a level in either sign.
full_tables = st.sampled_from((NF4_LEVELS, FP4_LEVELS, UNIFORM_LEVELS))
#: Any table of one's own: in no order, with repeated levels, narrower than [-1, 1], with or without zero.
custom_tables = st.lists(st.integers(-1024, 1024), min_size=16, max_size=16).map(lambda ns: tuple(n / 1024 for n in ns))
tables = full_tables | custom_tables.filter(lambda levels: len(set(levels)) > 1)
block_sizes = st.sampled_from((32, 64, 128))
_ROWS, _COLUMNS = st.integers(0, 5), st.integers(0, 300)


@st.composite
def weights(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    max_exponent: int = 12,
    rows: st.SearchStrategy[int] = _ROWS,
    columns: st.SearchStrategy[int] = _COLUMNS,
) -> Tensor:
    """A finite 2-D weight (rows, columns), either side possibly 0, contiguous or a transposed or strided view."""
    shape = (draw(rows), draw(columns))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(("normal", "uniform", "sparse", "boundary", "wide", "zeros", "constant")))
    values = torch.randn(shape, generator=generator)
    if kind == "uniform":
        values = torch.rand(shape, generator=generator) * 2 - 1
    elif kind == "sparse":
        values = values * (torch.rand(shape, generator=generator) < 0.05)
    elif kind == "boundary":
        levels = torch.tensor(NF4_LEVELS)
        midpoints = (levels[1:] + levels[:-1]) / 2
        values = midpoints[torch.randint(15, shape, generator=generator)]
        values = values * (1 + torch.randint(-3, 4, shape, generator=generator) * 2**-24)
        values[:, ::17] = 1.0
    elif kind == "wide":
        values = values * torch.exp2(torch.randint(-max_exponent, max_exponent + 1, shape, generator=generator))
    elif kind == "zeros":
        values = values * 0.0
    elif kind == "constant":
        values = torch.full(shape, draw(st.sampled_from((1.0, -1.0, 0.3))))
    values[:, : draw(st.integers(0, 70))] *= draw(st.sampled_from((0.0, 1.0, -1.0)))
    dtype = draw(st.sampled_from(dtypes))
    limit = torch.finfo(dtype).max
    values = (values * 2.0 ** draw(st.integers(-max_exponent, max_exponent))).clamp(-limit, limit).to(dtype)
    layout = draw(st.sampled_from(("contiguous", "transposed", "strided")))
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "strided":
        return torch.stack((values, torch.full_like(values, 9.0)), dim=-1)[..., 0]
    return values


@st.composite
def whole_blocks(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, max_exponent: int = 12) -> tuple[Tensor, int]:
    """A weight whose rows are whole blocks, and the block size: any of the eight; about a thousand columns at most."""
    block_size = draw(st.sampled_from(BLOCK_SIZES))
    blocks = draw(st.integers(1, max(1, 1024 // block_size)))
    rows = st.integers(1, 4)
    return draw(weights(dtypes=dtypes, max_exponent=max_exponent, rows=rows, columns=st.just(blocks * block_size))), block_size

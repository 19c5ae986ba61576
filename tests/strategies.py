"""What hypothesis draws: tensors with odd sizes, zero blocks, extreme scales, awkward strides, and every float dtype.

Bulk values come from a seeded generator (fast, shrinks well); what finds faults is planted among them: zeros, the block's
extreme in both signs, values beside a decision boundary, magnitudes many powers of two apart.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from qlite.nf4 import FP4_LEVELS, NF4_LEVELS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
block_sizes = st.sampled_from((32, 64, 128))
tables = st.sampled_from((NF4_LEVELS, FP4_LEVELS, tuple((2 * i - 15) / 15 for i in range(16))))


@st.composite
def weights(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, max_exponent: int = 12) -> Tensor:
    """A finite 2-D weight (rows, columns), either side possibly 0, contiguous or a transposed or strided view."""
    rows, columns = draw(st.integers(0, 5)), draw(st.integers(0, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(("normal", "uniform", "sparse", "boundary", "wide", "zeros", "constant")))
    shape = (rows, columns)
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

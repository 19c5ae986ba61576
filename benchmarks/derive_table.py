"""Where three tables of 16 levels come from: nf4.LS4_LEVELS, nf4.AF4_LEVELS and nf4.BOF4S_LEVELS.

    python -m benchmarks.derive_table    # a CPU, a minute; prints the levels, and errors

ls4 has the least squared error of normal weights under the search for scales. Two steps in turn, from a seed: the search
finds each block's scale s and its codes; then each level becomes the one with the least squared error for the weights that
took it, sum(s w) / sum(s s) (Lloyd, "Least squares quantization in PCM", 1982). Zero stays, so that a zero weight is exact. The
steps are first twice as long as Lloyd's, which converge slowly. Levels are divided by the largest: the search finds scales for
a table of any size.

af4 and bof4-s are published; here they are derived from the density of a normal weight's share of its block's absmax. Given
absmax m, the other weights of a block are normal ones cut off at m. AF4 (arXiv 2306.06965, section 4) has the least absolute
error of that share: each level is the median of its cell. 1, -1 and 0 are levels; the negative side is that of the best 14
levels without zero, the positive side that of the best 16. BOF4-S (arXiv 2505.06653, section 3) has the least squared error of
the weight itself, so that a share counts m^2, and each level is the mean of its cell; 1 and 0 are levels, -1 is none, as the
scale takes the sign of the value with the largest magnitude.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import qlite
from benchmarks.common import record
from qlite import nf4
from qlite.nf4 import NF4_LEVELS, TABLES

ROWS, COLUMNS, BLOCK_SIZE, SEED = 512, 4096, 64, 0
#: How far each step goes, in Lloyd's.
STRIDES = [2.0] * 12 + [1.0] * 4


def improved(w: Tensor, levels: Tensor, stride: float) -> Tensor:
    """Returns ascending levels (16,) after one step on the weights (rows, whole blocks)."""
    scales = nf4.search(w, levels, BLOCK_SIZE).view(-1, 1)
    blocks = w.view(-1, BLOCK_SIZE)
    midpoints, _ = nf4.decision_table(levels)
    place = torch.bucketize((blocks / scales).contiguous(), midpoints).flatten()
    sums = [
        torch.zeros(16, dtype=torch.float64).scatter_add_(0, place, part.expand_as(blocks).double().flatten())
        for part in (blocks * scales, scales * scales)
    ]
    moved = levels + stride * (sums[0] / sums[1] - levels)
    moved[levels == 0] = 0.0
    return (moved / moved.abs().max()).float().sort().values


def derived() -> Tensor:
    """Returns the table, float32 (16,), ascending; it begins at NF4's with a shorter negative side."""
    w = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(SEED))
    levels = torch.tensor(NF4_LEVELS)
    levels = torch.where(levels < 0, 0.85 * levels, levels)
    for stride in STRIDES:
        levels = improved(w, levels, stride)
    return levels


def density(power: int, points: int = 8192) -> tuple[Tensor, Tensor]:
    """Returns `points` shares of absmax, float64, evenly over [-1, 1], and how much each counts: absmax^power of its block."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    absmax = torch.linspace(0.5, 6.5, 601, dtype=torch.float64)[:, None]
    inside = normal.cdf(absmax) - normal.cdf(-absmax)
    often = normal.log_prob(absmax).exp() * inside ** (BLOCK_SIZE - 1) * absmax**power
    share = (torch.arange(points, dtype=torch.float64) + 0.5) / points * 2 - 1
    counts = (often * absmax * normal.log_prob(absmax * share).exp() / inside).sum(dim=0)
    return share, counts / counts.sum()


def _between(curve: Tensor, place: Tensor) -> Tensor:
    """Returns a curve, known at 0, 1, 2, ..., at the places between."""
    low = place.floor().clamp(0, len(curve) - 2)
    return torch.lerp(curve[low.long()], curve[low.long() + 1], place - low)


def settled(levels: Tensor, fixed: Tensor, power: int, *, median: bool) -> Tensor:
    """Returns ascending levels, float64, each the median or mean of the shares that are nearest to it, but for the fixed."""
    share, counts = density(power)
    start = torch.zeros(1, dtype=torch.float64)
    mass, moment = (torch.cat((start, part.cumsum(0))) for part in (counts, counts * share))
    for _ in range(5000):
        edges = torch.cat((-1 - start, (levels[1:] + levels[:-1]) / 2, 1 + start))
        place = (edges + 1) / 2 * len(share)
        below = _between(mass, place)
        if median:
            middle = (below[1:] + below[:-1]) / 2
            low = torch.searchsorted(mass, middle) - 1
            found = (low + (middle - mass[low]) / (mass[low + 1] - mass[low])) / len(share) * 2 - 1
        else:
            found = _between(moment, place).diff() / below.diff()
        before, levels = levels, torch.where(fixed, levels, found)
        if (levels - before).abs().max() < 1e-9:
            break
    return levels


def abnormal_float() -> Tensor:
    """Returns AF4 for blocks of 64, float64 (16,), ascending."""
    sides = []
    for count in (14, 16):
        levels = torch.linspace(-1, 1, count, dtype=torch.float64)
        sides.append(settled(levels, levels.abs() == 1, 0, median=True))
    return torch.cat((sides[0][:7], torch.zeros(1, dtype=torch.float64), sides[1][8:]))


def optimal_float() -> Tensor:
    """Returns BOF4-S for blocks of 64, optimised for squared error, float64 (16,), ascending."""
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float64)
    levels = torch.where(levels < 0, 0.85 * levels, levels)
    return settled(levels, (levels == 0) | (levels == 1), 2, median=False)


def main() -> None:
    """Derives the tables, and records them: ours with its error on other weights than it was derived from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    levels = tuple(derived().tolist())
    w = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(SEED + 1))
    errors = [
        (qlite.quantize_nf4(w, levels=table, search=True).dequantize() - w).square().mean().item()
        for table in (NF4_LEVELS, levels)
    ]
    row = {
        "table": "ls4",
        "levels": [round(level, 7) for level in levels],
        "nf4_mse": round(errors[0], 6),
        "mse": round(errors[1], 6),
    }
    for name, found in (("af4", abnormal_float()), ("bof4-s", optimal_float())):
        off = (found - torch.tensor(TABLES[name], dtype=torch.float64)).abs().max().item()
        record("derive_table", {"table": name, "levels": [round(level, 5) for level in found.tolist()], "off": round(off, 5)})
    record("derive_table", row)


if __name__ == "__main__":
    main()

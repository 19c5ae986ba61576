"""The table of 16 levels with the least squared error of normal weights under the search for scales: nf4.LS4_LEVELS.

    python -m benchmarks.derive_table    # a CPU, a minute; prints the levels, and the error before and after

Two steps in turn, from a seed: the search finds each block's scale s and its codes; then each level becomes the one with the
least squared error for the weights that took it, sum(s w) / sum(s s) (Lloyd, "Least squares quantization in PCM", 1982). Zero
stays, so that a zero weight is exact. The steps are first twice as long as Lloyd's, which converge slowly. Levels are divided
by the largest: the search finds scales for a table of any size.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import qlite
from benchmarks.common import record
from qlite import nf4
from qlite.nf4 import NF4_LEVELS

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


def main() -> None:
    """Derives the table, and records it with its error on other weights than it was derived from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    levels = tuple(derived().tolist())
    w = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(SEED + 1))
    errors = [
        (qlite.quantize_nf4(w, levels=table, search=True).dequantize() - w).square().mean().item()
        for table in (NF4_LEVELS, levels)
    ]
    row = {"levels": [round(level, 7) for level in levels], "nf4_mse": round(errors[0], 6), "mse": round(errors[1], 6)}
    record("derive_table", row)


if __name__ == "__main__":
    main()

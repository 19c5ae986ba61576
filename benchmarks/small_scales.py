"""An experiment: smaller blocks whose scales take fewer bits. No format of qlite's: what four bits and a little could be.

    python -m benchmarks.small_scales    # a CPU, some minutes

Blocks of 32 with scales of 4 or 5 bits: a code names one of 16 or 32 signed multiples of the row's root mean square, which is
kept in float16. For each block every scale is tried, each weight taking its nearest level, and the least squared error wins.
Levels and scales are derived together from a seed, by Lloyd's steps on normal weights, which are not those that are
measured. Blocks of 64 with scales of a sign and 7 bits: magnitudes are spaced evenly in their logarithm between the
smallest and the largest of the row, which are kept in float16.

What is measured is decoded from the packed bytes, and the bits a weight are those of all its tensors but the tables. Weights
as in quantization_error.py, but for blocks of 32 the first 512 rows of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import record, table
from benchmarks.quantization_error import samples
from qlite import nf4
from qlite.nf4 import LS4_LEVELS, NF4_LEVELS

BLOCK, SEED, BLOCKS, ROWS = 32, 0, 16384, 512
#: How far each step of the derivation goes, in Lloyd's, which converge slowly.
STRIDES = [2.5] * 24 + [1.0] * 6


@dataclasses.dataclass(frozen=True)
class Coded:
    """A matrix (R, C) in blocks: packed codes, packed scales, and what the scales of a row are relative to."""

    codes: Tensor
    scales: Tensor
    rows: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return self.codes.nbytes + self.scales.nbytes + self.rows.nbytes


def packed(codes: Tensor, bits: int) -> Tensor:
    """Returns numbers below 2^bits, flattened, as uint8: bit after bit, the lowest first."""
    flat = (codes.flatten()[:, None].to(torch.uint8) >> torch.arange(bits, dtype=torch.uint8)) & 1
    flat = torch.nn.functional.pad(flat.flatten(), (0, -flat.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)


def unpacked(content: Tensor, bits: int, count: int) -> Tensor:
    """Returns the `count` numbers, int64, that `packed` joined."""
    flat = ((content[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()[: count * bits].view(count, bits)
    return (flat.long() << torch.arange(bits)).sum(dim=1)


def places(blocks: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
    """Returns the number of the nearest level of each weight (blocks, size) under a scale for each block (blocks,)."""
    return torch.bucketize(blocks / scales[:, None], (levels[1:] + levels[:-1]) / 2)


def chosen(blocks: Tensor, levels: Tensor, scales: Tensor) -> Tensor:
    """Returns for each block (blocks, size) the number of the scale with the least squared error, int64 (blocks,)."""
    best, least = torch.zeros(len(blocks), dtype=torch.long), torch.full((len(blocks),), torch.inf)
    for number, scale in enumerate(scales.tolist()):
        taken = levels[places(blocks, torch.full((len(blocks),), scale), levels)]
        error = (blocks - taken * scale).square().sum(dim=1)
        best, least = torch.where(error < least, number, best), torch.minimum(error, least)
    return best


def derived(bits: int) -> tuple[Tensor, Tensor]:
    """Returns levels (16,) and scales (2^bits,), ascending, with little squared error for normal weights."""
    blocks = torch.randn(BLOCKS, BLOCK, generator=torch.Generator().manual_seed(SEED))
    levels, half = torch.tensor(LS4_LEVELS), 2 ** (bits - 1)
    # Where the search without a limit on the scales finds them, as many on either side.
    free = nf4.search(blocks, levels, BLOCK).flatten()
    share = (torch.arange(half) + 0.5) / half
    scales = torch.cat((free[free < 0].quantile(share), free[free > 0].quantile(share)))
    for stride in STRIDES:
        number = chosen(blocks, levels, scales)
        its = scales[number]
        place = places(blocks, its, levels)
        taken = levels[place]
        parts = ((blocks * taken).sum(dim=1), taken.square().sum(dim=1))
        sums = [torch.zeros(len(scales)).index_add_(0, number, part) for part in parts]
        better_scales = torch.where(sums[1] > 0, sums[0] / sums[1], scales)
        parts = (blocks * its[:, None], its.square()[:, None].expand_as(blocks))
        sums = [torch.zeros(16).index_add_(0, place.flatten(), part.flatten()) for part in parts]
        better_levels = torch.where(levels == 0, 0.0, sums[0] / sums[1])
        scales, levels = (old + stride * (new - old) for old, new in ((scales, better_scales), (levels, better_levels)))
        largest = levels.abs().max()
        scales, levels = (scales * largest).sort().values, (levels / largest).sort().values
    return levels, scales


def in_small_blocks(w: Tensor, bits: int, levels: Tensor, scales: Tensor) -> tuple[Tensor, int]:
    """Returns what a matrix of whole blocks of 32 becomes with scales of few bits, decoded, and its bytes."""
    rows, columns = w.shape
    size = w.square().mean(dim=1).sqrt().half()
    blocks = (w / size.float()[:, None]).view(-1, BLOCK)
    number = chosen(blocks, levels, scales)
    codes = places(blocks, scales[number], levels).view(rows, columns).to(torch.uint8)
    coded = Coded(nf4.pack(codes), packed(number, bits), size)
    its = scales[unpacked(coded.scales, bits, len(blocks))].view(rows, -1, 1) * coded.rows.float()[:, None, None]
    return (levels[nf4.unpack(coded.codes).int()].view(rows, -1, BLOCK) * its).view(rows, columns), coded.nbytes


def with_log_scales(w: Tensor, levels: Tensor) -> tuple[Tensor, int]:
    """Returns what a matrix of whole blocks of 64 becomes with searched scales of a sign and 7 bits, decoded, and its bytes."""
    found = nf4.search(w, levels, 64)
    ends = torch.stack((found.abs().amin(dim=1), found.abs().amax(dim=1)), dim=1).half()
    low, high = (end[:, None] for end in ends.float().log().unbind(dim=1))
    step = ((high - low) / 127).clamp(min=1e-12)
    number = ((found.abs().log() - low) / step).round().clamp(0, 127).to(torch.uint8) | ((found < 0).to(torch.uint8) << 7)
    scales = (low + step * (number & 127)).exp() * torch.where(number > 127, -1.0, 1.0)
    coded = Coded(nf4.encode(w, scales, levels, 64), number, ends)
    decoded = nf4.dequantize(coded.codes, scales, None, None, levels, w.shape[1], 64, torch.float32)
    return decoded, coded.nbytes


def main() -> None:
    """Measures each on normal and on spread heavy-tailed weights, and records a row for both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    kinds = {name: weights[0] for name, weights in samples().items() if name != "tiny base"}
    start = time.perf_counter()
    tables = {bits: derived(bits) for bits in (4, 5)}
    print(f"derived in {time.perf_counter() - start:.0f} s", flush=True)
    for bits, parts in tables.items():
        levels, scales = ([round(value, 5) for value in part.tolist()] for part in parts)
        record("small_scales", {"scale_bits": bits, "levels": levels, "scales": scales}, show=False)
    methods: dict[str, Callable[[Tensor], tuple[Tensor, int]]] = {}
    for bits, (levels, scales) in tables.items():
        options = {"bits": bits, "levels": levels, "scales": scales}
        methods[f"blocks of 32, scales of {bits} bits"] = functools.partial(in_small_blocks, **options)
    for name, levels in (("nf4", NF4_LEVELS), ("ls4", LS4_LEVELS)):
        methods[f"{name} searched, scales of a sign and 7 bits"] = functools.partial(
            with_log_scales, levels=torch.tensor(levels)
        )
    lines = []
    for name, method in methods.items():
        line: list = [name]
        for kind, whole in kinds.items():
            w = whole[:ROWS] if name.startswith("blocks of 32") else whole
            decoded, nbytes = method(w)
            error = ((decoded - w).double().square().sum() / w.double().square().sum()).item()
            row = {"method": name, "weights": kind, "relative_mse": round(error, 6)}
            row["bits_per_weight"] = round(8 * nbytes / w.numel(), 4)
            record("small_scales", row, show=False)
            line += [f"{error:.5f}", f"{row['bits_per_weight']:.4f}"]
        lines.append(line)
    print(table(("method", *(part for kind in kinds for part in (kind, "bits"))), lines))


if __name__ == "__main__":
    main()

"""Which method multiplies by an encoded weight, and in what tiles: by capability and number of rows, with what was measured.

Times are microseconds for Falcon-7B's dense_h_to_4h (18176 x 4544, block 64, double quantization) in bfloat16 on an H200, in
CUDA graphs over rotated weights. cuBLAS on the decoded weight takes 45 up to 64 rows and 60 at 256; decoding it first 54.
None instead of a Tile: decode the weight and let cuBLAS multiply.
"""

from __future__ import annotations

import dataclasses
import functools

import torch


@dataclasses.dataclass(frozen=True)
class Tile:
    """One way to launch the kernel of few_rows.py or small_batch.py.

    Attributes:
        method: "few rows" or "small batch".
        programs: in the launch, at most. warps: of a program.
        tile_n: rows of the weight that a program multiplies at a time (small batch). stages: of its pipeline.
        tile_m: rows of x that it multiplies at a time; of few rows 4 or 16.
        two: blocks of 64 columns a step are two. scaled: weights are scaled before the product, and rounded once.
        sort: the columns of x are put in the tensor core's order first, so that they can be read 16 bytes at a time.
        width: neighbouring columns of a thread in Triton's operand: 2 on capability 9.0, 4 before.
        split: the warps of a program share the columns of 16 rows of the weight, instead of having rows each.
        parts: in which results are left, as many as programs that share a group of rows or more; 1: whole groups are dealt out.
        registers: of a thread, at most. early: the launch begins while the one before it ends.
    """

    method: str
    programs: int
    warps: int
    tile_n: int = 16
    tile_m: int = 4
    stages: int = 1
    two: bool = True
    scaled: bool = False
    sort: bool = False
    width: int = 2
    split: bool = True
    parts: int = 1
    registers: int | None = None
    early: bool = False


#: Rows of x, up to which, weights of the matrix, from which on -> Tile, its programs those of one multiprocessor. A launch
#: needs more than 48 KiB of Triton's own shared memory or, with the 33 to 35 KiB of ptx.table, no more than 48: Triton asks the
#: driver for more only by its own.
_FEW = (4, 0, Tile("few rows", 4, 4))
_HOPPER = [
    # benchmarks.few_rows. 1 row: 18.2, of which 1.4 are the sum of the parts; 4 rows: 21.2 (bitsandbytes 41, 131).
    (4, 40_000_000, Tile("few rows", 4, 4, split=False, parts=4, registers=128, early=True)),
    # query_key_value: 7.0, 4 rows 9.0; in whole groups, 4 programs: 9.9, 11.3.
    (4, 0, Tile("few rows", 3, 4, parts=4, registers=168, early=True)),
    (16, 0, Tile("small batch", 2, 4, 128, 16, stages=6, early=True)),  # 32; 3 programs: 40; tiles of 64: 56; of 256: 33
    (32, 0, Tile("small batch", 2, 4, 128, 32, stages=4, early=True)),  # 38
    (64, 0, Tile("small batch", 1, 8, 128, 64, stages=3, sort=True, early=True)),  # 47; tiles of 256: 51; scaled, 4 warps: 49
    # 67. query_key_value takes 34 by decoding and cuBLAS.
    (128, 40_000_000, Tile("small batch", 1, 8, 128, 128, stages=3, scaled=True, sort=True, early=True)),
    # 107; two blocks a step: 112; tile_m of 128: 121. query_key_value, 4672 x 4544: 49, by decoding and cuBLAS 35.
    (256, 40_000_000, Tile("small batch", 1, 8, 128, 256, stages=3, two=False, scaled=True, sort=True, early=True)),
]
#: Not measured; no larger tile fits the 99 KiB of shared memory of capability 8.6 and 8.9.
_AMPERE = [
    _FEW,
    (16, 0, Tile("small batch", 1, 4, 128, 16, stages=5, width=4)),
    (32, 0, Tile("small batch", 1, 4, 128, 32, stages=4, width=4)),
]
#: The interpreter, where the tests are: small tiles, every branch.
_INTERPRETED = [
    (1, 0, Tile("few rows", 3, 4, split=False, parts=3)),
    (2, 0, Tile("few rows", 5, 4, parts=2)),
    _FEW,
    (8, 0, Tile("few rows", 3, 4, tile_m=16, split=False, parts=4)),
    (16, 0, Tile("small batch", 3, 4, 64, 16)),
    (32, 0, Tile("small batch", 2, 4, 64, 16, two=False, width=4)),
    (64, 0, Tile("small batch", 2, 4, 64, 32, scaled=True, sort=True)),
]


@functools.cache
def _properties(device: torch.device) -> tuple[tuple[int, int], int]:
    if device.type != "cuda":
        return (0, 0), 1
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor), found.multi_processor_count


def plain(device: torch.device) -> bool:
    """Whether kernels run without inline PTX on the device: in the interpreter, and before capability 8.0."""
    return _properties(device)[0] < (8, 0)


def table(capability: tuple[int, int]) -> list[tuple[int, int, Tile]]:
    """Returns the tiles of a capability; (0, 0) is the interpreter. Below 8.0 tl.dot has no tensor cores."""
    if capability == (0, 0):
        return _INTERPRETED
    if capability[0] == 9:
        return _HOPPER
    return _AMPERE if capability[0] == 8 else [_FEW]


#: Two weights in one launch, results beside each other and added: rows of x, up to which -> Tile. Of sixteen rows not measured.
_TWO = {
    "stacked": [
        (4, Tile("few rows", 3, 4, split=False, parts=4, registers=168)),
        (16, Tile("few rows", 3, 4, tile_m=16, split=False, parts=4, registers=168)),
    ],
    "summed": [
        (4, Tile("few rows", 3, 4, split=False, parts=8, registers=168)),
        (16, Tile("few rows", 3, 4, tile_m=16, split=False, parts=12, registers=168)),
    ],
}


@functools.lru_cache(64)
def two_products(how: str, rows: int, device: torch.device) -> Tile | None:
    """Returns how to multiply up to 16 rows by two encoded weights at once, "stacked" or "summed", or None: one by one."""
    capability, multiprocessors = _properties(device)
    if rows > 4 and (0, 0) < capability < (8, 0):  # no tensor cores that Triton uses
        return None
    tile = next(tile for most, tile in _TWO[how] if rows <= most)
    return dataclasses.replace(tile, programs=tile.programs * multiprocessors, early=early(device))


@functools.lru_cache(4096)
def linear_nf4(rows: int, shape: tuple[int, int], block_size: int, dtype: torch.dtype, device: torch.device) -> Tile | None:
    """Returns how to multiply `rows` rows by a weight of `shape` (out_features, in_features), or None: by cuBLAS."""
    if rows == 0 or shape[1] % 64 or block_size % 64 or dtype not in (torch.float16, torch.bfloat16):
        return None
    capability, multiprocessors = _properties(device)
    for most, least, tile in table(capability):
        if rows <= most and shape[0] * shape[1] >= least:
            tile = dataclasses.replace(tile, programs=tile.programs * multiprocessors)
            # Groups of 16 rows instead of 64, where the others would not keep all programs busy.
            few = tile.parts > 1 and tile.tile_m == 4 and -(-shape[0] // (16 * tile.warps)) * (tile.parts - 1) < tile.programs
            return dataclasses.replace(tile, split=True) if few else tile
    return None


def early(device: torch.device) -> bool:
    """Whether a kernel can begin while the one before it ends: programmatic dependent launch, capability 9.0 on.

    A kernel that is launched so, and lets the next begin early, writes activations alone, and only after its own wait. Before
    that wait it reads what such kernels never write: codes, scales, levels, the weights of norms. What writes those (encoding,
    optimizers, copies) lets nothing begin early, so it is complete before any kernel behind it begins. The cache of earlier
    tokens is read early too: it was written so, but before the look-up of the new token's embedding, an ordinary launch.
    """
    return _properties(device)[0] >= (9, 0)

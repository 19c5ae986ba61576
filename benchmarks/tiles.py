"""What qlite/kernels/tiles.py was chosen by: each of its tiles beside others.

    python -m benchmarks.tiles                 # about half a minute on an H200
    python -m benchmarks.tiles --rows 1,16

Times in CUDA graphs over weights rotated past the L2 cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools

import torch

from benchmarks.common import (
    FAILURES,
    SHAPES,
    coded_bytes,
    coded_weights,
    cuda_graph_time,
    need_gpu,
    random_bf16,
    record,
    relative_error,
    rotation,
    told,
)

FALCON = SHAPES["falcon7b"]
LAYERS = ("dense_h_to_4h", "query_key_value", "dense_4h_to_h")
ROWS = (1, 4, 8, 16, 32, 64, 128, 256)
#: (warps, programs a multiprocessor, split, parts, registers)
FEW = (
    (4, 4, False, 4, 128), (4, 3, False, 4, 168), (8, 2, False, 4, 128), (4, 4, True, 4, 128), (4, 3, True, 4, 168),
    (4, 4, True, 1, 128), (4, 3, True, 1, 168),
)  # fmt: skip
#: The same kernel for five to sixteen rows: (warps, programs a multiprocessor, parts, registers)
SIXTEEN = ((4, 3, 5, 168), (4, 3, 9, 168), (4, 3, 14, 168), (4, 2, 5, None), (4, 2, 9, None), (8, 1, 9, None))
#: Rows of x -> (programs, warps, tile_n, tile_m, stages, two, scaled, sort)
BATCH = {
    16: (
        (2, 4, 128, 16, 6, True, False, False),
        (2, 4, 128, 16, 5, True, False, False),
        (3, 4, 128, 16, 5, True, False, False),
        (2, 8, 256, 16, 4, True, False, False),
        (3, 4, 64, 16, 10, True, False, False),
        (1, 16, 256, 16, 5, True, False, False),
    ),
    32: (
        (2, 4, 128, 32, 4, True, False, False),
        (1, 8, 128, 32, 4, True, False, True),
        (2, 8, 128, 32, 4, True, False, True),
        (2, 4, 128, 32, 4, True, False, True),
        (1, 16, 256, 32, 4, True, False, True),
    ),
    64: (
        (1, 8, 128, 64, 3, True, False, True),
        (2, 8, 128, 64, 3, True, False, True),
        (1, 8, 128, 64, 4, True, False, True),
        (1, 8, 256, 64, 3, True, False, True),
        (2, 4, 128, 64, 3, True, True, True),
        (1, 16, 256, 64, 3, True, False, True),
        (1, 16, 256, 64, 4, False, False, True),
        (2, 8, 128, 64, 3, False, False, True),
    ),
    128: ((1, 8, 128, 128, 3, True, True, True), (1, 8, 128, 128, 3, False, True, True)),
    256: (
        (1, 8, 128, 256, 3, False, True, True),
        (1, 8, 128, 256, 4, False, True, True),
        (1, 8, 128, 256, 2, True, True, True),
        (1, 8, 128, 128, 3, True, True, True),
    ),
}


def tiles_of(rows: int):
    """Yields the tiles that are tried for a number of rows."""
    from qlite.kernels.tiles import Tile, early

    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    begun = early(torch.device("cuda", torch.cuda.current_device()))
    if rows <= 4:
        for warps, programs, split, parts, registers in FEW:
            yield Tile(
                "few rows", programs * multiprocessors, warps, split=split, parts=parts, registers=registers,
                early=begun,
            )  # fmt: skip
    elif rows <= 16:
        for warps, programs, parts, registers in SIXTEEN:
            yield Tile(
                "few rows", programs * multiprocessors, warps, tile_m=16, split=False, parts=parts, registers=registers,
                early=begun,
            )  # fmt: skip
    for programs, warps, tile_n, tile_m, stages, two, scaled, sort in BATCH.get(rows, ()):
        yield Tile("small batch", programs * multiprocessors, warps, tile_n, tile_m, stages, two, scaled, sort, early=begun)


def time_tiles(name: str, rows: int, note) -> None:
    """Notes the time of each tile that is tried for a number of rows of a layer."""
    from qlite.kernels import few_rows, nf4_codec, small_batch

    n, k = FALCON[name]
    x, weights = random_bf16(rows, k), coded_weights(n, k, rotation(coded_bytes(n, k)))
    exact = x.double() @ nf4_codec.dequantize(*weights[0], k, 64, torch.float32).double().T
    for tile in tiles_of(rows):
        multiply = few_rows.multiply if tile.method == "few rows" else small_batch.multiply
        row = {"layer": name, "rows": rows, **dataclasses.asdict(tile)}
        try:
            if relative_error(multiply(x, weights[0], None, 64, tile), exact) > 4e-3:  # the bound of docs/kernels.md
                raise SystemExit(f"{name}, {rows} rows, {tile}: wrong numbers")
            us = cuda_graph_time([functools.partial(multiply, x, coded, None, 64, tile) for coded in weights])
        except FAILURES as error:
            print(name, rows, tile, told(error), flush=True)
            continue
        note({**row, "us": round(us, 1)})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiles", description="What tiles.py was chosen by.")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--layers", default=",".join(LAYERS), help=f"of {','.join(LAYERS)} (all)")
    parser.add_argument("--commit", help="what to call the tree where it is no git checkout")
    arguments = parser.parse_args()
    need_gpu("tiles")
    note = functools.partial(record, "tiles", commit=arguments.commit)
    with torch.inference_mode():
        for rows in map(int, arguments.rows.split(",")):
            for name in arguments.layers.split(","):
                time_tiles(name, rows, note)


if __name__ == "__main__":
    main()

"""What qlite/kernels/tiles.py was chosen by: each of its tiles beside others.

    python -m benchmarks.tiles                 # about half a minute on an H200
    python -m benchmarks.tiles --rows 1,16
    python -m benchmarks.tiles --rows 1,4,16 --pairs       # two weights at once, and with the sum that reads them

Times in CUDA graphs over weights rotated past the L2 cache; each is held against float64 first.
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
    (4, 4, False, 3, 128), (4, 3, False, 3, 168), (8, 2, False, 3, 128), (4, 4, True, 3, 128), (4, 3, True, 3, 168),
    (4, 4, True, 1, 128), (4, 3, True, 1, 168),
)  # fmt: skip
#: The same kernel for five to sixteen rows: (warps, programs a multiprocessor, parts, registers)
SIXTEEN = ((4, 3, 4, 168), (4, 3, 8, 168), (4, 3, 13, 168), (4, 2, 4, None), (4, 2, 8, None), (8, 1, 8, None), (8, 1, 13, None))
#: Two weights at once, one to four rows: (warps, programs a multiprocessor, split, parts, registers)
PAIRS_OF_FEW = (
    (4, 3, False, 3, 168), (4, 3, False, 5, 168), (4, 3, False, 7, 168), (4, 3, True, 3, 168), (4, 4, True, 3, 128),
    (4, 4, False, 7, 128), (4, 2, False, 5, None),
)  # fmt: skip
PAIRS = {"stacked": ("query_key_value", "dense_h_to_4h"), "summed": ("dense", "dense_4h_to_h")}
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
    few = max(rows, 16) if rows > 4 else 0  # eight rows are padded to sixteen
    for programs, warps, tile_n, tile_m, stages, two, scaled, sort in BATCH.get(few, ()):
        yield Tile("small batch", programs * multiprocessors, warps, tile_n, tile_m, stages, two, scaled, sort, early=begun)


def tiles_of_pairs(rows: int):
    """Yields the tiles that are tried for two weights at once."""
    from qlite.kernels.tiles import Tile, early

    device = torch.device("cuda", torch.cuda.current_device())
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    if rows <= 4:
        tried = [(warps, programs, 4, *rest) for warps, programs, *rest in PAIRS_OF_FEW]
    else:
        tried = [(warps, programs, 16, False, *rest) for warps, programs, *rest in SIXTEEN]
    for warps, programs, tile_m, split, parts, registers in tried:
        yield Tile(
            "few rows", programs * multiprocessors, warps, tile_m=tile_m, split=split, parts=parts, registers=registers,
            early=early(device),
        )  # fmt: skip


def time_pairs(how: str, rows: int, note) -> None:
    """Notes the time of each tile that is tried for a pair of weights; of "summed" with the sum and norm that follow, too."""
    from qlite.kernels import few_rows, nf4_codec, one_token

    shapes = [FALCON[name] for name in PAIRS[how]]
    count = rotation(sum(coded_bytes(*shape) for shape in shapes))
    weights = list(zip(*(coded_weights(*shape, count) for shape in shapes), strict=True))
    xs = [random_bf16(rows, k) for _, k in shapes][: 1 if how == "stacked" else 2]
    dense = [nf4_codec.dequantize(*w, k, 64, torch.float32).double() for w, (_, k) in zip(weights[0], shapes, strict=True)]
    products = [x.double() @ w.T for x, w in zip((xs[0], xs[-1]), dense, strict=True)]
    exact = torch.cat(products, 1) if how == "stacked" else products[0] + products[1]
    x, (weight, bias) = random_bf16(rows, exact.shape[1]), random_bf16(2, exact.shape[1])

    for tile in tiles_of_pairs(rows):
        row = {"pair": how, "rows": rows, **dataclasses.asdict(tile)}
        multiply = functools.partial(few_rows.multiply_two, xs, block_size=64, tile=tile)
        try:
            if relative_error(multiply(weights=list(weights[0])).sum(0), exact) > 4e-3:  # the bound of docs/kernels.md
                raise SystemExit(f"{how}, {rows} rows, {tile}: wrong numbers")
            calls = [functools.partial(multiply, weights=list(pair)) for pair in weights]
            row["us"] = round(cuda_graph_time(calls), 1)
            if how == "summed":
                both = [lambda call=call: one_token.add_norm(x, [call()], weight, bias, 1e-5) for call in calls]
                row["us_with_norm"] = round(cuda_graph_time(both), 1)
        except FAILURES as error:
            print(how, rows, tile, told(error), flush=True)
            continue
        note(row)


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
    parser.add_argument("--pairs", action="store_true", help="two weights at once, instead of single ones")
    parser.add_argument("--layers", default=",".join(LAYERS), help=f"of {','.join(LAYERS)} (all)")
    parser.add_argument("--commit", help="what to call the tree where it is no git checkout")
    arguments = parser.parse_args()
    need_gpu("tiles")
    note = functools.partial(record, "tiles", commit=arguments.commit)
    with torch.inference_mode():
        for rows in map(int, arguments.rows.split(",")):
            for name in PAIRS if arguments.pairs else arguments.layers.split(","):
                (time_pairs if arguments.pairs else time_tiles)(name, rows, note)


if __name__ == "__main__":
    main()

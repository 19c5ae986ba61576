"""What bounds the kernel of few rows: pairs of weights in one launch, and the kernel with parts of its work left out.

    python -m benchmarks.few_rows                   # Falcon-7B's layers; a CUDA GPU of capability 8.0 on, half a minute

Pairs are the two weights that generation multiplies at once (token_step.py), beside the time of one after the other; both are
held against float64 first. What is left out of dense_h_to_4h, by other PTX in its place, gives numbers that mean nothing, and a
time: how much longer the kernel takes with that part than without. Times are of CUDA graphs over weights rotated past the L2
cache, without the sum of the parts that follows a single product; the floor is the coded weights at the speed of a copy.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable
from unittest import mock

import torch

from benchmarks.common import (
    coded_bytes,
    coded_weights,
    copy_bandwidth,
    cuda_graph_time,
    need_gpu,
    random_bf16,
    record,
    relative_error,
    rotation,
    table,
)
from qlite.kernels import few_rows, linear_nf4, nf4_codec, ptx, tiles

HIDDEN, WIDE = 4544, 18176
SHAPES = {
    "query_key_value": (4672, HIDDEN), "dense_h_to_4h": (WIDE, HIDDEN), "dense": (HIDDEN, HIDDEN),
    "dense_4h_to_h": (HIDDEN, WIDE),
}  # fmt: skip
PAIRS = {"stacked": ("query_key_value", "dense_h_to_4h"), "summed": ("dense", "dense_4h_to_h")}
#: Instead of a look-up: what costs an integer operation or none.
_NO_LOOK_UP = "mov.b32 $0, $4; add.u32 $1, $4, $5; xor.b32 $2, $4, $5; sub.u32 $3, $4, $5;"
_NO_ABSMAX = "and.b32 $0, $4, 127; and.b32 $1, $5, 127; mov.b32 $2, 0; mov.b32 $3, 0;"
_NO_SCALE = "mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $4; mov.b32 $3, $5;"
_NO_PRODUCT = "{ .reg .u32 a; mov.u32 a, 0;\n" + "\n".join(f"xor.b32 a, a, ${i};" for i in range(4, 52)) + (
    "\nmov.b32 $0, a; mov.f32 $1, $56; mov.f32 $2, $60; mov.f32 $3, $52; }"
)  # fmt: skip


def half_the_look_ups() -> str:
    """Returns ptx.pairs with two bytes looked up, and two taken as they are."""
    lines = ptx.pairs().splitlines()
    return "\n".join([*lines[:3], "mov.b32 $2, $4; xor.b32 $3, $4, $5; }"])


def without() -> dict[str, dict[str, str]]:
    """Returns what is left out -> functions of ptx.py, and the text that they give instead."""
    scales = {"raw_scales": _NO_ABSMAX, "scales": _NO_SCALE}
    return {
        "nothing": {}, "half the look-ups": {"pairs": half_the_look_ups()}, "look-ups": {"pairs": _NO_LOOK_UP},
        "scales": scales, "products": {"product": _NO_PRODUCT},
        "all but loads": {"pairs": _NO_LOOK_UP, "product": _NO_PRODUCT, **scales},
    }  # fmt: skip


def parts_of(x: torch.Tensor, coded: tuple, tile: tiles.Tile) -> torch.Tensor:
    """Returns a single product as the kernel leaves it."""
    y = torch.empty(tile.parts, x.shape[0], coded[0].shape[0], dtype=torch.float32, device=x.device)
    few_rows._launch([x], [coded], few_rows.SINGLE, None, y, 64, tile)
    return y


def decoded(coded: tuple) -> torch.Tensor:
    """Returns the weight of its parts in float64."""
    return nf4_codec.dequantize(*coded, coded[0].shape[1] * 2, 64, torch.float32).double()


def main() -> None:
    """Measures, and records a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="what to call this tree")
    options = parser.parse_args()
    need_gpu("few_rows")
    weights = {name: coded_weights(*shape, rotation(shape[0] * shape[1] // 2)) for name, shape in SHAPES.items()}
    found: list[dict] = []

    def note(rows: int, what: str, names: tuple[str, ...], call: Callable[[int], object], left_out: str = "nothing") -> None:
        count = min(len(weights[name]) for name in names)
        us = cuda_graph_time([functools.partial(call, i) for i in range(count)])
        floor = sum(coded_bytes(*SHAPES[name]) for name in names) / copy_bandwidth() * 1e6
        row = {"rows": rows, "what": what, "without": left_out, "us": round(us, 2), "floor_us": round(floor, 2)}
        record("few_rows", row, commit=options.commit, show=False)
        found.append(row)

    for rows in (1, 4, 16):
        xs = {columns: random_bf16(rows, columns) for columns in (HIDDEN, WIDE)}
        for name, (out, columns) in SHAPES.items():
            note(rows, name, (name,), lambda i: linear_nf4.linear(xs[columns], *weights[name][i], None, out, 64))  # noqa: B023
        for how, names in PAIRS.items():
            both = [xs[HIDDEN]] if how == "stacked" else [xs[HIDDEN], xs[WIDE]]

            def pair(i: int, both=both, names=names) -> torch.Tensor:
                return linear_nf4.two_products(both, *(list(weights[name][i]) for name in names), 64)

            products = [x.double() @ decoded(weights[name][0]).T for x, name in zip((both[0], both[-1]), names, strict=True)]
            exact = torch.cat(products, 1) if how == "stacked" else products[0] + products[1]
            assert relative_error(pair(0).sum(0), exact) <= 4e-3
            note(rows, how, names, pair)
    tile = tiles.linear_nf4(1, SHAPES["dense_h_to_4h"], 64, torch.bfloat16, torch.device("cuda", torch.cuda.current_device()))
    assert tile is not None and tile.parts > 1
    x = random_bf16(1, HIDDEN)
    for left_out, texts in without().items():
        with contextlib.ExitStack() as patched:
            for of, text in texts.items():
                patched.enter_context(mock.patch.object(ptx, of, lambda *_, text=text: text))
            name = "dense_h_to_4h"
            note(1, f"{name}, parts", (name,), lambda i: parts_of(x, weights[name][i], tile), left_out)  # noqa: B023
    print(table(tuple(found[0]), [tuple(row.values()) for row in found]))


if __name__ == "__main__":
    main()

"""The int8 linear layer against its floor, against cuBLAS in bf16 and against bitsandbytes' int8, by rows.

    python -m benchmarks.linear_int8            # Falcon-7B; about half a minute on an H200
    python -m benchmarks.linear_int8 --gradient --rows 1,64,4096

Weights are int8 with one absmax a row. First, each result is held against float64, both ways it may be computed: x as it is,
and x rounded to int8 with one absmax a row (which for normal values of this length is 1 % off the first); it must be within
4e-3 of one of them, Frobenius norm of the difference over that of the product, and the line says of which. A layer that is
not gets no number and the exit status is 1.

floor = max(bytes / measured copy bandwidth, operations / measured int8 peak): the coded weight, x and y once each; the peak
is that of torch._int_mm on 8192 x 8192 matrices, that of bf16 for the gradient. Times are of CUDA graphs over weights
rotated past the L2 cache, median of replays.
"""

from __future__ import annotations

import argparse
import functools
import logging

import torch

from benchmarks import peer_linears
from benchmarks.common import (
    FAILURES,
    SHAPES,
    bf16_peak,
    copy_bandwidth,
    cuda_graph_time,
    event_time,
    need_gpu,
    peer,
    random_bf16,
    record,
    relative_error,
    rotation,
    table,
    told,
)
from qlite import int8, ops

ROWS = (1, 4, 16, 64, 256, 1024, 4096)
MOST_ERROR = 4e-3


def floor_us(rows: int, out_features: int, in_features: int, bandwidth: float, peak: float) -> float:
    """Returns the least time of a product in us: what must be moved at `bandwidth` (B/s), or computed at `peak` (op/s)."""
    moved = out_features * (in_features + 4) + 2 * rows * (out_features + in_features)
    return max(moved / bandwidth, 2 * rows * out_features * in_features / peak) * 1e6


@functools.cache
def int8_peak() -> float:
    """Returns what cuBLAS reaches on int8 matrices of 8192 x 8192, random values, in operations a second."""
    a, b = (torch.randint(-127, 128, (8192, 8192), dtype=torch.int8, device="cuda") for _ in range(2))
    return 2 * 8192**3 / (event_time([lambda: torch._int_mm(a, b.T)]) * 1e-6)


def bitsandbytes_int8(weight: torch.Tensor) -> peer_linears.Call:
    """Returns bitsandbytes' int8 product without outliers: x is rounded to int8, one absmax a row."""
    import bitsandbytes as bnb

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at each call that bf16 is cast to fp16
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
    state = bnb.MatmulLtState()
    state.CB, state.SCB, state.has_fp16_weights, state.is_training = codes, absmax, False, False
    return lambda x: bnb.matmul(x, codes, state=state)


def rounded_rows(x: torch.Tensor) -> torch.Tensor:
    """Returns x rounded to int8 with one absmax a row, as float64."""
    step = x.double().abs().amax(dim=1, keepdim=True) / 127
    return (x.double() / step).round() * step


def errors(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[float, str]:
    """Returns the smaller relative error and what x was for it; x @ weight, both as they are multiplied."""
    of = {"bf16": relative_error(found, x.double() @ weight), "int8": relative_error(found, rounded_rows(x) @ weight)}
    kind = min(of, key=lambda key: of[key])
    return of[kind], kind


def timed(what: str, calls, x: torch.Tensor) -> float | None:
    """Returns the time of one of `calls` on x in us, None where they fail, which is printed."""
    try:
        return round(cuda_graph_time([functools.partial(call, x) for call in calls]), 1)
    except FAILURES as error:
        print(f"{what}, {len(x)} rows: {told(error)}", flush=True)
        torch.cuda.synchronize()
        return None


def measure_layer(name: str, direction: str, rows_of: list[int], with_bitsandbytes: bool) -> list[dict]:
    """Returns the lines of one layer in one direction."""
    out_features, in_features = SHAPES["falcon7b"][name]
    forward = direction == "forward"
    dense = [random_bf16(out_features, in_features) for _ in range(rotation(out_features * in_features))]
    coded = [(q.codes, q.absmax) for q in map(ops.quantize_int8, dense)]
    exact = ops.dequantize_int8_rows(*coded[0], torch.float64)
    calls: dict[str, list] = {"qlite": [], "cublas": []}
    for weight in dense[: rotation(2 * out_features * in_features)]:
        calls["cublas"].append(peer_linears.cublas(weight) if forward else peer_linears.cublas_gradient(weight))
    for codes, absmax in coded:
        if forward:
            calls["qlite"].append(lambda x, c=codes, a=absmax: torch.ops.qlite.linear_int8(x, c, a, None, int8.is_dynamic(x)))
        else:
            calls["qlite"].append(lambda x, c=codes, a=absmax: torch.ops.qlite.linear_int8_grad(x, c, a))
    if with_bitsandbytes and forward:
        calls["bitsandbytes"] = [bitsandbytes_int8(weight) for weight in dense]
    lines = []
    for rows in rows_of:
        x = random_bf16(rows, in_features if forward else out_features)
        error, kind = errors(calls["qlite"][0](x), x, exact.T if forward else exact)
        line = {"model": "falcon7b", "layer": name, "direction": direction, "out_features": out_features}
        line |= {"in_features": in_features, "rows": rows, "error": float(f"{error:.2e}"), "x_as": kind}
        line["correct"] = error <= MOST_ERROR
        peak = int8_peak() if forward else bf16_peak()
        line["floor_us"] = round(floor_us(rows, out_features, in_features, copy_bandwidth(), peak), 2)
        for column, each in calls.items():
            red = column == "qlite" and not line["correct"]
            line[f"{column}_us"] = None if red else timed(f"{name} {column}", each, x)
        lines.append(line)
    return lines


def shown(lines: list[dict]) -> str:
    """Returns the table of some lines."""
    header = ("layer", "direction", "rows", "floor us", "qlite us", "of floor", "of cuBLAS", "cuBLAS us", "bitsandbytes us")
    rows = []
    for line in lines:
        us, cublas = line["qlite_us"], line["cublas_us"]
        against = f"{us / line['floor_us']:.2f}" if us else ("-" if line["correct"] else "RED")
        cells = [line["layer"], line["direction"], line["rows"], line["floor_us"], us or "-", against]
        cells += [f"{us / cublas:.2f}" if us and cublas else "-", cublas or "-", line.get("bitsandbytes_us") or "-"]
        rows.append([*cells, line["error"], line["x_as"]])
    return table((*header, "error", "x as"), rows)


def main() -> None:
    """Measures, records and prints all layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--gradient", action="store_true", help="the input gradient beside the forward pass")
    parser.add_argument("--commit", help="what to call the tree where it is no git checkout")
    options = parser.parse_args()
    need_gpu("linear_int8")
    version = peer("bitsandbytes")
    roofs = {"copy_tb_s": round(copy_bandwidth() / 1e12, 3), "bf16_tflop_s": round(bf16_peak() / 1e12, 1)}
    roofs["int8_top_s"] = round(int8_peak() / 1e12, 1)
    print(f"roofs measured: {roofs}; bitsandbytes {version or 'absent'}", flush=True)
    lines: list[dict] = []
    with torch.inference_mode():
        for name in SHAPES["falcon7b"]:
            for direction in ("forward", "gradient") if options.gradient else ("forward",):
                found = measure_layer(name, direction, [int(rows) for rows in options.rows.split(",")], version is not None)
                torch.cuda.empty_cache()
                for line in found:
                    note = {**line, **roofs, "bitsandbytes_version": version, "timer": "cuda graph"}
                    record("linear_int8", note, commit=options.commit, show=False)
                lines += found
    print(shown(lines), flush=True)
    if not all(line["correct"] for line in lines):
        raise SystemExit("some results are wrong: RED above")


if __name__ == "__main__":
    main()

"""The 4-bit linear layer against its floor, against cuBLAS in bf16 and against other libraries, by rows.

    python -m benchmarks.linear_nf4                      # forward, Falcon-7B, Falcon-40B, Llama-8B; under 4 minutes
    python -m benchmarks.linear_nf4 --gradient           # the input gradient too
    python -m benchmarks.linear_nf4 --quick              # two layers, six numbers of rows; under a minute
    python -m benchmarks.linear_nf4 --lora               # LoRA on a 4-bit layer against the layer alone, forward + backward
    python -m benchmarks.linear_nf4 --plot linear.png [--plot-only]

Weights are NF4 in blocks of 64, double-quantized. First, each result is held against float64: the product of the same x
with qlite's decoded weight, Frobenius norm of the difference over that of the product, at most 4e-3; a layer that is off
gets no number and the exit status is 1. (Rounding a weight and a result to bf16 makes 1.7e-3 each, in quadrature 2.4e-3.)

floor = max(bytes / measured copy bandwidth, FLOPs / measured bf16 peak): the coded weight, x and y once each. Times are of
CUDA graphs over weights rotated past the L2 cache, median of replays; with --lora they are of CUDA events, and cpu_us is
what the host needs to launch one pass. Other libraries' int4 layers are anchors: another format, fewer points; gemlite
searches for its options at each point and stops after --anchor-seconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence

import torch

import qlite
from benchmarks import peer_linears, roof_plot
from benchmarks.common import (
    FAILURES,
    PEERS,
    RESULTS,
    SHAPES,
    bf16_peak,
    coded_bytes,
    coded_weights,
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

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUICK_ROWS = (1, 16, 64, 256, 1024, 4096)
LAYERS_OF_QUICK = ("query_key_value", "dense_h_to_4h")
ANCHOR_ROWS = (1, 4, 16, 64, 256)
LORA_ROWS, LORA_RANKS = (512, 2048, 8192), (16, 64)
MOST_ERROR = 4e-3
BLOCK = 64


def floor_us(rows: int, out_features: int, in_features: int, bandwidth: float, peak: float) -> float:
    """Returns the least time of a product in us: what must be moved at `bandwidth` (B/s), or computed at `peak` (FLOP/s)."""
    moved = coded_bytes(out_features, in_features) + 2 * rows * (out_features + in_features)
    return max(moved / bandwidth, 2 * rows * out_features * in_features / peak) * 1e6


def qlite_call(coded, direction: str, shape: tuple[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns qlite's product with a coded weight, by its public op."""
    if direction == "forward":
        return lambda x: torch.ops.qlite.linear_nf4(x, *coded, None, shape[0], BLOCK)
    return lambda grad: torch.ops.qlite.linear_nf4_grad(grad, *coded, shape[1], BLOCK)


def timed(calls: Sequence[Callable], x: torch.Tensor) -> float:
    """Returns the time of one of `calls` on x in a CUDA graph of all, in us."""
    return round(cuda_graph_time([functools.partial(call, x) for call in calls]), 1)


class Layer:
    """One layer in one direction: its weights, encoded by everybody, and what was measured of it."""

    def __init__(self, model: str, name: str, direction: str, most_rows: int, absent: set[str]):
        self.model, self.name, self.direction = model, name, direction
        self.shape = out_features, in_features = SHAPES[model][name]
        self.coded = coded_weights(out_features, in_features, rotation(coded_bytes(out_features, in_features)))
        forward = direction == "forward"
        self.x = random_bf16(most_rows, in_features if forward else out_features)
        exact = torch.ops.qlite.dequantize_nf4(*self.coded[0], in_features, BLOCK, torch.float32).double()
        self.expected = self.x.double() @ (exact.T if forward else exact)
        del exact
        self.dense = [random_bf16(out_features, in_features) for _ in range(rotation(2 * out_features * in_features))]
        cublas = peer_linears.cublas if forward else peer_linears.cublas_gradient
        self.calls = {
            "qlite": [qlite_call(coded, direction, self.shape) for coded in self.coded],
            "cublas": [cublas(weight) for weight in self.dense],
        }
        for column, (package, *makers) in peer_linears.SAME_FORMAT.items():
            if package not in absent:
                maker = makers[0 if forward else 1]
                self.calls[column] = [maker(self.dense[i % len(self.dense)]) for i in range(len(self.coded))]

    def measure(self, rows: int, bandwidth: float, peak: float) -> dict:
        """Returns the line of results for one number of rows, parity first."""
        x = self.x[:rows]
        line = {"model": self.model, "layer": self.name, "direction": self.direction}
        line |= {"out_features": self.shape[0], "in_features": self.shape[1], "rows": rows}
        line["floor_us"] = round(floor_us(rows, *self.shape, bandwidth, peak), 2)
        with torch.inference_mode():
            line["error"] = float(f"{relative_error(self.calls['qlite'][0](x), self.expected[:rows]):.2e}")
            line["correct"] = line["error"] <= MOST_ERROR
            for column, calls in self.calls.items():
                if column == "qlite" and not line["correct"]:
                    line["qlite_us"] = None
                    continue
                line[f"{column}_us"] = attempt(f"{column}, {rows} rows", timed, calls, x)
        return line


def attempt(what: str, function: Callable, *arguments) -> float | None:
    """Returns function(*arguments), or None where it fails, and says so."""
    try:
        return function(*arguments)
    except FAILURES as error:
        print(f"{what}: {told(error)}", flush=True)
        torch.cuda.synchronize()
        return None


def measure_anchors(lines: list[dict], absent: set[str], seconds_left: dict[str, float]) -> None:
    """Adds other libraries' layers in other formats to a layer's lines, as long as each has seconds left."""
    first = lines[0]
    shape = first["out_features"], first["in_features"]
    for column, (package, maker) in peer_linears.ANCHORS.items():
        if package in absent:
            continue
        start = time.perf_counter()
        with torch.no_grad():
            calls = attempt(f"{column}, {first['layer']}", built, maker, *shape)
            for line in [line for line in lines if calls and line["rows"] in ANCHOR_ROWS]:
                what = f"{column}, {first['layer']}, {line['rows']} rows"
                if time.perf_counter() - start > seconds_left[column]:
                    print(f"{what}: not measured, its seconds are over", flush=True)
                    continue
                line[f"{column}_us"] = attempt(what, timed, calls, random_bf16(line["rows"], shape[1]))
            del calls
        seconds_left[column] -= time.perf_counter() - start


def built(maker: Callable, out_features: int, in_features: int) -> list[Callable]:
    """Returns layers of a library over random weights, enough to pass the L2 cache."""
    count = rotation(out_features * in_features // 2)
    return [maker(random_bf16(out_features, in_features)) for _ in range(count)]


def shown(lines: list[dict]) -> str:
    """Returns the table of one layer."""
    columns = [key for key in roof_plot.STYLES if any(key in line for line in lines)]
    names = [key.removesuffix("_us") for key in columns]
    header = ["rows", "floor us", *[f"{name} us" for name in names], "qlite/floor", "qlite/cublas", "error"]
    rows = []
    for line in lines:
        us = line["qlite_us"]
        against = [f"{us / line[key]:.2f}" if us and line.get(key) else "-" for key in ("floor_us", "cublas_us")]
        cells = [line.get(key) or "-" for key in columns]
        rows.append([line["rows"], line["floor_us"], *cells, *against, f"{line['error']}{'' if line['correct'] else ' RED'}"])
    first = lines[0]
    title = f"{first['model']} {first['layer']} {first['out_features']} x {first['in_features']}, {first['direction']}"
    return f"{title}\n{table(header, rows)}"


def lora_pass(layer: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor) -> None:
    """Runs forward and backward, gradients for x and what is trained in the layer."""
    torch.autograd.grad(layer(x), [x, *[p for p in layer.parameters() if p.requires_grad]], grad)


def launch_us(call: Callable[[], object], repeats: int = 20) -> float:
    """Returns what the host needs to launch a call, median, in us."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def measure_lora(note: Callable[[dict], None]) -> str:
    """Times forward + backward of a 4-bit layer, alone and under an adapter; returns the table."""
    table_rows = []
    for name in LAYERS_OF_QUICK:
        out_features, in_features = SHAPES["falcon7b"][name]
        base = qlite.Linear4bit(in_features, out_features, bias=False, device="cuda", dtype=torch.bfloat16)
        base.quantize_(random_bf16(out_features, in_features))
        for rows in LORA_ROWS:
            x, grad = random_bf16(rows, in_features).requires_grad_(), random_bf16(rows, out_features)
            alone = functools.partial(lora_pass, base, x, grad)
            base_us, base_cpu = event_time([alone]), launch_us(alone)
            for r in LORA_RANKS:
                for dropout in (0.0, 0.05):
                    adapted = qlite.LoRALinear(base, qlite.LoRAConfig(r=r, dropout=dropout))
                    with torch.no_grad():
                        adapted.lora_B.normal_(std=0.02)
                    both = functools.partial(lora_pass, adapted, x, grad)
                    us = event_time([both])
                    line = {"model": "falcon7b", "layer": name, "direction": "lora", "rows": rows, "r": r, "dropout": dropout}
                    line |= {"base_us": round(base_us, 1), "lora_us": round(us, 1), "overhead": round(us / base_us - 1, 4)}
                    line |= {"base_cpu_us": round(base_cpu, 1), "lora_cpu_us": round(launch_us(both), 1)}
                    note(line)
                    overhead = f"{line['overhead']:.1%}"
                    table_rows.append([name, rows, r, dropout, line["base_us"], line["lora_us"], overhead])
                    table_rows[-1] += [line["base_cpu_us"], line["lora_cpu_us"]]
    header = ("forward + backward", "rows", "r", "dropout", "base us", "LoRA us", "overhead", "base cpu us", "LoRA cpu us")
    return table(header, table_rows)


def arguments() -> argparse.Namespace:
    """Returns what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help=f"of {','.join(SHAPES)} (all)")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--gradient", action="store_true", help="the input gradient beside the forward pass")
    parser.add_argument("--lora", action="store_true", help="LoRA on a 4-bit layer, and nothing else")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--plot", type=pathlib.Path, metavar="PNG")
    parser.add_argument("--plot-only", action="store_true", help="draw the results of --shapes that are there; needs no GPU")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS / "linear_nf4.jsonl", help="what to draw")
    parser.add_argument("--device", help="whose results to draw; that of the last line, if not given")
    parser.add_argument("--anchor-seconds", type=float, default=60, help="most seconds for each other library's int4 layer")
    parser.add_argument("--commit", help="what to call the tree where it is no git checkout")
    options = parser.parse_args()
    options.shapes = options.shapes.split(",")
    options.rows = [int(rows) for rows in options.rows.split(",")]
    if options.plot_only and not options.plot:
        parser.error("--plot-only needs --plot PNG")
    if unknown := set(options.shapes) - SHAPES.keys():
        parser.error(f"--shapes: {', '.join(sorted(unknown))}; there are {', '.join(SHAPES)}")
    if options.quick:
        options.shapes, options.rows = ["falcon7b"], list(QUICK_ROWS)
    return options


def measure(options: argparse.Namespace, note: Callable[[dict], None]) -> bool:
    """Measures and prints table after table; returns whether all was correct."""
    peers = {name: peer(name) for name in PEERS}
    absent = {name for name, version in peers.items() if version is None}
    roofs = {"copy_tb_s": round(copy_bandwidth() / 1e12, 3), "bf16_tflop_s": round(bf16_peak() / 1e12, 1)}
    print(f"roofs measured: {roofs}; absent: {', '.join(sorted(absent)) or 'none'}", flush=True)
    versions = {f"{name}_version": version for name, version in peers.items() if version}
    seconds_left = dict.fromkeys(peer_linears.ANCHORS, options.anchor_seconds)
    correct = True
    for model in options.shapes:
        for name in SHAPES[model]:
            if options.quick and name not in LAYERS_OF_QUICK:
                continue
            for direction in ("forward", "gradient") if options.gradient else ("forward",):
                layer = Layer(model, name, direction, max(options.rows), absent)
                lines = [layer.measure(rows, copy_bandwidth(), bf16_peak()) for rows in options.rows]
                del layer
                torch.cuda.empty_cache()
                if (model, direction) == ("falcon7b", "forward") and name in LAYERS_OF_QUICK and not options.quick:
                    measure_anchors(lines, absent, seconds_left)
                for line in lines:
                    note({**line, **roofs, **versions, "timer": "cuda graph"})
                print(shown(lines), flush=True)
                correct = correct and all(line["correct"] for line in lines)
    return correct


def main() -> None:
    """Measures what is asked for, records it, draws it."""
    options = arguments()
    correct = True
    if not options.plot_only:
        need_gpu("linear_nf4")
        note = functools.partial(record, "linear_nf4", commit=options.commit, show=False)
        if options.lora:
            print(measure_lora(note), flush=True)
        else:
            correct = measure(options, note)
    if options.plot:
        lines = map(json.loads, options.results.read_text().splitlines())
        roof_plot.draw([line for line in lines if line["model"] in options.shapes], options.plot, options.device)
    if not correct:
        raise SystemExit("some results are wrong: RED above")


if __name__ == "__main__":
    main()

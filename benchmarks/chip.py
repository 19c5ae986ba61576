"""Experiments that decide how the kernels are built: what the chip, cuBLAS and a peer reach, each beside its prediction.

    python -m benchmarks.chip                 # about a minute on an H200
    python -m benchmarks.chip --only E4 E7

E0 instructions of a decode, lanes a clock (benchmarks/instructions.py)    E1 dequantize against a copy
E4 cuBLAS bf16 on Falcon-7B's shapes, with columns and rows added         E5 bitsandbytes' 4-bit linear
E6 dequantize and multiply in panels that stay in the L2 cache            E7 dequantize beside the matmul before
E8 AdamW's search for a code. E2 and E3, the fused kernel's variants, are a matter of that kernel's own sweep.

Small calls are timed in CUDA graphs over rotated buffers, E4 and E7 by CUDA events.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import time
from collections.abc import Callable

import torch

from benchmarks import instructions
from benchmarks.common import (
    FAILURES,
    SHAPES,
    bf16_peak,
    coded_bytes,
    coded_weights,
    copy_bandwidth,
    cuda_graph_time,
    event_time,
    keeping,
    need_gpu,
    peer,
    random_bf16,
    record,
    rotation,
    table,
    told,
)  # fmt: skip

FALCON = SHAPES["falcon7b"]
UP = FALCON["dense_h_to_4h"]
BLOCK = 64
Note = Callable[[dict], None]


def dequantize(coded, in_features: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Returns the decoded weight, by qlite's op."""
    return torch.ops.qlite.dequantize_nf4(*coded, in_features, BLOCK, dtype)


def rows_of(coded, first: int, last: int):
    """Returns the parts of a range of rows; under double quantization a range must begin where a group of absmax does."""
    codes, absmax, scale, offset, levels = coded
    if scale is None:
        return codes[first:last], absmax[first:last], None, None, levels
    blocks = absmax.shape[1]
    if first * blocks % 256:
        raise ValueError(f"row {first} of {blocks} blocks begins inside a group of 256")
    return codes[first:last], absmax[first:last], scale[first * blocks // 256 : -(-last * blocks // 256)], offset, levels


def e1_dequantize(note: Note) -> str:
    """The codec's share of a copy's bandwidth. Predicted: at least 88 % in bf16."""
    rows = []
    kinds = ((True, torch.bfloat16), (True, torch.float16), (False, torch.bfloat16), (True, torch.float32))
    for name in ("dense_h_to_4h", "query_key_value"):
        n, k = FALCON[name]
        for double_quant, dtype in kinds:
            weights = coded_weights(n, k, rotation(coded_bytes(n, k)), double_quant)
            calls = [functools.partial(dequantize, coded, k, dtype) for coded in weights]
            us = cuda_graph_time(keeping(calls, n * k * dtype.itemsize))
            rate = (coded_bytes(n, k, double_quant) + n * k * dtype.itemsize) / us * 1e6
            found = {"shape": name, "double_quant": double_quant, "dtype": str(dtype).removeprefix("torch.")}
            found |= {"us": round(us, 1), "tb_s": round(rate / 1e12, 2)}
            found |= {"of_copy": round(rate / copy_bandwidth(), 3), "expected": ">= 0.88"}
            note({"experiment": "E1", **found})
            rows.append(found.values())
    return table(("E1", "double quant", "dtype", "us", "TB/s", "of copy", "predicted"), rows)


def e4_cublas(note: Note) -> str:
    """TFLOP/s of cuBLAS on the odd shapes. Predicted: 650 to 750; a multiple of 256 and K + 64 no slower."""
    rows = []
    for name, (n, k) in FALCON.items():
        for m in (1024, 4096, 8192):
            wide = -(-n // 256) * 256
            sizes = {"as it is": (n, k), "K+16": (n, k + 16), "K+64": (n, k + 64), "N to 256": (wide, k)}
            found = {}
            for label, (out, inner) in sizes.items():
                x, weights = random_bf16(m, inner), [random_bf16(out, inner) for _ in range(2)]
                us = event_time([functools.partial(torch.mm, x, w.T) for w in weights], 12)
                found[label] = round(2 * m * out * inner / us / 1e6)
            grad, weights = random_bf16(m, n), [random_bf16(n, k) for _ in range(2)]
            us = event_time([functools.partial(torch.mm, grad, w) for w in weights], 12)
            found["gradient"] = round(2 * m * n * k / us / 1e6)
            note({"experiment": "E4", "shape": name, "rows": m, **found, "expected": "650 to 750"})
            rows.append((name, m, *found.values(), "650-750"))
    return table(("E4, TFLOP/s", "rows", "as it is", "K+16", "K+64", "N to 256", "gradient", "predicted"), rows)


#: us on dense_h_to_4h, from an earlier run of bitsandbytes on an H200.
BITSANDBYTES_EXPECTED = {1: 42, 4: 132, 16: 135, 64: 146, 256: 170, 1024: 346, 4096: 1081}


def e5_bitsandbytes(note: Note) -> str:
    """bitsandbytes on the same shapes, forward and input gradient, beside cuBLAS bf16 and the dequantize of its own."""
    if peer("bitsandbytes") is None:
        return "E5: bitsandbytes is absent"
    import bitsandbytes as bnb

    rows = []
    for name, (n, k) in FALCON.items():
        dense = [random_bf16(n, k) for _ in range(rotation(coded_bytes(n, k)))]
        coded = [bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True) for w in dense]
        dense = dense[: rotation(n * k * 2)]
        calls = [functools.partial(bnb.functional.dequantize_4bit, *pair) for pair in coded]
        decode = cuda_graph_time(keeping(calls, 2 * n * k))
        for m in BITSANDBYTES_EXPECTED:
            x, grad = random_bf16(m, k), random_bf16(m, n)
            found = {
                "bitsandbytes_us": cuda_graph_time([functools.partial(bnb.matmul_4bit, x, *pair) for pair in coded]),
                "cublas_us": cuda_graph_time([functools.partial(torch.mm, x, w.T) for w in dense]),
            }
            # As the backward of its autograd function does it.
            calls = [lambda p=pair, g=grad: g @ bnb.functional.dequantize_4bit(*p) for pair in coded]
            found["bitsandbytes_gradient_us"] = cuda_graph_time(calls)
            found["cublas_gradient_us"] = cuda_graph_time([functools.partial(torch.mm, grad, w) for w in dense])
            found = {key: round(value, 1) for key, value in found.items()}
            expected = BITSANDBYTES_EXPECTED[m] if (n, k) == UP else None
            found["dequantize_us"] = round(decode, 1)
            note({"experiment": "E5", "shape": name, "rows": m, **found, "expected": expected})
            keys = ("bitsandbytes_us", "cublas_us", "bitsandbytes_gradient_us", "cublas_gradient_us", "dequantize_us")
            rows.append((name, m, *[found.get(key, "") for key in keys], expected or ""))
    header = ("E5, us", "rows", "bitsandbytes", "cuBLAS", "its gradient", "cuBLAS'", "its dequantize", "predicted forward")
    return table(header, rows)


def in_panels(x: torch.Tensor, coded, out: torch.Tensor, panel: int) -> None:
    """Writes x @ weight.T, a panel of weight rows at a time; the allocator gives each panel the memory of the last."""
    for first in range(0, out.shape[1], panel):
        last = min(first + panel, out.shape[1])
        weight = dequantize(rows_of(coded, first, last), x.shape[1])
        torch.mm(x, weight.T, out=out[:, first:last])
        del weight


def e6_panels(note: Note) -> str:
    """Panels against whole. Predicted: at most 3 % gained at 4096 rows, lost below 1024 where panels do not fill the chip.

    Panels of 2112 and 4224 rows are whole waves of cuBLAS' tiles on 132 multiprocessors, and begin inside a group of
    double-quantized absmax: they are tried without double quantization, 2048 and 4352 with it.
    """
    n, k = UP
    rows = []
    for double_quant, panels in ((True, (2048, 4352)), (False, (2112, 4224))):
        weights = coded_weights(n, k, 4, double_quant)
        dense = [random_bf16(n, k) for _ in range(4)]
        for m in (256, 512, 1024, 2048, 4096):
            x, out = random_bf16(m, k), torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
            expected = dequantize(weights[0], k)
            in_panels(x, weights[0], out, panels[0])
            if not torch.allclose(out.float(), torch.mm(x, expected.T).float(), rtol=2**-6, atol=2.0):
                raise RuntimeError("the product in panels is another one")
            del expected
            calls = {"cublas_us": [functools.partial(torch.mm, x, w.T, out=out) for w in dense]}
            calls["whole_us"] = [functools.partial(in_panels, x, coded, out, n) for coded in weights]
            for panel in panels:
                calls[f"panels_{panel}_us"] = [functools.partial(in_panels, x, coded, out, panel) for coded in weights]
            found = {key: round(cuda_graph_time(each), 1) for key, each in calls.items()}
            note({"experiment": "E6", "double_quant": double_quant, "rows": m, **found, "expected": "-3 % at 4096"})
            rows.append((m, double_quant, *found.values(), " / ".join(map(str, panels))))
    return table(("E6, rows", "double quant", "cuBLAS us", "whole us", "panels us", "panels us", "of"), rows)


def multiplied(x, weights, out) -> None:
    """Multiplies by dense weights, one after the other."""
    for weight in weights:
        torch.mm(x, weight.T, out=out)


def serial(x, weights, out) -> None:
    """Decodes and multiplies, one weight after the other."""
    for coded in weights:
        torch.mm(x, dequantize(coded, x.shape[1]).T, out=out)


def overlapped(x, weights, out, side: torch.cuda.Stream) -> None:
    """The same, but the next weight is decoded on `side` while this one is multiplied by."""
    main = torch.cuda.current_stream()
    side.wait_stream(main)  # so memory that the last call's weights leave to `side` is not read any more
    kept, done = [], []
    for i, coded in enumerate(weights):
        with torch.cuda.stream(side):
            if i >= 2:
                side.wait_event(done[i - 2])  # no more than one weight ahead
            kept.append(dequantize(coded, x.shape[1]))
            ready = side.record_event()
        main.wait_event(ready)
        torch.mm(x, kept[-1].T, out=out)
        done.append(main.record_event())


def e7_overlap(note: Note) -> str:
    """us for a pair of dequantize and matmul. Predicted: at most 2 % gained with 4 to 8 multiprocessors set aside."""
    set_aside = getattr(torch._C, "_set_sm_carveout_experimental", None)
    n, k = UP
    weights, side = coded_weights(n, k, 8), torch.cuda.Stream()
    dense = [dequantize(coded, k) for coded in weights]
    rows = []
    for m in (1024, 4096):
        x, out = random_bf16(m, k), torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
        plain = functools.partial(multiplied, x, dense, out)
        calls = {"cublas_us": plain, "serial_us": functools.partial(serial, x, weights, out)}
        beside = functools.partial(overlapped, x, weights, out, side)
        found = {key: event_time([call], 12) / 8 for key, call in calls.items()}
        for count in (None, 0, 4, 8, 16):
            if count is not None and set_aside is None:
                continue
            if count is not None:
                set_aside(count)
            try:
                found[f"beside_{count}_us"] = event_time([beside], 12) / 8
                found[f"cublas_{count}_us"] = event_time([plain], 12) / 8
            finally:
                if count is not None:
                    set_aside(None)
        found = {key: round(value, 1) for key, value in found.items()}
        note({"experiment": "E7", "rows": m, **found, "expected": "-2 % against serial"})
        rows += [(m, key, us, f"{us / found['serial_us']:.3f}") for key, us in found.items()]
    return table(("E7, rows", "what (multiprocessors set aside)", "us", "of serial (predicted 0.98)"), rows)


def e8_adamw(note: Note) -> str:
    """The optimizer's search for a code: a binary search of the midpoints against arithmetic."""
    if importlib.util.find_spec("qlite.kernels.adamw_8bit") is None:
        return "E8: skipped, there is no optimizer kernel yet"
    return "E8: skipped, it is the optimizer benchmark's"


EXPERIMENTS = {"E1": e1_dequantize, "E4": e4_cublas, "E5": e5_bitsandbytes, "E6": e6_panels, "E7": e7_overlap, "E8": e8_adamw}


def main() -> None:
    """Runs the experiments that are asked for; one that fails says so and the others go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("E0", *EXPERIMENTS), default=("E0", *EXPERIMENTS))
    parser.add_argument("--commit", help="what to call the tree where it is no git checkout")
    options = parser.parse_args()
    need_gpu("chip")
    note = functools.partial(record, "chip", commit=options.commit, show=False)
    start = time.perf_counter()
    roofs = {"copy_tb_s": round(copy_bandwidth() / 1e12, 3), "bf16_tflop_s": round(bf16_peak() / 1e12)}
    note({"experiment": "roofs", **roofs, "expected": "4.3 and 790 on an H200"})
    print(f"copy {roofs['copy_tb_s']} TB/s, bf16 {roofs['bf16_tflop_s']} TFLOP/s (predicted, H200: 4.3, 790)", flush=True)
    for name in options.only:
        try:
            if name == "E0":
                instructions.run(options.commit, "chip")
            else:
                with torch.inference_mode():
                    print(EXPERIMENTS[name](note), flush=True)
        except FAILURES as error:
            print(f"{name}: {told(error)}", flush=True)
        torch.cuda.empty_cache()
        print(f"-- {name}: {time.perf_counter() - start:.0f} s since the start", flush=True)


if __name__ == "__main__":
    main()

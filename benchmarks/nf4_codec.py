"""Encoding and decoding of 4-bit weights against the floor of their bytes, and bitsandbytes beside it.

    python -m benchmarks.nf4_codec            # Falcon-7B, Falcon-40B, Llama-8B; about a minute on an H200
    python -m benchmarks.nf4_codec --quick    # two layers

NF4 in blocks of 64. First, what is decoded must equal the reference bit for bit (on a share of the rows), and what is
encoded must decode to within half of the table's widest gap; what does not gets no number and the exit status is 1.

floor = bytes read and written once / measured copy bandwidth. qlite's times are of CUDA graphs over weights and results
rotated past the L2 cache, median of replays. bitsandbytes' quantize copies from the host, which a graph cannot hold: CUDA
events, launches included where they take longer than the work. Double quantization is two ops of qlite's, timed as one.
"quantize, searched" is `search=True`: the search, the double quantization of its scales, the codes for what that leaves.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch

from benchmarks.common import (
    FAILURES,
    SHAPES,
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
)
from qlite import nf4, ops

BLOCK = 64
#: Rows that are held against the reference: a whole number of groups of 256 absmax, whatever the layer.
CHECKED_ROWS = 256
QUICK = (("falcon7b", "query_key_value"), ("falcon7b", "dense_h_to_4h"))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def floor_us(out_features: int, in_features: int, double_quant: bool, itemsize: int, bandwidth: float) -> float:
    """Returns the least time to encode or decode a weight in us: its code and its dense form moved once."""
    return (coded_bytes(out_features, in_features, double_quant) + itemsize * out_features * in_features) / bandwidth * 1e6


def encode(weight: torch.Tensor, levels: torch.Tensor, double_quant: bool):
    """Returns the parts of a weight, by qlite's ops alone: no check of the arguments, which waits for the GPU."""
    codes, absmax = torch.ops.qlite.quantize_nf4(weight, levels, BLOCK)
    if not double_quant:
        return codes, absmax, None, None, levels
    return codes, *torch.ops.qlite.quantize_nf4_absmax(absmax), levels


def encode_searched(weight: torch.Tensor, levels: torch.Tensor, double_quant: bool):
    """Returns the parts of a weight whose scales are searched for, by qlite's ops alone."""
    absmax, scale, offset = torch.ops.qlite.search_nf4(weight, levels, BLOCK, None), None, None
    scales = absmax
    if double_quant:
        absmax, scale, offset = torch.ops.qlite.quantize_nf4_absmax(absmax)
        scales = nf4.dequantize_absmax(absmax, scale, offset)
    return torch.ops.qlite.encode_nf4(weight, scales, levels, BLOCK), absmax, scale, offset, levels


def decode(coded, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns the dense weight, by qlite's op."""
    return torch.ops.qlite.dequantize_nf4(*coded, in_features, BLOCK, dtype)


def decodes_exactly(coded, in_features: int, dtype: torch.dtype) -> bool:
    """Returns whether the first rows decode to the bits that the reference gives."""
    found = decode(coded, in_features, dtype)[:CHECKED_ROWS]
    codes, absmax, scale, offset, levels = coded
    blocks = absmax.shape[1]
    scale = None if scale is None else scale[: -(-CHECKED_ROWS * blocks // 256)]
    rows = (codes[:CHECKED_ROWS], absmax[:CHECKED_ROWS], scale, offset, levels)
    rows = [None if part is None else part.cpu() for part in rows]
    return torch.equal(found.cpu(), nf4.dequantize(*rows, in_features, BLOCK, dtype))


def encodes_exactly(weight: torch.Tensor, levels: torch.Tensor, double_quant: bool) -> bool:
    """Returns whether codes and absmax are the reference's, bit for bit."""
    codes, absmax = nf4.quantize(weight, levels, BLOCK)
    wanted = (codes, *(nf4.quantize_absmax(absmax) if double_quant else (absmax, None, None)))
    return equal(wanted, encode(weight, levels, double_quant))


def searches_exactly(weight: torch.Tensor, levels: torch.Tensor, double_quant: bool) -> bool:
    """Returns whether the first rows are encoded with searched scales as by the reference, bit for bit."""
    weight = weight[:CHECKED_ROWS]
    scales = nf4.search(weight, levels, BLOCK)
    coded = nf4.quantize_absmax(scales) if double_quant else (scales, None, None)
    wanted = (nf4.encode(weight, nf4.dequantize_absmax(*coded), levels, BLOCK), *coded)
    return equal(wanted, encode_searched(weight, levels, double_quant))


def equal(wanted, found) -> bool:
    """Returns whether the parts of a weight are the same, the table left out."""
    return all(w is f or torch.equal(w, f) for w, f in zip(wanted, found[:4], strict=True))


def timed(what: str, timer: Callable, calls: list[Callable]) -> float | None:
    """Returns the time of one of `calls` in us, None where they fail, which is printed."""
    try:
        return round(timer(calls), 1)
    except FAILURES as error:
        print(f"{what}: {told(error)}", flush=True)
        torch.cuda.synchronize()
        return None


def measure_layer(model: str, name: str, with_bitsandbytes: bool) -> list[dict]:
    """Returns the lines of one layer: decode to three dtypes and encode from bf16, with double quantization and without."""
    out_features, in_features = SHAPES[model][name]
    count = rotation(coded_bytes(out_features, in_features))
    levels = ops.levels_tensor(nf4.NF4_LEVELS, "cuda")
    dense = [random_bf16(out_features, in_features) for _ in range(min(count, rotation(2 * out_features * in_features)))]
    lines = []
    shape = {"model": model, "layer": name, "out_features": out_features, "in_features": in_features}
    for double_quant in (True, False):
        coded = coded_weights(out_features, in_features, count, double_quant)
        theirs = []
        if with_bitsandbytes:
            import bitsandbytes as bnb

            options = {"quant_type": "nf4", "compress_statistics": double_quant}
            theirs = [bnb.functional.quantize_4bit(dense[i % len(dense)], **options) for i in range(count)]
        for dtype in DTYPES:
            line = {**shape, "work": "dequantize", "dtype": str(dtype).removeprefix("torch."), "double_quant": double_quant}
            line["floor_us"] = floor_us(out_features, in_features, double_quant, dtype.itemsize, copy_bandwidth())
            line["correct"] = decodes_exactly(coded[0], in_features, dtype)
            nbytes = dtype.itemsize * out_features * in_features
            calls = keeping([functools.partial(decode, parts, in_features, dtype) for parts in coded], nbytes)
            line["qlite_us"] = timed("dequantize", cuda_graph_time, calls) if line["correct"] else None
            if theirs and dtype == torch.bfloat16:  # the dtype that was encoded
                calls = keeping([functools.partial(bnb.functional.dequantize_4bit, *pair) for pair in theirs], nbytes)
                line["bitsandbytes_us"] = timed("bitsandbytes dequantize", cuda_graph_time, calls)
            lines.append(line)
        encodings = {"quantize": (encode, encodes_exactly), "quantize, searched": (encode_searched, searches_exactly)}
        for work, (encoding, exactly) in encodings.items():
            line = {**shape, "work": work, "dtype": "bfloat16", "double_quant": double_quant}
            line["floor_us"] = floor_us(out_features, in_features, double_quant, 2, copy_bandwidth())
            line["correct"] = exactly(dense[0], levels, double_quant)
            calls = [functools.partial(encoding, weight, levels, double_quant) for weight in dense]
            line["qlite_us"] = timed(work, cuda_graph_time, calls) if line["correct"] else None
            lines.append(line)
        if with_bitsandbytes:
            calls = [functools.partial(bnb.functional.quantize_4bit, weight, **options) for weight in dense]
            lines[-2]["bitsandbytes_us"] = timed("bitsandbytes quantize", event_time, calls)
            lines[-2]["bitsandbytes_timer"] = "events"
    return lines


def shown(lines: list[dict]) -> str:
    """Returns the table of some lines."""
    header = ("layer", "shape", "work", "dtype", "double", "floor us", "qlite us", "of floor", "bitsandbytes us")
    rows = []
    for line in lines:
        us = line["qlite_us"]
        against = f"{us / line['floor_us']:.2f}" if us else ("-" if line["correct"] else "RED")
        cells = [f"{line['model']} {line['layer']}", f"{line['out_features']} x {line['in_features']}", line["work"]]
        cells += [line["dtype"], line["double_quant"], round(line["floor_us"], 1), us or "-", against]
        rows.append([*cells, line.get("bitsandbytes_us") or "-"])
    return table(header, rows)


def main() -> None:
    """Measures, records and prints all layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--commit", help="what to call the tree where it is no git checkout")
    options = parser.parse_args()
    need_gpu("nf4_codec")
    version = peer("bitsandbytes")
    print(f"copy {copy_bandwidth() / 1e12:.3f} TB/s; bitsandbytes {version or 'absent'}", flush=True)
    layers = QUICK if options.quick else [(model, name) for model, names in SHAPES.items() for name in names]
    lines: list[dict] = []
    with torch.inference_mode():
        for model, name in layers:
            found = measure_layer(model, name, version is not None)
            torch.cuda.empty_cache()
            for line in found:
                line = {**line, "floor_us": round(line["floor_us"], 2), "copy_tb_s": round(copy_bandwidth() / 1e12, 3)}
                note = {**line, "bitsandbytes_version": version, "timer": "cuda graph"}
                record("nf4_codec", note, commit=options.commit, show=False)
            lines += found
    print(shown(lines), flush=True)
    if not all(line["correct"] for line in lines):
        raise SystemExit("some results are wrong: RED above")


if __name__ == "__main__":
    main()

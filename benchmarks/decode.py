"""Generation by Falcon-7B in 4 bits: tokens a second by batch and prompt, with and without an adapter.

    python -m benchmarks.decode                     # batches of 1, 4, 16, 64, prompts of 64 and 1,024; a CUDA GPU, 2 minutes
    python -m benchmarks.decode --batches 1 --prompts 64 --profile    # and the kernels that take the time
    python -m benchmarks.decode --peers             # the same work by transformers, peft and bitsandbytes

Random weights in NF4 with double quantization, bfloat16 arithmetic, greedy; the adapter is LoRA r=16 on query_key_value, not
merged. A step is the time of an answer of 129 tokens less that of one of a single token, over 128, the median of three; both
have been generated before, so that the graph is there. The first token's time is that of an answer of one. The floor of a step
is what it has to read (encoded weights, the head) at the bandwidth of a copy in the same run, or the products of its rows at
the bf16 peak where they take longer; that of the first token the products of the prompt alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import qlite
from benchmarks import peer_falcon
from benchmarks.common import FAILURES, bf16_peak, copy_bandwidth, need_gpu, record, table, told
from benchmarks.falcon7b import CONFIGS, SHARED
from benchmarks.flops import weights_multiplied
from benchmarks.training_step import random_model

NEW = 129


def seconds_of(call: Callable[[], object], repeats: int = 3) -> float:
    """Returns the median time of a call that ends with a result on the host."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(config: qlite.FalconConfig, model: Any, batch: int, prompt: int, *, peer: bool) -> dict:
    """Returns the figures of one setting, for a Falcon of ours or the peers'."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(config.vocab_size, (batch, prompt), generator=generator).tolist()

    def answer(count: int) -> list[list[int]]:
        if peer:
            return peer_falcon.generate(model, rows, count)
        return qlite.generate(model, rows, max_new_tokens=count, eos_token_id=None)

    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    answer(NEW)
    cold = time.perf_counter() - start
    first, whole = seconds_of(lambda: answer(1)), seconds_of(lambda: answer(NEW), 1 if peer else 3)
    step = (whole - first) / (NEW - 1)
    read = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / copy_bandwidth()
    floor = max(read, 2 * weights_multiplied(config) * batch / bf16_peak())
    return {
        "batch": batch, "prompt": prompt, "ms_a_step": round(step * 1e3, 3), "floor_ms": round(floor * 1e3, 3),
        "tokens_per_second": round(batch / step, 1), "first_token_ms": round(first * 1e3, 2),
        "first_token_floor_ms": round(2e3 * weights_multiplied(config) * batch * prompt / bf16_peak(), 2),
        "cold_seconds": round(cold, 2), "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
    }  # fmt: skip


def profile(model: qlite.Falcon, batch: int, prompt: int) -> str:
    """Returns a table of the kernels of a step, longest first: us, launches."""
    rows = [[1] * prompt for _ in range(batch)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        qlite.generate(model, rows, max_new_tokens=NEW, eos_token_id=None)
    kernels = sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)
    whole = sum(event.device_time_total for event in kernels)
    lines = [(f"{whole / NEW:.1f}", "", "all, prefill included")]
    lines += [(f"{e.device_time_total / NEW:.1f}", f"{e.count / NEW:.1f}", e.key[:90]) for e in kernels[:25]]
    return table(("us a step", "launches", "kernel"), lines)


def main() -> None:
    """Measures the settings asked for, and records a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--batches", default="1,4,16,64")
    parser.add_argument("--prompts", default="64,1024")
    parser.add_argument("--peers", action="store_true", help="transformers + peft + bitsandbytes, and nothing else")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step of each setting")
    parser.add_argument("--commit", help="what to call this tree")
    options = parser.parse_args()
    need_gpu("decode")
    values = {**CONFIGS[options.model], **SHARED}
    if options.layers:
        values["num_hidden_layers"] = options.layers
    config = qlite.FalconConfig.from_dict(values)
    model: Any = None if options.peers else random_model(config)
    bf16_peak(), copy_bandwidth()
    found = []
    for adapter in (False, True):
        if options.peers:
            model = None  # before the next one is made
            model = peer_falcon.load(config, adapter=adapter)
        elif adapter:
            qlite.add_lora(model, qlite.LoRAConfig.qlora_2023(), seed=0)
        for batch in map(int, options.batches.split(",")):
            for prompt in map(int, options.prompts.split(",")):
                try:
                    row = {"adapter": adapter, **measure(config, model, batch, prompt, peer=options.peers)}
                    if options.peers:
                        row["peer"] = "transformers + peft + bitsandbytes"
                    record("decode", {"model": options.model, "layers": config.num_hidden_layers, **row}, commit=options.commit)
                    found.append(row)
                    if options.profile and not options.peers:
                        print(profile(model, batch, prompt), flush=True)
                except FAILURES as error:
                    print(f"batch {batch}, prompt {prompt}: {told(error)}", flush=True)
    shown = ("adapter", "batch", "prompt", "ms_a_step", "floor_ms", "tokens_per_second", "first_token_ms", "peak_gib")
    print(table(shown, [[row[key] for key in shown] for row in found]))


if __name__ == "__main__":
    main()

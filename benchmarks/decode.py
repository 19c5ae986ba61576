"""Generation by Falcon-7B in 4 bits: tokens a second by batch and prompt, with and without an adapter.

    python -m benchmarks.decode                     # batches of 1, 4, 16, 64, prompts of 64 and 1,024; a CUDA GPU, 2 minutes
    python -m benchmarks.decode --batches 1 --prompts 64 --profile    # and the kernels that take the time
    python -m benchmarks.decode --head int8         # with an encoded output layer, and what that costs in logits
    python -m benchmarks.decode --guesses 4         # one row, passes over guesses at the next tokens: their time
    python -m benchmarks.decode --peers             # the same work by transformers, peft and bitsandbytes
    python -m benchmarks.decode --tiny              # the tiny base that comes with the package; a CPU, a minute

Random weights in NF4 with double quantization, bfloat16 arithmetic, greedy; the adapter is LoRA r=16 on query_key_value, not
merged. A step is the time of an answer of 129 tokens less that of one of a single token, over 128, the median of three; both
have been generated before, so that the graph is there. The first token's time is that of an answer of one. The floor of a step
is what it has to read (encoded weights, the head) at the bandwidth of a copy in the same run, or the products of its rows at
the bf16 peak where they take longer; that of the first token the products of the prompt alone.

Recording is what an answer of three tokens takes more than one of two, neither of which has a recording yet: the third is its
first replay. Its memory is what the device has less of then, the driver's included.
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
from benchmarks.training_step import GIB, random_model
from qlite.data import ASSETS
from qlite.decoding import decoder, forget
from qlite.flags import HEADS
from qlite.generate import _Choice

NEW = 129
#: A prompt of the tiny base, and the tokens of an answer.
TINY_PROMPT, TINY_NEW = 32, 65


def seconds_of(call: Callable[[], object], repeats: int = 3) -> float:
    """Returns the median time of a call that ends with a result on the host."""
    times = []
    for _ in range(repeats):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def recording(model: qlite.Falcon, answer: Callable[[int], object]) -> dict:
    """Returns what recording the step of a setting takes: seconds, GiB."""
    seconds, free = [], []
    for count in (2, 3):
        forget(model)
        seconds.append(seconds_of(lambda count=count: answer(count), 1))
        free.append(torch.cuda.mem_get_info()[0])
    return {"capture_seconds": round(seconds[1] - seconds[0], 3), "capture_gib": round((free[0] - free[1]) / GIB, 3)}


def guessing(model: qlite.Falcon, prompt: int, guesses: int, passes: int = 128) -> dict:
    """Returns the time of a pass over guesses at the next tokens, beside that of a step of one token, for one row.

    How many guesses are right is a matter of the text, and a model of random weights has none.
    """
    ids = torch.randint(model.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(1))
    found = {}
    for count in (0, guesses):
        length = prompt + (passes + 16) * (1 + count)
        with torch.inference_mode(), decoder(model.eval(), 1, length, _Choice(0.0, None, None, 1.0), count) as steps:
            steps.prefill(ids, torch.ones_like(ids, dtype=torch.bool), 0)
            left = steps.chunk * (1 + count)  # of which it makes a chunk of passes; the first one records
            steps.steps(left)
            chunks = range(passes // steps.chunk)
            whole = seconds_of(lambda steps=steps, left=left, chunks=chunks: [steps.steps(left) for _ in chunks], 1)
        found[count] = whole / passes * 1e3
    return {"guesses": guesses, "ms_a_pass": round(found[guesses], 3), "ms_a_step_of_one": round(found[0], 3)}


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
    looked_up = 0 if peer or config.tie_word_embeddings else model.transformer.word_embeddings.weight.nbytes
    read = (sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - looked_up) / copy_bandwidth()
    floor = max(read, 2 * weights_multiplied(config) * batch / bf16_peak())
    return {
        "batch": batch, "prompt": prompt, "ms_a_step": round(step * 1e3, 3), "floor_ms": round(floor * 1e3, 3),
        "tokens_per_second": round(batch / step, 1), "first_token_ms": round(first * 1e3, 2),
        "first_token_floor_ms": round(2e3 * weights_multiplied(config) * batch * prompt / bf16_peak(), 2),
        "cold_seconds": round(cold, 2), "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        **({} if peer else recording(model, answer)),
    }  # fmt: skip


def tiny(commit: str | None) -> None:
    """Measures greedy answers of the tiny base on the CPU, dense and in 4 bits, one row and 16, with an adapter and without."""
    found = []
    for format, kind in (("float32", None), ("nf4", qlite.Linear4bit)):
        model = qlite.load_falcon(ASSETS / "tiny-falcon", quantize=kind, dtype=torch.float32)
        for adapter in (False, True):
            if adapter:
                qlite.add_lora(model, qlite.LoRAConfig(r=16), seed=0)
            for batch in (1, 16):
                shape = batch, TINY_PROMPT
                ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(1)).tolist()

                def answer(count: int, model=model, ids=ids) -> list[list[int]]:
                    return qlite.generate(model, ids, max_new_tokens=count, eos_token_id=None)

                answer(2)
                first, whole = (seconds_of(lambda count=count, answer=answer: answer(count)) for count in (1, TINY_NEW))
                step = (whole - first) / (TINY_NEW - 1)
                found.append({
                    "model": "tiny", "format": format, "adapter": adapter, "batch": batch, "prompt": TINY_PROMPT,
                    "ms_a_step": round(step * 1e3, 3), "tokens_per_second": round(batch / step, 1),
                    "first_token_ms": round(first * 1e3, 2), "threads": torch.get_num_threads(),
                })  # fmt: skip
                record("decode", found[-1], commit=commit)
    print(table(list(found[0]), [list(row.values()) for row in found]))


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


def settings(options: argparse.Namespace, config: qlite.FalconConfig, model: Any, adapter: bool) -> list[dict]:
    """Returns the figures of the settings asked for, of a model with or without an adapter; each is recorded."""
    found = []
    for batch in map(int, options.batches.split(",")):
        for prompt in map(int, options.prompts.split(",")):
            try:
                row = {"adapter": adapter, **measure(config, model, batch, prompt, peer=options.peers)}
                if options.peers:
                    row["peer"] = "transformers + peft + bitsandbytes"
                if options.head:
                    row["head"] = options.head
                record("decode", {"model": options.model, "layers": config.num_hidden_layers, **row}, commit=options.commit)
                found.append(row)
                if options.profile and not options.peers:
                    print(profile(model, batch, prompt), flush=True)
            except FAILURES as error:
                print(f"batch {batch}, prompt {prompt}: {told(error)}", flush=True)
    return found


def main() -> None:
    """Measures the settings asked for, and records a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--batches", default="1,4,16,64")
    parser.add_argument("--prompts", default="64,1024")
    parser.add_argument("--head", choices=HEADS, help="format of the output layer; 16 bits without")
    parser.add_argument("--guesses", type=int, help="passes over so many guesses, and nothing else")
    parser.add_argument("--peers", action="store_true", help="transformers + peft + bitsandbytes, and nothing else")
    parser.add_argument("--tiny", action="store_true", help="the tiny base on the CPU, and nothing else")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step of each setting")
    parser.add_argument("--commit", help="what to call this tree")
    options = parser.parse_args()
    if options.tiny:
        tiny(options.commit)
        return
    need_gpu("decode")
    values = {**CONFIGS[options.model], **SHARED}
    if options.layers:
        values["num_hidden_layers"] = options.layers
    config = qlite.FalconConfig.from_dict(values)
    model: Any = None if options.peers else random_model(config)
    if options.head:
        print(qlite.quantize_head(model, HEADS[options.head]), flush=True)
        config = model.config
    if options.guesses:
        for prompt in map(int, options.prompts.split(",")):
            row = {"model": options.model, "layers": config.num_hidden_layers, "prompt": prompt}
            record("decode", {**row, **guessing(model, prompt, options.guesses)}, commit=options.commit)
        return
    bf16_peak(), copy_bandwidth()
    found = []
    for adapter in (False, True):
        if options.peers:
            model = None  # before the next one is made
            model = peer_falcon.load(config, adapter=adapter)
        elif adapter:
            qlite.add_lora(model, qlite.LoRAConfig.qlora_2023(), seed=0)
        found += settings(options, config, model, adapter)
    shown = ["adapter", "batch", "prompt", "ms_a_step", "floor_ms", "tokens_per_second", "first_token_ms"]
    shown += ["first_token_floor_ms", "peak_gib", "capture_seconds", "capture_gib"]
    print(table(shown, [[row.get(key, "-") for key in shown] for row in found]))


if __name__ == "__main__":
    main()

"""A training step of Falcon-7B in 4 bits, by size of batch and by what gradient checkpointing keeps.

    python -m benchmarks.training_step                    # the sixteen settings; a CUDA GPU, 4 minutes
    python -m benchmarks.training_step --settings 1x512,4x2048 --profile   # and the kernels that take the time, in a file each
    python -m benchmarks.training_step --no-cuda-graphs   # every launch from Python
    python -m benchmarks.training_step --cap-gib 15       # as on a card of 15 GiB
    python -m benchmarks.training_step --model 40b --settings 1x512 --checkpointing full,offload
    python -m benchmarks.training_step --peers            # the same work by transformers, peft and bitsandbytes
    python -m benchmarks.training_step --plot step.png [--plot-only]

The model has random weights, encoded layer by layer on the GPU. A step is one of `qlite.finetune` with accumulate=1: forward
and backward of a batch whose tokens are all labelled, the gradient's norm, paged 8-bit AdamW; LoRA r=16, alpha 32, dropout
0.05 on query_key_value; NF4 with double quantization, bfloat16. The time of a step is the median from one request for a batch
to the next, for which the loss has come to the host.

Shares are of the bf16 peak, measured in the same run (cuBLAS, 8192 x 8192). flops.py tells "model", what any program has to
do, from "hardware", what is computed again and adapters included; both count attention, in GFLOP a token.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import statistics
import time

import torch

import qlite
from benchmarks import peer_falcon, step_plot
from benchmarks.common import FAILURES, RESULTS, bf16_peak, environment, need_gpu, record, table, told
from benchmarks.falcon7b import CONFIGS, SHARED
from benchmarks.flops import hardware_flops, model_flops
from qlite.data import Batch
from qlite.recompute import MODES

SETTINGS = ("1x512", "4x512", "1x2048", "4x2048")
GIB = 2**30


def random_model(config: qlite.FalconConfig) -> qlite.Falcon:
    """Returns a Falcon of random weights on the GPU in bfloat16, its blocks' linears in NF4 with double quantization."""
    model = qlite.Falcon(config, device="meta", dtype=torch.bfloat16).requires_grad_(False)
    qlite.quantize_model(model)
    model.to_empty(device="cuda")
    model.tie_weights()
    encoded = [module for module in model.modules() if isinstance(module, qlite.Linear4bit)]
    for module in encoded:
        dense = torch.randn(module.out_features, module.in_features, device="cuda", dtype=torch.bfloat16)
        module.quantize_(dense.mul_(0.02))
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.reset_parameters()
    torch.nn.init.normal_(model.transformer.word_embeddings.weight, std=0.02)
    if not config.tie_word_embeddings:
        torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    return model


class TimedBatches:
    """Batches of random tokens, all labelled; remembers when each was asked for.

    Args:
        vocab_size: of the tokens. rows, tokens: of a batch. count: batches.
    """

    def __init__(self, vocab_size: int, rows: int, tokens: int, count: int):
        generator = torch.Generator().manual_seed(1)
        ids = [torch.randint(vocab_size, (rows, tokens), generator=generator) for _ in range(count)]
        self.batches = [Batch(one, one, rows * (tokens - 1)) for one in ids]
        self.times: list[float] = []

    def __iter__(self):
        for batch in self.batches:
            self.times.append(time.perf_counter())
            yield batch

    def __len__(self) -> int:
        return len(self.batches)


def measure(model: qlite.Falcon, rows: int, tokens: int, steps: int, cuda_graphs: bool | None) -> dict:
    """Returns the figures of one setting."""
    optimizer = qlite.PagedAdamW8bit(qlite.lora_parameters(model), lr=2e-4)
    batches = TimedBatches(model.config.vocab_size, rows, tokens, steps + 3)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    result = qlite.finetune(model, batches, optimizer, steps=steps + 3, accumulate=1, progress=False, cuda_graphs=cuda_graphs)
    # The first runs as usual, the second is recorded; the third is left out too.
    times = [after - before for before, after in zip(batches.times[3:], batches.times[4:])]
    seconds = statistics.median(times)
    mode = model.gradient_checkpointing
    estimate = qlite.estimate(model.config, batch_size=rows, tokens=tokens, gradient_checkpointing=mode)
    step = {"model": model_flops(model.config, rows, tokens)}
    step["hardware"] = hardware_flops(model.config, rows, tokens, mode, qlite.LoRAConfig.qlora_2023())
    shares = {f"{kind}_share": round(flops / seconds / bf16_peak(), 3) for kind, flops in step.items()}
    return {
        "rows": rows, "tokens": tokens, "checkpointing": mode,
        "cuda_graphs": result.facts["cuda_graphs"], "steps": len(times),
        "ms": round(seconds * 1e3, 2), "slowest_ms": round(max(times) * 1e3, 2),
        "tokens_per_second": round(rows * tokens / seconds),
        **{f"{kind}_gflop": round(flops / rows / tokens / 1e9, 2) for kind, flops in step.items()},
        "bf16_peak_tflops": round(bf16_peak() / 1e12, 1), **shares,
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3), "estimate_gib": round(estimate.peak / GIB, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3), "host_gib": round(estimate.host / GIB, 3),
        "first_loss": round(result.losses[0], 4), "last_loss": round(result.losses[-1], 4),
    }  # fmt: skip


def profile(model: qlite.Falcon, rows: int, tokens: int, cuda_graphs: bool | None) -> str:
    """Returns a table of the kernels of one step, longest first: ms, launches, share of the step's kernels."""
    optimizer = qlite.PagedAdamW8bit(qlite.lora_parameters(model), lr=2e-4)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        batches = TimedBatches(model.config.vocab_size, rows, tokens, 6)
        qlite.finetune(model, batches, optimizer, steps=6, accumulate=1, progress=False, cuda_graphs=cuda_graphs)
    return kernel_table([(event.key, event.device_time_total / 6, event.count / 6) for event in profiler.key_averages()])


def kernel_table(kernels: list[tuple[str, float, float]], most: int = 40) -> str:
    """Returns the longest `most` of (name, us a step, launches a step) as a table, and the sum of all."""
    kernels = sorted(kernels, key=lambda kernel: -kernel[1])
    whole = sum(spent for _, spent, _ in kernels)
    lines = [(f"{whole / 1e3:.3f}", "", "100%", "all")]
    lines += [(f"{us / 1e3:.3f}", f"{count:.1f}", f"{us / whole:.1%}", name[:90]) for name, us, count in kernels[:most]]
    return table(("ms", "launches", "share", "kernel"), lines)


def write_profile(name: str, text: str, commit: str | None) -> None:
    """Prints a table of kernels and writes it, with the environment, to benchmarks/results/training_step_kernels/<name>.txt."""
    folder = RESULTS / "training_step_kernels"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(f"{json.dumps(environment(commit))}\n\n{text}\n")
    print(f"{name}\n{text}", flush=True)


def measure_peers(config: qlite.FalconConfig, options: argparse.Namespace) -> None:
    """Records a row for each setting, of the peers."""
    model = peer_falcon.load(config)
    for name in options.checkpointing:
        checkpointing = MODES[name]
        if not isinstance(checkpointing, bool):
            continue  # the peers have no such way
        for setting in options.settings:
            rows, tokens = (int(part) for part in setting.split("x"))
            row = {"model": options.model, "layers": config.num_hidden_layers, "rows": rows, "tokens": tokens}
            row |= {"checkpointing": checkpointing, "peer": "transformers + peft + bitsandbytes"}
            try:
                times, peak = peer_falcon.step_seconds(model, rows, tokens, options.steps, checkpointing=checkpointing)
            except FAILURES as error:
                print(f"{setting}, checkpointing {checkpointing}: {told(error)}", flush=True)
                continue
            seconds = statistics.median(times)
            row |= {"ms": round(seconds * 1e3, 2), "slowest_ms": round(max(times) * 1e3, 2), "steps": len(times)}
            row |= {"tokens_per_second": round(rows * tokens / seconds), "peak_gib": round(peak / GIB, 3)}
            record("training_step", row, commit=options.commit)


def arguments() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="rows x tokens, joined by commas")
    parser.add_argument("--checkpointing", default=",".join(MODES), help=f"of {', '.join(MODES)}, joined by commas")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--cap-gib", type=float, help="GiB of the card that may be used, by PyTorch")
    parser.add_argument("--no-cuda-graphs", action="store_true")
    parser.add_argument("--peers", action="store_true", help="transformers + peft + bitsandbytes, and nothing else")
    parser.add_argument("--profile", action="store_true", help="print and write the kernels of a step of each setting")
    parser.add_argument("--plot", type=pathlib.Path, metavar="PNG", help="draw tokens a second and memory, the peers' too")
    parser.add_argument("--plot-only", action="store_true", help="draw the results that are there; needs no GPU")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS / "training_step.jsonl", help="what to draw")
    parser.add_argument("--device", help="whose results to draw; that of the last line, if not given")
    parser.add_argument("--commit", help="what to call this tree")
    options = parser.parse_args()
    options.settings, options.checkpointing = options.settings.split(","), options.checkpointing.split(",")
    if unknown := set(options.checkpointing) - MODES.keys():
        parser.error(f"--checkpointing: {', '.join(sorted(unknown))}; there are {', '.join(MODES)}")
    if options.plot_only and not options.plot:
        parser.error("--plot-only needs --plot PNG")
    return options


def measure_all(config: qlite.FalconConfig, options: argparse.Namespace) -> list[dict]:
    """Returns the rows of the settings asked for, each recorded; a setting that fails is told and left out."""
    model = random_model(config)
    print(qlite.add_lora(model, qlite.LoRAConfig.qlora_2023(), seed=0))
    bf16_peak()
    rows = []
    cuda_graphs = False if options.no_cuda_graphs else None
    for name in options.checkpointing:
        model.gradient_checkpointing = MODES[name]
        for setting in options.settings:
            batch, tokens = (int(part) for part in setting.split("x"))
            try:
                row = measure(model, batch, tokens, options.steps, cuda_graphs)
                head = {"model": options.model, "layers": config.num_hidden_layers, "cap_gib": options.cap_gib}
                record("training_step", {**head, **row}, commit=options.commit)
                rows.append(row)
                if options.profile:
                    text = profile(model, batch, tokens, cuda_graphs)
                    write_profile(f"{options.model}-{setting}-{name}", text, options.commit)
            except FAILURES as error:
                print(f"{setting}, checkpointing {name}: {told(error)}", flush=True)
    return rows


SHOWN = ("rows", "tokens", "checkpointing", "ms", "tokens_per_second", "model_gflop", "hardware_gflop")
SHOWN += ("model_share", "hardware_share", "peak_gib", "estimate_gib", "host_gib")


def main() -> None:
    """Measures the settings asked for, and records a row each; draws them."""
    options = arguments()
    if not options.plot_only:
        need_gpu("training_step")
        if options.cap_gib:
            torch.cuda.set_per_process_memory_fraction(options.cap_gib * GIB / torch.cuda.mem_get_info()[1])
        values = {**CONFIGS[options.model], **SHARED}
        if options.layers:
            values["num_hidden_layers"] = options.layers
        config = qlite.FalconConfig.from_dict(values)
        if options.peers:
            measure_peers(config, options)
        else:
            print(table(SHOWN, [[row[key] for key in SHOWN] for row in measure_all(config, options)]))
    if options.plot:
        lines = [json.loads(line) for line in options.results.read_text().splitlines()]
        step_plot.draw([line for line in lines if line["model"] == options.model], options.plot, options.device)


if __name__ == "__main__":
    main()

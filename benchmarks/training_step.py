"""A training step of Falcon-7B in 4 bits, by size of batch and with and without gradient checkpointing.

    python -m benchmarks.training_step                    # the eight settings; a CUDA GPU, 2 minutes
    python -m benchmarks.training_step --settings 1x512,4x2048 --profile   # and the kernels that take the time
    python -m benchmarks.training_step --no-cuda-graphs   # every launch from Python
    python -m benchmarks.training_step --cap-gib 15       # as on a card of 15 GiB
    python -m benchmarks.training_step --model 40b --settings 1x512 --checkpointing yes
    python -m benchmarks.training_step --peers            # the same work by transformers, peft and bitsandbytes

The model has random weights, encoded layer by layer on the GPU. A step is one of `qlite.finetune` with accumulate=1: forward
and backward of a batch whose tokens are all labelled, the gradient's norm, paged 8-bit AdamW; LoRA r=16, alpha 32, dropout
0.05 on query_key_value; NF4 with double quantization, bfloat16. The time of a step is the median from one request for a batch
to the next, for which the loss has come to the host.

Shares of the bf16 peak, measured in the same run (cuBLAS, 8192 x 8192): "model" counts the two products that forward and the
input's gradient need a weight, "hardware" the third of gradient checkpointing too; both without attention and adapters.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import torch

import qlite
from benchmarks import peer_falcon
from benchmarks.common import FAILURES, bf16_peak, need_gpu, record, table, told
from benchmarks.falcon7b import CONFIGS, SHARED
from qlite.data import Batch

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


def products(config: qlite.FalconConfig) -> int:
    """Returns the weights that a token is multiplied by: those of the blocks, and of the head."""
    fused = (config.num_attention_heads + 2 * config.kv_heads) * config.head_dim
    block = config.hidden_size * (fused + config.hidden_size + 2 * config.ffn)
    return config.num_hidden_layers * block + config.vocab_size * config.hidden_size


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
    passes = 3 if model.gradient_checkpointing else 2
    flops = 2 * products(model.config) * rows * tokens / seconds
    estimate = qlite.estimate(model.config, batch_size=rows, tokens=tokens, gradient_checkpointing=model.gradient_checkpointing)
    return {
        "rows": rows, "tokens": tokens, "checkpointing": model.gradient_checkpointing,
        "cuda_graphs": result.facts["cuda_graphs"], "steps": len(times),
        "ms": round(seconds * 1e3, 2), "slowest_ms": round(max(times) * 1e3, 2),
        "tokens_per_second": round(rows * tokens / seconds),
        "model_share": round(2 * flops / bf16_peak(), 3), "hardware_share": round(passes * flops / bf16_peak(), 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3), "estimate_gib": round(estimate.peak / GIB, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
        "first_loss": round(result.losses[0], 4), "last_loss": round(result.losses[-1], 4),
    }  # fmt: skip


def profile(model: qlite.Falcon, rows: int, tokens: int, cuda_graphs: bool | None) -> str:
    """Returns a table of the kernels of one step, longest first: ms, launches, share of the step's kernels."""
    optimizer = qlite.PagedAdamW8bit(qlite.lora_parameters(model), lr=2e-4)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        batches = TimedBatches(model.config.vocab_size, rows, tokens, 6)
        qlite.finetune(model, batches, optimizer, steps=6, accumulate=1, progress=False, cuda_graphs=cuda_graphs)
    kernels = sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)
    whole = sum(event.device_time_total for event in kernels)
    lines = [(f"{whole / 6e3:.3f}", "", "100%", "all")]
    for event in kernels[:40]:
        spent = event.device_time_total
        lines.append((f"{spent / 6e3:.3f}", f"{event.count / 6:.1f}", f"{spent / whole:.1%}", event.key[:90]))
    return table(("ms", "launches", "share", "kernel"), lines)


def measure_peers(config: qlite.FalconConfig, options: argparse.Namespace) -> None:
    """Records a row for each setting, of the peers."""
    model = peer_falcon.load(config)
    for checkpointing in {"both": (True, False), "yes": (True,), "no": (False,)}[options.checkpointing]:
        for setting in options.settings.split(","):
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


def main() -> None:
    """Measures the settings asked for, and records a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="rows x tokens, joined by commas")
    parser.add_argument("--checkpointing", choices=("both", "yes", "no"), default="both")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--cap-gib", type=float, help="GiB of the card that may be used, by PyTorch")
    parser.add_argument("--no-cuda-graphs", action="store_true")
    parser.add_argument("--peers", action="store_true", help="transformers + peft + bitsandbytes too, and nothing else")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step of each setting")
    parser.add_argument("--commit", help="what to call this tree")
    options = parser.parse_args()
    need_gpu("training_step")
    if options.cap_gib:
        torch.cuda.set_per_process_memory_fraction(options.cap_gib * GIB / torch.cuda.mem_get_info()[1])
    values = {**CONFIGS[options.model], **SHARED}
    if options.layers:
        values["num_hidden_layers"] = options.layers
    config = qlite.FalconConfig.from_dict(values)
    if options.peers:
        measure_peers(config, options)
        return
    model = random_model(config)
    print(qlite.add_lora(model, qlite.LoRAConfig.qlora_2023(), seed=0))
    bf16_peak()
    rows = []
    cuda_graphs = False if options.no_cuda_graphs else None
    for checkpointing in {"both": (True, False), "yes": (True,), "no": (False,)}[options.checkpointing]:
        model.gradient_checkpointing = checkpointing
        for setting in options.settings.split(","):
            batch, tokens = (int(part) for part in setting.split("x"))
            try:
                row = measure(model, batch, tokens, options.steps, cuda_graphs)
                record(
                    "training_step",
                    {"model": options.model, "layers": config.num_hidden_layers, "cap_gib": options.cap_gib, **row},
                    commit=options.commit,
                )
                rows.append(row)
                if options.profile:
                    print(profile(model, batch, tokens, cuda_graphs), flush=True)
            except FAILURES as error:
                print(f"{setting}, checkpointing {checkpointing}: {told(error)}", flush=True)
    shown = ("rows", "tokens", "checkpointing", "ms", "tokens_per_second", "hardware_share", "peak_gib", "estimate_gib")
    print(table(shown, [[row[key] for key in shown] for row in rows]))


if __name__ == "__main__":
    main()

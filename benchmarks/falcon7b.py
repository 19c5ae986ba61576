"""The main job at full size: a Falcon of random weights, from a sharded bf16 checkpoint to a reloaded adapter.

    python -m benchmarks.falcon7b                       # Falcon-7B, 32 layers; needs 15 GB of disk and a CUDA GPU
    python -m benchmarks.falcon7b --model 40b --layers 6    # the grouped-heads layout, as many layers as disk allows

It writes the checkpoint in the hub's layout, loads it with NF4 and double quantization, trains the tutorial's recipe (LoRA
r=16, alpha=32, dropout 0.05 on query_key_value; paged 8-bit AdamW; lr 2e-4, cosine, 5 % warm-up; batch 1 x accumulation 4
of 512 tokens; gradient checkpointing), saves the adapter, and in a fresh process loads base and adapter again and compares
generated tokens. Each stage is a process of its own, so that peaks of host memory mean something.

Peaks: GPU is torch.cuda.max_memory_allocated; host is VmHWM above VmRSS after importing torch and starting CUDA.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import time

import torch
from safetensors.torch import save_file

import qlite
from benchmarks.common import host_memory, record
from qlite.falcon import Falcon, FalconConfig

CONFIGS = {
    "7b": {"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71},
    "40b": {
        "model_type": "falcon", "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128,
        "num_kv_heads": 8, "new_decoder_architecture": True,
    },
}  # fmt: skip
SHARED = {"vocab_size": 65024, "bias": False, "alibi": False, "multi_query": True, "parallel_attn": True}
TOKENS = 512
GIB = 2**30
PROMPT = list(range(100, 164))
#: What Falcon-7B may take, GiB: on the GPU once loaded and in training, on the host beyond the interpreter while it loads.
MOST_GIB = {"loaded_gpu_gib": 4.6, "train_gpu_peak_gib": 6.0, "load_host_peak_gib": 3.0}


def write_checkpoint(folder: pathlib.Path, config: FalconConfig, shard_bytes: int = 2 * 10**9) -> int:
    """Writes a bf16 checkpoint of random weights, sharded, with config.json and index; returns its bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    shapes = {name: p.shape for name, p in Falcon(config, device="meta").named_parameters()}
    generator = torch.Generator("cuda").manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled, total, weight_map = 0, 0, {}
    names = list(shapes)
    count = 1 + sum(s.numel() * 2 for s in shapes.values()) // shard_bytes

    def flush() -> None:
        file = f"model-{len(shards):05d}-of-{count:05d}.safetensors"
        save_file(shards[-1], folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shards[-1], file))
        shards[-1] = {}

    for name in names:
        shape = shapes[name]
        values = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) * 0.02
        if "ln_" in name or "norm" in name:
            values = torch.ones_like(values) if name.endswith("weight") else torch.zeros_like(values)
        size = values.numel() * 2
        if filled and filled + size > shard_bytes and len(shards) < count:
            flush()
            shards.append({})
            filled = 0
        shards[-1][name] = values.cpu()
        filled, total = filled + size, total + size
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


class RandomBatches:
    """Batches of random tokens in the form that finetune reads; half of each row is labelled."""

    def __init__(self, vocab_size: int, count: int):
        generator = torch.Generator().manual_seed(1)
        self.batches = []
        for _ in range(count):
            ids = torch.randint(vocab_size, (1, TOKENS), generator=generator)
            labels = ids.clone()
            labels[:, : TOKENS // 2] = -100
            self.batches.append(qlite.data.Batch(ids, labels, TOKENS // 2))

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def load(folder: pathlib.Path) -> tuple[Falcon, dict]:
    """Loads the base in 4 bits; returns it with time and peaks."""
    torch.zeros(1, device="cuda")
    before = host_memory("VmRSS")
    start = time.perf_counter()
    model = qlite.load_falcon(folder, quantize=qlite.Linear4bit, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    figures = {
        "load_seconds": round(time.perf_counter() - start, 2),
        "load_host_peak_gib": round((host_memory("VmHWM") - before) / GIB, 2),
        "load_gpu_peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "loaded_gpu_gib": round(torch.cuda.memory_allocated() / GIB, 3),
    }
    return model, figures


def train(folder: pathlib.Path, adapter: pathlib.Path, steps: int) -> dict:
    """Stage: load, train, save the adapter, generate; returns the figures."""
    model, figures = load(folder)
    report = qlite.add_lora(model, qlite.LoRAConfig.qlora_2023(), seed=0)
    print(report)
    optimizer = qlite.PagedAdamW8bit(qlite.lora_parameters(model), lr=2e-4)
    model.gradient_checkpointing = True
    batches = RandomBatches(model.config.vocab_size, 4 * steps)
    qlite.finetune(model, batches, optimizer, steps=1, accumulate=4, progress=False)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = qlite.finetune(model, batches, optimizer, steps=steps, accumulate=4, schedule="cosine", warmup=0.05)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    figures |= {
        "trainable": report.trainable,
        "parameters": report.total,
        "steps": steps,
        "first_loss": round(result.losses[0], 4),
        "last_loss": round(result.losses[-1], 4),
        "train_gpu_peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "seconds_per_step_of_4x512": round(seconds / steps, 3),
        "tokens_per_second": round(steps * 4 * TOKENS / seconds),
        "paged_mb": round(optimizer.paged_bytes / 1e6, 2),
    }
    qlite.save_adapter(model, adapter)
    figures["adapter_mb"] = round((adapter / "adapter_model.safetensors").stat().st_size / 1e6, 2)
    start = time.perf_counter()
    figures["tokens"] = qlite.generate(model, PROMPT, max_new_tokens=32, eos_token_id=None)
    figures["generate_tokens_per_second"] = round(32 / (time.perf_counter() - start), 1)
    return figures


def reload(folder: pathlib.Path, adapter: pathlib.Path) -> list[int]:
    """Stage: a fresh process loads base and adapter and generates; returns the tokens."""
    model, _ = load(folder)
    qlite.load_adapter(model, adapter)
    return qlite.generate(model, PROMPT, max_new_tokens=32, eos_token_id=None)


def stage(arguments: list[str]) -> object:
    """Runs a stage in a process of its own and returns the JSON of its last line."""
    command = [sys.executable, "-m", "benchmarks.falcon7b", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout[: done.stdout.rstrip().rfind("\n") + 1], end="")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Runs all stages and records one row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/falcon7b"))
    parser.add_argument("--stage", choices=("train", "reload"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    config = {**CONFIGS[options.model], **SHARED}
    if options.layers:
        config["num_hidden_layers"] = options.layers
    base = options.folder / f"falcon-{options.model}-{config['num_hidden_layers']}-layers"
    adapter = options.folder / f"adapter-{options.model}"
    if options.stage == "train":
        print("\n" + json.dumps(train(base, adapter, options.steps)))
        return
    if options.stage == "reload":
        print("\n" + json.dumps(reload(base, adapter)))
        return
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.falcon7b: needs a CUDA GPU")
    start = time.perf_counter()
    size = write_checkpoint(base, FalconConfig.from_dict(config)) if not base.exists() else 0
    print(f"wrote {size / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s", flush=True)
    common = ["--model", options.model, "--folder", str(options.folder), "--steps", str(options.steps)]
    common += ["--layers", str(config["num_hidden_layers"])]
    row = stage([*common, "--stage", "train"])
    assert isinstance(row, dict)
    tokens = row.pop("tokens")
    same = stage([*common, "--stage", "reload"]) == tokens
    record("falcon7b", {"model": options.model, "layers": config["num_hidden_layers"], **row, "reloaded_same": same})
    if not same:
        raise SystemExit("the reloaded adapter generated other tokens")
    over = [
        f"{key} is {row[key]}, more than {most}" for key, most in MOST_GIB.items() if options.model == "7b" and row[key] > most
    ]
    if over:
        raise SystemExit("; ".join(over))


if __name__ == "__main__":
    main()

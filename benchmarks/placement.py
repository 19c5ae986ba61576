"""A training step of a Falcon whose blocks live in host memory, beside the same step with all of it on the GPU.

    python -m benchmarks.placement                  # Falcon-7B, 1 row of 512 and of 2,048 tokens; a CUDA GPU, 2 minutes
    python -m benchmarks.placement --model 40b --layers 8

Random weights in NF4 with double quantization, bfloat16 arithmetic, LoRA r=16 on all layers, gradient checkpointing: a step
asks for each weight three times. Three rows a setting: all of it resident; the blocks at home on the CPU and the next layer
copied while this one computes; and the same with copies only when they are asked for. The floor of a streamed step is the
larger of the resident step and of its bytes at the bandwidth of a copy of 256 MiB from pinned memory, in the same run. Before a
number, one step is compared with the resident model's: the loss bit for bit, the gradients within 1 % of their norm (torch's
attention adds some of its gradient in no fixed order).
"""

from __future__ import annotations

import argparse
import copy
from typing import Any
from unittest import mock

import torch

import qlite
from benchmarks.common import FAILURES, event_time, need_gpu, record, table, told
from benchmarks.falcon7b import CONFIGS, SHARED
from benchmarks.training_step import random_model
from qlite.prefetch import Prefetch

ROWS = 1


def host_bandwidth() -> float:
    """Returns what a copy from pinned memory to the GPU reaches, in bytes a second."""
    source = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    return source.nbytes / (event_time([lambda: target.copy_(source, non_blocking=True)]) * 1e-6)


def step(model: qlite.Falcon, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Returns the loss of one forward and backward pass, and the adapters' gradients."""
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in qlite.lora_parameters(model)]


def measure(model: qlite.Falcon, ids: torch.Tensor, wanted: tuple[torch.Tensor, list[Any]]) -> dict[str, float]:
    """Returns time and peak of a step, after one whose numbers are those of `wanted`."""
    loss, gradients = step(model, ids)
    assert torch.equal(loss, wanted[0]), f"the loss is {loss.item()}, that of the resident model {wanted[0].item()}"
    for found, resident in zip(gradients, wanted[1]):
        assert (found - resident).norm() <= 0.01 * resident.norm(), "another gradient than that of the resident model"
    del loss, gradients
    torch.cuda.reset_peak_memory_stats()
    time = event_time([lambda: step(model, ids)], repeats=5)
    return {"ms_a_step": round(time / 1e3, 1), "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3)}


def main() -> None:
    """Measures the three homes of each length, and records a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--tokens", default="512,2048")
    parser.add_argument("--commit", help="what to call this tree")
    options = parser.parse_args()
    need_gpu("placement")
    values = {**CONFIGS[options.model], **SHARED}
    values["num_hidden_layers"] = options.layers or values["num_hidden_layers"]
    resident = random_model(qlite.FalconConfig.from_dict(values))
    qlite.add_lora(resident, qlite.LoRAConfig(dropout=0.0), seed=0)
    resident.gradient_checkpointing = True
    bandwidth, found = host_bandwidth(), []
    for tokens in map(int, options.tokens.split(",")):
        ids = torch.randint(values["vocab_size"], (ROWS, tokens), generator=torch.Generator().manual_seed(1)).cuda()
        try:
            qlite.place_model(resident.train(), {"": "cuda"}, compute="cuda")
            wanted = copy.deepcopy(step(resident, ids))
            rows = [{"blocks": "resident", **measure(resident, ids, wanted)}]
            placed = qlite.place_model(resident, {"": "cuda", "transformer.h": "cpu"}, compute="cuda")
            moved = 3 * sum(placed.streamed.values())
            floor = round(max(rows[0]["ms_a_step"], 1e3 * moved / bandwidth), 1)
            rows.append({"blocks": "streamed, next copied ahead", "floor_ms": floor, **measure(resident, ids, wanted)})
            with mock.patch.object(Prefetch, "_look_ahead"):
                rows.append({"blocks": "streamed, copied when asked for", "floor_ms": floor, **measure(resident, ids, wanted)})
        except FAILURES as error:
            print(f"{tokens} tokens: {told(error)}", flush=True)
            continue
        for row in rows:
            row = {"model": options.model, "layers": values["num_hidden_layers"], "rows": ROWS, "tokens": tokens, **row,
                   "host_gb_per_second": round(bandwidth / 1e9, 1)}  # fmt: skip
            record("placement", row, commit=options.commit)
            found.append(row)
    shown = ("tokens", "blocks", "ms_a_step", "floor_ms", "peak_gib")
    print(table(shown, [[row.get(key, "") for key in shown] for row in found]))


if __name__ == "__main__":
    main()

"""Falcon as transformers, peft and bitsandbytes have it: the same sizes, random weights, NF4 with double quantization, LoRA.

The linears are replaced by hand: transformers finds no Linear in its Falcon, whose layers are of a class of their own.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

import qlite


def load(config: qlite.FalconConfig, *, adapter: bool = True) -> Any:
    """Returns the model on the GPU in bfloat16, its blocks' linears of bitsandbytes; with LoRA as the tutorial has it."""
    import bitsandbytes as bnb
    import transformers

    values = {**config.to_dict(), "torch_dtype": "bfloat16"}
    values.pop("model_type", None)
    theirs = transformers.FalconConfig(**values)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = transformers.FalconForCausalLM(theirs)
    finally:
        torch.set_default_dtype(default)
    for block in model.transformer.h:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, _encoded(bnb, module))
    materialise(model)
    if not adapter:
        return model
    import peft

    lora = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["query_key_value"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model.requires_grad_(False), lora)


def _encoded(bnb: Any, module: nn.Linear) -> nn.Module:
    layer = bnb.nn.Linear4bit(
        module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    weight = torch.randn(module.out_features, module.in_features, device="cuda", dtype=torch.bfloat16).mul_(0.02)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4").to("cuda")
    return layer


def materialise(model: nn.Module) -> None:
    """Gives every tensor that is still on meta a random value on the GPU; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.device.type == "meta":
                if id(parameter) not in made:
                    value = torch.randn(parameter.shape, device="cuda", dtype=torch.bfloat16).mul_(0.02)
                    value = torch.ones_like(value) if isinstance(module, nn.LayerNorm) and name == "weight" else value
                    made[id(parameter)] = nn.Parameter(value, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.device.type == "meta":
                # Of all buffers the model has the inverse frequencies of its positions alone.
                size = 2 * buffer.numel()
                module._buffers[name] = 1.0 / 10000.0 ** (torch.arange(0, size, 2, device="cuda").float() / size)


def step_seconds(model: Any, rows: int, tokens: int, steps: int, *, checkpointing: bool) -> tuple[list[float], int]:
    """Returns the time of each of `steps` steps, as transformers' Trainer takes them, and the peak of GPU memory in bytes."""
    import bitsandbytes as bnb

    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    else:
        model.gradient_checkpointing_disable()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = bnb.optim.PagedAdamW8bit(trained, lr=2e-4, weight_decay=0.0)
    vocabulary = model.config.vocab_size
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps + 2):
        ids = torch.randint(vocabulary, (rows, tokens)).cuda()
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[2:], torch.cuda.max_memory_allocated()


def generate(model: Any, rows: list[list[int]], count: int) -> list[list[int]]:
    """Returns `count` greedy tokens a row."""
    ids = torch.tensor(rows, device="cuda")
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        found = model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return found[:, ids.shape[1] :].tolist()

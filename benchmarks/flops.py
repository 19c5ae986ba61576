"""The products of a training step, in floating-point operations, told apart: those of the model, and those that a GPU makes.

    python -m benchmarks.flops                    # Falcon-7B: what each way to checkpoint keeps and computes; no GPU, a minute
    python -m benchmarks.flops --model 40b --settings 1x512

"Model" is what any program has to do: a token is multiplied by every frozen weight forward and for the gradient of its input,
and attention makes two products forward and four backward, of the half that a causal mask leaves. "Hardware" is what runs: what
is computed again for the backward pass, flash attention's fifth product backward, the adapters. It is counted, not derived:
the step runs on the meta device, with the same autograd, and a dispatch mode adds up the products that it makes. So it can be
a little less than "model": the first block's input needs no gradient.

Not counted: what is no product (norms, GELU, decoding, softmax, the optimizer).
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import qlite
from benchmarks.common import table
from benchmarks.falcon7b import CONFIGS, SHARED
from qlite.graphs import StepGraphs
from qlite.recompute import MODES

#: Where the left factor is among the arguments; the right one is as wide as the result.
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1}
PRODUCTS |= {f"qlite::linear_{kind}{pass_}": 0 for kind in ("nf4", "int8") for pass_ in ("", "_grad")}


def weights_multiplied(config: qlite.FalconConfig) -> int:
    """Returns the weights that a token is multiplied by: those of the blocks, and of the head."""
    fused = (config.num_attention_heads + 2 * config.kv_heads) * config.head_dim
    block = config.hidden_size * (fused + config.hidden_size + 2 * config.ffn)
    return config.num_hidden_layers * block + config.vocab_size * config.hidden_size


def attention_flops(rows: int, heads: int, tokens: int, size: int) -> int:
    """Returns the operations of attention forward: scores and weighted values, each of half a square."""
    return 2 * (2 * rows * heads * tokens * tokens * size) // 2


def model_flops(config: qlite.FalconConfig, rows: int, tokens: int) -> int:
    """Returns what a step has to do, the loss of all tokens included."""
    attention = attention_flops(rows, config.num_attention_heads, tokens, config.head_dim)
    return 2 * 2 * weights_multiplied(config) * rows * tokens + 3 * attention * config.num_hidden_layers


class Products(TorchDispatchMode):
    """Adds up the operations of the products that are made while it is on, and of attention by `attend`."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        at = PRODUCTS.get(func._schema.name)
        if at is not None:
            self.flops += 2 * args[at].numel() * result.shape[-1]
        return result

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Takes the place of a Falcon's: causal attention of shapes alone."""
        return _Attention.apply(query, key, value, self)  # type: ignore[return-value]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, products: Products) -> Tensor:
        ctx.products, ctx.forward_flops = products, attention_flops(*query.shape)
        products.flops += ctx.forward_flops
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.products.flops += ctx.forward_flops * 5 // 2
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def hardware_flops(
    config: qlite.FalconConfig, rows: int, tokens: int, gradient_checkpointing: bool | str, lora: qlite.LoRAConfig
) -> int:
    """Returns what a recorded step of a 4-bit Falcon makes, the loss of all tokens included."""
    model = qlite.Falcon(config, device="meta", dtype=torch.bfloat16).requires_grad_(False)
    qlite.quantize_model(model)
    qlite.add_lora(model, lora)
    model.gradient_checkpointing = gradient_checkpointing
    products, ids = Products(), torch.zeros(rows, tokens, dtype=torch.int64, device="meta")
    for block in model.transformer.h:
        block.self_attention.attend = products.attend  # type: ignore[union-attr]
    with StepGraphs(model.train(), qlite.lora_parameters(model)) as steps, products:
        steps.run(ids, ids.flatten())
    return products.flops


def kept_bytes(config: qlite.FalconConfig, rows: int, tokens: int, mode: bool | str) -> float:
    """Returns what a block more takes of GPU memory at the peak of a step, in bytes a token."""
    few, many = (
        qlite.estimate(
            dataclasses.replace(config, num_hidden_layers=layers), lora=qlite.LoRAConfig.qlora_2023(), batch_size=rows,
            tokens=tokens, gradient_checkpointing=mode,
        ).activations
        for layers in (4, 12)
    )  # fmt: skip
    return (many - few) / 8 / rows / tokens


def costs(config: qlite.FalconConfig, rows: int, tokens: int, mode: bool | str) -> tuple[str, ...]:
    """Returns bytes a token and block, GiB on the GPU and on the host, and GFLOP a token: the model's, those made."""
    lora = qlite.LoRAConfig.qlora_2023()
    found = qlite.estimate(config, lora=lora, batch_size=rows, tokens=tokens, gradient_checkpointing=mode)
    step = model_flops(config, rows, tokens), hardware_flops(config, rows, tokens, mode, lora)
    memory = f"{found.peak / 2**30:.2f}", f"{found.host / 2**30:.2f}"
    return f"{kept_bytes(config, rows, tokens, mode):,.0f}", *memory, *(f"{one / rows / tokens / 1e9:.2f}" for one in step)


def main() -> None:
    """Prints what each way to checkpoint costs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="7b")
    parser.add_argument("--settings", default="1x512,4x2048", help="rows x tokens, joined by commas")
    options = parser.parse_args()
    config = qlite.FalconConfig.from_dict({**CONFIGS[options.model], **SHARED})
    lines = []
    for setting in options.settings.split(","):
        rows, tokens = (int(part) for part in setting.split("x"))
        lines += [(setting, name, *costs(config, rows, tokens, mode)) for name, mode in MODES.items()]
    head = ("batch", "checkpointing", "bytes/token/block", "GPU GiB", "host GiB", "model GFLOP/token", "made GFLOP/token")
    print(table(head, lines))


if __name__ == "__main__":
    main()

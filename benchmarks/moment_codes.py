"""What 8-bit moments do to an AdamW update, by the code of the second moment: in PyTorch, beside float32 moments.

    python -m benchmarks.moment_codes    # a CPU, two minutes

Float32 AdamW makes the steps. Each code follows with moments of its own, from the same gradients, by the rule of
qlite/adamw_8bit.py: decoded moments take the gradient in, the update is computed from them, and they are encoded again, in
blocks of 256. The first moment is in dynamic 8 bits (qlite/dynamic8.py), unless "float32" says otherwise; the second in

    dynamic v    dynamic 8 bits of v: what AdamW8bit does.
    sqrt v       dynamic 8 bits of the root of v.
    log v, n     255 levels at equal ratios, from the block's largest v down to 2^-n of it, and zero.

A v above zero never gets the code of zero, and an update is bounded, as there. Gradients: "log-normal", of 32,768 parameters
whose normal noise has a log-normal spread (sigma 1), 400 steps; "adapter", of LoRA on the tiny base that learns the FAQ by
the tutorial's recipe, 80 steps; "matrices", of those of a block of the tiny base on library text, 40 steps. Errors of the
update over the second half of the steps: mean absolute error over the mean magnitude, root mean square error over the root
mean square, and the largest magnitude, in learning rates.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import qlite
from benchmarks import bases
from benchmarks.common import record, table
from qlite.adamw_8bit import AdamWRule
from qlite.data import ASSETS
from qlite.dynamic8 import dequantize_dynamic8, quantize_dynamic8, reciprocal
from qlite.train import answer_loss

BLOCK = 256
#: What a tensor is after it was encoded and decoded.
Code = Callable[[Tensor], Tensor]


def dynamic(x: Tensor, *, signed: bool) -> Tensor:
    """Returns x by way of dynamic 8 bits."""
    codes, absmax = quantize_dynamic8(x, signed=signed, never_zero=not signed)
    return dequantize_dynamic8(codes, absmax, signed=signed)


def log_spaced(v: Tensor, octaves: int) -> Tensor:
    """Returns v >= 0, flat, by way of 255 levels at equal ratios over some octaves below its block's largest, and zero."""
    blocks = torch.nn.functional.pad(v, (0, -len(v) % BLOCK)).view(-1, BLOCK)
    largest = blocks.amax(dim=1, keepdim=True)
    step = octaves / 254
    below = (-(blocks * reciprocal(largest)).log2() / step).round().clamp(max=254)
    return torch.where(blocks > 0, largest * torch.exp2(-below * step), 0.0).view(-1)[: len(v)]


def _dynamic_m(m: Tensor) -> Tensor:
    return dynamic(m, signed=True)


def _as_it_is(x: Tensor) -> Tensor:
    return x


#: Codes of the first and of the second moment.
CODES: dict[str, tuple[Code, Code]] = {
    "float32 m, dynamic v": (_as_it_is, lambda v: dynamic(v, signed=False)),
    "float32 v": (_dynamic_m, _as_it_is),
    "dynamic v": (_dynamic_m, lambda v: dynamic(v, signed=False)),
    "sqrt v": (_dynamic_m, lambda v: dynamic(v.sqrt(), signed=False).square()),
    **{f"log v, {octaves}": (_dynamic_m, lambda v, n=octaves: log_spaced(v, n)) for octaves in (16, 24, 32)},
}


@dataclasses.dataclass
class Follower:
    """Moments in one pair of codes, one flat tensor for each parameter, and the errors of its updates so far."""

    code_m: Code
    code_v: Code
    m: list[Tensor]
    v: list[Tensor]
    absolute: float = 0.0
    square: float = 0.0
    largest: float = 0.0

    def updates(self, gradients: list[Tensor], rule: AdamWRule) -> list[Tensor]:
        """Returns the updates of a step, in learning rates, and keeps the moments."""
        found = []
        for number, gradient in enumerate(gradients):
            m, v = rule.moments(gradient, self.m[number], self.v[number])
            found.append(rule.updated(torch.zeros_like(m), m, v, bound=rule.bound()).neg_())
            self.m[number], self.v[number] = self.code_m(m), self.code_v(v)
        return found

    def count(self, found: Tensor, wanted: Tensor) -> None:
        """Adds the errors of a step."""
        self.absolute += (found - wanted).abs().double().mean().item()
        self.square += (found - wanted).double().square().mean().item()
        self.largest = max(self.largest, found.abs().max().item())


def log_normal() -> Iterator[list[Tensor]]:
    """Yields the gradients of 400 steps."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(2**15, generator=generator).exp()
    for _ in range(400):
        yield [spread * torch.randn(len(spread), generator=generator)]


def adapter() -> Iterator[list[Tensor]]:
    """Yields the gradients of 80 steps of the tutorial's recipe, made in float32 AdamW."""
    model = qlite.load_falcon(ASSETS / "tiny-falcon", dtype=torch.float32)
    qlite.add_lora(model, qlite.LoRAConfig.qlora_2023(), seed=0)
    tokenizer = qlite.load_tokenizer(ASSETS / "tiny-falcon")
    batches = qlite.faq_batches(ASSETS / "faq.json", tokenizer, batch_size=4)
    epochs = itertools.chain.from_iterable(itertools.repeat(batches))
    losses = (answer_loss(model, batch) / batch.n_tokens for batch in epochs)
    yield from steps(qlite.lora_parameters(model), losses, 80, lr=2e-4)


def matrices() -> Iterator[list[Tensor]]:
    """Yields the gradients of 40 steps on library text, 2 windows of 512 tokens each, of the matrices of one block."""
    model = qlite.load_falcon(ASSETS / "tiny-falcon", dtype=torch.float32).requires_grad_(False)
    block = model.transformer.h[len(model.transformer.h) // 2].requires_grad_(True)
    row, generator = bases.encode("tiny", bases.held_out_texts("tiny")["library"]), torch.Generator().manual_seed(0)
    tiny = bases.train_tiny_base
    losses = (tiny.loss_of(model, tiny.windows(row, 2, generator)) for _ in itertools.count())
    yield from steps([p for p in block.parameters() if p.ndim == 2], losses, 40, lr=1e-4)


def steps(parameters: list[torch.nn.Parameter], losses: Iterator[Tensor], count: int, lr: float) -> Iterator[list[Tensor]]:
    """Yields the gradient of each of some losses, flat, and then makes a step of float32 AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    for loss in itertools.islice(losses, count):
        optimizer.zero_grad()
        loss.backward()
        yield [p.grad.flatten().clone() for p in parameters if p.grad is not None]
        optimizer.step()


GRADIENTS: dict[str, Callable[[], Iterator[list[Tensor]]]] = {
    "log-normal": log_normal,
    "adapter": adapter,
    "matrices": matrices,
}


def measure(gradients: Iterator[list[Tensor]]) -> list[dict]:
    """Returns a row for every code."""
    every = list(gradients)
    kinds: dict[str, tuple[Code, Code]] = {"float32": (_as_it_is, _as_it_is), **CODES}
    zeros = [torch.zeros_like(gradient) for gradient in every[0]]
    followers = {name: Follower(code_m, code_v, list(zeros), list(zeros)) for name, (code_m, code_v) in kinds.items()}
    size = square = 0.0
    for number, gradient in enumerate(every, start=1):
        rule = AdamWRule(lr=1.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=number)
        updates = {name: torch.cat(follower.updates(gradient, rule)) for name, follower in followers.items()}
        if number > len(every) // 2:
            size += updates["float32"].abs().double().mean().item()
            square += updates["float32"].double().square().mean().item()
            for name, follower in followers.items():
                follower.count(updates[name], updates["float32"])
    return [
        {
            "code": name, "steps": len(every), "elements": sum(map(len, every[0])),
            "mean_error": round(follower.absolute / size, 4), "rms_error": round((follower.square / square) ** 0.5, 4),
            "largest": round(follower.largest, 3),
        }
        for name, follower in followers.items()
    ]  # fmt: skip


def main() -> None:
    """Measures every code on every kind of gradients, and records a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    lines = []
    for kind, gradients in GRADIENTS.items():
        for row in measure(gradients()):
            record("moment_codes", {"gradients": kind, **row}, show=False)
            lines.append([kind, *row.values()])
    print(table(("gradients", "code", "steps", "elements", "mean error", "rms error", "largest"), lines))


if __name__ == "__main__":
    main()

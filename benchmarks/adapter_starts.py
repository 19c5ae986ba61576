"""How far a quantized model is from its original before the first step, by the start of its adapters.

    python -m benchmarks.adapter_starts    # the packaged tiny base; a CPU, two minutes

LoRA's own start changes nothing, nor does PiSSA's, which subtracts what it begins with; LoftQ's adds the leading singular
vectors of what encoding took (qlite/lora_init.py). Adapters on every linear layer, alpha = 2 r. Against the dense model:

weight: relative squared error of the weights with their adapter, over all layers.
layer: relative error, as a norm, of what a layer returns for the dense model's own input, root mean square over layers.
logits: relative error of the logits, as a norm. gap: mean difference of the loss, in nats a token.

The last three on held-out library text. "spectrum" is the share of the squared error of the weights that its leading r
singular vectors hold, which is all that a start of rank r can repair; "noise" is that share in normal random matrices of these
sizes, and "noise_7b" about that in those of Falcon-7B's layers, by r (sqrt(m) + sqrt(n))^2 / (m n).
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import qlite
from benchmarks import bases
from benchmarks.common import SHAPES, record, relative_error, table
from benchmarks.quantization_loss import losses, windows
from qlite.data import ASSETS

FORMATS = {"nf4": qlite.Linear4bit, "nf4 searched": functools.partial(qlite.Linear4bit, search=True)}
#: Start and rank.
STARTS = (("kaiming", 16), ("pissa", 16), ("loftq", 4), ("loftq", 16), ("loftq", 64))


def linears(model: qlite.Falcon) -> dict[str, Any]:
    """Returns the layers of the blocks, by name, encoded or not, with adapter or without."""
    last = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in last}


@torch.no_grad()
def inputs(model: qlite.Falcon, ids: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Returns what each layer gets, by name, and the logits."""
    found: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, arguments, name=name: found.__setitem__(name, arguments[0]))
        for name, layer in linears(model).items()
    ]
    logits = model(ids[:, :-1])
    for hook in hooks:
        hook.remove()
    return found, logits


def adapted(model: qlite.Falcon, kind: Callable[..., qlite.Linear4bit], start: str, r: int) -> qlite.Falcon:
    """Returns a copy of a dense model, encoded, with adapters of some start."""
    dense, encoded = linears(model), copy.deepcopy(model)
    qlite.quantize_model(encoded, kind)
    config = qlite.LoRAConfig(r=r, alpha=2 * r, init=start, dropout=0.0)
    qlite.add_lora(encoded, config, seed=0, dense=(lambda name: dense[name].weight.detach()) if start == "loftq" else None)
    return encoded.eval()


def leading_share(matrices: list[Tensor], r: int) -> float:
    """Returns how much of the squares of matrices is in their leading r singular vectors."""
    squares = [torch.linalg.svdvals(matrix).double().square() for matrix in matrices]
    return sum(values[:r].sum().item() for values in squares) / sum(values.sum().item() for values in squares)


def noise_share(shapes: Iterable[tuple[int, int]], r: int) -> float:
    """Returns about how much of the squares of normal random matrices is in their leading r singular vectors, r small."""
    shapes = list(shapes)
    return r * sum((m**0.5 + n**0.5) ** 2 for m, n in shapes) / sum(m * n for m, n in shapes)


@torch.no_grad()
def measure(model: qlite.Falcon, ids: Tensor, cases: Iterable[tuple[str, str, int]]) -> Iterator[dict]:
    """Yields a row for each case: a format, a start and its rank."""
    got, wanted = inputs(model, ids)
    dense, before = linears(model), losses(model, ids)
    for form, start, r in cases:
        encoded = adapted(model, FORMATS[form], start, r)
        errors, squares, outputs, residuals = 0.0, 0.0, [], []
        for name, layer in linears(encoded).items():
            weight, base = dense[name].weight, layer.base.dequantize().float()
            residuals.append(weight - base)
            errors += (layer.merged(base) - weight).double().square().sum().item()
            squares += weight.double().square().sum().item()
            outputs.append(relative_error(layer(got[name]), dense[name](got[name])))
        torch.manual_seed(0)
        row = {"format": form, "start": start, "r": r, "weight": round(errors / squares, 6)}
        row["layer"] = round((sum(value**2 for value in outputs) / len(outputs)) ** 0.5, 5)
        row["logits"] = round(relative_error(encoded(ids[:, :-1]), wanted), 5)
        row["gap"] = round((losses(encoded, ids) - before).mean().item(), 5)
        row["spectrum"] = round(leading_share(residuals, r), 4)
        row["noise"] = round(leading_share([torch.randn_like(matrix) for matrix in residuals], r), 4)
        row["noise_7b"] = round(noise_share(SHAPES["falcon7b"].values(), r), 4)
        yield row


def main() -> None:
    """Measures every start over every format, and records a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens of held-out text")
    options = parser.parse_args()
    model = qlite.load_falcon(ASSETS / "tiny-falcon", dtype=torch.float32)
    ids = windows(bases.encode("tiny", bases.held_out_texts("tiny")["library"]), options.windows)
    rows = list(measure(model, ids, [(form, start, r) for form in FORMATS for start, r in STARTS]))
    for row in rows:
        record("adapter_starts", {"model": "tiny", "windows": len(ids), **row}, show=False)
    print(table(tuple(rows[0]), [list(row.values()) for row in rows]))


if __name__ == "__main__":
    main()

"""Small Falcons with adapters on them, for the tests of adapters, merging and the hub."""

import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlite
from qlite.adapters import CONFIG, PREFIX, TENSORS
from qlite.lora import LoRALinear
from qlite.nf4 import FP4_LEVELS
from tests.falcons import FLAVOURS, falcon_of, tokens_of

KINDS = {
    "dense": None,
    "nf4": qlite.Linear4bit,
    "fp4": functools.partial(qlite.Linear4bit, levels=FP4_LEVELS, double_quant=False),
    "int8": qlite.Linear8bit,
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

UP = "transformer.h.0.mlp.dense_h_to_4h"
A, B = f"{UP}.lora_A.weight", f"{UP}.lora_B.weight"


def base_of(kind=None, flavour="7b", dtype=torch.float32, seed=0):
    model = falcon_of(FLAVOURS[flavour], seed=seed, dtype=dtype)
    if kind is not None:
        qlite.quantize_model(model, kind)
    return model


def adapt(model, seed=1, **options):
    """Adds adapters that change what the model says: B is not zero."""
    options = {"r": 3, "alpha": 8.0, "dropout": 0.0, **options}
    report = qlite.add_lora(model, qlite.LoRAConfig(**options), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for module in adapted(model).values():
        module.lora_B.data = torch.randn(module.lora_B.shape, generator=generator) * 0.1
    return report


def adapted(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def logits(model):
    return model(tokens_of(model.config, 2, 7))


def stored_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def edit(folder, **changes):
    """Changes keys of the config; `...` takes one away."""
    values = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_tensors(folder, changes):
    tensors = load_file(folder / TENSORS) | {PREFIX + name: tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / TENSORS)

"""A model to a checkpoint folder: safetensors and config.json, dense or encoded, in qlite's layout or in bitsandbytes'.

The folder appears whole, by renaming: an interrupted save leaves nothing under its name.

Not done here: adapters (adapters.py); tokenizers other than the one file that is put beside; any encoding.
"""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
from typing import Any

import torch
from torch import Tensor, nn

from qlite import bnb_layout
from qlite.encoded_files import config_of
from qlite.experts import ExpertStack
from qlite.linear import Linear4bit, Linear8bit, QuantizedLinear
from qlite.linear_like import is_conv1d
from qlite.storage import TensorToWrite, check_free, new_folder, write_shards

LAYOUTS = ("qlite", "bitsandbytes")


def save_checkpoint(
    model: nn.Module,
    folder: str | pathlib.Path,
    *,
    layout: str = "qlite",
    tokenizer_json: str | pathlib.Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model, dense or encoded, as a checkpoint folder that `load_checkpoint` and `load_falcon` read.

    Args:
        model: a Falcon, or a model of transformers, without adapters: `model.config.to_dict()` is its config.json.
        folder: must not exist, or be empty.
        layout: of encoded layers: "qlite", which holds any; or "bitsandbytes", which transformers loads too.
        tokenizer_json: a file to put beside it. max_shard_bytes: a larger model is cut into several files.

    Raises:
        ValueError: the model carries adapters; or `layout` has no place for it (the layer is named).
        TypeError: the model has no config. FileExistsError: the folder holds something.
        FileNotFoundError: no tokenizer_json there.

    Example:
        >>> qlite.save_checkpoint(model, "falcon-nf4")  # doctest: +SKIP
    """
    check_free(folder)
    if layout not in LAYOUTS:
        raise ValueError(f"save_checkpoint: layout is {layout!r}; wanted one of {', '.join(LAYOUTS)}")
    state = model.state_dict(keep_vars=True)
    if any(".lora_" in name for name in state):
        raise ValueError("save_checkpoint: the model carries adapters; use save_adapter, or merge_adapter first")
    if tokenizer_json is not None and not pathlib.Path(tokenizer_json).is_file():
        raise FileNotFoundError(f"save_checkpoint: {tokenizer_json}: no such file")
    unique: dict[int, str] = {}
    for name, tensor in state.items():
        unique.setdefault(id(tensor), name)
    tensors = {name: state[name].detach() for name in unique.values()}
    values = _config_of(model)
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, (QuantizedLinear, ExpertStack))}
    if layout == "bitsandbytes":
        for name, layer in layers.items():
            if isinstance(layer, ExpertStack):
                raise ValueError(
                    f"save_checkpoint: layout={layout!r} has no place for {name}, a stack of experts; layout='qlite' has"
                )
        tensors = _in_bitsandbytes_layout(tensors, layers)
        values["quantization_config"] = _bitsandbytes_config(model, layers, values["dtype"])
    elif layers:
        values["quantization_config"] = config_of(model) or {}
    if layers:
        values["quantization_config"]["base_fingerprint"] = getattr(model, "base_fingerprint", None)
    config = json.dumps(values, indent=2) + "\n"
    with new_folder(folder) as temporary:
        made = {n: TensorToWrite(t.dtype, tuple(t.shape), functools.partial(Tensor.contiguous, t)) for n, t in tensors.items()}
        write_shards(temporary, made, max_shard_bytes=max_shard_bytes)
        (temporary / "config.json").write_text(config, encoding="utf-8")
        if tokenizer_json is not None:
            shutil.copyfile(tokenizer_json, temporary / "tokenizer.json")


def _config_of(model: nn.Module) -> dict[str, Any]:
    """Returns what a model says of itself, and the dtype of its dense weights; nothing about an encoding."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise TypeError(f"save_checkpoint: {type(model).__name__} has no config to write; wanted one with to_dict()")
    values = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
    dtype = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), torch.get_default_dtype())
    return {**values, "architectures": values.get("architectures") or [type(model).__name__], "dtype": str(dtype)[6:]}


def _in_bitsandbytes_layout(tensors: dict[str, Tensor], layers: dict[str, QuantizedLinear]) -> dict[str, Tensor]:
    """Returns the tensors with the parts that bitsandbytes has in the place of each layer's own; ValueError by name."""
    written: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, attribute = name.rpartition(".")
        module = layers.get(layer)
        if module is None or attribute == "bias":
            written[name] = tensor
        elif attribute == "weight":
            try:
                written |= {f"{layer}.{part}": value.detach() for part, value in _parts(module).items()}
            except ValueError as error:
                raise ValueError(f"save_checkpoint: layout='bitsandbytes' has no place for {layer}: {error}") from error
    return written


def _parts(layer: QuantizedLinear) -> dict[str, Tensor]:
    if isinstance(layer, Linear4bit):
        return bnb_layout.to_4bit(layer.encoded())
    assert isinstance(layer, Linear8bit)
    return bnb_layout.to_8bit(layer.weight, layer.absmax)


def _bitsandbytes_config(model: nn.Module, layers: dict[str, QuantizedLinear], dtype: str) -> dict[str, Any]:
    """Returns the quantization_config of all layers together; ValueError where there is none that says it."""
    if not layers:
        raise ValueError("save_checkpoint: layout='bitsandbytes' is one of encoded layers; the model has none")
    formats = {name: {**layer.config(), "block_size": None, "flat": None, "search": None} for name, layer in layers.items()}
    first, wanted = next(iter(formats.items()))
    for name, found in formats.items():
        if found != wanted:
            raise ValueError(
                f"save_checkpoint: layout='bitsandbytes' has one format for all layers; {first} and {name} differ in it"
            )
    # Its Conv1D is a transposed linear layer, which transformers encodes too.
    dense = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)]
    for name in layers:
        for other in dense:
            if name.endswith(other) or name.startswith(f"{other}."):
                raise ValueError(
                    f"save_checkpoint: {other} is dense and {name} is encoded; transformers leaves out both by that name"
                )
    quant_type, double_quant = str(wanted["format"]), bool(wanted.get("double_quant"))
    return bnb_layout.quantization_config(quant_type, double_quant=double_quant, compute_dtype=dtype, skip=dense)

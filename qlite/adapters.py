"""Adapters as files: PEFT's LoRA layout, written and read.

An adapter is a folder with adapter_config.json and adapter_model.safetensors, whose keys are
`base_model.model.<layer>.lora_A.weight` (r, in_features) and `.lora_B.weight` (out_features, r), as PEFT 0.21 has them.
The safetensors metadata also keeps the fingerprint of the base, where it is known.

Not done here: DoRA, rank patterns, biases, modules_to_save: refused by name, never ignored.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qlite.download import resolve_folder
from qlite.lora import ALL_LINEAR, AdapterReport, LoRAConfig, LoRALinear, add_lora
from qlite.storage import FLOATS, read_header, read_json, read_metadata, read_tensor, sync

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FINGERPRINT = "qlite_base_fingerprint"
#: Keys of adapter_config.json that change the numbers, and the only values that are supported.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "use_qalora": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "trainable_token_indices": (None,),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    # The other ways to begin (PiSSA, OLoRA, LoftQ, ...) change the base too.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
}


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Returns the layers that carry an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _target_modules(model: nn.Module, names: list[str], config: LoRAConfig) -> list[str] | str:
    """Returns what PEFT must match to wrap exactly the layers `names`: last parts of names where they suffice."""
    short = config.targets if isinstance(config.targets, tuple) else {name.rpartition(".")[2] for name in names}
    inside = tuple(f"{name}." for name in names)
    every = [name for name, _ in model.named_modules() if not name.startswith(inside)]
    for targets in (sorted(short), sorted(names)):
        if {name for name in every if any(f".{name}".endswith(f".{target}") for target in targets)} == set(names):
            return targets
    return _expression(names)


def _expression(names: list[str]) -> str:
    """Returns the regular expression of exactly these names; in a list, a name that ends another one means both."""
    return "|".join(re.escape(name) for name in names)


def save_adapter(model: nn.Module, folder: str | pathlib.Path, *, base_id: str | None = None) -> pathlib.Path:
    """Returns the folder, having written the model's adapters there in PEFT's layout.

    The two files are written beside and renamed, and read again: names, shapes and finite values are checked. Other files
    in the folder stay.

    Args:
        model: with adapters. folder: created where it is not there.
        base_id: for the config's base_model_name_or_path; default: what load_falcon was given.

    Raises:
        ValueError: the model has no adapters, or one holds a non-finite value.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> report = qlite.add_lora(model, qlite.LoRAConfig(r=2))
        >>> folder = qlite.save_adapter(model, "adapter")  # doctest: +SKIP
    """
    adapted = adapted_layers(model)
    if not adapted:
        raise ValueError(f"save_adapter: {type(model).__name__} has no adapters; call add_lora first")
    config: LoRAConfig = model.lora_config  # type: ignore[assignment]
    tensors: dict[str, Tensor] = {}
    for name, module in adapted.items():
        for key, parameter in (("lora_A", module.lora_A), ("lora_B", module.lora_B)):
            if not bool(torch.isfinite(parameter).all()):
                raise ValueError(f"save_adapter: {name}.{key} holds a non-finite value; nothing was written")
            tensors[f"{PREFIX}{name}.{key}.weight"] = parameter.detach().cpu().float().contiguous()
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_id or getattr(model, "base_id", None),
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": _target_modules(model, list(adapted), config),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    metadata = {"format": "pt"}
    if getattr(model, "base_fingerprint", None):
        metadata[FINGERPRINT] = str(model.base_fingerprint)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.tmp" for name in (TENSORS, CONFIG)}
    try:
        save_file(tensors, temporary[TENSORS], metadata=metadata)
        temporary[CONFIG].write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        written = {name: entry.shape for name, entry in read_header(temporary[TENSORS]).items()}
        assert written == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        shutil.copymode(temporary[CONFIG], temporary[TENSORS])  # safetensors makes files for their owner alone
        for path in temporary.values():
            sync(path)
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return folder


def read_config(folder: pathlib.Path) -> tuple[LoRAConfig, dict[str, Any]]:
    """Returns what adapter_config.json says: checked, and as it stands; ValueError for what is not supported."""
    values = read_json(folder / CONFIG)
    where = folder / CONFIG
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {values.get('peft_type')!r}; only LORA is supported")
    for key, allowed in REQUIRED.items():
        if key in values and values[key] not in allowed:
            raise ValueError(f"{where}: {key} is {values[key]!r}, which qlite does not support")
    targets = values.get("target_modules")
    if isinstance(targets, list) and targets and all(isinstance(target, str) for target in targets):
        chosen: str | tuple[str, ...] = tuple(targets)
    elif isinstance(targets, str):
        chosen = ALL_LINEAR  # an expression from a file is not run: the layers are those that the tensors name
    else:
        raise ValueError(f"{where}: target_modules is {targets!r}; wanted a list of names or a string")
    alpha, dropout = values.get("lora_alpha", 8), values.get("lora_dropout", 0.0)
    for key, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{where}: {key} is {value!r}; wanted a number")
    try:
        return LoRAConfig(r=values.get("r", 8), alpha=alpha, dropout=dropout, targets=chosen), values
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from error


def read_tensors(folder: pathlib.Path, r: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns `<layer>.lora_A` and `.lora_B` by name, float32, of rank r, and the file's metadata."""
    path = folder / TENSORS
    header = read_header(path)
    tensors: dict[str, Tensor] = {}
    for name, stored in header.items():
        layer, _, key = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not (name.startswith(PREFIX) and name.endswith(".weight") and key in ("lora_A", "lora_B")):
            raise ValueError(f"{path}: {name} is not a LoRA weight in PEFT's layout")
        if stored.dtype not in FLOATS:
            raise ValueError(f"{path}: {name} is {stored.dtype}; wanted a float")
        twin = f"{PREFIX}{layer}.{'lora_B' if key == 'lora_A' else 'lora_A'}.weight"
        if len(stored.shape) != 2 or stored.shape[0 if key == "lora_A" else 1] != r or twin not in header:
            raise ValueError(f"{path}: {name} has shape {stored.shape}; wanted rank {r}, as {CONFIG} says, and {twin} too")
        tensor = read_tensor(stored).float()
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: {name} holds a non-finite value")
        tensors[f"{layer}.{key}"] = tensor
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    return tensors, read_metadata(path)


def _check_fit(model: nn.Module, tensors: dict[str, Tensor], r: int, where: str) -> list[str]:
    """Returns the layers that the tensors are for; ValueError unless each is there, with the right shapes."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    modules = dict(model.named_modules())
    for layer in layers:
        module = modules.get(layer)
        if module is None or not isinstance(getattr(module, "in_features", None), int):
            raise ValueError(f"{where}: made for another base: this model has no linear layer {layer}")
        wanted = {"lora_A": (r, module.in_features), "lora_B": (module.out_features, r)}
        for key, shape in wanted.items():
            found = tensors.get(f"{layer}.{key}")
            if found is None or found.shape != shape:
                has = None if found is None else tuple(found.shape)
                raise ValueError(f"{where}: made for another base: {layer}.{key} is {has}; this model wants {shape}")
    return layers


def load_adapter(
    model: nn.Module, folder_or_repo_id: str | pathlib.Path, *, revision: str | None = None
) -> AdapterReport | None:
    """Returns a report of the adapters added, or None where the model had them and their weights were replaced.

    Args:
        model: the base the adapter was trained on, with or without adapters of the same layers.
        folder_or_repo_id: a folder in PEFT's layout, or a hub id. revision: branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a damaged file, a kind of adapter that is not supported, or an
            adapter made for another base; the model is unchanged.

    Example:
        >>> qlite.load_adapter(model, "faq-lora/")  # doctest: +SKIP
    """
    folder = resolve_folder(folder_or_repo_id, revision=revision)
    config, values = read_config(folder)
    tensors, metadata = read_tensors(folder, config.r)
    ours, theirs = getattr(model, "base_fingerprint", None), metadata.get(FINGERPRINT)
    if ours and theirs and ours != theirs:
        raise ValueError(
            f"{folder}: made for another base ({values.get('base_model_name_or_path')}, fingerprint {theirs[:12]}...); "
            f"this model is {getattr(model, 'base_id', 'unknown')}, fingerprint {ours[:12]}..."
        )
    layers = _check_fit(model, tensors, config.r, str(folder))
    adapted = adapted_layers(model)
    report = None
    if not adapted:
        report = add_lora(model, LoRAConfig(config.r, config.alpha, config.dropout, _expression(layers)))
        adapted = adapted_layers(model)
    if set(adapted) != set(layers) or any(m.lora_A.shape[0] != config.r for m in adapted.values()):
        raise ValueError(f"{folder}: the model carries adapters on other layers or of another rank; load a fresh base")
    with torch.no_grad():
        for layer, module in adapted.items():
            module.scaling, module.dropout.p = config.scaling, config.dropout
            module.lora_A.copy_(tensors[f"{layer}.lora_A"])
            module.lora_B.copy_(tensors[f"{layer}.lora_B"])
    model.lora_config = config  # type: ignore[assignment]
    return report

"""Adapters as files: PEFT's LoRA layout, written and read.

An adapter is a folder with adapter_config.json and adapter_model.safetensors, whose keys are
`base_model.model.<layer>.lora_A.weight` (r, in_features), `.lora_B.weight` (out_features, r) and, under DoRA,
`.lora_magnitude_vector` (out_features,), as PEFT 0.21 has them; a module that is saved whole has its own names. The
safetensors metadata also keeps the fingerprint of the base, where it is known: PEFT warns of a key of adapter_config.json
that it does not know.

Not done here: adapters on embeddings, biases, other methods than LoRA: refused by name, never ignored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import warnings
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qlite.download import resolve_folder
from qlite.linear import QuantizedLinear
from qlite.linear_like import features, is_conv1d
from qlite.lora import ALL_LINEAR, AdapterReport, LoRAConfig, LoRALinear, add_lora, saved_modules
from qlite.storage import DTYPES, FLOATS, StoredTensor, read_header, read_json, read_metadata, read_tensor, sync
from qlite.switching import DEFAULT, adapters_of, chosen, set_adapter, using

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FINGERPRINT = "qlite_base_fingerprint"
#: What PEFT calls an adapter's parameters in a file, and we on a LoRALinear.
PARAMETERS = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "lora_magnitude_vector": "magnitude"}
#: Keys of adapter_config.json that change the numbers, and the only values that are supported.
REQUIRED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "trainable_token_indices": (None,),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "ensure_weight_tying": (False, None),
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


def _lies_transposed(base: nn.Module) -> bool:
    """Whether the dense layer, to PEFT, is a Conv1D."""
    return base.transposed if isinstance(base, QuantizedLinear) else is_conv1d(base)


def _config_of_file(model: nn.Module, adapted: dict[str, LoRALinear], base_id: str | None) -> dict[str, Any]:
    """Returns what adapter_config.json says of a model's adapters."""
    config: LoRAConfig = model.lora_config  # type: ignore[assignment]
    # The start that is subtracted doubles the rank; alpha follows, so that the scaling stays.
    times = 2 if any(module.start_A is not None for module in adapted.values()) else 1
    scale = math.sqrt(times) if config.rslora else times
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_id or getattr(model, "base_id", None),
        "revision": None if base_id else getattr(model, "base_revision", None),
        "r": config.r * times,
        "lora_alpha": _whole(config.alpha * scale),
        "rank_pattern": {key: r * times for key, r in config.rank_pattern.items()},
        "alpha_pattern": {key: _whole(alpha * scale) for key, alpha in config.alpha_pattern.items()},
        "lora_dropout": config.dropout,
        "target_modules": _target_modules(model, list(adapted), config),
        "modules_to_save": list(saved_modules(model, config)) or None,
        "bias": "none",
        "fan_in_fan_out": any(_lies_transposed(module.base) for module in adapted.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
    }


def _whole(number: float) -> float:
    """Returns an integer where the number is one: vLLM and ollama read lora_alpha as such."""
    return int(number) if number == int(number) else number


def config_text(values: dict[str, Any]) -> str:
    """Returns the text of adapter_config.json, its keys in order; those of a pattern stay, since the first match counts."""
    return json.dumps(dict(sorted(values.items())), indent=2) + "\n"


def _tensors_of_file(model: nn.Module, adapted: dict[str, LoRALinear]) -> dict[str, Tensor]:
    """Returns the tensors of a model's adapters by PEFT's names; ValueError where one is not finite."""
    tensors: dict[str, Tensor] = {}
    for name, module in adapted.items():
        a, b = module.factors()
        for key, tensor in (("lora_A.weight", a), ("lora_B.weight", b), ("lora_magnitude_vector", module.magnitude)):
            if tensor is not None:
                tensors[f"{name}.{key}"] = tensor.detach().cpu().float().contiguous()
    config: LoRAConfig = model.lora_config  # type: ignore[assignment]
    for name, module in saved_modules(model, config).items():
        for key, tensor in module.state_dict().items():
            tensors[f"{name}.{key}"] = tensor.detach().cpu().contiguous()
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"save_adapter: {name.removesuffix('.weight')} holds a non-finite value; nothing was written")
    if not any(bool(tensor.any()) for name, tensor in tensors.items() if name.endswith("lora_B.weight")):
        warnings.warn("save_adapter: every lora_B is zero: the adapter was not trained, and changes nothing", stacklevel=3)
    return {PREFIX + name: tensor for name, tensor in tensors.items()}


def save_adapter(
    model: nn.Module, folder: str | pathlib.Path, *, base_id: str | None = None, name: str | None = None
) -> pathlib.Path:
    """Returns the folder, having written an adapter of the model there in PEFT's layout.

    The two files are written beside, read again and compared, and renamed. Other files in the folder stay. An adapter that
    started as "pissa" is written with what it started with, as one of rank 2 r, so that it fits the base as it is.

    Args:
        model: with adapters. folder: created where it is not there.
        base_id: for the config's base_model_name_or_path; default: what load_falcon was given.
        name: of the adapter; None: the one in use. Files hold no name.

    Raises:
        ValueError: the model has no adapters, none of that name, or none in use and none was named; or one holds a
            non-finite value. OSError: the disk gave back other bytes.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> report = qlite.add_lora(model, qlite.LoRAConfig(r=2))
        >>> folder = qlite.save_adapter(model, "adapter")  # doctest: +SKIP
    """
    with using(model, chosen("save_adapter", model, name)):
        adapted = adapted_layers(model)
        if not adapted:
            raise ValueError(f"save_adapter: {type(model).__name__} has no adapters; call add_lora first")
        tensors, values = _tensors_of_file(model, adapted), _config_of_file(model, adapted, base_id)
    metadata = {"format": "pt"}
    if getattr(model, "base_fingerprint", None):
        metadata[FINGERPRINT] = str(model.base_fingerprint)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".{name}.tmp" for name in (TENSORS, CONFIG)}
    try:
        save_file(tensors, temporary[TENSORS], metadata=metadata)
        temporary[CONFIG].write_text(config_text(values), encoding="utf-8")
        header = read_header(temporary[TENSORS])
        if header.keys() != tensors.keys() or not all(_same(header[name], tensor) for name, tensor in tensors.items()):
            raise OSError(f"save_adapter: {temporary[TENSORS]} does not hold what was written to it; is the disk sound?")
        shutil.copymode(temporary[CONFIG], temporary[TENSORS])  # safetensors makes files for their owner alone
        for path in temporary.values():
            sync(path)
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    return folder


def _same(stored: StoredTensor, tensor: Tensor) -> bool:
    return DTYPES.get(stored.dtype) == tensor.dtype and torch.equal(read_tensor(stored), tensor)


def _number(values: dict[str, Any], key: str, default: float, where: pathlib.Path) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}: {key} is {value!r}; wanted a number")
    return value


def _names(values: dict[str, Any], key: str, where: pathlib.Path) -> tuple[str, ...]:
    found = values.get(key) or ()
    if not isinstance(found, (list, tuple)) or not all(isinstance(name, str) and name for name in found):
        raise ValueError(f"{where}: {key} is {found!r:.200}; wanted a list of names")
    return tuple(found)


def _table(values: dict[str, Any], key: str, where: pathlib.Path) -> dict[str, Any]:
    found = values.get(key) or {}
    if not isinstance(found, dict) or any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in found.values()):
        raise ValueError(f"{where}: {key} is {found!r:.200}; wanted names with numbers")
    return found


def read_config(folder: pathlib.Path) -> tuple[LoRAConfig, dict[str, Any]]:
    """Returns what adapter_config.json says: checked, and as it stands; ValueError for what is not supported."""
    values = read_json(folder / CONFIG)
    where = folder / CONFIG
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{where}: peft_type is {values.get('peft_type')!r}; only LORA is supported")
    for key, allowed in REQUIRED.items():
        if key in values and values[key] not in allowed:
            raise ValueError(f"{where}: {key} is {values[key]!r}, which qlite does not support")
    flags: dict[str, bool] = {}
    for key in ("use_rslora", "use_dora", "fan_in_fan_out"):  # the last says how a Conv1D keeps its weight, not the adapter
        flags[key] = values.get(key) or False
        if not isinstance(flags[key], bool):
            raise ValueError(f"{where}: {key} is {flags[key]!r}; wanted true or false")
    targets = values.get("target_modules")
    if isinstance(targets, list) and targets and all(isinstance(target, str) for target in targets):
        chosen: str | tuple[str, ...] = tuple(targets)
    elif isinstance(targets, str):
        chosen = ALL_LINEAR  # an expression from a file is not run: the layers are those that the tensors name
    else:
        raise ValueError(f"{where}: target_modules is {targets!r}; wanted a list of names or a string")
    alpha, dropout = _number(values, "lora_alpha", 8, where), _number(values, "lora_dropout", 0.0, where)
    ranks, alphas = _table(values, "rank_pattern", where), _table(values, "alpha_pattern", where)
    saved = _names(values, "modules_to_save", where)
    try:
        config = LoRAConfig(
            r=values.get("r", 8), alpha=alpha, dropout=dropout, targets=chosen, modules_to_save=saved,
            rslora=flags["use_rslora"], dora=flags["use_dora"], rank_pattern=ranks, alpha_pattern=alphas,
        )  # fmt: skip
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from error
    return config, values


@dataclasses.dataclass(frozen=True)
class StoredAdapter:
    """The content of adapter_model.safetensors.

    Attributes:
        layers: name -> {"lora_A": (r, in), "lora_B": (out, r), "magnitude": (out,) under DoRA}, float32.
        saved: name of a module that is saved whole -> its state by name, in the dtypes of the file.
        fingerprint: of the base, or None.
    """

    layers: dict[str, dict[str, Tensor]]
    saved: dict[str, dict[str, Tensor]]
    fingerprint: str | None


def _saved_owner(name: str, config: LoRAConfig) -> str | None:
    """Returns the module saved whole that a tensor of this name is in, or None."""
    parts = name.split(".")
    owners = [".".join(parts[:count]) for count in range(1, len(parts))]
    ends = tuple(f".{target}" for target in config.modules_to_save)
    return next((owner for owner in owners if f".{owner}".endswith(ends)), None) if ends else None


def read_tensors(folder: pathlib.Path, config: LoRAConfig) -> StoredAdapter:
    """Returns the adapter that the folder's tensors make, each of the rank that the config says.

    Raises:
        FileNotFoundError: no such file. ValueError: a tensor that is no part of a LoRA adapter, that has another rank, no
            twin, or a value that is not finite.
    """
    path = folder / TENSORS
    header = read_header(path)
    found = StoredAdapter({}, {}, read_metadata(path).get(FINGERPRINT))
    for name, stored in header.items():
        inner = name.removeprefix(PREFIX)
        match = re.fullmatch(rf"(.+)\.({'|'.join(map(re.escape, PARAMETERS))})", inner)
        owner = None if match else _saved_owner(inner, config)
        if not name.startswith(PREFIX) or not (match or owner):
            raise ValueError(f"{path}: {name} is not a LoRA weight in PEFT's layout, nor in modules_to_save of {CONFIG}")
        if stored.dtype not in (FLOATS if match else DTYPES):
            raise ValueError(f"{path}: {name} is {stored.dtype}; wanted a float")
        if match:
            _check_entry(path, match[1], match[2], header, config)
        tensor = read_tensor(stored)
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: {name} holds a non-finite value")
        if match:
            found.layers.setdefault(match[1], {})[PARAMETERS[match[2]]] = tensor.float()
        elif owner:
            found.saved.setdefault(owner, {})[inner.removeprefix(f"{owner}.")] = tensor
    if not found.layers:
        raise ValueError(f"{path}: holds no tensors of an adapter")
    return found


def _check_entry(path: pathlib.Path, layer: str, parameter: str, header: dict[str, StoredTensor], config: LoRAConfig) -> None:
    """ValueError unless the parameter of a layer has the rank of the config, and the layer the parameters of its kind."""
    name, r = f"{PREFIX}{layer}.{parameter}", config.of_layer(layer).r
    shape = header[name].shape
    twin = f"{PREFIX}{layer}.{'lora_B' if parameter == 'lora_A.weight' else 'lora_A'}.weight"
    if parameter == "lora_magnitude_vector":
        fits = len(shape) == 1 and config.dora
    else:
        fits = len(shape) == 2 and shape[0 if parameter == "lora_A.weight" else 1] == r
    if not fits or twin not in header:
        raise ValueError(f"{path}: {name} has shape {shape}; wanted rank {r}, as {CONFIG} says, and {twin} too")
    if config.dora and f"{PREFIX}{layer}.lora_magnitude_vector" not in header:
        raise ValueError(f"{path}: {layer} has no lora_magnitude_vector, and {CONFIG} says use_dora")


def _check_fit(model: nn.Module, stored: StoredAdapter, config: LoRAConfig, where: str) -> None:
    """ValueError unless the model has every layer and module that the adapter is for, with the right shapes."""
    modules = dict(model.named_modules())
    for layer, tensors in stored.layers.items():
        sizes = features(modules[layer]) if layer in modules else None
        if sizes is None:
            raise ValueError(f"{where}: made for another base: this model has no linear layer {layer}")
        r = config.of_layer(layer).r
        wanted = {"lora_A": (r, sizes[0]), "lora_B": (sizes[1], r), "magnitude": (sizes[1],)}
        for key, tensor in tensors.items():
            if tensor.shape != wanted[key]:
                raise ValueError(
                    f"{where}: made for another base: {layer}.{key} is {tuple(tensor.shape)}; this model wants {wanted[key]}"
                )
    for name, tensors in stored.saved.items():
        has = {key: tensor.shape for key, tensor in modules[name].state_dict().items()} if name in modules else {}
        if has != {key: tensor.shape for key, tensor in tensors.items()}:
            raise ValueError(f"{where}: made for another base: this model has no module {name} with {', '.join(tensors)} alike")
        for key, own in modules[name].state_dict().items():
            if not bool(torch.isfinite(tensors[key].to(own.dtype)).all()):
                raise ValueError(f"{where}: {name}.{key} holds a value that is not finite in this model's {own.dtype}")
    if set(saved_modules(model, config)) != set(stored.saved):
        raise ValueError(f"{where}: modules_to_save is {list(config.modules_to_save)}; the tensors are {list(stored.saved)}")


def load_adapter(
    model: nn.Module, folder_or_repo_id: str | pathlib.Path, *, revision: str | None = None, name: str = DEFAULT
) -> AdapterReport | None:
    """Returns a report of the adapter added, or None where the model had one of that name and its weights were replaced.

    It is in use then; another one that was waits until `set_adapter` names it again.

    Args:
        model: the base the adapter was trained on, with or without adapters.
        folder_or_repo_id: a folder in PEFT's layout, or a hub id. revision: branch, tag or commit on the hub.
        name: to call it by, where the model is to have several.

    Raises:
        FileNotFoundError: a file is missing. ValueError: a damaged file, a kind of adapter that is not supported, an
            adapter made for another base, or one of that name on other layers or of another rank; the model is unchanged.

    Example:
        >>> qlite.load_adapter(model, "faq-lora/")  # doctest: +SKIP
    """
    folder = resolve_folder(folder_or_repo_id, revision=revision)
    config, values = read_config(folder)
    stored = read_tensors(folder, config)
    ours, theirs = getattr(model, "base_fingerprint", None), stored.fingerprint
    if ours and theirs and ours != theirs:
        raise ValueError(
            f"{folder}: made for another base ({values.get('base_model_name_or_path')}, fingerprint {theirs[:12]}...); "
            f"this model is {getattr(model, 'base_id', 'unknown')}, fingerprint {ours[:12]}..."
        )
    present, report = adapters_of(model), None
    with contextlib.ExitStack() as undo:
        undo.callback(set_adapter, model, present.active)
        set_adapter(model, name if name in present.adapters else None)
        _check_fit(model, stored, config, str(folder))
        if name not in present.adapters:
            report = _add(model, stored, config, name)
        elif not _alike(model, adapted_layers(model), stored, config):
            raise ValueError(
                f"{folder}: the model carries adapters on other layers or of another rank; load a fresh base, or give this "
                f"one another name than {name!r}"
            )
        undo.pop_all()
    with torch.no_grad():
        for layer, module in adapted_layers(model).items():
            module.scaling, module.dropout.p = config.of_layer(layer).scaling, config.dropout
            for key, tensor in stored.layers[layer].items():
                getattr(module, key).copy_(tensor)
        for path, tensors in stored.saved.items():
            model.get_submodule(path).load_state_dict(tensors)
    model.lora_config = config  # type: ignore[assignment]
    return report


def _add(model: nn.Module, stored: StoredAdapter, config: LoRAConfig, name: str) -> AdapterReport:
    """Adds adapters to exactly the layers of a stored one, by their names and not by the config's patterns."""
    # "^": a key also matches names that end in it.
    ranks = {f"^{re.escape(layer)}": config.of_layer(layer).r for layer in stored.layers if config.rank_pattern}
    exact = dataclasses.replace(
        config,
        targets=_expression(list(stored.layers)),
        rank_pattern=ranks,
        alpha_pattern={},
        modules_to_save=tuple(stored.saved),
    )
    return add_lora(model, exact, name=name)


def _alike(model: nn.Module, adapted: dict[str, LoRALinear], stored: StoredAdapter, config: LoRAConfig) -> bool:
    """Whether the adapters of a model are of the layers, ranks and kind of a stored one."""
    has = {n: (m.lora_A.shape[0], m.magnitude is not None) for n, m in adapted.items() if m.start_A is None}
    wanted = {layer: (config.of_layer(layer).r, config.dora) for layer in stored.layers}
    present: LoRAConfig = model.lora_config  # type: ignore[assignment]
    return has == wanted and set(saved_modules(model, present)) == set(stored.saved)

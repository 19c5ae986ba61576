"""Several adapters on one base, of which one is in the model: `set_adapter` puts another in its place.

An adapter is a module for each layer that it changes: a wrapper that holds the base's layer as `base`, or a module that is
trained whole. The model holds those of one adapter, so that whatever asks it for its modules, parameters or state (training,
saving, merging, a recorded step) finds that one alone; the others wait beside it, without the base's layers. After PEFT's
`set_adapter` and `delete_adapter`, whose layers hold all adapters at once.

Not done here: adapters that are mixed, or several at work in one batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

#: Where a model keeps its AdapterSet: a plain attribute, which neither `parameters` nor `state_dict` looks into.
ATTRIBUTE = "lora_adapters"
DEFAULT = "default"


@dataclasses.dataclass
class Adapter:
    """What an adapter puts into a model.

    Attributes:
        config: LoRAConfig. wrappers: name of a layer -> the module around it. whole: name -> the module in its place.
    """

    config: Any
    wrappers: dict[str, nn.Module]
    whole: dict[str, nn.Module]


@dataclasses.dataclass
class AdapterSet:
    """The adapters of a model.

    Attributes:
        adapters: by name. active: the name of the one that is in the model; None: the base alone.
        originals: name -> module of the base, of those whose place a module of the active adapter has.
    """

    adapters: dict[str, Adapter] = dataclasses.field(default_factory=dict)
    active: str | None = None
    originals: dict[str, nn.Module] = dataclasses.field(default_factory=dict)

    def get(self, function: str, name: str) -> Adapter:
        """Returns the adapter of a name; ValueError, for a function of that name, where there is none."""
        if name not in self.adapters:
            known = ", ".join(map(repr, self.adapters)) or "none"
            raise ValueError(f"{function}: the model has no adapter {name!r}; it has {known}")
        return self.adapters[name]


def adapters_of(model: nn.Module) -> AdapterSet:
    """Returns the adapters of a model, an empty set where it has none."""
    return getattr(model, ATTRIBUTE, None) or AdapterSet()


def insert(model: nn.Module, name: str, adapter: Adapter) -> None:
    """Gives a model without an active adapter a new one, active at once; its wrappers hold the layers already."""
    found = adapters_of(model)
    assert found.active is None and name not in found.adapters, (found.active, name)
    setattr(model, ATTRIBUTE, found)
    found.adapters[name] = adapter
    _put_in_place(model, found, name, None)


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Makes an adapter that the model has the one in use; None: the base alone. No weight is read, encoded or copied.

    The adapter in use is what the model computes with, what `lora_parameters` and `state_dict` give, and what is trained;
    an optimizer is made over its parameters after the switch. The next `generate` records its step anew.

    Args:
        model: with adapters, from add_lora or load_adapter.
        name: as given to them; "default" where none was.

    Raises:
        ValueError: the model has no adapter of that name.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> for name in ("billing", "parcels"):
        ...     report = qlite.add_lora(model, qlite.LoRAConfig(r=2), name=name)
        >>> qlite.set_adapter(model, "billing")
        >>> qlite.set_adapter(model, None)
        >>> model
        Sequential(
          (0): Linear(in_features=8, out_features=8, bias=True)
        )
    """
    found = adapters_of(model)
    if name is not None:
        found.get("set_adapter", name)
    if name == found.active:
        return
    device = _put_aside(model, found)
    if name is not None:
        _put_in_place(model, found, name, device)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Takes an adapter from the model; was it in use, the base alone is then.

    Args:
        model: with that adapter. name: as given to add_lora or load_adapter; "default" where none was.

    Raises:
        ValueError: the model has no adapter of that name.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> report = qlite.add_lora(model, qlite.LoRAConfig(r=2))
        >>> qlite.delete_adapter(model, "default")
        >>> type(model[0]).__name__
        'Linear'
    """
    found = adapters_of(model)
    found.get("delete_adapter", name)
    if name == found.active:
        _put_aside(model, found)
    del found.adapters[name]


@contextlib.contextmanager
def using(model: nn.Module, name: str | None) -> Iterator[None]:
    """The model with another adapter in use, or the base alone, and then with the one from before again."""
    before = adapters_of(model).active
    set_adapter(model, name)
    try:
        yield
    finally:
        set_adapter(model, before)


def chosen(function: str, model: nn.Module, name: str | None) -> str | None:
    """Returns the name of the adapter that a function is to take: the one asked for, else the one in use.

    Raises:
        ValueError: no adapter of that name; or none was named, none is in use, and the model has some.
    """
    found = adapters_of(model)
    if name is not None:
        found.get(function, name)
    elif found.active is None and found.adapters:
        known = ", ".join(map(repr, found.adapters))
        raise ValueError(f"{function}: no adapter is in use; name one of {known}, or choose it by set_adapter")
    return found.active if name is None else name


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _put_aside(model: nn.Module, found: AdapterSet) -> torch.device | None:
    """Gives the base's modules their places again; returns the device of the adapter that had them, None without one."""
    if found.active is None:
        return None
    adapter = found.adapters[found.active]
    device = next((p.device for wrapper in adapter.wrappers.values() for p in wrapper.parameters(recurse=False)), None)
    for path, wrapper in adapter.wrappers.items():
        _replace(model, path, wrapper.base)  # type: ignore[arg-type]
        wrapper.base = None  # type: ignore[assignment]  # which may become another layer, encoded say, meanwhile
    for path, original in found.originals.items():
        _replace(model, path, original.train(model.get_submodule(path).training))
    adapter.config = model.lora_config
    found.active, found.originals = None, {}
    del model.lora_config
    return device


def _put_in_place(model: nn.Module, found: AdapterSet, name: str, device: torch.device | None) -> None:
    """Puts the modules of an adapter where the base's are, and on the device of the one before them, or of the base."""
    adapter = found.adapters[name]
    for path, wrapper in adapter.wrappers.items():
        base = model.get_submodule(path)
        wrapper.base = base
        there = device or next(base.parameters()).device
        for tensor in (*wrapper.parameters(recurse=False), *wrapper.buffers(recurse=False)):
            tensor.data = tensor.data.to(there)
        _replace(model, path, wrapper.train(base.training))
    for path, module in adapter.whole.items():
        original = model.get_submodule(path)
        for own, its in zip((*module.parameters(), *module.buffers()), (*original.parameters(), *original.buffers())):
            own.data = own.data.to(its.device, its.dtype if its.is_floating_point() else own.dtype)
        found.originals[path] = original
        _replace(model, path, module.train(original.training))
    found.active = name
    model.lora_config = adapter.config

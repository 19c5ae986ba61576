"""A model larger than the GPU: some modules live in host memory and visit the GPU for their forward pass.

`place_model` gives every module a home by the longest prefix of its name. A module at home on the computing device stays
there. One at home on the CPU is streamed: its tensors are copied to the computing device before its forward and dropped
after it; its inputs and outputs never leave the device. What autograd would keep of a visiting tensor is the tensor at
home, copied again when the backward pass asks for it. So the device holds what is resident, one visiting module and the one
that comes next (prefetch.py), in both passes. The idea is that of parameter offloading (ZeRO-Infinity, arXiv 2104.07857,
section 5), for frozen weights, which never go back.

Not done here: homes on a second GPU or on disk, torch.compile of a streamed module, and modules that are streamed as a
block (each visits by itself).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qlite.checkpoint import check_device
from qlite.experts import ExpertStack
from qlite.lora import LoRALinear
from qlite.prefetch import Prefetch


@dataclasses.dataclass(frozen=True)
class Placement:
    """What `place_model` did; `print` it.

    Attributes:
        compute: the device of every forward pass.
        homes: name -> device, of each module with tensors of its own.
        nbytes: device -> bytes of the tensors at home there, a shared tensor counted once.
        streamed: name -> bytes of each visit, of the modules that are streamed; of a stack of experts, which come one at a
            time, of all of them.
    """

    compute: str
    homes: dict[str, str]
    nbytes: dict[str, int]
    streamed: dict[str, int]

    def __str__(self) -> str:
        lines = []
        for device, size in self.nbytes.items():
            count = sum(home == device for home in self.homes.values())
            lines.append(f"{device}: {size / 1e6:,.1f} MB in {count} modules")
        if self.streamed:
            largest = max(self.streamed, key=lambda name: self.streamed[name])
            lines.append(
                f"streamed to {self.compute}: {sum(self.streamed.values()) / 1e6:,.1f} MB a forward pass in "
                f"{len(self.streamed)} visits, the largest {self.streamed[largest] / 1e6:,.1f} MB ({largest})"
            )
        return "\n".join(lines)


def place_model(model: nn.Module, homes: Mapping[str, torch.device | str], *, compute: torch.device | str) -> Placement:
    """Returns a report, having moved each module to its home and made those that live elsewhere visit `compute`.

    Adapters always live on the computing device: they are trained. `state_dict`, `save_adapter` and copies see the tensors
    at home. A second call places anew; `place_model(model, {"": "cpu"}, compute="cpu")` ends all streaming. Later moves
    are this function's too: `model.to(...)` moves the homes and leaves the visits.

    Args:
        model: with real tensors; quantized and adapted first.
        homes: module name -> "cpu" or the computing device; the longest name that leads to a module counts, "" is the
            whole model. Under `finetune` and `generate` the token embedding's home is the computing device.
        compute: where every module computes, and where inputs are expected. On "cuda" the tensors at home on the CPU are
            pinned (PyTorch takes pinned memory in powers of two).

    Raises:
        ValueError: before anything moves: a name of no module, a module without a home, a home elsewhere, no such device,
            an empty model on meta, a trainable parameter other than an adapter's away from `compute`, a shared tensor with
            two homes, or a layer whose weight is read by the module above it (torch's own attention).

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 2))
        >>> print(qlite.place_model(model, {"": "cpu"}, compute="cpu"))
        cpu: 0.0 MB in 2 modules
    """
    target = check_device(compute)
    homes_of = _homes(model, homes, target)
    _check(model, homes_of, target)
    for module in model.modules():
        if isinstance(module, ExpertStack):
            module.elsewhere = None
        for hook in list(module._forward_pre_hooks.values()):
            visit = getattr(hook, "__self__", None)
            if isinstance(visit, _Visit):
                visit.remove()
    prefetch = Prefetch(target)
    # Those that leave the computing device first: what they free may be what the others need.
    for name, home in sorted(homes_of.items(), key=lambda item: item[1] == target):
        module = model.get_submodule(name)
        module._apply(lambda tensor, home=home: _at_home(tensor, home, target), recurse=False)
        if home != target:
            _stream(name, module, prefetch)
    return _report(model, homes_of, target)


def _stream(name: str, module: nn.Module, prefetch: Prefetch) -> None:
    """Has a module visit the computing device for its forward pass, and a stack one expert at a time, for its product."""
    if isinstance(module, ExpertStack):
        module.elsewhere = functools.partial(_expert_visits, name, prefetch)
    else:
        _Visit(name, prefetch).hook(module)


def _own(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Yields (table, key, tensor) of a module's own parameters and buffers."""
    for table in (module._parameters, module._buffers):
        for key, tensor in list(table.items()):
            if tensor is not None:
                yield table, key, tensor


def _homes(model: nn.Module, homes: Mapping[str, torch.device | str], compute: torch.device) -> dict[str, torch.device]:
    """Returns name -> home of each module with tensors of its own."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for name, home in homes.items():
        if name not in names:
            close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[1:4]
            raise ValueError(f"place_model: the model has no module {name!r}; close names: {', '.join(close)}")
        if check_device(home) not in (compute, torch.device("cpu")):
            raise ValueError(f"place_model: the home of {name!r} is {home}; wanted 'cpu' or the computing device, {compute}")
    found: dict[str, torch.device] = {}
    for name, module in model.named_modules():
        if not any(True for _ in _own(module)):
            continue
        if isinstance(module, LoRALinear):
            found[name] = compute
            continue
        prefix = name
        while prefix not in homes and prefix:
            prefix = prefix.rpartition(".")[0]
        if prefix not in homes:
            raise ValueError(f"place_model: {name or 'the model itself'} has no home; give '' one, for all that is not named")
        found[name] = check_device(homes[prefix])
    return found


def _check(model: nn.Module, homes: Mapping[str, torch.device], compute: torch.device) -> None:
    """Raises ValueError for what cannot be at home where it is to be."""
    first: dict[int, tuple[str, torch.device]] = {}
    trained = []
    for name, home in homes.items():
        module = model.get_submodule(name)
        if home != compute and isinstance(module, NonDynamicallyQuantizableLinear):
            raise ValueError(f"place_model: the weight of {name} is read by the module above it; give it {compute} as its home")
        for _, key, tensor in _own(module):
            full = f"{name}.{key}".lstrip(".")
            if tensor.device.type == "meta":
                raise ValueError(f"place_model: {full} is on meta, without values; load the model first")
            if home != compute and tensor.requires_grad:
                trained.append(full)
            other, where = first.setdefault(id(tensor), (full, home))
            if where != home:
                raise ValueError(
                    f"place_model: {full} is also {other}, at home on {where} and not on {home}; give them one home"
                )
    if trained:
        raise ValueError(
            f"place_model: {len(trained)} trained parameters away from {compute} ({', '.join(trained[:3])}), and nothing goes "
            f"back to them; freeze them (add_lora does), or give their modules {compute} as home"
        )


def _at_home(tensor: Tensor, home: torch.device, compute: torch.device) -> Tensor:
    moved = tensor.to(home)
    if home.type == "cpu" and compute.type == "cuda" and not moved.is_pinned():
        return moved.pin_memory()
    return moved


def _report(model: nn.Module, homes: Mapping[str, torch.device], compute: torch.device) -> Placement:
    nbytes: dict[str, int] = {}
    streamed: dict[str, int] = {}
    seen: set[int] = set()
    for name, home in homes.items():
        own = [tensor for _, _, tensor in _own(model.get_submodule(name))]
        new = {id(tensor): tensor.nbytes for tensor in own if id(tensor) not in seen}
        seen.update(new)
        nbytes[str(home)] = nbytes.get(str(home), 0) + sum(new.values())
        if home != compute:
            streamed[name] = sum(tensor.nbytes for tensor in own)
    return Placement(str(compute), {name: str(home) for name, home in homes.items()}, nbytes, streamed)


@dataclasses.dataclass(frozen=True)
class _Away:
    """What autograd keeps in place of a visiting tensor: the one at home, and how the kept one looked at its memory."""

    visit: _Visit
    key: str
    home: Tensor
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _come_again(kept: Tensor | _Away) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    copy = kept.visit.prefetch.fetch(kept.visit.name, kept.key, kept.home, again=True)
    return copy.as_strided(kept.size, kept.stride, kept.offset)


class _Visit:
    """The hooks of one streamed module: its tensors arrive before its forward and are gone after it, also if it fails."""

    def __init__(self, name: str, prefetch: Prefetch):
        self.name, self.prefetch, self.compute = name, prefetch, prefetch.device
        self.handles: list[Any] = []
        #: Of the forward pass under way: (table, key, tensor at home, visiting tensor, its version).
        self.visiting: list[tuple[dict[str, Any], str, Tensor, Tensor, int]] = []
        self.saving: saved_tensors_hooks | None = None

    def hook(self, module: nn.Module) -> None:
        before = module.register_forward_pre_hook(self.arrive, prepend=True, with_kwargs=True)
        after = module.register_forward_hook(self.leave, always_call=True)
        self.handles = [before, after]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def arrive(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.device != self.compute:
                raise ValueError(f"{self.name} computes on {self.compute}, its input is on {value.device}; move it there")
        for table, key, home in _own(module):
            visitor = self.prefetch.fetch(self.name, key, home)
            if table is module._parameters:
                visitor = nn.Parameter(visitor, requires_grad=False)
            table[key] = visitor
            self.visiting.append((table, key, home, visitor, _version(visitor)))
        self.saving = saved_tensors_hooks(self.keep, _come_again)
        self.saving.__enter__()

    def keep(self, tensor: Tensor) -> Tensor | _Away:
        for _, key, home, visitor, _ in self.visiting:
            if tensor.untyped_storage() is visitor.untyped_storage() and tensor.dtype == visitor.dtype:
                return _Away(self, key, home, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return tensor

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.saving is not None:
            self.saving.__exit__()
        visiting, self.visiting, self.saving = self.visiting, [], None
        for table, key, home, _, _ in visiting:
            table[key] = home
        changed = [key for _, key, _, visitor, version in visiting if _version(visitor) != version]
        if changed:
            raise RuntimeError(
                f"{self.name}: its forward wrote to {', '.join(changed)}, which only visited {self.compute}: the change is "
                f"lost. Give the module {self.compute} as its home"
            )


def _expert_visits(name: str, prefetch: Prefetch, index: int, layer: Any, x: Tensor) -> Tensor:
    """Returns what the layer of one expert makes of x, having brought it for that."""
    visit = _Visit(f"{name}.{index}", prefetch)
    try:
        visit.arrive(layer, (x,), {})
        return layer(x)
    finally:
        visit.leave(layer, (x,), None)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version

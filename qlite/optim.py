"""AdamW with 8-bit moments, resident on the device or paged to the host: one step, two homes for the state.

Both moments are kept as dynamic 8-bit codes with one float32 absmax per block of 256 (Dettmers et al., "8-bit
Optimizers via Block-wise Quantization", arXiv 2110.02861): 2.03 bytes a parameter instead of 8. Small tensors keep float32
moments. The update itself is in adamw_8bit.py; what is resident is stepped by one call of the op (model_ops.py) for all
tensors of a device, dtype and block size, whatever their groups, and what is paged by one for each piece.

Non-finite gradients: nothing is read back from the device to look for them. A block (for float32 moments: an element)
whose new moments would not be finite keeps its parameters and moments as they are, so that no NaN is ever stored; to
skip the whole step is the training loop's part.

Not done: AMSGrad, sparse gradients, float64 and complex parameters, stochastic rounding of bf16 parameters, capture of
a step in a CUDA graph (`step` and the settings are Python numbers: they reach the GPU by a copy with each step).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import qlite.model_ops  # noqa: F401  declares the ops
from qlite import moments
from qlite.adamw_8bit import AdamWRule, flattened
from qlite.moments import (
    DTYPES,
    SETTINGS,
    SIGNED_ZERO_CODE,
    Layout,
    check_dtype,
    check_scale,
    check_settings,
    check_state,
    layout_of,
    resident,
)
from qlite.paging import PagedBuffer, Pager, Piece

#: Elements of a piece of paged state at most. Over PCIe, at 50 GB/s, a piece takes 0.34 ms each way. In that time the host
#: must queue the copies, events and launch of the next: with much less it could not keep up. More would gain nothing and take
#: memory: three pieces are on the device at a time, and the first to arrive and the last to leave overlap with nothing. Not
#: quite 2^23: encoded, a piece just fits 16 MiB, and PyTorch takes pinned memory in powers of two.
CHUNK = 63 * 2**17


class _EncodedAdamW(Optimizer, ABC):
    """What both optimizers share: groups, the step, and state that no load casts. The home of the state is theirs.

    Attributes:
        grad_scale: None, or a float32 tensor of one element on the parameters' device, by which `step` multiplies every
            gradient as it reads it, in float32: clipping, or undoing the scale of a loss, without a pass over the gradients
            and without waiting for the device. It stays until it is set again, and no state_dict holds it. (torch's fused
            optimizers divide by their attribute of this name.)
    """

    grad_scale: Tensor | None = None

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        block_size: int = 256,
        min_8bit_size: int = 4096,
    ) -> None:
        values = (lr, betas, eps, weight_decay, block_size, min_8bit_size)
        super().__init__(params, dict(zip(SETTINGS, values, strict=True)))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Returns nothing; adds a group, with its own settings where it names them.

        Raises:
            ValueError: a setting is out of range, or a parameter stands twice in the group or in another group.
            TypeError: a parameter is not float32, bfloat16 or float16.
        """
        if isinstance(param_group, dict) and isinstance(param_group.get("params"), Iterable):
            check_settings({**self.defaults, **param_group}, type(self).__name__)
            if not isinstance(param_group["params"], Tensor | set):
                param_group["params"] = list(param_group["params"])
                self._check_params(param_group["params"])
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns what the closure returned, or None; updates every parameter that has a gradient.

        Args:
            closure: evaluates the loss again and returns it, under enabled gradients.

        Raises:
            ValueError: a gradient is sparse, or grad_scale has not one element. TypeError: a parameter has changed to a
            dtype not offered, or grad_scale is not a float32 tensor. All before any parameter is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_scale(self.grad_scale, type(self).__name__)
        work = []
        for index, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                if param.grad is not None:
                    self._check_gradient(index, position, param)
                    work.append((group, param))
        # All state is allocated before the first parameter changes: running out of memory there loses nothing.
        self._settle(work)
        rules: dict[tuple[int, int], AdamWRule] = {}  # most parameters have one in common
        items = [_Work.of(group, param, self.state[param], rules) for group, param in work]
        self._update(items)
        for item in items:
            item.finish()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Returns {"state", "param_groups"}: tensors, and numbers that JSON can hold.

        For each parameter `step` (an int), `exp_avg` and `exp_avg_sq` of its shape (uint8 codes, or float32 for small
        tensors), and with codes also `exp_avg_absmax` and `exp_avg_sq_absmax` (float32, one for each block). As in
        torch, resident tensors are those in use, not copies. The home of the state is not part of it: what a resident
        optimizer saved a paged one can load, and the other way round.
        """
        self._come_home()
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns nothing; takes the state over bit for bit, copied to where this optimizer keeps its state.

        torch's own would cast the float32 absmax of a bfloat16 parameter, and take paged state to the device.

        Raises:
            ValueError: the groups or the parameters are of other sizes, or the state is not of this kind of optimizer.
                The optimizer is then as it was.
        """
        held = {index: _Held(state) for index, state in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": held})

    def __getstate__(self) -> dict[str, Any]:
        self._come_home()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        groups = state["param_groups"]
        group_of = {id(param): group for group in groups for param in group["params"]}
        for group in groups:
            check_settings(group, f"{type(self).__name__}.load_state_dict")
            group["betas"] = tuple(group["betas"])
        loaded = {}
        for param, entry in state["state"].items():
            entry = entry.state if isinstance(entry, _Held) else entry
            if id(param) not in group_of:
                raise ValueError(f"{type(self).__name__}: the state has an entry {param!r} for no parameter of a group")
            if entry:
                check_state(param, entry, group_of[id(param)])
                loaded[param] = entry
        self._come_home()
        super().__setstate__({**state, "state": defaultdict(dict)})
        self._forget()
        self._place([(param, entry, layout_of(entry)) for param, entry in loaded.items()])

    def _check_params(self, params: list[Any]) -> None:
        """Raises if a parameter has a dtype not offered or stands twice; leaves other oddities to torch."""
        tensors = [param[1] if isinstance(param, tuple) else param for param in params]
        for position, param in enumerate(tensors):
            if isinstance(param, Tensor):
                where = f"parameter {position} of group {len(self.param_groups)}, shape {tuple(param.shape)}"
                check_dtype(param, where)
        if len({id(param) for param in tensors}) < len(tensors):
            raise ValueError(
                f"{type(self).__name__}: group {len(self.param_groups)} names a parameter twice; wanted each one once "
                "(a tied weight is one parameter)"
            )

    def _check_gradient(self, index: int, position: int, param: Tensor) -> None:
        """Raises if a parameter has changed to a dtype not offered, or its gradient is sparse."""
        assert param.grad is not None
        if param.dtype in DTYPES and param.grad.layout == torch.strided:
            return
        where = f"parameter {position} of group {index}, shape {tuple(param.shape)}"
        check_dtype(param, where)
        raise ValueError(
            f"{type(self).__name__}: the gradient of {where} is {param.grad.layout}; wanted a dense one. "
            "Build the embedding with sparse=False, or give it torch.optim.SparseAdam"
        )

    def _settle(self, work: list[tuple[dict[str, Any], Tensor]]) -> None:
        """Makes sure that the state of each parameter exists and is where the parameter wants it."""
        homeless: list[tuple[Tensor, Mapping[str, Any], Layout]] = []
        for group, param in work:
            state = self.state[param]
            if not state:
                encoded = param.numel() >= group["min_8bit_size"]
                homeless.append((param, {"step": 0}, moments.layout(param, group["block_size"], encoded=encoded)))
            elif state["exp_avg"].shape != param.shape:
                raise ValueError(
                    f"{type(self).__name__}: a parameter has the shape {tuple(param.shape)}, its state "
                    f"{tuple(state['exp_avg'].shape)}; wanted the shape it had at its first step"
                )
            elif not self._is_home(param):
                homeless.append((param, dict(state), layout_of(state)))
        if homeless:
            self._come_home()
            self._place(homeless)

    def _place(self, entries: list[tuple[Tensor, Mapping[str, Any], Layout]]) -> None:
        """Gives parameters states of their own: bitwise copies of the entries' tensors, zeros where they have none."""
        homes = self._allocate([(param, layout) for param, _, layout in entries])
        for (param, entry, layout), tensors in zip(entries, homes, strict=True):
            for name in layout:
                if name in entry:
                    tensors[name].copy_(entry[name])
                elif name == "exp_avg" and tensors[name].dtype == torch.uint8:
                    tensors[name].fill_(SIGNED_ZERO_CODE)
            self.state[param] = {"step": int(entry["step"]), **{name: tensors[name] for name in layout}}

    @abstractmethod
    def _allocate(self, wanted: list[tuple[Tensor, Layout]]) -> list[dict[str, Tensor]]:
        """Returns zeros for the state of each parameter, in the home of its state."""

    @abstractmethod
    def _is_home(self, param: Tensor) -> bool:
        """Returns whether the state of a parameter is where `_allocate` would put it today."""

    @abstractmethod
    def _update(self, work: list[_Work]) -> None:
        """Makes one step for each item."""

    def _come_home(self) -> None:
        """Blocks until the state may be read by the host. Resident state may be read at any time."""

    def _forget(self) -> None:
        """Drops what is held beside `self.state`."""


class AdamW8bit(_EncodedAdamW):
    """AdamW whose moments take 2.03 bytes a parameter, on the parameter's device.

    Args:
        params: parameters, (name, parameter) pairs or groups, as for every torch optimizer; float32, bfloat16, float16.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`; the weights decay before the update.
        block_size: elements per absmax.
        min_8bit_size: tensors with fewer elements keep float32 moments. A group may set its own.

    Raises:
        ValueError: a setting is out of range. TypeError: a parameter has another dtype.

    Source: arXiv 2110.02861; see the head of this file for what differs.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = qlite.AdamW8bit([weight], lr=0.1, weight_decay=0.0)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> round(weight[0, 0].item(), 4), optimizer.state[weight]["exp_avg"].dtype
        (0.9, torch.uint8)
    """

    def _allocate(self, wanted: list[tuple[Tensor, Layout]]) -> list[dict[str, Tensor]]:
        return [resident(param, layout) for param, layout in wanted]

    def _is_home(self, param: Tensor) -> bool:
        return self.state[param]["exp_avg"].device == param.device

    def _update(self, work: list[_Work]) -> None:
        _advance([item.part(item.state) for item in work], self.grad_scale)


class PagedAdamW8bit(_EncodedAdamW):
    """AdamW8bit whose state lives in host memory and visits the device during the step; the same bits come out.

    The host memory is pinned if the parameter is on a CUDA device. Tensors of one device and dtype that have their first
    step together share pieces of up to 8 million elements, each copied as a whole; larger ones are cut into such pieces. At
    most three pieces are on the device at a time, 50 MB, and none between steps. Read `optimizer.state` directly only
    after `state_dict()`, which waits for the last copies.

    Args:
        page_above: tensors with more elements than this are paged, the others are resident. 0 pages every tensor.
        The other arguments are those of `AdamW8bit`.

    Raises:
        ValueError: a setting is out of range. TypeError: a parameter has another dtype.

    Source: QLoRA (arXiv 2305.14314), section 3, "Paged Optimizers"; copies instead of managed memory are ours.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(64, 64))
        >>> optimizer = qlite.PagedAdamW8bit([weight], lr=0.1)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> optimizer.paged_bytes
        8320
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        block_size: int = 256,
        min_8bit_size: int = 4096,
        page_above: int = 0,
    ) -> None:
        if not isinstance(page_above, int) or page_above < 0:
            raise ValueError(f"PagedAdamW8bit: page_above is {page_above!r}; wanted a number of elements, 0 or more")
        self.page_above = page_above
        self._pages: dict[Tensor, _Page] = {}
        self._pagers: dict[torch.device, Pager] = {}
        super().__init__(params, lr, betas, eps, weight_decay, block_size=block_size, min_8bit_size=min_8bit_size)

    @property
    def paged_bytes(self) -> int:
        """The bytes of state whose home is host memory; 0 before the first step."""
        return sum(value.nbytes for page in self._pages.values() for value in page.tensors().values())

    def state_dict(self) -> dict[str, Any]:
        """Returns what AdamW8bit returns, the paged tensors copied: torch.save takes no two dtypes out of one memory."""
        state = super().state_dict()
        paged = {id(tensor) for page in self._pages.values() for tensor in page.tensors().values()}
        for index, entry in state["state"].items():
            state["state"][index] = {key: value.clone() if id(value) in paged else value for key, value in entry.items()}
        return state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "page_above": self.page_above}

    def _allocate(self, wanted: list[tuple[Tensor, Layout]]) -> list[dict[str, Tensor]]:
        # What shares a buffer is stepped in one launch.
        runs: list[list[tuple[Tensor, Layout]]] = []
        open_runs: dict[Any, tuple[list[tuple[Tensor, Layout]], int]] = {}
        for param, layout in wanted:
            self._pages.pop(param, None)
            if param.numel() > self.page_above:
                kind = (param.device, param.dtype, "exp_avg_absmax" in layout)
                run, size = open_runs.get(kind, ([], CHUNK))
                if size + param.numel() > CHUNK:
                    run, size = [], 0
                    runs.append(run)
                run.append((param, layout))
                open_runs[kind] = (run, size + param.numel())
        for run in runs:
            layout = {f"{number}.{name}": value for number, (_, of) in enumerate(run) for name, value in of.items()}
            buffer = PagedBuffer(layout, run[0][0].device)
            self._pages |= {param: _Page(buffer, number, tuple(of)) for number, (param, of) in enumerate(run)}
        return [self._pages[param].tensors() if param in self._pages else resident(param, layout) for param, layout in wanted]

    def _is_home(self, param: Tensor) -> bool:
        page = self._pages.get(param)
        return (self.state[param]["exp_avg"] if page is None else page.buffer).device == param.device

    def _update(self, work: list[_Work]) -> None:
        _advance([item.part(item.state) for item in work if item.key not in self._pages], self.grad_scale)
        paged: dict[torch.device, dict[int, list[_Work]]] = {}
        for item in work:
            if item.key in self._pages:
                buffers = paged.setdefault(item.key.device, {})
                buffers.setdefault(id(self._pages[item.key].buffer), []).append(item)
        for device, buffers in paged.items():
            self._update_paged(device, list(buffers.values()))

    def _update_paged(self, device: torch.device, shared: list[list[_Work]]) -> None:
        """Steps the items of one device, given by the buffer that they share."""
        pieces: list[Piece] = []
        work: list[tuple[list[_Work], tuple[int, int] | None]] = []  # of each piece, and which elements if not all
        for items in shared:
            page = self._pages[items[0].key]
            chunks = list(items[0].chunks())
            if len(items) > 1 or len(chunks) < 2:
                pieces.append(Piece(page.buffer))
                work.append((items, None))
                continue
            for start, stop in chunks:
                ranges = {page.key(name): part for name, part in items[0].ranges(start, stop).items()}
                pieces.append(Piece(page.buffer, ranges))
                work.append((items, (start, stop)))
        if device not in self._pagers:
            self._pagers[device] = Pager(device)
        for index, tensors in self._pagers[device].visits(pieces):
            items, elements = work[index]
            _advance([item.part(self._pages[item.key].tensors(tensors), elements) for item in items], self.grad_scale)

    def _come_home(self) -> None:
        for pager in self.__dict__.get("_pagers", {}).values():
            pager.synchronize()

    def _forget(self) -> None:
        self._pages = {}
        self._pagers = {}


@dataclass(frozen=True)
class _Page:
    """Where the state of a parameter is in a buffer that it may share with others: its number there, and its names."""

    buffer: PagedBuffer
    number: int
    names: tuple[str, ...]

    def key(self, name: str) -> str:
        """Returns what the buffer calls a tensor."""
        return f"{self.number}.{name}"

    def tensors(self, visitors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Returns the state by its names: on the host, or among the tensors of a visit."""
        found = self.buffer.tensors if visitors is None else visitors
        return {name: found[self.key(name)] for name in self.names}


@dataclass(frozen=True)
class _Part:
    """Some consecutive elements of one parameter and of its gradient, contiguous, with their state."""

    param: Tensor
    grad: Tensor
    state: Mapping[str, Any]
    work: _Work


@dataclass(frozen=True)
class _Work:
    """One parameter's step: the parameter and its gradient (copies where they are not contiguous), and the numbers."""

    key: Tensor
    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    rule: AdamWRule
    block_size: int

    @classmethod
    def of(cls, group: dict[str, Any], param: Tensor, state: dict[str, Any], rules: dict[tuple[int, int], AdamWRule]) -> _Work:
        """Returns the work for a parameter, and counts its step; `rules` holds those made so far, by group and step."""
        state["step"] += 1
        which = (id(group), state["step"])
        if which not in rules:
            beta1, beta2 = group["betas"]
            rules[which] = AdamWRule(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], state["step"])
        assert param.grad is not None
        return cls(param, param.contiguous(), param.grad.contiguous(), state, rules[which], group["block_size"])

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yields (start, stop) of runs of whole blocks."""
        length = max(CHUNK // self.block_size, 1) * self.block_size
        for start in range(0, self.param.numel(), length):
            yield start, min(start + length, self.param.numel())

    def ranges(self, start: int, stop: int) -> dict[str, tuple[int, int]]:
        """Returns for each tensor of the state the part that belongs to elements start to stop."""
        blocks = (start // self.block_size, -(-stop // self.block_size))
        names = [name for name in self.state if name != "step"]
        return {name: blocks if name.endswith("_absmax") else (start, stop) for name in names}

    def part(self, state: Mapping[str, Any], elements: tuple[int, int] | None = None) -> _Part:
        """Returns elements start to stop, or all, with their state."""
        if elements is None:
            return _Part(self.param, self.grad, state, self)
        return _Part(self.param.view(-1)[slice(*elements)], self.grad.view(-1)[slice(*elements)], state, self)

    def finish(self) -> None:
        """Writes the parameter back if it is a copy."""
        if self.param is not self.key:
            self.key.copy_(self.param)


def _advance(parts: list[_Part], grad_scale: Tensor | None) -> None:
    """Steps the parts, by one call of an op for those of one device, both dtypes, and block size (0: float32 moments)."""
    alike: dict[tuple[torch.device, torch.dtype, torch.dtype, int], list[_Part]] = {}
    for part in parts:
        block_size = part.work.block_size if "exp_avg_absmax" in part.state else 0
        alike.setdefault((part.param.device, part.param.dtype, part.grad.dtype, block_size), []).append(part)
    for (device, _, _, block_size), some in alike.items():
        tensors = [[part.param for part in some], [part.grad for part in some]]
        names = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")[: 4 if block_size else 2]
        tensors += [[part.state[name] for part in some] for name in names]
        rules = flattened([part.work.rule for part in some])
        scale = None if grad_scale is None else grad_scale.to(device, non_blocking=True)
        if block_size:
            torch.ops.qlite.adamw_8bit_(*tensors, rules, scale, block_size)
        else:
            torch.ops.qlite.adamw_(*tensors, rules, scale)


class _Held:
    """Carries one parameter's state through torch's load_state_dict, which casts the tensors that it recognises."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

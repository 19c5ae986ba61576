"""AdamW with 8-bit moments, resident on the device or paged to the host: one step, two homes for the state.

Both moments are kept as dynamic 8-bit codes with one float32 absmax per block of 256 (Dettmers et al., "8-bit
Optimizers via Block-wise Quantization", arXiv 2110.02861): 2.03 bytes a parameter instead of 8. The update itself is in
adamw_8bit.py. Small tensors keep float32 moments.

Non-finite gradients: nothing is read back from the device to look for them. A block (for float32 moments: an element)
whose new moments would not be finite keeps its parameters and moments as they are, so that no NaN is ever stored; to
skip the whole step is the training loop's part.

Not done: AMSGrad, sparse gradients, float64 and complex parameters, stochastic rounding of bf16 parameters, capture of
a step in a CUDA graph (`step` is a Python number).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from qlite.adamw_8bit import AdamWRule, adamw_8bit_step, adamw_step
from qlite.paging import PagedBuffer, Pager, Piece

#: Elements updated at a time: the float32 temporaries of one chunk take about 50 MB.
CHUNK = 2**20
#: The code of 0.0 in the signed table.
SIGNED_ZERO_CODE = 127
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SETTINGS = ("lr", "betas", "eps", "weight_decay", "block_size", "min_8bit_size")
#: For each name of a parameter's state its shape and dtype.
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class _EncodedAdamW(Optimizer, ABC):
    """What both optimizers share: groups, the step, and state that no load casts. The home of the state is theirs."""

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
            _check_settings({**self.defaults, **param_group}, type(self).__name__)
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
            ValueError: a gradient is sparse. TypeError: a parameter has changed to a dtype not offered. Both before any
            parameter is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        for index, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                where = f"parameter {position} of group {index}, shape {tuple(param.shape)}"
                _check_dtype(param, where)
                if param.grad.layout != torch.strided:
                    raise ValueError(
                        f"{type(self).__name__}: the gradient of {where} is {param.grad.layout}; wanted a dense one. "
                        "Build the embedding with sparse=False, or give it torch.optim.SparseAdam"
                    )
                work.append((group, param))
        # All state is allocated before the first parameter changes: running out of memory there loses nothing.
        for group, param in work:
            self._settle(group, param)
        items = [_Work.of(group, param, self.state[param]) for group, param in work]
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
            _check_settings(group, f"{type(self).__name__}.load_state_dict")
            group["betas"] = tuple(group["betas"])
        loaded = {}
        for param, entry in state["state"].items():
            entry = entry.state if isinstance(entry, _Held) else entry
            if id(param) not in group_of:
                raise ValueError(f"{type(self).__name__}: the state has an entry {param!r} for no parameter of a group")
            if entry:
                _check_state(param, entry, group_of[id(param)])
                loaded[param] = entry
        self._come_home()
        super().__setstate__({**state, "state": defaultdict(dict)})
        self._forget()
        for param, entry in loaded.items():
            self._place(param, entry)

    def _check_params(self, params: list[Any]) -> None:
        """Raises if a parameter has a dtype not offered or stands twice; leaves other oddities to torch."""
        tensors = [param[1] if isinstance(param, tuple) else param for param in params]
        for position, param in enumerate(tensors):
            if isinstance(param, Tensor):
                where = f"parameter {position} of group {len(self.param_groups)}, shape {tuple(param.shape)}"
                _check_dtype(param, where)
        if len({id(param) for param in tensors}) < len(tensors):
            raise ValueError(
                f"{type(self).__name__}: group {len(self.param_groups)} names a parameter twice; wanted each one once "
                "(a tied weight is one parameter)"
            )

    def _settle(self, group: dict[str, Any], param: Tensor) -> None:
        """Makes sure that the state of a parameter exists and is where the parameter wants it."""
        state = self.state[param]
        if not state:
            encoded = param.numel() >= group["min_8bit_size"]
            self._place(param, {"step": 0}, _layout(param, group["block_size"], encoded=encoded))
        elif state["exp_avg"].shape != param.shape:
            raise ValueError(
                f"{type(self).__name__}: a parameter has the shape {tuple(param.shape)}, its state "
                f"{tuple(state['exp_avg'].shape)}; wanted the shape it had at its first step"
            )
        elif not self._is_home(param):
            self._come_home()
            self._place(param, dict(state))

    def _place(self, param: Tensor, entry: Mapping[str, Any], layout: Layout | None = None) -> None:
        """Gives a parameter a state of its own: zeros by a layout, or a bitwise copy of the entry's tensors."""
        values = {name: value for name, value in entry.items() if name != "step"}
        layout = layout or {name: (value.shape, value.dtype) for name, value in values.items()}
        tensors = self._allocate(param, layout)
        for name, tensor in tensors.items():
            if name in values:
                tensor.copy_(values[name])
            elif name == "exp_avg" and tensor.dtype == torch.uint8:
                tensor.fill_(SIGNED_ZERO_CODE)
        self.state[param] = {"step": int(entry["step"]), **{name: tensors[name] for name in layout}}

    @abstractmethod
    def _allocate(self, param: Tensor, layout: Layout) -> dict[str, Tensor]:
        """Returns zeros for the state of a parameter, in the home of its state."""

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

    def _allocate(self, param: Tensor, layout: Layout) -> dict[str, Tensor]:
        return _resident(param, layout)

    def _is_home(self, param: Tensor) -> bool:
        return self.state[param]["exp_avg"].device == param.device

    def _update(self, work: list[_Work]) -> None:
        for item in work:
            item.update_resident()


class PagedAdamW8bit(_EncodedAdamW):
    """AdamW8bit whose state lives in host memory and visits the device during the step; the same bits come out.

    The host memory is pinned if the parameter is on a CUDA device. At most three chunks of about a million elements are
    on the device at a time, and none between steps. Read `optimizer.state` directly only after `state_dict()`, which
    waits for the last copies.

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
        self._buffers: dict[Tensor, PagedBuffer] = {}
        self._pagers: dict[torch.device, Pager] = {}
        super().__init__(params, lr, betas, eps, weight_decay, block_size=block_size, min_8bit_size=min_8bit_size)

    @property
    def paged_bytes(self) -> int:
        """The bytes of state whose home is host memory; 0 before the first step."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def state_dict(self) -> dict[str, Any]:
        """Returns what AdamW8bit returns, the paged tensors copied: torch.save takes no two dtypes out of one memory."""
        state = super().state_dict()
        paged = {id(tensor) for buffer in self._buffers.values() for tensor in buffer.tensors.values()}
        for index, entry in state["state"].items():
            state["state"][index] = {key: value.clone() if id(value) in paged else value for key, value in entry.items()}
        return state

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "page_above": self.page_above}

    def _allocate(self, param: Tensor, layout: Layout) -> dict[str, Tensor]:
        if param.numel() <= self.page_above:
            return _resident(param, layout)
        self._buffers[param] = PagedBuffer(layout, param.device)
        return self._buffers[param].tensors

    def _is_home(self, param: Tensor) -> bool:
        buffer = self._buffers.get(param)
        return (self.state[param]["exp_avg"] if buffer is None else buffer).device == param.device

    def _update(self, work: list[_Work]) -> None:
        paged: dict[torch.device, list[_Work]] = {}
        for item in work:
            if item.key in self._buffers:
                paged.setdefault(item.key.device, []).append(item)
            else:
                item.update_resident()
        for device, items in paged.items():
            self._update_paged(device, items)

    def _update_paged(self, device: torch.device, items: list[_Work]) -> None:
        chunks = [(item, start, stop) for item in items for start, stop in item.chunks()]
        pieces = []
        for item, start, stop in chunks:
            whole = stop - start == item.param.numel()
            pieces.append(Piece(self._buffers[item.key], None if whole else item.ranges(start, stop)))
        if device not in self._pagers:
            self._pagers[device] = Pager(device)
        for index, state in self._pagers[device].visits(pieces):
            item, start, stop = chunks[index]
            item.update(start, stop, state)

    def _come_home(self) -> None:
        for pager in self.__dict__.get("_pagers", {}).values():
            pager.synchronize()

    def _forget(self) -> None:
        self._buffers = {}
        self._pagers = {}


@dataclass(frozen=True)
class _Work:
    """One parameter's step: the parameter and its gradient seen flat (copied if not contiguous), and the numbers."""

    key: Tensor
    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    rule: AdamWRule
    block_size: int

    @classmethod
    def of(cls, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> _Work:
        """Returns the work for a parameter, and counts its step."""
        state["step"] += 1
        beta1, beta2 = group["betas"]
        rule = AdamWRule(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], state["step"])
        assert param.grad is not None
        return cls(param, param.reshape(-1), param.grad.reshape(-1), state, rule, group["block_size"])

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

    def update(self, start: int, stop: int, state: Mapping[str, Tensor]) -> None:
        """Steps elements start to stop, whose state is given as flat tensors."""
        param, grad = self.param[start:stop], self.grad[start:stop]
        if "exp_avg_absmax" in state:
            adamw_8bit_step(param, grad, **state, rule=self.rule, block_size=self.block_size)
        else:
            adamw_step(param, grad, **state, rule=self.rule)

    def update_resident(self) -> None:
        """Steps all elements with the state that is on the device."""
        for start, stop in self.chunks():
            ranges = self.ranges(start, stop)
            self.update(start, stop, {name: self.state[name].view(-1)[slice(*ranges[name])] for name in ranges})

    def finish(self) -> None:
        """Writes the parameter back if it could not be seen flat in its own memory."""
        if self.param.data_ptr() != self.key.data_ptr():
            self.key.copy_(self.param.view(self.key.shape))


class _Held:
    """Carries one parameter's state through torch's load_state_dict, which casts the tensors that it recognises."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state


def _layout(param: Tensor, block_size: int, *, encoded: bool) -> Layout:
    """Returns what the state of a parameter looks like, apart from its step."""
    shape = tuple(param.shape)
    if not encoded:
        return {"exp_avg": (shape, torch.float32), "exp_avg_sq": (shape, torch.float32)}
    blocks = (-(-param.numel() // block_size),)
    return {
        "exp_avg": (shape, torch.uint8),
        "exp_avg_absmax": (blocks, torch.float32),
        "exp_avg_sq": (shape, torch.uint8),
        "exp_avg_sq_absmax": (blocks, torch.float32),
    }


def _resident(param: Tensor, layout: Layout) -> dict[str, Tensor]:
    return {name: torch.zeros(shape, dtype=dtype, device=param.device) for name, (shape, dtype) in layout.items()}


def _check_dtype(param: Tensor, where: str) -> None:
    if param.dtype not in DTYPES:
        raise TypeError(
            f"8-bit AdamW: {where}, is {param.dtype}; wanted float32, bfloat16 or float16. Use torch.optim.AdamW for it"
        )


def _check_settings(group: Mapping[str, Any], who: str) -> None:
    """Raises ValueError for a setting that is missing or out of range."""
    missing = [name for name in SETTINGS if name not in group]
    if missing:
        raise ValueError(f"{who}: a group has no {', '.join(missing)}; wanted the state of AdamW8bit or PagedAdamW8bit")
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{who}: {name} is {value!r}; wanted a finite number, 0 or more")
    betas = group["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{who}: betas are {betas!r}; wanted two numbers, 0 <= beta < 1")
    for name, least in (("block_size", 1), ("min_8bit_size", 0)):
        value = group[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{who}: {name} is {value!r}; wanted a whole number, {least} or more")


def _check_state(param: Tensor, entry: Mapping[str, Any], group: Mapping[str, Any]) -> None:
    """Raises ValueError for a loaded state that does not fit its parameter."""
    encoded = "exp_avg_absmax" in entry
    layout = _layout(param, group["block_size"], encoded=encoded)
    if set(entry) != {"step", *layout}:
        raise ValueError(
            f"8-bit AdamW: a loaded state holds {sorted(entry)}; wanted {sorted(['step', *layout])}, as AdamW8bit or "
            "PagedAdamW8bit saves them"
        )
    for name, (shape, dtype) in layout.items():
        value = entry[name]
        if tuple(value.shape) != shape or value.dtype != dtype:
            raise ValueError(
                f"8-bit AdamW: the loaded {name} of a parameter of shape {tuple(param.shape)} is {value.dtype} "
                f"{tuple(value.shape)}; wanted {dtype} {shape}"
            )
    if int(entry["step"]) < 0:
        raise ValueError(f"8-bit AdamW: the loaded step is {entry['step']}; wanted 0 or more")

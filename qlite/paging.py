"""Memory that lives on the host and visits the device: pinned buffers, explicit copies, side streams.

The idea is that of paged optimizers (QLoRA, arXiv 2305.14314, section 3): optimizer state is touched once a step, so
its home may be host memory. Here the pages are moved by hand. While one piece is being used, the next one arrives on
one stream and the previous one goes home on another, so that copies in both directions overlap with the arithmetic.

Not done: CUDA managed memory, as bitsandbytes uses it. The driver moves such pages on demand, without overlap, and a
program that manages more of it than the card holds can hang the machine. Nor is anything kept on the device from one
call to the next: between two steps the device memory belongs to the activations.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: One piece arrives, one is in use, one goes home.
SLOTS = 3


class PagedBuffer:
    """Host memory for a few named tensors, in one run of bytes; pinned when it is to visit a CUDA device.

    Args:
        layout: for each name the shape and dtype of a tensor. Wider dtypes are stored first: no byte is padding.
        device: the device that the buffer will visit.

    Attributes:
        bytes: uint8 (nbytes,), host memory, zeros at first. (PyTorch takes pinned memory in powers of two.)
        tensors: for each name a view into `bytes` of the shape and dtype asked for. Read and write them only while no
            visit is under way (`Pager.synchronize`).
    """

    def __init__(self, layout: Mapping[str, tuple[Sequence[int], torch.dtype]], device: torch.device) -> None:
        names = sorted(layout, key=lambda name: -layout[name][1].itemsize)
        sizes = {name: math.prod(layout[name][0]) * layout[name][1].itemsize for name in names}
        self.device = device
        self.bytes = _host_zeros(sum(sizes.values()), device)
        self.tensors: dict[str, Tensor] = {}
        offset = 0
        for name in names:
            shape, dtype = layout[name]
            self.tensors[name] = self.bytes[offset : offset + sizes[name]].view(dtype).view(tuple(shape))
            offset += sizes[name]

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors together."""
        return self.bytes.numel()


@dataclass(frozen=True)
class Piece:
    """The part of a buffer that makes one visit.

    Args:
        buffer: whose tensors these are.
        ranges: for each name (start, stop) among its flattened elements; None means all of the buffer, in one copy.
    """

    buffer: PagedBuffer
    ranges: Mapping[str, tuple[int, int]] | None = None

    def parts(self) -> dict[str, Tensor]:
        """Returns the host memory of each name as a flat view, in the order of storage."""
        flat = {name: tensor.view(-1) for name, tensor in self.buffer.tensors.items()}
        if self.ranges is None:
            return flat
        return {name: flat[name][slice(*self.ranges[name])] for name in flat if name in self.ranges}


class Pager:
    """Takes pieces of host buffers to one device and back, the next one arriving while the present one is in use.

    On a device that is not CUDA the same copies are made in program order, through the same slots.

    Args:
        device: where the pieces go.
    """

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.device = device
        self._fetching = Lane(torch.cuda.Stream(device) if cuda else None)
        self._writing = Lane(torch.cuda.Stream(device) if cuda else None)

    def visits(self, pieces: Sequence[Piece]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yields `(index, tensors)` for each piece: flat device tensors to read and to change in place.

        What the caller enqueues on its current stream before asking for the next piece is what goes home. Whoever stops
        early loses the changes of the piece at hand, not of those before.

        Args:
            pieces: parts of buffers; no two of one call may overlap.
        """
        computing = self._computing()
        parts = [piece.parts() for piece in pieces]
        size = max((sum(part.nbytes for part in piece.values()) for piece in parts), default=0)
        slots = [_Slot(torch.empty(size, dtype=torch.uint8, device=self.device)) for _ in range(min(SLOTS, len(pieces)))]
        # Earlier work of this stream may still use the slots' memory, and pieces of an earlier call may be going home.
        self._fetching.after(computing.mark())
        self._fetching.after(self._writing.mark())
        try:
            for index in range(len(pieces)):
                if index == 0:
                    self._fetch(pieces[0], parts[0], slots[0])
                if index + 1 < len(pieces):
                    self._fetch(pieces[index + 1], parts[index + 1], slots[(index + 1) % SLOTS])
                slot = slots[index % SLOTS]
                computing.after(slot.arrived)
                yield index, slot.tensors(parts[index])
                self._writing.after(computing.mark())
                for host, visitor in slot.copies(pieces[index], parts[index]):
                    self._writing.copy(host, visitor)
                slot.gone = self._writing.mark()
        finally:
            # The allocator must not give the slots to others while a copy of a side stream still uses them.
            for slot in slots:
                self._fetching.hold(slot.memory)
                self._writing.hold(slot.memory)

    def synchronize(self) -> None:
        """Blocks until every piece is home, so that the host may read the buffers."""
        self._writing.synchronize()

    def _fetch(self, piece: Piece, parts: Mapping[str, Tensor], slot: _Slot) -> None:
        self._fetching.after(slot.gone)
        for host, visitor in slot.copies(piece, parts):
            self._fetching.copy(visitor, host)
        slot.arrived = self._fetching.mark()

    def _computing(self) -> Lane:
        return Lane.computing(self.device)


class _Slot:
    """Device memory for one piece at a time, with the events of its last arrival and its last way home."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.arrived: torch.Event | None = None
        self.gone: torch.Event | None = None

    def tensors(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns for each part a device tensor of its dtype and length, packed as the parts are."""
        views, offset = {}, 0
        for name, part in parts.items():
            views[name] = self.memory[offset : offset + part.nbytes].view(part.dtype)
            offset += part.nbytes
        return views

    def copies(self, piece: Piece, parts: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Returns the (host, device) pairs to copy: one for a whole buffer, else one for each part."""
        if piece.ranges is None:
            return [(piece.buffer.bytes, self.memory[: piece.buffer.nbytes])]
        visitors = self.tensors(parts)
        return [(part, visitors[name]) for name, part in parts.items()]


class Lane:
    """A queue of copies: a CUDA stream, or program order where there is none (every event is then None)."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self.stream = stream

    @classmethod
    def computing(cls, device: torch.device) -> Lane:
        """Returns the queue that the arithmetic of a device is in: its current stream."""
        return cls(torch.cuda.current_stream(device) if device.type == "cuda" else None)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> torch.Event | None:
        return None if self.stream is None else self.stream.record_event()

    def after(self, event: torch.Event | None) -> None:
        if self.stream is not None and event is not None:
            self.stream.wait_event(event)

    def hold(self, memory: Tensor) -> None:
        if self.stream is not None:
            memory.record_stream(self.stream)

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()


def _host_zeros(nbytes: int, device: torch.device) -> Tensor:
    """Returns zeros, uint8 (nbytes,), pinned if the device is CUDA and the system allows it."""
    if device.type != "cuda":
        return torch.zeros(nbytes, dtype=torch.uint8)
    try:
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        warnings.warn(
            f"paged state could not be pinned ({error}); ordinary host memory is used: the results are the same, but "
            "its copies overlap with nothing. Free host memory, or raise the limit of locked memory (ulimit -l)",
            RuntimeWarning,
            stacklevel=2,
        )
        return torch.zeros(nbytes, dtype=torch.uint8)

"""Copies of tensors that live in host memory, begun before they are asked for.

A pass over a model asks for the same tensors in the same order every time. `Prefetch` notes what followed what, and while the
computing device works with the tensors of one module it copies those of the next one on a stream of its own: two buffers, as
in ZeRO-Infinity (arXiv 2104.07857, section 6.2), without a schedule that anybody has to write. The first pass learns; one that
takes another way gets plain copies, the same numbers later.

Memory. A copy's memory comes from the stream that computes, and the copying stream waits for what that stream was given
before. So memory goes round in the order of the computing stream, as without copies ahead: a host that runs ahead of the
device begins no more of them, and nothing has to be kept until an event is seen.

Not done here: which modules live where (placement.py), copies back to the host.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """One request of a pass: in a backward pass or not, for a saved tensor or a visit, of which module, which tensor.

    A block that is recomputed asks in the backward pass for a visit: so no request is made twice in a pass, as long as a
    model calls a module once.
    """

    backward: bool
    again: bool
    name: str
    key: str


@dataclasses.dataclass(frozen=True)
class _Ahead:
    """A copy that was begun: of a tensor at home as it was then, for work on `stream`, whole when `done` is (CUDA alone).

    It holds the tensor at home, so that no other takes its place in memory.
    """

    place: Place
    home: Tensor
    version: tuple[int, int]
    copy: Tensor
    stream: Any = None
    done: Any = None


class Prefetch:
    """Brings tensors of host memory to a device, those of the next module ahead of time.

    What is on its way is never more than the next module's. Nothing is, once a pass has ended where the one before it did: no
    copy is begun for what another pass begins with, so that between two passes memory is free. A tensor that was written to
    after its copy was begun is copied again; what is written through `.data` is not seen, as autograd does not see it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        #: What followed a request in the last pass that made it, and the tensor that was asked for then.
        self.after: dict[Place, Place] = {}
        self.homes: dict[Place, weakref.ref[Tensor]] = {}
        self.pending: list[_Ahead] = []
        self.seen: set[Place] = set()
        self.last: Place | None = None
        self.task = -1
        self.side: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, or one that was pickled, starts as new: what was learned is of tensors that it has not.
        return Prefetch, (self.device,)

    def __del__(self) -> None:
        self._drop()

    def fetch(self, name: str, key: str, home: Tensor, *, again: bool = False) -> Tensor:
        """Returns a copy on the device of `home`, the tensor `key` of module `name`, for work on the current stream.

        Args:
            home: in host memory; pinned, or nothing overlaps. again: autograd asks, for what it kept.
        """
        task = torch._C._current_graph_task_id()  # -1 outside a backward pass
        place = Place(task >= 0, again, name, key)
        if task != self.task or place in self.seen:
            self._end_pass(task)
        if self.last is not None:
            self.after[self.last] = place
        self.seen.add(place)
        self.last, self.homes[place] = place, weakref.ref(home)
        copy = self._arrived(place, home)
        if copy is None:
            copy = torch.empty_like(home, device=self.device).copy_(home.detach(), non_blocking=True)
        # A stream that is captured may not wait for events from outside, nor leave any behind.
        if self.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            self._look_ahead(place)
        return copy

    def _end_pass(self, task: int) -> None:
        self._drop()
        if self.last is not None:
            self.after.pop(self.last, None)
        self.seen.clear()
        self.last, self.task = None, task

    def _drop(self) -> None:
        """Gives up what is on its way. Its memory returns to the stream that it came from, which waits for the copy's end."""
        for ahead in self.pending:
            if ahead.done is not None:
                ahead.stream.wait_event(ahead.done)
        self.pending = []

    def _arrived(self, place: Place, home: Tensor) -> Tensor | None:
        """Returns the copy that was begun for this request, or None where there is none that would do."""
        if not self.pending:
            return None
        ahead = self.pending[0]
        same = ahead.place == place and ahead.version == _version(home)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        if not same or ahead.stream != stream or ahead.copy.is_inference() != torch.is_inference_mode_enabled():
            self._drop()
            return None
        del self.pending[0]
        if stream is not None:
            stream.wait_event(ahead.done)
        return ahead.copy

    def _look_ahead(self, place: Place) -> None:
        """Begins the copies that follow, up to the end of the next module."""
        coming = [ahead.place for ahead in self.pending]
        at, started = coming[-1] if coming else place, False
        while (at := self.after.get(at)) is not None and at not in self.seen and at not in coming:
            home = self.homes[at]()
            coming.append(at)
            if home is None or len({each[:3] for each in coming} - {place[:3]}) > 1:
                return
            if not started and self.device.type == "cuda":
                self.side = self.side or torch.cuda.Stream(self.device)
                self.side.wait_stream(torch.cuda.current_stream(self.device))
                started = True
            self.pending.append(self._begin(at, home))

    def _begin(self, place: Place, home: Tensor) -> _Ahead:
        copy = torch.empty_like(home, device=self.device)
        if self.device.type != "cuda":
            return _Ahead(place, home, _version(home), copy.copy_(home.detach()))
        with torch.cuda.stream(self.side):
            copy.copy_(home.detach(), non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return _Ahead(place, home, _version(home), copy, torch.cuda.current_stream(self.device), done)


def _version(tensor: Tensor) -> tuple[int, int]:
    """Returns what changes when somebody writes to a tensor or gives it other memory."""
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()

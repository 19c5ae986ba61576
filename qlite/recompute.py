"""What of a block waits for its backward pass: all that autograd saves, some of it, or the block's input alone, here or away.

By `Falcon.gradient_checkpointing`:

    False        everything is kept
    "selective"  the MLP's is kept, nearly all of which is the wide matrix before GELU; norms and attention are computed again
    True         the input of each block is kept, the rest is computed again (Chen et al., arXiv 1604.06174)
    "offload"    the same, and the inputs wait in pinned host memory: one or two of them are on the device at a time

The products that a block ends with, of frozen weights, are not computed again in any: nobody asks for what they give, and
autograd keeps nothing of what they read. docs/speed.md counts what each way keeps and what it computes.

Not done here: other models than Falcon; sums of activations (tensors that two blocks share); offloading of what
"selective" keeps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlite.operators import decoded_weights_kept
from qlite.paging import Lane

#: What `Falcon.gradient_checkpointing` may be, by the name that the command line has for it.
MODES: dict[str, bool | str] = {"none": False, "full": True, "selective": "selective", "offload": "offload"}
#: A block that is computed again keeps its decoded weights until its backward pass, which comes at once, if they take no more
#: bytes than this: all of Falcon-7B's are 413 MB in 16 bits. What is computed again is then decoded once for both.
MOST_KEPT = 2**29


def check_mode(mode: bool | str) -> None:
    """Raises ValueError where `mode` is none of MODES."""
    if not isinstance(mode, bool) and mode not in ("selective", "offload"):
        raise ValueError(f"gradient_checkpointing is {mode!r}; wanted False, True, 'selective' or 'offload'")


class Recomputation:
    """How one forward pass calls its blocks.

    Args:
        mode: True, "selective" or "offload". decoded: bytes of a block's encoded weights when they are decoded.
        preserve_rng_state: compute again with the random numbers of the first time.
        inputs: where the blocks' inputs go, under "offload".
    """

    def __init__(self, mode: bool | str, *, decoded: int, preserve_rng_state: bool, inputs: BlockInputs | None):
        self.mode, self.preserve_rng_state, self.inputs = mode, preserve_rng_state, inputs
        self.keep = decoded_weights_kept if decoded <= MOST_KEPT else contextlib.nullcontext

    def __call__(self, block: Any, x: Tensor, *arguments: Any) -> Tensor:
        """Returns what block(x, *arguments) does.

        Args:
            block: has inner(x, *arguments) -> (first, normed), attended(first), joined(x, attended, product), mlp with
                wide(normed) and dense_4h_to_h, ends() and hooked(). x: (B, T, hidden).
        """
        if not x.requires_grad and not _trained(block):  # nothing is kept, and no backward pass will come by
            if self.inputs is not None:
                self.inputs.skip()
            return block.forward(x, *arguments)
        if block.hooked():
            return self.again(block.forward, x, *arguments)
        if self.mode == "selective":
            first, normed = self.again(block.inner, x, *arguments)
            attended = block.attended(first)  # before the MLP, as ever: dropout draws in this order
            return block.joined(x, attended, block.mlp(normed))
        # An adapter keeps its input, and one over the wide matrix more than all the rest: it has to be inside.
        if any(map(_trained, block.ends())):
            return self.again(block.forward, x, *arguments)

        def up_to_the_ends(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
            first, normed = block.inner(x, *arguments)
            return first, block.mlp.wide(normed)

        first, wide = self.again(up_to_the_ends, x, *arguments)
        return block.joined(x, block.attended(first), block.mlp.dense_4h_to_h(wide))

    def again(self, part: Callable, x: Tensor, *arguments: Any) -> Any:
        """Returns part(x, *arguments), of which x alone is kept."""
        options: Any = {"use_reentrant": False, "preserve_rng_state": self.preserve_rng_state}
        if self.inputs is None:
            return checkpoint(self._inside, part, x, *arguments, **options)
        inputs, layer, needs_grad = self.inputs, self.inputs.put(x), x.requires_grad
        first = [x]  # which leads to the blocks before; what comes back is a leaf, and need be no more

        def run(*arguments: Any) -> Any:
            x = first.pop() if first else inputs.take(layer).requires_grad_(needs_grad)
            return self._inside(part, x, *arguments)

        return checkpoint(run, *arguments, **options)

    def _inside(self, part: Callable, x: Tensor, *arguments: Any) -> Any:
        with self.keep():
            return part(x, *arguments)


def _trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def decoded_bytes(block: nn.Module, dtype: torch.dtype) -> int:
    """Returns the size of a block's encoded weights when they are decoded into a dtype."""
    encoded = (module for module in block.modules() if getattr(module, "encoded", None) is not None)
    return sum(m.in_features * m.out_features for m in encoded) * dtype.itemsize  # type: ignore[operator]


def moves(device: torch.device) -> bool:
    """Whether inputs leave a device under "offload": on the CPU they are at home. On meta nothing is copied but sizes tell."""
    return device.type != "cpu"


@dataclasses.dataclass
class Slot:
    """Host memory for an input that visits devices of a type: uint8 (nbytes,), none for meta's."""

    kind: str
    nbytes: int
    memory: Tensor | None

    def view(self, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """Returns its first bytes as a tensor."""
        if self.memory is None:
            return None
        return self.memory[: shape.numel() * dtype.itemsize].view(dtype).view(shape)


class HostMemory:
    """Slots that are lent to a forward pass and come back when its graph goes: pinned memory is slow to get.

    Sizes are powers of two, as PyTorch takes pinned memory anyway; so shapes of batches share slots. What a recording
    (graphs.py) has seen stays where it was until `clear`.

    Attributes:
        nbytes: of all slots, lent ones included.
    """

    def __init__(self) -> None:
        self.free: list[Slot] = []
        self.nbytes = 0

    def __reduce__(self) -> tuple[type[HostMemory], tuple[()]]:
        return HostMemory, ()  # a copy of a model has its own

    def lend(self, nbytes: int, device: torch.device) -> Slot:
        """Returns the smallest slot that is free and holds so many bytes, a new one where there is none.

        Raises:
            RuntimeError: the system gives no more pinned memory.
        """
        fitting = [slot for slot in self.free if slot.kind == device.type and slot.nbytes >= nbytes]
        if fitting:
            slot = min(fitting, key=lambda slot: slot.nbytes)
            self.free.remove(slot)
            return slot
        size = 1 << (nbytes - 1).bit_length()
        memory = None
        if device.type != "meta":
            memory = torch.zeros(size, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
        self.nbytes += size
        return Slot(device.type, size, memory)

    def clear(self) -> None:
        """Forgets the slots that are not lent."""
        self.nbytes -= sum(slot.nbytes for slot in self.free)
        self.free = []


@functools.cache
def _lanes(device: torch.device) -> tuple[Lane, Lane]:
    """Returns the queues of copies to the host and back: side streams, or program order where there are none."""
    streams = [torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2)]
    return Lane(streams[0]), Lane(streams[1])


def join(device: torch.device) -> None:
    """Has the computing stream wait for the copies of "offload": a recording that broke off could not end without."""
    computing = Lane.computing(device)
    for lane in _lanes(device):
        lane.after(computing.mark())
        computing.after(lane.mark())


class BlockInputs:
    """The inputs of the blocks of one forward pass, on their way to the host and back.

    An input leaves while its block computes, and the next block begins when it is gone; so the device holds one more at most.
    In the backward pass it comes back while the block after it is computed again and gone through. The last one stays. All
    memory of the device is taken and given on the computing stream, which waits for each copy: the allocator need know of no
    other stream, and a recording, in which it would hold back what other streams have used, is no larger.

    Args:
        memory: lends the slots. blocks: how many there are. device: of the inputs.
    """

    def __init__(self, memory: HostMemory, blocks: int, device: torch.device):
        self.memory, self.blocks, self.device, self.count = memory, blocks, device, 0
        self.leaving, self.arriving = _lanes(device)
        #: Of each layer whose input is on the host: its slot, and what it looks like there.
        self.away: dict[int, tuple[Slot, torch.Size, torch.dtype]] = {}
        #: Of each layer whose input is on the device: it, and the event of its arrival.
        self.here: dict[int, tuple[Tensor, torch.Event | None]] = {}
        self.going: tuple[Tensor, torch.Event | None] | None = None

    def __del__(self) -> None:
        # What a backward pass that was broken off has left under way: nobody else waits for these copies.
        if self.going is not None:
            self.leaving.hold(self.going[0])
        for layer in self.here.keys() & self.away.keys():
            self.arriving.hold(self.here[layer][0])
        self.memory.free.extend(slot for slot, *_ in self.away.values())

    def put(self, x: Tensor) -> int:
        """Returns the number of the next layer, whose input x is; nothing may write to x while its block computes."""
        computing, layer, x = self._computing(), self.count, x.detach()
        self.count += 1
        if self.going is not None:
            computing.after(self.going[1])
            self.going = None
        if not moves(self.device) or self.count == self.blocks:
            self.here[layer] = x, None
            return layer
        slot = self.memory.lend(x.nbytes, self.device)
        self.away[layer] = slot, x.shape, x.dtype
        self.leaving.after(computing.mark())
        home = slot.view(x.shape, x.dtype)
        if home is not None:
            self.leaving.copy(home, x)
        self.going = x, self.leaving.mark()
        return layer

    def skip(self) -> None:
        """Counts a layer whose input no backward pass asks for; there is none after the first that is asked for."""
        self.count += 1

    def take(self, layer: int) -> Tensor:
        """Returns the input of a layer, without history, and has that of the one before begin its way back."""
        computing = self._computing()
        for wanted in (layer, layer - 1):
            if wanted in self.away and wanted not in self.here:
                self._fetch(wanted, computing)
        x, arrived = self.here.pop(layer) if layer in self.away else self.here[layer]
        computing.after(arrived)
        return x.detach()

    def _computing(self) -> Lane:
        return Lane.computing(self.device)

    def _fetch(self, layer: int, computing: Lane) -> None:
        slot, shape, dtype = self.away[layer]
        x, home = torch.empty(shape, dtype=dtype, device=self.device), slot.view(shape, dtype)
        self.arriving.after(computing.mark())  # its memory may be in use until here
        if home is not None:
            self.arriving.copy(x, home)
        self.here[layer] = x, self.arriving.mark()

"""Forward and backward of a batch as one CUDA graph: launched by one call, where Python makes some thousands.

A step of Falcon-7B over 512 tokens is 50 ms of work for an H100, and many times that of Python. A graph is a recording of
launches, with all their addresses; so the batch is copied into memory of the graph's own, at a length that is a multiple of
BUCKET (padding comes after what a causal model reads, and has no label), and the gradients are added where the recording found
them. A shape of batch runs as usual when it comes first, which also compiles its kernels, and is recorded when it comes again.

Dropout: PyTorch's takes its state from a generator, which cannot be set back inside a recording, as it has to be where gradient
checkpointing computes a block twice. So its masks come from seeds here (dropout.py), which are drawn anew before each batch.

Not done here: the optimizer's part of a step, other models than Falcon, ALiBi (whose mask is made on the host), modules that
live in host memory.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import threading
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qlite.cross_entropy import IGNORED, linear_cross_entropy
from qlite.data import Batch
from qlite.falcon import Falcon
from qlite.model_ops import seeded_dropout
from qlite.recompute import join

#: Tokens of a row are padded to a multiple.
BUCKET = 64
#: So many shapes of batches are recorded: each recording takes memory of the driver's.
MOST_GRAPHS = 12


class SeededDropout(nn.Module):
    """Stands in for nn.Dropout: a mask by seed.

    Args:
        p: the share that is dropped. seed: int64 (1,), read at each call.
    """

    def __init__(self, p: float, seed: Tensor):
        super().__init__()
        self.p, self.seed = p, seed

    def forward(self, x: Tensor) -> Tensor:
        """Returns x, of any shape, with a share p of its elements at zero, in training mode."""
        return seeded_dropout(x, self.seed, self.p) if self.training else x


@dataclasses.dataclass
class _Static:
    """What a recording reads and writes: input_ids (B, T), targets (B * T,), the summed loss."""

    input_ids: Tensor
    targets: Tensor
    loss: Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None


def why_not(model: nn.Module) -> str | None:
    """Returns why a model's steps cannot be recorded, or None."""
    if not isinstance(model, Falcon):
        return f"{type(model).__name__} is not qlite.Falcon"
    if model.config.alibi:
        return "ALiBi's mask is made on the host"
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and type(module) is not nn.Dropout:
            return f"{name} is a {type(module).__name__}, whose mask cannot be had twice"
    hooked = next(_hooked(model), None)
    if hooked is not None:
        return f"{hooked} has a hook, which would not be called again"
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        return f"its tensors are on {', '.join(sorted(map(str, devices)))}, not on one CUDA device"
    return None


def _hooked(model: nn.Module) -> Iterator[str]:
    """Yields the names of modules and parameters with hooks of their own."""
    if nn.modules.module._has_any_global_hook():
        yield "every module"
    for name, module in model.named_modules():
        if any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)):
            yield name or "the model"
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            yield name


#: Held by whoever records: of two at a time CUDA refuses one.
RECORDING = threading.Lock()


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the stream that recordings of a device are made on: PyTorch's own is of the first device that made any. One for
    all, as cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream(device)


class StepGraphs:
    """The forward and backward passes of a model in training; a context manager, in which the model's dropout is by seed.

    On a CPU everything is the same but that nothing is recorded.

    Args:
        model: a Falcon for which `why_not` has no reason. parameters: those that are trained; each gets a `.grad` of zeros,
            which has to stay the same tensor.
    """

    def __init__(self, model: Falcon, parameters: list[nn.Parameter]):
        self.model, self.parameters = model, parameters
        self.device = parameters[0].device
        self.shapes: dict[tuple[int, int], _Static] = {}
        self.pool, self.most = None, MOST_GRAPHS
        self.preserved = model.preserve_rng_state
        self.factor = torch.ones((), device=self.device)
        owners = [(m, name, c) for m in model.modules() for name, c in m.named_children() if type(c) is nn.Dropout and c.p]
        self.dropouts = owners
        # A seed every 16 bytes: a kernel that finds its pointers aligned in one layer finds them so in all.
        self.seeds = torch.zeros(len(owners), 2, dtype=torch.int64, device=self.device)

    def __enter__(self) -> StepGraphs:
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        for (module, name, old), seed in zip(self.dropouts, self.seeds, strict=True):
            setattr(module, name, SeededDropout(old.p, seed[:1]).train(old.training))
        self.preserved, self.model.preserve_rng_state = self.model.preserve_rng_state, False
        return self

    def __exit__(self, *exception) -> None:
        for module, name, old in self.dropouts:
            setattr(module, name, old.train(getattr(module, name).training))
        self.model.preserve_rng_state = self.preserved
        self.shapes.clear()

    def backward(self, batch: Batch, factor: float) -> Tensor:
        """Returns the summed loss of a batch, a float32 scalar that the next call overwrites; adds factor times its gradient
        to the parameters' `.grad`.

        Args:
            batch: rows of the model's tokens, padded on the right.
        """
        rows, length = batch.input_ids.shape
        key = rows, -(-length // BUCKET) * BUCKET
        static = self._fill(self.shapes.get(key), key, batch)
        self.factor.fill_(factor)
        self.seeds.random_()
        try:
            return self._launch(key, static)
        except torch.OutOfMemoryError:
            if not any(shape.graph for shape in self.shapes.values()):
                raise
        # The recordings' memory is not for what is not recorded. No gradient has been added: that is the last launch.
        warnings.warn("finetune: the recorded steps leave too little memory; from here on no step is recorded", stacklevel=2)
        self.shapes.clear()
        self.pool, self.most = None, 0
        gc.collect()
        torch.cuda.empty_cache()
        return self._launch(key, static)

    def _launch(self, key: tuple[int, int], static: _Static) -> Tensor:
        """Runs or replays the step of a shape whose batch is in place; records it if it is the shape's second."""
        recorded = sum(shape.graph is not None for shape in self.shapes.values())
        if key in self.shapes and static.graph is None and self.device.type == "cuda" and recorded < self.most:
            self._record(static)
        self.shapes[key] = static
        if static.graph is None:
            return self.run(static.input_ids, static.targets)
        static.graph.replay()
        assert static.loss is not None
        return static.loss

    def _fill(self, static: _Static | None, key: tuple[int, int], batch: Batch) -> _Static:
        """Returns the memory of a shape with a batch in it."""
        length = batch.input_ids.shape[1]
        pinned = self.device.type == "cuda"  # to be copied without a wait
        ids = torch.zeros(key, dtype=torch.int64, pin_memory=pinned)
        targets = torch.full(key, IGNORED, pin_memory=pinned)
        ids[:, :length] = batch.input_ids
        targets[:, : length - 1] = batch.labels[:, 1:]
        if static is None:
            static = _Static(torch.empty_like(ids, device=self.device), torch.empty_like(targets.flatten(), device=self.device))
        static.input_ids.copy_(ids, non_blocking=True)
        static.targets.copy_(targets.flatten(), non_blocking=True)
        return static

    def _record(self, static: _Static) -> None:
        graph = torch.cuda.CUDAGraph()
        with RECORDING, torch.cuda.graph(graph, pool=self.pool, stream=capture_stream(self.device)):
            try:
                static.loss = self.run(static.input_ids, static.targets)
            finally:
                if self.model.gradient_checkpointing == "offload":
                    join(self.device)
        static.graph, self.pool = graph, graph.pool()

    def run(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Returns the summed loss, a scalar, and adds `self.factor` times its gradient to the parameters': what is recorded.

        Args:
            input_ids: int64 (B, T). targets: int64 (B * T,), the token after each, or -100.
        """
        hidden = self.model.hidden_states(input_ids)
        loss = linear_cross_entropy(hidden.flatten(0, 1), self.model.lm_head, targets)
        del hidden  # autograd keeps what it needs
        found = torch.autograd.grad(loss * self.factor, self.parameters, allow_unused=True)
        used = [pair for pair in zip(self.parameters, found, strict=True) if pair[1] is not None]
        for parameter, gradient in zip(self.parameters, found, strict=True):
            if gradient is None:
                parameter.grad = None  # as backward leaves it: no optimizer decays what the loss does not reach
        torch._foreach_add_([p.grad for p, _ in used], [gradient for _, gradient in used])  # type: ignore[arg-type]
        return loss.detach()

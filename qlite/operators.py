"""How an operator is declared to PyTorch: schema, reference, fake, CUDA kernel, gradients in both modes, vmap.

`torch.library` serves the dispatcher and torch.compile. What it lacks (torch.func.grad, forward mode) an autograd.Function
around the op adds. ops.py declares every op of qlite with these functions.

Not done here: any op.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

library = torch.library.Library("qlite", "DEF")
# find_spec, not try/except ImportError: a Triton that is installed but broken must be heard.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_keeping = threading.local()


def kernels(name: str, device: torch.device):
    """Returns a module of Triton kernels, imported at the first CUDA call; RuntimeError where Triton is missing."""
    if not _HAS_TRITON:
        raise RuntimeError(f"qlite's kernels need the package triton for tensors on {device}; pip install triton")
    return importlib.import_module(f"qlite.kernels.{name}")


@contextlib.contextmanager
def decoded_weights_kept() -> Iterator[None]:
    """Inside, a 4-bit layer of many rows leaves its decoded weight to autograd instead of decoding it again for the gradient.

    For a block that gradient checkpointing computes again: its backward pass comes at once.
    """
    before, _keeping.on = keeps_decoded_weights(), True
    try:
        yield
    finally:
        _keeping.on = before


def keeps_decoded_weights() -> bool:
    """Whether this thread is inside `decoded_weights_kept`."""
    return not torch.compiler.is_compiling() and getattr(_keeping, "on", False)


def declare(schema: str, reference: Callable, fake: Callable) -> str:
    """Declares the op of `schema` with its reference and fake implementation; returns its qualified name."""
    name = schema[: schema.index("(")]
    library.define(schema)
    library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qlite::{name}", fake, lib=library)
    return f"qlite::{name}"


def differentiate(name: str, keep: Callable, backward: Callable, jvp: Callable) -> Callable:
    """Gives an op that is linear in its first argument its gradients and a rule for vmap; returns what calls it.

    What torch.library registers serves plain backward passes and torch.compile, but torch.func.grad refuses it and forward
    mode loses the tangent without a word. An autograd.Function serves those two; torch.compile refuses one with a jvp.

    Args:
        keep: (ctx, inputs, output), saves what backward (ctx, grad) and jvp (ctx, *tangents) need.
    """
    op = getattr(torch.ops.qlite, name)
    torch.library.register_autograd(f"qlite::{name}", backward, setup_context=keep, lib=library)
    torch.library.register_vmap(f"qlite::{name}", functools.partial(_vmap, op), lib=library)

    def forward(ctx, *arguments) -> Tensor:
        output = op(*arguments)
        keep(ctx, arguments, output)
        return output

    # Twice: torch.func wants setup_context apart, for which every call's arguments are bound to a signature, in Python.
    derivatives = {"backward": backward, "jvp": jvp}
    apart = {"forward": lambda *arguments: op(*arguments), "setup_context": keep, **derivatives}
    of_func = _function(name, apart, generate_vmap_rule=True)
    plain = _function(name, {"forward": forward, **derivatives})

    def call(*arguments) -> Tensor:
        if torch.compiler.is_compiling() and forward_ad._current_level >= 0:
            raise NotImplementedError(f"{name}: no forward mode inside torch.compile; call torch.func.jvp outside of it")
        if torch.compiler.is_compiling() or not _recorded():
            return op(*arguments)
        return (of_func if torch._C._are_functorch_transforms_active() else plain).apply(*arguments)

    return call


def _function(name: str, methods: dict[str, Callable], **attributes: bool) -> type[torch.autograd.Function]:
    return type(name, (torch.autograd.Function,), {key: staticmethod(of) for key, of in methods.items()} | attributes)


def _recorded() -> bool:
    """Whether a call has to go through the autograd.Function: somebody may ask for a derivative."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def without_derivatives() -> bool:
    """Whether nobody can ask for a derivative of what is computed now: an op that has none may be called."""
    return not torch.is_grad_enabled() and (torch.compiler.is_compiling() or not _recorded())


def _vmap(op: Callable, info, dims: tuple[int | None, ...], *arguments) -> tuple[Tensor, int]:
    """Returns op over a batch: as more rows for one weight, and one after the other where each has a weight of its own."""
    if dims[0] is not None and all(dim is None for dim in dims[1:]):
        return op(arguments[0].movedim(dims[0], 0), *arguments[1:]), 0
    each = [[a if dim is None else a.select(dim, i) for a, dim in zip(arguments, dims)] for i in range(info.batch_size)]
    return torch.stack([op(*selected) for selected in each]), 0


def keep(ctx, *tensors: Tensor | None) -> None:
    """Saves tensors for the backward pass and for forward mode."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def grad_bias(ctx, grad: Tensor, position: int) -> Tensor | None:
    """Returns the gradient of a bias, the input at `position`, in the dtype `ctx.bias_dtype`; None where none is asked for."""
    if ctx.bias_dtype is None or not ctx.needs_input_grad[position]:
        return None
    return grad.sum_to_size(grad.shape[-1:]).to(ctx.bias_dtype)


def mark_changed(*lists: Sequence[Tensor]) -> None:
    """Tells autograd that a kernel has written to tensors, as PyTorch's own in-place operators do."""
    torch.autograd.graph.increment_version([tensor for some in lists for tensor in some if not tensor.is_inference()])


def on_cuda(name: str, kernel: Callable) -> None:
    """Has `kernel` run for CUDA tensors, on the device of the first, of a list too: Triton launches on the current one."""

    def run(first: Tensor | Sequence[Tensor], *others):
        with torch.cuda.device((first if isinstance(first, Tensor) else first[0]).device):
            return kernel(first, *others)

    library.impl(name, run, "CUDA")

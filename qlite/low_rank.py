"""A frozen product and its low-rank update in one function: y = x W.T + bias + scaling * dropout(x) A.T B.T.

In separate operations of autograd the update costs more than it computes: it is scaled, it is added to y, its gradient is
scaled, and it is added to the gradient of x, and each of these reads and writes a tensor of the size of y or x. Here both
products of a direction end in one tensor: the update is written first, and the product with W adds itself to it. What goes
through memory beside the product with W is, forward, x once (for x A.T) and y once more; backward, grad twice (for grad B
and grad.T (x A.T)), x once and the gradient of x once more.

A, B and scaling meet the dtype of x once a call: U = dropout(x) A.T and V = grad (scaling B) are rounded to it, the
gradients of A and B are sums in float32, and float32 where A and B are.

Not done here: differentiating twice, forward mode, vmap. There the same sums are written as operations of PyTorch's: the
gradient in the backward pass of `together`, the rest by LoRALinear, where `linear_of` returns None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

#: Up to so many rows the update is added to y, which is small, so that a base with a kernel for few rows can use it.
FEW_ROWS = 256


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, up: Tensor) -> Tensor:
    """Returns x @ weight.T + bias + low @ up.T, in the dtype of x, a tensor of its own.

    Args:
        x: (..., in). weight: (out, in). bias: (out,) or None. low: (rows, r), a row for each of x. up: (out, r).
    """
    bias = None if bias is None else bias.to(x.dtype)
    if low.shape[0] <= FEW_ROWS:
        return add_update(nn.functional.linear(x, weight, bias), low, up)
    y = torch.mm(low, up.T) if bias is None else torch.addmm(bias, low, up.T)
    return y.addmm_(x.reshape(-1, x.shape[-1]), weight.T).view(*x.shape[:-1], weight.shape[0])


def add_update(y: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """Returns y, having added low @ up.T to it in place: a result of one's own that nobody else has seen."""
    y.view(-1, y.shape[-1]).addmm_(low, up.T)
    return y


def linear_grad(grad: Tensor, weight: Tensor, low: Tensor, down: Tensor, mask: Tensor | None, keep: float) -> Tensor:
    """Returns grad @ weight + keep * mask * (low @ down), the gradient of x, in the dtype of grad, a tensor of its own.

    Args:
        grad: (..., out). weight: (out, in). low: (rows, r), a row for each of grad. down: (r, in).
        mask: bool (..., in), what dropout left; None: all of it, and keep does not count.
    """
    if low.shape[0] <= FEW_ROWS and mask is None:
        return add_update(grad @ weight, low, down.T)
    grad_x = masked(torch.mm(low, down), mask, keep)
    return grad_x.addmm_(grad.reshape(-1, grad.shape[-1]), weight).view(*grad.shape[:-1], weight.shape[1])


def masked(x: Tensor, mask: Tensor | None, keep: float) -> Tensor:
    """Returns keep * mask * x, (rows, in), or x itself where mask is None."""
    return x if mask is None else torch.ops.aten.native_dropout_backward(x, mask.view(x.shape), keep)


def _transforms() -> bool:
    """Whether a transform of torch.func, or a batch of gradients, is at work."""
    return torch._C._are_functorch_transforms_active()


def _grad_of(factor: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Returns left.T @ right in the dtype of `factor`: a sum over rows, not rounded on its way to float32 where it can be."""
    half = left.dtype in (torch.bfloat16, torch.float16) and factor.dtype == torch.float32
    # A product of 16-bit matrices into float32 is CUDA's alone, and torch.compile has learned of it only lately.
    if half and left.is_cuda and not torch.compiler.is_compiling():
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return torch.mm(left.T, right).to(factor.dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def together(plus: Callable[..., Tensor], plus_grad: Callable[..., Tensor], grad_x: Callable[..., Tensor], tensors: int):
    """Returns a function (x, a, b, bias, scaling, p, *parts) of a weight's parts, differentiable in x, a, b and bias.

    It returns x @ W.T + bias + scaling * dropout(x) @ a.T @ b.T, (..., out), in the dtype of x, for x (..., in), a (r, in),
    b (out, r), and dropout of probability p, 0 for none, by PyTorch's generator.

    Args:
        plus: (x, *parts, bias, low, up) as `linear` has it, for the weight that the parts hold.
        plus_grad: (grad, *parts, low, down, mask, keep) as `linear_grad` has it.
        grad_x: (grad, in_features, *parts), the gradient of x without an update, differentiable.
        tensors: how many of the parts, from the first, are tensors or None; the others are numbers.
    """

    class Together(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, a, b, bias, scaling, p, *parts):
            down, up = a.to(x.dtype), _scaled(b, scaling, x.dtype)
            dropped, mask = torch.native_dropout(x, p, True) if p else (x, None)
            low = torch.mm(_rows(dropped), down.T)
            # x and not what dropout left of it: the next layer may keep x too, and a second derivative needs the input.
            ctx.save_for_backward(x, a, b, low, down, up, mask, *parts[:tensors])
            ctx.scaling, ctx.keep, ctx.numbers = scaling, _keep(p), parts[tensors:]
            ctx.bias_dtype = None if bias is None else bias.dtype
            return plus(x, *parts, bias, low, up)

        @staticmethod
        def backward(ctx, grad):
            # A backward pass inside of autocast is a mistake that is easily made; in place its casts would be errors.
            kind = grad.device.type
            if kind != "meta" and torch.is_autocast_enabled(kind):
                with torch.autocast(kind, enabled=False):
                    return Together.backward(ctx, grad)
            x, a, b, low, down, up, mask, *coded = ctx.saved_tensors
            parts, wanted = (*coded, *ctx.numbers), ctx.needs_input_grad
            of_x = of_a = of_b = of_bias = None
            if wanted[3]:
                of_bias = _rows(grad).sum(dim=0).to(ctx.bias_dtype)
            if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or _transforms()):
                return *_differentiable(ctx, grad, grad_x, x, a, b, mask, parts), of_bias, None, None, *[None] * len(parts)
            rows = _rows(grad)
            if wanted[0] or wanted[1]:
                back = torch.mm(rows, up)  # the gradient of low, (rows, r)
            if wanted[0]:
                of_x = plus_grad(grad, *parts, back, down, mask, ctx.keep)
            if wanted[1]:
                of_a = _grad_of(a, back, _rows(masked(x, mask, ctx.keep)))
            if wanted[2]:
                of_b = _grad_of(b, rows, low).mul_(ctx.scaling)
            return of_x, of_a, of_b, of_bias, None, None, *[None] * len(parts)

    return Together.apply


def _differentiable(ctx, grad: Tensor, grad_x: Callable[..., Tensor], x, a, b, mask, parts) -> tuple[Tensor | None, ...]:
    """Returns the gradients of x, a and b as functions of grad, x, a and b that PyTorch can differentiate and batch."""
    down, up = a.to(x.dtype), (b * ctx.scaling).to(x.dtype)
    dropped = x if mask is None else x * mask * ctx.keep
    back = grad @ up
    of_low = back @ down if mask is None else back @ down * mask * ctx.keep
    of_x = grad_x(grad, x.shape[-1], *parts) + of_low if ctx.needs_input_grad[0] else None
    of_a = (_rows(back).T @ _rows(dropped)).to(a.dtype) if ctx.needs_input_grad[1] else None
    of_b = (_rows(grad).T @ _rows(dropped @ down.T)).to(b.dtype) * ctx.scaling if ctx.needs_input_grad[2] else None
    return of_x, of_a, of_b


def _keep(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


def _scaled(b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """Returns scaling * b, rounded once to `dtype`, in one launch."""
    return torch.mul(b, scaling, out=torch.empty_like(b, dtype=dtype))


def _dense_grad(grad: Tensor, in_features: int, weight: Tensor) -> Tensor:
    return grad @ weight


#: For a dense frozen weight: its one part is (out, in), of the dtype of x.
dense = together(linear, linear_grad, _dense_grad, tensors=1)


# Which layers: decided here alone, at each call.


def linear_of(base: nn.Module, dropout: nn.Module, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor | None:
    """Returns base(x) + scaling * dropout(x) @ a.T @ b.T by one function, or None where the two have to be called.

    A base that can has a method `plus_low_rank` beside the `forward` of the same class. A dense one is known here.
    """
    if type(dropout) is not nn.Dropout or not (_plain(base) and _plain(dropout)):
        return None
    p, kind = (dropout.p if dropout.training else 0.0), type(base)
    if "plus_low_rank" in kind.__dict__ and "forward" in kind.__dict__:
        method: Any = base.plus_low_rank
        return method(x, a, b, scaling, p)
    if kind.forward is not nn.Linear.forward:
        return None
    weight: Any = base.weight
    bias: Any = base.bias
    return dense(x, a, b, bias, scaling, p, weight) if _fits_dense(x, weight, bias) else None


def _plain(module: nn.Module) -> bool:
    """Whether a call of `module` computes its class's forward and no more, and reverse mode is all that is asked of it.

    Hooks want to see the module's own result, and a forward that somebody put on the instance is not the class's. Function
    transforms and forward mode need rules that `together` has not, and torch.export would write down its forward without
    its gradient. (Differentiating twice is seen in its backward pass.)
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooked = any(hooks) or torch.nn.modules.module._has_any_global_hook() or "forward" in module.__dict__
    return not hooked and not torch.compiler.is_exporting() and not _transforms() and forward_ad._current_level < 0


def _fits_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `dense` does with these what nn.functional.linear does: plain frozen tensors of one dtype, no autocast."""
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if any(type(t) not in (Tensor, nn.Parameter) or t.dtype != weight.dtype for t in tensors):
        return False
    kind = x.device.type
    cast = kind != "meta" and torch.is_autocast_enabled(kind)
    return weight.is_floating_point() and not weight.requires_grad and not cast and x.shape[-1:] == weight.shape[1:]

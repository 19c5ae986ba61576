"""The loss of an output layer without its logits: product, cross-entropy and gradient, some rows at a time.

    loss = sum over n of (log sum over v of exp(logits[n, v])) - logits[n, target[n]],    logits = head(hidden)

Falcon's 65,024 logits of 2,048 tokens are 266 MB in bfloat16 and 533 MB in float32, of which autograd would keep several.
Here a chunk of rows is multiplied, its loss added up, and its gradient (softmax minus one-hot) sent back through the head at
once, so that what lives on is the gradient of hidden, as large as hidden. Backward only scales it. That the gradient can be
had before the rest of the graph asks for it is known from Liger Kernel (Hsu et al., arXiv 2410.10989).

Not done here: label smoothing, class weights, second derivatives, gradients under torch.func.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: The label of a token that the loss does not count; torch's cross_entropy has the same default.
IGNORED = -100
#: Logits of a chunk, at most: 256 rows of Falcon's 65,024. A chunk takes 8 bytes a logit.
CHUNK = 2**24
#: A float16 gradient of logits is kept so many times larger: below 6e-8 / 256 instead of 6e-8 it is lost.
FLOAT16_SCALE = 256.0


def _scaled(gradient: Tensor | None, factor: Tensor) -> Tensor | None:
    """Returns gradient * factor, rounded once: the product of two 16-bit tensors would round the factor too."""
    if gradient is None:
        return None
    return (gradient.to(torch.promote_types(gradient.dtype, torch.float32)) * factor).to(gradient.dtype)


class _SummedCrossEntropy(torch.autograd.Function):
    """The summed loss of logits (n, vocabulary), and its gradient in their dtype. Backward runs once: it writes in place."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        largest = logits.amax(dim=-1, keepdim=True).to(dtype)
        weights = (logits - largest).exp_()  # float32, for the subtraction of a 16-bit and a float32 tensor is
        totals = weights.sum(dim=-1, keepdim=True)
        ignored = (targets == IGNORED)[:, None]
        targets = targets[:, None].masked_fill(ignored, 0)
        ctx.kept = weights, totals, targets, ignored, logits.dtype
        return (totals.log() + (largest - logits.gather(-1, targets))).masked_fill_(ignored, 0.0).sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        weights, totals, targets, ignored, dtype = ctx.kept
        grad = grad.expand_as(totals).masked_fill(ignored, 0.0)
        weights.mul_(grad / totals).scatter_add_(-1, targets, -grad)
        return weights.to(dtype), None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, head: nn.Module, rows: int, *parameters: Tensor) -> Tensor:
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        whole = [torch.zeros_like(t) if need else None for t, need in zip((hidden, *parameters), needed, strict=True)]
        loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        ctx.scale = 1.0
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            x = hidden[part].detach().requires_grad_(needed[0])
            with torch.set_grad_enabled(any(needed)):
                logits = head(x)
                # Not where a weight is trained: its gradient is a sum over all rows, which would overflow.
                ctx.scale = FLOAT16_SCALE if logits.dtype == torch.float16 and not any(needed[1:]) else 1.0
                added = _SummedCrossEntropy.apply(logits, targets[part])
            del logits  # only its shape is needed from here on
            loss += added.detach()
            if not any(needed):
                continue
            sources = [t for t, need in zip((x, *parameters), needed, strict=True) if need]
            sums = [t[part] if t is whole[0] else t for t in whole if t is not None]
            seed = torch.full_like(added, ctx.scale)
            for total, one in zip(sums, torch.autograd.grad(added, sources, seed, allow_unused=True), strict=True):
                if one is not None:
                    total += one
            del added  # before the next chunk's are made
        ctx.save_for_backward(*whole)
        return loss

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        if torch.is_grad_enabled():  # create_graph: what once_differentiable says too late, and not always
            raise RuntimeError("linear_cross_entropy: it has no second derivative; call backward without create_graph=True")
        hidden, *parameters = (_scaled(gradient, grad_output / ctx.scale) for gradient in ctx.saved_tensors)
        return hidden, None, None, None, *parameters


def linear_cross_entropy(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """Returns the summed cross-entropy of head(hidden) against targets: a scalar, float32 (float64 where hidden is).

    Statistics are float32, whatever the logits are. Backward gives gradients of hidden, and of the head's parameters that
    require one, added up over the chunks in their own dtype; it cannot be differentiated again.

    Args:
        hidden: (n, in_features), of any floating dtype; n may be 0, for a loss of 0.
        head: a module with out_features, such as nn.Linear, Linear4bit or LoRALinear, called with at most
            CHUNK / out_features rows at a time.
        targets: int64 (n,), each from 0 to out_features - 1, or -100 for a row that does not count.

    Raises:
        ValueError: hidden is no matrix, or targets has another length or dtype.
        RuntimeError: (at backward) create_graph=True asks for a second derivative.

    Example:
        >>> head = torch.nn.Linear(8, 100)
        >>> linear_cross_entropy(torch.randn(3, 8), head, torch.tensor([1, 2, 99])).shape
        torch.Size([])
    """
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: hidden has shape {tuple(hidden.shape)} and targets are {targets.dtype} "
            f"{tuple(targets.shape)}; wanted (n, in_features) and int64 (n,)"
        )
    rows = max(1, CHUNK // head.out_features)  # type: ignore[operator]
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if not torch.is_grad_enabled():  # inside an autograd.Function that cannot be seen
        hidden, trained = hidden.detach(), []
    return _LinearCrossEntropy.apply(hidden, targets, head, rows, *trained)  # type: ignore[return-value]

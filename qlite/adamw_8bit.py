"""One step of AdamW over moments kept in 8 bits: the update rule, and the reference that a fused kernel must equal.

The update is that of AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2), in float32; the moments are dynamic
8-bit codes with one float32 absmax per block (Dettmers et al., arXiv 2110.02861, section 2).

Two rules are ours. A second moment above zero is never stored as the code of zero: it stands in the denominator of the
next step, and rounded to zero it lets one step leap by thousands of learning rates as soon as some input features are a
hundred times the others. And no element moves further than exact AdamW could move it (`AdamWRule.bound`), which matters
where rounding holds a growing second moment down. So a step stays under 8 learning rates for any sequence of gradients.

`step_encoded` and `step_plain` make the step for lists of tensors: the reference of the ops (training_ops.py), whose kernels
are in kernels/adamw_8bit.py.

Not done here: where the state lives and when it moves (optim.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qlite.dynamic8 import dequantize_dynamic8, quantize_dynamic8

#: Elements that the reference updates at a time: its float32 temporaries take about 50 MB.
CHUNK = 2**20


@dataclass(frozen=True)
class AdamWRule:
    """The numbers of one AdamW step.

    Args:
        lr, beta1, beta2, eps, weight_decay: as in `torch.optim.AdamW`.
        step: the number of this step, the first one being 1.

    Source: arXiv 1711.05101, algorithm 2.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int

    # Every product and sum below is rounded by itself: no addcmul or lerp, which the CPU's vector loops and CUDA
    # contract into one rounding and the CPU's scalar tails do not. So the result does not depend on threads or chunks.

    def moments(self, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the new float32 (exp_avg, exp_avg_sq) for a float32 gradient; changes no argument."""
        exp_avg = exp_avg * self.beta1 + grad * (1 - self.beta1)
        exp_avg_sq = exp_avg_sq * self.beta2 + (grad * grad) * (1 - self.beta2)
        return exp_avg, exp_avg_sq

    def updated(self, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, bound: float = math.inf) -> Tensor:
        """Returns the new float32 parameter: decayed first, then moved by the bias-corrected moments.

        Args:
            bound: the largest magnitude let pass for exp_avg / (root of the corrected exp_avg_sq).
        """
        # By way of float64, whose root rounds to the nearest float32: on a CPU PyTorch's own float32 root, which
        # is MKL's, is not always the nearest one.
        denominator = exp_avg_sq.double().sqrt().float().mul_(self.correction).add_(self.eps)
        move = exp_avg / denominator
        move.masked_fill_(denominator == 0, 0.0)  # without eps: a coordinate without a gradient so far stays
        if bound < math.inf:
            move.clamp_(-bound, bound)
        return param.float() * self.decay - move.mul_(self.stride)

    @property
    def correction(self) -> float:
        """What the root of exp_avg_sq is multiplied by."""
        return 1 / math.sqrt(1 - self.beta2**self.step)

    @property
    def stride(self) -> float:
        """The learning rate over the correction of exp_avg."""
        return self.lr / (1 - self.beta1**self.step)

    @property
    def decay(self) -> float:
        """What a parameter is multiplied by before it moves."""
        return 1 - self.lr * self.weight_decay

    def bound(self) -> float:
        """Returns what exp_avg / (root of the corrected exp_avg_sq) cannot exceed at this step with exact moments.

        By Cauchy and Schwarz, exp_avg = (1 - b1) sum b1^k g_k <= (1 - b1) sqrt(sum (b1^2 / b2)^k) sqrt(sum b2^k g_k^2),
        and the last root is sqrt(exp_avg_sq / (1 - b2)). In the limit of many steps the move is at most 7.27 lr for
        betas of 0.9 and 0.999. Encoded moments can exceed it, because a second moment that grows by less than half the
        gap between two levels is rounded back every time. The result has a slack of 2^-10 for float32 rounding, and is
        infinite if beta1^2 >= beta2, where the sum has no limit.
        """
        ratio = self.beta1**2 / self.beta2 if self.beta2 > 0 else math.inf
        if ratio >= 1:
            return math.inf
        squares = (1 - ratio**self.step) / (1 - ratio)
        spread = (1 - self.beta2**self.step) / (1 - self.beta2)
        return (1 - self.beta1) * math.sqrt(squares * spread) * (1 + 2**-10)


def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    rule: AdamWRule,
    grad_scale: Tensor | None = None,
) -> None:
    """Returns nothing; makes one AdamW step with float32 moments, in place.

    Args:
        param: float32, bfloat16 or float16, any shape; computed in float32 and rounded once.
        grad: any floating dtype, the shape of param.
        exp_avg, exp_avg_sq: float32, the shape of param.
        rule: the numbers of the step.
        grad_scale: float32, one element: multiplies the gradient, in float32.

    An element whose new moments are not finite is left as it is.
    """
    new_avg, new_sq = rule.moments(_scaled(grad, grad_scale), exp_avg, exp_avg_sq)
    keep = ~(new_avg.isfinite() & new_sq.isfinite())
    param.copy_(torch.where(keep, param.float(), rule.updated(param, new_avg, new_sq)))
    exp_avg.copy_(torch.where(keep, exp_avg, new_avg))
    exp_avg_sq.copy_(torch.where(keep, exp_avg_sq, new_sq))


def adamw_8bit_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_absmax: Tensor,
    *,
    rule: AdamWRule,
    block_size: int = 256,
    grad_scale: Tensor | None = None,
) -> None:
    """Returns nothing; makes one AdamW step with encoded moments, in place: the reference of the fused kernel.

    Args:
        param: flat (n,) float32, bfloat16 or float16; computed in float32 and rounded once.
        grad: (n,), any floating dtype.
        exp_avg, exp_avg_sq: uint8 (n,) codes, signed and unsigned.
        exp_avg_absmax, exp_avg_sq_absmax: float32 (ceil(n / block_size),).
        rule: the numbers of the step.
        block_size: elements per absmax.
        grad_scale: float32, one element: multiplies the gradient, in float32.

    A block in which a new moment is not finite is left as it is.

    Source: arXiv 2110.02861, section 2. Ours: a second moment above zero never gets the code of zero, and the bound.
    """
    new_avg, new_sq = rule.moments(
        _scaled(grad, grad_scale),
        dequantize_dynamic8(exp_avg, exp_avg_absmax, signed=True, block_size=block_size),
        dequantize_dynamic8(exp_avg_sq, exp_avg_sq_absmax, signed=False, block_size=block_size),
    )
    avg_codes, avg_absmax = quantize_dynamic8(new_avg, signed=True, block_size=block_size)
    sq_codes, sq_absmax = quantize_dynamic8(new_sq, signed=False, block_size=block_size, never_zero=True)
    keep_block = ~(avg_absmax.isfinite() & sq_absmax.isfinite())
    keep = keep_block.repeat_interleave(block_size)[: param.numel()]
    param.copy_(torch.where(keep, param.float(), rule.updated(param, new_avg, new_sq, bound=rule.bound())))
    exp_avg.copy_(torch.where(keep, exp_avg, avg_codes))
    exp_avg_sq.copy_(torch.where(keep, exp_avg_sq, sq_codes))
    exp_avg_absmax.copy_(torch.where(keep_block, exp_avg_absmax, avg_absmax))
    exp_avg_sq_absmax.copy_(torch.where(keep_block, exp_avg_sq_absmax, sq_absmax))


def _scaled(grad: Tensor, grad_scale: Tensor | None) -> Tensor:
    return grad.float() if grad_scale is None else grad.float() * grad_scale


def flattened(rules: Sequence[AdamWRule]) -> list[float]:
    """Returns rules as an op takes them: six numbers each, the fields in order."""
    found: list[float] = []
    for rule in rules:  # astuple would copy deeply, which takes ten times as long
        found += (rule.lr, rule.beta1, rule.beta2, rule.eps, rule.weight_decay, rule.step)
    return found


def unflattened(numbers: Sequence[float]) -> Iterator[AdamWRule]:
    """Yields the rules that were flattened; equal neighbours are one object."""
    before, rule = None, None
    for start in range(0, len(numbers), 6):
        now = numbers[start : start + 6]
        if rule is None or now != before:
            lr, beta1, beta2, eps, weight_decay, step = before = now
            rule = AdamWRule(lr, beta1, beta2, eps, weight_decay, int(step))
        yield rule


def step_encoded(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    exp_avg_absmax: Sequence[Tensor],
    exp_avg_sq_absmax: Sequence[Tensor],
    rules: Sequence[float],
    grad_scale: Tensor | None,
    block_size: int,
) -> None:
    """Returns nothing; makes `adamw_8bit_step` for each of the tensors, which are contiguous and of any shape.

    Args:
        params, grads, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax: as there, one for each parameter.
        rules: as `flattened` gives them. block_size, grad_scale: as there, for all.
    """
    length = max(CHUNK // block_size, 1) * block_size
    columns = zip(params, grads, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, unflattened(rules), strict=True)
    for param, grad, avg, sq, avg_absmax, sq_absmax, rule in columns:
        param, grad, avg, sq = (tensor.view(-1) for tensor in (param, grad, avg, sq))
        for start in range(0, param.numel(), length):
            part = slice(start, start + length)
            blocks = slice(start // block_size, (start + length) // block_size)
            adamw_8bit_step(
                param[part], grad[part], avg[part], avg_absmax[blocks], sq[part], sq_absmax[blocks],
                rule=rule, block_size=block_size, grad_scale=grad_scale,
            )  # fmt: skip


def step_plain(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    rules: Sequence[float],
    grad_scale: Tensor | None,
) -> None:
    """Returns nothing; makes `adamw_step` for each of the tensors: see `step_encoded`."""
    for *tensors, rule in zip(params, grads, exp_avg, exp_avg_sq, unflattened(rules), strict=True):
        for p, g, m, v in zip(*[tensor.view(-1).split(CHUNK) for tensor in tensors], strict=True):
            adamw_step(p, g, m, v, rule=rule, grad_scale=grad_scale)

"""The seam's linear layers together with a low-rank update: low_rank.py over encoded weights.

A second page of ops.py, which alone knows formats and kernels. The two ops of a 4-bit
weight are whole for torch.compile's sake: of a decoded weight that it saw it would keep one from forward to backward.

    linear_nf4_plus:       x @ W.T + bias + low @ up.T
    linear_nf4_plus_grad:  grad @ W + keep * mask * (low @ down), the gradient of x
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlite import low_rank, ops
from qlite.nf4 import NF4Tensor
from qlite.operators import declare, on_cuda


def _decoded(coded, out_features: int, in_features: int, block_size: int, dtype: torch.dtype) -> Tensor:
    """Returns the weight (out_features, in_features), on CUDA in memory that the next call on this stream writes over."""
    device = coded[0].device
    if device.type != "cuda":
        return ops._decoded(coded, out_features, in_features, block_size, dtype)
    ops._check_rows_or_flat(coded, out_features, in_features, block_size)
    return ops._kernels("linear_nf4", device).decoded(coded, out_features, in_features, block_size, dtype)


def _linear_nf4_plus(x, codes, absmax, absmax_scale, absmax_offset, levels, out_features, block_size, bias, low, up) -> Tensor:
    coded = (codes, absmax, absmax_scale, absmax_offset, levels)
    if low.shape[0] <= low_rank.FEW_ROWS:
        return low_rank.add_update(torch.ops.qlite.linear_nf4(x, *coded, bias, out_features, block_size), low, up)
    return low_rank.linear(x, _decoded(coded, out_features, x.shape[-1], block_size, x.dtype), bias, low, up)


def _linear_nf4_plus_fake(x, codes, absmax, absmax_scale, absmax_offset, levels, out_features, *rest) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_nf4_plus_grad(
    grad, codes, absmax, absmax_scale, absmax_offset, levels, out_features, block_size, low, down, mask, keep
) -> Tensor:
    coded = (codes, absmax, absmax_scale, absmax_offset, levels)
    if low.shape[0] <= low_rank.FEW_ROWS and mask is None:
        return low_rank.add_update(torch.ops.qlite.linear_nf4_grad(grad, *coded, down.shape[1], block_size), low, down.T)
    weight = _decoded(coded, out_features, down.shape[1], block_size, grad.dtype)
    return low_rank.linear_grad(grad, weight, low, down, mask, keep)


def _linear_nf4_plus_grad_fake(grad, codes, absmax, absmax_scale, absmax_offset, levels, out_features, *rest) -> Tensor:
    _, _, down, *_ = rest
    return grad.new_empty((*grad.shape[:-1], down.shape[1]))


def _linear_nf4_grad(grad, in_features, codes, absmax, absmax_scale, absmax_offset, levels, out_features, block_size) -> Tensor:
    coded = (codes, absmax, absmax_scale, absmax_offset, levels)
    return ops._apply_linear_nf4_grad(grad, *coded, in_features, block_size)


declare(
    f"linear_nf4_plus(Tensor x, {ops._CODED}, int out_features, int block_size, Tensor? bias, Tensor low, Tensor up) -> Tensor",
    _linear_nf4_plus,
    _linear_nf4_plus_fake,
)
declare(
    f"linear_nf4_plus_grad(Tensor grad, {ops._CODED}, int out_features, int block_size, Tensor low, Tensor down,"
    " Tensor? mask, float keep) -> Tensor",
    _linear_nf4_plus_grad,
    _linear_nf4_plus_grad_fake,
)
on_cuda("linear_nf4_plus", _linear_nf4_plus)
on_cuda("linear_nf4_plus_grad", _linear_nf4_plus_grad)
_nf4 = low_rank.together(torch.ops.qlite.linear_nf4_plus, torch.ops.qlite.linear_nf4_plus_grad, _linear_nf4_grad, tensors=5)


def linear_nf4_low_rank(
    x: Tensor, weight: NF4Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, p: float = 0.0
) -> Tensor:
    """Returns `linear_nf4(x, weight, bias) + scaling * dropout(x) @ a.T @ b.T`, differentiable in x, bias, a and b.

    Args:
        x, weight, bias: as ops.linear_nf4 has them. a: (r, in_features). b: (out_features, r).
        p: probability of dropout, by PyTorch's generator; 0: none.
    """
    x = ops._activation(x, weight.shape[1], "linear_nf4")
    coded = (weight.codes, weight.absmax, weight.absmax_scale, weight.absmax_offset, weight.levels)
    return _nf4(x, a, b, bias, scaling, p, *coded, weight.shape[0], weight.block_size)


# int8: the base's own products, which may be of integers, and then the update.


def _linear_int8_plus(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, low: Tensor, up: Tensor) -> Tensor:
    return low_rank.add_update(ops.linear_int8(x, codes, absmax, bias), low, up)


def _linear_int8_plus_grad(grad, codes, absmax, low, down, mask, keep) -> Tensor:
    grad_x = ops._apply_linear_int8_grad(grad, codes, absmax)
    if mask is None:
        return low_rank.add_update(grad_x, low, down.T)
    return grad_x.add_(low_rank.masked(torch.mm(low, down), mask, keep).view(grad_x.shape))


def _linear_int8_grad(grad: Tensor, in_features: int, codes: Tensor, absmax: Tensor) -> Tensor:
    return ops._apply_linear_int8_grad(grad, codes, absmax)


_int8 = low_rank.together(_linear_int8_plus, _linear_int8_plus_grad, _linear_int8_grad, tensors=2)


def linear_int8_low_rank(
    x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, p: float = 0.0
) -> Tensor:
    """Returns `linear_int8(x, codes, absmax, bias) + scaling * dropout(x) @ a.T @ b.T`, as linear_nf4_low_rank does."""
    return _int8(ops._activation(x, codes.shape[1], "linear_int8"), a, b, bias, scaling, p, codes, absmax)

"""The seam of what is no encoded weight: operators with their reference and their kernel, as in ops.py."""

from __future__ import annotations

import torch
from torch import Tensor

from qlite import adamw_8bit, dropout, nf4, one_token, rotary
from qlite.operators import declare, differentiate, keep, kernels, mark_changed, on_cuda

#: Rows that kernels/few_tokens.py is for, and columns of a LayerNorm that it holds in registers.
MOST_ROWS, WIDEST = 64, 16384

# Dropout by seed and position: linear in x, and its own gradient.


def _dropout_cuda(x: Tensor, seed: Tensor, p: float) -> Tensor:
    if x.dtype == torch.float64:
        return dropout.dropout(x, seed, p)
    return kernels("dropout", x.device).dropout(x, seed, p, dropout.threshold(p))


def _keep_for_dropout(ctx, inputs, output) -> None:
    _, seed, ctx.p = inputs
    keep(ctx, seed)


declare("dropout(Tensor x, Tensor seed, float p) -> Tensor", dropout.dropout, lambda x, seed, p: torch.empty_like(x))
on_cuda("dropout", _dropout_cuda)
seeded_dropout = differentiate(
    "dropout",
    _keep_for_dropout,
    lambda ctx, grad: (seeded_dropout(grad, *ctx.saved_tensors, ctx.p), None, None),
    lambda ctx, x, seed, p: seeded_dropout(x, *ctx.saved_tensors, ctx.p),
)


# Rotary positions: linear in x; the gradient turns back.


def _rotary_cuda(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        return rotary.rotate(x, cos, sin)
    return kernels("rotary", x.device).rotate(x, cos, sin)


declare(
    "rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor",
    rotary.rotate,
    lambda x, cos, sin: torch.empty_like(x, memory_format=torch.contiguous_format),
)
on_cuda("rotary", _rotary_cuda)


def _rotary_backward(ctx, grad: Tensor):
    cos, sin = ctx.saved_tensors
    return rotate(grad, cos, -sin), None, None


def _rotary_jvp(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate(x, *ctx.saved_tensors)


rotate = differentiate("rotary", lambda ctx, inputs, output: keep(ctx, *inputs[1:]), _rotary_backward, _rotary_jvp)


# What a few tokens need beside the products by encoded weights; without gradients, which are for many tokens.


def _few(x: Tensor) -> bool:
    """Whether the kernels of few_tokens.py are for x: a few rows of one of their dtypes."""
    return x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x.shape[:-1].numel() <= MOST_ROWS


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _layer_norm_cuda(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if not _few(x) or x.shape[-1] > WIDEST:
        return _layer_norm(x, weight, bias, eps)
    return kernels("few_tokens", x.device).layer_norm(x, weight.contiguous(), bias.contiguous(), eps)


def _lora_add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    low_rank = torch.nn.functional.linear(x.to(y.dtype), a.to(y.dtype))
    return y + torch.nn.functional.linear(low_rank, b.to(y.dtype)) * scaling


def _lora_add_cuda(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    if not (_few(x) and _few(y) and a.dtype == b.dtype == torch.float32):
        return _lora_add(y, x, a, b, scaling)
    arguments = (tensor.contiguous() for tensor in (y, x, a, b))
    return kernels("few_tokens", x.device).lora_add(*arguments, scaling)


declare(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    _layer_norm, lambda x, weight, bias, eps: torch.empty_like(x),
)  # fmt: skip
declare(
    "lora_add(Tensor y, Tensor x, Tensor a, Tensor b, float scaling) -> Tensor",
    _lora_add, lambda y, x, a, b, scaling: torch.empty_like(y),
)  # fmt: skip
on_cuda("layer_norm", _layer_norm_cuda)
on_cuda("lora_add", _lora_add_cuda)


def _lora_update(x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return torch.nn.functional.linear(torch.nn.functional.linear(x.to(a.dtype), a), b).float() * scaling


def _lora_update_cuda(x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    if not (_few(x) and a.dtype == b.dtype == torch.float32):
        return _lora_update(x, a, b, scaling)
    return kernels("few_tokens", x.device).lora_update(x.contiguous(), a.contiguous(), b.contiguous(), scaling)


declare(
    "lora_update(Tensor x, Tensor a, Tensor b, float scaling) -> Tensor", _lora_update,
    lambda x, a, b, scaling: x.new_empty(*x.shape[:-1], b.shape[0], dtype=torch.float32),
)  # fmt: skip
on_cuda("lora_update", _lora_update_cuda)


# One token a row (one_token.py). A weight is the list of its codes, absmax, scale and offset of those if there are, levels.


def _two_products(xs: list[Tensor], one: list[Tensor], other: list[Tensor], block_size: int) -> Tensor:
    wide = torch.promote_types(xs[0].dtype, torch.float32)
    products = []
    for x, (codes, absmax, *double_quant, levels) in zip((xs[0], xs[-1]), (one, other), strict=True):
        scale, offset = double_quant or (None, None)
        weight = nf4.dequantize(codes, absmax, scale, offset, levels, x.shape[-1], block_size, wide)
        products.append(torch.nn.functional.linear(x.to(wide), weight))
    return (torch.cat(products, dim=-1) if len(xs) == 1 else products[0] + products[1])[None]


def _two_products_fake(xs: list[Tensor], one: list[Tensor], other: list[Tensor], block_size: int) -> Tensor:
    parts = torch.library.get_ctx().new_dynamic_size()  # of a GPU, which adds them up where they are read
    columns = one[0].shape[0] + (other[0].shape[0] if len(xs) == 1 else 0)
    return xs[0].new_empty(parts, xs[0].shape[0], columns, dtype=torch.promote_types(xs[0].dtype, torch.float32))


def _two_products_cuda(xs: list[Tensor], one: list[Tensor], other: list[Tensor], block_size: int) -> Tensor:
    rows, out_features = {x.shape[:-1] for x in xs}, (one[0].shape[0], other[0].shape[0])
    if not (len(xs) in (1, 2) and len(rows) == 1 and xs[0].ndim == 2 and 1 <= xs[0].shape[0] <= one_token.FEW_ROWS):
        raise ValueError(
            f"two_products: x of {[tuple(x.shape) for x in xs]}; wanted one or two of up to {one_token.FEW_ROWS} rows"
        )
    if block_size % 64 or any(x.shape[1] % 64 or x.dtype not in (torch.float16, torch.bfloat16) for x in xs):
        raise ValueError("two_products: wanted float16 or bfloat16, columns and blocks of a multiple of 64")
    if len(xs) == 2 and out_features[0] != out_features[1]:
        raise ValueError(f"two_products: weights of {out_features} rows, whose products cannot be added")
    for x, (codes, absmax, *double_quant, levels) in zip((xs[0], xs[-1]), (one, other), strict=True):
        scale, offset = double_quant or (None, None)
        nf4.check_coded(codes, absmax, scale, offset, levels, x.shape[1], block_size)
    return kernels("linear_nf4", xs[0].device).two_products(xs, one, other, block_size)


def _add_norm_cuda(x, parts, weight, bias, eps) -> tuple[Tensor, Tensor]:
    return kernels("one_token", x.device).add_norm(x.contiguous(), parts, weight.contiguous(), bias.contiguous(), eps)


def _between_cuda(fused, up, cos, sin, keys, values, at, visible) -> tuple[Tensor, Tensor]:
    tables = cos.contiguous(), sin.contiguous()
    found = kernels("one_token", keys.device).between(fused, up, *tables, keys, values, at, visible.contiguous())
    mark_changed([keys, values])
    return found


def _between_fake(fused, up, cos, sin, keys, values, at, visible) -> tuple[Tensor, Tensor]:
    batch, kv_heads, _, size = keys.shape
    return keys.new_empty(batch, fused[0].shape[2] - 2 * kv_heads * size), keys.new_empty(batch, up[0].shape[2])


declare("two_products(Tensor[] xs, Tensor[] one, Tensor[] other, int block_size) -> Tensor", _two_products, _two_products_fake)
declare(
    "add_norm(Tensor x, Tensor[] parts, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)",
    one_token.add_norm, lambda x, *_: (torch.empty_like(x), torch.empty_like(x)),
)  # fmt: skip
declare(
    "between_products(Tensor[] fused, Tensor[] up, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor at, "
    "Tensor visible) -> (Tensor, Tensor)",
    one_token.between_products, _between_fake,
)  # fmt: skip
on_cuda("two_products", _two_products_cuda)
on_cuda("add_norm", _add_norm_cuda)
on_cuda("between_products", _between_cuda)


# AdamW, in place, over lists of contiguous tensors of one device and, for the kernels, one dtype; `rules` are flattened.


def _adamw_8bit_cuda(params, grads, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, rules, grad_scale, block_size):
    moments = (exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax)
    module = kernels("adamw_8bit", params[0].device)
    # What a program's registers do not hold is stepped by the reference, on the GPU too.
    step = module.step_encoded if block_size <= module.LONGEST_BLOCK else adamw_8bit.step_encoded
    step(params, grads, *moments, rules, grad_scale, block_size)
    mark_changed(params, *moments)


def _adamw_cuda(params, grads, exp_avg, exp_avg_sq, rules, grad_scale) -> None:
    kernels("adamw_8bit", params[0].device).step_plain(params, grads, exp_avg, exp_avg_sq, rules, grad_scale)
    mark_changed(params, exp_avg, exp_avg_sq)


_STEPPED = "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq"
_ABSMAX = "Tensor(d!)[] exp_avg_absmax, Tensor(e!)[] exp_avg_sq_absmax"
declare(
    f"adamw_8bit_({_STEPPED}, {_ABSMAX}, float[] rules, Tensor? grad_scale, int block_size) -> ()",
    adamw_8bit.step_encoded, lambda *_: None,
)  # fmt: skip
declare(f"adamw_({_STEPPED}, float[] rules, Tensor? grad_scale) -> ()", adamw_8bit.step_plain, lambda *_: None)
on_cuda("adamw_8bit_", _adamw_8bit_cuda)
on_cuda("adamw_", _adamw_cuda)

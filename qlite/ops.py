"""The seam: every operator over encoded weights, declared once, with its reference for any device and its kernel for CUDA.

This file and model_ops.py alone know both a reference and a kernel. Each op is a `torch.library` op (`torch.ops.qlite.*`)
with a schema, a fake implementation (shapes only, for torch.compile and meta tensors), a gradient where it has one, the
reference under CompositeExplicitAutograd and the kernel under CUDA. PyTorch's dispatcher chooses by the device of the
tensors; there is no switch of ours. To run the reference on purpose, call nf4.py and int8.py by name.

The functions of this file (`quantize_nf4`, `linear_nf4`, ...) check their arguments once and call the op.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlite import int8, nf4
from qlite.int8 import Int8Tensor
from qlite.nf4 import NF4Tensor
from qlite.operators import declare, differentiate, grad_bias, keep, kernels, on_cuda

# NF4: encode and decode.


_CODED = "Tensor codes, Tensor absmax, Tensor? absmax_scale, Tensor? absmax_offset, Tensor levels"


def _quantize_nf4_cuda(weight: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    return kernels("nf4_codec", weight.device).quantize(weight, levels, block_size)


def _quantize_nf4_fake(weight: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    codes = weight.new_empty((rows, (columns + 1) // 2), dtype=torch.uint8)
    return codes, weight.new_empty((rows, nf4.blocks_per_row(columns, block_size)), dtype=torch.float32)


declare("quantize_nf4(Tensor weight, Tensor levels, int block_size) -> (Tensor, Tensor)", nf4.quantize, _quantize_nf4_fake)
on_cuda("quantize_nf4", _quantize_nf4_cuda)


def _search_nf4_cuda(weight: Tensor, levels: Tensor, block_size: int, weighting: Tensor | None) -> Tensor:
    return kernels("nf4_search", weight.device).search(weight, levels, block_size, nf4.SHARES, weighting)


def _search_nf4_fake(weight: Tensor, levels: Tensor, block_size: int, weighting: Tensor | None) -> Tensor:
    return _quantize_nf4_fake(weight, levels, block_size)[1]


def _encode_nf4_cuda(weight: Tensor, scales: Tensor, levels: Tensor, block_size: int) -> Tensor:
    return kernels("nf4_codec", weight.device).quantize(weight, levels, block_size, scales)[0]


def _encode_nf4_fake(weight: Tensor, scales: Tensor, levels: Tensor, block_size: int) -> Tensor:
    return _quantize_nf4_fake(weight, levels, block_size)[0]


declare("search_nf4(Tensor weight, Tensor levels, int block_size, Tensor? weighting) -> Tensor", nf4.search, _search_nf4_fake)
declare("encode_nf4(Tensor weight, Tensor scales, Tensor levels, int block_size) -> Tensor", nf4.encode, _encode_nf4_fake)
on_cuda("search_nf4", _search_nf4_cuda)
on_cuda("encode_nf4", _encode_nf4_cuda)


def _quantize_nf4_absmax_cuda(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return kernels("nf4_codec", absmax.device).quantize_absmax(absmax)


def _quantize_nf4_absmax_fake(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = -(-absmax.numel() // nf4.ABSMAX_BLOCK_SIZE)
    return torch.empty_like(absmax, dtype=torch.uint8), absmax.new_empty(groups), absmax.new_empty(1)


declare("quantize_nf4_absmax(Tensor absmax) -> (Tensor, Tensor, Tensor)", nf4.quantize_absmax, _quantize_nf4_absmax_fake)
on_cuda("quantize_nf4_absmax", _quantize_nf4_absmax_cuda)


def _dequantize_nf4(codes, absmax, absmax_scale, absmax_offset, levels, in_features, block_size, dtype) -> Tensor:
    nf4.check_coded(codes, absmax, absmax_scale, absmax_offset, levels, in_features, block_size)
    return nf4.dequantize(codes, absmax, absmax_scale, absmax_offset, levels, in_features, block_size, dtype)


def _dequantize_nf4_cuda(codes, absmax, absmax_scale, absmax_offset, levels, in_features, block_size, dtype) -> Tensor:
    nf4.check_coded(codes, absmax, absmax_scale, absmax_offset, levels, in_features, block_size)
    return kernels("nf4_codec", codes.device).dequantize(
        codes, absmax, absmax_scale, absmax_offset, levels, in_features, block_size, dtype
    )


def _dequantize_nf4_fake(codes, absmax, absmax_scale, absmax_offset, levels, in_features, block_size, dtype) -> Tensor:
    return codes.new_empty((codes.shape[0], in_features), dtype=dtype)


declare(
    f"dequantize_nf4({_CODED}, int in_features, int block_size, ScalarType dtype) -> Tensor",
    _dequantize_nf4,
    _dequantize_nf4_fake,
)
on_cuda("dequantize_nf4", _dequantize_nf4_cuda)


# NF4: the linear layer. The decoded weight lives for one product only; autograd keeps the bytes.


def _decoded(coded, out_features: int, in_features: int, block_size: int, dtype: torch.dtype) -> Tensor:
    """Returns the weight (out_features, in_features) of its five coded parts, which may hold it flat: see nf4.coded_row."""
    shape = torch.Size((out_features, in_features))
    row = nf4.coded_row(coded[0].shape[0], shape)
    return torch.ops.qlite.dequantize_nf4(*coded, row, block_size, dtype).view(shape)


def _linear_nf4(x, codes, absmax, absmax_scale, absmax_offset, levels, bias, out_features, block_size) -> Tensor:
    coded = (codes, absmax, absmax_scale, absmax_offset, levels)
    return nf4.linear(x, _decoded(coded, out_features, x.shape[-1], block_size, x.dtype), bias)


def _check_rows_or_flat(coded, out_features: int, in_features: int, block_size: int) -> None:
    codes, absmax, absmax_scale, absmax_offset, levels = coded
    row = nf4.coded_row(codes.shape[0], torch.Size((out_features, in_features)))
    nf4.check_coded(codes, absmax, absmax_scale, absmax_offset, levels, row, block_size)


def _check_bias(bias: Tensor | None, out_features: int, caller: str) -> None:
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"{caller}: bias has shape {tuple(bias.shape)}; wanted ({out_features},)")


def _linear_nf4_cuda(x, codes, absmax, absmax_scale, absmax_offset, levels, bias, out_features, block_size) -> Tensor:
    coded = (codes, absmax, absmax_scale, absmax_offset, levels)
    _check_rows_or_flat(coded, out_features, x.shape[-1], block_size)
    _check_bias(bias, out_features, "linear_nf4")
    return kernels("linear_nf4", x.device).linear(x, *coded, bias, out_features, block_size)


def _linear_nf4_fake(x, codes, absmax, absmax_scale, absmax_offset, levels, bias, out_features, block_size) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_nf4_grad(grad, codes, absmax, absmax_scale, absmax_offset, levels, in_features, block_size) -> Tensor:
    coded = (codes, absmax, absmax_scale, absmax_offset, levels)
    return grad @ _decoded(coded, grad.shape[-1], in_features, block_size, grad.dtype)


def _linear_nf4_grad_cuda(grad, codes, absmax, absmax_scale, absmax_offset, levels, in_features, block_size) -> Tensor:
    coded = (codes, absmax, absmax_scale, absmax_offset, levels)
    _check_rows_or_flat(coded, grad.shape[-1], in_features, block_size)
    return kernels("linear_nf4", grad.device).gradient(grad, coded, in_features, block_size)


def _linear_nf4_grad_fake(grad, codes, absmax, absmax_scale, absmax_offset, levels, in_features, block_size) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _keep_for_linear_nf4(ctx, inputs, output) -> None:
    x, *coded, bias, ctx.out_features, ctx.block_size = inputs
    keep(ctx, *coded)
    ctx.in_features, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype


def _linear_nf4_backward(ctx, grad: Tensor):
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = _apply_linear_nf4_grad(grad, *ctx.saved_tensors, ctx.in_features, ctx.block_size)
    return grad_x, None, None, None, None, None, grad_bias(ctx, grad, 6), None, None


def _linear_nf4_jvp(ctx, x, codes, absmax, absmax_scale, absmax_offset, levels, bias, out_features, block_size) -> Tensor:
    return _apply_linear_nf4(x, *ctx.saved_tensors, bias, ctx.out_features, ctx.block_size)


def _keep_for_linear_nf4_grad(ctx, inputs, output) -> None:
    grad, *coded, ctx.in_features, ctx.block_size = inputs
    keep(ctx, *coded)
    ctx.out_features = grad.shape[-1]


def _linear_nf4_grad_backward(ctx, grad: Tensor):
    return _apply_linear_nf4(grad, *ctx.saved_tensors, None, ctx.out_features, ctx.block_size), *[None] * 7


def _linear_nf4_grad_jvp(ctx, grad, *rest) -> Tensor:
    return _apply_linear_nf4_grad(grad, *ctx.saved_tensors, ctx.in_features, ctx.block_size)


declare(
    f"linear_nf4(Tensor x, {_CODED}, Tensor? bias, int out_features, int block_size) -> Tensor",
    _linear_nf4,
    _linear_nf4_fake,
)
declare(
    f"linear_nf4_grad(Tensor grad, {_CODED}, int in_features, int block_size) -> Tensor",
    _linear_nf4_grad,
    _linear_nf4_grad_fake,
)
on_cuda("linear_nf4", _linear_nf4_cuda)
on_cuda("linear_nf4_grad", _linear_nf4_grad_cuda)
_apply_linear_nf4 = differentiate("linear_nf4", _keep_for_linear_nf4, _linear_nf4_backward, _linear_nf4_jvp)
_apply_linear_nf4_grad = differentiate(
    "linear_nf4_grad", _keep_for_linear_nf4_grad, _linear_nf4_grad_backward, _linear_nf4_grad_jvp
)


# int8: the linear layer over row-wise absmax codes. `dynamic` says whether x is encoded too (int8.is_dynamic): decided before
# the op, where vmap shows one example; derivatives are those of the weight-only product, which is linear in x.


def _dequantize_int8(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    return int8.dequantize_absmax(codes, absmax, codes.shape[1]).to(dtype)


def _dequantize_int8_cuda(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float64:
        return _dequantize_int8(codes, absmax, dtype)
    return kernels("linear_int8", codes.device).dequantize(codes.contiguous(), absmax.contiguous(), dtype)


def _dequantize_int8_fake(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _linear_int8(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, dynamic: bool) -> Tensor:
    return (int8.linear_dynamic if dynamic else int8.linear_weight_only)(x, codes, absmax, bias)


def _linear_int8_cuda(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, dynamic: bool) -> Tensor:
    if x.dtype == torch.float64:
        return _linear_int8(x, codes, absmax, bias, dynamic)
    _check_bias(bias, codes.shape[0], "linear_int8")
    module, rows = kernels("linear_int8", x.device), x.reshape(x.shape[:-1].numel(), x.shape[-1])
    multiply = module.linear_dynamic if dynamic else module.linear_weight_only
    y = multiply(rows, codes.contiguous(), absmax.contiguous(), None if bias is None else bias.to(x.dtype).contiguous())
    return y.view(*x.shape[:-1], codes.shape[0])


def _linear_int8_fake(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, dynamic: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _linear_int8_grad(grad: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    return grad @ dequantize_int8_rows(codes, absmax, grad.dtype)


def _linear_int8_grad_fake(grad: Tensor, codes: Tensor, absmax: Tensor) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], codes.shape[1]))


def _keep_for_linear_int8(ctx, inputs, output) -> None:
    _, codes, absmax, bias, _ = inputs
    keep(ctx, codes, absmax)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_int8_backward(ctx, grad: Tensor):
    grad_x = _apply_linear_int8_grad(grad, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
    return grad_x, None, None, grad_bias(ctx, grad, 3), None


def _linear_int8_jvp(ctx, x, codes, absmax, bias, dynamic) -> Tensor:
    return _apply_linear_int8(x, *ctx.saved_tensors, bias, False)


def _keep_for_linear_int8_grad(ctx, inputs, output) -> None:
    keep(ctx, *inputs[1:])


def _linear_int8_grad_backward(ctx, grad: Tensor):
    return _apply_linear_int8(grad, *ctx.saved_tensors, None, False), None, None


def _linear_int8_grad_jvp(ctx, grad, codes, absmax) -> Tensor:
    return _apply_linear_int8_grad(grad, *ctx.saved_tensors)


declare("dequantize_int8(Tensor codes, Tensor absmax, ScalarType dtype) -> Tensor", _dequantize_int8, _dequantize_int8_fake)
declare(
    "linear_int8(Tensor x, Tensor codes, Tensor absmax, Tensor? bias, bool dynamic) -> Tensor", _linear_int8, _linear_int8_fake
)
declare("linear_int8_grad(Tensor grad, Tensor codes, Tensor absmax) -> Tensor", _linear_int8_grad, _linear_int8_grad_fake)
on_cuda("dequantize_int8", _dequantize_int8_cuda)
on_cuda("linear_int8", _linear_int8_cuda)
_apply_linear_int8 = differentiate("linear_int8", _keep_for_linear_int8, _linear_int8_backward, _linear_int8_jvp)
_apply_linear_int8_grad = differentiate(
    "linear_int8_grad", _keep_for_linear_int8_grad, _linear_int8_grad_backward, _linear_int8_grad_jvp
)


# The functions that users and modules call: arguments are checked here, once, before any work.


def _check_weight(weight: Tensor, caller: str) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{caller}: weight is {found}; wanted a floating-point tensor")
    if weight.numel() and weight.device.type != "meta":
        low, high = torch.aminmax(weight.detach())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            where = (~torch.isfinite(weight)).nonzero()[0].tolist()
            raise ValueError(f"{caller}: weight holds a non-finite value ({weight[tuple(where)].item()}) at {where}")


def levels_tensor(levels: str | Sequence[float], device: torch.device | str) -> Tensor:
    """Returns a table of 16 levels as float32 (16,) on `device`; ValueError as in nf4.levels_of."""
    return torch.tensor(nf4.levels_of(levels), dtype=torch.float32, device=device)


def check_block_size(block_size: int) -> None:
    """Raises ValueError unless `block_size` is one of nf4.BLOCK_SIZES."""
    if not isinstance(block_size, int) or block_size not in nf4.BLOCK_SIZES:
        raise ValueError(f"block_size is {block_size!r}; wanted one of {', '.join(map(str, nf4.BLOCK_SIZES))}")


def _relative_weighting(weighting: Tensor, columns: int, device: torch.device) -> Tensor:
    """Returns the weights of columns as shares of the largest, float32 on `device`; ValueError for what is none."""
    if weighting.shape != (columns,) or not (weighting.isfinite() & (weighting >= 0)).all() or not weighting.any():
        raise ValueError(f"weighting: wanted ({columns},) finite numbers, none below 0, not all 0; got {weighting}")
    weighting = weighting.detach().to(device, torch.float32)
    return weighting / weighting.max()


def quantize_nf4(
    weight: Tensor,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    levels: str | Sequence[float] = "nf4",
    flat: bool = False,
    search: bool = False,
    weighting: Tensor | None = None,
) -> NF4Tensor:
    """Returns `weight` encoded in 4 bits, on its device.

    Args:
        weight: floating-point tensor of any shape, finite; blocks run along the last dimension. float64 is first
            rounded to float32.
        block_size: weights per absmax: 32, 64, 128, ..., 4096.
        double_quant: encode the absmax values in 8 bits too (4.127 instead of 4.5 bits per weight at block size 64).
        levels: a name of nf4.TABLES ("nf4", "fp4", "af4", "bof4-s", "ls4"), 16 values in [-1, 1], or "best": of
            nf4.CANDIDATES the table with the least squared error of this weight.
        flat: blocks run over the flattened tensor, across its rows, as bitsandbytes has them.
        search: the scale of a block is not its absmax but, of some tried, the one with the least squared error (nf4.search),
            and codes are chosen for the scale as it is after double quantization. The format is the same, absmax being of
            either sign. False: the bits of bitsandbytes.
        weighting: of the squared errors of each column, where `search` compares them: (columns,), 0 or more; the mean square
            of what a layer multiplies the column by, for example.

    Raises:
        TypeError: weight is not floating point.
        ValueError: weight is not finite (its first such index is named), a bad block size, table or weighting, or a
            weighting without a search.

    Source: QLoRA (arXiv 2305.14314), section 3.

    Example:
        >>> q = qlite.quantize_nf4(torch.randn(4672, 4544))
        >>> round(q.bits_per_weight, 3)
        4.127
    """
    _check_weight(weight, "quantize_nf4")
    check_block_size(block_size)
    if weighting is not None and not search:
        raise ValueError("quantize_nf4: weighting is of the errors that a search compares; pass search=True")
    if levels == "best":
        options = {"block_size": block_size, "double_quant": double_quant, "flat": flat}
        options |= {"search": search, "weighting": weighting}
        tried = (quantize_nf4(weight, levels=name, **options) for name in nf4.CANDIDATES)
        return min(tried, key=lambda encoded: encoded.squared_error(weight, weighting))
    table = levels_tensor(levels, weight.device)
    row = nf4.row_length(weight.shape)
    rows = (1 if flat else weight.shape[:-1].numel()), (weight.numel() if flat else row)
    matrix = weight.detach().reshape(rows)
    if search:
        weighting = None if weighting is None else _relative_weighting(weighting, row, weight.device)
        absmax = torch.ops.qlite.search_nf4(matrix, table, block_size, weighting)
    else:
        codes, absmax = torch.ops.qlite.quantize_nf4(matrix, table, block_size)
    scale = offset = None
    if double_quant:
        absmax, scale, offset = torch.ops.qlite.quantize_nf4_absmax(absmax)
    if search:
        codes = torch.ops.qlite.encode_nf4(matrix, nf4.dequantize_absmax(absmax, scale, offset), table, block_size)
    return NF4Tensor(codes, absmax, scale, offset, table, weight.shape, weight.dtype, block_size)


def quantize_int8(x: Tensor, *, zero_point: bool = False, per: str = "row", block_size: int | None = None) -> Int8Tensor:
    """Returns `x` encoded in 8-bit integers, on its device.

    Args:
        x: floating-point tensor of any shape, finite; rows are its last dimension.
        zero_point: affine codes over [min, max] instead of symmetric ones over [-absmax, absmax].
        per: "tensor", "row" or "block": what shares a scale.
        block_size: columns per scale, for per="block" alone.

    Raises:
        TypeError: x is not floating point.
        ValueError: x is not finite, `per` is unknown, or block_size is missing, below 1, or given without per="block".

    Source: LLM.int8() (arXiv 2208.07339), section 2.1.

    Example:
        >>> qlite.quantize_int8(torch.tensor([1.2, -0.5, 5.4]), per="tensor").codes.tolist()
        [[28, -12, 127]]
    """
    _check_weight(x, "quantize_int8")
    if per not in ("tensor", "row", "block"):
        raise ValueError(f"quantize_int8: per is {per!r}; wanted 'tensor', 'row' or 'block'")
    if (per == "block") != (block_size is not None) or (block_size is not None and block_size < 1):
        raise ValueError(f"quantize_int8: block_size is {block_size!r} with per={per!r}; only per='block' takes one, >= 1")
    row = nf4.row_length(x.shape)
    rows = x.detach().reshape(-1, row) if row else x.new_empty(x.shape[:-1].numel(), 0)
    columns = block_size or max(row, 1)
    options = {"per_tensor": per == "tensor", "block_size": columns}
    encode = int8.quantize_zero_point if zero_point else int8.quantize_absmax
    # A share of the rows at a time, where rows are independent: the temporaries take tens of bytes a weight.
    parts = [rows] if per == "tensor" else rows.split(max(1, nf4.CHUNK // max(row, 1)))
    encoded = [torch.cat(pieces) for pieces in zip(*(encode(part, **options) for part in parts), strict=True)]
    absmax, scale, zero = (None, *encoded[1:]) if zero_point else (encoded[1], None, None)
    return Int8Tensor(encoded[0], absmax, scale, zero, x.shape, x.dtype, columns)


def activation(x: Tensor, in_features: int, device: torch.device, caller: str) -> Tensor:
    """Returns x, or under autocast x in its dtype.

    Raises:
        TypeError: x is no floating-point tensor. ValueError: it is not (..., in_features), or not on the weight's device.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{caller}: x is {found}; wanted a floating-point tensor")
    if x.shape[-1:] != (in_features,):
        raise ValueError(f"{caller}: x has shape {tuple(x.shape)}; wanted (..., {in_features})")
    if x.device != device:
        raise ValueError(f"{caller}: x is on {x.device}, the weight on {device}; move one to the other with .to()")
    # A custom op is unknown to autocast: what autocast does to F.linear is done here. (Of a meta tensor it cannot be asked.)
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


def linear_nf4(x: Tensor, weight: NF4Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns `x @ weight.T + bias` in the dtype of x (under autocast: autocast's), differentiable in x and bias.

    Args:
        x: (..., in_features) floating point.
        weight: an encoded (out_features, in_features) tensor; it gets no gradient.
        bias: (out_features,) or None.

    Raises:
        ValueError: the shapes do not fit, or the devices differ. TypeError: x is not floating point.
    """
    if len(weight.shape) != 2:
        raise ValueError(f"linear_nf4: weight has shape {tuple(weight.shape)}; wanted (out_features, in_features)")
    if weight.codes.shape[0] not in (1, weight.shape[0]):
        raise ValueError(
            f"linear_nf4: {weight.codes.shape[0]} rows of codes for a weight of {weight.shape[0]}; wanted as many, or 1"
        )
    _check_bias(bias, weight.shape[0], "linear_nf4")
    x = activation(x, weight.shape[1], weight.codes.device, "linear_nf4")
    coded = (weight.codes, weight.absmax, weight.absmax_scale, weight.absmax_offset, weight.levels)
    return _apply_linear_nf4(x, *coded, bias, weight.shape[0], weight.block_size)


def dequantize_int8_rows(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns row-wise absmax int8 weights (out_features, in_features) decoded into `dtype`."""
    return torch.ops.qlite.dequantize_int8(codes, absmax, dtype)


def linear_int8(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns `x @ weight.T + bias` for row-wise absmax int8 weights, in the dtype of x, differentiable in x and bias.

    More than 64 rows of 16-bit x are encoded too, each by its own absmax, and integers multiplied (int8.linear_dynamic);
    anything else is multiplied as it is (int8.linear_weight_only). The gradient is that of the latter in both.

    Args:
        x: (..., in_features) floating point. codes: int8 (out_features, in_features).
        absmax: float32 (out_features, 1). bias: (out_features,) or None.

    Raises:
        ValueError: the shapes do not fit, or the devices differ. TypeError: x is not floating point.

    Source: LLM.int8() (arXiv 2208.07339), section 3.1.
    """
    if absmax.shape != (codes.shape[0], 1):
        raise ValueError(f"linear_int8: absmax has shape {tuple(absmax.shape)}; wanted ({codes.shape[0]}, 1)")
    _check_bias(bias, codes.shape[0], "linear_int8")
    x = activation(x, codes.shape[1], codes.device, "linear_int8")
    return _apply_linear_int8(x, codes, absmax, bias, int8.is_dynamic(x))

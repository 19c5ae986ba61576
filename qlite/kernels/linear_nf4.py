"""x @ decode(W).T and grad @ decode(W) on CUDA: which kernel runs, and the way by a decoded weight for many rows.

Few rows are multiplied by the codes themselves (few_rows.py, small_batch.py). For many the arithmetic is what takes time: the
weight is decoded for one product, by cuBLAS. The allocator gives every layer of a stream the same memory for it, and autograd
keeps none. tiles.py says from where on. The specification is nf4.linear over nf4.dequantize.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlite.kernels import few_rows, nf4_codec, small_batch, tiles


def linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    levels: Tensor,
    bias: Tensor | None,
    out_features: int,
    block_size: int,
) -> Tensor:
    """Returns `x @ decode(W).T + bias` (..., out_features) in the dtype of x, by the method that tiles.py names."""
    in_features = x.shape[-1]
    rows = x.numel() // max(1, in_features)
    coded = codes, absmax, absmax_scale, absmax_offset, levels
    if codes.shape[0] != out_features and in_features % block_size == 0:
        # Encoded flat, in blocks that no two rows share: the bytes are those of rows.
        rows_of = codes.view(out_features, in_features // 2), absmax.view(out_features, in_features // block_size)
        coded = *rows_of, *coded[2:]
    tile = None
    if coded[0].shape[0] == out_features and coded[0].data_ptr() % 16 == 0 and coded[0].is_contiguous():
        tile = tiles.linear_nf4(rows, (out_features, in_features), block_size, x.dtype, x.device)
    if tile is None:
        weight = decoded(coded, out_features, in_features, block_size, x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    flat = aligned(x.reshape(rows, in_features))
    run = few_rows.multiply if tile.method == "few rows" else small_batch.multiply
    return run(flat, coded, bias, block_size, tile).view(*x.shape[:-1], out_features)


def two_products(xs: list[Tensor], one: list[Tensor], other: list[Tensor], block_size: int) -> Tensor:
    """Returns the parts of two products of up to sixteen rows, as few_rows.multiply_two."""
    stacked = len(xs) == 1
    weights = [tuple(w) if len(w) == 5 else (*w[:2], None, None, w[2]) for w in (one, other)]
    tile = tiles.two_products("stacked" if stacked else "summed", len(xs[0]), xs[0].device)
    if tile is None or any(w[0].data_ptr() % 16 for w in weights):
        products = [linear(x, *w, None, len(w[0]), block_size) for x, w in zip((xs[0], xs[-1]), weights)]
        return (torch.cat(products, dim=1)[None] if stacked else torch.stack(products)).float()
    return few_rows.multiply_two([aligned(x) for x in xs], weights, block_size, tile)


def aligned(x: Tensor) -> Tensor:
    """Returns x, contiguous and at an address that is a multiple of 16: a copy where it is not."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def gradient(grad: Tensor, coded: tuple[Tensor | None, ...], in_features: int, block_size: int) -> Tensor:
    """Returns `grad @ decode(W)` (..., in_features): the gradient of the input, without a transposed copy of the weight."""
    return grad @ decoded(coded, grad.shape[-1], in_features, block_size, grad.dtype)


def decoded(coded, out_features: int, in_features: int, block_size: int, dtype: torch.dtype) -> Tensor:
    """Returns the weight (out_features, in_features) of its five parts, which may hold it flat."""
    row = in_features if coded[0].shape[0] == out_features else out_features * in_features
    return nf4_codec.dequantize(*coded, row, block_size, dtype).view(out_features, in_features)

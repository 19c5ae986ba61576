"""Linear layers over a weight of other libraries, each as calls x -> x @ weight.T: what qlite is shown beside.

bitsandbytes and torchao's NF4Tensor hold the same format as qlite. torchao's int4 (torch's tinygemm) and gemlite's hold
plain 4-bit integers with a scale and a zero point for 64 weights, which cost less to decode: the nearest anchors for a
few rows. cuBLAS multiplies by the dense bf16 weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

Call = Callable[[Tensor], Tensor]


def cublas(weight: Tensor) -> Call:
    """Returns the product with the dense weight."""
    return lambda x: torch.mm(x, weight.T)


def cublas_gradient(weight: Tensor) -> Call:
    """Returns the input gradient of the dense layer."""
    return lambda grad: torch.mm(grad, weight)


def bitsandbytes(weight: Tensor) -> Call:
    """Returns bitsandbytes' product with the weight in NF4, blocks of 64, double-quantized."""
    import bitsandbytes as bnb

    coded, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return lambda x: bnb.matmul_4bit(x, coded, state)


def bitsandbytes_gradient(weight: Tensor) -> Call:
    """Returns what the backward of bitsandbytes' product does: a dequantize, and a product with its result."""
    import bitsandbytes as bnb

    coded, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return lambda grad: torch.matmul(grad, bnb.functional.dequantize_4bit(coded, state).to(grad.dtype))


def torchao_int4(weight: Tensor) -> Call:
    """Returns torchao's int4 layer in torch's tinygemm layout, groups of 64."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(layer, Int4WeightOnlyConfig(group_size=64, int4_packing_format="tile_packed_to_4d", set_inductor_config=False))
    return layer


def torchao_nf4(weight: Tensor) -> Call:
    """Returns torchao's NF4Tensor layer, blocks of 64, run eagerly; its groups of scales must divide the weight."""
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4, to_nf4

    groups = next(size for size in (256, 128, 64, 32) if weight.numel() // 64 % size == 0)
    return functools.partial(lambda coded, x: linear_nf4(x, coded), to_nf4(weight, 64, groups))


def gemlite_int4(weight: Tensor) -> Call:
    """Returns gemlite's int4 layer, groups of 64; the first call with a number of rows searches for its launch options."""
    from gemlite.helper import A16W4_HQQ_INT

    groups = weight.float().reshape(-1, 64)
    low, high = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    scales = (high - low) / 15
    zeros = -low / scales
    codes = (groups / scales + zeros).round().clamp(0, 15).to(torch.uint8).reshape(weight.shape)
    maker = A16W4_HQQ_INT(device=str(weight.device), dtype=weight.dtype)
    layer = maker.from_weights(codes, scales.to(weight.dtype), zeros.to(weight.dtype))
    return lambda x: layer(x)


#: Column of a table: (the package it needs, forward, input gradient).
SAME_FORMAT = {"bitsandbytes": ("bitsandbytes", bitsandbytes, bitsandbytes_gradient)}
ANCHORS = {
    "torchao_int4": ("torchao", torchao_int4),
    "torchao_nf4": ("torchao", torchao_nf4),
    "gemlite_int4": ("gemlite", gemlite_int4),
}

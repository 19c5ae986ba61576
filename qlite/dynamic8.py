"""Blockwise dynamic 8-bit numbers: one byte per value, one float32 absmax per block.

The 256 levels follow Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861, section 1.3 and
appendix): seven decades, each split linearly, twice as finely as the decade below, so that large values keep relative
and small values keep absolute precision. Two tables exist, one with a sign and one without. They carry the moments of the
8-bit AdamW and the absmax of double-quantized NF4.

Not done here: look-up through a coarse table (the nearest level is found exactly) and any packing (a code is a byte).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

DECADES = 7
#: A smaller absmax is normalised as if it were this one: its reciprocal must stay finite in float32.
SMALLEST_DIVISOR = 1e-38


@functools.cache
def _levels(signed: bool) -> tuple[float, ...]:
    levels = [0.0, 1.0]
    for decade in range(DECADES):
        intervals = 2**decade if signed else 2 ** (decade + 1)
        # The linspace must be float32: in float64 about a hundred of the levels differ in the last bit.
        edges = torch.linspace(0.1, 1, intervals + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2
        values = (10 ** (decade - DECADES + 1) * means).tolist()
        levels += values
        if signed:
            levels += [-value for value in values]
    return tuple(sorted(levels))


def dynamic_levels(signed: bool) -> Tensor:
    """Returns the 256 levels in ascending order, a fresh float32 CPU tensor of shape (256,).

    Signed: 127 negative levels, zero (code 127), 128 positive ones; the range is -0.99297 to 1.
    Unsigned: zero (code 0) and 255 positive levels.

    Source: arXiv 2110.02861, section 1.3; the float32 values are those that bitsandbytes 0.50 builds.
    """
    return torch.tensor(_levels(signed), dtype=torch.float32)


@functools.cache
def _kept_levels(device: torch.device, signed: bool) -> Tensor:
    with torch.inference_mode(False):
        return dynamic_levels(signed).to(device)


def dynamic_levels_on(device: torch.device, *, signed: bool) -> Tensor:
    """Returns the table of `dynamic_levels` on a device, to be read and not written.

    On a GPU it is always the same tensor: a fresh one would be copied from the host at every call, and the host would wait.
    """
    if device.type != "cuda":
        return dynamic_levels(signed).to(device)
    table = _kept_levels(device, signed)
    if type(table) is not Tensor:
        _kept_levels.cache_clear()  # made under a mode of fake tensors: not for others
    return table


def reciprocal(absmax: Tensor) -> Tensor:
    """Returns 1 / absmax in float32, finite for every finite absmax >= 0, of the shape of `absmax`.

    Zero and the deepest subnormals give 1 / SMALLEST_DIVISOR, so that a block of zeros normalises to zeros.
    """
    return 1.0 / absmax.clamp(min=SMALLEST_DIVISOR)


def quantize_dynamic8(x: Tensor, *, signed: bool, block_size: int = 256, never_zero: bool = False) -> tuple[Tensor, Tensor]:
    """Returns `(codes, absmax)`: each value's nearest level relative to the largest magnitude of its block.

    Blocks run over the flattened tensor; the last may be short. A value halfway between two levels takes the lower.

    Args:
        x: floating-point tensor of any shape and device; non-finite values are the caller's to exclude.
        signed: which table; unsigned needs x >= 0.
        block_size: elements per absmax, at least 1.
        never_zero: a value above zero is never given the code of zero. The second moment of Adam needs this: it stands
            in a denominator, and a tiny moment rounded to zero lets one step leap by 1e4 learning rates and more.

    Returns:
        codes: uint8, the shape of x. absmax: float32, (ceil(x.numel() / block_size),).

    Raises:
        ValueError: block_size < 1, or never_zero with a signed table.
        TypeError: x is not floating point.

    Source: arXiv 2110.02861, section 2.1; never_zero is ours.
    """
    if not x.is_floating_point():
        raise TypeError(f"quantize_dynamic8: x is {x.dtype}; wanted a floating-point tensor")
    if block_size < 1:
        raise ValueError(f"quantize_dynamic8: block_size is {block_size}; wanted at least 1")
    if never_zero and signed:
        raise ValueError("quantize_dynamic8: never_zero is for the unsigned table; pass signed=False")
    flat = x.detach().reshape(-1).float()
    blocks = -(-flat.numel() // block_size)
    padded = torch.nn.functional.pad(flat, (0, blocks * block_size - flat.numel())).view(blocks, block_size)
    absmax = padded.abs().amax(dim=1) if blocks else padded.new_zeros(0)
    levels = dynamic_levels_on(x.device, signed=signed)
    midpoints = (levels[:-1] + levels[1:]) / 2
    codes = torch.bucketize(padded * reciprocal(absmax)[:, None], midpoints)
    if never_zero:
        codes = torch.where((padded > 0) & (codes == 0), 1, codes)
    return codes.to(torch.uint8).view(-1)[: flat.numel()].view(x.shape), absmax


def dequantize_dynamic8(codes: Tensor, absmax: Tensor, *, signed: bool, block_size: int = 256) -> Tensor:
    """Returns `level * absmax` in float32, of the shape of `codes`.

    Args:
        codes: uint8 tensor of any shape.
        absmax: float32 (ceil(codes.numel() / block_size),), on the device of codes.
        signed, block_size: as given to `quantize_dynamic8`.

    Raises:
        ValueError: absmax has another length than the blocks of codes.
        TypeError: codes is not uint8.
    """
    if codes.dtype != torch.uint8:
        raise TypeError(f"dequantize_dynamic8: codes are {codes.dtype}; wanted uint8")
    blocks = -(-codes.numel() // block_size)
    if absmax.shape != (blocks,):
        raise ValueError(
            f"dequantize_dynamic8: absmax has shape {tuple(absmax.shape)}; {codes.numel()} codes in blocks of "
            f"{block_size} want ({blocks},)"
        )
    values = dynamic_levels_on(codes.device, signed=signed)[codes.reshape(-1).int()]
    return (values * absmax.repeat_interleave(block_size)[: codes.numel()]).view(codes.shape)

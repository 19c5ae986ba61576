"""Eight-bit integers: absmax (symmetric) and zero-point (affine), one scale per tensor, per row or per block of a row.

Absmax spends the codes -127..127 on [-absmax, absmax]; zero-point spends all 256 on [min, max], stretched to hold zero,
so zero is exact in both. Dettmers et al., LLM.int8() (arXiv 2208.07339), section 2 describes both. The row-wise absmax
form is the weight of `Linear8bit` and the int8 layout of bitsandbytes (its SCB is our absmax).

A linear layer multiplies by such rows in two ways. `linear_weight_only` keeps the activations as they are; `linear_dynamic`
encodes each row of them too, by its own absmax, so that integers are multiplied. `is_dynamic` alone says which is meant.

Not done here: outlier columns in 16 bits (section 3 of the paper).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

#: The smallest step of a zero-point group that is not all zeros: below the normal float32 a quotient loses its precision.
SMALLEST_SCALE = 2.0**-126
#: The most rows of 16-bit activations that are multiplied as they are. Up to here reading the weight takes the time, and
#: integers would save none of it; see docs/numerics.md.
WEIGHT_ONLY_ROWS = 64
#: Columns whose products of two codes are summed exactly in a float32, and in an int32.
_FLOAT32_COLUMNS, _INT32_COLUMNS = 2**24 // 127**2, (2**31 - 1) // 127**2


@dataclasses.dataclass(frozen=True, eq=False)
class Int8Tensor:
    """An encoded tensor. With R rows, C columns, G scale rows (R, or 1 per tensor) and B scales a row:

    Attributes:
        codes: int8 (R, C).
        absmax: float32 (G, B), the largest magnitude of each group; None for zero-point.
        scale: float32 (G, B), the step between two codes; None for absmax.
        zero_point: int16 (G, B), the code of zero, -128..127; None for absmax.
        shape: of the tensor that was encoded. dtype: its dtype, and the default of `dequantize`.
        block_size: columns per scale.

    Example:
        >>> q = qlite.quantize_int8(torch.tensor([1.2, -0.5, -4.3, 1.2, -3.1, 0.8, 2.4, 5.4]))
        >>> q.codes.tolist()
        [[28, -12, -101, 28, -73, 19, 56, 127]]
    """

    codes: Tensor
    absmax: Tensor | None
    scale: Tensor | None
    zero_point: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    block_size: int

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the decoded tensor, of `shape`, in `dtype` (default: the dtype that was encoded)."""
        if self.absmax is not None:
            values = dequantize_absmax(self.codes, self.absmax, self.block_size)
        else:
            assert self.scale is not None and self.zero_point is not None
            values = dequantize_zero_point(self.codes, self.scale, self.zero_point, self.block_size)
        return values.to(dtype or self.dtype).view(self.shape)


def _grouped(x: Tensor, per_tensor: bool, block_size: int) -> Tensor:
    """Returns float32 x (R, C) as (G, B, group), a short last block filled up by zeros."""
    x = x.float()
    if per_tensor:
        return x.reshape(1, 1, -1)
    blocks = max(1, -(-x.shape[1] // block_size))  # a row without columns has a scale too
    return torch.nn.functional.pad(x, (0, blocks * block_size - x.shape[1])).view(x.shape[0], blocks, block_size)


def _spread(per_group: Tensor, columns: int, block_size: int) -> Tensor:
    """Returns (G, B) values for every column: (G, columns), or (G, 1) where all columns share one."""
    if per_group.shape[1] == 1:
        return per_group
    return per_group.repeat_interleave(block_size, dim=1)[:, :columns]


def _step(absmax: Tensor) -> Tensor:
    """Returns absmax / 127, rounded once on every device: CUDA would multiply by the reciprocal of a Python number."""
    return absmax / absmax.new_full((), 127.0)


def quantize_absmax(x: Tensor, *, per_tensor: bool, block_size: int) -> tuple[Tensor, Tensor]:
    """Returns `(codes, absmax)`: `code = round_half_even(x * (127 / absmax))`; a group of zeros has codes and absmax 0.

    127 / absmax is 127 times the float32 reciprocal, as in bitsandbytes.

    Args:
        x: (R, C) floating point, finite. per_tensor: one group for all of x. block_size: columns per group of a row.

    Returns:
        codes: int8 (R, C). absmax: float32 (R or 1, ceil(C / block_size)).

    Source: arXiv 2208.07339, section 2.1.
    """
    grouped = _grouped(x, per_tensor, block_size)
    absmax = grouped.abs().amax(dim=2) if grouped.numel() else grouped.new_zeros(grouped.shape[:2])
    # 127 / absmax overflows for a tiny absmax: such a group is first scaled by 2^100, which changes no code.
    boost = torch.where(absmax < 2.0**-100, 2.0**100, 1.0)
    factor = (absmax * boost).clamp(min=2.0**-100).reciprocal() * 127  # of a group of zeros: finite, for 0 * inf is NaN
    columns = x.shape[1]
    share = x.float() * _spread(boost, columns, block_size) * _spread(factor, columns, block_size)
    return share.round().clamp(-127, 127).to(torch.int8), absmax


def dequantize_absmax(codes: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """Returns `code * (absmax / 127)` in float32, in that order, which cannot overflow; shapes as in `quantize_absmax`."""
    return codes.float() * _spread(_step(absmax), codes.shape[1], block_size)


def quantize_zero_point(x: Tensor, *, per_tensor: bool, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `(codes, scale, zero_point)`: `code = clamp(round(x / scale) + zero_point, -128, 127)`.

    The range is stretched to hold zero, which makes zero exact; a group of zeros has scale 0 and decodes to zeros.

    Args and shapes: as in `quantize_absmax`; scale float32 and zero_point int16 are (R or 1, ceil(C / block_size)).

    Source: arXiv 2208.07339, section 2.1, "zero-point quantization".
    """
    grouped = _grouped(x, per_tensor, block_size)
    if grouped.numel():
        low, high = grouped.amin(dim=2).clamp(max=0), grouped.amax(dim=2).clamp(min=0)
    else:
        low = high = grouped.new_zeros(grouped.shape[:2])
    # Not (high - low) / 255, which overflows near the largest float32.
    divisor = (high / 255 - low / 255).clamp(min=SMALLEST_SCALE)
    scale = torch.where(high > low, divisor, 0.0)
    zero_point = (-128 - low / divisor).round().clamp(-128, 127)
    steps = (x.float() / _spread(divisor, x.shape[1], block_size)).round()
    codes = (steps + _spread(zero_point, x.shape[1], block_size)).clamp(-128, 127).to(torch.int8)
    return codes, scale, zero_point.to(torch.int16)


def dequantize_zero_point(codes: Tensor, scale: Tensor, zero_point: Tensor, block_size: int) -> Tensor:
    """Returns `(code - zero_point) * scale` in float32; shapes as in `quantize_zero_point`."""
    columns = codes.shape[1]
    return (codes.float() - _spread(zero_point, columns, block_size).float()) * _spread(scale, columns, block_size)


def is_dynamic(x: Tensor) -> bool:
    """Returns whether a linear layer encodes x (..., in_features): in 16 bits, and more than WEIGHT_ONLY_ROWS rows of it.

    The rule looks at dtype and shape alone, so every device follows it. float32 and float64 are multiplied as they are.
    """
    in_16_bits = x.dtype in (torch.float16, torch.bfloat16)
    return in_16_bits and x.shape[:-1].numel() > WEIGHT_ONLY_ROWS and x.shape[-1] <= _INT32_COLUMNS


def linear_weight_only(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None) -> Tensor:
    """Returns `x @ weight.T + bias` over the weight decoded into the dtype of x; infinities and NaN go through.

    Args:
        x: (..., in_features) floating point. codes: int8 (out_features, in_features).
        absmax: float32 (out_features, 1). bias: (out_features,), rounded to the dtype of x, or None.
    """
    weight = dequantize_absmax(codes, absmax, codes.shape[1]).to(x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def linear_dynamic(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None) -> Tensor:
    """Returns `((sum of code_x * code_w) * (absmax_x / 127)) * (absmax_w / 127) + bias`: the product of both as encoded.

    The sum is exact; then each operation is rounded to float32 in this order, and the result once to the dtype of x. A row
    of zeros gives the bias, a row that holds infinity or NaN gives NaN.

    Args: as of linear_weight_only; at most 133,144 columns, whose sums an int32 holds.

    Source: arXiv 2208.07339, section 3.1, "vector-wise quantization", eq. 6.
    """
    rows, columns = x.reshape(x.shape[:-1].numel(), x.shape[-1]), codes.shape[1]
    x_codes, x_absmax = quantize_absmax(rows, per_tensor=False, block_size=max(columns, 1))
    sums = torch.zeros(rows.shape[0], codes.shape[0], dtype=torch.int32, device=x.device)
    for part in (slice(first, first + _FLOAT32_COLUMNS) for first in range(0, columns, _FLOAT32_COLUMNS)):
        sums += (x_codes[:, part].float() @ codes[:, part].float().T).to(torch.int32)
    y = sums.float() * torch.where(x_absmax < torch.inf, _step(x_absmax), torch.nan) * _step(absmax).T
    if bias is not None:
        y += bias.to(x.dtype).float()
    return y.to(x.dtype).view(*x.shape[:-1], codes.shape[0])

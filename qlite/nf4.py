"""Four bits per weight: blockwise 16-level formats (NF4, FP4, any table of 16), with double-quantized absmax.

A row is cut into blocks; each block keeps its largest magnitude, and each weight the index of the level nearest to its
share of it. QLoRA (arXiv 2305.14314), section 3: eq. 4 gives the normal-float levels, "Double Quantization" encodes the
absmax values themselves in 8 bits. Blocks never cross a row, so dim 0 stays a real dimension. bitsandbytes lays its blocks
over the flattened tensor: where a row is a whole number of blocks the bytes are the same, and elsewhere a tensor is encoded
"flat", as one long row.

The functions here are the specification that kernels are held against, in plain PyTorch. Not done here: choosing between
reference and kernel (ops.py), modules (linear.py).
"""

from __future__ import annotations

import array
import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qlite.dynamic8 import dequantize_dynamic8, quantize_dynamic8, reciprocal

# The float32 constants published with QLoRA: normal quantiles normalised to [-1, 1]; tests derive them to 1e-7.
NF4_LEVELS: tuple[float, ...] = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign in bit 3, two exponent bits, one mantissa bit, divided by 12: the code order is that of the bits, not sorted.
FP4_LEVELS: tuple[float, ...] = (
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0,
    0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
    0.0, -0.0052083334885537624, -0.6666666865348816, -1.0,
    -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
)  # fmt: skip
# The least squared error of normal weights in blocks of 64 with `search`: benchmarks/derive_table.py derives it from a seed.
LS4_LEVELS: tuple[float, ...] = (
    -0.8255802, -0.634489, -0.4930036, -0.374451, -0.2706906, -0.1757187, -0.0862749, 0.0,
    0.0843597, 0.1715993, 0.2632475, 0.3628353, 0.4739965, 0.603978, 0.7689533, 1.0,
)  # fmt: skip
# The least absolute error of a normal weight's share of absmax, in blocks of 64: "abnormal floats" (arXiv 2306.06965).
AF4_LEVELS: tuple[float, ...] = (
    -1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0,
    0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0,
)  # fmt: skip
# The least squared error of normal weights in blocks of 64 whose scale is the value with the largest magnitude, of its sign:
# BOF4-S, optimised for MSE (arXiv 2505.06653, table 6). Without `search`, whose scales have signs, it gains nothing.
BOF4S_LEVELS: tuple[float, ...] = (
    -0.8568463921546936, -0.6692874431610107, -0.5235266089439392, -0.4004882574081421,
    -0.2910638153553009, -0.1900092959403992, -0.0938529595732689, 0.0,
    0.0887671709060669, 0.1794802695512772, 0.2743096053600311, 0.3760197460651398,
    0.4886530041694641, 0.6188603639602661, 0.7791395783424377, 1.0,
)  # fmt: skip
#: The tables by name, as `levels` takes them; benchmarks/derive_table.py derives the last three. Files name them too.
TABLES: dict[str, tuple[float, ...]] = {
    "nf4": NF4_LEVELS, "fp4": FP4_LEVELS, "af4": AF4_LEVELS, "bof4-s": BOF4S_LEVELS, "ls4": LS4_LEVELS,
}  # fmt: skip
#: What levels="best" tries on each weight.
CANDIDATES = ("nf4", "bof4-s", "ls4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
#: Shares of absmax that `search` tries as a block's scale, in fiftieths: 0.76, 0.82, ... 1.24.
SHARES = range(38, 63, 3)
#: Weights encoded at a time, in whole rows or whole blocks: what is computed on the way takes tens of bytes a weight.
CHUNK = 2**20
#: Absmax values that share one second-level scale.
ABSMAX_BLOCK_SIZE = 256


@dataclasses.dataclass(frozen=True, eq=False)
class NF4Tensor:
    """An encoded tensor: codes, block scales, and what is needed to decode them. A value; nothing in it is trained.

    With R rows (the product of all dimensions but the last), C columns and B = ceil(C / block_size) blocks a row; or, for
    a tensor that was encoded flat, R = 1 row of all its C weights:

    Attributes:
        codes: uint8 (R, ceil(C / 2)); two codes a byte, the first in the high nibble.
        absmax: float32 (R, B), or uint8 (R, B) under double quantization.
        absmax_scale: float32 (ceil(R * B / 256),) under double quantization, else None.
        absmax_offset: float32 (1,), the mean that was subtracted, under double quantization, else None.
        levels: float32 (16,).
        shape: of the tensor that was encoded. dtype: its dtype, and the default of `dequantize`.
        block_size: weights per absmax.

    Example:
        >>> q = qlite.quantize_nf4(torch.randn(8, 128))
        >>> q.dequantize().shape
        torch.Size([8, 128])
    """

    codes: Tensor
    absmax: Tensor
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None
    levels: Tensor
    shape: torch.Size
    dtype: torch.dtype
    block_size: int

    @property
    def double_quant(self) -> bool:
        """Whether the absmax values are themselves encoded in 8 bits."""
        return self.absmax_scale is not None

    @property
    def nbytes(self) -> int:
        """Bytes of codes, absmax, second-level scales and offset (the 64 bytes of the table left out)."""
        tensors = (self.codes, self.absmax, self.absmax_scale, self.absmax_offset)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @property
    def bits_per_weight(self) -> float:
        """`8 * nbytes / numel`; 4.127 for whole blocks of 64 under double quantization."""
        return 8 * self.nbytes / math.prod(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the decoded tensor, of `shape`, in `dtype` (default: the dtype that was encoded)."""
        decoded = torch.ops.qlite.dequantize_nf4(
            self.codes, self.absmax, self.absmax_scale, self.absmax_offset, self.levels,
            coded_row(self.codes.shape[0], self.shape), self.block_size, dtype or self.dtype,
        )  # fmt: skip
        return decoded.view(self.shape)

    def squared_error(self, weight: Tensor, weighting: Tensor | None = None) -> float:
        """Returns the sum of squared differences from a weight of the same shape; `weighting` (columns,) multiplies them."""
        errors = (self.dequantize(torch.float32) - weight.detach()).square()
        return (errors if weighting is None else errors * weighting.to(errors.device)).sum(dtype=torch.float64).item()

    def to(self, device: torch.device | str) -> NF4Tensor:
        """Returns the same value on another device; nothing is decoded on the way."""
        moved = {
            field.name: getattr(self, field.name).to(device)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


def levels_of(levels: str | Sequence[float]) -> tuple[float, ...]:
    """Returns the 16 values of a table, given by its name or as they are.

    Raises:
        ValueError: an unknown name, not 16 finite values in [-1, 1], or fewer than two different ones.
    """
    if isinstance(levels, str) and levels not in TABLES:
        raise ValueError(f"levels: there is no table named {levels!r}; wanted one of {', '.join(TABLES)}, or 16 values")
    values = TABLES[levels] if isinstance(levels, str) else tuple(float(level) for level in levels)
    # Of Python numbers, not of a tensor: inside `with torch.device("meta")` a new tensor has no values to look at.
    if len(values) != 16 or not all(abs(value) <= 1 for value in values) or len(set(values)) < 2:
        raise ValueError(f"levels: wanted 16 finite values in [-1, 1], not all the same; got {list(values)}")
    return values


def name_of(levels: Sequence[float]) -> str | None:
    """Returns the name of a table with the same float32 values, or None."""
    values = array.array("f", levels)
    return next((name for name, table in TABLES.items() if array.array("f", table) == values), None)


def row_length(shape: torch.Size) -> int:
    """Returns the number of weights in a row: the last dimension, or 1 for a scalar."""
    return shape[-1] if shape else 1


def coded_row(rows: int, shape: torch.Size) -> int:
    """Returns how many weights a row of codes holds, for `rows` rows of codes of a tensor of `shape`.

    A single row holds all of them (the tensor is flat, or has one row); otherwise each row of the tensor has its own.
    """
    return shape.numel() if rows == 1 else row_length(shape)


def blocks_per_row(in_features: int, block_size: int) -> int:
    """Returns the number of blocks in a row; the last may be short."""
    return -(-in_features // block_size)


def decision_table(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `(midpoints, order)`: the code of y is `order[number of midpoints < y]`, so a tie takes the lower level.

    midpoints: float32 (15,), ascending. order: uint8 (16,). A level that occurs twice (FP4 has two zeros) keeps its
    first code; the places left over hold an infinite midpoint, which no y exceeds.
    """
    ascending, order = levels.sort(stable=True)
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = ascending[1:] > ascending[:-1]
    ascending, order = ascending[first], order[first]
    midpoints = torch.full((15,), torch.inf, device=levels.device)
    midpoints[: len(ascending) - 1] = (ascending[:-1] + ascending[1:]) / 2
    codes = torch.zeros(16, dtype=torch.uint8, device=levels.device)
    codes[: len(order)] = order.to(torch.uint8)
    return midpoints, codes


def pack(codes: Tensor) -> Tensor:
    """Returns codes 0..15 of shape (rows, even) as bytes (rows, even / 2), the first of a pair in the high nibble."""
    return (codes[:, 0::2] << 4) | codes[:, 1::2]


def unpack(packed: Tensor) -> Tensor:
    """Returns the codes (rows, 2 * bytes) that `pack` joined."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1)


def quantize(weight: Tensor, levels: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Returns `(codes, absmax)` of a 2-D weight: the reference of `ops.quantize_nf4`.

    A weight is multiplied by the float32 reciprocal of its block's absmax (not divided), then takes the nearest level;
    an exact tie takes the lower. A block of zeros has absmax 0 and the code of zero. A row of odd length is padded with
    one zero.

    Args:
        weight: (R, C) floating point, finite. levels: float32 (16,). block_size: weights per absmax, even.

    Returns:
        codes: uint8 (R, ceil(C / 2)). absmax: float32 (R, ceil(C / block_size)).

    Source: arXiv 2305.14314, section 2 (block-wise k-bit quantization); order of operations as in bitsandbytes 0.50.
    """
    rows, columns = weight.shape
    codes = torch.empty((rows, (columns + 1) // 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty((rows, blocks_per_row(columns, block_size)), dtype=torch.float32, device=weight.device)
    table = decision_table(levels)
    width = CHUNK // block_size * block_size
    step = max(1, CHUNK // max(1, columns))
    for first, start in itertools.product(range(0, rows, step), range(0, columns, width)):
        part, stop = slice(first, first + step), min(start + width, columns)
        its_codes, its_blocks = slice(start // 2, (stop + 1) // 2), slice(start // block_size, -(-stop // block_size))
        codes[part, its_codes], absmax[part, its_blocks] = _quantize_rows(weight[part, start:stop], *table, block_size)
    return codes, absmax


def _blocks(weight: Tensor, block_size: int) -> Tensor:
    """Returns a chunk of rows in float32, cut into blocks (rows, blocks, block_size), zeros at the end of the last."""
    rows, columns = weight.shape
    blocks = blocks_per_row(columns, block_size)
    return torch.nn.functional.pad(weight.float(), (0, blocks * block_size - columns)).view(rows, blocks, block_size)


def _quantize_rows(weight: Tensor, midpoints: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    padded = _blocks(weight, block_size)
    absmax = padded.abs().amax(dim=2) if padded.numel() else padded.new_zeros(padded.shape[:2])
    return _codes(padded, reciprocal(absmax), weight.shape[1], midpoints, order), absmax


def _codes(padded: Tensor, factors: Tensor, columns: int, midpoints: Tensor, order: Tensor) -> Tensor:
    """Returns the packed codes of blocks that are multiplied by a factor each."""
    codes = order[torch.bucketize((padded * factors[:, :, None]).contiguous(), midpoints)]
    return pack(codes.flatten(1)[:, : columns + columns % 2])


def search(weight: Tensor, levels: Tensor, block_size: int, weighting: Tensor | None = None) -> Tensor:
    """Returns for each block the signed scale with the least squared error of those tried: a better one than its absmax.

    SHARES of absmax, with both signs, give codes; the best scale for given codes l is (w . l) / (l . l), which leaves
    |w|^2 - (w . l)^2 / (l . l). The best of these is encoded once more, and its scale taken from those codes. No block is worse
    than by its absmax, up to rounding. A negative scale mirrors the table, whose two sides differ. Every sum is one of pairs of
    neighbours, of pairs of those, and so on: the same bits on every device, and the reference of `ops.quantize_nf4`.

    Args:
        weight: (R, C) floating point, finite. levels: float32 (16,). block_size: weights per scale, a power of two.
        weighting: float32, 0 or more, of each column, or None for 1; what its length is exceeded by begins anew, for a matrix
            that is given as one row. It weighs the squared errors of its column.

    Returns:
        float32 (R, ceil(C / block_size)), of either sign; 0 for a block of zeros.

    Source: ours; a search over clipping ratios by squared error is as old as HQQ and AWQ, the mirrored table is BOF4-S's sign
    (arXiv 2505.06653).
    """
    rows, columns = weight.shape
    scales = torch.empty((rows, blocks_per_row(columns, block_size)), dtype=torch.float32, device=weight.device)
    midpoints, order = decision_table(levels)
    values = levels[order.long()]
    width, step = CHUNK // block_size * block_size, max(1, CHUNK // max(1, columns))
    for first, start in itertools.product(range(0, rows, step), range(0, columns, width)):
        part, stop = slice(first, first + step), min(start + width, columns)
        padded = _blocks(weight[part, start:stop], block_size)
        counts = torch.ones(stop - start, device=weight.device)  # a padding zero has no level to count
        if weighting is not None:
            counts = weighting[torch.arange(start, stop, device=weight.device) % len(weighting)]
        counts = _blocks(counts[None], block_size)
        scales[part, start // block_size : -(-stop // block_size)] = _search_blocks(padded, counts, midpoints, values)
    return scales


def _pair_sums(values: Tensor) -> Tensor:
    """Returns the sums over the last dimension, a power of two long: neighbours are added until one is left."""
    while values.shape[-1] > 1:
        values = values[..., 0::2] + values[..., 1::2]
    return values[..., 0]


def _search_blocks(padded: Tensor, counts: Tensor, midpoints: Tensor, values: Tensor) -> Tensor:
    absmax = padded.abs().amax(dim=2) if padded.numel() else padded.new_zeros(padded.shape[:2])
    share = padded * reciprocal(absmax)[:, :, None]

    def fitted(inverse: Tensor | float) -> tuple[Tensor, Tensor]:
        """Returns w . l and l . l for the levels l that 1 / inverse gives."""
        taken = values[torch.bucketize(share * inverse, midpoints)]
        counted = taken * counts
        return _pair_sums(share * counted), _pair_sums(taken * counted)

    product, square = torch.zeros_like(absmax), torch.ones_like(absmax)
    for sign, ratio in itertools.product((1, -1), SHARES):
        product, square = _better(product, square, *fitted(sign * 50 / ratio))
    # Where nothing explains anything, the scale is absmax.
    product, square = (torch.where(product == 0, 1.0, part) for part in (product, square))
    product, square = _better(product, square, *fitted((square / product)[:, :, None]))
    largest = torch.finfo(torch.float32).max
    return torch.where(absmax > 0, product / square / reciprocal(absmax), 0.0).clamp(-largest, largest)


def _better(product: Tensor, square: Tensor, other_product: Tensor, other_square: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the pair that explains more, (w . l)^2 / (l . l), without a division; the first where they are equal."""
    more = (other_product * other_product * square > product * product * other_square) & (other_square > 0)
    return torch.where(more, other_product, product), torch.where(more, other_square, square)


def encode(weight: Tensor, scales: Tensor, levels: Tensor, block_size: int) -> Tensor:
    """Returns the codes, packed uint8 (R, ceil(C / 2)), of a weight (R, C) whose blocks have given scales, of either sign."""
    rows, columns = weight.shape
    codes = torch.empty((rows, (columns + 1) // 2), dtype=torch.uint8, device=weight.device)
    table, factors = decision_table(levels), scales.sign() * reciprocal(scales.abs())
    width, step = CHUNK // block_size * block_size, max(1, CHUNK // max(1, columns))
    for first, start in itertools.product(range(0, rows, step), range(0, columns, width)):
        part, stop = slice(first, first + step), min(start + width, columns)
        its = factors[part, start // block_size : -(-stop // block_size)]
        chunk = weight[part, start:stop]
        codes[part, start // 2 : (stop + 1) // 2] = _codes(_blocks(chunk, block_size), its, stop - start, *table)
    return codes


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `(codes, scale, offset)`: the reference of `ops.quantize_nf4_absmax`, the double quantization.

    The mean is subtracted, and blocks of 256 over the flattened rest are encoded with the signed dynamic table. The mean
    is taken in float64 and rounded once, so that it does not depend on the order of summation: up to 2^24 float32 values
    within a factor of 2^5 of each other have an exact sum in float64 (24 + 24 + 5 = 53 bits).

    Args:
        absmax: float32 (R, B).

    Returns:
        codes: uint8 (R, B). scale: float32 (ceil(R * B / 256),). offset: float32 (1,).

    Source: arXiv 2305.14314, section 3, "Double Quantization".
    """
    count = absmax.numel()
    offset = (absmax.sum(dtype=torch.float64) / count).float().view(1) if count else absmax.new_zeros(1)
    codes, scale = quantize_dynamic8(absmax - offset, signed=True, block_size=ABSMAX_BLOCK_SIZE)
    return codes, scale, offset


def dequantize_absmax(absmax: Tensor, absmax_scale: Tensor | None, absmax_offset: Tensor | None) -> Tensor:
    """Returns absmax in float32 (R, B): `level * scale`, rounded, then `+ offset`; the input where it is not encoded."""
    if absmax_scale is None or absmax_offset is None:
        return absmax
    return dequantize_dynamic8(absmax, absmax_scale, signed=True, block_size=ABSMAX_BLOCK_SIZE) + absmax_offset


def dequantize(
    codes: Tensor,
    absmax: Tensor,
    absmax_scale: Tensor | None,
    absmax_offset: Tensor | None,
    levels: Tensor,
    in_features: int,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Returns the decoded rows (R, in_features) in `dtype`: the reference of `ops.dequantize_nf4`.

    `level * absmax` is one float32 product, rounded once more to `dtype`. Arguments as in `NF4Tensor`.
    """
    rows = codes.shape[0]
    blocks = blocks_per_row(in_features, block_size)
    pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)  # of each byte, the high nibble first
    values = pairs.index_select(0, codes.reshape(-1).int()).view(rows, codes.shape[1] * 2)
    if missing := blocks * block_size - values.shape[1]:
        values = torch.nn.functional.pad(values, (0, missing))
    values = values.view(rows, blocks, block_size)
    # In place: on a CPU new memory costs more than the product.
    values *= dequantize_absmax(absmax, absmax_scale, absmax_offset)[:, :, None]
    return values.to(dtype).view(rows, blocks * block_size)[:, :in_features].contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns `x @ weight.T + bias` for the decoded weight (out, in): with `dequantize`, the reference of linear_nf4."""
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def check_coded(codes, absmax, absmax_scale, absmax_offset, levels, in_features: int, block_size: int) -> None:
    """Raises ValueError where the parts do not fit each other: a kernel would read beyond a tensor that is too short."""
    rows = codes.shape[0]
    blocks = blocks_per_row(in_features, block_size)
    groups = -(-rows * blocks // ABSMAX_BLOCK_SIZE)
    wanted = {"codes": (codes, (rows, (in_features + 1) // 2)), "absmax": (absmax, (rows, blocks)), "levels": (levels, (16,))}
    if absmax.dtype == torch.uint8:
        wanted |= {"absmax_scale": (absmax_scale, (groups,)), "absmax_offset": (absmax_offset, (1,))}
    for name, (tensor, shape) in wanted.items():
        if tensor is None or tensor.shape != shape:
            found = None if tensor is None else tuple(tensor.shape)
            raise ValueError(
                f"the parts of a 4-bit weight do not belong together: {name} has shape {found}; wanted {shape} for "
                f"{in_features} columns in blocks of {block_size}"
            )

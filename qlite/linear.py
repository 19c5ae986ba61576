"""Linear layers whose weight is encoded.

`Linear4bit` and `Linear8bit` hold integers as Parameters without gradient and scales as buffers, so `state_dict` is plain
tensors and `.to(device)` works; `.to(dtype)`, `.half()` and autocast leave codes and scales alone. Encoding is an explicit
call (`quantize_`), never a side effect of a move. After QLoRA (arXiv 2305.14314), section 3, and LLM.int8()
(arXiv 2208.07339).

Not done here: putting them in place of a model's dense layers (quantize.py), stacks of expert matrices (experts.py).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlite import nf4, ops
from qlite.nf4 import NF4Tensor
from qlite.operators import keeps_decoded_weights

#: Up to so many rows two products by the codes and one by a decoded weight are faster than decoding for all three.
FEW_ROWS = 128


class QuantizedLinear(nn.Module, abc.ABC):
    """A linear layer over an encoded weight: what modules and files need to know of any of them.

    Attributes:
        in_features, out_features: as in nn.Linear. bias: Parameter (out_features,) or None.
        dtype: dtype of `dequantize`; the forward follows the dtype of its input.
        transposed: whether files of the model keep its dense weight as (in_features, out_features): a Conv1D's place.
    """

    weight: nn.Parameter
    transposed = False

    def __init__(self, in_features: int, out_features: int, bias: bool, device: Any, dtype: torch.dtype | None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.dtype = dtype or torch.get_default_dtype()
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=self.dtype)) if bias else None

    @abc.abstractmethod
    def quantize_(self, dense: Tensor) -> QuantizedLinear:
        """Encodes `dense` (out_features, in_features) on its device into this module, and returns the module.

        Raises:
            ValueError: another shape, or a non-finite value. TypeError: not floating point.
        """

    @abc.abstractmethod
    def dequantize(self) -> Tensor:
        """Returns the weight (out_features, in_features) decoded into `self.dtype`."""

    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """Returns the JSON-able options that a module of the same layout is built from, under "format" its name."""

    def _check_dense(self, dense: Tensor) -> None:
        if dense.shape != (self.out_features, self.in_features):
            raise ValueError(
                f"quantize_: weight has shape {tuple(dense.shape)}; "
                f"wanted (out_features, in_features) = ({self.out_features}, {self.in_features})"
            )

    def encoded_bytes(self) -> int:
        """Returns the bytes of all of the module's tensors, bias included."""
        tensors = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves state where `fn` moves it, but shows `fn` bytes only: a cast finds nothing to cast but the bias."""

        of_bias = () if self.bias is None else (self.bias, self.bias.grad)

        def on_bytes(tensor: Tensor) -> Tensor:
            if any(tensor is seen for seen in of_bias):
                return fn(tensor)
            moved = fn(tensor.view(torch.uint8))
            if moved.dtype != torch.uint8:
                raise TypeError(f"{type(self).__name__}: a cast to {moved.dtype} of the codes; .to(dtype) leaves them")
            return moved.view(tensor.dtype)

        super()._apply(on_bytes, recurse)
        if self.bias is not None:
            self.dtype = self.bias.dtype
        return self

    def extra_repr(self) -> str:
        """Returns what `print(module)` shows: sizes and the options of the format."""
        options = ", ".join(f"{key}={value}" for key, value in self.config().items() if key != "levels")
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {options}"


class Linear4bit(QuantizedLinear):
    """`x @ weight.T + bias` over a weight of four bits; gradients flow to x and bias, the weight has none.

    With B = ceil(in_features / block_size), the state is: `weight` uint8 (out, ceil(in / 2)); `absmax` uint8 (out, B)
    under double quantization, else float32; `absmax_scale` float32 (ceil(out * B / 256),) and `absmax_offset` float32
    (1,) under double quantization alone; `levels` float32 (16,); `bias`. A flat layer holds the same for one row of all
    out * in weights: `weight` (1, ceil(out * in / 2)), B = ceil(out * in / block_size), `absmax` (1, B).

    Args:
        in_features, out_features, bias, device, dtype: as in nn.Linear.
        block_size: weights per absmax: 32, 64, ..., 4096.
        double_quant: the absmax values are encoded in 8 bits.
        levels: the name of a table, 16 values in [-1, 1], or "best", of which `quantize_` makes the table that fits the weight;
            see `qlite.quantize_nf4`.
        flat: blocks run over the flattened weight, across its rows, as in bitsandbytes. It matters where in_features is
            not a whole number of blocks; elsewhere the bytes are the same.
        search: `quantize_` looks for better scales than absmax; see `qlite.quantize_nf4`.

    Raises:
        ValueError: a bad block size or table.

    Source: QLoRA (arXiv 2305.14314), eq. 5.

    Example:
        >>> layer = qlite.Linear4bit(128, 64, bias=False).quantize_(torch.randn(64, 128))
        >>> layer(torch.randn(2, 128)).shape
        torch.Size([2, 64])
    """

    absmax: Tensor
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None
    levels: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        levels: str | Sequence[float] = "nf4",
        flat: bool = False,
        search: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        ops.check_block_size(block_size)
        self.block_size, self.double_quant, self.flat, self.search = block_size, double_quant, flat, search
        self._levels = levels if isinstance(levels, str) else tuple(levels)
        self._table = nf4.levels_of("nf4" if levels == "best" else levels)
        rows, row = (1, out_features * in_features) if flat else (out_features, in_features)
        blocks = nf4.blocks_per_row(row, block_size)
        codes = torch.zeros(rows, (row + 1) // 2, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        if double_quant:
            absmax = torch.zeros(rows, blocks, dtype=torch.uint8, device=device)
            self.absmax = nn.Parameter(absmax, requires_grad=False)
            groups = -(-rows * blocks // nf4.ABSMAX_BLOCK_SIZE)
            self.register_buffer("absmax_scale", torch.zeros(groups, device=device, dtype=torch.float32))
            self.register_buffer("absmax_offset", torch.zeros(1, device=device, dtype=torch.float32))
        else:
            zeros = torch.zeros(rows, blocks, device=device, dtype=torch.float32)
            self.register_buffer("absmax", zeros)
            self.absmax_scale = self.absmax_offset = None
        self.register_buffer("levels", torch.tensor(self._table, dtype=torch.float32, device=self.weight.device))

    def quantize_(self, dense: Tensor, *, weighting: Tensor | None = None) -> Linear4bit:
        """Encodes `dense` (out_features, in_features) on its device into this module; see QuantizedLinear.

        Args:
            weighting: (in_features,), of the errors that the search compares; see `qlite.quantize_nf4`.
        """
        self._check_dense(dense)
        encoded = ops.quantize_nf4(
            dense, block_size=self.block_size, double_quant=self.double_quant, levels=self._levels, flat=self.flat,
            search=self.search, weighting=weighting,
        )  # fmt: skip
        if self._levels == "best":
            self._table = tuple(encoded.levels.tolist())
        self.weight = nn.Parameter(encoded.codes, requires_grad=False)
        if self.double_quant:
            self.absmax = nn.Parameter(encoded.absmax, requires_grad=False)
            self.absmax_scale, self.absmax_offset = encoded.absmax_scale, encoded.absmax_offset
        else:
            self.absmax = encoded.absmax
        self.levels = encoded.levels
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        # The table in Python, which tells layers of one table from others, is that of the levels that came.
        if not self.levels.is_meta and nf4.name_of(self._table) != nf4.name_of(tuple(self.levels.tolist())):
            self._table = tuple(self.levels.tolist())

    def encoded(self) -> NF4Tensor:
        """Returns the weight as an NF4Tensor that shares this module's memory."""
        shape = torch.Size((self.out_features, self.in_features))
        return NF4Tensor(
            self.weight, self.absmax, self.absmax_scale, self.absmax_offset, self.levels,
            shape, self.dtype, self.block_size,
        )  # fmt: skip

    def dequantize(self) -> Tensor:
        """Returns the weight (out_features, in_features) decoded into `self.dtype`."""
        return self.encoded().dequantize()

    def config(self) -> dict[str, Any]:
        """Returns {"format": a name of nf4.TABLES or "custom4", "block_size", "double_quant"}, with "levels" of a custom table,
        "flat": True of a flat layer and "search": True of one whose scales are searched for."""
        named = nf4.name_of(self._table)
        options = {"format": named or "custom4", "block_size": self.block_size, "double_quant": self.double_quant}
        options |= {} if named else {"levels": list(self._table)}
        return options | {key: True for key in ("flat", "search") if getattr(self, key)}

    def forward(self, x: Tensor) -> Tensor:
        """Returns (..., out_features) in the dtype of x (..., in_features)."""
        if keeps_decoded_weights() and x.shape[:-1].numel() > FEW_ROWS:
            x = ops.activation(x, self.in_features, self.weight.device, "Linear4bit")
            return nf4.linear(x, self.encoded().dequantize(x.dtype), self.bias)
        return ops.linear_nf4(x, self.encoded(), self.bias)


class Linear8bit(QuantizedLinear):
    """`x @ weight.T + bias` over a row-wise absmax int8 weight; gradients flow to x and bias, the weight has none.

    More than 64 rows of x in 16 bits are encoded too, row by row, and integers multiplied; see int8.is_dynamic.

    State: `weight` int8 (out, in); `absmax` float32 (out, 1); `bias`.

    Args:
        in_features, out_features, bias, device, dtype: as in nn.Linear.

    Source: LLM.int8() (arXiv 2208.07339), sections 2.1 and 3.1.

    Example:
        >>> layer = qlite.Linear8bit(128, 64).quantize_(torch.randn(64, 128))
        >>> layer(torch.randn(2, 128)).shape
        torch.Size([2, 64])
    """

    absmax: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        codes = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("absmax", torch.zeros(out_features, 1, device=device, dtype=torch.float32))

    def quantize_(self, dense: Tensor) -> Linear8bit:
        """Encodes `dense` (out_features, in_features) on its device into this module; see QuantizedLinear."""
        self._check_dense(dense)
        encoded = ops.quantize_int8(dense)
        assert encoded.absmax is not None  # it is None for zero-point codes alone
        self.weight = nn.Parameter(encoded.codes, requires_grad=False)
        self.absmax = encoded.absmax
        return self

    def dequantize(self) -> Tensor:
        """Returns the weight (out_features, in_features) decoded into `self.dtype`."""
        return ops.dequantize_int8_rows(self.weight, self.absmax, self.dtype)

    def config(self) -> dict[str, Any]:
        """Returns {"format": "int8"}."""
        return {"format": "int8"}

    def forward(self, x: Tensor) -> Tensor:
        """Returns (..., out_features) in the dtype of x (..., in_features)."""
        return ops.linear_int8(x, self.weight, self.absmax, self.bias)

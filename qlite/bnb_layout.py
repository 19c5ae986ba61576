"""bitsandbytes' layout: an encoded weight as the tensors that its checkpoints hold, and back, bit for bit.

A layer of four bits is `weight` with its `weight.absmax`, `weight.quant_map`, the `weight.nested_*` of double quantization,
and a JSON text in bytes, `weight.quant_state.bitsandbytes__nf4` (or fp4). A layer of eight is `weight`, `SCB` and
`weight_format`. docs/formats.md has the table. The facts are those of bitsandbytes 0.50 and transformers 5, which tests run.

What is read is not trusted: every part is checked against every other, from dtypes and shapes alone for the large ones.

Not done here: files and modules (checkpoint.py, saving.py); any encoding: what differs from our layout is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qlite.dynamic8 import dynamic_levels
from qlite.nf4 import ABSMAX_BLOCK_SIZE, BLOCK_SIZES, FP4_LEVELS, NF4_LEVELS, NF4Tensor, blocks_per_row, coded_row
from qlite.storage import no_duplicates

LEVELS = {"nf4": NF4_LEVELS, "fp4": FP4_LEVELS}
STATE = "weight.quant_state.bitsandbytes__"
#: Bytes of a part that is read before the large ones: the JSON text takes 80 to 180, a table of 256 levels 1,024.
SMALL = 4096
#: The parts that are small, and without which the others cannot be judged.
_SMALL_PARTS = re.compile(r"weight\.(quant_map|nested_quant_map|quant_state\..+)|weight_format")
_PART = re.compile(r"(.+?)\.(weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)|SCB|weight_format)")
#: What the packed bytes may be viewed as (`bnb_4bit_quant_storage`).
_STORAGE = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_ALWAYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED = {"nested_blocksize", "nested_dtype", "nested_offset"}


@dataclasses.dataclass(frozen=True)
class Layout4bit:
    """What the parts of a 4-bit weight say about it.

    Attributes:
        shape: (out_features, in_features). dtype: that was encoded. quant_type: "nf4" or "fp4".
        offset: the mean that double quantization subtracted, a float32 number; None without it.
    """

    shape: torch.Size
    dtype: torch.dtype
    quant_type: str
    block_size: int
    offset: float | None

    @property
    def flat(self) -> bool:
        """Whether a block crosses from a row into the next."""
        return self.shape[0] != 1 and self.shape[1] % self.block_size != 0

    @property
    def rows(self) -> int:
        """Rows of codes: as many as the weight has, or 1 where it is flat."""
        return 1 if self.flat else self.shape[0]


def find_layers(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Returns the encoded layers among the names of a checkpoint's tensors: layer -> part -> name of its tensor."""
    names = list(names)
    layers: dict[str, dict[str, str]] = {}
    for name in names:
        if match := _PART.fullmatch(name):
            layers.setdefault(match[1], {})[match[2]] = name
    for layer in {f"{layer}.weight" for layer in layers} & set(names):
        layers[layer.removesuffix(".weight")]["weight"] = layer
    return layers


def is_small(part: str) -> bool:
    """Whether a part is to be read before the others; it is not to be trusted to be small."""
    return _SMALL_PARTS.fullmatch(part) is not None


def _wanted(parts: Mapping[str, Tensor], part: str, dtypes: Sequence[torch.dtype], shape: tuple[int, ...]) -> None:
    """ValueError unless the part is there, of one of the dtypes, and of the shape."""
    if part not in parts:
        raise ValueError(f"{part} is missing")
    found = parts[part]
    if found.dtype not in dtypes:
        raise ValueError(f"{part} is {found.dtype}; wanted {' or '.join(map(str, dtypes))}")
    if found.shape != shape:
        raise ValueError(f"{part} has shape {tuple(found.shape)}; wanted {shape}")


def _table(parts: Mapping[str, Tensor], part: str, levels: Tensor) -> None:
    """ValueError unless the part is this table of levels: bitsandbytes goes by the name of the format, whatever it holds."""
    _wanted(parts, part, (torch.float32,), tuple(levels.shape))
    if not torch.equal(parts[part].cpu(), levels):
        raise ValueError(f"{part} is another table of levels than that of the format")


def _state(parts: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Returns name and object of the JSON text; ValueError unless there is one, of a format that is known."""
    names = [part for part in parts if part.startswith("weight.quant_state.")]
    if len(names) != 1 or names[0].removeprefix(STATE) not in LEVELS:
        raise ValueError(f"weight.quant_state: found {names or 'none'}; wanted one, {STATE}nf4 or {STATE}fp4")
    text = parts[names[0]]
    if text.dtype != torch.uint8 or text.ndim != 1 or len(text) > SMALL:
        found = f"{text.dtype} of shape {tuple(text.shape)}"
        raise ValueError(f"{names[0]} is {found}; wanted a text of at most {SMALL:,} bytes as torch.uint8")
    try:
        values = json.loads(bytes(text.tolist()).decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{names[0]}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{names[0]}: holds {type(values).__name__}; wanted an object")
    return names[0], values


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _float32(value: Any) -> float | None:
    """Returns the float32 number nearest to a number of JSON, or None where there is no finite one."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > torch.finfo(torch.float32).max:
        return None
    rounded = torch.tensor(float(value), dtype=torch.float32).item()
    return rounded if math.isfinite(rounded) else None


def check_4bit(parts: Mapping[str, Tensor]) -> Layout4bit:
    """Returns what the parts of a 4-bit weight say, having held each against the others.

    Args:
        parts: by their names behind that of the layer: "weight", "weight.absmax", ... Those that are not `is_small` may
            be on the meta device.

    Raises:
        ValueError: a part is missing, unknown, or not of the dtype, shape or content that the others ask for.
    """
    name, values = _state(parts)
    quant_type, nested = name.removeprefix(STATE), "weight.nested_absmax" in parts
    keys = _ALWAYS | _NESTED if nested else _ALWAYS
    if values.keys() != keys:
        raise ValueError(f"{name}: has the keys {sorted(values)!r:.300}; wanted {sorted(keys)}")
    if values["quant_type"] != quant_type:
        raise ValueError(f"{name}: quant_type is {values['quant_type']!r:.50}; wanted {quant_type!r}")
    shape, block_size, dtype = values["shape"], values["blocksize"], values["dtype"]
    if not isinstance(shape, list) or len(shape) != 2 or not all(_is_whole(n) and 0 <= n < 2**31 for n in shape):
        raise ValueError(f"{name}: shape is {shape!r:.100}; wanted [out_features, in_features]")
    if not _is_whole(block_size) or block_size not in BLOCK_SIZES:
        raise ValueError(f"{name}: blocksize is {block_size!r:.50}; wanted one of {', '.join(map(str, BLOCK_SIZES))}")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{name}: dtype is {dtype!r:.50}; wanted one of {', '.join(_DTYPES)}")
    size, blocks = (shape[0] * shape[1] + 1) // 2, blocks_per_row(shape[0] * shape[1], block_size)
    itemsize = parts["weight"].element_size() if "weight" in parts else 1
    _wanted(parts, "weight", _STORAGE, (size // itemsize, 1))
    if size % itemsize:
        raise ValueError(f"weight is {parts['weight'].dtype}, of which {size:,} bytes of codes are no whole number")
    _wanted(parts, "weight.absmax", (torch.uint8 if nested else torch.float32,), (blocks,))
    _table(parts, "weight.quant_map", torch.tensor(LEVELS[quant_type]))
    offset = None
    if nested:
        offset = _float32(values["nested_offset"])
        if offset is None:
            raise ValueError(f"{name}: nested_offset is {values['nested_offset']!r:.50}; wanted a finite float32 number")
        for key, only in (("nested_blocksize", ABSMAX_BLOCK_SIZE), ("nested_dtype", "float32")):
            if values[key] != only or isinstance(values[key], (bool, float)):
                raise ValueError(f"{name}: {key} is {values[key]!r:.50}; only {only!r} is read")
        _wanted(parts, "weight.nested_absmax", (torch.float32,), (-(-blocks // ABSMAX_BLOCK_SIZE),))
        _table(parts, "weight.nested_quant_map", dynamic_levels(signed=True))
    second = {"weight.nested_absmax", "weight.nested_quant_map"} if nested else set()
    _only(parts, {"weight", "weight.absmax", "weight.quant_map", name} | second)
    return Layout4bit(torch.Size(shape), _DTYPES[dtype], quant_type, block_size, offset)


def _only(parts: Mapping[str, Tensor], known: set[str]) -> None:
    """ValueError where a part would go unread."""
    if unknown := sorted(parts.keys() - known):
        raise ValueError(f"{unknown[0]} has no meaning beside {', '.join(sorted(known))}")


def from_4bit(parts: Mapping[str, Tensor], layout: Layout4bit) -> NF4Tensor:
    """Returns the weight that the parts hold, which `check_4bit` read as `layout`; codes and absmax share their memory."""
    codes = parts["weight"].reshape(-1).view(torch.uint8)
    nested, row = layout.offset is not None, coded_row(layout.rows, layout.shape)
    return NF4Tensor(
        codes=codes.view(layout.rows, (row + 1) // 2),
        absmax=parts["weight.absmax"].view(layout.rows, blocks_per_row(row, layout.block_size)),
        absmax_scale=parts["weight.nested_absmax"] if nested else None,
        absmax_offset=torch.tensor([layout.offset], dtype=torch.float32, device=codes.device) if nested else None,
        levels=torch.tensor(LEVELS[layout.quant_type], device=codes.device),
        shape=layout.shape,
        dtype=layout.dtype,
        block_size=layout.block_size,
    )


def to_4bit(weight: NF4Tensor) -> dict[str, Tensor]:
    """Returns the parts that bitsandbytes holds for a weight; codes and absmax share its memory.

    Raises:
        ValueError: bitsandbytes has no place for it: levels other than NF4's and FP4's, a dtype of 64 bits, no matrix, or
            blocks that begin anew in each row where a row is not a whole number of them.
    """
    quant_type = next((name for name, table in LEVELS.items() if weight.levels.tolist() == list(table)), None)
    if quant_type is None:
        raise ValueError("it has levels of its own; bitsandbytes knows those of nf4 and fp4")
    dtype = next((name for name, dtype in _DTYPES.items() if dtype == weight.dtype), None)
    if dtype is None or len(weight.shape) != 2:
        raise ValueError(f"it is {weight.dtype} of shape {tuple(weight.shape)}; wanted a matrix of {', '.join(_DTYPES)}")
    if weight.codes.shape[0] != 1 and weight.shape[1] % weight.block_size:
        raise ValueError(
            f"its rows of {weight.shape[1]} weights are no whole number of blocks of {weight.block_size}, and "
            "bitsandbytes' blocks run across rows; encode it with flat=True"
        )
    values = {
        "quant_type": quant_type, "blocksize": weight.block_size, "dtype": dtype, "shape": list(weight.shape),
    }  # fmt: skip
    parts = {
        "weight": weight.codes.reshape(-1, 1),
        "weight.absmax": weight.absmax.reshape(-1),
        "weight.quant_map": weight.levels,
    }
    if weight.absmax_scale is not None and weight.absmax_offset is not None:
        parts["weight.nested_absmax"] = weight.absmax_scale
        parts["weight.nested_quant_map"] = dynamic_levels(signed=True)
        values |= {
            "nested_blocksize": ABSMAX_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": weight.absmax_offset.item(),
        }
    parts[STATE + quant_type] = torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)
    return parts


def check_8bit(parts: Mapping[str, Tensor]) -> torch.Size:
    """Returns (out_features, in_features) of the parts of an 8-bit weight; arguments and errors as in `check_4bit`."""
    if "weight" not in parts:
        raise ValueError("weight is missing")
    shape = parts["weight"].shape
    _wanted(parts, "weight", (torch.int8,), tuple(shape))
    if len(shape) != 2:
        raise ValueError(f"weight has shape {tuple(shape)}; wanted (out_features, in_features)")
    _wanted(parts, "SCB", (torch.float32,), (shape[0],))
    if "weight_format" in parts:
        _wanted(parts, "weight_format", (torch.uint8,), ())
        if parts["weight_format"].item() != 0:
            raise ValueError(f"weight_format is {parts['weight_format'].item()}; only 0, row after row, is read")
    _only(parts, {"weight", "SCB", "weight_format"})
    return shape


def from_8bit(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns `(codes, absmax)`, int8 (out, in) and float32 (out, 1), of parts that `check_8bit` has seen."""
    return parts["weight"], parts["SCB"].view(-1, 1)


def to_8bit(codes: Tensor, absmax: Tensor) -> dict[str, Tensor]:
    """Returns the parts that bitsandbytes holds for row-wise absmax codes: int8 (out, in) and float32 (out, 1)."""
    return {"weight": codes, "SCB": absmax.view(-1), "weight_format": torch.tensor(0, dtype=torch.uint8)}


def quantization_config(quant_type: str, *, double_quant: bool, compute_dtype: str, skip: Sequence[str]) -> dict[str, Any]:
    """Returns the "quantization_config" of a config.json, with the keys that transformers writes and reads.

    Args:
        quant_type: "nf4", "fp4" or "int8". double_quant: of 4 bits. compute_dtype: "bfloat16" for example, in which a 4-bit
            layer multiplies.
        skip: names of the linear layers that are dense.
    """
    four = quant_type in LEVELS
    return {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quant_type if four else "fp4",  # what transformers says where it means nothing
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skip),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": "bitsandbytes",
    }

"""Every kernel compiles for every generation of GPU, keeps to its registers, and spends no more instructions than it did.

The machine code is made here, without a GPU: see aot.py. Instructions are counted on sm_90 because an H200 is where they
are scarcest: at 4.2 TB/s and 2.5 bytes a weight each of its 132 multiprocessors has to decode 7 weights a clock, and issues
128 instructions of one thread in it, 18 for each weight.

A NEW KERNEL (whatever Triton compiles and whose first parameter is named ..._ptr or ..._map; a helper takes its pointers
last) needs an entry in VARIANTS, or `test_every_kernel_has_an_entry` fails:

    "name of the variant": Variant(
        "module of qlite/kernels", "function",
        {"x_ptr": "*bf16", "rows": "i32", ...},       what it is given, beside its constants; pointers first
        {"BLOCK": 64, ...},                           constexpr parameters (and pointers that are None, integers that are 1)
        aligned=("x_ptr", ...),                       what is a multiple of 16 (PyTorch's allocations are)
        options={"num_warps": 8},                     as in its launch
        per_thread=32, budget=12.1,                   weights of a thread, and instructions a weight: measured + 10 %
        loop=False,                                   count the longest loop instead of the way through (per_thread: its share)
        nested=False,                                 with the loops inside it
        capabilities=CAPABILITIES,                    where it is ever launched; a list shorter than all needs its reason
        stack=8,                                      bytes that may spill, outside of loops; needs its reason too
    )

Several variants of a kernel, for what a launch switches: the one that matters most first. It alone is compiled for every
capability, the others for the oldest and for sm_90: a build takes up to a second.
"""

import dataclasses
import importlib
import pathlib

import pytest

pytest.importorskip("triton", reason="Triton is not built for this platform")
import torch

from qlite.kernels import few_rows as kernel_of_few_rows
from qlite.kernels import linear_int8, nf4_search, one_token, ptx, sixteen_rows, tiles
from qlite.nf4 import SHARES
from tests.kernels import aot
from tests.kernels.aot import CAPABILITIES, Build

KERNELS = pathlib.Path(__file__).parents[2] / "qlite" / "kernels"


@dataclasses.dataclass(frozen=True)
class Variant:
    module: str
    kernel: str
    signature: dict
    constants: dict
    aligned: tuple = ()
    options: dict = dataclasses.field(default_factory=lambda: {"num_warps": 4})
    per_thread: int | None = None
    budget: float | None = None
    loop: bool = False
    nested: bool = False
    capabilities: tuple = CAPABILITIES
    stack: int = 0

    def build(self, capability: int) -> Build:
        module = self.module if "." in self.module else f"qlite.kernels.{self.module}"
        options = {"enable_fp_fusion": False, **self.options}
        return Build(module, self.kernel, capability, self.signature, self.constants, self.aligned, options)


def codec(kernel, signature, constants, unaligned=(), **rest):
    pointers = tuple(name for name, kind in signature.items() if kind.startswith("*") and constants.get(name, 0) is not None)
    multiples = ("columns", "row_stride", "out_stride")  # of 16, in every model's weights
    aligned = tuple(name for name in (*pointers, *multiples) if name in signature and name not in (*constants, *unaligned))
    return Variant("nf4_codec", kernel, signature, constants, aligned, {"num_warps": 8}, **rest)


def dequantize(out="*bf16", absmax="*u8", unaligned=(), budget=None, per_thread=32, **constants):
    signature = {
        "codes_ptr": "*u8", "absmax_ptr": absmax, "scale_ptr": "*fp32", "offset_ptr": "*fp32", "dynamic_ptr": "*fp32",
        "levels_ptr": "*fp32", "out_ptr": out, "first_row": "i32", "chunks_a_row": "i32", "chunks": "i32",
        "bytes_a_row": "i32", "blocks_a_row": "i32", "out_stride": "i32",
    }  # fmt: skip
    usual = {
        "BLOCK": 64, "CHUNK": 8, "TILE": 1024, "FLAT_CODES": True, "FLAT_OUT": True, "DOUBLE_QUANT": absmax == "*u8",
        "ABSMAX_BLOCK": 256, "SHUFFLE": True, "ROUND_BFLOAT16": False,
    }  # fmt: skip
    if absmax != "*u8":
        usual |= {"scale_ptr": None, "offset_ptr": None, "dynamic_ptr": None}
    return codec("_dequantize_kernel", signature, usual | constants, unaligned, budget=budget, per_thread=per_thread)


def quantize(weight="*bf16", unaligned=(), budget=None, per_thread=32, **constants):
    signature = {
        "weight_ptr": weight, "table_ptr": "*i32", "codes_ptr": "*u8", "absmax_ptr": "*fp32", "columns": "i32",
        "row_stride": "i32", "column_stride": "i32", "blocks_a_row": "i32", "blocks": "i32", "smallest": "fp32",
    }  # fmt: skip
    usual = {"column_stride": 1, "BLOCK": 64, "TILE": 1024, "WHOLE": True, "WORDS": True, "SCALED": False, "SHUFFLE": True}
    return codec("_quantize_kernel", signature, usual | constants, unaligned, budget=budget, per_thread=per_thread)


def search(weight="*bf16", weighting=None, **rest):
    signature = {
        "weight_ptr": weight, "table_ptr": "*i32", "weighting_ptr": "*fp32", "scales_ptr": "*fp32", "columns": "i32",
        "row_stride": "i32", "column_stride": "i32", "blocks_a_row": "i32", "blocks": "i32", "period": "i32",
        "smallest": "fp32", "largest": "fp32",
    }  # fmt: skip
    constants = {
        "column_stride": 1, "FIRST": SHARES.start, "STEP": SHARES.step, "COUNT": len(SHARES), "BLOCK": 64,
        "TILE": nf4_search.TILE, "WHOLE": True, "SHUFFLE": True,
    }  # fmt: skip
    constants |= {key: rest.pop(key) for key in [*rest] if key.isupper()} | ({} if weighting else {"weighting_ptr": None})
    aligned = tuple(name for name in signature if name.endswith("_ptr") and name not in constants)
    aligned = (*aligned, "columns", "row_stride")
    options = {"num_warps": nf4_search.WARPS}
    return Variant("nf4_search", "_search_kernel", signature, constants, aligned, options, per_thread=32, **rest)


SUM = {
    "absmax_ptr": "*fp32", "sums_ptr": "*fp64", "dynamic_ptr": "*fp32", "midpoints_ptr": "*fp32", "count": "i32",
    "share": "i32",
}  # fmt: skip
ABSMAX = {
    "absmax_ptr": "*fp32", "sums_ptr": "*fp64", "midpoints_ptr": "*fp32", "codes_ptr": "*u8", "scale_ptr": "*fp32",
    "offset_ptr": "*fp32", "count": "i32", "parts": "i32", "smallest": "fp32",
}  # fmt: skip
ROWS = {"FLAT_CODES": False, "FLAT_OUT": False}


def linear_nf4(module, kernel, tile, signature, constants, dtype, double_quant, bias, **rest):
    """Entries of few_rows.py and small_batch.py: `signature` behind the pointers that they share, `constants` beside those."""
    name = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    shared = {
        "codes_ptr": "*i32", "absmax_ptr": "*u8" if double_quant else "*fp32", "scale_ptr": "*fp32", "offset_ptr": "*fp32",
        "dynamic_ptr": "*fp32", "levels_ptr": "*fp32", "bias_ptr": "*fp32", "y_ptr": name, "rows": "i32",
        "out_features": "i32", "in_features": "i32", "blocks": "i32", "absmax_a_row": "i32",
    }  # fmt: skip
    constants = {
        "RATIO": 1, "DOUBLE_QUANT": double_quant, "BIAS": bias, "WARPS": tile.warps, "LEVELS_AT": ptx.PAIRS,
        **constants,
        **({} if bias else {"bias_ptr": None}),
    }  # fmt: skip
    signature = {"x_ptr": name, **shared, **signature}
    aligned = [key for key in signature if key.endswith("_ptr") or key in ("out_features", "in_features")]
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    aligned = tuple(key for key in aligned if key not in constants)
    return Variant(module, kernel, signature, constants, aligned, options, **rest)


def few_rows(dtype=torch.bfloat16, double_quant=True, bias=False, plain=False, mode="SINGLE", tile=None, early=False, **rest):
    tile = tile or tiles.table((9, 0))[0][2]
    sixteen = tile.tile_m == sixteen_rows.ROWS
    tall = sixteen_rows.TALL * tile.warps if sixteen else 16 if tile.split else 16 * tile.warps
    assembly = {
        "TABLE": ptx.table(tile.warps, dtype, double_quant, exchange=tile.split), "PAIRS": ptx.pairs(),
        "PRODUCT": ptx.product_of_sixteen(dtype) if sixteen else ptx.product(dtype), "RAW": ptx.raw_scales(double_quant),
        "SCALES": ptx.scales_of_sixteens(double_quant) if sixteen else ptx.scales(double_quant),
        "SUM": ptx.sum_of_warps(tile.warps) if tile.split else ptx.SUM_OF_HALVES, "FENCE": ptx.FENCE,
    }  # fmt: skip
    constants = {
        "MODE": getattr(kernel_of_few_rows, mode).value, "SPLIT": tile.split, "TALL": tall, "TILE_M": tile.tile_m,
        "CHUNKS": 1 if sixteen else 2 * tile.warps if tile.split else 2, "PARTS": tile.parts, "PLAIN": plain,
        "EARLY": early, "SUM_AT": ptx.PAIRS + ptx.LEVELS, **(dict.fromkeys(assembly, "") if plain else assembly),
    }  # fmt: skip
    if not plain:
        rest.setdefault("registers", tile.registers)
    kind = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    deltas = dict.fromkeys(("codes_delta", "x_delta", "absmax_delta", "scale_delta"), "i64")
    both = [name + number for name in ("x_row", "rows", "blocks", "absmax") for number in "01"]
    integers = dict.fromkeys(("rows", *both, "groups0", "steps0", "steps", "total_steps"), "i32")
    signature = {
        "x_ptr": kind if plain else "*i64" if sixteen else "*i32", "codes_ptr": "*i32",
        "absmax_ptr": "*u8" if double_quant else "*fp32",
        **dict.fromkeys(("scale_ptr", "offset_ptr", "offset1_ptr", "dynamic_ptr", "levels_ptr", "bias_ptr"), "*fp32"),
        "y_ptr": kind if tile.parts == 1 else "*fp32", **deltas, **integers,
    }  # fmt: skip
    constants |= {"RATIO": 1, "DOUBLE_QUANT": double_quant, "BIAS": bias, "WARPS": tile.warps, "LEVELS_AT": ptx.PAIRS}
    constants |= {} if bias else {"bias_ptr": None}
    aligned = [key for key in signature if key.endswith("_ptr")] + [
        "codes_delta",
        "x_delta",
        "x_row0",
        "x_row1",
        "rows0",
        "rows1",
    ]
    options = {"num_warps": tile.warps, "num_stages": 1, "enable_fp_fusion": True}
    registers = rest.pop("registers", None)
    options |= {"maxnreg": registers} if registers else {}
    # A step of 16 rows by 256 columns a warp, or 32 by 128, two a turn of the loop.
    rest = {"loop": True, "per_thread": 256, **rest}
    aligned = tuple(key for key in aligned if key not in constants)
    return Variant("few_rows", "_few_rows_kernel", signature, constants, aligned, options, **rest)


def small_batch(tile, dtype=torch.bfloat16, double_quant=True, bias=False, **rest):
    look = ptx.scaled_pairs(dtype) if tile.scaled else ptx.pairs()
    table = ptx.table(tile.warps, dtype, double_quant, wide=tile.scaled)
    constants = {
        "TILE_N": tile.tile_n, "TILE_M": tile.tile_m, "STAGES": tile.stages, "TWO": tile.two, "WIDTH": tile.width,
        "SORTED": tile.sort, "SCALED": tile.scaled, "PLAIN": False, "TABLE": table, "LOOK": look,
        "LEVEL": ptx.level_of_absmax(), "LANE_MASK": 15 if tile.scaled else 31, "LANE_BYTES": 8 if tile.scaled else 4,
        "EARLY": tile.early,
    }  # fmt: skip
    signature = dict.fromkeys(("steps", "tiles_m", "total_steps"), "i32") | {"parts_ptr": "*fp32", "counters_ptr": "*i32"}
    return linear_nf4("small_batch", "_small_batch_kernel", tile, signature, constants, dtype, double_quant, bias, **rest)


def int8(module, kernel, signature, constants, whole=True, **rest):
    options = {"num_warps": rest.pop("warps", 4), "num_stages": rest.pop("stages", 3), "enable_fp_fusion": False}
    multiples = ("columns", "row_stride", "out_features", "in_features")
    aligned = tuple(key for key in signature if key.endswith("_ptr") or key in multiples) if whole else ()
    constants = {"ROUND_BFLOAT16": False, **constants} if kernel != "_quantize_kernel" else constants
    return Variant(module, kernel, signature, constants, aligned, options, **rest)


def int8_many_rows(capability, aligned, rows=4096, dtype="*bf16", **rest):
    tile = linear_int8.many_rows_tile(rows, aligned, capability)
    cut = {"ROWS": tile.rows, "OUT": tile.out, "COLUMNS": tile.columns, "GROUP": tile.group, "HAS_BIAS": True}
    ends = {"x_absmax_ptr": "*fp32", "absmax_ptr": "*fp32", "bias_ptr": dtype, "y_ptr": dtype, **SIZES}
    rest = {"warps": tile.warps, "stages": tile.stages, **rest}
    if not tile.tensor_maps:
        signature = {"x_ptr": "*i8", "codes_ptr": "*i8", **ends}
        return int8("linear_int8", "_product_kernel", signature, cut | {"WHOLE": aligned}, aligned, **rest)
    maps = {f"{name}_map": f"tensordesc<i8[{side}, {tile.columns}]>" for name, side in (("x", tile.rows), ("codes", tile.out))}
    signature = {**maps, **ends, "tiles": "i32", "programs": "i32"}
    return int8("linear_int8", "_product_by_map_kernel", signature, cut, **rest)


def int8_few_rows(capability, rows, dtype="*bf16", **rest):
    tile = linear_int8.few_rows_tile(rows, 18176, 4544, capability)
    signature = {
        "x_ptr": dtype, "words_ptr": "*i32", "absmax_ptr": "*fp32", "bias_ptr": dtype, "y_ptr": dtype, "parts_ptr": "*fp32",
        **SIZES, "row_stride": "i32", "steps": "i32",
    }  # fmt: skip
    cut = {
        "OUT": tile.out, "ROWS": tile.rows, "COLUMNS": tile.columns, "WARPS": tile.warps, "SHARES": tile.shares,
        "WHOLE": tile.columns == 64, "HAS_BIAS": True, "ASSEMBLY": True,
    }  # fmt: skip
    rest = {"loop": True, "per_thread": tile.out * tile.columns // (32 * tile.warps), **rest}
    return int8("linear_int8", "_few_rows_kernel", signature, cut, warps=tile.warps, stages=tile.stages, **rest)


SIXTEEN = tiles.Tile("few rows", 3, 4, tile_m=16, split=False, parts=4, registers=168)
STACKED, SUMMED = (tiles.two_products(how, 4, torch.device("cpu")) for how in ("stacked", "summed"))
STACKED_16, SUMMED_16 = (tiles.two_products(how, 16, torch.device("cpu")) for how in ("stacked", "summed"))


def one_token_sums(capabilities=CAPABILITIES, **constants):
    strides = [name + "stride" for name in ("", "row_", "more_", "more_row_")]
    signature = {
        "x_ptr": "*bf16", "parts_ptr": "*fp32", "more_ptr": "*fp32",
        **dict.fromkeys(("weight_ptr", "bias_ptr", "sum_ptr", "y_ptr"), "*bf16"),
        **dict.fromkeys(("columns", *strides), "i32"), "eps": "fp32",
    }  # fmt: skip
    constants = {"PARTS": SUMMED.parts, "MORE": 1, "BLOCK": 8192, "PLAIN": False, "EARLY": False, **constants}
    aligned = tuple(name for name in signature if name != "eps")
    return Variant("one_token", "_add_norm_kernel", signature, constants, aligned, {"num_warps": 32}, capabilities=capabilities)


def between_products(capabilities=CAPABILITIES, dtype="*bf16", **constants):
    pointers = dict.fromkeys(("fused_ptr", "more_fused_ptr", "up_ptr", "more_up_ptr"), "*fp32")
    pointers |= dict.fromkeys(("cos_ptr", "sin_ptr", "keys_ptr", "values_ptr", "attended_ptr", "activated_ptr"), dtype)
    names = [f"{of}_{what}" for of in ("fused", "more_fused", "up", "more_up") for what in ("stride", "row")]
    integers = dict.fromkeys((*names, "chunks", "kv_heads", "group", "length", "cos_stride", "ffn"), "i32")
    signature = {**pointers, "at_ptr": "*i64", "visible_ptr": "*i8", **integers, "scale": "fp32"}
    constants = {
        "FUSED": STACKED.parts, "MORE_FUSED": 1, "UP": STACKED.parts, "MORE_UP": 0,
        "SIZE": 64, "HEADS": one_token.HEADS, "KEYS": one_token.KEYS,
        "COLUMNS": one_token.COLUMNS,
        "PLAIN": False, "EARLY": False, **constants,
    }  # fmt: skip
    options = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}
    aligned = (*pointers, "at_ptr", *names, "length")
    return Variant("one_token", "_between_kernel", signature, constants, aligned, options, capabilities=capabilities)


def int8_one_row(words=True, **rest):
    tile = linear_int8.ONE_ROW
    signature = {
        "x_ptr": "*fp16", "codes_ptr": "*i32" if words else "*i8", "absmax_ptr": "*fp32", "bias_ptr": "*fp16",
        "y_ptr": "*fp16", "out_features": "i32", "in_features": "i32", "row_stride": "i32",
    }  # fmt: skip
    cut = {"OUT": tile.out, "COLUMNS": tile.columns, "STAGES": tile.stages, "WORDS": words, "WHOLE": False, "HAS_BIAS": True}
    cut |= {"ASSEMBLY": True}
    return int8("linear_int8", "_one_row_kernel", signature, cut, words, warps=tile.warps, **rest)


def adamw(param="*fp32", grad=None, scale=False, warps=1, **rest):
    budget, loop = rest.pop("budget", None), rest.pop("loop", False)
    signature = {"table_ptr": "*i64", "lookup_ptr": "*i32", "param_ptr": param, "grad_ptr": grad or param, "scale_ptr": "*fp32"}
    signature |= {"tensors": "i32", "share": "i32", "smallest": "fp32"}
    constants = {"BLOCK": 256, "WIDTH": 256, "TILE": 256, "ALIGNED": True, "ROUND_BFLOAT16": False, "share": 1, **rest}
    constants |= {} if scale else {"scale_ptr": None}
    constants = {name: value for name, value in constants.items() if value != "of the launch"}
    aligned = ("table_ptr", "lookup_ptr", *(("scale_ptr",) if scale else ()))
    options = {"num_warps": warps}
    return Variant(
        "adamw_8bit", "_encoded_kernel", signature, constants, aligned, options, per_thread=8, budget=budget, loop=loop
    )


def plain_adamw(param="*fp32", scale=False, **rest):
    signature = {"table_ptr": "*i64", "param_ptr": param, "grad_ptr": param, "scale_ptr": "*fp32", "tensors": "i32"}
    constants = {"TILE": 1024, "ROUND_BFLOAT16": False, **({} if scale else {"scale_ptr": None})}
    return Variant("adamw_8bit", "_plain_kernel", signature, constants, ("table_ptr",), per_thread=8, **rest)


SIZES = dict.fromkeys(("rows", "out_features", "in_features"), "i32")
ENCODE = {"x_ptr": "*fp16", "codes_ptr": "*i8", "absmax_ptr": "*fp32", "columns": "i32", "row_stride": "i32"}
JOIN = {
    "parts_ptr": "*fp32",
    "absmax_ptr": "*fp32",
    "bias_ptr": "*bf16",
    "y_ptr": "*bf16",
    "rows": "i32",
    "out_features": "i32",
}
#: The few rows' kernel has no tensor core to use before capability 8.0, and there runs as in the interpreter.
TENSOR_CORES = tuple(capability for capability in CAPABILITIES if capability >= 80)
#: Instructions a weight. 256 rows: two registers spill before the loop, and with a bias 28 around it, once a tile; with half
#: the rows a tile it takes a tenth longer.
BUDGETS = {16: 3.2, 32: 3.8, 64: 5.4, 128: 6.1, 256: 8.6}
HOPPER, AMPERE = ({most: tile for most, _, tile in tiles.table(of) if tile.method == "small batch"} for of in ((9, 0), (8, 6)))
VARIANTS = {
    "dequantize": dequantize(budget=9.2),
    "dequantize, absmax in float32": dequantize(absmax="*fp32", budget=7.1),
    "dequantize into a wider buffer": dequantize(FLAT_OUT=False, budget=12.7),
    "dequantize rows of broken blocks": dequantize(**ROWS, budget=13.1),
    "dequantize to float16, blocks of 4096": dequantize("*fp16", BLOCK=4096, budget=9.2),
    "dequantize to float32": dequantize("*fp32", CHUNK=4, TILE=2048, budget=12.6),
    "dequantize rows of an odd length": dequantize(**ROWS, CHUNK=1, TILE=4096, unaligned=("out_stride",)),
    "dequantize one weight": dequantize(
        FLAT_OUT=False, CHUNK=1, TILE=4096, first_row=1, chunks=1, bytes_a_row=1, blocks_a_row=1, out_stride=1
    ),
    "dequantize row 1 of 1": dequantize(**ROWS, CHUNK=1, TILE=4096, first_row=1, chunks=1, bytes_a_row=1, blocks_a_row=1),
    "quantize": quantize(budget=16.3),
    "quantize from float16, blocks of 4096": quantize("*fp16", BLOCK=4096, budget=15.8),
    "quantize from float32": quantize("*fp32", budget=21.5),
    "quantize rows of broken blocks": quantize(WHOLE=False, budget=21.7),
    "quantize rows of an odd length": quantize(WHOLE=False, WORDS=False, unaligned=("columns", "row_stride")),
    "quantize one weight": quantize(WHOLE=False, WORDS=False, columns=1, row_stride=1, blocks=1),
    "quantize by given scales": quantize(SCALED=True, budget=19.0),
    # Counted: the longer of its two loops, for tables whose codes are not found by cells.
    "search": search(loop=True, budget=35.9),
    # Three registers of a T4 wait in memory while its loop runs: in blocks of 128 threads it takes at most 128 of them.
    "search, float32": search("*fp32", loop=True, budget=39.3, stack=16),
    "search, rows of broken blocks, weighted": search(weighting="*fp32", WHOLE=False, loop=True, budget=38.0),
    "search, blocks of 4096": search(BLOCK=4096, loop=True, budget=40.0),
    "decide": codec("_decision_kernel", {"levels_ptr": "*fp32", "table_ptr": "*i32"}, {}),
    "sum the absmax": codec("_absmax_sum_kernel", SUM, {"TILE": 1024}),
    "sum one absmax": codec("_absmax_sum_kernel", SUM, {"TILE": 1024, "count": 1, "share": 1}),
    "quantize the absmax": codec(
        "_absmax_quantize_kernel", ABSMAX, {"ABSMAX_BLOCK": 256, "GROUPS": 8, "PARTS": 1024}, per_thread=8, budget=96
    ),
    "quantize one absmax": codec(
        "_absmax_quantize_kernel", ABSMAX, {"ABSMAX_BLOCK": 256, "GROUPS": 8, "PARTS": 1024, "parts": 1}
    ),
    "few rows": few_rows(capabilities=TENSOR_CORES, budget=3.1),
    "few rows, whole groups": few_rows(tile=tiles.table((8, 0))[0][2], capabilities=TENSOR_CORES),
    "few rows, sixteen": few_rows(tile=SIXTEEN, capabilities=TENSOR_CORES, nested=True, budget=5.8),
    "few rows, early": few_rows(early=True, capabilities=(90,)),
    "few rows, columns split": few_rows(tile=dataclasses.replace(tiles.table((9, 0))[0][2], split=True), capabilities=(90,)),
    "few rows of two weights, stacked": few_rows(mode="STACKED", tile=STACKED, capabilities=TENSOR_CORES, budget=3.3),
    "sixteen rows of two weights, stacked": few_rows(
        mode="STACKED", tile=STACKED_16, capabilities=TENSOR_CORES, nested=True, budget=6.1
    ),
    "sixteen rows of two weights, summed": few_rows(
        mode="SUMMED", tile=SUMMED_16, capabilities=TENSOR_CORES, nested=True, budget=6.1
    ),
    "few rows of two weights, summed": few_rows(mode="SUMMED", tile=SUMMED, capabilities=TENSOR_CORES, budget=3.5),
    "few rows' parts summed": Variant(
        "few_rows", "_sum_of_parts_kernel",
        {"parts_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16", "count": "i32", "out_features": "i32"},
        {"PARTS": 4, "BLOCK": 512, "BIAS": True, "PLAIN": False, "EARLY": False},
    ),
    "few rows, float16, absmax in float32, bias": few_rows(torch.float16, False, True, capabilities=TENSOR_CORES),
    "few rows without tensor cores": few_rows(torch.float16, plain=True, loop=False, capabilities=(75,)),
    "few rows without tensor cores, absmax in float32": few_rows(
        torch.float16, False, True, plain=True, loop=False, capabilities=(75,)
    ),
    "order of columns": Variant(
        "small_batch", "_sort_kernel",
        {"x_ptr": "*bf16", "sorted_ptr": "*bf16", "counters_ptr": "*i32", "count": "i32", "counters": "i32"},
        {"WIDTH": 2, "BLOCK": 4096, "EARLY": False}, ("x_ptr", "sorted_ptr", "counters_ptr", "count"), {"num_warps": 8},
    ),
    "order of columns for sixteen": Variant(
        "sixteen_rows", "_pack_kernel", {"x_ptr": "*bf16", "packed_ptr": "*bf16", "rows": "i32", "columns": "i32"},
        {"BLOCK": 2048, "EARLY": False}, ("x_ptr", "packed_ptr", "columns"), {"num_warps": 8},
    ),
    **{f"{rows} rows on Ampere": small_batch(tile, capabilities=(80, 86, 89)) for rows, tile in AMPERE.items()},
    **{
        f"{rows} rows on Hopper": small_batch(
            tile, capabilities=(90,), loop=True, budget=BUDGETS[rows], stack=8 if rows == 256 else 0,
            per_thread=(128 if tile.two else 64) * tile.tile_n // (32 * tile.warps),
        )
        for rows, tile in HOPPER.items()
    },
    **{
        f"{rows} rows on Hopper, float16, absmax in float32, bias": small_batch(
            tile, torch.float16, False, True, capabilities=(90,), stack={128: 8, 256: 112}.get(rows, 0)
        )
        for rows, tile in HOPPER.items()
    },
    "256 rows on Hopper, bias": small_batch(HOPPER[256], bias=True, capabilities=(90,), stack=112),
    "int8 rows encoded": int8("int8_codec", "_quantize_kernel", ENCODE, {"BLOCK": 8192, "WHOLE": True}, warps=8),
    "int8 rows of any length encoded": int8(
        "int8_codec", "_quantize_kernel", ENCODE, {"BLOCK": 8192, "WHOLE": False}, False, warps=8
    ),
    "int8 decoded": int8(
        "int8_codec", "_dequantize_kernel",
        {"codes_ptr": "*i8", "absmax_ptr": "*fp32", "out_ptr": "*fp16", "columns": "i32"}, {"BLOCK": 4096}, warps=8,
    ),
    "dropout by seed": Variant(
        "dropout", "_dropout_kernel",
        {"x_ptr": "*bf16", "out_ptr": "*bf16", "seed_ptr": "*i64", "count": "i32", "threshold": "i32", "scale": "fp32"},
        {"BLOCK": 2048, "WIDE": False, "ROUND_BFLOAT16": False}, ("x_ptr", "out_ptr", "seed_ptr", "count"),
        per_thread=16, budget=26.8,
    ),
    "rotary positions": Variant(
        "rotary", "_rotate_kernel",
        {
            "x_ptr": "*bf16", "cos_ptr": "*bf16", "sin_ptr": "*bf16", "out_ptr": "*bf16", "heads": "i32", "group": "i32",
            "tokens": "i32", "batch_stride": "i32",
        },
        {"HALF": 32, "HALF_BLOCK": 32, "HEADS": 32, "ROUND_BFLOAT16": False},
        ("x_ptr", "cos_ptr", "sin_ptr", "out_ptr"), per_thread=16, budget=13.6,
    ),
    "LayerNorm of a few tokens": Variant(
        "few_tokens", "_layer_norm_kernel",
        {"x_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16", "y_ptr": "*bf16", "columns": "i32", "eps": "fp32"},
        {"BLOCK": 8192, "ROUND_BFLOAT16": False}, ("x_ptr", "weight_ptr", "bias_ptr", "y_ptr", "columns"), {"num_warps": 8},
    ),
    "LoRA of a few tokens, down": Variant(
        "few_tokens", "_lora_down_kernel",
        {"x_ptr": "*bf16", "a_ptr": "*fp32", "low_ptr": "*fp32", "columns": "i32", "rank": "i32"}, {"STRIP": 2048},
        ("x_ptr", "a_ptr", "low_ptr", "columns", "rank"), {"num_warps": 8},
    ),
    "LoRA of a few tokens, up": Variant(
        "few_tokens", "_lora_up_kernel",
        {
            "y_ptr": "*bf16", "low_ptr": "*fp32", "b_ptr": "*fp32", "out_ptr": "*bf16", "columns": "i32", "rank": "i32",
            "scaling": "fp32",
        },
        {"COLUMNS": 64, "RANK": 16, "ADD": True, "ROUND_BFLOAT16": False},
        ("y_ptr", "low_ptr", "b_ptr", "out_ptr", "columns", "rank"),
    ),
    "sums and LayerNorm of one token": one_token_sums(),
    "sums and LayerNorm of one token, early": one_token_sums(EARLY=True, capabilities=(90,)),
    "attention and GELU of one token": between_products(TENSOR_CORES),
    "attention and GELU of one token, without tensor cores": between_products((75,), PLAIN=True, KEYS=one_token.FEWER_KEYS),
    "attention and GELU of one token, float32": between_products(TENSOR_CORES, dtype="*fp32", KEYS=one_token.FEWER_KEYS),
    "attention and GELU of one token, many rows": between_products(
        TENSOR_CORES, KEYS=one_token.FEWER_KEYS, FUSED=STACKED_16.parts, UP=STACKED_16.parts
    ),
    "sums and LayerNorm of one token, many rows": one_token_sums(TENSOR_CORES, PARTS=SUMMED_16.parts),
    "attention and GELU of one token, early": between_products(EARLY=True, capabilities=(90,)),
    "int8, one row": int8_one_row(),
    "int8, one row of any length": int8_one_row(False),
    # Tensor cores multiply from 8.0 on; without them the op decodes, or goes row by row.
    "int8, 16 rows on Ampere": int8_few_rows((8, 6), 16, capabilities=(80, 86, 89)),
    "int8, 16 rows": int8_few_rows((9, 0), 16, capabilities=(90, 100)),
    "int8, 64 rows": int8_few_rows((9, 0), 64, capabilities=(90,)),
    "int8, shares joined": int8(
        "linear_int8", "_join_shares_kernel", JOIN, {"SHARES": 8, "BLOCK": 512, "HAS_BIAS": True}, capabilities=TENSOR_CORES
    ),
    "int8, many rows on Ampere": int8_many_rows((8, 0), True, capabilities=TENSOR_CORES),
    "int8, many rows of any length": int8_many_rows((9, 0), False, capabilities=TENSOR_CORES),
    "int8, many rows": int8_many_rows((9, 0), True, capabilities=(90,)),
    "int8, some hundred rows": int8_many_rows((9, 0), True, 256, capabilities=(90,)),
    # With the search for the row. Of a program that steps several tiles, the first with all that is prepared once.
    "adamw": adamw(budget=94.6),
    "adamw, bfloat16": adamw("*bf16", budget=97.7),
    "adamw, float32 of a bfloat16 gradient, scaled": adamw("*fp32", "*bf16", scale=True),
    "adamw, 8 tiles a program": adamw(share="of the launch", budget=106.3),
    "adamw of float16, unaligned": adamw("*fp16", ALIGNED=False),
    "adamw, blocks of 4096": adamw(BLOCK=4096, WIDTH=4096, TILE=4096, warps=16),
    "adamw, blocks of 100": adamw(BLOCK=100, WIDTH=128, ALIGNED=False),
    "adamw, float32 moments": plain_adamw(),
    "adamw, float32 moments, bfloat16, scaled": plain_adamw("*bf16", scale=True),
}  # fmt: skip
UNFIT = {
    "fifteen loads": Variant(
        "tests.kernels.unfit", "fifteen_loads",
        {"weight_ptr": "*bf16", "midpoints_ptr": "*fp32", "codes_ptr": "*u8"}, {"TILE": 4096},
        ("weight_ptr", "midpoints_ptr", "codes_ptr"), per_thread=32, budget=VARIANTS["quantize"].budget,
    ),
    "select tree": Variant(
        "tests.kernels.unfit", "select_tree",
        {"codes_ptr": "*u8", "levels_ptr": "*fp32", "out_ptr": "*bf16"}, {"TILE": 4096},
        ("codes_ptr", "levels_ptr", "out_ptr"), per_thread=32, budget=VARIANTS["dequantize"].budget,
    ),
    "spilling": Variant("tests.kernels.unfit", "spilling", {"x_ptr": "*fp32"}, {"TILE": 8192}, ("x_ptr",), {"num_warps": 1}),
    "uncompilable": Variant("tests.kernels.unfit", "uncompilable", {"x_ptr": "*fp32"}, {"TILE": 8}),
}  # fmt: skip


def launched(module) -> set[str]:
    """The kernels of a module: what Triton compiles, however wrapped, and takes a pointer first."""
    found = set()
    for name, value in vars(module).items():
        if not type(value).__module__.startswith("triton.runtime"):
            continue
        while hasattr(value, "fn"):
            value = value.fn
        if value.__module__ == module.__name__ and value.__code__.co_varnames[0].endswith(("_ptr", "_map")):
            found.add(name)
    return found


def wanted() -> list[tuple[str, int]]:
    """Each variant with the capabilities to build it for."""
    first, pairs = set(), []
    for name, variant in {**VARIANTS, **UNFIT}.items():
        few = {min(variant.capabilities), 90} & set(variant.capabilities)
        every = name in VARIANTS and (variant.module, variant.kernel) not in first
        first.add((variant.module, variant.kernel))
        pairs += [(name, capability) for capability in (variant.capabilities if every else sorted(few))]
    return pairs


@pytest.fixture(scope="module")
def codes():
    pairs = wanted()
    builds = [{**VARIANTS, **UNFIT}[name].build(capability) for name, capability in pairs]
    return dict(zip(pairs, aot.compiled(builds)))


def spent(variant: Variant, code: aot.Code) -> float:
    return len(code.loops(variant.nested)[0] if variant.loop else code.straight()) / variant.per_thread


@pytest.mark.parametrize("path", sorted(KERNELS.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_every_kernel_has_an_entry(path):
    module = importlib.import_module(f"qlite.kernels.{path.stem}")
    assert launched(module) == {variant.kernel for variant in VARIANTS.values() if variant.module == path.stem}


@pytest.mark.parametrize(("name", "capability"), [pair for pair in wanted() if pair[0] in VARIANTS])
def test_the_kernel_compiles_and_spills_nothing(codes, name, capability):
    code, allowed = codes[name, capability], VARIANTS[name].stack
    assert code.straight() and code.stack <= allowed, f"{code.registers} registers, {code.stack} bytes of stack"
    if allowed:
        assert not any(aot.count(body).keys() & {"LDL", "STL"} for body in code.loops())
    else:
        assert not code.spills


@pytest.mark.parametrize(("name", "capability"), [pair for pair in wanted() if pair[0] in VARIANTS])
def test_the_driver_is_asked_for_the_shared_memory_that_the_kernel_takes(codes, name, capability):
    # Triton asks for more than 48 KiB where its own share is more; beside a table of inline PTX that must not fall short.
    code = codes[name, capability]
    assert not code.table or code.shared > 48 * 1024 or code.shared + code.table <= 48 * 1024
    assert code.shared + code.table <= {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227}[capability] * 1024


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.budget])
def test_the_kernel_keeps_to_its_instructions(codes, name):
    variant = VARIANTS[name]
    assert spent(variant, codes[name, 90]) <= variant.budget


@pytest.mark.parametrize("name", ["fifteen loads", "select tree"])
def test_a_kernel_that_spends_more_is_found(codes, name):
    assert spent(UNFIT[name], codes[name, 90]) > UNFIT[name].budget


def test_the_shortest_way_passes_by_loops_and_slow_paths():
    lines = [
        "MOV R1, c[0x0][0x28]", "@P1 EXIT", ".L_x_0:", "IADD3 R1, R1, 1, RZ", "@P0 BRA `(.L_x_0)", "BRA.DIV UR4, `(.L_x_2)",
        "@!P2 BRA `(.L_x_1)", "CALL.REL.NOINC `($slow)", "LDL R2, [R1]", ".L_x_1:", "EXIT", ".L_x_2:", "SHFL R1, R2, R3, 0x1f",
        "BRA `(.L_x_1)",
    ]  # fmt: skip
    sass = "\n".join(line if line.startswith(".L") else f"/*{16 * place:04x}*/ {line} ;" for place, line in enumerate(lines))
    code = aot.Code(sass)
    assert [aot.opcode(line) for line in code.straight()] == ["MOV", "EXIT", "IADD3", "BRA", "BRA", "BRA", "EXIT"]
    assert code.loops() == [["IADD3 R1, R1, 1, RZ", "@P0 BRA `(.L_x_0)"]]
    assert code.spills and not aot.Code(sass.replace("LDL", "LDG")).spills


def test_a_kernel_that_spills_is_found(codes):
    assert codes["spilling", 90].spills


def test_a_kernel_that_does_not_compile_is_found(codes):
    with pytest.raises(RuntimeError, match="uncompilable for sm_90"):
        codes["uncompilable", 90].straight()


def test_a_kernel_without_an_entry_is_found():
    names = {"fifteen_loads", "select_tree", "spilling", "uncompilable"}
    assert launched(importlib.import_module("tests.kernels.unfit")) == names


def test_decoding_moves_whole_lines_and_waits_for_no_other_thread(codes):
    lines = codes["dequantize", 90].straight()
    stores = [line for line in lines if aot.opcode(line) == "STG"]
    assert len(stores) == 4 and all("STG.E.128" in line for line in stores)
    assert not aot.count(lines).keys() & {"BAR", "LDS", "STS"}


def test_encoding_moves_whole_lines_and_waits_for_no_other_thread(codes):
    lines = codes["quantize", 90].straight()
    assert sum("LDG.E.128" in line for line in lines) == 4
    assert not aot.count(lines).keys() & {"BAR", "LDS", "STS"}


def test_a_search_keeps_to_its_instructions(codes):
    # A table like NF4's: the way through, and its loop 17 times more. Falcon-7B's 6.9e9 weights, by 132 multiprocessors that
    # issue 128 instructions of one thread a clock at 1.7 GHz, would take a tenth of a second.
    code = codes["search", 90]
    by_cell = max(code.loops(), key=lambda body: aot.count(body)["SHFL"])
    assert 200 < (len(code.straight()) + (2 * len(SHARES) - 1) * len(by_cell)) / 32 <= 335
    assert not aot.count(by_cell).keys() & {"LDG", "LDS", "STS", "BAR"}


@pytest.mark.parametrize(("name", "loads"), [("adamw", 4), ("adamw, bfloat16", 0)])
def test_a_step_of_adamw_moves_whole_lines_and_waits_for_no_other_thread(codes, name, loads):
    lines = codes[name, 90].straight()
    assert sum("LDG.E.128" in line for line in lines) == loads
    # A thread's 8 elements, 4 at a time: 2 stores each of the parameter and both codes, and both absmax of each chunk.
    found = aot.count(lines)
    assert found["STG"] <= 10 and not found.keys() & {"BAR", "LDS", "STS"}
    assert not any(opcode in found for opcode in ("DADD", "DMUL", "DFMA", "DSETP", "F2F"))


@pytest.mark.parametrize("name", ["int8, many rows of any length", "int8, many rows", "int8, some hundred rows"])
def test_integers_are_multiplied_by_tensor_cores(codes, name):
    assert any(aot.opcode(line) == "IGMMA" for line in codes[name, 90].instructions()[0])

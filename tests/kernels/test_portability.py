"""Every kernel compiles for every generation of GPU, keeps to its registers, and spends no more instructions than it did.

The machine code is made here, without a GPU: see aot.py. Instructions are counted on sm_90 because an H200 is where they
are scarcest: at 4.2 TB/s and 2.5 bytes a weight each of its 132 multiprocessors has to decode 7 weights a clock, and issues
128 instructions of one thread in it, 18 for each weight.

A NEW KERNEL (whatever Triton compiles and whose first parameter is named ..._ptr; a helper takes its pointers last) needs an
entry in VARIANTS, or `test_every_kernel_has_an_entry` fails:

    "name of the variant": Variant(
        "module of qlite/kernels", "function",
        {"x_ptr": "*bf16", "rows": "i32", ...},       what it is given, beside its constants; pointers first
        {"BLOCK": 64, ...},                           constexpr parameters (and pointers that are None, integers that are 1)
        aligned=("x_ptr", ...),                       what is a multiple of 16 (PyTorch's allocations are)
        options={"num_warps": 8},                     as in its launch
        per_thread=32, budget=12.1,                   weights of a thread, and instructions a weight: measured + 10 %
        loop=False,                                   count the longest loop instead of the way through (per_thread: its share)
        capabilities=CAPABILITIES,                    where it is ever launched; a list shorter than all needs its reason
    )

Several variants of a kernel, for what a launch switches: the one that matters most first. It alone is compiled for every
capability, the others for the oldest and for sm_90: a build takes up to a second.
"""

import dataclasses
import importlib
import pathlib

import pytest

pytest.importorskip("triton", reason="Triton is not built for this platform")
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
    capabilities: tuple = CAPABILITIES

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
    usual = {"column_stride": 1, "BLOCK": 64, "TILE": 1024, "WHOLE": True, "WORDS": True, "SHUFFLE": True}
    return codec("_quantize_kernel", signature, usual | constants, unaligned, budget=budget, per_thread=per_thread)


SUM = {
    "absmax_ptr": "*fp32", "sums_ptr": "*fp64", "dynamic_ptr": "*fp32", "midpoints_ptr": "*fp32", "count": "i32",
    "share": "i32",
}  # fmt: skip
ABSMAX = {
    "absmax_ptr": "*fp32", "sums_ptr": "*fp64", "midpoints_ptr": "*fp32", "codes_ptr": "*u8", "scale_ptr": "*fp32",
    "offset_ptr": "*fp32", "count": "i32", "parts": "i32", "smallest": "fp32",
}  # fmt: skip
ROWS = {"FLAT_CODES": False, "FLAT_OUT": False}
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
    "decide": codec("_decision_kernel", {"levels_ptr": "*fp32", "table_ptr": "*i32"}, {}),
    "sum the absmax": codec("_absmax_sum_kernel", SUM, {"TILE": 1024}),
    "sum one absmax": codec("_absmax_sum_kernel", SUM, {"TILE": 1024, "count": 1, "share": 1}),
    "quantize the absmax": codec(
        "_absmax_quantize_kernel", ABSMAX, {"ABSMAX_BLOCK": 256, "GROUPS": 8, "PARTS": 1024}, per_thread=8, budget=96
    ),
    "quantize one absmax": codec(
        "_absmax_quantize_kernel", ABSMAX, {"ABSMAX_BLOCK": 256, "GROUPS": 8, "PARTS": 1024, "parts": 1}
    ),
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
        if value.__module__ == module.__name__ and value.__code__.co_varnames[0].endswith("_ptr"):
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
    return len(code.loops()[0] if variant.loop else code.straight()) / variant.per_thread


@pytest.mark.parametrize("path", sorted(KERNELS.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_every_kernel_has_an_entry(path):
    module = importlib.import_module(f"qlite.kernels.{path.stem}")
    assert launched(module) == {variant.kernel for variant in VARIANTS.values() if variant.module == path.stem}


@pytest.mark.parametrize(("name", "capability"), [pair for pair in wanted() if pair[0] in VARIANTS])
def test_the_kernel_compiles_and_spills_nothing(codes, name, capability):
    code = codes[name, capability]
    assert code.straight() and not code.spills, f"{code.registers} registers, {code.stack} bytes of stack"


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

"""The PTX of few_rows.py, and what lies between its products, run on the CPU by ptx_machine.py; and that machine itself.

The launches are the library's own. `Launcher`s stand in the kernels' places, and `tiles` says that this is no interpreter.
Results are held against float64: that kernels do not leave the tensors, and wait where they must, ptx_machine.py sees.
"""

import dataclasses

import pytest

pytest.importorskip("triton", reason="Triton is not built for this platform")
import torch

import qlite
from qlite.kernels import few_rows, few_tokens, one_token, sixteen_rows, small_batch, tiles
from qlite.kernels.tiles import Tile
from tests.kernels import ptx_machine, test_few_tokens, test_one_token
from tests.kernels.ptx_machine import Fault, Launcher, execute

KINDS = {torch.bfloat16: "bf16", torch.float16: "f16"}


def ran(body: str, *tensors: torch.Tensor, warps: int = 1) -> None:
    """Runs statements of each thread t; %i0, %i1, ...: the address of byte 16 t of each tensor, %a: of shared memory."""
    parameters = ", ".join(f".param .u64 p{i}" for i in range(len(tensors)))
    start = "".join(f"ld.param.u64 %i{i}, [p{i}]; mad.wide.u32 %i{i}, %t, 16, %i{i};\n" for i in range(len(tensors)))
    text = f"""
        .visible .entry small({parameters}) .reqntid {32 * warps}
        {{
        .reg .b32 %t, %a, %r<16>; .reg .b64 %i<8>; .reg .b16 %h<4>; .reg .f32 %f<16>; .reg .pred %p<4>;
        .shared .align 16 .b8 memory[{512 * warps + 16}];
        mov.u32 %t, %tid.x; mad.lo.u32 %a, %t, 16, memory;
        {start}{body}
        ret;
        }}"""
    execute(text, (1,), list(tensors), num_warps=warps)


def words(*rows) -> torch.Tensor:
    """Returns 32 threads' 16 bytes each, of int32: thread t's are (t, 4) of what the rows say of t."""
    return torch.tensor([[row(t) if callable(row) else row for row in rows] for t in range(32)]).to(torch.int32)


def results(body: str, *rows) -> torch.Tensor:
    """Returns %r4 to %r7 of statements that find four words in %r0 to %r3."""
    out = torch.zeros(32, 4, dtype=torch.int32)
    rows = words(*rows, *[0] * (4 - len(rows)))
    zero = "".join(f"mov.b32 %r{i}, 0;" for i in range(4, 8))
    ran(
        f"{zero}ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%i0]; {body} st.global.v4.b32 [%i1], {{%r4, %r5, %r6, %r7}};",
        rows,
        out,
    )
    return out


@pytest.mark.parametrize("dtype", KINDS)
def test_a_product_of_fragments_is_the_product_of_the_matrices(dtype):
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=random).to(dtype) for shape in ((16, 16), (16, 8)))
    c = torch.randn(16, 8, generator=random)
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4
    halves = torch.arange(2)
    place = 2 * t[:, None] + halves
    fragments_a = torch.stack([a[(g + i % 2 * 8)[:, None], place + i // 2 * 8] for i in range(4)], 1).view(torch.int32)
    fragments_b = torch.stack([b[place + 8 * i, g[:, None]] for i in range(2)], 1).view(torch.int32).reshape(32, 2)
    fragments_c = torch.cat([c[(g + 8 * i)[:, None], place] for i in range(2)], 1)
    out = torch.zeros(32, 4)
    ran(
        f"""ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%i0]; ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%i1];
        ld.global.v4.f32 {{%f0, %f1, %f2, %f3}}, [%i2];
        mma.sync.aligned.m16n8k16.row.col.f32.{KINDS[dtype]}.{KINDS[dtype]}.f32 {{%f4, %f5, %f6, %f7}}, {{%r0, %r1, %r2, %r3}},
            {{%r4, %r5}}, {{%f0, %f1, %f2, %f3}};
        st.global.v4.f32 [%i3], {{%f4, %f5, %f6, %f7}};""",
        fragments_a.reshape(32, 4), torch.cat((fragments_b, fragments_b), 1), fragments_c, out,
    )  # fmt: skip
    wanted = (a.double() @ b.double() + c).float()
    assert torch.equal(out, torch.cat([wanted[(g + 8 * i)[:, None], place] for i in range(2)], 1))


def test_integers():
    found = results(
        """dp4a.u32.u32 %r4, %r0, %r1, %r2; bfe.u32 %r5, %r0, 4, 8; bfe.s32 %r6, %r0, 4, 8; shl.b32 %r7, %r2, 40;""",
        0x01FE03F4, 0x00800001, lambda t: 100 + t,
    )  # fmt: skip
    assert torch.equal(found, words(lambda t: 0xFE * 0x80 + 0xF4 + 100 + t, 0x3F, 0x3F, 0))
    found = results(
        """bfe.s32 %r4, %r0, 0, 4; shr.s32 %r5, %r0, 40; div.s32 %r6, %r0, 2; mad.lo.u32 %r7, %r0, 0x80000001, 3;""", -7
    )
    assert torch.equal(found, words(-7, -1, -3, (-7 * 0x80000001 + 3 + 2**31) % 2**32 - 2**31))
    found = results("mul.hi.s32 %r4, %r0, 0x55555556; mul.hi.u32 %r5, %r0, 16; rem.s32 %r6, %r0, 3; sub.u32 %r7, %r0, 1;", -7)
    assert torch.equal(found, words(-3, 15, -1, -8))
    found = results(
        """prmt.b32 %r4, %r0, %r1, 0x5410U; prmt.b32 %r5, %r0, %r1, 0x0F8F; lop3.b32 %r6, %r0, %r1, %r2, 0xE8;
        selp.b32 %r7, 1, 2, %p0;""".replace("selp", "setp.lt.s32 %p0, %r1, %r0; selp"),
        0x11223344, -0x44332211, 0x0F0F0F0F,
    )  # fmt: skip
    a, b, c = 0x11223344, -0x44332211, 0x0F0F0F0F
    assert torch.equal(found, words(0xDDEF3344 - 2**32, 0x44FF00FF, (a & b) | (a & c) | (b & c), 1))


@pytest.mark.parametrize(("how", "taken"), [
    ("idx.b32 %r4, %r0, 5, 31", lambda t: 5), ("idx.b32 %r4, %r0, 5, 0x1807", lambda t: t // 8 * 8 + 5),
    ("bfly.b32 %r4, %r0, 2, 31", lambda t: t ^ 2), ("up.b32 %r4, %r0, 3, 0", lambda t: t - 3 if t >= 3 else t),
    ("down.b32 %r4, %r0, 3, 31", lambda t: t + 3 if t + 3 < 32 else t),
])  # fmt: skip
def test_shuffles_take_from_the_lane_that_the_manual_says(how, taken):
    assert torch.equal(results(f"shfl.sync.{how}, 0xffffffff;", lambda t: 100 + t)[:, 0], words(lambda t: 100 + taken(t))[:, 0])


@pytest.mark.parametrize("dtype", KINDS)
def test_numbers_are_rounded_as_pytorch_rounds_them(dtype):
    values = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    values[0] = torch.tensor([1 + 2**-9, 1 + 3 * 2**-9, -0.0, float("nan")])
    values[1] = torch.tensor([1 + 2**-12, 1 + 3 * 2**-12, float("inf"), 2.0**-20])
    out, kind = torch.zeros(32, 4, dtype=torch.int32), KINDS[dtype]
    ran(
        f"""ld.global.v4.f32 {{%f0, %f1, %f2, %f3}}, [%i0];
        cvt.rn.{kind}.f32 %h0, %f0; cvt.rn.{kind}.f32 %h1, %f1; mov.b32 %r0, {{%h0, %h1}}; cvt.rn.{kind}x2.f32 %r1, %f3, %f2;
        mov.b32 {{%h2, %h3}}, %r0; cvt.f32.{kind} %f2, %h2; cvt.f32.{kind} %f3, %h3;
        st.global.v4.b32 [%i1], {{%r0, %r1, %f2, %f3}};""",
        values, out,
    )  # fmt: skip
    wanted = values.to(dtype)
    torch.testing.assert_close(out[:, :2].contiguous().view(dtype), wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out[:, 2:].contiguous().view(torch.float32), wanted[:, :2].float())


def test_a_thread_whose_guard_is_false_does_nothing():
    found = results("setp.lt.u32 %p0, %t, 7; @%p0 mov.b32 %r4, 5; @!%p0 mov.b32 %r5, 6; @%p0 add.u64 %i1, %i1, 0;", 0)
    assert torch.equal(found, words(lambda t: 5 * (t < 7), lambda t: 6 * (t >= 7), 0, 0))
    # Not even where it would read outside of all memory.
    results("setp.lt.u32 %p0, %t, 7; mov.b64 %i2, 64; @!%p0 mov.b64 %i2, %i0; @!%p0 ld.global.b32 %r4, [%i2];", 0)
    with pytest.raises(Fault, match=r"outside every tensor"):
        results("setp.lt.u32 %p0, %t, 7; mov.b64 %i2, 64; @!%p0 mov.b64 %i2, %i0; ld.global.b32 %r4, [%i2];", 0)


def test_threads_that_part_meet_again():
    found = results(
        """setp.lt.u32 %p0, %t, 7; @%p0 bra low; mov.b32 %r4, 1; bra.uni both;
        low: mov.b32 %r4, 2;
        both: shfl.sync.bfly.b32 %r5, %r4, 16, 31, -1;
        { .reg .b32 %t; mov.b32 %t, 0;
        again: add.u32 %t, %t, 1; add.u32 %r6, %r6, %r0; setp.lt.u32 %p0, %t, %r0; @%p0 bra again; }
        bar.sync 0; mov.b32 %r7, %t;""",
        lambda t: t % 5 + 1,
    )  # fmt: skip
    assert torch.equal(found, words(lambda t: 1 + (t < 7), lambda t: 1 + (t ^ 16 < 7), lambda t: (t % 5 + 1) ** 2, lambda t: t))


FAULTS = {
    "beyond the end": ("ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%i0+16];", "outside every tensor"),
    "not aligned": ("ld.global.b32 %r0, [%i0+2];", "multiple of 4"),
    "a register without a value": ("add.u32 %r0, %r1, 1;", "%r1 has no value"),
    "shared memory without a value": ("ld.shared.b32 %r0, [%a];", "not written"),
    "beyond shared memory": ("st.shared.b32 [%a+1040], %t;", "outside shared memory"),
    "no barrier before a read": ("st.shared.b32 [%a], %t; xor.b32 %a, %a, 512; ld.shared.b32 %r0, [%a];", "without a barrier"),
    "no barrier before a write": (
        "st.shared.b32 [%a], %t; bar.sync 0; ld.shared.b32 %r0, [%a]; xor.b32 %a, %a, 512; st.shared.b32 [%a], %t;",
        "reads is overwritten",
    ),
    "two values at one place": ("st.shared.b32 [memory], %t;", "different values"),
    "a shuffle without some": (
        "setp.lt.u32 %p0, %t, 7; @%p0 bra out; shfl.sync.bfly.b32 %r0, %t, 1, 31, -1; out: mov.b32 %r0, 0;",
        "not all lanes",
    ),
    "a barrier without some": ("setp.lt.u32 %p0, %t, 32; @%p0 bra out; bar.sync 0; out: mov.b32 %r0, 0;", "not all threads"),
    "no end": ("again: bra.uni again;", "no end"),
    "a copy that nobody waited for": (
        "cp.async.cg.shared.global [%a], [%i0], 16; cp.async.commit_group; ld.shared.b32 %r0, [%a];",
        "not written",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_a_gpu_lets_pass_is_an_error_here(name, monkeypatch):
    body, error = FAULTS[name]
    monkeypatch.setattr(ptx_machine, "MOST_STEPS", 1000)
    with pytest.raises(Fault, match=error):
        ran(body, torch.zeros(64, 4), warps=2)


def test_copies_are_there_when_they_were_waited_for():
    values, out = torch.randn(32, 4), torch.zeros(32, 4)
    ran(
        """mov.b32 %r0, 8; cp.async.ca.shared.global [%a], [%i0], 16, %r0; cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.v4.b32 {%r0, %r1, %r2, %r3}, [%a]; st.global.v4.b32 [%i1], {%r0, %r1, %r2, %r3};""",
        values, out,
    )  # fmt: skip
    assert torch.equal(out[:, :2], values[:, :2]) and not out[:, 2:].any()


def test_what_is_not_done_is_named():
    with pytest.raises(NotImplementedError, match=r"wgmma\.fence"):
        ran("wgmma.fence.sync.aligned;")


# The kernel of few_rows.py.


@dataclasses.dataclass
class Case:
    """out, in_features of the weight, rows of x; the rest as Tile and quantize_nf4 take them."""

    out: int
    columns: int
    rows: int
    split: bool
    parts: int
    programs: int
    dtype: torch.dtype = torch.bfloat16
    double_quant: bool = True
    bias: bool = False
    block_size: int = 64
    early: bool = False
    warps: int = 4
    capability: int = 90
    tile_m: int = 4

    def tile(self) -> Tile:
        return Tile(
            "few rows", self.programs, self.warps, tile_m=self.tile_m, split=self.split, parts=self.parts, early=self.early
        )


def encoded(out: int, columns: int, case: Case, seed: int):
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))
    # Scales of very different size: one that is given to a wrong row or block shows.
    weight *= 4.0 ** torch.randint(-3, 3, (out, columns // 64, 1), generator=torch.Generator().manual_seed(seed)).expand(
        out, columns // 64, 64
    ).reshape(out, columns)
    return qlite.quantize_nf4(weight, block_size=case.block_size, double_quant=case.double_quant)


def activations(columns: int, case: Case, seed: int) -> torch.Tensor:
    return torch.randn(case.rows, columns, generator=torch.Generator().manual_seed(seed + 50)).to(case.dtype)


def parts_of(q):
    return q.codes, q.absmax, q.absmax_scale, q.absmax_offset, q.levels


def product(x, q):
    """Returns the product in float64 of the levels as the tensor core takes them, and how much its sums may be off."""
    weight = dataclasses.replace(q, levels=q.levels.to(x.dtype).float()).dequantize(torch.float32).double().T
    # Each of the additions, a scale's two roundings and its product's: one float32 rounding of at most the sum of all.
    return x.double() @ weight, (x.shape[1] + 4) * 2**-24 * (x.double().abs() @ weight.abs())


def on_the_machine(monkeypatch, module, kernels: dict, **given) -> None:
    """Puts kernels of a module on the machine; of each are given the parameters that an early launch has to wait for."""
    for name, late in kernels.items():
        monkeypatch.setattr(module, name, Launcher(getattr(module, name), late=late, **given))
    monkeypatch.setattr(tiles, "plain", lambda device: False)
    for tests in (test_few_tokens, test_one_token):  # where there is a GPU, their tensors are not for it
        monkeypatch.setattr(tests, "DEVICE", "cpu")


FEW_ROWS = {"_few_rows_kernel": ("x_ptr", "y_ptr"), "_sum_of_parts_kernel": ("parts_ptr", "y_ptr")}
PACK = {"_pack_kernel": ("x_ptr", "packed_ptr")}
SINGLE = {
    "steps shared by programs, groups of 64": Case(200, 704, 4, split=False, parts=4, programs=5),
    "steps shared by programs, groups of 16": Case(200, 1216, 3, split=True, parts=4, programs=11, early=True),
    "whole groups": Case(136, 320, 2, split=False, parts=1, programs=2, bias=True),
    "whole groups of 16": Case(40, 1088, 1, split=True, parts=1, programs=2, bias=True, dtype=torch.float16),
    "float16, absmax in float32": Case(72, 448, 4, split=False, parts=3, programs=3, dtype=torch.float16, double_quant=False),
    "absmax in float32": Case(72, 448, 4, split=True, parts=1, programs=3, double_quant=False, bias=True),
    "blocks of 256": Case(70, 512, 3, split=False, parts=5, programs=4, bias=True, block_size=256),
    "one block": Case(17, 64, 1, split=False, parts=4, programs=7, early=True),
    "capability 8.0": Case(72, 448, 3, split=True, parts=4, programs=7, capability=80),
    "eight warps": Case(72, 1344, 2, split=True, parts=4, programs=7, warps=8),
    "sixteen": Case(300, 704, 16, split=False, parts=5, programs=7, tile_m=16, early=True),
    "sixteen, one row too many for eight": Case(140, 448, 9, split=False, parts=4, programs=3, tile_m=16, bias=True),
    "sixteen, float16, absmax in float32": Case(
        256, 192, 16, split=False, parts=1, programs=2, tile_m=16, dtype=torch.float16, double_quant=False, bias=True
    ),
    "sixteen, blocks of 256": Case(70, 512, 5, split=False, parts=6, programs=3, tile_m=16, block_size=256),
    "sixteen, capability 8.0": Case(72, 448, 12, split=False, parts=4, programs=7, tile_m=16, capability=80),
    "sixteen, eight warps": Case(300, 320, 16, split=False, parts=4, programs=3, tile_m=16, warps=8, early=True),
    "sixteen, one block": Case(17, 64, 7, split=False, parts=4, programs=3, tile_m=16, early=True),
    "threads that have no entry of the table to fill": Case(300, 192, 4, split=False, parts=4, programs=3, warps=16),
}


@pytest.mark.parametrize("name", SINGLE)
def test_few_rows_times_a_weight(name, monkeypatch):
    case = SINGLE[name]
    q, x = encoded(case.out, case.columns, case, 0), activations(case.columns, case, 0)
    bias = torch.randn(case.out) if case.bias else None
    on_the_machine(monkeypatch, few_rows, FEW_ROWS, capability=case.capability)
    on_the_machine(monkeypatch, sixteen_rows, PACK, capability=case.capability)
    monkeypatch.setattr(tiles, "early", lambda device: case.early)
    y = few_rows.multiply(x, parts_of(q), bias, case.block_size, case.tile())
    wanted, off = product(x, q)
    wanted = wanted if bias is None else wanted + bias.to(case.dtype).double()
    roundoff = torch.finfo(case.dtype).eps / 2
    assert ((y.double() - wanted).abs() <= (1 + roundoff) * off + roundoff * wanted.abs()).all()


TWO = {
    "beside each other, groups of 64": Case(100, 384, 3, split=False, parts=4, programs=7, early=True),
    "beside each other, groups of 16": Case(40, 704, 4, split=True, parts=3, programs=5, dtype=torch.float16),
    "beside each other, absmax in float32": Case(72, 320, 2, split=False, parts=5, programs=4, double_quant=False),
    "beside each other, sixteen": Case(100, 320, 16, split=False, parts=5, programs=4, tile_m=16, early=True),
    "added, sixteen": Case(140, 384, 11, split=False, parts=8, programs=5, tile_m=16, early=True),
    "added, groups of 64": Case(100, 384, 4, split=False, parts=8, programs=9),
    "added, groups of 16": Case(40, 1088, 1, split=True, parts=4, programs=7, dtype=torch.float16, early=True),
    "added, absmax in float32": Case(72, 192, 3, split=True, parts=4, programs=7, double_quant=False),
}  # fmt: skip


@pytest.mark.parametrize("name", TWO)
def test_few_rows_times_two_weights(name, monkeypatch):
    case = TWO[name]
    stacked = name.startswith("beside")
    # The second is smaller or larger on the side that may differ.
    shapes = [(case.out, case.columns), (case.out + 57, case.columns) if stacked else (case.out, case.columns - 128)]
    qs = [encoded(*shape, case, seed) for seed, shape in enumerate(shapes)]
    xs = [activations(columns, case, seed) for seed, (_, columns) in enumerate(shapes)][: 1 if stacked else 2]
    weights = [parts_of(q) for q in qs]
    reachable, pack = [*weights[1], *xs], sixteen_rows.packed
    monkeypatch.setattr(sixteen_rows, "packed", lambda x: reachable.append(pack(x)) or reachable[-1])
    on_the_machine(monkeypatch, few_rows, FEW_ROWS, reachable=reachable)
    on_the_machine(monkeypatch, sixteen_rows, PACK)
    monkeypatch.setattr(tiles, "early", lambda device: case.early)
    parts = few_rows.multiply_two(xs, weights, case.block_size, case.tile())
    assert parts.shape[0] == case.parts and parts.dtype == torch.float32
    products = [product(x, q) for x, q in zip(2 * xs if stacked else xs, qs, strict=True)]
    wanted, off = (torch.cat(both, 1) if stacked else sum(both) for both in zip(*products, strict=True))
    assert ((parts.double().sum(0) - wanted).abs() <= off).all()


#: Of capability 8.0: on 9.0 Triton makes wgmma of them.
SMALL_BATCH = {
    "tiles shared by programs": (9, Tile("small batch", 5, 4, 64, 16, stages=3, width=4), torch.bfloat16),
    "one block a step": (20, Tile("small batch", 3, 4, 64, 16, stages=2, two=False, width=4), torch.float16),
    "scaled before the product": (
        20,
        Tile("small batch", 3, 4, 64, 32, stages=2, scaled=True, sort=True, width=4),
        torch.bfloat16,
    ),
}


@pytest.mark.parametrize("name", SMALL_BATCH)
def test_a_small_batch_times_a_weight(name, monkeypatch):
    rows, tile, dtype = SMALL_BATCH[name]
    case = Case(136, 448, rows, split=False, parts=1, programs=1, dtype=dtype)
    q, x, bias = encoded(case.out, case.columns, case, 0), activations(case.columns, case, 0), torch.randn(case.out)
    on_the_machine(monkeypatch, small_batch, {"_small_batch_kernel": (), "_sort_kernel": ()}, capability=80)
    y = small_batch.multiply(x, parts_of(q), bias, case.block_size, tile)
    wanted, off = product(x, q)
    wanted = wanted + bias.to(dtype).double()
    roundoff = torch.finfo(dtype).eps / 2
    if tile.scaled:  # a rounding of each weight, of the scaled one instead of the level
        off = off + 2 * roundoff * (x.double().abs() @ q.dequantize(torch.float32).double().abs().T)
    assert ((y.double() - wanted).abs() <= (1 + roundoff) * off + roundoff * wanted.abs()).all()


# What lies between the products: the tests of the interpreter, each on a few examples.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("early", [False, True])
def test_a_sum_and_its_norm(early, dtype, monkeypatch):
    on_the_machine(monkeypatch, one_token, {"_add_norm_kernel": ("x_ptr", "parts_ptr", "more_ptr", "sum_ptr", "y_ptr")})
    monkeypatch.setattr(tiles, "early", lambda device: early)
    test = test_one_token.test_a_sum_and_its_norm_are_those_of_float64.hypothesis.inner_test
    test(2, 1000, dtype, [10, 2], 3)


@pytest.mark.parametrize(("batch", "dtype", "group", "length"), [
    (2, torch.bfloat16, 17, 150), (2, torch.float32, 16, 70),
    # Keys in several turns: of 256, and for more rows of 64.
    (1, torch.bfloat16, 3, 700), (5, torch.bfloat16, 3, 150),
])  # fmt: skip
def test_attention_and_gelu(batch, dtype, group, length, monkeypatch):
    late = ("fused_ptr", "more_fused_ptr", "up_ptr", "more_up_ptr", "attended_ptr", "activated_ptr")  # not the cache
    on_the_machine(monkeypatch, one_token, {"_between_kernel": late})
    monkeypatch.setattr(tiles, "early", lambda device: True)
    test = test_one_token.test_attention_and_gelu_are_those_of_float64.hypothesis.inner_test
    test(batch, 1, group, 64, length, dtype, [4, 1], 3, True)


def test_the_norm_and_the_update_of_a_few_tokens(monkeypatch):
    on_the_machine(monkeypatch, few_tokens, dict.fromkeys(("_layer_norm_kernel", "_lora_down_kernel", "_lora_up_kernel"), ()))
    test_few_tokens.test_layer_norm_is_that_of_float64.hypothesis.inner_test(3, 100, torch.float16, 1.0, 0)
    test = test_few_tokens.test_an_update_is_that_of_float64.hypothesis.inner_test
    test(rows=3, columns=63, out=100, rank=3, dtype=torch.float16, x_dtype=torch.bfloat16, scaling=0.5)

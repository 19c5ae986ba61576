"""Fragments of PTX that the kernels of 4 bits inline: what Triton cannot say of them. NVIDIA, capability 8.0 on.

A byte holds the codes of two neighbouring weights. `table` puts the decoded pair of each of the 256 bytes in shared memory,
32 copies of it, one for each bank, so that 32 threads look up 32 bytes without waiting for each other; `pairs` and
`scaled_pairs` look up the four bytes of a word. One dp4a makes an address of a byte: byte * 128 + (table + place of the
thread's copy). Each look-up yields what a tensor core takes: two 16-bit weights in one register.

`product` and the sums work on Triton tensors of shape (8 * warps, 16), of which a thread holds four neighbours of a row:
threads 4 g to 4 g + 3 of a warp hold row g. That is the arrangement of the operands of mma.sync (PTX ISA, "Matrix fragments
for mma.m16n8k16"), and how Triton lays out a tensor that is read 16 bytes at a time. `product_of_sixteen` works on tensors of
(8 * warps, 8), of which a thread holds two neighbours of a row.

Not done here: anything that Triton's interpreter could run; those files have the same in plain Triton beside each.
"""

from __future__ import annotations

import functools

import torch

#: Bytes of the table of pairs, of the 256 levels of an 8-bit absmax behind it, and of a sum's exchange area behind those.
PAIRS, LEVELS = 256 * 128, 256 * 4


def _kind(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]


@functools.cache
def table(warps: int, dtype: torch.dtype, double_quant: bool, *, wide: bool = False, exchange: bool = False) -> str:
    """Fills the tables; $0: address of this thread's copy; $1: 16 levels, $2: 256 levels of an absmax, float32 in memory.

    Args:
        double_quant: whether there are levels of an absmax.
        wide: pairs of float32, 16 copies, instead of pairs of `dtype`, 32 copies.
        exchange: keep an area for sum_of_warps behind the tables.
    """
    threads = 32 * warps
    entries = range(max(1, 256 // threads))
    level = """
        mul.wide.u32 from, entry, 4;
        add.u64 from, from, $2;
        ld.global.b32 absmax{}, [from];"""
    # All loads first: their latency is then waited for once.
    load = "".join(
        f"""
        add.u32 entry, thread, {j * threads};{level.format(j) if double_quant else f" mov.b32 absmax{j}, 0;"}
        shr.u32 code, entry, 4;
        mul.wide.u32 from, code, 4;
        add.u64 from, from, $1;
        ld.global.f32 first{j}, [from];
        and.b32 code, entry, 15;
        mul.wide.u32 from, code, 4;
        add.u64 from, from, $1;
        ld.global.f32 second{j}, [from];"""
        for j in entries
    )
    store = "".join(_store_entry(j, j * threads, _kind(dtype), wide) for j in entries)
    values = ", ".join(f"first{j}, second{j}" for j in entries)
    words = ", ".join(f"absmax{j}" for j in entries)
    return f"""{{
        .reg .u32 thread, entry, code, base, to, turn, a, b, {words};
        .reg .u64 from;
        .reg .f32 {values};
        .reg .b16 low, high;
        .reg .pred idle;
        .shared .align 128 .b8 memory[{PAIRS + LEVELS + 512 * warps * exchange}];
        mov.u32 thread, %tid.x;
        mov.u32 base, memory;
        setp.ge.u32 idle, thread, 256;
        @idle bra filled;{load}{store}
        filled:
        bar.sync 0;
        and.b32 thread, thread, {15 if wide else 31};
        shl.b32 thread, thread, {3 if wide else 2};
        add.u32 $0, base, thread;
        }}"""


def _store_entry(j: int, first: int, kind: str, wide: bool) -> str:
    narrow = f"""
        cvt.rn.{kind}.f32 low, first{j};
        cvt.rn.{kind}.f32 high, second{j};
        mov.b32 a, {{low, high}};
        mov.b32 b, a;"""
    # Neighbouring threads begin at different 16 bytes of their rows: a row is 128 bytes, and all would meet in one bank.
    turns = "".join(
        """
        add.u32 code, to, turn;
        st.shared.v4.b32 [code], {a, b, a, b};
        add.u32 turn, turn, 16;
        and.b32 turn, turn, 127;"""
        for _ in range(8)
    )
    return f"""{f"mov.b32 a, first{j}; mov.b32 b, second{j};" if wide else narrow}
        add.u32 entry, thread, {first};
        shl.b32 to, entry, 2;
        add.u32 to, to, base;
        st.shared.b32 [to+{PAIRS}], absmax{j};
        shl.b32 to, entry, 7;
        add.u32 to, to, base;
        and.b32 turn, entry, 7;
        shl.b32 turn, turn, 4;{turns}"""


@functools.cache
def pairs() -> str:
    """$0 to $3: the pairs of bytes 0 to 3 of the word $4; $5: the table of this thread."""
    look = "".join(f"dp4a.u32.u32 a, $4, {0x80 << 8 * j}, $5; ld.shared.b32 ${j}, [a];\n" for j in range(4))
    return "{ .reg .u32 a;\n" + look + "}"


@functools.cache
def scaled_pairs(dtype: torch.dtype) -> str:
    """As `pairs`, from the wide table: each pair times the scale $6 in float32, then rounded to `dtype`."""
    look = "".join(
        f"""dp4a.u32.u32 a, $4, {0x80 << 8 * j}, $5;
        ld.shared.v2.f32 {{f, g}}, [a];
        mul.f32 f, f, $6;
        mul.f32 g, g, $6;
        cvt.rn.{_kind(dtype)}x2.f32 ${j}, g, f;
        """
        for j in range(4)
    )
    return "{ .reg .u32 a; .reg .f32 f, g;\n" + look + "}"


@functools.cache
def level_of_absmax() -> str:
    """$0: the level of the 8-bit absmax $1; $2: the table of levels."""
    return "{ .reg .u32 a; mad.lo.u32 a, $1, 4, $2; ld.shared.f32 $0, [a]; }"


@functools.cache
def product(dtype: torch.dtype) -> str:
    """Sixteen rows of weights by eight columns of x, over the 128 columns that four threads hold 32 each; scaled and added.

    $0 to $3: $52 to $55 plus the scaled product. $4 to $35: pairs of bytes 0, 1, 2, 3 of four words of row g, then of row
    g + 8. $36 to $51: x, 32 values. $56 and $60: the scale of row g, and of row g + 8. Byte b of word j meets x's pair 4 j + b.
    Two sums of four products each: the tensor core's latency is long.
    """
    lines = []
    for word in range(4):
        for half in range(2):
            a = [f"${first + 8 * half + 4 * step + word}" for step in range(2) for first in (4, 20)]
            b = [f"${36 + 4 * word + 2 * half + i}" for i in range(2)]
            out = "{h0, h1, h2, h3}" if half else "{$0, $1, $2, $3}"
            old = "{zero, zero, zero, zero}" if word == 0 else out
            kind = _kind(dtype)
            shape = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
            lines.append(f"{shape} {out}, {{{', '.join(a)}}}, {{{', '.join(b)}}}, {old};")
    lines += [f"add.f32 ${i}, ${i}, h{i}; fma.rn.f32 ${i}, ${i}, ${56 if i < 2 else 60}, ${52 + i};" for i in range(4)]
    return "{ .reg .f32 zero, h0, h1, h2, h3; mov.f32 zero, 0f00000000;\n" + "\n".join(lines) + "\n}"


@functools.cache
def product_of_sixteen(dtype: torch.dtype) -> str:
    """Sixteen rows of weights by sixteen of x, over the 64 columns of a block, which four threads hold 16 each; scaled, added.

    $0 to $7: the sums $32 to $39 plus the scaled product: rows g by two of x's rows 0 to 7, g + 8 by those, then the same for
    its rows 8 to 15. $8 to $15: pairs of bytes 0, 0, 1, 1, 2, 2, 3, 3 of the two words of row g, $16 to $23: of row g + 8. $24
    to $31: x, four columns each: of its row g the columns of the first word, then of the second; then of its row g + 8. $40
    and $42: the scale of row g, and of row g + 8.
    """
    kind = _kind(dtype)
    shape = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    lines = []
    for word in range(2):
        for half in range(2):
            a = [f"${first + 2 * (2 * half + step) + word}" for step in range(2) for first in (8, 16)]
            for eight in range(2):
                out = "{" + ", ".join(f"${4 * eight + i}" for i in range(4)) + "}"
                old = out if word or half else "{zero, zero, zero, zero}"
                lines.append(f"mov.b64 {{low, high}}, ${24 + 4 * eight + 2 * word + half};")
                lines.append(f"{shape} {out}, {{{', '.join(a)}}}, {{low, high}}, {old};")
    lines += [f"fma.rn.f32 ${i}, ${i}, ${40 if i % 4 < 2 else 42}, ${32 + i};" for i in range(8)]
    return "{ .reg .f32 zero; .reg .b32 low, high; mov.f32 zero, 0f00000000;\n" + "\n".join(lines) + "\n}"


@functools.cache
def raw_scales(double_quant: bool) -> str:
    """Reads what this thread's two scales are made of: $0, $1 absmax, $2, $3 their groups' scales (as bits).

    $4 and $5: index of the absmax; $6: absmax; $7: scales of the groups (double_quant).
    """
    if not double_quant:
        read = "mul.wide.u32 p, ${0}, 4; add.u64 p, p, $6; ld.global.nc.b32 ${1}, [p];\n"
        return "{ .reg .u64 p;\n" + read.format(4, 0) + read.format(5, 1) + "mov.b32 $2, 0; mov.b32 $3, 0; }"
    code = "cvt.u64.u32 p, ${0}; add.u64 p, p, $6; ld.global.nc.u8 h, [p]; cvt.u32.u16 ${1}, h;\n"
    group = "shr.u32 i, ${0}, 8; mul.wide.u32 p, i, 4; add.u64 p, p, $7; ld.global.nc.b32 ${1}, [p];\n"
    parts = code.format(4, 0) + code.format(5, 1) + group.format(4, 2) + group.format(5, 3)
    return "{ .reg .u64 p; .reg .u32 i; .reg .u16 h;\n" + parts + "}"


def _own_scales(double_quant: bool, absmax: int) -> str:
    """low, high: this thread's two scales of what raw_scales gave, from operand `absmax` on; then levels, and offset."""
    if not double_quant:
        return f"mov.b32 low, ${absmax}; mov.b32 high, ${absmax + 1};\n"
    row = "mad.lo.u32 a, ${0}, 4, ${2}; ld.shared.f32 f, [a]; mov.b32 g, ${1}; fma.rn.f32 {4}, f, g, ${3};\n"
    return "".join(row.format(absmax + i, absmax + 2 + i, absmax + 4, absmax + 5, ("low", "high")[i]) for i in range(2))


@functools.cache
def scales(double_quant: bool) -> str:
    """$0, $1: the scales of rows g and g + 8 in a step's first chunk, $2, $3: in its second.

    Thread 4 g + j has read block j of four for rows g and g + 8 ($4 to $7, of raw_scales; $8: table of levels, $9: offset). Of
    the product it holds columns of the first block of a chunk where j < 2, else of the second: the scale of another thread.
    """
    source = "mov.u32 a, %laneid; and.b32 s, a, 28; bfe.u32 a, a, 1, 1; or.b32 s, s, a; or.b32 a, s, 2;\n"
    get = "shfl.sync.idx.b32 ${}, {}, {}, 31, 0xffffffff;\n"
    got = "".join(get.format(i, ("low", "high")[i % 2], "ssaa"[i]) for i in range(4))
    return "{ .reg .u32 a, s; .reg .f32 f, g, low, high;\n" + _own_scales(double_quant, 4) + source + got + "}"


@functools.cache
def scales_of_sixteens(double_quant: bool) -> str:
    """$0 to $3: the scales of rows g and g + 8 in a step's first block and in its second, $4 to $7: of the next sixteen rows.

    Thread 4 g + j has read block j % 2 for row g, or g + 8 where j is 2 or 3, and for the row 16 behind it ($8 to $11, of
    raw_scales; $12: table of levels, $13: offset).
    """
    source = "mov.u32 a, %laneid; and.b32 s, a, 28;\n"
    get = "or.b32 a, s, {}; shfl.sync.idx.b32 ${}, {}, a, 31, 0xffffffff;\n"
    got = "".join(get.format((0, 2, 1, 3)[i % 4], i, ("low", "high")[i // 4]) for i in range(8))
    return "{ .reg .u32 a, s; .reg .f32 f, g, low, high;\n" + _own_scales(double_quant, 8) + source + got + "}"


#: $0 to $3: $4 to $7 summed over threads t and t + 2, which hold the two halves of a chunk.
SUM_OF_HALVES = "{ .reg .f32 p;\n" + "".join(
    f"shfl.sync.bfly.b32 p, ${4 + i}, 2, 31, 0xffffffff; add.f32 ${i}, ${4 + i}, p;\n" for i in range(4)
) + "}"  # fmt: skip
#: A barrier of the warp, for no load to be moved across; $0: zero.
FENCE = "bar.warp.sync 0xffffffff; mov.u32 $0, 0;"


@functools.cache
def sum_of_warps(warps: int) -> str:
    """$0 to $3: $4 to $7 summed over the warps, in their order, and over threads t and t + 2; $8: the exchange area.

    Every thread of the program must come here, and no other tensor of the program may be in shared memory at $8.
    """
    lines = [
        "{ .reg .u32 t, a; .reg .f32 p, q, r, s;",
        "mov.u32 t, %tid.x; shl.b32 a, t, 4; add.u32 a, a, $8;",
        "st.shared.v4.f32 [a], {$4, $5, $6, $7}; bar.sync 0;",
        "and.b32 t, t, 31; shl.b32 a, t, 4; add.u32 a, a, $8; ld.shared.v4.f32 {$0, $1, $2, $3}, [a];",
    ]
    for warp in range(1, warps):
        lines.append(f"ld.shared.v4.f32 {{p, q, r, s}}, [a+{512 * warp}];")
        lines += [f"add.f32 ${i}, ${i}, {value};" for i, value in enumerate("pqrs")]
    lines += [f"shfl.sync.bfly.b32 p, ${i}, 2, 31, 0xffffffff; add.f32 ${i}, ${i}, p;" for i in range(4)]
    # The next sum may not overwrite what a slower warp has still to read.
    return "\n".join([*lines, "bar.sync 0; }"])

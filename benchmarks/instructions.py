"""What an instruction costs a multiprocessor: lanes a clock of those that a decode of 4-bit weights can be made of.

    python -m benchmarks.instructions
    python -m benchmarks.instructions --count 90    # needs no GPU: the instructions of each loop, compiled for sm_90

One program of 16 warps on each multiprocessor runs a loop of one instruction in inline PTX: 8 chains, each depending on
itself alone, 8 links a turn. Rate = (those instructions, counted in the machine code of the loop) x threads x turns / the
clocks from the first warp's start to the last one's end (%clock64, which is a multiprocessor's own). Operands are random
and come from memory, so that the assembler can fold nothing. Shown is the median over the multiprocessors.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import pathlib
import re
import statistics
import subprocess
import tempfile

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.common import FAILURES, need_gpu, record, table, told

CHAINS, LINKS, THREADS, TURNS = 8, 8, 512, 400


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A loop to time.

    Attributes:
        name, expected: what is timed, and the lanes a clock that were predicted before the first run.
        counted: the machine's opcodes that count, the first part of their names.
        links: PTX of a link of a chain, one for each kind of chain, taken in turn; {a} is the chain, {t} and {u} are
            temporaries, {n} the next chain, %b and %c random words, %high the upper half of the address of the table.
        words: length of a table in shared memory, if `shared`, or global memory; a chain goes from place to place in it,
            its link an address (in global memory the lower half of one: no arithmetic between two loads).
        floating: chains are float32.
    """

    name: str
    expected: float
    counted: tuple[str, ...]
    links: tuple[str, ...]
    words: int = 0
    shared: bool = False
    floating: bool = False


PRMT, IMAD = "prmt.b32 {a}, {a}, %b, %c;", "mad.lo.u32 {a}, {a}, %b, %c;"
LOP3, SHFL = "lop3.b32 {a}, {a}, %b, {n}, 0xE8;", "shfl.sync.idx.b32 {a}, {a}, %b, 31, 0xffffffff;"
LDS = "ld.shared.b32 {a}, [{a}];"
INSTRUCTIONS = (
    Instruction("PRMT", 64, ("PRMT",), (PRMT,)),
    Instruction("LOP3", 64, ("LOP3",), (LOP3,)),
    Instruction("SHF", 64, ("SHF",), ("shf.l.wrap.b32 {a}, {a}, %b, %c;",)),
    Instruction("IADD3", 64, ("IADD3",), ("add.u32 {t}, {a}, %b; add.u32 {a}, {t}, {n};",)),
    Instruction("IMAD", 64, ("IMAD",), (IMAD,)),
    Instruction("dp4a (IDP.4A)", 64, ("IDP",), ("dp4a.u32.u32 {a}, {a}, %b, %c;",)),
    Instruction("FFMA", 128, ("FFMA",), ("fma.rn.f32 {a}, {a}, %bf, %cf;",), floating=True),
    Instruction("HFMA2 bf16x2", 128, ("HFMA2",), ("fma.rn.bf16x2 {a}, {a}, %b, %c;",)),
    Instruction("SHFL.idx", 32, ("SHFL",), (SHFL,)),
    Instruction("LDS.32, no conflict", 32, ("LDS",), (LDS,), words=32, shared=True),
    Instruction(
        "LDS.64, no conflict", 16, ("LDS",),
        ("ld.shared.v2.b32 {{{a}, {t}}}, [{a}]; xor.b32 %extra, %extra, {t};",), words=64, shared=True,
    ),
    Instruction("LDS.32, 256 words at random", 9.4, ("LDS",), (LDS,), words=256, shared=True),
    Instruction(
        "LDG, 16 words at random", 32, ("LDG",), ("mov.b64 {u}, {{{a}, %high}}; ld.global.b32 {a}, [{u}];",), words=16
    ),
    Instruction("PRMT + LOP3", 64, ("PRMT", "LOP3"), (PRMT, "lop3.b32 {a}, {a}, %b, %c, 0x2D;")),
    Instruction("PRMT + IMAD", 128, ("PRMT", "IMAD"), (PRMT, IMAD)),
    Instruction("PRMT + SHFL", 64, ("PRMT", "SHFL"), (PRMT, SHFL)),
    Instruction("3 PRMT + 1 SHFL", 85, ("PRMT", "SHFL"), (PRMT, PRMT, PRMT, SHFL)),
)  # fmt: skip
#: Copies the table of byte offsets into shared memory, as addresses.
FILL = """
.shared .align 128 .b8 %words[{bytes}];
mov.u32 %base, %words; mov.u32 %i, %tid.x;
setp.ge.u32 %p, %i, {words}; @%p bra filled;
mul.wide.u32 %addr, %i, 4; add.u64 %addr, %addr, %table; ld.global.b32 %v, [%addr];
mad.lo.u32 %i, %i, 4, %base; add.u32 %v, %v, %base; st.shared.b32 [%i], %v;
filled:
"""


def assembly(of: Instruction) -> str:
    """Returns the PTX of the whole measurement of one thread: ($0 result, $1 start, $2 end) of ($3 table, $4 seed, ...)."""
    kind = "f32" if of.floating else "b32"
    lines = [f".reg .{kind} %a<{CHAINS}>; .reg .b32 %t<{CHAINS}>; .reg .b64 %u<{CHAINS}>;"]
    lines += [".reg .b32 %b, %c, %i, %v, %base, %extra; .reg .f32 %bf, %cf; .reg .b64 %addr, %table; .reg .pred %p;"]
    lines += [".reg .b32 %low, %high; mov.b64 %table, $3; mov.b64 {%low, %high}, %table;"]
    lines += ["mov.b32 %b, $5; mov.b32 %c, $6; mov.b32 %base, 0; mov.b32 %extra, 0;"]
    lines += ["cvt.rn.f32.u32 %bf, %b; cvt.rn.f32.u32 %cf, %c;"]
    if of.shared:
        lines.append(FILL.format(words=of.words, bytes=4 * of.words))
    for chain in range(CHAINS):
        # Of a chain through a table the seed is a place in it; elsewhere any word will do, but a different one.
        if of.words:
            lines.append(f"add.u32 %a{chain}, $4, %base;")
        elif of.floating:
            lines.append(f"add.u32 %v, $4, {chain}; cvt.rn.f32.u32 %a{chain}, %v;")
        else:
            lines.append(f"mad.lo.u32 %a{chain}, $4, {2 * chain + 3}, %b;")
    lines += ["mov.b32 %i, 0; bar.sync 0; mov.u64 $1, %clock64;", "turn:"]
    for _ in range(LINKS):
        for chain in range(CHAINS):
            names = {"a": f"%a{chain}", "n": f"%a{(chain + 1) % CHAINS}", "t": f"%t{chain}", "u": f"%u{chain}"}
            lines.append(of.links[chain % len(of.links)].format(**names))
    lines += ["add.u32 %i, %i, 1; setp.lt.u32 %p, %i, $7; @%p bra turn;", "mov.u64 $2, %clock64; mov.b32 $0, %extra;"]
    lines += [f"mov.b32 %v, %a{chain}; xor.b32 $0, $0, %v;" for chain in range(CHAINS)]
    # In PTX inside Triton "%" would start a name of its own; "$" an operand.
    body = re.sub(r"%(?!tid|clock)(\w+)", r"qlite_\1", "\n".join(lines))
    return "{\n" + body + "\n}"


@triton.jit
def _run(seed_ptr, table_ptr, out_ptr, start_ptr, end_ptr, turns, ASSEMBLY: tl.constexpr, THREADS: tl.constexpr):
    thread = tl.arange(0, THREADS)
    seed = tl.load(seed_ptr + thread)
    b, c = tl.load(seed_ptr + THREADS + thread), tl.load(seed_ptr + 2 * THREADS + thread)
    table = table_ptr.to(tl.int64) + seed.to(tl.int64) * 0
    value, start, end = tl.inline_asm_elementwise(
        ASSEMBLY, "=&r,=&l,=&l,l,r,r,r,r", [table, seed, b, c, turns + seed * 0],
        dtype=(tl.int32, tl.int64, tl.int64), is_pure=False, pack=1,
    )  # fmt: skip
    place = tl.program_id(0) * THREADS + thread
    tl.store(out_ptr + place, value)
    tl.store(start_ptr + place, start)
    tl.store(end_ptr + place, end)


def loop_opcodes(cubin: bytes) -> collections.Counter:
    """Returns how often each opcode, without what follows a dot, is in the longest loop of a compiled kernel."""
    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout
    opcodes, labels, loops = [], {}, [[]]
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        if code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", line):
            opcodes.append(code[1])
            target = re.search(r"BRA.*?(\.L_x_\d+)", line)
            if target and labels.get(target[1], len(opcodes)) < len(opcodes) - 1:
                loops.append(opcodes[labels[target[1]] :])
    return collections.Counter(max(loops, key=len))


def compiled_for(capability: int, of: Instruction) -> collections.Counter:
    """Returns the opcodes of the loop of an instruction, compiled for sm_<capability> without a GPU."""
    names = _run.arg_names
    types = ["*i32", "*i32", "*i32", "*i64", "*i64", "i32", "constexpr", "constexpr"]
    constants = {(names.index("ASSEMBLY"),): assembly(of), (names.index("THREADS"),): THREADS}
    source = ASTSource(fn=_run, signature=dict(zip(names, types, strict=True)), constexprs=constants)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": THREADS // 32})
    return loop_opcodes(kernel.asm["cubin"])


def places(of: Instruction, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (table, starts) in bytes from the table's begin: where a chain goes from each word, and where threads start.

    Where no conflict is wanted, each lane of a warp stays at a place of its own; elsewhere one cycle goes through all.
    """
    if of.words in (32, 64):
        width = of.words // 32
        return torch.arange(of.words) // width * 4 * width, torch.arange(THREADS) % 32 * 4 * width
    order = torch.randperm(of.words, generator=generator)
    following = torch.empty(of.words, dtype=torch.int64)
    following[order] = order.roll(-1)
    return following * 4, torch.randint(of.words, (THREADS,), generator=generator) * 4


def measure(of: Instruction) -> dict[str, float]:
    """Returns the rate of an instruction in lanes a clock and multiprocessor, and the clock seen meanwhile in MHz."""
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(1, 2**31 - 1, (3, THREADS), generator=generator, dtype=torch.int32).cuda()
    words = torch.zeros(max(of.words, 1), dtype=torch.int32, device="cuda")
    if of.words:
        table, starts = places(of, generator)
        begin_of_table = 0 if of.shared else words.data_ptr() % 2**32
        words.copy_((table + begin_of_table).to(torch.int32))
        seeds[0] = (starts + begin_of_table).to(torch.int32)
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty(programs * THREADS, dtype=torch.int32, device="cuda")
    clocks = torch.empty(2, programs, THREADS, dtype=torch.int64, device="cuda")
    arguments = (seeds, words, out, clocks[0], clocks[1], TURNS)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        begin.record()
        kernel = _run[(programs,)](*arguments, ASSEMBLY=assembly(of), THREADS=THREADS, num_warps=THREADS // 32)
        end.record()
    torch.cuda.synchronize()
    opcodes = loop_opcodes(kernel.asm["cubin"])
    links = sum(opcodes[name] for name in of.counted)
    if links == 0 or links % (CHAINS * LINKS) or TURNS % (links // (CHAINS * LINKS)):  # unrolled, or something was folded
        raise RuntimeError(f"the loop was compiled to {dict(opcodes)}; wanted {CHAINS * LINKS} of {of.counted}")
    spans = (clocks[1].amax(dim=1) - clocks[0].amin(dim=1)).tolist()
    rate = CHAINS * LINKS * THREADS * TURNS / statistics.median(spans)
    return {
        "lanes_per_clock": round(rate, 1),
        "expected": of.expected,
        "in_loop": links,
        "others_in_loop": sum(opcodes.values()) - links,
        "sm_mhz": round(statistics.median(spans) / (begin.elapsed_time(end) * 1e3)),
    }


def run(commit: str | None = None, benchmark: str = "instructions") -> None:
    """Measures and records all, and prints a table."""
    rows = []
    for of in INSTRUCTIONS:
        try:
            found = measure(of)
        except FAILURES as error:
            print(f"{of.name}: {told(error)}", flush=True)
            continue
        record(benchmark, {"experiment": "E0", "instruction": of.name, **found}, commit=commit, show=False)
        rows.append((of.name, *found.values()))
    header = ("E0", "lanes/clk/SM", "predicted", "in loop", "others in loop", "MHz")
    print(table(header, rows), flush=True)


def main() -> None:
    """Measures, or counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, metavar="SM", help="compile for this architecture and show the opcodes")
    parser.add_argument("--commit", help="what to call the tree where it is no git checkout")
    options = parser.parse_args()
    if options.count:
        for of in INSTRUCTIONS:
            print(of.name, dict(compiled_for(options.count, of).most_common()), flush=True)
        return
    need_gpu("instructions")
    run(options.commit)


if __name__ == "__main__":
    main()

"""Compiles Triton kernels for GPUs that are not there, and counts their machine code.

A `Build` names a kernel, the types of its arguments and a capability. `compiled` gives its machine code (SASS), registers,
stack and shared memory. It works in a process of its own: where there is no GPU the tests run in Triton's interpreter, and
what `triton.jit` makes there cannot be compiled.

    (code,) = compiled([Build("qlite.kernels.nf4_codec", "_decision_kernel", 90, {"levels_ptr": "*fp32", ...}, {})])
    code.straight()      the instructions of the shortest way through: no loop, of two branches the cheaper
    code.loops()         the instructions of each loop, longest first
    code.spills          whether registers spill to memory
    count(instructions)  how many of each opcode, without its suffixes

`ptx` gives a build's PTX, for ptx_machine.py to run.

`python -m tests.kernels.aot` reads a list of builds from standard input, as JSON, and writes the codes.
"""

from __future__ import annotations

import atexit
import collections
import dataclasses
import functools
import heapq
import importlib
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[2]
CAPABILITIES = (75, 80, 86, 89, 90, 100)


@dataclasses.dataclass(frozen=True)
class Build:
    """One kernel, as a launch would specialise it.

    Attributes:
        module, kernel: where it is, and its name there.
        capability: 90 for an H100 or H200.
        signature: parameter -> "*bf16" (a pointer), "i32", "fp32".
        constants: parameter -> value: the constexpr ones, those that are None, integers that are 1 (a launch makes them
            constants too), and any that the builds are to differ in.
        aligned: the pointers whose address, and the integers whose value, is a multiple of 16.
        options: of the launch: num_warps, num_stages, enable_fp_fusion.
    """

    module: str
    kernel: str
    capability: int
    signature: dict[str, str]
    constants: dict[str, int | float | bool | str | None]
    aligned: tuple[str, ...] = ()
    options: dict[str, int | bool] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Code:
    """The machine code of a build.

    Attributes:
        sass: as nvdisasm writes it. registers: of a thread.
        stack: bytes of stack of a thread. shared: of a program's shared memory that Triton asks for at the launch.
        table: of shared memory that inline PTX declares.
        error: the compiler's words where it does not compile; raised as soon as its instructions are asked for.
    """

    sass: str = ""
    registers: int = 0
    stack: int = 0
    shared: int = 0
    table: int = 0
    error: str = ""

    @property
    def spills(self) -> bool:
        """Whether registers are kept in memory (which also shows as a stack) for want of room."""
        return any(opcode(line) in ("LDL", "STL") for line in self.instructions()[0]) or self.stack > 0

    def instructions(self) -> tuple[list[str], dict[str, int]]:
        """Returns the instructions in order and, of each label, the place of the one that follows it."""
        if self.error:
            raise RuntimeError(self.error)
        lines, labels = [], {}
        for line in self.sass.splitlines():
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = len(lines)
            elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                lines.append(instruction[1])
        return lines, labels

    def straight(self) -> list[str]:
        """Returns the instructions of the shortest way from the start to the end.

        Loops are passed by, slow paths not taken, calls not followed; an exit of some threads is not taken either, unless
        there is no other: a loop around the whole program ends so.
        """
        lines, labels = self.instructions()
        exits = [place for place, line in enumerate(lines) if opcode(line) == "EXIT"]
        ends = [place for place in exits if not lines[place].startswith("@")] or exits[-1:]
        came_from, queue = {}, [(1, 0, -1)]
        while queue:
            length, here, before = heapq.heappop(queue)
            if here in came_from or here >= len(lines):
                continue
            came_from[here] = before
            always = not lines[here].startswith("@")
            if here in ends:
                path = [here]
                while came_from[path[-1]] >= 0:
                    path.append(came_from[path[-1]])
                return [lines[place] for place in reversed(path)]
            # To a label of the program itself also CALL is a branch: nothing returns from there.
            target = re.search(r"(?:BRA|CALL).*`\((\.L_x_\d+)\)", lines[here])
            if target:
                heapq.heappush(queue, (length + 1, labels[target[1]], here))
            if (
                not target
                or not always
                or re.search(r"\bBRA\S* !?U?P\d", lines[here])
                or re.search(r"BRA\.(DIV|CONV)", lines[here])
            ):
                heapq.heappush(queue, (length + 1, here + 1, here))
        raise ValueError("no way to the end")

    def loops(self, nested: bool = False) -> list[list[str]]:
        """Returns the instructions from the target of each backward branch to the branch, the longest first.

        Of loops in loops the innermost, unless `nested`. Slow paths stand after the end of the program and branch back into it:
        what has an end in it is no loop.
        """
        lines, labels = self.instructions()
        found = []
        for place, line in enumerate(lines):
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            body = range(labels[target[1]], place + 1) if target else range(0)
            if body and "EXIT" not in (lines[at] for at in body):
                found.append(body)
        inner = [body for body in found if nested or not any(other != body and set(other) < set(body) for other in found)]
        return [[lines[at] for at in body] for body in sorted(inner, key=len, reverse=True)]


def opcode(line: str) -> str:
    """Returns LDG of `@!P0 LDG.E.128 R4, desc[UR4][R2.64]`."""
    return re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")[0]


def count(lines: list[str]) -> collections.Counter[str]:
    """Returns how often each opcode occurs."""
    return collections.Counter(map(opcode, lines))


def _environment() -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return environment


def compiled(builds: list[Build]) -> list[Code]:
    """Returns the code of each build, in order."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot"],
        input=json.dumps([dataclasses.asdict(build) for build in builds]),
        capture_output=True, text=True, cwd=ROOT, env=_environment(),
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(run.stderr)
    return [Code(**code) for code in json.loads(run.stdout)]


@functools.lru_cache(1)
def _compiler() -> subprocess.Popen[str]:
    # One that stays: to import PyTorch and Triton takes longer than to compile.
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.kernels.aot", "ptx"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=_environment(),
    )  # fmt: skip
    atexit.register(process.communicate)
    return process


def ptx(build: Build) -> tuple[str, int]:
    """Returns a build's PTX and the bytes of shared memory that Triton asks for at the launch."""
    compiler = _compiler()
    assert compiler.stdin and compiler.stdout
    print(json.dumps(dataclasses.asdict(build)), file=compiler.stdin, flush=True)
    found = json.loads(compiler.stdout.readline())
    if "error" in found:
        raise RuntimeError(found["error"])
    return found["ptx"], found["shared"]


def _built(build: Build):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(build.module), build.kernel)
    names = kernel.arg_names
    kernel_source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in build.constants else build.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in build.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in build.aligned},
    )
    return triton.compile(kernel_source, target=GPUTarget("cuda", build.capability, 32), options=build.options)


def _compile(build: Build) -> Code:
    import triton.backends.nvidia

    try:
        result = _built(build)
    except Exception as error:
        return Code(error=f"{build.kernel} for sm_{build.capability}, {build.constants}: {error}")
    tools = pathlib.Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        sass, usage = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    used = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "SHARED")}
    table = max(0, used["SHARED"] - (1024 if build.capability >= 90 else 0))  # what the driver keeps for itself
    return Code(sass, used["REG"], used["STACK"], result.metadata.shared, table)


def _read(build: dict) -> Build:
    return Build(**{**build, "aligned": tuple(build["aligned"])})


def main() -> None:
    """Compiles the builds of standard input, as many at a time as there are cores; or one a line, as they come, to PTX."""
    if sys.argv[1:] == ["ptx"]:
        for line in sys.stdin:
            try:
                result = _built(_read(json.loads(line)))
                answer = {"ptx": result.asm["ptx"], "shared": result.metadata.shared}
            except Exception as error:
                answer = {"error": str(error)}
            print(json.dumps(answer), flush=True)
        return
    builds = [_read(build) for build in json.load(sys.stdin)]
    with multiprocessing.Pool(min(len(builds), os.cpu_count() or 1)) as pool:
        codes = pool.map(_compile, builds, chunksize=1)
    json.dump([dataclasses.asdict(code) for code in codes], sys.stdout)


if __name__ == "__main__":
    main()

"""Runs the PTX of a compiled Triton kernel on the CPU, in numpy: kernels with inline PTX, as they are, without a GPU.

    run(kernel, grid, arguments, constants, num_warps=4)     compile for capability 9.0 (aot.py) and run

`arguments` are what a launch is given by position (CPU tensors, numbers, None), `constants` the constexpr parameters by name;
what a kernel writes is then in the tensors. To run a launch of the library itself, put `Launcher(kernel)` in the kernel's
place: `monkeypatch.setattr(few_rows, "_few_rows_kernel", Launcher(few_rows._few_rows_kernel))`. `execute` runs PTX text.

Programs run one after the other, the threads of a program in step: a register is an array with an element for each thread
(ptx_instructions.py). Threads that part at a branch take turns, those that are behind first, until they meet again.

It is strict where a GPU is not. Errors, with the instruction:

    an address outside the tensors of the launch, or that is no multiple of the bytes that are read or written there
    registers and shared memory that are read before they are written; copies (cp.async) before they are waited for
    two warps at one place in shared memory, one of them writing, without a barrier between
    two threads that store different values to one place; a shuffle, product or barrier that not all threads come to
    a program without an end; parameters that are `late` and touched before `griddepcontrol.wait`
    an instruction that is not in ptx_instructions.py

Not done: atomics but additions, wgmma, mbarriers and tensor maps; barriers of some warps; two programs at one place in memory;
races inside a warp, between `bar.warp.sync`s; time.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Iterable

import numpy as np
import torch

from tests.kernels import aot
from tests.kernels.ptx_instructions import LANES, PREDICATE, TABLE, container, decoded, encoded

#: Where shared memory begins: small numbers are addresses of nothing.
SHARED_BASE = 1024
#: Of a program; more are taken for a loop without an end.
MOST_STEPS = 10**6
TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8",
    torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip


class Fault(Exception):
    """The program does what it may not."""


@dataclasses.dataclass(frozen=True)
class Address:
    base: str | int
    offset: int


@dataclasses.dataclass
class Statement:
    """One instruction: of `@!%p1 add.s32 %r1, %r2, 3` the guard %p1, negated, the parts add and s32, three operands."""

    text: str
    guard: str | None
    negated: bool
    parts: list[str]
    operands: tuple

    @property
    def kind(self) -> str:
        return self.parts[-1]


class Listing:
    """The statements of a kernel's PTX, with names that are local to a scope made unlike all others.

    Attributes: `statements`; `labels`: name -> place; `widths`: register -> type of what it is kept as; `parameters`: names in
    order; `shared`: bytes of shared memory that the text declares.
    """

    def __init__(self, text: str) -> None:
        text = re.sub(r"//.*|^\s*\.(loc|file)\b.*", "", text, flags=re.M)
        found = re.search(r"\.entry\s+\w+\s*\((.*?)\)[^{]*\{", text, re.S)
        assert found, "no kernel"
        self.parameters = re.findall(r"(\w+)\s*(?:,|$)", found[1].strip())
        self.statements: list[Statement] = []
        self.labels: dict[str, int] = {}
        self.widths: dict[str, np.dtype] = {}
        self.shared = 0
        self._scopes: list[dict[str, str | int]] = [{}]
        self._opened = 0
        self._read(text[found.end() :])
        for statement in self.statements:
            if statement.parts[0] == "bra":
                *scopes, name = statement.operands
                names = [name + scope for scope in reversed(scopes) if name + scope in self.labels]
                statement.operands = (self.labels[names[0]],)
        # What the launch adds comes behind what the text declares.
        self.dynamic = SHARED_BASE + -(-self.shared // 128) * 128

    def _read(self, text: str) -> None:
        place, names = 0, [""]
        token = re.compile(r"\s*(?:(\{)|(\})|([\w$]+):(?!:)|([^;]+);)")
        while match := token.match(text, place):
            place = match.end()
            opened, closed, label, statement = match.groups()
            if opened:
                self._opened += 1
                names.append(f"#{self._opened}")
                self._scopes.append({})
            elif closed:
                names.pop()
                self._scopes.pop()
                if not names:
                    return
            elif label:
                self.labels[label + names[-1]] = len(self.statements)
            elif statement.lstrip().startswith("."):
                self._declare(statement.split(), names[-1])
            else:
                self.statements.append(self._statement(" ".join(statement.split()), names))

    def _declare(self, words: list[str], scope: str) -> None:
        if words[0] == ".reg":
            kind = words[1][1:]
            for name in " ".join(words[2:]).split(","):
                name, _, count = name.strip().rstrip(">").partition("<")
                for one in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                    self._scopes[-1][one] = one + scope
                    self.widths[one + scope] = container(kind)
        elif words[0] == ".shared":
            align, name, size = re.fullmatch(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\]", " ".join(words)).groups()
            self.shared = -(-self.shared // int(align)) * int(align)
            self._scopes[-1][name] = SHARED_BASE + self.shared
            self.shared += int(size)
        elif words[0] != ".pragma":
            raise NotImplementedError(" ".join(words))

    def _statement(self, text: str, scopes: list[str]) -> Statement:
        guard, name, rest = re.fullmatch(r"(@!?\S+ )?(\S+)\s*(.*)", text).groups()
        operands = tuple(map(self._operand, re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest)))
        parts = name.split(".")
        if parts[0] == "bra":
            operands = (*scopes, rest)  # the label may be still to come
        negated = guard is not None and guard[1] == "!"
        return Statement(text, guard and self._operand(guard.strip().lstrip("@!")), negated, parts, operands)

    def _operand(self, text: str):
        if text[0] == "{":
            return tuple(self._operand(part.strip()) for part in text[1:-1].split(","))
        if text[0] == "[":
            base, offset = re.fullmatch(r"\[\s*(\S+?)\s*(?:\+\s*(-?\w+)\s*)?\]", text).groups()
            return Address(self._operand(base), int(offset or "0", 0))
        if "|" in text:
            return tuple(self._operand(part) for part in text.split("|"))
        if re.fullmatch(r"0[fFdD][0-9A-Fa-f]+", text):
            return int(text[2:], 16)
        if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", text):
            return int(text.rstrip("U"), 0)
        for scope in reversed(self._scopes):
            if text in scope:
                return scope[text]
        return text  # a special register, a parameter, or what has no meaning until it is read


class Global:
    """The memory of tensors, at their own addresses; what is `late` is `closed` until a program has waited for it."""

    def __init__(self, tensors: Iterable[torch.Tensor], late: Iterable[torch.Tensor]) -> None:
        storages = [tensor.untyped_storage() for tensor in tensors]
        # Of some only a part is the tensor: the rest is as much in reach as it is on a GPU.
        self.parts = {storage.data_ptr(): torch.empty(0, dtype=torch.uint8).set_(storage).numpy() for storage in storages}
        self.late = {tensor.untyped_storage().data_ptr() for tensor in late}
        self.closed: set[int] = set()

    def _inside(self, addresses: np.ndarray, size: int):
        """Yields (which of the addresses, bytes of the tensor, offsets of each one's bytes)."""
        if (addresses % size).any():
            raise Fault(f"an address is no multiple of {size}")
        left = len(addresses)
        for base, data in self.parts.items():
            offsets = addresses.astype(np.int64) - base
            inside = (offsets >= 0) & (offsets + size <= len(data))
            if inside.any():
                if base in self.closed:
                    raise Fault("what the launch before may still write or read is used before griddepcontrol.wait")
                left -= inside.sum()
                yield inside, data, offsets[inside, None] + np.arange(size)
        if left:
            raise Fault(f"{left} threads are outside every tensor")

    def load(self, addresses: np.ndarray, size: int, who: np.ndarray) -> np.ndarray:
        found = np.zeros((len(addresses), size), np.uint8)
        for inside, data, at in self._inside(addresses, size):
            found[inside] = data[at]
        return found

    def store(self, addresses: np.ndarray, values: np.ndarray, who: np.ndarray) -> None:
        for inside, data, at in self._inside(addresses, values.shape[1]):
            data[at] = values[inside]
            if (data[at] != values[inside]).any():
                raise Fault("two threads store different values to one place")


class Shared:
    """The shared memory of a program; `epoch` counts its barriers."""

    def __init__(self, size: int) -> None:
        self.data = np.zeros(size, np.uint8)
        self.epoch = 0
        # Of each byte: who wrote last (-1 nobody, -2 a copy that is under way), and when; who read last (-1 several), and when.
        self.writer, self.written = np.full(size, -1), np.full(size, -1)
        self.reader, self.read = np.full(size, -1), np.full(size, -1)
        self.begun: list[tuple] = []
        self.groups: list[list[tuple]] = []

    def _places(self, addresses: np.ndarray, size: int) -> np.ndarray:
        offsets = addresses.astype(np.int64) - SHARED_BASE
        if (offsets % size).any() or (offsets < 0).any() or (offsets + size > len(self.data)).any():
            raise Fault(f"an address is no multiple of {size}, or outside shared memory")
        return offsets[:, None] + np.arange(size)

    def load(self, addresses: np.ndarray, size: int, who: np.ndarray) -> np.ndarray:
        at, warp = self._places(addresses, size), who[:, None] // LANES
        if (self.writer[at] < 0).any():
            raise Fault("shared memory is read that was not written")
        if ((self.written[at] == self.epoch) & (self.writer[at] != warp)).any():
            raise Fault("what another warp wrote is read without a barrier")
        several = at[(self.read[at] == self.epoch) & (self.reader[at] != warp)]
        self.reader[at], self.read[at] = warp, self.epoch
        self.reader[several] = -1
        self.reader[at[self.reader[at] != warp]] = -1
        return self.data[at]

    def store(self, addresses: np.ndarray, values: np.ndarray, who: np.ndarray) -> None:
        at, warp = self._places(addresses, values.shape[1]), who[:, None] // LANES
        if ((self.read[at] == self.epoch) & (self.reader[at] != warp)).any():
            raise Fault("what another warp reads is overwritten without a barrier")
        same = self.data[at] == values
        if ((self.written[at] == self.epoch) & (self.writer[at] != warp) & ~same).any():
            raise Fault("what another warp wrote is overwritten without a barrier")
        self.data[at], self.writer[at], self.written[at] = values, warp, self.epoch
        if (self.data[at] != values).any():
            raise Fault("two threads store different values to one place")

    def begin(self, addresses: np.ndarray, values: np.ndarray, who: np.ndarray) -> None:
        """Begins a copy, whose bytes are there when it is waited for."""
        at = self._places(addresses, values.shape[1])
        if ((self.read[at] == self.epoch) & (self.reader[at] != who[:, None] // LANES)).any():
            raise Fault("what another warp reads is overwritten without a barrier")
        self.writer[at] = -2
        self.begun.append((addresses, values, who))

    def commit(self) -> None:
        self.groups.append(self.begun)
        self.begun = []

    def arrive(self, but: int) -> None:
        """Ends all groups of copies but the last ones."""
        while len(self.groups) > but:
            for copy in self.groups.pop(0):
                self.store(*copy)


class Threads:
    """The threads of one program: registers, which of them act now, and what they can reach."""

    def __init__(self, listing: Listing, count: int, memory: Global, shared: int, parameters: dict[str, int]) -> None:
        self.listing, self.count, self.global_, self.parameters = listing, count, memory, parameters
        self.index = np.arange(count)
        self.lane = (self.index % LANES).astype(np.uint32)
        self.everyone = self.active = np.ones(count, bool)
        self.ended = np.zeros(count, bool)
        self.shared = Shared(listing.dynamic - SHARED_BASE + shared)
        self.registers: dict[str, np.ndarray] = {"%laneid": self.lane, "%tid.x": self.index.astype(np.uint32)}
        self.registers["%warpid"] = (self.index // LANES).astype(np.uint32)
        self.registers["global_smem"] = np.full(count, listing.dynamic, np.uint32)
        for name, value in {"%tid.y": 0, "%tid.z": 0, "%ntid.x": count}.items():
            self.registers[name] = np.full(count, value, np.uint32)

    def place(self, program: tuple[int, ...], grid: tuple[int, ...]) -> None:
        for axis, at, size in zip("xyz", program, grid, strict=True):
            self.registers[f"%ctaid.{axis}"] = np.full(self.count, at, np.uint32)
            self.registers[f"%nctaid.{axis}"] = np.full(self.count, size, np.uint32)

    def get(self, operand: str | int, kind: str) -> np.ndarray:
        """Returns an operand as numbers of a type."""
        if isinstance(operand, int):
            return decoded(_constant(operand, container(kind), self.count), kind)
        if operand not in self.registers:
            raise Fault(f"{operand.partition('#')[0]} has no value")
        return decoded(self.registers[operand].astype(container(kind), copy=False), kind)

    def put(self, name: str, values: np.ndarray, kind: str) -> None:
        """Gives a register numbers of a type, in the threads that act."""
        if name == "_":
            return
        bits, width = encoded(values, kind), self.listing.widths[name]
        if bits.dtype != width:
            signed = kind[0] == "s" and bits.itemsize < width.itemsize
            bits = decoded(bits, kind).astype(f"i{width.itemsize}").view(width) if signed else bits.astype(width)
        if self.active is not self.everyone:
            old = self.registers.get(name)  # all bits set where there is none, which is a NaN, or -1
            bits = np.where(self.active, bits, np.invert(np.zeros_like(bits)) if old is None else old)
        self.registers[name] = bits

    def who(self) -> np.ndarray:
        return self.index if self.active is self.everyone else np.flatnonzero(self.active)

    def addresses(self, address: Address) -> np.ndarray:
        return self.get(address.base, "u64") + np.uint64(address.offset % 2**64)

    def memory(self, parts: list[str]) -> Global | Shared:
        if "global" in parts:
            return self.global_
        if "shared" in parts or "shared::cta" in parts:
            return self.shared
        raise NotImplementedError

    def together(self, members: np.ndarray) -> None:
        """Raises where a lane that is a member does not act with the others of its warp."""
        if self.active is self.everyone and (members == 0xFFFFFFFF).all():
            return
        wanted = np.broadcast_to(members, self.count).reshape(-1, LANES)
        acting = self.active.reshape(-1, LANES)
        mask = (acting.astype(np.uint64) << np.arange(LANES, dtype=np.uint64)).sum(1)
        if (acting & (wanted != mask[:, None])).any():
            raise Fault("not all lanes are here")

    def all_here(self) -> None:
        if not (self.active | self.ended).all():
            raise Fault("not all threads are here")

    def run(self) -> None:
        """Runs the program to its end."""
        statements, place, places = self.listing.statements, 0, None  # places: of each thread, where they differ
        for _ in range(MOST_STEPS):
            if place == len(statements):
                return
            it = statements[place]
            active = self.everyone if places is None else places == place
            following = place + 1
            if places is not None:
                places[active] = following
            try:
                if it.guard:
                    guard = self.get(it.guard, PREDICATE) != it.negated
                    active = active if active is self.everyone and guard.all() else active & guard
                if it.parts[0] in ("bra", "ret"):
                    target = it.operands[0] if it.parts[0] == "bra" else len(statements)
                    if places is None and active is self.everyone:
                        following = target
                    elif active.any():
                        places = np.full(self.count, following) if places is None else places
                        places[active] = target
                elif active is self.everyone or active.any():
                    self.active = active
                    self.ended = self.everyone & False if places is None else places == len(statements)
                    if it.parts[0] not in TABLE:
                        raise NotImplementedError
                    TABLE[it.parts[0]](self, it)
            except (Fault, NotImplementedError) as error:
                raise type(error)(f"{it.text}: {error or 'not done'}") from error
            place = following
            if places is not None:
                place = places.min()
                places = None if (places == place).all() else places
        raise Fault("no end")


@functools.lru_cache(4096)
def _constant(value: int, dtype: np.dtype, count: int) -> np.ndarray:
    """Returns a number in every thread."""
    value = value != 0 if dtype.kind == "b" else value % 256**dtype.itemsize
    constant = np.full(count, value, dtype)
    constant.flags.writeable = False
    return constant


@functools.lru_cache(64)
def _listing(text: str) -> Listing:
    return Listing(text)


def execute(text: str, grid: tuple[int, ...], arguments: list, *, num_warps: int, shared=0, reachable=(), late=()) -> None:
    """Runs the kernel of a PTX text.

    Args:
        arguments: in the order of its parameters: tensors, integers, and of other numbers the bits.
        shared: bytes of shared memory that the launch adds to what the text declares.
        reachable: as in `run`. late: tensors that may not be touched before griddepcontrol.wait.
    """
    listing = _listing(text)
    memory = Global([part for part in (*arguments, *reachable) if isinstance(part, torch.Tensor)], late)
    values = [argument.data_ptr() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
    values += [0] * (len(listing.parameters) - len(values))  # Triton's own, which these kernels do not use
    parameters = {name: value % 2**64 for name, value in zip(listing.parameters, values, strict=True)}
    grid = (*grid, 1, 1)[:3]
    with np.errstate(all="ignore"):
        for program in np.ndindex(*grid):
            threads = Threads(listing, LANES * num_warps, memory, shared, parameters)
            threads.place(program, grid)
            memory.closed = memory.late
            try:
                threads.run()
            except (Fault, NotImplementedError) as error:
                raise type(error)(f"program {program}: {error}") from error


def run(kernel, grid, arguments, constants, *, num_warps=4, capability=90, reachable=(), late=(), **options) -> None:
    """Compiles a kernel as a launch with these arguments would, and runs it: see above.

    Args:
        kernel: what triton.jit returned, in the interpreter too.
        reachable: tensors beside the arguments that the kernel reaches, as by distances from those.
        late: parameters whose tensors it may not touch before griddepcontrol.wait.
        options: num_stages, maxnreg, enable_fp_fusion, of the launch.
    """
    parameters = inspect.signature(kernel.fn).parameters
    given = dict(zip(parameters, arguments))  # the constants follow
    constants = {name: getattr(value, "value", value) for name, value in constants.items()}
    signature, aligned, values = {}, [], []
    for name, value in given.items():
        declared = str(parameters[name].annotation)
        if value is None or (isinstance(value, int) and value == 1 and "int64" not in declared):
            constants[name] = value
            continue
        number = value
        if isinstance(value, torch.Tensor):
            signature[name], number = f"*{TYPES[value.dtype]}", value.data_ptr()
        elif isinstance(value, int):
            signature[name] = "i64" if "int64" in declared or not -(2**31) <= value < 2**31 else "i32"
        else:
            signature[name], number = "fp32", None
            value = int(np.float32(value).view(np.uint32))
        values.append(value)
        if number is not None and number % 16 == 0:
            aligned.append(name)
    options = {name: value for name, value in options.items() if value is not None} | {"num_warps": num_warps}
    build = aot.Build(kernel.fn.__module__, kernel.fn.__name__, capability, signature, constants, tuple(aligned), options)
    text, shared = aot.ptx(build)
    execute(text, grid, values, num_warps=num_warps, shared=shared, reachable=reachable, late=[given[name] for name in late])


class Launcher:
    """Stands in a kernel's place: `kernel[grid](...)` runs it here, with what else is given to `run`.

    `late` counts only in a launch with `launch_pdl`: without, nothing runs at the same time.
    """

    def __init__(self, kernel, **given) -> None:
        self.kernel, self.given = kernel, given

    def __getitem__(self, grid: tuple[int, ...]):
        names = inspect.signature(self.kernel.fn).parameters

        def launch(*arguments, **keywords):
            constants = {name: value for name, value in keywords.items() if name in names}
            options = {**self.given, **{name: value for name, value in keywords.items() if name not in names}}
            if not options.pop("launch_pdl", False):
                options.pop("late", None)
            run(self.kernel, grid, arguments, constants, **options)

        return launch

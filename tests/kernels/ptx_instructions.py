"""What each PTX instruction does, for all threads of a program at once: the instruction set of ptx_machine.py.

A register is a numpy array of unsigned integers (a predicate: of bool), one element a thread; an instruction reads it as the
type in its name. TABLE is base name -> function(threads, statement); what is missing is an error that names it. `threads` is
the Threads of ptx_machine.py: `get`, `put`, `active`, memories.

As on a GPU: rounding to the nearest even, integers that wrap around, shifts by more than all bits, which lane holds which
element of a matrix. Not as on a GPU: `fma` is computed in float64 and then rounded, which is rarely one bit off; a tensor
core's sum is computed in float64 and rounded once to float32, the GPU's loses a few bits more; `approx`, `full` and `ftz` are
not imitated; hints to caches are ignored.

Source: NVIDIA, "Parallel Thread Execution ISA", chapter 9; "Matrix fragments for mma.m16n8k16".
"""

from __future__ import annotations

import functools
import re

import numpy as np

LANES = 32
PREDICATE = "pred"


@functools.cache
def size_of(kind: str) -> int:
    """Returns the bytes of a type: 4 of s32, f32 and bf16x2."""
    if not (found := re.fullmatch(r"(?:[busf]|bf)(\d+)(x2)?", kind)):
        raise NotImplementedError(f"type {kind}")
    return int(found[1]) // 8 * (2 if found[2] else 1)


@functools.cache
def container(kind: str) -> np.dtype:
    """Returns what a register of a type is kept as."""
    return np.dtype(bool) if kind == PREDICATE else np.dtype(f"u{size_of(kind)}")


def decoded(bits: np.ndarray, kind: str) -> np.ndarray:
    """Returns registers' bits as numbers; of a pair twice as many, the lower half first."""
    if kind == PREDICATE or (kind[0] in "bu" and kind[:2] != "bf"):
        return bits
    if kind.startswith("bf16"):
        return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return bits.view({"s": "i", "f": "f"}[kind[0]] + ("2" if kind == "f16x2" else str(size_of(kind))))


def encoded(values: np.ndarray, kind: str) -> np.ndarray:
    """Returns the bits of numbers, rounded to the type: the inverse of `decoded`."""
    if kind == PREDICATE:
        return values.astype(bool)
    if kind.startswith("bf16"):
        values = values.astype(np.float32)
        bits = values.view(np.uint32)
        nearest = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = np.where(np.isnan(values), 0x7FFF, nearest).astype(np.uint16)
    elif kind[0] == "f":
        bits = values.astype("f2" if kind == "f16x2" else f"f{size_of(kind)}")
    else:
        bits = values.astype(f"{'i' if kind[0] == 's' else 'u'}{size_of(kind)}")
    return bits.view(container(kind))


def _quotient(a, b):
    """Rounds towards zero."""
    if a.dtype.kind == "f":
        return a / b
    return np.where((a % b != 0) & ((a < 0) ^ (b < 0)), a // b + 1, a // b)


def _fma(a, b, c):
    return a * b + c if a.dtype.kind in "ui" else a.astype(np.float64) * b.astype(np.float64) + c


#: Of operands of one type, that of the result.
_SAME = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _quotient, "rem": lambda a, b: a - b * _quotient(a, b),
    "min": lambda a, b: np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b),
    "max": lambda a, b: np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b),
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "neg": np.negative, "abs": np.abs,
    "fma": _fma, "mad": _fma, "ex2": np.exp2, "rsqrt": lambda a: 1 / np.sqrt(a), "rcp": np.reciprocal, "sqrt": np.sqrt,
}  # fmt: skip
_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip


def _same(threads, it) -> None:
    high = "hi" in it.parts
    if "sat" in it.parts or (high and it.parts[0] != "mul"):
        raise NotImplementedError
    sources = [threads.get(operand, it.kind) for operand in it.operands[1:3]]
    kind = it.kind
    if high or "wide" in it.parts:
        kind = f"{it.kind[0]}{16 * size_of(it.kind)}"
        sources = [source.astype(f"{source.dtype.kind}{2 * source.itemsize}") for source in sources]
    sources += [threads.get(operand, kind) for operand in it.operands[3:]]
    result = _SAME[it.parts[0]](*sources)
    threads.put(it.operands[0], result >> 8 * size_of(it.kind) if high else result, it.kind if high else kind)


def _shift(threads, it) -> None:
    target, source, by = it.operands
    value, by = threads.get(source, it.kind), threads.get(by, "u32")
    bits = 8 * size_of(it.kind)
    kept = np.minimum(by, bits - 1).astype(value.dtype)
    moved = value << kept if it.parts[0] == "shl" else value >> kept
    threads.put(target, moved if it.kind[0] == "s" else np.where(by < bits, moved, 0), it.kind)


def _mov(threads, it) -> None:
    target, source = it.operands
    if isinstance(target, tuple):
        halves = threads.get(source, it.kind)[:, None].view(f"u{size_of(it.kind) // len(target)}")
        for name, half in zip(target, halves.T, strict=True):
            threads.put(name, np.ascontiguousarray(half), f"b{8 * half.itemsize}")
    elif isinstance(source, tuple):
        part = f"b{8 * size_of(it.kind) // len(source)}"
        joined = np.stack([threads.get(name, part) for name in source], 1).view(container(it.kind))
        threads.put(target, joined[:, 0], it.kind)
    else:
        threads.put(target, threads.get(source, it.kind), it.kind)


def _setp(threads, it) -> None:
    how, kind = it.parts[1], it.parts[-1]
    if len(it.operands) != 3 or how not in _COMPARE:
        raise NotImplementedError
    a, b = (threads.get(operand, kind) for operand in it.operands[1:])
    threads.put(it.operands[0], _COMPARE[how](a, b), PREDICATE)


def _selp(threads, it) -> None:
    target, yes, no, which = it.operands
    threads.put(target, np.where(threads.get(which, PREDICATE), threads.get(yes, it.kind), threads.get(no, it.kind)), it.kind)


def _cvt(threads, it) -> None:
    *how, to, source = it.parts[1:]
    if not set(how) <= {"rn", "rz", "rni", "rzi"}:
        raise NotImplementedError
    target, *operands = it.operands
    values = [threads.get(operand, source) for operand in operands]
    value = values[0]
    if len(values) == 2:  # a pair, its upper half first
        value = np.stack(values[::-1], 1).ravel()
    float_to_integer = to[0] in "us" and value.dtype.kind == "f"
    if "rz" in how or float_to_integer != ("rni" in how or "rzi" in how):
        raise NotImplementedError
    if float_to_integer:
        limits = np.iinfo(encoded(value[:0], to).view("i4" if to[0] == "s" else "u4").dtype) if to[1:] == "32" else None
        if limits is None:
            raise NotImplementedError
        value = np.trunc(value) if "rzi" in how else np.rint(value)
        value = np.clip(np.nan_to_num(value.astype(np.float64)), limits.min, limits.max)
    threads.put(target, value, to)


def _bfe(threads, it) -> None:
    target, source, at, length = it.operands
    value = threads.get(source, it.kind).astype(np.int64)
    at, length = (threads.get(operand, "u32").astype(np.int64) & 255 for operand in (at, length))
    field = value >> np.minimum(at, 63)
    unused = np.clip(64 - length, 0, 63)
    field = (field << unused) >> unused if it.kind[0] == "s" else field & ((1 << np.minimum(length, 62)) - 1)
    threads.put(target, np.where(length == 0, 0, field), it.kind)


def _prmt(threads, it) -> None:
    target, low, high, order = it.operands
    if it.parts[1:] != ["b32"]:
        raise NotImplementedError
    eight = np.stack([threads.get(low, "b32"), threads.get(high, "b32")], 1).view(np.uint8)
    nibbles = (threads.get(order, "b32")[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
    taken = np.take_along_axis(eight, (nibbles & 7).astype(np.int64), 1)
    taken = np.where(nibbles & 8, np.where(taken & 128, 255, 0), taken).astype(np.uint8)  # 8: the sign, eight times
    threads.put(target, taken.view(np.uint32)[:, 0], "b32")


def _lop3(threads, it) -> None:
    target, *three, table = it.operands
    a, b, c = (threads.get(operand, "b32") for operand in three)
    result = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    threads.put(target, result, "b32")


def _dp4a(threads, it) -> None:
    target, a, b, c = it.operands
    a, b = (
        decoded(threads.get(operand, "b32")[:, None].view(np.uint8), f"{kind[0]}8").astype(np.int64)
        for operand, kind in ((a, it.parts[1]), (b, it.parts[2]))
    )
    threads.put(target, (a * b).sum(1) + threads.get(c, it.parts[1]), it.parts[1])


def _shfl(threads, it) -> None:
    target, source, by, clamp, members = it.operands
    target, inside = target if isinstance(target, tuple) else (target, None)
    by, clamp = threads.get(by, "u32") & 31, threads.get(clamp, "u32")
    lane, first = threads.lane, threads.lane & (clamp >> 8 & 31)
    last = first | (clamp & 31 & ~(clamp >> 8))
    how = it.parts[2]
    taken = {
        "up": lane.astype(np.int64) - by, "down": lane + by, "bfly": lane ^ by, "idx": first | (by & ~(clamp >> 8)),
    }[how].astype(np.int64)  # fmt: skip
    fits = taken >= last if how == "up" else taken <= last
    taken = np.where(fits, taken, lane) + threads.index // LANES * LANES
    threads.together(threads.get(members, "u32"))
    threads.put(target, threads.get(source, "b32")[taken], "b32")
    if inside:
        threads.put(inside, fits, PREDICATE)


def _mma(threads, it) -> None:
    shape, kinds = it.parts[3], it.parts[6:]
    if shape != "m16n8k16" or kinds[0] != "f32" or kinds[3] != "f32" or kinds[1] != kinds[2] or kinds[1] not in ("bf16", "f16"):
        raise NotImplementedError
    threads.together(np.uint32(0xFFFFFFFF))

    def pairs(operand):  # of each register two numbers: (registers, warps, 8 groups of lanes, 4 lanes, 2)
        words = np.stack([threads.get(name, "b32") for name in operand])
        return decoded(words, kinds[1]).reshape(len(operand), -1, 8, 4, 2).astype(np.float64)

    out, a, b, c = it.operands
    # Register 2 i + j of A: row 8 j + group, column 8 i + 2 lane + half. Register i of B: row 8 i + 2 lane + half.
    a = pairs(a).reshape(2, 2, -1, 8, 4, 2).transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16)
    b = pairs(b).transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8)
    # Register 2 i + j of C: row 8 i + group, column 2 lane + j.
    c = np.stack([threads.get(name, "f32") for name in c]).reshape(2, 2, -1, 8, 4).transpose(2, 0, 3, 4, 1)
    total = (a @ b + c.reshape(-1, 16, 8)).astype(np.float32)
    total = total.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
    for name, value in zip(out, total, strict=True):
        threads.put(name, np.ascontiguousarray(value), "f32")


def _ld(threads, it) -> None:
    target, address, *_ = it.operands  # and, perhaps, a hint
    if "param" in it.parts:
        bits = np.full(threads.count, threads.parameters[address.base], np.uint64).astype(container(it.kind))
        threads.put(target, decoded(bits, it.kind), it.kind)
        return
    names = target if isinstance(target, tuple) else (target,)
    size = size_of(it.kind)
    who = threads.who()
    found = threads.memory(it.parts).load(threads.addresses(address)[who], size * len(names), who)
    data = np.zeros((threads.count, size * len(names)), np.uint8)
    data[who] = found
    for name, bits in zip(names, data.view(container(it.kind)).T, strict=True):
        threads.put(name, decoded(np.ascontiguousarray(bits), it.kind), it.kind)


def _st(threads, it) -> None:
    address, source, *_ = it.operands
    names = source if isinstance(source, tuple) else (source,)
    words = np.stack([threads.get(name, it.kind) for name in names], 1)
    who = threads.who()
    threads.memory(it.parts).store(threads.addresses(address)[who], words[who].view(np.uint8), who)


def _atom(threads, it) -> None:
    target, address, source = it.operands
    if "add" not in it.parts:
        raise NotImplementedError
    memory, size, old = threads.memory(it.parts), size_of(it.kind), threads.get(source, it.kind).copy()
    for thread in threads.who():  # one after the other, also where they add to one number
        at, who = threads.addresses(address)[[thread]], threads.index[[thread]]
        found = decoded(memory.load(at, size, who).view(container(it.kind))[0], it.kind)
        memory.store(at, encoded(found + old[thread], it.kind)[None].view(np.uint8), who)
        old[thread] = found[0]
    threads.put(target, old, it.kind)


def _rows_of_matrices(threads, address, count):
    """Returns (addresses, threads that give them) of the rows of each matrix: of the i-th, lanes 8 i to 8 i + 7."""
    threads.together(np.uint32(0xFFFFFFFF))
    addresses = threads.addresses(address).reshape(-1, LANES)
    index = threads.index.reshape(-1, LANES)
    return [(addresses[:, 8 * i : 8 * i + 8].ravel(), index[:, 8 * i : 8 * i + 8].ravel()) for i in range(count)]


def _ldmatrix(threads, it) -> None:
    target, address = it.operands
    for name, (addresses, who) in zip(target, _rows_of_matrices(threads, address, len(target)), strict=True):
        rows = threads.shared.load(addresses, 16, who).view(np.uint16).reshape(-1, 8, 8)
        rows = rows.swapaxes(1, 2) if "trans" in it.parts else rows
        threads.put(name, np.ascontiguousarray(rows).view(np.uint32).ravel(), "b32")


def _stmatrix(threads, it) -> None:
    address, source = it.operands
    for name, (addresses, who) in zip(source, _rows_of_matrices(threads, address, len(source)), strict=True):
        rows = threads.get(name, "b32").view(np.uint16).reshape(-1, 8, 8)
        rows = rows.swapaxes(1, 2) if "trans" in it.parts else rows
        threads.shared.store(addresses, np.ascontiguousarray(rows).view(np.uint8).reshape(-1, 16), who)


def _cp(threads, it) -> None:
    if it.parts[:2] != ["cp", "async"]:
        raise NotImplementedError
    if it.parts[2] == "commit_group":
        threads.shared.commit()
    elif it.parts[2] in ("wait_group", "wait_all"):
        threads.shared.arrive(it.operands[0] if it.operands else 0)
    elif it.parts[3] == "shared":
        to, source, size, *rest = it.operands
        # The bytes that are really read: the others are zeros. With a hint to the cache there is one operand more.
        rest = rest[:-1] if "L2::cache_hint" in it.text else rest
        read = threads.get(rest[0], "u32") if rest else np.full(threads.count, size, np.uint32)
        data = np.zeros((threads.count, size), np.uint8)
        for count in np.unique(read[threads.active]):
            who = np.flatnonzero(threads.active & (read == count))
            if count:
                data[who, :count] = threads.memory(["global"]).load(threads.addresses(source)[who], int(count), who)
        who = threads.who()
        threads.shared.begin(threads.addresses(to)[who], data[who], who)
    else:
        raise NotImplementedError


def _bar(threads, it) -> None:
    if it.parts[1] == "warp":
        threads.together(threads.get(it.operands[0], "u32"))
    elif it.operands == (0,):
        threads.all_here()
        threads.shared.epoch += 1
    else:
        raise NotImplementedError


def _griddepcontrol(threads, it) -> None:
    if it.parts[1] == "wait":
        threads.global_.closed = set()


def _createpolicy(threads, it) -> None:
    threads.put(it.operands[0], np.zeros(threads.count, np.uint64), "b64")


TABLE = {
    **dict.fromkeys(_SAME, _same), "shl": _shift, "shr": _shift, "mov": _mov, "setp": _setp, "selp": _selp, "cvt": _cvt,
    "bfe": _bfe, "prmt": _prmt, "lop3": _lop3, "dp4a": _dp4a, "shfl": _shfl, "mma": _mma, "ld": _ld, "st": _st, "atom": _atom,
    "ldmatrix": _ldmatrix, "stmatrix": _stmatrix, "cp": _cp, "bar": _bar, "createpolicy": _createpolicy,
    "griddepcontrol": _griddepcontrol,
}  # fmt: skip

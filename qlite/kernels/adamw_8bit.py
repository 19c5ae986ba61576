"""Triton kernels that step AdamW, equal to adamw_8bit.py bit for bit: any number of tensors in one launch.

    m = decode(m) * b1 + g * (1 - b1),    v = decode(v) * b2 + g * g * (1 - b2),    g = grad * grad_scale
    p = p * (1 - lr * weight_decay) - clamp(m / (sqrt(v) * c2 + eps), bound) * (lr / (1 - b1^step))
    encode(x): absmax = max |x| over a block;  code = count(midpoints < x * (1 / absmax)),  for v > 0 at least 1

Layout: every tensor is contiguous and seen flat, n elements: param and grad float32, bfloat16 or float16, the same for all
of one launch; exp_avg and exp_avg_sq uint8 codes with float32 absmax (ceil(n / block_size),), or float32 moments. A launch
finds its tensors in a table, a row of 16 int64 for each: six addresses, n, the first program that works at it, and the
nine float32 numbers of its rule. So groups with settings of their own, and parameters that have made another number of
steps, are one launch: a rule changes with every step, and the rows are uploaded with every step anyway, in one copy.

Encoding takes one look-up. The bits of a float32 are a cell (its sign, exponent and first mantissa bits) and a place in it.
Cells are so narrow that one midpoint at most lies in each, and the entry of a cell is the code below its midpoint, shifted
left by 24, plus what the place must exceed to carry into the code: code = (entry + place) >> 24. Of negative numbers places
count backwards. Every bit pattern has a cell, so nothing is clamped.

A warp holds a block of 256: a thread two chunks of 4 consecutive elements, so that a warp reads and writes whole lines and
a maximum needs no shared memory. Each operation is rounded on its own: compiled without contraction
to fused multiply-add. Not done: float64; capture in a CUDA graph, as the rule's numbers come from the host.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlite.adamw_8bit import unflattened
from qlite.dynamic8 import SMALLEST_DIVISOR, dynamic_levels
from qlite.kernels.int8_codec import to_output
from qlite.kernels.nf4_codec import _reciprocal, _scattered

#: Elements of a tile of encoded moments, for each of its warps (a longer block takes more warps), and of float32 moments.
#: 256 take 108 registers a thread; 512 would take 205 and leave half the warps, for no fewer instructions.
TILE, PLAIN_TILE = 256, 1024
#: From so many elements on a program steps 8 tiles: the GPU starts programs at a limited rate, and each looks its row up.
#: Fewer elements would not fill it so.
SHARE, SHARED_FROM = 8, 2**24
#: Longer blocks would not fit the registers of a program: training_ops.py takes the reference for them.
LONGEST_BLOCK = 4096
#: int64 places of a row of the table; where n and the first program stand in it, and the numbers, as float32 places.
ROW, COUNT, FIRST, NUMBERS = (tl.constexpr(place) for place in (16, 6, 7, 16))
#: Where the look-up table holds what, in 4-byte places: the levels of both codes, then the cells of both. (An unsigned
#: share has no sign; of a NaN with one the look-up ends among the signed cells, and what it finds is not stored.)
LEVELS, UNSIGNED_LEVELS, UNSIGNED_CELLS, SIGNED_CELLS = (tl.constexpr(place) for place in (0, 256, 512, 512 + 32768))
#: Bits of a place in a cell: 6 and 7 bits of the mantissa tell the cell, as the closest midpoints, at 1, require.
SIGNED_PLACE, UNSIGNED_PLACE = tl.constexpr(17), tl.constexpr(16)
SIGNED_PLACES, UNSIGNED_PLACES = tl.constexpr(2**17 - 1), tl.constexpr(2**16 - 1)


def cells(signed: bool) -> Tensor:
    """Returns the entry of each cell of one code, int32 (32768,) on the CPU."""
    place = (SIGNED_PLACE if signed else UNSIGNED_PLACE).value
    levels = dynamic_levels(signed)
    midpoints = (levels[:-1] + levels[1:]) / 2
    first = torch.arange(32768, dtype=torch.int64) << place
    last = first + (1 << place) - 1
    negative = first >= 2**31
    low, high = torch.where(negative, last, first), torch.where(negative, first, last)
    below, above = (torch.bucketize(_as_float(bits).nan_to_num(0.0), midpoints) for bits in (low, high))
    # The last place whose code is the lower one is that of the midpoint itself.
    middle = midpoints[below.clamp(max=254)].view(torch.int32).long()
    middle = torch.where(negative, ~middle, middle) & ((1 << place) - 1)
    entry = (below << 24) + torch.where(above > below, 2**24 - 1 - middle, 0)
    return _wrapped(entry)


def _as_float(bits: Tensor) -> Tensor:
    return _wrapped(bits).view(torch.float32)


def _wrapped(bits: Tensor) -> Tensor:
    """Returns int64 from 0 to 2^32 - 1 as int32 of the same bits."""
    return torch.where(bits >= 2**31, bits - 2**32, bits).int()


@functools.cache
def _lookup(device: torch.device) -> Tensor:
    """Returns the look-up table on a device; always the same tensor, as a copy from the host would wait."""
    with torch.inference_mode(False), torch.device("cpu"):
        levels = [dynamic_levels(signed).view(torch.int32) for signed in (True, False)]
        return torch.cat([*levels, cells(False), cells(True)]).to(device)


@triton.jit
def _row_of_program(tensors, table_ptr):
    """Returns the row of the tensor that this program works at: the last one that begins no later."""
    program = tl.program_id(0)
    low, high = tensors * 0, tensors - 1
    while low < high:
        middle = (low + high + 1) // 2
        begun = tl.load(table_ptr + middle * ROW + FIRST) <= program
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle - 1)
    return table_ptr + low.to(tl.int64) * ROW


@triton.jit
def _number(INDEX: tl.constexpr, row_ptr):
    return tl.load(row_ptr.to(tl.pointer_type(tl.float32), bitcast=True) + NUMBERS + INDEX)


@triton.jit
def _moments(grad, exp_avg, exp_avg_sq, scale_ptr, row_ptr):
    """Returns AdamWRule.moments of a gradient, scaled where there is a scale."""
    grad = grad.to(tl.float32)
    if scale_ptr is not None:
        grad *= tl.load(scale_ptr)
    exp_avg = exp_avg * _number(0, row_ptr) + grad * _number(1, row_ptr)
    exp_avg_sq = exp_avg_sq * _number(2, row_ptr) + (grad * grad) * _number(3, row_ptr)
    return exp_avg, exp_avg_sq


@triton.jit
def _updated(param, exp_avg, exp_avg_sq, row_ptr, BOUNDED: tl.constexpr):
    """Returns AdamWRule.updated."""
    denominator = tl.sqrt_rn(exp_avg_sq) * _number(4, row_ptr) + _number(5, row_ptr)
    move = tl.where(denominator == 0, 0.0, tl.math.div_rn(exp_avg, denominator))
    if BOUNDED:
        bound = _number(6, row_ptr)
        move = tl.minimum(tl.maximum(move, -bound), bound)
    return param.to(tl.float32) * _number(8, row_ptr) - move * _number(7, row_ptr)


@triton.jit
def _largest(bits, BLOCKS: tl.constexpr, CHUNKS: tl.constexpr):
    """Returns for each chunk (rows of `bits`) the largest of its block, for all chunks of the block: NaN comes last."""
    each = tl.max(tl.reshape(tl.max(bits, axis=1), [BLOCKS, CHUNKS]), axis=1)
    return tl.reshape(tl.broadcast_to(each[:, None], [BLOCKS, CHUNKS]), [BLOCKS * CHUNKS])


@triton.jit
def _signed_code(share, lookup_ptr):
    bits = share.to(tl.int32, bitcast=True)
    place = (bits ^ (bits >> 31)) & SIGNED_PLACES
    entry = tl.load(lookup_ptr + SIGNED_CELLS + (bits.to(tl.uint32, bitcast=True) >> SIGNED_PLACE))
    return (entry + place).to(tl.uint32, bitcast=True) >> 24


@triton.jit
def _unsigned_code(share, lookup_ptr):
    bits = share.to(tl.int32, bitcast=True)
    place = bits & UNSIGNED_PLACES
    entry = tl.load(lookup_ptr + UNSIGNED_CELLS + (bits.to(tl.uint32, bitcast=True) >> UNSIGNED_PLACE))
    return (entry + place).to(tl.uint32, bitcast=True) >> 24


@triton.jit
def _step_tile(
    start, count, smallest, row_ptr, param_ptr, grad_ptr, lookup_ptr, scale_ptr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
    ROUND_BFLOAT16: tl.constexpr,
):  # fmt: skip
    """Steps the blocks of one program, from element `start` of `count` on."""
    CHUNKS: tl.constexpr = WIDTH // 4
    BLOCKS: tl.constexpr = TILE // WIDTH
    chunk = _scattered(TILE // 4)
    column = (chunk % CHUNKS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    at = (chunk // CHUNKS * BLOCK)[:, None] + column
    if BLOCK == WIDTH:
        at = chunk[:, None] * 4 + tl.arange(0, 4)[None, :]
    param_ptr = tl.load(row_ptr).to(param_ptr.dtype) + start
    grad_ptr = tl.load(row_ptr + 1).to(grad_ptr.dtype) + start
    avg_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.uint8)) + start
    sq_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(tl.uint8)) + start
    if ALIGNED:
        param_ptr, grad_ptr = tl.multiple_of(param_ptr, 16), tl.multiple_of(grad_ptr, 16)
        avg_ptr, sq_ptr = tl.multiple_of(avg_ptr, 4), tl.multiple_of(sq_ptr, 4)
    avg_absmax_ptr = tl.load(row_ptr + 4).to(tl.pointer_type(tl.float32)) + start // BLOCK + chunk // CHUNKS
    sq_absmax_ptr = tl.load(row_ptr + 5).to(tl.pointer_type(tl.float32)) + start // BLOCK + chunk // CHUNKS
    if MASKED:
        left = tl.minimum(count - start, BLOCKS * BLOCK).to(tl.uint32)
        mask, block_mask = (at < left) & (column < BLOCK), chunk // CHUNKS * BLOCK < left
        # Past the end the moments are zero: no larger than any other of the block.
        param, grad = tl.load(param_ptr + at, mask=mask, other=0.0), tl.load(grad_ptr + at, mask=mask, other=0.0)
        avg_code, sq_code = tl.load(avg_ptr + at, mask=mask, other=127), tl.load(sq_ptr + at, mask=mask, other=0)
        avg_absmax = tl.load(avg_absmax_ptr, mask=block_mask, other=0.0)
        sq_absmax = tl.load(sq_absmax_ptr, mask=block_mask, other=0.0)
    else:
        param, grad = tl.load(param_ptr + at), tl.load(grad_ptr + at)
        avg_code, sq_code = tl.load(avg_ptr + at), tl.load(sq_ptr + at)
        avg_absmax, sq_absmax = tl.load(avg_absmax_ptr), tl.load(sq_absmax_ptr)
    levels_ptr = lookup_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
    exp_avg = tl.load(levels_ptr + LEVELS + avg_code.to(tl.uint32)) * avg_absmax[:, None]
    exp_avg_sq = tl.load(levels_ptr + UNSIGNED_LEVELS + sq_code.to(tl.uint32)) * sq_absmax[:, None]
    exp_avg, exp_avg_sq = _moments(grad, exp_avg, exp_avg_sq, scale_ptr, row_ptr)
    avg_bits = _largest(exp_avg.to(tl.int32, bitcast=True) & 0x7FFFFFFF, BLOCKS, CHUNKS)
    sq_bits = _largest(exp_avg_sq.to(tl.int32, bitcast=True) & 0x7FFFFFFF, BLOCKS, CHUNKS)
    avg_absmax, sq_absmax = avg_bits.to(tl.float32, bitcast=True), sq_bits.to(tl.float32, bitcast=True)
    avg_code = _signed_code(exp_avg * _reciprocal(avg_absmax, smallest)[:, None], lookup_ptr)
    sq_code = _unsigned_code(exp_avg_sq * _reciprocal(sq_absmax, smallest)[:, None], lookup_ptr)
    sq_code = tl.maximum(sq_code, (exp_avg_sq > 0).to(tl.uint32))
    param = _updated(param, exp_avg, exp_avg_sq, row_ptr, True)
    # A block in which a moment is not finite is not stored.
    block_keep = tl.maximum(avg_bits, sq_bits) < 0x7F800000
    keep = tl.broadcast_to(block_keep[:, None], at.shape)
    if MASKED:
        keep, block_keep = keep & mask, block_keep & block_mask
    tl.store(param_ptr + at, to_output(param, ROUND_BFLOAT16, param_ptr.dtype.element_ty), mask=keep)
    tl.store(avg_ptr + at, avg_code.to(tl.uint8), mask=keep)
    tl.store(sq_ptr + at, sq_code.to(tl.uint8), mask=keep)
    block_keep &= chunk % CHUNKS == 0
    tl.store(avg_absmax_ptr, avg_absmax, mask=block_keep)
    tl.store(sq_absmax_ptr, sq_absmax, mask=block_keep)


@triton.jit(do_not_specialize=["tensors"], do_not_specialize_on_alignment=["param_ptr", "grad_ptr"])
def _encoded_kernel(
    table_ptr, lookup_ptr, param_ptr, grad_ptr, scale_ptr, tensors, share, smallest,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr, ROUND_BFLOAT16: tl.constexpr,
):  # fmt: skip
    """Steps `share` tiles of whole blocks of one tensor, one after the other."""
    # param_ptr, grad_ptr: of any of the tensors, for their dtypes alone. WIDTH: what a block takes of the tile.
    STEP: tl.constexpr = TILE // WIDTH * BLOCK
    row_ptr = _row_of_program(tensors, table_ptr)
    count = tl.load(row_ptr + COUNT)
    start = (tl.program_id(0) - tl.load(row_ptr + FIRST)) * share * STEP
    tile = 0
    while (tile < share) & (start < count):
        # Twice the code: masks would keep Triton from loads of 16 bytes.
        if (BLOCK == WIDTH) & (count - start >= STEP):
            _step_tile(
                start, count, smallest, row_ptr, param_ptr, grad_ptr, lookup_ptr, scale_ptr,
                BLOCK, WIDTH, TILE, ALIGNED, False, ROUND_BFLOAT16,
            )  # fmt: skip
        else:
            _step_tile(
                start, count, smallest, row_ptr, param_ptr, grad_ptr, lookup_ptr, scale_ptr,
                BLOCK, WIDTH, TILE, False, True, ROUND_BFLOAT16,
            )  # fmt: skip
        tile += 1
        start += STEP


@triton.jit(do_not_specialize=["tensors"], do_not_specialize_on_alignment=["param_ptr", "grad_ptr"])
def _plain_kernel(
    table_ptr, param_ptr, grad_ptr, scale_ptr, tensors, TILE: tl.constexpr, ROUND_BFLOAT16: tl.constexpr
):  # fmt: skip
    """Steps tensors whose moments are float32, element by element."""
    row_ptr = _row_of_program(tensors, table_ptr)
    start = (tl.program_id(0) - tl.load(row_ptr + FIRST)) * TILE
    at = tl.arange(0, TILE)
    mask = at < tl.load(row_ptr + COUNT) - start
    param_ptr = tl.load(row_ptr).to(param_ptr.dtype) + start
    avg_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.float32)) + start
    sq_ptr = tl.load(row_ptr + 3).to(tl.pointer_type(tl.float32)) + start
    grad = tl.load(tl.load(row_ptr + 1).to(grad_ptr.dtype) + start + at, mask=mask, other=0.0)
    exp_avg, exp_avg_sq = tl.load(avg_ptr + at, mask=mask, other=0.0), tl.load(sq_ptr + at, mask=mask, other=0.0)
    exp_avg, exp_avg_sq = _moments(grad, exp_avg, exp_avg_sq, scale_ptr, row_ptr)
    param = _updated(tl.load(param_ptr + at, mask=mask, other=0.0), exp_avg, exp_avg_sq, row_ptr, False)
    mask &= (exp_avg.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
    mask &= (exp_avg_sq.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
    tl.store(param_ptr + at, to_output(param, ROUND_BFLOAT16, param_ptr.dtype.element_ty), mask=mask)
    tl.store(avg_ptr + at, exp_avg, mask=mask)
    tl.store(sq_ptr + at, exp_avg_sq, mask=mask)


def _numbers(rules: Sequence[float]) -> list[tuple[float, ...]]:
    """Returns for each rule the nine numbers of a row."""
    found, before = [], None
    for rule in unflattened(rules):
        if rule is not before:
            before = rule
            b1, b2 = rule.beta1, rule.beta2
            numbers = (b1, 1 - b1, b2, 1 - b2, rule.correction, rule.eps, rule.bound(), rule.stride, rule.decay)
        found.append(numbers)
    return found


def _table(
    addresses: list[list[int]], counts: list[int], rules: Sequence[float], step: int, device: torch.device
) -> tuple[Tensor | None, int]:
    """Returns the table on the device, and how many programs of `step` elements are to be launched; None and 0 for nothing.

    The copy from pinned memory is asynchronous; PyTorch's allocator of pinned memory gives a block out again only when the
    copies out of it have ended.

    Args:
        addresses: of params, grads, exp_avg, exp_avg_sq and, where they are encoded, the absmax of both: the order of a row.
        counts: elements of each parameter.
    """
    unused = [[0] * len(counts)] * (COUNT.value - len(addresses))
    firsts = list(itertools.accumulate((-(-count // step) for count in counts), initial=0))
    programs = firsts.pop()
    if not programs:
        return None, 0
    rows = [row for row in zip(*addresses, *unused, counts, firsts, strict=True) if row[COUNT.value]]
    numbers = [numbers for count, numbers in zip(counts, _numbers(rules), strict=True) if count]
    on_host = torch.empty((len(rows), ROW.value), dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    on_host[:, : NUMBERS.value // 2] = torch.tensor(rows, dtype=torch.int64, device="cpu")
    places = on_host.view(torch.float32)[:, NUMBERS.value : NUMBERS.value + 9]
    places.copy_(torch.tensor(numbers, dtype=torch.float32, device="cpu"))
    return on_host.to(device, non_blocking=True), programs


def _addresses(*columns: Sequence[Tensor]) -> list[list[int]]:
    return [[tensor.data_ptr() for tensor in column] for column in columns]


def _check(name: str, tensors: Sequence[Tensor], counts: list[int], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError where a kernel would take memory for something else than it is."""
    found = {(tensor.dtype, tensor.device) for tensor in tensors}
    if found != {(dtype, device)}:
        raise ValueError(f"AdamW on a GPU: {name} are {sorted(map(str, found))}; wanted {dtype} on {device}, all in one call")
    if list(map(Tensor.numel, tensors)) != counts:
        raise ValueError(f"AdamW on a GPU: {name} have {[*map(Tensor.numel, tensors)]} elements; wanted {counts}")
    if not all(map(Tensor.is_contiguous, tensors)):
        raise ValueError(
            f"AdamW on a GPU: {name} have strides {[tensor.stride() for tensor in tensors]}; wanted contiguous ones"
        )


def step_encoded(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    exp_avg_absmax: Sequence[Tensor],
    exp_avg_sq_absmax: Sequence[Tensor],
    rules: Sequence[float],
    grad_scale: Tensor | None,
    block_size: int,
) -> None:
    """Returns nothing; steps all tensors in one launch: see adamw_8bit.step_encoded.

    Args:
        params, grads: of one dtype each: float32, bfloat16 or float16.
        block_size: at most LONGEST_BLOCK; a power of two from 4 on is read by the chunk, another by the element.

    Raises:
        ValueError: tensors of several dtypes, sizes or devices, or not contiguous.
    """
    assert 1 <= block_size <= LONGEST_BLOCK
    device, counts = params[0].device, [param.numel() for param in params]
    blocks = [-(-count // block_size) for count in counts]
    _check("params", params, counts, params[0].dtype, device)
    _check("grads", grads, counts, grads[0].dtype, device)
    _check("exp_avg", exp_avg, counts, torch.uint8, device)
    _check("exp_avg_sq", exp_avg_sq, counts, torch.uint8, device)
    _check("exp_avg_absmax", exp_avg_absmax, blocks, torch.float32, device)
    _check("exp_avg_sq_absmax", exp_avg_sq_absmax, blocks, torch.float32, device)
    width = max(4, triton.next_power_of_2(block_size))
    tile = max(TILE, width)
    step = tile // width * block_size
    share = SHARE if sum(counts) >= SHARED_FROM else 1
    addresses = _addresses(params, grads, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax)
    table, programs = _table(addresses, counts, rules, share * step, device)
    if table is None:
        return
    # Of params and grads, and of codes: what four elements are loaded by at once.
    aligned = not any(address % 16 for column in addresses[:2] for address in column)
    aligned = aligned and not any(address % 4 for column in addresses[2:4] for address in column)
    _encoded_kernel[(programs,)](
        table, _lookup(device), params[0], grads[0], grad_scale, table.shape[0], share, SMALLEST_DIVISOR,
        BLOCK=block_size, WIDTH=width, TILE=tile, ALIGNED=aligned,
        ROUND_BFLOAT16=params[0].dtype == torch.bfloat16 and not params[0].is_cuda,
        num_warps=tile // TILE, enable_fp_fusion=False,
    )  # fmt: skip


def step_plain(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    rules: Sequence[float],
    grad_scale: Tensor | None,
) -> None:
    """Returns nothing; steps all tensors in one launch: see adamw_8bit.step_plain and `step_encoded`."""
    device, counts = params[0].device, [param.numel() for param in params]
    _check("params", params, counts, params[0].dtype, device)
    _check("grads", grads, counts, grads[0].dtype, device)
    _check("exp_avg", exp_avg, counts, torch.float32, device)
    _check("exp_avg_sq", exp_avg_sq, counts, torch.float32, device)
    table, programs = _table(_addresses(params, grads, exp_avg, exp_avg_sq), counts, rules, PLAIN_TILE, device)
    if table is not None:
        _plain_kernel[(programs,)](
            table, params[0], grads[0], grad_scale, table.shape[0], TILE=PLAIN_TILE,
            ROUND_BFLOAT16=params[0].dtype == torch.bfloat16 and not params[0].is_cuda, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip

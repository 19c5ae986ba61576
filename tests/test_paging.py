"""Buffers that live on the host and visit the device, under every order in which streams may run."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlite.paging import SLOTS, Lane, PagedBuffer, Pager, Piece

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Streams:
    """A model of CUDA streams: queues whose heads run in any order that the events they wait for allow."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lanes: list[ModelLane] = []

    def lane(self) -> "ModelLane":
        self.lanes.append(ModelLane(self, self.random.choice((0.01, 1.0, 100.0))))
        return self.lanes[-1]

    def progress(self) -> bool:
        """Runs one operation somewhere; False if there is none that may run."""
        ready = [lane for lane in self.lanes if lane.queue and lane.queue[0][0]()]
        if not ready:
            return False
        lane = self.random.choices(ready, [lane.speed for lane in ready])[0]
        lane.queue.pop(0)[1]()
        return True

    def some(self) -> None:
        for _ in range(self.random.choice((0, 0, 1, 3))):
            self.progress()


class ModelLane:
    """The part of the Pager's lanes, and `submit` for the arithmetic of the caller."""

    def __init__(self, streams: Streams, speed: float) -> None:
        self.streams, self.speed, self.queue, self.held = streams, speed, [], []

    def submit(self, run, ready=lambda: True) -> None:
        self.queue.append((ready, run))
        self.streams.some()

    def copy(self, target, source) -> None:
        self.submit(lambda: target.copy_(source))

    def mark(self):
        event = []
        self.submit(lambda: event.append(True))
        return event

    def after(self, event) -> None:
        if event is not None:
            self.submit(lambda: None, lambda: bool(event))

    def hold(self, memory) -> None:
        self.held.append(memory.data_ptr())

    def synchronize(self) -> None:
        while self.queue:
            assert self.streams.progress(), "the streams wait for each other"


def modelled(seed: int) -> tuple[Pager, ModelLane]:
    """A Pager whose three streams are a model's, and the one of them that computes."""
    streams, pager = Streams(seed), Pager(CPU)
    computing, pager._fetching, pager._writing = streams.lane(), streams.lane(), streams.lane()
    pager._computing = lambda: computing
    return pager, computing


def pieces_of(sizes: list[int], cut: int, device: torch.device = CPU) -> list[Piece]:
    """Buffers of n codes and n / 4 floats, longer ones in pieces of `cut` codes."""
    pieces = []
    for n in sizes:
        buffer = PagedBuffer({"codes": ((n,), torch.uint8), "absmax": ((n // 4,), torch.float32)}, device)
        for start in range(0, n, cut):
            stop = min(start + cut, n)
            ranges = {"codes": (start, stop), "absmax": (start // 4, stop // 4)}
            pieces.append(Piece(buffer, None if n <= cut else ranges))
    return pieces


def change(tensors: dict[str, torch.Tensor], index: int) -> None:
    """What a visit does here; the order of two changes shows in the result."""
    tensors["codes"].mul_(3).add_(index + 1)
    tensors["absmax"].mul_(-0.5).add_(index + 1)


def expected(sizes: list[int], cut: int, rounds: int) -> list[torch.Tensor]:
    pieces = pieces_of(sizes, cut)
    for _ in range(rounds):
        for index, piece in enumerate(pieces):
            change(piece.parts(), index)
    return [piece.buffer.bytes.clone() for piece in pieces]


@given(st.lists(st.integers(1, 12).map(lambda n: 4 * n), min_size=1, max_size=6), st.integers(1, 4), st.integers(0, 2**32))
def test_no_order_that_the_events_allow_changes_a_byte(sizes, quarter_cut, seed):
    cut, rounds = 4 * quarter_cut, 3
    pieces = pieces_of(sizes, cut)
    pager, computing = modelled(seed)
    memory = set()

    def dirty(size, **options):
        """Memory that earlier work of the computing stream still writes to, as the caching allocator hands it out."""
        block = torch.zeros(size, **options)
        computing.submit(lambda: block.fill_(0xEE))
        memory.add(block.data_ptr())
        blocks.append(block)
        return block

    blocks = []  # kept alive, so that no two slots have had one address
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", dirty)
        for _ in range(rounds):
            for index, tensors in pager.visits(pieces):
                computing.submit(lambda tensors=tensors, index=index: change(tensors, index))
    pager.synchronize()
    for piece, wanted in zip(pieces, expected(sizes, cut, rounds), strict=True):
        assert torch.equal(piece.buffer.bytes, wanted)
    # The allocator may give a slot away at once unless both side streams are known to it.
    assert memory <= set(pager._fetching.held) and memory <= set(pager._writing.held)


def test_the_model_of_streams_finds_a_missing_event():
    """The twin of the test above: without the wait for the arrival some order shows stale bytes."""
    wrong = 0
    for seed in range(30):
        pager, computing = modelled(seed)
        computing.after = lambda event: None
        pieces = pieces_of([16, 32], 8)
        for index, tensors in pager.visits(pieces):
            computing.submit(lambda tensors=tensors, index=index: change(tensors, index))
        pager.synchronize()
        wanted = expected([16, 32], 8, 1)
        wrong += any(not torch.equal(piece.buffer.bytes, bytes_) for piece, bytes_ in zip(pieces, wanted, strict=True))
    assert wrong > 0


def test_pieces_visit_the_device_in_order_and_keep_their_changes():
    pieces = pieces_of([8, 40, 4], 16)
    pager = Pager(CPU)
    order = []
    for index, tensors in pager.visits(pieces):
        order.append((index, tensors["codes"].numel(), tensors["absmax"].numel()))
        change(tensors, index)
    assert order == [(0, 8, 2), (1, 16, 4), (2, 16, 4), (3, 8, 2), (4, 4, 1)]
    for piece, wanted in zip(pieces, expected([8, 40, 4], 16, 1), strict=True):
        assert torch.equal(piece.buffer.bytes, wanted)


def test_no_pieces_are_no_visits():
    assert list(Pager(CPU).visits([])) == []


def test_a_visit_that_is_broken_off_changes_nothing_and_those_before_stay():
    pieces = pieces_of([8, 8, 8], 8)
    pager = Pager(CPU)
    for index, tensors in pager.visits(pieces):
        change(tensors, index)
        if index == 1:
            break
    wanted = expected([8, 8, 8], 8, 1)
    assert torch.equal(pieces[0].buffer.bytes, wanted[0])
    assert not pieces[1].buffer.bytes.any() and not pieces[2].buffer.bytes.any()


def test_a_buffer_packs_its_tensors_without_a_gap_and_starts_at_zero():
    layout = {"codes": ((3, 5), torch.uint8), "absmax": ((7,), torch.float32), "half": ((3,), torch.bfloat16)}
    buffer = PagedBuffer(layout, CPU)
    assert buffer.nbytes == 15 + 7 * 4 + 3 * 2 == buffer.bytes.numel()
    assert {name: (tuple(t.shape), t.dtype) for name, t in buffer.tensors.items()} == layout
    assert not buffer.bytes.any()
    for value, tensor in enumerate(buffer.tensors.values(), start=1):
        tensor.fill_(value)
    assert all(bool((tensor == value).all()) for value, tensor in enumerate(buffer.tensors.values(), start=1))


def test_memory_that_cannot_be_pinned_is_replaced_by_ordinary_memory_with_a_warning():
    real = torch.zeros

    def refuse(*args, **options):
        if options.pop("pin_memory", False):
            raise RuntimeError("CUDA error: out of memory")
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", refuse)
        with pytest.warns(RuntimeWarning, match="could not be pinned"):
            buffer = PagedBuffer({"codes": ((16,), torch.uint8)}, torch.device("cuda:0"))
    assert buffer.nbytes == 16 and not buffer.bytes.any()


@needs_cuda
def test_on_cuda_random_delays_of_every_stream_change_no_byte():
    device, chance = torch.device("cuda", torch.cuda.current_device()), random.Random(0)
    sizes, cut, rounds = [64, 4096, 2**20, 64, 3 * 2**18, 2**16], 2**18, 6

    class Delayed(Lane):
        def copy(self, target, source):
            with torch.cuda.stream(self.stream):
                torch.cuda._sleep(chance.choice((0, 0, 200_000, 2_000_000)))
            super().copy(target, source)

    pieces = pieces_of(sizes, cut, device)
    assert all(piece.buffer.bytes.is_pinned() for piece in pieces)
    pager = Pager(device)
    pager._fetching, pager._writing = Delayed(pager._fetching.stream), Delayed(pager._writing.stream)
    for _ in range(rounds):
        for index, tensors in pager.visits(pieces):
            torch.cuda._sleep(chance.choice((0, 200_000, 2_000_000)))
            change(tensors, index)
        # The next owner of the slots' memory, if the allocator gives it away too early, spoils what goes home.
        for _ in range(2 * SLOTS):
            torch.full((5 * 2**18 // 2,), 0xEE, dtype=torch.uint8, device=device)
    pager.synchronize()
    for piece, wanted in zip(pieces, expected(sizes, cut, rounds), strict=True):
        assert torch.equal(piece.buffer.bytes, wanted)


@needs_cuda
def test_on_cuda_only_three_pieces_are_on_the_device_at_a_time_and_none_afterwards():
    device = torch.device("cuda", torch.cuda.current_device())
    pieces = [Piece(PagedBuffer({"codes": ((2**22,), torch.uint8)}, device)) for _ in range(8)]
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _, tensors in Pager(device).visits(pieces):
        tensors["codes"].add_(1)
    assert torch.cuda.max_memory_allocated(device) - before <= SLOTS * 2**22
    del tensors
    torch.cuda.synchronize(device)
    assert torch.cuda.memory_allocated(device) == before

"""What a block computes again: the same loss and gradients in every way, what is kept in each, and the ways of inputs to the
host under every order in which streams may run."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import qlite
from qlite import graphs, recompute
from qlite.data import ASSETS
from qlite.graphs import StepGraphs
from qlite.recompute import MODES, BlockInputs, HostMemory
from tests.falcons import FLAVOURS, falcon_of, tokens_of
from tests.test_paging import Streams
from tests.toys import faq, tiny_falcon, tune

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
flavours = pytest.mark.parametrize("flavour", sorted(FLAVOURS))
modes = pytest.mark.parametrize("mode", [True, "selective", "offload"], ids=str)
#: What is trained: everything, adapters inside a block, adapters on the products that it ends with too.
TRAINED = {"all": None, "attention": ("query_key_value",), "all-linear": "all-linear"}


@pytest.fixture(params=["at home", "moved"])
def moved(request, monkeypatch):
    """Whether inputs are copied to the host and back though they are on the CPU."""
    if request.param == "moved":
        monkeypatch.setattr(recompute, "moves", lambda device: True)
    return request.param == "moved"


def model_of(flavour="7b", trained="attention", layers=3, **options):
    config = dataclasses.replace(FLAVOURS[flavour], num_hidden_layers=layers)
    model = falcon_of(config, **options)
    targets = TRAINED[trained]
    if targets is not None:
        qlite.quantize_model(model.requires_grad_(False))
        qlite.add_lora(model, qlite.LoRAConfig(r=2, dropout=0.2, targets=targets), seed=0)
        for module in model.modules():
            if isinstance(module, qlite.LoRALinear):
                nn.init.constant_(module.lora_B, 0.02)
    return model.train()


def gradients(model, mode, rows=2, tokens=70):
    """The loss and gradients of a forward and backward pass, by name."""
    model.zero_grad()
    model.gradient_checkpointing = mode
    torch.manual_seed(3)  # of dropout
    loss = model(tokens_of(model.config, rows, tokens, seed=1)).square().mean()
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found, wanted):
    (loss, grads), (other, others) = found, wanted
    assert torch.equal(loss, other) and grads.keys() == others.keys() and grads
    assert all(torch.equal(grads[name], others[name]) and others[name].any() for name in others)


# The numbers.


@flavours
@modes
@pytest.mark.parametrize("trained", TRAINED)
def test_every_way_gives_the_same_loss_and_gradients_bit_for_bit(flavour, mode, trained):
    model = model_of(flavour, trained)
    same(gradients(model, mode), gradients(model, False))


@flavours
@pytest.mark.parametrize("trained", TRAINED)
def test_inputs_that_went_to_the_host_give_them_too(flavour, trained, monkeypatch):
    monkeypatch.setattr(recompute, "moves", lambda device: True)
    model = model_of(flavour, trained)
    same(gradients(model, "offload"), gradients(model, False))
    assert model.host_memory.nbytes > 0


@modes
@pytest.mark.parametrize("kind", [None, qlite.Linear8bit])
def test_other_weights_than_of_four_bits_give_the_same(mode, kind):
    model = falcon_of(FLAVOURS["40b"]).requires_grad_(False)
    if kind is not None:
        qlite.quantize_model(model, kind)
    qlite.add_lora(model, qlite.LoRAConfig(r=2, targets=("query_key_value",)), seed=0)
    for parameter in qlite.lora_parameters(model):
        nn.init.constant_(parameter, 0.02)
    same(gradients(model.train(), mode), gradients(model, False))


@modes
def test_a_weight_too_large_to_be_kept_decoded_gives_the_same(mode, monkeypatch):
    model = model_of()
    wanted = gradients(model, mode)
    monkeypatch.setattr(recompute, "MOST_KEPT", 0)
    same(gradients(model, mode), wanted)


def test_the_loss_curve_of_the_tiny_base_is_the_same_in_every_way(moved):
    runs = {}
    for mode in MODES.values():
        model = qlite.load_falcon(ASSETS / "tiny-falcon", quantize=qlite.Linear4bit)
        qlite.add_lora(model, qlite.LoRAConfig.qlora_2023(), seed=0)
        optimizer = qlite.PagedAdamW8bit(qlite.lora_parameters(model), lr=5e-3)
        runs[mode] = tune(model, faq(batch_size=4), optimizer, steps=4, gradient_checkpointing=mode)
        assert model.gradient_checkpointing is False and model.host_memory.nbytes == 0
        assert runs[mode].facts["gradient_checkpointing"] == mode
    assert all(run.losses == runs[False].losses for run in runs.values())
    assert runs[False].losses[-1] < runs[False].losses[0]


def test_a_model_keeps_its_own_way_and_others_have_none():
    model = tiny_falcon()
    model.gradient_checkpointing = "selective"
    optimizer = qlite.AdamW8bit(qlite.lora_parameters(model))
    assert tune(model, faq(), optimizer, steps=1).facts["gradient_checkpointing"] == "selective"
    with pytest.raises(ValueError, match="gradient_checkpointing is 'some'; wanted False"):
        tune(model, faq(), optimizer, steps=1, gradient_checkpointing="some")
    assert model.gradient_checkpointing == "selective"
    with pytest.raises(ValueError, match="wanted False, True"):
        model.gradient_checkpointing = 1
    other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"Linear has a switch of its own"):
        tune(other, faq(), torch.optim.SGD(other.parameters()), steps=1, gradient_checkpointing=True)


# What is computed again, and what is kept.


@pytest.mark.parametrize(
    ("mode", "trained", "calls"),
    [
        (False, "attention", (1, 1, 1, 1)),
        ("selective", "attention", (2, 1, 1, 1)),
        (True, "attention", (2, 1, 2, 1)),
        ("offload", "attention", (2, 1, 2, 1)),
        (True, "all-linear", (2, 2, 2, 2)),
        ("selective", "all-linear", (2, 1, 1, 1)),
    ],
)
@pytest.mark.parametrize("flavour", ["7b", "40b", "11b"])
def test_only_what_a_gradient_needs_is_computed_again(mode, trained, calls, flavour):
    model, seen = model_of(flavour, trained), []
    names = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    for name, module in model.transformer.h[1].named_modules():
        if name.rpartition(".")[2] in names:
            module.register_forward_pre_hook(lambda module, _, name=name: seen.append(name.rpartition(".")[2]))
    gradients(model, mode)
    assert tuple(seen.count(name) for name in names) == calls


@pytest.mark.parametrize("mode", [True, "selective"], ids=str)
def test_a_sequential_block_needs_the_sum_after_attention_again(mode):
    model, seen = model_of("rw"), []
    model.transformer.h[1].self_attention.dense.register_forward_pre_hook(lambda *_: seen.append("dense"))
    model.transformer.h[1].mlp.dense_4h_to_h.register_forward_pre_hook(lambda *_: seen.append("end"))
    gradients(model, mode)
    assert seen == ["dense", "end", "dense"]


@pytest.mark.parametrize("name", ["self_attention", "mlp"])
@modes
def test_a_hook_on_attention_or_mlp_is_called_and_may_change_the_result(name, mode):
    model, seen = model_of(), []

    def drop(module, _, output):
        seen.append(module)
        return nn.functional.dropout(output, 0.3)

    getattr(model.transformer.h[0], name).register_forward_hook(drop)
    found = gradients(model, mode)
    assert len(seen) == (1 if name == "mlp" else 2)  # computing again stops at the last thing that is kept
    same(found, gradients(model, False))


def kept(model, mode, rows=2, tokens=128):
    """The bytes of activations that autograd keeps of the blocks, a shared one counted once."""
    known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known and tensor.numel() >= rows * tokens:
            found[storage._cdata] = storage.nbytes()
        return tensor

    model.gradient_checkpointing = mode
    with StepGraphs(model, qlite.lora_parameters(model)):
        x = torch.randn(rows, tokens, model.config.hidden_size, requires_grad=True)
        rotary = model._rotary(torch.arange(tokens)[None], x.dtype)
        again = model._recomputation(x)
        known |= {tensor.untyped_storage()._cdata for tensor in rotary}
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            for block in model.transformer.h:
                x = block(x, rotary, None, None, None, again)
        return sum(found.values())


def test_a_block_keeps_its_input_and_selectively_the_wide_matrix_too():
    model = model_of(layers=4)
    matrix = 4 * 2 * 128 * model.config.hidden_size
    assert kept(model, True) == 4 * matrix
    assert kept(model, "selective") == 4 * (matrix + 4 * matrix)
    # Input, dropped input, heads and their output, the wide matrix, and what the CPU's attention keeps a row.
    assert kept(model, False) > 4 * 8 * matrix


def test_at_home_offload_keeps_what_full_does_and_moved_the_last_input(moved):
    model = model_of(layers=6)
    matrix = 4 * 2 * 128 * model.config.hidden_size
    alive = []

    class Watched(BlockInputs):
        def put(self, x):
            alive.append(weakref.ref(x.untyped_storage()))
            return super().put(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qlite.falcon, "BlockInputs", Watched)
        model.gradient_checkpointing = "offload"
        out = model.hidden_states(tokens_of(model.config, 2, 40))
        assert [reference() is not None for reference in alive] == [not moved] * 5 + [True]
        assert model.host_memory.nbytes == (5 * 2 ** (4 * 2 * 40 * model.config.hidden_size - 1).bit_length() if moved else 0)
        out.sum().backward()
    assert kept(model, "offload") < matrix  # nothing by way of autograd


# The ways to the host and back.


@given(st.integers(1, 7), st.integers(0, 2**32), st.booleans())
def test_no_order_that_the_events_allow_changes_an_input(count, seed, twice):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute, "moves", lambda device: True)
        streams, memory, blocks = Streams(seed), HostMemory(), []
        computing, leaving, arriving = [streams.lane() for _ in range(3)]

        def dirty(*size, **options):
            """Memory that earlier work of the computing stream still writes to, as the caching allocator hands it out."""
            blocks.append(torch.zeros(*size, **options))
            computing.submit(lambda block=blocks[-1]: block.fill_(-1))
            return blocks[-1]

        patch.setattr(torch, "empty", dirty)
        for step in range(3):
            inputs = BlockInputs(memory, count, CPU)
            inputs.leaving, inputs.arriving, inputs._computing = leaving, arriving, lambda: computing
            x = before = None
            for layer in range(count):
                x = torch.zeros(4)
                computing.submit(lambda x=x, value=100 * step + layer: x.fill_(value))
                assert inputs.put(x) == layer
                if before is not None:  # whose memory the allocator may have given away
                    computing.submit(lambda before=before: before.fill_(-2))
                before = x
            for layer in list(reversed(range(count))) * (1 + twice):
                found = inputs.take(layer)
                assert len(inputs.here) <= 2
                read = []
                computing.submit(lambda found=found, read=read: read.append(found.clone()))
                if layer < count - 1:  # the last one stays, for a second backward pass
                    computing.submit(lambda found=found: found.fill_(-3))
                computing.synchronize()
                assert torch.equal(read[0], torch.full((4,), 100.0 * step + layer))
            # Nothing is left that the computing stream has not waited for: a recording could not end with it.
            assert not leaving.queue and not arriving.queue
            del inputs
            assert len(memory.free) == count - 1 and not leaving.held and not arriving.held


def test_two_forward_passes_at_once_have_slots_of_their_own(monkeypatch):
    monkeypatch.setattr(recompute, "moves", lambda device: True)
    model = model_of(layers=4)
    found = []
    for mode in (False, "offload"):
        model.zero_grad()
        model.gradient_checkpointing = mode
        torch.manual_seed(0)
        sum(model(tokens_of(model.config, 1, length)).square().mean() for length in (9, 20)).backward()
        found.append([p.grad.clone() for p in qlite.lora_parameters(model)])
    assert all(map(torch.equal, *found))
    assert len(model.host_memory.free) == 6
    gradients(model, "offload", rows=1, tokens=20)
    assert len(model.host_memory.free) == 6  # used again
    model.host_memory.clear()
    assert model.host_memory.nbytes == 0 and not model.host_memory.free


def test_a_graph_that_is_gone_through_twice_or_in_part_gives_its_slots_back(monkeypatch):
    monkeypatch.setattr(recompute, "moves", lambda device: True)
    model = model_of(layers=4)
    model.gradient_checkpointing = "offload"
    loss = model(tokens_of(model.config, 1, 9)).square().mean()
    parameters = qlite.lora_parameters(model)
    first, second = (torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second)) and not model.host_memory.free
    (last,) = torch.autograd.grad(loss, parameters[-1:])
    assert torch.equal(last, first[-1])
    del loss
    assert len(model.host_memory.free) == 3


@modes
def test_blocks_below_the_first_adapter_are_computed_once_and_keep_nothing(mode, monkeypatch):
    monkeypatch.setattr(recompute, "moves", lambda device: True)
    model = falcon_of(dataclasses.replace(FLAVOURS["7b"], num_hidden_layers=5)).requires_grad_(False)
    qlite.add_lora(model, qlite.LoRAConfig(r=2, targets=("query_key_value",), layers=(2, 4)), seed=0)
    for parameter in qlite.lora_parameters(model):
        nn.init.constant_(parameter, 0.02)
    seen = []
    for number, block in enumerate(model.transformer.h):
        block.self_attention.query_key_value.register_forward_pre_hook(lambda *_, number=number: seen.append(number))
    found = gradients(model.train(), mode)
    assert seen == [0, 1, 2, 3, 4, 4, 3, 2]
    assert len(model.host_memory.free) == (2 if mode == "offload" else 0)  # of blocks 2 and 3; that of 4 stays
    same(found, gradients(model, False))


def test_without_gradients_or_in_evaluation_nothing_goes_to_the_host(monkeypatch):
    monkeypatch.setattr(recompute, "moves", lambda device: True)
    model = model_of()
    model.gradient_checkpointing = "offload"
    ids = tokens_of(model.config, 1, 9)
    with torch.no_grad():
        model(ids)
    model.eval()(ids)
    assert model.host_memory.nbytes == 0


def test_a_slot_is_the_smallest_that_fits_and_copies_of_a_model_have_none():
    memory = HostMemory()
    small, large = memory.lend(1000, CPU), memory.lend(5000, CPU)
    assert (small.nbytes, large.nbytes, memory.nbytes) == (1024, 8192, 9216)
    memory.free += [large, small]
    assert memory.lend(1024, CPU) is small and memory.lend(1, CPU) is large
    meta = memory.lend(5000, torch.device("meta"))
    assert meta.memory is None and meta.view(torch.Size([3]), torch.float32) is None
    for twin in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert isinstance(twin, HostMemory) and twin.nbytes == 0 and twin.free == []


# On a GPU.


@needs_gpu
@modes
@pytest.mark.parametrize("flavour", ["7b", "40b", "rw"])
def test_on_cuda_every_way_gives_the_same_gradients(flavour, mode):
    model = model_of(flavour, layers=6).cuda()
    found = []
    for each in (False, mode):
        model.zero_grad()
        model.gradient_checkpointing = each
        torch.manual_seed(3)
        model(tokens_of(model.config, 2, 200).cuda()).square().mean().backward()
        found.append([p.grad.clone() for p in qlite.lora_parameters(model)])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() and other.any()


@needs_gpu
def test_on_cuda_random_delays_of_the_copies_change_no_bit():
    delays = itertools.cycle((0, 2_000_000, 0, 200_000, 5_000_000))

    class Delayed(recompute.Lane):
        def copy(self, target, source):
            with torch.cuda.stream(self.stream):
                torch.cuda._sleep(next(delays))
            super().copy(target, source)

    class Slow(BlockInputs):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.leaving, self.arriving = Delayed(self.leaving.stream), Delayed(self.arriving.stream)

    model = model_of(layers=12).cuda()
    ids = tokens_of(model.config, 4, 500).cuda()
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for mode in (True, "offload", "offload"):
            patch.setattr(qlite.falcon, "BlockInputs", Slow)
            model.zero_grad()
            model.gradient_checkpointing = mode
            torch.manual_seed(3)
            model(ids).square().mean().backward()
            found.append([p.grad.clone() for p in qlite.lora_parameters(model)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_gpu
def test_on_cuda_a_recording_that_breaks_off_between_copies_ends_and_the_next_is_made():
    model = model_of(layers=6).cuda()
    model.gradient_checkpointing = "offload"
    ids = tokens_of(model.config, 2, 64).cuda()
    found = []
    for broken in (False, True):
        model.zero_grad()
        with StepGraphs(model, qlite.lora_parameters(model)) as steps:
            for number, seed in enumerate(steps.seeds):
                seed.fill_(100 + number)
            static = graphs._Static(ids, ids.flatten())
            if broken:
                handle = model.transformer.h[3].mlp.dense_h_to_4h.register_forward_hook(no_memory)
                with pytest.raises(torch.OutOfMemoryError):
                    steps._record(static)
                handle.remove()
            else:
                steps.run(ids, ids.flatten())  # what is compiled, and the slots
            for parameter in steps.parameters:
                parameter.grad.zero_()
            steps._record(static)
            static.graph.replay()
            torch.cuda.synchronize()
            found.append([parameter.grad.clone() for parameter in steps.parameters])
    assert all(map(torch.equal, *found)) and all(gradient.any() for gradient in found[0])


def no_memory(*_):
    raise torch.OutOfMemoryError("none left")


@needs_gpu
def test_on_cuda_the_device_holds_the_same_however_many_blocks_there_are():
    peaks = {}
    for mode, layers in itertools.product((True, "offload"), (8, 24)):
        model = model_of(layers=layers).cuda()
        model.gradient_checkpointing = mode
        ids = tokens_of(model.config, 64, 400).cuda()
        with StepGraphs(model, qlite.lora_parameters(model)) as steps:
            for _ in range(2):
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                steps.run(ids, ids.flatten())
            peaks[mode, layers] = torch.cuda.max_memory_allocated() - before
    matrix = 4 * 64 * 400 * FLAVOURS["7b"].hidden_size
    assert peaks[True, 24] - peaks[True, 8] >= 15 * matrix
    assert abs(peaks["offload", 24] - peaks["offload", 8]) < matrix

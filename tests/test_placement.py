"""Placement: streamed modules give the bits of resident ones, and nothing that visited stays.

Where there is no GPU two stand-ins serve. The CPU visits itself: the same hooks and copies, with numbers that can be
compared. And the meta device computes: shapes alone, but whatever lives on it can be counted to the byte.
"""

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qlite
from qlite import placement
from qlite.experts import ExpertStack
from qlite.placement import _Visit, place_model
from qlite.prefetch import Prefetch
from tests.adapted import adapt, base_of
from tests.falcons import tokens_of
from tests.toys import TOKENIZER, faq, tiny_falcon

CPU, META = torch.device("cpu"), torch.device("meta")
KINDS = {
    "nf4": qlite.Linear4bit,
    "plain absmax": functools.partial(qlite.Linear4bit, double_quant=False),
    "int8": qlite.Linear8bit,
    "dense": None,
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def seeded(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def adapted_falcon(kind, flavour="7b"):
    model = base_of(kind, flavour)
    adapt(model)
    return model


def visits_of(model):
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [hook.__self__ for hook in hooks]


def streamed(model, compute=CPU):
    """The model with a visit for every module of tensors of its own, its adapters apart."""
    prefetch = Prefetch(compute)
    for name, module in model.named_modules():
        if any(True for _ in placement._own(module)) and not isinstance(module, qlite.LoRALinear):
            placement._stream(name, module, prefetch)
    return model


def gradients(model, ids):
    model.zero_grad()
    model(ids).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


class MetaMemory(TorchDispatchMode):
    """Counts the bytes of what is made and dropped on meta, and of what is copied there."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.copied = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default and args[0].device.type == "meta" and args[1].device.type == "cpu":
            self.copied += args[1].nbytes
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                self.see(tensor.untyped_storage())
        return result

    def see(self, storage):
        if id(storage) not in self.known:
            self.known.add(id(storage))
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, id(storage), storage.nbytes())

    def forget(self, key, size):
        self.known.discard(key)
        self.live -= size


# The numbers.


@kinds
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("flavour", ["7b", "40b", "rw"])
def test_a_streamed_falcon_gives_the_logits_and_gradients_of_a_resident_one_bit_for_bit(kind, checkpointing, flavour):
    resident = adapted_falcon(kind, flavour).train()
    model = streamed(copy.deepcopy(resident))
    ids = tokens_of(model.config, 2, 7)
    for each in (resident, model):
        each.gradient_checkpointing = checkpointing
    assert torch.equal(model(ids), resident(ids))
    found, wanted = gradients(model, ids), gradients(resident, ids)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@kinds
def test_gradients_flow_to_the_input_through_a_streamed_layer(kind):
    layer = nn.Linear(65, 40) if kind is None else kind(65, 40).quantize_(seeded(40, 65))
    layer.requires_grad_(False)
    twin = streamed(nn.Sequential(copy.deepcopy(layer)))
    x, y = seeded(3, 65).requires_grad_(), seeded(3, 65).requires_grad_()
    layer(x).square().sum().backward()
    twin(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("kind", [qlite.Linear4bit, qlite.Linear8bit])
def test_an_expert_visits_for_its_product_and_a_stack_never_as_a_whole(kind):
    resident = ExpertStack(seeded(3, 40, 96), kind)
    stack = streamed(nn.ModuleDict({"experts": copy.deepcopy(resident)}))["experts"]
    home = dict(stack.named_parameters())
    asked = []
    fetch = stack.elsewhere.args[1].fetch
    stack.elsewhere.args[1].fetch = lambda name, key, t, **o: asked.append((name, t.shape)) or fetch(name, key, t, **o)
    x, y = seeded(5, 96).requires_grad_(), seeded(5, 96).requires_grad_()
    for index in (2, 0):
        one, other = (nn.functional.linear(value, each[index]) for value, each in ((x, resident), (y, stack)))
        assert torch.equal(one, other)
        one.square().sum().backward()
        other.square().sum().backward()
    assert torch.equal(x.grad, y.grad) and {name for name, _ in asked} == {"experts.2", "experts.0"}
    assert len(asked) > 4 and all(shape[0] != 3 for _, shape in asked)  # never three experts
    assert all(home[key] is parameter for key, parameter in stack.named_parameters())
    place_model(model := nn.ModuleDict({"experts": stack}), {"": "cpu"}, compute="cpu")
    assert model["experts"].elsewhere is None


def test_generated_tokens_are_those_of_the_resident_model():
    model = adapted_falcon(qlite.Linear4bit)
    wanted = qlite.generate(model, [3, 1, 4], max_new_tokens=6)
    assert qlite.generate(streamed(model), [3, 1, 4], max_new_tokens=6) == wanted


def test_a_fine_tuning_of_a_streamed_model_is_that_of_a_resident_one():
    runs = []
    for stream in (False, True):
        model = tiny_falcon()
        model.gradient_checkpointing = True
        optimizer = qlite.PagedAdamW8bit(qlite.lora_parameters(model), lr=1e-2)
        result = qlite.finetune(streamed(model) if stream else model, faq(), optimizer, steps=2, progress=False)
        runs.append((result.losses, [parameter.detach().clone() for parameter in qlite.lora_parameters(model)]))
    (losses, weights), (others, twins) = runs
    assert losses == others and all(map(torch.equal, weights, twins))


def test_forward_mode_and_inference_mode_go_through_a_visit():
    layer = qlite.Linear4bit(64, 32).quantize_(seeded(32, 64)).requires_grad_(False)
    twin, x = streamed(nn.Sequential(copy.deepcopy(layer))), seeded(2, 64)
    assert torch.equal(torch.func.jvp(twin, (x,), (x,))[1], torch.func.jvp(layer, (x,), (x,))[1])
    with torch.inference_mode():
        assert torch.equal(twin(x), layer(x))


# The memory.


def stack_of(kind, home, layers=6):
    make = nn.Linear if kind is None else kind
    model = nn.Sequential(*[make(512, 512, device=home) for _ in range(layers)]).requires_grad_(False)
    return model, sum(tensor.nbytes for tensor in model[0].state_dict().values())


@kinds
def test_the_computing_device_holds_a_visiting_layer_and_the_next_in_both_passes(kind):
    model, layer = stack_of(kind, "cpu")
    place_model(model, {"": "cpu"}, compute="meta")
    activations = 4 * 512 * 4  # bytes: an output, its gradient, that of the loss, and one to spare
    for held in (1, 2, 2):  # the first pass does not know what comes next
        x = torch.randn(1, 512, device="meta").requires_grad_()
        with MetaMemory() as memory:
            loss = model(x).sum()
            assert memory.copied == 6 * layer and memory.live <= activations
            loss.backward()
        assert x.grad.shape == x.shape
        # The backward pass asks for all but the bias again; nothing is copied in vain.
        assert 12 * (layer - 512 * 4) <= memory.copied <= 12 * layer
        assert held * (layer - 512 * 4) <= memory.peak <= held * layer + activations


@kinds
def test_recomputed_blocks_stream_again_and_still_two_layers_at_a_time(kind):
    model, layer = stack_of(kind, "cpu")
    place_model(model, {"": "cpu"}, compute="meta")
    blocks = [nn.Sequential(model[i], nn.GELU(), model[i + 1]) for i in (0, 2, 4)]
    for held in (1, 2, 2):
        hidden = x = torch.randn(1, 512, device="meta").requires_grad_()
        with MetaMemory() as memory:
            for block in blocks:
                hidden = torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=False)
            hidden.sum().backward()
        assert x.grad.shape == x.shape
        # Forward, recomputed up to what the GELU kept (its input: the first layer of each block), backward without the bias.
        assert 15 * layer - 6 * 512 * 4 <= memory.copied <= 15 * layer
        assert held * (layer - 512 * 4) <= memory.peak <= held * layer + 8 * 512 * 4


def test_what_a_graph_keeps_of_a_visit_is_the_tensor_at_home():
    model = streamed(nn.Sequential(qlite.Linear4bit(64, 32).quantize_(seeded(32, 64)).requires_grad_(False)))
    seen = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(module.weight.untyped_storage())))
    gc.disable()
    try:
        y = model(seeded(2, 64).requires_grad_())
        assert y.requires_grad and len(seen) == 1 and seen[0]() is None
    finally:
        gc.enable()


# Homes.


def test_the_longest_name_decides_and_adapters_live_where_they_are_trained():
    model = adapted_falcon(qlite.Linear4bit)
    homes = {"": "meta", "transformer.h.1": "cpu", "transformer.h.1.mlp.dense_h_to_4h": "meta"}
    report = place_model(model, homes, compute="meta")
    at_home = {name for name, home in report.homes.items() if home == "cpu"}
    assert at_home == set(report.streamed) == {
        "transformer.h.1.input_layernorm", "transformer.h.1.self_attention.query_key_value.base",
        "transformer.h.1.self_attention.dense.base", "transformer.h.1.mlp.dense_4h_to_h.base",
    }  # fmt: skip
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        assert {tensor.device.type for tensor in own} <= {"cpu" if name in at_home else "meta"}
    assert {parameter.device.type for parameter in qlite.lora_parameters(model)} == {"meta"}
    ids = tokens_of(model.config, 2, 7).to("meta")
    model.train()(ids).sum().backward()
    assert all(parameter.grad.device.type == "meta" for parameter in qlite.lora_parameters(model))


def test_the_report_counts_every_byte_once_and_says_what_a_pass_copies():
    model = adapted_falcon(qlite.Linear4bit, "11b")
    total = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    report = place_model(model, {"": "meta", "transformer.h.0": "cpu"}, compute="meta")
    assert sum(report.nbytes.values()) == total and report.nbytes["cpu"] == sum(report.streamed.values())
    largest = max(report.streamed.values()) / 1e6
    assert f"streamed to meta: {report.nbytes['cpu'] / 1e6:,.1f} MB a forward pass in 5 visits" in str(report)
    assert f"the largest {largest:,.1f} MB (transformer.h.0.mlp" in str(report)


def test_placing_again_places_anew_and_all_on_one_device_ends_the_visits():
    model = adapted_falcon(qlite.Linear4bit)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids, wanted = tokens_of(model.config, 2, 7), model(tokens_of(model.config, 2, 7))
    streamed(model)
    once = len(visits_of(model))
    place_model(model, {"": "cpu"}, compute="cpu")
    assert once and not visits_of(model) and torch.equal(model(ids), wanted)
    for module in model.modules():
        hooks = (module._forward_hooks, module._forward_hooks_always_called, module._forward_pre_hooks_with_kwargs)
        assert not any(hooks)
    streamed(model)
    assert len(visits_of(model)) == once and torch.equal(model(ids), wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_state_dict_of_a_streamed_model_is_that_at_home():
    model = adapted_falcon(qlite.Linear4bit)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    streamed(model)
    gradients(model, tokens_of(model.config, 2, 7))
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_streams_its_own_tensors(copied):
    model = streamed(adapted_falcon(qlite.Linear4bit))
    ids, wanted = tokens_of(model.config, 2, 7), model(tokens_of(model.config, 2, 7))
    twin = copied(model)
    model.lm_head.weight.data.zero_()  # tied: the embedding too
    assert torch.equal(twin(ids), wanted) and len(visits_of(twin)) == len(visits_of(model))
    assert not {id(visit) for visit in visits_of(twin)} & {id(visit) for visit in visits_of(model)}
    place_model(twin, {"": "cpu"}, compute="cpu")
    assert not visits_of(twin) and visits_of(model)


def test_an_adapter_is_saved_from_and_loaded_into_a_streamed_model(tmp_path):
    model = streamed(adapted_falcon(qlite.Linear4bit))
    qlite.save_adapter(model, tmp_path / "adapter")
    other = streamed(base_of(qlite.Linear4bit))
    qlite.load_adapter(other, tmp_path / "adapter")
    ids = tokens_of(model.config, 2, 7)
    assert torch.equal(other(ids), model(ids))


def test_keyword_arguments_reach_a_streamed_layer():
    model = nn.Sequential(nn.Embedding(10, 8)).requires_grad_(False)
    wanted = model(torch.arange(10))
    streamed(model)
    assert torch.equal(model[0](input=torch.arange(10)), wanted)


# What goes wrong.


class Failing(nn.Linear):
    def forward(self, x):
        raise KeyError("inside")


def test_a_forward_that_fails_leaves_every_tensor_at_home_and_no_hook_of_autograd(monkeypatch):
    asked = []
    monkeypatch.setattr(_Visit, "keep", lambda self, tensor: asked.append(tensor) or tensor)
    model = streamed(nn.Sequential(Failing(8, 8)).requires_grad_(False))
    home = dict(model[0]._parameters)
    with pytest.raises(KeyError, match="inside"):
        model(seeded(2, 8))
    assert all(model[0]._parameters[name] is tensor for name, tensor in home.items())
    x = seeded(2, 8).requires_grad_()
    (x * x).sum().backward()
    assert not asked


def test_a_forward_that_changes_a_visitor_is_refused_by_name():
    model = streamed(nn.Sequential(nn.BatchNorm1d(8)).requires_grad_(False)).train()
    with pytest.raises(RuntimeError, match=r"0: its forward wrote to num_batches_tracked, which only visited"):
        model(seeded(4, 8))
    assert model.eval()(seeded(4, 8)).shape == (4, 8)


@pytest.mark.parametrize("call", [lambda model, x: model(x), lambda model, x: model[0](input=x)])
def test_an_input_elsewhere_is_refused_with_both_devices(call):
    model = streamed(nn.Sequential(nn.Linear(8, 8)).requires_grad_(False))
    with pytest.raises(ValueError, match="0 computes on cpu, its input is on meta; move it there"):
        call(model, torch.ones(2, 8, device="meta"))


def attention():
    return nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}).requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "homes", "compute", "words"),
    [
        (None, {"": "cpu", "transformer.h.7": "cpu"}, "meta", r"no module 'transformer.h.7'; close names: transformer.h"),
        (None, {"": "cpu", "lm_head.weight": "cpu"}, "meta", "no module 'lm_head.weight'; close names: lm_head"),
        (None, {"transformer": "cpu"}, "meta", "lm_head has no home; give '' one"),
        (None, {"": "meta"}, "cpu", "the home of '' is meta; wanted 'cpu' or the computing device, cpu"),
        (None, {"": "cuda:99"}, "cpu", "this machine has .* CUDA GPUs"),
        (None, {"": "cpu"}, "cuda:99", "this machine has .* CUDA GPUs"),
        (
            None,
            {"": "cpu", "lm_head": "meta"},
            "meta",
            "lm_head.weight is also transformer.word_embeddings.weight, at home on cpu",
        ),
        (
            lambda: nn.Sequential(nn.Linear(8, 8)),
            {"": "cpu"},
            "meta",
            r"2 trained parameters away from meta \(0.weight, 0.bias\)",
        ),
        (lambda: nn.Sequential(nn.Linear(8, 8, device="meta")), {"": "cpu"}, "cpu", "0.weight is on meta, without values"),
        (attention, {"": "cpu"}, "meta", "attention.out_proj is read by the module above it; give it meta"),
    ],
)
def test_what_cannot_be_placed_is_refused_before_anything_moves(make, homes, compute, words):
    model = adapted_falcon(qlite.Linear4bit) if make is None else make()
    before = {name: (id(tensor), tensor.device) for name, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(ValueError, match=words):
        place_model(model, homes, compute=compute)
    assert {name: (id(tensor), tensor.device) for name, tensor in model.state_dict(keep_vars=True).items()} == before
    assert not visits_of(model)


def test_torch_compile_runs_a_streamed_model_in_pieces():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU()).requires_grad_(False)
    qlite.quantize_model(model)
    x, wanted = seeded(2, 64), model(seeded(2, 64))
    assert torch.equal(torch.compile(streamed(model), backend="eager")(x), wanted)


# On a GPU. (These were written without one at hand.)

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@cuda
@kinds
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_cuda_a_streamed_falcon_gives_the_bits_of_a_resident_one(kind, checkpointing):
    resident = adapted_falcon(kind).train()
    model = copy.deepcopy(resident)
    resident.cuda()
    place_model(model, {"": "cuda", "transformer.h": "cpu"}, compute="cuda")
    at_home = [tensor for name, tensor in model.state_dict().items() if tensor.device.type == "cpu"]
    assert at_home and all(tensor.is_pinned() for tensor in at_home)
    ids = tokens_of(model.config, 2, 7).cuda()
    for each in (resident, model):
        each.gradient_checkpointing = checkpointing
    assert torch.equal(model(ids), resident(ids))
    found, wanted = gradients(model, ids), gradients(resident, ids)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@cuda
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_cuda_memory_is_what_is_resident_and_two_layers(checkpointing):
    def peak_of(home):
        model = nn.Sequential(*[qlite.Linear4bit(2048, 2048).quantize_(seeded(2048, 2048)) for _ in range(8)])
        model.requires_grad_(False)
        place_model(model, {"": home}, compute="cuda")
        run = functools.partial(torch.utils.checkpoint.checkpoint, model, use_reentrant=False) if checkpointing else model
        for _ in range(2):  # the first pass learns what comes next, and no module is copied ahead
            x = torch.randn(4, 2048, device="cuda").requires_grad_()
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.cuda._sleep(10**8)  # the host runs ahead of the device, and may not take memory for it
            run(x).sum().backward()
            torch.cuda.synchronize()
        return before, torch.cuda.max_memory_allocated() - before, model[0].encoded_bytes()

    peak_of("cuda")  # what libraries allocate for themselves at their first call stays
    gc.collect()
    resident, working, layer = peak_of("cuda")
    gc.collect()
    streaming, peak, _ = peak_of("cpu")
    # Two layers, 512 bytes for each of their tensors, which the allocator rounds up to, and of two blocks of more than 1 MiB
    # what it does not split off: up to 1 MiB each.
    assert peak <= working + 2 * (layer + 6 * 512 + 2**20)
    assert resident - streaming >= 8 * layer


class Slow(nn.Linear):
    """A layer whose arithmetic takes half a second, and what `during` says while it runs."""

    during = staticmethod(lambda: None)

    def forward(self, x):
        torch.cuda._sleep(10**9)
        self.during()
        return super().forward(x)


@cuda
def test_on_cuda_the_next_layer_arrives_while_this_one_computes():
    model = nn.Sequential(Slow(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    x = torch.randn(2, 64, device="cuda")
    place_model(model, {"": "cpu"}, compute="cuda")
    wanted, seen = model(x), []
    prefetch = visits_of(model)[0].prefetch

    def during():
        for ahead in prefetch.pending:
            ahead.done.synchronize()
        seen.append(([ahead.place.name for ahead in prefetch.pending], torch.cuda.current_stream().query()))

    model[0].during = during
    assert torch.equal(model(x), wanted)
    assert not prefetch.pending and seen == [(["1", "1"], False)]  # both tensors of it are here, and the device is still busy


@cuda
@kinds
@pytest.mark.parametrize("slow", ["copies", "arithmetic"])
def test_on_cuda_whichever_stream_is_slow_the_other_waits_for_it(kind, slow, monkeypatch):
    model, _ = stack_of(kind, "cpu")
    for index, layer in enumerate(model):
        layer.load_state_dict(kind(512, 512).quantize_(seeded(512, 512) * (index + 1)).state_dict() if kind else {
            "weight": seeded(512, 512) * (index + 1), "bias": seeded(512)})  # fmt: skip
    resident = copy.deepcopy(model).cuda()
    place_model(model, {"": "cpu"}, compute="cuda")
    copied = Prefetch._begin

    def late(self, place, home):
        with torch.cuda.stream(self.side if slow == "copies" else torch.cuda.current_stream()):
            torch.cuda._sleep(10**6)
        return copied(self, place, home)

    monkeypatch.setattr(Prefetch, "_begin", late)
    for step in range(4):
        x, y = (torch.full((3, 512), 1.0 + step, device="cuda", requires_grad=True) for _ in range(2))
        one, other = model(x), resident(y)
        one.sum().backward()
        other.sum().backward()
        assert torch.equal(one, other) and torch.equal(x.grad, y.grad)


@cuda
def test_on_cuda_generation_and_training_run_with_blocks_at_home_on_the_cpu():
    model = tiny_falcon(dropout=0.0)
    place_model(model, {"": "cuda", "transformer.h.1": "cpu"}, compute="cuda")
    optimizer = qlite.PagedAdamW8bit(qlite.lora_parameters(model), lr=1e-2)
    result = qlite.finetune(model, faq(), optimizer, steps=2, progress=False)
    assert len(result.losses) == 2
    assert qlite.generate(model, TOKENIZER.encode("Hello").ids, max_new_tokens=3)


@cuda
@pytest.mark.parametrize("kind", [qlite.Linear4bit, qlite.Linear8bit])
def test_on_cuda_an_expert_visits_for_its_product(kind):
    model = nn.ModuleDict({"experts": ExpertStack(seeded(3, 128, 256), kind)})
    resident = copy.deepcopy(model).cuda()["experts"]
    place_model(model, {"": "cpu"}, compute="cuda")
    stack = model["experts"]
    assert all(tensor.device.type == "cpu" and tensor.is_pinned() for tensor in stack.state_dict().values())
    for index in (2, 0, 1, 2, 0, 1):
        x, y = (torch.ones(5, 256, device="cuda", requires_grad=True) for _ in range(2))
        one, other = nn.functional.linear(x, resident[index]), nn.functional.linear(y, stack[index])
        one.square().sum().backward()
        other.square().sum().backward()
        assert torch.equal(one, other) and torch.equal(x.grad, y.grad)

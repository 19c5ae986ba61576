"""What PyTorch users do with modules: each door opens, or says why not. docs/pytorch.md is the table of what is here.

The layers alone (copies, state dicts, casts, torch.compile with its default backend) are in test_linear.py and test_ops.py.
"""

import copy
import functools
import gc
import io
import pathlib
import pickle
import re
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

import qlite
from qlite.nf4 import FP4_LEVELS
from tests.strategies import UNIFORM_LEVELS
from tests.toys import GOOD, Toy, faq, sgd, tiny_falcon, tune
from tests.workers import Encoded

ROOT = pathlib.Path(__file__).parents[1]
#: 65 columns: the last byte of a row is half used, and the last block is short.
KINDS = {
    "nf4": qlite.Linear4bit,
    "fp4": functools.partial(qlite.Linear4bit, levels=FP4_LEVELS),
    "custom": functools.partial(qlite.Linear4bit, levels=UNIFORM_LEVELS, block_size=32),
    "plain absmax": functools.partial(qlite.Linear4bit, double_quant=False),
    "no bias": functools.partial(qlite.Linear4bit, bias=False),
    "int8": qlite.Linear8bit,
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
#: Float32 products of at most 65 terms in two orders of summation, on values up to some hundreds.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def seeded(*shape, seed=11):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer_of(kind, out_features=33, in_features=65):
    layer = kind(in_features, out_features).quantize_(seeded(out_features, in_features) / in_features**0.5)
    if layer.bias is not None:
        layer.bias.data = seeded(out_features)
    return layer.requires_grad_(False)


def adapted(kind, layers=2, dropout=0.0):
    """A stack of layers with adapters whose B is not zero: gradients of the first pass through the others' bases."""
    model = nn.Sequential(*[layer_of(kind, 65) for _ in range(layers)], nn.GELU())
    qlite.add_lora(model, qlite.LoRAConfig(r=3, dropout=dropout), seed=0)
    for index, parameter in enumerate(qlite.lora_parameters(model)):
        parameter.data = seeded(*parameter.shape, seed=index) / 8
    return model


def adapters_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model, x, call=None):
    model.zero_grad()
    (call or model)(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def dense_twin(layer):
    """The layer's function over its decoded weight, in plain PyTorch."""
    weight, bias = layer.dequantize(), layer.bias
    return lambda x: nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# torch.compile and torch.export.


@kinds
def test_a_compiled_model_of_adapted_layers_is_one_graph_and_gives_the_same_bits(kind, fresh_dynamo):
    model, x = adapted(kind), seeded(4, 65)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))
    assert same(gradients(model, x, compiled), gradients(model, x))


def test_new_batch_sizes_are_compiled_once_and_for_all(fresh_dynamo):
    model, counter = adapted(qlite.Linear4bit, layers=1), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in (2, 3, 5, 8, 13):
        x = seeded(rows, 65)
        assert same(gradients(model, x, compiled), gradients(model, x))
    assert counter.frame_count == 2  # the first size, and then any


def test_a_compiled_falcon_takes_any_length_without_compiling_again(fresh_dynamo):
    config = qlite.FalconConfig(vocab_size=32, hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
    model, counter = qlite.Falcon(config).init_weights_(seed=0), CompileCounterWithBackend("eager")
    qlite.quantize_model(model)
    qlite.add_lora(model, qlite.LoRAConfig(r=2, dropout=0.0, targets=["dense"]), seed=0)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for length in (3, 5, 9):
        ids = torch.arange(2 * length).view(2, length)
        assert torch.equal(compiled(ids), model(ids))
    assert counter.frame_count == 1


def test_forward_mode_inside_torch_compile_breaks_the_graph_and_is_refused_in_one_graph(fresh_dynamo):
    layer, x = layer_of(qlite.Linear4bit), seeded(2, 65)

    def push(x):
        return jvp(layer, (x,), (x,))[1]

    assert torch.equal(torch.compile(push, backend="eager")(x), push(x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"no forward mode inside torch\.compile"):
        torch.compile(push, backend="eager", fullgraph=True)(x)


def test_an_exported_model_gives_the_same_bits_for_any_batch_size():
    model, x = adapted(qlite.Linear4bit).eval(), seeded(4, 65)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    for rows in (4, 7):
        assert torch.equal(exported(seeded(rows, 65)), model(seeded(rows, 65)))


# torch.autocast.


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_autocast_gives_an_encoded_layer_the_dtype_it_gives_a_dense_one(kind, dtype):
    layer, x = layer_of(kind), seeded(4, 65).to(dtype).requires_grad_()
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = layer(x)
            dense = nn.Linear(65, 33, dtype=dtype)(x)
        assert y.dtype == dense.dtype
        (grad_x,) = torch.autograd.grad(y.sum(), x)
        assert grad_x.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x.float()), layer(x.float().bfloat16()))


@kinds
def test_under_autocast_adapters_keep_float32_gradients_near_those_without(kind):
    model, x = adapted(kind), seeded(4, 65)
    wanted = gradients(model, x)

    def cast(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        assert y.dtype == torch.bfloat16
        return y.float()

    for name, found in gradients(model, x, cast).items():
        # At most 16 roundings of 2^-9, norm-wise: weights, inputs, outputs, both factors, two layers, both passes.
        assert found.dtype == torch.float32 and (found - wanted[name]).norm() <= 16 * 2**-9 * wanted[name].norm()
    assert same(gradients(model, x), wanted)


# torch.func.


@kinds
def test_transforms_of_a_layer_are_those_of_the_decoded_weight(kind):
    layer, x, v = layer_of(kind), seeded(4, 65), seeded(4, 65, seed=12)
    dense = dense_twin(layer)
    close = functools.partial(torch.testing.assert_close, **CLOSE)
    close(jvp(layer, (x,), (v,)), jvp(dense, (x,), (v,)))
    close(vjp(layer, x)[1](layer(v)), vjp(dense, x)[1](layer(v)))
    close(jacrev(layer)(x[0]), jacrev(dense)(x[0]))
    close(jacfwd(layer)(x[0]), jacfwd(dense)(x[0]))
    close(hessian(lambda x: layer(x).pow(3).sum())(x[0]), hessian(lambda x: dense(x).pow(3).sum())(x[0]))
    close(vmap(layer, in_dims=1)(x.T), dense(x))
    close(vmap(grad(lambda x: layer(x).square().sum()))(x), grad(lambda x: dense(x).square().sum())(x))


@kinds
def test_per_sample_gradients_of_the_adapters_are_those_of_a_loop(kind):
    model, x = adapted(kind).double(), seeded(5, 65).double()

    def loss(adapters, row):
        return functional_call(model, adapters, (row,)).square().sum()

    found = vmap(grad(loss), (None, 0))(adapters_of(model), x)
    for i, row in enumerate(x):
        wanted = gradients(model, row)
        # Float64, gradients up to some hundreds: roundings of 2^-53 in another order.
        torch.testing.assert_close({name: each[i] for name, each in found.items()}, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", [qlite.Linear4bit, qlite.Linear8bit])
def test_a_bias_is_differentiated_in_both_modes(kind):
    layer, x, bias, v = layer_of(kind), seeded(4, 65), seeded(33), seeded(33, seed=12)

    def loss(bias, x):
        return functional_call(layer, {"bias": bias}, (x,))

    assert torch.equal(jvp(lambda bias: loss(bias, x), (bias,), (v,))[1], v.expand(4, 33))
    each = vmap(grad(lambda bias, row: loss(bias, row).sum()), (None, 0))(bias, x)
    assert torch.equal(each, torch.ones(4, 33))
    found = vmap(loss, (0, None))(torch.stack((bias, v)), x)
    torch.testing.assert_close(found, torch.stack((loss(bias, x), loss(v, x))), **CLOSE)


def test_a_call_with_other_adapters_changes_no_parameter():
    model, x = adapted(qlite.Linear4bit), seeded(4, 65)
    before, plain = copy.deepcopy(adapters_of(model)), model(x)
    other = {name: torch.zeros_like(tensor) for name, tensor in before.items()}
    bases = nn.Sequential(*[module.base for module in model[:2]], nn.GELU())
    assert torch.equal(functional_call(model, other, (x,)), bases(x)) and not torch.equal(plain, bases(x))
    assert same(adapters_of(model), before) and torch.equal(model(x), plain)


@kinds
def test_both_modes_of_differentiation_agree_to_the_second_order(kind):
    layer, x = layer_of(kind, 7, 9), seeded(2, 9).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x).pow(3), (x,), check_fwd_over_rev=True)


@kinds
def test_dual_numbers_carry_their_tangent_through_a_frozen_layer(kind):
    layer, x, v = layer_of(kind), seeded(4, 65), seeded(4, 65, seed=12)
    plain = copy.deepcopy(layer)
    plain.bias = None
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        y = torch.autograd.forward_ad.unpack_dual(layer(torch.autograd.forward_ad.make_dual(x, v)))
    torch.testing.assert_close(y.tangent, plain(v), **CLOSE)
    assert torch.equal(y.primal, layer(x))


def test_a_graph_of_gradients_keeps_the_encoded_weight_and_not_the_dense_one():
    layer, kept = layer_of(qlite.Linear4bit, 65), []
    x, upstream = seeded(1, 65).requires_grad_(), seeded(1, 65).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        torch.autograd.grad(layer(x), x, upstream, create_graph=True)
    assert 0 < sum(kept) <= 2 * layer.encoded_bytes() < 65 * 65 * 4


@kinds
def test_an_ensemble_runs_layers_with_weights_of_their_own(kind):
    layers = [layer_of(kind), layer_of(kind)]
    layers[1].quantize_(seeded(33, 65, seed=13))
    parameters, buffers = stack_module_state(layers)
    x = seeded(4, 65)
    found = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([layer(x) for layer in layers]), **CLOSE)


def test_dropout_under_vmap_asks_how_random_it_is_to_be():
    model, x = adapted(qlite.Linear4bit, dropout=0.5).train(), seeded(4, 65)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(model)(x)
    same_row = x[:1].expand(4, 65)
    masked = vmap(model, randomness="different")(same_row)
    assert not torch.equal(masked[0], masked[1])


# Copies, workers, shared memory.


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_adapted_falcon_trains_on_its_own(copied):
    model, ids = tiny_falcon(dropout=0.0), torch.arange(8).view(2, 4)
    twin = copied(model)
    wanted = model(ids)
    assert torch.equal(twin(ids), wanted) and twin.lm_head.weight is twin.transformer.word_embeddings.weight
    optimizer = qlite.AdamW8bit(qlite.lora_parameters(twin), lr=0.1)
    gradients(twin, ids)
    optimizer.step()
    assert torch.equal(model(ids), wanted) and not torch.equal(twin(ids), wanted)
    assert twin.lora_config == model.lora_config


def test_a_worker_process_runs_a_quantized_module_and_leaves_no_shared_memory():
    shared = pathlib.Path("/dev/shm")
    before = {path.name for path in shared.glob("torch_*")}
    dataset = Encoded(adapted(qlite.Linear4bit), 65)
    loader = DataLoader(dataset, batch_size=2, num_workers=1, multiprocessing_context="spawn")
    torch.testing.assert_close(torch.cat(list(loader)), torch.stack([dataset[i] for i in range(4)]).detach(), **CLOSE)
    del loader
    gc.collect()
    assert {path.name for path in shared.glob("torch_*")} <= before


def test_share_memory_shares_codes_and_scales_too():
    model, x = adapted(qlite.Linear4bit), seeded(4, 65)
    wanted = model(x)
    model.share_memory()
    assert all(tensor.is_shared() for tensor in model.state_dict().values()) and torch.equal(model(x), wanted)


# Files of torch.


def to_file_and_back(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("assign", [False, True])
@kinds
def test_a_state_dict_comes_back_from_a_file_of_weights_alone(kind, assign):
    model, x = adapted(kind), seeded(4, 65)
    saved = to_file_and_back(model.state_dict())
    other = adapted(kind).to("meta") if assign else adapted(kind)
    if not assign:
        for tensor in other.state_dict().values():
            tensor.zero_()
    assert str(other.load_state_dict(saved, strict=True, assign=assign)) == "<All keys matched successfully>"
    assert torch.equal(other(x), model(x))
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]


def test_an_adapted_falcon_comes_back_and_is_tied_again_by_name():
    model, ids = tiny_falcon().eval(), torch.arange(8).view(2, 4)
    saved = to_file_and_back(model.state_dict())
    other = tiny_falcon().to("meta")
    other.load_state_dict(saved, strict=True, assign=True)
    other.tie_weights()
    assert torch.equal(other.eval()(ids), model(ids))
    assert other.lm_head.weight is other.transformer.word_embeddings.weight


@pytest.mark.parametrize("loader", [qlite.AdamW8bit, qlite.PagedAdamW8bit])
@pytest.mark.parametrize("saver", [qlite.AdamW8bit, qlite.PagedAdamW8bit])
def test_an_optimizer_goes_on_from_a_file_of_weights_alone(saver, loader):
    model, x = adapted(qlite.Linear4bit), seeded(4, 65)
    twin = copy.deepcopy(model)
    first, second = (
        kind(qlite.lora_parameters(each), lr=0.01, min_8bit_size=16) for kind, each in ((saver, model), (loader, twin))
    )
    gradients(model, x)
    first.step()
    twin.load_state_dict(model.state_dict())
    second.load_state_dict(to_file_and_back(first.state_dict()))
    for each, optimizer in ((model, first), (twin, second)):
        gradients(each, x)
        optimizer.step()
    assert same(adapters_of(twin), adapters_of(model))


# Casts, meta, the helpers of torch.nn.utils.


def test_a_cast_of_every_tensor_is_refused_before_it_spoils_the_codes():
    layer = layer_of(qlite.Linear4bit)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(TypeError, match=r"a cast to torch\.float16 of the codes; \.to\(dtype\) leaves them"):
        layer.type(torch.float16)
    assert same({k: v for k, v in layer.state_dict().items() if k != "bias"}, {k: v for k, v in before.items() if k != "bias"})
    assert layer.to(torch.float16)(seeded(2, 65).half()).dtype == torch.float16


@kinds
def test_on_meta_a_forward_gives_shapes(kind):
    model = adapted(kind).to("meta")
    y = model(torch.empty(4, 65, device="meta"))
    assert y.shape == (4, 65) and y.device.type == "meta"


def test_a_model_is_made_and_adapted_inside_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(qlite.Linear4bit(65, 33), nn.Linear(33, 65))
        qlite.quantize_model(model, skip=())
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("wrong", [[[1.0]], seeded(2, 65).numpy(), torch.ones(2, 65, dtype=torch.int32)])
def test_an_input_that_is_no_float_tensor_is_refused_by_what_it_is(wrong):
    with pytest.raises(TypeError, match=r"x is (list|ndarray|torch\.int32); wanted a floating-point tensor"):
        layer_of(qlite.Linear4bit)(wrong)


def test_gradients_of_the_whole_model_are_clipped_as_those_of_the_adapters():
    model, x = adapted(qlite.Linear4bit), seeded(4, 65)
    gradients(model, x)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    wanted = torch.stack([p.grad.norm() for p in qlite.lora_parameters(model)]).norm()
    assert norm > 0.5 and wanted.item() == pytest.approx(0.5, rel=1e-4)
    model.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_adapters_as_one_vector_go_back_where_they_were():
    model, x = adapted(qlite.Linear4bit), seeded(4, 65)
    wanted = model(x)
    vector = torch.nn.utils.parameters_to_vector(qlite.lora_parameters(model))
    assert vector.shape == (sum(p.numel() for p in qlite.lora_parameters(model)),) and vector.dtype == torch.float32
    torch.nn.utils.vector_to_parameters(vector * 0, qlite.lora_parameters(model))
    assert not torch.equal(model(x), wanted)
    torch.nn.utils.vector_to_parameters(vector, qlite.lora_parameters(model))
    assert torch.equal(model(x), wanted)


def test_the_moving_average_of_adapters_is_kept_beside_the_model():
    model, x = adapted(qlite.Linear4bit), seeded(4, 65)
    average = AveragedModel(nn.ParameterList(qlite.lora_parameters(model)), multi_avg_fn=get_ema_multi_avg_fn(0.5))
    first = [parameter.detach().clone() for parameter in qlite.lora_parameters(model)]
    for factor in (1, 3):
        for parameter, start in zip(qlite.lora_parameters(model), first, strict=True):
            parameter.data = start * factor
        average.update_parameters(nn.ParameterList(qlite.lora_parameters(model)))
    for found, start in zip(average.module, first, strict=True):
        torch.testing.assert_close(found.detach(), 2 * start)
    assert model(x).isfinite().all()


def test_an_equal_average_of_whole_models_leaves_the_codes_alone():
    model, x = adapted(qlite.Linear4bit), seeded(4, 65)
    average = AveragedModel(model)
    for _ in range(3):
        average.update_parameters(model)
    assert same(average.module.state_dict(), model.state_dict()) and torch.equal(average(x), model(x))


def test_a_weight_cannot_be_asked_for_a_gradient_and_is_not_for_8_bit_adamw():
    model = adapted(qlite.Linear4bit)
    with pytest.raises(RuntimeError, match="floating point"):
        model.requires_grad_(True)
    with pytest.raises(TypeError, match=r"is torch\.uint8; wanted float32"):
        qlite.AdamW8bit(adapted(qlite.Linear4bit).parameters())


@pytest.mark.parametrize("tracer", [torch.jit.script, torch.fx.symbolic_trace])
def test_scripting_and_symbolic_tracing_fail_at_once(tracer):
    with pytest.raises((ValueError, TypeError), match=r"Unknown type annotation|x is Proxy|symbolically traced variables"):
        tracer(nn.Sequential(layer_of(qlite.Linear4bit)))


# A notebook: cells run again, and runs broken off.

CELL = """
model = tiny_falcon(r=2)
optimizer = qlite.PagedAdamW8bit(qlite.lora_parameters(model), lr=1e-3, min_8bit_size=16)
batches = faq()
result = qlite.finetune(model, batches, optimizer, steps=2, accumulate=1)
"""


def everything_of(cell):
    """Weak references to what a cell made: modules, parameters, buffers, optimizer state, batches."""
    model, optimizer = cell["model"], cell["optimizer"]
    states = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
    made = [*model.modules(), *model.parameters(), *model.buffers(), *states, optimizer, cell["batches"]]
    return [weakref.ref(each) for each in made]


def test_a_cell_that_is_run_again_frees_what_it_made_before(capsys):
    cell = {"qlite": qlite, "tiny_falcon": tiny_falcon, "faq": faq}
    exec(CELL, cell)
    first = everything_of(cell)
    assert len(first) > 100 and all(each() is not None for each in first)
    exec(CELL, cell)
    gc.collect()
    assert not [each() for each in first if each() is not None]
    second = everything_of(cell)
    for name in ("model", "optimizer", "batches", "result"):
        del cell[name]
    gc.collect()
    assert not [each() for each in second if each() is not None]
    assert not tqdm._instances and "2/2" in capsys.readouterr().err


def test_fine_tuning_again_goes_on_from_the_trained_weights_and_holds_no_more_tensors():
    model = tiny_falcon(dropout=0.0, r=2)
    optimizer = qlite.AdamW8bit(qlite.lora_parameters(model), lr=1e-2, min_8bit_size=16)

    def run():
        before = copy.deepcopy(adapters_of(model))
        qlite.finetune(model, faq(), optimizer, steps=2, accumulate=1, progress=False)
        gc.collect()
        return before, copy.deepcopy(adapters_of(model)), sum(type(each) is torch.Tensor for each in gc.get_objects())

    _, after, tensors = run()
    start, end, more = run()
    assert same(start, after) and not same(end, after)
    # The copies of the first run that this test itself holds.
    assert more <= tensors + 2 * len(after)


@pytest.mark.parametrize("training", [False, True])
def test_a_run_broken_off_leaves_modes_learning_rate_and_no_gradients(training, tmp_path):
    class Broken(Toy):
        def hidden_states(self, input_ids):
            if len(self.modes) == 3:  # in the middle of the second window, whose first half has left gradients
                self.modes.append(None)
                raise KeyboardInterrupt
            return super().hidden_states(input_ids)

    model = Broken(dropout=0.1).train(training)
    optimizer = sgd(model, lr=0.25)
    with pytest.raises(KeyboardInterrupt):
        tune(model, GOOD, optimizer, steps=5, accumulate=2, output_dir=tmp_path, progress=True)
    assert {module.training for module in model.modules()} == {training} and optimizer.param_groups[0]["lr"] == 0.25
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1 and not tqdm._instances
    assert len(tune(model, GOOD, optimizer, steps=2).losses) == 2


def test_a_second_add_lora_in_a_cell_run_again_says_what_to_do():
    model = adapted(qlite.Linear4bit)
    with pytest.raises(ValueError, match=r"has adapters already.*or load a fresh base"):
        qlite.add_lora(model, qlite.LoRAConfig(r=3))


def test_in_ipython_a_cell_that_is_run_again_frees_what_it_made_before(tmp_path, monkeypatch):
    interactive = pytest.importorskip("IPython.core.interactiveshell", reason="needs IPython, which is no test extra")
    from traitlets.config import Config

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    shell = interactive.InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    shell.push({"qlite": qlite, "tiny_falcon": tiny_falcon, "faq": faq})
    shell.run_cell(CELL).raise_error()
    first = everything_of(shell.user_ns)
    shell.run_cell(CELL).raise_error()
    gc.collect()
    assert len(first) > 100 and not [each() for each in first if each() is not None]


# The table.


def test_every_row_of_the_table_names_a_test_that_exists():
    text = (ROOT / "docs" / "pytorch.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| what you do")]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, f"no test: {row}"
        assert not [name for name in named if f"def {name}(" not in tests], row
    own = re.findall(r"^def (test_\w+)\(", pathlib.Path(__file__).read_text(encoding="utf-8"), re.MULTILINE)
    assert not [name for name in own if name not in text and name != "test_every_row_of_the_table_names_a_test_that_exists"]

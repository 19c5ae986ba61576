"""A base and its adapter in one function: the same numbers as of two, wherever two are not asked for."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap
from torch.utils.checkpoint import checkpoint

import qlite
from qlite import low_rank
from qlite.lora import LoRAConfig, LoRALinear

MANY = low_rank.FEW_ROWS + 1  # rows from which the update is written first
KINDS = {
    "dense": None,
    "nf4": qlite.Linear4bit,
    "flat": functools.partial(qlite.Linear4bit, flat=True),
    "int8": qlite.Linear8bit,
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def seeded(*shape, seed=5, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def base_of(kind, in_features=20, out_features=12, dtype=torch.float32, bias=True):
    make = kind or nn.Linear
    base = make(in_features, out_features, bias=bias, dtype=dtype)
    weight = seeded(out_features, in_features, dtype=dtype)
    if kind is None:
        base.weight.data = weight
    else:
        base.quantize_(weight)
    if bias:
        base.bias.data = seeded(out_features, seed=6, dtype=dtype)
    return base.requires_grad_(False)


def layer_of(kind, dtype=torch.float32, r=3, dropout=0.0, **options):
    base = kind if isinstance(kind, nn.Module) else base_of(kind, dtype=dtype, **options)
    layer = LoRALinear(base, LoRAConfig(r=r, alpha=5.0, dropout=dropout))
    layer.lora_A.data, layer.lora_B.data = seeded(r, layer.in_features, seed=7), seeded(layer.out_features, r, seed=8)
    return layer.double() if dtype == torch.float64 else layer


class Wrapped(nn.Module):
    """A base of which nothing is known but its sizes and its call."""

    def __init__(self, base, call=None):
        super().__init__()
        self.inner, self.call, self.in_features, self.out_features = base, call, base.in_features, base.out_features

    def forward(self, x):
        return self.inner(x) if self.call is None else self.call(x)


def in_two(layer):
    """The same layer, whose base and update are called one after the other."""
    twin = LoRALinear(Wrapped(layer.base), LoRAConfig(r=layer.lora_A.shape[0], dropout=0.0))
    twin.lora_A, twin.lora_B, twin.scaling = layer.lora_A, layer.lora_B, layer.scaling
    return twin


def is_one(y):
    return "Together" in y.grad_fn.name()


def everything(layer, x, grad):
    """The result, and the gradients of x and of what is trained."""
    x = x.detach().requires_grad_()
    trained = [p for p in layer.parameters() if p.requires_grad]
    y = layer(x)
    return y, *torch.autograd.grad(y, [x, *trained], grad)


# The same numbers.


@kinds
@pytest.mark.parametrize("bias", ["none", "frozen", "trained"])
@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 3), (MANY,), (2, 0, 3), (2, MANY)], ids=str)
def test_values_and_gradients_are_those_of_two_calls(kind, leading, bias):
    layer = layer_of(kind, torch.float64, bias=bias != "none")
    if bias == "trained":
        layer.base.bias.requires_grad_()
    x, grad = seeded(*leading, 20).double(), seeded(*leading, 12, seed=9).double()
    found, wanted = everything(layer, x, grad), everything(in_two(layer), x, grad)
    assert is_one(found[0]) and not is_one(wanted[0])
    for one, two in zip(found, wanted, strict=True):
        # Float64 sums of up to 2 * MANY products of about 1, in two orders: some 600 * 2^-53 of values under 1,000.
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-10)


@kinds
@pytest.mark.parametrize("rows", [4, MANY])
def test_with_dropout_they_are_those_of_the_mask_that_was_drawn(kind, rows):
    layer, x, grad = layer_of(kind, torch.float64, dropout=0.4), seeded(rows, 20).double(), seeded(rows, 12, seed=9).double()
    torch.manual_seed(3)
    found = everything(layer, x, grad)
    torch.manual_seed(3)
    mask = torch.native_dropout(x, 0.4, True)[1]
    assert is_one(found[0]) and 0.2 < (~mask).double().mean() < 0.6
    x.requires_grad_()
    y = layer.base(x) + layer.scaling * (x * mask / 0.6) @ layer.lora_A.T @ layer.lora_B.T
    for one, two in zip(found, (y, *torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B], grad)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-10)


def exact(layer, x, grad):
    """Result and gradients in float64 over the weight that the layer multiplies by."""
    weight = layer.base.weight if isinstance(layer.base, nn.Linear) else layer.base.dequantize()
    x, weight, a, b, bias, grad = (
        t.detach().double() for t in (x, weight.to(x.dtype), layer.lora_A, layer.lora_B, layer.base.bias, grad)
    )
    s = layer.scaling
    y = x @ weight.T + bias + s * (x @ a.T) @ b.T
    return y, grad @ weight + s * grad @ b @ a, s * (grad @ b).T @ x, s * grad.T @ (x @ a.T)


def off(found, wanted):
    """The relative Frobenius error of each."""
    return [((f.double() - w).norm() / w.norm()).item() for f, w in zip(found, wanted, strict=True)]


@kinds
@pytest.mark.parametrize("rows", [16, MANY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_as_near_to_float64_as_its_roundings_allow(dtype, rows, kind):
    layer, x, grad = layer_of(kind, dtype), seeded(rows, 20, dtype=dtype), seeded(rows, 12, seed=9, dtype=dtype)
    found, wanted = everything(layer, x, grad), exact(layer, x, grad)
    assert is_one(found[0]) and [t.dtype for t in found] == [dtype, dtype, torch.float32, torch.float32]
    # Relative roundings of eps / 2 at most, each of which could meet the whole: of A, of scaling * B, of U or V, of the update
    # and of the sum, of the bias's sum where it is apart; terms that cancel, and float32 sums, are in the factor 2.
    allowed = 2 * 6 * torch.finfo(dtype).eps / 2
    assert max(off(found, wanted)) <= allowed
    # Nor further than two calls, but for chance in these few thousand roundings.
    for one, two in zip(off(found, wanted), off(everything(in_two(layer), x, grad), wanted), strict=True):
        assert one <= 1.25 * two + 2**-24
    # The twin: one percent off is seen.
    assert all(error > allowed for error in off([1.01 * t.double() for t in wanted], wanted)) or dtype == torch.bfloat16
    assert all(error > allowed for error in off([1.05 * t.double() for t in wanted], wanted))


@settings(max_examples=40)
@given(
    st.sampled_from(list(KINDS.values())), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(0, 9),
    st.booleans(),
)  # fmt: skip
def test_any_sizes(kind, in_features, out_features, r, rows, many):
    layer = layer_of(base_of(kind, in_features, out_features, torch.float64), r=r).double()
    rows += MANY if many else 0
    x, grad = seeded(rows, in_features).double(), seeded(rows, out_features, seed=9).double()
    for one, two in zip(everything(layer, x, grad), everything(in_two(layer), x, grad), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-10)


@kinds
@pytest.mark.parametrize("rows", [3, MANY])
def test_strides_of_x_and_of_the_gradient_do_not_matter(kind, rows):
    layer, x = layer_of(kind, torch.float64), seeded(20, rows).double().T.requires_grad_()
    layer(x).sum().backward()  # a gradient of stride 0
    wanted = everything(layer, x.detach().contiguous(), torch.ones(rows, 12).double())
    for one, two in zip((x.grad, layer.lora_A.grad, layer.lora_B.grad), wanted[1:], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-10)


@kinds
def test_without_gradients_and_in_inference_mode_the_bits_are_the_same(kind):
    layer, x = layer_of(kind, dropout=0.3).eval(), seeded(5, 20)
    wanted = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), wanted)
    with torch.inference_mode():
        assert torch.equal(layer(x), wanted)


@kinds
def test_a_factor_that_is_frozen_gets_no_gradient(kind):
    for frozen in ("lora_A", "lora_B"):
        layer, x = layer_of(kind), seeded(5, 20)  # nor does an x that wants none
        getattr(layer, frozen).requires_grad_(False)
        layer(x).sum().backward()
        assert [getattr(layer, n).grad is None for n in ("lora_A", "lora_B")] == [n == frozen for n in ("lora_A", "lora_B")]


# Derivatives of derivatives, and in batches.


@kinds
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_to_the_second_order_pass_the_checks(kind, bias, dropout):
    layer, x = layer_of(kind, torch.float64, r=2, bias=bias, dropout=dropout), seeded(2, 20).double().requires_grad_()
    trained = [layer.lora_A, layer.lora_B, *([layer.base.bias.requires_grad_()] if bias else [])]

    def call(x, *_):
        torch.manual_seed(0)
        y = layer(x)
        assert is_one(y)
        return y

    assert torch.autograd.gradcheck(call, (x, *trained), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda *inputs: call(*inputs).pow(3), (x, *trained), check_batched_grad=True)


@kinds
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("rows", [3, MANY])
def test_gradients_that_can_be_differentiated_are_those_that_cannot(kind, dropout, rows):
    layer, x = layer_of(kind, torch.float64, dropout=dropout), seeded(rows, 20).double().requires_grad_()

    def gradients(create_graph):
        torch.manual_seed(2)
        return torch.autograd.grad(layer(x).pow(2).sum(), [x, layer.lora_A, layer.lora_B], create_graph=create_graph)

    for one, two in zip(gradients(False), gradients(True), strict=True):
        assert two.requires_grad and not one.requires_grad
        torch.testing.assert_close(one, two.detach(), rtol=1e-10, atol=1e-9)


@kinds
def test_transforms_and_forward_mode_see_the_base_and_the_update(kind):
    layer = layer_of(kind, torch.float64)
    twin, x, v = in_two(layer), seeded(3, 20).double(), seeded(3, 20, seed=9).double()
    close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-10)
    loss = lambda layer: lambda x: layer(x).pow(2).sum()  # noqa: E731
    close(jvp(layer, (x,), (v,)), jvp(twin, (x,), (v,)))
    close(vmap(grad(loss(layer)))(x), vmap(grad(loss(twin)))(x))
    close(hessian(loss(layer))(x[0]), hessian(loss(twin))(x[0]))
    with forward_ad.dual_level():
        found, wanted = (forward_ad.unpack_dual(each(forward_ad.make_dual(x, v))) for each in (layer, twin))
    close((found.primal, found.tangent), (wanted.primal, wanted.tangent))


@kinds
def test_a_penalty_on_the_gradient_trains_the_adapters_as_in_two_calls(kind):
    def gradients(layer):
        x = seeded(3, 20).double().requires_grad_()
        (grad,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), [layer.lora_A, layer.lora_B])

    layer = layer_of(kind, torch.float64)
    for one, two in zip(gradients(layer), gradients(in_two(layer)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=0)


# What must be called as it is: the answer of `linear_of`.


def with_hook(layer):
    layer.base.register_forward_hook(lambda module, inputs, output: output + 1)


def with_pre_hook(layer):
    layer.base.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def with_backward_hook(layer):
    layer.base.register_full_backward_hook(lambda module, of_input, of_output: (of_input[0] + 1,))


def with_own_forward(layer):
    forward = layer.base.forward
    layer.base.forward = lambda x: forward(x) + 1


def with_another_dropout(layer):
    layer.dropout = nn.Sequential(nn.Identity())


def with_a_hooked_dropout(layer):
    layer.dropout.register_forward_hook(lambda module, inputs, output: 2 * output)


CHANGES = (with_hook, with_pre_hook, with_backward_hook, with_own_forward, with_another_dropout, with_a_hooked_dropout)


@kinds
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_somebody_put_on_a_module_counts(kind, change):
    layer, x, grad = layer_of(kind, torch.float64), seeded(3, 20).double(), seeded(3, 12, seed=9).double()
    plain = everything(layer, x, grad)
    change(layer)
    found = everything(layer, x, grad)
    assert is_one(plain[0]) and not is_one(found[0])
    differs = [not torch.allclose(one, two) for one, two in zip(plain, found, strict=True)]
    assert any(differs) == (change is not with_another_dropout)


def test_a_hook_on_every_module_sees_the_base_too():
    layer, seen = layer_of(None), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    layer(seeded(2, 20))
    handle.remove()
    assert seen == [nn.Linear, nn.Dropout, LoRALinear]


class Doubling(qlite.Linear4bit):
    def forward(self, x):
        return 2 * super().forward(x)


class DoublingDense(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(("kind", "plain"), [(Doubling, qlite.Linear4bit), (DoublingDense, nn.Linear)])
def test_a_subclass_with_a_forward_of_its_own_is_called(kind, plain):
    x = seeded(3, 20)
    base = base_of(kind if plain is qlite.Linear4bit else None)
    base.__class__ = kind
    layer = layer_of(base)
    y = layer(x)
    base.__class__ = plain
    torch.testing.assert_close(y - layer(x), base(x), rtol=1e-4, atol=1e-4)


def test_a_dense_base_that_is_trained_gets_its_gradient():
    layer, x = layer_of(None), seeded(3, 20)
    layer.base.weight.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.base.weight.grad, torch.ones(3, 12).T @ x)


@pytest.mark.parametrize("kept", ["input", "cache"])
def test_what_a_base_returns_may_be_somebody_else_s(kept):
    x = seeded(3, 20)
    cache = seeded(3, 20, seed=12)
    before = x.clone(), cache.clone()
    base = Wrapped(base_of(None, out_features=20), (lambda x: x) if kept == "input" else (lambda x: cache))
    layer_of(base)(x)
    assert torch.equal(x, before[0]) and torch.equal(cache, before[1])


@kinds
def test_a_recorder_of_outputs_keeps_those_of_the_base(kind):
    layer, x, seen = layer_of(kind), seeded(3, 20), []
    layer.base.register_forward_hook(lambda module, inputs, output: seen.append(output))
    layer(x)
    assert torch.equal(seen[0], layer.base(x))


def test_no_input_is_written_to():
    for kind in KINDS.values():
        for rows in (3, MANY):
            layer, x, grad = layer_of(kind), seeded(rows, 20), seeded(rows, 12, seed=9)
            tensors = [x, grad, *layer.state_dict().values()]
            before = [t.clone() for t in tensors]
            everything(layer, x, grad)
            assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


# Training's surroundings.


@kinds
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rows", [4, MANY])
def test_a_checkpoint_draws_the_same_mask_again(kind, reentrant, rows):
    layer, x = layer_of(kind, dropout=0.5), seeded(rows, 20)

    def backward(call):
        torch.manual_seed(1)
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        call(inputs).square().sum().backward()
        return inputs.grad, layer.lora_A.grad, layer.lora_B.grad

    again = backward(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(torch.equal(one, two) for one, two in zip(backward(layer), again, strict=True))


@kinds
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_autograd_keeps_no_decoded_weight_and_nothing_twice(kind, dropout):
    layer, kept = layer_of(base_of(kind, 64, 48), dropout=dropout), {}
    x = seeded(MANY, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t):
        layer(x)
    base = sum(t.nbytes for t in layer.base.state_dict().values())
    # x, the mask's bytes, the base's own, U, and the factors: as they are, and again in the dtype of x with B scaled.
    factors = layer.lora_A.nbytes + layer.lora_B.nbytes
    assert sum(kept.values()) <= x.nbytes + (x.numel() if dropout else 0) + base + MANY * 3 * 4 + 2 * factors


@kinds
@pytest.mark.parametrize("rows", [4, MANY])
def test_one_graph_with_dropout_whose_backward_has_the_mask_of_its_forward(kind, rows):
    torch._dynamo.reset()
    layer = layer_of(base_of(kind, 20, 20), r=20, dropout=0.5)
    base = layer.base
    if kind is None:
        base.weight.data.zero_()
    else:
        base.quantize_(torch.zeros(20, 20))
    base.bias.data.zero_()
    layer.lora_A.data, layer.lora_B.data = torch.eye(20), torch.eye(20)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = seeded(rows, 20).requires_grad_()
    y = compiled(x)
    y.sum().backward()
    assert 0.4 < (y == 0).float().mean() < 0.6 or rows == 4
    torch.testing.assert_close(x.grad * x, y)  # y = scaling * mask / 0.5 * x, and so is its gradient
    torch._dynamo.reset()


@kinds
@pytest.mark.parametrize("rows", [4, MANY])
def test_a_compiled_layer_gives_the_bits_of_the_eager_one(kind, rows):
    torch._dynamo.reset()
    layer, x, grad = layer_of(kind), seeded(rows, 20), seeded(rows, 12, seed=9)
    found = everything(torch.compile(layer, fullgraph=True, backend="aot_eager"), x, grad)
    assert all(torch.equal(one, two) for one, two in zip(found, everything(layer, x, grad), strict=True))
    torch._dynamo.reset()


@kinds
def test_autocast_around_either_pass_changes_what_it_does_to_two_calls_and_no_more(kind):
    layer, x, grad = layer_of(kind), seeded(3, 20), seeded(3, 12, seed=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = everything(layer, x, grad.bfloat16()), everything(in_two(layer), x, grad.bfloat16())
    for one, two in zip(found, wanted, strict=True):
        assert one.dtype == two.dtype and (one.float() - two.float()).norm() <= 8 * 2**-8 * two.float().norm()


@kinds
def test_a_backward_pass_inside_autocast_stays_in_the_dtype_of_its_forward(kind):
    layer, x, grad = layer_of(kind), seeded(MANY, 20), seeded(MANY, 12, seed=9)
    x.requires_grad_()
    y = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B], grad)
    assert max(off(found, exact(layer, x, grad)[1:])) <= 12 * 2**-24

"""Stacks of encoded expert matrices: one at a time, in the place of a 3-D weight."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import qlite
from qlite.experts import ExpertStack, expert_weights

KINDS = [qlite.Linear4bit, qlite.Linear8bit, functools.partial(qlite.Linear4bit, double_quant=False, block_size=32)]
kinds = pytest.mark.parametrize("kind", KINDS)


def seeded(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def bytes_of(stack):
    return {key: (t.dtype, t.shape, t.numpy().tobytes()) for key, t in stack.state_dict().items()}


@kinds
@pytest.mark.parametrize("index", [2, torch.tensor(2)])
def test_a_product_with_an_expert_is_that_of_its_encoded_layer_bit_for_bit(kind, index):
    stack, layer = ExpertStack(seeded(3, 40, 96), kind), kind(96, 40, bias=False).quantize_(seeded(3, 40, 96)[2])
    x, y = seeded(5, 96).requires_grad_(), seeded(5, 96).requires_grad_()
    one, other = linear(x, stack[index]), layer(y)
    assert torch.equal(one, other)
    one.square().sum().backward()
    other.square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(stack.dequantize()[2], layer.dequantize()) and stack.dequantize().shape == (3, 40, 96)
    assert len(stack) == 3 and stack.config() == layer.config()


@kinds
def test_autograd_keeps_codes_and_no_decoded_matrix(kind):
    stack, kept, x = ExpertStack(seeded(3, 96, 96), kind), [], seeded(5, 96).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for index in (0, 1, 2):
            x = linear(x, stack[index])
    largest = sorted(kept, key=lambda t: t.nbytes)[-3:]
    assert [t.dtype for t in largest] == [stack.weight.dtype] * 3
    assert {t.data_ptr() for t in largest} == {row.data_ptr() for row in stack.weight}


@kinds
def test_the_state_is_plain_tensors_that_load_and_move_and_are_never_cast(kind):
    stack = ExpertStack(seeded(3, 40, 96), kind)
    before = bytes_of(stack)
    assert all(shape[0] == 3 for _, shape, _ in before.values())
    assert bytes_of(copy.deepcopy(stack).half()) == before == bytes_of(stack.to(torch.float64))
    assert stack.encoded_bytes() == sum(len(raw) for _, _, raw in before.values())
    empty = ExpertStack(torch.zeros(3, 40, 96), kind).to("meta")
    empty.load_state_dict(stack.state_dict(), strict=True, assign=True)
    assert torch.equal(linear(seeded(2, 96), empty[1]), linear(seeded(2, 96), stack[1]))
    assert not any(p.requires_grad for p in stack.parameters())


@pytest.mark.parametrize(
    "use",
    [
        lambda stack, x: x @ stack[0],
        lambda stack, x: torch.bmm(x[None], stack[0]),
        lambda stack, x: linear(x, stack[0], torch.zeros(40)),
        lambda stack, x: linear(stack[0], x),
        lambda stack, x: stack[torch.tensor([0, 1])],
        lambda stack, x: stack[torch.tensor([0])],
        lambda stack, x: stack.transpose(-2, -1),
        lambda stack, x: stack.data,
    ],
)
def test_any_other_use_is_an_error_that_tells_the_way_out(use):
    with pytest.raises((TypeError, AttributeError), match=r"set_experts_implementation\('eager'\)|unsupported operand"):
        use(ExpertStack(seeded(3, 40, 96), qlite.Linear4bit), seeded(2, 96))


def test_a_value_that_is_not_finite_is_refused():
    dense = seeded(3, 40, 96)
    dense[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="non-finite"):
        ExpertStack(dense, qlite.Linear4bit)


class Module(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.weight, self.bias = nn.Parameter(seeded(3, 40, 96)), nn.Parameter(seeded(3, 40))
        self.other = nn.Parameter(seeded(2, 40, 96))
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("attributes", "found"),
    [
        ({"num_experts": 3, "is_transposed": False}, {"weight"}),
        ({"num_experts": 3, "is_transposed": True}, set()),
        ({"num_experts": 3}, set()),
        ({"is_transposed": False}, set()),
        ({"num_experts": 4, "is_transposed": False}, set()),
    ],
)
def test_stacks_are_known_by_what_transformers_says_of_them(attributes, found):
    assert set(expert_weights(Module(**attributes))) == found


def mixture():
    dense = Module(num_experts=3, is_transposed=False)
    return nn.ModuleDict({"a": nn.Linear(96, 96), "b": ExpertStack(seeded(3, 40, 96), qlite.Linear4bit), "c": dense})


def test_lora_on_all_linear_layers_leaves_experts_alone_and_says_so():
    report = qlite.add_lora(mixture(), qlite.LoRAConfig(r=2))
    assert report.targets == ("a",) and report.experts == ("b", "c.weight")
    assert str(report).endswith("; none on 2 stacks of experts, which stay frozen")


@pytest.mark.parametrize(("targets", "name"), [(["b"], "b"), (["a", "weight"], "c.weight"), ("c.*ght", "c.weight")])
def test_a_target_that_is_a_stack_of_experts_is_refused_as_that(targets, name):
    with pytest.raises(ValueError, match=f"target .* is {name}, a stack of experts; no adapters are made on those"):
        qlite.add_lora(mixture(), qlite.LoRAConfig(r=2, targets=targets))


@kinds
def test_a_stack_on_meta_is_filled_one_expert_after_the_other(kind):
    dense = seeded(3, 40, 96)
    empty = ExpertStack(dense.to("meta"), kind)
    assert all(tensor.is_meta for tensor in empty.state_dict().values()) and len(empty) == 3
    assert bytes_of(empty.quantize_(iter(dense))) == bytes_of(ExpertStack(dense, kind))


@pytest.mark.parametrize(
    ("matrices", "words"),
    [
        (seeded(2, 40, 96), "2 matrices for 3 experts"),
        (seeded(3, 41, 96), r"weight has shape \(41, 96\)"),
        (torch.full((3, 40, 96), torch.inf), "non-finite"),
    ],
)
def test_what_does_not_fill_a_stack_is_refused_and_it_stays_as_it_was(matrices, words):
    stack = ExpertStack(seeded(3, 40, 96), qlite.Linear4bit)
    before = bytes_of(stack)
    with pytest.raises(ValueError, match=words):
        stack.quantize_(matrices)
    assert bytes_of(stack) == before

"""Merging: the sum is exact to its rounding, and the merged model says what the adapted one said."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qlite
from qlite.adapters import CONFIG, FINGERPRINT, TENSORS
from qlite.linear import QuantizedLinear
from qlite.storage import read_metadata
from tests.adapted import KINDS, adapt, adapted, base_of, kinds, logits


def layer_of(kind, dtype, in_features=64, out_features=32):
    generator = torch.Generator().manual_seed(4)
    dense = nn.Linear(in_features, out_features, dtype=dtype)
    dense.weight.data = torch.randn(out_features, in_features, generator=generator).to(dtype)
    dense.bias.data = torch.randn(out_features, generator=generator).to(dtype)
    model = nn.Sequential(dense)
    if kind is not None:
        qlite.quantize_model(model, kind)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(
    kind=st.sampled_from(list(KINDS)), r=st.integers(1, 6), alpha=st.floats(0.1, 64), sizes=st.tuples(*[st.integers(1, 70)] * 2)
)
def test_a_merged_weight_is_the_sum_rounded_once(dtype, kind, r, alpha, sizes):
    model = layer_of(KINDS[kind], dtype, *sizes)
    adapt(model, r=r, alpha=alpha)
    layer = model[0]
    dense = layer.base.weight if kind == "dense" else layer.base.dequantize()
    a, b = layer.lora_A.double(), layer.lora_B.double()
    exact = dense.double() + layer.scaling * b @ a
    merged = qlite.merge_adapter(model)[0]
    # The product of r terms and the scale round r + 1 times and the sum once, all in float32, relative to the magnitudes
    # that are added; then the result once, to its dtype. Below the smallest normal number a step is the smallest subnormal.
    terms = (r + 3) * 2**-24 * (dense.double().abs() + layer.scaling * b.abs() @ a.abs())
    last = torch.finfo(dtype).eps / 2 * (exact.abs() + terms) + torch.finfo(dtype).smallest_normal
    assert bool(((merged.weight.double() - exact).abs() <= terms + last).all())
    assert merged.weight.dtype == dtype


@kinds
@pytest.mark.parametrize("flavour", ["7b", "rw"])
def test_a_merged_model_says_what_the_adapted_one_says(kind, flavour, tmp_path):
    model = base_of(kind, flavour)
    adapt(model)
    before = logits(model)
    merged = qlite.merge_adapter(model)
    assert merged is model and not adapted(model)
    # Two models of float32 weights that differ by a rounding, through two blocks: 2^-24 times the sums of a few hundred
    # terms in six matrix products each.
    assert (logits(model) - before).norm() <= 2**-18 * before.norm()
    qlite.save_checkpoint(model, tmp_path / "merged")
    assert torch.equal(logits(qlite.load_falcon(tmp_path / "merged", dtype=torch.float32)), logits(model))


def test_merging_leaves_plain_frozen_linears_with_their_biases_and_the_other_layers_encoded():
    model = base_of(qlite.Linear4bit, "rw")
    adapt(model, targets=["dense"])
    others = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    biases = {name: module.base.bias for name, module in adapted(model).items()}
    before = {name: module.weight.clone() for name, module in others.items()}
    qlite.merge_adapter(model)
    for name, bias in biases.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear and layer.bias is bias and not layer.weight.requires_grad
        assert (layer.in_features, layer.out_features) == (48, 48) and not layer.training
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            assert module is others[name] and torch.equal(module.weight, before[name])
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 6


def test_a_merged_model_takes_new_adapters_and_is_another_base(tmp_path):
    qlite.save_checkpoint(base_of(), tmp_path / "base")
    model = qlite.load_falcon(tmp_path / "base", quantize=qlite.Linear4bit)
    old = model.base_fingerprint
    adapt(model, targets=["dense"])
    qlite.merge_adapter(model)
    assert not hasattr(model, "lora_config")
    qlite.save_checkpoint(model, tmp_path / "merged")
    merged = qlite.load_falcon(tmp_path / "merged")
    assert merged.base_fingerprint != old
    adapt(model, seed=9)
    qlite.save_adapter(model, tmp_path / "adapter")
    assert FINGERPRINT not in read_metadata(tmp_path / "adapter" / TENSORS)
    assert json.loads((tmp_path / "adapter" / CONFIG).read_text())["base_model_name_or_path"] is None
    qlite.load_adapter(merged, tmp_path / "adapter")
    assert torch.equal(logits(merged), logits(model))


def test_there_must_be_something_to_merge():
    with pytest.raises(ValueError, match="Sequential has no adapters"):
        qlite.merge_adapter(nn.Sequential(nn.Linear(4, 4)))


class Foreign(nn.Module):
    """Looks like a linear layer, and keeps its weight in a way that nobody here knows."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features, self.kept = 4, 4, nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x * self.kept


def test_an_adapter_on_a_layer_that_cannot_be_merged_is_an_error_and_nothing_is_merged():
    model = nn.Sequential(nn.Linear(4, 4), Foreign())
    adapt(model)
    before = model(torch.ones(1, 4))
    with pytest.raises(TypeError, match="1 adapts a Foreign; wanted a linear layer"):
        qlite.merge_adapter(model)
    assert len(adapted(model)) == 2 and torch.equal(model(torch.ones(1, 4)), before)

"""How adapters begin: what is drawn, what is found, and that a start changes nothing or repairs something."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qlite
from qlite.lora import LoRAConfig, LoRALinear, add_lora
from qlite.lora_init import leading


def seeded(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_gaussian_draws_a_with_a_deviation_of_one_over_r():
    layer = LoRALinear(nn.Linear(4096, 8), LoRAConfig(r=4, init="gaussian"), generator=torch.Generator().manual_seed(0))
    assert layer.lora_A.std().item() == pytest.approx(1 / 4, rel=0.02) and abs(layer.lora_A.mean().item()) < 0.01
    assert not layer.lora_B.any()


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 12), st.integers(0, 3))
def test_leading_vectors_approximate_as_well_as_those_of_the_whole_decomposition(rows, columns, r, zeros):
    matrix = seeded(rows, columns)
    matrix[:zeros] = 0
    left, values, right = leading(matrix, r, torch.Generator().manual_seed(1))
    assert left.shape == (rows, r) and values.shape == (r,) and right.shape == (r, columns)
    found = (matrix - left * values @ right).double().norm()
    best = torch.linalg.svdvals(matrix.double())[r:].norm()
    # Random matrices have the flattest of spectra: eight rounds come within a percent; and rounding, 2^-20 of the whole.
    assert found <= 1.01 * best + 2**-20 * matrix.norm()


@pytest.mark.parametrize("kind", [None, qlite.Linear4bit, qlite.Linear8bit])
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_begins_at_the_leading_vectors_of_the_base_and_changes_nothing(kind, rslora):
    model = nn.Sequential(nn.Linear(96, 64))
    if kind is not None:
        qlite.quantize_model(model, kind)
    base = model[0]
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    dense = (base.weight if kind is None else base.dequantize()).detach().clone()
    x = seeded(5, 96)
    expected = base(x)
    add_lora(model, LoRAConfig(r=4, alpha=8.0, dropout=0.0, init="pissa", rslora=rslora), seed=0)
    layer = model[0]
    update = layer.scaling * layer.lora_B @ layer.lora_A
    assert (dense - update).norm() <= 1.01 * torch.linalg.svdvals(dense)[4:].norm()
    assert all(torch.equal(base.state_dict()[key], tensor) for key, tensor in before.items())
    # What is added and what is subtracted are equal but for the rounding of their sums.
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=2**-18)
    assert torch.allclose(layer.merged(dense), dense, rtol=0, atol=2**-20)


def test_pissa_draws_from_its_seed_alone():
    models = [nn.Sequential(nn.Linear(96, 64)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for number, model in enumerate(models):
        torch.manual_seed(number)
        add_lora(model, LoRAConfig(r=4, init="pissa"), seed=3)
    assert torch.equal(models[0][0].lora_A, models[1][0].lora_A)


@pytest.mark.parametrize("kind", [qlite.Linear4bit, functools.partial(qlite.Linear4bit, block_size=4096), qlite.Linear8bit])
def test_loftq_takes_away_as_much_of_the_encoding_s_error_as_its_rank_can(kind):
    dense = nn.Linear(96, 64)
    original = dense.weight.detach().clone()
    model = nn.Sequential(dense)
    qlite.quantize_model(model, kind)
    decoded = model[0].dequantize()
    add_lora(model, LoRAConfig(r=8, alpha=4.0, dropout=0.0, init="loftq"), seed=0, dense={"0": original}.__getitem__)
    lost = original - decoded
    left = (original - model[0].merged(decoded)).norm()
    assert left <= 1.01 * torch.linalg.svdvals(lost)[8:].norm() < 0.9 * lost.norm()
    x = seeded(50, 96)
    before, after = (
        (model[0](x) - nn.functional.linear(x, original, dense.bias)).norm() if adapted
        else (model[0].base(x) - nn.functional.linear(x, original, dense.bias)).norm()
        for adapted in (False, True)
    )  # fmt: skip
    assert after < before


def test_loftq_is_given_the_weights_it_repairs():
    model = nn.Sequential(nn.Linear(96, 64))
    qlite.quantize_model(model)
    with pytest.raises(ValueError, match=r"dense gave a weight of \(96, 64\); the layer's is \(64, 96\)"):
        add_lora(model, LoRAConfig(r=2, init="loftq"), dense=lambda name: torch.zeros(96, 64))
    with pytest.raises(ValueError, match="init is 'kaiming'; dense goes with 'loftq'"):
        add_lora(model, LoRAConfig(r=2), dense=lambda name: torch.zeros(64, 96))
    assert not isinstance(model[0], LoRALinear)


def test_dora_on_pissa_and_loftq_takes_the_norms_of_what_they_make_of_the_base():
    original = nn.Linear(96, 64)
    weight = original.weight.detach().clone()
    model = nn.Sequential(original)
    qlite.quantize_model(model)
    layers = [
        LoRALinear(model[0], LoRAConfig(r=4, dora=True, init=init), dense=weight if init == "loftq" else None)
        for init in ("pissa", "loftq")
    ]
    decoded = model[0].dequantize()
    a, b = layers[1].factors()
    for layer, made in zip(layers, (decoded, decoded + layers[1].scaling * b @ a)):
        torch.testing.assert_close(layer.magnitude.detach(), made.norm(dim=1), rtol=1e-4, atol=0)

"""LoRA: what is wrapped, what is trained, and what an adapter computes."""

import functools
import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qlite
from qlite.lora import LoRAConfig, LoRALinear, add_lora, lora_parameters


def seeded(*shape, seed=5, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def base_of(kind, in_features=64, out_features=32, dtype=torch.float32):
    dense = nn.Linear(in_features, out_features, bias=True, dtype=dtype)
    dense.weight.data, dense.bias.data = seeded(out_features, in_features, dtype=dtype), seeded(out_features, dtype=dtype)
    if kind is None:
        return dense
    layer = kind(in_features, out_features, dtype=dtype).quantize_(dense.weight.data)
    layer.bias = dense.bias
    return layer


kinds = st.sampled_from((None, qlite.Linear4bit, qlite.Linear8bit, functools.partial(qlite.Linear4bit, block_size=32)))
dtypes = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))


def block_model():
    names = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    block = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})
    return nn.ModuleDict({"h": nn.ModuleList([block]), "lm_head": nn.Linear(8, 8)})


@given(kinds, dtypes, st.integers(1, 40), st.integers(1, 70), st.integers(1, 6), st.floats(0, 0.9))
def test_an_untrained_adapter_changes_no_bit(kind, dtype, in_features, out_features, r, dropout):
    base = base_of(kind, in_features, out_features, dtype)
    layer = LoRALinear(base, LoRAConfig(r=r, dropout=dropout))
    x = seeded(3, in_features, dtype=dtype)
    assert torch.equal(layer(x), base(x))


@given(kinds, st.integers(1, 40), st.integers(1, 70), st.integers(1, 6), st.floats(0.1, 64))
def test_the_adapter_adds_its_delta_to_the_weight(kind, in_features, out_features, r, alpha):
    base = base_of(kind, in_features, out_features)
    layer = LoRALinear(base, LoRAConfig(r=r, alpha=alpha, dropout=0.0))
    layer.lora_B.data = seeded(out_features, r, seed=6)
    dense = base.weight.detach() if kind is None else base.dequantize()
    x = seeded(3, in_features)
    merged = nn.functional.linear(x.double(), dense.double() + layer.merged(torch.zeros(())).double(), base.bias.double())
    # Sums of in_features + r float32 terms; magnitudes as a float64 product of absolute values.
    magnitude = (
        x.double().abs() @ (dense.double().abs() + layer.scaling * layer.lora_B.double().abs() @ layer.lora_A.double().abs()).T
        + base.bias.double().abs()
    )
    bound = (in_features + r + 4) * 2**-23 * magnitude
    assert bool(((layer(x).double() - merged).abs() <= bound).all())


@given(kinds)
def test_the_first_gradient_reaches_b_alone_and_no_byte_of_the_base_changes(kind):
    layer = LoRALinear(base_of(kind), LoRAConfig(r=4, dropout=0.0))
    layer.base.requires_grad_(False)
    digest = lambda: [hashlib.sha256(t.numpy().tobytes()).digest() for t in layer.base.state_dict().values()]  # noqa: E731
    before = digest()
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    layer(seeded(3, 64)).square().sum().backward()
    assert bool((layer.lora_A.grad == 0).all()) and bool((layer.lora_B.grad != 0).any())
    optimizer.step()
    assert digest() == before and all(p.grad is None for p in layer.base.parameters())


def test_gradients_equal_float64():
    layer = LoRALinear(base_of(qlite.Linear4bit), LoRAConfig(r=4, alpha=8.0, dropout=0.0))
    layer.lora_B.data = seeded(32, 4, seed=6)
    x, grad = seeded(10, 64), seeded(10, 32, seed=8)
    layer(x).backward(grad)
    a, b, x, grad = (t.detach().double() for t in (layer.lora_A, layer.lora_B, x, grad))
    # Relative Frobenius error of float32 products, 2^-20 as a generous multiple of 2^-24.
    for found, exact in ((layer.lora_A.grad, 2 * b.T @ grad.T @ x), (layer.lora_B.grad, 2 * grad.T @ (x @ a.T))):
        assert (found.double() - exact).norm() <= 2**-20 * exact.norm()


def test_dropout_acts_on_the_adapter_and_not_on_the_base():
    layer = LoRALinear(base_of(None), LoRAConfig(r=4, dropout=0.5))
    layer.lora_B.data = seeded(32, 4, seed=6)
    x = seeded(400, 64)
    torch.manual_seed(0)
    updates = torch.stack([layer(x) - layer.base(x) for _ in range(50)])
    assert not torch.equal(updates[0], updates[1])
    exact = x @ layer.merged(torch.zeros(())).T
    # The mean of 50 masks: each share of noise is about 1 / sqrt(50) of the update.
    assert (updates.mean(dim=0) - exact).norm() / exact.norm() < 0.2
    layer.eval()
    torch.testing.assert_close(layer(x), layer.base(x) + exact, rtol=1e-4, atol=1e-3)


def test_a_starts_uniform_within_one_over_root_in_features_and_is_seeded():
    layers = [LoRALinear(nn.Linear(64, 32), LoRAConfig(), generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(layers[0].lora_A, layers[1].lora_A) and not torch.equal(layers[0].lora_A, layers[2].lora_A)
    start = layers[0].lora_A
    assert start.abs().max() <= 1 / 8 and start.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
        (["query_key_value"], ["query_key_value"]),
        (["dense"], ["dense"]),
        (["h.0.dense", "lm_head"], ["dense", "lm_head"]),
        (r".*dense.*", ["dense", "dense_h_to_4h", "dense_4h_to_h"]),
    ],
)
def test_targets_select_by_suffix_by_name_by_expression_or_all(targets, expected):
    report = add_lora(block_model(), LoRAConfig(r=2, targets=targets))
    assert [name.rpartition(".")[2] for name in report.targets] == expected


@pytest.mark.parametrize("targets", [["query_key_vaule"], ["query_key_value", "query_key_vaule"], "h.0.query_key_vaul"])
def test_a_target_that_matches_nothing_is_an_error_with_close_names(targets):
    model = block_model()
    with pytest.raises(ValueError, match=r"matches no linear layer; close names: .*query_key_value"):
        add_lora(model, LoRAConfig(targets=targets))
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_only_adapters_are_trained_and_the_order_is_that_of_the_modules():
    model = block_model()
    config = LoRAConfig(r=2)
    add_lora(model, config, seed=0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [name for name in model.state_dict() if "lora_" in name] and len(trained) == 8
    assert [id(p) for p in lora_parameters(model)] == [id(p) for p in model.parameters() if p.requires_grad]
    assert model.lora_config is config


@pytest.mark.parametrize("kind", [qlite.Linear4bit, qlite.Linear8bit, None])
def test_the_report_counts_an_encoded_weight_as_the_weights_it_stands_for(kind):
    model = block_model()
    dense = sum(p.numel() for p in model.parameters())
    if kind is not None:
        qlite.quantize_model(model, kind)
    report = add_lora(model, LoRAConfig(r=2))
    assert (report.trainable, report.total) == (4 * 2 * 16, dense + 4 * 2 * 16)


def test_falcon_7b_counts_as_published():
    with torch.device("meta"):
        shapes = {"query_key_value": (4544, 4672), "dense": (4544, 4544), "up": (4544, 18176), "down": (18176, 4544)}
        blocks = [
            nn.ModuleDict({**{n: nn.Linear(*s, bias=False) for n, s in shapes.items()}, "norm": nn.LayerNorm(4544)})
            for _ in range(32)
        ]
        model = nn.ModuleDict({"e": nn.Embedding(65024, 4544), "h": nn.ModuleList(blocks), "f": nn.LayerNorm(4544)})
    qlite.quantize_model(model)
    report = add_lora(model, LoRAConfig.qlora_2023())
    assert str(report) == "LoRA on 32 layers: trainable 4,718,592 of 6,926,439,296 (0.068 %)"


def test_a_second_adapter_is_refused():
    model = block_model()
    add_lora(model, LoRAConfig(r=2))
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model, LoRAConfig(r=2))


def test_no_adapters_is_an_error():
    with pytest.raises(ValueError, match="call add_lora first"):
        lora_parameters(block_model())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"r": 0}, ValueError, "r is 0"),
        ({"r": 8.0}, TypeError, "wanted an int"),
        ({"r": True}, TypeError, "wanted an int"),
        ({"alpha": float("nan")}, ValueError, "alpha is nan"),
        ({"alpha": 0}, ValueError, "alpha is 0"),
        ({"dropout": 1.0}, ValueError, "dropout is 1.0"),
        ({"targets": []}, ValueError, "targets is empty"),
    ],
)
def test_bad_options_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        LoRAConfig(**options)


def test_a_broken_expression_is_refused():
    with pytest.raises(ValueError, match="no regular expression"):
        add_lora(block_model(), LoRAConfig(targets="(dense"))

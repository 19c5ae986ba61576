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
    merged = nn.functional.linear(x.double(), layer.merged(dense).double(), base.bias.double())
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
    exact = x @ layer.merged(torch.zeros(32, 64)).T
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
        ({"targets": "dense|up", "layers": [1]}, ValueError, "layers goes with names"),
        ({"rank_pattern": {"dense": 0}}, ValueError, "dense is 0"),
        ({"alpha_pattern": {"dense": 0}}, ValueError, "dense is 0"),
        ({"rank_pattern": {"(": 1}}, ValueError, "no regular expression"),
        ({"alpha_pattern": {"(a*)*b": 1}}, ValueError, "repeats a group"),
        ({"modules_to_save": "lm_head"}, ValueError, "wanted a list"),
        ({"init": "olora"}, ValueError, "wanted one of kaiming, gaussian, pissa, loftq"),
    ],
)
def test_bad_options_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        LoRAConfig(**options)


def test_a_broken_expression_is_refused():
    with pytest.raises(ValueError, match="no regular expression"):
        add_lora(block_model(), LoRAConfig(targets="(dense"))


# Which layers, and of what size.


def two_blocks():
    names = ("query_key_value", "dense", "dense_h_to_4h")
    blocks = [nn.ModuleDict({**{name: nn.Linear(8, 8) for name in names}, "norm": nn.LayerNorm(8)}) for _ in range(2)]
    model = nn.ModuleDict({"emb": nn.Embedding(5, 8), "h": nn.ModuleList(blocks), "lm_head": nn.Linear(8, 5, bias=False)})
    model["lm_head"].weight = model["emb"].weight
    return model


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"exclude": ["dense"]}, {"h.0.query_key_value", "h.0.dense_h_to_4h", "h.1.query_key_value", "h.1.dense_h_to_4h"}),
        ({"exclude": r"h\.0\..*|.*dense.*"}, {"h.1.query_key_value"}),
        ({"layers": [1]}, {"h.1.query_key_value", "h.1.dense", "h.1.dense_h_to_4h"}),
        ({"targets": ["dense", "query_key_value"], "layers": (0,), "exclude": ["h.0.dense"]}, {"h.0.query_key_value"}),
        ({"modules_to_save": ["h.1"], "targets": ["dense", "lm_head"]}, {"h.0.dense", "lm_head"}),
    ],
)
def test_layers_are_left_out_by_name_expression_or_block(options, expected):
    assert set(add_lora(two_blocks(), LoRAConfig(r=2, **options)).targets) == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exclude": ["dens"]}, "exclude 'dens' matches no linear layer; close names: dense"),
        ({"exclude": "("}, "exclude is no regular expression"),
        ({"exclude": ".*"}, "exclude leaves no layer"),
        ({"layers": [0, 2]}, "layers names block 2"),
        ({"rank_pattern": {"ense": 2}}, "the pattern 'ense' matches no layer that gets an adapter"),
        ({"rank_pattern": {"dens": 2}}, "the pattern 'dens' matches no layer that gets an adapter"),
        ({"alpha_pattern": {"lm_head": 2}}, "the pattern 'lm_head' matches no layer"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save 'lm_haed' matches no module; close names: lm_head"),
        ({"modules_to_save": ["h.1", "norm"]}, r"h\.1 of modules_to_save holds another one"),
        ({"init": "loftq"}, "dense goes with 'loftq'"),
    ],
)
def test_a_config_that_names_what_is_not_there_is_refused_and_the_model_is_as_it_was(options, words):
    model = two_blocks()
    with pytest.raises(ValueError, match=words):
        add_lora(model, LoRAConfig(r=2, **options))
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "lora_config")
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_the_first_pattern_that_ends_a_name_sets_rank_and_alpha():
    ranks, alphas = {r"h\.0\.dense": 5, "dense": 3, ".*to_4h": 4, ".*h_to_.*": 7}, {"0.query_key_value": 2.0}
    model = two_blocks()
    add_lora(model, LoRAConfig(r=2, alpha=8.0, rank_pattern=ranks, alpha_pattern=alphas))
    found = {name: (m.lora_A.shape[0], m.scaling) for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert found == {
        "h.0.query_key_value": (2, 1.0), "h.0.dense": (5, 8 / 5), "h.0.dense_h_to_4h": (4, 2.0),
        "h.1.query_key_value": (2, 4.0), "h.1.dense": (3, 8 / 3), "h.1.dense_h_to_4h": (4, 2.0),
    }  # fmt: skip
    assert LoRAConfig(r=16, alpha=8.0, rslora=True).scaling == 2.0


def test_a_module_to_save_is_trained_whole_and_a_tied_one_leaves_its_twin_alone():
    model = two_blocks()
    report = add_lora(model, LoRAConfig(r=2, targets=["dense"], modules_to_save=["lm_head", "h.0.norm"]))
    assert report.saved == ("h.0.norm", "lm_head")
    assert str(report).startswith("LoRA on 2 layers and all of h.0.norm, lm_head: trainable 120 of ")
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert trained == {"h.0.norm.weight", "h.0.norm.bias", "lm_head.weight"}
    assert {id(p) for p in lora_parameters(model)} == {id(p) for p in model.parameters() if p.requires_grad}
    assert model["lm_head"].weight is not model["emb"].weight and torch.equal(model["lm_head"].weight, model["emb"].weight)


def test_an_encoded_module_cannot_be_saved_whole():
    model = two_blocks()
    qlite.quantize_model(model)
    with pytest.raises(ValueError, match=r"h\.0 of modules_to_save cannot be trained: .*weight is encoded"):
        add_lora(model, LoRAConfig(targets=["h.1.dense"], modules_to_save=["h.0"]))


# DoRA.


@given(kinds, st.integers(1, 40), st.integers(1, 70), st.integers(1, 6), st.booleans())
def test_dora_gives_each_row_of_the_sum_the_trained_norm(kind, in_features, out_features, r, moved):
    base = base_of(kind, in_features, out_features)
    layer = LoRALinear(base, LoRAConfig(r=r, alpha=8.0, dropout=0.0, dora=True))
    x = seeded(3, in_features)
    assert torch.equal(layer(x), base(x))  # untrained, no bit changes
    layer.lora_B.data = seeded(out_features, r, seed=6) * 0.3
    if moved:
        layer.magnitude.data *= 1.5
    dense = (base.weight.detach() if kind is None else base.dequantize()).double()
    total = dense + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    gain = layer.magnitude.double() / total.norm(dim=1)
    exact = x.double() @ (gain[:, None] * total).T + base.bias.double()
    # The norm is the root of a sum in which terms may cancel: its relative error is that of the terms, not of the sum.
    terms = (dense.norm(dim=1) + layer.scaling * (layer.lora_B.double().abs() @ layer.lora_A.double().abs()).norm(dim=1)) ** 2
    lost = (in_features + r + 8) * 2**-23 * terms / total.norm(dim=1) ** 2
    magnitude = x.double().abs() @ (gain[:, None] * total.abs() + 2 * dense.abs()).T + 2 * base.bias.double().abs()
    bound = ((in_features + r + 8) * 2**-23 + lost) * (magnitude + 4 * layer.scaling * x.double().norm(dim=1)[:, None] * gain)
    assert bool(((layer(x).double() - exact).abs() <= bound).all())
    merged = layer.merged(dense.float()).double()
    torch.testing.assert_close(merged, gain[:, None] * total, rtol=1e-4, atol=1e-5)


def test_dora_holds_the_norm_constant_in_the_gradient():
    layer = LoRALinear(base_of(qlite.Linear4bit), LoRAConfig(r=4, alpha=8.0, dropout=0.0, dora=True))
    layer.lora_B.data, layer.magnitude.data = seeded(32, 4, seed=6), layer.magnitude.data * 1.5
    x, grad = seeded(10, 64), seeded(10, 32, seed=8)
    layer(x).backward(grad)
    a, b, m = (t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B, layer.magnitude))
    total = layer.base.dequantize().double() + layer.scaling * b @ a
    exact = (x.double() @ total.T) * (m / total.norm(dim=1).detach())
    exact.backward(grad.double())
    for found, wanted in ((layer.lora_A.grad, a.grad), (layer.lora_B.grad, b.grad), (layer.magnitude.grad, m.grad)):
        assert (found.double() - wanted).norm() <= 2**-18 * wanted.norm()


@pytest.mark.parametrize("kind", [None, qlite.Linear4bit, qlite.Linear8bit])
def test_an_adapted_layer_tells_dtype_and_device_and_gives_no_weight_to_multiply_by(kind):
    layer = LoRALinear(base_of(kind, dtype=torch.bfloat16), LoRAConfig(r=2))
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.device == layer.lora_A.device
    with pytest.raises(RuntimeError):
        nn.functional.linear(seeded(3, 64, dtype=torch.bfloat16), layer.weight)


def test_a_row_of_zeros_stays_zero_under_dora():
    base = nn.Linear(8, 4)
    base.weight.data[1] = 0
    layer = LoRALinear(base, LoRAConfig(r=2, dora=True))
    layer(seeded(3, 8)).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in (layer.lora_A, layer.lora_B, layer.magnitude))


@pytest.mark.parametrize("options", [{"dora": True}, {"init": "pissa"}])
def test_what_needs_the_base_s_weight_is_refused_on_meta(options):
    with pytest.raises(ValueError, match="need the base's weight; load it first"):
        add_lora(nn.Sequential(nn.Linear(8, 8, device="meta")), LoRAConfig(r=2, **options))


# transformers' Conv1D keeps its weight the other way round.


class Conv1D(nn.Module):
    def __init__(self, nf, nx):
        super().__init__()
        self.nx, self.nf, self.weight, self.bias = nx, nf, nn.Parameter(seeded(nx, nf)), nn.Parameter(seeded(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}], ids=str)
def test_a_conv1d_is_a_linear_layer(options):
    model = nn.Sequential(Conv1D(6, 8))
    report = add_lora(model, LoRAConfig(r=2, dropout=0.0, **options), seed=0)
    layer = model[0]
    assert report.targets == ("0",) and (layer.in_features, layer.out_features) == (8, 6)
    for parameter in lora_parameters(model):
        parameter.data += 0.1
    x = seeded(3, 8)
    merged = layer.merged(layer.base.weight.T)
    # Float32 sums of ten products of about 1, in another order.
    torch.testing.assert_close(layer(x), x @ merged.T + layer.base.bias, rtol=1e-5, atol=1e-5)

"""Encoded linear layers and the call that puts them into a model."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import qlite
from qlite.linear import Linear4bit, Linear8bit, QuantizedLinear
from qlite.nf4 import FP4_LEVELS, NF4_LEVELS
from tests.strategies import UNIFORM_LEVELS

KINDS = [
    Linear4bit,
    Linear8bit,
    functools.partial(Linear4bit, double_quant=False, block_size=32),
    functools.partial(Linear4bit, levels=FP4_LEVELS),
    functools.partial(Linear4bit, flat=True),
]


def seeded(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def layer_of(kind, bias=True):
    layer = kind(96, 40, bias=bias)
    if bias:
        layer.bias.data = seeded(40)
    return layer.quantize_(seeded(40, 96))


def encoded_bytes(layer):
    state = {key: tensor for key, tensor in layer.state_dict().items() if key != "bias"}
    return {key: (tensor.dtype, tensor.numpy().tobytes()) for key, tensor in state.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_product_with_the_decoded_weight(kind):
    layer, x = layer_of(kind), seeded(3, 96)
    # float32 dot products of 96 terms in two orders of summation.
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantize(), layer.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("levels", [NF4_LEVELS, FP4_LEVELS, UNIFORM_LEVELS])
@pytest.mark.parametrize("block_size", [32, 128])
def test_a_4bit_layer_holds_what_quantize_nf4_writes_with_the_same_options(block_size, levels, double_quant):
    options = {"block_size": block_size, "levels": levels, "double_quant": double_quant}
    layer, q = Linear4bit(96, 40, **options).quantize_(seeded(40, 96)), qlite.quantize_nf4(seeded(40, 96), **options)
    assert torch.equal(layer.weight, q.codes) and torch.equal(layer.absmax, q.absmax) and torch.equal(layer.levels, q.levels)
    assert torch.equal(layer.dequantize(), q.dequantize())


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoded_weight_is_close_to_the_dense_one(kind):
    error = (layer_of(kind).dequantize() - seeded(40, 96)).norm() / seeded(40, 96).norm()
    # Relative Frobenius error on normal weights: about 0.09 (NF4), 0.12 (FP4), 0.007 (int8 by rows).
    assert error < (0.01 if kind is Linear8bit else 0.14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_a_cast_leaves_codes_and_scales_alone(kind, cast):
    layer = layer_of(kind)
    before = encoded_bytes(layer)
    getattr(layer, cast)()
    assert encoded_bytes(layer) == before
    assert layer.bias.dtype == getattr(torch.empty(0), cast)().dtype == layer.dequantize().dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_gives_the_same_bits_and_shares_no_memory(kind, copied):
    layer = layer_of(kind)
    twin = copied(layer)
    assert torch.equal(twin(seeded(2, 96)), layer(seeded(2, 96)))
    assert twin.weight.data_ptr() != layer.weight.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_loads_into_a_layer_on_meta_by_assignment(kind):
    layer = layer_of(kind)
    empty = kind(96, 40, bias=True, device="meta")
    empty.load_state_dict(layer.state_dict(), strict=True, assign=True)
    assert torch.equal(empty(seeded(2, 96)), layer(seeded(2, 96)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_loads_into_another_layer_by_copy(kind):
    layer = layer_of(kind)
    other = kind(96, 40, bias=True)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(seeded(2, 96)), layer(seeded(2, 96)))


@pytest.mark.parametrize("kind", KINDS)
def test_to_meta_and_to_empty_keep_shapes_and_dtypes(kind):
    layer = layer_of(kind)
    shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in layer.state_dict().items()}
    for moved in (copy.deepcopy(layer).to("meta"), copy.deepcopy(layer).to("meta").to_empty(device="cpu")):
        assert {key: (tensor.shape, tensor.dtype) for key, tensor in moved.state_dict().items()} == shapes


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_has_no_gradient_and_cannot_get_one(kind):
    layer = layer_of(kind)
    x = seeded(2, 96).requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None and x.grad is not None
    with pytest.raises(RuntimeError, match="floating point"):
        layer.weight.requires_grad_(True)


def test_config_builds_a_layer_of_the_same_layout():
    assert layer_of(Linear4bit).config() == {"format": "nf4", "block_size": 64, "double_quant": True}
    assert layer_of(Linear8bit).config() == {"format": "int8"}
    assert layer_of(KINDS[3]).config()["format"] == "fp4"
    table = tuple((2 * i - 15) / 15 for i in range(16))
    assert Linear4bit(64, 8, levels=table).config()["levels"] == list(table)
    assert Linear4bit(64, 8, flat=True).config() == {"format": "nf4", "block_size": 64, "double_quant": True, "flat": True}


@pytest.mark.parametrize(("shape", "block_size"), [((40, 96), 64), ((3, 5), 32), ((7, 1), 32), ((1, 70), 64), ((0, 70), 64)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_flat_layer_is_its_weight_encoded_as_one_row(shape, block_size, double_quant):
    dense, options = seeded(*shape), {"block_size": block_size, "double_quant": double_quant}
    layer = Linear4bit(*shape[::-1], flat=True, **options)
    held = {name: (tensor.dtype, tensor.shape) for name, tensor in layer.state_dict().items()}
    layer.quantize_(dense)
    assert held == {name: (tensor.dtype, tensor.shape) for name, tensor in layer.state_dict().items()}
    row = qlite.quantize_nf4(dense.reshape(1, -1), **options)
    assert torch.equal(layer.weight, row.codes) and torch.equal(layer.absmax, row.absmax)
    assert layer.weight.shape == (1, (dense.numel() + 1) // 2) and layer.dequantize().shape == shape
    assert torch.equal(layer.dequantize().flatten(), row.dequantize().flatten())
    x = seeded(2, shape[1]).requires_grad_()
    y = layer(x)
    assert torch.equal(y, torch.nn.functional.linear(x, layer.dequantize(), layer.bias))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(2, shape[0]) @ layer.dequantize())


def test_a_flat_layer_of_whole_blocks_has_the_bytes_of_one_that_is_not():
    flat, rows = (Linear4bit(128, 40, flat=flat).quantize_(seeded(40, 128)) for flat in (True, False))
    for name in ("weight", "absmax", "absmax_scale", "absmax_offset"):
        assert torch.equal(getattr(flat, name).flatten(), getattr(rows, name).flatten())
    assert torch.equal(flat.dequantize(), rows.dequantize())


def test_a_dense_weight_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(96, 40\); wanted .* \(40, 96\)"):
        Linear4bit(96, 40).quantize_(seeded(96, 40))


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        QuantizedLinear(4, 4, True, None, None)


class LinearSubclass(nn.Linear):
    """As transformers' FalconLinear: a subclass that a test of `type(module) is nn.Linear` would not find."""


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 64)
        self.block = nn.ModuleDict({"up": LinearSubclass(64, 128), "down": nn.Linear(128, 64, bias=False)})
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 10, bias=False)

    def forward(self, ids):
        hidden = self.embedding(ids)
        return self.lm_head(self.norm(hidden + self.block["down"](torch.relu(self.block["up"](hidden)))))


def test_quantize_model_replaces_linears_and_their_subclasses_and_says_what_it_left():
    model = Tiny()
    ids = torch.arange(10)
    before = model(ids)
    report = qlite.quantize_model(model)
    assert set(report.quantized) == {"block.up", "block.down"}
    assert set(report.skipped) == {"embedding", "norm", "lm_head"}
    assert report.quantized["block.down"][0] == 128 * 64 * 4
    # 4 bits and an 8-bit absmax per 64 weights; one scale, one offset and 16 levels of float32.
    assert report.quantized["block.down"][1] == 128 * 64 // 2 + 128 + 4 + 4 + 64
    assert "not a linear layer (Embedding)" in str(report) and "named in skip (lm_head)" in str(report)
    assert (model(ids) - before).norm() / before.norm() < 0.2


def test_a_weight_that_is_tied_to_another_module_stays_dense():
    model = Tiny()
    model.lm_head.weight = model.embedding.weight
    report = qlite.quantize_model(model, skip=())
    assert report.skipped["lm_head"][1] == "its weight is also embedding.weight"
    assert model.lm_head.weight is model.embedding.weight


def test_a_meta_model_is_quantized_without_any_memory():
    with torch.device("meta"):
        model = Tiny()
    report = qlite.quantize_model(model, qlite.Linear8bit)
    assert len(report.quantized) == 2
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}


def test_a_model_without_linears_is_an_error_and_not_a_silent_success():
    with pytest.raises(ValueError, match="no linear layer of Sequential was quantized"):
        qlite.quantize_model(nn.Sequential(nn.Embedding(4, 4)))


def test_quantizing_twice_is_an_error():
    model = Tiny()
    qlite.quantize_model(model)
    with pytest.raises(ValueError, match="already quantized"):
        qlite.quantize_model(model)


def test_a_non_finite_weight_is_refused_with_the_name_of_its_layer():
    model = Tiny()
    model.block["down"].weight.data[3, 5] = float("inf")
    with pytest.raises(ValueError, match=r"block.down: .*non-finite.*\[3, 5\]"):
        qlite.quantize_model(model)


def test_evaluation_mode_is_kept():
    model = Tiny().eval()
    qlite.quantize_model(model)
    assert not any(module.training for module in model.modules())


def test_compiles_to_one_graph_with_lora_on_top():
    model = Tiny().requires_grad_(False)
    qlite.quantize_model(model)
    qlite.add_lora(model, qlite.LoRAConfig(r=2, dropout=0.0), seed=0)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(torch.arange(10)), model(torch.arange(10)))


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def test_a_subclass_with_a_forward_of_its_own_is_named_in_the_report():
    model = nn.Sequential(nn.Linear(64, 64), Tripled(64, 64))
    report = qlite.quantize_model(model)
    assert report.overridden == {"1": "Tripled"} and "1 of them were Tripled, whose own forward" in str(report)


def test_torchs_own_attention_still_runs_with_its_output_layer_left_dense():
    model = nn.Sequential(nn.Linear(64, 64))
    model.attention = nn.MultiheadAttention(64, 4, batch_first=True)
    report = qlite.quantize_model(model)
    assert set(report.quantized) == {"0"} and "read by the module above" in report.skipped["attention.out_proj"][1]
    assert qlite.add_lora(model, qlite.LoRAConfig(r=2)).targets == ("0",)
    x = seeded(1, 3, 64)
    assert model.attention(x, x, x)[0].shape == (1, 3, 64)


def test_a_weight_that_is_computed_is_left_dense():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)), nn.Linear(64, 64))
    report = qlite.quantize_model(model)
    assert set(report.quantized) == {"1"} and model(seeded(2, 64)).shape == (2, 64)


def test_a_cast_takes_the_gradient_of_the_bias_along():
    layer = layer_of(Linear4bit)
    layer(seeded(2, 96)).sum().backward()
    layer.half()
    assert layer.bias.grad is not None and layer.bias.dtype == layer.bias.grad.dtype == torch.float16


@pytest.mark.parametrize("kind", [Linear4bit, Linear8bit])
def test_a_layer_without_inputs_gives_its_bias(kind):
    layer = kind(0, 5).quantize_(torch.zeros(5, 0))
    with torch.no_grad():
        layer.bias.copy_(seeded(5))
    assert torch.equal(layer(torch.zeros(2, 0)), seeded(5).expand(2, 5))

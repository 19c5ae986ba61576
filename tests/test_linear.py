"""Encoded linear layers."""

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

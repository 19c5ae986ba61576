"""The kernels around a few tokens' products against float64: on the GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qlite
from qlite import model_ops
from tests.strategies import DTYPES

pytest.importorskip("triton", reason="Triton is not built for this platform")
from qlite.kernels import few_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
dtypes = st.sampled_from(DTYPES)


def draw(*shape, dtype=torch.float32, seed=0, scale=1.0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return values.to(dtype).to(DEVICE)


@given(
    st.integers(0, 3),
    st.sampled_from([1, 2, 48, 100, 1000]),
    dtypes,
    st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    st.integers(0, 9),
)
def test_layer_norm_is_that_of_float64(rows, columns, dtype, scale, seed):
    x, weight, bias = (
        draw(rows, columns, dtype=dtype, scale=scale),
        draw(columns, dtype=dtype),
        draw(columns, dtype=dtype, seed=1),
    )
    y = few_tokens.layer_norm(x, weight, bias, 1e-5)
    wanted = torch.nn.functional.layer_norm(x.double(), (columns,), weight.double(), bias.double(), 1e-5)
    # One rounding to the dtype, and float32 sums of `columns` terms before it.
    normed = (wanted - bias.double()).abs() + weight.double().abs() + bias.double().abs()
    assert y.dtype == dtype and y.shape == x.shape
    assert ((y.double() - wanted).abs() <= UNIT[dtype] * wanted.abs() + 2.0**-23 * (columns**0.5 + 8) * normed + 1e-7).all()


@given(
    rows=st.integers(0, 3), columns=st.sampled_from([1, 63, 1025]), out=st.sampled_from([1, 64, 100]),
    rank=st.sampled_from([1, 3, 16]), dtype=dtypes, x_dtype=dtypes, scaling=st.sampled_from([0.5, 2.0]),
)  # fmt: skip
def test_an_update_is_that_of_float64(rows, columns, out, rank, dtype, x_dtype, scaling):
    y, x = draw(rows, out, dtype=dtype), draw(rows, columns, dtype=x_dtype, seed=1)
    a, b = draw(rank, columns, seed=2), draw(out, rank, seed=3)
    found = few_tokens.lora_add(y, x, a, b, scaling)
    wanted = y.double() + scaling * (x.double() @ a.double().T) @ b.double().T
    size = y.double().abs() + scaling * (x.double().abs() @ a.double().abs().T) @ b.double().abs().T
    assert found.dtype == dtype and found.shape == y.shape
    # One rounding to the dtype, and float32 sums of `columns` and `rank` terms.
    assert ((found.double() - wanted).abs() <= UNIT[dtype] * wanted.abs() + 2.0**-24 * (columns + rank + 4) * size).all()


def adapted(dtype=torch.float32, **options):
    layer = qlite.LoRALinear(qlite.Linear4bit(64, 48), qlite.LoRAConfig(r=4, **options)).to(DEVICE)
    layer.base.quantize_(draw(48, 64))
    with torch.no_grad():
        layer.lora_B.copy_(draw(48, 4, seed=5))
    return layer.eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, model_ops.MOST_ROWS, model_ops.MOST_ROWS + 1])
def test_an_adapter_says_the_same_with_gradients_and_without(rows, dtype):
    layer, x = adapted(), draw(rows, 64, dtype=dtype)
    wanted = layer(x)
    with torch.no_grad():
        found = layer(x)
    # The update is rounded to the dtype twice more on the way with gradients.
    assert found.dtype == wanted.dtype and (found - wanted).norm() <= 4 * UNIT[dtype] * wanted.norm()
    assert torch.equal(found, wanted) or DEVICE == "cuda"


def test_forward_mode_and_dropout_take_the_way_that_knows_them():
    layer, x = adapted(dropout=0.5), draw(3, 64)
    with torch.no_grad():
        _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    wanted = layer(x + 1) - layer(x)
    assert (tangent - wanted).norm() <= 1e-4 * wanted.norm()
    layer.train()
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("columns", [4544, model_ops.WIDEST, model_ops.WIDEST + 1])
def test_the_op_takes_any_width(columns):
    x, weight, bias = (
        draw(2, columns, dtype=torch.bfloat16),
        draw(columns, dtype=torch.bfloat16),
        draw(columns, dtype=torch.bfloat16),
    )
    wanted = torch.nn.functional.layer_norm(x.double(), (columns,), weight.double(), bias.double(), 1e-5)
    assert (torch.ops.qlite.layer_norm(x, weight, bias, 1e-5) - wanted).norm() <= 2.0**-8 * wanted.norm()

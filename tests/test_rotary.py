"""Rotary positions: angles, gradient, and the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlite import model_ops, rotary
from tests.strategies import DTYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def example(batch, tokens, groups, group, half, dtype, *, rows=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, groups, group, 2 * half, generator=generator, dtype=torch.float64).to(dtype)
    angles = 7 * torch.randn(batch if rows > 1 else 1, tokens, half, generator=generator, dtype=torch.float64)
    return x, angles.cos().to(dtype), angles.sin().to(dtype)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 3), st.integers(2, 4), st.integers(1, 5), st.integers(1, 2))
def test_pairs_are_turned_as_complex_numbers_are(batch, tokens, groups, group, half, rows):
    x, cos, sin = example(batch, tokens, groups, group, half, torch.float64, rows=rows)
    y = rotary.rotate(x, cos, sin)
    pairs = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)[:, :, None, None]
    wanted = torch.cat((pairs.real, pairs.imag), dim=-1)
    assert torch.allclose(y[..., :-1, :], wanted[..., :-1, :], atol=1e-12) and torch.equal(y[..., -1, :], x[..., -1, :])
    assert torch.allclose(rotary.rotate(y, cos, -sin), x, atol=1e-12)


def test_the_gradient_turns_back():
    x, cos, sin = example(2, 3, 2, 3, 2, torch.float64, rows=2)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model_ops.rotate(x, cos, sin), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: model_ops.rotate(x, cos, sin), x)


@given(
    batch=st.integers(1, 2), tokens=st.integers(0, 4), groups=st.integers(1, 3), group=st.sampled_from([3, 5, 40]),
    half=st.sampled_from([1, 3, 32, 33]), rows=st.integers(1, 2), dtype=st.sampled_from(DTYPES), strided=st.booleans(),
)  # fmt: skip
def test_the_kernel_is_the_reference_bit_for_bit(batch, tokens, groups, group, half, rows, dtype, strided):
    kernels = pytest.importorskip("qlite.kernels.rotary", reason="Triton is not built for this platform")
    x, cos, sin = (tensor.to(DEVICE) for tensor in example(batch, tokens, groups, group, half, dtype, rows=rows))
    x = x.transpose(0, 1).contiguous().transpose(0, 1) if strided else x
    assert torch.equal(kernels.rotate(x, cos, sin), rotary.rotate(x, cos, sin))


@pytest.mark.parametrize("rows", [1, 2])
def test_the_kernel_takes_what_vmap_gives_it(rows):
    kernels = pytest.importorskip("qlite.kernels.rotary", reason="Triton is not built for this platform")
    x, cos, sin = (tensor.to(DEVICE) for tensor in example(2, 3, 2, 3, 4, torch.float32, rows=rows))
    x = torch.stack((x, x + 1, x * 2))
    assert torch.equal(kernels.rotate(x, cos, sin), rotary.rotate(x, cos, sin))

"""The ops on CUDA tensors: that the kernels run, and that their products are as near to float64 as a dense layer's."""

import pytest
import torch

import qlite
from qlite import nf4, ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="the CUDA implementations of the ops")

SHAPES = [(64, 128), (4672, 4544), (100, 65)]


def seeded(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to("cuda", dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_encoding_and_decoding_on_cuda_equal_the_cpu_bit_for_bit(shape, double_quant, dtype):
    w = seeded(*shape, dtype=dtype)
    here = qlite.quantize_nf4(w, double_quant=double_quant)
    there = qlite.quantize_nf4(w.cpu(), double_quant=double_quant)
    for name in ("codes", "absmax", "absmax_scale", "absmax_offset"):
        a, b = getattr(here, name), getattr(there, name)
        assert (a is None and b is None) or torch.equal(a.cpu(), b), name
    assert torch.equal(here.dequantize().cpu(), there.dequantize())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7, 300])
def test_linear_nf4_and_its_gradient_are_as_near_to_float64_as_one_rounding_allows(shape, dtype, rows):
    q = qlite.quantize_nf4(seeded(*shape, dtype=dtype) / shape[1] ** 0.5)
    x = seeded(rows, shape[1], dtype=dtype).requires_grad_()
    y = ops.linear_nf4(x, q)
    grad = seeded(*y.shape, dtype=dtype)
    (grad_x,) = torch.autograd.grad(y, x, grad)
    exact = q.dequantize(torch.float32).double()
    # One rounding of each weight and one of the result to the dtype, and float32 sums of K terms in any order.
    roundoff = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for found, left, right in ((y, x.detach().double(), exact.T), (grad_x, grad.double(), exact)):
        wanted = left @ right
        bound = roundoff * wanted.abs() + (roundoff + right.shape[0] * 2**-24) * 1.01 * (left.abs() @ right.abs())
        # Below float16's normal numbers a rounding costs up to half the smallest step.
        assert bool(((found.double() - wanted).abs() <= bound + 2**-24).all())


def test_the_kernel_runs_and_not_the_reference(monkeypatch):
    monkeypatch.setattr(nf4, "dequantize", lambda *arguments: pytest.fail("the reference ran on a CUDA tensor"))
    monkeypatch.setattr(nf4, "quantize", lambda *arguments: pytest.fail("the reference ran on a CUDA tensor"))
    assert qlite.quantize_nf4(seeded(8, 64)).dequantize().is_cuda


def test_no_decoded_weight_outlives_the_forward():
    q = qlite.quantize_nf4(seeded(4096, 4096, dtype=torch.bfloat16))
    x = seeded(4, 4096, dtype=torch.bfloat16).requires_grad_()
    before = torch.cuda.memory_allocated()
    y = ops.linear_nf4(x, q)
    # What stays is the output alone; a kept weight would be 32 MiB.
    assert torch.cuda.memory_allocated() - before <= y.numel() * y.element_size() + 1024

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
    # Relative Frobenius error with the weight rounded to the dtype first: measured 2.2e-3 (bf16), 2.8e-4 (fp16).
    bound = {torch.bfloat16: 2.5e-3, torch.float16: 3.1e-4}[dtype]
    for found, wanted in ((y, x.detach().double() @ exact.T), (grad_x, grad.double() @ exact)):
        assert (found.double() - wanted).norm() <= bound * wanted.norm()


def test_the_kernel_runs_and_not_the_reference(monkeypatch):
    monkeypatch.setattr(nf4, "dequantize", lambda *arguments: pytest.fail("the reference ran on a CUDA tensor"))
    monkeypatch.setattr(nf4, "quantize", lambda *arguments: pytest.fail("the reference ran on a CUDA tensor"))
    qlite.quantize_nf4(seeded(8, 64)).dequantize()


def test_no_decoded_weight_outlives_the_forward():
    q = qlite.quantize_nf4(seeded(4096, 4096, dtype=torch.bfloat16))
    x = seeded(4, 4096, dtype=torch.bfloat16).requires_grad_()
    before = torch.cuda.memory_allocated()
    y = ops.linear_nf4(x, q)
    # What stays is the output alone; a kept weight would be 32 MiB.
    assert torch.cuda.memory_allocated() - before <= y.numel() * y.element_size() + 1024

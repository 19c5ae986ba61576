"""The NF4 codec kernels against their reference, bit for bit: on the GPU, or in Triton's interpreter where there is none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qlite
from qlite import nf4
from qlite.nf4 import FP4_LEVELS, NF4_LEVELS
from tests.strategies import DTYPES, block_sizes, tables, weights

pytest.importorskip("triton", reason="Triton is not built for this platform")
from qlite.kernels import nf4_codec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def encoded(w, levels, block_size, double_quant):
    codes, absmax = nf4.quantize(w, levels, block_size)
    return (codes, *(nf4.quantize_absmax(absmax) if double_quant else (absmax, None, None)))


@given(weights(), block_sizes, tables)
def test_quantize_equals_the_reference(w, block_size, levels):
    w, levels = w.to(DEVICE), torch.tensor(levels, device=DEVICE)
    codes, absmax = nf4_codec.quantize(w, levels, block_size)
    expected_codes, expected_absmax = nf4.quantize(w, levels, block_size)
    assert torch.equal(codes, expected_codes) and torch.equal(absmax, expected_absmax)


@given(weights(), block_sizes, tables, st.booleans(), st.sampled_from(DTYPES))
def test_dequantize_equals_the_reference(w, block_size, levels, double_quant, dtype):
    w, levels = w.to(DEVICE), torch.tensor(levels, device=DEVICE)
    arguments = (*encoded(w, levels, block_size, double_quant), levels, w.shape[1], block_size, dtype)
    assert torch.equal(nf4_codec.dequantize(*arguments), nf4.dequantize(*arguments))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(5, 333), (3, 5), (61, 7)])
def test_a_flat_tensor_is_one_long_row(shape, double_quant):
    w, levels = torch.randn(shape, generator=torch.Generator().manual_seed(2)), torch.tensor(NF4_LEVELS)
    q = qlite.quantize_nf4(w, double_quant=double_quant, flat=True)
    parts = [None if part is None else part.to(DEVICE) for part in (q.codes, q.absmax, q.absmax_scale, q.absmax_offset)]
    decoded = nf4_codec.dequantize(*parts, levels.to(DEVICE), w.numel(), 64, torch.float32)
    assert torch.equal(decoded.cpu().view(shape), q.dequantize())
    codes, _ = nf4_codec.quantize(w.to(DEVICE).view(1, -1), levels.to(DEVICE), 64)
    assert torch.equal(codes.cpu(), q.codes)


@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
def test_every_block_size_has_a_kernel(block_size):
    w = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    levels = torch.tensor(NF4_LEVELS, device=DEVICE)
    codes, absmax = nf4_codec.quantize(w, levels, block_size)
    expected = nf4.quantize(w, levels, block_size)
    assert torch.equal(codes, expected[0]) and torch.equal(absmax, expected[1])
    arguments = (codes, absmax, None, None, levels, 5000, block_size, torch.float32)
    assert torch.equal(nf4_codec.dequantize(*arguments), nf4.dequantize(*arguments))


@pytest.mark.parametrize("levels", [NF4_LEVELS, FP4_LEVELS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_decodes_with_extreme_absmax(levels, dtype):
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(8, 32)
    # float16 overflows above 65,504 in both: only what it holds is compared.
    largest = 6e4 if dtype == torch.float16 else 3e38
    tiny = [1e-45, 1e-39, 2.0**-126]
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        tiny = [1e-30, 1e-20, 1e-10]  # Triton's interpreter cannot store a subnormal bfloat16
    scales = torch.tensor([0.0, *tiny, 1e-7, 1.0, 3.3, largest], device=DEVICE)[:, None]
    table = torch.tensor(levels, device=DEVICE)
    arguments = (codes, scales, None, None, table, 64, 64, dtype)
    assert torch.equal(nf4_codec.dequantize(*arguments), nf4.dequantize(*arguments))


def test_every_tie_and_its_neighbours_are_decided_as_in_the_reference():
    levels = torch.tensor(NF4_LEVELS)
    midpoints = (levels[1:] + levels[:-1]) / 2
    around = [torch.nextafter(midpoints, torch.full((15,), -9.0)), midpoints, torch.nextafter(midpoints, torch.ones(15))]
    w = torch.cat((*around, torch.ones(1))).view(1, -1).to(DEVICE)
    codes, _ = nf4_codec.quantize(w, levels.to(DEVICE), 64)
    assert torch.equal(codes, nf4.quantize(w, levels.to(DEVICE), 64)[0])
    assert nf4.unpack(codes)[0].tolist() == [*range(15), *range(15), *range(1, 16), 15]


def test_nothing_is_written_beyond_the_output():
    # Rows are views into a larger buffer: its other columns must not be read, and no neighbour be written.
    buffer = torch.full((4, 300), float("nan"), device=DEVICE)
    buffer[:, 10:107] = torch.randn(4, 97, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    levels = torch.tensor(NF4_LEVELS, device=DEVICE)
    w = buffer[:, 10:107]
    codes, absmax = nf4_codec.quantize(w, levels, 32)
    expected = nf4.quantize(w.contiguous(), levels, 32)
    assert torch.equal(codes, expected[0]) and torch.equal(absmax, expected[1])
    assert bool(torch.isfinite(absmax).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs more memory than a CPU test should take")
def test_more_than_two_to_the_31_weights_decode_at_the_right_place():
    rows, columns = 2**17 + 1, 2**14
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(rows, columns // 64, device="cuda")
    levels = torch.tensor(NF4_LEVELS, device="cuda")
    out = nf4_codec.dequantize(codes, absmax, None, None, levels, columns, 64, torch.bfloat16)
    for row in (0, rows // 2, rows - 1):
        part = (codes[row : row + 1], absmax[row : row + 1], None, None, levels, columns, 64, torch.bfloat16)
        assert torch.equal(out[row : row + 1], nf4.dequantize(*part))
    again, _ = nf4_codec.quantize(out, levels, 64)
    assert torch.equal(again[-1:], nf4.quantize(out[-1:], levels, 64)[0])

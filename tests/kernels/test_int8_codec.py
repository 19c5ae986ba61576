"""The int8 codec kernels against their reference, bit for bit: on the GPU, or in Triton's interpreter where there is none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlite import int8
from tests.strategies import DTYPES, weights

pytest.importorskip("triton", reason="Triton is not built for this platform")
from qlite.kernels import int8_codec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: What numpy says in Triton's interpreter of the arithmetic of infinities that a test asks for.
quiet = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def reference(x):
    return int8.quantize_absmax(x, per_tensor=False, block_size=max(x.shape[1], 1))


@given(weights(max_exponent=60) | weights())
def test_rows_are_encoded_as_in_the_reference(x):
    codes, absmax = int8_codec.quantize_rows(x.to(DEVICE))
    expected = reference(x)
    assert torch.equal(codes.cpu(), expected[0]) and torch.equal(absmax.cpu(), expected[1])


@given(weights(), st.sampled_from(DTYPES))
def test_rows_are_decoded_as_in_the_reference(x, dtype):
    codes, absmax = reference(x.contiguous())
    decoded = int8_codec.dequantize(codes.to(DEVICE), absmax.to(DEVICE), dtype)
    assert torch.equal(decoded.cpu(), int8.dequantize_absmax(codes, absmax, x.shape[1]).to(dtype))


@pytest.mark.parametrize("columns", [1, 4544, 8193, 32768, 32769, 40000])
def test_a_row_of_any_length_has_one_absmax(columns):
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1)).half()
    x[0, -1], x[1, 0] = 50.0, -60.0
    codes, absmax = int8_codec.quantize_rows(x.to(DEVICE))
    assert absmax.flatten().tolist()[:2] == [50.0, 60.0] or columns == 1
    assert torch.equal(codes.cpu(), reference(x)[0]) and torch.equal(absmax.cpu(), reference(x)[1])


@pytest.mark.parametrize("exponent", [-149, -140, -126, -101, -100, 100, 121])
def test_codes_are_the_same_at_both_ends_of_float32(exponent):
    x = torch.tensor([[127.0, -127.0, 64.0, 1.0, 0.0], [0.0] * 5], device=DEVICE) * 2.0**exponent
    assert int8_codec.quantize_rows(x)[0].tolist() == [[127, -127, 64, 1, 0], [0] * 5]


def test_a_tie_takes_the_even_code():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127.0]], device=DEVICE)
    assert int8_codec.quantize_rows(x)[0].tolist() == [[0, 2, 2, 0, -2, -2, 127]]


@quiet
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("columns", [70, 33000])
def test_the_absmax_of_a_row_that_is_not_finite_is_not(bad, columns):
    x = torch.ones(3, columns, dtype=torch.bfloat16, device=DEVICE)
    x[1, -1] = bad
    absmax = int8_codec.quantize_rows(x)[1].flatten().tolist()
    assert absmax[0] == absmax[2] == 1.0 and not abs(absmax[1]) < float("inf")


def test_nothing_is_read_beside_a_view_or_written_beyond_it():
    buffer = torch.full((4, 300), float("nan"), device=DEVICE)
    buffer[:, 10:107] = torch.randn(4, 97, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    codes, absmax = int8_codec.quantize_rows(buffer[:, 10:107])
    expected = reference(buffer[:, 10:107].cpu())
    assert torch.equal(codes.cpu(), expected[0]) and torch.equal(absmax.cpu(), expected[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs more memory than a CPU test should take")
def test_more_than_two_to_the_31_codes_decode_at_the_right_place():
    codes = torch.randint(-127, 128, (2**17 + 1, 2**14), dtype=torch.int8, device="cuda")
    absmax = torch.rand(2**17 + 1, 1, device="cuda")
    out = int8_codec.dequantize(codes, absmax, torch.bfloat16)
    expected = int8.dequantize_absmax(codes[-1:].cpu(), absmax[-1:].cpu(), 2**14).bfloat16()
    assert torch.equal(out[-1:].cpu(), expected)
    assert torch.equal(int8_codec.quantize_rows(out)[0][-1:].cpu(), reference(expected)[0])

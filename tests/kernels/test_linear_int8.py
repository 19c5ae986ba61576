"""The int8 products: of codes bit for bit, of weights alone within what rounding allows; on the GPU or in the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlite import int8, ops

pytest.importorskip("triton", reason="Triton is not built for this platform")
from qlite.kernels import linear_int8
from qlite.kernels.linear_int8 import FewRows, ManyRows

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALVES = (torch.float16, torch.bfloat16)
CAN_DOT = not CUDA or torch.cuda.get_device_capability() >= (8, 0)
needs_dot = pytest.mark.skipif(not CAN_DOT, reason="Triton knows no tensor cores below sm_80")
#: Small cuts, so that a small problem has several tiles in every direction.
SMALL = [ManyRows(32, 32, 64, 4, 4, 3, False), ManyRows(16, 64, 32, 2, 4, 2, True)]


def encoded(w):
    return int8.quantize_absmax(w, per_tensor=False, block_size=max(w.shape[1], 1))


_ROWS, _COLUMNS = st.integers(0, 40), st.integers(1, 300)


@st.composite
def problems(draw, rows=_ROWS, columns=_COLUMNS):
    """x with a row of zeros, large and tiny rows, perhaps strided; codes and absmax; a bias or none: on the CPU."""
    m, n, k = draw(rows), draw(st.integers(0, 150)), draw(columns)
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(HALVES))
    x = torch.randn(m, k, generator=source) * 2.0 ** draw(st.integers(-8, 3))
    x[:, :: draw(st.integers(1, 50))] *= draw(st.sampled_from((0.0, 1.0, 50.0)))
    x[draw(st.integers(0, 3)) :: 4] *= draw(st.sampled_from((0.0, 1.0, 2.0**-6)))
    x = x.to(dtype)
    if draw(st.booleans()):
        x = torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0]
    w = torch.randn(n, k, generator=source) * 2.0 ** draw(st.integers(-6, 2))
    w[draw(st.integers(0, 4)) :: 5] *= 0.0
    bias = torch.randn(n, generator=source).to(dtype) if draw(st.booleans()) else None
    return x, *encoded(w), bias


def moved(problem):
    return [None if part is None else part.to(DEVICE) for part in problem]


def exact(x, codes, absmax, bias):
    """The product in float64, and the sum of its terms' magnitudes."""
    weight, shift = codes.double() * (absmax.double() / 127), 0 if bias is None else bias.double()
    return x.double() @ weight.T + shift, x.double().abs() @ weight.abs().T + (0 if bias is None else shift.abs())


def allowed(y, terms, columns):
    """Half a step of the dtype at the result, and float32: the terms' sum in any order, scale, product and bias."""
    eps, smallest = torch.finfo(y.dtype).eps, torch.finfo(y.dtype).smallest_normal
    return (eps / 2) * y.double().abs() + 1.01 * (columns + 4) * 2**-24 * terms + eps * smallest


def rms_bound(dtype):
    """In norm: the rounding of the result alone, of at most eps / 2 each, and little beside it."""
    return 0.51 * torch.finfo(dtype).eps


@needs_dot
@given(problems(), st.sampled_from(SMALL))
@settings(max_examples=40)
def test_the_product_of_codes_equals_the_reference_bit_for_bit(problem, tile):
    x, codes, absmax, bias = moved(problem)
    y = linear_int8.product(*linear_int8.quantize_rows(x), codes, absmax, bias, x.dtype, tile)
    assert torch.equal(y.cpu(), int8.linear_dynamic(*problem))


@needs_dot
@pytest.mark.parametrize("tile", SMALL)
def test_the_largest_sums_are_exact(tile):
    # 127 * 127 * 4096 is beyond 2^24: a sum in float32 would lose units. Signs leave sums of every size.
    codes = torch.full((3, 4096), 127, dtype=torch.int8, device=DEVICE)
    codes[1, ::2], codes[2, :2047] = -127, -127
    x_codes = torch.full((2, 4096), 127, dtype=torch.int8, device=DEVICE)
    x_codes[0, 0] = 126
    ones = [torch.full((n, 1), 127.0, device=DEVICE) for n in (2, 3)]
    y = linear_int8.product(x_codes, ones[0], codes, ones[1], None, torch.float32, tile)
    assert torch.equal(y.double().cpu(), (x_codes.cpu().double() @ codes.cpu().double().T).float().double())


def few(shares, columns=64, rows=16):
    return FewRows(128, rows, columns, shares, 4, 3)


@needs_dot
@given(problems(rows=st.integers(0, 16), columns=st.integers(1, 20).map(lambda n: 16 * n)), st.sampled_from((1, 2, 3)))
@settings(max_examples=40)
def test_few_rows_are_as_near_to_float64_as_one_rounding_allows(problem, shares):
    x, codes, absmax, bias = moved(problem)
    y = linear_int8.few_rows(linear_int8._unit_stride(x), codes, absmax, bias, few(shares)).cpu()
    wanted, terms = exact(*problem)
    assert bool(((y.double() - wanted).abs() <= allowed(y, terms, x.shape[1])).all())


@given(problems(rows=st.integers(0, 3)))
@settings(max_examples=40)
def test_one_row_at_a_time_is_as_near_to_float64_as_one_rounding_allows(problem):
    x, codes, absmax, bias = moved(problem)
    y = linear_int8.one_row(linear_int8._unit_stride(x), codes, absmax, bias).cpu()
    wanted, terms = exact(*problem)
    assert bool(((y.double() - wanted).abs() <= allowed(y, terms, x.shape[1])).all())


def large(rows, dtype, out=200, columns=640):
    source = torch.Generator().manual_seed(5)
    x = torch.randn(rows, columns, generator=source).to(dtype)
    return x, *encoded(torch.randn(out, columns, generator=source)), torch.randn(out, generator=source).to(dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 33, 64, 65])
def test_what_the_table_chooses_errs_by_the_rounding_of_the_result_and_one_percent_would_show(rows, dtype):
    problem = large(rows, dtype)
    wanted, _ = exact(*problem)
    y = linear_int8.linear_weight_only(*moved(problem)).cpu().double()
    # Above 64 rows the weight is decoded, and rounded, first.
    bound = rms_bound(dtype) * (1 if rows <= 64 else 2**0.5)
    assert (y - wanted).norm() <= bound * wanted.norm()
    assert (1.01 * y - wanted).norm() > bound * wanted.norm()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("columns", [640, 648])
def test_what_the_table_chooses_for_codes_equals_the_reference(dtype, columns):
    problem = large(70, dtype, columns=columns)
    y = linear_int8.linear_dynamic(*moved(problem)).cpu()
    if CAN_DOT:
        assert torch.equal(y, int8.linear_dynamic(*problem))
    # Below sm_80 operands are rounded once each, and everywhere a code may be off by half a step of its row.
    wanted, _ = exact(*problem)
    assert (y.double() - wanted).norm() <= 0.012 * wanted.norm() < (1.02 * y.double() - wanted).norm()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_what_is_not_finite_stays_in_its_row_and_shows(rows, bad, dtype):
    x, codes, absmax, _ = large(rows, dtype)
    x[-1, 77] = bad
    multiply = linear_int8.linear_dynamic if rows > 64 else linear_int8.linear_weight_only
    y = multiply(*moved((x, codes, absmax, None)))
    assert not bool(torch.isfinite(y[-1]).any()) and bool(torch.isfinite(y[:-1]).all())


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_rows_of_zeros_give_the_bias(rows):
    x, codes, absmax, bias = moved(large(rows, torch.bfloat16))
    multiply = linear_int8.linear_dynamic if rows > 64 else linear_int8.linear_weight_only
    assert torch.equal(multiply(x * 0, codes, absmax, bias), bias.expand(rows, 200))


@pytest.mark.parametrize("rows", [1, 5, 64, 70])
def test_two_runs_give_the_same_bits(rows):
    problem = moved(large(rows, torch.float16))
    multiply = linear_int8.linear_dynamic if rows > 64 else linear_int8.linear_weight_only
    assert torch.equal(multiply(*problem), multiply(*problem))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", [(0, 5, 64), (3, 0, 64), (3, 5, 0)])
def test_empty_sides_are_products_too(shape, dynamic):
    rows, out, columns = shape
    x, codes, absmax = torch.ones(rows, columns).half(), torch.zeros(out, columns).char(), torch.ones(out, 1)
    bias = torch.arange(out).half()
    multiply = linear_int8.linear_dynamic if dynamic else linear_int8.linear_weight_only
    assert torch.equal(multiply(*moved((x, codes, absmax, bias))).cpu(), bias.expand(rows, out))


def test_in_float16_a_sum_beyond_its_range_is_scaled_before_it_is_rounded():
    # 127 * 2 * 512 is above 65,504; the product is 2 * 512 / 127.
    for rows in (1, 5, 70):
        x = torch.full((rows, 512), 2.0).half()
        parts = moved((x, torch.full((7, 512), 127, dtype=torch.int8), torch.full((7, 1), 1 / 127), None))
        y = (linear_int8.linear_dynamic if rows > 64 else linear_int8.linear_weight_only)(*parts)
        torch.testing.assert_close(y.float(), torch.full_like(y, 1024 / 127).float(), rtol=2**-10, atol=0)


@pytest.mark.skipif(not CUDA, reason="the CUDA implementations of the ops")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("rows", [0, 1, 7, 64, 65, 300])
@pytest.mark.parametrize("shape", [(4672, 4544), (100, 65)])
def test_the_op_and_its_gradient_on_cuda_follow_the_rule_of_the_cpu(shape, rows, dtype):
    source = torch.Generator().manual_seed(7)
    w = torch.randn(shape, generator=source) / shape[1] ** 0.5
    codes, absmax = encoded(w)
    x = torch.randn(rows, shape[1], generator=source).to(dtype)
    here = x.cuda().requires_grad_()
    y = ops.linear_int8(here, codes.cuda(), absmax.cuda())
    there = ops.linear_int8(x, codes, absmax)
    if CAN_DOT and int8.is_dynamic(x):
        assert torch.equal(y.cpu(), there)
    wanted, terms = exact(x, codes, absmax, None)
    if not int8.is_dynamic(x):
        # A weight that is decoded first, above 64 rows and in odd shapes, is rounded once more than the result.
        bound = allowed(y.detach().cpu(), terms, shape[1]) + torch.finfo(dtype).eps / 2 * terms
        assert bool(((y.cpu().double() - wanted).abs() <= bound).all())
    grad = torch.randn(y.shape, generator=source).to(dtype)
    (grad_x,) = torch.autograd.grad(y, here, grad.cuda())
    decoded = int8.dequantize_absmax(codes, absmax, shape[1]).to(dtype).double()
    wanted, terms = grad.double() @ decoded, grad.double().abs() @ decoded.abs()
    assert grad_x.dtype == dtype
    assert bool(((grad_x.cpu().double() - wanted).abs() <= allowed(grad_x.cpu(), terms, shape[0])).all())

"""8-bit integers, absmax and zero-point."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import qlite
from qlite import int8
from tests.strategies import DTYPES, weights

EXAMPLE = [1.2, -0.5, -4.3, 1.2, -3.1, 0.8, 2.4, 5.4]
groupings = st.sampled_from((("tensor", None), ("row", None), ("block", 1), ("block", 50)))
# Roundings of the factor, the product and the decoded product, in units of a code: 127 * 3 * 2^-24 and slack.
ROUNDING = 2**-13


def groups(x, per, block_size):
    """An independent reading of the groups: (slice of rows, slice of columns)."""
    rows, columns = x.shape
    width = {"tensor": columns, "row": columns, "block": block_size}[per]
    spans = [slice(first, first + width) for first in range(0, columns, max(width, 1))]
    if per == "tensor":
        return [(slice(None), span) for span in spans]
    return [(slice(row, row + 1), span) for row in range(rows) for span in spans]


def test_the_documented_example():
    q = qlite.quantize_int8(torch.tensor(EXAMPLE), per="tensor")
    assert q.codes.tolist() == [[28, -12, -101, 28, -73, 19, 56, 127]]


def test_a_range_that_one_code_a_unit_covers_is_stored_as_it_is():
    # -100..155 is 256 codes wide: the step is 1, and zero is code -28.
    q = qlite.quantize_int8(torch.tensor([[-100.0, 155.0, 0.0, 1.0, 54.0]]), zero_point=True)
    assert (q.codes.tolist(), q.scale.tolist(), q.zero_point.tolist()) == ([[-128, 127, -28, -27, 26]], [[1.0]], [[-28]])


def test_a_tie_takes_the_even_code():
    ties = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5]
    assert qlite.quantize_int8(torch.tensor([*ties, 127.0])).codes.tolist() == [[0, 2, 2, 0, -2, -2, 127]]
    steps = qlite.quantize_int8(torch.tensor([*ties, -128.0, 127.0]), zero_point=True)
    assert steps.zero_point.item() == 0 and steps.codes.tolist() == [[0, 2, 2, 0, -2, -2, -128, 127]]


@given(weights(), groupings)
def test_absmax_is_the_largest_magnitude_of_its_group(x, grouping):
    per, block_size = grouping
    assume(x.numel())
    absmax = qlite.quantize_int8(x, per=per, block_size=block_size).absmax
    expected = [x[rows, columns].float().abs().max().item() for rows, columns in groups(x, per, block_size)]
    assert absmax.flatten().tolist() == expected


@given(weights(), groupings)
def test_absmax_comes_back_within_half_a_step(x, grouping):
    per, block_size = grouping
    back = qlite.quantize_int8(x, per=per, block_size=block_size).dequantize(torch.float32)
    for rows, columns in groups(x, per, block_size):
        group = x[rows, columns].double()
        if group.numel():
            bound = group.abs().max() / 254 * (1 + ROUNDING)
            assert bool(((back[rows, columns].double() - group).abs() <= bound).all())


@given(weights(), groupings)
def test_zero_point_comes_back_within_half_a_step(x, grouping):
    per, block_size = grouping
    back = qlite.quantize_int8(x, zero_point=True, per=per, block_size=block_size).dequantize(torch.float32)
    for rows, columns in groups(x, per, block_size):
        group = x[rows, columns].double()
        if group.numel():
            step = (group.max().clamp(min=0) - group.min().clamp(max=0)) / 255
            assert bool(((back[rows, columns].double() - group).abs() <= step * (0.5 + ROUNDING)).all())


@given(weights(), groupings, st.booleans())
def test_zero_is_exact(x, grouping, zero_point):
    per, block_size = grouping
    q = qlite.quantize_int8(x, zero_point=zero_point, per=per, block_size=block_size)
    assert bool((q.dequantize()[x == 0] == 0).all())


@given(weights())
def test_absmax_codes_change_sign_with_the_weight(x):
    assert torch.equal(qlite.quantize_int8(-x).codes, -qlite.quantize_int8(x).codes)


@given(weights(dtypes=(torch.float32,)), groupings)
def test_absmax_codes_are_idempotent(x, grouping):
    per, block_size = grouping
    q = qlite.quantize_int8(x, per=per, block_size=block_size)
    assert torch.equal(qlite.quantize_int8(q.dequantize(), per=per, block_size=block_size).codes, q.codes)


@given(weights(dtypes=(torch.float32,)), groupings)
def test_zero_point_codes_are_idempotent_where_a_group_uses_all_of_them(x, grouping):
    per, block_size = grouping
    q = qlite.quantize_int8(x, zero_point=True, per=per, block_size=block_size)
    again = qlite.quantize_int8(q.dequantize(), zero_point=True, per=per, block_size=block_size)
    # Elsewhere the rounded zero point has moved the range by part of a step, and the decoded range is a step narrower.
    for rows, columns in groups(x, per, block_size):
        codes = q.codes[rows, columns]
        if codes.numel() and (int(codes.min()), int(codes.max())) == (-128, 127):
            assert torch.equal(again.codes[rows, columns], codes)


@given(weights(dtypes=(torch.float32,)), groupings, st.integers(-60, 100), st.booleans())
def test_a_power_of_two_scales_the_step_and_leaves_the_codes(x, grouping, exponent, zero_point):
    per, block_size = grouping  # of values above 2^-50, so that every step stays a normal number
    q = qlite.quantize_int8(x, zero_point=zero_point, per=per, block_size=block_size)
    scaled = qlite.quantize_int8(x * 2.0**exponent, zero_point=zero_point, per=per, block_size=block_size)
    assert torch.equal(q.codes, scaled.codes)
    assert torch.equal((q.scale if zero_point else q.absmax) * 2.0**exponent, scaled.scale if zero_point else scaled.absmax)


@given(weights(), st.sampled_from((("row", None), ("block", 1), ("block", 50))), st.booleans())
def test_a_row_is_encoded_as_if_it_were_alone(x, grouping, zero_point):
    per, block_size = grouping
    whole = qlite.quantize_int8(x, zero_point=zero_point, per=per, block_size=block_size).codes
    for i, row in enumerate(x):
        assert torch.equal(qlite.quantize_int8(row, zero_point=zero_point, per=per, block_size=block_size).codes[0], whole[i])


@given(weights(), groupings, st.booleans())
def test_the_dtype_of_a_tensor_does_not_change_its_codes(x, grouping, zero_point):
    per, block_size = grouping
    codes = qlite.quantize_int8(x, zero_point=zero_point, per=per, block_size=block_size).codes
    for same in (x.float(), x.double()):
        assert torch.equal(qlite.quantize_int8(same, zero_point=zero_point, per=per, block_size=block_size).codes, codes)


@given(weights(), groupings, st.booleans(), st.sampled_from((*DTYPES, torch.float64)))
def test_decoding_is_a_float32_product_that_is_rounded_once(x, grouping, zero_point, dtype):
    per, block_size = grouping
    q = qlite.quantize_int8(x, zero_point=zero_point, per=per, block_size=block_size)
    # In float64 a difference of codes and its product with a float32 number are exact; a quotient is rounded harmlessly.
    step = q.scale if zero_point else (q.absmax.double() / 127).float()
    origin = q.zero_point if zero_point else torch.zeros_like(step)
    step, origin = (part.double().repeat_interleave(q.block_size, dim=1)[:, : x.shape[1]] for part in (step, origin))
    assert torch.equal(q.dequantize(dtype), ((q.codes.double() - origin) * step).float().to(dtype))


@pytest.mark.parametrize("exponent", [-149, -140, -126, -101, -100, 100, 121])
def test_absmax_codes_are_the_same_at_both_ends_of_float32(exponent):
    x = torch.tensor([[127.0, -127.0, 64.0, 1.0, 0.0]]) * 2.0**exponent
    assert qlite.quantize_int8(x).codes.tolist() == [[127, -127, 64, 1, 0]]


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("scale", [2.0**-149, 1e-42, 2.0**-126, 3e38])
def test_the_ends_of_float32_survive(scale, zero_point):
    x = torch.tensor([[1.0, -1.0, 0.5, 0.0]]) * scale
    back = qlite.quantize_int8(x, zero_point=zero_point).dequantize()
    # Half a step; below the normal numbers the step itself is rounded to a multiple of 2^-149, or is the smallest one.
    rounding = 2.0**-127 if zero_point else 127 * 2.0**-150
    assert bool(((back.double() - x.double()).abs() <= 2 * scale / 255 * 0.51 + rounding).all())
    assert bool(torch.isfinite(back).all())


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 5), (0, 4), (4, 0)])
@pytest.mark.parametrize("per", ["tensor", "row"])
def test_any_shape_comes_back(shape, per):
    q = qlite.quantize_int8(torch.full(shape, -0.5), per=per)
    assert q.dequantize().shape == torch.Size(shape)
    assert q.dequantize().flatten().tolist() == pytest.approx([-0.5] * torch.Size(shape).numel())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"per": "column"}, "'tensor', 'row' or 'block'"),
        ({"per": "block"}, "block_size is None"),
        ({"per": "block", "block_size": 0}, "block_size is 0"),
        ({"per": "row", "block_size": 8}, "only per='block'"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        qlite.quantize_int8(torch.zeros(2, 8), **options)


def test_a_non_finite_value_is_refused():
    with pytest.raises(ValueError, match=r"non-finite.*\[0, 1\]"):
        qlite.quantize_int8(torch.tensor([[0.0, float("nan")]]))


# Products with rows of codes.

HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((64, 32), torch.float16, False),
        ((65, 32), torch.float16, True),
        ((65, 32), torch.bfloat16, True),
        ((5, 13, 32), torch.bfloat16, True),
        ((4, 16, 32), torch.bfloat16, False),
        ((32,), torch.bfloat16, False),
        ((0, 32), torch.bfloat16, False),
        ((500, 32), torch.float32, False),
        ((500, 32), torch.float64, False),
        ((65, 133144), torch.float16, True),
        ((65, 133145), torch.float16, False),  # 127 * 127 * 133145 is beyond 2^31
    ],
)
def test_activations_are_encoded_from_65_rows_of_16_bits_on(shape, dtype, expected):
    assert int8.is_dynamic(torch.empty(shape, dtype=dtype, device="meta")) is expected
    assert 127 * 127 * 133144 < 2**31 <= 127 * 127 * 133145


@given(weights(dtypes=HALVES, max_exponent=4), st.integers(0, 40), st.booleans())
def test_the_dynamic_product_is_that_of_both_decoded_operands(x, out, with_bias):
    source = torch.Generator().manual_seed(out)
    q = qlite.quantize_int8(torch.randn(out, x.shape[1], generator=source))
    bias = torch.randn(out, generator=source).to(x.dtype) if with_bias else None
    encoded = qlite.quantize_int8(x)
    left = encoded.codes.double() * (encoded.absmax.double() / 127)
    right = q.codes.double() * (q.absmax.double() / 127)
    shift = torch.zeros(out).double() if bias is None else bias.double()
    wanted, y = left @ right.T + shift, int8.linear_dynamic(x, q.codes, q.absmax, bias)
    # In float32: of the sum, both scales, both products and the sum with the bias; then one rounding to the dtype.
    dtype = torch.finfo(x.dtype)
    allowed = 7 * 2**-24 * ((left @ right.T).abs() + shift.abs()) + dtype.eps / 2 * wanted.abs() * 1.01
    assert y.dtype == x.dtype
    assert bool(((y.double() - wanted).abs() <= allowed + dtype.eps * dtype.smallest_normal).all())


@given(weights(dtypes=HALVES, max_exponent=4, rows=st.integers(1, 4), columns=st.integers(1, 300)))
def test_encoding_the_activations_costs_half_a_step_of_each(x):
    q = qlite.quantize_int8(torch.randn(9, x.shape[1], generator=torch.Generator().manual_seed(1)))
    exact, magnitudes = (x.double() @ q.dequantize().double().T), q.dequantize().double().abs().sum(dim=1)
    step = x.double().abs().amax(dim=1, keepdim=True) / 127
    allowed = step * (0.5 + ROUNDING) * magnitudes + torch.finfo(x.dtype).eps * exact.abs() + 2**-20 * step * magnitudes
    y = int8.linear_dynamic(x.float(), q.codes, q.absmax, None)
    assert bool(((y.double() - exact).abs() <= allowed).all())


def test_one_percent_wrong_would_be_seen():
    source = torch.Generator().manual_seed(4)
    x, q = torch.randn(70, 640, generator=source), qlite.quantize_int8(torch.randn(90, 640, generator=source))
    exact = x.double() @ q.dequantize().double().T
    # A step is absmax / 127 and its error uniform: about 3.2 / 127 / sqrt(12) of a row of normal numbers.
    wrong = [factor * int8.linear_dynamic(x, q.codes, q.absmax, None) - exact for factor in (1, 1.01)]
    assert wrong[0].norm() <= 0.0085 * exact.norm() < wrong[1].norm()


@pytest.mark.parametrize("columns", [1039, 1040, 1041, 5000])
def test_sums_of_products_of_codes_are_exact(columns):
    source = torch.Generator().manual_seed(2)
    codes = torch.randint(-127, 128, (11, columns), generator=source).char()
    codes[0], codes[1] = 127, -127
    x = torch.full((3, columns), 127.0)
    x[1], x[2, 0] = torch.randint(-127, 128, (columns,), generator=source), -126.0
    x[:, 1] = 127.0  # so that a row's scale is one
    y = int8.linear_dynamic(x, codes, torch.full((11, 1), 127.0), None)
    assert torch.equal(y, (x.long() @ codes.long().T).float())


def test_a_row_is_multiplied_as_if_it_were_alone():
    source = torch.Generator().manual_seed(3)
    x, q = torch.randn(70, 130, generator=source).bfloat16(), qlite.quantize_int8(torch.randn(20, 130, generator=source))
    whole = int8.linear_dynamic(x, q.codes, q.absmax, None)
    for i, row in enumerate(x):
        assert torch.equal(int8.linear_dynamic(row, q.codes, q.absmax, None), whole[i])


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("multiply", [int8.linear_dynamic, int8.linear_weight_only])
def test_a_row_that_is_not_finite_shows_and_a_row_of_zeros_gives_the_bias(multiply, bad):
    x, q = torch.ones(3, 20).half(), qlite.quantize_int8(torch.eye(5, 20) + 1)
    x[0], x[1, 3] = 0, bad
    y = multiply(x, q.codes, q.absmax, torch.arange(5.0))
    assert y[0].tolist() == [0, 1, 2, 3, 4] and bool(torch.isfinite(y[2]).all())
    assert not bool(torch.isfinite(y[1]).any()) and (multiply is int8.linear_weight_only or bool(torch.isnan(y[1]).all()))


def test_a_sum_beyond_float16_is_scaled_before_it_is_rounded():
    y = int8.linear_dynamic(
        torch.full((1, 512), 2.0).half(), torch.full((3, 512), 127).char(), torch.full((3, 1), 1 / 127), None
    )
    torch.testing.assert_close(y.float(), torch.full((1, 3), 1024 / 127), rtol=2**-11, atol=0)

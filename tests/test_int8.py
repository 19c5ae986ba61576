"""8-bit integers, absmax and zero-point."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qlite
from tests.strategies import weights

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


@given(weights(dtypes=(torch.float32,)), st.integers(-100, 100), st.booleans())
def test_a_power_of_two_leaves_the_codes(x, exponent, zero_point):
    codes = qlite.quantize_int8(x, zero_point=zero_point).codes
    assert torch.equal(qlite.quantize_int8(x * 2.0**exponent, zero_point=zero_point).codes, codes)


@given(weights(), st.booleans())
def test_a_row_is_encoded_as_if_it_were_alone(x, zero_point):
    whole = qlite.quantize_int8(x, zero_point=zero_point).codes
    for i, row in enumerate(x):
        assert torch.equal(qlite.quantize_int8(row, zero_point=zero_point).codes[0], whole[i])


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("scale", [2.0**-149, 1e-42, 2.0**-126, 3e38])
def test_the_ends_of_float32_survive(scale, zero_point):
    x = torch.tensor([[1.0, -1.0, 0.5, 0.0]]) * scale
    back = qlite.quantize_int8(x, zero_point=zero_point).dequantize()
    # Half a step, and below the normal numbers the spacing of the decoded value itself.
    assert bool(((back.double() - x.double()).abs() <= 2 * scale / 255 * 0.51 + 2.0**-126).all())
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

"""Blockwise dynamic 8-bit numbers."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlite.dynamic8 import dequantize_dynamic8, dynamic_levels, quantize_dynamic8
from tests.strategies import weights

# Half of the widest gap between two levels: what rounding to the nearest can cost, relative to absmax.
HALF_GAP = {True: 0.007031261920928955, False: 0.0035156607627868652}
# Two roundings in x * (1 / absmax), one in level * absmax, each of relative size 2^-24.
ROUNDING = 2**-22


@pytest.mark.parametrize(("signed", "digest"), [(True, "e732639a65f497b4"), (False, "305f002cc11278fb")])
def test_the_levels_are_those_of_the_published_tables(signed, digest):
    levels = dynamic_levels(signed)
    assert hashlib.sha256(levels.numpy().tobytes()).hexdigest()[:16] == digest
    assert levels.shape == (256,) and bool((levels.diff() > 0).all())


@pytest.mark.parametrize("signed", [True, False])
def test_half_of_the_widest_gap_is_the_bound_in_use(signed):
    levels = dynamic_levels(signed).double()
    below = 1 - 0.9929687 if signed else 0.0  # there is no level at -1
    assert max(levels.diff().max().item() / 2, below) == pytest.approx(HALF_GAP[signed], rel=1e-3)


@given(weights(), st.booleans(), st.sampled_from((1, 64, 256)))
def test_each_value_comes_back_within_half_a_gap_of_its_block(x, signed, block_size):
    x = x.float() if signed else x.float().abs()
    codes, absmax = quantize_dynamic8(x, signed=signed, block_size=block_size)
    back = dequantize_dynamic8(codes, absmax, signed=signed, block_size=block_size)
    bound = absmax.repeat_interleave(block_size)[: x.numel()].view(x.shape) * (HALF_GAP[signed] + ROUNDING)
    assert codes.shape == x.shape and back.dtype == torch.float32
    assert bool(((back.double() - x.double()).abs() <= bound.double()).all())


@given(weights(), st.booleans())
def test_zero_comes_back_as_zero(x, signed):
    x = x.float() if signed else x.float().abs()
    back = dequantize_dynamic8(*quantize_dynamic8(x, signed=signed), signed=signed)
    assert bool((back[x == 0] == 0).all())


@given(weights(), st.integers(-20, 20))
def test_a_power_of_two_scales_absmax_and_leaves_the_codes(x, exponent):
    codes, absmax = quantize_dynamic8(x.float(), signed=True)
    scaled_codes, scaled_absmax = quantize_dynamic8(x.float() * 2.0**exponent, signed=True)
    assert torch.equal(codes, scaled_codes) and torch.equal(absmax * 2.0**exponent, scaled_absmax)


@given(weights())
def test_never_zero_keeps_positive_values_positive_and_changes_nothing_else(x):
    x = x.float().square()
    plain, absmax = quantize_dynamic8(x, signed=False)
    kept, same = quantize_dynamic8(x, signed=False, never_zero=True)
    assert torch.equal(absmax, same) and bool((kept[x > 0] > 0).all()) and bool((kept[x == 0] == 0).all())
    assert bool((kept == plain)[plain > 0].all())


def test_never_zero_matters_for_a_value_far_below_its_block():
    x = torch.tensor([1.0, 1e-9])
    assert quantize_dynamic8(x, signed=False)[0].tolist() == [255, 0]
    assert quantize_dynamic8(x, signed=False, never_zero=True)[0].tolist() == [255, 1]


def test_a_tie_takes_the_lower_level():
    levels = dynamic_levels(True)
    midpoints = (levels[1:] + levels[:-1]) / 2
    codes, _ = quantize_dynamic8(torch.cat((midpoints, torch.ones(1))), signed=True)
    assert codes.tolist() == [*range(255), 255]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: quantize_dynamic8(torch.ones(3, dtype=torch.int32), signed=True), TypeError, "floating-point"),
        (lambda: quantize_dynamic8(torch.ones(3), signed=True, block_size=0), ValueError, "block_size"),
        (lambda: quantize_dynamic8(torch.ones(3), signed=True, never_zero=True), ValueError, "unsigned"),
        (lambda: dequantize_dynamic8(torch.ones(3), torch.ones(1), signed=True), TypeError, "uint8"),
        (
            lambda: dequantize_dynamic8(torch.zeros(300, dtype=torch.uint8), torch.ones(1), signed=True),
            ValueError,
            r"want \(2,\)",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()

"""Blockwise dynamic 8-bit numbers."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from qlite import dynamic8
from qlite.dynamic8 import dequantize_dynamic8, dynamic_levels, quantize_dynamic8
from tests.strategies import weights

# Half of the widest gap between two levels: what rounding to the nearest can cost, relative to absmax.
HALF_GAP = {True: 0.007031261920928955, False: 0.0035156607627868652}
# Two roundings in x * (1 / absmax), one in level * absmax, each of relative size 2^-24.
ROUNDING = 2**-22
lengths = st.sampled_from((1, 7, 64, 256, 4096))


def drawn(x: torch.Tensor, signed: bool) -> torch.Tensor:
    return x.float() if signed else x.float().abs()


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


@given(weights(), st.booleans(), lengths)
def test_each_value_comes_back_within_half_a_gap_of_its_block(x, signed, block_size):
    x = drawn(x, signed)
    codes, absmax = quantize_dynamic8(x, signed=signed, block_size=block_size)
    back = dequantize_dynamic8(codes, absmax, signed=signed, block_size=block_size)
    bound = absmax.repeat_interleave(block_size)[: x.numel()].view(x.shape) * (HALF_GAP[signed] + ROUNDING)
    assert codes.shape == x.shape and back.dtype == torch.float32
    assert bool(((back.double() - x.double()).abs() <= bound.double()).all())


@given(weights(), st.booleans(), lengths)
def test_no_other_level_is_nearer(x, signed, block_size):
    x = drawn(x, signed)
    codes, absmax = quantize_dynamic8(x, signed=signed, block_size=block_size)
    error = (dequantize_dynamic8(codes, absmax, signed=signed, block_size=block_size).double() - x.double()).abs()
    levels, scale = dynamic_levels(signed).double(), absmax.double().repeat_interleave(block_size)[: x.numel()].view(x.shape)
    # The levels next to the chosen one: the table is sorted, so if they are not nearer, none is.
    for neighbour in ((codes.int() - 1).clamp(min=0), (codes.int() + 1).clamp(max=255)):
        assert bool((error <= (levels[neighbour] * scale - x.double()).abs() + scale * ROUNDING).all())


@given(weights(), st.booleans(), lengths)
def test_decoding_is_one_float32_product(x, signed, block_size):
    codes, absmax = quantize_dynamic8(drawn(x, signed), signed=signed, block_size=block_size)
    scale = absmax.double().repeat_interleave(block_size)[: x.numel()].view(x.shape)
    # In float64 the product of two float32 numbers is exact, so this is rounded once.
    expected = (dynamic_levels(signed).double()[codes.long()] * scale).float()
    assert torch.equal(dequantize_dynamic8(codes, absmax, signed=signed, block_size=block_size), expected)


@given(weights(), st.booleans(), lengths)
def test_encoding_what_was_decoded_changes_nothing(x, signed, block_size):
    x = drawn(x, signed)
    flat = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % block_size)).view(-1, block_size)
    if signed:
        # There is no level at -1: a block keeps its absmax only if a positive value attains it.
        flat = torch.where(flat.amax(dim=1, keepdim=True) < flat.abs().amax(dim=1, keepdim=True), -flat, flat)
    codes, absmax = quantize_dynamic8(flat, signed=signed, block_size=block_size)
    back = dequantize_dynamic8(codes, absmax, signed=signed, block_size=block_size)
    again, same = quantize_dynamic8(back, signed=signed, block_size=block_size)
    assert torch.equal(codes, again) and torch.equal(absmax, same)


@given(weights(), st.booleans(), lengths)
def test_a_block_is_encoded_as_if_it_were_alone(x, signed, block_size):
    x = drawn(x, signed)
    codes, absmax = quantize_dynamic8(x, signed=signed, block_size=block_size)
    blocks = [quantize_dynamic8(block, signed=signed, block_size=block_size) for block in x.reshape(-1).split(block_size)]
    if x.numel():
        assert torch.equal(codes.reshape(-1), torch.cat([alone for alone, _ in blocks]))
        assert torch.equal(absmax, torch.cat([alone for _, alone in blocks]))


@given(weights(), st.booleans())
def test_the_dtype_of_a_tensor_does_not_change_its_codes(x, signed):
    x = x if signed else x.abs()
    codes, absmax = quantize_dynamic8(x, signed=signed)
    for same in (x.float(), x.double()):
        twin, twin_absmax = quantize_dynamic8(same, signed=signed)
        assert torch.equal(codes, twin) and torch.equal(absmax, twin_absmax)


@given(weights(), st.booleans())
def test_zero_comes_back_as_zero(x, signed):
    x = drawn(x, signed)
    back = dequantize_dynamic8(*quantize_dynamic8(x, signed=signed), signed=signed)
    assert bool((back[x == 0] == 0).all())


@given(weights(), st.sampled_from([(True, False), (False, False), (False, True)]), st.integers(-20, 20))
def test_a_power_of_two_scales_absmax_and_leaves_the_codes(x, table, exponent):
    (signed, never_zero), x = table, drawn(x, table[0])
    codes, absmax = quantize_dynamic8(x, signed=signed, never_zero=never_zero)
    scaled_codes, scaled_absmax = quantize_dynamic8(x * 2.0**exponent, signed=signed, never_zero=never_zero)
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


def test_a_value_is_multiplied_by_the_reciprocal_and_not_divided():
    # Just below the midpoint of the first two levels; -2.9578123 / 3 rounds to just above it.
    assert quantize_dynamic8(torch.tensor([3.0, -2.9578123092651367]), signed=True)[0].tolist() == [255, 0]


@pytest.mark.parametrize("signed", [True, False])
def test_a_tie_takes_the_lower_level(signed):
    levels = dynamic_levels(signed)
    midpoints = (levels[1:] + levels[:-1]) / 2
    codes, _ = quantize_dynamic8(torch.cat((midpoints, torch.ones(1))), signed=signed)
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="tables are kept for GPUs")
def test_a_table_made_under_fake_tensors_is_not_kept_for_real_ones():
    device = torch.device("cuda", torch.cuda.current_device())
    dynamic8._kept_levels.cache_clear()
    with FakeTensorMode():
        fake = dynamic8.dynamic_levels_on(device, signed=True)
    assert isinstance(fake, FakeTensor) and dynamic8._kept_levels.cache_info().currsize == 0

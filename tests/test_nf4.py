"""The 4-bit formats: levels, rounding, layout, double quantization."""

import hashlib
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qlite
from qlite import nf4
from qlite.nf4 import FP4_LEVELS, NF4_LEVELS
from tests.strategies import block_sizes, tables, weights

# Two roundings in w * (1 / absmax), one in level * absmax, each of relative size 2^-24.
ROUNDING = 2**-22
# Unit roundoff of the output dtype, and its smallest subnormal step.
ROUNDOFF = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}
SUBNORMAL = {torch.float32: 0.0, torch.float16: 2**-25, torch.bfloat16: 2**-134}


def half_gap(levels: tuple[float, ...]) -> float:
    ascending = sorted({-1.0, 1.0, *levels})
    return max(b - a for a, b in zip(ascending, ascending[1:], strict=False)) / 2


def absmax_per_weight(w: torch.Tensor, block_size: int) -> torch.Tensor:
    """An independent reading of absmax: a loop over slices."""
    out = torch.zeros(w.shape, dtype=torch.float64)
    for first in range(0, w.shape[1], block_size):
        block = w[:, first : first + block_size].double()
        out[:, first : first + block_size] = block.abs().amax(dim=1, keepdim=True)
    return out


def test_nf4_levels_are_normal_quantiles():
    # QLoRA's construction: 8 positive and 7 negative quantiles between 1/2 and the offset, and zero, over the largest.
    offset, normal = 0.9677083, statistics.NormalDist()

    def quantiles(count):
        return [normal.inv_cdf(offset + (0.5 - offset) * i / count) for i in range(count)]

    levels = sorted([0.0, *quantiles(8), *(-q for q in quantiles(7))])
    assert [level / levels[-1] for level in levels] == pytest.approx(NF4_LEVELS, abs=1e-6)
    assert torch.tensor(NF4_LEVELS).double().tolist() == list(NF4_LEVELS)


def test_fp4_levels_are_those_of_sign_two_exponent_and_one_mantissa_bits():
    magnitudes = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    expected = [m / 12 for m in magnitudes] + [-m / 12 for m in magnitudes]
    assert torch.equal(torch.tensor(FP4_LEVELS), torch.tensor(expected))


@pytest.mark.parametrize(
    ("block_size", "codes", "absmax", "values"),
    [
        (64, "ae4953af6c976737", "4cd182f26184ef26", "7981280592b48306"),
        (128, "f968c3d0d322bbf5", "ee704a1cd369187e", "fb2dc0fcd34894c9"),
    ],
)
def test_bytes_equal_those_that_bitsandbytes_writes(block_size, codes, absmax, values):
    x = ((torch.arange(8192) * 2654435761) % 65536).float() / 32768 - 1
    q = qlite.quantize_nf4(x, block_size=block_size, double_quant=False)
    digests = [hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16] for t in (q.codes, q.absmax, q.dequantize())]
    assert digests == [codes, absmax, values]


@given(weights(), block_sizes, tables)
def test_each_weight_comes_back_within_half_a_gap_of_its_block(w, block_size, levels):
    q = qlite.quantize_nf4(w, block_size=block_size, double_quant=False, levels=levels)
    back = q.dequantize()
    bound = absmax_per_weight(w, block_size) * (half_gap(levels) + ROUNDING + ROUNDOFF[w.dtype]) + SUBNORMAL[w.dtype]
    assert back.shape == w.shape and back.dtype == w.dtype
    assert bool(((back.double() - w.double()).abs() <= bound).all())


@given(weights(dtypes=(torch.float32,)), block_sizes, tables)
def test_no_other_level_is_nearer(w, block_size, levels):
    q = qlite.quantize_nf4(w, block_size=block_size, double_quant=False, levels=levels)
    absmax = absmax_per_weight(w, block_size)
    candidates = torch.tensor(levels).double() * absmax[:, :, None]
    best = (candidates - w.double()[:, :, None]).abs().amin(dim=2) if w.numel() else torch.zeros(w.shape)
    assert bool(((q.dequantize().double() - w.double()).abs() <= best + absmax * ROUNDING).all())


@given(weights(dtypes=(torch.float32, torch.bfloat16)), block_sizes)
def test_encoding_what_was_decoded_changes_nothing(w, block_size):
    q = qlite.quantize_nf4(w, block_size=block_size, double_quant=False)
    again = qlite.quantize_nf4(q.dequantize(), block_size=block_size, double_quant=False)
    assert torch.equal(q.codes, again.codes) and torch.equal(q.absmax, again.absmax)


@given(weights(dtypes=(torch.float32,)), block_sizes, tables, st.integers(-20, 20))
def test_a_power_of_two_scales_absmax_and_leaves_the_codes(w, block_size, levels, exponent):
    q = qlite.quantize_nf4(w, block_size=block_size, double_quant=False, levels=levels)
    scaled = qlite.quantize_nf4(w * 2.0**exponent, block_size=block_size, double_quant=False, levels=levels)
    assert torch.equal(q.codes, scaled.codes) and torch.equal(q.absmax * 2.0**exponent, scaled.absmax)


@given(weights(), block_sizes)
def test_a_row_is_encoded_as_if_it_were_alone(w, block_size):
    whole = qlite.quantize_nf4(w, block_size=block_size, double_quant=False)
    rows = [qlite.quantize_nf4(row[None], block_size=block_size, double_quant=False) for row in w]
    for i, row in enumerate(rows):
        assert torch.equal(whole.codes[i : i + 1], row.codes) and torch.equal(whole.absmax[i : i + 1], row.absmax)


@given(weights(), block_sizes)
def test_zeros_come_back_as_positive_zeros_and_a_zero_block_has_absmax_zero(w, block_size):
    q = qlite.quantize_nf4(w, block_size=block_size, double_quant=False)
    back = q.dequantize()
    zeros = back[w == 0]
    assert bool((zeros == 0).all()) and not bool(torch.signbit(zeros).any())
    assert torch.equal(q.absmax == 0, _blocks_of_zeros(w, block_size))


def _blocks_of_zeros(w, block_size):
    blocks = [(w[:, i : i + block_size] == 0).all(dim=1) for i in range(0, w.shape[1], block_size)]
    return torch.stack(blocks, dim=1) if blocks else torch.zeros(w.shape[0], 0, dtype=torch.bool)


def test_a_zero_block_is_all_code_seven():
    q = qlite.quantize_nf4(torch.zeros(2, 64), double_quant=False)
    assert q.codes.unique().tolist() == [0x77] and q.absmax.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_extreme_of_a_block_comes_back_exactly(sign, dtype):
    w = (torch.rand(4, 64, generator=torch.Generator().manual_seed(1)) * 0.5).to(dtype)
    w[:, 5] = sign * 0.7310
    assert torch.equal(qlite.quantize_nf4(w, double_quant=False).dequantize()[:, 5], w[:, 5])


def test_an_exact_tie_takes_the_lower_level():
    levels = torch.tensor(NF4_LEVELS)
    midpoints = (levels[1:] + levels[:-1]) / 2
    q = qlite.quantize_nf4(torch.cat((midpoints, torch.ones(1))), block_size=32, double_quant=False)
    assert nf4.unpack(q.codes)[0].tolist() == [*range(15), 15]


@given(st.binary(min_size=2, max_size=64).filter(lambda b: len(b) % 2 == 0))
def test_packing_is_a_bijection(data):
    packed = torch.tensor([list(data)], dtype=torch.uint8)
    codes = nf4.unpack(packed)
    assert torch.equal(nf4.pack(codes), packed)
    assert codes[0, :2].tolist() == [data[0] >> 4, data[0] & 15]


def test_a_row_of_odd_length_ends_in_the_code_of_zero():
    q = qlite.quantize_nf4(torch.ones(3, 5), block_size=32, double_quant=False)
    assert q.codes.shape == (3, 3) and (q.codes[:, -1] & 15).tolist() == [7, 7, 7]


@given(weights(), block_sizes, tables)
def test_double_quantization_keeps_the_codes_and_moves_absmax_within_its_own_bound(w, block_size, levels):
    single = qlite.quantize_nf4(w, block_size=block_size, double_quant=False, levels=levels)
    double = qlite.quantize_nf4(w, block_size=block_size, double_quant=True, levels=levels)
    assert torch.equal(single.codes, double.codes)
    absmax = nf4.dequantize_absmax(double.absmax, double.absmax_scale, double.absmax_offset).double().view(-1)
    exact = single.absmax.double().view(-1)
    centred = (exact - double.absmax_offset.double()).abs()
    for first in range(0, len(exact), 256):
        group = slice(first, first + 256)
        # Half the widest gap of the signed dynamic table, and the float32 roundings of the subtraction and the sum.
        bound = centred[group].max() * (0.007031261920928955 + 2**-22) + 2**-21 * exact[group].max()
        assert bool(((absmax[group] - exact[group]).abs() <= bound).all())


def test_equal_absmax_values_survive_double_quantization_exactly():
    q = qlite.quantize_nf4(torch.full((3, 192), 0.3))
    assert torch.equal(q.dequantize(), torch.full((3, 192), 0.3))


def test_the_error_on_normal_weights_is_the_published_one():
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    nf4_error = (qlite.quantize_nf4(x, double_quant=False).dequantize() - x).abs().mean().item()
    fp4 = qlite.quantize_nf4(x, double_quant=False, levels=FP4_LEVELS)
    # Mean and standard deviation over 200 runs as bitsandbytes' test-suite states them; 7 sigma as there.
    assert nf4_error == pytest.approx(0.072798, abs=7 * 7.4e-5)
    assert (fp4.dequantize() - x).abs().mean().item() == pytest.approx(0.096543, abs=7 * 1e-4)


def test_four_bits_cost_what_the_paper_says():
    w = torch.ones(256, 4096)
    assert qlite.quantize_nf4(w, double_quant=False).bits_per_weight == 4.5
    # 4 bits, 8 bits per 64 weights, 32 bits per 64 * 256 weights, and one float32 offset.
    assert qlite.quantize_nf4(w).bits_per_weight == 4 + 8 / 64 + 32 / (64 * 256) + 32 / w.numel()


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 65), (0, 64), (3, 0)])
def test_any_shape_comes_back(shape):
    q = qlite.quantize_nf4(torch.full(shape, -0.5), block_size=32)
    assert q.dequantize().shape == torch.Size(shape) and bool((q.dequantize() == -0.5).all())


def test_a_moved_value_is_the_same_value():
    q = qlite.quantize_nf4(torch.randn(4, 64, generator=torch.Generator().manual_seed(0)))
    assert q.to("meta").dequantize().shape == (4, 64)
    assert torch.equal(q.to("cpu").dequantize(), q.dequantize())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_weight_is_refused_with_its_place(value):
    w = torch.zeros(3, 64)
    w[1, 7] = value
    with pytest.raises(ValueError, match=r"non-finite.*\[1, 7\]"):
        qlite.quantize_nf4(w)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_size": 48}, "block_size is 48"),
        ({"block_size": 16}, "one of 32, 64"),
        ({"levels": (0.0,) * 15}, "16 finite values"),
        ({"levels": (0.5,) * 16}, "not all the same"),
        ({"levels": (float("nan"), *NF4_LEVELS[1:])}, "16 finite values"),
        ({"levels": (2.0, *NF4_LEVELS[1:])}, r"\[-1, 1\]"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        qlite.quantize_nf4(torch.zeros(2, 64), **options)


@pytest.mark.parametrize("weight", [torch.zeros(2, 64, dtype=torch.int8), [1.0, 2.0]])
def test_what_is_not_a_float_tensor_is_refused(weight):
    with pytest.raises(TypeError, match="floating-point tensor"):
        qlite.quantize_nf4(weight)

"""The 4-bit formats: levels, rounding, layout, double quantization."""

import hashlib
import itertools
import math
import statistics

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import qlite
from qlite import nf4
from qlite.dynamic8 import dynamic_levels
from qlite.nf4 import FP4_LEVELS, NF4_LEVELS
from tests.strategies import DTYPES, UNIFORM_LEVELS, block_sizes, full_tables, tables, weights, whole_blocks

# Two roundings in w * (1 / absmax), one in level * absmax, each of relative size 2^-24.
ROUNDING = 2**-22
# Unit roundoff of the output dtype, and its smallest subnormal step.
ROUNDOFF = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}
SUBNORMAL = {torch.float32: 0.0, torch.float16: 2**-25, torch.bfloat16: 2**-134}


def half_gap(levels: tuple[float, ...]) -> float:
    """The largest distance of a share in [-1, 1] from its nearest level: midway between two, or at an end."""
    ascending = sorted(levels)
    gaps = [(b - a) / 2 for a, b in itertools.pairwise(ascending)]
    return max(*gaps, 1 + ascending[0], 1 - ascending[-1])


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


def assert_codes_count_the_midpoints_below_the_share(w, block_size, levels):
    q = qlite.quantize_nf4(w, block_size=block_size, double_quant=False, levels=levels)
    # One float32 rounding of each of reciprocal, product and midpoint: float64 holds enough digits to round only then.
    inverse = (1 / absmax_per_weight(w, block_size).clamp(min=torch.tensor(1e-38).item())).float().double()
    share = (w.double() * inverse).float()
    table = torch.tensor(levels).tolist()
    different = torch.tensor(sorted(set(table)), dtype=torch.float64)
    midpoints = ((different[1:] + different[:-1]) / 2).float()
    counts = (share[:, :, None] > midpoints).sum(dim=2)
    expected = [[table.index(different[count].item()) for count in row] for row in counts.tolist()]
    assert nf4.unpack(q.codes)[:, : w.shape[1]].tolist() == expected


@given(weights(), block_sizes, tables)
def test_a_code_counts_the_midpoints_below_the_product_with_the_rounded_reciprocal(w, block_size, levels):
    assert_codes_count_the_midpoints_below_the_share(w, block_size, levels)


@pytest.mark.parametrize("absmax", [1.0, 3.0, 7.0, 0.7, -1.7, 2.0**-126, 3e38])
@pytest.mark.parametrize("levels", [NF4_LEVELS, FP4_LEVELS, UNIFORM_LEVELS])
def test_around_every_midpoint_the_product_with_the_reciprocal_decides_and_not_the_quotient(levels, absmax):
    different = torch.tensor(levels).unique()
    boundaries = (different[1:] + different[:-1]) / 2 * absmax
    # Where a quotient by 3, 7, 0.7 or 1.7 and the product with its reciprocal lie on two sides, it is here.
    around = boundaries[:, None] * (1 + torch.arange(-6, 7) * 2**-24)
    w = torch.cat((around, torch.full((len(around), 19), absmax)), dim=1)
    assert_codes_count_the_midpoints_below_the_share(w, 32, levels)


@pytest.mark.parametrize("levels", [NF4_LEVELS, FP4_LEVELS, UNIFORM_LEVELS])
@pytest.mark.parametrize("block_size", nf4.BLOCK_SIZES)
def test_every_block_size_keeps_the_bound_and_the_exact_absmax_with_a_short_last_block(block_size, levels):
    # Two blocks and a half, and a row of odd length; a row of small values between two of large ones.
    w = torch.randn(3, 2 * block_size + block_size // 2 + 1, generator=torch.Generator().manual_seed(block_size))
    w[1] *= 1e-4
    q = qlite.quantize_nf4(w, block_size=block_size, double_quant=False, levels=levels)
    absmax = absmax_per_weight(w, block_size)
    assert torch.equal(q.absmax.double(), absmax[:, ::block_size])
    assert bool(((q.dequantize().double() - w.double()).abs() <= absmax * (half_gap(levels) + ROUNDING)).all())


@given(whole_blocks(), tables)
def test_rows_of_whole_blocks_are_one_flat_sequence_of_blocks(drawn, levels):
    w, block_size = drawn
    rows = qlite.quantize_nf4(w, block_size=block_size, double_quant=False, levels=levels)
    flat = qlite.quantize_nf4(w.reshape(-1), block_size=block_size, double_quant=False, levels=levels)
    assert torch.equal(rows.codes.view(-1), flat.codes[0]) and torch.equal(rows.absmax.view(-1), flat.absmax[0])


@given(weights(), block_sizes, tables, st.booleans())
def test_a_flat_tensor_is_its_flattened_self_in_another_shape(w, block_size, levels, double_quant):
    options = {"block_size": block_size, "double_quant": double_quant, "levels": levels}
    flat, row = qlite.quantize_nf4(w, flat=True, **options), qlite.quantize_nf4(w.reshape(-1), **options)
    assert flat.shape == w.shape and flat.nbytes == row.nbytes
    assert torch.equal(flat.codes, row.codes) and torch.equal(flat.absmax, row.absmax)
    assert torch.equal(flat.dequantize(), row.dequantize().view(w.shape))


@given(weights(), block_sizes, tables, st.sampled_from((128, 160, 384)))
def test_a_chunk_at_a_time_is_encoded_as_the_whole_is(w, block_size, levels, chunk):
    w, levels = w.reshape(1, -1) if chunk == 160 else w, torch.tensor(levels)
    whole = nf4.quantize(w, levels, block_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4, "CHUNK", chunk)
        parts = nf4.quantize(w, levels, block_size)
    assert torch.equal(parts[0], whole[0]) and torch.equal(parts[1], whole[1])


@given(weights(), block_sizes, full_tables)
def test_encoding_what_was_decoded_changes_nothing(w, block_size, levels):
    q = qlite.quantize_nf4(w, block_size=block_size, double_quant=False, levels=levels)
    # Below the normal numbers of a dtype its spacing is wider than the gaps between the levels.
    assume(bool(((q.absmax == 0) | (q.absmax >= torch.finfo(w.dtype).tiny)).all()))
    again = qlite.quantize_nf4(q.dequantize(), block_size=block_size, double_quant=False, levels=levels)
    assert torch.equal(q.codes, again.codes) and torch.equal(q.absmax, again.absmax)


@given(weights(), block_sizes, tables, st.booleans(), st.sampled_from((*DTYPES, torch.float64)))
def test_decoding_is_a_float32_product_that_is_rounded_once(w, block_size, levels, double_quant, dtype):
    q = qlite.quantize_nf4(w, block_size=block_size, double_quant=double_quant, levels=levels)
    absmax = nf4.dequantize_absmax(q.absmax, q.absmax_scale, q.absmax_offset).double()
    absmax = absmax.repeat_interleave(block_size, dim=1)[:, : w.shape[1]]
    codes = torch.stack((q.codes // 16, q.codes % 16), dim=-1).flatten(1)[:, : w.shape[1]].long()
    # In float64 the product of two float32 numbers is exact, so this is one rounding to float32 and one to the dtype.
    expected = (torch.tensor(levels).double()[codes] * absmax).float().to(dtype)
    assert torch.equal(q.dequantize(dtype), expected)


@given(weights(), block_sizes, tables)
def test_the_dtype_of_a_weight_does_not_change_its_codes(w, block_size, levels):
    q = qlite.quantize_nf4(w, block_size=block_size, levels=levels)
    # Just beside the values of w: what float64 holds beyond float32 is rounded away first.
    for same in (w.float(), w.double(), w.double() * (1 + 2**-40)):
        twin = qlite.quantize_nf4(same, block_size=block_size, levels=levels)
        assert torch.equal(q.codes, twin.codes) and torch.equal(q.absmax, twin.absmax)


@given(weights(dtypes=(torch.float32,)), block_sizes, tables, st.integers(-20, 20))
def test_a_power_of_two_scales_absmax_and_leaves_the_codes(w, block_size, levels, exponent):
    q = qlite.quantize_nf4(w, block_size=block_size, double_quant=False, levels=levels)
    scaled = qlite.quantize_nf4(w * 2.0**exponent, block_size=block_size, double_quant=False, levels=levels)
    assert torch.equal(q.codes, scaled.codes) and torch.equal(q.absmax * 2.0**exponent, scaled.absmax)


@given(weights(), block_sizes, tables)
def test_a_row_is_encoded_as_if_it_were_alone(w, block_size, levels):
    whole = qlite.quantize_nf4(w, block_size=block_size, double_quant=False, levels=levels)
    rows = [qlite.quantize_nf4(row[None], block_size=block_size, double_quant=False, levels=levels) for row in w]
    for i, row in enumerate(rows):
        assert torch.equal(whole.codes[i : i + 1], row.codes) and torch.equal(whole.absmax[i : i + 1], row.absmax)


@given(weights(), block_sizes, st.sampled_from((NF4_LEVELS, FP4_LEVELS)))
def test_zeros_come_back_as_positive_zeros_and_a_zero_block_has_absmax_zero(w, block_size, levels):
    q = qlite.quantize_nf4(w, block_size=block_size, double_quant=False, levels=levels)
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


@pytest.mark.parametrize("magnitude", [2.0**-149, 1e-42, 9e-39])
def test_an_absmax_below_1e_38_is_kept_and_its_weights_are_normalised_by_1e_38(magnitude):
    w = torch.tensor([[1.0, -1.0, 0.6, 0.0]]) * magnitude
    q = qlite.quantize_nf4(w, block_size=32, double_quant=False)
    shares = [value / 1e-38 for value in w[0].tolist()]
    nearest = [min(range(16), key=lambda code: abs(NF4_LEVELS[code] - share)) for share in shares]
    assert q.absmax.item() == w[0, 0].item() and nf4.unpack(q.codes)[0].tolist() == nearest


@given(weights(), block_sizes, tables)
def test_a_level_that_a_table_holds_twice_is_written_by_its_first_code(w, block_size, levels):
    q = qlite.quantize_nf4(w, block_size=block_size, double_quant=False, levels=levels)
    assert set(nf4.unpack(q.codes).flatten().tolist()) <= {levels.index(level) for level in levels}


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


@given(weights(), block_sizes, tables)
def test_a_row_of_odd_length_ends_in_the_code_of_the_level_nearest_to_zero(w, block_size, levels):
    assume(w.shape[1] % 2)
    q = qlite.quantize_nf4(w, block_size=block_size, double_quant=False, levels=levels)
    zero = levels.index(min(levels, key=lambda level: (abs(level), level)))  # a tie takes the lower one
    assert q.codes.shape == (len(w), w.shape[1] // 2 + 1) and (q.codes[:, -1] & 15).tolist() == [zero] * len(w)


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


@given(weights(), block_sizes)
def test_what_double_quantization_subtracts_is_the_mean_of_absmax(w, block_size):
    absmax = qlite.quantize_nf4(w, block_size=block_size, double_quant=False).absmax
    offset = qlite.quantize_nf4(w, block_size=block_size).absmax_offset
    # fsum is the exact sum: whatever order float64 is summed in, its error is far below half a spacing of float32.
    mean = math.fsum(absmax.flatten().tolist()) / max(absmax.numel(), 1)
    assert offset.tolist() == torch.tensor([mean], dtype=torch.float32).tolist()


@given(weights(max_exponent=4), block_sizes)
def test_decoding_absmax_rounds_the_product_and_then_the_sum(w, block_size):
    q = qlite.quantize_nf4(w, block_size=block_size)
    assert q.absmax_scale is not None and q.absmax_offset is not None
    scale = q.absmax_scale.double().repeat_interleave(256)[: q.absmax.numel()].view(q.absmax.shape)
    # Exact in float64 before each rounding to float32: a product of 48 bits; a sum that float64 rounds harmlessly.
    product = (dynamic_levels(True).double()[q.absmax.long()] * scale).float()
    expected = (product.double() + q.absmax_offset.double()).float()
    assert torch.equal(nf4.dequantize_absmax(q.absmax, q.absmax_scale, q.absmax_offset), expected)


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

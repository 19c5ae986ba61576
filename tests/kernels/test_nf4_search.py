"""The search for scales against its reference, bit for bit: on the GPU, or in Triton's interpreter where there is none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qlite
from qlite import nf4
from qlite.nf4 import BLOCK_SIZES, LS4_LEVELS, NF4_LEVELS, SHARES
from tests.strategies import DTYPES, block_sizes, tables, weights

pytest.importorskip("triton", reason="Triton is not built for this platform")
from qlite.kernels import nf4_codec, nf4_search

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def both(w, levels, block_size, weighting=None):
    levels = torch.tensor(levels, device=DEVICE)
    weighting = None if weighting is None else weighting.to(DEVICE)
    found = nf4_search.search(w.to(DEVICE), levels, block_size, SHARES, weighting)
    return found, nf4.search(w.to(DEVICE), levels, block_size, weighting)


@given(weights(max_exponent=60) | weights(), block_sizes, tables)
def test_the_search_equals_the_reference(w, block_size, levels):
    found, expected = both(w, levels, block_size)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@given(weights(), block_sizes, tables, st.integers(0, 2**32), st.integers(1, 3))
def test_a_weighted_search_equals_the_reference(w, block_size, levels, seed, copies):
    # A flat tensor is one row, in which the weights of the columns come again and again.
    period = max(1, w.shape[1] // copies)
    found, expected = both(w, levels, block_size, torch.rand(period, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("block_size", "dtype"), [*((size, torch.float32) for size in BLOCK_SIZES), *((64, dtype) for dtype in DTYPES[1:])]
)
def test_blocks_of_every_size_are_searched_as_in_the_reference(block_size, dtype):
    w = torch.randn(2, 2 * block_size + 24, generator=torch.Generator().manual_seed(block_size)).to(dtype)
    w[0, :block_size] = 0  # a block of zeros has the scale 0
    for part in (w, w[:, : 2 * block_size].contiguous()):
        found, expected = both(part, NF4_LEVELS, block_size)
        assert torch.equal(found, expected) and found[0, 0] == 0 and found[0, 1] != 0


@given(weights(max_exponent=60) | weights(), block_sizes, tables, st.integers(0, 2**32))
def test_codes_for_given_scales_equal_the_reference(w, block_size, levels, seed):
    w, levels = w.to(DEVICE), torch.tensor(levels, device=DEVICE)
    # Scales far from absmax, as double quantization may leave them beside a large one; and 0.
    absmax = nf4.quantize(w, levels, block_size)[1].cpu()
    spread = torch.randn(absmax.shape, generator=torch.Generator().manual_seed(seed))
    scales = (absmax * spread * (spread.abs() > 0.1)).to(DEVICE)
    codes, kept = nf4_codec.quantize(w, levels, block_size, scales)
    assert torch.equal(codes, nf4.encode(w, scales, levels, block_size)) and kept is scales


@pytest.mark.parametrize("levels", [NF4_LEVELS, LS4_LEVELS])
def test_a_table_whose_codes_are_found_by_cells_is_enough_for_shares_beyond_one(levels):
    # What the GPU does, in numbers: the cell of a share is that of its nearest within 1, the comparison is of the share itself.
    table = nf4_codec.decision(torch.tensor(levels, device=DEVICE)).cpu()
    assert table[nf4_codec.SIMPLE.value] == 1
    assert table[96:112].view(torch.float32).tolist() == torch.tensor(levels).tolist()
    share = torch.cat((torch.linspace(-3, 3, 100_001), torch.tensor([1e30, -1e30, torch.inf, -torch.inf])))
    cell = (share.clamp(-1, 1).double() * 15 + 1.5 * 2**23).float().view(torch.int32) & 31
    rank = table[64:96][cell] + (share > table[32:64].view(torch.float32)[cell])
    assert torch.equal(rank, torch.bucketize(share, nf4.decision_table(torch.tensor(levels))[0]).int())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_a_searched_weight_is_the_same_by_kernels_and_by_references(flat, double_quant):
    w = torch.randn(40, 200, generator=torch.Generator().manual_seed(1))
    options = {"search": True, "flat": flat, "double_quant": double_quant, "weighting": torch.rand(200) + 0.1}
    expected, found = qlite.quantize_nf4(w, **options), qlite.quantize_nf4(w.to(DEVICE), **options)
    for name in ("codes", "absmax", "absmax_scale", "absmax_offset"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None and theirs is None) or torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("shape", [(3, 200), (0, 64), (1, 1)])
def test_the_ops_of_the_search_pass_opcheck(shape):
    w, levels = torch.randn(shape).to(DEVICE), torch.tensor(NF4_LEVELS, device=DEVICE)
    weighting = torch.rand(shape[1]).to(DEVICE)
    scales = nf4.search(w, levels, 64)
    results = torch.library.opcheck(torch.ops.qlite.search_nf4.default, (w, levels, 64, weighting))
    results |= torch.library.opcheck(torch.ops.qlite.encode_nf4.default, (w, scales, levels, 64))
    assert set(results.values()) == {"SUCCESS"}

"""The NF4 codec kernels against their reference, bit for bit: on the GPU, or in Triton's interpreter where there is none."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import qlite
from qlite import nf4
from qlite.dynamic8 import dynamic_levels
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


@given(weights(dtypes=(torch.float32,)))
def test_the_absmax_is_encoded_as_in_the_reference(w):
    absmax = w.abs().contiguous().to(DEVICE)
    for ours, expected in zip(nf4_codec.quantize_absmax(absmax), nf4.quantize_absmax(absmax)):
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)


@pytest.mark.parametrize("count", [1, 255, 256, 257, 2049, 100_000, 300_001])
def test_the_absmax_of_many_blocks_is_encoded_as_in_the_reference(count):
    absmax = torch.randn(count, 64, generator=torch.Generator().manual_seed(count)).abs().amax(dim=1)[None].to(DEVICE)
    for ours, expected in zip(nf4_codec.quantize_absmax(absmax), nf4.quantize_absmax(absmax)):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("count", [0, 1, 257])
def test_the_op_that_encodes_the_absmax_passes_opcheck(count):
    absmax = torch.rand(1, count, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    results = torch.library.opcheck(torch.ops.qlite.quantize_nf4_absmax.default, (absmax,))
    assert set(results.values()) == {"SUCCESS"}


def test_every_tie_among_the_dynamic_levels_is_decided_as_in_the_reference():
    levels = dynamic_levels(signed=True)
    midpoints = (levels[1:] + levels[:-1]) / 2
    around = [torch.nextafter(midpoints, torch.full((255,), -9.0)), midpoints, torch.nextafter(midpoints, torch.ones(255))]
    # Each value comes in both signs, so that the mean is zero; 1 and -1 in each group make its scale 1.
    values = torch.cat([*around, *(-part for part in around)])
    groups = torch.nn.functional.pad(values, (0, -len(values) % 254)).view(-1, 254)
    groups = torch.cat((groups, torch.ones(len(groups), 1), -torch.ones(len(groups), 1)), dim=1)
    ours, expected = nf4_codec.quantize_absmax(groups.to(DEVICE)), nf4.quantize_absmax(groups.to(DEVICE))
    assert expected[2].item() == 0
    assert all(torch.equal(our, other) for our, other in zip(ours, expected))


def shares_near(midpoints):
    """What lies at and beside the midpoints and the edges of the cells, to a little beyond 1, and a thousand in between."""
    edges = torch.cat((midpoints[midpoints.isfinite()], (torch.arange(-15, 15) + 0.5) / 15, torch.tensor([-1.0, 1.0])))
    steps = torch.arange(-3, 4, dtype=torch.int32)[:, None]
    near = (edges.view(torch.int32) + steps).view(torch.float32)  # the three floats on either side of each
    return torch.cat((near[near.isfinite()], torch.rand(1000, generator=torch.Generator().manual_seed(3)) * 2 - 1))


@given(tables)
@example(NF4_LEVELS)
@example(FP4_LEVELS)
def test_the_decision_table_is_the_reference_and_its_cells_decide_alike(levels):
    levels = torch.tensor(levels)
    table = torch.full((nf4_codec.TABLE.value,), -1, dtype=torch.int32, device=DEVICE)
    nf4_codec._decision_kernel[(1,)](levels.to(DEVICE), table, num_warps=8, enable_fp_fusion=False)
    table = table.cpu()
    midpoints, order = nf4.decision_table(levels)
    assert torch.equal(table[:15].view(torch.float32), midpoints)
    assert torch.equal(table[16:32], order.int())
    simple = bool(table[nf4_codec.SIMPLE.value])
    assert simple or tuple(levels.tolist()) != NF4_LEVELS  # the fast way is there for NF4
    if simple:  # as the kernel does it on the GPU: a product and a sum rounded once, five bits of it
        share = shares_near(midpoints)
        cell = (share.double() * 15 + 1.5 * 2**23).float().view(torch.int32) & 31
        code = table[64:96][cell] + (share > table[32:64].view(torch.float32)[cell])
        assert torch.equal(code, order[torch.bucketize(share, midpoints)].int())


def test_a_table_whose_cells_hold_two_midpoints_or_whose_codes_are_not_in_order_is_not_simple():
    close = (*NF4_LEVELS[:8], 0.01, 0.02, *NF4_LEVELS[10:])
    for levels in (FP4_LEVELS, NF4_LEVELS[::-1], close):
        table = torch.zeros(nf4_codec.TABLE.value, dtype=torch.int32, device=DEVICE)
        nf4_codec._decision_kernel[(1,)](torch.tensor(levels, device=DEVICE), table, num_warps=8, enable_fp_fusion=False)
        assert table[nf4_codec.SIMPLE.value] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("columns", [192, 200, 100, 98, 97])  # whole blocks; chunks of 8, of 4, of 2, of 1
@pytest.mark.parametrize("block_size", [32, 64])
def test_any_rows_decode_into_a_view_of_a_wider_buffer(block_size, columns, flat, double_quant, dtype):
    w = torch.randn(301, columns, generator=torch.Generator().manual_seed(1))
    q = qlite.quantize_nf4(w, double_quant=double_quant, flat=flat, block_size=block_size)
    parts = [None if part is None else part.to(DEVICE) for part in (q.codes, q.absmax, q.absmax_scale, q.absmax_offset)]
    row = w.numel() if flat else columns
    for first, rows, left, right in ((0, 301, 0, 0), (0, 301, 8, 24), (7, 90, 0, 0), (64, 237, 16, 1), (300, 1, 5, 0)):
        buffer = torch.full((rows, left + columns + right), 7.0, dtype=dtype, device=DEVICE)
        out = buffer[:, left : left + columns]
        levels = q.levels.to(DEVICE)
        given_back = nf4_codec.dequantize(*parts, levels, row, block_size, dtype, out=out, first_row=first)
        assert given_back.data_ptr() == out.data_ptr()
        assert torch.equal(out.cpu(), q.dequantize(dtype)[first : first + rows])
        assert bool((buffer[:, :left] == 7).all()) and bool((buffer[:, left + columns :] == 7).all())


def test_a_weight_of_float64_comes_back_in_it():
    w = torch.randn(3, 200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q = qlite.quantize_nf4(w, double_quant=False)
    codes, absmax = nf4_codec.quantize(w.to(DEVICE), q.levels.to(DEVICE), 64)
    assert torch.equal(codes.cpu(), q.codes) and torch.equal(absmax.cpu(), q.absmax)
    decoded = nf4_codec.dequantize(codes, absmax, None, None, q.levels.to(DEVICE), 200, 64, torch.float64)
    assert torch.equal(decoded.cpu(), q.dequantize())


@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_codes_at_any_address_decode(offset):
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    q = qlite.quantize_nf4(w, double_quant=False)
    codes = torch.nn.functional.pad(q.codes.view(-1), (offset, 0)).to(DEVICE)[offset:].view(4, 32)
    decoded = nf4_codec.dequantize(codes, q.absmax.to(DEVICE), None, None, q.levels.to(DEVICE), 64, 64, torch.float32)
    assert torch.equal(decoded.cpu(), q.dequantize())


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
    last = torch.empty(1, columns, dtype=torch.bfloat16, device="cuda")
    nf4_codec.dequantize(codes, absmax, None, None, levels, columns, 64, torch.bfloat16, out=last, first_row=rows - 1)
    assert torch.equal(last, out[-1:])
    again, _ = nf4_codec.quantize(out, levels, 64)
    assert torch.equal(again[-1:], nf4.quantize(out[-1:], levels, 64)[0])

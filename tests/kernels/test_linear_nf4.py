"""The kernels of x @ decode(W).T, in the interpreter or on the GPU; and the ops on CUDA tensors, which choose among them."""

import concurrent.futures

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qlite
from qlite import nf4, ops

pytest.importorskip("triton", reason="Triton is not built for this platform")
from qlite.kernels import few_rows, linear_nf4, nf4_codec, small_batch, tiles
from tests.strategies import tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(64, 128), (4672, 4544), (100, 65)]
ROUNDOFF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="the CUDA implementations of the ops")


def seeded(*shape, dtype=torch.float32, device="cuda"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(device, dtype)


def parts(q):
    return q.codes, q.absmax, q.absmax_scale, q.absmax_offset, q.levels


def within(found, left, right, dtype) -> bool:
    """Whether found is left @ right up to one rounding of each weight and of the result, and float32 sums in any order."""
    wanted, roundoff = left @ right, ROUNDOFF[dtype]
    bound = roundoff * wanted.abs() + (roundoff + right.shape[0] * 2**-24) * 1.01 * (left.abs() @ right.abs())
    # Below float16's normal numbers a rounding costs up to half the smallest step.
    return bool(((found.double() - wanted).abs() <= bound + 2**-24).all())


weights = st.tuples(st.integers(1, 150), st.integers(1, 7), st.sampled_from([64, 128, 256]), st.booleans())


@settings(max_examples=60)  # the interpreter is slow
@given(
    weights, st.integers(1, 40), st.sampled_from(list(ROUNDOFF)), st.booleans(), tables, st.integers(0, 2**31), st.booleans()
)
def test_products_are_as_near_to_float64_as_one_rounding_allows(weight, rows, dtype, has_bias, levels, seed, search):
    out_features, blocks, block_size, double_quant = weight
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(out_features, 64 * blocks, generator=random) * 10.0 ** torch.randint(-3, 3, (), generator=random)
    w[torch.rand(out_features, generator=random) < 0.1] = 0
    # Searched scales are of either sign.
    q = qlite.quantize_nf4(w.to(DEVICE), block_size=block_size, double_quant=double_quant, levels=levels, search=search)
    x = torch.randn(rows, 64 * blocks, generator=random).to(DEVICE, dtype)
    bias = torch.randn(out_features, generator=random).to(DEVICE) if has_bias else None
    y = linear_nf4.linear(x, *parts(q), bias, out_features, block_size)
    assert y.dtype == dtype and torch.equal(y, linear_nf4.linear(x, *parts(q), bias, out_features, block_size))
    left, right = x.double(), q.dequantize(torch.float32).double().T
    if has_bias:
        left, right = torch.cat((left, left.new_ones(rows, 1)), 1), torch.cat((right, bias.double()[None]))
    assert within(y, left, right, dtype)


@pytest.mark.parametrize("rows", [3, 12, 30, 50])
@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_a_product_that_is_one_percent_off_would_be_found(rows, dtype):
    # Of one sign, so that nothing cancels: the bound then is a share of the product.
    q = qlite.quantize_nf4(seeded(96, 320, device=DEVICE).abs() + 1)
    x = seeded(rows, 320, dtype=dtype, device=DEVICE).abs()
    y = linear_nf4.linear(x, *parts(q), None, 96, 64)
    left, right = x.double(), q.dequantize(torch.float32).double().T
    assert within(y, left, right, dtype)
    y[-1, -1] *= 1.01
    assert not within(y, left, right, dtype)


@pytest.mark.parametrize("rows", [4, 16, 32, 64])
def test_each_row_is_what_it_is_alone_up_to_the_order_of_sums(rows):
    q = qlite.quantize_nf4(seeded(130, 448, device=DEVICE))
    x = seeded(rows, 448, dtype=torch.float16, device=DEVICE)
    together = linear_nf4.linear(x, *parts(q), None, 130, 64)
    for row in (0, rows // 2, rows - 1):
        alone = linear_nf4.linear(x[row : row + 1], *parts(q), None, 130, 64)[0]
        torch.testing.assert_close(together[row], alone, rtol=2**-9, atol=2**-9 * 448**0.5)


@pytest.mark.parametrize("rows", [2, 9])
def test_rows_of_any_place_in_memory_and_dead_values_around_them(rows):
    q = qlite.quantize_nf4(seeded(40, 128, device=DEVICE))
    wide = torch.full((rows, 131), float("nan"), dtype=torch.float16, device=DEVICE)
    wide[:, 3:] = seeded(rows, 128, dtype=torch.float16, device=DEVICE)
    y = linear_nf4.linear(wide[:, 3:], *parts(q), None, 40, 64)
    assert torch.equal(y, linear_nf4.linear(wide[:, 3:].clone(), *parts(q), None, 40, 64)) and bool(y.isfinite().all())


@pytest.mark.parametrize("rows", [1, 3, 10])
@pytest.mark.parametrize("dtype", ROUNDOFF)
def test_what_is_not_finite_stays_in_its_row(rows, dtype):
    q = qlite.quantize_nf4(seeded(40, 128, device=DEVICE))
    x = seeded(rows, 128, dtype=dtype, device=DEVICE)
    x[0, 5] = float("nan")
    y = linear_nf4.linear(x, *parts(q), None, 40, 64)
    assert bool(y[0].isnan().all()) and bool(y[1:].isfinite().all())


@pytest.mark.parametrize("rows", [2, 9])
def test_a_bias_that_is_no_number_is_none_afterwards(rows):
    q = qlite.quantize_nf4(seeded(40, 128, device=DEVICE))
    bias = torch.full((40,), 0x7FFFFFFF, dtype=torch.int32, device=DEVICE).view(torch.float32)  # the NaN of NVIDIA's arithmetic
    y = linear_nf4.linear(seeded(rows, 128, dtype=torch.bfloat16, device=DEVICE), *parts(q), bias, 40, 64)
    assert bool(y.isnan().all())


@pytest.mark.parametrize("rows", [3, 20])
def test_a_flat_weight_of_whole_blocks_is_multiplied_as_its_rows(rows):
    w = seeded(24, 192, device=DEVICE)
    x = seeded(rows, 192, dtype=torch.float16, device=DEVICE)
    flat, plain = qlite.quantize_nf4(w, flat=True), qlite.quantize_nf4(w)
    found = linear_nf4.linear(x, *parts(flat), None, 24, 64)
    assert torch.equal(found, linear_nf4.linear(x, *parts(plain), None, 24, 64))


@pytest.mark.parametrize("case", ["odd columns", "block of 32", "float32", "too many rows", "no rows"])
def test_what_no_tile_takes_is_decoded_and_multiplied(case, monkeypatch):
    monkeypatch.setattr(few_rows, "multiply", lambda *arguments: pytest.fail("few rows"))
    monkeypatch.setattr(small_batch, "multiply", lambda *arguments: pytest.fail("small batch"))
    columns, block = {"odd columns": (100, 64), "block of 32": (128, 32)}.get(case, (128, 64))
    dtype = torch.float32 if case == "float32" else torch.float16
    q = qlite.quantize_nf4(seeded(20, columns, device=DEVICE), block_size=block)
    x = seeded({"too many rows": 300, "no rows": 0}.get(case, 2), columns, dtype=dtype, device=DEVICE)
    y = linear_nf4.linear(x, *parts(q), None, 20, block)
    torch.testing.assert_close(y, nf4.linear(x, q.dequantize(dtype), None), rtol=2**-10, atol=1e-2)


def test_every_tile_of_the_table_is_reached_by_some_number_of_rows(monkeypatch):
    for capability in [(0, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0)]:
        monkeypatch.setattr(tiles, "_properties", lambda device, found=capability: (found, 1))
        for most, least, tile in tiles.table(capability):
            assert least <= 18176 * 4544
            shape = (18176, 4544) if least else (4672, 4544)
            assert tiles.linear_nf4.__wrapped__(most, shape, 64, torch.float16, torch.device("cpu")) == tile
    assert tiles.linear_nf4(0, (64, 128), 64, torch.float16, torch.device("cpu")) is None


@pytest.mark.parametrize("rows", [2, 9, 60, 300])
def test_a_bias_of_any_stride_and_dtype_is_added_and_one_of_another_length_refused(rows):
    q = qlite.quantize_nf4(seeded(40, 128, device=DEVICE))
    x = seeded(rows, 128, dtype=torch.float16, device=DEVICE)
    bias = seeded(80, device=DEVICE)[::2]
    without = linear_nf4.linear(x, *parts(q), None, 40, 64)
    y = linear_nf4.linear(x, *parts(q), bias, 40, 64)
    torch.testing.assert_close(y, without + bias.to(x.dtype), rtol=2**-9, atol=2**-9 * 128**0.5)
    one = torch.ones(1, device=DEVICE).expand(40)
    torch.testing.assert_close(linear_nf4.linear(x, *parts(q), one, 40, 64), without + 1, rtol=2**-9, atol=2**-9 * 128**0.5)
    with pytest.raises(ValueError, match=r"bias has shape \(1,\); wanted \(40,\)"):
        ops.linear_nf4(x, q, torch.ones(1, device=DEVICE))


@pytest.mark.parametrize("rows", [2, 9, 60])
def test_codes_x_and_levels_at_any_address_give_the_same_product(rows):
    q = qlite.quantize_nf4(seeded(40, 128, device=DEVICE))
    x = seeded(rows, 128, dtype=torch.float16, device=DEVICE)
    expected = linear_nf4.linear(x, *parts(q), None, 40, 64)
    moved = torch.cat((x.new_zeros(3), x.flatten()))[3:].view(rows, 128)
    assert moved.is_contiguous() and moved.data_ptr() % 16
    levels = torch.stack((q.levels, q.levels), 1)[:, 0]
    assert torch.equal(linear_nf4.linear(moved, *parts(q)[:4], levels, None, 40, 64), expected)
    codes = torch.cat((q.codes.new_zeros(3), q.codes.flatten()))[3:].view(40, 64)
    found = linear_nf4.linear(x, codes, *parts(q)[1:], None, 40, 64)
    torch.testing.assert_close(found, expected, rtol=2**-9, atol=2**-9 * 128**0.5)
    wide = torch.cat((q.codes, q.codes), 1)[:, :64]
    torch.testing.assert_close(linear_nf4.linear(x, wide, *parts(q)[1:], None, 40, 64), found, rtol=0, atol=0)


def test_a_flat_weight_without_rows_gives_no_columns():
    q = qlite.quantize_nf4(torch.empty(0, 64, device=DEVICE), flat=True)
    assert linear_nf4.linear(seeded(3, 64, dtype=torch.float16, device=DEVICE), *parts(q), None, 0, 64).shape == (3, 0)


@on_gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_encoding_and_decoding_on_cuda_equal_the_cpu_bit_for_bit(shape, double_quant, dtype):
    w = seeded(*shape, dtype=dtype)
    here = qlite.quantize_nf4(w, double_quant=double_quant)
    there = qlite.quantize_nf4(w.cpu(), double_quant=double_quant)
    for name in ("codes", "absmax", "absmax_scale", "absmax_offset"):
        a, b = getattr(here, name), getattr(there, name)
        assert (a is None and b is None) or torch.equal(a.cpu(), b), name
    assert torch.equal(here.dequantize().cpu(), there.dequantize())


@on_gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 16, 17, 64, 65, 128, 200, 256, 257, 1024])
def test_linear_nf4_and_its_gradient_are_as_near_to_float64_as_one_rounding_allows(shape, dtype, rows):
    q = qlite.quantize_nf4(seeded(*shape, dtype=dtype) / shape[1] ** 0.5)
    x = seeded(rows, shape[1], dtype=dtype).requires_grad_()
    y = ops.linear_nf4(x, q)
    grad = seeded(*y.shape, dtype=dtype)
    (grad_x,) = torch.autograd.grad(y, x, grad)
    exact = q.dequantize(torch.float32).double()
    assert within(y, x.detach().double(), exact.T, dtype) and within(grad_x, grad.double(), exact, dtype)


@on_gpu
def test_the_kernel_runs_and_not_the_reference(monkeypatch):
    monkeypatch.setattr(nf4, "dequantize", lambda *arguments: pytest.fail("the reference ran on a CUDA tensor"))
    monkeypatch.setattr(nf4, "quantize", lambda *arguments: pytest.fail("the reference ran on a CUDA tensor"))
    assert qlite.quantize_nf4(seeded(8, 64)).dequantize().is_cuda


@on_gpu
@pytest.mark.parametrize("rows", [1, 16, 64])
def test_few_rows_decode_nothing_into_memory(rows, monkeypatch):
    monkeypatch.setattr(nf4_codec, "dequantize", lambda *arguments: pytest.fail("the weight was decoded"))
    q = qlite.quantize_nf4(seeded(4672, 4544, dtype=torch.bfloat16))
    assert ops.linear_nf4(seeded(rows, 4544, dtype=torch.bfloat16), q).shape == (rows, 4672)


@on_gpu
@pytest.mark.parametrize("rows", [1, 16, 300])
def test_a_captured_call_gives_the_same_bits(rows):
    q, x = qlite.quantize_nf4(seeded(4672, 4544)), seeded(rows, 4544, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected = ops.linear_nf4(x, q)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.linear_nf4(x, q)
        for _ in range(3):
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, expected)


@on_gpu
@pytest.mark.parametrize("rows", [2, 16, 300])
def test_threads_on_one_stream_do_not_disturb_each_other(rows):
    cases = [(qlite.quantize_nf4(seeded(512, 512) * k), seeded(rows, 512, dtype=torch.bfloat16)) for k in (1, 3)]
    expected = [ops.linear_nf4(x, q) for q, x in cases]

    def work(case):
        return all(torch.equal(ops.linear_nf4(cases[case][1], cases[case][0]), expected[case]) for _ in range(50))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, (0, 1))) == [True, True]


@on_gpu
def test_a_weight_of_more_than_two_to_the_31_elements_is_multiplied_at_the_right_place():
    columns, rows = 2**16, 2**15 + 16
    codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(rows, columns // 64, device="cuda")
    levels = torch.tensor(nf4.NF4_LEVELS, device="cuda")
    for m in (2, 20):
        x = seeded(m, columns, dtype=torch.bfloat16)
        y = linear_nf4.linear(x, codes, absmax, None, None, levels, None, rows, 64)
        for part in (slice(0, 16), slice(rows - 16, rows)):
            exact = nf4.dequantize(codes[part], absmax[part], None, None, levels, columns, 64, torch.float32).double().T
            assert within(y[:, part], x.double(), exact, torch.bfloat16)


@on_gpu
def test_no_decoded_weight_outlives_the_forward():
    q = qlite.quantize_nf4(seeded(4096, 4096, dtype=torch.bfloat16))
    x = seeded(4, 4096, dtype=torch.bfloat16).requires_grad_()
    ops.linear_nf4(x.repeat(100, 1), q)  # what every layer shares is there from now on
    before = torch.cuda.memory_allocated()
    y = ops.linear_nf4(x.repeat(100, 1), q)
    # What stays is the output and its input; a kept weight would be 32 MiB.
    assert torch.cuda.memory_allocated() - before <= 3 * y.numel() * y.element_size() + 1024

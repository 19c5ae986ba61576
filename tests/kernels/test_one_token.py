"""What lies between the products of one more token, and two products at once: the kernels against the references in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qlite
from qlite import one_token
from tests.kernels.test_few_tokens import DEVICE, UNIT, draw
from tests.strategies import DTYPES, tables

pytest.importorskip("triton", reason="Triton is not built for this platform")
from qlite.kernels import few_rows, linear_nf4, tiles
from qlite.kernels import one_token as kernels

dtypes = st.sampled_from(DTYPES)


def parts_of(counts, rows, columns, dtype, seed=0):
    """Parts as products leave them: slices of wider tensors in float32, whole ones in the dtype of the activations."""
    found = []
    for i, count in enumerate(counts):
        wide = draw(count, rows, columns + 16, dtype=torch.float32 if count > 1 else dtype, seed=seed + i)
        found.append(wide[..., 8 : columns + 8])
    return found


def in_float64(parts):
    return [part.double() for part in parts]


@given(
    st.integers(0, 3),
    st.sampled_from([1, 48, 100, 1000]),
    dtypes,
    st.sampled_from([[1], [4], [1, 1], [10, 2]]),
    st.integers(0, 9),
)
def test_a_sum_and_its_norm_are_those_of_float64(rows, columns, dtype, counts, seed):
    x, weight, bias = (
        draw(rows, columns, dtype=dtype, seed=seed),
        draw(columns, dtype=dtype, seed=1),
        draw(columns, dtype=dtype),
    )
    parts = parts_of(counts, rows, columns, dtype, seed)
    total, normed = kernels.add_norm(x, parts, weight, bias, 1e-5)
    wanted = x.double() + sum(part.double().sum(0) for part in parts)
    size = x.double().abs() + sum(part.double().abs().sum(0) for part in parts)
    # One rounding to the dtype, and a float32 sum of so many terms before it.
    assert total.dtype == normed.dtype == dtype
    assert ((total.double() - wanted).abs() <= UNIT[dtype] * wanted.abs() + 2.0**-24 * (sum(counts) + 2) * size).all()
    exact = torch.nn.functional.layer_norm(total.double(), (columns,), weight.double(), bias.double(), 1e-5)
    spread = (exact - bias.double()).abs() + weight.double().abs() + bias.double().abs()
    assert ((normed.double() - exact).abs() <= UNIT[dtype] * exact.abs() + 2.0**-23 * (columns**0.5 + 8) * spread + 1e-7).all()


@settings(max_examples=40)
@given(
    st.integers(0, 3), st.integers(1, 2), st.sampled_from([1, 3, 16, 17]), st.sampled_from([32, 64]), st.integers(1, 150),
    dtypes, st.sampled_from([[1], [4], [4, 1]]), st.integers(0, 9), st.booleans(),
)  # fmt: skip
def test_attention_and_gelu_are_those_of_float64(batch, kv_heads, group, size, length, dtype, counts, seed, padded):
    generator = torch.Generator().manual_seed(seed)
    place = int(torch.randint(length, (), generator=generator))
    keys, values = (draw(batch, kv_heads, length, size, dtype=dtype, seed=seed + i) for i in (2, 3))
    visible = torch.arange(length)[None] < place + 1
    visible = visible.repeat(batch, 1)
    if padded:
        visible &= torch.rand(batch, length, generator=generator) < 0.7
    # What lies behind the last token, or is hidden, is not looked at.
    for kept in (keys, values):
        kept.masked_fill_(~visible.to(DEVICE)[:, None, :, None], float("nan"))
    visible[:, place] = True
    fused = parts_of(counts, batch, (group + 2) * kv_heads * size, dtype, seed)
    up = parts_of(counts, batch, 100, dtype, seed + 5)
    angles = draw(1 if seed % 2 else batch, size // 2, seed=7).double() * 3
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    at = torch.tensor([place], device=DEVICE)
    exact_keys, exact_values = keys.double().nan_to_num(), values.double().nan_to_num()
    # The cache is of the dtype, so that what is attended to has been rounded before.
    turned = one_token.between_products(
        in_float64(fused), in_float64(up), cos.double(), sin.double(), exact_keys, exact_values, at, visible.to(DEVICE)
    )
    attended, active = kernels.between(fused, up, cos, sin, keys, values, at, visible.to(DEVICE))
    wanted, wanted_active = turned
    # Of numbers of size one: three roundings of queries and keys move a score by as many units a term, and a share by that.
    slack = UNIT[dtype] * 8 * size**0.5 + 2e-5
    assert attended.dtype == active.dtype == dtype
    largest = torch.cat((exact_values.flatten(2).abs(), exact_values.new_ones(batch, kv_heads, 1)), 2).amax(2)
    largest = largest.repeat_interleave(group * size, 1)
    assert ((attended.double() - wanted).abs() <= slack * largest).all()
    assert ((active.double() - wanted_active).abs() <= 4 * UNIT[dtype] * (wanted_active.abs() + 0.2) + 1e-5).all()
    for found, exact in ((keys, exact_keys), (values, exact_values)):
        here = found[:, :, place].double()
        assert ((here - exact[:, :, place]).abs() <= 4 * UNIT[dtype] * (exact[:, :, place].abs() + 4)).all()
        others = torch.arange(length, device=DEVICE) != place
        assert torch.equal(found[:, :, others].double().nan_to_num(), exact[:, :, others])


@settings(max_examples=30)  # the interpreter is slow
@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 2, 3, 4, 5, 16]),
    st.booleans(),
    st.sampled_from([torch.float16, torch.bfloat16]), st.sampled_from([64, 128]), st.booleans(), tables, st.integers(0, 9),
)  # fmt: skip
def test_two_products_are_those_of_float64(
    out0, out1, blocks0, blocks1, rows, stacked, dtype, block, double_quant, levels, seed
):
    if stacked:
        blocks1 = blocks0
    else:
        out1 = out0
    weights, left, right = [], [], []
    for i, (out, blocks) in enumerate(((out0, blocks0), (out1, blocks1))):
        dense = draw(out, 64 * blocks, seed=seed + i, scale=10.0**i)
        q = qlite.quantize_nf4(dense, block_size=block, double_quant=double_quant, levels=levels)
        weights.append([t for t in (q.codes, q.absmax, q.absmax_scale, q.absmax_offset, q.levels) if t is not None])
        right.append(q.dequantize(torch.float32).double())
        left.append(draw(rows, 64 * blocks, dtype=dtype, seed=seed + i * (not stacked)))
    found = linear_nf4.two_products(left[: 1 if stacked else 2], *weights, block)
    assert found.dtype == torch.float32
    products = [x.double() @ w.T for x, w in zip(left, right)]
    sizes = [x.double().abs() @ w.abs().T for x, w in zip(left, right)]
    wanted, size = (torch.cat(t, 1) if stacked else t[0] + t[1] for t in (products, sizes))
    # One rounding of each weight, and float32 sums.
    assert (
        (found.double().sum(0) - wanted).abs() <= (UNIT[dtype] + 2.0**-24 * 64 * (blocks0 + blocks1)) * 1.01 * size + 1e-7
    ).all()


def encoded(out, columns, seed):
    q = qlite.quantize_nf4(draw(out, columns, seed=seed))
    return [q.codes, q.absmax, q.absmax_scale, q.absmax_offset, q.levels]


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("why", ["no tile", "an address that is no multiple of 16"])
def test_two_products_that_no_launch_can_take_are_made_one_by_one(why, stacked, monkeypatch):
    one, other = encoded(40, 128, 0), encoded(24 if stacked else 40, 128 if stacked else 192, 1)
    xs = [draw(6, 128, dtype=torch.float16), draw(6, 192, dtype=torch.float16, seed=2)][: 1 if stacked else 2]
    wanted = linear_nf4.two_products(xs, one, other, 64).sum(0)
    if why == "no tile":
        monkeypatch.setattr(tiles, "two_products", lambda *_: None)
    else:
        moved = torch.empty(other[0].numel() + 4, dtype=torch.uint8, device=DEVICE)[4:].view(other[0].shape)
        other[0] = moved.copy_(other[0])
    monkeypatch.setattr(few_rows, "multiply_two", lambda *_: pytest.fail("one launch"))
    found = linear_nf4.two_products(xs, one, other, 64)
    assert found.dtype == torch.float32 and len(found) == (1 if stacked else 2)
    torch.testing.assert_close(found.sum(0), wanted, rtol=2**-9, atol=2**-9 * 192**0.5)  # a rounding of each product


def test_nothing_begins_early_over_a_copy():
    codes, absmax, *rest = encoded(40, 128, 0)
    tile = tiles.Tile("few rows", 1, 4, early=True)
    assert few_rows.begins_early(tile, (codes, absmax, *rest), (codes, absmax, None, None, rest[-1]))
    strided = absmax.repeat(1, 2)[:, ::2]
    assert not few_rows.begins_early(tile, (codes, absmax, *rest), (codes, strided, *rest))


@pytest.mark.skipif(DEVICE == "cpu", reason="the CUDA implementation of the op")
def test_what_the_kernel_cannot_take_is_refused():
    q = qlite.quantize_nf4(draw(32, 128))
    weight = [q.codes, q.absmax, q.absmax_scale, q.absmax_offset, q.levels]
    x = draw(2, 128, dtype=torch.float16)
    for xs, match in (
        ([draw(17, 128, dtype=torch.float16)], "up to 16 rows"), ([x.float()], "float16 or bfloat16"),
        ([x, x[:1]], "up to 16 rows"),
        ([draw(2, 64, dtype=torch.float16)], "do not belong together"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            torch.ops.qlite.two_products(xs, weight, weight, 64)


def test_no_more_programs_share_a_group_than_there_are_parts():
    for parts in (2, 3, 4, 7):
        for groups in range(1, 12):
            for steps in range(1, 20):
                total = groups * steps
                for programs in range(1, min(total, groups * (parts - 1)) + 1):
                    starts = [program * total // programs for program in range(programs + 1)]
                    owners = [range(first // steps, -(-stop // steps)) for first, stop in itertools.pairwise(starts)]
                    shared = [sum(group in owned for owned in owners) for group in range(groups)]
                    assert min(shared) >= 1 and max(shared) <= parts
                    for group in range(groups):  # as the kernel finds the first
                        first = next(program for program, owned in enumerate(owners) if group in owned)
                        assert first == ((group * steps + 1) * programs - 1) // total

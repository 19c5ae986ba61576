"""The seam: schemas, fakes and gradients of the ops, compilation, and what autograd keeps."""

import dataclasses
import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import qlite
from qlite import int8, nf4, ops
from qlite.adamw_8bit import AdamWRule, flattened
from qlite.nf4 import NF4_LEVELS
from tests.strategies import block_sizes, weights


def seeded(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def coded(q):
    return q.codes, q.absmax, q.absmax_scale, q.absmax_offset, q.levels


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("columns", [128, 65])
def test_nf4_ops_pass_opcheck(double_quant, flat, columns):
    w = seeded(6, columns)
    q = qlite.quantize_nf4(w, double_quant=double_quant, flat=flat)
    x = seeded(3, columns).requires_grad_()
    bias = seeded(6).requires_grad_()
    cases = {
        "quantize_nf4": (w, q.levels, 64),
        "dequantize_nf4": (*coded(q), 6 * columns if flat else columns, 64, torch.bfloat16),
        "linear_nf4": (x, *coded(q), bias, 6, 64),
        "linear_nf4_grad": (seeded(3, 6), *coded(q), columns, 64),
    }
    for name, arguments in cases.items():
        results = torch.library.opcheck(getattr(torch.ops.qlite, name).default, arguments)
        assert set(results.values()) == {"SUCCESS"}, (name, results)


def test_int8_ops_pass_opcheck():
    q = qlite.quantize_int8(seeded(6, 33))
    x, bias = seeded(3, 33).requires_grad_(), seeded(6).requires_grad_()
    for name, arguments in {
        "dequantize_int8": (q.codes, q.absmax, torch.bfloat16),
        "linear_int8": (x, q.codes, q.absmax, bias, False),
        "linear_int8_grad": (seeded(3, 6), q.codes, q.absmax),
    }.items():
        results = torch.library.opcheck(getattr(torch.ops.qlite, name).default, arguments)
        assert set(results.values()) == {"SUCCESS"}, (name, results)


def test_adamw_ops_pass_opcheck():
    n, rules = 300, flattened([AdamWRule(1e-3, 0.9, 0.999, 1e-8, 0.01, 1)] * 2)
    params, grads, avg, sq = ([seeded(n).square(), seeded(n)] for _ in range(4))
    codes = [[torch.full((n,), code, dtype=torch.uint8) for _ in range(2)] for code in (127, 0)]
    absmax = [[torch.zeros(2) for _ in range(2)] for _ in range(2)]
    for op, arguments in {
        torch.ops.qlite.adamw_8bit_: (params, grads, *codes, *absmax, rules, torch.tensor(0.5), 256),
        torch.ops.qlite.adamw_: (params, grads, avg, sq, rules, None),
    }.items():
        results = torch.library.opcheck(op.default, arguments)
        assert set(results.values()) == {"SUCCESS"}, (op, results)


@given(weights(dtypes=(torch.float32,), max_exponent=4), block_sizes, st.booleans(), st.booleans(), st.integers(0, 4))
def test_linear_nf4_and_its_gradient_equal_float64_over_the_decoded_weight(w, block_size, double_quant, flat, batch):
    q = qlite.quantize_nf4(w, block_size=block_size, double_quant=double_quant, flat=flat)
    exact = q.dequantize().double()
    x = seeded(batch, w.shape[1]).requires_grad_()
    y = ops.linear_nf4(x, q)
    # A dot product of n float32 terms errs by at most n * 2^-24 of the sum of magnitudes (n + 2 for slack).
    allowed = (w.shape[1] + 2) * 2**-24 * (x.detach().double().abs() @ exact.abs().T)
    assert bool(((y.double() - x.double() @ exact.T).abs() <= allowed).all())
    grad = seeded(*y.shape)
    (grad_x,) = torch.autograd.grad(y, x, grad)
    allowed = (w.shape[0] + 2) * 2**-24 * (grad.double().abs() @ exact.abs())
    assert bool(((grad_x.double() - grad.double() @ exact).abs() <= allowed).all())


@given(weights(dtypes=(torch.float32,), max_exponent=4, columns=st.integers(1, 300)), st.integers(0, 4))
def test_linear_int8_and_its_gradient_equal_float64_over_the_decoded_weight(w, batch):
    q = qlite.quantize_int8(w)
    exact = q.dequantize().double()
    x = seeded(batch, w.shape[1]).requires_grad_()
    y = ops.linear_int8(x, q.codes, q.absmax)
    # As above: n float32 terms err by at most n * 2^-24 of the sum of magnitudes.
    allowed = (w.shape[1] + 2) * 2**-24 * (x.detach().double().abs() @ exact.abs().T)
    assert bool(((y.double() - x.double() @ exact.T).abs() <= allowed).all())
    grad = seeded(*y.shape)
    (grad_x,) = torch.autograd.grad(y, x, grad)
    allowed = (w.shape[0] + 2) * 2**-24 * (grad.double().abs() @ exact.abs())
    assert bool(((grad_x.double() - grad.double() @ exact).abs() <= allowed).all())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [200, 48])  # of a square weight a transposed gradient has the right shape
def test_every_dtype_multiplies_the_weight_decoded_into_it_and_adds_the_bias(columns, dtype, kind):
    w, x, bias = seeded(48, columns), seeded(6, columns, dtype=dtype).requires_grad_(), seeded(48).requires_grad_()
    if kind == "nf4":
        q = qlite.quantize_nf4(w)
        y = ops.linear_nf4(x, q, bias)
    else:
        q = qlite.quantize_int8(w)
        y = ops.linear_int8(x, q.codes, q.absmax, bias)
    exact, shift = q.dequantize(dtype).double(), bias.detach().to(dtype).double()
    # The float32 terms and the bias, then two roundings to the dtype at most: of the product, and of the sum with the bias.
    roundoff = (columns + 2) * 2**-24 + torch.finfo(dtype).eps
    allowed = roundoff * (x.detach().double().abs() @ exact.abs().T + shift.abs())
    assert y.dtype == dtype and bool(((y.double() - (x.double() @ exact.T + shift)).abs() <= allowed).all())
    y.sum().backward()
    # Of y.sum() the gradient of x is the sum of the rows of the weight: 48 terms.
    allowed = (50 * 2**-24 + torch.finfo(dtype).eps) * exact.abs().sum(dim=0)
    assert x.grad.dtype == dtype and bool(((x.grad.double() - exact.sum(dim=0)).abs() <= allowed).all())
    assert bias.grad.dtype == torch.float32 and torch.equal(bias.grad, torch.full((48,), 6.0))


HALVES = [torch.float16, torch.bfloat16]


def int8_parts(columns=200, out=48):
    q = qlite.quantize_int8(seeded(out, columns))
    return q.codes, q.absmax


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", [(64, 200), (65, 200), (4, 16, 200), (5, 13, 200), (200,)])
def test_from_65_rows_of_16_bits_on_linear_int8_encodes_its_activations(shape, dtype):
    x, bias = seeded(*shape, dtype=dtype), seeded(48)
    dynamic = len(shape) > 1 and dtype != torch.float32 and shape in ((65, 200), (5, 13, 200))
    expected = (int8.linear_dynamic if dynamic else int8.linear_weight_only)(x, *int8_parts(), bias)
    other = (int8.linear_weight_only if dynamic else int8.linear_dynamic)(x, *int8_parts(), bias)
    y = ops.linear_int8(x, *int8_parts(), bias)
    assert torch.equal(y, expected) and not torch.equal(y, other)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [64, 65])
def test_the_derivatives_of_linear_int8_are_those_of_the_decoded_weight_however_it_multiplies(rows, dtype):
    codes, absmax = int8_parts()
    x, v, grad = (
        seeded(rows, 200, dtype=dtype).requires_grad_(),
        seeded(rows, 200, dtype=dtype) * 2,
        seeded(rows, 48, dtype=dtype),
    )
    weight = ops.dequantize_int8_rows(codes, absmax, dtype)
    (grad_x,) = torch.autograd.grad(ops.linear_int8(x, codes, absmax), x, grad)
    assert torch.equal(grad_x, grad @ weight)
    (grad_x,) = torch.func.vjp(lambda x: ops.linear_int8(x, codes, absmax), x.detach())[1](grad)
    assert torch.equal(grad_x, grad @ weight)
    y, tangent = torch.func.jvp(lambda x: ops.linear_int8(x, codes, absmax), (x.detach(),), (v,))
    assert torch.equal(y, ops.linear_int8(x, codes, absmax))
    assert torch.equal(tangent, torch.nn.functional.linear(v, weight))
    upstream = grad.clone().requires_grad_()
    (grad_x,) = torch.autograd.grad(ops.linear_int8(x, codes, absmax), x, upstream, create_graph=True)
    assert torch.equal(torch.autograd.grad(grad_x, upstream, v)[0], torch.nn.functional.linear(v, weight))


def test_what_vmap_maps_is_multiplied_as_each_example_would_be():
    codes, absmax = int8_parts()
    for shape in ((70, 200), (2, 70, 200), (70, 2, 200)):
        x = seeded(*shape, dtype=torch.bfloat16)
        found = torch.func.vmap(lambda each: ops.linear_int8(each, codes, absmax))(x)
        rule = int8.linear_dynamic if shape == (2, 70, 200) else int8.linear_weight_only
        assert torch.equal(found, rule(x, codes, absmax, None))
        assert torch.equal(found[1], ops.linear_int8(x[1], codes, absmax))


def test_linear_int8_compiles_to_one_graph_on_either_side_of_the_rule():
    codes, absmax = int8_parts()

    def run(x):
        return ops.linear_int8(x, codes, absmax, torch.ones(48)) * 2

    compiled = torch.compile(run, fullgraph=True)
    for rows in (2, 64, 65, 100):
        a, b = (seeded(rows, 200, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
        y = compiled(b)
        assert torch.equal(run(a), y)
        run(a).float().sum().backward()
        y.float().sum().backward()
        assert torch.equal(a.grad, b.grad)


def test_the_gradient_of_a_dynamic_product_keeps_the_encoded_weight_alone():
    codes, absmax = int8_parts()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.linear_int8(seeded(70, 200, dtype=torch.float16).requires_grad_(), codes, absmax)
    assert kept and sum(t.nbytes for t in kept) == codes.nbytes + absmax.nbytes


def test_gradients_pass_gradcheck():
    q4, q8 = qlite.quantize_nf4(seeded(5, 64)), qlite.quantize_int8(seeded(5, 9))
    x4, x8, bias = (t.double().requires_grad_() for t in (seeded(2, 64), seeded(2, 9), seeded(5)))
    assert torch.autograd.gradcheck(lambda x, b: ops.linear_nf4(x, q4, b), (x4, bias))
    assert torch.autograd.gradcheck(lambda x, b: ops.linear_int8(x, q8.codes, q8.absmax, b), (x8, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_autograd_keeps_the_encoded_weight_alone(dtype):
    q = qlite.quantize_nf4(seeded(64, 128, dtype=dtype))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.linear_nf4(seeded(2, 128, dtype=dtype).requires_grad_(), q)
    assert y.dtype == dtype and kept
    assert sum(t.numel() * t.element_size() for t in kept) == q.nbytes + 16 * 4


@pytest.mark.parametrize("leading", [(), (0,), (1,), (2, 3), (2, 0, 3)])
def test_any_leading_dimensions_go_through(leading):
    q = qlite.quantize_nf4(seeded(5, 64))
    x = seeded(*leading, 64).requires_grad_()
    y = ops.linear_nf4(x, q, torch.ones(5))
    y.sum().backward()
    assert y.shape == (*leading, 5) and x.grad.shape == x.shape


def test_a_one_hot_input_reads_a_column_of_the_decoded_weight_exactly():
    q = qlite.quantize_nf4(seeded(7, 96))
    assert torch.equal(ops.linear_nf4(torch.eye(96), q), q.dequantize().T)


def test_autocast_decides_the_dtype_as_it_does_for_a_dense_layer():
    q = qlite.quantize_nf4(seeded(5, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear_nf4(seeded(2, 64), q).dtype == torch.bfloat16
        assert torch.nn.functional.linear(seeded(2, 64), q.dequantize()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_under_autocast_the_fake_result_has_the_dtype_of_the_real_one(kind):
    nf4_weight, int8_weight, x = qlite.quantize_nf4(seeded(5, 64)), qlite.quantize_int8(seeded(5, 64)), seeded(2, 64)
    with FakeTensorMode() as mode, torch.autocast("cpu", dtype=torch.bfloat16):
        fake = mode.from_tensor
        if kind == "nf4":
            parts = {name: fake(getattr(nf4_weight, name)) for name in ("codes", "absmax", "absmax_scale", "absmax_offset")}
            y = ops.linear_nf4(fake(x), dataclasses.replace(nf4_weight, **parts, levels=fake(nf4_weight.levels)))
        else:
            y = ops.linear_int8(fake(x), fake(int8_weight.codes), fake(int8_weight.absmax))
    assert y.dtype == torch.bfloat16 and y.shape == (2, 5)


@pytest.mark.parametrize("flat", [False, True])
def test_compiles_to_one_graph_with_equal_numbers_and_gradients(flat):
    q = qlite.quantize_nf4(seeded(32, 70), flat=flat)

    def run(x):
        return torch.nn.functional.gelu(ops.linear_nf4(x, q, torch.ones(32))).sum()

    compiled = torch.compile(run, fullgraph=True)
    for rows in (2, 5):  # the second shape must not need another graph break either
        a, b = seeded(rows, 70).requires_grad_(), seeded(rows, 70).requires_grad_()
        run(a).backward()
        compiled(b).backward()
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda q: ops.linear_nf4(torch.ones(2, 63), q), ValueError, r"wanted \(..., 64\)"),
        (lambda q: ops.linear_nf4(torch.tensor(1.0), q), ValueError, r"wanted \(..., 64\)"),
        (lambda q: ops.linear_nf4(torch.ones(2, 64, dtype=torch.int64), q), TypeError, "floating-point"),
        (lambda q: ops.linear_nf4(torch.ones(2, 64), qlite.quantize_nf4(torch.ones(64))), ValueError, "out_features"),
        (
            lambda q: ops.linear_nf4(torch.ones(2, 64), dataclasses.replace(q, codes=q.codes[:2], absmax=q.absmax[:2])),
            ValueError,
            "2 rows of codes for a weight of 5; wanted as many, or 1",
        ),
        (lambda q: ops.linear_nf4(torch.ones(2, 64, device="meta"), q), ValueError, "x is on meta, the weight on cpu"),
        (lambda q: ops.linear_int8(torch.ones(2), q.codes, torch.ones(5), None), ValueError, r"wanted \(5, 1\)"),
        (
            lambda q: ops.linear_int8(torch.ones(2, 3), torch.ones(5, 3, device="meta").char(), torch.ones(5, 1), None),
            ValueError,
            "x is on cpu, the weight on meta",
        ),
    ],
)
def test_bad_arguments_are_refused_before_any_work(call, error, words):
    with pytest.raises(error, match=words):
        call(qlite.quantize_nf4(seeded(5, 64)))


@pytest.mark.parametrize(
    "damage",
    [
        lambda q: (q.codes[:, :-1], *coded(q)[1:]),
        lambda q: (q.codes, q.absmax[:, :0], *coded(q)[2:]),
        lambda q: (q.codes, q.absmax, q.absmax_scale[:0], *coded(q)[3:]),
        lambda q: (q.codes, q.absmax, q.absmax_scale, None, q.levels),
        lambda q: (*coded(q)[:4], q.levels[:8]),
    ],
)
def test_parts_that_do_not_belong_together_never_reach_a_kernel(damage):
    q = qlite.quantize_nf4(seeded(5, 128))
    with pytest.raises(ValueError, match="do not belong together"):
        torch.ops.qlite.dequantize_nf4(*damage(q), 128, 64, torch.float32)


def test_levels_are_the_default_table():
    assert qlite.quantize_nf4(torch.ones(1, 64)).levels.tolist() == list(NF4_LEVELS)


FLAT = functools.partial(qlite.quantize_nf4, flat=True)


# Bytes a weight that are kept: int8 is joined from its parts.
@pytest.mark.parametrize(("encode", "kept"), [(qlite.quantize_nf4, 0.6), (FLAT, 0.6), (qlite.quantize_int8, 2.1)])
def test_encoding_on_the_cpu_takes_no_more_than_a_chunk_beside_its_result(encode, kept):
    dense = seeded(4096, 4096, dtype=torch.bfloat16)
    # What torch's allocator was asked for, to the byte: the size of the process depends on what malloc gives back, and when.
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profiler:
        encoded = encode(dense)
    taken = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    peak, left = max(itertools.accumulate(taken)), sum(taken)
    assert left >= encoded.codes.numel() >= dense.numel() / 2
    # Measured: 27 MB and 34 MB, of which chunks are 18 and 0; without chunks 286 MB and 268 MB.
    assert peak <= kept * dense.numel() + 24 * nf4.CHUNK


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_call_that_nobody_differentiates_is_the_op_alone(mode, monkeypatch):
    q, x = qlite.quantize_nf4(seeded(8, 64)), seeded(2, 64)
    expected = ops.linear_nf4(x, q)
    monkeypatch.setattr(torch.autograd.Function, "apply", lambda *arguments: pytest.fail("an autograd.Function"))
    with mode():
        assert torch.equal(ops.linear_nf4(x, q), expected)

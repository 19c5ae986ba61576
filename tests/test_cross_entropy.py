"""The loss of an output layer, chunk by chunk, held against float64 and against the whole."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qlite
from qlite import cross_entropy
from qlite.cross_entropy import linear_cross_entropy

DTYPES = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


@contextlib.contextmanager
def chunks_of(logits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CHUNK", logits)
        yield


def whole(hidden, head, targets):
    return nn.functional.cross_entropy(head(hidden), targets, reduction="sum")


def example(n, columns, vocabulary, dtype, *, spread=1.0, seed=0):
    """A hidden matrix, a head without gradient, and targets; everything is a number of `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(columns, vocabulary, bias=False).requires_grad_(False)
    head.weight.copy_(torch.randn(vocabulary, columns, generator=generator))
    hidden = (spread * torch.randn(n, columns, generator=generator)).to(dtype)
    return hidden.requires_grad_(), head.to(dtype), torch.randint(vocabulary, (n,), generator=generator)


@given(
    n=st.integers(0, 9), columns=st.integers(1, 40), vocabulary=st.integers(1, 70), rows=st.integers(1, 10),
    dtype=st.sampled_from(sorted(DTYPES, key=str)), spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_loss_and_gradient_are_those_of_float64(n, columns, vocabulary, rows, dtype, spread, seed):
    hidden, head, targets = example(n, columns, vocabulary, dtype, spread=spread, seed=seed)
    with chunks_of(rows * vocabulary):
        loss = linear_cross_entropy(hidden, head, targets)
    (0.5 * loss).backward()

    # The logits of a 16-bit head are rounded before the loss sees them. Rounding is no part of this function.
    logits = head(hidden.detach()).double()
    exact = nn.functional.cross_entropy(logits, targets, reduction="sum")
    d_logits = (logits.softmax(-1) - nn.functional.one_hot(targets, vocabulary)) * 0.5
    weight = head.weight.double()
    wanted = d_logits @ weight

    u = DTYPES[dtype]
    assert loss.dtype == torch.float32 and loss.shape == () and hidden.grad.dtype == dtype
    # A row's loss is a float32 difference of the largest logit, the target's and a logarithm: each rounds once; and exp takes
    # a difference of logits rounded to float32. The sum adds one rounding a row.
    size = logits.abs().sum(-1).max().item() if n else 0.0
    assert (loss - exact).abs() <= 2.0**-22 * (n + 1) * n * (size + vocabulary + 1)
    # softmax minus one-hot, rounded to the dtype, times the weight, rounded, times 0.5, which is exact; sums of float32. An
    # exponent of up to 2 size, rounded to float32, moves a probability by as much. Below 2^-14 float16 has spacing 2^-25:
    # 256 times less in the gradient of logits, which is scaled, and as it is in the result.
    magnitudes = d_logits.abs() @ weight.abs()
    bound = (2 * u + 2.0**-23 * (2 * size + vocabulary + 8)) * (magnitudes + weight.abs().sum(0) * 2.0**-20)
    assert ((hidden.grad - wanted).abs() <= bound + 2.0**-24).all()


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_gradcheck_in_float64_of_hidden_and_of_a_trained_head(rows):
    head = nn.Linear(5, 11).double()
    hidden, targets = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randint(11, (7,))
    with chunks_of(rows * 11):
        assert torch.autograd.gradcheck(
            lambda x, w, b: linear_cross_entropy(x, head, targets), (hidden, head.weight, head.bias)
        )


def test_chunks_are_of_so_many_rows_and_the_head_sees_each_once():
    hidden, head, targets = example(10, 4, 6, torch.float32)
    seen = []
    head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    with chunks_of(4 * 6 + 5):
        linear_cross_entropy(hidden, head, targets).backward()
    assert seen == [(4, 6), (4, 6), (2, 6)]
    with chunks_of(1):  # fewer than a row's
        linear_cross_entropy(hidden[:2], head, targets[:2])
    assert seen[3:] == [(1, 6), (1, 6)]


def heads():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(96, 64, generator=generator)
    adapted = qlite.LoRALinear(qlite.Linear4bit(64, 96).quantize_(dense), qlite.LoRAConfig(r=4, dropout=0.0))
    nn.init.normal_(adapted.lora_B)
    return {
        "dense, trained": nn.Linear(64, 96),
        "dense": nn.Linear(64, 96).requires_grad_(False),
        "4 bits": qlite.Linear4bit(64, 96).quantize_(dense),
        "8 bits": qlite.Linear8bit(64, 96).quantize_(dense),
        "LoRA on 4 bits": adapted,
    }


@pytest.mark.parametrize("kind", heads())
@pytest.mark.parametrize("frozen_hidden", [False, True])
def test_any_head_gets_the_gradients_of_the_whole_product(kind, frozen_hidden):
    head, hidden, targets = heads()[kind], torch.randn(9, 64), torch.randint(96, (9,))
    hidden.requires_grad_(not frozen_hidden)
    sources = [t for t in (hidden, *head.parameters()) if t.requires_grad]
    with chunks_of(2 * 96):
        found = linear_cross_entropy(hidden, head, targets)
    wanted = whole(hidden, head, targets)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert found.requires_grad == bool(sources)
    if sources:
        # Sums of up to 96 float32 products in another order: 96 * 2^-24 is 6e-6.
        for one, other in zip(torch.autograd.grad(found, sources), torch.autograd.grad(wanted, sources), strict=True):
            assert (one - other).norm() <= 6e-6 * other.norm()


def test_a_loss_that_nobody_differentiates_costs_no_gradient(monkeypatch):
    hidden, head, targets = example(5, 4, 6, torch.bfloat16)
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: pytest.fail("a gradient"))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not linear_cross_entropy(hidden, head, targets).requires_grad


def test_a_graph_that_is_kept_gives_the_same_gradient_again():
    hidden, head, targets = example(5, 4, 6, torch.float32)
    loss = linear_cross_entropy(hidden, head, targets)
    first, second = (torch.autograd.grad(3 * loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.abs().sum() > 0


def test_a_second_derivative_is_refused():
    hidden, head, targets = example(5, 4, 6, torch.float32)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: it has no second derivative"):
        torch.autograd.grad(linear_cross_entropy(hidden, head, targets), hidden, create_graph=True)


def test_a_small_float16_gradient_is_not_lost_before_the_loss_scale():
    # The target is all but certain: 32 others have probabilities of e^-19, 5.6e-9, of which float16 keeps nothing.
    head = nn.Linear(2, 33, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[20.0, 0.0], *([[0.0, 1.0]] * 32)]))
    assert torch.tensor(5.6e-9).half() == 0
    hidden, exact = (torch.ones(1, 2, dtype=dtype, requires_grad=True) for dtype in (torch.float16, torch.float64))
    (2.0**16 * whole(exact, head.double(), torch.tensor([0]))).backward()
    (2.0**16 * linear_cross_entropy(hidden, head.half(), torch.tensor([0]))).backward()
    # 32 roundings of a gradient of logits, 2^-25 / 256 each, and one of their sum; the loss scale multiplies both.
    assert exact.grad[0, 1] > 0.01 and (hidden.grad - exact.grad)[0, 1].abs() <= 33 * 2.0**-25 / 256 * 2.0**16


def test_logits_that_overflow_make_a_loss_that_is_not_finite():
    head = nn.Linear(1, 3, bias=False, dtype=torch.float16).requires_grad_(False)
    head.weight.fill_(60000.0)
    assert not linear_cross_entropy(torch.full((1, 1), 2.0, dtype=torch.float16), head, torch.tensor([0])).isfinite()


def test_autocast_multiplies_in_its_dtype_and_keeps_float32_statistics():
    head, hidden, targets = nn.Linear(64, 96), torch.randn(9, 64, requires_grad=True), torch.randint(96, (9,))
    with torch.autocast("cpu", torch.bfloat16), chunks_of(2 * 96):
        loss = linear_cross_entropy(hidden, head, targets)
        wanted = nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")
    loss.backward()
    assert loss.dtype == hidden.grad.dtype == head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str))
def test_memory_is_the_gradient_of_hidden_and_a_chunk(dtype):
    """What torch's allocator is asked for, against logits that are whole."""
    n, columns, vocabulary, rows = 512, 8, 4096, 32
    hidden, head, targets = example(n, columns, vocabulary, dtype)

    def peak_of(call):
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profiler:
            call()
        taken = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        return max(itertools.accumulate(taken))

    with chunks_of(rows * vocabulary):
        peak = peak_of(lambda: linear_cross_entropy(hidden, head, targets).backward())
    # 8 bytes a logit: 4 of its exponential and, in float32, 4 of its own, or 2 and 2 of its gradient in 16 bits, for which
    # PyTorch makes a float32 copy first on the CPU: 10.
    chunk = (8 if dtype == torch.float32 else 10) * rows * vocabulary
    # Beside it the gradient of hidden, in its dtype, scaled in float32 and rounded, at most 10 bytes an element; and what the
    # CPU's product makes of the weight, 4 at most.
    assert chunk <= peak <= 1.02 * chunk + 10 * n * columns + 4 * vocabulary * columns
    assert peak_of(lambda: whole(hidden, head, targets).backward()) >= n * vocabulary * 2 * hidden.itemsize > 2 * peak


@pytest.mark.parametrize(
    ("hidden", "targets"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.int64)),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int32)),
    ],
)
def test_a_wrong_shape_or_dtype_is_named(hidden, targets):
    with pytest.raises(ValueError, match=r"hidden has shape .* wanted \(n, in_features\) and int64 \(n,\)"):
        linear_cross_entropy(hidden, nn.Linear(4, 5), targets)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_the_loss_of_a_chunk_takes_a_chunk_of_memory_and_no_synchronisation(dtype):
    n, columns, vocabulary = 1024, 256, 65024
    hidden, head, targets = (t.cuda() for t in example(n, columns, vocabulary, dtype))
    hidden = hidden.detach().requires_grad_()
    linear_cross_entropy(hidden, head, targets).backward()
    hidden.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        torch.cuda.set_sync_debug_mode("error")
        linear_cross_entropy(hidden, head, targets).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # 8 bytes a logit, the gradient of hidden, and 2 MiB for each large block that the allocator rounds up.
    assert torch.cuda.max_memory_allocated() - before <= 8 * cross_entropy.CHUNK + 10 * n * columns + 4 * 2**21


@pytest.mark.parametrize("reach", [1.0, 0.01])
def test_the_gradient_of_a_trained_float16_head_does_not_overflow(reach):
    hidden, head, _ = example(600, 8, 20, torch.float16)
    hidden = (hidden.detach().abs() * reach).requires_grad_()
    head.requires_grad_(True)
    targets = torch.full((600,), 3)
    (linear_cross_entropy(hidden, head, targets) / 600).backward()
    found = head.weight.grad.double()
    head.weight.grad = None
    exact = nn.Linear(8, 20, bias=False).double()
    exact.weight.data = head.weight.detach().double()
    nn.functional.cross_entropy(exact(hidden.detach().double()), targets).backward()
    # 16-bit logits and sums over chunks of 16-bit gradients.
    assert found.isfinite().all() and (found - exact.weight.grad).norm() <= 0.02 * exact.weight.grad.norm()

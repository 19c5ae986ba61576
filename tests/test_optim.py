"""AdamW with encoded moments: what it equals, what it stays close to, and what it must never do."""

import copy
import gc
import json
import math
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import Parameter

from qlite import adamw_8bit, optim, paging
from qlite.adamw_8bit import AdamWRule
from qlite.dynamic8 import dequantize_dynamic8, quantize_dynamic8
from qlite.optim import AdamW8bit, PagedAdamW8bit

LR = 1e-3
# Half of the widest gap between two levels, relative to absmax (tests/test_dynamic8.py derives them), and the float32
# roundings around it.
HALF_GAP_SIGNED = 0.007031261920928955 * (1 + 2**-10)
HALF_GAP_UNSIGNED = 0.0035156607627868652 * (1 + 2**-10)
both = pytest.mark.parametrize("kind", [AdamW8bit, PagedAdamW8bit])
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
seeds = st.integers(0, 2**32)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(steps: int, *shapes: tuple[int, ...], seed: int = 0) -> list[list[torch.Tensor]]:
    source = generator(seed)
    return [[torch.randn(shape, generator=source) for shape in shapes] for _ in range(steps)]


def advance(optimizer: torch.optim.Optimizer, steps: list[list[torch.Tensor]]) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for grads in steps:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(param.device, param.dtype)
        optimizer.step()


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]


def assert_same_bits(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    for a, b in zip(params_of(one), params_of(other), strict=True):
        assert a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    one_state, other_state = one.state_dict()["state"], other.state_dict()["state"]
    assert one_state.keys() == other_state.keys()
    for index, entry in one_state.items():
        assert entry.keys() == other_state[index].keys()
        for name, value in entry.items():
            twin = other_state[index][name]
            if name == "step":
                assert value == twin
            else:
                assert value.dtype == twin.dtype and torch.equal(value.cpu(), twin.cpu()), name


def largest_moves(optimizer: torch.optim.Optimizer, param: Parameter, grads) -> torch.Tensor:
    """For each step the largest move of an element, in learning rates."""
    moves = []
    for grad in grads:
        before = param.detach().clone()
        param.grad = grad
        optimizer.step()
        moves.append((param.detach() - before).abs().max() / optimizer.param_groups[0]["lr"])
    return torch.stack(moves)


# What it equals and what it stays close to.


@both
@pytest.mark.parametrize(("size", "min_8bit_size"), [(1000, 4096), (8192, 10_000), (1, 4096)])
def test_float32_moments_give_the_parameters_of_torch_adamw(kind, size, min_8bit_size):
    start, steps = torch.randn(size, generator=generator(1)), gradients(40, (size,))
    ours = kind([Parameter(start.clone())], lr=LR, weight_decay=0.1, min_8bit_size=min_8bit_size)
    peer = torch.optim.AdamW([Parameter(start.clone())], lr=LR, weight_decay=0.1)
    advance(ours, steps)
    advance(peer, steps)
    # The same operations, grouped otherwise: a few float32 roundings a step.
    torch.testing.assert_close(params_of(ours), params_of(peer), atol=1e-6, rtol=1e-5)


def drift_bound(start: torch.Tensor, steps: list[torch.Tensor], *, eps: float = 1e-8) -> torch.Tensor:
    """What encoding can have moved the parameters away from exact AdamW after these gradients, element by element.

    Errors of the stored moments are carried as intervals: half the widest gap of their table times the block's absmax at
    each encoding, shrunk by beta at each step. The error of a move follows from the lowest second moment in its interval.
    """
    b1, b2 = 0.9, 0.999
    m, v, e_m, e_v, bound = (torch.zeros(start.shape, dtype=torch.float64) for _ in range(5))
    for t, grad in enumerate(steps, start=1):
        g = grad.double()
        m, v, e_m, e_v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g, b1 * e_m, b2 * e_v
        c1, c2 = 1 - b1**t, math.sqrt(1 - b2**t)
        slow, fast = v.sqrt() / c2 + eps, (v - e_v).clamp(min=0).sqrt() / c2 + eps
        move = m.abs() / c1 / slow
        bound += LR * (e_m / c1 / fast + m.abs() / c1 * (1 / fast - 1 / slow) + 2**-20 * move)
        bound += 2**-23 * (start.abs() + LR * t)  # the parameter's own rounding
        for error, moment, half_gap in ((e_m, m, HALF_GAP_SIGNED), (e_v, v, HALF_GAP_UNSIGNED)):
            absmax = (moment.abs() + error).view(-1, 256).amax(dim=1)
            error += half_gap * absmax.repeat_interleave(256)
    return bound


def drift_problem():
    source = generator(5)
    signs = torch.randint(0, 2, (4096,), generator=source) * 2 - 1
    steps = [signs * (torch.rand(4096, generator=source) / 2 + 0.5) for _ in range(10)]
    return torch.randn(4096, generator=source), steps


@pytest.mark.parametrize("count", range(1, 11))
@both
def test_encoded_moments_drift_from_torch_adamw_by_no_more_than_their_rounding_allows(kind, count):
    start, steps = drift_problem()
    ours = kind([Parameter(start.clone())], lr=LR)
    peer = torch.optim.AdamW([Parameter(start.double())], lr=LR)
    advance(ours, [[grad] for grad in steps[:count]])
    advance(peer, [[grad] for grad in steps[:count]])
    drift = (params_of(ours)[0].double() - params_of(peer)[0]).abs()
    assert bool((drift <= drift_bound(start, steps[:count])).all())


def test_a_step_one_percent_too_long_breaks_the_drift_bound():
    start, steps = drift_problem()
    ours = AdamW8bit([Parameter(start.clone())], lr=LR * 1.01)
    peer = torch.optim.AdamW([Parameter(start.double())], lr=LR)
    advance(ours, [[steps[0]]])
    advance(peer, [[steps[0]]])
    drift = (params_of(ours)[0].double() - params_of(peer)[0]).abs()
    assert bool((drift > drift_bound(start, steps[:1])).any())


@pytest.mark.parametrize(("noise", "rms", "most"), [(0.0, 0.1, 4.0), (0.1, 5.5, 50.0)])
def test_on_a_quadratic_the_run_stays_within_a_few_learning_rates_of_adamw(noise, rms, most):
    source, lr = generator(0), 1e-2
    curvature = 10 ** (torch.rand(4096, generator=source) * 2 - 1)
    start = torch.randn(4096, generator=source)
    ours, peer = AdamW8bit([Parameter(start.clone())], lr=lr), torch.optim.AdamW([Parameter(start.clone())], lr=lr)
    ratio = None
    for step in range(1000):
        disturbance = noise * torch.randn(4096, generator=source)
        losses = []
        for optimizer in (ours, peer):
            param = optimizer.param_groups[0]["params"][0]
            losses.append((curvature * param.detach() ** 2).sum().item())
            param.grad = curvature * param.detach() + disturbance
            optimizer.step()
        if step == 200:
            ratio = losses[0] / losses[1]
    drift = (params_of(ours)[0] - params_of(peer)[0]) / lr
    # Measured over four seeds: rms 0.02 to 0.03 and 2.5 to 2.7, largest 0.7 to 1.7 and 20 to 25, ratio of the losses at
    # most 1.05; about twice that is allowed.
    assert ratio is not None and ratio <= 1.1
    assert drift.square().mean().sqrt() <= rms and drift.abs().max() <= most


# How far one step may go.


def regression(make, scale: float, steps: int = 300) -> tuple[float, float]:
    """A rank-8 regression, 4 of its 1,024 features scaled: the largest move in learning rates, the final loss."""
    source = generator(0)
    start, target = torch.randn(2, 8, 1024, generator=source) / 32
    param, gain = Parameter(start.clone()), torch.ones(1024)
    gain[:4] = scale
    optimizer = make([param], lr=LR, weight_decay=0.0)
    largest, losses = 0.0, []
    for _ in range(steps):
        x = torch.randn(64, 1024, generator=source) * gain
        loss = (x @ (param - target).t()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        before = param.detach().clone()
        optimizer.step()
        largest = max(largest, ((param.detach() - before).abs().max() / LR).item())
        losses.append(loss.item())
    return largest, sum(losses[-20:]) / 20


@pytest.mark.parametrize("scale", [1, 20, 100, 400])
def test_features_hundreds_of_times_the_others_leave_steps_short_and_the_loss_that_of_adamw(scale):
    largest, loss = regression(AdamW8bit, scale)
    assert largest <= 2.5  # measured: 1.03, 1.44, 1.74, 1.23
    assert loss <= 1.1 * regression(torch.optim.AdamW, scale)[1]  # measured: 1.01, 0.93, 0.99, 1.05


def test_without_the_rule_that_no_second_moment_becomes_zero_the_same_regression_explodes(monkeypatch):
    def nearest(x, **options):
        return quantize_dynamic8(x, **{**options, "never_zero": False})

    monkeypatch.setattr(adamw_8bit, "quantize_dynamic8", nearest)
    monkeypatch.setattr(AdamWRule, "bound", lambda self: math.inf)
    largest, loss = regression(AdamW8bit, 400)
    assert largest > 1000 and loss > 10 * regression(torch.optim.AdamW, 400)[1]  # measured: 5.6e6 lr, loss 3.9e6


def wild_gradients(seed: int, steps: int = 60) -> list[torch.Tensor]:
    """Sparse, bursting, with magnitudes up to 10^12 apart inside one block, some coordinates waking up late."""
    chance, source = random.Random(seed), generator(seed)
    density, span = chance.choice((0.003, 0.03, 0.3, 1.0)), chance.choice((0, 6, 12))
    scale = 10 ** ((torch.rand(1024, generator=source) - 0.5) * span)
    wake = torch.randint(0, steps, (1024,), generator=source) * (torch.rand(1024, generator=source) < 0.5)
    steady = torch.rand(1024, generator=source) < 0.2
    grads = []
    for step in range(steps):
        values = torch.where(steady, 1.0, torch.randn(1024, generator=source))
        present = (torch.rand(1024, generator=source) < density) | steady
        grads.append(values * scale * (present & (wake <= step)))
    return grads


@given(seeds)
def test_no_sequence_of_gradients_moves_an_element_by_more_than_eight_learning_rates(seed):
    param = Parameter(torch.zeros(1024))
    optimizer = AdamW8bit([param], lr=LR, weight_decay=0.0, min_8bit_size=0)
    assert largest_moves(optimizer, param, wild_gradients(seed)).max() <= 8


def late_beside_large() -> list[torch.Tensor]:
    """A coordinate that wakes up after 1,500 steps, its gradient 0.012 of its neighbours' and steady."""
    quiet, awake = torch.ones(256), torch.ones(256)
    quiet[0], awake[0] = 0.0, 0.012
    return [quiet] * 1500 + [awake] * 60


def test_a_coordinate_that_wakes_up_late_beside_large_neighbours_does_not_leap():
    param = Parameter(torch.zeros(256))
    optimizer = AdamW8bit([param], lr=LR, weight_decay=0.0, min_8bit_size=0)
    # 7.27 is the limit for exact moments (AdamWRule.bound); the parameter's own rounding is far below the rest.
    assert largest_moves(optimizer, param, late_beside_large()).max() <= 7.3


def test_without_the_bound_the_same_coordinate_leaps(monkeypatch):
    monkeypatch.setattr(AdamWRule, "bound", lambda self: math.inf)
    param = Parameter(torch.zeros(256))
    optimizer = AdamW8bit([param], lr=LR, weight_decay=0.0, min_8bit_size=0)
    assert largest_moves(optimizer, param, late_beside_large()).max() > 12  # measured: 13.97


@given(seeds, st.sampled_from([(0.9, 0.999), (0.9, 0.95), (0.0, 0.9), (0.5, 0.5), (0.95, 0.9999)]))
def test_exact_moments_never_reach_the_bound(seed, betas):
    beta1, beta2 = betas
    m, v = torch.zeros(2, 1024, dtype=torch.float64)
    for step, grad in enumerate(wild_gradients(seed, 40), start=1):
        rule = AdamWRule(LR, beta1, beta2, 0.0, 0.0, step)
        m, v = rule.moments(grad.double(), m, v)
        corrected = (v / (1 - beta2**step)).sqrt()
        assert bool((m.abs() <= rule.bound() * corrected).all())


@pytest.mark.parametrize(("betas", "step"), [((0.9, 0.999), 1), ((0.9, 0.999), 50), ((0.9, 0.999), 5000), ((0.5, 0.9), 7)])
def test_the_bound_is_what_the_worst_sequence_of_gradients_attains(betas, step):
    beta1, beta2 = betas
    rule = AdamWRule(LR, beta1, beta2, 0.0, 0.0, step)
    m = v = 0.0
    for k in range(step):  # the case of equality in Cauchy-Schwarz: each gradient beta2 / beta1 times the one before
        g = (beta1 / beta2) ** (step - 1 - k)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    assert rule.bound() / (1 + 2**-10) == pytest.approx(m / math.sqrt(v / (1 - beta2**step)), rel=1e-9)


def test_where_no_bound_exists_none_is_applied():
    assert AdamWRule(LR, 0.9, 0.81, 1e-8, 0.0, 5000).bound() == math.inf
    assert AdamWRule(LR, 0.9, 0.5, 1e-8, 0.0, 5000).bound() == math.inf
    assert AdamWRule(LR, 0.9, 0.0, 1e-8, 0.0, 5000).bound() == math.inf


@given(seeds)
def test_a_first_step_moves_no_element_by_more_than_the_learning_rate(seed):
    param = Parameter(torch.zeros(1024))
    optimizer = AdamW8bit([param], lr=LR, weight_decay=0.0, min_8bit_size=0)
    assert largest_moves(optimizer, param, wild_gradients(seed, 1)).max() <= 1 + 2**-10


# Properties of the encoded state.


@given(seeds)
def test_coordinates_without_a_gradient_never_move(seed):
    still = torch.rand(1024, generator=generator(seed)) < 0.3
    start = torch.randn(1024, generator=generator(seed + 1))
    optimizer = AdamW8bit([Parameter(start.clone())], lr=LR, weight_decay=0.0, min_8bit_size=0)
    advance(optimizer, [[grad.masked_fill(still, 0.0)] for grad in wild_gradients(seed, 30)])
    assert torch.equal(params_of(optimizer)[0][still], start[still])


@given(seeds)
def test_a_second_moment_above_zero_is_stored_above_zero(seed):
    param = Parameter(torch.zeros(1024))
    optimizer = AdamW8bit([param], lr=LR, min_8bit_size=0)
    touched = torch.zeros(1024, dtype=torch.bool)
    for grad in wild_gradients(seed, 20):
        advance(optimizer, [[grad]])
        touched |= grad * grad > 0
        state = optimizer.state[param]
        assert bool((state["exp_avg_sq"][touched] > 0).all()) and not state["exp_avg_sq"][~touched].any()


@given(seeds)
def test_stored_moments_are_within_half_a_gap_of_those_computed(seed):
    param = Parameter(torch.zeros(1024))
    optimizer = AdamW8bit([param], lr=LR, min_8bit_size=0)
    grads = wild_gradients(seed, 6)
    advance(optimizer, [[grad] for grad in grads[:-1]])
    state = optimizer.state[param]

    def decoded():
        return [
            dequantize_dynamic8(state[name], state[f"{name}_absmax"], signed=signed)
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False))
        ]

    m, v = AdamWRule(LR, 0.9, 0.999, 1e-8, 0.0, 6).moments(grads[-1], *decoded())
    advance(optimizer, [[grads[-1]]])
    for stored, computed, half_gap in zip(decoded(), (m, v), (HALF_GAP_SIGNED, HALF_GAP_UNSIGNED), strict=True):
        absmax = computed.abs().view(-1, 256).amax(dim=1).repeat_interleave(256)
        assert bool(((stored - computed).abs() <= absmax * half_gap).all())


@given(seeds, st.integers(-20, 20))
def test_gradients_scaled_by_a_power_of_two_give_the_same_bits_without_eps(seed, exponent):
    grads = [grad + 0.0 for grad in wild_gradients(seed, 12)]
    grads = [torch.where(grad.abs() < 1e-6, 0.0, grad) for grad in grads]  # squares that stay normal when scaled
    results = []
    for factor in (1.0, 2.0**exponent):
        optimizer = AdamW8bit([Parameter(torch.ones(1024))], lr=LR, eps=0.0, min_8bit_size=0)
        advance(optimizer, [[grad * factor] for grad in grads])
        results.append(params_of(optimizer)[0])
    assert bool(results[0].isfinite().all()) and torch.equal(*results)


@both
@pytest.mark.parametrize("size", [1000, 8192])
def test_a_learning_rate_of_zero_changes_no_parameter(kind, size):
    start = torch.randn(size, generator=generator(0))
    optimizer = kind([Parameter(start.clone())], lr=0.0)
    advance(optimizer, gradients(5, (size,)))
    assert torch.equal(params_of(optimizer)[0], start)


@both
@pytest.mark.parametrize("size", [1000, 8192])
def test_gradients_of_zero_leave_only_the_decay(kind, size):
    start = torch.randn(size, generator=generator(0))
    optimizer = kind([Parameter(start.clone())], lr=0.1, weight_decay=0.5)
    advance(optimizer, [[torch.zeros(size)]] * 2)
    assert torch.equal(params_of(optimizer)[0], start * (1 - 0.05) * (1 - 0.05))


@given(seeds)
def test_one_vector_and_its_four_quarters_give_the_same_bits(seed):
    grads = wild_gradients(seed, 10)
    whole = AdamW8bit([Parameter(torch.ones(1024))], lr=LR, min_8bit_size=0)
    parts = AdamW8bit([Parameter(torch.ones(256)) for _ in range(4)], lr=LR, min_8bit_size=0)
    advance(whole, [[grad] for grad in grads])
    advance(parts, [list(grad.split(256)) for grad in grads])
    assert torch.equal(params_of(whole)[0], torch.cat(params_of(parts)))


@given(seeds)
def test_a_permutation_inside_a_block_permutes_the_result(seed):
    order = torch.randperm(256, generator=generator(seed))
    grads = [grad[:256] for grad in wild_gradients(seed, 10)]
    plain = AdamW8bit([Parameter(torch.ones(256))], lr=LR, min_8bit_size=0)
    permuted = AdamW8bit([Parameter(torch.ones(256))], lr=LR, min_8bit_size=0)
    advance(plain, [[grad] for grad in grads])
    advance(permuted, [[grad[order]] for grad in grads])
    assert torch.equal(params_of(plain)[0][order], params_of(permuted)[0])


@both
@pytest.mark.parametrize("block_size", [100, 256])
def test_the_length_of_the_chunks_changes_no_bit(kind, block_size, monkeypatch):
    start, steps = torch.randn(77, 131, generator=generator(2)), gradients(5, (77, 131))
    whole = kind([Parameter(start.clone())], lr=LR, block_size=block_size)
    advance(whole, steps)
    monkeypatch.setattr(optim, "CHUNK", 1111)
    monkeypatch.setattr(adamw_8bit, "CHUNK", 567)
    cut = kind([Parameter(start.clone())], lr=LR, block_size=block_size)
    advance(cut, steps)
    assert_same_bits(whole, cut)


def test_every_operation_of_the_update_is_rounded_as_ieee_says():
    """So that the bits do not hang on the device: numpy rounds each float32 operation to the nearest."""
    source = generator(0)
    param, m = torch.randn(2, 2**18, generator=source)
    v = torch.rand(2**18, generator=source) * 10 ** (torch.rand(2**18, generator=source) * 20 - 15)
    rule, f = AdamWRule(LR, 0.9, 0.999, 1e-8, 0.01, 7), np.float32
    root = np.sqrt(v.numpy()) * f(1 / math.sqrt(1 - 0.999**7)) + f(1e-8)
    move = (m.numpy() / root) * f(LR / (1 - 0.9**7))
    wanted = param.numpy() * f(1 - LR * 0.01) - move
    assert torch.equal(rule.updated(param, m, v), torch.from_numpy(wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_updated_in_float32_and_rounded_once(dtype):
    start, grad = torch.randn(8192, generator=generator(3)).to(dtype), torch.randn(8192, generator=generator(4)).to(dtype)
    low, high = Parameter(start.clone()), Parameter(start.float())
    advance(AdamW8bit([low], lr=LR), [[grad]])
    advance(AdamW8bit([high], lr=LR), [[grad.float()]])
    assert low.dtype == dtype and torch.equal(low.detach(), high.detach().to(dtype))


# Non-finite gradients.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("place", [0, 255, 256, 1000, 4999])
@both
def test_a_block_with_a_gradient_that_is_not_finite_is_left_alone_and_the_others_step(kind, place, bad):
    start, steps = torch.randn(5000, generator=generator(0)), gradients(4, (5000,))
    struck, spared = kind([Parameter(start.clone())], lr=LR), kind([Parameter(start.clone())], lr=LR)
    advance(struck, steps[:2])
    advance(spared, steps[:2])
    before = copy.deepcopy(struck.state_dict()["state"][0]), params_of(struck)[0]
    poisoned = steps[2][0].clone()
    poisoned[place] = bad  # the square of 1e30 is infinite in float32
    advance(struck, [[poisoned]])
    advance(spared, steps[2:3])
    blocks = torch.arange(20) == place // 256
    inside = blocks.repeat_interleave(256)[:5000]
    assert torch.equal(params_of(struck)[0], torch.where(inside, before[1], params_of(spared)[0]))
    after, other = struck.state_dict()["state"][0], spared.state_dict()["state"][0]
    for name in ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax"):
        hit = blocks if name.endswith("absmax") else inside
        assert torch.equal(after[name], torch.where(hit, before[0][name], other[name]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_small_tensors_leave_alone_the_element_whose_gradient_is_not_finite(bad):
    param = Parameter(torch.ones(10))
    optimizer = AdamW8bit([param], lr=LR)
    grad = torch.ones(10)
    grad[3] = bad
    advance(optimizer, [[grad]])
    state = optimizer.state[param]
    assert param[3] == 1 and state["exp_avg"][3] == 0 and state["exp_avg_sq"][3] == 0
    assert bool((param.detach()[torch.arange(10) != 3] < 1).all())


# The scale of the gradients.


@both
@pytest.mark.parametrize("dtype", optim.DTYPES)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_scale_multiplies_every_gradient_in_float32(kind, dtype, shape):
    scaled, plain = kind(several(dtype), lr=LR), kind(several(dtype), lr=LR)
    scaled.grad_scale = torch.full(shape, 0.3)
    for grads in gradients(3, *SHAPES):
        advance(scaled, [[grad.to(dtype) for grad in grads]])
        # The twin steps float32 copies by gradients that hold the products.
        for param, grad in zip(plain.param_groups[0]["params"], grads, strict=True):
            param.data, param.grad = param.data.float(), grad.to(dtype).float() * torch.tensor(0.3)
        plain.step()
        for param in plain.param_groups[0]["params"]:
            param.data, param.grad = param.data.to(dtype), None
    assert_same_bits(scaled, plain)


@both
def test_a_scale_that_is_not_finite_skips_the_step_and_the_next_goes_on(kind):
    params = several()
    optimizer, before = kind(params, lr=LR), [param.detach().clone() for param in params]
    optimizer.grad_scale = torch.tensor(math.inf)
    advance(optimizer, gradients(1, *SHAPES))
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    optimizer.grad_scale = None
    advance(optimizer, gradients(1, *SHAPES))
    assert all(not torch.equal(param, old) for param, old in zip(params, before, strict=True))


@both
def test_a_scale_is_no_part_of_what_is_saved(kind):
    optimizer = kind(several(), lr=LR)
    optimizer.grad_scale = torch.tensor(0.5)
    advance(optimizer, gradients(1, *SHAPES))
    assert not any("scale" in key for key in (*optimizer.state_dict(), *optimizer.state_dict()["param_groups"][0]))
    assert pickle.loads(pickle.dumps(optimizer)).grad_scale is None


@both
@pytest.mark.parametrize(
    ("scale", "error"),
    [(0.5, TypeError), (torch.tensor(0.5, dtype=torch.float64), TypeError), (torch.ones(2), ValueError)],
)
def test_a_scale_of_another_kind_is_refused_before_anything_changes(kind, scale, error):
    params = several()
    optimizer, before = kind(params, lr=LR), [param.detach().clone() for param in params]
    optimizer.grad_scale = scale
    with pytest.raises(error, match="grad_scale"):
        advance(optimizer, gradients(1, *SHAPES))
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True)) and not optimizer.state


# State: its size, its home, and its way to disk and back.


def test_the_state_takes_two_bytes_a_parameter_and_four_a_block():
    param = Parameter(torch.zeros(4544, 16))
    optimizer = AdamW8bit([param])
    advance(optimizer, gradients(1, (4544, 16)))
    state = optimizer.state[param]
    size = sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))
    assert size == 2 * 72704 + 2 * 4 * 284 and size / param.numel() == 2.03125
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == param.shape
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
    assert state["exp_avg_absmax"].dtype == state["exp_avg_sq_absmax"].dtype == torch.float32


@pytest.mark.parametrize(("size", "dtype"), [(4095, torch.float32), (4096, torch.uint8)])
@both
def test_tensors_under_the_size_asked_for_keep_float32_moments(kind, size, dtype):
    optimizer = kind([Parameter(torch.zeros(size))])
    advance(optimizer, gradients(1, (size,)))
    assert optimizer.state_dict()["state"][0]["exp_avg"].dtype == dtype


def test_a_new_state_decodes_to_plus_zero():
    codes = torch.full((256,), optim.SIGNED_ZERO_CODE, dtype=torch.uint8)
    decoded = dequantize_dynamic8(codes, torch.ones(1), signed=True)
    assert not decoded.any() and not torch.signbit(decoded).any()


SHAPES = ((5000,), (3,), (100, 100), (), (64, 64))
SIZES = (2 * 5000 + 8 * 20, 8 * 3, 2 * 10000 + 8 * 40, 8, 2 * 4096 + 8 * 16)


def several(dtype=torch.float32, device="cpu") -> list[Parameter]:
    return [Parameter(torch.randn(shape, generator=generator(i)).to(device, dtype)) for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize(("page_above", "paged"), [(0, range(5)), (1, (0, 1, 2, 4)), (4096, (0, 2)), (10000, ())])
def test_paged_bytes_are_the_state_of_the_tensors_above_the_size_asked_for(page_above, paged):
    optimizer = PagedAdamW8bit(several(), page_above=page_above)
    assert optimizer.paged_bytes == 0
    advance(optimizer, gradients(2, *SHAPES))
    assert optimizer.paged_bytes == sum(SIZES[index] for index in paged)


@given(st.integers(0, 12_000), st.sampled_from([300, 1024, 4096, 2**20]), seeds, st.sampled_from(optim.DTYPES))
def test_paged_state_gives_the_bits_of_resident_state_wherever_the_pages_are_cut(page_above, chunk, seed, dtype):
    resident, paged = AdamW8bit(several(dtype), lr=LR), PagedAdamW8bit(several(dtype), lr=LR, page_above=page_above)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "CHUNK", chunk)
        advance(paged, gradients(3, *SHAPES, seed=seed))
    advance(resident, gradients(3, *SHAPES, seed=seed))
    assert_same_bits(resident, paged)


def counted(monkeypatch) -> list[int]:
    """For each piece that visits from now on the number of copies one way, in order."""
    found, copies = [], paging._Slot.copies
    monkeypatch.setattr(paging._Slot, "copies", lambda *arguments: found.append(len(copies(*arguments))) or copies(*arguments))
    return found


def test_small_tensors_share_a_piece_that_is_one_copy_each_way_and_one_call(monkeypatch):
    params = [Parameter(torch.ones(shape)) for shape in ((16, 454), (467, 16)) * 32]
    optimizer, calls = PagedAdamW8bit(params, lr=LR), []
    step = torch.ops.qlite.adamw_8bit_
    monkeypatch.setattr(torch.ops.qlite, "adamw_8bit_", lambda *lists: calls.append(len(lists[0])) or step(*lists))
    copies = counted(monkeypatch)
    advance(optimizer, gradients(1, *[param.shape for param in params]))
    assert copies == [1, 1] and calls == [64]


def test_a_large_tensor_is_cut_and_small_ones_fill_pieces_to_the_size_of_a_cut(monkeypatch):
    monkeypatch.setattr(optim, "CHUNK", 2048)
    params = [Parameter(torch.ones(size)) for size in (1024, 5000, 1024, 256, 1792)]
    optimizer, copies = PagedAdamW8bit(params, lr=LR, min_8bit_size=0), counted(monkeypatch)
    advance(optimizer, gradients(1, *[param.shape for param in params]))
    # 1024; 5000 in three cuts, of four tensors each; 1024 and 256; 1792. To the device and back.
    assert sorted(copies) == sorted(2 * [1, 4, 4, 4, 1, 1])


def test_a_parameter_that_shares_a_piece_may_miss_steps_come_later_or_be_taken_back():
    def run(kind):
        params = [Parameter(torch.ones(5000)) for _ in range(4)]
        optimizer = kind(params[:3], lr=LR)
        for step, (grad,) in enumerate(gradients(6, (5000,))):
            if step == 3:
                optimizer.add_param_group({"params": params[3:], "lr": 0.1})
            for place, param in enumerate(params):
                param.grad = grad * (place + 1) if (step + place) % 3 else None
            optimizer.step()
            if step == 4:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return optimizer

    resident, paged = run(AdamW8bit), run(PagedAdamW8bit)
    assert_same_bits(resident, paged)
    assert len({entry["step"] for entry in resident.state_dict()["state"].values()}) > 1
    assert paged.paged_bytes == 4 * (2 * 5000 + 8 * 20)


def to_disk_and_back(state: dict, folder) -> dict:
    tensors = {
        f"{index}.{name}": value
        for index, entry in state["state"].items()
        for name, value in entry.items()
        if isinstance(value, torch.Tensor)
    }
    numbers = {index: entry["step"] for index, entry in state["state"].items()}
    save_file(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps({"steps": numbers, "groups": state["param_groups"]}))
    read = json.loads((folder / "state.json").read_text())
    entries = {int(index): {"step": step} for index, step in read["steps"].items()}
    for key, value in load_file(folder / "state.safetensors").items():
        index, name = key.split(".")
        entries[int(index)][name] = value
    return {"state": entries, "param_groups": read["groups"]}


@pytest.mark.parametrize("dtype", optim.DTYPES)
@pytest.mark.parametrize("page_above", [0, 4096])
@pytest.mark.parametrize("saver", [AdamW8bit, PagedAdamW8bit])
@pytest.mark.parametrize("loader", [AdamW8bit, PagedAdamW8bit])
def test_a_run_taken_up_from_files_is_the_run_that_never_stopped(saver, loader, page_above, dtype, tmp_path):
    def options(kind):
        return {"lr": LR, **({"page_above": page_above} if kind is PagedAdamW8bit else {})}

    steps = gradients(25, *SHAPES)
    unbroken = saver(several(dtype), **options(saver))
    advance(unbroken, steps[:5])
    values = params_of(unbroken)
    saved = to_disk_and_back(unbroken.state_dict(), tmp_path)
    resumed = loader([Parameter(value) for value in values], **{**options(loader), "lr": 5.0})
    resumed.load_state_dict(saved)
    assert_same_bits(unbroken, resumed)
    if loader is PagedAdamW8bit:
        above = [size for size, n in zip(SIZES, (5000, 3, 10000, 1, 4096), strict=True) if n > page_above]
        assert resumed.paged_bytes == sum(above)
    advance(unbroken, steps[5:])
    advance(resumed, steps[5:])
    assert_same_bits(unbroken, resumed)


@both
def test_a_loaded_state_shares_no_memory_with_what_was_loaded(kind):
    optimizer, twin = kind(several()), kind(several())
    advance(optimizer, gradients(2, *SHAPES))
    twin.load_state_dict(optimizer.state_dict())
    kept = copy.deepcopy(optimizer.state_dict()["state"][0]["exp_avg"])
    advance(twin, gradients(1, *SHAPES, seed=9))
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], kept)


@both
@pytest.mark.parametrize("way", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_of_an_optimizer_goes_on_as_the_original_does(kind, way):
    optimizer = kind(several(), lr=LR)
    advance(optimizer, gradients(3, *SHAPES))
    twin = way(optimizer)
    assert_same_bits(optimizer, twin)
    assert getattr(twin, "paged_bytes", None) == getattr(optimizer, "paged_bytes", None)
    advance(optimizer, gradients(2, *SHAPES, seed=3))
    advance(twin, gradients(2, *SHAPES, seed=3))
    assert_same_bits(optimizer, twin)


def entry_without_absmax(state):
    del state["state"][0]["exp_avg_absmax"]


def absmax_too_short(state):
    state["state"][0]["exp_avg_absmax"] = state["state"][0]["exp_avg_absmax"][:-1]


def codes_of_another_shape(state):
    state["state"][2]["exp_avg"] = state["state"][2]["exp_avg"].view(-1)


def codes_as_floats(state):
    state["state"][0]["exp_avg_sq"] = state["state"][0]["exp_avg_sq"].float()


def absmax_cast(state):
    state["state"][0]["exp_avg_absmax"] = state["state"][0]["exp_avg_absmax"].bfloat16()


def group_of_another_optimizer(state):
    del state["param_groups"][0]["block_size"]


def group_too_short(state):
    state["param_groups"][0]["params"].pop()


def entry_for_nobody(state):
    state["state"][77] = dict(state["state"][0])


def step_below_zero(state):
    state["state"][0]["step"] = -1


@both
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (entry_without_absmax, "wanted"),
        (absmax_too_short, r"exp_avg_absmax .* wanted torch.float32 \(20,\)"),
        (codes_of_another_shape, r"exp_avg .* wanted torch.uint8 \(100, 100\)"),
        (codes_as_floats, "exp_avg_sq .* wanted torch.uint8"),
        (absmax_cast, "exp_avg_absmax .* is torch.bfloat16 .* wanted torch.float32"),
        (group_of_another_optimizer, "no block_size"),
        (group_too_short, "group"),
        (entry_for_nobody, "77"),
        (step_below_zero, "step is -1"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_the_optimizer_stays_as_it_was(kind, spoil, message):
    optimizer, twin = kind(several(), lr=LR), kind(several(), lr=LR)
    for each in (optimizer, twin):
        advance(each, gradients(2, *SHAPES))
    state = copy.deepcopy(twin.state_dict())
    state["param_groups"][0]["lr"] = 7.0
    spoil(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == LR
    advance(optimizer, gradients(2, *SHAPES, seed=1))
    advance(twin, gradients(2, *SHAPES, seed=1))
    assert_same_bits(optimizer, twin)


# Groups, closures, and parameters of every kind.


@both
def test_groups_have_their_own_settings_and_may_come_later(kind):
    one, two, three = (Parameter(torch.zeros(4096)) for _ in range(3))
    optimizer = kind([{"params": [one]}, {"params": [two], "lr": 0.5, "min_8bit_size": 5000}], lr=0.25, weight_decay=0.0)
    optimizer.add_param_group({"params": three, "betas": (0.5, 0.9)})
    advance(optimizer, [[torch.ones(4096)] * 3])
    # The first step of Adam is lr * sign(g), short of eps and rounding.
    moved = [-param.detach() for param in (one, two, three)]
    for value, wanted in zip(moved, (0.25, 0.5, 0.25), strict=True):
        torch.testing.assert_close(value, torch.full((4096,), wanted), atol=0, rtol=1e-6)
    assert optimizer.state_dict()["state"][1]["exp_avg"].dtype == torch.float32
    assert optimizer.state_dict()["state"][2]["exp_avg"].dtype == torch.uint8


@both
def test_parameters_without_a_gradient_stay_and_take_no_state(kind):
    used, unused, frozen = Parameter(torch.ones(5000)), Parameter(torch.ones(5000)), Parameter(torch.ones(5000), False)
    optimizer = kind([{"params": [used, unused, frozen]}, {"params": []}], lr=LR)
    used.grad = torch.ones(5000)
    optimizer.step()
    assert used[0] < 1 and bool((unused == 1).all()) and bool((frozen == 1).all())
    assert list(optimizer.state) == [used]
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.state[used]["step"] == 1


@both
@pytest.mark.parametrize("shape", [(0,), (0, 5), ()])
@pytest.mark.parametrize("min_8bit_size", [0, 4096])
def test_tensors_of_no_or_one_element_are_parameters_too(kind, shape, min_8bit_size):
    param = Parameter(torch.ones(shape))
    optimizer = kind([param], lr=LR, min_8bit_size=min_8bit_size)
    advance(optimizer, [[torch.ones(shape)]] * 2)
    assert param.shape == shape and bool((param < 1).all())


@both
def test_a_parameter_that_is_not_contiguous_steps_as_its_contiguous_copy(kind):
    start, steps = torch.randn(100, 64, generator=generator(0)), gradients(3, (100, 64))
    strided = kind([Parameter(start.t().contiguous().t())], lr=LR)
    plain = kind([Parameter(start.clone())], lr=LR)
    advance(strided, steps)
    advance(plain, steps)
    assert strided.param_groups[0]["params"][0].stride() == (1, 100)
    assert_same_bits(strided, plain)


@both
def test_a_parameter_whose_dtype_changes_keeps_its_moments(kind):
    param = Parameter(torch.ones(5000))
    optimizer = kind([param], lr=LR)
    advance(optimizer, gradients(2, (5000,)))
    param.data, param.grad = param.data.bfloat16(), None
    advance(optimizer, gradients(1, (5000,)))
    assert param.dtype == torch.bfloat16 and optimizer.state[param]["step"] == 3
    param.data, param.grad = param.data.double(), None
    param.grad = torch.ones_like(param)
    with pytest.raises(TypeError, match=r"parameter 0 of group 0, shape \(5000,\), is torch.float64"):
        optimizer.step()


@both
def test_a_parameter_whose_shape_changed_is_refused(kind):
    param = Parameter(torch.ones(5000))
    optimizer = kind([param])
    advance(optimizer, gradients(1, (5000,)))
    param.data, param.grad = torch.ones(6000), None
    param.grad = torch.ones(6000)
    with pytest.raises(ValueError, match=r"\(6000,\).*\(5000,\)"):
        optimizer.step()


@both
def test_a_closure_is_run_once_with_gradients_and_its_loss_comes_back(kind):
    param, calls = Parameter(torch.full((5000,), 2.0)), []
    optimizer = kind([param], lr=LR)

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 20_000.0
    assert calls == [True] and bool((param < 2).all())
    assert optimizer.step() is None


@both
def test_a_learning_rate_schedule_reaches_the_step(kind):
    param = Parameter(torch.zeros(4096))
    optimizer = kind([param], lr=0.5, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    advance(optimizer, [[torch.ones(4096)]])
    scheduler.step()
    reached = param.detach().clone()
    advance(optimizer, [[torch.ones(4096)]])
    assert torch.equal(param.detach(), reached) and reached[0] < -0.49


@both
def test_a_sparse_gradient_is_refused_before_anything_changes(kind):
    dense, sparse = Parameter(torch.ones(5000)), Parameter(torch.ones(50, 100))
    optimizer = kind([dense, sparse], lr=LR)
    dense.grad, sparse.grad = torch.ones(5000), torch.ones(50, 100).to_sparse()
    with pytest.raises(ValueError, match=r"gradient of parameter 1 of group 0, shape \(50, 100\).*sparse"):
        optimizer.step()
    assert bool((dense == 1).all()) and not optimizer.state


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_parameters_of_other_dtypes_are_refused(kind, dtype):
    good, bad = Parameter(torch.ones(2)), Parameter(torch.ones(2, dtype=dtype))
    with pytest.raises(TypeError, match=rf"parameter 1 of group 0, shape \(2,\), is {dtype}"):
        kind([good, bad])
    optimizer = kind([good])
    with pytest.raises(TypeError, match="parameter 0 of group 1"):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1


@both
def test_a_parameter_named_twice_is_refused(kind):
    param = Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="twice"):
        kind([param, param])
    with pytest.raises(ValueError, match="more than one"):
        kind([{"params": [param]}, {"params": [param]}])


@both
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lr", -1.0), ("lr", math.nan), ("lr", "1e-3"), ("lr", True), ("eps", -1e-8), ("eps", math.inf),
        ("weight_decay", -0.1), ("betas", (0.9, 1.0)), ("betas", (-0.1, 0.9)), ("betas", (0.9,)),
        ("block_size", 0), ("block_size", 2.5), ("min_8bit_size", -1), ("page_above", -1), ("page_above", 0.5),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(kind, setting, value):
    if setting == "page_above" and kind is AdamW8bit:
        pytest.skip("AdamW8bit has no such argument")
    with pytest.raises(ValueError, match=setting):
        kind([Parameter(torch.ones(2))], **{setting: value})


# On a GPU.


@needs_cuda
@pytest.mark.parametrize("kind", [AdamW8bit, PagedAdamW8bit])
@pytest.mark.parametrize("dtype", optim.DTYPES)
def test_on_cuda_the_bits_are_those_of_the_cpu(kind, dtype):
    ours, reference = kind(several(dtype, "cuda"), lr=LR), AdamW8bit(several(dtype), lr=LR)
    advance(ours, gradients(10, *SHAPES))
    advance(reference, gradients(10, *SHAPES))
    assert_same_bits(ours, reference)


@needs_cuda
@pytest.mark.parametrize("chunk", [1024, 2**20])
def test_on_cuda_random_delays_leave_paged_state_equal_to_resident_state(chunk, monkeypatch):
    chance, copied, stepped = random.Random(0), paging.Lane.copy, optim._advance

    def delay():
        torch.cuda._sleep(chance.choice((0, 0, 100_000, 1_000_000)))

    def slow_copy(lane, target, source):
        with torch.cuda.stream(lane.stream):
            delay()
        copied(lane, target, source)

    def slow_step(*args):
        delay()
        stepped(*args)

    resident, paged = AdamW8bit(several(device="cuda"), lr=LR), PagedAdamW8bit(several(device="cuda"), lr=LR)
    advance(resident, gradients(8, *SHAPES))
    with monkeypatch.context() as patch:
        patch.setattr(optim, "CHUNK", chunk)
        patch.setattr(paging.Lane, "copy", slow_copy)
        patch.setattr(optim, "_advance", slow_step)
        advance(paged, gradients(8, *SHAPES))
        assert_same_bits(resident, paged)


@needs_cuda
def test_on_cuda_paged_state_is_pinned_on_the_host_also_after_loading_and_after_a_move():
    params = several()
    optimizer = PagedAdamW8bit(params, lr=LR)
    advance(optimizer, gradients(1, *SHAPES))
    for param in params:
        param.data, param.grad = param.data.cuda(), None
    advance(optimizer, gradients(1, *SHAPES))
    twin = PagedAdamW8bit(several(device="cuda"))
    twin.load_state_dict(optimizer.state_dict())
    for each in (optimizer, twin):
        for entry in each.state.values():
            tensors = [value for name, value in entry.items() if name != "step"]
            assert all(value.device.type == "cpu" and value.is_pinned() for value in tensors)
        assert each.paged_bytes == sum(SIZES)


@needs_cuda
def test_on_cuda_no_state_stays_on_the_device_between_steps():
    gc.collect()
    start = torch.cuda.memory_allocated()
    param = Parameter(torch.zeros(2**22, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = PagedAdamW8bit([param])
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    # The parameter, its gradient, and the kernel's look-up table, which is kept: 512 levels and 65,536 cells.
    assert torch.cuda.memory_allocated() == before <= start + 2 * 4 * 2**22 + 4 * (512 + 65536)


@needs_cuda
@pytest.mark.parametrize("pieces", [2, 6])
def test_on_cuda_paged_state_takes_three_pieces_of_the_device_however_much_there_is(pieces, monkeypatch):
    monkeypatch.setattr(optim, "CHUNK", 2**20)
    param = Parameter(torch.zeros(pieces * 2**20, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = PagedAdamW8bit([param])
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    # A piece: 2 bytes an element and 8 a block. The table of addresses takes 512 bytes, the least that PyTorch hands out.
    piece = 2 * 2**20 + 8 * 2**12
    assert torch.cuda.max_memory_allocated() - before <= min(pieces, paging.SLOTS) * piece + 4 * 512


@needs_cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_on_cuda_a_step_with_paged_state_does_not_wait_for_the_device():
    optimizer = PagedAdamW8bit(several(device="cuda"))
    optimizer.grad_scale = torch.tensor(0.5, device="cuda")
    advance(optimizer, gradients(2, *SHAPES))
    before = params_of(optimizer)
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")  # waiting raises
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert all(not torch.equal(old, new) for old, new in zip(before, params_of(optimizer), strict=True))


@needs_cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_on_cuda_a_step_with_float32_gradients_of_any_value_does_not_wait_for_the_device():
    optimizer = AdamW8bit(several(device="cuda"))
    advance(optimizer, gradients(2, *SHAPES))
    before = params_of(optimizer)
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")  # waiting raises
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert all(not torch.equal(old, new) for old, new in zip(before, params_of(optimizer), strict=True))

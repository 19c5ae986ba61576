"""Dropout by seed and position: its numbers, its shares, its gradient, and the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlite import dropout, model_ops
from tests.strategies import DTYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_philox_gives_the_published_numbers():
    # Random123 1.14, file kat_vectors, philox4x32 10: the first with counter and key of zeros.
    zeros = dropout.philox(torch.tensor([0]), torch.tensor([0]))
    assert [hex(word) for word in zeros[0].tolist()] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**62))
def test_philox_is_what_integers_of_any_size_say(seed, counter):
    words = [counter % 2**32, counter >> 32, 0, 0]
    keys = [seed % 2**32, (seed >> 32) % 2**32]
    for _ in range(10):
        a, b = dropout.MULTIPLIERS[0] * words[0], dropout.MULTIPLIERS[1] * words[2]
        words = [(b >> 32) ^ words[1] ^ keys[0], b % 2**32, (a >> 32) ^ words[3] ^ keys[1], a % 2**32]
        keys = [(key + step) % 2**32 for key, step in zip(keys, dropout.KEY_STEPS, strict=True)]
    assert dropout.philox(torch.tensor([seed]), torch.tensor([counter]))[0].tolist() == words


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9])
def test_a_share_of_elements_is_dropped_and_the_others_make_up_for_it(p):
    n = 200_000
    y = model_ops.seeded_dropout(torch.ones(n), torch.tensor([7]), p)
    # Five standard deviations of a binomial share.
    assert abs((y == 0).float().mean() - p) <= 5 * (p * (1 - p) / n) ** 0.5
    assert torch.equal(y[y != 0].unique(), torch.tensor([1 / (1 - p)])) and abs(y.mean() - 1) <= 5 * (p / (1 - p) / n) ** 0.5
    again, other = (model_ops.seeded_dropout(torch.ones(n), torch.tensor([seed]), p) for seed in (7, 8))
    assert torch.equal(y, again) and (p == 0.0 or not torch.equal(y, other))


def test_the_gradient_has_the_mask_of_the_output():
    x = torch.randn(5, 33, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor([3])
    model_ops.seeded_dropout(x, seed, 0.3).sum().backward()
    assert torch.equal(x.grad, model_ops.seeded_dropout(torch.ones_like(x), seed, 0.3))
    assert torch.autograd.gradcheck(lambda x: model_ops.seeded_dropout(x, seed, 0.3), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: model_ops.seeded_dropout(x, seed, 0.3), x)


@given(
    count=st.sampled_from([0, 1, 3, 4, 5, 2047, 2048, 2049, 5000]), p=st.sampled_from([0.0, 0.05, 0.5, 0.999]),
    seed=st.integers(-(2**63), 2**63 - 1), dtype=st.sampled_from(DTYPES), strided=st.booleans(),
)  # fmt: skip
def test_the_kernel_is_the_reference_bit_for_bit(count, p, seed, dtype, strided):
    kernels = pytest.importorskip("qlite.kernels.dropout", reason="Triton is not built for this platform")
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(count)).to(DEVICE, dtype)
    x, seed = x[:, 0] if strided else x, torch.tensor([seed], device=DEVICE)
    assert torch.equal(kernels.dropout(x, seed, p, dropout.threshold(p)), dropout.dropout(x, seed, p))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_positions_beyond_two_to_the_31st_have_numbers_of_their_own():
    x, seed = torch.ones(2**31 + 5000, dtype=torch.bfloat16, device="cuda"), torch.tensor([5], device="cuda")
    y = model_ops.seeded_dropout(x, seed, 0.5)[-5000:]
    numbers = dropout.philox(seed, torch.arange(2**29, 2**29 + 1250, device="cuda")).view(-1) >> 1
    assert torch.equal(y != 0, numbers >= dropout.threshold(0.5))

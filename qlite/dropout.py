"""Dropout whose mask is a function of a seed and of an element's position: the same again without having been kept.

    y = x / (1 - p) where random31(seed, position) >= p * 2^31, else 0

Random numbers are those of Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 3.3):
the key is the seed, the counter is position // 4; element position % 4 of the result, without its lowest bit, is the number.

PyTorch's own dropout keeps a byte for each element and takes its state from a generator, which a CUDA graph cannot set back
to compute a layer twice. This one serves the steps that are captured (graphs.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 2**32 - 1


def threshold(p: float) -> int:
    """Returns the number of 31 bits below which an element is dropped, with probability p."""
    return int(p * 2**31)


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the high and the low 32 bits of a * b, for b of 32 bits in int64: by halves, for int64 has a sign."""
    high = (a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)) >> 16
    return high, (a * b) & _LOW


def philox(seed: Tensor, counter: Tensor) -> Tensor:
    """Returns four numbers of 32 bits for each counter, int64 (n, 4).

    Args:
        seed: int64 (1,), all of whose bits count. counter: int64 (n,), 0 or more.
    """
    words = [counter & _LOW, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    keys = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(ROUNDS):
        (high_0, low_0), (high_1, low_1) = _product(MULTIPLIERS[0], words[0]), _product(MULTIPLIERS[1], words[2])
        words = [high_1 ^ words[1] ^ keys[0], low_1, high_0 ^ words[3] ^ keys[1], low_0]
        keys = [(key + step) & _LOW for key, step in zip(keys, KEY_STEPS, strict=True)]
    return torch.stack(words, dim=-1)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Returns x with a share p of its elements set to zero and the others divided by 1 - p, in float32, rounded once.

    Args:
        x: floating point, any shape. seed: int64 (1,). p: 0 <= p < 1.
    """
    count = x.numel()
    numbers = philox(seed, torch.arange(-(-count // 4), device=x.device)).view(-1)[:count] >> 1
    scaled = x.reshape(-1).to(torch.promote_types(x.dtype, torch.float32)) * (1 / (1 - p))
    return torch.where(numbers >= threshold(p), scaled, 0.0).to(x.dtype).view(x.shape)

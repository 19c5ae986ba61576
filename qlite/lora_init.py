"""How an adapter's two factors begin: at zero, or at leading singular vectors.

"kaiming" and "gaussian" draw A and leave B zero, so that nothing changes (arXiv 2106.09685, section 4.1). "pissa" begins at
the base's leading singular vectors (arXiv 2404.02948), and what it begins with is subtracted, so that nothing changes
either, the base stays the file that it is, and the saved adapter is one of rank 2 r. "loftq" begins at the leading singular
vectors of what encoding took from the weight (arXiv 2310.08659, algorithm 1 with one step), which repairs a part of it.

Not done here: LoftQ's further steps, which encode the base again and so make another base.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STARTS = ("kaiming", "gaussian", "pissa", "loftq")
#: Those that need the weight of the base.
FROM_WEIGHT = ("pissa", "loftq")
#: Further directions, and rounds of refinement, when singular vectors are sought.
OVERSAMPLING, ROUNDS = 8, 8


def at_zero(init: str, in_features: int, out_features: int, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Returns A (r, in_features), drawn on the CPU, and B (out_features, r), zero; float32."""
    if init == "kaiming":
        # Kaiming's bound with a = sqrt(5), which the reference implementation of LoRA uses, is 1 / sqrt(in_features).
        a = (torch.rand(r, in_features, generator=generator, dtype=torch.float32) * 2 - 1) * (1 / math.sqrt(in_features))
    else:
        assert init == "gaussian", init
        a = torch.randn(r, in_features, generator=generator, dtype=torch.float32) / r
    return a, torch.zeros(out_features, r, dtype=torch.float32)


def from_weight(
    init: str, weight: Tensor, dense: Tensor | None, r: int, scaling: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Returns A (r, in_features) and B (out_features, r), float32, on the weight's device.

    Args:
        weight: of the base, decoded, float32 (out_features, in_features). dense: what it was encoded from, for "loftq".
        scaling: of the adapter: scaling * B A is the best approximation of rank r, to within what `leading` finds.

    Raises:
        ValueError: dense has another shape than weight.
    """
    matrix = weight
    if init == "loftq":
        assert dense is not None
        if dense.shape != weight.shape:
            raise ValueError(f"add_lora: dense gave a weight of {tuple(dense.shape)}; the layer's is {tuple(weight.shape)}")
        matrix = dense.to(weight.device).float() - weight
    left, values, right = leading(matrix, r, generator)
    root = (values / scaling).sqrt()
    return root[:, None] * right, left * root


def leading(matrix: Tensor, r: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the leading singular vectors and values: left (rows, r), values (r,), right (r, columns), float32.

    A random subspace is multiplied by matrix and transpose until it holds them. Beyond the matrix's rank they are zero.

    Source: Halko, Martinsson, Tropp (arXiv 0909.4061), algorithms 4.4 and 5.1.
    """
    rows, columns = matrix.shape
    width = min(r + OVERSAMPLING, rows, columns)
    start = torch.randn(columns, width, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    missing = max(0, r - width)  # a rank above the matrix's sizes
    left = torch.nn.functional.pad(basis @ left[:, :r], (0, missing))
    return left, torch.nn.functional.pad(values[:r], (0, missing)), torch.nn.functional.pad(right[:r], (0, 0, 0, missing))

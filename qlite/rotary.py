"""Rotary position embedding of a fused projection: queries and keys are turned, the values stay.

Each pair (i, i + D/2) of a head is a point in the plane, turned by an angle that grows with the position:

    y[i] = x[i] cos - x[i + D/2] sin,    y[i + D/2] = x[i + D/2] cos + x[i] sin

Source: RoFormer (arXiv 2104.09864), eq. 34. Every product and sum is rounded to the dtype of x, as in the published models.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns x with the heads of each group turned, all but the last one: the value. A negated sin turns back.

    Args:
        x: (B, T, groups, heads of a group, D): some queries, a key and a value a group. cos, sin: (B or 1, T, D/2), of the
            dtype of x.
    """
    cos, sin = cos[:, :, None, None], sin[:, :, None, None]
    first, second = x[..., :-1, :].chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned, x[..., -1:, :]), dim=-2)

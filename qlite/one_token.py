"""What lies between the products of a Falcon block for one more token a row: the specification of kernels/one_token.py.

A product comes in parts that are added up where they are read: a list of tensors (parts, B, columns), whose sum over parts and
over the list is the product. Sums are float32 and rounded once, to the dtype of the activations.

Not done here: the walk through the blocks (token_step.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlite import rotary

#: Rows of a batch, up to which two weights are multiplied at once.
FEW_ROWS = 16


def add_norm(x: Tensor, parts: list[Tensor], weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns x + the product of `parts`, rounded to the dtype of x, and its LayerNorm; both (B, columns).

    Args:
        x: (B, columns). parts: of a product (B, columns). weight, bias: (columns,).
    """
    total = (_wide(x) + _sum(parts)).to(x.dtype)
    return total, nn.functional.layer_norm(total, total.shape[-1:], weight, bias, eps)


def between_products(
    fused: list[Tensor], up: list[Tensor], cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, at: Tensor, visible: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns what the heads attend to (B, heads * head_dim) and GELU of `up` (B, ffn), in the dtype of the cache.

    Args:
        fused: parts of query_key_value (B, (heads + 2 kv_heads) * head_dim): groups of some queries, a key and a value.
        up: parts of dense_h_to_4h (B, ffn).
        cos, sin: (B or 1, head_dim / 2), of the new tokens' positions, in the dtype of the cache.
        keys, values: (B, kv_heads, max_length, head_dim), the cache of this layer, whose places before `at` may be filled; the
            new token's are stored at `at`.
        at: int64 (1,). visible: bool (B, max_length), which places before `at` hold tokens.
    """
    batch, kv_heads, length, size = keys.shape
    group = fused[0].shape[2] // (kv_heads * size) - 2
    rows = _sum(fused).to(keys.dtype).view(batch, 1, kv_heads, group + 2, size)
    query, key, value = rotary.rotate(rows, cos[:, None], sin[:, None])[:, 0].split((group, 1, 1), dim=2)
    keys.index_copy_(2, at, key)
    values.index_copy_(2, at, value)
    place = torch.arange(length, device=at.device)
    seen = (visible & (place < at)) | (place == at)
    scores = _wide(query) @ _wide(keys).transpose(2, 3) * size**-0.5
    shares = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(dim=-1)
    attended = (shares @ _wide(values)).to(keys.dtype).reshape(batch, kv_heads * group * size)
    return attended, nn.functional.gelu(_sum(up).to(keys.dtype))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sum(parts: list[Tensor]) -> Tensor:
    return sum((_wide(part).sum(dim=0) for part in parts[1:]), _wide(parts[0]).sum(dim=0))

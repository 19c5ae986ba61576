"""One more token for each row of a batch through a Falcon, in few launches: what generation repeats.

The products of a token are small: a launch costs a good part of them, and what lies between costs as much again when each
operation is launched by itself. So here two weights are multiplied at once, products are left in parts that are added up where
they are read, and all that lies between is one operator (one_token.py).

`next_hidden` gives what Falcon.next_hidden gives, for models of which `fits` says so: parallel blocks with rotary positions,
which is every Falcon but the RW models. Sums are float32 here and rounded once; there each product is rounded first.

Not done here: more than one token a row (falcon.py), the choice of the token (generate.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qlite.falcon import _MLP, Falcon, KVCache, _Attention, _Block, _LayerNorm
from qlite.linear import Linear4bit
from qlite.lora import LoRALinear
from qlite.one_token import FEW_ROWS


def fits(model: nn.Module) -> bool:
    """Whether this file's `next_hidden` can take a model: its blocks are Falcon's own, parallel, rotary, and without hooks."""
    if type(model) is not Falcon or model.config.alibi or not model.config.parallel_attn:
        return False
    if model.config.head_dim not in (32, 64) or nn.modules.module._has_any_global_hook():
        return False
    dtype, device = model.transformer.word_embeddings.weight.dtype, model.transformer.word_embeddings.weight.device
    if dtype not in (torch.float32, torch.float16, torch.bfloat16) or torch.is_autocast_enabled(device.type):
        return False
    own = {"self_attention": _Attention, "mlp": _MLP, **dict.fromkeys(("input_layernorm", "ln_attn", "ln_mlp"), _LayerNorm)}
    for block in model.transformer.h:
        parts = [(part, own.get(name)) for name, part in block.named_children()]
        if type(block) is not _Block or any(type(part) is not wanted for part, wanted in parts):
            return False
    if type(model.transformer.ln_f) is not _LayerNorm:
        return False
    walked = [module for part in (*model.transformer.h, model.transformer.ln_f) for module in part.modules()]
    # Hooks, and what puts a function of its own in the place of an instance's forward.
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in walked):
        return False
    return all(p.dtype == dtype for name, p in model.named_parameters() if "norm" in name or ".ln_" in name)


def next_hidden(model: Falcon, ids: Tensor, rotary: Tensor | None, visible: Tensor, cache: KVCache, at: Tensor) -> Tensor:
    """Returns the final normed hidden states (B, hidden) of one more token a row; arguments as in Falcon.next_hidden."""
    x = model.transformer.word_embeddings(ids)[:, 0]
    assert rotary is not None  # of which `fits` makes sure
    cos, sin = rotary.unbind()
    parts: list[Tensor] = []
    for block in model.transformer.h:
        assert isinstance(block, _Block)
        x, normed = _normed(x, parts, block.ln_attn if block.two_norms else block.input_layernorm)
        other = block.ln_mlp(x) if block.two_norms else normed
        attention, mlp = block.self_attention, block.mlp
        fused, up = _side_by_side(attention.query_key_value, mlp.dense_h_to_4h, normed, other)
        keys, values = cache.keys[block.layer], cache.values[block.layer]
        attended, active = torch.ops.qlite.between_products(fused, up, cos, sin, keys, values, at, visible)
        parts = _added(attention.dense, mlp.dense_4h_to_h, attended, active)
    return _normed(x, parts, model.transformer.ln_f)[1]


def _normed(x: Tensor, parts: list[Tensor], norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    if not parts:
        return x, norm(x)
    return torch.ops.qlite.add_norm(x, parts, norm.weight, norm.bias, norm.eps)


def _side_by_side(one: nn.Module, other: nn.Module, x: Tensor, other_x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the parts of the products of two layers."""
    pair = _pair(one, other, x) if x is other_x else None
    if pair is None:
        return [one(x)[None]], [other(other_x)[None]]
    both = torch.ops.qlite.two_products([x], *map(_coded, pair), pair[0].block_size)
    split = pair[0].out_features
    return _updated([both[..., :split]], (one, x)), _updated([both[..., split:]], (other, x))


def _added(one: nn.Module, other: nn.Module, x: Tensor, other_x: Tensor) -> list[Tensor]:
    """Returns the parts of the sum of two layers' products."""
    pair = _pair(one, other, x)
    if pair is None:
        return [one(x)[None], other(other_x)[None]]
    return _updated(
        [torch.ops.qlite.two_products([x, other_x], *map(_coded, pair), pair[0].block_size)], (one, x), (other, other_x)
    )


def _updated(parts: list[Tensor], *calls: tuple[nn.Module, Tensor]) -> list[Tensor]:
    """Returns `parts` with the updates of the layers that have an adapter, as one more tensor."""
    updates = [
        torch.ops.qlite.lora_update(x, *layer.factors(), layer.scaling) for layer, x in calls if isinstance(layer, LoRALinear)
    ]
    if not updates:
        return parts
    return [*parts, updates[0][None] if len(updates) == 1 else torch.stack(updates)]


def _pair(one: nn.Module, other: nn.Module, x: Tensor) -> tuple[Linear4bit, Linear4bit] | None:
    """Returns the encoded layers that two layers are, or have an adapter beside, if they can be multiplied at once."""
    if x.shape[0] > FEW_ROWS or x.dtype not in (torch.float16, torch.bfloat16):
        return None
    a, b = _plain(one), _plain(other)
    if a is None or b is None or (a.block_size, a.double_quant, a._table) != (b.block_size, b.double_quant, b._table):
        return None
    return a, b


def _plain(layer: nn.Module) -> Linear4bit | None:
    """Returns the encoded layer of rows without bias, of whole blocks of 64 n, that a layer is, or has an adapter beside."""
    if type(layer) is LoRALinear and layer.magnitude is None and not (layer.dropout.training and layer.dropout.p):
        layer = layer.base
    if type(layer) is not Linear4bit or layer.bias is not None or layer.block_size % 64 or layer.in_features % 64:
        return None
    return layer if layer.weight.shape[0] == layer.out_features else None


def _coded(layer: Linear4bit) -> list[Tensor]:
    tensors = (layer.weight, layer.absmax, layer.absmax_scale, layer.absmax_offset, layer.levels)
    return [tensor for tensor in tensors if tensor is not None]

"""Falcon, the decoder: every published flavour as one plain module of nn.Linear, with the hub's parameter names.

Almazrouei et al., "The Falcon Series of Open Language Models" (arXiv 2311.16867), section 4: multi-query attention and its
multi-group generalisation, rotary positions (arXiv 2104.09864) or ALiBi (arXiv 2108.12409, the RW models), parallel
attention and MLP, linears without bias. Flavours: 7B (one key-value head, one norm), 40B and 180B (grouped heads, two
norms), 11B (grouped heads, one norm, untied head), RW (ALiBi, biases, sequential attention and MLP).

Not done here: quantization and adapters (any module with in_features, out_features and a call may take a linear's place),
dropout inside the model (every published config has it at zero), loading (checkpoint.py), sampling (generate.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qlite.falcon_config import FalconConfig
from qlite.model_ops import rotate
from qlite.operators import without_derivatives
from qlite.recompute import BlockInputs, HostMemory, Recomputation, check_mode, decoded_bytes


class KVCache:
    """Keys and values of the tokens seen so far, in buffers of fixed size.

    Args:
        config: of the model. batch_size: rows. max_length: tokens a row can hold, prompt and answer together.
        device, dtype: those of the model's activations.

    Attributes:
        length: tokens held so far; `Falcon.hidden_states` advances it.
        keys, values: (layers, batch_size, kv_heads, max_length, head_dim).
    """

    def __init__(
        self, config: FalconConfig, batch_size: int, max_length: int, *, device: torch.device | str, dtype: torch.dtype
    ):
        shape = (config.num_hidden_layers, batch_size, config.kv_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def max_length(self) -> int:
        """Tokens a row can hold."""
        return self.keys.shape[3]

    def append(self, layer: int, keys: Tensor, values: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Stores the new (B, kv_heads, T, head_dim) of a layer and returns all so far, (B, kv_heads, total, head_dim).

        With `at`, int64 (T,), tokens are stored there, and what is returned is as long as the cache.
        """
        if at is not None:
            self.keys[layer].index_copy_(2, at, keys.to(self.keys.dtype))
            self.values[layer].index_copy_(2, at, values.to(self.values.dtype))
            return self.keys[layer], self.values[layer]
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


def _alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """Returns the slope of each head, float32 (heads,): powers of 2^(-8/n), n the nearest power of two below or at
    `heads`, then every other power of 2^(-4/n) for the heads beyond (arXiv 2108.12409, section 3)."""
    n = 2 ** math.floor(math.log2(heads))
    exponents = [-8 / n * i for i in range(1, n + 1)] + [-4 / n * i for i in range(1, 2 * (heads - n) + 1, 2)]
    return torch.tensor([2.0**exponent for exponent in exponents], device=device)


class _Attention(nn.Module):
    """Multi-query, grouped or multi-head attention behind one fused query_key_value linear."""

    def __init__(self, config: FalconConfig, **kwargs: Any):
        super().__init__()
        self.config = config
        fused = (config.num_attention_heads + 2 * config.kv_heads) * config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, fused, bias=config.bias, **kwargs)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias, **kwargs)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        layer: int,
        cache: KVCache | None,
        at: Tensor | None,
    ) -> Tensor:
        """Returns (B, T, hidden). rotary: (cos, sin); mask: additive or bool (B, 1 or H, T, total), None = causal."""
        return self.dense(self.heads(x, rotary, mask, layer, cache, at))

    def heads(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        layer: int,
        cache: KVCache | None,
        at: Tensor | None,
    ) -> Tensor:
        """Returns what the heads attended to, side by side, (B, T, hidden); arguments as in `forward`."""
        batch, length, _ = x.shape
        heads, groups, size = self.config.num_attention_heads, self.config.kv_heads, self.config.head_dim
        # One layout covers all flavours: groups, each of some queries, then its key, then its value.
        fused = self.query_key_value(x).view(batch, length, groups, heads // groups + 2, size)
        if rotary is not None:
            fused = rotate(fused, *(table.to(fused.dtype) for table in rotary))  # of which autocast makes another dtype
        query, key, value = fused.split((heads // groups, 1, 1), dim=3)
        query = query.reshape(batch, length, heads, size).transpose(1, 2)
        key, value = key.squeeze(3).transpose(1, 2), value.squeeze(3).transpose(1, 2)
        if cache is not None:
            key, value = cache.append(layer, key, value, at)
        return self.attend(query, key, value, mask).transpose(1, 2).reshape(x.shape)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Returns (B, heads, T, head_dim) from query of that shape, key and value (B, kv_heads, total, head_dim)."""
        batch, heads, length, size = query.shape
        if length == 1 and heads != key.shape[1]:
            # One query each of the heads that share a key is as good as so many queries of one head.
            query = query.reshape(batch, key.shape[1], -1, size)
            if mask is not None and mask.shape[1] > 1:
                mask = mask.reshape(mask.shape[0], key.shape[1], -1, mask.shape[3])
            attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            return attended.reshape(batch, heads, 1, size)
        if mask is not None and heads != key.shape[1]:  # CUDA has no fast kernel of both a mask and grouped heads
            key, value = (t[:, :, None].expand(-1, -1, heads // t.shape[1], -1, -1).flatten(1, 2) for t in (key, value))
        causal = False
        if mask is None and query.shape[2] > 1:  # a branch: of a compiler's dynamic shapes the comparison itself is no bool
            causal = True
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1]
        )


class _MLP(nn.Module):
    """Two linears around an exact (erf) GELU."""

    def __init__(self, config: FalconConfig, **kwargs: Any):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.ffn, bias=config.bias, **kwargs)
        self.dense_4h_to_h = nn.Linear(config.ffn, config.hidden_size, bias=config.bias, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, T, hidden)."""
        return self.dense_4h_to_h(self.wide(x))

    def wide(self, x: Tensor) -> Tensor:
        """Returns what the second linear reads, (B, T, ffn)."""
        return nn.functional.gelu(self.dense_h_to_4h(x))


class _LayerNorm(nn.LayerNorm):
    """nn.LayerNorm, with a kernel of its own for a few tokens and no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns x (..., hidden), normed."""
        if without_derivatives() and x.dtype == self.weight.dtype:
            return torch.ops.qlite.layer_norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)


class _Block(nn.Module):
    """One decoder layer: attention and MLP side by side on the same residual, or one after the other (RW)."""

    def __init__(self, config: FalconConfig, layer: int, **kwargs: Any):
        super().__init__()
        self.layer, self.parallel = layer, config.parallel_attn
        self.two_norms = config.two_norms

        def norm() -> nn.LayerNorm:
            return _LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon, **kwargs)

        if self.two_norms:
            self.ln_attn, self.ln_mlp = norm(), norm()
        else:
            self.input_layernorm = norm()
            if not self.parallel:
                self.post_attention_layernorm = norm()
        self.self_attention = _Attention(config, **kwargs)
        self.mlp = _MLP(config, **kwargs)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: KVCache | None,
        at: Tensor | None = None,
        again: Recomputation | None = None,
    ) -> Tensor:
        """Returns (B, T, hidden). again: computes parts of the block again in the backward pass."""
        if again is not None:
            return again(self, x, rotary, mask, cache)
        normed = self.ln_attn(x) if self.two_norms else self.input_layernorm(x)
        attended = self.self_attention(normed, rotary, mask, self.layer, cache, at)
        if not self.parallel:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        # The two branches are added first, as in the published model: in bfloat16 the order shows.
        return x + (self.mlp(self.ln_mlp(x) if self.two_norms else normed) + attended)

    # The same in the parts that recompute.py divides it into.

    def inner(self, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Returns the heads' output, in a sequential block the sum after attention, and what the MLP reads: (B, T, hidden)."""
        rotary, mask, cache = arguments
        normed = self.ln_attn(x) if self.two_norms else self.input_layernorm(x)
        heads = self.self_attention.heads(normed, rotary, mask, self.layer, cache, None)
        if self.parallel:
            return heads, self.ln_mlp(x) if self.two_norms else normed
        x = x + self.self_attention.dense(heads)
        return x, self.post_attention_layernorm(x)

    def attended(self, first: Tensor) -> Tensor:
        """Returns what attention adds, in a sequential block the sum after it, of what `inner` returned first."""
        return self.self_attention.dense(first) if self.parallel else first

    def joined(self, x: Tensor, attended: Tensor, product: Tensor) -> Tensor:
        """Returns the block's result. x: its input; product: the MLP's."""
        return x + (product + attended) if self.parallel else attended + product

    def ends(self) -> list[nn.Module]:
        """Returns the linears that come after `inner` and mlp.wide."""
        return [self.mlp.dense_4h_to_h, *([self.self_attention.dense] if self.parallel else [])]

    def hooked(self) -> bool:
        """Whether attention or MLP has a hook, for which it has to be called whole."""
        tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        own = any(getattr(module, table) for module in (self.self_attention, self.mlp) for table in tables)
        return own or bool(nn.modules.module._has_any_global_hook())


class _Transformer(nn.Module):
    """The stack below the head; it exists for the hub's parameter names."""

    def __init__(self, config: FalconConfig, **kwargs: Any):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, **kwargs)
        self.h = nn.ModuleList(_Block(config, layer, **kwargs) for layer in range(config.num_hidden_layers))
        self.ln_f = _LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon, **kwargs)


class Falcon(nn.Module):
    """A Falcon language model: token ids in, logits out.

    Args:
        config: its shape. device, dtype: of the parameters; device="meta" allocates nothing.

    Attributes:
        config: FalconConfig.
        gradient_checkpointing: what each block computes again in the backward pass, in training mode, instead of keeping it:
            nothing (False, at first), all but its input (True; "offload": which waits in host memory), or all but the MLP
            ("selective"). See recompute.py.
        host_memory: where inputs wait, under "offload"; freed by `finetune`, or its `clear`.
        preserve_rng_state: recompute a block with the random numbers that it had; False where no module of a block draws any
            from PyTorch's generators. True at first.

    Example:
        >>> config = qlite.FalconConfig(vocab_size=50, hidden_size=64, num_attention_heads=2, num_hidden_layers=2)
        >>> qlite.Falcon(config)(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 50])
    """

    def __init__(self, config: FalconConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.preserve_rng_state = True
        self.host_memory = HostMemory()
        self.transformer = _Transformer(config, device=device, dtype=dtype)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype)
        self.tie_weights()

    @property
    def gradient_checkpointing(self) -> bool | str:
        """False, True, "selective" or "offload"; ValueError where it is set to something else."""
        return self._gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, mode: bool | str) -> None:
        check_mode(mode)
        self._gradient_checkpointing = mode

    def tie_weights(self) -> None:
        """Makes the head share the embedding's Parameter, where the config ties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.word_embeddings.weight

    @torch.no_grad()
    def init_weights_(self, *, seed: int) -> Falcon:
        """Draws linears and embeddings from N(0, initializer_range), sets biases to 0 and norms to 1; returns the model."""
        generator = torch.Generator(self.lm_head.weight.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return self

    def _positions(self, length: int, past: int, attention_mask: Tensor | None, device: torch.device) -> Tensor:
        """Returns the position of every token so far, (B or 1, past + T): padding on the left does not count."""
        if attention_mask is None:
            return torch.arange(past + length, device=device)[None]
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns cos and sin, (B or 1, T, D/2), computed in float32 and cast to the activations' dtype."""
        size = self.config.head_dim
        exponents = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
        angles = positions[:, :, None].float() * (1.0 / self.config.rope_theta**exponents)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def rotary_table(self, length: int) -> Tensor:
        """Returns cos and sin of the first positions, (2, length, D/2), in the dtype of the activations."""
        weight = self.transformer.word_embeddings.weight
        return torch.cat(self._rotary(torch.arange(length, device=weight.device)[None], weight.dtype))

    def _mask(
        self, length: int, past: int, attention_mask: Tensor | None, positions: Tensor, dtype: torch.dtype
    ) -> Tensor | None:
        """Returns what attention may see: None for plain causal, else bool, or additive with ALiBi; (B or 1, ., T, total).

        A padding token sees itself, so that no row of the softmax is empty and every number stays finite.
        """
        if attention_mask is None and not self.config.alibi and (past == 0 or length == 1):
            return None
        total, device = past + length, positions.device
        query = torch.arange(past, total, device=device)[:, None]
        key = torch.arange(total, device=device)[None]
        visible = (key <= query)[None]
        if attention_mask is not None:
            visible = (visible & attention_mask.bool()[:, None]) | (key == query)
        visible = visible[:, None]
        if not self.config.alibi:
            return visible
        return self._alibi(positions, dtype).masked_fill(~visible, -math.inf)

    def _alibi(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns what ALiBi adds to the scores of a key at each position (B or 1, total): (B or 1, heads, 1, total)."""
        # bfloat16 slopes and products, whatever the model computes in: the published models were trained with them.
        slopes = _alibi_slopes(self.config.num_attention_heads, positions.device).bfloat16()
        return ((slopes[None, :, None] * positions[:, None]).to(dtype) / math.sqrt(self.config.head_dim))[:, :, None]

    def _recomputation(self, x: Tensor) -> Recomputation | None:
        """Returns how the blocks are called on x, None: as they are."""
        mode = self.gradient_checkpointing
        if not (mode and self.training and torch.is_grad_enabled()):
            return None
        blocks = self.transformer.h
        return Recomputation(
            mode, decoded=decoded_bytes(blocks[0], x.dtype), preserve_rng_state=self.preserve_rng_state,
            inputs=BlockInputs(self.host_memory, len(blocks), x.device) if mode == "offload" else None,
        )  # fmt: skip

    def hidden_states(self, input_ids: Tensor, *, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Returns the final normed hidden states (B, T, hidden), in the parameters' dtype.

        Args:
            input_ids: int64 (B, T), the tokens that come after what `cache` holds.
            attention_mask: bool or int (B, cached + T), zero where a token is padding on the left; None: no padding.
            cache: keys and values of the tokens before; they are extended in place.

        Raises:
            ValueError: another shape of input_ids or attention_mask, or a cache too short or of another batch size.
        """
        if input_ids.ndim != 2:
            raise ValueError(f"Falcon: input_ids has shape {tuple(input_ids.shape)}; wanted (batch, tokens)")
        batch, length = input_ids.shape
        past = 0 if cache is None else cache.length
        if cache is not None and (past + length > cache.max_length or cache.keys.shape[1] != batch):
            raise ValueError(
                f"Falcon: the cache holds {cache.keys.shape[1]} rows of {cache.max_length} tokens, {past} of them used; "
                f"{batch} rows of {length} more do not fit"
            )
        if attention_mask is not None and attention_mask.shape != (batch, past + length):
            raise ValueError(
                f"Falcon: attention_mask has shape {tuple(attention_mask.shape)}; wanted ({batch}, {past + length})"
            )
        x = self.transformer.word_embeddings(input_ids)
        positions = self._positions(length, past, attention_mask, input_ids.device)
        rotary = None if self.config.alibi else self._rotary(positions[:, past:], x.dtype)
        mask = self._mask(length, past, attention_mask, positions, x.dtype)
        again = self._recomputation(x)
        for block in self.transformer.h:
            x = block(x, rotary, mask, cache, None, again)
        if cache is not None:
            cache.length += length
        return self.transformer.ln_f(x)

    def next_hidden(self, ids: Tensor, rotary: Tensor | None, visible: Tensor, cache: KVCache, at: Tensor) -> Tensor:
        """Returns the final normed hidden states (B, hidden) of one more token a row, whose shapes are the same each time.

        Args:
            ids: int64 (B, 1), the tokens. rotary: (2, B, D/2), cos and sin of their positions; None with ALiBi.
            visible: bool (B, max_length), False where the cache holds padding; what it has after `at` is not looked at.
            at: int64 (1,), the place of the new tokens. `cache.length` is not looked at.
        """
        x = self.transformer.word_embeddings(ids)
        hidden = (~visible | (torch.arange(visible.shape[1], device=at.device) > at))[:, None, None]
        if rotary is None:
            tables, mask = None, self._alibi((visible.long().cumsum(dim=1) - 1).clamp(min=0), x.dtype)
        else:
            # Added to the scores, for attention would make such a mask of a bool one in every layer.
            tables, mask = rotary[:, :, None].unbind(), torch.zeros_like(hidden, dtype=x.dtype)
        mask = mask.masked_fill(hidden, -math.inf)
        for block in self.transformer.h:
            x = block(x, tables, mask, cache, at)
        return self.transformer.ln_f(x)[:, -1]

    def forward(self, input_ids: Tensor, *, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Returns logits (B, T, vocab_size); arguments and errors as in `hidden_states`."""
        return self.lm_head(self.hidden_states(input_ids, attention_mask=attention_mask, cache=cache))

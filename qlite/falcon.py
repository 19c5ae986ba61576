"""Falcon, the decoder: every published flavour as one plain module of nn.Linear, with the hub's parameter names.

Almazrouei et al., "The Falcon Series of Open Language Models" (arXiv 2311.16867), section 4: multi-query attention and its
multi-group generalisation, rotary positions (arXiv 2104.09864) or ALiBi (arXiv 2108.12409, the RW models), parallel
attention and MLP, linears without bias. Flavours: 7B (one key-value head, one norm), 40B and 180B (grouped heads, two
norms), 11B (grouped heads, one norm, untied head), RW (ALiBi, biases, sequential attention and MLP).

Not done here: quantization and adapters (any module with in_features, out_features and a call may take a linear's place),
dropout inside the model (every published config has it at zero), loading (checkpoint.py), sampling (generate.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlite.model_ops import rotate
from qlite.operators import decoded_weights_kept, without_derivatives

MODEL_TYPES = ("falcon", "RefinedWeb", "RefinedWebModel")
#: Keys of the configs of 2023 and what they are called since.
OLD_KEYS = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}
OLD_KEYS |= {"n_embed": "hidden_size"}
#: Keys that would change the numbers, and the only values that are supported.
FIXED = {"hidden_dropout": (0, 0.0), "attention_dropout": (0, 0.0), "activation": ("gelu",)}
FIXED |= {"apply_residual_connection_post_layernorm": (False,), "rope_scaling": (None,)}
#: A block that is computed again keeps its decoded weights until its backward pass, which comes at once, if they take no more
#: bytes than this: all of Falcon-7B's are 413 MB in 16 bits. It saves a third of the decoding.
MOST_KEPT = 2**29


@dataclasses.dataclass(frozen=True)
class FalconConfig:
    """The shape of a Falcon, under the names that config.json uses; the defaults are those of Falcon-7B.

    Raises:
        ValueError: a size below 1, heads that do not divide what they split, an unknown number of norms.
        TypeError: a field of another type (True is not accepted for 1).

    Example:
        >>> qlite.FalconConfig(hidden_size=128, num_attention_heads=2, num_hidden_layers=2).head_dim
        64
    """

    vocab_size: int = 65024
    hidden_size: int = 4544
    num_hidden_layers: int = 32
    num_attention_heads: int = 71
    num_kv_heads: int | None = None
    ffn_hidden_size: int | None = None
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    alibi: bool = False
    bias: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    new_decoder_architecture: bool = False
    num_ln_in_parallel_attn: int | None = None
    tie_word_embeddings: bool = True
    bos_token_id: int = 11
    eos_token_id: int = 11

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            wanted = str(field.type)
            fits = {
                "int": isinstance(value, int) and not isinstance(value, bool),
                "int | None": value is None or (isinstance(value, int) and not isinstance(value, bool)),
                "float": isinstance(value, (int, float)) and not isinstance(value, bool),
                "bool": isinstance(value, bool),
            }[wanted]
            if not fits:
                raise TypeError(f"FalconConfig: {field.name} is {value!r}; wanted {wanted}")
            least = 0 if field.name.endswith("_id") else 1
            if wanted.startswith("int") and value is not None and value < least:
                raise ValueError(f"FalconConfig: {field.name} is {value}; wanted at least {least}")
            if isinstance(value, (int, float)) and wanted == "float" and not (math.isfinite(value) and value > 0):
                raise ValueError(f"FalconConfig: {field.name} is {value}; wanted a finite number above 0")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"FalconConfig: num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"FalconConfig: num_kv_heads {self.kv_heads} does not divide num_attention_heads {self.num_attention_heads}"
            )
        if not self.alibi and self.head_dim % 2:
            raise ValueError(f"FalconConfig: rotary positions need an even head size; it is {self.head_dim}")
        if self.num_ln_in_parallel_attn not in (None, 1, 2):
            raise ValueError(f"FalconConfig: num_ln_in_parallel_attn is {self.num_ln_in_parallel_attn}; wanted 1 or 2")
        if self.new_decoder_architecture and not self.parallel_attn:
            raise ValueError("FalconConfig: new_decoder_architecture with parallel_attn=False is no published Falcon")

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Key-value heads: 1 under multi-query, the groups of the new architecture, else one a head."""
        if self.new_decoder_architecture:
            return self.num_kv_heads or self.num_attention_heads
        return 1 if self.multi_query else self.num_attention_heads

    @property
    def ffn(self) -> int:
        """Features between the two linears of the MLP."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def two_norms(self) -> bool:
        """Whether attention and MLP have a norm each (ln_attn, ln_mlp) though they run in parallel."""
        return self.new_decoder_architecture and self.num_ln_in_parallel_attn != 1

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FalconConfig:
        """Returns the config that a parsed config.json describes, with the keys of 2023 or of today.

        Raises:
            ValueError: no Falcon's model_type, or a setting that is not supported. TypeError: a value of another type.
        """
        model_type = values.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(f"config.json: model_type is {model_type!r}; wanted one of {', '.join(MODEL_TYPES)}")
        for key, allowed in FIXED.items():
            if key in values and values[key] not in allowed:
                raise ValueError(f"config.json: {key} is {values[key]!r}; only {allowed[0]!r} is supported")
        renamed = {OLD_KEYS.get(key, key): value for key, value in values.items() if value is not None}
        if values.get("n_head_kv") is not None:
            renamed.setdefault("new_decoder_architecture", True)
        rope = renamed.get("rope_parameters")
        if isinstance(rope, Mapping):
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind != "default":
                raise ValueError(f"config.json: rope_type is {kind!r}; only 'default' is supported")
            if "rope_theta" in rope:
                renamed["rope_theta"] = rope["rope_theta"]
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in renamed.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as config.json has it, in the keys that transformers reads."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        return {
            "architectures": ["FalconForCausalLM"],
            "model_type": "falcon",
            "activation": "gelu",
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            **values,
            "num_kv_heads": self.kv_heads,
            "ffn_hidden_size": self.ffn,
        }


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
        return self.dense(self.attend(query, key, value, mask).transpose(1, 2).reshape(x.shape))

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
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(x)))


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
    ) -> Tensor:
        """Returns (B, T, hidden)."""
        normed = self.ln_attn(x) if self.two_norms else self.input_layernorm(x)
        attended = self.self_attention(normed, rotary, mask, self.layer, cache, at)
        if not self.parallel:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        # The two branches are added first, as in the published model: in bfloat16 the order shows.
        return x + (self.mlp(self.ln_mlp(x) if self.two_norms else normed) + attended)


def _inside(context: Callable[[], contextlib.AbstractContextManager], block: nn.Module, *arguments: Any) -> Tensor:
    with context():
        return block(*arguments)


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
        gradient_checkpointing: recompute each block in the backward pass, in training mode, instead of keeping its
            activations; False at first.
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
        self.transformer = _Transformer(config, device=device, dtype=dtype)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype)
        self.tie_weights()

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

    def _decoded_bytes(self, dtype: torch.dtype) -> int:
        """Returns the size of a block's encoded weights when they are decoded into a dtype."""
        encoded = (m for m in self.transformer.h[0].modules() if getattr(m, "encoded", None) is not None)
        return sum(m.in_features * m.out_features for m in encoded) * dtype.itemsize  # type: ignore[operator]

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
        again = self.gradient_checkpointing and self.training
        keep = decoded_weights_kept if again and self._decoded_bytes(x.dtype) <= MOST_KEPT else contextlib.nullcontext
        for block in self.transformer.h:
            if again:
                x = checkpoint(
                    _inside, keep, block, x, rotary, mask, cache,
                    use_reentrant=False, preserve_rng_state=self.preserve_rng_state,
                )  # fmt: skip
            else:
                x = block(x, rotary, mask, cache)
        if cache is not None:
            cache.length += length
        return self.transformer.ln_f(x)

    def next_hidden(self, ids: Tensor, positions: Tensor, visible: Tensor, cache: KVCache, at: Tensor) -> Tensor:
        """Returns the final normed hidden states (B, hidden) of one more token a row, whose shapes are the same each time.

        Args:
            ids, positions: int64 (B, 1), the tokens and how many come before each. visible: bool (B, max_length), which places
                of the cache hold tokens, the new one included. at: int64 (1,), its place. `cache.length` is not looked at.
        """
        x = self.transformer.word_embeddings(ids)
        hidden = ~visible[:, None, None]
        if self.config.alibi:
            rotary, mask = None, self._alibi((visible.long().cumsum(dim=1) - 1).clamp(min=0), x.dtype)
        else:
            # Added to the scores, for attention would make such a mask of a bool one in every layer.
            rotary, mask = self._rotary(positions, x.dtype), torch.zeros_like(hidden, dtype=x.dtype)
        mask = mask.masked_fill(hidden, -math.inf)
        for block in self.transformer.h:
            x = block(x, rotary, mask, cache, at)
        return self.transformer.ln_f(x)[:, -1]

    def forward(self, input_ids: Tensor, *, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Returns logits (B, T, vocab_size); arguments and errors as in `hidden_states`."""
        return self.lm_head(self.hidden_states(input_ids, attention_mask=attention_mask, cache=cache))

"""The shape of a Falcon, as config.json has it: the keys of 2023 and of today, and what is refused.

Not done here: the model itself (falcon.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

MODEL_TYPES = ("falcon", "RefinedWeb", "RefinedWebModel")
#: Keys of the configs of 2023 and what they are called since.
OLD_KEYS = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_head_kv": "num_kv_heads"}
OLD_KEYS |= {"n_embed": "hidden_size"}
#: Keys that would change the numbers, and the only values that are supported.
FIXED = {"hidden_dropout": (0, 0.0), "attention_dropout": (0, 0.0), "activation": ("gelu",)}
FIXED |= {"apply_residual_connection_post_layernorm": (False,), "rope_scaling": (None,)}


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

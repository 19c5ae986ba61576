"""Small Falcons for the tests: one of every flavour, and any other combination that a config can ask for."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st
from torch import Tensor

from qlite.falcon import Falcon, FalconConfig

_SMALL = {"vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
_GROUPED = {"num_attention_heads": 6, "num_kv_heads": 2, "new_decoder_architecture": True}
_RW = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
#: The published flavours, the head counts as odd as theirs, and combinations that nobody published.
FLAVOURS = {
    name: FalconConfig(**_SMALL, **fields)
    for name, fields in {
        "7b": {"num_attention_heads": 3},
        "40b": {**_GROUPED},
        "180b": {**_GROUPED, "num_kv_heads": 3, "ffn_hidden_size": 80},
        "11b": {**_GROUPED, "num_ln_in_parallel_attn": 1, "tie_word_embeddings": False, "rope_theta": 500042.0},
        "rw": {**_RW, "num_attention_heads": 4},
        # Six heads are no power of two, which ALiBi's slopes treat apart; without rotary a head may have an odd size.
        "rw, 6 heads": {**_RW, "num_attention_heads": 6},
        "rw, 16 heads of 3": {**_RW, "num_attention_heads": 16},
        "multi-query, sequential": {"num_attention_heads": 3, "parallel_attn": False, "bias": True},
        "multi-query, alibi": {"num_attention_heads": 3, "alibi": True},
        "multi-head, rotary, parallel": {"num_attention_heads": 4, "multi_query": False, "tie_word_embeddings": False},
        "grouped, alibi, biases": {**_GROUPED, "alibi": True, "bias": True},
        "grouped, a group a head": {**_GROUPED, "num_kv_heads": None, "num_ln_in_parallel_attn": 2},
    }.items()
}


@st.composite
def falcon_configs(draw: st.DrawFn) -> FalconConfig:
    """Any small Falcon that the config allows."""
    groups, queries, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from((2, 4, 6)))
    heads = groups * queries
    grouped = draw(st.booleans())
    return FalconConfig(
        vocab_size=draw(st.integers(1, 40)),
        hidden_size=heads * size,
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_kv_heads=draw(st.sampled_from((groups, None))) if grouped else None,
        ffn_hidden_size=draw(st.sampled_from((None, 1, 10))),
        layer_norm_epsilon=draw(st.sampled_from((1e-5, 1e-3))),
        rope_theta=draw(st.sampled_from((100.0, 10000.0))),
        max_position_embeddings=64,
        alibi=draw(st.booleans()),
        bias=draw(st.booleans()),
        multi_query=draw(st.booleans()),
        parallel_attn=grouped or draw(st.booleans()),
        new_decoder_architecture=grouped,
        num_ln_in_parallel_attn=draw(st.sampled_from((None, 1, 2))) if grouped else None,
        tie_word_embeddings=draw(st.booleans()),
    )


def falcon_of(config: FalconConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Falcon:
    """A Falcon in evaluation mode whose every parameter is far from its usual first value.

    At N(0, 0.02) attention is nearly even and norms do nothing, and a fault there would not show.
    """
    model = Falcon(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            centre = 1.0 if parameter.ndim == 1 and not name.endswith("bias") else 0.0
            # Drawn in float32, so that models of two dtypes are one model.
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return model


def talker_of(config: FalconConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Falcon:
    """A Falcon that answers in many different tokens, where one of random weights soon says a single one for ever."""
    model = falcon_of(dataclasses.replace(config, tie_word_embeddings=False), seed, dtype)
    with torch.no_grad():
        model.transformer.ln_f.bias.zero_()
        model.transformer.word_embeddings.weight.mul_(config.hidden_size**0.5)
    return model


def tokens_of(config: FalconConfig, *shape: int, seed: int = 0) -> Tensor:
    """Token ids, int64, of a shape."""
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))

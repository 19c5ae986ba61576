"""Tokens from a model: greedy or sampled, one prompt or a batch, with a key-value cache.

Prompts of different lengths are padded on the left and masked, so that each row sees what it would see alone. The choice of
the next token follows Holtzman et al. (arXiv 1904.09751) for top-p and Keskar et al. (arXiv 1909.05858, section 4.1) for
the repetition penalty.

Not done here: beam search, speculative decoding, captured graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from qlite.falcon import KVCache

_FROM_CONFIG: Any = object()


def _penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Returns logits (B, V) in which a token that was seen (bool (B, V)) is less likely: divided above 0, multiplied below."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _restricted(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Returns logits (B, V) with -inf for tokens outside the k likeliest and outside the nucleus of mass top_p.

    The nucleus is the shortest list of the likeliest tokens whose probabilities reach top_p; the likeliest is always in.
    """
    if top_k is not None:
        kept = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    if top_p is not None and top_p < 1:  # at 1 nothing is left out, where a rounded sum would reach 1 before the end
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # What stands before a token, without the token: so the one that crosses top_p is kept.
        before = probabilities.cumsum(dim=-1) - probabilities
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, order, ordered)
    return logits


def _check(model: nn.Module, prompts: list[list[int]], max_new_tokens: int, options: dict[str, Any]) -> None:
    vocabulary, context = model.config.vocab_size, model.config.max_position_embeddings  # type: ignore[union-attr]
    if not prompts:
        raise ValueError("generate: prompts is empty; wanted token ids, or a list of lists of them")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"generate: prompt {row} is empty; it needs at least one token")
        for token in prompt:
            if not 0 <= token < vocabulary:
                raise ValueError(f"generate: prompt {row} has token {token}; the vocabulary is 0..{vocabulary - 1}")
    longest = max(len(prompt) for prompt in prompts)
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens is {max_new_tokens}; wanted at least 1")
    if longest + max_new_tokens > context:
        raise ValueError(
            f"generate: a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of {context}"
        )
    temperature, top_k, top_p = options["temperature"], options["top_k"], options["top_p"]
    if not temperature >= 0 or temperature == float("inf"):
        raise ValueError(f"generate: temperature is {temperature}; wanted 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k is {top_k}; wanted at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p is {top_p}; wanted 0 < top_p <= 1")
    if not 0 < options["repetition_penalty"] < float("inf"):
        raise ValueError(f"generate: repetition_penalty is {options['repetition_penalty']}; wanted a number above 0")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("generate: top_k and top_p choose among samples; set a temperature above 0")


@overload
def generate(model: nn.Module, prompts: Sequence[int], **options: Any) -> list[int]: ...
@overload
def generate(model: nn.Module, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]: ...
@torch.inference_mode()
def generate(
    model: nn.Module,
    prompts: Any,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = _FROM_CONFIG,
    seed: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> Any:
    """Returns the new tokens that continue a prompt: a list of ids, or for a list of prompts a list of such lists.

    Args:
        model: a Falcon; it is in evaluation mode while this runs, and as before after it.
        prompts: token ids, or a list of such lists of any lengths.
        max_new_tokens: at most so many per prompt.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and a token is drawn.
        top_k: draw among the k likeliest. top_p: draw among the shortest list of likeliest tokens of this total mass.
        repetition_penalty: above 1, tokens of the prompt or answer so far become less likely.
        eos_token_id: ends a row and is not returned; default: that of the model's config; None: rows never end early.
        seed: of the draws; PyTorch's global generators are not touched.
        on_token: called as on_token(row, token) for each new token, as it comes.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, more tokens than the context holds, or an option out
            of its range.

    Example:
        >>> config = qlite.FalconConfig(vocab_size=50, hidden_size=64, num_attention_heads=2, num_hidden_layers=2)
        >>> len(qlite.generate(qlite.Falcon(config), [1, 2, 3], max_new_tokens=4, eos_token_id=None))
        4
    """
    single = bool(prompts) and isinstance(prompts[0], int)
    rows = [list(prompts)] if single else [list(prompt) for prompt in prompts]
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
    _check(model, rows, max_new_tokens, options)
    if eos_token_id is _FROM_CONFIG:
        eos_token_id = model.config.eos_token_id  # type: ignore[union-attr]
    embedding = model.transformer.word_embeddings.weight  # type: ignore[union-attr]
    device, batch = embedding.device, len(rows)
    longest = max(len(row) for row in rows)
    ids = torch.zeros(batch, longest, dtype=torch.int64)
    mask = torch.zeros(batch, longest + max_new_tokens, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = True
    ids, mask = ids.to(device), mask.to(device)
    padded = any(len(row) != longest for row in rows)
    seen = torch.zeros(batch, model.config.vocab_size, dtype=torch.bool, device=device)  # type: ignore[union-attr]
    if repetition_penalty != 1.0:
        for i, row in enumerate(rows):
            seen[i, row] = True
    generator = torch.Generator(device).manual_seed(seed)
    cache = KVCache(model.config, batch, longest + max_new_tokens, device=device, dtype=embedding.dtype)  # type: ignore
    answers: list[list[int]] = [[] for _ in rows]
    running = [True] * batch
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for _ in range(max_new_tokens):
            visible = mask[:, : cache.length + ids.shape[1]] if padded else None
            hidden = model.hidden_states(ids, attention_mask=visible, cache=cache)[:, -1]  # type: ignore[operator]
            logits = _penalised(model.lm_head(hidden).float(), seen, repetition_penalty)  # type: ignore[operator]
            if temperature == 0:
                chosen = logits.argmax(dim=-1)
            else:
                # Relative to the likeliest, whose quotient is 0 and never infinite; 1e-38 is about float32's smallest.
                scaled = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-38)
                shares = _restricted(scaled, top_k, top_p).softmax(dim=-1)
                chosen = torch.multinomial(shares, 1, generator=generator)[:, 0]
            if repetition_penalty != 1.0:
                seen.scatter_(1, chosen[:, None], True)
            for i, token in enumerate(chosen.tolist()):
                running[i] = running[i] and token != eos_token_id
                if running[i]:
                    answers[i].append(token)
                    if on_token is not None:
                        on_token(i, token)
            if not any(running):
                break
            ids = chosen[:, None]
    finally:
        for module, training in modes:
            module.training = training
    return answers[0] if single else answers

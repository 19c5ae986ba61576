"""Tokens from a model: greedy or sampled, one prompt or a batch, with a key-value cache.

Prompts of different lengths are padded on the left and masked, so that each row sees what it would see alone. The choice of
the next token follows Holtzman et al. (arXiv 1904.09751) for top-p and Keskar et al. (arXiv 1909.05858, section 4.1) for
the repetition penalty.

Not done here: the steps themselves (decoding.py), guesses (prompt_lookup.py), beam search.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from qlite.decoding import decoder
from qlite.falcon import Falcon, FalconConfig
from qlite.prompt_lookup import MOST_GUESSES

_FROM_CONFIG: Any = object()


def _penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Returns float32 logits (B, V) in which the tokens `seen`, int64 (B, N), are less likely: divided above 0, multiplied
    below."""
    logits = logits.to(torch.float32, copy=True)
    scores = logits.gather(1, seen)
    # On either side of 0 that is the lower of the two, and with a penalty below 1 the higher.
    choice = torch.minimum if penalty > 1 else torch.maximum
    return logits.scatter_(1, seen, choice(scores / penalty, scores * penalty))


def _shares(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor | None]:
    """Returns what tokens of logits (B, V) are drawn in proportion to, float32 (B, N), and which they are, int64 (B, N), or
    None: all, in order. With top_k or top_p the likeliest come first, and the share is 0 outside the nucleus of mass top_p.

    The nucleus is the shortest list of the likeliest tokens whose probabilities reach top_p; the likeliest is always in.
    """
    tokens = None
    if top_p == 1:  # nothing is left out, where a rounded sum would reach 1 before the end
        top_p = None
    if top_k is not None:
        logits, tokens = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    if top_p is not None:
        if tokens is not None:  # of equal ones the first in the vocabulary comes first, with top_k and without
            tokens, order = tokens.sort(dim=-1)
            logits = logits.gather(-1, order)
        logits, order = logits.sort(dim=-1, descending=True, stable=True)
        tokens = order if tokens is None else tokens.gather(-1, order)
    logits = logits.float()
    # Relative to the likeliest, whose quotient is 0 and never infinite; 1e-38 is about float32's smallest.
    likeliest = logits.amax(dim=-1, keepdim=True) if tokens is None else logits[:, :1]
    shares = ((logits - likeliest) / max(temperature, 1e-38)).softmax(dim=-1)
    if top_p is not None:
        # What stands before a token, without the token: so the one that crosses top_p is kept.
        shares = shares.masked_fill(shares.cumsum(dim=-1) - shares >= top_p, 0.0)
    return shares, tokens


@dataclasses.dataclass(frozen=True)
class _Choice:
    """How the next token is chosen: the options of `generate`, and the draw."""

    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"generate: temperature is {self.temperature}; wanted 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"generate: top_k is {self.top_k}; wanted at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"generate: top_p is {self.top_p}; wanted 0 < top_p <= 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"generate: repetition_penalty is {self.repetition_penalty}; wanted a number above 0")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("generate: top_k and top_p choose among samples; set a temperature above 0")

    def draw(self, logits: Tensor, seen: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the chosen tokens, int64 (B, 1), from logits (B, V) and the tokens so far, int64 (B, N), some several times.

        Logits are many: what needs no pass over them has none, and those in 16 bits are compared as they are.
        """
        if self.repetition_penalty != 1:
            logits = _penalised(logits, seen, self.repetition_penalty)
        if logits.dtype == torch.float64:  # in which a tie would hang on the order of sums
            logits = logits.float()
        if self.temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        shares, tokens = _shares(logits, self.temperature, self.top_k, self.top_p)
        # The largest share over an exponential variate is a draw by shares; torch.multinomial does so too, but may look at its
        # argument from the host, which a recorded step cannot.
        variates = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
        if tokens is None:
            return (shares / variates).argmax(dim=-1, keepdim=True)
        return tokens.gather(-1, (shares / variates.gather(-1, tokens)).argmax(dim=-1, keepdim=True))


def _check(config: FalconConfig, prompts: list[list[int]], max_new_tokens: int, guesses: int, choice: _Choice) -> None:
    if not prompts:
        raise ValueError("generate: prompts is empty; wanted token ids, or a list of lists of them")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"generate: prompt {row} is empty; it needs at least one token")
        for token in prompt:
            if not isinstance(token, int) or not 0 <= token < config.vocab_size:
                raise ValueError(f"generate: prompt {row} has token {token!r}; the vocabulary is 0..{config.vocab_size - 1}")
    longest, context = max(len(prompt) for prompt in prompts), config.max_position_embeddings
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens is {max_new_tokens}; wanted at least 1")
    if longest + max_new_tokens > context:
        raise ValueError(
            f"generate: a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of {context}"
        )
    if not 0 <= guesses <= MOST_GUESSES:
        raise ValueError(f"generate: prompt_lookup is {guesses}; wanted 0 (no guesses) to {MOST_GUESSES}")
    if guesses and choice.temperature:
        raise ValueError(f"generate: prompt_lookup is for greedy answers; the temperature is {choice.temperature}")
    if guesses and len(prompts) > 1:
        raise ValueError(f"generate: prompt_lookup is for one prompt at a time; there are {len(prompts)}")


@overload
def generate(model: Falcon, prompts: Sequence[int], **options: Any) -> list[int]: ...
@overload
def generate(model: Falcon, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]: ...
def generate(  # pyright: ignore[reportInconsistentOverload]  # the overloads leave the options to it
    model: Falcon,
    prompts: Any,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = _FROM_CONFIG,
    seed: int = 0,
    prompt_lookup: int = 0,
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
        eos_token_id: ends a row and is not returned, or several that do; default: that of the model's config; None: rows
            never end early.
        seed: of the draws; PyTorch's global generators are not touched.
        prompt_lookup: guess so many tokens a step from the text so far and check them in one pass: for one prompt, greedy.
            The tokens are the same, but where two are as likely as rounding can tell: a pass of several rows may be rounded
            otherwise than one of a single row.
        on_token: called as on_token(row, token) for each new token, as it comes.

    Raises:
        TypeError: prompts is no list. ValueError: an empty prompt, a token outside the vocabulary, more tokens than the
            context holds, or an option out of its range.

    Example:
        >>> config = qlite.FalconConfig(vocab_size=50, hidden_size=64, num_attention_heads=2, num_hidden_layers=2)
        >>> len(qlite.generate(qlite.Falcon(config), [1, 2, 3], max_new_tokens=4, eos_token_id=None))
        4
    """
    if not isinstance(prompts, (list, tuple)):
        raise TypeError(f"generate: prompts is {type(prompts).__name__}; wanted a list of token ids, or a list of such lists")
    single = bool(prompts) and not isinstance(prompts[0], (list, tuple))
    rows = [list(prompts)] if single else [list(prompt) for prompt in prompts]
    choice = _Choice(temperature, top_k, top_p, repetition_penalty)
    _check(model.config, rows, max_new_tokens, prompt_lookup, choice)
    if eos_token_id is _FROM_CONFIG:
        eos_token_id = model.config.eos_token_id
    ends = frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or ())
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        answers = _answers(model, rows, max_new_tokens, choice, ends, seed, prompt_lookup, on_token)
    finally:
        for module, training in modes:
            module.training = training
    return answers[0] if single else answers


@torch.inference_mode()
def _answers(
    model: Falcon,
    rows: list[list[int]],
    max_new_tokens: int,
    choice: _Choice,
    ends: frozenset[int],
    seed: int,
    guesses: int,
    on_token: Callable[[int, int], None] | None,
) -> list[list[int]]:
    """Returns the new tokens of each row."""
    longest, batch = max(len(row) for row in rows), len(rows)
    ids = torch.zeros(batch, longest, dtype=torch.int64)
    real = torch.zeros(batch, longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row)
        real[i, longest - len(row) :] = True
    answers: list[list[int]] = [[] for _ in rows]
    running = [True] * batch

    def take(tokens: list[int]) -> bool:
        """Whether a row goes on after the tokens of a step."""
        for i, token in enumerate(tokens):
            running[i] = running[i] and token not in ends
            if running[i]:
                answers[i].append(token)
                if on_token is not None:
                    on_token(i, token)
        return any(running)

    with decoder(model, batch, longest + max_new_tokens, choice, guesses) as steps:
        going, left = take(steps.prefill(ids, real, seed)), max_new_tokens - 1
        while going and left:
            for tokens in steps.steps(left)[:left]:
                left -= 1
                going = going and take(tokens)
    return answers

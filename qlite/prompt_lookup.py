"""Guesses at the next tokens from the text so far, all checked in one pass: several tokens for one reading of the weights.

What came after the last tokens when they came before is guessed to come again, as in a quotation, a list or a form. The pass
over the last token and the guesses gives the likeliest token after each of them; the guesses are right up to the first that
is another than this, and so the tokens are those of one pass each. Speculative decoding (Leviathan et al., arXiv 2211.17192)
whose draft is the prompt itself (Saxena, "Prompt Lookup Decoding", 2023).

Every shape is fixed, and nothing here waits for the host: the pass, the check and the next guesses are one recorded step.

Not done here: sampling, several rows (they would advance by different numbers of tokens), a draft model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qlite.falcon import Falcon, KVCache

#: Tokens that are looked for: where no place has so many in common with the end of the text, one with fewer will do.
LONGEST_MATCH = 3
#: The most guesses: with one token more they are 64 rows, up to which reading the weights takes most of the time of a pass.
MOST_GUESSES = 63


def guess(text: Tensor, last: Tensor, count: int) -> Tensor:
    """Returns what is guessed to follow, int64 (count,): what followed the latest of the best matches of the end of the text.

    A match whose continuation runs into the end of the text is taken to go on in a circle; without a match it is the last
    token again.

    Args:
        text: int64 (L,), tokens, of which those after `last` do not count. last: int64 (1,), the place of the last one.
    """
    places = torch.arange(len(text), device=text.device)
    back = torch.arange(1, 1 + LONGEST_MATCH, device=text.device)[:, None]
    before, end = places - back, last + 1 - back
    agree = (text[before.clamp(min=0)] == text[end.clamp(min=0)]) & (before >= 0)
    common = agree.cumprod(dim=0).sum(dim=0)  # tokens, up to the first that differs
    score = (common * len(text) + places).masked_fill(places > last, -1)
    start = score.argmax(dim=0, keepdim=True)
    return text.index_select(0, start + places[:count] % (last + 1 - start))


def hidden_after(model: Falcon, ids: Tensor, places: Tensor, rotary: Tensor | None, cache: KVCache) -> Tensor:
    """Returns the final normed hidden states (T, hidden) of T more tokens of one row, each seeing those up to itself.

    Args:
        ids: int64 (T,), the tokens. places: int64 (T,), where in the cache they are put, one after the other; what it holds
            up to there is the text before them, without padding. `cache.length` is not looked at.
        rotary: (2, T, D/2), cos and sin of those places; None with ALiBi.
    """
    x = model.transformer.word_embeddings(ids[None])
    everywhere = torch.arange(cache.max_length, device=ids.device)
    hidden = everywhere > places[:, None]
    if rotary is None:
        tables, mask = None, model._alibi(everywhere[None], x.dtype)
    else:
        tables, mask = rotary[:, None].unbind(), torch.zeros_like(hidden, dtype=x.dtype)[None, None]
    mask = mask.masked_fill(hidden, -math.inf)
    for block in model.transformer.h:
        x = block(x, tables, mask, cache, places)
    return model.transformer.ln_f(x)[0]


def texts(text: Tensor, ids: Tensor, places: Tensor) -> Tensor:
    """Returns the text up to each of T tokens, int64 (T, L), with tokens of it again where it ends.

    What is chosen after a guess stands only if all guesses up to it are right: they are the text before it, and what is chosen
    after one token need not be known for the next.

    Args:
        text: int64 (L,), whatever there is at `places` and after. ids, places: as in `hidden_after`.
    """
    there = torch.arange(len(text), device=text.device) <= places[:, None]
    return torch.where(there, text.index_copy(0, places, ids), text[0])


def standing(chosen: Tensor, guesses: Tensor) -> Tensor:
    """Returns how many tokens stand, int64 (1,): the first, and one more for each guess before the first wrong one.

    Args:
        chosen: int64 (T,), after the last token and after each guess. guesses: int64 (T - 1,).
    """
    return 1 + (chosen[:-1] == guesses).cumprod(dim=0).sum(dim=0, keepdim=True)

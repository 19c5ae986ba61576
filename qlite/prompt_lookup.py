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
from collections.abc import Callable

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
    common, agree = torch.zeros_like(text), places <= last
    for back in range(LONGEST_MATCH):
        wanted = text.index_select(0, (last - back).clamp(min=0))
        agree = agree & (text.roll(back + 1) == wanted) & (places > back)  # of roll, what comes round from the end is not meant
        common += agree
    score = (common * len(text) + places).masked_fill(places > last, -1)
    start = score.argmax(dim=0, keepdim=True)
    return text.index_select(0, start + places[:count] % (last + 1 - start))


def hidden_after(model: Falcon, ids: Tensor, places: Tensor, cache: KVCache) -> Tensor:
    """Returns the final normed hidden states (T, hidden) of T more tokens of one row, each seeing those up to itself.

    Args:
        ids: int64 (T,), the tokens. places: int64 (T,), where in the cache they are put, one after the other; what it holds
            up to there is the text before them, without padding. `cache.length` is not looked at.
    """
    x = model.transformer.word_embeddings(ids[None])
    everywhere = torch.arange(cache.max_length, device=ids.device)
    hidden = everywhere > places[:, None]
    if model.config.alibi:
        rotary, mask = None, model._alibi(everywhere[None], x.dtype)
    else:
        rotary, mask = model._rotary(places[None], x.dtype), torch.zeros_like(hidden, dtype=x.dtype)[None, None]
    mask = mask.masked_fill(hidden, -math.inf)
    for block in model.transformer.h:
        x = block(x, rotary, mask, cache, places)
    return model.transformer.ln_f(x)[0]


def check(logits: Tensor, guesses: Tensor, seen: Tensor, choose: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the tokens chosen after the last token and after each guess, int64 (T,), and how many of them stand, int64 (1,):
    the first, and one more for each guess before the first wrong one.

    Args:
        logits: float32 (T, V). guesses: int64 (T - 1,). seen: bool (1, V), the tokens of the text; those that stand are added.
        choose: (logits (1, V), seen) -> the chosen token, int64 (1,).
    """
    stands, chosen = torch.ones(1, dtype=torch.bool, device=logits.device), []
    number = torch.zeros(1, dtype=torch.int64, device=logits.device)
    for row in range(len(logits)):
        if row:
            stands = stands & (chosen[-1] == guesses[row - 1])
        token = choose(logits[row : row + 1], seen)
        seen.scatter_(1, token[:, None], seen.gather(1, token[:, None]) | stands)
        number += stands
        chosen.append(token)
    return torch.cat(chosen), number

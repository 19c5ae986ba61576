"""The next tokens, one step at a time over a cache of fixed size: a step has the same shapes every time, so it can be recorded.

On a GPU a step is some hundred launches of microseconds, for which Python takes thirty times as long as they do. The first step
of a decoder runs as usual, the others are replays of a CUDA graph; the choice of the token is part of it, and the host reads
tokens CHUNK at a time. The decoders of the last calls are kept, with their graphs, until the model goes or is trained by
`finetune`; a call like one of those uses its decoder again if the model's tensors are where they were.

A step may also be one over guesses at the next tokens (prompt_lookup.py), of which it gives those that are right.

Not done here: a cache in pages.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlite import prompt_lookup, token_step
from qlite.falcon import Falcon, KVCache
from qlite.graphs import RECORDING, capture_stream, why_not

#: Steps between two looks of the host at the tokens, on a GPU. A row that has ended meanwhile goes on for nothing.
CHUNK = 8
#: The cache holds a multiple of so many tokens, for the next call to find it long enough.
LENGTHS = 256
#: Decoders that are kept for a model, at most, and bytes of their caches and recordings together; one of more is kept alone.
MOST_KEPT, KEPT_BYTES = 4, 2**28
#: Tokens of a prompt, those of all rows together, that go through the model at a time: in Falcon-7B some two activations of
#: 18,176 features and eight of 4,544 each, 1.2 GB in 16 bits. The products have long reached their speed.
PREFILL = 8192

#: (logits (B, V), the tokens so far int64 (B, N), some of them several times, generator) -> the chosen tokens, int64 (B, 1).
Draw = Callable[[Tensor, Tensor, torch.Generator], Tensor]


class Decoder:
    """Prompts in, tokens out; rows of a batch side by side. Its memory is that of the cache and of a graph.

    Args:
        model: in evaluation mode at each call. batch: rows. length: tokens that a row may have, prompt and answer, and as
            many more as are guessed.
        draw: chooses the tokens; the same for the decoder's life.
        guesses: how many tokens each step guesses; above 0 for a single row, and a draw that takes the likeliest.
    """

    def __init__(self, model: Falcon, batch: int, length: int, draw: Draw, guesses: int = 0):
        embedding = model.transformer.word_embeddings.weight
        device = embedding.device
        self.model, self.draw, self.guesses = weakref.ref(model), draw, guesses
        self.recordable = device.type == "cuda" and why_not(model) is None
        self.few_launches = token_step.fits(model)
        self.chunk = CHUNK if device.type == "cuda" else 1
        self.cache = KVCache(model.config, batch, length, device=device, dtype=embedding.dtype)
        self.generator = torch.Generator(device)
        # The prompts and what came so far; the place of the last token, and its position in each row, which padding does not
        # count for: views of one tensor, for one launch to move them on.
        self.text = torch.zeros(batch, length, dtype=torch.int64, device=device)
        self.places = torch.zeros(1 + batch, dtype=torch.int64, device=device)
        self.at, self.positions = self.places[:1], self.places[1:]
        self.read = 0  # so many places of the text are known to the host
        self.visible = torch.zeros(batch, length, dtype=torch.bool, device=device)
        self.ahead = torch.arange(1 + guesses, device=device)
        self.rotary = None if model.config.alibi else model.rotary_table(length)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False
        self.nbytes = self.cache.keys.nbytes + self.cache.values.nbytes  # and what a recording takes, once there is one

    def prefill(self, ids: Tensor, real: Tensor, seed: int) -> list[int]:
        """Returns the first new token of each row.

        Args:
            ids: int64 (B, T), padded on the left. real: bool (B, T), False at padding. seed: of the draws.
        """
        model, length = self._model(), ids.shape[1]
        self.generator.manual_seed(seed)
        self.cache.length = 0
        for kept in (self.cache.keys, self.cache.values):
            kept.zero_()  # what is masked is multiplied by zero all the same, and NaN times zero is NaN
        padded = not bool(real.all())
        ids, real = ids.to(self.text.device), real.to(self.text.device)
        hidden = self._through(model, ids, real if padded else None)
        self.visible.fill_(True)
        self.visible[:, :length] = real
        # Where a row has no token, or none yet, one of its tokens stands again: so the text holds what was seen, and no more.
        self.text.copy_(ids[:, -1:])
        self.text[:, :length] = torch.where(real, ids, ids[:, -1:])
        self.at.fill_(length)
        self.positions.copy_(real.sum(dim=1))
        self.read = length
        self._choose(hidden)
        return self._read()[0]

    def _through(self, model: Falcon, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the hidden states (B, hidden) after a prompt, ids (B, T), that goes through the model piece by piece."""
        length = ids.shape[1]
        pieces = -(-length // max(1, PREFILL // len(ids)))
        ends = [length * (piece + 1) // pieces for piece in range(pieces)]
        masks = [None if mask is None else mask[:, :end] for end in ends]
        found = [
            model.hidden_states(ids[:, start:end], attention_mask=seen, cache=self.cache)[
                :, -1
            ].clone()  # of all the rest no view
            for start, end, seen in zip([0, *ends], ends, masks)
        ]
        return found[-1]

    def steps(self, left: int) -> list[list[int]]:
        """Returns the next tokens, lists of a row each: at least one, and more than `left` of them by `guesses` at most."""
        for _ in range(max(1, min(self.chunk, left // (1 + self.guesses)))):
            if self.graph is None and self.warm and self.recordable:
                self._record()
            if self.graph is None:
                self._step()
                self.warm = True
            else:
                self.graph.replay()
        return self._read()

    def _model(self) -> Falcon:
        model = self.model()
        assert model is not None
        return model

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        device = self.text.device
        with RECORDING:
            before = torch.cuda.memory_reserved(device)
            # Other threads may go on meanwhile.
            with torch.cuda.graph(graph, stream=capture_stream(device), capture_error_mode="thread_local"):
                self._step()
            self.nbytes += max(0, torch.cuda.memory_reserved(device) - before)  # which are the graph's own
        self.graph = graph

    def _step(self) -> None:
        model = self._model()
        if self.guesses:
            self._step_over_guesses(model)
            return
        next_hidden = token_step.next_hidden if self.few_launches else type(model).next_hidden
        ids = self.text.index_select(1, self.at)
        hidden = next_hidden(model, ids, self._angles(self.positions), self.visible, self.cache, self.at)
        self.places.add_(1)
        self._choose(hidden)

    def _step_over_guesses(self, model: Falcon) -> None:
        text, places = self.text[0], self.at + self.ahead
        guesses = prompt_lookup.guess(text, self.at, self.guesses)
        ids = torch.cat((text.index_select(0, self.at), guesses))
        hidden = prompt_lookup.hidden_after(model, ids, places, self._angles(places), self.cache)
        chosen = self.draw(model.lm_head(hidden), prompt_lookup.texts(text, ids, places), self.generator)
        # What does not stand is written over by the next step, here and in the cache.
        self.text.index_copy_(1, places + 1, chosen.T)
        self.at.add_(prompt_lookup.standing(chosen[:, 0], guesses))

    def _angles(self, positions: Tensor) -> Tensor | None:
        """Returns cos and sin of the rotary angles at positions (N,), (2, N, D/2); None with ALiBi."""
        return None if self.rotary is None else self.rotary.index_select(1, positions)

    def _choose(self, hidden: Tensor) -> None:
        self.text.index_copy_(1, self.at, self.draw(self._model().lm_head(hidden), self.text, self.generator))

    def _read(self) -> list[list[int]]:
        """Returns the tokens that came since the host last looked, lists of one for each row."""
        rows, most = len(self.text), self.chunk * (1 + self.guesses)
        latest = self.text[:, self.read : self.read + most]
        at, *found = torch.cat((self.at, latest.T.flatten())).tolist()  # one wait for both
        count, self.read = at + 1 - self.read, at + 1
        return [found[rows * step : rows * (step + 1)] for step in range(count)]


#: For each model its decoders by what they are known by, the one that was used last at the end.
_KEPT: weakref.WeakKeyDictionary[Falcon, dict[Any, Decoder]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


@contextlib.contextmanager
def decoder(model: Falcon, batch: int, length: int, choice: Any, guesses: int = 0) -> Iterator[Decoder]:
    """A decoder for at least `length` tokens a row: one of an earlier call where it still fits.

    It is nobody else's meanwhile: a call from another thread, or from within, makes its own. It is kept afterwards if nothing
    was raised.

    Args:
        choice: hashable, with a method `draw`; decoders of equal choices are alike. guesses: as a Decoder's.
    """
    length += guesses
    signature = (batch, choice, guesses, why_not(model), model.config, *_autocast(model), *_tensors(model), *_modules(model))
    with _LOCK:
        found = _KEPT.get(model, {}).pop(signature, None)
    if found is None or found.cache.max_length < length:
        del found  # before another takes as much
        length = min(max(model.config.max_position_embeddings, length), -(-length // LENGTHS) * LENGTHS)
        config, size = model.config, model.transformer.word_embeddings.weight.element_size()
        with _LOCK:
            needed = 2 * config.num_hidden_layers * batch * config.kv_heads * length * config.head_dim * size
            _make_room(_KEPT.get(model, {}), needed)
        found = Decoder(model, batch, length, choice.draw, guesses)
    yield found
    if found.recordable:
        with _LOCK:
            kept = _KEPT.setdefault(model, {})
            other = kept.pop(signature, found)  # of a call from within, or beside this one
            if other.cache.max_length > found.cache.max_length:
                found = other
            _make_room(kept, found.nbytes)
            kept[signature] = found


def _make_room(kept: dict[Any, Decoder], size: int) -> None:
    """Frees the decoders that were used longest ago, until there is room for one more, of so many bytes."""
    while kept and (len(kept) >= MOST_KEPT or sum(decoder.nbytes for decoder in kept.values()) + size > KEPT_BYTES):
        del kept[next(iter(kept))]


def forget(model: nn.Module) -> None:
    """Frees what is kept for a model: the caches and the recordings of its last calls."""
    with _LOCK:
        _KEPT.pop(model, None)  # type: ignore[call-overload]


def _autocast(model: Falcon) -> tuple[bool, torch.dtype]:
    kind = model.transformer.word_embeddings.weight.device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


# What a recording has written into it: addresses, and the numbers that modules hold in Python.


def _tensors(model: nn.Module) -> list[tuple]:
    return [(t.data_ptr(), t.shape, t.dtype) for t in (*model.parameters(), *model.buffers())]


def _modules(model: nn.Module) -> list[tuple]:
    return [(id(m), getattr(m, "scaling", None), getattr(m, "eps", None)) for m in model.modules()]

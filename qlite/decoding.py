"""The next tokens, one step at a time over a cache of fixed size: a step has the same shapes every time, so it can be recorded.

On a GPU a step is some hundred launches of microseconds, for which Python takes thirty times as long as they do. The first step
of a decoder runs as usual, the others are replays of a CUDA graph; the choice of the token is part of it, and the host reads
tokens CHUNK at a time. The decoder of the last call is kept, with its graph, for as long as the model lives and its tensors
stay where they are.

Not done here: speculative decoding, a cache in pages, more than one decoder a model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlite.falcon import Falcon, KVCache
from qlite.graphs import why_not

#: Steps between two looks of the host at the tokens, on a GPU. A row that has ended meanwhile goes on for nothing.
CHUNK = 8
#: The cache holds a multiple of so many tokens, for the next call to find it long enough.
LENGTHS = 256

#: (logits float32 (B, V), tokens seen so far bool (B, V), generator) -> the chosen tokens, int64 (B,).
Draw = Callable[[Tensor, Tensor, torch.Generator], Tensor]


class Decoder:
    """Prompts in, tokens out; rows of a batch side by side. Its memory is that of the cache and of a graph.

    Args:
        model: in evaluation mode at each call. batch: rows. length: tokens that a row may have, prompt and answer.
        draw: chooses the tokens; the same for the decoder's life.

    Attributes:
        chunk: how many `steps` to ask for at a time.
    """

    def __init__(self, model: Falcon, batch: int, length: int, draw: Draw):
        embedding = model.transformer.word_embeddings.weight
        device = embedding.device
        self.model, self.draw = weakref.ref(model), draw
        self.recordable = device.type == "cuda" and why_not(model) is None
        self.chunk = CHUNK if device.type == "cuda" else 1
        self.cache = KVCache(model.config, batch, length, device=device, dtype=embedding.dtype)
        self.generator = torch.Generator(device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        self.positions = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.visible = torch.zeros(batch, length, dtype=torch.bool, device=device)
        self.seen = torch.zeros(batch, model.config.vocab_size, dtype=torch.bool, device=device)
        self.tokens = torch.zeros(batch, CHUNK, dtype=torch.int64, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False

    def prefill(self, ids: Tensor, real: Tensor, seed: int) -> list[int]:
        """Returns the first new token of each row.

        Args:
            ids: int64 (B, T), padded on the left. real: bool (B, T), False at padding. seed: of the draws.
        """
        model, length = self._model(), ids.shape[1]
        self.generator.manual_seed(seed)
        self.cache.length = 0
        mask = None if bool(real.all()) else real.to(self.ids.device)
        ids = ids.to(self.ids.device)
        hidden = model.hidden_states(ids, attention_mask=mask, cache=self.cache)[:, -1]
        real = real.to(self.ids.device)
        self.visible.zero_()
        self.visible[:, :length] = real
        self.seen.zero_().scatter_(1, ids, True)
        self.seen[:, 0] = ((ids == 0) & real).any(dim=1)  # token 0 is what padding is made of
        self.at.fill_(length)
        self.positions.copy_(real.sum(dim=1, keepdim=True))
        self._choose(hidden)
        return self._read(1)[0]

    def steps(self, count: int) -> list[list[int]]:
        """Returns the next tokens, a list of rows for each of `count` steps, up to CHUNK of them."""
        for _ in range(count):
            if self.graph is None and self.warm and self.recordable:
                self._record()
            if self.graph is None:
                self._step()
                self.warm = True
            else:
                self.graph.replay()
        return self._read(count)

    def _model(self) -> Falcon:
        model = self.model()
        assert model is not None
        return model

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with torch.cuda.device(self.ids.device), torch.cuda.graph(graph):
            self._step()
        self.graph = graph

    def _step(self) -> None:
        model = self._model()
        self.visible.index_fill_(1, self.at, True)
        hidden = model.next_hidden(self.ids, self.positions, self.visible, self.cache, self.at)
        self.at.add_(1)
        self.positions.add_(1)
        self._choose(hidden)

    def _choose(self, hidden: Tensor) -> None:
        chosen = self.draw(self._model().lm_head(hidden).float(), self.seen, self.generator)[:, None]
        self.seen.scatter_(1, chosen, True)
        self.ids.copy_(chosen)
        self.tokens.index_copy_(1, self.count, chosen)
        self.count.add_(1)

    def _read(self, count: int) -> list[list[int]]:
        found = self.tokens[:, :count].T.tolist()
        self.count.zero_()
        return found


_KEPT: weakref.WeakKeyDictionary[Falcon, tuple[Any, Decoder]] = weakref.WeakKeyDictionary()


def decoder(model: Falcon, batch: int, length: int, choice: Any) -> Decoder:
    """Returns a decoder for at least `length` tokens a row, that of the last call where it still fits.

    Args:
        choice: hashable, with a method `draw`; decoders of equal choices are alike.
    """
    # What a graph has written into it: addresses, and the numbers that modules hold in Python.
    signature = (batch, choice, *_tensors(model), *_modules(model))
    kept = _KEPT.get(model)
    if kept is not None and kept[0] == signature and kept[1].cache.max_length >= length:
        return kept[1]
    _KEPT.pop(model, None)
    context = model.config.max_position_embeddings
    made = Decoder(model, batch, min(max(context, length), -(-length // LENGTHS) * LENGTHS), choice.draw)
    if made.recordable:
        _KEPT[model] = signature, made
    return made


def _tensors(model: nn.Module) -> list[tuple]:
    return [(t.data_ptr(), t.shape, t.dtype) for t in (*model.parameters(), *model.buffers())]


def _modules(model: nn.Module) -> list[tuple]:
    return [(id(module), getattr(module, "scaling", None)) for module in model.modules()]

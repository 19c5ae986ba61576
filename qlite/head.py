"""The output layer in 8 or 4 bits, and what that costs, measured: `quantize_head`.

A step from one token to the next reads every weight once, and of Falcon-7B's in 4 bits the head in 16 is a seventh. It is kept
dense by default because its error goes straight into the logits. Where the head is the embedding (a tied weight), the
embedding stays as it is, since a lookup reads one row of it, and the head becomes an encoded copy: the model is larger then.

Not done here: encoded embeddings; models other than Falcon, whose head is encoded by `quantize_model(model, skip=())` where it
is a linear layer with a weight of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlite.falcon import Falcon
from qlite.linear import Linear8bit, QuantizedLinear
from qlite.switching import adapters_of

#: Rows and tokens that the error is measured on where none are given.
MEASURED = 4, 64


@dataclasses.dataclass(frozen=True)
class HeadReport:
    """What `quantize_head` did; `print` it.

    Attributes:
        options: of the encoded layer, as in its `config()`. before, after: bytes of the head.
        tied: whether it was the embedding, which stays.
        tokens: how many places the logits were compared at. error: norm of the difference over that of the dense logits.
        largest: absolute difference. changed: places where another token is the likeliest.
    """

    options: dict[str, Any]
    before: int
    after: int
    tied: bool
    tokens: int
    error: float
    largest: float
    changed: int

    def __str__(self) -> str:
        before, after = f"{self.before / 1e6:,.1f} MB", f"{self.after / 1e6:,.1f} MB"
        size = f"{after} beside the embedding's {before}, which it was" if self.tied else f"{before} -> {after}"
        return (
            f"head in {self.options['format']}: {size}; after {self.tokens} tokens its logits differ by "
            f"{100 * self.error:.2g} % in norm and {self.largest:.2g} at most, and another token is the likeliest after "
            f"{self.changed}"
        )


def _measured(model: Falcon, tokens: Tensor | None) -> Tensor:
    """Returns final hidden states (N, hidden) of some tokens: those given, or random ones."""
    if tokens is None:
        rows, length = MEASURED
        shape = rows, min(length, model.config.max_position_embeddings)
        tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    training = model.training
    hidden = model.eval().hidden_states(tokens.to(model.transformer.word_embeddings.weight.device))
    model.train(training)
    return hidden.flatten(0, 1)


@torch.no_grad()
def quantize_head(
    model: Falcon, kind: Callable[..., QuantizedLinear] = Linear8bit, *, tokens: Tensor | None = None
) -> HeadReport:
    """Returns a report, having encoded the model's output layer, in place, and compared its logits before and after.

    The weight is encoded as the model holds it. A tied head becomes a layer of its own, and the model's config says so.

    Args:
        model: a Falcon with its weights, whose head is dense and not trained.
        kind: Linear8bit, Linear4bit, or functools.partial of one.
        tokens: int64 (B, T), the text that the logits are compared on; None: 4 rows of 64 random tokens.

    Raises:
        ValueError: the head is encoded already, carries an adapter, is trained, or is on meta; the model is unchanged.

    Example:
        >>> from qlite.data import ASSETS
        >>> model = qlite.load_falcon(ASSETS / "tiny-falcon", quantize=qlite.Linear4bit)
        >>> report = qlite.quantize_head(model)
        >>> report.options, report.error < 0.05
        ({'format': 'int8'}, True)
    """
    head, embedding = model.lm_head, model.transformer.word_embeddings
    if not isinstance(head, nn.Linear):
        raise ValueError(f"quantize_head: lm_head is a {type(head).__name__}; wanted a dense layer: encode it before add_lora")
    weight = head.weight
    if weight.is_meta:
        raise ValueError("quantize_head: lm_head is on meta, without values; load the model first")
    tied = weight is embedding.weight
    if "lm_head" in adapters_of(model).originals:
        raise ValueError("quantize_head: lm_head is trained whole by the adapter in use, and an encoded weight cannot be")
    encoded = kind(head.in_features, head.out_features, bias=False, device="meta", dtype=weight.dtype)
    encoded.quantize_(weight.detach()).train(head.training)
    hidden = _measured(model, tokens)
    dense, found = head(hidden).float(), encoded(hidden).float()
    difference = found - dense
    model.lm_head = encoded  # type: ignore[assignment]
    if tied:
        model.config = dataclasses.replace(model.config, tie_word_embeddings=False)
    return HeadReport(
        encoded.config(), weight.nbytes, encoded.encoded_bytes(), tied, len(hidden),
        error=(difference.norm() / dense.norm().clamp(min=torch.finfo(torch.float32).tiny)).item(),
        largest=difference.abs().max().item(), changed=int((found.argmax(dim=1) != dense.argmax(dim=1)).sum()),
    )  # fmt: skip

"""What four bits add to the loss of the packaged tiny base on text that it was not trained on, by format.

    python -m benchmarks.quantization_loss    # a CPU, some minutes

Held-out text of the base's corpus, of two kinds: modules and documentation of Python's standard library (of the Python that
runs this), and made-up support articles about places that are not in the training text. In windows of 256 tokens, each scored
by the dense model and by that of each format. The gap is the mean difference to dense, in nats a token. "Share" is a format's
gap over that of NF4 on the same windows, its interval of 2,000 bootstrap samples of windows, 2.5 to 97.5 %.

Where NF4 has no gap to share there is no share: on the support articles, whose loss hangs on names that the model never saw,
the gap does not follow the error of a format, and NF4's is below zero.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys

import torch
from torch import Tensor

import qlite
from benchmarks.common import record, table
from qlite.data import ASSETS

WINDOW, BATCH, SAMPLES = 256, 16, 2000
FORMATS: dict[str, dict] = {
    "nf4": {},
    "nf4 searched": {"search": True},
    "ls4 searched": {"levels": "ls4", "search": True},
    "nf4 blocks of 32": {"block_size": 32},
    "fp4": {"levels": "fp4"},
}


def held_out_windows(count: int) -> dict[str, Tensor]:
    """Returns for each kind of text its first windows, int64 (count or fewer, WINDOW + 1)."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
    import tiny_base_corpus
    import train_tiny_base

    tokenizer = qlite.load_tokenizer(ASSETS / "tiny-falcon")
    parts = tiny_base_corpus.documentation_and_code()
    kept_out = [(prose, source) for prose, source in parts if train_tiny_base.held_out(source or prose[0])]
    library = [text for prose, source in kept_out for text in (*prose, source) if text]
    found = {"library": library, "support": tiny_base_corpus.support(0)[1]}
    rows = {name: train_tiny_base.encode(tokenizer, documents).long() for name, documents in found.items()}
    return {name: row.unfold(0, WINDOW + 1, WINDOW)[:count] for name, row in rows.items()}


@torch.no_grad()
def losses(model: qlite.Falcon, ids: Tensor) -> Tensor:
    """Returns the mean loss of each window (n, WINDOW + 1), float64 (n,), in nats a token."""
    found = []
    for part in ids.split(BATCH):
        logits = model.eval()(part[:, :-1]).transpose(1, 2)
        found.append(torch.nn.functional.cross_entropy(logits, part[:, 1:], reduction="none").double().mean(dim=1))
    return torch.cat(found)


def share(gap: Tensor, reference: Tensor) -> dict[str, float]:
    """Returns the share of two paired gaps, (n,) each, and where it lies in 95 % of bootstrap samples; {} without a gap."""
    chosen = torch.randint(len(gap), (SAMPLES, len(gap)), generator=torch.Generator().manual_seed(0))
    below = reference[chosen].mean(dim=1)
    if (below <= 0).double().mean() > 0.025:
        return {}
    low, high = (gap[chosen].mean(dim=1) / below).quantile(torch.tensor([0.025, 0.975], dtype=gap.dtype)).tolist()
    return {"share": round((gap.mean() / reference.mean()).item(), 3), "share_low": round(low, 3), "share_high": round(high, 3)}


def main() -> None:
    """Measures every format on both kinds of text, and records a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=600, help="of each kind of text, at most")
    options = parser.parse_args()
    load = functools.partial(qlite.load_falcon, ASSETS / "tiny-falcon", dtype=torch.float32)
    models = {name: load(quantize=functools.partial(qlite.Linear4bit, **arguments)) for name, arguments in FORMATS.items()}
    lines = []
    for text, ids in held_out_windows(options.windows).items():
        dense = losses(load(), ids)
        gaps = {name: losses(model, ids) - dense for name, model in models.items()}
        for name, gap in gaps.items():
            row = {"format": name, "text": text, "windows": len(ids), "dense_loss": round(dense.mean().item(), 5)}
            row |= {"gap": round(gap.mean().item(), 6), **share(gap, gaps["nf4"])}
            record("quantization_loss", row, show=False)
            lines.append(
                [row.get(key, "-") for key in ("text", "format", "windows", "gap", "share", "share_low", "share_high")]
            )
    print(table(("text", "format", "windows", "gap", "share", "from", "to"), lines))


if __name__ == "__main__":
    main()

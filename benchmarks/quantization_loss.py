"""What four bits add to the loss of trained models on text that they were not trained on, by format.

    python -m benchmarks.quantization_loss                               # the packaged tiny base; a CPU, 15 minutes
    python -m benchmarks.quantization_loss --model small --seconds 60    # 30 million parameters, trained first; a GPU
    python -m benchmarks.quantization_loss --plot loss.png [--plot-only]

Held-out text of two kinds. "library": for the tiny base, modules and documentation of Python's standard library; for "small"
and "medium", which benchmarks/bases.py trains on bytes, Python files of the standard library, torch and numpy. "support":
made-up support articles about two places; the tiny base has read of other places, the others no article at all. Windows of
512 tokens at equal distances, each scored in float32 (TensorFloat-32 on a GPU) by the dense model and by that of each format.

One encoding of one model is one draw of rounding errors: where they happen to point along the gradient of the loss they change
it more than their size tells, up or down. So a model is encoded several times, its features in another order each time, which
changes nothing but what shares a block (`bases.reordered`). The gap is the mean difference to dense over draws and windows, in
nats a token; `gap_draws` has that of each draw. "Share" is a format's gap over that of NF4, of the same draws and windows; its
interval is 2.5 to 97.5 % of 2,000 bootstrap samples of both. Where NF4 has no gap to share there is no share.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import pathlib

import torch
from torch import Tensor

import qlite
from benchmarks import bases, loss_plot
from benchmarks.bases import train_tiny_base
from benchmarks.common import RESULTS, record, table

WINDOW, BATCH, SAMPLES = train_tiny_base.LENGTH, 8, 2000
FORMATS: dict[str, dict] = {
    "nf4": {},
    "nf4 searched": {"search": True},
    "ls4 searched": {"levels": "ls4", "search": True},
    "nf4 blocks of 32": {"block_size": 32},
    "fp4": {"levels": "fp4"},
}


def windows(row: Tensor, count: int) -> Tensor:
    """Returns windows of a row of ids, at equal distances, (count or as many as there are, WINDOW + 1)."""
    found = row.unfold(0, WINDOW + 1, WINDOW)
    return found[torch.linspace(0, len(found) - 1, min(count, len(found))).long()]


@torch.no_grad()
def losses(model: qlite.Falcon, ids: Tensor) -> Tensor:
    """Returns the mean loss of each window (n, WINDOW + 1), float64 (n,), in nats a token."""
    found = []
    for part in ids.split(BATCH):
        logits = model.eval()(part[:, :-1]).float().flatten(0, 1)
        each = torch.nn.functional.cross_entropy(logits, part[:, 1:].flatten(), reduction="none")
        found.append(each.view(len(part), -1).double().mean(dim=1))
    return torch.cat(found)


def share(gap: Tensor, reference: Tensor) -> dict[str, float]:
    """Returns the share of two paired gaps, (draws, windows) each, and its interval of 95 %; {} where reference has no gap."""
    generator = torch.Generator().manual_seed(0)
    draws, windows = (torch.randint(size, (SAMPLES, size), generator=generator) for size in gap.shape)

    def means(of: Tensor) -> Tensor:
        """Returns the mean over the draws and windows of each sample."""
        return torch.stack([of[some].mean(dim=0)[chosen].mean() for some, chosen in zip(draws, windows)])

    below = means(reference)
    if (below <= 0).double().mean() > 0.025:
        return {}
    low, high = (means(gap) / below).quantile(torch.tensor([0.025, 0.975], dtype=gap.dtype)).tolist()
    return {"share": round((gap.mean() / reference.mean()).item(), 3), "share_low": round(low, 3), "share_high": round(high, 3)}


def gaps(model: qlite.Falcon, texts: dict[str, Tensor], dense: dict[str, Tensor], draws: int) -> dict[str, dict[str, Tensor]]:
    """Returns {text: {format: differences of loss to dense (draws, windows)}}."""
    found: dict[str, dict[str, list[Tensor]]] = {text: {form: [] for form in FORMATS} for text in texts}
    for draw in range(draws):
        ordered = bases.reordered(model, draw) if draw else model
        for form, options in FORMATS.items():
            encoded = copy.deepcopy(ordered)
            qlite.quantize_model(encoded, functools.partial(qlite.Linear4bit, **options))
            for text, ids in texts.items():
                found[text][form].append(losses(encoded, ids) - dense[text])
    return {text: {form: torch.stack(rows).cpu() for form, rows in forms.items()} for text, forms in found.items()}


def measure(name: str, base: pathlib.Path, device: str, count: int, draws: int) -> list[dict]:
    """Returns a row for every format on both kinds of text."""
    model = qlite.load_falcon(base, device=device, dtype=torch.float32)
    texts = {text: windows(bases.encode(name, held), count).to(device) for text, held in bases.held_out_texts(name).items()}
    dense = {text: losses(model, ids) for text, ids in texts.items()}
    rows = []
    for text, forms in gaps(model, texts, dense, draws).items():
        for form, gap in forms.items():
            row = {"model": name, **bases.facts(base), "format": form, "text": text, "windows": len(texts[text])}
            row |= {"dense_loss": round(dense[text].mean().item(), 5), "gap": round(gap.mean().item(), 6)}
            row |= {"gap_draws": [round(value, 6) for value in gap.mean(dim=1).tolist()], **share(gap, forms["nf4"])}
            rows.append(row)
    return rows


def main() -> None:
    """Measures a model, records its rows, and draws those of all models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=bases.NAMES, default="tiny")
    parser.add_argument("--seconds", type=float, default=60, help="to train small or medium for, where that is not done yet")
    parser.add_argument("--windows", type=int, default=300, help="of each kind of text, at most")
    parser.add_argument("--draws", type=int, default=4, help="orders of the features that each format encodes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="what to call the tree where it is no git checkout")
    parser.add_argument("--plot", type=pathlib.Path, metavar="PNG", help="draws the newest results of every model")
    parser.add_argument("--plot-only", action="store_true", help="draw what is there")
    options = parser.parse_args()
    if options.plot_only and not options.plot:
        parser.error("--plot-only needs --plot PNG")
    if not options.plot_only:
        torch.set_float32_matmul_precision("high")
        base = bases.folder(options.model, options.seconds, options.device)
        rows = measure(options.model, base, options.device, options.windows, options.draws)
        for row in rows:
            record("quantization_loss", row, commit=options.commit, show=False)
        shown = ("model", "text", "format", "windows", "dense_loss", "gap", "share", "share_low", "share_high")
        print(table(shown, [[row.get(key, "-") for key in shown] for row in rows]))
    if options.plot:
        lines = (RESULTS / "quantization_loss.jsonl").read_text().splitlines()
        loss_plot.draw([json.loads(line) for line in lines], options.plot)


if __name__ == "__main__":
    main()

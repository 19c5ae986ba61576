"""What four bits cost a fine-tuning: LoRA over the dense base against LoRA over the same base encoded, on five seeds.

    python -m benchmarks.qlora_parity                                 # the tutorial's recipe on the tiny base; a CPU, minutes
    python -m benchmarks.qlora_parity --model small --seconds 60      # 30 million parameters, trained first; a GPU

The tiny base learns the FAQ by the tutorial's recipe (80 steps of 4 x 1 question, lr 2e-4), and its loss is that of the same
answers to paraphrased questions. "small" and "medium", which benchmarks/bases.py trains on Python files, learn the support
articles (120 steps of 16 windows of 512 bytes, lr 1e-3), and their loss is that of articles about two other places. All by
`qlite.finetune` with r=16, alpha=32, dropout 0.05, paged 8-bit AdamW; in float32 on a CPU, in bfloat16 on a GPU. Per seed,
start of the adapter and batches are those of the dense run. Difference: of the final losses over the dense one; its interval
is Student's of 95 % over the seeds. Exit status 1 where a searched or plain NF4 ends more than 1 % above dense.
"""

from __future__ import annotations

import argparse
import copy
import functools
import pathlib
import statistics
from collections.abc import Callable

import torch

import qlite
from benchmarks import bases
from benchmarks.bases import tiny_base_corpus, train_tiny_base
from benchmarks.common import record, table
from benchmarks.loss_parity import loss_of
from qlite.cross_entropy import IGNORED
from qlite.data import ASSETS, Batch, FAQBatches
from qlite.nf4 import LS4_LEVELS

SEEDS = 5
#: The 97.5 % quantile of Student's t with SEEDS - 1 degrees of freedom.
QUANTILE = 2.776
ALLOWED = 0.01
METHODS: dict[str, Callable[..., qlite.Linear4bit]] = {
    "nf4": qlite.Linear4bit,
    "nf4 searched": functools.partial(qlite.Linear4bit, search=True),
    "ls4 searched": functools.partial(qlite.Linear4bit, levels=LS4_LEVELS, search=True),
}
#: Steps, batches a step, learning rate.
FAQ, ARTICLES = (80, 4, 2e-4), (120, 1, 1e-3)


def of_windows(rows: torch.Tensor) -> Batch:
    """Returns a batch whose loss counts every token of its rows (B, T) but the first."""
    labels = rows.clone()
    labels[:, 0] = IGNORED
    return Batch(rows, labels, labels[:, 1:].numel())


def faq(seed: int) -> tuple[FAQBatches, list[Batch]]:
    """Returns what the tiny base learns, in the order of a seed, and what it is tested on."""
    tokenizer = qlite.load_tokenizer(ASSETS / "tiny-falcon")
    learned = qlite.faq_batches(ASSETS / "faq.json", tokenizer, batch_size=1, max_length=512, seed=seed)
    return learned, list(qlite.faq_batches(ASSETS / "faq_paraphrases.json", tokenizer, batch_size=8))


def articles(seed: int) -> tuple[list[Batch], list[Batch]]:
    """Returns what a model of bytes learns, windows drawn by a seed, and what it is tested on."""
    learned, held_out = (bases.encode("small", documents) for documents in tiny_base_corpus.support(0))
    steps, generator = ARTICLES[0], torch.Generator().manual_seed(seed)
    drawn = [of_windows(train_tiny_base.windows(learned, 16, generator)[:, 1:]) for _ in range(steps)]
    tested = held_out.unfold(0, train_tiny_base.LENGTH + 1, train_tiny_base.LENGTH)[::4]
    return drawn, [of_windows(part) for part in tested.split(16)]


def run(base: qlite.Falcon, seed: int, name: str, targets: str) -> tuple[float, float]:
    """Returns the held-out loss before and after a copy of the base was fine-tuned."""
    model = copy.deepcopy(base)
    learned, tested = faq(seed) if name == "tiny" else articles(seed)
    steps, accumulate, lr = FAQ if name == "tiny" else ARTICLES
    before = loss_of(model, tested)
    qlite.add_lora(model, qlite.LoRAConfig(targets=targets if targets == "all-linear" else (targets,)), seed=seed)
    optimizer = qlite.PagedAdamW8bit(qlite.lora_parameters(model), lr=lr)
    qlite.finetune(model, learned, optimizer, steps=steps, accumulate=accumulate, seed=seed, progress=False)
    return before, loss_of(model, tested)


def summary(after: list[float], dense: list[float]) -> dict[str, float]:
    """Returns the mean difference of paired final losses, relative to dense, and its interval of 95 %."""
    found = [one / other - 1 for one, other in zip(after, dense, strict=True)]
    mean, half = statistics.mean(found), QUANTILE * statistics.stdev(found) / len(found) ** 0.5
    return {"difference": round(mean, 5), "difference_low": round(mean - half, 5), "difference_high": round(mean + half, 5)}


def measure(name: str, base: pathlib.Path, device: str, targets: str) -> list[dict]:
    """Returns a row for the dense base and every method."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    dense = qlite.load_falcon(base, device=device, dtype=dtype)
    rows, of_dense = [], []
    for method, kind in {"dense": None, **METHODS}.items():
        encoded = copy.deepcopy(dense)
        if kind is not None:
            qlite.quantize_model(encoded, kind)
        runs = [run(encoded, seed, name, targets) for seed in range(SEEDS)]
        after = [last for _, last in runs]
        of_dense = of_dense or after
        row = {"model": name, **bases.facts(base), "targets": targets, "dtype": str(dtype)[6:], "method": method}
        row |= {"before": round(runs[0][0], 5), "after": round(statistics.mean(after), 5)}
        row |= {"after_seeds": [round(value, 5) for value in after], **summary(after, of_dense)}
        print({key: row[key] for key in ("method", "before", "after", "difference")}, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Runs all methods, records a row each, and fails where plain or searched NF4 costs too much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=bases.NAMES, default="tiny")
    parser.add_argument("--seconds", type=float, default=60, help="to train small or medium for, where that is not done yet")
    parser.add_argument("--targets", choices=("query_key_value", "all-linear"), default="query_key_value")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="what to call the tree where it is no git checkout")
    options = parser.parse_args()
    base = bases.folder(options.model, options.seconds, options.device)
    rows = measure(options.model, base, options.device, options.targets)
    for row in rows:
        record("qlora_parity", row, commit=options.commit, show=False)
    shown = ("model", "targets", "method", "before", "after", "difference", "difference_low", "difference_high")
    print(table(shown, [[row[key] for key in shown] for row in rows]))
    above = [row["method"] for row in rows if row["difference"] > ALLOWED and row["method"].startswith("nf4")]
    if above:
        raise SystemExit(f"{', '.join(above)}: more than {ALLOWED:.0%} above dense")


if __name__ == "__main__":
    main()

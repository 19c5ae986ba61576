"""Whether four bits cost the training anything: the tutorial's recipe on the tiny base, dense in float32 and in NF4.

    python -m benchmarks.loss_parity

Both runs see the same batches in the same order and start from the same adapters (r=16, alpha=32, dropout 0.05 on
query_key_value; lr 2e-4, cosine, 5 % warm-up; 80 steps of 4 x 1 question; paged 8-bit AdamW). Compared is the loss per
answer token over the whole FAQ after the last step, without dropout. Exit status 1 where they differ by more than 2 %.
"""

from __future__ import annotations

import argparse

import torch

import qlite
from benchmarks.common import record
from qlite.data import ASSETS
from qlite.train import answer_loss

BASE = ASSETS / "tiny-falcon"
STEPS = 80
ALLOWED = 0.02


def loss_of(model: qlite.Falcon, batches: qlite.data.FAQBatches) -> float:
    """Returns the loss per answer token over one epoch, in nats."""
    with torch.no_grad():
        rows = [(answer_loss(model, batch).item(), batch.n_tokens) for batch in batches]
    return sum(loss for loss, _ in rows) / sum(count for _, count in rows)


def run(quantize: type[qlite.Linear4bit] | None) -> dict[str, float]:
    """Returns the losses of one run: over the FAQ before and after, and the mean of the last ten training steps."""
    model = qlite.load_falcon(BASE, quantize=quantize, dtype=torch.float32)
    tokenizer = qlite.load_tokenizer(BASE)
    before = loss_of(model, qlite.faq_batches(ASSETS / "faq.json", tokenizer, batch_size=8))
    qlite.add_lora(model, qlite.LoRAConfig.qlora_2023(), seed=0)
    model.gradient_checkpointing = True
    optimizer = qlite.PagedAdamW8bit(qlite.lora_parameters(model), lr=2e-4)
    batches = qlite.faq_batches(ASSETS / "faq.json", tokenizer, batch_size=1, max_length=512)
    result = qlite.finetune(model, batches, optimizer, steps=STEPS, accumulate=4, progress=False)
    after = loss_of(model, qlite.faq_batches(ASSETS / "faq.json", tokenizer, batch_size=8))
    return {"before": before, "last_ten_steps": sum(result.losses[-10:]) / 10, "after": after}


def main() -> None:
    """Runs both, records a row, and fails where they part."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    dense, nf4 = run(None), run(qlite.Linear4bit)
    difference = nf4["after"] / dense["after"] - 1
    runs = {"dense": dense, "nf4": nf4}
    row = {f"{name}_{key}": round(value, 4) for name, losses in runs.items() for key, value in losses.items()}
    record("loss_parity", {"steps": STEPS, **row, "difference": round(difference, 4)})
    if abs(difference) > ALLOWED:
        raise SystemExit(f"the final losses differ by {difference:.1%}; at most {ALLOWED:.0%} is allowed")


if __name__ == "__main__":
    main()

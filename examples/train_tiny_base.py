"""Make the tiny base of the demo from scratch: tokenizer, corpus, model, checkpoint.

    python examples/train_tiny_base.py --device cuda --minutes 1 --output tiny-falcon

It trains a Falcon of the 7B kind (multi-query, parallel attention, rotary positions) with under four million parameters on
the text of tiny_base_corpus.py and writes it as the hub has its checkpoints: config.json, tokenizer.json, model.safetensors
in bfloat16. training_report.json beside it tells the held-out loss in bits per byte: of one module in twenty of the standard
library, source and prose, chosen by a hash, and of all questions and answers about two of the places.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import pathlib
import platform
import time

import numpy
import torch
from tiny_base_corpus import documentation_and_code, support
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import qlite
from qlite.data import END_OF_TEXT, encode_prompt

LENGTH = 512
#: Share of the training windows that come from each part.
MIX = {"documentation": 0.4, "code": 0.45, "support": 0.15}


def held_out(text: str) -> bool:
    """Returns whether the module with this source, or the topic with this text, is kept from training."""
    return hashlib.sha256(text.encode()).digest()[0] < 13


def train_tokenizer(parts: dict[str, list[str]], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE whose token 0 is the end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for part in ("documentation", "support") for text in parts[part]]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """Returns all documents as one row of int32 ids, an end-of-text token after each."""
    end = [tokenizer.token_to_id(END_OF_TEXT)]
    rows = [encoding.ids + end for encoding in tokenizer.encode_batch(documents, add_special_tokens=False)]
    return torch.from_numpy(numpy.concatenate([numpy.array(row, dtype=numpy.int32) for row in rows]))


def windows(tokens: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Returns `count` random windows of LENGTH + 1 tokens, int64 (count, LENGTH + 1)."""
    starts = torch.randint(len(tokens) - LENGTH - 1, (count, 1), generator=generator, device=tokens.device)
    return tokens[starts + torch.arange(LENGTH + 1, device=tokens.device)].long()


def loss_of(model: qlite.Falcon, ids: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Returns the cross-entropy of the next token over (B, T + 1) ids, in nats."""
    logits = model(ids[:, :-1])
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)


def add_dropout(model: qlite.Falcon, probability: float) -> None:
    """Makes what each block adds to the residual stream drop out in training mode: the corpus is small and read often."""

    def drop(module: torch.nn.Module, _: tuple, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, probability, module.training)

    for block in model.transformer.h:
        block.self_attention.register_forward_hook(drop)
        block.mlp.register_forward_hook(drop)


@torch.no_grad()
def bits_per_byte(model: qlite.Falcon, tokenizer: Tokenizer, documents: list[str], device: str) -> float:
    """Returns the held-out loss of whole documents, in windows of LENGTH, per byte of their UTF-8 text."""
    model.eval()
    tokens = encode(tokenizer, documents).to(device).long()
    count = (len(tokens) - 1) // LENGTH
    ids = torch.stack([tokens[i * LENGTH : (i + 1) * LENGTH + 1] for i in range(count)])
    nats = sum(loss_of(model, chunk, "sum").item() for chunk in ids.split(16))
    scored = [token for token in ids[:, 1:].flatten().tolist() if token != tokenizer.token_to_id(END_OF_TEXT)]
    return nats / math.log(2) / len(tokenizer.decode(scored, skip_special_tokens=False).encode())


def train(model: qlite.Falcon, parts: dict[str, torch.Tensor], options: argparse.Namespace) -> int:
    """Trains for the given time; returns the number of steps."""
    device = options.device
    model.train()
    add_dropout(model, options.dropout)
    generator = torch.Generator(device).manual_seed(options.seed)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=device == "cuda")
    compute = torch.compile(loss_of) if options.compile else loss_of
    counts = {name: round(share * options.batch_size) for name, share in MIX.items()}
    warm = windows(parts["support"], options.batch_size, generator)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        compute(model, warm).backward()  # compilation is not training time
    optimizer.zero_grad(set_to_none=True)
    start, step, total = time.perf_counter(), 0, options.minutes * 60
    while (elapsed := time.perf_counter() - start) < total:
        share = elapsed / total
        factor = min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * share)) * 0.98 + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * factor
        ids = torch.cat([windows(parts[name], count, generator) for name, count in counts.items()])
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = compute(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 200 == 0 or step == 1:
            print(f"step {step}, {elapsed:.0f} s: loss {loss.item():.4f}", flush=True)
    return step


def main() -> None:
    """Builds the corpus, trains, writes the checkpoint and its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=1.0, help="of training; corpus and tokenizer come on top")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dropout", type=float, default=0.1, help="on what a block adds to the residual stream")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--output", type=pathlib.Path, required=True)
    options = parser.parse_args()
    kept: dict[str, list[str]] = {"documentation": [], "code": []}
    kept_out: dict[str, list[str]] = {"documentation": [], "code": []}
    for prose, source in documentation_and_code():
        part = kept_out if held_out(source or prose[0]) else kept
        part["documentation"] += prose
        part["code"] += [source] if source else []
    kept["support"], kept_out["support"] = support(options.seed)
    tokenizer = train_tokenizer(kept, 4096)
    tokens = {name: encode(tokenizer, documents).to(options.device) for name, documents in kept.items()}
    sizes = {name: sum(len(text.encode()) for text in documents) for name, documents in kept.items()}
    print(f"bytes {sizes}, tokens { {name: len(row) for name, row in tokens.items()} }", flush=True)
    end = tokenizer.token_to_id(END_OF_TEXT)
    config = qlite.FalconConfig(
        vocab_size=4096, hidden_size=192, num_hidden_layers=8, num_attention_heads=3, ffn_hidden_size=768,
        max_position_embeddings=1024, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    model = qlite.Falcon(config, device=options.device).init_weights_(seed=options.seed)
    untrained = bits_per_byte(model, tokenizer, kept_out["documentation"], options.device)
    torch.set_float32_matmul_precision("high")
    steps = train(model, tokens, options)
    model = model.bfloat16().float().eval()  # what is measured is what is saved
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus_bytes": sizes,
        "corpus_tokens": {name: len(row) for name, row in tokens.items()},
        "steps": steps,
        "tokens_seen": steps * options.batch_size * LENGTH,
        "held_out_bits_per_byte": {
            name: round(bits_per_byte(model, tokenizer, kept_out[name], options.device), 4) for name in kept
        },
        "held_out_bits_per_byte_untrained": round(untrained, 4),
        "minutes": options.minutes,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    print(json.dumps(report, indent=2))
    tokenizer_json = options.output.with_suffix(".tokenizer.json")
    tokenizer_json.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(tokenizer_json), pretty=False)
    qlite.save_checkpoint(model.bfloat16(), options.output, tokenizer_json=tokenizer_json)
    tokenizer_json.unlink()
    (options.output / "training_report.json").write_text(json.dumps(report, indent=2) + "\n")
    model = model.float()
    for question in ("When is the library open?", "I lost my membership. What now?", "How can I create an account?"):
        answer = qlite.generate(model, encode_prompt(tokenizer, question), max_new_tokens=40)
        print(f"{question} -> {tokenizer.decode(answer)!r}")
    ids = tokenizer.encode("Return a list of").ids
    print(repr(tokenizer.decode(ids + qlite.generate(model, ids, max_new_tokens=40))))


if __name__ == "__main__":
    main()

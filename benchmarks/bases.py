"""The dense models that the benchmarks of quality encode: the packaged tiny base, and two larger ones trained in a minute.

Those read bytes: of the Python sources of the standard library, torch and numpy, which are wherever qlite is. A file in
twenty, chosen by a hash of its text, is held out. AdamW, cosine, bfloat16 autocast over float32 weights; what is written, and
then measured, is the model in bfloat16. A model that was trained before, in `runs/bases`, is not trained again.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import pathlib
import sys
import time
from typing import Any

import numpy
import torch
from torch import Tensor

import qlite
from qlite.data import ASSETS

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import tiny_base_corpus  # noqa: E402
import train_tiny_base  # noqa: E402

#: Byte 0, which is in no source, ends a document.
END = 0
#: Windows that a step of training reads.
BATCH = 64


def _of_bytes(hidden: int, layers: int) -> qlite.FalconConfig:
    return qlite.FalconConfig(
        vocab_size=256, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        max_position_embeddings=1024, bos_token_id=END, eos_token_id=END,
    )  # fmt: skip


#: Config and highest learning rate: 30 and 96 million parameters.
TRAINED = {"small": (_of_bytes(512, 11), 1.5e-3), "medium": (_of_bytes(768, 16), 1e-3)}
NAMES = ("tiny", *TRAINED)


@functools.cache
def sources() -> tuple[list[str], list[str]]:
    """Returns the texts of the Python files that are trained on, and of those that are held out."""
    paths = tiny_base_corpus.standard_library()
    for module in (torch, numpy):
        assert module.__file__ is not None
        paths += sorted(path for path in pathlib.Path(module.__file__).parent.rglob("*.py") if path.stat().st_size < 300_000)
    kept, held_out = [], []
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text.strip() and "\0" not in text:
            (held_out if train_tiny_base.held_out(text) else kept).append(text)
    return kept, held_out


def encode(name: str, documents: list[str]) -> Tensor:
    """Returns documents as one row of ids of a model's vocabulary, int64, an end-of-text token after each."""
    if name == "tiny":
        return train_tiny_base.encode(qlite.load_tokenizer(ASSETS / "tiny-falcon"), documents).long()
    joined = b"".join(document.encode() + bytes([END]) for document in documents)
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()


def held_out_texts(name: str) -> dict[str, list[str]]:
    """Returns documents that a model was not trained on, by their kind: "library", like what it was, and "support"."""
    support = tiny_base_corpus.support(0)[1]
    if name != "tiny":
        return {"library": sources()[1], "support": support}
    parts = tiny_base_corpus.documentation_and_code()
    kept_out = [(prose, source) for prose, source in parts if train_tiny_base.held_out(source or prose[0])]
    return {"library": [text for prose, source in kept_out for text in (*prose, source) if text], "support": support}


def train(config: qlite.FalconConfig, row: Tensor, seconds: float, lr: float) -> tuple[qlite.Falcon, int]:
    """Returns a model trained for some seconds on windows of a row of ids, on its device, and the number of steps."""
    device = row.device
    model = qlite.Falcon(config, device=device).init_weights_(seed=0).train()
    generator = torch.Generator(device).manual_seed(0)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.ndim < 2]}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda")
    start, step = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        factor = min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * elapsed / seconds)) * 0.98 + 0.02)
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = train_tiny_base.loss_of(model, train_tiny_base.windows(row, BATCH, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 100 == 1:
            print(f"step {step}, {elapsed:.0f} s: loss {loss.item():.4f}", flush=True)  # .item() waits: the clock is the GPU's
    return model.eval(), step


def folder(name: str, seconds: float, device: str) -> pathlib.Path:
    """Returns where the checkpoint of a model is, having trained it for so many seconds unless it is there."""
    if name == "tiny":
        return ASSETS / "tiny-falcon"
    found = ROOT / "runs" / "bases" / f"{name}-{seconds:g}s"
    if not found.exists():
        config, lr = TRAINED[name]
        row = encode(name, sources()[0]).to(device)
        print(f"{name}: training on {len(row):,} bytes for {seconds:g} s", flush=True)
        model, steps = train(config, row, seconds, lr)
        report = {"parameters": sum(p.numel() for p in model.parameters())}
        report |= {"steps": steps, "tokens_seen": steps * BATCH * train_tiny_base.LENGTH}
        qlite.save_checkpoint(model.bfloat16(), found)
        (found / "training_report.json").write_text(json.dumps(report) + "\n")
    return found


def facts(base: pathlib.Path) -> dict[str, int]:
    """Returns what a row of results says of a trained model: parameters, and the tokens it was trained on."""
    report = json.loads((base / "training_report.json").read_text())
    return {key: report[key] for key in ("parameters", "tokens_seen")}


@torch.no_grad()
def reordered(model: qlite.Falcon, seed: int) -> qlite.Falcon:
    """Returns a copy of a dense model, of Falcon-7B's kind, that computes the same with its features in another order.

    Features of the residual stream and of each MLP change places, and values their signs: what shares a block is then drawn
    anew, and so is the error of encoding it.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    assert config.kv_heads == 1 and config.parallel_attn and config.tie_word_embeddings and not config.bias
    model = copy.deepcopy(model)
    device = model.lm_head.weight.device
    stream = torch.randperm(config.hidden_size, generator=generator).to(device)
    blocks: Any = model.transformer.h
    for norm in (model.transformer.ln_f, *(block.input_layernorm for block in blocks)):
        norm.weight.copy_(norm.weight[stream])
        norm.bias.copy_(norm.bias[stream])
    model.lm_head.weight.copy_(model.lm_head.weight[:, stream])
    for block in blocks:
        qkv, out = block.self_attention.query_key_value.weight, block.self_attention.dense.weight
        up, down = block.mlp.dense_h_to_4h.weight, block.mlp.dense_4h_to_h.weight
        inner = torch.randperm(config.ffn, generator=generator).to(device)
        signs = torch.randint(2, (config.head_dim,), generator=generator).to(device) * 2.0 - 1
        qkv.copy_(qkv[:, stream])
        qkv[-config.head_dim :] *= signs[:, None]
        out.copy_(out[stream] * signs.repeat(config.num_attention_heads))
        up.copy_(up[inner][:, stream])
        down.copy_(down[stream][:, inner])
    return model

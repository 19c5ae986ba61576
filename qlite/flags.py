"""The flags of the command line: every verb's, with their defaults and the recipes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

import torch

import qlite
from qlite.data import ASSETS
from qlite.lora_init import STARTS
from qlite.nf4 import BLOCK_SIZES, TABLES
from qlite.recompute import MODES
from qlite.saving import LAYOUTS
from qlite.train import SCHEDULES

#: What `--recipe` sets where a flag is not given. "demo" was tuned for the tiny base on two CPU cores; "tutorial" is the
#: recipe of the 2023 Falcon tutorials.
RECIPES: dict[str, dict[str, Any]] = {
    "demo": {
        "targets": "all-linear", "r": 16, "alpha": 32.0, "dropout": 0.3, "lr": 5e-3, "epochs": 16.0, "steps": None,
        "batch_size": 8, "accumulate": 1, "gradient_checkpointing": False,
    },
    "tutorial": {
        "targets": "query_key_value", "r": 16, "alpha": 32.0, "dropout": 0.05, "lr": 2e-4, "epochs": None, "steps": 80,
        "batch_size": 1, "accumulate": 4, "gradient_checkpointing": True,
    },
}  # fmt: skip
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HEADS = {"int8": qlite.Linear8bit, "nf4": qlite.Linear4bit}
OPTIMIZERS = {
    "paged_adamw_8bit": qlite.PagedAdamW8bit,
    "adamw_8bit": qlite.AdamW8bit,
    "adamw": torch.optim.AdamW,
}


VERBS = ("finetune", "generate", "quantize", "estimate", "merge", "push")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Every flag with its default."""


def _add_base_flags(parser: argparse.ArgumentParser, device: bool = True) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--base", default=str(ASSETS / "tiny-falcon"), help="folder or hub id of the base")
    group.add_argument("--revision", help="branch, tag or commit of the base on the hub")
    formats = (*TABLES, "best", "int8", "none")
    of_linears = "format of the linears; best: of tables of 16 levels what fits each; nf4 unless the base is quantized already"
    group.add_argument("--quantize", choices=formats, help=of_linears)
    group.add_argument("--block-size", type=int, choices=BLOCK_SIZES, help="weights per absmax (four bits); None: 64")
    group.add_argument("--double-quant", action=argparse.BooleanOptionalAction, help="encode absmax too (four bits); None: yes")
    group.add_argument("--search", action="store_true", help="of scales with less error than absmax (four bits)")
    group.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="auto: float32 on the CPU, else 16 bits; to quantize or merge, as stored",
    )
    if device:
        group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")


class _Mode(argparse.Action):
    """Stores what Falcon has for the name of a way to checkpoint, and for none where the flag stands alone."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, flag: str | None = None):
        setattr(namespace, self.dest, MODES[values or "full"])


def _add_checkpointing(parser: Any, default: bool | None) -> None:
    what = "what of a block the backward pass computes again; alone: full; offload: as full, what is kept waits in host memory"
    flag = "--gradient-checkpointing"
    parser.add_argument(flag, nargs="?", choices=MODES, action=_Mode, default=default, help=what)
    never = {"action": "store_const", "const": False, "default": argparse.SUPPRESS, "dest": "gradient_checkpointing"}
    parser.add_argument("--no-gradient-checkpointing", help="as none", **never)


def _add_estimate(verbs: Any, says: Mapping[str, str | None]) -> None:
    size = verbs.add_parser("estimate", formatter_class=_Help, help="GPU memory, beforehand", description=says["estimate"])
    _add_base_flags(size, device=False)
    size.add_argument("--r", type=int, default=16, help="rank of the adapters")
    size.add_argument("--dropout", type=float, default=0.05, help="on the adapters' input")
    size.add_argument("--targets", default="query_key_value", help="as for finetune")
    size.add_argument("--dora", action="store_true", help="train the norm of each row of the weights too")
    size.add_argument("--batch-size", type=int, default=1, help="questions a batch")
    size.add_argument("--max-length", type=int, default=512, help="tokens of a question and its answer")
    _add_checkpointing(size, default=True)
    size.add_argument("--memory", type=float, help="GiB of a card: does it fit, and up to which batch")
    size.set_defaults(alpha=32.0, init="kaiming", rslora=False)  # which cost nothing


def _add_generate(verbs: Any, says: Mapping[str, str | None]) -> None:
    ask = verbs.add_parser("generate", formatter_class=_Help, help="answer questions", description=says["generate"])
    _add_base_flags(ask)
    ask.add_argument("--head", choices=HEADS, help="format of the output layer, and say what it costs; None: as it is")
    ask.add_argument(
        "--adapter", action="append", help="folder or hub id of a LoRA adapter; or NAME=FOLDER, several, for --interactive"
    )
    ask.add_argument("--questions", help="a FAQ file whose questions are all answered, instead of one from the line")
    ask.add_argument(
        "--interactive", action="store_true",
        help="answer the lines of standard input, one after the other; /adapter NAME chooses one, /adapter the base alone",
    )  # fmt: skip
    ask.add_argument(
        "--jsonl", action="store_true",
        help='answer the lines of standard input, {"question": ...} each, by the same with an "answer", in order',
    )  # fmt: skip
    ask.add_argument("--batch-size", type=int, help="questions answered together; None: 16, with --prompt-lookup 1")
    ask.add_argument("--prompt-lookup", type=int, default=0, help="tokens to guess from the text so far; greedy answers alone")
    ask.add_argument("--tokens", action="store_true", help="print token ids as JSON, one list a question")
    ask.add_argument("--stats", action="store_true", help="say on stderr how long it took: to the first token, a token")
    ask.add_argument("--max-new-tokens", type=int, default=64, help="at most so many tokens an answer")
    ask.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time")
    ask.add_argument("--top-k", type=int, help="draw among the k likeliest")
    ask.add_argument("--top-p", type=float, help="draw among the likeliest of this total probability")
    ask.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: fewer repetitions")
    ask.add_argument("--seed", type=int, default=0, help="of the draws")
    ask.add_argument("question", nargs="?", help="the question")


def parser(says: Mapping[str, str | None]) -> argparse.ArgumentParser:
    """Returns the parser of the command line. says: what each verb does, by its name."""
    whole = argparse.ArgumentParser(prog="qlite", description="Fine-tune a Falcon in 4 bits on one small GPU.")
    verbs = whole.add_subparsers(dest="verb", required=True)
    tune = verbs.add_parser("finetune", formatter_class=_Help, help="train an adapter on a FAQ", description=says["finetune"])
    _add_base_flags(tune)
    data = tune.add_argument_group("data")
    data.add_argument("--data", default=str(ASSETS / "faq.json"), help="JSON or JSONL of questions and answers")
    data.add_argument("--eval-data", help="questions in other words, with answers; the demo's data has its own, else none")
    data.add_argument("--max-length", type=int, default=512, help="tokens of a question and its answer")
    data.add_argument("--ask", default="How can I create an account?", help="asked before and after")
    train = tune.add_argument_group("training (a default of None comes from --recipe)")
    train.add_argument("--recipe", choices=RECIPES, default="demo", help=json.dumps(RECIPES).replace("%", "%%"))
    train.add_argument("--r", type=int, help="rank of the adapters")
    train.add_argument("--alpha", type=float, help="the adapters' output is scaled by alpha / r")
    train.add_argument("--dropout", type=float, help="on the adapters' input")
    train.add_argument("--targets", help="all-linear, names joined by commas, or a regular expression in /slashes/")
    train.add_argument("--init", choices=STARTS, default="kaiming", help="how the adapters begin")
    train.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(r)")
    train.add_argument("--dora", action="store_true", help="train the norm of each row of the weights too")
    train.add_argument("--optimizer", choices=OPTIMIZERS, default="paged_adamw_8bit", help="of the adapters")
    train.add_argument("--lr", type=float, help="peak learning rate")
    train.add_argument("--weight-decay", type=float, default=0.0, help="of the adapters")
    length = train.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimizer steps")
    length.add_argument("--epochs", type=float, help="passes over the data")
    train.add_argument("--batch-size", type=int, help="questions a batch")
    train.add_argument("--accumulate", type=int, help="batches a step")
    train.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="of the learning rate")
    train.add_argument("--warmup", type=float, default=0.05, help="share of the steps in which the rate rises")
    train.add_argument("--max-grad-norm", type=float, default=1.0, help="gradients are clipped to this norm")
    _add_checkpointing(train, default=None)
    train.add_argument(
        "--cuda-graphs", action=argparse.BooleanOptionalAction, help="record forward and backward; None: where it can be done"
    )
    train.add_argument("--seed", type=int, default=0, help="of adapters, order and dropout")
    out = tune.add_argument_group("output")
    out.add_argument("--output", help="folder for adapter, metrics, loss curve and checkpoints; None: a new one under runs/")
    out.add_argument("--save-every", type=int, help="steps between checkpoints; none without")
    out.add_argument("--save-total-limit", type=int, default=2, help="checkpoints that stay")
    out.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --output")
    out.add_argument("--tensorboard", action="store_true", help="write event files too")
    out.add_argument("--no-progress", dest="progress", action="store_false", default=True, help="no progress line")

    _add_generate(verbs, says)
    quant = verbs.add_parser("quantize", formatter_class=_Help, help="write it encoded", description=says["quantize"])
    _add_base_flags(quant)
    quant.add_argument("--output", required=True, help="folder to write; must not hold anything")
    quant.add_argument("--head", choices=HEADS, help="format of the output layer, and say what it costs; None: as it is")
    quant.add_argument("--layout", choices=LAYOUTS, default="qlite", help="of the tensors; bitsandbytes: transformers'")

    _add_estimate(verbs, says)
    share = verbs.add_parser("push", formatter_class=_Help, help="put an adapter on the hub", description=says["push"])
    share.add_argument("folder", help="the adapter's folder, such as runs/faq/adapter")
    share.add_argument("repo_id", help="owner/name on the hub; created where it is not there")
    share.add_argument("--base", help="hub id of the base, where the adapter names it by a folder of this machine")
    share.add_argument("--public", action="store_true", help="for everyone to see; private without")
    share.add_argument("--dry-run", action="store_true", help="list what would go, contact nothing")

    join = verbs.add_parser("merge", formatter_class=_Help, help="write base and adapter as one", description=says["merge"])
    _add_base_flags(join)
    join.add_argument("--adapter", required=True, help="folder or hub id of a LoRA adapter")
    join.add_argument("--original", help="folder or hub id of the base's dense weights, to take the place of decoded ones")
    join.add_argument("--output", required=True, help="folder to write; must not hold anything")
    return whole

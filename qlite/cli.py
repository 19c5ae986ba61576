"""The command line: `qlite finetune`, `qlite generate`, `qlite quantize`, each over the same public functions.

On its defaults `qlite finetune` is the demo: the packaged tiny Falcon learns the packaged FAQ. With `--recipe tutorial` and
`--base tiiuae/falcon-7b` it is the job on a full-size model. Bad input ends in one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer

import qlite
from qlite.checkpoint import check_device
from qlite.data import ASSETS, FAQBatches, encode_prompt, read_faq
from qlite.falcon import Falcon
from qlite.nf4 import BLOCK_SIZES, FP4_LEVELS
from qlite.storage import read_json, resolve_folder
from qlite.train import SCHEDULES, plot_losses

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
#: Questions that are answered together. Fixed: rows that are padded together may differ in the last bits of their logits
#: from rows alone, and the answers are compared token for token.
ROWS = 16
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OPTIMIZERS = {
    "paged_adamw_8bit": qlite.PagedAdamW8bit,
    "adamw_8bit": qlite.AdamW8bit,
    "adamw": torch.optim.AdamW,
}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Every flag with its default."""


def _add_base_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--base", default=str(ASSETS / "tiny-falcon"), help="folder or hub id of the base")
    group.add_argument("--revision", help="branch, tag or commit of the base on the hub")
    formats = ("nf4", "fp4", "int8", "none")
    group.add_argument("--quantize", choices=formats, help="format of the linears; nf4 unless the base is quantized already")
    group.add_argument("--block-size", type=int, choices=BLOCK_SIZES, default=64, help="weights per absmax (nf4, fp4)")
    group.add_argument(
        "--double-quant", action=argparse.BooleanOptionalAction, default=True, help="encode absmax too (nf4, fp4)"
    )
    group.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: float32 on the CPU, else 16 bits")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qlite", description="Fine-tune a Falcon in 4 bits on one small GPU.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    tune = verbs.add_parser("finetune", formatter_class=_Help, help="train an adapter on a FAQ", description=finetune.__doc__)
    _add_base_flags(tune)
    data = tune.add_argument_group("data")
    data.add_argument("--data", default=str(ASSETS / "faq.json"), help="JSON or JSONL of questions and answers")
    data.add_argument("--eval-data", help="questions in other words, with answers; the demo's data has its own, else none")
    data.add_argument("--max-length", type=int, default=512, help="tokens of a question and its answer")
    data.add_argument("--ask", default="How can I create an account?", help="asked before and after")
    train = tune.add_argument_group("training (a default of None comes from --recipe)")
    train.add_argument("--recipe", choices=RECIPES, default="demo", help=json.dumps(RECIPES).replace("%", "%%"))
    train.add_argument("--r", type=int, help="rank of the adapters")
    train.add_argument("--alpha", type=float, help="scale of the adapters, times r")
    train.add_argument("--dropout", type=float, help="on the adapters' input")
    train.add_argument("--targets", help="all-linear, names joined by commas, or a regular expression in /slashes/")
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
    train.add_argument(
        "--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="recompute blocks in the backward pass"
    )
    train.add_argument("--seed", type=int, default=0, help="of adapters, order and dropout")
    out = tune.add_argument_group("output")
    out.add_argument("--output", help="folder for adapter, metrics, loss curve and checkpoints; None: a new one under runs/")
    out.add_argument("--save-every", type=int, help="steps between checkpoints; none without")
    out.add_argument("--save-total-limit", type=int, default=2, help="checkpoints that stay")
    out.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --output")
    out.add_argument("--tensorboard", action="store_true", help="write event files too")
    out.add_argument("--no-progress", dest="progress", action="store_false", default=True, help="no progress line")

    ask = verbs.add_parser("generate", formatter_class=_Help, help="answer questions", description=generate.__doc__)
    _add_base_flags(ask)
    ask.add_argument("--adapter", help="folder or hub id of a LoRA adapter")
    ask.add_argument("--questions", help="a FAQ file whose questions are all answered, instead of one from the line")
    ask.add_argument("--tokens", action="store_true", help="print token ids as JSON, one list a question")
    ask.add_argument("--max-new-tokens", type=int, default=64, help="at most so many tokens an answer")
    ask.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time")
    ask.add_argument("--top-k", type=int, help="draw among the k likeliest")
    ask.add_argument("--top-p", type=float, help="draw among the likeliest of this total probability")
    ask.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: fewer repetitions")
    ask.add_argument("--seed", type=int, default=0, help="of the draws")
    ask.add_argument("question", nargs="?", help="the question")

    quant = verbs.add_parser(
        "quantize", formatter_class=_Help, help="write a quantized checkpoint", description=quantize.__doc__
    )
    _add_base_flags(quant)
    quant.add_argument("--output", required=True, help="folder to write; must not hold anything")
    return parser


def _device(name: str) -> torch.device:
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    device = check_device(chosen)
    label = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"device: {device} ({label})", file=sys.stderr)
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    # Not is_bf16_supported(): it says True on a T4, which only emulates bfloat16.
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def _load(options: argparse.Namespace) -> tuple[Falcon, Tokenizer]:
    """Returns the base as the flags want it, and its tokenizer; says what was quantized."""
    device = _device(options.device)
    folder = resolve_folder(options.base, revision=options.revision)
    encoded = "quantization_config" in read_json(folder / "config.json")
    four_bit = functools.partial(qlite.Linear4bit, block_size=options.block_size, double_quant=options.double_quant)
    kinds = {"nf4": four_bit, "fp4": functools.partial(four_bit, levels=FP4_LEVELS), "int8": qlite.Linear8bit, "none": None}
    kind = kinds[options.quantize or ("none" if encoded else "nf4")]
    start = time.perf_counter()
    dtype = _dtype(options.dtype, device)
    model = qlite.load_falcon(folder, quantize=kind, device=device, dtype=dtype)
    model.base_id = options.base  # type: ignore[assignment]
    print(f"{model.load_report} in {time.perf_counter() - start:.1f} s, computing in {dtype}", file=sys.stderr)
    return model, qlite.load_tokenizer(folder)


def _answers(model: Falcon, tokenizer: Tokenizer, questions: list[str], **options: Any) -> list[list[int]]:
    """Returns the token ids of each answer, ROWS prompts at a time: a weight is decoded once for all of them."""
    prompts = [encode_prompt(tokenizer, question) for question in questions]
    groups = [prompts[first : first + ROWS] for first in range(0, len(prompts), ROWS)]
    return [answer for group in groups for answer in qlite.generate(model, group, **options)]


def _exact(tokenizer: Tokenizer, tokens: list[list[int]], pairs: list[tuple[str, str]]) -> str:
    right = sum(tokenizer.decode(row).strip() == answer for row, (_, answer) in zip(tokens, pairs, strict=True))
    return f"{right}/{len(pairs)} ({100 * right / len(pairs):.0f} %)"


def _config(options: argparse.Namespace) -> qlite.LoRAConfig:
    targets = options.targets
    if targets.startswith("/") and targets.endswith("/"):
        chosen: str | tuple[str, ...] = targets[1:-1]
    else:
        chosen = targets if targets == "all-linear" else tuple(targets.split(","))
    return qlite.LoRAConfig(r=options.r, alpha=options.alpha, dropout=options.dropout, targets=chosen)


def _output(options: argparse.Namespace) -> pathlib.Path:
    """Returns the folder to write to; ValueError where that would replace the adapter of another run."""
    if options.output is None:
        if options.resume:
            raise ValueError("--resume needs the --output of the run to continue")
        names = itertools.chain(["runs/faq"], (f"runs/faq-{number}" for number in itertools.count(2)))
        return next(path for path in map(pathlib.Path, names) if not path.exists())
    output = pathlib.Path(options.output)
    if not options.resume and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} holds something already; choose another folder, or continue its run with --resume")
    return output


def _same_in_a_fresh_process(options: argparse.Namespace, adapter: pathlib.Path, tokens: list[list[int]]) -> bool:
    """Whether a new process that loads base and adapter from disk gives the same tokens for all questions."""
    command = [sys.executable, "-m", "qlite", "generate", "--base", options.base, "--adapter", str(adapter)]
    command += ["--questions", options.data, "--tokens", "--dtype", options.dtype, "--device", options.device]
    command += ["--block-size", str(options.block_size), "--double-quant" if options.double_quant else "--no-double-quant"]
    command += ["--quantize", options.quantize] if options.quantize else []
    command += ["--revision", options.revision] if options.revision else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()] == tokens


def finetune(options: argparse.Namespace) -> int:
    """Train LoRA adapters on a file of questions and answers, over a quantized base. Asks before and after, measures exact
    matches (greedy answers equal to the file's, character for character), saves the adapter in PEFT's layout, and checks
    that a fresh process gives the same answers with it."""
    recipe = dict(RECIPES[options.recipe])
    if options.steps is not None or options.epochs is not None:
        recipe["steps"] = recipe["epochs"] = None
    for key, value in recipe.items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    demo_data = pathlib.Path(options.data) == ASSETS / "faq.json"
    eval_data = options.eval_data or (str(ASSETS / "faq_paraphrases.json") if demo_data else None)
    output = _output(options)
    pairs = read_faq(options.data)
    others = read_faq(eval_data) if eval_data else []
    config = _config(options)
    model, tokenizer = _load(options)
    batches = FAQBatches(pairs, tokenizer, batch_size=options.batch_size, max_length=options.max_length, seed=options.seed)
    print(batches.report())
    questions = [question for question, _ in pairs]

    def ask(when: str) -> list[list[int]]:
        answer = _answers(model, tokenizer, [options.ask])[0]
        print(f"\n{when}: {options.ask}\n    {tokenizer.decode(answer).strip()}")
        tokens = _answers(model, tokenizer, questions)
        print(f"exact match, {when}: trained questions {_exact(tokenizer, tokens, pairs)}", end="")
        if others:
            asked = _answers(model, tokenizer, [question for question, _ in others])
            print(f", asked in other words {_exact(tokenizer, asked, others)}", end="")
        print("\n", flush=True)
        return tokens

    # An untrained adapter changes no bit, and a target that matches nothing is found before the work.
    print(qlite.add_lora(model, config, seed=options.seed))
    ask("before")
    model.gradient_checkpointing = options.gradient_checkpointing
    optimizer = OPTIMIZERS[options.optimizer](qlite.lora_parameters(model), lr=options.lr, weight_decay=options.weight_decay)
    result = qlite.finetune(
        model, batches, optimizer,
        steps=options.steps, epochs=options.epochs, accumulate=options.accumulate, schedule=options.schedule,
        warmup=options.warmup, max_grad_norm=options.max_grad_norm, output_dir=output, save_every=options.save_every,
        save_total_limit=options.save_total_limit, resume=options.resume, tensorboard=options.tensorboard,
        seed=options.seed, progress=options.progress,
    )  # fmt: skip
    print(f"{len(result.losses)} steps in {result.seconds:.0f} s: loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}")
    if isinstance(optimizer, qlite.PagedAdamW8bit):
        print(f"optimizer state paged to host memory: {optimizer.paged_bytes / 1e6:.2f} MB")
    if model.transformer.word_embeddings.weight.is_cuda:
        print(f"peak GPU memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    tokens = ask("after")
    adapter = qlite.save_adapter(model, output / "adapter", base_id=options.base)
    plot_losses(output / "metrics.jsonl", output / "loss.png")
    size = (adapter / "adapter_model.safetensors").stat().st_size
    print(f"wrote {adapter} ({size / 1e6:.2f} MB), {output / 'loss.png'}, {output / 'metrics.jsonl'}")
    same = _same_in_a_fresh_process(options, adapter, tokens)
    print(f"reloaded in a fresh process: {'the same answers, token for token' if same else 'OTHER ANSWERS'}")
    return 0 if same else 1


def generate(options: argparse.Namespace) -> int:
    """Answer a question, or all questions of a file, with a base and an adapter."""
    if (options.question is None) == (options.questions is None):
        raise ValueError("generate: give one question, or --questions FILE")
    questions = [options.question] if options.question else [question for question, _ in read_faq(options.questions)]
    adapter = resolve_folder(options.adapter) if options.adapter else None
    model, tokenizer = _load(options)
    if adapter is not None:
        qlite.load_adapter(model, adapter)
    keys = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
    choices = {key: getattr(options, key) for key in keys}
    for answer in _answers(model, tokenizer, questions, **choices):
        print(json.dumps(answer) if options.tokens else tokenizer.decode(answer).strip(), flush=True)
    return 0


def quantize(options: argparse.Namespace) -> int:
    """Write a quantized checkpoint, which loads again without being quantized anew."""
    model, _ = _load(options)
    tokenizer_json = resolve_folder(options.base, revision=options.revision) / "tokenizer.json"
    qlite.save_checkpoint(model, options.output, tokenizer_json=tokenizer_json)
    size = sum(path.stat().st_size for path in pathlib.Path(options.output).iterdir())
    print(f"wrote {options.output} ({size / 1e6:,.1f} MB)")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status of a command line: 0, 1 where a check failed, 2 for bad input."""
    options = _parser().parse_args(arguments)
    verb = {"finetune": finetune, "generate": generate, "quantize": quantize}[options.verb]
    try:
        return verb(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"qlite {options.verb}: {error}", file=sys.stderr)
        return 2

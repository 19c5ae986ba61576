"""The command line: `qlite finetune`, `generate`, `quantize`, `estimate`, `merge`, `push`, each over the same public functions.

On its defaults `qlite finetune` is the demo: the packaged tiny Falcon learns the packaged FAQ. With `--recipe tutorial` and
`--base tiiuae/falcon-7b` it is the job on a full-size model. Bad input ends in one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer

import qlite
from qlite.checkpoint import check_device, is_encoded
from qlite.console import Telling
from qlite.data import ASSETS, FAQBatches, encode_prompt, read_faq
from qlite.download import resolve_folder
from qlite.falcon import Falcon, FalconConfig
from qlite.journal import plot_losses
from qlite.linear import QuantizedLinear
from qlite.lora_init import STARTS
from qlite.memory import whether_it_fits
from qlite.nf4 import BLOCK_SIZES, FP4_LEVELS
from qlite.resume import checkpoints
from qlite.saving import LAYOUTS
from qlite.storage import FLOATS, check_free, read_json, read_tensor, stored_tensors
from qlite.train import SCHEDULES, check_options

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
TRAINED = "trained questions"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OPTIMIZERS = {
    "paged_adamw_8bit": qlite.PagedAdamW8bit,
    "adamw_8bit": qlite.AdamW8bit,
    "adamw": torch.optim.AdamW,
}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Every flag with its default."""


def _add_base_flags(parser: argparse.ArgumentParser, device: bool = True) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--base", default=str(ASSETS / "tiny-falcon"), help="folder or hub id of the base")
    group.add_argument("--revision", help="branch, tag or commit of the base on the hub")
    formats = ("nf4", "fp4", "int8", "none")
    group.add_argument("--quantize", choices=formats, help="format of the linears; nf4 unless the base is quantized already")
    group.add_argument("--block-size", type=int, choices=BLOCK_SIZES, help="weights per absmax (nf4, fp4); None: 64")
    group.add_argument("--double-quant", action=argparse.BooleanOptionalAction, help="encode absmax too (nf4, fp4); None: yes")
    group.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="auto: float32 on the CPU, else 16 bits; to quantize or merge, as stored",
    )
    if device:
        group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")


def _add_estimate(verbs: Any) -> None:
    size = verbs.add_parser("estimate", formatter_class=_Help, help="GPU memory, beforehand", description=estimate.__doc__)
    _add_base_flags(size, device=False)
    size.add_argument("--r", type=int, default=16, help="rank of the adapters")
    size.add_argument("--dropout", type=float, default=0.05, help="on the adapters' input")
    size.add_argument("--targets", default="query_key_value", help="as for finetune")
    size.add_argument("--dora", action="store_true", help="train the norm of each row of the weights too")
    size.add_argument("--batch-size", type=int, default=1, help="questions a batch")
    size.add_argument("--max-length", type=int, default=512, help="tokens of a question and its answer")
    size.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True, help="as for finetune")
    size.add_argument("--memory", type=float, help="GiB of a card: does it fit, and up to which batch")
    size.set_defaults(alpha=32.0, init="kaiming", rslora=False)  # which cost nothing


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
    ask.add_argument("--interactive", action="store_true", help="answer the lines of standard input, one after the other")
    ask.add_argument("--tokens", action="store_true", help="print token ids as JSON, one list a question")
    ask.add_argument("--stats", action="store_true", help="say on stderr how long it took: to the first token, a token")
    ask.add_argument("--max-new-tokens", type=int, default=64, help="at most so many tokens an answer")
    ask.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time")
    ask.add_argument("--top-k", type=int, help="draw among the k likeliest")
    ask.add_argument("--top-p", type=float, help="draw among the likeliest of this total probability")
    ask.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: fewer repetitions")
    ask.add_argument("--seed", type=int, default=0, help="of the draws")
    ask.add_argument("question", nargs="?", help="the question")

    quant = verbs.add_parser("quantize", formatter_class=_Help, help="write it encoded", description=quantize.__doc__)
    _add_base_flags(quant)
    quant.add_argument("--output", required=True, help="folder to write; must not hold anything")
    quant.add_argument("--layout", choices=LAYOUTS, default="qlite", help="of the tensors; bitsandbytes: transformers'")

    _add_estimate(verbs)
    share = verbs.add_parser("push", formatter_class=_Help, help="put an adapter on the hub", description=push.__doc__)
    share.add_argument("folder", help="the adapter's folder, such as runs/faq/adapter")
    share.add_argument("repo_id", help="owner/name on the hub; created where it is not there")
    share.add_argument("--base", help="hub id of the base, where the adapter names it by a folder of this machine")
    share.add_argument("--public", action="store_true", help="for everyone to see; private without")
    share.add_argument("--dry-run", action="store_true", help="list what would go, contact nothing")

    join = verbs.add_parser("merge", formatter_class=_Help, help="write base and adapter as one", description=merge.__doc__)
    _add_base_flags(join)
    join.add_argument("--adapter", required=True, help="folder or hub id of a LoRA adapter")
    join.add_argument("--original", help="folder or hub id of the base's dense weights, to take the place of decoded ones")
    join.add_argument("--output", required=True, help="folder to write; must not hold anything")
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


def _kind(options: argparse.Namespace, encoded: bool) -> Callable[..., QuantizedLinear] | None:
    """Returns what the linears become, None for dense or as they are; ValueError for a flag that would do nothing."""
    name = options.quantize or ("none" if encoded else "nf4")
    if name not in ("nf4", "fp4") and (options.block_size, options.double_quant) != (None, None):
        what = "the base is quantized already" if encoded else f"the linears are {name}"
        raise ValueError(f"--block-size and --double-quant are for nf4 and fp4; {what}")
    four_bit = functools.partial(
        qlite.Linear4bit,
        block_size=64 if options.block_size is None else options.block_size,
        double_quant=options.double_quant is not False,
        flat=options.verb == "quantize" and options.layout == "bitsandbytes",
    )
    kinds = {"nf4": four_bit, "fp4": functools.partial(four_bit, levels=FP4_LEVELS), "int8": qlite.Linear8bit, "none": None}
    return kinds[name]


def _load(options: argparse.Namespace, *, stored_dtype: bool = False) -> tuple[Falcon, Tokenizer]:
    """Returns the base as the flags want it, and its tokenizer; says what was quantized."""
    device = _device(options.device)
    folder = resolve_folder(options.base, revision=options.revision)
    encoded = is_encoded(folder)
    kind = _kind(options, encoded)
    if options.verb == "quantize" and kind is None:
        raise ValueError("there is nothing to quantize: " + ("it is quantized already" if encoded else "--quantize is none"))
    start = time.perf_counter()
    dtype = _dtype(options.dtype, device)
    if stored_dtype and options.dtype == "auto":
        dtype = FLOATS[stored_tensors(folder)["transformer.word_embeddings.weight"].dtype]
    model = qlite.load_falcon(folder, quantize=kind, device=device, dtype=dtype)
    model.base_id = options.base  # type: ignore[assignment]
    print(f"{model.load_report} in {time.perf_counter() - start:.1f} s, in {dtype}", file=sys.stderr)
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
    return qlite.LoRAConfig(
        r=options.r, alpha=options.alpha, dropout=options.dropout, targets=chosen, init=options.init, rslora=options.rslora,
        dora=options.dora,
    )  # fmt: skip


def _dense(options: argparse.Namespace) -> Callable[[str], torch.Tensor] | None:
    """Returns what gives the stored weight of a layer by its name, for the one start that wants it."""
    if options.init != "loftq":
        return None
    folder = resolve_folder(options.base, revision=options.revision)
    if is_encoded(folder) or options.quantize == "none":
        raise ValueError(
            "--init loftq repairs what encoding takes from dense weights; the base must be dense, and be quantized"
        )
    stored = stored_tensors(folder)
    return lambda name: read_tensor(stored[f"{name}.weight"])


def _output(options: argparse.Namespace) -> pathlib.Path:
    """Returns the folder to write to; ValueError where that would replace the adapter of another run."""
    if options.output is None:
        if options.resume:
            raise ValueError("--resume needs the --output of the run to continue")
        names = itertools.chain(["runs/faq"], (f"runs/faq-{number}" for number in itertools.count(2)))
        return next(path for path in map(pathlib.Path, names) if not path.exists())
    output = pathlib.Path(options.output)
    if options.resume:
        if not checkpoints(output):
            raise ValueError(f"--resume: {output} has no checkpoint to continue from; --save-every writes them")
        return output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} holds something already; choose another folder, or continue its run with --resume")
    return output


def _same_in_a_fresh_process(
    options: argparse.Namespace, adapter: pathlib.Path, pairs: list[tuple[str, str]], most: int, tokens: list[list[int]]
) -> bool:
    """Whether a new process that loads base and adapter from disk gives the same tokens for all questions."""
    with tempfile.TemporaryDirectory() as folder:
        questions = pathlib.Path(folder) / "questions.json"
        records = [{"question": question, "answer": answer} for question, answer in pairs]
        questions.write_text(json.dumps({"questions": records}), encoding="utf-8")
        command = [sys.executable, "-m", "qlite", "generate", "--base", options.base, "--adapter", str(adapter)]
        command += ["--questions", str(questions), "--max-new-tokens", str(most), "--tokens"]
        command += ["--dtype", options.dtype, "--device", options.device]
        for flag, value in (("quantize", options.quantize), ("block-size", options.block_size), ("revision", options.revision)):
            command += [f"--{flag}", str(value)] if value is not None else []
        if options.double_quant is not None:
            command += ["--double-quant" if options.double_quant else "--no-double-quant"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()] == tokens


def _check(options: argparse.Namespace) -> qlite.LoRAConfig:
    """Returns the adapters' config; ValueError or ImportError for what would fail after the base was loaded."""
    counts = {key: getattr(options, key) for key in ("steps", "accumulate", "save_every", "save_total_limit")}
    check_options(counts, options.epochs, options.schedule, options.warmup, options.max_grad_norm)
    OPTIMIZERS[options.optimizer]([torch.nn.Parameter(torch.zeros(1))], lr=options.lr, weight_decay=options.weight_decay)
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ImportError("--tensorboard: tensorboard is not installed; pip install 'qlite[train]'")
    return _config(options)


def _ask(
    when: str, model: Falcon, tokenizer: Tokenizer, question: str, data: dict[str, list[tuple[str, str]]], most: int
) -> list[list[int]]:
    """Returns the answers to the trained questions, having printed how many are right, and one of them all."""
    answer = _answers(model, tokenizer, [question], max_new_tokens=most)[0]
    print(f"\n{when}: {question}\n    {tokenizer.decode(answer).strip()}")
    tokens = {
        name: _answers(model, tokenizer, [asked for asked, _ in pairs], max_new_tokens=most) for name, pairs in data.items()
    }
    shares = [f"{name} {_exact(tokenizer, tokens[name], pairs)}" for name, pairs in data.items()]
    print(f"exact match, {when}: {', '.join(shares)}\n", flush=True)
    return tokens[TRAINED]


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
    pairs, others = read_faq(options.data), read_faq(eval_data) if eval_data else []
    config, dense = _check(options), _dense(options)
    model, tokenizer = _load(options)
    context = model.config.max_position_embeddings
    if options.max_length > context:
        raise ValueError(f"--max-length is {options.max_length}; the base holds {context} tokens")
    batches = FAQBatches(pairs, tokenizer, batch_size=options.batch_size, max_length=options.max_length, seed=options.seed)
    print(f"{batches.report()}; writing to {output}")
    data, rows = {TRAINED: batches.pairs}, list(batches.rows)
    if others:
        asked = FAQBatches(others, tokenizer, max_length=options.max_length)
        data, rows = {**data, "asked in other words": asked.pairs}, rows + asked.rows
    # Room for the longest answer, as far as the longest prompt leaves it.
    most = min(max(len(answer) for _, answer in rows), context - max(len(prompt) for prompt, _ in rows))

    # An untrained adapter changes no bit, and a target that matches nothing is found before the work.
    print(qlite.add_lora(model, config, seed=options.seed, dense=dense))
    _ask("before", model, tokenizer, options.ask, data, most)
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
    adapter = qlite.save_adapter(model, output / "adapter")
    result.save(adapter)  # for the card, where it is pushed
    size = (adapter / "adapter_model.safetensors").stat().st_size
    print(f"wrote {adapter} ({size / 1e6:.2f} MB) and {output / 'metrics.jsonl'}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no loss curve: matplotlib is not installed; pip install 'qlite[plot]'")
    else:
        plot_losses(output / "metrics.jsonl", output / "loss.png")
        print(f"wrote {output / 'loss.png'}")
    tokens = _ask("after", model, tokenizer, options.ask, data, most)
    model.to("meta")  # the fresh process needs the room
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    same = _same_in_a_fresh_process(options, adapter, batches.pairs, most, tokens)
    print(f"reloaded in a fresh process: {'the same answers, token for token' if same else 'OTHER ANSWERS'}")
    return 0 if same else 1


def generate(options: argparse.Namespace) -> int:
    """Answer a question, all questions of a file, or one line of standard input after the other."""
    if (options.question is not None) + (options.questions is not None) + options.interactive != 1:
        raise ValueError("generate: give one question, or --questions FILE, or --interactive")
    questions = [options.question]
    if options.questions is not None:
        questions = [question for question, _ in read_faq(options.questions)]
    adapter = resolve_folder(options.adapter) if options.adapter else None
    model, tokenizer = _load(options)
    if adapter is not None:
        qlite.load_adapter(model, adapter)
    keys = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
    choices = {key: getattr(options, key) for key in keys}
    if not options.interactive:
        _answer(model, tokenizer, questions, options, choices)
        return 0
    while True:
        print("question: ", end="", flush=True, file=sys.stderr)
        line = sys.stdin.readline()
        if not line:
            return 0
        try:
            _answer(model, tokenizer, [line.strip()], options, choices)
        except ValueError as error:  # of this question alone: empty, or too long
            print(f"qlite generate: {str(error).removeprefix('generate: ')}", file=sys.stderr)


def _answer(
    model: Falcon, tokenizer: Tokenizer, questions: list[str], options: argparse.Namespace, choices: dict[str, Any]
) -> None:
    """Prints the answers as `generate` was told to: one question's as it comes."""
    streamed = options.questions is None and not options.tokens
    telling = Telling(tokenizer if streamed else None)
    answers = _answers(model, tokenizer, questions, **choices, on_token=telling)
    for answer in answers:
        text = tokenizer.decode(answer).strip()
        if streamed:
            telling.tell(text, end=True)
        else:
            print(json.dumps(answer) if options.tokens else text, flush=True)
    if options.stats:
        print(telling.stats(), file=sys.stderr)


def quantize(options: argparse.Namespace) -> int:
    """Write a quantized checkpoint, which loads again without being quantized anew."""
    model, _ = _load(options, stored_dtype=True)
    tokenizer_json = resolve_folder(options.base, revision=options.revision) / "tokenizer.json"
    qlite.save_checkpoint(model, options.output, layout=options.layout, tokenizer_json=tokenizer_json)
    size = sum(path.stat().st_size for path in pathlib.Path(options.output).iterdir())
    print(f"wrote {options.output} ({size / 1e6:,.1f} MB)")
    return 0


def estimate(options: argparse.Namespace) -> int:
    """Say what a fine-tuning takes of GPU memory, from the base's config.json alone; paged 8-bit AdamW."""
    folder = resolve_folder(options.base, revision=options.revision, names=("config.json",))
    values = read_json(folder / "config.json")
    if "quantization_config" in values and options.quantize is None:
        raise ValueError(f"{options.base} is quantized already; name its format by --quantize")
    config = FalconConfig.from_dict(values)
    settings: dict[str, Any] = {
        "quantize": _kind(options, encoded=False), "lora": _config(options),
        "dtype": torch.bfloat16 if options.dtype == "auto" else DTYPES[options.dtype], "tokens": options.max_length,
        "gradient_checkpointing": options.gradient_checkpointing,
    }  # fmt: skip
    print(qlite.estimate(config, batch_size=options.batch_size, **settings))
    if options.memory is not None:
        print(whether_it_fits(config, options.memory, options.batch_size, **settings))
    return 0


def push(options: argparse.Namespace) -> int:
    """Put an adapter on the hub, private unless --public, with its run's training.json and loss.png and a model card. A
    README.md that is there, in the folder or in the repository, stays. Who asks is huggingface_hub's matter: hf auth login,
    or HF_TOKEN."""
    report = qlite.push_adapter(
        options.folder, options.repo_id, base_id=options.base, private=not options.public, dry_run=options.dry_run
    )
    print(report)
    if options.dry_run and report.card is not None:
        print(f"\n{report.card}", end="")
    return 0


def merge(options: argparse.Namespace) -> int:
    """Write a base and its adapter as one dense checkpoint, decoded as the base was trained on, and say what changed."""
    output, adapter = check_free(options.output), resolve_folder(options.adapter)
    model, _ = _load(options, stored_dtype=True)
    qlite.load_adapter(model, adapter)
    files = resolve_folder(options.base, revision=options.revision)
    print(qlite.save_merged(model, output, original=options.original, files_from=files))
    print(f"wrote {options.output} ({sum(path.stat().st_size for path in output.iterdir()) / 1e6:,.1f} MB)")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status of a command line: 0, 1 where the work failed, 2 for bad input, 130 interrupted."""
    options = _parser().parse_args(arguments)
    verbs = [finetune, generate, quantize, estimate, merge, push]
    try:
        return {verb.__name__: verb for verb in verbs}[options.verb](options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"qlite {options.verb}: {str(error).removeprefix(f'{options.verb}: ')}", file=sys.stderr)
        return 2
    except (FloatingPointError, torch.OutOfMemoryError, subprocess.CalledProcessError) as error:
        print(f"qlite {options.verb}: {str(error).removeprefix(f'{options.verb}: ')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"qlite {options.verb}: interrupted; what --save-every wrote can be continued with --resume", file=sys.stderr)
        return 130

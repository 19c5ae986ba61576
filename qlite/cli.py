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
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer

import qlite
from qlite.checkpoint import check_device
from qlite.console import Telling
from qlite.data import ASSETS, FAQBatches, encode_prompt, read_faq
from qlite.download import resolve_folder
from qlite.encoded_files import is_encoded
from qlite.falcon import Falcon, FalconConfig
from qlite.flags import DTYPES, HEADS, OPTIMIZERS, RECIPES, VERBS, parser
from qlite.journal import plot_losses
from qlite.linear import QuantizedLinear
from qlite.memory import whether_it_fits
from qlite.resume import checkpoints
from qlite.storage import FLOATS, check_free, no_duplicates, read_json, read_tensor, stored_tensors
from qlite.switching import DEFAULT
from qlite.train import check_options

#: Questions that are answered together. Fixed: rows that are padded together may differ in the last bits of their logits
#: from rows alone, and the answers are compared token for token.
ROWS = 16
TRAINED = "trained questions"


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
    if name in ("int8", "none") and (options.block_size, options.double_quant, options.search) != (None, None, False):
        what = "the base is quantized already" if encoded else f"the linears are {name}"
        raise ValueError(f"--block-size, --double-quant and --search are for formats of four bits; {what}")
    four_bit = functools.partial(
        qlite.Linear4bit,
        block_size=64 if options.block_size is None else options.block_size,
        double_quant=options.double_quant is not False,
        levels=name,
        search=options.search,
        flat=options.verb == "quantize" and options.layout == "bitsandbytes",
    )
    return {"int8": qlite.Linear8bit, "none": None}.get(name, four_bit)


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


def _encode_head(options: argparse.Namespace, model: Falcon, tokenizer: Tokenizer) -> None:
    """Encodes the output layer as --head says, and says what that costs, on the questions of the demo's FAQ."""
    if options.head is not None:
        text = [token for question, _ in read_faq(ASSETS / "faq.json") for token in encode_prompt(tokenizer, question)]
        length = min(64, model.config.max_position_embeddings)
        tokens = torch.tensor(text[: len(text) // length * length][: 4 * length]).view(-1, length)
        print(qlite.quantize_head(model, HEADS[options.head], tokens=tokens), file=sys.stderr)


def _answers(model: Falcon, tokenizer: Tokenizer, questions: list[str], rows: int = ROWS, **options: Any) -> list[list[int]]:
    """Returns the token ids of each answer, `rows` prompts at a time: a weight is decoded once for all of them."""
    prompts = [encode_prompt(tokenizer, question) for question in questions]
    groups = [prompts[first : first + rows] for first in range(0, len(prompts), rows)]
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
        command += ["--search"] if options.search else []
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


def _predicted(options: argparse.Namespace, model: Falcon, config: qlite.LoRAConfig, rows: list) -> str:
    """Returns what `qlite.estimate` says of a run, in a few words; nothing where it does not know base or optimizer."""
    if options.optimizer == "adamw" or options.quantize == "none" or is_encoded(resolve_folder(options.base)):
        return ""
    tokens = max(len(prompt) + len(answer) for prompt, answer in rows)
    found = qlite.estimate(
        model.config, quantize=_kind(options, encoded=False), lora=config, dtype=model.transformer.word_embeddings.weight.dtype,
        batch_size=options.batch_size, tokens=tokens,
        gradient_checkpointing=options.gradient_checkpointing, paged=options.optimizer == "paged_adamw_8bit",
    )  # fmt: skip
    return f"; estimated {found.peak / 2**30:.2f}"


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
    on_gpu = model.transformer.word_embeddings.weight.is_cuda
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()  # the load's
    result = qlite.finetune(
        model, batches, optimizer,
        steps=options.steps, epochs=options.epochs, accumulate=options.accumulate, schedule=options.schedule,
        warmup=options.warmup, max_grad_norm=options.max_grad_norm, output_dir=output, save_every=options.save_every,
        save_total_limit=options.save_total_limit, resume=options.resume, tensorboard=options.tensorboard,
        seed=options.seed, progress=options.progress, cuda_graphs=options.cuda_graphs,
    )  # fmt: skip
    print(f"{len(result.losses)} steps in {result.seconds:.0f} s: loss {result.losses[0]:.3f} -> {result.losses[-1]:.3f}")
    if isinstance(optimizer, qlite.PagedAdamW8bit):
        print(f"optimizer state paged to host memory: {optimizer.paged_bytes / 1e6:.2f} MB")
    if on_gpu:
        peak, predicted = torch.cuda.max_memory_allocated() / 2**30, _predicted(options, model, config, batches.rows)
        print(f"peak GPU memory: {peak:.2f} GiB{predicted}")
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


def _named(adapters: list[str]) -> dict[str, pathlib.Path]:
    """Returns name -> folder of what --adapter names, FOLDER or NAME=FOLDER each."""
    found: dict[str, pathlib.Path] = {}
    for text in adapters:
        name, equals, place = text.partition("=")
        if not equals or pathlib.Path(text).exists():
            name, place = DEFAULT, text
        if name in found:
            raise ValueError(f"--adapter {text}: there is one named {name!r} already; several are NAME=FOLDER each")
        found[name] = resolve_folder(place)
    return found


def generate(options: argparse.Namespace) -> int:
    """Answer a question, all questions of a file, or the lines of standard input: one after the other, or JSON objects, in
    batches. An answer to one question is printed as its tokens come."""
    if (options.question is not None) + (options.questions is not None) + options.interactive + options.jsonl != 1:
        raise ValueError("generate: give one question, or --questions FILE, or --interactive, or --jsonl")
    if options.batch_size is not None and (options.batch_size < 1 or not (options.questions or options.jsonl)):
        raise ValueError(f"--batch-size is {options.batch_size}; wanted 1 or more, with --questions or --jsonl")
    if options.adapter and len(options.adapter) > 1 and not options.interactive:
        raise ValueError("several adapters are for --interactive, where /adapter NAME chooses one")
    questions = [options.question]
    if options.questions is not None:
        questions = [question for question, _ in read_faq(options.questions)]
    adapters = _named(options.adapter or [])
    model, tokenizer = _load(options)
    _encode_head(options, model, tokenizer)
    for name, folder in adapters.items():
        qlite.load_adapter(model, folder, name=name)
    qlite.set_adapter(model, next(iter(adapters), None))
    keys = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "prompt_lookup")
    choices = {key: getattr(options, key) for key in keys}
    if options.interactive:
        _converse(model, tokenizer, options, choices)
    elif options.jsonl:
        _answer_lines(model, tokenizer, options, choices)
    else:
        _answer(model, tokenizer, questions, options, choices)
    return 0


def _rows(options: argparse.Namespace) -> int:
    return options.batch_size or (1 if options.prompt_lookup else ROWS)


def _answer(
    model: Falcon, tokenizer: Tokenizer, questions: list[str], options: argparse.Namespace, choices: dict[str, Any]
) -> None:
    """Prints the answers as `generate` was told to: one question's as it comes."""
    streamed = options.questions is None and not options.tokens
    telling = Telling(tokenizer if streamed else None)
    answers = _answers(model, tokenizer, questions, _rows(options), **choices, on_token=telling)
    for answer in answers:
        text = tokenizer.decode(answer).strip()
        if streamed:
            telling.tell(text, end=True)
        else:
            print(json.dumps(answer) if options.tokens else text, flush=True)
    if options.stats:
        print(telling.stats(), file=sys.stderr)


def _converse(model: Falcon, tokenizer: Tokenizer, options: argparse.Namespace, choices: dict[str, Any]) -> None:
    """Answers the lines of standard input one after the other, with the adapter that the last /adapter named."""
    while True:
        print("question: ", end="", flush=True, file=sys.stderr)
        line = sys.stdin.readline()
        if not line:
            return
        try:
            command, _, name = line.strip().partition(" ")
            if command == "/adapter":
                qlite.set_adapter(model, name.strip() or None)
            else:
                _answer(model, tokenizer, [line.strip()], options, choices)
        except ValueError as error:  # of this line alone: empty, too long, or an adapter that is not there
            print(f"qlite generate: {re.sub('^(generate|set_adapter): ', '', str(error))}", file=sys.stderr)


def _asked(line: bytes, model: Falcon, tokenizer: Tokenizer, most: int) -> tuple[dict[str, Any], list[int]]:
    """Returns the object of a line and the tokens of its question; ValueError for what cannot be answered."""
    try:
        record = json.loads(line.decode(), object_pairs_hook=no_duplicates)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(record, dict) or not isinstance(record.get("question"), str):
        raise ValueError('wanted an object with a "question", a string')
    prompt, context = encode_prompt(tokenizer, record["question"]), model.config.max_position_embeddings
    if len(prompt) + most > context:
        raise ValueError(f"a prompt of {len(prompt)} tokens and {most} new ones exceed the model's context of {context}")
    return record, prompt


def _answer_lines(model: Falcon, tokenizer: Tokenizer, options: argparse.Namespace, choices: dict[str, Any]) -> None:
    """Prints the objects of standard input with their answers, a batch at a time, in order; at a bad line, which is named, it
    ends, with all before it answered."""
    telling, bad = Telling(None), None
    batch: list[tuple[dict[str, Any], list[int]]] = []

    def answer() -> None:
        answers = qlite.generate(model, [prompt for _, prompt in batch], **choices, on_token=telling) if batch else []
        for (record, _), tokens in zip(batch, answers):
            said = {"tokens": tokens} if options.tokens else {"answer": tokenizer.decode(tokens).strip()}
            print(json.dumps({**record, **said}))
        sys.stdout.flush()
        batch.clear()

    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            batch += [_asked(line, model, tokenizer, options.max_new_tokens)] if line.strip() else []
        except ValueError as error:
            bad = ValueError(f"line {number}: {str(error).removeprefix('encode_prompt: ')}")
            break
        if len(batch) == _rows(options):
            answer()
    answer()
    if options.stats:
        print(telling.stats(), file=sys.stderr)
    if bad is not None:
        raise bad


def quantize(options: argparse.Namespace) -> int:
    """Write a quantized checkpoint, which loads again without being quantized anew."""
    model, tokenizer = _load(options, stored_dtype=True)
    _encode_head(options, model, tokenizer)
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
    verbs = {name: globals()[name] for name in VERBS}
    options = parser({name: verb.__doc__ for name, verb in verbs.items()}).parse_args(arguments)
    try:
        return verbs[options.verb](options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"qlite {options.verb}: {str(error).removeprefix(f'{options.verb}: ')}", file=sys.stderr)
        return 2
    except (FloatingPointError, torch.OutOfMemoryError, subprocess.CalledProcessError) as error:
        print(f"qlite {options.verb}: {str(error).removeprefix(f'{options.verb}: ')}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"qlite {options.verb}: interrupted; what --save-every wrote can be continued with --resume", file=sys.stderr)
        return 130

"""The training loop: accumulate, clip, step, write down what happened.

One step takes `accumulate` batches and divides their summed loss by all the answer tokens of the window, so that uneven
batches weigh as they would in one big batch. Only parameters with requires_grad are touched; the model computes in its own
dtype, and float16 activations get a loss scale. A step whose loss or gradient is not finite changes nothing.

Not done here: several processes (distributed training), evaluation.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlite import resume as saved_run
from qlite.cross_entropy import IGNORED, linear_cross_entropy
from qlite.data import Batch, FAQBatches, format_prompt
from qlite.decoding import forget
from qlite.experts import ExpertStack
from qlite.falcon import Falcon
from qlite.graphs import StepGraphs, why_not
from qlite.journal import Journal, draw_losses, figure
from qlite.linear import QuantizedLinear
from qlite.optim import AdamW8bit, PagedAdamW8bit
from qlite.recompute import check_mode
from qlite.storage import replace_file

OURS = (AdamW8bit, PagedAdamW8bit)
SCHEDULES = ("cosine", "linear", "constant")
#: So many steps in a row without a finite loss and gradient end the run.
MOST_SKIPPED = 10
FIRST_LOSS_SCALE = 2.0**16
#: The loss scale doubles after so many good steps.
SCALE_GROWTH_STEPS = 200


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run did.

    Attributes:
        losses: mean loss per answer token of each step, resumed steps included.
        skipped: steps without a finite loss and gradient, which changed nothing.
        seconds: of this call's steps. tokens: input tokens of this call's steps, padding included.
        facts: what the losses hang on, for JSON: the settings, the data's size, the versions. No path, no question.
    """

    losses: list[float]
    skipped: int
    seconds: float
    tokens: int
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, folder: str | pathlib.Path) -> list[pathlib.Path]:
        """Returns the files it wrote for a model card: training.json, and loss.png where matplotlib is installed.

        Args:
            folder: the adapter's; created where it is not there.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "training.json", json.dumps(self.facts, indent=2, default=str) + "\n")
        if importlib.util.find_spec("matplotlib") is None:
            return [folder / "training.json"]
        draw_losses(figure(), range(1, len(self.losses) + 1), self.losses, folder / "loss.png")
        return [folder / "training.json", folder / "loss.png"]


def learning_rate_factor(step: int, steps: int, schedule: str, warmup: float) -> float:
    """Returns what the learning rate of step 0 <= step < steps is multiplied by.

    It rises linearly over the first ceil(warmup * steps) steps, the first of them not at zero, then falls as half a cosine
    or a line towards zero at `steps`, or stays.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    share = (step - rising) / max(1, steps - rising)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "constant": 1.0}[schedule]


def answer_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Returns the summed cross-entropy of the labelled tokens of a batch, a float32 scalar.

    A model with hidden_states, such as Falcon, computes logits for the positions that predict a label, and for no others, a
    chunk of them at a time. Any other is called with input_ids alone. Rows are padded on the right: what a causal model says
    of a token does not depend on the padding after it, so it needs no mask.

    Args:
        model: has hidden_states(input_ids) and lm_head, a module with out_features, or returns logits (B, T, vocabulary),
            themselves or as `.logits`.

    Raises:
        TypeError: the model returned something else.
    """
    device = next(model.parameters()).device
    positions = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    targets = batch.labels[:, 1:][positions].to(device)
    rows, columns = (index.to(device) for index in positions)
    input_ids = batch.input_ids.to(device)
    if hasattr(model, "hidden_states"):
        hidden = model.hidden_states(input_ids)  # type: ignore[operator]
        return linear_cross_entropy(hidden[rows, columns], model.lm_head, targets)  # type: ignore[arg-type]
    output = model(input_ids=input_ids)
    every = getattr(output, "logits", output)
    if not isinstance(every, Tensor) or every.shape[:-1] != input_ids.shape:
        found = tuple(every.shape) if isinstance(every, Tensor) else f"a {type(every).__name__}"
        raise TypeError(
            f"finetune: {type(model).__name__} returned {found} for input_ids {tuple(input_ids.shape)}; wanted logits "
            "(B, T, vocabulary), themselves or as .logits"
        )
    return nn.functional.cross_entropy(every[rows, columns].float(), targets, reduction="sum")


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    empty = 0
    # A run resumed at the very end of an epoch finds the rest of it empty, once.
    while empty < 2:
        empty += 1
        for batch in batches:
            empty = 0
            yield batch
    raise ValueError("finetune: batches is empty")


def _accumulate(model: nn.Module, window: Sequence[Batch], scale: float, graphs: StepGraphs | None) -> Tensor:
    """Adds the gradients of a window, scaled, to the parameters; returns the mean loss per labelled token, a scalar."""
    labelled = sum(batch.n_tokens for batch in window)
    if not labelled:
        raise ValueError("finetune: a window of batches has no labelled token")
    total = None
    for batch in window:
        if graphs is not None:
            loss = graphs.backward(batch, scale / labelled) / labelled
        else:
            loss = answer_loss(model, batch) / labelled
            (loss * scale).backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total


def check_options(
    counts: dict[str, int | None], epochs: float | None, schedule: str, warmup: float, max_grad_norm: float | None
) -> None:
    """Raises ValueError for an option of `finetune` that is out of its range."""
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"finetune: {name} is {count!r}; wanted a whole number, 1 or more")
    if counts["steps"] is not None and epochs is not None:
        raise ValueError("finetune: give steps or epochs, not both")
    if epochs is not None and not 0 < epochs < math.inf:
        raise ValueError(f"finetune: epochs is {epochs}; wanted a number above 0")
    if schedule not in SCHEDULES:
        raise ValueError(f"finetune: schedule is {schedule!r}; wanted one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup <= 1:
        raise ValueError(f"finetune: warmup is {warmup}; wanted a share of the steps, 0 to 1")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"finetune: max_grad_norm is {max_grad_norm}; wanted a number above 0, or None")


def _check_output(
    folder: pathlib.Path | None, batches: Any, *, save_every: int | None, resume: bool, tensorboard: bool
) -> None:
    if folder is None:
        if save_every or resume or tensorboard:
            raise ValueError("finetune: save_every, resume and tensorboard need an output_dir")
        return
    if (save_every or resume) and not (hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict")):
        raise ValueError(
            f"finetune: batches is a {type(batches).__name__} without state_dict and load_state_dict; a resumed run could "
            "not continue it. Use FAQBatches, or leave save_every and resume out"
        )
    earlier = [*saved_run.checkpoints(folder), *folder.glob("metrics.jsonl")]
    if earlier and not resume:
        raise ValueError(
            f"finetune: {earlier[0]} is of an earlier run, whose files this one would replace or mix with its own; continue "
            "it with resume=True, take another output_dir, or remove it"
        )


def _trained_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Returns name -> parameter with requires_grad; ValueError where there is none, or the optimizer lacks one."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"finetune: {type(model).__name__} is an encoder-decoder, which reads no prompt before its answer; train it in a "
            "loop of your own, or with transformers.Trainer and the same optimizer"
        )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("finetune: no parameter of the model has requires_grad; call add_lora first")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in trained.items() if id(p) not in held]
    if missing:
        raise ValueError(
            f"finetune: the optimizer lacks {len(missing)} of {len(trained)} trained parameters ({missing[0]} first); make it "
            "after add_lora, over lora_parameters(model)"
        )
    return trained


def _dtype(model: nn.Module) -> torch.dtype:
    """Returns what a model computes in: the dtype of its first weight that is not trained, or of its first."""
    encoded = (m.dtype for m in model.modules() if isinstance(m, (QuantizedLinear, ExpertStack)))
    dense = (p.dtype for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
    return next(itertools.chain(dense, encoded, (p.dtype for p in model.parameters())))


def _describe(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns what the numbers of a run hang on beside the options of `finetune`, for JSON."""
    names = {id(p): name for name, p in model.named_parameters()}
    encoded = [m for m in model.modules() if isinstance(m, (QuantizedLinear, ExpertStack))]
    layers = collections.Counter(json.dumps(m.config()) for m in encoded)
    lora = getattr(model, "lora_config", None)
    described: dict[str, Any] = {
        "base": getattr(model, "base_fingerprint", None),
        "dtype": str(_dtype(model)),
        "layers": dict(layers),
        "lr": [float(group["lr"]) for group in optimizer.param_groups],
    }
    described |= {} if lora is None else {f"lora {key}": value for key, value in dataclasses.asdict(lora).items()}
    for i, group in enumerate(optimizer.param_groups):
        described[f"group {i} params"] = [names.get(id(p)) for p in group["params"]]
        described |= {f"group {i} {key}": value for key, value in group.items() if key not in ("params", "lr")}
    return described


def _facts(model: nn.Module, run: saved_run.Run, settings: dict[str, Any], losses: list[float]) -> dict[str, Any]:
    """Returns what a reader of the losses wants to know, for JSON. No name of a file: it may be shared."""
    try:
        version = importlib.metadata.version("qlite")
    except importlib.metadata.PackageNotFoundError:  # run from a folder of sources, without an installation
        version = None
    group = run.optimizer.param_groups[0]
    shown = ("betas", "eps", "weight_decay", "momentum")
    facts: dict[str, Any] = {
        "versions": {"qlite": version, "torch": str(torch.__version__)},
        "base_fingerprint": settings["base"],
        "dtype": settings["dtype"],
        "layers": [{**json.loads(kind), "count": count} for kind, count in settings["layers"].items()],
        "lora": dataclasses.asdict(model.lora_config) if hasattr(model, "lora_config") else None,  # type: ignore[call-overload]
        "optimizer": {
            "name": type(run.optimizer).__name__,
            "lr": settings["lr"][0],
            **{key: group[key] for key in shown if key in group},
        },
        **{key: settings[key] for key in ("steps", "accumulate", "schedule", "warmup", "max_grad_norm", "seed", "cuda_graphs")},
        # Falcon has one for all its blocks, a model of transformers one in each of them.
        "gradient_checkpointing": next(
            (v for m in model.modules() if (v := getattr(m, "gradient_checkpointing", False))), False
        ),
        "loss": {"first": losses[0], "last": losses[-1]},
    }
    if isinstance(run.batches, FAQBatches):
        rows, skipped = len(run.batches.rows), len(run.batches.skipped)
        facts |= {"questions": rows, "left_out": skipped, "batch_size": run.batches.batch_size}
        facts["prompt"] = format_prompt("{question}")
    return facts


def finetune(
    model: nn.Module,
    batches: Any,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    accumulate: int = 4,
    schedule: str = "cosine",
    warmup: float = 0.05,
    max_grad_norm: float | None = 1.0,
    output_dir: str | pathlib.Path | None = None,
    save_every: int | None = None,
    save_total_limit: int = 2,
    resume: bool = False,
    tensorboard: bool = False,
    seed: int = 0,
    progress: bool = True,
    cuda_graphs: bool | None = None,
    gradient_checkpointing: bool | str | None = None,
) -> TrainResult:
    """Returns the losses of a run that trained the model's parameters with requires_grad, in place.

    Args:
        model: any causal language model, ours or transformers'; see `answer_loss` for what is asked of it. In training mode
            while this runs, as before after it.
        batches: FAQBatches, or any iterable of Batch with a length, iterated again for every epoch. Resuming needs its
            state_dict and load_state_dict.
        optimizer: over those parameters; the lr of its groups is the peak of the schedule, and is so again afterwards.
        steps: optimizer steps (default 80), or epochs: passes over batches, rounded up to whole steps.
        accumulate: batches a step.
        schedule: "cosine", "linear" or "constant". warmup: share of the steps in which the learning rate rises.
        max_grad_norm: gradients are scaled down to this 2-norm over all parameters; None: never.
        output_dir: gets metrics.jsonl, checkpoints and tensorboard/; without resume it holds no earlier run.
        save_every: steps between checkpoints of the whole state; None: none. save_total_limit: the newest so many stay.
        resume: continue from the newest whole checkpoint in output_dir, bit for bit on the CPU; from the start if none.
        tensorboard: write event files (needs the extra `train`).
        seed: of dropout; PyTorch's global generators are as before after the call.
        progress: show a line with loss, learning rate, tokens per second and peak GPU memory.
        cuda_graphs: record forward and backward of each shape of batch, so that Python's time is paid once (graphs.py);
            batches are padded to a multiple of 64 tokens, and dropout draws other masks. None: where it can be.
        gradient_checkpointing: False, True, "selective" or "offload", as `Falcon.gradient_checkpointing`, which is as before
            after the call; None: as it is.

    Raises:
        ValueError: an option out of its range, no trainable parameter, an encoder-decoder, a checkpoint of another run
            (the differences are listed), cuda_graphs=True for a model whose steps cannot be recorded, or
            gradient_checkpointing for another model than Falcon.
        FloatingPointError: ten steps in a row without a finite loss and gradient.

    Example:
        >>> qlite.finetune(model, batches, optimizer, steps=80, accumulate=4)  # doctest: +SKIP
    """
    counts = {"steps": steps, "accumulate": accumulate, "save_every": save_every, "save_total_limit": save_total_limit}
    check_options(counts, epochs, schedule, warmup, max_grad_norm)
    folder = None if output_dir is None else pathlib.Path(output_dir)
    _check_output(folder, batches, save_every=save_every, resume=resume, tensorboard=tensorboard)
    if epochs is not None:
        steps = math.ceil(epochs * len(batches) / accumulate)
    steps = 80 if steps is None else steps
    trained = _trained_parameters(model, optimizer)
    checkpointing = _checkpointing(model, gradient_checkpointing)
    reason = why_not(model)
    if cuda_graphs and reason:
        raise ValueError(f"finetune: cuda_graphs is True, but {reason}; leave it out, or None")
    settings = {
        "steps": steps, "accumulate": accumulate, "schedule": schedule, "warmup": warmup,
        "max_grad_norm": max_grad_norm, "seed": seed, **_describe(model, optimizer),
    }  # fmt: skip
    run = saved_run.Run(trained, optimizer, batches, settings)
    # Not among what a checkpoint is compared by: one from a GPU may go on where there is none.
    settings = {**settings, "cuda_graphs": reason is None and cuda_graphs is not False}
    forget(model)
    device, modes = run.device, [(module, module.training) for module in model.modules()]
    for parameter in trained.values():
        parameter.grad = None  # a call that was interrupted may have left a part of a window's gradient
    with checkpointing, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Not torch.manual_seed, which seeds the generators of all devices: those are not put back.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        if _dtype(model) == torch.float16:
            run.progress["loss_scale"] = FIRST_LOSS_SCALE
        try:
            if resume and folder is not None:
                saved_run.load_newest(folder, run)
            with contextlib.ExitStack() as stack:
                journal = stack.enter_context(
                    contextlib.closing(Journal(folder, tensorboard, progress, run.progress["step"], steps))
                )
                model.train()
                graphs = None
                if settings["cuda_graphs"]:
                    graphs = stack.enter_context(StepGraphs(model, list(trained.values())))  # type: ignore[arg-type]
                return _loop(model, run, journal, graphs, settings, _saver(folder, run, save_every, save_total_limit))
        finally:
            for module, training in modes:
                module.training = training
            for parameter in trained.values():
                parameter.grad = None  # of a window that was broken off
            for group, peak in zip(optimizer.param_groups, settings["lr"], strict=True):
                group["lr"] = peak
            if isinstance(optimizer, OURS):
                optimizer.grad_scale = None


def _checkpointing(model: nn.Module, mode: bool | str | None) -> contextlib.AbstractContextManager[None]:
    """Returns in what a Falcon computes its blocks again as `mode` says, None: as it does; ValueError for what cannot be."""
    if not isinstance(model, Falcon):
        if mode is not None:
            raise ValueError(
                f"finetune: gradient_checkpointing is of qlite.Falcon; {type(model).__name__} has a switch of its own, such as "
                "transformers' model.gradient_checkpointing_enable()"
            )
        return contextlib.nullcontext()
    before = model.gradient_checkpointing
    mode = before if mode is None else mode
    check_mode(mode)

    @contextlib.contextmanager
    def inside() -> Iterator[None]:
        model.gradient_checkpointing = mode
        try:
            yield
        finally:
            model.gradient_checkpointing = before
            model.host_memory.clear()

    return inside()


def _saver(folder: pathlib.Path | None, run: saved_run.Run, every: int | None, limit: int) -> Callable[[int], None]:
    """Returns what is called after each step, and saves when it is time."""

    def save(step: int) -> None:
        if folder is not None and every and step % every == 0:
            saved_run.save(folder, run, limit)

    return save


def _rescale(optimizer: torch.optim.Optimizer, gradients: list[Tensor], scale: float, shrink: Tensor | None) -> None:
    """Takes the loss scale out of the gradients and shrinks them; ours is told to, as it reads them."""
    if isinstance(optimizer, OURS):
        optimizer.grad_scale = None
    if shrink is None and scale == 1:
        return
    factor = torch.full((), 1 / scale, device=gradients[0].device) if shrink is None else (shrink / scale).float()
    if isinstance(optimizer, OURS):
        optimizer.grad_scale = factor
    else:
        torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]


def _loop(
    model: nn.Module,
    run: saved_run.Run,
    journal: Journal,
    graphs: StepGraphs | None,
    settings: dict[str, Any],
    save: Callable[[int], None],
) -> TrainResult:
    """Returns the result of all remaining steps."""
    optimizer, done, parameters = run.optimizer, run.progress, list(run.parameters.values())
    steps, limit = settings["steps"], settings["max_grad_norm"]
    stream = _endless(run.batches)
    skipped_in_a_row, tokens, begun = 0, 0, time.perf_counter()
    while done["step"] < steps:
        start = time.perf_counter()
        window = [next(stream) for _ in range(settings["accumulate"])]
        scale = done["loss_scale"]
        total = _accumulate(model, window, scale, graphs)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) / scale
        loss, size = torch.stack((total.double(), norm.double())).tolist()  # the one time that the host waits
        if not (math.isfinite(loss) and math.isfinite(size)):
            optimizer.zero_grad(set_to_none=graphs is None)
            done["skipped"] += 1
            done["loss_scale"], done["good_steps"] = max(1.0, scale / 2), 0
            skipped_in_a_row += 1
            if skipped_in_a_row >= MOST_SKIPPED:
                raise FloatingPointError(
                    f"finetune: {MOST_SKIPPED} steps in a row at step {done['step']} had no finite loss and gradient "
                    f"(last loss {loss}); lower the learning rate, or train in bfloat16 or float32"
                )
            continue
        skipped_in_a_row = 0
        shrink = None if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0)
        _rescale(optimizer, gradients, scale, shrink)
        factor = learning_rate_factor(done["step"], steps, settings["schedule"], settings["warmup"])
        for group, peak in zip(optimizer.param_groups, settings["lr"], strict=True):
            group["lr"] = peak * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=graphs is None)  # a recording adds to the tensors that it found
        done["step"] += 1
        done["losses"].append(loss)
        done["good_steps"] += 1
        if settings["dtype"] == "torch.float16" and done["good_steps"] % SCALE_GROWTH_STEPS == 0:
            done["loss_scale"] = scale * 2
        seen = sum(batch.input_ids.numel() for batch in window)
        tokens += seen
        row = {
            "step": done["step"], "loss": loss, "lr": optimizer.param_groups[0]["lr"], "grad_norm": size,
            "tokens_per_second": seen / (time.perf_counter() - start),
        }  # fmt: skip
        if run.device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated(run.device) / 2**30
        journal.write(row)
        save(done["step"])
    losses = list(done["losses"])
    return TrainResult(losses, done["skipped"], time.perf_counter() - begun, tokens, _facts(model, run, settings, losses))

"""The training loop: accumulate, clip, step, write down what happened.

One step takes `accumulate` batches and divides their summed loss by all the answer tokens of the window, so that uneven
batches weigh as they would in one big batch. Only parameters with requires_grad are touched; the model computes in its own
dtype, and float16 activations get a loss scale. A step whose loss or gradient is not finite changes nothing.

Not done here: several processes (distributed training), evaluation, a chunked cross-entropy.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from qlite import resume as saved_run
from qlite.data import IGNORED, Batch
from qlite.storage import replace_file

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
    """

    losses: list[float]
    skipped: int
    seconds: float
    tokens: int


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

    Logits are computed for the positions that predict a label, and for no others.
    """
    device = next(model.parameters()).device
    positions = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    targets = batch.labels[:, 1:][positions].to(device)
    rows, columns = (index.to(device) for index in positions)
    hidden = model.hidden_states(batch.input_ids.to(device))  # type: ignore[operator]
    logits = model.lm_head(hidden[rows, columns])  # type: ignore[operator]
    return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    empty = 0
    # A run resumed at the very end of an epoch finds the rest of it empty, once.
    while empty < 2:
        empty += 1
        for batch in batches:
            empty = 0
            yield batch
    raise ValueError("finetune: batches is empty")


def _accumulate(model: nn.Module, window: Sequence[Batch], scale: float) -> float:
    """Adds the gradients of a window, scaled, to the parameters; returns the mean loss per labelled token."""
    labelled = sum(batch.n_tokens for batch in window)
    if not labelled:
        raise ValueError("finetune: a window of batches has no labelled token")
    total = None
    for batch in window:
        loss = answer_loss(model, batch) / labelled
        (loss * scale).backward()
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total.item()


def _check(steps: int | None, epochs: float | None, accumulate: int, schedule: str, warmup: float) -> None:
    if steps is not None and epochs is not None:
        raise ValueError("finetune: give steps or epochs, not both")
    if (steps is not None and steps < 1) or (epochs is not None and not epochs > 0):
        raise ValueError(f"finetune: steps={steps}, epochs={epochs}; wanted more than none")
    if accumulate < 1:
        raise ValueError(f"finetune: accumulate is {accumulate}; wanted at least 1")
    if schedule not in SCHEDULES:
        raise ValueError(f"finetune: schedule is {schedule!r}; wanted one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup <= 1:
        raise ValueError(f"finetune: warmup is {warmup}; wanted a share of the steps, 0 to 1")


def _tensorboard(folder: pathlib.Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("finetune: tensorboard is not installed; pip install 'qlite[train]'") from error
    return SummaryWriter(str(folder))


class _Journal:
    """Where the figures of each step go: metrics.jsonl, TensorBoard, the progress line."""

    def __init__(self, folder: pathlib.Path | None, tensorboard: bool, progress: bool, first: int, steps: int):
        self.file = self.board = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "metrics.jsonl"
            # A resumed run drops the lines of steps that are about to be done again.
            kept = [row for row in read_metrics(path) if row["step"] <= first] if first and path.exists() else []
            replace_file(path, "".join(json.dumps(row) + "\n" for row in kept))
            self.file = path.open("a", encoding="utf-8")
            self.board = _tensorboard(folder / "tensorboard") if tensorboard else None
        elif tensorboard:
            raise ValueError("finetune: tensorboard needs an output_dir to write to")
        self.bar = tqdm(total=steps, initial=first, disable=not progress, unit="step", dynamic_ncols=True)

    def write(self, row: dict[str, float]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        if self.board is not None:
            for key in ("loss", "lr", "grad_norm", "tokens_per_second"):
                self.board.add_scalar(key, row[key], int(row["step"]))
        shown = {"loss": f"{row['loss']:.4f}", "lr": f"{row['lr']:.2e}", "tok/s": f"{row['tokens_per_second']:,.0f}"}
        if "peak_gib" in row:
            shown["peak"] = f"{row['peak_gib']:.2f} GiB"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


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
) -> TrainResult:
    """Returns the losses of a run that trained the model's parameters with requires_grad, in place.

    Args:
        model: has hidden_states(input_ids) and lm_head; in training mode while this runs, as before after it.
        batches: FAQBatches, or any iterable of Batch with a length, iterated again for every epoch. Resuming needs its
            state_dict and load_state_dict.
        optimizer: over those parameters; the lr of its groups is the peak of the schedule.
        steps: optimizer steps (default 80), or epochs: passes over batches, rounded up to whole steps.
        accumulate: batches a step.
        schedule: "cosine", "linear" or "constant". warmup: share of the steps in which the learning rate rises.
        max_grad_norm: gradients are scaled down to this 2-norm over all parameters; None: never.
        output_dir: gets metrics.jsonl, checkpoints and tensorboard/.
        save_every: steps between checkpoints of the whole state; None: none. save_total_limit: the newest so many stay.
        resume: continue from the newest whole checkpoint in output_dir, bit for bit on the CPU; from the start if none.
        tensorboard: write event files (needs the extra `train`).
        seed: of dropout; PyTorch's global generators are as before after the call.
        progress: show a line with loss, learning rate, tokens per second and peak GPU memory.

    Raises:
        ValueError: an option out of its range, no trainable parameter, or a checkpoint of another run (the differences
            are listed). RuntimeError: ten steps in a row without a finite loss and gradient.

    Example:
        >>> qlite.finetune(model, batches, optimizer, steps=80, accumulate=4)  # doctest: +SKIP
    """
    _check(steps, epochs, accumulate, schedule, warmup)
    if epochs is not None:
        steps = math.ceil(epochs * len(batches) / accumulate)
    steps = 80 if steps is None else steps
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("finetune: no parameter of the model has requires_grad; call add_lora first")
    folder = None if output_dir is None else pathlib.Path(output_dir)
    if folder is None and (save_every or resume):
        raise ValueError("finetune: checkpoints need an output_dir")
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    settings = {
        "steps": steps, "accumulate": accumulate, "schedule": schedule, "warmup": warmup,
        "max_grad_norm": max_grad_norm, "seed": seed, "lr": [group["initial_lr"] for group in optimizer.param_groups],
        "base": getattr(model, "base_fingerprint", None),
    }  # fmt: skip
    run = saved_run.Run(trained, optimizer, batches, settings)
    device = next(iter(trained.values())).device
    training = model.training
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if next(model.parameters()).dtype == torch.float16:
            run.progress["loss_scale"] = FIRST_LOSS_SCALE
        if resume and folder is not None:
            saved_run.load_newest(folder, run)
        journal = _Journal(folder, tensorboard, progress, run.progress["step"], steps)
        try:
            model.train()
            return _loop(model, run, journal, device, settings, _saver(folder, run, save_every, save_total_limit))
        finally:
            model.train(training)
            journal.close()


def _saver(folder: pathlib.Path | None, run: saved_run.Run, every: int | None, limit: int) -> Callable[[int], None]:
    """Returns what is called after each step, and saves when it is time."""

    def save(step: int) -> None:
        if folder is not None and every and step % every == 0:
            saved_run.save(folder, run, limit)

    return save


def _loop(
    model: nn.Module,
    run: saved_run.Run,
    journal: _Journal,
    device: torch.device,
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
        loss = _accumulate(model, window, scale)
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / scale)
        norm = torch.nn.utils.get_total_norm(gradients)
        if not (math.isfinite(loss) and math.isfinite(norm.item())):
            optimizer.zero_grad(set_to_none=True)
            done["skipped"] += 1
            done["loss_scale"], done["good_steps"] = max(1.0, scale / 2), 0
            skipped_in_a_row += 1
            if skipped_in_a_row >= MOST_SKIPPED:
                raise RuntimeError(
                    f"finetune: {MOST_SKIPPED} steps in a row at step {done['step']} had no finite loss and gradient "
                    f"(last loss {loss}); lower the learning rate, or train in bfloat16 or float32"
                )
            continue
        skipped_in_a_row = 0
        if limit is not None:
            torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
        factor = learning_rate_factor(done["step"], steps, settings["schedule"], settings["warmup"])
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done["step"] += 1
        done["losses"].append(loss)
        done["good_steps"] += 1
        if scale != 1.0 and done["good_steps"] % SCALE_GROWTH_STEPS == 0:
            done["loss_scale"] = scale * 2
        seen = sum(batch.input_ids.numel() for batch in window)
        tokens += seen
        row = {
            "step": done["step"], "loss": loss, "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm.item(),
            "tokens_per_second": seen / (time.perf_counter() - start),
        }  # fmt: skip
        if device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        journal.write(row)
        save(done["step"])
    return TrainResult(list(done["losses"]), done["skipped"], time.perf_counter() - begun, tokens)


def read_metrics(path: str | pathlib.Path) -> list[dict[str, float]]:
    """Returns the rows of a metrics.jsonl, one a step."""
    return [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]


def plot_losses(metrics: str | pathlib.Path, image: str | pathlib.Path) -> None:
    """Writes the loss curve of a metrics.jsonl as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_losses: matplotlib is not installed; pip install 'qlite[plot]'") from error
    rows = read_metrics(metrics)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows])
    axes.set(xlabel="step", ylabel="loss per answer token (nats)", title="Training loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(image, dpi=120)

"""Where a run's figures go: metrics.jsonl, TensorBoard, the progress line, and the picture of the losses afterwards."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from qlite.storage import replace_file


def _tensorboard(folder: pathlib.Path, first: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("finetune: tensorboard is not installed; pip install 'qlite[train]'") from error
    return SummaryWriter(str(folder), purge_step=first + 1)  # earlier events of steps about to be done are not shown


def _rows_until(path: pathlib.Path, last: int) -> list[dict[str, float]]:
    """Returns the rows of the steps up to `last`: those after it are about to be done again."""
    rows: list[dict[str, float]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if last and path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a killed run may be torn
            break
        if row["step"] <= last:
            rows.append(row)
    return rows


class Journal:
    """Where the figures of each step go: metrics.jsonl, TensorBoard, the progress line."""

    def __init__(self, folder: pathlib.Path | None, tensorboard: bool, progress: bool, first: int, steps: int):
        self.file = self.board = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "metrics.jsonl"
            self.board = _tensorboard(folder / "tensorboard", first) if tensorboard else None
            replace_file(path, "".join(json.dumps(row) + "\n" for row in _rows_until(path, first)))
            self.file = path.open("a", encoding="utf-8")
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


def read_metrics(path: str | pathlib.Path) -> list[dict[str, float]]:
    """Returns the rows of a metrics.jsonl, one a step."""
    return [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]


def plot_losses(metrics: str | pathlib.Path, image: str | pathlib.Path) -> None:
    """Writes the loss curve of a metrics.jsonl as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    canvas = figure()
    rows = read_metrics(metrics)
    draw_losses(canvas, [row["step"] for row in rows], [row["loss"] for row in rows], image)


def figure() -> Any:
    """Returns an empty matplotlib Figure; ImportError, with what to install, where there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_losses: matplotlib is not installed; pip install 'qlite[plot]'") from error
    return Figure(figsize=(7, 4), layout="constrained")


def draw_losses(figure: Any, steps: Sequence[float], losses: Sequence[float], image: str | pathlib.Path) -> None:
    """Draws the loss of each step into a Figure and writes it as a PNG."""
    axes = figure.subplots()
    axes.plot(steps, losses)
    axes.set(xlabel="step", ylabel="loss per answer token (nats)", title="Training loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(image, dpi=120)

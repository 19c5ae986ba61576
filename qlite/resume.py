"""The exact state of a run on disk: what is needed to go on bit for bit, written so that a crash loses nothing.

A checkpoint is a folder `checkpoint-<step>` with state.safetensors (trained parameters, optimizer moments, states of the
random generators), state.json (step, losses, data position, settings) and manifest.json (size and SHA-256 of both). It is
written under another name, flushed to the disk, and renamed: it is there whole or not at all. The newest one whose
manifest holds is resumed.

Not done here: the base weights (they do not change), pickle of any kind.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
import warnings
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from qlite.storage import sync

STATE, TENSORS, MANIFEST = "state.json", "state.safetensors", "manifest.json"


@dataclasses.dataclass
class Run:
    """All that changes while a run goes on.

    Attributes:
        parameters: name -> trained parameter. optimizer: over them. batches: the data.
        settings: what a resumed run must have in common with the saved one.
        progress: step, losses, skipped, loss_scale, good_steps.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    batches: Any
    settings: dict[str, Any]
    progress: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"step": 0, "losses": [], "skipped": 0, "loss_scale": 1.0, "good_steps": 0}
    )


def _digest(path: pathlib.Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _step_of(folder: pathlib.Path) -> int:
    return int(folder.name.rpartition("-")[2])


def checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the checkpoint folders in `folder`, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=_step_of, reverse=True)


def _split(state: dict[Any, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Returns an optimizer's per-parameter state as named tensors, and the rest as JSON."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for index, entry in state.items():
        rest[str(index)] = {key: value for key, value in entry.items() if not isinstance(value, Tensor)}
        tensors |= {f"optimizer/{index}/{key}": value for key, value in entry.items() if isinstance(value, Tensor)}
    return tensors, rest


def save(folder: pathlib.Path, run: Run, total_limit: int) -> pathlib.Path:
    """Returns the checkpoint just written for the run's present step; all but the newest `total_limit` are removed.

    Raises:
        TypeError: the data has no state_dict, so a resumed run could not continue it.
    """
    if not hasattr(run.batches, "state_dict"):
        raise TypeError(f"save: {type(run.batches).__name__} has no state_dict; checkpoints need to know the data's place")
    target = folder / f"checkpoint-{run.progress['step']:06d}"
    temporary = folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    optimizer = run.optimizer.state_dict()
    tensors, rest = _split(optimizer["state"])
    tensors |= {f"parameter/{name}": parameter.detach() for name, parameter in run.parameters.items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available() and any(p.is_cuda for p in run.parameters.values()):
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temporary / TENSORS)
    state = {
        "settings": run.settings,
        "progress": run.progress,
        "data": run.batches.state_dict(),
        "optimizer": {"state": rest, "param_groups": optimizer["param_groups"]},
    }
    (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
    manifest = {name: _digest(temporary / name) for name in (TENSORS, STATE)}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for name in (TENSORS, STATE, MANIFEST):
        sync(temporary / name)
    sync(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    sync(folder)
    for old in checkpoints(folder)[max(1, total_limit) :]:
        shutil.rmtree(old)
    return target


def _read(checkpoint: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and the JSON of a checkpoint; ValueError where a file is not what the manifest says."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name in (TENSORS, STATE):
            if _digest(checkpoint / name) != manifest[name]:
                raise ValueError(f"{name} is not the file that was written")
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        return load((checkpoint / TENSORS).read_bytes()), state
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{checkpoint}: damaged ({error})") from error


def load_newest(folder: pathlib.Path, run: Run) -> pathlib.Path | None:
    """Returns the checkpoint that the run was set back to, in place: the newest whole one, or None where there is none.

    A damaged checkpoint is passed over with a warning that names it.

    Raises:
        ValueError: every checkpoint is damaged, or the run was saved under other settings (the differences are listed).
    """
    found = checkpoints(folder)
    damaged: list[str] = []
    for checkpoint in found:
        try:
            tensors, state = _read(checkpoint)
        except ValueError as error:
            damaged.append(str(error))
            continue
        if damaged:
            warnings.warn(f"resuming from {checkpoint}; passed over: {'; '.join(damaged)}", stacklevel=2)
        _restore(checkpoint, run, tensors, state)
        return checkpoint
    if damaged:
        raise ValueError(f"resume: no whole checkpoint in {folder}: {'; '.join(damaged)}")
    return None


def _restore(checkpoint: pathlib.Path, run: Run, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    saved = state["settings"]
    differences = [
        f"{key} was {saved.get(key)!r}, is {run.settings.get(key)!r}"
        for key in sorted(saved.keys() | run.settings.keys())
        if saved.get(key) != run.settings.get(key)
    ]
    kept = {name.removeprefix("parameter/"): t for name, t in tensors.items() if name.startswith("parameter/")}
    for name in sorted(kept.keys() | run.parameters.keys()):
        there, here = kept.get(name), run.parameters.get(name)
        if there is None or here is None or there.shape != here.shape:
            shapes = [None if t is None else tuple(t.shape) for t in (there, here)]
            differences.append(f"parameter {name} was {shapes[0]}, is {shapes[1]}")
    if differences:
        raise ValueError(f"{checkpoint}: saved by another run: {'; '.join(differences[:8])}")
    run.batches.load_state_dict(state["data"])
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            parameter.copy_(kept[name])
    entries: dict[int, dict[str, Any]] = {int(i): dict(entry) for i, entry in state["optimizer"]["state"].items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            entries[int(index)][key] = tensor
    run.optimizer.load_state_dict({"state": entries, "param_groups": state["optimizer"]["param_groups"]})
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"])
    run.progress.update(state["progress"])

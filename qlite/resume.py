"""The exact state of a run on disk: what is needed to go on bit for bit, written so that a crash loses nothing.

A checkpoint is a folder `checkpoint-<step>` with state.safetensors (trained parameters, optimizer moments, states of the
random generators), state.json (step, losses, data position, settings) and manifest.json (size and SHA-256 of both). It is
written under another name, flushed to the disk, and renamed: it is there whole or not at all. The newest one whose
manifest holds is resumed.

Not done here: the base weights (they do not change), pickle of any kind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
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

    @property
    def device(self) -> torch.device:
        """Where the trained parameters are."""
        return next(iter(self.parameters.values())).device


def _digest(path: pathlib.Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _step_of(folder: pathlib.Path) -> int:
    return int(folder.name.rpartition("-")[2])


def checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the checkpoint folders in `folder`, the newest first."""
    # Only what `save` names: a user's own checkpoint-best-40 is neither read nor removed.
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", path.name)]
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
    """Returns the checkpoint just written for the run's present step, the newest `total_limit` up to it stay.

    Raises:
        TypeError: the data has no state_dict, so a resumed run could not continue it.
    """
    if not hasattr(run.batches, "state_dict"):
        raise TypeError(f"save: {type(run.batches).__name__} has no state_dict; checkpoints need to know the data's place")
    target = folder / f"checkpoint-{run.progress['step']:06d}"
    temporary = folder / f".{target.name}.tmp"
    for leftover in folder.glob(".checkpoint-*.tmp"):
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    optimizer = run.optimizer.state_dict()
    tensors, rest = _split(optimizer["state"])
    tensors |= {f"parameter/{name}": parameter.detach() for name, parameter in run.parameters.items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if run.device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(run.device)
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
    # Only a damaged one can be in the way: one that this run passed over when it resumed from an older one. A run that
    # starts anew refuses a folder with checkpoints.
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    sync(folder)
    # What is newer was passed over too. It does not count: the whole ones below it would be removed in its favour.
    for old in [path for path in checkpoints(folder) if _step_of(path) <= run.progress["step"]][total_limit:]:
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


def _differences(run: Run, saved: dict[str, Any], kept: dict[str, Tensor]) -> list[str]:
    """Returns in words what the run and a saved one, its settings and its parameters, do not have in common."""
    settings = json.loads(json.dumps(run.settings))  # as they were saved: a tuple is a list
    saved = dict(saved)
    for described, parameters in ((saved, kept), (settings, run.parameters)):
        described |= {f"parameter {name}": f"{p.dtype} {tuple(p.shape)}" for name, p in parameters.items()}
    return [
        f"{key} was {saved.get(key)!r:.200}, is {settings.get(key)!r:.200}"
        for key in sorted(saved.keys() | settings.keys())
        if saved.get(key) != settings.get(key)
    ]


def _restore(checkpoint: pathlib.Path, run: Run, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Sets the run back, or raises and leaves it as it is: what can refuse comes before the parameters change."""
    kept = {name.removeprefix("parameter/"): t for name, t in tensors.items() if name.startswith("parameter/")}
    differences = _differences(run, state["settings"], kept)
    if differences:
        more = f"; and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise ValueError(f"{checkpoint}: saved by another run: {'; '.join(differences[:8])}{more}")
    entries: dict[int, dict[str, Any]] = {int(i): dict(entry) for i, entry in state["optimizer"]["state"].items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            entries[int(index)][key] = tensor
    with contextlib.ExitStack() as undo:
        undo.callback(run.batches.load_state_dict, run.batches.state_dict())
        run.batches.load_state_dict(state["data"])
        run.optimizer.load_state_dict({"state": entries, "param_groups": state["optimizer"]["param_groups"]})
        undo.pop_all()
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            parameter.copy_(kept[name])
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and run.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"], run.device)
    run.progress.update(state["progress"])

"""Adapters on the hub: pushed, with what a run left beside them and a model card.

Five names of a folder can go, and nothing else ever: the adapter's two files, training.json and loss.png where a run left
them there, and README.md. Transfers, tokens and retries are huggingface_hub's; downloads are in download.py.

Not done here: whole models, data sets, branches and pull requests.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

from qlite.adapters import CONFIG, TENSORS, config_text, read_config, read_tensors
from qlite.card import model_card
from qlite.download import hub_errors, is_repo_id
from qlite.storage import read_json, read_metadata

CARD, TRAINING, CURVE = "README.md", "training.json", "loss.png"


@dataclasses.dataclass(frozen=True)
class PushReport:
    """What `push_adapter` sent, or would send; `print` it.

    Attributes:
        repo_id: where to. private: whether the repository is. files: name -> bytes of what goes.
        card: the model card that was written; None where README.md is not ours.
        kept: whether the repository has a README.md of its own, which stayed. url: of the commit; None for a dry run.
    """

    repo_id: str
    private: bool
    files: dict[str, int]
    card: str | None
    kept: bool = False
    url: str | None = None

    def __str__(self) -> str:
        where = f"{self.repo_id} ({'private' if self.private else 'public'})"
        lines = [f"pushed to {where}: {self.url}" if self.url else f"a dry run, nothing was sent; to {where} would go:"]
        lines += [f"  {name}  {size:,} bytes" for name, size in self.files.items()]
        if self.kept:
            lines.append(f"  {CARD} of the repository was kept; figures in it may be of an earlier run")
        elif self.url is None:
            lines.append(f"  ({CARD} only if the repository has none)")
        return "\n".join(lines)


def _machine_paths(value: Any, where: str) -> Iterator[str]:
    """Yields where in a JSON value a text looks like a path on this machine."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _machine_paths(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _machine_paths(inner, f"{where}[{number}]")
    elif isinstance(value, str):
        absolute = pathlib.PurePosixPath(value).is_absolute() or pathlib.PureWindowsPath(value).is_absolute()
        if absolute or value.startswith(("~", "./", "../", "file:")):
            yield f"{where} = {value!r:.80}"


def _with_base(values: dict[str, Any], base_id: str | None, where: pathlib.Path) -> dict[str, Any]:
    """Returns the config, its base named by a hub id; ValueError where none is known."""
    stored = values.get("base_model_name_or_path")
    if base_id is not None:
        if not is_repo_id(base_id):
            raise ValueError(f"push_adapter: base_id is {base_id!r}; wanted a hub id of the form owner/name")
        # A commit of another base would be none of this one's.
        return values if stored == base_id else {**values, "base_model_name_or_path": base_id, "revision": None}
    if not isinstance(stored, str) or not is_repo_id(stored) or pathlib.Path(stored).exists():
        raise ValueError(
            f"push_adapter: {where} names the base {stored!r}, which is no hub id, or a folder here; whoever loads the "
            "adapter needs one: pass base_id='owner/name' (--base)"
        )
    return values


def _prepare(folder: pathlib.Path, repo_id: str, base_id: str | None) -> tuple[dict[str, bytes | pathlib.Path], str | None]:
    """Returns what goes to the hub by name, and the card if it is ours; ValueError for what must not go."""
    if not is_repo_id(repo_id):
        raise ValueError(f"push_adapter: repo_id is {repo_id!r}; wanted a hub id of the form owner/name")
    config, found = read_config(folder)
    stored = read_tensors(folder, config)
    values = _with_base(found, base_id, folder / CONFIG)
    training = read_json(folder / TRAINING) if (folder / TRAINING).is_file() else {}
    for name, value in ((CONFIG, values), (TENSORS, read_metadata(folder / TENSORS)), (TRAINING, training)):
        paths = list(_machine_paths(value, ""))
        if paths:
            raise ValueError(f"push_adapter: {folder / name} holds a path of this machine, {'; '.join(paths)}; remove it")
    files: dict[str, bytes | pathlib.Path] = {name: folder / name for name in (CONFIG, TENSORS)}
    if values is not found:
        files[CONFIG] = config_text(values).encode()
    files |= {name: folder / name for name in (TRAINING, CURVE) if (folder / name).is_file()}
    if (folder / CARD).is_file():
        return {**files, CARD: folder / CARD}, None
    kept = [tensors for part in (stored.layers, stored.saved) for tensors in part.values()]
    parameters = sum(tensor.numel() for tensors in kept for tensor in tensors.values())
    curve = CURVE if CURVE in files else None
    try:
        card = model_card(repo_id, config, values, training, layers=list(stored.layers), parameters=parameters, curve=curve)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"push_adapter: {folder / TRAINING} is not as qlite writes it ({error!r}); remove it") from error
    return {**files, CARD: card.encode()}, card


def push_adapter(
    folder: str | pathlib.Path,
    repo_id: str,
    *,
    base_id: str | None = None,
    private: bool = True,
    token: str | None = None,
    dry_run: bool = False,
) -> PushReport:
    """Returns a report of the files of an adapter's folder that are on the hub now, in one commit.

    These can go, and nothing else: adapter_config.json, adapter_model.safetensors, training.json, loss.png, README.md.
    A README.md is written from the others where the folder has none; one that the repository has is never replaced. The
    folder is left as it is.

    Args:
        folder: as save_adapter wrote it; `TrainResult.save` adds training.json and loss.png.
        repo_id: "owner/name", created where it is not there.
        base_id: hub id of the base, where adapter_config.json names it by a folder of this machine.
        private: of a repository that is created; one that is public already is refused unless this is False.
        token: of the hub; default: the one huggingface_hub has stored. dry_run: contact nothing, only report.

    Raises:
        FileNotFoundError, ValueError: the folder holds no whole adapter, or a path of this machine; or the base has no hub
            id. PermissionError: no login, or not allowed. ConnectionError: not now.

    Example:
        >>> print(qlite.push_adapter("faq-lora/", "me/falcon-7b-faq"))  # doctest: +SKIP
    """
    files, card = _prepare(pathlib.Path(folder), repo_id, base_id)
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    report = PushReport(repo_id, private, sizes, card)
    if dry_run:
        return report
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    with hub_errors(f"pushing to {repo_id}"):
        api.create_repo(repo_id, private=private, exist_ok=True)
        there = api.model_info(repo_id)
        if private and there.private is False:
            raise ValueError(f"push_adapter: {repo_id} is there and public; pass private=False (--public) to push to it")
        if any(sibling.rfilename == CARD for sibling in there.siblings or []):
            files.pop(CARD)
            sizes.pop(CARD)
            report = dataclasses.replace(report, card=None, kept=True)
        operations = [CommitOperationAdd(name, str(f) if isinstance(f, pathlib.Path) else f) for name, f in files.items()]
        # The parent: a card that someone adds in between makes the hub refuse this commit.
        commit = api.create_commit(repo_id, operations, commit_message="Upload a LoRA adapter", parent_commit=there.sha)
    return dataclasses.replace(report, private=bool(there.private), url=commit.commit_url)

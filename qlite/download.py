"""From a path or a hub id to a local folder, and what the hub's errors mean.

Downloads, their cache, their tokens and their retries are huggingface_hub's. Each file that arrives is compared with its
checksum, once; the client itself compares sizes.

Not done here: pushing, which is in hub.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

PIECE = 16 * 2**20  # bytes that are hashed at a time


def resolve_folder(
    path_or_repo_id: str | pathlib.Path,
    *,
    revision: str | None = None,
    names: Sequence[str] = ("*.json", "*.safetensors"),
) -> pathlib.Path:
    """Returns the local folder of a path, or of a hub repository after downloading its files of the given names.

    Args:
        path_or_repo_id: an existing folder, or "owner/name" on the hub. revision: branch, tag or commit.
        names: patterns; no file in a folder of the repository is taken.

    Raises:
        FileNotFoundError: neither a folder nor of the form owner/name, or the hub has no such thing, or it is offline mode and
            the cache has not all of it. PermissionError: a login or an agreement is wanted.
        ConnectionError: not now: no connection, too many requests, an upset hub, or a file that arrived damaged.
        ValueError: a revision of a folder.
    """
    folder = pathlib.Path(path_or_repo_id)
    if os.path.isdir(folder):  # unlike Path.is_dir, it answers for a name that is too long to be one
        if revision is not None:
            raise ValueError(f"{folder} is a folder, which has no revision {revision!r}; leave it out, or name a hub id")
        return folder
    repo_id = str(path_or_repo_id)
    if os.path.exists(folder) or not is_repo_id(repo_id):
        raise FileNotFoundError(f"{path_or_repo_id} is neither a folder nor a hub id of the form owner/name")
    from huggingface_hub import constants, snapshot_download

    blobs = pathlib.Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}" / "blobs"
    known = set(os.listdir(blobs)) if blobs.is_dir() else set()
    what = f"downloading {repo_id}" + (f" at revision {revision}" if revision else "")
    with hub_errors(what):
        # The top folder alone: some repositories keep exports for other runtimes in folders of their own.
        snapshot = pathlib.Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=list(names), ignore_patterns=["*/*"])
        )
    _check_arrived(snapshot, known, what)
    return snapshot


def is_repo_id(text: str) -> bool:
    """Whether a text has the form of a hub id, owner/name, that the hub would have."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return re.fullmatch(r"[\w\-]+/[\w.\-]+", text) is not None


def commit_of(folder: pathlib.Path) -> str | None:
    """Returns the commit that a folder in the hub's cache is a snapshot of; None for any other folder."""
    is_snapshot = folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if is_snapshot else None


def _check_arrived(snapshot: pathlib.Path, known: set[str], what: str) -> None:
    """ConnectionError where a file that was not in the cache before is not, to the byte, the one that the hub has.

    The hub's client compares sizes. Its cache names a file by SHA-256, or a small one by the SHA-1 that git gives it.
    """
    for path in sorted(snapshot.glob("*")):  # no folder, where the repository has no such file
        name = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
        if name in known or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name):
            continue
        header = f"blob {path.stat().st_size}\0".encode()
        digest = hashlib.sha256() if len(name) == 64 else hashlib.sha1(header, usedforsecurity=False)
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
        if digest.hexdigest() != name:
            path.resolve().unlink()
            path.unlink()
            raise ConnectionError(f"{what}: {path.name} arrived damaged and was removed; run it again")


@contextlib.contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turns what the hub's client raises into one line: a FileNotFoundError, PermissionError or ConnectionError.

    An OSError of this machine, such as a full disk, and a ValueError pass as they are.
    """
    from huggingface_hub import errors

    try:
        yield
    # HTTPError: of the network library, and no OSError. RuntimeError: of the client's threads and of its Xet transfers.
    except (OSError, RuntimeError, errors.HTTPError, errors.XetDownloadError) as error:  # type: ignore[attr-defined]
        if isinstance(error, OSError) and error.errno is not None:
            raise
        kind, reason = _explain(error)
        raise kind(f"{what}: {reason}") from error


def _explain(error: BaseException) -> tuple[type[OSError], str]:
    """Returns the kind and the reason of an error of the hub's client, from it or from what caused it."""
    from huggingface_hub import constants, errors

    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    if any(isinstance(link, errors.OfflineModeIsEnabled) for link in chain):
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError, "HF_HUB_OFFLINE is set, and the cache does not hold all of it; unset it to download"
        return ConnectionError, "HF_HUB_OFFLINE is set; unset it"
    answer = next((link for link in chain if isinstance(link, errors.HfHubHTTPError)), None)
    if answer is None:
        said = f": {' '.join(str(chain[-1]).split())[:200]}"
        if any(isinstance(link, errors.HTTPError) for link in chain):  # type: ignore[attr-defined]
            return ConnectionError, f"no connection to {constants.ENDPOINT}, or it broke{said}; try again"
        return ConnectionError, f"the transfer failed{said}; try again"
    status, said = answer.response.status_code, f"{answer.response.status_code}"
    if answer.server_message:
        said += f", {' '.join(answer.server_message.split())[:200]}"
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(answer, errors.GatedRepoError):
        return PermissionError, f"gated ({said}): agree to its terms on its page at the hub, and {login}"
    if status == 401:
        return PermissionError, f"private, or not there, or the token is not valid ({said}): check the name, and {login}"
    if status == 403:
        return PermissionError, f"not allowed ({said}): the token lacks a permission; {login} with one that has it"
    if isinstance(answer, errors.RevisionNotFoundError):
        return FileNotFoundError, f"there is no such revision ({said}): wanted a branch, a tag or a whole commit hash"
    if isinstance(answer, errors.RemoteEntryNotFoundError):
        return FileNotFoundError, f"a file is not there ({said})"
    if status == 404:
        return FileNotFoundError, f"there is no such repository, or not for you ({said}): check the name, or {login}"
    if status == 429:
        wait = answer.response.headers.get("Retry-After")
        return ConnectionError, f"too many requests ({said}): try again in {f'{wait} seconds' if wait else 'some minutes'}"
    if status == 412:
        return ConnectionError, f"the repository was changed meanwhile ({said}): try again"
    return ConnectionError, f"the hub answered {said}: try again later"

"""Files and folders that hold models and adapters: JSON, safetensors, hub downloads, and writes that a crash cannot halve.

A safetensors file is read by our own few lines: the header is checked whole (sizes, overlaps, duplicate names) before a
tensor is, and tensors are read, not mapped. Mapped pages count as memory, and a file that changes under a map kills the
process. The format: https://github.com/huggingface/safetensors.

Not done here: pickle (`.bin`, `.pt`) of any kind; writing tensors, which the safetensors package does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {**FLOATS, "U8": torch.uint8, "I8": torch.int8}
LARGEST_HEADER = 16 * 2**20  # bytes, of a header or a JSON file; Falcon-180B's header is under 100 kB
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PRINTED_BYTES = 256  # of each tensor, in the fingerprint
PIECE = 32 * 2**20  # bytes that go to a GPU at a time


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored, and as what: from a header, before its bytes are read.

    Attributes:
        dtype: as the file writes it, "BF16" for example. start: of its bytes in the file. size: in bytes.
    """

    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


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
        FileNotFoundError: neither a folder nor of the form owner/name, or the hub does not give it.
        ValueError: a revision of a folder.
    """
    folder = pathlib.Path(path_or_repo_id)
    if os.path.isdir(folder):  # unlike Path.is_dir, it answers for a name that is too long to be one
        if revision is not None:
            raise ValueError(f"{folder} is a folder, which has no revision {revision!r}; leave it out, or name a hub id")
        return folder
    if os.path.exists(folder) or not re.fullmatch(r"[\w\-]+/[\w.\-]+", str(path_or_repo_id)) or ".." in str(path_or_repo_id):
        raise FileNotFoundError(f"{path_or_repo_id} is neither a folder nor a hub id of the form owner/name")
    from huggingface_hub import errors, snapshot_download

    try:
        # The top folder alone: some repositories keep exports for other runtimes in folders of their own.
        return pathlib.Path(
            snapshot_download(str(path_or_repo_id), revision=revision, allow_patterns=list(names), ignore_patterns=["*/*"])
        )
    # ValueError: an id that the hub would not have. HTTPError: a network error of httpx, which is no OSError.
    except (OSError, ValueError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        raise FileNotFoundError(
            f"{path_or_repo_id}: no such folder here, and the hub did not give it: {' '.join(str(error).split())[:300]}"
        ) from error


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the pairs of a JSON object as a dict; ValueError where a key stands twice. For `object_pairs_hook`."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return result


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file; FileNotFoundError without the file, ValueError where it is something else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    if path.stat().st_size > LARGEST_HEADER:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes; at most {LARGEST_HEADER:,} are read")
    try:
        content = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}; wanted an object")
    return content


def _read_header(path: pathlib.Path) -> tuple[int, dict[str, Any]]:
    """Returns where the tensors' bytes begin in a safetensors file, and the object that its header holds."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it is part of the checkpoint")
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > LARGEST_HEADER:
            raise ValueError(f"{path}: not safetensors, or truncated (header of {length:,} bytes)")
        header = file.read(length)
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=no_duplicates)
        if not isinstance(entries, dict):
            raise TypeError(f"it is {type(entries).__name__}")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged or truncated header ({error})") from error
    return 8 + length, entries


def read_metadata(path: pathlib.Path) -> dict[str, str]:
    """Returns the metadata of a safetensors file: names and texts, possibly none; errors as in `read_header`."""
    metadata = _read_header(path)[1].get("__metadata__") or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: damaged header (its metadata is not a table of texts)")
    return metadata


def _stored_tensor(path: pathlib.Path, begin: int, name: str, entry: Any) -> StoredTensor:
    """Returns what an entry of a header says; ValueError unless dtype, shape and bytes agree."""
    dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    numbers = (*shape, start, stop)
    fits = all(type(number) is int and 0 <= number < 2**63 for number in numbers) and start <= stop
    if not isinstance(dtype, str) or not fits or len(shape) > 8:
        raise ValueError(f"{name} has dtype {dtype!r}, shape {shape}, bytes {start} to {stop}")
    if dtype in DTYPES and stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{name} has shape {shape} of {dtype} in {stop - start:,} bytes")
    return StoredTensor(path, dtype, shape, begin + start, stop - start)


def read_header(path: pathlib.Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file by name, from its header.

    Raises:
        FileNotFoundError: no such file. ValueError: truncated, or not safetensors: sizes that do not fit shapes, bytes
            that overlap or belong to no tensor, a name that stands twice.
    """
    begin, entries = _read_header(path)
    try:
        stored = {n: _stored_tensor(path, begin, n, entry) for n, entry in entries.items() if n != "__metadata__"}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged or truncated header ({error})") from error
    end = begin
    for name, tensor in sorted(stored.items(), key=lambda item: (item[1].start, item[1].size)):
        if tensor.start != end:
            raise ValueError(f"{path}: damaged header: {name} begins at byte {tensor.start:,}, wanted {end:,}")
        end += tensor.size
    if path.stat().st_size != end:
        raise ValueError(f"{path}: truncated or damaged: {path.stat().st_size:,} bytes, its header says {end:,}")
    return stored


def _read_into(buffer: Tensor, stored: StoredTensor, start: int) -> Tensor:
    """Returns the buffer, uint8 in host memory, filled with the bytes of a stored tensor from its byte `start` on."""
    rest = memoryview(buffer.numpy())  # type: ignore[arg-type]
    with stored.file.open("rb", buffering=0) as file:
        file.seek(stored.start + start)
        while rest:
            count = file.readinto(rest)
            if not count:
                raise ValueError(f"{stored.file}: truncated while it was read")
            rest = rest[count:]
    return buffer


def read_bytes(stored: StoredTensor, start: int, size: int) -> Tensor:
    """Returns `size` bytes of a stored tensor from its byte `start` on, uint8 on the CPU."""
    return _read_into(torch.empty(size, dtype=torch.uint8), stored, start)


def read_tensor(stored: StoredTensor, *, device: torch.device | str = "cpu") -> Tensor:
    """Returns a stored tensor on a device, read and not mapped. To a GPU it goes in pieces: one is read, one is copied.

    Raises:
        ValueError: the file has become shorter since its header was read.
    """
    device = torch.device(device)
    if device.type == "cuda":
        content = torch.empty(stored.size, dtype=torch.uint8, device=device)
        for start in range(0, stored.size, PIECE):
            # PyTorch hands pinned memory out again once the copies from it are done, so a few pieces serve all tensors.
            piece = torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)[: stored.size - start]
            content[start : start + PIECE].copy_(_read_into(piece, stored, start), non_blocking=True)
    else:
        content = read_bytes(stored, 0, stored.size).to(device)
    return content.view(DTYPES[stored.dtype]).view(stored.shape)


def stored_tensors(folder: pathlib.Path) -> dict[str, StoredTensor]:
    """Returns all tensors of a checkpoint folder by name, single file or sharded.

    Raises:
        FileNotFoundError: no safetensors there, or a shard that the index names is missing.
        ValueError: a damaged file or index, a shard outside the folder, or a tensor that is not where the index says.
    """
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX}: has no weight_map")
        for shard in weight_map.values():
            if not isinstance(shard, str) or not re.fullmatch(r"[\w.\-]+\.safetensors", shard):
                raise ValueError(f"{folder / INDEX}: {shard!r} is not the name of a safetensors file in the folder")
        headers = {shard: read_header(folder / shard) for shard in sorted(set(weight_map.values()))}
        for name, shard in weight_map.items():
            if name not in headers[shard]:
                raise ValueError(f"{folder / INDEX}: says that {name} is in {shard}, which does not hold it")
        return {name: headers[shard][name] for name, shard in weight_map.items()}
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern)]
    if pickles:
        raise FileNotFoundError(
            f"{folder} has no safetensors, only {pickles[0]}: pickle files can run code and are never loaded; "
            "save the model as safetensors"
        )
    raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}")


def fingerprint(stored: dict[str, StoredTensor]) -> str:
    """Returns SHA-256, in hex, over name, shape and first 256 bytes of every tensor, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(stored.items()):
        start = read_bytes(tensor, 0, min(PRINTED_BYTES, tensor.size))
        digest.update(name.encode() + str(tensor.shape).encode() + bytes(start.tolist()))
    return digest.hexdigest()


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors are stored alike, compared piece by piece so that neither is held whole."""
    piece = 16 * 2**20
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(
        torch.equal(read_bytes(one, at, min(piece, one.size - at)), read_bytes(other, at, min(piece, one.size - at)))
        for at in range(0, one.size, piece)
    )


def sync(path: pathlib.Path) -> None:
    """Waits until the bytes of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: pathlib.Path, text: str) -> None:
    """Writes text to path so that after a crash the file is the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)

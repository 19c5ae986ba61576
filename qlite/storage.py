"""Files that hold models and adapters: JSON, safetensors, and writes that a crash cannot halve.

A safetensors file is read by our own few lines: the header is checked whole (sizes, overlaps, duplicate names) before a
tensor is, and tensors are read, not mapped. Mapped pages count as memory, and a file that changes under a map kills the
process. The format: https://github.com/huggingface/safetensors.

Tensors that exist only once they are asked for are written one by one, to the bytes that the safetensors package would write.

Not done here: pickle (`.bin`, `.pt`) of any kind; downloads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {**FLOATS, "U8": torch.uint8, "I8": torch.int8}
#: What can be written, in the order in which the safetensors package lays tensors into a file: wide ones first, so that each
#: begins at a multiple of its width.
WRITTEN = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
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


@dataclasses.dataclass(frozen=True)
class TensorToWrite:
    """A tensor of a file that is yet to be written: what it will be, and the function that gives it, called once."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    path: pathlib.Path, tensors: Mapping[str, TensorToWrite], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file, one tensor at a time: no two of them need be in memory together.

    The bytes are those that the safetensors package writes for the same tensors. The file is written beside, flushed and
    renamed: whatever fails, what stood under the name is whole.

    Raises:
        ValueError: a dtype that is not written, or a tensor that is not what was said of it.
    """
    order = list(WRITTEN)
    for name, tensor in tensors.items():
        if tensor.dtype not in WRITTEN:
            raise ValueError(f"write_tensors: {name} is {tensor.dtype}; wanted one of {', '.join(map(str, order))}")
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        tensor = tensors[name]
        span = [end, end := end + tensor.size]
        header[name] = {"dtype": WRITTEN[tensor.dtype], "shape": tensor.shape, "data_offsets": span}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                content, said = tensors[name].make(), tensors[name]
                if (content.dtype, tuple(content.shape)) != (said.dtype, tuple(said.shape)):
                    raise ValueError(
                        f"write_tensors: {name} came as {content.dtype} {tuple(content.shape)}; "
                        f"{said.dtype} {tuple(said.shape)} was said of it"
                    )
                flat = content.detach().cpu().contiguous().view(-1)
                file.write(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
                del content, flat
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shards(folder: pathlib.Path, tensors: Mapping[str, TensorToWrite], *, max_shard_bytes: int) -> None:
    """Writes tensors as the hub lays them out: model.safetensors, or shards of at most so many bytes and their index.

    A tensor that is larger than that has a shard of its own. The order of `tensors` is kept from shard to shard.
    """
    shards: list[dict[str, TensorToWrite]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.size
    if len(shards) == 1:
        write_tensors(folder / SINGLE, shards[0], metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(tensor.size for tensor in tensors.values())}, "weight_map": weight_map}
    replace_file(folder / INDEX, json.dumps(index, indent=2))


def check_free(folder: str | pathlib.Path) -> pathlib.Path:
    """Returns the absolute path of a folder that is not there, or empty; FileExistsError where something would be lost."""
    folder = pathlib.Path(folder).absolute()
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds something already; choose another folder")
    return folder


@contextlib.contextmanager
def new_folder(folder: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a folder to write into, which takes its name, whole, when the block ends; where it fails nothing is left.

    Raises:
        FileExistsError: as `check_free`.
    """
    folder = check_free(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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

"""Tensors of transformers' models, by the names that files have for them, where the model has others in memory.

Most of it is mixtures of experts. transformers holds the stacks `gate_up_proj` (experts, 2 * intermediate, hidden) and
`down_proj` (experts, hidden, intermediate) in memory and writes the matrices of each expert under names of their own, as the
hub has them. A stack is put together from headers alone, and read one expert at a time.

Not done here: transposed stacks (GPT-OSS), layouts that interleave or fuse otherwise, and the other models whose names
transformers changes.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlite.experts import ExpertStack, expert_weights
from qlite.storage import StoredTensor, TensorToWrite, read_tensor

#: A stack's name -> what files call the matrices of an expert that lie one below the other in it: Qwen's, and Mixtral's.
MATRICES = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
#: A block's name in the model -> in Mixtral's files.
BLOCKS = {"mlp": "block_sparse_moe"}
#: Kinds of models whose files are known -> which of the names in MATRICES they have.
WRITTEN = {"qwen2_moe": 0, "qwen3_moe": 0, "mixtral": 1}
#: A parameter's name in the model -> in the files of GPT-NeoX.
WHOLE = {"lm_head.weight": "embed_out.weight"}


@dataclasses.dataclass(frozen=True)
class StoredStack:
    """A stack of matrices that files keep one by one; to a reader of headers it looks as a StoredTensor does.

    Attributes:
        experts: of each, the matrices (rows, in_features) that lie one below the other. shape: (experts, rows, in_features).
        file, start: of the first matrix. size: in bytes, of all.
    """

    experts: tuple[tuple[StoredTensor, ...], ...]
    dtype: str
    shape: tuple[int, ...]
    file: pathlib.Path
    start: int
    size: int


def stacks_of(model: nn.Module) -> dict[str, int]:
    """Returns name -> number of experts of each stack of a model, dense or encoded."""
    found = {}
    for name, module in model.named_modules():
        found |= {f"{name}.{key}".lstrip("."): len(weight) for key, weight in expert_weights(module).items()}
        if isinstance(module, ExpertStack):
            found[name] = len(module)
    return found


def by_names_of(model: nn.Module, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor | StoredStack]:
    """Returns stored tensors by the names that the model has for them: matrices of experts as the stacks that they make.

    What is not there, or not as it would have to be, stays as it is: whoever wants it finds it missing.
    """
    found: dict[str, StoredTensor | StoredStack] = dict(stored)
    for name, count in stacks_of(model).items():
        for names in _names_of_matrices(name, count) if name not in found else ():
            stack = _stack([[stored.get(each) for each in one] for one in names])
            if stack is not None:
                found[name] = stack
                for each in (each for one in names for each in one):
                    del found[each]
                break
    own = model.state_dict(keep_vars=True)
    blocks, whole = {theirs: ours for ours, theirs in BLOCKS.items()}, {theirs: ours for ours, theirs in WHOLE.items()}
    for name in list(found):
        ours = whole.get(name) or ".".join(blocks.get(part, part) for part in name.split("."))
        if name not in own and ours in own and ours not in found:
            found[ours] = found.pop(name)
    return found


def _names_of_matrices(name: str, count: int) -> Iterator[list[list[str]]]:
    """Yields what files may call the matrices of a stack: of each expert, those that lie one below the other."""
    path, _, key = name.rpartition(".")
    for renamed in ({}, BLOCKS):
        start = ".".join(renamed.get(part, part) for part in path.split("."))
        for matrices in MATRICES.get(key, ()):
            yield [[f"{start}.{index}.{matrix}.weight" for matrix in matrices] for index in range(count)]


def _stack(experts: list[list[StoredTensor | None]]) -> StoredStack | None:
    """Returns the stack of these matrices, or None where one is missing or differs from those of the first expert."""
    matrices = [each for one in experts for each in one if each is not None and len(each.shape) == 2]
    if not matrices or len(matrices) != sum(map(len, experts)):
        return None
    first, width, dtype = matrices[: len(experts[0])], matrices[0].shape[1], matrices[0].dtype
    alike = all(each.shape == first[i % len(first)].shape and each.dtype == dtype for i, each in enumerate(matrices))
    if not alike or any(each.shape[1] != width for each in first):
        return None
    grouped = tuple(tuple(matrices[i : i + len(first)]) for i in range(0, len(matrices), len(first)))
    shape = (len(experts), sum(each.shape[0] for each in first), width)
    return StoredStack(grouped, dtype, shape, first[0].file, first[0].start, sum(each.size for each in matrices))


def read_expert(stored: StoredTensor | StoredStack, index: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns the matrix (rows, in_features) of one expert of a stored stack; errors of `read_tensor`."""
    if isinstance(stored, StoredStack):
        return torch.cat([read_tensor(matrix, device=device) for matrix in stored.experts[index]])
    size = stored.size // stored.shape[0]
    one = dataclasses.replace(stored, shape=stored.shape[1:], start=stored.start + index * size, size=size)
    return read_tensor(one, device=device)


def read_experts(stored: StoredTensor | StoredStack, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Yields the matrix of each expert of a stored stack, one after the other."""
    return (read_expert(stored, index, device) for index in range(stored.shape[0]))


def read_whole(stored: StoredTensor | StoredStack, device: torch.device | str = "cpu") -> Tensor:
    """Returns a stored tensor on a device; one that files keep as matrices of experts, stacked."""
    if isinstance(stored, StoredStack):
        return torch.stack(list(read_experts(stored, device)))
    return read_tensor(stored, device=device)


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def name_in_files(model: nn.Module, name: str) -> str:
    """Returns what the hub's files call a tensor of a model."""
    if _model_type(model) == "gpt_neox":
        return WHOLE.get(name, name)
    if _model_type(model) == "mixtral":
        return ".".join(BLOCKS.get(part, part) for part in name.split("."))
    return name


def stack_in_files(
    model: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype, expert: Callable[[int], Tensor]
) -> dict[str, TensorToWrite]:
    """Returns what is to be written of a stack: the matrices of each expert where the model's files are known, else the stack.

    Args:
        shape: (experts, rows, in_features). expert: gives the matrix (rows, in_features) of one.
    """
    path, _, key = name.rpartition(".")
    known = WRITTEN.get(_model_type(model))
    if known is None or key not in MATRICES:
        return {name: TensorToWrite(dtype, shape, lambda: torch.stack([expert(index) for index in range(shape[0])]))}
    matrices = MATRICES[key][known]
    rows = shape[1] // len(matrices)

    def matrix(index: int, at: int) -> Tensor:
        return expert(index)[at * rows : (at + 1) * rows]

    written: dict[str, Any] = {}
    for index in range(shape[0]):
        for at, each in enumerate(matrices):
            make = functools.partial(matrix, index, at)
            own = name_in_files(model, f"{path}.{index}.{each}.weight")
            written[own] = TensorToWrite(dtype, (rows, shape[2]), make)
    return written

"""Tensors of transformers' models, by the names that files have for them, where the model has others in memory.

Most of it is mixtures of experts. transformers holds the stacks `gate_up_proj` (experts, 2 * intermediate, hidden) and
`down_proj` (experts, hidden, intermediate) in memory and writes the matrices of each expert under names of their own, as the
hub has them. A stack is put together from headers alone, and read one expert at a time.

Not done here: transposed stacks (GPT-OSS), layouts that interleave or fuse otherwise, and the other models whose names
transformers changes.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from qlite.experts import ExpertStack, expert_weights
from qlite.storage import StoredTensor, read_tensor

#: A stack's name -> what files call the matrices of an expert that lie one below the other in it: Qwen's, and Mixtral's.
MATRICES = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
#: A block's name in the model -> in Mixtral's files.
BLOCKS = {"mlp": "block_sparse_moe"}
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
    own = model.state_dict(keep_vars=True)
    for name, theirs in WHOLE.items():
        if name in own and theirs not in own and name not in found and theirs in found:
            found[name] = found.pop(theirs)
    for name, count in stacks_of(model).items():
        holder, _, key = name.rpartition(".")
        block, _, experts = holder.rpartition(".")
        above, _, last = block.rpartition(".")
        for theirs in (last, BLOCKS.get(last)):
            for matrices in MATRICES.get(key, ()) if theirs else ():
                start = f"{above}.{theirs}".lstrip(".")
                names = [[f"{start}.{experts}.{i}.{matrix}.weight" for matrix in matrices] for i in range(count)]
                stack = _stack([[stored.get(each) for each in one] for one in names])
                if stack is None or name in found:
                    continue
                found[name] = stack
                for each in (each for one in names for each in one):
                    del found[each]
                if theirs != last:  # the router, and whatever else is in the block
                    for other in [other for other in found if other.startswith(f"{start}.")]:
                        if not other.startswith(f"{start}.{experts}."):
                            found[block + other.removeprefix(start)] = found.pop(other)
    return found


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


def read_experts(stored: StoredTensor | StoredStack, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Yields the matrix (rows, in_features) of each expert of a stored stack, one after the other; errors of `read_tensor`."""
    if isinstance(stored, StoredStack):
        for one in stored.experts:
            yield torch.cat([read_tensor(matrix, device=device) for matrix in one])
        return
    size = stored.size // max(1, stored.shape[0])
    for index in range(stored.shape[0]):
        one = dataclasses.replace(stored, shape=stored.shape[1:], start=stored.start + index * size, size=size)
        assert size * stored.shape[0] == stored.size and math.prod(one.shape) <= size
        yield read_tensor(one, device=device)


def read_whole(stored: StoredTensor | StoredStack, device: torch.device | str = "cpu") -> Tensor:
    """Returns a stored tensor on a device; one that files keep as matrices of experts, stacked."""
    if isinstance(stored, StoredStack):
        return torch.stack(list(read_experts(stored, device)))
    return read_tensor(stored, device=device)

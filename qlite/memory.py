"""How much GPU memory a fine-tuning takes, before anything is downloaded.

The model is built on the meta device, where tensors have sizes and no bytes, and a real training step runs on it: the same
modules, the same autograd, the same checkpointing. A dispatch mode adds up what is made and dropped. What it cannot see is
added: the memory that a kernel takes for itself while it runs (the decoded weight, attention's buffers) and cuBLAS's
workspace. So there is no formula of the architecture that could be forgotten when the architecture changes.

The figure is what `torch.cuda.max_memory_allocated` counts. On top come the driver and the CUDA context, and what PyTorch
reserves beyond it: recordings (graphs.py) have memory of their own, which nothing else may use.

Not done here: the load, whose peak is the encoded model and one dense tensor; generation; the state of an optimizer that is
not paged beyond its bytes at rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlite.falcon import Falcon, FalconConfig
from qlite.graphs import BUCKET, StepGraphs
from qlite.linear import Linear4bit, QuantizedLinear
from qlite.lora import LoRAConfig, add_lora, lora_parameters
from qlite.quantize import quantize_model

#: The caching allocator's smallest block.
GRAIN = 512
#: What PyTorch gives cuBLAS on capability 9.0; before, it is 8.1 MiB.
CUBLAS_WORKSPACE = 32 * 2**20
GIB = 2**30
#: What the driver and the CUDA context take of a card.
CONTEXT = GIB // 2
#: A batch that is larger needs no search.
MOST_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of GPU memory of a fine-tuning.

    Attributes:
        weights: of the base, encoded or not, embeddings included. adapter: of LoRA's weights. gradients: of those.
        optimizer: of its moments, where they are on the GPU. activations: what forward and backward need beside all that, at
            their peak, kernels' own memory included. workspace: cuBLAS's.
        peak: the sum.
        host: pinned host memory that the blocks' inputs wait in under gradient_checkpointing="offload"; no part of the peak.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    host: int = 0

    @property
    def peak(self) -> int:
        """Bytes on the GPU, all of them together."""
        return sum(dataclasses.astuple(self)) - self.host

    @property
    def reserved(self) -> int:
        """Bytes that PyTorch reserves for it with one shape of batch: at most, by the lines of benchmarks/results that say."""
        return self.peak + GIB + self.activations // 3

    def __str__(self) -> str:
        parts = dataclasses.asdict(self)
        host = parts.pop("host")
        lines = [f"{name:12}{size / GIB:9.3f} GiB" for name, size in (parts | {"peak": self.peak}).items()]
        return "\n".join([*lines, f"{'host':12}{host / GIB:9.3f} GiB, pinned, beside the peak"] if host else lines)


class _Attention(torch.autograd.Function):
    """What a flash-attention kernel takes and keeps: no scores, a float32 number a row and head."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, *_ = ctx.saved_tensors
        sums = torch.empty_like(query, dtype=torch.float32)  # of the gradient of query, over blocks of keys
        spread = [torch.empty_like(query) for _ in (key, value) if key.shape != query.shape]  # a head for each of query's
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del sums, spread
        return found


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return _Attention.apply(query, key, value)  # type: ignore[return-value]


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors of a device that are made and dropped while it is on.

    Args:
        device: type of the device. known: tensors that were there before, which views of them would count again.
    """

    def __init__(self, device: str, known: list[Tensor]):
        super().__init__()
        self.device, self.live, self.peak = device, 0, 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                self.see(tensor.untyped_storage())
        self.peak = max(self.peak, self.live + _own_memory(func, args))
        return result

    def see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // GRAIN) * GRAIN
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def _own_memory(func: torch._ops.OpOverload, args: tuple) -> int:
    """Returns the bytes that an operator of qlite takes while it runs: the weight, decoded to the dtype of its input."""
    if func.namespace != "qlite" or not func.overloadpacket.__name__.startswith("linear_"):
        return 0
    x, codes = args[:2]
    packed = 2 if codes.dtype == torch.uint8 else 1
    return codes.numel() * packed * x.element_size()


def measured(model: Falcon, batch_size: int, tokens: int) -> tuple[int, int]:
    """Returns the bytes of the gradients, and the peak of a step, beside the model's own; attention as flash does it.

    Args:
        model: adapted, in training mode. batch_size, tokens: rows of so many tokens, each of them labelled.
    """
    for module in model.modules():
        if hasattr(module, "attend"):
            module.attend = _attend  # type: ignore[assignment]
    if not model.config.alibi:  # whose steps are not recorded, nor padded for it
        tokens = BUCKET * -(-tokens // BUCKET)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device
    with Allocations(device.type, [*model.parameters(), *model.buffers()]) as allocations:
        ids = torch.zeros(batch_size, tokens, dtype=torch.int64, device=device)
        steps = StepGraphs(model, parameters)
        # Outside of it dropout is PyTorch's, which keeps a mask.
        with contextlib.nullcontext() if model.config.alibi else steps:
            for parameter in parameters:
                parameter.grad = None
            before = allocations.live
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            gradients = allocations.live - before
            allocations.peak = allocations.live
            steps.run(ids, ids.flatten())
    return gradients, allocations.peak


def estimate(
    config: FalconConfig,
    *,
    quantize: Callable[..., QuantizedLinear] | None = Linear4bit,
    lora: LoRAConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    batch_size: int = 1,
    tokens: int = 512,
    gradient_checkpointing: bool | str = True,
    paged: bool = True,
) -> MemoryEstimate:
    """Returns what `finetune` takes of GPU memory with an 8-bit AdamW, from a config alone.

    Args:
        config: of the base. quantize: what its linears become, as in `load_falcon`; None: they stay.
        lora: None: r=16 on query_key_value.
        dtype: of what is not encoded, and of the arithmetic.
        batch_size, tokens: of a batch, all of whose tokens are labelled: the most that the loss can cost.
        gradient_checkpointing: as in `Falcon`. paged: the moments are in host memory, as PagedAdamW8bit has them.

    Raises:
        ValueError: batch_size or tokens is below 1, tokens exceed the model's context, `lora` matches no layer, or
            gradient_checkpointing is none of Falcon's.

    Example:
        >>> config = qlite.FalconConfig(vocab_size=50, hidden_size=64, num_attention_heads=2, num_hidden_layers=2)
        >>> qlite.estimate(config, tokens=128).peak < qlite.estimate(config, tokens=128, batch_size=8).peak
        True
    """
    if batch_size < 1 or not 1 <= tokens <= config.max_position_embeddings:
        raise ValueError(
            f"estimate: {batch_size} rows of {tokens} tokens; wanted 1 row or more, and 1 to {config.max_position_embeddings} "
            "tokens, the model's context"
        )
    model = Falcon(config, device="meta", dtype=dtype).requires_grad_(False)
    if quantize is not None:
        quantize_model(model, quantize)
    held = sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    add_lora(model, LoRAConfig(r=16, targets=("query_key_value",)) if lora is None else lora)
    model.gradient_checkpointing = gradient_checkpointing
    trained: list[nn.Parameter] = list(lora_parameters(model))
    gradients, peak = measured(model.train(), batch_size, tokens)
    return MemoryEstimate(
        weights=held,
        adapter=sum(parameter.nbytes for parameter in trained),
        gradients=gradients,
        optimizer=0 if paged else sum(_moments(parameter.numel()) for parameter in trained),
        activations=peak - gradients,
        workspace=CUBLAS_WORKSPACE,
        host=model.host_memory.nbytes,
    )


def largest_batch(config: FalconConfig, limit: int, **options: Any) -> int:
    """Returns how many rows a batch may have for what its `estimate` reserves to stay within `limit` bytes: 0 to MOST_ROWS.

    Args:
        config, options: as in `estimate`, without batch_size.
    """
    fits, too_many = 0, MOST_ROWS + 1
    rows = 1
    while too_many - fits > 1:
        if estimate(config, batch_size=rows, **options).reserved <= limit:
            fits = rows
        else:
            too_many = rows
        rows = min(2 * rows, MOST_ROWS) if too_many > MOST_ROWS else (fits + too_many) // 2
    return fits


def whether_it_fits(config: FalconConfig, gib: float, batch_size: int, **options: Any) -> str:
    """Returns a line: does a batch fit a card of `gib` GiB, and which is the largest that does; other arguments as above."""
    most = largest_batch(config, int(gib * GIB) - CONTEXT, **options)
    fits = "yes" if most >= batch_size else "no"
    left = f"of which {CONTEXT / GIB:g} GiB are left to CUDA"
    return f"fits {gib:g} GiB, {left}: {fits}; {f'up to batch {most}' if most else 'not even batch 1'}"


def _moments(count: int, block_size: int = 256, smallest: int = 4096) -> int:
    """Returns the bytes of both moments of a parameter: 8 bits and a float32 absmax a block, or float32 for small ones."""
    return 8 * count if count < smallest else 2 * count + 8 * -(-count // block_size)

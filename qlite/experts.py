"""A stack of encoded expert matrices, in the place of a 3-D weight that is used one expert at a time.

transformers keeps the weights of a mixture of experts as one Parameter (experts, out_features, in_features), and its
"eager" experts compute `nn.functional.linear(x, weight[i])` for each expert that some token goes to. `ExpertStack[i]` is a
value for that one call: the matrix of expert i is decoded for the product, forward and backward, and at no other time.

Not done here: grouped products over the whole stack, which want all of it decoded; transposed stacks (GPT-OSS).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def expert_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the 3-D weights (experts, out_features, in_features) that transformers' eager experts use one at a time.

    They are known by what transformers' decorator of such classes sets: `num_experts`, and `is_transposed`, which is False.
    """
    count = getattr(module, "num_experts", None)
    if getattr(module, "is_transposed", None) is not False or not isinstance(count, int):
        return {}
    own = module.named_parameters(recurse=False)
    return {name: p for name, p in own if p.ndim == 3 and len(p) == count and p.is_floating_point()}


def use_one_at_a_time(model: nn.Module) -> None:
    """Tells transformers' models that hold an encoded stack to use one expert at a time, which is what such a stack can do."""
    for module in model.modules():
        if takes_experts(module) and any(isinstance(inner, ExpertStack) for inner in module.modules()):
            module.set_experts_implementation("eager")  # type: ignore[operator]


def takes_experts(module: nn.Module) -> bool:
    """Whether a module, one of transformers' models, can be told to use one expert at a time."""
    return callable(getattr(module, "set_experts_implementation", None))


class ExpertStack(nn.Module):
    """Encoded matrices (out_features, in_features), one an expert; `stack[i]` is good for one thing, a product.

    The state is that of a layer of `kind` without bias, with a first dimension of experts more.

    Args:
        dense: (experts, out_features, in_features), floating point, encoded on its device one expert after the other; on
            the meta device the stack is empty there, for `quantize_`.
        kind: Linear4bit, Linear8bit, or functools.partial of one.

    Raises:
        ValueError: a value is not finite.

    Example:
        >>> stack = ExpertStack(torch.randn(4, 32, 64), qlite.Linear4bit)
        >>> torch.nn.functional.linear(torch.randn(2, 64), stack[3]).shape
        torch.Size([2, 32])
    """

    def __init__(self, dense: Tensor, kind: Callable[..., Any]):
        super().__init__()
        experts, out_features, in_features = dense.shape
        template = kind(in_features, out_features, bias=False, device="meta", dtype=dense.dtype)
        # In a tuple, so that it is no child: it has no state of its own.
        self._template = (template,)
        #: What calls an expert's layer, by its number, where the stack lives on another device than it computes on.
        self.elsewhere: Callable[[int, Any, Tensor], Tensor] | None = None
        self._hold([template.state_dict()] * experts)
        if not dense.is_meta:
            self.quantize_(dense.detach())

    def _hold(self, states: list[dict[str, Tensor]]) -> None:
        """Takes the state of each expert's layer."""
        for key in states[0]:
            stacked = torch.stack([state[key] for state in states])
            if stacked.is_floating_point():
                self.register_buffer(key, stacked)
            else:
                self.register_parameter(key, nn.Parameter(stacked, requires_grad=False))

    def quantize_(self, matrices: Iterable[Tensor]) -> ExpertStack:
        """Encodes the matrix (out_features, in_features) of each expert, one after the other, and returns the module.

        Raises:
            ValueError: another number of matrices, another shape, or a non-finite value. TypeError: not floating point.
        """
        states = [self._layer(dict, dict).quantize_(one).state_dict() for one in matrices]
        if len(states) != len(self):
            raise ValueError(f"quantize_: {len(states)} matrices for {len(self)} experts")
        self._hold(states)
        return self

    def _layer(self, parameters: Callable[[Any], dict[str, Any]], buffers: Callable[[Any], dict[str, Any]]) -> Any:
        """Returns a layer as the template is, whose tables are made from the template's."""
        layer = copy.copy(self._template[0])
        layer._parameters, layer._buffers = parameters(layer._parameters), buffers(layer._buffers)
        return layer

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """`(out_features, in_features)` of each expert's matrix."""
        return self._template[0].out_features, self._template[0].in_features

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `dequantize`."""
        return self._template[0].dtype

    def __len__(self) -> int:
        return len(next(self.parameters()))

    def __getitem__(self, index: int | Tensor) -> ExpertMatrix:
        """Returns what stands for the matrix of expert `index`, an int or an integer tensor without dimensions."""
        if isinstance(index, Tensor) and index.ndim:
            raise TypeError(f"ExpertStack: index of shape {tuple(index.shape)}; {_ONE_AT_A_TIME}")
        return ExpertMatrix(self, int(index))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(f"ExpertStack: is no tensor and has no {name}; {_ONE_AT_A_TIME}") from error

    def layer(self, index: int) -> Any:
        """Returns the encoded linear layer of expert `index`, sharing this module's memory."""

        def of(stacks: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
            return lambda table: {**table, **{key: stack[index] for key, stack in stacks.items() if stack is not None}}

        return self._layer(of(self._parameters), of(self._buffers))

    def config(self) -> dict[str, Any]:
        """Returns the JSON-able options of the encoding, as the layers of `kind` have them."""
        return self._template[0].config()

    def encoded_bytes(self) -> int:
        """Returns the bytes of all of the module's tensors."""
        return sum(t.numel() * t.element_size() for t in (*self.parameters(), *self.buffers()))

    def dequantize(self) -> Tensor:
        """Returns the whole weight (experts, out_features, in_features), decoded."""
        return torch.stack([self.layer(index).dequantize() for index in range(len(self))])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertStack:
        """Moves state where `fn` moves it, but shows `fn` bytes only: a cast finds nothing to cast."""
        return super()._apply(lambda t: fn(t.view(torch.uint8)).view(t.dtype), recurse)

    def extra_repr(self) -> str:
        """Returns what `print(module)` shows: sizes and the options of the format."""
        return f"{len(self)} x ({self._template[0].extra_repr()})"


_ONE_AT_A_TIME = "model.set_experts_implementation('eager') uses one expert at a time, which is what an encoded stack can do"


@dataclasses.dataclass(frozen=True)
class ExpertMatrix:
    """What `nn.functional.linear` takes in the place of an expert's weight; it is no tensor, and good for nothing else."""

    stack: ExpertStack
    index: int

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        if function is not nn.functional.linear or len(args) != 2 or kwargs or not isinstance(args[1], cls):
            raise TypeError(f"ExpertStack: {getattr(function, '__name__', function)} of an encoded expert; {_ONE_AT_A_TIME}")
        x, matrix = args
        stack, layer = matrix.stack, matrix.stack.layer(matrix.index)
        return layer(x) if stack.elsewhere is None else stack.elsewhere(matrix.index, layer, x)

"""The operators that the dispatcher knows, and the description of a stack of layers they take.

The operators are private: they lack autograd and are called through `fastmlp.autograd`, which picks
the route. Their kernels for meta and fake tensors are in `csrc/tensors/meta.cpp`.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmlp._load import _C
from fastmlp.activations import DEFAULTS, IDENTITY, Activation

_ops = torch.ops.fastmlp

#: Those that the kernels take.
DTYPES: tuple[torch.dtype, ...] = tuple(getattr(torch, name) for name in _C.dtypes())
#: The devices that this build has kernels for, as `torch.device.type`.
DEVICES: tuple[str, ...] = tuple(_C.devices())


class Stack(NamedTuple):
    """What a list of layers is besides its tensors.

    Plain tuples for the dispatcher and for Dynamo, which cannot look into `native`.
    """

    has_bias: tuple[bool, ...]
    activations: tuple[Activation, ...]
    #: The operators' arguments `has_bias`, `activations` (kinds) and `scalars` (two numbers a layer).
    lists: tuple[tuple[bool, ...], tuple[int, ...], tuple[float, ...]]
    native: Any  # _C.Stack; None under Dynamo
    saved: int  # tensors that forward keeps for backward, the output included

    def split(self, parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Weights and biases from the flat list of parameters."""
        flat = iter(parameters)
        weights: list[Tensor] = []
        biases: list[Tensor | None] = []
        for has_bias in self.has_bias:
            weights.append(next(flat))
            biases.append(next(flat) if has_bias else None)
        return weights, biases

    def names(self) -> list[str]:
        """What errors call the parameters: "weight" in a network of one layer, "weights[2]" in a longer one."""
        if len(self.has_bias) == 1:
            return ["weight", "bias"] if self.has_bias[0] else ["weight"]
        pairs = ((f"weights[{i}]", f"biases[{i}]") for i in range(len(self.has_bias)))
        return [n for b, pair in zip(self.has_bias, pairs, strict=True) for n in (pair if b else pair[:1])]


def stack_of(has_bias: tuple[bool, ...], activations: tuple[Activation, ...]) -> Stack:
    """The `Stack` of layers with these biases and activations."""
    if torch.compiler.is_compiling():
        # Dynamo traces neither caches nor the extension, and the operators take plain lists.
        return _describe(has_bias, activations)
    return _cached(has_bias, activations)


@lru_cache(maxsize=512)
def _cached(has_bias: tuple[bool, ...], activations: tuple[Activation, ...]) -> Stack:
    described = _describe(has_bias, activations)
    return described._replace(native=_C.Stack(*described.lists))


def stack_from(has_bias: Sequence[bool], activations: Sequence[int], scalars: Sequence[float]) -> Stack:
    """The `Stack` that the lists of an operator's schema describe."""
    names = list(DEFAULTS)
    acts = []
    for layer, kind in enumerate(activations):
        values = dict(zip(DEFAULTS[names[kind]], scalars[2 * layer : 2 * layer + 2], strict=False))
        acts.append(Activation(names[kind], **values))
    return stack_of(tuple(has_bias), tuple(acts))


def _describe(has_bias: tuple[bool, ...], activations: tuple[Activation, ...]) -> Stack:
    kinds = tuple([activation.kind for activation in activations])
    # Only where there are parameters: a number that Dynamo reads becomes an input of its graph, compiled twice for it.
    scalars = tuple([v for a in activations for v in (a.scalars if DEFAULTS[a.name] else (0.0, 0.0))])
    # A last layer without activation keeps nothing, so that its output may be changed in place.
    saved = len(activations) - (activations[-1] == IDENTITY if activations else 0)
    return Stack(has_bias, activations, (has_bias, kinds, scalars), None, saved)


def forward(stack: Stack, input: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output, and what backward needs besides it."""
    return _ops.forward(input, parameters, *stack.lists)


def infer(stack: Stack, input: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The output alone."""
    return _ops.infer(input, parameters, *stack.lists)


def backward(
    stack: Stack,
    grad: Tensor,
    input: Tensor,
    saved: Sequence[Tensor],
    parameters: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients asked for, without gaps."""
    return _ops.backward(grad, input, saved, parameters, *stack.lists, needs)

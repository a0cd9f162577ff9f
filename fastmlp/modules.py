"""Containers that stand in for `torch.nn.Sequential`, and run their layers as one operation."""

import operator
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Sizes
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastmlp import runs
from fastmlp._errors import described
from fastmlp._load import _C
from fastmlp.activations import IDENTITY, ActivationLike, module_of, resolve
from fastmlp.linear import Called, Linear

__all__ = ["MLP", "Sequential"]


class Sequential(Called, nn.Sequential):
    """`torch.nn.Sequential` whose layers run as one operation.

    Children, their names, `state_dict`, hooks, indexing and editing are those of `torch.nn.Sequential`. At each call
    the longest runs of layers are looked for afresh: a run begins at a module whose class is exactly
    `torch.nn.Linear` or `fastmlp.Linear`; each layer takes the activation module that follows it, if it has a
    fused form; `torch.nn.Identity`, and `torch.nn.Dropout` outside of training, are passed over. A run executes as
    one operation, with one node in the autograd graph, and its children are not called. Every other child is
    called as it is, at its place: other modules, and those that have hooks, are parametrized, or have a forward
    of their own. `fastmlp.explain` names them.

    A layer also takes one `torch.nn.Dropout` in training that follows it and its activation, on the CPU in float32 and
    float64. It drops what torch would, by the same numbers of the same generator. Under autocast, on the composite
    route of `explain` and under `torch.compile` the Dropout is called; and so is one that would change in place what
    ReLU, Sigmoid or Tanh keeps for backward, because torch raises there.

    Args:
        *args: modules, or one dictionary of modules, as `torch.nn.Sequential` takes them.

    Shape:
        as the modules have it; input (*, in_features) for a layer.

    Example:
        >>> model = Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1))
        >>> model(torch.zeros(3, 10)).shape
        torch.Size([3, 1])
        >>> list(model.state_dict())
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """

    def forward(self, input: Any) -> Any:
        """The last child's output for the first one's input."""
        if torch.compiler.is_compiling():
            return runs.run_parts(self._modules, input)
        return _C.run_children(self._modules, input)


class MLP(Sequential):
    """A multilayer perceptron with the children that one would write by hand.

    `MLP(10, [50], 1)` holds `Linear(10, 50), ReLU(), Linear(50, 1)` under the keys of the
    `torch.nn.Sequential` of the same modules, so their `state_dict`s are interchangeable. It is a
    `fastmlp.Sequential`, which runs it as one operation.

    Args:
        in_features: size of the last dimension of the input.
        hidden_features: sizes of the hidden layers; may be empty.
        out_features: size of the last dimension of the output.
        activation: after each hidden layer: None, a name, a function such as `torch.relu`, a module of `torch.nn`
            or a `fastmlp.Activation`.
        output_activation: after the last layer; None for none.
        bias: whether the layers have biases.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for an activation without a fused form, or a negative size.
        TypeError: for an activation of the wrong type, a size that is no integer, or hidden_features that is no
            sequence.

    Shape:
        input (*, in_features), output (*, out_features).

    Example:
        >>> MLP(10, [50], 1)
        MLP(
          (0): Linear(in_features=10, out_features=50, bias=True)
          (1): ReLU()
          (2): Linear(in_features=50, out_features=1, bias=True)
        )
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Sizes[int],
        out_features: int,
        activation: ActivationLike = "relu",
        output_activation: ActivationLike = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        inner, last = resolve(activation), resolve(output_activation, "output_activation")
        scalar = isinstance(hidden_features, Tensor) and hidden_features.dim() == 0
        if scalar or isinstance(hidden_features, str) or not isinstance(hidden_features, Iterable):
            raise TypeError(
                "fastmlp: hidden_features must be a sequence of sizes, such as [50] for one hidden layer of 50, "
                f"got {described(hidden_features)}"
            )
        hidden = [_size(f"hidden_features[{i}]", size) for i, size in enumerate(hidden_features)]
        widths = [_size("in_features", in_features), *hidden, _size("out_features", out_features)]
        children: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
            children.append(Linear(fan_in, fan_out, bias=bias, device=device, dtype=dtype))
            act = inner if i < len(widths) - 2 else last
            if act != IDENTITY:
                children.append(module_of(act))
        super().__init__(*children)

    def __getitem__(self, index: slice | int) -> nn.Module:
        """A child, or a `fastmlp.Sequential` of several."""
        if isinstance(index, slice):
            return Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


def _size(name: str, size: Any) -> Any:
    if isinstance(size, torch.SymInt):
        return size
    try:
        number = None if isinstance(size, bool) else operator.index(size)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"fastmlp: {name} must be an integer, got {described(size)}")
    if not 0 <= number < 1 << 63:
        raise ValueError(f"fastmlp: {name} must be at least 0 and below 2^63, got {described(number)}")
    return number


runs.register(Sequential)

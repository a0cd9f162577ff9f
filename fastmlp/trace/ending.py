"""Finds out what a recorded forward does with the rows of its last layer: a softmax, or another shape.

Called by fastmlp/chain.py, on graphs of torch.fx that recording.py has made.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

__all__ = ["Reshape", "ending_of"]

#: Functions and methods that compute what these modules do.
_SOFTMAX: dict[Any, type[nn.Module]] = {
    **dict.fromkeys((F.softmax, torch.softmax, torch.special.softmax, "softmax"), nn.Softmax),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, torch.special.log_softmax, "log_softmax"), nn.LogSoftmax),
}

#: Functions and methods that give a tensor another shape: the method, the names of its arguments, and their defaults.
_RESHAPES: dict[Any, tuple[str, tuple[str, ...], dict[str, int]]] = {
    **dict.fromkeys((torch.squeeze, "squeeze"), ("squeeze", ("dim",), {})),
    **dict.fromkeys((torch.unsqueeze, "unsqueeze"), ("unsqueeze", ("dim",), {})),
    **dict.fromkeys((torch.flatten, "flatten"), ("flatten", ("start_dim", "end_dim"), {"start_dim": 0, "end_dim": -1})),
    **dict.fromkeys((torch.unflatten, "unflatten"), ("unflatten", ("dim", "sizes"), {})),
    **dict.fromkeys((torch.reshape, "reshape", "view"), ("view", ("shape",), {})),
}


class Reshape(nn.Module):
    """Stands for a call of a forward that gives its argument another shape.

    Attributes:
        name: of the method of tensors.
        numbers: its arguments, with sizes one by one.
    """

    def __init__(self, name: str, numbers: tuple[int, ...]) -> None:
        super().__init__()
        self.name, self.numbers = name, numbers

    def forward(self, x: Tensor) -> Tensor:
        """Calls the method.

        Example:
            >>> Reshape("squeeze", (-1,))(torch.zeros(3, 1)).shape
            torch.Size([3])
        """
        arguments = (self.numbers[0], self.numbers[1:]) if self.name == "unflatten" else self.numbers
        result: Tensor = getattr(x, self.name)(*arguments)
        return result


def ending_of(node: fx.Node, source: fx.Node) -> nn.Module | None:
    """A module that computes what a call does with a value; None if it is neither a softmax nor a change of shape."""
    if node.op not in ("call_function", "call_method") or node.args[:1] != (source,):
        return None
    if node.target in _SOFTMAX:
        return _softmax(node)
    if node.target not in _RESHAPES:
        return None
    name, keys, defaults = _RESHAPES[node.target]
    rest: tuple[Any, ...] = node.args[1:]
    if name == "view" and len(rest) > 1:
        rest = (rest,)
    if len(rest) > len(keys) or not node.kwargs.keys() <= set(keys):
        return None
    given = {**defaults, **dict(zip(keys, rest, strict=False)), **node.kwargs}
    numbers: list[Any] = []
    for key in keys:
        value = given.get(key, ())
        numbers += value if isinstance(value, (tuple, list)) and key in ("sizes", "shape") else [value][: key in given]
    return Reshape(name, tuple(numbers)) if all(type(number) is int for number in numbers) else None


def _softmax(node: fx.Node) -> nn.Module | None:
    given = {**dict(zip(("dim",), node.args[1:], strict=False)), **node.kwargs}
    # How deep the call is only decides which line a warning names.
    given.pop("_stacklevel", None)
    plain = given.pop("dtype", None) is None and given.keys() == {"dim"} and len(node.args) <= 2
    return _SOFTMAX[node.target](given["dim"]) if plain else None

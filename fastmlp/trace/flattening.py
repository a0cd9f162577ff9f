"""Finds out whether a recorded forward begins by flattening its input as `torch.nn.Flatten()` does.

Called by fastmlp/chain.py, on graphs of torch.fx that recording.py has made.
"""

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

__all__ = ["Flattening", "flattening_of"]

#: Calls that give a tensor another shape, as functions and as methods, and how their arguments are called.
_FLATTEN = (torch.flatten, "flatten")
_RESHAPE = (torch.reshape, "reshape", "view")


class Flattening(NamedTuple):
    """The calls that flatten all dimensions of a value from 1 on.

    Attributes:
        node: the call whose result is flat.
        sizes: the calls that ask for the number of rows, for this call alone.
        features: how many elements a row has, if that is written there.
    """

    node: fx.Node
    sizes: list[fx.Node]
    features: int | None


def flattening_of(source: fx.Node) -> Flattening | None:
    """How a value is flattened from dimension 1 on; None if something else is done with it too, or instead."""
    sizes = _sizes(source)
    calls = [user for user in source.users if user not in sizes]
    if len(calls) != 1:
        return None
    (node,) = calls
    if node.op == "call_module" or any(user is not node and user not in sizes for size in sizes for user in size.users):
        return None
    if node.target in _FLATTEN and not sizes:
        given = {**dict(zip(("input", "start_dim", "end_dim"), node.args, strict=False)), **node.kwargs}
        wanted = {"input": source, "start_dim": 1, "end_dim": -1}
        return Flattening(node, [], None) if {"end_dim": -1, **given} == wanted else None
    shape = _shape(node, source) if node.target in _RESHAPE else ()
    if len(shape) != 2:
        return None
    rows, features = shape
    if type(features) is int and features >= 0 and (rows in sizes or rows == -1):
        return Flattening(node, sizes, features)
    # A -1 stands for what the other dimension leaves, so that two of them are an error of the forward.
    return Flattening(node, sizes, None) if features == -1 and rows in sizes else None


def _sizes(source: fx.Node) -> list[fx.Node]:
    """The calls that ask how many rows there are, and those that they consist of."""
    found: list[fx.Node] = []
    for user in source.users:
        if user.op == "call_method" and user.target == "size" and user.args[1:] == (0,) and not user.kwargs:
            found.append(user)
        elif (user.op == "call_method" and user.target == "size" and user.args == (source,) and not user.kwargs) or (
            user.op == "call_function" and user.target is getattr and user.args == (source, "shape")
        ):
            parts = list(user.users)
            if all(part.target is operator.getitem and part.args == (user, 0) for part in parts):
                found += [user, *parts]
    return found


def _shape(node: fx.Node, source: fx.Node) -> tuple[Any, ...]:
    """The sizes that a call of reshape or view is given; none if it is called in another way."""
    if node.args[:1] != (source,) or not node.kwargs.keys() <= {"shape"}:
        return ()
    given = (*node.args[1:], *node.kwargs.values())
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = tuple(given[0])
    return given

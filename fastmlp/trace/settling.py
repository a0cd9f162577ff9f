"""Answers what Python asks of a value while a forward is recorded, where an example of its arguments was given.

`recording.py` asks here for the length of a tensor, or which way a test of a shape or a device goes. The answer is that
of the example, and the graph holds a call of `settled`, which compares it with the answer of each later call: a forward
that would have gone another way raises. Values that depend on the elements of tensors have no answer.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.utils._python_dispatch import _disable_current_modes

from fastmlp.runs import FUSABLE

__all__ = ["Values", "length", "settled"]


def settled(value: Any, expected: Any) -> None:
    """Raises if a value is not what it was when a forward, which asks for it, was recorded with an example.

    Example:
        >>> settled(torch.zeros(2, 3).dim(), 2)
    """
    if isinstance(value, fx.Proxy):
        # A tracer that records a recorded forward has to record this too.
        value.tracer.create_proxy("call_function", settled, (value, expected), {})
    elif value != expected:
        raise RuntimeError(
            f"fastmlp: a recorded forward asks for a value, a size or a place of its arguments, which was {expected!r} "
            f"when it was recorded and is {value!r} now: call the model itself, or record it anew with such arguments: "
            "convert(model, trace=True, inputs=(...))"
        )


def length(value: Any) -> Any:
    """What `len` gives, and while a recorded forward is recorded a proxy, which `len` cannot give.

    Example:
        >>> length(torch.zeros(2, 3))
        2
    """
    if isinstance(value, fx.Proxy):
        return value.tracer.create_proxy("call_function", length, (value,), {})
    return len(value)


class Values:
    """The values of the nodes of a graph that is being recorded, from examples of its arguments.

    Args:
        examples: by the names of the arguments.
        root: the modules that the graph calls.
        reads: the names of functions and methods that make Python values of the elements of a tensor.
    """

    def __init__(self, examples: Mapping[str, Any], root: nn.Module, reads: frozenset[str]) -> None:
        self._examples, self._root, self._reads = examples, root, reads
        self._known: dict[fx.Node, Any] = {}

    def answer(self, node: fx.Node) -> Any:
        """A value of Python.

        Raises:
            TraceError: if it does not follow from the sizes and places of the examples.
        """
        with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
            value = self._of(node)
        if isinstance(value, Tensor):
            raise TraceError("it depends on the elements of a tensor")
        return value

    def _of(self, node: fx.Node) -> Any:
        if node not in self._known:
            self._known[node] = self._computed(node)
        return self._known[node]

    def _computed(self, node: fx.Node) -> Any:
        target: Any = node.target
        if node.op == "placeholder":
            if target not in self._examples:
                raise TraceError(f"no example of {target} was given")
            value = self._examples[target]
            # In-place operations of the forward change a copy.
            return value.detach().clone() if isinstance(value, Tensor) else value
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        if name in self._reads:
            raise TraceError(f"it depends on the elements of a tensor ({name})")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._of)
        if node.op == "call_function":
            return target(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if node.op == "get_attr":
            path, _, name = target.rpartition(".")
            return getattr(self._root.get_submodule(path), name)
        module = self._root.get_submodule(target) if node.op == "call_module" else None
        if module is None or type(module) not in FUSABLE:
            raise TraceError(f"it depends on what {target} computes")
        return module.forward(*args, **kwargs)

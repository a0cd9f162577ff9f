"""Recorded calls on a GPU: a CUDA graph takes the place of a tape.

The recorder compares two calls as it does on the CPU, and says what cannot be repeated. The third call is captured by
`torch.cuda.graph`, which runs no kernel, and replayed at once, so that each call does its work once. Arguments are
copied into tensors of the graph's, results out of them. What the graph has of numbers and addresses stays as it is, so
that a change of one of them is another recording; flags of torch.backends stay as they are too, unnoticed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastmlp.tape.report import TapeReport
from fastmlp.tape.seen import Watched
from fastmlp.tape.trace import GradSet, Operation, OptimizerStep, Trace

__all__ = ["Graph", "captured", "warmup"]


def warmup() -> AbstractContextManager[Any]:
    """Where calls before a graph's run, as torch demands: a stream aside, once the GPU is in use at all."""
    return _Aside() if torch.cuda.is_initialized() else nullcontext()


class _Aside:
    def __enter__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        self._context = torch.cuda.stream(self._stream)
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
        torch.cuda.current_stream().wait_stream(self._stream)


def _likeness(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad


class _End(torch.autograd.Function):
    """The history of a result that requires a gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, result: Tensor) -> Tensor:
        return result.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "fastmlp: capture: backward() reached a result of a captured function, and a replay keeps no graph; call "
            "backward() inside of the function, or capture more of the program"
        )


class Graph:
    """A recorded call that becomes a CUDA graph.

    Args:
        function: which was recorded.
        trace: its recording.
        signature: of the call, without tensors.
        devices: of its tensors.
        watched: what the function reads besides, numbers of optimizers included.

    Attributes:
        replays: how often it was replayed.
        is_captured: whether there is a graph yet.
        report: what it consists of.
    """

    def __init__(
        self, function: Callable[..., Any], trace: Trace, signature: Any, devices: list[torch.device], watched: Watched
    ) -> None:
        self.replays = 0
        self.is_captured = False
        self._function = function
        self._signature = signature
        self._devices = devices
        self._watched = watched
        memories, values = trace.memories, trace.values
        self._held = [m.tensor for m in memories if m.source == ("unseen",) and m.tensor is not None]
        optimizers = [event.optimizer for event in trace.events if isinstance(event, OptimizerStep)]
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        tensors = [*self._held, *(value for state in states for value in state.values() if isinstance(value, Tensor))]
        self._likenesses = [(tensor, _likeness(tensor)) for tensor in tensors]
        self._without_grad = [leaf for i in trace.starts_without_grad if (leaf := memories[i].tensor) is not None]
        leaves = [memories[values[m.source[1]].memory].tensor for m in memories if m.source[0] == "grad"]
        self._with_grad = [(leaf, leaf.grad) for leaf in leaves if leaf is not None]
        changed = [memories[values[event.leaf].memory].tensor for event in trace.events if isinstance(event, GradSet)]
        self._leaves = list({id(leaf): leaf for leaf in [*changed, *trace.cleared] if leaf is not None}.values())
        operations = [event for event in trace.events if isinstance(event, Operation)]
        self._generators = {v for event in operations for v in event.kwargs.values() if isinstance(v, torch.Generator)}
        names = [event.func._schema.name for event in operations]
        steps = [(type(optimizer).__name__, "torch") for optimizer in optimizers]
        counts = {name: names.count(name) for name in names}
        self.report = TapeReport(counts, len(names), 0, {}, counts, 0, 0, steps, 0, 0)

    def matches(self, args: tuple[Any, ...], kwargs: dict[str, Any], devices: list[torch.device]) -> bool:
        """Whether the graph is one of such a call, and nothing that it depends on has changed."""
        return (
            self._devices == devices
            and self._signature.matches(args, kwargs)
            and self._watched.changed() is None
            and all(_likeness(tensor) == was for tensor, was in self._likenesses)
            and all(leaf.grad is None for leaf in self._without_grad)
            and all(leaf.grad is grad for leaf, grad in self._with_grad)
        )

    def capture(self, tensors: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Makes the graph, which does no work yet; returns why that is not possible."""
        own = {id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in tensors}
        self._inputs = [own[id(tensor)] for tensor in tensors]
        before = [(leaf, leaf.grad) for leaf in self._leaves]
        args, kwargs = tree_map_only(Tensor, lambda tensor: own[id(tensor)], (args, kwargs))
        try:
            self._graph, self._result = captured(self._function, args, kwargs, self._generators)
        except RuntimeError as error:
            for leaf, grad in before:
                leaf.grad = grad
            reason = str(error).partition("\n")[0]
            return f"CUDA cannot capture it ({reason}): find out which operation waits for the GPU, and do it outside"
        kept = {id(tensor) for tensor in (*self._inputs, *self._held)}

        def ended(tensor: Tensor) -> Tensor:
            return tensor if id(tensor) in kept else tensor.detach().requires_grad_(tensor.requires_grad)

        self._result = tree_map_only(Tensor, ended, self._result)
        self._grads = [(leaf, leaf.grad) for leaf in self._leaves]
        self.is_captured = True
        return None

    def replay(self, tensors: list[Tensor]) -> Any:
        """Does the work of one call, with these tensors among its arguments."""
        with torch.no_grad():
            for own, given in zip(self._inputs, tensors, strict=True):
                own.copy_(given)
            self._graph.replay()
        for leaf, grad in self._grads:
            leaf.grad = grad
        self.replays += 1
        kept = {id(own): given for own, given in zip(self._inputs, tensors, strict=True)}
        kept |= {id(tensor): tensor for tensor in self._held}

        def out(tensor: Tensor) -> Tensor:
            if id(tensor) in kept:
                return kept[id(tensor)]
            if not tensor.requires_grad:
                return tensor.clone()
            return _End.apply(torch.empty((), requires_grad=True), tensor.detach())

        return tree_map_only(Tensor, out, self._result)


def captured(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], generators: set[torch.Generator]
) -> tuple[Any, Any]:
    """A call as a CUDA graph, which has not run, and what it returns."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    # What autocast has cast outside of the graph would be missing in it, and the other way round.
    torch.clear_autocast_cache()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function(*args, **kwargs)
    torch.clear_autocast_cache()
    return graph, result

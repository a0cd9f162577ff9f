"""The `.grad` of leaves during a recording: autograd puts gradients there without an operation that says so."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastmlp.tape.trace import GradSet, Memory, Trace

__all__ = ["Gradients"]


class Gradients:
    """Compares the `.grad` of leaves with what a trace tells of it.

    Args:
        trace: which is told what changed.
        recorder: which knows the values of tensors.
        leaves: whose gradients may change.
    """

    def __init__(self, trace: Trace, recorder: Any, leaves: Iterable[Tensor]) -> None:
        self._trace = trace
        self._recorder = recorder
        self._leaves: dict[int, Tensor] = {}
        self._start: dict[int, Tensor | None] = {}  # what each leaf had when the call began
        self._of_grad: dict[int, Tensor] = {}  # the leaves by the identity of what they had
        self._now: dict[int, Tensor | None] = {}  # what it has, as far as the trace tells
        self._cleared: set[int] = set()  # leaves of trace.cleared
        self._set: set[int] = set()  # leaves that an event is of
        self._stepped: set[int] = set()  # leaves whose gradient an optimizer has used, without an event
        for leaf in leaves:
            self.add(leaf)

    def add(self, leaf: Tensor) -> None:
        """Takes note of a leaf whose `.grad` nothing has changed yet."""
        if id(leaf) not in self._leaves:
            self._leaves[id(leaf)] = leaf
            grad = self._start[id(leaf)] = self._now[id(leaf)] = leaf.grad
            if grad is not None:
                self._of_grad.setdefault(id(grad), leaf)

    def leaves(self) -> list[Tensor]:
        """All leaves."""
        return list(self._leaves.values())

    def leaf_of(self, grad: Tensor) -> Tensor | None:
        """The leaf whose `.grad` a tensor was when the call began."""
        leaf = self._of_grad.get(id(grad))
        if leaf is not None and id(leaf) in self._cleared:
            self._recorder.refuse("the gradient of before the call is used after zero_grad(): use it before")
        return leaf

    def was_set(self, leaf: Tensor, place: str) -> None:
        """The program has set the `.grad` of a leaf that add() knows."""
        if leaf.grad is None and not self._is_touched(leaf) and id(leaf) not in self._stepped:
            self._trace.cleared.append(leaf)
            self._cleared.add(id(leaf))
            self._now[id(leaf)] = None
        elif leaf.grad is None or leaf.grad is not self._now[id(leaf)]:
            self._note(leaf, place)

    def was_looked_at(self, leaf: Tensor) -> None:
        """The program has looked at the `.grad` of a leaf, and may do one thing or another."""
        # A frozen parameter may have one left.
        if leaf.is_leaf and (leaf.requires_grad or isinstance(leaf, nn.Parameter) or id(leaf) in self._leaves):
            self.add(leaf)
            if not self._is_touched(leaf) and self._now[id(leaf)] is leaf.grad:
                self._trace.looked.setdefault(id(leaf), (leaf, leaf.grad is not None))

    def will_be_used(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to step, by the gradients that leaves have then."""
        for group in optimizer.param_groups:
            for leaf in group["params"]:
                self.add(leaf)
                self._stepped.add(id(leaf))

    def will_be_set(self, leaf: Tensor, place: str) -> None:
        """The program is about to set the `.grad` of a leaf, which autograd may have set before."""
        self.add(leaf)
        self._sync(leaf, place)

    def sync(self, place: str) -> None:
        """Notes gradients that autograd has put into leaves since the last time."""
        for leaf in list(self._leaves.values()):
            self._sync(leaf, place)

    def _sync(self, leaf: Tensor, place: str) -> None:
        key = id(leaf)
        if leaf.grad is self._now[key]:
            return
        if self._start[key] is None and key not in self._cleared and key not in self._set:
            self._trace.starts_without_grad.add(self._trace.values[self._recorder.value_of(leaf, place)].memory)
        self._note(leaf, place)

    def _is_touched(self, leaf: Tensor) -> bool:
        """Whether the trace tells of the leaf's gradient already."""
        start = self._start[id(leaf)]
        read = start is not None and self._recorder.known_value(start) is not None
        return read or id(leaf) in self._cleared or id(leaf) in self._set

    def _note(self, leaf: Tensor, place: str) -> None:
        grad = self._now[id(leaf)] = leaf.grad
        self._set.add(id(leaf))
        value = None if grad is None else self._recorder.value_of(grad, place)
        leaf_value = self._recorder.value_of(leaf, place)
        if self._memory(leaf_value).source[0] in ("new", "constant"):
            self._recorder.refuse_at(
                "the .grad of a tensor that the function makes is set: compute it by torch.autograd.grad", place
            )
        if value is not None and self._memory(value).source != ("new",) and self._memory(value).tensor is not grad:
            self._recorder.refuse_at(
                ".grad is set to a view, a constant of Python, or the gradient of another tensor, which a replay would "
                "not find there: set it to a new tensor (clone()), or write into it with copy_()",
                place,
            )
        self._trace.events.append(GradSet(leaf_value, value, place))

    def _memory(self, value: int) -> Memory:
        return self._trace.memories[self._trace.values[value].memory]

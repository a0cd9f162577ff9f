"""Lets elementwise operations and runs write over an operand that nothing reads later, as autograd does where it can.

Called by `lower.py` when all events are known. Memories that become one need half of the space, and stay in a cache.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from fastmlp.tape.elements import layout_of
from fastmlp.tape.trace import Operation, Output, Run, Trace, refs

__all__ = ["write_in_place"]


def write_in_place(trace: Trace, owners: list[str], writes_given: Callable[[Operation], bool]) -> None:
    """Makes memories one where an event may write its result over an operand.

    Args:
        trace: the values of what is made lie in the memory of the operand afterwards.
        owners: of each memory, as `_C.Tape.add_memory` takes them.
        writes_given: whether a replay of an operation writes into the tensor that it is given for its result.
    """
    memories = _Memories(trace, owners)
    for i, event in enumerate(trace.events):
        if isinstance(event, Operation):
            if torch.Tag.pointwise in event.func.tags and len(event.outputs) == 1 and not event.func._schema.is_mutable:
                _over_operand(memories, i, event, writes_given)
        elif isinstance(event, Run):
            for output in event.outputs:
                _over_input(memories, i, event, output)


class _Memories:
    """Those of a trace, and when they are used."""

    def __init__(self, trace: Trace, owners: list[str]) -> None:
        self.trace = trace
        self._owners = owners
        self._first: dict[int, int] = {}
        self._last: dict[int, int] = {}
        for i, event in enumerate(trace.events):
            for value in trace.refs(event):
                memory = trace.values[value].memory
                self._first.setdefault(memory, i)
                self._last[memory] = i
        self._kept = {trace.values[value].memory for value, *_ in trace.results}

    def may_be_one(self, i: int, over: int, made: int) -> bool:
        """Whether what event `i` makes may lie where an operand does that nothing uses later."""
        owned = self._owners[over] == self._owners[made] == "arena" and not {over, made} & self._kept
        timely = self._last[over] == i == self._first[made] < self._last[made]
        return owned and timely and self.trace.memories[over].bytes == self.trace.memories[made].bytes

    def make_one(self, over: int, made: int) -> None:
        """Lets all values of what is made lie in the memory of the operand."""
        for value in self.trace.values:
            if value.memory == made:
                value.memory = over
        self._last[over] = self._last[made]


def _over_operand(memories: _Memories, i: int, event: Operation, writes_given: Callable[[Operation], bool]) -> None:
    """Lets an operation of torch write over an operand that lies like its result."""
    values = memories.trace.values
    output = event.outputs[0]
    operands = list(refs((event.args, event.kwargs)))
    if output is None or output in operands or not writes_given(event):
        return
    made = values[output].memory
    for operand in operands:
        over = values[operand].memory
        same = all(values[v] == values[operand] for v in operands if values[v].memory == over)
        fits = replace(values[operand], memory=made) == values[output]
        if same and fits and memories.may_be_one(i, over, made):
            memories.make_one(over, made)
            return


def _over_input(memories: _Memories, i: int, event: Run, output: Output) -> None:
    """Lets a run write over an input that lies like the output, element by element and in all of its memory."""
    trace = memories.trace
    values = trace.values
    if output.how != "store":
        return
    made, *lying = layout_of(values[output.value], output.space)
    whole = math.prod(event.sizes) * values[output.value].dtype.itemsize == trace.memories[made].bytes
    layouts = [layout_of(values[value], space) for value, space in event.inputs]
    for register in _by_last_use(event):
        over, *others = layouts[register]
        alone = sum(layout[0] == over for layout in layouts) == 1
        if whole and alone and lying == others and memories.may_be_one(i, over, made):
            memories.make_one(over, made)
            return


def _by_last_use(event: Run) -> Iterable[int]:
    """The inputs of a run, first those that no instruction reads after the others.

    What is still read when an output is computed cannot be overwritten at once, and costs a copy in the cache.
    """
    last = dict.fromkeys(range(len(event.inputs)), -1)
    for place, (_, operands, _) in enumerate(event.instructions):
        last.update((operand, place) for operand in operands if operand in last)
    return sorted(last, key=last.__getitem__)

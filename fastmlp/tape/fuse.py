"""Makes nodes of the operations of a trace: runs of elementwise operations become one pass over memory each.

What may be moved or joined follows from memory alone: an operation comes after the one that wrote what it reads or
writes, and after those that read what it writes. Whose results nobody reads goes.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fastmlp.tape.decompose import decompose
from fastmlp.tape.elements import Element, Numbers
from fastmlp.tape.indices import index_node_of
from fastmlp.tape.members import Members
from fastmlp.tape.nodes import activated, node_of, without
from fastmlp.tape.order import Group, Order
from fastmlp.tape.recompute import recompute
from fastmlp.tape.run import build_run
from fastmlp.tape.trace import (
    Check,
    Event,
    GradSet,
    Node,
    Operation,
    OptimizerStep,
    Trace,
    refs,
    written_arguments,
)

__all__ = ["fuse"]

#: What is no memory, but keeps operations in their order: draws of random numbers, and what a check may forbid.
_DRAWS, _EFFECTS = -1, -2
#: Memory of the outside, all of it: a replay may be given tensors that share memory where the recorded ones did not.
_OUTSIDE = -3
#: That of the `.grad` of a leaf, less the number of the leaf's memory.
_GRADS = -4


class _Fusion:
    """Fuses events between two steps of optimizers."""

    def __init__(self, trace: Trace, owners: Sequence[str], numbers: Numbers) -> None:
        self.trace = trace
        self.order = Order()
        self._owners = owners
        self._outside = {memory for memory, owner in enumerate(owners) if owner == "outside"}
        self._numbers = numbers
        self._events: list[Event | Element] = []
        self._places: list[str] = []
        self._runs: dict[int, Members] = {}  # by their groups

    def add(self, event: Event) -> None:
        """Adds the next event."""
        if isinstance(event, Operation):
            elements = decompose(self.trace, event, self._numbers)
            if elements is not None:
                for element in elements:
                    self._element(element, event.place)
                return
            event = node_of(self.trace, event) or index_node_of(self.trace, event, self._numbers) or event
        reads, writes = self._touched(event)
        self._events.append(event)
        self._places.append(event.place)
        self.order.add(len(self._events) - 1, reads, writes, self.order.needed(reads, writes), None)

    def _owner(self, memory: int) -> str:
        return self._owners[memory] if 0 <= memory < len(self._owners) else "arena"

    def _touched(self, event: Event) -> tuple[set[int], set[int]]:
        """The memories that an event reads and writes."""
        values = self.trace.values
        used = {values[value].memory for value in self.trace.refs(event)}
        if isinstance(event, Node):
            writes = {values[value].memory for value in event.writes}
            reads, writes = self._ordered(used - writes, writes, event.draws)
            return reads, writes | {_EFFECTS} if event.raises else writes
        if isinstance(event, GradSet):
            return used | {_EFFECTS}, {_GRADS - values[event.leaf].memory}
        if isinstance(event, Check):
            return used, {_EFFECTS}
        assert isinstance(event, Operation)
        writes = {values[output].memory for output in event.outputs if output is not None}
        writes |= {values[value].memory for value in written_arguments(event)}
        reads = {values[value].memory for value in refs((event.args, event.kwargs))}
        draws = torch.Tag.nondeterministic_seeded in event.func.tags or _has_generator(event.func)
        return self._ordered(reads, writes, draws)

    def _ordered(self, reads: set[int], writes: set[int], draws: bool = False) -> tuple[set[int], set[int]]:
        """With what is no memory of its own."""
        owned = {self._owner(memory) for memory in writes}
        if draws or "outside" in owned or "grad" in owned:
            reads = reads | {_EFFECTS}
        if draws:
            writes = writes | {_DRAWS}
        if writes & self._outside:
            writes = writes | {_OUTSIDE}
        elif reads & self._outside:
            reads = reads | {_OUTSIDE}
        return reads, writes

    def _element(self, element: Element, place: str) -> None:
        values = self.trace.values
        sizes = tuple(size for size in element.space if size != 1)
        read = {values[value].memory for value in refs(element.operands)}
        output = values[element.output].memory
        reads, writes = self._ordered(read, {output})
        needed = self.order.needed(reads, writes)
        if self._behind_product(element, reads, writes, needed):
            return
        fits = (
            group
            for group in (*needed, *self._beside(read))
            if (run := self._runs.get(group.number)) is not None
            and run.key == (sizes, element.dtype)
            and run.takes(element)
            and self.order.can_join(group, needed)
        )
        into = next(fits, None)
        self._events.append(element)
        self._places.append(place)
        group = self.order.add(len(self._events) - 1, reads, writes, needed, into)
        if into is None:
            self._runs[group.number] = Members(self.trace, (sizes, element.dtype), self._outside)
        self._runs[group.number].add(element)

    def _behind_product(self, element: Element, reads: set[int], writes: set[int], needed: list[Group]) -> bool:
        """Lets a product compute the activation of what it makes."""
        for group in needed:
            (*_, member) = group.members
            product = self._events[member]
            if not isinstance(product, Node) or not self.order.can_join(group, needed):
                continue
            node = activated(self.trace, product, element)
            if node is not None and not writes & group.reads:
                self._events[member] = node
                self.order.add(member, reads - group.writes, writes, needed, group)
                return True
        return False

    def _beside(self, reads: Iterable[int]) -> list[Group]:
        """Groups that read the same."""
        return [group for memory in reads for group in self.order.readers(memory)[-4:]]

    def events(self, live: set[int]) -> list[Event]:
        """What is left: events as they were, and runs. `live`: memories that are read later; gets what these read."""
        result: list[Event] = []
        groups = self.order.sorted()
        recompute(self.trace, groups, self._runs, live, self._owner)
        for group in reversed(groups):
            run = self._runs.get(group.number)
            kept = {memory for memory in group.writes if memory < 0 or memory in live or self._owner(memory) != "arena"}
            event = self._events[group.members[0]]
            # What is torch's may raise an error, whether somebody reads its result or not. Of nodes, those that may
            # raise one write to what is no memory.
            if not kept and isinstance(event, (Element, Node)):
                continue
            if run is None:
                assert not isinstance(event, Element)
                result.append(self._without_dead(event, kept))
                live |= group.reads
                continue
            built = build_run(self.trace, run.elements, kept, self._places[group.members[0]])
            result.append(built)
            live |= {self.trace.values[value].memory for value, _ in built.inputs}
        return result[::-1]

    def _without_dead(self, event: Event, kept: set[int]) -> Event:
        """A node without what it makes and nobody reads."""
        if not isinstance(event, Node):
            return event
        return without(event, {value for value in event.writes if self.trace.values[value].memory not in kept})


def _has_generator(func: Any) -> bool:
    return any(argument.name == "generator" for argument in func._schema.arguments)


def fuse(trace: Trace, owners: Sequence[str], numbers: Numbers) -> list[Event]:
    """The events of a trace, some of them as nodes.

    Args:
        trace: without what costs nothing at a replay. Gets new values and memories, which belong to the arena.
        owners: of each memory, as `_C.Tape.add_memory` takes them.
        numbers: of memories that hold one number throughout.
    """
    stretches = [_Fusion(trace, owners, numbers)]
    steps: list[OptimizerStep] = []
    for event in trace.events:
        if isinstance(event, OptimizerStep):
            steps.append(event)
            stretches.append(_Fusion(trace, owners, numbers))
        else:
            stretches[-1].add(event)
    live: set[int] = set()
    events = stretches[-1].events(live)
    for stretch, step in zip(reversed(stretches[:-1]), reversed(steps), strict=True):
        events = [*stretch.events(live), step, *events]
    return events

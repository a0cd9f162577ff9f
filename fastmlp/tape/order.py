"""Which operations of a trace may change places, and which may become one: their dependencies through memory."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Group", "Order"]


@dataclass(slots=True)
class Group:
    """Operations that are executed as one, by their numbers in the trace.

    Attributes:
        number: its place among groups.
        members: numbers that the caller gave.
        reads: memories.
        writes: memories.
        before: a bit for each group that has to be executed before this one.
    """

    number: int
    members: list[int] = field(default_factory=list)
    reads: set[int] = field(default_factory=set)
    writes: set[int] = field(default_factory=set)
    before: int = 0


class Order:
    """Groups of operations, and what has to come before what.

    An operation depends on the last one that wrote what it reads or writes, and on those that read since then what it
    writes.
    """

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self._writer: dict[int, Group] = {}
        self._readers: dict[int, list[Group]] = {}

    def needed(self, reads: Iterable[int], writes: Iterable[int]) -> list[Group]:
        """The groups that the next operation directly depends on, the latest first."""
        found: dict[int, Group] = {}
        for memory in (*reads, *writes):
            group = self._writer.get(memory)
            if group is not None:
                found[group.number] = group
        for memory in writes:
            for group in self._readers.get(memory, ()):
                found[group.number] = group
        return sorted(found.values(), key=lambda group: -group.number)

    def readers(self, memory: int) -> list[Group]:
        """Those that have read a memory since it was written, the latest last."""
        return self._readers.get(memory, [])

    def can_join(self, group: Group, needed: Iterable[Group]) -> bool:
        """Whether an operation that depends on these groups can become a part of one: nothing between them waits."""
        bit = 1 << group.number
        return not any(other.before & bit for other in needed if other is not group)

    def add(
        self, member: int, reads: Iterable[int], writes: Iterable[int], needed: Iterable[Group], into: Group | None
    ) -> Group:
        """Adds the next operation, to a group that it can join or as a group of its own."""
        group = into
        if group is None:
            group = Group(len(self.groups))
            self.groups.append(group)
        before = group.before
        for other in needed:
            if other is not group:
                before |= other.before | 1 << other.number
        if into is not None and before != group.before:
            bit = 1 << group.number
            for other in self.groups:
                if other.before & bit:
                    other.before |= before
        group.before = before
        group.members.append(member)
        group.reads.update(reads)
        group.writes.update(writes)
        for memory in reads:
            self._readers.setdefault(memory, []).append(group)
        for memory in writes:
            self._writer[memory] = group
            self._readers[memory] = []
        return group

    def sorted(self) -> list[Group]:
        """The groups in an order that keeps all dependencies, otherwise as they came."""
        waiting = [group.before.bit_count() for group in self.groups]
        after: list[list[int]] = [[] for _ in self.groups]
        for group in self.groups:
            before = group.before
            while before:
                low = before & -before
                after[low.bit_length() - 1].append(group.number)
                before ^= low
        ready = [(group.members[0], group.number) for group in self.groups if not waiting[group.number]]
        heapq.heapify(ready)
        result = []
        while ready:
            _, number = heapq.heappop(ready)
            result.append(self.groups[number])
            for other in after[number]:
                waiting[other] -= 1
                if not waiting[other]:
                    heapq.heappush(ready, (self.groups[other].members[0], other))
        return result

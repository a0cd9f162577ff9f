"""Has runs compute again, from what is at hand, what an earlier run would have to store for them.

A load costs about as much as a cheap instruction on what lies in a register, and a stored value needs memory from where
it is made to where it is read last. Called by `fuse.py` when all runs are known.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set

from fastmlp.tape.elements import Element
from fastmlp.tape.members import Members
from fastmlp.tape.order import Group
from fastmlp.tape.trace import Trace, refs

__all__ = ["recompute"]

#: Instructions that cost about as much as a load.
_CHEAP = frozenset(
    (
        "add", "add_scalar", "and", "clamp_max", "clamp_min", "copy", "maximum", "minimum", "mul", "mul_scalar", "neg",
        "not", "or", "rsub_scalar", "square", "sub", "value_relu", "where",
        *(f"{name}{end}" for name in ("gt", "ge", "lt", "le", "eq", "ne") for end in ("", "_scalar")),
    )
)  # fmt: skip
#: Instructions that stand for one load, at most.
_LONGEST = 3


def recompute(
    trace: Trace, groups: Sequence[Group], runs: Mapping[int, Members], live: Set[int], owner: Callable[[int], str]
) -> None:
    """Adds elements to the runs that read what these make, where then nobody is left who reads it from memory.

    Args:
        trace: of the values.
        groups: in the order in which they are executed.
        runs: by the numbers of their groups.
        live: memories that are read after all groups.
        owner: of a memory, as `_C.Tape.add_memory` takes it.
    """
    uses = _Uses(trace, groups, runs, live, owner)
    for group in groups:
        run = runs.get(group.number)
        for element in () if run is None else tuple(run.elements):
            uses.spare(group, element)


class _Uses:
    """Which groups read and write each memory, and when."""

    def __init__(
        self,
        trace: Trace,
        groups: Sequence[Group],
        runs: Mapping[int, Members],
        live: Set[int],
        owner: Callable[[int], str],
    ) -> None:
        self._values = trace.values
        self._runs = runs
        self._live = live
        self._owner = owner
        self._place = {group.number: i for i, group in enumerate(groups)}
        self._readers: dict[int, list[Group]] = defaultdict(list)
        self._writers: dict[int, list[Group]] = defaultdict(list)
        for group in groups:
            for memory in group.reads:
                self._readers[memory].append(group)
            for memory in group.writes:
                self._writers[memory].append(group)
        self._writes_outside = any(owner(memory) == "outside" for memory in self._writers if memory >= 0)

    def _memory(self, value: int) -> int:
        return self._values[value].memory

    def spare(self, group: Group, element: Element) -> None:
        """Lets the readers of what an element makes compute it, if all of them can."""
        made = self._memory(element.output)
        readers = [other for other in self._readers[made] if other is not group]
        if not readers or made in self._live or self._owner(made) != "arena" or len(self._writers[made]) > 1:
            return
        if sum(self._memory(one.output) == made for one in self._runs[group.number].elements) > 1:
            return
        chain = self._chain(group, element, max(self._place[other.number] for other in readers))
        if not chain:
            return
        added = []
        for other in readers:
            run, own = self._runs.get(other.number), self._runs[group.number]
            missing = [one for one in chain if run is None or not any(one is known for known in run.elements)]
            if run is None or run.key != own.key or not all(map(run.takes, missing)):
                return
            added.append((other, run, missing))
        for other, run, missing in added:
            run.begin_with(missing)
            for memory in {self._memory(value) for one in missing for value in refs(one.operands)}:
                if other not in self._readers[memory]:
                    self._readers[memory].append(other)
        self._readers[made] = [group]

    def _chain(self, group: Group, element: Element, until: int) -> list[Element]:
        """Elements of a run that make what one of them does, from what is in memory at a later place too.

        There are none if that takes many or costly ones.
        """
        elements = self._runs[group.number].elements
        place = {id(one): i for i, one in enumerate(elements)}
        wanted = [element]
        for one in wanted:
            if one.how != "store" or one.name not in _CHEAP or len(wanted) > _LONGEST:
                return []
            for memory in {self._memory(value) for value in refs(one.operands)}:
                makers = [other for other in elements if self._memory(other.output) == memory]
                if any(place[id(maker)] >= place[id(one)] for maker in makers):
                    return []  # it reads what it, or a later element, has written over since
                if self._stays(group, memory, until):
                    continue
                if len(makers) != 1 or len(self._writers[memory]) > 1 or self._owner(memory) != "arena":
                    return []
                if not any(makers[0] is other for other in wanted):
                    wanted += makers
        return [one for one in elements if any(one is other for other in wanted)]

    def _stays(self, group: Group, memory: int, until: int) -> bool:
        """Whether a memory is read at a later place or after it, and holds what the group reads or makes there."""
        if self._owner(memory) == "outside":
            return not self._writes_outside
        writers = self._writers[memory]
        if len(writers) > 1 or (writers and self._place[writers[0].number] > self._place[group.number]):
            return False
        makers = [one for one in self._runs[group.number].elements if self._memory(one.output) == memory]
        others = [self._place[other.number] for other in self._readers[memory] if other is not group]
        read_later = memory in self._live or self._owner(memory) != "arena" or max(others, default=-1) >= until
        return len(makers) < 2 and read_later

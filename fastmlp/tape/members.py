"""Which elements can be one run: those of one space that use memory element by element."""

from collections.abc import Sequence, Set

import torch

from fastmlp.tape.elements import Element, Layout, layout_of
from fastmlp.tape.trace import Trace, refs

__all__ = ["Members"]

#: Instructions in a run, whose blocks have to stay in a cache.
_LONGEST = 64


class Members:
    """The elements of a run, and how they use memory.

    Attributes:
        key: sizes of the space, dimensions of one element aside, and the dtype.
    """

    def __init__(self, trace: Trace, key: tuple[tuple[int, ...], torch.dtype], outside: Set[int]) -> None:
        self.key = key
        self._outside = outside
        self.elements: list[Element] = []
        self._trace = trace
        self._read: dict[int, set[Layout]] = {}
        self._written: dict[int, Layout | None] = {}  # None for what is reduced

    def _layouts(self, element: Element) -> tuple[list[Layout], Layout]:
        values = self._trace.values
        reads = [layout_of(values[value], element.space) for value in refs(element.operands)]
        return reads, layout_of(values[element.output], element.space, element.reduced)

    def takes(self, element: Element) -> bool:
        """Whether an element can follow: all that use a memory that one of them writes use it element by element."""
        if len(self.elements) >= _LONGEST:
            return False
        reads, output = self._layouts(element)
        if self._may_overlap({layout[0] for layout in (*reads, output)}, output[0]):
            return False
        for layout in reads:
            if layout[0] in self._written and self._written[layout[0]] != layout:
                return False
        memory = output[0]
        if memory not in self._written and memory not in self._read:
            return all(layout[0] != memory or layout == output for layout in reads)
        if element.how != "store" or self._written.get(memory, output) != output:
            return False
        return all(layout == output for layout in self._read.get(memory, ()))

    def _may_overlap(self, used: Set[int], output: int) -> bool:
        """Whether the element or another one writes memory of the outside, and the other uses such memory too.

        Both may share it in part. Torch computes one operation after the other, a run block by block.
        """
        theirs = self._outside & (self._written.keys() | self._read.keys())
        written = (self._outside & self._written.keys()) | (self._outside & {output})
        return any(memory != one for one in written for memory in theirs | (self._outside & used))

    def add(self, element: Element) -> None:
        """Adds an element that fits."""
        reads, output = self._layouts(element)
        self.elements.append(element)
        for layout in reads:
            self._read.setdefault(layout[0], set()).add(layout)
        self._written[output[0]] = output if element.how == "store" else None

    def begin_with(self, elements: Sequence[Element]) -> None:
        """Adds elements that fit before all others, which read what these make."""
        later = self.elements
        self.elements = []
        for element in elements:
            self.add(element)
        self.elements += later

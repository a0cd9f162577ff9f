"""Runs of elementwise instructions as nodes of a tape: registers in place of values that nobody else reads."""

from collections.abc import Collection, Sequence

import torch

from fastmlp.tape.elements import ROUNDED, Element, Layout, layout_of
from fastmlp.tape.trace import Output, Ref, Run, Trace

__all__ = ["build_run"]

#: Instructions that make nothing else than 0 and 1.
_BOOLEAN = frozenset(
    ("not", "and", "or", *(f"{name}{end}" for name in ("gt", "ge", "lt", "le", "eq", "ne") for end in ("", "_scalar")))
)


class _Builder:
    """Registers are numbered as they come, inputs among them, and again when all are known."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.inputs: dict[int, tuple[int, tuple[int, ...]]] = {}  # by register
        self.made: dict[int, tuple[str, tuple[int, ...], tuple[float, ...]]] = {}
        self._now: dict[Layout, int] = {}
        self._known: dict[tuple[str, tuple[int, ...], tuple[str, ...]], int] = {}

    def _instruction(self, name: str, operands: tuple[int, ...], scalars: tuple[float, ...]) -> int:
        key = name, operands, tuple(map(float.hex, scalars))
        if key not in self._known:
            self._known[key] = len(self.inputs) + len(self.made)
            self.made[self._known[key]] = name, operands, scalars
        return self._known[key]

    def _operand(self, operand: Ref | float, element: Element) -> int:
        if not isinstance(operand, Ref):
            return self._instruction("constant", (), (float(operand),))
        layout = layout_of(self.trace.values[operand.value], element.space)
        if layout not in self._now:
            self._now[layout] = len(self.inputs) + len(self.made)
            self.inputs[self._now[layout]] = operand.value, element.space
        return self._now[layout]

    def add(self, element: Element) -> int:
        """The register of what an element makes."""
        operands = tuple(self._operand(operand, element) for operand in element.operands)
        copied = element.name == "copy"
        register = operands[0] if copied else self._instruction(element.name, operands, element.scalars)
        if element.how != "store":
            return register
        value = self.trace.values[element.output]
        if value.dtype == torch.bool and not self._is_boolean(register):
            register = self._instruction("ne_scalar", (register,), (0.0,))
        elif value.dtype in ROUNDED and not self._is_rounded(register, value.dtype):
            register = self._instruction(ROUNDED[value.dtype], (register,), ())
        self._now[layout_of(value, element.space)] = register
        return register

    def _is_rounded(self, register: int, dtype: torch.dtype) -> bool:
        if register in self.inputs:
            return self.trace.values[self.inputs[register][0]].dtype == dtype
        return self.made[register][0] == ROUNDED[dtype]

    def _is_boolean(self, register: int) -> bool:
        if register in self.inputs:
            return self.trace.values[self.inputs[register][0]].dtype == torch.bool
        return self.made[register][0] in _BOOLEAN


def build_run(trace: Trace, elements: Sequence[Element], kept: Collection[int], place: str) -> Run:
    """The run of some elements.

    Args:
        trace: of the values.
        elements: of one space and dtype.
        kept: memories that somebody reads later.
        place: where the program called the first.
    """
    builder = _Builder(trace)
    outputs: dict[Layout, Output] = {}
    for element in elements:
        register, value = builder.add(element), trace.values[element.output]
        if value.memory in kept:
            layout = layout_of(value, element.space, element.reduced)
            outputs[layout] = Output(
                element.output, element.space, register, element.how, element.reduced, element.scale
            )
    used = {output.register for output in outputs.values()}
    for register in sorted(builder.made, reverse=True):
        if register in used:
            used.update(builder.made[register][1])
    inputs = [register for register in builder.inputs if register in used]
    made = [register for register in builder.made if register in used]
    again = {register: i for i, register in enumerate((*inputs, *made))}
    instructions = [
        (name, [again[operand] for operand in operands], list(scalars))
        for name, operands, scalars in (builder.made[register] for register in made)
    ]
    for output in outputs.values():
        output.register = again[output.register]
    sizes = tuple(size for size in elements[0].space if size != 1)
    return Run(sizes, [builder.inputs[register] for register in inputs], instructions, [*outputs.values()], place)

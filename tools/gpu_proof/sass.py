"""Reads what `nvdisasm -c` prints of our own kernels: their instructions and the mix of their main loops."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

#: Multiply-adds, of which a main loop should consist: ordinary units, then tensor cores.
MATH = ("FFMA", "FFMA2", "DFMA", "HMMA", "DMMA")

_SECTION = re.compile(r"\s*\.section\s+\.text\.([^,\s]+)")
_LABEL = re.compile(r"(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s*(?:\{\s*)?/\*([0-9a-f]+)\*/\s+(?:\{\s*)?(.+?)\s*;?\s*\}?\s*$")
_PREDICATE = re.compile(r"@!?U?P\w+\s+")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Instruction:
    """One line of SASS."""

    opcode: str  # with its modifiers, as `LDS.128`
    target: int | None  # of a branch: the index of the instruction that it goes to

    @property
    def name(self) -> str:
        """Return the opcode without its modifiers."""
        return self.opcode.split(".")[0]


def functions(text: str) -> dict[str, list[Instruction]]:
    """Return the instructions of each function by its mangled name."""
    lines: dict[str, list[str]] = {}
    labels: dict[str, dict[str, int]] = {}
    name = None
    for line in text.splitlines():
        if match := _SECTION.match(line):
            name = match[1]
            lines[name], labels[name] = [], {}
        elif line.lstrip().startswith(".section\t"):
            name = None
        elif name is None:
            continue
        elif match := _LABEL.match(line):
            labels[name][match[1]] = len(lines[name])
        elif match := _INSTRUCTION.match(line):
            lines[name].append(_PREDICATE.sub("", match[2], count=1))
    return {name: [_instruction(body, labels[name]) for body in bodies] for name, bodies in lines.items()}


def _instruction(body: str, labels: dict[str, int]) -> Instruction:
    target = _TARGET.search(body) if body.startswith("BRA") else None
    return Instruction(body.split()[0], labels.get(target[1]) if target else None)


def loops(code: Sequence[Instruction]) -> Iterator[tuple[int, int]]:
    """Yield first and last index of the innermost loops: branches back, without another one in between."""
    ends = [(i.target, at) for at, i in enumerate(code) if i.target is not None and i.target <= at]
    for first, last in ends:
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in ends):
            yield first, last


@dataclass(frozen=True)
class Mix:
    """The instructions of a kernel's main loop, the innermost one with the most multiply-adds."""

    opcodes: Counter[str]  # with modifiers

    @property
    def total(self) -> int:
        """Return the number of instructions."""
        return self.opcodes.total()

    def count(self, *names: str) -> int:
        """Return how many instructions have one of these names, which may have modifiers: `LDS.128`."""
        return sum(n for opcode, n in self.opcodes.items() if any(_is(opcode, name) for name in names))

    @property
    def math(self) -> int:
        """Return the number of multiply-adds."""
        return self.count(*MATH)

    @property
    def share(self) -> float:
        """Return which part of the loop multiply-adds are."""
        return self.math / self.total


def _is(opcode: str, name: str) -> bool:
    first, *modifiers = name.split(".")
    found, *others = opcode.split(".")
    return found == first and all(m in others for m in modifiers)


def main_loop(code: Sequence[Instruction]) -> Mix | None:
    """Return the mix of the main loop; None if no loop multiplies and adds."""
    mixes = [Mix(Counter(i.opcode for i in code[first : last + 1])) for first, last in loops(code)]
    best = max(mixes, key=lambda mix: mix.math, default=None)
    return best if best is not None and best.math > 0 else None

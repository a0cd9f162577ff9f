"""Reads what `nvdisasm -c` prints of our own kernels: their instructions and the mix of their main loops."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

#: Multiply-adds, of which a main loop should consist, on ordinary units and on tensor cores.
ORDINARY = ("FFMA", "FFMA2", "DFMA")
TENSOR = ("HMMA", "DMMA")

#: Of shared memory, in a main loop.
FEWEST_READS = 8

_SECTION = re.compile(r"\s*\.section\s+\.text\.([^,\s]+)")
_LABEL = re.compile(r"(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s*(?:\{\s*)?/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(\S.*)")
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
            lines[name].append(_PREDICATE.sub("", match[1], count=1))
    return {name: [_instruction(body, labels[name]) for body in bodies] for name, bodies in lines.items()}


def _instruction(body: str, labels: dict[str, int]) -> Instruction:
    target = _TARGET.search(body) if body.startswith("BRA") else None
    return Instruction(body.split()[0].rstrip(";"), labels.get(target[1]) if target else None)


def loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """Return each loop, from where a branch goes back to up to the branch, without the loops in it.

    Also without the few multiply-adds that a branch in it leaves out: they are not part of every turn, as the sums of
    rows that the first column of tiles alone has.
    """
    ends = [(i.target, at) for at, i in enumerate(code) if i.target is not None and i.target <= at]
    skips = [(at + 1, i.target - 1) for at, i in enumerate(code) if i.target is not None and i.target > at]
    found = []
    for first, last in ends:
        out = [(a, b) for a, b in ends if (a, b) != (first, last) and first <= a and b <= last]
        most = _math(code[first : last + 1]) / 4
        out += [(a, b) for a, b in skips if first < a and b < last and 0 < _math(code[a : b + 1]) <= most]
        found.append([code[at] for at in range(first, last + 1) if not any(a <= at <= b for a, b in out)])
    return found


def _math(code: Sequence[Instruction]) -> int:
    return sum(i.name in ORDINARY or i.name in TENSOR for i in code)


@dataclass(frozen=True)
class Mix:
    """The instructions of one loop."""

    opcodes: Counter[str]  # with modifiers
    math_names: tuple[str, ...]  # those that count as multiply-adds: of tensor cores, if the kernel uses them

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
        return self.count(*self.math_names)

    @property
    def share(self) -> float:
        """Return which part of the loop multiply-adds are."""
        return self.math / self.total


def _is(opcode: str, name: str) -> bool:
    first, *modifiers = name.split(".")
    found, *others = opcode.split(".")
    return found == first and all(m in others for m in modifiers)


def main_loops(code: Sequence[Instruction]) -> list[Mix]:
    """Return the loops that a kernel spends its time in.

    NOP does not count: for processors whose units for a dtype are few it fills the time between multiply-adds. Main
    loops multiply and add what comes from shared memory: at least eight reads of it, which a loop over the rows of an
    epilogue has not, and at least half as many multiply-adds as any other such loop.
    """
    names = TENSOR if any(i.name in TENSOR for i in code) else ORDINARY
    mixes = [Mix(Counter(i.opcode for i in loop if i.name != "NOP"), names) for loop in loops(code)]
    mixes = [mix for mix in mixes if mix.math > 0 and mix.count("LDS", "LDSM") >= FEWEST_READS]
    most = max((mix.math for mix in mixes), default=0)
    return [mix for mix in mixes if 2 * mix.math >= most]

"""Makes the text of a program that fails shorter, as long as it fails in the same way."""

import time
from collections.abc import Callable

#: How long it may take, in seconds: less than a case may.
BUDGET = 20.0


def shortest(source: str, fails: Callable[[str], bool], seconds: float = BUDGET) -> str:
    """The text without all lines that it fails without.

    Args:
        source: of a program that fails.
        fails: whether a text fails in the same way. One that is no Python does not.
        seconds: that it may take.
    """
    until = time.monotonic() + seconds
    lines = source.splitlines()
    shrunk = True
    while shrunk:
        shrunk = False
        at = len(lines) - 1
        while at >= 0 and time.monotonic() < until:
            for candidate in (without(lines, at), unwrapped(lines, at)):
                if candidate != lines and fails("\n".join(candidate)):
                    lines, shrunk = candidate, True
                    break
            at = min(at - 1, len(lines) - 1)
    return "\n".join(line for line in lines if line)


def depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def block(lines: list[str], at: int) -> int:
    """Where the lines end that belong to a line: those after it that stand deeper."""
    end = at + 1
    while end < len(lines) and (not lines[end] or depth(lines[end]) > depth(lines[at])):
        end += 1
    return end


def without(lines: list[str], at: int) -> list[str]:
    return lines[:at] + lines[block(lines, at) :]


def unwrapped(lines: list[str], at: int) -> list[str]:
    """The lines of a block in place of the block."""
    inner = lines[at + 1 : block(lines, at)]
    if not inner or lines[at].lstrip().startswith(("def ", "class ")):
        return lines
    return [*lines[:at], *(line[4:] for line in inner), *lines[block(lines, at) :]]

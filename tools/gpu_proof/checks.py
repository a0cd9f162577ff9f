"""What gates find: one line for each thing that was checked."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Gate = Literal["compiled", "read", "sanitized", "executed", "as compiled", "linked"]


@dataclass(frozen=True)
class Check:
    """One thing that holds or does not."""

    gate: Gate
    family: str  # of kernels, or "" for the library as a whole
    dtype: str
    subject: str  # an architecture, a sanitizer, ...
    what: str  # which kernel, and what was found
    passed: bool


@dataclass
class Outcome:
    """All that a gate found, and the lines of its own table."""

    checks: list[Check] = field(default_factory=list)
    columns: Sequence[str] = ()
    lines: list[Sequence[str]] = field(default_factory=list)
    title: str = ""

    @property
    def failures(self) -> list[Check]:
        """Return what does not hold."""
        return [check for check in self.checks if not check.passed]


def kinds(outcomes: Iterable[Outcome]) -> list[tuple[str, str]]:
    """Return family and dtype of all that was checked, in order."""
    return sorted({(check.family, check.dtype) for outcome in outcomes for check in outcome.checks})

"""What `Captured.report` returns: what was recorded, and what became of it."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Self

from fastmlp.tape.lower import Lowered

__all__ = ["Report", "StepTime", "TapeReport"]

#: What a tape calls a step at which an optimizer steps.
_STOP = "stop"
#: Places of the program that a report tells the times of.
_SLOWEST = 10


@dataclass(frozen=True)
class StepTime:
    """What one step of a tape takes.

    Attributes:
        name: of the kernel of fastmlp or the operator of torch; "Adam.step()" of an optimizer.
        place: where the program called what it computes, or the first of it: file and line.
        microseconds: the least of the replays that were measured.
    """

    name: str
    place: str
    microseconds: float


@dataclass(frozen=True)
class TapeReport:
    """One tape.

    Attributes:
        operations: how often the function called each operator of torch that a replay calls, or others for it.
        calls: how many operators a replay calls.
        direct_calls: how many of them without torch's dispatcher, kernels of fastmlp among them.
        nodes: how many steps of a replay each kind of kernel of fastmlp computes.
        torch: how often a replay calls each operator of torch.
        views: how many recorded operations cost nothing, because memory is static.
        constants: how many were computed once.
        optimizers: for each optimizer's step its class, and "fastmlp" or "torch" for who computes it.
        arena_bytes: memory of intermediate results, shared by those that live at other times.
        own_bytes: memory of constants and gradients.
        times: of each step of a replay, in their order: None if they were not asked for, empty before a replay was
            measured.
    """

    operations: dict[str, int]
    calls: int
    direct_calls: int
    nodes: dict[str, int]
    torch: dict[str, int]
    views: int
    constants: int
    optimizers: list[tuple[str, str]]
    arena_bytes: int
    own_bytes: int
    times: tuple[StepTime, ...] | None = None

    @classmethod
    def of(cls, lowered: Lowered, profile: bool) -> Self:
        """The report of a tape, with times if `profile` is set."""
        steps = [(type(optimizer).__name__, "torch" if rule < 0 else "fastmlp") for optimizer, _, rule in lowered.stops]
        counts, tape = lowered.counts, lowered.tape
        called = Counter(name for name, *_ in tape.times() if name not in ("", _STOP))
        return cls(
            dict(sorted(lowered.operations.items(), key=lambda item: -item[1])),
            tape.calls,
            tape.direct_calls,
            {name: n for name, n in called.most_common() if "::" not in name},
            {name: n for name, n in called.most_common() if "::" in name},
            counts["views"],
            counts["constants"],
            steps,
            tape.arena_bytes,
            tape.own_bytes,
            _times_of(lowered) if profile else None,
        )

    def __str__(self) -> str:
        steps = ", ".join(f"{name}.step() by {who}" for name, who in self.optimizers) or "none"
        lines = [
            f"{self.calls} operations are called, {self.direct_calls} of them directly; {self.views} views cost "
            f"nothing, {self.constants} constants",
            f"by fastmlp: {_counted(self.nodes)}; by torch: {_counted(self.torch)}",
            f"optimizers: {steps}",
            f"memory: {self.arena_bytes:,} bytes of intermediate results, "
            f"{self.own_bytes:,} of gradients and constants",
            f"operations: {_counted(self.operations)}",
        ]
        return "\n".join(lines + self._time_lines())

    def _time_lines(self) -> list[str]:
        if self.times is None:
            return []
        if not self.times:
            return ["time: not known yet, one replay in 64 is measured"]
        total = sum(step.microseconds for step in self.times)
        kinds, places = defaultdict[str, float](float), defaultdict[str, float](float)
        for step in self.times:
            kinds[_short(step.name)] += step.microseconds
            places[f"{_short(step.name)}, {step.place}"] += step.microseconds
        shares = ", ".join(f"{kind} {time / total:.0%}" for kind, time in _descending(kinds))
        slowest = [f"  {time / total:4.0%}  {place}" for place, time in _descending(places)[:_SLOWEST]]
        return [f"time: {total:.0f} us in the steps of a replay: {shares}", *slowest]


def _descending(times: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(times.items(), key=lambda item: -item[1])


def _times_of(lowered: Lowered) -> tuple[StepTime, ...]:
    stops, times = iter(lowered.stops), []
    for name, place, nanoseconds in lowered.tape.times():
        if name == _STOP:
            name = f"{type(next(stops)[0]).__name__}.step()"
        if name and nanoseconds >= 0:
            times.append(StepTime(name, place, nanoseconds / 1e3))
    return tuple(times)


def _short(name: str) -> str:
    return name.removeprefix("aten::")


def _counted(names: dict[str, int]) -> str:
    return ", ".join(f"{_short(name)} {n}" for name, n in names.items()) or "none"


@dataclass(frozen=True)
class Report:
    """All tapes of a captured function."""

    name: str
    calls: int
    replays: int
    tapes: list[TapeReport]

    def line(self) -> str:
        """The report in a line."""
        n = len(self.tapes)
        return f"captured({self.name}): {n} tape{'s' * (n != 1)}, {self.replays} of {self.calls} calls replayed"

    def __str__(self) -> str:
        lines = [self.line()]
        for i, tape in enumerate(self.tapes):
            lines += [f"tape {i}:", *(f"  {line}" for line in str(tape).splitlines())]
        return "\n".join(lines)

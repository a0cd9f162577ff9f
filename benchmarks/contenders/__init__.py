"""Who takes part. To add one: a subclass of `Contender` in `CONTENDERS`, or of `Trainer` in `TRAINERS`."""

from functools import cache
from importlib.metadata import packages_distributions, version

from benchmarks.contenders.base import Contender, Participant, Refused
from benchmarks.contenders.numerical import Jax, ScikitLearn
from benchmarks.contenders.pytorch import Compiled, Eager, Fastmlp, FastmlpOptim, Frozen, OneDnn, TrainStep
from benchmarks.contenders.runtimes import OnnxRuntime, OpenVino
from benchmarks.contenders.training import (
    Captured,
    CapturedUnfused,
    CompiledBackward,
    CompiledMost,
    CompiledStep,
    EagerFused,
    EagerTrainer,
    JaxTrainer,
    Trainer,
)
from benchmarks.workloads import Training, Workload

__all__ = [
    "CONTENDERS",
    "NAMES",
    "OURS",
    "OWN",
    "TRAINERS",
    "YARDSTICK",
    "Contender",
    "Refused",
    "Trainer",
    "absent",
    "contenders",
    "trainers",
    "versions",
]

#: Eager, the yardstick, first, then ours; all others are optional.
CONTENDERS: tuple[type[Contender], ...] = (
    Eager,
    Fastmlp,
    FastmlpOptim,
    TrainStep,
    Frozen,
    Compiled,
    OneDnn,
    OnnxRuntime,
    OpenVino,
    Jax,
    ScikitLearn,
)
YARDSTICK, OURS = Eager.name, Fastmlp.name

#: The same for programs: eager first.
TRAINERS: tuple[type[Trainer], ...] = (
    EagerTrainer,
    Captured,
    CapturedUnfused,
    EagerFused,
    CompiledStep,
    CompiledMost,
    CompiledBackward,
    JaxTrainer,
)

_ALL: tuple[type[Participant], ...] = (*CONTENDERS, *TRAINERS)

#: Of all, in their order.
NAMES = tuple(dict.fromkeys(kind.name for kind in _ALL))

#: All of our ways, of which `OURS` takes every workload that is not a program.
OWN = tuple(dict.fromkeys(kind.name for kind in _ALL if kind.ours))


def contenders(workload: Workload) -> list[type[Contender]]:
    """Return those that run a workload and whose packages are installed."""
    return [c for c in CONTENDERS if c.takes(workload) and not c.missing()]


def trainers(training: Training) -> list[type[Trainer]]:
    """Return those that run a program's step and whose packages are installed."""
    return [kind for kind in TRAINERS if not kind.missing() and kind.takes(training)]


def absent() -> list[str]:
    """Return a line for each contender that is left out since a package is not installed."""
    lines = [f"without {c.name}: {', '.join(c.missing())} not installed" for c in _ALL if c.missing()]
    return list(dict.fromkeys(lines))


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that the contenders need, where installed."""
    distributions = packages_distributions()
    names = {name for c in _ALL for package in c.packages for name in distributions.get(package, ())}
    return {name: version(name) for name in sorted(names)}

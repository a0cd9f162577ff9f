"""Who takes part. To add a contender: one subclass of `Contender`, and its name in `CONTENDERS`."""

from functools import cache
from importlib.metadata import packages_distributions, version

from benchmarks.contenders.base import Contender
from benchmarks.contenders.numerical import Jax, ScikitLearn
from benchmarks.contenders.pytorch import Compiled, Eager, Fastmlp, FastmlpOptim, Frozen, OneDnn, TrainStep
from benchmarks.contenders.runtimes import OnnxRuntime, OpenVino
from benchmarks.workloads import Workload

__all__ = ["CONTENDERS", "OURS", "OWN", "YARDSTICK", "Contender", "absent", "contenders", "versions"]

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

#: All of our ways, of which `OURS` takes every workload.
OWN = tuple(c.name for c in CONTENDERS if c.ours)


def contenders(workload: Workload) -> list[type[Contender]]:
    """Return those that run a workload and whose packages are installed."""
    return [c for c in CONTENDERS if c.takes(workload) and not c.missing()]


def absent() -> list[str]:
    """Return a line for each contender that is left out since a package is not installed."""
    return [f"without {c.name}: {', '.join(c.missing())} not installed" for c in CONTENDERS if c.missing()]


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that the contenders need, where installed."""
    distributions = packages_distributions()
    names = {name for c in CONTENDERS for package in c.packages for name in distributions.get(package, ())}
    return {name: version(name) for name in sorted(names)}

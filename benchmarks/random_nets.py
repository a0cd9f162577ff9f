"""Networks of random widths, with ReLU between their layers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any, Literal

import torch

from benchmarks.check import verify
from benchmarks.contenders.pytorch import Eager, Fastmlp
from benchmarks.random_cases import MOST, Drawn, Subject, log_uniform
from benchmarks.random_layers import LARGEST
from benchmarks.workloads import Net, Tier, Workload
from fastmlp.benchmark.machine import dtype_name

WIDEST, DEEPEST = 1024, 5


@dataclass(frozen=True)
class NetCase(Drawn):
    """A network and a batch.

    Attributes:
        rows: of the input.
        widths: features of the input and of each layer.
        dtype: by name.
        backward: whether the gradients of the parameters are computed too.
    """

    rows: int
    widths: tuple[int, ...]
    dtype: str
    backward: bool

    @property
    def workload(self) -> Workload:
        """The same as the other benchmarks have it."""
        net = Net("-".join(map(str, self.widths)), self.widths)
        task: Literal["forward_backward", "infer"] = "forward_backward" if self.backward else "infer"
        return Workload("nets", net, self.rows, task, Tier.FULL, dtype=getattr(torch, self.dtype))

    def __str__(self) -> str:
        return f"{self.workload.name} {self.dtype}"

    def prepare(self) -> "Networks":
        return Networks(self)


def draw_nets(count: int, seed: int, dtypes: Sequence[torch.dtype] = tuple(MOST)) -> Iterator[NetCase]:
    """Yield random networks, the same for the same seed.

    Args:
        count: how many.
        seed: of the random numbers.
        dtypes: of which each has one.

    Example:
        >>> max(len(case.widths) for case in draw_nets(100, seed=0)) <= DEEPEST + 1
        True
    """
    random = Random(seed)
    while count:
        dtype, rows = random.choice(dtypes), log_uniform(random, LARGEST)
        widths = tuple(log_uniform(random, WIDEST) for _ in range(random.randint(2, DEEPEST + 1)))
        backward = random.random() < 0.5
        if rows * sum(a * b for a, b in pairwise(widths)) <= MOST[dtype]:
            count -= 1
            yield NetCase(rows, widths, dtype_name(dtype), backward)


class Networks(Subject):
    """A network as the other benchmarks build it."""

    case: NetCase

    def __init__(self, case: NetCase) -> None:
        self.case = case
        self._eager, self._ours = Eager(case.workload).call, Fastmlp(case.workload).call

    def eager(self) -> Any:
        return self._eager()

    def ours(self) -> Any:
        return self._ours()

    def verify(self) -> None:
        verify(Fastmlp(self.case.workload))

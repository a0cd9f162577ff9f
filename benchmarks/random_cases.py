"""What a random case is, whether a layer or a network: how it is drawn, checked and timed."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import log
from random import Random
from statistics import median, quantiles
from typing import Any

import torch

import fastmlp
from fastmlp.benchmark.timing import Effort, race

#: The most multiplications of a forward pass.
MOST = {torch.float32: 1 << 30, torch.float64: 1 << 30, torch.bfloat16: 1 << 30, torch.float16: 1 << 27}


class Drawn(ABC):
    """What is drawn: a layer or a network, and a batch.

    Attributes:
        rows: of the input.
        dtype: by name.
        backward: whether gradients are computed too.
    """

    rows: int
    dtype: str
    backward: bool

    @abstractmethod
    def prepare(self) -> "Subject":
        """Make its data, and both ways to compute it."""


@dataclass(frozen=True)
class Result:
    """A case and our speed on it.

    Attributes:
        case: what was computed.
        isa: whose kernels computed it.
        speedup: median over the rounds of eager's time divided by ours.
        low: first quartile of the same.
        high: third quartile of the same.
        eager_us: eager's time.
        obstacle: what keeps the case from our kernels; None if they compute it.
    """

    case: Drawn
    isa: str
    speedup: float
    low: float
    high: float
    eager_us: float
    obstacle: str | None


def log_uniform(random: Random, most: int) -> int:
    """A number from 1 to `most`, each power of two as likely as the next."""
    return round(2 ** random.uniform(0, log(most, 2)))


class Subject(ABC):
    """Both ways to compute a case, on the same data.

    Attributes:
        case: what is computed.
    """

    case: Drawn

    @abstractmethod
    def eager(self) -> Any:
        """Compute it with PyTorch's own modules."""

    @abstractmethod
    def ours(self) -> Any:
        """Compute it with fastmlp."""

    @abstractmethod
    def verify(self) -> None:
        """Compare ours with float64.

        Raises:
            AssertionError: if a result is farther from the expected one than rounding explains.
        """

    @property
    def obstacle(self) -> str | None:
        """What keeps the case from our kernels; None if they compute it."""
        return None

    def time(self, effort: Effort) -> Result:
        """Time both ways, round by round."""
        samples = race({"eager": self.eager, "ours": self.ours}, effort)
        ratios = [eager / ours for eager, ours in zip(samples["eager"], samples["ours"], strict=True)]
        low, speedup, high = quantiles(ratios, n=4, method="inclusive")
        microseconds = median(samples["eager"]) * 1e6
        return Result(self.case, fastmlp.get_isa(), speedup, low, high, microseconds, self.obstacle)

"""Layers of random shapes, dtypes, layouts and activations."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import fastmlp
from benchmarks.check import SPREAD, Estimate, compare, unit
from benchmarks.random_cases import MOST, Drawn, Subject, log_uniform
from fastmlp import _C
from fastmlp.activations import DEFAULTS, Activation, module_of
from fastmlp.benchmark.machine import dtype_name

#: "row-major", its transpose, or every second element of a larger matrix's rows.
Storage = Literal["row-major", "transposed", "strided"]

LARGEST = 4096

#: Units of the last place that an activation or its derivative, evaluated on the data, may lose.
ULPS = 8


@dataclass(frozen=True)
class Case(Drawn):
    """A layer and a batch.

    Attributes:
        rows: M, of the input.
        columns: N, features of the output.
        depth: K, features of the input.
        dtype: by name.
        input: how it is stored.
        weight: how it is stored.
        activation: by name.
        backward: whether the gradients of input, weight and bias are computed too.
    """

    rows: int
    columns: int
    depth: int
    dtype: str
    input: Storage
    weight: Storage
    activation: str
    backward: bool

    def __str__(self) -> str:
        task = "forward_backward" if self.backward else "infer"
        return (
            f"{self.rows}x{self.columns}x{self.depth} {self.dtype} {self.input}/{self.weight} {self.activation} {task}"
        )

    def prepare(self) -> "Layers":
        return Layers(self)


def draw(count: int, seed: int, dtypes: Sequence[torch.dtype] = tuple(MOST)) -> Iterator[Case]:
    """Yield random layers, the same for the same seed.

    Args:
        count: how many.
        seed: of the random numbers.
        dtypes: of which each has one.

    Example:
        >>> max(case.rows for case in draw(100, seed=0)) <= LARGEST
        True
    """
    random = Random(seed)
    stores: tuple[Storage, ...] = ("row-major", "transposed", "strided")

    while count:
        dtype, (rows, columns, depth) = random.choice(dtypes), (log_uniform(random, LARGEST) for _ in range(3))
        rest = (random.choice(stores), random.choice(stores), random.choice(list(DEFAULTS)), random.random() < 0.5)
        if rows * columns * depth <= MOST[dtype]:
            count -= 1
            yield Case(rows, columns, depth, dtype_name(dtype), *rest)


class Layers(Subject):
    """A layer by `functional.linear`, of operands that may be stored in any way."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(1)

        def make(rows: int, columns: int, storage: Storage) -> Tensor:
            if storage == "transposed":
                return make(columns, rows, "row-major").T
            if storage == "strided":
                return make(rows, 2 * columns, "row-major")[:, ::2]
            return torch.randn(rows, columns, generator=generator).to(getattr(torch, case.dtype))

        self.case = case
        self.input = make(case.rows, case.depth, case.input)
        self.weight = make(case.columns, case.depth, case.weight).mul_(case.depth**-0.5)
        self.bias = make(1, case.columns, "row-major")[0]
        self.grad = make(case.rows, case.columns, "row-major")
        self.backward = case.backward
        self.activation = Activation(case.activation)
        self.module = module_of(self.activation)
        self.leaves = (self.input, self.weight, self.bias)
        for leaf in self.leaves:
            leaf.requires_grad_(case.backward)

    def eager(self) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(self.backward):
            return self._finish(self.module(F.linear(*self.leaves)))

    def ours(self) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(self.backward):
            return self._finish(fastmlp.functional.linear(*self.leaves, self.activation))

    def _finish(self, output: Tensor) -> tuple[Tensor, ...]:
        return (output, *torch.autograd.grad(output, self.leaves, self.grad)) if self.backward else (output,)

    def verify(self) -> None:
        """Compare ours with float64.

        Raises:
            AssertionError: if a result is farther from the expected one than rounding explains.
        """
        names = ("output", "gradient of input", "gradient of weight", "gradient of bias")
        pairs = zip(self._expected(), self.ours(), strict=True)
        for name, (estimate, found) in zip(names, pairs, strict=False):
            compare(found, estimate, f"{name} of {self.case}")

    @property
    def obstacle(self) -> str | None:
        return _C.obstacle(self.input, (self.weight, self.bias))

    def _expected(self) -> Iterator[Estimate]:
        input, weight, grad = map(Estimate.exact, (self.input, self.weight, self.grad))
        ones = torch.ones(len(self.input), 1, dtype=torch.float64)
        dtype = self.input.dtype
        augmented = Estimate.exact(torch.column_stack((self.weight.detach(), self.bias.detach())))
        # The bias is one more column of the weight, for which the input has a column of ones.
        columns = Estimate.exact(torch.column_stack((input.value, ones)))._replace(dtype=dtype)
        # PyTorch stores what the activation takes.
        total = (columns @ augmented.T).stored()
        yield self._through(total, self.module).stored()
        if not self.backward:
            return

        def slope(at: Tensor) -> Tensor:
            with torch.enable_grad():
                leaf = at.clone().requires_grad_()
                return torch.autograd.grad(self.module(leaf).sum(), leaf)[0]

        derivative = self._through(total, slope)
        # It may follow from the output as stored, as 1 - y**2 of tanh does, and is then off by twice that.
        error = grad.value.abs() * (derivative.error + 2 * unit(dtype) * (1 + derivative.value.abs()))
        inner = Estimate(grad.value * derivative.value, SPREAD * error, dtype).stored(SPREAD)
        yield (inner @ weight).stored()
        both = (inner.T @ columns).stored()
        yield Estimate(both.value[:, :-1], both.error[:, :-1], dtype)
        yield Estimate(both.value[:, -1], both.error[:, -1], dtype)

    def _through(self, argument: Estimate, function: Callable[[Tensor], Tensor]) -> Estimate:
        """Apply a function element by element: it may be off as much as it changes over its argument's error."""
        value, error, dtype = argument
        result = function(value)
        change = torch.zeros_like(result)
        for part in (-1, -0.5, 0.5, 1):
            change = torch.maximum(change, (function(value + part * error) - result).abs())
        computed = unit(torch.float64 if dtype is torch.float64 else torch.float32)
        own = ULPS * computed * (1 + result.abs() + value.abs())
        return Estimate(result, change + own, dtype)

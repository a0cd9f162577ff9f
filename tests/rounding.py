"""How far rounding may take what a model computes, found by running the model.

A converted model differs from the one that it was made of in its products, sums and activations only: all else,
losses and optimizers among it, is the same code. So the unconverted model is run again with each of those results
moved by as much as rounding may move it, in directions drawn at random, forward, backward and through every
step. How far that moves a result is how far rounding may. There are no tolerances to tune.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.bounds import ULPS, gamma

#: Runs with directions of their own. The largest change counts, in each tensor.
PROBES = 5

Results = Mapping[str, Tensor]


class Rounding(TorchDispatchMode):
    """Moves the results of operations by bounds on their errors, those of `tests/bounds.py`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        error = ERRORS.get(func)
        if error is None or not output.is_floating_point():
            return output
        sign = torch.randint(0, 2, output.shape, generator=self.generator) * 2 - 1
        return output + sign * error(output, *args)


def _product(output: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return gamma(a.shape[1] + 1, output.dtype) * (a.abs() @ b.abs())


def _product_and_bias(output: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return gamma(a.shape[1] + 2, output.dtype) * (a.abs() @ b.abs() + bias.abs())


def _column_sums(output: Tensor, x: Tensor, dim: Sequence[int], keepdim: bool = False) -> Tensor:
    return gamma(x.numel() // max(output.numel(), 1), output.dtype) * x.abs().sum(list(dim), keepdim)


def _relative(output: Tensor, *args: Any) -> Tensor:
    return ULPS * torch.finfo(output.dtype).eps * output.abs()


def _relative_to_the_first(output: Tensor, x: Tensor, *args: Any) -> Tensor:
    """Of derivatives times gradients, and of GELU, which passes errors of its argument on."""
    return ULPS * torch.finfo(output.dtype).eps * x.abs()


_aten = torch.ops.aten

ERRORS: Mapping[Any, Callable[..., Tensor]] = {
    _aten.mm.default: _product,
    _aten.addmm.default: _product_and_bias,
    _aten.sum.dim_IntList: _column_sums,
    _aten.tanh.default: _relative,
    _aten.gelu.default: _relative_to_the_first,
    _aten.tanh_backward.default: _relative_to_the_first,
    _aten.gelu_backward.default: _relative_to_the_first,
    # Second derivatives are made of these.
    _aten.mul.Tensor: _relative,
}


def rounding_bounds(run: Callable[[], Results], found: Results) -> dict[str, Tensor]:
    """How far apart two implementations of a computation may be, for each of its results.

    Args:
        run: computes them afresh.
        found: what it computes when nothing is moved.

    Returns:
        A number for each, the largest that an entry may differ by. Both sides may err, so it is twice the largest
        change that was seen.
    """
    bounds = {name: torch.zeros((), dtype=torch.float64) for name in found}
    for seed in range(PROBES):
        with Rounding(seed):
            moved = run()
        for name, value in found.items():
            bounds[name] = torch.maximum(bounds[name], 2 * distance(moved[name], value))
    return bounds


def distance(a: Tensor, b: Tensor) -> Tensor:
    """The largest difference of two entries; NaN if there is one."""
    return (a.double() - b.double()).abs().max()

"""Derivatives by value: what the library and torch compute for one function, side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import grad

from fastmlp import Activation, functional, reference


class Case:
    """A network's tensors in float64, and the same function by the library and by the specification."""

    def __init__(self, widths: Sequence[int], acts: Sequence[Activation], bias: Sequence[bool], rows: int = 3) -> None:
        self.acts, self.bias = list(acts), list(bias)
        self.input = torch.randn(rows, widths[0], dtype=torch.float64, requires_grad=True)
        self.parameters: list[Tensor] = []
        for k, n, has_bias in zip(widths[:-1], widths[1:], bias, strict=True):
            self.parameters.append(torch.randn(n, k, dtype=torch.float64).div_(k**0.5).requires_grad_())
            if has_bias:
                self.parameters.append(torch.randn(n, dtype=torch.float64, requires_grad=True))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.input, *self.parameters)

    def split(self, parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        flat = iter(parameters)
        pairs = [(next(flat), next(flat) if b else None) for b in self.bias]
        return [p[0] for p in pairs], [p[1] for p in pairs]

    def ours(self, input: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = self.split(parameters)
        return functional.mlp(input, weights, biases, self.acts)

    def torchs(self, input: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = self.split(parameters)
        return reference.mlp(input, weights, biases, [(a.name, a.parameters) for a in self.acts])


def assert_same(ours: Sequence[Tensor | None], torchs: Sequence[Tensor | None]) -> None:
    """Equal to rounding: 1e3 units in the last place of the largest value (float64)."""
    for a, b in zip(ours, torchs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.shape == b.shape
            scale = 1 + b.abs().max() if b.numel() else torch.ones(())
            assert bool(((a - b).abs() <= 1e3 * torch.finfo(a.dtype).eps * scale).all()), (a - b).abs().max()


def subsets(case: Case, masks: Sequence[Sequence[bool]]) -> None:
    """Compares first and second derivatives while only the tensors that a mask names require a gradient."""
    for mask in masks:
        if not any(mask):
            continue
        for tensor, wanted in zip(case.tensors, mask, strict=True):
            tensor.requires_grad_(wanted)
        wanted_tensors = [t for t in case.tensors if t.requires_grad]
        first = [
            grad(f(*case.tensors).pow(3).sum(), wanted_tensors, create_graph=True) for f in (case.ours, case.torchs)
        ]
        assert_same(*first)
        second = [grad(sum(g.pow(2).sum() for g in gs), wanted_tensors, allow_unused=True) for gs in first]  # type: ignore[arg-type]
        assert_same(*second)


def derivatives(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """The output, and the gradients of the input and of every parameter."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    wanted = [x, *model.parameters()]
    return [y, *torch.autograd.grad((y * weights).sum(), wanted, allow_unused=True)]

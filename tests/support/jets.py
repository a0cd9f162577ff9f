"""Derivatives of networks along their input: by nested calls of torch's autograd, and with bounds.

The bounds follow the formulas of csrc/contract/derivatives.h step by step, in the manner of `tests.support.bounds`.
Each sum and product carries the uncertainty of its operands along and adds its own rounding. An activation's
derivatives may change as much as they do over the uncertainty of their argument, which is sampled, and evaluating one
may err by `ULPS` units in the last place of its largest value.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fastmlp import Activation, reference
from tests.support.bounds import (
    ULPS,
    Bounded,
    activate,
    assert_within,
    column_sums,
    gamma,
    largest_change,
    multiplied,
    product,
)

#: Pairs of places in a list of axes, whose second derivatives are added up.
Sums = Sequence[Sequence[tuple[int, int]]]


def nested(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[Activation],
    axes: Sequence[int],
    sums: Sequence[Sequence[tuple[int, int]]],
) -> list[Tensor]:
    """Components of all rows, each (rows, out_features), by `torch.autograd.grad`: differentiable, if the input is.

    Pairs of `sums` are places in `axes`.
    """
    x = input if input.requires_grad else input.detach().requires_grad_()
    y = reference.mlp(x, weights, biases, [(a.name, a.parameters) for a in activations])
    first: list[list[Tensor]] = [[] for _ in axes]
    second: list[list[Tensor]] = [[] for _ in sums]
    for column in y.unbind(1):
        (slopes,) = torch.autograd.grad(column.sum(), x, create_graph=True, materialize_grads=True)
        for i, axis in enumerate(axes):
            first[i].append(slopes[:, axis])
        bends = [_gradient(slopes[:, axis].sum(), x) for axis in axes]
        for s, pairs in enumerate(sums):
            second[s].append(torch.stack([bends[i][:, axes[j]] for i, j in pairs]).sum(0))
    return [y, *[torch.stack(columns, 1) if columns else 0 * y for columns in (*first, *second)]]


def _gradient(y: Tensor, x: Tensor) -> Tensor:
    if not y.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(y, x, create_graph=True, materialize_grads=True)[0]


def expand(z: Tensor, act: Activation) -> list[Tensor]:
    """The value and three derivatives of an activation, by torch's autograd."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        found = [activate(leaf, act)]
        for _ in range(3):
            found.append(_gradient(found[-1].sum(), leaf))
    return [tensor.detach() for tensor in found]


@cache
def largest(act: Activation) -> list[float]:
    """The largest magnitudes of the derivatives on an interval outside of which they hardly change."""
    points = torch.linspace(-20, 20, 8001, dtype=torch.float64)
    return [tensor.abs().max().item() for tensor in expand(points, act)[1:]]


def expanded(z: Bounded, act: Activation, dtype: torch.dtype) -> list[Bounded]:
    """The value and three derivatives with bounds."""
    z = multiplied(z, act, dtype)
    eps, most = torch.finfo(dtype).eps, largest(act)
    parts = z.value.new_tensor([-1, -0.5, 0.5, 1]).view(-1, *[1] * z.value.dim())
    curves = expand(torch.cat([z.value[None], z.value + parts * z.error]), act)
    scales = [curves[0][0].abs() + z.value.abs() * curves[1][0].abs(), *map(torch.tensor, most)]
    # As in bounds.activated: torch's formulas in float64 cancel as well.
    own = torch.finfo(torch.float64).eps * (1 + z.value.abs()) * (1 + max(most))
    return [
        Bounded(curve[0], largest_change(curve) + ULPS * (eps * scale + own) + torch.finfo(dtype).tiny)
        for curve, scale in zip(curves, scales, strict=True)
    ]


def times(a: Bounded, b: Bounded, dtype: torch.dtype) -> Bounded:
    value = a.value * b.value
    carried = a.value.abs() * b.error + b.value.abs() * a.error + a.error * b.error
    return Bounded(value, carried + gamma(1, dtype) * (value.abs() + carried) + torch.finfo(dtype).tiny)


def plus(dtype: torch.dtype, *terms: Bounded) -> Bounded:
    """A sum in any order."""
    carried = torch.stack([term.error for term in terms]).sum(0)
    magnitude = torch.stack([term.value.abs() for term in terms]).sum(0) + carried
    return Bounded(torch.stack([term.value for term in terms]).sum(0), carried + gamma(len(terms), dtype) * magnitude)


class Jets:
    """What a network computes forward and backward, with bounds, for two-dimensional tensors of one dtype."""

    def __init__(
        self,
        input: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        activations: Sequence[Activation],
        axes: Sequence[int],
        sums: Sums,
    ) -> None:
        self.dtype, self.sums, self.firsts = input.dtype, sums, len(axes)
        self.weights, self.biases, self.activations = weights, biases, activations
        seeds = [torch.zeros_like(input) for _ in (*axes, *sums)]
        for seed, axis in zip(seeds, axes, strict=False):
            seed[:, axis] = 1
        #: Of each layer, and at the end of the network, all components.
        self.inputs = [[Bounded.exact(x) for x in (input, *seeds)]]
        self.before: list[list[Bounded]] = []
        self.slopes: list[list[Bounded]] = []
        for weight, bias, act in zip(weights, biases, activations, strict=True):
            by = Bounded.exact(weight.t())
            z = [product(h, by, self.dtype) for h in self.inputs[-1]]
            if bias is not None:
                z[0] = product(self.inputs[-1][0], by, self.dtype, bias.detach().double())
            self.before.append(z)
            self.slopes.append(expanded(z[0], act, self.dtype))
            self.inputs.append(z if act.name == "identity" else self._through(z, *self.slopes[-1][:3]))

    def _through(self, z: list[Bounded], value: Bounded, slope: Bounded, bend: Bounded) -> list[Bounded]:
        first = [times(slope, x, self.dtype) for x in z[1 : 1 + self.firsts]]
        second = []
        for s, pairs in enumerate(self.sums):
            squares = self._squares(z, pairs)
            straight = times(slope, z[1 + self.firsts + s], self.dtype)
            second.append(plus(self.dtype, times(bend, squares, self.dtype), straight))
        return [value, *first, *second]

    def _squares(self, z: list[Bounded], pairs: Sequence[tuple[int, int]]) -> Bounded:
        return plus(self.dtype, *[times(z[1 + i], z[1 + j], self.dtype) for i, j in pairs])

    @property
    def outputs(self) -> list[Bounded]:
        return self.inputs[-1]

    def gradients(self, grads: Sequence[Tensor]) -> list[Bounded]:
        """Of the input, and of weight and bias of each layer, from those of all components."""
        g = [Bounded.exact(grad) for grad in grads]
        found: list[Bounded] = []
        for layer in reversed(range(len(self.weights))):
            if self.activations[layer].name != "identity":
                g = self._back(g, self.before[layer], self.slopes[layer])
            if self.biases[layer] is not None:
                found.append(column_sums(g[0], self.dtype))
            h = self.inputs[layer]
            stacked = [Bounded(torch.cat([x.value for x in xs]), torch.cat([x.error for x in xs])) for xs in (g, h)]
            transposed = Bounded(stacked[0].value.t(), stacked[0].error.t())
            found.append(product(transposed, stacked[1], self.dtype))
            g = [product(x, Bounded.exact(self.weights[layer]), self.dtype) for x in g]
        return [g[0], *reversed(found)]

    def _back(self, g: list[Bounded], z: list[Bounded], slopes: list[Bounded]) -> list[Bounded]:
        def by(a: Bounded, b: Bounded) -> Bounded:
            return times(a, b, self.dtype)

        _, slope, bend, twist = slopes
        second = 1 + self.firsts
        by_bend = [by(g[c], z[c]) for c in range(1, len(g))]
        by_twist = [by(g[second + s], self._squares(z, pairs)) for s, pairs in enumerate(self.sums)]
        terms: list[list[Bounded]] = [[by(slope, grad)] for grad in g]
        if by_bend:
            terms[0].append(by(bend, plus(self.dtype, *by_bend)))
        if by_twist:
            terms[0].append(by(twist, plus(self.dtype, *by_twist)))
        for s, pairs in enumerate(self.sums):
            scaled = by(bend, g[second + s])
            for i, j in pairs:
                terms[1 + i].append(by(scaled, z[1 + j]))
                terms[1 + j].append(by(scaled, z[1 + i]))
        return [plus(self.dtype, *parts) for parts in terms]


def assert_all_within(found: Sequence[Tensor], exact: Sequence[Tensor], bounds: Sequence[Bounded], what: str) -> None:
    """Each within the bound around what nested calls of autograd gave in double precision."""
    for i, (tensor, value, bound) in enumerate(zip(found, exact, bounds, strict=True)):
        assert value.dtype == torch.float64
        assert_within(tensor.detach(), Bounded(value.detach(), bound.error), f"{what} {i}")

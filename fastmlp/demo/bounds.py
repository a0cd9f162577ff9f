"""What rounding may do to one step of the demo in float64: a running error analysis.

Forward and backward are computed once more, each number with a bound on its error. Exact are the batch and the
parameters; a sum of n products gets n roundings in whatever order it is formed, so the bound holds for any blocking,
SIMD width and use of FMA; activations pass errors on by their slope and add their own; the losses do as they say.
tanh and sigmoid are trusted to 4 units in the last place. Two implementations each stay within the bound, so they
differ by at most twice as much. (The bounds are computed in float64 as well, which puts them wrong in about the 14th
digit.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["output_bounds", "rounding_bounds", "update_bounds"]


def gamma(roundings: int) -> float:
    """The largest relative error of so many roundings in a row (Higham 2002, section 3.1)."""
    unit = 2.0**-53
    return roundings * unit / (1 - roundings * unit)


@dataclass(frozen=True)
class Rounded:
    """Computed numbers, and bounds on their distances from the exact ones."""

    value: Tensor
    error: Tensor

    def __matmul__(self, other: "Rounded") -> "Rounded":
        """Sums of n products, in any order: n roundings at most to each of them."""
        a, b = self.value.abs(), other.value.abs()
        error = (gamma(a.shape[1]) * a + self.error) @ b + (a + self.error) @ other.error
        return Rounded(self.value @ other.value, error)

    def __mul__(self, other: "Rounded") -> "Rounded":
        """Elementwise, with one rounding."""
        a, b = self.value.abs(), other.value.abs()
        error = gamma(1) * a * b + self.error * b + (a + self.error) * other.error
        return Rounded(self.value * other.value, error)

    def t(self) -> "Rounded":
        """The transposed matrix."""
        return Rounded(self.value.t(), self.error.t())


def exact(value: Tensor) -> Rounded:
    """Numbers that are what they should be: the data, and the parameters that a step starts from."""
    return Rounded(value, torch.zeros_like(value))


def with_ones(x: Rounded) -> Rounded:
    """A column of ones, so that the bias is one more weight."""
    return Rounded(F.pad(x.value, (0, 1), value=1.0), F.pad(x.error, (0, 1)))


def relu(z: Rounded) -> tuple[Rounded, Rounded]:
    """The activation and its slope, which is open between 0 and 1 where the sign of z is uncertain."""
    uncertain = z.value.abs() <= z.error
    return Rounded(z.value.relu(), z.error), Rounded((z.value > 0).double(), uncertain.double())


def tanh(z: Rounded) -> tuple[Rounded, Rounded]:
    """The activation and its slope 1 - h^2; 4 units in the last place are 8 roundings."""
    h = z.value.tanh()
    error = z.error + gamma(8) * h.abs()
    return Rounded(h, error), Rounded(1 - h * h, (2 * h.abs() + error) * error + gamma(2))


def sigmoid(z: Rounded) -> tuple[Rounded, Rounded]:
    """The activation, nowhere steeper than 1/4, and its slope h (1 - h)."""
    h = z.value.sigmoid()
    error = z.error / 4 + gamma(8) * h
    slope = h * (1 - h)
    return Rounded(h, error), Rounded(slope, (1 + error) * error + gamma(3) * slope)


def cross_entropy(logits: Rounded, y: Tensor) -> tuple[Rounded, Rounded]:
    """The mean loss and its gradient.

    The logarithm of a softmax moves by at most twice what the logits move by. Its evaluation errs
    by `spread` (the largest difference of two logits) for each of three roundings of the differences
    and exponents, and by the sum over classes and the logarithm of at most `classes`.
    """
    rows, classes = logits.value.shape
    spread = logits.value.amax(1, keepdim=True) - logits.value.amin(1, keepdim=True)
    error = 2 * logits.error.amax(1, keepdim=True) + gamma(2 * classes + 8) * (1 + spread)
    loss = F.cross_entropy(logits.value, y)
    softmax, target = logits.value.softmax(1), F.one_hot(y, classes)
    gradient_error = softmax * (error + gamma(8)) + gamma(3) * (softmax + target)
    gradient = Rounded((softmax - target) / rows, gradient_error / rows)
    return Rounded(loss, error.mean() + gamma(rows) * loss), gradient


def mean_squared_error(output: Rounded, y: Tensor) -> tuple[Rounded, Rounded]:
    """The mean loss and its gradient."""
    n = y.numel()
    residual = output.value - y
    error = output.error + gamma(1) * residual.abs()
    loss = residual.square().mean()
    loss_error = ((2 * residual.abs() + error) * error).mean() + gamma(n + 2) * loss
    gradient = Rounded(2 * residual / n, 2 * error / n + gamma(3) * 2 * residual.abs() / n)
    return Rounded(loss, loss_error), gradient


ACTIVATIONS = {"relu": relu, "tanh": tanh, "sigmoid": sigmoid}


def forward(activation: str, layers: Sequence[Tensor], x: Tensor) -> tuple[list[Rounded], list[Rounded], Rounded]:
    """The inputs of all layers, with their ones, the slopes of all but the last, and the output."""
    activate = ACTIVATIONS[activation]
    inputs, slopes = [with_ones(exact(x))], []
    for layer in layers[:-1]:
        h, slope = activate(inputs[-1] @ exact(layer).t())
        inputs.append(with_ones(h))
        slopes.append(slope)
    return inputs, slopes, inputs[-1] @ exact(layers[-1]).t()


def output_bounds(activation: str, layers: Sequence[Tensor], x: Tensor) -> Tensor:
    """How far float64 may take the output from the exact one.

    Args:
        activation: of the hidden layers.
        layers: the parameters, one matrix a layer, with the bias as its last column.
        x: inputs of the batch.

    Returns:
        Bounds in the shape of the output.
    """
    _, _, output = forward(activation, layers, x)
    return output.error


def rounding_bounds(activation: str, layers: Sequence[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    """How far float64 may take the loss and each layer's gradient from the exact ones.

    Args:
        activation: of the hidden layers.
        layers: the parameters, one matrix a layer, with the bias as its last column.
        x: inputs of the batch.
        y: its targets: classes for the cross-entropy, real numbers for the mean squared error.

    Returns:
        Bounds on the loss and on the gradient of each layer, in the shape of the layer.
    """
    inputs, slopes, output = forward(activation, layers, x)
    loss, gradient = (mean_squared_error if y.is_floating_point() else cross_entropy)(output, y)
    bounds = [(gradient.t() @ inputs[-1]).error]
    for layer, h, slope in zip(layers[:0:-1], inputs[-2::-1], reversed(slopes), strict=True):
        gradient = (gradient @ exact(layer[:, :-1])) * slope
        bounds.append((gradient.t() @ h).error)
    return [loss.error, *reversed(bounds)]


def update_bounds(
    group: Mapping[str, Any], step: int, layer: Tensor, gradient: Tensor, error: Tensor, state: Mapping[str, Tensor]
) -> Tensor:
    """How far float64 may take a layer's parameters after a step of SGD or Adam, both without further options.

    Both are computed with intervals: the exact gradient is within `error` of the one given, and another's within
    `error` of the exact one. Adam (Kingma and Ba 2015, algorithm 1) divides the mean of gradients by the root of the
    mean of their squares; both means move with the gradient, which the quotient of the intervals takes into account
    as if they moved independently.

    Args:
        group: of the optimizer: "lr" and, of Adam, "betas" and "eps".
        step: its number, 1 for the first.
        layer: the parameters before the step.
        gradient: computed by one contender.
        error: bound on its distance from the exact gradient.
        state: before the step, of Adam: "exp_avg" and "exp_avg_sq", or nothing before the first.

    Returns:
        Half of the most by which two contenders may differ, in the shape of the layer.
    """
    rate, low, high = group["lr"], gradient - 2 * error, gradient + 2 * error
    if "betas" not in group:
        rounding = gamma(2) * (layer.abs() + rate * torch.maximum(low.abs(), high.abs()))
        return rate * (high - low) / 2 + rounding

    beta1, beta2 = group["betas"]
    mean = state.get("exp_avg", torch.zeros_like(layer))
    square = state.get("exp_avg_sq", torch.zeros_like(layer))
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    largest = torch.maximum(low.abs(), high.abs())
    smallest = torch.where(low * high > 0, torch.minimum(low.abs(), high.abs()), 0.0)

    rounding = gamma(4) * (mean.abs() + largest)
    means = [beta1 * mean + (1 - beta1) * end + sign * rounding for end, sign in ((low, -1), (high, 1))]
    # 1 - beta**step cancels digits, so a rounding of the power is 1 / (1 - beta**step) of the difference.
    relative = gamma(8) + gamma(2) / correction2
    squares = [beta2 * square + (1 - beta2) * end.square() for end in (smallest, largest)]
    roots = [
        (end / correction2).sqrt() * (1 + sign * relative) + group["eps"]
        for end, sign in zip(squares, (-1, 1), strict=True)
    ]
    least = torch.minimum(means[0] / roots[0], means[0] / roots[1])
    most = torch.maximum(means[1] / roots[0], means[1] / roots[1])
    size = rate / correction1
    rounding = (gamma(4) + gamma(2) / correction1) * size * torch.maximum(least.abs(), most.abs())
    return (
        size * (most - least) / 2 + rounding + gamma(1) * (layer.abs() + size * torch.maximum(least.abs(), most.abs()))
    )

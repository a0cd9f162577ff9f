"""Bounds of a forward and a backward pass through the leaves of a network, as a training step makes them.

Layers and activations as `tests/support/bounds.py` has them; here stand dropout, batch normalisation, and losses that
are taken after an activation or a softmax. For float32 and float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmlp
from fastmlp import Activation
from fastmlp.activations import IDENTITY, resolve
from tests.support.bounds import ULPS, Bounded, activated, column_sums, differentiated, gamma, product
from tests.support.jets import plus, times
from tests.support.training import loss_bounds

SIGMOID = Activation("sigmoid")

#: Of the gradient of a part's output that of its input, with None where no parameter gets one.
Backward = Callable[[Bounded], tuple[Bounded, list[Bounded]]]


@dataclass
class Statistics:
    """What the running statistics of a norm may be after a pass; `batches` exactly."""

    mean: Bounded
    variance: Bounded
    batches: int


@dataclass
class Passed:
    """The loss, a gradient for each parameter, and the statistics of each norm that moves some."""

    loss: Bounded
    gradients: list[Bounded]
    statistics: dict[nn.BatchNorm1d, Statistics]


def activations_in(leaves: Sequence[nn.Module]) -> list[Activation]:
    """All of them, without identities."""
    found: list[Activation] = []
    for leaf in leaves:
        if isinstance(leaf, fastmlp.Linear):
            found.append(leaf.activation)
        elif not isinstance(leaf, (nn.Linear, nn.Dropout, nn.BatchNorm1d, nn.LogSoftmax)):
            found.append(resolve(leaf))
    return [act for act in found if act != IDENTITY]


def negative(x: Bounded) -> Bounded:
    return Bounded(-x.value, x.error)


def total(dtype: torch.dtype, *terms: Bounded) -> Bounded:
    """A sum of matrices and of vectors that each of their rows gets."""
    shape = torch.broadcast_shapes(*(term.value.shape for term in terms))
    return plus(dtype, *(Bounded(term.value.expand(shape), term.error.expand(shape)) for term in terms))


def mean_of_columns(x: Bounded, dtype: torch.dtype) -> Bounded:
    rows = x.value.shape[0]
    sums = column_sums(x, dtype)
    return Bounded(sums.value / rows, (sums.error + gamma(2, dtype) * sums.value.abs()) / rows)


def dropped(leaf: nn.Dropout, x: Bounded, like: Tensor, dtype: torch.dtype) -> tuple[Bounded, Backward]:
    """With a mask that is drawn here, as torch draws it for a tensor that lies as `like` does."""
    if not leaf.training:
        return x, lambda g: (g, [])
    # The factor is rounded, and so is each product.
    kept = F.dropout(torch.ones_like(like), leaf.p, True).reshape(x.value.shape) != 0
    exact = kept.double() / (1 - leaf.p) if leaf.p < 1 else kept.double()
    factor = Bounded(exact, gamma(2, dtype) * exact)

    def scaled(y: Bounded) -> Bounded:
        z = times(y, factor, dtype)
        # What is dropped is exactly zero, but for what is not finite.
        return Bounded(z.value, torch.where((exact == 0) & z.error.isfinite(), 0.0, z.error))

    return scaled(x), lambda g: (scaled(g), [])


def variance_of_columns(x: Bounded, mean: Bounded, dtype: torch.dtype) -> Bounded:
    """By any of the usual ways, of which those that go over rows once lose most where the mean is large."""
    rows = x.value.shape[0]
    deviation = x.value - mean.value
    value = deviation.square().mean(0)
    # By how much the numbers themselves are off, and the mean.
    off = x.error + x.error.mean(0)
    carried = (2 * deviation.abs() * off + off.square()).mean(0)
    spread = (value + carried).sqrt() + mean.error
    terms = gamma(rows + 2, dtype)
    return Bounded(value, carried + 2 * mean.error * spread + mean.error.square() + terms * spread.square())


def inverse_root(variance: Bounded, eps: float, dtype: torch.dtype) -> Bounded:
    value = (variance.value + eps).rsqrt()
    least = (variance.value + variance.error + eps).rsqrt()
    most = ((variance.value - variance.error).clamp(min=0) + eps).rsqrt()
    carried = torch.maximum(most - value, value - least)
    return Bounded(value, carried + gamma(4, dtype) * (value + carried))


def normalised(leaf: nn.BatchNorm1d, x: Bounded, dtype: torch.dtype) -> tuple[Bounded, Backward, Statistics | None]:
    """By the batch or by running statistics, with those that it leaves, if it moves any."""
    of_batch = leaf.training or leaf.running_mean is None
    moved = None
    if of_batch:
        mean = mean_of_columns(x, dtype)
        variance = variance_of_columns(x, mean, dtype)
        if leaf.training and leaf.track_running_stats and leaf.running_mean is not None:
            moved = moved_statistics(leaf, mean, variance, x.value.shape[0], dtype)
    else:
        assert leaf.running_mean is not None
        assert leaf.running_var is not None
        mean, variance = Bounded.exact(leaf.running_mean), Bounded.exact(leaf.running_var)
    inverse = inverse_root(variance, leaf.eps, dtype)
    hat = times(total(dtype, x, negative(mean)), inverse, dtype)
    weight = Bounded.exact(torch.ones_like(mean.value) if leaf.weight is None else leaf.weight)
    y = times(hat, weight, dtype)
    if leaf.bias is not None:
        y = total(dtype, y, Bounded.exact(leaf.bias))
    if not of_batch:
        # Also as a factor and a summand for each column.
        sizes = (x.value.abs() + mean.value.abs()) * inverse.value * weight.value.abs()
        y = Bounded(y.value, y.error + gamma(6, dtype) * (sizes + y.value.abs()))

    def backward(g: Bounded) -> tuple[Bounded, list[Bounded]]:
        products = times(g, hat, dtype)
        own = [column_sums(products, dtype)] if leaf.weight is not None else []
        own += [column_sums(g, dtype)] if leaf.bias is not None else []
        if of_batch:
            along = times(hat, mean_of_columns(products, dtype), dtype)
            # Also as the deviation times all else, which is several numbers.
            along = Bounded(along.value, along.error + gamma(6, dtype) * (along.value.abs() + along.error))
            g = total(dtype, g, negative(mean_of_columns(g, dtype)), negative(along))
        g = times(g, times(inverse, weight, dtype), dtype)
        return Bounded(g.value, g.error + gamma(ULPS, dtype) * g.value.abs()), own

    return y, backward, moved


def moved_statistics(
    leaf: nn.BatchNorm1d, mean: Bounded, variance: Bounded, rows: int, dtype: torch.dtype
) -> Statistics:
    assert leaf.running_mean is not None
    assert leaf.running_var is not None
    assert leaf.num_batches_tracked is not None
    batches = int(leaf.num_batches_tracked) + 1
    momentum = 1 / batches if leaf.momentum is None else leaf.momentum

    def moved(before: Tensor, found: Bounded) -> Bounded:
        kept, new = (1 - momentum) * before.double(), momentum * found.value
        error = abs(momentum) * found.error
        return Bounded(kept + new, error + gamma(6, dtype) * (before.double().abs() + kept.abs() + new.abs() + error))

    correction = rows / max(rows - 1, 1)
    unbiased = Bounded(variance.value * correction, variance.error * correction)
    return Statistics(moved(leaf.running_mean, mean), moved(leaf.running_var, unbiased), batches)


def layer(leaf: nn.Linear, x: Bounded, dtype: torch.dtype) -> tuple[Bounded, Backward]:
    weight = leaf.weight.detach()
    z = product(x, Bounded.exact(weight.t()), dtype, None if leaf.bias is None else leaf.bias.detach().double())

    def backward(g: Bounded) -> tuple[Bounded, list[Bounded]]:
        own = [product(Bounded(g.value.t(), g.error.t()), x, dtype)]
        own += [] if leaf.bias is None else [column_sums(g, dtype)]
        return product(g, Bounded.exact(weight), dtype), own

    return z, backward


def activation(act: Activation, z: Bounded, dtype: torch.dtype) -> tuple[Bounded, Backward]:
    return activated(z, act, dtype), lambda g: (differentiated(g, z, act, dtype), [])


def passed(leaves: Sequence[nn.Module], input: Tensor, target: Tensor, loss_fn: nn.Module, share: float) -> Passed:
    """Bounds for a step whose gradients are divided by `share`. Draws what dropout draws."""
    dtype, leading = input.dtype, input.shape[:-1]
    x = Bounded.exact(input.reshape(leading.numel(), input.shape[-1]))
    like = input
    backwards: list[Backward] = []
    statistics: dict[nn.BatchNorm1d, Statistics] = {}
    parts = [part for part in dissolved(leaves) if part != IDENTITY]
    if isinstance(loss_fn, nn.BCELoss):
        while isinstance(parts[-1], nn.Dropout):
            assert not parts.pop().training
        assert parts.pop() == SIGMOID
    for part in parts:
        back: Backward
        if isinstance(part, Activation):
            x, back = activation(part, x, dtype)
        elif isinstance(part, nn.Dropout):
            x, back = dropped(part, x, like, dtype)
        elif isinstance(part, nn.BatchNorm1d):
            x, back, moved = normalised(part, x, dtype)
            if moved is not None:
                statistics[part] = moved
        else:
            x, back = layer(part, x, dtype)
        like = torch.empty(*leading, x.value.shape[1], dtype=dtype)
        backwards.append(back)
    loss, gradient = loss_of(loss_fn, x, target, dtype)
    g = Bounded(gradient.value / share, gradient.error / share)
    gradients: list[Bounded] = []
    for back in reversed(backwards):
        g, own = back(g)
        gradients = own + gradients
    return Passed(loss, gradients, statistics)


def loss_of(loss_fn: nn.Module, x: Bounded, target: Tensor, dtype: torch.dtype) -> tuple[Bounded, Bounded]:
    """A loss and its gradient; of an `NLLLoss` and a `BCELoss` in terms of what a softmax or a sigmoid is taken of."""
    if isinstance(loss_fn, nn.BCELoss):
        return of_probabilities(loss_fn, x, target, dtype)
    if isinstance(loss_fn, nn.NLLLoss):
        loss_fn = nn.CrossEntropyLoss(loss_fn.weight, ignore_index=loss_fn.ignore_index, reduction=loss_fn.reduction)
    return loss_bounds(loss_fn, x, target, dtype)


def of_probabilities(loss_fn: nn.BCELoss, z: Bounded, target: Tensor, dtype: torch.dtype) -> tuple[Bounded, Bounded]:
    """-t log p - (1 - t) log(1 - p) with p = sigmoid(z), whose logarithms end at -100, and its gradient.

    Where 1 - p is small it is known to some units in the last place of p only. The gradient (p - t) / max(p (1 - p),
    1e-12) is multiplied by the sigmoid's own derivative p (1 - p), of the same p.
    """
    if ((target < 0) | (target > 1)).any():
        raise ValueError("targets of a BCELoss lie between 0 and 1")
    t, p = target.double().view_as(z.value), activated(z, SIGMOID, dtype)
    low, high = (p.value - p.error).clamp(0, 1), (p.value + p.error).clamp(0, 1)

    def logarithm(value: Tensor, least: Tensor, most: Tensor) -> Bounded:
        value, least, most = value.clamp(min=-100), least.log().clamp(min=-100), most.log().clamp(min=-100)
        carried = torch.maximum(most - value, value - least).clamp(min=0)
        return Bounded(value, carried + gamma(ULPS, dtype) * (value.abs() + carried))

    of_one = logarithm(F.logsigmoid(z.value), low, high)
    of_zero = logarithm(F.logsigmoid(-z.value), 1 - high, 1 - low)
    terms = -t * of_one.value - (1 - t) * of_zero.value
    errors = t * of_one.error + (1 - t) * of_zero.error
    count = terms.numel() if loss_fn.reduction == "mean" else 1
    tiny = torch.finfo(dtype).tiny
    error = (errors.sum() + gamma(terms.numel() + 4, dtype) * (terms + errors).sum()) / count + tiny

    slopes = p.value * (1 - p.value), low * (1 - high), high * (1 - low)
    share, least, most = ((slope / 1e-12).clamp(max=1) for slope in slopes)
    residual = p.value - t
    carried = residual.abs() * torch.maximum(most - share, share - least) + p.error * most
    carried = carried + gamma(ULPS + 4, dtype) * (residual.abs() + p.error) * most
    return Bounded(terms.sum() / count, error), Bounded(residual * share / count, carried / count + tiny)


def dissolved(leaves: Sequence[nn.Module]) -> list[Any]:
    """Layers, activations as values, dropouts and norms, one after another."""
    found: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, fastmlp.Linear):
            found += [leaf, leaf.activation]
        elif isinstance(leaf, (nn.Linear, nn.Dropout, nn.BatchNorm1d)):
            found.append(leaf)
        elif not isinstance(leaf, nn.LogSoftmax):
            found.append(resolve(leaf))
    return found

"""What a step of an optimizer may leave behind, from its formula in interval arithmetic.

Gradients that went through a network are known within bounds, those of `bounds.py`. The formula is evaluated on
intervals, each operation widened by its roundings (Higham 2002, section 3.1), in whatever order the terms are taken
and whether or not they are fused. So the bounds hold where Adam's quotient m / (sqrt(v) + eps) magnifies an error
a million times, as it does while v is small. They are wide exactly there.

The formulas are those in the documentation of `torch.optim`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support.bounds import Bounded, rounding

State = dict[str, "Interval"]


@dataclass(frozen=True)
class Interval:
    """Where each entry of a vector may lie; both ends in float64."""

    low: Tensor
    high: Tensor

    @staticmethod
    def exact(x: Tensor) -> "Interval":
        x = x.detach().double().flatten()
        return Interval(x, x)

    @staticmethod
    def around(x: Bounded, dtype: torch.dtype) -> "Interval":
        """Also where numbers are stored in `dtype`. The value itself is computed in float64, so there both may err."""
        value, error = x.value.flatten(), x.error.flatten() * (2 if dtype == torch.float64 else 1)
        error = error + rounding(value, dtype) * (1 + torch.finfo(dtype).eps)
        return Interval(value - error, value + error)

    @property
    def magnitude(self) -> Tensor:
        return torch.maximum(self.low.abs(), self.high.abs())

    def times(self, factor: float) -> "Interval":
        ends = self.low * factor, self.high * factor
        return Interval(*ends) if factor >= 0 else Interval(*reversed(ends))

    def plus(self, other: "Interval") -> "Interval":
        return Interval(self.low + other.low, self.high + other.high)

    def squared(self) -> "Interval":
        low, high = self.low.square(), self.high.square()
        straddles = (self.low < 0) & (self.high > 0)
        return Interval(torch.where(straddles, 0.0, torch.minimum(low, high)), torch.maximum(low, high))

    def over(self, positive: "Interval") -> "Interval":
        """Without bounds where the divisor may be zero."""
        ends = [x / y for x in (self.low, self.high) for y in (positive.low, positive.high)]
        all_ends = torch.stack(ends)
        unknown = (positive.low <= 0) | all_ends.isnan().any(0)
        return Interval(
            torch.where(unknown, -torch.inf, all_ends.amin(0)), torch.where(unknown, torch.inf, all_ends.amax(0))
        )

    def outside(self, found: Tensor) -> Tensor:
        """Which entries do not lie here. NaN does only where there are no bounds, or NaN went into them."""
        found = found.detach().double().flatten()
        unbounded = (self.low == -torch.inf) & (self.high == torch.inf) | self.low.isnan() | self.high.isnan()
        return ~((found >= self.low) & (found <= self.high) | unbounded)

    def check(self, found: Tensor, what: str) -> None:
        assert found.numel() == self.low.numel(), f"{what}: {found.numel()} numbers for {self.low.numel()}"
        outside = self.outside(found)
        if outside.any():
            at = int(outside.nonzero()[0])
            number, low, high = (x.double().flatten()[at].item() for x in (found.detach(), self.low, self.high))
            raise AssertionError(
                f"{what}: {int(outside.sum())} of {outside.numel()} are outside, the first at {at}: "
                f"{number:.17g} is not in [{low:.17g}, {high:.17g}]"
            )


class Arithmetic:
    """Operations of a dtype on intervals."""

    def __init__(self, dtype: torch.dtype) -> None:
        finfo = torch.finfo(dtype)
        # In float64 the ends themselves are rounded, like the numbers that they are compared with.
        self.unit = finfo.eps if dtype == torch.float64 else finfo.eps / 2
        self.smallest = finfo.eps * finfo.smallest_normal

    def rounded(self, x: Interval, roundings: int, magnitude: Tensor | None = None, relative: float = 0) -> Interval:
        """After some roundings of numbers of a magnitude, which is their own if it is not given."""
        gamma = roundings * self.unit / (1 - roundings * self.unit)
        magnitude = x.magnitude if magnitude is None else magnitude
        error = (gamma + relative) * magnitude + roundings * self.smallest
        return Interval(x.low - error, x.high + error)

    def sum(self, a: float, x: Interval, b: float, y: Interval, more: int = 0) -> Interval:
        """A x + b y: the scalars are rounded, the products, and the sum."""
        value = x.times(a).plus(y.times(b))
        return self.rounded(value, 4 + more, abs(a) * x.magnitude + abs(b) * y.magnitude)

    def interpolation(self, beta: float, x: Interval, y: Interval) -> Interval:
        """Beta x + (1 - beta) y, also as x + (1 - beta) (y - x) or y - beta (y - x)."""
        value = x.times(beta).plus(y.times(1 - beta))
        difference = x.magnitude + y.magnitude
        magnitude = x.magnitude + (1 - beta) * difference if 1 - beta < 0.5 else y.magnitude + beta * difference
        return self.rounded(value, 5, magnitude)

    def sgd(self, group: Mapping[str, Any], p: Interval, g: Interval, state: State) -> tuple[Interval, State]:
        """Parameters and state after a step of `torch.optim.SGD`."""
        if group["maximize"]:
            g = g.times(-1)
        if group["weight_decay"]:
            g = self.sum(1, g, float(group["weight_decay"]), p)
        momentum, after = group["momentum"], dict(state)
        if momentum:
            buffer = state.get("momentum_buffer")
            buffer = g if buffer is None else self.sum(momentum, buffer, 1 - group["dampening"], g)
            after["momentum_buffer"] = buffer
            g = self.sum(1, g, momentum, buffer) if group["nesterov"] else buffer
        return self.sum(1, p, -float(group["lr"]), g), after

    def adam(self, group: Mapping[str, Any], p: Interval, g: Interval, state: State) -> tuple[Interval, State]:
        """Parameters and state after a step of `torch.optim.Adam`, and of AdamW, whose weight decay is decoupled."""
        lr, decay, eps = float(group["lr"]), float(group["weight_decay"]), group["eps"]
        beta1, beta2 = (float(beta) for beta in group["betas"])
        if group["maximize"]:
            g = g.times(-1)
        if decay and group["decoupled_weight_decay"]:
            p = self.rounded(p.times(1 - lr * decay), 4, (1 + lr * decay) * p.magnitude)
        elif decay:
            g = self.sum(1, g, decay, p)
        zero = Interval.exact(torch.zeros_like(p.low))
        step = state.get("step", Interval.exact(torch.zeros(1))).plus(Interval.exact(torch.ones(1)))
        m = self.interpolation(beta1, state.get("exp_avg", zero), g)
        v = self.sum(beta2, state.get("exp_avg_sq", zero), 1 - beta2, g.squared(), more=1)
        v = Interval(v.low.clamp(min=0), v.high)
        after = {"step": step, "exp_avg": m, "exp_avg_sq": v}
        if group["amsgrad"]:
            most = state.get("max_exp_avg_sq", zero)
            v = Interval(torch.maximum(v.low, most.low), torch.maximum(v.high, most.high))
            after["max_exp_avg_sq"] = v
        t = step.low.item()
        # In double precision on both sides, each with an error of a power that is near one.
        corrections = 1 - beta1**t, 1 - beta2**t
        relative = [4 * torch.finfo(torch.float64).eps / correction for correction in corrections]
        root = Interval(v.low.sqrt(), v.high.sqrt()).times(corrections[1] ** -0.5)
        denominator = self.rounded(root, 4, relative=relative[1])
        epsilon = Interval.exact(torch.full_like(p.low, eps))
        denominator = self.rounded(denominator.plus(epsilon), 2)
        update = self.rounded(m.over(denominator).times(lr / corrections[0]), 5, relative=relative[0])
        return self.rounded(p.plus(update.times(-1)), 1), after

    def rmsprop(self, group: Mapping[str, Any], p: Interval, g: Interval, state: State) -> tuple[Interval, State]:
        """Parameters and state after a step of `torch.optim.RMSprop`."""
        lr, alpha, momentum = float(group["lr"]), float(group["alpha"]), float(group["momentum"])
        if group["maximize"]:
            g = g.times(-1)
        if group["weight_decay"]:
            g = self.sum(1, g, float(group["weight_decay"]), p)
        zero = Interval.exact(torch.zeros_like(p.low))
        step = state.get("step", Interval.exact(torch.zeros(1))).plus(Interval.exact(torch.ones(1)))
        v = self.sum(alpha, state.get("square_avg", zero), 1 - alpha, g.squared(), more=1)
        v = Interval(v.low.clamp(min=0), v.high)
        after = {"step": step, "square_avg": v}
        variance = v
        if group["centered"]:
            mean = after["grad_avg"] = self.interpolation(alpha, state.get("grad_avg", zero), g)
            variance = self.sum(1, v, -1, mean.squared(), more=1)
        root = self.rounded(Interval(variance.low.clamp(min=0).sqrt(), variance.high.clamp(min=0).sqrt()), 1)
        denominator = self.rounded(root.plus(Interval.exact(torch.full_like(p.low, group["eps"]))), 2)
        # The root of a number that may be negative is NaN.
        denominator = Interval(torch.where(variance.low < 0, 0.0, denominator.low), denominator.high)
        if momentum > 0:
            quotient = self.rounded(g.over(denominator), 1)
            buffer = after["momentum_buffer"] = self.sum(momentum, state.get("momentum_buffer", zero), 1, quotient)
            return self.sum(1, p, -lr, buffer), after
        update = self.rounded(self.rounded(g.times(lr), 2).over(denominator), 1)
        return self.rounded(p.plus(update.times(-1)), 1), after

    def step(
        self, optimizer: torch.optim.Optimizer, group: Mapping[str, Any], p: Interval, g: Interval, state: State
    ) -> tuple[Interval, State]:
        """Parameters and state after a step of an SGD, Adam, AdamW or RMSprop."""
        formulas = {torch.optim.SGD: self.sgd, torch.optim.Adam: self.adam, torch.optim.RMSprop: self.rmsprop}
        (formula,) = (formula for kind, formula in formulas.items() if isinstance(optimizer, kind))
        return formula(group, p, g, state)

"""The four lines of a training loop, the networks that they are tried with, and what a step may give."""

import copy
import inspect
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import Activation, reference
from fastmlp.activations import module_of
from tests.support.bounds import ULPS, Bounded, gamma, network
from tests.support.intervals import Arithmetic, Interval, State
from tests.support.rounding import Results, distance, rounding_bounds

Optimizer = torch.optim.Optimizer


class Step(Protocol):
    """What a `Loop` and a `fastmlp.TrainStep` have in common."""

    def __call__(self, input: Tensor, target: Tensor) -> Tensor: ...


class Loop:
    """What `fastmlp.TrainStep` stands for, by PyTorch."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module,
        optimizer: Optimizer,
        *,
        max_norm: float | None = None,
        clip_value: float | None = None,
        accumulate: int = 1,
        keep_grads: bool = True,
    ) -> None:
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.max_norm, self.clip_value, self.accumulate = max_norm, clip_value, accumulate
        self.keep_grads = keep_grads
        self.calls = 0

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        if self.calls % self.accumulate == 0:
            self.optimizer.zero_grad()
        loss: Tensor = self.loss_fn(self.model(input), target)
        (loss / self.accumulate if self.accumulate > 1 else loss).backward()
        self.calls += 1
        if self.calls % self.accumulate == 0:
            if self.max_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
            if self.clip_value is not None:
                nn.utils.clip_grad_value_(self.model.parameters(), self.clip_value)
            self.optimizer.step()
        if not self.keep_grads:
            for p in self.model.parameters():
                p.grad = None
        return loss.detach()


#: Makes a step of a model, a loss, an optimizer and options: `Loop` or `fastmlp.TrainStep`.
Maker = Callable[..., Step]


def assert_equal_to_rounding(scenario: Callable[[Maker], Results], isas: Iterable[str]) -> None:
    """A scenario gives with TrainStep, on each instruction set, what it gives with the loop.

    Args:
        scenario: of float64 networks; returns tensors by name. It is run afresh with the loop, and with the loop's
            operations moved by their roundings, which gives the bounds.
        isas: names of instruction sets.
    """
    torch.manual_seed(0)
    expected = scenario(Loop)

    def again() -> Results:
        torch.manual_seed(0)
        return scenario(Loop)

    bounds = rounding_bounds(again, expected, steps=True)
    for isa in isas:
        fastmlp.set_isa(isa)
        torch.manual_seed(0)
        found = scenario(fastmlp.TrainStep)
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert found[name].shape == value.shape, f"{isa}: {name}"
            assert found[name].dtype == value.dtype, f"{isa}: {name}"
            if value.numel() == 0:
                continue
            difference, bound = distance(found[name], value), bounds[name]
            assert difference <= bound, f"{isa}: {name} differs by {difference:.3g}, rounding explains {bound:.3g}"


def everything(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Parameters, gradients and the optimizer's state, each a copy."""
    found: dict[str, Tensor] = {}
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    for p, name in names.items():
        found[name] = p.detach().clone()
        if p.grad is not None:
            found[f"{name}.grad"] = p.grad.clone()
    others = [p for group in optimizer.param_groups for p in group["params"] if p not in names]
    names |= {p: f"other {i}" for i, p in enumerate(others)}
    found |= {names[p]: p.detach().clone() for p in others}
    for p, state in optimizer.state.items():
        found |= {f"{names[p]}.{key}": x.clone() for key, x in state.items() if isinstance(x, Tensor)}
    return dict(sorted(found.items()))


# Losses.


def loss_bounds(loss_fn: nn.Module, output: Bounded, target: Tensor, dtype: torch.dtype) -> tuple[Bounded, Bounded]:
    """The loss, and its gradient with respect to the output.

    Args:
        loss_fn: one of the losses of `fastmlp.TrainStep`.
        output: (rows, features).
        target: as many classes as rows, or as the output.
        dtype: of the computation.
    """
    classes = isinstance(loss_fn, nn.CrossEntropyLoss)
    target = target.flatten() if classes else target.double().view_as(output.value)
    exact = copy.deepcopy(loss_fn).double()
    with torch.enable_grad():
        leaf = output.value.detach().requires_grad_()
        value = exact(leaf, target)
        (gradient,) = torch.autograd.grad(value, leaf)
    mean = loss_fn.reduction == "mean"
    count = output.value.numel() if mean and not classes else 1
    if classes:
        assert isinstance(exact, nn.CrossEntropyLoss)
        errors = _cross_entropy(exact, output, target, dtype)
    else:
        errors = _elementwise(exact, output, target, dtype)
    terms, loss_error, gradient_error = errors
    n = output.value.numel()
    total = (terms + loss_error).sum() / count
    loss_error = loss_error.sum() / count + gamma(n + 4, dtype) * total
    tiny = torch.finfo(dtype).tiny
    gradient_error = gradient_error / count + gamma(4, dtype) * gradient.abs() + tiny
    return Bounded(value.detach(), loss_error + tiny), Bounded(gradient, gradient_error)


def _elementwise(
    loss_fn: nn.Module, output: Bounded, target: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitude and error of each term of the loss, and the error of each term's derivative."""
    residual = output.value - target
    error = output.error + gamma(1, dtype) * residual.abs()
    size = residual.abs() + error
    if isinstance(loss_fn, nn.MSELoss):
        return size.square(), (2 * size + error) * error, 2 * error
    if isinstance(loss_fn, nn.L1Loss) or (isinstance(loss_fn, nn.SmoothL1Loss) and loss_fn.beta == 0):
        # The sign is open where the residual is within its error, which it is not where it is exactly zero.
        return size, error, torch.where((residual.abs() <= error) & (error > 0), 1 + residual.sign().abs(), 0.0)
    if isinstance(loss_fn, nn.SmoothL1Loss):
        beta = loss_fn.beta
        slope = (size / beta).clamp(max=1)
        return slope * size, slope * error + gamma(7, dtype) * slope * (size + beta), error / beta + gamma(2, dtype)
    if isinstance(loss_fn, nn.HuberLoss):
        slope = size.clamp(max=loss_fn.delta)
        return slope * size, slope * error + gamma(6, dtype) * slope * (size + loss_fn.delta), error
    assert isinstance(loss_fn, nn.BCEWithLogitsLoss)
    # (1 - t) z + a log(1 + exp(-z)) with a = 1 + (w - 1) t; the logarithm is max(-z, 0) and at most log 2.
    weight = torch.ones_like(target) if loss_fn.pos_weight is None else loss_fn.pos_weight.expand_as(target)
    positive, negative = (weight * target).abs(), (1 - target).abs()
    z, slopes = output.value.abs() + output.error, 2 * negative + positive
    terms = negative * z + (negative + positive) * (z + 1)
    evaluation = gamma(2 * ULPS, dtype)
    curvature = (negative + positive) / 4
    return terms, slopes * output.error + evaluation * terms, curvature * output.error + evaluation * 2 * slopes


def _cross_entropy(
    loss_fn: nn.CrossEntropyLoss, output: Bounded, target: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitude and error of each term of the loss, and the error of each derivative, all divided as the loss is.

    The loss is the sum of -t_c log p_c over rows and classes, divided by the sum of the targets' weights. The
    logarithm of a softmax moves by at most twice what the logits move by; its evaluation rounds numbers of the size
    of the largest logit and of the largest difference of two.
    """
    classes, smoothing = output.value.shape[1], loss_fn.label_smoothing
    counted = target != loss_fn.ignore_index
    safe = torch.where(counted, target, 0)
    weight = torch.ones(classes, dtype=torch.float64) if loss_fn.weight is None else loss_fn.weight
    one_hot = nn.functional.one_hot(safe, classes).double()
    shares = ((1 - smoothing) * one_hot + smoothing / classes) * weight * counted[:, None]
    divisor = (weight[safe] * counted).sum() if loss_fn.reduction == "mean" else torch.ones(())
    shares = shares / divisor
    logits = output.value
    size = logits.abs().amax(1, keepdim=True) + output.error.amax(1, keepdim=True)
    error = 2 * output.error.amax(1, keepdim=True) + gamma(2 * classes + 2 * ULPS, dtype) * (1 + 2 * size)
    logarithms = -logits.log_softmax(1)
    rounding = gamma(classes + target.numel() + 8, dtype)
    terms = shares * (logarithms + error)
    loss_error = shares * error + rounding * terms
    softmax, sums = logits.softmax(1), shares.sum(1, keepdim=True)
    gradient_error = sums * softmax * (error.expm1() + gamma(2 * ULPS, dtype)) + rounding * (sums * softmax + shares)
    return terms, loss_error, gradient_error


# Networks.


class Functional(nn.Module):
    """Layers as a user writes them, with activations called as functions."""

    def __init__(self, layers: Sequence[nn.Module], activations: Sequence[Activation]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activations = activations

    def forward(self, x: Tensor) -> Tensor:
        for layer, act in zip(self.layers, self.activations, strict=True):
            x = reference.activate(layer(x), act.name, act.parameters)
        return x


@dataclass(frozen=True)
class Network:
    """Layers without their numbers.

    Attributes:
        widths: of the input and of each layer's output.
        activations: after each layer.
        has_bias: of each layer.
    """

    widths: tuple[int, ...]
    activations: tuple[Activation, ...]
    has_bias: tuple[bool, ...]

    def layers(self, dtype: torch.dtype) -> list[nn.Module]:
        return [
            nn.Linear(k, n, bias, dtype=dtype)
            for (k, n), bias in zip(pairwise(self.widths), self.has_bias, strict=True)
        ]

    def torchs(self, dtype: torch.dtype) -> nn.Sequential:
        """Of torch.nn alone."""
        children: list[nn.Module] = []
        for layer, act in zip(self.layers(dtype), self.activations, strict=True):
            children += [layer] if act.name == "identity" else [layer, module_of(act)]
        return nn.Sequential(*children)

    def like(self, model: nn.Module, form: str) -> nn.Module:
        """The same numbers in one of the forms that TrainStep takes."""
        dtype = next(model.parameters()).dtype
        made: nn.Module
        if form == "Functional":
            made = Functional(self.layers(dtype), self.activations)
        elif form == "Linear":
            made = fastmlp.Sequential(
                *(
                    fastmlp.Linear(k, n, bias, dtype=dtype, activation=act)
                    for (k, n), bias, act in zip(pairwise(self.widths), self.has_bias, self.activations, strict=True)
                )
            )
        else:
            plain = self.torchs(dtype)
            made = plain if form == "nn" else fastmlp.Sequential(*plain)
            if form == "nested":
                made = nn.Sequential(fastmlp.Sequential(*list(plain)[:2]), nn.Sequential(*list(plain)[2:]))
        with torch.no_grad():
            for p, q in zip(made.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        return made

    def split(self, parameters: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Weights and biases, from both in a row."""
        rest = iter(parameters)
        pairs = [(next(rest), next(rest) if bias else None) for bias in self.has_bias]
        return [weight for weight, _ in pairs], [bias for _, bias in pairs]


#: How a network may be given to TrainStep.
FORMS = ("Sequential", "nn", "Linear", "nested", "Functional")


@dataclass
class Side:
    """A model with an optimizer that has some of its parameters, and a step."""

    model: nn.Module
    optimizer: Optimizer
    step: Step
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = list(self.model.parameters())

    def state(self, p: nn.Parameter) -> Mapping[str, Tensor]:
        return self.optimizer.state.get(p, {})

    def tensors(self) -> list[Tensor]:
        """Parameters, what gradients there are, and the optimizer's state."""
        found: list[Tensor] = []
        for p in self.parameters:
            found += [p.detach(), *([] if p.grad is None else [p.grad]), *self.state(p).values()]
        return found

    def copy_from(self, other: "Side") -> None:
        """Takes over all numbers, in place."""
        with torch.no_grad():
            for mine, others in zip(self.tensors(), other.tensors(), strict=True):
                mine.copy_(others)


@dataclass
class After:
    """What a step may leave behind: the loss, and of each parameter its gradient, its value and its state."""

    loss: Interval
    gradients: list[Interval]
    values: list[Interval]
    states: list[State]

    def check(self, loss: Tensor, side: Side, what: str, grads: bool = True) -> None:
        """Whether a loss and all that a side holds lie here, gradients only if they are kept."""
        assert loss.dim() == 0, what
        assert not loss.requires_grad, what
        found, expected = {"loss": loss}, {"loss": self.loss}
        for i, p in enumerate(side.parameters):
            assert (p.grad is not None) == grads, f"{what}: gradient {i}"
            if p.grad is not None:
                found[f"gradient {i}"], expected[f"gradient {i}"] = p.grad, self.gradients[i]
            state = side.state(p)
            assert set(state) == set(self.states[i]), f"{what}: state {i} has {list(state)}"
            for key, interval in self.states[i].items():
                found[f"{key} {i}"], expected[f"{key} {i}"] = state[key], interval
            found[f"parameter {i}"], expected[f"parameter {i}"] = p.detach(), self.values[i]
        numbers = torch.cat([x.flatten().double() for x in found.values()])
        if self._together is None:
            intervals = expected.values()
            self._together = Interval(torch.cat([x.low for x in intervals]), torch.cat([x.high for x in intervals]))
        if self._together.outside(numbers).any():
            for name, interval in expected.items():
                interval.check(found[name], f"{what}: {name}")

    _together: Interval | None = None


def after_a_step(net: Network, side: Side, loss_fn: nn.Module, input: Tensor, target: Tensor, call: int) -> After:
    """Bounds for the call with this number of a side with a `Loop`, which is about to be made."""
    loop = side.step
    assert isinstance(loop, Loop)
    dtype, arithmetic, n = input.dtype, Arithmetic(input.dtype), loop.accumulate
    found: list[Bounded] = []

    def backward(output: Bounded) -> Bounded:
        loss, gradient = loss_bounds(loss_fn, output, target, dtype)
        found.append(loss)
        return Bounded(gradient.value / n, gradient.error / n)

    weights, biases = net.split(side.parameters)
    rows = input.reshape(-1, net.widths[0])
    bounds = network(rows, weights, biases, net.activations, backward).gradients[1:]
    gradients = [Interval.around(bound, dtype) for bound in bounds]
    if n > 1:  # torch divides the loss, and thus rounds once more
        gradients = [arithmetic.rounded(g, 2) for g in gradients]
    if call % n:
        before = [Interval.exact(p.grad) for p in side.parameters if p.grad is not None]
        gradients = [arithmetic.rounded(a.plus(b), 1) for a, b in zip(before, gradients, strict=True)]
    values = [Interval.exact(p) for p in side.parameters]
    states = [{key: Interval.exact(x) for key, x in side.state(p).items()} for p in side.parameters]
    if (call + 1) % n == 0:
        gradients = clipped(loop, gradients, arithmetic)
        for group in side.optimizer.param_groups:
            for i, p in enumerate(side.parameters):
                if any(p is q for q in group["params"]):
                    values[i], states[i] = arithmetic.step(side.optimizer, group, values[i], gradients[i], states[i])
    return After(Interval.around(found[0], dtype), gradients, values, states)


def clipped(loop: Loop, gradients: list[Interval], arithmetic: Arithmetic) -> list[Interval]:
    """By norm or value, as torch.nn.utils does."""
    if loop.clip_value is not None:
        limit = loop.clip_value
        # The limit is rounded to the dtype.
        return [
            arithmetic.rounded(Interval(g.low.clamp(-limit, limit), g.high.clamp(-limit, limit)), 1) for g in gradients
        ]
    if loop.max_norm is None:
        return gradients
    squares = [g.squared() for g in gradients]
    total = Interval(
        *(torch.stack([s.sum() for s in ends]).sum() for ends in ([s.low for s in squares], [s.high for s in squares]))
    )
    norm = arithmetic.rounded(Interval(total.low.sqrt(), total.high.sqrt()), sum(g.low.numel() for g in gradients) + 8)
    factors = [(loop.max_norm / (end + 1e-6)).clamp(max=1) for end in (norm.high, norm.low.clamp(min=0))]
    scaled = []
    for g in gradients:
        ends = torch.stack([g.low * factors[0], g.low * factors[1], g.high * factors[0], g.high * factors[1]])
        scaled.append(arithmetic.rounded(Interval(ends.amin(0), ends.amax(0)), 4))
    return scaled


# What is drawn.


LOSSES = ("mse", "l1", "huber", "smooth l1", "bce", "ce", "ce")
OPTIMIZERS = ("SGD", "Adam", "AdamW", "RMSprop")
#: Those among them that torch has a fused step of.
FUSED = tuple(name for name in OPTIMIZERS if "fused" in inspect.signature(getattr(torch.optim, name)).parameters)


def draw_loss(random_: random.Random, name: str, number: int, classes: int, dtype: torch.dtype) -> nn.Module:
    """One of the losses that TrainStep takes; eight numbers in a row give all forms of the cross-entropy."""
    reduction = ("mean", "sum")[number % 2]
    if name == "ce":
        return nn.CrossEntropyLoss(
            weight=torch.rand(classes, dtype=dtype) + 0.5 if number % 4 < 2 else None,
            ignore_index=random_.choice([-100, 0, 1]),
            reduction=reduction,
            label_smoothing=random_.choice([0.1, 0.7]) if number % 8 < 4 else 0.0,
        )
    if name == "bce":
        return nn.BCEWithLogitsLoss(
            reduction=reduction, pos_weight=torch.rand(classes, dtype=dtype) * 3 if random_.random() < 0.5 else None
        )
    if name == "smooth l1":
        return nn.SmoothL1Loss(reduction=reduction, beta=random_.choice([0.0, 0.3, 1.0, 2.5]))
    if name == "huber":
        return nn.HuberLoss(reduction, delta=random_.choice([0.3, 1.0, 2.5]))
    return nn.MSELoss(reduction=reduction) if name == "mse" else nn.L1Loss(reduction=reduction)


def targets(loss_fn: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """For an output of a shape; a class that is not ignored is there, if any is."""
    if isinstance(loss_fn, (nn.CrossEntropyLoss, nn.NLLLoss)):
        classes = torch.randint(0, shape[-1], shape[:-1])
        if loss_fn.ignore_index < 0:
            classes[torch.rand(classes.shape) < 0.2] = loss_fn.ignore_index
        classes.view(-1)[:1] = 1 if loss_fn.ignore_index == 0 else 0
        return classes
    if isinstance(loss_fn, (nn.BCEWithLogitsLoss, nn.BCELoss)):
        return torch.rand(*shape, dtype=dtype)
    return torch.randn(*shape, dtype=dtype)


def draw_optimizer(random_: random.Random, name: str) -> dict[str, Any]:
    """Arguments of one of the optimizers that TrainStep takes."""
    maximize = random_.random() < 0.15
    decay = random_.choice([0.0, 0.0, 0.01, 0.1])
    if name == "SGD":
        momentum = random_.choice([0.0, 0.9, 0.5])
        nesterov = momentum > 0 and random_.random() < 0.5
        return {
            "lr": random_.choice([0.1, 0.01]) * (0.03 if maximize else 1),
            "momentum": momentum,
            "dampening": 0.0 if nesterov else random_.choice([0.0, 0.3]),
            "weight_decay": decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
    if name == "RMSprop":
        centered, momentum = random_.random() < 0.4, random_.choice([0.0, 0.0, 0.9])
        return {
            "lr": random_.choice([1e-3, 1e-2]) * (0.1 if momentum else 1),
            "alpha": random_.choice([0.99, 0.9, 0.4] if centered else [0.99, 0.9, 0.4, 0.0]),
            "eps": random_.choice([1e-8, 1e-8, 1e-3]),
            "weight_decay": decay,
            "momentum": momentum,
            "centered": centered,
            "maximize": maximize,
        }
    return {
        "lr": random_.choice([1e-3, 1e-2]),
        "betas": random_.choice([(0.9, 0.999), (0.5, 0.9), (0.0, 0.99), (0.0, 0.0)]),
        "eps": random_.choice([1e-8, 1e-8, 1e-3]),
        "weight_decay": decay,
        "amsgrad": random_.random() < 0.3,
        "maximize": maximize,
    } | ({"decoupled_weight_decay": random_.random() < 0.3} if name == "Adam" else {})


def optimizer_of(module: Any, name: str, arguments: Mapping[str, Any], groups: Any) -> Optimizer:
    """Of `torch.optim` or `fastmlp.optim`."""
    made = getattr(module, name)(groups, **arguments)
    assert isinstance(made, Optimizer)
    return made

"""What a call of a training step must leave behind, from what was there before it, in intervals."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.attack.cases import Case, Disagreement
from tests.attack.oracle import nan_is_open
from tests.attack.passes import activations_in, passed
from tests.attack.sides import Side, Training, owned
from tests.support.intervals import Arithmetic, Interval
from tests.support.training import Loop, clipped


@dataclass
class After:
    """The loss, and each parameter with its gradient and state, None where there must be none.

    Attributes:
        statistics: of each norm among the leaves its buffers, by the place of the leaf.
    """

    loss: Interval
    values: list[Interval]
    gradients: list[Interval | None]
    states: list[dict[str, Interval]]
    statistics: dict[int, dict[str, Interval]]


def expected(training: Training, loop: Loop, input: Tensor, target: Tensor) -> After:
    """Bounds for a call that is about to be made. Draws what dropout draws."""
    side, dtype, n = training.side, training.dtype, training.accumulate
    arithmetic = Arithmetic(dtype)
    found = passed(side.leaves, input, target, training.plain_loss, n)
    parameters, first = side.parameters, training.calls % n == 0
    has = owned(side.optimizer, parameters)
    gradients: list[Interval | None] = []
    for p, bound, own in zip(parameters, found.gradients, has, strict=True):
        kept = None if p.grad is None or (first and own) else Interval.exact(p.grad.clone())
        if p.requires_grad:
            gradient = Interval.around(bound, dtype)
            if n > 1:  # torch divides the loss, and thus rounds once more
                gradient = arithmetic.rounded(gradient, 2)
            kept = gradient if kept is None else arithmetic.rounded(kept.plus(gradient), 1)
        gradients.append(kept)
    statistics: dict[int, dict[str, Interval]] = {}
    for i, leaf in enumerate(side.leaves):
        if isinstance(leaf, nn.BatchNorm1d):
            statistics[i] = exact(leaf._buffers)
            moved = found.statistics.get(leaf)
            if moved is not None:
                statistics[i] |= {
                    "running_mean": Interval.around(moved.mean, dtype),
                    "running_var": Interval.around(moved.variance, dtype),
                    "num_batches_tracked": Interval.exact(torch.tensor(moved.batches)),
                }
    values, states = stepped(training, loop, arithmetic, gradients)
    if not training.options.get("keep_grads", True):
        gradients = [None] * len(gradients)
    return After(Interval.around(found.loss, dtype), values, gradients, states, statistics)


def stepped(
    training: Training, loop: Loop, arithmetic: Arithmetic, gradients: list[Interval | None]
) -> tuple[list[Interval], list[dict[str, Interval]]]:
    """Values and states after a step of the optimizer, if this call makes one; clips the gradients."""
    side = training.side
    parameters = side.parameters
    values = [Interval.exact(p.clone()) for p in parameters]
    states = [exact(side.optimizer.state.get(p, {})) for p in parameters]
    if (training.calls + 1) % training.accumulate == 0:
        there = [i for i, g in enumerate(gradients) if g is not None]
        found = clipped(loop, [g for g in gradients if g is not None], arithmetic)
        for i, made in zip(there, found, strict=True):
            gradients[i] = made
        for group in side.optimizer.param_groups if not training.skips else ():
            for i, p in enumerate(parameters):
                g = gradients[i]
                if g is not None and any(p is q for q in group["params"]):
                    values[i], moved = arithmetic.step(side.optimizer, group, values[i], g, states[i])
                    states[i] = states[i] | moved
    return values, states


def exact(state: Mapping[str, Any]) -> dict[str, Interval]:
    """As they are now, which the call may change in place."""
    return {key: Interval.exact(x.clone()) for key, x in state.items() if isinstance(x, Tensor)}


def check(case: Case, training: Training, after: After, loss: Tensor, twin_loss: Tensor, twin: Side) -> None:
    """What a step has left, and that there is nothing else."""
    ours, is_open = training.side, nan_is_open(activations_in(training.side.leaves))
    case.require(loss.dim() == 0 and not loss.requires_grad, f"the loss is {loss!r}")
    case.require(loss.dtype == twin_loss.dtype, f"the loss has dtype {loss.dtype}, PyTorch's {twin_loss.dtype}")
    compare(case, loss, after.loss, twin_loss, "loss")
    for i, (p, q) in enumerate(zip(ours.parameters, twin.parameters, strict=True)):
        has = [x.grad is not None for x in (p, q)]
        case.require(has[0] == has[1], f"gradient {i} is {'there' if has[0] else 'None'}, PyTorch's is not so")
        bound = after.gradients[i]
        if p.grad is not None and q.grad is not None:
            assert bound is not None, "the oracle has no gradient where PyTorch has"
            case.require(p.grad.dtype == q.grad.dtype, f"gradient {i} has dtype {p.grad.dtype}")
            case.require(not p.grad.is_inference(), f"gradient {i} is an inference tensor")
            compare(case, p.grad, bound, q.grad, f"gradient {i} {tuple(p.shape)} by {p.stride()}", is_open)
        mine, theirs = tensors(ours.optimizer.state.get(p, {})), tensors(twin.optimizer.state.get(q, {}))
        case.require(set(mine) == set(theirs), f"state {i} has {sorted(mine)}, PyTorch's {sorted(theirs)}")
        for key, x in mine.items():
            case.require(x.shape == theirs[key].shape, f"{key} {i} has shape {tuple(x.shape)}")
            case.require(not x.is_inference(), f"{key} {i} is an inference tensor")
            compare(case, x, after.states[i][key], theirs[key], f"{key} {i}", is_open)
        value = unless_overflowing(after.values[i], after.states[i], p.dtype)
        compare(case, p.detach(), value, q.detach(), f"parameter {i} {tuple(p.shape)} by {p.stride()}", is_open)
    for i, buffers in after.statistics.items():
        mine, theirs = tensors(ours.leaves[i]._buffers), tensors(twin.leaves[i]._buffers)
        case.require(set(mine) == set(buffers) == set(theirs), f"buffers of leaf {i}: {sorted(mine)}")
        for key, x in mine.items():
            if x.is_floating_point():
                compare(case, x, buffers[key], theirs[key], f"{key} of leaf {i}")
            else:
                counts = x.item(), theirs[key].item(), buffers[key].low.item()
                case.require(len(set(counts)) == 1, f"{key} of leaf {i} is {counts[0]}, PyTorch's {counts[1]}")


def tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: x for key, x in state.items() if isinstance(x, Tensor)}


def unless_overflowing(value: Interval, states: Mapping[str, Interval], dtype: torch.dtype) -> Interval:
    """A parameter's interval, without bounds where some state is too large for the dtype: it is infinite there."""
    limit = torch.finfo(dtype).max * 0.99
    too_large = torch.zeros_like(value.low, dtype=torch.bool)
    for state in states.values():
        if state.low.numel() == too_large.numel():
            too_large |= ~(state.magnitude < limit)
    return Interval(torch.where(too_large, -torch.inf, value.low), torch.where(too_large, torch.inf, value.high))


def compare(case: Case, found: Tensor, bound: Interval, native: Tensor, what: str, is_open: bool = False) -> None:
    """Within an interval, or as far outside as PyTorch is; where PyTorch is not finite, as it is."""
    case.require(found.shape == native.shape, f"{what}: shape {tuple(found.shape)} for {tuple(native.shape)}")
    ours, theirs = found.detach().flatten().double(), native.detach().flatten().double()
    limit = torch.finfo(found.dtype).max * 0.99
    regular = bound.low.isfinite() & bound.high.isfinite() & (bound.magnitude < limit)
    unbounded = (bound.low == -torch.inf) & (bound.high == torch.inf)
    if found.dtype == torch.bfloat16:
        # Subnormal numbers are zero where the processor's own instruction stores.
        smallest = torch.finfo(found.dtype).smallest_normal
        bound = Interval(bound.low - smallest, bound.high + smallest)
    pattern = (ours == theirs) | (ours.isnan() & theirs.isnan()) | (ours.isfinite() & theirs.isfinite())
    special = (bound.low.isnan() | bound.high.isnan()) & ~unbounded & ~(ours.isnan() & is_open)
    wrong = torch.where(regular, bound.outside(ours), ~pattern & special)
    if not wrong.any():
        return case.agreed()
    alike = torch.where(regular, bound.outside(theirs), False)
    if not (wrong & ~alike).any():
        case.outcomes["beyond the bounds, as PyTorch is"] += 1
        return None
    at = int((wrong & ~alike).nonzero()[0])
    raise Disagreement(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} are outside, the first at {at}: {ours[at].item():.9g} is not "
        f"in [{bound.low[at].item():.9g}, {bound.high[at].item():.9g}], PyTorch has {theirs[at].item():.9g}"
    )

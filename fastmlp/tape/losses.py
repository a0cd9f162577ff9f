"""Losses and their gradients as the instructions of `elements.py`: entries of the table in `decompose.py`."""

import math
from collections.abc import Callable
from typing import Any

import torch

from fastmlp.tape.elements import Emitter, Operand, Rule, leave_to_torch

__all__ = ["LOSSES"]

_MEAN, _SUM = 1, 2  # torch's numbers for the reductions of losses


def _reduced(to: Emitter, losses: Operand, reduction: int, output: int) -> None:
    to.reduce(losses, "sum", None, output, 1 / to.count(losses) if reduction == _MEAN else 1.0)


def _loss(elements: Callable[[Emitter, dict[str, Any], Any], Operand]) -> Rule:
    def rule(to: Emitter, given: dict[str, Any], output: int) -> None:
        reduction = given["reduction"]
        if reduction in (_MEAN, _SUM):
            _reduced(to, elements(to, given, None), reduction, output)
        else:
            elements(to, given, output)

    return rule


def _squares(to: Emitter, given: dict[str, Any], output: int | None) -> Operand:
    return to.emit("square", to.emit("sub", to.operand(given["self"]), to.operand(given["target"])), output=output)


def _bce(to: Emitter, given: dict[str, Any], output: int | None) -> Operand:
    if given.get("weight") is not None or given.get("pos_weight") is not None:
        leave_to_torch()
    operands = to.operand(given["self"]), to.operand(given["target"])
    return to.emit("bce_with_logits", *operands, output=output)


def _smooth(number: str) -> Callable[[Emitter, dict[str, Any], Any], Operand]:
    """Squares for small differences, and their absolute values for large ones."""

    def elements(to: Emitter, given: dict[str, Any], output: int | None) -> Operand:
        edge = given[number]
        size = to.emit("abs", to.emit("sub", to.operand(given["self"]), to.operand(given["target"])))
        half = to.emit("mul", to.emit("square", size), 0.5)
        if number == "delta":
            far = to.emit("mul", to.emit("sub", size, 0.5 * edge), edge)
            return to.emit("where", to.emit("le", size, edge), half, far, output=output)
        if edge == 0:
            leave_to_torch()
        far = to.emit("sub", size, 0.5 * edge)
        return to.emit("where", to.emit("lt", size, edge), to.emit("div", half, edge), far, output=output)

    return elements


def _norm_of(to: Emitter, given: dict[str, Any]) -> float:
    """What a loss's gradient is multiplied by where the loss is a mean."""
    difference = torch.broadcast_shapes(*(to.sizes(to.operand(given[name])) for name in ("self", "target")))
    return 1 / max(math.prod(difference), 1) if given["reduction"] == _MEAN else 1.0


def _squares_backward(to: Emitter, given: dict[str, Any], output: int) -> None:
    difference = to.emit("sub", to.operand(given["self"]), to.operand(given["target"]))
    slope = to.emit("mul", difference, 2 * _norm_of(to, given))
    to.emit("mul", slope, to.operand(given["grad_output"]), output=output)


def _smooth_backward(number: str) -> Rule:
    def rule(to: Emitter, given: dict[str, Any], output: int) -> None:
        edge = given[number]
        if edge == 0:
            leave_to_torch()
        difference = to.emit("sub", to.operand(given["self"]), to.operand(given["target"]))
        inner = to.emit("clamp_min", difference, scalars=(-edge,))
        inner = to.emit("clamp_max", inner, scalars=(edge,))
        norm = _norm_of(to, given)
        slope = to.emit("mul", inner, norm if number == "delta" else norm / edge)
        to.emit("mul", slope, to.operand(given["grad_output"]), output=output)

    return rule


LOSSES: dict[str, Rule] = {
    "mse_loss": _loss(_squares),
    "mse_loss_backward": _squares_backward,
    "binary_cross_entropy_with_logits": _loss(_bce),
    "smooth_l1_loss": _loss(_smooth("beta")),
    "smooth_l1_loss_backward": _smooth_backward("beta"),
    "huber_loss": _loss(_smooth("delta")),
    "huber_loss_backward": _smooth_backward("delta"),
}

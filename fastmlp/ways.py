"""What each way of fastmlp makes of a model as it is written, and why not, for `explain(model)` and `check`."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fastmlp import problems
from fastmlp._errors import described
from fastmlp.capture import Captured, CaptureError, capture
from fastmlp.convert import convert
from fastmlp.frozen import freeze
from fastmlp.tape.report import Report as Recorded
from fastmlp.walking import unfused_calls

__all__ = ["Answer", "Explanation", "explain_captured", "explain_model", "target_for"]

#: Losses whose target is a class for each row.
_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss)
#: Training steps that are captured: two recordings and a replay.
_STEPS = 3


class Answer(NamedTuple):
    """What one way makes of a model.

    Attributes:
        way: its name.
        taken: whether it takes all of the model that it is made for; None if that was not tried.
        lines: what comes of it, or the reasons why it does not take the model; at least one.
    """

    way: str
    taken: bool | None
    lines: tuple[str, ...]


class Explanation(tuple[Answer, ...]):
    """What `explain` found of a model, an `Answer` for each way. Printed, lines for each."""

    def __repr__(self) -> str:
        width = max((len(answer.way) for answer in self), default=0) + 2
        lines = []
        for answer in self:
            for way, line in zip((answer.way, *[""] * len(answer.lines)), answer.lines, strict=False):
                lines.append(f"{way:{width}}{line}")
        return "\n".join(lines)

    __str__ = __repr__


def explain_model(
    model: nn.Module,
    inputs: tuple[Any, ...] | None,
    target: Tensor | None,
    loss_fn: Callable[..., Tensor] | None,
    optimizer: torch.optim.Optimizer | None,
    report: Callable[[nn.Module], Any],
) -> Explanation:
    """What `explain` says of a model without an input of a call; see there.

    Args:
        model: of any class; it stays as it is.
        inputs: examples of the forward's arguments, or None.
        target: what the loss compares the output with, or None.
        loss_fn: the loss, or None for the mean squared error.
        optimizer: of the model's parameters, or None for Adam.
        report: `fusion_report`, which is above this file.
    """
    if inputs is not None and (not isinstance(inputs, tuple) or not inputs):
        raise TypeError(
            f"fastmlp: inputs must be a tuple of the forward's arguments, got {described(inputs)}; for a single one "
            "pass inputs=(x,)"
        )
    loss_fn = nn.MSELoss() if loss_fn is None else loss_fn
    answers = [
        _reported("as it is", lambda: model, report),
        _reported("convert(model)", lambda: convert(copy.deepcopy(model)), report),
        _reported("convert(model, trace=True)", lambda: convert(copy.deepcopy(model), True, inputs), report),
    ]
    answers.append(_tried("freeze(model)", lambda: repr(freeze(copy.deepcopy(model).eval(), inputs=_sizes(inputs)))))
    answers.append(_train_step(model, loss_fn, optimizer))
    answers.append(_captured(model, inputs, target, loss_fn, optimizer))
    return Explanation(answers)


def explain_captured(function: Captured[..., Any]) -> Explanation:
    """What `explain` says of a captured function: its report, and why it runs as it is if it does."""
    report = function.report()
    way = f"capture({report.name})"
    if function.refused is not None:
        return Explanation([Answer(way, False, (function.refused,))])
    if not report.tapes:
        line = f"{report.line()}: a function is recorded in its first two calls with the same shapes"
        return Explanation([Answer(way, None, (line,))])
    return Explanation([Answer(way, True, tuple(str(report).splitlines()))])


def _sizes(inputs: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """The examples that `freeze` takes: tensors alone, where there are several."""
    return inputs if inputs is not None and all(isinstance(one, Tensor) for one in inputs) else None


def _text(error: BaseException) -> str:
    return str(error).removeprefix("fastmlp: ") or type(error).__name__


def _tried(way: str, found: Callable[[], str]) -> Answer:
    """The answer of a way that says why not by raising."""
    try:
        return Answer(way, True, (found(),))
    except (TypeError, ValueError, RuntimeError) as error:
        return Answer(way, False, (_text(error),))


def _reported(way: str, made: Callable[[], nn.Module], report: Callable[[nn.Module], Any]) -> Answer:
    """The answer of a way whose model tells what of it is fused."""
    try:
        found = made()
        entries = report(found)
    except (TypeError, ValueError, RuntimeError) as error:
        return Answer(way, False, (_text(error),))
    others = unfused_calls(found) if isinstance(found, fx.GraphModule) else {}
    lines = [*str(entries).splitlines(), *(f"kept   {name}: {reason}" for name, reason in others.items())]
    fused = any(not entry.reason for entry in entries)
    kept = any(entry.reason for entry in entries) or bool(others)
    return Answer(way, fused and not kept, tuple(lines if fused else ["fused  nothing", *lines]))


def _adam(model: nn.Module) -> torch.optim.Optimizer | None:
    parameters = list(model.parameters())
    return torch.optim.Adam(parameters) if parameters else None


def _train_step(model: nn.Module, loss_fn: Callable[..., Tensor], optimizer: torch.optim.Optimizer | None) -> Answer:
    optimizer = _adam(model) if optimizer is None else optimizer
    if optimizer is None:
        return Answer("TrainStep", False, ("the model has no parameters, and there is nothing to train",))
    reasons = problems.explain(model, loss_fn, optimizer)
    loss = type(problems.module_of_loss(loss_fn)).__name__
    taken = f"takes it with {loss} and {type(optimizer).__name__}"
    return Answer("TrainStep", not reasons, reasons or (taken,))


def _captured(
    model: nn.Module,
    inputs: tuple[Any, ...] | None,
    target: Tensor | None,
    loss_fn: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer | None,
) -> Answer:
    if inputs is None:
        return Answer("capture", None, ("not tried: it needs examples of the forward's arguments, inputs=(...)",))
    copied, own = copy.deepcopy((model, optimizer))
    own = _adam(copied) if own is None else own
    if own is None:
        return Answer("capture", False, ("the model has no parameters, and there is nothing to train",))
    with torch.random.fork_rng(devices=_indices(inputs)):
        with torch.no_grad():
            outputs = _tensors(copied(*inputs))
        if not outputs:
            return Answer("capture", False, ("the forward returns no tensor, and there is nothing to train",))
        wanted = target_for(outputs[0], loss_fn) if target is None else target

        @capture
        def step(*arguments: Any) -> Tensor:
            own.zero_grad()
            loss = _loss_of(copied(*arguments[:-1]), arguments[-1], loss_fn)
            loss.backward()
            own.step()
            return loss

        try:
            for _ in range(_STEPS):
                step(*inputs, wanted)
        except CaptureError as error:
            return Answer("capture", False, (_text(error),))
    return Answer("capture", True, _recorded(step.report()))


def _indices(inputs: tuple[Any, ...]) -> list[int]:
    return sorted({one.device.index for one in inputs if isinstance(one, Tensor) and one.device.index is not None})


def _recorded(report: Recorded) -> tuple[str, ...]:
    """A line on who computes what of a captured step."""
    lines = ["takes a training step"]
    for tape in report.tapes:
        found = str(tape).splitlines()
        lines += [line for line in found if line.startswith(("by fastmlp", "optimizers"))]
    return tuple(lines)


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(output, Tensor):
        return [output]
    inner = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for one in inner for tensor in _tensors(one)]


def target_for(output: Tensor, loss_fn: Callable[..., Tensor]) -> Tensor:
    """What a loss compares an output with, if nobody said: zeros, or the first class of each row."""
    if isinstance(problems.module_of_loss(loss_fn), _OF_CLASSES):
        classes = (*output.shape[:1], *output.shape[2:]) if output.dim() > 1 else ()
        return torch.zeros(classes, dtype=torch.int64, device=output.device)
    return torch.zeros_like(output)


def _loss_of(output: Any, target: Tensor, loss_fn: Callable[..., Tensor]) -> Tensor:
    """The loss of the first tensor of a result, with the squares of the others added so that all of it is trained."""
    first, *others = _tensors(output)
    loss: Tensor = loss_fn(first, target)
    return loss + sum((other.square().mean() for other in others), torch.zeros(()).to(loss))

"""The ways in which the library takes a program: converted, frozen, in a `TrainStep`, captured; and why it does not."""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import fastmlp
from tests.support.subjects import Step, Subject, in_a_loop

Optimizers = Sequence[torch.optim.Optimizer]


def in_one_call(subject: Subject, model: nn.Module, optimizers: Optimizers) -> Step:
    """Returns the `TrainStep` of a program."""
    (optimizer,) = optimizers
    return fastmlp.TrainStep(model, subject.criterion, optimizer)


def captured(subject: Subject, model: nn.Module, optimizers: Optimizers) -> Step:
    """Returns the step captured."""
    return fastmlp.capture(in_a_loop(subject, model, optimizers))


def captured_exactly(subject: Subject, model: nn.Module, optimizers: Optimizers) -> Step:
    """Returns the step captured with the bits of PyTorch's kernels."""
    return fastmlp.capture(in_a_loop(subject, model, optimizers), fuse=False)


def why_no_train_step(subject: Subject, model: nn.Module) -> str:
    """Says why no `TrainStep` takes a program; nothing if one does."""
    if subject.loop:
        return f"the loop is {subject.loop}"
    if subject.several:
        return subject.several
    reasons = fastmlp.TrainStep.explain(model, subject.criterion, subject.optimizers(model)[0])
    return "; ".join(reason for reason in reasons if not reason.startswith("fastmlp.capture takes"))


def why_not_captured(subject: Subject, model: nn.Module) -> str:
    """Says why a program's step cannot be captured; nothing if its third call is a replay."""
    if subject.loop:
        return f"the loop is {subject.loop}"
    model = copy.deepcopy(model)
    step: Any = captured(subject, model, subject.optimizers(model))
    try:
        for i in range(3):
            step(*subject.batch(i))
    except fastmlp.CaptureError as error:
        return _in_one_line(error)
    return "" if step.replays == 1 else "its calls differ"


def frozen(subject: Subject, model: nn.Module) -> fastmlp.FrozenMLP | str:
    """Freezes what a program serves, or says why that cannot be."""
    try:
        return fastmlp.freeze(subject.served(model).eval(), inputs=subject.requests(2))
    except (TypeError, RuntimeError, ValueError) as error:
        return _in_one_line(error)


def converted(subject: Subject, model: nn.Module, trace: bool) -> nn.Module | str:
    """Converts a program's model, or says why it cannot be recorded."""
    try:
        return subject.convert(model, trace)
    except RuntimeError as error:
        return _in_one_line(error)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).removeprefix("fastmlp: ").split())


class _Weights(TorchFunctionMode):
    """Notes the weights of all linear layers that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.found[id(weight)] = weight
        return func(*args, **(kwargs or {}))


def linears(subject: Subject, model: nn.Module) -> int:
    """Counts the linear layers of a program that is not converted: the weights that its loss calls `F.linear` with."""
    with _Weights() as weights:
        subject.loss(copy.deepcopy(model), *subject.batch(0))
    return len(weights.found)


@dataclass(frozen=True)
class Fused:
    """How many linear layers of a model run fused.

    Attributes:
        layers: their number.
        runs: operations that they are.
    """

    layers: int
    runs: int


def fused(model: nn.Module) -> Fused:
    """Counts the linear layers in `fastmlp.fusion_report` of a converted model: modules, and calls of `F.linear`."""
    modules = dict(model.named_modules())

    def is_layer(name: str) -> bool:
        module = modules.get(name)
        if module is not None:
            return isinstance(module, nn.Linear)
        # Of a call the report has the name of a node: the function's, with a number from the second one on.
        return re.search(r"(^|\.)linear(_\d+)?$", name) is not None

    runs = [sum(map(is_layer, entry.names)) for entry in fastmlp.fusion_report(model) if not entry.reason]
    return Fused(sum(runs), sum(n > 0 for n in runs))

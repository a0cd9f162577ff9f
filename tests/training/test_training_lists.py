"""Losses and optimizers are in every list that has to name them, for all that the extension reports.

Lists that only one file of tests reads are compared there, in tests called `test_what_is_enumerated`,
`test_what_is_drawn` and `test_options_of_all_losses`.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastmlp
from fastmlp import optim, problems
from fastmlp._load import _C
from tests.attack.sides import TORCHS
from tests.support.bounds import Bounded
from tests.support.endings import LOSSES_AFTER
from tests.support.optimizers import ARGUMENTS, checked_step
from tests.support.rounding import STEPS, UPDATES
from tests.support.training import LOSSES, OPTIMIZERS, draw_loss, draw_optimizer, loss_bounds, optimizer_of, targets

REPORTED_LOSSES = [name for name, *_ in _C.losses()]
REPORTED_OPTIMIZERS = [name for classes, _ in _C.rules() for name in classes]
#: What `draw_loss` makes, in all its forms.
DRAWN = [
    draw_loss(random.Random(number), name, number, 3, torch.float64)
    for number in range(8)
    for name in dict.fromkeys(LOSSES)
]
CAPTURE = (Path(__file__).parents[2] / "docs" / "capture.md").read_text(encoding="utf-8")
#: What operators write without rounding it.
EXACT = ("copy", "fill", "maximum", "neg", "zero")


class Called(TorchDispatchMode):
    """Keeps the operators that are called, and the tensors that they get first."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.calls.append((func, args[0] if args else None))
        return func(*args, **(kwargs or {}))


def called(function: Callable[[], object]) -> list[tuple[Any, Any]]:
    with Called() as mode:
        function()
    return mode.calls


def test_losses() -> None:
    after = {name: follows for name, *_, follows in _C.losses() if follows is not None}
    assert after == {kind.__name__: follows for kind, follows in LOSSES_AFTER.items()}
    assert set(after.values()) == set(problems.TAKEN)
    assert set(REPORTED_LOSSES) == {type(loss).__name__ for loss in DRAWN} | set(after)
    assert set(REPORTED_LOSSES) == {kind.__name__ for kind in problems.FUNCTIONS.values()}


def test_optimizers() -> None:
    reported = set(REPORTED_OPTIMIZERS)
    assert reported == set(optim.__all__) == set(OPTIMIZERS) == set(ARGUMENTS) == {kind.__name__ for kind in TORCHS}


def test_documents() -> None:
    of_step, of_capture = fastmlp.TrainStep.__doc__ or "", fastmlp.capture.__doc__ or ""
    functions = [function.__name__ for function in problems.FUNCTIONS]
    assert [name for name in [*REPORTED_LOSSES, *functions] if f"{name}`" not in of_step] == []
    for text in (of_step, of_capture, CAPTURE):
        assert [name for name in REPORTED_OPTIMIZERS if f"`{name}`" not in text and f".{name}`" not in text] == []


@pytest.mark.parametrize("loss_fn", DRAWN, ids=repr)
def test_bounds_of_losses(loss_fn: nn.Module) -> None:
    """They hold of torch's own loss, and are made for this one."""
    torch.manual_seed(0)
    output = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    target = targets(loss_fn, output.shape, torch.float64)
    loss = loss_fn(output, target)
    (gradient,) = torch.autograd.grad(loss, output)
    value, slope = loss_bounds(loss_fn, Bounded.exact(output.detach()), target, torch.float64)
    assert bool((loss.detach() - value.value).abs() <= value.error)
    assert bool(((gradient - slope.value).abs() <= slope.error).all())


@pytest.mark.parametrize("loss_fn", DRAWN, ids=repr)
def test_roundings_of_losses(loss_fn: nn.Module) -> None:
    output = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    target = targets(loss_fn, output.shape, torch.float64)
    calls = called(lambda: loss_fn(output, target).backward())
    of_loss = {func for func, _ in calls if "loss" in str(func) or "entropy" in str(func)}
    # It writes the negative weights of classes, which it is given.
    assert of_loss <= {*STEPS, torch.ops.aten.nll_loss_backward.default}


def rounds(func: Any, first: Any) -> bool:
    """Whether an operator writes numbers that it has rounded. The count of steps, without dimensions, is exact."""
    name = func._schema.name.removeprefix("aten::").removeprefix("_foreach_").removesuffix("_")
    tensors = [x for x in (first if isinstance(first, list) else [first]) if isinstance(x, torch.Tensor)]
    numbers = any(x.is_floating_point() and x.dim() > 0 for x in tensors)
    return bool(func._schema.is_mutable) and numbers and name not in EXACT


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", REPORTED_OPTIMIZERS)
def test_roundings_of_steps(name: str, foreach: bool) -> None:
    for seed in range(20):
        p = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
        arguments = draw_optimizer(random.Random(seed), name) | {"foreach": foreach}
        optimizer = optimizer_of(torch.optim, name, arguments, [p])
        for _ in range(2):
            p.grad = torch.randn_like(p)
            rounding = {func for func, first in called(optimizer.step) if rounds(func, first)}
            assert rounding <= UPDATES, arguments


@pytest.mark.parametrize("name", REPORTED_OPTIMIZERS)
def test_intervals_of_steps(name: str) -> None:
    p = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    optimizer = optimizer_of(torch.optim, name, ARGUMENTS[name], [p])
    for _ in range(2):
        p.grad = torch.randn_like(p)
        checked_step(optimizer)

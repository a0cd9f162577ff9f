"""Losses that `TrainStep` is given as functions of `torch.nn.functional`: they mean what the modules mean."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastmlp
from fastmlp import problems
from tests.support.axes import ISAS
from tests.support.endings import LOSSES_AFTER
from tests.support.rounding import Results
from tests.support.training import Maker, assert_equal_to_rounding, everything

pytestmark = pytest.mark.usefixtures("as_before")

#: Each function that is taken after any layer, and the module that computes the same.
FUNCTIONS: dict[Callable[..., Tensor], type[nn.Module]] = {
    function: kind for function, kind in problems.FUNCTIONS.items() if kind not in LOSSES_AFTER
}
LOSSES = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches(function: Callable[..., Tensor], steps: int) -> list[tuple[Tensor, Tensor]]:
    """Residuals are on both sides of 1, where some of the losses bend."""
    torch.manual_seed(1)
    inputs = [torch.randn(6, 4, dtype=torch.float64) for _ in range(steps)]
    if function is F.cross_entropy:
        return [(x, torch.randint(3, (6,)).index_fill(0, torch.tensor([2]), -100)) for x in inputs]
    if function is F.binary_cross_entropy_with_logits:
        return [(x, torch.rand(6, 3, dtype=torch.float64)) for x in inputs]
    return [(x, 2 * torch.randn(6, 3, dtype=torch.float64)) for x in inputs]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3)


@LOSSES
def test_equals_the_loop(function: Any) -> None:
    def scenario(make: Maker) -> Results:
        model = network()
        optimizer = adam(model)
        step = make(model, function, optimizer)
        losses = [step(*pair) for pair in batches(function, 50)]
        return {"losses": torch.stack(losses), **everything(model, optimizer)}

    assert_equal_to_rounding(scenario, ISAS)


@LOSSES
def test_bits_are_those_of_the_module(function: Any) -> None:
    found = []
    for loss_fn in (function, FUNCTIONS[function]()):
        model = network()
        step = fastmlp.TrainStep(model, loss_fn, adam(model))
        found.append([*(step(*pair) for pair in batches(function, 5)), *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@LOSSES
def test_stays_a_function(function: Any) -> None:
    model = network()
    step = fastmlp.TrainStep(model, function, adam(model))
    assert step.loss_fn is function
    assert repr(step) == f"TrainStep(Sequential, {FUNCTIONS[function].__name__}, Adam)"
    for copied in (copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        assert copied.loss_fn is function
        # Each has a network of its own with the same parameters, so that the first losses are equal.
        other = network()
        (pair,) = batches(function, 1)
        assert torch.equal(copied(*pair), fastmlp.TrainStep(other, function, adam(other))(*pair))


@pytest.mark.parametrize(
    ("function", "name"),
    [(F.soft_margin_loss, "soft_margin_loss"), (lambda output, target: (output - target).mean(), "<lambda>")],
    ids=["of torch", "of the user"],
)
def test_other_functions_are_refused_by_name(function: Any, name: str) -> None:
    model = network()
    with pytest.raises(TypeError, match=rf"loss_fn is the function {name}, expected .* MSELoss.* mse_loss.*capture"):
        fastmlp.TrainStep(model, function, adam(model))

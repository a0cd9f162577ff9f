"""A network, data and an optimizer for tests of TrainStep, and checks that TrainStep refuses what it cannot do."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmlp
from tests.support.training import Optimizer, Step

F64 = torch.float64
ERRORS = (RuntimeError, TypeError, ValueError, IndexError)
explain: Any = fastmlp.TrainStep.explain
make: Any = fastmlp.TrainStep


def network(dtype: torch.dtype = F64) -> Any:
    layers = [nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.GELU(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).to(dtype)


def batch(dtype: torch.dtype = F64, rows: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 6, dtype=dtype), torch.randn(rows, 3, dtype=dtype)


def losses(step: Step, calls: int = 4) -> Tensor:
    return torch.stack([step(*batch()) for _ in range(calls)])


def sgd(parameters: Any, **arguments: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, **({"lr": 0.05, "momentum": 0.9} | arguments))


def gradients_left_behind(model: Any, optimizer: Optimizer) -> None:
    """As if something else had called `backward` since the last step."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)


def refused(model: nn.Module, loss_fn: Any, optimizer: Any, text: str) -> None:
    """Asserts that TrainStep raises an error with this text, and that `explain` gives its reasons in the same words."""
    reasons = explain(model, loss_fn, optimizer)
    assert isinstance(reasons, tuple)
    assert len(reasons) > 0
    assert all(isinstance(reason, str) and reason for reason in reasons)
    with pytest.raises(TypeError, match=text) as error:
        make(model, loss_fn, optimizer)
    assert str(error.value).startswith("fastmlp: ")
    assert [reason for reason in reasons if reason not in str(error.value)] == []


def snapshot(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    """Values, version counters and identities of all that a step writes."""
    found: list[Any] = []
    for p in model.parameters():
        tensors = [p, *([] if p.grad is None else [p.grad]), *optimizer.state.get(p, {}).values()]
        found += [(id(x), x._version, x.detach().tolist()) for x in tensors if x.device.type != "meta"]
    return found


def unchanged(step: Any, model: nn.Module, optimizer: Optimizer, input: Any, target: Any, text: str) -> None:
    """Asserts that a call raises an error with this text, and that nothing has been written before."""
    before = snapshot(model, optimizer)
    with pytest.raises(ERRORS, match=text) as error:
        step(input, target)
    assert str(error.value).startswith("fastmlp: ")
    assert snapshot(model, optimizer) == before

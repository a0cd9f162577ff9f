"""Forwards with more arguments than their input, and subclasses of Sequential: recorded, frozen and trained."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import convert, freeze
from fastmlp.trace import run_chain
from tests.support.axes import ISAS
from tests.support.derivatives import assert_same
from tests.support.rounding import Results
from tests.support.training import Maker, assert_equal_to_rounding, everything

pytestmark = pytest.mark.usefixtures("as_before")

F64 = torch.float64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 8, dtype=F64), nn.Linear(8, 2, dtype=F64)

    def layers(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))

    def forward(self, x: Any) -> Any:
        return self.layers(x)


class Keywords(Net):
    """As the networks of skorch's documentation take what else a data set has."""

    def forward(self, X: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return self.layers(X)


class Defaults(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None, return_hidden: bool = False) -> Any:
        h = torch.relu(self.a(x))
        y = self.b(h)
        if mask is not None:
            y = y * mask
        return (y, h) if return_hidden else y


class More(Net):
    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.layers(x)


class KeywordOnly(Net):
    def forward(self, x: Tensor, *, deterministic: bool = True) -> Tensor:
        return self.layers(x)


class Stack(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(3, 8, dtype=F64), nn.ReLU(), nn.Linear(8, 2, dtype=F64))


class CallingStack(Stack):
    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = super().forward(input)
        return output


class LoopingStack(Stack):
    def forward(self, input: Tensor) -> Tensor:
        for module in self:
            input = module(input)
        return input


class OurStack(fastmlp.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(3, 8, dtype=F64), nn.ReLU(), nn.Linear(8, 2, dtype=F64))


models = pytest.mark.parametrize(
    "make", [Keywords, Defaults, More, KeywordOnly, Stack, CallingStack, LoopingStack, OurStack]
)


def inputs(rows: int = 7) -> Tensor:
    torch.manual_seed(rows)
    return torch.randn(rows, 3, dtype=F64)


@models
def test_recorded_and_frozen(make: Callable[[], nn.Module]) -> None:
    model = make()
    traced: Any = convert(model, trace=True)
    (chain,) = (node for node in traced.graph.nodes if node.target is run_chain)
    assert len(chain.args[1]) == 3
    frozen = freeze(model)
    with torch.no_grad():
        assert_same([traced(inputs()), frozen(inputs())], [model(inputs())] * 2)


@models
def test_fifty_steps(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    batches = [(torch.randn(7, 3, dtype=F64), torch.randn(7, 2, dtype=F64)) for _ in range(50)]

    def scenario(step: Maker) -> Results:
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        run = step(model, nn.MSELoss(), optimizer)
        return {"losses": torch.stack([run(*pair) for pair in batches]), **everything(model, optimizer)}

    assert_equal_to_rounding(scenario, ISAS)


def test_arguments_that_are_used_stay_refused() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return self.layers(x) * kwargs.get("scale", 1)

    # A product is no part of a chain; the graph has the number that the forward takes without such an argument.
    model = Scaled()
    frozen: Any = freeze(model)
    with torch.no_grad():
        assert_same([frozen(inputs())], [model(inputs())])
    with pytest.raises(TypeError):
        frozen(inputs(), scale=2)
    traced = convert(Defaults(), trace=True)
    with pytest.raises(ValueError, match="argument return_hidden of a recorded forward must be its default"):
        traced(inputs(), return_hidden=True)


class Classifier(nn.Module):
    """The first network of skorch's documentation in our words: a forward with keywords, dropout, and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dense0, self.dense1 = nn.Linear(20, 10, dtype=F64), nn.Linear(10, 10, dtype=F64)
        self.nonlin, self.dropout = nn.ReLU(), nn.Dropout(0.5)
        self.output, self.softmax = nn.Linear(10, 2, dtype=F64), nn.Softmax(dim=-1)

    def forward(self, X: Tensor, **kwargs: Any) -> Tensor:
        X = self.dropout(self.nonlin(self.dense0(X)))
        X = self.nonlin(self.dense1(X))
        return self.softmax(self.output(X))


def test_a_classifier_with_keywords_is_frozen() -> None:
    model = Classifier().eval()
    frozen = freeze(model)
    x = torch.randn(50, 20, dtype=F64)
    with torch.no_grad():
        assert_same([frozen(x)], [model(x)])
    assert repr(frozen) == "FrozenMLP(20 -> 10 relu -> 10 relu -> 2 -> softmax, torch.float64)"

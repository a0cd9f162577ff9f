"""Layers that a forward calls as functions, `F.linear(x, self.weight, self.bias)`: recorded, frozen and trained."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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


class OwnLinear(nn.Module):
    """As libraries write theirs, with an initialisation of their own."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=F64))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=F64))
        else:
            self.register_parameter("bias", None)
        nn.init.uniform_(self.weight, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Activated(OwnLinear):
    """A layer and its activation in one, as networks for fields have them."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(F.linear(x, self.weight, self.bias))


class Keywords(OwnLinear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(input=x, weight=self.weight, bias=self.bias)


class Network(nn.Module):
    """Layers of this kind, and activations as functions and as modules."""

    def __init__(self, layer: Callable[..., nn.Module] = OwnLinear) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = layer(3, 8), layer(8, 8, bias=False), layer(8, 2)
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.act(self.second(torch.relu(self.first(x)))))


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(Activated(3, 8), Activated(8, 8), OwnLinear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Mixed(nn.Module):
    """With a layer of torch's among them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = OwnLinear(3, 8), nn.Linear(8, 8, dtype=F64), OwnLinear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.gelu(self.second(F.silu(self.first(x)))))


class Around(OwnLinear):
    """A layer that is called as a function by a module that holds the one before it."""

    def __init__(self) -> None:
        super().__init__(8, 2)
        self.first = nn.Linear(3, 8, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.first(x)), self.weight, self.bias)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "network": Network,
    "keywords": lambda: Network(Keywords),
    "field": Field,
    "mixed": Mixed,
    "sequential": lambda: nn.Sequential(OwnLinear(3, 8), nn.ReLU(), OwnLinear(8, 2)),
    "one layer": lambda: OwnLinear(3, 2),
    "around": Around,
    "around within": lambda: nn.Sequential(Around(), nn.Tanh()),
}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def chains(module: Any) -> list[int]:
    """How many members each call of a chain has."""
    return [len(node.args[1]) for node in module.graph.nodes if node.target is run_chain]


def inputs(rows: int = 7) -> Tensor:
    torch.manual_seed(rows)
    return torch.randn(rows, 3, dtype=F64, requires_grad=True)


def values(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients with respect to the input and all parameters."""
    output = model(x)
    return [output, *torch.autograd.grad(output.square().sum(), [x, *model.parameters()])]


# Recorded.


def test_is_one_chain() -> None:
    assert chains(convert(Network(), trace=True)) == [5]
    assert chains(convert(Field(), trace=True)) == [5]
    assert chains(convert(Mixed(), trace=True)) == [5]


@models
def test_equals_the_model(make: Callable[[], nn.Module]) -> None:
    model = make()
    traced = convert(model, trace=True)
    assert list(traced.state_dict()) == list(model.state_dict())
    assert [p is q for p, q in zip(traced.parameters(), model.parameters(), strict=True)]
    for isa in ISAS:
        fastmlp.set_isa(isa)
        for rows in (1, 7):
            assert_same(values(traced, inputs(rows)), values(model, inputs(rows)))


def test_gradients_of_gradients() -> None:
    traced = convert(Field(), trace=True)
    x = inputs(3)
    assert torch.autograd.gradcheck(traced, (x,))
    assert torch.autograd.gradgradcheck(traced, (x,))


def test_tensors_are_read_at_each_call() -> None:
    model = Network()
    traced: Any = convert(model, trace=True)
    x = inputs().detach()
    other = Network()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    traced.load_state_dict(other.state_dict(), assign=True)
    assert_same([traced(x)], [other(x)])
    traced.third.weight = nn.Parameter(torch.ones(2, 8, dtype=F64))
    other.third.weight = nn.Parameter(torch.ones(2, 8, dtype=F64))
    assert_same([traced(x)], [other(x)])
    traced.float()
    other.float()
    assert traced(x.float()).dtype == torch.float32
    torch.testing.assert_close(traced(x.float()), other(x.float()))


def test_copies_and_pickles() -> None:
    traced = convert(Mixed(), trace=True)
    x = inputs().detach()
    for copied in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), convert(traced, trace=True)):
        assert torch.equal(copied(x), traced(x))
        assert list(copied.state_dict()) == list(traced.state_dict())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled() -> None:
    traced = convert(Mixed(), trace=True)
    x = inputs().detach()
    compiled = torch.compile(traced, backend="eager", fullgraph=True)
    assert_same([compiled(x)], [traced(x)])


def test_under_transforms() -> None:
    traced = convert(Mixed(), trace=True)
    x = inputs().detach()
    assert_same([torch.func.vmap(traced)(x)], [traced(x)])


def test_reports_name_the_call() -> None:
    text = str(fastmlp.fusion_report(convert(Mixed(), trace=True)))
    assert "linear" in text
    assert "second" in text


def test_reports_name_a_layer_once() -> None:
    """By its call: its own forward is not executed, so that there is nothing that it does by itself."""
    report = fastmlp.fusion_report(convert(Network(), trace=True))
    assert [entry.reason for entry in report] == [""] * len(report)
    assert str(fastmlp.fusion_report(Network())).count("and may compute something else") == 3


class Computed(OwnLinear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(F.linear(x, self.weight * 2, self.bias))


class Vector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Square(OwnLinear):
    """Its weight is what goes through another layer."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.other = nn.Linear(3, 3, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.other(self.weight))


@pytest.mark.parametrize("make", [lambda: Computed(3, 2), Vector, Square])
def test_other_calls_stay_as_they_are(make: Callable[[], nn.Module]) -> None:
    model = make()
    traced = convert(model, trace=True)
    assert "linear(" in str(traced.code)
    assert_same([traced(inputs())], [model(inputs())])


def test_dropout_keeps_its_place() -> None:
    class Dropping(Network):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.dropout(torch.relu(self.first(x))))

    model = Dropping()
    traced = convert(model, trace=True)
    assert chains(traced) == [4]
    torch.manual_seed(3)
    expected = model(inputs())
    torch.manual_seed(3)
    assert_same([traced(inputs())], [expected])


# Frozen.


@models
def test_frozen(make: Callable[[], nn.Module]) -> None:
    model = make()
    frozen: Any = freeze(model)
    x = inputs().detach()
    with torch.no_grad():
        assert_same([frozen(x)], [model(x)])
        for p in model.parameters():
            p.mul_(2)
        assert_same([frozen(x)], [model(x)])
    changed: Any = next(m for m in model.modules() if isinstance(m, OwnLinear))
    changed.weight = nn.Parameter(torch.ones_like(changed.weight))
    with torch.no_grad():
        assert_same([frozen(x)], [model(x)])
    handle = changed.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="it has hooks"):
        frozen(x)
    handle.remove()
    with torch.no_grad():
        assert_same([frozen(x)], [model(x)])


def test_frozen_errors_name_the_parameter() -> None:
    model: Any = Network()
    model.second.weight = nn.Parameter(torch.ones(8, 8))
    with pytest.raises((RuntimeError, TypeError), match=r"second.weight has dtype torch.float32|same dtype"):
        freeze(model)


class Elsewhere(nn.Module):
    """Its layers' tensors are parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, dtype=F64))
        self.bias = nn.Parameter(torch.randn(4, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w, self.bias)


class Unused(OwnLinear):
    """It has a bias that is not added."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@pytest.mark.parametrize("make", [Elsewhere, lambda: Unused(3, 2)])
def test_tensors_of_other_names(make: Callable[[], nn.Module]) -> None:
    """A recording takes them; what follows a model by the names of its parameters does not."""
    model = make()
    traced = convert(model, trace=True)
    assert chains(traced) == [1]
    assert_same([traced(inputs())], [model(inputs())])
    with pytest.raises(TypeError, match="calls linear with other tensors than the weight and bias of one module"):
        freeze(model)


# Trained.


@models
def test_fifty_steps(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    batches = [(torch.randn(7, 3, dtype=F64), torch.randn(7, 2, dtype=F64)) for _ in range(50)]

    def scenario(step: Maker) -> Results:
        torch.manual_seed(2)
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        run = step(model, nn.MSELoss(), optimizer)
        return {"losses": torch.stack([run(*pair) for pair in batches]), **everything(model, optimizer)}

    assert_equal_to_rounding(scenario, ISAS)


def test_steps_follow_the_module() -> None:
    model: Any = Network()
    step = fastmlp.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    x, y = inputs().detach(), torch.zeros(7, 2, dtype=F64)
    step(x, y)
    model.second.weight = nn.Parameter(torch.ones(8, 8, dtype=F64))
    expected = nn.MSELoss()(model(x), y).item()
    assert step(x, y).item() == pytest.approx(expected, rel=1e-12)
    handle = model.second.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"second"):
        step(x, y)
    handle.remove()
    step(x, y)


def test_one_weight_twice_is_refused() -> None:
    class Tied(OwnLinear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(torch.relu(F.linear(x, self.weight, self.bias)), self.weight, self.bias)

    model = Tied(3, 3)
    with pytest.raises(TypeError, match="weight is weight once more"):
        fastmlp.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    frozen = freeze(model)
    with torch.no_grad():
        assert_same([frozen(inputs().detach())], [model(inputs().detach())])

"""`explain` as the one that answers why: of calls of modules of any class, of whole models, of captured functions."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import convert, explain
from fastmlp.ways import Answer

X = torch.zeros(3, 10)


class Own(nn.Module):
    """A class of one's own: an activation apart from its layer, a function, and a module that nothing fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.norm, self.fc2 = nn.Linear(10, 50), nn.ReLU(), nn.LayerNorm(50), nn.Linear(50, 1)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.act(self.fc1(x))) + 1)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(10, 50), nn.Linear(50, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Tokens(nn.Module):
    """Its input has a dtype without kernels; what reaches its layers has one."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(7, 4), fastmlp.MLP(4, [8], 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.table(x))


def test_a_plain_layer() -> None:
    assert explain(nn.Linear(10, 5), X) == ("composite", "model: it is not converted")
    assert explain(nn.Conv2d(2, 2, 1), torch.zeros(1, 2, 3, 3)).name == "composite"


def test_one_s_own_class() -> None:
    route = explain(convert(Own()), X)
    assert route.name == "children"
    assert "act: it is called by itself" in route.reason
    assert "Python executes the forward of Own, which calls fc1 and fc2 one after the other" in route.reason


def test_a_recorded_chain_is_direct() -> None:
    assert explain(convert(Chain(), trace=True), X) == ("direct", "")
    meta = explain(convert(Chain(), trace=True).to("meta"), X.to("meta"))
    assert meta == ("composite", "fc1 + relu + fc2: there are no kernels for the device")


def test_a_recorded_model_names_what_its_graph_calls() -> None:
    route = explain(convert(Own(), trace=True), X)
    assert route.name == "children"
    assert route.reason.startswith("norm: LayerNorm is neither a layer nor an activation, and is called by itself")
    assert "add: add is neither" in route.reason
    assert "act:" not in route.reason


def test_a_recorded_model_within_another() -> None:
    inner = convert(Own(), trace=True)
    outer = fastmlp.Sequential(fastmlp.Linear(10, 10), nn.ModuleDict({"inner": inner})["inner"])
    route = explain(outer, X)
    assert route == ("children", f"1: {type(inner).__name__} is not a module that is fused")

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.held(x)

    assert "held.norm: LayerNorm is neither" in explain(Holder(), X).reason


def test_layers_are_judged_by_what_reaches_them() -> None:
    route = explain(Tokens(), torch.zeros(3, dtype=torch.int64))
    assert route.name == "children"
    assert "which calls body one after the other" in route.reason
    assert "no kernels" not in route.reason
    meta = explain(Tokens().to("meta"), torch.zeros(3, dtype=torch.int64, device="meta"))
    assert meta.name == "composite"
    assert "body: there are no kernels for the device" in meta.reason


def test_shapes_that_do_not_fit_raise_as_the_call_does() -> None:
    with pytest.raises(RuntimeError, match=r"^fastmlp: input has shape [^\n]*$"):
        explain(convert(Chain()), torch.zeros(3, 11))
    with pytest.raises(RuntimeError, match=r"^fastmlp: input has shape [^\n]*$"):
        explain(convert(Chain(), trace=True), torch.zeros(3, 11))


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = fastmlp.Linear(10, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.fc(x) + self.fc(y)

    assert "which calls fc one after" in explain(Two(), (X, X)).reason


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = convert(nn.Sequential(nn.Linear(10, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + torch.randn_like(x))


def test_nothing_is_changed_by_a_walk() -> None:
    model = Noisy()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert "body.1: " in explain(model, torch.ones(8, 10)).reason
    explain(model, inputs=(torch.ones(8, 10),))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_copied_is_named() -> None:
    class Fixed(Chain):
        def __deepcopy__(self, memo: dict[int, Any]) -> "Fixed":
            raise ValueError("there is one only")

    with pytest.raises(TypeError, match=r"^fastmlp: target, Fixed, cannot be copied, .*ValueError: there is one only$"):
        explain(convert(Fixed()), X)


def answers(model: nn.Module, **more: Any) -> dict[str, Answer]:
    return {answer.way: answer for answer in explain(model, **more)}


def test_a_whole_model() -> None:
    model = Own()
    state = copy.deepcopy(model.state_dict())
    found = answers(model, inputs=(torch.randn(3, 10),))
    assert [(way, answer.taken) for way, answer in found.items()] == [
        ("as it is", False),
        ("convert(model)", False),
        ("convert(model, trace=True)", False),
        ("freeze(model)", True),
        ("TrainStep", False),
        ("capture", True),
    ]
    assert "fused  fc1 + act" in found["convert(model, trace=True)"].lines
    assert "kept   norm: LayerNorm is neither" in str(found["convert(model, trace=True)"].lines)
    assert "graph of 2 networks" in found["freeze(model)"].lines[0]
    assert found["TrainStep"].lines == fastmlp.TrainStep.explain(
        model, nn.MSELoss(), torch.optim.Adam(model.parameters())
    )
    assert found["capture"].lines[-1] == "optimizers: Adam.step() by fastmlp"
    assert type(model.fc1) is nn.Linear
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_whole_chain_is_taken_by_all() -> None:
    model = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = answers(model, inputs=(X,), loss_fn=nn.CrossEntropyLoss(), optimizer=optimizer)
    assert [answer.taken for answer in found.values()] == [False, True, True, True, True, True]
    assert found["TrainStep"].lines == ("takes it with CrossEntropyLoss and SGD",)
    assert str(explain(model)).splitlines()[-1].startswith("capture  ")


def test_reasons_of_each_way() -> None:
    class Reads(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if x.sum().item() > 0 else 1)

    found = answers(Reads(), inputs=(X,))
    assert "cannot record the forward of Reads" in found["convert(model, trace=True)"].lines[0]
    assert found["freeze(model)"].taken is False
    assert "an element of a tensor is read by Python" in found["capture"].lines[0]
    nothing = answers(nn.ReLU(), inputs=(X,))
    assert "no parameters" in nothing["TrainStep"].lines[0]
    assert "no parameters" in nothing["capture"].lines[0]


def test_a_captured_function() -> None:
    @fastmlp.capture(otherwise="eager")
    def reads(x: Tensor) -> Tensor:
        return x * x.sum().item()

    ((way, taken, lines),) = explain(reads)
    assert (way.startswith("capture("), taken) == (True, None)
    with pytest.warns(RuntimeWarning):
        reads(X)
    ((_, taken, lines),) = explain(reads)
    assert taken is False
    assert "an element of a tensor is read by Python" in lines[0]

    step = fastmlp.capture(torch.sin)
    for _ in range(3):
        step(X)
    ((_, taken, lines),) = explain(step)
    assert taken is True
    assert lines[0] == step.report().line()

"""Conversion: in place, back, and by recording; against the model as it was."""

import copy
import operator
import pickle
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, spectral_norm

import fastmlp
from fastmlp import Activation, convert, fusion_report, reference, revert
from fastmlp.activations import module_of, resolve
from fastmlp.chain import links
from fastmlp.trace import run_chain
from tests.support.derivatives import assert_same, derivatives
from tests.support.small import Net, OwnLinear, sequential, state_of
from tests.support.training import Loop


def nested() -> nn.Module:
    return nn.ModuleDict({"a": nn.ModuleList([sequential(), nn.Linear(2, 2)]), "b": nn.Sequential(sequential())})


def assert_same_function(converted: nn.Module, plain: nn.Module, x: Tensor) -> None:
    assert_same(derivatives(converted, x), derivatives(plain, x))


def input_of(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def targets(module: fx.GraphModule) -> list[Any]:
    return [node.target for node in module.graph.nodes if node.op.startswith("call")]


def lines(model: nn.Module) -> list[str]:
    return str(fusion_report(model)).splitlines()


# In place.


@pytest.mark.parametrize("make", [sequential, Net, lambda: nn.Linear(4, 3), lambda: nn.Sequential(sequential())])
def test_the_same_function_in_place(make: Callable[[], nn.Module]) -> None:
    model = make().double()
    plain = copy.deepcopy(model)
    parameters, keys = list(model.parameters()), list(model.state_dict())
    assert convert(model) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert not any(type(m) in (nn.Linear, nn.Sequential) for m in model.modules())
    assert_same_function(model, plain, input_of(6, 4))


def test_a_converted_sequential_is_one_operation() -> None:
    model, x = convert(sequential()), torch.randn(2, 4)
    assert fastmlp.explain(model, x).name == "direct"
    assert model(x).grad_fn.next_functions[1][0].name().endswith("AccumulateGrad")
    assert lines(model) == ["fused  0 + 1 + 2"]


def test_revert_restores_everything() -> None:
    model = nested()
    before = state_of(model)
    convert(model)
    assert state_of(model) != before
    assert revert(model) is model
    assert state_of(model) == before


def test_both_are_idempotent() -> None:
    model = nested()
    before = state_of(model)
    revert(model)
    assert state_of(model) == before
    once = state_of(convert(model))
    assert state_of(convert(model)) == once
    revert(revert(model))
    assert state_of(model) == before


def test_genuine_layers_stay() -> None:
    model = nn.Sequential(fastmlp.Linear(4, 5, activation="tanh"), fastmlp.Sequential(nn.Linear(5, 3)), nn.ReLU())
    before = state_of(model)
    revert(convert(model))
    assert state_of(model) == before


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_can_be_reverted(again: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 5), fastmlp.Linear(5, 3, activation="relu"))
    plain = copy.deepcopy(model)
    converted = again(convert(model))
    assert type(converted) is fastmlp.Sequential
    revert(converted)
    assert [type(m) for m in converted.modules()] == [nn.Sequential, nn.Linear, fastmlp.Linear]
    assert [set(m.__dict__) for m in converted.modules()] == [set(m.__dict__) for m in plain.modules()]
    x = torch.randn(2, 4)
    assert torch.equal(converted(x), plain(x))


def test_revert_refuses_to_change_the_function() -> None:
    model: Any = convert(sequential())
    model[2].activation = "tanh"
    before = state_of(model)
    with pytest.raises(ValueError, match=r"2 has been given the activation tanh since"):
        revert(model)
    assert state_of(model) == before
    model[2].activation = None
    assert type(revert(model)[2]) is nn.Linear

    model = convert(sequential())
    parametrizations.orthogonal(model[0])
    with pytest.raises(ValueError, match="0 was converted and is of type ParametrizedLinear by now"):
        revert(model)
    assert type(model[2]) is fastmlp.Linear
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(revert(model)[0]) is nn.Linear


def test_optimizers_made_before_go_on() -> None:
    model, x = sequential().double(), input_of(6, 4)
    plain = copy.deepcopy(model)
    steps = []
    for m, change in ((model, convert), (plain, lambda m: m)):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
        for use in (m, change(m), m):
            optimizer.zero_grad()
            use(x).pow(2).sum().backward()
            optimizer.step()
        steps.append(list(m.parameters()))
    assert_same(*steps)


def test_hooks_go_on() -> None:
    model: Any = sequential()
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("before"))
    convert(model)
    model[2].register_forward_pre_hook(lambda *_: calls.append("after"))
    model(torch.randn(2, 4))
    assert calls == ["before", "after"]
    assert lines(model) == [
        "kept   0: it has hooks",
        "kept   1: no layer that is fused precedes it",
        "kept   2: it has hooks",
    ]


def test_shared_modules() -> None:
    layer = nn.Linear(4, 4)
    inner = nn.Sequential(layer, nn.Tanh(), layer)
    model = nn.Sequential(inner, inner, layer)
    before, plain = state_of(model), copy.deepcopy(model)
    keys = list(model.state_dict())
    convert(model)
    assert list(model.state_dict()) == keys
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), plain(x))
    assert state_of(revert(model)) == before


def test_what_is_no_plain_layer_is_left_and_named() -> None:
    replaced = nn.Linear(4, 4)
    replaced.forward = lambda input: input + 1  # type: ignore[method-assign]
    model = nn.ModuleDict(
        {
            "own": OwnLinear(4, 4),
            "parametrized": parametrizations.weight_norm(nn.Linear(4, 4)),
            "lazy": nn.LazyLinear(4),
            "replaced": replaced,
            "hooked": spectral_norm(nn.Linear(4, 4)),
            "own_sequential": type("OwnSequential", (nn.Sequential,), {})(nn.Tanh()),
            "bilinear": nn.Bilinear(4, 4, 4),
        }
    )
    before, plain = state_of(model), copy.deepcopy(model)
    convert(model)
    changed = [name for (name, kind, *_), (*_, then, _, _) in zip(state_of(model), before, strict=True) if kind != then]
    assert changed == ["hooked", "own_sequential"]
    x = torch.randn(2, 4)
    for name in ("own", "parametrized", "replaced", "hooked", "own_sequential"):
        torch.testing.assert_close(model[name](x), plain[name](x))
    other = "is not torch.nn.Linear and may compute something else"
    tanh = "own_sequential.0: no layer that is fused precedes it"
    assert sorted(lines(model)) == sorted(
        [
            f"kept   own: its class {OwnLinear.__module__}.OwnLinear {other}",
            f"kept   parametrized: its class torch.nn.utils.parametrize.ParametrizedLinear {other}",
            "kept   lazy: it has no parameters yet; convert again after a first call",
            "kept   replaced: its forward was replaced",
            "fused  hooked",
            f"kept   {tanh}",
        ]
    )
    model["lazy"](x)
    assert type(convert(model)["lazy"]) is fastmlp.Linear
    assert "fused  lazy" in lines(model)


def test_quantized_layers_are_left() -> None:
    layer: Any = torch.ao.nn.qat.Linear(4, 3, qconfig=torch.ao.quantization.get_default_qat_qconfig("fbgemm"))
    model = convert(nn.Sequential(layer, nn.ReLU()))
    assert type(model[0]) is type(layer)
    assert lines(model)[0] == "kept   0: Linear is not a module that is fused"


@pytest.mark.parametrize("training", [True, False])
def test_transformer_layer(training: bool) -> None:
    plain = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double().train(training)
    model = convert(copy.deepcopy(plain))
    assert [type(model.linear1), type(model.linear2)] == [fastmlp.Linear] * 2
    assert type(model.self_attn.out_proj) is type(plain.self_attn.out_proj)
    x = input_of(2, 5, 8)
    if training:
        assert_same_function(model, plain, x)
    with torch.no_grad():
        assert_same([model(x)], [plain(x)])
    kept, *fused = lines(model)
    assert kept.startswith("kept   self_attn.out_proj: its class torch.nn.modules.linear.NonDynamicallyQuantizable")
    assert fused == ["fused  linear1", "fused  linear2"]


def test_modes_moves_and_states() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 3)).eval()
    state = copy.deepcopy(model.state_dict())
    convert(model)
    assert not any(m.training for m in model.modules())
    x = torch.randn(64, 4)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    assert model.double()(x.double()).dtype == torch.float64
    nn.init.zeros_(model[0].weight)
    model.float().load_state_dict(state)
    assert torch.equal(model[0].weight, state["0.weight"])


# By recording.


def traced(model: nn.Module, x: Tensor | None = None) -> fx.GraphModule:
    """The recorded model, after a look at what holds of each: the function, the keys, the original."""
    x = input_of(6, 4) if x is None else x
    model.double()
    before, keys = state_of(model), list(model.state_dict())
    recorded = convert(model, trace=True)
    assert [(n, k, m, set(d)) for n, k, m, d in state_of(model)] == [(n, k, m, set(d)) for n, k, m, d in before]
    assert list(recorded.state_dict()) == keys
    assert all(a is b for a, b in zip(recorded.parameters(), model.parameters(), strict=True))
    if not any(isinstance(m, nn.Dropout) and m.training for m in model.modules()):
        assert_same_function(recorded, model, x)
    return recorded


def test_the_tutorials_network_is_one_operation() -> None:
    recorded = traced(Net(torch.relu))
    assert targets(recorded) == [run_chain]
    y = recorded(input_of(6, 4))
    assert sorted(str(f.name()) for f, _ in y.grad_fn.next_functions if f) == ["torch::autograd::AccumulateGrad"] * 4
    assert lines(recorded) == ["fused  fc1 + relu + fc2"]
    assert not any(m.training for m in traced(Net(torch.relu).eval()).modules())


def test_every_activation(activation: Activation) -> None:
    function = partial(reference.FUNCTIONS[activation.name], **activation.parameters)
    for between in (function, module_of(activation)):
        recorded = traced(Net(between))
        assert targets(recorded) == [run_chain]
        acts = [m for name, m in recorded.named_children() if name not in ("fc1", "fc2")]
        assert [resolve(act) for act in acts] == ([activation] if acts else [])
        assert len(acts) == (between is not function or activation.name != "identity")


FORMS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "x.relu()": (lambda z: z.relu(), "relu"),
    "x.relu_()": (lambda z: z.relu_(), "relu"),
    "x.tanh()": (lambda z: z.tanh(), "tanh"),
    "x.sigmoid_()": (lambda z: z.sigmoid_(), "sigmoid"),
    "x.sin()": (lambda z: z.sin(), "sin"),
    "torch.relu_": (torch.relu_, "relu"),
    "torch.selu": (torch.selu, "selu"),
    "torch.special.expit": (torch.special.expit, "sigmoid"),
    "F.relu": (F.relu, "relu"),
    "F.relu in place": (lambda z: F.relu(z, inplace=True), "relu"),
    "F.relu in place, by position": (lambda z: F.relu(z, True), "relu"),
    "F.relu by keyword": (lambda z: F.relu(input=z), "relu"),
    "F.tanh": (F.tanh, "tanh"),
    "F.sigmoid": (F.sigmoid, "sigmoid"),
    "F.gelu": (lambda z: F.gelu(z, approximate="none"), "gelu"),
    "F.gelu of tanh": (lambda z: F.gelu(z, approximate="tanh"), "gelu_tanh"),
    "F.leaky_relu": (lambda z: F.leaky_relu(z, 0.3), "leaky_relu(negative_slope=0.3)"),
    "F.leaky_relu by keyword": (lambda z: F.leaky_relu(z, negative_slope=-1), "leaky_relu(negative_slope=-1)"),
    "F.leaky_relu_": (lambda z: F.leaky_relu_(z, 0.3), "leaky_relu(negative_slope=0.3)"),
    "F.elu": (lambda z: F.elu(z, 0.5, True), "elu(alpha=0.5)"),
    "F.celu": (lambda z: F.celu(z, 0.5), "celu(alpha=0.5)"),
    "torch.celu": (lambda z: torch.celu(z, alpha=2), "celu(alpha=2)"),
    "torch.celu_": (torch.celu_, "celu"),
    "torch.sin(30 * x)": (lambda z: torch.sin(30 * z), "sin(frequency=30)"),
    "torch.sin(x * 1.5)": (lambda z: torch.sin(z * 1.5), "sin(frequency=1.5)"),
    "torch.sin(torch.mul(x, -2))": (lambda z: torch.sin(torch.mul(z, -2)), "sin(frequency=-2)"),
    "x.mul(0.5).sin()": (lambda z: z.mul(0.5).sin(), "sin(frequency=0.5)"),
    "torch.sin_(30 * x)": (lambda z: torch.sin_(30 * z), "sin(frequency=30)"),
    "F.softplus": (lambda z: F.softplus(z, 2, threshold=3.0), "softplus(beta=2, threshold=3)"),
    "F.hardswish": (lambda z: F.hardswish(z, inplace=True), "hardswish"),
    "F.mish": (lambda z: F.mish(z, inplace=False), "mish"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_call(form: str) -> None:
    function, expected = FORMS[form]
    recorded = traced(Net(function))
    assert targets(recorded) == [run_chain]
    (act,) = (m for n, m in recorded.named_children() if n not in ("fc1", "fc2"))
    assert repr(resolve(act)) == expected


@pytest.mark.parametrize(
    "function",
    [
        lambda z: torch.tanh(z) + z,
        lambda z: F.softmax(z, -1),
        lambda z: F.relu6(z),
        lambda z: torch.relu(z[:, :5]),
        lambda z: torch.sin(z, out=None),
        lambda z: z.add_(1).relu(),
        lambda z: F.elu_(z, 1.0, 2),  # type: ignore[call-arg]
        lambda z: F.elu_(z, 1.0, True, 3),  # type: ignore[call-arg]
        lambda z: F.elu_(z, alpha=1.0, scale=2.0),  # type: ignore[call-arg]
        lambda z: F.celu(z, -0.5),
        lambda z: torch.sin(z * z),
        lambda z: torch.sin(z * torch.tensor(30.0)),
        lambda z: torch.sin(z.mul_(30)),
        lambda z: torch.cos(30 * z),
    ],
)
def test_other_functions_stay(function: Callable[[Tensor], Tensor]) -> None:
    recorded = traced(Net(function))
    first, *others, last = targets(recorded)
    assert first is last is run_chain
    assert others
    assert [line for line in lines(recorded) if line.startswith("fused")] == ["fused  fc1", "fused  fc2"]


def test_multiples_that_others_use_stay() -> None:
    def shared(z: Tensor) -> Tensor:
        product = 3 * z
        return torch.sin(product) + product

    assert targets(traced(Net(shared))) == [run_chain, operator.mul, torch.sin, operator.add, run_chain]


def test_a_factor_that_float32_cannot_hold_stays() -> None:
    recorded = convert(Net(lambda z: torch.sin(1e39 * z)), trace=True)
    assert targets(recorded) == [run_chain, operator.mul, torch.sin, run_chain]


class Sine(nn.Module):
    """As programs of SIREN have it."""

    def __init__(self, w0: float = 1.0) -> None:
        super().__init__()
        self.w0 = w0

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.w0 * x)


class SineLayer(nn.Module):
    def __init__(self, in_features: int, out_features: int, omega_0: int = 30) -> None:
        super().__init__()
        self.omega_0, self.linear = omega_0, nn.Linear(in_features, out_features)

    def forward(self, input: Tensor) -> Tensor:
        return torch.sin(self.omega_0 * self.linear(input))


SIRENS: dict[str, Callable[[], nn.Module]] = {
    "a layer": lambda: nn.Sequential(SineLayer(2, 8), SineLayer(8, 8), nn.Linear(8, 1)),
    "an activation": lambda: nn.Sequential(nn.Linear(2, 8), Sine(30.0), nn.Linear(8, 8), Sine(), nn.Linear(8, 1)),
    "ours": lambda: nn.Sequential(nn.Linear(2, 8), fastmlp.Sin(30.0), nn.Linear(8, 8), fastmlp.Sin(), nn.Linear(8, 1)),
}


@pytest.mark.parametrize("name", SIRENS)
def test_sirens(name: str) -> None:
    """One chain; for frozen networks and training steps too."""
    model = SIRENS[name]().double()
    frequencies = [30.0, 30.0 if name == "a layer" else 1.0]
    x = torch.randn(9, 2, dtype=torch.float64)
    recorded = traced(model, x)
    assert targets(recorded) == [run_chain]
    chain = [link.module for link in links(model)]
    assert [act.frequency for act in chain if isinstance(act, fastmlp.Sin)] == frequencies
    expected = model(x)
    for found in (recorded(x), fastmlp.freeze(model)(x)):
        torch.testing.assert_close(found, expected)
    other = copy.deepcopy(model)
    for made, net in ((fastmlp.TrainStep, model), (Loop, other)):
        step = made(net, nn.MSELoss(), torch.optim.SGD(net.parameters(), lr=1e-3))
        for _ in range(3):
            step(x, torch.ones(9, 1, dtype=torch.float64))
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()))


@pytest.mark.parametrize("alpha", [lambda z, given: given, lambda z, given: z])
def test_parameters_that_are_tensors_stay(alpha: Callable[..., Any]) -> None:
    class Learned(Net):
        def forward(self, x: Tensor, given: Any = 0.5) -> Tensor:
            z = self.fc1(x)
            return self.fc2(F.elu(z, alpha(z, given)))

    assert targets(convert(Learned(), trace=True)) == [run_chain, F.elu, run_chain]


def test_results_with_several_users_are_kept() -> None:
    def residual(z: Tensor) -> Tensor:
        return z + torch.relu(z)

    recorded = traced(Net(residual))
    assert targets(recorded).count(run_chain) == 2
    assert "kept   relu: the result before it is used 2 times" in lines(recorded)

    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.fc1(x) + 0
            z = self.fc1(x)
            z.relu_()
            return self.fc2(z * h)

    recorded = traced(InPlace())
    assert "relu_" in targets(recorded)


def test_residual_connections_around_chains() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.silu(self.up(self.norm(x))))

    model = nn.Sequential(Block(), Block(), nn.Linear(4, 3))
    recorded = traced(model)
    assert lines(recorded) == ["fused  0.up + silu + 0.down", "fused  1.up + silu_1 + 1.down", "fused  2"]


def test_a_layer_that_is_called_twice() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(torch.relu(self.fc1(x)) + torch.tanh(self.fc1(-x)))

    assert lines(traced(Twice())) == ["fused  fc1 + relu", "fused  fc1 + tanh", "fused  fc2"]
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert lines(traced(nn.Sequential(*model, *model))) == ["fused  0 + 1 + 0 + 1"]


def test_two_branches_are_recorded_in_any_order() -> None:
    class Branches(Net):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.fc1(x), self.other(x)
            x = x.clone().add_(1)
            return self.fc2(torch.relu(a) * torch.tanh(b)) + x.sum()

    recorded = traced(Branches())
    assert [line for line in lines(recorded) if line.startswith("fused")] == [
        "fused  fc1 + relu",
        "fused  other + tanh",
        "fused  fc2",
    ]


def test_an_input_changed_later_is_read_before() -> None:
    class Changing(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            h = self.fc1(x)
            x.add_(1)
            return self.fc2(torch.relu(h)) + x.sum()

    model = Changing()
    x = torch.randn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(convert(model, trace=True)(x), model(x))


def test_containers_of_every_kind_are_seen_through() -> None:
    for inner in (sequential(), fastmlp.MLP(4, [5], 3), convert(sequential()), convert(Net(), trace=True)):
        recorded = traced(nn.Sequential(inner, nn.Tanh()))
        expected = 2 if isinstance(inner, fx.GraphModule) else 1
        assert len(targets(recorded)) == expected
    for root in (sequential(), fastmlp.MLP(4, [5], 3), convert(sequential())):
        assert targets(traced(root)) == [run_chain]
    traced(nn.Linear(4, 3))
    traced(fastmlp.Linear(4, 3, activation="gelu"))


def test_layers_of_other_classes_are_called() -> None:
    class Mixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.normed = OwnLinear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.relu(self.normed(torch.relu(self.own(x)))))

    recorded = traced(Mixed())
    assert targets(recorded)[-1] is run_chain
    assert "kept   relu_1: no layer that is fused precedes it" in lines(recorded)
    # Of the other layer the forward is recorded, which calls a function with tensors of the model.
    assert "fused  linear" in lines(recorded)
    assert sum(line.startswith("fused") for line in lines(recorded)) == 2


def test_recorded_models_run_hooks() -> None:
    model = Net()
    calls: list[str] = []
    handle = model.fc1.register_forward_hook(lambda *_: calls.append("before"))
    recorded = traced(model)
    model.fc2.register_forward_hook(lambda *_: calls.append("after"))
    calls.clear()
    recorded(input_of(2, 4))
    assert calls == ["before", "after"]
    assert lines(recorded)[0] == "kept   fc1: it has hooks"
    handle.remove()
    assert lines(recorded)[0] == "fused  fc1 + relu"

    inner = nn.Sequential(Net(), nn.ReLU())
    inner[0].register_forward_hook(lambda *_: calls.append("inner"))
    recorded = traced(inner)
    calls.clear()
    recorded(input_of(2, 4))
    assert calls == ["inner"]

    model.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"Net itself has hooks \(_forward_hooks\)"):
        convert(model, trace=True)


def test_dropout_follows_the_mode() -> None:
    model = Net(nn.Sequential(nn.ReLU(), nn.Dropout(0.5)), nn.Dropout(0.5))
    recorded = traced(model)
    one = ["fused  fc1 + between.0 + between.1 + fc2 + after"]
    assert lines(recorded) == one
    x = input_of(64, 4)
    for training in (True, False, True):
        recorded.train(training)
        model.train(training)
        results = []
        for m in (recorded, model):
            torch.manual_seed(3)
            results.append(m(x))
        assert_same(results[:1], results[1:])
        assert bool((recorded(x) == recorded(x)).all()) is not training
    assert lines(recorded.eval()) == one


def test_random_numbers_keep_their_order() -> None:
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.other = nn.Dropout(0.5), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.fc1(x))
            x = self.other(x)
            return self.fc2(self.drop(h)) + x.sum()

    model = Late().double()
    recorded, x = convert(model, trace=True), input_of(64, 4)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    assert_same([recorded(x)], [expected])


class ByData(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x) if x.sum() > 0 else self.fc2(x)


class ByMode(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.dropout(self.fc1(x), training=self.training))


class WithoutGradients(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.fc1(x)
        return self.fc2(h)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ByData(), r"torch.fx cannot record the forward of ByData; convert\(model\) without trace needs no recording"),
        (ByMode(), r"ByMode depends on self.training, .* nn.Dropout in place of F.dropout .*dropout"),
        (WithoutGradients(), "gradients or autocast are switched"),
    ],
)
def test_forwards_that_would_be_recorded_wrongly(model: Net, message: str) -> None:
    model.fc1.eval()
    before = state_of(model)
    with pytest.raises(RuntimeError, match=message) as caught:
        convert(model, trace=True)
    assert isinstance(caught.value.__cause__, fx.proxy.TraceError) or isinstance(model, ByMode)
    assert state_of(model) == before
    convert(model)
    assert type(model.fc1) is fastmlp.Linear


class Holding(Net):
    """With what the graph does not use, and what torch.fx would make a key of."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.Linear(2, 2)
        self.alone = nn.Parameter(torch.ones(2))
        self.register_buffer("mask", torch.ones(5), persistent=False)
        self.alias = self.fc1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(m)))),
        lambda m: convert(m, trace=True),
        lambda m: convert(pickle.loads(pickle.dumps(m)), trace=True),
    ],
)
def test_copies_of_recorded_models(again: Callable[[Any], Any]) -> None:
    model = Holding()
    recorded = traced(model)
    copied = again(recorded.eval())
    assert type(copied).__name__ == "Holding"
    assert not copied.training
    assert list(copied.state_dict()) == list(model.state_dict())
    assert targets(copied) == targets(recorded)
    assert lines(copied) == lines(recorded)
    assert_same_function(copied, model, input_of(6, 4))


def test_recorded_models_are_saved_whole(tmp_path: Path) -> None:
    recorded = traced(Net(F.gelu))
    torch.save(recorded, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert targets(loaded) == [run_chain]
    x = input_of(6, 4)
    assert torch.equal(loaded(x), recorded(x))


def test_recorded_models_move_and_train() -> None:
    model = Net(torch.tanh)
    plain = copy.deepcopy(model).double()
    optimizer = torch.optim.Adam(model.parameters())
    recorded = convert(model, trace=True)
    recorded.double()
    assert model.fc1.weight.dtype == torch.float64
    other = torch.optim.Adam(plain.parameters())
    for _ in range(3):
        for m, o in ((recorded, optimizer), (plain, other)):
            o.zero_grad()
            m(torch.ones(6, 4, dtype=torch.float64)).pow(2).sum().backward()
            o.step()
    assert_same(list(model.parameters()), list(plain.parameters()))
    assert recorded.bfloat16()(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_layers_replaced_later_are_seen() -> None:
    recorded: Any = traced(Net())
    recorded.fc1 = OwnLinear(4, 5).double()
    x = input_of(2, 4)
    torch.testing.assert_close(recorded(x), recorded.fc2(torch.relu(recorded.fc1(x))))
    state = {name: 2 * p for name, p in recorded.named_parameters()}
    expected = {name: p.clone() for name, p in state.items()}
    called = torch.func.functional_call(recorded, state, x)
    recorded.load_state_dict(expected)
    torch.testing.assert_close(called, recorded(x))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("trace", [False, True])
def test_compiled(trace: bool) -> None:
    torch._dynamo.reset()
    model = Net(torch.tanh, nn.Sequential(nn.Linear(3, 3), nn.ReLU())).double()
    converted = convert(copy.deepcopy(model), trace)
    f: Any = torch.compile(converted, backend="aot_eager", fullgraph=True)
    x = input_of(6, 4)
    grads = [torch.autograd.grad(m(x).pow(2).sum(), list(p.parameters())) for m, p in ((f, converted), (model, model))]
    assert_same(grads[0], grads[1])
    with torch.no_grad():
        assert_same([f(x)], [model(x)])


def test_recorded_models_can_be_traced_by_torch() -> None:
    recorded, x = traced(Net()), input_of(6, 4)
    torch.testing.assert_close(fx.symbolic_trace(recorded)(x), recorded(x))
    torch.testing.assert_close(fx.Interpreter(recorded).run(x), recorded(x))
    program = torch.export.export(recorded, (x,))
    torch.testing.assert_close(program.module()(x), recorded(x))


def test_models_of_several_arguments() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor, y: Tensor, scale: float = 2.0) -> dict[str, Tensor]:
            return {"sum": self.fc2(torch.relu(self.fc1(x))) * scale + y}

    model = Several()
    recorded = convert(model, trace=True)
    x, y = torch.randn(2, 4), torch.randn(2, 3)
    torch.testing.assert_close(recorded(x, y=y)["sum"], model(x, y)["sum"])
    torch.testing.assert_close(recorded(x, y, scale=0.5)["sum"], model(x, y, 0.5)["sum"])


# Reports and errors.


def test_report_is_a_tuple_of_entries() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
    plain = fusion_report(model)
    assert [entry.names for entry in plain] == [("0",), ("1",), ("2",), ("4",)]
    assert all(entry.reason for entry in plain)
    found = fusion_report(convert(model))
    assert [(entry.names, bool(entry.reason)) for entry in found] == [
        (("0", "1"), False),
        (("2",), True),
        (("4",), False),
    ]
    assert found[1].reason == "the layer before it has an activation already"
    assert str(fusion_report(convert(nn.Linear(2, 2)))) == "fused  model"
    assert fusion_report(nn.LayerNorm(2)) == ()

    class OwnForward(fastmlp.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return self[0](input)

    assert lines(OwnForward(fastmlp.Linear(2, 2), nn.ReLU()))[0] == "fused  0"


@pytest.mark.parametrize("function", [convert, revert, fusion_report])
def test_what_is_no_module(function: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"^fastmlp: model must be a torch.nn.Module, got Tensor"):
        function(torch.zeros(1))


# Modules that other libraries make.


class Block(nn.Sequential):
    """A subclass that inherits its forward, as those of fastai and torchrl do."""

    registry: ClassVar[list[type]] = []

    def __init__(self, columns: int = 4) -> None:
        super().__init__(nn.Linear(columns, 5), nn.ReLU(), nn.Linear(5, 3))
        self.columns = columns

    def __init_subclass__(cls, **options: Any) -> None:
        Block.registry.append(cls)

    def describe(self) -> str:
        return f"{self.columns} columns, {super().__len__()} modules"


class Plainest(nn.Sequential):
    """A subclass with nothing of its own."""


@pytest.mark.parametrize("kind", [Block, Plainest])
def test_subclasses_of_sequential_run_fused(kind: type[nn.Sequential]) -> None:
    model = (Block() if kind is Block else Plainest(*Block())).double()
    plain, before = copy.deepcopy(model), state_of(model)
    convert(model)
    assert lines(model) == ["fused  0 + 1 + 2"]
    assert_same_function(model, plain, input_of(6, 4))
    assert isinstance(model, kind)
    assert isinstance(model, fastmlp.Sequential)
    assert repr(model).splitlines()[0] == repr(plain).splitlines()[0]
    assert Block.registry == []
    assert type(convert(Block())) is type(convert(Block()))
    if isinstance(model, Block):
        assert model.describe() == "4 columns, 3 modules"
        assert issubclass(type(model), Block)
    for again in (copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))):
        copied = again(model)
        assert type(copied) is type(model)
        assert lines(copied) == ["fused  0 + 1 + 2"]
        assert_same_function(copied, plain, input_of(6, 4))
    assert type(revert(copy.deepcopy(model))) is kind
    assert [link.name for link in links(model)] == ["0", "1", "2"]
    fastmlp.freeze(model)
    assert state_of(revert(model)) == before


def test_slices_of_subclasses() -> None:
    model = Plainest(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    part: Any = convert(model)[:2]
    assert isinstance(part, Plainest)
    revert(part)
    assert [type(m) for m in part.modules()] == [Plainest, nn.Linear, nn.ReLU]


def test_subclasses_with_a_call_or_forward_of_their_own_stay() -> None:
    class Calling(nn.Sequential):
        def __call__(self, *args: Any) -> Any:
            return super().__call__(*args) + 1

    class Forwarding(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    for kind in (Calling, Forwarding):
        model = kind(nn.Linear(4, 3), nn.ReLU())
        x = torch.randn(2, 4)
        expected = model(x)
        assert type(convert(model)) is kind
        torch.testing.assert_close(model(x), expected)


def test_layers_in_plain_lists_are_named() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)]
            self.heads = {"a": nn.Sequential(nn.Linear(3, 1))}
            self.registered = nn.Linear(1, 1)
            self.again = [self.registered]
            self.sizes = [4, 5, 3]

    assert lines(nn.Sequential(Listed())) == [
        "kept   0.layers: its layers are in a plain list, where torch.nn.Module sees none of them, nor their "
        "parameters; make it a torch.nn.ModuleList",
        "kept   0.heads: its layers are in a plain dictionary, where torch.nn.Module sees none of them, nor their "
        "parameters; make it a torch.nn.ModuleDict",
        "kept   0.registered: it is not converted",
    ]


@pytest.mark.parametrize("script", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(2, 4))])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_modules_of_torch_jit(script: Callable[[Any], nn.Module], inside: bool) -> None:
    scripted = script(sequential())
    model = nn.Sequential(nn.Linear(4, 4), scripted, nn.Linear(3, 3)) if inside else scripted
    x = torch.randn(2, 4)
    expected, name = model(x), "1" if inside else "model"
    convert(model)
    assert_same([model(x)], [expected])
    kept = [line for line in lines(model) if line.startswith("kept")]
    assert kept == [
        f"kept   {name}: it is a module of torch.jit, which runs its own code; convert the model before it is scripted"
    ]
    revert(model)
    assert_same([model(x)], [expected])
    with pytest.raises(TypeError, match=rf"fastmlp: {name} \(.*it is a module of torch.jit, .* use the model that was"):
        fastmlp.freeze(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (problem, *_) = fastmlp.TrainStep.explain(model, nn.MSELoss(), optimizer)
    assert "it is a module of torch.jit" in problem
    if inside:
        recorded = convert(model, trace=True)
        torch.testing.assert_close(recorded(x), expected)
        assert targets(recorded) == [run_chain, "1", run_chain]
    else:
        with pytest.raises(RuntimeError, match=r"fastmlp: torch.fx cannot record .*, a module of torch.jit"):
            convert(model, trace=True)


# While other threads call.


def tower() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), Block(), nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 2))


def at_each_line(function: Callable[[], Any], look: Callable[[], Any]) -> int:
    """Calls `look` before every line of our own files that `function` executes."""
    count = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        if "/fastmlp/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            count += 1
            sys.settrace(None)
            look()
            sys.settrace(trace)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def test_a_model_is_valid_at_every_moment() -> None:
    model, x = tower().eval(), torch.randn(2, 4)
    expected = model(x)

    def look() -> None:
        torch.testing.assert_close(model(x), expected)
        assert not any(isinstance(m, fastmlp.Linear) and "activation" not in m.__dict__ for m in model.modules())

    assert at_each_line(lambda: convert(model), look) > 20
    assert at_each_line(lambda: revert(model), look) > 20


def test_calls_that_have_begun_go_on() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    expected = layer(x)
    for model in (layer, nn.Sequential(layer)):
        for change, undo in ((convert, revert), (revert, convert)):
            for at in range(1, 30):
                undo(model)
                calls = iter(range(1, 100))

                def look(frame: Any, event: str, _: Any, calls: Any = calls, at: int = at) -> None:
                    if event == "call" and next(calls) == at:
                        sys.setprofile(None)
                        change(model)  # noqa: B023

                sys.setprofile(look)
                try:
                    output = model(x, **{}) if at % 2 else model.__call__(x)
                finally:
                    sys.setprofile(None)
                torch.testing.assert_close(output, expected)
    # Where something has to see the call, Python passes it on.
    handle = layer.register_forward_hook(lambda *_: None)
    for at in range(1, 12):
        convert(layer)
        steps = iter(range(1, 100))

        def switch(frame: Any, event: str, _: Any, steps: Any = steps, at: int = at) -> None:
            if event in ("call", "c_call") and next(steps) == at:
                sys.setprofile(None)
                revert(layer)

        sys.setprofile(switch)
        try:
            output = layer(x)
        finally:
            sys.setprofile(None)
        torch.testing.assert_close(output, expected)
    handle.remove()


def in_place_and_back(model: nn.Module) -> list[nn.Module]:
    for _ in range(300):
        revert(convert(model))
    return [model]


def recorded(model: nn.Module) -> list[nn.Module]:
    return [convert(model, trace=True) for _ in range(5)]


#: Models that threads call, how they are converted meanwhile, and how often threads take turns, in seconds.
WHILE_CALLED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], list[nn.Module]], float]] = {
    "in place": (tower, in_place_and_back, 1e-6),
    "recorded": (lambda: nn.Sequential(Net(), nn.BatchNorm1d(3), nn.Linear(3, 2)), recorded, 1e-5),
}


@pytest.mark.parametrize(("make", "converting", "turns"), WHILE_CALLED.values(), ids=WHILE_CALLED.keys())
def test_threads_call_while_it_is_converted(
    make: Callable[[], nn.Module], converting: Callable[[nn.Module], list[nn.Module]], turns: float
) -> None:
    """Recording leaves the model as it is, so calls have the same bits; conversion in place changes it."""
    model, x = make().eval(), torch.randn(5, 4)
    expected, wrong, done = model(x).detach(), [], threading.Event()

    def compare(output: Tensor) -> None:
        if converting is recorded:
            assert torch.equal(output, expected)
        else:
            torch.testing.assert_close(output, expected)

    def call() -> None:
        while not done.is_set():
            try:
                compare(model(x))
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=call) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(turns)
    try:
        for thread in threads:
            thread.start()
        results = converting(model)
    finally:
        done.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    assert wrong == []
    for module in results:
        torch.testing.assert_close(module(x), expected)


def test_reports_take_time_in_proportion_to_the_layers() -> None:
    def seconds(layers: int) -> float:
        model = nn.Sequential(*[nn.ReLU() for _ in range(layers)])
        start = time.process_time()
        fusion_report(model)
        return time.process_time() - start

    seconds(10)
    # 16 times as many take 16 times as long, where a report that looks at each pair takes 256 times.
    assert min(seconds(16000) for _ in range(2)) < 64 * min(seconds(1000) for _ in range(3))

"""A model as the flat list of its modules, and the models that are none."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

import fastmlp
from fastmlp import convert
from fastmlp.chain import Link, links
from tests.support.derivatives import assert_same


class Net(nn.Module):
    """Two layers, and what a test puts before, between and after them."""

    def __init__(
        self,
        between: Callable[..., Any] = torch.relu,
        before: Callable[..., Any] | None = None,
        after: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 3)
        self.before, self.between, self.after = before, between, after

    def forward(self, x: Tensor) -> Any:
        x = x if self.before is None else self.before(x)
        x = self.fc2(self.between(self.fc1(x)))
        return x if self.after is None else self.after(x)


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Residual(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        return self.fc2(torch.relu(y)) + y[..., :3]


class Branching(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x) if x.sum() > 0 else x


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Renamed(nn.Linear):
    """A subclass that changes nothing, which nobody can tell from outside."""


class OwnSequential(nn.Sequential):
    """A subclass without a forward of its own."""


class Skipping(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return self[0](input)


class Calling(nn.Sequential):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) + 1


def run(chain: list[Link], x: Tensor) -> Tensor:
    for link in chain:
        x = link.module(x)
    return x


def norms() -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(0.5),
        nn.BatchNorm1d(4),
        nn.Linear(4, 4),
        nn.BatchNorm1d(4),
        nn.AlphaDropout(),
        nn.Identity(),
        nn.SELU(),
    )


CHAINS: list[tuple[str, Callable[[], nn.Module], list[str]]] = [
    ("layer", lambda: nn.Linear(4, 3), [""]),
    ("fused layer", lambda: fastmlp.Linear(4, 3, activation="relu"), [""]),
    ("sequential", lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU()), ["0", "1"]),
    ("mlp", lambda: fastmlp.MLP(4, [5], 3), ["0", "1", "2"]),
    ("empty", nn.Sequential, []),
    (
        "nested",
        lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 5), fastmlp.MLP(5, [], 3)), nn.Tanh()),
        ["0.0", "0.1.0", "1"],
    ),
    ("subclass", lambda: OwnSequential(nn.Linear(4, 3), nn.GELU("tanh")), ["0", "1"]),
    ("norms and dropout", norms, ["0", "1", "2", "3", "4", "5", "6"]),
    ("recorded", Net, ["fc1", "relu", "fc2"]),
    ("recorded module", lambda: Net(nn.LeakyReLU(0.2)), ["fc1", "between", "fc2"]),
    ("recorded norm", lambda: Net(nn.BatchNorm1d(5)), ["fc1", "between", "fc2"]),
    ("recorded method", lambda: Net(lambda x: x.sigmoid_()), ["fc1", "sigmoid_", "fc2"]),
    (
        "activations outside",
        lambda: Net(before=torch.tanh, after=F.softplus),
        ["tanh", "fc1", "relu", "fc2", "softplus"],
    ),
    (
        "recorded inside",
        lambda: nn.Sequential(Net(after=torch.sin), nn.Linear(3, 2)),
        ["0.fc1", "0.relu", "0.fc2", "0.sin", "1"],
    ),
    ("already recorded", lambda: convert(Net(), trace=True), ["fc1", "relu", "fc2"]),
    (
        "sequential inside",
        lambda: Net(nn.Sequential(nn.ELU(), nn.Linear(5, 5))),
        ["fc1", "between.0", "between.1", "fc2"],
    ),
    ("shared", lambda: nn.Sequential(*[nn.Linear(4, 4)] * 2), ["0", "1"]),
]


@pytest.mark.parametrize(("make", "names"), [chain[1:] for chain in CHAINS], ids=[chain[0] for chain in CHAINS])
def test_links(make: Callable[[], nn.Module], names: list[str]) -> None:
    model = make().eval()
    before = dict(model.named_modules())
    chain = links(model)
    assert [link.name for link in chain] == names
    # The modules themselves, where they are said to be, and together the same function.
    assert all(model.get_submodule(link.name) is link.module for link in chain if link.name in before)
    assert dict(model.named_modules()) == before
    x = torch.randn(6, 4, dtype=torch.float64)
    expected = model.double()(x)
    assert_same([run([Link(name, module.double()) for name, module in chain], x)], [expected])


def test_names_of_a_recorded_child() -> None:
    chain = links(nn.Sequential(nn.Linear(4, 4), Net(), nn.ReLU()))
    assert [link.name for link in chain] == ["0", "1.fc1", "1.relu", "1.fc2", "2"]


def hook(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


def hooked() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.register_forward_hook(lambda *_: None)
    return layer


def with_attribute(module: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def hooked_container() -> nn.Module:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 3)))
    model[0].register_forward_pre_hook(lambda *_: None)
    return model


def without_parameters() -> nn.Module:
    layer = nn.Linear(4, 3)
    weight = layer.weight
    del layer.weight
    layer.__dict__["weight"] = weight
    return layer


REFUSED: list[tuple[str, Callable[[], Any], str]] = [
    ("no module", lambda: torch.relu, "model must be a torch.nn.Module, got builtin"),
    (
        "other module",
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)),
        r"1 \(LayerNorm\) .*: LayerNorm is not a",
    ),
    ("module list", lambda: nn.Sequential(nn.ModuleList()), r"0 \(ModuleList\) .*: ModuleList is not a"),
    ("hook", hooked, r"model \(Linear\) .*: it has hooks"),
    ("hook inside", lambda: Net(hooked()), r"between \(Linear\) .*: it has hooks"),
    ("hook on a container", hooked_container, r"0 \(Sequential\) .*: it has hooks"),
    ("hook on what is recorded", lambda: nn.Sequential(hook(Net())), r"0 \(Net\) .*: it has hooks"),
    ("own forward", lambda: nn.Sequential(OwnLinear(4, 3)), r"0 \(OwnLinear\) .*: OwnLinear is not a"),
    ("subclass", lambda: Renamed(4, 3), r"model \(Renamed\) .*: Renamed is not a"),
    ("lazy", lambda: nn.LazyLinear(3), r"LazyLinear is not a module with parameters yet; call the model once"),
    ("compiled model", lambda: torch.compile(Net(), backend="eager"), r"it only calls the module model._orig_mod,"),
    ("average", lambda: AveragedModel(Net()), r"\(AveragedModel\) .*: it only calls the module model.module,"),
    ("parallel", lambda: nn.Sequential(nn.DataParallel(Net())), r"0 \(DataParallel\) .* the module model.0.module,"),
    ("parametrized", lambda: parametrizations.weight_norm(nn.Linear(4, 3)), r"ParametrizedLinear is not a"),
    ("no parameters", without_parameters, "its parameters are not where"),
    ("replaced forward", lambda: with_attribute(nn.Linear(4, 3), forward=torch.relu), "its forward was replaced"),
    (
        "replaced forward of a recorded one",
        lambda: with_attribute(Net(), forward=torch.relu),
        "its forward was replaced",
    ),
    ("own call", lambda: Calling(nn.Linear(4, 3)), r"model \(Calling\) .*: the forward of Calling was replaced"),
    ("compiled", lambda: with_attribute(nn.Linear(4, 3), _compiled_call_impl=torch.relu), "it was compiled by itself"),
    (
        "attribute",
        lambda: with_attribute(nn.LeakyReLU(), negative_slope=torch.ones(1)),
        "its attributes are not numbers",
    ),
    ("form", lambda: with_attribute(nn.GELU(), approximate="fast"), "its form is 'fast'"),
    ("none", lambda: with_attribute(nn.Sequential(nn.ReLU()), _modules={"0": None}), "child '0' is None"),
    ("two inputs", TwoInputs, r"model \(TwoInputs\) .*: its forward has 2 inputs"),
    ("residual", Residual, r"its forward uses the result of \w+ 2 times"),
    ("other function", lambda: Net(torch.exp), r"model \(Net\) .*: its forward calls exp,"),
    ("other argument", lambda: Net(lambda x: x + 1), r"its forward calls add,"),
    ("shape", lambda: Net(after=lambda x: x.transpose(0, 1)), r"its forward calls transpose,"),
    ("tuple", lambda: Net(after=lambda x: (x,)), "its forward returns something else than one tensor"),
    ("constant", lambda: Net(after=lambda x: torch.zeros(1)), r"its forward uses the result of \w+ 0 times"),
    ("data", Branching, "cannot record the forward of Branching"),
    ("training", lambda: Net(lambda x: F.dropout(x, training=x.sum is None)), r"it asks for sum of a value"),
    ("dropout", lambda: Net(lambda x: F.dropout(x, training=False)), r"its forward calls dropout,"),
]


@pytest.mark.parametrize(("make", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        links(make())


def test_a_forward_of_its_own_is_recorded() -> None:
    assert [link.name for link in links(Skipping(nn.Linear(4, 3), nn.ReLU()))] == ["0"]


def test_hooks_on_all_modules() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(TypeError, match="there are hooks on all modules"):
            links(nn.Linear(4, 3))
    finally:
        handle.remove()


def test_replaced_for_all_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x)
    with pytest.raises(TypeError, match=r"1 \(ReLU\) .*: the forward of ReLU was replaced"):
        links(nn.Sequential(nn.Linear(4, 3), nn.ReLU()))


def test_replaced_before_the_import() -> None:
    """By a library that was imported first: what is taken for the original must be torch's."""
    code = """
        from torch import nn, ones
        forward = nn.ReLU.forward
        nn.ReLU.forward = lambda self, x: 2 * forward(self, x)
        import fastmlp
        from fastmlp.chain import links
        layer = nn.Linear(1, 1)
        print(fastmlp.Sequential(layer, nn.ReLU())(ones(1)) == 2 * layer(ones(1)).relu())
        try:
            links(nn.Sequential(layer, nn.ReLU()))
        except TypeError as error:
            print(error)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(fastmlp.__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=True)
    equal, refusal = done.stdout.splitlines()
    assert equal == "tensor([True])"
    assert refusal.endswith("1 (ReLU) cannot be part of a chain of layers: ReLU is not a module that is fused")

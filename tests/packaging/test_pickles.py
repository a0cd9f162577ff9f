"""Pickles that versions before this one have written: they load, and compute what they did.

`pickles.json` holds them, by commit and name: compressed, in base64. A version adds its own when this file is put into
its tree and `python -c "from tests.packaging.test_pickles import write; write('COMMIT')"` is run there.
"""

import base64
import io
import json
import pickle
import pickletools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmlp

FILE = Path(__file__).with_name("pickles.json")
X = torch.tensor([[0.5, -1.0], [2.0, 0.25]])


class Tower(nn.Sequential):
    """A subclass that `convert` gives a class of both."""


class Net(nn.Module):
    """A forward to record."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(x)))


def filled(model: nn.Module) -> Any:
    """The model with parameters that do not depend on a generator."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
    return model


def step() -> fastmlp.TrainStep:
    """A step that has an optimizer of ours."""
    model = filled(fastmlp.MLP(2, [3], 1))
    return fastmlp.TrainStep(model, nn.MSELoss(), fastmlp.optim.SGD(model.parameters(), lr=0.5))


#: What is pickled, by name.
WRITTEN: dict[str, Callable[[], Any]] = {
    "Linear": lambda: filled(fastmlp.Linear(2, 3, activation=nn.LeakyReLU(0.5))),
    "MLP": lambda: filled(fastmlp.MLP(2, [3], 1, "tanh")),
    "Sequential": lambda: filled(fastmlp.Sequential(nn.Linear(2, 3), fastmlp.Sin(), fastmlp.Linear(3, 1))),
    "converted": lambda: fastmlp.convert(filled(nn.Sequential(nn.Linear(2, 3), nn.GELU("tanh"), nn.Linear(3, 1)))),
    "converted subclass": lambda: fastmlp.convert(filled(Tower(nn.Linear(2, 3), nn.ReLU()))),
    "recorded": lambda: fastmlp.convert(filled(Net()), trace=True),
    "frozen": lambda: fastmlp.freeze(filled(nn.Sequential(nn.Linear(2, 3), nn.Softplus(), nn.Linear(3, 1)))),
    "Activation": lambda: fastmlp.Activation("elu", alpha=0.5),
    "TrainStep": step,
    "Route": lambda: fastmlp.explain(torch.zeros(3, 10)),
    "Report": lambda: fastmlp.fusion_report(nn.Sequential(nn.Linear(2, 3), nn.ReLU())),
}


def write(commit: str) -> None:
    """Adds what this version writes to the file."""
    found = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    own = {name: pickletools.optimize(pickle.dumps(make(), 2)) for name, make in WRITTEN.items()}
    saved = io.BytesIO()
    torch.save(WRITTEN["Sequential"](), saved)
    own["torch.save"] = saved.getvalue()
    found[commit] = {name: base64.b64encode(zlib.compress(data, 9)).decode() for name, data in own.items()}
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


OLD: dict[str, dict[str, str]] = json.loads(FILE.read_text(encoding="utf-8"))


def written(commit: str, name: str) -> bytes:
    return zlib.decompress(base64.b64decode(OLD[commit][name]))


def assert_same(loaded: Any, name: str) -> None:
    """What was loaded is what this version makes, and does the same."""
    made = WRITTEN[name]()
    if isinstance(made, fastmlp.TrainStep):
        assert type(loaded) is type(made)
        target = torch.zeros(2, 1)
        assert [loaded(X, target) for _ in range(2)] == [made(X, target) for _ in range(2)]
    elif isinstance(made, (nn.Module, fastmlp.FrozenMLP)):
        assert torch.equal(loaded(X), made(X))
        assert repr(loaded) == repr(made)
    else:
        assert type(loaded) is type(made)
        assert loaded == made


@pytest.mark.parametrize(
    ("commit", "name"), [(commit, name) for commit, found in OLD.items() for name in found if name != "torch.save"]
)
def test_old_pickles_load(commit: str, name: str) -> None:
    assert_same(pickle.loads(written(commit, name)), name)


@pytest.mark.parametrize("commit", OLD)
def test_old_files_of_torch_load(commit: str) -> None:
    assert_same(torch.load(io.BytesIO(written(commit, "torch.save")), weights_only=False), "Sequential")


@pytest.mark.parametrize("name", WRITTEN)
def test_own_pickles_load(name: str) -> None:
    assert_same(pickle.loads(pickle.dumps(WRITTEN[name]())), name)


@pytest.mark.parametrize("commit", OLD)
def test_old_layers_are_ours(commit: str) -> None:
    """Under the old name and under the new one there is one class, which runs are made of."""
    model = pickle.loads(written(commit, "Sequential"))
    assert [type(child) for child in model] == [nn.Linear, fastmlp.Sin, fastmlp.Linear]
    assert fastmlp.explain(model, X) == fastmlp.Route("direct", "")
    assert type(pickle.loads(written(commit, "converted"))[0]) is fastmlp.Linear

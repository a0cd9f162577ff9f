"""How a frozen network follows its model: what a call sees, what else reads the model, and what a living one must not
hinder.
"""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import FrozenMLP, convert, freeze
from tests.support.derivatives import assert_same
from tests.support.small import Net, norm, sequential

X = torch.linspace(-2, 2, 12).view(3, 4)


# Views of the same memory.


def square() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda w: w.t(),
    "fewer rows": lambda w: w[:3],
    "expanded": lambda w: w[:, :1].expand(4, 4),
    "expanded row": lambda w: w[:1].expand(4, 4),
    "flipped halves": lambda w: w.view(2, 2, 4).transpose(0, 1).reshape(4, 4).contiguous(),
    "other dtype": lambda w: w.view(torch.int32).view(torch.float32).t(),
    "other place": lambda w: w.flatten()[:12].view(3, 4),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_data_becomes_a_view(view: Callable[[Tensor], Tensor]) -> None:
    model = nn.Linear(4, 4, bias=False)
    frozen = freeze(model)
    before = frozen(X)
    model.weight.data = view(model.weight.data)
    found = frozen(X)
    assert not torch.equal(found, before)
    assert torch.equal(found, freeze(model)(X))
    with torch.no_grad():
        assert found.shape == model(X).shape


def test_data_becomes_bits_of_another_dtype() -> None:
    model = nn.Linear(4, 4, bias=False).half()
    frozen = freeze(model)
    frozen(X.half())
    model.weight.data = model.weight.data.view(torch.bfloat16)
    assert torch.equal(frozen(X.bfloat16()), freeze(model)(X.bfloat16()))


def test_a_parameter_of_the_same_memory() -> None:
    """With the same number of versions, which are its own."""
    model = nn.Linear(4, 4, bias=False)
    other = nn.Parameter(model.weight.data)
    frozen = freeze(model)
    before = frozen(X)
    with torch.no_grad():
        while other._version < model.weight._version:
            other.mul_(2)
    model.weight, old = other, model.weight
    assert old._version == other._version
    assert old.data_ptr() == other.data_ptr()
    assert torch.equal(frozen(X), freeze(model)(X))
    assert not torch.equal(frozen(X), before)


def test_a_reused_address_is_another_parameter() -> None:
    """Parameters that were made where the old ones were a moment ago, with the same count of versions."""
    model = nn.Linear(4, 4, bias=False)
    frozen = freeze(model)
    for value in range(200):
        frozen(X)
        with torch.no_grad():
            model.weight = None  # type: ignore[assignment]
            model.weight = nn.Parameter(torch.full((4, 4), float(value)))
        assert (frozen(torch.ones(4)) == 4 * value).all()


# What of the modules is seen.


def whole() -> nn.Sequential:
    """With everything that has attributes."""
    return nn.Sequential(
        *(nn.Linear(4, 5), norm(5), nn.LeakyReLU(0.1), nn.Dropout(0.5), nn.Sequential(nn.Linear(5, 5), nn.GELU())),
        fastmlp.Linear(5, 3, activation="elu"),
    ).eval()


def at(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "slope": lambda m: setattr(at(m, "2"), "negative_slope", 0.5),
    "form": lambda m: setattr(at(m, "4.1"), "approximate", "tanh"),
    "activation": lambda m: setattr(at(m, "5"), "activation", "tanh"),
    "eps": lambda m: setattr(at(m, "1"), "eps", 3.0),
    "replaced": lambda m: setattr(m, "2", nn.Tanh()),
    "replaced below": lambda m: setattr(at(m, "4"), "1", nn.Tanh()),
    "appended": lambda m: at(m, "4").append(nn.Sequential()) and at(m, "5").weight.data.mul_(2),
    "class": lambda m: setattr(at(m, "2"), "__class__", nn.ReLU),
    "another dictionary": lambda m: setattr(at(m, "2"), "__dict__", {**at(m, "2").__dict__, "negative_slope": 0.7}),
    "another dictionary of children": lambda m: setattr(at(m, "4"), "_modules", {"0": nn.Linear(5, 5), "1": nn.ReLU()}),
    "another dictionary of parameters": lambda m: setattr(at(m, "0"), "_parameters", dict(nn.Linear(4, 5)._parameters)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_changes_of_modules_are_seen(change: Callable[[nn.Module], Any]) -> None:
    model = whole()
    frozen = freeze(model)
    before = frozen(X)
    assert torch.equal(frozen(X), before)
    change(model)
    found = frozen(X)
    assert not torch.equal(found, before)
    assert torch.equal(found, freeze(model)(X))
    with torch.no_grad():
        double = copy.deepcopy(model).double()
        assert_same([freeze(double)(X.double())], [double(X.double())])


def test_track_running_stats_means_nothing_in_eval_mode() -> None:
    """As in torch: the statistics that are there are used."""
    model = whole().double()
    frozen = freeze(model)
    setattr(at(model, "1"), "track_running_stats", False)  # noqa: B010
    with torch.no_grad():
        assert_same([frozen(X.double())], [model(X.double())])


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any], str]] = {
    "dropout in training mode": (
        lambda m: at(m, "3").train(),
        lambda m: at(m, "3").eval(),
        r"3 \(Dropout\) .* in training mode",
    ),
    "norm in training mode": (
        lambda m: at(m, "1").train(),
        lambda m: at(m, "1").eval(),
        r"1 \(BatchNorm1d\) .* in training mode",
    ),
    "all in training mode": (lambda m: m.train(), lambda m: m.eval(), "in training mode"),
    "forward of an instance": (
        lambda m: setattr(at(m, "2"), "forward", lambda x: x),
        lambda m: delattr(at(m, "2"), "forward"),
        r"2 \(LeakyReLU\) .* its forward was replaced",
    ),
    "forward of the model": (
        lambda m: setattr(m, "forward", lambda x: x),
        lambda m: delattr(m, "forward"),
        "its forward was replaced",
    ),
    "compiled in place": (
        lambda m: at(m, "4").compile(backend="eager"),
        lambda m: setattr(at(m, "4"), "_compiled_call_impl", None),
        r"4 \(Sequential\) .* it was compiled by itself",
    ),
    "other hooks": (
        lambda m: setattr(at(m, "2"), "_forward_hooks", {0: lambda *_: None}),
        lambda m: setattr(at(m, "2"), "_forward_hooks", {}),
        "it has hooks",
    ),
    "without a parameter": (
        lambda m: m.__dict__.setdefault("kept", at(m, "0")._parameters.pop("bias")),
        lambda m: at(m, "0")._parameters.update(bias=m.__dict__.pop("kept")),
        "parameters (of 0 )?are not where",
    ),
}
for where in ("", "0", "1", "2", "3", "4", "4.0", "5"):
    for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):

        def add(m: nn.Module, where: str = where, kind: str = kind) -> None:
            handle = getattr(at(m, where), f"register_{kind}")(lambda *_: None)
            m.__dict__["handles"] = [handle]

        back = lambda m: m.__dict__["handles"].pop().remove()  # noqa: E731
        REFUSED[f"{kind} on {where or 'the model'}"] = (add, back, "has hooks")


@pytest.mark.parametrize(("change", "back", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_freeze_refuses_is_refused_at_the_next_call(
    change: Callable[[nn.Module], Any], back: Callable[[nn.Module], Any], message: str
) -> None:
    model = whole()
    frozen = freeze(model)
    before = frozen(X)
    out = torch.full((3, 3), 7.0)
    change(model)
    for _ in range(2):
        with pytest.raises(TypeError, match=message):
            frozen(X, out=out)
        with pytest.raises(TypeError, match=message):
            freeze(model)
        assert "FrozenMLP(fastmlp: " in repr(frozen)
        with pytest.raises(TypeError, match=message):
            pickle.dumps(frozen)
    assert (out == 7).all()
    back(model)
    assert torch.equal(frozen(X), before)


def test_patches_of_classes_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = whole()
    frozen = freeze(model)
    before = frozen(X)
    with monkeypatch.context() as patch:
        patch.setattr(nn.LeakyReLU, "forward", lambda self, x: x)
        with pytest.raises(TypeError, match="the forward of LeakyReLU was replaced"):
            frozen(X)
    assert torch.equal(frozen(X), before)


class Derived(Net):
    """Has the forward of its base."""


@pytest.mark.parametrize("kind", [Net, Derived])
def test_patches_of_recorded_classes_and_their_bases_are_seen(kind: type[Net], monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = kind()
    network = freeze(recorded)
    before = network(X)
    with monkeypatch.context() as patch:
        patch.setattr(Net, "forward", lambda self, x: self.fc2(torch.tanh(self.fc1(x))))
        found = network(X)
        assert torch.equal(found, freeze(recorded)(X))
    assert not torch.equal(before, found)
    assert torch.equal(network(X), before)


def test_hooks_on_all_modules_are_seen() -> None:
    model = whole()
    frozen = freeze(model)
    before = frozen(X)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(TypeError, match="there are hooks on all modules"):
            frozen(X)
    finally:
        handle.remove()
    assert torch.equal(frozen(X), before)


def test_converted_and_reverted_models_are_followed() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    frozen = freeze(model)
    before = frozen(X)
    convert(model)
    assert torch.equal(frozen(X), before)
    setattr(model[0], "activation", "sigmoid")  # noqa: B010
    assert "graph of 2 networks" in repr(frozen)
    assert torch.equal(frozen(X), freeze(model)(X))
    setattr(model[0], "activation", None)  # noqa: B010
    fastmlp.revert(model)
    assert torch.equal(frozen(X), before)


# What else reads the model.


def rebuilt(frozen: FrozenMLP) -> Any:
    build, state = frozen.__reduce__()
    return build(*state)


READ: dict[str, Callable[[FrozenMLP], Any]] = {
    "pickle": lambda frozen: pickle.loads(pickle.dumps(frozen))(X),
    "copy": lambda frozen: copy.copy(frozen)(X),
    "deepcopy": lambda frozen: copy.deepcopy(frozen)(X),
    "in a container": lambda frozen: copy.deepcopy({"a": [frozen]})["a"][0](X),
    "state": lambda frozen: rebuilt(frozen)(X),
}


@pytest.mark.parametrize("read", READ.values(), ids=READ.keys())
def test_copies_hold_the_weights_of_the_model_as_it_is(read: Callable[[FrozenMLP], Any]) -> None:
    model = sequential()
    frozen = freeze(model)
    before = frozen(X)
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(2)
    found = read(frozen)
    assert not torch.equal(found, before)
    assert torch.equal(found, freeze(model)(X))
    model[1] = nn.Tanh()
    assert torch.equal(read(frozen), freeze(model)(X))
    model.get_parameter("0.weight").data = model.get_parameter("0.weight").data.flip(0)
    assert torch.equal(read(frozen), freeze(model)(X))


def test_text_and_sizes_are_those_of_the_model_as_it_is() -> None:
    model = sequential()
    frozen = freeze(model)
    model[0], model[2] = nn.Linear(7, 100), nn.Linear(100, 2)
    expected = freeze(model)
    assert frozen.in_features == 7
    model[2] = nn.Linear(100, 9)
    assert frozen.out_features == 9
    model[2] = nn.Linear(100, 2)
    assert frozen.nbytes == expected.nbytes
    model[1] = nn.LeakyReLU(0.5)
    assert repr(frozen) == "FrozenMLP(7 -> 100 leaky_relu(negative_slope=0.5) -> 2, torch.float32)"
    model.double()
    assert repr(frozen) == "FrozenMLP(7 -> 100 leaky_relu(negative_slope=0.5) -> 2, torch.float64)"
    model[1] = nn.LayerNorm(100)
    assert "LayerNorm" in repr(frozen)
    for name in ("in_features", "out_features", "nbytes"):
        with pytest.raises(TypeError, match="LayerNorm"):
            getattr(frozen, name)


class Own(FrozenMLP):
    """A class of a user's."""


def test_copies_are_of_the_same_class() -> None:
    frozen = freeze(sequential())
    frozen.__class__ = Own
    for copied in (copy.copy(frozen), copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert type(copied) is Own
        assert torch.equal(copied(X), frozen(X))


# What a living frozen network must not hinder.


@pytest.fixture(params=[True, False], ids=["swap", "data"])
def swaps(request: pytest.FixtureRequest) -> Iterator[None]:
    """Conversions of modules swap tensors, or write `.data`."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


OPERATIONS: dict[str, Callable[[nn.Module], Any]] = {
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "to": lambda m: m.to(torch.bfloat16),
    "load_state_dict": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "assign": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True),
    "share_memory": lambda m: m.share_memory(),
    "apply": lambda m: m._apply(lambda t: t + 1),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_conversions(operation: Callable[[nn.Module], Any], swaps: None) -> None:
    model = whole()
    frozen = freeze(model)
    frozen(X)
    operation(model)
    x = X.to(next(model.parameters()).dtype)
    assert torch.equal(frozen(x), freeze(model)(x))
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    assert torch.equal(frozen(x), freeze(model)(x))


def test_swapped_tensors() -> None:
    model = square()
    frozen = freeze(model)
    before = frozen(X)
    one, other = model.get_parameter("0.weight"), model.get_parameter("2.weight")
    torch.utils.swap_tensors(one, other)
    found = frozen(X)
    assert not torch.equal(found, before)
    assert torch.equal(found, freeze(model)(X))
    torch.utils.swap_tensors(one, other)
    assert torch.equal(frozen(X), before)


def test_tensors_go_while_it_lives() -> None:
    model = sequential()
    frozen = freeze(model)
    tensors = [weakref.ref(p) for p in model.parameters()]
    memory = [weakref.ref(p.untyped_storage()) for p in model.parameters()]
    for _ in range(2):
        frozen(X)
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(2)
    frozen(X)
    del model
    gc.collect()
    assert [reference() for reference in tensors + memory] == [None] * 8
    frozen(X)


# What no call sees, as documented, and `refresh` reads.


def written_by_fused_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.5, fused=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


UNSEEN: dict[str, Callable[[nn.Module], Any]] = {
    "data": lambda m: next(m.parameters()).data.mul_(2),
    "storage": lambda m: next(m.parameters()).untyped_storage().copy_(torch.ones(20).untyped_storage()),
    "numpy": lambda m: np.multiply(a := next(m.parameters()).detach().numpy(), 2, out=a),
    "fused step": written_by_fused_step,
}


@pytest.mark.parametrize("write", UNSEEN.values(), ids=UNSEEN.keys())
def test_refresh_reads_what_no_call_sees(write: Callable[[nn.Module], Any]) -> None:
    model = sequential()
    frozen = freeze(model)
    before = frozen(X)
    write(model)
    frozen.refresh()
    assert not torch.equal(frozen(X), before)
    assert torch.equal(frozen(X), freeze(model)(X))

"""Frozen networks as modules: within models, copies, `torch.compile` and `torch.export`; and read by `torch.load`."""

import copy
import gc
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastmlp
from fastmlp import FrozenMLP, FrozenModule, freeze, load_frozen
from tests.support.axes import DTYPES
from tests.support.endings import FORMS, HEADS, body
from tests.support.graphs import GRAPHS, as_tuple


class Around(nn.Module):
    """A model that has a frozen network between layers."""

    def __init__(self, network: FrozenMLP) -> None:
        super().__init__()
        self.before, self.frozen, self.after = nn.Linear(5, 4), FrozenModule(network), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.frozen(self.before(x).detach()).relu())


def around() -> Around:
    return Around(freeze(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))))


@pytest.fixture
def compiled(validated: None) -> Any:
    """torch.compile without a break of the graph, by a backend that takes no compiler."""
    torch._dynamo.reset()
    yield lambda model, backend="aot_eager": torch.compile(model, fullgraph=True, backend=backend)
    torch._dynamo.reset()


# Modules.


def test_a_child_of_a_module() -> None:
    model = around()
    x = torch.randn(3, 5)
    assert torch.equal(model.frozen(x[:, :4]), model.frozen.network(x[:, :4]))
    assert [name for name, _ in model.named_children()] == ["before", "frozen", "after"]
    assert set(model.state_dict()) == {"before.weight", "before.bias", "after.weight", "after.bias"}
    model.load_state_dict(copy.deepcopy(model).state_dict())
    model(x).sum().backward()
    assert model.after.weight.grad is not None
    assert "(frozen): FrozenModule(4 -> 6 tanh -> 3, torch.float32)" in repr(model)
    assert model.train().eval().requires_grad_(False)(x).shape == (3, 2)
    assert nn.Sequential(model, nn.ReLU())(x).shape == (3, 2)


def test_conversions_do_not_reach_it() -> None:
    module = FrozenModule(freeze(nn.Linear(4, 3))).double()
    with pytest.raises(RuntimeError, match=r"input has dtype torch.float64, expected torch.float32"):
        module(torch.zeros(2, 4).double())


def test_it_follows_the_model_of_its_network() -> None:
    model = nn.Linear(2, 1)
    module = FrozenModule(freeze(model))
    with torch.no_grad():
        model.weight.fill_(2)
        model.bias.fill_(1)
    assert module(torch.ones(2)).item() == 5


def test_only_frozen_networks() -> None:
    for wrong in (nn.Linear(2, 1), None, FrozenMLP):
        with pytest.raises(TypeError, match=r"network must be a fastmlp.FrozenMLP, got .*; fastmlp.freeze makes one"):
            FrozenModule(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle"])
def test_copies(how: str, compiled: Any) -> None:
    model, x = around(), torch.randn(3, 5)
    again = {
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "pickle": lambda given: pickle.loads(pickle.dumps(given)),
    }[how](model)
    expected = model(x)
    if how != "copy":
        assert again.frozen._key != model.frozen._key
        del model
        gc.collect()
    assert torch.equal(again(x), expected)
    with torch.no_grad():
        assert torch.equal(compiled(again)(x), expected)


def test_fake_tensors_around_leave_it_as_it_is() -> None:
    """Weights are read as they are, whatever mode the caller is in."""
    network, x = freeze(nn.Linear(4, 3)), torch.randn(2, 4)
    with FakeTensorMode():
        again = copy.deepcopy(network)
    assert torch.equal(again(x), network(x))


def test_another_size_after_compilation_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    module = FrozenModule(freeze(model))
    model[0] = nn.Linear(4, 2)
    with pytest.raises(RuntimeError, match="fastmlp: the model of a frozen network has got layers of other sizes"):
        torch.ops.fastmlp.frozen([torch.zeros(4)], module._key)
    assert FrozenModule(module.network)(torch.zeros(4)).shape == (2,)


# torch.compile.


def test_no_break_of_the_graph(compiled: Any) -> None:
    model, calls = around(), list[Any]()
    explained = torch._dynamo.explain(model)(torch.randn(3, 5))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    function = compiled(model, backend)
    for rows in (3, 4, 7):
        x = torch.randn(rows, 5)
        assert torch.equal(function(x), model(x))
    (first, *_) = calls
    assert any(node.target is torch.ops.fastmlp.frozen for node in first.graph.nodes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_by_the_compiler(compiled: Any) -> None:
    """Code that Inductor makes, with what it checks of sizes and strides."""
    model, x = around(), torch.randn(6, 5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, "inductor")(x), model(x))


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name: str, compiled: Any) -> None:
    """The operator says shapes and dtypes as they will be."""
    make, features = GRAPHS[name]
    inputs = tuple(torch.randn(9, size) for size in features)
    module = FrozenModule(freeze(make().eval(), inputs=inputs if len(inputs) > 1 else None))
    torch.library.opcheck(torch.ops.fastmlp.frozen, (list(inputs), module._key))
    found, expected = compiled(module)(*inputs), module(*inputs)
    assert isinstance(found, tuple) == isinstance(expected, tuple)
    assert all(map(torch.equal, as_tuple(found), as_tuple(expected)))


@pytest.mark.parametrize("form", [*FORMS, *HEADS])
def test_shapes(form: str) -> None:
    outputs, make = FORMS[form] if form in FORMS else (6, HEADS[form][1])
    module = FrozenModule(freeze(make(body(outputs))))
    x = torch.randn(8, 6, dtype=torch.float64)
    torch.library.opcheck(torch.ops.fastmlp.frozen, ([x], module._key), test_utils=["test_faketensor"])


def test_dtypes_and_flattened_inputs() -> None:
    tests = ["test_schema", "test_faketensor"]
    for dtype in DTYPES:
        module = FrozenModule(freeze(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).to(dtype)))
        torch.library.opcheck(
            torch.ops.fastmlp.frozen, ([torch.randn(3, 4, 3).to(dtype)], module._key), test_utils=tests
        )
    module = FrozenModule(freeze(nn.Linear(12, 5), dtype=torch.bfloat16))
    for shape in ((12,), (0, 12), (2, 3, 12)):
        torch.library.opcheck(torch.ops.fastmlp.frozen, ([torch.randn(shape)], module._key), test_utils=tests)


def test_gradients_are_refused_when_they_are_asked_for(compiled: Any) -> None:
    module, x = FrozenModule(freeze(nn.Linear(4, 3))), torch.randn(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"input requires grad, .* pass input.detach\(\)"):
        module(x)
    with pytest.raises(RuntimeError, match="fastmlp: a frozen network has no gradients"):
        torch.ops.fastmlp.frozen([x], module._key)[0].sum().backward()
    with torch.no_grad():
        assert torch.equal(compiled(module)(x), module(x))


def test_a_network_that_is_gone_is_named() -> None:
    module = FrozenModule(freeze(nn.Linear(4, 3)))
    key = module._key
    del module
    gc.collect()
    with pytest.raises(
        RuntimeError, match="fastmlp: the frozen network of a compiled or exported program does not exist"
    ):
        torch.ops.fastmlp.frozen([torch.zeros(4)], key)


def test_exported_programs() -> None:
    model, x = around(), torch.randn(3, 5)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},)).module()
    for batch in (3, 8):
        x = torch.randn(batch, 5)
        assert torch.equal(program(x), model(x))


# torch.load.


def by_torch(given: Any) -> Any:
    memory = io.BytesIO()
    torch.save(given, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_load_reads_chains(dtype: torch.dtype) -> None:
    network = freeze(fastmlp.MLP(4, [5], 3, fastmlp.Activation("elu", alpha=0.5)).to(dtype))
    again, x = by_torch({"network": network, "step": 3})["network"], torch.randn(7, 4).to(dtype)
    assert type(again) is FrozenMLP
    assert repr(again) == repr(network)
    assert torch.equal(again(x), network(x))


@pytest.mark.parametrize("name", GRAPHS)
def test_torch_load_reads_graphs(name: str) -> None:
    make, features = GRAPHS[name]
    inputs = tuple(torch.randn(9, size) for size in features)
    network = freeze(make().eval(), inputs=inputs if len(inputs) > 1 else None)
    assert all(map(torch.equal, as_tuple(by_torch(network)(*inputs)), as_tuple(network(*inputs))))


class Own(FrozenMLP):
    """What torch does not know."""


def test_torch_load_names_what_it_does_not_know() -> None:
    own = freeze(nn.Linear(2, 1))
    own.__class__ = Own
    with pytest.raises(pickle.UnpicklingError, match=r"add_safe_globals\(\[.*Own\]\)"):
        by_torch(own)


def test_torch_load_without_the_package_says_what_to_do(tmp_path: Path) -> None:
    torch.save(freeze(nn.Linear(2, 1)), tmp_path / "network.pt")
    code = f"import torch; torch.load({str(tmp_path / 'network.pt')!r}, weights_only=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "add_safe_globals([fastmlp.frozen._rebuild])" in done.stderr


@pytest.mark.parametrize("kind", [nn.Linear, dict, torch.zeros, "FrozenMLP", None])
def test_what_is_rebuilt_is_a_frozen_network(kind: Any) -> None:
    """Because torch.load calls what rebuilds with what a stranger's pickle says."""
    for network in (freeze(nn.Linear(2, 1)), freeze(GRAPHS["actor"][0]())):
        build, (_, *state) = network.__reduce__()
        with pytest.raises(TypeError, match="the pickle of a frozen network is damaged: it is to become a"):
            build(kind, *state)


def test_a_module_of_a_loaded_network(tmp_path: Path, compiled: Any) -> None:
    network = freeze(nn.Linear(4, 3))
    network.save(tmp_path / "network.safetensors")
    module, x = FrozenModule(load_frozen(tmp_path / "network.safetensors")), torch.randn(2, 4)
    assert torch.equal(compiled(module)(x), network(x))

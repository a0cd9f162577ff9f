"""Frozen networks in files of safetensors: the same bits, and damaged, foreign and newer files refused by name."""

import copy
import json
import math
import random
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastmlp
from fastmlp import FrozenMLP, freeze, frozen_checks, load_frozen
from tests.support.axes import ACTIVATIONS, DTYPES
from tests.support.endings import FORMS, HEADS, body
from tests.support.graphs import GRAPHS, as_tuple
from tests.support.to_freeze import MODELS

KEY = "fastmlp.frozen"
Description = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def saved(network: FrozenMLP, path: Path) -> FrozenMLP:
    """What comes back from a file."""
    network.save(path)
    again = load_frozen(path)
    assert repr(again) == repr(network)
    assert again.nbytes == network.nbytes
    return again


def assert_same_bits(network: FrozenMLP, again: FrozenMLP, *inputs: torch.Tensor) -> None:
    for ours, theirs in zip(as_tuple(again(*inputs)), as_tuple(network(*inputs)), strict=True):
        assert ours.shape == theirs.shape
        # Compared as bytes, because NaN is no number and zeros have signs.
        assert torch.equal(ours.contiguous().view(-1).view(torch.uint8), theirs.contiguous().view(-1).view(torch.uint8))


def graph(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[FrozenMLP, tuple[torch.Tensor, ...]]:
    make, features = GRAPHS[name]
    model = make().to(dtype).eval()
    inputs = tuple(torch.randn(9, size, dtype=dtype) for size in features)
    return freeze(model, inputs=inputs if len(inputs) > 1 else None, **more), inputs


# What is saved.


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_models(make: Callable[[], nn.Module], tmp_path: Path, isa: str) -> None:
    network = freeze(make().eval())
    assert_same_bits(network, saved(network, tmp_path / "network.safetensors"), torch.randn(37, 4))


def test_activations(activation: fastmlp.Activation, dtype: torch.dtype, tmp_path: Path) -> None:
    network = freeze(fastmlp.MLP(4, [7, 5], 3, activation, output_activation=activation).to(dtype))
    again = saved(network, tmp_path / "network.safetensors")
    assert_same_bits(network, again, 4 * torch.randn(37, 4).to(dtype))


def test_parameters_of_activations_to_the_last_bit(tmp_path: Path) -> None:
    for slope in (0.1, 1 / 3, 5e-324, -1e308, math.inf, -math.inf, math.nan):
        network = freeze(nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(slope)).double())
        again = saved(network, tmp_path / "network.safetensors")
        found, given = (fastmlp._C.unload_frozen(one)[3][0] for one in (again, network))
        assert found == given or (math.isnan(found) and math.isnan(given))


def test_weights_in_bfloat16_with_float32_around(tmp_path: Path) -> None:
    network = freeze(body(3, torch.float32), dtype=torch.bfloat16)
    assert_same_bits(network, saved(network, tmp_path / "network.safetensors"), torch.randn(5, 6))
    _, inputs = graph("layer norm")
    network = freeze(GRAPHS["layer norm"][0]().eval(), dtype=torch.bfloat16)
    assert_same_bits(network, saved(network, tmp_path / "network.safetensors"), *inputs)


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str, tmp_path: Path) -> None:
    network = freeze(HEADS[name][1](body(5)))
    assert_same_bits(network, saved(network, tmp_path / "network.safetensors"), torch.randn(7, 6, dtype=torch.float64))


@pytest.mark.parametrize("form", FORMS)
def test_shapes(form: str, tmp_path: Path) -> None:
    outputs, make = FORMS[form]
    network = freeze(make(body(outputs)))
    assert_same_bits(network, saved(network, tmp_path / "network.safetensors"), torch.randn(8, 6, dtype=torch.float64))


def test_flattened_inputs(tmp_path: Path) -> None:
    network = freeze(nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh()))
    assert_same_bits(network, saved(network, tmp_path / "network.safetensors"), torch.randn(7, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    network, inputs = graph(name, dtype)
    assert_same_bits(network, saved(network, tmp_path / "network.safetensors"), *inputs)


def test_layers_of_no_features(tmp_path: Path) -> None:
    narrow = fastmlp.MLP(4, [1], 3)
    for name, shape in (("0.weight", (0, 4)), ("0.bias", (0,)), ("2.weight", (3, 0))):
        narrow.get_parameter(name).data = torch.empty(shape)
    network = freeze(narrow)
    assert_same_bits(network, saved(network, tmp_path / "network.safetensors"), torch.randn(3, 4))


def test_special_weights(tmp_path: Path) -> None:
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[math.nan, -0.0, math.inf, 1e-45], [-math.inf, 0.0, 1.0, -1e-45]]))
    network = freeze(layer)
    assert_same_bits(network, saved(network, tmp_path / "network.safetensors"), torch.eye(4))


def test_a_loaded_network_is_independent_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    network, inputs = graph("gaussian")
    again = saved(network, path)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert_same_bits(network, again, *inputs)
    with pytest.raises(RuntimeError, match="there is no model to refresh from"):
        again.refresh()


def test_the_weights_of_the_moment_are_saved(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    network = freeze(model)
    with torch.no_grad():
        model.weight.fill_(2)
        model.bias.fill_(1)
    network.save(tmp_path / "network.safetensors")
    assert load_frozen(tmp_path / "network.safetensors")(torch.ones(2)).item() == 5


def test_the_same_network_makes_the_same_file(tmp_path: Path) -> None:
    network, _ = graph("highway")
    for name in ("a", "b"):
        network.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_description_that_others_can_read(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    freeze(nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(math.inf))).save(path)
    assert described(path) == {
        **{"version": 1, "kind": "chain", "dtype": "float32", "float32_ends": False, "matrices_only": False},
        **{"flattens": False, "head": "none", "reshapings": []},
        "networks": [
            [
                {
                    **{"in_features": 4, "out_features": 3, "bias": True},
                    **{"activation": "leaky_relu", "parameters": {"negative_slope": "inf"}},
                }
            ]
        ],
    }
    assert {name: list(tensor.shape) for name, tensor in load_file(path).items()} == {
        "networks.0.layers.0.weight": [3, 4],
        "networks.0.layers.0.bias": [3],
    }


# What cannot be saved.


def test_refused_by_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "network.safetensors"
    network, _ = graph("layer norm")
    monkeypatch.setattr(frozen_checks, "MOST_KEPT", 200)
    with pytest.raises(ValueError, match=r"^fastmlp: this network cannot be saved: it keeps \d+ numbers of each row"):
        network.save(path)
    monkeypatch.setattr(frozen_checks, "MOST_FEATURES", 8)
    with pytest.raises(ValueError, match=r"cannot be saved: in_features of networks\[0\]\[0\] is 9, expected a whole"):
        network.save(path)
    with pytest.raises(RuntimeError, match="holds no network"):
        FrozenMLP().save(path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        freeze(nn.Linear(2, 1)).save(tmp_path / "nowhere" / "network.safetensors")


def test_networks_of_other_devices_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastmlp._C, "packing_devices", lambda: [])
    network = freeze(nn.Linear(2, 1))
    for call in (network.save, network.to_c):
        with pytest.raises(
            ValueError, match=r"is for frozen networks on the CPU, and this one is on .*; freeze a copy"
        ):
            call(tmp_path / "network")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["save", "load_frozen"])
def test_without_the_package_the_command_is_named(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "network.safetensors"
    network = freeze(nn.Linear(2, 1))
    network.save(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=rf"{what} needs the package safetensors; .* pip install 'fastmlp\[serve\]'"):
        network.save(path) if what == "save" else load_frozen(path)


# Damaged files.


def described(path: Path) -> Description:
    """The description in a file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"][KEY])


def with_little_memory(function: Callable[[], Any]) -> Any:
    """Whoever takes memory for what a damaged file asks for is found out."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
    try:
        return function()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of a chain or a graph with its description, text or tensors changed."""

    def write(
        kind: str,
        change: Callable[[Description], Any] = lambda _: None,
        tensors: Callable[[Tensors], Any] = lambda _: None,
        text: Callable[[str], str] = lambda text: text,
        key: str = KEY,
    ) -> Path:
        path = tmp_path / "damaged.safetensors"
        network = freeze(body(3, torch.float32)) if kind == "chain" else graph(kind)[0]
        network.save(path)
        description, own = described(path), load_file(path)
        changed = change(description)
        description = changed if isinstance(changed, dict) else description
        tensors(own)
        save_file(own, path, {key: text(json.dumps(description))})
        return path

    return write


def setting(value: Any, *place: Any) -> Callable[[Description], None]:
    """Puts a value in a place of a description."""

    def change(description: Description) -> None:
        target: Any = description
        for key in place[:-1]:
            target = target[key]
        target[place[-1]] = value

    return change


def without(*place: Any) -> Callable[[Description], None]:
    def change(description: Description) -> None:
        target: Any = description
        for key in place[:-1]:
            target = target[key]
        del target[place[-1]]

    return change


HUGE = 1 << 62
LAYER = ("networks", 0, 0)
CHAINS: dict[str, tuple[Callable[[Description], Any], str]] = {
    "newer": (setting(2, "version"), r"damaged.safetensors is of version 2 of the format, .* reads 1; update fastmlp$"),
    "no version": (without("version"), "its description has no version"),
    "version of a bool": (setting(True, "version"), "its description has no version"),
    "version zero": (setting(0, "version"), "its description has no version"),
    "kind": (setting("tree", "kind"), "its kind is 'tree', expected 'chain' or 'graph'"),
    "other kind": (setting("graph", "kind"), "it lacks 'memories'"),
    "more": (setting(1, "surprise"), "it has the unknown entry 'surprise'"),
    "less": (without("head"), "it lacks 'head'"),
    "dtype": (setting("float8", "dtype"), "its dtype is 'float8', expected one of float32"),
    "module as dtype": (setting("nn", "dtype"), "its dtype is 'nn'"),
    "other dtype": (setting("float64", "dtype"), "type F32, expected .* F64"),
    "float32 ends": (setting(True, "float32_ends"), "float32 with weights in torch.bfloat16 only"),
    "flag": (setting(1, "flattens"), "flattens of it is 1, expected bool"),
    "networks": (setting([], "networks"), "it has 0 networks, expected one"),
    "layers": (setting([[]], "networks"), r"networks\[0\] is \[\], expected a list of layers"),
    "layer": (setting(3, *LAYER), r"networks\[0\]\[0\] is 3, expected an object"),
    "huge": (setting(HUGE, *LAYER, "out_features"), "out_features of .* is 4611686018427387904, expected a whole"),
    "negative": (setting(-6, *LAYER, "in_features"), "in_features of .* is -6, expected a whole number"),
    "fraction": (setting(6.0, *LAYER, "in_features"), "in_features of .* is 6.0, expected int"),
    "other size": (
        setting(7, *LAYER, "in_features"),
        r"weight' is of shape \[16, 6\] and type F32, expected \[16, 7\]",
    ),
    "between layers": (setting(17, *LAYER, "out_features"), "takes 16 features, and the layer before it makes 17"),
    "bias": (setting(False, *LAYER, "bias"), "it has, which belongs to no layer, the tensor .*layers.0.bias"),
    "activation": (setting("step", *LAYER, "activation"), "the activation of .* is 'step', which does not exist"),
    "activation as list": (setting([], *LAYER, "activation"), r"activation of .* is \[\], expected str"),
    "parameters": (setting({"alpha": 1.0}, *LAYER, "parameters"), r"parameters of .* are \['alpha'\], expected \[\]"),
    "head": (setting("hardmax", "head"), "ends with none, softmax or log_softmax, got hardmax"),
    "reshaping": (setting([["transpose", [1, 0]]], "reshapings"), "the call transpose of 2 numbers"),
    "numbers of a reshaping": (setting([["view", [HUGE]]], "reshapings"), r"a number of reshapings\[0\] is 4611"),
    "half a reshaping": (setting([["view"]], "reshapings"), r"reshapings\[0\] is \['view'\], expected a list of"),
    "fewer layers": (without("networks", 0, 2), "it has, which belongs to no layer, the tensor 'networks.0.layers.2"),
    "no layers of nothing": (
        lambda d: d["networks"][0].extend(
            [{**d["networks"][0][-1], "in_features": 3, "out_features": 3, "bias": False}]
        ),
        "it lacks the tensor 'networks.0.layers.3.weight'",
    ),
}


@pytest.mark.parametrize(("change", "message"), CHAINS.values(), ids=CHAINS.keys())
def test_damaged_chains(change: Callable[[Description], Any], message: str, written: Callable[..., Path]) -> None:
    path = written("chain", change)
    with pytest.raises(ValueError, match=message) as caught:
        with_little_memory(lambda: load_frozen(path))
    assert str(caught.value).startswith(f"fastmlp: {path} is ")


def test_parameters_out_of_range(tmp_path: Path) -> None:
    path = tmp_path / "damaged.safetensors"
    freeze(nn.Sequential(nn.Linear(2, 3), nn.CELU(0.5))).save(path)
    for value, message in (
        (-1.0, "alpha of activation 'celu' must be above 0"),
        (1, "alpha of .* is 1, expected a number"),
        ("1.0", "alpha of .* is '1.0', expected a number"),
        ("nan", "must be above 0"),
        (True, "expected a number"),
    ):
        description = described(path)
        description["networks"][0][0]["parameters"]["alpha"] = value
        save_file(load_file(path), tmp_path / "other", {KEY: json.dumps(description)})
        with pytest.raises(ValueError, match=rf"other is damaged: .*{message}"):
            load_frozen(tmp_path / "other")


def step_of(kind: str, description: Description) -> Description:
    return next(step for step in description["steps"] if step["kind"] == kind)


def in_step(kind: str, value: Any, *place: Any) -> Callable[[Description], None]:
    return lambda description: setting(value, *place)(step_of(kind, description))


GRAPHS_DAMAGED: dict[str, tuple[Callable[[Description], Any], str]] = {
    "other kind": (setting("chain", "kind"), "it lacks 'flattens'"),
    "no memories": (setting([], "memories"), "the tensor 'constants.0'"),
    "huge memory": (setting(HUGE, "memories", 2, 1), r"the size of memories\[2\] is 4611686018427387904"),
    "many": (lambda d: d["memories"].extend([["arena", 1 << 21]] * 3), "it keeps .* numbers of each row"),
    "half a memory": (setting(["arena"], "memories", 2), r"memories\[2\] is \['arena'\], expected a list of str, int"),
    "kind of memory": (setting("register", "memories", 2, 0), "a memory of a frozen graph cannot be register"),
    "order of memories": (lambda d: d["memories"].reverse(), "not in their order"),
    "size of a constant": (setting(4, "memories", -1, 1), r"tensor 'constants.\d+' is of shape \[17\]"),
    "squeezed": (setting([0], "squeezed"), "squeezed holds something else than true and false"),
    "more squeezed": (setting([False, False], "squeezed"), "a flag for each of its outputs"),
    "squeezed features": (setting([True], "squeezed"), "features a row, and no dimension for them"),
    "kind of step": (setting("exec", "steps", 0, "kind"), r"the kind of steps\[0\] is 'exec', which is unknown"),
    "step": (setting("exec", "steps", 0), r"the kind of steps\[0\] is None"),
    "no steps": (setting([], "steps"), "a memory of a frozen graph is never written"),
    "order of steps": (lambda d: d["steps"].reverse(), "reads what none has written|cannot be"),
    "place": (in_step("network", [0, 0, 9, 9], "from"), "from of .* expected a list of int, int, int, int, int"),
    "place outside": (in_step("network", [0, 1, 9, 9, 1], "from"), "reaches outside of memory 0"),
    "place far outside": (in_step("network", [0, 0, 9, 9, HUGE], "from"), "a number of from of .* is 4611"),
    "place of no memory": (in_step("network", [77, 0, 9, 9, 1], "from"), "a frozen graph has no memory 77"),
    "negative place": (in_step("network", [0, -1, 9, 9, 1], "from"), "a number of from of .* is -1"),
    "no network": (in_step("network", 9, "network"), "a frozen graph has no such network"),
    "network of a bool": (in_step("network", True, "network"), "network of .* is True, expected int"),
    "wide input": (in_step("network", [0, 0, 8, 9, 1], "from"), r"the input of a network is \[1, 8\]"),
    "writes an input": (in_step("network", [0, 0, 9, 9, 1], "to"), "writes an input or a constant"),
    "eps": (in_step("layer_norm", None, "eps"), "eps of .* is None, expected float or str"),
    "weight": (in_step("layer_norm", 3, "weight"), "weight of .* is 3, expected list or NoneType"),
    "mean": (in_step("layer_norm", None, "mean"), "mean of .* is None, expected list"),
    "operation": (in_step("elementwise", "system", "instructions", 0, 0), "there is no operation system"),
    "operand": (in_step("elementwise", [7, 0], "instructions", 0, 1), "register 7 is read"),
    "negative operand": (in_step("elementwise", [-1, 0], "instructions", 0, 1), "an operand of .* is -1"),
    "operands": (in_step("elementwise", [0], "instructions", 0, 1), "has 1 operands"),
    "scalars": (in_step("elementwise", [1.0], "instructions", 0, 2), "1 scalars"),
    "scalar": (in_step("elementwise", [None], "instructions", 0, 2), "a number of .* is None"),
    "instruction": (in_step("elementwise", "add", "instructions", 0), "an instruction of .* is 'add'"),
    "register": (in_step("elementwise", 40, "outputs", 0, 1), "register 40 is read"),
    "no outputs": (in_step("elementwise", [], "outputs"), "."),
    "more in a step": (in_step("network", 1, "surprise"), "has the unknown entry 'surprise'"),
}


@pytest.mark.parametrize(("change", "message"), GRAPHS_DAMAGED.values(), ids=GRAPHS_DAMAGED.keys())
def test_damaged_graphs(change: Callable[[Description], Any], message: str, written: Callable[..., Path]) -> None:
    path = written("layer norm", change)
    with pytest.raises(ValueError, match=message) as caught:
        with_little_memory(lambda: load_frozen(path))
    assert str(caught.value).startswith(f"fastmlp: {path} is damaged: ")


TENSORS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing": (lambda t: t.pop("networks.0.layers.1.weight"), "it lacks the tensor 'networks.0.layers.1.weight'"),
    "more": (lambda t: t.update(evil=torch.zeros(1)), "it has, which belongs to no layer, the tensor 'evil'"),
    "renamed": (lambda t: t.update(x=t.pop("networks.0.layers.1.bias")), "it lacks the tensor .*layers.1.bias"),
    "shape": (
        lambda t: t.update({"networks.0.layers.0.weight": torch.zeros(6, 16)}),
        r"is of shape \[6, 16\] and type F32, expected \[16, 6\] and F32",
    ),
    "flat": (lambda t: t.update({"networks.0.layers.0.weight": torch.zeros(96)}), r"is of shape \[96\]"),
    "scalar": (lambda t: t.update({"networks.0.layers.0.bias": torch.zeros(())}), r"is of shape \[\]"),
    "dtype": (
        lambda t: t.update({"networks.0.layers.0.bias": torch.zeros(16, dtype=torch.float64)}),
        "type F64, expected .* F32",
    ),
    "integers": (
        lambda t: t.update({"networks.0.layers.0.bias": torch.zeros(16, dtype=torch.int32)}),
        "type I32, expected .* F32",
    ),
}


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS.keys())
def test_other_tensors(change: Callable[[Tensors], Any], message: str, written: Callable[..., Path]) -> None:
    path = written("chain", tensors=change)
    with pytest.raises(ValueError, match=rf"damaged.safetensors is damaged: .*{message}"):
        load_frozen(path)


TEXTS: dict[str, tuple[Callable[[str], str], str]] = {
    "nothing": (lambda _: "", "is not what JSON has"),
    "half": (lambda text: text[: len(text) // 2], "is not what JSON has"),
    "list": (lambda _: "[1]", "has no version"),
    "number": (lambda _: "1", "has no version"),
    "NaN": (lambda text: text.replace("false", "NaN", 1), "NaN is no number of JSON"),
    "twice": (lambda text: text.replace("{", '{"version": 1, ', 1), "a name occurs twice"),
    "deep": (lambda _: "[" * 100_000, "is not what JSON has"),
    "digits": (lambda text: text.replace('"version": 1', f'"version": {"9" * 5000}'), "is not what JSON has"),
    "many digits": (lambda text: text.replace('"version": 1', f'"version": {"9" * 400}'), "is of version 99"),
    "exponent": (lambda text: text.replace('"version": 1', '"version": 1e999'), "has no version"),
    "long": (lambda text: text + " " * frozen_checks.MOST_TEXT, r"has \d+ characters, expected at most"),
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS.keys())
def test_descriptions_that_are_none(text: Callable[[str], str], message: str, written: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=message):
        load_frozen(written("chain", text=text))


def test_foreign_files(tmp_path: Path, written: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"holds no frozen network: it is a file of safetensors without 'fastmlp"):
        load_frozen(written("chain", key="other"))
    path = tmp_path / "foreign"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds no frozen network"):
        load_frozen(path)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="is no file of safetensors, or is damaged"):
        load_frozen(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is no file of safetensors, or is damaged"):
        load_frozen(path)
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_frozen(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        load_frozen(tmp_path)


def test_truncated_files(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    graph("gaussian")[0].save(path)
    data = path.read_bytes()
    for length in [*range(0, 64), *range(64, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"is no file of safetensors, or is damaged"):
            load_frozen(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match=r"is no file of safetensors, or is damaged"):
        load_frozen(path)


def test_lengths_that_are_absurd(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    freeze(nn.Linear(2, 1)).save(path)
    data = path.read_bytes()
    for length in (0, 1, 1 << 31, 1 << 62, (1 << 64) - 1):
        path.write_bytes(struct.pack("<Q", length) + data[8:])
        with pytest.raises(ValueError, match="is no file of safetensors, or is damaged"):
            with_little_memory(lambda: load_frozen(path))


def mutated(value: Any, random_: random.Random) -> Any:
    """A value of JSON with something in it replaced."""
    strange: tuple[Any, ...] = (None, True, -1, 0, 1, 2, HUGE, 1.5, "nan", "", "add", [], {}, [1], [0, 0, 1, 1, 1])
    if isinstance(value, (list, dict)) and value and random_.random() < 0.9:
        changed = copy.copy(value)
        key = random_.choice(list(value)) if isinstance(value, dict) else random_.randrange(len(value))
        if random_.random() < 0.1:
            del changed[key]
        elif isinstance(changed, list) and random_.random() < 0.1:
            changed.append(random_.choice(changed))
        else:
            changed[key] = mutated(value[key], random_)
        return changed
    if type(value) is int and random_.random() < 0.5:
        return value + random_.choice([-1, 1])
    return copy.deepcopy(random_.choice(strange))


def refusal_of(function: Callable[[], Any]) -> str | None:
    """The error of a call, or None if there is none."""
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", ["chain", "gaussian", "highway", "nerf"])
def test_random_damage_is_refused_or_runs(kind: str, written: Callable[..., Path]) -> None:
    """Each of many descriptions is refused with an error of ours, or is that of a network that can be called."""
    random_ = random.Random(0)
    path = written(kind)
    description, tensors = described(path), load_file(path)
    refused = 0
    for _ in range(400):
        save_file(tensors, path, {KEY: json.dumps(mutated(description, random_))})
        refusal = refusal_of(lambda: with_little_memory(lambda: load_frozen(path)))
        if refusal is not None:
            assert refusal.startswith(f"fastmlp: {path} is ")
            refused += 1
            continue
        network = load_frozen(path)
        # Such as a shape that the output of three rows cannot have.
        refusal = refusal_of(partial(network, *[torch.zeros(3, size) for size in as_tuple(network.in_features)]))
        assert refusal is None or "fastmlp: " in refusal or "shape" in refusal
    assert refused > 200


def test_no_file_runs_code(tmp_path: Path) -> None:
    """Reading imports nothing that could: no pickle is opened while a file is read."""
    path = tmp_path / "network.safetensors"
    graph("gaussian")[0].save(path)
    code = f"""
import pickle, builtins, torch, safetensors.torch, fastmlp
def refuse(*args, **kwargs):
    raise SystemExit("called")
pickle.load = pickle.loads = pickle.Unpickler = torch.load = builtins.eval = builtins.exec = refuse
print(fastmlp.load_frozen({str(path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("FrozenMLP(11 -> (5, 5, 1)")


def test_every_dtype_and_activation_is_covered() -> None:
    assert {str(dtype).removeprefix("torch.") for dtype in frozen_checks.CODES} == set(fastmlp._C.dtypes())
    assert set(DTYPES) == set(frozen_checks.CODES)
    assert {act.name for act in ACTIVATIONS} == set(fastmlp.activations.DEFAULTS)

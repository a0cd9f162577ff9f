"""Frozen networks written in C99: they compile without a warning, and compute what the specification says."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import Activation, FrozenMLP, export_c, freeze
from fastmlp.frozen_file import Graph, Layers
from tests.support import bounds
from tests.support.axes import ACTIVATIONS
from tests.support.bounds import Bounded, assert_within, of_softmax
from tests.support.compiled_c import COMPILER, STRICT, Compiled, as_program, run_compiler
from tests.support.endings import FORMS, HEADS, body
from tests.support.graphs import GRAPHS, assert_near

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no compiler of C")

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def specified(network: FrozenMLP, x: Tensor) -> Bounded:
    """What a chain gives for rows, with bounds on what rounding may do."""
    weights, biases, kinds, scalars, *_ = fastmlp._C.unload_frozen(network)
    output = Bounded.exact(x)
    for weight, bias, act in zip(weights, biases, fastmlp.activations.activations_of(kinds, scalars), strict=True):
        more = None if bias is None else bias.double()
        output = bounds.activated(bounds.product(output, Bounded.exact(weight.t()), x.dtype, more), act, x.dtype)
    return output


def checked(network: FrozenMLP, x: Tensor, folder: Path, options: tuple[str, ...] = ("-O2",)) -> None:
    """Compares a chain's program with the specification."""
    (found,) = Compiled(network, folder, options).results(network, x)
    expected = specified(network, x)
    assert_within(found, expected, f"{network}")
    # The bounds hold for the frozen network too, so that both differ by what rounding explains.
    assert_within(network(x), expected, f"{network}")


# Values.


@FLOATS
def test_activations(activation: Activation, dtype: torch.dtype, tmp_path: Path) -> None:
    """Of small and of large arguments, behind layers and behind one another."""
    network = freeze(fastmlp.MLP(6, [17, 9], 3, activation, output_activation=activation).to(dtype))
    x = torch.cat([torch.randn(40, 6), 30 * torch.randn(40, 6)]).to(dtype)
    checked(network, x, tmp_path)


@FLOATS
@pytest.mark.parametrize("options", [("-O0",), ("-O3",), ("-O3", "-march=native"), ("-O3", "-funroll-loops")], ids=str)
def test_whatever_the_compiler_does(options: tuple[str, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    network = freeze(fastmlp.MLP(33, [64, 31], 5, "silu", bias=False).to(dtype))
    checked(network, torch.randn(20, 33, dtype=dtype), tmp_path, options)


@FLOATS
@pytest.mark.parametrize("widths", [(1, 1), (1, 1, 1), (3, 1, 300, 2), (200, 1), (1, 100)], ids=str)
def test_widths(widths: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    layers = [nn.Linear(k, n) for k, n in pairwise(widths)]
    checked(freeze(nn.Sequential(*layers).to(dtype)), torch.randn(9, widths[0], dtype=dtype), tmp_path)


def test_special_weights(tmp_path: Path) -> None:
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[math.nan, -0.0, math.inf, 1e-45], [-math.inf, 0.0, 3.4e38, -1e-45]]))
        layer.bias.zero_()
    network, x = freeze(layer), torch.eye(4)
    x[1:] += 0.0
    (found,) = Compiled(network, tmp_path).results(network, x)
    assert torch.equal(found.isnan(), network(x).isnan())
    expected = torch.tensor([[math.nan, -math.inf]]), torch.tensor([[math.nan, math.nan]])
    assert found[0].isnan().tolist() == expected[0].isnan()[0].tolist()
    assert found[0, 1] == -math.inf


@FLOATS
def test_numbers_are_written_to_the_last_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """A layer without a sum gives back its weights."""
    layer = nn.Linear(1, 500, bias=False).to(dtype)
    with torch.no_grad():
        bits = torch.randint(-(2**31), 2**31, (500,)) * (2**32 if dtype == torch.float64 else 1)
        numbers = bits.view(torch.float64) if dtype == torch.float64 else bits.int().view(torch.float32)
        layer.weight.copy_(numbers.nan_to_num(1.0, 1.0, 1.0).view(500, 1))
    network = freeze(layer)
    (found,) = Compiled(network, tmp_path).results(network, torch.ones(1, 1, dtype=dtype))
    assert torch.equal(found[0], layer.weight.detach()[:, 0])


@FLOATS
@pytest.mark.parametrize("name", [name for name in HEADS if name.endswith("(-1)")])
@pytest.mark.parametrize("classes", [1, 2, 5, 40])
def test_heads(name: str, classes: int, dtype: torch.dtype, tmp_path: Path) -> None:
    head, make = HEADS[name]
    layers = body(classes, dtype)
    network = freeze(make(layers))
    x = 3 * torch.randn(20, 6, dtype=dtype)
    (found,) = Compiled(network, tmp_path).results(network, x)
    (z,) = Compiled(freeze(layers), tmp_path, name="layers").results(freeze(layers), x)
    assert_within(found, of_softmax(head, z), name)


@pytest.mark.parametrize("form", ["x.squeeze(-1)", "x.view(-1, 2, 3)", "several", "Flatten(0)"])
def test_elements_stay_where_they_are(form: str, tmp_path: Path) -> None:
    outputs, make = FORMS[form]
    network = freeze(make(body(outputs)))
    x = torch.randn(8, 6, dtype=torch.float64)
    (found,) = Compiled(network, tmp_path).results(network, x)
    assert_within(found.view(8, -1), specified(network, x), form)


def test_flattened_inputs(tmp_path: Path) -> None:
    network = freeze(nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh()))
    x = torch.randn(7, 3, 4)
    (found,) = Compiled(network, tmp_path).results(network, x)
    assert_within(found, specified(network, x.flatten(1)), "flattened")


# Graphs.


@FLOATS
@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, features = GRAPHS[name]
    model = make().to(dtype).eval()
    inputs = tuple(torch.randn(9, size, dtype=dtype) for size in features)
    network = freeze(model, inputs=inputs if len(inputs) > 1 else None)
    found = Compiled(network, tmp_path).results(network, *inputs)
    assert_near(model, found if len(found) > 1 else found[0], inputs)


def of_recipe(recipe: Any, dtype: torch.dtype, constants: tuple[Tensor, ...] = ()) -> tuple[Graph, FrozenMLP]:
    """A graph by its description, with a network that it need not use."""
    layers = Layers([torch.ones(1, 1, dtype=dtype)], [None], [Activation("identity")])
    network = FrozenMLP()
    fastmlp.frozen._load_graph(network, None, [layers], recipe, constants, False, False)
    return Graph([layers], recipe, constants, False, False), network


def operations() -> list[tuple[str, int, list[float]]]:
    """Every elementwise operation that a forward may have, with numbers: name, operands, and scalars."""
    found: list[tuple[str, int, list[float]]] = []
    for name, (operands, scalars) in fastmlp._C.elementwise_operations().items():
        if name.startswith(("gradient_", "round_", "bce_")):
            continue
        for a in (0.7, -0.3, 1.0, math.nan) if scalars else (0.0,):
            if name.startswith("value_") and a != 0.7 and scalars:
                continue
            found.append((name, operands, [a, 1.5][:scalars]))
    return found


@FLOATS
def test_elementwise_operations(dtype: torch.dtype, tmp_path: Path) -> None:
    """Each of three numbers: differences are what a few roundings of all that is added explain."""
    names = operations()
    width = len(names)
    steps = [
        (
            "elementwise",
            [(0, k, 1, 3, 1) for k in range(operands)],
            [(name, list(range(operands)), scalars)],
            [((1, i, 1, width, 1), operands)],
        )
        for i, (name, operands, scalars) in enumerate(names)
    ]
    _, network = of_recipe(([("input", 3), ("output", width)], steps, [False]), dtype)
    _, exact = of_recipe(([("input", 3), ("output", width)], steps, [False]), torch.float64)
    special = torch.tensor([0.0, 1.0, -1.0, math.nan, 0.5])
    x = torch.cat([2 * torch.randn(200, 3), torch.cartesian_prod(special, special, special)]).to(dtype)
    (found,) = Compiled(network, tmp_path).results(network, x)
    expected = exact(x.double())
    terms = 1 + x.double().abs().sum(1) + x.double().abs().prod(1) + (x[:, 1] / x[:, 2]).double().abs()
    allowed = 2 * bounds.ULPS * torch.finfo(dtype).eps * (expected.abs() + terms[:, None])
    for i, (name, *_) in enumerate(names):
        ours, theirs = found[:, i].double(), expected[:, i]
        assert torch.equal(ours.isnan(), theirs.isnan()), names[i]
        finite = theirs.isfinite() & terms.isfinite()
        assert ((ours - theirs).abs() <= allowed[:, i])[finite].all(), names[i]
        assert torch.equal(ours[theirs.isinf()], theirs[theirs.isinf()]), name


@FLOATS
def test_special_values(dtype: torch.dtype, tmp_path: Path) -> None:
    """Of every activation: not a number, infinity and signs come out where they do of the frozen network."""
    width = len(ACTIVATIONS)
    steps = [
        (
            "elementwise",
            [(0, 0, 1, 1, 1)],
            [(f"value_{act.name}", [0], list(act.parameters.values()))],
            [((1, i, 1, width, 1), 1)],
        )
        for i, act in enumerate(ACTIVATIONS)
    ]
    _, network = of_recipe(([("input", 1), ("output", width)], steps, [False]), dtype)
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e30, -1e30], dtype=dtype).view(-1, 1)
    (found,) = Compiled(network, tmp_path).results(network, x)
    for act, ours, theirs in zip(ACTIVATIONS, found.t(), network(x).t(), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan()), act
        assert torch.equal(ours[ours.isinf()], theirs[theirs.isinf()]), act
        # The sine of -0 is +0 in a frozen network (docs/special_values.md).
        signed = ~ours.isnan() & ((ours != 0) | torch.tensor(act.name != "sin"))
        assert torch.equal(ours.signbit()[signed], theirs.signbit()[signed]), act


def test_operations_that_no_forward_has_are_refused(tmp_path: Path) -> None:
    step: Any = ("elementwise", [(0, 0, 1, 1, 1)] * 2, [("gradient_relu", [0, 1], [])], [((1, 0, 1, 1, 1), 2)])
    _, network = of_recipe(([("input", 1), ("output", 1)], [step], [False]), torch.float32)
    with pytest.raises(ValueError, match=r"^fastmlp: to_c cannot write the operation gradient_relu$"):
        network.to_c(tmp_path / "network.c")
    assert not list(tmp_path.iterdir())


def test_every_operation_is_known() -> None:
    known = {name for name, *_ in operations()}
    written = {name for name in export_c._OPERATIONS if name != "lerp from the end"}
    assert known == written | {f"value_{name}" for name in (*export_c._ACTIVATIONS, "identity")}


def test_steps_that_nobody_reads(tmp_path: Path) -> None:
    """Inputs, registers, results and constants without a use: a compiler would warn of them."""
    places = [(0, 0, 2, 3, 1), (4, 0, 2, 0, 1), (0, 2, 2, 3, 0)]
    instructions: Any = [("exp", [0], []), ("add", [0, 2], []), ("mul", [4, 0], [])]
    step = ("elementwise", places, instructions, [((2, 0, 2, 2, 1), 4), ((3, 1, 2, 5, 2), 3)])
    memories = [("input", 3), ("input", 1), ("output", 2), ("arena", 5), ("constant", 2)]
    _, network = of_recipe((memories, [step], [False]), torch.float32, (torch.ones(2),))
    x, y = torch.randn(4, 3), torch.randn(4, 1)
    (found,) = Compiled(network, tmp_path).results(network, x, y)
    assert torch.equal(found, x[:, :2] + x[:, 2:])


# Files.


@pytest.mark.parametrize("name", ["gaussian", "nerf", "critic"])
def test_under_sanitizers(name: str, tmp_path: Path) -> None:
    make, features = GRAPHS[name]
    model = make().eval()
    inputs = tuple(torch.randn(9, size) for size in features)
    network = freeze(model, inputs=inputs if len(inputs) > 1 else None)
    options = "-fsanitize=undefined,address", "-fno-sanitize-recover=all", "-O1", "-g"
    found = as_program(network, inputs, tmp_path, options)
    assert_near(model, found if len(found) > 1 else found[0], inputs)


@pytest.mark.parametrize(("widths", "bytes_of_stack"), [((10, 50, 1), 204), ((64, 64, 64, 4), 512)], ids=str)
def test_sizes(widths: tuple[int, ...], bytes_of_stack: int, tmp_path: Path) -> None:
    """A number takes some twenty characters, and what surrounds the numbers a page."""
    network = freeze(fastmlp.MLP(widths[0], widths[1:-1], widths[-1], "relu"))
    checked(network, torch.randn(50, widths[0]), tmp_path, ("-O3",))
    text = (tmp_path / "network.c").read_text(encoding="ascii")
    numbers = sum((k + 1) * n for k, n in pairwise(widths))
    assert 12 * numbers < len(text) < 20 * numbers + 5000
    assert f"take about {bytes_of_stack} bytes on the stack" in text
    words = ("malloc", "alloca", "static float", "extern")
    assert not any(word in text.partition("#include")[2] for word in words if word != "static float")
    assert [line for line in text.splitlines() if line.startswith("#")] == ["#include <math.h>", "#include <stddef.h>"]


def test_two_networks_in_a_program(tmp_path: Path) -> None:
    """Nothing but the functions can be seen from outside of a file."""
    for name, widths in (("actor", (4, 8, 2)), ("critic", (4, 8, 1))):
        freeze(fastmlp.MLP(widths[0], [widths[1]], widths[2], "tanh")).to_c(tmp_path / f"{name}.c", name)
    (tmp_path / "main.c").write_text(
        "void actor(const float *, float *);\nvoid critic(const float *, float *);\n"
        "int main(void) {\n    float x[4] = {1, 2, 3, 4}, y[2];\n    actor(x, y);\n    critic(x, y);\n"
        "    return 0;\n}\n"
    )
    sources = [str(tmp_path / f"{name}.c") for name in ("actor", "critic", "main")]
    run_compiler(*STRICT, "-o", str(tmp_path / "program"), *sources)


@pytest.mark.parametrize("name", ["even", "x", "most", "policy_2", "Network", "n" * 63])
def test_names(name: str, tmp_path: Path) -> None:
    network = freeze(HEADS["Softmax(-1)"][1](body(3)))
    x = torch.randn(3, 6, dtype=torch.float64)
    (found,) = Compiled(network, tmp_path, name=name).results(network, x)
    assert found.shape == (3, 3)


@pytest.mark.parametrize(
    "name",
    ["", "1a", "a-b", "_x", "__x", "int", "exp", "expf", "fabsl", "main", "size_t", "input", "row", "ü", "a" * 64],
)
def test_names_that_c_does_not_take(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^fastmlp: name must be a name that C allows"):
        freeze(nn.Linear(2, 1)).to_c(tmp_path / "network.c", name)
    assert not list(tmp_path.iterdir())


REFUSED: dict[str, tuple[Callable[[], FrozenMLP], str]] = {
    "bfloat16": (lambda: freeze(nn.Linear(2, 1).bfloat16()), r"in torch.bfloat16, .* freeze\(model.float\(\)\)$"),
    "float16": (lambda: freeze(nn.Linear(2, 1).half()), r"the weights of this one are in torch.float16"),
    "weights in bfloat16": (lambda: freeze(nn.Linear(2, 1), dtype=torch.bfloat16), "are in torch.bfloat16"),
    "stack": (lambda: freeze(nn.Linear(1, 262145)), "would take 1048580 bytes on the stack, expected at most 1048576"),
    "no features": (lambda: freeze(nn.Linear(0, 3)), r"without features, and the weight of layer 0 has shape \[3, 0\]"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(make: Callable[[], FrozenMLP], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make().to_c(tmp_path / "network.c")
    with pytest.raises(TypeError, match="name must be a str, got int 3"):
        freeze(nn.Linear(2, 1)).to_c(tmp_path / "network.c", 3)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_the_weights_of_the_moment_are_written(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    network = freeze(model)
    with torch.no_grad():
        model.weight.fill_(2)
        model.bias.fill_(1)
    (found,) = Compiled(network, tmp_path).results(network, torch.ones(1, 1))
    assert found.item() == 3

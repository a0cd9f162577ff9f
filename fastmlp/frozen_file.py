"""Frozen networks as files in the format of safetensors: numbers, and a description in JSON. No pickle.

exports.py writes them and serving.py reads them. The header of a file has the description in its metadata, under `KEY`,
with the version of its format. Reading trusts nothing: the description is read item by item, what it asks for is
compared with what the file holds, and only then are tensors read.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmlp.activations import Activation
from fastmlp.frozen_checks import NOT_FINITE, PLACES, VERSION, Checks
from fastmlp.recipe import Place, Recipe

__all__ = ["Chain", "Graph", "Layers", "read", "write"]

#: The entry of the metadata that holds the description.
KEY = "fastmlp.frozen"


class Layers(NamedTuple):
    """The layers of a network.

    Attributes:
        weights: of each layer, (out_features, in_features).
        biases: of each layer, (out_features,), or None.
        activations: of each layer.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    activations: Sequence[Activation]


@dataclass
class Chain:
    """A frozen network that is one chain of layers: what `fastmlp.frozen._load` takes."""

    layers: Layers
    float32_ends: bool
    matrices_only: bool
    flattens: bool
    head: str
    reshapings: Sequence[tuple[str, Sequence[int]]]


@dataclass
class Graph:
    """A frozen network that is a graph: what `fastmlp.frozen._load_graph` takes."""

    networks: Sequence[Layers]
    recipe: Recipe
    constants: Sequence[Tensor]
    float32_ends: bool
    matrices_only: bool


def needed(what: str) -> Any:
    """The package safetensors.

    Args:
        what: the call that needs it, for the error.

    Raises:
        ImportError: if it is not installed, with the command that installs it.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"fastmlp: {what} needs the package safetensors; install it with: pip install 'fastmlp[serve]'"
        ) from error
    return safetensors


# Writing.


def write(path: str | os.PathLike[str], network: Chain | Graph) -> None:
    """Writes a file, in place of one that is there.

    Args:
        path: of the file. It is written beside it first, so that no half of it is ever seen there.
        network: to be written; its tensors are in the memory of the host.

    Raises:
        ValueError: for a network that is larger than a file may say.
        ImportError: without safetensors.
    """
    package = needed("FrozenMLP.save")
    description = _described(network)
    tensors = {name: tensor.contiguous() for name, tensor in _named(network)}
    text = json.dumps(description, allow_nan=False, separators=(",", ":"))
    Checks("this network", "cannot be saved").check(description, text)
    data = package.torch.save(tensors, {KEY: text})
    beside = Path(f"{os.fspath(path)}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _networks(network: Chain | Graph) -> Sequence[Layers]:
    return network.networks if isinstance(network, Graph) else [network.layers]


def _named(network: Chain | Graph) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, by name."""
    for n, layers in enumerate(_networks(network)):
        for i, (weight, bias) in enumerate(zip(layers.weights, layers.biases, strict=True)):
            yield f"networks.{n}.layers.{i}.weight", weight
            if bias is not None:
                yield f"networks.{n}.layers.{i}.bias", bias
    if isinstance(network, Graph):
        yield from ((f"constants.{i}", constant) for i, constant in enumerate(network.constants))


def _described(network: Chain | Graph) -> dict[str, Any]:
    """All of a network but its tensors, as JSON has it."""
    networks = _networks(network)
    description: dict[str, Any] = {
        "version": VERSION,
        "kind": "graph" if isinstance(network, Graph) else "chain",
        "dtype": str(networks[0].weights[0].dtype).removeprefix("torch."),
        "float32_ends": network.float32_ends,
        "matrices_only": network.matrices_only,
        "networks": [
            [
                {
                    "in_features": weight.shape[1],
                    "out_features": weight.shape[0],
                    "bias": bias is not None,
                    "activation": activation.name,
                    "parameters": {name: _written(value) for name, value in activation.parameters.items()},
                }
                for weight, bias, activation in zip(*layers, strict=True)
            ]
            for layers in networks
        ],
    }
    if isinstance(network, Graph):
        memories, steps, squeezed = network.recipe
        steps_written = [_described_step(*step) for step in steps]
        return {**description, "memories": list(map(list, memories)), "steps": steps_written, "squeezed": squeezed}
    calls = [[name, list(numbers)] for name, numbers in network.reshapings]
    return {**description, "flattens": network.flattens, "head": network.head, "reshapings": calls}


def _described_step(kind: str, *values: Any) -> dict[str, Any]:
    if kind == "elementwise":
        inputs, instructions, outputs = values
        return {
            "kind": kind,
            "inputs": list(map(list, inputs)),
            "instructions": [[name, list(of), list(map(_written, numbers))] for name, of, numbers in instructions],
            "outputs": [[list(place), register] for place, register in outputs],
        }
    others: dict[str, Any] = {}
    if kind == "network":
        others["network"], *values = values  # type: ignore[assignment]
    elif kind == "softmax":
        *values, others["log"] = values  # type: ignore[assignment]
    else:
        eps = values[3]
        others["eps"], values = _written(eps), (*values[:3], *values[4:])
    places = [None if place is None else list(place) for place in values]
    return {"kind": kind, **others, **dict(zip(PLACES[kind], places, strict=True))}


def _written(number: float) -> float | str:
    """A number as JSON has it, which knows no infinity."""
    return float(number) if math.isfinite(number) else repr(float(number))


# Reading.


def read(path: str | os.PathLike[str]) -> Chain | Graph:
    """What a file holds, each tensor in memory of its own.

    Args:
        path: of the file.

    Raises:
        ValueError: for a file that is damaged, of a later version, or of something else.
        OSError: for one that cannot be read.
        ImportError: without safetensors.
    """
    package = needed("load_frozen")
    checks = Checks(os.fspath(path))
    with open(path, "rb"):
        pass  # Python's own errors name the file, and say what keeps it from being read
    try:
        file = package.safe_open(path, framework="pt")
    except (package.SafetensorError, ValueError) as error:
        raise ValueError(f"fastmlp: {path} is no file of safetensors, or is damaged: {error}") from error
    with file:
        text = (file.metadata() or {}).get(KEY)
        if text is None:
            raise ValueError(
                f"fastmlp: {path} holds no frozen network: it is a file of safetensors without {KEY!r} in its "
                "metadata; FrozenMLP.save writes one that has it"
            )
        description = checks.parsed(text)
        checks.check(description, text)
        expected = _expected(description)
        checks.check_tensors(file, expected)
        # Copies, because the memory of the file may change with the file.
        tensors = {name: file.get_tensor(name).clone() for name in expected}
    try:
        return _built(description, tensors)
    except ValueError as error:
        checks.fail(str(error).removeprefix("fastmlp: "))


def _expected(description: Mapping[str, Any]) -> dict[str, tuple[list[int], torch.dtype]]:
    """The shape and dtype of each tensor that a file with this description has."""
    dtype: torch.dtype = getattr(torch, description["dtype"])
    # Biases are added to sums, which are float32 for dtypes of 16 bits.
    of_biases = torch.float32 if dtype.itemsize == 2 else dtype
    found: dict[str, tuple[list[int], torch.dtype]] = {}
    for n, layers in enumerate(description["networks"]):
        for i, layer in enumerate(layers):
            name, rows = f"networks.{n}.layers.{i}", layer["out_features"]
            found[f"{name}.weight"] = [rows, layer["in_features"]], dtype
            if layer["bias"]:
                found[f"{name}.bias"] = [rows], of_biases
    constants = [size for kind, size in description.get("memories", ()) if kind == "constant"]
    own = torch.float32 if description["float32_ends"] else dtype
    return found | {f"constants.{i}": ([size], own) for i, size in enumerate(constants)}


def _built(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Chain | Graph:
    networks = []
    for n, layers in enumerate(description["networks"]):
        names = [f"networks.{n}.layers.{i}" for i in range(len(layers))]
        acts = [
            Activation(one["activation"], **{name: _number(value) for name, value in one["parameters"].items()})
            for one in layers
        ]
        weights, biases = ([tensors.get(f"{name}.{kind}") for name in names] for kind in ("weight", "bias"))
        networks.append(Layers(weights, biases, acts))  # type: ignore[arg-type]
    ends = description["float32_ends"], description["matrices_only"]
    if description["kind"] == "chain":
        calls = [(name, numbers) for name, numbers in description["reshapings"]]
        return Chain(networks[0], *ends, description["flattens"], description["head"], calls)
    recipe = (
        [(kind, size) for kind, size in description["memories"]],
        [_step(step) for step in description["steps"]],
        description["squeezed"],
    )
    constants = [tensors[name] for name in tensors if name.startswith("constants.")]
    return Graph(networks, recipe, constants, *ends)


def _number(value: float | str) -> float:
    return NOT_FINITE[value] if isinstance(value, str) else value


def _at(place: Sequence[int]) -> Place:
    memory, offset, features, row_step, step = place
    return memory, offset, features, row_step, step


def _step(step: Mapping[str, Any]) -> tuple[Any, ...]:
    """A step as a recipe has it."""
    kind = step["kind"]
    if kind == "elementwise":
        instructions = [(name, of, [_number(x) for x in numbers]) for name, of, numbers in step["instructions"]]
        outputs = [(_at(place), register) for place, register in step["outputs"]]
        return kind, [_at(place) for place in step["inputs"]], instructions, outputs
    places = [None if step[name] is None else _at(step[name]) for name in PLACES[kind]]
    if kind == "network":
        return kind, step["network"], *places
    if kind == "softmax":
        return kind, *places, step["log"]
    return kind, *places[:3], _number(step["eps"]), *places[3:]

"""Checks what a file says of a frozen network, item by item, before anything of it is used (frozen_file.py).

Whether steps of a graph stay inside of its memories, and how networks and operations fit together, is checked where
the network is made (csrc/capture/frozen_graph.cpp and the nodes of tapes).
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from fastmlp._load import _C
from fastmlp.activations import DEFAULTS

__all__ = ["CODES", "NOT_FINITE", "PLACES", "VERSION", "Checks"]

#: Of the format. A file of a later one is refused.
VERSION = 1

#: Of a layer. A file needs no bytes for a weight of no elements, so it could ask for any number.
MOST_FEATURES = 1 << 24
#: Numbers that a graph keeps of each row. They take no bytes in a file either.
MOST_KEPT = 1 << 22
#: Characters of a description.
MOST_TEXT = 1 << 24

#: Numbers that JSON does not have.
NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
#: The fields of a step of a graph that are places, in the order of its recipe.
PLACES = {
    "network": ("from", "to"),
    "softmax": ("from", "to"),
    "layer_norm": ("from", "weight", "bias", "to", "mean", "rstd"),
}
#: What safetensors calls a dtype.
CODES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}


class Checks:
    """Checks a description item by item. Each method raises ValueError for what it does not expect.

    Args:
        subject: what is checked, for errors.
        verdict: what errors say of it.
    """

    def __init__(self, subject: str, verdict: str = "is damaged") -> None:
        self._subject, self._verdict = subject, verdict

    def fail(self, why: str) -> NoReturn:
        """Raises the error."""
        raise ValueError(f"fastmlp: {self._subject} {self._verdict}: {why}")

    def parsed(self, text: str) -> dict[str, Any]:
        """The description as JSON has it, if it is of a version that is known."""

        def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            if len(dict(pairs)) != len(pairs):
                raise ValueError("fastmlp: a name occurs twice")
            return dict(pairs)

        def refused(name: str) -> NoReturn:
            raise ValueError(f"fastmlp: {name} is no number of JSON")

        if len(text) > MOST_TEXT:
            self.fail(f"its description has {len(text)} characters, expected at most {MOST_TEXT}")
        try:
            description = json.loads(text, object_pairs_hook=once, parse_constant=refused)
        except (ValueError, RecursionError) as error:
            self.fail(f"its description is not what JSON has: {error}")
        version = description.get("version") if type(description) is dict else None
        if type(version) is not int or version < 1:
            self.fail("its description has no version")
        if version > VERSION:
            raise ValueError(
                f"fastmlp: {self._subject} is of version {version} of the format, and this fastmlp reads {VERSION}; "
                "update fastmlp"
            )
        return description

    def check(self, description: dict[str, Any], text: str) -> None:
        """Raises ValueError for a description that cannot be of a network that was saved."""
        if len(text) > MOST_TEXT:
            self.fail(f"its description has {len(text)} characters, expected at most {MOST_TEXT}")
        common = {
            **{"version": int, "kind": str, "dtype": str, "networks": list},
            **{"float32_ends": bool, "matrices_only": bool},
        }
        kind = description.get("kind")
        if kind == "chain":
            self._fields(description, "it", {**common, "flattens": bool, "head": str, "reshapings": list})
        elif kind == "graph":
            self._fields(description, "it", {**common, "memories": list, "steps": list, "squeezed": list})
        else:
            self.fail(f"its kind is {kind!r:.40}, expected 'chain' or 'graph'")
        if description["dtype"] not in _C.dtypes():
            self.fail(f"its dtype is {description['dtype']!r:.40}, expected one of {', '.join(_C.dtypes())}")
        if kind == "chain" and len(description["networks"]) != 1:
            self.fail(f"it has {len(description['networks'])} networks, expected one")
        for n, layers in enumerate(description["networks"]):
            self._layers(layers, f"networks[{n}]")
        if kind == "chain":
            self._reshapings(description["reshapings"])
        else:
            self._memories(description["memories"])
            for i, step in enumerate(description["steps"]):
                self._step(step, f"steps[{i}]")
            if any(type(one) is not bool for one in description["squeezed"]):
                self.fail("squeezed holds something else than true and false")

    def check_tensors(self, file: Any, expected: Mapping[str, tuple[list[int], torch.dtype]]) -> None:
        """Raises ValueError if a file holds other tensors than its description says, and reads none."""
        held = set(file.keys())
        for kind, names in (
            ("lacks", expected.keys() - held),
            ("has, which belongs to no layer,", held - expected.keys()),
        ):
            if names:
                self.fail(f"it {kind} the tensor {min(names)!r:.80}")
        for name, (shape, dtype) in expected.items():
            found = file.get_slice(name)
            code = CODES[dtype]
            if found.get_shape() != shape or found.get_dtype() != code:
                self.fail(
                    f"the tensor {name!r} is of shape {found.get_shape()} and type {found.get_dtype()}, "
                    f"expected {shape} and {code}"
                )

    def _fields(self, value: Any, where: str, types: Mapping[str, type | tuple[type, ...]]) -> None:
        if type(value) is not dict:
            self.fail(f"{where} is {value!r:.40}, expected an object")
        missing, more = types.keys() - value.keys(), value.keys() - types.keys()
        if missing or more:
            self.fail(f"{where} {f'lacks {min(missing)!r}' if missing else f'has the unknown entry {min(more)!r:.60}'}")
        for name, expected in types.items():
            allowed = expected if isinstance(expected, tuple) else (expected,)
            # Exactly, because a bool is an int too.
            if type(value[name]) not in allowed:
                names = " or ".join(one.__name__ for one in allowed)
                self.fail(f"{name} of {where} is {value[name]!r:.40}, expected {names}")

    def _list(self, value: Any, where: str, types: Sequence[type]) -> None:
        if type(value) is not list or [type(one) for one in value] != list(types):
            self.fail(f"{where} is {value!r:.60}, expected a list of {', '.join(one.__name__ for one in types)}")

    def _count(self, value: Any, where: str, most: int) -> None:
        if type(value) is not int or not 0 <= value <= most:
            self.fail(f"{where} is {value!r:.40}, expected a whole number from 0 to {most}")

    def _number(self, value: Any, where: str) -> None:
        if type(value) is float and math.isfinite(value):
            return
        if type(value) is not str or value not in NOT_FINITE:
            self.fail(f"{where} is {value!r:.40}, expected a number, 'inf', '-inf' or 'nan'")

    def _layers(self, layers: Any, where: str) -> None:
        if type(layers) is not list or not layers:
            self.fail(f"{where} is {layers!r:.40}, expected a list of layers")
        before = None
        for i, layer in enumerate(layers):
            place = f"{where}[{i}]"
            self._fields(
                layer,
                place,
                {"in_features": int, "out_features": int, "bias": bool, "activation": str, "parameters": dict},
            )
            for name in ("in_features", "out_features"):
                self._count(layer[name], f"{name} of {place}", MOST_FEATURES)
            if before is not None and layer["in_features"] != before:
                self.fail(f"{place} takes {layer['in_features']} features, and the layer before it makes {before}")
            before = layer["out_features"]
            if layer["activation"] not in DEFAULTS:
                self.fail(f"the activation of {place} is {layer['activation']!r:.40}, which does not exist")
            own = DEFAULTS[layer["activation"]]
            if layer["parameters"].keys() != own.keys():
                self.fail(f"the parameters of {place} are {sorted(layer['parameters'])!r:.60}, expected {sorted(own)}")
            for name, value in layer["parameters"].items():
                self._number(value, f"{name} of {place}")

    def _reshapings(self, calls: list[Any]) -> None:
        for i, call in enumerate(calls):
            self._list(call, f"reshapings[{i}]", (str, list))
            for number in call[1]:
                self._count(
                    abs(number) if type(number) is int else number, f"a number of reshapings[{i}]", (1 << 31) - 1
                )

    def _memories(self, memories: list[Any]) -> None:
        total = 0
        for i, memory in enumerate(memories):
            self._list(memory, f"memories[{i}]", (str, int))
            self._count(memory[1], f"the size of memories[{i}]", MOST_KEPT)
            total += memory[1]
        if total > MOST_KEPT:
            self.fail(f"it keeps {total} numbers of each row, expected at most {MOST_KEPT}")

    def _place(self, place: Any, where: str) -> None:
        self._list(place, where, (int,) * 5)
        for number in place:
            self._count(number, f"a number of {where}", MOST_KEPT)

    def _step(self, step: Any, where: str) -> None:
        kind = step.get("kind") if type(step) is dict else None
        if kind == "elementwise":
            self._elementwise(step, where)
            return
        if type(kind) is not str or kind not in PLACES:
            self.fail(f"the kind of {where} is {kind!r:.40}, which is unknown")
        others: dict[str, type | tuple[type, ...]] = {
            **({"network": int} if kind == "network" else {"log": bool} if kind == "softmax" else {"eps": (float, str)})
        }
        optional = ("weight", "bias")
        places = {name: (list, type(None)) if name in optional else list for name in PLACES[kind]}
        self._fields(step, where, {"kind": str, **others, **places})
        for name in PLACES[kind]:
            if step[name] is not None:
                self._place(step[name], f"{name} of {where}")
        if kind == "network":
            self._count(step["network"], f"network of {where}", MOST_KEPT)
        if kind == "layer_norm":
            self._number(step["eps"], f"eps of {where}")

    def _elementwise(self, step: Any, where: str) -> None:
        self._fields(step, where, {"kind": str, "inputs": list, "instructions": list, "outputs": list})
        for place in step["inputs"]:
            self._place(place, f"an input of {where}")
        for instruction in step["instructions"]:
            self._list(instruction, f"an instruction of {where}", (str, list, list))
            for operand in instruction[1]:
                self._count(operand, f"an operand of {where}", MOST_KEPT)
            for number in instruction[2]:
                self._number(number, f"a number of {where}")
        for output in step["outputs"]:
            self._list(output, f"an output of {where}", (list, int))
            self._place(output[0], f"an output of {where}")
            self._count(output[1], f"an output of {where}", MOST_KEPT)

"""A program's text run twice, captured and not, call by call side by side, and what differs between the two."""

import random
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.attack.oracle import bytes_of

#: Python's own effects happen while a step is recorded and not later, so what counts calls is not compared.
#: Handles of hooks have numbers that the process counts.
PYTHONS_OWN = frozenset({"count", "handle", "hooked", "result"})


def generators() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002


def set_generators(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002


@dataclass
class Twin:
    """A program while it runs, with the states of process-wide generators, which are its own.

    Attributes:
        source: the text.
        path: that errors name; the text is there.
        captured: what the program's decorator does.
        results: what its calls have given, and what that was then.
    """

    source: str
    path: Path
    captured: Callable[..., Any]
    results: list[tuple[Any, Mapping[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generators = generators()
        self.namespace: dict[str, Any] = {"__name__": self.path.stem, "__file__": str(self.path)}
        self.calls: types.GeneratorType[Any, None, None] | None = None

    def start(self) -> None:
        """Runs the script itself."""
        marked = [
            f"captured = {self.path.stem}_captured" if line.startswith("captured = ") else line
            for line in self.source.splitlines()
        ]
        self.namespace[f"{self.path.stem}_captured"] = self.captured
        self._in_its_state(lambda: exec(compile("\n".join(marked), str(self.path), "exec"), self.namespace))
        self.calls = self.namespace["calls"]()

    def call(self) -> Any:
        """What the next call gives, or StopIteration."""
        assert self.calls is not None
        calls = self.calls
        result = self._in_its_state(lambda: next(calls))
        self.results.append((result, told(result)))
        return result

    def _in_its_state(self, action: Callable[[], Any]) -> Any:
        outside = generators()
        set_generators(self.generators)
        try:
            return action()
        finally:
            self.generators = generators()
            set_generators(outside)

    def state(self) -> dict[str, Any]:
        """All that the program holds, by names."""
        found: dict[str, Any] = {}
        names: dict[str, Any] = {**self.namespace}
        if self.calls is not None and self.calls.gi_frame is not None:
            names |= {f"calls.{name}": value for name, value in self.calls.gi_frame.f_locals.items()}
        for name, value in names.items():
            if (not name.startswith("_") and not callable(value)) or isinstance(value, nn.Module):
                walk(value, name, found, set())
        found["generator of torch"] = self.generators[0].numpy().tobytes()
        found["generator of Python"] = self.generators[1]
        found["generator of NumPy"] = self.generators[2][1].tobytes(), self.generators[2][2:]
        return found


#: What the walk does not look into.
OPAQUE = (types.ModuleType, types.FunctionType, types.MethodType, type, torch.dtype, torch.Size)


def walk(value: Any, name: str, found: dict[str, Any], above: set[int], grads: bool = True) -> None:
    """Puts all that a value consists of into a dictionary: tensors as they are, other things as text.

    Args:
        value: that is looked into.
        name: of it.
        found: the dictionary.
        above: identities of what it is a part of.
        grads: whether gradients belong to tensors.
    """
    if (name.rpartition(".")[2] in PYTHONS_OWN and not isinstance(value, torch.Generator)) or id(value) in above:
        return
    above = above | {id(value)}
    if isinstance(value, Tensor):
        found[name] = value
        if grads and value.is_leaf and value.grad is not None:
            walk(value.grad, f"{name}.grad", found, above)
    elif isinstance(value, nn.Module):
        found[f"{name} trains"] = value.training
        kept = {key: x for key, x in value.__dict__.items() if not key.startswith("_") and key != "training"}
        for part in (value._parameters, value._buffers, value._modules, kept):
            for key, x in part.items():
                walk(x, f"{name}.{key}", found, above)
    elif isinstance(value, torch.optim.Optimizer):
        for i, group in enumerate(value.param_groups):
            walk({key: x for key, x in group.items() if key != "params"}, f"{name}[{i}]", found, above)
            for j, p in enumerate(group["params"]):
                walk(p, f"{name}[{i}]({j})", found, above)
                walk(dict(value.state.get(p, {})), f"{name}[{i}]({j}).state", found, above)
    elif isinstance(value, torch.Generator):
        found[name] = value.get_state().numpy().tobytes()
    elif isinstance(value, (list, tuple)):
        for i, x in enumerate(value):
            walk(x, f"{name}[{i}]", found, above, grads)
        found[f"{name} kind"] = type(value).__name__, len(value)
    elif isinstance(value, dict):
        for key, x in value.items():
            walk(x, f"{name}[{key!r}]", found, above, grads)
        found[f"{name} keys"] = repr(list(value))
    elif value is None or isinstance(value, (bool, int, float, str, bytes)):
        found[name] = repr(value)
    elif hasattr(value, "__dict__") and not isinstance(value, OPAQUE) and not callable(value):
        walk({key: x for key, x in vars(value).items() if not callable(x)}, name, found, above)


def parts_of(result: Any) -> dict[str, Any]:
    """The tensors and other things that a result consists of, by names."""
    found: dict[str, Any] = {}
    walk(result, "result of the call", found, set(), False)
    return found


def told(result: Any) -> dict[str, Any]:
    """What a result is now, which does not change when its memory is written."""
    return {name: frozen(x) for name, x in parts_of(result).items()}


def frozen(value: Any) -> Any:
    """A tensor as what is compared of it: all bits, but those that tell one NaN from another."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if value.is_sparse:
        return frozen(value._indices()), frozen(value._values()), value.shape
    if value.is_floating_point() and value.isnan().any():
        value = torch.where(value.isnan(), torch.full_like(value, float("nan")), value)
    return bytes_of(value), value.dtype, value.shape


def requires(value: Any) -> bool:
    return isinstance(value, nn.Parameter) and value.requires_grad


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Names of what is there on one side only, or is something else there, down to the last bit."""
    names = [*theirs, *(name for name in ours if name not in theirs)]
    missing = object()
    return [
        name
        for name in names
        if frozen(ours.get(name, missing)) != frozen(theirs.get(name, missing))
        or requires(ours.get(name)) != requires(theirs.get(name))
    ]


def described(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """What differs, in a line."""
    if name not in ours or name not in theirs:
        return f"{name} is there only {'captured' if name in ours else 'in eager'}"
    here, there = ours[name], theirs[name]
    if not isinstance(here, Tensor) or not isinstance(there, Tensor):
        return f"{name} is {str(here)[:60]} for {str(there)[:60]}"
    if here.shape != there.shape or here.dtype != there.dtype or here.is_sparse or there.is_sparse:
        return f"{name} is {here.dtype} {tuple(here.shape)} for {there.dtype} {tuple(there.shape)}"
    if requires(here) != requires(there):
        return f"{name} has requires_grad {here.requires_grad} for {there.requires_grad}"
    off = (here.detach().double() - there.detach().double()).abs()
    at = int((off.nan_to_num(float("inf")) if off.numel() else off).argmax())
    return f"{name} at {at}: {here.detach().flatten()[at].item()!r} for {there.detach().flatten()[at].item()!r}"

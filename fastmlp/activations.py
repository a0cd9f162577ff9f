"""Activations by name, by PyTorch's function, module class or instance, as one immutable value."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmlp import reference
from fastmlp._errors import described, nearest
from fastmlp._load import _C
from fastmlp.hooks import has_hooks

#: The parameters of each activation and their defaults, in the order in which the operators number activations. It is a
#: plain dictionary, because Dynamo refuses to read a mapping proxy once the traced code has changed any dictionary, as
#: functional_call does.
DEFAULTS: Mapping[str, Mapping[str, float]] = {name: defaults for name, defaults, *_ in _C.activations()}
#: The parameters that have to be above zero; PyTorch refuses zero there.
POSITIVE: Mapping[str, tuple[str, ...]] = {name: tuple(positive) for name, _, positive, *_ in _C.activations()}
#: Those of which the kernels keep the output for backward; of the others they keep the argument.
KEEPS_OUTPUT = frozenset(name for name, _, _, keeps_output, _ in _C.activations() if keeps_output)
#: Those whose gradient `_C.gradient_from_output` computes.
HAS_GRADIENT_FROM_OUTPUT = frozenset(name for name, *_, from_output in _C.activations() if from_output)
_KINDS = {name: kind for kind, name in enumerate(DEFAULTS)}

#: The names that other libraries and papers have for activations, for errors that suggest ours.
_SYNONYMS = {
    "swish": "silu",
    "linear": "identity",
    "none": "identity",
    "logistic": "sigmoid",
    "sine": "sin",
    "lrelu": "leaky_relu",
    "hswish": "hardswish",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_approximate": "gelu_tanh",
}


@dataclass(frozen=True, init=False, repr=False)
class Activation:
    """An activation and its parameters.

    Args:
        name: one of `fastmlp.activations.DEFAULTS`.
        parameters: its parameters, named as in PyTorch; those not given have PyTorch's defaults.

    Raises:
        ValueError: for a name that does not exist, or a parameter that no float can hold or that is out of range.
        TypeError: for a name that is no string, for a parameter that the activation does not have, or that is not a
            number.

    Example:
        >>> Activation("leaky_relu", negative_slope=0.2)
        leaky_relu(negative_slope=0.2)
        >>> Activation("tanh")
        tanh
    """

    name: str
    scalars: tuple[float, float]
    kind: int = field(compare=False)  # the number of the activation in the operators' schemas

    def __init__(self, name: str, **parameters: float) -> None:
        if not isinstance(name, str):
            raise TypeError(f"fastmlp: name must be one of {', '.join(DEFAULTS)}, got {described(name)}")
        if name not in DEFAULTS:
            raise ValueError(_unknown("name", name))
        values = dict(DEFAULTS[name])
        for key, value in parameters.items():
            if key not in values:
                expected = ", ".join(values) or "no parameters"
                raise TypeError(f"fastmlp: activation {name!r} takes {expected}, got {key!r}")
            if not isinstance(value, Real):
                raise TypeError(f"fastmlp: {key} of activation {name!r} must be a number, got {described(value)}")
            try:
                values[key] = float(value)
            except OverflowError:
                message = f"fastmlp: {key} of activation {name!r} must fit a float, got {described(value)}"
                raise ValueError(message) from None
            if key in POSITIVE[name] and not values[key] > 0:
                raise ValueError(f"fastmlp: {key} of activation {name!r} must be above 0, got {described(value)}")
        padded = (*values.values(), 0.0, 0.0)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "scalars", padded[:2])
        object.__setattr__(self, "kind", _KINDS[name])

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickles hold the name, because another version may number kinds otherwise.
        return _rebuild, (self.name, self.parameters)

    def __hash__(self) -> int:
        # Plain, because the cache of stacks asks for it, and torch.compile cannot trace the hash of a tuple in
        # PyTorch 2.11.
        return self.kind

    @property
    def parameters(self) -> dict[str, float]:
        """The parameters by name, as `fastmlp.reference` takes them."""
        return dict(zip(DEFAULTS[self.name], self.scalars, strict=False))

    def __repr__(self) -> str:
        changed = [f"{k}={v:g}" for k, v in self.parameters.items() if v != DEFAULTS[self.name][k]]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


#: The forms in which public calls take an activation: None (the identity), a name, a function, a module (class or
#: instance), or an `Activation`.
ActivationLike: TypeAlias = str | nn.Module | type[nn.Module] | Callable[..., Tensor] | Activation | None

IDENTITY = Activation("identity")
_BY_NAME = {name: Activation(name) for name in DEFAULTS}


def _functions() -> dict[Callable[..., Any], str]:
    places: tuple[Any, ...] = (torch, F)
    found = {(place, name, name + end) for place in places for name in DEFAULTS for end in ("", "_")}
    return {getattr(place, key): name for place, name, key in found if hasattr(place, key)}


#: PyTorch's functions that compute an activation, those that work in place (`relu_`) included.
BY_FUNCTION: dict[Any, str] = {**_functions(), torch.special.expit: "sigmoid"}


def resolve(activation: ActivationLike, argument: str = "activation") -> Activation:
    """The `Activation` that is meant.

    Args:
        activation: None for the identity, a name, a function such as `torch.relu`, a class or an instance of a module
            of `torch.nn`, or an `Activation`.
        argument: what errors call it.

    Raises:
        ValueError: for a name or module without a fused form.
        TypeError: for anything else.

    Example:
        >>> resolve(nn.LeakyReLU(0.3)), resolve(nn.ReLU), resolve(torch.tanh), resolve("tanh"), resolve(None)
        (leaky_relu(negative_slope=0.3), relu, tanh, tanh, identity)
    """
    if activation is None:
        return IDENTITY
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        known = _BY_NAME.get(activation)
        if known is None:
            raise ValueError(_unknown(argument, activation))
        return known
    if isinstance(activation, type) and issubclass(activation, nn.Module):
        activation = _instance(activation)
    if isinstance(activation, nn.Module):
        name = reference.MODULES.get(type(activation))
        if name is None:
            raise ValueError(
                f"fastmlp: {argument} {type(activation).__name__} has no fused form, expected one of "
                f"{', '.join(module.__name__ for module in reference.MODULES)}; in a fastmlp.Sequential, after the "
                "layer, it is called as it is"
            )
        return _of_module(activation, name, argument)
    function = BY_FUNCTION.get(activation) if callable(activation) else None
    if function is not None:
        return _BY_NAME[function]
    raise TypeError(
        f"fastmlp: {argument} must be None, a name, a module of torch.nn, its function in torch or "
        f"torch.nn.functional, or a fastmlp.Activation, got {described(activation)}"
    )


def is_meant_as_activation(value: object) -> bool:
    """Whether somebody who passes this where a device or a flag belongs means an activation.

    Example:
        >>> [is_meant_as_activation(value) for value in ("ReLU", nn.Tanh(), torch.sin, "cpu", torch.device("cpu"), 0)]
        [True, True, True, False, False, False]
    """
    if isinstance(value, str):
        return nearest(value, DEFAULTS, _SYNONYMS) != ""
    # A device is callable, since it is a context manager and a decorator too.
    return isinstance(value, Activation) or (callable(value) and not isinstance(value, torch.device))


def activations_of(kinds: Sequence[int], scalars: Sequence[float]) -> list[Activation]:
    """The activations that the lists of an operator's schema describe.

    Args:
        kinds: the number of each activation.
        scalars: two numbers for each; those of a parameter that there is not are ignored.

    Example:
        >>> activations_of([2, 0], [0.25, 0.0, 0.0, 0.0])
        [leaky_relu(negative_slope=0.25), identity]
    """
    names = list(DEFAULTS)
    pairs = zip(scalars[::2], scalars[1::2], strict=True)
    return [
        Activation(names[kind], **dict(zip(DEFAULTS[names[kind]], pair, strict=False)))
        for kind, pair in zip(kinds, pairs, strict=True)
    ]


def module_of(activation: Activation) -> nn.Module:
    """A new module that computes the activation.

    Example:
        >>> module_of(Activation("elu", alpha=0.5)), module_of(Activation("gelu_tanh"))
        (ELU(alpha=0.5), GELU(approximate='tanh'))
    """
    if activation.name == "gelu_tanh":
        return nn.GELU(approximate="tanh")
    classes = {name: module for module, name in reference.MODULES.items()}
    return classes[activation.name](**activation.parameters)


def _of_module(module: nn.Module, name: str, argument: str) -> Activation:
    kind = type(module).__name__
    # A layer computes the activation in place of the module, so whatever else a call of the module does would be lost.
    if "forward" in module.__dict__ or has_hooks(module):
        raise ValueError(
            f"fastmlp: {argument} {kind} has hooks or a forward of its own, which a fused layer would not run; in a "
            "fastmlp.Sequential, after the layer, it is called as it is"
        )
    if isinstance(module, nn.GELU):
        if module.approximate not in ("none", "tanh"):
            form = module.approximate
            raise ValueError(f"fastmlp: approximate of {argument} GELU must be 'none' or 'tanh', got {form!r}")
        return _BY_NAME["gelu_tanh" if module.approximate == "tanh" else "gelu"]
    if not DEFAULTS[name]:
        return _BY_NAME[name]
    return Activation(name, **{key: getattr(module, key) for key in DEFAULTS[name]})


def _unknown(argument: str, name: str) -> str:
    meant = nearest(name, DEFAULTS, _SYNONYMS)
    error = f"fastmlp: {argument} must be one of {', '.join(DEFAULTS)}, got {name!r}"
    return error + meant


def _rebuild(name: str, parameters: Mapping[str, float]) -> Activation:
    return Activation(name, **parameters)


def _instance(module: type[nn.Module]) -> nn.Module:
    """An instance with default arguments, or the error of `resolve` if it has no fused form."""
    return module() if module in reference.MODULES else nn.Module.__new__(module)

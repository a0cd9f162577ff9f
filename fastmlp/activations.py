"""Activations by name, by PyTorch module class or by instance, as one immutable value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, TypeAlias

from torch import nn

from fastmlp import reference
from fastmlp._load import _C

#: Parameters and their defaults of each activation, in the numbering of the operators. No mapping proxy, which
#: Dynamo refuses to read once the traced code has changed any dictionary, as functional_call does.
DEFAULTS: Mapping[str, Mapping[str, float]] = dict(_C.activations())
_KINDS = {name: kind for kind, name in enumerate(DEFAULTS)}


@dataclass(frozen=True, init=False, repr=False)
class Activation:
    """An activation and its parameters.

    Args:
        name: one of `fastmlp.activations.DEFAULTS`.
        parameters: its parameters, named as in PyTorch; those not given have PyTorch's defaults.

    Raises:
        ValueError: for a name that does not exist.
        TypeError: for a parameter that the activation does not have, or that is not a number.

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
        if name not in DEFAULTS:
            raise ValueError(f"activation must be one of {', '.join(DEFAULTS)}, got {name!r}")
        values = dict(DEFAULTS[name])
        for key, value in parameters.items():
            if key not in values:
                expected = ", ".join(values) or "no parameters"
                raise TypeError(f"activation {name!r} takes {expected}, got {key!r}")
            if not isinstance(value, Real):
                raise TypeError(f"{key} of activation {name!r} must be a number, got {type(value).__name__}")
            values[key] = float(value)
        padded = (*values.values(), 0.0, 0.0)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "scalars", padded[:2])
        object.__setattr__(self, "kind", _KINDS[name])

    def __reduce__(self) -> tuple[Any, ...]:
        # By name: kinds may be numbered otherwise where this is read.
        return _rebuild, (self.name, self.parameters)

    def __hash__(self) -> int:
        # Asked at every call of a layer, and by torch.compile, which cannot trace a tuple's in PyTorch 2.11.
        return self.kind

    @property
    def parameters(self) -> dict[str, float]:
        """The parameters by name, as `fastmlp.reference` takes them."""
        return dict(zip(DEFAULTS[self.name], self.scalars, strict=False))

    def __repr__(self) -> str:
        changed = [f"{k}={v:g}" for k, v in self.parameters.items() if v != DEFAULTS[self.name][k]]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


#: What public calls take: None (identity), a name, a module class or instance, or an `Activation`.
ActivationLike: TypeAlias = str | nn.Module | type[nn.Module] | Activation | None

IDENTITY = Activation("identity")
_BY_NAME = {name: Activation(name) for name in DEFAULTS}


def resolve(activation: ActivationLike) -> Activation:
    """The `Activation` that is meant.

    Args:
        activation: None for the identity, a name, a class or an instance of a module of
            `torch.nn`, or an `Activation`.

    Raises:
        ValueError: for a name or module without a fused form.
        TypeError: for anything else.

    Example:
        >>> resolve(nn.LeakyReLU(0.3)), resolve(nn.ReLU), resolve("tanh"), resolve(None)
        (leaky_relu(negative_slope=0.3), relu, tanh, identity)
    """
    if activation is None:
        return IDENTITY
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str):
        known = _BY_NAME.get(activation)
        return Activation(activation) if known is None else known
    if isinstance(activation, type) and issubclass(activation, nn.Module):
        activation = _instance(activation)
    if isinstance(activation, nn.Module):
        name = reference.MODULES.get(type(activation))
        if name is None:
            raise ValueError(
                f"activation {type(activation).__name__} has no fused form, expected one of "
                f"{', '.join(module.__name__ for module in reference.MODULES)}"
            )
        if name == "gelu" and activation.approximate == "tanh":
            name = "gelu_tanh"
        if not DEFAULTS[name]:
            return _BY_NAME[name]
        return Activation(name, **{key: getattr(activation, key) for key in DEFAULTS[name]})
    raise TypeError(
        f"activation must be None, a name, a torch.nn module or an Activation, got {type(activation).__name__}"
    )


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


def _rebuild(name: str, parameters: Mapping[str, float]) -> Activation:
    return Activation(name, **parameters)


def _instance(module: type[nn.Module]) -> nn.Module:
    """An instance with default arguments, or the error of `resolve` if it has no fused form."""
    return module() if module in reference.MODULES else nn.Module.__new__(module)

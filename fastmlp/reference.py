"""The specification: what every kernel computes, in plain PyTorch.

Each operation of fastmlp equals the function of the same name here, within rounding. It is also
what the composite route runs, so every transform and every order of derivative follows from it.
docs/special_values.md lists the NaN, infinities and zeros where PyTorch's own loops differ among themselves.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Name of each activation and the function that defines it. Keywords are the activation's
#: parameters, named as in the PyTorch module of `MODULES`.
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "sin": torch.sin,
}


class Sin(nn.Module):
    """The sine as a module, which `torch.nn` lacks.

    Shape:
        any, and the same for the output.

    Example:
        >>> Sin()(torch.zeros(2))
        tensor([0., 0.])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise sine."""
        return torch.sin(input)


#: The modules that compute an activation, by exact class.
MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.Hardswish: "hardswish",
    nn.Softplus: "softplus",
    Sin: "sin",
}


def activate(z: Tensor, name: str, parameters: dict[str, float]) -> Tensor:
    """Applies one activation.

    Args:
        z: any shape.
        name: a key of `FUNCTIONS`.
        parameters: keyword arguments of that function.

    Returns:
        A tensor of the shape and dtype of `z`.

    Raises:
        ValueError: for a name that is not in `FUNCTIONS`.

    Example:
        >>> activate(torch.tensor([-1.0, 2.0]), "leaky_relu", {"negative_slope": 0.5})
        tensor([-0.5000,  2.0000])
    """
    function = FUNCTIONS.get(name) if isinstance(name, str) else None
    if function is None:
        raise ValueError(f"fastmlp: name must be one of {', '.join(FUNCTIONS)}, got {name!r}")
    return function(z, **parameters)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "identity",
    parameters: dict[str, float] | None = None,
) -> Tensor:
    """act(input weight^T + bias).

    Args:
        input: (*, in_features).
        weight: (out_features, in_features).
        bias: (out_features) or None.
        activation: a key of `FUNCTIONS`.
        parameters: keyword arguments of that function.

    Returns:
        (*, out_features), of the dtype of `input`.

    Example:
        >>> linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0], [-3.0, 1.0]]), None, "relu")
        tensor([[3., 0.]])
    """
    return activate(F.linear(input, weight, bias), activation, parameters or {})


def mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[tuple[str, dict[str, float]]],
) -> Tensor:
    """A chain of `linear`.

    Args:
        input: (*, in_features of the first layer).
        weights: (out_features, in_features) of each layer.
        biases: (out_features) or None for each layer.
        activations: name and parameters for each layer.

    Returns:
        (*, out_features of the last layer).

    Example:
        >>> w = torch.eye(2)
        >>> mlp(torch.tensor([1.0, -1.0]), [w, w], [None, None], [("relu", {}), ("identity", {})])
        tensor([1., 0.])
    """
    for weight, bias, (name, parameters) in zip(weights, biases, activations, strict=True):
        input = linear(input, weight, bias, name, parameters)
    return input

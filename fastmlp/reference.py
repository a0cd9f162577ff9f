"""The specification: what every kernel computes, in plain PyTorch.

Each operation of fastmlp equals the function of the same name here, within rounding. It is also
what the composite route runs, so every transform and every order of derivative follows from it.
docs/special_values.md lists the NaN, infinities and zeros where PyTorch's own loops differ among themselves.
"""

from collections.abc import Callable, Sequence
from math import pi, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _sin(z: Tensor, frequency: float = 1.0) -> Tensor:
    return torch.sin(z if frequency == 1 else frequency * z)


#: Name of each activation and the function that defines it. Keywords are the activation's
#: parameters, named as in the PyTorch module of `MODULES`.
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "softplus": F.softplus,
    "sin": _sin,
}


def _with_step(z: Tensor, value: Tensor, below: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of a function that is straight on both sides of zero, where NaN has the slope on the right."""
    return value, torch.where(z <= 0, below, torch.ones_like(z)), torch.zeros_like(z)


def _with_bend(
    z: Tensor, value: Tensor, scale: float, below: float, rate: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a function that is straight above zero, and exponential below."""
    # Without clamp, whose gradient at zero is that of the exponential.
    bend = below * (rate * torch.where(z < 0, z, torch.zeros_like(z))).exp()
    return value, torch.where(z > 0, scale, bend), torch.where(z >= 0, torch.zeros_like(z), rate * bend)


def _sigmoid(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.sigmoid(z)
    return y, y * (1 - y), y * (1 - y) * (1 - 2 * y)


def _tanh(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.tanh(z)
    return y, 1 - y * y, -2 * y * (1 - y * y)


def _times(z: Tensor, y: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of z y(z) from y and its own."""
    return y + z * first, 2 * first + z * second


def _gelu(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    density = torch.exp(-0.5 * z * z) / sqrt(2 * pi)
    return F.gelu(z), torch.special.ndtr(z) + z * density, density * (2 - z * z)


def _gelu_tanh(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale, cubic = sqrt(8 / pi), 0.044715
    y, first, second = _sigmoid(scale * (z + cubic * z**3))
    slope, bend = scale * (1 + 3 * cubic * z * z), scale * 6 * cubic * z
    return F.gelu(z, approximate="tanh"), *_times(z, y, first * slope, second * slope * slope + first * bend)


def _mish(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y, first, second = _tanh(F.softplus(z))
    _, slope, bend = _slopes_of_softplus(z)
    return F.mish(z), *_times(z, y, first * slope, second * slope * slope + first * bend)


def _hardswish(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    zero, one, inside = torch.zeros_like(z), torch.ones_like(z), (z > -3) & (z < 3)
    first = torch.where(inside, z / 3 + 0.5, torch.where(z <= -3, zero, one))
    return F.hardswish(z), first, torch.where(inside, one / 3, zero)


def _slopes_of_softplus(z: Tensor, beta: float = 1.0, threshold: float = 20.0) -> tuple[Tensor, Tensor, Tensor]:
    x = z * beta
    y, slope, _ = _sigmoid(x)
    first = torch.where(x > threshold, torch.ones_like(z), y)
    return F.softplus(z, beta, threshold), first, torch.where(x > threshold, torch.zeros_like(z), beta * slope)


def _slopes_of_sin(z: Tensor, frequency: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    x = frequency * z
    return torch.sin(x), frequency * torch.cos(x), -(frequency**2) * torch.sin(x)


#: Name of each activation and the function that gives its value, its first and its second derivative. At kinks these
#: are what PyTorch's autograd has.
SLOPES: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "identity": lambda z: (z, torch.ones_like(z), torch.zeros_like(z)),
    "relu": lambda z: _with_step(z, torch.relu(z), 0.0),
    "leaky_relu": lambda z, negative_slope=0.01: _with_step(z, F.leaky_relu(z, negative_slope), negative_slope),
    "elu": lambda z, alpha=1.0: _with_bend(z, F.elu(z, alpha), 1.0, alpha),
    "celu": lambda z, alpha=1.0: _with_bend(z, F.celu(z, alpha), 1.0, 1.0, 1 / alpha),
    # Scale, and alpha times it, of Klambauer et al., Self-Normalizing Neural Networks, 2017, equation 14.
    "selu": lambda z: _with_bend(z, F.selu(z), 1.0507009873554804934193349852946, 1.7580993408473768599402175208123),
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": lambda z: (F.silu(z), *_times(z, *_sigmoid(z))),
    "mish": _mish,
    "hardswish": _hardswish,
    "softplus": _slopes_of_softplus,
    "sin": _slopes_of_sin,
}


class Sin(nn.Module):
    """The sine of a multiple, sin(frequency x), as a module, which `torch.nn` lacks.

    Args:
        frequency: what the input is multiplied by. SIREN has 30 (Sitzmann et al., Implicit Neural
            Representations with Periodic Activation Functions, 2020).

    Shape:
        any, and the same for the output.

    Example:
        >>> Sin()(torch.zeros(2))
        tensor([0., 0.])
        >>> nn.Sequential(nn.Linear(2, 64), Sin(frequency=30.0))
        Sequential(
          (0): Linear(in_features=2, out_features=64, bias=True)
          (1): Sin(frequency=30.0)
        )
    """

    def __init__(self, frequency: float = 1.0) -> None:
        super().__init__()
        self.frequency = frequency

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles of versions that had no frequency.
        super().__setstate__({"frequency": 1.0, **state})

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise sine of `frequency` times the input."""
        return _sin(input, self.frequency)

    def extra_repr(self) -> str:
        """The frequency, unless it is 1."""
        return "" if self.frequency == 1 else f"frequency={self.frequency}"


#: The modules that compute an activation, by exact class.
MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.CELU: "celu",
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
    noises: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """A chain of `linear`, each of which may be followed by dropout.

    Args:
        input: (*, in_features of the first layer).
        weights: (out_features, in_features) of each layer.
        biases: (out_features) or None for each layer.
        activations: name and parameters for each layer.
        noises: for each layer None, or what dropout multiplies its output (*, out_features) with.

    Returns:
        (*, out_features of the last layer).

    Example:
        >>> w = torch.eye(2)
        >>> mlp(torch.tensor([1.0, -1.0]), [w, w], [None, None], [("relu", {}), ("identity", {})])
        tensor([1., 0.])
    """
    noises = noises or [None] * len(weights)
    for weight, bias, (name, parameters), noise in zip(weights, biases, activations, noises, strict=True):
        input = linear(input, weight, bias, name, parameters)
        input = input if noise is None else input * noise
    return input


def mlp_derivatives(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[tuple[str, dict[str, float]]],
    axes: Sequence[int],
    sums: Sequence[Sequence[tuple[int, int]]],
) -> tuple[Tensor, Tensor, Tensor]:
    """A chain of `linear`, and its derivatives along features of the input.

    With z before an activation f and h after it, derivatives go forward through a layer as h_i = f'(z) z_i and
    h_ij = f''(z) z_i z_j + f'(z) z_ij (Griewank and Walther, Evaluating Derivatives, 2008, chapter 13).

    Args:
        input: (*, in_features of the first layer).
        weights: (out_features, in_features) of each layer.
        biases: (out_features) or None for each layer.
        activations: name and parameters for each layer.
        axes: features of the input that first derivatives are taken along.
        sums: pairs of places in `axes`; the second derivatives along these are added up.

    Returns:
        The value (*, out_features), the first derivatives (*, out_features, len(axes)), and the sums of second
        derivatives (*, out_features, len(sums)).

    Example:
        >>> w = [torch.tensor([[2.0]]), torch.tensor([[1.0]])]
        >>> acts = [("sin", {}), ("identity", {})]
        >>> mlp_derivatives(torch.zeros(1), w, [None, None], acts, [0], [[(0, 0)]])
        (tensor([0.]), tensor([[2.]]), tensor([[0.]]))
    """
    value, first, second = input, input.new_zeros(0), input.new_zeros(0)
    for layer, (weight, bias, (name, parameters)) in enumerate(zip(weights, biases, activations, strict=True)):
        z = F.linear(value, weight, bias)
        if layer == 0:
            seeds = weight.t()[list(axes)].to(z.dtype)
            first = seeds.view(len(axes), *[1] * (z.dim() - 1), z.shape[-1]).expand(len(axes), *z.shape)
            second = torch.zeros_like(z).expand(len(sums), *z.shape)
        else:
            first, second = F.linear(first, weight), F.linear(second, weight)
        value, slope, bend = SLOPES[name](z, **parameters)
        squares = [sum((first[i] * first[j] for i, j in pairs), torch.zeros_like(z)) for pairs in sums]
        second = bend * torch.stack(squares) + slope * second if squares else second
        first = slope * first
    return value, first.movedim(0, -1), second.movedim(0, -1)

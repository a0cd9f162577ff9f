"""Layers that stand in for those of `torch.nn`."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.modules.module as nn_module
from torch import Tensor, nn

from fastmlp import functional, reference
from fastmlp.activations import IDENTITY, Activation, ActivationLike, module_of, resolve
from fastmlp.autograd import run
from fastmlp.ops import Stack, stack_of

__all__ = ["MLP", "Linear", "Sequential"]

_GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)


class Linear(nn.Linear):
    """`torch.nn.Linear` with an optional activation, computed as one operation.

    Parameters, initialisation from the same seed and `state_dict` are those of `torch.nn.Linear`.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is a bias.
        activation: None, a name, a module of `torch.nn` (class or instance) or a
            `fastmlp.Activation`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for an activation without a fused form.
        TypeError: for an activation of the wrong type.

    Shape:
        input (*, in_features), output (*, out_features).

    Example:
        >>> layer = Linear(10, 50, activation="relu")
        >>> layer
        Linear(in_features=10, out_features=50, bias=True, activation=relu)
        >>> layer(torch.zeros(3, 10)).shape
        torch.Size([3, 50])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: ActivationLike = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        act = resolve(activation)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation: Activation = act

    def __setattr__(self, name: str, value: Any) -> None:
        # Whatever form an activation is given in, now or later, it is kept as an Activation.
        kept: Any = resolve(value) if name == "activation" else value
        super().__setattr__(name, kept)

    def forward(self, input: Tensor) -> Tensor:
        """Act(input weight^T + bias)."""
        return functional.linear(input, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        """As `torch.nn.Linear`, and the activation if there is one."""
        text = super().extra_repr()
        return text if self.activation == IDENTITY else f"{text}, activation={self.activation!r}"


class Sequential(nn.Sequential):
    """`torch.nn.Sequential` that runs its layers as one operation."""

    def forward(self, input: Tensor) -> Tensor:
        """The network's output for (*, in_features)."""
        whole = fused(self._modules)
        if whole is None:
            return super().forward(input)
        stack, parameters = whole
        return run(stack, input, parameters)

    def __getitem__(self, index: slice | int) -> nn.Module:
        """A child, or a `torch.nn.Sequential` of several."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)


class MLP(Sequential):
    """A multilayer perceptron with the children that one would write by hand.

    `MLP(10, [50], 1)` holds `Linear(10, 50), ReLU(), Linear(50, 1)` under the keys of the
    `torch.nn.Sequential` of the same modules, so their `state_dict`s are interchangeable. It runs as
    one operation. While a child has hooks, is parametrized or has been replaced by another kind of
    module, the children run one after the other, as in `torch.nn.Sequential`.

    Args:
        in_features: size of the last dimension of the input.
        hidden_features: sizes of the hidden layers; may be empty.
        out_features: size of the last dimension of the output.
        activation: after each hidden layer: None, a name, a module of `torch.nn` or a
            `fastmlp.Activation`.
        output_activation: after the last layer; None for none.
        bias: whether the layers have biases.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for an activation without a fused form.
        TypeError: for an activation of the wrong type, or hidden_features that is no sequence.

    Shape:
        input (*, in_features), output (*, out_features).

    Example:
        >>> MLP(10, [50], 1)
        MLP(
          (0): Linear(in_features=10, out_features=50, bias=True)
          (1): ReLU()
          (2): Linear(in_features=50, out_features=1, bias=True)
        )
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: Sequence[int],
        out_features: int,
        activation: ActivationLike = "relu",
        output_activation: ActivationLike = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(hidden_features, (int, str)):
            raise TypeError(f"hidden_features must be a sequence of sizes, got {hidden_features!r}")
        inner, last = resolve(activation), resolve(output_activation)
        widths = [in_features, *hidden_features, out_features]
        children: list[nn.Module] = []
        for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
            children.append(Linear(fan_in, fan_out, bias=bias, device=device, dtype=dtype))
            act = inner if i < len(widths) - 2 else last
            if act != IDENTITY:
                children.append(module_of(act))
        super().__init__(*children)


def fused(children: Mapping[str, nn.Module | None]) -> tuple[Stack, tuple[Tensor, ...]] | None:
    """The children as one stack, read afresh at each call; None if one of them must be seen to run."""
    if any(_GLOBAL_HOOKS):
        return None
    has_bias: list[bool] = []
    activations: list[Activation] = []
    parameters: list[Tensor] = []
    for child in children.values():
        if child is None or _must_be_called(child):
            return None
        kind = type(child)
        if kind is Linear or kind is nn.Linear:
            weight, bias = child._parameters.get("weight"), child._parameters.get("bias")
            # Attributes in place of parameters, as in replicas: the child knows where they are.
            if weight is None or (bias is None and "bias" not in child._parameters):
                return None
            parameters.append(weight)
            has_bias.append(bias is not None)
            if bias is not None:
                parameters.append(bias)
            activations.append(child.activation if isinstance(child, Linear) else IDENTITY)
        elif kind in reference.MODULES and activations and activations[-1] == IDENTITY:
            activations[-1] = resolve(child)
        else:
            return None
    return (stack_of(tuple(has_bias), tuple(activations)), tuple(parameters)) if has_bias else None


def _must_be_called(child: nn.Module) -> bool:
    return bool(
        child._forward_hooks
        or child._forward_pre_hooks
        or child._backward_hooks
        or child._backward_pre_hooks
        or "forward" in child.__dict__
    )

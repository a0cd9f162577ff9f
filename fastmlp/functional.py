"""The layers as functions, without modules."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmlp import reference
from fastmlp._errors import described, not_a_tensor
from fastmlp.activations import ActivationLike, resolve
from fastmlp.autograd import run
from fastmlp.ops import Stack, stack_of
from fastmlp.taylor import Axis, Derivatives, run_derivatives

__all__ = ["linear", "mlp", "mlp_derivatives"]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: ActivationLike = None) -> Tensor:
    """act(input weight^T + bias) as one operation.

    Equals `torch.nn.functional.linear` followed by the activation.

    Args:
        input: (*, in_features), float32, float64, bfloat16 or float16 for the fused kernels; any dtype that
            `torch.nn.functional.linear` takes is computed by PyTorch.
        weight: (out_features, in_features), of the dtype and on the device of `input`.
        bias: (out_features), or None.
        activation: None, a name, a function such as `torch.relu`, a module of `torch.nn` or a `fastmlp.Activation`.

    Returns:
        (*, out_features).

    Raises:
        RuntimeError: for shapes, dtypes or devices that do not belong together.
        TypeError: for an argument of the wrong type.
        ValueError: for an activation without a fused form.

    Example:
        >>> import torch
        >>> x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
        >>> linear(x, w, torch.tensor([0.5, 0.5]), "relu")
        tensor([[3.5000, 0.0000]])
    """
    act = resolve(activation)
    if isinstance(weight, Tensor) and weight.dim() == 1:
        # torch's linear takes a weight of one dimension, too: a dot product, in which there is nothing to fuse.
        _check_vector_form(input, weight, bias)
        return reference.activate(F.linear(input, weight, bias), act.name, act.parameters)
    if bias is None:
        return run(stack_of((False,), (act,)), input, (weight,))
    return run(stack_of((True,), (act,)), input, (weight, bias))


def mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[ActivationLike],
) -> Tensor:
    """A whole network as one operation.

    Args:
        input: (*, in_features of the first layer).
        weights: (out_features, in_features) of each layer.
        biases: (out_features) or None for each layer.
        activations: one for each layer, None for the identity.

    Returns:
        (*, out_features of the last layer).

    Raises:
        RuntimeError: for shapes, dtypes or devices that do not belong together.
        TypeError: for an argument of the wrong type.
        ValueError: for lists of different lengths, no layer at all, or an activation without a
            fused form.

    Example:
        >>> import torch
        >>> w = torch.eye(2)
        >>> mlp(torch.tensor([1.0, -1.0]), [w, w], [None, torch.ones(2)], ["relu", None])
        tensor([2., 1.])
    """
    stack, parameters = _layers(weights, biases, activations)
    return run(stack, input, parameters)


def mlp_derivatives(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[ActivationLike],
    first: Sequence[int] | None = None,
    second: Sequence[Axis] = (),
    laplacian: Sequence[int] = (),
) -> Derivatives:
    """A whole network with derivatives along features of its input, as `fastmlp.derivatives` returns them of a model.

    Args:
        input: (*, in_features of the first layer).
        weights: (out_features, in_features) of each layer.
        biases: (out_features) or None for each layer.
        activations: one for each layer, None for the identity.
        first: features of the input along which first derivatives are returned; None for all.
        second: features of the input along which second derivatives are returned; for a mixed one a pair (i, j).
        laplacian: features of the input over which second derivatives are added up to the Laplacian.

    Returns:
        Values and derivatives, each (*, out_features of the last layer, ...).

    Raises:
        RuntimeError: for shapes, dtypes or devices that do not belong together.
        TypeError: for an argument of the wrong type.
        ValueError: for lists of different lengths, no layer at all, or an activation without a fused form.
        IndexError: for an axis that the input does not have.

    Example:
        >>> import torch
        >>> x, w = torch.zeros(1, 1), torch.ones(1, 1)
        >>> value, first, second, _ = mlp_derivatives(x, [2 * w, w], [None, None], ["sigmoid", None], second=[0])
        >>> value, first, second
        (tensor([[0.5000]]), tensor([[[0.5000]]]), tensor([[[0.]]]))
    """
    stack, parameters = _layers(weights, biases, activations)
    return run_derivatives(stack, input, parameters, first, second, laplacian)


def _layers(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[ActivationLike]
) -> tuple[Stack, tuple[Tensor, ...]]:
    for name, given in (("weights", weights), ("biases", biases), ("activations", activations)):
        _check_list(name, given)
    if not len(weights) == len(biases) == len(activations):
        raise ValueError(
            "fastmlp: weights, biases and activations must have one entry for each layer, "
            f"got {len(weights)}, {len(biases)} and {len(activations)}; None stands for no bias and for no activation"
        )
    acts = tuple([resolve(activation, f"activations[{i}]") for i, activation in enumerate(activations)])
    parameters: list[Tensor] = []
    for weight, bias in zip(weights, biases, strict=True):
        parameters += (weight,) if bias is None else (weight, bias)
    return stack_of(tuple([bias is not None for bias in biases]), acts), tuple(parameters)


def _check_list(name: str, given: Any) -> None:
    single = given.is_nested or given.dim() == 0 if isinstance(given, Tensor) else isinstance(given, str)
    if single or not hasattr(given, "__len__") or not hasattr(given, "__getitem__"):
        raise TypeError(f"fastmlp: {name} must be a list with one entry for each layer, got {described(given)}")


def _check_vector_form(input: Any, weight: Tensor, bias: Any) -> None:
    for name, given in (("input", input), ("bias", bias)):
        # Objects that record PyTorch's functions, such as the proxies of torch.fx, are for PyTorch to check.
        if not isinstance(given, Tensor) and hasattr(given, "__torch_function__"):
            return
        if not isinstance(given, Tensor) and not (name == "bias" and given is None):
            raise not_a_tensor(name, given, weight.dtype)
    if input.dim() == 0 or input.shape[-1] != weight.shape[0]:
        raise RuntimeError(
            f"fastmlp: input has shape {list(input.shape)}, expected {weight.shape[0]} in the last dimension, since "
            f"weight has shape {list(weight.shape)}; a layer's weight has two dimensions, (out_features, in_features)"
        )
    if bias is not None and bias.dim() > 0:
        raise RuntimeError(
            f"fastmlp: bias has shape {list(bias.shape)}, expected [], a single number, since weight has one dimension"
        )
    if input.dtype != weight.dtype and not torch.is_autocast_enabled(input.device.type):
        raise RuntimeError(
            f"fastmlp: input has dtype {input.dtype}, expected {weight.dtype}, the dtype of weight; "
            f"pass input.to({weight.dtype})"
        )

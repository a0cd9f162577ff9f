"""Where PyTorch meets the kernels: one rule that picks a route, and the autograd Functions.

Routes:

direct: plain tensors of a device with kernels, in eager mode, go straight into the extension, whose autograd node
    (`csrc/python/autograd.cpp`) is a `torch::autograd::Function`: the same in Python costs 6 us more per call.
captured: under Dynamo, a Function that calls nothing but registered operators.
recorded: under the recorder of `fastmlp.capture`, a Function of registered operators too, so that a network is one
    operation of a tape. Its backward under `create_graph` is that of the composite route.
composite: `fastmlp.reference`, for whatever stands between a tensor and its data: functorch
    transforms, forward mode, batched gradients, subclasses, export, dtypes without kernels. It is
    right for every transform and every order of derivative because PyTorch's own operations are.

A GPU that the build has no kernels for, or no code of its architecture, takes the composite route too; the first call
that does so warns.

Under autocast of the device, input and parameters are cast first, as autocast would before each layer;
every activation keeps the dtype that it is given there, so the layers run in one dtype.

Dropout in training is part of a call on the direct route alone, outside of autocast: elsewhere its module is called,
between the calls of what comes before and after it.

Backward asks the rule again for the gradient that comes in. Under `create_graph` it is a graph of
PyTorch's operations, which can be differentiated as often as one likes. What forward saved carries no
graph; a node for each layer gives it one, so that nothing is computed twice.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from fastmlp import ops, reference
from fastmlp._errors import not_a_tensor
from fastmlp._load import _C
from fastmlp.activations import HAS_GRADIENT_FROM_OUTPUT, IDENTITY, KEEPS_OUTPUT, Activation
from fastmlp.ops import Stack
from fastmlp.tape.active import is_recording

Gradients = Sequence[Tensor | None]

#: For each layer None, or what dropout multiplies its output with.
Noises = Sequence[Tensor | None]

#: What errors call the input, and where a module keeps each layer: ("input", ["0", "2"]). None for a call of
#: `fastmlp.functional`, which has no module.
Names = tuple[str, Sequence[str]] | None

# As torch.autocast("cpu", enabled=False), at a sixth of its price.
without_autocast = torch._C._DisableAutocast


def run(stack: Stack, input: Tensor, parameters: tuple[Tensor, ...], names: Names = None) -> Tensor:
    """The output of a stack of layers, by the route that its arguments allow.

    Args:
        stack: which layers have a bias, and their activations.
        input: (*, in_features of the first layer).
        parameters: weight and, where there is one, bias of each layer.
        names: what errors call them on the composite route; the direct one takes them only from a module.

    Returns:
        (*, out_features of the last layer).

    Raises:
        RuntimeError: for shapes, dtypes or devices that do not belong together.
        TypeError: for an argument that is not a tensor.
    """
    if torch.compiler.is_compiling():
        return _captured(stack, input, parameters)
    output = _C.try_run(stack.native, input, parameters)
    return _indirect(stack, input, parameters, names) if output is None else output


def why_not_direct(input: Tensor, parameters: tuple[Tensor, ...]) -> str | None:
    """Why `run` would not take the direct route in eager mode, or None if it would."""
    return _C.obstacle(input, parameters)


def autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtypes in which torch's autocast of the first one's device hands them to a linear layer.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     [t.dtype for t in autocast(torch.ones(2), torch.ones(2, dtype=torch.float64))]
        [torch.bfloat16, torch.float64]
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t.dtype in (dtype, torch.float64) or not t.is_floating_point() else t.to(dtype) for t in tensors]


def composed_forward(
    has_bias: Sequence[bool],
    activations: Sequence[int],
    scalars: Sequence[float],
    input: Tensor,
    parameters: tuple[Tensor, ...],
    names: Names,
) -> Tensor:
    """What csrc/python/sequential.cpp calls for a run of layers that cannot take the direct route."""
    stack = ops.stack_from(has_bias, activations, scalars)
    if torch.compiler.is_compiling():
        return _captured(stack, input, parameters)
    return _indirect(stack, input, parameters, names)


def _indirect(stack: Stack, input: Tensor, parameters: tuple[Tensor, ...], names: Names) -> Tensor:
    return (_recorded if is_recording() else _composite)(stack, input, parameters, names)


def _recorded(stack: Stack, input: Tensor, parameters: tuple[Tensor, ...], names: Names) -> Tensor:
    if not is_plain_in_recording(input, parameters) or not _has_kernels(input.device):
        return _composite(stack, input, parameters, names)
    input, *rest = autocast(input, *parameters)
    parameters = tuple(rest)
    _C.check_forward(stack.native, input, parameters, True, names)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (input, *parameters)):
        return _Recorded.apply(stack, input, *parameters)
    return ops.infer(stack, input, parameters)


def is_plain_in_recording(input: Tensor, others: tuple[Tensor, ...]) -> bool:
    """Whether a recorder may hand tensors to registered operators, as far as that does not depend on their device."""
    plain = all(type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided for t in (input, *others))
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return plain and not transformed and input.dtype in ops.DTYPES


def _captured(stack: Stack, input: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
    # An exported program must run where fastmlp is not installed; functorch's transforms see
    # through reference.mlp only. What is_exporting() returns: that itself is always true under Dynamo in PyTorch 2.11.
    if (
        torch.compiler._is_exporting_flag
        or torch._C._are_functorch_transforms_active()
        or input.dtype not in ops.DTYPES
        or not _has_kernels(input.device)
    ):
        return _reference(stack, input, parameters)
    input, *rest = autocast(input, *parameters)
    parameters = tuple(rest)
    if torch.is_grad_enabled():
        return _Captured.apply(stack, input, *parameters)
    return ops.infer(stack, input, parameters)


def _composite(stack: Stack, input: Tensor, parameters: tuple[Tensor, ...], names: Names) -> Tensor:
    tensors = (input, *parameters)
    strangers = False
    for name, tensor in zip((names[0] if names else "input", *stack.names()), tensors, strict=True):
        if not isinstance(tensor, Tensor):
            # Such as the proxies of torch.fx, which record PyTorch's functions.
            if not hasattr(tensor, "__torch_function__"):
                others = (t for t in tensors if isinstance(t, Tensor))
                raise not_a_tensor(name, tensor, next((t.dtype for t in others), None))
            strangers = True
    # Sparse and nested tensors, and integers alone, are for torch to accept or refuse.
    if not strangers and all(t.layout == torch.strided and not t.is_nested for t in tensors):
        autocast = input.device.type != "meta" and torch.is_autocast_enabled(input.device.type)
        floating = input.is_floating_point() or input.is_complex()
        if floating or any(parameter.dtype != input.dtype for parameter in parameters):
            _C.check_forward(stack.native, input, parameters, not autocast, names)
        _has_kernels(input.device)
    return _reference(stack, input, parameters)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_kernels(device: torch.device) -> bool:
    """Whether this build has kernels for this very device; where the sources have some, it warns."""
    obstacle = _C.device_obstacle(str(device))
    if obstacle is not None and (device.type in ops.DEVICES or device.type in _C.absent_devices()):
        _warn_without_kernels(device.type, obstacle)
    return obstacle is None


@cache
def _warn_without_kernels(device: str, obstacle: str) -> None:
    """Once, since whoever trains on a GPU does not ask `explain` why that is no faster."""
    # The caller's line is some modules away, and a warning about the installation is not about that line.
    message = f"fastmlp: PyTorch's own operations run on {device.upper()} tensors, since {obstacle}"
    warnings.warn(message, stacklevel=1)


def _reference(stack: Stack, input: Tensor, parameters: Sequence[Tensor], noises: Noises | None = None) -> Tensor:
    weights, biases = stack.split(parameters)
    return reference.mlp(input, weights, biases, [(a.name, a.parameters) for a in stack.activations], noises)


def _composed_backward(
    has_bias: Sequence[bool],
    activations: Sequence[int],
    scalars: Sequence[float],
    dropouts: Sequence[float],
    needs: Sequence[bool],
    grad: Tensor,
    input: Tensor,
    parameters: Sequence[Tensor],
    saved: Sequence[Tensor],
) -> Gradients:
    """What the direct route's node calls under `create_graph`, or for a gradient that is not plain."""
    stack = ops.stack_from(has_bias, activations, scalars)
    drops = any(dropouts)
    noises, saved = _noises(dropouts, saved, input.dtype) if drops else (None, saved)
    # The others are slower to differentiate twice.
    known = all(a.name in HAS_GRADIENT_FROM_OUTPUT or not _keeps_output(a) for a in stack.activations)
    # A backward in an autocast region still belongs to the dtype that forward ran in.
    with without_autocast():
        if _is_direct(grad, (input, *parameters, *saved)):
            if torch.is_grad_enabled() and known:
                return _layerwise(stack, needs, grad, input, parameters, saved, noises)
            if not torch.is_grad_enabled() and not drops:
                return _C.backward(stack.native, grad, input, saved, parameters, needs)
        return _vjp(stack, needs, grad, input, tuple(parameters), noises)


_C.set_composed_backward(_composed_backward)


def _noises(dropouts: Sequence[float], saved: Sequence[Tensor], dtype: torch.dtype) -> tuple[Noises, Sequence[Tensor]]:
    """What torch would multiply with, from the masks with which `saved` begins; and the rest of that."""
    masks = iter(saved)
    noises: list[Tensor | None] = []
    for p in dropouts:
        noise = next(masks).to(dtype) if p > 0 else None
        noises.append(noise / (1 - p) if noise is not None and p < 1 else noise)
    return noises, list(masks)


def _vjp(
    stack: Stack,
    needs: Sequence[bool],
    grad: Tensor,
    input: Tensor,
    parameters: tuple[Tensor, ...],
    noises: Noises | None = None,
) -> Gradients:
    """The gradients asked for, recomputed with PyTorch's operations; differentiable if grad mode is on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views of their own, so that a parameter computed from another one is not differentiated
        # through: that is for the graph outside.
        inputs = [alias(t, need) for t, need in zip((input, *parameters), needs, strict=True)]
        output = _reference(stack, inputs[0], inputs[1:], noises)
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=create_graph))
    return [next(found) if need else None for need in needs]


def alias(tensor: Tensor, differentiate: bool) -> Tensor:
    """A view of a tensor's own, if it is to be differentiated through, and the tensor itself otherwise."""
    if not differentiate:
        return tensor
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def _is_direct(grad: Tensor, tensors: tuple[Tensor, ...]) -> bool:
    return _C.obstacle(grad, tensors) is None


def _keeps_output(activation: Activation) -> bool:
    """Whether the kernels keep a layer's output for backward: its pre-activation otherwise."""
    return activation.name in KEEPS_OUTPUT


def _layerwise(
    stack: Stack,
    needs: Sequence[bool],
    grad: Tensor,
    input: Tensor,
    parameters: Sequence[Tensor],
    saved: Sequence[Tensor],
    noises: Noises | None = None,
) -> Gradients:
    """The gradients asked for, by PyTorch's operations on what forward saved."""
    weights, biases = stack.split(parameters)
    factors = [None if noise is None else _rows(noise) for noise in noises or [None] * len(weights)]
    inputs, kept, outputs = [_rows(input)], [], []
    # A last layer without activation has saved nothing, and needs nothing.
    for weight, bias, activation, tensor, factor in zip(
        weights, biases, stack.activations, saved, factors, strict=False
    ):
        layer_stack = ops.stack_of((bias is not None,), (activation if _keeps_output(activation) else IDENTITY,))
        own = (weight,) if bias is None else (weight, bias)
        kept.append(_C.with_graph(layer_stack.native, inputs[-1], own, _rows(tensor)))
        outputs.append(kept[-1] if _keeps_output(activation) else _activate(activation, kept[-1]))
        inputs.append(outputs[-1] if factor is None else outputs[-1] * factor)
    found: list[Tensor | None] = [None] * len(needs)
    grad, end = _rows(grad), len(needs)
    for layer, factor in reversed(list(enumerate(factors))):
        if factor is not None:
            grad = grad * factor
        if layer < len(kept):
            grad = _through(stack.activations[layer], grad, kept[layer], outputs[layer])
        start = end - 1 - stack.has_bias[layer]
        if needs[start]:
            found[start] = grad.T @ inputs[layer]
        if stack.has_bias[layer] and needs[start + 1]:
            found[start + 1] = grad.sum(0)
        if not any(needs[:start]):
            return found
        grad, end = grad @ weights[layer], start
    found[0] = grad.reshape(input.shape)
    return found


def _rows(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.flatten(0, -2)


def _activate(activation: Activation, z: Tensor) -> Tensor:
    return reference.activate(z, activation.name, activation.parameters)


def _through(activation: Activation, grad: Tensor, kept: Tensor, output: Tensor) -> Tensor:
    """The gradient of a pre-activation from that of the output."""
    if _keeps_output(activation):
        return _C.gradient_from_output(activation.kind, grad, output)
    if not kept.requires_grad:
        kept = kept.detach().requires_grad_()
        output = _activate(activation, kept)
    return torch.autograd.grad(output, kept, grad, create_graph=True)[0]


class _Captured(torch.autograd.Function):
    """Forward and backward under Dynamo: registered operators only, and no jvp, which it rejects."""

    @staticmethod
    def forward(ctx: Any, stack: Stack, input: Tensor, *parameters: Tensor) -> Tensor:
        output, hidden = ops.forward(stack, input, parameters)
        ctx.stack = stack
        ctx.count = 1 + len(parameters)
        saved = hidden if len(hidden) == stack.saved else [*hidden, output]
        ctx.save_for_backward(input, *parameters, *saved)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stack, tensors, needs = ctx.stack, ctx.saved_tensors, ctx.needs_input_grad[1:]
        count = ctx.count
        found = iter(ops.backward(stack, grad, tensors[0], tensors[count:], tensors[1:count], needs))
        return None, *[next(found) if need else None for need in needs]


class _Recorded(_Captured):
    """The same under a recorder, where a graph of the gradients may be asked for."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return _Captured.backward(ctx, grad)
        input, *parameters = ctx.saved_tensors[: ctx.count]
        return None, *_vjp(ctx.stack, ctx.needs_input_grad[1:], grad, input, tuple(parameters))

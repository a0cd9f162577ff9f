"""Where PyTorch meets the kernels: one rule that picks a route, and the autograd Functions.

Routes:

direct: plain CPU tensors in eager mode go straight into the extension, whose autograd node
    (`csrc/autograd.cpp`) is a `torch::autograd::Function`: the same in Python costs 6 us more per call.
captured: under Dynamo, a Function that calls nothing but registered operators.
composite: `fastmlp.reference`, for whatever stands between a tensor and its data: functorch
    transforms, forward mode, batched gradients, subclasses, export, dtypes without kernels. It is
    right for every transform and every order of derivative because PyTorch's own operations are.

Under autocast of the CPU, input and parameters are cast first, as autocast would before each layer;
every activation keeps the dtype that it is given there, so the layers run in one dtype.

Backward asks the rule again for the gradient that comes in. Under `create_graph` the first
backward stays fused, as a Function of its own; its derivative recomputes from input and parameters,
because activations saved by forward carry no graph.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmlp import ops, reference
from fastmlp._load import _C
from fastmlp.ops import Stack

Gradients = Sequence[Tensor | None]

# As torch.autocast("cpu", enabled=False), at a sixth of its price.
_without_autocast = torch._C._DisableAutocast


def run(stack: Stack, input: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
    """The output of a stack of layers, by the route that its arguments allow.

    Args:
        stack: which layers have a bias, and their activations.
        input: (*, in_features of the first layer).
        parameters: weight and, where there is one, bias of each layer.

    Returns:
        (*, out_features of the last layer).

    Raises:
        RuntimeError: for shapes, dtypes or devices that do not belong together.
        TypeError: for an argument that is not a tensor.
    """
    if torch.compiler.is_compiling():
        return _captured(stack, input, parameters)
    if forward_ad._current_level < 0:
        output = _C.try_run(stack.native, input, parameters)
        if output is not None:
            return output
        if torch.is_autocast_enabled("cpu") and why_not_direct(input, parameters) is None:
            input, *rest = autocast(input, *parameters)
            with _without_autocast():
                return run(stack, input, tuple(rest))
    return _composite(stack, input, parameters)


def why_not_direct(input: Tensor, parameters: tuple[Tensor, ...]) -> str | None:
    """Why `run` would not take the direct route in eager mode, or None if it would."""
    if forward_ad._current_level >= 0:
        return "a level of forward-mode AD is open"
    with _without_autocast():
        return _C.obstacle(input, parameters)


def autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtypes in which torch's autocast of the CPU hands them to a linear layer.

    Example:
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     [t.dtype for t in autocast(torch.ones(2), torch.ones(2, dtype=torch.float64))]
        [torch.bfloat16, torch.float64]
    """
    if not torch.is_autocast_enabled("cpu"):
        return list(tensors)
    dtype = torch.get_autocast_dtype("cpu")
    return [t if t.dtype in (dtype, torch.float64) or not t.is_floating_point() else t.to(dtype) for t in tensors]


def _captured(stack: Stack, input: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
    # An exported program must run where fastmlp is not installed; functorch's transforms see
    # through reference.mlp only.
    if (
        torch.compiler.is_exporting()
        or torch._C._are_functorch_transforms_active()
        or input.dtype not in ops.DTYPES
        or input.device.type != "cpu"
    ):
        return _reference(stack, input, parameters)
    input, *rest = autocast(input, *parameters)
    parameters = tuple(rest)
    if torch.is_grad_enabled():
        return _Captured.apply(stack, input, *parameters)
    return ops.infer(stack, input, parameters)


def _composite(stack: Stack, input: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
    tensors = (input, *parameters)
    strangers = False
    for name, tensor in zip(("input", *stack.names()), tensors, strict=True):
        if not isinstance(tensor, Tensor):
            # Such as the proxies of torch.fx, which record PyTorch's functions.
            if not hasattr(tensor, "__torch_function__"):
                raise TypeError(f"fastmlp: {name} must be a torch.Tensor, got {type(tensor).__name__}")
            strangers = True
    # Sparse, nested and integer tensors are for torch to accept or refuse.
    if not strangers and all(t.layout == torch.strided and not t.is_nested for t in tensors):
        autocast = input.device.type != "meta" and torch.is_autocast_enabled(input.device.type)
        if input.is_floating_point() or input.is_complex():
            _C.check_forward(stack.native, input, parameters, not autocast)
    return _reference(stack, input, parameters)


def _reference(stack: Stack, input: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    weights, biases = stack.split(parameters)
    return reference.mlp(input, weights, biases, [(a.name, a.parameters) for a in stack.activations])


def _composed_backward(
    has_bias: Sequence[bool],
    kinds: Sequence[int],
    scalars: Sequence[float],
    needs: Sequence[bool],
    grad: Tensor,
    input: Tensor,
    parameters: Sequence[Tensor],
    saved: Sequence[Tensor],
) -> Gradients:
    """What the direct route's node calls under `create_graph`, or for a gradient that is not plain."""
    stack = ops.stack_from(has_bias, kinds, scalars)
    tensors = (input, *parameters, *saved)
    # A backward in an autocast region still belongs to the dtype that forward ran in.
    with _without_autocast():
        if forward_ad._current_level < 0 and _C.obstacle(grad, tensors) is None:
            return _DirectBackward.apply(stack, tuple(needs), grad, *tensors)
        return _vjp(stack, needs, grad, input, tuple(parameters))


_C.set_composed_backward(_composed_backward)


def _vjp(stack: Stack, needs: Sequence[bool], grad: Tensor, input: Tensor, parameters: tuple[Tensor, ...]) -> Gradients:
    """The gradients asked for, recomputed with PyTorch's operations; differentiable if grad mode is on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views of their own, so that a parameter computed from another one is not differentiated
        # through: that is for the graph outside.
        inputs = [_alias(t, need) for t, need in zip((input, *parameters), needs, strict=True)]
        output = _reference(stack, inputs[0], inputs[1:])
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=create_graph))
    return [next(found) if need else None for need in needs]


def _alias(tensor: Tensor, differentiate: bool) -> Tensor:
    if not differentiate:
        return tensor
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


class _DirectBackward(torch.autograd.Function):
    """The fused backward as a function of its own, so that it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, stack: Stack, needs: tuple[bool, ...], grad: Tensor, *tensors: Tensor) -> Any:
        count = len(tensors) - stack.saved
        input, parameters, saved = tensors[0], tensors[1:count], tensors[count:]
        ctx.stack, ctx.needs = stack, needs
        ctx.save_for_backward(grad, input, *parameters)
        ctx.set_materialize_grads(False)
        return tuple(_C.backward(stack.native, grad, input, saved, parameters, needs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        asked = ctx.needs_input_grad[2 : 2 + len(tensors)]
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad(), _without_autocast():
            aliases = [_alias(t, need) for t, need in zip(tensors, asked, strict=True)]
            grad, input, *parameters = aliases
            first = _vjp(ctx.stack, ctx.needs, grad, input, tuple(parameters))
            pairs = [(o, g) for o, g in zip(first, grads, strict=True) if o is not None and g is not None]
            pairs = [(o, g) for o, g in pairs if o.requires_grad]
            wanted = [t for t, need in zip(aliases, asked, strict=True) if need]
            found: Sequence[Tensor | None] = [None] * len(wanted)
            if pairs and wanted:
                outputs, seeds = zip(*pairs, strict=True)
                found = torch.autograd.grad(outputs, wanted, seeds, create_graph=create_graph, allow_unused=True)
        second = iter(found)
        gradients = [next(second) if need else None for need in asked]
        return None, None, *gradients, *[None] * ctx.stack.saved


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

"""A network's outputs together with their derivatives along its input, in one pass.

Losses of physics-informed networks hold such derivatives. By nested calls of `torch.autograd.grad` each order doubles
the operations of a step; forward they are more rows of the same products, which the kernels compute block by block.

Routes, as in `fastmlp.autograd`: plain tensors of float32 and float64 on a device with kernels for it (the CPU) are
computed by two operators, forward and backward, also while `fastmlp.capture` records. Everything else is computed by
`reference.mlp_derivatives`: on other devices, under compilers, autocast, transforms and for other dtypes. So is the
backward of a backward.
"""

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastmlp import reference
from fastmlp._errors import described, not_a_tensor
from fastmlp._load import _C
from fastmlp.autograd import Gradients, Names, alias, is_plain_in_recording, without_autocast
from fastmlp.ops import Stack
from fastmlp.tape.active import is_recording

__all__ = ["Axis", "Derivatives", "run_derivatives"]

#: A second derivative: along one axis of the input twice, or along two of them.
Axis: TypeAlias = int | tuple[int, int]

_ops = torch.ops.fastmlp
_DTYPES = (torch.float32, torch.float64)
_DEVICES: tuple[str, ...] = tuple(_C.deriving_devices())


class Derivatives(NamedTuple):
    """Values and derivatives of a network at each point.

    Attributes:
        value: (*, out_features).
        first: (*, out_features, axes that were asked for). Each derivative by itself, as `first[..., 0]`, is
            contiguous where the kernels computed it.
        second: (*, out_features, second derivatives that were asked for).
        laplacian: (*, out_features), or None if it was not asked for.
    """

    value: Tensor
    first: Tensor
    second: Tensor
    laplacian: Tensor | None


class Plan(NamedTuple):
    """What is computed, and what of that was asked for."""

    axes: tuple[int, ...]  # that first derivatives are computed along
    sums: tuple[tuple[tuple[int, int], ...], ...]  # pairs of places in `axes`
    firsts: int  # the first of `axes`, which were asked for; the others are for second derivatives
    seconds: int  # the first of `sums`; after them there may be the Laplacian

    def lists(self) -> tuple[list[int], list[int], list[int]]:
        """The operators' arguments `axes`, `pairs` and `pairs_end`."""
        pairs = [pair for pairs in self.sums for pair in pairs]
        ends = [sum(len(pairs) for pairs in self.sums[: i + 1]) for i in range(len(self.sums))]
        return list(self.axes), [place for pair in pairs for place in pair], ends


def run_derivatives(
    stack: Stack,
    input: Tensor,
    parameters: tuple[Tensor, ...],
    first: Sequence[int] | None,
    second: Sequence[Axis],
    laplacian: Sequence[int],
    names: Callable[[], Names] | None = None,
) -> Derivatives:
    """Values and derivatives of a stack of layers, by the route that its arguments allow.

    Args:
        stack: which layers have a bias, and their activations.
        input: (*, in_features of the first layer).
        parameters: weight and, where there is one, bias of each layer.
        first: as `fastmlp.derivatives` takes it.
        second: likewise.
        laplacian: likewise.
        names: what errors call input and parameters; called only when there is one.
    """
    for name, tensor in zip(("input", *stack.names()), (input, *parameters), strict=True):
        if not isinstance(tensor, Tensor):
            raise not_a_tensor(name, tensor)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        autocast = input.device.type != "meta" and torch.is_autocast_enabled(input.device.type)
        try:
            _C.check_forward(stack.native, input, parameters, not autocast, None)
        except RuntimeError:
            if names is not None:
                _C.check_forward(stack.native, input, parameters, not autocast, names())
            raise
    axes = None if first is None else _axes("first", first)
    seconds = tuple([_second(i, one) for i, one in enumerate(_listed("second", second))])
    plan = (_plan if compiling else _planned)(input.shape[-1], axes, seconds, _axes("laplacian", laplacian))
    if compiling or not _has_kernels(input, parameters):
        found = _reference(stack, plan, input, parameters)
    else:
        rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
        if torch.is_grad_enabled() and any(t.requires_grad for t in (input, *parameters)):
            found = _Fused.apply(stack, plan, rows, *parameters)
        else:
            found = _ops.derivatives(rows, parameters, *stack.lists, *plan.lists(), False)[:3]
        if input.dim() != 2:
            found = tuple([t.reshape(*input.shape[:-1], *t.shape[1:]) for t in found])
    return _asked(plan, *found)


def _asked(plan: Plan, value: Tensor, first: Tensor, second: Tensor) -> Derivatives:
    laplacian = None
    if len(plan.sums) > plan.seconds:
        laplacian, second = second[..., plan.seconds], second[..., : plan.seconds]
    if len(plan.axes) > plan.firsts:
        first = first[..., : plan.firsts]
    return Derivatives(value, first, second, laplacian)


class _Fused(torch.autograd.Function):
    """Forward and backward by the kernels; the gradients have a graph by PyTorch's operations, if one is asked for."""

    @staticmethod
    def forward(ctx: Any, stack: Stack, plan: Plan, input: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        value, first, second, kept = _ops.derivatives(input, parameters, *stack.lists, *plan.lists(), True)
        ctx.stack, ctx.plan = stack, plan
        ctx.save_for_backward(input, kept, *parameters)
        ctx.set_materialize_grads(False)
        return value, first, second

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        input, kept, *rest = ctx.saved_tensors
        stack, plan, needs, parameters = ctx.stack, ctx.plan, ctx.needs_input_grad[2:], tuple(rest)
        given = tuple([grad for grad in grads if grad is not None])
        if torch.is_grad_enabled() or not _has_kernels(input, (*parameters, *given)):
            # A backward in an autocast region still belongs to the dtype that forward ran in.
            with without_autocast():
                return None, None, *_vjp(stack, plan, needs, grads, input, parameters)
        all_lists = (*stack.lists, *plan.lists(), needs)
        found = iter(_ops.derivatives_backward(*grads, input, kept, parameters, *all_lists))
        return None, None, *[next(found) if need else None for need in needs]


def _vjp(
    stack: Stack,
    plan: Plan,
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
    input: Tensor,
    parameters: tuple[Tensor, ...],
) -> Gradients:
    """The gradients asked for, recomputed with PyTorch's operations; differentiable if grad mode is on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views of their own, as in fastmlp.autograd.
        inputs = [alias(t, need) for t, need in zip((input, *parameters), needs, strict=True)]
        outputs = _reference(stack, plan, inputs[0], tuple(inputs[1:]))
        pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        gradients = torch.autograd.grad(
            [output for output, _ in pairs],
            wanted,
            [grad for _, grad in pairs],
            create_graph=create_graph,
            materialize_grads=True,
        )
    found = iter(gradients)
    return [next(found) if need else None for need in needs]


def _reference(stack: Stack, plan: Plan, input: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weights, biases = stack.split(parameters)
    activations = [(a.name, a.parameters) for a in stack.activations]
    return reference.mlp_derivatives(input, weights, biases, activations, plan.axes, plan.sums)


def _has_kernels(input: Tensor, others: tuple[Tensor, ...]) -> bool:
    """Whether the operators compute with these tensors."""
    device = input.device.type
    if device not in _DEVICES or input.dtype not in _DTYPES or torch.is_autocast_enabled(device):
        return False
    if is_recording():
        return is_plain_in_recording(input, others)
    return _C.obstacle(input, others) is None


def _plan(
    features: int, first: tuple[int, ...] | None, second: tuple[tuple[int, int], ...], laplacian: tuple[int, ...]
) -> Plan:
    def axis_of(name: str, axis: int) -> int:
        if not -features <= axis < features:
            expected = f"expected {-features} to {features - 1}" if features else "expected none"
            raise IndexError(f"fastmlp: {name} holds the axis {axis}, {expected}, since input has {features} features")
        return axis % features

    axes = list(range(features)) if first is None else [axis_of("first", axis) for axis in first]
    firsts = len(axes)
    sums = [[(axis_of("second", i), axis_of("second", j))] for i, j in second]
    if laplacian:
        along = [axis_of("laplacian", axis) for axis in laplacian]
        sums.append([(axis, axis) for axis in along])
    for pairs in sums:
        for axis in [axis for pair in pairs for axis in pair]:
            if axis not in axes:
                axes.append(axis)
    places = tuple([tuple([(axes.index(i), axes.index(j)) for i, j in pairs]) for pairs in sums])
    return Plan(tuple(axes), places, firsts, len(second))


_planned = lru_cache(maxsize=256)(_plan)


def _listed(name: str, given: Any) -> tuple[Any, ...]:
    if isinstance(given, (list, tuple, range)):
        return tuple(given)
    raise TypeError(f"fastmlp: {name} must be a list of axes of the input, such as [0], got {described(given)}")


def _axes(name: str, given: Any) -> tuple[int, ...]:
    return tuple([_axis(f"{name}[{i}]", axis) for i, axis in enumerate(_listed(name, given))])


def _second(place: int, given: Any) -> tuple[int, int]:
    if not isinstance(given, (list, tuple)):
        axis = _axis(f"second[{place}]", given)
        return axis, axis
    if len(given) != 2:
        raise TypeError(f"fastmlp: second[{place}] must be an axis of the input, or a pair of them, got {given!r}")
    one, other = [_axis(f"second[{place}][{i}]", axis) for i, axis in enumerate(given)]
    return one, other


def _axis(name: str, given: Any) -> int:
    try:
        if not isinstance(given, (bool, Tensor)):
            return operator.index(given)
    except TypeError:
        pass
    raise TypeError(f"fastmlp: {name} must be an axis of the input, an integer, got {described(given)}")

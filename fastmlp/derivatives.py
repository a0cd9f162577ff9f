"""`derivatives`: the outputs of a model together with their derivatives along its input."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from fastmlp._errors import not_a_child, not_a_module, place_of
from fastmlp._load import _C
from fastmlp.chain import CONTAINERS
from fastmlp.ops import stack_from
from fastmlp.runs import Run, parts, watched_obstacle
from fastmlp.taylor import Axis, Derivatives, run_derivatives

__all__ = ["Derivatives", "derivatives"]


def derivatives(
    model: nn.Module,
    input: Tensor,
    first: Sequence[int] | None = None,
    second: Sequence[Axis] = (),
    laplacian: Sequence[int] = (),
) -> Derivatives:
    """The outputs of a model with their first and second derivatives along features of its input.

    Equals `model(input)` and nested calls of `torch.autograd.grad`, within rounding, in one pass forward, and one
    backward. Derivatives that nobody asks for are not computed. What is returned can be differentiated with respect to
    the parameters and the input, as often as one likes. Hidden layers should be narrow, as those of physics-informed
    networks are, up to a few hundred features.

    Args:
        model: layers and activations one after another: a `fastmlp.Sequential`, a `fastmlp.MLP` or a
            `torch.nn.Sequential`, nested or not.
        input: (*, in_features), of the dtype of the parameters.
        first: features of the input along which first derivatives are returned; None for all.
        second: features of the input along which second derivatives are returned; for a mixed one a pair (i, j).
        laplacian: features of the input over which second derivatives are added up to the Laplacian. That takes one row
            a point, where each entry of `second` takes one of its own.

    Returns:
        Values and derivatives, each (*, out_features, ...).

    Raises:
        TypeError: for a model that is no chain of layers that run as one operation, naming the child and the reason;
            for axes that are no integers.
        IndexError: for an axis that the input does not have.
        RuntimeError: for shapes, dtypes or devices that do not belong together.

    Example:
        >>> from fastmlp import MLP
        >>> model = MLP(2, [20, 20], 1, "tanh")
        >>> points = torch.rand(100, 2)  # t and x
        >>> u, first, second, _ = derivatives(model, points, second=[1])
        >>> u_t, u_x, u_xx = first[..., 0], first[..., 1], second[..., 0]
        >>> residual = u_t + u * u_x - 0.01 * u_xx
        >>> residual.square().mean().backward()
        >>> derivatives(model, points, first=[], laplacian=[0, 1]).laplacian.shape
        torch.Size([100, 1])
    """
    if not isinstance(model, nn.Module):
        raise not_a_module(model)
    leaves = list(_leaves("", model))
    # Python's reading takes as long as some hundred points, and is for Dynamo, which cannot see into the other, and for
    # errors.
    found = None if torch.compiler.is_compiling() else _C.whole_run([module for _, module in leaves])
    if found is None:
        run = _run_of(model, leaves)
        stack, parameters = run.stack(), run.parameters()
    else:
        *lists, parameters = found
        stack = _stack_from(*lists)
    return run_derivatives(stack, input, parameters, first, second, laplacian, lambda: _run_of(model, leaves).called())


_stack_from = lru_cache(maxsize=256)(stack_from)


def _run_of(model: nn.Module, leaves: Sequence[tuple[str, nn.Module]]) -> Run:
    """The layers of a model that is one run of them."""
    runs: list[Run] = []
    for part in parts(dict(leaves), drops=False):
        if not isinstance(part, Run):
            raise _refused(part.name, part.child, part.reason)
        runs.append(part)
    if not runs:
        raise _refused("", model, "it has no layer")
    if len(runs) > 1:
        one, other = runs[0].layers[-1].name, runs[1].layers[0].name
        raise _refused("", model, f"the parameters of {one} and of {other} differ in dtype or device")
    return runs[0]


def _leaves(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if type(module).forward not in CONTAINERS:
        if not name:
            raise _refused("", module, "only containers such as fastmlp.Sequential are; pass the one that it holds")
        yield name, module
        return
    reason = watched_obstacle(module)
    if reason is not None:
        raise _refused(name, module, reason)
    for key, child in module._modules.items():
        place = f"{name}.{key}" if name else key
        if child is None:
            raise not_a_child(place)
        yield from _leaves(place, child)


def _refused(name: str, module: nn.Module, reason: str) -> TypeError:
    return TypeError(f"fastmlp: {place_of(name, module)} cannot be differentiated as a chain of layers: {reason}")

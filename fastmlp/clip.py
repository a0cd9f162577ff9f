"""PyTorch's clipping of gradients, each one call into the extension.

What the kernels do not take is clipped by PyTorch's own functions: gradients that are not plain dense tensors of the
CPU in float32, float64, bfloat16 or float16, that have gaps, that share memory or require gradients themselves; norms
other than 2 and infinity; and everything while a mode of torch, a profiler, `torch.compile` or `fastmlp.capture`
watches.
"""

import types
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from fastmlp._load import _C

__all__ = ["clip_grad_norm_", "clip_grad_value_"]


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_`, faster.

    Multiplies all gradients with `max_norm / (norm + 1e-6)`, or with 1 if that is larger. Arguments, results (within
    rounding) and errors are those of PyTorch's function, except that squares are summed in float64: a norm of float32
    or 16-bit gradients is infinite or zero only where the dtype cannot hold the norm itself.

    Args:
        parameters: a tensor, or an iterable of tensors, whose `.grad` is clipped in place. Those without a gradient are
            passed over.
        max_norm: what the norm of all gradients together is to be at most.
        norm_type: the order of the norm: 2, infinity, or any other that PyTorch takes.
        error_if_nonfinite: whether a norm that is NaN or infinite raises an error, instead of making all gradients NaN
            or zero.
        foreach: of no effect on results, as in PyTorch.

    Returns:
        The norm before clipping: a tensor without dimensions, of the dtype that all gradients are promoted to.

    Raises:
        RuntimeError: if `error_if_nonfinite` and the norm is not finite. Nothing has been written then.

    Example:
        >>> parameter = torch.nn.Parameter(torch.zeros(2))
        >>> parameter.grad = torch.tensor([3.0, 4.0])
        >>> clip_grad_norm_([parameter], max_norm=1.0)
        tensor(5.)
        >>> parameter.grad
        tensor([0.6000, 0.8000])
    """
    if not torch.compiler.is_compiling():
        is_generator = isinstance(parameters, types.GeneratorType)
        parameters = listed = _listed(parameters)
        norm = _C.clip_grad_norm(listed, max_norm, norm_type, error_if_nonfinite)
        if norm is not None:
            return norm
        if is_generator and not listed:
            # PyTorch sees a list, and would not warn.
            warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=2)
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)


def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None) -> None:
    """`torch.nn.utils.clip_grad_value_`, faster.

    Clamps each element of all gradients to the range from `-clip_value` to `clip_value`; NaN stays. Arguments, results
    and errors are those of PyTorch's function.

    Args:
        parameters: a tensor, or an iterable of tensors, whose `.grad` is clipped in place. Those without a gradient are
            passed over.
        clip_value: the largest magnitude that an element is to have.
        foreach: of no effect on results, as in PyTorch.

    Example:
        >>> parameter = torch.nn.Parameter(torch.zeros(2))
        >>> parameter.grad = torch.tensor([0.25, -4.0])
        >>> clip_grad_value_([parameter], clip_value=1.0)
        >>> parameter.grad
        tensor([ 0.2500, -1.0000])
    """
    if not torch.compiler.is_compiling():
        parameters = listed = _listed(parameters)
        if _C.clip_grad_value(listed, clip_value):
            return
    torch.nn.utils.clip_grad_value_(parameters, clip_value, foreach)


def _listed(parameters: Tensor | Iterable[Tensor]) -> Tensor | list[Tensor] | tuple[Tensor, ...]:
    """The parameters as they can be read twice, by us and by PyTorch."""
    return parameters if isinstance(parameters, (Tensor, list, tuple)) else list(parameters)

"""What was built, what the processor offers, and what runs."""

import platform
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastmlp import activations
from fastmlp._load import _C, read_build
from fastmlp.autograd import autocast, why_not_direct
from fastmlp.modules import MLP, Linear, fused
from fastmlp.ops import Stack, stack_of

__all__ = ["Route", "explain", "get_isa", "set_isa", "show_config"]


def get_isa() -> str:
    """The name of the instruction set whose kernels run.

    Example:
        >>> get_isa() in ("portable", "avx2", "avx512", "avx512_bf16")
        True
    """
    return _C.get_isa()


def set_isa(name: str) -> None:
    """Makes the kernels of one instruction set run, in the whole process, from the next call on.

    The environment variable FASTMLP_ISA does the same at import. By default the best one that the
    processor and the operating system support is used.

    Args:
        name: "portable", "avx2", "avx512" or "avx512_bf16" (on aarch64 "portable" only).

    Raises:
        ValueError: if the name is unknown, or the processor does not support it.

    Example:
        >>> before = get_isa()
        >>> set_isa("portable")
        >>> get_isa()
        'portable'
        >>> set_isa(before)
    """
    _C.set_isa(name)


class Route(NamedTuple):
    """How a call would run, and why; see `explain`."""

    name: str
    reason: str


def explain(target: Linear | MLP | Tensor, input: Tensor | None = None) -> Route:
    """Says which route a call would take now, and why.

    Plain tensors on the CPU go directly to the fused kernels, under autocast once they are cast. Under transforms of
    `torch.func`, forward-mode AD, tensor subclasses, and for dtypes and devices without kernels, the same
    function runs as a composition of PyTorch's operations. Under `torch.compile` the fused kernels
    run as registered operators, which this function, called outside, cannot see.

    Args:
        target: the layer or network that is called, or the input itself.
        input: the input, if `target` is a module.

    Returns:
        The route's name, "direct", "composite" or "children" (an `MLP` that runs its children one by
        one), and the reason for it, which is empty for "direct".

    Raises:
        TypeError: if there is no input tensor, or `target` is another module.
        RuntimeError: as the call would, for shapes, dtypes or devices that do not belong together.

    Example:
        >>> explain(torch.zeros(3, 10))
        Route(name='direct', reason='')
        >>> explain(torch.zeros(3, 10, dtype=torch.complex64))
        Route(name='composite', reason='there are no kernels for the dtype')
    """
    tensor = target if isinstance(target, Tensor) else input
    if not isinstance(tensor, Tensor):
        raise TypeError(f"input must be a torch.Tensor, got {type(tensor).__name__}")
    whole: tuple[Stack, tuple[Tensor, ...]] | None = None
    if isinstance(target, MLP):
        whole = fused(target._modules)
        if whole is None:
            return Route("children", "a child has hooks, is parametrized or is of another kind")
    elif isinstance(target, Linear):
        bias = () if target.bias is None else (target.bias,)
        whole = stack_of((bool(bias),), (target.activation,)), (target.weight, *bias)
    elif not isinstance(target, Tensor):
        raise TypeError(f"target must be a fastmlp.Linear, a fastmlp.MLP or a tensor, got {type(target).__name__}")
    reason = why_not_direct(tensor, whole[1] if whole else ())
    if reason is None and whole:
        tensor, *parameters = autocast(tensor, *whole[1])
        _C.check_forward(whole[0].native, tensor, parameters, True)
    return Route("direct", "") if reason is None else Route("composite", reason)


def show_config() -> None:
    """Prints versions, the build, the instruction sets and which of them runs, and threads."""
    rows = [
        ("fastmlp", f"{_version()} in {Path(__file__).parent}"),
        ("torch", f"{torch.__version__}, built with {read_build()['torch']}"),
        ("cuda", "built in" if read_build()["cuda"] else "not built in"),
        ("machine", f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}"),
        ("threads", str(torch.get_num_threads())),
        ("dtypes", ", ".join(_C.dtypes())),
        ("activations", ", ".join(activations.DEFAULTS)),
    ]
    for isa in _C.instruction_sets():
        state = "runs" if isa["name"] == _C.get_isa() else "supported" if isa["supported"] else "not supported"
        rows.append((f"isa {isa['name']}", f"{state}; {isa['description']}"))
    for name, text in rows:
        print(f"{name:13} {text}")


def _version() -> str:
    from fastmlp import __version__

    return __version__

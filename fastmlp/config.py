"""What was built, what the processor offers, and what runs."""

import platform
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmlp import activations
from fastmlp._load import _C, read_build
from fastmlp.autograd import why_not_direct

__all__ = ["Route", "explain", "get_isa", "set_isa", "show_config"]


def get_isa() -> str:
    """The name of the instruction set whose kernels run.

    Example:
        >>> get_isa() in ("portable", "avx2", "avx512")
        True
    """
    return _C.get_isa()


def set_isa(name: str) -> None:
    """Makes the kernels of one instruction set run, in the whole process, from the next call on.

    The environment variable FASTMLP_ISA does the same at import. By default the best one that the
    processor and the operating system support is used.

    Args:
        name: "portable", "avx2" or "avx512" (on aarch64 "portable" only).

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
    """How a call would run: "direct" or "composite", and why ("" for direct)."""

    name: str
    reason: str


def explain(target: nn.Module | Tensor, input: Tensor | None = None) -> Route:
    """Says which route a call would take now, and why.

    Plain tensors on the CPU go directly to the fused kernels. Under transforms of `torch.func`,
    forward-mode AD, autocast, tensor subclasses, and for dtypes and devices without kernels, the same
    function runs as a composition of PyTorch's operations. Under `torch.compile` the fused kernels
    run as registered operators, which this function, called outside, cannot see.

    Args:
        target: a module whose parameters take part, or the input itself.
        input: the input, if `target` is a module.

    Returns:
        The route's name and the reason for it.

    Raises:
        TypeError: if there is no input tensor.

    Example:
        >>> explain(torch.zeros(3, 10))
        Route(name='direct', reason='')
        >>> explain(torch.zeros(3, 10, dtype=torch.float16))
        Route(name='composite', reason='there are no kernels for the dtype')
    """
    tensor = target if isinstance(target, Tensor) else input
    if not isinstance(tensor, Tensor):
        raise TypeError(f"input must be a torch.Tensor, got {type(tensor).__name__}")
    parameters = tuple(target.parameters()) if isinstance(target, nn.Module) else ()
    reason = why_not_direct(tensor, parameters)
    return Route("direct", "") if reason is None else Route("composite", reason)


def show_config() -> None:
    """Prints versions, the build, the instruction sets and which of them runs, and threads."""
    rows = [
        ("fastmlp", f"{_version()} in {Path(__file__).parent}"),
        ("torch", f"{torch.__version__}, built with {read_build()['torch']}"),
        ("cuda", "built in" if read_build()["cuda"] else "not built in"),
        ("machine", f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}"),
        ("threads", str(torch.get_num_threads())),
        ("dtypes", "float32, float64"),
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

"""What was built, what the processor offers, and what runs."""

import platform
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmlp import activations
from fastmlp._errors import described, not_a_tensor
from fastmlp._load import _C, read_build
from fastmlp.autograd import autocast, why_not_direct
from fastmlp.modules import Alone, Linear, Run, Sequential, parts

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
        TypeError: if the name is no string.
        ValueError: if it is unknown, or the processor does not support it.

    Example:
        >>> before = get_isa()
        >>> set_isa("portable")
        >>> get_isa()
        'portable'
        >>> set_isa(before)
    """
    if not isinstance(name, str):
        known = ", ".join(str(isa["name"]) for isa in _C.instruction_sets())
        raise TypeError(f"fastmlp: isa must be one of {known}, got {described(name)}")
    _C.set_isa(name)


class Route(NamedTuple):
    """How a call would run, and why; see `explain`."""

    name: str
    reason: str


def explain(target: nn.Module | Tensor, input: Tensor | None = None) -> Route:
    """Says which route a call would take now, and why.

    Plain tensors on the CPU, and on a GPU if the build has CUDA kernels, go directly to the fused kernels, under
    autocast once they are cast. Under transforms of `torch.func`, forward-mode AD, tensor subclasses, and for dtypes
    and devices without kernels, the same function runs as a composition of PyTorch's operations; for CUDA tensors the
    reason names the command that builds the kernels. Under `torch.compile` the fused kernels run as registered
    operators, which this function, called outside, cannot see.

    Args:
        target: the `Linear`, `Sequential` or `MLP` that is called, or the input itself.
        input: the input, if `target` is a module.

    Returns:
        The route's name and the reason for it. "direct": everything goes to the kernels, and the reason
        is empty. "composite": PyTorch's operations. "children": some children of a `Sequential` are called by
        themselves; the reason names each.

    Raises:
        TypeError: if there is no input tensor, or `target` is another module.
        RuntimeError: as the call would on the direct route, for shapes or dtypes that do not belong together.

    Example:
        >>> explain(torch.zeros(3, 10))
        Route(name='direct', reason='')
        >>> explain(torch.zeros(3, 10, dtype=torch.complex64))
        Route(name='composite', reason='there are no kernels for the dtype')
        >>> explain(Sequential(nn.Linear(10, 5), nn.LayerNorm(5)), torch.zeros(3, 10))
        Route(name='children', reason='1: LayerNorm is not a module that is fused')
    """
    if isinstance(target, Tensor):
        return _route(target, None)
    if not isinstance(target, (Linear, Sequential)):
        expected = "a fastmlp.Linear, a fastmlp.Sequential or a tensor"
        advice = "; fusion_report says what of it runs fused" if isinstance(target, nn.Module) else ""
        raise TypeError(f"fastmlp: target must be {expected}, got {described(target)}{advice}")
    if not isinstance(input, Tensor):
        raise not_a_tensor("input", input, next((p.dtype for p in target.parameters()), None))
    tensor = input
    if isinstance(target, Linear):
        bias = () if target.bias is None else (target.bias,)
        return _route(tensor, Run([""], [""], [target.weight, *bias], [bool(bias)], [target.activation]))
    alone: list[str] = []
    for part in parts(target._modules):
        if isinstance(part, Alone):
            alone.append(f"{part.name}: {part.reason}")
        elif not alone:
            # Later runs have inputs that only their predecessors could tell.
            route = _route(tensor, part)
            if route.reason:
                return route
    return Route("children", "; ".join(alone)) if alone else Route("direct", "")


def _route(input: Tensor, run: Run | None) -> Route:
    parameters = tuple(run.parameters) if run else ()
    reason = why_not_direct(input, parameters)
    if reason is None and run:
        input, *cast = autocast(input, *parameters)
        _C.check_forward(run.stack().native, input, cast, True, run.called())
    return Route("direct", "") if reason is None else Route("composite", reason)


def show_config() -> None:
    """Prints versions, the build, the instruction sets and which of them runs, and threads."""
    rows = [
        ("fastmlp", f"{_version()} in {Path(__file__).parent}"),
        ("torch", f"{torch.__version__}, built with {read_build()['torch']}"),
        *((device, _absent(device, hint)) for device, hint in _C.absent_devices().items()),
        ("machine", f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}"),
        ("threads", str(torch.get_num_threads())),
        ("devices", ", ".join(_C.devices())),
        ("dtypes", ", ".join(_C.dtypes())),
        ("activations", ", ".join(activations.DEFAULTS)),
    ]
    for isa in _C.instruction_sets():
        state = "runs" if isa["name"] == _C.get_isa() else "supported" if isa["supported"] else "not supported"
        rows.append((f"isa {isa['name']}", f"{state}; {isa['description']}"))
    for name, text in rows:
        print(f"{name:13} {text}")


def _absent(device: str, hint: str) -> str:
    # The command helps only where torch has the device.
    return "not built in" if getattr(torch.version, device, None) is None else f"not built in: {hint}"


def _version() -> str:
    from fastmlp import __version__

    return __version__

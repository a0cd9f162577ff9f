"""What was built, what the processor offers, and what runs."""

import platform
from pathlib import Path

import torch

from fastmlp import activations
from fastmlp._errors import described
from fastmlp._load import _C, read_build

__all__ = ["get_isa", "set_isa", "show_config"]


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

"""What of the library is compiled for the host, as it is, into the extension that emulates a GPU."""

from pathlib import Path

__all__ = ["HOST_SOURCES"]

_CSRC = Path(__file__).resolve().parents[2] / "csrc"

#: Tables and checks that kernels and their callers need; the emulator stands in for all else.
HOST_SOURCES = [
    *(_CSRC / "contract" / f"{stem}.cpp" for stem in ("activation_info", "training_info")),
    *(_CSRC / "tensors" / f"{stem}.cpp" for stem in ("checks", "devices", "dtypes", "passes", "stack")),
]

"""What layers and networks ask about recorders, which themselves depend on layers and networks."""

from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

__all__ = ["RecordingMode", "is_recording"]


class RecordingMode(TorchDispatchMode):
    """The base class of recorders."""


def is_recording() -> bool:
    """Whether a recorder sees what this thread does."""
    return any(isinstance(mode, RecordingMode) for mode in _get_current_dispatch_mode_stack())

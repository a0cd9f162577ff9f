"""Where torch keeps the hooks of modules: what they watch has to be called, and is not fused."""

import torch.nn.modules.module as nn_module
from torch import nn

__all__ = ["GLOBAL_HOOKS", "HOOKS", "has_hooks"]

#: Attributes of each module, dictionaries of hooks that its call runs.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

#: Dictionaries of hooks that the call of every module runs.
GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks of its own.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> handle = layer.register_forward_hook(print)
        >>> has_hooks(layer), has_hooks(nn.ReLU())
        (True, False)
    """
    return any(module.__dict__.get(name) for name in HOOKS)

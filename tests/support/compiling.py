"""torch.compile as tests use it."""

from typing import Any

import torch
from torch import nn


def compiled(module: nn.Module, **options: Any) -> Any:
    """Ahead-of-time autograd without code generation: what is traced is what is tested."""
    return torch.compile(module, backend="aot_eager", fullgraph=True, **options)

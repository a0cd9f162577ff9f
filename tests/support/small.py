"""Small models that tests of several folders convert, record and freeze."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Two layers of 4 and 3 columns, and what a test puts between them and after them."""

    def __init__(self, between: Callable[..., Tensor] = torch.relu, after: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 3)
        self.between, self.after = between, after

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(self.between(self.fc1(x)))
        return y if self.after is None else self.after(y)


class OwnLinear(nn.Linear):
    """A subclass that computes something else than nn.Linear, so that nobody may take it for one."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def norm(features: int, **options: Any) -> nn.BatchNorm1d:
    """A batch norm whose statistics are of some data, not those that it is made with."""
    layer = nn.BatchNorm1d(features, **options)
    layer(torch.randn(50, features) * 2 + 3)
    if options.get("affine", True):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return layer


def state_of(model: nn.Module) -> list[Any]:
    """Classes and attributes of every module, as they are."""
    return [(name, type(m), m, dict(m.__dict__)) for name, m in model.named_modules()]

"""What forwards are made of: tensor arithmetic on the input, and all else that recording may read, write or decide."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Of a forward: the module, and what it has computed so far.
Statement = Callable[[Any, Tensor], Tensor]


class Program(nn.Module):
    """A forward of some statements. All that they read and write is here.

    Args:
        width: of the input, all layers and the output.
        statements: in the order in which they are done.
        dtype: of the parameters.
    """

    fc1: nn.Linear
    fc2: nn.Linear
    fc3: nn.Linear
    calls: Tensor
    mean: Tensor
    noise: Tensor

    def __init__(self, width: int, statements: list[Statement], dtype: torch.dtype) -> None:
        super().__init__()
        self.width, self.statements = width, statements
        for name in ("fc1", "fc2", "fc3"):
            setattr(self, name, nn.Linear(width, width, dtype=dtype))
        self.norm, self.batch_norm = nn.LayerNorm(width, dtype=dtype), nn.BatchNorm1d(width, dtype=dtype)
        self.act, self.dropout = nn.Tanh(), nn.Dropout(0.3)
        self.children_ = nn.Sequential(
            nn.Linear(width, width, dtype=dtype), nn.ReLU(), nn.Linear(width, width, dtype=dtype)
        )
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(width, dtype=dtype))
        self.register_buffer("noise", torch.zeros(width, dtype=dtype))
        self.count = 0
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        for statement in self.statements:
            x = statement(self, x)
        return x


class Scaled(Program):
    """With an argument more, which is often not given."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = super().forward(x)
        if scale is None:
            return x
        return x * scale


# Arithmetic on the input.


def first(self: Any, x: Tensor) -> Tensor:
    return self.fc1(x)


def second(self: Any, x: Tensor) -> Tensor:
    return torch.tanh(self.fc2(x))


def third(self: Any, x: Tensor) -> Tensor:
    return self.fc3(x).relu()


def functional(self: Any, x: Tensor) -> Tensor:
    return F.gelu(x)


def in_place(self: Any, x: Tensor) -> Tensor:
    return F.leaky_relu(self.fc2(x), 0.2, True)


def module(self: Any, x: Tensor) -> Tensor:
    return self.act(self.fc1(x))


def container(self: Any, x: Tensor) -> Tensor:
    return self.children_(x)


ARITHMETIC: tuple[Statement, ...] = (first, first, second, second, third, functional, in_place, module, container)


def residual(self: Any, x: Tensor) -> Tensor:
    return x + torch.sigmoid(self.fc2(x))


def used_twice(self: Any, x: Tensor) -> Tensor:
    h = self.fc1(x)
    return torch.tanh(h) * 0.5 + h


def halves(self: Any, x: Tensor) -> Tensor:
    return torch.cat([x, self.fc3(x)], -1)[..., self.width // 2 :][..., : self.width]


def normed(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.fc1(x))


def dropped(self: Any, x: Tensor) -> Tensor:
    return self.dropout(torch.tanh(self.fc2(x)))


def batch_normed(self: Any, x: Tensor) -> Tensor:
    return self.batch_norm(self.fc1(x))


def times(self: Any, x: Tensor) -> Tensor:
    return x * 0.5 + 1


GRAPHS: tuple[Statement, ...] = (residual, used_twice, halves, normed, dropped, batch_normed, times)

# What is more than that.


def by_isinstance(self: Any, x: Tensor) -> Tensor:
    return torch.tanh(self.fc1(x)) if isinstance(x, Tensor) else self.fc1(x)


def by_is_tensor(self: Any, x: Tensor) -> Tensor:
    return torch.tanh(self.fc1(x)) if torch.is_tensor(x) else self.fc1(x)


def by_type(self: Any, x: Tensor) -> Tensor:
    return self.fc2(x) if type(x) is Tensor else torch.sigmoid(self.fc2(x))


def by_attribute(self: Any, x: Tensor) -> Tensor:
    return self.fc2(x).tanh() if hasattr(x, "numpy") and not callable(x) else self.fc2(x)


def by_mode(self: Any, x: Tensor) -> Tensor:
    return torch.tanh(x) if torch.is_grad_enabled() else x


def by_training(self: Any, x: Tensor) -> Tensor:
    return x * 2 if self.training else x


def by_rows(self: Any, x: Tensor) -> Tensor:
    return torch.tanh(x) if x.shape[0] > 3 else x


def by_dim(self: Any, x: Tensor) -> Tensor:
    return torch.tanh(x) if x.dim() == 3 else x


def by_numbers(self: Any, x: Tensor) -> Tensor:
    return torch.tanh(x) if x.detach().sum() > 0 else x


def by_grad(self: Any, x: Tensor) -> Tensor:
    return torch.tanh(x) if x.requires_grad is True else x


def by_try(self: Any, x: Tensor) -> Tensor:
    try:
        return torch.tanh(x) if float(x.detach().abs().sum()) >= 0 else x
    except Exception:
        return x * 3


def random_tensor(self: Any, x: Tensor) -> Tensor:
    return self.fc1(x) + torch.randn(self.width, dtype=self.mean.dtype)


def random_like(self: Any, x: Tensor) -> Tensor:
    return self.fc1(x) + torch.randn_like(x)


def bayesian(self: Any, x: Tensor) -> Tensor:
    self.noise.data.normal_()
    return self.fc1(x) + self.noise * 0.5


def random_number(self: Any, x: Tensor) -> Tensor:
    return self.fc1(x) * random.random()


def random_of_numpy(self: Any, x: Tensor) -> Tensor:
    return self.fc1(x) * float(np.random.rand())  # noqa: NPY002


def penalty(self: Any, x: Tensor) -> Tensor:
    total = torch.zeros((), dtype=self.mean.dtype)
    total += self.fc1(x).abs().mean()
    return self.fc2(x) + total


def filled(self: Any, x: Tensor) -> Tensor:
    made = torch.zeros(self.width, dtype=self.mean.dtype)
    made[0] = 2.0
    made.add_(x.detach().mean())
    return x + made


def counted(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return self.fc1(x)


def counted_in_python(self: Any, x: Tensor) -> Tensor:
    self.count += 1
    return self.fc2(x)


def remembered(self: Any, x: Tensor) -> Tensor:
    self.seen.append(1)
    return self.fc3(x)


def running(self: Any, x: Tensor) -> Tensor:
    self.mean.mul_(0.5).add_(x.detach().mean(), alpha=0.5)
    return self.fc1(x) - self.mean


def reassigned(self: Any, x: Tensor) -> Tensor:
    self.mean = self.mean * 0.5 + 1
    return self.fc1(x) + self.mean


def cached(self: Any, x: Tensor) -> Tensor:
    if not hasattr(self, "made"):
        self.made = torch.randn(self.width, dtype=self.mean.dtype)
    return self.fc1(x) + self.made


def switched(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = self.fc1(x)
    return y + self.fc2(x)


def detached_weight(self: Any, x: Tensor) -> Tensor:
    return self.fc1(x) * self.fc2.weight.detach().mean()


def weight_read(self: Any, x: Tensor) -> Tensor:
    """A number that is read of a parameter when it is recorded."""
    return self.fc1(x) * float(self.fc2.weight.detach().abs().mean())


def weight_changed(self: Any, x: Tensor) -> Tensor:
    self.fc1.weight.data.mul_(0.5)
    return self.fc1(x)


ODD: tuple[Statement, ...] = (
    *(by_isinstance, by_is_tensor, by_type, by_attribute, by_mode, by_training, by_rows, by_dim, by_numbers, by_grad),
    *(by_try, random_tensor, random_like, bayesian, random_number, random_of_numpy, penalty, filled, counted),
    *(counted_in_python, remembered, running, reassigned, cached, switched, detached_weight, weight_read),
    weight_changed,
)

"""Models that are graphs of layers, as published programs have them, of small sizes: for `freeze`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmlp
from tests.support.rounding import distance, rounding_bounds


class ResNetBlock(nn.Module):
    """A block of the residual network of "Revisiting Deep Learning Models for Tabular Data" (2021)."""

    def __init__(self, width: int, hidden: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm = norm(width)
        self.linear0 = nn.Linear(width, hidden)
        self.linear1 = nn.Linear(hidden, width)
        self.hidden_dropout = nn.Dropout(0.1)
        self.residual_dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        z = self.hidden_dropout(F.relu(self.linear0(z)))
        return x + self.residual_dropout(self.linear1(z))


class ResNet(nn.Module):
    """The residual network of that article."""

    def __init__(
        self,
        features: int = 9,
        width: int = 17,
        hidden: int = 33,
        outputs: int = 3,
        blocks: int = 2,
        norm: Callable[[int], nn.Module] = nn.BatchNorm1d,
    ) -> None:
        super().__init__()
        self.first = nn.Linear(features, width)
        self.blocks = nn.ModuleList([ResNetBlock(width, hidden, norm) for _ in range(blocks)])
        self.norm = norm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu(self.norm(x)))


class NeRF(nn.Module):
    """The network of "NeRF" (2020), with its skip and the direction that joins late."""

    def __init__(self, points: int = 15, views: int = 7, width: int = 32, depth: int = 4, skip: int = 2) -> None:
        super().__init__()
        self.points, self.views, self.skip = points, views, skip
        sizes = [points] + [width + points if i == skip else width for i in range(depth - 1)]
        self.layers = nn.ModuleList([nn.Linear(size, width) for size in sizes])
        self.alpha = nn.Linear(width, 1)
        self.feature = nn.Linear(width, width)
        self.view = nn.Linear(width + views, width // 2)
        self.rgb = nn.Linear(width // 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        points, views = torch.split(x, [self.points, self.views], dim=-1)
        h = points
        for i, layer in enumerate(self.layers):
            h = F.relu(layer(h))
            if i == self.skip:
                h = torch.cat([points, h], -1)
        alpha = self.alpha(h)
        h = torch.cat([self.feature(h), views], -1)
        h = F.relu(self.view(h))
        return torch.cat([self.rgb(h), alpha], -1)


class Actor(nn.Module):
    """The actor of soft actor-critic: mean, and a logarithm of the deviation within bounds."""

    def __init__(self, features: int = 17, width: int = 32, actions: int = 6) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, width)
        self.fc2 = nn.Linear(width, width)
        self.mean = nn.Linear(width, actions)
        self.log_std = nn.Linear(width, actions)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        log_std = torch.tanh(self.log_std(x))
        return self.mean(x), -5 + 0.5 * (2 - -5) * (log_std + 1)


class Critic(nn.Module):
    """A critic of observations and actions."""

    def __init__(self, features: int = 17, actions: int = 6, width: int = 32) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features + actions, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, 1)

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        x = torch.cat([x, a], 1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Twins(nn.Module):
    """Two critics on one input."""

    def __init__(self, features: int = 23, width: int = 32) -> None:
        super().__init__()
        self.q1 = fastmlp.MLP(features, [width, width], 1)
        self.q2 = nn.Sequential(
            nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q1(x), self.q2(x)


class Gaussian(nn.Module):
    """One head whose halves are mean and deviation, with a squeezed value beside it and a parameter of its own."""

    def __init__(self, features: int = 11, width: int = 19, latent: int = 5) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(features, width), nn.LayerNorm(width), nn.SiLU())
        self.head = nn.Linear(width, 2 * latent)
        self.value = nn.Linear(width, 1)
        self.scale = nn.Parameter(torch.linspace(0.5, 2, latent))
        self.register_buffer("shift", torch.tensor([0.25]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.trunk(x)
        mean, spread = self.head(h).chunk(2, dim=-1)
        return mean * self.scale + self.shift, F.softplus(spread) + 1e-3, self.value(h).squeeze(-1)


class Highway(nn.Module):
    """A gate between what a layer makes and what it got, softmax of few columns, and results that are inputs."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.carry = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)
        self.choice = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        gate = torch.sigmoid(self.gate(x))
        h = gate * torch.relu(self.carry(x)) + (1 - gate) * x
        return h, torch.softmax(self.choice(h), -1), h[:, 1:4], x


class Functions(nn.Module):
    """Layers that are called as functions: its own parameters, and those of a layer that is called as a module too."""

    def __init__(self, width: int = 9) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / 3)
        self.bias = nn.Parameter(torch.randn(width))
        self.inner = fastmlp.Linear(width, width, activation="tanh")
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(F.linear(x, self.weight, self.bias).relu())
        h = torch.sin(F.linear(h, self.inner.weight, self.inner.bias))
        return self.softmax(x + F.linear(h, self.weight, self.bias))


#: Models that are graphs, and the features of their inputs.
GRAPHS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "rtdl": (ResNet, (9,)),
    "layer norm": (lambda: ResNet(norm=nn.LayerNorm), (9,)),
    "nerf": (NeRF, (22,)),
    "actor": (Actor, (17,)),
    "critic": (Critic, (17, 6)),
    "twins": (Twins, (23,)),
    "gaussian": (Gaussian, (11,)),
    "highway": (Highway, (8,)),
    "functions": (Functions, (9,)),
}


def as_tuple(value: Any) -> tuple[Any, ...]:
    """The results of a model, which are one tensor or several."""
    return value if isinstance(value, tuple) else (value,)


def assert_near(model: nn.Module, found: Any, inputs: tuple[Tensor, ...]) -> None:
    """What was found has the shapes and dtypes of the model's results, and differs by what rounding explains."""

    def results() -> dict[str, Tensor]:
        with torch.no_grad():
            return {str(i): result for i, result in enumerate(as_tuple(model(*[x.clone() for x in inputs])))}

    expected = results()
    assert isinstance(found, tuple) == (len(expected) > 1)
    for theirs, ours in zip(expected.values(), as_tuple(found), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    if not all(theirs.numel() for theirs in expected.values()):
        return
    bounds = rounding_bounds(results, expected, steps=True)
    for (name, theirs), ours in zip(expected.items(), as_tuple(found), strict=True):
        assert distance(ours, theirs) <= bounds[name], f"{distance(ours, theirs):.3g} > {bounds[name]:.3g}"

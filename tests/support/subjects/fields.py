"""Functions of space: an image by sines, a scene by its rays."""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.graphs import NeRF
from tests.support.subjects.base import BATCHES, Described


class SineLayer(nn.Module):
    """sin(w0 (W x + b)) with parameters of its own, from the range that keeps frequencies."""

    def __init__(self, fan_in: int, fan_out: int, w0: float = 30.0, first: bool = False) -> None:
        super().__init__()
        self.w0 = w0
        bound = 1 / fan_in if first else sqrt(6 / fan_in) / w0
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(fan_out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.w0 * F.linear(x, self.weight, self.bias))


class Sines(nn.Module):
    """Layers of sines and a linear one."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        layers = [SineLayer(width, width) for _ in range(hidden)]
        self.net = nn.Sequential(SineLayer(2, width, first=True), *layers, nn.Linear(width, 1))

    def forward(self, coordinates: Tensor) -> Tensor:
        return self.net(coordinates)


class Siren(Described):
    """The pixels of an image, by Adam."""

    name = "SIREN"
    criterion = nn.MSELoss()

    def __init__(self, dtype: torch.dtype, small: bool = False) -> None:
        super().__init__(dtype, small)
        places = self.randn(BATCHES * self.size(1024, 8), 2, seed=1).tanh()
        self.data = places, (9 * places[:, :1]).sin() * places[:, 1:]

    def make(self) -> nn.Module:
        return Sines(self.size(64, 12), self.size(3, 2)).to(self.dtype)

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(model.parameters(), lr=1e-4)]


def encoded(x: Tensor, octaves: int) -> Tensor:
    """Returns coordinates with sines and cosines of their multiples, (*, n (1 + 2 octaves))."""
    parts = [x]
    for octave in range(octaves):
        parts += [torch.sin(2**octave * x), torch.cos(2**octave * x)]
    return torch.cat(parts, -1)


class Rays(Described):
    """A radiance field with a skip: colours and densities along rays, summed to the colours of pixels."""

    name = "NeRF"
    several = "its loss sums what the network says along rays, and is no function of an output and a target"
    examples = True

    def __init__(self, dtype: torch.dtype, small: bool = False) -> None:
        super().__init__(dtype, small)
        rays, self.samples = BATCHES * self.size(32, 3), self.size(32, 4)
        self.octaves, self.directions = self.size(10, 2), self.size(4, 1)
        start, toward = self.randn(rays, 1, 3, seed=1), F.normalize(self.randn(rays, 1, 3, seed=2), dim=-1)
        depth = torch.linspace(0.5, 2, self.samples, dtype=dtype).view(1, -1, 1)
        self.data = start + depth * toward, toward.expand(-1, self.samples, -1), self.randn(rays, 3, seed=3).sigmoid()

    def make(self) -> nn.Module:
        points, views = 3 * (1 + 2 * self.octaves), 3 * (1 + 2 * self.directions)
        width, depth = self.size(128, 12), self.size(8, 3)
        return NeRF(points, views, width, depth, self.size(4, 1)).to(self.dtype)

    def features(self, points: Tensor, toward: Tensor) -> Tensor:
        """Returns what the network takes."""
        return torch.cat([encoded(points, self.octaves), encoded(toward, self.directions)], -1)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        points, toward, colors = batch
        found = model(self.features(points, toward))
        opacity = 1 - torch.exp(-F.relu(found[..., 3]) * (1.5 / self.samples))
        through = torch.cumprod(torch.cat([torch.ones_like(opacity[:, :1]), 1 - opacity + 1e-10], 1), 1)[:, :-1]
        seen = ((opacity * through).unsqueeze(-1) * torch.sigmoid(found[..., :3])).sum(1)
        return F.mse_loss(seen, colors)

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(model.parameters(), lr=5e-4)]

    def requests(self, rows: int) -> tuple[Tensor, ...]:
        points, toward, _ = self.data
        return (self.features(points, toward).flatten(0, 1)[:rows],)

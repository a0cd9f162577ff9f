"""Rows of tables: a regression, recommendations, and particles that act on one another."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.graphs import ResNet
from tests.support.subjects.base import BATCHES, Described


class Residual(Described):
    """The residual network of rtdl with LayerNorm, a regression by AdamW."""

    name = "ResNet with LayerNorm"
    criterion = nn.MSELoss()

    def __init__(self, dtype: torch.dtype, small: bool = False) -> None:
        super().__init__(dtype, small)
        rows = self.randn(BATCHES * self.size(128, 8), 16, seed=1)
        self.data = rows, (2 * rows[:, :1]).sin() + rows[:, 1:2] * rows[:, 2:3]

    def make(self) -> nn.Module:
        width = self.size(64, 10)
        return ResNet(16, width, 2 * width, 1, self.size(3, 1), nn.LayerNorm).to(self.dtype)

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)]


class TwoTowers(nn.Module):
    """Users and things as vectors, whose products are logits of clicks."""

    def __init__(self, users: int, things: int, width: int) -> None:
        super().__init__()
        self.users, self.things = nn.Embedding(users, width), nn.Embedding(things, width)
        self.of_user = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.of_thing = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))

    def forward(self, user: Tensor, thing: Tensor) -> Tensor:
        return (self.of_user(self.users(user)) * self.of_thing(self.things(thing))).sum(1)


class Recommendation(Described):
    """Clicks of users on things."""

    name = "two towers"
    several = "the model takes two inputs"
    inputs = 2

    def __init__(self, dtype: torch.dtype, small: bool = False) -> None:
        super().__init__(dtype, small)
        rows, self.entries = BATCHES * self.size(256, 8), self.size(1000, 20)
        generator = torch.Generator().manual_seed(1)
        user, thing = (torch.randint(self.entries, (rows,), generator=generator) for _ in range(2))
        self.data = user, thing, ((user + thing) % 3 == 0).to(dtype)

    def make(self) -> nn.Module:
        return TwoTowers(self.entries, self.entries, self.size(32, 6)).to(self.dtype)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        user, thing, clicks = batch
        return F.binary_cross_entropy_with_logits(model(user, thing), clicks)


class OwnLinear(nn.Module):
    """A layer that calls F.linear, as libraries for graphs have it."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))
        self.bias = nn.Parameter(torch.zeros(fan_out))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Messages(nn.Module):
    """Particles send messages along edges, sum what they get, and change by it."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.message1, self.message2 = OwnLinear(2 * features, width), OwnLinear(width, width)
        self.update1, self.update2 = OwnLinear(features + width, width), OwnLinear(width, features)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges[0], edges[1]
        sent = F.silu(self.message1(torch.cat([x[source], x[target]], dim=-1)))
        sent = F.silu(self.message2(sent))
        got = sent.new_zeros(x.size(0), sent.size(1)).index_add(0, target, sent)
        return x + self.update2(F.silu(self.update1(torch.cat([x, got], dim=-1))))


class Particles(Described):
    """The next places of particles."""

    name = "message passing"
    several = "the model takes two inputs"

    def __init__(self, dtype: torch.dtype, small: bool = False) -> None:
        super().__init__(dtype, small)
        particles, self.features = self.size(128, 6), 4
        places = self.randn(BATCHES * particles, self.features, seed=1)
        edges = torch.randint(particles, (BATCHES * 2, 4 * particles), generator=torch.Generator().manual_seed(2))
        self.data = places, edges, places.roll(1, 1).sin()

    def make(self) -> nn.Module:
        return Messages(self.features, self.size(64, 10)).to(self.dtype)

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        places, edges, wanted = batch
        return F.mse_loss(model(places, edges), wanted)

    def requests(self, rows: int) -> tuple[Tensor, ...]:
        places, edges, _ = self.data
        return places[:rows], edges[:2] % rows

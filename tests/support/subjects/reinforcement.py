"""Control of continuous actions: actors, twin critics, and targets that follow them."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal

from tests.support.graphs import Actor, Critic
from tests.support.subjects.base import BATCHES, Described

FEATURES, ACTIONS = 17, 6
GAMMA, TAU = 0.99, 0.005


def follower(network: nn.Module) -> nn.Module:
    """Returns a copy that no optimizer trains."""
    return copy.deepcopy(network).requires_grad_(False)


def follow(target: nn.Module, source: nn.Module) -> None:
    """Moves a target a part of the way."""
    for kept, moved in zip(target.parameters(), source.parameters(), strict=True):
        kept.data.copy_(TAU * moved.data + (1 - TAU) * kept.data)


class Control(Described):
    """Transitions of a robot: in a step critics move, then the actor, then targets after what they follow.

    Attributes:
        followed: names of the networks that have a target, whose name ends with `_target`.
    """

    followed: tuple[str, ...]

    def __init__(self, dtype: torch.dtype, small: bool = False) -> None:
        super().__init__(dtype, small)
        self.features, self.actions = self.size(FEATURES, 7), self.size(ACTIONS, 2)
        self.width = self.size(256, 12)
        rows = BATCHES * self.size(256, 8)
        states, actions = self.randn(rows, self.features, seed=1), self.randn(rows, self.actions, seed=2).tanh()
        rewards = (states[:, : self.actions] * actions).sum(1, keepdim=True)
        ends = (self.randn(rows, 1, seed=3) > 1.6).to(dtype)
        self.data = states, actions, states + 0.1 * self.randn(rows, self.features, seed=4), rewards, ends

    def served(self, model: nn.Module) -> nn.Module:
        return model.get_submodule("actor")

    def critics_loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """Returns what both critics miss."""
        raise NotImplementedError

    def actor_loss(self, model: nn.Module, states: Tensor) -> Tensor:
        """Returns the negative of what the actor is to gain."""
        raise NotImplementedError

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        return self.critics_loss(model, *batch) + self.actor_loss(model, batch[0])

    def step(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], *batch: Tensor) -> Tensor:
        of_critics, of_actor = optimizers
        critics_loss = self.critics_loss(model, *batch)
        of_critics.zero_grad()
        critics_loss.backward()
        of_critics.step()
        actor_loss = self.actor_loss(model, batch[0])
        of_actor.zero_grad()
        actor_loss.backward()
        of_actor.step()
        networks = dict(model.named_children())
        for name in self.followed:
            follow(networks[f"{name}_target"], networks[name])
        return critics_loss.detach() + actor_loss.detach()


class SoftActorCritic(Control):
    """Twin critics towards a soft target, and a Gaussian actor up the smaller of them."""

    name = "soft actor-critic"
    several = "a step moves twin critics and an actor, with two losses and two optimizers"
    followed = "first", "second"

    def make(self) -> nn.Module:
        first, second = (Critic(self.features, self.actions, self.width) for _ in range(2))
        networks = {"actor": Actor(self.features, self.width, self.actions), "first": first, "second": second}
        networks |= {"first_target": follower(first), "second_target": follower(second)}
        return nn.ModuleDict(networks).to(self.dtype)

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        networks = dict(model.named_children())
        critics = [*networks["first"].parameters(), *networks["second"].parameters()]
        return [torch.optim.Adam(critics, lr=1e-3), torch.optim.Adam(networks["actor"].parameters(), lr=3e-4)]

    def draw(self, actor: nn.Module, states: Tensor) -> tuple[Tensor, Tensor]:
        """Returns actions within (-1, 1) and the logarithms of their probabilities, (batch, 1)."""
        mean, log_std = actor(states)
        normal = Normal(mean, log_std.exp(), validate_args=False)
        drawn = normal.rsample()
        actions = torch.tanh(drawn)
        log_prob = normal.log_prob(drawn) - torch.log(1 - actions.pow(2) + 1e-6)
        return actions, log_prob.sum(1, keepdim=True)

    def critics_loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        states, actions, next_states, rewards, ends = batch
        networks = dict(model.named_children())
        with torch.no_grad():
            next_actions, log_probs = self.draw(networks["actor"], next_states)
            smaller = torch.min(*(networks[f"{one}_target"](next_states, next_actions) for one in self.followed))
            wanted = rewards + (1 - ends) * GAMMA * (smaller - 0.2 * log_probs)
        return F.mse_loss(networks["first"](states, actions), wanted) + F.mse_loss(
            networks["second"](states, actions), wanted
        )

    def actor_loss(self, model: nn.Module, states: Tensor) -> Tensor:
        networks = dict(model.named_children())
        actions, log_probs = self.draw(networks["actor"], states)
        smaller = torch.min(networks["first"](states, actions), networks["second"](states, actions))
        return (0.2 * log_probs - smaller).mean()


class Deterministic(nn.Module):
    """An actor whose actions lie within a bound."""

    def __init__(self, features: int, width: int, actions: int, max_action: float) -> None:
        super().__init__()
        self.l1 = nn.Linear(features, width)
        self.l2 = nn.Linear(width, width)
        self.l3 = nn.Linear(width, actions)
        self.max_action = max_action

    def forward(self, state: Tensor) -> Tensor:
        a = F.relu(self.l1(state))
        a = F.relu(self.l2(a))
        return self.max_action * torch.tanh(self.l3(a))


class TwinCritic(nn.Module):
    """Two critics in one module, of which the actor asks the first alone."""

    def __init__(self, features: int, actions: int, width: int) -> None:
        super().__init__()
        self.l1 = nn.Linear(features + actions, width)
        self.l2 = nn.Linear(width, width)
        self.l3 = nn.Linear(width, 1)
        self.l4 = nn.Linear(features + actions, width)
        self.l5 = nn.Linear(width, width)
        self.l6 = nn.Linear(width, 1)

    def forward(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        sa = torch.cat([state, action], 1)
        q2 = F.relu(self.l4(sa))
        q2 = F.relu(self.l5(q2))
        return self.first(state, action), self.l6(q2)

    def first(self, state: Tensor, action: Tensor) -> Tensor:
        """The first critic alone."""
        q1 = F.relu(self.l1(torch.cat([state, action], 1)))
        q1 = F.relu(self.l2(q1))
        return self.l3(q1)


class TwinDelayed(Control):
    """TD3: twin critics towards the smaller of their targets at a noisy action, and the actor up the first of them."""

    name = "TD3"
    several = "a step moves a critic and an actor, with two losses and two optimizers"
    followed = "critic", "actor"
    max_action = 2.0

    def make(self) -> nn.Module:
        actor = Deterministic(self.features, self.width, self.actions, self.max_action)
        critic = TwinCritic(self.features, self.actions, self.width)
        networks = {"actor": actor, "critic": critic}
        networks |= {"actor_target": follower(actor), "critic_target": follower(critic)}
        return nn.ModuleDict(networks).to(self.dtype)

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        networks = dict(model.named_children())
        return [torch.optim.Adam(networks[one].parameters(), lr=3e-4) for one in ("critic", "actor")]

    def critics_loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        states, actions, next_states, rewards, ends = batch
        networks = dict(model.named_children())
        with torch.no_grad():
            noise = (torch.randn_like(actions) * 0.2).clamp(-0.5, 0.5)
            next_actions = (networks["actor_target"](next_states) + noise).clamp(-self.max_action, self.max_action)
            smaller = torch.min(*networks["critic_target"](next_states, next_actions))
            wanted = rewards + (1 - ends) * GAMMA * smaller
        q1, q2 = networks["critic"](states, actions)
        return F.mse_loss(q1, wanted) + F.mse_loss(q2, wanted)

    def actor_loss(self, model: nn.Module, states: Tensor) -> Tensor:
        networks = dict(model.named_children())
        first = networks["critic"].first
        assert callable(first)
        return -first(states, networks["actor"](states)).mean()

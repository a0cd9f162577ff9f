"""A policy that plays CartPole, as it is and frozen: `python examples/rollout.py --steps 20000`.

Reinforcement learning asks a small network for one decision at a time, so that most of what a rollout takes is not
arithmetic. This is the inner loop of Stable-Baselines3's on-policy algorithms (`collect_rollouts`) with the networks of
its `MlpPolicy`: an actor and a critic of two hidden layers of 64 with tanh, an action sampled from the actor's logits,
and observation, action, value and log-probability stored at each step.

It runs twice from the same seeds: with the networks as PyTorch runs them, and with `fastmlp.freeze` of both, which take
the environment's NumPy arrays and give back such. Nothing else differs, so both play the same games, which is asserted
at the end. It needs gymnasium, which comes with Stable-Baselines3: pip install 'fastmlp[models]'.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import fastmlp

Array = npt.NDArray[Any]
Network = Callable[[Array], Array]

#: Environment steps in a row, of one way and then of the other: so that whatever else the machine does meets both.
TURN = 500


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    """The network of `MlpPolicy`."""
    return nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


def as_it_is(model: nn.Module) -> Network:
    """A network that takes and gives NumPy arrays, as Stable-Baselines3 has it."""

    def run(observation: Array) -> Array:
        with torch.no_grad():
            output: Array = model(torch.as_tensor(observation)).numpy()
        return output

    return run


def frozen(model: nn.Module) -> Network:
    """The same, packed once, in one call without PyTorch in between. Where training changed the model: `refresh()`."""
    return fastmlp.freeze(model)


@dataclass
class Rollout:
    """A policy playing, and what it saw.

    Attributes:
        actor: from an observation (4,) to logits (2,).
        critic: from an observation to its value (1,).
        seed: of the environment and of the actions.
    """

    actor: Network
    critic: Network
    seed: int
    observations: list[Array] = field(default_factory=list)
    actions: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    episodes: int = 0
    seconds: float = 0.0
    seconds_in_environment: float = 0.0

    def __post_init__(self) -> None:
        self.environment = gymnasium.make("CartPole-v1")
        self.random = np.random.default_rng(self.seed)
        self.observation, _ = self.environment.reset(seed=self.seed)

    def play(self, steps: int) -> None:
        """Play on for some steps of the environment."""
        start = perf_counter()
        for _ in range(steps):
            observation = self.observation
            logits, value = self.actor(observation), self.critic(observation)
            action, log_probability = self.sample(logits)
            before = perf_counter()
            self.observation, reward, terminated, truncated, _ = self.environment.step(action)
            if terminated or truncated:
                self.observation, _ = self.environment.reset()
                self.episodes += 1
            self.seconds_in_environment += perf_counter() - before
            self.observations.append(observation)
            self.actions.append(action)
            self.values.append(float(value[0]))
            self.log_probabilities.append(log_probability)
            self.rewards.append(float(reward))
        self.seconds += perf_counter() - start

    def sample(self, logits: Array) -> tuple[int, float]:
        """Draw one of two actions with the probabilities of a softmax; the same random number in both ways."""
        difference = float(logits[1]) - float(logits[0])
        probability = 1 / (1 + np.exp(-difference))  # of the second action
        action = int(self.random.random() < probability)
        return action, float(np.log(probability if action else 1 - probability))

    @property
    def rate(self) -> float:
        """Steps in a second."""
        return len(self.actions) / self.seconds

    @property
    def share(self) -> float:
        """The environment's, of the time."""
        return self.seconds_in_environment / self.seconds


def race(steps: int, seed: int) -> dict[str, Rollout]:
    """Play both ways in turn, from the same parameters and seeds."""
    torch.manual_seed(seed)
    actor, critic = mlp(4, 2), mlp(4, 1)
    rollouts = {
        name: Rollout(make(actor), make(critic), seed)
        for name, make in {"as it is": as_it_is, "frozen": frozen}.items()
    }
    for done in range(0, steps, TURN):
        for rollout in rollouts.values():
            rollout.play(min(TURN, steps - done))
    return rollouts


def assert_same_games(one: Rollout, other: Rollout) -> None:
    """Assert that both saw and did the same at every step, from the first to the last."""
    for step, (a, b) in enumerate(zip(one.actions, other.actions, strict=True)):
        if a != b:
            raise SystemExit(f"step {step}: action {a} as it is, {b} frozen")
    np.testing.assert_array_equal(one.observations, other.observations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20_000, metavar="N", help="of the environment, each way (20000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of parameters, environment and actions (0)")
    options = parser.parse_args()

    torch.set_num_threads(1)  # a network of this size gains nothing from more
    race(TURN, options.seed)  # warm-up
    rollouts = race(options.steps, options.seed)
    plain, fast = rollouts.values()
    assert_same_games(plain, fast)
    for name, rollout in rollouts.items():
        step, environment = 1e6 / rollout.rate, 1e6 * rollout.seconds_in_environment / len(rollout.actions)
        print(
            f"{name:8} {rollout.rate:7.0f} steps per second: {step:5.1f} us a step, "
            f"of which the environment takes {environment:.1f} us ({rollout.share:.0%})"
        )
    own = [rollout.seconds - rollout.seconds_in_environment for rollout in (plain, fast)]
    print(f"frozen: {fast.rate / plain.rate:.2f} times the steps; without the environment {own[0] / own[1]:.2f} times")
    print(f"the same {options.steps} actions and observations both ways, {plain.episodes} episodes")


if __name__ == "__main__":
    main()

"""Proximal policy optimization with captured steps: `python examples/ppo.py --rounds 30`.

A policy learns to balance a pole on a cart. The environment is tensors too, a row for each of 16 carts, so that two
functions are captured whole: a step of all carts with the policy's choice of what to do, and the update. Between them
stands Python as anywhere else; what runs once a round, such as the advantages, is not worth a recording.

It runs from the same seed with functions as they are, captured with `fuse=False`, which gives the same bits, and
captured as by default, with the optimizer's step by fastmlp's kernels. The three take turns, round by round. The first
two see the same poles fall, which is asserted at the end. The picture needs Matplotlib: pip install 'fastmlp[demo]'.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turns import draw, in_turns

import fastmlp

CARTS, STEPS, EPOCHS, BATCH = 16, 128, 4, 256
GAMMA, LAMBDA = 0.99, 0.95


def moved(state: Tensor, actions: Tensor) -> Tensor:
    """A fiftieth of a second of a pole of 1 m and 0.1 kg, hinged on a cart of 1 kg that is pushed by 10 N.

    Args:
        state: (carts, 4): place, speed, angle and its speed.
        actions: (carts), 0 to push to the left, 1 to the right.
    """
    _, speed, angle, turning = state.unbind(1)
    push = 20.0 * actions - 10.0
    sine, cosine = angle.sin(), angle.cos()
    drive = (push + 0.05 * turning.square() * sine) / 1.1
    angular = (9.8 * sine - cosine * drive) / (0.5 * (4 / 3 - 0.1 * cosine.square() / 1.1))
    linear = drive - 0.05 * angular * cosine / 1.1
    return state + 0.02 * torch.stack((speed, linear, turning, angular), dim=1)


def mlp(outputs: int) -> nn.Sequential:
    """Two hidden layers, as is usual for this task."""
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


def train(rounds: int, seed: int, capture: Callable[..., Any]) -> Iterator[int]:
    """Trains a policy, and yields after each round.

    Args:
        rounds: of a rollout and updates on it.
        seed: of everything that is random.
        capture: what to do with both functions.

    Yields:
        How many poles fell in the round.
    """
    torch.manual_seed(seed)
    policy, value = mlp(2), mlp(1)
    parameters = [*policy.parameters(), *value.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)

    @capture
    @torch.no_grad()
    def play(state: Tensor) -> tuple[Tensor, ...]:
        log_probs = F.log_softmax(policy(state), dim=1)
        actions = torch.multinomial(log_probs.exp(), 1)
        after = moved(state, actions.squeeze(1))
        # No `if`: where a pole has fallen, or a cart has left the track, another one begins.
        fallen = (after[:, 0].abs() > 2.4) | (after[:, 2].abs() > 0.2)
        after = torch.where(fallen[:, None], 0.1 * torch.rand_like(after) - 0.05, after)
        return after, actions, log_probs.gather(1, actions).squeeze(1), value(state).squeeze(1), fallen.float()

    @torch.no_grad()
    def advantages(values: Tensor, ends: Tensor, last: Tensor) -> Tensor:
        ahead, following, found = torch.zeros(CARTS), value(last).squeeze(1), []
        for i in reversed(range(STEPS)):
            goes_on = 1 - ends[i]
            difference = goes_on * (1 + GAMMA * following) - values[i]  # a step is worth 1, falling nothing
            ahead = difference + GAMMA * LAMBDA * goes_on * ahead
            following = values[i]
            found.append(ahead)
        return torch.stack(found[::-1])

    @capture
    def update(states: Tensor, actions: Tensor, old: Tensor, gains: Tensor, returns: Tensor) -> Tensor:
        log_probs = F.log_softmax(policy(states), dim=1)
        ratio = (log_probs.gather(1, actions).squeeze(1) - old).exp()
        gains = (gains - gains.mean()) / (gains.std() + 1e-8)
        gain = torch.min(ratio * gains, ratio.clamp(0.8, 1.2) * gains).mean()
        entropy = -(log_probs.exp() * log_probs).sum(1).mean()
        loss = F.smooth_l1_loss(value(states).squeeze(1), returns) / 2 - gain - 0.01 * entropy
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        return loss.detach()

    state = torch.zeros(CARTS, 4)
    for _ in range(rounds):
        seen = []
        for _ in range(STEPS):
            before = state
            state, *found = play(before)
            seen.append((before, *found))
        states, actions, old, values, ends = map(torch.stack, zip(*seen, strict=True))
        gains = advantages(values, ends, state)
        rollout = [part.flatten(0, 1) for part in (states, actions, old, gains, gains + values)]
        fastmlp.epochs(update, *rollout, epochs=EPOCHS, batch_size=BATCH, shuffle=True)
        yield int(ends.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="of a rollout and updates on it (30)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything that is random (0)")
    parser.add_argument("--output", type=Path, default=Path("out"), metavar="DIR", help="folder for ppo.png (out)")
    options = parser.parse_args()

    torch.set_num_threads(1)  # networks of this size gain nothing from more
    ways: dict[str, Callable[..., Any]] = {
        "as it is": lambda function: function,
        "captured with fuse=False": fastmlp.capture(fuse=False),
        "captured": fastmlp.capture,
    }
    runs = in_turns({name: partial(train, options.rounds, options.seed, way) for name, way in ways.items()})
    falls, same = (runs[name].found for name in ("as it is", "captured with fuse=False"))
    if same != falls:
        raise SystemExit("other poles fell in the captured training")
    print(f"{falls[0]} poles fell in the first {CARTS * STEPS} steps, {falls[-1]} in the last, captured or not")
    print(", ".join(f"{run.seconds:.1f} s {name}" for name, run in runs.items()))
    curves = {name: (run.clock, run.found) for name, run in runs.items()}
    draw(options.output / "ppo.png", "poles on carts", f"poles that fell in {CARTS * STEPS} steps", curves)


if __name__ == "__main__":
    main()

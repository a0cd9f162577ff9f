"""A physics-informed network, captured: `python examples/physics_informed.py --steps 2000`.

A network u(x, t) learns the heat equation, u_t = 0.1 u_xx for x from -1 to 1, from the equation itself, its start
u(x, 0) = sin(pi x) and its ends u(-1, t) = u(1, t) = 0. The loss contains second derivatives of the network, so that
a step differentiates three times. For this start the solution is known, and says how far the network is off.

It runs from the same seed by the step as it is, captured with `fuse=False`, which gives the same bits, and captured as
by default, with the optimizer's step by fastmlp's kernels. The three take turns. The first two lose the same, which is
asserted at the end. The picture needs Matplotlib: pip install 'fastmlp[demo]'.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from math import pi
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from turns import draw, in_turns

import fastmlp

POINTS = 128
#: Steps of one way before it is another's turn.
TURN = 50
CONDUCTIVITY = 0.1


def solution(x: Tensor, t: Tensor) -> Tensor:
    """What the network should find."""
    return torch.exp(-CONDUCTIVITY * pi**2 * t) * torch.sin(pi * x)


def train(steps: int, seed: int, capture: Callable[..., Any]) -> Iterator[tuple[Tensor, nn.Module]]:
    """Trains a network, and yields after each turn.

    Args:
        steps: of training.
        seed: of parameters and points.
        capture: what to do with the step.

    Yields:
        The losses of the turn, and the network.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))

    @capture
    def step() -> Tensor:
        # Points are drawn anew at each call, by the replays too.
        x, t = 2 * torch.rand(POINTS, 1) - 1, torch.rand(POINTS, 1)
        inside = torch.cat((x, t), dim=1).requires_grad_()
        u = model(inside)
        (slopes,) = torch.autograd.grad(u.sum(), inside, create_graph=True)
        u_x, u_t = slopes.split(1, dim=1)
        u_xx = torch.autograd.grad(u_x.sum(), inside, create_graph=True)[0][:, :1]
        start = torch.cat((x, torch.zeros_like(t)), dim=1)
        ends = torch.cat((x.sign(), t), dim=1)
        loss = (
            (u_t - CONDUCTIVITY * u_xx).square().mean()
            + (model(start) - torch.sin(pi * x)).square().mean()
            + model(ends).square().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    for begin in range(0, steps, TURN):
        losses = []
        for _ in range(min(TURN, steps - begin)):
            losses.append(step())
            scheduler.step()  # it counts in Python, and so stands outside of the step
        yield torch.stack(losses), model


def error_of(model: nn.Module) -> float:
    """The largest error on a grid."""
    with torch.no_grad():
        x, t = torch.meshgrid(torch.linspace(-1, 1, 41), torch.linspace(0, 1, 21), indexing="ij")
        found = model(torch.stack((x, t), dim=-1)).squeeze(-1)
        return (found - solution(x, t)).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help="of training, each way (2000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of parameters and points (0)")
    parser.add_argument("--output", type=Path, default=Path("out"), metavar="DIR", help="of physics_informed.png (out)")
    options = parser.parse_args()

    torch.set_num_threads(1)  # a network of this size gains nothing from more
    ways: dict[str, Callable[..., Any]] = {
        "as it is": lambda function: function,
        "captured with fuse=False": fastmlp.capture(fuse=False),
        "captured": fastmlp.capture,
    }
    runs = in_turns({name: partial(train, options.steps, options.seed, way) for name, way in ways.items()})
    losses, same, _ = (torch.cat([part for part, _ in run.found]) for run in runs.values())
    if not torch.equal(same, losses):
        raise SystemExit("the captured step lost otherwise")
    error = error_of(runs["as it is"].found[-1][1])
    print(f"loss {losses[0]:.3g} at first, {losses[-1]:.3g} after {options.steps} steps, captured or not")
    print(f"off by {error:.3f} at most, where the solution goes from -1 to 1")
    print(", ".join(f"{run.seconds:.1f} s {name}" for name, run in runs.items()))
    curves = {name: (run.clock, [part.mean().log10().item() for part, _ in run.found]) for name, run in runs.items()}
    draw(options.output / "physics_informed.png", "the heat equation", "logarithm of the loss, base 10", curves)


if __name__ == "__main__":
    main()

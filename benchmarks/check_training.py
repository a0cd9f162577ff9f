"""Whether a contender does a program's steps, asked of its first losses before it is timed.

The losses of all calls depend on all that the calls before them changed, so they stand for gradients, clipping and
optimizers as well. They are compared with eager's:

- Where random numbers are the same, each loss may differ by as much as eager's own does when parameters are moved
  at random, by what a sum of products may be off (benchmarks/check.py).
- Where a contender draws random numbers of its own, the mean of the losses may differ by as much as that of eager
  does between its own draws.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.check import MOVES, SPREAD, growth
from benchmarks.contenders.training import SEED, EagerTrainer, Trainer
from benchmarks.programs import BATCHES
from benchmarks.workloads import Tier, Training

#: So that every batch has come three times, and what is recorded in the first calls is replayed.
CALLS = 3 * BATCHES

#: Terms of the longest sums of the programs' products.
TERMS = 256

#: How often eager draws other random numbers.
DRAWS = 6


class Reference(NamedTuple):
    """Losses of eager's first calls, how far each may be off, and their mean with other random numbers."""

    losses: Tensor
    errors: Tensor
    mean: float
    spread: float


def verify_training(trainer: Trainer) -> None:
    """Run a contender's first steps and look at its losses.

    Args:
        trainer: not run yet.

    Raises:
        Refused: if it cannot run the program.
        AssertionError: if a loss is farther from eager's than rounding or, with random numbers of its own, chance
            explains, or if losses do not fall.
    """
    what = f"{trainer.training.name} of {trainer.name}"
    found = torch.stack(list(trainer.losses(CALLS))).double()
    check_losses(found, trainer.training.name, what, trainer.draws or not trainer.program.random)


def check_losses(found: Tensor, name: str, what: str, exact: bool) -> None:
    """Compare the losses of the first calls with eager's.

    Args:
        found: the losses, (CALLS,).
        name: of the program.
        what: to name it in the error.
        exact: whether random numbers are those that eager draws.

    Raises:
        AssertionError: as `verify_training`.
    """
    expected = reference(name)
    first, last = found[:BATCHES].mean(), found[-BATCHES:].mean()
    assert last < first, f"{what}: the losses do not fall, from {first:.6g} to {last:.6g}"  # nor with NaN
    if exact:
        wrong = (~((found - expected.losses).abs() <= expected.errors)).nonzero()
        assert not len(wrong), (
            f"{what}: the loss of call {int(wrong[0])} is {found[wrong[0]].item():.9g}, eager's is "
            f"{expected.losses[wrong[0]].item():.9g}, farther off than rounding explains"
        )
    else:
        mean = float(found.mean())
        assert abs(mean - expected.mean) <= SPREAD * expected.spread, (
            f"{what}: the losses' mean is {mean:.6g}, eager's is {expected.mean:.6g} +- {expected.spread:.2g}"
        )


@lru_cache(maxsize=1)
def reference(name: str) -> Reference:
    """Return what eager's losses are for a program."""
    noise, generator = growth(TERMS, torch.float32), torch.Generator().manual_seed(1)

    def losses(moved: bool = False, seed: int = SEED) -> Tensor:
        trainer = EagerTrainer(Training(name, Tier.QUICK))
        for parameter in trainer.program.parameters().values() if moved else ():
            parameter.data *= 1 + noise * torch.randn(parameter.shape, generator=generator)
        return torch.stack(list(trainer.losses(CALLS, seed))).double()

    exact = losses()
    differences = torch.stack([(losses(moved=True) - exact).abs() for _ in range(MOVES)]).amax(0)
    errors = torch.maximum(differences.cummax(0).values, noise * exact.abs())
    random = EagerTrainer(Training(name, Tier.QUICK)).program.random
    means = torch.stack([losses(seed=SEED + 1 + i).mean() for i in range(DRAWS if random else 0)] or [exact.mean()] * 2)
    return Reference(exact, errors, float(means.mean()), float(means.std()))

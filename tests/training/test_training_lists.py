"""What the tests draw from is all that the extension reports."""

import random

import torch

from fastmlp import optim
from fastmlp._load import _C
from tests.attack.sides import TORCHS
from tests.support.endings import LOSSES_AFTER
from tests.support.optimizers import ARGUMENTS
from tests.support.training import LOSSES, OPTIMIZERS, draw_loss


def test_losses() -> None:
    drawn = {type(draw_loss(random.Random(0), name, 0, 3, torch.float64)).__name__ for name in LOSSES}
    after = {name: follows for name, *_, follows in _C.losses() if follows is not None}
    assert after == {kind.__name__: follows for kind, follows in LOSSES_AFTER.items()}
    assert {name for name, *_ in _C.losses()} == drawn | set(after)


def test_optimizers() -> None:
    reported = {name for classes, _ in _C.rules() for name in classes}
    assert reported == set(optim.__all__) == set(OPTIMIZERS) == set(ARGUMENTS) == {kind.__name__ for kind in TORCHS}

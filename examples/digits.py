"""Handwritten digits, in four ways from the same seed: `python examples/digits.py --epochs 15`.

A network of one hidden layer learns to read the 1797 images of 8 x 8 pixels that scikit-learn comes with, of which 360
are held out. The plain loop of PyTorch, the same loop over `fastmlp.batches` with a converted model and
`fastmlp.optim`, a `fastmlp.TrainStep`, and a step recorded by `fastmlp.capture` see the same batches in the same order.
They take turns, epoch by epoch. At the end all must read the held-out digits about as well, and the network of the
`TrainStep`, frozen for serving, exactly as well as before. It needs scikit-learn and Matplotlib:
pip install 'fastmlp[demo]'.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from turns import draw, in_turns

import fastmlp

BATCH, HELD_OUT = 32, 360
#: Held-out digits by which the ways may differ, because rounding decides some that are hard to read.
MAY_DIFFER = 8


def data() -> tuple[Tensor, Tensor]:
    """Pixels from 0 to 1, (1797, 64), and classes."""
    pixels, classes = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float() / 16, torch.from_numpy(classes)


def network() -> nn.Sequential:
    """PyTorch's own modules."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


#: What trains a model for an epoch at each call.
Epoch = Callable[[], Any]


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Epoch:
    """The loop as anybody writes it."""
    loss_fn, optimizer = nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters())
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True)
    return lambda: [taken(model, loss_fn, optimizer, *batch) for batch in loader]


def optimized(model: nn.Module, x: Tensor, y: Tensor) -> Epoch:
    """The same loop with three names exchanged."""
    model = fastmlp.convert(model)
    loss_fn, optimizer = nn.CrossEntropyLoss(), fastmlp.optim.Adam(model.parameters())
    loader = fastmlp.batches(x, y, batch_size=BATCH, shuffle=True)
    return lambda: [taken(model, loss_fn, optimizer, *batch) for batch in loader]


def one_call(model: nn.Module, x: Tensor, y: Tensor) -> Epoch:
    """A `TrainStep`, whose epochs run in C++."""
    step = fastmlp.TrainStep(model, nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters()))
    return lambda: fastmlp.epochs(step, x, y, batch_size=BATCH, shuffle=True)


def captured(model: nn.Module, x: Tensor, y: Tensor) -> Epoch:
    """The step of the plain loop, recorded."""
    loss_fn, optimizer = nn.CrossEntropyLoss(), torch.optim.Adam(model.parameters())
    step = fastmlp.capture(lambda input, target: taken(model, loss_fn, optimizer, input, target))
    return lambda: fastmlp.epochs(step, x, y, batch_size=BATCH, shuffle=True)


def taken(model: nn.Module, loss_fn: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """A step of training."""
    optimizer.zero_grad()
    loss: Tensor = loss_fn(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


WAYS = {"plain loop": plain, "fastmlp.optim": optimized, "TrainStep": one_call, "capture": captured}


def right(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> int:
    """How many digits are read right."""
    with torch.no_grad():
        return int((model(x).argmax(1) == y).sum())


def trained(
    way: Callable[[nn.Module, Tensor, Tensor], Epoch], epochs: int, seed: int, models: dict[str, nn.Module]
) -> Iterator[int]:
    """Trains a network; after each epoch how many held-out digits it reads."""
    torch.manual_seed(seed)
    x, y = data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[HELD_OUT:], order[:HELD_OUT]
    model = models[way.__name__] = network()
    epoch = way(model, x[train], y[train])
    for _ in range(epochs):
        epoch()
        yield right(model, x[test], y[test])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=15, metavar="N", help="of training, each way (15)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of parameters and batches (0)")
    parser.add_argument("--output", type=Path, default=Path("out"), metavar="DIR", help="folder for digits.png (out)")
    options = parser.parse_args()

    torch.set_num_threads(1)  # a network of this size gains nothing from more
    models: dict[str, nn.Module] = {}
    runs = in_turns({name: partial(trained, way, options.epochs, options.seed, models) for name, way in WAYS.items()})
    first = runs["plain loop"]
    for name, run in runs.items():
        share, times = run.found[-1] / HELD_OUT, first.seconds / run.seconds
        print(f"{name:14}{share:6.1%} of held-out digits, {run.seconds:6.2f} s, {times:5.2f} times as fast as the loop")
        if abs(run.found[-1] - first.found[-1]) > MAY_DIFFER:
            raise SystemExit(f"{name} reads {run.found[-1]} digits, the plain loop {first.found[-1]}")
    x, y = data()
    model = models["one_call"]
    frozen = fastmlp.freeze(model)
    if right(frozen, x, y) != right(model, x, y):
        raise SystemExit("the frozen network reads other digits")
    print(f"frozen, the network of the TrainStep reads the same {right(frozen, x, y)} of all {len(x)}")
    curves = {name: (run.clock, [100 * found / HELD_OUT for found in run.found]) for name, run in runs.items()}
    draw(options.output / "digits.png", "handwritten digits", "% of held-out digits", curves)


if __name__ == "__main__":
    main()

"""A neural field learns an image: `python examples/neural_field.py --steps 400`.

A network from two coordinates to three colors, with sines for activations as SIREN has them (Sitzmann et al., Implicit
Neural Representations with Periodic Activation Functions, 2020), is fitted to a photograph of scikit-learn's, made
smaller. The plain loop of PyTorch, a `fastmlp.TrainStep` and a step recorded by `fastmlp.capture` see the same pixels
in the same order, and take turns. The image is then asked of the network frozen, between the pixels too, and must be
about as near to the photograph as that of the plain loop. It needs scikit-learn and Matplotlib:
pip install 'fastmlp[demo]'.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from math import log10, sqrt
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from turns import Run, in_turns

import fastmlp

WIDTH, FREQUENCY, BATCH, TURN = 64, 30.0, 1024, 20
#: Decibels by which a way may be worse than the plain loop: both round, and steps amplify that.
MAY_DIFFER = 1.0


class Sine(nn.Module):
    """What the plain loop calls: PyTorch has no such module."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(FREQUENCY * x)


def network(sine: Callable[[], nn.Module]) -> nn.Sequential:
    """Layers with SIREN's first parameters."""
    sizes = (2, WIDTH, WIDTH, WIDTH, 3)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layer = nn.Linear(inputs, outputs)
        bound = 1 / inputs if inputs == 2 else sqrt(6 / inputs) / FREQUENCY
        nn.init.uniform_(layer.weight, -bound, bound)
        layers += [layer, sine()]
    return nn.Sequential(*layers[:-1])


def photograph(size: int) -> Tensor:
    """Colors from -1 to 1, (size, size, 3)."""
    pixels = torch.from_numpy(load_sample_image("flower.jpg").copy()).float().permute(2, 0, 1)
    pixels = nn.functional.interpolate(pixels[None, :, :426, 120:546], (size, size), mode="area")
    return pixels[0].permute(1, 2, 0) / 127.5 - 1


def grid(size: int) -> Tensor:
    """Coordinates from -1 to 1, (size * size, 2)."""
    line = torch.linspace(-1, 1, size)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1).flatten(0, 1)


def trained(way: str, steps: int, seed: int, image: Tensor, models: dict[str, nn.Module]) -> Iterator[float]:
    """Trains a network; after each turn its loss."""
    torch.manual_seed(seed)
    points, colors = grid(len(image)), image.flatten(0, 1)
    model = models[way] = network(Sine if way == "plain loop" else lambda: fastmlp.Sin(FREQUENCY))
    loss_fn, optimizer = nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=1e-3)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    taken: Callable[[Tensor, Tensor], Tensor] = step
    if way == "TrainStep":
        taken = fastmlp.TrainStep(model, loss_fn, optimizer)
    elif way == "capture":
        taken = fastmlp.capture(step)
    for begin in range(0, steps, TURN):
        losses = []
        for _ in range(min(TURN, steps - begin)):
            some = torch.randint(len(points), (BATCH,))
            losses.append(taken(points[some], colors[some]))
        yield torch.stack(losses).mean().item()


def decibels(found: Tensor, image: Tensor) -> float:
    """How near an image is: the peak signal-to-noise ratio."""
    return 10 * log10(4 / (found - image).square().mean().item())


def draw(path: Path, image: Tensor, seen: Tensor, finer: Tensor, runs: dict[str, Run[float]]) -> None:
    """Draws the photograph, what the network makes of it, and losses by seconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(12.5, 4), layout="constrained")
    FigureCanvasAgg(figure)  # no window
    *panels, curves = figure.subplots(1, 4)
    titles = (
        f"photograph, {len(image)} x {len(image)}",
        "the field, frozen",
        f"between the pixels, {len(finer)} x {len(finer)}",
    )
    for axes, title, one in zip(panels, titles, (image, seen, finer), strict=True):
        axes.imshow((one.clamp(-1, 1) / 2 + 0.5).numpy())
        axes.set(title=title, xticks=[], yticks=[])
    for name, run in runs.items():
        curves.plot(run.clock, run.found, label=name)
    curves.set(yscale="log", xlabel="seconds of training, one thread", ylabel="loss")
    curves.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="of training, each way (1000)")
    parser.add_argument("--size", type=int, default=96, metavar="N", help="of the image, in pixels (96)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of parameters and batches (0)")
    parser.add_argument("--output", type=Path, default=Path("out"), metavar="DIR", help="of neural_field.png (out)")
    options = parser.parse_args()

    torch.set_num_threads(1)  # a network of this size gains nothing from more
    image, models = photograph(options.size), dict[str, nn.Module]()
    ways = ("plain loop", "TrainStep", "capture")
    runs = in_turns({way: partial(trained, way, options.steps, options.seed, image, models) for way in ways})
    found = {}
    for way, run in runs.items():
        with torch.no_grad():
            found[way] = decibels(models[way](grid(options.size)).view(image.shape), image)
        times = runs["plain loop"].seconds / run.seconds
        print(
            f"{way:12}loss {run.found[0]:.4f} at first, {run.found[-1]:.4f} at the end; {found[way]:.1f} dB, "
            f"{run.seconds:.2f} s, {times:.2f} times as fast as the loop"
        )
        if found[way] < found["plain loop"] - MAY_DIFFER:
            raise SystemExit(f"the image of {way} is worse")
    frozen = fastmlp.freeze(models["TrainStep"])
    seen, finer = (frozen(grid(size)).view(size, size, 3) for size in (options.size, 4 * options.size))
    print(f"frozen: {decibels(seen, image):.1f} dB")
    draw(options.output / "neural_field.png", image, seen, finer, runs)


if __name__ == "__main__":
    main()

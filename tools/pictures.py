"""The pictures of the documentation, made when it is built: each shows what the code of its page computes.

MkDocs calls `on_files`, because mkdocs.yml names this file as a hook. `python -m tools.pictures OUT` writes them there.
"""

import sys
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastmlp

#: Where the pages look for them, and who draws each.
PICTURES: dict[str, Callable[[], Figure]] = {}

Draw = Callable[[], Figure]


def picture(path: str) -> Callable[[Draw], Draw]:
    """Register what draws a picture.

    Args:
        path: below docs.
    """

    def register(draw: Draw) -> Draw:
        PICTURES[path] = draw
        return draw

    return register


def drawn(path: str) -> bytes:
    """Return a picture in SVG, drawn from the same seed each time."""
    settings: Any = {"svg.hashsalt": "fastmlp", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with torch.random.fork_rng(devices=[]), plt.rc_context(settings):
        torch.manual_seed(0)
        figure = PICTURES[path]()
        written = BytesIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
        plt.close(figure)
    return written.getvalue()


def on_files(files: Any, config: Any) -> Any:
    """MkDocs' hook: adds the pictures to the files of the site."""
    from mkdocs.structure.files import File

    for path in PICTURES:
        files.append(File.generated(config, path, content=drawn(path)))
    return files


@picture("tutorial/pictures/layer.svg")
def layer() -> Figure:
    """Three inputs, two neurons, and a line for each weight of a real layer."""
    torch.manual_seed(5)  # none of these weights is near zero, where its line could not be seen
    weights = fastmlp.Linear(3, 2).weight.detach()
    figure, axes = plt.subplots(figsize=(6, 2.8), layout="constrained")
    inputs, neurons = [(0.0, 1.0 - i) for i in range(3)], [(2.0, 0.5 - i) for i in range(2)]
    for neuron, (x, y) in enumerate(neurons):
        for source, (left, bottom) in enumerate(inputs):
            weight = weights[neuron, source].item()
            color = "tab:green" if weight > 0 else "tab:red"
            axes.plot((left, x), (bottom, y), color=color, lw=6 * abs(weight), zorder=1)
            part = (0.2, 0.72)[neuron]  # where no other line is near
            place = left + part * (x - left), bottom + part * (y - bottom)
            axes.annotate(f"{weight:.2f}", place, fontsize=8, ha="center", va="bottom")
    for name, places in (("x", inputs), ("neuron ", neurons)):
        for i, place in enumerate(places, 1):
            axes.scatter(*place, 1500, "white", edgecolors="black", zorder=2)
            axes.annotate(f"{name}{i}", place, ha="center", va="center", fontsize=8, zorder=3)
    axes.set(xlim=(-0.4, 2.6), ylim=(-1.5, 1.5), title="the wider a line, the larger its weight; red is negative")
    axes.title.set_fontsize(9)
    axes.axis("off")
    return figure


@picture("tutorial/pictures/activations.svg")
def activations() -> Figure:
    """Values and slopes of four activations."""
    z = torch.linspace(-4, 4, 401, requires_grad=True)
    figure, panels = plt.subplots(1, 4, figsize=(9, 2.4), layout="constrained", sharey=True)
    for axes, name in zip(panels, ("relu", "tanh", "sigmoid", "gelu"), strict=True):
        value = fastmlp.reference.FUNCTIONS[name](z)
        (slope,) = torch.autograd.grad(value.sum(), z)
        axes.plot(z.detach(), value.detach(), color="tab:green", label="value")
        axes.plot(z.detach(), slope, color="tab:gray", ls="--", label="slope")
        axes.set(title=name, xlabel="z", ylim=(-1.3, 2.5))
        axes.grid(lw=0.3)
    panels[0].legend(fontsize=8)
    return figure


@picture("tutorial/pictures/forward.svg")
def forward() -> Figure:
    """What the hidden neurons of a small trained network add up to."""
    x = torch.linspace(-3, 3, 200).unsqueeze(1)
    curve = x.sin()
    model = fastmlp.MLP(1, [6], 1)
    step = fastmlp.TrainStep(model, nn.MSELoss(), fastmlp.optim.Adam(model.parameters(), lr=1e-2))
    fastmlp.epochs(step, x, curve, epochs=400, batch_size=50, shuffle=True)
    with torch.no_grad():
        bent, output = model[1](model[0](x)) * model[2].weight, model(x)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    left.plot(x, bent, lw=1)
    left.set(title="six hidden neurons, each times its weight", xlabel="input")
    right.plot(x, curve, color="tab:gray", ls="--", label="what it was trained on")
    right.plot(x, output, color="tab:green", label="their sum, with the bias")
    right.set(title="the output", xlabel="input")
    right.legend(fontsize=8)
    return figure


@picture("tutorial/pictures/losses.svg")
def losses() -> Figure:
    """Losses by error, and the cross-entropy by the probability of the right class."""
    errors, zero = torch.linspace(-3, 3, 301), torch.zeros(1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    for kind in (nn.MSELoss, nn.L1Loss, nn.HuberLoss):
        left.plot(errors, [kind()(error.reshape(1), zero) for error in errors], label=kind.__name__)
    left.set(xlabel="output - target", ylabel="loss", ylim=(0, 5))
    left.legend(fontsize=8)
    probability = torch.linspace(0.005, 1, 200)
    right.plot(probability, -probability.log(), color="tab:red")
    right.set(xlabel="probability of the right class", ylabel="cross-entropy", ylim=(0, 5))
    for axes in (left, right):
        axes.grid(lw=0.3)
    return figure


def path_down(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Tensor:
    """Return the places to which an optimizer goes in a valley that is ten times as steep across as along."""
    place = torch.tensor([-4.0, 1.5], requires_grad=True)
    optimizer, places = make([place]), [place.detach().clone()]
    for _ in range(60):
        optimizer.zero_grad()
        (0.5 * place[0] ** 2 / 10 + 0.5 * place[1] ** 2).backward()
        optimizer.step()
        places.append(place.detach().clone())
    return torch.stack(places)


@picture("tutorial/pictures/optimizers.svg")
def optimizers() -> Figure:
    """Sixty steps of three optimizers in the same valley."""
    ways: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
        "SGD(lr=0.4)": lambda place: fastmlp.optim.SGD(place, lr=0.4),
        "SGD(lr=0.2, momentum=0.9)": lambda place: fastmlp.optim.SGD(place, lr=0.2, momentum=0.9),
        "Adam(lr=0.2)": lambda place: fastmlp.optim.Adam(place, lr=0.2),
    }
    x, y = torch.meshgrid(torch.linspace(-5, 3, 161), torch.linspace(-2, 2, 81), indexing="xy")
    figure, panels = plt.subplots(1, 3, figsize=(9, 2.4), layout="constrained", sharey=True)
    for axes, (name, make) in zip(panels, ways.items(), strict=True):
        places = path_down(make)
        axes.contour(x, y, x.square() / 20 + y.square() / 2, 12, cmap="Greys", linewidths=0.6)
        axes.plot(*places.T, "o-", ms=2.5, lw=0.8, color="tab:green")
        axes.plot(0, 0, "k+")
        axes.set_title(name, fontsize=9)
    return figure


def curve_in_ten_dimensions() -> tuple[Tensor, Tensor]:
    """Return the features and targets of the tutorial."""
    features = torch.randn(1000, 10)
    return features, torch.sin(2 * features[:, :1]) + features[:, 1:2] * features[:, 2:3]


@picture("tutorial/pictures/loop.svg")
def loop() -> Figure:
    """The loss of each step of the tutorial's training, and its mean over an epoch."""
    features, targets = curve_in_ten_dimensions()
    model = fastmlp.MLP(10, [50], 1)
    step = fastmlp.TrainStep(model, nn.MSELoss(), fastmlp.optim.Adam(model.parameters(), lr=5e-3))
    found = fastmlp.epochs(step, features[:800], targets[:800], epochs=20, batch_size=32, shuffle=True)
    figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
    axes.plot(found.flatten(), color="tab:gray", lw=0.7, label="each step")
    axes.plot([25 * i + 12 for i in range(20)], found.mean(dim=1), color="tab:green", label="mean of each epoch")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend(fontsize=8)
    return figure


@picture("tutorial/pictures/epochs.svg")
def epochs() -> Figure:
    """A large network on few samples with noise: it learns them by heart."""
    features, targets = curve_in_ten_dimensions()
    few, wanted = features[:100], targets[:100] + 0.3 * torch.randn(100, 1)
    model = fastmlp.MLP(10, [64, 64], 1)
    step = fastmlp.TrainStep(model, nn.MSELoss(), fastmlp.optim.Adam(model.parameters(), lr=3e-3))
    training, held_out = [], []
    for _ in range(100):
        training.append(fastmlp.epochs(step, few, wanted, batch_size=25, shuffle=True).mean().item())
        with torch.no_grad():
            held_out.append(nn.functional.mse_loss(model(features[800:]), targets[800:]).item())
    best = min(range(100), key=held_out.__getitem__)
    figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
    axes.plot(training, color="tab:gray", label="training loss")
    axes.plot(held_out, color="tab:red", label="held-out loss")
    axes.axvline(best, color="black", lw=0.7, ls=":")
    axes.annotate(" best here", (best, max(held_out)), fontsize=8, va="top")
    count = sum(parameter.numel() for parameter in model.parameters())
    axes.set(xlabel="epoch", ylabel="loss", ylim=(0, None), title=f"100 samples with noise, {count} parameters")
    axes.title.set_fontsize(9)
    axes.legend(fontsize=8)
    return figure


@picture("guides/pictures/heat.svg")
def heat() -> Figure:
    """The heat equation, learnt from the equation as the guide to physics-informed networks does."""
    from math import pi

    model = fastmlp.MLP(2, [32, 32], 1, "tanh")
    optimizer = fastmlp.optim.Adam(model.parameters(), lr=5e-3)

    def step() -> Tensor:
        optimizer.zero_grad()
        x, t = 2 * torch.rand(128, 1) - 1, torch.rand(128, 1)
        _, first, second, _ = fastmlp.derivatives(model, torch.cat((x, t), dim=1), first=[1], second=[0])
        start = model(torch.cat((x, torch.zeros_like(t)), dim=1))
        ends = model(torch.cat((x.sign(), t), dim=1))
        loss = (first[..., 0] - 0.1 * second[..., 0]).square().mean()
        loss = loss + (start - torch.sin(pi * x)).square().mean() + ends.square().mean()
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(500):
        step()
    x = torch.linspace(-1, 1, 101)
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    for i, t in enumerate((0.0, 0.3, 0.6, 1.0)):
        with torch.no_grad():
            found = model(torch.stack((x, torch.full_like(x, t)), dim=1)).squeeze(1)
        exact = torch.exp(torch.tensor(-0.1 * pi**2 * t)) * torch.sin(pi * x)
        axes.plot(x, found, color=f"C{i}", label=f"t = {t}")
        axes.plot(x, exact, color="black", ls=":", lw=1)
    axes.set(xlabel="x", ylabel="u", title="the network (colours) and the exact solution (dots)")
    axes.title.set_fontsize(9)
    axes.legend(fontsize=8)
    return figure


def target_image(size: int) -> Tensor:
    """Return rings that become finer outwards, as the guide to neural fields draws them."""
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.sin(25 * (x.square() + y.square())).unsqueeze(-1) * (1 - x.abs().unsqueeze(-1) / 2)


@picture("guides/pictures/field.svg")
def field() -> Figure:
    """An image and what two networks remember of it, with ReLUs and with sines."""
    image = target_image(64)
    axis = torch.linspace(-1, 1, 64)
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).flatten(0, 1)
    shown = {"the image": image}
    ways: dict[str, list[nn.Module]] = {
        "64-64-64 with ReLU": [nn.ReLU()] * 3,
        "64-64-64 with sines": [fastmlp.Sin(20.0), fastmlp.Sin(2.0), fastmlp.Sin(2.0)],
    }
    for name, (first, second, third) in ways.items():
        layers = [nn.Linear(2, 64), first, nn.Linear(64, 64), second, nn.Linear(64, 64), third, nn.Linear(64, 1)]
        model = fastmlp.Sequential(*layers)
        step = fastmlp.TrainStep(model, nn.MSELoss(), fastmlp.optim.Adam(model.parameters(), lr=1e-3))
        fastmlp.epochs(step, places, image.flatten(0, 1), epochs=40, batch_size=256, shuffle=True)
        shown[name] = fastmlp.freeze(model)(places).view(64, 64, 1)
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.1), layout="constrained")
    for axes, (name, pixels) in zip(panels, shown.items(), strict=True):
        axes.imshow(pixels.squeeze(-1).numpy(), cmap="viridis", vmin=-1, vmax=1)
        axes.set_title(name, fontsize=9)
        axes.axis("off")
    return figure


def main(folder: Path, paths: Iterable[str]) -> None:
    """Write pictures to a folder, in folders of their own."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(drawn(path))
        print(folder / path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), PICTURES)

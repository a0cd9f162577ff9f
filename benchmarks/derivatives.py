"""Derivatives along the input, as physics-informed networks need them: `python -m benchmarks.derivatives`.

A step without an optimizer, on one thread: value and derivatives, the loss of the equation, and backward to the
parameters. `fastmlp.derivatives` against nested calls of `torch.autograd.grad`, interleaved, as ratios of each round.
The losses and the gradients are compared before anything is timed.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median, quantiles

import torch
from rich.table import Table
from torch import Tensor, nn

import fastmlp
from benchmarks.programs.fields import VISCOSITY
from benchmarks.tables import console
from fastmlp.benchmark.timing import Effort, race, ratio

POINTS = (128, 512, 1024, 4096)
ACTIVATIONS = ("tanh", "sin", "softplus", "gelu", "sigmoid", "silu")

#: A residual of an equation at each point.
Residual = Callable[[nn.Module, Tensor], Tensor]


def nested_burgers(model: nn.Module, points: Tensor) -> Tensor:
    """u_t + u u_x - nu u_xx, by autograd; points are (t, x)."""
    points = points.detach().requires_grad_()
    u = model(points)
    (gradient,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    u_t, u_x = gradient.split(1, dim=1)
    u_xx = torch.autograd.grad(u_x.sum(), points, create_graph=True)[0][:, 1:]
    return u_t + u * u_x - VISCOSITY * u_xx


def forward_burgers(model: nn.Module, points: Tensor) -> Tensor:
    """The same by `fastmlp.derivatives`."""
    u, first, second, _ = fastmlp.derivatives(model, points, second=[1])
    u_t, u_x = first.unbind(-1)
    return u_t + u * u_x - VISCOSITY * second.squeeze(-1)


def nested_poisson(model: nn.Module, points: Tensor) -> Tensor:
    """The Laplacian of u in all dimensions, minus u, by autograd."""
    points = points.detach().requires_grad_()
    u = model(points)
    (gradient,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    slopes = gradient.unbind(1)
    bends = [torch.autograd.grad(s.sum(), points, create_graph=True)[0][:, i] for i, s in enumerate(slopes)]
    return sum(bends, -u[:, 0])


def forward_poisson(model: nn.Module, points: Tensor) -> Tensor:
    """The same by `fastmlp.derivatives`."""
    axes = range(points.shape[1])
    found = fastmlp.derivatives(model, points, first=(), laplacian=axes)
    assert found.laplacian is not None
    return (found.laplacian - found.value)[:, 0]


#: The residual by autograd and by fastmlp, and the features of a point.
EQUATIONS: dict[str, tuple[Residual, Residual, int]] = {
    "Burgers": (nested_burgers, forward_burgers, 2),
    "Poisson": (nested_poisson, forward_poisson, 2),
    "Poisson 3d": (nested_poisson, forward_poisson, 3),
}


def step(residual: Residual, model: nn.Module, points: Tensor) -> Tensor:
    """The loss, with gradients left in `.grad`."""
    for parameter in model.parameters():
        parameter.grad = None
    loss = residual(model, points).square().mean()
    loss.backward()
    return loss.detach()


def compare(equation: str, activation: str, width: int, layers: int, points: int, dtype: torch.dtype) -> list[str]:
    """A line of the table."""
    torch.manual_seed(0)
    nested, forward, features = EQUATIONS[equation]
    ours = fastmlp.MLP(features, [width] * layers, 1, activation, dtype=dtype)
    theirs = fastmlp.revert(fastmlp.MLP(features, [width] * layers, 1, activation, dtype=dtype))
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(points, features, dtype=dtype)
    calls = {"eager": partial(step, nested, theirs, x), "fastmlp": partial(step, forward, ours, x)}
    eager, own = calls["eager"](), calls["fastmlp"]()
    torch.testing.assert_close(own, eager, rtol=1e-4, atol=1e-6)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        scale = other.grad.abs().max().item()
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4 * scale)
    samples = race(calls, Effort(rounds=41, patience=3.0, fewest=9))
    ratios = [a / b for a, b in zip(samples["eager"], samples["fastmlp"], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    times = [f"{median(samples[name]) * 1e6:,.0f}" for name in ("eager", "fastmlp")]
    speedup = f"{ratio(samples['eager'], samples['fastmlp']):.2f} ({low:.2f} to {high:.2f})"
    return [equation, activation, f"{layers} x {width}", str(dtype)[6:], f"{points:,}", *times, speedup]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--activations", nargs="+", default=["tanh"], choices=ACTIVATIONS, metavar="NAME")
    parser.add_argument("--equations", nargs="+", default=["Burgers"], choices=EQUATIONS, metavar="NAME")
    parser.add_argument("--points", nargs="+", type=int, default=POINTS, metavar="N")
    parser.add_argument("--width", type=int, default=50, metavar="N")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="hidden ones")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("equation", "activation", "hidden", "dtype", "points", "eager, us", "fastmlp, us", "speedup")
    for equation in options.equations:
        for activation in options.activations:
            for points in options.points:
                dtype = getattr(torch, options.dtype)
                table.add_row(*compare(equation, activation, options.width, options.layers, points, dtype))
    console().print(table)


if __name__ == "__main__":
    main()

"""Functions of space and time: equations and images that a network is to follow."""

from math import pi, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.programs.base import BATCHES, Program, mlp
from benchmarks.workloads import VISCOSITY


def burgers(batch: int, **options: Any) -> Program:
    """Physics-informed network: u_t + u u_x = nu u_xx inside, u = -sin(pi x) at the start."""
    model = mlp(2, 50, 50, 50, 50, 1, activation=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, **options)

    def step(inside: Tensor, start: Tensor) -> Tensor:
        optimizer.zero_grad()
        points = inside.detach().requires_grad_()
        u = model(points)
        (gradient,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        u_x, u_t = gradient[:, :1], gradient[:, 1:]
        u_xx = torch.autograd.grad(u_x.sum(), points, create_graph=True)[0][:, :1]
        residual = u_t + u * u_x - VISCOSITY * u_xx
        miss = model(start) + torch.sin(pi * start[:, :1])
        loss = residual.square().mean() + miss.square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    inside = torch.rand(BATCHES * batch, 2) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])
    x = 2 * torch.rand(BATCHES * batch // 4, 1) - 1
    data = (inside, torch.cat((x, torch.zeros_like(x)), dim=1))
    return Program(step, data, {"model": model}, {"optimizer": optimizer})


def hamiltonian(batch: int, **options: Any) -> Program:
    """Hamiltonian network of a pendulum: its energy's derivatives are compared with the motion."""
    energy = mlp(2, 64, 64, 1, activation=nn.Tanh)
    optimizer = torch.optim.Adam(energy.parameters(), lr=1e-3, **options)

    def step(places: Tensor, motions: Tensor) -> Tensor:
        optimizer.zero_grad()
        places = places.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(places).sum(), places, create_graph=True)
        by_place, by_momentum = gradient.chunk(2, dim=1)
        loss = F.mse_loss(torch.cat((by_momentum, -by_place), dim=1), motions)
        loss.backward()
        optimizer.step()
        return loss.detach()

    places = 4 * torch.rand(BATCHES * batch, 2) - 2
    motions = torch.stack((places[:, 1], -places[:, 0].sin()), dim=1)
    return Program(step, (places, motions), {"energy": energy}, {"optimizer": optimizer})


def neural_ode(batch: int, **options: Any) -> Program:
    """A differential equation learned through ten steps of Runge and Kutta's method."""
    field = mlp(2, 50, 2, activation=nn.Tanh)
    optimizer = torch.optim.RMSprop(field.parameters(), lr=1e-3, **_without_fused(options))
    steps, h = 10, 0.1

    def step(start: Tensor, path: Tensor) -> Tensor:
        optimizer.zero_grad()
        y, found = start, []
        for _ in range(steps):
            k1 = field(y)
            k2 = field(y + h / 2 * k1)
            k3 = field(y + h / 2 * k2)
            k4 = field(y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            found.append(y)
        loss = F.mse_loss(torch.stack(found, dim=1), path)
        loss.backward()
        optimizer.step()
        return loss.detach()

    start = torch.randn(BATCHES * batch, 2)
    generator = torch.tensor([[-0.1, -2.0], [2.0, -0.1]])
    path = torch.stack([start @ torch.linalg.matrix_exp(h * (i + 1) * generator).T for i in range(steps)], dim=1)
    return Program(step, (start, path), {"field": field}, {"optimizer": optimizer})


def _without_fused(options: dict[str, Any]) -> dict[str, Any]:
    """Return options without `fused`, which torch's RMSprop does not have."""
    return {name: value for name, value in options.items() if name != "fused"}


class Sine(nn.Module):
    """sin(30 (W x + b)), with weights from the range that keeps the frequencies."""

    def __init__(self, fan_in: int, fan_out: int, first: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(fan_in, fan_out)
        bound = 1 / fan_in if first else sqrt(6 / fan_in) / 30
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return torch.sin(30 * self.linear(input))


def siren(batch: int, **options: Any) -> Program:
    """Network of sines that learns an image: as many pixels as the batch has rows, all of them in each step."""
    model = nn.Sequential(Sine(2, 64, first=True), Sine(64, 64), Sine(64, 64), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, **options)

    def step(pixels: Tensor, brightness: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(pixels), brightness)
        loss.backward()
        optimizer.step()
        return loss.detach()

    line = torch.linspace(-1, 1, round(sqrt(batch)))
    pixels = torch.cartesian_prod(line, line)
    x, y = pixels.split(1, dim=1)
    rings, edge = torch.sin(12 * (x.square() + y.square()).sqrt()), ((x - 0.2).abs() + y.abs() < 0.5).float()
    data = (pixels.repeat(BATCHES, 1), (0.5 * rings + edge).repeat(BATCHES, 1))
    return Program(step, data, {"model": model}, {"optimizer": optimizer})

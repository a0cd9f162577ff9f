"""Models of the distribution of data: a variational autoencoder and a flow."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.programs.base import BATCHES, Program, every, mlp

LATENT = 8


def vae(batch: int, **options: Any) -> Program:
    """Variational autoencoder on scikit-learn's digits, 8 by 8 pixels."""
    from sklearn.datasets import load_digits

    encoder, decoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU()), mlp(LATENT, 128, 64)
    to_mean, to_log_variance = nn.Linear(128, LATENT), nn.Linear(128, LATENT)
    modules = {"encoder": encoder, "to_mean": to_mean, "to_log_variance": to_log_variance, "decoder": decoder}
    optimizer = torch.optim.Adam(every(*modules.values()), lr=1e-3, **options)

    def step(images: Tensor) -> Tensor:
        optimizer.zero_grad()
        hidden = encoder(images)
        mean, log_variance = to_mean(hidden), to_log_variance(hidden)
        latent = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        miss = F.binary_cross_entropy_with_logits(decoder(latent), images, reduction="sum")
        divergence = -0.5 * torch.sum(1 + log_variance - mean.square() - log_variance.exp())
        loss = (miss + divergence) / len(images)
        loss.backward()
        optimizer.step()
        return loss.detach()

    images = torch.from_numpy(load_digits().data).float()[: BATCHES * batch] / 16
    return Program(step, (images,), modules, {"optimizer": optimizer}, random=True)


class Coupling(nn.Module):
    """Moves and stretches one of two columns by what the other says."""

    def __init__(self, column: int) -> None:
        super().__init__()
        self.column = column
        self.net = mlp(1, 64, 64, 2)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = points.chunk(2, dim=1)
        if self.column:
            kept, moved = moved, kept
        log_scale, shift = self.net(kept).chunk(2, dim=1)
        log_scale = torch.tanh(log_scale)
        moved = moved * log_scale.exp() + shift
        columns = (moved, kept) if self.column else (kept, moved)
        return torch.cat(columns, dim=1), log_scale.squeeze(1)


def flow(batch: int, **options: Any) -> Program:
    """Six affine couplings, trained by the likelihood of points on two half circles."""
    layers = nn.ModuleList(Coupling(i % 2) for i in range(6))
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-3, **options)

    def step(points: Tensor) -> Tensor:
        optimizer.zero_grad()
        log_volume = torch.zeros(len(points))
        for layer in layers:
            points, log_scale = layer(points)
            log_volume = log_volume + log_scale
        log_normal = -0.5 * points.square().sum(1) - 1.8378770664
        loss = -(log_normal + log_volume).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    angle, side = torch.pi * torch.rand(BATCHES * batch), torch.randint(2, (BATCHES * batch,))
    sign = 1 - 2 * side
    points = torch.stack((sign * angle.cos() + side, sign * angle.sin() + 0.5 * side), dim=1)
    points += 0.05 * torch.randn_like(points)
    return Program(step, (points,), {"layers": layers}, {"optimizer": optimizer})

"""Classes and codes of images and rows: first examples, and what they are extended to."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.subjects.base import BATCHES, Described

CLASSES = 10


class Quick(nn.Module):
    """Layers in a row after a Flatten, as the first model of PyTorch's tutorials has them."""

    def __init__(self, pixels: int, width: int) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.layers = nn.Sequential(
            *(nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.flatten(x))


class Quickstart(Described):
    """Images of clothes, by SGD without momentum."""

    name = "Quickstart"
    criterion = nn.CrossEntropyLoss()

    def __init__(self, dtype: torch.dtype, small: bool = False) -> None:
        super().__init__(dtype, small)
        self.side = self.size(28, 6)
        images = self.randn(BATCHES * self.size(64, 8), 1, self.side, self.side, seed=1).sigmoid()
        self.data = images, images.flatten(1)[:, :CLASSES].argmax(1)

    def make(self) -> nn.Module:
        return Quick(self.side**2, self.size(512, 12)).to(self.dtype)

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(model.parameters(), lr=1e-3)]


class Probabilities(nn.Module):
    """A module for skorch: options by keyword, a forward that lets others pass, probabilities as its result."""

    def __init__(
        self,
        columns: int,
        units: int = 10,
        nonlinearity: Callable[[Tensor], Tensor] = F.relu,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.nonlinearity = nonlinearity
        self.first = nn.Linear(columns, units)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(units, 10)
        self.output = nn.Linear(10, 2)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, X: Tensor, **kwargs: Any) -> Tensor:
        X = self.dropout(self.nonlinearity(self.first(X)))
        X = self.nonlinearity(self.second(X))
        return self.softmax(self.output(X))


def nll_of_probabilities(probabilities: Tensor, classes: Tensor) -> Tensor:
    """Returns what skorch makes of an NLLLoss for a module that ends with a softmax."""
    return F.nll_loss(torch.log(probabilities + torch.finfo(probabilities.dtype).eps), classes)


class Skorch(Described):
    """Two classes of rows, by SGD with momentum."""

    name = "skorch-style classifier"
    criterion = staticmethod(nll_of_probabilities)

    def __init__(self, dtype: torch.dtype, small: bool = False) -> None:
        super().__init__(dtype, small)
        rows = self.randn(BATCHES * self.size(128, 8), 20, seed=1)
        self.data = rows, (rows[:, 0] * rows[:, 1] > 0).long()

    def make(self) -> nn.Module:
        return Probabilities(20, self.size(100, 12)).to(self.dtype)

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)]


class Normalised(nn.Module):
    """Norms and dropout between layers, activations called as functions, and logarithms of probabilities."""

    def __init__(self, columns: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(columns, width)
        self.bn1 = nn.BatchNorm1d(width)
        self.fc2 = nn.Linear(width, width)
        self.bn2 = nn.BatchNorm1d(width)
        self.fc3 = nn.Linear(width, 3)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.relu(self.bn1(self.fc1(x))))
        x = self.dropout(F.relu(self.bn2(self.fc2(x))))
        return F.log_softmax(self.fc3(x), dim=1)


class BatchNorm(Described):
    """Three classes of rows, by Adam with weight decay."""

    name = "BatchNorm and Dropout"
    criterion = staticmethod(F.nll_loss)

    def __init__(self, dtype: torch.dtype, small: bool = False) -> None:
        super().__init__(dtype, small)
        rows = self.randn(BATCHES * self.size(128, 8), 16, seed=1)
        self.data = rows, (rows[:, 0] > rows[:, 1]).long() + (rows[:, 2] > 0.5).long()

    def make(self) -> nn.Module:
        return Normalised(16, self.size(128, 12)).to(self.dtype)

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)]


class Coder(nn.Module):
    """An encoder and a decoder, whose result are brightnesses."""

    def __init__(self, pixels: int, width: int, code: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, width // 2), nn.ReLU(), nn.Linear(width // 2, code))
        )
        self.decoder = nn.Sequential(
            *(nn.Linear(code, width // 2), nn.ReLU(), nn.Linear(width // 2, width), nn.ReLU()),
            *(nn.Linear(width, pixels), nn.Sigmoid()),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class Autoencoder(Described):
    """Images through a narrow code, compared with themselves as probabilities."""

    name = "autoencoder"
    criterion = nn.BCELoss()

    def __init__(self, dtype: torch.dtype, small: bool = False) -> None:
        super().__init__(dtype, small)
        self.pixels = self.size(784, 30)
        images = self.randn(BATCHES * self.size(128, 8), self.pixels, seed=1).cumsum(1).sigmoid()
        self.data = images, images

    def make(self) -> nn.Module:
        return Coder(self.pixels, self.size(128, 12), self.size(16, 3)).to(self.dtype)


class Variational(nn.Module):
    """Encoder with two heads, a draw, and a decoder, as methods of one module."""

    def __init__(self, pixels: int, width: int, latent: int) -> None:
        super().__init__()
        self.pixels = pixels
        self.fc1 = nn.Linear(pixels, width)
        self.fc_mean = nn.Linear(width, latent)
        self.fc_logvar = nn.Linear(width, latent)
        self.fc3 = nn.Linear(latent, width)
        self.fc4 = nn.Linear(width, pixels)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.relu(self.fc1(x))
        return self.fc_mean(hidden), self.fc_logvar(hidden)

    def draw(self, mean: Tensor, logvar: Tensor) -> Tensor:
        std = torch.exp(0.5 * logvar)
        return mean + torch.randn_like(std) * std

    def decode(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z))))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.encode(x.view(-1, self.pixels))
        return self.decode(self.draw(mean, logvar)), mean, logvar


def evidence(found: tuple[Tensor, Tensor, Tensor], images: Tensor) -> Tensor:
    """Returns the negative lower bound on the logarithm of the images' probability, summed."""
    brightness, mean, logvar = found
    miss = F.binary_cross_entropy(brightness, images.view_as(brightness), reduction="sum")
    return miss - 0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())


class VariationalAutoencoder(Described):
    """Images as draws of a few hidden numbers."""

    name = "variational autoencoder"
    criterion = staticmethod(evidence)

    def __init__(self, dtype: torch.dtype, small: bool = False) -> None:
        super().__init__(dtype, small)
        self.side = self.size(28, 5)
        images = self.randn(BATCHES * self.size(128, 8), self.side**2, seed=1).cumsum(1).sigmoid()
        images = images.view(-1, 1, self.side, self.side)
        self.data = images, images

    def make(self) -> nn.Module:
        return Variational(self.side**2, self.size(400, 12), self.size(20, 3)).to(self.dtype)

    def requests(self, rows: int) -> tuple[Tensor, ...]:
        return (self.data[0][:rows].flatten(1),)

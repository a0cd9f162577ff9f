"""Rows of tables: regression, classification, recommendation, and the first example of PyTorch's tutorials."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.programs.base import BATCHES, Program, mlp

COLUMNS = 16


class Block(nn.Module):
    """A residual block: norm, a wider layer, dropout, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(self.dropout(F.gelu(self.up(self.norm(x))))))


def residual(batch: int, **options: Any) -> Program:
    """Residual network with LayerNorm and dropout, a regression by AdamW."""
    blocks = [Block(64) for _ in range(3)]
    model = nn.Sequential(nn.Linear(COLUMNS, 64), *blocks, nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4, **options)

    def step(rows: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(rows), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    rows = torch.randn(BATCHES * batch, COLUMNS)
    targets = torch.sin(2 * rows[:, :1]) + rows[:, 1:2] * rows[:, 2:3]
    return Program(step, (rows, targets), {"model": model}, {"optimizer": optimizer}, random=True)


def batchnorm(batch: int, **options: Any) -> Program:
    """Classifier with BatchNorm and dropout, by SGD with momentum."""
    hidden = [(nn.Linear(a, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2)) for a in (COLUMNS, 128)]
    model = nn.Sequential(*(layer for layers in hidden for layer in layers), nn.Linear(128, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4, **options)

    def step(rows: Tensor, classes: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(rows), classes)
        loss.backward()
        optimizer.step()
        return loss.detach()

    rows = torch.randn(BATCHES * batch, COLUMNS)
    classes = (rows[:, 0] + rows[:, 1] > 0).long() + (rows[:, 2] > 0.5).long()
    return Program(step, (rows, classes), {"model": model}, {"optimizer": optimizer}, random=True)


class Recommender(nn.Module):
    """Embeddings and a dense part of equal width, their products with one another, and a network on top."""

    pairs: Tensor

    def __init__(self, tables: int, entries: int, width: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(entries, width) for _ in range(tables))
        self.bottom = mlp(13, 64, width)
        self.register_buffer("pairs", torch.tril_indices(tables + 1, tables + 1, -1))
        self.top = mlp(width + tables * (tables + 1) // 2, 64, 1)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        dense = self.bottom(numbers)
        parts = [dense, *(table(categories[:, i]) for i, table in enumerate(self.embeddings))]
        stacked = torch.stack(parts, dim=1)
        products = torch.bmm(stacked, stacked.transpose(1, 2))
        interactions = products[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat((dense, interactions), dim=1)).squeeze(1)


def dlrm(batch: int, **options: Any) -> Program:
    """Recommendation of the kind of DLRM: eight tables of a thousand entries, by Adagrad."""
    model = Recommender(tables=8, entries=1000, width=16)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.02, **options)

    def step(numbers: Tensor, categories: Tensor, clicks: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(model(numbers, categories), clicks)
        loss.backward()
        optimizer.step()
        return loss.detach()

    numbers, categories = torch.randn(BATCHES * batch, 13), torch.randint(1000, (BATCHES * batch, 8))
    clicks = (numbers[:, 0] + (categories[:, 0] % 2) > 0.5).float()
    return Program(step, (numbers, categories, clicks), {"model": model}, {"optimizer": optimizer})


def tutorial_sgd(batch: int, **options: Any) -> Program:
    """The network and the loop of a first lesson, with SGD."""
    return _tutorial(batch, torch.optim.SGD, 1e-2, options)


def tutorial_adam(batch: int, **options: Any) -> Program:
    """The same with Adam."""
    return _tutorial(batch, torch.optim.Adam, 1e-3, options)


def _tutorial(batch: int, kind: Any, rate: float, options: dict[str, Any]) -> Program:
    model, loss_fn = mlp(10, 50, 1), nn.MSELoss()
    optimizer = kind(model.parameters(), lr=rate, **options)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    x = torch.randn(BATCHES * batch, 10)
    return Program(step, (x, x[:, :1] - x[:, 1:2] * x[:, 2:3]), {"model": model}, {"optimizer": optimizer})

"""Models that are random graphs of layers, each a function of a seed: for `freeze`."""

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Functions of one value.
ONE: tuple[Callable[[Tensor], Tensor], ...] = (
    *(torch.relu, torch.tanh, torch.sigmoid, F.silu, F.gelu, F.softplus, torch.sin, F.hardswish, F.mish),
    lambda h: 1.5 * h - 0.25,
    lambda h: h.clamp(min=-0.5, max=1.0),
    lambda h: -h / 2 + h**2 * 0.1,
    lambda h: (h * 1.0).relu_() + h,
    lambda h: h + h[..., :1],
)
#: Functions of two values with as many features.
TWO: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    torch.add,
    lambda h, g: h * torch.tanh(g),
    lambda h, g: torch.where(h > g * 0.5, h, g),
    lambda h, g: torch.maximum(h, g).sub_(g),
)
MODULES: tuple[Callable[[int], nn.Module], ...] = (
    lambda _: nn.ReLU(inplace=True),  # first: only where the forward does not begin with the input itself
    lambda _: nn.ReLU(),
    lambda _: nn.Dropout(),
    nn.LayerNorm,
    lambda features: nn.LayerNorm(features, elementwise_affine=False),
    nn.BatchNorm1d,
)


class RandomGraph(nn.Module):
    """Layers and what lies between them, each of an earlier value, and one to three of the values as results."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.copies = draw.random() < 0.5
        self.features = draw.choice([1, 2, 3, 5, 8, 16, 17, 33])
        self.layers = nn.ModuleList()
        self.scales = nn.ParameterList()
        self.plan: list[tuple[str, int, Any]] = []
        self._sizes = [self.features]
        self._add("module", 0, nn.Linear(self.features, self.features), self.features)
        for _ in range(draw.randint(3, 14)):
            self._draw(draw)
        self.results = [draw.randrange(1, len(self._sizes)) for _ in range(draw.randint(1, 3))]
        self.squeezes = draw.random() < 0.3

    def _add(self, kind: str, of: int, what: Any, features: int) -> None:
        if isinstance(what, nn.Module):
            self.layers.append(what)
            what = len(self.layers) - 1
        self.plan.append((kind, of, what))
        self._sizes.append(features)

    def _draw(self, draw: random.Random) -> None:
        sizes = self._sizes
        of = draw.choice([len(sizes) - 1, draw.randrange(len(sizes))])
        features, other = sizes[of], draw.randrange(len(sizes))
        kind = draw.choice(["layer", "layer", "layer", "one", "one", "two", "two", "cat", "part", "module", "scale"])
        if kind == "layer":
            width = draw.choice([1, 2, 4, 5, 9, 16, 31, 64, features])
            self._add("module", of, nn.Linear(features, width, bias=draw.random() < 0.8), width)
        elif kind == "one":
            self._add(kind, of, draw.randrange(len(ONE)), features)
        elif kind == "two":
            same = draw.choice([i for i, size in enumerate(sizes) if size == features])
            self._add(kind, of, (draw.randrange(len(TWO)), same), features)
        elif kind == "cat":
            self._add(kind, of, other, features + sizes[other])
        elif kind == "part":
            begin = draw.randrange(features)
            end, step = draw.randint(begin + 1, features), draw.choice([1, 1, 2])
            self._add(kind, of, slice(begin, end, step), len(range(begin, end, step)))
        elif kind == "module":
            self._add(kind, of, draw.choice(MODULES[not self.copies :])(features), features)
        else:
            self.scales.append(nn.Parameter(torch.randn(draw.choice([(features,), (1, features), (1,)]))))
            self._add(kind, of, len(self.scales) - 1, features)

    def forward(self, x: Tensor) -> Any:
        values = [x * 1.0 if self.copies else x]
        for kind, of, what in self.plan:
            h = values[of]
            if kind == "module":
                values.append(self.layers[what](h))
            elif kind == "one":
                values.append(ONE[what](h))
            elif kind == "two":
                values.append(TWO[what[0]](h, values[what[1]]))
            elif kind == "cat":
                values.append(torch.cat([h, values[what]], -1))
            elif kind == "part":
                values.append(h[..., what])
            else:
                values.append(h * self.scales[what])
        results = [values[i] for i in self.results]
        if self.squeezes:
            results[0] = results[0][..., :1].squeeze(-1)
        return tuple(results) if len(results) > 1 else results[0]

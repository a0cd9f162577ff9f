"""What a program is: a training step as its author wrote it, with its data and all that it trains."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

#: Batches that a program has, which come again and again.
BATCHES = 8


@dataclass(frozen=True)
class Program:
    """A training step and all that it reads and changes.

    Attributes:
        step: one step of training on a batch, `zero_grad` and `optimizer.step()` included; returns its loss,
            without a graph.
        data: tensors with rows for `BATCHES` batches. A step takes a batch of each, in this order.
        modules: by name, in training mode.
        optimizers: by name.
        random: whether a step draws random numbers.
    """

    step: Callable[..., Tensor]
    data: tuple[Tensor, ...]
    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.Optimizer]
    random: bool = False

    def inputs(self, i: int) -> tuple[Tensor, ...]:
        """Return the arguments of the i-th call of `step`: new tensors with the same numbers at each asking."""
        rows = [len(tensor) // BATCHES for tensor in self.data]
        first = i % BATCHES
        return tuple(tensor[first * n : (first + 1) * n].clone() for tensor, n in zip(self.data, rows, strict=True))

    def parameters(self) -> dict[str, Tensor]:
        """Return all that an optimizer or a module holds, each tensor once, by name."""
        named: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            named |= {f"{name}.{key}": p for key, p in module.named_parameters()}
        known = set(map(id, named.values()))
        for name, optimizer in self.optimizers.items():
            held = [p for group in optimizer.param_groups for p in group["params"]]
            named |= {f"{name}.{i}": p for i, p in enumerate(held) if id(p) not in known}
        return named

    def state(self) -> dict[str, Tensor]:
        """Return all that a step may change, by name: parameters, gradients, buffers, states of the optimizers.

        Example:
            >>> from benchmarks.programs import PROGRAMS
            >>> program = PROGRAMS["tutorial sgd b32"](seed=0)
            >>> sorted(program.state())
            ['model.0.bias', 'model.0.weight', 'model.2.bias', 'model.2.weight']
        """
        found = dict(self.parameters())
        found |= {f"{name}.grad": p.grad for name, p in self.parameters().items() if p.grad is not None}
        for name, module in self.modules.items():
            found |= {f"{name}.{key}": buffer for key, buffer in module.named_buffers()}
        for name, optimizer in self.optimizers.items():
            held = [p for group in optimizer.param_groups for p in group["params"]]
            for i, p in enumerate(held):
                values = optimizer.state.get(p, {}).items()
                found |= {f"{name}.{i}.{key}": value for key, value in values if isinstance(value, Tensor)}
        return found


@dataclass(frozen=True)
class Maker:
    """Makes programs of one kind and size.

    Attributes:
        build: returns the program for a batch size; keyword arguments are options of its optimizers.
        batch: rows of a batch.
    """

    build: Callable[..., Program]
    batch: int

    def __call__(self, seed: int, **options: bool) -> Program:
        """Make a program: from the same seed one with the same numbers, whatever was drawn before.

        Args:
            seed: of parameters and data.
            **options: of all optimizers, beside those that the program gives, such as `fused=True`.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build(self.batch, **options)


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return linear layers with an activation between them."""
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


def every(*modules: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of some modules in one list."""
    return [parameter for module in modules for parameter in module.parameters()]


def average(targets: Sequence[nn.Module], sources: Sequence[nn.Module], rate: float) -> None:
    """Move targets towards their sources by a share of the way, which is Polyak's average."""
    with torch.no_grad():
        for target, source in _pairs(targets, sources):
            target.lerp_(source, rate)


def copies(*modules: nn.Module) -> tuple[nn.Module, ...]:
    """Return networks of the same shapes and numbers that nobody trains."""
    return tuple(deepcopy(module).requires_grad_(False) for module in modules)


def _pairs(targets: Sequence[nn.Module], sources: Sequence[nn.Module]) -> Iterator[tuple[Tensor, Tensor]]:
    for target, source in zip(targets, sources, strict=True):
        yield from zip(target.parameters(), source.parameters(), strict=True)

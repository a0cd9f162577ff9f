"""Which layers, networks and batches are timed, and how many floating-point operations each takes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

Suite = Literal["layers", "nets", "steps"]
Task = Literal["infer", "forward_backward", "step"]
Optimizer = Literal["sgd", "adam"]


class Tier(IntEnum):
    """The smallest selection of workloads that a workload belongs to."""

    QUICK = 0
    DEFAULT = 1
    FULL = 2


@dataclass(frozen=True)
class Net:
    """Linear layers with ReLU between them.

    Attributes:
        name: by which results are known.
        widths: features of the input and of each layer.
        relu_last: whether ReLU follows the last layer too.
        loss: what a training step minimises.
    """

    name: str
    widths: tuple[int, ...]
    relu_last: bool = False
    loss: type[nn.MSELoss] | type[nn.CrossEntropyLoss] = nn.MSELoss

    def modules(self) -> nn.Sequential:
        """Build the network of PyTorch's own modules.

        Example:
            >>> Net("tutorial", (10, 50, 1)).modules()
            Sequential(
              (0): Linear(in_features=10, out_features=50, bias=True)
              (1): ReLU()
              (2): Linear(in_features=50, out_features=1, bias=True)
            )
        """
        children = [m for fan_in, fan_out in pairwise(self.widths) for m in (nn.Linear(fan_in, fan_out), nn.ReLU())]
        return nn.Sequential(*(children if self.relu_last else children[:-1]))


@dataclass(frozen=True)
class Data:
    """A batch: the input, what the loss compares with, and a gradient to start backward from."""

    input: Tensor
    target: Tensor
    grad: Tensor


@dataclass(frozen=True)
class Workload:
    """What one call computes."""

    suite: Suite
    net: Net
    batch: int
    task: Task
    tier: Tier
    optimizer: Optimizer = "sgd"

    @property
    def name(self) -> str:
        """Unique among all workloads."""
        size = f"{self.batch}x{self.net.name}" if self.suite == "layers" else f"{self.net.name} b{self.batch}"
        return f"{size} {self.task}" + (f" {self.optimizer}" if self.task == "step" else "")

    @property
    def input_grad(self) -> bool:
        """Whether backward is to reach the input: a layer stands inside a network, a network at its start."""
        return self.suite == "layers" and self.task == "forward_backward"

    @property
    def flops(self) -> int:
        """Multiplications and additions of the products of matrices, which is all but a little.

        Example:
            >>> Workload("nets", Net("n", (2, 3, 5)), 10, "infer", Tier.FULL).flops
            420
        """
        products = [2 * self.batch * fan_in * fan_out for fan_in, fan_out in pairwise(self.net.widths)]
        if self.task == "infer":
            return sum(products)
        return 3 * sum(products) - (0 if self.input_grad else products[0])

    def data(self) -> Data:
        """Draw the same random numbers at each call."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch, self.net.widths[-1])
        grad = torch.randn(shape, generator=generator)
        input = torch.randn(self.batch, self.net.widths[0], generator=generator, requires_grad=self.input_grad)
        if self.net.loss is nn.CrossEntropyLoss:
            return Data(input, torch.randint(shape[1], shape[:1], generator=generator), grad)
        return Data(input, torch.randn(shape, generator=generator), grad)

    def optimize(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """PyTorch's optimizer for these parameters."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=1e-2)
        return torch.optim.Adam(parameters, lr=1e-3)


@contextmanager
def seeded() -> Iterator[None]:
    """Modules built inside are initialised with the same numbers each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


TUTORIAL = Net("tutorial", (10, 50, 1))
POLICY = Net("policy", (64, 64, 64, 4))
MNIST = Net("mnist", (784, 256, 128, 10), loss=nn.CrossEntropyLoss)
DLRM = Net("dlrm", (13, 512, 256, 64, 16))
WIDE = Net("wide", (1024, 1024, 1024, 1024))
NARROW = Net("narrow", (32, 64, 64, 64, 64, 3))

QUICK, DEFAULT, FULL = Tier

# (batch, in_features, out_features)
_LAYERS = {
    (1, 10, 50): DEFAULT,
    (1, 64, 64): QUICK,
    (8, 64, 64): DEFAULT,
    (32, 128, 128): QUICK,
    (64, 784, 256): QUICK,
    (128, 256, 256): FULL,
    (256, 256, 256): DEFAULT,
    (256, 512, 512): QUICK,
    (512, 512, 512): DEFAULT,
    (512, 1024, 1024): FULL,
    (1024, 1024, 1024): DEFAULT,
    (2048, 2048, 2048): FULL,
    (7, 13, 17): DEFAULT,
    (33, 257, 129): QUICK,
    (100, 1000, 3): DEFAULT,
    (65536, 3, 64): DEFAULT,
    (65536, 64, 64): DEFAULT,
}

# The batches of each net
_NETS = {
    TUTORIAL: {1: QUICK, 32: QUICK, 256: DEFAULT, 4096: FULL, 65536: DEFAULT},
    POLICY: {1: QUICK, 32: QUICK, 256: DEFAULT, 4096: FULL},
    MNIST: {1: DEFAULT, 32: QUICK, 256: DEFAULT, 4096: FULL},
    DLRM: {1: DEFAULT, 32: QUICK, 256: DEFAULT, 4096: FULL},
    WIDE: {1: DEFAULT, 32: DEFAULT, 256: DEFAULT, 1024: FULL, 4096: FULL},
    NARROW: {1: QUICK, 32: QUICK, 256: FULL, 4096: FULL, 65536: DEFAULT},
}

_STEPS = {
    TUTORIAL: {32: QUICK, 128: DEFAULT, 1024: FULL},
    POLICY: {32: DEFAULT, 128: QUICK, 1024: FULL},
    MNIST: {32: FULL, 128: QUICK, 1024: FULL},
    DLRM: {32: FULL, 128: FULL, 1024: DEFAULT},
    WIDE: {32: FULL, 128: FULL, 1024: DEFAULT},
    NARROW: {32: DEFAULT, 128: QUICK, 1024: FULL, 65536: DEFAULT},
}

_TASKS: tuple[Task, ...] = ("infer", "forward_backward")
_OPTIMIZERS: tuple[Optimizer, ...] = ("sgd", "adam")


def _workloads(suite: Suite) -> Iterator[Workload]:
    if suite == "layers":
        for task in _TASKS:
            for (batch, fan_in, fan_out), tier in _LAYERS.items():
                net = Net(f"{fan_in}x{fan_out}", (fan_in, fan_out), relu_last=True)
                yield Workload(suite, net, batch, task, tier)
    elif suite == "nets":
        for task in _TASKS:
            for net, tiers in _NETS.items():
                yield from (Workload(suite, net, batch, task, tier) for batch, tier in tiers.items())
    else:
        for optimizer in _OPTIMIZERS:
            for net, tiers in _STEPS.items():
                for batch, tier in tiers.items():
                    yield Workload(suite, net, batch, "step", tier, optimizer)


def select(suite: Suite, tier: Tier) -> list[Workload]:
    """Return the workloads of a suite that belong to a tier or to a smaller one.

    Args:
        suite: "layers", "nets" or "steps".
        tier: the largest tier to include.

    Example:
        >>> [w.name for w in select("steps", Tier.QUICK)][:2]
        ['tutorial b32 step sgd', 'policy b128 step sgd']
    """
    return [workload for workload in _workloads(suite) if workload.tier <= tier]

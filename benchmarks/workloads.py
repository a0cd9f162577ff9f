"""Which products, layers, networks, batches and programs are timed, and how many operations each takes."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.programs import PROGRAMS, SMALL
from benchmarks.programs.fields import VISCOSITY
from fastmlp.benchmark.machine import dtype_name

Suite = Literal["products", "layers", "nets", "steps"]
Task = Literal["product", "infer", "forward_backward", "step", "physics"]
Optimizer = Literal["sgd", "adam"]

#: How the operands of a product lie in memory: as in a forward pass, (M, K) and (N, K); as in the gradient
#: of the input, (M, K) and (K, N); as in the gradient of the weight, (K, M) and (K, N).
Layout = Literal["NT", "NN", "TN"]


class Tier(IntEnum):
    """The smallest selection of workloads that a workload belongs to."""

    QUICK = 0
    DEFAULT = 1
    FULL = 2


@dataclass(frozen=True)
class Net:
    """Linear layers with an activation between them.

    Attributes:
        name: by which results are known.
        widths: features of the input and of each layer.
        relu_last: whether the activation, then ReLU, follows the last layer too.
        loss: what a training step minimises.
        activation: its module; of all tasks but "physics" ReLU.
    """

    name: str
    widths: tuple[int, ...]
    relu_last: bool = False
    loss: type[nn.MSELoss] | type[nn.CrossEntropyLoss] = nn.MSELoss
    activation: type[nn.ReLU] | type[nn.Tanh] = nn.ReLU

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
        layers = [(nn.Linear(fan_in, fan_out), self.activation()) for fan_in, fan_out in pairwise(self.widths)]
        children = [module for pair in layers for module in pair]
        return nn.Sequential(*(children if self.relu_last else children[:-1]))


@dataclass(frozen=True)
class Data:
    """A batch: the input, what the loss compares with, and a gradient to start backward from."""

    input: Tensor
    target: Tensor
    grad: Tensor


def burgers(model: nn.Module, data: Data) -> Tensor:
    """Return a physics-informed network's loss: Burgers' equation at all points, the target at every eighth."""
    x, t = (column.detach().requires_grad_() for column in data.input.split(1, dim=1))
    u = model(torch.cat((x, t), dim=1))
    ones = torch.ones_like(u)
    u_x, u_t = torch.autograd.grad(u, (x, t), ones, create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x, x, ones, create_graph=True)
    residual = u_t + u * u_x - VISCOSITY * u_xx
    return residual.square().mean() + (model(data.input[::8]) - data.target[::8]).square().mean()


@dataclass(frozen=True)
class Workload:
    """What one call computes.

    Attributes:
        suite: to which it belongs.
        net: what is run; of a product its single layer, of which only the weight is used.
        batch: rows of the input.
        task: what is done with the network.
        tier: the smallest selection to which it belongs.
        optimizer: of a training step, that of "physics" included.
        dtype: of data and parameters.
        layout: of a product.
    """

    suite: Suite
    net: Net
    batch: int
    task: Task
    tier: Tier
    optimizer: Optimizer = "sgd"
    dtype: torch.dtype = torch.float32
    layout: Layout = "NT"

    @property
    def name(self) -> str:
        """Unique among all workloads.

        Example:
            >>> product(64, 32, 128, "TN", Tier.FULL, torch.bfloat16).name
            'TN 64x32x128 bfloat16'
        """
        if self.task == "product":
            return f"{self.layout} {self.batch}x{self.net.name} {dtype_name(self.dtype)}"
        size = f"{self.batch}x{self.net.name}" if self.suite == "layers" else f"{self.net.name} b{self.batch}"
        dtype = "" if self.dtype is torch.float32 else f" {dtype_name(self.dtype)}"
        return f"{size} {self.task}" + (f" {self.optimizer}" if self.suite == "steps" else "") + dtype

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
        if self.task in ("product", "infer"):
            return sum(products)
        if self.task == "physics":
            # Output, u_x and u_t, and twice as many for u_xx; then of each both gradients, and the boundary.
            return 12 * sum(products) + 3 * sum(products) // 8
        return 3 * sum(products) - (0 if self.input_grad else products[0])

    @property
    def bytes(self) -> int:
        """What has to be read or written at least: all that goes in or comes out, once.

        Example:
            >>> product(10, 20, 30, "NN", Tier.FULL).bytes
            4400
        """
        fan_in, fan_out = self.net.widths[0], self.net.widths[-1]
        biases = 0 if self.task == "product" else sum(self.net.widths[1:])
        parameters = biases + sum(a * b for a, b in pairwise(self.net.widths))
        elements = self.batch * (fan_in + fan_out) + parameters
        if self.task not in ("product", "infer"):
            elements += self.batch * (fan_out + (fan_in if self.input_grad else 0)) + parameters
        return elements * self.dtype.itemsize

    def operands(self) -> tuple[Tensor, Tensor]:
        """Draw input (M, K) and weight (N, K) of a product, whose strides make the layout."""
        generator = torch.Generator().manual_seed(1)

        def draw(rows: int, columns: int, transposed: bool) -> Tensor:
            shape = (columns, rows) if transposed else (rows, columns)
            drawn = torch.randn(shape, generator=generator).to(self.dtype)
            return drawn.T if transposed else drawn

        fan_in, fan_out = self.net.widths
        return draw(self.batch, fan_in, self.layout == "TN"), draw(fan_out, fan_in, self.layout != "NT")

    def data(self) -> Data:
        """Draw the same random numbers at each call."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch, self.net.widths[-1])
        grad = torch.randn(shape, generator=generator).to(self.dtype)
        input = torch.randn(self.batch, self.net.widths[0], generator=generator).to(self.dtype)
        input.requires_grad_(self.input_grad)
        if self.net.loss is nn.CrossEntropyLoss:
            return Data(input, torch.randint(shape[1], shape[:1], generator=generator), grad)
        return Data(input, torch.randn(shape, generator=generator).to(self.dtype), grad)

    def optimize(self, parameters: Iterable[Tensor], package: ModuleType = torch.optim) -> torch.optim.Optimizer:
        """Make the optimizer of these parameters, PyTorch's or that of a package with the same classes."""
        if self.optimizer == "sgd":
            return package.SGD(parameters, lr=1e-2)
        return package.Adam(parameters, lr=1e-3)


@dataclass(frozen=True)
class Training:
    """A step of one of `benchmarks.programs`.

    Attributes:
        name: of the program.
        tier: of the run. torch.compile takes half a minute for a program; it does two in a quick run, all by default,
            and in a full run the small ones in its other modes too.
    """

    name: str
    tier: Tier
    suite: ClassVar[Literal["programs"]] = "programs"
    dtype: ClassVar[torch.dtype] = torch.float32

    @property
    def flops(self) -> int:
        """Multiplications and additions of the products of matrices, as PyTorch counts them."""
        return _counts(self.name)[0]

    @property
    def bytes(self) -> int:
        """What has to be read or written at least: the batch and all that a step may change, once."""
        return _counts(self.name)[1]


#: What can be timed.
Work = Workload | Training

#: All suites, in the order of the tables.
SUITES: tuple[str, ...] = (*get_args(Suite), Training.suite)


class _Counter(TorchDispatchMode):
    """Adds up the operations of products. PyTorch's `FlopCounterMode` has hooks that `autograd.grad` refuses."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func.overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


@cache
def _counts(name: str) -> tuple[int, int]:
    program = PROGRAMS[name](seed=0)
    batch = program.inputs(0)
    with torch.random.fork_rng(devices=[]), _Counter() as counter:
        program.step(*batch)
    return counter.total, sum(tensor.nbytes for tensor in (*batch, *program.state().values()))


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
BURGERS = Net("burgers", (2, 50, 50, 50, 50, 1), activation=nn.Tanh)

QUICK, DEFAULT, FULL = Tier

_LAYOUTS: tuple[Layout, ...] = ("NT", "NN", "TN")

#: Products of n x n x n
_SQUARES = {
    torch.float32: {256: QUICK, 512: DEFAULT, 1024: DEFAULT, 2048: DEFAULT},
    torch.bfloat16: {256: QUICK, 512: DEFAULT, 1024: DEFAULT, 2048: DEFAULT},
    torch.float64: {256: FULL, 512: FULL, 1024: FULL, 2048: FULL},
    torch.float16: {256: FULL, 512: FULL, 1024: FULL},  # at 2048 eager takes 20 seconds
}

# (layout, M, N, K): the weight gradient and the forward pass of a narrow network
_SKINNY: dict[tuple[Layout, int, int, int], Tier] = {
    ("TN", 64, 32, 65536): DEFAULT,
    ("TN", 64, 64, 65536): FULL,
    ("NN", 65536, 64, 64): DEFAULT,
    ("NT", 65536, 64, 64): FULL,
}

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
    (2048, 2048, 2048): DEFAULT,
    (7, 13, 17): DEFAULT,
    (33, 257, 129): QUICK,
    (100, 1000, 3): DEFAULT,
    (65536, 3, 64): DEFAULT,
    (65536, 64, 64): DEFAULT,
}

# The same in bfloat16
_LAYERS_BFLOAT16 = {
    (32, 128, 128): QUICK,
    (256, 512, 512): DEFAULT,
    (1024, 1024, 1024): DEFAULT,
    (100, 1000, 3): FULL,
    (65536, 64, 64): DEFAULT,
}

# The batches of each net
_NETS = {
    TUTORIAL: {1: QUICK, 32: QUICK, 256: DEFAULT, 4096: FULL, 65536: DEFAULT},
    POLICY: {1: QUICK, 32: QUICK, 256: DEFAULT, 4096: FULL},
    MNIST: {1: DEFAULT, 32: QUICK, 256: DEFAULT, 4096: FULL},
    DLRM: {1: DEFAULT, 32: QUICK, 256: DEFAULT, 4096: FULL},
    WIDE: {1: DEFAULT, 32: DEFAULT, 256: DEFAULT, 1024: DEFAULT, 4096: FULL},
    NARROW: {1: QUICK, 32: QUICK, 256: FULL, 4096: FULL, 65536: DEFAULT},
}

# The same in bfloat16
_NETS_BFLOAT16 = {
    POLICY: {32: QUICK},
    MNIST: {1024: DEFAULT},
    DLRM: {1024: DEFAULT},
    WIDE: {1024: DEFAULT},
}

_STEPS = {
    TUTORIAL: {32: QUICK, 128: DEFAULT, 1024: FULL},
    POLICY: {32: DEFAULT, 128: QUICK, 1024: FULL},
    MNIST: {32: FULL, 128: QUICK, 1024: FULL},
    DLRM: {32: FULL, 128: FULL, 1024: DEFAULT},
    WIDE: {32: FULL, 128: FULL, 1024: DEFAULT},
    NARROW: {32: DEFAULT, 128: QUICK, 1024: FULL, 65536: DEFAULT},
}

# The batches of points
_PHYSICS = {128: DEFAULT, 1024: DEFAULT, 8192: FULL}

_TASKS: tuple[Task, ...] = ("infer", "forward_backward")
_OPTIMIZERS: tuple[Optimizer, ...] = ("sgd", "adam")


def product(
    rows: int, columns: int, depth: int, layout: Layout, tier: Tier, dtype: torch.dtype = torch.float32
) -> Workload:
    """Return the product of an M x K by a K x N matrix.

    Args:
        rows: M.
        columns: N.
        depth: K.
        layout: how the operands lie in memory.
        tier: the smallest selection to which it belongs.
        dtype: of the operands.
    """
    net = Net(f"{columns}x{depth}", (depth, columns))
    return Workload("products", net, rows, "product", tier, dtype=dtype, layout=layout)


def _products() -> Iterator[Workload]:
    for dtype, tiers in _SQUARES.items():
        for layout in _LAYOUTS:
            yield from (product(n, n, n, layout, tier, dtype) for n, tier in tiers.items())
    yield from (product(m, n, k, layout, tier) for (layout, m, n, k), tier in _SKINNY.items())


def _layers() -> Iterator[Workload]:
    for task in _TASKS:
        for dtype, tiers in ((torch.float32, _LAYERS), (torch.bfloat16, _LAYERS_BFLOAT16)):
            for (batch, fan_in, fan_out), tier in tiers.items():
                net = Net(f"{fan_in}x{fan_out}", (fan_in, fan_out), relu_last=True)
                yield Workload("layers", net, batch, task, tier, dtype=dtype)


def _nets() -> Iterator[Workload]:
    for task in _TASKS:
        for dtype, nets in ((torch.float32, _NETS), (torch.bfloat16, _NETS_BFLOAT16)):
            for net, tiers in nets.items():
                yield from (Workload("nets", net, batch, task, tier, dtype=dtype) for batch, tier in tiers.items())


def _steps() -> Iterator[Workload]:
    for optimizer in _OPTIMIZERS:
        for net, tiers in _STEPS.items():
            yield from (Workload("steps", net, batch, "step", tier, optimizer) for batch, tier in tiers.items())
    yield from (Workload("steps", BURGERS, batch, "physics", tier, "adam") for batch, tier in _PHYSICS.items())


def select(suite: Suite, tier: Tier) -> list[Workload]:
    """Return the workloads of a suite that belong to a tier or to a smaller one.

    Args:
        suite: "products", "layers", "nets" or "steps".
        tier: the largest tier to include.

    Example:
        >>> [w.name for w in select("steps", Tier.QUICK)][:2]
        ['tutorial b32 step sgd', 'policy b128 step sgd']
    """
    found = {"products": _products, "layers": _layers, "nets": _nets, "steps": _steps}[suite]()
    return [workload for workload in found if workload.tier <= tier]


def works(suite: str, tier: Tier) -> Sequence[Work]:
    """Return what a run of this tier times of one of `SUITES`."""
    return trainings(tier) if suite == Training.suite else select(cast(Suite, suite), tier)


def trainings(tier: Tier) -> list[Training]:
    """Return the programs of a run of this tier: the small ones in a quick run, else all.

    Example:
        >>> [training.name for training in trainings(Tier.QUICK)][:2]
        ['ppo b64', 'dqn b128']
    """
    return [Training(name, tier) for name in (SMALL if tier is Tier.QUICK else PROGRAMS)]

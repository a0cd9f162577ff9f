"""What a contender is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.workloads import Task, Workload, burgers, seeded


class Refused(Exception):
    """A contender cannot run a workload. The text says why, for a reader of the table."""


class Participant(ABC):
    """Something that is timed: everything that is not to be timed happens when it is built from a workload.

    Attributes:
        name: by which results are known.
        ours: whether it is fastmlp, whose ways are not each other's peers.
        packages: without which it is left out.
    """

    name: ClassVar[str]
    ours: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ("torch",)

    @classmethod
    def missing(cls) -> list[str]:
        """The packages that it needs and that are not installed."""
        return [package for package in cls.packages if not find_spec(package)]

    @property
    @abstractmethod
    def call(self) -> Callable[[], Any]:
        """What is to be timed."""


class Contender(Participant):
    """One way to run products, layers, networks and their steps.

    A contender offers one method for each of its `tasks`. What they return must depend on all that
    they compute, and is a result or a tuple of results, in the order that the method's description
    gives. The initial parameters are those that PyTorch's modules get inside `seeded`, and threads are
    as many as PyTorch has.

    Attributes:
        tasks: what it can do; by default all but "physics", for which gradients have to have gradients.
        dtypes: what it can do it with.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("product", "infer", "forward_backward", "step")
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    @classmethod
    def takes(cls, workload: Workload) -> bool:
        """Whether it runs a workload."""
        return workload.task in cls.tasks and workload.dtype in cls.dtypes

    @property
    def call(self) -> Callable[[], Any]:
        calls = {
            "product": self.product,
            "infer": self.infer,
            "forward_backward": self.forward_backward,
            "step": self.step,
            "physics": self.physics,
        }
        return calls[self.workload.task]

    def product(self) -> Any:
        """Return the product of the workload's operands, input (M, K) and weight (N, K)."""
        raise NotImplementedError

    def infer(self) -> Any:
        """Return the output, without a graph."""
        raise NotImplementedError

    def forward_backward(self) -> Any:
        """Return the output, the gradients of the parameters and, if the workload asks, of the input."""
        raise NotImplementedError

    def step(self) -> Any:
        """Do one step of training and return its loss."""
        raise NotImplementedError

    def physics(self) -> Any:
        """Do one step of training on `burgers` and return its loss; the parameters keep their gradients."""
        raise NotImplementedError

    def parameters(self) -> Sequence[Tensor]:
        """Return weight and bias of each layer as they are now."""
        raise NotImplementedError

    def results(self, returned: Any) -> list[Tensor]:
        """Return what `call` returned as tensors that PyTorch would return: to be checked, not timed."""
        return [torch.as_tensor(result) for result in (returned if isinstance(returned, tuple) else (returned,))]


class ModuleContender(Contender):
    """A module that is called and trained as any PyTorch user would."""

    tasks: ClassVar[tuple[Task, ...]] = (*Contender.tasks, "physics")
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        if workload.task == "product":
            self.operands = workload.operands()
            return
        with seeded():
            self.model = self.build(workload).to(workload.dtype)
        self.data = data = workload.data()
        self.input, self.target, self.grad = data.input, data.target, data.grad
        self.inputs = [*self.model.parameters(), *([self.input] if workload.input_grad else [])]
        self.loss = workload.net.loss()
        self.optimizer = workload.optimize(self.model.parameters())

    @abstractmethod
    def build(self, workload: Workload) -> nn.Module:
        """Return the module for the workload's network."""

    def infer(self) -> Tensor:
        with torch.no_grad():
            return self.model(self.input)

    def forward_backward(self) -> tuple[Tensor, ...]:
        output = self.model(self.input)
        return output, *torch.autograd.grad(output, self.inputs, self.grad)

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        loss: Tensor = self.loss(self.model(self.input), self.target)
        loss.backward()
        self.optimizer.step()
        return loss

    def physics(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = burgers(self.model, self.data)
        loss.backward()
        self.optimizer.step()
        return loss

    def parameters(self) -> Sequence[Tensor]:
        return list(self.model.parameters())


def linears(workload: Workload) -> list[nn.Linear]:
    """Return the initial layers of the workload's network, for contenders that bring their own."""
    with seeded():
        return [m for m in workload.net.modules().to(workload.dtype) if isinstance(m, nn.Linear)]


def relus(workload: Workload) -> list[bool]:
    """Whether ReLU follows each layer of the workload's network."""
    return [True] * (len(workload.net.widths) - 2) + [workload.net.relu_last]

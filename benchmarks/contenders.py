"""Who takes part. To add a contender: one subclass of `Contender`, and its name in `CONTENDERS`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import fastmlp
from benchmarks.workloads import Task, Workload, seeded


class Contender(ABC):
    """One way to run workloads: everything that is not to be timed happens when it is built.

    A contender offers one method for each of its `tasks`. What they return must depend on all that
    they compute, and be a tensor, something that `torch.as_tensor` takes, or a tuple of such. The
    initial parameters are those that PyTorch's modules get inside `seeded`.

    Attributes:
        name: by which results are known.
        package: without which it is left out.
        tasks: what it can do.
    """

    name: ClassVar[str]
    package: ClassVar[str] = "torch"
    tasks: ClassVar[tuple[Task, ...]] = ("infer", "forward_backward", "step")

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    @property
    def call(self) -> Callable[[], Any]:
        """What is to be timed."""
        calls = {"infer": self.infer, "forward_backward": self.forward_backward, "step": self.step}
        return calls[self.workload.task]

    def infer(self) -> Any:
        """Return the output, without a graph."""
        raise NotImplementedError

    def forward_backward(self) -> Any:
        """Return the output, the gradients of the parameters and, if the workload asks, of the input."""
        raise NotImplementedError

    def step(self) -> Any:
        """Do one step of training and return its loss."""
        raise NotImplementedError

    def parameters(self) -> Sequence[Any]:
        """Return weight and bias of each layer as they are now."""
        raise NotImplementedError


class ModuleContender(Contender):
    """A module that is called and trained as any PyTorch user would."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        with seeded():
            self.model = self.build(workload)
        data = workload.data()
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

    def parameters(self) -> list[Tensor]:
        return list(self.model.parameters())


class Eager(ModuleContender):
    """`nn.Linear` and `nn.ReLU` in `nn.Sequential`."""

    name = "eager"

    def build(self, workload: Workload) -> nn.Module:
        return workload.net.modules()


class Fastmlp(ModuleContender):
    """`fastmlp.Linear` for a layer, `fastmlp.MLP` for a network."""

    name = "fastmlp"

    def build(self, workload: Workload) -> nn.Module:
        fan_in, *hidden, fan_out = workload.net.widths
        if workload.suite == "layers":
            return fastmlp.Linear(fan_in, fan_out, activation="relu")
        return fastmlp.MLP(fan_in, hidden, fan_out)


CONTENDERS: tuple[type[Contender], ...] = (Eager, Fastmlp)


def contenders(task: Task) -> list[type[Contender]]:
    """Return those that can do a task and whose package is installed: eager, the yardstick, first."""
    return [c for c in CONTENDERS if task in c.tasks and find_spec(c.package)]

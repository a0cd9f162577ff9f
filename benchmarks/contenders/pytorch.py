"""PyTorch's own ways, and ours."""

import warnings
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmlp
from benchmarks.contenders.base import Contender, ModuleContender, linears, relus
from benchmarks.workloads import Workload


class Eager(ModuleContender):
    """`nn.Linear` and activations in `nn.Sequential`."""

    name = "eager"

    def build(self, workload: Workload) -> nn.Module:
        return workload.net.modules()

    def product(self) -> Tensor:
        with torch.no_grad():
            return F.linear(*self.operands)


class Fastmlp(ModuleContender):
    """`fastmlp.Linear` for a layer, `fastmlp.MLP` for a network."""

    name = "fastmlp"
    ours = True

    def build(self, workload: Workload) -> nn.Module:
        fan_in, *hidden, fan_out = workload.net.widths
        if workload.suite == "layers":
            return fastmlp.Linear(fan_in, fan_out, activation="relu")
        return fastmlp.MLP(fan_in, hidden, fan_out, workload.net.activation)

    def product(self) -> Tensor:
        with torch.no_grad():
            return fastmlp.functional.linear(*self.operands)


class FastmlpOptim(Fastmlp):
    """The same, with `fastmlp.optim` in place of `torch.optim`: the loop is unchanged."""

    name = "fastmlp_optim"
    tasks = ("step",)

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.optimizer = workload.optimize(self.model.parameters(), fastmlp.optim)


class TrainStep(Fastmlp):
    """`fastmlp.TrainStep` on the same network and PyTorch's optimizer, leaving the gradients that the loop leaves."""

    name = "train_step"
    tasks = ("step",)
    dtypes = (torch.float32, torch.float64)

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.run = fastmlp.TrainStep(self.model, self.loss, self.optimizer)

    def step(self) -> Tensor:
        return self.run(self.input, self.target)


class Frozen(Fastmlp):
    """`fastmlp.freeze` of the same network or layer, called with a tensor."""

    name = "frozen"
    tasks = ("infer",)
    dtypes = (torch.float32, torch.float64)

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.run = fastmlp.freeze(self.model)

    def infer(self) -> Tensor:
        return self.run(self.input)


class Compiled(ModuleContender):
    """`torch.compile` of eager's module, in its default mode.

    It takes seconds to compile a network, so it does only some.
    """

    name = "compile"
    tasks = ("infer", "forward_backward")
    dtypes = (torch.float32,)

    @classmethod
    def takes(cls, workload: Workload) -> bool:
        """Networks on a batch of 32."""
        return super().takes(workload) and workload.suite == "nets" and workload.batch == 32

    def __init__(self, workload: Workload) -> None:
        with warnings.catch_warnings():
            # The compiler calls what PyTorch itself has deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.compiler.reset()  # one network's graphs shall not be looked through for the next one
            super().__init__(workload)
            self.call()

    def build(self, workload: Workload) -> nn.Module:
        # The module's own method `compile` would compile nothing: its frames are torch.nn's, which are skipped.
        compiled: Any = torch.compile(workload.net.modules(), dynamic=False)
        return compiled


class OneDnn(Contender):
    """oneDNN's fused layer, bias and ReLU included, on weights in the order that it prefers.

    What PyTorch's compiler calls for frozen weights, without the compiler.
    """

    name = "onednn"
    tasks = ("infer",)
    dtypes = (torch.float32, torch.bfloat16)

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.input = workload.data().input
        operators: Any = torch.ops.mkldnn
        self.layers = [
            partial(
                operators._linear_pointwise.default,
                W=operators._reorder_linear_weight(layer.weight.detach(), workload.batch),
                B=layer.bias.detach(),
                attr="relu" if relu else "none",
                scalars=[],
                algorithm="",
            )
            for layer, relu in zip(linears(workload), relus(workload), strict=True)
        ]

    @classmethod
    def missing(cls) -> list[str]:
        """Not every build of torch has oneDNN."""
        return [] if torch.backends.mkldnn.is_available() else ["torch with oneDNN"]

    def infer(self) -> Tensor:
        output = self.input
        with torch.inference_mode():
            for layer in self.layers:
                output = layer(output)
        return output

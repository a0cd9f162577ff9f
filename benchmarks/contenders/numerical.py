"""Libraries that bring arrays and gradients of their own."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.contenders.base import Contender, linears, relus
from benchmarks.workloads import Workload
from fastmlp.benchmark.peers import adam_step, first_state, forward, from_jax, sgd_step, start_jax, to_jax


class Jax(Contender):
    """JAX, each task one function under `jax.jit`.

    Weights are stored (in_features, out_features), as its users do, and so are their gradients.
    """

    name = "jax"
    packages = ("jax",)
    tasks = ("infer", "forward_backward", "step")

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        start_jax()
        import jax

        data = workload.data()
        self.layers = [(to_jax(layer.weight.T), to_jax(layer.bias)) for layer in linears(workload)]
        self.input, self.target, self.grad = (to_jax(each) for each in (data.input, data.target, data.grad))
        self.wait = jax.block_until_ready
        if workload.task == "infer":
            self.run = jax.jit(self._forward)
        elif workload.task == "forward_backward":
            self.run = jax.jit(self._forward_backward)
        elif workload.optimizer == "sgd":
            self.run = sgd_step(self._loss, *_settings(workload))
        else:
            self.run = adam_step(self._loss, *_settings(workload))
        self.state = first_state(self.layers, workload.optimizer != "sgd")

    def infer(self) -> Any:
        return self.wait(self.run(self.layers, self.input))

    def forward_backward(self) -> Any:
        return self.wait(self.run(self.layers, self.input, self.grad))

    def step(self) -> Any:
        self.state, loss = self.run(self.state, self.input, self.target)
        return self.wait(loss)

    def parameters(self) -> Sequence[Tensor]:
        return self._tensors(self.state[0])

    def results(self, returned: Any) -> list[Tensor]:
        if self.workload.task != "forward_backward":
            return [from_jax(returned)]
        output, layers, *input = returned
        return [from_jax(output), *self._tensors(layers), *map(from_jax, input)]

    @staticmethod
    def _tensors(layers: Sequence[tuple[Any, Any]]) -> list[Tensor]:
        return [tensor for weight, bias in layers for tensor in (from_jax(weight).T, from_jax(bias))]

    def _forward(self, layers: Any, output: Any) -> Any:
        from jax.nn import relu

        return forward(layers, [relu if activated else None for activated in relus(self.workload)], output)

    def _forward_backward(self, layers: Any, input: Any, grad: Any) -> Any:
        import jax

        if self.workload.input_grad:
            output, pull = jax.vjp(self._forward, layers, input)
        else:
            output, pull = jax.vjp(lambda layers: self._forward(layers, input), layers)
        return output, *pull(grad)

    def _loss(self, layers: Any, input: Any, target: Any) -> Any:
        import jax

        output = self._forward(layers, input)
        if self.workload.net.loss is nn.MSELoss:
            return ((output - target) ** 2).mean()
        return -jax.numpy.take_along_axis(jax.nn.log_softmax(output), target[:, None], 1).mean()


class ScikitLearn(Contender):
    """scikit-learn's `partial_fit` on one batch, which checks its arguments at each call.

    Only SGD: its Adam adds epsilon elsewhere than PyTorch's, so that the two train differently. It
    counts half of PyTorch's squared error and sums over the outputs, for which the learning rate makes up.
    """

    name = "scikit-learn"
    packages = ("sklearn", "threadpoolctl")
    tasks = ("step",)

    @classmethod
    def takes(cls, workload: Workload) -> bool:
        """Steps of SGD."""
        return super().takes(workload) and workload.optimizer == "sgd"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        from sklearn.neural_network import MLPClassifier, MLPRegressor
        from threadpoolctl import threadpool_limits

        threadpool_limits(torch.get_num_threads(), "blas")
        data, outputs = workload.data(), workload.net.widths[-1]
        self.classifies = workload.net.loss is nn.CrossEntropyLoss
        rate, *_ = _settings(workload)
        settings = {
            "hidden_layer_sizes": workload.net.widths[1:-1],
            "solver": "sgd",
            "alpha": 0.0,
            "batch_size": workload.batch,
            "learning_rate_init": rate if self.classifies else rate * 2 / outputs,
            "momentum": 0.0,
            "nesterovs_momentum": False,
            "shuffle": False,
        }
        self.model = (MLPClassifier if self.classifies else MLPRegressor)(**settings)
        self.input, target = data.input.numpy(), data.target.numpy()
        self.target = target if outputs > 1 else target.ravel()
        self.classes = {"classes": np.arange(outputs)} if self.classifies else {}
        self.fit: Callable[..., Any] = self.model.partial_fit
        self.step()  # makes its parameters, which are then set to the common ones
        layers = linears(workload)
        for own, layer in zip(self.model.coefs_, layers, strict=True):
            own[...] = layer.weight.detach().T
        for own, layer in zip(self.model.intercepts_, layers, strict=True):
            own[...] = layer.bias.detach()

    def step(self) -> float:
        self.fit(self.input, self.target, **self.classes)
        return self.model.loss_ if self.classifies else 2 * self.model.loss_

    def parameters(self) -> Sequence[Tensor]:
        layers = zip(self.model.coefs_, self.model.intercepts_, strict=True)
        return [torch.from_numpy(p) for weight, bias in layers for p in (weight.T, bias)]


def _settings(workload: Workload) -> tuple[float, ...]:
    """Return the learning rate and, of Adam, both betas and epsilon, as the workload's optimizer has them."""
    (group,) = workload.optimize([torch.zeros(1)]).param_groups
    return group["lr"], *group.get("betas", ()), *([group["eps"]] if "eps" in group else [])

"""Networks while they are trained: scikit-learn's losses, penalty and optimizers in terms of PyTorch's.

scikit-learn minimizes, over a batch of n rows, loss + alpha / (2 n) * (sum of all squared weights, biases aside); with
sample weights n is their sum. Here the penalty is the `weight_decay` of a group that has the weights alone, which is
set anew for each batch. Losses and optimizers differ from PyTorch's by factors, for which numbers of the optimizer make
up (see `Loss` and `Trainer`), so that a step is one call of a `TrainStep`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fastmlp import optim
from fastmlp.capture import capture
from fastmlp.modules import MLP
from fastmlp.sklearn.layers import Array, locked, model_of
from fastmlp.training import TrainStep

__all__ = ["Rule", "Trainer"]

#: Below this learning rate "adaptive" does not divide it further, and training ends.
_LEAST_RATE = 1e-6


#: A step with some rows of the data: the tensors, indices of rows, and how many they are. It returns the loss, (1).
Step: TypeAlias = Callable[[Sequence[Tensor], Tensor, int], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss of scikit-learn's, in terms of one of PyTorch's.

    Attributes:
        kind: the class of PyTorch's.
        share: scikit-learn's loss is so many times PyTorch's.
        slope: its gradient is so many times PyTorch's. That is another factor for the squared error, of which
            scikit-learn reports the mean over the outputs and descends along the gradient of the sum.
    """

    kind: type[nn.Module]
    share: float
    slope: float

    @staticmethod
    def of(out_activation: str, outputs: int) -> "Loss":
        """The loss that belongs to an activation of the output."""
        if out_activation == "identity":
            return Loss(nn.MSELoss, 0.5, outputs / 2)
        if out_activation == "logistic":
            return Loss(nn.BCEWithLogitsLoss, outputs, outputs)
        return Loss(nn.CrossEntropyLoss, 1.0, 1.0)


@dataclass(frozen=True)
class Rule:
    """The parameters of an estimator that its optimizer is made of."""

    solver: str
    learning_rate_init: float
    learning_rate: str
    power_t: float
    momentum: float
    nesterovs_momentum: bool
    beta_1: float
    beta_2: float
    epsilon: float


class Trainer:
    """The parameters of a network and the state of their optimizer.

    A gradient of scikit-learn's is `slope` times that of PyTorch's loss. SGD makes up for it by its learning rate, and
    Adam, which does not see how gradients are scaled, by its epsilon; both divide the penalty by it. Besides,
    scikit-learn's Adam adds epsilon to the root of the second moment before its bias is corrected, and PyTorch's after
    it, so that epsilon changes with the count of steps.

    Args:
        widths: of the input, the hidden layers and the output.
        dtype: of the parameters, which are zeros until `load`.
        out_activation: in scikit-learn's words.
        rule: how to move them.
    """

    def __init__(self, widths: Sequence[int], dtype: torch.dtype, out_activation: str, rule: Rule) -> None:
        self._made_of = (tuple(widths), dtype, out_activation, rule)
        self._rule, self._loss, self._steps = rule, Loss.of(out_activation, widths[-1]), 0
        sizes = list(pairwise(widths))
        # In one piece, so that the sum of all squares is one product.
        self._flat = torch.zeros(sum(fan_in * fan_out for fan_in, fan_out in sizes), dtype=dtype)
        parts = self._flat.split([fan_in * fan_out for fan_in, fan_out in sizes])
        self.weights = [nn.Parameter(p.view(size[::-1])) for p, size in zip(parts, sizes, strict=True)]
        self.biases = [nn.Parameter(torch.zeros(size[1], dtype=dtype)) for size in sizes]
        self._optimizer = self._make_optimizer()
        self._step: tuple[str, bool, Step] | None = None

    def _make_optimizer(self) -> torch.optim.Optimizer:
        rule, groups = self._rule, [{"params": self.weights}, {"params": self.biases}]
        if rule.solver == "adam":
            return optim.Adam(groups, lr=rule.learning_rate_init, betas=(rule.beta_1, rule.beta_2))
        nesterov = rule.nesterovs_momentum and rule.momentum > 0
        rate = rule.learning_rate_init * self._loss.slope
        return optim.SGD(groups, lr=rate, momentum=rule.momentum, nesterov=nesterov)

    def __getstate__(self) -> dict[str, Any]:
        # The parameters are the estimator's, which loads them.
        return {"made_of": self._made_of, "steps": self._steps, "optimizer": self._optimizer.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["made_of"])  # type: ignore[misc]
        self._steps = state["steps"]
        self._optimizer.load_state_dict(state["optimizer"])

    @torch.no_grad()
    def load(self, coefs: Sequence[Array], intercepts: Sequence[Array]) -> None:
        """Sets the parameters to arrays of scikit-learn's form: of matrices the transposed."""
        arrays = (*coefs, *intercepts)
        for parameter, array in zip([*self.weights, *self.biases], arrays, strict=True):
            parameter.numpy()[...] = array.T
        torch.autograd.graph.increment_version([*self.weights, *self.biases])

    @torch.no_grad()
    def read(self) -> tuple[list[Array], list[Array]]:
        """Copies of the parameters, in scikit-learn's form and read-only: `coefs_` and `intercepts_`."""
        return (
            [array.T for array in locked(weight.numpy().copy() for weight in self.weights)],
            locked(bias.numpy().copy() for bias in self.biases),
        )

    def is_finite(self) -> bool:
        """Whether all parameters are."""
        return all(bool(tensor.isfinite().all()) for tensor in (self._flat, *self.biases))

    def model(self, activation: str) -> MLP:
        """A network that has these parameters, also after they have moved."""
        return model_of(self.weights, self.biases, activation)

    def epoch(self, data: Sequence[Tensor], order: Tensor, batch_size: int, alpha: float, activation: str) -> float:
        """Takes a step with every batch.

        Args:
            data: inputs, targets as PyTorch's loss takes them, and weights of the rows if they have any.
            order: of the rows: int64.
            batch_size: rows of each batch but the last one, which has what is left.
            alpha: of the penalty.
            activation: of the hidden layers.

        Returns:
            The mean over the rows of the losses that the batches had before their steps, with the penalty.
        """
        step = self._step_for(activation, len(data) == 3)
        squares, size, left = self._flat.numpy(), batch_size, len(order)
        losses, penalties = [], 0.0
        # Weights that become infinite are told of when training ends.
        with np.errstate(over="ignore", invalid="ignore"):
            for rows in order.split(batch_size):
                size = min(size, left)
                left -= size
                mass = _mass(data[2][rows]) if len(data) == 3 else size
                if alpha > 0:
                    penalties += size * alpha / (2 * mass) * float(squares.dot(squares))
                self._set_numbers(alpha / mass)
                losses.append(step(data, rows, size))
        *found, last = torch.cat(losses).tolist()
        total = batch_size * sum(found) + size * last
        return (self._loss.share * total + penalties) / len(order)

    def _set_numbers(self, decay: float) -> None:
        """Sets what each step has numbers of its own for, as the class says."""
        of_weights, of_biases = self._optimizer.param_groups
        of_weights["weight_decay"] = decay / self._loss.slope
        if self._rule.solver == "adam":
            self._steps += 1
            root = math.sqrt(1 - self._rule.beta_2**self._steps)
            of_weights["eps"] = of_biases["eps"] = self._rule.epsilon / (self._loss.slope * root)

    def _step_for(self, activation: str, weighted: bool) -> Step:
        if self._step is None or self._step[:2] != (activation, weighted):
            make = self._weighted_step if weighted else self._plain_step
            self._step = activation, weighted, make(self.model(activation))
        return self._step[2]

    def _plain_step(self, model: MLP) -> Step:
        step = TrainStep(model, self._loss.kind(), self._optimizer, keep_grads=False)
        return lambda data, rows, size: step._run_all(data[0], data[1], rows, size)

    def _weighted_step(self, model: MLP) -> Step:
        """A captured step, since no loss of a `TrainStep` has weights of rows."""
        loss_fn, optimizer = self._loss.kind(reduction="none"), self._optimizer

        # Streams of batches of ever other sizes run as they are, with a warning.
        @capture(otherwise="eager")
        def step(inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            optimizer.zero_grad()
            losses = loss_fn(model(inputs), targets)
            losses = losses.mean(1) if losses.dim() == 2 else losses
            loss = (losses * weights).sum() / weights.sum()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return lambda data, rows, size: step(*(tensor[rows] for tensor in data)).unsqueeze(0)

    def end_epoch(self, rows_seen: int) -> None:
        """Lets the learning rate fall as "invscaling" says, after so many rows in all."""
        if self._rule.solver == "sgd" and self._rule.learning_rate == "invscaling":
            self._set_rate(self._rule.learning_rate_init * (rows_seen + 1.0) ** -self._rule.power_t)

    def slow_down(self) -> bool:
        """Divides the learning rate by 5, where "adaptive" still does that.

        Returns:
            Whether it was divided: training ends if not.
        """
        rate = self._optimizer.param_groups[0]["lr"] / self._loss.slope
        if self._rule.solver != "sgd" or self._rule.learning_rate != "adaptive" or rate <= _LEAST_RATE:
            return False
        self._set_rate(rate / 5)
        return True

    @torch.no_grad()
    def _set_rate(self, rate: float) -> None:
        """Changes SGD's learning rate from now on.

        scikit-learn's velocity has learning rates in it, and PyTorch's buffer has not: it is scaled, so that what is
        left of earlier steps keeps the rates that these had.
        """
        rate *= self._loss.slope
        for group in self._optimizer.param_groups:
            before, group["lr"] = group["lr"], rate
            for parameter in group["params"]:
                buffer = self._optimizer.state[parameter].get("momentum_buffer")
                if buffer is None:
                    continue
                if rate == 0 or not bool(buffer.mul_(before / rate).isfinite().all()):
                    raise ValueError(
                        f"fastmlp: learning_rate='invscaling' with power_t={self._rule.power_t} falls from {before} to "
                        f"{rate} at once, too far for the momentum of {buffer.dtype}: give a smaller power_t, or "
                        "momentum=0"
                    )


def _mass(weights: Tensor) -> float:
    mass = weights.sum().item()
    if mass == 0:
        raise ValueError(
            "fastmlp: sample_weight: the weights of a batch sum up to zero: leave out rows without weight, or give a "
            "larger batch_size"
        )
    return mass

"""Whether a contender computes the right thing, asked before it is timed.

The workload is computed in float64, and along with each number a bound on the error that it may have
in float32, whatever the order of the operations. The bound comes from the data alone:

- A sum of k products is off by at most k u times the sum of their magnitudes, u being the unit
  roundoff. Where k is large, roundings do not all err to one side: 8 sqrt(k) u holds with probability
  1 - 2 exp(-8^2 / 2) (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019).
- Errors of different elements are independent, so a product of matrices adds their squares. Products
  of two errors are left out.
- ReLU enlarges no error. Where the error of its argument reaches across zero, its derivative may be
  taken as 0 or as 1.
"""

from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.contenders import Contender
from benchmarks.workloads import Workload, seeded

UNIT = torch.finfo(torch.float32).eps / 2

#: No loss and no optimizer rounds an element more often than this.
ROUNDINGS = 16


class Estimate(NamedTuple):
    """A tensor in float64, and how far from it float32 may be."""

    value: Tensor
    error: Tensor

    @property
    def T(self) -> "Estimate":
        return Estimate(self.value.T, self.error.T)

    def __matmul__(self, other: "Estimate") -> "Estimate":
        (a, a_error), (b, b_error) = self, other
        error = _growth(a.shape[1]) * (a.abs() @ b.abs())
        if a_error.any() or b_error.any():
            error += (a_error.square() @ b.square() + a.square() @ b_error.square()).sqrt()
        return Estimate(a @ b, error)

    def relu(self) -> "Estimate":
        return Estimate(self.value.relu(), self.error)

    def relu_grad(self, grad: "Estimate") -> "Estimate":
        """Return the gradient of ReLU's argument, which this is, from that of its result."""
        passed = grad.error * (self.value > 0)
        undecided = self.value.abs() <= self.error
        return Estimate(grad.value * (self.value > 0), passed.where(~undecided, grad.value.abs() + grad.error))


def verify(contender: Contender) -> None:
    """Run a contender once and look at its results.

    Args:
        contender: not run yet, since a step changes it.

    Raises:
        AssertionError: if a result is farther from the expected one than rounding explains.
    """
    workload = contender.workload
    result = contender.call()
    results = result if isinstance(result, tuple) else (result,)
    if workload.task == "step":
        results = (*results, *contender.parameters())
    for (name, (value, error)), given in zip(expected(workload).items(), results, strict=True):
        found = torch.as_tensor(given).detach().double()
        what = f"{workload.name}: {name} of {contender.name}"
        assert found.shape == value.shape, f"{what} has shape {found.shape}, expected {value.shape}"
        difference = (found - value).abs()
        wrong = ~(difference <= error)  # so that NaN is wrong
        assert not wrong.any(), (
            f"{what} is wrong in {int(wrong.sum())} of {wrong.numel()} elements, "
            f"by up to {float((difference / error)[wrong].max()):.3g} times what rounding explains"
        )


@lru_cache(maxsize=1)
def expected(workload: Workload) -> dict[str, Estimate]:
    """Return the results of a workload by name, in the order in which a contender returns them."""
    net, data = workload.net, workload.data()
    with seeded():
        parameters = {name: p.detach().double() for name, p in net.modules().named_parameters()}
    weights, biases = list(parameters.values())[::2], list(parameters.values())[1::2]
    relus = [True] * (len(weights) - 1) + [net.relu_last]

    inputs: list[Estimate] = []
    sums: list[Estimate] = []
    output = _exact(data.input)
    for weight, bias, relu in zip(weights, biases, relus, strict=True):
        # The bias is one more column of the weight, for which the input has a column of ones.
        inputs.append(Estimate(_append(output.value, 1), _append(output.error, 0)))
        sums.append(inputs[-1] @ _exact(torch.column_stack((weight, bias)).T))
        output = sums[-1].relu() if relu else sums[-1]
    if workload.task == "infer":
        return {"output": output}

    loss, grad = _loss(net.loss(), output, data.target)
    if workload.task == "forward_backward":
        grad = _exact(data.grad)
    grads: list[Estimate] = []
    for weight, input, total, relu in zip(weights[::-1], inputs[::-1], sums[::-1], relus[::-1], strict=True):
        grad = total.relu_grad(grad) if relu else grad
        value, error = grad.T @ input
        grads = [Estimate(value[:, :-1], error[:, :-1]), Estimate(value[:, -1], error[:, -1]), *grads]
        if input is not inputs[0] or workload.input_grad:
            grad = grad @ _exact(weight)
    if workload.task == "step":
        return {"loss": loss} | dict(zip(parameters, _update(workload, parameters.values(), grads), strict=True))
    names = [f"gradient of {name}" for name in parameters]
    results = {"output": output} | dict(zip(names, grads, strict=True))
    return results | {"gradient of input": grad} if workload.input_grad else results


def _exact(tensor: Tensor) -> Estimate:
    value = tensor.detach().double()
    return Estimate(value, torch.zeros_like(value))


def _append(tensor: Tensor, value: float) -> Tensor:
    return nn.functional.pad(tensor, (0, 1), value=value)


def _growth(terms: int) -> float:
    return min(terms, 8 * sqrt(terms)) * UNIT


def _loss(loss: nn.MSELoss | nn.CrossEntropyLoss, output: Estimate, target: Tensor) -> tuple[Estimate, Estimate]:
    """Return the loss and its gradient."""
    leaf = output.value.clone().requires_grad_()
    if target.is_floating_point():
        target = target.double()
    value = loss(leaf, target)
    (grad,) = torch.autograd.grad(value, leaf)
    value = value.detach()
    if isinstance(loss, nn.MSELoss):
        carried = 2 * output.error / output.error.numel()
    else:
        # A probability p moves by at most 2 p (1 - p) times the largest error, and the gradient is
        # p or p - 1.
        carried = 2 * output.error.amax(1, keepdim=True) * grad.abs()
    error = (grad.abs() * output.error).sum() + (_growth(output.value.numel()) + ROUNDINGS * UNIT) * value
    return Estimate(value, error), Estimate(grad, carried + ROUNDINGS * UNIT * grad.abs())


def _update(workload: Workload, parameters: Collection[Tensor], grads: Sequence[Estimate]) -> Iterator[Estimate]:
    """Yield the parameters after a first step, in which each optimizer is monotonic in the gradient."""

    def updated(sign: int) -> list[Tensor]:
        stepped = [p.clone() for p in parameters]
        for p, (value, error) in zip(stepped, grads, strict=True):
            p.grad = value + sign * error
        workload.optimize(stepped).step()
        return stepped

    for old, low, new, high in zip(parameters, updated(-1), updated(0), updated(1), strict=True):
        rounding = UNIT * (new.abs() + ROUNDINGS * (new - old).abs())
        yield Estimate(new, torch.maximum((new - low).abs(), (new - high).abs()) + rounding)

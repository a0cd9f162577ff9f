"""Whether a contender computes the right thing, asked before it is timed.

The workload is computed in float64, and along with each number a bound on the error that it may have
in the workload's dtype, whatever the order of the operations. The bound comes from the data alone:

- A sum of k products is off by at most k u times the sum of their magnitudes, u being the unit
  roundoff. Where k is large, roundings do not all err to one side: 8 sqrt(k) u holds with probability
  1 - 2 exp(-8^2 / 2) (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019).
- Errors of different elements are independent, so a product of matrices adds their squares. Products
  of two errors are left out.
- bfloat16 and float16 are added up in float32, and rounded when they are stored. By Hoeffding's
  inequality a sum of such roundings exceeds 8 times the root of the sum of their squares as rarely as
  above, so what a product carries on counts 8 times.
- ReLU enlarges no error. Where the error of its argument reaches across zero, its derivative may be
  taken as 0 or as 1: an error as large as what it multiplies, which counts 8 times as well.
- A loss with derivatives of the network in it is a long way from its parameters. A computed product is the
  exact one of operands that are off by as much as above, so its error is the most that changes when
  they are moved at random.
"""

from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.contenders.base import Contender, relus
from benchmarks.workloads import Data, Workload, burgers, seeded

#: Standard deviations that no error exceeds.
SPREAD = 8

#: How often parameters and points are moved at random.
MOVES = 8

#: No loss and no optimizer rounds an element more often than this.
ROUNDINGS = 16


class Estimate(NamedTuple):
    """A tensor in float64, and how far from it one computed in a smaller dtype may be."""

    value: Tensor
    error: Tensor
    dtype: torch.dtype

    @classmethod
    def exact(cls, tensor: Tensor) -> "Estimate":
        """Return what is given, and so has no error."""
        value = tensor.detach().double()
        return cls(value, torch.zeros_like(value), tensor.dtype)

    @property
    def T(self) -> "Estimate":
        return Estimate(self.value.T, self.error.T, self.dtype)

    def __matmul__(self, other: "Estimate") -> "Estimate":
        (a, a_error, dtype), (b, b_error, _) = self, other
        error = growth(a.shape[1], dtype) * (a.abs() @ b.abs())
        if a_error.any() or b_error.any():
            error += (a_error.square() @ b.square() + a.square() @ b_error.square()).sqrt()
        return Estimate(a @ b, error, dtype)

    def stored(self, times: float = 1) -> "Estimate":
        """Round to the dtype: once to be looked at, `SPREAD` times to be carried on by a product."""
        if self.dtype.itemsize > 2:  # a rounding like all others, which the product has counted
            return self
        rounding = self.value.abs() * unit(self.dtype) + torch.finfo(self.dtype).smallest_normal * unit(self.dtype)
        return Estimate(self.value, self.error + times * rounding, self.dtype)

    def relu(self) -> "Estimate":
        return Estimate(self.value.relu(), self.error, self.dtype)

    def relu_grad(self, grad: "Estimate") -> "Estimate":
        """Return the gradient of ReLU's argument, which this is, from that of its result, to be carried on."""
        passed = grad.error * (self.value > 0)
        undecided = self.value.abs() <= self.error
        error = passed.where(~undecided, SPREAD * grad.value.abs() + grad.error)
        return Estimate(grad.value * (self.value > 0), error, self.dtype)


def unit(dtype: torch.dtype) -> float:
    """Return the unit roundoff of a dtype: half the distance from 1 to the next larger number."""
    return torch.finfo(dtype).eps / 2


def compare(found: Tensor, expected: Estimate, what: str) -> None:
    """Compare a result with what it should be.

    Args:
        found: the result.
        expected: the same in float64, with a bound.
        what: to name it in the error.

    Raises:
        AssertionError: if the result is farther from the expected one than rounding explains.
    """
    value, error, dtype = expected
    found = found.detach().double()
    assert found.shape == value.shape, f"{what} has shape {list(found.shape)}, expected {list(value.shape)}"
    # What is expected of float64 was itself computed in float64.
    allowed = 2 * error if dtype is torch.float64 else error
    difference = (found - value).abs()
    wrong = ~(difference <= allowed)  # so that NaN is wrong
    assert not wrong.any(), (
        f"{what} is wrong in {int(wrong.sum())} of {wrong.numel()} elements, "
        f"by up to {float((difference / allowed)[wrong].max()):.3g} times what rounding explains"
    )


def verify(contender: Contender) -> None:
    """Run a contender once and look at its results.

    Args:
        contender: not run yet, since a step changes it.

    Raises:
        AssertionError: if a result is farther from the expected one than rounding explains.
    """
    workload = contender.workload
    found = contender.results(contender.call())
    if workload.task == "step":
        found += contender.parameters()
    if workload.task == "physics":
        found += [p.grad for p in contender.parameters() if p.grad is not None]
    for (name, estimate), result in zip(expected(workload).items(), found, strict=True):
        compare(result, estimate, f"{workload.name}: {name} of {contender.name}")


@lru_cache(maxsize=1)
def expected(workload: Workload) -> dict[str, Estimate]:
    """Return the results of a workload by name, in the order in which a contender returns them."""
    if workload.task == "product":
        left, right = map(Estimate.exact, workload.operands())
        return {"product": (left @ right.T).stored()}
    if workload.task == "physics":
        return _physics(workload)
    net, data = workload.net, workload.data()
    with seeded():
        parameters = {name: p.detach() for name, p in net.modules().to(workload.dtype).named_parameters()}
    weights, biases = list(parameters.values())[::2], list(parameters.values())[1::2]

    inputs: list[Estimate] = []
    sums: list[Estimate] = []
    output = Estimate.exact(data.input)
    for weight, bias, relu in zip(weights, biases, relus(workload), strict=True):
        # The bias is one more column of the weight, for which the input has a column of ones.
        carried = output.stored(SPREAD) if inputs else output
        inputs.append(Estimate(_append(carried.value, 1), _append(carried.error, 0), workload.dtype))
        sums.append(inputs[-1] @ Estimate.exact(torch.column_stack((weight, bias))).T)
        output = sums[-1].relu() if relu else sums[-1]
    if workload.task == "infer":
        return {"output": output.stored()}

    loss, grad = _loss(net.loss(), output, data.target)
    if workload.task == "forward_backward":
        grad = Estimate.exact(data.grad)
    grads: list[Estimate] = []
    backwards = zip(weights[::-1], inputs[::-1], sums[::-1], relus(workload)[::-1], strict=True)
    for weight, input, total, relu in backwards:
        grad = total.relu_grad(grad) if relu else grad
        value, error, dtype = (grad.T @ input).stored()
        grads = [Estimate(value[:, :-1], error[:, :-1], dtype), Estimate(value[:, -1], error[:, -1], dtype), *grads]
        if input is not inputs[0]:
            grad = (grad @ Estimate.exact(weight)).stored(SPREAD)
        elif workload.input_grad:
            grad = (grad @ Estimate.exact(weight)).stored()
    if workload.task == "step":
        return {"loss": loss} | dict(zip(parameters, _update(workload, parameters.values(), grads), strict=True))
    names = [f"gradient of {name}" for name in parameters]
    results = {"output": output.stored()} | dict(zip(names, grads, strict=True))
    return results | {"gradient of input": grad} if workload.input_grad else results


def _append(tensor: Tensor, value: float) -> Tensor:
    return nn.functional.pad(tensor, (0, 1), value=value)


def growth(terms: int, dtype: torch.dtype) -> float:
    """Return the error of a sum, relative to the sum of its terms' magnitudes."""
    return min(terms, SPREAD * sqrt(terms)) * unit(torch.float64 if dtype is torch.float64 else torch.float32)


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
    rounding = ROUNDINGS * unit(output.dtype)
    error = (grad.abs() * output.error).sum() + (growth(output.value.numel(), output.dtype) + rounding) * value
    return Estimate(value, error, output.dtype), Estimate(grad, carried + rounding * grad.abs(), output.dtype)


def _physics(workload: Workload) -> dict[str, Estimate]:
    """Return the loss with derivatives of the network in it, and the gradients of the parameters."""
    data, generator = workload.data(), torch.Generator().manual_seed(1)
    with seeded():
        parameters = dict(workload.net.modules().to(workload.dtype).double().named_parameters())

    def results(noise: float) -> list[Tensor]:
        def moved(tensor: Tensor) -> Tensor:
            tensor = tensor.detach().double()
            return tensor + noise * tensor * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

        model = workload.net.modules().double()
        model.load_state_dict({name: moved(p) for name, p in parameters.items()})
        loss = burgers(model, Data(moved(data.input), data.target.double(), data.grad))
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    exact = results(0)
    noise = growth(max(workload.net.widths), workload.dtype)
    changes = [[(a - b).abs().max() for a, b in zip(results(noise), exact, strict=True)] for _ in range(MOVES)]
    errors = [torch.stack(most).max() for most in zip(*changes, strict=True)]
    names = ["loss", *(f"gradient of {name}" for name in parameters)]
    estimates = [Estimate(v, e.expand_as(v), workload.dtype) for v, e in zip(exact, errors, strict=True)]
    return dict(zip(names, estimates, strict=True))


def _update(workload: Workload, parameters: Collection[Tensor], grads: Sequence[Estimate]) -> Iterator[Estimate]:
    """Yield the parameters after a first step, in which each optimizer is monotonic in the gradient."""

    def updated(sign: int) -> list[Tensor]:
        stepped = [p.to(torch.float64, copy=True) for p in parameters]
        for p, (value, error, _) in zip(stepped, grads, strict=True):
            p.grad = value + sign * error
        workload.optimize(stepped).step()
        return stepped

    for old, low, new, high in zip(parameters, updated(-1), updated(0), updated(1), strict=True):
        rounding = unit(old.dtype) * (new.abs() + ROUNDINGS * (new - old).abs())
        yield Estimate(new, torch.maximum((new - low).abs(), (new - high).abs()) + rounding, old.dtype)

"""Values of a network and its gradients in higher precision, each with a bound on the error that a
kernel may make, computed from the data.

Products: an inner product of n terms summed in any order in precision u errs by at most
gamma_n = n u / (1 - n u) times the sum of the terms' magnitudes (Higham, Accuracy and Stability of
Numerical Algorithms, 2002, section 3.1). Activations: their value may change as much as it does over
the uncertainty of their argument, which is sampled, and evaluation itself may err by `ULPS` units in
the last place of the largest intermediate. Errors of one layer are the next one's uncertainty.

bfloat16 and float16 are dtypes of storage: sums and activations are computed in float32, and a tensor is
rounded once, when it is stored. Besides what PyTorch stores that is a pre-activation that backward needs, and
the gradient with respect to it, which is rounded on its way into the products.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from fastmlp import Activation, reference

#: Units in the last place that evaluating an activation, or its derivative, may lose.
ULPS = 8


@dataclass
class Bounded:
    """A value in double precision and a bound on the error of its computed counterpart."""

    value: Tensor
    error: Tensor
    is_exact: bool = False  # every error is zero
    curves: dict[Activation, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def curve(self, act: Activation) -> tuple[Tensor, Tensor]:
        """An activation and its derivative, at the value and at four others within the error; computed once."""
        if act not in self.curves:
            parts = self.value.new_tensor([-1, -0.5, 0.5, 1]).view(-1, *[1] * self.value.dim())
            points = torch.cat([self.value[None], self.value + parts * self.error])
            self.curves[act] = activate_and_differentiate(points, act)
        return self.curves[act]

    @staticmethod
    def exact(value: Tensor) -> "Bounded":
        value = value.detach().double()
        return Bounded(value, torch.zeros_like(value), is_exact=True)


def working(dtype: torch.dtype) -> torch.dtype:
    """What tensors of a dtype are computed in."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The most that storing a value changes it; subnormal numbers are a fixed distance apart."""
    finfo = torch.finfo(dtype)
    return finfo.eps / 2 * value.abs() + finfo.eps / 2 * finfo.smallest_normal


def stored(x: Bounded, dtype: torch.dtype) -> Bounded:
    """A sum that is written to a tensor. In the working dtype its last rounding was counted already."""
    if working(dtype) == dtype:
        return x
    return Bounded(x.value, x.error + rounding(x.value.abs() + x.error, dtype))


def gamma(n: int, dtype: torch.dtype) -> float:
    u = torch.finfo(working(dtype)).eps / 2
    return n * u / (1 - n * u)


def product(a: Bounded, b: Bounded, dtype: torch.dtype, more: Tensor | None = None) -> Bounded:
    """a b (+ more), all two-dimensional."""
    magnitude = a.value.abs() @ b.value.abs()
    value = a.value @ b.value
    terms = a.value.shape[1] + 1
    if more is not None:
        value, magnitude = value + more, magnitude + more.abs()
    carried = torch.zeros_like(value)
    if not a.is_exact:
        carried += a.error @ (b.value.abs() if b.is_exact else b.value.abs() + b.error)
    if not b.is_exact:
        carried += a.value.abs() @ b.error
    return Bounded(value, gamma(terms + 1, dtype) * (magnitude + carried) + carried)


def activate(z: Tensor, act: Activation) -> Tensor:
    """PyTorch's activation as its CPU computes it: on GPUs its hardswish of float64 has a sixth of single precision."""
    return reference.activate(z.cpu(), act.name, act.parameters).to(z.device)


def activate_and_differentiate(z: Tensor, act: Activation) -> tuple[Tensor, Tensor]:
    """act(z) and act'(z) as torch's autograd has it."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        y = activate(leaf, act)
        return y.detach(), torch.autograd.grad(y.sum(), leaf)[0]


@cache
def steepest(act: Activation) -> float:
    points = torch.linspace(-20, 20, 8001, dtype=torch.float64)
    return activate_and_differentiate(points, act)[1].abs().max().item()


def largest_change(samples: Tensor) -> Tensor:
    """The most by which the other samples of a curve differ from the first."""
    return (samples[1:] - samples[0]).abs().amax(0)


def multiplied(z: Bounded, act: Activation, dtype: torch.dtype) -> Bounded:
    """Where the argument of a sine of a multiple may be: its rounding is as if z itself had moved by as much."""
    if act.name != "sin" or act.scalars[0] == 1:
        return z
    return Bounded(z.value, z.error + gamma(1, dtype) * (z.value.abs() + z.error))


def activated(z: Bounded, act: Activation, dtype: torch.dtype) -> Bounded:
    finfo = torch.finfo(working(dtype))
    if act.name == "identity":
        return z
    z = multiplied(z, act, dtype)
    values, slopes = z.curve(act)
    y, change = values[0], largest_change(values)
    scale = y.abs() + z.value.abs() * slopes[0].abs()
    # The reference is torch in float64, and its own formulas cancel (1 + erf(z), say).
    reference_error = torch.finfo(torch.float64).eps * (1 + z.value.abs()) * (1 + steepest(act))
    return Bounded(y, change + ULPS * (finfo.eps * scale + reference_error) + finfo.tiny)


def differentiated(g: Bounded, z: Bounded, act: Activation, dtype: torch.dtype) -> Bounded:
    """g act'(z), where a kernel may take the derivative from its own rounded output."""
    finfo = torch.finfo(working(dtype))
    if act.name == "identity":
        return g
    z = multiplied(z, act, dtype)
    values, slopes = z.curve(act)
    d, change = slopes[0], largest_change(slopes)
    error = change + ULPS * finfo.eps * (1 + z.value.abs() * steepest(act)).clamp(max=1 + steepest(act))
    # Derivatives that are taken from the output y change by at most 2 |y| where y changes by |y|.
    error = error + finfo.eps * d.abs() + 2 * torch.finfo(dtype).eps * values[0].abs().clamp(max=1 + steepest(act))
    carried = g.error * (d.abs() + error)
    return Bounded(g.value * d, g.value.abs() * error + carried + finfo.tiny)


def column_sums(x: Bounded, dtype: torch.dtype) -> Bounded:
    n = x.value.shape[0]
    return Bounded(x.value.sum(0), gamma(n, dtype) * (x.value.abs() + x.error).sum(0) + x.error.sum(0))


def dropped(x: Bounded, noise: Tensor | None, dtype: torch.dtype) -> Bounded:
    """x times what dropout multiplies it with, which is exact, rounded once; x itself where there is no dropout."""
    if noise is None:
        return x
    value = x.value * noise.double()
    return Bounded(value, x.error * noise.double() + rounding(value, dtype))


@dataclass
class Expected:
    """What a forward and a backward pass should give; gradients in the order input, parameters."""

    output: Bounded
    gradients: list[Bounded]


def network(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[Activation],
    grad: Tensor | Callable[[Bounded], Bounded],
    rounds_sums: bool = False,
    noises: Sequence[Tensor | None] | None = None,
) -> Expected:
    """Bounds for two-dimensional arguments, whose dtype is the one computed in.

    The gradient with respect to the output is given, or follows from the output. With `rounds_sums` a pre-activation
    is stored before the activation is computed from it, as PyTorch does, and as fastmlp does where PyTorch's library
    multiplies. `noises` is for each layer None, or what dropout multiplies its output with.
    """
    dtype = input.dtype
    noises = noises or [None] * len(weights)
    output = Bounded.exact(input)
    # What backward sees: pre-activations as they are stored, and outputs computed from those again.
    xs: list[Bounded] = [output]
    zs: list[Bounded] = []
    for weight, bias, act, noise in zip(weights, biases, activations, noises, strict=True):
        more = None if bias is None else bias.detach().double()
        z = product(output, Bounded.exact(weight.t()), dtype, more)
        if rounds_sums:
            z = stored(z, dtype)
        output = dropped(activated(z, act, dtype), noise, dtype)
        if len(zs) + 1 < len(weights):
            output = stored(output, dtype)
        zs.append(stored(z, dtype))
        # What is stored as it is has the same output again.
        if zs[-1] is z and working(dtype) == dtype:
            xs.append(output)
        else:
            xs.append(stored(dropped(activated(zs[-1], act, dtype), noise, dtype), dtype))
    g = Bounded.exact(grad) if isinstance(grad, Tensor) else grad(output)
    backwards: list[Bounded] = []
    for layer in reversed(range(len(weights))):
        dz = differentiated(dropped(g, noises[layer], dtype), zs[layer], activations[layer], dtype)
        if activations[layer].name != "identity":
            dz = stored(dz, dtype)
        if biases[layer] is not None:
            backwards.append(column_sums(dz, dtype))
        transposed = Bounded(dz.value.t(), dz.error.t())
        backwards.append(product(transposed, xs[layer], dtype))
        g = product(dz, Bounded.exact(weights[layer]), dtype)
        if layer > 0:
            g = stored(g, dtype)
    return Expected(output, [g, *reversed(backwards)])


def assert_within(found: Tensor, expected: Bounded, what: str) -> None:
    """The reference itself is computed in float64, so there both sides may err."""
    assert found.shape == expected.value.shape, f"{what}: {found.shape} for {expected.value.shape}"
    allowed = expected.error * (2 if found.dtype == torch.float64 else 1)
    allowed = allowed + rounding(expected.value, found.dtype) * (1 + torch.finfo(found.dtype).eps)
    excess = (found.double() - expected.value).abs() - allowed
    assert not torch.isnan(found).any(), f"{what} holds NaN"
    if excess.numel():
        worst = excess.argmax()
        assert excess.max() <= 0, (
            f"{what}: at {worst.item()} {found.flatten()[worst].item():.9g} for "
            f"{expected.value.flatten()[worst].item():.9g}, allowed {allowed.flatten()[worst].item():.3g}"
        )


def of_softmax(head: str, z: Tensor) -> Bounded:
    """The softmax of rows, or its logarithm, of a last layer that is exact.

    An exponential errs by what its argument, a difference of two numbers, was rounded by, and by some units in the last
    place; a sum of them by no more than each, and the logarithm of the sum by as much, absolutely.
    """
    eps = torch.finfo(working(z.dtype)).eps
    exact = z.double()
    spread = exact.amax(1, keepdim=True) - exact
    of_exponential = eps * (spread + ULPS)
    # A summand counts by its share, and s e^-s is below 1 for any spread s.
    of_sum = eps * (ULPS + z.shape[1])
    if head == "softmax":
        value = exact.softmax(1)
        return Bounded(value, value * (of_exponential + of_sum + eps) + torch.finfo(working(z.dtype)).tiny)
    value = exact.log_softmax(1)
    return Bounded(value, eps * (spread + value.abs()) + of_sum)

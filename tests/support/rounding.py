"""How far rounding may take what a model computes, found by running the model.

A converted model differs from the one that it was made of in its products, sums and activations only, a training
step in losses and optimizers too. So the model is run again by PyTorch with each of those results moved by as much as
rounding may move it, in directions drawn at random, forward, backward and through every step. How far that moves a
result is how far rounding may. There are no tolerances to tune.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.bounds import ULPS, gamma

#: How many runs there are, each with random directions of its own. For each tensor the largest change counts.
PROBES = 5

Results = Mapping[str, Tensor]


class Rounding(TorchDispatchMode):
    """Moves the results of operations by bounds on their errors, those of `tests/support/bounds.py`."""

    def __init__(self, seed: int, steps: bool) -> None:
        super().__init__()
        self.steps = steps
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.steps and func in UPDATES:
            for moved in args[0] if isinstance(args[0], list) else [args[0]]:
                # The count of steps, which optimizers keep as a float32 without dimensions, is exact.
                if moved.is_floating_point() and moved.dim() > 0:
                    torch.ops.aten.add_(moved, self.signs(moved) * _relative(moved))
            return output
        error = (STEPS if self.steps else LAYERS).get(func)
        if error is None:
            return output
        if isinstance(output, tuple):
            if func == _aten.native_batch_norm.default and args[5]:
                self._move_statistics(*args)
            first = output[0]  # none where no gradient of the input is asked for
            return first if first is None else first + self.signs(first) * error(first, *args), *output[1:]
        return output + self.signs(output) * error(output, *args) if output.is_floating_point() else output

    def _move_statistics(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> None:
        """Moves running statistics by the errors of the mean and of squares of deviations from it, and by their own."""
        dims, terms = _all_but_channels(x), gamma(x.numel() // x.shape[1] + 2, x.dtype)
        of_mean = terms * x.abs().mean(dims)
        deviation = x.std(dims) + of_mean
        for statistic, error in (
            (mean, of_mean),
            (variance, 2 * of_mean * deviation + terms * deviation.square()),
        ):
            if statistic is not None:
                moved = self.signs(statistic) * (momentum * error + _relative(statistic))
                torch.ops.aten.add_(statistic, moved)

    def signs(self, like: Tensor) -> Tensor:
        return torch.randint(0, 2, like.shape, generator=self.generator) * 2 - 1


def _product(output: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return gamma(a.shape[1] + 1, output.dtype) * (a.abs() @ b.abs())


def _product_and_bias(output: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return gamma(a.shape[1] + 2, output.dtype) * (a.abs() @ b.abs() + bias.abs())


def _column_sums(output: Tensor, x: Tensor, dim: Sequence[int], keepdim: bool = False) -> Tensor:
    return gamma(x.numel() // max(output.numel(), 1), output.dtype) * x.abs().sum(list(dim), keepdim)


def _relative(output: Tensor, *args: Any) -> Tensor:
    return ULPS * torch.finfo(output.dtype).eps * output.abs()


def _sum_with_product(output: Tensor, x: Tensor, a: Tensor, b: Tensor, value: float = 1) -> Tensor:
    return gamma(3, output.dtype) * (x.abs() + abs(value) * (a * b).abs())


def _relative_to_the_first(output: Tensor, x: Tensor, *args: Any) -> Tensor:
    """A share of the first argument: for derivatives times gradients, and for GELU, which keeps its error."""
    return ULPS * torch.finfo(output.dtype).eps * x.abs()


def _absolute(output: Tensor, *args: Any) -> Tensor:
    return ULPS * torch.finfo(output.dtype).eps * torch.ones_like(output)


def _normalised(output: Tensor, x: Tensor, sizes: Sequence[int], *args: Any) -> Tensor:
    """A share of the largest entry too, because the mean is subtracted from each, and that difference is rounded."""
    dims = list(range(-len(sizes), 0))
    return gamma(math.prod(sizes) + ULPS, output.dtype) * output.abs().amax(dims, keepdim=True)


def _normalised_backward(output: Tensor, grad: Tensor, x: Tensor, sizes: Sequence[int], *args: Any) -> Tensor:
    return _normalised(output, x, sizes)


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _batch_normalised(output: Tensor, x: Tensor, *args: Any) -> Tensor:
    """As `_normalised`, of channels."""
    dims = _all_but_channels(x)
    return gamma(x.numel() // x.shape[1] + ULPS, output.dtype) * output.abs().amax(dims, keepdim=True)


def _batch_normalised_backward(output: Tensor, grad: Tensor, *args: Any) -> Tensor:
    return _batch_normalised(output, grad)


def _sum(output: Tensor, x: Tensor, *args: Any) -> Tensor:
    return gamma(x.numel() + ULPS, output.dtype) * x.abs().sum()


def _mean(output: Tensor, x: Tensor, *args: Any) -> Tensor:
    return _sum(output, x) / x.numel()


def _relative_and_sum(output: Tensor, x: Tensor, *args: Any) -> Tensor:
    """For a mean or sum of terms of one sign, each of which was computed to some units in the last place."""
    return gamma(x.numel() + 2 * ULPS, output.dtype) * output.abs()


def _log_softmax(output: Tensor, x: Tensor, dim: int, *args: Any) -> Tensor:
    """A share of the largest logit too, because it is subtracted from each, and that difference is rounded."""
    return gamma(x.shape[dim] + 2 * ULPS, output.dtype) * (output.abs() + x.abs().amax(dim, keepdim=True))


def _log_softmax_backward(output: Tensor, grad: Tensor, logarithms: Tensor, dim: int, *args: Any) -> Tensor:
    sums = grad.abs().sum(dim, keepdim=True)
    return gamma(grad.shape[dim] + 2 * ULPS, output.dtype) * (grad.abs() + logarithms.exp() * sums)


_aten = torch.ops.aten

#: The operations that optimizers are made of. Each changes the tensors that are its first argument.
UPDATES: frozenset[Any] = frozenset(
    getattr(getattr(_aten, name), overload)
    for name, overloads in {
        "add_": ("Tensor",),
        "mul_": ("Tensor",),
        "lerp_": ("Scalar",),
        "addcmul_": ("default",),
        "addcdiv_": ("default",),
        "sqrt_": ("default",),
        "_foreach_add_": ("List", "Scalar"),
        "_foreach_mul_": ("Scalar", "Tensor"),
        "_foreach_div_": ("ScalarList",),
        "_foreach_lerp_": ("Scalar",),
        "_foreach_addcmul_": ("Scalar",),
        "_foreach_addcdiv_": ("Scalar", "ScalarList"),
        "_foreach_sqrt_": ("default",),
    }.items()
    for overload in overloads
)

#: The operations that a converted model computes by kernels of ours, and a bound on the error of each.
LAYERS: Mapping[Any, Callable[..., Tensor]] = {
    _aten.mm.default: _product,
    _aten.addmm.default: _product_and_bias,
    _aten.sum.dim_IntList: _column_sums,
    _aten.tanh.default: _relative,
    _aten.gelu.default: _relative_to_the_first,
    _aten.tanh_backward.default: _relative_to_the_first,
    _aten.gelu_backward.default: _relative_to_the_first,
    # Second derivatives are made of these.
    _aten.mul.Tensor: _relative,
}

#: What a training step computes, besides `UPDATES`.
STEPS: Mapping[Any, Callable[..., Tensor]] = {
    **LAYERS,
    _aten.sigmoid.default: _relative,
    _aten.sigmoid_backward.default: _relative_to_the_first,
    _aten.silu.default: _relative_to_the_first,
    _aten.silu_backward.default: _relative_to_the_first,
    _aten.elu.default: _relative_to_the_first,
    _aten.celu.default: _relative_to_the_first,
    _aten.elu_backward.default: _relative_to_the_first,
    # Gradients of losses are made of these.
    _aten.div.Tensor: _relative,
    _aten.sub.Tensor: _relative,
    _aten.add.Tensor: _relative,
    # What losses of users are made of.
    **dict.fromkeys(
        (
            _aten.add.Scalar,
            _aten.div.Scalar,
            _aten.mul.Scalar,
            _aten.rsub.Scalar,
            _aten.sub.Scalar,
            _aten.exp.default,
            _aten.log.default,
            _aten.pow.Tensor_Scalar,
            _aten.reciprocal.default,
            _aten.rsqrt.default,
            _aten.softplus_backward.default,
            _aten.std.correction,
        ),
        _relative,
    ),
    # Kernels reduce the angle, whose rounding is a share of one.
    _aten.sin.default: _absolute,
    _aten.cos.default: _absolute,
    _aten.native_layer_norm.default: _normalised,
    _aten.native_layer_norm_backward.default: _normalised_backward,
    _aten.native_batch_norm.default: _batch_normalised,
    _aten.native_batch_norm_backward.default: _batch_normalised_backward,
    # Steps of RMSprop too.
    _aten.addcmul.default: _sum_with_product,
    _aten.sqrt.default: _relative,
    # Losses and norms.
    _aten.sum.default: _sum,
    _aten.mean.default: _mean,
    _aten.mse_loss.default: _relative_and_sum,
    _aten.huber_loss.default: _relative_and_sum,
    _aten.smooth_l1_loss.default: _relative_and_sum,
    _aten.binary_cross_entropy_with_logits.default: _relative_and_sum,
    _aten.binary_cross_entropy.default: _relative_and_sum,
    _aten.mse_loss_backward.default: _relative,
    _aten.huber_loss_backward.default: _relative,
    _aten.smooth_l1_loss_backward.default: _relative,
    _aten.binary_cross_entropy_backward.default: _relative,
    _aten._log_softmax.default: _log_softmax,
    _aten._log_softmax_backward_data.default: _log_softmax_backward,
    _aten.nll_loss_forward.default: _relative_and_sum,
    _aten.linalg_vector_norm.default: _relative_and_sum,
}


def rounding_bounds(
    run: Callable[[], Results], found: Results, steps: bool = False, probes: int = PROBES
) -> dict[str, Tensor]:
    """How far apart two implementations of a computation may be, for each of its results.

    Args:
        run: computes them afresh.
        found: what it computes when nothing is moved.
        steps: whether losses and optimizers are implemented anew too, and not only layers.
        probes: how many runs there are. Fewer make narrower bounds.

    Returns:
        A number for each, the largest that an entry may differ by. Both sides may err, so it is twice the largest
        change that was seen.
    """
    bounds = {name: torch.zeros((), dtype=torch.float64) for name in found}
    for seed in range(probes):
        with Rounding(seed, steps):
            moved = run()
        for name, value in found.items():
            bounds[name] = torch.maximum(bounds[name], 2 * distance(moved[name], value))
    return bounds


def distance(a: Tensor, b: Tensor) -> Tensor:
    """The largest difference between entries of the two tensors; NaN if an entry is NaN."""
    return (a.double() - b.double()).abs().max()

"""Steps of optimizers, each compared with its formula; and parameters and optimizers for them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmlp import optim
from tests.support.intervals import Arithmetic, Interval
from tests.support.training import Optimizer, optimizer_of

#: Options with which each optimizer keeps all the kinds of state that it can.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01},
    "RMSprop": {"lr": 0.001, "momentum": 0.9, "centered": True},
}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((5, 3), (7,), (), (2, 3, 4))]


def made(name: str, params: Any, module: Any = optim, **more: Any) -> Optimizer:
    return optimizer_of(module, name, ARGUMENTS[name] | more, params)


def set_gradients(params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = torch.randn_like(p)


def numbers(x: Tensor) -> Tensor:
    """The values without gaps between them, whatever the strides."""
    return x.detach().contiguous()


def checked_step(
    optimizer: Optimizer,
    what: str = "",
    step: Callable[[], Any] | None = None,
    scale: float = 1,
    leave: Sequence[Tensor] = (),
) -> None:
    """A step, and whether all that it wrote lies within the bounds of `tests/support/intervals.py`.

    Args:
        optimizer: an SGD, Adam, AdamW or RMSprop.
        what: for messages.
        step: how to step, if not by `optimizer.step`.
        scale: a power of two, that gradients are multiplied with and the step divides by.
        leave: parameters that are not checked.
    """
    expected = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            if any(p is other for other in leave):
                continue
            kept = optimizer.state.get(p, {})
            if p.grad is None:
                expected.append((p, (Interval.exact(numbers(p)), dict(kept))))
                continue
            state = {key: Interval.exact(numbers(x)) for key, x in kept.items() if x is not None}
            value, grad = Interval.exact(numbers(p)), Interval.exact(numbers(p.grad)).times(1 / scale)
            expected.append((p, Arithmetic(p.dtype).step(optimizer, group, value, grad, state)))
    graded = {p for p, _ in expected if p.grad is not None}
    (step or optimizer.step)()
    for i, (p, (value, after)) in enumerate(expected):
        found: Mapping[str, Any] = {key: x for key, x in optimizer.state.get(p, {}).items() if x is not None}
        assert set(found) == set(after), f"{what}: state of {i}"
        for key, kept in after.items():
            if p in graded:
                kept.check(numbers(found[key]), f"{what}: {key} of {i}")
            else:
                assert found[key] is kept, f"{what}: {key} of {i}"
        value.check(numbers(p), f"{what}: parameter {i}")


def form(x: Any) -> Any:
    """What a `state_dict` consists of, without numbers: keys in their order, types, dtypes and shapes."""
    if isinstance(x, Tensor):
        return type(x), x.dtype, x.shape, x.device, x.requires_grad
    if isinstance(x, dict):
        # Entries in their order, and parameters, which a state_dict has by number, in theirs.
        items = sorted(x.items()) if all(isinstance(key, int) for key in x) else x.items()
        return [(key, form(value)) for key, value in items]
    return [form(value) for value in x] if isinstance(x, (list, tuple)) else (type(x), x)

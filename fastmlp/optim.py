"""PyTorch's optimizers, each step one call into the extension.

Subclasses of those of `torch.optim`, with the same arguments and the same `state_dict`: a checkpoint of one loads into
the other. They move the parameters of any model. What the kernels do not take (parameters that are complex, not on the
CPU, of a subclass of `torch.Tensor` or not dense, sparse gradients, and groups with `capturable` or `differentiable`)
is moved by PyTorch's own step, in the same call; by the one that is not fused, since PyTorch's fused step of
the CPU is wrong for memory with gaps. So is everything where the first parameter is not on the CPU, as of a
model on a GPU, and while a hook, a profiler or `torch.compile` watches.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from fastmlp._load import _C

__all__ = ["SGD", "Adam", "AdamW", "RMSprop"]

#: Of each class the number of the rule by which it moves parameters, and whether that counts its steps: then it keeps
#: a state for every parameter that has a gradient. Of other rules only the step knows which parameters have one.
RULES: dict[str, tuple[int, bool]] = {
    name: (rule, counts) for rule, (names, counts) in enumerate(_C.rules()) for name in names
}

_C.register_optimizer_hooks((torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks))


def _step(base: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """The method `step` of a subclass of `base`."""
    rule, counts = RULES[base.__name__]
    # As the base class has it, with its hooks and its record for profilers.
    base_step: Any = base.step
    watched = base_step if hasattr(base_step, "hooked") else torch.optim.Optimizer.profile_hook_step(base_step)

    def step(self: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        """As the `step` of the class in `torch.optim`."""
        if torch.compiler.is_compiling():
            return watched(self, closure)
        loss = None
        if closure is not None:
            if _C.is_step_watched(self):
                return _step_of_torch(self, watched, closure)
            with torch.enable_grad():
                loss = closure()
        left = _C.step_optimizer(self, rule, False)
        if left is None:
            _step_of_torch(self, watched)
        elif left:
            begun = _begin_states(self)
            try:
                _step_of_others(self, watched, left)
                _C.step_optimizer(self, rule, True)
            finally:
                if not counts:
                    _drop_empty_states(self, begun)
        return loss

    step.__qualname__ = f"{base.__name__}.step"
    # Or torch would wrap it, to call hooks.
    step.hooked = True  # type: ignore[attr-defined]
    return step


def _step_of_torch(optimizer: torch.optim.Optimizer, step: Callable[..., Any], *closure: Callable[[], Any]) -> Any:
    result = step(optimizer, *closure)
    # Torch's fused kernels do not count the versions of what they write.
    moved = [p for group in optimizer.param_groups if group.get("fused") for p in group["params"] if p.grad is not None]
    torch.autograd.graph.increment_version(moved)
    return result


def _begin_states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Gives every parameter that moves an empty state, so that states come in the order in which torch makes them.

    Returns:
        The parameters that had none.
    """
    begun = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and parameter not in optimizer.state:
                optimizer.state[parameter] = {}
                begun.append(parameter)
    return begun


def _drop_empty_states(optimizer: torch.optim.Optimizer, begun: list[Tensor]) -> None:
    for parameter in begun:
        if parameter in optimizer.state and not optimizer.state[parameter]:
            del optimizer.state[parameter]


def _step_of_others(optimizer: torch.optim.Optimizer, step: Callable[..., Any], left: list[Tensor]) -> None:
    """PyTorch's step for these parameters alone: it passes over what has no gradient.

    Its fused step reads and writes memory as if it had no gaps, which the memory of these may have.
    """
    others = {id(parameter) for parameter in left}
    fused = [(group, group["fused"]) for group in optimizer.param_groups if "fused" in group]
    hidden = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and id(parameter) not in others:
                hidden.append((parameter, parameter.grad))
    try:
        for group, _ in fused:
            group["fused"] = False
        for parameter, _ in hidden:
            parameter.grad = None
        _step_of_torch(optimizer, step)
    finally:
        for group, was in fused:
            group["fused"] = was
        for parameter, grad in hidden:
            parameter.grad = grad


class _Fast(torch.optim.Optimizer):
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Optimizer.zero_grad`."""
        if set_to_none and not torch.compiler.is_compiling() and not _C.is_step_watched(self):
            _C.drop_grads(self)
        else:
            super().zero_grad(set_to_none)


class SGD(_Fast, torch.optim.SGD):
    """`torch.optim.SGD`, faster.

    Arguments, `state_dict` and results (within rounding) are those of `torch.optim.SGD`, which see.

    Example:
        >>> parameter = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = SGD([parameter], lr=0.5)
        >>> parameter.sum().backward()
        >>> optimizer.step()
        >>> parameter.data
        tensor([0.5000, 0.5000])
    """

    step = _step(torch.optim.SGD)


class Adam(_Fast, torch.optim.Adam):
    """`torch.optim.Adam` (Kingma and Ba, 2015), faster.

    Arguments, `state_dict` and results (within rounding) are those of `torch.optim.Adam`, which see.

    Example:
        >>> parameter = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Adam([parameter], lr=0.25)
        >>> parameter.sum().backward()
        >>> optimizer.step()
        >>> parameter.data
        tensor([0.7500, 0.7500])
        >>> list(optimizer.state[parameter])
        ['step', 'exp_avg', 'exp_avg_sq']
    """

    step = _step(torch.optim.Adam)


class AdamW(_Fast, torch.optim.AdamW):
    """`torch.optim.AdamW` (Loshchilov and Hutter, 2019), faster.

    Arguments, `state_dict` and results (within rounding) are those of `torch.optim.AdamW`, which see.

    Example:
        >>> parameter = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = AdamW([parameter], lr=0.25, weight_decay=1.0)
        >>> parameter.sum().backward()
        >>> optimizer.step()
        >>> parameter.data
        tensor([0.5000, 0.5000])
    """

    step = _step(torch.optim.AdamW)


class RMSprop(_Fast, torch.optim.RMSprop):
    """`torch.optim.RMSprop` (Tieleman and Hinton, 2012), faster.

    Arguments, `state_dict` and results (within rounding) are those of `torch.optim.RMSprop`, which see.

    Example:
        >>> parameter = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = RMSprop([parameter], lr=0.25, alpha=0.75)
        >>> parameter.sum().backward()
        >>> optimizer.step()
        >>> parameter.data
        tensor([0.5000, 0.5000])
    """

    step = _step(torch.optim.RMSprop)

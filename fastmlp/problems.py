"""Why a model, a loss and an optimizer cannot be trained by a `fastmlp.TrainStep`, in words.

Called by `fastmlp/training.py`, which reads here too what it can train: csrc/contract/loss.h and update.h say which
losses and optimizers there are, and what is read of them.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss

from fastmlp import optim, reference
from fastmlp._errors import shortened
from fastmlp._load import _C
from fastmlp.activations import IDENTITY
from fastmlp.chain import Link, Uncompared, ends_of, layers_of, links
from fastmlp.hooks import has_hooks
from fastmlp.linear import Linear
from fastmlp.runs import why_called

__all__ = [
    "CALLS",
    "FORWARDS",
    "FUNCTIONS",
    "LOSSES",
    "OPTIMIZERS",
    "STEPS",
    "TAKEN",
    "ZERO_GRADS",
    "explain",
    "module_of_loss",
    "without_hooks",
]


@dataclass(frozen=True)
class Loss:
    """What is read of a loss.

    Attributes:
        kind: its number.
        number: an attribute that is a number: its name, the least and the most that it may be, and that in words.
        index: the name of an attribute that is an integer.
        unweighted: the name of a buffer that has to be None.
        follows: the activation, or `log_softmax`, that the model has to end with; None for any.
    """

    kind: int
    number: tuple[str, float, float, str] | None
    index: str | None
    unweighted: str | None
    follows: str | None


#: Classes that can be trained with, exactly.
LOSSES: dict[type[nn.Module], Loss] = {
    getattr(nn, name): Loss(kind, number, index, unweighted, follows)
    for kind, (name, number, index, unweighted, follows) in enumerate(_C.losses())
}

#: Functions that compute, with their default arguments, what modules of these classes do.
FUNCTIONS: dict[Callable[..., Any], type[nn.Module]] = {
    F.mse_loss: nn.MSELoss,
    F.l1_loss: nn.L1Loss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
    F.cross_entropy: nn.CrossEntropyLoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.nll_loss: nn.NLLLoss,
}
OPTIMIZERS: dict[type[torch.optim.Optimizer], int] = {
    getattr(module, name): rule for module in (torch.optim, optim) for name, (rule, _) in optim.RULES.items()
}

#: How modules are called, losses compute and optimizers step, unless somebody has replaced that.
CALLS = (nn.Module.__call__, Linear.__call__)
FORWARDS = {kind: kind.forward for kind in LOSSES}
ZERO_GRADS = {kind: kind.zero_grad for kind in OPTIMIZERS}

#: Of the function that the first optimizer of a class puts around the class's step, to call hooks.
_HOOKED = torch.optim.Optimizer.profile_hook_step(lambda self: None).__code__


def without_hooks(step: Any) -> Any:
    """The step that the class was written with."""
    return step.__wrapped__ if getattr(step, "__code__", None) is _HOOKED else step


STEPS = {kind: without_hooks(kind.step) for kind in OPTIMIZERS}

_DTYPES = (torch.float32, torch.float64)

#: The devices that take a step as one operation.
_DEVICES = frozenset(_C.training_devices())
_IN_WORDS = " or ".join(f"the {name.upper()}" for name in _C.training_devices())
_ELSEWHERE = " (for other devices write the loop's four lines, with a fastmlp.Sequential or MLP and any optimizer)"


_CAPTURE = (
    "fastmlp.capture takes loops of any kind: put these lines into a function, and decorate it with @fastmlp.capture"
)


def module_of_loss(loss_fn: Any) -> Any:
    """The module that computes what a function of `torch.nn.functional` does; anything else as it is.

    Example:
        >>> module_of_loss(F.huber_loss), module_of_loss(torch.relu) is torch.relu
        (HuberLoss(), True)
    """
    # What is called as a loss need not be hashable.
    found = [kind for function, kind in FUNCTIONS.items() if function is loss_fn]
    return found[0]() if found else loss_fn


class _Beyond(str):
    """An obstacle to a loop that is right as it is, but that no `TrainStep` is made for."""


def _beyond(problem: str) -> str:
    return _Beyond(problem)


def explain(
    model: nn.Module, loss_fn: nn.Module | Callable[..., Tensor], optimizer: torch.optim.Optimizer
) -> tuple[str, ...]:
    """A sentence for each obstacle, and a last one where `fastmlp.capture` needs no change at all."""
    of_model, of_loss, of_optimizer = _model_problems(model), _loss_problems(loss_fn), _optimizer_problems(optimizer)
    together = [] if of_model or of_loss else _ending_problems(model, module_of_loss(loss_fn))
    together += [] if of_model or of_optimizer else _ownership_problems(model, optimizer)
    found = [*of_model, *of_loss, *of_optimizer, *together]
    beyond = all(isinstance(problem, _Beyond) for problem in found)
    if found and beyond and all(parameter.device.type in _DEVICES for parameter in model.parameters()):
        found.append(_CAPTURE)
    return tuple(map(str, found))


def _model_problems(model: nn.Module) -> list[str]:
    try:
        chain = links(model)
    except TypeError as error:
        if isinstance(error, Uncompared) and (found := _parameter_problems(error.chain)):
            return found
        children = model.named_children() if isinstance(model, nn.Module) else ()
        found = [problem for name, module in children for problem in _child_problems(name, module)]
        text = str(error).removeprefix("fastmlp: ")
        found = found if text in found else [text, *found]
        return [_beyond(problem) for problem in found] if isinstance(model, nn.Module) else found
    called = [
        _beyond(f"{name or 'model'} ({type(module).__name__}) has a __call__ of its own, which would not be called")
        for name, module in model.named_modules()
        if type(module).__call__ not in CALLS and not isinstance(module, fx.GraphModule)
    ]
    return called or _chain_problems(layers_of(chain)) or _parameter_problems(chain) or _norm_problems(chain)


def _child_problems(name: str, module: nn.Module) -> list[str]:
    try:
        return [
            f"{link.name} ({type(link.module).__name__}) cannot run with the others: {reason}"
            for link in layers_of(links(module, name))
            if (reason := _obstacle(link.module)) is not None
        ]
    except TypeError as error:
        return [str(error).removeprefix("fastmlp: ")]


def _chain_problems(chain: Sequence[Link]) -> list[str]:
    found = []
    for name, module in chain:
        reason = _obstacle(module)
        if reason is not None:
            text = f"{name or 'model'} ({type(module).__name__}) cannot run with the others: {reason}"
            found.append(_beyond(text))
    return found if found or chain else ["model has no layers"]


def _obstacle(module: nn.Module) -> str | None:
    """Why a module of a chain is not computed in a step, or None."""
    if type(module) is nn.BatchNorm1d:
        return _norm_obstacle(module)
    if type(module) is not nn.Dropout or module.training is False or module.p == 0:
        return why_called(module)
    if module.inplace is not False:
        return "it works in place, in training mode"
    is_number = isinstance(module.p, (int, float))
    return None if is_number and 0 < module.p <= 1 else f"its p is {shortened(module.p)}, expected a number of 0 to 1"


def _norm_obstacle(norm: nn.BatchNorm1d) -> str | None:
    own = {**norm._parameters, **norm._buffers}
    if not {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"} <= own.keys():
        return "its parameters and buffers are not where torch.nn.BatchNorm1d keeps them"
    if (own["running_mean"] is None) != (own["running_var"] is None):
        return "it has one of running_mean and running_var, expected both or none"
    for name in ("eps", "momentum"):
        number = getattr(norm, name)
        if not (isinstance(number, (int, float)) or (name == "momentum" and number is None)):
            return f"its {name} is {shortened(number)}, expected a number"
    for name in ("training", "track_running_stats"):
        if not isinstance(getattr(norm, name), bool):
            return f"its {name} is {shortened(getattr(norm, name))}, expected True or False"
    return None


def _parameter_problems(chain: Sequence[Link]) -> list[str]:
    found = []
    seen: dict[Tensor, str] = {}
    first: Tensor | None = None
    for link in chain:
        for key, parameter in link.module._parameters.items():
            name = f"{link.name}.{key}".removeprefix(".")
            if parameter is None:
                continue
            first = parameter if first is None else first
            if parameter in seen:
                text = f"{name} is {seen[parameter]} once more, whose gradients would have to be added up"
                found.append(_beyond(text))
            seen.setdefault(parameter, name)
            if _C.has_hooks(parameter):
                found.append(
                    f"{name} has hooks (its own, or of the node of the graph that accumulates its gradient, as "
                    "DistributedDataParallel has them)"
                )
            if not parameter.is_leaf:
                found.append(f"{name} is computed from other tensors")
            if parameter.is_inference():
                found.append(f"{name} was made under torch.inference_mode, where nothing can be trained")
            if parameter.device.type not in _DEVICES:
                found.append(f"{name} is on {parameter.device}, expected {_IN_WORDS}{_ELSEWHERE}")
            elif parameter.device != first.device:
                found.append(
                    f"{name} is on {parameter.device}, expected {first.device}, where the other parameters are"
                )
            if parameter.dtype not in _DTYPES:
                found.append(f"{name} has dtype {parameter.dtype}, expected torch.float32 or torch.float64")
            elif parameter.dtype != first.dtype:
                found.append(
                    f"{name} has dtype {parameter.dtype}, expected that of the other parameters, {first.dtype}"
                )
    if not any(parameter.requires_grad for parameter in seen):
        found.append("no parameter of the model requires a gradient")
    return found or _shape_problems(chain) or _kind_problems(seen)


def _shape_problems(chain: Sequence[Link]) -> list[str]:
    found: list[str] = []
    before: tuple[str, int] | None = None
    for name, module in chain:
        if type(module) is nn.BatchNorm1d:
            before = _norm_shapes(name, module, before, found)
            continue
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is None:
            continue
        own = f"{name}.weight".removeprefix(".")
        if weight.dim() != 2:
            found.append(f"{own} has shape {tuple(weight.shape)}, expected (out_features, in_features)")
            break
        if before is not None and weight.shape[1] != before[1]:
            found.append(
                f"{own} has shape {tuple(weight.shape)}, expected {before[1]} in the last dimension, the {before[0]}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            found.append(
                f"{name}.bias".removeprefix(".")
                + f" has shape {tuple(bias.shape)}, expected ({weight.shape[0]},), the out_features of {own}"
            )
        before = f"out_features of {own}", weight.shape[0]
    return found


def _norm_shapes(
    name: str, norm: nn.BatchNorm1d, before: tuple[str, int] | None, found: list[str]
) -> tuple[str, int] | None:
    """Adds what is wrong with the shapes of a norm; the features that it has, and what says so."""
    for key, vector in _vectors(norm):
        own = f"{name}.{key}".removeprefix(".")
        if vector.dim() != 1 or vector.numel() == 0:
            found.append(f"{own} has shape {tuple(vector.shape)}, expected a number for each of some features")
        elif before is not None and len(vector) != before[1]:
            found.append(f"{own} has shape {tuple(vector.shape)}, expected ({before[1]},), the {before[0]}")
        else:
            before = before or (f"features of {own}", len(vector))
    return before


def _vectors(norm: nn.BatchNorm1d) -> list[tuple[str, Tensor]]:
    """Parameters of a norm, and the statistics that its forward uses."""
    uses = norm.track_running_stats or not norm.training
    buffers = ("running_mean", "running_var") if uses else ()
    own = {**norm._parameters, **{key: norm._buffers[key] for key in buffers}}
    return [(key, vector) for key, vector in own.items() if vector is not None]


def _norm_problems(chain: Sequence[Link]) -> list[str]:
    """What is wrong with the buffers of norms."""
    found: list[str] = []
    seen: dict[Tensor, str] = {}
    first = next(p for link in chain for p in link.module._parameters.values() if p is not None)
    for name, norm in chain:
        if type(norm) is not nn.BatchNorm1d:
            continue
        count = norm._buffers["num_batches_tracked"] if norm.training and norm.track_running_stats else None
        counts = [] if count is None else [("num_batches_tracked", count)]
        for key, buffer in [*_vectors(norm), *counts]:
            own = f"{name}.{key}".removeprefix(".")
            if key in norm._parameters:
                continue
            dtype = torch.int64 if key == "num_batches_tracked" else first.dtype
            if buffer in seen:
                found.append(_beyond(f"{own} is {seen[buffer]} once more, and one step would move it twice"))
            seen.setdefault(buffer, own)
            if buffer.device != first.device:
                found.append(f"{own} is on {buffer.device}, expected {first.device}, where the parameters are")
            if buffer.dtype != dtype:
                found.append(f"{own} has dtype {buffer.dtype}, expected {dtype}")
            if buffer.requires_grad or buffer.is_inference() or not buffer.is_contiguous():
                expected = "a contiguous tensor that requires no gradient, made outside of torch.inference_mode"
                found.append(f"{own} must be {expected}")
            elif (reason := _C.obstacle(buffer.to(first.dtype), ())) is not None:
                found.append(f"{own} must be a plain tensor: {reason}")
            elif key == "num_batches_tracked" and buffer.numel() != 1:
                found.append(f"{own} has shape {tuple(buffer.shape)}, expected one number")
    return found


def _kind_problems(names: Mapping[Tensor, str]) -> list[str]:
    reasons = {name: _C.obstacle(parameter, ()) for parameter, name in names.items()}
    return [f"{name} must be a plain tensor: {reason}" for name, reason in reasons.items() if reason is not None]


def _loss_problems(loss_fn: nn.Module | Callable[..., Tensor]) -> list[str]:
    loss_fn = module_of_loss(loss_fn)
    kind = type(loss_fn)
    if isinstance(loss_fn, type):
        return [f"loss_fn is the class {loss_fn.__name__}, expected an instance of it: {loss_fn.__name__}()"]
    if kind not in LOSSES:
        expected = ", ".join(loss.__name__ for loss in LOSSES)
        given = getattr(loss_fn, "__name__", None) if isinstance(loss_fn, FunctionType) else None
        what = f"the function {given}" if given else f"of type {kind.__name__}"
        functions = ", ".join(function.__name__ for function in FUNCTIONS)
        text = (
            f"loss_fn is {what}, expected exactly one of torch.nn's {expected}, or of torch.nn.functional's {functions}"
        )
        return [_beyond(text) if callable(loss_fn) else text]
    assert isinstance(loss_fn, _Loss)
    found = []
    if kind.forward is not FORWARDS[kind] or "forward" in loss_fn.__dict__:
        found.append(_beyond("the forward of loss_fn was replaced"))
    if kind.__call__ is not CALLS[0]:
        found.append(f"the __call__ of {kind.__name__}, or of torch.nn.Module, was replaced")
    if loss_fn._compiled_call_impl is not None:
        found.append("loss_fn was compiled")
    if has_hooks(loss_fn):
        found.append("loss_fn has hooks")
    if loss_fn.reduction not in ("mean", "sum"):
        found.append(f"loss_fn has the reduction {loss_fn.reduction!r}, expected 'mean' or 'sum'")
    description = LOSSES[kind]
    if description.number is not None:
        name, least, most, expected = description.number
        number = getattr(loss_fn, name)
        if not (isinstance(number, (int, float)) and least <= number <= most):
            found.append(f"loss_fn has the {name} {shortened(number)}, expected {expected}")
        elif isinstance(number, int) and number > sys.float_info.max:
            found.append(f"loss_fn has the {name} {shortened(number)}, expected a number that a float can hold")
    if description.index is not None:
        index = getattr(loss_fn, description.index)
        if not (isinstance(index, int) and -(2**63) <= index < 2**63):
            found.append(f"loss_fn has the {description.index} {shortened(index)}, expected an integer of 64 bits")
    for name in ("weight", "pos_weight"):
        if hasattr(loss_fn, name) and name not in loss_fn._buffers:
            found.append(f"the {name} of loss_fn is not a buffer, expected a buffer or None")
    for name, buffer in loss_fn._buffers.items():
        if buffer is None:
            continue
        if buffer.device.type not in _DEVICES:
            found.append(f"the {name} of loss_fn is on {buffer.device}, expected {_IN_WORDS}")
        elif (reason := _C.obstacle(buffer.float(), ())) is not None:
            found.append(f"the {name} of loss_fn must be a plain tensor: {reason}")
    if description.unweighted is not None and getattr(loss_fn, description.unweighted) is not None:
        text = f"loss_fn has a {description.unweighted} for each element of a batch, expected None"
        found.append(_beyond(text))
    return found


def _optimizer_problems(optimizer: torch.optim.Optimizer) -> list[str]:
    kind = type(optimizer)
    if isinstance(optimizer, type):
        return [f"optimizer is the class {optimizer.__name__}, expected an instance of it, made of model.parameters()"]
    if kind not in OPTIMIZERS:
        *names, last = optim.RULES
        expected = f"exactly an {', '.join(names)} or {last} of torch.optim or fastmlp.optim"
        text = f"optimizer is of type {kind.__name__}, expected {expected}"
        # LBFGS steps by a closure only, which a captured function cannot give it.
        steps = isinstance(optimizer, torch.optim.Optimizer) and not isinstance(optimizer, torch.optim.LBFGS)
        return [_beyond(text) if steps else text]
    found = [
        f"group {i} of optimizer is {name}"
        for i, group in enumerate(optimizer.param_groups)
        for name in ("differentiable", "capturable")
        if group.get(name)
    ]
    if kind.zero_grad is not ZERO_GRADS[kind] or "zero_grad" in optimizer.__dict__:
        found.append("the zero_grad of optimizer was replaced")
    return found


#: What losses that follow an activation or a softmax take, and the loss that takes what the layer before it gives.
TAKEN = {
    "sigmoid": ("probabilities", nn.Sigmoid, nn.BCEWithLogitsLoss),
    "log_softmax": ("logarithms of probabilities", nn.LogSoftmax, nn.CrossEntropyLoss),
}


def _ending_problems(model: nn.Module, loss_fn: nn.Module) -> list[str]:
    chain = links(model)
    head, follows, name = ends_of(chain).head, LOSSES[type(loss_fn)].follows, type(loss_fn).__name__
    if head == "softmax":
        return [_beyond("model ends with a softmax, and no loss of a TrainStep takes probabilities of several classes")]
    if head != "none" and head != follows:
        return [_beyond(f"model ends with the logarithm of a softmax, which {name} does not take: NLLLoss does")]
    last = head if head != "none" else _last_activation(layers_of(chain))
    if follows in (None, last):
        return []
    what, module, other = TAKEN[follows]
    text = f"loss_fn is {name}, which takes {what}, and model does not end with {module.__name__}"
    return [_beyond(f"{text}: {other.__name__} takes what a layer gives")]


def _last_activation(chain: Sequence[Link]) -> str:
    """The name of the activation that nothing follows, "identity" if there is none."""
    for _, module in reversed(chain):
        drops = isinstance(module, nn.Dropout) and module.training and module.p > 0
        if isinstance(module, Linear):
            return module.activation.name
        if drops or isinstance(module, (nn.Linear, nn.BatchNorm1d)):
            break
        if not isinstance(module, (nn.Dropout, nn.Identity)):
            return reference.MODULES[type(module)]
    return IDENTITY.name


def _ownership_problems(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    owned = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    trained = (p for link in links(model) for p in link.module._parameters.values() if p is not None)
    if any(parameter in owned for parameter in trained if parameter.requires_grad):
        return []
    return [
        "optimizer has no parameter of the model that requires a gradient, so that nothing would be trained: make it "
        "of model.parameters()"
    ]

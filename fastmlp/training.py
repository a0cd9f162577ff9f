"""A step of training in one call."""

import inspect
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.loss import _Loss

from fastmlp import optim
from fastmlp._load import _C
from fastmlp.chain import Link, Uncompared, links
from fastmlp.linear import Linear
from fastmlp.runs import Alone, parts, why_called

__all__ = ["TrainStep"]

_LOSSES: dict[type[nn.Module], int] = {
    nn.MSELoss: _C.losses()["mse"],
    nn.L1Loss: _C.losses()["l1"],
    nn.HuberLoss: _C.losses()["huber"],
    nn.BCEWithLogitsLoss: _C.losses()["bce_with_logits"],
    nn.CrossEntropyLoss: _C.losses()["cross_entropy"],
}

_OPTIMIZERS: dict[type[torch.optim.Optimizer], int] = {
    torch.optim.SGD: _C.rules()["sgd"],
    torch.optim.Adam: _C.rules()["adam"],
    torch.optim.AdamW: _C.rules()["adam"],
    optim.SGD: _C.rules()["sgd"],
    optim.Adam: _C.rules()["adam"],
    optim.AdamW: _C.rules()["adam"],
}

#: How modules are called, losses compute and optimizers step, unless somebody has replaced that.
_CALLS = (nn.Module.__call__, Linear.__call__)
_FORWARDS = {kind: kind.forward for kind in _LOSSES}
_ZERO_GRADS = {kind: kind.zero_grad for kind in _OPTIMIZERS}


#: Of the function that the first optimizer of a class puts around the class's step, to call hooks.
_HOOKED = torch.optim.Optimizer.profile_hook_step(lambda self: None).__code__


def _without_hooks(step: Any) -> Any:
    """The step that the class was written with."""
    return step.__wrapped__ if getattr(step, "__code__", None) is _HOOKED else step


_STEPS = {kind: _without_hooks(kind.step) for kind in _OPTIMIZERS}

_DTYPES = (torch.float32, torch.float64)

#: The devices that take a step as one operation.
_DEVICES = frozenset(_C.training_devices())
_IN_WORDS = " or ".join(f"the {name.upper()}" for name in _C.training_devices())
_ELSEWHERE = " (for other devices write the loop's four lines, with a fastmlp.Sequential or MLP and any optimizer)"


def _fixed(name: str, meaning: str) -> Any:
    """An attribute that can be read, and says why it cannot be set."""

    def read(self: "TrainStep") -> Any:
        return self.__dict__[f"_{name}"]

    def refuse(self: "TrainStep", value: object) -> None:
        raise AttributeError(
            f"fastmlp: {name} of a TrainStep cannot be set, since the step was made for what it has: "
            f"make a new TrainStep"
        )

    return property(read, refuse, doc=meaning)


class TrainStep:
    """The four lines of a training loop as one call into the extension.

    `loss = step(input, target)` does what these lines do, on the same parameters and the same state of the optimizer,
    with results that are equal within rounding:

        optimizer.zero_grad()
        loss = loss_fn(model(input), target)
        loss.backward()
        optimizer.step()

    Loop and `TrainStep` may take turns. Everything is read afresh at each call: parameters, learning rates, the
    optimizer's state, modes; so checkpoints, `load_state_dict` and learning rate schedulers work as ever. Only a
    forward that is no container's is recorded once, as by `convert(model, trace=True)`: what it reads of Python
    besides modules, such as `self.flag`, stays as it was. Where hooks want to see the optimizer's step, its `step` was
    replaced, or some parameters are for PyTorch to move, `optimizer.step` is called. What wants to see anything else of
    the loop is refused by name: hooks of modules and of parameters, also those of `DistributedDataParallel`, replaced
    methods, `torch.autograd.detect_anomaly` and `saved_tensors_hooks`. Functions that a loss calls, such as
    `torch.nn.functional.mse_loss`, are not looked at. Memory of a gradient is written again by the next call unless
    somebody else holds it; memory for activations stays with the object. `.grad` holds the gradient also where
    torch's SGD with Nesterov momentum adds the momentum to it in place.

    Args:
        model: a `fastmlp.Sequential`, `MLP` or `Linear`, their counterparts of `torch.nn`, or any module whose forward
            is one chain of layers and activations. Parameters are float32 or float64, each once, and on the CPU: on
            another device the loop's own four lines are the way.
        loss_fn: exactly an `nn.MSELoss`, `L1Loss`, `HuberLoss`, `BCEWithLogitsLoss` (without `weight`) or
            `CrossEntropyLoss`, with the reduction "mean" or "sum".
        optimizer: exactly an `SGD`, `Adam` or `AdamW` of `torch.optim` or `fastmlp.optim`. It has a parameter of the
            model, at least one; those that it lacks get gradients, which are added up, and do not move. Parameters that
            the model does not have keep no gradient, and so do not move.
        max_norm: clips the gradients of the model's parameters as `torch.nn.utils.clip_grad_norm_` does, before the
            optimizer steps. At least 0; infinity clips nothing.
        clip_value: clips them as `torch.nn.utils.clip_grad_value_` does. At least 0.
        accumulate: the optimizer steps at the last of so many calls; the gradients of all of them, each of its loss
            divided by `accumulate`, are summed in `.grad`. `flush` steps before, `restart` begins anew.
        keep_grads: whether each call leaves its gradients in `.grad`, as the loop would. If not, `.grad` of all of the
            model's parameters is None.

    All of them can be read as attributes of the same names, and not be set.

    Raises:
        TypeError: if any of the three is not as above; the message says what would have to change, as `explain` does.
            Also for options of another type.
        ValueError: for options out of range, or that do not go together.

    Shape:
        input (*, in_features); target as `loss_fn` takes it: of the output's shape, or for `CrossEntropyLoss` class
        indices of shape (N) for an output (N, C).

    Example:
        >>> model = nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1))
        >>> step = TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
        >>> input, target = torch.randn(32, 10), torch.zeros(32, 1)
        >>> first = step(input, target)
        >>> bool(step(input, target) < first)
        True
    """

    model = _fixed("model", "The model that is trained.")
    loss_fn = _fixed("loss_fn", "The loss.")
    optimizer = _fixed("optimizer", "The optimizer.")
    max_norm = _fixed("max_norm", "What the norm of the gradients is clipped to, or None.")
    clip_value = _fixed("clip_value", "What each gradient is clipped to, or None.")
    accumulate = _fixed("accumulate", "How many calls make one step of the optimizer.")
    keep_grads = _fixed("keep_grads", "Whether gradients stay in `.grad`.")

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        max_norm: float | None = None,
        clip_value: float | None = None,
        accumulate: int = 1,
        keep_grads: bool = True,
    ) -> None:
        limits = {"max_norm": _limit("max_norm", max_norm), "clip_value": _limit("clip_value", clip_value)}
        if None not in limits.values():
            raise ValueError("fastmlp: max_norm and clip_value were both given, expected one of them")
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or not 1 <= accumulate < 2**63:
            raise ValueError(f"fastmlp: accumulate must be a positive integer, got {accumulate!r}")
        if not isinstance(keep_grads, bool):
            raise TypeError(f"fastmlp: keep_grads must be True or False, got {keep_grads!r}")
        if accumulate > 1 and not keep_grads:
            raise ValueError(
                f"fastmlp: accumulate={accumulate} sums gradients in .grad, which keep_grads=False forbids"
            )
        problems = self.explain(model, loss_fn, optimizer)
        if problems:
            raise TypeError("fastmlp: TrainStep cannot do this loop: " + "; ".join(problems))
        self._model, self._loss_fn, self._optimizer = model, loss_fn, optimizer
        self._max_norm, self._clip_value = limits["max_norm"], limits["clip_value"]
        self._accumulate, self._keep_grads = accumulate, keep_grads
        self._build()

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        """Does one step.

        Args:
            input: (*, in_features), plain, of the parameters' dtype.
            target: as the loss takes it.

        Returns:
            The loss before the step, without a graph: a tensor without dimensions.

        Raises:
            RuntimeError: for arguments that do not belong together, under `torch.no_grad`, `torch.inference_mode` or
                autocast, or if model, loss or optimizer can no longer be run in one call. Nothing has been written
                then.
            IndexError: for a class index out of range.
        """
        loss = self._native.run(input, target)
        return self._run_changed(input, target) if loss is None else loss

    @property
    def waiting(self) -> int:
        """Calls so far whose gradients wait in `.grad` for a step of the optimizer: fewer than `accumulate`."""
        return self._native.waiting

    def flush(self) -> bool:
        """Lets the optimizer step now, with the gradients of the calls since the last step: at an epoch's end, say.

        The loop's counterpart is `optimizer.step()` after clipping, without a further batch. Each of the losses has
        been divided by `accumulate`, however few there were: a short window makes a smaller step (of SGD) than a whole
        one, and no example weighs more than others. Whoever wants the mean over a window of n calls multiplies each
        `.grad` by `accumulate / n` before. The next call begins a new window.

        Returns:
            Whether the optimizer stepped: not if nothing was waiting, as after every `accumulate` calls.

        Example:
            >>> model = nn.Linear(10, 1)
            >>> step = TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), accumulate=4)
            >>> for _ in range(6):
            ...     loss = step(torch.randn(32, 10), torch.zeros(32, 1))
            >>> step.waiting, step.flush(), step.waiting, step.flush()
            (2, True, 0, False)
        """
        if self.waiting == 0:
            return False
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(self.model.parameters(), self.clip_value)
        self.optimizer.step()
        self._native.waiting = 0
        return True

    def restart(self) -> None:
        """Forgets the gradients of the calls since the last step: the next call begins a new window.

        The loop's counterpart is `optimizer.zero_grad()`. Nothing happens if no gradients are waiting.

        Example:
            >>> model = nn.Linear(10, 1)
            >>> step = TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), accumulate=4)
            >>> loss = step(torch.randn(32, 10), torch.zeros(32, 1))
            >>> step.restart()
            >>> step.waiting, model.weight.grad
            (0, None)
        """
        if self.waiting > 0:
            self.optimizer.zero_grad()
            self._native.waiting = 0

    @staticmethod
    def explain(model: nn.Module, loss_fn: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
        """Says what would have to change for a `TrainStep` of these.

        Args:
            model: of any class.
            loss_fn: of any class.
            optimizer: of any class.

        Returns:
            A sentence for each obstacle; none if there is none.

        Example:
            >>> model = nn.Sequential(nn.Linear(10, 50), nn.LayerNorm(50))
            >>> TrainStep.explain(model, nn.MSELoss(), torch.optim.Rprop(model.parameters()))
            ('1 (LayerNorm) cannot be part of a chain of layers: LayerNorm is not a module that is fused', 'optimizer \
is a Rprop, expected exactly an SGD, Adam or AdamW of torch.optim or fastmlp.optim')
        """
        of_model, of_optimizer = _model_problems(model), _optimizer_problems(optimizer)
        together = [] if of_model or of_optimizer else _ownership_problems(model, optimizer)
        return (*of_model, *_loss_problems(loss_fn), *of_optimizer, *together)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_native"}
        return {**state, "_waiting": self._native.waiting}

    def __setstate__(self, state: dict[str, Any]) -> None:
        waiting = state.pop("_waiting")
        self.__dict__.update(state)
        self._build()
        self._native.waiting = waiting

    def __repr__(self) -> str:
        names = (type(part).__name__ for part in (self.model, self.loss_fn, self.optimizer))
        return f"{type(self).__name__}({', '.join(names)})"

    def _run_changed(self, input: Tensor, target: Tensor) -> Tensor:
        problems = self.explain(self.model, self.loss_fn, self.optimizer)
        if not problems:
            # Modules were exchanged for others.
            waiting = self.waiting
            self._build()
            self._native.waiting = waiting
            loss = self._native.run(input, target)
            if loss is not None:
                return loss
            problems = ("something watches the calls of all modules",)
        raise RuntimeError("fastmlp: TrainStep cannot do this step: " + "; ".join(problems))

    def _build(self) -> None:
        chain = links(self.model)
        leaves = {link.module for link in chain}
        holders = {
            module: (
                inspect.getattr_static(type(module), "forward"),
                inspect.getattr_static(type(module), "__call__"),
                *module._modules.values(),
            )
            for module in self.model.modules()
            if module not in leaves
        }
        kind = type(self.optimizer)
        self._native = _C.TrainStep(
            tuple(link.module for link in chain),
            holders,
            self.loss_fn,
            _LOSSES[type(self.loss_fn)],
            self.optimizer,
            _OPTIMIZERS[kind],
            _CALLS[0],
            _FORWARDS[type(self.loss_fn)],
            kind.step if _without_hooks(kind.step) is _STEPS[kind] else None,
            _ZERO_GRADS[kind],
            self.max_norm,
            self.clip_value,
            self.accumulate,
            self.keep_grads,
        )


def _limit(name: str, value: object) -> float | None:
    """A limit of clipping as a float."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"fastmlp: {name} must be a number or None, got {value!r}")
    # Torch takes others too: negative limits change the sign of gradients, and NaN makes all of them NaN.
    if not 0 <= float(value) <= math.inf:
        raise ValueError(f"fastmlp: {name} must be at least 0, got {value!r}")
    return float(value)


def _model_problems(model: nn.Module) -> list[str]:
    try:
        chain = links(model)
    except TypeError as error:
        if isinstance(error, Uncompared) and (found := _parameter_problems(error.chain)):
            return found
        children = model.named_children() if isinstance(model, nn.Module) else ()
        found = [problem for name, module in children for problem in _child_problems(name, module)]
        text = str(error).removeprefix("fastmlp: ")
        return found if text in found else [text, *found]
    called = [
        f"{name or 'model'} ({type(module).__name__}) has a __call__ of its own, which would not be called"
        for name, module in model.named_modules()
        if type(module).__call__ not in _CALLS and not isinstance(module, fx.GraphModule)
    ]
    return called or _chain_problems(chain) or _parameter_problems(chain)


def _child_problems(name: str, module: nn.Module) -> list[str]:
    try:
        return [
            f"{link.name} ({type(link.module).__name__}) cannot run with the others: {reason}"
            for link in links(module, name)
            if (reason := why_called(link.module)) is not None
        ]
    except TypeError as error:
        return [str(error).removeprefix("fastmlp: ")]


def _chain_problems(chain: Sequence[Link]) -> list[str]:
    found = []
    for part in parts({str(i): link.module for i, link in enumerate(chain)}):
        if isinstance(part, Alone):
            name, module = chain[int(part.name)]
            found.append(f"{name or 'model'} ({type(module).__name__}) cannot run with the others: {part.reason}")
    return found if found or chain else ["model has no layers"]


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
                found.append(f"{name} is {seen[parameter]} once more, whose gradients would have to be added up")
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
    found = []
    before = None
    for name, module in chain:
        weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
        if weight is None:
            continue
        own = f"{name}.weight".removeprefix(".")
        if weight.dim() != 2:
            found.append(f"{own} has shape {tuple(weight.shape)}, expected (out_features, in_features)")
            break
        if before is not None and weight.shape[1] != before[1]:
            found.append(
                f"{own} has shape {tuple(weight.shape)}, expected {before[1]} in the last dimension, the out_features "
                f"of {before[0]}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            found.append(
                f"{name}.bias".removeprefix(".")
                + f" has shape {tuple(bias.shape)}, expected ({weight.shape[0]},), the out_features of {own}"
            )
        before = own, weight.shape[0]
    return found


def _kind_problems(names: Mapping[Tensor, str]) -> list[str]:
    reasons = {name: _C.obstacle(parameter, ()) for parameter, name in names.items()}
    return [f"{name} must be a plain tensor: {reason}" for name, reason in reasons.items() if reason is not None]


def _loss_problems(loss_fn: nn.Module) -> list[str]:
    kind = type(loss_fn)
    if kind not in _LOSSES:
        expected = ", ".join(loss.__name__ for loss in _LOSSES)
        return [f"loss_fn is a {kind.__name__}, expected exactly one of torch.nn's {expected}"]
    assert isinstance(loss_fn, _Loss)
    found = []
    if kind.forward is not _FORWARDS[kind] or "forward" in loss_fn.__dict__:
        found.append("the forward of loss_fn was replaced")
    if kind.__call__ is not _CALLS[0]:
        found.append(f"the __call__ of {kind.__name__}, or of torch.nn.Module, was replaced")
    if loss_fn._compiled_call_impl is not None:
        found.append("loss_fn was compiled")
    if loss_fn._forward_hooks or loss_fn._forward_pre_hooks or loss_fn._backward_hooks or loss_fn._backward_pre_hooks:
        found.append("loss_fn has hooks")
    if loss_fn.reduction not in ("mean", "sum"):
        found.append(f"loss_fn has the reduction {loss_fn.reduction!r}, expected 'mean' or 'sum'")
    if isinstance(loss_fn, nn.HuberLoss) and not (isinstance(loss_fn.delta, (int, float)) and loss_fn.delta > 0):
        found.append(f"loss_fn has the delta {loss_fn.delta!r}, expected a positive number")
    if isinstance(loss_fn, nn.CrossEntropyLoss):
        smoothing, ignored = loss_fn.label_smoothing, loss_fn.ignore_index
        if not (isinstance(smoothing, (int, float)) and 0 <= smoothing <= 1):
            found.append(f"loss_fn has the label_smoothing {smoothing!r}, expected 0 to 1")
        if not (isinstance(ignored, int) and -(2**63) <= ignored < 2**63):
            found.append(f"loss_fn has the ignore_index {ignored!r}, expected an integer of 64 bits")
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
    if isinstance(loss_fn, nn.BCEWithLogitsLoss) and loss_fn.weight is not None:
        found.append("loss_fn has a weight for each element of a batch, expected None; pos_weight is taken")
    return found


def _optimizer_problems(optimizer: torch.optim.Optimizer) -> list[str]:
    kind = type(optimizer)
    if kind not in _OPTIMIZERS:
        expected = "exactly an SGD, Adam or AdamW of torch.optim or fastmlp.optim"
        return [f"optimizer is a {kind.__name__}, expected {expected}"]
    found = [
        f"group {i} of optimizer is {name}"
        for i, group in enumerate(optimizer.param_groups)
        for name in ("differentiable", "capturable")
        if group.get(name)
    ]
    if kind.zero_grad is not _ZERO_GRADS[kind] or "zero_grad" in optimizer.__dict__:
        found.append("the zero_grad of optimizer was replaced")
    return found


def _ownership_problems(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    owned = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    trained = (p for link in links(model) for p in link.module._parameters.values() if p is not None)
    if any(parameter in owned for parameter in trained if parameter.requires_grad):
        return []
    return [
        "optimizer has no parameter of the model that requires a gradient, so that nothing would be trained: make it "
        "of model.parameters()"
    ]

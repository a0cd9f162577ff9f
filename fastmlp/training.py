"""A step of training in one call."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from fastmlp import optim
from fastmlp._load import _C
from fastmlp.chain import Link, links
from fastmlp.modules import Alone, parts, why_called

__all__ = ["TrainStep"]

_LOSSES: dict[type[nn.Module], int] = {
    nn.MSELoss: _C.losses()["mse"],
    nn.L1Loss: _C.losses()["l1"],
    nn.HuberLoss: _C.losses()["huber"],
    nn.BCEWithLogitsLoss: _C.losses()["bce_with_logits"],
    nn.CrossEntropyLoss: _C.losses()["cross_entropy"],
}
_FORWARDS = {kind: kind.forward for kind in _LOSSES}

_OPTIMIZERS: dict[type[torch.optim.Optimizer], int] = {
    torch.optim.SGD: _C.rules()["sgd"],
    torch.optim.Adam: _C.rules()["adam"],
    torch.optim.AdamW: _C.rules()["adam"],
    optim.SGD: _C.rules()["sgd"],
    optim.Adam: _C.rules()["adam"],
    optim.AdamW: _C.rules()["adam"],
}

_DTYPES = (torch.float32, torch.float64)

_ELSEWHERE = " (for other devices write the loop's four lines, with a fastmlp.Sequential or MLP and any optimizer)"


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
    besides modules, such as `self.flag`, stays as it was. Where hooks want to see the optimizer's step, or some
    parameters are for PyTorch to move, `optimizer.step` is called. Memory of a gradient is written again by the next
    call unless somebody else holds it; memory for activations stays with the object.

    Args:
        model: a `fastmlp.Sequential`, `MLP` or `Linear`, their counterparts of `torch.nn`, or any module whose forward
            is one chain of layers and activations. Parameters are float32 or float64, each once, and on the CPU: on
            another device the loop's own four lines are the way.
        loss_fn: exactly an `nn.MSELoss`, `L1Loss`, `HuberLoss`, `BCEWithLogitsLoss` (without `weight`) or
            `CrossEntropyLoss`, with the reduction "mean" or "sum".
        optimizer: exactly an `SGD`, `Adam` or `AdamW` of `torch.optim` or `fastmlp.optim`. Parameters that the model
            does not have keep no gradient, and so do not move.
        max_norm: clips the gradients of the model's parameters as `torch.nn.utils.clip_grad_norm_` does, before the
            optimizer steps.
        clip_value: clips them as `torch.nn.utils.clip_grad_value_` does.
        accumulate: the optimizer steps at every so-manieth call; gradients of the calls before it, each of its loss
            divided by `accumulate`, are summed in `.grad`.
        keep_grads: whether each call leaves its gradients in `.grad`, as the loop would. If not, `.grad` is None.

    Raises:
        TypeError: if any of the three is not as above; the message says what would have to change, as `explain` does.
        ValueError: for options that do not go together.

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
        for name, value in (("max_norm", max_norm), ("clip_value", clip_value)):
            if value is not None and not isinstance(value, Real):
                raise TypeError(f"fastmlp: {name} must be a number, got {type(value).__name__}")
        if max_norm is not None and clip_value is not None:
            raise ValueError("fastmlp: max_norm and clip_value were both given, expected one of them")
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"fastmlp: accumulate must be a positive integer, got {accumulate!r}")
        if accumulate > 1 and not keep_grads:
            raise ValueError(
                f"fastmlp: accumulate={accumulate} sums gradients in .grad, which keep_grads=False forbids"
            )
        problems = self.explain(model, loss_fn, optimizer)
        if problems:
            raise TypeError("fastmlp: TrainStep cannot do this loop: " + "; ".join(problems))
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self._options = (max_norm, clip_value, accumulate, keep_grads)
        self._build()

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        """Does one step.

        Args:
            input: (*, in_features), plain, of the parameters' dtype.
            target: as the loss takes it.

        Returns:
            The loss before the step, without a graph: a tensor without dimensions.

        Raises:
            RuntimeError: for arguments that do not belong together, under autocast, or if model, loss or optimizer can
                no longer be run in one call. Nothing has been written then.
            IndexError: for a class index out of range.
        """
        loss = self._native.run(input, target)
        return self._run_changed(input, target) if loss is None else loss

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
        return (*_model_problems(model), *_loss_problems(loss_fn), *_optimizer_problems(optimizer))

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
            waiting = self._native.waiting
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
        holders = {module: tuple(module._modules.values()) for module in self.model.modules() if module not in leaves}
        self._native = _C.TrainStep(
            tuple(link.module for link in chain),
            holders,
            self.loss_fn,
            _LOSSES[type(self.loss_fn)],
            self.optimizer,
            _OPTIMIZERS[type(self.optimizer)],
            type(self.optimizer).step,
            *self._options,
        )


def _model_problems(model: nn.Module) -> list[str]:
    try:
        chain = links(model)
    except TypeError as error:
        children = model.named_children() if isinstance(model, nn.Module) else ()
        found = [problem for name, module in children for problem in _child_problems(name, module)]
        text = str(error).removeprefix("fastmlp: ")
        return found if text in found else [text, *found]
    return _chain_problems(chain) or _parameter_problems(chain)


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
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                found.append(f"{name} has hooks")
            if not parameter.is_leaf:
                found.append(f"{name} is computed from other tensors")
            if parameter.device.type != "cpu":
                found.append(f"{name} is on {parameter.device}, expected the CPU{_ELSEWHERE}")
            if parameter.dtype not in _DTYPES:
                found.append(f"{name} has dtype {parameter.dtype}, expected torch.float32 or torch.float64")
            elif parameter.dtype != first.dtype:
                found.append(
                    f"{name} has dtype {parameter.dtype}, expected that of the other parameters, {first.dtype}"
                )
    if not any(parameter.requires_grad for parameter in seen):
        found.append("no parameter of the model requires a gradient")
    return found


def _loss_problems(loss_fn: nn.Module) -> list[str]:
    kind = type(loss_fn)
    if kind not in _LOSSES:
        expected = ", ".join(loss.__name__ for loss in _LOSSES)
        return [f"loss_fn is a {kind.__name__}, expected exactly one of torch.nn's {expected}"]
    assert isinstance(loss_fn, _Loss)
    found = []
    if kind.forward is not _FORWARDS[kind] or "forward" in loss_fn.__dict__:
        found.append("the forward of loss_fn was replaced")
    if loss_fn._forward_hooks or loss_fn._forward_pre_hooks or loss_fn._backward_hooks or loss_fn._backward_pre_hooks:
        found.append("loss_fn has hooks")
    if loss_fn.reduction not in ("mean", "sum"):
        found.append(f"loss_fn has the reduction {loss_fn.reduction!r}, expected 'mean' or 'sum'")
    if isinstance(loss_fn, nn.CrossEntropyLoss) and not 0 <= loss_fn.label_smoothing <= 1:
        found.append(f"loss_fn has the label_smoothing {loss_fn.label_smoothing}, expected 0 to 1")
    for name, buffer in loss_fn._buffers.items():
        if buffer is not None and buffer.device.type != "cpu":
            found.append(f"the {name} of loss_fn is on {buffer.device}, expected the CPU")
    if isinstance(loss_fn, nn.BCEWithLogitsLoss) and loss_fn.weight is not None:
        found.append("loss_fn has a weight for each element of a batch, expected None; pos_weight is taken")
    return found


def _optimizer_problems(optimizer: torch.optim.Optimizer) -> list[str]:
    if type(optimizer) in _OPTIMIZERS:
        return [
            f"group {i} of optimizer is {name}"
            for i, group in enumerate(optimizer.param_groups)
            for name in ("differentiable", "capturable")
            if group.get(name)
        ]
    expected = "exactly an SGD, Adam or AdamW of torch.optim or fastmlp.optim"
    return [f"optimizer is a {type(optimizer).__name__}, expected {expected}"]

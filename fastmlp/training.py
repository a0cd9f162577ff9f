"""A step of training in one call."""

import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from fastmlp import problems
from fastmlp._load import _C
from fastmlp.chain import AT_ENDS, ends_of, layers_of, links

__all__ = ["TrainStep"]

#: What a step is made of and cannot change, as attributes; their values are kept under the same names after a `_`.
_FIXED = ("model", "loss_fn", "optimizer", "max_norm", "clip_value", "accumulate", "keep_grads")


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

    Loop and `TrainStep` may take turns. Parameters, learning rates, modes and the optimizer's state are read afresh at
    each call, so checkpoints, `load_state_dict` and learning rate schedulers work as ever. One thing is read only once:
    a forward that you wrote yourself (that is, of a class other than a `Sequential`) is recorded, as by
    `convert(model, trace=True)`. What it reads of Python besides modules, such as `self.flag`, stays as it was.

    `optimizer.step` is called where hooks want to see the optimizer's step, where its `step` was replaced, and where
    PyTorch has to move some of the parameters. Whatever wants to see another part of the loop is refused by name: hooks
    of modules and parameters (those of `DistributedDataParallel` too), replaced methods,
    `torch.autograd.detect_anomaly` and `saved_tensors_hooks`. If you replace a function that a loss calls, such as
    `torch.nn.functional.mse_loss`, the `TrainStep` does not see it.

    The next call writes the memory of a gradient again, unless somebody else holds that tensor. Memory for activations
    stays with the object. `.grad` holds the gradient itself; in the loop torch's SGD with Nesterov momentum adds the
    momentum to it in place.

    Args:
        model: a `fastmlp.Sequential`, `MLP` or `Linear`, their counterparts of `torch.nn`, or any module whose forward
            is one chain of layers, activations, `Dropout` and `BatchNorm1d`, each in whatever mode it is at a call. It
            may begin by flattening its input: with a `torch.nn.Flatten()`, or by a call such as `x.flatten(1)` or
            `x.view(x.size(0), -1)`. It may end by giving its output another shape, with a `torch.nn.Flatten` or
            `Unflatten`, or by calls such as `x.squeeze(-1)` and `x.view(-1, 2, 3)`. Parameters are float32 or float64,
            on the CPU, and none of them is used twice; on another device write the loop's four lines. Dropout draws the
            masks that the loop draws, from torch's default generator. Running statistics of norms and
            `num_batches_tracked` move as in the loop. Two things are refused in training mode: a
            `Dropout(inplace=True)`, and a `Dropout` before the first layer if the input has gaps in memory.
        loss_fn: exactly an `nn.MSELoss`, `L1Loss`, `HuberLoss`, `SmoothL1Loss`, `BCEWithLogitsLoss` (without `weight`)
            or `CrossEntropyLoss`, with the reduction "mean" or "sum"; after a `Sigmoid` at the end of the model also a
            `BCELoss` (without `weight`), and after a `LogSoftmax` along the features only an `NLLLoss`. Or one of
            torch.nn.functional's `mse_loss`, `l1_loss`, `huber_loss`, `smooth_l1_loss`,
            `binary_cross_entropy_with_logits`, `cross_entropy`, `binary_cross_entropy` and `nll_loss`, which stand for
            these modules as they are by default.
        optimizer: exactly an `SGD`, `Adam`, `AdamW` or `RMSprop` of `torch.optim` or `fastmlp.optim`. It has at
            least one parameter of the model. Parameters of the model that the optimizer does not have stay as they are,
            and their gradients are added up from call to call, as in the loop. Parameters that only the optimizer has
            get no gradient, so they stay as they are too.
        max_norm: clips the gradients of the model's parameters as `torch.nn.utils.clip_grad_norm_` does, before the
            optimizer steps. At least 0; infinity clips nothing.
        clip_value: clips them as `torch.nn.utils.clip_grad_value_` does. At least 0.
        accumulate: how many calls make one step of the optimizer, which steps at the last of them. Each loss is divided
            by `accumulate`, and gradients are summed in `.grad`. `flush` steps earlier, and `restart` begins anew.
        keep_grads: whether each call leaves its gradients in `.grad`, as the loop would. If not, `.grad` of all of the
            model's parameters is None.

    Each argument can be read as an attribute of its name, and cannot be set.

    Raises:
        TypeError: if any of the three is not as above; the message says what would have to change, as `explain` does.
            Loops with other models, losses and optimizers are what `fastmlp.capture` is for.
            Also for options of another type.
        ValueError: for options out of range, or that do not go together.

    Shape:
        input (*, in_features), or where the model begins by flattening (N, ...) with in_features elements in all
        dimensions after the first together; with a `BatchNorm1d` exactly (N, in_features), and of two rows at least
        where it normalises by the batch; target as `loss_fn` takes it: of the output's shape, or for
        `CrossEntropyLoss` and `NLLLoss` class indices of shape (N) for an output (N, C).

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
        loss_fn: nn.Module | Callable[..., Tensor],
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
        reasons = self.explain(model, loss_fn, optimizer)
        if reasons:
            raise TypeError("fastmlp: TrainStep cannot do this loop: " + "; ".join(reasons))
        self._model, self._loss_fn, self._optimizer = model, loss_fn, optimizer
        self._max_norm, self._clip_value = limits["max_norm"], limits["clip_value"]
        self._accumulate, self._keep_grads = accumulate, keep_grads
        self._build()

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        """Does one step.

        Args:
            input: (*, in_features), or (N, ...) where the model flattens it; plain, of the parameters' dtype.
            target: as the loss takes it.

        Returns:
            The loss before the step, without a graph: a tensor without dimensions.

        Raises:
            RuntimeError: for arguments that do not belong together, under `torch.no_grad`, `torch.inference_mode` or
                autocast, or if model, loss or optimizer can no longer be run in one call. Nothing has been written
                or drawn then. Also, for a `BCELoss`, if an output is NaN, as the loop raises: after its `zero_grad`
                and forward.
            ValueError: for a batch of one row where a `BatchNorm1d` normalises by the batch, as torch raises it.
            IndexError: for a class index out of range.
        """
        loss = self._native.run(input, target)
        return self._run_changed(input, target) if loss is None else loss

    @property
    def waiting(self) -> int:
        """Calls so far whose gradients wait in `.grad` for a step of the optimizer.

        Fewer than `accumulate`, unless the optimizer's own step has raised an error: then `flush` tries again, and so
        does the next call.
        """
        return self._native.waiting

    def flush(self) -> bool:
        """Lets the optimizer step now, with the gradients of the calls since the last step: at an epoch's end, say.

        The loop's counterpart is `optimizer.step()` after clipping, without a further batch. Each of the losses has
        been divided by `accumulate`, however few there were: a short window makes a smaller step (of SGD) than a whole
        one, and no example weighs more than others. To have the mean over a window of n calls, multiply each
        `.grad` by `accumulate / n` first. The next call begins a new window.

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
    def explain(
        model: nn.Module, loss_fn: nn.Module | Callable[..., Tensor], optimizer: torch.optim.Optimizer
    ) -> tuple[str, ...]:
        """Says what would have to change for a `TrainStep` of these.

        Args:
            model: of any class.
            loss_fn: of any class.
            optimizer: of any class.

        Returns:
            A sentence for each obstacle, and a last one where `fastmlp.capture` takes the loop as it is. None if there
            is no obstacle.

        Example:
            >>> model = nn.Sequential(nn.Linear(10, 50), nn.LayerNorm(50))
            >>> reason, instead = TrainStep.explain(model, nn.MSELoss(), torch.optim.Adam(model.parameters()))
            >>> reason
            '1 (LayerNorm) cannot be part of a chain of layers: LayerNorm is not a module that is fused'
            >>> instead.partition(":")[0]
            'fastmlp.capture takes loops of any kind'
        """
        return problems.explain(model, loss_fn, optimizer)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_native"}
        # Copies and pickles of parameters come without `.grad`, of which a window that has begun consists.
        grads = [p.grad for p in self._parameters()] if self.waiting > 0 else []
        return {**state, "_waiting": self.waiting, "_grads": grads}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        waiting, grads = state.pop("_waiting"), state.pop("_grads", [])
        # Earlier versions kept what is fixed under its own name, and the first one the options in a tuple.
        state.update(zip(_FIXED[3:], state.pop("_options", ()), strict=False))
        self.__dict__.update({f"_{name}" if name in _FIXED else name: value for name, value in state.items()})
        self._build()
        parameters = self._parameters()
        for parameter, grad in zip(parameters, grads, strict=False):
            if parameter.grad is None:
                parameter.grad = grad
        # A pickle of an earlier version has lost the gradients of its window, which therefore begins anew.
        self._native.waiting = waiting if any(p.grad is not None for p in parameters) else 0

    def _parameters(self) -> list[Tensor]:
        """Those of the model, then those that only the optimizer has."""
        owned = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return list(dict.fromkeys([*self.model.parameters(), *owned]))

    def __repr__(self) -> str:
        parts = (self.model, problems.module_of_loss(self.loss_fn), self.optimizer)
        return f"{type(self).__name__}({', '.join(type(part).__name__ for part in parts)})"

    def _run_all(self, inputs: Tensor, targets: Tensor, order: Tensor, rows: int) -> Tensor:
        """Does as many steps as there are batches.

        Args:
            inputs: of which `_C.has_plain_rows` is true.
            targets: the same of targets.
            order: indices of rows, int64, on the same device, gapless and in range.
            rows: of them that make a batch. The last one has what is left.

        Returns:
            The losses, of shape (batches).
        """
        losses = self._native.run_all(inputs, targets, order, rows)
        while len(losses) * rows < len(order):
            # A step could not run in one call: done alone, it says why, or makes the native object anew.
            rest = order[len(losses) * rows :]
            batch, rest = rest[:rows], rest[rows:]
            one = self(inputs.index_select(0, batch), targets.index_select(0, batch)).unsqueeze(0)
            losses = torch.cat([losses, one, self._native.run_all(inputs, targets, rest, rows)])
        return losses

    def _run_changed(self, input: Tensor, target: Tensor) -> Tensor:
        reasons = self.explain(self.model, self.loss_fn, self.optimizer)
        if not reasons:
            # Modules were exchanged for others.
            waiting = self.waiting
            self._build()
            self._native.waiting = waiting
            loss = self._native.run(input, target)
            if loss is not None:
                return loss
            reasons = ("something watches the calls of all modules",)
        raise RuntimeError("fastmlp: TrainStep cannot do this step: " + "; ".join(reasons))

    def _build(self) -> None:
        chain = links(self.model)
        leaves = {link.module for link in chain}
        holders: dict[nn.Module, tuple[Any, ...]] = {}
        others: dict[nn.Module, tuple[Any, ...]] = {}
        for module in self.model.modules():
            functions = [inspect.getattr_static(type(module), name) for name in ("forward", "__call__")]
            if module not in leaves:
                holders[module] = (*functions, *module._modules.values())
            elif type(module) in AT_ENDS:
                pairs = ((name, getattr(module, name)) for name in AT_ENDS[type(module)])
                others[module] = (*functions, *(part for pair in pairs for part in pair))
        kind, loss = type(self.optimizer), problems.module_of_loss(self.loss_fn)
        self._native = _C.TrainStep(
            tuple(link.module for link in layers_of(chain)),
            others,
            *ends_of(chain),
            holders,
            loss,
            problems.LOSSES[type(loss)].kind,
            self.optimizer,
            problems.OPTIMIZERS[kind],
            problems.CALLS[0],
            problems.FORWARDS[type(loss)],
            kind.step if problems.without_hooks(kind.step) is problems.STEPS[kind] else None,
            problems.ZERO_GRADS[kind],
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
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"fastmlp: {name} must be a number that a float can hold, got one that is larger") from None
    if not 0 <= number <= math.inf:
        raise ValueError(f"fastmlp: {name} must be at least 0, got {value!r}")
    return number

"""A training by `fastmlp.TrainStep`, and at each of its calls a twin of what it has then, for the loop of PyTorch."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastmlp
from fastmlp.activations import IDENTITY, module_of
from tests.attack import oracle
from tests.attack.cases import Case, attempt
from tests.support.training import OPTIMIZERS, Loop, Optimizer

#: The class of torch for each that a step may be of.
TORCHS: dict[type[Optimizer], type[Optimizer]] = {
    getattr(module, name): getattr(torch.optim, name) for module in (torch.optim, fastmlp.optim) for name in OPTIMIZERS
}


@dataclass
class Side:
    """A model with what trains it.

    Attributes:
        model: whole.
        leaves: one after another.
        optimizer: of some of its parameters.
        loss_fn: as it is called.
        log: what hooks and replaced methods tell.
        kept: what must stay alive for hooks to be called.
    """

    model: nn.Module
    leaves: list[nn.Module]
    optimizer: Optimizer
    loss_fn: nn.Module
    log: list[str] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for leaf in self.leaves for p in leaf.parameters()]


#: Something that watches or replaces a part of the loop, the same on both sides.
Setup = Callable[[Side], None]


@dataclass
class Training:
    """The side under attack.

    Attributes:
        case: that draws.
        side: with the step.
        plain_loss: the loss as it is without whatever watches it.
        options: of the step.
        setups: what was done to the side, to be done to twins.
        risks: what was drawn that a step may refuse.
        calls: that were made.
        skips: whether the optimizer's step was replaced by one that does nothing.
        undo: takes back what was done to classes.
        everywhere: what that tells.
    """

    case: Case
    dtype: torch.dtype
    side: Side
    plain_loss: nn.Module
    options: dict[str, Any]
    step: Any = None
    setups: list[tuple[Setup, Any]] = field(default_factory=list)
    risks: set[str] = field(default_factory=set)
    calls: int = 0
    skips: bool = False
    undo: list[Callable[[], None]] = field(default_factory=list)
    everywhere: list[str] = field(default_factory=list)

    def setup(self, name: str, make: Setup) -> None:
        """Does something to the side, and to all twins from now on."""
        _, error = attempt(lambda: make(self.side))
        if error is not None:
            # torch's schedulers want methods, and are not made where a step is a function already.
            return self.case.note(f"  {type(error).__name__}: {error}")
        self.setups.append((make, name))
        self.risks.add(name)

    @property
    def accumulate(self) -> int:
        return int(self.options.get("accumulate", 1))

    def twin(self) -> tuple[Side, Loop]:
        """A copy of torch's own classes, with the loop at the same call of its window."""
        leaves = [twin_of(leaf) for leaf in self.side.leaves]
        model = nn.Sequential(*leaves)
        copies: dict[Tensor, nn.Parameter] = {}
        for p, q in zip(self.side.parameters, model.parameters(), strict=True):
            copies[p] = q
            q.grad = None if p.grad is None else oracle.twin_of(p.grad)
        optimizer = twin_of_optimizer(self.side.optimizer, copies)
        twin = Side(model, leaves, optimizer, copy.deepcopy(self.plain_loss))
        for make, _ in self.setups:
            make(twin)
        loop = Loop(twin.model, twin.loss_fn, twin.optimizer, **self.options)
        loop.calls = self.calls
        return twin, loop

    def snapshot(self) -> dict[str, object]:
        """All that a call that raises must leave alone."""
        found = oracle.snapshot(self.side.model)
        for i, group in enumerate(self.side.optimizer.param_groups):
            for j, p in enumerate(group["params"]):
                grad = None if p.grad is None else oracle.bytes_of(p.grad)
                state = self.side.optimizer.state.get(p, {})
                found[f"optimizer {i}.{j}"] = (oracle.bytes_of(p), grad, p._version, numbers_of(state))
            found[f"optimizer {i}"] = numbers_of({k: v for k, v in group.items() if k != "params"})
        return found


def numbers_of(found: Any) -> list[object]:
    return [(k, oracle.bytes_of(x) if isinstance(x, Tensor) else repr(x)) for k, x in sorted(found.items())]


def twin_of(leaf: nn.Module) -> nn.Module:
    """A module of torch that computes the same; its parameters are copies."""
    if not isinstance(leaf, nn.Linear):
        made = copy.copy(leaf)
        made.__dict__ = {k: v for k, v in leaf.__dict__.items() if k != "forward"}
        made._parameters = {k: None if p is None else parameter_like(p) for k, p in leaf._parameters.items()}
        made._buffers = {k: None if x is None else oracle.twin_of(x) for k, x in leaf._buffers.items()}
        for key in [key for key in made.__dict__ if key.endswith("_hooks")]:
            made.__dict__[key] = type(made.__dict__[key])()
        return made
    layer = nn.Linear(1, 1, leaf.bias is not None)
    layer.weight = parameter_like(leaf.weight)
    if leaf.bias is not None:
        layer.bias = parameter_like(leaf.bias)
    if isinstance(leaf, fastmlp.Linear) and leaf.activation != IDENTITY:
        return nn.Sequential(layer, module_of(leaf.activation))
    return layer


def parameter_like(p: Tensor) -> nn.Parameter:
    return nn.Parameter(oracle.twin_of(p), p.requires_grad)


def twin_of_optimizer(optimizer: Optimizer, copies: dict[Tensor, nn.Parameter]) -> Optimizer:
    """With the same groups and state; `copies` gets those of parameters that the model does not have."""
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p not in copies:
                copies[p] = parameter_like(p)
                copies[p].grad = None if p.grad is None else oracle.twin_of(p.grad)
        own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
        groups.append({**own, "params": [copies[p] for p in group["params"]]})
    kind: Any = TORCHS[type(optimizer)]
    made: Optimizer = kind(groups, lr=0.1)
    for p, state in optimizer.state.items():
        if p in copies:
            made.state[copies[p]] = {k: oracle.twin_of(x) if isinstance(x, Tensor) else x for k, x in state.items()}
    return made


def owned(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[bool]:
    """Which of the parameters the optimizer has."""
    ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [id(p) in ids for p in parameters]

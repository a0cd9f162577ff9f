"""fastmlp.optim against the formulas of torch.optim: layouts, dtypes, magnitudes, groups, states, hooks, gradients."""

import copy
import pickle
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastmlp
from tests.attack import drawn, oracle
from tests.attack.after import compare, unless_overflowing
from tests.attack.cases import Case, attempt
from tests.support.intervals import Arithmetic, Interval, State
from tests.support.training import FUSED, OPTIMIZERS, Optimizer, draw_optimizer

SHAPES: tuple[tuple[int, ...], ...] = (
    *((), (1,), (1,), (7,), (16,), (67,), (300,), (0,), (3, 0)),
    *((5, 3), (33, 17), (1, 64), (64, 1), (1, 1), (2, 3, 4), (4, 3, 1, 2)),
)
#: Powers of ten of gradients, by dtype.
SIZES: dict[torch.dtype, tuple[int, ...]] = {
    torch.float32: (-30, -22, -19, 10, 18, 19, 20, 25, 37),
    torch.float64: (-200, -160, 100, 153, 155, 160, 300),
    torch.bfloat16: (-15, 10, 19, 25),
    torch.float16: (-6, -4, 3, 4),
}


def play(case: Case) -> None:
    name = case.choice(OPTIMIZERS)
    parameters = drawn_parameters(case)
    optimizer = drawn_optimizer(case, name, parameters)
    log: list[str] = []
    for _ in range(case.choice([2, 3, 5])):
        if case.chance(0.4):
            optimizer = changed(case, optimizer, log)
        gradients(case, optimizer)
        stepped(case, optimizer, log)


def drawn_parameters(case: Case) -> list[nn.Parameter]:
    dtypes = [drawn.dtype(case)] if case.chance(0.8) else [torch.float32, torch.float64, torch.bfloat16]
    found = []
    for _ in range(case.choice([1, 2, 4, 7])):
        shape, dtype = case.choice(SHAPES), case.choice(dtypes)
        x, how = drawn.lay(case, drawn.randn(case, *shape, dtype=dtype), 0.4)
        case.note(f"  {dtype} {how}")
        found.append(nn.Parameter(x))
    return found


def drawn_optimizer(case: Case, name: str, parameters: list[nn.Parameter]) -> Optimizer:
    arguments, other = draw_optimizer(case.random, name), draw_optimizer(case.random, name)
    if case.chance(0.4):
        arguments |= case.choice([{"foreach": True}, {"foreach": False}])
    elif name in FUSED and case.chance(0.1) and all(p.dtype.itemsize > 2 for p in parameters):
        arguments |= {"fused": True}
    if any(p.dtype == torch.float16 for p in parameters) and name != "SGD":
        arguments["eps"] = other["eps"] = 1e-3
    groups = [{"params": parameters[::2]}, {"params": parameters[1::2], **other}][: len(parameters)]
    made: Optimizer = getattr(fastmlp.optim, name)(groups, **arguments)
    case.note(" ".join(str(made).split()))
    return made


def gradients(case: Case, optimizer: Optimizer) -> None:
    """Of any size and layout, some sparse, some None, some with special numbers."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            kind = case.choice(["plain"] * 14 + ["none", "sparse", "special", "large", "large", "zero"])
            grad = drawn.randn(case, *p.shape, dtype=p.dtype) * case.choice([1.0, 1.0, 1e-2, 10.0])
            if kind == "large":
                exponent = case.choice(SIZES[p.dtype])
                grad = (grad.double() * 10.0**exponent).to(p.dtype)
                kind = f"of size 1e{exponent}"
            elif kind == "special":
                grad = drawn.sprinkled(case, grad)
            elif kind == "zero":
                grad = grad * 0
            laid, how = drawn.lay_to_read(case, grad, 0.4)
            # torch adds sparse tensors to tensors at an offset into memory that is not theirs.
            sparse = kind == "sparse" and p.dim() and p.storage_offset() == 0
            p.grad = None if kind == "none" else laid.to_sparse() if sparse else laid
            case.note(f"  gradient {kind} {how}")


def stepped(case: Case, optimizer: Optimizer, log: list[str]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    twin, copies = twin_of(optimizer, parameters)
    bounds = [bound_of(optimizer, p) for p in parameters]
    grads = [None if p.grad is None or p.grad.is_sparse else oracle.bytes_of(p.grad) for p in parameters]
    before = [(oracle.bytes_of(p), p._version) for p in parameters]
    way = case.choice(["step", "step", "step", "closure", "no_grad"])
    case.act("step", way)
    log.clear()
    _, twin_error = attempt(lambda: step_by(twin, way))
    _, error = attempt(lambda: step_by(optimizer, way))
    if twin_error is not None:
        if "single memory location" in str(twin_error):
            # torch's foreach writes Nesterov's sum into gradients, and cannot where they are expanded.
            case.outcomes["torch cannot"] += 1
            return None
        case.require(error is not None, f"PyTorch raises {type(twin_error).__name__}: {twin_error}")
        return case.both_raise(twin_error)
    if error is not None:
        raise error
    case.require(
        log == (["pre", "post"] if log or optimizer_is_watched(optimizer) else []), f"hooks were called so: {log}"
    )
    for i, (p, q) in enumerate(zip(parameters, copies, strict=True)):
        value, states = bounds[i]
        mine, theirs = optimizer.state.get(p, {}), twin.state.get(q, {})
        case.require(list(mine) == list(theirs), f"state {i} has {list(mine)}, PyTorch's {list(theirs)}")
        for key, x in mine.items():
            if isinstance(x, Tensor):
                case.require(x.dtype == theirs[key].dtype, f"{key} {i} has dtype {x.dtype}")
                compare(case, dense(x), states[key], dense(theirs[key]), f"{key} {i} {tuple(p.shape)} by {p.stride()}")
        compare(
            case, p, unless_overflowing(value, states, p.dtype), q, f"parameter {i} {tuple(p.shape)} by {p.stride()}"
        )
        moved = oracle.bytes_of(p) != before[i][0]
        case.require(not moved or p._version > before[i][1], f"parameter {i} moved without a new version")
        if grads[i] is not None:
            assert p.grad is not None
            # torch's own step with foreach writes to gradients, with Nesterov's momentum.
            theirs_too = q.grad is not None and oracle.bytes_of(q.grad) != grads[i]
            case.require(theirs_too or oracle.bytes_of(p.grad) == grads[i], f"gradient {i} was written to")


def optimizer_is_watched(optimizer: Optimizer) -> bool:
    return bool(optimizer._optimizer_step_pre_hooks)


def step_by(optimizer: Optimizer, way: str) -> None:
    if way == "closure":
        optimizer.step(lambda: torch.zeros(()))  # type: ignore[arg-type, return-value]
    elif way == "no_grad":
        with torch.no_grad():
            optimizer.step()
    else:
        optimizer.step()


def bound_of(optimizer: Optimizer, p: nn.Parameter) -> tuple[Interval, State]:
    state = {k: Interval.exact(dense(x)) for k, x in optimizer.state.get(p, {}).items() if isinstance(x, Tensor)}
    value = Interval.exact(p)
    group = next(group for group in optimizer.param_groups if any(p is q for q in group["params"]))
    if p.grad is None:
        return value, state
    value, moved = Arithmetic(p.dtype).step(optimizer, group, value, Interval.exact(dense(p.grad)), state)
    return value, state | moved


def dense(x: Tensor) -> Tensor:
    return x.to_dense() if x.is_sparse else x


def twin_of(optimizer: Optimizer, parameters: list[nn.Parameter]) -> tuple[Optimizer, list[nn.Parameter]]:
    """torch's own class, on copies.

    torch's fused step reads all memory as if it had no gaps, so that parameters, gradients and states that lie
    otherwise give wrong numbers, and loses NaN where amsgrad takes the larger. It is the twin only where fastmlp calls
    it too.
    """
    copies: dict[Tensor, nn.Parameter] = {}
    for p in parameters:
        copies[p] = nn.Parameter(oracle.twin_of(p))
        copies[p].grad = None if p.grad is None else oracle.twin_of(p.grad)
    groups = [
        {k: [copies[p] for p in v] if k == "params" else copy.copy(v) for k, v in group.items()}
        for group in optimizer.param_groups
    ]
    for group in groups:
        if "fused" in group:
            group["fused"] = optimizer_is_watched(optimizer) and group["fused"]
    made: Optimizer = getattr(torch.optim, type(optimizer).__name__)(groups, lr=0.1)
    for key, state in optimizer.state.items():
        made.state[copies[key]] = {k: oracle.twin_of(x) if isinstance(x, Tensor) else x for k, x in state.items()}
    return made, [copies[p] for p in parameters]


# What happens between steps.


def lr_as_tensor(case: Case, optimizer: Optimizer) -> Optimizer:
    for group in optimizer.param_groups:
        group["lr"] = float(group["lr"]) * 0.5
    return optimizer


def group_added(case: Case, optimizer: Optimizer) -> Optimizer:
    optimizer.add_param_group({"params": [nn.Parameter(torch.randn(case.choice(SHAPES)))], "lr": 0.02})
    return optimizer


def loaded(case: Case, optimizer: Optimizer) -> Optimizer:
    """By another optimizer of either module, from either module."""
    module = case.choice([torch.optim, fastmlp.optim])
    groups = [{"params": group["params"]} for group in optimizer.param_groups]
    other: Optimizer = getattr(module, type(optimizer).__name__)(groups, lr=0.3)
    other.load_state_dict(optimizer.state_dict())
    again: Optimizer = getattr(fastmlp.optim, type(optimizer).__name__)(groups, lr=0.7)
    again.load_state_dict(pickle.loads(pickle.dumps(other.state_dict())))
    return again


def state_laid(case: Case, optimizer: Optimizer) -> Optimizer:
    for state in optimizer.state.values():
        for key, x in state.items():
            # The state of sparse gradients is sparse, and lies in no other way.
            if isinstance(x, Tensor) and x.dim() and not x.is_sparse:
                state[key] = drawn.lay(case, x, 0.7)[0]
    return optimizer


def state_gone(case: Case, optimizer: Optimizer) -> Optimizer:
    # torch's fused steps do not survive that.
    if optimizer.state and not any(group.get("fused") for group in optimizer.param_groups):
        optimizer.state.pop(case.choice(list(optimizer.state)))
    return optimizer


def zero_grad(case: Case, optimizer: Optimizer) -> Optimizer:
    optimizer.zero_grad(case.chance(0.5))
    return optimizer


def parameter_laid(case: Case, optimizer: Optimizer) -> Optimizer:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.data = drawn.lay(case, p.detach(), 0.7)[0]
    return optimizer


def rule(case: Case, optimizer: Optimizer) -> Optimizer:
    group = case.choice(optimizer.param_groups)
    key = case.choice(
        [key for key in ("weight_decay", "maximize", "foreach") if key in group and not group.get("fused")] or ["lr"]
    )
    group[key] = not group[key] if key != "lr" and isinstance(group[key], bool) else 0.05 if key != "foreach" else None
    return optimizer


CHANGES: dict[str, Callable[[Case, Optimizer], Optimizer]] = {
    "lr": lr_as_tensor,
    "group added": group_added,
    "state loaded": loaded,
    "memory of the state": state_laid,
    "state gone": state_gone,
    "zero_grad": zero_grad,
    "memory of the parameters": parameter_laid,
    "a rule of a group": rule,
}


def changed(case: Case, optimizer: Optimizer, log: list[str]) -> Optimizer:
    if case.chance(0.1) and not optimizer_is_watched(optimizer):
        case.act("change hooks")
        optimizer.register_step_pre_hook(lambda *args: log.append("pre"))
        optimizer.register_step_post_hook(lambda *args: log.append("post"))
        return optimizer
    name = case.choice(list(CHANGES))
    case.act(f"change {name}")
    return CHANGES[name](case, optimizer)

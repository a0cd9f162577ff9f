"""Forwards as people write them, given to `convert`, its trace, `freeze`, `TrainStep` and to what only looks."""

import copy
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastmlp
from tests.attack import oracle
from tests.attack.cases import Case, Disagreement, attempt
from tests.attack.statements import ARITHMETIC, GRAPHS, ODD, Program, Scaled, Statement
from tests.support.rounding import distance, rounding_bounds
from tests.support.training import Loop

#: Something that gives tensors by name, from a model.
Run = Callable[[nn.Module], Mapping[str, Tensor]]


def play(case: Case) -> None:
    model, odd = program(case)
    ways: dict[str, Callable[[Case, Program, bool], None]] = {
        "trace": traced,
        "convert": converted,
        "freeze": frozen,
        "TrainStep": trained,
        "looking": looked_at,
    }
    # Odd statements are for what records; chains for what takes nothing else.
    way = case.choice(["trace", "trace", "convert", "freeze", "freeze", "TrainStep", "TrainStep", "looking"])
    model.train(case.chance(0.4) and way != "freeze")
    case.act(way, " ".join(statement.__name__ for statement in model.statements))
    case.note(f"{type(model).__name__} of {model.width}, {model.mean.dtype}, training={model.training}")
    ways[way](case, model, odd)


def program(case: Case) -> tuple[Program, bool]:
    dtype = case.choice([torch.float64, torch.float64, torch.float32])
    statements: list[Statement] = [case.choice(ARITHMETIC) for _ in range(case.choice([1, 2, 3]))]
    if case.chance(0.4):
        statements.insert(case.random.randrange(len(statements) + 1), case.choice(GRAPHS))
    odd = case.chance(0.5)
    if odd:
        statements.insert(case.random.randrange(len(statements) + 1), case.choice(ODD))
    kind = Scaled if case.chance(0.15) else Program
    return kind(case.choice([1, 2, 3, 5, 8, 16, 17]), statements, dtype), odd or kind is Scaled


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002


def states() -> tuple[bytes, object, object]:
    """Of all generators."""
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002


def seen(model: Program) -> dict[str, object]:
    """All that a forward may write."""
    found: dict[str, object] = {name: oracle.bytes_of(x) for name, x in model.state_dict().items()}
    return found | {"count": model.count, "seen": len(model.seen), "made": hasattr(model, "made")}


def inputs(case: Case, model: Program) -> tuple[Tensor, ...]:
    rows = case.choice([(), (1,), (2,), (5,), (9,), (2, 3), (0,)])
    if any(statement.__name__ == "batch_normed" for statement in model.statements):
        rows = case.choice([(2,), (5,), (9,)])
    x = torch.randn(*rows, model.width, dtype=model.mean.dtype)
    if isinstance(model, Scaled) and case.chance(0.4):
        return x, torch.full((model.width,), 0.75, dtype=x.dtype)
    return (x,)


def compare(case: Case, native: nn.Module, ours: Callable[[], Mapping[str, Tensor]], run: Run) -> None:
    """What ours gives against what the native model gives, from the same random numbers; the native one moves on."""
    number = case.random.getrandbits(30)
    before = copy.deepcopy(native)

    def again() -> Mapping[str, Tensor]:
        seed(number)
        return run(copy.deepcopy(before))

    seed(number)
    expected, native_error = attempt(lambda: run(native))
    after = states()
    seed(number)
    found, error = attempt(ours)
    if native_error is not None:
        case.require(error is not None, f"PyTorch raises {type(native_error).__name__}: {native_error}")
        return case.both_raise(native_error)
    if error is not None:
        return case.refused(error)
    assert expected is not None
    assert found is not None
    for here, there, name in zip(states(), after, ("torch", "random", "numpy"), strict=True):
        case.require(here == there, f"the generator of {name} is elsewhere after the call")
    case.require(set(found) == set(expected), f"there are {sorted(found)}, PyTorch has {sorted(expected)}")
    regular = {name: x for name, x in expected.items() if x.numel() and x.is_floating_point() and x.isfinite().all()}
    bounds = rounding_bounds(again, regular, steps=True) if regular else {}
    for name, x in expected.items():
        case.require(found[name].shape == x.shape, f"{name} has shape {tuple(found[name].shape)} for {tuple(x.shape)}")
        if name in regular:
            off, allowed = distance(found[name], x), bounds[name] + torch.finfo(x.dtype).tiny
            case.require(bool(off <= allowed), f"{name} differs by {off:.3g}, rounding explains {allowed:.3g}")
    case.agreed()


def forward_and_backward(case: Case, given: tuple[Tensor, ...]) -> Run:
    backward = case.chance(0.5)

    def run(model: nn.Module) -> Mapping[str, Tensor]:
        model.zero_grad()
        output = model(*given)
        found = {"output": output.detach().clone()}
        if backward and output.requires_grad:
            output.sum().backward()
            found |= {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return found

    return run


def recorded(case: Case, model: Program, call: Callable[[], Any], odd: bool, what: str) -> Any:
    """What a call gives that must leave all as it was; None if it is refused."""
    before, generators, written = oracle.snapshot(model), states(), seen(model)
    result, error = attempt(call)
    oracle.unchanged(case, before, what, model)
    case.require(states() == generators, f"{what} has moved a generator")
    case.require(seen(model) == written, f"{what} has changed what the forward writes")
    if error is not None:
        case.refused(error, allowed=odd)
    return result


def traced(case: Case, model: Program, odd: bool) -> None:
    native = copy.deepcopy(model)
    ours = recorded(case, model, lambda: fastmlp.convert(model, trace=True), odd, "convert(trace=True)")
    if ours is None:
        return
    for _ in range(case.choice([2, 3])):
        given = inputs(case, model)
        if case.chance(0.2):
            mode = not native.training
            native.train(mode)
            ours.train(mode)
            case.note(f"  train({mode})")
        run = forward_and_backward(case, given)
        case.act("call", f"{[tuple(x.shape) for x in given]}")
        with torch.set_grad_enabled(not case.chance(0.2)):
            compare(case, native, lambda run=run: run(ours), run)  # type: ignore[misc]
        same_writes(case, native, model)
        native.load_state_dict(model.state_dict())


def same_writes(case: Case, native: Program, model: Program) -> None:
    theirs, mine = seen(native), seen(model)
    loose = {name for name in theirs if name == "mean" or name.startswith("batch_norm.")}
    wrong = [name for name in theirs if theirs[name] != mine[name] and name not in loose]
    case.require(not wrong, f"the call has written {wrong} otherwise than PyTorch's")


def converted(case: Case, model: Program, odd: bool) -> None:
    native = copy.deepcopy(model)
    before = states()
    fastmlp.convert(model)
    case.require(states() == before, "convert has moved a generator")
    case.require(seen(model) == seen(native), "convert has changed what the forward writes")
    for _ in range(case.choice([2, 3])):
        if case.chance(0.2):
            fastmlp.revert(model) if case.chance(0.5) else fastmlp.convert(model)
        if case.chance(0.15):
            model = copy.deepcopy(model)
            case.note("  deepcopy")
        run = forward_and_backward(case, given := inputs(case, model))
        case.act("call", f"{[tuple(x.shape) for x in given]}")
        compare(case, native, lambda run=run, model=model: run(model), run)  # type: ignore[misc]
        same_writes(case, native, model)
        native.load_state_dict(model.state_dict())


def frozen(case: Case, model: Program, odd: bool) -> None:
    native = copy.deepcopy(model)
    chain = is_chain(model, odd)
    ours = recorded(case, model, lambda: fastmlp.freeze(model), not chain, "freeze")
    if ours is None:
        return
    for _ in range(case.choice([2, 3])):
        given = inputs(case, model)
        case.act("call", f"{[tuple(x.shape) for x in given]}")

        def run(network: Any, given: tuple[Tensor, ...] = given) -> Mapping[str, Tensor]:
            with torch.no_grad():
                return {"output": network(*given)}

        if len(given) > 1:
            continue
        compare(case, native, lambda run=run: run(ours), run)  # type: ignore[misc]
        same_writes(case, native, model)


def is_chain(model: Program, odd: bool) -> bool:
    """Layers, each with one activation at most."""
    return not odd and not any(
        statement in GRAPHS or statement.__name__ == "functional" for statement in model.statements
    )


def layers_used(model: Program) -> list[str]:
    used = {"second": "fc2", "in_place": "fc2", "third": "fc3", "container": "children"}
    return [used.get(statement.__name__, "fc1") for statement in model.statements]


def trained(case: Case, model: Program, odd: bool) -> None:
    native = copy.deepcopy(model)
    # A layer that is used twice is refused.
    chain = is_chain(model, odd) and len(set(layers_used(model))) == len(layers_used(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def make() -> Any:
        problems = fastmlp.TrainStep.explain(model, nn.MSELoss(), optimizer)
        step, error = attempt(lambda: fastmlp.TrainStep(model, nn.MSELoss(), optimizer))
        if bool(problems) != (error is not None):
            raise Disagreement(f"explain says {problems}, TrainStep raises {error}")
        if error is not None:
            raise error
        return step

    step = recorded(case, model, make, not chain, "TrainStep")
    if step is None:
        return
    for _ in range(case.choice([2, 3])):
        x = inputs(case, model)[0]
        target = torch.randn_like(x)
        case.act("call", str(tuple(x.shape)))

        def results(network: nn.Module, loss: Tensor) -> Mapping[str, Tensor]:
            return {"loss": loss} | {name: p.detach().clone() for name, p in network.named_parameters()}

        def run(network: nn.Module, x: Tensor = x, target: Tensor = target) -> Mapping[str, Tensor]:
            loop = Loop(network, nn.MSELoss(), torch.optim.SGD(network.parameters(), lr=0.05))
            return results(network, loop(x, target))

        compare(case, native, lambda x=x, target=target: results(model, step(x, target)), run)  # type: ignore[misc]
        same_writes_but_parameters(case, native, model)
        # The bounds are those of one call: the next one begins with the same numbers on both sides.
        native.load_state_dict(model.state_dict())


def same_writes_but_parameters(case: Case, native: Program, model: Program) -> None:
    names = {name for name, _ in native.named_buffers()} - {"mean"} | {"count", "seen", "made"}
    theirs, mine = seen(native), seen(model)
    wrong = [name for name in names if not name.startswith("batch_norm") and theirs[name] != mine[name]]
    case.require(not wrong, f"the call has written {wrong} otherwise than PyTorch's")


def looked_at(case: Case, model: Program, odd: bool) -> None:
    """What only says something changes nothing and does not raise."""
    what: dict[str, Callable[[], Any]] = {
        "fusion_report": lambda: repr(fastmlp.fusion_report(model)),
        "TrainStep.explain": lambda: fastmlp.TrainStep.explain(
            model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1)
        ),
        "explain of a tensor": lambda: fastmlp.explain(inputs(case, model)[0]),
        "explain of a container": lambda: fastmlp.explain(
            fastmlp.Sequential(model.fc1, model.act), torch.ones(1, model.width, dtype=model.mean.dtype)
        ),
    }
    name = case.choice(list(what))
    case.act(f"look: {name}")
    if name == "explain of a tensor":
        torch.manual_seed(0)
        x = inputs(case, model)[0]
        what[name] = lambda: fastmlp.explain(x)
    result = recorded(case, model, what[name], False, name)
    case.require(result is not None, f"{name} gives None")
    case.agreed()

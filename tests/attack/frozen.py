"""Frozen networks: calls of every kind, between which the model changes in every way that a frozen network notices."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastmlp
from tests.attack import drawn, nets, oracle
from tests.attack.cases import REFUSALS, Case, Disagreement, attempt
from tests.attack.changes import CHANGES, Net


@dataclass
class Attack:
    """A frozen network and what it was made of.

    Attributes:
        net: the model.
        frozen: under attack.
        low: the dtype that its weights were asked to be kept in.
        kept: leaves of a copy, which does not follow the model.
    """

    net: Net
    frozen: fastmlp.FrozenMLP
    low: torch.dtype | None
    kept: list[nn.Module] | None = None

    @property
    def leaves(self) -> list[nn.Module]:
        return nets.flat(self.net.model) if self.kept is None else self.kept

    @property
    def may_refuse(self) -> bool:
        return self.kept is None and self.net.may_refuse


def play(case: Case) -> None:
    dtype = drawn.dtype(case)
    sizes = nets.widths(case)
    model = nets.build(case, nets.leaves(case, sizes, dtype, extras=True))
    net = Net(case, model, dtype)
    net.train(case.chance(0.15))
    low = torch.bfloat16 if dtype == torch.float32 and case.chance(0.1) else None
    before = oracle.snapshot(model)
    frozen, error = attempt(lambda: fastmlp.freeze(model, dtype=low))
    oracle.unchanged(case, before, "freeze", model)
    if frozen is None:
        assert error is not None
        return case.refused(error, net.may_refuse_now())
    attack = Attack(net, frozen, low)
    net.others.append(frozen)
    for _ in range(case.choice([2, 3, 4, 6])):
        if case.chance(0.45) and attack.kept is None and not changed(attack):
            return None
        if case.chance(0.12):
            looked_at(attack)
        if case.chance(0.15):
            copied(attack)
        if not called(attack):
            return None
    return None


def changed(attack: Attack) -> bool:
    """Something happens to the model; says whether to go on."""
    net = attack.net
    fitting = [name for name, change in CHANGES.items() if change.fits(net)]
    name = net.case.choice(fitting)
    net.case.act(f"change {name}")
    _, error = attempt(lambda: CHANGES[name].make(net))
    if error is not None:
        raise Disagreement(f"{name} raises while a frozen network lives: {type(error).__name__}: {error}") from error
    if CHANGES[name].unseen:
        _, error = attempt(attack.frozen.refresh)
        if error is not None:
            net.case.refused(error, net.may_refuse_now())
            return False
    return True


def looked_at(attack: Attack) -> None:
    """Its text, size and features are those of a network frozen now."""
    case = attack.net.case
    if attack.kept is not None:
        return
    fresh, error = attempt(lambda: fastmlp.freeze(attack.net.model, dtype=attack.low))
    if fresh is None:
        assert error is not None
        return case.refused(error, attack.net.may_refuse_now())
    what: str = case.choice(["repr", "nbytes", "in_features", "out_features"])
    look: Callable[[Any], Any] = repr if what == "repr" else lambda frozen: getattr(frozen, what)
    case.act(f"look at {what}")
    found, expected = look(attack.frozen), look(fresh)
    case.require(found == expected, f"{what} is {found!r}, of a network frozen now {expected!r}")
    case.agreed()


def copied(attack: Attack) -> None:
    """From now on a copy is called, which has the weights of this moment."""
    case = attack.net.case
    way = case.choice(["deepcopy", "copy", "pickle", "torch.save"])
    case.act(f"copy by {way}")

    def made() -> Any:
        if way == "torch.save":
            file = io.BytesIO()
            torch.save(attack.frozen, file)
            return torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        if way == "pickle":
            return pickle.loads(pickle.dumps(attack.frozen))
        return getattr(copy, way)(attack.frozen)

    found, error = attempt(made)
    if found is None:
        assert error is not None
        return case.refused(error, attack.may_refuse and attack.net.may_refuse_now())
    if attack.may_refuse and attack.net.must_refuse():
        raise Disagreement(f"{way} of a network whose model has hooks holds earlier weights")
    attack.frozen, attack.kept = found, copy.deepcopy(attack.leaves)


def called(attack: Attack) -> bool:
    """One call; says whether to go on."""
    case = attack.net.case
    dtype = attack.net.dtype if attack.low is None else torch.float32
    leaves = attack.leaves
    first = next(leaf for leaf in leaves if isinstance(leaf, nn.Linear))
    k = first.weight.shape[1]
    norms = any(isinstance(leaf, nn.BatchNorm1d) for leaf in leaves)
    shape = (drawn.size(case),) if norms else drawn.leading(case)
    wrong = case.chance(0.04)
    x = drawn.randn(case, *shape, k + 1 if wrong else k, dtype=dtype)
    if case.chance(0.1):
        x = drawn.sprinkled(case, x)
    x, how = drawn.lay_to_read(case, x)
    array = dtype != torch.bfloat16 and case.chance(0.35)
    out, fitting = out_for(case, x, (*shape, leaves_out(leaves)), dtype) if case.chance(0.2) else (None, True)
    mode = case.choice(["", "", "no_grad", "inference_mode"])
    case.act("call", f"{'array' if array else 'tensor'} {how}{' out=' if out is not None else ''} {mode}")
    context = {"": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]
    given: Any = x.numpy() if array else x
    into: Any = out.numpy() if out is not None and array and out.dtype != torch.bfloat16 else out
    kept, kept_out = oracle.bytes_of(x), None if out is None else oracle.bytes_of(out)

    def call() -> Any:
        with context():
            return attack.frozen(given, out=into)

    result, error = attempt(call)
    case.require(oracle.bytes_of(x) == kept or not fitting, "the call has written to its input")
    if error is not None:
        case.require(out is None or oracle.bytes_of(out) == kept_out, "a call that raises has written to out")
        if not fitting:
            case.refused(error)
            return True
        if wrong and isinstance(error, REFUSALS):
            case.both_raise(error)
            return True
        case.refused(error, attack.may_refuse and attack.net.may_refuse_now())
        return False
    case.require(fitting, "an out that does not fit is taken")
    case.require(not wrong, "an input of another width is taken")
    case.require(not (attack.kept is None and attack.net.must_refuse()), "hooks of the model are passed over")
    if into is not None:
        case.require(result is into, "out is not what is returned")
    found: Any = torch.from_numpy(result) if array else result
    check(case, attack, leaves, x, found)
    return True


def leaves_out(leaves: list[nn.Module]) -> int:
    return [leaf for leaf in leaves if isinstance(leaf, nn.Linear)][-1].weight.shape[0]


def out_for(case: Case, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, bool]:
    """Memory for the output, and whether it fits."""
    made = torch.full(shape, 7.0, dtype=dtype)
    kind = case.choice(["fits"] * 6 + ["odd ones", "misaligned", "shape", "dtype", "gapped", "input"])
    case.note(f"  out: {kind}")
    if kind in ("odd ones", "misaligned"):
        return drawn.LAYOUTS[kind](case, made), True
    if kind == "shape":
        return torch.full((*shape, 1), 7.0, dtype=dtype), False
    if kind == "dtype":
        return made.to(torch.float64 if dtype != torch.float64 else torch.float32), False
    if kind == "gapped":
        made = drawn.gapped(case, made)
        return made, made.is_contiguous()
    if kind == "input" and x.shape == shape and x.numel():
        return x, False
    return made, True


def check(case: Case, attack: Attack, leaves: list[nn.Module], x: Tensor, found: Tensor) -> None:
    rows = oracle.rows_of(x)
    with torch.no_grad():
        expected = oracle.frozen_bounds(leaves, rows, attack.low)
        native = oracle.eval_forward(leaves, rows, x.dtype)
    shape = (*x.shape[:-1], native.shape[-1])
    case.require(found.shape == shape, f"output has shape {tuple(found.shape)}, expected {shape}")
    oracle.compare(case, found.reshape(native.shape), expected, native, "output")
    if rows.shape[0] > 1 and found.numel() and case.chance(0.3):
        at = case.random.randrange(rows.shape[0])
        with torch.no_grad():
            alone = attack.frozen(rows[at : at + 1])
        same = oracle.bytes_of(alone) == oracle.bytes_of(found.reshape(native.shape)[at])
        case.require(same, f"row {at} has other bits alone than in its batch")
        case.agreed()

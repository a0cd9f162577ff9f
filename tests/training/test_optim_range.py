"""Optimizers and losses at the ends of a dtype's range, and steps that torch refuses."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import optim, problems
from tests.support.axes import ISAS
from tests.support.bounds import gamma
from tests.support.endings import LOSSES_AFTER
from tests.support.training import OPTIMIZERS, Optimizer, optimizer_of

pytestmark = pytest.mark.usefixtures("as_before")

WIDE = [torch.float32, torch.float64]

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {}),
    ("SGD", {"weight_decay": 0.5, "maximize": True}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("Adam", {}),
    ("Adam", {"weight_decay": 0.1, "maximize": True}),
    ("Adam", {"betas": (0.3, 0.5), "amsgrad": True}),
    ("AdamW", {"weight_decay": 0.1}),
    ("AdamW", {"amsgrad": True, "eps": 0.0}),
    ("RMSprop", {}),
    ("RMSprop", {"weight_decay": 0.1, "maximize": True, "alpha": 0.5}),
    ("RMSprop", {"momentum": 0.9, "eps": 0.0}),
    ("RMSprop", {"centered": True}),
    ("RMSprop", {"centered": True, "momentum": 0.5, "alpha": 0.9, "weight_decay": 0.1}),
    ("Adam", {"lr": 1e30, "eps": 1e-30}),
    ("RMSprop", {"lr": 1e30, "eps": 1e-30}),
    ("SGD", {"lr": 1e30}),
]


def test_what_is_enumerated() -> None:
    assert {name for name, _ in VARIANTS} == set(OPTIMIZERS)
    assert {type(build("mean")) for build in LOSSES.values()} == set(problems.LOSSES) - set(LOSSES_AFTER)


def ends(dtype: torch.dtype) -> list[float]:
    """Numbers of all magnitudes that the dtype has, of either sign, with those whose squares it lacks."""
    finfo = torch.finfo(dtype)
    roots = [finfo.max**0.5 * factor for factor in (0.5, 0.99, 1.01, 2, 20, 1000)]
    tiny = [finfo.smallest_normal * finfo.eps, finfo.smallest_normal, finfo.smallest_normal**0.5]
    positive = [*roots, *tiny, finfo.max / 2, finfo.max, 1.0, float("inf")]
    return [*positive, *(-x for x in positive), 0.0, float("nan")]


def pairs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every end as a parameter, with every end as its gradient."""
    numbers = torch.tensor(ends(dtype), dtype=torch.float64).to(dtype)
    return numbers.repeat_interleave(len(numbers)), numbers.repeat(len(numbers))


def results(optimizer: Optimizer) -> dict[str, Tensor]:
    (p,) = optimizer.param_groups[0]["params"]
    state = {key: x for key, x in optimizer.state[p].items() if x is not None}
    return {"parameter": p.detach()} | dict(sorted(state.items()))


def kinds(x: Tensor) -> Tensor:
    """0 for NaN, 1 for finite numbers, 2 and 3 for the infinities."""
    return torch.where(x.isnan(), 0, torch.where(x.isposinf(), 2, torch.where(x.isneginf(), 3, 1)))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize(("name", "arguments"), VARIANTS, ids=str)
def test_ends_of_the_range(name: str, arguments: dict[str, Any], dtype: torch.dtype, isa: str) -> None:
    """Overflow where torch's own step overflows and nowhere else, and numbers as near as its roundings."""
    values, gradients = pairs(dtype)
    if arguments.get("lr", 0) > 1:
        # Infinity less a product that overflows is NaN, or infinity where both are one instruction.
        values = values.nan_to_num()
    made = []
    for module in (torch.optim, optim):
        p = nn.Parameter(values.clone())
        made.append(optimizer_of(module, name, {"lr": 0.1} | arguments, [p]))
    for step in range(3):
        for optimizer in made:
            (p,) = optimizer.param_groups[0]["params"]
            p.grad = gradients.roll(step)
            optimizer.step()
        expected, found = (results(optimizer) for optimizer in made)
        for key, value in expected.items():
            different = kinds(found[key]) != kinds(value)
            at = int(different.nonzero()[0]) if different.any() else 0
            assert not different.any(), f"{step}: {key} of {values[at]}, {gradients.roll(step)[at]} is {found[key][at]}"
        # From the same numbers on.
        for x, y in zip(results(made[1]).values(), expected.values(), strict=True):
            x.copy_(y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "arguments"), VARIANTS[:-3], ids=str)
def test_ends_of_the_range_of_16_bits(name: str, arguments: dict[str, Any], dtype: torch.dtype, isa: str) -> None:
    """As torch's step of float32 whose results are rounded when they are stored."""
    values, gradients = pairs(dtype)
    p, q = nn.Parameter(values.clone()), nn.Parameter(values.float())
    mine, exact = (
        optimizer_of(module, name, {"lr": 0.1} | arguments, [x]) for module, x in ((optim, p), (torch.optim, q))
    )
    for step in range(3):
        p.grad = gradients.roll(step)
        q.grad = p.grad.float()
        mine.step()
        exact.step()
        found, expected = results(mine), results(exact)
        for key, value in expected.items():
            if key != "step":
                value.copy_(value.to(dtype))
            assert torch.equal(kinds(found[key]), kinds(value)), f"{step}: {key}"
            found[key].copy_(value)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_second_moments_of_huge_gradients(name: str) -> None:
    """The square overflows; a thousandth of it does not."""
    for isa, g in itertools.product(ISAS, [2e19, 1e20, 5e20]):
        fastmlp.set_isa(isa)
        p = nn.Parameter(torch.ones(9))
        optimizer = optimizer_of(optim, name, {"lr": 0.1, "weight_decay": 0.0}, [p])
        p.grad = torch.full_like(p, g)
        optimizer.step()
        second = optimizer.state[p]["exp_avg_sq"]
        exact = (1 - 0.999) * p.grad.double().square()
        assert ((second.double() - exact).abs() <= gamma(4, torch.float32) * exact).all()
        # The step is lr times m / sqrt(v), which is 1.
        assert ((p.detach().double() - 0.9).abs() <= gamma(16, torch.float32)).all()


@pytest.mark.parametrize("number", ["lr", "weight_decay"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_that_the_dtype_lacks(number: str, dtype: torch.dtype) -> None:
    """Torch raises for them; nothing is written then."""
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = optimizer_of(optim, "SGD", {"lr": 0.1} | {number: 1e39}, [p])
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="overflow"):
        optimizer.step()
    assert p.tolist() == [1.0] * 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_integers_that_no_float_can_hold(name: str) -> None:
    """Torch's own error, and by a TrainStep too, whose loop would raise it; the parameters stay."""
    texts = set()
    for module in (torch.optim, optim):
        p = nn.Parameter(torch.ones(3))
        optimizer = optimizer_of(module, name, {"lr": 0.1}, [p])
        optimizer.param_groups[0]["lr"] = 10**400
        p.grad = torch.ones_like(p)
        with pytest.raises(OverflowError) as error:
            optimizer.step()
        texts.add(str(error.value))
        assert p.tolist() == [1.0] * 3
        model = nn.Linear(2, 1)
        before = model.weight.tolist()
        optimizer = optimizer_of(module, name, {"lr": 0.1}, list(model.parameters()))
        optimizer.param_groups[0]["lr"] = 10**400
        step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer)
        with pytest.raises(OverflowError) as error:
            step(torch.ones(3, 2), torch.zeros(3, 1))
        texts.add(str(error.value))
        assert model.weight.tolist() == before
    assert len(texts) == 1


# Inference mode.


def outcomes(module: Any, name: str, arguments: dict[str, Any], first: bool) -> list[Any]:
    """What steps inside and outside of inference mode do, one after another."""
    p = nn.Parameter(torch.ones(5))
    optimizer = optimizer_of(module, name, {"lr": 0.1} | arguments, [p])
    p.grad = torch.ones_like(p)
    if first:
        optimizer.step()
    found: list[Any] = []
    for inside in (True, True, False, True):
        try:
            with torch.inference_mode(inside):
                optimizer.step()
        except RuntimeError as error:
            found.append(str(error).split(".")[0])
        state = optimizer.state.get(p, {})
        found.append({key: x.is_inference() for key, x in state.items() if x is not None})
        found.append(torch.stack([p.detach().clone()[0], *(x.flatten()[0] for x in state.values() if x is not None)]))
    return found


@pytest.mark.parametrize("first", [False, True], ids=["without state", "with state"])
@pytest.mark.parametrize(
    ("name", "arguments"), [("SGD", {}), ("SGD", {"momentum": 0.9}), ("Adam", {}), ("RMSprop", {})], ids=str
)
def test_inference_mode(name: str, arguments: dict[str, Any], first: bool) -> None:
    """State that is made there can be written there only, ours as torch's, and a refused step writes nothing."""
    expected, found = (outcomes(module, name, arguments, first) for module in (torch.optim, optim))
    for a, b in zip(expected, found, strict=True):
        if not isinstance(a, Tensor):
            assert a == b
        else:
            assert torch.allclose(a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_refused_step_moves_nothing(name: str) -> None:
    params = [nn.Parameter(torch.ones(5)) for _ in range(2)]
    optimizer = optimizer_of(optim, name, {"lr": 0.1} | ({"momentum": 0.9} if name == "SGD" else {}), params)
    params[1].grad = torch.ones(5)
    with torch.inference_mode():
        optimizer.step()
    before = [p.detach().clone() for p in params]
    params[0].grad = torch.ones(5)
    with pytest.raises(RuntimeError, match="inference tensor"):
        optimizer.step()
    assert torch.equal(params[0], before[0])
    assert torch.equal(params[1], before[1])


LOSSES: dict[str, Callable[[str], nn.Module]] = {
    "MSE": lambda reduction: nn.MSELoss(reduction=reduction),
    "L1": lambda reduction: nn.L1Loss(reduction=reduction),
    "Huber": lambda reduction: nn.HuberLoss(reduction, delta=2.0),
    "Huber, wide": lambda reduction: nn.HuberLoss(reduction, delta=float("inf")),
    "Huber, huge": lambda reduction: nn.HuberLoss(reduction, delta=1e30),
    "SmoothL1": lambda reduction: nn.SmoothL1Loss(reduction=reduction, beta=2.0),
    "SmoothL1, L1": lambda reduction: nn.SmoothL1Loss(reduction=reduction, beta=0.0),
    "SmoothL1, narrow": lambda reduction: nn.SmoothL1Loss(reduction=reduction, beta=1e-50),
    "SmoothL1, wide": lambda reduction: nn.SmoothL1Loss(reduction=reduction, beta=float("inf")),
    "SmoothL1, huge": lambda reduction: nn.SmoothL1Loss(reduction=reduction, beta=1e30),
    "BCE": lambda reduction: nn.BCEWithLogitsLoss(reduction=reduction),
    "BCE pos_weight": lambda reduction: nn.BCEWithLogitsLoss(
        reduction=reduction, pos_weight=torch.tensor([0.0, 1e-30, 1.0, 1e30])
    ),
    "CE": lambda reduction: nn.CrossEntropyLoss(reduction=reduction),
    "CE smoothed": lambda reduction: nn.CrossEntropyLoss(reduction=reduction, label_smoothing=0.1),
    "CE weighted": lambda reduction: nn.CrossEntropyLoss(torch.tensor([0.0, 1e-30, 1.0, 1e30]), reduction=reduction),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_at_the_ends_of_the_range(name: str, reduction: str, isa: str) -> None:
    """One row of outputs, in which two are extreme: where torch's numbers are finite, so are ours.

    The other way round sums in double precision, and exponentials that do not overflow, may be finite for longer.
    """
    loss_fn = LOSSES[name](reduction)
    model, input = nn.Linear(1, 4), torch.ones(1, 1)
    nn.init.zeros_(model.weight.requires_grad_(False))
    step = fastmlp.TrainStep(model, loss_fn, torch.optim.SGD(model.parameters(), lr=0.0))
    numbers = ends(torch.float32)
    entropy = isinstance(loss_fn, nn.CrossEntropyLoss)
    targets = torch.tensor([[0], [3]]) if entropy else torch.tensor([[[0.0] * 4], [[1.0] * 4]])
    for a, b, target in itertools.product(numbers, numbers, targets):
        bias = torch.tensor([a, 0.5, b, -0.25])
        model.bias.data = bias.clone()
        leaf = bias.clone().requires_grad_()
        expected = loss_fn(leaf[None], target)
        (gradient,) = torch.autograd.grad(expected, leaf)
        loss, mine = step(input, target), model.bias.grad
        assert mine is not None
        for found, torchs in ((loss, expected.detach()), (mine, gradient)):
            what = f"{bias.tolist()}, {target.tolist()}: {found.tolist()}, not {torchs.tolist()}"
            assert found[torchs.isfinite()].isfinite().all(), what
            assert not found[torchs.isinf()].isnan().any(), what

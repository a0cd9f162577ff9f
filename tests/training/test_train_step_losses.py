"""Losses of TrainStep where arithmetic says little: empty batches, ignored classes, kinks, NaN and infinity."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import problems
from tests.support.axes import ISAS
from tests.support.endings import LOSSES_AFTER
from tests.support.rounding import Results
from tests.support.training import Loop, Maker, assert_equal_to_rounding, everything

F64 = torch.float64
DTYPES = [torch.float32, torch.float64]
CLASSES = 5

LOSSES: dict[str, Callable[[torch.dtype, str], nn.Module]] = {
    "MSE": lambda dtype, reduction: nn.MSELoss(reduction=reduction),
    "L1": lambda dtype, reduction: nn.L1Loss(reduction=reduction),
    "Huber": lambda dtype, reduction: nn.HuberLoss(reduction, delta=0.5),
    "SmoothL1": lambda dtype, reduction: nn.SmoothL1Loss(reduction=reduction, beta=0.5),
    "SmoothL1, L1": lambda dtype, reduction: nn.SmoothL1Loss(reduction=reduction, beta=0.0),
    "BCE": lambda dtype, reduction: nn.BCEWithLogitsLoss(reduction=reduction),
    "BCE pos_weight": lambda dtype, reduction: nn.BCEWithLogitsLoss(
        reduction=reduction, pos_weight=torch.linspace(0.5, 3, CLASSES, dtype=dtype)
    ),
    "CE": lambda dtype, reduction: nn.CrossEntropyLoss(reduction=reduction),
    "CE smoothed": lambda dtype, reduction: nn.CrossEntropyLoss(reduction=reduction, label_smoothing=0.2),
    "CE weighted": lambda dtype, reduction: nn.CrossEntropyLoss(
        torch.linspace(0.5, 2, CLASSES, dtype=dtype), ignore_index=2, reduction=reduction
    ),
    "CE weighted, smoothed": lambda dtype, reduction: nn.CrossEntropyLoss(
        torch.linspace(0, 2, CLASSES, dtype=dtype), reduction=reduction, label_smoothing=0.2
    ),
}
CASES = list(itertools.product(LOSSES, ["mean", "sum"]))


pytestmark = pytest.mark.usefixtures("as_before")


def test_what_is_enumerated() -> None:
    enumerated = {type(build(F64, "mean")) for build in LOSSES.values()}
    assert enumerated == set(problems.LOSSES) - set(LOSSES_AFTER)


def network(dtype: torch.dtype) -> Any:
    return nn.Sequential(nn.Linear(4, 7, dtype=dtype), nn.Tanh(), nn.Linear(7, CLASSES, dtype=dtype))


def target_of(loss_fn: nn.Module, rows: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if isinstance(loss_fn, nn.CrossEntropyLoss):
        return torch.arange(torch.Size(rows).numel()).view(rows) % CLASSES
    return torch.rand(*rows, CLASSES, dtype=dtype)


def kinds(x: Tensor) -> Tensor:
    """0 for NaN, 1 for finite numbers, 2 and 3 for the infinities."""
    return torch.where(x.isnan(), 0, torch.where(x.isposinf(), 2, torch.where(x.isneginf(), 3, 1)))


def after_one_step(make: Maker, model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Results:
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    loss = make(model, loss_fn, optimizer, **options)(x, y)
    return {"loss": loss} | everything(model, optimizer)


def same_kinds(
    loss_fn: nn.Module,
    x: Tensor,
    y: Tensor,
    change: Callable[[Any], None] = lambda model: None,
    options: dict[str, Any] | None = None,
    exact_loss: Tensor | None = None,
) -> Results:
    """NaN and infinities of either sign where the loop has them, or the exact loss, on every instruction set."""
    results: list[Results] = []
    for isa in (None, *ISAS):
        torch.manual_seed(3)
        model = network(x.dtype)
        with torch.no_grad():
            change(model)
        if isa is not None:
            fastmlp.set_isa(isa)
        make: Maker = Loop if isa is None else fastmlp.TrainStep
        results.append(after_one_step(make, model, loss_fn, x, y, **(options or {})))
        if exact_loss is not None:
            results[0] = {**results[0], "loss": exact_loss}
        for name, value in results[0].items():
            assert torch.equal(kinds(results[-1][name]), kinds(value)), f"{isa}: {name}"
    return results[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "reduction"), CASES)
@pytest.mark.parametrize("rows", [(0,), (2, 0), (0, 3)], ids=str)
def test_empty_batches(name: str, reduction: str, rows: tuple[int, ...], dtype: torch.dtype) -> None:
    """The mean of nothing is NaN, gradients are sums of nothing."""
    loss_fn = LOSSES[name](dtype, reduction)
    if isinstance(loss_fn, nn.CrossEntropyLoss) and len(rows) > 1:
        rows = rows[:1]
    found = same_kinds(loss_fn, torch.zeros(*rows, 4, dtype=dtype), target_of(loss_fn, rows, dtype))
    if rows[0] == 0:
        assert bool(found["loss"].isnan()) == (reduction == "mean")


@pytest.mark.parametrize("name", [name for name in LOSSES if name.startswith("CE")])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows", [(), (1,), (6,)], ids=str)
def test_every_class_ignored(name: str, reduction: str, rows: tuple[int, ...]) -> None:
    loss_fn = LOSSES[name](F64, reduction)
    assert isinstance(loss_fn, nn.CrossEntropyLoss)
    found = same_kinds(loss_fn, torch.randn(*rows, 4, dtype=F64), torch.full(rows, loss_fn.ignore_index))
    assert bool(found["loss"].isnan()) == (reduction == "mean")


@pytest.mark.parametrize("weight", [[0.0, 1, 1, 1, 1], [0.0] * 5, [1.0, -1, 2, 0.5, 3]], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_class_weights_that_are_not_positive(weight: list[float], smoothing: float) -> None:
    loss_fn = nn.CrossEntropyLoss(torch.tensor(weight, dtype=F64), label_smoothing=smoothing)
    for classes in ([0, 0, 0], [0, 1, 4]):
        same_kinds(loss_fn, torch.randn(3, 4, dtype=F64), torch.tensor(classes))


def entries(values: list[float], dtype: torch.dtype) -> Tensor:
    x = torch.randn(6, 4, dtype=dtype)
    for row, value in enumerate(values):
        x[row, row % 4] = value
    return x


INF, NAN = float("inf"), float("nan")


@pytest.mark.filterwarnings("ignore:.*anomaly.*:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "reduction"), CASES)
@pytest.mark.parametrize("values", [[NAN], [INF], [-INF], [INF, -INF, NAN]], ids=str)
def test_not_finite_inputs(name: str, reduction: str, values: list[float], dtype: torch.dtype) -> None:
    loss_fn = LOSSES[name](dtype, reduction)
    same_kinds(loss_fn, entries(values, dtype), target_of(loss_fn, (6,), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "reduction"), CASES)
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_not_finite_outputs(name: str, reduction: str, value: float, dtype: torch.dtype) -> None:
    """One logit, or one residual, of all rows."""
    loss_fn = LOSSES[name](dtype, reduction)

    def change(model: Any) -> None:
        model[2].bias[3] = value

    same_kinds(loss_fn, torch.randn(6, 4, dtype=dtype), target_of(loss_fn, (6,), dtype), change)


@pytest.mark.parametrize(("name", "reduction"), [case for case in CASES if not case[0].startswith("CE")])
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_not_finite_targets(name: str, reduction: str, value: float) -> None:
    loss_fn = LOSSES[name](F64, reduction)
    target = target_of(loss_fn, (6,), F64)
    target[2, 1] = value
    same_kinds(loss_fn, torch.randn(6, 4, dtype=F64), target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [1e3, 1e30, -1e30, 1e37], ids=str)
@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_large_outputs(name: str, reduction: str, value: float, dtype: torch.dtype) -> None:
    """Exponentials of differences do not overflow; squares do, where torch's do.

    A mean whose sum would overflow is a number: losses are added up in double precision.
    """
    loss_fn = LOSSES[name](dtype, reduction)

    def change(model: Any) -> None:
        model[2].bias[1] = value

    x, y = torch.randn(6, 4, dtype=dtype), target_of(loss_fn, (6,), dtype)
    exact = None
    if name != "MSE" and reduction == "mean":
        torch.manual_seed(3)
        model = network(dtype)
        with torch.no_grad():
            change(model)
        exact = LOSSES[name](F64, reduction)(model.double()(x.double()), y if y.dtype == torch.int64 else y.double())
        exact = exact.detach().to(dtype)
    found = same_kinds(loss_fn, x, y, change, exact_loss=exact)
    if name != "MSE" and value == 1e3:
        assert bool(found["loss"].isfinite())


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"clip_value": 0.1}, {"accumulate": 1}], ids=str)
@pytest.mark.parametrize("values", [[NAN], [INF], [1e200]], ids=str)
def test_clipping_of_what_is_not_finite(options: dict[str, Any], values: list[float]) -> None:
    same_kinds(nn.MSELoss(), entries(values, F64), torch.zeros(6, CLASSES, dtype=F64), options=options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kinks(reduction: str) -> None:
    """Residuals of exactly 0, delta and beta: the derivative of L1 at 0 is 0, that of Huber is delta on either side."""
    smooth = [nn.SmoothL1Loss(reduction=reduction, beta=beta) for beta in (0.5, 0, 1e-320)]
    for loss_fn in (nn.L1Loss(reduction=reduction), nn.HuberLoss(reduction, delta=0.5), *smooth):
        for isa in ISAS:
            fastmlp.set_isa(isa)
            gradients = []
            for make in (Loop, fastmlp.TrainStep):
                model: Any = nn.Sequential(nn.Linear(1, 5, dtype=F64))
                with torch.no_grad():
                    model[0].weight.fill_(0)
                    model[0].bias.fill_(0)
                target = torch.tensor([[0.0, 0.5, -0.5, 2.0, -2.0]], dtype=F64)
                make(model, loss_fn, torch.optim.SGD(model.parameters(), lr=1))(torch.ones(1, 1, dtype=F64), target)
                gradients.append(model[0].bias.grad)
            # Products of powers of two, and divisions of them by 5: each rounded once, or not at all.
            assert torch.equal(*gradients), f"{isa}: {type(loss_fn).__name__}"


@pytest.mark.parametrize(("name", "reduction"), CASES)
def test_one_row_without_dimensions(name: str, reduction: str) -> None:
    """One dimension, and for classes none."""
    loss_fn = LOSSES[name](F64, reduction)
    target = torch.tensor(3) if isinstance(loss_fn, nn.CrossEntropyLoss) else torch.rand(CLASSES, dtype=F64)

    def scenario(make: Maker) -> Results:
        model = network(F64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        step = make(model, loss_fn, optimizer)
        found = [step(torch.randn(4, dtype=F64), target) for _ in range(3)]
        return {"losses": torch.stack(found)} | everything(model, optimizer)

    assert_equal_to_rounding(scenario, ISAS)


@pytest.mark.parametrize("ignored", [-100, -1, 3, 7, 1000])
def test_any_index_may_be_ignored(ignored: int) -> None:
    """Also one that is no class."""

    def scenario(make: Maker) -> Results:
        model = network(F64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        step = make(model, nn.CrossEntropyLoss(ignore_index=ignored, label_smoothing=0.1), optimizer)
        loss = step(torch.randn(6, 4, dtype=F64), torch.tensor([0, ignored, 2, ignored, 4, 1]))
        return {"loss": loss} | everything(model, optimizer)

    assert_equal_to_rounding(scenario, ISAS)


@pytest.mark.parametrize("shape", [(), (1,), (CLASSES,), (6, CLASSES), (6, 1)], ids=str)
def test_shapes_of_pos_weight(shape: tuple[int, ...]) -> None:
    """All that broadcast to the output."""

    def scenario(make: Maker) -> Results:
        model, loss_fn = network(F64), nn.BCEWithLogitsLoss(pos_weight=torch.rand(shape, dtype=F64) * 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        loss = make(model, loss_fn, optimizer)(torch.randn(6, 4, dtype=F64), torch.rand(6, CLASSES, dtype=F64))
        return {"loss": loss} | everything(model, optimizer)

    try:
        scenario(fastmlp.TrainStep)
    except (RuntimeError, TypeError) as error:
        assert len(shape) != 1 or shape[0] != CLASSES
        assert "pos_weight" in str(error)  # noqa: PT017
    else:
        assert_equal_to_rounding(scenario, ISAS)


def test_targets_outside_of_zero_and_one() -> None:
    def scenario(make: Maker) -> Results:
        model = network(F64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        step = make(model, LOSSES["BCE pos_weight"](F64, "mean"), optimizer)
        loss = step(torch.randn(6, 4, dtype=F64), torch.randn(6, CLASSES, dtype=F64) * 2)
        return {"loss": loss} | everything(model, optimizer)

    assert_equal_to_rounding(scenario, ISAS)

"""TrainStep does what its loop does, or says that it does not: contexts, replaced methods, hooks of the graph, windows.

Nothing that would change the loop may pass by unseen.
"""

import copy
import functools
import gc
import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import StepLR

import fastmlp
from fastmlp import _C, problems
from tests.support.axes import ISAS
from tests.support.endings import LOSSES_AFTER
from tests.support.rounding import Results
from tests.support.steps import F64, batch, losses, network, refused, sgd, snapshot, unchanged
from tests.support.training import Loop, Maker, Optimizer, assert_equal_to_rounding, everything

pytestmark = [
    pytest.mark.usefixtures("as_before"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning"),
]


def made(**options: Any) -> tuple[Any, Optimizer, fastmlp.TrainStep]:
    model = network()
    optimizer = sgd(model.parameters())
    return model, optimizer, fastmlp.TrainStep(model, nn.MSELoss(), optimizer, **options)


# Contexts.

CONTEXTS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], str]] = {
    "no_grad": (torch.no_grad, "no_grad"),
    "set_grad_enabled": (lambda: torch.set_grad_enabled(False), "no_grad"),
    "inference_mode": (torch.inference_mode, "inference_mode"),
    "autocast": (lambda: torch.autocast("cpu"), "autocast"),
    "anomalies": (torch.autograd.detect_anomaly, "detect_anomaly"),
    "saved tensors": (lambda: torch.autograd.graph.save_on_cpu(), "saved_tensors_hooks"),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("case", CONTEXTS)
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"keep_grads": False}], ids=str)
def test_contexts_in_which_the_loop_does_something_else(case: str, options: dict[str, Any]) -> None:
    context, name = CONTEXTS[case]
    model, optimizer, step = made(**options)
    step(*batch())
    with context():
        unchanged(step, model, optimizer, *batch(), name)
    step(*batch())
    assert not any(p.grad.is_inference() for p in model.parameters() if p.grad is not None)


def test_parameters_of_inference_mode() -> None:
    with torch.inference_mode():
        model = network()
    refused(model, nn.MSELoss(), sgd(model.parameters()), r"0\.weight .*inference_mode")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_of_inference_mode(accumulate: int) -> None:
    """Their memory is not written again; where the loop would add to them, it raises."""
    model, _, step = made(accumulate=accumulate)
    losses(step, 1)
    with torch.inference_mode():
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    if accumulate > 1:
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match=r"fastmlp: .*inference_mode"):
            step(*batch())
        assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))
        return
    losses(step, 2)
    assert not any(p.grad.is_inference() for p in model.parameters())


# Replaced methods.


def counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    """As users write it, around a method or a function."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return function(*args, **kwargs)

    return wrapper


class Counting:
    """Patches of an optimizer's step."""

    @staticmethod
    def alone(optimizer: Any, calls: list[int]) -> None:
        optimizer.step = counted(optimizer.step, calls)

    @staticmethod
    def before_a_scheduler(optimizer: Any, calls: list[int]) -> None:
        function = counted(type(optimizer).step, calls)
        optimizer.step = function.__get__(optimizer)
        StepLR(optimizer, 1)

    @staticmethod
    def after_a_scheduler(optimizer: Any, calls: list[int]) -> None:
        StepLR(optimizer, 1)
        optimizer.step = counted(optimizer.step, calls)

    @staticmethod
    def between_schedulers(optimizer: Any, calls: list[int]) -> None:
        Counting.after_a_scheduler(optimizer, calls)
        StepLR(optimizer, 1)


@pytest.mark.parametrize("way", ["alone", "before_a_scheduler", "after_a_scheduler", "between_schedulers"])
@pytest.mark.parametrize("module", [torch.optim, fastmlp.optim], ids=lambda module: module.__name__)
@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_was_replaced_is_called(way: str, module: Any, late: bool) -> None:
    model = network()
    calls: list[int] = []
    optimizer = module.AdamW(model.parameters())
    if not late:
        getattr(Counting, way)(optimizer, calls)
    step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer, accumulate=2)
    losses(step, 2)
    if late:
        getattr(Counting, way)(optimizer, calls)
        losses(step, 2)
    assert len(calls) == 1
    losses(step, 4)
    assert len(calls) == 3


@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_was_replaced_in_its_class_is_called(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    calls: list[int] = []
    optimizer = torch.optim.SGD(model.parameters())
    early = fastmlp.TrainStep(model, nn.MSELoss(), optimizer)
    monkeypatch.setattr(torch.optim.SGD, "step", counted(torch.optim.SGD.step, calls))
    step = early if late else fastmlp.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters()))
    losses(step, 3)
    assert len(calls) == 3


def test_a_step_with_a_scheduler_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is nothing but arithmetic, whatever the order in which step and scheduler are made."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters())
    StepLR(optimizer, 1)
    step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer)
    before = optimizer.param_groups
    monkeypatch.setattr(torch.optim.SGD, "_init_group", None)  # which its step calls
    losses(step, 2)
    assert optimizer.param_groups is before


@pytest.mark.parametrize("on_class", [False, True])
def test_a_zero_grad_that_was_replaced(on_class: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, step = made()
    step(*batch())
    monkeypatch.setattr(torch.optim.SGD if on_class else optimizer, "zero_grad", lambda *args: None)
    refused(model, nn.MSELoss(), optimizer, "zero_grad")
    unchanged(step, model, optimizer, *batch(), "zero_grad")
    monkeypatch.undo()
    step(*batch())


def test_a_forward_of_a_loss_that_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its class."""
    model, optimizer, step = made()
    monkeypatch.setattr(nn.MSELoss, "forward", lambda self, x, y: (x - y).abs().sum())
    refused(model, nn.MSELoss(), optimizer, "forward of loss_fn")
    unchanged(step, model, optimizer, *batch(), "forward of loss_fn")
    monkeypatch.undo()
    step(*batch())


@pytest.mark.parametrize("kind", [nn.MSELoss, nn.Sequential, nn.Module], ids=lambda kind: kind.__name__)
def test_a_call_that_was_replaced(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, step = made()
    call = nn.Module.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, *args: call(self, *args))
    refused(model, nn.MSELoss(), optimizer, "__call__|Sequential was replaced")
    unchanged(step, model, optimizer, *batch(), "__call__|Sequential was replaced")
    monkeypatch.undo()
    step(*batch())


class Own(nn.Module):
    """A container that the extension never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 9, dtype=F64), nn.Linear(9, 3, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.second(torch.relu(self.first(x)))
        return output


def test_a_forward_of_a_model_that_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its class: another chain is recorded, and what is none is refused."""

    def scenario(make: Maker) -> Results:
        model = Own()
        optimizer = sgd(model.parameters())
        step = make(model, nn.MSELoss(), optimizer)
        first = losses(step, 2)
        monkeypatch.setattr(Own, "forward", lambda self, x: self.second(torch.tanh(self.first(x))))
        second = losses(step, 2)
        monkeypatch.undo()
        return {"first": first, "second": second} | everything(model, optimizer)

    assert_equal_to_rounding(scenario, ISAS[-1:])
    model = Own()
    optimizer = sgd(model.parameters())
    step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer)
    monkeypatch.setattr(Own, "forward", lambda self, x: self.second(self.first(x)).sin() * 2)
    unchanged(step, model, optimizer, *batch(), "Own")


# Hooks of the graph.


def accumulator(p: Tensor) -> Any:
    """The node that adds to .grad."""
    node = p.expand_as(p).grad_fn
    assert node is not None
    return node.next_functions[0][0]


@pytest.mark.parametrize("kind", ["register_hook", "register_prehook"])
def test_hooks_of_the_node_that_accumulates(kind: str) -> None:
    model, optimizer, step = made()
    step(*batch())
    node = accumulator(model[2].weight)
    getattr(node, kind)(lambda *args: None)
    refused(model, nn.MSELoss(), optimizer, r"2\.weight has hooks")
    unchanged(step, model, optimizer, *batch(), r"2\.weight has hooks")
    del node
    step(*batch())  # its hooks went with it


def test_a_node_without_hooks() -> None:
    model, _, step = made()
    nodes = [accumulator(p) for p in model.parameters()]
    step(*batch())
    assert len(nodes) == 6


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_model_in_distributed_data_parallel() -> None:
    """Its own module would be trained without the others' gradients."""
    model, optimizer, step = made()
    ddp = DistributedDataParallel(model)
    refused(ddp.module, nn.MSELoss(), optimizer, "DistributedDataParallel")
    unchanged(step, model, optimizer, *batch(), "DistributedDataParallel")


# Who has which parameters.


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.1}, {"clip_value": 0.01}], ids=str)
@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize("calls", [1, 2])
def test_a_parameter_that_is_frozen_within_a_window(calls: int, owned: bool, options: dict[str, Any]) -> None:
    """What it has in .grad is clipped and stepped all the same."""

    def scenario(make: Maker) -> Results:
        model = network()
        weight = model[2].weight
        optimizer = torch.optim.AdamW([p for p in model.parameters() if owned or p is not weight], lr=0.01)
        step = make(model, nn.MSELoss(), optimizer, accumulate=3, **options)
        first = losses(step, 3 + calls)
        weight.requires_grad_(False)
        second = losses(step, 6 - calls)
        return {"first": first, "second": second} | everything(model, optimizer)

    assert_equal_to_rounding(scenario, ISAS[-1:])


def test_a_frozen_parameter_with_a_gradient_is_clipped() -> None:
    """The optimizer does not have it, so that nothing clears its .grad, which belongs to the norm."""

    def scenario(make: Maker) -> Results:
        model = network()
        weight = model[2].weight.requires_grad_(False)
        weight.grad = torch.ones_like(weight)
        optimizer = sgd([p for p in model.parameters() if p is not weight])
        return {"losses": losses(make(model, nn.MSELoss(), optimizer, max_norm=0.5))} | everything(model, optimizer)

    assert_equal_to_rounding(scenario, ISAS[-1:])


def test_a_parameter_that_the_model_lacks_with_a_gradient_within_a_window() -> None:
    """It steps at the window's end."""

    def scenario(make: Maker) -> Results:
        model, other = network(), nn.Parameter(torch.randn(3, dtype=F64))
        optimizer = torch.optim.AdamW([other, *model.parameters()])
        step = make(model, nn.MSELoss(), optimizer, accumulate=2)
        first = losses(step, 3)
        other.grad = torch.ones_like(other)
        return {"first": first, "second": losses(step, 3)} | everything(model, optimizer)

    assert_equal_to_rounding(scenario, ISAS[-1:])


def test_an_optimizer_of_another_model() -> None:
    model, other = network(), network()
    refused(model, nn.MSELoss(), sgd(other.parameters()), "optimizer has no parameter of the model")
    model[0].weight.requires_grad_(False)
    refused(model, nn.MSELoss(), sgd([model[0].weight]), "optimizer has no parameter of the model")
    fastmlp.TrainStep(model, nn.MSELoss(), sgd([*other.parameters(), model[4].bias]))


# Attributes and options.


@pytest.mark.parametrize(
    "name", ["model", "loss_fn", "optimizer", "max_norm", "clip_value", "accumulate", "keep_grads", "waiting"]
)
def test_what_a_step_was_made_of_cannot_be_set(name: str) -> None:
    _, _, step = made(max_norm=2)
    before = getattr(step, name)
    with pytest.raises(AttributeError, match=name):
        setattr(step, name, before)
    assert getattr(step, name) is before
    assert step.max_norm == 2.0


@pytest.mark.parametrize("way", [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))], ids=["copy", "pickle"])
def test_copies_keep_options(way: Callable[[Any], Any]) -> None:
    _, _, step = made(clip_value=0.5, accumulate=3)
    step(*batch())
    copied = way(step)
    assert (copied.clip_value, copied.max_norm, copied.accumulate, copied.keep_grads) == (0.5, None, 3, True)
    assert copied.waiting == 1
    assert copied.model is not step.model


@pytest.mark.parametrize(
    "way", [copy.copy, copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))], ids=["copy", "deepcopy", "pickle"]
)
def test_copies_within_a_window(way: Callable[[Any], Any]) -> None:
    """Gradients that wait for a step are copied too, although torch copies parameters without theirs."""
    model, _, step = made(accumulate=3)
    batches = [batch() for _ in range(4)]
    for x, y in batches[:2]:
        step(x, y)
    copied = way(step)
    if copied.model is not model:
        for x, y in batches[2:]:
            assert torch.equal(copied(x, y), step(x, y))
    else:
        copied(*batches[2])
        assert copied.waiting == 0
    assert copied.waiting == (0 if copied.model is model else step.waiting)
    for p, q in zip(model.parameters(), copied.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_window_without_its_gradients_begins_anew() -> None:
    """As in pickles of earlier versions."""
    _, _, step = made(accumulate=3)
    step(*batch())
    state = step.__getstate__()
    del state["_grads"]
    step.model.zero_grad()
    step.__setstate__(state)
    assert step.waiting == 0


@pytest.mark.parametrize("again", ["flush", "call"])
def test_an_error_of_the_optimizer_s_step_keeps_the_window(again: str) -> None:
    model, optimizer, step = made(accumulate=2)
    batches = [batch() for _ in range(3)]
    hook = optimizer.register_step_pre_hook(failing)
    step(*batches[0])
    with pytest.raises(ZeroDivisionError):
        step(*batches[1])
    assert step.waiting == 2
    hook.remove()
    grads = [p.grad.clone() for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    if again == "flush":
        assert step.flush()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    else:
        step(*batches[2])
    assert step.waiting == 0
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_an_error_of_the_optimizer_s_step_without_a_window() -> None:
    """The next call begins as the loop does, with zero_grad."""
    model, optimizer, step = made()
    hook = optimizer.register_step_pre_hook(failing)
    with pytest.raises(ZeroDivisionError):
        step(*batch())
    hook.remove()
    assert step.waiting == 0
    other = copy.deepcopy(model)
    x, y = batch()
    step(x, y)
    fastmlp.TrainStep(other, nn.MSELoss(), sgd(other.parameters()))(x, y)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def failing(*args: Any) -> None:
    raise ZeroDivisionError


LIMITS: list[tuple[Any, type[Exception] | None]] = [
    (-1, ValueError),
    (-1e-30, ValueError),
    (math.nan, ValueError),
    (10**400, ValueError),
    (-math.inf, ValueError),
    ("1", TypeError),
    (True, TypeError),
    ([1.0], TypeError),
    (0, None),
    (1e30, None),
    (np.float32(0.5), None),
]


@pytest.mark.parametrize("name", ["max_norm", "clip_value"])
@pytest.mark.parametrize(("value", "error"), LIMITS, ids=repr)
def test_limits_of_clipping(name: str, value: Any, error: type[Exception] | None) -> None:
    if error is not None:
        with pytest.raises(error, match=f"fastmlp: {name} must be .*got"):
            made(**{name: value})
        return

    def scenario(make: Maker) -> Results:
        model = network()
        optimizer = sgd(model.parameters())
        return {"losses": losses(make(model, nn.MSELoss(), optimizer, **{name: value}))} | everything(model, optimizer)

    assert_equal_to_rounding(scenario, ISAS[-1:])


@pytest.mark.parametrize("name", ["max_norm", "clip_value"])
def test_limits_without_bound(name: str) -> None:
    results = []
    for options in ({}, {name: math.inf}):
        torch.manual_seed(0)
        model, _, step = made(**options)
        results.append([losses(step), *(p.detach() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("value", ["no", 1, None, []], ids=repr)
def test_keep_grads_of_another_type(value: Any) -> None:
    with pytest.raises(TypeError, match="fastmlp: keep_grads must be True or False"):
        made(keep_grads=value)


@pytest.mark.parametrize("value", [1.5, "2", True, None, 2**63], ids=repr)
def test_accumulate_of_another_type(value: Any) -> None:
    with pytest.raises(ValueError, match="fastmlp: accumulate must be a positive integer"):
        made(accumulate=value)


# Windows of accumulation.


class Windows(Loop):
    """A loop whose windows may end before."""

    def flush(self) -> None:
        if self.calls % self.accumulate:
            if self.max_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
            if self.clip_value is not None:
                nn.utils.clip_grad_value_(self.model.parameters(), self.clip_value)
            self.optimizer.step()
            self.calls = 0

    def restart(self) -> None:
        if self.calls % self.accumulate:
            self.optimizer.zero_grad()
            self.calls = 0


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.1}, {"clip_value": 0.01}], ids=str)
@pytest.mark.parametrize("end", ["flush", "restart"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_epochs_that_end_within_a_window(accumulate: int, end: str, options: dict[str, Any]) -> None:
    def scenario(make: Maker) -> Results:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        made: Any = Windows if make is Loop else make
        step = made(model, nn.MSELoss(), optimizer, accumulate=accumulate, **options)
        found: dict[str, Tensor] = {}
        for epoch in range(3):
            found |= {f"losses {epoch}": losses(step, 2 + epoch)}
            getattr(step, end)()
            found |= {f"{epoch} {name}": x for name, x in everything(model, optimizer).items()}
        return found

    assert_equal_to_rounding(scenario, ISAS[-1:])


def test_waiting() -> None:
    model, optimizer, step = made(accumulate=3)
    counts = []
    for _ in range(4):
        step(*batch())
        counts.append(step.waiting)
    assert counts == [1, 2, 0, 1]
    assert step.flush()
    before = snapshot(model, optimizer)
    assert not step.flush()
    step.restart()  # nothing is waiting, so that gradients stay
    assert snapshot(model, optimizer) == before
    step(*batch())
    step.restart()
    assert step.waiting == 0
    assert all(p.grad is None for p in model.parameters())


def test_flush_tells_schedulers_and_hooks() -> None:
    model, seen = network(), []
    optimizer = sgd(model.parameters())
    scheduler = StepLR(optimizer, 1)
    optimizer.register_step_post_hook(lambda *args: seen.append(1))
    step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer, accumulate=3)
    step(*batch())
    step.flush()
    scheduler.step()  # which would warn, and so raise, if no step had been made
    assert seen == [1]


# Losses.


def numbers(loss_fn: Any, name: str, value: Any) -> Any:
    setattr(loss_fn, name, value)
    return loss_fn


OPTIONS: dict[str, tuple[Callable[[], Any], str, list[Any]]] = {
    "delta": (nn.HuberLoss, "delta", [-1, 0, 0.0, float("nan"), -math.inf, 10**400, "1", None]),
    "beta": (nn.SmoothL1Loss, "beta", [-1, -1e-300, float("nan"), -math.inf, 10**5000, "1", None]),
    "label_smoothing": (nn.CrossEntropyLoss, "label_smoothing", [1.5, -0.1, math.nan, 10**400, None]),
    "ignore_index": (nn.CrossEntropyLoss, "ignore_index", [1.0, 2**63, -(10**5000), None]),
}


def test_options_of_all_losses() -> None:
    numbers = {loss.number[0] for loss in problems.LOSSES.values() if loss.number is not None}
    assert set(OPTIONS) == numbers | {loss.index for loss in problems.LOSSES.values() if loss.index is not None}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_losses_that_torch_refuses(case: str) -> None:
    kind, name, values = OPTIONS[case]
    model, loss_fn = network(), kind()
    optimizer = sgd(model.parameters())
    step = fastmlp.TrainStep(model, loss_fn, optimizer)
    x, y = batch()
    target = y.argmax(1) if isinstance(loss_fn, nn.CrossEntropyLoss) else y
    step(x, target)
    before = getattr(loss_fn, name)
    for value in values:
        if value not in (-0.1, math.nan):  # which torch takes for no smoothing
            with pytest.raises((TypeError, RuntimeError, ValueError, OverflowError)):
                numbers(kind(), name, value)(model(x), target)
        refused(model, numbers(kind(), name, value), optimizer, name)
        setattr(loss_fn, name, value)
        unchanged(step, model, optimizer, x, target, name)
    setattr(loss_fn, name, before)
    step(x, target)


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
def test_a_weight_of_a_loss_that_is_a_parameter(name: str) -> None:
    """It is where buffers are not looked for."""
    loss_fn: Any = nn.CrossEntropyLoss() if name == "weight" else nn.BCEWithLogitsLoss()
    model = network()
    optimizer = sgd(model.parameters())
    step = fastmlp.TrainStep(model, loss_fn, optimizer)
    del loss_fn._buffers[name]
    setattr(loss_fn, name, nn.Parameter(torch.ones(3, dtype=F64)))
    refused(model, loss_fn, optimizer, name)
    x, y = batch()
    unchanged(step, model, optimizer, x, y.argmax(1) if name == "weight" else y, name)


# Errors name dtypes and parameters as users know them.


def test_names_in_errors() -> None:
    model, optimizer, step = made()
    x, y = batch()
    unchanged(step, model, optimizer, x.float(), y, r"torch\.float32.*torch\.float64.*input\.to\(torch\.float64\)")
    unchanged(step, model, optimizer, x, y.float(), r"torch\.float32.*target\.to\(torch\.float64\)")
    unchanged(step, model, optimizer, x[:, :4], y, r"\[8, 4\].*expected 6")
    own = Own()
    optimizer = sgd(own.parameters())
    step = fastmlp.TrainStep(own, nn.MSELoss(), optimizer)
    own.second.bias.requires_grad_(False)
    own.second.bias.data = torch.zeros(3)
    unchanged(step, own, optimizer, x, y, r"second\.bias has dtype torch\.float32, expected .*torch\.float64")
    own.second.bias.data = torch.zeros(4, dtype=F64)
    unchanged(step, own, optimizer, x, y, r"second\.bias has shape \(4,\), expected \(3,\)")
    own.second.bias.data = torch.zeros(3, dtype=F64)
    own.second.weight.data = torch.zeros(3, 8, dtype=F64)
    unchanged(step, own, optimizer, x, y, r"second\.weight has shape \(3, 8\), expected 9")


# Objects that were never made, and rows without elements.


def test_objects_whose_init_was_never_called() -> None:
    step: Any = _C.TrainStep.__new__(_C.TrainStep)
    gc.collect()
    with pytest.raises(TypeError, match="TrainStep"):
        step.run(None, None)
    with pytest.raises(TypeError, match="TrainStep"):
        step.waiting  # noqa: B018
    with pytest.raises(TypeError, match="TrainStep"):
        step.waiting = 1
    run: Any = _C.TrainStep.run
    with pytest.raises(TypeError, match="TrainStep"):
        run(5, None, None)
    del step
    stack: Any = _C.Stack.__new__(_C.Stack)
    x, parameters = torch.zeros(2, 3), [torch.zeros(4, 3)]
    given: Any
    for given in (stack, None):
        for name in ("forward", "infer", "try_run"):
            with pytest.raises((TypeError, RuntimeError)):
                getattr(_C, name)(given, x, tuple(parameters))
        with pytest.raises((TypeError, RuntimeError)):
            _C.check_forward(given, x, parameters, True, None)


ROWS = 2**36
#: Of all losses of elements that are taken after any layer.
SUMS = [
    kind(reduction="sum") for kind, loss in problems.LOSSES.items() if loss.index is None and kind not in LOSSES_AFTER
]


@pytest.mark.parametrize("widths", [(0, 0), (0, 0, 0), (0, 5, 0), (5, 0)], ids=str)
@pytest.mark.parametrize("loss_fn", [nn.MSELoss(), *SUMS], ids=repr)
def test_any_number_of_rows_without_elements(loss_fn: nn.Module, widths: tuple[int, ...]) -> None:
    """They take no memory, and no time."""
    layers: list[nn.Module] = []
    for k, n in itertools.pairwise(widths):
        layers += [fastmlp.Linear(k, n), nn.Sigmoid()]
    model = nn.Sequential(*layers)
    step = fastmlp.TrainStep(model, loss_fn, sgd(model.parameters()))
    for shape in ((ROWS,), (2**20, 2**16)):
        x = torch.zeros(*[1 for _ in shape], widths[0]).expand(*shape, widths[0])
        loss = step(x, torch.zeros(*shape, 0))
        assert bool(loss.isnan()) == (loss_fn.reduction == "mean")
        assert loss_fn.reduction == "mean" or loss == 0
        for p in model.parameters():
            assert p.grad is not None
            assert not p.grad.any()


@pytest.mark.parametrize("widths", [(0, 0), (0, 0, 0), (5, 0), (5, 3, 0)], ids=str)
def test_any_number_of_rows_without_elements_in_passes(widths: tuple[int, ...]) -> None:
    layers = [layer for k, n in itertools.pairwise(widths) for layer in (nn.Linear(k, n), nn.Sigmoid())]
    model = fastmlp.Sequential(*layers)
    x = torch.zeros(1, widths[0]).expand(ROWS, widths[0])
    with torch.no_grad():
        assert model(x).shape == (ROWS, 0)
    if widths == (5, 3, 0):
        return  # its hidden layer would be kept
    output = model(x)
    output.sum().backward()
    assert output.shape == (ROWS, 0)
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)

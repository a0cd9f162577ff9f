"""`TrainStep` of models that end with a sigmoid or a softmax and the loss that takes it, or with another shape."""

import copy
import itertools
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmlp
from tests.support.axes import ISAS
from tests.support.endings import FORMS, HEADS, LOSSES_AFTER, OTHERWISE, Called, body
from tests.support.rounding import Results
from tests.support.training import Loop, Maker, assert_equal_to_rounding, everything

pytestmark = pytest.mark.usefixtures("as_before")

STEPS = 50
F64 = torch.float64
NAN = float("nan")


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def equals_the_loop(build: Callable[[], nn.Module], loss_fn: Any, batches: list[tuple[Tensor, Tensor]]) -> None:
    def scenario(make: Maker) -> Results:
        model = build()
        optimizer = adam(model)
        step = make(model, loss_fn, optimizer)
        losses = [step(*pair) for pair in batches]
        return {"losses": torch.stack(losses), **everything(model, optimizer)}

    assert_equal_to_rounding(scenario, ISAS)


def inputs(count: int = STEPS, dtype: torch.dtype = F64) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(7, 6, dtype=F64).to(dtype) for _ in range(count)]


def of_classes(count: int = STEPS, ignored: int = -100) -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.randint(5, (7,)).index_fill(0, torch.tensor([2]), ignored)) for x in inputs(count)]


def of_probabilities(outputs: int, count: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """Targets of which some are 0 or 1, where the logarithm of the other is not weighed."""
    return [(x, torch.rand(7, outputs, dtype=F64).mul(1.5).sub(0.25).clamp(0, 1)) for x in inputs(count)]


# The logarithm of a softmax, and the loss that takes it.

NLL: dict[str, Any] = {
    "mean": nn.NLLLoss(),
    "sum": nn.NLLLoss(reduction="sum"),
    "weighted": nn.NLLLoss(torch.linspace(0.5, 2, 5, dtype=F64), ignore_index=2),
    "weighted sum": nn.NLLLoss(torch.linspace(0, 2, 5, dtype=F64), reduction="sum"),
    "function": F.nll_loss,
}


@pytest.mark.parametrize("loss", NLL)
def test_nll(loss: str) -> None:
    equals_the_loop(lambda: nn.Sequential(*body(5), nn.LogSoftmax(dim=1)), NLL[loss], of_classes(ignored=1))
    if loss in ("mean", "function"):
        equals_the_loop(lambda: nn.Sequential(*body(5), nn.LogSoftmax(dim=-1)), NLL[loss], of_classes())


@pytest.mark.parametrize("form", [name for name, (head, _) in HEADS.items() if head == "log_softmax"])
def test_bits_are_those_of_the_cross_entropy(form: str) -> None:
    layers = body(5)
    model = HEADS[form][1](copy.deepcopy(layers))
    weight = torch.linspace(0.5, 2, 5, dtype=F64)
    steps = [
        fastmlp.TrainStep(layers, nn.CrossEntropyLoss(weight), adam(layers)),
        fastmlp.TrainStep(model, nn.NLLLoss(weight), adam(model)),
    ]
    for x, classes in of_classes(5):
        assert torch.equal(*(step(x, classes) for step in steps))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), layers.parameters(), strict=True))


def test_dimension_1_takes_matrices() -> None:
    model = nn.Sequential(*body(5), nn.LogSoftmax(1))
    step = fastmlp.TrainStep(model, nn.NLLLoss(), adam(model))
    with pytest.raises(RuntimeError, match=r"shape \[6\], expected two dimensions, since the model's LogSoftmax"):
        step(torch.zeros(6, dtype=F64), torch.tensor(1))
    model = nn.Sequential(*body(5), nn.LogSoftmax(-1))
    x, target = torch.ones(6, dtype=F64), torch.tensor(1)
    expected = nn.NLLLoss()(model(x), target).item()
    assert fastmlp.TrainStep(model, nn.NLLLoss(), adam(model))(x, target).item() == pytest.approx(expected, rel=1e-12)


# Probabilities.

BCE: dict[str, Any] = {"mean": nn.BCELoss(), "sum": nn.BCELoss(reduction="sum"), "function": F.binary_cross_entropy}
SIGMOIDS: dict[str, Callable[[Any], nn.Module]] = {
    "nn.Sigmoid": lambda layers: nn.Sequential(*layers, nn.Sigmoid()),
    "torch.sigmoid": lambda layers: Called(layers, torch.sigmoid),
    "x.sigmoid": lambda layers: Called(layers, lambda x: x.sigmoid()),
    "F.sigmoid": lambda layers: Called(layers, F.sigmoid),
    "fastmlp.Linear": lambda layers: nn.Sequential(*layers[:-1], _with_sigmoid(layers[-1])),
}


def _with_sigmoid(layer: Any) -> nn.Module:
    made = fastmlp.Linear(layer.in_features, layer.out_features, activation="sigmoid", dtype=F64)
    made.load_state_dict(layer.state_dict())
    return made


@pytest.mark.parametrize("loss", BCE)
@pytest.mark.parametrize("form", SIGMOIDS)
def test_bce(form: str, loss: str) -> None:
    equals_the_loop(lambda: SIGMOIDS[form](body(3)), BCE[loss], of_probabilities(3))


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_saturated_sigmoids(isa: str, dtype: torch.dtype, target: float) -> None:
    """Logarithms end at -100, and the divisor of the derivative at 1e-12, as torch has them."""
    values = [-800.0, -200, -100, -88, -60, -38, -37, -30, -20, -17, -10, -1, 0, 1, 10, 17, 20, 30, 37, 38, 100, 800]
    for value in values:
        results = []
        for make in (Loop, fastmlp.TrainStep):
            layer = nn.Linear(1, 1, dtype=dtype)
            with torch.no_grad():
                layer.weight.fill_(value)
                layer.bias.zero_()
            model = nn.Sequential(layer, nn.Sigmoid())
            step: Any = make(model, nn.BCELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
            loss = step(torch.ones(1, 1, dtype=dtype), torch.full((1, 1), target, dtype=dtype))
            assert layer.weight.grad is not None
            results.append((loss.item(), layer.weight.grad.item()))
        (loss, gradient), (our_loss, our_gradient) = results
        # Where 1 - p is small it is known to some units of p, and so are its logarithm and the divisor.
        with torch.no_grad():
            p = torch.sigmoid(torch.tensor(value, dtype=dtype)).item()
        eps = torch.finfo(dtype).eps
        relative = 8 * eps + (4 * eps / min(p, 1 - p) if value > 0 and 0 < p < 1 else 0)
        assert abs(our_loss - loss) <= 8 * eps * loss + relative, (value, loss, our_loss)
        assert abs(our_gradient - gradient) <= relative * max(abs(gradient), p), (value, gradient, our_gradient)


def after_nan(make: Maker, accumulate: int, calls: int) -> tuple[Results, int]:
    model = nn.Sequential(*body(2), nn.Sigmoid())
    other = nn.Parameter(torch.ones(2, dtype=F64))
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.Adam([*model[2:].parameters(), other], lr=1e-2)
    step: Any = make(model, nn.BCELoss(), optimizer, accumulate=accumulate)
    for x, y in of_probabilities(2, calls):
        step(x, y)
    other.grad = torch.ones(2, dtype=F64)
    bad = torch.full((7, 6), NAN, dtype=F64)
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        step(bad, torch.zeros(7, 2, dtype=F64))
    return everything(model, optimizer), getattr(step, "waiting", 0)


def state_after_nan(accumulate: int, calls: int, make: Maker) -> Results:
    return after_nan(make, accumulate, calls)[0]


@pytest.mark.parametrize("calls", [0, 2, 3])
def test_an_output_that_is_no_probability(isa: str, calls: int) -> None:
    """Raises as torch does, and leaves what the loop leaves."""
    for accumulate in (1, 2):
        _, waiting = after_nan(fastmlp.TrainStep, accumulate, calls)
        assert waiting == calls % accumulate
        assert_equal_to_rounding(partial(state_after_nan, accumulate, calls), [isa])


@pytest.mark.parametrize("value", [2.0, -1e-7, NAN, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_targets_that_are_no_probabilities(value: float, dtype: torch.dtype) -> None:
    model = nn.Sequential(*body(2, dtype), nn.Sigmoid())
    optimizer = adam(model)
    step = fastmlp.TrainStep(model, nn.BCELoss(), optimizer)
    target = torch.rand(7, 2, dtype=dtype)
    step(torch.ones(7, 6, dtype=dtype), target)
    before = everything(model, optimizer)
    target[3, 1] = value
    with pytest.raises(RuntimeError, match="all elements of target should be between 0 and 1"):
        nn.BCELoss()(model(torch.ones(7, 6, dtype=dtype)), target)
    with pytest.raises(RuntimeError, match=r"target holds .*, expected numbers between 0 and 1"):
        step(torch.ones(7, 6, dtype=dtype), target)
    after = everything(model, optimizer)
    assert all(torch.equal(after[name], before[name]) for name in before)


# Other shapes.


def shape_of(form: str) -> torch.Size:
    outputs, make = FORMS[form]
    shape: torch.Size = make(body(outputs))(torch.zeros(7, 6, dtype=F64)).shape
    return shape


@pytest.mark.parametrize("form", FORMS)
def test_shapes(form: str) -> None:
    outputs, make = FORMS[form]
    torch.manual_seed(2)
    batches = [(x, torch.randn(shape_of(form), dtype=F64)) for x in inputs()]
    equals_the_loop(lambda: make(body(outputs)), nn.MSELoss(), batches)


@pytest.mark.parametrize(
    "loss_fn", [nn.HuberLoss(), nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0, dtype=F64)), F.l1_loss]
)
def test_losses_of_squeezed_outputs(loss_fn: Any) -> None:
    equals_the_loop(
        lambda: Called(body(1), lambda x: x.squeeze(-1)), loss_fn, [(x, y.flatten()) for x, y in of_probabilities(1)]
    )


def test_probabilities_that_are_squeezed() -> None:
    batches = [(x, y.flatten()) for x, y in of_probabilities(1)]
    for ending in (lambda x: torch.sigmoid(x).squeeze(1), lambda x: torch.sigmoid(x.squeeze(1))):
        equals_the_loop(lambda ending=ending: Called(body(1), ending), nn.BCELoss(), batches)  # type: ignore[misc]


def test_classes_of_several_leading_dimensions() -> None:
    """As a language model has them: positions become rows."""
    batches = [(x.view(1, 7, 6), classes) for x, classes in of_classes()]
    equals_the_loop(lambda: Called(body(5), lambda x: x.view(-1, 5)), nn.CrossEntropyLoss(), batches)
    log: Any = nn.LogSoftmax(-1)
    equals_the_loop(lambda: Called(body(5), lambda x: log(x).flatten(0, 1)), nn.NLLLoss(), batches)


def test_weights_of_columns_that_are_no_longer_the_last() -> None:
    model = nn.Sequential(*body(6), nn.Unflatten(1, (2, 3)))
    loss_fn = nn.BCEWithLogitsLoss(pos_weight=torch.ones(6, dtype=F64))
    with pytest.raises(RuntimeError, match=r"pos_weight of the loss has shape \[6\]"):
        fastmlp.TrainStep(model, loss_fn, adam(model))(torch.zeros(7, 6, dtype=F64), torch.zeros(7, 2, 3, dtype=F64))


WRONG: dict[str, tuple[Callable[[nn.Sequential], nn.Module], nn.Module, Tensor, str]] = {
    "not squeezed": (
        lambda layers: Called(layers, lambda x: x.flatten()),
        nn.MSELoss(),
        torch.zeros(7, 6, dtype=F64),
        r"target has shape \[7, 6\], expected \[42\], the shape of the output",
    ),
    "no classes": (
        lambda layers: Called(layers, lambda x: x.flatten()),
        nn.CrossEntropyLoss(),
        torch.zeros(7, dtype=torch.long),
        r"shape \[42\], expected \(N, C\) or \(C\) with C = 6",
    ),
    "too many dimensions": (
        lambda layers: Called(layers, lambda x: x.view(-1, 2, 3)),
        nn.CrossEntropyLoss(),
        torch.zeros(7, dtype=torch.long),
        r"shape \[7, 2, 3\], expected \(N, C\)",
    ),
    "sizes": (
        lambda layers: nn.Sequential(*layers, nn.Unflatten(1, (4, -1))),
        nn.MSELoss(),
        torch.zeros(7, 6, dtype=F64),
        r"ends with unflatten\(1, 4, -1\), which an output of shape \[7, 6\] does not take",
    ),
    "dimensions": (
        lambda layers: nn.Sequential(*layers, nn.Flatten(2)),
        nn.MSELoss(),
        torch.zeros(7, 6, dtype=F64),
        r"ends with flatten\(2, -1\), which an output of shape \[7, 6\] does not take",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_sizes(case: str) -> None:
    make, loss_fn, target, message = WRONG[case]
    model = make(body(6))
    optimizer = adam(model)
    step = fastmlp.TrainStep(model, loss_fn, optimizer)
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=message):
        step(torch.zeros(7, 6, dtype=F64), target)
    after = everything(model, optimizer)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


# What is refused, and what changes between calls.

MISMATCHES: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "nll of logits": (
        lambda: body(5),
        nn.NLLLoss(),
        r"NLLLoss, which takes logarithms .* LogSoftmax: CrossEntropyLoss",
    ),
    "nll of probabilities": (
        lambda: nn.Sequential(*body(5), nn.Softmax(-1)),
        nn.NLLLoss(),
        r"ends with a softmax, and no loss of a TrainStep takes probabilities of several classes",
    ),
    "bce of logits": (lambda: body(1), nn.BCELoss(), r"BCELoss, which takes probabilities, .* Sigmoid: BCEWithLogits"),
    "bce of another activation": (
        lambda: nn.Sequential(*body(1), nn.Tanh()),
        F.binary_cross_entropy,
        r"BCELoss, which takes probabilities",
    ),
    "cross entropy of logarithms": (
        lambda: nn.Sequential(*body(5), nn.LogSoftmax(-1)),
        nn.CrossEntropyLoss(),
        r"the logarithm of a softmax, which CrossEntropyLoss does not take: NLLLoss does",
    ),
    "weights of elements": (
        lambda: nn.Sequential(*body(1), nn.Sigmoid()),
        nn.BCELoss(weight=torch.ones(7, 1, dtype=F64)),
        r"loss_fn has a weight for each element",
    ),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_losses_that_do_not_take_the_ending(case: str) -> None:
    build, loss_fn, message = MISMATCHES[case]
    model = build()
    with pytest.raises(TypeError, match=message + ".*fastmlp.capture takes loops"):
        fastmlp.TrainStep(model, loss_fn, adam(model))


@pytest.mark.parametrize(("make", "message"), OTHERWISE.values(), ids=OTHERWISE.keys())
def test_other_endings_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    with pytest.raises(TypeError, match=message):
        fastmlp.TrainStep(model, nn.MSELoss(), adam(model))


def test_follows_the_ending() -> None:
    model: Any = nn.Sequential(*body(6), nn.LogSoftmax(-1), nn.Unflatten(1, (6,)))
    step = fastmlp.TrainStep(model, nn.NLLLoss(), adam(model))
    x, target = torch.randn(7, 6, dtype=F64), torch.randint(6, (7,))
    step(x, target)
    model[5].dim = 0
    with pytest.raises(RuntimeError, match=r"5 \(LogSoftmax\) .* its dim is 0"):
        step(x, target)
    model[5].dim = 1
    model[6].unflattened_size = (3, 2)
    with pytest.raises(RuntimeError, match=r"an output of shape \[7, 3, 2\]"):
        step(x, target)
    model[6].unflattened_size = (-1,)
    handle = model[5].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"5 \(LogSoftmax\) .* it has hooks"):
        step(x, target)
    handle.remove()
    expected = nn.NLLLoss()(model(x), target).item()
    assert step(x, target).item() == pytest.approx(expected, rel=1e-12)
    del model[5]
    with pytest.raises(RuntimeError, match="NLLLoss, which takes logarithms"):
        step(x, target)


def test_follows_the_activation_of_a_layer() -> None:
    model: Any = SIGMOIDS["fastmlp.Linear"](body(2))
    step = fastmlp.TrainStep(model, nn.BCELoss(), adam(model))
    x, target = torch.randn(7, 6, dtype=F64), torch.rand(7, 2, dtype=F64)
    step(x, target)
    model[-1].activation = fastmlp.Activation("tanh")
    with pytest.raises(RuntimeError, match="BCELoss, which takes probabilities"):
        step(x, target)
    model[-1].activation = fastmlp.Activation("sigmoid")
    step(x, target)


def test_copies_pickles_and_names() -> None:
    for loss_fn, kind in ((F.nll_loss, nn.NLLLoss), (nn.NLLLoss(), nn.NLLLoss), (F.binary_cross_entropy, nn.BCELoss)):
        ending: nn.Module = nn.Sigmoid() if LOSSES_AFTER[kind] == "sigmoid" else nn.LogSoftmax(-1)
        model = nn.Sequential(*body(5), ending)
        step = fastmlp.TrainStep(model, loss_fn, adam(model))
        assert repr(step) == f"TrainStep(Sequential, {kind.__name__}, Adam)"
        x = torch.randn(7, 6, dtype=F64)
        target = torch.randint(5, (7,)) if kind is nn.NLLLoss else torch.rand(7, 5, dtype=F64)
        copies = copy.deepcopy(step), pickle.loads(pickle.dumps(step))
        losses = [one(x, target) for one in (step, *copies)]
        assert torch.equal(losses[0], losses[1])
        assert torch.equal(losses[0], losses[2])


def test_epochs() -> None:
    x, y = torch.randn(20, 6, dtype=F64), torch.randn(20, dtype=F64)
    found = []
    for ending, target in ((lambda x: x, y[:, None]), (lambda x: x.squeeze(-1), y)):
        model = Called(body(1), ending)
        step = fastmlp.TrainStep(model, nn.MSELoss(), adam(model))
        found.append(fastmlp.epochs(step, x, target, epochs=3, batch_size=8))
    assert torch.equal(found[0], found[1])


def test_empty_batches() -> None:
    for (kind, follows), reduction in itertools.product(LOSSES_AFTER.items(), ("mean", "sum")):
        ending: nn.Module = nn.Sigmoid() if follows == "sigmoid" else nn.LogSoftmax(-1)
        model = nn.Sequential(*body(5), ending)
        loss_fn: Any = kind(reduction=reduction)
        target = torch.empty(0, dtype=torch.long) if follows != "sigmoid" else torch.empty(0, 5, dtype=F64)
        loss = fastmlp.TrainStep(model, loss_fn, adam(model))(torch.empty(0, 6, dtype=F64), target)
        assert bool(loss.isnan()) == (reduction == "mean")

"""`TrainStep` of models that begin by flattening their input."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmlp
from tests.support.axes import ISAS
from tests.support.flattening import FEATURES, FORMS, OTHERWISE, SHAPES, VIEWS, WRONG, body, layouts
from tests.support.rounding import Results
from tests.support.training import Maker, assert_equal_to_rounding, everything

pytestmark = pytest.mark.usefixtures("as_before")

STEPS = 50


def batches(views: bool) -> list[tuple[Tensor, Tensor]]:
    """Inputs of all shapes and, where the model takes them, of all layouts; and classes."""
    torch.manual_seed(0)
    found: list[tuple[Tensor, Tensor]] = []
    while len(found) < STEPS:
        for shape in SHAPES:
            x = torch.randn(6, *shape, dtype=torch.float64)
            inputs = [x] if views or len(shape) == 1 else list(layouts(x).values())
            found += [(own, torch.randint(5, (6,))) for own in inputs]
    return found[:STEPS]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loop(form: str) -> None:
    def scenario(make: Maker) -> Results:
        model = FORMS[form](body())
        optimizer = adam(model)
        step = make(model, nn.CrossEntropyLoss(), optimizer)
        losses = [step(*pair) for pair in batches(form in VIEWS)]
        return {"losses": torch.stack(losses), **everything(model, optimizer)}

    assert_equal_to_rounding(scenario, ISAS)


@pytest.mark.parametrize("form", FORMS)
def test_bits_are_those_of_the_rows(form: str) -> None:
    layers = body()
    model = FORMS[form](copy.deepcopy(layers))
    steps = [fastmlp.TrainStep(part, nn.CrossEntropyLoss(), adam(part)) for part in (layers, model)]
    for x, target in batches(False):
        expected = steps[0](x.flatten(1), target)
        assert torch.equal(steps[1](x, target), expected)
    for mine, theirs in zip(model.parameters(), layers.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_targets_have_the_shape_of_the_output() -> None:
    model = FORMS["quickstart"](body(outputs=2))
    step = fastmlp.TrainStep(model, nn.MSELoss(), adam(model))
    x = torch.randn(6, 2, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        expected = nn.functional.mse_loss(model(x), torch.zeros(6, 2, dtype=torch.float64))
    assert float(step(x, torch.zeros(6, 2, dtype=torch.float64))) == pytest.approx(float(expected), rel=1e-12)
    with pytest.raises(RuntimeError, match=r"target has shape \[6, 2, 3, 2\], expected \[6, 2\]"):
        step(x, torch.zeros(6, 2, 3, 2, dtype=torch.float64))


def test_empty_batches() -> None:
    model = FORMS["quickstart"](body())
    step = fastmlp.TrainStep(model, nn.MSELoss(reduction="sum"), adam(model))
    assert float(step(torch.empty(0, 4, 6, dtype=torch.float64), torch.empty(0, 5, dtype=torch.float64))) == 0


@pytest.mark.parametrize("shape", WRONG, ids=str)
def test_wrong_sizes(shape: tuple[int, ...]) -> None:
    model = FORMS["quickstart"](body())
    optimizer = adam(model)
    step = fastmlp.TrainStep(model, nn.CrossEntropyLoss(), optimizer)
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=WRONG[shape]):
        step(torch.zeros(shape, dtype=torch.float64), torch.zeros(2, dtype=torch.long))
    after = everything(model, optimizer)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(("make", "message"), OTHERWISE.values(), ids=OTHERWISE.keys())
def test_what_flattens_otherwise_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    with pytest.raises(TypeError, match=message):
        fastmlp.TrainStep(model, nn.MSELoss(), adam(model))


def test_a_flattening_is_no_obstacle_beside_another() -> None:
    model: Any = nn.Sequential(nn.Flatten(), nn.Linear(FEATURES, 3), nn.LayerNorm(3)).double()
    reasons = fastmlp.TrainStep.explain(model, nn.MSELoss(), adam(model))
    assert "2 (LayerNorm)" in reasons[0]
    assert not any("Flatten" in reason for reason in reasons)


def test_follows_the_flattening() -> None:
    model: Any = nn.Sequential(nn.Flatten(), *body())
    step = fastmlp.TrainStep(model, nn.CrossEntropyLoss(), adam(model))
    x, target = torch.randn(6, 4, 6, dtype=torch.float64), torch.randint(5, (6,))
    step(x, target)
    flatten = model[0]
    flatten.end_dim = 1
    with pytest.raises(RuntimeError, match=r"0 \(Flatten\) .* it flattens dimensions 1 to 1"):
        step(x, target)
    flatten.end_dim = -1
    step(x, target)
    handle = flatten.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"0 \(Flatten\) .* it has hooks"):
        step(x, target)
    handle.remove()
    step(x, target)
    del model[0]
    with pytest.raises(RuntimeError, match="expected 24 in the last dimension"):
        step(x, target)
    step(x.flatten(1), target)


def test_epochs() -> None:
    """Steps without code of Python between them gather batches of images as they are."""
    images, classes = torch.randn(20, 2, 3, 4, dtype=torch.float64), torch.randint(5, (20,))
    found = []
    for inputs in (images, images.flatten(1)):
        model = nn.Sequential(nn.Flatten(), *body())
        step = fastmlp.TrainStep(model, nn.CrossEntropyLoss(), adam(model))
        found.append(fastmlp.epochs(step, inputs, classes, epochs=3, batch_size=8))
    assert torch.equal(found[0], found[1])

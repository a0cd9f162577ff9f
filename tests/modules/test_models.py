"""Models of other libraries compute converted what they compute unconverted."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from fastmlp import convert
from tests.support.comparison import PARTS, Reference, pair, results
from tests.support.rounding import distance, rounding_bounds
from tests.support.subjects import PUBLISHED, Subject
from tests.support.subjects.published import (
    Digits,
    PhysicsInformed,
    Policy,
    TabularMLP,
    TabularResNet,
    Torchvision,
)

#: Each model in place and recorded, and how many runs and single layers are fused, how many activations are not.
CASES: list[tuple[type[Subject], bool, int, int]] = [
    (Torchvision, False, 1, 0),  # its class inherits the forward of nn.Sequential
    (Torchvision, True, 1, 0),
    (TabularMLP, False, 4, 0),
    (TabularMLP, True, 1, 0),
    (TabularResNet, False, 4, 1),  # an activation that follows the normalisation
    (TabularResNet, True, 4, 1),
    (Policy, False, 4, 0),
    (Digits, False, 1, 0),
    (Digits, True, 1, 0),
    (PhysicsInformed, False, 5, 0),
    (PhysicsInformed, True, 1, 0),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are small: where others use the processor too, more threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(kind: type[Subject], dtype: torch.dtype) -> Subject:
    if find_spec(kind.package) is None:
        pytest.skip(f"{kind.package} is not there, which is of the extra 'models'")
    return kind(dtype)


@pytest.mark.parametrize(("kind", "trace", "fused", "kept"), CASES)
def test_the_same_model(kind: type[Subject], trace: bool, fused: int, kept: int) -> None:
    subject = made(kind, torch.float64)
    plain, converted = pair(subject, trace)
    found = Reference(subject, plain).compare(converted)
    assert found.keys
    assert [sum(bool(entry.reason) is reason for entry in found.report) for reason in (False, True)] == [fused, kept]
    for part in PARTS:
        assert found.share(part) <= 1, (part, found.differences, found.bounds)


@pytest.mark.parametrize(("kind", "trace", "fused", "kept"), CASES)
def test_the_same_outputs_in_float32(kind: type[Subject], trace: bool, fused: int, kept: int) -> None:
    subject = made(kind, torch.float32)
    plain, converted = pair(subject, trace)

    def outputs(model: nn.Module) -> dict[str, Tensor]:
        return {"outputs": subject.outputs(model.eval()).detach()}

    expected = outputs(plain)
    bounds = rounding_bounds(lambda: outputs(plain), expected)
    assert distance(outputs(converted)["outputs"], expected["outputs"]) <= bounds["outputs"]


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_wrong_model_is_found_out(kind: type[Subject]) -> None:
    subject = made(kind, torch.float64)
    plain, wrong = pair(subject, trace=False)
    with torch.no_grad():
        next(wrong.parameters()).mul_(1 + 1e-9)
    found = Reference(subject, plain).compare(wrong)
    for part in PARTS:
        assert found.share(part) > 1, part


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_training_changes_every_parameter(kind: type[Subject]) -> None:
    subject = made(kind, torch.float32)
    for model in pair(subject, trace=False):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        found = results(subject, model)
        assert [name for name, p in before.items() if torch.equal(found[f"training: {name}"], p)] == []
        assert [name for name in before if f"gradients: {name}" not in found] == []
        assert [name for name in model.state_dict() if f"training: {name}" not in found] == []


def test_what_cannot_be_recorded_says_so() -> None:
    policy = made(Policy, torch.float32).make()
    with pytest.raises(RuntimeError, match=r"torch.fx cannot record the forward of ActorCriticPolicy"):
        convert(policy, trace=True)

"""Whether the attack on `fastmlp.capture` finds what it is there for: captures that go wrong, each in its own way."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastmlp
from tests.attack.captured import PREFIX, judged
from tests.attack.cases import Result, play
from tests.attack.fake import Fake, a_number_drawn
from tests.attack.runner import main
from tests.attack.shorter import shortest
from tests.attack.surfaces import SURFACES

SOURCE = """
import functools
import torch
import torch.nn.functional as F
from torch import nn
import fastmlp
captured = functools.partial(fastmlp.capture, fuse=False)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
unused = torch.zeros(3)


@captured
def step(x, y):
    optimizer.zero_grad()
    loss = F.mse_loss(net(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach(), x


def calls():
    for call in range(6):
        if call == 4:
            unused.add_(1)
        yield step(torch.randn(8, 3), torch.randn(8, 2))
"""


def right(fake: Fake, result: Any) -> Any:
    return result


def an_ulp_off(fake: Fake, result: Any) -> Any:
    return torch.nextafter(result[0], torch.tensor(9.0)), result[1]


def one_memory(fake: Fake, result: Any) -> Any:
    if fake.memory is None:
        fake.memory = result[0].clone()
    return fake.memory.copy_(result[0]), result[1]


def another_structure(fake: Fake, result: Any) -> Any:
    return list(result)


def a_parameter_off(fake: Fake, result: Any) -> Any:
    with torch.no_grad():
        fake.net[0].weight[0, 0].nextafter_(torch.tensor(9.0))
    return result


def a_zero_of_another_sign(fake: Fake, result: Any) -> Any:
    fake.function.__globals__["unused"].neg_()
    return result


def a_buffer_left(fake: Fake, result: Any) -> Any:
    fake.net[1].num_batches_tracked.sub_(1)
    return result


def no_gradients(fake: Fake, result: Any) -> Any:
    fake.net.zero_grad()
    return result


def no_state(fake: Fake, result: Any) -> Any:
    fake.optimizer.state[fake.net[0].weight]["exp_avg"].zero_()
    return result


def another_number(fake: Fake, result: Any) -> Any:
    fake.optimizer.param_groups[0]["lr"] = 0.02
    return result


def frozen_parameter(fake: Fake, result: Any) -> Any:
    fake.net[0].bias.requires_grad_(False)
    return result


def never(fake: Fake, result: Any) -> Any:
    fake.replays = 0
    return result


def raises(error: Exception) -> Callable[[Fake, Any], Any]:
    def wrong(fake: Fake, result: Any) -> Any:
        raise error

    return wrong


#: By the beginning of the failure. The last ones are errors that are no refusals by name.
WRONG: list[tuple[str, Callable[[Fake, Any], Any]]] = [
    ("result: result of the call[0] at 0", an_ulp_off),
    ("changed: result of the call[0] of call 2", one_memory),
    ("result: result of the call kind is ('list', 2)", another_structure),
    ("state: generator of torch", a_number_drawn),
    ("state: net.0.weight at 0", a_parameter_off),
    ("state: unused at 0: -0.0 for 0.0", a_zero_of_another_sign),
    ("state: net.1.num_batches_tracked", a_buffer_left),
    ("state: net.0.weight.grad is there only in eager", no_gradients),
    ("state: optimizer[0](0).state['exp_avg'] at", no_state),
    ("state: optimizer[0]['lr'] is 0.02", another_number),
    ("state: net.0.bias has requires_grad False", frozen_parameter),
    ("unreplayed: none of 6 calls", never),
    ("raised: call 2, PyTorch does not raise: KeyError", raises(KeyError("x"))),
    ("unnamed: the error does not begin", raises(fastmlp.CaptureError("no prefix"))),
    ("unplaced: the error names no line", raises(fastmlp.CaptureError(f"{PREFIX}nowhere"))),
    ("refused: call 2, though nothing", raises(fastmlp.CaptureError(f"{PREFIX}capture_3.py:5: why"))),
]


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Fake, Any], Any]], None]:
    def put(wrong: Callable[[Fake, Any], Any]) -> None:
        monkeypatch.setattr(fastmlp, "capture", lambda function, **options: Fake(function, wrong))

    return put


def test_a_right_one_agrees(faked: Callable[[Callable[[Fake, Any], Any]], None]) -> None:
    faked(right)
    for fuse in (False, True):
        verdict = judged(SOURCE, 3, fuse, False)
        assert not verdict.failure
        assert (verdict.calls, verdict.replays, verdict.raised, verdict.refused) == (6, 4, None, None)


@pytest.mark.parametrize(("failure", "wrong"), WRONG, ids=[getattr(wrong, "__name__", "") for _, wrong in WRONG])
def test_a_wrong_one_is_found(
    faked: Callable[[Callable[[Fake, Any], Any]], None], failure: str, wrong: Callable[[Fake, Any], Any]
) -> None:
    faked(wrong)
    assert judged(SOURCE, 3, False, False).failure.startswith(failure)


def test_with_fusion_results_may_differ_as_far_as_rounding_goes(
    faked: Callable[[Callable[[Fake, Any], Any]], None],
) -> None:
    faked(an_ulp_off)
    assert not judged(SOURCE, 3, True, False).failure
    faked(lambda fake, result: (result[0] * 1.01, result[1]))
    assert judged(SOURCE, 3, True, False).failure.startswith("result: result of the call[0]")


def test_a_refusal_by_name_ends_a_program_that_may_be_refused(
    faked: Callable[[Callable[[Fake, Any], Any]], None],
) -> None:
    error = fastmlp.CaptureError(f"{PREFIX}capture_3.py:5: why")
    faked(raises(error))
    verdict = judged(SOURCE, 3, False, True)
    assert verdict.refused is error
    assert (verdict.calls, verdict.failure) == (2, "")
    assert judged(SOURCE, 3, False, True, "eager").failure.startswith("raised: call 2")


def test_silence_where_torch_raises_is_found(faked: Callable[[Callable[[Fake, Any], Any]], None]) -> None:
    """A captured function that does not run the line that raises."""

    def wrong(fake: Fake, result: Any) -> Any:
        if fake.calls == 4:
            fake.function = lambda *args: result
        return result

    faked(wrong)
    source = SOURCE.replace("    loss.backward()", "    loss.backward()\n    assert unused[0] == 0")
    assert judged(source, 3, False, False).failure.startswith("silent: call 4")


def test_programs_are_drawn_again_from_their_seeds(
    capsys: pytest.CaptureFixture[str], faked: Callable[[Callable[[Fake, Any], Any]], None]
) -> None:
    faked(right)
    assert main(["--surface", "capture", "--seed", "3", "--show"]) == 0
    first = capsys.readouterr().out
    assert main(["--surface", "capture", "--seed", "3", "--show"]) == 0
    assert capsys.readouterr().out == first
    assert "@captured" in first or "captured(" in first


def test_twins_of_drawn_programs_agree_where_nothing_is_captured(
    faked: Callable[[Callable[[Fake, Any], Any]], None],
) -> None:
    """Else a failure would say nothing about `capture`."""
    faked(right)
    results: list[Result] = [play("capture", SURFACES["capture"], seed) for seed in range(8)]
    assert not [result.failure for result in results if result.failure]


def test_a_program_is_made_shorter() -> None:
    source = "a = 1\nif a:\n    for i in range(3):\n        b = a\n    c = 2\n\n\nprint(b)\n"
    assert shortest(source, lambda text: "b = a" in text) == "b = a"
    assert shortest(source, lambda text: "for i" in text and "b = a" in text) == "for i in range(3):\n    b = a"

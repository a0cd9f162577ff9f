"""The profile function of a recorder: what it sees while it pauses for the recorder's own work, and where it cannot."""

import random
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastmlp import CaptureError, capture
from fastmlp.tape import python_calls


@pytest.fixture(params=[True, False], ids=["pauses", "stays"])
def _pause(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Python 3.11, and as in later versions."""
    monkeypatch.setattr(python_calls, "_MAY_PAUSE", request.param)


@torch.library.custom_op("fastmlp_test::scaled_by_chance", mutates_args=())
def scaled_by_chance(x: Tensor) -> Tensor:
    return x * random.random()  # here


pytestmark = pytest.mark.usefixtures("_pause")


def test_code_of_python_below_an_operator_is_seen() -> None:
    with pytest.raises(CaptureError, match=r"Random.random\(\) draws a random number"):
        capture(lambda x: scaled_by_chance(x + 1))(torch.ones(3))
    assert sys.getprofile() is None


def test_a_draw_after_operations_is_seen() -> None:
    def step(x: Tensor) -> Tensor:
        y = (x + 1).sum()
        return y * random.random()

    with pytest.raises(CaptureError, match=r"Random.random\(\) draws a random number"):
        capture(step)(torch.ones(3))


def test_modules_called_after_operations_are_seen() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    step = capture(lambda x: model[1](model[0](x * 2)))
    for _ in range(3):
        step(torch.ones(2, 3))
    assert step.replays == 1
    model[1].eval()
    step(torch.ones(2, 3))
    assert step.replays == 1  # recorded again, because the flag is one of a module that was seen


@pytest.mark.parametrize("reads", [False, True])
def test_whoever_profiles_the_thread_does_so_again(reads: bool) -> None:
    calls: list[str] = []

    def profile(frame: Any, event: str, _: Any) -> None:
        calls.append(event)

    def step(x: Tensor) -> Tensor:
        y = x.exp() + 1
        return y * y.sum().item() if reads else y

    captured = capture(step)
    sys.setprofile(profile)
    try:
        if reads:
            with pytest.raises(CaptureError, match="an element of a tensor is read"):
                captured(torch.ones(3))
        else:
            captured(torch.ones(3))
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
    assert calls


def test_threads_of_others_keep_no_profile_function() -> None:
    recorder = python_calls.PythonCalls(None)
    recorder.pause()
    recorder.resume()  # as in a thread of autograd's, where the recorder has not started
    assert sys.getprofile() is None

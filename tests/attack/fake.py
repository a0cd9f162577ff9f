"""Stands in for `fastmlp.capture` where a test needs one that goes wrong in a known way."""

import types
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Fake", "a_number_drawn"]


class Fake:
    """A capture that runs the function as it is, and then does `wrong` where it says that it replays."""

    def __init__(self, function: Callable[..., Any], wrong: Callable[["Fake", Any], Any]) -> None:
        self.function, self.wrong, self.calls, self.replays = function, wrong, 0, 0
        self.memory: Any = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        result = self.function(*args, **options)
        self.calls += 1
        if self.calls > 2:
            self.replays += 1
            result = self.wrong(self, result)
        return result

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return types.MethodType(self, owner)

    def reset(self) -> None:
        self.calls = 0

    @property
    def net(self) -> Any:
        return self.function.__globals__["net"]

    @property
    def optimizer(self) -> Any:
        return self.function.__globals__["optimizer"]


def a_number_drawn(fake: Fake, result: Any) -> Any:
    torch.rand(1)
    return result

"""Forwards that write or ask for something besides the model: refused, and put back."""

import functools
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastmlp

COUNT = 0
SEEN: list[Any] = []
CACHE: dict[str, Tensor] = {}
DRAWS = np.random.default_rng(0)


@functools.lru_cache
def mask(size: int) -> Tensor:
    return torch.tril(torch.ones(size, size))


@functools.cache
def width(size: int) -> int:
    return 2 * size


class Slotted:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class Net(nn.Module):
    calls = 0
    shared: list[int] = []  # noqa: RUF012

    def __init__(self, change: Callable[["Net"], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.change = change
        self.slotted, self.counts, self.space = Slotted(), Counter[str](), SimpleNamespace(calls=0)

    def forward(self, x: Tensor) -> Tensor:
        self.change(self)
        return self.fc(x).relu()


def count(net: Net) -> None:
    global COUNT
    COUNT += 1


def fill(net: Net) -> None:
    if "ones" not in CACHE:
        CACHE["ones"] = torch.ones(3)


def count_in_class(net: Net) -> None:
    type(net).calls += 1


def count_in_slot(net: Net) -> None:
    net.slotted.calls += 1


def count_in_space(net: Net) -> None:
    net.space.calls += 1


def count_in_default(net: Net, memo: list[int] = []) -> None:  # noqa: B006
    memo.append(1)


def count_in_attribute(net: Net) -> None:
    count_in_attribute.calls = 1  # type: ignore[attr-defined]


def closure() -> Callable[[Net], None]:
    calls = 0

    def count_in_closure(net: Net) -> None:
        nonlocal calls
        calls += 1

    return count_in_closure


def state(net: Net) -> Any:
    return (
        *(COUNT, list(SEEN), dict(CACHE), repr(DRAWS.bit_generator.state), net.calls, list(net.shared)),
        *(net.slotted.calls, dict(net.counts), net.space.calls, vars(net.change), net.change.__defaults__),
        *([cell.cell_contents for cell in net.change.__closure__ or ()], mask.cache_info(), width.cache_info()),
    )


CHANGES: dict[str, tuple[Callable[[Net], Any], str]] = {
    "global": (count, "test_trace_outside.COUNT"),
    "global list": (lambda net: SEEN.append(1), "test_trace_outside.SEEN"),
    "global dictionary": (fill, "test_trace_outside.CACHE.ones"),
    "global generator": (lambda net: DRAWS.random(), "test_trace_outside.DRAWS"),
    "cached function": (lambda net: mask(3), "test_trace_outside.mask, a function with a cache"),
    "class": (count_in_class, "Net.calls"),
    "list of a class": (lambda net: net.shared.append(1), "Net.shared"),
    "slot": (count_in_slot, "slotted.calls"),
    "counter": (lambda net: net.counts.update(["calls"]), "counts.calls"),
    "namespace": (count_in_space, "space.calls"),
    "default": (count_in_default, "a default of count_in_default"),
    "attribute of a function": (count_in_attribute, "count_in_attribute.calls"),
    "closure": (closure(), r"closure\.<locals>\.count_in_closure.calls"),
}


@pytest.mark.parametrize("use", [lambda net: fastmlp.convert(net, trace=True), fastmlp.freeze])
@pytest.mark.parametrize("name", CHANGES)
def test_what_a_forward_writes_outside_is_refused_and_put_back(name: str, use: Callable[[Net], Any]) -> None:
    change, named = CHANGES[name]
    net = Net(change)
    before = state(net)
    with pytest.raises((RuntimeError, TypeError), match=rf"^fastmlp: .* it (changes|calls) (tests\.capture\.)?{named}"):
        use(net)
    assert state(net) == before


def test_cached_functions_of_no_tensors_are_called_without_their_cache() -> None:
    before = width.cache_info()

    class Wide(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).relu() * width(3)

    net = Wide(count)
    recorded = fastmlp.convert(net, trace=True)
    assert width.cache_info() == before
    x = torch.randn(2, 3)
    assert torch.equal(recorded(x), fastmlp.functional.linear(x, net.fc.weight, net.fc.bias, "relu") * 6)


def counted(x: Tensor) -> float:
    try:
        return float(len(x))
    except Exception:
        return 2.0


def branched(x: Tensor) -> float:
    scale = 1.0
    try:
        if x.shape[0] > 5:
            scale = 2.0
    except Exception:
        pass
    return scale


QUESTIONS: dict[str, tuple[Callable[[Tensor], float], str]] = {
    "length that is caught": (counted, "it asks for the length of a value"),
    "branch that is caught": (branched, "control flow"),
    "shape as a key": (
        lambda x: {torch.Size((5, 3)): 2.0}.get(x.shape, 1.0),
        "it looks in a dictionary or set for a value",
    ),
    "number as a key": (lambda x: {5: 2.0}.get(x.shape[0], 1.0), "it looks in a dictionary or set for a value"),
    "number in a set": (lambda x: float(len({x.dim(), 3})), "it looks in a dictionary or set for a value"),
    "text": (lambda x: 2.0 if f"{x.dim()}" == "3" else 1.0, "it makes text of a value"),
    "text of a dtype": (lambda x: 2.0 if str(x.dtype) == "torch.float64" else 1.0, "it makes text of a value"),
    "identity of a dtype": (lambda x: 2.0 if x.dtype is torch.float64 else 1.0, "it asks for dtype of a value"),
    "identity of a flag": (lambda x: 2.0 if x.requires_grad is True else 1.0, "it asks for requires_grad of a value"),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_what_a_forward_asks_of_its_input_is_refused(name: str) -> None:
    question, reason = QUESTIONS[name]

    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.float()).relu() * question(x)

    with pytest.raises(RuntimeError, match=rf"^fastmlp: .*{reason}"):
        fastmlp.convert(Asking(), trace=True)


def test_a_forward_that_asks_whether_two_arguments_are_one_is_refused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            projected = self.fc(query).relu()
            return projected * 2 if query is key else projected + self.fc(key)

    with pytest.raises(RuntimeError, match="recorded, it calls other functions"):
        fastmlp.convert(Attention(), trace=True)

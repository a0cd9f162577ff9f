"""Where operations may not become one: memory that is shared, written in place, or read in another dtype."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import _C
from tests.support.rounding import distance, rounding_bounds

CALLS = 5
#: Of more elements than a block of a run has, so that a block sees what an earlier one has written.
LONG = 3001


def rows(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randn(6, 5, generator=generator),)


def overlapping(generator: torch.Generator) -> tuple[Tensor, ...]:
    base = torch.randn(LONG, generator=generator)
    return base[:-1], base[1:]


def apart_then_overlapping() -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    """Arguments that share memory in replays only."""
    calls = iter(range(CALLS))

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        a, b = overlapping(generator)
        return (a, b.clone()) if next(calls) < 2 else (a, b)

    return make


def copied_over(a: Tensor, b: Tensor) -> Tensor:
    b.copy_(a * 2)
    return a + 1


def added_to(a: Tensor, b: Tensor) -> Tensor:
    before = a * 2
    b.add_(1)
    return a + before


def shifted(x: Tensor) -> Tensor:
    y = x * 1
    y[1:] = y[:-1].clone()
    y[:, 0] = y[:, 1]
    return y


def transposed(x: Tensor) -> Tensor:
    y = x[:, :5] * 1
    y[:5].t().mul_(2)
    return y + y[0]


def zeros_over_zeros(x: Tensor) -> Tensor:
    zeros = torch.zeros(6, 5)
    part = zeros[:, 1:3]
    part += x[:, 1:3]
    return zeros * x


def ones_as_integers(x: Tensor) -> Tensor:
    return torch.ones(5, dtype=torch.float64).view(torch.int64) * x.double()


def running(buffer: Tensor) -> Callable[[Tensor], Tensor]:
    def step(x: Tensor) -> Tensor:
        before = buffer * 1
        buffer.mul_(0.5).add_(x)
        return before + buffer

    return step


EXACT: dict[str, tuple[Callable[[], Callable[..., Tensor]], Callable[[], Callable[[torch.Generator], Any]]]] = {
    "copied over an argument": (lambda: copied_over, lambda: overlapping),
    "added to an argument": (lambda: added_to, lambda: overlapping),
    "overlapping in replays only": (lambda: copied_over, apart_then_overlapping),
    "shifted": (lambda: shifted, lambda: rows),
    "transposed": (lambda: transposed, lambda: rows),
    "zeros that are written": (lambda: zeros_over_zeros, lambda: rows),
    "another dtype": (lambda: ones_as_integers, lambda: rows),
    "a buffer": (lambda: running(torch.zeros(6, 5)), lambda: rows),
}


@pytest.mark.parametrize("name", EXACT)
def test_memory_that_is_shared_or_written(name: str) -> None:
    """These round nothing otherwise than torch does, so that results and arguments have the same bits."""
    make_function, make_arguments = EXACT[name]

    def run(capture: bool) -> list[Tensor]:
        function, arguments = make_function(), make_arguments()
        called = fastmlp.capture(function) if capture else function
        generator, found = torch.Generator().manual_seed(0), []
        for _ in range(CALLS):
            given = arguments(generator)
            found += [called(*given).clone(), *(tensor.clone() for tensor in given)]
        if isinstance(called, fastmlp.Captured):
            assert called.replays == CALLS - 2
            assert any(tape.nodes for tape in called.report().tapes)
        return found

    assert all(map(torch.equal, run(False), run(True)))


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.Tanh(), nn.GELU()])
@pytest.mark.parametrize("reads", ["output", "both"])
def test_an_activation_behind_a_product(activation: nn.Module, reads: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(7, 5)

    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            before = layer(x)
            after = activation(before)
            return after * before if reads == "both" else after * 1

    x = torch.randn(9, 7)
    captured = fastmlp.capture(function)
    results = [captured(x) for _ in range(CALLS)]
    expected = {"result": function(x)}
    bound = rounding_bounds(lambda: {"result": function(x)}, expected, steps=True)["result"]
    assert max(distance(result, expected["result"]) for result in results) <= bound
    (tape,) = captured.report().tapes
    assert tape.nodes == {"product": 1, "elementwise": 1}


def test_what_nobody_reads_is_not_computed() -> None:
    captured = fastmlp.capture(lambda x: ((x @ x.t()).tanh().sum(), x + 1)[1])
    for _ in range(4):
        x = torch.randn(6, 5)
        assert torch.equal(captured(x), x + 1)
    (tape,) = captured.report().tapes
    assert tape.nodes == {"elementwise": 1}


def test_masks_of_dropout_and_other_draws_keep_their_order() -> None:
    dropout = nn.Dropout(0.3)

    def function(x: Tensor) -> Tensor:
        return dropout(x) + torch.rand_like(x) + dropout(2 * x)

    def run(called: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        return [called(torch.ones(6, 5)) for _ in range(CALLS)]

    captured = fastmlp.capture(function)
    assert all(map(torch.equal, run(function), run(captured)))
    assert captured.report().tapes[0].nodes.get("bernoulli", 0) == 2 * _C.draws_as_torch()

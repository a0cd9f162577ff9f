"""Where operations may not become one: memory that is shared, written in place, or read in another dtype."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


SIDE = 64


def wholes(generator: torch.Generator) -> tuple[Tensor, ...]:
    """Small whole numbers, of which products and sums of few are exact."""
    return (torch.randint(-2, 3, (SIDE, SIDE), generator=generator).float(),)


def read_later(x: Tensor) -> Tensor:
    a = x + 1
    cheap = a * -2
    return (a @ a) * cheap + a


def read_later_by_two(x: Tensor) -> Tensor:
    a = x + 1
    twice = a * 2
    cheap = a - twice * x
    product = a @ a
    other = (product * cheap) @ x
    return other - cheap + a * x


def written_before_it_is_read(x: Tensor) -> Tensor:
    a = x + 1
    cheap = a * -2
    product = a @ a
    a.mul_(3)
    return product * cheap + a


def argument_written_before_it_is_read(x: Tensor) -> Tensor:
    cheap = x * -2
    product = x @ x
    x.add_(1)
    return product * cheap


def argument_written_before_it_is_used(x: Tensor) -> Tensor:
    x.neg_()
    cheap = x * 2
    return (x @ x) * cheap


def argument_computed_into(x: Tensor) -> Tensor:
    torch.add(x, 1, out=x)
    cheap = 1 - x
    return (x @ x) * cheap


def part_of_an_argument_written(x: Tensor) -> Tensor:
    x[0].add_(1)
    cheap = x[0] * 2
    return (x @ x)[0] * cheap


def changed_after_a_product(x: Tensor) -> Tensor:
    a = x + 1
    cheap = a * -2
    product = a @ a
    cheap.add_(product)
    return product @ x * cheap + a


def read_across(x: Tensor) -> Tensor:
    a = x + 1
    cheap = a * -2
    return (a @ a) * cheap.t() + cheap + a


def read_in_part(x: Tensor) -> Tensor:
    a = x + 1
    cheap = a * -2
    return (a @ a)[:7] * cheap[1:8] + a[:7]


def read_by_a_product_too(x: Tensor) -> Tensor:
    a = x + 1
    cheap = a * -2
    return (a @ cheap) * cheap + a


def over_an_input_of_two(x: Tensor) -> Tensor:
    product = x @ x
    return (product + x) @ ((product * 2) @ x)


def over_what_is_read_across_too(x: Tensor) -> Tensor:
    product = x @ x
    return (product * 2 + product.t()) @ x


def over_what_lies_across(x: Tensor) -> Tensor:
    product = x @ x
    return (x + product.t()) @ x


#: The functions above, and how many matrices their tapes need beside arguments and results.
WHOLES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    function.__name__: (function, matrices)
    for function, matrices in (
        (read_later, 2),
        (read_later_by_two, 3),
        (written_before_it_is_read, 3),
        (argument_written_before_it_is_read, 1),
        (argument_written_before_it_is_used, 2),
        (argument_computed_into, 1),
        (part_of_an_argument_written, 1),
        (changed_after_a_product, 4),
        (read_across, 3),
        (read_in_part, 3),
        (read_by_a_product_too, 3),
        (over_an_input_of_two, 3),
        (over_what_is_read_across_too, 2),
        (over_what_lies_across, 2),
    )
}


@pytest.mark.parametrize("name", WHOLES)
def test_values_that_are_read_later(name: str) -> None:
    """Runs compute them again or write over them, where nothing else is in the way."""
    function, matrices = WHOLES[name]
    captured = fastmlp.capture(function)
    for call in range(CALLS):
        (x,) = wholes(torch.Generator().manual_seed(call))
        given = x.clone()
        expected = function(x)
        assert torch.equal(captured(given), expected)
        assert torch.equal(given, x)
    (tape,) = captured.report().tapes
    assert captured.replays == CALLS - 2
    assert tape.arena_bytes // (SIDE * SIDE * 4) == matrices


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


#: Activations that torch computes by one operator, and how many of its two calls a tape leaves to torch.
OF_ONE_OPERATOR: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "elu": (F.elu, 0),
    "elu, alpha": (lambda z: F.elu(z, 0.5), 0),
    "celu": (F.celu, 0),
    "celu, alpha": (lambda z: F.celu(z, 0.7), 0),
    "celu, negative alpha": (lambda z: F.celu(z, -0.7), 2),
    "selu": (F.selu, 2),
    "elu in place": (lambda z: F.elu(z * 1.5, 0.5, inplace=True), 1),
}


@pytest.mark.parametrize("name", OF_ONE_OPERATOR)
def test_activations_of_one_operator(name: str) -> None:
    act, left = OF_ONE_OPERATOR[name]
    torch.manual_seed(0)
    weight, x = nn.Parameter(torch.randn(5, 7)), torch.randn(9, 7)

    def function(x: Tensor) -> Tensor:
        return torch.autograd.grad(act(F.linear(x, weight)).square().sum(), weight)[0]

    captured = fastmlp.capture(function)
    results = [captured(x) for _ in range(CALLS)]
    expected = {"result": function(x)}
    bound = rounding_bounds(functools.partial(one_result, function, x), expected, steps=True)["result"]
    assert max(distance(result, expected["result"]) for result in results) <= bound
    (tape,) = captured.report().tapes
    assert sum(count for operator, count in tape.torch.items() if "elu" in operator) == left


def one_result(function: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    return {"result": function(x)}


def kinds(x: Tensor) -> Tensor:
    """Where NaN and the infinities are."""
    return torch.stack([x.isnan(), x.isposinf(), x.isneginf()])


#: Shapes, dimensions, and whether kernels of ours compute their sums of exponentials.
SUMS = {
    "rows": ((64, 4), (1,), True),
    "ends": ((5, 3, 7), (0, 2), True),
    "middle": ((5, 3, 7), (-2,), True),
    "all": ((6,), (0,), True),
    "single": ((3, 1), (1,), True),
    "wide": ((2, 100), (1,), True),
    "many narrow": ((300, 4), (1,), True),
    "scalar": ((), (0,), False),
}


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize(("shape", "dim", "taken"), SUMS.values(), ids=list(SUMS))
def test_logsumexp(shape: tuple[int, ...], dim: tuple[int, ...], taken: bool, keepdim: bool) -> None:
    torch.manual_seed(0)

    def function(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            result = torch.logsumexp(leaf, dim, keepdim)
            (slope,) = torch.autograd.grad(result.sum(), leaf)
        return torch.cat([result.detach().flatten(), slope.flatten()])

    captured = fastmlp.capture(function)
    for scale in (0.1, 1.0, 100.0, 1000.0):
        x = scale * torch.randn(shape)
        for _ in range(2):
            result = captured(x)
        expected = {"result": function(x)}
        bound = rounding_bounds(functools.partial(one_result, function, x), expected, steps=True)["result"]
        assert distance(result, expected["result"]) <= bound
    for first in (math.inf, -math.inf, math.nan):
        x = torch.randn(shape)
        x.view(-1)[:1] = first
        for special in (x, torch.full(shape, first)):
            assert torch.equal(kinds(captured(special)), kinds(function(special)))
    (tape,) = captured.report().tapes
    assert any(name.startswith("aten::logsumexp") for name in tape.torch) != taken


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


def classes(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(9, 5, generator=generator), torch.randint(4, (9,), generator=generator)


def of_actions(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    return -F.log_softmax(x @ weight, 1).gather(1, index[:, None]).squeeze(1).mean()


def of_a_target(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    values = x @ weight
    with torch.no_grad():
        best = (values * 2).max(1).values
    return F.mse_loss(values.gather(1, index[:, None]).squeeze(1), best)


def of_the_largest(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    return (x @ weight).view(3, 3, 4).max(-1).values.sum()


def of_the_best_action(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    values = x @ weight
    return values.gather(1, values.argmax(1, keepdim=True)).square().sum()


def of_rows(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    return (weight.index_select(0, index) * x[:, :4]).sum()


#: Losses, each with the nodes of indices that it and its gradient are.
INDEXED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], dict[str, int]]] = {
    "actions": (of_actions, {"gather": 1, "scatter_add": 1}),
    "a target": (of_a_target, {"gather": 1, "scatter_add": 1, "max": 1}),
    "the largest": (of_the_largest, {"max": 1, "scatter": 1}),
    "the best action": (of_the_best_action, {"argmax": 1, "gather": 1, "scatter_add": 1}),
    "rows": (of_rows, {"index_select": 1}),
    "an embedding": (lambda x, weight, index: F.embedding(index, weight).square().sum(),
                     {"embedding": 1, "embedding_backward": 1}),
    "padding": (lambda x, weight, index: F.embedding(index.view(3, 3), weight, padding_idx=1).square().mean(),
                {"embedding": 1, "embedding_backward": 1}),
    "classes": (lambda x, weight, index: F.cross_entropy(x @ weight, index), {"nll_loss": 1, "nll_loss_backward": 1}),
    "a sum of classes": (lambda x, weight, index: F.cross_entropy(x @ weight, index, reduction="sum"),
                         {"nll_loss": 1, "nll_loss_backward": 1}),
    "ignored classes": (lambda x, weight, index: F.cross_entropy(x @ weight, index, ignore_index=2),
                        {"nll_loss": 1, "nll_loss_backward": 1}),
    "weighed classes": (lambda x, weight, index: F.cross_entropy(x @ weight, index, weight=weight[0].detach().abs()),
                        {}),
    "every loss": (lambda x, weight, index: F.cross_entropy(x @ weight, index, reduction="none").square().sum(), {}),
    "columns": (lambda x, weight, index: (x @ weight).gather(0, index[None, :4]).sum(), {}),
    "some rows": (lambda x, weight, index: (x @ weight).gather(1, index[:3, None]).sum(), {}),
    "half": (lambda x, weight, index: (x @ weight).bfloat16().gather(1, index[:, None]).float().sum(), {}),
}  # fmt: skip
#: Names of the nodes of indices.
_INDICES = {name for _, nodes in INDEXED.values() for name in nodes}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", INDEXED)
def test_nodes_of_indices(name: str, dtype: torch.dtype) -> None:
    """With the nodes or, where these cannot do it, torch's operators: the loss and its gradient are eager's."""
    loss_of, nodes = INDEXED[name]
    torch.manual_seed(0)
    weight = torch.randn(5, 4, dtype=dtype, requires_grad=True)

    def function(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        loss = loss_of(x, weight, index)
        return loss.detach(), torch.autograd.grad(loss, weight)[0]

    captured, generator = fastmlp.capture(function), torch.Generator().manual_seed(0)
    for _ in range(CALLS):
        x, index = classes(generator)
        x = x.to(dtype)
        found = dict(zip(("loss", "gradient"), captured(x, index), strict=True))

        def run(x: Tensor = x, index: Tensor = index) -> dict[str, Tensor]:
            return dict(zip(("loss", "gradient"), function(x, index), strict=True))

        expected = run()
        bounds = rounding_bounds(run, expected, steps=True)
        for key, value in found.items():
            assert distance(value, expected[key]) <= bounds[key], key
    assert captured.replays == CALLS - 2
    made = captured.report().tapes[0].nodes
    assert {key: count for key, count in made.items() if key in _INDICES} == nodes


@pytest.mark.parametrize("name", ["actions", "rows", "an embedding", "classes"])
@pytest.mark.parametrize("wrong", [5, -1])
def test_an_index_that_is_out_of_range_in_a_replay_only(name: str, wrong: int) -> None:
    """Raises the class of error that torch raises, and the next replay is as good as any."""
    loss_of, _ = INDEXED[name]
    torch.manual_seed(0)
    weight = torch.randn(5, 4, requires_grad=True)

    def function(x: Tensor, index: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(loss_of(x, weight, index), weight)
        return grad

    captured, (x, index) = fastmlp.capture(function), classes(torch.Generator().manual_seed(0))
    before = [captured(x, index) for _ in range(3)][-1]
    bad = index.clone()
    bad[4] = wrong
    with pytest.raises((IndexError, RuntimeError)) as eager:
        function(x, bad)
    with pytest.raises(eager.type, match=rf"^fastmlp: \w+: .*{wrong}\b"):
        captured(x, bad)
    assert torch.equal(captured(x, index), before)
    assert captured.replays >= 2


def test_an_index_that_is_out_of_range_is_looked_at_in_its_place() -> None:
    """Also if nobody reads what it picks. What the function wrote before has been written, what comes later has not."""
    before, after = torch.zeros(6), torch.zeros(6)

    def function(x: Tensor, index: Tensor) -> Tensor:
        before.add_(1)
        x.gather(1, index)
        after.add_(1)
        return x + 1

    captured = fastmlp.capture(function)
    x, index = torch.randn(6, 5), torch.zeros(6, 1, dtype=torch.int64)
    for _ in range(CALLS):
        assert torch.equal(captured(x, index), x + 1)
    assert captured.report().tapes[0].nodes["gather"] == 1
    index[3] = 5
    with pytest.raises(RuntimeError, match="fastmlp: gather: index 5 is out of range, expected 0 to 4"):
        captured(x, index)
    assert before.tolist() == [CALLS + 1] * 6
    assert after.tolist() == [CALLS] * 6


def test_zeros_that_a_sum_begins_with_are_read_where_they_may_be_others() -> None:
    def function(x: Tensor, index: Tensor, start: Tensor) -> Tensor:
        zeros = torch.zeros(6, 5)
        zeros += start
        return zeros.scatter_add(1, index, x)

    captured = fastmlp.capture(function)
    for i in range(CALLS):
        x, index, start = torch.randn(6, 5), torch.randint(5, (6, 5)), torch.full((6, 5), float(i))
        assert torch.equal(captured(x, index, start), start.scatter_add(1, index, x))
    assert captured.report().tapes[0].nodes["scatter_add"] == 1

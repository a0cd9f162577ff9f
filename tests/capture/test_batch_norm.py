"""Batch normalisation on a tape: running statistics are memory of the outside that a node reads and writes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmlp
from tests.support.rounding import distance, rounding_bounds

CALLS = 22
NODES = {"batch_norm": 1, "batch_norm_backward": 1}

Between = Callable[[nn.Module, int], None]


class Shared(nn.Module):
    """Two layers of weights of their own and the same running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm1d(6) for _ in range(2))
        for name, buffer in self.norms[0].named_buffers():
            setattr(self.norms[1], name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x)).relu()
        return x


def network(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), norm, nn.ReLU(), nn.Linear(9, 2))


def nothing(model: nn.Module, call: int) -> None:
    pass


def modes(model: nn.Module, call: int) -> None:
    model.train(call % 6 < 3)


def loaded(model: nn.Module, call: int) -> None:
    if call % 5 == 4:
        model.load_state_dict({name: tensor * 0.5 for name, tensor in model.state_dict().items()})


def replaced(model: nn.Module, call: int) -> None:
    """What is kept in the buffers moves elsewhere."""
    if call % 5 == 4:
        for buffer in model.buffers():
            buffer.data = buffer.data.clone()


PROGRAMS: dict[str, tuple[Callable[[], nn.Module], Between, dict[str, int]]] = {
    "plain": (lambda: network(nn.BatchNorm1d(9)), nothing, NODES),
    "float64": (lambda: network(nn.BatchNorm1d(9)).double(), nothing, NODES),
    "without parameters": (lambda: network(nn.BatchNorm1d(9, affine=False)), nothing, NODES),
    "without statistics": (lambda: network(nn.BatchNorm1d(9, track_running_stats=False)), nothing, NODES),
    "momentum": (lambda: network(nn.BatchNorm1d(9, momentum=0.7, eps=0.1)), nothing, NODES),
    "in eval mode": (lambda: network(nn.BatchNorm1d(9)).eval(), nothing, NODES),
    "two modes": (lambda: network(nn.BatchNorm1d(9)), modes, NODES),
    "loaded between calls": (lambda: network(nn.BatchNorm1d(9)), loaded, NODES),
    "moved between calls": (lambda: network(nn.BatchNorm1d(9)), replaced, NODES),
    "at the input": (lambda: nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)), nothing, NODES),
    "shared buffers": (Shared, nothing, {"batch_norm": 2, "batch_norm_backward": 2}),
    "twice": (lambda: nn.Sequential(nn.Linear(6, 6), *[nn.BatchNorm1d(6)] * 2), nothing, dict.fromkeys(NODES, 2)),
}


def train(name: str, capture: bool) -> tuple[dict[str, Tensor], fastmlp.Captured[..., Any] | None]:
    """Everything that a program holds after each of its calls."""
    make, between, _ = PROGRAMS[name]
    torch.manual_seed(0)
    model = make()
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - 1).pow(2).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    called = fastmlp.capture(step) if capture else step
    found: dict[str, Tensor] = {}
    for i in range(CALLS):
        between(model, i)
        found[f"loss {i}"] = called(torch.randn(40, 6, dtype=dtype) * 2 + 1)
        found |= {f"{key} {i}": tensor.clone() for key, tensor in model.state_dict().items()}
    return found, called if isinstance(called, fastmlp.Captured) else None


@pytest.mark.parametrize("name", PROGRAMS)
def test_training(name: str) -> None:
    expected, _ = train(name, capture=False)
    found, captured = train(name, capture=True)
    assert captured is not None
    _, between, nodes = PROGRAMS[name]
    tapes = captured.report().tapes
    assert len(tapes) == (2 if between is modes else 1)
    for tape in tapes:
        assert {key: count for key, count in tape.nodes.items() if "norm" in key} == nodes
        assert not any("norm" in operation for operation in tape.torch)
    assert captured.replays == CALLS - 2 * len(tapes)
    bounds = rounding_bounds(lambda: train(name, capture=False)[0], expected, steps=True)
    for key, tensor in expected.items():
        if "num_batches" in key:
            assert torch.equal(found[key], tensor)
        else:
            assert distance(found[key], tensor) <= bounds[key], key
    if "eval" not in name and "statistics" not in name and between is not modes:
        moved = next(key for key in expected if "running_mean" in key).rsplit(" ", 1)[0]
        assert not torch.equal(found[f"{moved} {CALLS - 2}"], found[f"{moved} {CALLS - 1}"])


def test_statistics_alone() -> None:
    """The output that nobody reads is not computed; the statistics are."""
    norm, eager = nn.BatchNorm1d(5), nn.BatchNorm1d(5)

    def step(x: Tensor) -> Tensor:
        with torch.no_grad():
            norm(x)
        return x * 2

    captured = fastmlp.capture(step)
    for _ in range(6):
        x = torch.randn(12, 5, dtype=torch.float32)
        assert torch.equal(captured(x), x * 2)
        eager(x)
        for found, expected in zip(norm.buffers(), eager.buffers(), strict=True):
            assert torch.allclose(found, expected, 1e-6, 1e-6)
    assert captured.report().tapes[0].nodes["batch_norm"] == 1


def test_statistics_that_the_step_makes() -> None:
    """They are read by what comes after, or by nobody."""

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance, unread = x[0] * 0, x[0] * 0 + 1, x[0] + 1
        y = F.batch_norm(x, mean, unread, training=True)
        z = F.batch_norm(y + x, mean, variance, training=True, momentum=0.5)
        return z + mean, variance * 1

    captured = fastmlp.capture(function)
    for _ in range(5):
        x = torch.randn(9, 4, dtype=torch.float64)
        for found, expected in zip(captured(x), function(x), strict=True):
            assert torch.allclose(found, expected, 1e-12, 1e-12)
    assert captured.report().tapes[0].nodes["batch_norm"] == 2


STAYS = {
    "three dimensions": (lambda: nn.BatchNorm1d(4), (5, 4, 3)),
    "transposed": (lambda: nn.BatchNorm1d(5), (4, 5)),
    "16 bits": (lambda: nn.BatchNorm1d(4).bfloat16(), (5, 4)),
    "mixed": (lambda: nn.BatchNorm1d(4), (5, 4)),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_with_torch(name: str) -> None:
    make, shape = STAYS[name]
    norms = make(), make()
    dtype = torch.bfloat16 if name in ("16 bits", "mixed") else torch.float32

    def step(norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.t() if name == "transposed" else x)

    captured = fastmlp.capture(step)
    for _ in range(5):
        x = torch.randn(shape[::-1] if name == "transposed" else shape).to(dtype)
        assert torch.equal(captured(norms[0], x), step(norms[1], x))
    assert all(map(torch.equal, norms[0].buffers(), norms[1].buffers()))
    assert captured.replays == 3
    (tape,) = captured.report().tapes
    assert "batch_norm" not in tape.nodes
    assert sum(count for key, count in tape.torch.items() if "native_batch_norm" in key) == 1


def test_statistics_that_are_a_parameter_too_stay_with_torch() -> None:
    """What is written may not be left out where the same memory is read."""

    def function(x: Tensor) -> Tensor:
        both = x[0] * 0 + 0.5
        return F.batch_norm(x, both, x[0] * 0 + 1, weight=both, training=True)

    captured = fastmlp.capture(function)
    for _ in range(5):
        x = torch.randn(9, 4)
        assert torch.equal(captured(x), function(x))
    assert "batch_norm" not in captured.report().tapes[0].nodes


def test_one_row_in_training_raises_as_in_torch() -> None:
    norm, count = nn.BatchNorm1d(4), torch.tensor(5)
    captured = fastmlp.capture(lambda x: norm(x))
    for _ in range(4):
        captured(torch.randn(3, 4))
    before = [*(buffer.clone() for buffer in norm.buffers())][:2]
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        captured(torch.randn(1, 4))
    assert all(map(torch.equal, [*before, count], norm.buffers()))  # torch's module counts the batch, then looks at it
    norm.eval()
    for _ in range(4):
        x = torch.randn(1, 4)
        assert torch.allclose(captured(x), norm(x), 1e-6, 1e-6)


def test_graphs_of_other_calls_keep_their_statistics_valid() -> None:
    """Torch's operator does not count what it writes there as a change; backward of an earlier call has to work."""
    norm = nn.BatchNorm1d(4)
    captured = fastmlp.capture(lambda x: norm(x).sum())
    for training in (True, False):
        norm.train(training)
        for _ in range(4):
            earlier = norm(torch.randn(5, 4, requires_grad=True)).pow(2).sum()
            captured(torch.randn(5, 4))
            earlier.backward()

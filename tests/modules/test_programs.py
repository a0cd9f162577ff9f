"""Programs in the ways that public ones are written in: what the library takes of each, and that it computes the same.

Each trains for 50 steps in float64: as it is, converted in place and recorded, in a `TrainStep`, and captured. What all
of them leave, running statistics and the states of optimizers and of the generator included, is compared.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastmlp import FrozenMLP
from tests.support import ways
from tests.support.comparison import PARTS, Comparison, Reference, pair, plain_of
from tests.support.rounding import distance
from tests.support.subjects import (
    WRITTEN,
    Autoencoder,
    BatchNorm,
    Particles,
    Quickstart,
    Rays,
    Recommendation,
    Residual,
    Siren,
    Skorch,
    SoftActorCritic,
    Subject,
    TwinDelayed,
    VariationalAutoencoder,
)
from tests.support.ways import Fused


@dataclass(frozen=True)
class Taken:
    """What the library takes of a program.

    Attributes:
        linears: layers that it has.
        in_place: those that run fused after `convert(model)`.
        traced: those that do after `convert(model, trace=True)`.
        why_not_frozen: what is said where `freeze` refuses; empty where it does not.
        why_no_train_step: the same of `TrainStep`.
    """

    linears: int
    in_place: Fused
    traced: Fused
    why_not_frozen: str = ""
    why_no_train_step: str = ""


CASES: dict[type[Subject], Taken] = {
    Quickstart: Taken(3, Fused(3, 1), Fused(3, 1)),
    Skorch: Taken(3, Fused(3, 3), Fused(3, 1), "", r"^loss_fn is the function nll_of_probabilities, expected exactly"),
    BatchNorm: Taken(3, Fused(3, 3), Fused(3, 3)),
    Autoencoder: Taken(6, Fused(6, 2), Fused(6, 1)),
    VariationalAutoencoder: Taken(
        *(5, Fused(5, 5), Fused(5, 4), r"nor is it a graph of layers: .* calls randn_like: randn_like is not among"),
        r"its forward uses the result of relu 2 times.*; loss_fn is the function evidence",
    ),
    Siren: Taken(4, Fused(1, 1), Fused(4, 1)),
    Rays: Taken(7, Fused(7, 7), Fused(7, 5), "", "its loss sums what the network says along rays"),
    SoftActorCritic: Taken(16, Fused(16, 16), Fused(16, 7), "", "two losses and two optimizers"),
    TwinDelayed: Taken(18, Fused(18, 18), Fused(18, 6), "", "two losses and two optimizers"),
    Residual: Taken(4, Fused(4, 4), Fused(4, 3), "", r"norm \(LayerNorm\) cannot be part of a chain"),
    Recommendation: Taken(
        *(4, Fused(4, 2), Fused(4, 2), r"users \(Embedding\) cannot be frozen"),
        "the model takes two inputs",
    ),
    Particles: Taken(
        *(4, Fused(0, 0), Fused(4, 2), r"its forward calls getitem_\d+: IndexError"),
        "the model takes two inputs",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are small: where others use the processor too, more threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


def reference(kind: type[Subject]) -> Reference:
    """Two probes: fewer make narrower bounds, and programs of reinforcement learning take a second each."""
    subject = kind(torch.float64, small=True)
    return Reference(subject, plain_of(subject), steps=True, probes=2)


@pytest.fixture(scope="module", params=CASES, ids=[kind.__name__ for kind in CASES])
def its(request: pytest.FixtureRequest) -> Reference:
    """What a program computes as it is, once for all tests."""
    return reference(request.param)


def case_of(its: Reference) -> Taken:
    return CASES[type(its.subject)]


def check(found: Comparison) -> None:
    assert found.keys
    for part in PARTS:
        far = {
            key: (x.item(), found.bounds[key].item()) for key, x in found.differences.items() if key.startswith(part)
        }
        assert found.share(part) <= 1, {key: apart for key, apart in far.items() if not apart[0] <= apart[1]}


def test_every_program_has_its_case() -> None:
    assert tuple(CASES) == WRITTEN
    assert len({kind.name for kind in CASES}) == len(CASES) == 12


@pytest.mark.parametrize("trace", [False, True])
def test_converted(its: Reference, trace: bool) -> None:
    case = case_of(its)
    plain, converted = pair(its.subject, trace)
    assert ways.linears(its.subject, plain) == case.linears
    assert ways.fused(converted) == (case.traced if trace else case.in_place)
    check(its.compare(converted))


def test_in_a_train_step(its: Reference) -> None:
    expected = case_of(its).why_no_train_step
    reason = ways.why_no_train_step(its.subject, its.plain)
    assert bool(reason) is bool(expected)
    assert re.search(expected, reason)
    if not reason:
        check(its.compare(its.plain, ways.in_one_call))


def test_captured(its: Reference) -> None:
    steps: list[Any] = []

    def make(*arguments: Any) -> Any:
        steps.append(ways.captured(*arguments))
        return steps[-1]

    assert ways.why_not_captured(its.subject, its.plain) == ""
    check(its.compare(its.plain, make))
    assert steps[0].replays == its.subject.steps - 2 == 48


def test_captured_with_the_same_bits(its: Reference) -> None:
    found = its.run(its.plain, ways.captured_exactly)
    assert [key for key, value in its.expected.items() if not torch.equal(found[key], value)] == []


def test_frozen(its: Reference) -> None:
    expected = case_of(its).why_not_frozen
    model = copy.deepcopy(its.plain)  # lives as long as the network, which follows it
    network = ways.frozen(its.subject, model)
    if expected:
        assert isinstance(network, str)
        assert re.search(expected, network)
        return
    assert isinstance(network, FrozenMLP), network
    results = network(*its.subject.requests(8))
    outputs = torch.cat([part.flatten() for part in (results if isinstance(results, tuple) else (results,))])
    assert distance(outputs, its.expected["outputs"]) <= its.bounds["outputs"]
    for i in range(8):
        row = network(*(x[i : i + 1] for x in its.subject.requests(8)))
        for one, all_of_them in zip(*((x if isinstance(x, tuple) else (x,)) for x in (row, results)), strict=True):
            assert torch.equal(one[0], all_of_them[i])


def test_a_wrong_program_is_found_out(its: Reference) -> None:
    wrong = copy.deepcopy(its.plain)
    with torch.no_grad():
        next(wrong.parameters()).mul_(1 + 1e-9)
    found = its.compare(wrong)
    for part in PARTS:
        assert found.share(part) > 1, part


def test_another_mask_is_found_out() -> None:
    """The generator is compared, and a draw more or less changes all that follows."""
    its = reference(BatchNorm)

    def make(*arguments: Any) -> Any:
        torch.rand(1)
        return ways.in_one_call(*arguments)

    found = its.compare(its.plain, make)
    far = {name for name, x in found.differences.items() if not x <= found.bounds[name]}
    assert {"training: generator", "training: bn2.running_mean", "training: losses"} <= far
    assert "training: bn1.num_batches_tracked" not in far


def test_the_table() -> None:
    """Of one program in its own size; the counts are those of the cases."""
    pytest.importorskip("rich")
    models = pytest.importorskip("benchmarks.models")
    found = models.measured(Skorch, models.Effort(rounds=2, patience=0))
    cells = list(found.cells())
    runs = [f"3/3 in {fused.runs}" for fused in (CASES[Skorch].in_place, CASES[Skorch].traced)]
    assert cells[:7] == ["skorch-style classifier", "3,132", *runs, "yes", "no", "yes"]
    assert 0 < found.difference <= 1
    assert set(found.seconds) == {"eager", 1, 256}
    assert set(found.speedups) == {"in place", "trace=True", "captured", 1, 256}
    assert all(value > 0 for value in [*found.seconds.values(), *found.speedups.values()])
    assert {way: models.in_short(reason) for way, reason in found.why_not.items()} == {
        "TrainStep": "loss_fn is the function nll_of_probabilities"
    }
    *counts, means = models.totals([found, found])
    assert counts == [
        "linears fused: in place 6 of 6, trace=True 6 of 6",
        "frozen: 2 of 2 programs",
        "TrainStep: 0 of 2 programs",
        "captured: 2 of 2 programs",
    ]
    assert re.fullmatch(r"geometric means .*: in place [\d.]+ \(2\), .*, frozen, 256 rows [\d.]+ \(2\)", means)
    assert "TrainStep" not in means


def test_reasons_in_short() -> None:
    pytest.importorskip("rich")
    models = pytest.importorskip("benchmarks.models")
    for reason, short in {
        "torch.fx cannot record it; convert without trace. It says: a len; of x": "a len; of x",
        "a (A) is in no chain; nor is it a graph of layers: b (B) cannot be frozen": "b (B) cannot be frozen",
        "loss_fn is a function, expected exactly one of these; the model is none": "loss_fn is a function",
    }.items():
        assert models.in_short(reason) == short


def test_programs_are_selected_by_parts_of_their_names() -> None:
    pytest.importorskip("rich")
    models = pytest.importorskip("benchmarks.models")
    assert models.select("quickstart, NeRF") == [Quickstart, Rays]
    assert models.select("")[-12:] == list(WRITTEN)
    assert len(models.select("")) == 18
    with pytest.raises(SystemExit, match="no program's name holds 'nothing'; there are: torchvision"):
        models.select("nothing")

"""The code in README.md, docs/capture.md, docs/sklearn.md and docs/bench.md runs, and does what stands beside it."""

import functools
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmlp
from tests.support.rounding import distance, rounding_bounds

ROOT = Path(__file__).parents[2]
CAPTURE = ROOT / "docs" / "capture.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str = "python") -> list[str]:
    return [code for found, code in _BLOCK.findall(text) if found == language]


def sections(text: str, level: str) -> dict[str, str]:
    """Headings of a level, and what stands below each."""
    parts = re.split(rf"^{level} (.*)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def run(code: str, variables: dict[str, Any]) -> None:
    # A name of a file, because functions that were typed into an interpreter have none and are taken for a library's.
    exec(compile(code, str(CAPTURE), "exec"), variables)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


CALLABLE: Any = fastmlp.capture
TEXT = CAPTURE.read_text(encoding="utf-8")
INTRODUCTION, _, FIVE = TEXT.partition("\n## Five loops")
PAIRS = sections(FIVE, "###")
ROWS = [
    re.findall(r"`([^`]+)`", line)[:2]
    for line in sections(TEXT, "##")["What cannot be recorded, and what to write instead"].splitlines()
    if line.startswith("| `")
]


def comments_of_prints(text: str) -> list[str]:
    """What a line says that it prints."""
    found = [re.match(r"print\(.*\)  # (\S.*)", line) for line in text.splitlines()]
    return [one[1] for one in found if one is not None]


def test_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    text, variables = (ROOT / "README.md").read_text(encoding="utf-8"), dict[str, Any]()
    for block in blocks(text):
        run(block, variables)
    lines = capsys.readouterr().out.splitlines()
    assert all(any(said in line for line in lines) for said in comments_of_prints(text))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_page_of_scikit_learn(capsys: pytest.CaptureFixture[str]) -> None:
    text, variables = (ROOT / "docs" / "sklearn.md").read_text(encoding="utf-8"), dict[str, Any]()
    for block in blocks(text):
        run(block, variables)
    assert capsys.readouterr().out.splitlines() == comments_of_prints(text) == ["True"] * 3


def test_the_page_of_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("rich", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    text, variables = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8"), dict[str, Any]()
    for block in blocks(text):
        run(block, variables)
    lines = capsys.readouterr().out.splitlines()
    assert {"children", "None"} <= set(lines)
    assert any("graph of 2 networks" in line for line in lines)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"bench.json", "bench.png"}


def test_the_page_of_serving(capsys: pytest.CaptureFixture[str]) -> None:
    text, variables = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8"), dict[str, Any]()
    for block in blocks(text):
        run(block, variables)
    assert capsys.readouterr().out.splitlines() == comments_of_prints(text) == ["True", "torch.Size([4, 1])"]


def test_the_introduction(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints what stands in its comments, and a report of the form that is shown."""
    variables: dict[str, Any] = {}
    for block in blocks(INTRODUCTION):
        run(block, variables)
    lines = capsys.readouterr().out.splitlines()
    assert [said for said in comments_of_prints(INTRODUCTION) if said not in lines] == ["of each epoch"]
    shown, timed = blocks(INTRODUCTION, "text")
    step = variables["step"]
    assert without_numbers(shown) == without_numbers(str(step.report()))
    # Which takes most differs from run to run.
    times = str(step.report(profile=True)).removeprefix(str(step.report()))
    assert parts_of(timed) == parts_of(times.replace(str(CAPTURE), "train.py"))


def parts_of(times: str) -> list[list[str]]:
    """The kinds of kernels, and then the places, that times are told of."""
    first, *rest = (re.sub(r"\d+%|\d+ us", "", line) for line in times.strip().splitlines())
    return [sorted(kind.strip() for kind in first.split(":")[2].split(",")), sorted(line.strip() for line in rest)]


def without_numbers(report: str) -> list[str]:
    """Numbers and the operations that they are of depend on torch."""
    return [re.sub(r"\d[\d,]*", "0", line.partition("operations: ")[0]) for line in report.strip().splitlines()]


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_after_is_before(name: str, fuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits without fusion; with it losses as near as rounding lets them be, from the third one on."""
    setup, before, after = blocks(PAIRS[name])
    monkeypatch.setattr(fastmlp, "capture", functools.partial(CALLABLE, fuse=fuse))

    def variables_of(loop: str) -> dict[str, Any]:
        variables: dict[str, Any] = {}
        run(blocks(INTRODUCTION)[0].partition("inputs =")[0], variables)
        torch.manual_seed(0)
        run(setup, variables)
        run(loop, variables)
        return variables

    def losses_of(loop: str) -> dict[str, Tensor]:
        return {"losses": torch.tensor(variables_of(loop)["losses"], dtype=torch.float64)}

    found = [variables_of(loop) for loop in (before, after)]
    eager, captured = (variables["losses"] for variables in found)
    assert len(captured) == len(eager) > 10
    same = slice(2) if fuse else slice(None)
    assert captured[same] == eager[same]
    if fuse:
        expected = losses_of(before)
        bound = rounding_bounds(lambda: losses_of(before), expected, steps=True)["losses"]
        assert distance(torch.tensor(captured, dtype=torch.float64), expected["losses"]) <= bound
    assert all(map(bool, torch.tensor(captured).isfinite()))
    functions = [value for value in found[1].values() if isinstance(value, fastmlp.Captured)]
    assert sum(function.replays for function in functions) > len(captured) / 2


def test_there_are_as_many_loops_as_the_text_says() -> None:
    assert len(PAIRS) == 5


def called(line: str, times: int) -> tuple[Any, list[Any]]:
    """Calls a function of one line of the table, captured."""
    model = nn.Linear(10, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    variables = {"torch": torch, "F": F, "nn": nn, "random": random, "scheduler": scheduler}
    run(f"def function(x, noise, labels):\n    {line}", variables)
    step = CALLABLE(variables["function"], fuse=False)
    data = torch.randn(32, 10), torch.randn(32, 10), torch.randint(10, (32,))
    return step, [step(*data) for _ in range(times)]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize(("refused", "instead"), ROWS)
def test_what_cannot_be_recorded(refused: str, instead: str) -> None:
    with pytest.raises(fastmlp.CaptureError, match=f"^fastmlp: capture: function: .*{CAPTURE.name}:2"):
        called(refused, 3)
    step, results = called(instead, 4)
    assert step.replays == 2
    if "rand" not in instead and isinstance(results[0], Tensor):
        assert torch.equal(results[3], results[0])


def test_the_table_has_rows() -> None:
    assert len(ROWS) >= 15

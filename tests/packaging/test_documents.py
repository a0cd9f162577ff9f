"""The code in README.md and on every page of docs runs, and does what stands beside it; what they claim holds."""

import functools
import json
import random
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmlp
from benchmarks import bars, performance
from benchmarks.targets import find
from fastmlp.benchmark.timing import Effort
from tests.support.rounding import distance, rounding_bounds
from tools.pictures import PICTURES, drawn

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CAPTURE = DOCS / "capture.md"
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


#: Every page but docs/capture.md, whose parts do not run one after the other, and docs/bench.md, which writes files and
#: prints times: the tests below take these apart.
APART = {CAPTURE, DOCS / "bench.md"}
PAGES = {str(path.relative_to(DOCS)): path for path in sorted(DOCS.rglob("*.md")) if path not in APART}
WITH_CODE = [name for name, path in PAGES.items() if blocks(path.read_text(encoding="utf-8"))]


def test_there_are_pages() -> None:
    assert len(WITH_CODE) >= 20


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", WITH_CODE)
def test_a_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its code prints, among other lines, what stands in its comments and in blocks of text."""
    text, variables = PAGES[name].read_text(encoding="utf-8"), dict[str, Any]()
    for block in blocks(text):
        run(block, variables)
    printed = capsys.readouterr().out
    lines = iter(printed.splitlines())
    # In this order: `in` goes on where it found the line before.
    assert [said for said in comments_of_prints(text) if said not in lines] == []
    assert [shown for shown in blocks(text, "text") if shown not in printed] == []


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


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_one_screen() -> None:
    assert len(README.split()) <= 900


def test_the_readme_names_the_commands_that_exist() -> None:
    """Those of its code blocks are targets of the Makefile, and CI runs its test command and nothing else."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"^make (\S+) ", README, flags=re.MULTILINE)
    assert {"demo", "test"} <= set(named)
    assert [name for name in named if not re.search(rf"^{name}:", makefile, flags=re.MULTILINE)] == []
    ci = [line for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert ci == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test"]


@pytest.mark.parametrize("path", [ROOT / "README.md", DOCS / "install.md"], ids=lambda path: path.name)
def test_the_python_that_is_asked_for(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    least = project["requires-python"].removeprefix(">=")
    assert f"Python {least} or newer" in path.read_text(encoding="utf-8")


def test_the_extras_that_are_named_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    texts = [README, *(path.read_text(encoding="utf-8") for path in PAGES.values())]
    named = {name for text in texts for name in re.findall(r"'(?:\.|fastmlp)\[([\w-]+)\]'", text)}
    assert len(named) > 3
    assert named <= set(extras)


def links(text: str) -> list[str]:
    """Where links and pictures lead that are no addresses; code is no link."""
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target]


@pytest.mark.parametrize("name", ["README.md", *PAGES, "capture.md"])
def test_links_lead_somewhere(name: str) -> None:
    """`make docs` checks anchors too; this sees README and needs no MkDocs."""
    path = ROOT / name if name == "README.md" else DOCS / name
    made = {DOCS / picture for picture in PICTURES}
    targets = [path.parent / target.partition("#")[0] for target in links(path.read_text(encoding="utf-8"))]
    assert [str(target) for target in targets if not target.exists() and target.resolve() not in made] == []


def test_the_site_lists_every_page() -> None:
    listed = re.findall(
        r"^ +- (?:[^:\n]+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(listed) == sorted([*PAGES, *(str(path.relative_to(DOCS)) for path in APART)])


def test_the_reference_has_all_names() -> None:
    """Each public name once, and none that is not public."""
    pages = (path.read_text(encoding="utf-8") for name, path in PAGES.items() if name.startswith("reference/"))
    # A function that bears the name of its module is written as fastmlp.capture.capture.
    found = [re.sub(r"\.(\w+)\.\1$", r".\1", name) for page in pages for name in re.findall(r"^::: (\S+)$", page, re.M)]
    public = {f"fastmlp.{name}" for name in fastmlp.__all__ if name != "__version__"}
    assert sorted(found) == sorted(public | {f"fastmlp.sklearn.{name}" for name in ("MLPClassifier", "MLPRegressor")})


@pytest.mark.parametrize("path", PICTURES)
def test_pictures_are_drawn_and_shown(path: str) -> None:
    folder, _, name = path.rpartition("pictures/")
    texts = [page.read_text(encoding="utf-8") for own, page in PAGES.items() if own.startswith(folder)]
    assert any(f"(pictures/{name})" in text for text in texts)
    assert drawn(path).startswith(b"<?xml")


def test_a_picture_is_the_same_in_each_build() -> None:
    path = "tutorial/pictures/layer.svg"
    assert drawn(path) == drawn(path)


def test_the_bars_are_drawn_from_the_results() -> None:
    """The picture carries the number of the file that it was drawn from, and the line below tells of the same one."""
    results = json.loads(bars.RESULTS.read_text(encoding="utf-8"))
    assert bars.numbered(bars.RESULTS).encode() in bars.PICTURE.read_bytes()
    assert f"{bars.MARKS[0]}{bars.caption(results)}{bars.MARKS[1]}" in README
    drawn_workloads = {name for _, names, _ in bars.PANELS for name in names}
    assert {bar["workload"] for bar in results["bars"]} == drawn_workloads


def test_every_way_of_the_bars_is_checked_and_timed() -> None:
    """The smallest network of each panel, with as few rounds as can be."""
    effort = Effort(rounds=2, patience=0, fewest=2)
    for _, names, ways in bars.PANELS:
        (workload,) = find([names[0]])
        found = bars.bars(workload, ways, effort)
        assert [bar.way for bar in found] == [*ways.values()]
        assert all(bar.seconds > 0 and 0 < bar.low <= bar.speedup <= bar.high for bar in found)
        assert found[0].speedup == 1


def test_the_page_of_performance_is_what_the_results_say() -> None:
    page = performance.PAGE.read_text(encoding="utf-8")
    assert performance.write(page) == page
    assert page.count("### ") >= 4


def test_a_report_becomes_tables() -> None:
    """Of the form that `benchmarks.report` writes: a table for each suite, with an empty cell for who did not run."""
    common = {"dtype": "float32", "gflops": 1.0, "intensity": 1.0, "share": 0.5, "low": 1.0, "high": 1.0, "ratios": {}}
    rows = [
        {"suite": "nets", "workload": "a", "contender": "eager", "seconds": 1e-3, "speedup": 1.0, **common},
        {"suite": "nets", "workload": "a", "contender": "frozen", "seconds": 5e-4, "speedup": 2.0, **common},
        {"suite": "nets", "workload": "b", "contender": "eager", "seconds": 2e-3, "speedup": 1.0, **common},
    ]
    machine = {"cpu": "Some CPU", "isa": "avx2", "torch": "2.13.0", "threads": 1}
    text = "\n".join(performance.section({"machine": machine, "rows": rows}))
    assert "| nets | eager, us | frozen x |" in text
    assert "| a | 1,000.0 | 2.00 |" in text
    assert "| b | 2,000.0 |  |" in text
    with pytest.raises(ValueError, match="one of 'tables', 'bars' and 'rows'"):
        performance.section({"machine": machine})

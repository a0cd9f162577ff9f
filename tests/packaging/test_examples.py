"""The examples of training that come with a picture: contenders reach the same, and what is printed says so."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastmlp

EXAMPLES = Path(fastmlp.__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def needed() -> None:
    if not EXAMPLES.exists():
        pytest.skip("the examples are not beside an installed library")
    for package in ("matplotlib", "sklearn"):
        pytest.importorskip(package)


def printed(name: str, *options: str, cwd: Path) -> list[str]:
    """The lines of an example, which leaves its picture in out/."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *options],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert (cwd / "out" / Path(name).with_suffix(".png")).read_bytes().startswith(b"\x89PNG")
    return done.stdout.splitlines()


def test_digits(tmp_path: Path) -> None:
    *ways, frozen = printed("digits.py", "--epochs", "3", cwd=tmp_path)
    form = r"(.{14})\s*([\d.]+)% of held-out digits, .* s, .* times as fast as the loop$"
    found = [re.match(form, way) for way in ways]
    assert [one[1].strip() for one in found if one] == ["plain loop", "fastmlp.optim", "TrainStep", "capture"]
    assert all(float(one[2]) > 80 for one in found if one)
    assert re.fullmatch(r"frozen, the network of the TrainStep reads the same \d+ of all 1797", frozen)


def test_tabular(tmp_path: Path) -> None:
    options = ("--rows", "2000", "--iterations", "6", "--seeds", "2")
    theirs, ours, last = printed("tabular.py", *options, cwd=tmp_path)
    shares = [float(line[16:22].strip(" %")) for line in (theirs, ours)]
    assert min(shares) > 35  # a fifth is right by chance
    assert last.startswith("fastmlp.sklearn: ")


def test_neural_field(tmp_path: Path) -> None:
    *ways, frozen = printed("neural_field.py", "--steps", "60", "--size", "32", cwd=tmp_path)
    assert [way.split("loss")[0].strip() for way in ways] == ["plain loop", "TrainStep", "capture"]
    for way in ways:
        first, last = map(float, re.findall(r"loss ([\d.]+) at first, ([\d.]+) at the end", way)[0])
        assert last < first / 2
    assert float(frozen.split()[1]) > 15


def turns() -> Any:
    spec = importlib.util.spec_from_file_location("turns", EXAMPLES / "turns.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["turns"] = module  # dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_each_contender_has_random_numbers_of_its_own() -> None:
    def draws(seed: int) -> Iterator[float]:
        torch.manual_seed(seed)
        for _ in range(3):
            yield torch.rand(()).item()

    expected = {seed: list(draws(seed)) for seed in (1, 2)}
    runs = turns().in_turns({str(seed): lambda seed=seed: draws(seed) for seed in (1, 2)})
    assert {int(name): run.found for name, run in runs.items()} == expected
    assert all(len(run.clock) == 3 and run.seconds >= run.clock[-1] for run in runs.values())

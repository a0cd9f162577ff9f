"""The examples of capture: they learn, and what is captured does as what is not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastmlp

ROOT = Path(fastmlp.__file__).parents[1]


def printed(name: str, *options: str, cwd: Path) -> str:
    """What an example prints, which fails if captured and plain training differ."""
    script = ROOT / "examples" / name
    if not script.exists():
        pytest.skip("the examples are not beside an installed library")
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), *options],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert re.search(r"s as it is, \d+\.\d s captured with fuse=False, \d+\.\d s captured\n$", done.stdout)
    assert (cwd / "out" / script.with_suffix(".png").name).read_bytes().startswith(b"\x89PNG")
    return done.stdout


def test_ppo(tmp_path: Path) -> None:
    found = re.match(
        r"(\d+) poles fell in the first 2048 steps, (\d+) in", printed("ppo.py", "--rounds", "8", cwd=tmp_path)
    )
    assert found is not None
    first, last = map(int, found.groups())
    assert 0 < 2 * last < first


def test_physics_informed(tmp_path: Path) -> None:
    text = printed("physics_informed.py", "--steps", "400", cwd=tmp_path)
    found = re.match(r"loss (\S+) at first, (\S+) after 400 steps, captured or not\noff by (\S+) at most", text)
    assert found is not None
    first, last, error = map(float, found.groups())
    assert last < first / 10
    assert error < 0.2

"""The serving example: an HTTP server whose frozen network answers as the module does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastmlp

ROOT = Path(fastmlp.__file__).parents[1]
SCRIPT = ROOT / "examples" / "serving.py"
REQUESTS = 30  # more than one turn of the example, and not a multiple of it


@pytest.fixture(autouse=True)
def packages() -> None:
    if not SCRIPT.exists():
        pytest.skip("the examples are not beside an installed library")
    for name in ("safetensors", "starlette", "uvicorn", "httpx", "rich"):
        pytest.importorskip(name, reason=f"{name} is not there, which is of the extra 'serve'")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(SCRIPT), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=300)


def test_what_it_prints(tmp_path: Path) -> None:
    done = run(tmp_path, "--requests", str(REQUESTS))
    assert done.returncode == 0, done.stderr
    rows = {
        words[0]: [float(word) for word in words[1:]]
        for words in (line.replace("│", " ").split() for line in done.stdout.splitlines())
        if words and words[0] in ("nothing", "eager", "frozen")
    }
    assert list(rows) == ["nothing", "eager", "frozen"]
    for numbers in rows.values():
        whole, network = numbers[:3], numbers[3:]
        assert whole == sorted(whole)
        assert network == sorted(network)
        assert all(0 < own < all_ for own, all_ in zip(network, whole, strict=True))
    assert f"{REQUESTS} requests to each address" in done.stdout
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_and_files(tmp_path: Path) -> None:
    assert "--requests must be at least 1" in run(tmp_path, "--requests", "0").stderr
    done = run(tmp_path, "--serve", str(tmp_path / "nothing.safetensors"))
    assert done.returncode != 0
    assert "nothing.safetensors" in done.stderr

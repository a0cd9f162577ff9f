"""The rollout example: a policy and the same policy frozen play the same games."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import fastmlp

ROOT = Path(fastmlp.__file__).parents[1]
SCRIPT = ROOT / "examples" / "rollout.py"
STEPS = 700  # more than one turn of the example, and not a multiple of it


@pytest.fixture
def rollout() -> ModuleType:
    if not SCRIPT.exists():
        pytest.skip("the examples are not beside an installed library")
    pytest.importorskip("gymnasium", reason="gymnasium is not there, which is of the extra 'models'")
    spec = importlib.util.spec_from_file_location("rollout", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rollout"] = module  # dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_the_same_games(rollout: Any) -> None:
    plain, fast = rollout.race(STEPS, seed=3).values()
    rollout.assert_same_games(plain, fast)
    assert len(plain.actions) == len(fast.observations) == STEPS
    assert set(plain.actions) == {0, 1}
    assert plain.episodes == fast.episodes > 5
    assert 0 < plain.share < 1
    assert len(fast.values) == len(fast.log_probabilities) == STEPS


def test_other_games_are_noticed(rollout: Any) -> None:
    plain, fast = rollout.race(STEPS, seed=3).values()
    fast.actions[600] = 1 - fast.actions[600]
    with pytest.raises(SystemExit, match=r"step 600: action \d as it is, \d frozen"):
        rollout.assert_same_games(plain, fast)
    fast.actions = plain.actions
    fast.observations[601] = fast.observations[601] + np.float32(1e-3)
    with pytest.raises(AssertionError, match="not equal"):
        rollout.assert_same_games(plain, fast)


@pytest.mark.usefixtures("rollout")
def test_what_it_prints(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), "--steps", str(STEPS), "--seed", "1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["as", "frozen", "frozen:", "the"]
    assert all("steps per second" in line and "of which the environment takes" in line for line in lines[:2])
    assert lines[-1].startswith(f"the same {STEPS} actions and observations both ways")

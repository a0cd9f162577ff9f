"""Gate `as compiled`: the PTX that nvcc emits, translated and run by tests/emulator/ptx, a row for each kernel."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from tools.gpu_proof.checks import Check, Outcome
from tools.gpu_proof.kernels import ROOT
from tools.gpu_proof.toolchain import run, side_by_side, toolkit

MODULE = "tests.emulator.ptx"


def run_module(dtype: str, architecture: int, checks: Sequence[str], root: Path) -> subprocess.CompletedProcess[str]:
    """Run the translator's command in `root`."""
    wanted = [*("--arch", str(architecture)), *("--dtype", dtype), *("--check", *checks)]
    environment = {**os.environ, "CUDA_HOME": str(toolkit())}
    if root != ROOT:
        # What translated kernels are compared with stays as it is.
        environment["FASTMLP_EMULATED"] = str(ROOT / "build/emulated/_C_emulated.so")
    command = [sys.executable, "-m", MODULE, *wanted]
    return subprocess.run(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


def check(
    dtypes: Sequence[str],
    architectures: Sequence[int],
    checks: Sequence[str] = ("bits", "bounds", "profile"),
    root: Path = ROOT,
) -> Outcome:
    """Run the translated kernels; each row is a check."""
    outcome = Outcome(columns=("kernel", "dtype", "for", "check", "result"), title="PTX of nvcc, executed")
    run([sys.executable, "-c", "from tests.support.emulated import emulated; emulated()"])
    pairs = [(dtype, architecture) for dtype in dtypes for architecture in architectures]
    runs = side_by_side(lambda pair: run_module(*pair, checks, root), pairs)
    for (dtype, architecture), done in zip(pairs, runs, strict=True):
        where = f"compute_{architecture}"
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if not rows or (done.returncode != 0 and all(row["result"].startswith("passed") for row in rows)):
            what = f"exit code {done.returncode} after {len(rows)} rows: {done.stdout[-400:]}"
            outcome.checks.append(Check("as compiled", "", dtype, where, what, False))
        for row in rows:
            passed = row["result"].startswith("passed")
            what = f"{row['kernel']}: {row['check']} {row['result']}"
            outcome.checks.append(Check("as compiled", row["kernel"].split()[0], dtype, where, what, passed))
            outcome.lines.append((row["kernel"], dtype, where, row["check"], escape(row["result"])))
    return outcome

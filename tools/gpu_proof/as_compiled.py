"""Gate `as compiled`: the PTX that nvcc emits, translated and run by tests/emulator/ptx, a row for each kernel."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from tools.gpu_proof.checks import Check, Outcome
from tools.gpu_proof.kernels import ROOT
from tools.gpu_proof.toolchain import run, toolkit

MODULE = "tests.emulator.ptx"


def run_module(
    dtypes: Sequence[str], architectures: Sequence[int], checks: Sequence[str], root: Path
) -> subprocess.CompletedProcess[str]:
    """Run the translator's command in `root`."""
    wanted = [*("--arch", *map(str, architectures)), *("--dtype", *dtypes), *("--check", *checks)]
    environment = {**os.environ, "CUDA_HOME": str(toolkit())}
    if root != ROOT:
        # What translated kernels are compared with stays as it is.
        run([sys.executable, "-c", "from tests.emulated import emulated; emulated()"])
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
    if importlib.util.find_spec(MODULE) is None:
        outcome.checks.append(Check("as compiled", "", "", "PTX", f"there is no {MODULE}", False))
        return outcome
    for dtype in dtypes:
        done = run_module([dtype], architectures, checks, root)
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if not rows or (done.returncode != 0 and all(row["result"].startswith("passed") for row in rows)):
            what = f"exit code {done.returncode} after {len(rows)} rows: {done.stdout[-400:]}"
            outcome.checks.append(Check("as compiled", "", dtype, "PTX", what, False))
        for row in rows:
            where = f"compute_{row['architecture']}"
            passed = row["result"].startswith("passed")
            what = f"{row['kernel']}: {row['check']} {row['result']}"
            outcome.checks.append(Check("as compiled", row["kernel"].split()[0], dtype, where, what, passed))
            outcome.lines.append((row["kernel"], dtype, where, row["check"], escape(row["result"])))
    return outcome

"""Checks translated kernels, prints a row of JSON for each kernel and check, and fails if one of them failed.

python -m tests.emulator.ptx --arch 80 --dtype float32
"""

import argparse
import json
import sys
from dataclasses import asdict

import torch

from tests.emulator.ptx.build import DTYPES, load
from tests.emulator.ptx.checks import Row, bits, bounds
from tests.emulator.ptx.profile import profile
from tests.support.axes import ACTIVATIONS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80], help="compute capabilities: 80 for compute_80")
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    checks = ["bits", "bounds", "profile"]
    parser.add_argument("--check", nargs="+", default=checks, choices=checks)
    arguments = parser.parse_args()
    failed = False
    for architecture in arguments.arch:
        for name in arguments.dtype:
            dtype = getattr(torch, name)
            kernels = load(architecture, name)
            rows: list[Row] = []
            if "bits" in arguments.check:
                rows += bits(kernels, dtype, architecture)
            if "bounds" in arguments.check:
                rows += bounds(kernels, dtype, architecture, ACTIVATIONS)
            if "profile" in arguments.check:
                rows += profile(kernels, dtype, architecture)
            for row in rows:
                failed |= not row.passed
                print(json.dumps(asdict(row)), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

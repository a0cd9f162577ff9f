"""Gate `sanitized`: the kernels in the emulator under ASan, UBSan and TSan; clean code says nothing."""

import re
from collections.abc import Mapping, Sequence

from tools.gpu_proof.checks import Check, Outcome
from tools.gpu_proof.emulation import ADDRESS, THREAD, Variant, build, execute
from tools.gpu_proof.toolchain import side_by_side

#: What a line says that a sanitizer or the emulator found something, or that a result is wrong.
SAID = re.compile(
    r"ERROR: AddressSanitizer: [\w-]+|WARNING: ThreadSanitizer: [\w ]+|runtime error: .*|RuntimeError: .*"
    r"|AssertionError.*|E   .*"
)


def exercise(variant: Variant, dtypes: Sequence[str], cases: str) -> Outcome:
    """Run the small shapes of tools/gpu_proof/exercise.py under one sanitizer, a dtype at a time."""
    outcome = Outcome(columns=("sanitizer", "dtype", "case", "seconds"), title="small shapes under sanitizers")
    extension = build(variant)
    commands = [["-m", "tools.gpu_proof.exercise", dtype, "--only", cases] for dtype in dtypes]
    runs = side_by_side(lambda command: execute(extension, variant, command), commands)
    for dtype, done in zip(dtypes, runs, strict=True):
        passed = done.returncode == 0 and done.stdout.rstrip().endswith("passed") and not SAID.search(done.stdout)
        found = SAID.search(done.stdout)
        said = found[0] if found else done.stdout[-400:]
        ran = re.findall(rf"^{dtype} (.*): ([\d.]+) s; (.*)$", done.stdout, re.MULTILINE)
        for case, seconds, _ in ran:
            outcome.lines.append((variant.name, dtype, case, seconds))
        families = sorted({family for *_, listed in ran for family in listed.split()})
        for family in families or [""]:
            shapes = sum(family in listed.split() for *_, listed in ran)
            what = f"{shapes} shapes, silent" if passed else f"after {len(ran)} shapes: {said}"
            outcome.checks.append(Check("sanitized", family, dtype, variant.name, what, passed))
    return outcome


def check(dtypes: Sequence[str], cases: Mapping[str, str]) -> list[Outcome]:
    """Run both builds; `cases` may have a pattern for one, which its cases must match."""
    return [exercise(variant, dtypes, cases.get(variant.name, "")) for variant in (ADDRESS, THREAD)]

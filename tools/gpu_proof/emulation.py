"""Builds `_C_emulated` as the gates want it: with sanitizers or coverage, from sources as they are or with a defect.

Only the kernels are instrumented. The files that know torch are compiled once for all.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

from tests.support.emulator_sources import HOST_SOURCES
from tools.gpu_proof.kernels import ROOT
from tools.gpu_proof.toolchain import BUILD, digest, run, side_by_side

CSRC = ROOT / "csrc"
EMULATOR = ROOT / "tests/emulator"
CXX = os.environ.get("CXX", "g++")
FLAGS = ("-std=c++20", "-fPIC", "-O1", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi")


@dataclass(frozen=True)
class Variant:
    """A way to instrument the kernels."""

    name: str
    flags: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()  # to be loaded before Python, which is not instrumented
    variables: tuple[tuple[str, str], ...] = ()

    def environment(self) -> dict[str, str]:
        """Return what a process that loads the extension needs."""
        found = {name: run([CXX, f"-print-file-name={name}"]).strip() for name in self.libraries}
        preloaded = {"LD_PRELOAD": " ".join(found.values())} if found else {}
        return {**dict(self.variables), **preloaded}


PLAIN = Variant("plain", ("-g0",))
COVERAGE = Variant("coverage", ("-g0", "--coverage"))
ADDRESS = Variant(
    "ASan, UBSan",
    (
        *("-g1", "-fsanitize=address,alignment,bounds", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
        # By calls: checks in line take longer to compile.
        *("--param", "asan-instrumentation-with-call-threshold=0"),
    ),
    ("libasan.so", "libubsan.so"),
    (("ASAN_OPTIONS", "detect_leaks=0"), ("UBSAN_OPTIONS", "print_stacktrace=1:halt_on_error=1")),
)
THREAD = Variant(
    "TSan",
    ("-g1", "-fsanitize=thread"),
    ("libtsan.so",),
    (("TSAN_OPTIONS", "halt_on_error=1:report_signal_unsafe=0:exitcode=66"),),
)
VARIANTS = {variant.name: variant for variant in (PLAIN, ADDRESS, THREAD, COVERAGE)}


def _compile(source: Path, csrc: Path, flags: Sequence[str], torch: bool) -> Path:
    """Return the object file; compiled unless its sources and flags are as they were."""
    folder = BUILD / "objects"
    folder.mkdir(parents=True, exist_ok=True)
    kinds = ("*.h", "*.cuh", "*.cu")
    included = [path for root in (csrc, EMULATOR) for kind in kinds for path in sorted(root.rglob(kind))]
    stem = f"{source.stem}_{digest(CXX, *FLAGS, *flags, str(csrc), torch, source, *included)}"
    target = folder / f"{stem}.o"
    if not target.exists():
        folders = [csrc, EMULATOR, sysconfig.get_path("include")]
        if torch:
            folders += include_paths("cpu")
        names = ("-DTORCH_EXTENSION_NAME=_C_emulated", "-DTORCH_API_INCLUDE_EXTENSION_H", "-fopenmp")
        # Counters know the object's name, so that it is theirs from the start.
        made = target if "--coverage" in flags else folder / f"{stem}.{os.getpid()}.o"
        run([CXX, *FLAGS, *flags, *names, *(f"-I{f}" for f in folders), "-x", "c++", "-c", source, "-o", made])
        made.rename(target)
    return target


def build(variant: Variant, planted: Path | None = None, dtype: str = "") -> Path:
    """Return the extension, its kernels built as the variant says.

    Args:
        variant: how the kernels are instrumented.
        planted: a checkout whose csrc the kernels of `dtype` are to come from; all else is this one's.
        dtype: the one.
    """
    extension = EMULATOR / "extension"
    jobs: list[tuple[Path, Path, Sequence[str], bool]] = []
    jobs += [(source, CSRC, PLAIN.flags, True) for source in (extension / "bindings.cpp", *HOST_SOURCES)]
    jobs += [(extension / f"{stem}.cpp", CSRC, variant.flags, False) for stem in ("kernels", "kernels_16_bits")]
    folder = BUILD / "emulated" / variant.name.replace(", ", "_")
    if planted is not None:
        # First: of what several files define, templates all, the linker takes the first.
        csrc = planted / "csrc"
        jobs.insert(0, (csrc / f"cuda/dtypes/{dtype}.cu", csrc, variant.flags, False))
        folder = BUILD / "emulated" / planted.name
    objects = side_by_side(lambda job: _compile(*job), jobs)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "_C_emulated.so"
    stamp = folder / "objects.txt"
    listed = "\n".join(map(str, objects))
    if not target.exists() or not stamp.exists() or stamp.read_text() != listed:
        libraries = ("-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python")
        run([CXX, "-shared", "-fopenmp", *variant.flags, *objects, f"-L{TORCH_LIB_PATH}", *libraries, "-o", target])
        stamp.write_text(listed)
    return target


def execute(
    extension: Path,
    variant: Variant,
    arguments: Sequence[str],
    seconds: float = 1800,
    more: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run Python with the extension loaded, in a process of its own."""
    environment = {**os.environ, **variant.environment(), "FASTMLP_EMULATED": str(extension), **(more or {})}
    # ThreadSanitizer wants memory where it expects it.
    fixed = ["setarch", "-R"] if variant is THREAD and shutil.which("setarch") else []
    return subprocess.run(
        [*fixed, sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
    )

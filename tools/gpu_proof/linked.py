"""Gate `linked`: the real extension, built for all architectures against a torch with CUDA, imported without a driver.

It needs a virtual environment of its own, of 5.5 GB, which it makes under build/: the rest of the project is tested
with a torch without CUDA.
"""

import json
import os
import re
import shutil
import sys
import tomllib
import zipfile
from pathlib import Path

from tools.gpu_proof.checks import Check, Outcome
from tools.gpu_proof.compiled import ARCHITECTURES
from tools.gpu_proof.kernels import ROOT
from tools.gpu_proof.toolchain import BUILD, digest, run, tool

TORCH = os.environ.get("FASTMLP_CUDA_TORCH", "torch==2.14.1")

#: Printed by a process that has nothing but the wheel and torch.
REPORT = """
import json, torch, fastmlp
from fastmlp import _C
kernels = {}
for name in ("forward", "infer", "backward"):
    keys = ("CPU", "CUDA", "Meta")
    kernels[name] = [k for k in keys if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmlp::{name}", k)]
fastmlp.MLP(3, [4], 2)(torch.randn(5, 3)).sum().backward()
gpu = torch.cuda.is_available()
print(json.dumps({"torch": torch.__version__, "gpu": gpu, "devices": _C.devices(), "kernels": kernels}))
"""


def environment() -> Path:
    """Return a virtual environment with torch for CUDA and the compiler of its release, made if there is none."""
    venv = Path(os.environ.get("FASTMLP_CUDA_VENV", BUILD / "venv"))
    packages = [TORCH, "setuptools>=77", "ninja", "numpy", *_toolkit_packages()]
    stamp = venv / "installed.txt"
    if not stamp.exists() or stamp.read_text() != "\n".join(packages):
        run([sys.executable, "-m", "venv", venv])
        run([venv / "bin/python", "-m", "pip", "install", "--quiet", *packages])
        stamp.write_text("\n".join(packages))
    return venv


def _toolkit_packages() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [name for name in project["optional-dependencies"]["gpu-proof"] if name.startswith("nvidia-")]


def toolkit_of(venv: Path) -> Path:
    """Return a folder that torch takes for a CUDA toolkit: links to what PyPI's packages brought."""
    if home := os.environ.get("CUDA_HOME"):
        return Path(home)
    (packages,) = venv.glob("lib/python3*/site-packages/nvidia/cu13")
    folder = BUILD / "toolkit"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "lib64").mkdir(parents=True)
    for name in ("bin", "include", "nvvm"):
        (folder / name).symlink_to(packages / name)
    (runtime,) = packages.glob("lib/libcudart.so.*")
    (folder / "lib64/libcudart.so").symlink_to(runtime)
    return folder


def wheel(venv: Path, source: Path) -> Path:
    """Build the wheel from a copy of the sources, in which objects stay for the next time."""
    folder = BUILD / "wheel"
    folder.mkdir(parents=True, exist_ok=True)
    copied = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "csrc", "fastmlp")
    files = [path for name in copied for path in sorted((source / name).rglob("*")) or [source / name]]
    for old in [path for path in (folder / "csrc").rglob("*") if path.is_file()]:
        if not (source / old.relative_to(folder)).exists():
            old.unlink()
    for path in files:
        if not path.is_file() or path.suffix == ".so" or path.name == "_build.json" or "__pycache__" in path.parts:
            continue
        target = folder / path.relative_to(source)
        # A file that is as it was keeps its time, and with it its object.
        if not target.exists() or target.read_bytes() != path.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    stamp = folder / f"built_{digest(*(p for p in files if p.is_file()), TORCH)}"
    if not stamp.exists():
        for old in (*folder.glob("built_*"), *folder.glob("dist/*")):
            old.unlink()
        tools = f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"
        variables = {"PATH": tools, "CUDA_HOME": str(toolkit_of(venv)), "FASTMLP_CUDA": "1"}
        command = ["-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", "dist", "."]
        run([venv / "bin/python", *command], cwd=folder, env=variables, seconds=4 * 3600)
        stamp.touch()
    (built,) = (folder / "dist").glob("*.whl")
    return built


def check(source: Path = ROOT) -> Outcome:
    """Build, install beside torch, import, and list what is registered and what code is inside."""
    outcome = Outcome(columns=("what", "found"), title="the wheel with CUDA")
    venv = environment()
    built = wheel(venv, source)
    run([venv / "bin/python", "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps", built])
    said = run([venv / "bin/python", "-c", REPORT], cwd=BUILD)
    found = json.loads(said.strip().splitlines()[-1])

    def judge(subject: str, what: str, passed: bool) -> None:
        outcome.checks.append(Check("linked", "", "", subject, what, passed))
        outcome.lines.append((subject, what if passed else f"[red]{what}[/]"))

    judge("imported", f"with torch {found['torch']}, {'a' if found['gpu'] else 'no'} GPU visible", True)
    judge("devices", ", ".join(found["devices"]), found["devices"] == ["cpu", "cuda"])
    for name, keys in found["kernels"].items():
        judge(f"fastmlp::{name}", ", ".join(keys), {"CPU", "CUDA"} <= set(keys))
    library = BUILD / "wheel/inside"
    shutil.rmtree(library, ignore_errors=True)
    with zipfile.ZipFile(built) as archive:
        (inside,) = (name for name in archive.namelist() if name.endswith(".so"))
        archive.extract(inside, library)
    listed = run([tool("cuobjdump"), "--list-elf", "--list-ptx", library / inside])
    code = {int(n) for n in re.findall(r"\.sm_(\d+)\w*\.cubin", listed)}
    ptx = {int(n) for n in re.findall(r"\.sm_(\d+)\w*\.ptx", listed)}
    judge("code for", ", ".join(f"sm_{n}" for n in sorted(code)), code == set(ARCHITECTURES))
    judge("PTX for", ", ".join(f"compute_{n}" for n in sorted(ptx)), ptx == {max(ARCHITECTURES)})
    judge("size", f"wheel {built.stat().st_size / 1e6:.1f} MB, "
          f"library in it {(library / inside).stat().st_size / 1e6:.1f} MB", True)  # fmt: skip
    return outcome

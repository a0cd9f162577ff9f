"""What FASTMLP_CUDA asks of the build, in a process without CUDA."""

import contextlib
import email
import json
import os
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

import fastmlp
from fastmlp import _C
from fastmlp._load import read_build

SETUP = Path(__file__).parents[2] / "setup.py"


def configure(choice: str) -> subprocess.CompletedProcess[str]:
    """setup.py as far as its choice of an extension."""
    environment = {**os.environ, "FASTMLP_CUDA": choice}
    command = [sys.executable, "-c", "import runpy; runpy.run_path('setup.py')['make_extension']()"]
    return subprocess.run(command, cwd=SETUP.parent, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("choice", ["0", "auto"])
def test_without_cuda_the_cpu_alone_is_built(choice: str) -> None:
    assert configure(choice).returncode == 0


def test_cuda_that_cannot_be_had_is_an_error() -> None:
    found = configure("1")
    if torch.version.cuda is None:
        assert found.returncode != 0
        assert f"FASTMLP_CUDA=1, but torch {torch.__version__} is built without CUDA" in found.stderr
    else:
        assert "is built without CUDA" not in found.stderr


def test_other_choices_are_errors() -> None:
    found = configure("yes")
    assert found.returncode != 0
    assert "FASTMLP_CUDA must be 0, 1 or auto, got 'yes'" in found.stderr


#: setup.py with a torch that has CUDA, a toolkit, and these cards.
WITH_CARDS = """
import json, os, runpy, subprocess, sys, torch, torch.utils.cpp_extension as extension
cards, known = json.loads(sys.argv[1])
torch.version.cuda = "13.0"
torch.cuda.is_available = lambda: bool(cards)
torch.cuda.device_count = lambda: len(cards)
torch.cuda.get_device_capability = lambda device=0: tuple(cards[device])
torch.cuda.get_arch_list = lambda: known
extension.CUDA_HOME = sys.argv[2]
extension.CUDAExtension = extension.CppExtension
runpy.run_path("setup.py")["make_extension"]()
print(os.environ["TORCH_CUDA_ARCH_LIST"])
"""


def configure_with(cards: list[tuple[int, int]], folder: Path, listed: str | None) -> subprocess.CompletedProcess[str]:
    nvcc = folder / "bin/nvcc"
    nvcc.parent.mkdir(exist_ok=True)
    nvcc.write_text("#!/bin/sh\necho release 13.0, V13.0.48\n")
    nvcc.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    environment |= {"FASTMLP_CUDA": "1"} | ({} if listed is None else {"TORCH_CUDA_ARCH_LIST": listed})
    arguments = [json.dumps([cards, ["sm_75", "sm_90", "sm_120", "compute_120"]]), str(folder)]
    command = [sys.executable, "-c", WITH_CARDS, *arguments]
    return subprocess.run(command, cwd=SETUP.parent, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        ([], "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        ([(9, 0)], "9.0+PTX"),
        ([(7, 5)], "7.5"),
        ([(12, 0), (7, 5), (12, 0)], "7.5;12.0+PTX"),
        ([(13, 0)], "12.0+PTX"),
    ],
    ids=str,
)
def test_architectures_are_those_of_the_cards(cards: list[tuple[int, int]], expected: str, tmp_path: Path) -> None:
    """PTX of sm_75 has traps in place of bfloat16's tensor cores: newer cards must never compile it."""
    found = configure_with(cards, tmp_path, None)
    assert found.stdout.splitlines()[-1:] == [expected], found.stderr


def test_listed_architectures_are_taken_but_for_ptx_that_lacks_kernels(tmp_path: Path) -> None:
    assert configure_with([(9, 0)], tmp_path, "8.6+PTX").stdout.splitlines()[-1] == "8.6+PTX"
    refused = configure_with([(9, 0)], tmp_path, "7.5+PTX")
    assert refused.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST=7.5+PTX asks for PTX of an architecture before 8.0" in refused.stderr


#: setup.py where torch cannot be imported, and with packages of another place around an environment for a build.
WITHOUT_TORCH = """
import json, runpy, sys, sysconfig
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
around = sys.argv[1]
sysconfig.get_path = lambda name: around
sys.path[:] = [path for path in sys.path if "site-packages" not in path] + sys.argv[2:]
setup = runpy.run_path("setup.py")
try:
    setup["provide_torch"]()
except SystemExit as error:
    print(error)
print(json.dumps([setup["required_torch"](), around in sys.path]))
"""


def without_torch(around: Path, installed: str | None) -> list[str]:
    if installed is not None:
        folder = around / f"torch-{installed}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {installed}\n")
    # Beside setuptools there is torch, which is hidden here.
    tools = around / "tools"
    tools.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        (tools / name).symlink_to(Path(setuptools.__file__).parents[1] / name)
    command = [sys.executable, "-c", WITHOUT_TORCH, str(around), str(tools)]
    done = subprocess.run(command, cwd=SETUP.parent, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_metadata_need_no_torch(tmp_path: Path) -> None:
    said, state = without_torch(tmp_path, None)
    assert "torch is not installed here, expected 2.11 or newer" in said
    assert said.endswith("pip install --no-build-isolation .")
    assert json.loads(state) == ["torch>=2.11", False]


def test_a_wheel_depends_on_the_minor_version_of_the_torch_around_it(tmp_path: Path) -> None:
    (state,) = without_torch(tmp_path, "2.13.0+cpu")
    assert json.loads(state) == ["torch==2.13.*", True]


def test_a_torch_that_is_too_old_is_refused_before_anything_is_compiled(tmp_path: Path) -> None:
    said, _ = without_torch(tmp_path, "2.9.1+cpu")
    assert "torch 2.9.1+cpu is installed, expected 2.11 or newer" in said


def run_setup(folder: Path, *commands: str) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder), *commands]
    subprocess.run(command, cwd=SETUP.parent, check=True, capture_output=True)


def test_an_archive_of_the_source_holds_what_tests_and_documents_need(tmp_path: Path) -> None:
    run_setup(tmp_path, "sdist", "--dist-dir", str(tmp_path))
    with tarfile.open(tmp_path / f"fastmlp-{fastmlp.__version__}.tar.gz") as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
        metadata = archive.extractfile(f"fastmlp-{fastmlp.__version__}/PKG-INFO")
        assert metadata is not None
        assert b"\nRequires-Dist: torch>=2.11\n" in metadata.read()
    folders = ("csrc", "fastmlp", "tests", "tools", "benchmarks", "examples", "docs", ".ci", ".github")
    source = [path.relative_to(SETUP.parent) for name in folders for path in (SETUP.parent / name).rglob("*.*")]
    wanted = {str(path) for path in source if path.suffix not in (".so", ".pyc") and path.name != "_build.json"}
    assert {path for path in wanted if (SETUP.parent / path).is_file()} - held == set()
    assert {"LICENSE", "Makefile", "CITATION.cff", "SECURITY.md", ".clang-format", "pyproject.toml"} - held == set()
    assert [path for path in held if path.endswith((".so", ".pyc", "_build.json"))] == []


def test_a_wheel_names_its_version_and_its_torch_and_holds_the_license(tmp_path: Path) -> None:
    run_setup(tmp_path, "dist_info", "--output-dir", str(tmp_path))
    (folder,) = tmp_path.glob("*.dist-info")
    metadata = email.message_from_string((folder / "METADATA").read_text(encoding="utf-8"))
    assert metadata["Version"] == fastmlp.__version__
    assert f"torch=={'.'.join(torch.__version__.split('.')[:2])}.*" in metadata.get_all("Requires-Dist", [])
    assert (folder / "licenses/LICENSE").read_bytes() == (SETUP.parent / "LICENSE").read_bytes()


FLAGS = ["-O3"]


def compile_in(folder: Path, extra: list[str] | dict[str, list[str]]) -> list[tuple[list[str], dict[str, Any]]]:
    """What `compile_groups` of setup.py asks of torch, of which every answer is a new object."""
    asked = []

    def compile_all(sources: list[str], **options: Any) -> list[str]:
        asked.append((sources, options))
        objects = [Path(options["output_dir"], f"{source.replace('/', '.')}.o") for source in sources]
        for path in objects:
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                path.write_text("new")
        return [str(path) for path in objects]

    sources = ["csrc/cpu/a.cpp", "csrc/python/b.cpp", "csrc/capture/c.cpp", "csrc/tensors/d.cpp", "csrc/cuda/e.cu"]
    options = {"output_dir": str(folder), "extra_postargs": extra}
    with contextlib.chdir(folder):
        objects = runpy.run_path(str(SETUP))["compile_groups"](compile_all, sources, **options)
    assert sorted(Path(path).name for path in objects) == sorted(f"{path.replace('/', '.')}.o" for path in sources)
    return asked


@pytest.mark.parametrize("extra", [FLAGS, {"cxx": FLAGS, "nvcc": ["-O2"]}], ids=["cpu", "cuda"])
def test_only_units_that_know_torch_get_its_precompiled_headers(
    extra: list[str] | dict[str, list[str]], tmp_path: Path
) -> None:
    first, python, torchs = compile_in(tmp_path, extra)
    place = f"build/precompiled-{sys.implementation.cache_tag}"
    headers = [f"{place}/{name}/precompiled.hpp" for name in ("python", "capture")]
    assert first == (
        ["csrc/cpu/a.cpp", "csrc/cuda/e.cu", *headers],
        {"output_dir": str(tmp_path), "extra_postargs": extra},
    )
    assert [python[0], torchs[0]] == [["csrc/python/b.cpp"], ["csrc/capture/c.cpp", "csrc/tensors/d.cpp"]]
    for header, (_, options) in zip(headers, (python, torchs), strict=True):
        assert options["extra_postargs"] == [*FLAGS, "-Wno-sign-compare", "-include", str(tmp_path / header)]
        assert Path(tmp_path, f"{header}.gch").read_text() == "new"


def test_units_older_than_their_precompiled_header_are_compiled_again(tmp_path: Path) -> None:
    compile_in(tmp_path, FLAGS)
    old, kept = tmp_path / "python/csrc.python.b.cpp.o", tmp_path / "capture/csrc.tensors.d.cpp.o"
    for path in (old, kept):
        path.write_text("old")
    os.utime(old, (0, 0))
    compile_in(tmp_path, FLAGS)
    assert (old.read_text(), kept.read_text()) == ("new", "old")


def test_a_compiler_without_precompiled_headers_is_known() -> None:
    precompiles = runpy.run_path(str(SETUP))["precompiles"]
    assert precompiles([os.environ.get("CXX", "c++")])
    assert not precompiles(["false"])


def test_devices_are_those_of_the_build() -> None:
    with_cuda = read_build()["cuda_version"]
    assert _C.devices() == (["cpu", "cuda"] if with_cuda else ["cpu"])
    assert list(_C.absent_devices()) == ([] if with_cuda else ["cuda"])
    assert _C.training_devices() == _C.packing_devices() == ["cpu"]
    assert _C.device_obstacle("cpu") is None
    assert _C.device_obstacle("meta") == "there are no kernels for the device"


def test_cuda_tensors_name_the_rebuild() -> None:
    why = _C.device_obstacle("cuda")
    if read_build()["cuda_version"]:
        assert why is None
    else:
        assert why is not None
        assert "FASTMLP_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps ." in why

"""Builds the extension fastmlp._C; metadata stands in pyproject.toml, but for the torch that a build is bound to.

Torch is imported when the extension is built, and not before: metadata and source archives need none.

FASTMLP_CUDA=auto (default), 0 or 1: with CUDA kernels if torch and a toolkit have CUDA; without; with them or an error.
They are compiled for the cards of this machine, for all architectures if it has none, or as TORCH_CUDA_ARCH_LIST says.
FASTMLP_SANITIZE=address,undefined: a build for tests, with these sanitizers of the compiler.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from functools import cache, partial
from glob import glob
from importlib import metadata
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

#: The oldest version of torch that has what the extension calls.
OLDEST_TORCH = (2, 11)

#: Where packages of the environment are. In an environment that pip makes for a build alone they are not on the path.
AROUND = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


def installed_torch() -> str | None:
    """The version of the torch that the extension will run with, without the import of it."""
    found = next(iter(metadata.distributions(name="torch", path=[*sys.path, *AROUND])), None)
    return None if found is None else found.version


def required_torch() -> str:
    """What a wheel depends on: an extension runs with the minor version of torch that it was built with."""
    found = installed_torch()
    if found is None or "sdist" in sys.argv:
        return f"torch>={'.'.join(map(str, OLDEST_TORCH))}"
    return f"torch=={'.'.join(found.split('.')[:2])}.*"


def provide_torch() -> None:
    """Lets torch be imported: the one that is installed, in an environment of pip's own for this build too."""
    found = installed_torch()
    if found is None or tuple(map(int, found.split(".")[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        state = "is not installed here" if found is None else f"{found} is installed"
        raise SystemExit(
            f"fastmlp: torch {state}, expected {oldest} or newer, because the extension is built for the torch that it "
            f"will run with; where fastmlp is wanted run: pip install 'torch>={oldest}' 'setuptools>=77' ninja numpy, "
            "and then in its source tree: pip install --no-build-isolation ."
        )
    sys.path += [path for path in AROUND if path not in sys.path]


def cuda_obstacle() -> str | None:
    """Why the CUDA kernels cannot be built here, or None."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if CUDA_HOME is None:
        return f"torch has CUDA {torch.version.cuda}, but no CUDA toolkit was found; CUDA_HOME names one"
    nvcc = Path(CUDA_HOME, "bin", "nvcc")
    if not nvcc.exists():
        return f"the CUDA toolkit in {CUDA_HOME} has no nvcc"
    answer = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.", answer)
    if found is None or found[1] != torch.version.cuda.split(".")[0]:
        release = "an unknown release" if found is None else f"release {found[1]}"
        return f"torch has CUDA {torch.version.cuda}, but the toolkit in {CUDA_HOME} is of {release}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (7, 5):
        return f"{torch.cuda.get_device_name()} is older than sm_75"
    return None


@cache
def wants_cuda() -> bool:
    """What FASTMLP_CUDA asks for, or an error if it cannot be had."""
    choice = os.environ.get("FASTMLP_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"FASTMLP_CUDA must be 0, 1 or auto, got {choice!r}")
    if choice == "0":
        return False
    obstacle = cuda_obstacle()
    if obstacle and choice == "1":
        raise SystemExit(f"FASTMLP_CUDA=1, but {obstacle}")
    return obstacle is None


def architectures() -> str:
    """What the kernels are compiled for: what TORCH_CUDA_ARCH_LIST says, the cards of this machine, or all.

    Of the newest there is PTX too, which newer cards compile; but not of sm_75, whose code lacks the products of
    bfloat16 on tensor cores that newer cards are asked for.
    """
    import torch

    if (listed := os.environ.get("TORCH_CUDA_ARCH_LIST")) is not None:
        if re.search(r"\b7\.\d\+PTX|\bTuring\+PTX", listed):
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST={listed} asks for PTX of an architecture before 8.0, which lacks kernels that "
                "newer cards are asked for; leave +PTX to 8.0 or newer"
            )
        return listed
    if not torch.cuda.is_available():
        return "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
    # Of a card that is newer than torch, PTX of the newest that torch knows.
    known = max(int(n) for name in torch.cuda.get_arch_list() for n in re.findall(r"sm_(\d+)", name))
    cards = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    found = sorted({min(card, divmod(known, 10)) for card in cards})
    names = [f"{major}.{minor}" for major, minor in found]
    return ";".join(names) + ("+PTX" if found[-1] >= (8, 0) else "")


#: What a build without CUDA kernels has in their place: it says how to build them.
ABSENT = "csrc/cuda/absent.cpp"


def make_extension() -> Extension:
    """The extension as this machine, its torch and the environment want it."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    compile_flags = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    link_flags = ["-fopenmp"]
    if sanitizers := os.environ.get("FASTMLP_SANITIZE"):
        flags = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
        compile_flags += ["-O1", "-g1", *flags]
        link_flags += flags
    else:
        link_flags += ["-Wl,--strip-debug"]
    sources = {path for kind in ("cpp", "cu") for path in glob(f"csrc/**/*.{kind}", recursive=True)}
    if not wants_cuda():
        return CppExtension(
            "fastmlp._C",
            sorted(sources - set(glob("csrc/cuda/**", recursive=True)) | {ABSENT}),
            extra_compile_args=compile_flags,
            extra_link_args=link_flags,
        )
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
    # activation.h is constexpr, which this flag lets device code call.
    nvcc_flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden"]
    return CUDAExtension(
        "fastmlp._C",
        sorted(sources - {ABSENT}),
        extra_compile_args={"cxx": compile_flags, "nvcc": nvcc_flags},
        extra_link_args=link_flags,
    )


#: What nearly all units of these folders read first, which is half of the time that they take to compile. It is
#: compiled once for the folders that know Python, and once for those that know torch alone. All others do without.
PRECOMPILED = {
    ("csrc/python/",): ("torch/csrc/autograd/python_variable.h", "torch/csrc/utils/pybind.h"),
    ("csrc/capture/", "csrc/tensors/"): ("ATen/core/Tensor.h", "ATen/core/dispatch/Dispatcher.h", "torch/library.h"),
}


def precompiles(compiler: list[str]) -> bool:
    """Whether the compiler makes a precompiled header of a header, as gcc and clang do."""
    with tempfile.TemporaryDirectory() as folder:
        header = Path(folder, "empty.hpp")
        header.touch()
        command = [*compiler, "-c", str(header), "-o", f"{header}.gch"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def compile_groups(compile_all: Callable[..., list[str]], sources: list[str], **options: Any) -> list[str]:
    """Compiles by torch's `compile_all`: first what is in no group and the headers, then the units with their header.

    Headers are compiled like sources, so that their flags are those of the units, and ninja compiles them again when
    torch's change. Of a unit ninja does not learn what its precompiled header is made of, so older units are removed.
    The place of a header is the same in each build, which ccache needs: pip has a new folder for objects each time.
    """
    place = Path("build", f"precompiled-{sys.implementation.cache_tag}")
    groups = {}
    for folders, names in PRECOMPILED.items():
        header = place / Path(folders[0]).name / "precompiled.hpp"
        header.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"#include <{name}>\n" for name in names)
        if not header.exists() or header.read_text(encoding="utf-8") != text:
            header.write_text(text, encoding="utf-8")
        groups[header] = [path for path in sources if path.startswith(folders)]
    others = [path for path in sources if not path.startswith(sum(PRECOMPILED, ()))]
    objects = compile_all([*others, *map(str, groups)], **options)
    flags = options["extra_postargs"]
    # Of a precompiled header gcc forgets which warnings torch has switched off in it: this is the one.
    flags = [*(flags["cxx"] if isinstance(flags, dict) else flags), "-Wno-sign-compare"]
    for (header, units), made in zip(groups.items(), objects[len(others) :], strict=True):
        link = Path(f"{header}.gch")
        link.unlink(missing_ok=True)
        link.symlink_to(Path(made).absolute())
        folder = Path(options["output_dir"], header.parent.name)
        for unit in folder.rglob("*.o"):
            if unit.stat().st_mtime < link.stat().st_mtime:
                unit.unlink()
        include = ["-include", str(header.absolute())]
        grouped = options | {"output_dir": str(folder), "extra_postargs": [*flags, *include]}
        objects += compile_all(units, **grouped)
    return objects[: len(others)] + objects[len(others) + len(groups) :]


class Build(build_ext):  # type: ignore[misc]
    """Builds as torch's command does, and notes beside the extension which torch it is of, for fastmlp/_load.py."""

    def run(self) -> None:
        """Makes the extension, lets torch's command build it, and writes the note."""
        provide_torch()
        import torch
        from torch.utils.cpp_extension import BuildExtension, get_cxx_compiler

        class Command(BuildExtension):
            def build_extension(self, extension: Extension) -> None:
                if precompiles(shlex.split(get_cxx_compiler())):
                    # Without this ccache, which torch calls where it is installed, keeps no unit with such a header.
                    os.environ.setdefault("CCACHE_SLOPPINESS", "pch_defines,time_macros")
                    self.compiler.src_extensions = [*self.compiler.src_extensions, ".hpp"]
                    self.compiler.compile = partial(compile_groups, self.compiler.compile)
                super().build_extension(extension)

        self.extensions = self.distribution.ext_modules = [make_extension()]
        command = Command(self.distribution)
        for option in ("build_lib", "build_temp", "inplace", "editable_mode", "debug", "force", "parallel"):
            setattr(command, option, getattr(self, option))
        command.ensure_finalized()
        command.run()
        info = {
            "torch": torch.__version__,
            "cxx11_abi": torch.compiled_with_cxx11_abi(),
            "cuda_version": torch.version.cuda if wants_cuda() else None,
        }
        path = Path(self.get_ext_fullpath("fastmlp._C")).with_name("_build.json")
        path.write_text(json.dumps(info) + "\n", encoding="utf-8")


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("fastmlp._C", [ABSENT])],
        cmdclass={"build_ext": Build},
        install_requires=[required_torch(), "numpy"],
    )

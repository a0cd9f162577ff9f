"""The rules that give each folder its place: what a file of csrc may include, and which files may name a device."""

import ast
import re
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"

#: For each folder of csrc: the others whose files it may include.
MAY_INCLUDE: dict[str, tuple[str, ...]] = {
    "contract": (),
    "tensors": ("contract",),
    "cpu": ("contract",),
    "cuda": ("contract",),
    "capture": ("contract", "tensors"),
    "python": ("contract", "tensors", "capture"),
}
#: The files of a device that turn tensors into pointers: they may know tensors and torch.
REGISTER_FILES = ("cpu/register.cpp", "cuda/register.cpp", "cuda/library.h", "cuda/absent.cpp")

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"\n]+)[>"]', re.MULTILINE)
_TORCH = re.compile(r"(ATen|c10|caffe2|torch)/")
#: Headers that need Python, or bring it along.
_PYTHON = re.compile(r"Python\.h|pybind11/|torch/(extension\.h|csrc/(?!api/))")


def wrong_includes(file: str, text: str) -> list[str]:
    """What a file of csrc includes and may not, as lines that say why.

    Args:
        file: its path, beginning in csrc.
        text: what is in it.
    """
    folder = PurePosixPath(file).parts[0]
    registers = file in REGISTER_FILES
    allowed = {folder, *MAY_INCLUDE[folder], *(("tensors",) if registers else ())}
    found = []
    for quote, name in _INCLUDE.findall(text):
        if _PYTHON.match(name):
            if folder != "python":
                found.append(f"{file} includes {name}, and {folder} knows no Python")
        elif _TORCH.match(name):
            if folder not in ("tensors", "capture", "python") and not registers:
                found.append(f"{file} includes {name}, and {folder} knows no torch")
        elif quote == '"':
            target = (CSRC / file).parent.joinpath(name).resolve()
            # Such as the emulator's header, which takes the place of CUDA's.
            if not target.is_relative_to(CSRC) or not target.exists():
                continue
            other = target.relative_to(CSRC).parts[0]
            if other not in allowed:
                found.append(f"{file} includes {name}, and {folder} may include {', '.join(sorted(allowed))}")
    return found


def test_includes_go_one_way() -> None:
    files = [path for path in sorted(CSRC.rglob("*")) if path.is_file()]
    assert len(files) > 50
    assert [line for path in files for line in wrong_includes(str(path.relative_to(CSRC)), path.read_text())] == []


def test_quoted_includes_are_of_files_that_exist() -> None:
    """Else the test above would overlook an arrow: only the emulator of the tests lies elsewhere."""
    strangers = {
        name
        for path in CSRC.rglob("*")
        if path.is_file()
        for quote, name in _INCLUDE.findall(path.read_text())
        if quote == '"' and not path.parent.joinpath(name).exists()
    }
    assert strangers == {"emulator.h"}


def test_a_device_has_names_of_its_own() -> None:
    """A class of a device's folder whose name a folder that it sees has too would have to be spelled out each time."""
    declared = re.compile(r"^(?:template <[^>]*> )?(?:class|struct) (\w+)(?: final)? [:{]", re.MULTILINE)
    names = {
        folder: {name for path in (CSRC / folder).rglob("*.h") for name in declared.findall(path.read_text())}
        for folder in MAY_INCLUDE
    }
    shared = names["contract"] | names["tensors"]
    assert {"FrozenNetwork", "Network"} <= shared
    assert {device: names[device] & shared for device in ("cpu", "cuda")} == {"cpu": set(), "cuda": set()}


@pytest.mark.parametrize(
    ("file", "text", "word"),
    [
        ("contract/planted.h", '#include "../tensors/stack.h"\n', "contract may include contract"),
        ("contract/planted.h", "#include <c10/util/ArrayRef.h>\n", "knows no torch"),
        ("contract/planted.h", "#include <Python.h>\n", "knows no Python"),
        ("tensors/planted.cpp", '#include "../cpu/frozen.h"\n', "tensors may include contract, tensors"),
        ("tensors/planted.cpp", '#include "../python/route.h"\n', "tensors may include contract, tensors"),
        ("tensors/planted.cpp", "#include <torch/csrc/utils/pybind.h>\n", "knows no Python"),
        ("tensors/planted.cpp", "#include <torch/csrc/autograd/python_variable.h>\n", "knows no Python"),
        ("tensors/planted.cpp", "#include <torch/extension.h>\n", "knows no Python"),
        ("tensors/planted.cpp", "  #  include <Python.h>\n", "knows no Python"),
        ("cpu/planted.cpp", '#include "../tensors/stack.h"\n', "cpu may include contract, cpu"),
        ("cpu/kernels/planted.inl", '#include "../../cuda/tiles.h"\n', "cpu may include contract, cpu"),
        ("cpu/planted.cpp", "#include <ATen/Parallel.h>\n", "knows no torch"),
        ("cpu/register.cpp", '#include "../python/route.h"\n', "cpu may include contract, cpu, tensors"),
        ("cpu/register.cpp", '#include "../cuda/network.h"\n', "cpu may include contract, cpu, tensors"),
        ("cpu/register.cpp", "#include <torch/extension.h>\n", "knows no Python"),
        ("cuda/dtypes/planted.cu", '#include "../../cpu/gemm.h"\n', "cuda may include contract, cuda"),
        ("cuda/planted.cuh", "#include <ATen/cuda/CUDAContext.h>\n", "knows no torch"),
        ("capture/planted.cpp", '#include "../cpu/frozen.h"\n', "capture may include capture, contract, tensors"),
        ("capture/planted.cpp", '#include "../python/gil.h"\n', "capture may include capture, contract, tensors"),
        ("capture/planted.cpp", "#include <torch/csrc/utils/pybind.h>\n", "knows no Python"),
        ("tensors/planted.cpp", '#include "../capture/tape.h"\n', "tensors may include contract, tensors"),
        (
            "python/planted.cpp",
            '#include "../cuda/network.h"\n',
            "python may include capture, contract,",
        ),
        ("python/planted.cpp", '#include "../cpu/frozen.h"\n', "python may include capture, contract,"),
    ],
)
def test_an_arrow_that_goes_the_wrong_way_is_found(file: str, text: str, word: str) -> None:
    text = f'#include <vector>\n{text}#include "planted.h"\n'
    (found,) = wrong_includes(file, text)
    assert found.startswith(f"{file} includes ")
    assert word in found


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("contract/planted.h", '#include "problem.h"\n#include <cstdint>\n'),
        ("tensors/planted.cpp", '#include "../contract/problem.h"\n#include <torch/library.h>\n'),
        ("cpu/register.cpp", '#include "../tensors/devices.h"\n#include <ATen/ATen.h>\n'),
        ("cuda/device.h", '#include "emulator.h"\n'),
        ("python/planted.cpp", '#include "../tensors/devices.h"\n#include <torch/extension.h>\n'),
    ],
)
def test_an_arrow_that_goes_the_right_way_is_not(file: str, text: str) -> None:
    assert wrong_includes(file, text) == []


#: Files outside of a device's folder that name one, and why they must.
NAME_DEVICES = {
    "csrc/tensors/devices.cpp": "the host, which reads an optimizer's numbers, is what torch calls the CPU",
    "csrc/capture/direct.cpp": "torch's kernels of the host bear its name",
    "fastmlp/__main__.py": "--device of the benchmark",
    "fastmlp/bench.py": "it measures the processor, and says so of what is elsewhere",
    "fastmlp/benchmark/peers.py": "other libraries call the processor so",
    "fastmlp/benchmark/standard.py": "its networks and batches are chosen for each device",
    "fastmlp/commands.py": "--device of the benchmark",
    "fastmlp/tape/graphable.py": "a CUDA graph is one of CUDA",
    "fastmlp/tape/recorder.py": "what it records is replayed on the host, or by a CUDA graph",
    "fastmlp/tape/trace.py": "memory of a recording is on the host where nothing else is said",
    "fastmlp/trace/recording.py": "it records what torch says of tensors and of autocast, by torch's names",
    "fastmlp/tuning.py": "autotune is of the CUDA kernels alone",
}

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_DEVICE = re.compile(
    r"\bk(?:CPU|CUDA)\b|\bis_(?:cpu|cuda)\b|\b(?:cpu|cuda)::|\bempty_(?:cpu|cuda)\b"
    r"|\bDeviceType::(?:CPU|CUDA)\b|\bDispatchKey::\w*(?:CPU|CUDA)\b|\"(?:cpu|cuda)(?::\d+)?\""
)
_WORD = re.compile(r"(?:cpu|cuda)(?::\d+)?|.*\bis_(?:cpu|cuda)\b.*")


def devices_named(file: str, text: str) -> list[str]:
    """What a file says of a device by name, comments and docstrings aside."""
    if not file.endswith(".py"):
        return _DEVICE.findall(_COMMENT.sub("", text))
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _WORD.fullmatch(node.value):
            found.append(node.value)
        if isinstance(node, ast.Attribute) and node.attr in ("is_cpu", "is_cuda"):
            found.append(node.attr)
    return found


def test_only_a_device_s_own_folder_names_it() -> None:
    """Everything else asks the table of csrc/tensors/devices.h, so that a device is added in one place."""
    own = (CSRC / "cpu", CSRC / "cuda")
    files = [p for p in sorted(CSRC.rglob("*")) if p.is_file() and not any(p.is_relative_to(f) for f in own)]
    files += sorted((ROOT / "fastmlp").rglob("*.py"))
    named = {str(path.relative_to(ROOT)): devices_named(path.name, path.read_text()) for path in files}
    assert {file: names for file, names in named.items() if names and file not in NAME_DEVICES} == {}
    # What no longer names one loses its exception.
    assert [file for file in NAME_DEVICES if not named[file]] == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("planted.cpp", "if (tensor.is_cuda()) return;"),
        ("planted.cpp", "at::empty(sizes, at::kCPU);"),
        ("planted.h", "cpu::update(updates);"),
        ("planted.cpp", "keys.has(c10::DispatchKey::AutogradCUDA)"),
        ("planted.cpp", 'c10::Device("cuda:0")'),
        ("planted.cpp", "at::detail::empty_cpu(sizes, dtype);"),
        ("planted.py", 'x = torch.zeros(3, device="cpu")'),
        ("planted.py", 'obstacle = device_obstacle("cuda:1")'),
        ("planted.py", "if tensor.is_cuda: pass"),
    ],
)
def test_a_device_that_is_named_is_found(file: str, line: str) -> None:
    assert len(devices_named(file, f"{line}\n")) == 1


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("planted.cpp", "// cpu::update, on the CPU\n/* tensor.is_cuda() */ int cpus;\n"),
        ("planted.py", '"""On the CPU: torch.zeros(3, device=\'cpu\')."""\n\n# device "cuda"\n'),
    ],
)
def test_words_about_devices_are_not(file: str, text: str) -> None:
    assert devices_named(file, text) == []

"""Frozen networks written in C, compiled by the machine's compiler and called in this process."""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmlp import FrozenMLP
from tests.support.graphs import as_tuple

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
#: Nothing that a compiler warns of, and nothing that is not in the standard.
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")
_TYPES = {torch.float32: "float", torch.float64: "double"}


def run_compiler(*arguments: str) -> None:
    """Compiles and links."""
    assert COMPILER is not None
    done = subprocess.run([COMPILER, *arguments, "-lm"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


class Compiled:
    """A network that was written by `to_c` and compiled.

    Args:
        network: to write.
        folder: for the files.
        options: of the compiler.
    """

    def __init__(self, network: FrozenMLP, folder: Path, options: Sequence[str] = ("-O2",), name: str = "network"):
        self.text = folder / f"{name}.c"
        network.to_c(self.text, name)
        library = folder / f"{name}.so"
        assert not library.exists(), "a library of a path is loaded once, whatever is written there later"
        run_compiler(*STRICT, *options, "-shared", "-fPIC", "-o", str(library), str(self.text))
        library_: Any = ctypes.CDLL(str(library))
        self.row, self.batch = library_[name], library_[f"{name}_batch"]
        self.row.restype = self.batch.restype = None

    def __call__(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Writes the outputs for some rows."""
        pointers = [ctypes.c_void_p(each.data_ptr()) for each in (*inputs, *outputs)]
        self.batch(*pointers, ctypes.c_size_t(len(inputs[0])))

    def results(self, network: FrozenMLP, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What it computes, in the shapes of the network's results, between guards; row by row it is the same."""
        shapes = [each.shape for each in as_tuple(network(*inputs))]
        rows = len(inputs[0])
        guarded = [torch.full((shape.numel() + 16,), 7.0, dtype=inputs[0].dtype) for shape in shapes]
        inside = [each[8:-8] for each in guarded]
        self([each.contiguous() for each in inputs], inside)
        assert all(
            torch.equal(each[end], torch.full((8,), 7.0).to(each))
            for each in guarded
            for end in (slice(8), slice(-8, None))
        )
        for i in range(rows):
            alone = [torch.empty(each.numel() // rows, dtype=each.dtype) for each in inside]
            own = [each[i].contiguous() for each in inputs]
            pointers = [ctypes.c_void_p(each.data_ptr()) for each in (*own, *alone)]
            self.row(*pointers)
            for each, found in zip(inside, alone, strict=True):
                assert torch.equal(each.view(rows, -1)[i].view(torch.uint8), found.view(torch.uint8))
        return tuple(each.view(shape) for each, shape in zip(inside, shapes, strict=True))


def as_program(
    network: FrozenMLP, inputs: Sequence[Tensor], folder: Path, options: Sequence[str]
) -> tuple[Tensor, ...]:
    """The results of a program of its own, which is compiled with the file: for what must not be loaded into Python."""
    network.to_c(folder / "network.c")
    results = as_tuple(network(*inputs))
    kind, rows = _TYPES[inputs[0].dtype], len(inputs[0])
    ends = [
        *((f"input{i}", each) for i, each in enumerate(inputs)),
        *((f"output{i}", each) for i, each in enumerate(results)),
    ]
    arrays = "\n".join(f"static {kind} {name}[{each.numel()}];" for name, each in ends)
    reads = "\n".join(
        f"    if (fread({name}, sizeof {name}, 1, stdin) != 1) return 1;" for name, _ in ends[: len(inputs)]
    )
    writes = "\n".join(
        f"    if (fwrite({name}, sizeof {name}, 1, stdout) != 1) return 1;" for name, _ in ends[len(inputs) :]
    )
    main = f"""#include <stdio.h>
#include "network.c"
{arrays}
int main(void) {{
{reads}
    network_batch({", ".join(name for name, _ in ends)}, {rows});
{writes}
    return 0;
}}
"""
    (folder / "main.c").write_text(main)
    run_compiler(*STRICT, *options, "-o", str(folder / "program"), str(folder / "main.c"))
    given = b"".join(each.contiguous().numpy().tobytes() for each in inputs)
    done = subprocess.run([str(folder / "program")], input=given, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    found = torch.frombuffer(bytearray(done.stdout), dtype=inputs[0].dtype)
    parts = found.split([each.numel() for each in results])
    return tuple(part.view(each.shape) for part, each in zip(parts, results, strict=True))

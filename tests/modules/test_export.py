"""Exported networks: standard operators only, which run where fastmlp is not."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmlp
from tests.support.axes import ACTIVATIONS
from tests.support.bounds import assert_within, network

# torch copies exported programs by a call that it deprecates itself.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")

WIDTH = 8


def every_activation() -> nn.Sequential:
    """A network with a layer for each activation, every second one without bias."""
    layers = [fastmlp.Linear(WIDTH, WIDTH, i % 2 == 0, activation=act) for i, act in enumerate(ACTIVATIONS)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    return fastmlp.Sequential(*layers).eval()


def assert_correct(output: Tensor, module: nn.Sequential, x: Tensor) -> None:
    layers = [layer for layer in module if isinstance(layer, fastmlp.Linear)]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    assert_within(output, network(x, weights, biases, ACTIVATIONS, torch.zeros(len(x), WIDTH)).output, "output")


def exported(module: nn.Module, strict: bool = False) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("rows")},)
    return torch.export.export(module, (torch.randn(6, WIDTH),), dynamic_shapes=shapes, strict=strict)


def calls(program: torch.export.ExportedProgram) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("strict", [False, True])
def test_standard_operators_only(strict: bool) -> None:
    module = every_activation()
    program = exported(module, strict)
    for found in (calls(program), calls(program.run_decompositions())):
        assert len(found) >= len(ACTIVATIONS)
        assert {target.namespace for target in found if isinstance(target, torch._ops.OpOverload)} == {"aten"}
        assert not [t for t in found if not isinstance(t, torch._ops.OpOverload) and "sym" not in str(t)]
    for rows in (2, 9):
        x = torch.randn(rows, WIDTH)
        assert_correct(program.module()(x), module, x)


@pytest.mark.parametrize("make", [lambda: fastmlp.Linear(WIDTH, 3), lambda: fastmlp.MLP(WIDTH, [5], 3, "gelu", "tanh")])
def test_the_program_is_that_of_native_modules(make: Callable[[], nn.Module]) -> None:
    module, x = make(), torch.randn(9, WIDTH)
    children = module.children() if isinstance(module, fastmlp.MLP) else [module]
    native = nn.Sequential(
        *[nn.Linear(c.in_features, c.out_features) if isinstance(c, nn.Linear) else c for c in children]
    )
    native.load_state_dict(dict(zip(native.state_dict(), module.state_dict().values(), strict=True)))
    ours, torchs = exported(module), exported(native)
    assert calls(ours) == calls(torchs)
    assert torch.equal(ours.module()(x), torchs.module()(x))


ELSEWHERE = """
import sys
import torch
sys.modules["fastmlp"] = None  # importing it fails
program = torch.export.load("program.pt2")
torch.save(program.module()(torch.load("input.pt")), "output.pt")
"""


def test_runs_without_fastmlp(tmp_path: Path) -> None:
    module, x = every_activation(), torch.randn(9, WIDTH)
    program = exported(module)
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save(x, tmp_path / "input.pt")
    command = [sys.executable, "-W", "error", "-c", ELSEWHERE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    output = torch.load(tmp_path / "output.pt")
    assert torch.equal(output, program.module()(x))
    assert_correct(output, module, x)


def test_onnx(tmp_path: Path) -> None:
    """Operators of ONNX itself, run by ONNX Runtime for batches of any size."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, path = every_activation(), tmp_path / "network.onnx"
    shapes = ({0: torch.export.Dim("rows")},)
    torch.onnx.export(module, (torch.randn(6, WIDTH),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows in (1, 6, 33):
        x = torch.randn(rows, WIDTH)
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_correct(torch.from_numpy(output), module, x)

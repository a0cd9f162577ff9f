"""Several processes: DistributedDataParallel, FSDP2 and tensor parallelism, each beside native modules.

As a script, started by torchrun, this file is the worker: it runs every case and prints what it found as JSON.
"""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastmlp
from fastmlp import reference

ROOT = Path(__file__).parents[2]

Wrap = Callable[[nn.Module], nn.Module]


class Branches(nn.Module):
    """Only one of two networks is called."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.used, self.unused = make(), make()

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.used(input)
        return output


def ours() -> nn.Module:
    return fastmlp.MLP(6, [8, 4], 2, "tanh").double()


def native() -> nn.Module:
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2)]
    return nn.Sequential(*layers).double()


def ddp(**options: Any) -> Wrap:
    return lambda module: DistributedDataParallel(module, **options)


def sharded(module: nn.Module, every_layer: bool) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for child in module if every_layer and isinstance(module, nn.Sequential) else []:
        if isinstance(child, nn.Linear):
            fully_shard(child, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


def parallel(module: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(module, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


#: How the network is wrapped, and whether its layers still run as one operation.
CASES: dict[str, tuple[Wrap, bool]] = {
    "ddp": (ddp(), True),
    "ddp, tiny buckets": (ddp(bucket_cap_mb=1e-4), True),
    "ddp, gradients as views": (ddp(gradient_as_bucket_view=True), True),
    "ddp, static graph": (ddp(static_graph=True), True),
    "ddp, unused parameters": (ddp(find_unused_parameters=True), True),
    "ddp, accumulated": (ddp(), True),
    "fsdp": (lambda module: sharded(module, every_layer=False), True),
    "fsdp of every layer": (lambda module: sharded(module, every_layer=True), True),
    "tensor parallel": (parallel, False),
}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """What two processes found, all cases in one start."""
    return json.loads(torchrun(Path(__file__)).splitlines()[-1])


def torchrun(script: Path) -> str:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([*launcher, str(script)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize("name", CASES)
def test_as_native(found: dict[str, dict[str, Any]], name: str) -> None:
    result = found[name]
    assert result["gradients"] == (12 if name == "ddp, unused parameters" else 6)
    # Losses and gradients below 1 in float64, that sums of some tens of terms have rounded.
    assert 0 < result["largest"] < 1
    assert result["difference"] <= 100 * torch.finfo(torch.float64).eps
    assert result["kernels"] == CASES[name][1]


def test_example() -> None:
    printed = torchrun(ROOT / "examples" / "distributed.py")
    assert "largest difference" in printed
    assert printed.count("process ") == 2


def gradients(name: str, module: nn.Module) -> list[Tensor | None]:
    """Those of the last of three backward passes, each of this process' own rows."""
    torch.manual_seed(1 if name == "tensor parallel" else dist.get_rank())
    for step in range(3):
        x = torch.randn(8, 6, dtype=torch.float64)
        if name == "ddp, accumulated" and step < 2 and isinstance(module, DistributedDataParallel):
            with module.no_sync():
                module(x).pow(2).mean().backward()
            continue
        if name != "ddp, accumulated":
            module.zero_grad()
        module(x).pow(2).mean().backward()
    found = [p.grad for p in module.parameters()]
    return [g.full_tensor() if isinstance(g, DTensor) else g for g in found]


def work() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    results = {}
    for name, (wrap, _) in CASES.items():
        torch.manual_seed(0)
        plain = [make() if "unused" not in name else Branches(make) for make in (ours, native)]
        plain[1].load_state_dict(copy.deepcopy(plain[0].state_dict()))
        with mock.patch.object(reference, "mlp", wraps=reference.mlp) as composed:
            pairs = list(zip(*[gradients(name, wrap(module)) for module in plain], strict=True))
        differences = [(a - b).abs().max().item() for a, b in pairs if a is not None and b is not None]
        assert [a is None for a, _ in pairs] == [b is None for _, b in pairs]
        results[name] = {
            "gradients": len(pairs),
            "difference": max(differences),
            "largest": max(b.abs().max().item() for _, b in pairs if b is not None),
            "kernels": not composed.called,
        }
    if dist.get_rank() == 0:
        print(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    work()

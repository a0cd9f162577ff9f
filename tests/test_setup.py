"""What FASTMLP_CUDA asks of the build, in a process without CUDA."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmlp import _C
from fastmlp._load import read_build

SETUP = Path(__file__).parent.parent / "setup.py"


def configure(choice: str) -> subprocess.CompletedProcess[str]:
    """setup.py as far as its choice of an extension: the name alone is asked for."""
    environment = {**os.environ, "FASTMLP_CUDA": choice}
    command = [sys.executable, str(SETUP), "--name"]
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


def test_devices_are_those_of_the_build() -> None:
    assert _C.devices() == (["cpu", "cuda"] if read_build()["cuda"] else ["cpu"])
    assert _C.device_obstacle("cpu") is None
    assert _C.device_obstacle("meta") == "there are no kernels for the device"


def test_cuda_tensors_name_the_rebuild() -> None:
    why = _C.device_obstacle("cuda")
    if read_build()["cuda"]:
        assert why is None
    else:
        assert why is not None
        assert "FASTMLP_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps ." in why

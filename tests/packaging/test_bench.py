"""`python -m fastmlp bench`, on the CPU; on a GPU `make gpu-test` runs it."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fastmlp
from fastmlp.__main__ import main
from fastmlp.benchmark import standard


def test_the_report_has_what_was_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standard, "SAMPLE_SECONDS", 1e-4)
    file = tmp_path / "report.json"
    assert main(["bench", "--network", "tutorial", "--quick", "--output", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["about"]["torch"] == torch.__version__
    assert [(row["network"], row["batch"], row["task"]) for row in report["rows"]] == [
        ("tutorial", 1, "inference"),
        ("tutorial", 1, "forward + backward"),
    ]
    assert all(row["eager"] > 0 and row["ours"] > 0 and row["eager_device"] is None for row in report["rows"])
    printed = capsys.readouterr().out
    assert "tutorial" in printed
    assert str(file.name) in printed.replace("\n", "")


def test_a_wrong_result_has_no_speed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastmlp, "convert", Shifted)
    assert main(["bench", "--network", "policy", "--quick"]) == 1
    assert "inference of policy at batch 1" in capsys.readouterr().err


class Shifted(nn.Sequential):
    """A network that is off by a little."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__(*model)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1e-3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda"]) == 1
    assert "The bench failed: device is cuda, and this PyTorch finds no GPU" in capsys.readouterr().err


def test_unknown_networks_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--network", "small"]) == 2
    assert "network must be one of tutorial, policy" in capsys.readouterr().err

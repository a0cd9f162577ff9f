"""`python -m fastmlp bench` and `check`, and `fastmlp.bench`, on the CPU; on a GPU `make gpu-test` runs the first."""

import copy
import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import commands
from fastmlp.__main__ import main
from fastmlp.benchmark import contest, standard
from fastmlp.benchmark import report as report_of


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


OWN = ["bench", "--widths", "5,8,2", "--activation", "tanh", "--batch", "1,16", "--threads", "1", "--no-peers"]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five samples of each contender are enough to see that they are taken."""
    monkeypatch.setattr(fastmlp, "bench", functools.partial(fastmlp.bench, seconds=1e-3))


@pytest.mark.usefixtures("short")
def test_one_s_own_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, picture, threads = tmp_path / "new" / "report.json", tmp_path / "bench.png", torch.get_num_threads()
    assert main([*OWN, "--output", str(report), "--picture", str(picture)]) == 0
    found = json.loads(report.read_text())
    assert {(row["task"], row["batch"]) for row in found["rows"]} == {
        (task, batch) for task in ("inference", "training step") for batch in (1, 16)
    }
    names = [row["contender"] for row in found["rows"] if (row["task"], row["batch"]) == ("training step", 16)]
    assert names == ["as it is", "convert", "fastmlp.optim", "TrainStep", "capture"]
    assert all(0 < row["low"] <= row["microseconds"] <= row["high"] for row in found["rows"])
    assert found["about"]["model"] == "5-8-2 tanh"
    assert {"processor", "python", "date", "threads", "torch"} <= found["about"].keys()
    assert found["about"]["threads"] == "1"
    assert torch.get_num_threads() == threads
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "training step, batch 16" in printed
    assert "without trace (inference): convert takes the model whole" in printed


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--output", "{file}/report.json"], 1, "The bench failed: "),
        (["--picture", "{file}/bench.png"], 1, "The bench failed: "),
        (["--picture", "{folder}/bench.xyz"], 1, "The bench failed: picture must end with one of "),
        (["--output", "{folder}"], 1, "The bench failed: "),
        (["--quick"], 2, "--widths measures a network of your own on the processor"),
        (["--device", "cuda"], 2, "--widths measures a network of your own on the processor"),
    ],
)
def test_what_cannot_be_is_said_before_measuring(
    options: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(fastmlp, "bench")
    file = tmp_path / "file"
    file.touch()
    assert main([*OWN, *(option.format(file=file, folder=tmp_path) for option in options)]) == status
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_options_of_one_s_own_network_need_its_widths(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--batch", "3"]) == 2
    assert capsys.readouterr().err == "--batch is of a network of your own: give its --widths too\n"


@pytest.mark.parametrize("widths", ["3", "3,0", "3,x", "3,,4", "-3,4"])
def test_wrong_widths(widths: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", f"--widths={widths}"])
    assert "argument --widths: must be 2 or more whole numbers" in capsys.readouterr().err


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"fastmlp {fastmlp.__version__}, torch {torch.__version__}\n"


class Odd(nn.Module):
    """A model that is no chain, with dropout and two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop, self.out = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(self.drop(torch.relu(self.fc(x))) + self.fc(y))


def test_a_model_of_any_class() -> None:
    model = Odd()
    state = copy.deepcopy(model.state_dict())
    inputs = torch.randn(6, 4), torch.randn(6, 4)
    random = torch.get_rng_state()
    report = fastmlp.bench(model, inputs, loss_fn=nn.CrossEntropyLoss(), peers=False, seconds=1e-3)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [(row.task, row.contender) for row in report.rows] == [
        *(("inference", name) for name in ("as it is", "convert", "trace", "frozen")),
        *(("training step", name) for name in ("as it is", "convert", "fastmlp.optim", "capture")),
    ]
    assert [(one.contender, one.reason) for one in report.refusals] == [("TrainStep", "a TrainStep has one input")]
    assert "a TrainStep has one input" in str(report)


def test_peers_take_part() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    report = fastmlp.bench(commands.network((3, 5, 2), "silu"), torch.randn(4, 3), seconds=1e-3)
    taken = {row.contender for row in report.rows}
    assert "onnxruntime" in taken
    left = {one.contender for one in report.refusals}
    assert taken | left >= {"onnxruntime", "openvino", "jax"}
    assert report.about["onnxruntime"]


def test_a_wrong_result_of_one_s_own_model_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastmlp, "convert", Shifted)
    with pytest.raises(contest.WrongResult, match="convert at batch 4, inference: its result is"):
        fastmlp.bench(commands.network((3, 5, 2)), torch.randn(4, 3), peers=False, seconds=1e-3)


def test_a_wrong_step_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(torch.optim.Adam):
        def __init__(self, parameters: Any, lr: float) -> None:
            super().__init__(parameters, lr=lr * 1.01)

    monkeypatch.setattr(fastmlp.optim, "Adam", Slow)
    with pytest.raises(contest.WrongResult, match=r"fastmlp\.optim at batch 4, training step"):
        fastmlp.bench(commands.network((3, 5, 2)), torch.randn(4, 3), peers=False, seconds=1e-3)


def test_a_noisy_machine_is_told() -> None:
    calm = contest.Row("inference", 1, "as it is", 10.0, 9.9, 10.1, 1.0, 0.02)
    about = {"model": "a", "dtype": "float32"}
    assert report_of.Report(about, (calm,), ()).warning is None
    noisy = replace(calm, contender="frozen", low=8.0, high=12.0, spread=0.4)
    warning = report_of.Report(about, (calm, noisy), ()).warning
    assert warning is not None
    assert "of 1 of 2 times" in warning
    assert "40% (frozen, inference, batch 1)" in warning


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b: b(nn.ReLU, torch.zeros(1)), TypeError, "model must be a torch.nn.Module, got class ReLU"),
        (lambda b: b(nn.ReLU(), [1.0]), TypeError, "input must be a torch.Tensor, got list"),
        (lambda b: b(nn.ReLU(), torch.zeros(1, device="meta")), ValueError, "input 0 is on meta, and bench measures"),
        (lambda b: b(nn.ReLU(), torch.zeros(1), optimizer=3), TypeError, "optimizer must be a class of torch.optim"),
        (
            lambda b: b(nn.ReLU(), torch.zeros(1), threads=0),
            ValueError,
            "threads must be None or a whole number",
        ),
        (lambda b: b(nn.ReLU(), torch.zeros(1), seconds=0), ValueError, "seconds must be a positive number, got int 0"),
        (lambda b: b(nn.LSTM(2, 2), torch.zeros(1, 2)), TypeError, "model must return a tensor, .*, got tuple"),
    ],
)
def test_wrong_arguments(call: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^fastmlp: {message}"):
        call(fastmlp.bench)


MODELS = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(10, 5), nn.LayerNorm(5), nn.Linear(5, 3)
    def forward(self, x):
        return self.out(torch.relu(self.norm(self.fc(x))))
def pair():
    return nn.Sequential(nn.Linear(10, 3)), torch.zeros(2, 10)
ready = nn.Linear(10, 3)
number = lambda: 3
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "models_to_check.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("models_to_check", None)


@pytest.mark.usefixtures("models")
def test_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "models_to_check:Net", "--input", "4,10", "--loss", "CrossEntropyLoss"]) == 0
    printed = capsys.readouterr().out
    assert "kept   norm: LayerNorm is neither a layer nor an activation" in printed
    assert "FrozenMLP(10 -> 3, graph of 2 networks, torch.float32)" in printed
    assert "norm (LayerNorm) cannot be part of a chain of layers" in printed
    assert "capture                     takes a training step" in printed
    assert main(["check", "models_to_check:Net"]) == 0
    assert "not tried: it needs examples" in capsys.readouterr().out
    for name in ("pair", "ready"):
        assert main(["check", f"models_to_check:{name}", "--optimizer", "SGD"]) == 0
        assert "takes it with MSELoss and SGD" in capsys.readouterr().out


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["models_to_check"], "model must be MODULE:FACTORY"),
        (["models_that_are_not:Net"], "No module named"),
        (["models_to_check:Nothing"], "module 'models_to_check' has no attribute 'Nothing'"),
        (["models_to_check:number"], "models_to_check:number must be a torch.nn.Module, or return one"),
        (["models_to_check:Net", "--loss", "Nothing"], "loss must be the name of a class of torch.nn, got 'Nothing'"),
    ],
)
def test_what_cannot_be_checked(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *options]) == 2
    assert capsys.readouterr().err.startswith(f"The check failed: {message}")

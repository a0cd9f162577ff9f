"""The demo, whose assertions must hold and must be able to fail, the command line, the tutorial."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import _C, __main__, fusion_report
from tests.support.rounding import distance, rounding_bounds

if TYPE_CHECKING:
    from fastmlp.demo.report import Result
    from fastmlp.demo.tasks import Task
    from fastmlp.demo.training import Contender, Race

ROOT = Path(fastmlp.__file__).parents[1]
PNG = b"\x89PNG\r\n\x1a\n"


def python(*arguments: str, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a new interpreter that finds the library that is tested."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, encoding="utf-8", timeout=600
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture
def demo() -> Iterator[Any]:
    for package in __main__.EXTRAS:
        pytest.importorskip(package)
    from fastmlp import demo

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the command line does: the networks are small
    yield demo
    torch.set_num_threads(threads)


@pytest.fixture
def training(demo: Any) -> Any:
    from fastmlp.demo import training

    return training


@pytest.fixture
def tasks(demo: Any) -> "list[Task]":
    return [*demo.regression_tasks(), *demo.digits_tasks()]


@pytest.mark.usefixtures("demo")
def test_demo(tmp_path: Path) -> None:
    done = python("-W", "error", "-m", "fastmlp", "demo", "--output", "made/here", cwd=tmp_path)
    assert (tmp_path / "made/here/demo.png").read_bytes().startswith(PNG)
    assert done.stderr == ""
    assert done.stdout.count(" captured") >= 5  # columns of both tables, the caption, the last line
    for text in (
        "fc1.weight  (50, 10)",
        "convert: fused  fc1 + relu + fc2",
        "digits, ReLU",
        "digits, Tanh",
        "1 thread",
    ):
        assert text in done.stdout
    for name in ("diabetes, SGD", "diabetes, Adam", "diabetes, convert"):
        assert done.stdout.count(f"\n{name} ") == 3  # tables
    assert done.stdout.splitlines()[-1].startswith("Proved: in 3240 float64 steps fastmlp equals PyTorch")
    assert "\x1b" not in done.stdout
    assert "…" not in done.stdout, "the table is too wide for 80 columns"


def test_the_converted_network_is_plain_and_fused(demo: Any, tasks: "list[Task]") -> None:
    model = tasks[2].fast()
    assert [type(layer) for layer in (model.fc1, model.fc2)] == [nn.Linear, nn.Linear]
    assert [(entry.names, entry.reason) for entry in fusion_report(model)] == [(("fc1", "relu", "fc2"), "")]


@pytest.mark.parametrize("index", range(6))
def test_the_captured_loop_is_the_loop(training: Any, tasks: "list[Task]", index: int) -> None:
    """The same bits in two losses, which are recorded, and in the next ones as near as rounding lets them be."""
    task = tasks[index]
    captured = training.Captured(task, torch.float32, 1, 0)
    batches = next(training.shuffled(task, torch.float32, 1, 0))

    def plain() -> dict[str, Tensor]:
        losses = training.Contender(task, task.native, torch.float32, 1, 0).steps(batches[:8])
        return {f"loss of step {i}": loss for i, loss in enumerate(losses)}

    expected, found = plain(), torch.stack(captured.steps(batches))
    assert torch.equal(found[:2], torch.stack([*expected.values()])[:2])
    bounds = rounding_bounds(plain, expected, steps=True)
    apart = [distance(found[i], loss) for i, loss in enumerate(expected.values())]
    assert [i for i, bound in enumerate(bounds.values()) if not apart[i] <= bound] == []
    assert captured.step.replays == len(batches) - 3  # the first two are recorded, and the last, which is shorter
    assert found.isfinite().all()


class Skewed(torch.autograd.Function):
    """The identity, with a gradient that is wrong in the tenth digit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 + 1e-10)


def wrong_output(x: Tensor) -> Tensor:
    return x * (1 + 1e-10)


def not_a_number(x: Tensor) -> Tensor:
    return x * torch.nan


def after(make: Callable[[], nn.Module], change: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """Makes the same network with changed outputs, in a module that keeps the names of the parameters."""

    def made() -> nn.Module:
        model = make()
        model.register_forward_hook(lambda module, args, output: change(output))
        return model

    return made


@pytest.mark.parametrize(
    ("change", "what"), [(wrong_output, "loss"), (Skewed.apply, "gradient of layer 1"), (not_a_number, "loss")]
)
@pytest.mark.parametrize("index", range(6))
def test_a_wrong_contender_is_found_out(
    demo: Any, tasks: "list[Task]", index: int, change: Callable[[Tensor], Tensor], what: str
) -> None:
    task = tasks[index]
    right = demo.compare(task, torch.float64, 1, 0, lambda: None)
    assert all(0 < part.share <= 1 for part in (right.loop, right.step))
    assert 0 <= right.frozen.share <= 1  # of few rows and columns, whose sums may come in the same order
    wrong = replace(task, fast=after(task.fast, change))
    with pytest.raises(demo.DemoFailure, match=rf"^{task.name}, step 1: {what} differs from PyTorch's by .* at most"):
        demo.compare(wrong, torch.float64, 1, 0, lambda: None)


@pytest.mark.parametrize(
    ("part", "what"),
    [("loss", "loss"), ("gradient", "gradient of layer 1"), ("parameter", "layer 1 after the step")],
)
@pytest.mark.parametrize("index", range(6))
def test_a_wrong_step_is_found_out(
    demo: Any, tasks: "list[Task]", index: int, part: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = fastmlp.TrainStep

    def wrong(model: nn.Module, loss_fn: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[..., Tensor]:
        step, first = right(model, loss_fn, optimizer), next(model.parameters())

        def spoiled(x: Tensor, y: Tensor) -> Tensor:
            loss = step(x, y)
            assert first.grad is not None
            with torch.no_grad():
                {"loss": loss, "gradient": first.grad, "parameter": first}[part].mul_(1 + 1e-10)
            return loss

        return spoiled

    monkeypatch.setattr(fastmlp, "TrainStep", wrong)
    with pytest.raises(
        demo.DemoFailure, match=rf"^{tasks[index].name}, TrainStep, step 1: {what} differs from .* at most"
    ):
        demo.compare(tasks[index], torch.float64, 1, 0, lambda: None)


def test_a_wrong_frozen_network_is_found_out(demo: Any, tasks: "list[Task]", monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastmlp.freeze

    class Wrong:
        def __init__(self, model: nn.Module) -> None:
            self.frozen = right(model)
            self.refresh = self.frozen.refresh

        def __call__(self, x: Tensor) -> Tensor:
            return self.frozen(x) * (1 + 1e-10)

    monkeypatch.setattr(fastmlp, "freeze", Wrong)
    with pytest.raises(demo.DemoFailure, match=r"^digits, Tanh, frozen, epoch 1: output differs from .* at most"):
        demo.compare(tasks[4], torch.float64, 1, 0, lambda: None)


def test_a_wrong_start_is_found_out(demo: Any, tasks: "list[Task]") -> None:
    def other_seed() -> nn.Module:
        torch.manual_seed(123)
        return tasks[0].fast()

    wrong = replace(tasks[0], fast=other_seed)
    with pytest.raises(demo.DemoFailure, match=r"diabetes, SGD: fc1.weight differs before training"):
        demo.race(wrong, 1, 0, lambda: None)


def test_float32_differences_are_shown_and_not_asserted(demo: Any, tasks: "list[Task]") -> None:
    found = demo.compare(tasks[3], torch.float32, 1, 0, lambda: None)
    assert found.steps == 43
    assert 0 < found.loop.difference < 1e-5
    assert 0 < found.step.difference < 1e-5
    assert 0 <= found.frozen.difference < 1e-4
    assert found.loop.share == found.step.share == found.frozen.share == 0


def test_a_network_that_did_not_learn_is_found_out(demo: Any, training: Any, tasks: "list[Task]") -> None:
    race: Race = demo.race(tasks[5], 1, 0, lambda: None)
    result: Result = demo.Result(tasks[5], training.Agreement(), training.Agreement(), race)
    with pytest.raises(demo.DemoFailure, match=r"digits, Sigmoid: PyTorch reads \d+\.\d% of the held-out digits"):
        demo.assert_accuracy([result])


def test_bounds_hold_on_every_instruction_set(demo: Any, tasks: "list[Task]", isa: str) -> None:
    for task in tasks:
        demo.compare(task, torch.float64, 1, 1, lambda: None)


def with_float32s_roundoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its errors float64 can see."""
    monkeypatch.setattr("fastmlp.demo.bounds.gamma", lambda n: n * 2.0**-24 / (1 - n * 2.0**-24))


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("make", ["native", "fast"])
def test_bounds_hold_against_true_errors(
    training: Any, tasks: "list[Task]", index: int, make: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tasks[index]
    single = training.Contender(task, getattr(task, make), torch.float32, 1, 0)
    double = training.Contender(task, task.native, torch.float64, 1, 0)
    # Rounded to float32 first, so that both see the same batch; the parameters were made in float32.
    x, y = training.cast(next(training.shuffled(task, torch.float32, 1, 0))[0], torch.float64)
    with_float32s_roundoff(monkeypatch)
    bounds = training.rounding_bounds(task.activation, double.layers(), x, y)
    rounded = single.loss_and_gradients(*training.cast((x, y), torch.float32))
    errors = training.named(training.distances(double.loss_and_gradients(x, y), rounded))
    share = training.assert_within(errors, bounds, task.name)
    # assert_within allows twice the bound, for two contenders; here one of them is as good as exact.
    assert 1e-4 < share <= 0.5


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("make", ["native", "TrainStep"])
def test_bounds_of_updates_hold_against_true_errors(
    training: Any, tasks: "list[Task]", index: int, make: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tasks[index]
    single: Contender
    if make == "native":
        single = training.Contender(task, task.native, torch.float32, 1, 0)
    else:
        single = training.Stepped(task, torch.float32, 1, 0)
    exact = training.Stepped(task, torch.float64, 1, 0)  # in which "start_from" is all that is used
    (group,) = exact.optimizer.param_groups
    with_float32s_roundoff(monkeypatch)
    shares = []
    for step, batch in enumerate(next(training.shuffled(task, torch.float32, 1, 0))[:8], 1):
        exact.start_from(single)
        before, state = exact.layers(), exact.state()
        x, y = training.cast(batch, torch.float64)
        single.steps([batch])
        _, *gradients = exact.loss_and_gradients(x, y)
        exact.optimizer.step()
        _, *errors = training.rounding_bounds(task.activation, before, x, y)
        updates = zip(before, gradients, errors, state, strict=True)
        bounds = [training.update_bounds(group, step, *update) for update in updates]
        found = dict(enumerate(training.distances(single.layers(), exact.layers())))
        shares.append(training.assert_within(found, bounds, f"{task.name}, step {step}"))
    assert 1e-4 < max(shares) <= 1


@pytest.mark.parametrize("index", range(6))
def test_bounds_of_outputs_hold_against_true_errors(
    training: Any, tasks: "list[Task]", index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tasks[index]
    exact = training.Contender(task, task.native, torch.float64, 1, 0)
    x, _ = training.cast(training.cast(task.held_out, torch.float32), torch.float64)
    frozen = fastmlp.freeze(training.Contender(task, task.native, torch.float32, 1, 0).model)
    with_float32s_roundoff(monkeypatch)
    bounds = [training.output_bounds(task.activation, exact.layers(), x)]
    with torch.no_grad():
        errors = {"output": (frozen(x.float()) - exact.model(x)).abs()}
    assert 1e-4 < training.assert_within(errors, bounds, task.name) <= 0.5


def test_info(tmp_path: Path) -> None:
    # Without the extras, which the library must not import by itself.
    done = python("-c", blocking(*__main__.EXTRAS, then="main(['info'])"), cwd=tmp_path)
    assert f"isa {_C.get_isa()}" in done.stdout
    assert python("-m", "fastmlp", "info", cwd=tmp_path).stdout.startswith("fastmlp ")


def blocking(*packages: str, then: str) -> str:
    """Code for an interpreter in which the packages cannot be imported."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({packages!r}))"
    return f"{blocked}; from fastmlp.__main__ import main; sys.exit({then})"


@pytest.mark.parametrize("package", __main__.EXTRAS)
@pytest.mark.usefixtures("demo")
def test_missing_extra(package: str, tmp_path: Path) -> None:
    done = python("-c", blocking(package, then="main(['demo'])"), cwd=tmp_path, status=1)
    name = __main__.EXTRAS[package]
    assert done.stderr == f"The demo needs {name}, which is missing: pip install 'fastmlp[demo]'\n"
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_no_command_is_a_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([]) == 2
    printed = capsys.readouterr().out
    assert "info" in printed
    assert "demo" in printed


@pytest.mark.parametrize(
    "options",
    ["--epochs 0", "--epochs -1", "--epochs x", "--seed -1", f"--seed {2**63}", "--threads 0", "--threads 99999"],
)
def test_wrong_options(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["demo", *options.split()])
    assert stopped.value.code == 2
    assert f"argument {options.split()[0]}" in capsys.readouterr().err


@pytest.mark.usefixtures("demo")
def test_failures_of_the_demo_are_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = python("-m", "fastmlp", "demo", "--output", "file", cwd=tmp_path, status=1)
    assert done.stderr.startswith("The demo failed: ")
    assert done.stderr.count("\n") == 1


def test_tutorial(tmp_path: Path) -> None:
    script = ROOT / "examples" / "tutorial.py"
    if not script.exists():
        pytest.skip("the examples are not beside an installed library")
    done = python("-W", "error", str(script), cwd=tmp_path)
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if "held-out loss" in line]
    untrained, *sgd_and_adam = losses
    assert len(sgd_and_adam) == 6
    assert max(sgd_and_adam[2], sgd_and_adam[5]) < untrained / 4

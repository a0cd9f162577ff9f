"""What `capture` promises of arguments, results, memory, gradients and objects."""

import copy
import pickle
import threading
import warnings
from collections import namedtuple
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmlp
from fastmlp.tape.trace import CaptureError
from tests.support.rounding import distance, rounding_bounds

Pair = namedtuple("Pair", ["mean", "scaled"])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def training_step(model: nn.Module, **options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step


def batch(seed: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator), torch.randn(rows, 2, generator=generator)


def test_two_calls_are_recorded_and_the_third_is_a_replay() -> None:
    step = fastmlp.capture(training_step(network()))
    counts = []
    for i in range(4):
        step(*batch(i))
        counts.append((step.calls, step.replays))
    assert counts == [(1, 0), (2, 0), (3, 1), (4, 2)]


def test_results_are_new_tensors() -> None:
    model = network()
    call = fastmlp.capture(lambda x: (model(x), model(x).sum()), fuse=False)
    with torch.no_grad():
        kept = [call(batch(i)[0]) for i in range(6)]
        for i, (output, total) in enumerate(kept):
            expected = model(batch(i)[0])
            assert torch.equal(output, expected)
            assert torch.equal(total, expected.sum())
    assert call.replays == 4


def test_containers_come_back_as_they_were() -> None:
    def function(data: dict[str, Any], *, scale: float) -> Any:
        x, (y, z) = data["x"], data["rest"]
        return {"pair": Pair((x + y).mean(), x * scale), "list": [z, None, (x - y, "text", 3)], "z": z}

    captured = fastmlp.capture(function, fuse=False)
    for i in range(5):
        x, y = torch.randn(3) + i, torch.randn(3)
        data: dict[str, Any] = {"x": x, "rest": [y, torch.ones(2) * i]}
        expected: Any = function(data, scale=2.0)
        found: Any = captured(data, scale=2.0)
        assert type(found["pair"]) is Pair
        assert torch.equal(found["pair"].mean, expected["pair"].mean)
        assert torch.equal(found["pair"].scaled, expected["pair"].scaled)
        assert found["list"][0] is data["rest"][1]
        assert found["z"] is found["list"][0]
        assert torch.equal(found["list"][2][0], x - y)
        assert found["list"][1:2] + list(found["list"][2][1:]) == [None, "text", 3]
    assert captured.replays == 3


def test_each_shape_and_each_value_has_a_tape() -> None:
    model = network()
    call = fastmlp.capture(lambda x, scale=1.0: model(x) * scale, fuse=False)
    with torch.no_grad():
        for i in range(4):
            for rows in (2, 5):
                for scale in (1.0, -1.0):
                    x, _ = batch(i, rows)
                    assert torch.equal(call(x, scale=scale), model(x) * scale)
    assert len(call.report().tapes) == 4
    assert call.replays == 8


@pytest.mark.parametrize("context", ["grad", "no_grad", "inference_mode", "autocast"])
def test_modes_of_torch(context: str) -> None:
    model = network()
    contexts: dict[str, Callable[[], Any]] = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    call = fastmlp.capture(model, fuse=False)
    with contexts[context]():
        for i in range(5):
            expected, found = model(batch(i)[0]), call(batch(i)[0])
            assert torch.equal(found, expected)
            assert found.dtype == expected.dtype
            assert found.requires_grad == expected.requires_grad
            assert found.is_inference() == expected.is_inference()
        with torch.no_grad():
            call(batch(0)[0])
    assert call.replays == 3 + (context in ("no_grad", "inference_mode"))


def test_backward_of_a_result_says_where_its_graph_ends() -> None:
    model = network()
    call = fastmlp.capture(model)
    for i in range(3):
        output = call(batch(i)[0])
    with pytest.raises(RuntimeError, match=r"fastmlp: capture: backward\(\) reached a result of a captured function"):
        output.sum().backward()


def test_gradients_that_add_up() -> None:
    """Without zero_grad(): the first call finds none, later ones add."""
    eager, twin = network(), network()

    def backward(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss.detach()

    captured = fastmlp.capture(lambda x, y: backward(twin, x, y), fuse=False)
    for i in range(20):
        assert torch.equal(captured(*batch(i)), backward(eager, *batch(i)))
        for a, b in zip(eager.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
        if i % 5 == 4:
            # Then a call begins with none again, which is another recording.
            eager.zero_grad()
            twin.zero_grad()
    assert captured.replays > 8
    assert len(captured.report().tapes) == 2


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_zero_grad(to_none: bool, inside: bool) -> None:
    def run(capture: bool) -> list[Tensor]:
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

        def step(x: Tensor, y: Tensor) -> Tensor:
            if inside:
                optimizer.zero_grad(set_to_none=to_none)
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        function = fastmlp.capture(step, fuse=False) if capture else step
        losses = []
        for i in range(8):
            if not inside:
                optimizer.zero_grad(set_to_none=to_none)
            losses.append(function(*batch(i)).detach())
        if isinstance(function, fastmlp.Captured):
            assert function.replays >= 5
        return [*losses, *(p.detach() for p in model.parameters()), *(p.grad for p in model.parameters())]  # type: ignore[list-item]

    assert all(map(torch.equal, run(False), run(True)))


def test_methods_have_recordings_of_their_own() -> None:
    class Scaled:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        @fastmlp.capture
        def __call__(self, x: Tensor) -> Tensor:
            return x * self.factor

        @fastmlp.capture(fuse=False)
        def shifted(self, x: Tensor) -> Tensor:
            return x + self.factor

    two, three = Scaled(2.0), Scaled(3.0)
    x = torch.ones(3)
    for _ in range(4):
        assert torch.equal(two.shifted(x), x + 2)
        assert torch.equal(three.shifted(x), x + 3)
    assert (two.shifted.replays, three.shifted.replays) == (2, 2)
    two.factor = 5.0
    assert torch.equal(two.shifted(x), x + 5)


def test_a_captured_function_within_another_is_part_of_it() -> None:
    inner = fastmlp.capture(lambda x: x * 2)
    outer = fastmlp.capture(lambda x: inner(x) + 1)
    for i in range(4):
        assert torch.equal(outer(torch.full((2,), float(i))), torch.full((2,), 2.0 * i + 1))
    assert (outer.replays, inner.replays) == (2, 0)


def test_copies_and_pickles_have_no_recordings() -> None:
    call = fastmlp.capture(F.relu)
    for _ in range(3):
        call(torch.ones(2))
    assert copy.deepcopy(call).calls == 0
    assert pickle.loads(pickle.dumps(call)).calls == 0
    call.reset()
    assert (call.calls, call.replays, call.report().tapes) == (0, 0, [])
    assert repr(call) == "captured(relu): 0 tapes, 0 of 0 calls replayed"


def test_threads_replay_one_function_one_after_the_other() -> None:
    model = network()
    call = fastmlp.capture(model, fuse=False)
    wrong: list[int] = []

    def work(seed: int) -> None:
        with torch.no_grad():
            for i in range(200):
                x, _ = batch(seed * 1000 + i)
                if not torch.equal(call(x), model(x)):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert call.replays > 700


def test_otherwise_eager_warns_once_and_does_the_work_once() -> None:
    counter = torch.zeros(())

    def function(x: Tensor) -> float:
        counter.add_(1)
        return x.sum().item()

    call = fastmlp.capture(function, otherwise="eager")
    with pytest.warns(RuntimeWarning, match="an element of a tensor is read by Python"):
        assert call(torch.ones(3)) == 3.0
    for i in range(4):
        assert call(torch.full((3,), float(i))) == 3.0 * i
    assert counter.item() == 5
    assert call.replays == 0


def test_a_report_names_operations_and_memory() -> None:
    step = fastmlp.capture(training_step(network()))
    for i in range(3):
        step(*batch(i))
    (tape,) = step.report().tapes
    assert tape.operations["aten::addmm"] == 2
    assert tape.optimizers == [("SGD", "fastmlp")]
    assert tape.arena_bytes > 0
    assert "SGD.step() by fastmlp" in str(step.report())
    assert "addmm 2" in str(step.report())


def test_a_report_tells_times_of_replays_that_were_measured() -> None:
    step = fastmlp.capture(training_step(network()))
    for i in range(2 + 8):
        step(*batch(i))
    assert step.report(profile=True).tapes[0].times == ()
    assert "time: not known yet" in str(step.report(profile=True))
    step(*batch(10))
    assert step.report().tapes[0].times is None
    times = step.report(profile=True).tapes[0].times or ()
    assert {"product", "SGD.step()"} <= {time.name for time in times}
    assert all(time.microseconds > 0 for time in times)
    # Each at its line of the training step, in the order in which a replay computes them.
    lines = [int(time.place.rsplit(":", 1)[1]) for time in times]
    assert lines[0] < lines[-1]
    assert times[-1].name == "SGD.step()"
    shown = str(step.report(profile=True)).splitlines()
    (line,) = (line for line in shown if "us in the steps of a replay" in line)
    assert {"product", "SGD.step()"} <= {share.rsplit(" ", 1)[0] for share in line.split(": ")[2].split(", ")}
    assert any("product, " in line and __file__ in line for line in shown)
    for i in range(640):
        step(*batch(i))
    later = step.report(profile=True).tapes[0].times or ()
    # The least ones that were seen.
    assert [time.name for time in later] == [time.name for time in times]
    assert all(now.microseconds <= before.microseconds for now, before in zip(later, times, strict=True))


def expanded_constant(x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(leaf.sum(), leaf)
    return slope


def normalised_copies(x: Tensor) -> Tensor:
    return F.batch_norm(x[:1].expand(4, 3), None, None, training=True)


#: What came out otherwise, or not at all, when it was replayed.
REPLAYED: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient of a sum": expanded_constant,
    "expanded constant": lambda x: torch.ones(1, 3).expand(4, 3),
    "batch norm of an expanded row": normalised_copies,
    "mean of nothing": lambda x: x[:0].mean(),
    "means of no columns": lambda x: x[:, :0].mean(1),
    "loss of nothing": lambda x: F.mse_loss(x[:0], x[:0]),
    "expanded tensor set to zero": lambda x: x[:1].clone().expand(4, 3).zero_().sum(),
}


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", REPLAYED)
def test_expanded_and_empty_tensors(name: str, fuse: bool) -> None:
    function = REPLAYED[name]
    captured = fastmlp.capture(function, fuse=fuse)
    for i in range(5):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(i))
        now, expected = captured(x), function(x)
        assert now.shape == expected.shape
        assert torch.equal(now.nan_to_num(7), expected.nan_to_num(7))
    assert captured.replays == 3


t = torch.ones(3)


def test_a_method_named_like_a_variable_of_the_file() -> None:
    """An argument that is such a variable, too, may be another tensor at each call."""
    global t
    captured = fastmlp.capture(lambda a, b: a @ torch.eye(3).t() + b)
    for i in range(5):
        t = torch.full((3,), float(i))
        assert torch.equal(captured(torch.ones(2, 3), t), torch.ones(2, 3) + t)
    assert captured.replays == 3


class Counted:
    """Has no dictionary of its own."""

    __slots__ = ("scale",)

    @fastmlp.capture
    def slotted(self, x: Tensor) -> Tensor:
        return x

    @classmethod
    @fastmlp.capture
    def of_class(cls, x: Tensor) -> Tensor:
        return x * 2


def test_methods_of_classes_and_of_objects_with_slots() -> None:
    for i in range(4):
        assert torch.equal(Counted.of_class(torch.ones(3) * i), torch.ones(3) * 2 * i)
    assert Counted.of_class.replays == 2
    with pytest.raises(TypeError, match=r"fastmlp: capture: Counted.slotted: objects of Counted have __slots__"):
        Counted().slotted(torch.ones(3))


def test_more_kinds_of_calls_than_are_kept_are_told_of() -> None:
    step = fastmlp.capture(lambda x: x + 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(63):
            for _ in range(3):
                step(torch.ones(i + 1))
        assert not caught
        for _ in range(4):
            step(torch.ones(64))
    (warning,) = caught
    assert "64 tapes were made, and 32 are kept" in str(warning.message)
    assert warning.filename == __file__


def test_arguments_of_capture() -> None:
    with pytest.raises(TypeError, match="fastmlp: capture: function must be callable, got int 3"):
        fastmlp.capture(3)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="fastmlp: capture: otherwise must be None or 'eager', got str 'raise'"):
        fastmlp.capture(F.relu, otherwise="raise")
    assert issubclass(CaptureError, RuntimeError)


def test_nothing_that_somebody_holds_is_written_again() -> None:
    """Neither results, nor gradients, nor views of gradients."""
    model = network()
    step = fastmlp.capture(training_step(model))
    kept: list[tuple[Tensor, Tensor]] = []
    for i in range(8):
        loss = step(*batch(i))
        first, last = model[0].weight.grad, model[2].bias.grad[:1]  # type: ignore[index]
        kept += [(held, held.detach().clone()) for held in (loss, first, last)]
    assert all(torch.equal(held, copied) for held, copied in kept)
    assert step.replays == 6


def test_layers_of_ours_are_one_operation_with_their_own_bits() -> None:
    eager, twin = network(), network()
    layers = [fastmlp.convert(model) for model in (eager, twin)]
    steps = [training_step(layer) for layer in layers]
    captured = fastmlp.capture(steps[1], fuse=False)
    for i in range(6):
        assert torch.equal(steps[0](*batch(i)), captured(*batch(i)))
    (tape,) = captured.report().tapes
    assert {name for name in tape.operations if name.startswith("fastmlp::")} == {
        "fastmlp::forward",
        "fastmlp::backward",
    }


def test_a_variant_that_is_wrong_is_not_called() -> None:
    """PyTorch 2.13's `native_batch_norm.out` is, for an input that is transposed."""
    call = fastmlp.capture(lambda x: F.batch_norm(x.t().contiguous().t(), None, None, training=True))
    for i in range(4):
        x = batch(i)[0].double()
        assert torch.equal(call(x), F.batch_norm(x.t().contiguous().t(), None, None, training=True))


@pytest.mark.usefixtures("validated")
def test_checks_of_distributions_are_made_at_replays() -> None:
    call = fastmlp.capture(lambda mean, scale: torch.distributions.Normal(mean, scale).rsample())
    for i in range(4):
        torch.manual_seed(i)
        found = call(torch.zeros(3), torch.ones(3))
        torch.manual_seed(i)
        assert torch.equal(found, torch.distributions.Normal(torch.zeros(3), torch.ones(3)).rsample())
    with pytest.raises(ValueError, match=r"fastmlp: capture: a check of torch.s, called in .*test_capture\.py"):
        call(torch.zeros(3), -torch.ones(3))


@pytest.mark.parametrize("held", [True, False])
def test_gradients_that_the_function_sets_itself(held: bool) -> None:
    """It reads what autograd has left in `.grad`, which is None in every second call."""

    def run(capture: bool) -> list[Tensor]:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def backward(x: Tensor, y: Tensor) -> None:
            F.l1_loss(model(x), y).backward()
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad = parameter.grad.flip(0) * 0.5

        function = fastmlp.capture(backward, fuse=False) if capture else backward
        left = []
        for i in range(14):
            if i % 2 == 0:
                optimizer.zero_grad()
            function(*batch(i))
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            left += grads if held else [grad.clone() for grad in grads]
            if i % 2:
                optimizer.step()
        if isinstance(function, fastmlp.Captured):
            assert len(function.report().tapes) == 2
        return left

    assert all(map(torch.equal, run(False), run(True)))


def test_zero_grad_reaches_gradients_that_others_have_made() -> None:
    """Each head gets gradients in its own calls, and `zero_grad()` clears those of both."""

    def run(capture: bool) -> list[Tensor]:
        torch.manual_seed(0)
        heads = nn.ModuleDict({"a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})
        optimizer = torch.optim.SGD(heads.parameters(), lr=0.1)

        def step(x: Tensor, task: str) -> None:
            optimizer.zero_grad()
            heads[task](x).square().mean().backward()
            optimizer.step()

        function = fastmlp.capture(step, fuse=False) if capture else step
        left = []
        for i in range(24):
            function(batch(i)[0], "ab"[i // 3 % 2])
            left += [p.detach().clone() for p in heads.parameters()]
            left += [torch.tensor(p.grad is None) for p in heads.parameters()]
        if isinstance(function, fastmlp.Captured):
            assert function.replays >= 12
        return left

    assert all(map(torch.equal, run(False), run(True)))


@pytest.mark.parametrize(
    ("function", "good", "bad"),
    [
        (lambda x: (torch._assert_async(x.isfinite().all()), x * 2)[1], torch.ones(2), torch.full((2,), torch.nan)),
        (torch.linalg.cholesky, torch.eye(2), -torch.eye(2)),
        (torch.linalg.inv, torch.eye(2), torch.zeros(2, 2)),
    ],
    ids=["assert", "cholesky", "inverse"],
)
def test_errors_of_operators_are_raised_by_replays_too(
    function: Callable[[Tensor], Tensor], good: Tensor, bad: Tensor
) -> None:
    call = fastmlp.capture(function)
    for _ in range(4):
        assert torch.equal(call(good), function(good))
    assert call.replays == 2
    with pytest.raises(RuntimeError) as expected:
        function(bad)
    with pytest.raises(type(expected.value)):
        call(bad)


def test_factories_that_read_tensors_read_them_at_each_call() -> None:
    call = fastmlp.capture(lambda first, last: torch.linspace(first, last, 5) * (1 + 2j))
    for i in range(5):
        first, last = torch.tensor(0.0), torch.tensor(float(i))
        assert torch.equal(call(first, last), torch.linspace(first, last, 5) * (1 + 2j))
    assert call.replays == 3


def test_a_step_within_backward_is_refused_and_nothing_stays_behind() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hook = model.weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    call = fastmlp.capture(lambda x: model(x).sum().backward())
    with pytest.raises(CaptureError, match=r"optimizer\.step\(\) is called within backward\(\), by a hook"):
        call(torch.ones(1, 2))
    hook.remove()
    assert torch.ones(()).item() == 1.0
    for _ in range(4):
        call(torch.ones(1, 2))
    assert call.replays > 0


def test_a_recording_is_not_replayed_where_another_function_is_recorded() -> None:
    inner = fastmlp.capture(lambda x: x * 2)
    for _ in range(4):
        inner(torch.ones(2))
    outer = fastmlp.capture(lambda x: inner(x) + 1)
    for i in range(4):
        assert torch.equal(outer(torch.full((2,), float(i))), torch.full((2,), 2.0 * i + 1))
    assert outer.replays == 2


def test_views_in_another_dtype_and_draws_of_numpy_are_refused() -> None:
    with pytest.raises(CaptureError, match="a result is a view, in another dtype"):
        fastmlp.capture(lambda x: x.view(torch.int32))(torch.ones(2))
    with pytest.raises(CaptureError, match=r"numpy\.random has drawn"):
        fastmlp.capture(lambda x: x * 2 if np.random.rand() < 2 else x)(torch.ones(2))  # noqa: NPY002


def result_of(function: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    return {"result": function(x)}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.rsub(x, 2, alpha=3),
        lambda x: torch.rsub(x, x * 2, alpha=3),
        lambda x: torch.ops.aten.add.Scalar(x, 2, 3),
        lambda x: torch.add(x, 2, alpha=3),
        lambda x: x.mean(dtype=torch.float64),
        lambda x: F.huber_loss(x, x * 3, reduction="sum", delta=0.5),
        lambda x: F.mse_loss(x.repeat(9, 9).t(), (x * 3).repeat(9, 9).t()),
    ],
    ids=["rsub scalar", "rsub tensor", "add scalar", "add", "mean of a dtype", "huber", "squares of columns"],
)
def test_operators_that_torch_computes_by_others(function: Callable[[Tensor], Tensor]) -> None:
    """With the same bits, or with kernels of ours, which sum in another order, within what rounding explains."""
    exact, fused = fastmlp.capture(function, fuse=False), fastmlp.capture(function)
    for i in range(4):
        x, _ = batch(i)
        found, near, expected = exact(x), fused(x), function(x)
        assert torch.equal(found, expected)
        assert found.dtype == near.dtype == expected.dtype
        results = partial(result_of, function, x)
        assert distance(near, expected) <= rounding_bounds(results, results(), steps=True)["result"]
    assert exact.replays == fused.replays == 2


def test_a_report_counts_what_a_replay_calls() -> None:
    """Of lists of tensors that is an operator for each, of which none is more than the tape has."""
    step = fastmlp.capture(lambda tensors: torch._foreach_norm(tensors), fuse=False)
    for i in range(3):
        step(list(batch(i)))
    (tape,) = step.report().tapes
    assert tape.operations == {"aten::_foreach_norm": 1}
    assert tape.calls == 2
    assert 0 <= tape.direct_calls <= tape.calls
    assert str(step.report()).splitlines()[0] == repr(step)

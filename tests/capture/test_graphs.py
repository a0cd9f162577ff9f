"""Captured functions on a GPU: which calls become a CUDA graph, and what is done around it. No GPU is needed here.

The recordings are of the CPU, and say that they are of a GPU. In place of a CUDA graph stands one that puts everything
back after it is captured, as no kernel has run then, and calls the function at each replay, into the same results.
"""

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastmlp
from fastmlp.tape import graphable, graphs
from fastmlp.tape.trace import Check, GradSet, Memory, Operation, OptimizerStep, Ref, Trace, Value, difference


class Program:
    """A network and its optimizer."""

    def __init__(self, zero: bool = True, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), **({"lr": 0.1, "momentum": 0.9} | options))
        self.zero = zero

    def step(self, x: Tensor, y: Tensor) -> Any:
        if self.zero:
            self.optimizer.zero_grad()
        output = self.model(x)
        loss = F.mse_loss(output, y)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss, "output": output.detach(), "input": x}

    def state(self) -> list[Tensor]:
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*self.model.state_dict().values(), *(value for value in states if isinstance(value, Tensor))]

    def all(self) -> list[Tensor | None]:
        return [*self.state(), *(parameter.grad for parameter in self.model.parameters())]


class FakeGraph:
    """Takes the place of `graphs.captured` for a program."""

    made = 0

    def __init__(self, program: Program) -> None:
        self.program = program

    def __call__(self, function: Any, args: Any, kwargs: Any, generators: Any) -> tuple[Any, Any]:
        type(self).made += 1
        self.call = lambda: function(*args, **kwargs)
        leaves = list(self.program.model.parameters())
        with torch.no_grad():
            before = [(tensor, tensor.clone()) for tensor in self.program.state()]
            grads = [None if leaf.grad is None else leaf.grad.clone() for leaf in leaves]
        random = torch.get_rng_state()
        result = self.call()
        torch.set_rng_state(random)
        self.tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t not in set(args)]
        self.grads = [leaf.grad for leaf in leaves]
        with torch.no_grad():
            for tensor, was in before:
                tensor.copy_(was)
            for grad, start in zip(self.grads, grads, strict=True):
                if grad is not None:
                    grad.copy_(start if start is not None else torch.full_like(grad, float("nan")))
            for tensor in self.tensors:
                tensor.detach().fill_(float("nan"))
        return self, result

    def replay(self) -> None:
        leaves = list(self.program.model.parameters())
        with torch.enable_grad():
            tensors = [t for t in tree_leaves(self.call()) if isinstance(t, Tensor)]
        for own, now in zip(self.tensors, tensors, strict=False):
            own.detach().copy_(now.detach())
        for leaf, grad in zip(leaves, self.grads, strict=True):
            if grad is not None and leaf.grad is not None and leaf.grad is not grad:
                grad.copy_(leaf.grad)
                leaf.grad = grad


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Program], Any]:
    """Captures a program's step as on a GPU."""
    FakeGraph.made = 0
    monkeypatch.setattr(graphable, "is_of_gpu", lambda trace: True)

    def capture(program: Program, **options: Any) -> Any:
        monkeypatch.setattr(graphs, "captured", lambda *given: FakeGraph(program)(*given))
        return fastmlp.capture(program.step, **options)

    return capture


def batch(i: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    return torch.randn(rows, 4, generator=generator), torch.randn(rows, 2, generator=generator)


def check_call(eager: Program, twin: Program, step: Any, i: int, rows: int = 6) -> None:
    torch.manual_seed(i)
    expected = eager.step(*batch(i, rows))
    torch.manual_seed(i)
    found = step(*batch(i, rows))
    assert torch.equal(found["loss"], expected["loss"])
    assert torch.equal(found["output"], expected["output"])
    for a, b in zip(eager.all(), twin.all(), strict=True):
        assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def test_the_third_call_makes_a_graph(on_a_gpu: Any) -> None:
    eager, twin = Program(), Program()
    step = on_a_gpu(twin)
    counts = []
    for i in range(6):
        check_call(eager, twin, step, i)
        counts.append((FakeGraph.made, step.calls, step.replays))
    assert counts == [(0, 1, 0), (0, 2, 0), (1, 3, 1), (1, 4, 2), (1, 5, 3), (1, 6, 4)]
    (tape,) = step.report().tapes
    assert tape.operations["aten::addmm"] == 2
    assert tape.optimizers == [("SGD", "torch")]
    assert repr(step) == "captured(Program.step): 1 tape, 4 of 6 calls replayed"
    step.reset()
    assert (step.calls, step.report().tapes) == (0, [])


def test_on_the_cpu_there_is_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "captured", None)
    program = Program()
    step = fastmlp.capture(program.step)
    for i in range(4):
        step(*batch(i))
    assert step.replays == 2


def test_results_of_a_graph(on_a_gpu: Any) -> None:
    program = Program()
    step = on_a_gpu(program)
    results = []
    for i in range(5):
        x, y = batch(i)
        results.append(step(x, y))
        assert results[-1]["input"] is x
    kept = [result["output"].clone() for result in results]
    step(*batch(5))
    assert all(torch.equal(result["output"], was) for result, was in zip(results, kept, strict=True))
    assert results[-1]["loss"].requires_grad
    assert not results[-1]["output"].requires_grad
    with pytest.raises(RuntimeError, match=r"fastmlp: capture: backward\(\) reached a result of a captured function"):
        results[-1]["loss"].backward()


def test_a_graph_for_each_shape(on_a_gpu: Any) -> None:
    eager, twin = Program(), Program()
    step = on_a_gpu(twin)
    for i in range(5):
        for rows in (4, 6):
            check_call(eager, twin, step, 10 * i + rows, rows)
    assert (FakeGraph.made, step.replays) == (2, 6)


@pytest.mark.parametrize("zero", [True, False])
def test_gradients_of_a_graph(on_a_gpu: Any, zero: bool) -> None:
    """Outside they may be set to None, or to others."""
    eager, twin = Program(zero), Program(zero)
    step = on_a_gpu(twin)
    for i in range(16):
        check_call(eager, twin, step, i)
        if i % 5 == 4:
            for program in (eager, twin):
                program.optimizer.zero_grad()
        if i == 11:
            for program in (eager, twin):
                program.model[0].weight.grad = torch.ones(8, 4)
    assert step.replays > 5


def swap_momentum(program: Program) -> None:
    next(iter(program.optimizer.state.values()))["momentum_buffer"] = torch.ones(8, 4)


def load_optimizer(program: Program) -> None:
    program.optimizer.load_state_dict(copy.deepcopy(program.optimizer.state_dict()))
    program.optimizer.param_groups[0]["lr"] = 0.01


@pytest.mark.parametrize(
    "change",
    [
        lambda program: program.model.eval(),
        lambda program: program.optimizer.param_groups[0].update(lr=0.01),
        lambda program: program.optimizer.param_groups[0].update(weight_decay=0.1),
        lambda program: program.optimizer.state.clear(),
        lambda program: setattr(program.model[0].weight, "data", torch.ones(8, 4)),
        lambda program: setattr(program.model[2].running_var, "data", torch.ones(8)),
        lambda program: setattr(program.model[0], "weight", nn.Parameter(torch.ones(8, 4))),
        lambda program: program.model[0].requires_grad_(False),
        swap_momentum,
        load_optimizer,
    ],
    ids=["eval", "lr", "decay", "no state", "memory", "memory of a buffer", "parameter", "frozen", "state", "loaded"],
)
def test_what_a_graph_notices(on_a_gpu: Any, change: Callable[[Program], None]) -> None:
    """Numbers and addresses are part of a graph, so that more is noticed than by a tape."""
    eager, twin = Program(), Program()
    step = on_a_gpu(twin)
    for i in range(12):
        if i == 5:
            change(eager)
            change(twin)
        check_call(eager, twin, step, i)
    assert FakeGraph.made == 2
    assert 10 > step.replays >= 7


def test_a_graph_that_cuda_cannot_capture(on_a_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: Any, args: Any, kwargs: Any, generators: Any) -> Any:
        function(*map(torch.zeros_like, args), **kwargs)
        raise RuntimeError("operation not permitted when stream is capturing\nMore lines.")

    program = Program(lr=0.0)
    step = on_a_gpu(program)
    monkeypatch.setattr(graphs, "captured", fail)
    for i in range(2):
        step(*batch(i))
    grads = [parameter.grad for parameter in program.model.parameters()]
    message = (
        r"fastmlp: capture: Program.step: CUDA cannot capture it \(operation not permitted when stream is "
        r"capturing\): find out which operation waits for the GPU"
    )
    with pytest.raises(fastmlp.CaptureError, match=message):
        step(*batch(2))
    assert all(p.grad is grad for p, grad in zip(program.model.parameters(), grads, strict=True))
    eager = fastmlp.capture(program.step, otherwise="eager")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        results = [eager(*batch(i))["loss"].isfinite() for i in range(6)]
    assert all(results)
    assert [(w.category, w.filename) for w in told] == [(RuntimeWarning, __file__)]
    assert (eager.calls, eager.replays) == (6, 0)


def optimizer_of(kind: str, **options: Any) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = getattr(torch.optim, kind)([nn.Parameter(torch.ones(3))], lr=0.1, **options)
    return made


@pytest.mark.parametrize(
    ("kind", "capturable", "message"),
    [
        ("SGD", None, None),
        ("Adam", False, "Adam counts its steps on the CPU, which a CUDA graph does not: make it with capturable=True"),
        ("Adam", True, None),
        ("RMSprop", False, "RMSprop counts its steps on the CPU, .* make it with capturable=True"),
        ("Adagrad", None, "Adagrad has no form for CUDA graphs: use torch.optim.Adam with capturable=True"),
    ],
)
def test_optimizers_must_be_capturable(kind: str, capturable: bool | None, message: str | None) -> None:
    optimizer = optimizer_of(kind, **({} if capturable is None else {"capturable": capturable}))
    trace = of_gpu()
    trace.events.append(OptimizerStep(optimizer, "train.py:7"))
    check_obstacle(trace, message and rf"{message}.*, in train.py:7")


def of_gpu(*devices: str) -> Trace:
    """A recording with one tensor on each device, the first one given as an argument."""
    sources = [("argument", 0), *(("unseen",) for _ in devices)]
    memories = [
        Memory(source, 12, None, "train.py:3", False, device)
        for source, device in zip(sources, ("cuda:0", *devices), strict=True)
    ]
    return Trace(memories, [Value(i, torch.float32, (3,), (1,), 0) for i in range(len(memories))])


def check_obstacle(trace: Trace, message: str | None) -> None:
    why = graphable.obstacle(trace)
    if message is None:
        assert why is None
    else:
        assert why is not None
        with pytest.raises(RuntimeError, match=message):
            raise RuntimeError(why)


def test_devices_are_not_mixed() -> None:
    check_obstacle(of_gpu("cuda:0"), None)
    check_obstacle(of_gpu("cpu"), r"tensors on cuda:0 and cpu are used together, in train.py:3: use one device")
    check_obstacle(of_gpu("cuda:1"), r"tensors on cuda:0 and cuda:1 are used together")
    assert graphable.obstacle(Trace([Memory(("argument", 0), 12, None, "")])) is None
    why = difference(of_gpu("cuda:0"), of_gpu("cuda:1"))
    assert why is not None
    assert why.startswith("in train.py:3: a tensor comes from elsewhere")


def test_numbers_of_python_may_be_on_the_cpu_but_not_copied() -> None:
    trace = of_gpu("cpu")
    trace.memories[1].source = ("constant",)
    trace.events.append(Operation(torch.ops.aten.mul.Tensor, (Ref(0), Ref(1)), {}, [0], "train.py:9"))
    check_obstacle(trace, None)
    trace.events.append(Operation(torch.ops.aten.copy_.default, (Ref(0), Ref(1)), {}, [0], "train.py:9"))
    check_obstacle(trace, r"a tensor of the CPU is copied to cuda:0, in train.py:9: make it there by torch.full\(\)")


def test_other_obstacles() -> None:
    trace = of_gpu()
    trace.events.append(Check(0, 1.0, "train.py:5"))
    check_obstacle(trace, r"torch reads a tensor for a check, in train.py:5: .* validate_args=False")
    trace = of_gpu()
    trace.events.append(GradSet(0, None, "train.py:6"))
    check_obstacle(trace, r"the .grad of an argument is set, in train.py:6: return torch.autograd.grad")
    trace = of_gpu()
    trace.memories[0].written = True
    check_obstacle(trace, r"an argument is written, in train.py:3: write to a tensor that is none, or return")


class FakeStream:
    log: list[str] = []  # noqa: RUF012

    def __init__(self, name: str = "aside") -> None:
        self.name = name

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_calls_before_a_graph_run_on_a_stream_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    with graphs.warmup() as nothing:
        assert nothing is None

    class Context:
        def __enter__(self) -> None:
            FakeStream.log.append("begins")

        def __exit__(self, *error: Any) -> None:
            FakeStream.log.append("ends")

    FakeStream.log.clear()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeStream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Context())
    with graphs.warmup():
        FakeStream.log.append("work")
    assert FakeStream.log == ["aside waits for main", "begins", "work", "ends", "main waits for aside"]


def test_generators_are_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = []

    class CUDAGraph:
        def register_generator_state(self, generator: torch.Generator) -> None:
            registered.append(generator)

    def graph(made: Any, capture_error_mode: str) -> AbstractContextManager[None]:
        assert isinstance(made, CUDAGraph)
        assert capture_error_mode == "thread_local"
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    generator = torch.Generator()
    made, result = graphs.captured(lambda x, y: x + y, (1,), {"y": 2}, {generator})
    assert isinstance(made, CUDAGraph)
    assert (result, registered) == (3, [generator])

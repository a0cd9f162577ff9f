"""Recording: one execution is not the program. What a forward reads, writes and decides besides arithmetic."""

import copy
import math
import pickle
import random
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fastmlp
from fastmlp import TrainStep, convert, freeze
from tests.support.derivatives import assert_same, derivatives
from tests.support.small import state_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.relu(self.fc(x)))


class IsInstance(Net):
    def forward(self, x: Any) -> Tensor:
        if isinstance(x, Tensor):
            return self.out(torch.relu(self.fc(x)))
        return self.out(torch.tanh(self.fc(x)))


class IsTensor(Net):
    def forward(self, x: Any) -> Tensor:
        return self.out(torch.relu(self.fc(x)) if torch.is_tensor(x) else self.fc(x))


class OfType(Net):
    def forward(self, x: Any) -> Tensor:
        return self.out(torch.relu(self.fc(x)) if type(x) is Tensor else self.fc(x))


class Optional(Net):
    def forward(self, x: Tensor, scale: Any = None) -> Tensor:
        h = self.fc(x)
        if scale is None:
            return self.out(torch.relu(h))
        return self.out(h * scale)


class Noisy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(x) + torch.randn(4, dtype=torch.float64)))


class NoiseData(Net):
    eps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("eps", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.eps.data.normal_()
        return self.out(self.fc(x) + self.eps)


class NoiseParameter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(x) + self.eps.normal_())


class Penalised(Net):
    def forward(self, x: Tensor) -> Any:
        penalty = torch.zeros((), dtype=torch.float64)
        h = torch.relu(self.fc(x))
        penalty += h.abs().mean()
        return self.out(h), penalty


class Counted(Net):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class CountedAnew(Counted):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return Net.forward(self, x)


class CountedByData(Counted):
    def forward(self, x: Tensor) -> Tensor:
        self.calls.data.add_(1)
        return Net.forward(self, x)


class CountedDetached(Counted):
    def forward(self, x: Tensor) -> Tensor:
        torch.add(self.calls, 1, out=self.calls)
        return Net.forward(self, x)


class CountedInPython(Net):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class CountedInTraining(CountedInPython):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return Net.forward(self, x)


class Keeping(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.fc(x)
        return self.out(self.last)


class Appending(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        return super().forward(x)


class Statistics:
    def __init__(self) -> None:
        self.count = 0
        self.values: list[int] = []


class Counting(Net):
    def __init__(self) -> None:
        super().__init__()
        self.statistics = Statistics()

    def forward(self, x: Tensor) -> Tensor:
        self.statistics.count += 1
        self.statistics.values.append(1)
        return super().forward(x)


class InArray(Net):
    def __init__(self) -> None:
        super().__init__()
        self.counts = np.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.counts[0] += 1
        return super().forward(x)


class PythonRandom(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(x) if random.random() < 2 else x)


class NumpyRandom(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(x)) * np.random.rand()  # noqa: NPY002


class Seeding(Net):
    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return self.out(self.fc(x))


class SeedingInside(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            noise = torch.randn(4)
        return self.out(torch.relu(self.fc(x) + noise))


class OwnGenerator(Net):
    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(x))) * self.generator.normal()


class Clock(Net):
    steps = iter(range(10**9))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(x)) * next(self.steps)


class WithGrad(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        return self.out(torch.relu(h) if torch.is_grad_enabled() else torch.tanh(h))


class ReadsParameter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(x)) * float(self.scale)


class ReadsFlag(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flag", torch.ones((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(x) if self.flag else x)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(4, 4), nn.Linear(4, 3)]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](torch.relu(self.layers[0](x)))


class Unwritten(Net):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Result(dict[str, Any]):
    pass


class OwnResult(Net):
    def forward(self, x: Tensor) -> Any:
        return Result(logits=self.fc(x))


class ByGradient(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x)) if x.requires_grad is True else self.fc(x)


class ByLeaf(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y if y.grad_fn is None else torch.relu(y)


class ByDtype(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.dtype is torch.float32 else torch.relu(self.fc(x))


class Sized(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(x))) + torch.zeros(x.shape[0], 2)


REFUSED: list[tuple[type[Net], str]] = [
    (ByGradient, r"it asks for requires_grad of a value that is computed.*comparison by `is`"),
    (ByLeaf, r"it asks for grad_fn of a value that is computed.*comparison by `is`"),
    (ByDtype, r"it asks for dtype of a value that is computed.*comparison by `is`"),
    (OfType, r"recorded, it calls other functions.*aten.relu"),
    (NoiseData, r"it changes a tensor that was there before the call, of shape \(4,\), in place \(aten.normal_"),
    (NoiseParameter, r"it changes self.eps in place \(normal\).*test_trace.py, line \d+"),
    (Counted, r"it changes self.calls in place \(add\).*test_trace.py, line \d+"),
    (CountedAnew, r"it changes calls, which would happen only once"),
    (CountedByData, r"it changes a tensor that was there before the call, of shape \(\), in place"),
    (CountedDetached, r"it changes self.calls in place \(out=\)"),
    (CountedInPython, r"it changes calls, which would happen only once"),
    (CountedInTraining, r"it changes calls, which would happen only once"),
    (Keeping, r"it changes last, which would happen only once"),
    (Appending, r"it changes seen, which would happen only once"),
    (Counting, r"it changes statistics.count, statistics.values, which would happen only once"),
    (InArray, r"it changes counts, which would happen only once"),
    (PythonRandom, r"it draws random numbers \(Random.random\) that would be .*test_trace.py, line \d+"),
    (NumpyRandom, r"it draws random numbers, or seeds a generator.* numpy.random is another one"),
    (OwnGenerator, r"it changes generator, which would happen only once"),
    (Seeding, r"it seeds or moves a generator of random numbers \(manual_seed\).*test_trace.py, line \d+"),
    (SeedingInside, r"it seeds or moves a generator of random numbers \((fork_rng|manual_seed)\)"),
    (Clock, r"depends on something that changes from call to call.*mul\]\(args = \(%out, \d+\)"),
    (WithGrad, r"depends on torch.is_grad_enabled\(\)"),
    (ReadsParameter, r"it reads the elements of self.scale \(__float__\)"),
    (ReadsFlag, r"it reads the elements of self.flag \(__bool__\)"),
    (Listed, r"it calls layers\[0\], which is no child .* torch.nn.ModuleList"),  # type: ignore[list-item]
    (Sized, r"zeros\(\).*; torch.fx records .* only as a tuple, torch.zeros\(\(n, m\)\).*test_trace.py, line \d+"),
    (Unwritten, r"It says: NotImplementedError \(.*test_trace.py, line \d+"),
    (OwnResult, r"recorded, it calls other functions.*Result"),
]


@pytest.mark.parametrize(
    ("make", "kwargs", "error", "message"),
    [
        (Net, {"inputs": torch.zeros(2, 3)}, TypeError, r"inputs must be .*, got Tensor of shape .* inputs=\(x,\)"),
        (Net, {"inputs": (torch.zeros(2, 3),) * 2}, RuntimeError, "its arguments are x, and inputs has 2 examples"),
        (lambda: torch.compile(Net(), backend="eager"), {}, RuntimeError, r"convert that one, model._orig_mod, first"),
        (lambda: nn.DataParallel(Net()), {}, RuntimeError, r"convert that one, model.module, first"),
        (lambda: nn.LazyLinear(3), {}, RuntimeError, "has no parameters before its first call; call the model once"),
        (lambda: torch.relu, {}, TypeError, "model must be a torch.nn.Module, got builtin"),
    ],
)
def test_arguments_are_refused_by_name(
    make: Callable[[], Any], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"fastmlp: .*{message}"):
        convert(make(), trace=True, **kwargs)


def states() -> list[Any]:
    numpy_state = np.random.get_state()  # noqa: NPY002
    return [random.getstate(), torch.get_rng_state().tolist(), str(numpy_state)]


@pytest.mark.parametrize("threads", [0, 1])
def test_generators_that_nobody_watches(threads: int) -> None:
    """Somebody else profiles this thread, alone or beside another one."""
    done = threading.Event()
    others = [threading.Thread(target=done.wait) for _ in range(threads)]
    for other in others:
        other.start()

    def profile(frame: Any, event: str, _: Any) -> None:
        return None

    sys.setprofile(profile)
    try:
        for kind in (PythonRandom, NumpyRandom, Seeding):
            model, generators = kind(), states()
            with pytest.raises(RuntimeError, match=r"it draws random numbers, or seeds a generator"):
                convert(model, trace=True)
            assert states() == generators
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
        done.set()
        for other in others:
            other.join()


def snapshot(model: nn.Module) -> list[Any]:
    """Everything of a model, values too."""
    statistics = getattr(model, "statistics", Statistics())
    return [
        [(name, kind, id(m), {k: (id(v), repr(v)) for k, v in d.items()}) for name, kind, m, d in state_of(model)],
        copy.deepcopy(model.state_dict()),
        vars(statistics) | {"values": list(statistics.values)},
        model.generator.bit_generator.state if isinstance(model, OwnGenerator) else None,
    ]


@pytest.mark.parametrize(("kind", "message"), REFUSED, ids=[kind.__name__ for kind, _ in REFUSED])
@pytest.mark.parametrize("use", [lambda m: convert(m, trace=True), freeze])
def test_refused_by_name_and_nothing_has_changed(kind: type[Net], message: str, use: Callable[[Any], Any]) -> None:
    model = kind()
    before, generators = snapshot(model), states()
    with pytest.raises((RuntimeError, TypeError), match=f"(?s){message}"):
        convert(model, trace=True)
    with pytest.raises((RuntimeError, TypeError)):
        use(model)
    assert str(snapshot(model)) == str(before)
    assert states() == generators


@pytest.mark.parametrize("kind", [kind for kind, _ in REFUSED])
def test_explain_changes_nothing(kind: type[Net]) -> None:
    model = kind()
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    before, generators = snapshot(model), states()
    assert TrainStep.explain(model, nn.MSELoss(), optimizer)
    fastmlp.fusion_report(model)
    assert str(snapshot(model)) == str(before)
    assert states() == generators


@pytest.mark.parametrize("kind", [Net, IsInstance, IsTensor])
@pytest.mark.parametrize("again", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_tensor_is_a_tensor(kind: type[Net], again: Callable[[Any], Any]) -> None:
    model = kind().double()
    recorded, x = again(convert(model, trace=True)), torch.randn(5, 4, dtype=torch.float64)
    assert_same(derivatives(recorded, x), derivatives(model, x))
    with pytest.raises(TypeError, match=r"fastmlp: argument x .* must be given, got None|x .* must be a tensor, got"):
        recorded(None)
    if kind is not Net:
        with pytest.raises(TypeError, match=r"fastmlp: argument x of a recorded forward must be a tensor, got \[1.0"):
            recorded([1.0])


@pytest.mark.parametrize("again", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_arguments_with_defaults_that_are_asked_for(again: Callable[[Any], Any]) -> None:
    model, x = Optional().double(), torch.randn(5, 4, dtype=torch.float64)
    recorded = again(convert(model, trace=True))
    assert_same([recorded(x), recorded(x, None), recorded(x, scale=None)], [model(x)] * 3)
    for call in (lambda: recorded(x, 2.0), lambda: recorded(x, scale=x)):
        with pytest.raises(
            ValueError, match=r"fastmlp: argument scale of a recorded forward must be its default, None"
        ):
            call()
    # Recorded with it, it is one that has to be given.
    given = again(convert(model, trace=True, inputs=(x, 2 * x)))
    assert_same([given(x, 3 * x)], [model(x, 3 * x)])
    with pytest.raises(TypeError):
        given(x)
    # What wraps it has the default too.
    outer = convert(nn.Sequential(recorded, nn.ReLU()), trace=True)
    assert_same([outer(x)], [torch.relu(model(x))])
    frozen = freeze(model)
    assert_same([frozen(x)], [model(x).detach()])


def test_arguments_with_defaults_that_are_open_stay_open() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor, scale: float = 2.0, flag: bool = True, shift: float = 0.5) -> Tensor:
            h = self.fc(x) * (scale * 2 + 1)
            return self.out(torch.relu(h) if flag else h) + shift

    model, x = Scaled(), torch.randn(5, 4)
    recorded = convert(model, trace=True)
    torch.testing.assert_close(recorded(x, 0.5, True, 3.0), model(x, 0.5, True, 3.0))
    torch.testing.assert_close(recorded(x, shift=x[:, :3], scale=torch.tensor(0.1)), model(x, 0.1, True, x[:, :3]))
    with pytest.raises(ValueError, match="argument flag of a recorded forward must be its default, True, got False"):
        recorded(x, flag=False)


def test_random_numbers_are_drawn_at_each_call() -> None:
    model, x = Noisy().double(), torch.randn(5, 4, dtype=torch.float64)
    generators = states()
    recorded = convert(model, trace=True)
    assert states() == generators
    for again in (recorded, copy.deepcopy(recorded), pickle.loads(pickle.dumps(recorded)), convert(recorded, True)):
        assert not torch.equal(again(x), again(x))
        torch.manual_seed(3)
        found = [again(x), again(x)]
        torch.manual_seed(3)
        assert_same(found, [model(x), model(x)])


def test_local_tensors_begin_anew_at_each_call() -> None:
    model, x = Penalised().double(), torch.randn(5, 4, dtype=torch.float64)
    recorded = convert(model, trace=True)
    for again in (recorded, copy.deepcopy(recorded), pickle.loads(pickle.dumps(recorded))):
        for _ in range(3):
            assert_same(list(again(x)), list(model(x)))


def test_aliases_of_what_is_changed_in_place() -> None:
    class Aliased(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x)
            g = h
            h += x
            h *= 2
            return self.out(g)

    model, x = Aliased().double(), torch.randn(5, 4, dtype=torch.float64)
    assert_same([convert(model, trace=True)(x)], [model(x)])


@pytest.mark.parametrize(
    "read",
    [
        lambda m: m.fc.weight * 2,
        lambda m: m.weights[0] * 2,
        lambda m: next(iter(m.parameters())) * 2,
        lambda m: dict(m.named_parameters())["fc.weight"] * 2,
        lambda m: m.state_dict()["fc.weight"] * 2,
        lambda m: m.fc._parameters["weight"].mul(2),
        lambda m: torch.add(m.fc.weight, m.fc.weight),
        lambda m: m.fc.weight.data * 2,
        lambda m: m.scaled() * 2,
    ],
)
def test_parameters_are_read_at_each_call(read: Callable[[Any], Tensor]) -> None:
    class Reading(Net):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([self.fc.weight])

        def scaled(self) -> Tensor:
            return self.fc.weight.t().contiguous().t()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.linear(x, read(self)))

    model, x = Reading().double(), torch.randn(5, 4, dtype=torch.float64)
    recorded = convert(model, trace=True)
    for _ in range(2):
        assert_same([recorded(x)], [model(x)])
        with torch.no_grad():
            model.fc.weight.add_(1)


def test_what_tensors_of_the_model_are_is_read_and_remembered() -> None:
    class Casting(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.fc.weight.dtype == torch.float64:
                return self.out(self.fc(x))
            return self.out(torch.relu(self.fc(x.to(self.fc.weight.dtype))))

    model, x = Casting(), torch.randn(5, 4)
    recorded = convert(model, trace=True)
    torch.testing.assert_close(recorded(x), model(x))
    assert recorded(x.double()).dtype == torch.float32
    loaded = pickle.loads(pickle.dumps(recorded))
    for m in (recorded.double(), loaded.double()):
        with pytest.raises(RuntimeError, match=r"self.fc.weight.dtype is torch.float64, and was torch.float32 when"):
            m(x.double())


def test_values_of_python_are_those_of_the_recording() -> None:
    class Flagged(Net):
        flag = True

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.fc(x)) if self.flag else x) * math.sqrt(x.shape[-1])

    model, x = Flagged(), torch.randn(5, 4)
    torch.testing.assert_close(convert(model, trace=True)(x), model(x))


def test_a_forward_of_an_instance_is_recorded() -> None:
    model, x = Net(), torch.randn(5, 4)
    model.forward = lambda x: model.out(x)  # type: ignore[method-assign]
    torch.testing.assert_close(convert(model, trace=True)(x), model.out(x))


def test_several_inputs_and_their_examples() -> None:
    class Bilinear(Net):
        def forward(self, x: Tensor, *others: Tensor, **options: Any) -> Tensor:
            for other in others:
                x = x + other
            return self.out(torch.relu(self.fc(x)))

    model, x = Bilinear(), torch.randn(5, 4)
    torch.testing.assert_close(convert(model, trace=True)(x), model(x))
    recorded = convert(model, trace=True, inputs=(x, x, x))
    torch.testing.assert_close(recorded(x, 2 * x, 3 * x), model(x, 2 * x, 3 * x))
    with pytest.raises(TypeError):
        recorded(x)

    class OfDictionary(Net):
        def forward(self, batch: Any) -> Tensor:
            return self.out(torch.relu(self.fc(batch["x"])))

    of_dictionary = OfDictionary()
    with pytest.raises(
        RuntimeError, match=r"no example of its arguments was found .*convert\(model, trace=True, inputs"
    ):
        convert(of_dictionary, trace=True)
    recorded = convert(of_dictionary, trace=True, inputs=({"x": x},))
    torch.testing.assert_close(recorded({"x": x}), of_dictionary({"x": x}))

    with pytest.raises(RuntimeError, match="with the inputs that were given it raises RuntimeError: mat1 and mat2"):
        convert(model, trace=True, inputs=(torch.ones(2, 7),))
    with pytest.raises(ValueError, match="fastmlp: inputs are examples for trace=True"):
        convert(Net(), inputs=(x,))  # type: ignore[call-overload]

    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.conv, self.fc = nn.Embedding(9, 4), nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, words: Tensor, image: Tensor, *, shift: Tensor) -> Tensor:
            both = self.embedding(words).sum(1) + self.conv(image).mean((2, 3))
            return torch.relu(self.fc(both)) + shift

    embedded = Embedded()
    arguments: Any = (torch.arange(6).view(2, 3), torch.randn(2, 3, 9, 9))
    recorded = convert(embedded, trace=True)
    torch.testing.assert_close(recorded(*arguments, shift=torch.ones(2)), embedded(*arguments, shift=torch.ones(2)))


def test_nothing_of_the_model_is_written_while_it_is_recorded() -> None:
    writes: list[str] = []

    class Observed(Net):
        def __setattr__(self, name: str, value: Any) -> None:
            writes.append(name)
            super().__setattr__(name, value)

    model = Observed()
    norm = nn.Sequential(model, nn.BatchNorm1d(3), nn.Dropout(0.5))
    writes.clear()
    seen: list[Any] = []
    before = {id(m): dict(m.__dict__) for m in norm.modules()}

    def look(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name in ("forward", "create_node"):
            seen.append({id(m): dict(m.__dict__) for m in norm.modules()} == before)

    sys.setprofile(look)
    try:
        convert(norm, trace=True)
    finally:
        sys.setprofile(None)
    assert len(seen) > 10
    assert all(seen)
    assert writes == []
    assert norm.state_dict()["1.running_mean"].eq(0).all()
    assert norm.state_dict()["1.num_batches_tracked"] == 0


def test_hooks_do_not_run_while_it_is_recorded() -> None:
    model, calls = nn.Sequential(nn.Linear(4, 4), Net()), []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    model[1].register_forward_pre_hook(lambda *_: calls.append("pre"))
    convert(model, trace=True)
    assert calls == []


def test_old_pickles_find_their_names() -> None:
    from fastmlp import convert as module_function

    module = sys.modules[module_function.__module__]
    assert issubclass(module._Traced, fx.GraphModule)
    assert callable(module._load)
    assert callable(module.run_chain)
    assert issubclass(module._Tracer, fx.Tracer)


def test_nothing_is_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(Net(), trace=True)


# What recorded modules are.


class Model(Net):
    """With methods, attributes and properties of its own, which a recorded model keeps."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        self.scale, self.convert = scale, lambda x: x

    def predict(self, x: Tensor) -> Tensor:
        return self(x).argmax(-1)

    def encode(self, x: Tensor) -> Tensor:
        return self.scale * self.fc(x)

    def direct(self, x: Tensor) -> Tensor:
        return self.forward(x)

    @property
    def columns(self) -> int:
        return self.fc.in_features

    @classmethod
    def small(cls) -> str:
        return cls.__name__

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.out.training = False
        return self


@pytest.mark.parametrize(
    "again",
    [
        lambda m: m,
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: convert(m, trace=True),
        lambda m: pickle.loads(pickle.dumps(convert(copy.deepcopy(m), trace=True))),
    ],
)
def test_recorded_models_keep_methods_and_attributes(again: Callable[[Any], Any]) -> None:
    model, x = Model().double(), torch.randn(5, 4, dtype=torch.float64)
    recorded = again(convert(model, trace=True))
    assert isinstance(recorded, Model)
    assert isinstance(recorded, fx.GraphModule)
    assert torch.equal(recorded.predict(x), model.predict(x))
    assert_same([recorded.encode(x), recorded.direct(x)], [model.encode(x), model(x)])
    assert (recorded.columns, recorded.small(), recorded.scale) == (4, "Model", 2.0)
    assert [str(entry.names) for entry in fastmlp.fusion_report(recorded)] == ["('fc', 'relu', 'out')"]
    assert recorded.train().fc.training
    assert not recorded.out.training
    assert list(recorded.state_dict()) == list(model.state_dict())
    assert [link.name for link in fastmlp.chain.links(recorded)] == ["fc", "relu", "out"]


def test_recorded_containers_are_containers() -> None:
    recorded: Any = convert(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), trace=True)
    assert len(recorded) == 2
    assert type(recorded[0]) is nn.Linear
    layer: Any = convert(nn.Linear(4, 3), trace=True)
    assert layer.in_features == 4
    torch.testing.assert_close(freeze(recorded)(torch.ones(4)), recorded(torch.ones(4)))


def test_recorded_models_are_stacked() -> None:
    models, x = [Model() for _ in range(3)], torch.randn(5, 4)
    recorded = [convert(model, trace=True) for model in models]
    assert len({type(m) for m in recorded}) == 1
    parameters, buffers = torch.func.stack_module_state(recorded)
    base = copy.deepcopy(recorded[0])

    def call(parameters: Any, buffers: Any) -> Any:
        return torch.func.functional_call(base, (parameters, buffers), (x,))

    torch.testing.assert_close(torch.vmap(call)(parameters, buffers), torch.stack([model(x) for model in models]))
    # Code that is changed is that of one module.
    graph = recorded[0].graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        output.args = (graph.call_function(torch.neg, (output.args[0],)),)
    recorded[0].recompile()
    torch.testing.assert_close(recorded[0](x), -models[0](x))
    torch.testing.assert_close(recorded[1](x), models[1](x))


class Wrapping(nn.Module):
    """Looks for attributes in what it wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Slotted(Net):
    __slots__ = ("more",)


class Registered(Net):
    def __init_subclass__(cls, *, key: str) -> None:
        raise AssertionError("nobody has made a subclass")


@pytest.mark.parametrize("make", [lambda: Wrapping(Net()), Slotted, Registered])
def test_classes_of_every_kind_are_recorded(make: Callable[[], nn.Module]) -> None:
    model, x = make(), torch.randn(5, 4)
    recorded: Any = convert(model, trace=True)
    for again in (recorded, copy.deepcopy(recorded), pickle.loads(pickle.dumps(recorded))):
        torch.testing.assert_close(again(x), model(x))
        if isinstance(model, Wrapping):
            assert again.fc.in_features == 4


def test_classes_that_cannot_be_imported_are_left_behind_by_pickles() -> None:
    class Local(Net):
        def predict(self, x: Tensor) -> Tensor:
            return self(x)

    model, x = Local(), torch.randn(5, 4)
    recorded: Any = convert(model, trace=True)
    torch.testing.assert_close(recorded.predict(x), model(x))
    loaded = pickle.loads(pickle.dumps(recorded))
    torch.testing.assert_close(loaded(x), model(x))

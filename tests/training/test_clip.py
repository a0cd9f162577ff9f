"""fastmlp.clip_grad_norm_ and clip_grad_value_ against torch.nn.utils, and norms against exact sums."""

import inspect
import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

import fastmlp
from fastmlp import _C
from tests.support.axes import DTYPES
from tests.support.bounds import gamma

pytestmark = pytest.mark.usefixtures("as_before")

SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (16,), (67,), (0,), (3, 0), (33, 17), (2, 3, 4), (129, 256)]
ORDERS = [2.0, math.inf]

torch_norm, torch_value = nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own functions are not to be called."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torch's function was called")

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", refuse)
    monkeypatch.setattr(nn.utils, "clip_grad_value_", refuse)


@pytest.fixture
def to_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Torch's own functions have to be called; which ones were."""
    called: list[str] = []

    def seen(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", seen("norm", torch_norm))
    monkeypatch.setattr(nn.utils, "clip_grad_value_", seen("value", torch_value))
    yield called
    assert called


def with_gradients(*gradients: Tensor | None) -> list[Tensor]:
    parameters: list[Tensor] = []
    for gradient in gradients:
        like = torch.zeros(2) if gradient is None else gradient
        parameter = nn.Parameter(torch.zeros(like.shape, dtype=like.dtype, device=like.device))
        parameter.grad = gradient
        parameters.append(parameter)
    return parameters


def transposed(x: Tensor) -> Tensor:
    backwards = list(reversed(range(x.dim())))
    return x.permute(backwards).contiguous().permute(backwards)


def misaligned(x: Tensor) -> Tensor:
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


def drawn(dtype: torch.dtype, scale: float = 1.0, shapes: list[tuple[int, ...]] | None = None) -> list[Tensor]:
    """Gradients of all shapes, laid out in turn as they come, transposed and misaligned."""
    layouts: list[Callable[[Tensor], Tensor]] = [lambda x: x, transposed, misaligned]
    shapes = SHAPES if shapes is None else shapes
    return [layouts[i % 3]((torch.randn(s, dtype=torch.float64) * scale).to(dtype)) for i, s in enumerate(shapes)]


def copies(gradients: list[Tensor]) -> list[Tensor]:
    return [gradient.clone() for gradient in gradients]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def exact_norm(gradients: list[Tensor]) -> float:
    """Rounded once; for numbers of any size."""
    numbers = [abs(Fraction(x)) for gradient in gradients for x in gradient.double().flatten().tolist()]
    largest = max(numbers)
    if largest == 0:
        return 0.0
    # Scaled by a power of 2, so that no square leaves the range of float64.
    scale = Fraction(2) ** math.frexp(float(largest))[1]
    return float(scale) * math.sqrt(sum((x / scale) ** 2 for x in numbers))


def assert_norm(norm: Tensor, gradients: list[Tensor], order: float, dtype: torch.dtype) -> None:
    assert (norm.dtype, norm.shape, norm.requires_grad) == (dtype, (), False)
    if order == math.inf:
        largest = max(float(gradient.abs().max()) for gradient in gradients)
        assert float(norm) == largest
        return
    expected = exact_norm(gradients)
    # Squares and sums are rounded in float64, each element's at most once with each other, and so is the root; the
    # result once more, to its own dtype, where it may be subnormal. A root halves relative errors.
    n = sum(gradient.numel() for gradient in gradients)
    info = torch.finfo(dtype)
    bound = expected * (gamma(n + 4, torch.float64) / 2 + info.eps / 2) + info.smallest_normal * info.eps / 2
    assert abs(float(norm) - expected) <= bound


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("max_norm", [0.5, 1e6], ids=["clips", "leaves"])
@pytest.mark.usefixtures("alone")
def test_norm_and_gradients(dtype: torch.dtype, isa: str, order: float, max_norm: float) -> None:
    """The norm is exact but for rounding; the gradients are those that torch makes with this norm."""
    shapes = [shape for shape in SHAPES if order == 2 or 0 not in shape]
    gradients = drawn(dtype, shapes=shapes)
    before, versions = copies(gradients), [gradient._version for gradient in gradients]
    parameters = with_gradients(*gradients)
    norm = fastmlp.clip_grad_norm_(parameters, max_norm, order)
    assert _C.last_isa() == isa
    assert_norm(norm, before, order, dtype)
    expected = with_gradients(*copies(before))
    nn.utils.clip_grads_with_norm_(expected, max_norm, norm)
    assert_same(gradients, [p.grad for p in expected if p.grad is not None])
    assert all(p.grad is gradient for p, gradient in zip(parameters, gradients, strict=True))
    assert all(gradient._version > version for gradient, version in zip(gradients, versions, strict=True))


@pytest.mark.usefixtures("alone")
def test_every_length(dtype: torch.dtype, isa: str) -> None:
    """Ends of vectors and of blocks; what lies beside a gradient stays."""
    for n in [*range(1, 140), 1023, 1024, 1025, 4097, 16384, 16385]:
        memory = torch.randn(n + 2, dtype=torch.float64).to(dtype)
        outside = memory[[0, -1]].clone()
        before = memory[1:-1].clone()
        parameters = with_gradients(memory[1:-1])
        norm = fastmlp.clip_grad_norm_(parameters, 0.5)
        assert_norm(norm, [before], 2, dtype)
        expected = before.clone()
        nn.utils.clip_grads_with_norm_(with_gradients(expected), 0.5, norm)
        assert_same([memory[1:-1]], [expected])
        assert fastmlp.clip_grad_norm_(parameters, 0.1, math.inf) == expected.abs().max()
        fastmlp.clip_grad_value_(parameters, 0.01)
        assert memory[1:-1].abs().max() <= torch.tensor(0.01, dtype=dtype)
        assert torch.equal(memory[[0, -1]], outside)
    assert _C.last_isa() == isa


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-22, 1e19])
@pytest.mark.usefixtures("alone", "isa")
def test_squares_beyond_the_range(scale: float) -> None:
    """The norm of float32 gradients is right where it can be held; torch's is infinite or zero."""
    gradients = drawn(torch.float32, scale)
    before = copies(gradients)
    norm = fastmlp.clip_grad_norm_(with_gradients(*gradients), 1.0)
    assert_norm(norm, before, 2, torch.float32)
    if scale > 1:
        clipped = exact_norm(gradients)
        assert 0.999 < clipped < 1.001


@pytest.mark.parametrize("scale", [1e150, 1e-150])
@pytest.mark.usefixtures("alone", "isa")
def test_float64_at_the_ends_of_its_squares(scale: float) -> None:
    gradients = drawn(torch.float64, scale)
    before = copies(gradients)
    assert_norm(fastmlp.clip_grad_norm_(with_gradients(*gradients), 1.0), before, 2, torch.float64)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 5, 66])
@pytest.mark.usefixtures("alone")
def test_not_finite(dtype: torch.dtype, isa: str, order: float, special: float, place: int) -> None:
    gradients = drawn(dtype, shapes=[(7,), (67,), (3, 5)])
    gradients[1][place] = special
    expected = with_gradients(*copies(gradients))
    total = torch_norm(expected, 1.0, order)
    norm = fastmlp.clip_grad_norm_(with_gradients(*gradients), 1.0, order)
    assert isa == _C.last_isa()
    assert_same([norm, *gradients], [total, *(p.grad for p in expected if p.grad is not None)])


@pytest.mark.parametrize("max_norm", [0, 0.0, -1.0, 1, math.inf, -math.inf, math.nan, 1e300, True])
@pytest.mark.parametrize("value", [0.0, 1e-7, 0.5, 300.0])
@pytest.mark.usefixtures("alone")
def test_any_limit(dtype: torch.dtype, max_norm: float, value: float) -> None:
    """Of one element, whose norm is exact, so that every bit is torch's."""
    gradient, expected = torch.full((1,), value, dtype=dtype), torch.full((1,), value, dtype=dtype)
    total = torch_norm(with_gradients(expected), max_norm)
    norm = fastmlp.clip_grad_norm_(with_gradients(gradient), max_norm)
    if dtype == torch.float16 or value != 1e-7:  # whose square torch rounds
        assert_same([norm], [total])
        assert_same([gradient], [expected])
    again = torch.full((1,), value, dtype=dtype)
    nn.utils.clip_grads_with_norm_(with_gradients(again), max_norm, norm)
    assert_same([gradient], [again])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_error_if_nonfinite(order: float, special: float) -> None:
    gradients = [torch.tensor([1.0, special]), torch.ones(3)]
    before, versions = copies(gradients), [gradient._version for gradient in gradients]
    with pytest.raises(RuntimeError) as expected:
        torch_norm(with_gradients(*copies(gradients)), 1.0, order, error_if_nonfinite=True)
    with pytest.raises(RuntimeError) as found:
        fastmlp.clip_grad_norm_(with_gradients(*gradients), 1.0, order, error_if_nonfinite=True)
    assert str(found.value) == str(expected.value)
    assert_same(gradients, before)
    assert versions == [gradient._version for gradient in gradients]
    assert fastmlp.clip_grad_norm_(with_gradients(torch.ones(4)), 1.0, order, error_if_nonfinite=True) > 0


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32, torch.float16)])
@pytest.mark.usefixtures("alone")
def test_mixed_dtypes(dtypes: tuple[torch.dtype, ...]) -> None:
    gradients = [gradient for dtype in dtypes for gradient in drawn(dtype)]
    before = copies(gradients)
    norm = fastmlp.clip_grad_norm_(with_gradients(*gradients), 0.5)
    widest = torch.float64 if torch.float64 in dtypes else torch.float32
    assert torch_norm(with_gradients(*copies(before)), 0.5).dtype == widest
    assert_norm(norm, before, 2, widest)
    expected = with_gradients(*copies(before))
    nn.utils.clip_grads_with_norm_(expected, 0.5, norm)
    assert_same(gradients, [p.grad for p in expected if p.grad is not None])


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("limit", [0.5, 0, 1e-3, -0.25, math.inf, -math.inf])
@pytest.mark.usefixtures("alone")
def test_value(dtype: torch.dtype, isa: str, limit: float, foreach: bool | None) -> None:
    gradients = drawn(dtype)
    gradients[4][:3] = torch.tensor([math.nan, math.inf, -math.inf])
    expected, versions = with_gradients(*copies(gradients)), [gradient._version for gradient in gradients]
    torch_value(expected, limit, foreach=True)
    assert fastmlp.clip_grad_value_(with_gradients(*gradients), limit, foreach) is None  # type: ignore[func-returns-value]
    assert _C.last_isa() == isa
    assert_same(gradients, [p.grad for p in expected if p.grad is not None])
    assert all(gradient._version > version for gradient, version in zip(gradients, versions, strict=True))


@pytest.mark.usefixtures("alone")
def test_threads(dtype: torch.dtype) -> None:
    """The same bits with two threads as with one."""
    results = []
    for threads in (1, 2):
        torch.manual_seed(1)
        torch.set_num_threads(threads)
        gradients = drawn(dtype, shapes=[(700_001,), (3,), (512, 1024)])
        parameters = with_gradients(*gradients)
        norms = [fastmlp.clip_grad_norm_(parameters, 0.5, order) for order in ORDERS]
        fastmlp.clip_grad_value_(parameters, 1e-4)
        results.append([*norms, *gradients])
    assert_same(*results)


@pytest.mark.usefixtures("alone")
def test_callers_in_several_threads() -> None:
    gradients = [torch.full((100_000,), float(i + 1)) for i in range(4)]
    norms: dict[int, float] = {}

    def clip(i: int) -> None:
        for _ in range(20):
            gradients[i].fill_(i + 1)
            norms[i] = float(fastmlp.clip_grad_norm_(with_gradients(gradients[i]), 1.0))

    workers = [threading.Thread(target=clip, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert norms == {i: float(torch.tensor((i + 1) * math.sqrt(100_000))) for i in range(4)}


# What may be given.


@pytest.mark.parametrize("iterable", [list, tuple, iter, lambda all: (p for p in all), lambda all: dict.fromkeys(all)])
@pytest.mark.usefixtures("alone")
def test_iterables(iterable: Callable[[list[Tensor]], Any]) -> None:
    gradients = [torch.tensor([3.0]), torch.tensor([4.0])]
    parameters = with_gradients(gradients[0], None, gradients[1])
    assert fastmlp.clip_grad_norm_(iterable(parameters), 10.0) == 5
    fastmlp.clip_grad_value_(iterable(parameters), 1.0)
    assert_same(gradients, [torch.tensor([1.0]), torch.tensor([1.0])])


@pytest.mark.usefixtures("alone")
def test_one_tensor() -> None:
    (parameter,) = with_gradients(torch.tensor([3.0, -4.0]))
    assert fastmlp.clip_grad_norm_(parameter, 10.0, norm_type="inf") == 4  # type: ignore[arg-type]
    assert fastmlp.clip_grad_norm_(parameter, 10.0, 2, foreach=True) == 5
    fastmlp.clip_grad_value_(parameter, 2)
    assert torch.equal(parameter.grad, torch.tensor([2.0, -2.0]))  # type: ignore[arg-type]


def test_nothing_to_clip() -> None:
    for parameters in ([], with_gradients(None, None), torch.zeros(2, requires_grad=True)):
        norm = fastmlp.clip_grad_norm_(parameters, 1.0)
        assert (norm.dtype, norm.shape, float(norm)) == (torch.float32, (), 0.0)
        # Torch raises here.
        assert error_of(lambda: fastmlp.clip_grad_value_(parameters, 1.0)) == error_of(  # noqa: B023
            lambda: torch_value(parameters, 1.0)  # noqa: B023
        )


def test_an_empty_generator_warns() -> None:
    def none() -> Iterator[Tensor]:
        yield from ()

    with warnings.catch_warnings(record=True) as expected:
        warnings.simplefilter("always")
        torch_norm(none(), 1.0)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert fastmlp.clip_grad_norm_(none(), 1.0) == 0
    assert [(str(w.message), w.category, w.filename) for w in found] == [
        (str(w.message), w.category, __file__) for w in expected
    ]
    assert len(found) == 1


def test_signatures_are_torchs() -> None:
    for ours, torchs in ((fastmlp.clip_grad_norm_, torch_norm), (fastmlp.clip_grad_value_, torch_value)):
        found, expected = inspect.signature(ours).parameters, inspect.signature(torchs).parameters
        assert [(p.name, p.kind, p.default) for p in found.values()] == [
            (p.name, p.kind, p.default) for p in expected.values()
        ]


def error_of(call: Callable[[], Any]) -> tuple[type, str]:
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return type(None), ""


@pytest.mark.parametrize(
    "arguments", [(3, 1.0), ([3], 1.0), ([torch.ones(2), None], 1.0), ("text", 1.0), ([], "much"), ([], None)], ids=str
)
@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_"])
def test_errors_are_torchs(name: str, arguments: tuple[Any, ...]) -> None:
    kind, message = error_of(lambda: getattr(nn.utils, name)(*arguments))
    assert error_of(lambda: getattr(fastmlp, name)(*arguments)) == (kind, message)
    assert issubclass(kind, Exception)


@pytest.mark.parametrize("order", ["much", None, [2]])
def test_a_norm_that_is_none(order: Any) -> None:
    gradient = torch.ones(2)
    kind, message = error_of(lambda: torch_norm(with_gradients(torch.ones(2)), 1.0, order))
    assert error_of(lambda: fastmlp.clip_grad_norm_(with_gradients(gradient), 1.0, order)) == (kind, message)
    assert issubclass(kind, Exception)
    assert torch.equal(gradient, torch.ones(2))


# What is for torch.


class Tagged(Tensor):
    """A subclass without behaviour of its own."""


def twice() -> list[Tensor]:
    (parameter,) = with_gradients(torch.tensor([3.0, 4.0]))
    return [parameter, parameter]


def sharing() -> list[Tensor]:
    memory = torch.arange(1.0, 7.0)
    return with_gradients(memory[:4], memory[3:])


def of_a_graph() -> list[Tensor]:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    (parameter.grad,) = torch.autograd.grad((parameter**3).sum(), parameter, create_graph=True)
    return [parameter]


def made_in_inference_mode() -> list[Tensor]:
    """Torch raises for it."""
    with torch.inference_mode():
        gradient = torch.ones(3)
    return with_gradients(gradient)


OTHERS: dict[str, Callable[[], list[Tensor]]] = {
    "twice": twice,
    "sharing": sharing,
    "of a graph": of_a_graph,
    "inference": made_in_inference_mode,
    "gaps": lambda: with_gradients(torch.arange(1.0, 9.0)[::2]),
    "expanded": lambda: with_gradients(torch.ones(1).expand(3)),
    "subclass": lambda: with_gradients(torch.tensor([3.0, 4.0]).as_subclass(Tagged), torch.ones(2)),
    "sparse": lambda: with_gradients(torch.tensor([3.0, 0.0, 4.0]).to_sparse()),
    "complex": lambda: with_gradients(torch.tensor([3.0 + 4j])),
    "16 bits of both kinds": lambda: with_gradients(torch.ones(2).half(), torch.ones(2).bfloat16()),
    "negative view": lambda: with_gradients(torch.tensor([1 + 3j, 1 - 4j]).conj().imag),
    "meta": lambda: with_gradients(torch.ones(2, device="meta")),
    "no tensors": lambda: [nn.Module()],  # type: ignore[list-item]
}


def outcome(call: Callable[[], Any], parameters: list[Any]) -> Any:
    """What a call returns or raises, and the gradients after it."""
    try:
        result = call()
    except Exception as error:
        result = (type(error), str(error))
    gradients = [getattr(parameter, "grad", None) for parameter in parameters]
    # As texts, in which NaN is what it is.
    values = [x.to_dense() if isinstance(x, Tensor) else x for x in (result, *gradients)]
    return [str(x.tolist()) if isinstance(x, Tensor) and x.device.type != "meta" else str(x) for x in values]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.usefixtures("to_torch")
def test_other_gradients(name: str) -> None:
    ours, theirs = OTHERS[name](), OTHERS[name]()
    assert outcome(lambda: fastmlp.clip_grad_norm_(ours, 0.5), ours) == outcome(lambda: torch_norm(theirs, 0.5), theirs)
    if name != "16 bits of both kinds":
        ours, theirs = OTHERS[name](), OTHERS[name]()
        assert outcome(lambda: fastmlp.clip_grad_value_(ours, 0.5), ours) == outcome(
            lambda: torch_value(theirs, 0.5), theirs
        )


@pytest.mark.parametrize("order", [0, 1, 1.5, 3, -2.0, -math.inf])
@pytest.mark.usefixtures("to_torch")
def test_other_norms(order: float) -> None:
    ours, theirs = with_gradients(torch.tensor([3.0, 4.0])), with_gradients(torch.tensor([3.0, 4.0]))
    assert outcome(lambda: fastmlp.clip_grad_norm_(ours, 0.5, order), ours) == outcome(
        lambda: torch_norm(theirs, 0.5, order), theirs
    )


@pytest.mark.usefixtures("to_torch")
def test_the_largest_magnitude_of_nothing() -> None:
    ours, theirs = with_gradients(torch.ones(2), torch.ones(0)), with_gradients(torch.ones(2), torch.ones(0))
    assert outcome(lambda: fastmlp.clip_grad_norm_(ours, 0.5, math.inf), ours) == outcome(
        lambda: torch_norm(theirs, 0.5, math.inf), theirs
    )


@pytest.mark.parametrize("limit", [1e300, math.nan, 10**400])
@pytest.mark.usefixtures("to_torch")
def test_other_values(limit: float) -> None:
    for dtype in DTYPES:
        ours, theirs = with_gradients(torch.ones(3, dtype=dtype)), with_gradients(torch.ones(3, dtype=dtype))
        assert str(outcome(lambda: fastmlp.clip_grad_value_(ours, limit), ours)) == str(  # noqa: B023
            outcome(lambda: torch_value(theirs, limit), theirs)  # noqa: B023
        )


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Deterministic:
    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


WATCHERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "function mode": Functions,
    "dispatch mode": Operations,
    "profiler": profile,
    "deterministic": Deterministic,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "forward mode": forward_ad.dual_level,
}


@pytest.mark.parametrize("name", WATCHERS)
def test_watched(name: str, to_torch: list[str]) -> None:
    ours, theirs = with_gradients(torch.tensor([3.0, 4.0])), with_gradients(torch.tensor([3.0, 4.0]))
    with WATCHERS[name]():
        found = fastmlp.clip_grad_norm_(ours, 1.0), fastmlp.clip_grad_value_(ours, 0.5)  # type: ignore[func-returns-value]
        expected = torch_norm(theirs, 1.0), torch_value(theirs, 0.5)
    assert found == expected
    assert_same([p.grad for p in ours if p.grad is not None], [p.grad for p in theirs if p.grad is not None])
    assert to_torch == ["norm", "value"]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", ["nothing", "no_grad", "default device"])
def test_not_watched(name: str) -> None:
    contexts: dict[str, AbstractContextManager[Any]] = {
        "nothing": nullcontext(),
        "no_grad": torch.no_grad(),
        "default device": torch.device("cpu"),
    }
    with contexts[name]:
        assert fastmlp.clip_grad_norm_(with_gradients(torch.tensor([3.0, 4.0])), 1.0) == 5


def test_reading_what_gets_no_gradient_warns() -> None:
    inner = torch.ones(2, requires_grad=True) * 2
    with pytest.warns(UserWarning, match="not a leaf"):
        fastmlp.clip_grad_norm_([inner], 1.0)
    kept = torch.ones(2, requires_grad=True) * 2
    kept.retain_grad()
    (kept * 3).sum().backward()
    assert fastmlp.clip_grad_norm_([kept], 1.0) > 4
    assert kept.grad is not None
    assert kept.grad.norm() < 1.001


@pytest.mark.parametrize("function", ["norm", "value"])
def test_captured(function: str) -> None:
    """Recorded as torch's operations: a captured loop that calls ours is the one that calls torch's."""

    def trained(utils: Any) -> tuple[list[Tensor], fastmlp.Captured[..., Any]]:
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        inputs = [torch.randn(16, 4) for _ in range(8)]

        @fastmlp.capture
        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = (model(x) - 3).square().mean()
            loss.backward()
            if function == "norm":
                loss = loss + utils.clip_grad_norm_(model.parameters(), 0.1)
            else:
                utils.clip_grad_value_(model.parameters(), 0.05)
            optimizer.step()
            return loss.detach()

        return [*(step(x) for x in inputs), *(p.detach() for p in model.parameters())], step

    (found, ours), (expected, theirs) = trained(fastmlp), trained(nn.utils)
    assert_same(found, expected)
    assert ours.replays == theirs.replays > 0


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch.compile may lag behind the newest Python")
def test_compiled() -> None:
    gradients = [torch.tensor([3.0, 4.0]), torch.ones(2)]
    parameters = with_gradients(*gradients)

    @torch.compile(backend="eager")
    def clip() -> Tensor:
        fastmlp.clip_grad_value_(parameters, 3.5)
        return fastmlp.clip_grad_norm_(parameters, 1.0)

    expected = with_gradients(torch.tensor([3.0, 3.5]), torch.ones(2))
    assert_same([clip()], [torch_norm(expected, 1.0)])
    assert_same(gradients, [p.grad for p in expected if p.grad is not None])

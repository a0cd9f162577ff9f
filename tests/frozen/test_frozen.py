"""`freeze`: what it takes, how its result follows a model, and how it behaves among tensors, arrays and threads."""

import copy
import gc
import pickle
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call

import fastmlp
from fastmlp import _C, FrozenMLP, freeze
from tests.support.derivatives import assert_same
from tests.support.small import Net, sequential
from tests.support.to_freeze import BAD, MODELS, X

# What is taken.


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_models(make: Callable[[], nn.Module]) -> None:
    model = make().eval().double()
    state = copy.deepcopy(model.state_dict())
    frozen = freeze(model)
    for rows in (1, 2, 50):
        x = torch.randn(rows, 4, dtype=torch.float64)
        with torch.no_grad():
            assert_same([frozen(x)], [model(x)])
    assert frozen.in_features == 4
    assert frozen.out_features == model(x).shape[1]
    # The model is as it was, and so is the mode it was in.
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert_same([pickle.loads(pickle.dumps(frozen))(x)], [frozen(x)])


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no module": (lambda: torch.relu, "model must be a torch.nn.Module"),
    "no layer": (nn.Sequential, "it has no layer"),
    "norm without statistics": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)),
        "no running statistics",
    ),
    "other norm": (lambda: nn.Sequential(nn.Linear(4, 3), nn.GroupNorm(1, 3)), r"1 \(GroupNorm\)"),
    "sums of rows": (lambda: Net(lambda x: x + x.sum(1, keepdim=True)), "sum"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(make: Callable[[], Any], message: str) -> None:
    model = make()
    with pytest.raises(TypeError, match=message):
        freeze(model.eval() if isinstance(model, nn.Module) else model)


@pytest.mark.parametrize("module", [nn.Dropout(0.1), nn.AlphaDropout(0.1), nn.BatchNorm1d(3)], ids=repr)
def test_training_mode_is_refused(module: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 3), module)
    with pytest.raises(TypeError, match=r"1 .* it is in training mode; call model.eval\(\) first"):
        freeze(model)
    freeze(model.eval())


def test_dropout_of_nothing_is_taken() -> None:
    freeze(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0)).train())


def test_hooks_are_refused() -> None:
    model = sequential()
    model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match=r"1 \(ReLU\) .* it has hooks"):
        freeze(model)


def test_dtypes_and_devices() -> None:
    with pytest.raises(ValueError, match=r"dtype must be None or torch.bfloat16, got torch.float16"):
        freeze(sequential(), dtype=torch.float16)
    mixed = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3).double())
    with pytest.raises(RuntimeError, match=r"1.weight has dtype torch.float64, expected torch.float32"):
        freeze(mixed)
    with pytest.raises(RuntimeError, match=r"0.weight has dtype torch.complex64, expected one of float32"):
        freeze(nn.Sequential(nn.Linear(4, 5, dtype=torch.complex64)))
    with pytest.raises(RuntimeError, match=r"0.weight is on meta, and there are no kernels for the device"):
        freeze(sequential().to("meta"))
    with pytest.raises(RuntimeError, match=r"1.weight has shape \[3, 6\], expected 5 in the last"):
        freeze(nn.Sequential(nn.Linear(4, 5), nn.Linear(6, 3)))
    with FakeTensorMode():
        fake = sequential()
    with pytest.raises(RuntimeError, match=r"0.weight cannot be frozen: "):
        freeze(fake)


@pytest.mark.parametrize(
    "make",
    [FrozenMLP, lambda: FrozenMLP.__new__(FrozenMLP), _C.Frozen],
    ids=["called", "made by __new__", "of the extension"],
)
def test_a_class_without_a_network(make: Callable[[], Any]) -> None:
    frozen = make()
    with pytest.raises(RuntimeError, match="holds no network"):
        frozen(torch.zeros(1))
    if isinstance(frozen, FrozenMLP):
        assert "holds no network" in repr(frozen)
        for read in (pickle.dumps, copy.copy, copy.deepcopy, lambda frozen: frozen.in_features, lambda f: f.nbytes):
            with pytest.raises(RuntimeError, match="holds no network"):
                read(frozen)
        with pytest.raises(RuntimeError, match="there is no model to refresh from"):
            frozen.refresh()


W = torch.ones(3, 4)
LOADED: dict[str, tuple[tuple[Any, ...], str]] = {
    "no layers": (([], [], [], []), "at least one layer"),
    "fewer weights": (([W], [None, None], [0, 0], [0.0] * 4), "a weight for each of 2 layers, got 1"),
    "more weights": (([W, W], [None], [0], [0.0] * 2), "a weight for each of 1 layers, got 2"),
    "kinds": (([W], [None], [0, 0], [0.0] * 2), "one activation for each of 1 layers, got 2"),
    "no such kind": (([W], [None], [999], [0.0] * 2), "activation 999 of layer 0 does not exist"),
    "scalars": (([W], [None], [0], [0.0]), "two scalars for each of 1 layers, got 1"),
    "sparse": (([W.to_sparse()], [None], [0], [0.0] * 2), r"weights\[0\] is not a plain tensor"),
    "meta": (([W.to("meta")], [None], [0], [0.0] * 2), r"weights\[0\] is on meta, expected the CPU"),
    "meta bias": (([W], [torch.ones(3, device="meta")], [0], [0.0] * 2), r"biases\[0\] is on meta, expected cpu"),
    "sparse bias": (([W], [torch.ones(3).to_sparse()], [0], [0.0] * 2), r"biases\[0\] is not a plain tensor"),
    "integers": (([W.int()], [None], [0], [0.0] * 2), "weights have dtype torch.int32, expected torch.float32"),
    "mixed": (
        ([W, torch.ones(2, 3).double()], [None] * 2, [0] * 2, [0.0] * 4),
        r"weights\[1\] has dtype torch.float64",
    ),
    "vector": (([torch.ones(3)], [None], [0], [0.0] * 2), "expected two dimensions"),
    "not a chain": (
        ([W, W], [None] * 2, [0] * 2, [0.0] * 4),
        r"weights\[1\] has shape \[3, 4\], expected 3 in the last",
    ),
    "bias": (([W], [torch.ones(4)], [0], [0.0] * 2), r"biases\[0\] has shape \[4\], expected \[3\]"),
    "bias dtype": (([W], [torch.ones(3).double()], [0], [0.0] * 2), r"biases\[0\] has dtype torch.float64, expected"),
    "more than memory": (
        ([torch.ones(1, 1).expand(1 << 30, 1 << 30)], [None], [0], [0.0] * 2),
        "more than a frozen network can hold",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), LOADED.values(), ids=LOADED.keys())
def test_loading_checks_what_it_is_given(arguments: tuple[Any, ...], message: str) -> None:
    frozen = freeze(sequential())
    expected = frozen(X)
    load: Any = _C.load_frozen
    load_on_device: Any = _C.load_frozen_on_device
    with pytest.raises((RuntimeError, ValueError), match=message):
        load(frozen, None, *arguments, False, False, False, "none", [])
    if "expected the CPU" not in message:
        with pytest.raises((RuntimeError, ValueError), match=message):
            load_on_device(frozen, None, *arguments, False, False, "none", [])
    with pytest.raises(TypeError, match="expected a FrozenMLP, got Linear"):
        load(nn.Linear(1, 1), None, [W], [None], [0], [0.0] * 2, False, False, False, "none", [])
    assert torch.equal(frozen(X), expected)


class Branches(nn.Module):
    """Like a residual block, with a result that is used twice."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)
        self.own = forward

    def forward(self, x: Tensor) -> Any:
        return self.own(self, x)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


UNCLEAR: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "norm after": (
        lambda: freeze(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(5)).eval()),
        RuntimeError,
        r"1.running_mean has shape \[5\], expected \[3\], the out_features of 0",
    ),
    "norm before": (
        lambda: freeze(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(4, 3)).eval()),
        RuntimeError,
        r"0.running_mean has shape \[5\], expected \[4\], the in_features of 1",
    ),
    "compiled": (
        lambda: freeze(compiled(sequential())),
        TypeError,
        "what torch.compile returned, .* freeze the module itself, compiled._orig_mod",
    ),
    "compiled inside": (
        lambda: freeze(nn.Sequential(OrderedDict(a=compiled(nn.Linear(4, 3))))),
        TypeError,
        "what torch.compile returned",
    ),
    "branches": (
        lambda: freeze(Branches(lambda m, x: (lambda h: m.fc2(h) + h.mean(0))(m.act(m.fc1(x))))),
        TypeError,
        "uses the result of act 2 times, where a chain does once; nor is it a graph of layers: .* calls mean: ",
    ),
    "branches of the input": (
        lambda: freeze(Branches(lambda m, x: m.fc1(x) @ m.fc2(x))),
        TypeError,
        "uses its input x 2 times, where a chain does once; nor is it a graph of layers",
    ),
    "dtype": (
        lambda: freeze(sequential(), dtype=torch.float64),
        ValueError,
        "fastmlp: dtype must be None or torch.bfloat16",
    ),
    "meta input": (lambda: freeze(sequential())(X.to("meta")), RuntimeError, "input is on meta, expected cpu"),
    "a layer by itself": (
        lambda: freeze(nn.Linear(4, 3, dtype=torch.complex64)),
        RuntimeError,
        "fastmlp: weight has dtype torch.complex64",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), UNCLEAR.values(), ids=UNCLEAR.keys())
def test_errors_say_what_to_do(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^fastmlp: .*{message.removeprefix('fastmlp: ')}"):
        call()


# How it looks, and copies.


def test_text_and_sizes() -> None:
    model = fastmlp.MLP(10, [50], 1)
    assert repr(freeze(model)) == "FrozenMLP(10 -> 50 relu -> 1, torch.float32)"
    text = "FrozenMLP(10 -> 50 relu -> 1, torch.float32, weights torch.bfloat16)"
    assert repr(freeze(model, dtype=torch.bfloat16)) == text
    frozen = freeze(nn.Sequential(nn.Linear(1024, 1024), nn.LeakyReLU(0.5)))
    assert repr(frozen) == "FrozenMLP(1024 -> 1024 leaky_relu(negative_slope=0.5), torch.float32)"
    assert 1 << 22 <= frozen.nbytes < (1 << 22) + 10000


def test_copies_hold_the_weights_alone(isa: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(7, 33), nn.LeakyReLU(0.3), nn.Linear(33, 2, bias=False)).to(dtype)
    for option in (None, torch.bfloat16):
        frozen = freeze(model, dtype=option)
        x = torch.randn(5, 7).to(torch.float32 if option else dtype)
        expected = frozen(x)
        for copied in (copy.deepcopy(frozen), copy.copy(frozen), pickle.loads(pickle.dumps(frozen))):
            assert torch.equal(copied(x), expected)
            assert (repr(copied), copied.nbytes) == (repr(frozen), frozen.nbytes)
            assert (copied.in_features, copied.out_features) == (7, 2)
            with torch.no_grad():
                next(model.parameters()).mul_(2)
            assert torch.equal(copied(x), expected)
            assert not torch.equal(frozen(x), expected)
            with pytest.raises(RuntimeError, match="there is no model"):
                copied.refresh()
            with torch.no_grad():
                next(model.parameters()).div_(2)
            assert torch.equal(frozen(x), expected)


# How it follows the model.


def test_it_notices_changes() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Sequential(nn.Linear(5, 3))).eval()
    frozen = freeze(model)
    x = torch.randn(6, 4)
    layer, batch_norm, last = model[0], model[1], model[3]
    assert isinstance(layer, nn.Linear)
    assert isinstance(batch_norm, nn.BatchNorm1d)
    assert isinstance(last, nn.Sequential)
    assert batch_norm.running_mean is not None
    assert batch_norm.running_var is not None

    before = frozen(x)

    def seen() -> None:
        nonlocal before
        found = frozen(x)
        assert not torch.equal(found, before)
        # One that is made now has the same bits.
        assert torch.equal(freeze(model)(x), found)
        assert torch.equal(frozen(x), found)
        before = found

    with torch.no_grad():
        layer.weight.mul_(2)
        seen()
        layer.bias.add_(1)
        seen()
        batch_norm.running_mean.add_(1)
        seen()
        batch_norm.running_var.mul_(2)
        seen()
        batch_norm.weight.mul_(2)
        seen()
        batch_norm.bias.add_(1)
        seen()
    layer.weight = nn.Parameter(torch.randn(5, 4))
    seen()
    layer.register_parameter("bias", None)
    seen()
    layer.weight.data = torch.randn(5, 4)
    seen()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(x).sum().backward()
    optimizer.step()
    seen()
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    seen()
    model[2] = nn.Sigmoid()
    seen()
    last[0] = nn.Linear(5, 3)
    seen()
    last.append(nn.ReLU())
    seen()
    del last[1]
    seen()
    model[3] = nn.Linear(5, 3)
    seen()
    layer.weight.data.mul_(2)
    assert torch.equal(frozen(x), before)
    frozen.refresh()
    seen()
    model[2] = nn.LeakyReLU(0.1)
    seen()
    setattr(model[2], "negative_slope", 0.5)  # noqa: B010
    seen()


def test_it_follows_dtypes_and_modes() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).eval()
    frozen = freeze(model)
    model.double()
    assert frozen(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(RuntimeError, match=r"torch.float32, expected torch.float64, .*; pass input.double\(\)"):
        frozen(torch.randn(2, 4))
    # Statistics of training are values like others.
    model.train()
    model(torch.randn(9, 4, dtype=torch.float64))
    x = torch.randn(2, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"1 \(BatchNorm1d\) cannot be frozen: it is in training mode"):
        frozen(x)
    model.eval()
    assert torch.equal(frozen(x), freeze(model)(x))


def test_a_model_that_cannot_be_frozen_any_more() -> None:
    model = sequential()
    frozen = freeze(model)
    x, out = torch.randn(2, 4), torch.full((2, 3), 7.0)
    before = frozen(x)
    model[1] = nn.GroupNorm(1, 5)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"1 \(GroupNorm\)"):
            frozen(x, out)
    assert (out == 7).all()
    model[1] = nn.ReLU()
    assert torch.equal(frozen(x), before)
    model[0].weight = nn.Parameter(torch.randn(6, 4))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"0.bias has shape \[5\], expected \[6\]"):
            frozen(x)
    model[0] = nn.Linear(4, 5)
    assert torch.equal(frozen(x), freeze(model)(x))


def test_recorded_models_are_followed() -> None:
    model = Net()
    frozen = freeze(model)
    x = torch.randn(3, 4)
    with torch.no_grad():
        model.fc2.weight.mul_(2)
    assert torch.equal(frozen(x), freeze(model)(x))
    model.fc1 = nn.Linear(4, 5)
    assert torch.equal(frozen(x), freeze(model)(x))


def test_swapped_parameters() -> None:
    model = sequential()
    frozen = freeze(model)
    x = torch.randn(2, 4)
    before = frozen(x)

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return frozen(x)

    zeros = {f"model.{name}": torch.zeros_like(value) for name, value in model.named_parameters()}
    assert (functional_call(Caller(), zeros, (x,)) == 0).all()
    assert torch.equal(frozen(x), before)


def test_it_outlives_the_model() -> None:
    model = sequential()
    frozen = freeze(model)
    x = torch.randn(2, 4)
    before = frozen(x)
    gone = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert [parameter() for parameter in gone] == [None] * 4
    assert torch.equal(frozen(x), before)
    assert torch.equal(frozen(x), before)
    with pytest.raises(RuntimeError, match="it does not exist any more"):
        frozen.refresh()


def test_it_goes_itself() -> None:
    model = sequential()
    gone = weakref.ref(freeze(model))
    gc.collect()
    assert gone() is None


def test_changes_in_inference_mode() -> None:
    with torch.inference_mode():
        model = sequential()
    frozen = freeze(model)
    x = torch.randn(2, 4)
    before = frozen(x)
    with torch.inference_mode():
        next(model.parameters()).mul_(2)
        assert torch.equal(frozen(x), before)
    frozen.refresh()
    assert not torch.equal(frozen(x), before)


def test_instruction_sets_change(isa: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(9, 35), nn.GELU(), nn.Linear(35, 4)).to(dtype)
    frozen, x = freeze(model), torch.randn(3, 9).to(dtype)
    expected = frozen(x)
    for other in ("portable", isa):
        fastmlp.set_isa(other)
        assert torch.equal(frozen(x), freeze(model)(x))
    assert torch.equal(frozen(x), expected)


# Inputs and outputs.


def test_shapes() -> None:
    model = sequential()
    frozen = freeze(model)
    for shape in ((4,), (1, 4), (0, 4), (2, 3, 4), (2, 0, 3, 4), (1, 1, 1, 1, 4)):
        x = torch.randn(shape)
        found = frozen(x)
        assert found.shape == model(x).shape
        assert found.is_contiguous()
        array = frozen(x.numpy())
        assert array.shape == found.shape
        assert array.dtype == np.float32
        assert np.array_equal(array, found.numpy())
    assert frozen(input=torch.zeros(4), out=None).shape == (3,)


def test_a_norm_takes_matrices() -> None:
    frozen = freeze(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval())
    for shape in ((4,), (2, 3, 4)):
        with pytest.raises(RuntimeError, match="expected two dimensions, since a BatchNorm1d"):
            frozen(torch.zeros(shape))
    assert frozen(torch.zeros(0, 4)).shape == (0, 3)


@pytest.mark.parametrize("guard", [0, 1, 3])
def test_out(dtype: torch.dtype, guard: int) -> None:
    for widths in ((4, 5, 3), (4, 40, 1), (4, 33)):
        model = fastmlp.MLP(widths[0], widths[1:-1], widths[-1], activation="tanh", dtype=dtype)
        frozen = freeze(model)
        for rows in (1, 2, 15, 31, 32, 100):
            x = torch.randn(rows, 4).to(dtype)
            size = rows * widths[-1]
            memory = torch.full((size + 2 * guard + 64,), 7.0, dtype=dtype)
            out = memory[guard : guard + size].view(rows, widths[-1])
            version = out._version
            assert frozen(x, out) is out
            assert out._version > version
            assert torch.equal(out, frozen(x))
            assert (memory[:guard] == 7).all()
            assert (memory[guard + size :] == 7).all()


def test_out_of_arrays() -> None:
    frozen = freeze(sequential())
    x = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    memory = np.full(20 * 3 + 8, 7, np.float32)
    out = memory[4:-4].reshape(20, 3)
    assert frozen(x, out=out) is out
    assert np.array_equal(out, frozen(x))
    assert (memory[:4] == 7).all()
    assert (memory[-4:] == 7).all()


@pytest.mark.parametrize(("error", "message", "arguments"), BAD.values(), ids=BAD.keys())
def test_errors(error: type[Exception], message: str, arguments: Callable[[], tuple[Any, ...]]) -> None:
    frozen: Any = freeze(sequential())
    given = arguments()
    outs = [
        out for out in given[1:2] if isinstance(out, np.ndarray) or (isinstance(out, Tensor) and out.device == X.device)
    ]
    before = [copy.deepcopy(out) for out in outs]
    with pytest.raises(error, match=message):
        frozen(*given)
    for out, copied in zip(outs, before, strict=True):
        unchanged: Any = out == copied
        assert unchanged.all()
    assert frozen(X).shape == (2, 3)


def test_keywords() -> None:
    frozen: Any = freeze(sequential())
    with pytest.raises(TypeError, match="got the keyword 'output'"):
        frozen(X, output=X)
    with pytest.raises(TypeError, match="each once, got the keyword 'input'"):
        frozen(X, input=X)


def test_neighbours_in_memory_do_not_overlap() -> None:
    frozen = freeze(sequential())
    memory = torch.randn(2 * 4 + 2 * 3)
    x, out = memory[:8].view(2, 4), memory[8:].view(2, 3)
    expected = frozen(x)
    assert torch.equal(frozen(x, out), expected)
    empty = memory[:0].view(0, 4)
    assert frozen(empty, memory[:0].view(0, 3)).shape == (0, 3)


def test_inference_mode() -> None:
    frozen = freeze(sequential())
    with torch.inference_mode():
        out = torch.zeros(2, 3)
        assert frozen(X, out) is out
        assert frozen(X).is_inference()
    with torch.no_grad():
        assert not frozen(X.clone().requires_grad_()).requires_grad


def test_bfloat16_has_no_arrays() -> None:
    frozen = freeze(sequential().bfloat16())
    with pytest.raises(TypeError, match="dtype bfloat16, which NumPy lacks"):
        frozen(np.zeros((2, 4), np.float32))
    assert freeze(sequential(), dtype=torch.bfloat16)(np.zeros((2, 4), np.float32)).dtype == np.float32


# Among the modes of torch.


def test_autocast_has_no_effect() -> None:
    frozen = freeze(sequential())
    x = torch.randn(3, 4)
    expected = frozen(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(x), expected)


def test_default_devices_have_no_effect() -> None:
    frozen = freeze(sequential())
    with torch.device("meta"):
        assert frozen(X).device.type == "cpu"


class Own(Tensor):
    """A subclass without anything of its own."""


def in_forward_mode(frozen: FrozenMLP) -> Any:
    with forward_ad.dual_level():
        return frozen(forward_ad.make_dual(X, X))


def in_fake_mode(frozen: FrozenMLP) -> Any:
    with FakeTensorMode():
        return frozen(torch.zeros(2, 4))


MODES: dict[str, Callable[[FrozenMLP], Any]] = {
    "vmap": lambda frozen: torch.func.vmap(frozen)(X),
    "jacrev": lambda frozen: torch.func.jacrev(frozen)(X),
    "jacfwd": lambda frozen: torch.func.jacfwd(frozen)(X),
    "functionalize": lambda frozen: torch.func.functionalize(frozen)(X),
    "dual": in_forward_mode,
    "fake": in_fake_mode,
    "subclass": lambda frozen: frozen(X.as_subclass(Own)),
    "jit": lambda frozen: torch.jit.trace(lambda x: frozen(x), X),
}


@pytest.mark.parametrize("use", MODES.values(), ids=MODES.keys())
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modes(use: Callable[[FrozenMLP], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"call the model that it was made from|requires grad"):
        use(freeze(sequential()))


def test_compile_breaks_its_graph() -> None:
    frozen = freeze(sequential())

    def function(x: Tensor) -> Tensor:
        return frozen(x * 2) + 1

    x = torch.randn(3, 4)
    compiled = torch.compile(function, backend="eager")
    assert torch.equal(compiled(x), function(x))


# Among threads, and over time.


@pytest.fixture
def one_thread_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread_each")
def test_concurrent_calls(dtype: torch.dtype) -> None:
    model = fastmlp.MLP(20, [100, 70], 5, dtype=dtype)
    frozen = freeze(model)
    inputs = [torch.randn(rows, 20).to(dtype) for rows in (1, 7, 40, 300)] * 2
    expected = [frozen(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.equal(frozen(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.usefixtures("one_thread_each")
def test_changes_while_others_call() -> None:
    """Every result is of weights that the model had at one time, all of a layer from the same."""
    model = nn.Linear(300, 200, bias=False)
    frozen = freeze(model)
    x = torch.ones(50, 300)
    stop = threading.Event()
    wrong: list[Tensor] = []

    def work() -> None:
        while not stop.is_set():
            found = frozen(x)
            if not (found == found[0, 0]).all():
                wrong.append(found)

    with torch.no_grad():
        model.weight.fill_(1)
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for value in range(100):
        model.weight = nn.Parameter(torch.full((200, 300), float(value)))
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (frozen(x) == 300 * 99).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("later", [False, True])
def test_a_bias_of_another_dtype_is_refused(dtype: torch.dtype, later: bool) -> None:
    """As the model itself refuses it."""
    model = nn.Sequential(nn.Linear(4, 3))
    frozen = freeze(model) if later else None
    model[0].bias = nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=False)
    with pytest.raises(RuntimeError, match=rf"^fastmlp: 0.bias has dtype {dtype}, expected torch.float32"):
        freeze(model) if frozen is None else frozen(torch.zeros(1, 4))

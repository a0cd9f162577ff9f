"""Frozen networks as they are on other devices than the CPU: a copy of the parameters, and the device's own inference.

Here that device is the CPU, made to hold them so; tests/cuda/test_cuda.py has a GPU. What is refused where there are no
kernels is tested with fake tensors.
"""

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastmlp
from fastmlp import _C, FrozenMLP, autograd, freeze, frozen
from fastmlp.activations import IDENTITY, resolve
from tests.support import bounds
from tests.support.bounds import assert_within
from tests.support.derivatives import assert_same
from tests.support.endings import FORMS, HEADS, body
from tests.support.layouts import CUDA_LAYOUTS
from tests.support.small import norm, sequential
from tests.support.to_freeze import BAD, MODELS


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's weights are held as another device's would be."""
    monkeypatch.setattr(frozen, "_is_packed", lambda device: False)


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_models(make: Callable[[], nn.Module]) -> None:
    model = make().eval().double()
    network = freeze(model)
    for rows in (1, 2, 50):
        x = torch.randn(rows, 4, dtype=torch.float64)
        with torch.no_grad():
            assert_same([network(x)], [model(x)])
    assert network.in_features == 4
    assert network.out_features == model(x).shape[1]
    for copied in (pickle.loads(pickle.dumps(network)), copy.deepcopy(network), copy.copy(network)):
        assert torch.equal(copied(x), network(x))
        assert copied.nbytes == network.nbytes
        assert repr(copied) == repr(network)


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize(
    ("outputs", "make"), [*((5, make) for _, make in HEADS.values()), *FORMS.values()], ids=[*HEADS, *FORMS]
)
def test_endings(outputs: int, make: Callable[[nn.Sequential], nn.Module]) -> None:
    """A softmax is the device's own operation, and another shape a view."""
    model: Any = make(body(outputs))
    network = freeze(model)
    for rows in (1, 2, 50):
        x = torch.randn(rows, 6, dtype=torch.float64)
        with torch.no_grad():
            assert_same([network(x)], [model(x)])
        out = torch.full_like(network(x), float("nan"))
        assert network(x, out=out) is out
        assert torch.equal(out, network(x))
    for copied in (pickle.loads(pickle.dumps(network)), copy.copy(network)):
        assert torch.equal(copied(x), network(x))
        assert repr(copied) == repr(network)


@pytest.mark.usefixtures("unpacked")
def test_another_softmax_is_noticed() -> None:
    model: Any = nn.Sequential(*body(5), nn.Softmax(-1))
    network, x = freeze(model), torch.randn(3, 6, dtype=torch.float64)
    model[5] = nn.LogSoftmax(-1)
    assert_follows(network, model, x)
    with torch.no_grad():
        model[4].bias.add_(1)
    assert_follows(network, model, x)
    del model[5]
    assert_follows(network, model, x)


@pytest.mark.usefixtures("unpacked")
def test_it_is_the_model_s_own_inference(dtype: torch.dtype) -> None:
    """Bit for bit, for every shape and layout, in memory of its own or of the caller."""
    model = fastmlp.MLP(6, [50, 17], 3, "gelu", dtype=dtype)
    network = freeze(model)
    assert network.nbytes == sum(p.nbytes for p in model.parameters())
    inputs = [torch.randn(shape, dtype=dtype) for shape in ((6,), (35, 6), (2, 3, 6), (0, 6), (4, 0, 6), (1, 1, 1, 6))]
    inputs += [arrange(torch.randn(35, 6, dtype=dtype)) for arrange in CUDA_LAYOUTS.values()]
    inputs.append(torch.randn(3, 6, 5, dtype=dtype).transpose(1, 2))
    for x in inputs:
        with torch.no_grad():
            expected = model(x)
        found = network(x)
        assert not found.requires_grad
        assert torch.equal(found, expected)
        out = torch.full_like(expected, float("nan"))
        version = out._version
        assert network(x, out=out) is out
        assert torch.equal(out, expected)
        assert out._version == version + 1


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [case for case in BAD.values() if not any(isinstance(argument, np.ndarray) for argument in case[2]())],
    ids=[name for name, case in BAD.items() if not any(isinstance(argument, np.ndarray) for argument in case[2]())],
)
def test_arguments(error: type[Exception], message: str, arguments: Callable[[], tuple[Any, ...]]) -> None:
    network: Any = freeze(sequential())
    with pytest.raises(error, match=message):
        network(*arguments())


@pytest.mark.usefixtures("unpacked")
def test_arrays_are_refused() -> None:
    network = freeze(sequential())
    with pytest.raises(
        TypeError, match=r"input is a numpy.ndarray, but the frozen network is on cpu; pass a tensor of"
    ):
        network(np.zeros((2, 4), np.float32))
    with pytest.raises(RuntimeError, match="input requires grad"):
        network(torch.zeros(2, 4, requires_grad=True))


@pytest.mark.usefixtures("unpacked")
def test_bfloat16_between_float32_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype=torch.bfloat16 is for networks on the CPU.*model.bfloat16\(\)"):
        freeze(sequential(), dtype=torch.bfloat16)


def assert_follows(network: FrozenMLP, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        assert_same([network(x)], [model(x)])


@pytest.mark.usefixtures("unpacked")
def test_it_follows_its_model() -> None:
    model = sequential()
    network, x = freeze(model), torch.randn(5, 4)
    memory = _C.unload_frozen(network)[0][0].data_ptr()

    assert_follows(network, model, x)
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(2)
    assert_follows(network, model, x)
    model.get_parameter("0.weight").data.mul_(2)
    network.refresh()
    assert_follows(network, model, x)
    # Other values of the same shapes are written where the old ones were, in inference mode too.
    with torch.inference_mode():
        model.load_state_dict(sequential().state_dict())
        network(x)
    model.load_state_dict(sequential().state_dict())
    assert_follows(network, model, x)
    assert _C.unload_frozen(network)[0][0].data_ptr() == memory
    model[1] = nn.Tanh()
    assert_follows(network, model, x)
    model[0] = nn.Linear(4, 7, bias=False)
    model[2] = nn.Linear(7, 2)
    assert_follows(network, model, x)
    model.double()
    x = x.double()
    assert_follows(network, model, x)
    del model
    assert network(x).shape == (5, 2)


def test_a_network_goes_from_one_form_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a model moves to another device, or a pickle to another machine."""
    model = nn.Sequential(nn.Linear(4, 5), norm(5), nn.ReLU(), nn.Linear(5, 3)).bfloat16().eval()
    network, x = freeze(model), torch.randn(5, 4).bfloat16()
    packed = pickle.dumps(network)
    acts = [resolve("relu"), IDENTITY]

    def assert_computes(network: FrozenMLP, biases_in: torch.dtype) -> None:
        """From what it holds. Biases, in which statistics were folded, are rounded for a device's own kernels."""
        weights, biases, *_ = _C.unload_frozen(network)
        assert all(bias is not None and bias.dtype == biases_in for bias in biases)
        expected = bounds.network(x, weights, biases, acts, torch.zeros(5, 3, dtype=x.dtype))
        assert_within(network(x), expected.output, "output")

    assert_computes(network, torch.float32)
    monkeypatch.setattr(frozen, "_is_packed", lambda device: False)
    assert_computes(pickle.loads(packed), torch.bfloat16)
    network.refresh()
    assert_computes(network, torch.bfloat16)
    unpacked = pickle.dumps(network)
    monkeypatch.undo()
    assert_computes(pickle.loads(unpacked), torch.float32)
    network.refresh()
    assert_computes(network, torch.float32)


@pytest.mark.usefixtures("unpacked")
def test_threads_may_call_at_once() -> None:
    model = fastmlp.MLP(64, [64], 64)
    network, x = freeze(model), torch.randn(200, 64)
    expected = network(x)
    same = []
    threads = [threading.Thread(target=lambda: same.append(torch.equal(network(x), expected))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 8


# A build without CUDA kernels that is given tensors of a GPU.


def fake_layer() -> fastmlp.Linear:
    """On a GPU that may not exist; without gradients, which would want to know it."""
    layer = fastmlp.Linear(4, 5, device="meta")
    for name, shape in (("weight", (5, 4)), ("bias", (5,))):
        setattr(layer, name, nn.Parameter(torch.zeros(shape, device="cuda"), requires_grad=False))
    return layer


REBUILD = r"this build has no CUDA kernels; in the source tree, FASTMLP_CUDA=1 pip install"


@pytest.mark.skipif(_C.device_obstacle("cuda") is None, reason="the build has CUDA kernels")
def test_a_gpu_without_kernels_warns_once_and_computes() -> None:
    def calls() -> list[Tensor]:
        with FakeTensorMode(), torch.no_grad():
            layer, x = fake_layer(), torch.zeros(2, 4, device="cuda")
            functional = fastmlp.functional.linear(x, layer.weight, layer.bias, "relu")
            return [layer(x), fastmlp.Sequential(layer, nn.ReLU())(x), functional]

    autograd._warn_without_kernels.cache_clear()
    with pytest.warns(UserWarning, match=f"PyTorch's own operations run on CUDA tensors, since {REBUILD}") as warned:
        outputs = calls()
    assert len(warned) == 1
    assert all(y.shape == (2, 5) and y.device.type == "cuda" for y in outputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls()


@pytest.mark.skipif(_C.device_obstacle("cuda") is None, reason="the build has CUDA kernels")
def test_a_gpu_without_kernels_is_named() -> None:
    with FakeTensorMode(), torch.no_grad():
        layer, x = fake_layer(), torch.zeros(2, 4, device="cuda")
        with pytest.raises(RuntimeError, match=rf"weight is on cuda:0, and {REBUILD}"):
            freeze(layer)
        with pytest.raises(RuntimeError, match=rf"input is on cuda:0, and {REBUILD}"):
            _C.infer(fastmlp.ops.stack_of((True,), (layer.activation,)).native, x, [layer.weight, layer.bias])
        with pytest.raises(RuntimeError, match=r"input is on cpu, expected cuda:0, the device of weight"):
            layer(torch.zeros(2, 4, device="cpu"))
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        with pytest.raises(
            TypeError, match=r"weight is on cuda:0, expected the CPU \(for other devices write the loop"
        ):
            fastmlp.TrainStep(layer, nn.MSELoss(), optimizer)

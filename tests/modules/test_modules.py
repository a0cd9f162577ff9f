"""The modules as drop-ins for torch's."""

import copy
import inspect
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fastmlp
from fastmlp import Activation, reference
from fastmlp.activations import DEFAULTS, is_meant_as_activation, module_of, resolve
from tests.support.bounds import assert_within, network


def seeded(make: Callable[[], nn.Module], seed: int = 7) -> Any:
    torch.manual_seed(seed)
    return make()


def by_hand(*children: nn.Module) -> nn.Sequential:
    return nn.Sequential(*children)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_has_the_same_initial_bits_and_state(bias: bool) -> None:
    ours, torchs = seeded(lambda: fastmlp.Linear(7, 5, bias, activation="relu")), seeded(lambda: nn.Linear(7, 5, bias))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), torchs.parameters(), strict=True))
    assert list(ours.state_dict()) == list(torchs.state_dict())
    other = seeded(lambda: nn.Linear(7, 5, bias), 8)
    ours.load_state_dict(other.state_dict())
    torchs.load_state_dict(ours.state_dict())
    assert torch.equal(torchs.weight, other.weight)
    assert isinstance(ours, nn.Linear)


@pytest.mark.parametrize("place", ["cpu", "cpu:0", "meta", torch.device("cpu"), None])
def test_linear_takes_the_positional_arguments_of_torchs(place: Any) -> None:
    arguments = (7, 5, True, place, torch.float64)
    ours, torchs = seeded(lambda: fastmlp.Linear(*arguments)), seeded(lambda: nn.Linear(*arguments))
    assert repr(ours) == repr(torchs)
    for a, b in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert (a.device, a.dtype) == (b.device, b.dtype)
        assert a.is_meta or torch.equal(a, b)
    first, second = (list(inspect.signature(kind).parameters.values()) for kind in (fastmlp.Linear, nn.Linear))
    assert [(p.name, p.kind, p.default) for p in first[:-1]] == [(p.name, p.kind, p.default) for p in second]
    assert (first[-1].name, first[-1].kind) == ("activation", inspect.Parameter.KEYWORD_ONLY)


@pytest.mark.parametrize("activation", ["relu", "ReLU", "swish", torch.relu, nn.ReLU, nn.ReLU(), Activation("relu")])
@pytest.mark.parametrize("before", [(), (True,), (False,), (True, "cpu")])
def test_an_activation_by_position_is_refused(activation: Any, before: tuple[bool, ...]) -> None:
    """Where it would be taken for a device, or for a flag."""
    message = r"^fastmlp: activation is given by keyword: Linear\(10, 50, activation=\.\.\.\)$"
    make: Any = fastmlp.Linear
    with pytest.raises(TypeError, match=message):
        make(10, 50, *before, activation)


@pytest.mark.parametrize(
    "kind", ["cpu", "cuda", "xpu", "hip", "fpga", "maia", "xla", "vulkan", "mps", "hpu", "mtia", "meta"]
)
def test_no_device_is_taken_for_an_activation(kind: str) -> None:
    assert not any(is_meant_as_activation(device) for device in (kind, f"{kind}:0", torch.device(kind), 0))


def test_mlp_is_what_one_would_write_by_hand() -> None:
    ours = seeded(lambda: fastmlp.MLP(10, [50, 20], 3, nn.LeakyReLU(0.2), "sigmoid"))
    torchs = seeded(
        lambda: by_hand(
            nn.Linear(10, 50), nn.LeakyReLU(0.2), nn.Linear(50, 20), nn.LeakyReLU(0.2), nn.Linear(20, 3), nn.Sigmoid()
        )
    )
    assert list(ours.state_dict()) == list(torchs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), torchs.parameters(), strict=True))
    assert repr(ours) == repr(torchs).replace("Sequential(", "MLP(")
    weights, biases = [torchs[i].weight for i in (0, 2, 4)], [torchs[i].bias for i in (0, 2, 4)]
    acts = [resolve(nn.LeakyReLU(0.2)), resolve(nn.LeakyReLU(0.2)), resolve("sigmoid")]
    x = torch.randn(6, 10)
    assert_within(ours(x), network(x, weights, biases, acts, torch.randn(6, 3)).output, "output")


def test_no_hidden_layer_and_no_bias() -> None:
    assert repr(fastmlp.MLP(3, [], 2)) == repr(by_hand(nn.Linear(3, 2))).replace("Sequential", "MLP")
    assert all(m.bias is None for m in fastmlp.MLP(3, [4], 2, bias=False) if isinstance(m, nn.Linear))


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_activation_by_name_class_and_instance(name: str) -> None:
    act = Activation(name)
    assert resolve(module_of(act)) == act
    forms: list[Any] = [name, act, module_of(act)]
    if name not in ("gelu_tanh",):
        forms.append(type(module_of(act)))
    x = torch.randn(4, 6)
    results = [seeded(partial(fastmlp.Linear, 6, 5, activation=form))(x) for form in forms]
    assert all(torch.equal(results[0], r) for r in results)
    layer = seeded(lambda: fastmlp.Linear(6, 5, activation=name))
    assert_within(results[0], network(x, [layer.weight], [layer.bias], [act], torch.randn(4, 5)).output, name)
    mlp = fastmlp.MLP(6, [5], 2, name)
    assert fastmlp.explain(mlp, x).name == "direct"
    assert mlp(x).shape == (4, 2)


def test_every_reference_activation_has_kernels() -> None:
    assert set(reference.FUNCTIONS) == set(DEFAULTS) == set(reference.MODULES.values()) | {"gelu_tanh"}


def test_repr() -> None:
    assert repr(fastmlp.Linear(3, 4, activation=nn.ELU(0.5))).endswith("bias=True, activation=elu(alpha=0.5))")
    assert repr(fastmlp.Linear(3, 4)) == repr(nn.Linear(3, 4))


def test_vector_weight_as_in_torch() -> None:
    x, w = torch.randn(3, 4), torch.randn(4)
    torch.testing.assert_close(fastmlp.functional.linear(x, w, None, "relu"), torch.relu(nn.functional.linear(x, w)))


@pytest.mark.parametrize(
    "make", [lambda: fastmlp.Linear(4, 3, activation=nn.ELU(0.3)), lambda: fastmlp.MLP(4, [5], 3, "gelu")]
)
def test_copies(make: Callable[[], nn.Module]) -> None:
    module, x = make(), torch.randn(2, 4)
    for other in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        assert repr(other) == repr(module)


def test_saved_whole(tmp_path: Any) -> None:
    module, x = fastmlp.MLP(4, [5], 3, "gelu"), torch.randn(2, 4)
    torch.save(module, tmp_path / "module.pt")
    assert torch.equal(torch.load(tmp_path / "module.pt", weights_only=False)(x), module(x))
    torch.save(module.state_dict(), tmp_path / "state.pt")
    native = by_hand(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))
    native.load_state_dict(torch.load(tmp_path / "state.pt"))
    torch.testing.assert_close(native(x), module(x))


def test_meta_device_and_moves() -> None:
    with torch.device("meta"):
        mlp = fastmlp.MLP(4, [5], 3)
    assert mlp(torch.zeros(2, 4, device="meta")).shape == (2, 3)
    mlp.to_empty(device="cpu")
    for p in mlp.parameters():
        nn.init.ones_(p)
    assert mlp(torch.ones(1, 4)).tolist() == [[26.0] * 3]


def test_training_in_every_dtype(dtype: torch.dtype) -> None:
    """Losses fall as those of PyTorch's modules of the same dtype do."""
    x, t = torch.randn(64, 10), torch.randn(64, 1)
    last = []
    for kind in (fastmlp.MLP(10, [50], 1), by_hand(*fastmlp.MLP(10, [50], 1))):
        torch.manual_seed(1)
        for layer in kind:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        model = kind.to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x.to(dtype)), t.to(dtype))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.95 * losses[0]
        assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())
        last.append(losses[-1])
    # Each of 20 steps rounds parameters of size 1 once; the loss is of size 1.
    assert abs(last[0] - last[1]) <= 20 * torch.finfo(dtype).eps


def test_mixed_dtypes_raise(dtype: torch.dtype) -> None:
    layer = fastmlp.Linear(4, 3, dtype=dtype)
    for other in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        if other != dtype:
            with pytest.raises(RuntimeError, match=f"input has dtype {other}, expected {dtype}, the dtype of weight; "):
                layer(torch.randn(2, 4, dtype=other))


def test_dtypes_without_kernels_are_computed_by_torch() -> None:
    dtype = torch.complex64
    layer = fastmlp.Linear(4, 3, activation="tanh", dtype=dtype)
    x = torch.randn(2, 4, dtype=dtype)
    expected = torch.tanh(nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer(x), expected)
    layer(x).abs().float().sum().backward()
    assert layer.weight.grad is not None


def test_autocast() -> None:
    mlp = fastmlp.MLP(8, [16], 3)
    x = torch.randn(5, 8)
    native = by_hand(*mlp)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, torchs = mlp(x), native(x)
    assert ours.dtype == torchs.dtype == torch.bfloat16
    assert torch.equal(ours, torchs)


def test_activation_may_be_assigned() -> None:
    x = torch.randn(2, 4)
    layer: Any = fastmlp.Linear(4, 3)
    for form in ("tanh", nn.Tanh(), Activation("tanh")):
        layer.activation = form
        assert repr(layer).endswith("activation=tanh)")
        torch.testing.assert_close(layer(x), torch.tanh(nn.functional.linear(x, layer.weight, layer.bias)))
    mlp: Any = fastmlp.MLP(4, [5], 3)
    mlp[2].activation = "sigmoid"
    torch.testing.assert_close(mlp(x), nn.Sequential.forward(mlp, x))
    with pytest.raises(ValueError, match="activation must be one of"):
        layer.activation = "swish"


def test_symbolic_trace() -> None:
    for module in (fastmlp.Linear(4, 3, activation="elu"), fastmlp.MLP(4, [5], 3, "tanh")):
        x = torch.randn(2, 4)
        torch.testing.assert_close(torch.fx.symbolic_trace(module)(x), module(x))


def test_a_default_device_keeps_the_kernels() -> None:
    layer, x = fastmlp.Linear(4, 3, activation="relu"), torch.randn(2, 4)
    with torch.device("cpu"):
        assert fastmlp.explain(layer, x).name == "direct"
        layer(x).sum().backward()
    with torch.overrides.TorchFunctionMode():
        assert fastmlp.explain(layer, x).name == "composite"


def test_slices_of_mlp() -> None:
    mlp = fastmlp.MLP(4, [5], 3)
    part = mlp[:2]
    assert isinstance(part, nn.Sequential)
    assert part(torch.zeros(1, 4)).shape == (1, 5)
    assert list(mlp[1:].state_dict()) == list(by_hand(*mlp)[1:].state_dict())
    assert isinstance(mlp[-1], nn.Linear)
    assert [type(m).__name__ for m in mlp] == ["Linear", "ReLU", "Linear"]


def test_training_follows_torch() -> None:
    """Ten steps of the four-line loop in float64: the same losses, parameters and optimizer state."""
    x, t = torch.randn(32, 10, dtype=torch.float64), torch.randn(32, 1, dtype=torch.float64)
    runs = []
    for make in (
        lambda: fastmlp.MLP(10, [50], 1, "tanh"),
        lambda: by_hand(nn.Linear(10, 50), nn.Tanh(), nn.Linear(50, 1)),
    ):
        model = seeded(make).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), t)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        runs.append([torch.stack(losses), *model.parameters()])
    for a, b in zip(*runs, strict=True):
        # Ten steps of lr 0.05: rounding of one step is carried on, not amplified beyond its size times steps.
        assert (a - b).abs().max() <= 1e4 * torch.finfo(torch.float64).eps * b.abs().max()


def test_grad_fn_has_a_name() -> None:
    """Torch takes the end of a C++ name by default, which for a template is "FusedNetwork>"."""
    for module in (fastmlp.Linear(3, 2), fastmlp.MLP(3, [4], 2)):
        output = module(torch.ones(1, 3))
        node = output.grad_fn
        assert node is not None
        assert repr(output).endswith("grad_fn=<FusedNetworkBackward>)")
        assert repr(node).startswith("<FusedNetworkBackward object at 0x")
        # And it is a node like any other.
        assert len(node.next_functions) == 1 + len(list(module.parameters()))
        seen: list[tuple[torch.Tensor, ...]] = []
        node.register_prehook(lambda grads, seen=seen: seen.append(grads))
        output.sum().backward()
        assert len(seen) == 1
        assert torch.equal(seen[0][0], torch.ones(1, 2))

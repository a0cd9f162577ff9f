"""The library on a GPU, by `make gpu-test`: nothing of this can run without one, or in a build without CUDA kernels.

Modules, conversion, autocast, torch.compile and frozen networks; and what only a GPU has: streams, graphs, memory that
runs out. The kernels below them: tests/cuda/test_gpu_kernels.py.
"""

import copy
import gc
import io
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jacrev, jvp, vmap

import fastmlp
from fastmlp import _C, Activation, freeze, functional, reference
from fastmlp.activations import IDENTITY, module_of, resolve
from tests.support.bounds import assert_within, network
from tests.support.derivatives import assert_same
from tests.support.kernel_checks import KernelChecks
from tests.support.rounding import distance, rounding_bounds

if "cuda" not in _C.devices():
    pytest.skip("the build has no CUDA kernels", allow_module_level=True)
if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    # Of torch's own, at the first compilation.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

checks = KernelChecks(lambda: _C, "cuda", rounds_sums=True)

#: Half a second of the GPU's time.
A_WHILE = 1_000_000_000


@pytest.fixture(autouse=True)
def healthy() -> Iterator[None]:
    """An error that a kernel left behind is told by the test that launched it."""
    yield
    torch.cuda.synchronize()


@pytest.fixture
def only_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test fails if PyTorch's operations compute a network."""

    def fail(*_: object) -> None:
        raise AssertionError("the composite route ran")

    monkeypatch.setattr(reference, "mlp", fail)


# Modules.

WIDTHS = (6, 50, 17, 3)
GELU = resolve("gelu")
ACTS = (GELU, GELU, IDENTITY)


def native_network(dtype: torch.dtype, widths: Sequence[int] = WIDTHS, act: Activation = GELU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for k, n in pairwise(widths):
        layers += [nn.Linear(k, n, device="cuda", dtype=dtype), module_of(act)]
    return nn.Sequential(*layers[:-1])


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def as_mlp(native: nn.Sequential) -> fastmlp.MLP:
    sizes = [layer.out_features for layer in linears(native)]
    first = linears(native)[0].weight
    model = fastmlp.MLP(first.shape[1], sizes[:-1], sizes[-1], "gelu", device=first.device, dtype=first.dtype)
    model.load_state_dict(native.state_dict())
    return model


class Recorded(nn.Module):
    def __init__(self, native: nn.Sequential) -> None:
        super().__init__()
        self.first, self.second, self.third = linears(native)

    def forward(self, x: Tensor) -> Tensor:
        gelu = torch.nn.functional.gelu
        return self.third(gelu(self.second(gelu(self.first(x)))))


def by_layers(native: nn.Sequential) -> nn.Module:
    layers = linears(native)
    own = [fastmlp.Linear(m.in_features, m.out_features, activation=a) for m, a in zip(layers, ACTS, strict=True)]
    for layer, of_torch in zip(own, layers, strict=True):
        layer.weight, layer.bias = of_torch.weight, of_torch.bias
    # A child that is not fused stands between them.
    return fastmlp.Sequential(own[0], nn.Flatten(-1, -1), own[1], nn.Flatten(-1, -1), own[2])


def called(native: nn.Sequential) -> nn.Module:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(linears(native))

        def forward(self, x: Tensor) -> Tensor:
            layers = linears(self)
            return functional.mlp(x, [layer.weight for layer in layers], [layer.bias for layer in layers], ACTS)

    return Called()


def compiled(native: nn.Sequential) -> Any:
    torch._dynamo.reset()
    return torch.compile(fastmlp.Sequential(*native), backend="aot_eager", fullgraph=True)


FORMS: dict[str, Callable[[nn.Sequential], Any]] = {
    "MLP": as_mlp,
    "Sequential": lambda native: fastmlp.Sequential(*native),
    "converted": fastmlp.convert,
    "traced": lambda native: fastmlp.convert(Recorded(native), trace=True),
    "layers": by_layers,
    "functional": called,
    "compiled": compiled,
}


def assert_bounded(model: Any, input: Tensor, seed: Tensor, acts: Sequence[Activation] = ACTS) -> None:
    """Output and all gradients, under the bounds of the dtype of `seed`, which autocast may have made another one."""
    layers, low = linears(model), seed.dtype
    leaf = input.detach().requires_grad_()
    tensors = [leaf, *(p for layer in layers for p in (layer.weight, layer.bias))]
    output = model(leaf)
    assert output.dtype == low
    gradients = torch.autograd.grad(output, tensors, seed)
    weights = [layer.weight.detach().to(low) for layer in layers]
    biases: list[Tensor | None] = [layer.bias.detach().to(low) for layer in layers]
    expected = network(input.detach().to(low), weights, biases, acts, seed)
    assert_within(output.detach(), expected.output, "output")
    for i, (found, bound) in enumerate(zip(gradients, expected.gradients, strict=True)):
        assert found.dtype == input.dtype
        assert found.device == input.device
        assert_within(found.to(low), bound, f"gradient {i}")
    with torch.no_grad():
        assert torch.equal(model(input), output)


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_network(form: str, dtype: torch.dtype) -> None:
    model = FORMS[form](native_network(dtype))
    assert_bounded(model, checks.randn(35, 6, dtype=dtype), checks.randn(35, 3, dtype=dtype))


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_autocast(form: str, low: torch.dtype) -> None:
    model = FORMS[form](native_network(torch.float32))
    with torch.autocast("cuda", low):
        assert_bounded(model, checks.randn(35, 6), checks.randn(35, 3, dtype=low))


def test_autocast_inside_of_another_one() -> None:
    model = as_mlp(native_network(torch.float32))
    x = checks.randn(5, 6)
    with torch.autocast("cuda", torch.float16):
        model(x)
        with torch.autocast("cuda", torch.bfloat16):
            assert_bounded(model, x, checks.randn(5, 3, dtype=torch.bfloat16))
        with torch.autocast("cuda", enabled=False):
            assert model(x).dtype == torch.float32
        assert model(x).dtype == torch.float16


def test_routes() -> None:
    model, x = as_mlp(native_network(torch.float32)), checks.randn(5, 6)
    assert fastmlp.explain(model, x) == ("direct", "")
    assert fastmlp.explain(x.to(torch.complex64)).reason == "there are no kernels for the dtype"


@pytest.mark.parametrize("shape", [(6,), (2, 3, 6), (0, 6), (4, 0, 6)], ids=str)
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    native = native_network(torch.float64)
    model, x = as_mlp(native), checks.randn(*shape, dtype=torch.float64).requires_grad_()
    assert_same([model(x)], [native(x)])
    assert_same(torch.autograd.grad(model(x).sum(), x), torch.autograd.grad(native(x).sum(), x))


def test_devices_that_do_not_belong_together() -> None:
    cpu, gpu = torch.zeros(3, 4), torch.zeros(3, 4, device="cuda")
    for input, weight in ((cpu, gpu), (gpu, cpu)):
        message = f"input is on {input.device}, expected {weight.device}, the device of weight"
        with pytest.raises(RuntimeError, match=message):
            functional.linear(input, weight, None, "relu")
        with pytest.raises(RuntimeError, match=message):
            functional.linear(input, weight.requires_grad_(), None, "relu")
        with torch.autocast("cuda"), pytest.raises(RuntimeError, match=message):
            functional.linear(input, weight, None, "relu")
    with pytest.raises(RuntimeError, match=r"bias is on cpu, expected cuda:0, the device of input"):
        functional.linear(gpu, gpu.detach(), torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"input is on cpu, expected cuda:0, the device of .*weight"):
        as_mlp(native_network(torch.float32))(torch.zeros(5, 6))


def test_gradients_of_every_order() -> None:
    """gradcheck and gradgradcheck of kernels' first derivatives and of the graph that `create_graph` makes."""
    for act in (IDENTITY, resolve("tanh"), resolve("gelu"), Activation("softplus", beta=2.5, threshold=1.0)):
        for bias in (True, False):
            layer = fastmlp.Linear(3, 2, bias=bias, activation=act, device="cuda", dtype=torch.float64)
            x = checks.randn(2, 3, dtype=torch.float64).requires_grad_()
            tensors = (x, *layer.parameters())
            names = [name for name, _ in layer.named_parameters()]

            def run(x: Tensor, *parameters: Tensor, layer: nn.Module = layer, names: Sequence[str] = names) -> Any:
                return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

            assert gradcheck(run, tensors)
            assert gradgradcheck(run, tensors)


@pytest.mark.parametrize("act", ["tanh", "silu"])
def test_gradients_of_every_order_of_networks(act: str) -> None:
    model = fastmlp.MLP(2, [3, 2], 1, act, "sigmoid", device="cuda", dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    tensors = (checks.randn(2, 2, dtype=torch.float64).requires_grad_(), *model.parameters())

    def run(x: Tensor, *parameters: Tensor) -> Any:
        return functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    assert gradcheck(run, tensors)
    assert gradgradcheck(run, tensors)


def test_transforms() -> None:
    native = native_network(torch.float64)
    model, x = as_mlp(native), checks.randn(4, 6, dtype=torch.float64)
    transforms: list[Callable[[nn.Module], Tensor]] = [
        lambda f: vmap(f)(x),
        lambda f: jacrev(f)(x),
        lambda f: hessian(lambda x: f(x).sum())(x),
        lambda f: torch.stack(jvp(f, (x,), (x,))),
    ]
    for transform in transforms:
        assert_same([transform(model)], [transform(native)])


def test_one_checkpoint_for_both_devices(dtype: torch.dtype) -> None:
    """Saved on either, loaded on the other; both compute the same function within the bounds."""
    on_gpu = as_mlp(native_network(dtype))
    buffer = io.BytesIO()
    torch.save(on_gpu.state_dict(), buffer)
    buffer.seek(0)
    on_cpu = fastmlp.MLP(6, [50, 17], 3, "gelu", dtype=dtype)
    on_cpu.load_state_dict(torch.load(buffer, map_location="cpu"))
    x, seed = torch.randn(35, 6, dtype=dtype), torch.randn(35, 3, dtype=dtype)
    assert_bounded(on_cpu, x, seed)
    assert_bounded(on_gpu, x.cuda(), seed.cuda())
    again = fastmlp.MLP(6, [50, 17], 3, "gelu", device="cuda", dtype=dtype)
    again.load_state_dict(on_cpu.state_dict())
    assert torch.equal(again(x.cuda()), on_gpu(x.cuda()))


def test_a_model_moves_between_devices() -> None:
    model = as_mlp(native_network(torch.float32))
    x = checks.randn(5, 6)
    before = model(x)
    model.to("cpu")
    assert model(x.cpu()).device.type == "cpu"
    model.to("cuda")
    assert torch.equal(model(x), before)
    model.half()
    assert model(x.half()).dtype == torch.float16


def test_autotune_measures_once(tmp_path: Path) -> None:
    file = tmp_path / "choices.json"
    model, x = as_mlp(native_network(torch.float32)), checks.randn(77, 6)
    state = torch.cuda.get_rng_state()
    torch.ops.fastmlp_cuda.set_up(-1, 0)
    with fastmlp.autotune(file):
        model(x).sum().backward()
    written = file.read_text()
    with fastmlp.autotune(file):
        model(x).sum().backward()
    torch.ops.fastmlp_cuda.set_up(-1, -1)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert file.read_text() == written
    # A product of each layer: forward, and the gradients of weights and inputs.
    rows = json.loads(written)
    properties = torch.cuda.get_device_properties(0)
    assert {row["multiprocessors"] for row in rows} == {properties.multi_processor_count}
    assert {row["epilogue"] for row in rows if 77 in (row["m"], row["k"])} == {0, 1, 2}


# Training.


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    loss_fn = nn.MSELoss()
    for _ in range(50):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
    return {"loss": loss.detach().cpu(), **{name: p.detach().cpu() for name, p in model.named_parameters()}}


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_training_loop_is_native_s(dtype: torch.dtype) -> None:
    """After fifty steps what PyTorch has on the CPU, as far as rounding explains (tests/support/rounding.py)."""
    native = native_network(dtype, (10, 50, 1), resolve("tanh")).cpu()
    x, y = torch.randn(32, 10, dtype=dtype), torch.randn(32, 1, dtype=dtype)

    def run() -> dict[str, Tensor]:
        model = copy.deepcopy(native)
        return train(model, torch.optim.SGD(model.parameters(), lr=0.05), x, y)

    expected = run()
    bounds = rounding_bounds(run, expected, steps=True)
    ours = fastmlp.convert(copy.deepcopy(native)).cuda()
    found = train(ours, torch.optim.SGD(ours.parameters(), lr=0.05), x.cuda(), y.cuda())
    assert found["loss"] < torch.nn.functional.mse_loss(native(x), y)
    for name, bound in bounds.items():
        assert distance(found[name], expected[name]) <= bound, name


@pytest.mark.parametrize("name", fastmlp.optim.RULES)
def test_optimizers_are_torch_s_own(name: str) -> None:
    models = [as_mlp(native_network(torch.float32))]
    models.append(copy.deepcopy(models[0]))
    x, y = checks.randn(32, 6), checks.randn(32, 3)
    results = [
        train(model, getattr(module, name)(model.parameters(), lr=0.01), x, y)
        for model, module in zip(models, (fastmlp.optim, torch.optim), strict=True)
    ]
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


def test_train_step_names_the_device() -> None:
    model = as_mlp(native_network(torch.float32))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"0.weight is on cuda:0, expected the CPU \(for other devices write the loop"):
        fastmlp.TrainStep(model, nn.MSELoss(), optimizer)
    weighted = nn.CrossEntropyLoss(weight=torch.ones(3, device="cuda"))
    (problem,) = fastmlp.TrainStep.explain(model.cpu(), weighted, optimizer)
    assert problem == "the weight of loss_fn is on cuda:0, expected the CPU"
    step = fastmlp.TrainStep(model, nn.MSELoss(), optimizer)
    with pytest.raises(RuntimeError, match="input is on cuda:0, expected the CPU"):
        step(checks.randn(5, 6), torch.zeros(5, 3))
    model.cuda()
    with pytest.raises(RuntimeError, match=r"^fastmlp: .*: 0\.weight is on cuda:0, expected the CPU"):
        step(torch.randn(5, 6), torch.zeros(5, 3))


# Frozen networks.


@pytest.mark.parametrize("shape", [(6,), (35, 6), (2, 3, 6), (0, 6)], ids=str)
def test_frozen(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = as_mlp(native_network(dtype))
    frozen, x = freeze(model), checks.randn(*shape, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(frozen(x), expected)
    out = torch.full_like(expected, float("nan"))
    assert frozen(x, out=out) is out
    assert torch.equal(out, expected)
    assert repr(frozen) == f"FrozenMLP(6 -> 50 gelu -> 17 gelu -> 3, {dtype}, cuda:0)"
    assert frozen.nbytes == sum(p.nbytes for p in model.parameters())
    for copied in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(copied(x), expected)


def test_frozen_networks_follow_their_model() -> None:
    model = as_mlp(native_network(torch.float32))
    frozen, x = freeze(model), checks.randn(5, 6)
    with torch.no_grad():
        linears(model)[0].weight.mul_(2)
        assert torch.equal(frozen(x), model(x))
        linears(model)[0].weight.data.mul_(2)
        frozen.refresh()
        assert torch.equal(frozen(x), model(x))
        model.cpu()
        assert_within(frozen(x.cpu()), bounded_output(model, x.cpu()), "output on the CPU")
        model.cuda()
        assert torch.equal(frozen(x), model(x))


def bounded_output(model: nn.Module, x: Tensor) -> Any:
    layers = linears(model)
    seed = torch.zeros(len(x), layers[-1].out_features, dtype=x.dtype, device=x.device)
    weights, biases = [layer.weight.detach() for layer in layers], [layer.bias.detach() for layer in layers]
    return network(x, weights, biases, ACTS, seed).output


def test_frozen_networks_fold_norms() -> None:
    norm = nn.BatchNorm1d(50)
    norm(torch.randn(20, 50))
    model = nn.Sequential(nn.Linear(6, 50), norm, nn.ReLU(), nn.Linear(50, 3)).double().cuda().eval()
    x = checks.randn(5, 6, dtype=torch.float64)
    assert_same([freeze(model)(x)], [model(x)])


def test_frozen_errors_name_devices() -> None:
    model = as_mlp(native_network(torch.float32))
    frozen, x = freeze(model), checks.randn(5, 6)
    with pytest.raises(RuntimeError, match="input is on cpu, expected cuda:0, the device of the frozen network"):
        frozen(x.cpu())
    with pytest.raises(RuntimeError, match="out is on cpu, expected cuda:0"):
        frozen(x, out=torch.empty(5, 3))
    with pytest.raises(RuntimeError, match="out lies in the memory of input"):
        frozen(x, out=x.flatten()[:15].view(5, 3))
    with pytest.raises(RuntimeError, match="input is on cuda:0, expected cpu, the device of the frozen network"):
        freeze(copy.deepcopy(model).cpu())(x)
    with pytest.raises(ValueError, match=r"dtype=torch.bfloat16 is for networks on the CPU, and this one is on cuda:0"):
        freeze(model, dtype=torch.bfloat16)
    model[2].cpu()
    with pytest.raises(RuntimeError, match="2 is on cpu, expected cuda:0, where 0 is"):
        freeze(model)


# Streams, graphs and memory.

NETWORKS: dict[str, Callable[[], tuple[fastmlp.MLP, Tensor]]] = {
    "narrow": lambda: (fastmlp.MLP(8, [16, 16], 4, "tanh", device="cuda"), checks.randn(300, 8)),
    "wide": lambda: (
        fastmlp.MLP(256, [300, 304], 17, "gelu", device="cuda", dtype=torch.bfloat16),
        checks.randn(333, 256, dtype=torch.bfloat16),
    ),
}


@pytest.fixture(params=NETWORKS)
def networked(request: pytest.FixtureRequest) -> tuple[fastmlp.MLP, Tensor]:
    return NETWORKS[request.param]()


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients, for a gradient of ones."""
    leaf = x.detach().requires_grad_()
    output = model(leaf)
    return [output.detach(), *torch.autograd.grad(output, [leaf, *model.parameters()], torch.ones_like(output))]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def warm_up(call: Callable[[], object]) -> None:
    """As PyTorch's notes on graphs want it: on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("frozen", [False, True], ids=["model", "frozen"])
def test_graphs_of_inference(networked: tuple[fastmlp.MLP, Tensor], frozen: bool) -> None:
    model, x = networked
    call = freeze(model) if frozen else model
    with torch.no_grad():
        warm_up(lambda: call(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call(x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(output, model(x))
        if frozen:
            # What it holds is written where the graph reads it.
            linears(model)[0].weight.mul_(2)
            call(x)
            graph.replay()
            assert torch.equal(output, model(x))


def test_graphs_of_both_passes(networked: tuple[fastmlp.MLP, Tensor]) -> None:
    model, x = networked
    warm_up(lambda: results(model, x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(model, x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert_equal(found, results(model, x))


# make_graphed_callables itself runs the first backward on a stream of its own.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node:UserWarning")
def test_graphed_callables(networked: tuple[fastmlp.MLP, Tensor]) -> None:
    model, x = networked
    plain = copy.deepcopy(model)
    graphed: Any = torch.cuda.make_graphed_callables(model, (x.detach().requires_grad_(),))
    for _ in range(3):
        other = torch.randn_like(x)
        assert_equal(results(graphed, other), results(plain, other))
    leaf = x.detach().requires_grad_()
    first, second = graphed(leaf), graphed(leaf)
    assert first.data_ptr() == second.data_ptr(), "the module was called, and not its graph"


def test_side_streams(networked: tuple[fastmlp.MLP, Tensor]) -> None:
    """The input is written on the stream, late: kernels of another stream would read what was there before."""
    model, x = networked
    new = torch.randn_like(x)
    expected = results(model, new)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(A_WHILE // 5)
        x.copy_(new)
        found = results(model, x)
    stream.synchronize()
    assert_equal(found, expected)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_host_does_not_wait(networked: tuple[fastmlp.MLP, Tensor]) -> None:
    model, x = networked
    frozen = freeze(model)
    frozen(x), results(model, x)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(A_WHILE)
        results(model, x)
        frozen(x)
        done.record()
        assert not done.query(), "the calls returned after the GPU was done with them"
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_that_runs_out() -> None:
    """A call that fails raises, writes nothing, and leaves neither memory taken nor an error behind."""
    weight, bias = torch.zeros(2**16, 4, device="cuda"), torch.zeros(2**16, device="cuda")
    x = torch.zeros(2**24, 4, device="cuda", requires_grad=True)
    before = torch.cuda.memory_allocated()
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode), pytest.raises(torch.OutOfMemoryError):
            functional.linear(x, weight, bias, "relu")
    assert torch.cuda.memory_allocated() == before
    torch.cuda.synchronize()
    checks.one_layer(37, 16, 24, torch.float32, resolve("relu"))


def test_many_calls_leave_no_memory_behind(networked: tuple[fastmlp.MLP, Tensor]) -> None:
    model, x = networked
    frozen = freeze(model)
    results(model, x), frozen(x)
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        results(model, x), frozen(x)
    gc.collect()
    assert torch.cuda.memory_allocated() == before

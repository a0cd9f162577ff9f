"""The captured route: torch.compile, and the operators' contracts."""

import itertools
import shutil
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache
from torch.func import functional_call

import fastmlp
from fastmlp import Activation, functional
from tests.support.compiling import compiled
from tests.support.derivatives import assert_same

ops = torch.ops.fastmlp

#: What `forward` and `infer` take.
Arguments: TypeAlias = tuple[Tensor, list[Tensor], list[bool], list[int], list[float]]

# Dynamo makes an instance of each Function that it traces, and torch warns about instances.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


Make: TypeAlias = Callable[[], nn.Module]
MAKERS: list[Make] = [
    lambda: fastmlp.Linear(4, 3, activation="gelu"),
    lambda: fastmlp.Linear(4, 3, bias=False),
    lambda: fastmlp.MLP(4, [5, 6], 3, "tanh"),
    lambda: fastmlp.MLP(4, [5], 3, nn.LeakyReLU(0.2), "sigmoid"),
    lambda: fastmlp.MLP(4, [5, 6, 7, 5], 3, "silu"),
]


@pytest.mark.parametrize("make", MAKERS)
def test_forward_and_backward(make: Make) -> None:
    module = make().double()
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    tensors = [x, *module.parameters()]
    eager = torch.autograd.grad(module(x).pow(2).sum(), tensors)
    f = compiled(module)
    assert_same(torch.autograd.grad(f(x).pow(2).sum(), tensors), eager)
    with torch.no_grad():
        assert_same([f(x)], [module(x)])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("make", MAKERS)
def test_no_recompilation_for_other_batches(make: Make, backend: str) -> None:
    module = make()
    counter = CompileCounterWithBackend(backend)
    f = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for wanted in (True, False):
        counts = []
        for rows in range(2, 12):
            x = torch.randn(rows, 4, requires_grad=wanted)
            with torch.set_grad_enabled(wanted):
                y = f(x)
            assert torch.equal(y, module(x))
            if wanted:
                y.sum().backward()
            counts.append(counter.frame_count)
        assert counts == counts[:1] * 10
        counter.clear()


def test_one_compilation_without_parameters_of_activations() -> None:
    """Dynamo takes numbers for inputs of its graph, and compiles twice to be rid of them."""
    counter = CompileCounterWithBackend("aot_eager")
    module = fastmlp.MLP(4, [5, 6], 3, "tanh", "gelu")
    torch.compile(module, backend=counter, fullgraph=True, dynamic=True)(torch.randn(6, 4))
    assert counter.frame_count == 1


def test_marked_dimensions() -> None:
    module, counter = fastmlp.MLP(4, [5], 3), CompileCounterWithBackend("aot_eager")
    f = torch.compile(module, backend=counter, fullgraph=True)
    for rows in range(2, 12):
        x = torch.randn(rows, 4)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(f(x), module(x))
    assert counter.frame_count == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor() -> None:
    """Generated code before and after the kernels, for ten batches at once."""
    module = fastmlp.MLP(4, [5, 6], 3, "gelu", "tanh").double()
    counter = CompileCounterWithBackend("inductor")

    def f(x: Tensor) -> Tensor:
        return (module(x.cos() + 1) * 2).exp()

    with fresh_cache():
        g = torch.compile(f, backend=counter, fullgraph=True, dynamic=True)
        counts = []
        for rows in range(2, 12):
            x = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
            tensors = [x, *module.parameters()]
            assert_same(*[torch.autograd.grad(h(x).sum(), tensors) for h in (g, f)])
            counts.append(counter.frame_count)
    assert counts == counts[:1] * 10


def test_hooks_of_children() -> None:
    """Those that are there when it is compiled; later ones Dynamo does not see, in any module."""
    module = fastmlp.MLP(4, [5, 6], 3, "tanh")
    x = torch.randn(6, 4)
    plain = module(x)
    module[2].register_forward_pre_hook(lambda _, args: (3 * args[0],))
    module[2].register_forward_hook(lambda _, args, output: 2 * output)
    f = compiled(module)
    assert torch.equal(f(x), module(x))
    assert not torch.equal(f(x), plain)


def test_functional_call() -> None:
    module = fastmlp.MLP(4, [5, 6], 3, "gelu", nn.LeakyReLU(0.2))
    state = {k: torch.randn_like(v).requires_grad_() for k, v in module.state_dict().items()}
    x = torch.randn(6, 4)

    def f(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, state, (x,))

    g = torch.compile(f, backend="aot_eager", fullgraph=True)
    results = [h(state, x) for h in (f, g)]
    assert torch.equal(*results)
    assert not torch.equal(results[0], module(x))
    slopes = [torch.autograd.grad(y.sum(), list(state.values())) for y in results]
    assert all(torch.equal(a, b) for a, b in zip(*slopes, strict=True))


def test_other_activation_is_compiled_anew() -> None:
    layer = fastmlp.Linear(4, 3, activation=nn.LeakyReLU(0.2))
    f, x = compiled(layer, dynamic=True), torch.randn(6, 4)
    for act in (nn.LeakyReLU(0.2), nn.LeakyReLU(0.7), "tanh", None):
        layer.activation = fastmlp.activations.resolve(act)
        assert torch.equal(f(x), layer(x))


def test_the_kernels_run() -> None:
    """The graph holds our operators, not PyTorch's products."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:

        def compiler(inner: torch.fx.GraphModule, _: list[Tensor]) -> Any:
            seen.extend(str(n.target) for n in inner.graph.nodes if n.op == "call_function")
            return make_boxed_func(inner.forward)

        return aot_autograd(fw_compiler=compiler)(graph, inputs)

    module = fastmlp.MLP(4, [5], 3)
    torch.compile(module, backend=backend, fullgraph=True)(torch.randn(6, 4)).sum().backward()
    assert "fastmlp.forward.default" in seen
    assert "fastmlp.backward.default" in seen
    assert not any("mm" in name for name in seen)


def test_functional_in_a_compiled_function() -> None:
    w, b = torch.randn(3, 4, requires_grad=True), torch.randn(3)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def f(x: Tensor) -> Tensor:
        return functional.linear(x, w, b, "silu") * 2

    x = torch.randn(5, 4)
    torch.testing.assert_close(f(x), 2 * functional.linear(x, w, b, "silu"))


def test_other_dtypes_compile(dtype: torch.dtype) -> None:
    module = fastmlp.MLP(4, [5], 3).to(dtype)
    x = torch.randn(6, 4, dtype=dtype)
    assert torch.equal(compiled(module)(x), module(x))


def test_transforms_compile() -> None:
    module = fastmlp.MLP(4, [5], 1, "tanh").double()
    x = torch.randn(6, 4, dtype=torch.float64)

    def f(t: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda s: module(s).sum()))(t)

    assert_same([torch.compile(f, backend="aot_eager", fullgraph=True)(x)], [f(x)])


def arguments(dtype: torch.dtype, has_bias: Sequence[bool] = (True, False)) -> Arguments:
    """A stack of layers as the operators take it; the last one's derivative follows from its output."""
    widths = [4, 5, 2, 3, 4, 3][: len(has_bias) + 1]
    parameters: list[Tensor] = []
    for k, n, bias in zip(widths[:-1], widths[1:], has_bias, strict=True):
        parameters.append(torch.randn(n, k, dtype=dtype))
        if bias:
            parameters.append(torch.randn(n, dtype=dtype))
    acts = [Activation(n) for n in ("identity", "gelu", "leaky_relu", "softplus", "tanh")][-len(has_bias) :]
    scalars = [value for act in acts for value in act.scalars]
    return torch.randn(3, 4, dtype=dtype), parameters, list(has_bias), [act.kind for act in acts], scalars


def backwards(given: Arguments) -> list[tuple[Any, ...]]:
    """Arguments of the operator `backward`, for all gradients and for some."""
    x, parameters, has_bias, acts, scalars = given
    output, hidden = ops.forward(*given)
    needs = [[True] * (1 + len(parameters)), [i % 2 == 1 for i in range(1 + len(parameters))]]
    rest = x, [*hidden, output], parameters, has_bias, acts, scalars
    return [(torch.randn_like(output), *rest, n) for n in needs]


#: Derivatives along two of the input's features, the second one of the first of them, and the mixed one.
DIRECTIONS = ([0, 1], [0, 0, 0, 1], [1, 2])


def derivatives_backwards(given: Arguments) -> list[tuple[Any, ...]]:
    """Arguments of the operator `derivatives_backward`, for all gradients and for some."""
    x, parameters, *rest = given
    rows, features, floats = len(x), [p.shape[0] for p in parameters if p.dim() == 2][-1], x.dtype in FLOATS
    kept = ops.derivatives(*given, *DIRECTIONS, True)[3] if floats else x
    grads = [torch.randn(rows, features, *size, dtype=x.dtype) for size in ((), (2,), (2,))]
    needs = [[True] * (1 + len(parameters)), [i % 2 == 1 for i in range(1 + len(parameters))]]
    return [(*grads, x, kept, parameters, *rest, *DIRECTIONS, n) for n in needs]


#: How each operator is called for a stack of layers. One that is missing here fails the test.
CALLS: dict[str, Callable[[Arguments], list[tuple[Any, ...]]]] = {
    "fastmlp::forward": lambda given: [given],
    "fastmlp::infer": lambda given: [given],
    "fastmlp::backward": backwards,
    "fastmlp::derivatives": lambda given: [(*given, *DIRECTIONS, keep) for keep in (True, False)],
    "fastmlp::derivatives_backward": derivatives_backwards,
}
#: Operators for tensors with memory alone: under compilers and transforms taylor.py computes by PyTorch's operations.
EAGER = ("fastmlp::derivatives", "fastmlp::derivatives_backward")
FLOATS = (torch.float32, torch.float64)

#: Takes the key of a frozen network, and no layers: tests/frozen/test_frozen_modules.py calls it.
OF_NETWORKS = "fastmlp::frozen"
OPERATORS = sorted(
    name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastmlp::") and name != OF_NETWORKS
)


#: Every choice of biases for one and for two layers, and two for five.
BIASES = [
    *itertools.chain(*(itertools.product([True, False], repeat=n) for n in (1, 2))),
    (True, True, True, True, True),
    (False, True, False, True, False),
]


@pytest.mark.parametrize("has_bias", BIASES, ids=lambda has_bias: "".join("01"[bias] for bias in has_bias))
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, has_bias: tuple[bool, ...], dtype: torch.dtype) -> None:
    # The operators are private and have no autograd of their own: the Functions of autograd.py do.
    tests = ("test_schema",) if name in EAGER else ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    operator = getattr(ops, name.removeprefix("fastmlp::")).default
    for call in CALLS[name](arguments(dtype, has_bias)):
        if name in EAGER and dtype not in FLOATS:
            with pytest.raises(RuntimeError, match=f"input has dtype {dtype}, expected float32 or float64"):
                operator(*call)
            continue
        assert set(torch.library.opcheck(operator, call, test_utils=tests).values()) == {"SUCCESS"}


def test_meta_kernels_allocate_what_cpu_kernels_return(dtype: torch.dtype) -> None:
    x, parameters, has_bias, acts, scalars = arguments(dtype)
    for shape in ((3, 4), (4,), (2, 0, 4), (2, 3, 4)):
        x = torch.randn(shape, dtype=dtype)
        real = ops.forward(x, parameters, has_bias, acts, scalars)
        meta = ops.forward(x.to("meta"), [p.to("meta") for p in parameters], has_bias, acts, scalars)
        for a, b in zip([real[0], *real[1]], [meta[0], *meta[1]], strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_fake_tensors() -> None:
    module = fastmlp.MLP(4, [5], 3)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert module(mode.from_tensor(torch.randn(6, 4))).shape == (6, 3)


def test_make_fx() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    module = fastmlp.MLP(4, [5], 3)
    x = torch.randn(6, 4)
    graph = make_fx(module)(x)
    torch.testing.assert_close(graph(x), module(x))
    assert not torch.equal(graph(x + 1), module(x))

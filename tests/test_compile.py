"""The captured route: torch.compile, the operators' contracts, export."""

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import fastmlp
from fastmlp import functional
from tests.test_autograd import assert_same

ops = torch.ops.fastmlp

# Dynamo makes an instance of each Function that it traces, and torch warns about instances.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def compiled(module: nn.Module, **options: Any) -> Any:
    """Ahead-of-time autograd without code generation: what is traced is what is tested."""
    return torch.compile(module, backend="aot_eager", fullgraph=True, **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: fastmlp.Linear(4, 3, activation="gelu"),
        lambda: fastmlp.Linear(4, 3, bias=False),
        lambda: fastmlp.MLP(4, [5, 6], 3, "tanh"),
        lambda: fastmlp.MLP(4, [5], 3, nn.LeakyReLU(0.2), "sigmoid"),
    ],
)
def test_forward_and_backward(make: Any) -> None:
    module = make().double()
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    tensors = [x, *module.parameters()]
    eager = torch.autograd.grad(module(x).pow(2).sum(), tensors)
    f = compiled(module)
    assert_same(torch.autograd.grad(f(x).pow(2).sum(), tensors), eager)
    with torch.no_grad():
        assert_same([f(x)], [module(x)])


def test_no_recompilation_for_other_batches() -> None:
    module = fastmlp.MLP(4, [5], 3)
    counter = CompileCounterWithBackend("eager")
    f = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for rows in range(2, 12):
        x = torch.randn(rows, 4, requires_grad=True)
        f(x).sum().backward()
    assert counter.frame_count == 1


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


def test_autocast_and_other_dtypes_compile() -> None:
    module = fastmlp.MLP(4, [5], 3)
    x = torch.randn(6, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(module)(x), module(x))
    torch._dynamo.reset()
    half = fastmlp.MLP(4, [5], 3).bfloat16()
    torch.testing.assert_close(compiled(half)(x.bfloat16()), half(x.bfloat16()))


def test_transforms_compile() -> None:
    module = fastmlp.MLP(4, [5], 1, "tanh").double()
    x = torch.randn(6, 4, dtype=torch.float64)

    def f(t: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda s: module(s).sum()))(t)

    assert_same([torch.compile(f, backend="aot_eager", fullgraph=True)(x)], [f(x)])


def arguments(dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[bool], list[int], list[float]]:
    x = torch.randn(3, 4, dtype=dtype)
    parameters = [torch.randn(5, 4, dtype=dtype), torch.randn(5, dtype=dtype), torch.randn(2, 5, dtype=dtype)]
    return x, parameters, [True, False], [7, 6], [0.0] * 4


def test_opcheck(dtype: torch.dtype) -> None:
    # The operators are private and have no autograd of their own: the Functions of autograd.py do.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    x, parameters, has_bias, acts, scalars = arguments(dtype)
    torch.library.opcheck(ops.forward, (x, parameters, has_bias, acts, scalars), test_utils=tests)
    torch.library.opcheck(ops.infer, (x, parameters, has_bias, acts, scalars), test_utils=tests)
    output, hidden = ops.forward(x, parameters, has_bias, acts, scalars)
    backward = (torch.randn_like(output), x, [*hidden, output], parameters, has_bias, acts, scalars)
    for needs in ([True] * 4, [False, True, False, True]):
        torch.library.opcheck(ops.backward, (*backward, needs), test_utils=tests)


def test_meta_kernels_allocate_what_cpu_kernels_return(dtype: torch.dtype) -> None:
    x, parameters, has_bias, acts, scalars = arguments(dtype)
    for shape in ((3, 4), (4,), (2, 0, 4), (2, 3, 4)):
        x = torch.randn(shape, dtype=dtype)
        real = ops.forward(x, parameters, has_bias, acts, scalars)
        meta = ops.forward(x.to("meta"), [p.to("meta") for p in parameters], has_bias, acts, scalars)
        for a, b in zip([real[0], *real[1]], [meta[0], *meta[1]], strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_export_holds_standard_operators_only() -> None:
    module = fastmlp.MLP(4, [5], 3, "gelu")
    x = torch.randn(6, 4)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert targets
    assert all(t.startswith("aten.") or "sym" in t for t in targets), targets
    torch.testing.assert_close(program.module()(torch.cat([x, x])), module(torch.cat([x, x])))


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

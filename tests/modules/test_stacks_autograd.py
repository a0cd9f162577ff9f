"""Derivatives of stacks of one to twelve layers, drawn at random, in every way that PyTorch takes them."""

import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, grad, gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastmlp
from fastmlp.activations import IDENTITY, module_of, resolve
from fastmlp.ops import stack_of
from tests.support.axes import ACTIVATIONS
from tests.support.compiling import compiled
from tests.support.derivatives import Case, assert_same, subsets

F64 = torch.float64

DEPTHS = range(1, 13)
#: Stacks of each depth whose first and second derivatives are compared with differences.
FIRST, SECOND = 8, 4


def drawn(depth: int, seed: int, rows: int | None = None) -> Case:
    """Narrow enough for differences; now and then without rows, or with a layer of no features."""
    random_ = random.Random(f"{depth} {seed}")
    torch.manual_seed(random_.randrange(1 << 30))
    widths = [random_.choice([1, 2, 2, 3, 3, 4]) for _ in range(depth + 1)]
    if random_.random() < 0.05:
        widths[random_.randrange(depth + 1)] = 0
    acts = [random_.choice(ACTIVATIONS) for _ in range(depth)]
    if random_.random() < 0.3:
        acts[-1] = IDENTITY
    bias = [random_.random() < 0.7 for _ in range(depth)]
    return Case(widths, acts, bias, random_.choice([0, 1, 2, 2, 3, 3]) if rows is None else rows)


def smooth(depth: int, rows: int = 4) -> Case:
    """With derivatives of any order that are not zero."""
    acts = [resolve(("tanh", "gelu", "sin", "silu", "softplus", "mish")[i % 6]) for i in range(depth)]
    return Case([3, *[4 + i % 3 for i in range(depth - 1)], 2], acts, [i % 3 != 1 for i in range(depth)], rows)


def squares(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([t.pow(2).sum() for t in tensors]).sum()


def test_what_is_drawn() -> None:
    """Every activation at first and second order, empty batches and empty layers."""
    first = [drawn(depth, seed) for depth in DEPTHS for seed in range(FIRST)]
    second = [drawn(depth, seed) for depth in DEPTHS for seed in range(SECOND)]
    assert (len(first), len(second)) == (96, 48)
    for cases in (first, second):
        assert {act for case in cases for act in case.acts} == set(ACTIVATIONS)
        assert {case.input.shape[0] for case in cases} == {0, 1, 2, 3}
    assert any(0 in p.shape for case in first for p in case.parameters)


@pytest.mark.parametrize("depth", DEPTHS)
def test_first_derivatives_are_differences(depth: int) -> None:
    for seed in range(FIRST):
        case = drawn(depth, seed)
        assert gradcheck(case.ours, case.tensors, check_forward_ad=seed == 0)


@pytest.mark.parametrize("depth", DEPTHS)
def test_second_derivatives_are_differences(depth: int) -> None:
    for seed in range(SECOND):
        case = drawn(depth, seed)
        assert gradgradcheck(case.ours, case.tensors, fast_mode=depth > 6)


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 2, 3), (2, 1, 2, 3)])
@pytest.mark.parametrize("depth", [2, 5])
def test_differences_with_leading_dimensions(depth: int, shape: tuple[int, ...]) -> None:
    case = smooth(depth)
    input = torch.randn(shape, dtype=F64)
    for arranged in (input, input.transpose(0, -2).contiguous().transpose(0, -2) if input.dim() > 2 else input * 1):
        tensors = (arranged.detach().requires_grad_(), *case.parameters)
        assert gradcheck(case.ours, tensors)
        assert gradgradcheck(case.ours, tensors, fast_mode=True)


def test_every_subset_of_three_layers() -> None:
    """First and second derivatives with respect to each set of tensors."""
    case = Case([3, 4, 2, 3], [resolve("gelu"), resolve("relu"), resolve("sigmoid")], [True] * 3)
    masks = list(itertools.product([False, True], repeat=len(case.tensors)))
    assert len(masks) == 128
    subsets(case, masks)


@pytest.mark.parametrize("depth", [1, 4, 12])
def test_third_derivatives(depth: int) -> None:
    case = smooth(depth)
    results = []
    for f in (case.ours, case.torchs):
        first = grad(f(*case.tensors).sum(), case.tensors, create_graph=True)
        second = grad(squares(first), case.tensors, create_graph=True)
        results.append([*first, *second, *grad(squares(second), case.tensors)])
    assert_same(*results)


@pytest.mark.parametrize("depth", DEPTHS)
def test_graph_is_kept_and_freed(depth: int) -> None:
    case = smooth(depth)
    output = case.ours(*case.tensors)
    seed = torch.randn_like(output)
    first = grad(output, case.tensors, seed, retain_graph=True)
    second = grad(output, case.tensors, seed, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_same(first, grad(case.torchs(*case.tensors), case.tensors, seed))
    output.backward(seed, retain_graph=True)
    output.backward(seed)
    assert_same([t.grad for t in case.tensors], [2 * g for g in first])
    with pytest.raises(RuntimeError, match="second time"):
        output.backward(seed)


@pytest.mark.parametrize("depth", [2, 5, 12])
def test_every_change_in_place_is_detected(depth: int) -> None:
    case = Case(
        [3] * (depth + 1),
        [resolve("tanh"), resolve("gelu")] * (depth // 2) + [resolve("tanh")] * (depth % 2),
        [True] * depth,
    )
    for changed in case.tensors:
        output = case.ours(*case.tensors)
        with torch.no_grad():
            changed.add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


#: Of a function of a case's tensors: the function, the tensors, and a batch of each.
TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], tuple[Tensor, ...], tuple[Tensor, ...]], Any]] = {
    "jvp": lambda f, ts, batch: jvp(f, ts, tuple(t.cos() for t in ts)),
    "vjp": lambda f, ts, batch: vjp(f, *ts)[1](f(*ts).cos()),
    "vmap input": lambda f, ts, batch: vmap(f, (0, *[None] * (len(ts) - 1)))(batch[0], *ts[1:]),
    "vmap parameters": lambda f, ts, batch: vmap(f, (None, *[0] * (len(ts) - 1)))(ts[0], *batch[1:]),
    "vmap all": lambda f, ts, batch: vmap(f)(*batch),
    "jacrev": lambda f, ts, batch: jacrev(f, tuple(range(len(ts))))(*ts),
    "jacfwd": lambda f, ts, batch: jacfwd(f, tuple(range(len(ts))))(*ts),
    "hessian": lambda f, ts, batch: hessian(lambda t: f(t, *ts[1:]).pow(2).sum())(ts[0]),
    "per-sample gradients": lambda f, ts, batch: vmap(
        torch.func.grad(lambda t, *p: f(t, *p).pow(2).sum(), tuple(range(len(ts)))), (0, *[None] * (len(ts) - 1))
    )(batch[0], *ts[1:]),
    "gradients of gradients": lambda f, ts, batch: torch.func.grad(
        lambda *q: squares(torch.func.grad(lambda *p: f(*p).sum(), tuple(range(len(ts))))(*q)),
        tuple(range(len(ts))),
    )(*ts),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("depth", [1, 3, 12])
def test_transforms(name: str, depth: int) -> None:
    case = smooth(depth)
    tensors = tuple(t.detach() for t in case.tensors)
    batch = tuple(torch.randn(3, *t.shape, dtype=F64) for t in tensors)
    ours, torchs = (tree_leaves(TRANSFORMS[name](f, tensors, batch)) for f in (case.ours, case.torchs))
    assert any(bool(t.abs().max() > 0) for t in torchs)
    assert_same(ours, torchs)


@pytest.mark.parametrize("depth", [1, 4, 12])
def test_forward_mode(depth: int) -> None:
    case = smooth(depth)
    tangents = [torch.randn_like(t) for t in case.tensors]
    results = []
    for f in (case.ours, case.torchs):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, d) for t, d in zip(case.tensors, tangents, strict=True)]
            tangent = forward_ad.unpack_dual(f(*duals)).tangent
        assert tangent is not None
        results.append([tangent, *grad(tangent.sum(), case.tensors)])
    assert_same(*results)


def modules(depth: int) -> tuple[fastmlp.Sequential, nn.Sequential]:
    """The same children, by ours and by torch's."""
    case = smooth(depth)
    children: list[nn.Module] = []
    for weight, bias, act in zip(*case.split(case.parameters), case.acts, strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=F64)
        children += [layer, module_of(act)]
    return fastmlp.Sequential(*children), nn.Sequential(*children)


@pytest.mark.parametrize("depth", [1, 5, 12])
def test_functional_call(depth: int) -> None:
    both, x = modules(depth), torch.randn(4, 3, dtype=F64, requires_grad=True)
    swapped = {k: torch.randn_like(v, requires_grad=True) for k, v in both[0].named_parameters()}
    results = []
    for module in both:
        output = functional_call(module, swapped, (x,))
        results.append([output, *grad(output.pow(2).sum(), [x, *swapped.values()])])
    assert_same(*results)


@pytest.mark.parametrize("depth", [2, 5, 12])
def test_checkpointing(depth: int) -> None:
    both, x = modules(depth), torch.randn(4, 3, dtype=F64, requires_grad=True)
    tensors = [x, *both[0].parameters()]
    expected = grad(both[1](x).pow(2).sum(), tensors)
    output = checkpoint(both[0], x, use_reentrant=False)
    assert_same(grad(output.pow(2).sum(), tensors), expected)
    for run in (
        lambda: checkpoint(both[0], x, use_reentrant=True),
        lambda: checkpoint_sequential(both[0], 2, x, use_reentrant=False),
    ):
        for tensor in tensors:
            tensor.grad = None
        run().pow(2).sum().backward()
        assert_same([t.grad for t in tensors], expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("depth", [3, 12])
def test_compiled(depth: int) -> None:
    torch._dynamo.reset()
    both, x = modules(depth), torch.randn(4, 3, dtype=F64, requires_grad=True)
    tensors = [x, *both[0].parameters()]
    output = compiled(both[0])(x)
    expected = both[1](x)
    assert_same(
        [output, *grad(output.pow(2).sum(), tensors)],
        [expected, *grad(expected.pow(2).sum(), tensors)],
    )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_with_children_that_are_called() -> None:
    torch._dynamo.reset()
    layers = [nn.Linear(3, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 4), nn.Dropout(0.5), nn.GELU(), nn.Linear(4, 2)]
    model = fastmlp.Sequential(*layers).double().eval()
    model[0].weight.requires_grad_(False)
    x = torch.randn(4, 3, dtype=F64)
    tensors = [p for p in model.parameters() if p.requires_grad]
    results = [[y, *grad(y.pow(2).sum(), tensors)] for y in (compiled(model)(x), nn.Sequential.forward(model, x))]
    assert_same(*results)


def test_opcheck(dtype: torch.dtype) -> None:
    ops, tests = torch.ops.fastmlp, ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    case = smooth(5)
    stack = stack_of(tuple(case.bias), tuple(case.acts))
    x, *parameters = (t.detach().to(dtype) for t in case.tensors)
    lists = [list(values) for values in stack.lists]
    torch.library.opcheck(ops.forward, (x, parameters, *lists), test_utils=tests)
    torch.library.opcheck(ops.infer, (x, parameters, *lists), test_utils=tests)
    output, hidden = ops.forward(x, parameters, *lists)
    saved = hidden if len(hidden) == stack.saved else [*hidden, output]
    for needs in ([True] * (1 + len(parameters)), [i % 2 == 1 for i in range(1 + len(parameters))]):
        torch.library.opcheck(
            ops.backward, (torch.randn_like(output), x, saved, parameters, *lists, needs), test_utils=tests
        )

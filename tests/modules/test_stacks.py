"""Stacks of layers, drawn at random: narrow ones go through a block of rows together, wide ones one by one."""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmlp
from fastmlp import _C, Activation, reference
from fastmlp.activations import IDENTITY, resolve
from fastmlp.ops import Stack, stack_of
from tests.support.axes import ACTIVATIONS, DTYPES, ISAS, tiles
from tests.support.bounds import Expected, assert_within, network
from tests.support.layouts import LAYOUTS
from tests.support.memory import GUARD, Buffers

#: Of row_blocks.cpp, to see that what is drawn lies on both sides of them.
LAYER_BYTES, GROUP_BYTES = 128 << 10, 256 << 10

#: Widths around the tiles of every instruction set and dtype, and others.
EDGES = sorted(
    {
        size * times + more
        for isa, dtype in itertools.product(_C.instruction_sets(), DTYPES)
        for size in (tiles(str(isa["name"]), dtype)["NR"], tiles(str(isa["name"]), dtype)["MR"])
        for times, more in ((1, -1), (1, 0), (1, 1), (2, 1), (3, -1))
    }
    | {1, 2, 3, 5, 100, 127, 128, 129}
)
WIDE = [1, 3, 8, 64, 127, 128, 129, 181, 182, 255, 256, 257, 300, 512, 2048]
#: softplus jumps at its threshold, by more than the bounds see where layers before have rounded: not at 20.
SMOOTH = [Activation("softplus", beta=2.5) if act.name == "softplus" else act for act in ACTIVATIONS]
FEW_ROWS = [0, 1, 2, 13, 14, 15, 55, 56, 57]


@dataclass(frozen=True)
class Kind:
    """What is drawn from."""

    count: int
    widths: Sequence[int]
    layers: Sequence[int]
    rows: Sequence[int]


KINDS = {
    "few rows": Kind(160, EDGES, range(1, 13), FEW_ROWS),
    "blocks": Kind(24, EDGES, range(1, 6), [190, 191, 192, 193, 385, 1024, 1025]),
    "mixed": Kind(40, WIDE, range(2, 8), [1, 14, 57, 200]),
    "groups": Kind(24, [96, 127, 128, 129, 181, 256], range(4, 10), [14, 57, 193]),
    "long": Kind(8, [1, 3, 17, 31, 33], range(2, 5), [2049, 3000]),
}


@dataclass(frozen=True)
class Drawn:
    """A stack without its numbers."""

    kind: str
    seed: int
    dtype: torch.dtype
    widths: tuple[int, ...]
    leading: tuple[int, ...]
    activations: tuple[Activation, ...]
    has_bias: tuple[bool, ...]
    layouts: tuple[str, ...]  # of input, gradient and weights

    @property
    def rows(self) -> int:
        return int(torch.Size(self.leading).numel())

    @property
    def stack(self) -> Stack:
        return stack_of(self.has_bias, self.activations)

    def __str__(self) -> str:
        return f"{self.kind}-{self.seed}"

    def groups(self) -> list[tuple[int, bool]]:
        """Layers that go together, and whether they are narrow; row_blocks.cpp divides likewise."""
        groups: list[tuple[int, bool]] = []
        taken = 0
        for k, n in pairwise(self.widths):
            own = k * n * self.dtype.itemsize
            narrow = self.dtype.itemsize > 2 and own <= LAYER_BYTES
            if narrow and groups and groups[-1][1] and taken + own <= GROUP_BYTES:
                groups[-1] = groups[-1][0] + 1, True
                taken += own
            else:
                groups.append((1, narrow))
                taken = own
        return groups


def draw(kind: str, seed: int) -> Drawn:
    random_ = random.Random(f"{kind} {seed}")
    source = KINDS[kind]
    layers = random_.choice(source.layers)
    widths = [random_.choice(source.widths) for _ in range(layers + 1)]
    for i in range(layers):
        if widths[i] * widths[i + 1] > 1 << 19:  # such a layer takes seconds
            widths[i + 1] = 1
    if random_.random() < 0.1:
        widths[random_.randrange(layers + 1)] = 0
    rows = source.rows[seed % len(source.rows)]
    leading: tuple[int, ...] = random_.choice([(rows,), (rows,), (1, rows), (rows, 1)])
    for divisor in (2, 3, 5, 7):
        if rows % divisor == 0 and random_.random() < 0.4:
            leading = random_.choice([(divisor, rows // divisor), (rows // divisor, 1, divisor)])
    if rows == 1 and random_.random() < 0.5:
        leading = ()
    return Drawn(
        kind,
        seed,
        random_.choice(DTYPES),
        tuple(widths),
        leading,
        tuple(random_.choice(SMOOTH) for _ in range(layers)),
        tuple(random_.random() < 0.7 for _ in range(layers)),
        tuple(random_.choice(["contiguous", *LAYOUTS]) for _ in range(layers + 2)),
    )


DRAWN = [draw(kind, seed) for kind, source in KINDS.items() for seed in range(source.count)]


def test_what_is_drawn() -> None:
    """Every depth, activation, batch and division of narrow and wide layers is there."""
    assert len(DRAWN) == sum(kind.count for kind in KINDS.values())
    assert {len(d.activations) for d in DRAWN} == set(range(1, 13))
    for place in (0, -1):
        assert {d.activations[place] for d in DRAWN} == set(SMOOTH)
        assert {(d.has_bias[place], d.dtype) for d in DRAWN} == set(itertools.product([False, True], DTYPES))
    assert {d.rows for d in DRAWN} == {rows for kind in KINDS.values() for rows in kind.rows}
    assert {len(d.leading) for d in DRAWN} == {0, 1, 2, 3}
    for dtype in (torch.float32, torch.float64):
        groups = [d.groups() for d in DRAWN if d.dtype == dtype]
        # Several narrow groups in a row, and wide layers before, between and behind narrow ones.
        assert any(a[1] and b[1] for group in groups for a, b in pairwise(group))
        assert {(a[1], b[1]) for group in groups for a, b in pairwise(group)} >= {(True, False), (False, True)}
        assert any(layers >= 6 and narrow for group in groups for layers, narrow in group)
        assert any(0 in d.widths for d in DRAWN if d.dtype == dtype)


@dataclass
class Numbers:
    """The tensors of a stack; input and gradient also as matrices."""

    input: Tensor
    grad: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    input_rows: Tensor
    grad_rows: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        return [t for pair in zip(self.weights, self.biases, strict=True) for t in pair if t is not None]


def arranged(name: str, x: Tensor) -> Tensor:
    return LAYOUTS[name](x) if x.numel() else x


def numbers(drawn: Drawn, sample: Callable[..., Tensor] = torch.randn) -> Numbers:
    torch.manual_seed(drawn.seed)
    widths, dtype = drawn.widths, drawn.dtype
    input = arranged(drawn.layouts[0], sample(drawn.rows, widths[0], dtype=dtype))
    grad = arranged(drawn.layouts[1], sample(drawn.rows, widths[-1], dtype=dtype))
    weights = [
        arranged(layout, torch.randn(n, k, dtype=dtype) / max(k, 1) ** 0.5)
        for layout, (k, n) in zip(drawn.layouts[2:], pairwise(widths), strict=True)
    ]
    biases = [
        sample(3 * n, dtype=dtype)[:: 1 + 2 * (n % 2)][:n] if has else None
        for has, n in zip(drawn.has_bias, widths[1:], strict=True)
    ]
    return Numbers(shaped(input, drawn), shaped(grad, drawn), weights, biases, input, grad)


def shaped(rows: Tensor, drawn: Drawn) -> Tensor:
    """With the leading dimensions, the first and last of them swapped in memory where there are several."""
    if len(drawn.leading) == 0:
        return rows[0]
    x = rows.unflatten(0, drawn.leading)
    if len(drawn.leading) > 1 and sum(drawn.leading) % 2:
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    return x


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before, threads = fastmlp.get_isa(), torch.get_num_threads()
    yield
    fastmlp.set_isa(before)
    torch.set_num_threads(threads)


def compare(gradients: Sequence[Tensor | None], expected: Expected, needs: Sequence[bool], drawn: Drawn) -> None:
    for i, (found, bound, need) in enumerate(zip(gradients, expected.gradients, needs, strict=True)):
        assert (found is not None) == need
        if found is not None:
            assert_within(found.reshape(bound.value.shape), bound, f"gradient {i} of {drawn}")


@pytest.mark.parametrize("drawn", DRAWN, ids=str)
def test_stack(drawn: Drawn) -> None:
    """By every instruction set: within the bounds, what is asked for and nothing else, nothing outside of results."""
    n, stack = numbers(drawn), drawn.stack
    expected = network(n.input_rows, n.weights, n.biases, drawn.activations, n.grad_rows)
    everything = [True] * (1 + len(n.parameters))
    some = [random.Random(drawn.seed).random() < 0.5 for _ in everything]
    for isa in ISAS:
        fastmlp.set_isa(isa)
        buffers = Buffers()
        output, hidden = _C.forward(stack.native, n.input, n.parameters)
        assert output.shape == n.grad.shape
        assert_within(output.reshape(n.grad_rows.shape), expected.output, f"output of {drawn}")
        assert torch.equal(_C.infer(stack.native, n.input, n.parameters), output)
        saved = hidden if len(hidden) == stack.saved else [*hidden, output]
        gradients = _C.backward(stack.native, n.grad, n.input, saved, n.parameters, everything)
        compare(gradients, expected, everything, drawn)
        fewer = _C.backward(stack.native, n.grad, n.input, saved, n.parameters, some)
        compare(fewer, expected, some, drawn)
        _C.forward_into(stack.native, n.input, n.parameters, buffers.like(output), [buffers.like(h) for h in hidden])
        into = [buffers.like(g) for g in gradients if g is not None]
        _C.backward_into(stack.native, n.grad, n.input, saved, n.parameters, into)
        assert all(g is not None and torch.equal(a, g) for a, g in zip(into, gradients, strict=True))
        assert torch.equal(buffers.all[0][GUARD:-GUARD].view(output.shape), output)
        assert buffers.intact()
        if output.numel():
            assert _C.last_isa() == isa


def signed_permutations(like: Tensor, terms: int) -> Tensor:
    """Whole numbers, few in each row and column, so that sums stay small from layer to layer."""
    weight = torch.zeros(like.shape, dtype=like.dtype)
    (n, k), size = like.shape, min(like.shape)
    for _ in range(terms):
        weight[torch.randperm(n)[:size], torch.randperm(k)[:size]] += (
            torch.randint(0, 2, (size,)).to(like.dtype) * 2 - 1
        )
    return weight


def derived(f: Callable[..., Tensor], tensors: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The output and every gradient."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = f(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def specified(drawn: Drawn) -> Callable[..., Tensor]:
    def f(input: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = drawn.stack.split(parameters)
        return reference.mlp(input, weights, biases, [(a.name, a.parameters) for a in drawn.activations])

    return f


def computed(drawn: Drawn, n: Numbers) -> list[Tensor]:
    """The output and every gradient by the kernels."""
    stack = drawn.stack
    output, hidden = _C.forward(stack.native, n.input, n.parameters)
    saved = hidden if len(hidden) == stack.saved else [*hidden, output]
    gradients = _C.backward(stack.native, n.grad, n.input, saved, n.parameters, [True] * (1 + len(n.parameters)))
    return [output, *[g for g in gradients if g is not None]]


#: Activations that do not round whole numbers.
EXACT = [IDENTITY, resolve("relu"), Activation("leaky_relu", negative_slope=-1.0)]


@pytest.mark.parametrize("drawn", DRAWN, ids=str)
def test_whole_numbers_are_exact(drawn: Drawn) -> None:
    """Bounds grow with every layer; here nothing is rounded but a sum over the batch, once, however deep."""
    random_ = random.Random(drawn.seed)
    drawn = replace(drawn, activations=tuple(random_.choice(EXACT) for _ in drawn.activations))
    n = numbers(drawn, lambda *shape, dtype: torch.randint(-2, 3, shape).to(dtype))
    terms = 2 if drawn.dtype.itemsize > 2 and len(n.weights) <= 6 else 1
    n.weights = [signed_permutations(w, terms) for w in n.weights]
    exact = derived(specified(drawn), [t.double() for t in (n.input, *n.parameters)], n.grad.double())
    # 24 bits hold every sum; and 8, those of 16-bit dtypes, every element that is stored on the way.
    assert all(t.abs().max() < 1 << 24 for t in exact if t.numel())
    for isa in ISAS:
        fastmlp.set_isa(isa)
        for i, (found, wanted) in enumerate(zip(computed(drawn, n), exact, strict=True)):
            assert torch.equal(found, wanted.to(drawn.dtype)), f"{i} of {drawn} by {isa}"


def plain(seed: int, dtype: torch.dtype, rows: int, widths: tuple[int, ...], name: str, bias: bool) -> Drawn:
    """A stack that is not drawn: gapless tensors, one activation, none at the end."""
    layers = len(widths) - 1
    acts = (*[resolve(name)] * (layers - 1), IDENTITY)
    return Drawn("plain", seed, dtype, widths, (rows,), acts, (bias,) * layers, ("contiguous",) * (layers + 2))


@pytest.mark.parametrize("name", ["tanh", "gelu", "silu", "relu"])
@pytest.mark.parametrize(
    "widths", [(64, 64, 64, 64, 64), (100, 200, 33, 150, 90, 40), (300, 600, 64, 32, 500)], ids=str
)
def test_errors_are_at_most_twice_those_of_torch(name: str, widths: tuple[int, ...]) -> None:
    """The largest error of what products make, in float32: the output, and gradients of input and weights.

    Of several stacks: through layers, errors are a sum of many, and the largest one of a few thousand is chance.
    """
    largest = {by: [0.0] * (1 + len(widths)) for by in ("torch", *ISAS)}
    for seed, rows in itertools.product(range(4), (32, 200)):
        drawn = plain(seed, torch.float32, rows, widths, name, bias=False)
        n = numbers(drawn)
        tensors = [n.input, *n.parameters]
        exact = derived(specified(drawn), [t.double() for t in tensors], n.grad.double())
        for by, errors in largest.items():
            if by == "torch":
                found = derived(specified(drawn), tensors, n.grad)
            else:
                fastmlp.set_isa(by)
                found = computed(drawn, n)
            for i, (tensor, wanted) in enumerate(zip(found, exact, strict=True)):
                errors[i] = max(errors[i], (tensor.double() - wanted).abs().max().item())
    for errors in largest.values():
        assert all(a <= 2 * b for a, b in zip(errors, largest["torch"], strict=True)), largest


LARGE = [
    (3000, (40, 128, 129, 3, 100), "contiguous"),
    (1025, (17, 300, 200, 33, 64, 7), "transposed"),
    (4100, (3, 100, 64, 64, 1), "strided"),
    (2060, (200, 64, 64, 200), "contiguous"),
]


@pytest.mark.parametrize(("rows", "widths", "layout"), LARGE, ids=str)
def test_same_bits_for_any_number_of_threads(
    isa: str, dtype: torch.dtype, rows: int, widths: tuple[int, ...], layout: str
) -> None:
    drawn = plain(0, dtype, rows, widths, "gelu", bias=True)
    drawn = replace(
        drawn, layouts=(layout,) * len(drawn.layouts), activations=(resolve("silu"), *drawn.activations[1:])
    )
    n, stack = numbers(drawn), drawn.stack
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        output, hidden = _C.forward(stack.native, n.input, n.parameters)
        gradients = _C.backward(stack.native, n.grad, n.input, hidden, n.parameters, [True] * (1 + len(n.parameters)))
        results.append([output, _C.infer(stack.native, n.input, n.parameters), *hidden, *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [5, 200])
@pytest.mark.parametrize("widths", [(9, 33, 5, 17), (7, 64, 700, 3)], ids=str)
def test_every_subset_of_gradients(isa: str, widths: tuple[int, ...], rows: int) -> None:
    """Of narrow layers, and of a wide one between them."""
    drawn = plain(1, torch.float32, rows, widths, "silu", bias=True)
    n, stack = numbers(drawn), drawn.stack
    expected = network(n.input_rows, n.weights, n.biases, drawn.activations, n.grad_rows)
    _, hidden = _C.forward(stack.native, n.input, n.parameters)
    for needs in itertools.product([False, True], repeat=1 + len(n.parameters)):
        gradients = _C.backward(stack.native, n.grad, n.input, hidden, n.parameters, needs)
        compare(gradients, expected, needs, drawn)


SPECIAL = [float("nan"), float("inf"), float("-inf")]


# None that is zero in one precision and tiny in another: infinity would tell.
@pytest.mark.parametrize("name", ["relu", "tanh", "softplus", "silu", "leaky_relu", "elu", "identity"])
@pytest.mark.parametrize("widths", [(9, 33, 5, 17, 40, 3), (7, 64, 700, 3, 50, 50)], ids=str)
def test_special_values_go_where_torch_s_go(
    isa: str, dtype: torch.dtype, widths: tuple[int, ...], name: str, without_onednn: None
) -> None:
    """From one row to no other, and from a parameter to what it is part of: nothing is padded with them."""
    drawn, seen = plain(2, dtype, 31, widths, name, bias=True), 0
    for place in ("input", "weight", "bias", "grad"):
        for value in SPECIAL:
            n = numbers(drawn)
            where = {"input": n.input, "weight": n.weights[2], "bias": n.biases[1], "grad": n.grad}[place]
            assert where is not None
            where[0] = value  # not in the last elements, which torch computes by other code
            found = computed(drawn, n)
            wanted = derived(specified(drawn), [n.input, *n.parameters], n.grad)
            seen += sum(not bool(t.isfinite().all()) for t in wanted)
            for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
                infinite = a.isinf() | b.isinf()
                assert torch.equal(a.isnan(), b.isnan()), f"{place} {value}: {i}"
                assert torch.equal(a[infinite], b[infinite]), f"{place} {value}: {i}"
    assert seen > 30


WRONG: dict[str, tuple[Callable[[list[Tensor], list[Tensor | None]], Any], str]] = {
    "weight": (
        lambda weights, biases: weights.__setitem__(3, torch.zeros(7, 5)),
        r"weights\[3\] has shape \[7, 5\], expected 6 in the last dimension, the out_features of the layer before",
    ),
    "bias": (
        lambda weights, biases: biases.__setitem__(4, torch.zeros(9)),
        r"biases\[4\] has shape \[9\], expected \[8\], the out_features of weights\[4\]",
    ),
    "dtype": (
        lambda weights, biases: weights.__setitem__(2, weights[2].double()),
        r"weights\[2\] has dtype torch.float64, expected torch.float32, the dtype of input; pass weights\[2\].float",
    ),
    "dimensions": (
        lambda weights, biases: weights.__setitem__(5, torch.zeros(8)),
        r"weights\[5\] has shape \[8\], expected two dimensions",
    ),
    "device": (
        lambda weights, biases: weights.__setitem__(1, weights[1].to("meta")),
        r"weights\[1\] is on meta, where tensors have no values, expected cpu, the device of input",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("gradients", [False, True])
def test_errors_name_the_layer_and_come_first(name: str, gradients: bool) -> None:
    change, message = WRONG[name]
    widths = [3, 4, 5, 6, 7, 8, 9]
    weights = [torch.randn(n, k) for k, n in pairwise(widths)]
    biases: list[Tensor | None] = [torch.randn(n) for n in widths[1:]]
    input = torch.randn(5, 3, requires_grad=gradients)
    change(weights, biases)
    versions = [t._version for t in (input, *weights, *biases) if t is not None]
    before = _C.last_isa()
    fastmlp.set_isa(next(isa for isa in ISAS if isa != before) if len(ISAS) > 1 else before)
    with pytest.raises(RuntimeError, match=f"fastmlp: {message}"):
        fastmlp.functional.mlp(input, weights, biases, ["tanh"] * 6)
    assert versions == [t._version for t in (input, *weights, *biases) if t is not None]
    assert _C.last_isa() == before, "a kernel has run"


def test_backward_names_what_does_not_fit() -> None:
    drawn = plain(0, torch.float32, 6, (3, 4, 5, 6, 7), "gelu", bias=True)
    n, stack = numbers(drawn), drawn.stack
    _, hidden = _C.forward(stack.native, n.input, n.parameters)
    needs = [True] * (1 + len(n.parameters))
    before = [t.clone() for t in (n.grad, n.input, *hidden, *n.parameters)]
    for saved, grad, message in (
        ([hidden[0], hidden[1], hidden[2][:3]], n.grad, r"saved\[2\] has shape \[3, 6\], expected leading dimensions"),
        (hidden[:2], n.grad, "saved has 2 tensors, expected 3"),
        ([hidden[0], hidden[1].double(), hidden[2]], n.grad, r"saved\[1\] has dtype torch.float64"),
        (hidden, n.grad[:, :6], r"grad has shape \[6, 6\], expected leading dimensions \[6\] and last dimension 7"),
    ):
        with pytest.raises(RuntimeError, match=f"fastmlp: {message}"):
            _C.backward(stack.native, grad, n.input, saved, n.parameters, needs)
    assert all(torch.equal(a, b) for a, b in zip(before, (n.grad, n.input, *hidden, *n.parameters), strict=True))

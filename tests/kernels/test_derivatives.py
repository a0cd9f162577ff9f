"""The operators of derivatives along the input, against nested calls of torch's autograd in double precision."""

from collections.abc import Iterator
from itertools import combinations_with_replacement, pairwise
from math import inf, nan

import pytest
import torch
from torch import Tensor

from fastmlp import _C, Activation, get_isa, reference, set_isa
from fastmlp.activations import DEFAULTS
from fastmlp.ops import stack_of
from tests.support.derivatives import assert_same
from tests.support.jets import Jets, Sums, assert_all_within, nested

ISAS = [str(s["name"]) for s in _C.instruction_sets() if s["supported"]]
REAL = [torch.float32, torch.float64]
SMOOTH = ["tanh", "sin", "softplus", "gelu", "sigmoid", "silu", "gelu_tanh", "mish"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = get_isa()
    set_isa(request.param)
    yield request.param
    set_isa(before)


class Case:
    """A network of one dtype, and what is asked of it."""

    def __init__(
        self,
        dtype: torch.dtype,
        widths: list[int],
        activations: list[Activation],
        rows: int,
        axes: list[int],
        sums: Sums,
        has_bias: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(hash((rows, *widths)) % 1000)
        self.dtype, self.axes, self.sums, self.acts = dtype, axes, sums, activations
        self.input = torch.randn(rows, widths[0], generator=generator, dtype=dtype)
        self.weights = [
            torch.randn(n, k, generator=generator, dtype=dtype) / max(k, 1) ** 0.5 for k, n in pairwise(widths)
        ]
        self.biases: list[Tensor | None] = [
            0.5 * torch.randn(n, generator=generator, dtype=dtype) if has_bias else None for n in widths[1:]
        ]
        shape = (1 + len(axes) + len(sums), rows, widths[-1])
        self.grads = torch.randn(shape, generator=generator, dtype=dtype)

    @property
    def parameters(self) -> list[Tensor]:
        pairs = zip(self.weights, self.biases, strict=True)
        return [tensor for pair in pairs for tensor in pair if tensor is not None]

    def lists(self) -> tuple[object, ...]:
        stack = stack_of(tuple([bias is not None for bias in self.biases]), tuple(self.acts))
        pairs = [place for pairs in self.sums for pair in pairs for place in pair]
        ends = [sum(len(pairs) for pairs in self.sums[: i + 1]) for i in range(len(self.sums))]
        return (*stack.lists, self.axes, pairs, ends)

    def forward(self, keep: bool = True) -> tuple[list[Tensor], Tensor]:
        value, first, second, kept = torch.ops.fastmlp.derivatives(self.input, self.parameters, *self.lists(), keep)
        return [value, *first.unbind(2), *second.unbind(2)], kept

    def backward(self, kept: Tensor, needs: list[bool]) -> list[Tensor]:
        firsts = len(self.axes)
        first, second = self.grads[1 : 1 + firsts].permute(1, 2, 0), self.grads[1 + firsts :].permute(1, 2, 0)
        given = (self.grads[0], first, second, self.input, kept, self.parameters)
        return torch.ops.fastmlp.derivatives_backward(*given, *self.lists(), needs)

    def exact(self) -> tuple[list[Tensor], list[Tensor]]:
        """The components and the gradients by torch's autograd in double precision."""
        doubled = [t.double().requires_grad_() for t in (self.input, *self.parameters)]
        flat = iter(doubled[1:])
        pairs = [(next(flat), None if bias is None else next(flat)) for bias in self.biases]
        weights, biases = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        found = nested(doubled[0], weights, biases, self.acts, self.axes, self.sums)
        loss = sum((y * g.double()).sum() for y, g in zip(found, self.grads, strict=True))
        return found, list(torch.autograd.grad(loss, doubled, materialize_grads=True))

    def check(self) -> None:
        jets = Jets(self.input, self.weights, self.biases, self.acts, self.axes, self.sums)
        outputs, gradients = self.exact()
        found, kept = self.forward()
        assert_all_within(found, outputs, jets.outputs, "component")
        needs = [True] * (1 + len(self.parameters))
        assert_all_within(self.backward(kept, needs), gradients, jets.gradients(list(self.grads)), "gradient")


def burgers(dtype: torch.dtype, act: Activation, rows: int, width: int = 50, layers: int = 4) -> Case:
    widths = [2, *[width] * layers, 1]
    return Case(dtype, widths, [*[act] * layers, Activation("identity")], rows, [0, 1], [[(1, 1)]])


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("name", SMOOTH)
def test_every_activation_on_every_instruction_set(name: str, dtype: torch.dtype, isa: str) -> None:
    burgers(dtype, Activation(name), rows=37, width=19, layers=3).check()
    assert _C.last_isa() == isa


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("frequency", [30.0, -0.5])
def test_sines_of_multiples(frequency: float, dtype: torch.dtype, isa: str) -> None:
    burgers(dtype, Activation("sin", frequency=frequency), rows=37, width=19, layers=2).check()


@pytest.mark.parametrize("name", [name for name in DEFAULTS if name not in SMOOTH])
def test_activations_with_kinks(name: str, isa: str) -> None:
    """Where second derivatives jump, no bound on the error of an argument bounds theirs: float64 alone is compared."""
    case = burgers(torch.float64, Activation(name), rows=23, width=17, layers=2)
    outputs, gradients = case.exact()
    found, kept = case.forward()
    needs = [True] * (1 + len(case.parameters))
    assert_same([*found, *case.backward(kept, needs)], [*outputs, *gradients])


#: Kinks, zeros, what is far out, and numbers that are none.
POINTS = [-inf, -90.0, -25.0, -3.0, -1.0, -0.0, 0.0, 0.5, 3.0, 20.0, 20.5, 90.0, 1e4, inf, nan]


@pytest.mark.parametrize("name", DEFAULTS)
def test_an_activation_at_special_points(name: str, isa: str) -> None:
    """As the specification, which a test of modules compares with torch's autograd."""
    act = Activation(name)
    points = torch.tensor(POINTS, dtype=torch.float64)
    case = Case(torch.float64, [1, 1], [act], len(POINTS), [0], [[(0, 0)]], has_bias=False)
    case.input, case.weights = points[:, None], [torch.ones(1, 1, dtype=torch.float64)]
    found, kept = case.forward()
    expected = reference.SLOPES[name](points)
    # Far out torch's own formulas are NaN, or the limit.
    for ours, theirs in zip(found, expected, strict=True):
        finite = theirs.isfinite() & (points.abs() < 1e3)
        assert_same([ours[finite, 0]], [theirs[finite]])
    assert found[0][-1].isnan()
    case.grads = torch.ones(3, len(POINTS), 1, dtype=torch.float64)
    usual = points.abs() < 1e3
    gradient = case.backward(kept, [True, True])[0][usual, 0]
    leaf = points[usual].clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(sum(t.sum() for t in reference.SLOPES[name](leaf)), leaf)  # type: ignore[arg-type]
    assert_same([gradient], [by_autograd])


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 13, 20, 21, 128, 700])
@pytest.mark.parametrize("width", [1, 16, 50, 128])
def test_rows_and_widths(rows: int, width: int, dtype: torch.dtype) -> None:
    burgers(dtype, Activation("tanh"), rows, width, layers=2).check()


@pytest.mark.parametrize("features", [1, 2, 3, 4])
@pytest.mark.parametrize("outputs", [1, 3])
def test_all_derivatives(features: int, outputs: int, isa: str) -> None:
    axes = list(range(features))
    sums: Sums = [[pair] for pair in combinations_with_replacement(axes, 2)] + [[(i, i) for i in axes]]
    acts = [Activation("tanh"), Activation("sin"), Activation("sigmoid")]
    for has_bias in (True, False):
        Case(torch.float64, [features, 21, 18, outputs], acts, 40, axes, sums, has_bias).check()


@pytest.mark.parametrize(
    ("axes", "sums"),
    [([], []), ([0], []), ([1, 0], []), ([1], [[(0, 0)]]), ([1, 0], [[(1, 0)], [(0, 0), (1, 1)]]), ([0, 0], [])],
)
def test_some_derivatives(axes: list[int], sums: Sums) -> None:
    acts = [Activation("gelu"), Activation("identity"), Activation("tanh"), Activation("identity")]
    Case(torch.float32, [3, 20, 12, 9, 2], acts, 33, axes, sums).check()


@pytest.mark.parametrize("lowest", range(7))
def test_only_what_is_asked_for(lowest: int) -> None:
    """Parameters below the first that needs a gradient cost nothing, and change nothing."""
    case = burgers(torch.float32, Activation("softplus", beta=2.0), 30, 20, 2)
    kept = case.forward()[1]
    all_needed = case.backward(kept, [True] * 7)
    needs = [i >= lowest for i in range(7)]
    for found, whole in zip(case.backward(kept, needs), all_needed[lowest:], strict=True):
        assert torch.equal(found, whole)
    single = case.backward(kept, [i == lowest for i in range(7)])
    assert torch.equal(single[0], all_needed[lowest])


def test_absent_gradients_are_zero() -> None:
    case = burgers(torch.float64, Activation("tanh"), 25, 10, 2)
    kept = case.forward()[1]
    case.grads[0] = 0
    case.grads[3:] = 0
    whole = case.backward(kept, [True] * 7)
    first = case.grads[1:3].permute(1, 2, 0)
    given = (None, first, None, case.input, kept, case.parameters)
    for found, expected in zip(
        torch.ops.fastmlp.derivatives_backward(*given, *case.lists(), [True] * 7), whole, strict=True
    ):
        assert torch.equal(found, expected)


def test_the_instruction_set_may_change_between_forward_and_backward() -> None:
    case, before = burgers(torch.float64, Activation("tanh"), 77), get_isa()
    try:
        for one in ISAS:
            set_isa(one)
            kept = case.forward()[1]
            for other in ISAS:
                set_isa(other)
                gradients = case.backward(kept, [True] * 11)
                assert_same(gradients, case.exact()[1])
    finally:
        set_isa(before)


@pytest.mark.parametrize("rows", [300, 3000])
def test_bits_do_not_depend_on_threads(rows: int) -> None:
    case, before = burgers(torch.float32, Activation("sin"), rows), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs, kept = case.forward()
            found.append([*outputs, *case.backward(kept, [True] * 11)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_many_rows_are_summed_in_chunks() -> None:
    burgers(torch.float32, Activation("tanh"), 2100, 16, 2).check()


def test_forward_that_keeps_nothing_gives_the_same_bits() -> None:
    case = burgers(torch.float32, Activation("gelu"), 150)
    (kept_outputs, kept), (outputs, nothing) = case.forward(), case.forward(keep=False)
    assert all(map(torch.equal, kept_outputs, outputs))
    assert kept.numel() == 150 * 4 * 200
    assert nothing.numel() == 0


@pytest.mark.parametrize(("rows", "widths"), [(0, [2, 5, 1]), (3, [2, 0, 1]), (3, [2, 5, 0]), (0, [2, 0, 0])])
def test_nothing(rows: int, widths: list[int]) -> None:
    case = Case(torch.float32, widths, [Activation("tanh"), Activation("identity")], rows, [0, 1], [[(0, 1)]])
    outputs, kept = case.forward()
    exact, gradients = case.exact()
    for found, expected in zip(outputs, exact, strict=True):
        torch.testing.assert_close(found, expected.float())
    for found, expected in zip(case.backward(kept, [True] * 5), gradients, strict=True):
        torch.testing.assert_close(found, expected.float())


def test_strided_arguments() -> None:
    case = burgers(torch.float32, Activation("tanh"), 45, 20, 2)
    plain, kept = case.forward()
    gradients = case.backward(kept, [True] * 7)
    case.input = torch.cat((case.input, case.input), 1)[:, 2:]
    case.weights = [w.t().contiguous().t() for w in case.weights]
    case.biases = [None if b is None else torch.stack((b, b), 1)[:, 1] for b in case.biases]
    case.grads = torch.stack((case.grads, case.grads), 3)[..., 0]
    strided, kept = case.forward()
    assert all(map(torch.equal, plain, strided))
    assert all(map(torch.equal, gradients, case.backward(kept, [True] * 7)))


def refused(message: str, **changes: object) -> None:
    case = burgers(torch.float32, Activation("tanh"), 5, 4, 2)
    names = ("input", "parameters", "has_bias", "activations", "scalars", "axes", "pairs", "pairs_end", "keep")
    arguments = dict(zip(names, (case.input, case.parameters, *case.lists(), True), strict=True)) | changes
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastmlp.derivatives(**arguments)


def test_the_operators_check_what_they_are_given() -> None:
    """They are private, but a wrong number must not write where it may not."""
    refused("fastmlp: axes holds 2, expected 0 to 1", axes=[0, 2])
    refused("fastmlp: pairs holds 2, expected 0 to 1", pairs=[0, 2])
    refused("fastmlp: pairs has 1 entries", pairs=[0])
    refused("fastmlp: pairs_end holds 2, expected 0 to 1", pairs_end=[2])
    refused("fastmlp: input has shape .*, expected two dimensions", input=torch.zeros(2, 3, 2))
    case = burgers(torch.float32, Activation("tanh"), 5, 4, 2)
    kept = case.forward()[1]
    with pytest.raises(RuntimeError, match="fastmlp: kept has 159 elements, expected 160"):
        case.backward(kept[1:], [True] * 7)
    with pytest.raises(RuntimeError, match="fastmlp: needs has 2 entries, expected 7"):
        case.backward(kept, [True] * 2)
    case.grads = case.grads[:, :4]
    with pytest.raises(RuntimeError, match="fastmlp: grad has shape"):
        case.backward(kept, [True] * 7)


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_the_bounds_are_tight_enough_to_notice(dtype: torch.dtype) -> None:
    """Errors of 2 %, or of 1e-10 in double precision, in any component and any gradient exceed the bounds."""
    case = burgers(dtype, Activation("tanh"), 64, 20, 3)
    jets = Jets(case.input, case.weights, case.biases, case.acts, case.axes, case.sums)
    outputs, gradients = case.exact()
    found, kept = case.forward()
    ours = [*found, *case.backward(kept, [True] * 9)]
    bounds = [*jets.outputs, *jets.gradients(list(case.grads))]
    factor = 1 + (2e-2 if dtype == torch.float32 else 1e-10)
    for tensor, exact, bound in zip(ours, (*outputs, *gradients), bounds, strict=True):
        with pytest.raises(AssertionError):
            assert_all_within([tensor * factor], [exact], [bound], "what is wrong")

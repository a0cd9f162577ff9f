"""The product of a tape's node, in every form that a step of training has, against the specification."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastmlp import _C, Activation
from fastmlp.activations import IDENTITY, resolve
from tests.support.axes import tiles
from tests.support.bounds import Bounded, activated, assert_within, column_sums, product
from tests.support.layouts import LAYOUTS, strided
from tests.support.memory import Buffers

#: How a and b lie in memory: as the operands of a forward pass, of the gradient with respect to an input, of that with
#: respect to a weight, and the fourth way.
Form = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
as_it_is, transposed = LAYOUTS["contiguous"], LAYOUTS["transposed"]
FORMS: dict[str, Form] = {
    "forward": (as_it_is, transposed),
    "input": (as_it_is, as_it_is),
    "weight": (transposed, as_it_is),
    "both": (transposed, transposed),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Form:
    return FORMS[request.param]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def operands(m: int, n: int, k: int, dtype: torch.dtype, form: Form = FORMS["input"]) -> tuple[Tensor, Tensor]:
    return form[0](torch.randn(m, k, dtype=dtype)), form[1](torch.randn(k, n, dtype=dtype))


def multiply(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    act: Activation = IDENTITY,
    *,
    saves: bool = False,
    sums: bool = False,
    gap: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The output, the pre-activation and the sums of a's rows; `gap` elements lie between rows of the first two."""
    m, n = a.shape[0], b.shape[1]
    buffers = Buffers()
    output = buffers.like(torch.empty(m, n + gap, dtype=a.dtype))
    before = buffers.like(torch.empty(m, n + gap, dtype=a.dtype)) if saves else None
    row_sums = buffers.like(torch.empty(m, dtype=a.dtype)) if sums else None
    between = [x[:, n:].clone() for x in (output, before) if x is not None]
    kept = None if before is None else before[:, :n]
    _C.multiply(a, b, bias, act.name, list(act.scalars), output[:, :n], kept, row_sums)
    assert buffers.intact()
    written = [x[:, n:] for x in (output, before) if x is not None]
    assert all(torch.equal(x, y) for x, y in zip(written, between, strict=True))
    return output[:, :n], kept, row_sums


def check(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    act: Activation = IDENTITY,
    *,
    saves: bool = False,
    sums: bool = False,
    gap: int = 0,
) -> None:
    found, before, row_sums = multiply(a, b, bias, act, saves=saves, sums=sums, gap=gap)
    z = product(Bounded.exact(a), Bounded.exact(b), a.dtype, None if bias is None else bias.double())
    assert_within(found, activated(z, act, a.dtype), "output")
    if before is not None:
        assert_within(before, z, "pre-activation")
    if row_sums is not None:
        assert_within(row_sums, column_sums(Bounded.exact(a.t()), a.dtype), "row sums")


def edges(size: int) -> list[int]:
    return sorted({0, 1, size - 1, size, size + 1})


def test_shapes_around_register_tile(isa: str, dtype: torch.dtype, form: Form) -> None:
    size = tiles(isa, dtype)
    for m in [*edges(size["MR"]), 2 * size["MR"] + 3]:
        for n in [*edges(size["NR"]), 2 * size["NR"] + 5]:
            for k in (0, 1, 2, 4, 5, 17):
                a, b = operands(m, n, k, dtype, form)
                bias = torch.randn(n, dtype=dtype) if (m + n + k) % 2 else None
                check(a, b, bias, resolve("relu"), saves=k == 17, gap=(m + k) % 3)
                check(a, b, sums=n % 3 > 0)
    assert _C.last_isa() == isa


def test_few_rows_and_few_columns(isa: str, dtype: torch.dtype, form: Form) -> None:
    """Inner products, columns that are computed as rows, and where these begin and end."""
    size = tiles(isa, dtype)
    lanes = size["lanes"]
    for few in (1, 2, 3, 5, 6, 7, lanes - 1, lanes + 1):
        for many in (lanes + 1, 50, 2 * size["NR"] + 3, size["stream_columns"] + 1):
            for k in (lanes - 1, 33, 130):
                check(*operands(few, many, k, dtype, form), sums=few % 2 == 0)
                a, b = operands(many, few, k, dtype, form)
                check(a, b, sums=few % 2 == 0)
                check(a, b, torch.randn(2 * few, dtype=dtype)[::2], resolve("tanh"))
                check(a, b, gap=3)


def test_shapes_around_cache_blocks(isa: str, dtype: torch.dtype, form: Form) -> None:
    size = tiles(isa, dtype)
    tall, wide = size["MR"] + 3, size["NR"] + 2
    for k in (size["chain"], size["chain"] + 1, size["KC"] - 1, size["KC"] + 1, 2 * size["KC"] + 3):
        check(*operands(tall, wide, k, dtype, form), sums=True)
        check(*operands(tall, wide, k, dtype, form), torch.randn(wide, dtype=dtype), resolve("gelu"), saves=True)
    for m, n, k in ((2 * size["MC"] + 3, 9, 40), (9, size["NC"] + 5, 40), (700, 50, 20), (50, 50, 1100)):
        check(*operands(m, n, k, dtype, form))
        check(*operands(m, n, k, dtype, form), sums=True)


def test_few_rows_beside_an_operand_that_no_cache_holds(isa: str, dtype: torch.dtype, form: Form) -> None:
    """Those are streamed in strips of k, whose last one is shorter, and sums are set aside after each."""
    for m, n, k in ((1, 3500, 151), (6, 4100, 130), (7, 3500, 151), (2, 33000, 17)):
        check(*operands(m, n, k, dtype, form), torch.randn(n, dtype=dtype), resolve("relu"))
        check(*operands(m, n, k, dtype, form), sums=True, gap=3)


def test_rows_that_share_lines_of_a_cache(isa: str, dtype: torch.dtype, form: Form) -> None:
    """Operands whose rows, or columns, lie multiples of 4096 bytes apart."""
    page = 4096 // dtype.itemsize
    for m, n, k in ((page, 5, 40), (40, page, 37), (33, 34, page)):
        check(*operands(m, n, k, dtype, form))


def test_every_activation(isa: str, dtype: torch.dtype, activation: Activation, form: Form) -> None:
    size = tiles(isa, dtype)
    for m, n, k in ((size["MR"] + 1, size["NR"] + 3, 19), (37, 5, 24), (2, 41, 64), (130, 130, 130)):
        for saves in (False, True):
            check(*operands(m, n, k, dtype, form), torch.randn(n, dtype=dtype), activation, saves=saves, gap=int(saves))
        check(*operands(m, n, k, dtype, form), None, activation)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["a", "b", "both"])
def test_layouts(isa: str, dtype: torch.dtype, which: str, layout: str) -> None:
    for m, n, k in ((31, 34, 21), (70, 3, 40), (3, 70, 40)):
        a, b = operands(m, n, k, dtype)
        a = a if which == "b" else LAYOUTS[layout](a)
        b = b if which == "a" else LAYOUTS[layout](b)
        check(a, b, sums=True)
        check(a, b, torch.randn(1, dtype=dtype).expand(n), resolve("silu"), saves=True)


def test_bits_do_not_depend_on_threads(isa: str, dtype: torch.dtype, form: Form, threads: None) -> None:
    shapes = ((256, 256, 250), (300, 40, 900), (500, 65, 250), (50, 50, 4100), (30, 1500, 300), (9000, 3, 400))
    for m, n, k in shapes:
        a, b = operands(m, n, k, dtype, form)
        bias = torch.randn(n, dtype=dtype)
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            sums = multiply(a, b, sums=True)
            outputs = multiply(a, b, bias, resolve("tanh"), saves=True)
            results.append([multiply(a, b)[0], *(x for x in (*sums, *outputs) if x is not None)])
        for others in results[1:]:
            assert all(torch.equal(x, y) for x, y in zip(results[0], others, strict=True)), (m, n, k)


def test_a_node_of_a_tape_computes_the_same(isa: str, dtype: torch.dtype) -> None:
    tape = _C.Tape()

    def tensor(*shape: int) -> Tensor:
        memory = tape.add_memory("tape", torch.Size(shape).numel() * dtype.itemsize)
        stride = (shape[1], 1) if len(shape) > 1 else (1,)
        return tape.tensor(tape.add_tensor(memory, torch.empty(0, dtype=dtype), shape, stride, 0))

    a, b, bias, output, before, sums = (tensor(*s) for s in ((9, 20), (20, 33), (33,), (9, 33), (9, 33), (9,)))
    for x in (a, b, bias):
        x.normal_()
    tape.add_product(a, b, bias, "elu", [0.5, 0.0], output, before, sums, "here")
    tape.finish([(0, 1)] * 6, [])
    recordings = _C.Recordings()
    recordings.add(tape, _C.Signature((), {}), _C.Signature((None,), {}), _C.Surroundings(), [])
    recordings.replay((), {}, None)
    found = multiply(a, b, bias, Activation("elu", alpha=0.5), saves=True, sums=True)
    for x, y in zip((output, before, sums), found, strict=True):
        assert y is not None
        assert torch.equal(x, y)


def test_the_stride_of_a_single_row_does_not_matter() -> None:
    a, b = torch.randn(1, 4), torch.randn(4, 5)
    output, before = torch.empty(3, 7)[:1, :5], torch.empty(1, 5)
    _C.multiply(a, b, None, "relu", [], output, before, None)
    z = product(Bounded.exact(a), Bounded.exact(b), a.dtype, None)
    assert_within(before, z, "pre-activation")
    assert_within(output, activated(z, resolve("relu"), a.dtype), "output")


def test_tensors_that_do_not_fit_are_refused() -> None:
    a, b, output = torch.randn(3, 4), torch.randn(4, 5), torch.randn(3, 5)
    rest: tuple[str, list[float]] = ("identity", [])
    with pytest.raises(ValueError, match="the sizes do not fit"):
        _C.multiply(a, b.t(), None, *rest, output, None, None)
    with pytest.raises(ValueError, match="the output has another shape, or gaps in its rows"):
        _C.multiply(a, b, None, *rest, strided(output), None, None)
    with pytest.raises(ValueError, match="the pre-activation does not lie as the output does"):
        _C.multiply(a, b, None, *rest, output, torch.empty(3, 6)[:, :5], None)
    with pytest.raises(ValueError, match="the bias has another size"):
        _C.multiply(a, b, torch.randn(4), *rest, output, None, None)
    with pytest.raises(ValueError, match="the row sums have another size, or gaps"):
        _C.multiply(a, b, None, *rest, output, None, torch.empty(6)[::2])
    with pytest.raises(TypeError, match="the tensors of a product have several dtypes"):
        _C.multiply(a, b.double(), None, *rest, output, None, None)
    with pytest.raises(TypeError, match=r"a has dtype torch\.int64"):
        _C.multiply(a.long(), b, None, *rest, output, None, None)
    with pytest.raises(ValueError, match="there is no activation swish2"):
        _C.multiply(a, b, None, "swish2", [], output, None, None)

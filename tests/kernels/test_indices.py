"""Kernels that read or write elements by their numbers, or find such numbers, against torch's operators."""

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from fastmlp import _C
from tests.support.bounds import Bounded, assert_within, gamma

REAL = [torch.float32, torch.float64]
ROWS = [1, 2, 3, 7, 64, 65, 200]
COLUMNS = [1, 2, 3, 4, 5, 8, 17, 40]
PICKS = [1, 2, 5]
#: Of a size that is worth more than one thread.
LARGE = (70001, 5)

aten = torch.ops.aten


def junk(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan") if dtype.is_floating_point else -7, dtype=dtype)


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def lying(x: Tensor, how: str) -> Tensor:
    """The same numbers, elsewhere in memory."""
    if how == "gapless":
        return x
    if how == "transposed":
        return x.t().contiguous().t()
    whole = junk(x.shape[0], 2 * x.shape[1] + 1, dtype=x.dtype)
    return whole[:, 1::2].copy_(x)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether they have the same bits, of which NaN may have others."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7)) and a.dtype == b.dtype


def gather(x: Tensor, index: Tensor) -> Tensor:
    output = junk(*index.shape, dtype=x.dtype)
    _C.gather(x, index, output)
    return output


def scatter(before: Tensor | None, index: Tensor, source: Tensor, columns: int, adds: bool) -> Tensor:
    output = junk(len(index), columns, dtype=source.dtype)
    _C.scatter(before, index, source, output, adds)
    return output


def row_max(x: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = junk(len(x), 1, dtype=x.dtype), junk(len(x), 1, dtype=torch.int64)
    _C.row_max(x, values, indices)
    return values[:, 0], indices[:, 0]


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    output = junk(len(index), table.shape[1], dtype=table.dtype)
    _C.take_rows(table, index[:, None], output, "embedding")
    return output


def embedding_backward(source: Tensor, index: Tensor, rows: int, skipped: int = -1) -> Tensor:
    output = junk(rows, source.shape[1], dtype=source.dtype)
    _C.embedding_backward(source, index[:, None], skipped, output)
    return output


def nll_loss(x: Tensor, target: Tensor, mean: bool, ignored: int = -100) -> tuple[Tensor, Tensor]:
    loss, total = junk(dtype=x.dtype), junk(dtype=x.dtype)
    _C.nll_loss(x, target[:, None], ignored, mean, loss, total)
    return loss, total


def nll_loss_backward(
    grad: Tensor, shape: torch.Size, target: Tensor, total: Tensor, mean: bool, ignored: int = -100
) -> Tensor:
    output = junk(*shape, dtype=grad.dtype)
    _C.nll_loss_backward(grad, target[:, None], total, ignored, mean, output)
    return output


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("how", ["gapless", "transposed", "with gaps"])
def test_gather(dtype: torch.dtype, how: str) -> None:
    for rows, columns, picks in [*product(ROWS, COLUMNS, PICKS), (*LARGE, 3)]:
        x, index = drawn(rows, columns, dtype=dtype), torch.randint(columns, (rows, picks))
        assert torch.equal(gather(lying(x, how), lying(index, how)), x.gather(1, index))


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("how", ["gapless", "transposed", "with gaps"])
def test_scatter(dtype: torch.dtype, how: str) -> None:
    """In the order of indices, so that torch's bits come out where some are equal."""
    for rows, columns, picks in [*product(ROWS, COLUMNS, PICKS), (*LARGE, 3)]:
        before, source = drawn(rows, columns, dtype=dtype), drawn(rows, picks, dtype=dtype)
        index = torch.randint(columns, (rows, picks))
        for start in (None, before):
            whole = torch.zeros(rows, columns, dtype=dtype) if start is None else start
            given = None if start is None else lying(start, how)
            for adds, torchs in ((True, whole.scatter_add(1, index, source)), (False, whole.scatter(1, index, source))):
                ours = scatter(given, lying(index, how), lying(source, how), columns, adds)
                assert torch.equal(ours, torchs)


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("how", ["gapless", "transposed", "with gaps"])
def test_row_max(dtype: torch.dtype, how: str) -> None:
    for rows, columns in [*product(ROWS, COLUMNS), LARGE]:
        # Of few different numbers, so that the largest one stands in several places.
        for x in (drawn(rows, columns, dtype=dtype), torch.randint(-2, 2, (rows, columns)).to(dtype)):
            values, indices = row_max(lying(x, how))
            torchs = x.max(1)
            assert torch.equal(values, torchs.values)
            assert torch.equal(indices, torchs.indices)
            assert torch.equal(indices, x.argmax(1))


@pytest.mark.parametrize("dtype", REAL)
def test_special_values_of_row_max(dtype: torch.dtype) -> None:
    numbers = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0]
    x = torch.tensor(list(product(numbers, repeat=4)), dtype=dtype)
    values, indices = row_max(x)
    torchs = x.max(1)
    assert same(values, torchs.values)
    assert torch.equal(torch.signbit(values[~values.isnan()]), torch.signbit(torchs.values[~values.isnan()]))
    assert torch.equal(indices, torchs.indices)
    assert torch.equal(indices, x.argmax(1))


def test_what_is_asked_for_of_row_max() -> None:
    x = torch.randn(9, 4)
    values, indices = junk(9, 1, dtype=x.dtype), junk(9, 1, dtype=torch.int64)
    _C.row_max(x, values, None)
    _C.row_max(x, None, indices)
    assert torch.equal(values[:, 0], x.max(1).values)
    assert torch.equal(indices[:, 0], x.max(1).indices)


@pytest.mark.parametrize("dtype", REAL)
def test_rows_of_a_table(dtype: torch.dtype) -> None:
    for rows, columns, picks in [*product((1, 3, 50, 200), COLUMNS, (1, 7, 65)), (300, 17, 40001)]:
        table, index = drawn(rows, columns, dtype=dtype), torch.randint(rows, (picks,))
        assert torch.equal(take_rows(table, index), torch.nn.functional.embedding(index, table))
        assert torch.equal(take_rows(lying(table, "gapless"), index), table.index_select(0, index))
        wider = drawn(rows, columns + 3, dtype=dtype)[:, 1 : columns + 1]
        assert torch.equal(take_rows(wider, index), wider.index_select(0, index))


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("how", ["gapless", "transposed", "with gaps"])
def test_gradient_of_a_table(dtype: torch.dtype, how: str) -> None:
    """Has torch's bits, because it is added in the same order. Indices out of range are left out, as by torch."""
    for rows, columns, picks in [*product((1, 3, 50, 200), COLUMNS, (1, 7, 65)), (30000, 17, 4001)]:
        source, index = drawn(picks, columns, dtype=dtype), torch.randint(rows, (picks,))
        for skipped, given in ((-1, index), (0, index), (rows - 1, index - 1), (-1, index + 1)):
            ours = embedding_backward(lying(source, how), given, rows, skipped)
            assert torch.equal(ours, aten.embedding_dense_backward(source, given, rows, skipped, False))
    one = torch.tensor([2.0], dtype=dtype).expand(6, 3)
    index = torch.tensor([0, 2, 2, 1, 2, 0])
    assert torch.equal(embedding_backward(one, index, 3), aten.embedding_dense_backward(one, index, 3, -1, False))


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("ignored", [-100, 0, 2])
def test_nll_loss(dtype: torch.dtype, mean: bool, ignored: int) -> None:
    reduction = 1 if mean else 2
    for rows, columns in [*product(ROWS, COLUMNS), LARGE]:
        x = -drawn(rows, columns, dtype=dtype).abs()
        target = torch.randint(columns, (rows,))
        if ignored < 0:
            target[::3] = ignored
        loss, total = nll_loss(x, target, mean, ignored)
        torchs, torchs_total = aten.nll_loss_forward(x.double(), target, None, reduction, ignored)
        if torchs.isnan():  # the mean of no rows
            assert loss.isnan()
        else:
            assert_within(loss, Bounded(torchs, gamma(rows + 2, dtype) * torchs.abs()), f"loss of {rows} x {columns}")
        assert torch.equal(total.double(), torchs_total)
        grad = drawn(dtype=dtype)
        ours = nll_loss_backward(grad, x.shape, target, total, mean, ignored)
        assert same(ours, aten.nll_loss_backward(grad, x, target, None, reduction, ignored, total))


def test_a_loss_of_no_class_and_of_special_values() -> None:
    x, ignored = torch.randn(3, 2), torch.full((3,), -100)
    for mean in (True, False):
        loss, total = nll_loss(x, ignored, mean)
        torchs = aten.nll_loss_forward(x, ignored, None, 1 if mean else 2, -100)
        assert same(loss, torchs[0])
        assert same(total, torchs[1])
        grad = nll_loss_backward(torch.ones(()), x.shape, ignored, total, mean)
        assert same(grad, aten.nll_loss_backward(torch.ones(()), x, ignored, None, 1 if mean else 2, -100, total))
    for value in (math.nan, math.inf, -math.inf):
        x[1, 0] = value
        for target in (torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])):
            assert same(nll_loss(x, target, True)[0], aten.nll_loss_forward(x, target, None, 1, -100)[0].float())


@pytest.mark.parametrize("index", [4, -1, 1 << 40, -(1 << 62)])
@pytest.mark.parametrize("name", ["gather", "scatter_add", "scatter", "embedding", "index_select", "nll_loss", "back"])
def test_indices_out_of_range(name: str, index: int) -> None:
    """Raise what torch raises, before anything is written."""
    x, at, source = torch.randn(3, 4), torch.tensor([[0], [index], [3]]), torch.randn(3, 1)
    line, table = at[:, 0], torch.randn(4, 2)
    one, total = torch.ones(()), torch.full((), 3.0)
    written = [torch.full(shape, 7.0) for shape in ((3, 1), (3, 4), (3, 2), (), ())]
    calls: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "gather": (lambda: _C.gather(x, at, written[0]), lambda: x.gather(1, at)),
        "scatter_add": (
            lambda: _C.scatter(x, at, source, written[1], True),
            lambda: x.scatter_add(1, at, source),
        ),
        "scatter": (lambda: _C.scatter(None, at, source, written[1], False), lambda: x.scatter(1, at, source)),
        "embedding": (
            lambda: _C.take_rows(table, at, written[2], "embedding"),
            lambda: torch.nn.functional.embedding(line, table),
        ),
        "index_select": (
            lambda: _C.take_rows(table, at, written[2], "index_select"),
            lambda: table.index_select(0, line),
        ),
        "nll_loss": (
            lambda: _C.nll_loss(x, at, -100, True, written[3], written[4]),
            lambda: torch.nn.functional.nll_loss(x, line),
        ),
        "back": (
            lambda: _C.nll_loss_backward(one, at, total, -100, True, written[1]),
            lambda: aten.nll_loss_backward(one, x, line, None, 1, -100, total),
        ),
    }
    ours, torchs = calls[name]
    with pytest.raises((IndexError, RuntimeError)) as expected:
        torchs()
    operator = "nll_loss_backward" if name == "back" else name
    with pytest.raises(expected.type, match=rf"^fastmlp: {operator}: .*{index}\b.*expected 0 to 3\b.*; pass "):
        ours()
    assert all((tensor == 7).all() for tensor in written)


def test_an_ignored_class_may_be_any_number() -> None:
    x, target = torch.randn(3, 4), torch.tensor([0, 9, 3])
    loss, total = nll_loss(x, target, True, 9)
    assert torch.equal(loss, aten.nll_loss_forward(x, target, None, 1, 9)[0])
    assert total == 2


def test_bits_depend_on_no_threads() -> None:
    before = torch.get_num_threads()
    rows, columns = LARGE
    x, source = torch.randn(rows, columns), torch.randn(rows, 3)
    index, places = torch.randint(columns, (rows, 3)), torch.randint(rows, (20000,))
    wide = torch.randn(20000, columns)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            of_table = embedding_backward(wide, places % 700, 700), embedding_backward(wide, places, rows)
            added = scatter(x, index, source, columns, True), scatter(None, index, source, columns, True)
            results.append([gather(x, index), *added, *row_max(x), take_rows(x, places), *of_table])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_neighbours_are_not_written() -> None:
    def guarded(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        count = math.prod(shape)
        whole = torch.full((count + 64,), 7, dtype=dtype)
        return whole, whole[32 : 32 + count].view(shape)

    for rows, columns in product((1, 9, 65), (1, 4, 17)):
        x, index, source = torch.randn(rows, columns), torch.randint(columns, (rows, 2)), torch.randn(rows, 2)
        names = torch.randint(rows, (5, 1))
        kinds: list[tuple[int, ...]] = [(rows, 2), (rows, columns), (rows, 1), (5, columns), (rows, columns), (), ()]
        written = [guarded(*kind) for kind in kinds]
        written.append(guarded(rows, 1, dtype=torch.int64))
        parts = [part for _, part in written]
        _C.gather(x, index, parts[0])
        _C.scatter(x, index, source, parts[1], True)
        _C.row_max(x, parts[2], parts[7])
        _C.take_rows(x, names, parts[3], "embedding")
        _C.embedding_backward(parts[3], names, -1, parts[4])
        _C.nll_loss(x, index[:, :1], -100, True, parts[5], parts[6])
        _C.nll_loss_backward(parts[5], index[:, :1], parts[6], -100, True, parts[1])
        for whole, _ in written:
            assert (whole[:32] == 7).all()
            assert (whole[-32:] == 7).all()


def test_no_rows() -> None:
    x, index = torch.empty(0, 4), torch.empty(0, 2, dtype=torch.int64)
    _C.gather(x, index, torch.empty(0, 2))
    _C.scatter(None, index, torch.empty(0, 2), x, True)
    _C.row_max(x, torch.empty(0, 1), None)
    assert embedding_backward(torch.empty(0, 3), index[:, 0], 2).tolist() == [[0.0] * 3] * 2


def test_what_does_not_fit_raises() -> None:
    x, index, picked = torch.ones(3, 4), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    with pytest.raises(TypeError, match="fastmlp: index is of Int, expected int64"):
        _C.gather(x, index.int(), picked)
    with pytest.raises(TypeError, match="fastmlp: input is of Half, expected float32 or float64"):
        _C.gather(x.half(), index, picked.half())
    with pytest.raises(ValueError, match=r"fastmlp: index is \[3, 2\], expected \[3, 1\]"):
        _C.gather(x, index, picked[:, :1].clone())
    with pytest.raises(ValueError, match="fastmlp: output has gaps in memory"):
        _C.scatter(None, index, picked, torch.ones(4, 3).t(), True)
    with pytest.raises(TypeError, match="fastmlp: source is of Double, expected Float"):
        _C.scatter(None, index, picked.double(), x, True)
    with pytest.raises(ValueError, match=r"fastmlp: indices is \[3, 2\], expected \[3, 1\]"):
        _C.row_max(x, None, index)
    with pytest.raises(ValueError, match="fastmlp: table has gaps between columns"):
        _C.take_rows(x.t(), index[:, :1], torch.ones(3, 3), "embedding")
    with pytest.raises(ValueError, match=r"fastmlp: output is \[3, 2\], expected \[3, 4\]"):
        _C.embedding_backward(x, index[:, :1], -1, picked)
    with pytest.raises(ValueError, match=r"fastmlp: loss is \[3, 2\], expected \[\]"):
        _C.nll_loss(x, index[:, :1], -100, True, picked, torch.ones(()))


def test_on_a_tape() -> None:
    tape = _C.Tape()

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        strides = torch.empty(shape).stride()
        memory = tape.add_memory("tape", 8 * math.prod(shape))
        return tape.tensor(tape.add_tensor(memory, torch.empty(0, dtype=dtype), shape, strides, 0))

    x, other, column, one = new(3, 4), new(3, 4), new(3, 1), new()
    index = new(3, 1, dtype=torch.int64)
    tape.add_gather(x, index, column, "here")
    tape.add_scatter(None, index, column, other, True, "here")
    tape.add_scatter(x, index, column, other, False, "here")
    tape.add_row_max(x, column, index, "here")
    tape.add_row_max(x, None, index, "here")
    tape.add_take_rows(x, index, other, "embedding", "here")
    tape.add_embedding_backward(x, index, -1, other, "here")
    tape.add_nll_loss(x, index, -100, True, one, one, "here")
    tape.add_nll_loss_backward(one, index, one, -100, True, other, "here")
    names = ["gather", "scatter_add", "scatter", "max", "argmax", "embedding", "embedding_backward"]
    names += ["nll_loss", "nll_loss_backward"]
    assert [(name, place) for name, place, _ in tape.times()] == [(name, "here") for name in names]
    assert tape.calls == tape.direct_calls == len(names)

"""Elementwise programs: each operation by itself, how elements are read, stored and reduced, and drawn programs."""

import itertools
import random
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastmlp import _C, Activation
from fastmlp.activations import DEFAULTS
from tests.support.axes import ACTIVATIONS
from tests.support.bounds import Bounded, activate, activated, differentiated, gamma
from tests.support.elementwise import (
    EXACT,
    OF_FLOAT32,
    ROUNDED,
    Instruction,
    compute,
    draw_instructions,
    draw_layout,
    one_by_one,
    run,
)
from tests.support.memory import Buffers

INF, NAN = float("inf"), float("nan")
OPERATIONS = _C.elementwise_operations()
#: Lengths around the ends of vectors and of blocks, which hold 4 KiB.
LENGTHS = [*range(1, 36), 63, 64, 65, 255, 256, 257, 511, 512, 513, 1000, 1023, 1024, 1025, 2049, 5000]


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def skips(name: str, dtype: torch.dtype) -> bool:
    """Whether an operation is none of a dtype, by its error."""
    if dtype == torch.float32 or name not in OF_FLOAT32:
        return False
    with pytest.raises(TypeError, match=f"{name} is asked for in torch.float64, expected torch.float32"):
        compute(name, [torch.ones(3, dtype=dtype)])
    return True


def kinds(dtype: torch.dtype) -> list[torch.dtype]:
    """What numbers may be in memory that a program of a dtype reads."""
    sixteen = [torch.bfloat16, torch.float16] if dtype == torch.float32 else []
    return [dtype, torch.bool, torch.int64, *sixteen]


def stored_as(dtype: torch.dtype) -> list[torch.dtype]:
    """As what numbers may be stored that a program of a dtype makes."""
    return [kind for kind in kinds(dtype) if kind.is_floating_point]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(name: str, count: int, dtype: torch.dtype) -> list[Tensor]:
    """Operands of an operation over many magnitudes, within the range of what it makes."""
    spread = 3.0 if name in ("exp", "expm1", "bce_with_logits") else 12.0
    operands = [torch.randn(count, dtype=dtype).sign() * (torch.randn(count, dtype=dtype) * spread / 3).exp().to(dtype)
                for _ in range(OPERATIONS[name][0])]  # fmt: skip
    for operand in operands[: 3 if name in ("where", "and", "or", "not") else 0]:
        operand[torch.rand(count) < 0.3] = 0
    if name in ("log", "sqrt", "rsqrt"):
        operands[0].abs_()
    if name == "log1p":
        operands[0] = torch.where(operands[0] > -1, operands[0], -operands[0])
    if name == "cos":
        operands[0].clamp_(-24000, 24000)
    if name == "bce_with_logits":
        operands[1].uniform_()
    return operands


SCALARS = (0.7, -1.5, 0.3)


def test_every_operation_is_tested() -> None:
    values = {f"{kind}_{name}" for kind in ("value", "gradient") for name in DEFAULTS}
    assert {*EXACT, *ROUNDED, "constant"} | values == set(OPERATIONS)


@pytest.mark.parametrize("name", EXACT)
def test_exact_operations(isa: str, dtype: torch.dtype, name: str) -> None:
    if skips(name, dtype):
        return
    for scalar in SCALARS if OPERATIONS[name][1] else (None,):
        operands, scalars = drawn(name, 1003, dtype), [] if scalar is None else [scalar]
        for operand in operands[1:]:
            operand[::7] = operands[0][::7]
        wanted = EXACT[name](*operands, *scalars)
        assert torch.equal(compute(name, operands, *scalars), wanted)
        assert _C.last_isa() == isa


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_operations(isa: str, dtype: torch.dtype, name: str) -> None:
    case, finfo = ROUNDED[name], torch.finfo(dtype)
    for scalar in SCALARS if OPERATIONS[name][1] else (None,):
        operands, scalars = drawn(name, 4001, dtype), [] if scalar is None else [scalar]
        # The scalar is rounded to the dtype; torch's functions of float64 err by an ulp too.
        exact = [operand.double() for operand in operands] + [float(torch.tensor(s, dtype=dtype)) for s in scalars]
        wanted = case.function(*exact)
        size = case.magnitude(*exact) if case.magnitude else wanted.abs()
        error = (compute(name, operands, *scalars).double() - wanted).abs()
        ulps = case.ulps + (2 if dtype == torch.float64 else 0)
        assert (error <= ulps * finfo.eps * size + finfo.smallest_normal * finfo.eps).all()


def special(dtype: torch.dtype, count: int, *, smallest: bool) -> list[Tensor]:
    """All combinations of values at which functions break."""
    finfo = torch.finfo(dtype)
    points = [0.0, -0.0, 1.0, -1.0, 0.5, 3.0, INF, -INF, NAN]
    if smallest:
        points += [finfo.smallest_normal, finfo.smallest_normal * finfo.eps, -finfo.smallest_normal * finfo.eps]
    return [t.contiguous() for t in torch.tensor(list(itertools.product(points, repeat=count)), dtype=dtype).unbind(1)]


def unlike(found: Tensor, wanted: Tensor, *, signs: bool = True, ulps: float = 0) -> Tensor:
    """Where results differ: in what is NaN, infinite or zero, or by more than rounding."""
    finfo = torch.finfo(wanted.dtype)
    smallest = finfo.smallest_normal * finfo.eps if ulps else 0.0
    close = torch.isclose(found, wanted, rtol=ulps * finfo.eps, atol=smallest, equal_nan=True)
    wrong = ~close | (found.isfinite() != wanted.isfinite())
    if signs:
        wrong |= (found == 0) & (wanted == 0) & (found.signbit() != wanted.signbit())
    return wrong


@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_special_values(isa: str, dtype: torch.dtype, name: str) -> None:
    operands, scalars = OPERATIONS[name]
    if skips(name, dtype):
        return
    function = EXACT[name] if name in EXACT else ROUNDED[name].function
    # Of zeros of different signs torch's maximum depends on where in memory they are.
    signs = name not in ("maximum", "minimum", "clamp_min", "clamp_max")
    # Sums of products of the smallest numbers depend on how often they are rounded.
    smallest = name not in ("add_scaled", "lerp", "addcmul", "addcdiv")
    for scalar in (0.0, -0.0, 0.5, 1.0, -2.0, INF, -INF, NAN) if scalars else (None,):
        values, numbers = special(dtype, operands, smallest=smallest), [] if scalar is None else [scalar]
        found, wanted = compute(name, values, *numbers), function(*values, *numbers)
        wrong = unlike(found, wanted, signs=signs, ulps=0 if name in EXACT else 16)
        assert not wrong.any(), (scalar, torch.stack([*values, found, wanted], 1)[wrong].tolist()[:5])


@pytest.mark.parametrize("scalar", [0.0, -0.0, 1.1, INF, NAN])
def test_constant(isa: str, dtype: torch.dtype, scalar: float) -> None:
    output = torch.empty(37, dtype=dtype)
    _C.run_elementwise([], [("constant", [], [scalar])], [(output, 0, "store", 1.0)])
    assert not unlike(output, torch.full_like(output, scalar)).any()


@pytest.mark.parametrize("act", ACTIVATIONS, ids=repr)
def test_activations(isa: str, dtype: torch.dtype, act: Activation) -> None:
    scalars = list(act.parameters.values())
    assert OPERATIONS[f"value_{act.name}"] == (1, len(scalars))
    assert OPERATIONS[f"gradient_{act.name}"] == (2, len(scalars))
    z, g = torch.randn(2003, dtype=dtype) * 4, torch.randn(2003, dtype=dtype)
    if dtype == torch.float64:
        z.clamp_(-4, 4)  # farther out torch's own formulas, in the same precision, cancel
    wanted = activated(Bounded.exact(z), act, dtype)
    found = compute(f"value_{act.name}", [z], *scalars)
    assert ((found.double() - wanted.value).abs() <= wanted.error).all()
    keeps = {name: keeps_output for name, _, _, keeps_output, _ in _C.activations()}[act.name]
    saved = activate(z, act) if keeps else z
    wanted = differentiated(Bounded.exact(g), Bounded.exact(z), act, dtype)
    found = compute(f"gradient_{act.name}", [g, saved], *scalars)
    assert ((found.double() - wanted.value).abs() <= wanted.error).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(isa: str, dtype: torch.dtype, length: int) -> None:
    """Nothing is written outside of the outputs, and no element depends on its place."""
    whole = torch.randn(3, length + 1, dtype=dtype)
    a, b, c = whole[:, 1:]  # misaligned
    buffers = Buffers()
    stored, mask = buffers.like(a), buffers.like(a > 0)
    total, most = buffers.like(a[0]), buffers.like(a[0])
    program: list[Instruction] = [
        ("mul", [0, 1], []),
        ("add", [3, 2], []),
        ("gt_scalar", [4], [0.0]),
        ("where", [5, 4, 0], []),
    ]
    run([a, b, c], program, [(stored, 6, "store", 1), (mask, 5, "store", 1), (total, 6, "sum", 2), (most, 6, "max", 1)])
    sums = a * b + c
    wanted = torch.where(sums > 0, sums, a)
    assert torch.equal(stored, wanted)
    assert torch.equal(mask, sums > 0)
    assert abs(total.item() - 2 * wanted.double().sum()) <= 2 * gamma(length, dtype) * wanted.abs().double().sum()
    assert torch.equal(most, wanted.max())
    assert buffers.intact()


def shapes() -> list[tuple[int, ...]]:
    return [
        (),
        (1,),
        (1, 1),
        (7,),
        (3, 5),
        (64, 64),
        (5, 700),
        (700, 3),
        (2, 3, 4),
        (6, 1, 33),
        (3, 2, 5, 4),
        (2, 600, 3),
        (2, 3, 1100),
    ]


@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_layouts(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Inputs of any strides and dtype, outputs of any strides."""
    rng = random.Random(len(shape) * 1000 + sum(shape))
    for _ in range(20):
        a = draw_layout(rng, shape, dtype)
        b = draw_layout(rng, shape, rng.choice(kinds(dtype)))
        order, stored = rng.sample(range(len(shape)), len(shape)), rng.choice(stored_as(dtype))
        lying = torch.full([2 * shape[d] for d in order], 99.0, dtype=stored)
        output = lying.permute([order.index(d) for d in range(len(shape))])[(slice(None, None, 2),) * len(shape)]
        mask = torch.empty([shape[d] for d in order], dtype=torch.bool).permute(
            [order.index(d) for d in range(len(shape))]
        )
        run([a, b], [("sub", [0, 1], [])], [(output, 2, "store", 1.0), (mask, 1, "store", 1.0)])
        assert torch.equal(output, (a - b.to(dtype)).to(stored))
        assert torch.equal(mask, b != 0)
        assert int((lying == 99.0).sum()) == lying.numel() - output.numel()


@pytest.mark.parametrize("shape", shapes(), ids=str)
@pytest.mark.parametrize("how", ["sum", "max", "min"])
def test_reductions(isa: str, dtype: torch.dtype, how: str, shape: tuple[int, ...]) -> None:
    """Over every set of dimensions, into outputs of any strides."""
    rng = random.Random(len(shape) * 1000 + sum(shape))
    dims = range(len(shape))
    for kept in itertools.chain.from_iterable(itertools.combinations(dims, n) for n in range(len(shape) + 1)):
        over = [d for d in dims if d not in kept]
        a, scale = draw_layout(rng, shape, rng.choice(stored_as(dtype))), rng.choice((1.0, 0.25, -3.0))
        sizes, stored = [shape[d] if d in kept else 1 for d in dims], rng.choice(stored_as(dtype))
        lying = torch.full([2 * size for size in sizes], 99.0, dtype=stored)
        output = lying[(slice(None, None, 2),) * len(shape)]
        run([a], [("neg", [0], [])], [(output, 1, how, scale)])
        terms = -a.double()
        if how == "sum":
            wanted = scale * terms.sum(over, keepdim=True) if over else scale * terms
            size = terms.abs().sum(over, keepdim=True) if over else terms.abs()
            error = abs(scale) * gamma(a.numel() // output.numel() + 1, dtype) * size
            if stored != dtype:
                error += torch.finfo(stored).eps * (wanted.abs() + error) + torch.finfo(stored).smallest_normal
            assert ((output - wanted).abs() <= error).all()
        else:
            wanted = getattr(torch, f"a{how}")(terms, over, keepdim=True) if over else terms
            assert torch.equal(output.double(), wanted.to(stored).double())
        assert int((lying == 99.0).sum()) == lying.numel() - output.numel()


@pytest.mark.parametrize("how", ["sum", "max", "min"])
def test_nan_and_infinities_are_reduced(isa: str, dtype: torch.dtype, how: str) -> None:
    for length, value in itertools.product((3, 17, 64, 1500), (NAN, INF, -INF)):
        for place in {0, 1, length // 2, length - 1}:
            for shape in ((length,), (length, 5), (5, length)):
                a = torch.randn(shape, dtype=dtype)
                dim = shape.index(length)
                a.select(dim, place).fill_(value)
                output = torch.empty([1 if d == dim else shape[d] for d in range(len(shape))], dtype=dtype)
                run([a], [], [(output, 0, how, 1.0)])
                wanted = getattr(a, {"sum": "sum", "max": "amax", "min": "amin"}[how])(dim, keepdim=True)
                assert torch.equal(output.isnan(), wanted.isnan())
                assert torch.equal(output.isinf(), wanted.isinf())
                assert how == "sum" or torch.equal(output.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("columns", [1, 5, 16, 37])
@pytest.mark.parametrize("how", ["max", "min"])
def test_the_largest_of_negative_zeros_is_one(isa: str, dtype: torch.dtype, how: str, columns: int) -> None:
    a = torch.full((3, columns), -0.0, dtype=dtype)
    for shape in ((1, columns), (3, 1)):
        output = torch.ones(shape, dtype=dtype)
        run([a], [], [(output, 0, how, 1.0)])
        assert torch.equal(output, torch.zeros_like(output))
        assert output.signbit().all()


@pytest.mark.parametrize("count", [5, 600])
def test_in_place(isa: str, dtype: torch.dtype, count: int) -> None:
    """Inputs may be overwritten, also by an output that is ready long before they were read last."""
    layouts = {
        "gapless": lambda: torch.randn(3, count, dtype=dtype),
        "transposed": lambda: torch.randn(count, 3, dtype=dtype).t(),
        "sliced": lambda: torch.randn(3, 2 * count, dtype=dtype)[:, :count],
        "strided": lambda: torch.randn(3, 2 * count, dtype=dtype)[:, ::2],
    }
    for make in layouts.values():
        a, b, total = make(), make(), torch.empty((), dtype=dtype)
        a0, b0 = a.clone(), b.clone()
        program: list[Instruction] = [("mul", [0, 1], []), ("add", [2, 0], []), ("sub", [3, 1], [])]
        run([a, b], program, [(a, 2, "store", 1), (b, 4, "store", 1), (total, 0, "max", 1)])
        assert torch.equal(a, a0 * b0)
        assert torch.equal(b, a0 * b0 + a0 - b0)
        assert torch.equal(total, a0.max())
        a1, b1 = a.clone(), b.clone()
        run([a, b], [], [(a, 1, "store", 1), (b, 0, "store", 1)])
        assert torch.equal(a, b1)
        assert torch.equal(b, a1)


@pytest.mark.parametrize("shape", [(300_000,), (1000, 300), (300, 1000), (60_000, 5), (3, 100_000), (40, 30, 250)])
def test_threads(threads: None, isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The bits of results do not depend on the number of threads."""
    a, b = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    program: list[Instruction] = [("mul", [0, 1], []), ("value_tanh", [2], []), ("gt_scalar", [3], [0.5])]
    found: list[list[Tensor]] = []
    sizes = [(1,) * len(shape), (1,) * (len(shape) - 1) + shape[-1:], (*shape[:-1], 1)]
    if len(shape) == 3:
        sizes.append((1, shape[1], 1))
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for reduced in sizes:
            stored, mask = torch.empty_like(a), torch.empty(shape, dtype=torch.bool)
            total, most = torch.empty(reduced, dtype=dtype), torch.empty(reduced, dtype=dtype)
            ends = [(stored, 3, "store", 1.0), (mask, 4, "store", 1.0), (total, 2, "sum", 1.0), (most, 3, "max", 1.0)]
            run([a, b], program, ends if total.shape != shape else ends[:2])
            found.append([stored, mask, *([total, most] if total.shape != shape else [])])
    each = len(sizes)
    for i, results in enumerate(found):
        assert all(torch.equal(x, y) for x, y in zip(results, found[i % each], strict=True))
    stored, mask = found[0][:2]
    assert torch.equal(mask, stored > 0.5)
    dims = tuple(range(len(shape)))
    terms = (a * b).double()
    for results, reduced in zip(found, sizes, strict=False):
        if len(results) == 4:
            over = tuple(d for d in dims if reduced[d] == 1)
            error = (results[2] - terms.sum(over, keepdim=True)).abs()
            # Blocks are added in double precision.
            assert (error <= 520 * torch.finfo(dtype).eps * terms.abs().sum(over, keepdim=True)).all()
            assert torch.equal(results[3], stored.amax(over, keepdim=True))


def test_nothing_is_reduced_and_stored(isa: str, dtype: torch.dtype) -> None:
    """Spaces without elements: sums of nothing are 0."""
    for shape, reduced in (((0,), ()), ((3, 0), (3, 1)), ((0, 4), (1, 4)), ((2, 0, 4), (2, 1, 1)), ((0, 4), (0, 1))):
        total, most = torch.full(reduced, 5.0, dtype=dtype), torch.full(reduced, 5.0, dtype=dtype)
        stored = torch.empty(shape, dtype=dtype)
        program: list[Instruction] = [("constant", [], [2.0]), ("mul", [0, 1], [])]
        ends = [(total.expand(shape), 2, "sum", 1.0), (most.expand(shape), 2, "max", 1.0), (stored, 2, "store", 1.0)]
        _C.run_elementwise([torch.empty(shape, dtype=dtype)], program, ends)
        assert torch.equal(total, torch.zeros(reduced, dtype=dtype))
        assert torch.equal(most, torch.full(reduced, 5.0, dtype=dtype))


def test_booleans_are_computed_in_float32(isa: str) -> None:
    a, b = torch.rand(700) > 0.5, torch.rand(700) > 0.5
    output = torch.empty(700, dtype=torch.bool)
    run([a, b], [("not", [1], []), ("and", [0, 2], [])], [(output, 3, "store", 1.0)])
    assert torch.equal(output, a & ~b)


@pytest.mark.parametrize("seed", range(60))
def test_drawn_programs(isa: str, dtype: torch.dtype, seed: int) -> None:
    """A program makes the bits that its instructions make one by one on gapless operands."""
    rng = random.Random(seed)
    shape = tuple(rng.choice((1, 2, 3, 7, 16, 33, 130)) for _ in range(rng.randint(0, 3)))
    inputs = [draw_layout(rng, shape, rng.choice((dtype, *kinds(dtype)))) for _ in range(rng.randint(1, 5))]
    inputs[0] = draw_layout(rng, shape, dtype)
    instructions = draw_instructions(rng, len(inputs), dtype)
    registers = one_by_one(inputs, instructions, dtype)
    outputs: list[tuple[Tensor, int, str, float]] = []
    wanted: list[Tensor] = []
    for _ in range(rng.randint(1, 4)):
        source = rng.randint(0, len(registers) - 1)
        how = rng.choice(("store", "store", "bool", "sum", "max", "min"))
        if how in ("store", "bool"):
            result = torch.empty(shape, dtype=torch.bool if how == "bool" else dtype)
            wanted.append(registers[source] != 0 if how == "bool" else registers[source])
            outputs.append((result, source, "store", 1.0))
        else:
            over = [d for d in range(len(shape)) if rng.random() < 0.5 or shape[d] == 1]
            result = torch.empty([1 if d in over else shape[d] for d in range(len(shape))], dtype=dtype)
            reduce = {"sum": torch.sum, "max": torch.amax, "min": torch.amin}[how]
            terms = registers[source].double()
            wanted.append(reduce(terms, over, keepdim=True) if over else terms)  # type: ignore[operator]
            outputs.append((result, source, how, 1.0))
    run(inputs, instructions, outputs)
    for (result, source, how, _), value in zip(outputs, wanted, strict=True):
        if how != "sum":
            assert torch.equal(result.double().nan_to_num(0.5), value.double().nan_to_num(0.5))
        else:
            size = registers[source].double().abs().sum_to_size(result.shape)
            error = (result.double() - value).abs()
            close = error <= gamma(registers[source].numel() // result.numel() + 1, dtype) * size
            assert (close | ~value.isfinite() | (size > torch.finfo(dtype).max / 4)).all()


#: What is wrong, and the words of the error.
WRONG: dict[str, tuple[type[Exception], str, list[Instruction], list[tuple[Tensor, int, str, float]] | None]] = {
    "no operation": (ValueError, "no operation nothing", [("nothing", [0], [])], None),
    "operands": (ValueError, "add has 1 operands and 0 scalars, expected 2 and 0", [("add", [0], [])], None),
    "scalars": (ValueError, "lt_scalar has 1 operands and 0 scalars", [("lt_scalar", [0], [])], None),
    "register": (ValueError, "register 2 is read, expected 0 to 1", [("add", [0, 2], [])], None),
    "itself": (ValueError, "register 2 is read, expected 0 to 1", [("neg", [2], [])], None),
    "source": (ValueError, "register 5 is read", [], [(torch.empty(3), 5, "store", 1.0)]),
    "end": (ValueError, "got mean", [], [(torch.empty(3), 0, "mean", 1.0)]),
    "shape": (ValueError, r"of shapes \[3\] and \[4\]", [], [(torch.empty(4), 0, "store", 1.0)]),
    "shared": (ValueError, "share memory along dimension 0", [], [(torch.empty(1).expand(3), 0, "store", 1.0)]),
    "outputs": (ValueError, "no outputs", [], []),
    "dtypes": (TypeError, "torch.float32 and torch.float64", [], [(torch.empty(3).double(), 0, "store", 1.0)]),
    "float8": (
        TypeError,
        "torch.float8_e5m2, expected torch.float32",
        [],
        [(torch.empty(3, dtype=torch.float8_e5m2), 0, "store", 1.0)],
    ),
    "integers": (TypeError, "an output is of torch.int64", [], [(torch.empty(3).long(), 0, "store", 1.0)]),
    "sum of booleans": (TypeError, "of a sum is of torch.bool", [], [(torch.empty(3).bool(), 0, "sum", 1.0)]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_programs(case: str) -> None:
    error, words, instructions, outputs = WRONG[case]
    inputs = [torch.ones(3), torch.ones(3)]
    with pytest.raises(error, match=f"^{re.escape('fastmlp: elementwise: ')}.*{words}"):
        _C.run_elementwise(inputs, instructions, [(torch.empty(3), 0, "store", 1.0)] if outputs is None else outputs)


def test_a_node_finds_its_memory_at_each_replay() -> None:
    """Arguments and results are other memory each time."""
    tape, like = _C.Tape(), torch.empty(5, 3)
    memories = [tape.add_memory(owner, 60) for owner in ("outside", "arena", "result")]
    argument, between, result = (tape.add_tensor(memory, like, [5, 3], [3, 1], 0) for memory in memories)
    tape.add_external(
        memories[0], like, argument=0, grad_of=-1, held=False, written=False, counted=False, starts_with_grad=None
    )
    first, second, third = (tape.tensor(index) for index in (argument, between, result))
    tape.add_elementwise([first], [("square", [0], [])], [(second, 1, "store", 1.0)], "here")
    tape.add_elementwise([second, first], [("sub", [0, 1], [])], [(third, 2, "store", 1.0)], "there")
    tape.finish([(-1, -1), (0, 1), (-1, -1)], [(result, -1, False, False)])
    tape.measure_each(1)
    recordings = _C.Recordings()
    recordings.add(tape, _C.Signature((like,), {}), _C.Signature((like,), {}), _C.Surroundings(), [])
    given = [torch.randn(5, 3) for _ in range(4)]
    found = [recordings.replay((x,), {}, None) for x in given]
    for x, y in zip(given, found, strict=True):
        assert torch.equal(y, x * x - x)
    assert [name_and_place[:2] for name_and_place in tape.times()] == [
        ("elementwise", "here"),
        ("elementwise", "there"),
    ]

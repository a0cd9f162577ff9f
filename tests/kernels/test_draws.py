"""Masks of dropout: the numbers that torch draws, bit for bit, and the generator where torch leaves it."""

import math

import pytest
import torch
from torch import Tensor

from fastmlp import _C

#: Around vectors, blocks of 624 words (312 numbers), and pairs of blocks.
SIZES = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 310, 311, 312, 313, 623, 624, 625, 935, 936, 937, 4000]
REAL = [torch.float32, torch.float64]


def by_uniform_numbers(tensor: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Fills a tensor as the kernel has to, by an operator of torch that is the same on all processors."""
    uniform = torch.empty_like(tensor, dtype=torch.float64).uniform_(generator=generator)
    return tensor.copy_(uniform < p)


def torch_draws_so() -> bool:
    """Whether `bernoulli_` does that too. On processors of Intel, it may ask MKL for its numbers instead."""
    ours, torchs = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    expected = by_uniform_numbers(torch.empty(1000), 0.3, ours)
    same = torch.equal(torch.empty(1000).bernoulli_(0.3, generator=torchs), expected)
    return same and torch.equal(torchs.get_state(), ours.get_state())


#: Found without the kernel that is tested, so that a broken one fails here instead of being what torch "does not do".
TORCH_DRAWS_SO = torch_draws_so()


def torchs_and_ours(expected: Tensor, found: Tensor, p: float, generator: torch.Generator | None = None) -> None:
    """Draws both from one state, and compares the numbers and the states after."""
    state = torch.get_rng_state() if generator is None else generator.get_state()
    if TORCH_DRAWS_SO:
        expected.bernoulli_(p, generator=generator)
    else:
        by_uniform_numbers(expected, p, generator)
    after = torch.get_rng_state() if generator is None else generator.get_state()
    if generator is None:
        torch.set_rng_state(state)
    else:
        generator.set_state(state)
    _C.bernoulli_(found, p, generator)
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state() if generator is None else generator.get_state(), after)


def test_the_library_knows_how_torch_draws() -> None:
    assert _C.draws_as_torch() == TORCH_DRAWS_SO


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("n", SIZES)
def test_masks_are_torchs(isa: str, dtype: torch.dtype, n: int) -> None:
    for seed in (0, 1, 2**31, 2**63 + 5):
        for p in (0.0, 1e-300, 1e-9, 0.1, 1 / 3, 0.5, 0.9, 1 - 2**-53, 1.0):
            torch.manual_seed(seed)
            # Junk before, so that a number that is not written shows.
            torchs_and_ours(torch.full((n,), 7.0, dtype=dtype), torch.full((n,), 7.0, dtype=dtype), p)
    assert n == 0 or _C.last_isa() == isa


def test_they_go_on_where_other_draws_stopped(isa: str) -> None:
    """Among draws of one word, of pairs, and of normal numbers that wait for their twin."""
    for seed in range(30):
        torch.manual_seed(seed)
        for i in range(12):
            torch.rand(i % 5)
            torch.randn(1 + 2 * (i % 3), dtype=torch.float64)
            torch.randint(9, (1 + 7 * i,))
            n = (seed * 37 + i * 101) % 1300
            torchs_and_ours(torch.empty(n), torch.empty(n), 0.3)


def test_a_generator_of_ones_own(isa: str) -> None:
    generator = torch.Generator().manual_seed(3)
    before = torch.get_rng_state()
    for n in (5, 700, 1000):
        torchs_and_ours(torch.empty(n), torch.empty(n), 0.6, generator)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", REAL)
def test_thresholds_are_exact(isa: str, dtype: torch.dtype) -> None:
    """A probability of which the number drawn is the neighbour, the number itself, and the other neighbour."""
    generator = torch.Generator()
    for seed in range(40):
        fraction = torch.rand(1, dtype=torch.float64, generator=generator.manual_seed(seed)).item()
        drawn = []
        for p in (math.nextafter(fraction, 0), fraction, math.nextafter(fraction, 1)):
            found = torch.empty(1, dtype=dtype)
            torchs_and_ours(torch.empty(1, dtype=dtype), found, p, generator.manual_seed(seed))
            drawn.append(found.item())
        assert drawn == [0, 0, 1]


def test_in_the_order_of_memory(isa: str) -> None:
    """As torch fills what is transposed, but not what has gaps."""
    torchs_and_ours(torch.empty(40, 30).t(), torch.empty(40, 30).t(), 0.5)
    torchs_and_ours(
        torch.empty(3, 8, 5, 7).to(memory_format=torch.channels_last),
        torch.empty(3, 8, 5, 7).to(memory_format=torch.channels_last),
        0.5,
    )
    for gaps in (torch.empty(40, 30)[:, ::2], torch.empty(1, 30).expand(40, 30)):
        with pytest.raises(ValueError, match="fastmlp: tensor has gaps"):
            _C.bernoulli_(gaps, 0.5, None)


def test_neighbours_are_not_written(isa: str) -> None:
    for dtype in REAL:
        for n in (1, 5, 313, 950):
            whole = torch.full((n + 64,), 7.0, dtype=dtype)
            _C.bernoulli_(whole[32 : 32 + n], 0.5, None)
            assert (whole[:32] == 7).all()
            assert (whole[32 + n :] == 7).all()


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), float("inf")])
def test_what_is_no_probability_raises(p: float) -> None:
    before, tensor = torch.get_rng_state(), torch.full((3,), 7.0)
    with pytest.raises(ValueError, match="fastmlp: p must be a probability"):
        _C.bernoulli_(tensor, p, None)
    assert torch.equal(torch.get_rng_state(), before)
    assert tensor.tolist() == [7.0] * 3


def test_other_dtypes_raise() -> None:
    with pytest.raises(TypeError, match="fastmlp: tensor is of BFloat16, expected float32 or float64"):
        _C.bernoulli_(torch.empty(3, dtype=torch.bfloat16), 0.5, None)


def test_on_a_tape(isa: str) -> None:
    tape = _C.Tape()
    tensor = tape.add_tensor(tape.add_memory("tape", 4000), torch.empty(0), [1000], [1], 0)
    tape.add_bernoulli(tape.tensor(tensor), 0.2, None, "here")
    tape.finish([(0, 0)], [])
    assert tape.calls == 1
    with pytest.raises(ValueError, match="fastmlp: p must be a probability"):
        tape.add_bernoulli(tape.tensor(tensor), 2, None, "here")

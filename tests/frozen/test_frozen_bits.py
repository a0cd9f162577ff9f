"""Frozen networks: their values against float64, and the law that a row's bits are its own.

A row is computed alone, and again among others, strided, misaligned, and by several threads; all of it must be equal
bit by bit. The widths are such that every kind of tile, edge of a panel, and chain of products takes part.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import Activation, freeze
from fastmlp.activations import IDENTITY
from tests.support import bounds
from tests.support.bounds import Bounded, assert_within

#: Batches around the sizes of tiles and panels of every instruction set.
BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 14, 15, 16, 17, 28, 31, 32, 33, 47, 64, 65, 97, 129, 257, 400)

#: One chain of products, several, and none; full and ragged panels; few features at the end, which rows come back from
#: by copying, one feature, and many.
WIDTHS = (
    (1, 1),
    (1, 2, 1),
    (5, 3),
    (3, 16, 1),
    (10, 50, 1),
    (17, 33, 31, 5),
    (0, 4),
    (4, 0, 3),
    (64, 64, 4),
    (193, 15, 385),
    (1000, 14, 100),
    (7, 2048, 9),
)


def seeded(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def layers_of(widths: Sequence[int], activation: Activation, dtype: torch.dtype, biases: bool = True) -> nn.Sequential:
    """Layers with weights of such a size that activations neither vanish nor grow."""
    layers = []
    for fan_in, fan_out in pairwise(widths):
        layer = fastmlp.Linear(max(fan_in, 1), max(fan_out, 1), bias=biases, activation=activation, dtype=dtype)
        layer.weight = nn.Parameter((seeded(fan_out, fan_in, dtype=dtype).double() / max(fan_in, 1) ** 0.5).to(dtype))
        if biases:
            layer.bias = nn.Parameter(seeded(fan_out, dtype=dtype))
        layers.append(layer)
    return nn.Sequential(*layers)


def bits(x: Tensor) -> Tensor:
    """So that NaNs and the signs of zeros count."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(found: Tensor, expected: Tensor, what: object = "") -> None:
    assert found.shape == expected.shape, what
    assert torch.equal(bits(found), bits(expected)), what


def expected_of(model: nn.Sequential, x: Tensor, rounded: torch.dtype | None = None) -> Bounded:
    """In float64, with a bound; `rounded` as `freeze(model, dtype=rounded)` does."""
    dtype = x.dtype if rounded is None else rounded

    def stored(value: Bounded) -> Bounded:
        return bounds.stored(value, dtype)

    output = stored(Bounded.exact(x)) if rounded else Bounded.exact(x)
    for i, layer in enumerate(model):
        assert isinstance(layer, fastmlp.Linear)
        weight = layer.weight.detach()
        exact = Bounded.exact(weight.t() if rounded is None else weight.to(rounded).t())
        bias = None if layer.bias is None else layer.bias.detach().double()
        output = bounds.activated(bounds.product(output, exact, dtype, bias), layer.activation, dtype)
        if i + 1 < len(model):
            output = stored(output)
    return output


# Values.


Drawn: TypeAlias = tuple[nn.Sequential, Tensor, Bounded]


@cache
def drawn(widths: tuple[int, ...], activation: Activation, dtype: torch.dtype, biases: bool, rows: int) -> Drawn:
    """A model, an input and what is expected, which takes long and is the same for every instruction set."""
    torch.manual_seed(rows)
    model = layers_of(widths, activation, dtype, biases)
    x = seeded(rows, widths[0], dtype=dtype)
    return model, x, expected_of(model, x)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_values(isa: str, dtype: torch.dtype, widths: tuple[int, ...], rows: int) -> None:
    for activation in (Activation("relu"), Activation("tanh")):
        for biases in (True, False):
            model, x, expected = drawn(widths, activation, dtype, biases, rows)
            assert_within(freeze(model)(x), expected, f"{activation}, {biases}")
    assert fastmlp._C.last_isa() in (isa, "avx512")  # whose kernels avx512_bf16 has but for bfloat16


@pytest.mark.parametrize("rows", [1, 64])
def test_activations(isa: str, dtype: torch.dtype, activation: Activation, rows: int) -> None:
    model, x, expected = drawn((20, 35, 17, 3), activation, dtype, True, rows)
    assert_within(freeze(model)(x), expected, repr(activation))


@cache
def generated(dtype: torch.dtype, seed: int) -> Drawn:
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    widths = [draw(300) if draw(3) > 1 else draw(20) for _ in range(draw(5) + 1)]
    names = list(fastmlp.activations.DEFAULTS)
    return drawn(tuple(widths), Activation(names[draw(len(names)) - 1]), dtype, draw(4) > 1, draw(90))


@pytest.mark.parametrize("seed", range(30))
def test_generated(isa: str, dtype: torch.dtype, seed: int) -> None:
    model, x, expected = generated(dtype, seed)
    assert_within(freeze(model)(x), expected, str(model))


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_values_in_bfloat16(isa: str, widths: tuple[int, ...], rows: int) -> None:
    for activation in (IDENTITY, Activation("relu"), Activation("gelu")):
        model = layers_of(widths, activation, torch.float32)
        frozen = freeze(model, dtype=torch.bfloat16)
        x = seeded(rows, widths[0], dtype=torch.float32)
        found = frozen(x)
        assert found.dtype == torch.float32
        assert_within(found, expected_of(model, x, torch.bfloat16), repr(activation))


def test_special_values(isa: str, dtype: torch.dtype) -> None:
    """NaN and infinity reach what they reach in torch, and nothing else: not other rows, nor what fills panels up."""
    model = layers_of((5, 18, 3), Activation("relu"), dtype)
    frozen = freeze(model)
    for value in (float("nan"), float("inf"), -float("inf")):
        for rows in (1, 3, 40):
            x = seeded(rows, 5, dtype=dtype)
            plain = frozen(x)
            x[rows // 2, 2] = value
            found = frozen(x)
            other = torch.arange(rows) != rows // 2
            assert_same_bits(found[other], plain[other])
            reference = model.double()(x.double())[rows // 2]
            model.to(dtype)
            assert torch.equal(torch.isnan(found[rows // 2]), torch.isnan(reference))


# Bits.


def frozen_networks(widths: tuple[int, ...], dtype: torch.dtype) -> Iterator[fastmlp.FrozenMLP]:
    for activation in (Activation("relu"), Activation("gelu")):
        yield freeze(layers_of(widths, activation, dtype))
    if dtype == torch.float32:
        yield freeze(layers_of(widths, Activation("silu"), dtype), dtype=torch.bfloat16)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_batches(isa: str, dtype: torch.dtype, widths: tuple[int, ...]) -> None:
    x = seeded(max(BATCHES), widths[0], dtype=dtype)
    for frozen in frozen_networks(widths, dtype):
        alone = torch.cat([frozen(x[i : i + 1]) for i in range(len(x))])
        for batch in BATCHES:
            assert_same_bits(frozen(x[:batch]), alone[:batch], (frozen, batch))
            # Other rows beside it, and at another place.
            assert_same_bits(frozen(x[-batch:]), alone[-batch:], (frozen, batch))


@pytest.mark.parametrize("features", [1, 2, 15, 16, 17, 31, 32, 33, 63, 100, 192, 193, 384, 400, 2048])
def test_ragged_widths(isa: str, dtype: torch.dtype, features: int) -> None:
    x = seeded(70, features, dtype=dtype)
    for out in (1, 3, 16, 40):
        frozen = freeze(layers_of((features, out), Activation("sigmoid"), dtype))
        alone = torch.cat([frozen(x[i : i + 1]) for i in range(len(x))])
        for batch in (2, 5, 14, 33, 70):
            assert_same_bits(frozen(x[:batch]), alone[:batch], (frozen, batch))


@pytest.mark.parametrize("widths", [(10, 50, 1), (64, 64, 4), (300, 40, 33)], ids=str)
def test_layouts(isa: str, dtype: torch.dtype, widths: tuple[int, ...]) -> None:
    k = widths[0]
    for rows in (1, 5, 48):
        x = seeded(rows, k, dtype=dtype)
        layouts = {
            "transposed": x.t().contiguous().t(),
            "every other": torch.stack([x, x], dim=-1).flatten(1)[:, ::2],
            "rows apart": torch.cat([x, x], dim=1)[:, :k],
            "4096 bytes apart": torch.cat([x, x.new_zeros(rows, 4096 - k)], dim=1)[:, :k],
            "offset": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(rows, k),
        }
        for frozen in frozen_networks(widths, dtype):
            expected = frozen(x)
            for name, y in layouts.items():
                assert_same_bits(frozen(y), expected, (frozen, rows, name))
            assert_same_bits(frozen(x[:1].expand(rows, k)), expected[:1].expand(rows, -1), (frozen, rows, "expanded"))
            deep = x.view(1, rows, 1, k)
            assert_same_bits(frozen(deep), expected.view(1, rows, 1, -1), (frozen, rows, "dimensions"))
            # Leading dimensions that are no single run of rows.
            pair = torch.stack([x, x]).transpose(0, 1)
            assert_same_bits(frozen(pair), torch.stack([expected, expected]).transpose(0, 1), (frozen, rows, "pair"))
            spread = torch.stack([x, x.neg()], dim=1)[:, None].expand(rows, 3, 2, k).permute(1, 2, 0, 3)
            assert_same_bits(frozen(spread)[2, 0], expected, (frozen, rows, "spread"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_arrays(isa: str, dtype: torch.dtype) -> None:
    for widths in ((10, 50, 1), (33, 40, 17)):
        k = widths[0]
        for frozen in frozen_networks(widths, dtype):
            for rows in (1, 5, 48):
                x = seeded(rows, k, dtype=dtype)
                expected, array = frozen(x), x.numpy()
                misaligned = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(rows, k)
                misaligned[:] = array
                record = np.zeros((rows, k), np.dtype([("a", np.int8), ("b", array.dtype)]))
                record["b"] = array
                read_only = array.copy()
                read_only.flags.writeable = False
                layouts = [array, np.asfortranarray(array), misaligned, record["b"], array[::-1][::-1], read_only]
                for y in layouts:
                    found = frozen(y)
                    assert type(found) is np.ndarray
                    assert_same_bits(torch.from_numpy(found), expected, (frozen, rows, y.strides))
                assert_same_bits(torch.from_numpy(frozen(array[::-1])), expected.flip(0), (frozen, rows))


@pytest.mark.parametrize("threads", [2, 4])
def test_threads(isa: str, dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    # So much work that threads are worth waking.
    for widths, rows in (((10, 50, 1), 20000), ((300, 256, 64), 1000), ((700, 300), 77)):
        x = seeded(rows, widths[0], dtype=dtype)
        for frozen in frozen_networks(widths, dtype):
            torch.set_num_threads(1)
            expected = frozen(x)
            torch.set_num_threads(threads)
            found = frozen(x)
            torch.set_num_threads(before)
            assert_same_bits(found, expected, frozen)

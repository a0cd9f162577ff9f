"""The CUDA kernels on a GPU, by `make gpu-test`: held to the bounds of the emulator's: test_cuda_kernels.py.

Larger shapes too, and whichever way products go.
"""

import gc
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastmlp import _C, Activation, functional
from fastmlp.activations import IDENTITY, resolve
from tests.support.bounds import assert_within, network
from tests.support.kernel_checks import KernelChecks, shapes_around
from tests.support.layouts import CUDA_LAYOUTS

if "cuda" not in _C.devices():
    pytest.skip("the build has no CUDA kernels", allow_module_level=True)
if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

checks = KernelChecks(lambda: _C, "cuda", rounds_sums=True)


@pytest.fixture(autouse=True)
def healthy() -> Iterator[None]:
    """An error that a kernel left behind is told by the test that launched it."""
    yield
    torch.cuda.synchronize()


@pytest.mark.parametrize("tile", [(32, 32, 16), (16, 64, 64), (64, 64, 32)], ids=str)
def test_shapes_around_tiles(tile: tuple[int, int, int], dtype: torch.dtype) -> None:
    for m, n, k in shapes_around(*tile):
        for act in (resolve("relu"), IDENTITY):
            checks.one_layer(m, n, k, dtype, act, bias=(m + n + k) % 3 > 0)


#: M, N and K for which the costs of tiles.h take each size of tile, or the library, on cards from a T4 to a B200,
#: aligned and not; long sums over the batch, which are cut; and one row.
LARGE = (
    *((640, 640, 64), (641, 643, 65), (1000, 1000, 1000)),
    *((1536, 1536, 96), (2048, 2056, 72), (1801, 1803, 33), (20001, 128, 128)),
    *((65536, 64, 64), (100003, 17, 9), (70000, 1, 3), (40000, 3, 1)),
    *((1, 4096, 4096), (3, 5, 20000), (33, 65, 5000)),
)


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for act in (resolve("silu"), IDENTITY):
        checks.one_layer(*shape, dtype, act)


@pytest.fixture
def set_up() -> Iterator[Callable[[int, int], None]]:
    """Sets what runs: a tile by its number in csrc/cuda/tiles.h, and whether networks are fused; -1: by the table."""
    yield torch.ops.fastmlp_cuda.set_up
    torch.ops.fastmlp_cuda.set_up(-1, -1)


@pytest.mark.parametrize("fuses", [0, 1], ids=["by_layers", "fused"])
@pytest.mark.parametrize("tile", range(4), ids=["large", "medium", "small", "library"])
def test_every_way(tile: int, fuses: int, dtype: torch.dtype, set_up: Callable[[int, int], None]) -> None:
    set_up(tile, fuses)
    for act in ("relu", "tanh", "silu"):
        checks.networks(dtype, resolve(act))
        checks.chain(300, (64, 128, 96, 40), resolve(act), IDENTITY, dtype)
        checks.one_layer(150, 136, 72, dtype, resolve(act))


def test_tf32_where_torch_allows_it() -> None:
    """Large products and wide networks; nothing else changes."""
    input, weight = checks.randn(512, 512), checks.randn(512, 512)
    exact = input.double() @ weight.double().T
    errors = {}
    for name, (unset, *values) in {
        "fp32_precision": ("ieee", "ieee", "tf32"),
        "allow_tf32": (False, False, True),
    }.items():
        for value in values:
            setattr(torch.backends.cuda.matmul, name, value)
            found = functional.linear(input, weight)
            setattr(torch.backends.cuda.matmul, name, unset)
            errors[name, value] = float((found - exact).norm() / exact.norm())
    # Ten bits of fraction in place of 23.
    assert errors["allow_tf32", False] < 2**-20 < errors["allow_tf32", True] < 2**-10
    assert errors["fp32_precision", "ieee"] < 2**-20 < errors["fp32_precision", "tf32"] < 2**-10


def test_every_activation(dtype: torch.dtype, activation: Activation) -> None:
    checks.one_layer(37, 16, 24, dtype, activation)
    checks.one_layer(301, 5, 8, dtype, activation, bias=False)


def test_networks(dtype: torch.dtype, activation: Activation) -> None:
    checks.networks(dtype, activation)


@pytest.mark.parametrize("rows", [1, 31, 33, 64, 65, 5000, 70001])
def test_deep_and_wide_networks(rows: int, dtype: torch.dtype) -> None:
    """Fused in float32 up to 128 features and 16 layers, by layers beyond."""
    act = resolve("gelu")
    for widths in ([1, 1, 1], [128, 128, 128], [7, 9, 8, 127, 3], [5, 129, 2], [4] * 18):
        checks.chain(rows, widths, act, IDENTITY if rows % 2 else act, dtype)


@pytest.mark.parametrize("layout", CUDA_LAYOUTS)
@pytest.mark.parametrize("which", ["input", "weight", "grad", "saved"])
def test_layouts(dtype: torch.dtype, which: str, layout: str) -> None:
    checks.layouts(dtype, which, layout)


def test_whole_numbers_are_summed_exactly(dtype: torch.dtype) -> None:
    checks.whole_numbers(dtype, ((9, 16, 400), (700, 8, 24), (3, 5, 333), (100000, 64, 48), (1600, 1536, 1000)))


def test_only_needed_gradients(dtype: torch.dtype) -> None:
    checks.needed_gradients(dtype)


@pytest.mark.parametrize("layers", [1, 2])
def test_special_values_are_torch_s(
    layers: int, dtype: torch.dtype, activation: Activation, without_onednn: None
) -> None:
    checks.special_values(dtype, activation, layers)


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_rows_of_narrow_networks_end_in_a_chunk(act: str, dtype: torch.dtype) -> None:
    checks.narrow_parts_of_chunks(dtype, resolve(act))


def test_same_bits_twice(dtype: torch.dtype) -> None:
    def everything() -> list[Tensor]:
        torch.manual_seed(0)
        results = checks.one_layer(70001, 40, 48, dtype, resolve("tanh"))
        results += checks.chain(5000, [16, 64, 64, 3], resolve("silu"), IDENTITY, dtype)
        return results + checks.one_layer(1600, 1600, 512, dtype, resolve("gelu"))

    for one, other in zip(everything(), everything(), strict=True):
        assert torch.equal(one, other)


def test_float32_is_not_tf32() -> None:
    checks.float32_is_not_tf32()


def sparse_rows(rows: int, features: int, where: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros but for some rows, so that sums over all rows have few terms."""
    x = torch.zeros(rows, features, dtype=dtype, device="cuda")
    x[where] = checks.randn(len(where), features, dtype=dtype)
    return x


@pytest.mark.parametrize(("dtype", "widths"), [(torch.float16, [65, 65]), (torch.float32, [65, 8, 65])], ids=str)
def test_more_than_2_to_the_31_elements(dtype: torch.dtype, widths: list[int]) -> None:
    rows = 2**25 + 1  # of 65 features
    needed = 6 * rows * 65 * dtype.itemsize
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of the GPU's memory, of which {free >> 30} are free")
    middle = 2**31 // 65
    where = torch.tensor([0, 1, 2, middle - 1, middle, middle + 1, rows - 2, rows - 1], device="cuda")
    input, grad = (sparse_rows(rows, width, where, dtype) for width in (widths[0], widths[-1]))
    weights = [checks.randn(n, k, dtype=dtype) / 8 for k, n in pairwise(widths)]
    acts = [resolve("relu")] * (len(weights) - 1) + [IDENTITY]
    stack = checks.native([False] * len(weights), acts)
    expected = network(input[where], weights, [None] * len(weights), acts, grad[where])
    output, saved = _C.forward(stack, input, weights)
    assert_within(output[where], expected.output, "output")
    elsewhere = torch.arange(5, rows, 10007, device="cuda")
    assert not output[elsewhere].any()
    gradients = _C.backward(stack, grad, input, saved[: len(weights) - 1], weights, [True] * (1 + len(weights)))
    assert gradients[0] is not None
    assert not gradients[0][elsewhere].any()
    for i, found in enumerate(gradients):
        assert found is not None
        assert_within(found[where] if i == 0 else found, expected.gradients[i], f"gradient {i}")
    del input, grad, output, saved, gradients, found
    torch.cuda.empty_cache()

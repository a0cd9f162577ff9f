"""What csrc/cuda chooses for a card: by what the device says of itself, by costs, by measurements. Nothing runs here.

Cards are named by architecture, multiprocessors, and bytes of shared memory: of a multiprocessor, the most of a block,
and what CUDA takes of each block's.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import fastmlp
from fastmlp import _C, autograd, optim
from tests.support.emulated import emulated

Numbers = tuple[int, int, int, int, int]

KIB = 1024
T4 = (75, 40, 64 * KIB, 64 * KIB, 0)
A100 = (80, 108, 164 * KIB, 163 * KIB, KIB)
RTX_3090 = (86, 82, 100 * KIB, 99 * KIB, KIB)
RTX_4090 = (89, 128, 100 * KIB, 99 * KIB, KIB)
L4 = (89, 58, 100 * KIB, 99 * KIB, KIB)
H100 = (90, 132, 228 * KIB, 227 * KIB, KIB)
SLICE_OF_H100 = (90, 16, 228 * KIB, 227 * KIB, KIB)
B200 = (100, 148, 228 * KIB, 227 * KIB, KIB)
RTX_5090 = (120, 170, 100 * KIB, 99 * KIB, KIB)
UNMEASURED = {"T4": T4, "A100": A100, "3090": RTX_3090, "4090": RTX_4090, "L4": L4, "B200": B200, "5090": RTX_5090}
EPILOGUES = ("forward", "dgrad", "wgrad")
LIBRARY = 3
TENSOR_CORES = {name: torch.float16 if name == "T4" else torch.bfloat16 for name in UNMEASURED}


def plan(card: Numbers, epilogue: str, m: int, n: int, k: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Tile, rows and columns of tiles, and parts of k."""
    return tuple(emulated().plan(card, epilogue, m, n, k, torch.empty(0, dtype=dtype)))


def tile(card: Numbers, epilogue: str, m: int, n: int, k: int, dtype: torch.dtype) -> int:
    return plan(card, epilogue, m, n, k, dtype)[0]


# What the device says.


@pytest.mark.parametrize("multiprocessors", [14, 58, 128, 188])
def test_long_sums_are_cut_by_the_number_of_multiprocessors(multiprocessors: int) -> None:
    """So that each has two blocks: also on a part of a card, and on cards that are larger than the usual one."""
    card = (89, multiprocessors, *L4[2:])
    _, rows, columns, parts = plan(card, "wgrad", 96, 96, 10**6, torch.float32)
    assert parts == min(2 * multiprocessors // (rows * columns), 64)


FUSED_BLOCKS = {
    # By shared memory, of which blocks of 35, 37 and 41 KB are made.
    "RTX 4090": (RTX_4090, (2, 2, 2)),
    "L4": (L4, (2, 2, 2)),
    "T4": (T4, (1, 1, 1)),
    # By registers.
    "A100": (A100, (4, 4, 3)),
    "H100": (H100, (4, 4, 3)),
    "slice of an H100": (SLICE_OF_H100, (4, 4, 3)),
}


@pytest.mark.parametrize("name", FUSED_BLOCKS)
def test_blocks_of_a_float32_backward_fit_into_shared_memory(name: str) -> None:
    """All that are launched are on the card at once, and as many as it takes."""
    card, expected = FUSED_BLOCKS[name]
    for width, at_once in zip((32, 64, 128), expected, strict=True):
        rows_of_block = 128 * 4 * 8 // width
        rows = rows_of_block * card[1] * at_once * 6
        assert emulated().fused_blocks(card, rows, [width] * 3, torch.empty(0)) == card[1] * at_once


def test_blocks_of_a_16_bit_backward_fit_into_shared_memory() -> None:
    """Weights of two layers of 64 features beside rows of 48 KiB."""
    for card, at_once in ((RTX_4090, 1), (H100, 2), (A100, 2)):
        rows = 128 * card[1] * at_once * 6
        assert emulated().fused_blocks(card, rows, [64] * 3, torch.empty(0, dtype=torch.float16)) == card[1] * at_once


# The library, where costs were measured and where not.


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("name", UNMEASURED)
def test_wide_16_bit_products_are_the_library_s_on_cards_that_nobody_measured(name: str, epilogue: str) -> None:
    card, dtype = UNMEASURED[name], TENSOR_CORES[name]
    for m, n, k in ((4096, 4096, 4096), (1024, 1024, 1024), (8192, 1000, 784)):
        assert tile(card, epilogue, m, n, k, dtype) == LIBRARY
    # The weights alone are more than a launch's time of memory traffic.
    assert tile(card, "forward", 1, 4096, 4096, dtype) == LIBRARY


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("name", UNMEASURED)
def test_small_and_narrow_products_stay_ours_there(name: str, epilogue: str) -> None:
    """Bound by launches, or by the passes that our epilogues save. B200 has the H100's costs, the library's too."""
    card, dtype = UNMEASURED[name], TENSOR_CORES[name]
    if name == "B200":
        assert tile(card, epilogue, 64, 256, 256, dtype) != LIBRARY
        return
    for m, n, k in ((128, 256, 784), (256, 512, 128), (32, 784, 256)):
        sizes = (n, k, m) if epilogue == "wgrad" else (m, n, k)
        assert tile(card, epilogue, *sizes, dtype) != LIBRARY
    for rows, width in ((65536, 64), (65536, 128), (10**6, 3)):
        sizes = (width, width, rows) if epilogue == "wgrad" else (rows, width, width)
        assert tile(card, epilogue, *sizes, dtype) != LIBRARY


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_float64_is_the_library_s_where_only_that_has_tensor_cores(epilogue: str) -> None:
    assert tile(A100, epilogue, 1024, 1024, 1024, torch.float64) == LIBRARY
    assert tile(A100, epilogue, 64, 64, 64, torch.float64) != LIBRARY
    for card in (T4, RTX_3090, RTX_4090, RTX_5090):
        assert tile(card, epilogue, 1024, 1024, 1024, torch.float64) != LIBRARY


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_ordinary_units_compute_ours(epilogue: str) -> None:
    """float32, and bfloat16 on sm_75, whose library may not know it."""
    for card in (T4, A100, RTX_3090, RTX_4090, RTX_5090):
        assert tile(card, epilogue, 4096, 4096, 4096, torch.float32) != LIBRARY
    assert tile(T4, epilogue, 4096, 4096, 4096, torch.bfloat16) != LIBRARY


def test_a_part_of_a_card_has_its_share_of_the_library() -> None:
    """A product that the eighth of an H100 computes as fast itself; the whole card's library would not wait for it."""
    assert tile(H100, "forward", 4096, 4096, 4096, torch.bfloat16) == LIBRARY
    assert tile(SLICE_OF_H100, "forward", 4096, 4096, 4096, torch.bfloat16) == LIBRARY
    assert tile(SLICE_OF_H100, "forward", 512, 512, 512, torch.bfloat16) != LIBRARY


# Measurements. Host and device have clocks of their own (tests/emulator/timeline.h).


def tune(
    launch: tuple[float, float], library: tuple[float, float], busy: float = 1, card: Numbers = A100
) -> tuple[int | None, list[str]]:
    """The choice and the calls, where these take the host and the device so many microseconds."""
    return emulated().tune(card, torch.empty(0), (*launch, *library, busy))


def test_autotune_times_the_device() -> None:
    """Whatever the host needs for a call: the library's takes it longer."""
    choice, _ = tune(launch=(3, 2), library=(30, 1))
    assert choice == LIBRARY
    choice, _ = tune(launch=(30, 1), library=(3, 2))
    assert choice in (0, 1, 2)


def test_autotune_queues_work_first_and_many_calls_between_events() -> None:
    _, calls = tune(launch=(3, 2), library=(30, 1))
    records = [i for i, call in enumerate(calls) if call == "record"]
    lengths = []
    for begin, end in zip(records[::2], records[1::2], strict=True):
        assert calls[begin - 1] == "busy"
        between = calls[begin + 1 : end]
        assert set(between) in ({"launch"}, {"library"})
        lengths.append(len(between))
        # Nothing waits before all is queued.
        assert calls[end + 1] == "wait"
    assert sum(length >= 30 for length in lengths) == 5 * 3


def test_autotune_keeps_the_device_busy_for_longer_where_the_host_is_slow() -> None:
    """A round in which the device came to the first event too early is timed again."""
    choice, calls = tune(launch=(3, 2), library=(30, 1), busy=0.01)
    assert choice == LIBRARY
    assert calls.count("busy") > tune(launch=(3, 2), library=(30, 1))[1].count("busy")


def test_autotune_chooses_nothing_where_the_host_cannot_keep_ahead() -> None:
    choice, calls = tune(launch=(3, 2), library=(30, 1), busy=0)
    assert choice is None
    assert 1 < calls.count("busy") < 20


# Cards that the build has no code for.


def test_each_gpu_is_asked_once_whether_there_is_code_for_it() -> None:
    """The emulator's have none where the index is odd."""
    for _ in range(3):
        assert emulated().device_obstacle("cuda:2") is None
        assert "no kernels for the GPU's architecture; build fastmlp" in emulated().device_obstacle("cuda:3")
        assert emulated().device_obstacle("cuda:5") is not None
        assert emulated().device_obstacle("cuda") is None
        assert emulated().device_obstacle("xpu:0") == "there are no kernels for the device"
    assert [emulated().asked().count(device) for device in (2, 3, 5)] == [1, 1, 1]


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second GPU of a build with CUDA kernels is of another architecture; so is the CPU's."""

    def obstacle(device: str) -> str | None:
        return None if device == "cuda:0" else "this build has no kernels for the GPU's architecture"

    monkeypatch.setattr(_C, "device_obstacle", obstacle)
    autograd._warn_without_kernels.cache_clear()


@pytest.mark.usefixtures("no_code")
def test_a_card_without_code_takes_pytorch_s_operations_and_warns_once() -> None:
    def call(device: str) -> Tensor:
        with FakeTensorMode(), torch.no_grad():
            return fastmlp.functional.linear(torch.zeros(2, 4, device=device), torch.zeros(5, 4, device=device), None)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call("cuda:0")
    with pytest.warns(UserWarning, match="PyTorch's own operations run on CUDA tensors, since this build") as warned:
        results = [call("cuda:1") for _ in range(3)]
    assert len(warned) == 1
    assert all(y.shape == (2, 5) and y.device == torch.device("cuda:1") for y in results)


def operators(model: nn.Module, x: Tensor) -> set[str]:
    """The names of what a compiled model calls."""
    found: set[str] = set()

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        found.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(x)
    torch._dynamo.reset()
    return found


def test_compiled_models_take_pytorch_s_operations_there_too(request: pytest.FixtureRequest) -> None:
    model, x = fastmlp.MLP(4, [5], 3), torch.zeros(2, 4)
    assert any("fastmlp" in name for name in operators(model, x))
    request.getfixturevalue("no_code")
    with pytest.warns(UserWarning, match="PyTorch's own operations run on CPU tensors, since this build"):
        found = operators(model, x)
    assert found
    assert not any("fastmlp" in name for name in found)


# Optimizers.


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", optim.RULES)
def test_optimizers_of_other_devices_go_to_torch_at_once(
    name: str, closure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meta tensors stand for a GPU's. Nothing is read of the parameters but where the first one is."""
    parameters = [nn.Parameter(torch.zeros(3, 2, device="meta")) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.zeros(3, 2, device="meta")
    optimizer = getattr(optim, name)(parameters, lr=0.1)
    answers: list[object] = []
    step = _C.step_optimizer

    def recorded(*arguments: Any) -> object:
        answers.append(step(*arguments))
        return answers[-1]

    def fail(*_: object) -> None:
        raise AssertionError("a pass of our own")

    monkeypatch.setattr(_C, "step_optimizer", recorded)
    monkeypatch.setattr(optim, "_step_of_others", fail)
    versions = [parameter._version for parameter in parameters]
    assert optimizer.step(lambda: 7.0) == 7.0 if closure else optimizer.step() is None
    assert answers == [None]
    assert all(p._version > version for p, version in zip(parameters, versions, strict=True))

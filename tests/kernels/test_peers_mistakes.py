"""Mistakes that other libraries of fused layers made, each a test of this one: on the CPU, and of the CUDA kernels in
the emulator (and on a GPU where there is one). Whose mistake it was, and what happened there, is in each docstring.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastmlp
from fastmlp import _C, Activation, functional
from fastmlp.activations import IDENTITY, resolve
from fastmlp.ops import stack_of
from tests.support.bounds import assert_within, network
from tests.support.derivatives import assert_same
from tests.support.emulated import emulated
from tests.support.kernel_checks import KernelChecks
from tests.support.layouts import CUDA_LAYOUTS

BACKENDS = {"cpu": KernelChecks(lambda: _C, "cpu"), "emulator": KernelChecks(emulated, "cpu")}
#: Those that write into memory of the caller.
INTO_MEMORY = list(BACKENDS)
if "cuda" in _C.devices() and torch.cuda.is_available():
    BACKENDS["cuda"] = KernelChecks(lambda: _C, "cuda")


@pytest.fixture(params=BACKENDS)
def checks(request: pytest.FixtureRequest) -> KernelChecks:
    return BACKENDS[request.param]


@pytest.fixture
def all_launches_again() -> Iterator[None]:
    yield
    emulated().refuse_launch(-1)


def a_network(dtype: torch.dtype, act: Activation, widths: tuple[int, ...] = (6, 40, 9)) -> tuple[Tensor, ...]:
    """Input, gradient and parameters, all layers with a bias."""
    parameters = [t for k, n in pairwise(widths) for t in (torch.randn(n, k, dtype=dtype), torch.randn(n, dtype=dtype))]
    return torch.randn(37, widths[0], dtype=dtype), torch.randn(37, widths[-1], dtype=dtype), *parameters


@pytest.mark.usefixtures("all_launches_again")
@pytest.mark.parametrize("fuses", [False, True], ids=["by_layers", "fused"])
def test_failing_launches_raise(dtype: torch.dtype, fuses: bool) -> None:
    """apex discarded the errors of cuBLAS: a failing product returned whatever the memory held.

    Every launch of each pass is made to fail in turn.
    """
    extension, act = emulated(), resolve("silu")
    extension.set_up(80, -1, "fifo", fuses)
    input, grad, *parameters = a_network(dtype, act)
    stack = BACKENDS["emulator"].native((True, True), (act, act))
    _, saved = extension.forward(stack, input, parameters)
    passes: dict[str, Callable[[], Any]] = {
        "infer": lambda: extension.infer(stack, input, parameters),
        "forward": lambda: extension.forward(stack, input, parameters),
        "backward": lambda: extension.backward(stack, grad, input, saved, parameters, [True] * 5),
    }
    launched = {}
    for name, run in passes.items():
        for number in range(50):
            extension.refuse_launch(number)
            try:
                run()
            except RuntimeError as error:
                kernel = r"(simt|mma)_product|elementwise|sum_rows|(mma_)?fused_(forward|backward)|sum_fused"
                text = (
                    rf"fastmlp: CUDA kernel ({kernel}) failed for M = \d+, N = \d+, K = \d+: the emulator was told to"
                )
                with pytest.raises(RuntimeError, match=text):
                    raise error
            else:
                launched[name] = number
                break
    extension.refuse_launch(-1)
    extension.set_up(80, -1, "fifo", True)
    fused = fuses and dtype != torch.float64
    assert launched["infer"] == launched["forward"] == (1 if fused else 2)
    assert launched["backward"] > (1 if fused else 4)
    # And the next pass is as if nothing had been.
    BACKENDS["emulator"].one_layer(37, 16, 24, dtype, act)


@pytest.mark.parametrize("backend", INTO_MEMORY)
def test_bias_gradients_are_written(backend: str, dtype: torch.dtype) -> None:
    """apex left the gradient of the bias uninitialised when a call failed, and always in float64.

    Memory that holds NaN before does not after; alone the same bits are written. When a call fails no gradient is
    returned: above for launches, here for arguments.
    """
    checks, act = BACKENDS[backend], resolve("tanh")
    input, grad, *parameters = a_network(dtype, act)
    expected = network(input, parameters[::2], parameters[1::2], [act, act], grad)
    stack = checks.native((True, True), (act, act))
    output, hidden = checks.extension().forward(stack, input, parameters)
    saved = [*hidden, output][: stack_of((True, True), (act, act)).saved]
    memory = [torch.full_like(t, float("nan")) for t in (input, *parameters)]
    checks.extension().backward_into(stack, grad, input, saved, parameters, memory)
    for i, found in enumerate(memory):
        assert_within(found, expected.gradients[i], f"gradient {i}")
    for wanted in ((2, 4), (4,), (2,)):
        needs = [i in wanted for i in range(5)]
        alone = checks.extension().backward(stack, grad, input, saved, parameters, needs)
        assert all(torch.equal(alone[i], memory[i]) for i in wanted)
    with pytest.raises(RuntimeError, match=r"grad has shape \[36, 9\]"):
        checks.extension().backward(stack, grad[1:], input, saved, parameters, [True] * 5)


@pytest.mark.parametrize("layout", CUDA_LAYOUTS)
@pytest.mark.parametrize("which", ["input", "weight", "grad", "saved"])
def test_strides_are_read(checks: KernelChecks, dtype: torch.dtype, which: str, layout: str) -> None:
    """apex took every tensor for contiguous: a transposed input was silently multiplied wrong."""
    checks.layouts(dtype, which, layout)


def test_devices_and_dtypes_are_checked(checks: KernelChecks) -> None:
    """apex checked neither: it read a tensor of another dtype or device as if it were of the input's."""
    stack = checks.native((True,), (IDENTITY,))
    x, w, b = checks.randn(3, 4), checks.randn(5, 4), checks.randn(5)
    wrong: list[tuple[tuple[Tensor, Tensor, Tensor], str]] = [
        ((x, w.double(), b), "weight has dtype torch.float64, expected torch.float32, the dtype of input"),
        ((x, w, b.half()), "bias has dtype torch.float16, expected torch.float32, the dtype of input"),
        ((x.bfloat16(), w, b), "input has dtype torch.bfloat16, expected torch.float32, the dtype of weight"),
        ((x.int(), w.int(), b.int()), "input has dtype torch.int32, expected a floating point dtype"),
        ((x, w.to("meta"), b), f"weight is on meta, .*, expected {x.device}, the device of input"),
        ((x, w, b.to("meta")), f"bias is on meta, .*, expected {x.device}, the device of input"),
    ]
    for (input, weight, bias), message in wrong:
        for call in (checks.extension().forward, checks.extension().infer):
            with pytest.raises(RuntimeError, match=f"fastmlp: {message}"):
                call(stack, input, [weight, bias])
        if not input.is_floating_point():
            continue
        with pytest.raises(RuntimeError, match=f"fastmlp: {message}"):
            functional.linear(input, weight, bias)


def test_frozen_weights_leave_the_bias_its_shape(checks: KernelChecks, dtype: torch.dtype) -> None:
    """FlashAttention returned the bias gradient in a wrong shape when the weight needed none."""
    act = resolve("relu")
    input, grad, *parameters = (t.to(checks.device) for t in a_network(dtype, act))
    expected = network(input, parameters[::2], parameters[1::2], [act, IDENTITY], grad)
    stack = checks.native((True, True), (act, IDENTITY))
    _, saved = checks.extension().forward(stack, input, parameters)
    needs = [False, False, True, False, True]
    gradients = checks.extension().backward(stack, grad, input, saved, parameters, needs)
    assert [g is not None for g in gradients] == needs
    for i in (2, 4):
        assert_within(gradients[i], expected.gradients[i], f"gradient {i}")
    layer = fastmlp.Linear(6, 5, activation="relu", device=checks.device, dtype=dtype)
    layer.weight.requires_grad_(False)
    layer(input).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    assert layer.bias.grad.shape == (5,)


class SquaredReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)).square())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_squared_relu_is_squared() -> None:
    """FlashAttention's squared ReLU ran as a ReLU where its fused path did not apply.

    Ours has no fused squared ReLU: one that is made of a ReLU must not be taken for it.
    """
    x = torch.randn(7, 4, dtype=torch.float64)
    squares = Squares().double()
    plain = nn.Sequential(squares.first, SquaredReLU(), squares.second)
    expected = squares(x)
    everything: list[Callable[[Tensor], Tensor]] = [
        fastmlp.Sequential(*plain),
        fastmlp.convert(nn.Sequential(*plain)),
        fastmlp.convert(squares, trace=True),
        torch.compile(fastmlp.Sequential(*plain), backend="aot_eager"),
        fastmlp.freeze(plain),
        fastmlp.freeze(squares),
    ]
    for model in everything:
        assert_same([model(x)], [expected])
    activation: Any = SquaredReLU()
    with pytest.raises(ValueError, match="SquaredReLU"):
        fastmlp.Linear(4, 8, activation=activation)


def test_an_activation_is_the_same_on_every_path(
    checks: KernelChecks, dtype: torch.dtype, activation: Activation
) -> None:
    """The same mistake for the activations that there are: fused networks, layers one by one, and compositions."""
    input, grad, *parameters = (t.to(checks.device) for t in a_network(dtype, activation))
    weights, biases = parameters[::2], parameters[1::2]
    expected = network(input, weights, biases, [activation] * 2, grad).output
    stack = checks.native((True, True), (activation,) * 2)
    try:
        for fuses in (True, False):
            if checks is BACKENDS["emulator"]:
                checks.extension().set_up(80, -1, "fifo", fuses)
            assert_within(checks.extension().infer(stack, input, parameters), expected, f"fused: {fuses}")
    finally:
        if checks is BACKENDS["emulator"]:
            checks.extension().set_up(80, -1, "fifo", True)
    with forward_ad.dual_level():
        assert fastmlp.explain(input).name == "composite"
        composite = functional.mlp(
            input.double(), [w.double() for w in weights], [b.double() for b in biases], [activation] * 2
        )
    assert_within(composite.to(dtype), expected, "composite")


def test_float16_sums_neither_overflow_nor_stop(checks: KernelChecks) -> None:
    """tiny-cuda-nn summed in float16: results of wide layers were NaN, and small terms got lost.

    Whole numbers, so that sums in float32 are exact: partial ones beyond 65504, and more ones than 2048, where adding
    one more changes nothing in float16.
    """
    stack = checks.native((True,), (IDENTITY,))
    ones = torch.ones(3000, dtype=torch.float16, device=checks.device)
    large = torch.cat([ones * 200, ones * -200])
    for row, total in ((ones, 3000), (large, 0)):
        x, w = row.expand(3, -1).contiguous(), torch.ones(2, len(row), dtype=torch.float16, device=checks.device)
        output, _ = checks.extension().forward(stack, x, [w, w[:, 0]])
        assert bool((output == total + 1).all())
        # The same over the batch, and over the outputs.
        column, seeds = x[:1].T.contiguous(), row[:, None].expand(-1, 2).contiguous()
        gradients = checks.extension().backward(
            stack, seeds, torch.ones_like(column), [], [w[:, :1], w[:, 0]], [True] * 3
        )
        assert bool((gradients[1] == total).all())
        assert bool((gradients[2] == total).all())
        stack_of_one = checks.native((False,), (IDENTITY,))
        (wide,) = checks.extension().backward(stack_of_one, x, x[:, :1], [], [w[:1].T.contiguous()], [True, False])[:1]
        assert bool((wide == total).all())


def test_odd_batches(checks: KernelChecks, dtype: torch.dtype) -> None:
    """tiny-cuda-nn wanted batches to be multiples of 128 or 256, and crashed at others."""
    for rows in (1, 3, 7, 31, 127, 129, 255, 257):
        checks.chain(rows, (3, 16, 2), resolve("relu"), IDENTITY, dtype)


def test_very_large_batches() -> None:
    """It crashed at very large ones, too. (Beyond 2^31 elements: test_gpu_kernels.py, test_process.py.)"""
    for checks in (checks for name, checks in BACKENDS.items() if name != "emulator"):
        checks.chain(2**20 + 1, (3, 4, 2), resolve("relu"), IDENTITY)


def test_float32_is_not_tf32(checks: KernelChecks) -> None:
    """TransformerEngine's float32 was TF32 always, whatever torch.backends.cuda.matmul said."""
    checks.float32_is_not_tf32()


def test_the_last_layer_has_no_activation_unasked(checks: KernelChecks) -> None:
    """apex applied the activation after the last layer too, so that its networks could not give a negative number."""
    model = fastmlp.MLP(4, [8], 3, device=checks.device)
    x = checks.randn(64, 4)
    output = model(x)
    assert bool((output < 0).any())
    parameters = [p.detach() for p in model.parameters()]
    acts = [resolve("relu"), IDENTITY]
    expected = network(x, parameters[::2], parameters[1::2], acts, output).output
    found = checks.extension().infer(checks.native((True, True), acts), x, parameters)
    for y in (output.detach(), found):
        assert_within(y, expected, "output")
    asked = fastmlp.MLP(4, [8], 3, output_activation="relu", device=checks.device)
    assert bool((asked(x) >= 0).all())


def test_weights_are_initialised_as_torch_s() -> None:
    """apex's MLP drew its weights itself at the end of its constructor, and layers without that held garbage."""
    torch.manual_seed(1)
    native = [nn.Linear(4, 8), nn.Linear(8, 3)]
    torch.manual_seed(1)
    model = fastmlp.MLP(4, [8], 3)
    torch.manual_seed(1)
    layers = [fastmlp.Linear(4, 8, activation="relu"), fastmlp.Linear(8, 3)]
    expected = [p for layer in native for p in layer.parameters()]
    for found in (list(model.parameters()), [p for layer in layers for p in layer.parameters()]):
        for ours, torchs in zip(found, expected, strict=True):
            assert torch.equal(ours, torchs)


@pytest.mark.parametrize("training", [False, True])
def test_what_is_kept_follows_grad_mode(training: bool) -> None:
    """FlashAttention chose its inference path by `.training`: a model in eval mode had no gradients."""
    model = fastmlp.MLP(4, [8], 3).train(training)
    x = torch.randn(5, 4, requires_grad=True)
    output = model(x)
    (grad,) = torch.autograd.grad(output.sum(), x)
    assert bool(grad.any())
    with torch.no_grad():
        inferred = model(x)
    assert inferred.grad_fn is None
    assert torch.equal(inferred, output)
    with torch.inference_mode():
        assert model(x).is_inference()


def test_import_needs_no_gpu() -> None:
    """tiny-cuda-nn's import failed where no GPU was to be seen."""
    code = "import torch, fastmlp; print(fastmlp.MLP(4, [8], 3)(torch.zeros(2, 4)).shape, fastmlp.show_config())"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "torch.Size([2, 3])" in done.stdout

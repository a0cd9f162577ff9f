"""The libraries that are measured beside fastmlp where they are installed: ONNX Runtime, OpenVINO and JAX.

Each gets the threads that PyTorch has, and everything that a call can do without happens before it: memory of inputs
and outputs is bound beforehand.
"""

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from math import log
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = [
    "adam_step",
    "exported",
    "forward",
    "from_jax",
    "onnx_runtime",
    "openvino",
    "sgd_step",
    "start_jax",
    "to_jax",
]

#: A trained network as a runtime has it: called without arguments, it returns the outputs.
Runtime: TypeAlias = Callable[[], Sequence[NDArray[Any]]]
#: Weight (in_features, out_features), bias or None, and the function that follows, as JAX's users have a layer.
Layers: TypeAlias = Sequence[tuple[Any, Any]]

#: The environment variable that JAX reads once, when it starts its threads, and what starts it set it to.
_THREADS = "NPROC"


def exported(model: nn.Module, inputs: tuple[Tensor, ...]) -> bytes:
    """A model in the ONNX format, as `torch.onnx.export` writes it.

    Args:
        model: of any class that can be exported.
        inputs: examples of the forward's arguments, whose shapes are fixed.
    """
    before = logging.root.manager.disable
    # It tells of its progress, logs which other libraries it does without, and warns of what it deprecates itself.
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    finally:
        logging.disable(before)
    assert program is not None
    return program.model_proto.SerializeToString()


def onnx_runtime(model: bytes, inputs: Sequence[NDArray[Any]]) -> Runtime:
    """ONNX Runtime's CPU provider on a network in the ONNX format, with inputs and outputs bound beforehand.

    Args:
        model: whose inputs and outputs have fixed shapes.
        inputs: contiguous; they are read at each call.

    Returns:
        A call that returns the outputs, in the same memory each time.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    kept = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in inputs]
    for described, value in zip(session.get_inputs(), kept, strict=True):
        binding.bind_ortvalue_input(described.name, value)
    dtypes = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}
    outputs: list[NDArray[Any]] = [np.empty(one.shape, dtypes[one.type]) for one in session.get_outputs()]
    for described, array in zip(session.get_outputs(), outputs, strict=True):
        binding.bind_output(described.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    run = session.run_with_iobinding

    def call() -> list[NDArray[Any]]:
        run(binding)
        return outputs

    call.kept = kept  # type: ignore[attr-defined]  # memory that the binding reads
    return call


def openvino(model: bytes, inputs: Sequence[NDArray[Any]]) -> Runtime:
    """OpenVINO's CPU plugin on a network in the ONNX format, tuned for latency, with the inputs set beforehand.

    Args:
        model: whose inputs and outputs have fixed shapes.
        inputs: contiguous; they are read at each call.

    Returns:
        A call that returns the outputs, in the same memory each time.
    """
    # It would send usage statistics, from a process that it forks while others are timed. An absent package is one that
    # it does without.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # by itself it takes bfloat16 where the processor has it
    }
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    for i, array in enumerate(inputs):
        request.set_input_tensor(i, openvino.Tensor(array, shared_memory=True))
    outputs: list[NDArray[Any]] = [request.get_output_tensor(i).data for i in range(len(request.output_tensors))]
    # The pair of calls costs microseconds less than `infer`, which looks through its arguments.
    start, wait = request.start_async, request.wait

    def call() -> list[NDArray[Any]]:
        start()
        wait()
        return outputs

    call.kept = inputs  # type: ignore[attr-defined]  # memory that the request reads
    return call


def start_jax() -> None:
    """Lets JAX have PyTorch's number of threads, on the processor; it reads this once, when it starts them."""
    os.environ.setdefault(_THREADS, str(torch.get_num_threads()))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def jax_obstacle() -> str | None:
    """Why JAX cannot be measured in this process, or None."""
    if find_spec("jax") is None:
        return "jax is not installed"
    threads = os.environ.get(_THREADS)
    if "jax" in sys.modules and threads != str(torch.get_num_threads()):
        return f"JAX already runs in this process with {threads or 'its own number of'} threads, which stay as they are"
    return None


def to_jax(tensor: Tensor) -> Any:
    """A copy of a tensor as an array of JAX."""
    import jax

    return jax.numpy.array(tensor.detach().numpy())


def from_jax(array: Any) -> Tensor:
    """A copy of an array of JAX as a tensor."""
    return torch.from_numpy(np.array(array))


def forward(layers: Layers, activations: Sequence[Callable[[Any], Any] | None], output: Any) -> Any:
    """What a chain of layers computes in JAX.

    Args:
        layers: weight (in_features, out_features) and bias or None of each, as JAX's users have them.
        activations: what follows each.
        output: the input, (*, in_features) of the first.
    """
    for (weight, bias), activation in zip(layers, activations, strict=True):
        output = output @ weight if bias is None else output @ weight + bias
        output = output if activation is None else activation(output)
    return output


#: From layers, inputs and targets to a loss.
Loss: TypeAlias = Callable[[Any, Any, Any], Any]


def sgd_step(loss: Loss, rate: float) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """A step of SGD under `jax.jit`, from a state that is the layers alone to the next one and the loss."""
    import jax

    def step(state: Any, input: Any, target: Any) -> Any:
        (layers,) = state
        found, grads = jax.value_and_grad(loss)(layers, input, target)
        return (jax.tree.map(lambda p, g: p - rate * g, layers, grads),), found

    compiled: Callable[[Any, Any, Any], tuple[Any, Any]] = jax.jit(step, donate_argnums=0)
    return compiled


def adam_step(
    loss: Loss, rate: float, beta1: float, beta2: float, epsilon: float
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """A step of Adam under `jax.jit`; its state is layers, both moments like them, and how many steps were taken."""
    import jax

    def step(state: Any, input: Any, target: Any) -> Any:
        layers, means, squares, steps = state
        found, grads = jax.value_and_grad(loss)(layers, input, target)
        steps = steps + 1
        means = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, means, grads)
        squares = jax.tree.map(lambda s, g: beta2 * s + (1 - beta2) * g * g, squares, grads)
        # 1 - beta**steps would lose four digits in the first steps.
        first, second = (-jax.numpy.expm1(steps * log(beta)) for beta in (beta1, beta2))

        def updated(p: Any, m: Any, s: Any) -> Any:
            return p - rate * (m / first) / (jax.numpy.sqrt(s / second) + epsilon)

        return (jax.tree.map(updated, layers, means, squares), means, squares, steps), found

    compiled: Callable[[Any, Any, Any], tuple[Any, Any]] = jax.jit(step, donate_argnums=0)
    return compiled


def first_state(layers: Any, adam: bool) -> Any:
    """The state before the first step."""
    import jax

    if not adam:
        return (layers,)
    zeros = jax.tree.map(jax.numpy.zeros_like, layers)
    return layers, zeros, jax.tree.map(jax.numpy.copy, zeros), jax.numpy.zeros(())

"""`fastmlp.bench`: one's own model beside all that fastmlp makes of it, and the peers that are installed."""

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmlp._errors import described, not_a_module, not_a_tensor
from fastmlp.problems import module_of_loss
from fastmlp.ways import target_for

if TYPE_CHECKING:
    from fastmlp.benchmark.report import Report

__all__ = ["bench"]


def bench(
    model: nn.Module,
    input: Tensor | tuple[Tensor, ...],
    *,
    target: Tensor | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
    threads: int | None = None,
    peers: bool = True,
    seconds: float = 2.0,
) -> "Report":
    """Measures a model as it is beside what fastmlp makes of it, and beside other libraries.

    Inference: the model called in eval mode without gradients, `convert`, `convert(trace=True)` where that does more,
    `freeze`; ONNX Runtime, OpenVINO and, for a `torch.nn.Sequential` of layers and common activations, JAX, if they can
    be imported. A training step on the same batch: the plain loop, `convert`, `fastmlp.optim`, `TrainStep`, `capture`,
    and JAX. Who cannot take part is named with the reason. Each result is compared with that of the model before it is
    timed; allowed is a multiple of what moving parameters and inputs by their rounding error changes. Contenders take
    turns, so that whatever else the machine does meets all of them, and the report warns if that was much.

    The model stays as it is: copies of it are measured. If it is one of fastmlp already, "as it is" is fast too.

    Args:
        model: of any class, on the CPU.
        input: what it is called with: a tensor of any shape and dtype that it takes, on the CPU, or a tuple of them.
        target: what the loss compares the output with. By default random numbers of the output's shape, or classes for
            `CrossEntropyLoss` and `NLLLoss`.
        loss_fn: by default `torch.nn.MSELoss()`.
        optimizer: a class of `torch.optim`, whose learning rate will be 1e-3.
        threads: of PyTorch and the peers; None for those that PyTorch has now. They are as before afterwards.
        peers: whether other libraries take part. To export a model for them takes seconds.
        seconds: how long a task is measured at most, once each contender has five samples.

    Returns:
        A report: printed, it is tables; `save(path)` writes JSON, `draw(path)` a picture; `rows`, `refusals`, `about`
        and `warning` are what they show.

    Raises:
        ModuleNotFoundError: without rich, which prints the tables.
        TypeError: if an argument is of another type.
        ValueError: for tensors on other devices, and numbers that are not positive.

    Example:
        >>> import fastmlp
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
        >>> report = fastmlp.bench(model, torch.randn(4, 8), peers=False, seconds=0.01)
        >>> [row.contender for row in report.rows if row.task == "inference"]
        ['as it is', 'convert', 'frozen']
        >>> report.about["model"]
        'Sequential, 178 parameters'
    """
    inputs = _checked(model, input, optimizer, threads, seconds)
    if find_spec("rich") is None:
        raise ModuleNotFoundError(
            "fastmlp: bench prints its tables with rich, which is missing: pip install 'fastmlp[demo]'", name="rich"
        )
    loss_fn = nn.MSELoss() if loss_fn is None else module_of_loss(loss_fn)
    return _measured(model, inputs, target, loss_fn, optimizer, threads, peers, seconds)


def _measured(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    target: Tensor | None,
    loss_fn: Callable[..., Tensor],
    optimizer: type[torch.optim.Optimizer],
    threads: int | None,
    peers: bool,
    seconds: float,
) -> "Report":
    """What `bench` returns; threads and random numbers are as before afterwards."""
    from fastmlp.benchmark.contest import Contest, Refusal, Row
    from fastmlp.benchmark.machine import about, keep_memory
    from fastmlp.benchmark.report import Report
    from fastmlp.benchmark.timing import Effort

    before, state = torch.get_num_threads(), torch.get_rng_state()
    keep_memory()
    try:
        torch.set_num_threads(threads or before)
        target = _target(model, inputs, loss_fn) if target is None else target
        contest = Contest(model, inputs, target, loss_fn, optimizer, peers)
        found = list(contest.measured(Effort(31, seconds)))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        what = {
            "model": f"{type(model).__name__}, {parameters:,} parameters",
            "dtype": str(next((p.dtype for p in model.parameters()), inputs[0].dtype)).removeprefix("torch."),
            "loss": type(loss_fn).__name__,
            "optimizer": optimizer.__name__,
            **about(("onnxruntime", "openvino", "jax") if peers else ()),
        }
    finally:
        torch.set_num_threads(before)
        torch.set_rng_state(state)
    rows = tuple(one for one in found if isinstance(one, Row))
    return Report(what, rows, tuple(one for one in found if isinstance(one, Refusal)))


def _checked(model: Any, input: Any, optimizer: Any, threads: Any, seconds: Any) -> tuple[Tensor, ...]:
    """The inputs, once all arguments are what they should be."""
    if not isinstance(model, nn.Module):
        raise not_a_module(model)
    inputs = input if isinstance(input, tuple) and input else (input,)
    for tensor in inputs:
        if not isinstance(tensor, Tensor):
            raise not_a_tensor("input", tensor, next((p.dtype for p in model.parameters()), None))
    for name, tensor in [*((f"input {i}", t) for i, t in enumerate(inputs)), *model.named_parameters()]:
        if tensor.device.type != "cpu":
            raise ValueError(
                f"fastmlp: {name} is on {tensor.device}, and bench measures the processor: move model and input there; "
                "a GPU is measured by python -m fastmlp bench --device"
            )
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise TypeError(f"fastmlp: optimizer must be a class of torch.optim, got {described(optimizer)}")
    if threads is not None and not (isinstance(threads, int) and threads >= 1):
        raise ValueError(f"fastmlp: threads must be None or a whole number from 1, got {described(threads)}")
    if not (isinstance(seconds, (int, float)) and seconds > 0):
        raise ValueError(f"fastmlp: seconds must be a positive number, got {described(seconds)}")
    return inputs


def _target(model: nn.Module, inputs: tuple[Tensor, ...], loss_fn: Any) -> Tensor:
    """Random numbers, or classes, for the loss to compare the output with."""
    with torch.no_grad():
        output = copy.deepcopy(model).eval()(*inputs)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"fastmlp: model must return a tensor, which a loss compares with a target, got {described(output)}; wrap "
            "it in a module that returns the tensor to be trained"
        )
    target = target_for(output, loss_fn)
    return target.normal_() if target.is_floating_point() else target.random_(output.shape[min(1, output.dim() - 1)])

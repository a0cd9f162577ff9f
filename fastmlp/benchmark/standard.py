"""`python -m fastmlp bench` without `--widths`: this machine's speed beside PyTorch's own modules, on the CPU or a GPU.

Every contender is compared with a float64 network before it is timed. Times are of the whole call, framework
included, with the device waited for; medians of samples in which the contenders take turns. On a GPU also the device's
own time, by replays of a captured CUDA graph: what is left where the framework's time is hidden.
"""

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import fastmlp
from fastmlp._load import _C
from fastmlp.benchmark.contest import WrongResult
from fastmlp.benchmark.machine import about
from fastmlp.commands import network

#: Widths from input to output; ReLU between layers.
NETWORKS: dict[str, tuple[int, ...]] = {
    "tutorial": (10, 50, 1),
    "policy": (64, 64, 64, 4),
    "mnist": (784, 256, 128, 10),
    "dlrm": (13, 512, 256, 64, 16),
    "wide": (1024, 1024, 1024, 1024),
    "narrow": (32, 64, 64, 64, 64, 3),
}
BATCHES = {
    "cpu": {
        "tutorial": (1, 32),
        "policy": (1, 128),
        "mnist": (1, 128),
        "dlrm": (1, 1024),
        "wide": (1, 256),
        "narrow": (4096,),
    },
    "cuda": {
        "tutorial": (32, 65536),
        "policy": (1, 128, 65536),
        "mnist": (128, 4096),
        "dlrm": (1024, 16384),
        "wide": (64, 1024, 16384),
        "narrow": (4096, 65536, 1048576),
    },
}
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
SAMPLES = 7
SAMPLE_SECONDS = 0.02
#: Our error, by the norm, may be so many times PyTorch's own.
MOST_ERROR = 2.0

#: A call that is timed, whatever it returns, and one whose result is compared.
Call = Callable[[], object]
Compared = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Row:
    """One network, batch, dtype and task. Times are microseconds of a call, PyTorch's and ours."""

    network: str
    batch: int
    dtype: str
    task: str
    eager: float
    ours: float
    eager_device: float | None
    ours_device: float | None
    eager_error: float
    ours_error: float


def main(device: str, output: Path | None, networks: list[str], quick: bool) -> None:
    """Times all workloads, prints a table, and writes a report that can be sent.

    Args:
        device: "cpu" or "cuda".
        output: a JSON file to write, or None.
        networks: names of `NETWORKS`.
        quick: the first batch of each network alone.

    Raises:
        WrongResult: if a result is further from the float64 network's than PyTorch's own allows.
        RuntimeError: if the device cannot be had, or fastmlp has no kernels for it.
    """
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
    console = Console()
    machine = environment(device)
    for name, value in machine.items():
        console.print(f"{name}: {value}", highlight=False)
    rows = []
    for dtype in DTYPES[device]:
        table = empty_table(dtype, device)
        for name in networks:
            batches = BATCHES[device][name]
            for batch in batches[:1] if quick else batches:
                for row in measured(name, batch, dtype, device):
                    rows.append(row)
                    table.add_row(*cells(row))
        console.print(table)
    if output:
        report = {"about": machine, "rows": [asdict(row) for row in rows]}
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        console.print(f"The report is in {output}.", highlight=False)


def environment(device: str) -> dict[str, str]:
    """What the figures were measured on.

    Raises:
        RuntimeError: if the device cannot be had, or fastmlp has no kernels for it.
    """
    found = about()
    if device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(
                "fastmlp: device is cuda, and this PyTorch finds no GPU: torch.cuda.is_available() is False"
            )
        if obstacle := _C.device_obstacle("cuda:0"):
            raise RuntimeError(f"fastmlp: device is cuda, and {obstacle}")
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "GPU": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
            "CUDA of torch": str(torch.version.cuda),
            "TF32 allowed": str(torch.backends.cuda.matmul.allow_tf32),
        }
    return found


def measured(name: str, batch: int, dtype: torch.dtype, device: str) -> Iterator[Row]:
    """The rows of one network, batch and dtype: inference, and forward with backward."""
    torch.manual_seed(0)
    eager = network(NETWORKS[name]).to(device, dtype)
    ours = fastmlp.convert(network(NETWORKS[name]).to(device, dtype))
    exact = network(NETWORKS[name]).to(device, torch.float64)
    for model in (ours, exact):
        model.load_state_dict(eager.state_dict())
    input = torch.randn(batch, NETWORKS[name][0], device=device, dtype=dtype)
    grad = torch.randn(batch, NETWORKS[name][-1], device=device, dtype=dtype)
    contenders = [calls_of(model, input, grad) for model in (eager, ours)]
    for task, call in calls_of(exact, input.double(), grad.double()).items():
        expected = call()
        calls = [contender[task] for contender in contenders]
        errors = [distance(call(), expected) for call in calls]
        # A unit in the last place for each layer is always allowed, because PyTorch's own error may be small by chance.
        least = torch.finfo(dtype).eps * (len(NETWORKS[name]) - 1)
        if not errors[1] <= MOST_ERROR * max(errors[0], least):
            raise WrongResult(
                f"{task} of {name} at batch {batch} in {dtype} is {errors[1]:.1e} from the float64 network, PyTorch's "
                f"own {errors[0]:.1e}"
            )
        whole = wall_times(calls)
        own = [device_time(call) for call in calls] if device == "cuda" else [None, None]
        yield Row(name, batch, str(dtype).removeprefix("torch."), task, *whole, *own, *errors)


def calls_of(model: nn.Module, input: Tensor, grad: Tensor) -> dict[str, Compared]:
    """What is timed, by task: a call under no_grad, and one with the gradients of all parameters."""
    parameters = list(model.parameters())

    def inference() -> list[Tensor]:
        with torch.no_grad():
            return [model(input)]

    def forward_and_backward() -> list[Tensor]:
        return list(torch.autograd.grad(model(input), parameters, grad))

    return {"inference": inference, "forward + backward": forward_and_backward}


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative distance of a tensor, by the norm."""
    return max(float((f.double() - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))


def wall_times(calls: list[Compared]) -> list[float]:
    """Microseconds of each, medians of samples that take turns."""
    timers = [Timer("call()", globals={"call": call}) for call in calls]
    numbers = []
    for timer in timers:
        timer.timeit(3)
        numbers.append(max(1, int(SAMPLE_SECONDS / timer.timeit(5).median)))
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(SAMPLES):
        for timer, number, kept in zip(timers, numbers, samples, strict=True):
            kept.append(timer.timeit(number).median * 1e6)
    return [statistics.median(kept) for kept in samples]


def device_time(call: Call) -> float:
    """Microseconds that the device takes, by replays of a graph of ten calls."""
    calls = 10
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    times = []
    for _ in range(SAMPLES):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def empty_table(dtype: torch.dtype, device: str) -> Table:
    """The columns of one dtype's table."""
    table = Table(title=f"{str(dtype).removeprefix('torch.')}: microseconds of a call")
    for column in ("network", "task"):
        table.add_column(column)
    own = ["device: eager", "fastmlp", "times"] if device == "cuda" else []
    for column in ("batch", "eager", "fastmlp", "times", *own, "error, of eager's"):
        table.add_column(column, justify="right")
    return table


def cells(row: Row) -> list[str]:
    """One line of the table."""
    times = [f"{row.eager:.1f}", f"{row.ours:.1f}", f"{row.eager / row.ours:.2f}"]
    if row.eager_device is not None and row.ours_device is not None:
        times += [f"{row.eager_device:.1f}", f"{row.ours_device:.1f}", f"{row.eager_device / row.ours_device:.2f}"]
    return [row.network, row.task, str(row.batch), *times, f"{row.ours_error / max(row.eager_error, 1e-300):.2f}"]

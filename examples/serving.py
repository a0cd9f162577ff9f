"""A network behind HTTP, as it is and frozen: `python examples/serving.py --requests 1000`.

A server of Starlette and uvicorn answers one request at a time, without batching: a row of ten numbers comes as JSON,
and three probabilities go back. It has three addresses: `/nothing` answers without a network, `/eager` calls the module
of PyTorch, and `/frozen` a network that `fastmlp.load_frozen` has read from a file of safetensors. One client asks them
in turn over one connection, measures how long each answer takes, and compares the answers. The server tells beside each
answer how long it had for the numbers alone: from the list of numbers of the request to that of the answer.

It needs `pip install 'fastmlp[serve]'`.
"""

import argparse
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter_ns

import httpx
import numpy as np
import torch
import uvicorn
from rich.console import Console
from rich.table import Table
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from torch import nn

import fastmlp

FEATURES = 10
WAYS = ("nothing", "eager", "frozen")
#: Requests in a row to one address, then to the next one: so that whatever else the machine does meets all.
TURN = 20
PERCENTILES = (50, 90, 99)

Predict = Callable[[list[float]], list[float]]


def model() -> nn.Sequential:
    """A classifier of ten measurements."""
    torch.manual_seed(0)
    layers = nn.Linear(FEATURES, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3), nn.Softmax(-1)
    return nn.Sequential(*layers).eval()


# The server.


def eager(module: nn.Module) -> Predict:
    """The network as PyTorch runs it."""

    def predict(row: list[float]) -> list[float]:
        with torch.inference_mode():
            output: list[float] = module(torch.tensor(row)).tolist()
        return output

    return predict


def frozen(network: fastmlp.FrozenMLP) -> Predict:
    """The same network frozen: NumPy arrays go in and come out, without PyTorch in between."""

    def predict(row: list[float]) -> list[float]:
        output: list[float] = network(np.array(row, np.float32)).tolist()
        return output

    return predict


def route(name: str, predict: Predict) -> Route:
    """An address, which answers with predictions and the microseconds that they took."""

    async def answer(request: Request) -> JSONResponse:
        row = (await request.json())["row"]
        if len(row) != FEATURES or not all(isinstance(number, (int, float)) for number in row):
            return JSONResponse({"error": f"row must hold {FEATURES} numbers"}, status_code=422)
        # In the loop of the server and not in a thread: a hand-over takes longer than the network.
        start = perf_counter_ns()
        probabilities = predict(row)
        return JSONResponse({"probabilities": probabilities, "us": (perf_counter_ns() - start) / 1e3})

    return Route(f"/{name}", answer, methods=["POST"])


def application(path: Path) -> Starlette:
    """The application, with the network of a file."""
    ways: dict[str, Predict] = {
        "nothing": lambda row: row[:3],
        "eager": eager(model()),
        "frozen": frozen(fastmlp.load_frozen(path)),
    }
    return Starlette(routes=[route(name, predict) for name, predict in ways.items()])


def serve(path: Path) -> None:
    """Run the server on a port that is free, and print which one that is."""
    torch.set_num_threads(1)  # a network of this size gains nothing from more
    # With the number of its protocol, because asyncio sends answers at once, without Nagle's delay, only then.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    config = uvicorn.Config(application(path), log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listening])


# The client.


@contextmanager
def server(path: Path) -> Iterator[str]:
    """A server in a process of its own, and its address."""
    command = [sys.executable, __file__, "--serve", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            if not port:
                raise SystemExit("The server did not start; what it says stands above.")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def measure(address: str, requests: int) -> dict[str, list[tuple[float, float]]]:
    """Ask each way for as many answers.

    Returns:
        For each way and request the microseconds until the answer was there, and those of the network alone.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    rows = np.random.default_rng(0).normal(size=(TURN, FEATURES)).round(6).tolist()
    with httpx.Client(base_url=address, timeout=30) as client:

        def ask(name: str, row: list[float]) -> list[float]:
            start = perf_counter_ns()
            response = client.post(f"/{name}", json={"row": row})
            took = (perf_counter_ns() - start) / 1e3
            response.raise_for_status()
            answer = response.json()
            times[name].append((took, answer["us"]))
            probabilities: list[float] = answer["probabilities"]
            return probabilities

        def turn(count: int) -> None:
            answers = {name: [ask(name, row) for row in rows[:count]] for name in WAYS}
            # In float32 both are right to about seven digits.
            np.testing.assert_allclose(answers["frozen"], answers["eager"], rtol=1e-5, atol=1e-6)

        turn(TURN)  # warm-up
        for taken in times.values():
            taken.clear()
        for done in range(0, requests, TURN):
            turn(min(TURN, requests - done))
    return times


def table(times: dict[str, list[tuple[float, float]]]) -> Table:
    """Percentiles of what was measured, in microseconds."""
    shown = Table("", *(f"p{p}" for p in PERCENTILES), *(f"network p{p}" for p in PERCENTILES))
    for name, taken in times.items():
        numbers = np.percentile(np.array(taken), PERCENTILES, axis=0).T.ravel()
        shown.add_row(name, *(f"{number:.0f}" if number >= 100 else f"{number:.1f}" for number in numbers))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=1000, metavar="N", help="to each address (1000)")
    parser.add_argument("--serve", type=Path, metavar="FILE", help="run the server alone, with the network of a file")
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    if options.requests < 1:
        parser.error("--requests must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "classifier.safetensors"
        fastmlp.freeze(model()).save(path)
        with server(path) as address:
            times = measure(address, options.requests)
    Console(width=100).print(table(times), f"microseconds, {options.requests} requests to each address, one at a time")


if __name__ == "__main__":
    main()

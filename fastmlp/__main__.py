"""The command line: `python -m fastmlp info`, `demo`, `bench` and `check`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastmlp
from fastmlp import commands
from fastmlp.commands import DTYPES, EXTRAS, OPTIMIZERS, missing

__all__ = ["EXTRAS", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: those of the command line if None.

    Returns:
        The exit status: 0, 1 if the command failed, 2 for a wrong usage.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command == "info":
        fastmlp.show_config()
        return 0
    if options.command == "demo":
        return run_demo(options.output, options.epochs, options.seed, options.threads)
    if options.command == "bench":
        return commands.run_bench(options)
    if options.command == "check":
        return commands.run_check(options)
    parser.print_help()
    return 2


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(prog="python -m fastmlp", description=fastmlp.__doc__)
    version = f"fastmlp {fastmlp.__version__}, torch {torch.__version__}"
    parser.add_argument("--version", action="version", version=version, help="print versions and end")
    found = parser.add_subparsers(dest="command", metavar="COMMAND")
    found.add_parser("info", help="print versions, the build, instruction sets and threads")
    demo = found.add_parser("demo", help="train on real data beside PyTorch and compare")
    demo.add_argument(
        "--output", type=Path, default=Path("out"), metavar="DIR", help="folder for demo.png (default: out)"
    )
    demo.add_argument("--epochs", type=whole(1), metavar="N", help="of each training (default: enough for 97 %%)")
    demo.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of parameters and batches (default: 0)")
    # One thread is the default, because networks of this size gain nothing from more and lose on a busy processor.
    threads = whole(1, os.cpu_count() or 1)
    demo.add_argument("--threads", type=threads, default=1, metavar="N", help="for both contenders (default: 1)")
    add_bench(found, threads)
    add_check(found)
    return parser


def add_bench(found: Any, threads: Callable[[str], int]) -> None:
    """The options of `bench`."""
    bench = found.add_parser(
        "bench", help="time your own network, or the standard ones, beside PyTorch and other libraries"
    )
    bench.add_argument("--output", type=Path, metavar="FILE", help="JSON to write, with what was measured and on what")
    bench.add_argument("--threads", type=threads, metavar="N", help="of all contenders (default: PyTorch's number)")
    own = bench.add_argument_group("your own network, on the processor")
    own.add_argument("--widths", type=wholes(2), metavar="N,N,...", help="from input to output, such as 20,64,64,2")
    own.add_argument(
        "--activation", choices=commands.ACTIVATIONS, metavar="NAME", help="between the layers (default: relu)"
    )
    own.add_argument("--batch", type=wholes(1), metavar="N,...", help="rows of the input (default: 1,256)")
    own.add_argument("--dtype", choices=DTYPES, help="of everything (default: float32)")
    own.add_argument("--optimizer", choices=OPTIMIZERS, help="of the training step (default: Adam)")
    own.add_argument("--no-peers", action="store_true", help="without ONNX Runtime, OpenVINO and JAX")
    own.add_argument("--picture", type=Path, metavar="FILE", help="bars of all times to draw, such as bench.png")
    standard = bench.add_argument_group("the standard networks")
    standard.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    standard.add_argument(
        "--network", action="append", metavar="NAME", help="one of them, again for more (default: all)"
    )
    standard.add_argument("--quick", action="store_true", help="the smallest batch of each network alone")


def add_check(found: Any) -> None:
    """The options of `check`."""
    check = found.add_parser("check", help="say what of your model runs fused, frozen, in a TrainStep and captured")
    check.add_argument(
        "model", metavar="MODULE:FACTORY", help="what returns the model: a function, a class or a module"
    )
    check.add_argument(
        "--input", action="append", type=wholes(1), metavar="N,...", help="shape of an example input, again for more"
    )
    check.add_argument("--dtype", choices=[*DTYPES, "int64"], default="float32", help="of them (default: float32)")
    check.add_argument("--loss", default="MSELoss", metavar="NAME", help="class of torch.nn (default: MSELoss)")
    check.add_argument("--optimizer", choices=OPTIMIZERS, default="Adam", help="of torch.optim (default: Adam)")


def wholes(least: int) -> Callable[[str], tuple[int, ...]]:
    """What reads an option's value, whole numbers from 1 with commas between them, `least` or more of them."""

    def read(text: str) -> tuple[int, ...]:
        parts = text.split(",")
        if len(parts) < least or not all(part.isdecimal() and int(part) >= 1 for part in parts):
            many = "whole numbers" if least == 1 else f"{least} or more whole numbers"
            raise argparse.ArgumentTypeError(f"must be {many} from 1 with commas between them, got {text!r}")
        return tuple(map(int, parts))

    return read


def whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """What reads an option's value, a whole number within limits."""

    def read(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, got {text!r}")
        return int(text)

    return read


def run_demo(output: Path, epochs: int | None, seed: int, threads: int) -> int:
    """Runs the demo if its packages are there, and tells in one line what went wrong."""
    try:
        # The demo is imported only now, so that the rest of the library does without its packages.
        from fastmlp import demo
    except ModuleNotFoundError as error:
        return missing("demo", error)
    torch.set_num_threads(threads)
    try:
        demo.main(output, demo.EPOCHS if epochs is None else epochs, seed)
    except (demo.DemoFailure, OSError) as failure:
        print(f"The demo failed: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

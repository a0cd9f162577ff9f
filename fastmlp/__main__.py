"""The command line: `python -m fastmlp info`, `demo` and `bench`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import fastmlp

#: What the demo and the bench need besides the library: the module that is imported, and the package's name.
EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}


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
        return run_bench(options.device, options.output, options.network, options.quick)
    parser.print_help()
    return 2


def make_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(prog="python -m fastmlp", description=fastmlp.__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("info", help="print versions, the build, instruction sets and threads")
    demo = commands.add_parser("demo", help="train on real data beside PyTorch and compare")
    demo.add_argument(
        "--output", type=Path, default=Path("out"), metavar="DIR", help="folder for demo.png (default: out)"
    )
    demo.add_argument("--epochs", type=whole(1), metavar="N", help="of each training (default: enough for 97 %%)")
    demo.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of parameters and batches (default: 0)")
    # One thread is the default, because networks of this size gain nothing from more and lose on a busy processor.
    threads = whole(1, os.cpu_count() or 1)
    demo.add_argument("--threads", type=threads, default=1, metavar="N", help="for both contenders (default: 1)")
    bench = commands.add_parser("bench", help="time networks beside PyTorch's own modules, and write a report")
    bench.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    bench.add_argument("--output", type=Path, metavar="FILE", help="JSON to write, with what was measured and on what")
    bench.add_argument("--network", action="append", metavar="NAME", help="one of them, again for more (default: all)")
    bench.add_argument("--quick", action="store_true", help="the smallest batch of each network alone")
    return parser


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


def run_bench(device: str, output: Path | None, networks: list[str] | None, quick: bool) -> int:
    """Runs the benchmark if its package is there, and tells in one line what went wrong."""
    try:
        from fastmlp import bench
    except ModuleNotFoundError as error:
        return missing("bench", error)
    unknown = sorted(set(networks or ()) - set(bench.NETWORKS))
    if unknown:
        print(f"network must be one of {', '.join(bench.NETWORKS)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    try:
        bench.main(device, output, networks or list(bench.NETWORKS), quick)
    except (bench.WrongResult, RuntimeError, OSError) as failure:
        print(f"The bench failed: {str(failure).removeprefix('fastmlp: ')}", file=sys.stderr)
        return 1
    return 0


def missing(command: str, error: ModuleNotFoundError) -> int:
    """Names the package that a command needs; raises what is none of `EXTRAS`."""
    package = EXTRAS.get((error.name or "").partition(".")[0])
    if package is None:
        raise error
    print(f"The {command} needs {package}, which is missing: pip install 'fastmlp[demo]'", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

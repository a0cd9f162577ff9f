"""What `python -m fastmlp bench` and `check` do, once the command line is read; __main__.py reads it."""

import argparse
import importlib
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import reference
from fastmlp._errors import described

__all__ = ["ACTIVATIONS", "DTYPES", "OPTIMIZERS", "missing", "network", "run_bench", "run_check"]

#: What commands need besides the library: the module that is imported, and the package's name.
EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}
#: Names of activations, and what makes the module.
ACTIVATIONS: dict[str, Any] = {
    **{name: kind for kind, name in reference.MODULES.items()},
    "gelu_tanh": lambda: nn.GELU("tanh"),
}
DTYPES = ("float32", "float64", "bfloat16", "float16")
OPTIMIZERS = tuple(fastmlp.optim.RULES)
#: Options of `bench` that are of one's own network, as argparse calls them.
_OWN = ("activation", "batch", "dtype", "optimizer", "picture")
BATCHES = (1, 256)


def missing(command: str, error: ModuleNotFoundError) -> int:
    """Names the package that a command needs; raises what is none of `EXTRAS`."""
    package = EXTRAS.get((error.name or "").partition(".")[0])
    if package is None:
        raise error
    print(f"The {command} needs {package}, which is missing: pip install 'fastmlp[demo]'", file=sys.stderr)
    return 1


def network(widths: tuple[int, ...], activation: str = "relu") -> nn.Sequential:
    """A network as PyTorch's users write it.

    Example:
        >>> network((3, 8, 1), "tanh")
        Sequential(
          (0): Linear(in_features=3, out_features=8, bias=True)
          (1): Tanh()
          (2): Linear(in_features=8, out_features=1, bias=True)
        )
    """
    layers: list[nn.Module] = []
    for in_features, out_features in pairwise(widths):
        layers += [nn.Linear(in_features, out_features), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def run_bench(options: argparse.Namespace) -> int:
    """Measures the standard networks or one's own, and tells in one line what went wrong."""
    given = [f"--{name}" for name in _OWN if getattr(options, name) is not None] + ["--no-peers"] * options.no_peers
    if options.widths is None and given:
        print(f"{given[0]} is of a network of your own: give its --widths too", file=sys.stderr)
        return 2
    if options.widths is not None and (options.network or options.quick or options.device != "cpu"):
        print(
            "--widths measures a network of your own on the processor: --device, --network and --quick, which "
            "are of the standard networks, cannot be given beside it",
            file=sys.stderr,
        )
        return 2
    try:
        from fastmlp.benchmark import standard
        from fastmlp.benchmark.contest import WrongResult
        from fastmlp.benchmark.report import check_writable

        if options.picture is not None:
            importlib.import_module("matplotlib")
    except ModuleNotFoundError as error:
        return missing("bench", error)
    unknown = sorted(set(options.network or ()) - set(standard.NETWORKS))
    if unknown:
        print(f"network must be one of {', '.join(standard.NETWORKS)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    threads = torch.get_num_threads()
    try:
        for path in (options.output, options.picture):
            if path is not None:
                check_writable(path)
        if options.picture is not None:
            check_picture(options.picture)
        torch.set_num_threads(options.threads or threads)
        if options.widths is None:
            names = options.network or list(standard.NETWORKS)
            standard.main(options.device, options.output, names, options.quick)
        else:
            bench_own(options)
    except (WrongResult, RuntimeError, ValueError, OSError) as failure:
        print(f"The bench failed: {str(failure).removeprefix('fastmlp: ')}", file=sys.stderr)
        return 1
    finally:
        torch.set_num_threads(threads)
    return 0


def check_picture(path: Path) -> None:
    """Raises, before anything is measured, if the ending of a picture's name is none that Matplotlib knows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(
            f"fastmlp: picture must end with one of {', '.join(f'.{one}' for one in known)}, got {path.name}"
        )


def bench_own(options: argparse.Namespace) -> None:
    """Measures one network at all batches, prints, writes and draws."""
    from rich.console import Console

    from fastmlp.benchmark.report import Report

    dtype: torch.dtype = getattr(torch, options.dtype or DTYPES[0])
    activation = options.activation or "relu"
    torch.manual_seed(0)
    model = network(options.widths, activation).to(dtype)
    reports = []
    for batch in options.batch or BATCHES:
        input = torch.randn(batch, options.widths[0], dtype=dtype)
        optimizer = getattr(torch.optim, options.optimizer or "Adam")
        reports.append(fastmlp.bench(model, input, optimizer=optimizer, peers=not options.no_peers))
    what = f"{'-'.join(map(str, options.widths))} {activation}"
    whole = Report.joined(what, reports)
    console = Console()
    whole.show(console)
    if options.output is not None:
        whole.save(options.output)
        console.print(f"The report is in {options.output}.", highlight=False)
    if options.picture is not None:
        whole.draw(options.picture)
        console.print(f"The picture is in {options.picture}.", highlight=False)


def run_check(options: argparse.Namespace) -> int:
    """Explains a model of the user's, and tells in one line what went wrong before that."""
    try:
        model, inputs = made(options.model)
        loss = getattr(nn, options.loss, None)
        if not (isinstance(loss, type) and issubclass(loss, nn.Module)):
            raise ValueError(f"fastmlp: loss must be the name of a class of torch.nn, got {options.loss!r}")
        if options.input is not None:
            inputs = tuple(example(shape, getattr(torch, options.dtype)) for shape in options.input)
    except (ImportError, AttributeError, TypeError, ValueError) as failure:
        print(f"The check failed: {str(failure).removeprefix('fastmlp: ')}", file=sys.stderr)
        return 2
    parameters = list(model.parameters())
    optimizer = getattr(torch.optim, options.optimizer)(parameters) if parameters else None
    print(fastmlp.explain(model, inputs=inputs, loss_fn=loss(), optimizer=optimizer))
    return 0


def example(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An input of a shape: random numbers, or zeros of an integer type, which are an index of any table."""
    return torch.randn(shape, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


def made(text: str) -> tuple[nn.Module, tuple[Any, ...] | None]:
    """The model that "module:factory" names, and the inputs that come with it, if any.

    Raises:
        ImportError: if there is no such module.
        AttributeError: if it has no such name.
        ValueError: if the text is of another form.
        TypeError: if what it names is no model and makes none.
    """
    place, _, name = text.partition(":")
    if not place or not name:
        raise ValueError(f"fastmlp: model must be MODULE:FACTORY, such as my_package.models:make_model, got {text!r}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    found: Any = importlib.import_module(place)
    for part in name.split("."):
        found = getattr(found, part)
    if not isinstance(found, nn.Module):
        found = found()
    inputs = None
    if isinstance(found, tuple) and len(found) == 2:
        found, inputs = found
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    if not isinstance(found, nn.Module):
        expected = "a torch.nn.Module, or return one, or a pair of one and its inputs"
        raise TypeError(f"fastmlp: {text} must be {expected}, got {described(found)}")
    return found, inputs

"""Measured choices of CUDA kernels, kept on disk. Opt-in: without it a static table chooses."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastmlp._errors import described
from fastmlp._load import _C

_ops = torch.ops.fastmlp_cuda

#: What a choice is, in the order of the extension's numbers.
FIELDS = ("architecture", "multiprocessors", "dtype", "epilogue", "vectors", "m", "n", "k", "tile")


@contextmanager
def autotune(path: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Within it, each product that a GPU has not been measured for is measured before it runs.

    The tiles of fastmlp's kernels compete with the library that PyTorch calls (`torch.addmm`), on random operands of
    the product's shape, dtype and alignment; the fastest is chosen from then on, after the context too. That takes
    some tens of milliseconds for each new shape and waits for the GPU, so it is nothing for a training loop whose
    batches all differ in size. What is timed is the GPU alone: it is kept busy until the host has queued all of a
    measurement; where the host is too slow for that, nothing is chosen. While a CUDA graph is captured nothing is
    measured, nor where there is no memory for these operands. The user's random numbers stay as they are.

    Choices belong to a card's architecture and its number of multiprocessors, on which they depend most. Cards that
    have both in common share them in a process, such as the eight of a server.

    Choices are read from a file on entering, and written to it on leaving, one file for each kind of GPU and each
    version of fastmlp and PyTorch. To use what was measured without measuring: `with fastmlp.autotune(): pass`.

    Args:
        path: the file; `default_path()` if None.

    Raises:
        TypeError: if `path` is of another type.
        RuntimeError: if there is no GPU, or this build has no kernels for it.
        ValueError: if the file is not one of choices.

    Example:
        >>> import fastmlp
        >>> if torch.cuda.is_available():
        ...     model = fastmlp.MLP(784, [256, 128], 10, device="cuda")
        ...     with fastmlp.autotune():
        ...         loss = model(torch.randn(512, 784, device="cuda")).sum()
        ...         loss.backward()
    """
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"fastmlp: path must be a str, an os.PathLike or None, got {described(path)}")
    # Of the build first, then of the card.
    if obstacle := _C.device_obstacle("cuda"):
        raise RuntimeError(f"fastmlp: autotune needs CUDA kernels, and {obstacle}")
    if not torch.cuda.is_available():
        raise RuntimeError("fastmlp: autotune needs a GPU, and torch.cuda.is_available() is False")
    if obstacle := _C.device_obstacle(f"cuda:{torch.cuda.current_device()}"):
        raise RuntimeError(f"fastmlp: autotune needs CUDA kernels, and {obstacle}")
    file = default_path() if path is None else Path(path)
    # Where there can be no file is known before anything is measured.
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        _ops.add_choices(read(file))
    before = _ops.choices()
    measured = _ops.measure(True)
    try:
        yield
    finally:
        _ops.measure(measured)
        choices = _ops.choices()
        if choices != before or not file.exists():
            write(file, choices)


def default_path() -> Path:
    """Where `autotune` keeps the choices of the current GPU: a file below `$XDG_CACHE_HOME` or `~/.cache`."""
    from fastmlp import __version__

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    gpu = "".join(c if c.isalnum() else "_" for c in torch.cuda.get_device_name())
    return cache / "fastmlp" / f"{gpu}-{__version__}-torch-{torch.__version__}.json"


def read(file: Path) -> list[int]:
    """The extension's numbers from a file that `write` wrote.

    Raises:
        ValueError: if the file is none of these.
    """
    try:
        rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        return [int(row[field]) for row in rows for field in FIELDS]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"fastmlp: {file} holds no choices of autotune: {error!r}") from error


def write(file: Path, choices: list[int]) -> None:
    """Writes the extension's numbers as choices with named fields, beside those of the file; all of it or nothing."""
    width = len(FIELDS)
    # By product, so that what another process wrote meanwhile stays.
    tiles: dict[tuple[int, ...], int] = {}
    for numbers in (read(file) if file.exists() else [], choices):
        for i in range(0, len(numbers), width):
            *product, tile = numbers[i : i + width]
            tiles[tuple(product)] = tile
    rows = [dict(zip(FIELDS, (*product, tile), strict=True)) for product, tile in tiles.items()]
    file.parent.mkdir(parents=True, exist_ok=True)
    # Another process may read or write it at the same time.
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(file)

"""Batches of tensors without a loader, and training over them."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from numbers import Real
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmlp._load import _C
from fastmlp.training import TrainStep

__all__ = ["Batches", "batches", "epochs"]

#: Bytes that are gathered at once: few enough to be in a core's second-level cache still when they are used.
_STRETCH = 1 << 18

#: Each batch begins at a multiple of so many bytes, as memory of torch's own does, because MKL's sums have other bits
#: elsewhere.
_ALIGNMENT = 64

#: Steps that are done before other threads and a progress bar have their turn.
_STEPS = 64

#: What PyTorch counts up when a tensor is written in place.
_VERSION = attrgetter("_version")


class Batches:
    """What `batches` returns: each `for` over it is an epoch, and `len` is the number of batches in one.

    What it was made of can be read as attributes of the same names.
    """

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        generator: torch.Generator | None,
    ) -> None:
        self.tensors, self.batch_size, self.generator = tensors, batch_size, generator
        self.shuffle, self.drop_last = shuffle, drop_last

    def __len__(self) -> int:
        rows = self.tensors[0].size(0)
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        # The first is drawn now and all else with the first batch, as a loader's iterator does it.
        self._draw_base_seed()
        return self._batches()

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors)
        options = f"batch_size={self.batch_size}, shuffle={self.shuffle}, drop_last={self.drop_last}"
        return f"{type(self).__name__}({shapes}, {options})"

    def _draw_base_seed(self) -> None:
        """Draws what a loader draws for its workers, even if it has none, so that generators are left alike."""
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)

    def _draw_order(self) -> Tensor:
        """The rows in the order that a loader's sampler gives them, with its draws."""
        rows = self.tensors[0].size(0)
        if not self.shuffle or rows == 0:
            return torch.from_numpy(np.arange(rows))
        if self.generator is not None:
            return torch.randperm(rows, generator=self.generator)
        seed = int(torch.empty((), dtype=torch.int64).random_().item())
        return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))

    def _batches(self) -> Iterator[list[Tensor]]:
        order, gather = self._draw_order(), _Gather(self)
        at, whole, most = 0, len(order) // self.batch_size, gather.most
        while at < whole:
            columns = gather.stretch(order, at, min(most, whole - at))
            versions = list(map(_VERSION, gather.ahead))
            for batch in zip(*columns, strict=True):
                yield list(batch)
                at += 1
                if list(map(_VERSION, gather.ahead)) != versions:
                    # What was gathered ahead is out of date, since a loader would read the next rows only now.
                    most = 1
                    break
        yield from self._rest(order)

    def _rest(self, order: Tensor) -> Iterator[list[Tensor]]:
        """Ends an epoch: yields the last batch if it is a short one that is not dropped."""
        self._draw_once_more(len(order))
        short = len(order) % self.batch_size
        if short > 0 and not self.drop_last:
            last = order[-short:]
            yield [tensor.index_select(0, last.to(tensor.device)) for tensor in self.tensors]

    def _draw_once_more(self, rows: int) -> None:
        """Draws what a loader's sampler draws when it has no more rows to give: another order, of which it takes none.

        From a generator of its own that makes no difference.
        """
        if self.shuffle and self.generator is not None and rows > 0:
            torch.randperm(rows, generator=self.generator)

    def _losses(self, step: TrainStep) -> Iterator[Tensor]:
        """Steps through an epoch of inputs and targets, and yields the losses, some at a time."""
        inputs, targets = self.tensors
        self._draw_base_seed()
        order = self._draw_order().to(inputs.device)
        taken = order[: len(self) * self.batch_size] if self.drop_last else order
        for rows in taken.split(_STEPS * self.batch_size):
            yield step._run_all(inputs, targets, rows, self.batch_size)
        self._draw_once_more(len(order))


class _Gather:
    """How batches are gathered from tensors, several at once.

    Attributes:
        most: how many.
        ahead: the tensors of which that is done. Of the others each batch is gathered when it is asked for, because
            autograd, a subclass or a tensor of inference mode has to see that.
    """

    def __init__(self, data: Batches) -> None:
        self._tensors, self._size = data.tensors, data.batch_size
        self.ahead = [
            tensor
            for tensor in data.tensors
            if type(tensor) is Tensor and not tensor.requires_grad and not tensor.is_inference()
        ]
        row_sizes = {id(tensor): math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in self.ahead}
        # Rows from the beginning of one batch to that of the next one, by tensor.
        self._spacing = {key: _rounded_up(self._size, size) for key, size in row_sizes.items()}
        together = sum(self._spacing[key] * size for key, size in row_sizes.items())
        self.most = max(1, _STRETCH // max(1, together))

    def stretch(self, order: Tensor, at: int, count: int) -> list[Iterable[Tensor]]:
        """Gathers batches that follow one another.

        Args:
            order: of all rows.
            at: the first of the batches.
            count: how many.

        Returns:
            Of each tensor, the batches.
        """
        rows = order[at * self._size : (at + count) * self._size]
        return [
            self._at_once(tensor, rows, self._spacing[id(tensor)])
            if id(tensor) in self._spacing
            else self._one_by_one(tensor, rows)
            for tensor in self._tensors
        ]

    def _at_once(self, tensor: Tensor, rows: Tensor, spacing: int) -> Sequence[Tensor]:
        gap = spacing - self._size
        if gap > 0:
            # Row 0 fills the gaps between the batches.
            rows = pad(rows.view(-1, self._size), (0, gap)).flatten()
        # Outside inference mode, because batches may be asked for after it has ended.
        with torch.inference_mode(False):
            together = tensor.index_select(0, rows.to(tensor.device))
            # The parts are no views: a write into one does not count as one into the others.
            if gap == 0:
                return together.unsafe_split(spacing)
            return together.unsafe_split_with_sizes([self._size, gap] * (len(rows) // spacing))[::2]

    def _one_by_one(self, tensor: Tensor, rows: Tensor) -> Iterator[Tensor]:
        return (tensor.index_select(0, part) for part in rows.to(tensor.device).split(self._size))


def _rounded_up(rows: int, row_size: int) -> int:
    """The next number of rows, each of so many bytes, after which memory is aligned."""
    step = _ALIGNMENT // math.gcd(_ALIGNMENT, row_size)
    return -(-rows // step) * step


def batches(
    *tensors: Tensor,
    batch_size: int,
    shuffle: bool = False,
    drop_last: bool = False,
    generator: torch.Generator | None = None,
) -> Batches:
    """Cuts tensors into batches: the same as a `DataLoader` of a `TensorDataset`, in a fraction of its time.

    `for input, target in batches(inputs, targets, batch_size=32, shuffle=True)` takes the place of a loop over
    `DataLoader(TensorDataset(inputs, targets), batch_size=32, shuffle=True)`. Batches are equal, in the same order
    from the same generator, and generators are left in the same state: `generator`, or else torch's default one. A
    loader indexes each tensor once for each row and stacks what it finds; here all rows of some batches, together
    about 256 KiB, are gathered by one `index_select`.

    Each batch is a list with one tensor for each of `tensors`, contiguous and on the same device. It is a copy, also
    where nothing is shuffled, so a write into a batch reaches neither the data nor another batch. Batches that were
    gathered together lie in one piece of memory of about 256 KiB. If you keep one of them, the whole piece is kept, and
    `torch.save` writes all of it; `clone` takes a batch out.

    The next batch sees what was written into the data in place, as with a loader. A write that PyTorch does not count,
    through NumPy or `.data`, is seen only when the next 256 KiB are gathered. Data that require a gradient get it.
    These data, and subclasses of `Tensor`, are gathered for each batch by itself.

    Args:
        tensors: at least one, of any dtype and shape, dense, with the same size of the first dimension, which counts
            the rows. They may have no row: then there is no batch, with `shuffle` too, where a loader refuses.
        batch_size: rows of each batch but the last one, which has what is left. At least 1.
        shuffle: whether each epoch takes the rows in a new random order.
        drop_last: whether a last batch of fewer rows is left out.
        generator: to draw orders from, on the default device; torch's default generator if None.

    Returns:
        A `Batches`: each `for` over it is a new epoch, and its `len` is the number of batches.

    Raises:
        TypeError: if an argument has another type, or a tensor is sparse, nested or quantized.
        ValueError: if no tensor is given, sizes differ, `batch_size` is not positive, or the generator belongs to
            another device.

    Example:
        >>> inputs, targets = torch.arange(10.0).view(5, 2), torch.arange(5)
        >>> data = batches(inputs, targets, batch_size=2)
        >>> len(data)
        3
        >>> for input, target in data:
        ...     print(tuple(input.shape), target.tolist())
        (2, 2) [0, 1]
        (2, 2) [2, 3]
        (1, 2) [4]
    """
    return _checked("batches", tensors, batch_size, shuffle, drop_last, generator)


def epochs(
    step: Callable[..., Any],
    *tensors: Tensor,
    epochs: int = 1,
    batch_size: int,
    shuffle: bool = False,
    drop_last: bool = False,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Tensor:
    """Calls a step of training with every batch of some epochs.

    It does what this loop does, with the same bits and the same draws from generators, and keeps the losses:

        data = batches(*tensors, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, generator=generator)
        for _ in range(epochs):
            for batch in data:
                step(*batch)

    A `TrainStep` runs without code of Python between its steps. A scheduler that steps once an epoch, or
    a look at held-out data, stands in a loop around calls with `epochs=1`, which draw the same orders as one call.
    `TrainStep.flush` is not called. Nothing waits for a device, unless the step does or there is a progress bar. An
    error of the step ends the call; what it has done so far stays done.

    Args:
        step: a `TrainStep`, or anything that can be called with a batch's tensors and returns the loss: a tensor
            without dimensions, of which a copy without its graph is taken at once, or a number, which is kept as
            float64.
        tensors: as `batches` takes them. For a `TrainStep` inputs and targets.
        epochs: how often to go through all of the data. At least 0.
        batch_size: as `batches` takes it, and so the next three.
        shuffle: whether each epoch takes the rows in a new random order.
        drop_last: whether a last batch of fewer rows is left out.
        generator: to draw orders from; torch's default generator if None.
        progress: whether to show a bar with the epoch and, where the first one has ended, the mean loss of the last
            one, for which a device is waited for. It takes the package tqdm.

    Returns:
        The losses, of shape (epochs, batches), on their own device.

    Raises:
        TypeError: if an argument has another type, or the step returns no loss: the latter after the first call.
        ValueError: if `epochs` is negative, or as `batches` raises it.
        ImportError: if `progress` is asked for and tqdm is not installed.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> step = TrainStep(model, torch.nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1))
        >>> inputs = torch.randn(100, 10)
        >>> losses = epochs(step, inputs, inputs.sum(1, keepdim=True), epochs=20, batch_size=32, shuffle=True)
        >>> losses.shape
        torch.Size([20, 4])
        >>> bool(losses[-1].mean() < losses[0].mean())
        True
    """
    _check_run(step, tensors, epochs, progress)
    data = _checked("epochs", tensors, batch_size, shuffle, drop_last, generator)
    bar = progress_bar(epochs * len(data), "batch", "epochs: progress=True") if progress else None
    if type(step) is TrainStep and all(map(_C.has_plain_rows, tensors)):
        run = partial(data._losses, step)
    else:
        run = partial(_losses, step, data)
    done: list[Tensor] = []
    try:
        for epoch in range(epochs):
            begun = len(done)
            for losses in run():
                done.append(losses)
                if bar is not None:
                    bar.update(len(losses))
            if bar is not None and len(data) > 0:
                mean = torch.cat(done[begun:]).float().mean().item()
                bar.set_postfix(epoch=f"{epoch + 1}/{epochs}", loss=f"{mean:.4g}")
    finally:
        if bar is not None:
            bar.close()
    return torch.cat(done).view(epochs, -1) if done else torch.empty(epochs, len(data))


def _check_run(step: object, tensors: tuple[object, ...], epochs: object, progress: object) -> None:
    """Raises for what `epochs` cannot be called with, other than what `batches` cannot."""
    if not callable(step):
        raise TypeError(f"fastmlp: epochs: step must be a TrainStep or another callable, got {type(step).__name__}")
    if isinstance(step, TrainStep) and len(tensors) != 2:
        raise TypeError(f"fastmlp: epochs: a TrainStep takes two tensors, inputs and targets, got {len(tensors)}")
    if isinstance(epochs, bool) or not isinstance(epochs, int):
        raise TypeError(f"fastmlp: epochs: epochs must be an integer, got {epochs!r}")
    if epochs < 0:
        raise ValueError(f"fastmlp: epochs: epochs must be at least 0, got {epochs}")
    if not isinstance(progress, bool):
        raise TypeError(f"fastmlp: epochs: progress must be True or False, got {progress!r}")


def _losses(step: Callable[..., Any], data: Batches) -> Iterator[Tensor]:
    """Calls any step with the batches of an epoch, and yields its losses, some at a time."""
    results = (_loss(step(*batch)) for batch in data)
    while losses := list(islice(results, _STEPS)):
        yield torch.stack(losses)


def _loss(result: object) -> Tensor:
    """A loss that neither its graph nor a write of the step's can change."""
    if isinstance(result, Tensor) and result.dim() == 0:
        return result.detach().clone()
    if isinstance(result, Real):
        return torch.tensor(float(result), dtype=torch.float64)
    given = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
    raise TypeError(
        f"fastmlp: epochs: step must return the loss, a tensor without dimensions or a number, but returned {given}"
    )


def progress_bar(total: int, unit: str, asked: str) -> Any:
    """A bar of tqdm's.

    Args:
        total: how many there are to do.
        unit: what they are.
        asked: how the bar was asked for, for the error.

    Raises:
        ImportError: if tqdm is not installed.
    """
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            f"fastmlp: {asked} takes the package tqdm, which cannot be imported: pip install tqdm"
        ) from error
    return tqdm(total=total, unit=unit)


def _checked(
    name: str,
    tensors: tuple[object, ...],
    batch_size: object,
    shuffle: object,
    drop_last: object,
    generator: object,
) -> Batches:
    """The batches of these arguments, which `name` was called with."""
    if not tensors:
        raise ValueError(f"fastmlp: {name}: no tensors were given, expected at least one")
    found = tuple(_dense(name, i, tensor) for i, tensor in enumerate(tensors))
    for i, tensor in enumerate(found):
        if tensor.size(0) != found[0].size(0):
            raise ValueError(
                f"fastmlp: {name}: tensors must have the same size of the first dimension, but tensors[0] has shape "
                f"{tuple(found[0].shape)} and tensors[{i}] has {tuple(tensor.shape)}"
            )
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"fastmlp: {name}: batch_size must be an integer, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"fastmlp: {name}: batch_size must be at least 1, got {batch_size}")
    if not isinstance(shuffle, bool):
        raise TypeError(f"fastmlp: {name}: shuffle must be True or False, got {shuffle!r}")
    if not isinstance(drop_last, bool):
        raise TypeError(f"fastmlp: {name}: drop_last must be True or False, got {drop_last!r}")
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"fastmlp: {name}: generator must be a torch.Generator or None, got {generator!r}")
        device = torch.get_default_device()
        if generator.device.type != device.type:
            raise ValueError(
                f"fastmlp: {name}: generator must be one of the default device, {device.type}, where orders are drawn, "
                f"got one of {generator.device}"
            )
    return Batches(found, batch_size, shuffle, drop_last, generator)


def _dense(name: str, i: int, tensor: object) -> Tensor:
    """The argument `tensors[i]`, if it can be cut into batches."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"fastmlp: {name}: tensors[{i}] must be a tensor, got {type(tensor).__name__}: torch.as_tensor makes one "
            f"of an array, and options are given by name"
        )
    kinds = {
        "nested": tensor.is_nested,
        str(tensor.layout): tensor.layout != torch.strided,
        "quantized": tensor.is_quantized,
    }
    for kind, applies in kinds.items():
        if applies:
            raise TypeError(f"fastmlp: {name}: tensors[{i}] must be dense, got a tensor that is {kind}")
    if tensor.dim() == 0:
        raise ValueError(f"fastmlp: {name}: tensors[{i}] must have at least one dimension, which counts rows, got none")
    return tensor

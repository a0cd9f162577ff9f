"""`batches` yields what a DataLoader of a TensorDataset yields, from the same draws; `epochs` is the loop over it."""

import copy
import itertools
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastmlp
from fastmlp import data as module
from fastmlp import epochs
from tests.support.steps import sgd
from tests.support.training import Loop

pytestmark = pytest.mark.usefixtures("as_before")

batches: Any = fastmlp.batches


class Sub(Tensor):
    """A subclass without functions of its own."""


def loader(*tensors: Tensor, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors), **options)


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors cannot be told apart but by their memory."""
    alike = ("dtype", "shape", "device", "requires_grad", "is_leaf")
    return (
        type(ours) is type(theirs)
        and all(getattr(ours, name) == getattr(theirs, name) for name in alike)
        and ours.stride() == theirs.stride()
        and (ours.is_meta or ours.reshape(-1).view(torch.uint8).equal(theirs.reshape(-1).view(torch.uint8)))
    )


def states(generator: torch.Generator | None) -> list[list[int]]:
    found = [torch.get_rng_state(), *([] if generator is None else [generator.get_state()])]
    return [hash(tuple(state.tolist())) for state in found]  # type: ignore[misc]


def record(
    make: Callable[..., Iterable[Any]],
    tensors: Iterable[Tensor],
    seed: int | None,
    stops: Iterable[int | None],
    **options: Any,
) -> tuple[list[list[Tensor]], list[Any]]:
    """All batches of some epochs, and the generators' states at each moment: after iter(), each batch and the end.

    Args:
        make: `batches` or `loader`.
        tensors: the data.
        seed: of a generator that is passed; none if None.
        stops: for each epoch, after how many batches it is left.
        options: of batches.
    """
    torch.manual_seed(1)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    made = make(*tensors, generator=generator, **options)
    found, moments = [], [states(generator)]
    for stop in stops:
        epoch = iter(made)
        moments.append(states(generator))
        for batch in itertools.islice(epoch, stop):
            assert type(batch) is list
            found.append(batch)
            moments.append(states(generator))
        moments.append(states(generator))
    return found, moments


def agree(*tensors: Tensor, seed: int | None = None, stops: Iterable[int | None] = (None, None), **options: Any) -> int:
    """Asserts that `batches` does what a loader does, and returns how many batches that was."""
    stops = tuple(stops)
    ours, our_states = record(batches, tensors, seed, stops, **options)
    theirs, their_states = record(loader, tensors, seed, stops, **options)
    assert [len(batch) for batch in ours] == [len(batch) for batch in theirs]
    assert all(same(x, y) for a, b in zip(ours, theirs, strict=True) for x, y in zip(a, b, strict=True))
    assert our_states == their_states
    assert len(batches(*tensors, **options)) == len(loader(*tensors, **options))
    return len(ours)


def drawn(rng: random.Random, rows: int) -> Tensor:
    """A tensor with so many rows, often with gaps or turned around."""
    shape = [rng.choice((0, 1, 1, 2, 3, 5)) for _ in range(rng.choice((0, 0, 1, 1, 2, 3)))]
    dtype = rng.choice((torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.complex64))
    tensor = torch.randn(rows * 2, *shape, 3).mul(9).to(dtype)[..., 0] if rng.random() < 0.3 else None
    if tensor is not None:
        return tensor[::2] if rng.random() < 0.5 else tensor[rows:]
    tensor = torch.randn(*shape, rows).mul(9).to(dtype).movedim(-1, 0)
    if rng.random() < 0.2:
        return tensor[:1].expand(rows, *shape) if rows else tensor
    return tensor if rng.random() < 0.3 else tensor.contiguous()


@pytest.mark.parametrize("seed", range(12))
def test_the_batches_of_a_loader(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    total = 0
    for _ in range(25):
        monkeypatch.setattr(module, "_STRETCH", rng.choice((1, 300, 2000, 1 << 18)))
        shuffle = rng.random() < 0.7
        rows = rng.choice((1, 2, 7, 12, 32, 33, 64, 100)) if shuffle else rng.randrange(40)
        tensors = [drawn(rng, rows) for _ in range(rng.choice((1, 2, 2, 3)))]
        total += agree(
            *tensors,
            seed=rng.choice((None, 3)),
            stops=[rng.choice((None, None, 0, 1, 2)) for _ in range(3)],
            batch_size=rng.choice((1, 2, 3, 4, 7, 16, 32, 200)),
            shuffle=shuffle,
            drop_last=rng.random() < 0.5,
        )
    assert total > 50


DTYPES = sorted(
    {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    - {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4},
    key=str,
)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    assert agree(torch.randint(256, (11, 32), dtype=torch.uint8).view(dtype), batch_size=4, shuffle=True) == 6


@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
def test_images(format: torch.memory_format) -> None:
    assert agree(torch.randn(9, 3, 4, 5).to(memory_format=format), batch_size=2, shuffle=True) == 10


def test_other_devices() -> None:
    assert agree(torch.zeros(9, 3, device="meta"), torch.randn(9), batch_size=2, shuffle=True) == 10


def test_subclasses_and_parameters() -> None:
    data = torch.randn(9, 3)
    assert agree(data.as_subclass(Sub), nn.Parameter(data, requires_grad=False), batch_size=4, shuffle=True) == 6


def test_no_rows() -> None:
    """A loader refuses to shuffle them."""
    assert agree(torch.zeros(0, 3), torch.zeros(0), batch_size=2) == 0
    generator = torch.Generator()
    empty = batches(torch.zeros(0, 3), batch_size=2, shuffle=True, generator=generator)
    assert (len(empty), list(empty)) == (0, [])


def test_gradients() -> None:
    """Of data that require them, beside data that do not."""
    grads = []
    for make in (batches, loader):
        torch.manual_seed(1)
        x = torch.arange(20.0).view(10, 2).requires_grad_()
        y = torch.arange(10.0)
        for a, b in make(x, y, batch_size=4, shuffle=True):
            assert (a.requires_grad, b.requires_grad) == (True, False)
            (a.square().sum(1) * b).sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
        with torch.no_grad():
            assert [a.requires_grad for a, _ in make(x, y, batch_size=4)] == [False] * 3
    assert grads[0].equal(grads[1])


def test_inference_mode() -> None:
    """A batch can be trained with outside, even if an earlier one was asked for inside."""
    with torch.inference_mode():
        inside = torch.randn(8, 3)
        epoch = iter(batches(torch.randn(8, 3).clone(), batch_size=2))
        next(epoch)
    weight = torch.randn(3, requires_grad=True)
    outside = torch.randn(8, 3)
    with torch.inference_mode():
        epoch = iter(batches(outside, batch_size=2))
        next(epoch)
    for (batch,) in epoch:
        (batch @ weight).sum().backward()
    assert agree(inside, batch_size=3, shuffle=True) == 6


# Memory.


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_write_into_a_batch_stays_there(shuffle: bool) -> None:
    x = torch.arange(40.0).view(10, 4)
    before = x.clone()
    found = list(batches(x, batch_size=3, shuffle=shuffle))
    kept = [batch.clone() for (batch,) in found]
    for i, (batch,) in enumerate(found):
        batch.fill_(-1)
        assert all(later.equal(as_it_was) for (later,), as_it_was in zip(found[i + 1 :], kept[i + 1 :], strict=True))
    assert x.equal(before)


def test_a_write_into_a_batch_is_none_into_what_autograd_keeps_of_another() -> None:
    weight = torch.ones(4, 1, requires_grad=True)
    loss = torch.zeros(())
    for (x,) in batches(torch.arange(40.0).view(10, 4), batch_size=2):
        x.mul_(2)
        loss = loss + (x @ weight).sum()
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [360.0, 380.0, 400.0, 420.0]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("rows", [40, 43])
def test_a_write_into_the_data_is_seen_by_the_next_batch(shuffle: bool, rows: int) -> None:
    found = []
    for make in (batches, loader):
        torch.manual_seed(1)
        x, y = torch.arange(2.0 * rows).view(rows, 2), torch.arange(rows)
        seen = []
        for i, (a, b) in enumerate(make(x, y, batch_size=4, shuffle=shuffle)):
            seen += [a.clone(), b.clone()]
            if i in (2, 5, 6):
                (x, y)[i % 2].add_(100)
        found.append(torch.cat([part.double().flatten() for part in seen]))
    assert found[0].equal(found[1])


@pytest.mark.parametrize("shape", [(), (1,), (3,), (10,), (16,), (0,), (5, 3)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_batches_begin_where_memory_of_their_own_would(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """What MKL makes of other addresses may have other bits."""
    x = torch.ones(101, *shape).to(dtype)
    for size in (1, 7, 32, 50):
        for (batch,) in batches(x, batch_size=size, shuffle=True):
            assert batch.data_ptr() % 64 == 0


def test_memory_is_bounded() -> None:
    """However many data there are: what a batch brings along is no more than a stretch, or than itself."""
    x = torch.zeros(1 << 16, 64)
    for size in (1, 32, 1 << 12):
        (batch,) = next(iter(batches(x, batch_size=size, shuffle=True)))
        assert batch.untyped_storage().nbytes() <= max(module._STRETCH, batch.nbytes)


def test_copies() -> None:
    made = batches(torch.arange(10), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(4))
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        expected = [batch.tolist() for (batch,) in copy.deepcopy(made)]
        assert [batch.tolist() for (batch,) in twin] == expected
    assert repr(made) == "Batches((10,), batch_size=3, shuffle=True, drop_last=False)"
    assert (made.batch_size, made.shuffle, made.drop_last, len(made.tensors)) == (3, True, False, 1)


# Epochs.


def trained(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, fastmlp.TrainStep]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 1)).to(dtype)
    return model, fastmlp.TrainStep(model, nn.MSELoss(), sgd(model.parameters()), **options)


def by_hand(step: Callable[..., Any], *tensors: Tensor, epochs: int, **options: Any) -> Tensor:
    data = batches(*tensors, **options)
    return torch.stack([torch.stack([torch.as_tensor(step(*batch)) for batch in data]) for _ in range(epochs)])


def data(rows: int = 100, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(6)
    x = torch.randn(rows, 10, dtype=dtype)
    return x, x.sum(1, keepdim=True)


@pytest.mark.parametrize("steps", [1, 4, 64])
@pytest.mark.parametrize("rows", [96, 100])
@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"keep_grads": False}, {"dtype": torch.float64}], ids=str)
@pytest.mark.parametrize(
    "order", [{}, {"shuffle": True}, {"shuffle": True, "drop_last": True}, {"shuffle": True, "generator": 7}], ids=str
)
def test_epochs_of_a_train_step(
    steps: int, rows: int, options: dict[str, Any], order: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of the loop, also where losses come from TrainStep itself."""
    monkeypatch.setattr(module, "_STEPS", steps)
    results = []
    for run in (epochs, by_hand):
        model, step = trained(**options)
        generator = torch.Generator().manual_seed(order["generator"]) if "generator" in order else None
        tensors = data(rows, options.get("dtype", torch.float32))
        torch.manual_seed(8)
        losses = run(step, *tensors, epochs=3, batch_size=16, **(order | {"generator": generator}))
        parameters = [p.tolist() for p in model.parameters()]
        grads = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
        results.append((losses.dtype, losses.tolist(), parameters, grads, step.waiting, states(generator)))
        assert losses.shape == (3, rows // 16 + (rows % 16 > 0 and not order.get("drop_last", False)))
    assert results[0] == results[1]


@pytest.mark.parametrize("size", [16, 7])
def test_epochs_of_any_loop(size: int) -> None:
    results = []
    for run in (epochs, by_hand):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(10, 7), nn.Dropout(), nn.Linear(7, 1))
        loop = Loop(model, nn.MSELoss(), torch.optim.Adam(model.parameters()))
        losses = run(loop, *data(), epochs=2, batch_size=size, shuffle=True)
        results.append((losses.tolist(), [p.tolist() for p in model.parameters()], states(None)))
    assert results[0] == results[1]


def test_one_epoch_at_a_time_draws_as_all_at_once() -> None:
    found, tensors = [], data()
    for times, each in ((1, 3), (3, 1)):
        _, step = trained()
        torch.manual_seed(8)
        found.append(
            torch.cat([epochs(step, *tensors, epochs=each, batch_size=16, shuffle=True) for _ in range(times)])
        )
    assert found[0].shape == (3, 7)
    assert not found[0][0].equal(found[0][1])
    assert found[0].equal(found[1])


def test_steps_that_keep_their_batches() -> None:
    kept: list[Tensor] = []

    def step(x: Tensor) -> float:
        kept.append(x)
        return float(x.sum())

    x = torch.arange(20)
    losses = epochs(step, x, epochs=2, batch_size=3, shuffle=True)
    assert losses.dtype == torch.float64
    assert losses.flatten().tolist() == [float(part.sum()) for part in kept]
    assert torch.cat(kept).sort().values.tolist() == sorted([*range(20)] * 2)


def test_losses_that_the_step_writes_again() -> None:
    total = torch.zeros(())

    def step(x: Tensor) -> Tensor:
        return total.add_(x.sum())

    assert epochs(step, torch.arange(6.0), batch_size=2).tolist() == [[1.0, 6.0, 15.0]]


def test_losses_have_no_graph() -> None:
    weight = torch.ones(3, requires_grad=True)
    losses = epochs(lambda x: (x @ weight).sum(), torch.ones(6, 3), batch_size=2)
    assert (losses.requires_grad, losses.tolist()) == (False, [[6.0, 6.0, 6.0]])


def test_shapes_without_batches() -> None:
    _, step = trained()
    assert epochs(step, *data(0), epochs=2, batch_size=4).shape == (2, 0)
    assert epochs(step, *data(3), epochs=2, batch_size=4, drop_last=True).shape == (2, 0)
    assert epochs(step, *data(9), epochs=0, batch_size=4).shape == (0, 3)


def test_a_train_step_whose_modules_are_exchanged_meanwhile() -> None:
    """By a hook of the optimizer's step. The next step takes the new one, in the loop and here."""
    found = []
    for run in (epochs, by_hand):
        model, step = trained()
        calls: list[int] = []

        def exchange(*_: object, model: Any = model, calls: list[int] = calls) -> None:
            calls.append(0)
            if len(calls) in (1, 4):
                model[1] = nn.Tanh()

        step.optimizer.register_step_post_hook(exchange)
        found.append(run(step, *data(), epochs=2, batch_size=16, shuffle=False))
        assert len(calls) == 14
    assert found[0].equal(found[1])


def test_a_train_step_that_cannot_go_on() -> None:
    model, step = trained()
    calls: list[int] = []

    def hook(*_: object) -> None:
        calls.append(0)
        if len(calls) == 3:
            model[0].register_forward_hook(lambda *_: None)  # type: ignore[index]

    step.optimizer.register_step_post_hook(hook)
    with pytest.raises(RuntimeError, match=r"fastmlp: TrainStep cannot do this step: .*hook"):
        epochs(step, *data(), batch_size=16)
    assert len(calls) == 3


def turned(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


@pytest.mark.parametrize("form", [turned, lambda x: x.repeat(1, 2)[:, :10], lambda x: x.repeat_interleave(2, 0)[::2]])
def test_epochs_of_a_train_step_with_gaps_in_the_data(form: Callable[[Tensor], Tensor]) -> None:
    x, y = data()
    found = []
    for run, inputs in ((epochs, form(x)), (epochs, x), (by_hand, form(x))):
        _, step = trained()
        torch.manual_seed(8)
        found.append(run(step, inputs, y, epochs=2, batch_size=16, shuffle=True))
    assert found[0].equal(found[1])
    assert found[0].equal(found[2])


@pytest.mark.parametrize("what", ["values", "shape"])
def test_data_that_change_meanwhile(what: str) -> None:
    """By a hook of the optimizer's step: values are read at each step, as in the loop."""
    found = []
    for run in (epochs, by_hand):
        _, step = trained()
        x, y = data()

        def change(*_: object, x: Tensor = x, y: Tensor = y) -> None:
            y.add_(1) if what == "values" else x.resize_(3, 10)

        step.optimizer.register_step_post_hook(change)
        if what == "shape":
            with pytest.raises(RuntimeError, match="fastmlp: a tensor of the data has changed its shape"):
                epochs(step, x, y, batch_size=16)
            return
        torch.manual_seed(8)
        found.append(run(step, x, y, epochs=2, batch_size=16, shuffle=True))
    assert found[0].equal(found[1])


def test_errors_of_a_train_step_come_through() -> None:
    _, step = trained()
    x, y = data()
    with pytest.raises(RuntimeError, match="fastmlp: "):
        epochs(step, x.double(), y, batch_size=16)
    with torch.no_grad(), pytest.raises(RuntimeError, match="no_grad"):
        epochs(step, x, y, batch_size=16)


def test_a_subclass_of_train_step_is_called() -> None:
    class Counting(fastmlp.TrainStep):
        calls = 0

        def __call__(self, input: Tensor, target: Tensor) -> Tensor:
            self.calls += 1
            return super().__call__(input, target)

    model, _ = trained()
    step = Counting(model, nn.MSELoss(), sgd(model.parameters()))
    epochs(step, *data(), epochs=2, batch_size=16)
    assert step.calls == 14


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    _, step = trained()
    losses = epochs(step, *data(), epochs=3, batch_size=16, progress=True)
    written = capsys.readouterr().err
    assert "21/21" in written
    assert f"epoch=3/3, loss={losses[-1].mean().item():.4g}" in written
    epochs(step, *data(), epochs=3, batch_size=16)
    assert capsys.readouterr() == ("", "")


def test_progress_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.delitem(sys.modules, "tqdm.auto", raising=False)
    calls: list[Tensor] = []
    with pytest.raises(ImportError, match=r"fastmlp: epochs: progress=True takes the package tqdm.* pip install tqdm"):
        epochs(calls.append, torch.zeros(3), batch_size=2, progress=True)
    assert calls == []


def test_tqdm_is_imported_only_when_it_is_asked_for() -> None:
    """Of tqdm itself torch.hub has a look."""
    code = "import sys, torch, fastmlp; fastmlp.epochs(float, torch.zeros(1), batch_size=1); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fastmlp.data" in done.stdout.split()
    assert "tqdm.auto" not in done.stdout.split()


# Errors.

X = torch.zeros(6, 2)
NESTED = torch.nested.nested_tensor([X, X], layout=torch.jagged)
ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "nothing": ((), {}, ValueError, "no tensors were given"),
    "array": ((X, np.zeros(6)), {}, TypeError, r"tensors\[1\] must be a tensor, got ndarray"),
    "size by place": ((X, 32), {}, TypeError, r"tensors\[1\] must be a tensor, got int: .*options are given by name"),
    "sparse": ((X.to_sparse(),), {}, TypeError, r"tensors\[0\] must be dense, got a tensor that is torch.sparse_coo"),
    "nested": (
        (torch.nested.nested_tensor([X, X], layout=torch.jagged),),
        {},
        TypeError,
        r"tensors\[0\] must be dense, .* nested",
    ),
    "scalar": ((X, X.sum()), {}, ValueError, r"tensors\[1\] must have at least one dimension"),
    "rows": ((X, X, X[:5]), {}, ValueError, r"tensors\[0\] has shape \(6, 2\) and tensors\[2\] has \(5, 2\)"),
    "no size": ((X,), {"batch_size": None}, TypeError, "batch_size must be an integer, got None"),
    "size of another type": ((X,), {"batch_size": 2.0}, TypeError, r"batch_size must be an integer, got 2\.0"),
    "true": ((X,), {"batch_size": True}, TypeError, "batch_size must be an integer, got True"),
    "zero": ((X,), {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    "shuffle": ((X,), {"shuffle": None}, TypeError, "shuffle must be True or False, got None"),
    "drop_last": ((X,), {"drop_last": 1}, TypeError, "drop_last must be True or False, got 1"),
    "seed": ((X,), {"generator": 3}, TypeError, "generator must be a torch.Generator or None, got 3"),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("name", ["batches", "epochs"])
def test_errors(name: str, case: str) -> None:
    tensors, options, kind, text = ERRORS[case]
    calls: list[Any] = []
    made = batches if name == "batches" else lambda *tensors, **options: epochs(calls.append, *tensors, **options)
    with pytest.raises(kind, match=f"^fastmlp: {name}: .*{text}"):
        made(*tensors, **({"batch_size": 2} | options))
    assert calls == []


def test_a_generator_of_another_device() -> None:
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"^fastmlp: batches: .* default device, meta, .* of cpu"),
    ):
        batches(X, batch_size=2, shuffle=True, generator=torch.Generator("cpu"))


@pytest.mark.parametrize(
    ("step", "options", "kind", "text"),
    [
        (3, {}, TypeError, "step must be a TrainStep or another callable, got int"),
        (len, {"epochs": 1.5}, TypeError, r"epochs must be an integer, got 1\.5"),
        (len, {"epochs": True}, TypeError, "epochs must be an integer, got True"),
        (len, {"epochs": -1}, ValueError, "epochs must be at least 0, got -1"),
        (len, {"progress": 1}, TypeError, "progress must be True or False, got 1"),
        (lambda x: None, {}, TypeError, "step must return the loss, .* but returned NoneType"),
        (lambda x: x, {}, TypeError, r"step must return the loss, .* but returned a tensor of shape \(2, 2\)"),
        (trained()[1], {}, TypeError, "a TrainStep takes two tensors, inputs and targets, got 1"),
    ],
    ids=str,
)
def test_errors_of_epochs(step: Any, options: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=f"^fastmlp: epochs: {text}"):
        epochs(step, X, batch_size=2, **options)


def test_a_step_that_returns_no_loss_is_called_once() -> None:
    calls: list[Tensor] = []
    with pytest.raises(TypeError, match="NoneType"):
        epochs(calls.append, X, batch_size=1)
    assert len(calls) == 1


def test_within_one_another() -> None:
    """Iterators do not know of one another."""
    made = batches(torch.arange(6), batch_size=4)

    def pairs() -> Iterator[tuple[list[int], list[int]]]:
        for (a,) in made:
            for (b,) in made:
                yield a.tolist(), b.tolist()

    whole, rest = [0, 1, 2, 3], [4, 5]
    assert list(pairs()) == [(whole, whole), (whole, rest), (rest, whole), (rest, rest)]

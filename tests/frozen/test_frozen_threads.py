"""Frozen networks that several threads call while another one changes the model.

Whatever the moment, a call may return what the model computes at that moment and nothing else: no mixture, no older
weights once newer ones were returned for good, and no error that the model itself does not deserve.
"""

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import FrozenMLP, chain, freeze, stages
from tests.support.small import norm


@pytest.fixture(autouse=True)
def many_switches() -> Iterator[None]:
    """Python lets other threads in every few microseconds, and torch computes in one."""
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-6)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    sys.setswitchinterval(interval)


def layer(value: float, features: int = 4) -> nn.Linear:
    """Multiplies the sum by `value`, whatever it is given."""
    made = nn.Linear(features, features, bias=False)
    with torch.no_grad():
        made.weight.fill_(value / features)
    return made


def while_called(call: Callable[[], Any], change: Callable[[int], None], changes: int, threads: int = 3) -> list[Any]:
    """What calls from several threads return or raise while the model is changed."""
    found: list[Any] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                found.append(call())
            except Exception as error:
                found.append(error)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for i in range(changes):
        change(i)
    stop.set()
    for worker in workers:
        worker.join()
    return found


def values_of(found: list[Any]) -> set[float]:
    for result in found:
        if isinstance(result, Exception):
            raise result
        assert isinstance(result, Tensor)
        assert (result == result.flatten()[0]).all()
    return {float(result.flatten()[0]) for result in found}


def test_modules_are_replaced_while_others_call() -> None:
    """In one step, by a container that holds both layers, so that no state of the model is a mixture."""
    model = nn.Sequential(nn.Sequential(layer(1), layer(1)))
    frozen, x = freeze(model), torch.ones(2, 4)

    def change(i: int) -> None:
        value = 2.0 ** (i % 8)
        model[0] = nn.Sequential(layer(value), layer(value))

    found = values_of(while_called(lambda: frozen(x), change, 1500))
    assert found <= {4.0**i for i in range(8)}
    assert torch.equal(frozen(x), freeze(model)(x))


def test_layers_of_other_sizes_and_numbers() -> None:
    """Containers that grow and shrink, so that a reading may meet half of one."""
    model = nn.Sequential(nn.Sequential(layer(2), nn.ReLU()))
    frozen, x = freeze(model), torch.ones(2, 4)

    def change(i: int) -> None:
        inner = nn.Sequential(nn.Linear(4, 1 + i % 5, bias=False), nn.ReLU(), nn.Linear(1 + i % 5, 4, bias=False))
        with torch.no_grad():
            inner.get_parameter("0.weight").fill_(0.25)
            inner.get_parameter("2.weight").fill_(2.0 / (1 + i % 5))
        if i % 3 == 0:
            inner.append(nn.Identity())
        model[0] = inner
        if i % 2:
            model.append(nn.Identity())
        else:
            del model[1:]

    found = values_of(while_called(lambda: frozen(x), change, 700))
    assert all(abs(value - 2) < 1e-6 for value in found)


def test_reading_late_does_not_bring_old_weights_back() -> None:
    """A thread that began to read before a change may end after one that began later."""
    model = nn.Sequential(layer(1), norm(4), nn.Linear(4, 4)).eval()
    frozen, x = freeze(model), torch.randn(2, 4)
    for i in range(60):

        def change(_: int, i: int = i) -> None:
            model[0] = layer(float(i))
            with torch.no_grad():
                model.get_parameter("2.weight").mul_(1.5 if i % 2 else 1 / 1.5)

        while_called(lambda: frozen(x), change, 3)
        assert torch.equal(frozen(x), freeze(model)(x))


def test_copies_are_of_one_moment() -> None:
    """Activations, sizes and weights together."""
    model = nn.Sequential(layer(1), nn.LeakyReLU(0.5))
    frozen, x = freeze(model), -torch.ones(2, 4)

    def change(i: int) -> None:
        # The product is -1 at all times.
        value = 2.0 ** (i % 6)
        slope = nn.LeakyReLU(1 / value)
        model.__dict__["_modules"] = {"0": layer(value), "1": slope}

    change(0)

    def look() -> Tensor:
        copied: FrozenMLP = pickle.loads(pickle.dumps(frozen))
        text = repr(frozen)
        assert text.startswith("FrozenMLP(4 -> 4 "), text
        return copied(x)

    assert values_of(while_called(look, change, 400)) == {-1.0}
    assert values_of(while_called(lambda: copy.deepcopy(frozen)(x), change, 400)) == {-1.0}


def test_an_error_is_the_model_s_own() -> None:
    """One that cannot be frozen for a while is refused meanwhile, and only then."""
    model = nn.Sequential(layer(1), nn.ReLU(), layer(3))
    frozen, x = freeze(model), torch.ones(2, 4)

    def change(i: int) -> None:
        model[1] = nn.LayerNorm(4) if i % 2 == 0 else nn.ReLU()

    found = while_called(lambda: frozen(x), change, 600)
    for error in found:
        if isinstance(error, Exception):
            assert type(error) is TypeError
            assert "1 (LayerNorm) cannot be part of a chain" in str(error)
    assert values_of([result for result in found if isinstance(result, Tensor)]) <= {3.0}
    model[1] = nn.ReLU()
    assert (frozen(x) == 3).all()


def test_hooks_and_modes_come_and_go() -> None:
    model = nn.Sequential(layer(1), nn.Dropout(), fastmlp.Linear(4, 4, bias=False)).eval()
    with torch.no_grad():
        model.get_parameter("2.weight").fill_(0.5)
    frozen, x = freeze(model), torch.ones(2, 4)

    def change(_: int) -> None:
        model[1].train()
        handle = model[0].register_forward_hook(lambda *_: None)
        model[1].eval()
        handle.remove()

    found = while_called(lambda: frozen(x), change, 600)
    assert values_of([result for result in found if isinstance(result, Tensor)]) <= {2.0}
    assert all("training mode" in str(e) or "has hooks" in str(e) for e in found if isinstance(e, Exception))
    assert (frozen(x) == 2).all()


@pytest.mark.parametrize("what", ["parameter", "data", "module", "nothing"])
def test_an_error_while_something_else_was_put_in(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Recording compares two executions, between which another thread may exchange anything: it is done again."""
    model = nn.Sequential(layer(1.0), nn.ReLU())
    attempts = 0

    def interrupted(given: nn.Module) -> Any:
        nonlocal attempts
        attempts += 1
        if attempts > 1:
            return chain.links(given)
        if what == "parameter":
            model[0].weight = nn.Parameter(torch.ones(4, 4))
        elif what == "data":
            model[0].weight.data = torch.ones(4, 4)
        elif what == "module":
            model[0] = layer(4.0)
        raise RuntimeError("the executions differ")

    monkeypatch.setattr(stages, "links", interrupted)
    if what == "nothing":
        with pytest.raises(RuntimeError, match="the executions differ"):
            freeze(model)
        assert attempts == 1
    else:
        assert torch.equal(freeze(model)(torch.ones(1, 4)), torch.full((1, 4), 4.0))
        assert attempts == 2

"""What a forward writes besides tensors, wherever it lies, is refused by a recording, and put back."""

import copy
import itertools
import pickle
from array import array
from collections import Counter, UserDict, deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmlp import convert, freeze
from fastmlp.trace.shadow import Shadow

SEEN: list[int] = []
CALLS: dict[str, int] = {}
STATE = SimpleNamespace(calls=0)
STEPS = 0
TABLE = np.zeros(2)


class Slotted:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class Names(list[str]):
    pass


def counting() -> Any:
    calls = 0

    def count() -> int:
        nonlocal calls
        calls += 1
        return calls

    return count


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.write()
        return self.out(torch.relu(self.fc(x)))

    def write(self) -> None:
        raise NotImplementedError


class InCounter(Net):
    def __init__(self) -> None:
        super().__init__()
        self.held: Any = Counter()

    def write(self) -> None:
        self.held["calls"] += 1

    def content(self) -> Any:
        return dict(self.held)


class InSubclass(InCounter):
    def __init__(self) -> None:
        super().__init__()
        self.held = Names()

    def write(self) -> None:
        self.held.append("call")

    def content(self) -> Any:
        return list(self.held)


class InNamespace(InCounter):
    def __init__(self) -> None:
        super().__init__()
        self.held = SimpleNamespace(calls=0, seen=deque([1]))

    def write(self) -> None:
        self.held.calls += 1
        self.held.seen.append(2)

    def content(self) -> Any:
        return self.held.calls, list(self.held.seen)


class InSlots(InCounter):
    def __init__(self) -> None:
        super().__init__()
        self.held = Slotted()

    def write(self) -> None:
        self.held.calls += 1

    def content(self) -> Any:
        return self.held.calls


class InBytes(InCounter):
    def __init__(self) -> None:
        super().__init__()
        self.held = (bytearray(1), array("d", [0]))

    def write(self) -> None:
        for numbers in self.held:
            numbers[0] += 1

    def content(self) -> Any:
        return bytes(self.held[0]), list(self.held[1])


class InIterator(InCounter):
    def __init__(self) -> None:
        super().__init__()
        self.held = itertools.count(1)

    def write(self) -> None:
        next(self.held)

    def content(self) -> Any:
        return repr(self.held)


class InClosure(InCounter):
    def __init__(self) -> None:
        super().__init__()
        self.held = counting()

    def write(self) -> None:
        self.held()

    def content(self) -> Any:
        return self.held.__closure__[0].cell_contents


class InClass(InCounter):
    calls = 0

    def write(self) -> None:
        InClass.calls += 1

    def content(self) -> Any:
        return InClass.calls


class InListOfClass(InCounter):
    seen: list[int] = []  # noqa: RUF012

    def write(self) -> None:
        self.seen.append(1)

    def content(self) -> Any:
        return list(self.seen)


class InGlobals(InCounter):
    def write(self) -> None:
        SEEN.append(1)
        CALLS["calls"] = CALLS.get("calls", 0) + 1
        STATE.calls += 1
        TABLE[0] += 1

    def content(self) -> Any:
        return list(SEEN), dict(CALLS), STATE.calls, TABLE.tolist()


class InGlobal(InCounter):
    def write(self) -> None:
        global STEPS
        STEPS += 1

    def content(self) -> Any:
        return STEPS


WRITERS = [
    (InCounter, r"it changes held.calls,"),
    (InSubclass, r"it changes held,"),
    (InNamespace, r"it changes held.calls, held.seen,"),
    (InSlots, r"it changes held.calls,"),
    (InBytes, r"it changes held\[0\], held\[1\],"),
    (InIterator, r"it changes held,"),
    (InClosure, r"it changes counting.<locals>.count.calls,"),
    (InClass, r"it changes InClass.calls,"),
    (InListOfClass, r"it changes InListOfClass.seen,"),
    (InGlobals, r"it changes tests.capture.test_trace_effects.CALLS.calls, .*SEEN, .*STATE.calls, .*TABLE,"),
    (InGlobal, r"it changes tests.capture.test_trace_effects.STEPS,"),
]


@pytest.mark.parametrize(("kind", "message"), WRITERS, ids=lambda value: getattr(value, "__name__", ""))
def test_effects_are_refused(kind: type[InCounter], message: str) -> None:
    model = kind()
    before = model.content()
    with pytest.raises(RuntimeError, match=message + " which would happen only once"):
        convert(model, trace=True)
    with pytest.raises(TypeError, match=message):
        freeze(model)
    assert model.content() == before


class Own(Net):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(x)))


class Drawing(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(2, generator=self.generator)


@pytest.mark.parametrize("kind", [Own, Drawing])
def test_a_generator_is_no_obstacle(kind: type[Own]) -> None:
    model, x = kind(), torch.randn(5, 3)
    state = model.generator.get_state()
    traced = convert(model, trace=True)
    assert torch.equal(model.generator.get_state(), state)
    expected = [model(x) for _ in range(2)]
    model.generator.set_state(state)
    torch.testing.assert_close([traced(x) for _ in range(2)], expected)


def test_copies_of_what_draws() -> None:
    traced: Any = convert(Drawing(), trace=True)
    x, duplicate = torch.randn(5, 3), copy.deepcopy(traced)
    for module in (traced, duplicate):
        module.generator.manual_seed(3)
    assert torch.equal(duplicate(x), traced(x))
    with pytest.raises(pickle.PicklingError, match=r"fastmlp: a recorded Drawing that draws .* pickle the model"):
        pickle.dumps(traced)
    assert pickle.loads(pickle.dumps(Own())) is not None


def test_a_shadow_sees_generators() -> None:
    model = Own()
    state = model.generator.get_state()
    shadow = Shadow(model)
    assert shadow.changes() == []
    torch.randn(1, generator=model.generator)
    assert shadow.changes() == ["generator"]
    assert torch.equal(model.generator.get_state(), state)


class Settings(UserDict[str, float]):
    pass


class Reading(Net):
    """What is only read is no obstacle."""

    factor = 2.0
    names = Names(["a"])

    def __init__(self) -> None:
        super().__init__()
        self.settings, self.counter, self.slotted = Settings(scale=0.5), Counter("aa"), Slotted()

    def forward(self, x: Tensor) -> Tensor:
        if STEPS < 0 or "calls" in CALLS:
            return x
        scale = self.settings["scale"] * self.counter["a"] * self.factor * len(self.names)
        return self.out(torch.relu(self.fc(x))) * scale + self.slotted.calls


def test_what_is_only_read() -> None:
    model, x = Reading(), torch.randn(5, 3)
    torch.testing.assert_close(convert(model, trace=True)(x), model(x))


def elsewhere(package: str) -> Any:
    """A function of a package that is installed, which keeps a table of what it has seen."""
    file = f"/usr/lib/python3/site-packages/{package}/__init__.py"
    names: dict[str, Any] = {"__name__": package, "__file__": file, "KINDS": {}}
    exec(compile("def kind(value):\n    return KINDS.setdefault('seen', 1)\n", file, "exec"), names)
    return names["kind"]


class Asking(Net):
    kind = staticmethod(elsewhere("einops"))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(x))) * self.kind(x)


class Installed(Asking):
    __module__ = "models.mlp"
    kind = staticmethod(elsewhere("models"))


def test_what_other_packages_keep() -> None:
    model, x = Asking(), torch.randn(5, 3)
    torch.testing.assert_close(convert(model, trace=True)(x), model(x))
    with pytest.raises(RuntimeError, match=r"it changes models.KINDS.seen, which would happen only once"):
        convert(Installed(), trace=True)

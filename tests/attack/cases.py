"""What a case is: drawn from a seed, played, counted, and told in words where it goes wrong."""

import random
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

import fastmlp
from tests.support.axes import ISAS

T = TypeVar("T")

_deterministic: Any = torch.utils.deterministic

#: What the library may raise where it does not follow.
REFUSALS = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)


class Disagreement(AssertionError):
    """The library did something else than PyTorch does."""


@dataclass
class Case:
    """A case while it is played.

    Attributes:
        surface: the part of the library that is attacked.
        seed: all that is drawn follows from it and from the surface.
        random: from which it is drawn; data comes from PyTorch's own generator.
        log: what the case consists of, in words.
        outcomes: "agreed", "refused", "torch raises too" or "beyond the bounds", how often.
        actions: what was done, how often.
    """

    surface: str
    seed: int
    random: random.Random
    log: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    actions: Counter[str] = field(default_factory=Counter)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def choice(self, options: Sequence[T]) -> T:
        return self.random.choice(options)

    def note(self, text: str) -> None:
        self.log.append(text)

    def act(self, action: str, detail: str = "") -> None:
        """Tells and counts what is done next."""
        self.actions[action] += 1
        self.log.append(f"{action}{detail and f': {detail}'}")

    def agreed(self) -> None:
        self.outcomes["agreed"] += 1

    def refused(self, error: BaseException, allowed: bool = True) -> None:
        """The library would not do what PyTorch does: allowed where something was drawn that it may refuse."""
        self.log.append(f"refused: {type(error).__name__}: {error}")
        if not str(error).startswith("fastmlp: "):
            raise Disagreement(f"not refused by name: {type(error).__name__}: {error}") from error
        if not allowed:
            raise Disagreement(f"refused, though nothing was drawn that may be: {error}") from error
        self.outcomes["refused"] += 1

    def both_raise(self, error: BaseException) -> None:
        self.log.append(f"both raise: {type(error).__name__}: {error}")
        self.outcomes["torch raises too"] += 1

    def require(self, condition: bool, what: str) -> None:
        if not condition:
            raise Disagreement(what)


#: Plays a case: draws, calls, compares; raises `Disagreement`.
Play = Callable[[Case], None]


@dataclass(frozen=True)
class Result:
    """What became of a case; `failure` is empty unless something went wrong, `log` is what it consisted of."""

    surface: str
    seed: int
    outcomes: Counter[str]
    actions: Counter[str]
    failure: str
    log: tuple[str, ...] = ()

    @property
    def replay(self) -> str:
        return f"python -m tests.attack --surface {self.surface} --seed {self.seed}"


def play(surface: str, function: Play, seed: int) -> Result:
    """Plays one case. Process-wide settings are what they were before, whatever it does."""
    case = Case(surface, seed, random.Random(f"{surface}/{seed}"))
    failure = ""
    with settings(case):
        torch.manual_seed(case.random.getrandbits(48))
        grad = torch.is_grad_enabled()
        try:
            function(case)
            case.require(torch.is_grad_enabled() == grad, "the grad mode is another than before")
        except Exception as error:
            brief = str(error) if isinstance(error, Disagreement) else traceback.format_exc(limit=-8)
            failure = f"{type(error).__name__}: {brief}"
        failure += restored()
    if failure:
        result = Result(surface, seed, case.outcomes, case.actions, "?")
        failure = "\n".join([result.replay, *(f"    {line}" for line in case.log), f"  {failure}"])
    return Result(surface, seed, case.outcomes, case.actions, failure, tuple(case.log))


#: What torch.fx replaces while it records, for all threads.
_METHODS = {name: getattr(torch.nn.Module, name) for name in ("__call__", "__getattr__")}


def restored() -> str:
    """Puts back what was left replaced, so that later cases are not those who tell of it, and says so."""
    left = [name for name, method in _METHODS.items() if getattr(torch.nn.Module, name) is not method]
    for name in left:
        setattr(torch.nn.Module, name, _METHODS[name])
    return "".join(f"Disagreement: torch.nn.Module.{name} is replaced for ever" for name in left)


@contextmanager
def settings(case: Case) -> Iterator[None]:
    """Draws an instruction set, a number of threads and whether fresh memory is filled with NaN; restores all."""
    isa, threads = fastmlp.get_isa(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    filled = _deterministic.fill_uninitialized_memory
    drawn, poisoned = case.choice(ISAS), case.chance(0.5)
    fastmlp.set_isa(drawn)
    torch.set_num_threads(1 if case.chance(0.85) else 2)
    torch.use_deterministic_algorithms(poisoned)
    _deterministic.fill_uninitialized_memory = poisoned
    # As the tests have it: oneDNN's gelu of float32 gives NaN at infinity.
    torch._C._set_mkldnn_enabled(False)
    case.note(f"isa {drawn}, {torch.get_num_threads()} threads, fresh memory {'NaN' if poisoned else 'as it is'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch._C._set_mkldnn_enabled(True)
        _deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(threads)
        fastmlp.set_isa(isa)


def attempt(call: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What a call gives, or what it raises."""
    try:
        return call(), None
    except Exception as error:
        return None, error

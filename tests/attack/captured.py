"""fastmlp.capture: programs drawn as source text, captured, beside the same text run by PyTorch alone.

The same bits, or near with fusion.
"""

import random
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastmlp
from tests.attack import between, functions
from tests.attack.cases import Case, Disagreement, attempt
from tests.attack.shorter import shortest
from tests.attack.twins import Twin, described, differing, frozen, generators, parts_of, set_generators, told
from tests.support.rounding import PROBES, Rounding, distance

#: What an error must begin with.
PREFIX = "fastmlp: capture: "


#: Calls after which something must have been replayed.
ENOUGH = 5


@dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
        failure: what went wrong; empty if nothing did. Its first word is the kind.
        raised: what PyTorch raised alone, so that the program has ended.
        refused: the `fastmlp.CaptureError` that ended the program.
        calls: how many there were that agreed.
        replays: how many of them were replayed.
    """

    failure: str = ""
    raised: Exception | None = None
    refused: Exception | None = None
    calls: int = 0
    replays: int = 0


def play(case: Case) -> None:
    fuse = case.chance(0.5)
    draft = functions.draw(case, fuse)
    between.draw(draft)
    draft.otherwise = "eager" if draft.reasons and case.chance(0.25) else None
    source = draft.source()
    case.act(f"fuse={fuse}, otherwise={draft.otherwise}")
    case.note(f"may be refused: {', '.join(draft.reasons) or 'no'}")
    for line in source.splitlines():
        case.note(line)

    def judge(text: str) -> Verdict:
        return judged(text, case.seed, fuse, bool(draft.reasons), draft.otherwise)

    verdict = judge(source)
    if verdict.failure:
        short = shortest(source, lambda text: same(verdict, judge(text)))
        raise Disagreement(f"{verdict.failure}\nThe shortest program that was found:\n\n{short}")
    case.note(f"{verdict.calls} calls agree, {verdict.replays} of them are replays")
    if verdict.calls:
        case.agreed()
    if verdict.raised is not None:
        case.both_raise(verdict.raised)
    if verdict.refused is not None:
        case.actions[f"refused: {reason_of(verdict.refused)}"] += 1
        case.refused(verdict.refused)
    if not draft.reasons and verdict.raised is None:
        case.outcomes["plain"] += 1
    case.outcomes["replayed"] += verdict.replays > 0


def same(first: Verdict, other: Verdict) -> bool:
    """Whether two failures are of one kind."""
    return bool(other.failure) and other.failure.split()[0] == first.failure.split()[0]


def reason_of(error: Exception) -> str:
    """The beginning of an error's text, without names and numbers that the program has drawn."""
    text = str(error).removeprefix(PREFIX).partition(": ")[2].splitlines()[0]
    text = re.sub(r"^in \S+:\d+: ", "", text)
    return " ".join(re.sub(r"[\"'`(].*", "", text).split()[:8])


def judged(source: str, seed: int, fuse: bool, refusable: bool, otherwise: str | None = None) -> Verdict:
    """Runs a program captured and by PyTorch alone, and compares both after each call.

    Args:
        source: the text.
        seed: names the file in which it lies while it runs.
        fuse: as `fastmlp.capture` has it. Then the other side is run some times more, with results that are moved as
            far as rounding may move them, and the two may differ as far as those.
        refusable: whether the program has something that a tape may say that it cannot follow.
        otherwise: as `fastmlp.capture` has it. With "eager" nothing may be raised that PyTorch does not raise.
    """
    outside = generators()
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"capture_{seed}.py"
            path.write_text(source)
            return Trial(source, path, fuse, refusable, otherwise).verdict()
    finally:
        set_generators(outside)


class Trial:
    """A captured program and its twins."""

    def __init__(self, source: str, path: Path, fuse: bool, refusable: bool, otherwise: str | None) -> None:
        self.path, self.refusable, self.fuse, self.otherwise = path, refusable, fuse, otherwise
        self.captures: list[Any] = []
        self.shared: set[tuple[int, str]] = set()  # what of an earlier result PyTorch has written over, by its call
        self.ours = Twin(source, path, self.capture)
        self.theirs = Twin(source, path, plain)
        self.moved = [Twin(source, path, moving(probe)) for probe in range(PROBES)] if fuse else []

    def capture(self, function: Callable[..., Any]) -> Any:
        made = fastmlp.capture(function, fuse=self.fuse, otherwise=self.otherwise)
        self.captures.append(made)
        return made

    @property
    def replays(self) -> int:
        """Of all that was captured: an object whose method is captured has recordings of its own."""
        owners = [value for value in self.ours.namespace.values() if hasattr(value, "__dict__")]
        methods = [own for owner in owners for own in vars(owner).values() if type(own) in map(type, self.captures)]
        made = {id(one): one for one in [*self.captures, *methods]}
        return sum(one.replays for one in made.values())

    def verdict(self) -> Verdict:
        _, error = attempt(self.theirs.start)
        if error is not None:
            return Verdict(raised=error)
        _, error = attempt(self.ours.start)
        if error is not None:
            return Verdict(f"started: PyTorch does not raise: {type(error).__name__}: {error}")
        for twin in self.moved:
            twin.start()
        calls = 0
        while True:
            _, error = attempt(self.theirs.call)
            if isinstance(error, StopIteration):
                break
            _, our_error = attempt(self.ours.call)
            if error is not None and our_error is None:
                return Verdict(f"silent: call {calls} gives a result, PyTorch raises {type(error).__name__}: {error}")
            if error is not None:
                return Verdict(raised=error, calls=calls, replays=self.replays)
            if our_error is not None:
                return self.refusal(our_error, calls)
            if any(attempt(twin.call)[1] is not None for twin in self.moved):
                self.moved = []
                return Verdict(calls=calls, replays=self.replays)
            if wrong := self.wrong():
                return Verdict(f"{wrong}, after call {calls} of which {self.replays} were replays")
            calls += 1
        if not self.refusable and not self.replays and self.captures and calls > ENOUGH:
            return Verdict(f"unreplayed: none of {calls} calls was a replay")
        return Verdict(calls=calls, replays=self.replays)

    def refusal(self, error: Exception, calls: int) -> Verdict:
        """What an error is that only the captured program raises."""
        text = f"{type(error).__name__}: {error}"
        if not isinstance(error, fastmlp.CaptureError) or self.otherwise == "eager":
            return Verdict(f"raised: call {calls}, PyTorch does not raise: {text}")
        if not str(error).startswith(PREFIX):
            return Verdict(f"unnamed: the error does not begin with {PREFIX!r}: {text}")
        if not re.search(rf"{self.path.name}\D{{1,12}}\d+|argument", str(error)):
            return Verdict(f"unplaced: the error names no line of {self.path.name} and no argument: {text}")
        if not self.refusable:
            return Verdict(f"refused: call {calls}, though nothing was drawn that may be: {text}")
        return Verdict(refused=error, calls=calls, replays=self.replays)

    def wrong(self) -> str:
        """What differs after a call, in words; empty if nothing does."""
        state, their_state = self.ours.state(), self.theirs.state()
        now, their_now = parts_of(self.ours.results[-1][0]), parts_of(self.theirs.results[-1][0])
        state, their_state = {**now, **state}, {**their_now, **their_state}
        different = differing(state, their_state)
        if self.moved:
            moved = [{**parts_of(twin.results[-1][0]), **twin.state()} for twin in self.moved]
            different = [name for name in different if not explained(name, state, their_state, moved)]
        if different:
            text = "; ".join(described(name, state, their_state) for name in different[:4])
            kind = "result" if different[0].startswith("result") else "state"
            return f"{kind}: {text} ({len(different)} of {len(their_state)} differ)"
        return self.changed_later()

    def changed_later(self) -> str:
        """What was handed out stays what it is, or becomes what PyTorch's becomes, which may share memory."""
        earlier = zip(self.ours.results[:-1], self.theirs.results[:-1], strict=True)
        for call, ((result, kept), (their_result, their_kept)) in enumerate(earlier):
            now, theirs = told(result), told(their_result)
            for name, was in kept.items():
                # It may come back to what it was, as a gradient that is clipped does.
                if theirs[name] != their_kept[name]:
                    self.shared.add((call, name))
                follows = (call, name) in self.shared and (now[name] == theirs[name] or bool(self.moved))
                if now[name] != was and not follows:
                    return f"changed: {name} of call {call} has become something else"
        return ""


def explained(name: str, ours: dict[str, Any], theirs: dict[str, Any], moved: list[dict[str, Any]]) -> bool:
    """Whether rounding explains that two tensors differ: some run that was moved differs by half as much."""
    here, there = ours.get(name), theirs.get(name)
    others = [other.get(name) for other in moved]
    if not all(isinstance(x, torch.Tensor) for x in (here, there, *others)):
        return False
    assert isinstance(here, torch.Tensor)
    assert isinstance(there, torch.Tensor)
    if here.shape != there.shape or here.dtype != there.dtype or not there.is_floating_point():
        return any(frozen(here) == frozen(other) for other in others)
    if not there.isfinite().all():
        return bool((here.isfinite() == there.isfinite()).all())
    with torch.no_grad():
        if not all(other.isfinite().all() for other in others if isinstance(other, torch.Tensor)):
            return True  # rounding alone takes the program out of range
        # What would be zero without rounding has no spread of its own: the error of sums of all there is bounds it.
        floating = [x for x in theirs.values() if isinstance(x, torch.Tensor) and x.dtype == there.dtype]
        elements = sum(x.numel() for x in floating)
        largest = max((x.nan_to_num(0, 0, 0).abs().max().item() for x in floating if x.numel()), default=0.0)
        noise = elements * torch.finfo(there.dtype).eps * largest
        bound = max(2 * distance(other, there).item() for other in others if isinstance(other, torch.Tensor))
        return bool(distance(here, there) <= bound + noise)


class plain:
    """What `captured` is for PyTorch alone: the function, which has a `reset` too."""

    def __new__(cls, function: Callable[..., Any]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        call.reset = lambda: None  # type: ignore[attr-defined]
        return call


def moving(probe: int) -> Callable[[Callable[..., Any]], Any]:
    """What `captured` is for a twin whose roundings are moved."""

    def decorate(function: Callable[..., Any]) -> Any:
        mode = Rounding(probe, steps=True)

        def call(*args: Any, **kwargs: Any) -> Any:
            with mode:
                return function(*args, **kwargs)

        return plain(call)

    return decorate

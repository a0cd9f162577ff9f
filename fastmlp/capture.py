"""Any training step, recorded once and replayed in C++: `capture`."""

import copy
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Generic, ParamSpec, TypeVar, overload

import torch
from torch import Tensor

from fastmlp._errors import described
from fastmlp._load import _C
from fastmlp.tape import graphable, graphs
from fastmlp.tape.active import is_recording
from fastmlp.tape.lower import Lowered, lower
from fastmlp.tape.recorder import Recorder
from fastmlp.tape.report import Report, TapeReport
from fastmlp.tape.seen import Seen, Watched
from fastmlp.tape.trace import CaptureError, Trace, difference

__all__ = ["CaptureError", "Captured", "capture"]

P = ParamSpec("P")
R = TypeVar("R")

_NOTHING = object()
#: Signatures that are remembered without a tape: more than there are tapes, and few enough to look through.
_PENDING = 32
#: Graphs that are kept.
_GRAPHS = 8
#: Tapes that `_C.Recordings` keeps.
_KEPT = 32
#: Recordings in a row without a replay after which something changes at every call.
_RECORDINGS = 64


@dataclass
class _Pending:
    """A signature that has no tape yet: its executions so far, the last one last."""

    signature: Any
    args: tuple[Any, ...]  # alive, because the signature borrows what is in them
    kwargs: dict[str, Any]
    devices: list[torch.device]  # of its tensors
    traces: list[Trace] = field(default_factory=list)
    seen: Seen | None = None
    after: Watched | None = None  # how the last one left what the function reads
    unequal: int = 0

    def last(self, trace: Trace) -> Trace | None:
        """The last execution that began in the same state as this one."""
        same = [other for other in self.traces if other is not trace and other.state() == trace.state()]
        return same[-1] if same else None


def _refusal(name: str, reason: str) -> CaptureError:
    return CaptureError(f"fastmlp: capture: {name}: {reason}")


def _place_of(function: Any) -> str:
    """Where a function is written, if it is one of the program."""
    code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
    return "the program" if code is None else f"{code.co_filename}:{code.co_firstlineno}"


def _held(trace: Trace) -> list[Tensor]:
    """The tensors that a recording uses where it found them."""
    return [
        memory.tensor
        for memory in trace.memories
        if memory.source[0] in ("unseen", "argument") and memory.tensor is not None
    ]


class Captured(Generic[P, R]):
    """What `capture` returns: call it as the function.

    Attributes:
        calls: how often it was called.
        replays: how many of these calls were replays.
        refused: why the last call that could not be recorded ran as it is; None if there was none, or it raised.
    """

    refused: str | None

    def __init__(self, function: Callable[P, R], fuse: bool, otherwise: str | None) -> None:
        functools.update_wrapper(self, function, updated=())
        self._function = function
        self._fuse = fuse
        self._otherwise = otherwise
        self._name = getattr(function, "__qualname__", type(function).__name__)
        self._lock = threading.RLock()
        self.reset()

    def reset(self) -> None:
        """Forgets all recordings: the next two calls are recorded again."""
        with self._lock:
            self._recordings = _C.Recordings()
            self._pending: list[_Pending] = []
            self._eager: list[Any] = []
            self._is_eager = False
            self._warned = False
            self.refused = None
            self._recordings.alive = {}
            self._tapes: dict[int, Lowered] = {}
            self._graphs: list[graphs.Graph] = []
            self._alive: list[Any] = []
            self._leaves: dict[int, Tensor] = {}
            self._recorded = 0
            self._unreplayed = 0
            self._replays_then = 0

    @property
    def calls(self) -> int:
        """How often the function was called."""
        return self._recorded + self.replays

    @property
    def replays(self) -> int:
        """How many of the calls were replays."""
        return self._recordings.replays + sum(graph.replays for graph in self._graphs)

    def report(self, *, profile: bool = False) -> Report:
        """What was recorded: for each tape its operations, what became of them, and memory in bytes.

        Args:
            profile: also tell what share of the time each kind of step has, and which places of the program take the
                most. One replay in 64 of each tape is measured for that, the ninth first; a tape without one yet, and a
                graph of a GPU, tell no times.
        """
        tapes = [TapeReport.of(lowered, profile) for lowered in self._tapes.values()]
        tapes += [graph.report for graph in self._graphs]
        return Report(self._name, self.calls, self.replays, tapes)

    def __repr__(self) -> str:
        return self.report().line()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """As the function."""
        result = self._recordings.replay(args, kwargs, _NOTHING)
        return self._record(args, kwargs) if result is _NOTHING else result

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        """As a method: each object has recordings of its own."""
        if owner is None:
            return self
        name = f"_captured_{self._function.__name__}"
        attributes = getattr(owner, "__dict__", None)
        if attributes is None:
            raise TypeError(
                f"fastmlp: capture: {self._name}: objects of {type(owner).__name__} have __slots__ and no __dict__ to "
                "keep recordings in: add '__dict__' to the slots, or capture a function that gets the object"
            )
        own = attributes.get(name)
        if own is None:
            own = Captured(MethodType(self._function, owner), self._fuse, self._otherwise)
            if isinstance(owner, type):
                type.__setattr__(owner, name, own)
            else:
                attributes[name] = own
        return own

    def __deepcopy__(self, memo: dict[int, Any]) -> "Captured[P, R]":
        return Captured(copy.deepcopy(self._function, memo), self._fuse, self._otherwise)

    def __reduce__(self) -> tuple[Any, ...]:
        return Captured, (self._function, self._fuse, self._otherwise)

    # Recording.

    def _record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        if is_recording():
            # Within another captured function it is a part of that one.
            return self._function(*args, **kwargs)
        with self._lock:
            signature = _C.Signature(args, kwargs)
            devices = [tensor.device for tensor in signature.tensors]
            graph = next((graph for graph in self._graphs if graph.matches(args, kwargs, devices)), None)
            if graph is not None:
                return self._replay_graph(graph, signature.tensors, args, kwargs)
            self._recorded += 1
            if self._is_eager or any(eager.matches(args, kwargs) for eager, _ in self._eager):
                return self._function(*args, **kwargs)
            why = self._arguments_forbid(signature) or self._recordings_forbid()
            if why is not None:
                self._give_up(why)
                return self._function(*args, **kwargs)
            alike = (one for one in self._pending if one.devices == devices and one.signature.matches(args, kwargs))
            pending = next(alike, None)
            if pending is None:
                pending = _Pending(signature, args, kwargs, devices)
                self._pending = [pending, *self._pending[: _PENDING - 1]]
            return self._run(pending, signature, args, kwargs)

    def _recordings_forbid(self) -> str | None:
        """Why nothing is recorded any more, where recordings never become replays."""
        if self.replays != self._replays_then:
            self._replays_then, self._unreplayed = self.replays, 0
        self._unreplayed += 1
        if self._unreplayed <= _RECORDINGS:
            return None
        self._is_eager = self._otherwise == "eager"
        return (
            f"the last {_RECORDINGS} calls were recorded and none could be replayed, because each one has shapes or "
            f"plain arguments that none of the {_KEPT} before has, or finds something changed: pad batches to one of a "
            "few sizes, give numbers that change as tensors, and call reset() after changing the model"
        )

    def _arguments_forbid(self, signature: Any) -> str | None:
        """Why a call with these arguments, or from where it comes, is not recorded."""
        if not _C.no_mode_is_active():
            return (
                "it was called within a mode or transform of torch (torch.func, a dispatch mode, a tracer), which "
                "would not see its operations: call the function itself there"
            )
        for tensor in signature.tensors:
            if tensor.requires_grad and tensor.grad_fn is not None:
                return (
                    f"an argument, {described(tensor)}, was computed outside and requires a gradient, which would end "
                    "at the captured function: pass argument.detach(), or compute it inside"
                )
            if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
                return (
                    f"an argument, {described(tensor)}, has hooks, which belong to one tensor and not to all that look "
                    "alike: do in the function what they do"
                )
        for value in signature.objects:
            if type(value).__module__.partition(".")[0] == "numpy":
                return f"an argument is {described(value)} of NumPy: pass torch.from_numpy(argument)"
        return None

    def _run(self, pending: _Pending, signature: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        if pending.after is not None and pending.after.changed() is not None:
            # Somebody has changed what the function reads, so that earlier executions are of another program.
            pending.traces, pending.unequal = [], 0
        leaves = self._leaves | {id(leaf): leaf for leaf in (pending.seen.leaves() if pending.seen else [])}
        before = pending.seen.watch([], within=True) if pending.seen else None
        recorder = Recorder(self._name, signature.tensors, leaves.values(), self._otherwise == "eager")
        with graphs.warmup(), recorder:
            result = self._function(*args, **kwargs)
        returned = _C.Signature((result,), {})
        recorder.finish(returned.tensors, returned, _place_of(self._function))
        # They would keep the memory of this call.
        for each in (signature, returned):
            each.forget_tensors()
        recorder.seen.function(self._function)
        for value in signature.objects:
            recorder.seen.argument(value)
        why = recorder.refused or self._used_up(returned.objects) or self._changed_within(before)
        why = why or graphable.obstacle(recorder.trace)
        if why is None:
            last = pending.last(recorder.trace)
            unlike = None if last is None else self._unlike(last, recorder.trace, result)
            # The first call may have made state that all later ones find.
            why = unlike if pending.unequal else None
            pending.unequal += unlike is not None
        if why is None:
            self._take(pending, recorder, signature, last is not None and unlike is None)
        self._leaves |= {id(leaf): leaf for leaf in recorder.gradients.leaves()}
        if why is not None:
            self._give_up(why, 5)
            self._eager = [(signature, signature.borrowed), *self._eager[: _PENDING - 1]]
        return result

    def _give_up(self, why: str, depth: int = 4) -> None:
        """Raises, or warns once where the caller's frame is `depth` frames above this one's `warn`."""
        if self._otherwise is None:
            raise _refusal(self._name, why)
        self.refused = why
        if not self._warned:
            self._warned = True
            text = f"{_refusal(self._name, why)}. It runs as it is, not captured"
            warnings.warn(text, RuntimeWarning, stacklevel=depth)

    def _used_up(self, objects: list[Any]) -> str | None:
        """Why what the call returned cannot be returned again."""
        for value in objects:
            if isinstance(value, Iterator):
                return (
                    f"it returned {described(value)}, which can be gone through once, and a replay does not run "
                    f"Python: return a list or a tuple, in {_place_of(self._function)}"
                )
        return None

    def _changed_within(self, before: Watched | None) -> str | None:
        """Why the call cannot be replayed, if it changed variables of Python that it reads."""
        name = None if before is None else before.changed()
        if name is None:
            return None
        return (
            f"{name} changes within the captured function, and a replay does not run Python: change it outside of the "
            f"function, in {_place_of(self._function)}"
        )

    def _unlike(self, last: Trace, trace: Trace, result: Any) -> str | None:
        """What this execution did otherwise than the last one, or None."""
        if last.returned.matches((result,), {}):
            return difference(last, trace)
        return difference(last, trace) or (
            f"it returned another form or other numbers than in the call before, now {described(result)}: return "
            "tensors, and numbers that stay as they are, in tuples, lists or dictionaries, in "
            f"{_place_of(self._function)}"
        )

    def _replay_graph(
        self, graph: graphs.Graph, tensors: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> R:
        why = None if graph.is_captured else graph.capture(tensors, args, kwargs)
        if why is None:
            return graph.replay(tensors)
        self._graphs.remove(graph)
        self._recorded += 1
        signature = _C.Signature(args, kwargs)
        signature.forget_tensors()
        self._give_up(why, 5)
        self._eager = [(signature, signature.borrowed), *self._eager[: _PENDING - 1]]
        return self._function(*args, **kwargs)

    def _take(self, pending: _Pending, recorder: Recorder, signature: Any, same: bool) -> None:
        """Makes a tape if this execution is as the last one, and remembers it otherwise."""
        trace = recorder.trace
        seen, pending.seen = pending.seen, recorder.seen
        pending.traces = [*pending.traces[-3:], trace]
        pending.after = recorder.seen.watch(_held(trace), within=False)
        if not same or seen is None:
            return
        if graphable.is_of_gpu(trace):
            watched = recorder.seen.both(seen).watch(_held(trace), within=False, steps=True)
            graph = graphs.Graph(self._function, trace, signature, pending.devices, watched)
            self._alive.append((signature.borrowed, trace.returned.borrowed))
            self._graphs = [graph, *self._graphs[: _GRAPHS - 1]]
            self._pending.remove(pending)
            return
        lowered = lower(trace, self._fuse)
        watched = recorder.seen.both(seen).watch(_held(trace), within=False)
        # What the function reads by a variable too would be taken from the argument, which may be another one then.
        arguments = [m.tensor for m in trace.memories if m.source[0] == "argument" and m.tensor is not None]
        signature.pin([tensor for tensor in arguments if id(tensor) in watched.values])
        number = self._recordings.add(lowered.tape, signature, trace.returned, watched.watch, lowered.stops)
        alive = watched, signature.borrowed, trace.returned.borrowed, lowered.stops
        kept = self._recordings.ids()
        self._recordings.alive = {i: one for i, one in {**self._recordings.alive, number: alive}.items() if i in kept}
        self._tapes = {i: one for i, one in {**self._tapes, number: lowered}.items() if i in kept}
        lowered.forget()
        self._pending.remove(pending)
        if number == 2 * _KEPT:
            warnings.warn(
                f"fastmlp: capture: {self._name}: {number} tapes were made, and {_KEPT} are kept: a call of a kind "
                "that was dropped is recorded again, which takes far longer than running it; pad batches to one of a "
                "few sizes, and change tensors in place rather than what the function reads",
                RuntimeWarning,
                stacklevel=5,
            )


@overload
def capture(function: Callable[P, R], *, fuse: bool = True, otherwise: str | None = None) -> Captured[P, R]: ...
@overload
def capture(
    function: None = None, *, fuse: bool = True, otherwise: str | None = None
) -> Callable[[Callable[P, R]], Captured[P, R]]: ...
def capture(function: Any = None, *, fuse: bool = True, otherwise: str | None = None) -> Any:
    """Records a training step, or any function of tensors, once, and replays it in C++ from then on.

    The first two calls with arguments of the same shapes run as they are and are recorded: forward, backward, in-place
    updates. If both did the same, later calls replay the recording, without Python or autograd between the operations,
    in memory that is planned once. Each call does its work exactly once, so a loop computes what it computes without
    `capture`: with `fuse=False` the same bits, with `fuse=True` within rounding. Random numbers come from the same
    generators in the same order, schedulers that step outside work, and `optimizer.state` and checkpoints are the
    same.

    **What a replay does not do, and does not notice.** It does not run Python: prints, files and whatever else the
    function does besides operations on tensors happens while it is recorded only; variables and lists that it changes
    itself are refused. It notices before it runs, and records again, when there are other shapes, dtypes or plain
    values among the arguments, other modes of torch (grad mode, autocast), other flags, numbers, parameters, children
    or hooks of modules, other members of optimizers, other memory of tensors, other numbers, lists, objects or tensors
    among the variables and attributes that the program's own functions name. It does not notice a change within what
    it cannot see through: entries of containers of more than 64, of sets and deques (how many there are it does see),
    arrays of NumPy, attributes that are new or whose names are computed, methods replaced on a class, files, the clock.
    What such a thing decides has to be an argument.

    **What cannot be recorded raises** `CaptureError` with the line of the program: reading elements (`item()`, an `if`
    on a tensor, NumPy), shapes that depend on data, two recordings that differ, as by a branch or a number that
    changes. Seeding generators and stepping schedulers belong outside.

    Gradients are left in `.grad`, as by the function; a replay writes their memory again unless somebody else holds it.
    Results are new tensors; one that required a gradient does so again, but its graph ends there with an error. Two
    threads may replay two captured functions at once; of one function they replay one after the other.

    **On a GPU**, where this has not been run yet, a CUDA graph takes the place of the tape, made at the third call.
    Numbers and states of optimizers are part of it, so that a changed one is another recording. Optimizers other than
    SGD need `capturable=True`, and a learning rate that changes often has to be a tensor. Gradients stay in the same
    memory, arguments may not be written, and `fuse` means nothing.

    Args:
        function: what to record. It gets tensors, all on the CPU or all on one GPU, and plain values, in nested tuples,
            lists and dictionaries, and returns such. It may use any modules, losses and optimizers. With a method, each
            object has recordings of its own.
        fuse: whether kernels of fastmlp compute what they can: products with bias and ReLU, and runs of elementwise
            operations with the sums at their ends, in one pass over memory, in all four dtypes; layer and batch
            normalisation, softmax of up to 15 columns (7 without AVX-512), losses of classes, lookups by indices and
            masks of dropout, in float32 and float64. The steps of `torch.optim.SGD`, `Adam`, `AdamW` and `RMSprop` are
            then those of `fastmlp.optim`, which read groups and states at each call. Everything else is computed by
            torch's kernels, and other optimizers by their own `step()`.
        otherwise: "eager" to run a function that cannot be recorded as it is, with one RuntimeWarning, instead of
            raising.

    Returns:
        A `Captured`, to be called as the function. Without `function`, a decorator.

    Raises:
        TypeError: `function` is not callable.
        ValueError: `otherwise` is something else.
        CaptureError: by a call, for what cannot be recorded.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> @capture
        ... def step(input, target):
        ...     optimizer.zero_grad()
        ...     loss = (model(input) - target).abs().mean()
        ...     loss.backward()
        ...     torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        ...     optimizer.step()
        ...     return loss
        >>> for _ in range(10):
        ...     loss = step(torch.ones(8, 3), torch.zeros(8, 1))
        >>> step
        captured(step): 1 tape, 8 of 10 calls replayed
    """
    if otherwise not in (None, "eager"):
        raise ValueError(f"fastmlp: capture: otherwise must be None or 'eager', got {described(otherwise)}")
    if function is None:
        return functools.partial(capture, fuse=fuse, otherwise=otherwise)
    if not callable(function):
        raise TypeError(f"fastmlp: capture: function must be callable, got {described(function)}")
    return Captured(function, fuse, otherwise)

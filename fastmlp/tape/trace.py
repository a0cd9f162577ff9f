"""What a recorder writes down: the operations of one execution, and the tensors and pieces of memory that they use.

Two executions of a program that does the same thing have equal traces; `difference` says where they part.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "CaptureError",
    "Check",
    "GradSet",
    "Memory",
    "Node",
    "Operation",
    "OptimizerStep",
    "Output",
    "Ref",
    "Run",
    "Trace",
    "Value",
    "arguments_of",
    "counts_writes",
    "difference",
    "refs",
    "written_arguments",
]


class CaptureError(RuntimeError):
    """What a captured function does cannot be recorded, or is not the same from call to call.

    The message says what, in which line of the program, and what to write instead.
    """


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands for a tensor among recorded arguments: the number of its value."""

    value: int


@dataclass(slots=True)
class Memory:
    """A piece of memory.

    Attributes:
        source: ("new",) if an operation made it; ("argument", i) for a tensor of the call; ("grad", value) for the
            gradient that a leaf had when the call began; ("constant",) for numbers of Python; ("unseen",) for a tensor
            that was there before.
        bytes: its size.
        tensor: for "unseen" the tensor; for "constant" a copy of it.
        place: where the program used it first.
        written: whether an operation writes there.
        device: where it is.
        counted: whether torch counts what is written as a change of the tensor's version, which it does where the
            operation says that it writes.
    """

    source: tuple[Any, ...]
    bytes: int
    tensor: Tensor | None
    place: str
    written: bool = False
    device: str = "cpu"
    counted: bool = False


@dataclass(slots=True)
class Value:
    """A tensor: how it lies in its memory. `offset` is in elements."""

    memory: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass(slots=True)
class Operation:
    """A call of an operator. `outputs` are numbers of values, None for what is undefined."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[int | None]
    place: str


@dataclass(slots=True)
class GradSet:
    """From here on the `.grad` of a leaf is another tensor, or none."""

    leaf: int
    value: int | None
    place: str


@dataclass(slots=True)
class OptimizerStep:
    """A call of `optimizer.step()`."""

    optimizer: torch.optim.Optimizer
    place: str


@dataclass(slots=True)
class Check:
    """A number that torch's own code looked at, to raise an error unless it is as expected."""

    value: int
    expected: float
    place: str


@dataclass(slots=True)
class Output:
    """What a run writes: a register, into a value of so many dimensions of a space, reduced or not."""

    value: int
    space: tuple[int, ...]
    register: int
    how: str
    reduced: tuple[int, ...]
    scale: float


@dataclass(slots=True)
class Run:
    """An event of a trace: several elementwise operations at once.

    Registers are numbered: first inputs, then what each instruction makes.

    Attributes:
        sizes: of the space, without dimensions of one element.
        inputs: values, and the spaces that they are broadcast to.
        instructions: name, registers, scalars.
        outputs: what is written.
        place: where the program called the first of them.
    """

    sizes: tuple[int, ...]
    inputs: list[tuple[int, tuple[int, ...]]]
    instructions: list[tuple[str, list[int], list[float]]]
    outputs: list[Output]
    place: str


@dataclass(slots=True)
class Node:
    """An event of a trace: operations that a kernel of ours does, whole.

    Attributes:
        method: of `_C.Tape`, which adds it.
        args: of the method, with values as references.
        writes: the values that it makes.
        place: where the program called the first operation.
        draws: whether it draws random numbers.
        optional: whether it can do without any of what it makes.
        raises: whether what it reads may make it raise an error.
    """

    method: str
    args: tuple[Any, ...]
    writes: list[int]
    place: str
    draws: bool = False
    optional: bool = False
    raises: bool = False


Event = Operation | GradSet | OptimizerStep | Check | Run | Node


@dataclass(slots=True)
class Trace:
    """One execution of a function.

    Attributes:
        starts_without_grad: memories of leaves whose `.grad` was None, and was not set to None by the function before
            it became a tensor.
        cleared: leaves whose `.grad` the function set to None before anything else happened to it. That is no event,
            because `zero_grad()` passes over what is None already, as in a first call.
        looked: by identity, leaves whose `.grad` the program looked at before anything happened to it, and whether they
            had one.
        results: values of the tensors that were returned, in order, and of each whether it requires a gradient,
            and whether it was made under inference_mode.
        returned: the form of what was returned, a `_C.Signature`.
        end: where the function is written.
        alone: whether nodes have to compute all of it, because nothing calls torch's operators beside them.
    """

    memories: list[Memory] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    starts_without_grad: set[int] = field(default_factory=set)
    cleared: list[Tensor] = field(default_factory=list)
    looked: dict[int, tuple[Tensor, bool]] = field(default_factory=dict)
    results: list[tuple[int, bool, bool]] = field(default_factory=list)
    returned: Any = None
    end: str = ""
    alone: bool = False

    def state(self) -> tuple[Any, ...]:
        """What has to be so when the call begins, and decides between several traces of one signature."""
        tensors = [memory.tensor for memory in self.memories]
        places = {id(tensor): i for i, tensor in enumerate(tensors) if self.memories[i].source[0] == "argument"}
        leaves = {id(tensors[i]) for i in self.starts_without_grad} | {id(leaf) for leaf in self.cleared}
        looked = {key for key, (_, has) in self.looked.items() if has and key not in leaves}
        leaves |= {key for key, (_, has) in self.looked.items() if not has}
        grads = sorted(memory.source[1] for memory in self.memories if memory.source[0] == "grad")
        return sorted(places.get(key, key) for key in leaves), sorted(places.get(key, key) for key in looked), grads

    def refs(self, event: Event) -> Iterator[int]:
        """The numbers of all values that an event reads, writes or makes."""
        if isinstance(event, Operation):
            yield from refs((event.args, event.kwargs))
            yield from (output for output in event.outputs if output is not None)
        elif isinstance(event, GradSet):
            yield event.leaf
            if event.value is not None:
                yield event.value
        elif isinstance(event, Check):
            yield event.value
        elif isinstance(event, Run):
            yield from (value for value, _ in event.inputs)
            yield from (output.value for output in event.outputs)
        elif isinstance(event, Node):
            yield from refs(event.args)


def refs(value: Any) -> Iterator[int]:
    """The numbers of the values among recorded arguments."""
    found: list[int] = []
    _find_refs((value,), found)
    return iter(found)


def _find_refs(values: Iterable[Any], found: list[int]) -> None:
    for value in values:
        if isinstance(value, Ref):
            found.append(value.value)
        elif isinstance(value, (tuple, list)):
            _find_refs(value, found)
        elif isinstance(value, dict):
            _find_refs(value.values(), found)


#: Operators that write to arguments without saying so in their schemas, those arguments, and the one that tells whether
#: they do.
_WRITES_UNSAID = {"aten::native_batch_norm": ((3, 4), 5)}


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """The arguments that an operator writes, by position and name."""
    schema = func._schema
    unsaid, _ = _WRITES_UNSAID.get(schema.name, ((), None))
    return tuple(
        (i, argument.name)
        for i, argument in enumerate(schema.arguments)
        if i in unsaid or (argument.alias_info is not None and argument.alias_info.is_write)
    )


def written_arguments(operation: Operation) -> Iterator[int]:
    """The numbers of the values among an operation's arguments that it writes."""
    args = operation.args
    unsaid = _WRITES_UNSAID.get(operation.func._schema.name)
    if unsaid is not None and not args[unsaid[1]]:
        return
    for i, name in _written(operation.func):
        yield from refs(args[i] if i < len(args) else operation.kwargs.get(name))


def counts_writes(operation: Operation) -> bool:
    """Whether torch counts what an operation writes as changes of those tensors' versions."""
    return operation.func._schema.name not in _WRITES_UNSAID


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Ref):
        return bool(a.value == b.value)
    if isinstance(a, float):
        return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (a != a and b != b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(_equal, a.values(), b.values()))
    if isinstance(a, torch.Generator):
        return a._cdata == b._cdata  # type: ignore[attr-defined]
    if isinstance(a, Tensor):
        return False
    return bool(a == b)


def _name(event: Event) -> str:
    if isinstance(event, Operation):
        return str(event.func)
    if isinstance(event, GradSet):
        return "a change of .grad"
    if isinstance(event, OptimizerStep):
        return f"{type(event.optimizer).__name__}.step()"
    return "a check"


def _shown(value: Any) -> str:
    return repr(value)[:60]


def _operations_part(a: Operation, b: Operation) -> str | None:
    if a.outputs == b.outputs and _equal(a.args, b.args) and _equal(a.kwargs, b.kwargs):
        return None
    before, now = arguments_of(a), arguments_of(b)
    for name, y in now.items():
        x = before[name]
        if _equal(x, y):
            continue
        if any(True for _ in refs(x)) or any(True for _ in refs(y)):
            return f"its argument {name} is another tensor than in the call before: {_DEPENDS}"
        return (
            f"its argument {name} is {_shown(y)}, and was {_shown(x)} in the call before. A number that changes from "
            "call to call has to be an argument of the captured function that is a tensor"
        )
    if a.outputs != b.outputs:
        return f"it has other results than in the call before: {_DEPENDS}"
    return None


def arguments_of(operation: Operation) -> dict[str, Any]:
    """All arguments of an operation by name, also those that torch leaves out because they have their defaults."""
    names = operation.func._schema.arguments
    given = {argument.name: value for argument, value in zip(names, operation.args, strict=False)}
    defaults = {argument.name: argument.default_value for argument in names}
    return defaults | given | operation.kwargs


def _memories_part(a: Memory, b: Memory) -> str | None:
    if a.source != b.source or a.bytes != b.bytes or a.device != b.device:
        return "a tensor comes from elsewhere, or has another size, than in the call before: pass it as an argument"
    if a.source == ("unseen",) and a.tensor is not b.tensor:
        return (
            "a tensor that the function did not get as an argument is a new one at each call. It was made where a "
            "recorder does not see it (from NumPy, in another thread, in the call before): pass it as an argument"
        )
    if a.source == ("constant",):
        assert a.tensor is not None
        assert b.tensor is not None
        same = a.tensor.dtype == b.tensor.dtype and a.tensor.shape == b.tensor.shape
        if not same or not torch.equal(_bytes(a.tensor), _bytes(b.tensor)):
            return (
                f"a tensor that is made of numbers of Python is {_shown(b.tensor.tolist())}, and was "
                f"{_shown(a.tensor.tolist())} in the call before: pass it as an argument that is a tensor"
            )
    return None


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


_DEPENDS = (
    "give what it depends on to the function as an argument (a bool, an int, a str), so that each case is recorded for "
    "itself"
)
_OTHERWISE = (
    "a number that torch looks at is another one than in the call before: call this part outside of the captured "
    "function, and pass what it makes as an argument"
)
_BRANCH = f". The function takes another branch, or does another number of steps, than in the call before: {_DEPENDS}"


def difference(a: Trace, b: Trace) -> str | None:
    """Where two executions part, in words for the author of the program; None if they are the same.

    Args:
        a: the execution before.
        b: the execution now.
    """
    for x, y in zip(a.events, b.events, strict=False):
        if type(x) is not type(y) or (isinstance(x, Operation) and isinstance(y, Operation) and x.func != y.func):
            return f"{_name(y)} in {y.place} came where the call before had {_name(x)} in {x.place}{_BRANCH}"
        why = _events_part(x, y)
        if why is not None:
            return f"{_name(y)} in {y.place}: {why}"
    if len(a.events) != len(b.events):
        longer, other = (
            (b.events, "only in this call") if len(b.events) > len(a.events) else (a.events, "not this time")
        )
        event = longer[min(len(a.events), len(b.events))]
        return f"{_name(event)} in {event.place} came {other}{_BRANCH}"
    for m, n in zip(a.memories, b.memories, strict=False):
        why = _memories_part(m, n)
        if why is not None:
            return f"in {n.place}: {why}"
    for v, w in zip(a.values, b.values, strict=False):
        if v != w:
            return (
                f"in {b.memories[w.memory].place}: a tensor has another shape or dtype, or other strides, than in the "
                f"call before: {_DEPENDS}"
            )
    if a.results != b.results or len(a.values) != len(b.values):
        return f"it returned other tensors than in the call before: {_DEPENDS}, in {b.end}"
    return None


def _events_part(x: Event, y: Event) -> str | None:
    if isinstance(x, Operation) and isinstance(y, Operation):
        return _operations_part(x, y)
    if isinstance(x, OptimizerStep) and isinstance(y, OptimizerStep):
        return None if x.optimizer is y.optimizer else f"it is another optimizer than in the call before: {_DEPENDS}"
    if isinstance(x, GradSet) and isinstance(y, GradSet):
        same = (x.leaf, x.value) == (y.leaf, y.value)
        return None if same else f"it is another tensor's than in the call before: {_DEPENDS}"
    if isinstance(x, Check) and isinstance(y, Check):
        return None if (x.value, x.expected) == (y.value, y.expected) else _OTHERWISE
    return None

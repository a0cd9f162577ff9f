"""Makes a tape of a trace: decides what becomes of each recorded operation, and whose each memory is.

Views and empty tensors vanish, because memory is static. What depends on no data is computed once. The rest is made a
node of by `fuse`, or called as `calls.py` says.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastmlp import optim
from fastmlp._load import _C
from fastmlp.tape.calls import Calls
from fastmlp.tape.elements import Numbers, layout_of
from fastmlp.tape.fuse import fuse
from fastmlp.tape.in_place import write_in_place
from fastmlp.tape.trace import Check, Event, GradSet, Node, Operation, OptimizerStep, Ref, Run, Trace, Value, refs

__all__ = ["Lowered", "fused", "lower"]

#: Operations whose results have memory, but nothing in it yet.
_EMPTY = frozenset(
    f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)
#: Operations whose results depend on no data.
_FACTORIES = frozenset(
    f"aten::{name}"
    for name in (
        "arange", "eye", "full", "full_like", "linspace", "new_full", "new_ones", "new_zeros", "ones", "ones_like",
        "scalar_tensor", "zeros", "zeros_like",
    )
)  # fmt: skip


class Lowered:
    """A tape, and what Python has to know of it.

    Attributes:
        stops: of each stop of the tape the optimizer, its class's `step`, and the number of our rule or -1.
        counts: how many operations cost nothing, and how many were computed once.
        operations: how often the function called each of the others.
    """

    def __init__(self, trace: Trace, fused: bool) -> None:
        self.tape = _C.Tape()
        self.trace = trace
        self.calls = Calls(self)
        self.stops: list[tuple[torch.optim.Optimizer, Any, int]] = []
        self.counts = dict.fromkeys(("views", "constants"), 0)
        self.operations: dict[str, int] = {}
        self._fuse = fused
        self._steps = 0
        self._owners: list[str] = []
        self._numbers: dict[int, int] = {}  # of the tape's tensors, by those of values
        self._externals: dict[int, int] = {}  # by memory
        self._lifetimes: list[tuple[int, int]] = []

    def build(self) -> None:
        """Makes the tape."""
        trace = self.trace
        self._find_owners()
        for event in trace.events:
            if isinstance(event, Operation) and not (self._is_free(event, self._made(event)) or _is_factory(event)):
                name = event.func._schema.name
                self.operations[name] = self.operations.get(name, 0) + 1
        if self._fuse:
            self._make_nodes()
        made = [isinstance(event, Operation) and self._made(event) for event in trace.events]
        write_in_place(trace, self._owners, self.calls.writes_given)
        used = self._used_memories()
        for i, (owner, memory) in enumerate(zip(self._owners, trace.memories, strict=True)):
            self.tape.add_memory(owner, max(memory.bytes, 1) if i in used or owner != "arena" else 1)
        self._lifetimes = [(1 << 30, -1)] * len(trace.memories)
        self._add_externals()
        self._clear_grads()
        for event, new in zip(trace.events, made, strict=True):
            if isinstance(event, Operation):
                self._operation(event, new)
            elif isinstance(event, GradSet):
                self.use(*trace.refs(event))
                grad = -1 if event.value is None else self.number(event.value)
                self.tape.add_grad(self._externals[trace.values[event.leaf].memory], grad)
                self.advance()
            elif isinstance(event, Check):
                self.use(event.value)
                error = (
                    f"a check of torch's, called in {event.place}, came out otherwise than when the "
                    "function was recorded: call the function itself with these arguments to see its error"
                )
                self.tape.add_check(self.number(event.value), event.expected, error)
                self.advance()
            elif isinstance(event, Run):
                self._run(event)
            elif isinstance(event, Node):
                self.use(*trace.refs(event))
                getattr(self.tape, event.method)(*self.bound(event.args), event.place)
                self.advance()
            else:
                self._optimizer(event)
        results = [
            (*self._result(value), requires_grad, inference) for value, requires_grad, inference in trace.results
        ]
        self.tape.finish(
            [(first, max(first, last)) if last >= 0 else (0, 0) for first, last in self._lifetimes], results
        )

    def make_nodes(self) -> list[Operation]:
        """What `fused` does."""
        self._find_owners()
        return self._make_nodes()

    def _make_nodes(self) -> list[Operation]:
        """Lets `fuse` make nodes of what costs something. What is computed once goes before all else; returns that."""
        trace = self.trace
        once: list[Operation] = []
        costly: list[Event] = []
        numbers: Numbers = {}
        for event in trace.events:
            if not isinstance(event, Operation) or not self._is_free(event, self._made(event)):
                costly.append(event)
                continue
            if not self._is_constant(event):
                self.counts["views"] += 1
                continue
            once.append(event)
            number = _number_of(trace, event)
            if number is not None and event.outputs[0] is not None:
                value = trace.values[event.outputs[0]]
                numbers[value.memory, value.dtype] = number
        trace.events = costly
        trace.events = [*once, *fuse(trace, self._owners, numbers)]
        self._owners += ["arena"] * (len(trace.memories) - len(self._owners))
        return once

    def _is_constant(self, event: Operation) -> bool:
        """Whether what the operation makes is computed once."""
        if event.outputs[0] is None:
            return False
        memory = self.trace.values[event.outputs[0]].memory
        made = event.func._schema.name == "aten::lift_fresh" or _is_factory(event)
        return made and self._owners[memory] == "tape" and not self.trace.memories[memory].written

    def _is_free(self, event: Operation, new: bool) -> bool:
        """Whether a replay does nothing for the operation, which makes new memory or not."""
        name = event.func._schema.name
        if name == "aten::lift_fresh" or _is_factory(event):
            return self._is_constant(event)
        outputs = [output for output in event.outputs if output is not None]
        viewed = bool(outputs) and not event.func._schema.is_mutable and not new
        return viewed or name in _EMPTY or torch.Tag.inplace_view in event.func.tags

    def _used_memories(self) -> set[int]:
        """Those that some event or result is about."""
        used = {value for event in self.trace.events for value in self.trace.refs(event)}
        used.update(value for value, *_ in self.trace.results)
        return {self.trace.values[value].memory for value in used}

    def forget(self) -> None:
        """Lets go of the tensors of the recorded call, which the tape does not need."""
        self.trace = Trace()
        self._numbers, self._externals = {}, {}

    def _find_owners(self) -> None:
        trace = self.trace
        grads = {trace.values[e.value].memory for e in trace.events if isinstance(e, GradSet) and e.value is not None}
        made = {
            trace.values[event.outputs[0]].memory
            for event in trace.events
            if isinstance(event, Operation) and _is_factory(event) and event.outputs[0] is not None
        }
        returned = {trace.values[value].memory for value, *_ in trace.results}
        for i, memory in enumerate(trace.memories):
            if memory.source == ("constant",):
                self._owners.append("tape")
            elif memory.source != ("new",):
                self._owners.append("outside")
            elif i in grads:
                self._owners.append("grad")
            elif i in made and not memory.written:
                self._owners.append("tape")
            else:
                self._owners.append("result" if i in returned else "arena")

    def _add_externals(self) -> None:
        values = self.trace.values
        for i, memory in enumerate(self.trace.memories):
            if self._owners[i] != "outside":
                continue
            assert memory.tensor is not None
            kind = memory.source[0]
            argument = memory.source[1] if kind == "argument" else -1
            grad_of = self._externals[values[memory.source[1]].memory] if kind == "grad" else -1
            self._externals[i] = self.tape.add_external(
                memory=i,
                like=memory.tensor,
                argument=argument,
                grad_of=grad_of,
                held=kind == "unseen",
                written=memory.written,
                counted=memory.counted,
                starts_with_grad=self._starts_with_grad(i, memory.tensor),
            )

    def _starts_with_grad(self, memory: int, leaf: Tensor) -> bool | None:
        """Whether a leaf must have a `.grad` when a replay begins; None if that is all the same."""
        if memory in self.trace.starts_without_grad:
            return False
        if any(leaf is other for other in self.trace.cleared):
            return None
        looked = self.trace.looked.get(id(leaf))
        return None if looked is None else looked[1]

    def _clear_grads(self) -> None:
        """What `zero_grad()` does, where nothing puts another gradient there before somebody may look."""
        values = self.trace.values
        of_tensors = {id(memory.tensor): i for i, memory in enumerate(self.trace.memories) if i in self._externals}
        soon = set()
        for event in self.trace.events:
            if isinstance(event, OptimizerStep):
                break
            if isinstance(event, GradSet) and event.value is not None:
                soon.add(values[event.leaf].memory)
        looked = [leaf for leaf, _ in self.trace.looked.values()]
        for leaf in {id(leaf): leaf for leaf in (*self.trace.cleared, *looked)}.values():
            memory = of_tensors.get(id(leaf))
            if memory is None:
                memory = self._only_grad(leaf)
            if memory not in soon and any(leaf is other for other in self.trace.cleared):
                self.tape.add_grad(self._externals[memory], -1)
                self.advance()

    def _only_grad(self, leaf: Tensor) -> int:
        """The external of a leaf of which nothing but its `.grad` is used."""
        memory = self.tape.add_memory("outside", 1)
        self._lifetimes.append((0, 0))
        self._externals[memory] = self.tape.add_external(
            memory=memory,
            like=leaf,
            argument=-1,
            grad_of=-1,
            held=True,
            written=False,
            counted=False,
            starts_with_grad=self._starts_with_grad(-1, leaf),
        )
        return memory

    # Tensors.

    def number(self, value: int) -> int:
        """The number that the tape has for a value."""
        if value not in self._numbers:
            one = self.trace.values[value]
            self._numbers[value] = self._add(one, one.memory)
        return self._numbers[value]

    def _add(self, value: Value, memory: int) -> int:
        like = torch.empty(0, dtype=value.dtype)
        return self.tape.add_tensor(memory, like, value.sizes, value.strides, value.offset)

    def bound(self, argument: Any) -> Any:
        """A recorded argument with the tape's tensors in it."""
        if isinstance(argument, Ref):
            return self.tape.tensor(self.number(argument.value))
        if isinstance(argument, (tuple, list)):
            return type(argument)(self.bound(item) for item in argument)
        if isinstance(argument, dict):
            return {key: self.bound(item) for key, item in argument.items()}
        return argument

    def advance(self) -> None:
        """Notes that a step was added."""
        self._steps += 1

    def use(self, *values: int) -> None:
        """Notes that the next step uses these."""
        for value in values:
            memory = self.trace.values[value].memory
            first, last = self._lifetimes[memory]
            self._lifetimes[memory] = min(first, self._steps), max(last, self._steps)

    def scratch(self, like: Tensor) -> Tensor:
        """A tensor that lives for this step and the next one, and lies as one without memory."""
        memory = self.tape.add_memory("arena", max(like.nbytes, 1))
        self._lifetimes.append((self._steps, self._steps + 1))
        return self.tape.tensor(
            self.tape.add_tensor(memory, torch.empty(0, dtype=like.dtype), tuple(like.shape), like.stride(), 0)
        )

    # Events.

    def _operation(self, event: Operation, new: bool) -> None:
        name = event.func._schema.name
        outputs = [output for output in event.outputs if output is not None]
        if name == "aten::lift_fresh":
            self.counts["views"] += 1
            self._lift(event)
        elif _is_factory(event):
            self._factory(event, outputs[0])
        elif self._is_free(event, new):
            self.counts["views"] += 1
        else:
            self.use(*self.trace.refs(event))
            self.calls.operation(event, new)
            self.advance()

    def _run(self, event: Run) -> None:
        self.use(*self.trace.refs(event))
        values = self.trace.values

        def lying(value: int, space: tuple[int, ...], reduced: tuple[int, ...] = ()) -> Tensor:
            memory, dtype, strides, offset = layout_of(values[value], space, reduced)
            like = torch.empty(0, dtype=dtype)
            return self.tape.tensor(self.tape.add_tensor(memory, like, event.sizes, strides, offset))

        inputs = [lying(value, space) for value, space in event.inputs]
        outputs = [
            (lying(one.value, one.space, one.reduced), one.register, one.how, one.scale) for one in event.outputs
        ]
        self.tape.add_elementwise(inputs, event.instructions, outputs, event.place)
        self.advance()

    def _made(self, event: Operation) -> bool:
        """Whether the operation makes new memory."""
        used = {self.trace.values[value].memory for value in refs((event.args, event.kwargs))}
        return any(o is not None and self.trace.values[o].memory not in used for o in event.outputs)

    def _lift(self, event: Operation) -> None:
        """Numbers of Python: copied at each replay if the step writes to them, else kept."""
        if event.func._schema.name != "aten::lift_fresh":
            return
        (value,) = refs(event.args)
        memory = self.trace.memories[self.trace.values[value].memory]
        if memory.source == ("constant",):
            self._fill(value, memory.tensor, memory.written)

    def _factory(self, event: Operation, output: int) -> None:
        made = event.func(*self.bound(event.args), **self.bound(event.kwargs))
        written = (
            self._owners[self.trace.values[output].memory] != "tape"
            or self.trace.memories[self.trace.values[output].memory].written
        )
        self._fill(output, made, written)

    def _fill(self, value: int, content: Any, each_time: bool) -> None:
        """Gives a tensor of the tape its content, once or at each replay."""
        self.counts["constants"] += 1
        target = self.tape.tensor(self.number(value))
        if not each_time:
            target.copy_(content)
            return
        self.use(value)
        self.calls.add("aten::copy_", "", (target, content), {}, [], "a constant")
        self.advance()

    def _optimizer(self, event: OptimizerStep) -> None:
        optimizer = event.optimizer
        kind = type(optimizer)
        ours = getattr(optim, kind.__name__, None)
        known = kind is ours or (self._fuse and kind is getattr(torch.optim, kind.__name__, None))
        # Torch's step of several tensors at once leaves the momentum of Nesterov's in `.grad`.
        writes = any(group.get("nesterov") and group.get("foreach") for group in optimizer.param_groups)
        rule = optim.RULES[kind.__name__][0] if known and not writes and kind.__name__ in optim.RULES else -1
        self.stops.append((optimizer, kind.step, rule))
        self.tape.add_stop(event.place)
        self.advance()

    def _result(self, value: int) -> tuple[int, int]:
        """The tape's tensor of a result, and the external that it is or views."""
        one = self.trace.values[value]
        owner = self._owners[one.memory]
        if owner in ("tape", "grad") or self.trace.memories[one.memory].source[0] == "grad":
            # The caller keeps what it gets, and a later replay writes here again.
            copy = self.tape.add_memory("result", max(self.trace.memories[one.memory].bytes, 1))
            self._lifetimes.append((self._steps, self._steps))
            target = self._add(one, copy)
            # Elements that an expanded tensor shows several times are copied once.
            once = replace(one, sizes=tuple(n if step else 1 for n, step in zip(one.sizes, one.strides, strict=True)))
            to, content = (self.tape.tensor(self._add(once, memory)) for memory in (copy, one.memory))
            self.calls.add("aten::copy_", "", (to, content), {}, [], "a result")
            self.advance()
            return target, -1
        if owner == "outside":
            external = self._externals[one.memory]
            first = next(i for i, other in enumerate(self.trace.values) if other.memory == one.memory)
            return (-1 if first == value else self.number(value)), external
        return self.number(value), -1


def _is_factory(event: Operation) -> bool:
    """Whether what the operation returns depends on no data: a tensor to be like tells only of its shape."""
    name = event.func._schema.name
    if name not in _FACTORIES:
        return False
    like = name.endswith("_like") or name.startswith("aten::new_")
    return len(list(refs((event.args, event.kwargs)))) == (1 if like else 0)


def _number_of(trace: Trace, event: Operation) -> float | None:
    """The number that all elements of a constant are, if that is plain to see."""
    name = event.func._schema.name.removeprefix("aten::").removeprefix("new_").removesuffix("_like")
    assert event.outputs[0] is not None
    value = trace.values[event.outputs[0]]
    number: Any = None
    if name == "lift_fresh":
        content = trace.memories[value.memory].tensor
        number = content.item() if content is not None and content.numel() == 1 else None
    elif name in ("zeros", "ones"):
        number = float(name == "ones")
    elif name in ("full", "scalar_tensor"):
        number = event.kwargs.get("fill_value", event.args[-1])
    if not isinstance(number, (bool, int, float)) or value.dtype.is_complex:
        return None
    return float(torch.tensor(number, dtype=value.dtype).item())


def fused(trace: Trace) -> list[Operation]:
    """Makes nodes of the operations of a trace, for who does not make a tape of it.

    Returns:
        Those of its events that make the same at each call: numbers of Python, zeros and the like.
    """
    trace.alone = True
    return Lowered(trace, True).make_nodes()


def lower(trace: Trace, fused: bool) -> Lowered:
    """The tape of a trace."""
    with torch.no_grad():
        lowered = Lowered(trace, fused)
        lowered.build()
    return lowered

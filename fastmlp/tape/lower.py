"""Makes a tape of a trace: decides for each recorded operation how a replay does it, and whose each memory is.

Views and empty tensors vanish, because memory is static. What depends on no data is computed once. An operation that
returns new tensors is called by its variant that writes into given ones, where the CPU has a kernel for that. Random
numbers are drawn in place. Everything else is called as it was.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastmlp import optim
from fastmlp._load import _C
from fastmlp.tape.trace import Check, GradSet, Operation, OptimizerStep, Ref, Trace, Value, refs
from fastmlp.tape.variants import out_variant, writes_into_given

__all__ = ["PRIMS", "Lowered", "lower"]

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
#: Copies: what they return is their first argument, perhaps of another dtype.
_COPIES = frozenset({"aten::clone", "aten::_to_copy", "aten::contiguous"})
#: Operations that draw new tensors: the operation that draws in place, and its arguments.
_DRAWN = {
    "aten::rand": ("aten::uniform_", (0.0, 1.0)),
    "aten::rand_like": ("aten::uniform_", (0.0, 1.0)),
    "aten::randn": ("aten::normal_", (0.0, 1.0)),
    "aten::randn_like": ("aten::normal_", (0.0, 1.0)),
}
#: Operators that torch computes by another one: the other one's name, its overload that writes into a given tensor, and
#: its arguments. With more arguments, such as alpha, they are called as they were.
_AS_OTHERS: dict[str, tuple[str, str, Callable[..., tuple[Any, ...]]]] = {
    "aten::sum.": ("aten::sum", "IntList_out", lambda x: (x, [], False)),
    "aten::mean.": ("aten::mean", "out", lambda x: (x, [], False)),
    "aten::relu.": ("aten::clamp_min", "out", lambda x: (x, 0)),
    "aten::add.Scalar": ("aten::add", "out", lambda x, y: (x, y)),
    "aten::sub.Scalar": ("aten::sub", "out", lambda x, y: (x, y)),
    "aten::mul.Scalar": ("aten::mul", "out", lambda x, y: (x, y)),
    "aten::div.Scalar": ("aten::div", "out", lambda x, y: (x, y)),
    "aten::rsub.Scalar": ("aten::sub", "out", lambda x, y: (y, x)),
    "aten::rsub.Tensor": ("aten::sub", "out", lambda x, y: (y, x)),
    "aten::stack.": ("aten::stack", "out", lambda tensors, dim=0: (tensors, dim)),
}
#: Elementwise operators that torch computes in Python, where one of its tensors of zeros has no memory.
PRIMS = {f"prims::{name}": (f"aten::{name}", "out") for name in ("add", "sub", "mul", "div")}
#: Operators on lists that torch's kernels for the CPU apply to one tensor after the other: the operator of one tensor,
#: its overload, and what stands behind the tensor.
_ONE_BY_ONE: dict[str, tuple[str, str, Callable[..., tuple[Any, ...]]]] = {
    "aten::_foreach_norm.Scalar": ("aten::linalg_vector_norm", "out", lambda order=2.0: (order, [], False)),
    "aten::_foreach_mul_.Tensor": ("aten::mul_", "Tensor", lambda factor: (factor,)),
    "aten::_foreach_mul_.Scalar": ("aten::mul_", "Tensor", lambda factor: (factor,)),
    "aten::_foreach_clamp_min_.Scalar": ("aten::clamp_min_", "", lambda least: (least,)),
    "aten::_foreach_clamp_max_.Scalar": ("aten::clamp_max_", "", lambda most: (most,)),
    "aten::_foreach_zero_.": ("aten::zero_", "", lambda: ()),
}
#: Losses whose variant with `out` would take it for the losses of single elements too. They are computed in two steps,
#: as torch's kernels do: elements, then their mean (1) or sum (2).
_LOSSES = frozenset({"aten::mse_loss", "aten::smooth_l1_loss", "aten::huber_loss"})


class Lowered:
    """A tape, and what Python has to know of it.

    Attributes:
        stops: of each stop of the tape the optimizer, its class's `step`, and the number of our rule or -1.
        counts: how many operations cost nothing, and how many were computed once.
        operations: how often the function called each of the others.
    """

    def __init__(self, trace: Trace, fuse: bool) -> None:
        self.tape = _C.Tape()
        self.trace = trace
        self.stops: list[tuple[torch.optim.Optimizer, Any, int]] = []
        self.counts = dict.fromkeys(("views", "constants"), 0)
        self.operations: dict[str, int] = {}
        self._fuse = fuse
        self._steps = 0
        self._owners: list[str] = []
        self._numbers: dict[int, int] = {}  # of the tape's tensors, by those of values
        self._externals: dict[int, int] = {}  # by memory
        self._lifetimes: list[tuple[int, int]] = []

    def build(self) -> None:
        """Makes the tape."""
        trace = self.trace
        self._find_owners()
        made = [isinstance(event, Operation) and self._made(event) for event in trace.events]
        write_in_place(trace, self._owners, self._writes_given)
        used = {value.memory for value in trace.values}
        for i, (owner, memory) in enumerate(zip(self._owners, trace.memories, strict=True)):
            self.tape.add_memory(owner, max(memory.bytes, 1) if i in used else 1)
        self._lifetimes = [(1 << 30, -1)] * len(trace.memories)
        self._add_externals()
        self._clear_grads()
        for event, new in zip(trace.events, made, strict=True):
            if isinstance(event, Operation):
                self._operation(event, new)
            elif isinstance(event, GradSet):
                self._use(*trace.refs(event))
                grad = -1 if event.value is None else self._tensor(event.value)
                self.tape.add_grad(self._externals[trace.values[event.leaf].memory], grad)
                self._steps += 1
            elif isinstance(event, Check):
                self._use(event.value)
                error = (
                    f"a check of torch's, called in {event.place}, came out otherwise than when the "
                    "function was recorded: call the function itself with these arguments to see its error"
                )
                self.tape.add_check(self._tensor(event.value), event.expected, error)
                self._steps += 1
            else:
                self._optimizer(event)
        results = [
            (*self._result(value), requires_grad, inference) for value, requires_grad, inference in trace.results
        ]
        self.tape.finish(
            [(first, max(first, last)) if last >= 0 else (0, 0) for first, last in self._lifetimes], results
        )

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
                self._steps += 1

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
            starts_with_grad=self._starts_with_grad(-1, leaf),
        )
        return memory

    # Tensors.

    def _tensor(self, value: int) -> int:
        if value not in self._numbers:
            one = self.trace.values[value]
            self._numbers[value] = self._add(one, one.memory)
        return self._numbers[value]

    def _add(self, value: Value, memory: int) -> int:
        like = torch.empty(0, dtype=value.dtype)
        return self.tape.add_tensor(memory, like, value.sizes, value.strides, value.offset)

    def _bound(self, argument: Any) -> Any:
        """A recorded argument with the tape's tensors in it."""
        if isinstance(argument, Ref):
            return self.tape.tensor(self._tensor(argument.value))
        if isinstance(argument, (tuple, list)):
            return type(argument)(self._bound(item) for item in argument)
        if isinstance(argument, dict):
            return {key: self._bound(item) for key, item in argument.items()}
        return argument

    def _use(self, *values: int) -> None:
        """Notes that the next step uses these."""
        for value in values:
            memory = self.trace.values[value].memory
            first, last = self._lifetimes[memory]
            self._lifetimes[memory] = min(first, self._steps), max(last, self._steps)

    # Events.

    def _operation(self, event: Operation, new: bool) -> None:
        trace, name = self.trace, event.func._schema.name
        outputs = [output for output in event.outputs if output is not None]
        if torch.Tag.inplace_view in event.func.tags or (outputs and not new and not event.func._schema.is_mutable):
            self.counts["views"] += 1
            self._lift(event)
        elif name in _EMPTY:
            self.counts["views"] += 1
        elif _is_factory(event):
            self._factory(event, outputs[0])
        else:
            self.operations[name] = self.operations.get(name, 0) + 1
            self._use(*trace.refs(event))
            self._call(event, new)
            self._steps += 1

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
        made = event.func(*self._bound(event.args), **self._bound(event.kwargs))
        written = (
            self._owners[self.trace.values[output].memory] != "tape"
            or self.trace.memories[self.trace.values[output].memory].written
        )
        self._fill(output, made, written)

    def _fill(self, value: int, content: Any, each_time: bool) -> None:
        """Gives a tensor of the tape its content, once or at each replay."""
        self.counts["constants"] += 1
        target = self.tape.tensor(self._tensor(value))
        if not each_time:
            target.copy_(content)
            return
        self._use(value)
        self._add_call("aten::copy_", "", (target, content), {}, [], "a constant")
        self._steps += 1

    def _add_call(
        self, name: str, overload: str, args: tuple[Any, ...], kwargs: dict[str, Any], results: list[int], place: str
    ) -> None:
        schema = torch._C._get_schema(name, overload)
        args = tuple(_as_tensor(argument, entry) for argument, entry in zip(args, schema.arguments, strict=False))
        self.tape.add_call(name, overload, args, kwargs, results, place)

    def _call(self, event: Operation, new: bool) -> None:
        schema = event.func._schema
        name, overload = schema.name, schema.overload_name
        args, kwargs = self._bound(event.args), self._bound(event.kwargs)
        if f"{name}.{overload}" in _ONE_BY_ONE and not kwargs:
            self._one_by_one(event, *_ONE_BY_ONE[f"{name}.{overload}"])
            return
        if not new or schema.is_mutable:
            results = self._new_results(event) if new else []
            self._add_call(name, overload, args, kwargs, results, event.place)
            return
        outputs = [output for output in event.outputs if output is not None]
        targets = [self.tape.tensor(self._tensor(output)) for output in outputs]
        if name in _DRAWN and overload in ("", "generator"):
            drawn, numbers = _DRAWN[name]
            self._add_call(drawn, "", (targets[0], *numbers), _generator(kwargs), [], event.place)
        elif name in _LOSSES:
            self._loss(event, args, self._bound(Ref(outputs[0])))
        elif name in _COPIES:
            self._add_call("aten::copy_", "", (targets[0], args[0]), {}, [], event.place)
        elif name in PRIMS:
            self._add_call(*PRIMS[name], args, {"out": targets[0]}, [], event.place)
        elif other := _as_other(event):
            self._add_call(other[0], other[1], other[2](*args), dict(kwargs, out=targets[0]), [], event.place)
        elif writes_into_given(event, self.trace.values):
            overload, names = out_variant(event.func) or ("", [])
            schema = torch._C._get_schema(name, overload)
            known = {argument.name for argument in schema.arguments}
            kept = {key: value for key, value in kwargs.items() if key in known}
            kept |= dict(zip(names, targets, strict=True))
            self._add_call(name, overload, args, kept, [], event.place)
        else:
            self._add_call(name, overload, args, kwargs, self._new_results(event), event.place)

    def _one_by_one(self, event: Operation, name: str, overload: str, rest: Callable[..., tuple[Any, ...]]) -> None:
        first, *others = self._bound(event.args)
        outputs = [self._bound(Ref(output)) for output in event.outputs if output is not None]
        for tensor, output in zip(first, outputs or first, strict=True):
            kwargs = {"out": output} if outputs and output is not tensor else {}
            self._add_call(name, overload, (tensor, *rest(*others)), kwargs, [], event.place)

    def _loss(self, event: Operation, args: tuple[Any, ...], target: Tensor) -> None:
        name, place = event.func._schema.name, event.place
        reduction = args[2] if len(args) > 2 else 1
        rest = args[3:]
        if reduction == 0:
            self._add_call(name, "out", (*args[:2], 0, *rest), {"out": target}, [], place)
            return
        like = torch.broadcast_tensors(args[0], args[1])[0]
        shape, dtype = tuple(like.shape), torch.promote_types(args[0].dtype, args[1].dtype)
        elements = self._scratch(shape, dtype)
        self._add_call(name, "out", (*args[:2], 0, *rest), {"out": elements}, [], place)
        self._steps += 1
        self._use(*self.trace.refs(event))
        reduced = ("aten::mean", "out") if reduction == 1 else ("aten::sum", "IntList_out")
        self._add_call(*reduced, (elements, [], False), {"out": target}, [], place)

    def _scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that lives for this step and the next one."""
        like = torch.empty(shape, dtype=dtype, device="meta")
        memory = self.tape.add_memory("arena", max(like.nbytes, 1))
        self._lifetimes.append((self._steps, self._steps + 1))
        return self.tape.tensor(self.tape.add_tensor(memory, torch.empty(0, dtype=dtype), shape, like.stride(), 0))

    def _writes_given(self, event: Operation) -> bool:
        """Whether a replay of the operation writes into the tensor that it is given for its result."""
        name = event.func._schema.name
        other = name in PRIMS or _as_other(event) is not None
        return other or (name not in _LOSSES | _COPIES and writes_into_given(event, self.trace.values))

    def _new_results(self, event: Operation) -> list[int]:
        return [-1 if output is None else self._tensor(output) for output in event.outputs]

    def _optimizer(self, event: OptimizerStep) -> None:
        optimizer = event.optimizer
        kind = type(optimizer)
        ours = getattr(optim, kind.__name__, None)
        known = kind is ours or (self._fuse and kind is getattr(torch.optim, kind.__name__, None))
        # Torch's step of several tensors at once leaves the momentum of Nesterov's in `.grad`.
        writes = any(group.get("nesterov") and group.get("foreach") for group in optimizer.param_groups)
        rule = optim.RULES[kind.__name__][0] if known and not writes and kind.__name__ in optim.RULES else -1
        self.stops.append((optimizer, kind.step, rule))
        self.tape.add_stop()
        self._steps += 1

    def _result(self, value: int) -> tuple[int, int]:
        """The tape's tensor of a result, and the external that it is or views."""
        one = self.trace.values[value]
        owner = self._owners[one.memory]
        if owner in ("tape", "grad") or self.trace.memories[one.memory].source[0] == "grad":
            # The caller keeps what it gets, and a later replay writes here again.
            copy = self.tape.add_memory("result", max(self.trace.memories[one.memory].bytes, 1))
            self._lifetimes.append((self._steps, self._steps))
            target = self._add(one, copy)
            content = self.tape.tensor(self._tensor(value))
            self._add_call("aten::copy_", "", (self.tape.tensor(target), content), {}, [], "a result")
            self._steps += 1
            return target, -1
        if owner == "outside":
            external = self._externals[one.memory]
            first = next(i for i, other in enumerate(self.trace.values) if other.memory == one.memory)
            return (-1 if first == value else self._tensor(value)), external
        return self._tensor(value), -1


def _is_factory(event: Operation) -> bool:
    """Whether what the operation returns depends on no data: a tensor to be like tells only of its shape."""
    name = event.func._schema.name
    like = name.endswith("_like") or name.startswith("aten::new_")
    used = list(refs((event.args, event.kwargs)))
    return name in _FACTORIES and len(used) == (1 if like else 0)


def _as_other(event: Operation) -> tuple[str, str, Callable[..., tuple[Any, ...]]] | None:
    """The operator by which torch computes this one."""
    other = _AS_OTHERS.get(f"{event.func._schema.name}.{event.func._schema.overload_name}")
    return None if other is None or len(event.args) > other[2].__code__.co_argcount else other


def _generator(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"generator": kwargs["generator"]} if "generator" in kwargs else {}


def _as_tensor(argument: Any, entry: Any) -> Any:
    """A number where an operator takes a tensor, as the dispatcher would have it."""
    number = isinstance(argument, (bool, int, float, complex)) and str(entry.type) in ("Tensor", "Optional[Tensor]")
    return _C.wrapped_number(argument) if number else argument


def write_in_place(trace: Trace, owners: list[str], writes_given: Callable[[Operation], bool]) -> None:
    """Lets elementwise operations write over an operand that nothing reads later, as autograd does where it can."""
    last: dict[int, int] = {}
    for i, event in enumerate(trace.events):
        for value in trace.refs(event):
            last[trace.values[value].memory] = i
    kept = {trace.values[value].memory for value, *_ in trace.results}
    for i, event in enumerate(trace.events):
        if not isinstance(event, Operation) or torch.Tag.pointwise not in event.func.tags or len(event.outputs) != 1:
            continue
        output = event.outputs[0]
        operands = list(refs((event.args, event.kwargs)))
        if output is None or event.func._schema.is_mutable or output in operands:
            continue
        made = trace.values[output].memory
        for operand in operands:
            over = trace.values[operand].memory
            same = all(trace.values[v] == trace.values[operand] for v in operands if trace.values[v].memory == over)
            fits = replace(trace.values[operand], memory=made) == trace.values[output]
            whole = trace.memories[over].bytes == trace.memories[made].bytes
            free = owners[over] == owners[made] == "arena" and over not in kept and last[over] == i and over != made
            if same and fits and whole and free and writes_given(event):
                for other in trace.values:
                    if other.memory == made:
                        other.memory = over
                last[over] = last[made]
                break


def lower(trace: Trace, fuse: bool) -> Lowered:
    """The tape of a trace."""
    with torch.no_grad():
        lowered = Lowered(trace, fuse)
        lowered.build()
    return lowered

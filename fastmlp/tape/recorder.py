"""Records one eager execution of a function: every operation of torch, its backward included, as it is dispatched.

`Recorder` is a dispatch mode, which sees operations below autograd, and installs two more observers for as long as it
records: a function mode, which sees reads of tensors that are no operations (`numpy`, `tolist`, `.grad`), and a profile
function of this thread, which sees calls of Python and C (optimizers' steps, modules, generators that are seeded). What
a tape could not repeat is refused here, where the user's line is known.
"""

import sys
import weakref
from collections.abc import Iterable, Sequence
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from fastmlp.tape import functions
from fastmlp.tape.active import RecordingMode
from fastmlp.tape.functions import Functions
from fastmlp.tape.gradients import Gradients
from fastmlp.tape.operators import Operator, operator_of
from fastmlp.tape.python_calls import PythonCalls
from fastmlp.tape.seen import Seen, is_program
from fastmlp.tape.trace import (
    CaptureError,
    Check,
    Memory,
    Operation,
    OptimizerStep,
    Ref,
    Trace,
    Value,
    counts_writes,
    written_arguments,
)

__all__ = ["Recorder"]

aten = torch.ops.aten

#: Parts of torch that look at tensors only to raise an error for wrong ones.
_CHECKERS = tuple(
    f"{folder}/{part}" for folder in torch.__path__ for part in ("distributions/", "nn/utils/clip_grad.py")
)
#: One that draws again, as often as the numbers say.
_DRAWS_AGAIN = "von_mises.py"
#: Types of what an operator gets besides tensors, which is most often looked for first.
_PLAIN = frozenset({int, float, bool, type(None), torch.dtype, torch.device, torch.layout, str})
_DENSE = frozenset({Tensor, nn.Parameter, nn.Buffer})
_OWN_FILE = __file__


def _place(frame: FrameType | None) -> tuple[str, FrameType | None]:
    """The innermost line that is not of a library, and the library's frame that it called."""
    inner = None
    while frame is not None and not is_program(frame.f_code.co_filename):
        if frame.f_code.co_filename != _OWN_FILE:
            inner = inner or frame
        frame = frame.f_back
    if frame is None:
        return "the program", inner
    return f"{frame.f_code.co_filename}:{frame.f_lineno}", inner


def _extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize


class _Apart:
    """A context in which nothing is recorded, because the recorder does something itself.

    Attributes:
        depth: how often it was entered and not left.
    """

    def __init__(self, calls: PythonCalls) -> None:
        self.depth = 0
        self._calls = calls

    def __enter__(self) -> None:
        self._calls.pause()
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1
        if not self.depth:
            self._calls.resume()


class Recorder(RecordingMode):
    """A context in which one call is recorded.

    Args:
        name: of the function, for errors.
        arguments: the tensors of the call, in the order in which replays will find them.
        leaves: tensors whose gradients a call before this one has set.
        lenient: whether what cannot be recorded ends the recording instead of raising.

    Attributes:
        trace: what was recorded.
        seen: what Python objects the function used.
        gradients: what leaves have in `.grad`.
        refused: why the recording ended, if it did.
    """

    # Else torch raises an error of its own where a function such as torch.cond is called.
    supports_higher_order_operators = True

    def __init__(self, name: str, arguments: Sequence[Tensor], leaves: Iterable[Tensor], lenient: bool) -> None:
        super().__init__()
        self.name = name
        self.trace = Trace()
        self.seen = Seen()
        self.refused: str | None = None
        self._lenient = lenient
        # Values by the identity of their tensors. Tensors are not kept alive, because autograd asks who else has them.
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._arguments = {id(tensor): (tensor, i) for i, tensor in reversed(list(enumerate(arguments)))}
        self.gradients = Gradients(self.trace, self, leaves)
        self._functions = Functions(self)
        self._calls = PythonCalls(self)
        self._apart = _Apart(self._calls)
        self._numpy = _numpy_state()

    def __enter__(self) -> Self:
        # What autocast has cast outside of the call would be missing in a replay.
        torch.clear_autocast_cache()
        self._functions.__enter__()
        super().__enter__()
        self._calls.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._calls.stop()
        super().__exit__(kind, error, trace)
        self._functions.__exit__(kind, error, trace)
        torch.clear_autocast_cache()

    def refuse(self, reason: str, frame: FrameType | None = None) -> None:
        """Ends the recording: raises, or lets the call go on unrecorded."""
        if self.refused is not None:
            return
        place, _ = _place(frame or sys._getframe(1))
        self.refuse_at(reason, place)

    def refuse_at(self, reason: str, place: str) -> None:
        """As refuse(), where the place is known otherwise."""
        if self.refused is None:
            self.refused = f"{reason}, in {place}"
            if not self._lenient:
                raise CaptureError(f"fastmlp: capture: {self.name}: {self.refused}")

    # Steps of optimizers.

    def step_begins(self, optimizer: torch.optim.Optimizer, frame: FrameType) -> None:
        """The program has called an optimizer's step, which is not recorded itself."""
        place, _ = _place(frame)
        self._sync_gradients(place)
        with self._apart:
            self.gradients.will_be_used(optimizer)
        self.trace.events.append(OptimizerStep(optimizer, place))
        self.seen.optimizer(optimizer)
        on_top = torch.overrides._get_current_function_mode() is self._functions
        if not on_top:
            self.refuse("optimizer.step() is called within backward(), by a hook: call it after backward()", frame)
        if self.refused is None:
            self._calls.skip(frame)
            super().__exit__(None, None, None)
            self._functions.__exit__(None, None, None)

    def step_ended(self) -> None:
        """The step returns."""
        self._functions.__enter__()
        super().__enter__()

    # What the other observers ask and tell.

    def is_passive(self) -> bool:
        """Whether what happens now is the recorder's own doing, or is no longer recorded."""
        return self._apart.depth > 0 or self.refused is not None

    def known_value(self, tensor: Tensor) -> int | None:
        """The number of a tensor's value, if the trace has it."""
        known = self._known.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def is_made(self, tensor: Tensor) -> bool:
        """Whether the function made the tensor itself."""
        known = self.known_value(tensor)
        return known is not None and self.trace.memories[self.trace.values[known].memory].tensor is not tensor

    def grad_will_be_set(self, leaf: Tensor) -> None:
        """The program is about to set the `.grad` of a leaf."""
        place, _ = _place(sys._getframe(3))
        with self._apart:
            self.gradients.will_be_set(leaf, place)

    def grad_was_looked_at(self, leaf: Tensor) -> None:
        """The program has looked at the `.grad` of a tensor."""
        with self._apart:
            self.gradients.was_looked_at(leaf)

    def grad_was_set(self, leaf: Tensor) -> None:
        """The program has set the `.grad` of a leaf."""
        place, _ = _place(sys._getframe(2))
        with self._apart:
            self.gradients.was_set(leaf, place)

    def _sync_gradients(self, place: str) -> None:
        with self._apart:
            self.gradients.sync(place)

    # Operations.

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.is_passive():
            return func(*args, **kwargs)
        with self._apart:
            operator = operator_of(func)
            inputs: list[Tensor] = []
            _collect(args, inputs)
            _collect(kwargs.values(), inputs)
            recorded, place, inner = None, "", None
            if not (operator.is_note or _only_of_shapes(inputs, kwargs)):
                place, inner = _place(sys._getframe(1))
                why = operator.refuses(args)
                if why is not None:
                    self.refuse(why)
                recorded = self._recorded(args, place), self._recorded(kwargs, place)
        output = func(*args, **kwargs)
        if recorded is not None and self.refused is None:
            with self._apart:
                self._record(operator, args, inputs, recorded, output, place, inner)
        return output

    def _recorded(self, value: Any, place: str) -> Any:
        if type(value) in _PLAIN:
            return value
        if isinstance(value, Tensor):
            return Ref(self.value_of(value, place))
        if isinstance(value, (tuple, list)):
            return type(value)(self._recorded(item, place) for item in value)
        if isinstance(value, dict):
            return {key: self._recorded(item, place) for key, item in value.items()}
        return value

    def _plain(self, tensor: Tensor) -> bool:
        """Whether a tape can hold the tensor; refuses it otherwise."""
        why = None
        if type(tensor) not in _DENSE:
            why = f"it is of type {type(tensor).__name__}: call as_subclass(torch.Tensor)"
        elif tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            why = f"it is sparse, quantized or nested ({tensor.layout}): use a dense tensor"
        elif tensor.device.type not in ("cpu", "cuda"):
            why = f"it is on {tensor.device}: use tensors of the CPU, or of a GPU of CUDA"
        elif tensor.is_conj() or tensor.is_neg():
            why = "it is a lazy conjugate: call resolve_conj()"
        if why is not None:
            self.refuse(f"a tensor of shape {tuple(tensor.shape)} cannot be on a tape: {why}")
        return why is None

    def value_of(self, tensor: Tensor, place: str) -> int:
        """The number of a tensor's value, which is new if nothing is known of the tensor."""
        known = self.known_value(tensor)
        if known is not None:
            return known
        self._plain(tensor)
        source: tuple[Any, ...] = ("unseen",)
        if id(tensor) in self._arguments:
            source = ("argument", self._arguments[id(tensor)][1])
        else:
            leaf = self.gradients.leaf_of(tensor)
            if leaf is not None:
                source = ("grad", self.value_of(leaf, place))
        if tensor.requires_grad and tensor.grad_fn is not None and source[0] != "grad":
            self.refuse(
                f"a tensor of shape {tuple(tensor.shape)} was computed outside of the captured function, and requires "
                "a gradient: pass it with detach(), or compute it inside"
            )
        self.trace.memories.append(Memory(source, _extent(tensor), tensor, place, False, _device_of(tensor)))
        number = self._add_value(tensor, len(self.trace.memories) - 1, 0)
        if tensor.requires_grad and tensor.is_leaf:
            self.gradients.add(tensor)
        return number

    def _add_value(self, tensor: Tensor, memory: int, offset: int) -> int:
        shape = tuple(tensor.shape), tensor.stride()
        self.trace.values.append(Value(memory, tensor.dtype, *shape, offset))
        number = len(self.trace.values) - 1
        self._known[id(tensor)] = (weakref.ref(tensor), number)
        return number

    def _record(
        self,
        operator: Operator,
        args: tuple[Any, ...],
        inputs: list[Tensor],
        recorded: tuple[Any, Any],
        output: Any,
        place: str,
        inner: FrameType | None,
    ) -> None:
        func = operator.func
        if func is aten._local_scalar_dense.default:
            self._read_number(recorded[0][0].value, output, place, inner)
            return
        if func is aten.lift_fresh.default:
            self._make_constant(args[0], recorded[0][0].value)
        if operator.is_harmless:
            return
        outputs = _flat(output)
        if isinstance(output, Tensor) and output._is_zerotensor():
            # It has no memory, and torch takes it for zero whatever it is multiplied with.
            kwargs = {"dtype": output.dtype}
            zeros = Operation(aten.zeros.default, (list(output.shape),), kwargs, [self._new(output, place)], place)
            self.trace.events.append(zeros)
            return
        if not all(one is None or isinstance(one, Tensor) for one in outputs):
            self.refuse(
                f"{func} returns {type(output).__name__} to Python, and a replay does not run Python: use torch.where "
                "for a choice, and return what is to be looked at"
            )
            return
        operation = Operation(func, *recorded, [], place)
        for value in written_arguments(operation):
            memory = self.trace.memories[self.trace.values[value].memory]
            memory.written = True
            memory.counted |= counts_writes(operation)
        operation.outputs = [None if one is None else self._output(one, inputs, operator, place) for one in outputs]
        self.trace.events.append(operation)

    def _output(self, tensor: Tensor, inputs: list[Tensor], operator: Operator, place: str) -> int | None:
        if not self._plain(tensor):
            return None
        known = self.known_value(tensor)
        if known is not None and not operator.reshapes:
            if tuple(tensor.shape) != self.trace.values[known].sizes:
                self.refuse("out= gets another shape than it had: give it a tensor of the shape of the result")
            return known
        storage = tensor.untyped_storage()._cdata
        for like in inputs:
            if like.untyped_storage()._cdata == storage:
                return self._view(tensor, like, place)
        return self._new(tensor, place)

    def _new(self, tensor: Tensor, place: str) -> int:
        bytes = tensor.nbytes if tensor._is_zerotensor() else tensor.untyped_storage().nbytes()
        self.trace.memories.append(Memory(("new",), bytes, None, place, False, _device_of(tensor)))
        return self._add_value(tensor, len(self.trace.memories) - 1, int(tensor.storage_offset()))

    def _view(self, tensor: Tensor, like: Tensor, place: str) -> int | None:
        value = self.trace.values[self.value_of(like, place)]
        # Where the memory of the tape begins in the storage, in bytes.
        begin = (int(like.storage_offset()) - value.offset) * like.itemsize
        offset, rest = divmod(int(tensor.storage_offset()) * tensor.itemsize - begin, tensor.itemsize)
        if offset < 0 or rest:
            self.refuse("a view begins before the tensor that the function was given: pass the whole tensor")
            return None
        if self.trace.memories[value.memory].source not in (("new",), ("constant",)):
            if tensor is like:
                self.refuse("a tensor of the outside gets another shape in place: make a view of it instead")
                return None
            whole = next(one for one in self.trace.values if one.memory == value.memory)
            if _end(offset, tensor.shape, tensor.stride(), tensor.itemsize) > _end_of(whole):
                self.refuse("a view ends after the tensor that the function was given: pass the whole tensor")
                return None
        return self._add_value(tensor, value.memory, offset)

    def _make_constant(self, tensor: Tensor, value: int) -> None:
        memory = self.trace.memories[self.trace.values[value].memory]
        if memory.source != ("unseen",):
            return
        if not tensor.untyped_storage().resizable():
            self.refuse(
                "a tensor is made from an array of NumPy, whose numbers may change: pass a tensor as an argument"
            )
        memory.source, memory.tensor = ("constant",), tensor.clone()

    def _read_number(self, value: int, number: Any, place: str, inner: FrameType | None) -> None:
        while inner is not None and inner.f_code.co_filename in _PASSED_OVER:
            inner = inner.f_back
        file = "" if inner is None else inner.f_code.co_filename
        if file.startswith(_CHECKERS) and not file.endswith(_DRAWS_AGAIN):
            self.trace.events.append(Check(value, float(number), place))
            return
        self.refuse(
            "an element of a tensor is read by Python (item(), float(), bool(), an if, a print), and a replay does "
            "not run Python: use torch.where for a choice, and return what is to be looked at"
        )

    def finish(self, results: Sequence[Tensor], returned: Any, place: str) -> None:
        """Notes what the function, which is written at `place`, leaves and returns."""
        if self.refused is not None:
            return
        if _numpy_state() != self._numpy:
            self.refuse_at("numpy.random has drawn, and a replay would not draw again: draw with torch", place)
        with self._apart:
            self.gradients.sync(place)
            for tensor in results:
                value = self.trace.values[self.value_of(tensor, place)]
                outside = self.trace.memories[value.memory]
                if (
                    outside.tensor is not None
                    and outside.tensor.dtype != value.dtype
                    and outside.source != ("constant",)
                ):
                    self.refuse_at("a result is a view, in another dtype, of a tensor of the outside: clone it", place)
            self.trace.results = [(self.value_of(t, place), t.requires_grad, t.is_inference()) for t in results]
            self.trace.returned, self.trace.end = returned, place


#: Between the code that reads a number and `Recorder.__torch_dispatch__`, which torch wraps so as not to compile it.
_PASSED_OVER = frozenset(
    {_OWN_FILE, functions.__file__, torch.overrides.__file__, torch._tensor.__file__, torch._ops.__file__}
    | {f"{folder}/{file}" for folder in torch.__path__ for file in ("_compile.py", "_dynamo/eval_frame.py")}
)


def _numpy_state() -> tuple[bytes, int]:
    """That of NumPy's global generator, whose functions no profile sees."""
    _, keys, position, *_ = np.random.get_state()  # noqa: NPY002  (what users draw from)
    return np.asarray(keys).tobytes(), int(position)


def _collect(values: Iterable[Any], found: list[Tensor]) -> None:
    """Appends all tensors among arguments."""
    for value in values:
        if type(value) in _PLAIN:
            continue
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            _collect(value, found)
        elif isinstance(value, dict):
            _collect(value.values(), found)


def _only_of_shapes(tensors: list[Tensor], kwargs: dict[str, Any]) -> bool:
    """Whether torch's own code works out a shape with tensors that have no data."""
    device = kwargs.get("device")
    on_meta = device is not None and torch.device(device).type == "meta"
    return on_meta or (bool(tensors) and all(tensor.is_meta for tensor in tensors))


def _end(offset: int, sizes: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    """Where a view ends in its memory, in bytes."""
    if 0 in sizes:
        return 0
    return (offset + 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))) * itemsize


def _end_of(value: Value) -> int:
    return _end(value.offset, value.sizes, value.strides, value.dtype.itemsize)


def _device_of(tensor: Tensor) -> str:
    return "cpu" if tensor.is_cpu else str(tensor.device)


def _flat(output: Any) -> list[Any]:
    """What an operator returns, one after the other: tensors, lists of tensors, nothing."""
    if not isinstance(output, (tuple, list)):
        return [output]
    return [each for one in output for each in (one if isinstance(one, (tuple, list)) else [one])]

"""Recorded models: modules whose forward is a graph of torch.fx in which layers and activations are fused.

`fastmlp.convert(model, trace=True)` makes them; `fastmlp.freeze` and `fastmlp.TrainStep` record what is no container.
recording.py records a forward, comparison.py compares the recording with a call, fusing.py fuses the graph, and
recorded.py is the class of what comes of it. flattening.py says whether a recording begins by flattening its input,
ending.py whether it ends with a softmax or another shape. In the graph one node, `run_chain`, stands for what a
`fastmlp.Sequential` of the same modules would do; the modules stay where they are, and so do the keys of the
`state_dict`.
"""

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from fastmlp._errors import described
from fastmlp.trace.comparison import compare
from fastmlp.trace.ending import Reshape, ending_of
from fastmlp.trace.flattening import flattening_of
from fastmlp.trace.fusing import activation_from, activation_of, fuse, held, names_in, run_chain
from fastmlp.trace.outside import Outside, is_library
from fastmlp.trace.recorded import Traced, class_for, load
from fastmlp.trace.recording import Tracer
from fastmlp.trace.settling import settled

__all__ = [
    "Recording",
    "Reshape",
    "Traced",
    "activation_from",
    "activation_of",
    "ending_of",
    "flattening_of",
    "held",
    "load",
    "names_in",
    "place_of_inner",
    "record",
    "run_chain",
    "settled",
    "traced",
]

_ADVICE = "a recorded forward would lose; convert(model) without trace keeps it"


class Recording(NamedTuple):
    """A recorded model, and what raises if it does something else than the model.

    `check` may be given examples of the forward's arguments, where none were given before.
    """

    module: "Traced"
    check: Callable[..., None]


def traced(model: nn.Module, inputs: tuple[Any, ...] | None) -> fx.GraphModule:
    """What `convert(model, trace=True, inputs=inputs)` returns."""
    recording = record(model, inputs)
    recording.check()
    return recording.module


#: The wrappers that torch puts around a module, and the attribute in which they hold it. DistributedDataParallel is not
#: among them, because a model without it is trained without the other processes.
_AROUND = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
}


def place_of_inner(module: nn.Module) -> str | None:
    """The attribute under which a wrapper of torch's has the module that it calls; None for any other module."""
    return _AROUND.get(f"{type(module).__module__}.{type(module).__qualname__}")


def record(model: nn.Module, inputs: tuple[Any, ...] | None = None) -> Recording:
    """The model recorded and fused, not compared with itself yet."""
    if isinstance(model, torch.jit.ScriptModule):
        raise RuntimeError(
            f"fastmlp: torch.fx cannot record {_name(model)}, a module of torch.jit, whose forward is no code of "
            "Python; convert the model that it was scripted or traced from"
        )
    if type(model).__name__ in ("OptimizedModule", "DataParallel") and (place := place_of_inner(model)) is not None:
        raise RuntimeError(
            f"fastmlp: torch.fx cannot record {_name(model)}, which runs another module in a way of its own; convert "
            f"that one, model.{place}, first and wrap what comes of it"
        )
    if isinstance(model, LazyModuleMixin) and model.has_uninitialized_params():
        raise RuntimeError(
            f"fastmlp: {_name(model)} has no parameters before its first call; call the model once, then convert it"
        )
    hooks = [name for name, value in model.__dict__.items() if name.endswith("_hooks") and value]
    if hooks:
        raise RuntimeError(f"fastmlp: {_name(model)} itself has hooks ({', '.join(hooks)}), which {_ADVICE}")
    if inputs is not None and not isinstance(inputs, (tuple, list)):
        raise TypeError(
            f"fastmlp: inputs must be a tuple of the forward's arguments, got {described(inputs)}; for a single "
            "one pass inputs=(x,)"
        )
    given = tuple(inputs or ())
    with _explained(model), Outside(model):
        with torch.enable_grad():
            in_training = Tracer(given, True).record(model)
            with_gradients = Tracer(given, False).record(model)
            again = Tracer(given, False).record(model)
        tracer = Tracer(given, False)
        with torch.no_grad():
            graph = tracer.record(model)
        _same(model, with_gradients, again, "something that changes from call to call", "Once it has")
        advice = "nn.Dropout in place of F.dropout can be recorded. In training it has"
        _same(model, in_training, with_gradients, "self.training", advice)
        _same(model, with_gradients, graph, "torch.is_grad_enabled()", "With gradients it has")

    def check(example: tuple[Any, ...] | None = inputs) -> None:
        with _explained(model), Outside(model):
            compare(model, tracer, with_gradients, example)

    # torch.fx takes what the graph reads from a root. It is a copy of the model, on which constants can be put.
    root = object.__new__(type(model))
    root.__dict__.update({**model.__dict__, **tracer.constants})
    module = class_for(type(model))(root, graph, _name(model))
    fuse(module)
    return Recording(module, check)


@contextmanager
def _explained(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except _Refusal:
        raise
    except Exception as error:
        raise RuntimeError(
            f"fastmlp: torch.fx cannot record the forward of {_name(model)}; convert(model) without trace "
            f"needs no recording. It says: {_text(error)}"
        ) from error


class _Refusal(RuntimeError):
    """An error that is complete as it is."""


def _same(model: nn.Module, first: fx.Graph, second: fx.Graph, what: str, advice: str) -> None:
    for ours, theirs in zip(str(first).splitlines(), str(second).splitlines(), strict=False):
        if ours != theirs:
            raise _Refusal(
                f"fastmlp: the forward of {_name(model)} depends on {what}, which {_ADVICE}. {advice} {ours.strip()}, "
                f"else {theirs.strip()}"
            )


#: The beginning of torch's errors where a size that depends on an argument is given as an argument of its own.
_SIZED = re.compile(r"(zeros|ones|empty|rand|randn)\(\) (takes|received)")


def _text(error: BaseException) -> str:
    """What an error says, and the line of the model's own code where it came from."""
    text = (
        str(error) if isinstance(error, fx.proxy.TraceError) else f"{type(error).__name__}: {error}".removesuffix(": ")
    )
    sized = _SIZED.match(str(error)) if isinstance(error, TypeError) else None
    if sized is not None:
        text += f"; torch.fx records a size that depends on an argument only as a tuple, torch.{sized[1]}((n, m))"
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_library(frame.filename)]
    return f"{text} ({own[-1].filename}, line {own[-1].lineno})" if own else text


def _name(model: nn.Module) -> str:
    return type(model).__name__

"""Sees the calls of Python and C that a recorded function makes, by a profile function of its thread.

Optimizers' steps, modules and functions of the program are told to the recorder; what a replay could not repeat is
refused: generators that are seeded, random numbers of Python, counters of schedulers.
"""

import random
import sys
from threading import get_ident
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

from fastmlp import optim
from fastmlp.tape.seen import is_program

__all__ = ["PythonCalls"]

_STEP_OF_TORCH = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__
_STEPS = (_STEP_OF_TORCH, optim.SGD.step.__code__)
_MODULE_CALL = nn.Module._call_impl.__code__
#: Methods of schedulers and scalers that count.
_COUNTS = frozenset({"step", "update", "unscale_"})
#: Functions of C that draw or seed.
_DRAWS, _SEEDS = frozenset({"random", "getrandbits"}), frozenset({"manual_seed", "seed", "set_state"})
_DRAWS_OR_SEEDS = _DRAWS | _SEEDS
#: Python 3.11 makes a dictionary of all variables for each call of a profile function, which is most of the time of a
#: recording if the recorder's own calls are not spared it. Later versions do not, and would instrument all code anew
#: whenever the profile function goes and comes.
_MAY_PAUSE = sys.version_info < (3, 12)


class PythonCalls:
    """The profile function of a recorder.

    Args:
        recorder: which is told, and asked whether it listens.
    """

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder
        self._before: Any = None  # the profile function of whoever recorded
        self._thread = 0  # whose calls it looks at; autograd's own threads, those of GPUs, are others
        self._look_at = self._look  # one bound method, rather than a new one each time
        self._until: FrameType | None = None  # the frame of an optimizer's step
        self._passed_over: dict[int, CodeType] = {}  # code of libraries that nothing has to be done for, by identity

    def start(self) -> None:
        """Looks at the calls of this thread from now on."""
        self._before = sys.getprofile()
        self._thread = get_ident()
        sys.setprofile(self._look_at)

    def stop(self) -> None:
        """Lets go of the thread."""
        self._thread = 0
        sys.setprofile(self._before)

    def pause(self) -> None:
        """Looks away while the recorder does something itself."""
        if _MAY_PAUSE and get_ident() == self._thread:
            sys.setprofile(None)

    def resume(self) -> None:
        """Ends a pause."""
        if _MAY_PAUSE and get_ident() == self._thread:
            sys.setprofile(self._look_at)

    def skip(self, frame: FrameType) -> None:
        """Looks away until a frame returns; then the recorder is told."""
        self._until = frame

    def _look(self, frame: FrameType, event: str, argument: Any) -> None:
        if self._until is not None:
            if event == "return" and frame is self._until:
                self._until = None
                self._recorder.step_ended()
        elif event == "call":
            if id(frame.f_code) not in self._passed_over and not self._recorder.is_passive():
                self._called_python(frame, frame.f_code)
        elif event == "c_call":
            name = getattr(argument, "__name__", "")
            if name in _DRAWS_OR_SEEDS and not self._recorder.is_passive():
                self._called_generator(argument, name, frame)

    def _called_generator(self, function: Any, name: str, frame: FrameType) -> None:
        owner = getattr(function, "__self__", None)
        if isinstance(owner, random.Random) and name in _DRAWS:
            self._recorder.refuse(
                f"{type(owner).__name__}.{name}() draws a random number that torch does not know, and a replay "
                "would not draw it again: draw with torch, or pass the number as a tensor",
                frame,
            )
        elif isinstance(owner, torch.Generator) and name in _SEEDS:
            self._recorder.refuse(
                f"Generator.{name}() is called within the captured function, and replays would not call it: seed "
                "outside of the function",
                frame,
            )

    def _called_python(self, frame: FrameType, code: CodeType) -> None:
        if code in _STEPS:
            self._called_step(frame)
        elif code is _MODULE_CALL:
            self._recorder.seen.module(frame.f_locals["self"])
        elif is_program(code.co_filename):
            self._recorder.seen.frame(frame)
        elif code.co_name not in _COUNTS:
            self._passed_over[id(code)] = code
        else:
            owner = frame.f_locals.get("self")
            if isinstance(owner, (torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)):
                self._recorder.refuse(
                    f"{type(owner).__name__}.{code.co_name}() counts in Python, which a replay does not: call it "
                    "outside of the captured function",
                    frame,
                )

    def _called_step(self, frame: FrameType) -> None:
        variables = frame.f_locals
        arguments = variables["args"] if "args" in variables else (variables["self"], variables["closure"])
        if (len(arguments) > 1 and arguments[1] is not None) or variables.get("kwargs"):
            self._recorder.refuse(
                "optimizer.step(closure) calls the closure as often as it likes: call step() without one", frame
            )
        else:
            self._recorder.step_begins(arguments[0], frame)

"""Checks at the beginning of a recorded forward, which refuse what it was not recorded for.

`recording.py` adds them to the code of its graphs. They run at every call, so each may cost some tens of nanoseconds.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.graph import CodeGen
from torch.fx.proxy import TraceError

from fastmlp._errors import described

__all__ = ["Guard", "Guarded", "require_default", "require_fact", "require_given", "require_tensor"]

_ADVICE = "call the model itself, or record it anew: convert(model, trace=True, inputs=(...))"


def require_default(value: Any, default: Any, name: str) -> None:
    """Raises if an argument is not its default."""
    if value is default or (type(value) is type(default) and not isinstance(value, Tensor) and value == default):
        return
    if isinstance(value, fx.Proxy):
        raise TraceError(f"the argument {name} was recorded as its default, {default!r}")
    raise ValueError(
        f"fastmlp: argument {name} of a recorded forward must be its default, {default!r}, got "
        f"{_shown(value)}: what the forward does depends on it, and it was recorded with the default; {_ADVICE}"
    )


def require_given(value: Any, name: str) -> None:
    """Raises if an argument is None."""
    if value is None:
        raise TypeError(f"fastmlp: argument {name} of a recorded forward must be given, got None; {_ADVICE}")


def require_tensor(value: Any, name: str) -> None:
    """Raises if an argument is no tensor."""
    if isinstance(value, fx.Proxy):
        # A tracer that records this forward has to add the same guard to its own recording.
        value.tracer.asks_types = True  # type: ignore[attr-defined]
    elif not isinstance(value, Tensor):
        raise TypeError(
            f"fastmlp: argument {name} of a recorded forward must be a tensor, got {_shown(value)}: what the forward "
            f"does depends on that; {_ADVICE}"
        )


def require_fact(value: Any, expected: str, name: str) -> None:
    """Raises if an attribute of a parameter or buffer is not what it was."""
    if str(value) != expected and not isinstance(value, fx.Proxy):
        raise RuntimeError(
            f"fastmlp: {name} is {value}, and was {expected} when the forward, which asks for it, was recorded; "
            "record the model anew: convert(model, trace=True)"
        )


class Guard(NamedTuple):
    """A line of the code of a recorded forward."""

    function: Any
    arguments: str

    @classmethod
    def default(cls, name: str, value: Any) -> "Guard":
        """That an argument has its default."""
        code = repr(value) if not isinstance(value, float) or math.isfinite(value) else f"float({str(value)!r})"
        return cls(require_default, f"{name}, {code}, {name!r}")

    @classmethod
    def given(cls, name: str) -> "Guard":
        """That an argument is not None."""
        return cls(require_given, f"{name}, {name!r}")

    @classmethod
    def tensor(cls, name: str) -> "Guard":
        """That an argument is a tensor."""
        return cls(require_tensor, f"{name}, {name!r}")

    @classmethod
    def fact(cls, path: str, name: str, value: Any) -> "Guard":
        """That an attribute of a tensor of the model is what it was."""
        place = "self"
        for part in path.split("."):
            place = f"{place}.{part}" if part.isidentifier() else f"getattr({place}, {part!r})"
        return cls(require_fact, f"{place}.{name}, {str(value)!r}, {f'self.{path}.{name}'!r}")


class Guarded(CodeGen):
    """Writes the code of a graph with guards at its beginning."""

    def __init__(self, guards: list[Guard]) -> None:
        super().__init__()
        self.guards = guards

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        """The head of the function, and the guards."""
        lines = [super().gen_fn_def(free_vars, maybe_return_annotation, **options)]
        lines += [f"    fastmlp_guards_{function.__name__}({arguments})" for function, arguments in self.guards]
        return "\n".join(lines)

    def additional_globals(self) -> list[tuple[str, Any]]:
        """What the guards call."""
        found: dict[str, Any] = {f"fastmlp_guards_{guard.function.__name__}": guard.function for guard in self.guards}
        if require_default in found.values():
            # The code of a default may use these names, as in torch.float32 and device(type='cpu').
            found |= {"torch": torch, "device": torch.device}
        return list(found.items())


def _shown(value: Any) -> str:
    return described(value) if isinstance(value, Tensor) else repr(value)

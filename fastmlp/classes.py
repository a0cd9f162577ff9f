"""Which class a module gets when it is converted, and which one it gets back; makes such classes where there are none.

`fastmlp.convert` swaps the classes of modules, and `fastmlp.trace` mixes the class of a model into that of its
recording, which so has the methods of both.
"""

import copyreg
import sys
import threading
import types
from typing import Any

from torch import nn

from fastmlp.linear import Linear
from fastmlp.modules import Sequential

__all__ = ["Quiet", "fused_class", "is_importable", "new_class", "plain_class", "stands_in"]

_FUSED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: Linear, nn.Sequential: Sequential}
_PLAIN = {fused: plain for plain, fused in _FUSED.items()}

#: The attribute of a class that was made here which holds the user's class that it stands in for.
_ORIGIN = "_fastmlp_stands_for"

_MAKING = threading.Lock()


class Quiet(nn.Module):
    """A base of the classes that are made here, which hides them from user's classes that count their subclasses."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Does not call the `__init_subclass__` of the user's class, which comes later in the order of bases."""


class _Converted(Quiet):
    """A base of the classes that stand in for subclasses of `torch.nn.Sequential`."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A pickle cannot name a class that was made here, so `_rebuild` makes it again from the user's class.
        found: Any = super().__reduce_ex__(protocol)
        build, arguments = found[:2]
        if build is copyreg.__newobj__ and arguments[0] is type(self):  # type: ignore[attr-defined]
            return (_rebuild, (plain_class(type(self)), *arguments[1:]), *found[2:])
        return found


def fused_class(plain: type[nn.Module]) -> type[nn.Module] | None:
    """The class that a module of this one is converted to, or None."""
    if plain in _FUSED:
        return _FUSED[plain]
    inherits = issubclass(plain, nn.Sequential) and plain.forward is nn.Sequential.forward
    if not inherits or plain.__call__ is not nn.Module.__call__:
        return None
    with _MAKING:
        for made in plain.__subclasses__():
            if made.__dict__.get(_ORIGIN) is plain:
                return made
        names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
        made = new_class(plain.__name__, (_Converted, Sequential, plain), {**names, _ORIGIN: plain})
        return made if made.__basicsize__ == plain.__basicsize__ else None


def plain_class(fused: type[nn.Module]) -> type[nn.Module] | None:
    """The class that a module was of before it was converted to this one, or None."""
    return _PLAIN.get(fused) or fused.__dict__.get(_ORIGIN)


def stands_in(kind: type) -> bool:
    """Whether a class was made here."""
    return _ORIGIN in kind.__dict__


def is_importable(kind: type) -> bool:
    """Whether a pickle can name the class."""
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind


def new_class(name: str, bases: tuple[type, ...], names: dict[str, Any]) -> Any:
    """A class, of whatever metaclass its bases ask for."""
    return types.new_class(name, bases, exec_body=lambda namespace: namespace.update(names))


def _rebuild(plain: type[nn.Module], *arguments: Any) -> nn.Module:
    kind = fused_class(plain) or plain
    return kind.__new__(kind, *arguments)

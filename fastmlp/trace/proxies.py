"""Proxies, which stand for the arguments of a forward and for all that is computed of them while it is recorded.

`recording.py` makes them. They refuse whatever Python asks of their value, because the value is not known: torch.fx
answers some questions (`hash`, `str`), but with answers that no tensor would give.
"""

import operator
from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.proxy import Attribute as _Attribute

from fastmlp.trace.settling import length

__all__ = ["IN_PLACE", "Proxy"]

#: Operators that change their first argument.
IN_PLACE = frozenset(
    ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift", "irshift")
)

#: Questions that Python asks of a value, in words, by the method that it calls for the answer.
_QUESTIONS = {
    "__len__": "asks for the length of",
    "__int__": "makes an int of",
    "__float__": "makes a float of",
    "__complex__": "makes a complex number of",
    "__round__": "rounds",
    "__hash__": "looks in a dictionary or set for",
    "__contains__": "looks for something in",
    "__str__": "makes text of",
    "__format__": "makes text of",
}


class _Unknown(fx.Proxy):
    """A value that is not known."""

    def __getattr__(self, name: str) -> "Attribute":
        return Attribute(self, name)


class Proxy(_Unknown):
    """A proxy that can be changed in place."""


class Attribute(_Unknown, _Attribute):
    """What an attribute of a proxy is; the node is made if somebody uses it.

    One that nobody uses was read for something that cannot be seen, as in `x.dtype is torch.float64` or `hasattr`.
    """

    def __init__(self, root: fx.Proxy, attr: str) -> None:
        super().__init__(root, attr)
        self.is_called = False
        root.tracer.attributes.append(self)  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        self.is_called = True
        return super().__call__(*args, **kwargs)

    @property
    def is_used(self) -> bool:
        """Whether the graph knows of it. What torch asks for has names with underscores."""
        return self.is_called or self._node is not None or self.attr.startswith("_")


def _refusal(text: str) -> str:
    return f"it {text} a value that is computed from its arguments, which a recorded forward cannot"


def _refusing(text: str) -> Callable[..., Any]:
    def refuse(self: Any, *args: Any) -> Any:
        self.tracer.refuse(_refusal(text))

    return refuse


def _length(self: Any) -> Any:
    return self.tracer.settle(length(self), _refusal(_QUESTIONS["__len__"]))


def _number(question: str, kind: type) -> Callable[[Any], Any]:
    return lambda self: kind(self.tracer.settle(self, _refusal(_QUESTIONS[question])))


for _name, _text in _QUESTIONS.items():
    setattr(_Unknown, _name, _refusing(_text))
for _name, _answer in {
    "__len__": _length,
    "__int__": _number("__int__", int),
    "__float__": _number("__float__", float),
}.items():
    setattr(_Unknown, _name, _answer)


def _in_place(name: str) -> Callable[[Proxy, Any], Any]:
    function = getattr(operator, name)

    def change(self: Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return change


for _name in IN_PLACE:
    setattr(Proxy, f"__{_name}__", _in_place(_name))

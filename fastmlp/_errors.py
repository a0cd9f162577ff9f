"""What errors say about a wrong argument, in the words that users have for it. Raises nothing itself."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

__all__ = ["described", "nearest", "not_a_child", "not_a_module", "not_a_tensor", "place_of", "shortened"]


def described(value: Any) -> str:
    """A value as an error names it: its type, and the value itself where that is short.

    Example:
        >>> described(3), described(None), described(torch.zeros(2, 3)), described(torch.nn.Linear)
        ('int 3', 'None', 'Tensor of shape [2, 3]', 'class Linear')
    """
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"class {value.__name__}"
    if isinstance(value, torch.Tensor):
        return "nested Tensor" if value.is_nested else f"{type(value).__name__} of shape {list(value.shape)}"
    if isinstance(value, (bool, int, float, complex, str)):
        text = shortened(value)
        return f"{type(value).__name__} {text}"
    if callable(value) and hasattr(value, "__name__"):
        return f"{type(value).__name__} {value.__name__}"
    return type(value).__name__


def shortened(value: Any) -> str:
    """What a value looks like in Python, or what fits into a line of it.

    Example:
        >>> shortened(0.5), shortened("a" * 80)[-6:], shortened(10**400)
        ('0.5', 'aaa...', 'of 1329 bits')
    """
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return f"of {value.bit_length()} bits"  # Python refuses to print the longest
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def not_a_tensor(name: str, value: Any, dtype: torch.dtype | None = None) -> TypeError:
    """The error for what should be a tensor; `dtype` is the one that is expected, if that is known.

    Example:
        >>> not_a_tensor("input", [1.0], torch.float32)
        TypeError('fastmlp: input must be a torch.Tensor, got list; pass torch.as_tensor(input, dtype=torch.float32)')
    """
    converted = f"torch.as_tensor({name}{'' if dtype is None else f', dtype={dtype}'})"
    numbers = isinstance(value, (int, float, list, tuple)) or hasattr(value, "__array__")
    remedy = f"; pass {converted}" if numbers else ""
    return TypeError(f"fastmlp: {name} must be a torch.Tensor, got {described(value)}{remedy}")


def not_a_module(model: Any) -> TypeError:
    """The error for a model that is something else.

    Example:
        >>> not_a_module(torch.nn.ReLU)
        TypeError('fastmlp: model must be a torch.nn.Module, got class ReLU')
    """
    return TypeError(f"fastmlp: model must be a torch.nn.Module, got {described(model)}")


def not_a_child(name: str) -> TypeError:
    """The error for a child of a container that is None."""
    return TypeError(f"fastmlp: child {name!r} is None, expected a module")


def place_of(name: str, module: torch.nn.Module) -> str:
    """What errors call a module of a model: where it is, and its class.

    Example:
        >>> place_of("0.fc", torch.nn.Linear(1, 1)), place_of("", torch.nn.ReLU())
        ('0.fc (Linear)', 'model (ReLU)')
    """
    return f"{name or 'model'} ({type(module).__name__})"


def nearest(given: str, known: Iterable[str], synonyms: Mapping[str, str]) -> str:
    """A question to append to an error: the name that was probably meant, or nothing.

    Example:
        >>> nearest("ReLU", ["relu", "silu"], {}), nearest("swish", ["relu", "silu"], {"swish": "silu"})
        ("; did you mean 'relu'?", "; did you mean 'silu'?")
    """
    plain = given.lower().replace("-", "_").replace(" ", "_")
    by_letters = {name.replace("_", ""): name for name in known}
    meant = synonyms.get(plain) or by_letters.get(plain.replace("_", ""))
    if meant is None:
        close = difflib.get_close_matches(plain, list(by_letters.values()), n=1, cutoff=0.75)
        meant = close[0] if close else None
    return "" if meant is None else f"; did you mean {meant!r}?"

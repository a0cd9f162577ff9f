"""Sees functions of torch that are no operations: what reads tensors for Python, and what sets `.grad`."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Functions"]

#: What these read of a tensor goes to Python, which a replay does not run.
_READS = {
    "numpy": "NumPy's arrays: return the tensor, and make an array of it outside of the function",
    "__array__": "NumPy's arrays: return the tensor, and make an array of it outside of the function",
    "tolist": "lists: return the tensor, and make a list of it outside of the function",
    "__repr__": "text: print what the function returns instead",
    "__format__": "text: print what the function returns instead",
    "data_ptr": "addresses: ask for them outside of the function",
    "untyped_storage": "storages: ask for them outside of the function",
    "storage": "storages: ask for them outside of the function",
    "_typed_storage": "storages: ask for them outside of the function",
    "__dlpack__": "DLPack: exchange tensors outside of the function",
    "__deepcopy__": "copies of objects: use clone()",
    "__reduce_ex__": "files: save it outside of the function",
    "apply_": "functions of Python: use operations of torch",
    "map_": "functions of Python: use operations of torch",
    "share_memory_": "other processes: call it outside of the function",
}
#: What these change of a tensor outlives the call, unless the tensor was made in it.
_CHANGES = frozenset({"register_hook", "register_post_accumulate_grad_hook", "requires_grad_", "retain_grad"})
#: All functions that have to be looked at before they are called.
_LOOKED_AT = _CHANGES | _READS.keys() | {"tensor", "as_tensor"}
#: Longer lists of numbers are data, which may change, rather than constants of a formula.
_CONSTANTS = 32


class Functions(TorchFunctionMode):
    """A mode beside a recorder's.

    Args:
        recorder: which is told.
    """

    def __init__(self, recorder: Any) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._recorder.is_passive():
            return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        attribute = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__set__" else ""
        if attribute:
            self._before_set(attribute, args[0])
        elif name in _LOOKED_AT:
            self._check(name, args)
        if func is torch._C._nn.one_hot and _classes(args, kwargs) > 0:
            return _one_hot(args[0], _classes(args, kwargs))
        output = func(*args, **(kwargs or {}))
        if attribute == "grad":
            self._recorder.grad_was_set(args[0])
        elif name == "__get__" and getattr(func.__self__, "__name__", "") == "grad":
            self._recorder.grad_was_looked_at(args[0])
        return output

    def _before_set(self, attribute: str, tensor: Tensor) -> None:
        if attribute == "grad":
            self._recorder.grad_will_be_set(tensor)
        elif attribute == "data" or (attribute == "requires_grad" and not self._recorder.is_made(tensor)):
            self._recorder.refuse(
                f"tensor.{attribute} = ... within the captured function: do it outside, or write with copy_()"
            )

    def _check(self, name: str, args: tuple[Any, ...]) -> None:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and torch._C._functorch.is_functorch_wrapped_tensor(first):
            return  # a transform's own, which is gone when the call ends
        if first is not None and name == "requires_grad_" and first.requires_grad == (args[1:2] != (False,)):
            return
        if name in _CHANGES and not self._recorder.is_made(args[0]):
            self._recorder.refuse(
                f"Tensor.{name}() changes a tensor that was there before, which would happen only once: do it outside "
                "of the function"
            )
        elif name in _READS:
            self._recorder.refuse(f"Tensor.{name}() leaves the tensors of a tape for {_READS[name]}")
        elif name in ("tensor", "as_tensor") and args:
            data = args[0]
            if type(data).__module__.partition(".")[0] == "numpy" and getattr(data, "ndim", 0) > 0:
                self._recorder.refuse(
                    "a tensor is made from an array of NumPy, whose numbers may change: pass a tensor as an argument"
                )
            elif isinstance(data, (list, tuple)) and len(data) > _CONSTANTS:
                self._recorder.refuse(
                    "a tensor is made from a long list, whose numbers may change: pass a tensor as an argument"
                )


def _classes(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> int:
    return args[1] if len(args) > 1 else (kwargs or {}).get("num_classes", -1)


def _one_hot(index: Tensor, classes: int) -> Tensor:
    """As torch's, which looks at the smallest and the largest index first; scatter raises for a wrong one too."""
    zeros = torch.zeros(*index.shape, classes, dtype=torch.int64, device=index.device)
    return zeros.scatter_(-1, index.unsqueeze(-1), 1)

"""`fastmlp.Linear`, and the call that it shares with `fastmlp.Sequential`.

`Called` hands a call straight to csrc/python/sequential.cpp, without the detours of `torch.nn.Module`, unless something
such as a hook has to see the call. Which modules run as one operation is for runs.py to say.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastmlp import functional
from fastmlp._load import _C
from fastmlp.activations import IDENTITY, Activation, ActivationLike, is_meant_as_activation, resolve

__all__ = ["Called", "Linear"]


class Called(nn.Module):
    """A module whose call skips what `torch.nn.Module` does for hooks while there are none, at a third of the price."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `torch.nn.Module.__call__`."""
        if not torch.compiler.is_compiling():
            output = _C.call_module(self, args, kwargs)
            if output is not NotImplemented:
                return output
            # Another thread may have reverted the module since this call began, so its class of now says what follows.
            kind = type(self)
            following: Any = super(Called, kind) if issubclass(kind, Called) else kind
            return following.__call__(self, *args, **kwargs)
        return super().__call__(*args, **kwargs)


class Linear(Called, nn.Linear):
    """`torch.nn.Linear` with an optional activation, computed as one operation.

    Positional arguments, parameters, initialisation from the same seed and `state_dict` are those of
    `torch.nn.Linear`.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether there is a bias.
        device: of the parameters.
        dtype: of the parameters.
        activation: by keyword: None, a name, a function such as `torch.relu`, a module of `torch.nn` (class or
            instance) or a `fastmlp.Activation`.

    Raises:
        ValueError: for an activation without a fused form.
        TypeError: for an activation of the wrong type, or one that is not given by keyword.

    Shape:
        input (*, in_features), output (*, out_features).

    Example:
        >>> layer = Linear(10, 50, activation="relu")
        >>> layer
        Linear(in_features=10, out_features=50, bias=True, activation=relu)
        >>> layer(torch.zeros(3, 10)).shape
        torch.Size([3, 50])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: ActivationLike = None,
    ) -> None:
        if any(map(is_meant_as_activation, (bias, device, dtype))):
            raise TypeError(
                f"fastmlp: activation is given by keyword: Linear({in_features}, {out_features}, activation=...)"
            )
        act = resolve(activation)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation: Activation = act

    def __setattr__(self, name: str, value: Any) -> None:
        # An activation may be given in many forms, also after construction. It is kept as an Activation, because
        # csrc/python/modules.cpp reads its fields.
        kept: Any = resolve(value) if name == "activation" else value
        super().__setattr__(name, kept)

    def forward(self, input: Tensor) -> Tensor:
        """Act(input weight^T + bias)."""
        if not torch.compiler.is_compiling():
            output = _C.run_layer(self, input)
            if output is not None:
                return output
        # The attribute is missing where another thread has reverted the module since this call began.
        activation = getattr(self, "activation", IDENTITY)
        return functional.linear(input, self.weight, self.bias, activation)

    def extra_repr(self) -> str:
        """As `torch.nn.Linear`, and the activation if there is one."""
        text = super().extra_repr()
        return text if self.activation == IDENTITY else f"{text}, activation={self.activation!r}"

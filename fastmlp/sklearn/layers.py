"""Weights in scikit-learn's form, and the networks of PyTorch that have them."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastmlp.frozen import FrozenMLP, freeze
from fastmlp.linear import Linear
from fastmlp.modules import MLP

__all__ = ["Array", "Network", "locked", "model_of"]

Array: TypeAlias = NDArray[Any]

_SINGLE, _DOUBLE = np.dtype(np.float32), np.dtype(np.float64)

#: PyTorch's names of scikit-learn's activations.
_ACTIVATIONS = {"identity": None, "logistic": "sigmoid", "tanh": "tanh", "relu": "relu"}


def model_of(weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str) -> MLP:
    """A network with these parameters, after whose last layer no activation follows.

    Args:
        weights: of the layers, each of shape (out_features, in_features).
        biases: of the layers, each of shape (out_features).
        activation: after each layer but the last one, in scikit-learn's words.

    Returns:
        A network whose parameters are the tensors of the arguments, where these are `torch.nn.Parameter`s.

    Example:
        >>> model = model_of([torch.ones(3, 2), torch.ones(1, 3)], [torch.zeros(3), torch.zeros(1)], "tanh")
        >>> model(torch.zeros(4, 2)).shape
        torch.Size([4, 1])
    """
    widths = [weights[0].shape[1], *(weight.shape[0] for weight in weights)]
    # On the meta device nothing is drawn, so that PyTorch's generator stays as it is.
    model = MLP(widths[0], widths[1:-1], widths[-1], _ACTIVATIONS[activation], device="meta")
    layers = [child for child in model if isinstance(child, Linear)]
    for layer, weight, bias in zip(layers, weights, biases, strict=True):
        layer.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
    return model


def locked(arrays: Iterable[Array]) -> list[Array]:
    """The same arrays, read-only from now on.

    A frozen network could not see that somebody wrote into the weights that it was made of.

    Example:
        >>> (array,) = locked([np.zeros(2)])
        >>> array.flags.writeable
        False
    """
    found = list(arrays)
    for array in found:
        array.flags.writeable = False
    return found


class Network:
    """Weights for prediction.

    Args:
        coefs: matrices of shape (in_features, out_features).
        intercepts: vectors of shape (out_features).
        activation: after each layer but the last one, in scikit-learn's words.

    Example:
        >>> network = Network([np.full((2, 1), 3.0)], [np.ones(1)], "relu")
        >>> network(np.ones((1, 2)))
        array([[7.]])
    """

    def __init__(self, coefs: Sequence[Array], intercepts: Sequence[Array], activation: str) -> None:
        self._arrays, self._activation = (*coefs, *intercepts), activation
        self._frozen: dict[np.dtype[Any], FrozenMLP] = {}

    def is_of(self, coefs: Sequence[Array], intercepts: Sequence[Array], activation: str) -> bool:
        """Whether a network of these would compute the same: the arrays are these and could not be written to."""
        arrays = (*coefs, *intercepts)
        return (
            activation == self._activation
            and len(arrays) == len(self._arrays)
            and all(a is b and not a.flags.writeable for a, b in zip(arrays, self._arrays, strict=True))
        )

    def __call__(self, X: Array) -> Array:
        """What the last layer computes, before the activation of the output.

        Args:
            X: (rows, in_features), of a real dtype.

        Returns:
            An array of shape (rows, out_features), of the dtype that NumPy promotes those of the input and the weights
            to: float32 or float64.
        """
        dtype = _SINGLE if np.result_type(X, self._arrays[0]) == _SINGLE else _DOUBLE
        # Threads that come here together each freeze the same weights, and one of these networks stays.
        if dtype not in self._frozen:
            tensors = [torch.from_numpy(np.array(array.T, dtype, order="C")) for array in self._arrays]
            layers = len(tensors) // 2
            self._frozen[dtype] = freeze(model_of(tensors[:layers], tensors[layers:], self._activation))
        return self._frozen[dtype](np.asarray(X, dtype))

"""Models that `freeze` takes, and calls of a frozen network that are refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import convert
from tests.support.small import Net, norm, sequential

#: An input of `sequential()`.
X = torch.zeros(2, 4)

#: Models of four inputs, as makers.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.Linear(4, 3),
    "fused layer": lambda: fastmlp.Linear(4, 3, bias=False, activation="tanh"),
    "sequential": sequential,
    "mlp": lambda: fastmlp.MLP(4, [6, 7], 3, activation=nn.GELU(approximate="tanh"), output_activation="sigmoid"),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(0.3)), nn.Sequential(nn.Linear(5, 3))),
    "recorded": Net,
    "recorded module": lambda: Net(nn.Sequential(nn.ELU(0.5), nn.Identity())),
    "converted": lambda: convert(Net(), trace=True),
    "inside": lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Net(), nn.SiLU()),
    "shared": lambda: nn.Sequential(*[nn.Linear(4, 4), nn.Tanh()] * 3),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 5), nn.AlphaDropout(), nn.SELU(), nn.Linear(5, 3)),
    "norm after": lambda: nn.Sequential(nn.Linear(4, 5), norm(5), nn.ReLU(), nn.Linear(5, 3, bias=False), norm(3)),
    "norm before": lambda: nn.Sequential(norm(4), nn.Linear(4, 5, bias=False), nn.ReLU(), norm(5), nn.Linear(5, 3)),
    "norms": lambda: nn.Sequential(
        *(norm(4), norm(4, affine=False), nn.Linear(4, 5), norm(5, eps=0.1), norm(5), nn.ReLU(), norm(5)),
        *(nn.Dropout(), norm(5, affine=False), fastmlp.Linear(5, 3, activation="relu"), norm(3), nn.Linear(3, 2)),
    ),
    "norm in a module": lambda: Net(nn.Sequential(norm(5), nn.Tanh())),
}


def inference_tensor() -> Tensor:
    with torch.inference_mode():
        return torch.zeros(2, 3)


def overlapping() -> tuple[Tensor, Tensor]:
    memory = torch.zeros(2 * 4 + 3)
    return memory[:8].view(2, 4), memory[5:11].view(2, 3)


def read_only() -> np.ndarray[Any, Any]:
    array = np.zeros((2, 3), np.float32)
    array.flags.writeable = False
    return array


#: What is wrong: the error, its message, and the arguments of a call of a frozen `sequential()`.
BAD: dict[str, tuple[type[Exception], str, Callable[[], tuple[Any, ...]]]] = {
    "no argument": (TypeError, "takes an input", lambda: ()),
    "many arguments": (TypeError, "got 3 arguments", lambda: (X, None, None)),
    "list": (TypeError, "must be a torch.Tensor or exactly a numpy.ndarray, got list", lambda: ([0.0] * 4,)),
    "none": (TypeError, "got NoneType", lambda: (None,)),
    "masked": (TypeError, "got MaskedArray", lambda: (np.ma.zeros((2, 4), np.float32),)),
    "scalar": (RuntimeError, "input has no dimension", lambda: (torch.zeros(()),)),
    "features": (RuntimeError, r"input has shape \[2, 5\], expected 4 in the last", lambda: (torch.zeros(2, 5),)),
    "features of arrays": (RuntimeError, r"shape \[5\], expected 4", lambda: (np.zeros(5, np.float32),)),
    "dtype": (
        RuntimeError,
        r"input has dtype torch.float64, expected torch.float32, .*; pass input.float\(\), or freeze model.double\(\)$",
        lambda: (X.double(),),
    ),
    "integers": (RuntimeError, r"dtype torch.int32, expected torch.float32, .* input.float\(\)$", lambda: (X.int(),)),
    "booleans": (RuntimeError, r"dtype torch.bool, expected torch.float32, .* input.float\(\)$", lambda: (X.bool(),)),
    "complex": (RuntimeError, r"dtype torch.complex64, .* the frozen network$", lambda: (X.to(torch.complex64),)),
    "integers of arrays": (
        RuntimeError,
        r"dtype int64, .*input.astype\(np.float32\)$",
        lambda: (np.zeros((2, 4), int),),
    ),
    "dtype of arrays": (
        RuntimeError,
        r"dtype float64, expected float32 .*; pass input.astype\(np.float32\), or freeze model.double\(\)$",
        lambda: (np.zeros((2, 4)),),
    ),
    "byte order": (RuntimeError, "dtype >f4, expected float32 in native", lambda: (np.zeros((2, 4), ">f4"),)),
    "objects": (RuntimeError, "dtype object, expected float32", lambda: (np.zeros((2, 4), object),)),
    "device": (RuntimeError, "input is on meta, expected cpu", lambda: (X.to("meta"),)),
    "layout": (RuntimeError, r"another layout than torch.strided; .* \(input.to_dense\(\)\)", lambda: (X.to_sparse(),)),
    "conjugated": (
        RuntimeError,
        "takes plain tensors",
        lambda: (torch.zeros(2, 4, dtype=torch.complex64).conj().imag,),
    ),
    "gradient": (RuntimeError, r"input requires grad, .* input.detach\(\)", lambda: (X.clone().requires_grad_(),)),
    "out shape": (RuntimeError, r"out has shape \[2, 4\], expected \[2, 3\]", lambda: (X, torch.zeros(2, 4))),
    "out dtype": (
        RuntimeError,
        r"out has dtype torch.float64, expected torch.float32, .*; make it with dtype=torch.float32$",
        lambda: (X, torch.zeros(2, 3).double()),
    ),
    "out strides": (
        RuntimeError,
        r"out has strides \[1, 2\], expected a contiguous",
        lambda: (X, torch.zeros(3, 2).t()),
    ),
    "out device": (RuntimeError, "out is on meta, expected cpu", lambda: (X, torch.zeros(2, 3, device="meta"))),
    "out gradient": (RuntimeError, "out requires grad", lambda: (X, torch.zeros(2, 3, requires_grad=True))),
    "out inference": (RuntimeError, "out is an inference tensor", lambda: (X, inference_tensor())),
    "out overlaps": (RuntimeError, "out lies in the memory of input", overlapping),
    "out kind": (TypeError, "out is of type numpy.ndarray, expected the kind of input", lambda: (X, np.zeros((2, 3)))),
    "out kind of arrays": (TypeError, "is of type Tensor", lambda: (np.zeros((2, 4), np.float32), torch.zeros(2, 3))),
    "array out shape": (RuntimeError, r"out has shape \[3\]", lambda: (X.numpy(), np.zeros(3, np.float32))),
    "array out dtype": (
        RuntimeError,
        r"float64, .*; make it with dtype=np.float32$",
        lambda: (X.numpy(), np.zeros((2, 3))),
    ),
    "array out strides": (RuntimeError, "not contiguous", lambda: (X.numpy(), np.zeros((3, 2), np.float32).T)),
    "array out aligned": (
        RuntimeError,
        "not aligned",
        lambda: (X.numpy(), np.zeros(25, np.uint8)[1:].view(np.float32).reshape(2, 3)),
    ),
    "array out read-only": (RuntimeError, "not writeable", lambda: (X.numpy(), read_only())),
    "array out overlaps": (
        RuntimeError,
        "out lies in the memory",
        lambda: (lambda memory: (memory[:8].reshape(2, 4)[:, ::-1], memory[7:13].reshape(2, 3)))(
            np.zeros(16, np.float32)
        ),
    ),
}

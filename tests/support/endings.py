"""Models that end with a softmax or with another shape of their output, as users write them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Called(nn.Module):
    """Does something to the output of its layers by calls of functions."""

    def __init__(self, body: nn.Module, ending: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.of_user = ending

    def forward(self, x: Tensor) -> Tensor:
        return self.of_user(self.body(x))


def body(outputs: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """Layers for rows of 6 features."""
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, outputs))
    return layers.to(dtype)


#: Losses that are taken after one activation alone, or one softmax.
LOSSES_AFTER: dict[type[nn.Module], str] = {nn.BCELoss: "sigmoid", nn.NLLLoss: "log_softmax"}

#: How a softmax may be written: the name of what is computed, and the model from its layers.
HEADS: dict[str, tuple[str, Callable[[nn.Sequential], nn.Module]]] = {
    "Softmax(-1)": ("softmax", lambda layers: nn.Sequential(*layers, nn.Softmax(dim=-1))),
    "Softmax(1)": ("softmax", lambda layers: nn.Sequential(layers, nn.Softmax(dim=1))),
    "LogSoftmax(-1)": ("log_softmax", lambda layers: nn.Sequential(nn.Sequential(*layers, nn.LogSoftmax(-1)))),
    "LogSoftmax(1)": ("log_softmax", lambda layers: nn.Sequential(layers, nn.LogSoftmax(dim=1), nn.Identity())),
    "F.softmax": ("softmax", lambda layers: Called(layers, lambda x: F.softmax(x, dim=-1))),
    "F.log_softmax": ("log_softmax", lambda layers: Called(layers, lambda x: F.log_softmax(x, dim=1))),
    "torch.softmax": ("softmax", lambda layers: Called(layers, lambda x: torch.softmax(x, 1))),
    "torch.log_softmax": ("log_softmax", lambda layers: Called(layers, lambda x: torch.log_softmax(x, dim=-1))),
    "x.softmax": ("softmax", lambda layers: Called(layers, lambda x: x.softmax(dim=-1))),
    "x.log_softmax": ("log_softmax", lambda layers: Called(layers, lambda x: x.log_softmax(1))),
}

#: Changes of the shape of an output of 1 or 6 features, of an input of two dimensions.
RESHAPES: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "x.squeeze(-1)": (1, lambda x: x.squeeze(-1)),
    "x.squeeze(1)": (1, lambda x: x.squeeze(1)),
    "x.squeeze()": (1, lambda x: x.squeeze()),
    "torch.squeeze(x, dim=-1)": (1, lambda x: torch.squeeze(x, dim=-1)),
    "nothing to squeeze": (6, lambda x: x.squeeze(-1)),
    "x.flatten()": (1, lambda x: x.flatten()),
    "x.flatten(0)": (6, lambda x: x.flatten(0)),
    "torch.flatten(x, end_dim=1)": (6, lambda x: torch.flatten(x, end_dim=1)),
    "x.view(-1)": (1, lambda x: x.view(-1)),
    "x.reshape(-1)": (6, lambda x: x.reshape(-1)),
    "x.view(-1, 2, 3)": (6, lambda x: x.view(-1, 2, 3)),
    "torch.reshape(x, (-1, 3))": (6, lambda x: torch.reshape(x, (-1, 3))),
    "x.view((-1, 3, 2))": (6, lambda x: x.view((-1, 3, 2))),
    "x.unflatten(-1, (2, 3))": (6, lambda x: x.unflatten(-1, (2, 3))),
    "torch.unflatten(x, 1, (3, -1))": (6, lambda x: torch.unflatten(x, 1, (3, -1))),
    "x.unsqueeze(1)": (6, lambda x: x.unsqueeze(1)),
    "torch.unsqueeze(x, -1)": (1, lambda x: torch.unsqueeze(x, -1)),
    "several": (6, lambda x: x.view(-1, 2, 3).unsqueeze(0).flatten(1, 2).squeeze(0)),
    "an activation after it": (1, lambda x: torch.tanh(x.squeeze(-1))),
}

#: The same by modules.
MODULES: dict[str, tuple[int, Callable[[], list[nn.Module]]]] = {
    "Flatten(0)": (6, lambda: [nn.Flatten(0)]),
    "Flatten()": (6, lambda: [nn.Flatten()]),
    "Unflatten": (6, lambda: [nn.Unflatten(1, (2, 3))]),
    "Unflatten and an activation": (6, lambda: [nn.Unflatten(-1, (-1, 2)), nn.Sigmoid()]),
    "both": (6, lambda: [nn.Unflatten(1, (2, 3)), nn.Flatten(0, 1), nn.Identity()]),
}

#: How a model may give its output another shape, from its layers.
FORMS: dict[str, tuple[int, Callable[[nn.Sequential], nn.Module]]] = {
    **{
        name: (outputs, lambda layers, call=call: Called(layers, call))  # type: ignore[misc]
        for name, (outputs, call) in RESHAPES.items()
    },
    **{
        name: (outputs, lambda layers, build=build: nn.Sequential(*layers, *build()))  # type: ignore[misc]
        for name, (outputs, build) in MODULES.items()
    },
}

#: Models that end otherwise, or do elsewhere what only an ending may, and what their refusal says.
OTHERWISE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "rows": (lambda: nn.Sequential(nn.Linear(6, 3), nn.Softmax(0)), r"1 \(Softmax\) .* its dim is 0, expected -1 or 1"),
    "any dimension": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.LogSoftmax()),
        r"1 \(LogSoftmax\) .* its dim is None, expected -1 or 1",
    ),
    "rows by a call": (lambda: Called(nn.Linear(6, 3), lambda x: x.softmax(0)), r"its dim is 0, expected -1 or 1"),
    "another dtype": (
        lambda: Called(nn.Linear(6, 3), lambda x: F.softmax(x, -1, dtype=torch.float64)),
        r"calls softmax, which is not part",
    ),
    "in the middle": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.Softmax(-1), nn.Linear(3, 1)),
        r"1 \(Softmax\) .* only a change of shape may follow it, and 2 \(Linear\) does",
    ),
    "before an activation": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.Softmax(-1), nn.Tanh()),
        r"1 \(Softmax\) .* only a change of shape may follow it, and 2 \(Tanh\) does",
    ),
    "twice": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.Softmax(-1), nn.LogSoftmax(-1)),
        r"2 \(LogSoftmax\) .* it follows 1 \(Softmax\)",
    ),
    "after another shape": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (2, 3)), nn.Softmax(-1)),
        r"2 \(Softmax\) .* it follows 1 \(Unflatten\), where the features may lie otherwise",
    ),
    "another shape in the middle": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (2, 3)), nn.Linear(3, 1)),
        r"1 \(Unflatten\) .* only behind the last layer, but 2 \(Linear\) follows",
    ),
    "a list": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, [2, 3])),
        r"1 \(Unflatten\) .* expected an int and a tuple of ints",
    ),
    "rows that are asked for": (
        lambda: Called(nn.Linear(6, 6), lambda x: x.view(x.size(0), 2, 3)),
        r"uses the result of body 2 times",
    ),
    "several dimensions": (
        lambda: Called(nn.Linear(6, 1), lambda x: x.squeeze((0, 1))),
        r"calls squeeze, which is not part",
    ),
    "in place": (lambda: Called(nn.Linear(6, 1), lambda x: x.squeeze_(-1)), r"calls squeeze_, which is not part"),
}

#: Those among them that are graphs, which `freeze` takes.
GRAPHS = ("in the middle", "before an activation", "twice", "in place")

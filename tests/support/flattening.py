"""Models that begin by flattening all dimensions of their input but the first, as users write them."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastmlp

#: How many features a row has. The number has several factors, so that inputs can have several dimensions.
FEATURES = 24


class Quickstart(nn.Module):
    """PyTorch's own first model, smaller: a module that flattens, then a stack of layers."""

    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear_relu_stack = body

    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(x)
        return self.linear_relu_stack(x)


class Called(nn.Module):
    """Flattens by a call of a function."""

    def __init__(self, flatten: Callable[[Tensor], Tensor], body: nn.Sequential) -> None:
        super().__init__()
        self.of_user = flatten
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.of_user(x))


#: Calls that flatten; those of the first kind take inputs of any strides, those of the second only what has a view.
RESHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "x.flatten(1)": lambda x: x.flatten(1),
    "torch.flatten(x, 1)": lambda x: torch.flatten(x, 1),
    "torch.flatten(x, start_dim=1)": lambda x: torch.flatten(x, start_dim=1, end_dim=-1),
    "x.reshape(x.size(0), -1)": lambda x: x.reshape(x.size(0), -1),
    "x.reshape((x.shape[0], -1))": lambda x: x.reshape((x.shape[0], -1)),
    "torch.reshape(x, (-1, n))": lambda x: torch.reshape(x, (-1, FEATURES)),
    "x.reshape(len, n)": lambda x: x.reshape(x.size()[0], FEATURES),
}
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "x.view(-1, n)": lambda x: x.view(-1, FEATURES),
    "x.view(x.size(0), -1)": lambda x: x.view(x.size(0), -1),
    "x.view(x.shape[0], n)": lambda x: x.view(x.shape[0], FEATURES),
}


def body(seed: int = 0, dtype: torch.dtype = torch.float64, outputs: int = 5) -> nn.Sequential:
    """Layers for rows."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, outputs)).to(
        dtype
    )


#: How such a model may be written, from the layers that follow.
FORMS: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "nn.Sequential": lambda layers: nn.Sequential(nn.Flatten(), *layers),
    "fastmlp.Sequential": lambda layers: fastmlp.Sequential(nn.Flatten(), *layers),
    "nested": lambda layers: nn.Sequential(nn.Sequential(nn.Flatten()), layers),
    "quickstart": Quickstart,
    **{name: functools.partial(Called, call) for name, call in (RESHAPES | VIEWS).items()},
}

#: Shapes of the dimensions after the first.
SHAPES: tuple[tuple[int, ...], ...] = ((24,), (1, 24), (4, 6), (2, 3, 4), (1, 4, 6), (2, 3, 1, 2, 2))


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same numbers in other places of the memory; x has at least three dimensions."""
    spaced = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    spaced[..., ::2] = x
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    rows = x.movedim(0, -1).contiguous().movedim(-1, 0)
    apart = torch.cat([x, x], dim=1)[:, : x.shape[1]]
    return {"contiguous": x, "every other": spaced[..., ::2], "channels last": last, "rows last": rows, "apart": apart}


#: Models that flatten otherwise or elsewhere, and what their refusal says.
OTHERWISE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "all dimensions": (
        lambda: nn.Sequential(nn.Flatten(0), nn.Linear(4, 3)),
        r"0 \(Flatten\) .* it flattens dimensions 0 to -1, and only 1 to -1",
    ),
    "some dimensions": (
        lambda: nn.Sequential(nn.Flatten(1, 2), nn.Linear(4, 3)),
        r"0 \(Flatten\) .* it flattens dimensions 1 to 2, and only 1 to -1",
    ),
    "later": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Flatten(), nn.Linear(3, 1)),
        r"1 \(Flatten\) .* only the first module of a chain may flatten .* 2 \(Linear\) follows",
    ),
    "twice": (
        lambda: nn.Sequential(nn.Flatten(), Quickstart(body())),
        r"1.flatten \(Flatten\) .* only the first module of a chain may flatten .* \(Linear\) follows",
    ),
    "unflatten": (
        lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Linear(2, 1)),
        r"0 \(Unflatten\) .* only behind the last layer, but 1 \(Linear\) follows",
    ),
    "a call from dimension 2": (
        lambda: Called(lambda x: x.flatten(2), body()),
        r"flatten \(Reshape\) .* only behind the last layer, but body.0 \(Linear\) follows",
    ),
    "a call with three sizes": (
        lambda: Called(lambda x: x.view(x.size(0), -1, FEATURES), body()),
        r"x 2 times|calls (view|size)",
    ),
    "columns for rows": (lambda: Called(lambda x: x.view(x.size(1), -1), body()), r"x 2 times|calls (view|size)"),
    "rows that are written": (
        lambda: Called(lambda x: x.view(6, FEATURES), body()),
        r"view \(Reshape\) .* only behind the last layer, but body.0 \(Linear\) follows",
    ),
    "a flat result": (
        lambda: Called(lambda x: x.view(FEATURES, -1), body()),
        r"cannot record the forward of Called.* no example of its arguments",
    ),
    "used twice": (
        lambda: Called(lambda x: x.flatten(1) + x.view(-1, FEATURES), body()),
        r"uses its input x 2 times",
    ),
    "rows of their own": (
        lambda: nn.Sequential(Called(lambda x: x.view(-1, 8), nn.Sequential(nn.Identity())), nn.Linear(8, 1)),
        r"0 \(Called\) .* makes rows of 8 elements, and no layer follows in it",
    ),
}

#: Shapes of inputs that do not fit, and what the error says.
WRONG: dict[tuple[int, ...], str] = {
    (): r"shape \[\], expected \[N, \.\.\.\] with 24 elements in all dimensions after the first",
    (24,): r"shape \[24\], expected .*; give input\.reshape\(-1, 24\)",
    (4, 6): r"shape \[4, 6\], expected .*; give input\.reshape\(-1, 24\)",
    (
        2,
        25,
    ): r"shape \[2, 25\], expected \[N, \.\.\.\] with 24 elements .* which are flattened: the in_features of [^;]*$",
    (2, 3, 5): r"shape \[2, 3, 5\], expected \[N, \.\.\.\] with 24 elements",
    (0, 3): r"shape \[0, 3\], expected \[N, \.\.\.\] with 24 elements",
}

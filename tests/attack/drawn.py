"""Sizes, layouts, dtypes, activations and numbers, drawn at random."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmlp import Activation
from fastmlp.activations import IDENTITY
from tests.attack.cases import Case
from tests.support.axes import ACTIVATIONS, DTYPES

#: Edges of tiles and panels, one less and one more.
SIZES = (0, 1, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65)
#: Most often, so that a case is cheap.
SMALL = (1, 1, 2, 3, 4, 5, 7, 8)

#: softplus jumps at its threshold, by more than the bounds see where layers before have rounded: not at 20.
SMOOTH = [Activation("softplus", beta=2.5) if act.name == "softplus" else act for act in ACTIVATIONS]


def size(case: Case, positive: bool = False) -> int:
    found = case.choice(SMALL if case.chance(0.6) else SIZES)
    return max(found, 1) if positive else found


def activation(case: Case) -> Activation:
    return case.choice(SMOOTH)


def activations(case: Case, count: int) -> list[Activation]:
    acts = [activation(case) for _ in range(count)]
    if case.chance(0.6):
        acts[-1] = IDENTITY
    return acts


def dtype(case: Case, of: Sequence[torch.dtype] = tuple(DTYPES)) -> torch.dtype:
    return case.choice(of)


def leading(case: Case) -> tuple[int, ...]:
    """All dimensions of an input but its last."""
    rank = case.choice([0, 1, 1, 1, 1, 2, 3])
    return tuple(size(case) if i == rank - 1 else case.choice([0, 1, 2, 3]) for i in range(rank))


# Layouts: the same numbers elsewhere in memory.


def transposed(case: Case, x: Tensor) -> Tensor:
    order = list(range(x.dim()))
    case.random.shuffle(order)
    back = [order.index(i) for i in range(x.dim())]
    return x.permute(order).contiguous().permute(back)


def reversed_(case: Case, x: Tensor) -> Tensor:
    back = list(reversed(range(x.dim())))
    return x.permute(back).contiguous().permute(back)


def gapped(case: Case, x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, 9)], -1)[..., 0]


def padded(case: Case, x: Tensor) -> Tensor:
    """Rows with room after them."""
    return (
        torch.cat([x, torch.full_like(x[..., :1], 9), torch.full_like(x, 9)], -1)[..., : x.shape[-1]] if x.dim() else x
    )


def misaligned(case: Case, x: Tensor) -> Tensor:
    return torch.empty(x.numel() + 3, dtype=x.dtype)[case.choice([1, 3]) :][: x.numel()].view(x.shape).copy_(x)


def odd_ones(case: Case, x: Tensor) -> Tensor:
    """Strides of dimensions of size 1, which mean nothing."""
    base = x.contiguous()
    strides = [case.choice([0, 1, 2, 17]) if n == 1 else s for n, s in zip(base.shape, base.stride(), strict=True)]
    return base.as_strided(base.shape, strides)


LAYOUTS: dict[str, Callable[[Case, Tensor], Tensor]] = {
    "transposed": transposed,
    "reversed": reversed_,
    "gapped": gapped,
    "padded": padded,
    "misaligned": misaligned,
    "odd ones": odd_ones,
}


def lay(case: Case, x: Tensor, odd: float = 0.4) -> tuple[Tensor, str]:
    """The same numbers, contiguous or laid out oddly, and what that is called."""
    name = case.choice(list(LAYOUTS)) if case.chance(odd) else "contiguous"
    made = LAYOUTS[name](case, x.detach().clone()) if name in LAYOUTS else x.detach().clone()
    assert made.shape == x.shape
    return made, f"{name} {tuple(made.shape)} by {made.stride()}"


def expanded(case: Case, x: Tensor) -> tuple[Tensor, str]:
    """Other numbers: some dimension repeats what its first entry holds. Not to be written to."""
    if x.dim() == 0 or x.numel() == 0:
        return lay(case, x)
    dim = case.random.randrange(x.dim())
    made = x.narrow(dim, 0, 1).clone().expand(x.shape)
    return made, f"expanded {tuple(made.shape)} by {made.stride()}"


def lay_to_read(case: Case, x: Tensor, odd: float = 0.4) -> tuple[Tensor, str]:
    """As `lay`, now and then expanded."""
    return expanded(case, x) if case.chance(odd / 5) else lay(case, x, odd)


# Numbers.

#: What makes a number special.
SPECIAL = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0)


def randn(case: Case, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)


def sprinkled(case: Case, x: Tensor) -> Tensor:
    """Some entries become NaN, infinite or zero of either sign."""
    flat = x.clone().flatten()
    for _ in range(case.choice([1, 1, 2, 4])):
        if flat.numel():
            flat[case.random.randrange(flat.numel())] = case.choice(SPECIAL)
    return flat.view(x.shape)

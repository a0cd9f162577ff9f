"""Ways in which the elements of a matrix may lie in memory: each function returns a tensor of the same values.

`equal_rows`, `equal_columns` and `one_value` repeat a part of the matrix, and so change its values.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def strided(x: Tensor) -> Tensor:
    wide = torch.zeros(x.shape[0] * 3, x.shape[1] * 2, dtype=x.dtype, device=x.device)
    wide[::3, ::2] = x
    return wide[::3, ::2]


def misaligned(x: Tensor) -> Tensor:
    buffer = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
    buffer[1:] = x.flatten()
    return buffer[1:].view_as(x)


def parts_of_chunks(x: Tensor) -> Tensor:
    """Rows begin at multiples of eight elements, and what follows them is no zero."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % 8), value=7.0)[:, : x.shape[1]]


_COMMON: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t().contiguous().t(),
    "strided": strided,
    "misaligned": misaligned,
    "padded_rows": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "equal_rows": lambda x: x[:1].expand_as(x),
    "equal_columns": lambda x: x[:, :1].expand_as(x),
}
#: For the kernels of the CPU.
LAYOUTS = {"contiguous": lambda x: x, **_COMMON, "one_value": lambda x: x[:1, :1].expand_as(x)}
#: For CUDA kernels, which read 16 bytes at a time where the distance of rows allows it.
CUDA_LAYOUTS = {**_COMMON, "odd_pitch": lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1]}

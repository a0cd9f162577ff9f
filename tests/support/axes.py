"""What tests enumerate, as the extension reports it: instruction sets, dtypes, activations; and the sizes of tiles."""

import os
from typing import Any

import torch

from fastmlp import _C, Activation
from fastmlp.activations import DEFAULTS

#: FASTMLP_TEST_ISAS narrows the list, for the runs of CI that are about one of them.
_WANTED = os.environ.get("FASTMLP_TEST_ISAS")
ISAS = [
    str(isa["name"])
    for isa in _C.instruction_sets()
    if isa["supported"] and (_WANTED is None or isa["name"] in _WANTED.split(","))
]
DTYPES: list[torch.dtype] = [getattr(torch, name) for name in _C.dtypes()]

#: Every activation with its defaults, and those with parameters also with others, of either sign where it may be.
ACTIVATIONS = [Activation(name) for name in DEFAULTS] + [
    Activation("leaky_relu", negative_slope=0.0),
    Activation("leaky_relu", negative_slope=-0.5),
    Activation("elu", alpha=0.3),
    Activation("elu", alpha=0.0),
    Activation("elu", alpha=-0.7),
    Activation("softplus", beta=2.5, threshold=1.0),
    Activation("sin", frequency=0.5),
    Activation("celu", alpha=0.25),
    Activation("celu", alpha=2.5),
]


def tiles(isa: str, dtype: torch.dtype) -> dict[str, int]:
    """MR, NR, MC, NC and KC of an instruction set's kernels."""
    found: Any = next(i for i in _C.instruction_sets() if i["name"] == isa)
    sizes: dict[str, int] = found[str(dtype).removeprefix("torch.")]
    return sizes

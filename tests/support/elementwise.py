"""What each operation of elementwise programs is, by torch; and programs, run by the kernels and drawn at random."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmlp import _C

#: Name, registers, scalars.
Instruction = tuple[str, list[int], list[float]]

#: The operands and then the scalars of an operation; computes in the dtype of the operands.
Function = Callable[..., Tensor]

_COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")


def _relation(name: str) -> Function:
    return lambda a, b: getattr(torch, name)(a, b).to(a.dtype)


#: Operations whose results are exactly torch's in the same dtype, NaN and the signs of zeros included.
EXACT: dict[str, Function] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "add_scalar": torch.add,
    "mul_scalar": torch.mul,
    "rsub_scalar": torch.rsub,
    "rdiv_scalar": lambda a, s: torch.full_like(a, s) / a,
    "div_scalar": torch.div,
    "neg": torch.neg,
    "reciprocal": torch.reciprocal,
    "abs": torch.abs,
    "sign": torch.sign,
    "square": torch.square,
    "clamp_min": torch.clamp_min,
    "clamp_max": torch.clamp_max,
    "where": lambda c, a, b: torch.where(c != 0, a, b),
    **{name: _relation(name) for name in _COMPARISONS},
    **{f"{name}_scalar": _relation(name) for name in _COMPARISONS},
    "not": lambda a: torch.logical_not(a).to(a.dtype),
    "and": lambda a, b: torch.logical_and(a, b).to(a.dtype),
    "or": lambda a, b: torch.logical_or(a, b).to(a.dtype),
    "round_bfloat16": lambda a: a.bfloat16().to(a.dtype),
    "round_float16": lambda a: a.half().to(a.dtype),
}
#: Operations of float32 alone.
OF_FLOAT32 = ("round_bfloat16", "round_float16")


@dataclass(frozen=True)
class Rounded:
    """An operation of several roundings.

    Attributes:
        function: by torch.
        magnitude: of the operands and scalars: a number that the error is measured in, the result if there is none.
        ulps: units in the last place of that number that the kernel may be off.
    """

    function: Function
    magnitude: Function | None = None
    ulps: float = 2.0


#: All others, but those of activations.
ROUNDED: dict[str, Rounded] = {
    "add_scaled": Rounded(lambda a, b, s: a.add(b, alpha=s), lambda a, b, s: a.abs() + (s * b).abs()),
    "sqrt": Rounded(torch.sqrt),
    "rsqrt": Rounded(torch.rsqrt),
    "exp": Rounded(torch.exp),
    "expm1": Rounded(torch.expm1),
    "log": Rounded(torch.log),
    "log1p": Rounded(torch.log1p),
    "cos": Rounded(torch.cos),
    "cube": Rounded(lambda a: a * a * a),
    "lerp": Rounded(torch.lerp, lambda a, b, s: (a.abs() + b.abs()) * (1 + abs(s))),
    "addcmul": Rounded(
        lambda a, b, c, s: torch.addcmul(a, b, c, value=s), lambda a, b, c, s: a.abs() + (s * b * c).abs()
    ),
    "addcdiv": Rounded(
        lambda a, b, c, s: torch.addcdiv(a, b, c, value=s), lambda a, b, c, s: a.abs() + (s * b / c).abs()
    ),
    "bce_with_logits": Rounded(
        lambda y, t: torch.nn.functional.binary_cross_entropy_with_logits(y, t, reduction="none"),
        lambda y, t: (1 + t.abs()) * (1 + y.abs()),
        8.0,
    ),
}


def run(
    inputs: Sequence[Tensor], instructions: Sequence[Instruction], outputs: Sequence[tuple[Tensor, int, str, float]]
) -> None:
    """Runs a program; tensors are broadcast to the sizes that they have together, and outputs to be reduced too."""
    shape = torch.broadcast_shapes(*(t.shape for t in inputs), *(output[0].shape for output in outputs))
    _C.run_elementwise(
        [t.expand(shape) for t in inputs],
        instructions,
        [(tensor.expand(shape), register, how, scale) for tensor, register, how, scale in outputs],
    )


def compute(name: str, operands: Sequence[Tensor], *scalars: float, dtype: torch.dtype | None = None) -> Tensor:
    """What one instruction makes of operands."""
    shape = torch.broadcast_shapes(*(t.shape for t in operands))
    output = torch.full(shape, -7.0, dtype=dtype or operands[0].dtype)
    instruction = (name, list(range(len(operands))), list(scalars))
    run(operands, [instruction], [(output, len(operands), "store", 1.0)])
    return output


def one_by_one(inputs: Sequence[Tensor], instructions: Sequence[Instruction], dtype: torch.dtype) -> list[Tensor]:
    """All registers of a program, each instruction computed alone, on gapless operands of one shape."""
    registers = [t.to(dtype).contiguous() for t in inputs]
    for name, operands, scalars in instructions:
        output = torch.empty(inputs[0].shape, dtype=dtype)
        _C.run_elementwise(
            [registers[operand] for operand in operands],
            [(name, list(range(len(operands))), scalars)],
            [(output, len(operands), "store", 1.0)],
        )
        registers.append(output)
    return registers


def draw_layout(rng: random.Random, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Random numbers that lie in one of many ways; some dimensions may be broadcast."""
    dims = list(range(len(shape)))
    sizes = [1 if rng.random() < 0.25 else size for size in shape]
    order = sorted(dims, key=lambda _: rng.random()) if rng.random() < 0.4 else dims
    steps = [rng.choice((1, 1, 1, 2, 3)) for _ in dims]
    whole = torch.randn([sizes[d] * steps[d] for d in order])
    if dtype == torch.bool:
        whole = whole > 0
    elif dtype == torch.int64:
        whole = (whole * 10).long()
    tensor = whole.to(dtype).permute([order.index(d) for d in dims])
    return tensor[tuple(slice(None, None, step) for step in steps)].expand(list(shape))


def draw_instructions(rng: random.Random, inputs: int, dtype: torch.dtype) -> list[Instruction]:
    """A random program that is computed in a dtype."""
    table = _C.elementwise_operations()
    names = sorted(name for name in table if dtype == torch.float32 or name not in OF_FLOAT32)
    instructions: list[Instruction] = []
    for register in range(inputs, inputs + rng.randint(0, 12)):
        operands, scalars = table[name := rng.choice(names)]
        # Mostly what was made last, so that chains are long.
        read = [max(0, register - 1 - int(rng.expovariate(0.7))) for _ in range(operands)]
        instructions.append((name, read, [rng.choice((-1.5, 0.25, 0.5, 1.0, 2.0)) for _ in range(scalars)]))
    return instructions

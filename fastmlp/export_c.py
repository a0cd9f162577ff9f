"""Frozen networks as C99: the text of a file that computes one row after another, without any library but libm.

Called by exports.py. A chain of layers is written as what a graph with one network is, so there is one way from the
description to the text. Products are written as sums of rows of weights, output by output beside one another, because
a compiler makes vector instructions of that without being allowed to change the order of a sum.
"""

import ctypes
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastmlp._errors import described
from fastmlp.activations import IDENTITY, Activation
from fastmlp.frozen_file import Chain, Graph, Layers
from fastmlp.recipe import Place, Recipe

__all__ = ["source"]

#: Bytes of the stack that a function may take.
MOST_STACK = 1 << 20

_TYPES = {torch.float32: ("float", "f"), torch.float64: ("double", "")}
#: Numbers in a line of weights.
_COLUMNS = 8

#: What C and its headers call something else.
_KEYWORDS = """
auto break case char const continue default do double else enum extern float for goto if inline int long register
restrict return short signed sizeof static struct switch typedef union unsigned void volatile while main
size_t ptrdiff_t wchar_t offsetof float_t double_t
"""
_MATH = """
acos asin atan atan2 cos sin tan cosh sinh tanh acosh asinh atanh exp frexp ldexp log log10 modf exp2 expm1 ilogb log1p
log2 logb scalbn scalbln pow sqrt ceil fabs floor fmod cbrt erf erfc hypot lgamma tgamma nearbyint rint lrint llrint
round lround llround trunc remainder remquo copysign nan nextafter nexttoward fdim fmax fmin fma fpclassify isfinite
isinf isnan isnormal signbit isgreater isgreaterequal isless islessequal islessgreater isunordered
"""
_TAKEN = frozenset(_KEYWORDS.split()) | {f"{name}{end}" for name in _MATH.split() for end in ("", "f", "l")}
#: What the text itself calls the parameters of functions.
_OWN = re.compile(r"(?:input|output)\d*|rows?")

#: Activations of z, with parameters a and b, as the last expression of some statements. `{f}` ends the names of
#: functions. Values at kinks, of NaN and of infinity are those of csrc/contract/activation.h.
_ACTIVATIONS: dict[str, Sequence[str]] = {
    "relu": ("z < 0 ? 0 : z",),
    "leaky_relu": ("z > 0 ? z : z * {a}",),
    "elu": ("z < 0 ? {a} * expm1{f}(z) : z",),
    "celu": ("z < 0 ? {a} * expm1{f}(z * {rate}) : z",),
    "selu": ("z < 0 ? {selu_below} * expm1{f}(z) : {selu_scale} * z",),
    "sigmoid": ("1 / (1 + exp{f}(-z))",),
    "tanh": ("tanh{f}(z)",),
    "gelu": ("z * ({half} * erfc{f}(-z * {sqrt_half}))",),
    "gelu_tanh": ("z / (1 + exp{f}(-{gelu_scale} * (z + {gelu_cubic} * (z * z * z))))",),
    "silu": ("z / (1 + exp{f}(-z))",),
    # Above 20 the quotient is 1, and the exponential could overflow.
    "mish": ("const {T} e = exp{f}(z > 20 ? 20 : z), n = e * (e + 2)", "z * (n / (n + 2))"),
    "hardswish": ("{T} gate = z + 3", "gate = gate < 0 ? 0 : gate", "gate = gate > 6 ? 6 : gate", "z * gate / 6"),
    "softplus": (
        "const {T} x = z * {a}",
        "const {T} soft = (x > 0 ? x : 0) + log1p{f}(exp{f}(-fabs{f}(x)))",
        "x > {b} ? z : soft / {a}",
    ),
    "sin": ("sin{f}(z * {a})",),
}
_CONSTANTS = {
    "half": 0.5,
    "sqrt_half": math.sqrt(0.5),
    "gelu_scale": math.sqrt(8 / math.pi),
    "gelu_cubic": 0.044715,
    # Klambauer et al., Self-Normalizing Neural Networks, 2017, equation 14: the scale, and alpha times it.
    "selu_scale": 1.0507009873554804934193349852946,
    "selu_below": 1.7580993408473768599402175208123,
}

#: Elementwise operations of x, y and z with the number a: those of csrc/contract/element_operations.h.
_OPERATIONS: dict[str, str] = {
    "add": "{x} + {y}",
    "add_scaled": "{x} + {a} * {y}",
    "sub": "{x} - {y}",
    "mul": "{x} * {y}",
    "div": "{x} / {y}",
    "maximum": "{x} > {y} || {x} != {x} ? {x} : {y}",
    "minimum": "{x} < {y} || {x} != {x} ? {x} : {y}",
    "add_scalar": "{x} + {a}",
    "mul_scalar": "{x} * {a}",
    "rsub_scalar": "{a} - {x}",
    "rdiv_scalar": "{a} / {x}",
    "div_scalar": "{x} / {a}",
    "neg": "-{x}",
    "reciprocal": "1 / {x}",
    "sign": "({x} > 0) - ({x} < 0)",
    "rsqrt": "1 / sqrt{f}({x})",
    "abs": "fabs{f}({x})",
    **{name: f"{name}{{f}}({{x}})" for name in ("sqrt", "exp", "expm1", "log", "log1p", "cos")},
    "square": "{x} * {x}",
    "cube": "{x} * {x} * {x}",
    "clamp_min": "{x} < {a} ? {a} : {x}",
    "clamp_max": "{x} > {a} ? {a} : {x}",
    "where": "{x} != 0 ? {y} : {z}",
    # In torch's form, which is exact at the end that is nearer.
    "lerp": "{x} + {a} * ({y} - {x})",
    "lerp from the end": "{y} + {a_less_one} * ({y} - {x})",
    "addcmul": "{x} + {a} * {y} * {z}",
    "addcdiv": "{x} + {a} * {y} / {z}",
    **{
        f"{name}{end}": f"{{x}} {sign} {other}"
        for name, sign in {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}.items()
        for end, other in (("", "{y}"), ("_scalar", "{a}"))
    },
    "not": "{x} == 0",
    "and": "{x} != 0 && {y} != 0",
    "or": "{x} != 0 || {y} != 0",
    "constant": "{a}",
}


def source(network: Chain | Graph, name: str) -> str:
    """The text of the file.

    Args:
        network: what to write, in the memory of the host.
        name: of the function that computes a row.

    Raises:
        TypeError: if the name is no string.
        ValueError: naming what cannot be written, and why.
    """
    if not isinstance(name, str):
        raise TypeError(f"fastmlp: name must be a str, got {described(name)}")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,62}", name) or name in _TAKEN or _OWN.fullmatch(name):
        raise ValueError(
            f"fastmlp: name must be a name that C allows and does not use itself, such as 'network', got {name!r:.80}"
        )
    networks = network.networks if isinstance(network, Graph) else [network.layers]
    dtype = networks[0].weights[0].dtype
    if dtype not in _TYPES:
        raise ValueError(
            f"fastmlp: to_c writes networks in float32 and float64, and the weights of this one are in {dtype}, which "
            "C99 has no type for; freeze the model in float32: freeze(model.float())"
        )
    if isinstance(network, Graph):
        return _Writer(name, dtype, networks, network.recipe, network.constants, "none").text()
    weights = network.layers.weights
    features = weights[0].shape[1], weights[-1].shape[0]
    places = [(memory, 0, size, size, 1) for memory, size in enumerate(features)]
    recipe: Recipe = [("input", features[0]), ("output", features[1])], [("network", 0, *places)], [False]
    return _Writer(name, dtype, networks, recipe, (), network.head).text()


@dataclass
class _Writer:
    """Writes one file."""

    name: str
    dtype: torch.dtype
    networks: Sequence[Layers]
    recipe: Recipe
    constants: Sequence[Tensor]
    head: str
    _functions: dict[Activation, str] = field(default_factory=dict)

    def text(self) -> str:
        """The whole file."""
        for layers in self.networks:
            for i, weight in enumerate(layers.weights):
                if 0 in weight.shape:
                    raise ValueError(
                        f"fastmlp: to_c cannot write a layer without features, and the weight of layer {i} has shape "
                        f"{list(weight.shape)}"
                    )
        memories = self.recipe[0]
        steps = self._steps_that_count()
        self._variables = list(self._names_of_memories())
        body = [f"    {line}" for step in steps for line in self._step(*step)]
        stack = self._stack()
        if stack > MOST_STACK:
            raise ValueError(
                f"fastmlp: to_c cannot write this network: it would take {stack} bytes on the stack, expected at most "
                f"{MOST_STACK}"
            )
        lines = [*self._heading(stack), *self._tables(), *self._written_functions()]
        lines += [f"void {self.name}({self._parameters()}) {{"]
        for number, (kind, size) in enumerate(memories):
            if kind == "arena" and number in self._used:
                lines.append(f"    {self._type} {self._variables[number]}[{size}];")
            if kind == "input" and number not in self._used:
                lines.append(f"    (void){self._variables[number]};")
        return "\n".join([*lines, *body, "}", "", *self._batch(), ""])

    # Parts of a file.

    @property
    def _type(self) -> str:
        return _TYPES[self.dtype][0]

    def _steps_that_count(self) -> list[tuple[Any, ...]]:
        """The steps whose results reach an output, because compilers warn of what is written and never read."""
        memories, steps, _ = self.recipe
        self._used = {number for number, (kind, _) in enumerate(memories) if kind == "output"}
        self._networks_used: set[int] = set()
        found = []
        for step in reversed(steps):
            kind, *values = step
            if kind == "elementwise":
                inputs, instructions, outputs = values
                ends = [register for place, register in outputs if place[0] in self._used]
                needed = _registers(inputs, instructions, ends)
                written, read = [place for place, _ in outputs], [x for i, x in enumerate(inputs) if i in needed]
            elif kind == "layer_norm":
                written, read = values[4:], [place for place in values[:3] if place is not None]
            else:
                x, y = values[1:] if kind == "network" else values[:2]
                written, read = [y], [x]
            if any(place[0] in self._used for place in written):
                self._used |= {place[0] for place in read}
                self._networks_used |= {values[0]} if kind == "network" else set()
                found.append(step)
        return found[::-1]

    def _names_of_memories(self) -> Iterator[str]:
        kinds = [kind for kind, _ in self.recipe[0]]
        for number, kind in enumerate(kinds):
            index = number - kinds.index(kind)
            if kind in ("input", "output"):
                yield kind if kinds.count(kind) == 1 else f"{kind}{index}"
            else:
                yield f"between{index}" if kind == "arena" else f"{self.name}_constant{index}"

    def _ends(self) -> Iterator[tuple[str, str, int]]:
        """Inputs and outputs: the type of the pointer, its name, and its elements a row."""
        for variable, (kind, size) in zip(self._variables, self.recipe[0], strict=True):
            if kind in ("input", "output"):
                yield f"{'const ' if kind == 'input' else ''}{self._type} *", variable, size

    def _parameters(self) -> str:
        return ", ".join(f"{kind}{variable}" for kind, variable, _ in self._ends())

    def _heading(self, stack: int) -> Iterator[str]:
        layers = [
            size for one in self.networks for size in [one.weights[0].shape[1], *(w.shape[0] for w in one.weights)]
        ]
        what = " -> ".join(map(str, layers)) if len(self.networks) == 1 else f"graph of {len(self.networks)} networks"
        sizes = ", ".join(f"{variable}[{size}]" for _, variable, size in self._ends())
        yield f"/* A neural network in C99, written by fastmlp: {what}, in {self._type}."
        yield " *"
        yield f" * {self.name} computes one row and {self.name}_batch rows one after another. A row is {sizes}."
        yield f" * They allocate nothing, and take about {stack} bytes on the stack; outputs must not overlap inputs."
        yield " * Compile it with optimisation (cc -std=c99 -O3), and link the library of mathematics (-lm)."
        yield " */"
        yield "#include <math.h>"
        yield "#include <stddef.h>"
        yield ""

    def _tables(self) -> Iterator[str]:
        """The weights, each column of a weight as a line of its table, the biases and the constants."""
        for n in sorted(self._networks_used):
            layers = self.networks[n]
            for i, (weight, bias) in enumerate(zip(layers.weights, layers.biases, strict=True)):
                rows, columns = weight.shape
                yield f"static const {self._type} {self.name}_weight{n}_{i}[{columns}][{rows}] = {{"
                for column in weight.t().tolist():
                    yield "    {"
                    yield from self._numbers(column, "        ")
                    yield "    },"
                yield "};"
                if bias is not None:
                    yield from self._table(f"bias{n}_{i}", bias)
        constants = [number for number, (kind, _) in enumerate(self.recipe[0]) if kind == "constant"]
        for i, (number, constant) in enumerate(zip(constants, self.constants, strict=True)):
            if number in self._used:
                yield from self._table(f"constant{i}", constant.view(-1))
        yield ""

    def _table(self, name: str, values: Tensor) -> Iterator[str]:
        yield f"static const {self._type} {self.name}_{name}[{len(values)}] = {{"
        yield from self._numbers(values.tolist(), "    ")
        yield "};"

    def _numbers(self, values: Sequence[float], indent: str) -> Iterator[str]:
        for at in range(0, len(values), _COLUMNS):
            yield f"{indent}{', '.join(map(self._number, values[at : at + _COLUMNS]))},"

    def _number(self, value: float) -> str:
        """A number as C has it, to the last bit, rounded to the type."""
        if self.dtype == torch.float32:
            value = ctypes.c_float(value).value
        if not math.isfinite(value):
            return "NAN" if math.isnan(value) else "INFINITY" if value > 0 else "-INFINITY"
        digits, _, power = value.hex().partition("p")
        digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
        return f"{digits if digits not in ('0x', '-0x') else f'{digits}0'}p{power}{_TYPES[self.dtype][1]}"

    def _written_functions(self) -> Iterator[str]:
        """The activations, each a function of a number."""
        for activation, function in self._functions.items():
            a, b = activation.scalars
            numbers = {**_CONSTANTS, "a": a, "b": b, "rate": 1 / a if activation.name == "celu" else 0.0}
            words = {name: self._number(value) for name, value in numbers.items()}
            words |= {"T": self._type, "f": _TYPES[self.dtype][1]}
            *statements, value = [line.format_map(words) for line in _ACTIVATIONS[activation.name]]
            yield f"static {self._type} {function}({self._type} z) {{"
            yield from (f"    {statement};" for statement in statements)
            yield f"    return {value};"
            yield "}"
            yield ""

    def _batch(self) -> Iterator[str]:
        arguments = ", ".join(f"{variable} + row * {size}" for _, variable, size in self._ends())
        yield f"void {self.name}_batch({self._parameters()}, size_t rows) {{"
        yield f"    for (size_t row = 0; row < rows; row++) {self.name}({arguments});"
        yield "}"

    def _stack(self) -> int:
        """Bytes of the arrays that a call has at the same time."""
        kept = sum(
            size for number, (kind, size) in enumerate(self.recipe[0]) if kind == "arena" and number in self._used
        )
        widest = max((sum(_buffers(self.networks[n])) for n in self._networks_used), default=0)
        return (kept + widest) * self.dtype.itemsize

    # Steps.

    def _step(self, kind: str, *values: Any) -> Iterator[str]:
        yield "{"
        if kind == "network":
            lines = self._network(*values)
        elif kind == "elementwise":
            lines = self._elementwise(*values)
        elif kind == "softmax":
            x, y, log = values
            lines = self._softmax_step(x, y, log)
        else:
            lines = self._layer_norm(*values)
        for line in lines:
            yield f"    {line}"
        yield "}"

    def _at(self, place: Place, index: str = "j") -> str:
        """An element of a place."""
        memory, offset, _, _, step = place
        terms = [] if step == 0 else [index if step == 1 else f"{index} * {step}"]
        terms += [str(offset)] if offset or not terms else []
        return f"{self._variables[memory]}[{' + '.join(terms)}]"

    def _network(self, number: int, x: Place, y: Place) -> Iterator[str]:
        layers = self.networks[number]
        for name, size in zip(("even", "odd"), _buffers(layers), strict=False):
            yield f"{self._type} {name}[{size}];"
        source = self._at(x, "k")
        target = ""
        for i, (weight, bias, act) in enumerate(zip(*layers, strict=True)):
            rows, columns = weight.shape
            target = "odd" if i % 2 else "even"
            first = "0" if bias is None else f"{self.name}_bias{number}_{i}[j]"
            yield f"{_loop('j', rows)} {target}[j] = {first};"
            yield f"{_loop('k', columns)} {{"
            yield f"    const {self._type} x = {source};"
            yield f"    {_loop('j', rows)} {target}[j] += x * {self.name}_weight{number}_{i}[k][j];"
            yield "}"
            if act != IDENTITY:
                yield f"{_loop('j', rows)} {target}[j] = {self._function(act)}({target}[j]);"
            source = f"{target}[k]"
        if self.head != "none":
            yield from self._softmax(f"{target}[j]", f"{target}[j]", rows, self.head == "log_softmax")
        yield f"{_loop('j', rows)} {self._at(y)} = {target}[j];"

    def _function(self, activation: Activation) -> str:
        """The name of the function that computes an activation."""
        if activation not in self._functions:
            if activation.name not in _ACTIVATIONS:
                raise ValueError(f"fastmlp: to_c cannot write the activation {activation!r}")
            self._functions[activation] = f"{self.name}_{activation.name}_{len(self._functions)}"
        return self._functions[activation]

    def _softmax_step(self, x: Place, y: Place, log: bool) -> Iterator[str]:
        return self._softmax(self._at(x), self._at(y), x[2], log)

    def _softmax(self, x: str, y: str, features: int, log: bool) -> Iterator[str]:
        f = _TYPES[self.dtype][1]
        yield f"{self._type} most = -INFINITY, sum = 0;"
        yield f"{_loop('j', features)} most = {x} > most ? {x} : most;"
        if log:
            yield f"{_loop('j', features)} sum += exp{f}({x} - most);"
            yield f"sum = log{f}(sum);"
            yield f"{_loop('j', features)} {y} = {x} - most - sum;"
        else:
            yield f"{_loop('j', features)} {{"
            yield f"    {y} = exp{f}({x} - most);"
            yield f"    sum += {y};"
            yield "}"
            yield f"{_loop('j', features)} {y} /= sum;"

    def _layer_norm(
        self, x: Place, weight: Place | None, bias: Place | None, eps: float, y: Place, mean: Place, rstd: Place
    ) -> Iterator[str]:
        features, f = x[2], _TYPES[self.dtype][1]
        yield f"{self._type} mean = 0, square = 0;"
        yield f"{_loop('j', features)} mean += {self._at(x)};"
        yield f"mean /= {features};"
        yield f"{_loop('j', features)} square += ({self._at(x)} - mean) * ({self._at(x)} - mean);"
        yield f"const {self._type} rstd = 1 / sqrt{f}(square / {features} + {self._number(eps)});"
        scale = "" if weight is None else f" * {self._at(weight)}"
        shift = "" if bias is None else f" + {self._at(bias)}"
        if y[0] in self._used:
            yield f"{_loop('j', features)} {self._at(y)} = ({self._at(x)} - mean) * rstd{scale}{shift};"
        for place, value in ((mean, "mean"), (rstd, "rstd")):
            if place[0] in self._used:
                yield f"{self._at(place, '0')} = {value};"

    def _elementwise(
        self,
        inputs: Sequence[Place],
        instructions: Sequence[tuple[str, Sequence[int], Sequence[float]]],
        outputs: Sequence[tuple[Place, int]],
    ) -> Iterator[str]:
        kept = [(place, register) for place, register in outputs if place[0] in self._used]
        needed = _registers(inputs, instructions, [register for _, register in kept])
        yield f"{_loop('j', outputs[0][0][2])} {{"
        for register, place in enumerate(inputs):
            if register in needed:
                yield f"    const {self._type} r{register} = {self._at(place)};"
        for register, (name, operands, numbers) in enumerate(instructions, len(inputs)):
            if register in needed:
                value = self._value(name, [f"r{operand}" for operand in operands], numbers)
                yield f"    const {self._type} r{register} = {value};"
        for place, register in kept:
            yield f"    {self._at(place)} = r{register};"
        yield "}"

    def _value(self, name: str, operands: Sequence[str], numbers: Sequence[float]) -> str:
        """What an instruction computes."""
        if name.startswith("value_"):
            act = Activation(name.removeprefix("value_"))
            act = Activation(act.name, **dict(zip(act.parameters, numbers, strict=True)))
            return operands[0] if act == IDENTITY else f"{self._function(act)}({operands[0]})"
        a = numbers[0] if numbers else 0.0
        if name in ("clamp_min", "clamp_max") and math.isnan(a):
            name = "add_scalar"  # not a number, whatever x is
        if name == "lerp" and not -0.5 < a < 0.5:
            name = "lerp from the end"
        if name not in _OPERATIONS:
            raise ValueError(f"fastmlp: to_c cannot write the operation {name}")
        words: Mapping[str, str] = {
            **dict(zip("xyz", operands, strict=False)),
            **{"a": self._number(a), "a_less_one": self._number(a - 1), "f": _TYPES[self.dtype][1]},
        }
        return _OPERATIONS[name].format_map(words)


def _loop(index: str, count: int) -> str:
    return f"for (size_t {index} = 0; {index} < {count}; {index}++)"


def _buffers(layers: Layers) -> tuple[int, ...]:
    """Numbers that the layers of even, and those of odd places write."""
    widths = [weight.shape[0] for weight in layers.weights]
    return tuple(max(part) for part in (widths[::2], widths[1::2]) if part)


def _registers(
    inputs: Sequence[Place], instructions: Sequence[tuple[str, Sequence[int], Sequence[float]]], ends: Sequence[int]
) -> set[int]:
    """The registers that some depend on, these included."""
    needed = set(ends)
    for register, (_, operands, _) in reversed(list(enumerate(instructions, len(inputs)))):
        needed |= set(operands) if register in needed else set()
    return needed

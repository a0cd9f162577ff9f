"""From a PTX module to C++, one text for each kernel, that semantics.h gives its meaning.

Every register becomes a variable, every instruction a statement, every label a label. What is not known is an error.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tests.emulator.ptx.syntax import (
    BYTES,
    Function,
    Instruction,
    Label,
    Module,
    PtxError,
    Scope,
    Source,
    Statement,
    Variable,
    parse,
)
from tests.emulator.ptx.tables import FORMS, LOADS, MATRIX_LOADS, PRODUCTS, SPECIAL_REGISTERS, STORES

_REGISTER = re.compile(r"%([A-Za-z_$]+)(\d*)$")
_STORAGE = {"pred": "bool", "f16": "u16", "f32": "f32", "f64": "f64"} | {
    f"{kind}{bits}": f"u{bits}" for kind in "bsu" for bits in (8, 16, 32, 64)
}
#: Two PTX types of the same C++ type.
_CPP = {f"b{bits}": f"u{bits}" for bits in (8, 16, 32, 64)} | {"pred": "bool"}


@dataclass(frozen=True)
class Site:
    """An instruction that accesses memory."""

    opcode: str
    source: Source
    section: str  # main loop, before or after


@dataclass(frozen=True)
class Kernel:
    name: str  # mangled
    text: str  # C++
    sites: dict[int, Site]  # by lines of the PTX


def cpp(type: str) -> str:
    return _CPP.get(type, type)


def registers(text: str) -> list[str]:
    return re.findall(r"%[A-Za-z_$]+\d*(?:\.[xyz]\b)?", text)


def loops(body: Sequence[Statement]) -> list[tuple[int, int]]:
    """From a label to each branch back to it, as places in the body."""
    labels = {s.name: i for i, s in enumerate(body) if isinstance(s, Label)}
    return [
        (labels[s.operands[0].removeprefix("$")], i)
        for i, s in enumerate(body)
        if isinstance(s, Instruction) and s.opcode.startswith("bra") and labels[s.operands[0].removeprefix("$")] <= i
    ]


def main_loops(body: Sequence[Statement]) -> list[tuple[int, int]]:
    """The innermost loops in which numbers are multiplied that both were read from shared memory there."""
    found = []
    for begin, end in loops(body):
        inside = [s for s in body[begin:end] if isinstance(s, Instruction)]
        read = {
            register
            for s in inside
            if s.opcode.startswith("ld.shared") or s.opcode in MATRIX_LOADS
            for register in registers(s.operands[0])
        }
        if any(
            (s.opcode.startswith("fma.rn") or s.opcode in PRODUCTS)
            and all(registers(factor) and read.issuperset(registers(factor)) for factor in s.operands[1:3])
            for s in inside
        ):
            found.append((begin, end))
    return [a for a in found if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in found)]


class Translator:
    """Of one function."""

    def __init__(self, module: Module, function: Function, device_functions: set[str]) -> None:
        self.module = module
        self.function = function
        self.device_functions = device_functions
        self.scopes: list[dict[str, Variable]] = [{}]
        #: What names of memory stand for in C++, and whether that is a shared offset.
        self.symbols: dict[str, str] = {}
        self.shared: set[str] = set()
        self.sites: dict[int, Site] = {}
        self.sections = main_loops(function.body)
        self.place = 0

    # ---- names and operands

    def storage(self, register: str, line: int) -> str:
        """The type of the variable that a register is."""
        found = _REGISTER.match(register)
        if found:
            for scope in reversed(self.scopes):
                whole = scope.get(found[1] + found[2])
                family = scope.get(found[1])
                if whole is not None and not whole.parametrised:
                    return _STORAGE[whole.type]
                if family is not None and family.parametrised and found[2] and int(found[2]) < family.count:
                    return _STORAGE[family.type]
        raise PtxError(line, f"unknown register {register!r}")

    def variable(self, register: str) -> str:
        return "v_" + register[1:].replace("$", "_")

    def value(self, operand: str, type: str, line: int) -> str:
        """An operand as a value of that type."""
        to = cpp(type)
        if operand in SPECIAL_REGISTERS:
            return f"as<{to}>({SPECIAL_REGISTERS[operand]})"
        if operand.startswith("%"):
            of = self.storage(operand, line)
            return self.variable(operand) if of == to else f"as<{to}>({self.variable(operand)})"
        if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", operand):
            return f"as<{to}>(std::bit_cast<f32>(0x{found[1]}u))"
        if found := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", operand):
            return f"as<{to}>(std::bit_cast<f64>(0x{found[1]}ull))"
        if re.fullmatch(r"-?\d+U?|0[xX][0-9A-Fa-f]+U?", operand):
            number = int(operand.removesuffix("U"), 0)
            if type == "pred":
                return "true" if number else "false"
            return f"as<{to}>({_STORAGE[type]}(0x{number % (1 << 8 * BYTES[type]):x}ull))"
        if operand in self.symbols:
            return f"as<{to}>({self.symbols[operand]})"
        raise PtxError(line, f"unknown operand {operand!r}")

    def assign(self, register: str, type: str, expression: str, line: int) -> str:
        storage = self.storage(register, line)
        value = expression if storage == cpp(type) else f"as<{storage}>({expression})"
        return f"{self.variable(register)} = {value};"

    def address(self, operand: str, space: str, line: int) -> str:
        """Of an operand in brackets: the host's, or an offset into shared memory."""
        found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if found is None:
            raise PtxError(line, f"unknown address {operand!r}")
        base, offset = found[1], int(found[2] or 0)
        shared = space == "shared"
        if base in self.symbols and (base in self.shared) != shared:
            raise PtxError(line, f"{base} is not in {space} memory")
        if base.isdigit():
            raise PtxError(line, f"unknown address {operand!r}")
        width = "u32" if shared and self.is_32_bits(base, line) else "u64"
        place = self.value(base, width, line)
        place += f" + {width}({offset})" if offset else ""
        return f"u32({place})" if shared else place

    def is_32_bits(self, base: str, line: int) -> bool:
        return base in self.symbols or self.storage(base, line) == "u32"

    def elements(self, operand: str, count: int, line: int) -> list[str]:
        """The registers of a vector operand."""
        names = [n.strip() for n in operand.strip("{}").split(",")]
        if len(names) != count:
            raise PtxError(line, f"{operand!r} is not {count} registers")
        return names

    def note(self, s: Instruction) -> None:
        """That it accesses memory."""
        section = "after" if self.sections and self.place > self.sections[0][0] else "before"
        if any(begin <= self.place <= end for begin, end in self.sections):
            section = "main loop"
        self.sites[s.line] = Site(s.opcode, s.source, section)

    # ---- instructions

    def instruction(self, s: Instruction) -> str:
        statement = self.statement(s)
        if not s.predicate:
            return statement
        register = s.predicate.lstrip("!")
        if self.storage(f"%{register}", s.line) != "bool":
            raise PtxError(s.line, f"{s.predicate} is no predicate")
        return f"if ({'!' if s.predicate.startswith('!') else ''}v_{register}) {statement}"

    def statement(self, s: Instruction) -> str:
        o, line = s.operands, s.line
        if s.opcode.startswith("mov.b") and any(operand.startswith("{") for operand in o):
            return self.packing(s)
        if form := FORMS.get(s.opcode):
            if len(o) != 1 + len(form.operands):
                raise PtxError(line, f"{s.opcode} has {len(o)} operands")
            values = [self.value(x, t, line) for x, t in zip(o[1:], form.operands, strict=True)]
            call = f"{form.call}({', '.join(['carry'] * form.carries + values)})"
            return self.assign(o[0], form.result, call, line)
        if s.opcode in LOADS:
            space, type, count = LOADS[s.opcode]
            address = self.address(o[1], space, line)
            self.note(s)
            call = f"load<Space::{space}, {cpp(type)}, {count}>({address}, {line})"
            return self.spread(o[0], type, count, call, line)
        if s.opcode in STORES:
            space, type, count = STORES[s.opcode]
            stored = ", ".join(self.value(x, type, line) for x in self.elements(o[1], count, line))
            address = self.address(o[0], space, line)
            self.note(s)
            return f"store<Space::{space}, {cpp(type)}, {count}>({address}, {line}, {{{{{stored}}}}});"
        if s.opcode in PRODUCTS:
            call, of_a, of_b = PRODUCTS[s.opcode]
            lists = [
                ", ".join(self.value(x, type, line) for x in self.elements(operand, count, line))
                for operand, count, type in ((o[1], of_a, "u32"), (o[2], of_b, "u32"), (o[3], 4, "f32"))
            ]
            arguments = ", ".join(f"{{{{{values}}}}}" for values in lists)
            return self.spread(o[0], "f32", 4, f"{call}({arguments}, {line})", line)
        if s.opcode in MATRIX_LOADS:
            self.note(s)
            call = f"{MATRIX_LOADS[s.opcode]}({self.address(o[1], 'shared', line)}, {line})"
            return self.spread(o[0], "u32", 4, call, line)
        return self.control(s)

    def spread(self, operand: str, type: str, count: int, call: str, line: int) -> str:
        """All elements are read before any register is written: one may be part of the address."""
        names = self.elements(operand, count, line)
        writes = " ".join(self.assign(n, type, f"all.element[{i}]", line) for i, n in enumerate(names) if n != "_")
        return f"{{ const auto all = {call}; {writes} }}"

    def packing(self, s: Instruction) -> str:
        """mov between a register and two of half its width."""
        bits = int(s.opcode.removeprefix("mov.b"))
        half, line = f"u{bits // 2}", s.line
        to, of = s.operands
        if of.startswith("{"):
            low, high = (self.value(x, half, line) for x in self.elements(of, 2, line))
            return self.assign(to, f"u{bits}", f"pack<u{bits}, {half}>({low}, {high})", line)
        low, high = self.elements(to, 2, line)
        writes = [
            self.assign(register, half, f"{half}(whole >> {shift})", line)
            for register, shift in ((low, 0), (high, bits // 2))
            if register != "_"
        ]
        return f"{{ const u{bits} whole = {self.value(of, f'u{bits}', line)}; {' '.join(writes)} }}"

    def control(self, s: Instruction) -> str:
        """Branches, barriers, calls and asynchronous copies."""
        o, line = s.operands, s.line
        match s.opcode:
            case "bra" | "bra.uni":
                return f"goto {o[0].removeprefix('$')};"
            case "ret":
                return "return;"
            case "trap":
                return f"trap({line});"
            case "bar.sync" if len(o) == 1:
                return f"bar_sync({self.value(o[0], 'u32', line)}, {line});"
            case "bar.warp.sync" if len(o) == 1:
                return f"__syncwarp({self.value(o[0], 'u32', line)}, {line});"
            case "call.uni" if len(o) == 3:
                if o[1] not in self.device_functions:
                    raise PtxError(line, f"call of unknown function {o[1]}")
                names = [n for group in (o[0], o[2]) for n in split_names(group)]
                for name in names:
                    if name not in self.symbols:
                        raise PtxError(line, f"unknown argument {name!r}")
                return f"f_{o[1]}({', '.join(f'c_{name}' for name in names)});"
            case "cp.async.cg.shared.global" if len(o) == 4 and o[2] == "16":
                self.note(s)
                to, of = self.address(o[0], "shared", line), self.address(o[1], "global", line)
                if _REGISTER.match(o[3]) and self.storage(o[3], line) == "bool":
                    bytes = f"{self.variable(o[3])} ? 0 : 16"  # what is ignored is zero
                else:
                    bytes = self.value(o[3], "u32", line)
                return f"cp_async16({to}, {of}, {bytes}, {line});"
            case "cp.async.commit_group":
                return "fastmlp::cuda::commit_copies();"
            case "cp.async.wait_group" if o[0].isdigit():
                return f"fastmlp::cuda::wait_for_copies<{o[0]}>();"
        raise PtxError(line, f"unknown instruction {s.opcode} {', '.join(o)}")

    # ---- declarations

    def declare(self, v: Variable, used: set[str]) -> list[str]:
        self.scopes[-1][v.name] = v
        if v.space == "reg":
            names = [f"{v.name}{i}" for i in range(v.count)] if v.parametrised else [v.name]
            type = _STORAGE[v.type]
            # What is read before it is written shows in the result.
            start = "" if len(self.scopes) > 1 else " = NAN" if type in ("f32", "f64") else " = 0"
            return [f"{type} v_{n}{start};" for n in names if f"%{n}" in used]
        if v.space in ("local", "param"):
            self.symbols[v.name] = f"address_of(c_{v.name})"
            return [f"alignas({max(v.alignment, 8)}) unsigned char c_{v.name}[{v.count}];"]
        if v.space == "shared":
            self.symbols[v.name] = f"c_{v.name}"
            self.shared.add(v.name)
            if v.count == 0:
                return [f"const u32 c_{v.name} = dynamic_shared_variable({v.alignment});"]
            return [f"const u32 c_{v.name} = shared_variable(n_{v.name}, {v.count}, {v.alignment});"]
        raise PtxError(0, f".{v.space} variable {v.name} in a function")

    def translate(self) -> list[str]:
        """The lines of the function."""
        f = self.function
        used = {
            register
            for s in f.body
            if isinstance(s, Instruction)
            for operand in (*s.operands, f"%{s.predicate.lstrip('!')}")
            for register in registers(operand)
        }
        words = {w for s in f.body if isinstance(s, Instruction) for o in s.operands for w in re.findall(r"[\w$]+", o)}
        parameters = [*f.results, *f.parameters]
        for p in parameters:
            self.symbols[p.name] = f"address_of(c_{p.name})"
        for v in self.module.variables:
            if v.space == "global":
                self.symbols[v.name] = f"address_of(c_{v.name})"
        # Those of the module that the kernel names: as many as ptxas gives it.
        shared = [v for v in self.module.variables if v.space == "shared" and v.name in words]
        top = [s for s in f.body if isinstance(s, Variable)]
        names = {v.name for v in (*shared, *(v for v in top if v.space == "shared"))}
        lines = [f'const char n_{name}[] = "{name}";' for name in sorted(names)]
        if f.kernel:
            lines.append("void kernel(const void* const* parameters) {")
            lines += [
                f"const auto* const c_{p.name} = static_cast<const unsigned char*>(parameters[{i}]);"
                for i, p in enumerate(f.parameters)
            ]
        else:
            arguments = [f"unsigned char* c_{p.name}" for p in parameters]
            lines.append(f"void f_{f.name}({', '.join(arguments)}) {{")
        lines.append("bool carry = false;")
        for v in shared:
            lines += self.declare(v, used)
        for self.place, s in enumerate(f.body):
            if isinstance(s, Variable):
                lines += self.declare(s, used)
            elif isinstance(s, Label):
                lines.append(f"{s.name}:;")
            elif isinstance(s, Scope):
                lines.append("{" if s.opens else "}")
                if s.opens:
                    self.scopes.append({})
                else:
                    self.scopes.pop()
            else:
                lines.append(self.instruction(s))
        return [*lines, "}"]


def split_names(group: str) -> list[str]:
    return [n.strip() for n in group.strip("()").split(",") if n.strip()]


def constant(v: Variable) -> str:
    """A table in global memory."""
    if not v.values:
        raise PtxError(0, f"global variable {v.name} without values")
    count = v.count // BYTES[v.type]
    values = ", ".join(f"{_STORAGE[v.type]}({value})" for value in v.values)
    return f"alignas({max(v.alignment, 8)}) const {_STORAGE[v.type]} c_{v.name}[{count}] = {{{values}}};"


def translate(text: str, route: int | None = None) -> list[Kernel]:
    """All kernels of a PTX text.

    Args:
        route: The number that `_C_emulated` knows them by, instead of the text's architecture.

    Raises:
        PtxError: if there is anything in it that is not known.
    """
    module = parse(text)
    device_functions = [f for f in module.functions if not f.kernel]
    names = {f.name for f in device_functions}
    head = ['#include "semantics.h"', "using namespace ptx;", "namespace {"]
    head += [constant(v) for v in module.variables if v.space == "global"]
    called = {f.name: Translator(module, f, names).translate() for f in device_functions}
    kernels = []
    for function in module.functions:
        if function.kernel:
            translator = Translator(module, function, names)
            body = translator.translate()
            calls = [line for name, lines in called.items() if any(f"f_{name}(" in b for b in body) for line in lines]
            number = module.target if route is None else route
            tail = [f'const emulator::RegisterTranslated registered({number}, "{function.name}", &kernel);', "}"]
            kernels.append(Kernel(function.name, "\n".join([*head, *calls, *body, *tail]) + "\n", translator.sites))
    return kernels

"""PTX as text, taken apart: modules, functions and their statements."""

import re
from dataclasses import dataclass, field


class PtxError(Exception):
    """What the translator does not know, with the line of the PTX that it stands in."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(f"PTX line {line}: {message}")


@dataclass(frozen=True)
class Source:
    """A line of CUDA, from `.loc`; empty without -lineinfo."""

    file: str = ""
    line: int = 0


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Scope:
    """The begin or the end of a block in braces."""

    opens: bool


@dataclass(frozen=True)
class Variable:
    """`.reg`, `.local`, `.shared`, `.param` or `.global`: `count` registers, or that many bytes of memory.

    Shared memory of 0 bytes is the launch's: `.extern .shared .align 128 .b8 name[]`.
    """

    space: str
    type: str
    name: str
    count: int
    alignment: int
    values: tuple[str, ...] = ()
    parametrised: bool = False  # %r<5>: five registers, %r0 to %r4


@dataclass(frozen=True)
class Instruction:
    line: int
    opcode: str
    operands: tuple[str, ...]
    predicate: str  # a register, with ! before it if negated, or empty
    source: Source


Statement = Label | Scope | Variable | Instruction


@dataclass
class Function:
    """A kernel, or a device function that was not inlined."""

    name: str
    kernel: bool
    results: list[Variable]
    parameters: list[Variable]
    body: list[Statement] = field(default_factory=list)


@dataclass
class Module:
    target: int
    variables: list[Variable]
    functions: list[Function]


#: Bytes of PTX's types; predicates have none in memory.
BYTES = {f"{kind}{8 * size}": size for size in (1, 2, 4, 8) for kind in "bsu"}
BYTES |= {"f16": 2, "f32": 4, "f64": 8, "pred": 1}

_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak)\s+)*\.(?P<space>reg|local|shared|param|global|const)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<type>\w+)\s+(?:\.ptr\s+\.align\s+\d+\s+)?%?(?P<name>[\w$]+)(?:<(?P<many>\d+)>|\[(?P<size>\d*)\])?(?:\s*=\s*\{(?P<values>[^}]*)\})?$"
)
_INSTRUCTION = re.compile(r"(?:@(!?%[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_FUNCTION = re.compile(
    r"(?:\.visible\s+|\.weak\s+)*\.(entry|func)\s*(?:\(([^()]*)\)\s*)?([\w$]+)\s*(?:\((.*?)\))?\s*"
    r"((?:\.\w+[\s\d,]*)*)\Z",
    re.S,
)
#: Attributes of a kernel that do not change what it computes.
_ATTRIBUTES = {"maxntid", "minnctapersm"}


def variable(text: str, line: int) -> Variable:
    found = _VARIABLE.match(" ".join(text.split()))
    if found is None or found["type"] not in BYTES:
        raise PtxError(line, f"unknown declaration {text!r}")
    unsized = found["size"] == ""
    if unsized and not re.match(r"\.extern\s+\.shared\s", text.strip()):
        raise PtxError(line, f"no size is declared: {text!r}")
    size = BYTES[found["type"]]
    many = found["many"]
    memory = 0 if unsized else int(found["size"] or 1) * size
    return Variable(
        space=found["space"],
        type=found["type"],
        name=found["name"],
        count=int(many or 1) if found["space"] == "reg" else memory,
        alignment=int(found["align"] or size),
        values=tuple(v.strip() for v in (found["values"] or "").split(",") if v.strip()),
        parametrised=many is not None,
    )


def split_operands(text: str) -> tuple[str, ...]:
    """At commas that are not within brackets."""
    parts, depth, part = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += c
    return tuple(p for p in [*parts, part.strip()] if p)


class Parser:
    """Reads one text from its beginning; `line` is that of `position`."""

    def __init__(self, text: str) -> None:
        # Comments become blanks, so that lines keep their numbers.
        self.text = re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)
        self.position = 0
        self.line = 1
        #: Registers of inline assembly that are declared without %.
        self.bare: set[str] = set()
        self.files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', self.text, re.M))

    def advance(self, to: int) -> str:
        passed = self.text[self.position : to]
        self.position = to
        self.line += passed.count("\n")
        return passed

    def skip_blanks(self) -> bool:
        """Whether anything follows."""
        found = re.compile(r"\s*").match(self.text, self.position)
        assert found is not None
        self.advance(found.end())
        return self.position < len(self.text)

    def until(self, characters: str) -> str:
        """What stands before the next of these characters, which is passed over too."""
        found = re.compile(f"[{re.escape(characters)}]").search(self.text, self.position)
        if found is None:
            raise PtxError(self.line, f"no {characters} follows")
        passed = self.advance(found.start())
        self.advance(found.end())
        return passed

    def module(self) -> Module:
        target, variables, functions = 0, [], []
        while self.skip_blanks():
            line, word = self.line, self.text[self.position :].split(None, 1)[0]
            if word in (".version", ".address_size", ".file", ".target"):
                directive = self.until("\n").split()
                if word == ".target":
                    target = int(re.sub(r"\D", "", directive[1]))
            elif word == ".section":
                # Debugging strings, behind the last function.
                self.until("}")
            elif re.match(r"(\.visible\s+|\.weak\s+)*\.(entry|func)\b", self.text[self.position : self.position + 40]):
                head_end = re.compile(r"[{;]").search(self.text, self.position)
                assert head_end is not None
                head = self.advance(head_end.start()).strip()
                declared_only = self.advance(head_end.end()) == ";"
                if not declared_only:
                    functions.append(self.function(head, line))
            else:
                variables.append(variable(self.until(";"), line))
        return Module(target, variables, functions)

    def function(self, head: str, line: int) -> Function:
        found = _FUNCTION.match(head)
        if found is None:
            raise PtxError(line, f"unknown function {head!r}")
        kind, results, name, parameters, attributes = found.groups()
        for attribute in re.findall(r"\.(\w+)", attributes):
            if attribute not in _ATTRIBUTES:
                raise PtxError(line, f"unknown attribute .{attribute} of {name}")
        given, taken = ([variable(v, line) for v in split_operands(text or "")] for text in (results, parameters))
        function = Function(name, kind == "entry", given, taken)
        self.bare.clear()
        depth, source = 1, Source()
        while depth > 0:
            if not self.skip_blanks():
                raise PtxError(self.line, f"{name} does not end")
            rest = self.text[self.position : self.position + 5]
            line = self.line
            if rest[0] in "{}":
                self.advance(self.position + 1)
                depth += 1 if rest[0] == "{" else -1
                if depth > 0:
                    function.body.append(Scope(rest[0] == "{"))
            elif rest[0] == "$":
                function.body.append(Label(self.until(":")[1:]))
            elif rest.startswith(".loc") and rest[4:].isspace():
                _, file, number, *_ = self.until("\n").split()
                source = Source(self.files.get(file, ""), int(number))
            else:
                self.statement(function, self.until(";").strip(), line, source)
        return function

    def statement(self, function: Function, text: str, line: int, source: Source) -> None:
        if text.startswith(".pragma"):
            # Advice: not to unroll a loop, or which bytes of a vector are used.
            if not re.fullmatch(r'\.pragma "(nounroll|used_bytes_mask \d+)"', text):
                raise PtxError(line, f"unknown {text}")
        elif text.startswith("."):
            # `.reg .u32 %a, %b` declares two.
            first, *others = split_operands(text)
            type = re.match(r"\.reg\s+\.\w+\s", first)
            if others and type is None:
                raise PtxError(line, f"unknown declaration {text!r}")
            declared = [variable(first, line)]
            declared += [variable(f"{type[0]}{name}", line) for name in others if type]
            self.bare |= {v.name for v in declared if type and "%" not in text}
            function.body += declared
        elif text:
            found = _INSTRUCTION.match(text)
            if found is None:
                raise PtxError(line, f"cannot read {text!r}")
            predicate, opcode, operands = found.groups()
            for name in self.bare:
                operands = re.sub(rf"(?<![\w$%]){name}\b", f"%{name}", operands)
            function.body.append(
                Instruction(line, opcode, split_operands(operands), (predicate or "").replace("%", ""), source)
            )


def parse(text: str) -> Module:
    return Parser(text).module()

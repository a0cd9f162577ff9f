"""Every error that the library raises says first whose it is: its text begins with "fastmlp: "."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PREFIX = "fastmlp: "

#: Errors whose texts begin otherwise, and why.
OTHERS = {
    "ArgumentTypeError": "argparse puts the name of the option before it",
    "DemoFailure": "the command line puts 'The demo failed' before it",
    "Refused": "a report puts the name of the contender before it",
    "TraceError": "what records a forward puts it at the end of an error of its own",
    "WrongResult": "the command line puts 'The bench failed' before it",
}

# Python.


class Module:
    """A file of the library."""

    def __init__(self, text: str) -> None:
        self.tree = ast.parse(text)
        self.functions = {node.name: node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef)}

    def raises(self) -> Iterator[tuple[ast.FunctionDef | ast.Module, ast.Raise]]:
        """Each `raise`, with the innermost function that it is in."""
        found: dict[ast.Raise, ast.FunctionDef | ast.Module] = {}
        for scope in ast.walk(self.tree):  # outer ones first
            if isinstance(scope, (ast.FunctionDef, ast.Module)):
                found.update({node: scope for node in ast.walk(scope) if isinstance(node, ast.Raise)})
        return ((scope, node) for node, scope in found.items())


def begins(node: ast.expr, scope: ast.AST, functions: dict[str, ast.FunctionDef]) -> bool:
    """Whether a text begins with the prefix, as far as one can read in the code.

    Args:
        node: the text.
        scope: the function that has it.
        functions: those that might make it.
    """
    if isinstance(node, ast.Constant):
        return str(node.value).startswith(PREFIX)
    if isinstance(node, ast.JoinedStr):
        return begins(node.values[0], scope, functions)
    if isinstance(node, ast.FormattedValue):
        return begins(node.value, scope, functions)
    if isinstance(node, ast.BinOp):
        return begins(node.left, scope, functions)
    if isinstance(node, ast.Name):
        # The text of an error of ours that was caught is one.
        caught = any(isinstance(part, ast.ExceptHandler) and part.name == node.id for part in ast.walk(scope))
        return caught or all_begin(assigned(node.id, scope), scope, functions)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
        made_by = functions[node.func.id]
        returned = [part.value for part in ast.walk(made_by) if isinstance(part, ast.Return) and part.value is not None]
        return all_begin(returned, made_by, functions)
    if isinstance(node, ast.Call) and node.args:
        return begins(node.args[0], scope, functions)
    return False


def assigned(name: str, scope: ast.AST) -> list[ast.expr]:
    """What a variable of a function is set to."""
    return [
        part.value
        for part in ast.walk(scope)
        if isinstance(part, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in part.targets)
    ]


def all_begin(nodes: list[ast.expr], scope: ast.AST, functions: dict[str, ast.FunctionDef]) -> bool:
    return bool(nodes) and all(begins(node, scope, functions) for node in nodes)


def strangers(module: Module, functions: dict[str, ast.FunctionDef]) -> list[str]:
    """The `raise`s of a file whose text begins otherwise."""
    found = []
    for scope, node in module.raises():
        error = node.exc
        if error is None or (isinstance(error, ast.Attribute) and error.attr == "refused"):
            continue  # what was caught, or kept, is raised again
        if isinstance(error, ast.Name) and error.id == "error":
            continue
        name = ast.unparse(error.func).rpartition(".")[2] if isinstance(error, ast.Call) else ""
        if name not in OTHERS and not begins(error, scope, functions):
            found.append(f"line {node.lineno}: {ast.unparse(node)[:120]}")
    return found


MODULES = {str(p.relative_to(ROOT)): Module(p.read_text(encoding="utf-8")) for p in (ROOT / "fastmlp").rglob("*.py")}
HELPERS = MODULES["fastmlp/_errors.py"].functions


@pytest.mark.parametrize("file", sorted(MODULES))
def test_errors_of_python_begin_with_the_name(file: str) -> None:
    module = MODULES[file]
    assert strangers(module, {**HELPERS, **module.functions}) == []


@pytest.mark.parametrize("name", OTHERS)
def test_each_exception_is_one(name: str) -> None:
    raised = [ast.unparse(node) for module in MODULES.values() for _, node in module.raises()]
    assert any(f"{name}(" in text for text in raised)


@pytest.mark.parametrize(
    ("code", "is_found"),
    [
        ("raise ValueError('fastmlp: x must be 1')", False),
        ("raise ValueError('x must be 1')", True),
        ("raise ValueError(f'fastmlp: {x}')", False),
        ("raise ValueError(f'{x} fastmlp: ')", True),
        ("raise ValueError", True),
        ("raise TraceError('it does')", False),
        ("def f():\n  text = 'fastmlp: '\n  raise ValueError(text)", False),
        ("def f():\n  text = 'x'\n  raise ValueError(text)", True),
        ("def f():\n  raise made('x')\ndef made(x):\n  return ValueError(f'fastmlp: {x}')", False),
        ("def f():\n  raise made('x')\ndef made(x):\n  return ValueError(x)", True),
        ("try:\n  pass\nexcept TypeError as error:\n  raise ValueError(f'{error}') from error", False),
    ],
)
def test_what_is_found_in_python(code: str, is_found: bool) -> None:
    module = Module(code)
    assert bool(strangers(module, module.functions)) == is_found


# Names of types.

#: An article before the name of a type that is known only when the error is raised: it would be wrong for half of them.
ARTICLE = re.compile(r"\b[Aa]n? (?:\{[^{}]*__name__|\"[^\";]*Py_TYPE)")


def test_no_article_stands_before_the_name_of_a_type() -> None:
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for file in MODULES} | SOURCES
    assert [f"{file}: {found[0]}" for file, text in texts.items() for found in ARTICLE.finditer(text)] == []


@pytest.mark.parametrize(
    ("code", "is_found"),
    [
        ('f"loss_fn is a {kind.__name__}, expected"', True),
        ('f"an {type(value).__name__}"', True),
        ('f"a {name} of type {kind.__name__}"', False),
        ('"out is a ", Py_TYPE(out)->tp_name', True),
        ('std::string("got a ") +\n Py_TYPE(out)->tp_name', True),
        ('"out is of type ", Py_TYPE(out)->tp_name', False),
    ],
)
def test_what_is_found_of_articles(code: str, is_found: bool) -> None:
    assert bool(ARTICLE.search(code)) == is_found


# C++.

#: What raises: a macro of torch's, `throw` of an exception that has a text, or Python's own function.
RAISING = re.compile(
    r"TORCH_CHECK(?:_[A-Z]+)?\s*\(|TORCH_WARN(?:_ONCE)?\s*\(|PyErr_(?:SetString|Format)\s*\(|\bthrow\s+[\w:]+\s*[({]"
)

#: Exceptions that have no text of ours: Python's own that was raised already, no memory, and the key that is missing.
WITHOUT_TEXT = ("error_already_set", "bad_alloc", "key_error")

#: A comment, or a literal in which parentheses and slashes mean nothing.
APART = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])'", re.S)

SOURCES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "csrc").rglob("*"))
    if path.suffix in (".cpp", ".h", ".inl", ".cu", ".cuh")
}


def calls_in(text: str) -> Iterator[tuple[int, str, list[str]]]:
    """Line, text and string literals of everything that raises."""
    literals: dict[int, str] = {}

    def blank(match: re.Match[str]) -> str:
        if match[0].startswith('"'):
            literals[match.start()] = match[0][1:-1]
        return "".join(c if c == "\n" else " " for c in match[0])

    code = APART.sub(blank, text)
    for match in RAISING.finditer(code):
        end, depth = match.end(), 1
        while depth and end < len(code):
            depth += {"(": 1, "{": 1, ")": -1, "}": -1}.get(code[end], 0)
            end += 1
        own = [literal for at, literal in literals.items() if match.end() <= at < end]
        yield code.count("\n", 0, match.start()) + 1, text[match.start() : end], own


def strangers_in(text: str) -> list[str]:
    """What raises with a text that begins otherwise, or with none."""
    return [
        f"line {line}: {call[:120]}"
        for line, call, literals in calls_in(text)
        if not any(name in call.split("(")[0] for name in WITHOUT_TEXT)
        and not (literals and literals[0].startswith(PREFIX))
    ]


@pytest.mark.skipif(not SOURCES, reason="the sources are not beside an installed library")
def test_the_sources_raise() -> None:
    assert sum(len(list(calls_in(text))) for text in SOURCES.values()) > 50


@pytest.mark.parametrize("file", SOURCES)
def test_errors_of_cpp_begin_with_the_name(file: str) -> None:
    assert strangers_in(SOURCES[file]) == []


@pytest.mark.parametrize(
    ("code", "is_found"),
    [
        ('TORCH_CHECK(a, "fastmlp: b ", c);', False),
        ('TORCH_CHECK_TYPE(f(a) > 0,\n  "fastmlp: b");', False),
        ('TORCH_CHECK(a, b, "fastmlp: c");', False),
        ('TORCH_CHECK(a, "b ", "fastmlp: c");', True),
        ("TORCH_CHECK(a);", True),
        ('throw py::type_error(std::string("fastmlp: a") + b);', False),
        ('throw py::type_error("a (b");', True),
        ("throw py::error_already_set();", False),
        ("throw;", False),
        ('PyErr_SetString(PyExc_TypeError, "a");', True),
        ('// throw py::type_error("a")', False),
    ],
)
def test_what_is_found_in_cpp(code: str, is_found: bool) -> None:
    assert bool(strangers_in(code)) == is_found

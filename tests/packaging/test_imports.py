"""What tests share lies in tests/support: nothing is imported from a module of tests, or from a conftest.py."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imported(path: Path) -> Iterator[str]:
    """Full names of what a file imports: of modules, and of what is taken from them, which may be modules too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_of_tests(name: str) -> bool:
    root, *parts = name.split(".")
    return root in ("tests", "benchmarks") and any(part == "conftest" or part.startswith("test_") for part in parts)


def test_nothing_is_imported_from_modules_of_tests() -> None:
    files = [path for folder in ("tests", "benchmarks", "tools", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert [(str(path.relative_to(ROOT)), name) for path in files for name in imported(path) if is_of_tests(name)] == []

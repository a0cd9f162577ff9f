"""Plants the defects of planted.toml, one at a time in a copy of the sources, and sees each caught."""

import re
import shutil
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tools.gpu_proof import as_compiled, compiled, linked, read
from tools.gpu_proof.emulation import VARIANTS, build, execute
from tools.gpu_proof.kernels import ROOT
from tools.gpu_proof.sanitized import SAID
from tools.gpu_proof.toolchain import BUILD


@dataclass(frozen=True)
class Defect:
    """A text in place of another, and the gate that must notice."""

    name: str
    file: str  # in csrc
    old: str  # there exactly once, but for white space
    new: str
    dtype: str
    gate: str
    says: str
    case: str = ""
    architecture: int = 80
    check: str = "bits"
    quick: bool = False


@dataclass(frozen=True)
class Caught:
    """What came of a defect."""

    defect: Defect
    answer: str
    caught: bool


@cache
def defects() -> tuple[Defect, ...]:
    """Return all, as planted.toml has them."""
    found: list[dict[str, Any]] = tomllib.loads(Path(__file__).with_name("planted.toml").read_text())["defect"]
    return tuple(Defect(**one) for one in found)


def plant(defect: Defect, source: Path = ROOT / "csrc") -> str:
    """Return the file with the defect in it; white space may differ from that of planted.toml.

    Raises:
        ValueError: the text to be replaced is not there exactly once.
    """
    text = (source / defect.file).read_text()
    places = list(re.finditer(r"\s+".join(map(re.escape, defect.old.split())), text))
    if len(places) != 1:
        raise ValueError(
            f"planted defect {defect.name!r} no longer applies: csrc/{defect.file} has "
            f"{len(places)} times {defect.old.strip()!r}"
        )
    return text[: places[0].start()] + defect.new.strip() + text[places[0].end() :]


def tree(defect: Defect) -> Path:
    """Return a checkout with the defect: a copy of csrc, all else as links."""
    folder = BUILD / "planted" / re.sub(r"\W+", "_", defect.name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.name not in ("csrc", ".git"):
            (folder / path.name).symlink_to(path)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "csrc" / defect.file).write_text(plant(defect))
    return folder


def show(defect: Defect) -> Caught:
    """Plant it and ask its gate."""
    root = tree(defect)
    if defect.gate in VARIANTS:
        variant = VARIANTS[defect.gate]
        extension = build(variant, root, defect.dtype)
        command = ["-m", "tools.gpu_proof.exercise", defect.dtype, "--only", defect.case]
        done = execute(extension, variant, command)
        found = re.search(defect.says, done.stdout)
        said = found or SAID.search(done.stdout)
        answer = _line_of(done.stdout, said) if said else f"exit code {done.returncode}: {done.stdout[-200:]}"
        return Caught(defect, answer, found is not None and done.returncode != 0)
    if defect.gate == "linked":
        failures = linked.check(root).failures
    elif defect.gate == "as compiled":
        failures = as_compiled.check([defect.dtype], [defect.architecture], [defect.check], root).failures
    else:
        cubin = compiled.compile_cubin(defect.dtype, defect.architecture, root / "csrc", f"{root.name}_")
        gate = compiled if defect.gate == "compiled" else read
        failures = gate.check_cubins([cubin]).failures
    answers = [f"{check.subject} {check.what}" for check in failures]
    caught = [answer for answer in answers if re.search(defect.says, answer)]
    return Caught(defect, next(iter(caught or answers), "nothing"), bool(caught))


def _line_of(text: str, match: re.Match[str]) -> str:
    start = text.rfind("\n", 0, match.start()) + 1
    end = text.find("\n", match.end())
    return text[start : end if end >= 0 else None].strip()

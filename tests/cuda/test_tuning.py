"""The file of measured choices; what is measured needs a GPU (tests/cuda/test_cuda.py)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastmlp
from fastmlp import _C, tuning

autotune: Any = fastmlp.autotune
CHOICES = [90, 132, 2, 0, 1, 1000, 512, 512, 3, 90, 132, 0, 2, 0, 3, 5, 7, 2]


def test_choices_come_back_from_their_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "choices.json"
    tuning.write(file, CHOICES)
    assert tuning.read(file) == CHOICES
    assert json.loads(file.read_text())[1] == dict(zip(tuning.FIELDS, CHOICES[9:], strict=True))
    assert [path.name for path in file.parent.iterdir()] == ["choices.json"]


def test_cards_of_one_architecture_keep_their_own(tmp_path: Path) -> None:
    """An L4 and an RTX 4090: the same product, another number of multiprocessors."""
    file = tmp_path / "choices.json"
    tuning.write(file, [89, 58, 2, 0, 1, 1000, 512, 512, 3])
    tuning.write(file, [89, 128, 2, 0, 1, 1000, 512, 512, 1])
    assert [(row["multiprocessors"], row["tile"]) for row in json.loads(file.read_text())] == [(58, 3), (128, 1)]


@pytest.mark.parametrize("text", ["", "{}3", '[{"m": 3}]', "[3]", '{"m": 3}', '[{"architecture": []}]'])
def test_other_files_are_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "choices.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"choices\.json holds no choices of autotune"):
        tuning.read(file)


@pytest.mark.parametrize("path", [3, b"choices.json", ["choices.json"]])
def test_a_path_of_another_type_is_named(path: Any) -> None:
    with pytest.raises(TypeError, match=r"^fastmlp: path must be a str, an os\.PathLike or None, got "), autotune(path):
        pass


@pytest.mark.skipif(torch.cuda.is_available() and "cuda" in _C.devices(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing() -> None:
    why = "this build has no CUDA kernels" if "cuda" not in _C.devices() else "torch.cuda.is_available"
    with pytest.raises(RuntimeError, match=f"fastmlp: autotune needs.*{why}"), fastmlp.autotune():
        pass

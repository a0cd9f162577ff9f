"""The harness of frozen graphs: every model is frozen, computes the same, and takes some time."""

import pytest
import torch

from benchmarks.graphs import MODELS, check, measured
from fastmlp.benchmark.timing import Effort


@pytest.mark.parametrize("name", MODELS)
def test_models_are_measured(name: str) -> None:
    microseconds, ratio = map(float, measured(name, 2, Effort(rounds=2, patience=0.1, fewest=2)))
    assert microseconds > 0
    assert ratio > 0


def test_other_results_are_not_measured() -> None:
    with pytest.raises(AssertionError, match="not close"):
        check((torch.zeros(3), torch.ones(3)), (torch.zeros(3), torch.zeros(3)))

"""Random graphs of layers, frozen: what the model computes, and the same bits for a row alone and in a batch."""

import copy
import pickle
from typing import Any

import pytest
import torch

from fastmlp import freeze
from tests.support.random_graphs import RandomGraph


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("seed", range(60))
def test_random_graphs(seed: int) -> None:
    dtype = (torch.float32, torch.float64)[seed % 2]
    model = RandomGraph(seed).eval().to(dtype)
    frozen = freeze(model)
    rows = (1, 3, 29, 129, 200)[seed % 5]
    x = torch.randn(rows, model.features, dtype=dtype)
    given = x.clone()
    found = as_tuple(frozen(x))
    assert torch.equal(x, given)
    with torch.no_grad():
        eager = as_tuple(model(x.clone()))
        exact = as_tuple(copy.deepcopy(model).double()(x.double()))
    for ours, theirs, right in zip(found, eager, exact, strict=True):
        assert ours.shape == theirs.shape
        # What is compared with a threshold may fall on its other side: then torch is as far away in other elements.
        error, other = ((one.double() - right).abs().max() for one in (ours, theirs))
        assert error <= 8 * other + 512 * torch.finfo(dtype).eps * right.abs().max().clamp_min(1)
    for i in range(0, rows, 1 if rows < 40 else 9):
        alone = as_tuple(frozen(x[i : i + 1]))
        assert all(torch.equal(one, all[i : i + 1]) for one, all in zip(alone, found, strict=True))
    assert all(map(torch.equal, as_tuple(pickle.loads(pickle.dumps(frozen))(x)), found))

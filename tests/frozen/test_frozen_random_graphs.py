"""Random graphs of layers, frozen: what the model computes, and the same bits for a row alone and in a batch."""

import pickle

import pytest
import torch

from fastmlp import freeze
from tests.support.graphs import as_tuple, assert_near
from tests.support.random_graphs import RandomGraph


@pytest.mark.parametrize("seed", range(60))
def test_random_graphs(seed: int) -> None:
    dtype = (torch.float32, torch.float64)[seed % 2]
    model = RandomGraph(seed).eval().to(dtype)
    frozen = freeze(model)
    rows = (1, 3, 29, 129, 200)[seed % 5]
    x = torch.randn(rows, model.features, dtype=dtype)
    given = x.clone()
    result = frozen(x)
    assert torch.equal(x, given)
    assert_near(model, result, (x,))
    found = as_tuple(result)
    for i in range(0, rows, 1 if rows < 40 else 9):
        alone = as_tuple(frozen(x[i : i + 1]))
        assert all(torch.equal(one, all[i : i + 1]) for one, all in zip(alone, found, strict=True))
    assert all(map(torch.equal, as_tuple(pickle.loads(pickle.dumps(frozen))(x)), found))

"""Fixtures of all tests. What tests import lies in tests/support."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributions import Distribution

import fastmlp
from fastmlp import Activation
from tests.support.axes import ACTIVATIONS, DTYPES, ISAS


@pytest.fixture(scope="session", autouse=True)
def poisoned() -> Iterator[None]:
    """Torch's allocator fills new memory with junk, which is NaN in float32 and 1.7e308 in float64.

    So whoever reads memory of a tensor that nobody has written is found out, in the extension too:
    `torch.utils.deterministic.fill_uninitialized_memory` is about the operators `empty` alone.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    fill = ctypes.c_bool.in_dll(library, "FLAGS_caffe2_cpu_allocator_do_junk_fill")
    before, fill.value = fill.value, True
    yield
    fill.value = before


@pytest.fixture
def validated() -> Iterator[None]:
    """Distributions check their arguments, which the first call of torch.compile in a process switches off."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(True)
    yield
    Distribution.set_default_validate_args(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each instruction set that the processor supports."""
    before = fastmlp.get_isa()
    fastmlp.set_isa(request.param)
    yield request.param
    fastmlp.set_isa(before)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=ACTIVATIONS, ids=repr)
def activation(request: pytest.FixtureRequest) -> Activation:
    return request.param


@pytest.fixture
def as_before() -> Iterator[None]:
    """One thread, since others may use the processor too; and the instruction set as it was, whatever the test sets."""
    isa, threads = fastmlp.get_isa(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    fastmlp.set_isa(isa)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def without_onednn() -> Iterator[None]:
    """torch's own kernels: oneDNN's gelu of float32 gives NaN at infinity, where torch's gives infinity."""
    torch._C._set_mkldnn_enabled(False)
    yield
    torch._C._set_mkldnn_enabled(True)

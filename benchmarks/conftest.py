"""Options, and how one contender is measured on one workload."""

from dataclasses import asdict

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.check import verify
from benchmarks.contenders import Contender, absent, contenders, versions
from benchmarks.machine import describe, peak
from benchmarks.timing import Measure
from benchmarks.workloads import Tier, Workload, select


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of fastmlp")
    group.addoption("--threads", type=int, default=1, metavar="N", help="threads of all contenders (1)")
    tier = {"dest": "tier", "action": "store_const", "default": Tier.DEFAULT}
    group.addoption("--quick", const=Tier.QUICK, help="fewer workloads", **tier)
    group.addoption("--full", const=Tier.FULL, help="all workloads", **tier)


def pytest_report_header() -> list[str]:
    return absent()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Pair each workload of the module's SUITE with each contender: a group, which is a table, of its own."""
    if not hasattr(metafunc.module, "SUITE"):
        return
    rounds = {"min_time": 1e-3, "max_time": 0.3, "warmup": True, "warmup_iterations": 1, "disable_gc": True}
    metafunc.parametrize(
        ("workload", "contender"),
        [
            pytest.param(
                workload,
                contender,
                id=f"{workload.name}-{contender.name}",
                marks=pytest.mark.benchmark(group=workload.name, **rounds),
            )
            for workload in select(metafunc.module.SUITE, metafunc.config.getoption("tier"))
            for contender in contenders(workload)
        ],
    )


@pytest.fixture
def measure(benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> Measure:
    """Check a contender's results, then time it."""

    def run(workload: Workload, contender: type[Contender]) -> None:
        threads = pytestconfig.getoption("threads")
        machine = describe(threads)
        verify(contender(workload))
        benchmark.extra_info.update(asdict(machine), flops=workload.flops, versions=versions())
        benchmark(contender(workload).call)
        if benchmark.stats:
            gflops = workload.flops / benchmark.stats.stats.median / 1e9
            benchmark.extra_info.update(gflops=gflops, share_of_peak=gflops / peak(workload.dtype) / threads)

    return run

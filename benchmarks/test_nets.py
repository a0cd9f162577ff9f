"""Whole networks: forward without a graph; forward, and backward to the parameters."""

from benchmarks.contenders import Contender
from benchmarks.timing import Measure
from benchmarks.workloads import Suite, Workload

SUITE: Suite = "nets"


def test_net(measure: Measure, workload: Workload, contender: type[Contender]) -> None:
    measure(workload, contender)

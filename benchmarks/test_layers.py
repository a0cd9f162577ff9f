"""One layer with ReLU: forward without a graph; forward, and backward to weight, bias and input."""

from benchmarks.contenders import Contender
from benchmarks.timing import Measure
from benchmarks.workloads import Suite, Workload

SUITE: Suite = "layers"


def test_layer(measure: Measure, workload: Workload, contender: type[Contender]) -> None:
    measure(workload, contender)

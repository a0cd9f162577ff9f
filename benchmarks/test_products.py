"""Products of matrices in the three layouts of a network: forward, and both gradients."""

from benchmarks.contenders import Contender
from benchmarks.timing import Measure
from benchmarks.workloads import Suite, Workload

SUITE: Suite = "products"


def test_product(measure: Measure, workload: Workload, contender: type[Contender]) -> None:
    measure(workload, contender)

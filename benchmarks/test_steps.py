"""The training loop's four lines: zero_grad, forward and loss, backward, the optimizer's step."""

from benchmarks.contenders import Contender
from benchmarks.timing import Measure
from benchmarks.workloads import Suite, Workload

SUITE: Suite = "steps"


def test_step(measure: Measure, workload: Workload, contender: type[Contender]) -> None:
    measure(workload, contender)

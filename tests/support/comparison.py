"""A model and the same converted: what each computes, and how far apart that is."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmlp import fusion_report
from fastmlp.explain import Report
from tests.support.rounding import PROBES, Results, distance, rounding_bounds
from tests.support.subjects import Maker, Subject, in_a_loop

#: What is compared. Each is the start of the names of results.
PARTS = ("outputs", "gradients", "training")


@dataclass(frozen=True)
class Comparison:
    """What was found out about a model.

    Attributes:
        report: `fastmlp.fusion_report` of the converted model.
        keys: whether the keys of its `state_dict` are those of the model.
        differences: the largest of each result.
        bounds: on them, from rounding. What is exact, such as counts and states of generators, has the bound zero.
    """

    report: Report
    keys: bool
    differences: dict[str, Tensor]
    bounds: dict[str, Tensor]

    def share(self, part: str) -> float:
        """The largest difference of a part as a share of its bound; NaN where a result is NaN."""
        shares = [
            torch.where(difference == 0, 0.0, difference / self.bounds[name])
            for name, difference in self.differences.items()
            if name.startswith(part)
        ]
        return torch.stack(shares).max().item()


class Reference:
    """What a model computes that is not converted, and how far rounding may take that.

    Args:
        subject: whose model it is.
        plain: the model, which stays as it is.
        steps: whether losses and optimizers are implemented anew too in what is compared, and not only layers.
        probes: runs for the bounds. Fewer make them narrower.
    """

    def __init__(self, subject: Subject, plain: nn.Module, steps: bool = False, probes: int = PROBES) -> None:
        self.subject, self.plain = subject, plain
        self.expected = self.run(plain)
        self.bounds = rounding_bounds(lambda: self.run(plain), self.expected, steps, probes)

    def run(self, model: nn.Module, make: Maker = in_a_loop) -> dict[str, Tensor]:
        """Computes all results with a copy of a model."""
        return results(self.subject, copy.deepcopy(model), make)

    def compare(self, model: nn.Module, make: Maker = in_a_loop) -> Comparison:
        """Compares a model, trained by the steps that `make` makes."""
        return self.compared(self.run(model, make), model)

    def compared(self, found: Results, model: nn.Module) -> Comparison:
        """Compares results that a model has led to."""
        assert found.keys() == self.expected.keys(), found.keys() ^ self.expected.keys()
        return Comparison(
            report=fusion_report(model),
            keys=list(model.state_dict()) == list(self.plain.state_dict()),
            differences={name: distance(found[name], value) for name, value in self.expected.items()},
            bounds=self.bounds,
        )


def plain_of(subject: Subject) -> nn.Module:
    """The model, always with the same weights."""
    torch.manual_seed(0)
    return subject.make()


def pair(subject: Subject, trace: bool) -> tuple[nn.Module, nn.Module]:
    """The model, and a copy of it that is converted."""
    plain = plain_of(subject)
    return plain, subject.convert(copy.deepcopy(plain), trace)


def results(subject: Subject, model: nn.Module, make: Maker = in_a_loop) -> dict[str, Tensor]:
    """Outputs, gradients, and what a training leaves, which is done; from the same random numbers."""
    torch.manual_seed(1)
    found = {"outputs": subject.outputs(model.eval()).detach()}
    model.train().zero_grad()
    subject.loss(model, *subject.batch(0)).backward()
    found |= {f"gradients: {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found |= {f"training: {name}": value for name, value in subject.train(model, make).items()}
    found |= {f"training: {name}": value for name, value in model.state_dict().items()}
    grads = {f"training: {name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, **grads, "training: generator": torch.get_rng_state()}

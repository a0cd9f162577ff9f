"""A model and the same converted: what each computes, and how far apart that is."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastmlp
from fastmlp import fusion_report
from fastmlp.explain import Report
from tests.support.models import Subject
from tests.support.rounding import distance, rounding_bounds

#: What is compared. Each is the start of the names of results.
PARTS = ("outputs", "gradients", "ten steps")


@dataclass(frozen=True)
class Comparison:
    """What was found out about a model.

    Attributes:
        report: `fastmlp.fusion_report` of the converted model.
        keys: whether the keys of its `state_dict` are those of the model.
        differences: the largest of each result.
        bounds: on them, from rounding.
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


def pair(subject: Subject, trace: bool) -> tuple[nn.Module, nn.Module]:
    """The model, and a copy of it that is converted."""
    torch.manual_seed(0)
    plain = subject.make()
    return plain, fastmlp.convert(copy.deepcopy(plain), trace)


def compare(subject: Subject, plain: nn.Module, converted: nn.Module) -> Comparison:
    """Runs copies of both, and of the model that is not converted some more, for the bounds."""

    def run(model: nn.Module) -> dict[str, Tensor]:
        return results(subject, copy.deepcopy(model))

    expected, found = run(plain), run(converted)
    return Comparison(
        report=fusion_report(converted),
        keys=list(converted.state_dict()) == list(plain.state_dict()),
        differences={name: distance(found[name], value) for name, value in expected.items()},
        bounds=rounding_bounds(lambda: run(plain), expected),
    )


def results(subject: Subject, model: nn.Module) -> dict[str, Tensor]:
    """Outputs, gradients, and the state after ten steps, which are taken; from the same random numbers."""
    torch.manual_seed(1)
    found = {"outputs": subject.outputs(model).detach()}
    model.zero_grad()
    subject.loss(model).backward()
    found |= {f"gradients: {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    subject.train(model)
    return found | {f"ten steps: {name}": value for name, value in model.state_dict().items()}

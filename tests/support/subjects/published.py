"""Models of other libraries, made, used and trained as those do, to be compared with themselves converted.

Each needs a package of the extra `models`, which is imported where it is used.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from tests.support.subjects.base import Maker, Subject, in_a_loop

__all__ = [
    "PUBLISHED",
    "Digits",
    "PhysicsInformed",
    "Policy",
    "TabularMLP",
    "TabularResNet",
    "Torchvision",
]


class Supervised(Subject):
    """A regression on numbers in columns."""

    columns = 24
    criterion = staticmethod(mse_loss)

    def __init__(self, dtype: torch.dtype, small: bool = False) -> None:
        super().__init__(dtype, small)
        self.x = self.randn(256, self.columns, seed=1)
        self.y = self.x[:, :3].sin().cumsum(1)

    def outputs(self, model: nn.Module) -> Tensor:
        return model(self.x)

    def batch(self, i: int) -> tuple[Tensor, ...]:
        return self.x, self.y

    def requests(self, rows: int) -> tuple[Tensor, ...]:
        return (self.x[:rows],)


class Torchvision(Supervised):
    """A subclass of `nn.Sequential`, with dropout."""

    name = "torchvision.ops.MLP"
    package = "torchvision"

    def make(self) -> nn.Module:
        return torchvision_mlp()(self.columns, [128, 128, 3], activation_layer=nn.GELU, dropout=0.1).to(self.dtype)


def torchvision_mlp() -> Callable[..., nn.Module]:
    """Returns the class. Packages of the index are built for a torch with CUDA; beside another they lack operators."""
    try:
        from torchvision.ops import MLP
    except RuntimeError:
        # The import needs the names of these operators. A call of one would say that there is no implementation.
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from torchvision.ops import MLP
    return MLP


class TabularMLP(Supervised):
    """The MLP of "Revisiting Deep Learning Models for Tabular Data", section 3.1."""

    name = "rtdl MLP"
    package = "rtdl_revisiting_models"

    def make(self) -> nn.Module:
        from rtdl_revisiting_models import MLP

        return MLP(d_in=self.columns, d_out=3, n_blocks=3, d_block=128, dropout=0.1).to(self.dtype)


class TabularResNet(Supervised):
    """The ResNet of the same paper, section 3.2: batch normalisation, dropout and residual connections."""

    name = "rtdl ResNet"
    package = "rtdl_revisiting_models"

    def make(self) -> nn.Module:
        from rtdl_revisiting_models import ResNet

        sizes = {"d_in": self.columns, "d_out": 3, "n_blocks": 2, "d_block": 64, "d_hidden_multiplier": 2.0}
        return ResNet(**sizes, d_hidden=None, dropout1=0.1, dropout2=0.0).to(self.dtype)


class Policy(Subject):
    """Stable-Baselines3's actor and critic on CartPole, and the update of its PPO."""

    name = "Stable-Baselines3 PPO"
    package = "stable_baselines3"
    loop = "Stable-Baselines3's"

    def __init__(self, dtype: torch.dtype, small: bool = False) -> None:
        from stable_baselines3 import PPO

        super().__init__(dtype, small)
        epochs = self.steps // 2
        self.algorithm = PPO("MlpPolicy", "CartPole-v1", n_steps=128, batch_size=64, n_epochs=epochs, seed=0)
        self.policy = copy.deepcopy(self.algorithm.policy)  # before it has run, which leaves results in it
        self.algorithm.learn(128)
        self.rollout = next(self.algorithm.rollout_buffer.get())

    def make(self) -> nn.Module:
        policy = copy.deepcopy(self.policy).to(self.dtype)
        policy.optimizer = policy.optimizer_class(policy.parameters(), lr=1e-3, **policy.optimizer_kwargs)
        # Observations become float32 whatever the policy is.
        policy.features_extractor.register_forward_hook(lambda module, args, features: features.to(self.dtype))
        return policy

    def evaluate(self, policy: Any) -> list[Tensor]:
        """Returns values, the actions' log-probabilities, and entropies."""
        return list(policy.evaluate_actions(self.rollout.observations, self.rollout.actions.long().flatten()))

    def outputs(self, model: nn.Module) -> Tensor:
        return torch.cat([part.flatten() for part in self.evaluate(model)])

    def batch(self, i: int) -> tuple[Tensor, ...]:
        return ()

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        values, log_probabilities, entropies = self.evaluate(model)
        gain = (self.rollout.advantages * log_probabilities).mean() + 0.01 * entropies.mean()
        return mse_loss(values.flatten(), self.rollout.returns.to(self.dtype)) - gain

    def train(self, model: nn.Module, make: Maker = in_a_loop) -> dict[str, Tensor]:
        np.random.seed(0)  # noqa: NPY002 (which is what shuffles the rollout)
        self.algorithm.policy = model
        self.algorithm.train()
        return {}

    def requests(self, rows: int) -> tuple[Tensor, ...]:
        return (self.rollout.observations.repeat(4, 1)[:rows],)


class Digits(Subject):
    """skorch's classifier in a pipeline of scikit-learn."""

    name = "skorch in a Pipeline"
    package = "skorch"
    criterion = staticmethod(cross_entropy)
    loop = "skorch's"

    def __init__(self, dtype: torch.dtype, small: bool = False) -> None:
        from sklearn.datasets import load_digits
        from sklearn.preprocessing import StandardScaler

        super().__init__(dtype, small)
        data = load_digits()
        self.x = data.data[: 64 * self.steps].astype(str(dtype).removeprefix("torch."))
        self.y = data.target[: 64 * self.steps]
        self.scaler = StandardScaler().fit(self.x)

    def make(self) -> nn.Module:
        layers = [nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)]
        return nn.Sequential(*layers).to(self.dtype)

    def pipeline(self, model: nn.Module) -> Any:
        from sklearn.pipeline import Pipeline
        from skorch import NeuralNetClassifier

        options = {"optimizer": torch.optim.Adam, "max_epochs": 1, "batch_size": 64, "iterator_train__shuffle": True}
        net = NeuralNetClassifier(model, criterion=nn.CrossEntropyLoss, train_split=None, verbose=0, **options)
        return Pipeline([("scaler", self.scaler), ("net", net.initialize())])

    def outputs(self, model: nn.Module) -> Tensor:
        return torch.as_tensor(self.pipeline(model).predict_proba(self.x))

    def batch(self, i: int) -> tuple[Tensor, ...]:
        return torch.as_tensor(self.scaler.transform(self.x[:64])), torch.as_tensor(self.y[:64])

    def train(self, model: nn.Module, make: Maker = in_a_loop) -> dict[str, Tensor]:
        self.pipeline(model).fit(self.x, self.y)
        return {}

    def requests(self, rows: int) -> tuple[Tensor, ...]:
        return (torch.as_tensor(self.scaler.transform(self.x[:rows])),)


class Burgers(nn.Module):
    """u(x, t) of a physics-informed network: 4 hidden layers of 50, the activation called as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(2, 50), *(nn.Linear(50, 50) for _ in range(3))])
        self.last = nn.Linear(50, 1)

    def forward(self, points: Tensor) -> Tensor:
        for layer in self.hidden:
            points = torch.tanh(layer(points))
        return self.last(points)


class PhysicsInformed(Subject):
    """Burgers' equation u_t + u u_x = nu u_xx, from u(x, 0) = -sin(pi x): a loss of second derivatives."""

    name = "physics-informed net"
    package = "torch"
    several = "its loss holds derivatives of the network, and is no function of an output and a target"
    viscosity = 0.01 / torch.pi

    def __init__(self, dtype: torch.dtype, small: bool = False) -> None:
        super().__init__(dtype, small)
        self.points = self.randn(256, 2, seed=2).sigmoid() * torch.tensor([2, 1]) - torch.tensor([1, 0])
        self.start = self.points[:64] * torch.tensor([1, 0])

    def make(self) -> nn.Module:
        return Burgers().to(self.dtype)

    def batch(self, i: int) -> tuple[Tensor, ...]:
        return self.points, self.start

    def residual(self, model: nn.Module, points: Tensor) -> Tensor:
        points = points.clone().requires_grad_()
        u = model(points)
        u_x, u_t = torch.autograd.grad(u.sum(), points, create_graph=True)[0].split(1, 1)
        u_xx = torch.autograd.grad(u_x.sum(), points, create_graph=True)[0][:, :1]
        return u_t + u * u_x - self.viscosity * u_xx

    def outputs(self, model: nn.Module) -> Tensor:
        return torch.cat([model(self.points), self.residual(model, self.points)])

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        points, start = batch
        miss = model(start) + (torch.pi * start[:, :1]).sin()
        return self.residual(model, points).square().mean() + miss.square().mean()

    def requests(self, rows: int) -> tuple[Tensor, ...]:
        return (self.points[:rows],)


PUBLISHED: tuple[type[Subject], ...] = (Torchvision, TabularMLP, TabularResNet, Policy, Digits, PhysicsInformed)

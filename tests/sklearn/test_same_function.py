"""The estimators learn what scikit-learn's own learn: the same weights and losses, within what rounding explains."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import neural_network
from sklearn.base import is_classifier
from sklearn.datasets import load_diabetes, load_digits, make_classification, make_multilabel_classification
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

import fastmlp.sklearn
from tests.support.rounding import distance, rounding_bounds

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

EPOCHS = 4


def draw(kind: str) -> tuple[str, Any, Any]:
    """The class of the estimator, and 75 rows of data: two whole batches of 32, and a short one."""
    random = np.random.default_rng(0)
    X = random.standard_normal((75, 5))
    score = X @ random.standard_normal((5, 3)) + random.standard_normal((75, 3)) / 4
    if kind == "multiclass":
        return "MLPClassifier", X, np.array(["a", "b", "c"])[score.argmax(1)]
    if kind == "binary":
        return "MLPClassifier", X, np.array([4, 7])[(score[:, 0] > 0).astype(int)]
    if kind == "multilabel":
        return "MLPClassifier", X, (score > 0).astype(int)
    return "MLPRegressor", X, score if kind == "outputs" else score[:, 0]


KINDS = ("multiclass", "binary", "multilabel", "output", "outputs")

SETTINGS: dict[str, dict[str, Any]] = {
    "adam": {},
    "epsilon": {"epsilon": 0.01, "beta_1": 0.5, "beta_2": 0.9, "activation": "logistic"},
    "penalty": {"alpha": 2.0, "hidden_layer_sizes": (7, 6), "activation": "tanh"},
    "linear": {"hidden_layer_sizes": (), "alpha": 0.0, "activation": "identity"},
    "sgd": {"solver": "sgd", "learning_rate_init": 0.05},
    "momentum": {"solver": "sgd", "nesterovs_momentum": False, "momentum": 0.5, "learning_rate_init": 0.05},
    "plain": {"solver": "sgd", "momentum": 0.0, "activation": "logistic", "learning_rate_init": 0.1},
    "invscaling": {"solver": "sgd", "learning_rate": "invscaling", "learning_rate_init": 0.05, "power_t": 0.25},
    "adaptive": {"solver": "sgd", "learning_rate": "adaptive", "n_iter_no_change": 1, "tol": 1.0},
}


def results(estimator: Any) -> dict[str, Tensor]:
    """Weights, biases and the loss of each epoch."""
    arrays = {f"coefs_[{i}]": array for i, array in enumerate(estimator.coefs_)}
    arrays |= {f"intercepts_[{i}]": array for i, array in enumerate(estimator.intercepts_)}
    arrays["loss_curve_"] = np.array(estimator.loss_curve_)
    return {name: torch.tensor(array, dtype=torch.float64) for name, array in arrays.items()}


def specified(estimator: Any, X: Any, y: Any, weights: Any) -> dict[str, Tensor]:
    """What scikit-learn's estimator learns without shuffling, in plain PyTorch."""
    random = np.random.RandomState(estimator.random_state)
    kind = estimator.out_activation_
    targets = torch.tensor(np.unique(y, return_inverse=True)[1] if kind != "identity" and y.ndim == 1 else y)
    targets = targets if kind == "softmax" else targets.double().view(len(y), -1)
    inputs = torch.tensor(X)
    masses = torch.ones(len(y), dtype=torch.float64) if weights is None else torch.tensor(weights)
    parameters = []
    for fan_in, fan_out in pairwise([X.shape[1], *estimator.hidden_layer_sizes, estimator.n_outputs_]):
        bound = ((2 if estimator.activation == "logistic" else 6) / (fan_in + fan_out)) ** 0.5
        parameters += [random.uniform(-bound, bound, (fan_in, fan_out)), random.uniform(-bound, bound, fan_out)]
    leaves = [torch.tensor(parameter, requires_grad=True) for parameter in parameters]
    states = [[torch.zeros_like(leaf), torch.zeros_like(leaf)] for leaf in leaves]
    rate, count, losses = estimator.learning_rate_init, 0, []
    for epoch in range(estimator.n_iter_):
        total = torch.zeros((), dtype=torch.float64)
        for x, target, mass in zip(inputs.split(32), targets.split(32), masses.split(32), strict=True):
            for i, (weight, bias) in enumerate(zip(leaves[::2], leaves[1::2], strict=True)):
                x = ACTIVATIONS[estimator.activation](x) if i > 0 else x
                x = torch.addmm(bias, x, weight)
            penalty = sum((weight.square().sum() for weight in leaves[::2]), torch.zeros(())) * (estimator.alpha / 2)
            each, slope = loss_of(kind, x, target)
            loss, penalty = (each * mass).sum() / mass.sum(), penalty / mass.sum()
            total = total + (loss.detach() + penalty.detach()) * len(mass)
            count += 1
            grads = torch.autograd.grad(loss * slope + penalty, leaves)
            for leaf, grad, state in zip(leaves, grads, states, strict=True):
                leaf.data = leaf.data + moved(estimator, grad, state, rate, count)
        losses.append(total / len(y))
        if estimator.learning_rate == "invscaling":
            rate = estimator.learning_rate_init / ((epoch + 1) * len(y) + 1) ** estimator.power_t
        if estimator.learning_rate == "adaptive" and epoch == 2:
            rate = rate / 5
    found = {f"coefs_[{i}]": leaf.detach() for i, leaf in enumerate(leaves[::2])}
    found |= {f"intercepts_[{i}]": leaf.detach() for i, leaf in enumerate(leaves[1::2])}
    return {**found, "loss_curve_": torch.stack(losses)}


ACTIVATIONS: Mapping[str, Any] = {
    "identity": lambda x: x,
    "logistic": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
}


def loss_of(kind: str, output: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """The loss of each row, and how many times its gradient is descended along."""
    if kind == "softmax":
        return cross_entropy(output, target, reduction="none"), 1.0
    if kind == "logistic":
        return binary_cross_entropy_with_logits(output, target, reduction="none").sum(1), 1.0
    return (output - target).square().mean(1) / 2, output.shape[1]


def moved(estimator: Any, grad: Tensor, state: list[Tensor], rate: float, count: int) -> Tensor:
    """By how much a step moves a parameter."""
    if estimator.solver == "sgd":
        state[0] = estimator.momentum * state[0] - rate * grad
        return estimator.momentum * state[0] - rate * grad if estimator.nesterovs_momentum else state[0]
    first, second = estimator.beta_1, estimator.beta_2
    state[0] = first * state[0] + (1 - first) * grad
    state[1] = second * state[1] + (1 - second) * grad.square()
    rate = rate * (1 - second**count) ** 0.5 / (1 - first**count)
    return -rate * state[0] / (state[1].sqrt() + estimator.epsilon)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_weights(kind: str, setting: str, weighted: bool) -> None:
    name, X, y = draw(kind)
    weights = np.random.default_rng(1).uniform(0.5, 2, len(X)) if weighted else None
    options = {"max_iter": EPOCHS, "batch_size": 32, "shuffle": False, "random_state": 2, "hidden_layer_sizes": (6,)}
    options |= SETTINGS[setting]
    theirs = getattr(neural_network, name)(**options).fit(X, y, sample_weight=weights)
    ours = getattr(fastmlp.sklearn, name)(**options).fit(X, y, sample_weight=weights)
    expected = specified(theirs, X, y, weights)
    bounds = rounding_bounds(lambda: specified(theirs, X, y, weights), expected, steps=True)
    for contender in (theirs, ours):
        found = results(contender)
        assert {key: bool(distance(found[key], expected[key]) <= bounds[key]) for key in expected} == dict.fromkeys(
            expected, True
        )
    # Such bounds say something: a step moves parameters by much more.
    assert max(bounds.values()) < 1e-9
    for attribute in ("n_iter_", "t_", "n_layers_", "n_outputs_", "out_activation_", "n_features_in_"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert type(ours.loss_) is float
    assert abs(ours.best_loss_ - theirs.best_loss_) <= bounds["loss_curve_"]


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_draws(kind: str, early_stopping: bool) -> None:
    """Orders and rows held out are scikit-learn's too, and so are scores and when training stops."""
    name, X, y = draw(kind)
    options: dict[str, Any] = {"max_iter": 30, "batch_size": 20, "random_state": 5, "early_stopping": early_stopping}
    options |= {"validation_fraction": 0.3, "n_iter_no_change": 2, "tol": 1e-2, "learning_rate_init": 0.01}
    theirs, ours = (getattr(module, name)(**options).fit(X, y) for module in (neural_network, fastmlp.sklearn))
    assert ours.n_iter_ == theirs.n_iter_ < 30
    # Ten epochs multiply the roundings of one, whose bounds are tested above; other draws would differ by 0.1.
    for mine, other in zip(ours.coefs_ + ours.intercepts_, theirs.coefs_ + theirs.intercepts_, strict=True):
        assert np.abs(mine - other).max() < 1e-9
    if early_stopping:
        assert np.allclose(ours.validation_scores_, theirs.validation_scores_, rtol=1e-9)
        assert ours.best_validation_score_ == max(ours.validation_scores_)
        assert ours.best_loss_ is theirs.best_loss_ is None
    else:
        assert ours.validation_scores_ is ours.best_validation_score_ is None
    assert ours.score(X, y) == pytest.approx(theirs.score(X, y), rel=1e-9)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("solver", ["adam", "sgd"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_stream(kind: str, solver: str, weighted: bool) -> None:
    """`partial_fit` goes on with the optimizer's state, and `fit` with `warm_start` without it."""
    name, X, y = draw(kind)
    weights = np.random.default_rng(1).uniform(0.5, 2, len(X)) if weighted else None
    classes = np.unique(y) if y.ndim == 1 else np.arange(y.shape[1])
    first = {"classes": classes} if name == "MLPClassifier" else {}
    found = []
    for module in (neural_network, fastmlp.sklearn):
        estimator = getattr(module, name)(solver=solver, learning_rate="invscaling", random_state=0, max_iter=3)
        for i, rows in enumerate(np.split(np.arange(75), [30, 31, 60])):
            some = None if weights is None else weights[rows]
            estimator.partial_fit(X[rows], y[rows], sample_weight=some, **(first if i == 0 else {}))
        estimator.set_params(warm_start=True).fit(X, y, sample_weight=weights)
        found.append(estimator)
    theirs, ours = map(results, found)
    assert len(ours["loss_curve_"]) == 7
    for key in theirs:
        assert distance(ours[key], theirs[key]) < 1e-9 * theirs[key].abs().max(), key


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("data", ["digits", "diabetes", "made"])
def test_as_good_as_scikit_learn(data: str, dtype: Any) -> None:
    """On rows that were not trained on, as good as scikit-learn's within what seeds make of it."""
    if data == "diabetes":
        X, y = load_diabetes(return_X_y=True)
        y, options = y / 100, {"hidden_layer_sizes": (20,), "learning_rate_init": 0.01, "max_iter": 60}
    elif data == "digits":
        X, y = load_digits(return_X_y=True)
        X, options = X / 16, {"hidden_layer_sizes": (30,), "learning_rate_init": 0.01, "max_iter": 15}
    else:
        X, y = make_classification(2000, 50, n_informative=20, n_classes=5, random_state=0)
        options = {"hidden_layer_sizes": (30,), "learning_rate_init": 0.01, "max_iter": 15}
    X_train, X_test, y_train, y_test = train_test_split(X.astype(dtype), y, random_state=0)
    name = "MLPRegressor" if data == "diabetes" else "MLPClassifier"
    scores = []
    for module in (neural_network, fastmlp.sklearn):
        fitted = [getattr(module, name)(**options, random_state=seed).fit(X_train, y_train) for seed in range(3)]
        assert all(coef.dtype == dtype for estimator in fitted for coef in estimator.coefs_)
        scores.append(np.array([estimator.score(X_test, y_test) for estimator in fitted]))
    theirs, ours = scores
    assert theirs.min() > (0.3 if data == "diabetes" else 0.6)
    assert abs(ours.mean() - theirs.mean()) <= np.ptp(theirs)


def test_a_large_batch_of_labels() -> None:
    """Targets with several labels a row predict the same as scikit-learn's, probabilities included."""
    X, y = make_multilabel_classification(60, 6, random_state=0)
    options: dict[str, Any] = {"random_state": 0, "max_iter": 20, "learning_rate_init": 0.01}
    theirs, ours = (module.MLPClassifier(**options).fit(X, y) for module in (neural_network, fastmlp.sklearn))
    assert is_classifier(ours)
    assert np.array_equal(ours.predict(X), theirs.predict(X))
    assert np.allclose(ours.predict_proba(X), theirs.predict_proba(X), rtol=1e-9)
    assert np.allclose(ours.predict_log_proba(X), theirs.predict_log_proba(X), rtol=1e-9)

"""What classifier and regressor share: fitting, as scikit-learn's multilayer perceptrons do it.

The draws from `random_state` are those of scikit-learn, in the same order: weights, the rows held out, the order of
each epoch. So the same `random_state` gives the same network, within rounding.
"""

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor, nn

from fastmlp.data import progress_bar
from fastmlp.frozen import FrozenMLP, freeze
from fastmlp.sklearn.layers import Array, Network, locked
from fastmlp.sklearn.training import Rule, Trainer

__all__ = ["BaseMLP"]

_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


@dataclass(frozen=True)
class _HeldOut:
    """Rows that are not trained on.

    Attributes:
        model: that is trained. The frozen network follows it for as long as it exists.
        network: the model, frozen.
        inputs: of the rows.
        y: of the rows.
        weights: of the rows, or None.
    """

    model: nn.Module
    network: FrozenMLP
    inputs: Array
    y: Any
    weights: Array | None


class BaseMLP(BaseEstimator, ABC):
    """A multilayer perceptron with scikit-learn's parameters. Subclasses say what targets are."""

    def __init__(
        self,
        hidden_layer_sizes: Any = (100,),
        activation: str = "relu",
        *,
        solver: str = "adam",
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        learning_rate: str = "constant",
        learning_rate_init: float = 0.001,
        power_t: float = 0.5,
        max_iter: int = 200,
        shuffle: bool = True,
        random_state: Any = None,
        tol: float = 1e-4,
        verbose: bool = False,
        warm_start: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: float = 10,
        max_fun: int = 15000,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.solver = solver
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.learning_rate_init = learning_rate_init
        self.power_t = power_t
        self.max_iter = max_iter
        self.shuffle = shuffle
        self.random_state = random_state
        self.tol = tol
        self.verbose = verbose
        self.warm_start = warm_start
        self.momentum = momentum
        self.nesterovs_momentum = nesterovs_momentum
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.n_iter_no_change = n_iter_no_change
        self.max_fun = max_fun

    @abstractmethod
    def _validate_target(self, X: Any, y: Any, incremental: bool, reset: bool) -> tuple[Array, Any]:
        """X as C-contiguous float32 or float64 and y, after all checks; learns what there is to learn of y."""

    @abstractmethod
    def _encode(self, y: Any, dtype: Any) -> tuple[Array, int, str]:
        """Targets as PyTorch's loss takes them, the number of outputs, and the activation of the output."""

    @abstractmethod
    def _score_of(self, scores: Array, y: Any, sample_weight: Array | None) -> float:
        """How good outputs of the last layer are."""

    def _stratified_by(self, y: Any) -> Any:
        """What held-out rows are stratified by, or None."""
        return None

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Trains the network.

        Args:
            X: (n_samples, n_features), dense. float32 is trained in float32, and everything else in float64.
            y: (n_samples) or (n_samples, n_outputs).
            sample_weight: (n_samples): each loss counts so many times. None for ones, which is faster.

        Returns:
            The estimator.

        Raises:
            ValueError: for wrong shapes, parameters or data, `solver="lbfgs"`, and weights that become infinite or NaN.
            TypeError: for sparse data.
        """
        return self._fit(X, y, sample_weight, incremental=False)

    def _fit(self, X: Any, y: Any, sample_weight: Any, incremental: bool) -> Self:
        hidden = self._hidden_sizes()
        self._refuse(incremental)
        first = not hasattr(self, "coefs_") or not (self.warm_start or incremental)
        X, y = self._validate_target(X, y, incremental, first)
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, X, dtype=X.dtype)
        if not first:
            X = np.asarray(X, self.coefs_[0].dtype)
        targets, outputs, out_activation = self._encode(y, X.dtype)
        widths = [X.shape[1], *hidden, outputs]
        random = check_random_state(self.random_state)
        if first:
            self._begin(widths, X.dtype, out_activation, random)
        elif widths != self._widths():
            raise ValueError(
                f"fastmlp: the network would have the sizes {widths} now, and the one that is trained further has "
                f"{self._widths()}: hidden_layer_sizes and the number of outputs stay as they were, or fit anew with "
                "warm_start=False"
            )
        if first or (self.best_loss_ is None) != self.early_stopping:
            self._begin_comparisons()
        trainer = self._take_trainer(incremental)
        self._train(trainer, X, y, targets, sample_weight, random, incremental)
        self._take_weights(trainer)
        return self

    def _hidden_sizes(self) -> list[int]:
        given = self.hidden_layer_sizes
        sizes = [given] if isinstance(given, Integral) else list(given)
        if not all(isinstance(size, Integral) and int(size) > 0 for size in sizes):
            raise ValueError(f"fastmlp: hidden_layer_sizes must be > 0, each an integer, got {sizes}")
        return [int(size) for size in sizes]

    def _refuse(self, incremental: bool) -> None:
        """Raises for what is scikit-learn's alone."""
        if self.solver == "lbfgs":
            raise ValueError(
                "fastmlp: solver='lbfgs' is refused, because it does not train in batches: give 'adam' or 'sgd', or "
                f"take sklearn.neural_network.{type(self).__name__} for it (and for max_fun)"
            )
        if self.early_stopping and incremental:
            raise ValueError(
                "fastmlp: partial_fit does not support early_stopping=True: each call sees other data, so that no rows "
                "can be held out"
            )

    def _begin(self, widths: list[int], dtype: Any, out_activation: str, random: np.random.RandomState) -> None:
        """Draws weights: uniform, within the bounds of Glorot and Bengio, 2010."""
        self.coefs_, self.intercepts_ = [], []
        for fan_in, fan_out in pairwise(widths):
            bound = np.sqrt((2 if self.activation == "logistic" else 6) / (fan_in + fan_out))
            self.coefs_.append(random.uniform(-bound, bound, (fan_in, fan_out)).astype(dtype))
            self.intercepts_.append(random.uniform(-bound, bound, fan_out).astype(dtype))
        locked([*self.coefs_, *self.intercepts_])
        self.out_activation_ = out_activation
        self.n_layers_, self.n_outputs_ = len(widths), widths[-1]
        self.n_iter_, self.t_ = 0, 0
        self.loss_curve_: list[float] = []

    def _begin_comparisons(self) -> None:
        """Sets what epochs are compared with: the loss, or the score of rows held out."""
        self._no_improvement_count = 0
        self.best_loss_: Any = None if self.early_stopping else np.inf
        self.best_validation_score_: Any = -np.inf if self.early_stopping else None
        self.validation_scores_: list[float] | None = [] if self.early_stopping else None
        self._best = (self.coefs_, self.intercepts_) if self.early_stopping else None

    def _widths(self) -> list[int]:
        return [self.coefs_[0].shape[0], *(coef.shape[1] for coef in self.coefs_)]

    def _take_trainer(self, incremental: bool) -> Trainer:
        """What trains, with this estimator's weights: in `partial_fit` that of the last call, if there is one.

        It is given back by `_take_weights`, so that an error leaves none that is half moved.
        """
        trainer: Trainer | None = self.__dict__.pop("_trainer", None)
        if trainer is None or not incremental:
            names = Rule.__dataclass_fields__
            rule = Rule(**{name: getattr(self, name) for name in names})
            dtype = torch.float32 if self.coefs_[0].dtype == np.float32 else torch.float64
            trainer = Trainer(self._widths(), dtype, self.out_activation_, rule)
        trainer.load(self.coefs_, self.intercepts_)
        return trainer

    def _take_weights(self, trainer: Trainer) -> None:
        if not trainer.is_finite():
            raise ValueError(
                "fastmlp: training has made weights that are infinite or NaN: scale the input data, for example by "
                "sklearn.preprocessing.StandardScaler, or give a smaller learning_rate_init"
            )
        self.coefs_, self.intercepts_ = self._best or trainer.read()
        self._trainer = trainer
        self._network = Network(self.coefs_, self.intercepts_, self.activation)

    def _train(
        self,
        trainer: Trainer,
        X: Array,
        y: Any,
        targets: Array,
        sample_weight: Array | None,
        random: np.random.RandomState,
        incremental: bool,
    ) -> None:
        tensors = [_tensor(array) for array in (X, targets, sample_weight) if array is not None]
        held_out = None
        if self.early_stopping:
            train, held = self._held_out(len(X), y, random)
            weights = None if sample_weight is None else sample_weight[held]
            model = trainer.model(self.activation)
            held_out = _HeldOut(model, freeze(model), X[held], y[held], weights)
            index = torch.from_numpy(train)
            tensors = [tensor[index] for tensor in tensors]
        self.n_iter_ = 0
        bar = progress_bar(self.max_iter, "epoch", "verbose=True") if self.verbose and not incremental else None
        try:
            self._run_epochs(trainer, tensors, held_out, random, incremental, bar)
        except KeyboardInterrupt:
            warnings.warn("fastmlp: training was interrupted, and the estimator has the weights so far", stacklevel=5)
        finally:
            if bar is not None:
                bar.close()

    def _held_out(self, rows: int, y: Any, random: np.random.RandomState) -> tuple[Array, Array]:
        """Indices of rows to train on, and of rows to hold out."""
        train, held = train_test_split(
            np.arange(rows),
            random_state=random,
            test_size=self.validation_fraction,
            stratify=self._stratified_by(y),
        )
        if len(held) < 2:
            raise ValueError(
                f"fastmlp: validation_fraction={self.validation_fraction} of {rows} rows holds out {len(held)}, and "
                "the validation set takes at least 2: give a larger fraction, or early_stopping=False"
            )
        return train, held

    def _run_epochs(
        self,
        trainer: Trainer,
        data: list[Tensor],
        held_out: _HeldOut | None,
        random: np.random.RandomState,
        incremental: bool,
        bar: Any,
    ) -> None:
        rows = len(data[0])
        batch_size, order = self._batch_rows(rows), np.arange(rows)
        while self.n_iter_ < (1 if incremental else self.max_iter):
            if self.shuffle:
                # As sklearn.utils.shuffle draws it, in a fraction of its time.
                order = order[random.permutation(rows)]
            self.loss_ = trainer.epoch(data, torch.from_numpy(order), batch_size, self.alpha, self.activation)
            self.n_iter_ += 1
            self.t_ += rows
            self.loss_curve_.append(self.loss_)
            self._compare(trainer, held_out)
            trainer.end_epoch(self.t_)
            if bar is not None:
                score = {} if self.validation_scores_ is None else {"score": f"{self.validation_scores_[-1]:.4g}"}
                bar.set_postfix(loss=f"{self.loss_:.4g}", **score)
                bar.update(1)
            if self._no_improvement_count > self.n_iter_no_change:
                if not trainer.slow_down():
                    return
                self._no_improvement_count = 0
        if not incremental:
            warnings.warn(
                f"fastmlp: training has not converged after max_iter={self.max_iter} epochs",
                ConvergenceWarning,
                stacklevel=6,
            )

    def _batch_rows(self, rows: int) -> int:
        if isinstance(self.batch_size, str):
            return min(200, rows)
        if self.batch_size > rows:
            warnings.warn(
                f"fastmlp: batch_size={self.batch_size} is larger than the number of rows, {rows}, which make one "
                "batch",
                stacklevel=6,
            )
        return int(min(self.batch_size, rows))

    def _compare(self, trainer: Trainer, held_out: _HeldOut | None) -> None:
        """Counts epochs that did not get better by `tol`, and keeps what was best.

        NaN does not count, as it does not with scikit-learn.
        """
        if held_out is None:
            improved = not self.loss_ > self.best_loss_ - self.tol
            self.best_loss_ = min(self.best_loss_, self.loss_)
        else:
            assert self.validation_scores_ is not None
            scores = held_out.network(held_out.inputs)
            finite = bool(np.isfinite(scores).all())
            score = self._score_of(scores, held_out.y, held_out.weights) if finite else np.nan
            self.validation_scores_.append(score)
            improved = not score < self.best_validation_score_ + self.tol
            if score > self.best_validation_score_:
                self.best_validation_score_ = score
                self._best = trainer.read()
        self._no_improvement_count = 0 if improved else self._no_improvement_count + 1

    def _scores(self, X: Any) -> Array:
        """What the last layer computes, before the activation of the output."""
        if not self._is_plain(X):
            check_is_fitted(self)
            X = validate_data(self, X, reset=False)
        network: Network = self._network
        if not network.is_of(self.coefs_, self.intercepts_, self.activation):
            # Somebody gave the estimator other weights. They might be written to, so that the network is not kept.
            network = Network(self.coefs_, self.intercepts_, self.activation)
        return network(X)

    def _is_plain(self, X: Any) -> bool:
        """Whether scikit-learn's checks would change nothing and find nothing wrong, for which they take 200 us."""
        state = self.__dict__
        if (
            type(X) is not np.ndarray
            or X.dtype not in _DTYPES
            or X.ndim != 2
            or len(X) == 0
            or X.shape[1] != state.get("n_features_in_")
            or "feature_names_in_" in state
            or "_network" not in state
        ):
            return False
        # A sum that is infinite may be one of finite numbers, and is left to the checks.
        with np.errstate(over="ignore", invalid="ignore"):
            return bool(np.isfinite(X.sum()))

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        state.pop("_network", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if hasattr(self, "coefs_"):
            locked([*self.coefs_, *self.intercepts_])
            self._network = Network(self.coefs_, self.intercepts_, self.activation)


def _tensor(array: Array) -> Tensor:
    # PyTorch warns of memory that is read-only, such as a file's that is mapped.
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))

"""scikit-learn's `MLPRegressor`, trained and served by `fastmlp`."""

from typing import Any, Self

import numpy as np
from sklearn import neural_network
from sklearn.base import RegressorMixin, _fit_context
from sklearn.metrics import r2_score
from sklearn.utils import column_or_1d
from sklearn.utils.validation import validate_data

from fastmlp.sklearn.base import BaseMLP
from fastmlp.sklearn.layers import Array

__all__ = ["MLPRegressor"]


class MLPRegressor(RegressorMixin, BaseMLP):
    """`sklearn.neural_network.MLPRegressor`, faster.

    It minimizes half of the squared error. From the same `random_state` it learns the same function as scikit-learn's,
    within rounding.

    Args:
        loss: "squared_error". "poisson" is refused.
        hidden_layer_sizes: the number of neurons of each hidden layer; an integer for one layer, empty for none.
        activation: after each hidden layer: "identity", "logistic", "tanh" or "relu".
        solver: "adam" (Kingma and Ba, 2015) or "sgd". "lbfgs" is refused.
        alpha: strength of the L2 penalty on the weights, biases aside. It is divided by the number of rows of a batch.
        batch_size: rows of a batch, or "auto" for 200, or all rows if there are fewer.
        learning_rate: of "sgd": "constant", "invscaling" (learning_rate_init / (t + 1) ** power_t after an epoch, when
            t rows have been seen in all), or "adaptive" (divided by 5 where other solvers would stop, until it is at
            most 1e-6).
        learning_rate_init: the first learning rate, above 0.
        power_t: the exponent of "invscaling".
        max_iter: how many epochs are trained at most.
        shuffle: whether each epoch takes the rows in a new order.
        random_state: an integer, a `numpy.random.RandomState` or None, from which weights, the rows held out and orders
            are drawn: the same draws as scikit-learn's.
        tol: an epoch that does not improve the loss, or the score of rows held out, by so much counts as none.
        verbose: whether `fit` shows a progress bar. It takes the package tqdm.
        warm_start: whether `fit` goes on with the weights of the last call.
        momentum: of "sgd", between 0 and 1.
        nesterovs_momentum: whether it is Nesterov's.
        early_stopping: whether rows are held out, epochs are judged by their R2, and the weights
            of the best epoch are kept.
        validation_fraction: of the rows that `early_stopping` holds out.
        beta_1: decay of Adam's first moment, below 1.
        beta_2: decay of Adam's second moment, below 1.
        epsilon: added to the root of Adam's second moment, before the correction of its bias.
        n_iter_no_change: training stops after more than so many epochs in a row that improve nothing; may be infinite.
        max_fun: of "lbfgs" alone, and not used.

    Attributes:
        loss_: the loss of the last epoch: the mean over its rows, with the penalty.
        best_loss_: the least of all epochs; None with `early_stopping`.
        loss_curve_: the loss of each epoch.
        validation_scores_: R2 of the rows held out, after each epoch; None without `early_stopping`.
        best_validation_score_: the largest of them, or None.
        coefs_: the weights of each layer, (fan_in, fan_out). They are read-only: to change weights, assign other
            arrays.
        intercepts_: the biases of each layer, (fan_out), read-only too.
        n_iter_: epochs of the last call.
        t_: rows seen in all epochs.
        n_layers_: the number of layers, that of the input included.
        n_outputs_: the number of outputs.
        out_activation_: "identity".
        n_features_in_: columns of X.
        feature_names_in_: their names, where X has names that are all strings.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> X, y = load_diabetes(return_X_y=True)
        >>> network = MLPRegressor(hidden_layer_sizes=[20], learning_rate_init=0.1, random_state=0, max_iter=500)
        >>> network.fit(X, y).predict(X[:3]).shape
        (3,)
        >>> bool(network.score(X, y) > 0.5)
        True
    """

    _parameter_constraints = neural_network.MLPRegressor._parameter_constraints

    def __init__(
        self,
        loss: str = "squared_error",
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
        super().__init__(
            hidden_layer_sizes=hidden_layer_sizes,
            activation=activation,
            solver=solver,
            alpha=alpha,
            batch_size=batch_size,
            learning_rate=learning_rate,
            learning_rate_init=learning_rate_init,
            power_t=power_t,
            max_iter=max_iter,
            shuffle=shuffle,
            random_state=random_state,
            tol=tol,
            verbose=verbose,
            warm_start=warm_start,
            momentum=momentum,
            nesterovs_momentum=nesterovs_momentum,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            n_iter_no_change=n_iter_no_change,
            max_fun=max_fun,
        )
        self.loss = loss

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Trains for one epoch over the given data, from where the last call ended.

        Args:
            X: (n_samples, n_features), dense.
            y: (n_samples) or (n_samples, n_outputs).
            sample_weight: (n_samples), or None.

        Returns:
            The estimator.

        Raises:
            ValueError: as `fit`, and with `early_stopping`.
            TypeError: for sparse data.

        Example:
            >>> network = MLPRegressor(random_state=0).partial_fit([[0.0], [1.0]], [0.0, 1.0])
            >>> len(network.partial_fit([[2.0]], [4.0]).loss_curve_)
            2
        """
        return self._fit(X, y, sample_weight, incremental=True)

    def _refuse(self, incremental: bool) -> None:
        super()._refuse(incremental)
        if self.loss != "squared_error":
            raise ValueError(
                f"fastmlp: loss={self.loss!r} is refused, expected 'squared_error': take "
                "sklearn.neural_network.MLPRegressor for it"
            )

    def _validate_target(self, X: Any, y: Any, incremental: bool, reset: bool) -> tuple[Array, Any]:
        X, y = validate_data(
            self,
            X,
            y,
            multi_output=True,
            y_numeric=True,
            dtype=(np.float64, np.float32),
            order="C",
            reset=reset,
        )
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        return X, y

    def _encode(self, y: Any, dtype: Any) -> tuple[Array, int, str]:
        targets = np.asarray(y, dtype).reshape(len(y), -1)
        return targets, targets.shape[1], "identity"

    def _score_of(self, scores: Array, y: Any, sample_weight: Array | None) -> float:
        return float(r2_score(y, scores, sample_weight=sample_weight))

    def predict(self, X: Any) -> Array:
        """The targets of rows.

        Args:
            X: (n_samples, n_features), dense.

        Returns:
            (n_samples), or (n_samples, n_outputs) if there are several.

        Raises:
            ValueError: for wrong shapes or values that are infinite or NaN.
            TypeError: for sparse data.
        """
        scores = self._scores(X)
        return scores.ravel() if self.n_outputs_ == 1 else scores

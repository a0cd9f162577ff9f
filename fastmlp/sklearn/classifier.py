"""scikit-learn's `MLPClassifier`, trained and served by `fastmlp`."""

from typing import Any, Self

import numpy as np
import torch
from sklearn import neural_network
from sklearn.base import ClassifierMixin, _fit_context
from sklearn.metrics import accuracy_score
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils import column_or_1d
from sklearn.utils.multiclass import (
    _check_partial_fit_first_call,
    check_classification_targets,
    type_of_target,
    unique_labels,
)
from sklearn.utils.validation import validate_data

from fastmlp.sklearn.base import BaseMLP
from fastmlp.sklearn.layers import Array

__all__ = ["MLPClassifier"]

#: The activation of the output, by what kind of target there is.
_OUT_ACTIVATIONS = {"multiclass": "softmax", "binary": "logistic", "multilabel-indicator": "logistic"}


class MLPClassifier(ClassifierMixin, BaseMLP):
    """`sklearn.neural_network.MLPClassifier`, faster.

    It minimizes the log loss: that of the softmax where there are more than two classes, and that of the logistic
    function of each output for two classes and for several labels a row. From the same `random_state` it learns the
    same function as scikit-learn's, within rounding.

    Args:
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
        early_stopping: whether rows are held out, epochs are judged by their accuracy, and the weights
            of the best epoch are kept.
        validation_fraction: of the rows that `early_stopping` holds out.
        beta_1: decay of Adam's first moment, below 1.
        beta_2: decay of Adam's second moment, below 1.
        epsilon: added to the root of Adam's second moment, before the correction of its bias.
        n_iter_no_change: training stops after more than so many epochs in a row that improve nothing; may be infinite.
        max_fun: of "lbfgs" alone, and not used.

    Attributes:
        classes_: the labels.
        loss_: the loss of the last epoch: the mean over its rows, with the penalty.
        best_loss_: the least of all epochs; None with `early_stopping`.
        loss_curve_: the loss of each epoch.
        validation_scores_: accuracy of the rows held out, after each epoch; None without `early_stopping`.
        best_validation_score_: the largest of them, or None.
        coefs_: the weights of each layer, (fan_in, fan_out). They are read-only: to change weights, assign other
            arrays.
        intercepts_: the biases of each layer, (fan_out), read-only too.
        n_iter_: epochs of the last call.
        t_: rows seen in all epochs.
        n_layers_: the number of layers, that of the input included.
        n_outputs_: the number of outputs.
        out_activation_: "softmax" or "logistic".
        n_features_in_: columns of X.
        feature_names_in_: their names, where X has names that are all strings.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from sklearn.pipeline import make_pipeline
        >>> from sklearn.preprocessing import StandardScaler
        >>> X, y = load_iris(return_X_y=True)
        >>> network = MLPClassifier([20], learning_rate_init=0.01, max_iter=500, random_state=0)
        >>> model = make_pipeline(StandardScaler(), network).fit(X, y)
        >>> bool(model.score(X, y) > 0.95), model.predict_proba(X).shape
        (True, (150, 3))
    """

    _parameter_constraints = neural_network.MLPClassifier._parameter_constraints

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, classes: Any = None) -> Self:
        """Trains for one epoch over the given data, from where the last call ended.

        Args:
            X: (n_samples, n_features), dense.
            y: (n_samples), or (n_samples, n_classes) for several labels a row.
            sample_weight: (n_samples), or None.
            classes: all labels of all calls, for the first one.

        Returns:
            The estimator.

        Raises:
            ValueError: as `fit`, without `classes` in the first call, and with `early_stopping`.
            TypeError: for sparse data.

        Example:
            >>> network = MLPClassifier(random_state=0).partial_fit([[0.0], [1.0]], [0, 1], classes=[0, 1, 2])
            >>> network.partial_fit([[2.0], [1.5]], [2, 1]).n_outputs_
            3
        """
        if _check_partial_fit_first_call(self, classes):
            self._label_binarizer = LabelBinarizer().fit(y if _is_multilabel(y) else classes)
        return self._fit(X, y, sample_weight, incremental=True)

    def _validate_target(self, X: Any, y: Any, incremental: bool, reset: bool) -> tuple[Array, Any]:
        X, y = validate_data(self, X, y, multi_output=True, dtype=(np.float64, np.float32), order="C", reset=reset)
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        if reset and not incremental:
            self._label_binarizer = LabelBinarizer().fit(y)
            self.classes_ = self._label_binarizer.classes_
            return X, y
        found = unique_labels(y)
        strangers = np.setdiff1d(found, self.classes_, assume_unique=True)
        if len(strangers) > 0 or (not incremental and len(found) < len(self.classes_)):
            which = "all of these, with warm_start=True" if not incremental else "classes among these"
            raise ValueError(f"fastmlp: `y` has classes {found}, and classes_ are {self.classes_}: expected {which}")
        return X, y

    def _encode(self, y: Any, dtype: Any) -> tuple[Array, int, str]:
        kind = self._label_binarizer.y_type_
        if kind == "multiclass":
            return np.searchsorted(self.classes_, y), len(self.classes_), "softmax"
        targets = self._label_binarizer.transform(y).astype(dtype)
        return targets, targets.shape[1], "logistic"

    def _stratified_by(self, y: Any) -> Any:
        return y if self._label_binarizer.y_type_ == "binary" else None

    def _labels_of(self, scores: Array) -> Array:
        # A probability above one half is a score above zero, and the largest one has the largest score.
        if self.out_activation_ == "softmax":
            return self.classes_[scores.argmax(1)]
        if self._label_binarizer.y_type_ == "binary" and len(self.classes_) == 2:
            return self.classes_[(scores.ravel() > 0).astype(np.intp)]
        return self._label_binarizer.inverse_transform(scores.ravel() if self.n_outputs_ == 1 else scores, 0.0)

    def _score_of(self, scores: Array, y: Any, sample_weight: Array | None) -> float:
        return float(accuracy_score(y, self._labels_of(scores), sample_weight=sample_weight))

    def predict(self, X: Any) -> Array:
        """The classes of rows.

        Args:
            X: (n_samples, n_features), dense.

        Returns:
            Labels, (n_samples), or for several labels a row indicators, (n_samples, n_classes).

        Raises:
            ValueError: for wrong shapes or values that are infinite or NaN.
            TypeError: for sparse data.
        """
        return self._labels_of(self._scores(X))

    def predict_proba(self, X: Any) -> Array:
        """The probabilities of classes.

        Args:
            X: (n_samples, n_features), dense.

        Returns:
            (n_samples, n_classes), in the order of `classes_`.

        Raises:
            ValueError: as `predict`.
            TypeError: as `predict`.
        """
        scores = torch.from_numpy(self._scores(X))
        if self.out_activation_ == "softmax":
            return scores.softmax(1).numpy()
        probabilities = scores.sigmoid()
        return (torch.cat([1 - probabilities, probabilities], 1) if self.n_outputs_ == 1 else probabilities).numpy()

    def predict_log_proba(self, X: Any) -> Array:
        """The logarithms of `predict_proba`, finite also where that is so small that it is zero.

        Args:
            X: (n_samples, n_features), dense.

        Returns:
            (n_samples, n_classes), in the order of `classes_`.

        Raises:
            ValueError: as `predict`.
            TypeError: as `predict`.
        """
        scores = torch.from_numpy(self._scores(X))
        if self.out_activation_ == "softmax":
            return scores.log_softmax(1).numpy()
        both = torch.cat([-scores, scores], 1) if self.n_outputs_ == 1 else scores
        return torch.nn.functional.logsigmoid(both).numpy()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


def _is_multilabel(y: Any) -> bool:
    return str(type_of_target(y)).startswith("multilabel")

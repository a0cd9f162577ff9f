"""`fastmlp.sklearn` as estimators: scikit-learn's checks, its tools, pickles, and what is refused."""

import copy
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn import neural_network
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from fastmlp.sklearn import MLPClassifier, MLPRegressor
from fastmlp.sklearn.training import Trainer

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

CLASSES = (MLPClassifier, MLPRegressor)
X = np.random.default_rng(0).standard_normal((40, 3))
#: Targets of either estimator.
Y = {MLPClassifier: np.arange(40) % 3, MLPRegressor: X @ [1.0, 2.0, -1.0]}

#: What scikit-learn's checks say of checks that cannot be made here: nothing of the estimator's own.
CANNOT_BE_CHECKED = ("pandas is not installed", "SCIPY_ARRAY_API is not set", "does not have a decision_function")


def fitted(kind: Any, **options: Any) -> Any:
    return kind(**{"hidden_layer_sizes": (5,), "random_state": 0, "max_iter": 5, **options}).fit(X, Y[kind])


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("solver", ["adam", "sgd"])
def test_scikit_learn_s_checks(kind: Any, solver: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = check_estimator(kind(solver=solver, max_iter=100), on_fail=None, on_skip=None)
    assert len(found) > 50
    assert [(one["check_name"], one["exception"]) for one in found if one["status"] not in ("passed", "skipped")] == []
    reasons = [str(one["exception"]) for one in found if one["status"] == "skipped"]
    assert [reason for reason in reasons if not any(known in reason for known in CANNOT_BE_CHECKED)] == []


@pytest.mark.parametrize("kind", CLASSES)
def test_the_same_parameters(kind: Any) -> None:
    """Names, their order and defaults are scikit-learn's."""
    theirs = getattr(neural_network, kind.__name__)()
    assert list(kind().get_params().items()) == list(theirs.get_params().items())
    assert kind()._get_param_names() == theirs._get_param_names()


@pytest.mark.parametrize("kind", CLASSES)
def test_the_same_attributes(kind: Any) -> None:
    """What fitting leaves has the names, types and shapes of scikit-learn's."""
    options: dict[str, Any] = {"hidden_layer_sizes": (4, 3), "max_iter": 3}
    theirs, ours = getattr(neural_network, kind.__name__)(**options), kind(**options)
    for estimator in (theirs, ours):
        estimator.fit(X, Y[kind])
    public = [name for name in vars(theirs) if name.endswith("_") and not name.startswith("_")]
    # These two are floats, of Python and of NumPy.
    public = [name for name in public if name not in ("loss_", "best_loss_")]
    assert {name: type(getattr(ours, name)) for name in public} == {
        name: type(getattr(theirs, name)) for name in public
    }
    assert isinstance(ours.loss_, float)
    assert isinstance(ours.best_loss_, float)
    for name in ("coefs_", "intercepts_"):
        assert [a.shape for a in getattr(ours, name)] == [a.shape for a in getattr(theirs, name)]
    assert ours.predict(X).dtype == theirs.predict(X).dtype


def test_pipelines_and_grid_search() -> None:
    inputs, labels = load_iris(return_X_y=True)
    network = MLPClassifier((8,), learning_rate_init=0.05, max_iter=40, random_state=0)
    pipeline = make_pipeline(StandardScaler(), network)
    search = GridSearchCV(pipeline, {"mlpclassifier__alpha": [1e-4, 100.0]}, cv=3).fit(inputs, labels)
    assert search.best_params_ == {"mlpclassifier__alpha": 1e-4}
    assert search.score(inputs, labels) > 0.95
    assert clone(network).get_params() == network.get_params()
    assert not hasattr(clone(search.best_estimator_[-1]), "coefs_")


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("copied", [lambda one: pickle.loads(pickle.dumps(one)), copy.deepcopy], ids=["pickle", "copy"])
@pytest.mark.parametrize("solver", ["adam", "sgd"])
def test_copies(kind: Any, copied: Any, solver: str) -> None:
    """They predict the same bits, and go on learning with the state of the optimizer."""
    estimator = kind(solver=solver, random_state=0)
    for _ in range(3):
        estimator.partial_fit(X, Y[kind], **({"classes": [0, 1, 2]} if kind is MLPClassifier else {}))
    other = copied(estimator)
    assert np.array_equal(other.predict(X), estimator.predict(X))
    for one in (estimator, other):
        one.partial_fit(X, Y[kind])
    for mine, others in zip(estimator.coefs_, other.coefs_, strict=True):
        assert np.array_equal(mine, others)
    assert not other.coefs_[0].flags.writeable


@pytest.mark.parametrize("kind", CLASSES)
def test_pickles_in_a_new_process(kind: Any, tmp_path: Path) -> None:
    estimator = fitted(kind)
    (tmp_path / "estimator").write_bytes(pickle.dumps(estimator))
    np.save(tmp_path / "X.npy", X)
    code = (
        "import pickle, numpy as np; X = np.load('X.npy'); "
        "np.save('y.npy', pickle.load(open('estimator', 'rb')).predict(X))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert np.array_equal(np.load(tmp_path / "y.npy"), estimator.predict(X))


def test_import_without_scikit_learn() -> None:
    """Only `fastmlp.sklearn` imports it, and says so where it is missing."""
    code = (
        "import sys; sys.modules['sklearn'] = None; import fastmlp\n"
        "try: import fastmlp.sklearn\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "fastmlp: fastmlp.sklearn takes the package scikit-learn, which cannot be imported: pip install scikit-learn\n"
    )


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("trained", [np.float32, np.float64])
@pytest.mark.parametrize("given", [np.float32, np.float64, np.int64, np.float16, ">f8"])
def test_dtypes(kind: Any, trained: Any, given: Any) -> None:
    """Predictions have the dtypes of scikit-learn's, and as few roundings."""
    inputs = np.round(X * 8)
    theirs = getattr(neural_network, kind.__name__)((5,), max_iter=3, random_state=0)
    if kind is MLPRegressor:
        theirs = neural_network.MLPRegressor(hidden_layer_sizes=(5,), max_iter=3, random_state=0)
    ours = kind(**theirs.get_params())
    found = []
    for estimator in (theirs, ours):
        estimator.fit(inputs.astype(trained), Y[kind])
        assert all(array.dtype == trained for array in estimator.coefs_ + estimator.intercepts_)
        predict = estimator.predict if kind is MLPRegressor else estimator.predict_proba
        found.append(predict(inputs.astype(given)))
    assert found[0].dtype == found[1].dtype
    assert np.abs(found[0] - found[1]).max() <= 1e3 * np.finfo(trained).eps * np.abs(found[0]).max()


@pytest.mark.parametrize("kind", CLASSES)
def test_layouts_and_threads(kind: Any) -> None:
    """The bits of a row depend on neither the batch nor its memory, in any number of threads."""
    estimator = fitted(kind)
    scores = estimator._scores
    expected = scores(X)
    read_only = X.copy()
    read_only.flags.writeable = False
    for same in (np.asfortranarray(X), X[::-1][::-1], read_only, np.repeat(X, 2, 0)[::2], X.tolist()):
        assert np.array_equal(scores(same), expected)
    assert np.array_equal(np.concatenate([scores(X[i : i + 1]) for i in range(len(X))]), expected)
    other = fitted(kind, learning_rate_init=0.1)  # whose network no call has frozen yet
    found: list[Any] = [None] * 8

    def call(i: int) -> None:
        found[i] = other._scores(X[i:])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[i], other._scores(X)[i:]) for i in range(8))


@pytest.mark.parametrize("kind", CLASSES)
def test_weights_that_are_assigned(kind: Any) -> None:
    """They cannot be written to unseen; others can take their place, and predictions and training use them."""
    estimator = fitted(kind)
    with pytest.raises(ValueError, match="read-only"):
        estimator.coefs_[0][0] = 0
    before = estimator._scores(X)
    estimator.coefs_[-1] = estimator.coefs_[-1] * 2
    estimator.intercepts_ = [*estimator.intercepts_[:-1], estimator.intercepts_[-1] * 2]
    assert np.allclose(estimator._scores(X), 2 * before)
    estimator.coefs_[-1] *= 2
    estimator.intercepts_[-1] *= 2
    assert np.allclose(estimator._scores(X), 4 * before)
    estimator.set_params(learning_rate_init=1e-12, max_iter=1, warm_start=True).fit(X, Y[kind])
    assert np.allclose(estimator._scores(X), 4 * before)


def test_activation_that_changes() -> None:
    estimator = fitted(MLPRegressor)
    theirs = neural_network.MLPRegressor(**estimator.get_params()).fit(X, Y[MLPRegressor])
    for one in (estimator, theirs):
        one.set_params(activation="tanh")
    assert np.allclose(estimator.predict(X), theirs.predict(X))


def test_classes() -> None:
    """Labels of any kind, one class alone, and several labels a row that are sparse."""
    names = np.array(["b", "a", "c"], object)[Y[MLPClassifier]]
    words = fitted(MLPClassifier).fit(X, names)
    assert list(words.classes_) == ["a", "b", "c"]
    assert set(words.predict(X)) <= {"a", "b", "c"}
    assert set(MLPClassifier((3,), max_iter=2).fit(X, np.full(40, 7)).predict(X)) == {7}
    indicators = np.stack([Y[MLPClassifier] == 0, X[:, 0] > 0], 1).astype(int)
    dense, sparse = (fitted(MLPClassifier).fit(X, y) for y in (indicators, csr_matrix(indicators)))
    assert np.array_equal(sparse.predict(X).toarray(), dense.predict(X))


def test_log_probabilities_stay_finite() -> None:
    for labels in (Y[MLPClassifier], Y[MLPClassifier] > 0):
        estimator = MLPClassifier((3,), random_state=0, max_iter=2).fit(X, labels)
        far = estimator.predict_log_proba(1e6 * X)
        assert np.isfinite(far).all()
        assert far.min() < -1e4
        assert np.allclose(np.exp(estimator.predict_log_proba(X)), estimator.predict_proba(X))


def test_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    fitted(MLPRegressor, verbose=True)
    assert "5/5" in capsys.readouterr().err
    fitted(MLPClassifier, verbose=True, early_stopping=True, max_iter=3)
    shown = capsys.readouterr().err
    assert "loss=" in shown
    assert "score=" in shown


def test_the_bar_takes_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"^fastmlp: verbose=True takes the package tqdm.*pip install tqdm$"):
        fitted(MLPRegressor, verbose=True)


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights so far stay, with a warning, as scikit-learn does it."""
    whole, calls = Trainer.epoch, []

    def epoch(self: Trainer, *args: Any) -> float:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(Trainer, "epoch", epoch)
    with pytest.warns(UserWarning, match="^fastmlp: training was interrupted"):
        estimator = fitted(MLPRegressor)
    monkeypatch.undo()
    assert estimator.n_iter_ == 2
    assert np.array_equal(estimator.predict(X), fitted(MLPRegressor, max_iter=2).predict(X))


def test_warnings() -> None:
    with pytest.warns(ConvergenceWarning, match="^fastmlp: training has not converged after max_iter=2 epochs$"):
        fitted(MLPRegressor, max_iter=2)
    with pytest.warns(UserWarning, match="^fastmlp: batch_size=41 is larger than the number of rows, 40"):
        fitted(MLPRegressor, batch_size=41)


def test_generators_of_pytorch_are_left_alone() -> None:
    before = torch.get_rng_state()
    fitted(MLPClassifier)
    assert torch.equal(torch.get_rng_state(), before)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "lbfgs": (MLPClassifier, {"solver": "lbfgs"}, "fastmlp: solver='lbfgs' is refused.*neural_network.MLPClassifier"),
    "poisson": (MLPRegressor, {"loss": "poisson"}, "fastmlp: loss='poisson' is refused.*neural_network.MLPRegressor"),
    "sizes": (MLPRegressor, {"hidden_layer_sizes": (5, 0)}, r"fastmlp: hidden_layer_sizes must be > 0.*\[5, 0\]"),
    "fractions": (MLPRegressor, {"hidden_layer_sizes": (2.5,)}, "fastmlp: hidden_layer_sizes must be > 0"),
    "held out": (
        MLPRegressor,
        {"early_stopping": True, "validation_fraction": 0.02},
        "fastmlp: validation_fraction=0.02 of 40 rows holds out 1",
    ),
    "rate": (
        MLPRegressor,
        {"solver": "sgd", "learning_rate": "invscaling", "power_t": 1e3},
        "fastmlp: learning_rate='invscaling' with power_t=1000.0",
    ),
    "huge": (MLPRegressor, {"solver": "sgd", "learning_rate_init": 1e200}, "fastmlp: training has made weights"),
    "activation": (MLPRegressor, {"activation": "gelu"}, "The 'activation' parameter of MLPRegressor must be a str"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    kind, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        fitted(kind, **options)


def test_refused_later() -> None:
    estimator = fitted(MLPRegressor)
    with pytest.raises(ValueError, match=r"^fastmlp: partial_fit does not support early_stopping=True"):
        fitted(MLPRegressor, early_stopping=True).partial_fit(X, Y[MLPRegressor])
    with pytest.raises(ValueError, match=r"^fastmlp: the network would have the sizes \[3, 4, 1\] now.*\[3, 5, 1\]"):
        estimator.set_params(warm_start=True, hidden_layer_sizes=(4,)).fit(X, Y[MLPRegressor])
    classifier = fitted(MLPClassifier, warm_start=True)
    for labels in (Y[MLPClassifier] % 2, Y[MLPClassifier] + 1):
        with pytest.raises(ValueError, match=r"^fastmlp: `y` has classes"):
            classifier.fit(X, labels)
    with pytest.raises(ValueError, match=r"^fastmlp: `y` has classes \[1 2 3\]"):
        classifier.partial_fit(X, Y[MLPClassifier] + 1)
    with pytest.raises(ValueError, match=r"^fastmlp: sample_weight: the weights of a batch sum up to zero"):
        fitted(MLPRegressor, shuffle=False, batch_size=20).fit(X, Y[MLPRegressor], np.arange(40) >= 20)
    with pytest.raises(TypeError, match="Sparse"):
        estimator.predict(csr_matrix(X))
    with pytest.raises(NotFittedError):
        MLPRegressor().predict(X)


def test_an_error_leaves_the_weights() -> None:
    """Training that fails moves nothing."""
    estimator = fitted(MLPRegressor, solver="sgd", warm_start=True)
    before = estimator.predict(X)
    with pytest.raises(ValueError, match="infinite or NaN"):
        estimator.set_params(learning_rate_init=1e200).fit(X, Y[MLPRegressor])
    assert np.array_equal(estimator.predict(X), before)
    with pytest.raises(ValueError, match="contains NaN"):
        estimator.predict(np.full((1, 3), np.nan))
    assert np.isfinite(estimator.predict(np.full((2, 3), 1e300))).all()
    with pytest.raises(ValueError, match="expecting 3 features"):
        estimator.predict(np.zeros((1, 4)))

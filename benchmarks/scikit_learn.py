"""`fastmlp.sklearn` beside scikit-learn's own estimators: times of fit and predict, and scores on rows held out."""

import argparse
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from sklearn import neural_network
from sklearn.datasets import load_diabetes, load_digits, make_classification
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

import fastmlp.sklearn
from benchmarks.machine import describe
from benchmarks.tables import console
from fastmlp.benchmark.timing import Effort, race

#: Whose estimators run: the yardstick first.
MODULES: dict[str, Any] = {"scikit-learn": neural_network, "fastmlp": fastmlp.sklearn}

#: Rows that a prediction has, besides all that are held out.
FEW = (1, 64)

CAPTION = """
fit x, predict x: the time of scikit-learn's estimator over that of fastmlp's, medians over rounds in turn, quartiles \
in brackets; score: on rows held out, of both"""


def digits() -> tuple[Any, Any]:
    """1797 images of 64 pixels, 10 classes."""
    inputs, labels = load_digits(return_X_y=True)
    return inputs / 16, labels


def diabetes() -> tuple[Any, Any]:
    """442 rows of 10 features, and a number."""
    inputs, targets = load_diabetes(return_X_y=True)
    return inputs / inputs.std(), targets / targets.std()


def made() -> tuple[Any, Any]:
    """100,000 rows of 50 features, 5 classes."""
    found: tuple[Any, Any] = make_classification(100_000, 50, n_informative=20, n_classes=5, random_state=0)
    return found


@dataclass(frozen=True)
class Case:
    """What is fitted.

    Attributes:
        data: reads it.
        kind: the estimator's class.
        options: of the estimator, those that are not as they are by default.
    """

    data: Callable[[], tuple[Any, Any]]
    kind: str
    options: dict[str, Any]

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.data.__name__}: {options or 'as by default'}"

    def fit(self, module: Any, X: NDArray[Any], y: NDArray[Any]) -> Any:
        """Return a fitted estimator."""
        return getattr(module, self.kind)(random_state=0, **self.options).fit(X, y)


CASES = (
    Case(digits, "MLPClassifier", {"max_iter": 40}),
    Case(digits, "MLPClassifier", {"hidden_layer_sizes": (32,), "batch_size": 32, "max_iter": 20}),
    Case(diabetes, "MLPRegressor", {"max_iter": 100}),
    Case(diabetes, "MLPRegressor", {"max_iter": 50, "hidden_layer_sizes": (20, 20), "batch_size": 32}),
    Case(diabetes, "MLPRegressor", {"max_iter": 50, "hidden_layer_sizes": (20,), "solver": "sgd", "batch_size": 16}),
    Case(made, "MLPClassifier", {"max_iter": 2}),
    Case(made, "MLPClassifier", {"max_iter": 2, "hidden_layer_sizes": (64, 64), "batch_size": 500}),
)


def main() -> None:
    """Compare every case, and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scikit_learn", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of both (1)")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="at most, 2 or more (9)")
    parser.add_argument("--match", default="", metavar="WORD", help="only cases whose names have it")
    options = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    machine = describe(options.threads)
    out = console()
    out.print(f"scikit-learn: {machine}", CAPTION.strip(), sep="\n", soft_wrap=True)
    with threadpool_limits(options.threads):
        for case in CASES:
            if options.match in str(case):
                # One for each case, because together they take minutes.
                table = Table(title=str(case), title_justify="left")
                for name in (
                    "dtype",
                    "epochs",
                    "fit, ms",
                    "fit x",
                    "score",
                    *(f"predict {n} x" for n in (*FEW, "all")),
                ):
                    table.add_column(name, justify="left" if name == "dtype" else "right")
                for dtype in (np.float64, np.float32):
                    table.add_row(*cells(case, dtype, options.rounds))
                out.print(table)


def cells(case: Case, dtype: Any, rounds: int) -> Iterator[str]:
    """Yield what a line of the table says."""
    X, y = case.data()
    X_train, X_test, y_train, y_test = train_test_split(X.astype(dtype), y, random_state=0)
    fitted = {name: case.fit(module, X_train, y_train) for name, module in MODULES.items()}
    epochs = {estimator.n_iter_ for estimator in fitted.values()}
    calls = {name: partial(case.fit, module, X_train, y_train) for name, module in MODULES.items()}
    times = race(calls, Effort(rounds, patience=10.0, fewest=3))
    yield from (np.dtype(dtype).name, "/".join(map(str, sorted(epochs))))
    yield " / ".join(f"{1e3 * median(seconds):.1f}" for seconds in times.values())
    yield ratio(times)
    yield " / ".join(f"{estimator.score(X_test, y_test):.3f}" for estimator in fitted.values())
    for rows in (*FEW, len(X_test)):
        some = np.ascontiguousarray(X_test[:rows])
        yield ratio(race({name: partial(one.predict, some) for name, one in fitted.items()}, Effort(rounds, 2.0)))


def ratio(times: dict[str, list[float]]) -> str:
    """Write the median of the ratios of rounds, and their quartiles."""
    theirs, ours = (times[name] for name in MODULES)
    found = [other / own for other, own in zip(theirs, ours, strict=True)]
    low, _, high = quantiles(found, n=4)
    return f"{median(found):.1f} ({low:.1f}-{high:.1f})"


if __name__ == "__main__":
    main()

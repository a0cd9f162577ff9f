"""Rows of a table beside scikit-learn: `python examples/tabular.py --rows 20000`.

`fastmlp.sklearn.MLPClassifier` has scikit-learn's parameters, attributes and random numbers, so that an estimator is
exchanged by its import. Both fit the same made table of 50 columns and 5 classes, a quarter of which is held out,
several times with other seeds and in turns, and predict what was held out. At the end both must score about as well.
It needs scikit-learn and Matplotlib: pip install 'fastmlp[demo]'.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
from sklearn import neural_network
from sklearn.datasets import make_classification
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from turns import draw

import fastmlp.sklearn

#: By how much the mean scores may differ: both round, and after hundreds of steps that moves some rows.
MAY_DIFFER = 0.02


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    begin = perf_counter()
    found = call()
    return found, perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=20_000, metavar="N", help="of the table (20000)")
    parser.add_argument("--iterations", type=int, default=10, metavar="N", help="over all rows, for each fit (10)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how many fits of each (3)")
    parser.add_argument("--output", type=Path, default=Path("out"), metavar="DIR", help="folder for tabular.png (out)")
    options = parser.parse_args()

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)  # a few iterations are enough to compare
    rows, classes = make_classification(options.rows, 50, n_informative=20, n_classes=5, random_state=0)
    x, x_held_out, y, y_held_out = train_test_split(rows, classes, random_state=0)
    modules = {"scikit-learn": neural_network, "fastmlp.sklearn": fastmlp.sklearn}
    fits: dict[str, list[float]] = {name: [] for name in modules}
    predictions: dict[str, list[float]] = {name: [] for name in modules}
    scores: dict[str, list[float]] = {name: [] for name in modules}
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for seed in range(options.seeds):
        for name, module in modules.items():
            estimator = module.MLPClassifier((64, 64), max_iter=options.iterations, random_state=seed)
            _, seconds = timed(partial(estimator.fit, x, y))
            found, predicting = timed(partial(estimator.predict, x_held_out))
            fits[name].append(seconds)
            predictions[name].append(predicting)
            scores[name].append(float((found == y_held_out).mean()))
            losses = estimator.loss_curve_
            curves[name] = ([seconds * (i + 1) / len(losses) for i in range(len(losses))], losses)
    for name in modules:
        print(
            f"{name:16}{mean(scores[name]):6.1%} right of {len(x_held_out)} rows held out, fit in "
            f"{median(fits[name]):.2f} s, predicted in {1e3 * median(predictions[name]):.1f} ms"
        )
    theirs, ours = modules
    fit, predict = (median(times[theirs]) / median(times[ours]) for times in (fits, predictions))
    print(f"fastmlp.sklearn: {fit:.2f} times the speed of a fit, {predict:.2f} times that of a prediction")
    if abs(mean(scores[theirs]) - mean(scores[ours])) > MAY_DIFFER:
        raise SystemExit("the two score otherwise")
    draw(options.output / "tabular.png", f"{len(x)} rows of 50 columns", "loss", curves)


if __name__ == "__main__":
    main()

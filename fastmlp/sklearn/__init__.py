"""scikit-learn's multilayer perceptrons, trained and served by `fastmlp`.

`MLPClassifier` and `MLPRegressor` take the place of those of `sklearn.neural_network`: the same parameters, attributes
and methods, and from the same `random_state` the same network within rounding. It takes the package scikit-learn
(`pip install fastmlp[sklearn]`), which `import fastmlp` alone does not import. docs/sklearn.md says what differs.
"""

try:
    import sklearn as _sklearn  # noqa: F401
except ImportError as error:
    raise ImportError(
        "fastmlp: fastmlp.sklearn takes the package scikit-learn, which cannot be imported: pip install scikit-learn"
    ) from error

from fastmlp.sklearn.classifier import MLPClassifier
from fastmlp.sklearn.regressor import MLPRegressor

__all__ = ["MLPClassifier", "MLPRegressor"]

"""Fused multilayer perceptrons for PyTorch: the same modules, the same numbers, faster."""

from fastmlp import _moved as _moved  # so that pickles of an earlier version find their names
from fastmlp import functional, optim, reference
from fastmlp.activations import Activation
from fastmlp.bench import bench
from fastmlp.capture import Captured, CaptureError, capture
from fastmlp.clip import clip_grad_norm_, clip_grad_value_
from fastmlp.config import get_isa, set_isa, show_config
from fastmlp.convert import convert, revert
from fastmlp.data import batches, epochs
from fastmlp.derivatives import Derivatives, derivatives
from fastmlp.explain import Explanation, Route, explain, fusion_report
from fastmlp.frozen import FrozenMLP, freeze
from fastmlp.linear import Linear
from fastmlp.modules import MLP, Sequential
from fastmlp.reference import Sin
from fastmlp.serving import FrozenModule, load_frozen
from fastmlp.training import TrainStep
from fastmlp.tuning import autotune

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "Activation",
    "CaptureError",
    "Captured",
    "Derivatives",
    "Explanation",
    "FrozenMLP",
    "FrozenModule",
    "Linear",
    "Route",
    "Sequential",
    "Sin",
    "TrainStep",
    "__version__",
    "autotune",
    "batches",
    "bench",
    "capture",
    "clip_grad_norm_",
    "clip_grad_value_",
    "convert",
    "derivatives",
    "epochs",
    "explain",
    "freeze",
    "functional",
    "fusion_report",
    "get_isa",
    "load_frozen",
    "optim",
    "reference",
    "revert",
    "set_isa",
    "show_config",
]

"""The names under which pickles that an earlier fastmlp wrote look for what has moved since.

Imported by the package for that effect alone. To be deleted one version after the move.
"""

from importlib import import_module
from typing import Any

from fastmlp.explain import Entry, Report, Route, explain, fusion_report
from fastmlp.linear import Linear
from fastmlp.trace import Traced, load, run_chain
from fastmlp.trace.recording import Tracer

__all__: list[str] = []

#: What the version after 0.1.0 has moved, by the module that it was in.
_MOVED: dict[str, dict[str, Any]] = {
    "fastmlp.config": {"Route": Route, "explain": explain},
    "fastmlp.convert": {
        "Entry": Entry,
        "Report": Report,
        "_Traced": Traced,
        "_Tracer": Tracer,
        "_load": load,
        "fusion_report": fusion_report,
        "run_chain": run_chain,
    },
    "fastmlp.modules": {"Linear": Linear},
}

for _place, _names in _MOVED.items():
    for _name, _value in _names.items():
        setattr(import_module(_place), _name, _value)

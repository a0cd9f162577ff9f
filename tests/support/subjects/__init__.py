"""Programs around a model, to be compared with themselves converted, frozen, in a `TrainStep` and captured.

`PUBLISHED` are models of other libraries, made, used and trained as those do. `WRITTEN` are programs that need no
package besides torch, written here in the ways that public programs are written in. `Subject` is the interface of both.
"""

from tests.support.subjects.base import Maker, Step, Subject, in_a_loop
from tests.support.subjects.classifiers import Autoencoder, BatchNorm, Quickstart, Skorch, VariationalAutoencoder
from tests.support.subjects.fields import Rays, Siren
from tests.support.subjects.published import PUBLISHED
from tests.support.subjects.reinforcement import SoftActorCritic, TwinDelayed
from tests.support.subjects.tables import Particles, Recommendation, Residual

__all__ = [
    "PUBLISHED",
    "SUBJECTS",
    "WRITTEN",
    "Autoencoder",
    "BatchNorm",
    "Maker",
    "Particles",
    "Quickstart",
    "Rays",
    "Recommendation",
    "Residual",
    "Siren",
    "Skorch",
    "SoftActorCritic",
    "Step",
    "Subject",
    "TwinDelayed",
    "VariationalAutoencoder",
    "in_a_loop",
]

WRITTEN: tuple[type[Subject], ...] = (
    *(Quickstart, Skorch, BatchNorm, Autoencoder, VariationalAutoencoder, Siren, Rays),
    *(SoftActorCritic, TwinDelayed, Residual, Recommendation, Particles),
)

SUBJECTS = (*PUBLISHED, *WRITTEN)

"""RLEdit: a network turns gradients into updates as in MEND, trained along whole sequences of edits instead of on the unedited model.

Li et al. 2025, "Reinforced Lifelong Editing for Language Models", arXiv:2502.05759.

    python launch.py method=rledit training=counterfact dataset=counterfact paths.data=DIR prepare_only=true   # train, once
    python launch.py method=rledit training=counterfact dataset=counterfact paths.data=DIR num_edits=[1,10,100]

Editing a sequence is a process in which the model is the state, the network the policy, its update the action, and the negative losses
the reward. `training.hypernetwork_sequences` has the cost of a trajectory: what an update does to its own fact and, with weights that
decay, to the facts before it, and the size of the update. The update is a differentiable function of the network, so the gradient of that
cost needs no sampling. The network sees gradients of edited models, which are also what its input statistics are of.

The network is MEND's, and the updates of a batch are summed. The published code has four layers instead of two and combines the tokens of
a batch by least squares, as MALMEN (arXiv:2311.04661) does, of the answer's tokens alone; its input statistics run on while it edits, here
they are those of training; it measures drift from the model before each update, here it is that from the unedited model, which is what
`edit-quality` asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from editeval.edits.delta import Edit
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.training.footprint_training import network_footprint
from editeval.training.hypernetwork import Hypernetwork
from editeval.training.hypernetwork_settings import TrainedSettings, update_of
from editeval.types import ConfigError, EditRequest, Footprint, ModelDescription, Progress, Workload

if TYPE_CHECKING:
    from editeval.training.hypernetwork_training import Course


@dataclass(frozen=True, kw_only=True)
class RLEdit(TrainedSettings):
    """RLEdit's settings; published numbers are in conf/method/rledit.yaml and conf/tuned/rledit.

    A step of training is one trajectory of `rows_per_step` edits. `memory` counts the facts that an update is charged with, its own one
    included; `decay` weighs each by its age; `norm_weight` weighs the squared norm of the update.
    """

    kind: ClassVar[str] = "rledit"
    format_version: ClassVar[int] = 2

    memory: int
    decay: float
    norm_weight: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 1 or not 0 < self.decay <= 1 or self.norm_weight < 0:
            raise ConfigError(
                f"memory={self.memory} must be at least 1, decay={self.decay} above 0 and at most 1, norm_weight={self.norm_weight} not "
                "negative; set method.memory, method.decay, method.norm_weight"
            )

    def settings(self) -> Mapping[str, Any]:
        """Return everything that an edit depends on beside model and requests."""
        return self.learned()

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint:
        """Predict memory, disk and operations from shapes."""
        return network_footprint(self, model, workload, lessons_per_row=min(self.memory, self.rows_per_step), rows_in_memory=1)

    def make_course(self) -> Callable[..., Course]:
        """The rows of a step are edited one after another."""
        from editeval.training.hypernetwork_sequences import SequenceCourse  # here: it imports lightning, which takes seconds

        return partial(SequenceCourse, memory=self.memory, decay=self.decay, norm_weight=self.norm_weight)

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Editor:
        """Return the editor with its network: from `archive`, from the cache, or trained now."""
        with model.unedited():
            network, sites = self.trained(model.lm, cache, progress)
        return Editor(model=model, network=network, sites=sites)

    def _learning(self) -> Mapping[str, Any]:
        return {**super()._learning(), "memory": self.memory, "decay": self.decay, "norm_weight": self.norm_weight}


@dataclass(frozen=True, kw_only=True, eq=False)
class Editor:
    """RLEdit bound to a model, with its trained network."""

    model: EditedModel
    network: Hypernetwork
    sites: tuple[str, ...]

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        """Return the update that writes these facts.

        Raises:
            EditError: a request that cannot be encoded, or whose loss or update is not finite.
        """
        deltas, loss = update_of(self.model.lm, self.network, self.sites, requests)
        return Edit(deltas=deltas, diagnostics={"loss_first": loss})

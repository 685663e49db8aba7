"""MEND: a small network, trained beforehand, turns the gradient of one fact into an update of the last MLPs that writes only that fact.

Mitchell et al. 2022, "Fast Model Editing at Scale", arXiv:2110.11309.

    python launch.py method=mend training=counterfact dataset=counterfact paths.data=DIR prepare_only=true   # train, once
    python launch.py method=mend training=counterfact dataset=counterfact paths.data=DIR num_edits=[1,10]

An edit is one forward and one backward pass for the pairs (u, delta) of every token, and `training.hypernetwork` for what becomes of them.
The update is written back, so edits add up. A batch is the sum of its facts' updates: the network always sees the gradient of
one fact's mean loss, as in training. `accumulate: false` is what the published evaluation code does: every edit starts from the unedited
weights, so that only the last one is in the model. In training, locality is the divergence at the tokens of an answer; the published code
also counts those of its prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from editeval.edits.delta import Edit, LowRankDelta
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.training.footprint_training import network_footprint
from editeval.training.hypernetwork import Hypernetwork
from editeval.training.hypernetwork_settings import TrainedSettings, update_of
from editeval.types import EditRequest, Footprint, ModelDescription, Progress, Workload

if TYPE_CHECKING:
    from editeval.training.hypernetwork_training import Course


@dataclass(frozen=True, kw_only=True)
class MEND(TrainedSettings):
    """MEND's settings; published numbers are in conf/method/mend.yaml and conf/tuned/mend."""

    kind: ClassVar[str] = "mend"
    format_version: ClassVar[int] = 2

    accumulate: bool

    def settings(self) -> Mapping[str, Any]:
        """Return everything that an edit depends on beside model and requests."""
        return {"accumulate": self.accumulate, **self.learned()}

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint:
        """Predict memory, disk and operations from shapes; an edit that takes the last one back records that one too, and itself twice."""
        found = network_footprint(self, model, workload, lessons_per_row=1, rows_in_memory=self.rows_per_step)
        update = found.journal_bytes
        return found if self.accumulate else replace(found, journal_bytes=3 * update, auxiliary_bytes=update)

    def make_course(self) -> Callable[..., Course]:
        """Each row is edited on the unedited model."""
        from editeval.training.hypernetwork_training import Course  # here: it imports lightning, which takes seconds

        return Course

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Editor:
        """Return the editor with its network: from `archive`, from the cache, or trained now."""
        if not self.accumulate:
            progress.message("method.accumulate=false: each edit takes the last one back, as in the published evaluation code")
        with model.unedited():
            network, sites = self.trained(model.lm, cache, progress)
        return Editor(model=model, network=network, sites=sites, accumulate=self.accumulate)


@dataclass(frozen=True, kw_only=True, eq=False)
class Editor:
    """MEND bound to a model, with its trained network."""

    model: EditedModel
    network: Hypernetwork
    sites: tuple[str, ...]
    accumulate: bool

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        """Return the update that writes these facts; without `accumulate` it also takes the last one back.

        Raises:
            EditError: a request that cannot be encoded, or whose loss is not finite.
        """
        if self.accumulate:
            deltas, loss = update_of(self.model.lm, self.network, self.sites, requests)
            return Edit(deltas=deltas, diagnostics={"loss_first": loss})
        with self.model.unedited():
            deltas, loss = update_of(self.model.lm, self.network, self.sites, requests)
        kept = {f"{delta.parameter}/{side}": getattr(delta, side) for delta in deltas for side in ("left", "right")}
        return Edit(deltas=(*self._taken_back(), *deltas), auxiliary=kept, diagnostics={"loss_first": loss})

    def _taken_back(self) -> tuple[LowRankDelta, ...]:
        last = self.model.auxiliary[-1] if self.model.auxiliary else {}
        parameters = [name.removesuffix("/left") for name in last if name.endswith("/left")]
        return tuple(LowRankDelta(parameter=name, left=-last[f"{name}/left"], right=last[f"{name}/right"]) for name in parameters)

"""AlphaEdit: MEMIT's spread, within the directions that other text hardly uses, keeping the facts of earlier edits.

Fang et al. 2025, "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models", arXiv:2410.02355.

    python launch.py method=alphaedit num_edits=100

P projects onto the eigenvectors of C = E[k k^T] with eigenvalues below `null_space_threshold`. With K_p the keys of all earlier edits,

    dW = R K^T P (K_p K_p^T P + K K^T P + l2 I)^-1

(equation 14), R and the layers as in MEMIT. The keys of every edit are part of it (`auxiliary`): the journal remembers them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from editeval.edits.delta import Edit
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.keyvalue.followed import FollowedEdits, keys_of, recorded_keys
from editeval.keyvalue.footprint import PROJECTION, Solver, remembering_keys
from editeval.keyvalue.null_space import KeyMemory, NullSpace, null_spaces
from editeval.keyvalue.settings import SpreadSettings
from editeval.keyvalue.spread import SpreadEditor
from editeval.types import ConfigError, EditRequest, Footprint, ModelDescription, Progress, Workload


@dataclass(frozen=True, kw_only=True)
class AlphaEdit(SpreadSettings):
    """AlphaEdit's settings; published numbers are in conf/method/alphaedit.yaml and conf/tuned/alphaedit.

    `null_space_threshold` is an eigenvalue in the unit of this model's keys, so it fits no other model; None keeps the share
    `null_space_share` of all directions, those that text uses least. `l2` is the ridge, in the unit of squared keys.
    """

    published_depths: ClassVar[tuple[float, ...]] = (13 / 48, 17 / 48)  # layers 13 to 17 of GPT-2 XL's 48
    solver: ClassVar[Solver] = PROJECTION

    null_space_threshold: float | None
    null_space_share: float
    l2: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("null_space_threshold", "l2"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value} must be above 0; set method.{name}")
        if not 0 < self.null_space_share < 1:
            raise ConfigError(f"null_space_share={self.null_space_share} must be between 0 and 1; set method.null_space_share")

    def settings(self) -> Mapping[str, Any]:
        """Return everything that an edit depends on beside model and requests."""
        share = self.null_space_share if self.null_space_threshold is None else None
        return {**self.shared_settings(), "null_space_threshold": self.null_space_threshold, "null_space_share": share, "l2": self.l2}

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint:
        """Predict memory, disk and operations from shapes, the keys that later edits must remember too."""
        return remembering_keys(super().footprint(model, workload), workload)

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Editor:
        """Return the editor; prefixes and projections are of the unedited model and come from the cache if they are there.

        Raises:
            ConfigError: the threshold leaves no direction in any layer.
        """
        lm = model.lm
        layers = self.layers_of(lm.description)
        self.announce(layers, lm.description, progress)
        sites = [lm.sites.mlp_out.format(layer) for layer in layers]
        with model.unedited():
            contexts = self.contexts(lm, cache)
            spaces = null_spaces(
                lm,
                sites,
                self.covariance_source,
                cache,
                progress,
                threshold=self.null_space_threshold,
                share=self.null_space_share,
            )
        kept = ", ".join(f"layer {layer}: {spaces[site].kept}" for layer, site in zip(layers, sites, strict=True))
        progress.message(f"AlphaEdit writes into these many of {lm.description.intermediate_size} directions: {kept}")
        if not any(space.kept for space in spaces.values()):
            raise ConfigError(
                f"no eigenvalue of the key covariance is below null_space_threshold={self.null_space_threshold}; raise it, or set "
                "method.null_space_threshold=null to choose it by method.null_space_share"
            )
        memory = Memory(model=model, spaces=spaces, ridge=self.l2)
        return Editor(writer=self.editor(lm, contexts, layers, memory.solve), memory=memory)


@dataclass(frozen=True, kw_only=True, eq=False)
class Editor:
    """AlphaEdit bound to a model."""

    writer: SpreadEditor
    memory: Memory

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        """Return the updates that write these facts together, with their keys as what later edits must remember.

        Raises:
            EditError: facts that contradict each other, or one that cannot be encoded or optimised.
        """
        self.memory.follow()
        result, diagnostics = self.writer.compute(requests)
        # No update of a layer changes the keys that its own matrix gets, so these are also the keys after the edit.
        return Edit(deltas=result.updates, auxiliary=recorded_keys(result.keys), diagnostics=diagnostics)


@dataclass(kw_only=True, eq=False)
class Memory:
    """The keys of the edits that are in the model now, as the journal holds them, in the form that solves need."""

    model: EditedModel
    spaces: Mapping[str, NullSpace]
    ridge: float
    _followed: FollowedEdits = field(default_factory=FollowedEdits)
    _memories: dict[str, KeyMemory] = field(default_factory=dict)

    def follow(self) -> None:
        """Absorb the keys of edits applied since; start anew where the model was restored or holds other edits."""
        void, new = self._followed.follow(self.model.auxiliary)
        if void or not self._memories:
            self._memories = {site: KeyMemory(ridge=self.ridge) for site in self.spaces}
        for auxiliary in new:
            for site, memory in self._memories.items():
                if (keys_EK := keys_of(auxiliary, site)) is not None:
                    memory.absorb(self.spaces[site].project(keys_EK.T))

    def solve(self, site: str, keys_KE: Tensor) -> Tensor:
        """Return A (K, E) of `editeval.keyvalue.null_space` for the keys of a new edit."""
        return self._memories[site].solve(self.spaces[site].project(keys_KE))

"""FT-L and FT-M: fine-tune one MLP output matrix on the facts of one edit, each edit to convergence.

    python launch.py method=ft-l num_edits=10
    python launch.py method=ft-m num_edits=10

FT-L is the constrained fine-tuning of Meng et al. 2022, arXiv:2202.05262, appendix E.1 (after Zhu et al. 2020, arXiv:2012.00363): no weight
may move by more than `max_change`. As published, all tokens of the target are made likely at the last position of the prompt, which is
right for a target of one token only. FT-M (Zhang et al. 2024, arXiv:2401.01286) predicts each token where it stands.

An edit changes the whole matrix; the journal holds the gradients that made the change, which are few vectors (`TunedDelta`).
A fact that the model says already (a long sequence of fine-tuning makes it say the same targets everywhere) gives an edit without a
change, as published: `epochs` is 1 in its diagnostics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from editeval.edits.delta import Edit
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.keyvalue.fine_tuning import SCORED_AT, TuningSettings, target_row, tune
from editeval.keyvalue.footprint import mlp_maps
from editeval.keyvalue.footprint_gradient import tuning_footprint
from editeval.keyvalue.settings import chosen_layer
from editeval.keyvalue.spread import check_batch
from editeval.models.model import LanguageModel
from editeval.types import ConfigError, EditRequest, Footprint, ModelDescription, Progress, Workload

PUBLISHED_DEPTH = 21 / 32  # layer 21 of Llama-2-7B's 32


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """FT's settings; published numbers are in conf/method/ft-l.yaml, conf/method/ft-m.yaml and conf/tuned.

    `layer` None means the published relative depth. `scored_at` is one of `SCORED_AT`. `facts_per_step` divides the facts of one edit.
    """

    max_batch_size: ClassVar[int | None] = None

    name: str
    layer: int | None
    scored_at: str
    num_steps: int
    learning_rate: float
    max_change: float | None
    stop_loss: float
    facts_per_step: int

    def __post_init__(self) -> None:
        if self.scored_at not in SCORED_AT:
            raise ConfigError(f"method.scored_at={self.scored_at!r} is unknown; choose one of {', '.join(SCORED_AT)}")
        if self.facts_per_step < 1:
            raise ConfigError(f"facts_per_step={self.facts_per_step} must be at least 1; set method.facts_per_step")
        _ = self.tuning_settings  # checks the numbers

    @property
    def tuning_settings(self) -> TuningSettings:
        """How to tune."""
        return TuningSettings(
            num_epochs=self.num_steps, learning_rate=self.learning_rate, max_change=self.max_change, stop_loss=self.stop_loss
        )

    def settings(self) -> Mapping[str, Any]:
        """Return everything that an edit depends on beside model and requests."""
        fields = ("layer", "scored_at", "num_steps", "learning_rate", "max_change", "stop_loss", "facts_per_step")
        return {name: getattr(self, name) for name in fields}

    def check(self, model: ModelDescription) -> None:
        """Check the layer against the model's shape.

        Raises:
            ConfigError: a layer that the model does not have.
        """
        self._layer(model)

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint:
        """Predict memory, disk and operations from shapes."""
        size, layer = self.facts_per_step, self._layer(model)
        maps = mlp_maps(model, 1)
        return tuning_footprint(maps, model, workload, first=layer, rows_per_step=size, epochs=self.num_steps, arrivals=1)

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Editor:
        """Return the editor; nothing has to be made."""
        lm = model.lm
        layer = self._layer(lm.description)
        if self.layer is None:
            progress.message(f"method.layer is not set: tuning layer {layer} of {lm.description.num_layers}, the published relative depth")
        return Editor(lm=lm, layer=layer, method=self)

    def _layer(self, model: ModelDescription) -> int:
        return chosen_layer(model, self.layer, published_depth=PUBLISHED_DEPTH)


@dataclass(frozen=True, kw_only=True, eq=False)
class Editor:
    """FT bound to a model."""

    lm: LanguageModel
    layer: int
    method: FineTuning

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        """Return the change of the matrix that makes these facts likely.

        There is none where their loss is below `stop_loss` already: such an edit is recorded, and its `update_norm` in edits.jsonl is 0.

        Raises:
            EditError: facts that contradict each other, or one that cannot be encoded.
        """
        check_batch(requests)
        lm, method = self.lm, self.method
        limit = lm.description.max_positions
        rows = [target_row(lm.tokenizer, request, scored_at=method.scored_at, max_tokens=limit) for request in requests]
        site = lm.sites.mlp_out.format(self.layer)
        tuned = tune(lm, rows, [site], method.tuning_settings, batch_size=method.facts_per_step, first=self.layer)
        diagnostics = {
            "loss_first": tuned.losses[0],
            "loss_last": tuned.losses[-1],
            "epochs": float(len(tuned.losses)),
            "update_norm": tuned.norms[site],
        }
        return Edit(deltas=tuple(tuned.deltas.values()), diagnostics=diagnostics)

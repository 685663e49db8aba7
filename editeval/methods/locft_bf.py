"""LocFT-BF: ordinary fine-tuning of one place, breadth-first over all facts in mini-batches.

Yang et al. 2025, "Fine-tuning Done Right in Model Editing", arXiv:2509.22072.

    python launch.py method=locft-bf batch_size=100 num_edits=1

Every epoch goes once through all facts in a new order, a step for each mini-batch; targets end with the end-of-sequence token. It needs all
facts at once, so it is not streaming: one edit writes them. What is tuned are the linear maps of one place in one layer; norms and
biases stay. The one edit takes 4 bytes a weight in the journal where it has more gradients than that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from editeval.edits.delta import Edit
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.keyvalue.fine_tuning import TuningSettings, linear_maps, target_row, tune
from editeval.keyvalue.footprint import MapShape, all_mlp_maps, attention_maps, mlp_maps
from editeval.keyvalue.footprint_gradient import tuning_footprint
from editeval.keyvalue.settings import chosen_layer
from editeval.keyvalue.spread import check_batch
from editeval.models.model import LanguageModel
from editeval.types import ConfigError, EditRequest, Footprint, ModelDescription, Progress, Workload, seed_for

PLACES = ("mlp_out", "mlp", "attention", "layers")
PUBLISHED_DEPTH = 22 / 32  # layer 22 of Llama-3-8B's 32


@dataclass(frozen=True, kw_only=True)
class LocFTBF:
    """LocFT-BF's settings; published numbers are in conf/method/locft-bf.yaml and conf/tuned/locft-bf.

    `layer` None means the published relative depth. `place` is one of `PLACES`: what is tuned there. `streaming` says that a trajectory of
    several edits is not what the method is.
    """

    max_batch_size: ClassVar[int | None] = None
    streaming: ClassVar[bool] = False

    name: str
    layer: int | None
    place: str
    num_epochs: int
    learning_rate: float
    facts_per_step: int
    stop_loss: float

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise ConfigError(f"method.place={self.place!r} is unknown; choose one of {', '.join(PLACES)}")
        if self.facts_per_step < 1:
            raise ConfigError(f"facts_per_step={self.facts_per_step} must be at least 1; set method.facts_per_step")
        _ = self.tuning_settings  # checks the numbers

    @property
    def tuning_settings(self) -> TuningSettings:
        """How to tune."""
        return TuningSettings(num_epochs=self.num_epochs, learning_rate=self.learning_rate, max_change=None, stop_loss=self.stop_loss)

    def settings(self) -> Mapping[str, Any]:
        """Return everything that an edit depends on beside model and requests."""
        fields = ("layer", "place", "num_epochs", "learning_rate", "facts_per_step", "stop_loss")
        return {name: getattr(self, name) for name in fields}

    def check(self, model: ModelDescription) -> None:
        """Check the layer against the model's shape.

        Raises:
            ConfigError: a layer that the model does not have.
        """
        self._layer(model)

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint:
        """Predict memory, disk and operations from shapes. Each epoch brings its rows to the layer anew, in another order."""
        size, layer, epochs = self.facts_per_step, self._layer(model), self.num_epochs
        maps = _maps(model, self.place)
        return tuning_footprint(maps, model, workload, first=layer, rows_per_step=size, epochs=epochs, arrivals=epochs)

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Editor:
        """Return the editor; nothing has to be made."""
        lm = model.lm
        layer = self._layer(lm.description)
        if self.layer is None:
            progress.message(f"method.layer is not set: tuning layer {layer} of {lm.description.num_layers}, the published relative depth")
        place: str = getattr(lm.sites, self.place)
        return Editor(lm=lm, layer=layer, sites=linear_maps(lm.module, place.format(layer)), method=self)

    def _layer(self, model: ModelDescription) -> int:
        return chosen_layer(model, self.layer, published_depth=PUBLISHED_DEPTH)


def _maps(model: ModelDescription, place: str) -> list[MapShape]:
    """Return the maps of a place; attention counts as four of its output's size, at most what it has (keys and values may share heads)."""
    attention = attention_maps(model, 4)
    known = {"mlp_out": mlp_maps(model, 1), "mlp": all_mlp_maps(model), "attention": attention}
    return known[place] if place in known else [*attention, *all_mlp_maps(model)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Editor:
    """LocFT-BF bound to a model."""

    lm: LanguageModel
    layer: int
    sites: tuple[str, ...]
    method: LocFTBF

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        """Return the change that fine-tuning on these facts makes. The seed gives the order of the facts in each epoch.

        There is none where their loss is below `stop_loss` already: such an edit is recorded, and its `update_norm` in edits.jsonl is 0.

        Raises:
            EditError: facts that contradict each other, or one that cannot be encoded.
        """
        check_batch(requests)
        lm, method = self.lm, self.method
        limit = lm.description.max_positions
        rows = [target_row(lm.tokenizer, request, scored_at="target", max_tokens=limit, with_end=True) for request in requests]

        def order(epoch: int) -> list[int]:
            generator = torch.Generator().manual_seed(seed_for("locft-bf", seed, epoch))
            shuffled: list[int] = torch.randperm(len(rows), generator=generator).tolist()
            return shuffled

        size = method.facts_per_step
        tuned = tune(lm, rows, self.sites, method.tuning_settings, batch_size=size, first=self.layer, order=order)
        diagnostics = {
            "loss_first": tuned.losses[0],
            "loss_last": tuned.losses[-1],
            "epochs": float(len(tuned.losses)),
            "update_norm": sum(norm**2 for norm in tuned.norms.values()) ** 0.5,
        }
        return Edit(deltas=tuple(tuned.deltas.values()), diagnostics=diagnostics)

"""The settings that locate-then-edit methods share, and what they make of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from editeval.datasets.corpus import Corpus
from editeval.files import Cache
from editeval.keyvalue.covariance import CovarianceSource, missing_covariances
from editeval.keyvalue.footprint import MapShape, Solver, locate_footprint, mlp_maps
from editeval.keyvalue.objective import TargetSettings
from editeval.keyvalue.prefixes import check_lengths, check_prefixes, context_prefixes
from editeval.keyvalue.spread import Solve, SpreadEditor, Target
from editeval.models.model import LanguageModel
from editeval.models.sites import sites_for
from editeval.types import ConfigError, Footprint, ModelDescription, Progress, Workload


@dataclass(frozen=True, kw_only=True)
class LocateSettings:
    """Fields of every method that optimises a target value and solves for keys against second moments.

    `context_prefixes` replaces the generated ones; `prefix_lengths` are pairs (tokens, count). `covariance` is a file of second
    moments, see `CovarianceSource`.
    """

    name: str
    num_steps: int
    learning_rate: float
    weight_decay: float
    clamp_norm_factor: float
    kl_factor: float
    early_stop_loss: float
    corpus: Corpus
    covariance: str | None
    context_prefixes: Sequence[str] | None
    prefix_lengths: Sequence[Sequence[int]]
    prefix_seed: int

    def __post_init__(self) -> None:
        if self.context_prefixes is not None:
            check_prefixes(self.context_prefixes)
        check_lengths(self.prefix_lengths)
        if not isinstance(self.corpus, Corpus):
            raise ConfigError(
                f"method.corpus={self.corpus!r} must be a text to read; choose it by corpus=pydoc, or corpus=text corpus.path=FILE"
            )
        _ = self.target_settings  # checks the numbers

    @property
    def target_settings(self) -> TargetSettings:
        """How target values are optimised."""
        return TargetSettings(
            num_steps=self.num_steps,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            clamp_norm_factor=self.clamp_norm_factor,
            kl_factor=self.kl_factor,
            early_stop_loss=self.early_stop_loss,
        )

    @property
    def covariance_source(self) -> CovarianceSource:
        """Where second moments come from."""
        return CovarianceSource(corpus=self.corpus, file=self.covariance)

    def key_widths(self, model: ModelDescription) -> dict[str, int]:
        """Return how wide the keys are at each map (module path) whose second moments are needed."""
        raise NotImplementedError

    def check(self, model: ModelDescription) -> None:
        """Check layers, covariance and text against the model's shape.

        Raises:
            ConfigError: what, with what is allowed.
        """
        widths = self.key_widths(model)
        if widths:
            self.covariance_source.check(widths)

    def missing_statistics(self, model: ModelDescription, fingerprint: str | None, cache: Cache) -> tuple[str, ...]:
        """Return the maps whose second moments must be computed first: they are neither in the file nor in the cache."""
        return missing_covariances(list(self.key_widths(model)), self.covariance_source, fingerprint=fingerprint, cache=cache)

    def value_settings(self) -> Mapping[str, Any]:
        """Return what a target value depends on among these fields; for `EditMethod.settings`."""
        given = self.context_prefixes is not None
        lengths = [list(pair) for pair in self.prefix_lengths]
        return {
            "target": {name: value for name, value in asdict(self.target_settings).items() if value is not None},
            "prefixes": list(self.context_prefixes or ()) if given else {"lengths": lengths, "seed": self.prefix_seed},
        }

    def contexts(self, lm: LanguageModel, cache: Cache) -> tuple[str, ...]:
        """Return the context prefixes, the bare one first. The model must be in its unedited state."""
        if self.context_prefixes is not None:
            return tuple(self.context_prefixes)
        return context_prefixes(lm, self.prefix_lengths, seed=self.prefix_seed, cache=cache)


@dataclass(frozen=True, kw_only=True)
class SpreadSettings(LocateSettings):
    """Fields of every method that spreads an edit over layers; the last of `layers` is where target values are optimised.

    `layers` None means the relative depth of the published ones.
    """

    max_batch_size: ClassVar[int | None] = None
    published_depths: ClassVar[tuple[float, ...]]  # the first and the last layer, as shares of the model's
    solver: ClassVar[Solver]  # what is kept of each map's C

    layers: Sequence[int] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise ConfigError(f"method.layers={list(self.layers)} must be layers in rising order, each once, such as [13,14,15,16,17]")

    def shared_settings(self) -> Mapping[str, Any]:
        """Return what an edit depends on among these fields; for `EditMethod.settings`."""
        # Named only where there are several: one group has always been its own mean.
        groups = {"keys": "mean over groups"} if len(self.group_sizes) > 1 else {}
        return {
            **self.value_settings(),
            **groups,
            "layers": None if self.layers is None else list(self.layers),
            "covariance": self.covariance_source.settings(),
        }

    def key_widths(self, model: ModelDescription) -> dict[str, int]:
        """Return how wide the keys are at each map (module path) whose second moments are needed."""
        return {sites_for(model.model_type).mlp_out.format(layer): model.intermediate_size for layer in self.layers_of(model)}

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint:
        """Predict memory, disk and operations from shapes."""
        layers = self.layers_of(model)
        maps = self.maps_of(model, len(layers))
        return locate_footprint(self, model, workload, last_layer=layers[-1], maps=maps, solver=self.solver)

    def maps_of(self, model: ModelDescription, count: int) -> list[MapShape]:
        """Return what is edited in `count` layers."""
        return mlp_maps(model, count)

    def layers_of(self, model: ModelDescription) -> tuple[int, ...]:
        """Return the layers to edit; without `layers` all from the first to the last of the published relative depths.

        Raises:
            ConfigError: a layer that the model does not have.
        """
        if self.layers is None:
            first, last = (round(depth * model.num_layers) for depth in (self.published_depths[0], self.published_depths[-1]))
            return tuple(range(first, last + 1))
        model.check_layers(self.layers, setting="method.layers")
        return tuple(self.layers)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """How many context prefixes each pair of `prefix_lengths` gives; empty where they were given literally, as one group."""
        return tuple(count for _, count in self.prefix_lengths) if self.context_prefixes is None else ()

    def editor(self, lm: LanguageModel, contexts: tuple[str, ...], layers: tuple[int, ...], solve: Solve) -> SpreadEditor:
        """Return MEMIT's spread with a solve of one's own: the MLPs' output matrices of `layers` move the state after the last of them."""
        return SpreadEditor(
            lm=lm,
            contexts=contexts,
            group_sizes=self.group_sizes,
            layers=layers,
            optimised=(lm.sites.layers,),
            targets=(Target(edited=lm.sites.mlp_out, moved=lm.sites.layers),),
            share=lambda left: 1 / left,
            solve=solve,
            target_settings=self.target_settings,
        )

    def announce(self, layers: Sequence[int], model: ModelDescription, progress: Progress) -> None:
        """Say which layers stand for the published ones where none were set."""
        if self.layers is None:
            where = f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
            progress.message(f"method.layers is not set: editing {where} of {model.num_layers}, the published relative depth")


def chosen_layer(model: ModelDescription, layer: int | None, *, published_depth: float) -> int:
    """Return the one layer that `method.layer` names; None: that of the published relative depth.

    Raises:
        ConfigError: a layer that the model does not have.
    """
    chosen = round(published_depth * model.num_layers) if layer is None else layer
    model.check_layers((chosen,), setting="method.layer")
    return chosen

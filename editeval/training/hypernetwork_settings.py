"""What methods with a trained hypernetwork share: their settings, the file of the trained network, and the update that it makes.

A network belongs to one model, its tokenizer, its layers and its training rows; it is trained once and then read from the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from editeval.edits.delta import LowRankDelta
from editeval.files import Cache, file_sha256
from editeval.keyvalue.features import editing_features
from editeval.keyvalue.fine_tuning import target_row
from editeval.models.model import LanguageModel
from editeval.models.sites import MAPS, sites_for
from editeval.training.archive import check_rows, read_archive, rows_learned, write_archive
from editeval.training.hypernetwork import Hypernetwork, NamedMap
from editeval.training.settings import LearnsBeforehand, NetworkLearningSettings
from editeval.types import ConfigError, EditError, EditRequest, ModelDescription, Progress, content_key

if TYPE_CHECKING:
    from editeval.training.hypernetwork_training import Course

PUBLISHED_LAYERS = 3  # the last ones


@dataclass(frozen=True, kw_only=True)
class TrainedSettings(LearnsBeforehand):
    """Fields of every method that trains a hypernetwork.

    `layers` None means the last three; `maps` are the kinds of linear maps of their MLPs that are edited (`models.sites.MAPS`), None every
    one. `archive` is a trained network's file, to be used
    instead of training; None: from the cache, where training on `training` puts it.
    """

    kind: ClassVar[str]  # of the files in the cache
    format_version: ClassVar[int]  # raised when the same rows and settings train another network than before
    max_batch_size: ClassVar[int | None] = None

    layers: Sequence[int] | None
    maps: Sequence[str] | None
    rank: int
    v_std: float | None
    edit_learning_rate: float
    rate_learning_rate: float
    edit_weight: float
    locality_weight: float

    def __post_init__(self) -> None:
        if self.layers is not None and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise ConfigError(f"method.layers={list(self.layers)} must be layers in rising order, each once, such as [27,28,29]")
        if self.maps is not None and (not self.maps or set(self.maps) - set(MAPS) or len(set(self.maps)) < len(self.maps)):
            raise ConfigError(f"method.maps={list(self.maps)} must be some of {', '.join(MAPS)}, each once; null: every map of the MLP")
        _ = self._learning_settings  # checks the numbers

    def learned(self) -> Mapping[str, Any]:
        """Return what the network depends on beside the model; for `EditMethod.settings`."""
        return self._learning() if self._archive is None else {"archive": file_sha256(self._archive)}

    def make_course(self) -> Callable[..., Course]:
        """Return what makes the course of the training; see `hypernetwork_training.train`."""
        raise NotImplementedError

    def check(self, model: ModelDescription) -> None:
        """Check layers, numbers and training rows, or what an archive says of its own.

        Raises:
            ConfigError: what, with what is allowed.
            DatasetError: the training set cannot be read, or shares every subject with what is edited.
        """
        self.layers_of(model)
        self.maps_of(model)
        if self._archive is None:
            self.training.check()
            return
        if not self._archive.is_file():
            raise ConfigError(f"method.archive={self.archive} is no file; give a trained network's, or null to train one")
        check_rows(self._archive, self.training, kind=self.kind)

    def trained(self, lm: LanguageModel, cache: Cache, progress: Progress) -> tuple[Hypernetwork, tuple[str, ...]]:
        """Return the network, from `archive`, from the cache, or trained now, and the paths of the maps that it edits.

        The model must be in its unedited state.

        Raises:
            ConfigError: the network of a file belongs to another model, other layers or another rank.
        """
        layers = self.layers_of(lm.description)
        maps = edited_maps(lm, layers, self.maps_of(lm.description))
        if self.layers is None:
            progress.message(f"method.layers is not set: editing layers {layers[0]} to {layers[-1]}, the last {len(layers)} as published")
        path = self._archive or cache.path(self.kind, self._key(lm), ".safetensors")
        if not path.exists():
            self._train(lm, maps, layers[0], path, progress)
        network, quality = self._load(path, lm, maps)
        progress.message(f"trained network of {quality.get('rows', 'other')} rows: {quality.get('text', 'no validation')} ({path})")
        return network, tuple(edited.path for edited in maps)

    def layers_of(self, model: ModelDescription) -> tuple[int, ...]:
        """Return the layers to edit.

        Raises:
            ConfigError: a layer that the model does not have.
        """
        if self.layers is None:
            return tuple(range(max(0, model.num_layers - PUBLISHED_LAYERS), model.num_layers))
        model.check_layers(self.layers, setting="method.layers")
        return tuple(self.layers)

    def maps_of(self, model: ModelDescription) -> tuple[str, ...]:
        """Return the paths of the maps to edit, the layer's number left open, in the order of the MLP.

        Raises:
            ConfigError: the model has no such map of its own.
        """
        sites = sites_for(model.model_type)
        chosen = {path for kind in self.maps or ("mlp_in", "mlp_out") for path in sites.maps_of(kind)}
        return tuple(path for path in (*sites.mlp_in, sites.mlp_out) if path in chosen)

    # -- inside ------------------------------------------------------------------------------------------------------

    @property
    def _archive(self) -> Path | None:
        return None if self.archive is None else Path(self.archive).expanduser()

    @property
    def _learning_settings(self) -> NetworkLearningSettings:
        return self.learning_as(NetworkLearningSettings)

    def _learning(self) -> Mapping[str, Any]:
        return {
            "version": self.format_version,
            "layers": None if self.layers is None else list(self.layers),
            **({} if self.maps is None else {"maps": sorted(self.maps)}),
            "training": self.training.content_hash(),
            **self._learning_settings.as_key(),
        }

    def _key(self, lm: LanguageModel) -> str:
        return content_key({"model": lm.fingerprint, **self._learning()})

    def _train(self, lm: LanguageModel, maps: Sequence[NamedMap], first: int, path: Path, progress: Progress) -> None:
        from editeval.training.hypernetwork_training import train  # here: it imports lightning, which takes seconds

        requests = self.training.load()
        progress.message(f"training on {len(requests)} rows of {self.training.name}, {self.max_steps} steps at most; later runs read it")
        partial = path.with_suffix(".partial.safetensors")
        trained = train(
            lm, maps, requests, self._learning_settings, first=first, partial=partial, progress=progress, make_course=self.make_course()
        )
        best = min(trained.curve, key=lambda quality: quality.loss)
        about = {
            "model": lm.fingerprint,
            "rank": self.rank,
            "maps": [edited.path for edited in maps],
            "text": f"best at step {best.step}: {best.text()}",
            "curve": [vars(quality) for quality in trained.curve],
            "settings": dict(self._learning()),
            **rows_learned(self.training),
        }
        write_archive(path, trained.network.state_dict(), about, kind=self.kind)
        partial.unlink(missing_ok=True)

    def _load(self, path: Path, lm: LanguageModel, maps: Sequence[NamedMap]) -> tuple[Hypernetwork, Mapping[str, Any]]:
        """Return the network of a file, and what the file says of its training.

        Raises:
            ConfigError: it is no such file, or belongs to another model, other layers or another rank.
        """
        belongs = {"model": lm.fingerprint, "maps": [edited.path for edited in maps], "rank": self.rank}
        tensors, about = read_archive(path, belongs, kind=self.kind)
        network = Hypernetwork(maps, rank=self.rank, rate=self.edit_learning_rate, seed=self.training_seed, v_std=self.v_std)
        network.load_state_dict(tensors)
        device = lm.device_at(maps[0].path)
        return network.to(device).eval().requires_grad_(False), about


def update_of(
    lm: LanguageModel, network: Hypernetwork, sites: Sequence[str], requests: Sequence[EditRequest]
) -> tuple[tuple[LowRankDelta, ...], float]:
    """Return the updates that the network makes of these facts' gradients in the model as it is, and their mean loss in nats.

    Raises:
        EditError: a request that cannot be encoded, or whose loss or update is not finite.
    """
    limit = lm.description.max_positions
    rows = [target_row(lm.tokenizer, request, scored_at="target", max_tokens=limit) for request in requests]
    features = editing_features(lm, rows, sites)
    deltas = network.deltas(features.of_map)
    if not all(bool(torch.isfinite(delta.left).all() and torch.isfinite(delta.right).all()) for delta in deltas):
        raise EditError(
            "the update is not finite; train again with a lower method.learning_rate", request_ids=[r.request_id for r in requests]
        )
    return deltas, features.loss


def edited_maps(lm: LanguageModel, layers: Sequence[int], paths: Sequence[str] = ()) -> tuple[NamedMap, ...]:
    """Return the linear maps at these paths (the layer's number left open) of these layers; without paths every one of the MLPs."""
    paths = paths or (*lm.sites.mlp_in, lm.sites.mlp_out)
    return tuple(NamedMap(path=path.format(layer), **_widths(lm, path.format(layer))) for layer in layers for path in paths)


def _widths(lm: LanguageModel, path: str) -> dict[str, int]:
    rows, columns = lm.module.get_submodule(path).get_parameter("weight").shape
    return {"d_in": rows, "d_out": columns} if lm.sites.transposed else {"d_in": columns, "d_out": rows}

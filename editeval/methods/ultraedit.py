"""UltraEdit: one closed-form step from hidden states and gradients, normalised by what all edits so far looked like.

Gu et al. 2025, "UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Large Language Models", arXiv:2505.14679.

    python launch.py method=ultraedit dataset=counterfact num_edits=10 batch_size=100

At each position of the facts of an edit, z = [h; g] joins the input of a linear map and the gradient of the loss at its output. Running
mean and deviation of z over all edits, this one counted, normalise it: z^ = (z - mean) / deviation (the lifelong normalisation). The values

    v = -learning_rate * |h^|^2 * g^

are written to the keys h by ridge regression, dW = V^T (H H^T + I)^-1 H. Maps of one shape share their statistics, which are
part of each edit (`auxiliary`): the journal remembers them. Positions are those that the loss has a gradient at; the published code also
counts the target's last token, whose gradient is 0, and weighs facts of one pass by their targets' lengths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from editeval.edits.delta import Delta, DenseDelta, Edit, LowRankDelta
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.keyvalue.features import Features, editing_features
from editeval.keyvalue.fine_tuning import target_row
from editeval.keyvalue.footprint import APPLYING, FLOAT32, FLOAT64, MASTERS, PROMPT_TOKENS, maps_of, writing_of
from editeval.keyvalue.footprint_gradient import GradientPass
from editeval.keyvalue.spread import check_batch
from editeval.models.sites import MAPS, sites_for
from editeval.types import ConfigError, EditError, EditRequest, Footprint, ModelDescription, Progress, Workload

PUBLISHED_DEPTHS = (18 / 28, 26 / 28)  # layers 18 to 26 of GPT-J's 28
RIDGE = 1.0  # the identity of the paper's normal equations
PREFIX = "ultraedit"


@dataclass(frozen=True, kw_only=True)
class UltraEdit:
    """UltraEdit's settings; published numbers are in conf/method/ultraedit.yaml and conf/tuned/ultraedit.

    `maps` names a kind of map (one of `MAPS`) and the layers where it is edited; None for the layers means the published relative depth.
    `rows_per_pass` bounds the facts that run together; it does not change an edit.
    """

    max_batch_size: ClassVar[int | None] = None

    name: str
    maps: Mapping[str, Sequence[int] | None]
    learning_rate: float
    rows_per_pass: int

    def __post_init__(self) -> None:
        unknown = sorted(set(self.maps) - set(MAPS))
        if unknown or not self.maps:
            raise ConfigError(f"method.maps={dict(self.maps)} must name some of {', '.join(MAPS)}, each with its layers")
        if not self.learning_rate > 0 or self.rows_per_pass < 1:
            raise ConfigError(f"learning_rate={self.learning_rate} must be above 0, rows_per_pass={self.rows_per_pass} at least 1")

    def settings(self) -> Mapping[str, Any]:
        """Return everything that an edit depends on beside model and requests."""
        maps = {name: None if layers is None else list(layers) for name, layers in self.maps.items()}
        return {"maps": maps, "learning_rate": self.learning_rate}

    def check(self, model: ModelDescription) -> None:
        """Check maps and layers against the model's shape.

        Raises:
            ConfigError: a layer that the model does not have, or a gate where there is none.
        """
        self._sites(model)

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint:
        """Predict memory, disk and operations from shapes. The features of all facts of an edit are on the host."""
        self.check(model)  # below there must be a layer
        chosen = [(layer, edited) for name, layers in self._layers(model) for layer in layers for edited in maps_of(model, name)]
        maps = [edited for _, edited in chosen]
        first, facts = min(layer for layer, _ in chosen), workload.batch_size
        writing, positions = writing_of(maps, workload), facts * PROMPT_TOKENS
        together = GradientPass(first=first, rows=min(self.rows_per_pass, facts))
        every = GradientPass(first=first, rows=facts)
        updates = sum(min(positions * (edited.d_out + edited.d_in), edited.elements) for edited in maps) * FLOAT32
        features = positions * sum(edited.d_out + edited.d_in for edited in maps)
        statistics = sum(2 * sum(shape) + 1 for shape in {edited.shape for edited in maps}) * FLOAT64
        return Footprint(
            held_bytes={MASTERS: writing.masters},
            peak_bytes={"gradients of the facts": together.kept_bytes(model, workload), APPLYING: writing.applying},
            # Features as they come, normalised in float64; of one map the products of its keys and their factor.
            host_bytes=writing.copies + updates + features * (FLOAT32 + 2 * FLOAT64) + 2 * positions**2 * FLOAT64,
            journal_bytes=updates + statistics,
            auxiliary_bytes=statistics,
            edit_operations=every.arriving_operations(model)
            + every.operations(model)
            + sum(2.0 * positions**2 * (edited.d_in + edited.d_out) + positions**3 for edited in maps),
            edited=tuple(edited.shape for edited in maps),
        )

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Editor:
        """Return the editor; nothing has to be made."""
        description = model.lm.description
        if any(layers is None for layers in self.maps.values()):
            layers = _published(description)
            progress.message(
                f"method.maps sets no layers: editing layers {layers[0]} to {layers[-1]} of {description.num_layers}, the relative depth"
            )
        return Editor(model=model, sites=self._sites(description), method=self)

    def _sites(self, model: ModelDescription) -> tuple[str, ...]:
        """Return the paths of the edited maps, in order of kind and layer."""
        found: list[str] = []
        sites = sites_for(model.model_type)
        for name, layers in self._layers(model):
            model.check_layers(layers, setting=f"method.maps.{name}")
            found.extend(path.format(layer) for layer in layers for path in sites.maps_of(name))
        if not found:
            raise ConfigError(
                f"method.maps={dict(self.maps)} names no layer; give one kind of map a layer, such as method.maps.mlp_out=[3]"
            )
        return tuple(dict.fromkeys(found))

    def _layers(self, model: ModelDescription) -> list[tuple[str, Sequence[int]]]:
        """Return the layers where each kind of map is edited."""
        return [(name, _published(model) if layers is None else layers) for name, layers in self.maps.items()]


def _published(model: ModelDescription) -> range:
    first, last = (round(depth * model.num_layers) for depth in PUBLISHED_DEPTHS)
    return range(first, min(last, model.num_layers - 1) + 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """Of N vectors: their number, their mean (d), and the sum of squared deviations from it (d), float64."""

    count: float
    mean: Tensor
    squares: Tensor

    def to(self, device: torch.device) -> Statistics:
        """Return them on a device."""
        return replace(self, mean=self.mean.to(device), squares=self.squares.to(device))

    def with_more(self, vectors_ND: Tensor) -> Statistics:
        """Return the statistics of these vectors and the earlier ones together (Chan et al. 1983)."""
        vectors_ND = vectors_ND.double()
        new, total = len(vectors_ND), self.count + len(vectors_ND)
        mean = vectors_ND.mean(dim=0)
        apart = mean - self.mean
        squares = self.squares + (vectors_ND - mean).square().sum(dim=0) + apart.square() * (self.count * new / total)
        return Statistics(count=total, mean=self.mean + apart * (new / total), squares=squares)

    def normalised(self, vectors_ND: Tensor) -> Tensor:
        """Return (vectors - mean) / deviation, 0 where nothing ever deviated."""
        deviation = (self.squares / max(self.count - 1, 1)).sqrt()
        return torch.where(deviation > 0, (vectors_ND.double() - self.mean) / deviation.clamp(min=torch.finfo(torch.float32).tiny), 0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Editor:
    """UltraEdit bound to a model."""

    model: EditedModel
    sites: tuple[str, ...]
    method: UltraEdit

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        """Return the updates that write these facts together, and the statistics of all edits so far.

        Raises:
            EditError: facts that contradict each other, one that cannot be encoded, or features that are all the same.
        """
        check_batch(requests)
        lm = self.model.lm
        limit = lm.description.max_positions
        rows = [target_row(lm.tokenizer, request, scored_at="target", max_tokens=limit) for request in requests]
        groups = [rows[start : start + self.method.rows_per_pass] for start in range(0, len(rows), self.method.rows_per_pass)]
        passes = [editing_features(lm, group, self.sites) for group in groups]
        joined = {site: _join([each.of_map[site] for each in passes]) for site in self.sites}
        statistics = self._statistics(joined)
        deltas = tuple(
            delta for site, features in joined.items() if (delta := self._update(site, features, statistics[_shape(features)])) is not None
        )
        if not deltas:
            raise EditError(
                "the features of this edit are all the same, so nothing is left after normalisation; write more facts an edit (batch_size)",
                request_ids=[request.request_id for request in requests],
            )
        loss = sum(each.loss * len(group) for each, group in zip(passes, groups, strict=True)) / len(rows)
        count = max(float(each.count) for each in statistics.values())
        return Edit(deltas=deltas, auxiliary=_recorded(statistics), diagnostics={"loss_first": loss, "features_so_far": count})

    def _statistics(self, joined: Mapping[str, Features]) -> dict[str, Statistics]:
        """Return the statistics by shape with this edit's features: those of the last edit in the model, gone on."""
        earlier = self.model.auxiliary[-1] if self.model.auxiliary else {}
        found: dict[str, Statistics] = {}
        for site, features in joined.items():
            shape, device = _shape(features), self._device(site)
            vectors_ND = torch.cat([features.inputs, features.gradients], dim=1).to(device)
            before = found.get(shape) or _read(earlier, shape, width=vectors_ND.shape[1])
            found[shape] = before.to(device).with_more(vectors_ND)
        return found

    def _update(self, site: str, features: Features, statistics: Statistics) -> Delta | None:
        return _update(site, features, statistics.to(self._device(site)), self.method.learning_rate)

    def _device(self, site: str) -> torch.device:
        """Return where the arithmetic of a map is done; its features wait on the host."""
        return self.model.lm.device_at(site)


def _update(site: str, features: Features, statistics: Statistics, learning_rate: float) -> Delta | None:
    """Return dW = V^T (H H^T + I)^-1 H, factored unless a dense one is smaller; None where it is zero.

    It is computed where the statistics are.
    """
    vectors_ND = torch.cat([features.inputs, features.gradients], dim=1).to(statistics.mean.device)
    keys_ND = vectors_ND[:, : features.inputs.shape[1]].double()
    normalised = statistics.normalised(vectors_ND)
    hidden_ND, gradients_NO = normalised[:, : keys_ND.shape[1]], normalised[:, keys_ND.shape[1] :]
    values_NO = -learning_rate * hidden_ND.square().sum(dim=1, keepdim=True) * gradients_NO
    gram_NN = keys_ND @ keys_ND.T + RIDGE * torch.eye(len(keys_ND), dtype=torch.float64, device=keys_ND.device)
    right_ND = torch.linalg.solve(gram_NN, keys_ND)
    if not bool(values_NO.any()):
        return None
    parameter = f"{site}.weight"
    if len(keys_ND) * sum(normalised.shape[1:]) > values_NO.shape[1] * keys_ND.shape[1]:
        return DenseDelta(parameter=parameter, value=(values_NO.T @ right_ND).float().cpu())
    left_ON, right_ND = values_NO.T.float().cpu(), right_ND.float().cpu()
    return LowRankDelta(parameter=parameter, left=left_ON.contiguous(), right=right_ND.contiguous())


def _join(parts: Sequence[Features]) -> Features:
    return Features(inputs=torch.cat([part.inputs.cpu() for part in parts]), gradients=torch.cat([part.gradients.cpu() for part in parts]))


def _shape(features: Features) -> str:
    return f"{features.inputs.shape[1]}x{features.gradients.shape[1]}"


def _read(auxiliary: Mapping[str, Tensor], shape: str, *, width: int) -> Statistics:
    name = f"{PREFIX}.{shape}"
    if f"{name}.count" not in auxiliary:
        zeros = torch.zeros(width, dtype=torch.float64)
        return Statistics(count=0.0, mean=zeros, squares=zeros)
    return Statistics(
        count=float(auxiliary[f"{name}.count"]), mean=auxiliary[f"{name}.mean"].double(), squares=auxiliary[f"{name}.squares"].double()
    )


def _recorded(statistics: Mapping[str, Statistics]) -> dict[str, Tensor]:
    recorded: dict[str, Tensor] = {}
    for shape, each in statistics.items():
        recorded[f"{PREFIX}.{shape}.count"] = torch.tensor(each.count, dtype=torch.float64)
        recorded[f"{PREFIX}.{shape}.mean"] = each.mean.cpu().contiguous()
        recorded[f"{PREFIX}.{shape}.squares"] = each.squares.cpu().contiguous()
    return recorded

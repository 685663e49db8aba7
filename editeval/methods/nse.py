"""NSE: MEMIT's spread towards values of the *unedited* model, into the most active neurons only, in rounds until the facts are there.

Jiang et al. 2024, "Neuron-Level Sequential Editing for Large Language Models", arXiv:2410.04045.

    python launch.py method=nse num_edits=100

Three things keep a long sequence from ruin. *Rewinding*: the target value z of a fact is optimised in the original weights, so it does not
chase what earlier edits did to the model. *Selection*: with K the keys of the facts, a layer's update touches the smallest set S of
neurons that holds `neuron_share` of the summed activations sum_i |k_i|; with K_p the keys of all earlier edits and n layers left,

    dW[:, S] = R K_S^T (lambda C_SS + K_p,S K_p,S^T + K_S K_S^T)^-1,   R = (Z - V) / n

*Rounds*: facts whose value is still more than `enough` from z are spread again, in the weights with all updates so far, at most
`max_rounds` times; a fact further than `too_far` is left out of a round. The keys of every edit are part of it (`auxiliary`).
Of a batch the first published code (jianghoucheng/nse) writes three clusters of facts one after another, and guards within an edit what
its earlier rounds have written; the copy in jianghoucheng/AlphaEdit does neither, and neither does this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from editeval.edits.delta import Edit, LowRankDelta
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.keyvalue.covariance import key_covariances
from editeval.keyvalue.followed import FollowedEdits, keys_of, recorded_keys
from editeval.keyvalue.footprint import INVERSE, Solver, remembering_keys
from editeval.keyvalue.graphs import StepGraphs
from editeval.keyvalue.objective import FactRows
from editeval.keyvalue.settings import SpreadSettings
from editeval.keyvalue.spread import Spread, Target, check_batch, spread, value_diagnostics
from editeval.keyvalue.target_value import TargetValue, fact_rows, optimise
from editeval.keyvalue.walk import LayerWalk, updated
from editeval.types import ConfigError, EditRequest, Footprint, ModelDescription, Progress, Workload

PUBLISHED_WEIGHT = 10000 / 6400  # lambda for GPT-2 XL, over the width of its keys
USUAL_ROUNDS = 2  # of a fact that is written alone, on the models of the tests; a stubborn one takes `max_rounds`
ENOUGH_SHARE = 0.1  # of the way from the unedited value to z: where `enough` is not set, which is in the unit of one model's states


@dataclass(frozen=True, kw_only=True)
class NSE(SpreadSettings):
    """NSE's settings; published numbers are in conf/method/nse.yaml and conf/tuned/nse.

    `covariance_weight` is lambda; None scales the published one to the width of this model's keys. `enough` and `too_far` are distances
    from the target value in the unit of this model's hidden states; None: a tenth of the fact's own way, and no limit.
    """

    published_depths: ClassVar[tuple[float, ...]] = (13 / 48, 17 / 48)  # layers 13 to 17 of GPT-2 XL's 48
    solver: ClassVar[Solver] = INVERSE  # the selected part of C takes what MEMIT's inverse would at most

    covariance_weight: float | None
    neuron_share: float
    max_rounds: int
    enough: float | None
    too_far: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("covariance_weight", "enough", "too_far"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value} must be above 0; set method.{name}")
        if not 0 < self.neuron_share <= 1:
            raise ConfigError(f"neuron_share={self.neuron_share} must be above 0 and at most 1; set method.neuron_share")
        if self.max_rounds < 1:
            raise ConfigError(f"max_rounds={self.max_rounds} writes nothing; set method.max_rounds to at least 1")

    def settings(self) -> Mapping[str, Any]:
        """Return everything that an edit depends on beside model and requests."""
        own = ("covariance_weight", "neuron_share", "max_rounds", "enough", "too_far")
        return {**self.shared_settings(), **{name: getattr(self, name) for name in own}}

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint:
        """Predict memory, disk and operations from shapes: an update of the facts' rank for each round, and the keys to remember."""
        spread = super().footprint(model, workload)
        rounds = min(USUAL_ROUNDS, self.max_rounds)
        return remembering_keys(replace(spread, journal_bytes=rounds * spread.journal_bytes), workload)

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Editor:
        """Return the editor; prefixes and covariances are of the unedited model and come from the cache if they are there."""
        lm = model.lm
        layers = self.layers_of(lm.description)
        self.announce(layers, lm.description, progress)
        weight = self.covariance_weight
        if weight is None:
            weight = PUBLISHED_WEIGHT * lm.description.intermediate_size
            progress.message(f"method.covariance_weight is not set: {weight:g}, the published weight for each dimension of the key")
        if self.enough is None:
            progress.message(f"method.enough is not set: a fact is there when {1 - ENOUGH_SHARE:.0%} of the way to its value is done")
        sites = [lm.sites.mlp_out.format(layer) for layer in layers]
        with model.unedited():
            contexts = self.contexts(lm, cache)
            covariances = key_covariances(lm, sites, self.covariance_source, cache, progress)
        neurons = {
            site: Neurons(base=weight * covariance.double().to(lm.device_at(site)), share=self.neuron_share)
            for site, covariance in covariances.items()
        }
        return Editor(model=model, contexts=contexts, layers=layers, memory=Memory(model=model, neurons=neurons), settings=self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Editor:
    """NSE bound to a model."""

    model: EditedModel
    contexts: tuple[str, ...]
    layers: tuple[int, ...]
    memory: Memory
    settings: NSE
    graphs: StepGraphs = field(default_factory=StepGraphs)

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        """Return the updates that write these facts together, with their keys as what later edits must remember.

        There is no update where every fact is there already, or too far: such an edit is recorded, and its `rounds` in edits.jsonl are 0.

        Raises:
            EditError: facts that contradict each other, or one that cannot be encoded or optimised.
        """
        check_batch(requests)
        self.memory.follow()
        lm = self.model.lm
        limit = lm.description.max_positions
        facts = [fact_rows(lm.tokenizer, request, self.contexts, max_tokens=limit) for request in requests]
        last = self.layers[-1]
        with self.model.unedited():
            sites, settings = [lm.sites.layers.format(last)], self.settings.target_settings
            values = optimise(lm, facts, layer=last, sites=sites, settings=settings, graphs=self.graphs)
        updates: dict[str, LowRankDelta] = {}
        rounds: list[Spread] = []
        for _ in range(self.settings.max_rounds):
            with updated(lm.module, _by_path(updates)):
                chosen = self._to_write(facts, values)
                if not chosen:
                    break
                done = self._spread([facts[number] for number in chosen], [values[number] for number in chosen])
            rounds.append(done)
            updates = {update.parameter: _joined(updates.get(update.parameter), update) for update in (*updates.values(), *done.updates)}
        with updated(lm.module, _by_path(updates)):
            keys = self._keys(facts)
            missing = self._missing(facts, values)
        diagnostics = {"rounds": float(len(rounds)), "missing_after": float(missing.mean())}
        if rounds:
            diagnostics |= value_diagnostics(values, rounds[0])
        return Edit(deltas=tuple(updates.values()), auxiliary=recorded_keys(keys), diagnostics=diagnostics)

    def _to_write(self, facts: Sequence[FactRows], values: Sequence[TargetValue]) -> list[int]:
        """Return the numbers of the facts whose value is further than enough, and not too far, from its target."""
        missing_E = self._missing(facts, values)
        site = self.model.lm.sites.layers.format(self.layers[-1])
        way_E = torch.stack([value.deltas[site].norm() for value in values])
        enough_E = way_E * ENOUGH_SHARE if self.settings.enough is None else torch.full_like(way_E, self.settings.enough)
        limit = float("inf") if self.settings.too_far is None else self.settings.too_far
        return ((missing_E > enough_E) & (missing_E < limit)).nonzero()[:, 0].tolist()

    def _missing(self, facts: Sequence[FactRows], values: Sequence[TargetValue]) -> Tensor:
        """Return the distances (E) from the target values of the last layer's states at the subjects' last tokens."""
        lm, last = self.model.lm, self.layers[-1]
        site = lm.sites.layers.format(last)
        bare = [replace(fact, prompts=fact.prompts[:1]) for fact in facts]
        current_ED = LayerWalk(lm, bare, first=last, last=last).values(site).cpu()
        wanted_ED = torch.stack([value.initial[site] + value.deltas[site] for value in values])
        missing_E: Tensor = (wanted_ED - current_ED).norm(dim=1)
        return missing_E

    def _spread(self, facts: Sequence[FactRows], values: Sequence[TargetValue]) -> Spread:
        sites = self.model.lm.sites
        return spread(
            self.model.lm,
            facts,
            values,
            layers=self.layers,
            targets=(Target(edited=sites.mlp_out, moved=sites.layers),),
            group_sizes=self.settings.group_sizes,
            share=lambda left: 1 / left,
            solve=lambda site, keys_KE: self.memory.neurons[site].solve(keys_KE),
        )

    def _keys(self, facts: Sequence[FactRows]) -> dict[str, Tensor]:
        """Return the keys (E, K), float32, of all facts by site, in the model's state of this moment."""
        lm = self.model.lm
        walk = LayerWalk(lm, facts, first=self.layers[0], last=self.layers[-1], group_sizes=self.settings.group_sizes)
        keys: dict[str, Tensor] = {}
        for layer in self.layers:
            while walk.layer < layer:
                walk.advance()
            site = lm.sites.mlp_out.format(layer)
            keys[site] = walk.keys(site).cpu()
        return keys


@dataclass(kw_only=True, eq=False)
class Neurons:
    """What the neurons of one layer should keep: `base` = lambda C plus the products of earlier keys (K, K), float64."""

    base: Tensor
    share: float

    def absorb(self, keys_EK: Tensor) -> None:
        """Add the keys of an earlier edit."""
        keys_EK = keys_EK.to(self.base.device, torch.float64)
        self.base = self.base + keys_EK.T @ keys_EK

    def solve(self, keys_KE: Tensor) -> Tensor:
        """Return A (K, E), float64: the solved keys of the selected neurons, 0 for the others.

        The selection is another for every edit, so no factor of the whole can be kept.
        """
        keys_KE = keys_KE.to(self.base.device, torch.float64)
        selected_S = select_neurons(keys_KE.abs().sum(dim=1), share=self.share)
        keys_SE = keys_KE[selected_S]
        matrix_SS = self.base[selected_S[:, None], selected_S] + keys_SE @ keys_SE.T
        solved_KE = torch.zeros_like(keys_KE)
        solved_KE[selected_S] = torch.linalg.solve(matrix_SS, keys_SE)
        return solved_KE


def select_neurons(activity_K: Tensor, *, share: float) -> Tensor:
    """Return the numbers of the fewest neurons that together hold `share` of all activity, most active first."""
    sorted_K, order_K = activity_K.sort(descending=True, stable=True)
    held_K = sorted_K.cumsum(dim=0)
    return order_K[: int((held_K < share * held_K[-1]).sum()) + 1]


@dataclass(kw_only=True, eq=False)
class Memory:
    """The keys of the edits that are in the model now, as the journal holds them, in the form that solves need."""

    model: EditedModel
    neurons: Mapping[str, Neurons]
    _unedited: dict[str, Tensor] = field(default_factory=dict)
    _followed: FollowedEdits = field(default_factory=FollowedEdits)

    def __post_init__(self) -> None:
        self._unedited = {site: each.base for site, each in self.neurons.items()}

    def follow(self) -> None:
        """Absorb the keys of edits applied since; start anew where the model was restored or holds other edits."""
        void, new = self._followed.follow(self.model.auxiliary)
        if void:
            for site, each in self.neurons.items():
                each.base = self._unedited[site]
        for auxiliary in new:
            for site, each in self.neurons.items():
                if (keys_EK := keys_of(auxiliary, site)) is not None:
                    each.absorb(keys_EK)


def _by_path(updates: Mapping[str, LowRankDelta]) -> dict[str, list[LowRankDelta]]:
    return {name.removesuffix(".weight"): [update] for name, update in updates.items()}


def _joined(earlier: LowRankDelta | None, later: LowRankDelta) -> LowRankDelta:
    """Return one update that does what both do."""
    if earlier is None or earlier is later:
        return later
    return replace(later, left=torch.cat([earlier.left, later.left], dim=1), right=torch.cat([earlier.right, later.right]))

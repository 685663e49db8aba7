"""One edit spread over several layers: what MEMIT and its relatives share.

For E facts with target values Z at the last edited layer, walk up the edited layers; at each compute the keys K and the current
values V with all updates so far, and update its linear map by

    dW = share * (Z - V) A^T,   A (K, E) from the method's own solve of the keys

`share` tells how much of what is missing this layer takes: 1/n with n layers left (MEMIT, arXiv:2210.07229, equation 20), or 1/sqrt(n)
(PMET, arXiv:2308.08742, equation 12).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from editeval.edits.delta import Edit, LowRankDelta
from editeval.keyvalue.graphs import StepGraphs
from editeval.keyvalue.objective import FactRows, TargetSettings
from editeval.keyvalue.solve import DependentKeysError
from editeval.keyvalue.target_value import TargetValue, fact_rows, optimise
from editeval.keyvalue.walk import LayerWalk
from editeval.models.model import LanguageModel, from_packed_weights
from editeval.types import EditError, EditRequest

Solve = Callable[[str, Tensor], Tensor]
"""From a site's path and its keys (K, E), float64, to A (K, E)."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A linear map that is edited in every layer, and the module of the last layer whose output its updates should move.

    Both are paths with the layer's number left open, such as `sites.mlp_out` and `sites.layers`.
    """

    edited: str
    moved: str


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The updates, in order of layer and target, and by site the keys (E, K), float32, that they were made for."""

    updates: tuple[LowRankDelta, ...]
    keys: Mapping[str, Tensor]
    missing_first: float
    missing_last: float


@from_packed_weights
def spread(
    lm: LanguageModel,
    facts: Sequence[FactRows],
    values: Sequence[TargetValue],
    *,
    layers: Sequence[int],
    targets: Sequence[Target],
    share: Callable[[int], float],
    solve: Solve,
    group_sizes: Sequence[int] = (),
) -> Spread:
    """Return the updates of `layers` that move the outputs at `targets` towards `values`; the model is left as found.

    Updates that are zero are left out. `group_sizes`: see `LayerWalk`. `share` gets the number of layers left, the current one counted.

    Raises:
        EditError: nothing would change, or a number is not finite.
    """
    ids = [fact.request_id for fact in facts]
    walk = LayerWalk(lm, facts, first=layers[0], last=layers[-1], group_sizes=group_sizes)
    updates: list[LowRankDelta] = []
    keys: dict[str, Tensor] = {}
    missing_norms: list[float] = []
    for number, layer in enumerate(layers):
        while walk.layer < layer:
            walk.advance()
        for target in targets:
            site, moved = target.edited.format(layer), target.moved.format(layers[-1])
            wanted_ED = torch.stack([value.initial[moved] + value.deltas[moved] for value in values])
            current_ED = walk.values(moved)
            missing_ED = wanted_ED.to(current_ED.device) - current_ED
            missing_norms.append(float(missing_ED.norm(dim=1).mean()))
            keys_EK = walk.keys(site)
            keys[site] = keys_EK.cpu()
            left_DE = share(len(layers) - number) * missing_ED.T
            update = _update(site, left_DE, _solved(solve, site, keys_EK.T.double(), request_ids=ids), request_ids=ids)
            if update is not None:
                walk.add(update)  # the next target of this layer sees it
                updates.append(update)
    if not updates:
        raise EditError("the edit changes nothing: every update is zero", request_ids=ids)
    return Spread(updates=tuple(updates), keys=keys, missing_first=missing_norms[0], missing_last=missing_norms[-1])


@dataclass(frozen=True, kw_only=True, eq=False)
class SpreadEditor:
    """A method bound to a model: where it edits, what it optimises, and how it solves.

    Target values are optimised at the modules `optimised` (paths with the layer's number left open) of the last of `layers`.
    `contexts` are the bare prompt and groups of `group_sizes` prefixes; empty: one group.
    """

    lm: LanguageModel
    contexts: tuple[str, ...]
    group_sizes: tuple[int, ...]
    layers: tuple[int, ...]
    optimised: tuple[str, ...]
    targets: tuple[Target, ...]
    share: Callable[[int], float]
    solve: Solve
    target_settings: TargetSettings
    graphs: StepGraphs = field(default_factory=StepGraphs)

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        """Return the updates that write these facts together.

        Raises:
            EditError: facts that contradict each other, or one that cannot be encoded or optimised.
        """
        result, diagnostics = self.compute(requests)
        return Edit(deltas=result.updates, diagnostics=diagnostics)

    def compute(self, requests: Sequence[EditRequest]) -> tuple[Spread, dict[str, float]]:
        """Return the updates, the keys that they were made for, and numbers for people."""
        check_batch(requests)
        limit = self.lm.description.max_positions
        facts = [fact_rows(self.lm.tokenizer, request, self.contexts, max_tokens=limit) for request in requests]
        sites = [path.format(self.layers[-1]) for path in self.optimised]
        values = optimise(self.lm, facts, layer=self.layers[-1], sites=sites, settings=self.target_settings, graphs=self.graphs)
        result = spread(
            self.lm,
            facts,
            values,
            layers=self.layers,
            targets=self.targets,
            share=self.share,
            solve=self.solve,
            group_sizes=self.group_sizes,
        )
        return result, value_diagnostics(values, result)


def check_batch(requests: Sequence[EditRequest]) -> None:
    """Check that the facts of one edit can be written together.

    Raises:
        EditError: none at all, or two that give the same prompt and subject different targets.
    """
    if not requests:
        raise EditError("an edit of no facts; give at least one request")
    seen: dict[tuple[str, str], EditRequest] = {}
    for request in requests:
        earlier = seen.setdefault((request.prompt, request.subject), request)
        if earlier.target_new != request.target_new:
            raise EditError(
                f"one edit cannot make {request.full_prompt!r} say both {earlier.target_new!r} and {request.target_new!r}; "
                "put them into different edits (lower batch_size)",
                request_ids=[earlier.request_id, request.request_id],
            )


def value_diagnostics(values: Sequence[TargetValue], result: Spread) -> dict[str, float]:
    """Return numbers for people: means over the facts of losses, norms and what was missing before the first and last layer."""
    deltas = [delta.norm() for value in values for delta in value.deltas.values()]
    return {
        "loss_first": _mean([value.losses[0].total for value in values]),
        "loss_last": _mean([value.losses[-1].total for value in values]),
        "target_log_prob_first": -_mean([value.losses[0].nll for value in values]),
        "target_log_prob_last": -_mean([value.losses[-1].nll for value in values]),
        "kl_last": _mean([value.losses[-1].kl for value in values]),
        "evaluations": float(max(len(value.losses) for value in values)),
        "delta_norm": _mean([float(norm) for norm in deltas]),
        "missing_first": result.missing_first,
        "missing_last": result.missing_last,
        "update_norm": sum(update_norm(update) ** 2 for update in result.updates) ** 0.5,
    }


def update_norm(update: LowRankDelta) -> float:
    """Return the Frobenius norm of left @ right, without forming it."""
    left, right = update.left.double(), update.right.double()
    return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())


def _solved(solve: Solve, site: str, keys_KE: Tensor, *, request_ids: Sequence[str]) -> Tensor:
    try:
        return solve(site, keys_KE)
    except DependentKeysError as error:
        raise EditError(
            f"the keys of this edit at {site} cannot be told apart ({error}); put facts of one subject into different edits",
            request_ids=request_ids,
        ) from error


def _update(site: str, left_DE: Tensor, solved_KE: Tensor, *, request_ids: Sequence[str]) -> LowRankDelta | None:
    update = LowRankDelta(
        parameter=f"{site}.weight",
        left=left_DE.to("cpu", torch.float32).contiguous(),
        right=solved_KE.T.to("cpu", torch.float32).contiguous(),
    )
    if not bool(torch.isfinite(update.left).all()) or not bool(torch.isfinite(update.right).all()):
        raise EditError(f"the update of {site} is not finite; the model may be broken by earlier edits", request_ids=request_ids)
    return update if update_norm(update) > 0 else None


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)

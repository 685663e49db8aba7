"""MEMIT, PMET and AlphaEdit written straight from the papers, with nothing saved: oracle of tests and baseline of `edit_speed.py`.

Every step of a target value runs the whole model forward and backward over every position of every prompt; for each layer, keys and current
values come from passes over the whole model, a dense float64 system as wide as the keys is solved, and the weight itself is written.
Sources: arXiv:2210.07229, arXiv:2308.08742, arXiv:2410.02355. Independent of `editeval.keyvalue` but for the token positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.straightforward import _states, full_target_value
from editeval.keyvalue.objective import FactRows, TargetSettings
from editeval.models.model import LanguageModel

DenseSolve = Callable[[str, Tensor], Tensor]
"""From a site's path and its keys (K, E), float64, to A (K, E); dW = share * R A^T."""


@dataclass(frozen=True, kw_only=True)
class FullSpread:
    """Where and how a method spreads: pairs (edited map, moved module) with the layer's number left open."""

    layers: tuple[int, ...]
    optimised: tuple[str, ...]
    targets: tuple[tuple[str, str], ...]
    share: Callable[[int], float]
    solve: DenseSolve


def full_spread(
    lm: LanguageModel, facts: Sequence[FactRows], how: FullSpread, *, settings: TargetSettings
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return dW (d_out, d_in), float64, and keys (K, E) by site; the weights are written on the way and put back at the end."""
    last = how.layers[-1]
    sites = [path.format(last) for path in how.optimised]
    wanted: dict[str, list[Tensor]] = {site: [] for site in sites}
    for fact in facts:
        initial = {site: outputs[0] for site, outputs in _states(lm, fact.prompts[:1], sites, outputs=True).items()}
        deltas = full_target_value(lm, fact, sites=sites, settings=settings).deltas
        for site in sites:
            wanted[site].append(initial[site] + deltas[site])
    weights = {site: lm.module.get_submodule(site).get_parameter("weight") for site in _edited(how)}
    copies = {site: weight.detach().clone() for site, weight in weights.items()}
    updates: dict[str, Tensor] = {}
    keys: dict[str, Tensor] = {}
    for number, layer in enumerate(how.layers):
        for edited, moved in how.targets:
            site, output = edited.format(layer), moved.format(last)
            keys[site] = torch.stack([_key(lm, fact, site) for fact in facts], dim=1)
            current = torch.stack([_states(lm, fact.prompts[:1], [output], outputs=True)[output][0] for fact in facts])
            missing_DE = (torch.stack(wanted[output]) - current).T.double()
            updates[site] = how.share(len(how.layers) - number) * missing_DE @ how.solve(site, keys[site].double()).T
            change = updates[site].T if lm.sites.transposed else updates[site]
            with torch.no_grad():
                weights[site].add_(change.to(weights[site].dtype))
    with torch.no_grad():
        for site, copy in copies.items():
            weights[site].copy_(copy)
    return updates, keys


def memit_solve(covariances: Mapping[str, Tensor], *, weight: float) -> DenseSolve:
    """MEMIT's and PMET's (weight C + K K^T)^-1 K."""

    def solve(site: str, keys_KE: Tensor) -> Tensor:
        solved: Tensor = torch.linalg.solve(weight * covariances[site].double() + keys_KE @ keys_KE.T, keys_KE)
        return solved

    return solve


def alphaedit_solve(projections: Mapping[str, Tensor], earlier: Mapping[str, Tensor], *, l2: float) -> DenseSolve:
    """AlphaEdit's (P (K K^T + K_p K_p^T) + l2 I)^-1 P K; `earlier` holds K_p K_p^T by site."""

    def solve(site: str, keys_KE: Tensor) -> Tensor:
        projection = projections[site].double()
        system = projection @ (keys_KE @ keys_KE.T + earlier[site])
        solved: Tensor = torch.linalg.solve(
            system + l2 * torch.eye(len(system), dtype=torch.float64, device=system.device), projection @ keys_KE
        )
        return solved

    return solve


def _key(lm: LanguageModel, fact: FactRows, site: str) -> Tensor:
    keys = _states(lm, fact.prompts, [site], outputs=False)[site]
    return keys[0] if len(keys) == 1 else (keys[0] + keys[1:].mean(dim=0)) / 2


def _edited(how: FullSpread) -> list[str]:
    return [edited.format(layer) for layer in how.layers for edited, _ in how.targets]

"""The methods that locate, then edit, twice for `edit_speed.py`: as editeval computes them, and straight from their papers.

Both return dW (d_out, d_in), float64, by site, for one fact in the model's current state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.speed_setup import Setup, prefixes, relative
from benchmarks.straightforward import full_rome
from benchmarks.straightforward_spread import FullSpread, alphaedit_solve, full_spread, memit_solve
from editeval.edits.delta import LowRankDelta
from editeval.keyvalue.graphs import StepGraphs
from editeval.keyvalue.null_space import KeyMemory
from editeval.keyvalue.objective import TargetSettings
from editeval.keyvalue.solve import regularised_keys
from editeval.keyvalue.spread import Solve, SpreadEditor, Target
from editeval.keyvalue.target_value import fact_rows, optimise
from editeval.methods.rome import rank_one_update
from editeval.types import EditRequest

# Published for GPT-2 XL, the early stop included: it ends both at the same step.
ROME_SETTINGS = TargetSettings(num_steps=20, learning_rate=0.5, weight_decay=0.5, clamp_norm_factor=4.0, kl_factor=0.0625)
SPREAD_SETTINGS = TargetSettings(num_steps=20, learning_rate=0.5, weight_decay=0.5, clamp_norm_factor=0.75, kl_factor=0.0625)
ROME_PREFIXES = prefixes(long=10, short=10)
SPREAD_PREFIXES = prefixes(long=5)
WEIGHT = 100.0
L2 = 1.0
EARLIER_EDITS = 3  # facts whose keys AlphaEdit must keep while it is timed

Outcome = Mapping[str, Tensor | LowRankDelta]
Compute = Callable[[EditRequest], Outcome]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A method in both forms, and how it is measured.

    `once` is what ours needs once a layer, in CPU seconds. `goal` is the ratio that this project set itself, `tolerance` how far the
    outcomes may be apart. Short edits are timed `repeats` times, and the median counts. With `plain_is_pass` the straightforward form is
    no edit but one plain pass forward and backward, and what is told is how many of those an edit costs. `variant` is told behind the
    method's name, where a setting is not the published one.
    """

    ours: Compute
    plain: Compute
    once: float | None = None
    goal: float | None = None
    tolerance: float = 1e-4
    repeats: int = 1
    plain_is_pass: bool = False
    variant: str = ""


def rome(setup: Setup) -> Pair:
    """ROME at a third of the depth; the plain one solves a dense system in float64 for each edit."""
    lm, site, layer = setup.lm, setup.sites[-1], setup.layers[-1]
    factor, once = setup.factor
    graphs = StepGraphs()

    def ours(request: EditRequest) -> dict[str, Tensor]:
        rows = fact_rows(lm.tokenizer, request, ROME_PREFIXES)
        value = optimise(lm, [rows], layer=layer, sites=[site], settings=ROME_SETTINGS, graphs=graphs)[0]
        update = rank_one_update(value, site, factor=factor, key="mean")
        return {site: update.left.double()[:, None] @ update.right.double()[None]}

    def plain(request: EditRequest) -> dict[str, Tensor]:
        rows = fact_rows(lm.tokenizer, request, ROME_PREFIXES)
        update = full_rome(lm, rows, site=site, settings=ROME_SETTINGS, covariance=setup.covariance)
        return {site: update.left.double().cpu()[:, None] @ update.right.double().cpu()[None]}

    return Pair(ours=ours, plain=plain, once=once, goal=5.0)


def memit(setup: Setup) -> Pair:
    """MEMIT: the residual stream, 1 / layers left."""
    sites = setup.lm.sites
    inverse, once = setup.inverse
    how = FullSpread(
        layers=setup.layers,
        optimised=(sites.layers,),
        targets=((sites.mlp_out, sites.layers),),
        share=lambda left: 1 / left,
        solve=memit_solve(dict.fromkeys(setup.sites, setup.covariance), weight=WEIGHT),
    )
    return _spread_pair(setup, how, lambda _, keys: regularised_keys(inverse, keys, weight=WEIGHT), once=once)


def pmet(setup: Setup) -> Pair:
    """PMET: the outputs of MLP and attention, 1 / sqrt(layers left), the MLP written."""
    sites = setup.lm.sites
    inverse, once = setup.inverse
    how = FullSpread(
        layers=setup.layers,
        optimised=(sites.mlp_out, sites.attention_out),
        targets=((sites.mlp_out, sites.mlp_out),),
        share=lambda left: left**-0.5,
        solve=memit_solve(dict.fromkeys(setup.sites, setup.covariance), weight=WEIGHT),
    )
    return _spread_pair(setup, how, lambda _, keys: regularised_keys(inverse, keys, weight=WEIGHT), once=once)


def alphaedit(setup: Setup) -> Pair:
    """AlphaEdit, with a few earlier edits to keep."""
    sites, space = setup.lm.sites, setup.space
    width = setup.lm.description.intermediate_size
    earlier_KN = torch.randn(width, EARLIER_EDITS, generator=torch.Generator().manual_seed(0)).to(setup.device).double()
    memory = KeyMemory(ridge=L2)
    memory.absorb(space.project(earlier_KN))
    projection = space.project(torch.eye(width, dtype=torch.float64, device=setup.device))
    how = FullSpread(
        layers=setup.layers,
        optimised=(sites.layers,),
        targets=((sites.mlp_out, sites.layers),),
        share=lambda left: 1 / left,
        solve=alphaedit_solve(dict.fromkeys(setup.sites, projection), dict.fromkeys(setup.sites, earlier_KN @ earlier_KN.T), l2=L2),
    )
    return _spread_pair(setup, how, lambda _, keys: memory.solve(space.project(keys)), once=None)


LOCATING: Mapping[str, Callable[[Setup], Pair]] = {"rome": rome, "memit": memit, "alphaedit": alphaedit, "pmet": pmet}


def by_site(updates: Iterable[LowRankDelta]) -> dict[str, LowRankDelta]:
    """Return updates by the path of the map they belong to."""
    return {update.parameter.removesuffix(".weight"): update for update in updates}


def difference(ours: Outcome, plain: Outcome) -> float:
    """Return how far the two outcomes are apart, relative to the straightforward one: the worst of their parts, which are the same."""
    assert ours.keys() == plain.keys()
    return float(torch.tensor([relative(_dense(ours[name]), _dense(part)) for name, part in plain.items()]).max())


def _dense(part: Tensor | LowRankDelta) -> Tensor:
    return part.cpu() if isinstance(part, Tensor) else part.left.cpu().double() @ part.right.cpu().double()


def _spread_pair(setup: Setup, how: FullSpread, solve: Solve, *, once: float | None) -> Pair:
    lm = setup.lm
    editor = SpreadEditor(
        lm=lm,
        contexts=SPREAD_PREFIXES,
        group_sizes=(),
        layers=how.layers,
        optimised=how.optimised,
        targets=tuple(Target(edited=edited, moved=moved) for edited, moved in how.targets),
        share=how.share,
        solve=solve,
        target_settings=SPREAD_SETTINGS,
    )

    def plain(request: EditRequest) -> dict[str, Tensor]:
        rows = fact_rows(lm.tokenizer, request, SPREAD_PREFIXES)
        return full_spread(lm, [rows], how, settings=SPREAD_SETTINGS)[0]

    return Pair(ours=lambda request: by_site(editor.compute([request])[0].updates), plain=plain, once=once, goal=7.0)

"""The methods that locate, then edit, twice for `edit_speed.py`: as editeval computes them, and straight from their papers.

Both return dW (d_out, d_in), float64, by site, for one fact in the model's current state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.speed_setup import Setup, configured, prefixes, relative
from benchmarks.straightforward import full_rome
from benchmarks.straightforward_spread import FullSpread, alphaedit_solve, full_spread, memit_solve
from editeval.edits.delta import LowRankDelta
from editeval.keyvalue.graphs import StepGraphs
from editeval.keyvalue.null_space import KeyMemory
from editeval.keyvalue.objective import TargetSettings
from editeval.keyvalue.settings import LocateSettings, SpreadSettings
from editeval.keyvalue.solve import regularised_keys
from editeval.keyvalue.spread import Solve, SpreadEditor, Target
from editeval.keyvalue.target_value import fact_rows, optimise
from editeval.methods.rome import ROME, rank_one_update
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


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Where a method edits, behind which prefixes, and how it finds target values."""

    layers: tuple[int, ...]
    prefixes: tuple[str, ...]
    target: TargetSettings


def rome(setup: Setup) -> Pair:
    """ROME; the plain one solves a dense system in float64 for each edit."""
    lm, numbers = setup.lm, _rome_numbers(setup)
    (layer,) = numbers.layers
    site = lm.sites.mlp_out.format(layer)
    factor, once = setup.factor
    graphs = StepGraphs()

    def ours(request: EditRequest) -> dict[str, Tensor]:
        rows = fact_rows(lm.tokenizer, request, numbers.prefixes)
        value = optimise(lm, [rows], layer=layer, sites=[site], settings=numbers.target, graphs=graphs)[0]
        update = rank_one_update(value, site, factor=factor, key="mean")
        return {site: update.left.double()[:, None] @ update.right.double()[None]}

    def plain(request: EditRequest) -> dict[str, Tensor]:
        rows = fact_rows(lm.tokenizer, request, numbers.prefixes)
        update = full_rome(lm, rows, site=site, settings=numbers.target, covariance=setup.covariance)
        return {site: update.left.double().cpu()[:, None] @ update.right.double().cpu()[None]}

    return Pair(ours=ours, plain=plain, once=once, goal=5.0)


def memit(setup: Setup) -> Pair:
    """MEMIT: the residual stream, 1 / layers left."""
    sites, numbers = setup.lm.sites, _spread_numbers(setup, "memit")
    inverse, once = setup.inverse
    how = FullSpread(
        layers=numbers.layers,
        optimised=(sites.layers,),
        targets=((sites.mlp_out, sites.layers),),
        share=lambda left: 1 / left,
        solve=memit_solve(dict.fromkeys(_sites(setup, numbers), setup.covariance), weight=WEIGHT),
    )
    return _spread_pair(setup, how, numbers, lambda _, keys: regularised_keys(inverse, keys, weight=WEIGHT), once=once)


def pmet(setup: Setup) -> Pair:
    """PMET: the outputs of MLP and attention, 1 / sqrt(layers left), the MLP written."""
    sites, numbers = setup.lm.sites, _spread_numbers(setup, "pmet")
    inverse, once = setup.inverse
    how = FullSpread(
        layers=numbers.layers,
        optimised=(sites.mlp_out, sites.attention_out),
        targets=((sites.mlp_out, sites.mlp_out),),
        share=lambda left: left**-0.5,
        solve=memit_solve(dict.fromkeys(_sites(setup, numbers), setup.covariance), weight=WEIGHT),
    )
    return _spread_pair(setup, how, numbers, lambda _, keys: regularised_keys(inverse, keys, weight=WEIGHT), once=once)


def alphaedit(setup: Setup) -> Pair:
    """AlphaEdit, with a few earlier edits to keep."""
    sites, numbers, space = setup.lm.sites, _spread_numbers(setup, "alphaedit"), setup.space
    width = setup.lm.description.intermediate_size
    earlier_KN = torch.randn(width, EARLIER_EDITS, generator=torch.Generator().manual_seed(0)).to(setup.device).double()
    memory = KeyMemory(ridge=L2)
    memory.absorb(space.project(earlier_KN))
    paths = _sites(setup, numbers)
    projection = space.project(torch.eye(width, dtype=torch.float64, device=setup.device))
    how = FullSpread(
        layers=numbers.layers,
        optimised=(sites.layers,),
        targets=((sites.mlp_out, sites.layers),),
        share=lambda left: 1 / left,
        solve=alphaedit_solve(dict.fromkeys(paths, projection), dict.fromkeys(paths, earlier_KN @ earlier_KN.T), l2=L2),
    )
    return _spread_pair(setup, how, numbers, lambda _, keys: memory.solve(space.project(keys)), once=None)


LOCATING: Mapping[str, Callable[[Setup], Pair]] = {"rome": rome, "memit": memit, "alphaedit": alphaedit, "pmet": pmet}


def _rome_numbers(setup: Setup) -> Numbers:
    if setup.tuned is None:
        return Numbers(layers=setup.layers[-1:], prefixes=ROME_PREFIXES, target=ROME_SETTINGS)
    method = configured("rome", ROME, model=setup.tuned)
    assert method.layer is not None
    return Numbers(layers=(method.layer,), prefixes=_prefixes(method), target=method.target_settings)


def _spread_numbers(setup: Setup, name: str) -> Numbers:
    if setup.tuned is None:
        return Numbers(layers=setup.layers, prefixes=SPREAD_PREFIXES, target=SPREAD_SETTINGS)
    method = configured(name, SpreadSettings, model=setup.tuned)
    assert method.layers is not None
    return Numbers(layers=tuple(method.layers), prefixes=_prefixes(method), target=method.target_settings)


def _prefixes(method: LocateSettings) -> tuple[str, ...]:
    """As many texts of about ten and five tokens as the method would have the model write."""
    long, short = (sum(count for tokens, count in method.prefix_lengths if tokens == length) for length in (10, 5))
    assert long + short == sum(count for _, count in method.prefix_lengths)
    return prefixes(long=long, short=short)


def _sites(setup: Setup, numbers: Numbers) -> list[str]:
    return [setup.lm.sites.mlp_out.format(layer) for layer in numbers.layers]


def by_site(updates: Iterable[LowRankDelta]) -> dict[str, LowRankDelta]:
    """Return updates by the path of the map they belong to."""
    return {update.parameter.removesuffix(".weight"): update for update in updates}


def difference(ours: Outcome, plain: Outcome) -> float:
    """Return how far the two outcomes are apart, relative to the straightforward one: the worst of their parts, which are the same."""
    assert ours.keys() == plain.keys()
    return float(torch.tensor([relative(_dense(ours[name]), _dense(part)) for name, part in plain.items()]).max())


def _dense(part: Tensor | LowRankDelta) -> Tensor:
    return part.cpu() if isinstance(part, Tensor) else part.left.cpu().double() @ part.right.cpu().double()


def _spread_pair(setup: Setup, how: FullSpread, numbers: Numbers, solve: Solve, *, once: float | None) -> Pair:
    lm = setup.lm
    editor = SpreadEditor(
        lm=lm,
        contexts=numbers.prefixes,
        group_sizes=(),
        layers=how.layers,
        optimised=how.optimised,
        targets=tuple(Target(edited=edited, moved=moved) for edited, moved in how.targets),
        share=how.share,
        solve=solve,
        target_settings=numbers.target,
    )

    def plain(request: EditRequest) -> dict[str, Tensor]:
        rows = fact_rows(lm.tokenizer, request, numbers.prefixes)
        return full_spread(lm, [rows], how, settings=numbers.target)[0]

    return Pair(ours=lambda request: by_site(editor.compute([request])[0].updates), plain=plain, once=once, goal=7.0)

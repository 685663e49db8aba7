"""Seconds per edit of MEMIT, PMET and AlphaEdit, ours against straightforward ones, in one process and with the same result.

    python benchmarks/spread_speed.py --models smollm2 xl-wide --edits 3 --threads 1
    python benchmarks/spread_speed.py --models smollm2 --methods memit --edits 1

`xl-wide` has GPT-2 XL's widths and 12 layers of random weights; edited are the five layers up to a third of the depth. Both edit the same
facts from the same unedited model with the same prefixes, covariances and settings, taking turns; what is made once (factors, inverses,
projections) is timed apart. Then the part of AlphaEdit that could grow with the number of earlier edits is timed at 1 to 1,000 of them.
Prints a table, and one JSON line at the end; ends with status 1 when an update differs by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import torch
from torch import Tensor

from benchmarks.edit_speed import FACTS, FILLERS, OPENINGS, Clock, mean, random_covariance, relative, smollm2, timed, xl_wide
from benchmarks.straightforward_spread import DenseSolve, FullSpread, alphaedit_solve, full_spread, memit_solve
from editeval.keyvalue.inverse import CovarianceInverse
from editeval.keyvalue.null_space import KeyMemory, NullSpace, null_space
from editeval.keyvalue.solve import factorise, regularised_keys
from editeval.keyvalue.spread import Solve, SpreadEditor, Target
from editeval.keyvalue.target_value import TargetSettings, fact_rows
from editeval.models.model import LanguageModel
from editeval.types import EditRequest

TOLERANCE = 1e-4
SETTINGS = TargetSettings(num_steps=20, learning_rate=0.5, weight_decay=0.5, clamp_norm_factor=0.75, kl_factor=0.0625)
WEIGHT = 100.0
THRESHOLD = 0.02
L2 = 1.0
NUM_PREFIXES = 5
NUM_LAYERS = 5
EARLIER_EDITS = 3  # facts whose keys AlphaEdit must keep while it is timed


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Mean seconds an edit (wall clock and CPU), what had to be made once, and how far the two results are apart."""

    model: str
    method: str
    layers: tuple[int, ...]
    edits: int
    ours_seconds: float
    straightforward_seconds: float
    ours_cpu_seconds: float
    straightforward_cpu_seconds: float
    ours_once_seconds: float
    largest_update_difference: float

    @property
    def speedup(self) -> float:
        """Wall-clock seconds of the straightforward edit over ours."""
        return self.straightforward_seconds / self.ours_seconds

    @property
    def cpu_speedup(self) -> float:
        """The same in CPU seconds, which other processes disturb less."""
        return self.straightforward_cpu_seconds / self.ours_cpu_seconds


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model with covariances, and what our methods keep of them."""

    lm: LanguageModel
    layers: tuple[int, ...]
    covariances: Mapping[str, Tensor]
    inverses: Mapping[str, CovarianceInverse]
    spaces: Mapping[str, NullSpace]
    once: Mapping[str, Clock]

    @property
    def sites(self) -> list[str]:
        """The edited maps."""
        return [self.lm.sites.mlp_out.format(layer) for layer in self.layers]


def main(arguments: Sequence[str] | None = None) -> int:
    """Time both implementations of the chosen methods on the chosen models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--edits", type=int, default=3, help=f"facts to edit, at most {len(FACTS)}")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch; default: its own choice")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    timings = []
    for name in options.models:
        setup = prepare(MODELS[name](), alphaedit="alphaedit" in options.methods)
        for method in options.methods:
            timing = compare(setup, method, edits=options.edits)
            timings.append(timing)
            seconds = f"ours {timing.ours_seconds:.2f} s, straightforward {timing.straightforward_seconds:.2f} s an edit"
            times = f"{timing.speedup:.1f} times ({timing.cpu_speedup:.1f} by CPU time)"
            print(f"{timing.model} {method}: {seconds}, {times}; updates differ by {timing.largest_update_difference:.1e}", flush=True)
    growth = {str(count): seconds for count, seconds in memory_seconds((1, 100, 500, 1000)).items()}
    same = all(timing.largest_update_difference < TOLERANCE for timing in timings)
    records = [{**asdict(timing), "speedup": timing.speedup, "cpu_speedup": timing.cpu_speedup} for timing in timings]
    facts = {"threads": torch.get_num_threads(), "torch": torch.__version__, "tolerance": TOLERANCE, "same": same}
    print(json.dumps({**facts, "alphaedit_memory_seconds_after": growth, "timings": records}))
    return 0 if same else 1


def prepare(lm: LanguageModel, *, alphaedit: bool) -> Setup:
    """Make covariances, and once what our methods make of them."""
    last = round(lm.description.num_layers / 3)
    layers = tuple(range(max(0, last - NUM_LAYERS + 1), last + 1))
    sites = [lm.sites.mlp_out.format(layer) for layer in layers]
    covariance = random_covariance(lm.description.intermediate_size)
    covariances = dict.fromkeys(sites, covariance)  # one for all layers: what solves cost does not depend on the numbers
    inverse, inverse_clock = timed(lambda: CovarianceInverse(matrix=factorise(covariance).inverse()))
    once = {"memit": inverse_clock, "pmet": inverse_clock}
    spaces: dict[str, NullSpace] = {}
    if alphaedit:
        space, once["alphaedit"] = timed(lambda: null_space(covariance, threshold=THRESHOLD, share=0.5))
        spaces = dict.fromkeys(sites, space)
    return Setup(lm=lm, layers=layers, covariances=covariances, inverses=dict.fromkeys(sites, inverse), spaces=spaces, once=once)


def compare(setup: Setup, method: str, *, edits: int) -> Timing:
    """Edit each fact with both, in turns, from the unedited model."""
    lm = setup.lm
    contexts = ("{}", *(f"{OPENINGS[number % 5]} {FILLERS[1]}. {{}}" for number in range(NUM_PREFIXES)))
    requests = [
        EditRequest(request_id=str(number), prompt=prompt, subject=subject, target_new=target)
        for number, (prompt, subject, target) in enumerate(FACTS)
    ]
    how = METHODS[method](setup)
    editor = SpreadEditor(
        lm=lm,
        contexts=contexts,
        layers=setup.layers,
        optimised=how.optimised,
        targets=tuple(Target(edited=edited, moved=moved) for edited, moved in how.targets),
        share=how.share,
        solve=how.ours,
        target_settings=SETTINGS,
    )
    plain_how = FullSpread(layers=setup.layers, optimised=how.optimised, targets=how.targets, share=how.share, solve=how.plain)
    clocks: list[tuple[Clock, Clock]] = []
    differences: list[float] = []
    for request in requests[:edits]:
        rows = fact_rows(lm.tokenizer, request, contexts)
        (result, _), ours_clock = timed(lambda: editor.compute([request]))  # noqa: B023  (called at once)
        (expected, _), plain_clock = timed(lambda: full_spread(lm, [rows], plain_how, settings=SETTINGS))  # noqa: B023
        clocks.append((ours_clock, plain_clock))
        for update in result.updates:
            change = update.left.double() @ update.right.double()
            differences.append(relative(change, expected[update.parameter.removesuffix(".weight")]))
        print(f"  {lm.description.name} {method} {request.subject}: {ours_clock.wall:.2f} s against {plain_clock.wall:.2f} s", flush=True)
    return Timing(
        model=lm.description.name,
        method=method,
        layers=setup.layers,
        edits=len(clocks),
        ours_seconds=mean([ours.wall for ours, _ in clocks]),
        straightforward_seconds=mean([plain.wall for _, plain in clocks]),
        ours_cpu_seconds=mean([ours.cpu for ours, _ in clocks]),
        straightforward_cpu_seconds=mean([plain.cpu for _, plain in clocks]),
        ours_once_seconds=len(setup.layers) * setup.once[method].wall,
        largest_update_difference=max(differences),
    )


# -- the methods, in both forms -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class How:
    """What a method optimises and edits, and its solve in both implementations."""

    optimised: tuple[str, ...]
    targets: tuple[tuple[str, str], ...]
    share: Callable[[int], float]
    ours: Solve
    plain: DenseSolve


def memit(setup: Setup) -> How:
    """MEMIT: the residual stream, 1 / layers left."""
    sites = setup.lm.sites
    return How(
        optimised=(sites.layers,),
        targets=((sites.mlp_out, sites.layers),),
        share=lambda left: 1 / left,
        ours=lambda site, keys: regularised_keys(setup.inverses[site], keys, weight=WEIGHT),
        plain=memit_solve(setup.covariances, weight=WEIGHT),
    )


def pmet(setup: Setup) -> How:
    """PMET: the outputs of MLP and attention, 1 / sqrt(layers left), the MLP written."""
    sites = setup.lm.sites
    return How(
        optimised=(sites.mlp_out, sites.attention_out),
        targets=((sites.mlp_out, sites.mlp_out),),
        share=lambda left: left**-0.5,
        ours=lambda site, keys: regularised_keys(setup.inverses[site], keys, weight=WEIGHT),
        plain=memit_solve(setup.covariances, weight=WEIGHT),
    )


def alphaedit(setup: Setup) -> How:
    """AlphaEdit, with a few earlier edits to keep."""
    sites = setup.lm.sites
    width = setup.lm.description.intermediate_size
    earlier_KN = torch.randn(width, EARLIER_EDITS, generator=torch.Generator().manual_seed(0)).double()
    memories: dict[str, KeyMemory] = {}
    for site in setup.sites:
        memories[site] = KeyMemory(ridge=L2)
        memories[site].absorb(setup.spaces[site].project(earlier_KN))
    projection = setup.spaces[setup.sites[0]].project(torch.eye(width, dtype=torch.float64))
    moment = earlier_KN @ earlier_KN.T
    return How(
        optimised=(sites.layers,),
        targets=((sites.mlp_out, sites.layers),),
        share=lambda left: 1 / left,
        ours=lambda site, keys: memories[site].solve(setup.spaces[site].project(keys)),
        plain=alphaedit_solve(dict.fromkeys(setup.sites, projection), dict.fromkeys(setup.sites, moment), l2=L2),
    )


METHODS: Mapping[str, Callable[[Setup], How]] = {"memit": memit, "pmet": pmet, "alphaedit": alphaedit}
MODELS: Mapping[str, Callable[[], LanguageModel]] = {"smollm2": smollm2, "xl-wide": lambda: xl_wide(num_layers=12)}


def memory_seconds(counts: Sequence[int], *, width: int = 1536) -> dict[int, float]:
    """Return the seconds that one layer's solve and absorption take after so many earlier one-fact edits."""
    generator = torch.Generator().manual_seed(1)
    memory = KeyMemory(ridge=L2)
    seconds: dict[int, float] = {}
    for count in range(1, max(counts) + 1):
        key_K1 = torch.randn(width, 1, generator=generator).double()

        def step() -> None:
            memory.solve(key_K1)  # noqa: B023  (called at once)
            memory.absorb(key_K1)  # noqa: B023

        _, clock = timed(step)
        if count in counts:
            seconds[count] = clock.wall
    return seconds


if __name__ == "__main__":
    sys.exit(main())

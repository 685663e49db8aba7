"""From a grid of overrides to jobs: what shares a trajectory is one job.

The state after 10 edits lies on the way to 1,000, so `num_edits` and `benchmark` are no axes of work: their values become
the rungs and the benchmarks of one job. Every other axis makes jobs of its own.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from editeval.types import ConfigError, content_key

NUM_EDITS, BENCHMARK, LADDER = "num_edits", "benchmark", "ladder"
FOLDED = (NUM_EDITS, BENCHMARK, LADDER)

# What changes how a run is done but not the trajectory: launches that differ in these alone continue each other.
_NOT_TRAJECTORY = re.compile(r"^[+~]*(num_edits|benchmark|ladder|callback|logger|engine|hydra|sweep)(\W|$)")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One override of the command line: a key as written, and its values (one, where it is not swept)."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One launch: overrides, and the cells that it measures (every benchmark at rung 0 and at every rung).

    `overrides` do not hold `hydra.*`. Jobs of the same `trajectory` share one journal: the first leads, the others follow when
    it has ended, so that no edit is computed twice.
    """

    overrides: tuple[str, ...]
    rungs: tuple[int, ...]
    benchmarks: tuple[str, ...]
    leads: bool = True

    @cached_property
    def id(self) -> str:
        """Name of the job on disk: a hash of its overrides, so that the same sweep started again has the same jobs."""
        return job_id(self.overrides)

    @cached_property
    def trajectory(self) -> str:
        """Hash of the overrides that make the trajectory."""
        return content_key(sorted(text for text in self.overrides if not _NOT_TRAJECTORY.match(text)))[:12]

    @property
    def cells(self) -> tuple[tuple[int, str], ...]:
        """(number of edits, benchmark) of every evaluation, the unedited model's included."""
        return tuple(itertools.product(self.rungs, self.benchmarks))


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a job measures where its overrides do not say."""

    num_edits: tuple[int, ...]
    benchmarks: tuple[str, ...]


def job_id(overrides: Iterable[str]) -> str:
    """Return the name of a launch: a hash of its overrides in any order, `hydra.*` left out."""
    return content_key(sorted(text for text in overrides if not text.lstrip("+~").startswith("hydra")))[:12]


def fold(axes: Sequence[Axis], defaults_for: Callable[[Sequence[str]], Defaults]) -> tuple[Job, ...]:
    """Return one job for each combination of the axes that make trajectories, in the order of a plain sweep.

    `defaults_for(overrides)` says what the composed config measures under these overrides.

    Raises:
        ConfigError: `num_edits` is no count or list of counts, or `benchmark` no name or list of names.
    """
    named = {axis.key: axis for axis in axes}  # a key given twice: the last one counts, as in a single run
    free = [axis for key, axis in named.items() if key not in FOLDED]
    jobs: dict[str, Job] = {}
    for choice in itertools.product(*([f"{axis.key}={value}" for value in axis.values] for axis in free)):
        rungs = _rungs(named, choice, defaults_for)
        benchmarks = _benchmarks(named, choice, defaults_for)
        overrides = [*choice, f"{NUM_EDITS}=[{','.join(map(str, rungs))}]"]
        if BENCHMARK in named:
            overrides.append(f"{BENCHMARK}=[{','.join(benchmarks)}]")
        job = Job(overrides=tuple(overrides), rungs=tuple(sorted({0, *rungs})), benchmarks=benchmarks)
        jobs.setdefault(job.id, job)
    return tuple(jobs.values())


def split(jobs: Sequence[Job], max_cells: int | None) -> tuple[Job, ...]:
    """Return jobs of at most `max_cells` cells: first one for each trajectory, then those that replay its journal and measure more.

    Only benchmarks are divided: every part keeps all rungs, because what is asked of the unedited model depends on them.
    A part therefore has at least one benchmark, whatever the limit.

    Raises:
        ConfigError: `max_cells` below 1.
    """
    if max_cells is not None and max_cells < 1:
        raise ConfigError(f"hydra.sweeper.max_cells_per_job={max_cells} must be at least 1, or null for one job a trajectory")
    parts = [part for job in jobs for part in (_parts(job, max_cells) if max_cells else [job])]
    seen: set[str] = set()
    marked = []
    for part in parts:
        marked.append(replace(part, leads=part.trajectory not in seen))
        seen.add(part.trajectory)
    return tuple(sorted(marked, key=lambda job: not job.leads))


def _parts(job: Job, max_cells: int) -> list[Job]:
    width = max(1, max_cells // len(job.rungs))
    if width >= len(job.benchmarks):
        return [job]
    parts = []
    for start in range(0, len(job.benchmarks), width):
        names = job.benchmarks[start : start + width]
        left_out = tuple(f"{BENCHMARK}.{name}." for name in job.benchmarks if name not in names)  # settings of what is not there
        kept = [text for text in job.overrides if not text.startswith((f"{BENCHMARK}=", *left_out))]
        parts.append(replace(job, overrides=(*kept, f"{BENCHMARK}=[{','.join(names)}]"), benchmarks=names))
    return parts


def parse_list(text: str) -> list[str]:
    """Return the items of `a`, `[a]` or `[a,b]`, without quotes and spaces."""
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        inner = inner[1:-1]
    return [item.strip().strip("'\"") for item in inner.split(",") if item.strip()]


def _rungs(named: Mapping[str, Axis], choice: Sequence[str], defaults_for: Callable[[Sequence[str]], Defaults]) -> tuple[int, ...]:
    if NUM_EDITS in named:
        rungs = {_count(item) for value in named[NUM_EDITS].values for item in parse_list(value)}
    elif LADDER in named:
        rungs = {rung for ladder in named[LADDER].values for rung in defaults_for([*choice, f"{LADDER}={ladder}"]).num_edits}
    else:
        rungs = set(defaults_for(choice).num_edits)
    return tuple(sorted(rungs))


def _benchmarks(named: Mapping[str, Axis], choice: Sequence[str], defaults_for: Callable[[Sequence[str]], Defaults]) -> tuple[str, ...]:
    if BENCHMARK not in named:
        return defaults_for(choice).benchmarks
    names = dict.fromkeys(item for value in named[BENCHMARK].values for item in parse_list(value))
    if not names:
        raise ConfigError("benchmark is empty, so nothing would be measured; choose some, such as benchmark=edit-quality,quick")
    return tuple(names)


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise ConfigError(f"num_edits: {text!r} is no number of edits; write num_edits=1,10,100 or num_edits=[1,10,100]")
    return value


def counts_of(value: Any) -> tuple[int, ...]:
    """Return `num_edits` of a composed config as a tuple.

    Raises:
        ConfigError: not a count or a list of counts.
    """
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_count(str(item)) for item in items)

"""One `python launch.py -m`: the plan, what of it is left to do, its record on disk, how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.table import Table

from editeval.sweep import records
from editeval.sweep.estimate import Estimate, Work, read_history
from editeval.sweep.plan import Job
from editeval.sweep.records import DONE, FAILED, RUNNING, PlannedJob, SweepRecord
from editeval.sweep.show import make_console, reason_text, shown_overrides
from editeval.sweep.source import program_digest
from editeval.sweep.status import QUEUED, JobStatus, RunFolder, counts
from editeval.types import ConfigError, counted

SHOWN_JOBS = 40
SHOWN_FAILURES = 10
SHOWN_UNKNOWN = 6


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """What a job was submitted as: its name in the queue (None where there is none), and where it prints."""

    queue_id: str | None
    log: str | None


@dataclass(kw_only=True)
class Session:
    """A sweep as this process sees it."""

    runs: Path
    jobs: tuple[Job, ...]
    record: SweepRecord
    to_launch: tuple[Job, ...]
    found: Mapping[str, JobStatus]
    console: Console = field(default_factory=make_console)
    sleep: Callable[[float], None] = time.sleep
    _launched: int = 0

    @classmethod
    def begin(
        cls,
        runs: Path,
        jobs: Sequence[Job],
        *,
        command: Sequence[str],
        only: Collection[str] | None = None,
        skip_done: bool = True,
        queue: Mapping[str, str] | None = None,
    ) -> Self:
        """Look what is there and decide what to launch.

        Raises:
            ConfigError: `only` names a job that this sweep does not have.
        """
        folder = RunFolder(runs, queue=queue)
        name = records.sweep_id(jobs)
        earlier: dict[str, PlannedJob] = {}
        if name in records.sweeps(runs):
            earlier = {job.job: job for job in records.read_sweep(runs, name).jobs}
        planned = tuple(
            replace(
                earlier.get(job.id) or PlannedJob(job=job.id, overrides=job.overrides, rungs=job.rungs, benchmarks=job.benchmarks),
                overrides=job.overrides,
            )
            for job in jobs
        )
        unknown = set(only or ()) - {job.id for job in jobs}
        if unknown:
            raise ConfigError(f"hydra.sweeper.only names {', '.join(sorted(unknown))}, which this sweep does not have; see its plan")
        found = {job.job: folder.planned(job) for job in planned}
        code = program_digest()

        def wanted(job: Job) -> bool:
            if only is not None and job.id not in only:
                return False
            state = found[job.id].state
            record = folder.records.get(job.id)
            finished = state == DONE and record is not None and record.code == code and record.state == records.DONE
            return not (skip_done and (finished or state in (RUNNING, QUEUED)))

        record = SweepRecord(
            sweep=name,
            command=tuple(text for text in command if not text.startswith("hydra.sweeper.only=")),
            folder=str(Path.cwd()),
            made_at=records.now(),
            jobs=planned,
        )
        return cls(runs=runs, jobs=tuple(jobs), record=record, to_launch=tuple(filter(wanted, jobs)), found=found)

    @property
    def status_command(self) -> str:
        """The command that tells how this sweep is doing."""
        return f"python -m editeval status {self.runs} --sweep {self.record.sweep}"

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    # -- the plan --------------------------------------------------------------------------------------------------

    def show_plan(self, names: Mapping[str, tuple[str, str]]) -> None:
        """Print jobs, edits, evaluations, what is in the store, and the predicted time; `names` are (model, method) by job."""
        launching = {job.id for job in self.to_launch}
        cells, stored = self._numbers()
        edits = sum(job.rungs[-1] for job in self.jobs if job.leads)
        have = sum(min(job.rungs[-1], self.found[job.id].num_edits) for job in self.jobs if job.leads)
        self.say(
            f"sweep {self.record.sweep}: {counted(len(self.jobs), 'job')}, {counted(edits, 'edit')}, {counted(cells, 'evaluation')}; "
            f"in the store: {counted(have, 'edit')}, {counted(stored, 'evaluation')}; to launch: {counted(len(launching), 'job')}"
        )
        estimate = read_history(self.runs).estimate(self._work(job, names[job.id]) for job in self.to_launch)
        self.say(f"  predicted from earlier runs here: {_estimate_text(estimate)}")
        if len(self.jobs) > SHOWN_JOBS:
            return
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in ("job", "rungs", "benchmarks", "state", "overrides"):
            table.add_column(column, overflow="fold")
        for job in self.jobs:
            state = "to launch" if job.id in launching else self.found[job.id].state
            table.add_row(job.id, ",".join(map(str, job.rungs)), ",".join(job.benchmarks), state, shown_overrides(job.overrides))
        self.console.print(table)

    def _numbers(self) -> tuple[int, int]:
        return sum(len(job.cells) for job in self.jobs), sum(len(self.found[job.id].measured) for job in self.jobs)

    def _work(self, job: Job, names: tuple[str, str]) -> Work:
        status = self.found[job.id]
        left = status.wanted - status.measured
        model, method = names
        return Work(
            model=model,
            method=method,
            edits=max(0, job.rungs[-1] - status.num_edits) if job.leads else 0,
            evaluations={name: sum(benchmark == name for _, benchmark in left) for name in job.benchmarks},
        )

    # -- launching -------------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """Write the sweep's record, so that `status` and `retry` know it even if this process dies now."""
        records.write_sweep(self.runs, self.record)

    def next_index(self, number: int) -> int:
        """Return the number of the next job, and count `number` jobs as launched."""
        first, self._launched = self._launched, self._launched + number
        return first

    def submitted(self, jobs: Sequence[Job], tickets: Sequence[Ticket]) -> None:
        """Note what jobs were submitted as."""
        given = {job.id: ticket for job, ticket in zip(jobs, tickets, strict=True)}
        changed = tuple(
            replace(job, queue_id=given[job.job].queue_id, log=given[job.job].log) if job.job in given else job for job in self.record.jobs
        )
        self.record = replace(self.record, jobs=changed)
        self.keep()

    def wait(self, jobs: Sequence[Job], poll_seconds: float) -> None:
        """Return when none of these jobs is running or queued any more."""
        mine = {job.id for job in jobs}
        while True:
            folder = RunFolder(self.runs)
            states = [folder.planned(job).state for job in self.record.jobs if job.job in mine]
            if not any(state in (RUNNING, QUEUED) for state in states):
                return
            self.sleep(poll_seconds)

    def finish(self) -> tuple[JobStatus, ...]:
        """Print how the sweep ended, why jobs failed and what starts them again; return the state of its jobs."""
        found = RunFolder(self.runs).sweep(self.record.sweep)
        self.say(f"sweep {self.record.sweep}: {counts(found)}; {self.status_command}")
        failed = [status for status in found if status.state == FAILED]
        for status in failed[:SHOWN_FAILURES]:
            self.say(reason_text(status))
        if failed:
            more = f"and {len(failed) - SHOWN_FAILURES} more failed; " if len(failed) > SHOWN_FAILURES else ""
            self.say(f"{more}start them again: python -m editeval retry {self.runs} --sweep {self.record.sweep}")
        return found


def _estimate_text(estimate: Estimate) -> str:
    if not estimate.seconds and estimate.unknown:
        return f"nothing, because none did {_listed(estimate.unknown)}"
    duration = f"{estimate.seconds / 3600:.1f} h" if estimate.seconds >= 3600 else f"{estimate.seconds / 60:.1f} min"
    known = f"{duration} of computing, {estimate.num_bytes / 1e6:.1f} MB of edits"
    return f"{known}; not known yet, and left out: {_listed(estimate.unknown)}" if estimate.unknown else known


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_UNKNOWN} more" if len(names) > SHOWN_UNKNOWN else ""
    return ", ".join(names[:SHOWN_UNKNOWN]) + more

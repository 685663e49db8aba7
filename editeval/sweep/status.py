"""How far every job is: read from the scores on disk, the records of launches and the queue; never from return values."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from editeval.runner.results import ScoreStore
from editeval.runner.run_files import MANIFEST_FILE, read_collapse, read_manifest
from editeval.sweep import records
from editeval.sweep.plan import BENCHMARK, NUM_EDITS, counts_of, job_id
from editeval.sweep.records import DONE, FAILED, RUNNING, STOPPED, JobRecord, PlannedJob
from editeval.types import EditevalError

QUEUED, MISSING = "queued", "missing"  # beside what a record says of its launch
STATES = (FAILED, MISSING, RUNNING, QUEUED, STOPPED, DONE)
LOG_TAIL_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """Where one job is. `wanted` and `measured` are (number of edits, benchmark); `reason` is why it failed or stopped."""

    job: str
    overrides: tuple[str, ...]
    state: str
    wanted: frozenset[tuple[int, str]]
    measured: frozenset[tuple[int, str]]
    num_edits: int = 0
    run_dir: str | None = None
    queue_id: str | None = None
    reason: str | None = None
    log: str | None = None

    @property
    def missing_rungs(self) -> tuple[int, ...]:
        """Rungs at which a benchmark is not measured."""
        return tuple(sorted({rung for rung, _ in self.wanted - self.measured}))


class RunFolder:
    """The runs, records and sweeps under `paths.runs`, each read once."""

    def __init__(self, runs: Path, *, queue: Mapping[str, str] | None = None) -> None:
        self.runs = runs
        self._asked_queue = queue
        self._cells: dict[str, frozenset[tuple[int, str]]] = {}

    @cached_property
    def records(self) -> dict[str, JobRecord]:
        """The last launch of every job, by job."""
        return records.read_jobs(self.runs)

    @cached_property
    def queue(self) -> Mapping[str, str]:
        """State of every Slurm job of this user by id; empty without Slurm."""
        return slurm_queue() if self._asked_queue is None else self._asked_queue

    def cells(self, run_dir: str) -> frozenset[tuple[int, str]]:
        """Return (number of edits, benchmark) of every whole cell of a run, by the name of its folder."""
        if run_dir not in self._cells:
            scores = ScoreStore(self.runs / run_dir).scores()
            self._cells[run_dir] = frozenset((score.num_edits, score.benchmark) for score in scores)
        return self._cells[run_dir]

    def sweep(self, name: str) -> tuple[JobStatus, ...]:
        """Return the state of every job of a sweep, in its order."""
        return tuple(self.planned(job) for job in records.read_sweep(self.runs, name).jobs)

    def planned(self, job: PlannedJob) -> JobStatus:
        """Return the state of a planned job."""
        wanted = frozenset((rung, name) for rung in job.rungs for name in job.benchmarks)
        return self._status(job.job, job.overrides, wanted, self.records.get(job.job), job.queue_id, job.log)

    def others(self, known: Iterable[str]) -> tuple[JobStatus, ...]:
        """Return the state of every run that belongs to none of the `known` jobs: single launches, and runs without a record."""
        seen = set(known)
        theirs = {record.run_dir for job, record in self.records.items() if job in seen}
        found = []
        for record in self.records.values():
            if record.job not in seen:
                wanted = frozenset((rung, name) for rung in record.rungs for name in record.benchmarks)
                found.append(self._status(record.job, record.overrides, wanted, record, None, None))
        theirs |= {record.run_dir for record in self.records.values()}
        unrecorded = (path.parent for path in sorted(self.runs.glob(f"*/{MANIFEST_FILE}")) if path.parent.name not in theirs)
        return (*found, *(self._unrecorded(folder) for folder in unrecorded))

    def _unrecorded(self, folder: Path) -> JobStatus:
        config = read_manifest(folder)["config"]
        rungs = {0, *counts_of(config[NUM_EDITS])}
        wanted = frozenset((rung, name) for rung in rungs for name in config[BENCHMARK])
        measured = wanted & self.cells(folder.name)
        return JobStatus(
            job=job_id([folder.name]),
            overrides=(),
            state=DONE if measured == wanted else MISSING,
            wanted=wanted,
            measured=measured,
            num_edits=max((rung for rung, _ in measured), default=0),
            run_dir=folder.name,
        )

    def _status(
        self,
        job: str,
        overrides: tuple[str, ...],
        wanted: frozenset[tuple[int, str]],
        record: JobRecord | None,
        queue_id: str | None,
        log: str | None,
    ) -> JobStatus:
        measured = wanted & self.cells(record.run_dir) if record is not None and record.run_dir else frozenset()
        queue_id = self._newest(queue_id, record)
        state, reason = self._state(wanted, measured, record, queue_id)
        log = record.log if record is not None and record.log and record.queue_id == queue_id else log
        if state == DONE and record is not None and record.run_dir:
            collapse = read_collapse(self.runs / record.run_dir)
            reason = None if collapse is None else f"collapsed: {collapse['reason']}"
        if state == FAILED and reason is None:
            reason = last_line(log) or "ended without a word; its process is gone"
        return JobStatus(
            job=job,
            overrides=overrides,
            state=state,
            wanted=wanted,
            measured=measured,
            num_edits=max([record.num_edits if record else 0, *(rung for rung, _ in measured)]),
            run_dir=record.run_dir if record else None,
            queue_id=queue_id,
            reason=reason,
            log=log,
        )

    @staticmethod
    def _newest(queue_id: str | None, record: JobRecord | None) -> str | None:
        """Return the Slurm job to ask for: as submitted last, else as it ran last."""
        return queue_id or (record.queue_id if record is not None else None)

    def _state(
        self,
        wanted: frozenset[tuple[int, str]],
        measured: frozenset[tuple[int, str]],
        record: JobRecord | None,
        queue_id: str | None,
    ) -> tuple[str, str | None]:
        if wanted and measured == wanted:
            return DONE, None
        queued = self.queue.get(queue_id) if queue_id else None
        if queued is not None:
            return (RUNNING if queued in ("RUNNING", "COMPLETING") else QUEUED), None
        if record is None:
            return (FAILED, None) if queue_id else (MISSING, None)  # submitted, never started, and no longer in the queue
        if record.state == STOPPED:
            return STOPPED, record.stopped
        if record.state == RUNNING and record.queue_id is None and record.process.alive() is not False:
            return RUNNING, None
        if record.state == DONE and record.run_dir is None:
            return DONE, None  # prepare_only: there was nothing to measure
        if record.state == DONE:
            return MISSING, "the launch that is recorded measured less"
        return FAILED, record.error


def slurm_queue(*, timeout_seconds: float = 20.0) -> dict[str, str]:
    """Return the state of every Slurm job of this user that has not ended, by id (`12_3` for an array's task); empty without Slurm.

    Raises:
        EditevalError: Slurm is there but does not answer: running jobs would look failed.
    """
    command = ["squeue", "--me", "--array", "--noheader", "--format=%i|%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=timeout_seconds)
    except FileNotFoundError:
        return {}
    except (OSError, subprocess.SubprocessError) as error:
        raise EditevalError(f"{' '.join(command)} does not answer ({error}); try again when Slurm is back, or use --no-queue") from error
    pairs = (line.split("|") for line in done.stdout.splitlines() if "|" in line)
    ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
    return {name: state for name, state in pairs if state not in ended}


def last_line(log: str | None) -> str | None:
    """Return the last line of a log that says something, or None."""
    if log is None:
        return None
    try:
        with Path(log).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - LOG_TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    return next((line.strip() for line in reversed(lines) if line.strip()), None)


def counts(found: Sequence[JobStatus]) -> str:
    """Return how many jobs are in which state, as one line."""
    number = Counter(status.state for status in found)
    return ", ".join(f"{number[state]} {state}" for state in reversed(STATES) if number[state]) or "no jobs"


def unfinished(found: Sequence[JobStatus]) -> tuple[str, ...]:
    """Return the jobs that a retry starts again: failed or never started."""
    return tuple(status.job for status in found if status.state in (FAILED, MISSING))

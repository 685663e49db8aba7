"""What launches and sweeps leave on disk beside the runs: `<paths.runs>/.jobs/<job>.json` and `.sweeps/<sweep>.json`.

A record says who is (or was) at work on what; it is for people and for `status`. What was measured is read from `scores.jsonl` alone.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from editeval.files import write_atomic
from editeval.sweep.plan import Job
from editeval.types import EditevalError, content_key

JOBS, SWEEPS = ".jobs", ".sweeps"

RUNNING, DONE, STOPPED, FAILED, INTERRUPTED = "running", "done", "stopped", "failed", "interrupted"


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process on a machine; `started` (clock ticks after boot, 0 where unknown) tells it from a later one of the same id."""

    machine: str
    pid: int
    started: int

    @classmethod
    def current(cls) -> Process:
        """Return this process."""
        pid = os.getpid()
        return cls(machine=platform.node(), pid=pid, started=_started(pid) or 0)

    def alive(self) -> bool | None:
        """Whether it still runs; None where that cannot be known from this machine."""
        if self.machine != platform.node():
            return None
        started = _started(self.pid)
        return started is not None and self.started in (0, started)


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """The last launch of a job, as it last said of itself.

    `queue_id` is the Slurm job (with its array index) that it ran as; `log` the file with what it printed; `stopped` why a trajectory
    ended before its last rung; `run_dir` the name of the run's folder beside `.jobs`; `error` the last line of the error that ended it.
    """

    job: str
    overrides: tuple[str, ...]
    code: str
    state: str
    process: Process
    started_at: str
    updated_at: str
    launches: int = 1
    queue_id: str | None = None
    log: str | None = None
    run_dir: str | None = None
    edit_key: str | None = None
    rungs: tuple[int, ...] = ()
    benchmarks: tuple[str, ...] = ()
    num_edits: int = 0
    stopped: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """A job as a sweep planned it, and as what it was last submitted."""

    job: str
    overrides: tuple[str, ...]
    rungs: tuple[int, ...]
    benchmarks: tuple[str, ...]
    queue_id: str | None = None
    log: str | None = None


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """A sweep: the command that made it, where, and its jobs in order."""

    sweep: str
    command: tuple[str, ...]
    folder: str
    made_at: str
    jobs: tuple[PlannedJob, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def sweep_id(jobs: Sequence[Job]) -> str:
    """Return the name of a sweep: a hash of its jobs."""
    return content_key(sorted(job.id for job in jobs))[:8]


def write_job(runs: Path, record: JobRecord) -> None:
    """Replace the record of a job, whole or not at all."""
    write_atomic(runs / JOBS / f"{record.job}.json", json.dumps(asdict(record), ensure_ascii=False))


def read_job(runs: Path, job: str) -> JobRecord | None:
    """Return a job's record, or None where it never started (or its record cannot be read)."""
    path = runs / JOBS / f"{job}.json"
    try:
        row = json.loads(path.read_bytes())
        lists = {name: tuple(row[name]) for name in ("overrides", "rungs", "benchmarks")}
        return JobRecord(**{**_known(JobRecord, row), **lists, "process": Process(**row["process"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None  # a record is for people: without it the job counts as never started, and its scores still count


def read_jobs(runs: Path) -> dict[str, JobRecord]:
    """Return the records of every job that ever started here, by name."""
    found = (read_job(runs, path.stem) for path in sorted((runs / JOBS).glob("*.json")))
    return {record.job: record for record in found if record is not None}


def write_sweep(runs: Path, record: SweepRecord) -> Path:
    """Replace a sweep's record, whole or not at all; return its path."""
    path = runs / SWEEPS / f"{record.sweep}.json"
    write_atomic(path, json.dumps(asdict(record), ensure_ascii=False))
    return path


def read_sweep(runs: Path, sweep: str) -> SweepRecord:
    """Return a sweep's record.

    Raises:
        EditevalError: there is none, or it is no JSON.
    """
    path = runs / SWEEPS / f"{sweep}.json"
    try:
        row = json.loads(path.read_bytes())
        jobs = tuple(
            PlannedJob(
                **{
                    **_known(PlannedJob, job),
                    "overrides": tuple(job["overrides"]),
                    "rungs": tuple(job["rungs"]),
                    "benchmarks": tuple(job["benchmarks"]),
                }
            )
            for job in row["jobs"]
        )
        return SweepRecord(**{**_known(SweepRecord, row), "jobs": jobs, "command": tuple(row["command"])})
    except FileNotFoundError as error:
        known = ", ".join(sorted(found.stem for found in (runs / SWEEPS).glob("*.json"))) or "none"
        raise EditevalError(f"no sweep {sweep} in {runs}; known: {known}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise EditevalError(f"{path} cannot be read ({error}); start the sweep's command again, which writes it anew") from error


def sweeps(runs: Path) -> tuple[str, ...]:
    """Return the names of the sweeps in a folder, the newest last."""
    found = sorted((runs / SWEEPS).glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    return tuple(path.stem for path in found)


def _known(kind: type[Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that this version knows: a record of a later one can still be listed."""
    names = {item.name for item in fields(kind)}
    return {name: value for name, value in row.items() if name in names}


def _started(pid: int) -> int | None:
    """Return when a process of this machine started, in clock ticks after boot; None when there is none (or only a zombie)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return None
    except OSError:
        return 0
    state, *rest = text.rpartition(")")[2].split()  # the command before it may hold spaces and parentheses
    return None if state in "ZX" else int(rest[18])

"""Keeps the record of a launch up to date while it runs."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from editeval.inference.edited import EditedModel
from editeval.interfaces import Callback, EditEvent, RunState
from editeval.sweep.plan import job_id
from editeval.sweep.records import DONE, FAILED, INTERRUPTED, RUNNING, STOPPED, JobRecord, Process, now, read_job, write_job
from editeval.sweep.source import program_digest
from editeval.types import EditevalError, Score

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class JobWatch(Callback):
    """Writes `.jobs/<job>.json` at the start, at every rung and at the end; never costs a run anything but that file.

    Example:
        >>> with watching(runs, overrides) as watch:   # doctest: +SKIP
        ...     run(config, watch)
    """

    def __init__(self, runs: Path, overrides: Sequence[str]) -> None:
        own = tuple(text for text in overrides if not text.lstrip("+~").startswith("hydra"))
        job = job_id(own)
        before = read_job(runs, job)
        started = now()
        self._runs = runs
        self._record = JobRecord(
            job=job,
            overrides=own,
            code=program_digest(),
            state=RUNNING,
            process=Process.current(),
            started_at=started,
            updated_at=started,
            launches=1 if before is None else before.launches + 1,
            queue_id=queue_id(),
            log=_log_file(),
        )
        self._keep(RUNNING)

    def on_run_start(self, state: RunState) -> None:
        """Say where the run is."""
        benchmarks = tuple(state.config.get("benchmark") or ())
        self._keep(RUNNING, run_dir=Path(state.run_dir).name, edit_key=state.edit_key, rungs=state.rungs, benchmarks=benchmarks)

    def on_edit_end(self, state: RunState, event: EditEvent, model: EditedModel) -> str | None:
        """Count the edit; written down at the next evaluation."""
        self._record = replace(self._record, num_edits=event.num_edits)
        return None

    def on_evaluation_start(self, state: RunState, benchmark: str) -> None:
        """Say how far the run is."""
        self._keep(RUNNING, num_edits=state.num_edits)

    def on_run_end(self, state: RunState, scores: Sequence[Score]) -> None:
        """Say that it is done, or why it stopped before its last rung."""
        reached = max((score.num_edits for score in scores), default=0)
        stopped = reached < state.rungs[-1]
        self._keep(STOPPED if stopped else DONE, stopped=state.stopped if stopped else None)

    def ended(self) -> None:
        """Say that it is done, where no run has said how it ended (there was none: `prepare_only`)."""
        if self._record.state == RUNNING:
            self._keep(DONE)

    def ended_by(self, error: BaseException) -> None:
        """Say what ended it: an error of its own, or a signal and the like."""
        lines = str(error).strip().splitlines()
        text = f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
        self._keep(FAILED if isinstance(error, Exception) else INTERRUPTED, error=text)

    def _keep(self, state: str, **changes: object) -> None:
        self._record = replace(self._record, state=state, updated_at=now(), **changes)  # type: ignore[arg-type]
        with suppress(OSError):  # a full disk must not end a run that could still finish
            write_job(self._runs, self._record)


@contextmanager
def watching(runs: Path, overrides: Sequence[str]) -> Iterator[JobWatch]:
    """Yield the watch of this launch; whatever ends it is noted and goes on.

    Raises:
        EditevalError: there was no room for the results, or the file system turned read-only; what was written stays.
    """
    watch = JobWatch(runs, overrides)
    try:
        yield watch
        watch.ended()
    except OSError as error:
        watch.ended_by(error)
        if error.errno not in NO_ROOM:
            raise
        raise EditevalError(
            f"cannot write results any more in {runs}: {error.strerror}; make room and start the same command again, which continues"
        ) from error
    except BaseException as error:
        watch.ended_by(error)
        raise


def queue_id() -> str | None:
    """Return this process's Slurm job, as squeue writes it: `12_3` for task 3 of array 12."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _log_file() -> str | None:
    """Return the file that standard error goes to, or None where it is a terminal or a pipe."""
    try:
        path = Path(f"/proc/self/fd/{sys.stderr.fileno()}").readlink()
    except (OSError, ValueError, AttributeError):
        return None
    return str(path) if path.is_absolute() and path.is_file() else None

"""`python -m editeval status` and `retry`: what people see of the runs in a folder, and starting again what is left."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from editeval.sweep import records
from editeval.sweep.records import DONE
from editeval.sweep.status import STATES, JobStatus, RunFolder, counts, unfinished
from editeval.types import EditevalError

SHOWN_ROWS = 50
LOG_WIDTH = 160  # characters a line where the width of the output is not known
_HOW_TO_RUN = re.compile(r"^[+~]*(paths|callback|logger|hydra|num_edits|benchmark)(\W|$)")


def show_status(runs: Path, *, sweep: str | None = None, everything: bool = False, use_queue: bool = True) -> tuple[JobStatus, ...]:
    """Print the state of a sweep, or of every sweep and run of a folder; return the states that were printed about.

    Where there are many jobs only those that are not done get a line, unless `everything`.

    Raises:
        EditevalError: no runs there, no such sweep, or Slurm does not answer.
    """
    folder = RunFolder(runs, queue=None if use_queue else {})
    console = make_console()
    names = (sweep,) if sweep is not None else records.sweeps(runs)
    found: list[JobStatus] = []
    seen: set[str] = set()
    for name in names:
        jobs = folder.sweep(name)
        _print(console, f"sweep {name}: {counts(jobs)}", jobs, everything)
        found += [job for job in jobs if job.job not in seen]
        seen |= {job.job for job in jobs}
    if sweep is None:
        others = folder.others(seen)
        if others:
            _print(console, f"{'other ' if names else ''}runs in {runs}: {counts(others)}", others, everything)
        found += others
    if not found:
        raise EditevalError(f"{runs} holds no runs; run `python launch.py` first, or name the folder of paths.runs")
    return tuple(found)


def retry(runs: Path, *, sweep: str | None = None, more: Sequence[str] = (), use_queue: bool = True) -> int:
    """Start the failed and the missing jobs of a sweep (default: the newest) again, by the command that made it; return its exit status.

    `more` are overrides to add, such as hydra.launcher.timeout_min=600.

    Raises:
        EditevalError: no sweep there.
    """
    known = records.sweeps(runs)
    if not known:
        raise EditevalError(f"{runs} holds no sweep; sweeps are made by `python launch.py -m ...`")
    record = records.read_sweep(runs, sweep or known[-1])
    found = RunFolder(runs, queue=None if use_queue else {}).sweep(record.sweep)
    left = unfinished(found)
    make_console().print(f"sweep {record.sweep}: {counts(found)}; starting {len(left)} again", highlight=False, soft_wrap=True)
    if not left:
        return 0
    command = [sys.executable, *_with_overrides(record.command, [only_override(left), *more])]
    return subprocess.run(command, cwd=record.folder, check=False).returncode


def _with_overrides(command: Sequence[str], more: Sequence[str]) -> list[str]:
    """Return a command with overrides put beside those that it has: Hydra wants them all together."""
    last = max((index for index, text in enumerate(command) if "=" in text and not text.startswith("-")), default=len(command) - 1)
    return [*command[: last + 1], *more, *command[last + 1 :]]


def make_console() -> Console:
    """Return a console that does not squeeze tables into 80 columns where nobody's terminal says so."""
    console = Console()
    return console if console.is_terminal else Console(width=LOG_WIDTH)


def shown_overrides(overrides: Sequence[str]) -> str:
    """Return the overrides that tell one job from another."""
    return " ".join(text for text in overrides if not _HOW_TO_RUN.match(text)) or "(defaults)"


def _print(console: Console, title: str, jobs: Sequence[JobStatus], everything: bool) -> None:
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    rows = [job for job in jobs if everything or len(jobs) <= SHOWN_ROWS or job.state != DONE]
    shown = sorted(rows, key=lambda job: STATES.index(job.state))[: None if everything else SHOWN_ROWS]
    if not shown:
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("state", "job", "edits", "evaluations", "run"):
        table.add_column(column, overflow="fold", justify="right" if column in ("edits", "evaluations") else "left")
    for job in shown:
        where = f"{job.run_dir or ''} {shown_overrides(job.overrides) if job.overrides else ''}".strip()
        table.add_row(job.state, job.job, str(job.num_edits), f"{len(job.measured)}/{len(job.wanted)}", where)
    console.print(table)
    for job in shown:
        if job.reason is not None:
            console.print(reason_text(job), markup=False, highlight=False, soft_wrap=True)
    if len(rows) > len(shown):
        console.print(f"  and {len(rows) - len(shown)} more; --all shows them", markup=False, highlight=False)


def reason_text(job: JobStatus) -> str:
    """Return why a job is in its state, and where it is logged."""
    log = f" [{job.log}]" if job.log and job.state != DONE else ""
    return f"  {job.job} {job.state}: {job.reason}{log}"


def only_override(jobs: Iterable[str]) -> str:
    """Return the override that limits a sweep to these jobs; quoted, because Hydra takes a name such as 12e4 for a number."""
    names = ",".join(f"'{job}'" for job in jobs)
    return f"hydra.sweeper.only=[{names}]"

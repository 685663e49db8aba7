"""What watches a run: a watchdog, timings, and a log with one row an edit. (Live progress is in `progress.py`.)

Nothing here changes a number. Settings come from `conf/callback/`.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from editeval.files import append_jsonl
from editeval.inference.edited import EditedModel
from editeval.interfaces import Callback, EditEvent, RunState
from editeval.runner.progress import seconds_text
from editeval.runner.run_files import TIMINGS_FILE, append_edit, read_edits, write_collapse
from editeval.runner.signs import Canary, weight_norm_ratio
from editeval.types import EditRequest, Score

# -- watchdog --------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Watchdog(Callback):
    """Notices when a model collapses: writes it down, and ends the trajectory there.

    Non-finite weights always end it: nothing can be measured any more. The limits are off (None) by default, because how
    a model degrades is what is measured: `max_norm_ratio` bounds ||W|| / ||W_base|| of every edited matrix,
    `max_canary_ratio` the perplexity of a few plain sentences relative to the unedited model's. Beyond a limit
    `on_collapse=skip` edits and measures no further, `continue` goes on; either way `collapse.json` names the edit. Looks at
    every `every`-th edit and at every rung.

    Raises:
        ValueError: `every` below 1, a limit that the unedited model would break, or an unknown `on_collapse`.
    """

    every: int = 1
    max_norm_ratio: float | None = None
    max_canary_ratio: float | None = None
    on_collapse: Literal["skip", "continue"] = "skip"
    _canary: Canary = field(default_factory=Canary, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every} must be at least 1 (look after every edit)")
        for name in ("max_norm_ratio", "max_canary_ratio"):
            limit = getattr(self, name)
            if limit is not None and not limit > 1:
                raise ValueError(f"{name}={limit} must be above 1, the unedited model's own ratio; or null for no limit")
        if self.on_collapse not in ("skip", "continue"):
            raise ValueError(f"on_collapse={self.on_collapse!r} is not one of skip, continue")

    def on_run_start(self, state: RunState) -> None:
        """Forget the model of the run before."""
        self._canary = Canary()

    def on_edit_end(self, state: RunState, event: EditEvent, model: EditedModel) -> str | None:
        """Return what is broken, or None."""
        if event.num_edits % self.every and event.num_edits not in state.rungs:
            return None
        what = self.what_is_broken(model)
        if what is None:
            return None
        reason = f"edit {event.step} {what}"
        write_collapse(state.run_dir, step=event.step, digest=event.digest, request_ids=event.request_ids, reason=reason)
        return reason if self.on_collapse == "skip" or not _finite(model) else None

    def what_is_broken(self, model: EditedModel) -> str | None:
        """Return what is wrong with the model as it is, as the end of a sentence about the edit that did it, or None."""
        broken = [name for name in model.edited_parameters if not bool(torch.isfinite(model.weight(name)).all())]
        if broken:
            return f"left non-finite weights in {', '.join(broken)}"
        if self.max_norm_ratio is not None:
            ratio = weight_norm_ratio(model)
            if not ratio <= self.max_norm_ratio:
                return f"brought a norm to {ratio:.3g} times the unedited weight's (max_norm_ratio={self.max_norm_ratio:g})"
        limit = self.max_canary_ratio
        if limit is None or (ratio := self._canary.ratio(model)) <= limit:
            return None
        return f"brought plain sentences to {ratio:.3g} times the unedited perplexity (max_canary_ratio={limit:g})"


def _finite(model: EditedModel) -> bool:
    return all(bool(torch.isfinite(model.weight(name)).all()) for name in model.edited_parameters)


# -- timing ----------------------------------------------------------------------------------------------------------------


def peak_memory_bytes() -> int:
    """Return the most memory that was in use at once: on GPUs where there are any (of this process), else the process's resident set."""
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024  # Linux counts in KiB


@dataclass(kw_only=True)
class Timing(Callback):
    """Says at the end what took how long, and keeps it, with the peak of memory, in `timings.jsonl`: one row a launch."""

    console: Console | None = None
    clock: Callable[[], float] = time.perf_counter
    seconds: dict[str, float] = field(default_factory=dict, init=False)
    _made: float = field(default=0.0, init=False, repr=False)
    _edit_started: float = field(default=0.0, init=False, repr=False)
    _evaluation_started: float = field(default=0.0, init=False, repr=False)

    BEFORE = "before the run (choosing facts)"
    COMPUTE = "computing edits"
    APPLY = "preparing the method, journal, applying"
    REPLAY = "replaying edits from the journal"
    OTHER = "loading the model, everything else"

    def __post_init__(self) -> None:
        self._made = self.clock()

    def on_run_start(self, state: RunState) -> None:
        """Count what was done since the callback was made."""
        self.seconds = {self.BEFORE: self.clock() - self._made}

    def on_edit_start(self, state: RunState, requests: Sequence[EditRequest]) -> None:
        """Start the edit's clock."""
        self._edit_started = self.clock()

    def on_edit_end(self, state: RunState, event: EditEvent, model: EditedModel) -> str | None:
        """Stop the edit's clock."""
        elapsed = self.clock() - self._edit_started
        if event.replayed:
            self._add(self.REPLAY, elapsed)
        else:
            computing = min(event.seconds, elapsed)
            self._add(self.COMPUTE, computing)
            self._add(self.APPLY, elapsed - computing)
        return None

    def on_evaluation_start(self, state: RunState, benchmark: str) -> None:
        """Start the benchmark's clock."""
        self._evaluation_started = self.clock()

    def on_evaluation_end(self, state: RunState, benchmark: str, scores: Sequence[Score]) -> None:
        """Stop the benchmark's clock."""
        self._add(f"measuring {benchmark}", self.clock() - self._evaluation_started)

    def on_exception(self, state: RunState, error: BaseException) -> None:
        """Keep what was spent until the error."""
        self._keep(state, type(error).__name__)

    def on_run_end(self, state: RunState, scores: Sequence[Score]) -> None:
        """Keep the row and show the table."""
        self._keep(state, "end")
        table = Table(title="What took how long", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("work")
        table.add_column("time", justify="right")
        for name, seconds in self.rows():
            table.add_row(name, seconds_text(seconds))
        (self.console or Console()).print(table)

    def rows(self) -> tuple[tuple[str, float], ...]:
        """Return (kind of work, seconds), longest first, then the total."""
        ordered = sorted(self.seconds.items(), key=lambda item: -item[1])
        return (*ordered, ("total", sum(self.seconds.values())))

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _keep(self, state: RunState, ended_by: str) -> None:
        self.seconds[self.OTHER] = max(0.0, self.clock() - self._made - sum(self.seconds.values()))
        row: dict[str, Any] = {"ended_at": datetime.now(UTC).isoformat(timespec="seconds"), "ended_by": ended_by, "seconds": self.seconds}
        row["peak_memory_bytes"] = peak_memory_bytes()
        append_jsonl(Path(state.run_dir) / TIMINGS_FILE, [row])


# -- edit log --------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class EditLog(Callback):
    """Writes `edits.jsonl`: one row an edit with its digests, seconds, diagnostics, weight-norm ratio and, at a rung, canary ratio.

    A replayed edit is written only where its row is missing (a kill came between journal and log), without diagnostics and canary.
    """

    _known: dict[int, str] = field(default_factory=dict, init=False, repr=False)

    def on_run_start(self, state: RunState) -> None:
        """Read which edits are in the log."""
        self._known = {int(row["step"]): str(row["digest"]) for row in read_edits(state.run_dir)}

    def on_edit_end(self, state: RunState, event: EditEvent, model: EditedModel) -> str | None:
        """Append the edit's row."""
        if self._known.get(event.step) != event.digest:
            self._known[event.step] = event.digest
            known = event if event.weight_norm_ratio is not None else replace(event, weight_norm_ratio=weight_norm_ratio(model))
            append_edit(state.run_dir, edit_row(known))
        return None


def edit_row(event: EditEvent) -> Mapping[str, object]:
    """Return an edit event as plain JSON values."""
    row = {name: value for name, value in asdict(event).items() if value is not None}
    return {**row, "request_ids": list(event.request_ids), "diagnostics": {name: float(value) for name, value in event.diagnostics.items()}}

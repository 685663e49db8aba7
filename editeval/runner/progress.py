"""Live progress of a run and of long work: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from editeval.inference.edited import EditedModel
from editeval.interfaces import Callback, EditEvent, RunState
from editeval.runner.table import brief, format_number, headline, rung_label, score_table
from editeval.types import Item, Score

log = logging.getLogger(__name__)

RATE_WINDOW = 20  # edits that the shown speed is averaged over
SHOWN_SCORES = 6
QUIET_SECONDS = 10.0  # after which long work without a terminal says how far it is


@dataclass(kw_only=True)
class RichProgress(Callback):
    """Live bars on a terminal; plain lines elsewhere, so that the log of a cluster job reads well.

    It is also the `Progress` of long work (statistics, benchmarks). Everything goes to stderr: stdout is for results. An edit
    gets a line of its own unless edits come faster than `seconds_between_lines`. `shown` names the diagnostics of a method
    that are worth a look, where it has them.
    """

    seconds_between_lines: float = 0.5
    shown: Sequence[str] = ("target_log_prob_last", "loss_last")
    console: Console | None = None
    clock: Callable[[], float] = time.monotonic
    _bars: Progress | None = field(default=None, init=False, repr=False)
    _edits: TaskID | None = field(default=None, init=False, repr=False)
    _in_run: bool = field(default=False, init=False, repr=False)
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=RATE_WINDOW), init=False, repr=False)
    _last_line: float = field(default=-math.inf, init=False, repr=False)
    _evaluation_started: float = field(default=0.0, init=False, repr=False)

    # -- Progress --------------------------------------------------------------------------------------------------

    def track(self, items: Iterable[Item], *, description: str, total: int | None = None) -> Iterator[Item]:
        """Yield every item; a bar of its own on a terminal, else a line now and then."""
        if total is None and isinstance(items, Sized):
            total = len(items)
        return self._track_live(items, description, total) if self._console.is_terminal else self._track_plain(items, description, total)

    def message(self, text: str) -> None:
        """Say one line, above the bars, and in the run's log."""
        log.info(text)
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    # -- Callback --------------------------------------------------------------------------------------------------

    def on_run_start(self, state: RunState) -> None:
        """Say what runs and where it goes."""
        self._in_run = True
        self._recent.clear()
        rungs = ", ".join(str(rung) for rung in state.rungs)
        self.message(f"{state.model_name} edited by {state.method_name} with {state.dataset_name}; measured after {rungs} edits")
        self.message(f"results in {state.run_dir}")
        if self._console.is_terminal and state.rungs[-1]:
            self._edits = self._open().add_task("edits", total=state.rungs[-1], detail="")

    def on_edit_end(self, state: RunState, event: EditEvent, model: EditedModel) -> str | None:
        """Show how far the edits are, how fast they come and how well the last one took."""
        if not event.replayed:
            self._recent.append(event.seconds)
        detail = self._edit_detail(state, event)
        if self._bars is not None and self._edits is not None:
            self._bars.update(self._edits, completed=event.num_edits, detail=detail)
            log.info("edit %d/%d  %s", event.num_edits, state.rungs[-1], detail)
            return None
        now = self.clock()
        if now - self._last_line >= self.seconds_between_lines or event.num_edits in state.rungs:
            self._last_line = now
            self.message(f"edit {event.num_edits}/{state.rungs[-1]}  {detail}")
        return None

    def on_evaluation_start(self, state: RunState, benchmark: str) -> None:
        """Remember when."""
        self._evaluation_started = self.clock()

    def on_evaluation_end(self, state: RunState, benchmark: str, scores: Sequence[Score]) -> None:
        """Say the first few numbers."""
        table = brief(headline(score_table(scores)))
        first_of_task = {column.task: column for column in reversed(table.columns)}
        several = len(first_of_task) > 1
        shown = [column for column in table.columns if not several or column is first_of_task[column.task]]
        told = []
        for column in shown[:SHOWN_SCORES]:
            name = f"{column.task} {column.metric}" if several else column.metric
            told.append(f"{name} {format_number(table.value(state.num_edits, column))} ({column.protocol})")
        elapsed = seconds_text(self.clock() - self._evaluation_started)
        self.message(f"{benchmark}, {rung_label(state.num_edits)} ({elapsed}): {', '.join(told)}".replace("_", " "))

    def on_exception(self, state: RunState, error: BaseException) -> None:
        """Take the bars away, so that the error is readable."""
        self._finish()

    def on_run_end(self, state: RunState, scores: Sequence[Score]) -> None:
        """Take the bars away."""
        self._finish()

    # -- inside ----------------------------------------------------------------------------------------------------

    @property
    def _console(self) -> Console:
        if self.console is None:
            self.console = Console(stderr=True)
        return self.console

    def _edit_detail(self, state: RunState, event: EditEvent) -> str:
        parts = ["replayed" if event.replayed else seconds_text(event.seconds)]
        total = sum(self._recent)
        if total > 0:
            rate = len(self._recent) / total
            parts += [f"{rate:.2f} edits/s"]
        parts += [_diagnostic(name, event.diagnostics[name]) for name in self.shown if name in event.diagnostics]
        left = state.rungs[-1] - event.num_edits
        if total > 0 and left:
            parts += [f"{seconds_text(left / rate)} of editing left"]
        return "  ".join(parts)

    def _track_live(self, items: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
        bars = self._open()
        task = bars.add_task(description, total=total, detail="")
        try:
            for item in items:
                yield item
                bars.advance(task)
        finally:
            bars.remove_task(task)
            if not self._in_run and not bars.tasks:
                self._finish()

    def _track_plain(self, items: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
        started = last = self.clock()
        of = "" if total is None else f"/{total}"
        for done, item in enumerate(items, start=1):
            yield item
            now = self.clock()
            # Lines of the run itself come between; a bar's line is for work that would otherwise be silent.
            if done != total and now - max(last, self._last_line) >= max(QUIET_SECONDS, self.seconds_between_lines):
                last = now
                left = f", {seconds_text((now - started) / done * (total - done))} left" if total else ""
                self.message(f"{description}: {done}{of} ({seconds_text(now - started)}{left})")

    def _open(self) -> Progress:
        if self._bars is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
            )
            self._bars = Progress(*columns, console=self._console, transient=True, refresh_per_second=4)
            self._bars.start()
        return self._bars

    def _finish(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._edits = None
        self._in_run = False


def _diagnostic(name: str, value: float) -> str:
    """Return a diagnostic as people read it: a log-probability as the probability, the last of several without saying so."""
    if "log_prob" in name:
        name, value = name.replace("log_prob", "probability"), math.exp(min(value, 0.0))
    return f"{name.removesuffix('_last').replace('_', ' ')} {value:.3g}"


def seconds_text(seconds: float) -> str:
    """Return a duration as people say it: `0.8 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"

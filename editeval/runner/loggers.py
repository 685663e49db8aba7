"""Mirrors of a run's scores: the console, a CSV file, Weights & Biases. They can be lost and made again; `scores.jsonl` is the truth."""

from __future__ import annotations

import csv
import io
import logging
import netrc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlparse

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from editeval.files import write_atomic
from editeval.inference.edited import EditedModel
from editeval.interfaces import Callback, EditEvent, RunState
from editeval.runner.mirrored import Ledger, TrackedRow, cell_row, edit_row, rows_on_disk
from editeval.runner.table import ScoreTable, headline, score_table
from editeval.types import Score

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

log = logging.getLogger(__name__)

SCORES_CSV = "scores.csv"
LOG_WIDTH = 140  # characters a line where the width of the output is not known (a file, a cluster's log)
RUNG_WIDTH = 12
COLUMN_WIDTH = 10  # smallest width of a column of numbers


# -- console ---------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class ConsoleLogger(Callback):
    """Prints the final table: one part a benchmark, rungs down, metrics across."""

    console: Console | None = None

    def on_run_end(self, state: RunState, scores: Sequence[Score]) -> None:
        """Print the table and where everything is."""
        console = self.console or Console()
        if not console.is_terminal and self.console is None:
            console = Console(width=LOG_WIDTH)
        whole = headline(score_table(scores))
        for label in whole.benchmarks():
            for part in _parts(whole.only(column for column in whole.columns if column.benchmark_label == label), console.width):
                console.print(_title(part, label), style="italic", highlight=False, markup=False)
                console.print(_rich_table(part))
        if any(whole.at_chance(column) for column in whole.columns):
            console.print("* the unedited model is not above chance here, so this number cannot show damage", markup=False)
        console.print(f"results in {state.run_dir}", markup=False, highlight=False, soft_wrap=True)


def _parts(table: ScoreTable, width: int) -> Iterator[ScoreTable]:
    """Yield pieces of a table that fit a width, broken between protocols where one alone is not too wide."""
    fitting = max(1, (width - RUNG_WIDTH) // (COLUMN_WIDTH + 3))
    protocols = dict.fromkeys(column.protocol for column in table.columns)
    groups = [table.columns] if len(table.columns) <= fitting else [tuple(c for c in table.columns if c.protocol == p) for p in protocols]
    for group in groups:
        for start in range(0, len(group), fitting):
            yield table.only(group[start : start + fitting])


def _title(table: ScoreTable, label: str) -> str:
    """Return what all columns of a table share."""
    tasks, protocols = {column.task_label for column in table.columns}, {column.protocol for column in table.columns}
    shared = [label, *(tasks if len(tasks) == 1 else ()), *(protocols if len(protocols) == 1 else ())]
    return " · ".join(filter(None, shared)).replace("_", " ")


def _rich_table(table: ScoreTable) -> Table:
    """Return a table whose heads say what its columns do not share."""
    tasks, protocols = {column.task_label for column in table.columns}, {column.protocol for column in table.columns}
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("", no_wrap=True)
    for column in table.columns:
        lines = [column.task_label if len(tasks) > 1 else "", column.metric, column.protocol if len(protocols) > 1 else ""]
        mark = "*" if table.at_chance(column) else ""
        shown.add_column("\n".join(filter(None, lines)).replace("_", " ") + mark, justify="right", min_width=COLUMN_WIDTH)
    for name, *values in table.rows():
        shown.add_row(name, *values, style="dim" if name == "chance" else None)
    return shown


# -- CSV -------------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class CsvLogger(Callback):
    """Keeps `scores.csv` in the run's folder: one row a score, every field of it."""

    _scores: dict[tuple[int, str], tuple[Score, ...]] = field(default_factory=dict, init=False, repr=False)

    def on_run_start(self, state: RunState) -> None:
        """Forget the run before."""
        self._scores = {}

    def on_evaluation_end(self, state: RunState, benchmark: str, scores: Sequence[Score]) -> None:
        """Write everything measured so far."""
        self._scores[(state.num_edits, benchmark)] = tuple(scores)
        write_atomic(Path(state.run_dir) / SCORES_CSV, scores_csv([score for cell in self._scores.values() for score in cell]))

    def on_run_end(self, state: RunState, scores: Sequence[Score]) -> None:
        """Write all scores."""
        write_atomic(Path(state.run_dir) / SCORES_CSV, scores_csv(scores))


def scores_csv(scores: Sequence[Score]) -> str:
    """Return scores as CSV: a header, one row a score; floats with every digit, None as the empty text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*(item.name for item in fields(Score)), "chance_corrected"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**asdict(score), "chance_corrected": score.chance_corrected} for score in scores)
    return text.getvalue()


# -- Weights & Biases --------------------------------------------------------------------------------------------------------

WandbMode = Literal["auto", "online", "offline", "disabled"]


@dataclass(kw_only=True)
class WandbMirror(Callback):
    """Mirrors a run into Weights & Biases through lightning's `WandbLogger`; costs a run a warning at most.

    One W&B run a trajectory: its id is the start of the edit key, its x-axis `num_edits`. `mode=auto` goes online where an
    account is configured (WANDB_API_KEY or .netrc) and offline elsewhere; WANDB_MODE, where set, decides. Without an answer
    from the server within `init_timeout_seconds` the run goes offline. What is mirrored is noted beside the W&B files, so a
    resumed run adds only what is new, and a finished one starts no W&B run at all; `replay` sends what the server lacks.
    """

    project: str = "editeval"
    entity: str | None = None
    group: str | None = None
    job_type: str = "trajectory"
    tags: Sequence[str] = ()
    mode: WandbMode = "auto"
    init_timeout_seconds: float = 20.0
    finish_timeout_seconds: float = 10.0
    log_edits: bool = True
    _logger: WandbLogger | None = field(default=None, init=False, repr=False)
    _ledger: Ledger | None = field(default=None, init=False, repr=False)
    _broken: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "online", "offline", "disabled"):
            raise ValueError(f"mode={self.mode!r} is not one of auto, online, offline, disabled")

    # -- Callback --------------------------------------------------------------------------------------------------

    def on_run_start(self, state: RunState) -> None:
        """Read what earlier launches mirrored; W&B itself starts with the first new number."""
        self._logger, self._broken = None, self._mode() == "disabled"
        self._ledger = Ledger(state.run_dir)

    def on_edit_end(self, state: RunState, event: EditEvent, model: EditedModel) -> str | None:
        """Mirror the edit's diagnostics, seconds and digest."""
        if self.log_edits and not event.replayed:
            self._mirror(state, edit_row(asdict(event)))
        return None

    def on_evaluation_end(self, state: RunState, benchmark: str, scores: Sequence[Score]) -> None:
        """Mirror a benchmark's numbers, one key each."""
        if scores:
            self._mirror(state, cell_row(scores))

    def on_exception(self, state: RunState, error: BaseException) -> None:
        """Close the W&B run as failed."""
        self._finish(exit_code=1)

    def on_run_end(self, state: RunState, scores: Sequence[Score]) -> None:
        """Close the W&B run."""
        self._finish(exit_code=0)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _mirror(self, state: RunState, row: TrackedRow) -> None:
        ledger = self._ledger
        if self._broken or ledger is None or row.name in ledger:
            return
        with self._guarded(state):
            if self._logger is None:
                self._logger, online = self._start(state)
                if online:
                    self._send_missing(state, self._logger, ledger)
            ledger.add([row.name])  # its place is fixed before it is sent: a kill in between is mended by `_send_missing`
            self._logger.log_metrics(row.numbers)

    def replay(self, state: RunState) -> int:
        """Send the server every row of a run on disk that it lacks, and return how many these were.

        Raises:
            Exception: whatever W&B raises where the server cannot be reached; nothing is marked as sent.
        """
        ledger = Ledger(state.run_dir)
        ledger.add(rows_on_disk(state.run_dir))
        with _wandb_within(state.run_dir):
            logger = self._open(state, offline=False)
            try:
                return self._send_missing(state, logger, ledger)
            finally:
                logger.experiment.finish(exit_code=0)

    @staticmethod
    def _send_missing(state: RunState, logger: WandbLogger, ledger: Ledger) -> int:
        """Send the rows whose steps the server does not have yet."""
        missing = ledger.names[logger.experiment.starting_step :]
        found = rows_on_disk(state.run_dir) if missing else {}
        for name in missing:
            # a row that no longer stands (its edits were superseded) keeps its place, without numbers
            logger.log_metrics(found[name].numbers if name in found else {"superseded": 1.0})
        return len(missing)

    def _start(self, state: RunState) -> tuple[WandbLogger, bool]:
        """Open the W&B run, online if that works, else offline; return it and whether it is online."""
        if self._mode() == "online":
            try:
                return self._open(state, offline=False), True
            except Exception as error:  # noqa: BLE001 - W&B raises many kinds, and any of them means: no server
                _notice(f"W&B cannot be reached ({_one_line(error)}); logging offline")
                _release_run_ids()
        else:
            _notice(f"W&B logs offline to {state.run_dir}/wandb (no account in use; `wandb sync` uploads it later)")
        return self._open(state, offline=True), False

    def _open(self, state: RunState, *, offline: bool) -> WandbLogger:
        import wandb  # about a second, and lightning several: only a run that mirrors pays
        from lightning.pytorch.loggers import WandbLogger

        # Opened here and handed over: the logger's own way sets WANDB_MODE for the whole process and a step axis of its own.
        run = wandb.init(
            id=state.edit_key[:12],
            name=Path(state.run_dir).name,
            dir=state.run_dir,
            project=self.project,
            entity=self.entity,
            group=self.group,
            job_type=self.job_type,
            tags=[*self.tags, state.model_name, state.method_name, state.dataset_name],
            mode="offline" if offline else "online",
            resume="allow",
            reinit="create_new",  # a run of an earlier job of a sweep in this process is not ours
            settings=wandb.Settings(
                init_timeout=self.init_timeout_seconds, finish_timeout=self.finish_timeout_seconds, silent=True, console="off"
            ),
        )
        run.define_metric("num_edits")
        run.define_metric("*", step_metric="num_edits")
        logger = WandbLogger(experiment=run)
        logger.log_hyperparams({"edit_key": state.edit_key, **state.config})
        return logger

    def _finish(self, *, exit_code: int) -> None:
        logger, self._logger = self._logger, None
        if logger is not None:
            with self._guarded(None):
                logger.experiment.finish(exit_code=exit_code)

    @contextmanager
    def _guarded(self, state: RunState | None) -> Iterator[None]:
        """Turn any failure of the mirror into one warning and stop mirroring; keep its files and settings inside the run."""
        with _wandb_within(None if state is None else state.run_dir):
            try:
                yield
            except Exception as error:  # noqa: BLE001 - whatever a tracker raises, the measurements go on
                self._broken = True
                _notice(f"W&B mirror stopped ({_one_line(error)}); the scores are complete in scores.jsonl")

    def _mode(self) -> Literal["online", "offline", "disabled"]:
        asked = os.environ.get("WANDB_MODE") or self.mode
        if asked in ("disabled", "offline", "online"):
            return asked  # type: ignore[return-value]
        if asked == "dryrun":
            return "offline"
        return "online" if has_wandb_account() else "offline"


@contextmanager
def _wandb_within(run_dir: str | None) -> Iterator[None]:
    """Keep W&B quiet and its staging files inside the run; afterwards the environment is as it was."""
    before = {name: os.environ.get(name) for name in ("WANDB_DATA_DIR", "WANDB_SILENT")}
    os.environ["WANDB_SILENT"] = "true"
    if run_dir is not None:
        os.environ["WANDB_DATA_DIR"] = str(Path(run_dir) / "wandb" / "data")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def has_wandb_account() -> bool:
    """Return whether W&B finds credentials on this machine: in the environment, or in .netrc for its host."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _release_run_ids() -> None:
    """End W&B's own process, which keeps the id of a run that could not start as being in use; the next run starts a new one."""
    import wandb

    wandb.teardown()


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _notice(text: str) -> None:
    """Say one line to the person at the terminal and to the run's log."""
    log.info(text)
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)

"""The mirror of a run in Weights & Biases. It can be lost and made again; `scores.jsonl` is the truth."""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlparse

from rich.console import Console

from editeval.inference.edited import EditedModel
from editeval.interfaces import Callback, EditEvent, RunState
from editeval.runner.mirrored import Ledger, TrackedRow, cell_row, edit_row, rows_on_disk
from editeval.runner.results import CellKey, ScoreStore
from editeval.runner.run_files import JOURNAL_FOLDER, MANIFEST_FILE
from editeval.runner.tracked_tables import TableRules, TrackedTable, tables_of
from editeval.types import Score

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

log = logging.getLogger(__name__)

WandbMode = Literal["auto", "online", "offline", "disabled"]


@dataclass(kw_only=True)
class WandbMirror(Callback):
    """Mirrors a run into Weights & Biases through lightning's `WandbLogger`; costs a run a warning at most.

    One W&B run a trajectory: its id is the start of the edit key, its x-axis `num_edits`. `mode=auto` goes online where an
    account is configured (WANDB_API_KEY or .netrc) and offline elsewhere; WANDB_MODE, where set, decides. Without an answer
    from the server within `init_timeout_seconds` the run goes offline. What is mirrored is noted beside the W&B files, so a
    resumed run adds only what is new, and a finished one starts no W&B run at all; `replay` sends what the server lacks.

    Beside the numbers of a benchmark stand tables: its first `sample_rows` items, and for each `metric.protocol` of `retention` which of
    the earlier facts still pass. `log_journal` uploads the journal of edits as an artifact when the run ends.
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
    sample_rows: int = 0
    retention: Sequence[str] = ()
    log_journal: bool = False
    _logger: WandbLogger | None = field(default=None, init=False, repr=False)
    _ledger: Ledger | None = field(default=None, init=False, repr=False)
    _broken: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "online", "offline", "disabled"):
            raise ValueError(f"mode={self.mode!r} is not one of auto, online, offline, disabled")
        for name in self.retention:
            if name.count(".") != 1:
                raise ValueError(f"retention={name!r} is not METRIC.PROTOCOL, such as efficacy.generation")

    # -- Callback --------------------------------------------------------------------------------------------------

    def on_run_start(self, state: RunState) -> None:
        """Read what earlier launches mirrored; W&B itself starts with the first new number."""
        self._logger, self._broken = None, self._mode() == "disabled"
        self._ledger = Ledger(state.run_dir)

    def on_edit_end(self, state: RunState, event: EditEvent, model: EditedModel) -> str | None:
        """Mirror the edit's diagnostics, seconds and digest, and how large it left the edited weights."""
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
        """Upload the journal where that is asked for, and close the W&B run."""
        if self._logger is not None and not self._broken:
            with self._guarded(state):
                self._upload_journal(state, self._logger)
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
            self._log(state, self._logger, row)

    def _log(self, state: RunState, logger: WandbLogger, row: TrackedRow) -> None:
        """Log a row's numbers and tables as one step."""
        tables = {} if row.cell is None else self._tables(state, row.cell)
        if not tables:
            logger.log_metrics(row.numbers)
            return
        import wandb

        shown = {name: wandb.Table(columns=list(table.columns), data=[list(line) for line in table.rows]) for name, table in tables.items()}
        logger.experiment.log({**row.numbers, **shown})

    def _tables(self, state: RunState, cell: CellKey) -> Mapping[str, TrackedTable]:
        rules = TableRules(samples=self.sample_rows, retention=tuple(self.retention))
        return tables_of(
            ScoreStore(state.run_dir), num_edits=cell.num_edits, benchmark=cell.benchmark, benchmark_key=cell.benchmark_key, rules=rules
        )

    def _upload_journal(self, state: RunState, logger: WandbLogger) -> None:
        """Keep the journal as an artifact: with it and the manifest the edited model can be rebuilt anywhere."""
        if not self.log_journal:
            return
        import wandb

        run_dir = Path(state.run_dir)
        artifact = wandb.Artifact(f"journal-{state.edit_key[:12]}", type="journal", metadata={"edit_key": state.edit_key})
        artifact.add_dir(str(run_dir / JOURNAL_FOLDER), name=JOURNAL_FOLDER)
        artifact.add_file(str(run_dir / MANIFEST_FILE))
        logger.experiment.log_artifact(artifact)

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
                sent = self._send_missing(state, logger, ledger)
                if sent:
                    self._upload_journal(state, logger)
                return sent
            finally:
                logger.experiment.finish(exit_code=0)

    def _send_missing(self, state: RunState, logger: WandbLogger, ledger: Ledger) -> int:
        """Send the rows whose steps the server does not have yet."""
        missing = ledger.names[logger.experiment.starting_step :]
        found = rows_on_disk(state.run_dir) if missing else {}
        for name in missing:
            # a row that no longer stands (its edits were superseded) keeps its place, without numbers
            self._log(state, logger, found.get(name) or TrackedRow(name=name, numbers={"superseded": 1.0}))
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

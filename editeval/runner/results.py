"""Scores on disk: `scores.jsonl` is the truth; trackers, tables and reports only mirror it.

A *cell* is what one benchmark measured on one state: it is named by (num_edits, benchmark, benchmark_key, state_digest)
and written with a single append. Every row says how many rows its cell has and which content it belongs to, so that a
cell torn by a kill is never taken for a whole one, and a cell measured on edits that no longer stand is never served.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from editeval.files import Cache, append_jsonl, read_jsonl, restore_floats, tag_floats, write_atomic
from editeval.types import EditevalError, Evaluation, Measurement, Score, content_key

RESULTS_VERSION = 1  # raised when the rows of scores.jsonl change their meaning
SCORES_FILE = "scores.jsonl"
CURRENT_FILE = "current.jsonl"

_SCORE_FIELDS = tuple(field.name for field in fields(Score))
_ADDED_FIELDS = ("shots", "template")  # that rows of RESULTS_VERSION 1 may lack
_FLOAT_FIELDS = ("value", "stderr", "chance", "seconds")


class CellKey(NamedTuple):
    """What a cell is measured on, and by what."""

    num_edits: int
    benchmark: str
    benchmark_key: str
    state_digest: str


@dataclass(kw_only=True)
class _Attempt:
    """The rows of one write of a cell; whole when as many are there as the write had."""

    size: int
    rows: dict[tuple[str, str, str], Score] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return len(self.rows) == self.size


@dataclass(frozen=True, kw_only=True)
class _Content:
    """What `scores.jsonl` holds: the whole cells in the order in which they were (last) written."""

    file_sizes: tuple[int, int]
    cells: Mapping[CellKey, tuple[Score, ...]]
    current: Mapping[tuple[int, str, str], str]  # (num_edits, benchmark, state) -> the key of the setting that counts
    torn_lines: int
    torn_cells: int

    def stands(self, key: CellKey) -> bool:
        """Whether a cell was measured with its benchmark's current setting."""
        return self.current[key.num_edits, key.benchmark, key.state_digest] == key.benchmark_key


class ScoreStore:
    """The scores and samples of one run's folder.

    Safe to use from several processes: a row is appended, never changed, and the last whole write of a cell counts.
    """

    def __init__(self, run_dir: Path | str) -> None:
        self.run_dir = Path(run_dir)
        self._content = _Content(file_sizes=(-1, -1), cells={}, current={}, torn_lines=0, torn_cells=0)

    # -- reading ---------------------------------------------------------------------------------------------------

    def has(self, key: CellKey) -> bool:
        """Return whether this cell is on disk, every row of it."""
        return key in self._read().cells

    def cell(self, key: CellKey) -> tuple[Score, ...]:
        """Return the scores of one cell, in the order in which the benchmark gave them.

        Raises:
            KeyError: the cell is not on disk, or only a part of it is.
        """
        return self._read().cells[key]

    def scores(self, valid: Mapping[int, str] | None = None) -> tuple[Score, ...]:
        """Return every score of a whole cell, by rung, then in the order of writing.

        `valid` maps a number of edits to the digest of the state that the journal names there: scores of other states or
        rungs are stale and left out. Without it the state that was measured last counts at each rung. Of a benchmark with
        several settings at one rung (more facts were planned later, a limit was changed) the current one counts.
        """
        content = self._read()
        cells = content.cells
        digests = {key.num_edits: key.state_digest for key in cells} if valid is None else valid
        standing = [key for key in cells if digests.get(key.num_edits) == key.state_digest and content.stands(key)]
        return tuple(score for key in sorted(standing, key=lambda key: key.num_edits) for score in cells[key])

    def samples(self, num_edits: int, benchmark: str, benchmark_key: str | None = None) -> tuple[Mapping[str, Any], ...]:
        """Return the items behind a cell's numbers; empty where the benchmark gave none or the cell is not there.

        Without `benchmark_key`, those of this benchmark's current setting at this rung.

        Raises:
            EditevalError: their file is damaged.
        """
        if benchmark_key is None:
            content = self._read()
            found = [key for key in content.cells if (key.num_edits, key.benchmark) == (num_edits, benchmark) and content.stands(key)]
            if not found:
                return ()
            benchmark_key = found[-1].benchmark_key
        path = self._samples_path(num_edits, benchmark, benchmark_key)
        if not path.exists():
            return ()
        try:
            text = gzip.decompress(path.read_bytes()).decode()
            records = json.loads(f"[{text.strip().replace(chr(10), ',')}]")  # at once: twice as fast as line by line
        except (EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
            raise EditevalError(f"{path} is damaged ({error}); bring back a copy, or remove it to go on with the scores alone") from error
        return tuple(restore_floats(records) if "non_finite" in text else records)

    @property
    def torn_lines(self) -> int:
        """Number of lines of `scores.jsonl` that a kill cut short."""
        return self._read().torn_lines

    @property
    def torn_cells(self) -> int:
        """Number of writes that lack rows; their cells count as never measured unless measured again."""
        return self._read().torn_cells

    # -- writing ---------------------------------------------------------------------------------------------------

    def record(
        self, evaluation: Evaluation, *, benchmark: str, benchmark_key: str, num_edits: int, state_digest: str, seconds: float
    ) -> tuple[Score, ...]:
        """Write a cell and return its scores: the samples first, so that a score on disk always has its samples there.

        Raises:
            ValueError: no measurements, or two of the same task, metric and protocol.
        """
        scores = tuple(
            Score(
                benchmark=benchmark,
                benchmark_key=benchmark_key,
                num_edits=num_edits,
                state_digest=state_digest,
                seconds=float(seconds),
                **_plain(measurement),
            )
            for measurement in evaluation.measurements
        )
        _check_distinct(scores, benchmark)
        if evaluation.samples:
            lines = "".join(_standard_json(sample) + "\n" for sample in evaluation.samples)
            # mtime=0: equal samples are equal files
            write_atomic(self._samples_path(num_edits, benchmark, benchmark_key), gzip.compress(lines.encode(), mtime=0))
        rows = [_encode(score) for score in scores]
        cell = {"cell": content_key(rows)[:16], "cell_size": len(rows), "results_version": RESULTS_VERSION}
        append_jsonl(self.run_dir / SCORES_FILE, [{**row, **cell} for row in rows])
        return scores

    def make_current(self, key: CellKey) -> None:
        """Say which setting of a benchmark counts on a state; written only where it is not the one that was measured last."""
        content = self._read()
        if key in content.cells and not content.stands(key):
            append_jsonl(self.run_dir / CURRENT_FILE, [key._asdict()])

    # -- inside ----------------------------------------------------------------------------------------------------

    def _samples_path(self, num_edits: int, benchmark: str, benchmark_key: str) -> Path:
        return self.run_dir / "samples" / f"{num_edits}-{benchmark}-{benchmark_key[:8]}.jsonl.gz"

    def _read(self) -> _Content:
        paths = self.run_dir / SCORES_FILE, self.run_dir / CURRENT_FILE
        sizes = _size(paths[0]), _size(paths[1])
        if sizes != self._content.file_sizes:  # append-only: the same size is the same content
            rows, torn_lines = read_jsonl(paths[0])
            chosen, _ = read_jsonl(paths[1])
            self._content = _collect(rows, chosen, torn_lines, sizes)
        return self._content


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class BaseScores:
    """What benchmarks measured on unedited models, shared by all runs: keyed by the weights and the benchmark's settings."""

    KIND = "base-scores"

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def get(self, fingerprint: str, benchmark_key: str) -> tuple[Evaluation, float] | None:
        """Return the evaluation and the seconds it took when it was measured, or None.

        Raises:
            EditevalError: the entry on disk cannot be read.
        """
        path = self._path(fingerprint, benchmark_key)
        if not path.exists():
            return None
        try:
            stored = restore_floats(json.loads(gzip.decompress(path.read_bytes())))
            evaluation = Evaluation(
                measurements=tuple(Measurement(**row) for row in stored["measurements"]), samples=tuple(stored["samples"])
            )
            return evaluation, float(stored["seconds"])
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise EditevalError(f"the stored base scores {path} cannot be read ({error}); delete that file and run again") from error

    def put(self, fingerprint: str, benchmark_key: str, evaluation: Evaluation, seconds: float) -> None:
        """Store an evaluation of the unedited model."""
        stored = {
            "measurements": [_plain(measurement) for measurement in evaluation.measurements],
            "samples": list(evaluation.samples),
            "seconds": float(seconds),
        }
        text = json.dumps(tag_floats(stored), ensure_ascii=False, allow_nan=False)
        write_atomic(self._path(fingerprint, benchmark_key), gzip.compress(text.encode(), mtime=0))

    def _path(self, fingerprint: str, benchmark_key: str) -> Path:
        return self.cache.path(self.KIND, content_key([RESULTS_VERSION, fingerprint, benchmark_key]), ".json.gz")


# -- rows ------------------------------------------------------------------------------------------------------------------


def _plain(measurement: Measurement) -> dict[str, Any]:
    """Return the fields with Python's own numbers: a benchmark may hand over numpy's."""
    row = asdict(measurement)
    for name in ("value", "stderr", "chance"):
        row[name] = None if row[name] is None else float(row[name])
    return {**row, "n": int(row["n"]), "higher_is_better": bool(row["higher_is_better"])}


def _check_distinct(scores: Sequence[Score], benchmark: str) -> None:
    if not scores:
        raise ValueError(f"benchmark {benchmark} returned no measurement; it must measure something at every rung")
    names = [(score.task, score.metric, score.protocol) for score in scores]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"benchmark {benchmark} returned {', '.join('.'.join(name) for name in twice)} more than once; each must be unique"
        )


def _encode(score: Score) -> dict[str, Any]:
    """Return a row in standard JSON: NaN and infinity become null, with their name under `non_finite`."""
    row: dict[str, Any] = asdict(score)
    non_finite = {name: repr(row[name]) for name in _FLOAT_FIELDS if row[name] is not None and not math.isfinite(row[name])}
    row.update(dict.fromkeys(non_finite))
    corrected = score.chance_corrected
    if corrected is not None and math.isfinite(corrected):
        row["chance_corrected"] = corrected  # for those who read the rows by themselves; it follows from value and chance
    return {**row, "non_finite": non_finite} if non_finite else row


def _decode(row: Mapping[str, Any]) -> Score:
    # A row written before a field existed has its default; one without what makes a score is an error.
    values = {name: row[name] for name in _SCORE_FIELDS if name in row or name not in _ADDED_FIELDS}
    values.update({name: float(text) for name, text in row.get("non_finite", {}).items()})
    return Score(**values)


def _collect(
    rows: Sequence[Mapping[str, Any]], chosen: Sequence[Mapping[str, Any]], torn_lines: int, file_sizes: tuple[int, int]
) -> _Content:
    """Group rows into writes of cells, keep the last whole write of each cell, and see which setting counts at each rung."""
    attempts: dict[tuple[CellKey, str], _Attempt] = {}
    for row in rows:
        score = _decode(row)
        cell = CellKey(score.num_edits, score.benchmark, score.benchmark_key, score.state_digest)
        name = (cell, str(row["cell"]))
        attempt = attempts.pop(name, None) or _Attempt(size=int(row["cell_size"]))  # popped: a rewrite moves to the end
        attempt.rows[(score.task, score.metric, score.protocol)] = score
        attempts[name] = attempt
    cells: dict[CellKey, tuple[Score, ...]] = {}
    for (cell, _), attempt in attempts.items():
        if attempt.whole:
            cells.pop(cell, None)
            cells[cell] = tuple(attempt.rows.values())
    torn_cells = sum(not attempt.whole for attempt in attempts.values())
    named = (CellKey(**{name: row[name] for name in CellKey._fields}) for row in chosen)
    standing = [*cells, *(key for key in named if key in cells)]  # as measured last, unless said otherwise
    current = {(key.num_edits, key.benchmark, key.state_digest): key.benchmark_key for key in standing}
    return _Content(file_sizes=file_sizes, cells=cells, current=current, torn_lines=torn_lines, torn_cells=torn_cells)


def _standard_json(value: Any) -> str:
    """Return the value as standard JSON; most values are finite throughout and need no tags."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(tag_floats(value), ensure_ascii=False, allow_nan=False)

"""What a sweep will take, judged by what earlier runs in the same folder took."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from editeval.files import read_jsonl
from editeval.runner.results import SCORES_FILE
from editeval.runner.run_files import EDITS_FILE, JOURNAL_FOLDER, MANIFEST_FILE, read_manifest
from editeval.types import EditevalError

NEWEST_RUNS = 100  # more would take longer to read than the estimate is worth


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is still to do for one job: edits beyond those on disk, and evaluations by benchmark."""

    model: str
    method: str
    edits: int
    evaluations: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of computing and bytes on disk; `unknown` names what no earlier run tells, and what is left out for it."""

    seconds: float
    num_bytes: int
    unknown: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class History:
    """Medians over earlier runs: an edit by (model, method), an evaluation by (model, benchmark)."""

    edit_seconds: Mapping[tuple[str, str], float]
    edit_bytes: Mapping[tuple[str, str], float]
    evaluation_seconds: Mapping[tuple[str, str], float]

    def estimate(self, work: Iterable[Work]) -> Estimate:
        """Add up what is known; starting a process and loading weights are not part of it."""
        seconds, num_bytes = 0.0, 0.0
        unknown: dict[str, None] = {}
        for item in work:
            pair = (item.model, item.method)
            if item.edits and pair not in self.edit_seconds:
                unknown[f"an edit by {item.method} on {item.model}"] = None
            seconds += item.edits * self.edit_seconds.get(pair, 0.0)
            num_bytes += item.edits * self.edit_bytes.get(pair, 0.0)
            for benchmark, number in item.evaluations.items():
                if number and (item.model, benchmark) not in self.evaluation_seconds:
                    unknown[f"{benchmark} on {item.model}"] = None
                seconds += number * self.evaluation_seconds.get((item.model, benchmark), 0.0)
        return Estimate(seconds=seconds, num_bytes=round(num_bytes), unknown=tuple(unknown))


def read_history(runs: Path) -> History:
    """Read the newest runs of a folder; one that cannot be read is left out."""
    edit_seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    edit_bytes: dict[tuple[str, str], list[float]] = defaultdict(list)
    evaluation_seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    manifests = sorted(runs.glob(f"*/{MANIFEST_FILE}"), key=lambda path: -path.stat().st_mtime)
    for path in manifests[:NEWEST_RUNS]:
        try:
            config = read_manifest(path.parent)["config"]
            model, method = str(config["model"]["name"]), str(config["method"]["name"])
        except (EditevalError, KeyError, TypeError):
            continue
        edits, _ = read_jsonl(path.parent / EDITS_FILE)
        edit_seconds[model, method] += [float(row["seconds"]) for row in edits]
        if edits:
            size = sum(file.stat().st_size for file in (path.parent / JOURNAL_FOLDER).glob("*") if file.is_file())
            edit_bytes[model, method].append(size / len({row["step"] for row in edits}))
        rows, _ = read_jsonl(path.parent / SCORES_FILE)
        cells = {(row["num_edits"], row["benchmark"], row["benchmark_key"]): float(row["seconds"] or 0.0) for row in rows}
        for (_, benchmark, _), seconds in cells.items():
            evaluation_seconds[model, benchmark].append(seconds)
    return History(
        edit_seconds={pair: median(values) for pair, values in edit_seconds.items() if values},
        edit_bytes={pair: median(values) for pair, values in edit_bytes.items()},
        evaluation_seconds={pair: median(values) for pair, values in evaluation_seconds.items()},
    )

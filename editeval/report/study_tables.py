"""What the page over many runs and the report on W&B both tell, as plain values: the sections, rows of tables, notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from editeval.report.charts import Chart
from editeval.report.published import SOURCE, published_evaluating, published_scores, published_seconds
from editeval.report.series import Change, Series
from editeval.report.study import Run
from editeval.report.verdicts import KEEPS, Verdict
from editeval.runner.progress import seconds_text
from editeval.runner.table import MISSING, format_number

QUESTIONS = {
    "rq1": ("RQ1", "How does ability change with the number of edits?"),
    "rq2": ("RQ2", "Do instruction-tuned models lose it differently?"),
    "rq3": ("RQ3", "Does the size of the model matter?"),
    "rq4": ("RQ4", "Which abilities are lost?"),
    "rq5": ("RQ5", "What becomes of safety?"),
}
MORE = {
    "artefacts": ("Artefacts", "Is it the method, how a code runs it, or how it is scored?"),
    "retention": ("Retention", "Which edits are still there?"),
    "monitors": ("Early warnings", "What shows damage before a benchmark does?"),
}
SECTIONS = {
    "verdicts": "Verdicts",
    "runs": "Runs",
    **{name: f"{short}: {title}" for name, (short, title) in {**QUESTIONS, **MORE}.items()},
    "changes": "Changes against the unedited model",
    "items": "Single items",
    "how": "How to read this",
}

RUN_HEADS = (
    *("model", "method", "data set", "seed", "edits", "efficacy", "locality", "ability kept", "n90", "n50", "norm"),
    *("s/edit", "published s/edit", "measuring", "journal", "memory"),
)
CHANGE_HEADS = ("model", "method", "seed", "benchmark", "edits", "change", "p", "p (Holm)")


@dataclass(frozen=True, kw_only=True)
class StudyContent:
    """Everything that a page over many runs shows."""

    title: str
    runs: Sequence[Run]
    series: Sequence[Series]
    verdicts: Sequence[Verdict]
    charts: Sequence[Chart]
    changes: Sequence[Change]
    folder: Path  # where the page will be: links start here

    @cached_property
    def series_by_run(self) -> Mapping[Path, Series]:
        """The series of each run (by its folder), also of one that counts nowhere."""
        return {run.folder: one for one in self.series for run in (*one.runs, *one.twins)}


class Number(NamedTuple):
    """A number of a table: what it is sorted by, whatever unit its text has; None where there is none."""

    value: float | None
    text: str


def names_of_run(run: Run, content: StudyContent) -> Mapping[str, str]:
    """Return what a run is known by: the labels of its series, and its seed."""
    one = content.series_by_run[run.folder]
    return {"model": one.model, "method": one.method, "dataset": one.dataset, "seed": str(run.seed)}


def counted_runs(content: StudyContent) -> str:
    """Return how many runs there are, and of what."""
    words = []
    for name in ("model", "method", "dataset", "seed"):
        count = len({getattr(run, name) for run in content.runs})
        words.append(f"{count} {'data set' if name == 'dataset' else name}{'' if count == 1 else 's'}")
    return f"{len(content.runs)} run{'' if len(content.runs) == 1 else 's'}: {', '.join(words)}."


# -- verdicts --------------------------------------------------------------------------------------------------------------


def verdict_note() -> str:
    """Return where the statements are from."""
    return f"Statements: the findings of {SOURCE}, made testable. Verdicts are of all these runs, whatever is filtered."


# -- runs ------------------------------------------------------------------------------------------------------------------


def run_numbers(run: Run, content: StudyContent) -> tuple[Number, ...]:
    """Return the numbers of a run, from its seed on, in the order of `RUN_HEADS`."""
    one = content.series_by_run[run.folder]
    of_series = one if run in one.runs and one.mean else None
    last = run.rungs[-1]
    qualities = [
        run.table.value(last, column) if (column := run.edit_column(metric)) is not None else None for metric in ("efficacy", "locality")
    ]
    common = 0 if of_series is None else max(of_series.mean)  # the last rung at which every run of the series was measured
    kept = None if of_series is None else of_series.mean[common].value
    marks = (None, None) if of_series is None else (of_series.last_kept(KEEPS), of_series.last_kept(0.5))
    seconds = [float(edit["seconds"]) for edit in run.edits if edit.get("seconds") is not None]
    norm = next((edit["weight_norm_ratio"] for edit in reversed(run.edits) if edit.get("weight_norm_ratio") is not None), None)
    measuring = sum(value for name, value in run.timings.items() if name.startswith("measuring"))
    return (
        Number(run.seed, str(run.seed)),
        Number(last, str(last)),
        *(Number(value, format_number(value)) for value in qualities),
        Number(kept, format_number(kept) + (f" at {common}" if 0 < common != last else "")),
        *(Number(mark, "" if mark is None else str(mark)) for mark in marks),
        *(
            Number(value, format_number(value))
            for value in (norm, fmean(seconds) if seconds else None, published_seconds().get((run.model, run.method)))
        ),
        Number(measuring or None, seconds_text(measuring) if measuring else MISSING),
        Number(run.journal_bytes, _bytes(run.journal_bytes)),
        Number(run.peak_memory_bytes, MISSING if run.peak_memory_bytes is None else _bytes(run.peak_memory_bytes)),
    )


def run_note() -> str:
    """Return what the numbers of a run are."""
    return (
        "At the last rung. Ability kept, n90 and n50 (the largest number of edits up to which the lower bound of mean retained ability "
        f"stays above {KEEPS:g} or 0.5) are of all seeds of a series together; ability kept names its number of edits where a seed went "
        "further than the others."
    )


def left_out(content: StudyContent) -> list[str]:
    """Return what of the runs counts nowhere, and why."""
    notes = [f"{run.folder.name}: {note}" for run in content.runs for note in run.notes]
    return notes + [note for one in content.series for note in one.notes]


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


# -- changes ---------------------------------------------------------------------------------------------------------------


def sure_changes(content: StudyContent) -> list[Change]:
    """Return the changes that Holm's adjustment leaves, the surest first."""
    found = [change for change in content.changes if change.adjusted < 0.05]
    return sorted(found, key=lambda change: (change.adjusted, change.rung))


def change_note(content: StudyContent, *, shown: int) -> str:
    """Return how many changes were tested and found, where `shown` of them are listed."""
    found = len(sure_changes(content))
    return (
        f"{found} of {len(content.changes)} paired tests on the same items (McNemar exact; bootstrap for graded scores) differ after "
        f"Holm's adjustment for all of them{f'; the {shown} surest are listed' if found > shown else ''}."
    )


def change_row(change: Change, content: StudyContent) -> tuple[str, ...]:
    """Return a change in the order of `CHANGE_HEADS`."""
    names = names_of_run(change.run, content)
    numbers = (f"{change.difference:+.3f}", f"{change.p_value:.2g}", f"{change.adjusted:.2g}")
    return (names["model"], names["method"], names["seed"], change.column.name, str(change.rung), *numbers)


# -- words -----------------------------------------------------------------------------------------------------------------


def how_to_read() -> tuple[str, ...]:
    """Return what a reader must know of the numbers."""
    doubts = sum(bool(row.doubt) for row in published_scores())
    scoring = ", ".join(
        f"{benchmark} of {model} {with_vllm:g} and {without:g}"
        for (model, benchmark), (with_vllm, without) in published_evaluating().items()
    )
    return (
        "Ability kept is (score − chance) / (unedited score − chance) on the same items. Intervals are Fieller's, at 95%, over items "
        "and, with several seeds, over orders of edits (Satterthwaite's degrees of freedom). One seed says nothing of other orders.",
        "Filters hide; they never change a statistic: means over benchmarks, verdicts and tests are of all seeds.",
        "Means over benchmarks count those on which the unedited model is above chance, all scored in the same way.",
        "A series confirms that a method preserves ability only if its edits are there: efficacy over all edits so far, "
        "its lower bound at least 0.1 above the unedited model's.",
        f"Published curves are from {SOURCE} ({len(published_scores())} numbers in editeval/report/published, {doubts} with a doubt). "
        "They are drawn where model, method, benchmark and way of scoring are the same, and enter no statistic. "
        f"What scoring took its authors, with vLLM and without, in a unit that is not printed: {scoring}.",
    )

"""Many runs as one study: what each run is of, its scores, its items, its edits and what it cost. From disk alone."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from editeval.report.changed import Answered, changed_items
from editeval.report.items import BALANCED, Degenerate, Items, Outcomes, Record
from editeval.runner.results import ScoreStore
from editeval.runner.run_files import JOURNAL_FOLDER, read_collapse, read_edits, read_manifest, read_peak_memory, read_timings
from editeval.runner.table import PROTOCOLS_FIRST, RAISED_BY_EDITS, Column, ScoreTable, headline, score_table
from editeval.types import EditevalError, Score, counted

STUDIES_FILE = Path(__file__).with_name("studies.yaml")
NOT_ABILITY = RAISED_BY_EDITS | {"locality", "neighborhood_success", "locality_conflict", "target_probability", "gold_probability"}
MATRIX_METRIC = "efficacy"
MATRIX_PROTOCOL = "generation"


@dataclass(frozen=True, kw_only=True)
class Studies:
    """What `studies.yaml` knows of names."""

    controls: frozenset[str]
    aspects: Mapping[str, str]  # benchmark, or benchmark/task -> aspect
    safety: frozenset[str]
    balanced: frozenset[str]
    pairs: tuple[Mapping[str, str], ...]
    families: Mapping[str, Mapping[str, float]]
    paper_methods: frozenset[str]
    later_settings: Mapping[str, Mapping[str, Sequence[Any]]] = field(
        default_factory=dict
    )  # method -> settings that the paper does not have
    flat_in_paper: frozenset[str] = frozenset()
    reproductions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # method -> settings of published code, not of the paper
    published_code: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # method -> settings of published code that are no fault
    comparisons: tuple[tuple[str, ...], ...] = ()  # methods that one picture shows together
    forms: tuple[tuple[str, ...], ...] = ()  # benchmarks that ask the same questions in other forms

    def aspect(self, column: Column) -> str:
        """Return the aspect of ability that a column measures; its own name where none is known."""
        named = self.aspects.get(f"{column.benchmark}/{column.task}", self.aspects.get(column.benchmark))
        return named or (column.benchmark if column.task == column.benchmark else f"{column.benchmark} {column.task}").replace("_", " ")

    def is_safety(self, column: Column) -> bool:
        """Return whether a column is a measure of safety."""
        return column.benchmark in self.safety or column.task in self.safety

    def is_balanced(self, column: Column) -> bool:
        """Return whether a column is scored as the mean over the right labels."""
        return column.benchmark in self.balanced or column.task in self.balanced


def studies(path: Path = STUDIES_FILE) -> Studies:
    """Read `studies.yaml`."""
    found = yaml.safe_load(path.read_text())
    return Studies(
        controls=frozenset(found["controls"]),
        aspects={name: aspect for aspect, names in found["aspects"].items() for name in names},
        safety=frozenset(found["safety"]),
        balanced=frozenset(found["balanced"]),
        pairs=tuple(found["pairs"]),
        families={family: {str(name): float(size) for name, size in sizes.items()} for family, sizes in found["families"].items()},
        paper_methods=frozenset(found["paper_methods"]),
        later_settings=found.get("later_settings", {}),
        flat_in_paper=frozenset(found.get("flat_in_paper", ())),
        reproductions=found.get("reproductions", {}),
        published_code=found.get("published_code", {}),
        comparisons=tuple(map(tuple, found.get("comparisons", ()))),
        forms=tuple(map(tuple, found.get("forms", ()))),
    )


@dataclass(kw_only=True)
class Run:
    """One run of a study. `outcomes` holds the items of each ability column at each rung where the samples have them."""

    folder: Path
    model: str
    method: str
    dataset: str
    seed: int
    manifest: Mapping[str, Any]
    table: ScoreTable
    edits: tuple[Mapping[str, Any], ...]
    timings: Mapping[str, float]
    peak_memory_bytes: int | None
    journal_bytes: int
    collapsed_at: int | None  # the edit that broke the model beyond measuring
    known: Studies
    outcomes: dict[tuple[int, Column], Outcomes] = field(default_factory=dict)
    degenerate: dict[tuple[int, str], Degenerate] = field(default_factory=dict)
    retention: dict[int, dict[int, float]] = field(default_factory=dict)  # rung -> position -> share of its prompts answered
    changed: list[Answered] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what of it was left out, and why

    @property
    def rungs(self) -> tuple[int, ...]:
        """Numbers of edits measured."""
        return self.table.rungs

    @property
    def config(self) -> Mapping[str, Any]:
        """The resolved config."""
        found = self.manifest.get("config", {})
        return found if isinstance(found, Mapping) else {}

    @property
    def reproduces_a_fault(self) -> bool:
        """Whether its method is set to do what a published code did wrong: what it shows is that code's, and no claim counts it."""
        return self._is_set_to(self.known.reproductions.get(self.method))

    @property
    def published_settings(self) -> Mapping[str, Any]:
        """The settings by which it is as a published code ran its method, faults aside; none where it is not."""
        settings = self.known.published_code.get(self.method, {})
        return settings if self._is_set_to(settings) else {}

    def _is_set_to(self, settings: Mapping[str, Any] | None) -> bool:
        return settings is not None and all(self.config.get("method", {}).get(name) == value for name, value in settings.items())

    @property
    def is_the_papers(self) -> bool:
        """Whether the paper has its method, and none of its settings makes it a later one."""
        later = self.known.later_settings.get(self.method, {})
        settings = self.config.get("method", {})
        return self.method in self.known.paper_methods and not any(settings.get(name) in values for name, values in later.items())

    def edited_as(self, other: Run) -> bool:
        """Return whether another run edited the same facts at the same steps, as far as both went."""
        theirs = {edit["step"]: edit.get("request_ids") for edit in other.edits}
        return all(edit.get("request_ids") == theirs.get(edit["step"], edit.get("request_ids")) for edit in self.edits)

    @cached_property
    def ability_columns(self) -> tuple[Column, ...]:
        """What measures ability or safety: of each task one share, under one protocol a benchmark; no sums of parts that are shown."""
        shares = [column for column in headline(self.table).columns if _is_ability(self.table, column)]
        kept: list[Column] = []
        for label in dict.fromkeys(column.benchmark_label for column in shares):
            mine = [column for column in shares if column.benchmark_label == label]
            protocols = dict.fromkeys(column.protocol for column in mine)
            protocol = next((name for name in PROTOCOLS_FIRST if name in protocols), mine[0].protocol)
            of_protocol = [column for column in mine if column.protocol == protocol]
            parts = [column for column in of_protocol if column.task not in ("all", column.benchmark)]
            kept += self._one_a_task(parts or of_protocol)
        return tuple(kept)

    def _one_a_task(self, columns: Sequence[Column]) -> Iterable[Column]:
        """Return the first metric of each task, or the balanced accuracy of what is compared by it: two metrics are no two benchmarks."""
        found: dict[str, Column] = {}
        for column in columns:
            found.setdefault(column.task, column)
            if column.metric == BALANCED and self.known.is_balanced(column):
                found[column.task] = column
        return found.values()

    @property
    def broken_at(self) -> int | None:
        """The first number of edits at which the model was beyond measuring: the run ended there, or an ability is no number."""
        scores = [self.table.cells[cell] for cell in self.table.cells if cell[0] > 0 and cell[1] in self.ability_columns]
        steps = [score.num_edits for score in scores if not math.isfinite(score.value)]
        return min([*steps, *([] if self.collapsed_at is None else [self.collapsed_at])], default=None)

    def edit_column(self, metric: str) -> Column | None:
        """Return the column of a measure of edit quality: the generated form where there is one, else the most telling other."""
        order = ("generation", "probability", "teacher_forced")
        found = [column for column in self.table.columns if column.metric == metric and column.protocol in order]
        return min(found, key=lambda column: order.index(column.protocol), default=None)


def read_study(folders: Iterable[Path], known: Studies) -> tuple[Run, ...]:
    """Read every run in which something is measured.

    Raises:
        EditevalError: none is.
    """
    listed = list(folders)
    shared: dict[tuple[str, str, str], Items] = {}
    with _no_search_for_cycles():
        runs = [run for folder in listed if (run := _read_run(folder, known, shared)) is not None]
    if not runs:
        raise EditevalError(f"nothing is measured in {counted(len(listed), 'run')} yet, so there is nothing to report; look with `status`")
    return tuple(sorted(runs, key=lambda run: (run.model, run.method, run.dataset, run.seed, run.folder.name)))


def standing_digests(store: ScoreStore, manifest: Mapping[str, Any], edits: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Return the digest that stands at each rung: by the edit log where it has the rung, else the one measured last."""
    digests = {score.num_edits: score.state_digest for score in store.scores()}
    digests |= {int(edit["num_edits"]): str(edit["digest"]) for edit in edits}
    if "model_fingerprint" in manifest:
        digests[0] = str(manifest["model_fingerprint"])
    return digests


# -- inside ----------------------------------------------------------------------------------------------------------------


@contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """Keep Python from walking over all the records that were read whenever it has read some more: they hold no cycle."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _read_run(folder: Path, known: Studies, shared: dict[tuple[str, str, str], Items]) -> Run | None:
    manifest, edits, store = read_manifest(folder), read_edits(folder), ScoreStore(folder)
    scores, notes = _of_one_setting(store.scores(standing_digests(store, manifest, edits)))
    if not scores:
        return None
    config = manifest.get("config", {})
    model, method, dataset = (str(config.get(group, {}).get("name", folder.name)) for group in ("model", "method", "dataset"))
    run = Run(
        folder=folder,
        model=model,
        method=method,
        dataset=dataset,
        seed=int(config.get("seed", 0)),
        manifest=manifest,
        table=score_table(scores),
        edits=edits,
        timings=read_timings(folder),
        peak_memory_bytes=read_peak_memory(folder),
        collapsed_at=None if (collapse := read_collapse(folder)) is None else int(collapse["step"]),
        known=known,
        journal_bytes=sum(path.stat().st_size for path in (folder / JOURNAL_FOLDER).glob("*")) if (folder / JOURNAL_FOLDER).is_dir() else 0,
        notes=notes,
    )
    _read_items(run, store, scores, known, shared)
    return run


def _of_one_setting(scores: Sequence[Score]) -> tuple[tuple[Score, ...], list[str]]:
    """Return the scores of each benchmark that were measured as those of the lowest rung, and in words what is left out.

    A run that is launched again with another limit or number of shots, at some of its rungs, holds cells that no curve may join.
    """
    own = about_edits(scores)
    keys = {score.benchmark: score.benchmark_key for score in sorted(scores, key=lambda score: -score.num_edits)}
    kept = tuple(score for score in scores if score.benchmark in own or score.benchmark_key == keys[score.benchmark])
    others: dict[str, set[int]] = {}
    for score in scores:
        if score.benchmark not in own and score.benchmark_key != keys[score.benchmark]:
            others.setdefault(score.benchmark, set()).add(score.num_edits)
    notes = [
        f"{benchmark} at {', '.join(map(str, sorted(rungs)))} edits is left out: it was measured with other settings there than before. "
        "Launch the run again with one setting and all its rungs."
        for benchmark, rungs in others.items()
    ]
    return kept, notes


def about_edits(found: Iterable[Score | Column]) -> set[str]:
    """Return the benchmarks that ask about the edits: other requests at every rung and of every seed, which their keys name."""
    return {one.benchmark for one in found if one.metric in RAISED_BY_EDITS}


def _read_items(run: Run, store: ScoreStore, scores: Sequence[Score], known: Studies, shared: dict[tuple[str, str, str], Items]) -> None:
    """Read the samples of each cell once, keep what is compared, and drop the rest."""
    cells = dict.fromkeys((score.num_edits, score.benchmark, score.benchmark_key, score.state_digest) for score in scores)
    base: dict[str, Items] = {}
    last = run.rungs[-1]
    for rung, benchmark, key, digest in cells:
        name = (benchmark, key, digest)
        items = shared.get(name) or _items_of(run, store, rung, benchmark, key)
        if rung == 0 and items.records:
            shared[name] = base[benchmark] = items  # runs of one model share what was asked of it unedited
        run.degenerate[(rung, benchmark)] = items.degenerate
        for column in run.ability_columns:
            score = run.table.cells.get((rung, column))
            if score is not None and (score.benchmark, score.benchmark_key) == (benchmark, key):
                found = items.outcomes(score, balanced=known.is_balanced(column))
                if found is not None:
                    run.outcomes[(rung, column)] = found
        _keep_retention(run, rung, items.records)
        if rung == last and last > 0 and benchmark in base:
            run.changed += changed_items(benchmark, base[benchmark].by_identity, items.records)


def _items_of(run: Run, store: ScoreStore, rung: int, benchmark: str, key: str) -> Items:
    """Return a cell's items: none, and a note, where their file is damaged. Its scores are another file's."""
    try:
        return Items(store.samples(rung, benchmark, key))
    except EditevalError as error:
        run.notes.append(f"The items of {benchmark} at {counted(rung, 'edit')} are left out: {error}.")
        return Items(())


def monitored(run: Run) -> tuple[Column, ...]:
    """Return what warns of a broken model beside its abilities: perplexity, in either unit."""
    return tuple(column for column in run.table.columns if column.metric in ("perplexity", "bits_per_token"))


def _is_ability(table: ScoreTable, column: Column) -> bool:
    values = [value for rung in table.rungs if (value := table.value(rung, column)) is not None and math.isfinite(value)]
    return (
        column.metric not in NOT_ABILITY
        and not column.metric.endswith("log_prob")
        and table.any_score(column).higher_is_better
        and bool(values)
        and all(0 <= value <= 1 for value in values)
    )


def _keep_retention(run: Run, rung: int, records: Sequence[Record]) -> None:
    for record in records:
        if record.get("metric") != MATRIX_METRIC or "position" not in record:
            continue
        found = [value for value in record["outcomes"].get(MATRIX_PROTOCOL, ()) if value is not None]
        if found:
            run.retention.setdefault(rung, {})[int(record["position"])] = sum(found) / len(found)


def relative(path: Path, start: Path) -> str:
    """Return a link from one folder to a path."""
    return Path(os.path.relpath(path, start)).as_posix()

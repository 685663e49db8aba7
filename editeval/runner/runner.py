"""One trajectory: edit fact after fact, stop at every rung, measure.

The runner knows no method and no benchmark by name. It computes an edit, appends it to the journal, and applies
*what the journal holds*; a live run, a resumed run and a replay are therefore the same code path.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from editeval.edits.delta import Edit
from editeval.edits.journal import EditJournal, JournalDiverged, JournalEntry
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.interfaces import (
    AsksInChat,
    Benchmark,
    Callback,
    ChecksModel,
    EditEvent,
    EditMethod,
    Editor,
    EvaluationContext,
    RunState,
    attach,
)
from editeval.runner.results import BaseScores, CellKey, ScoreStore
from editeval.runner.signs import Canary, weight_norm_ratio
from editeval.types import EditError, EditRequest, Evaluation, JournalError, Progress, Score, SilentProgress, content_key, counted, seed_for

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What makes a series of edits the series it is.

    `requests` are in editing order; edit k (1-based) writes requests[(k-1) * batch_size : k * batch_size]. Whatever is
    measured, and however many rungs are asked for, is not part of `edit_key`. `template` is how their prompts are put;
    `chat_template` the tokenizer's, where a benchmark asks in it.
    """

    edit_key: str
    model_fingerprint: str
    requests: tuple[EditRequest, ...]
    batch_size: int
    seed: int
    rungs: tuple[int, ...]
    template: str = "{}"
    chat_template: Any = None

    def batch(self, step: int) -> tuple[EditRequest, ...]:
        """Return the facts of edit `step` (1-based)."""
        return self.requests[(step - 1) * self.batch_size : step * self.batch_size]

    def edited_after(self, num_edits: int) -> tuple[EditRequest, ...]:
        """Return every fact written by the first `num_edits` edits."""
        return self.requests[: num_edits * self.batch_size]


@dataclass(kw_only=True)
class Runner:
    """Walks a trajectory; all its state is on disk, so that it can be killed and started again anywhere."""

    trajectory: Trajectory
    load_model: Callable[[], EditedModel]
    method: EditMethod
    benchmarks: Mapping[str, Benchmark]
    journal: EditJournal
    store: ScoreStore
    base_scores: BaseScores
    cache: Cache
    state: RunState
    callbacks: Sequence[Callback] = ()
    progress: Progress = field(default_factory=SilentProgress)
    _canary: Canary = field(default_factory=Canary, init=False, repr=False)

    def run(self) -> tuple[Score, ...]:
        """Measure every rung and return all scores of this run, in order of rung and benchmark.

        Raises:
            EditError: an edit could not be computed, or changed nothing; the edits before it are kept.
            JournalError: the journal on disk is damaged or holds other facts.
        """
        for callback in self.callbacks:
            callback.on_run_start(self.state)
        try:
            scores = self._walk()
        except BaseException as error:
            for callback in self.callbacks:
                callback.on_exception(self.state, error)
            raise
        for callback in self.callbacks:
            callback.on_run_end(self.state, scores)
        return scores

    def _walk(self) -> tuple[Score, ...]:
        scores: list[Score] = []
        for rung in self.trajectory.rungs:
            reason = self._edit_up_to(rung)
            if reason is not None:
                log.warning("stopped after %d edits: %s; rungs from %d on are not measured", self.model.num_applied, reason, rung)
                self.progress.message(f"stopped after {counted(self.model.num_applied, 'edit')}: {reason}")
                self.state = replace(self.state, stopped=reason)
                break
            self.state = replace(self.state, num_edits=rung, state_digest=self._digest(rung))
            for name, benchmark in self.benchmarks.items():
                scores.extend(self._measure(rung, name, benchmark))
        return tuple(scores)

    # -- editing ---------------------------------------------------------------------------------------------------

    @cached_property
    def model(self) -> EditedModel:
        """The model; loaded when the first edit or measurement that is not on disk needs it."""
        model = self.load_model()
        for name, benchmark in self.benchmarks.items():
            to_measure = any(len(self.journal) < rung or not self._is_measured(rung, name) for rung in self.trajectory.rungs)
            if to_measure and isinstance(benchmark, ChecksModel):
                benchmark.check_model(model)  # before hours of other work
        return model

    @cached_property
    def _editor(self) -> Editor:
        with self.model.unedited():
            return self.method.prepare(self.model, self.cache, self.progress)

    def _digest(self, num_edits: int) -> str:
        """Name the state after `num_edits` edits; the unedited state is named by the model alone, so all runs share it."""
        return self.trajectory.model_fingerprint if num_edits == 0 else self.journal.digest_at(num_edits)

    def _edit_up_to(self, rung: int) -> str | None:
        """Make sure that the journal reaches `rung`; return why a callback stopped the trajectory, or None."""
        if len(self.journal) >= rung and all(self._is_measured(rung, name) for name in self.benchmarks):
            return None
        return self._advance(rung)

    def _advance(self, rung: int) -> str | None:
        """Bring the model to the state after `rung` edits: replay what the journal holds, compute the rest."""
        if rung > 0:
            attach(self.method, self.model, self.cache, self.progress)
        while self.model.num_applied < rung:
            try:
                reason = self._step()
            except JournalDiverged:
                # Another process took this trajectory over and an edit that we had applied was superseded: replay what stands.
                log.warning("another process continued this trajectory from an earlier edit; replaying what it wrote")
                self.model.restore()
                continue
            if reason is not None:
                return reason
        return None

    def _step(self) -> str | None:
        step = self.model.num_applied + 1
        requests = self.trajectory.batch(step)
        ids = tuple(request.request_id for request in requests)
        for callback in self.callbacks:
            callback.on_edit_start(self.state, requests)
        if step > len(self.journal):
            self.journal.refresh()  # another process may have been faster: adopt its edit instead of computing it again
        replayed = step <= len(self.journal)
        diagnostics: Mapping[str, float] = {}
        if replayed:
            entry = self.journal.entry(step)
        else:
            edit, seconds = self._compute(step, requests)
            broken = _non_finite(edit)
            if broken is not None:
                return f"edit {step} ({', '.join(ids)}) computed a non-finite update of {broken}"
            self._require_effect(edit, ids)
            entry, diagnostics = self.journal.append(ids, edit, seconds), edit.diagnostics
        if entry.request_ids != ids:
            raise JournalError(
                f"the journal's edit {step} is about {', '.join(entry.request_ids)}, but {', '.join(ids)} is edited there; "
                f"move the folder {self.state.run_dir} away and run again"
            )
        self.model.apply(entry.edit)
        return self._tell(entry, replayed=replayed, diagnostics=diagnostics)

    def _compute(self, step: int, requests: tuple[EditRequest, ...]) -> tuple[Edit, float]:
        editor = self._editor
        started = time.perf_counter()
        edit = editor.edit(requests, seed=seed_for(self.trajectory.edit_key, step))
        return edit, time.perf_counter() - started

    def _require_effect(self, edit: Edit, request_ids: tuple[str, ...]) -> None:
        """Refuse, before it is recorded, an edit that would change nothing or does not fit the model."""
        try:
            self.model.check(edit)
        except EditError as error:
            raise EditError(str(error), request_ids=request_ids) from error

    def _tell(self, entry: JournalEntry, *, replayed: bool, diagnostics: Mapping[str, float]) -> str | None:
        self.state = replace(self.state, num_edits=entry.step, state_digest=entry.digest)
        event = EditEvent(
            step=entry.step,
            num_edits=entry.step,
            request_ids=entry.request_ids,
            seconds=entry.seconds,
            digest=entry.digest,
            weights_digest=self.model.weights_digest(),
            replayed=replayed,
            diagnostics=diagnostics,
            weight_norm_ratio=None if replayed else weight_norm_ratio(self.model),
            canary_ratio=None if replayed or entry.step not in self.trajectory.rungs else self._canary.ratio(self.model),
        )
        reasons = [callback.on_edit_end(self.state, event, self.model) for callback in self.callbacks]
        return next((reason for reason in reasons if reason is not None), None)

    # -- measuring -------------------------------------------------------------------------------------------------

    def _context(self, rung: int) -> EvaluationContext:
        return EvaluationContext(
            num_edits=rung,
            edited=self.trajectory.edited_after(rung),
            planned=self.trajectory.edited_after(self.trajectory.rungs[-1]),
            seed=self.trajectory.seed,
            cache=self.cache,
            progress=self.progress,
            template=self.trajectory.template,
        )

    @cached_property
    def _settings(self) -> Mapping[str, Mapping[str, Any]]:
        return {name: benchmark.settings() for name, benchmark in self.benchmarks.items()}

    def _benchmark_key(self, rung: int, name: str) -> str:
        benchmark = self.benchmarks[name]
        content: dict[str, Any] = {"class": type(benchmark).__qualname__, "settings": self._settings[name]}
        if benchmark.depends_on_requests:
            context = self._context(rung)
            asked = context.edited or context.planned
            content["requests"] = [[request.request_id, request.source_hash or content_key(request)] for request in asked]
        if isinstance(benchmark, AsksInChat) and benchmark.asks_in_chat:
            content["chat_template"] = self.trajectory.chat_template
        return content_key(content)

    def _is_measured(self, rung: int, name: str) -> bool:
        return self.store.has(self._cell(rung, name))

    def _cell(self, rung: int, name: str) -> CellKey:
        return CellKey(num_edits=rung, benchmark=name, benchmark_key=self._benchmark_key(rung, name), state_digest=self._digest(rung))

    def _measure(self, rung: int, name: str, benchmark: Benchmark) -> tuple[Score, ...]:
        cell = self._cell(rung, name)
        for callback in self.callbacks:
            callback.on_evaluation_start(self.state, name)
        if not self.store.has(cell):
            evaluation, seconds = self._evaluate(rung, benchmark, cell.benchmark_key)
            self.store.record(evaluation, seconds=seconds, **cell._asdict())
        self.store.make_current(cell)
        scores = self.store.cell(cell)
        for callback in self.callbacks:
            callback.on_evaluation_end(self.state, name, scores)
        return scores

    def _evaluate(self, rung: int, benchmark: Benchmark, key: str) -> tuple[Evaluation, float]:
        """Measure, or find the unedited model's result that another run, or this one at rung 0, measured.

        Edits that change nothing (a control's) leave the unedited model.
        """
        unedited = rung == 0 or (not benchmark.depends_on_requests and self.model.is_unedited)
        if unedited:
            found = self.base_scores.get(self.trajectory.model_fingerprint, key)
            if found is not None:
                return found
        if self.model.num_applied != rung:
            raise AssertionError(f"the model holds {self.model.num_applied} edits, not {rung}")
        started = time.perf_counter()
        evaluation = benchmark.evaluate(self.model, self._context(rung))
        seconds = time.perf_counter() - started
        if unedited:
            self.base_scores.put(self.trajectory.model_fingerprint, key, evaluation, seconds)
        return evaluation, seconds


def _non_finite(edit: Edit) -> str | None:
    """Return which parameter or site gets NaN or infinity, or None; such an edit would end every measurement after it."""
    for delta in edit.deltas:
        for name, value in vars(delta).items():
            if isinstance(value, torch.Tensor) and not bool(torch.isfinite(value).all()):
                return str(getattr(delta, "parameter", None) or getattr(delta, "site", None) or name)
    return None

"""General ability in a minute: four small multiple-choice tasks and the perplexity of a passage, all within the package.

Written so that a model of 135M parameters is above chance on them, so that damage can be seen; see `tasks/quick` and `data/quick`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from editeval.benchmarks.harness_tasks import BUILT_IN
from editeval.benchmarks.lm_harness import HarnessBenchmark
from editeval.benchmarks.perplexity import Perplexity
from editeval.inference.edited import EditedModel
from editeval.interfaces import Benchmark, EvaluationContext
from editeval.types import Evaluation


@dataclass(frozen=True, kw_only=True)
class QuickBenchmark:
    """World knowledge, arithmetic, commonsense and reading by the texts of the choices, and token perplexity.

    `limit` is a number of items a task (None: all); `max_characters` bounds the passage.
    """

    limit: int | None
    max_characters: int | None
    seed: int

    @property
    def depends_on_requests(self) -> bool:
        """False: the questions are the same whatever was edited."""
        return False

    def check(self) -> None:
        """Read every item and the passage; raises DatasetError where one is damaged."""
        for part in self._parts:
            part.check()

    def settings(self) -> Mapping[str, Any]:
        """Return the settings of both parts."""
        return {"benchmark": "quick", "parts": [part.settings() for part in self._parts]}

    def evaluate(self, model: EditedModel, context: EvaluationContext) -> Evaluation:
        """Ask every item, then read the passage."""
        evaluations = [part.evaluate(model, context) for part in self._parts]
        return Evaluation(
            measurements=tuple(measurement for evaluation in evaluations for measurement in evaluation.measurements),
            samples=tuple(sample for evaluation in evaluations for sample in evaluation.samples),
        )

    @cached_property
    def _parts(self) -> tuple[Benchmark, ...]:
        tasks = HarnessBenchmark(
            name="quick",
            task="all",
            protocol="cloze",
            task_folder="quick",
            stock_folder=None,
            data=BUILT_IN,
            data_folder="quick",
            limit=self.limit,
            num_fewshot=None,
            report_subtasks=True,
            seed=self.seed,
        )
        return tasks, Perplexity(text_file=None, max_characters=self.max_characters)

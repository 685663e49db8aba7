"""From the harness's result dictionaries to measurements and per-item records."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import numpy

from editeval.benchmarks.degeneracy import (
    MAX_CLASSES,
    Answered,
    balanced,
    degenerate_reasons,
    is_unended,
    plain_answer,
    scores_by_answer,
    top_answer_share,
)
from editeval.benchmarks.estimates import mean_and_stderr
from editeval.benchmarks.harness_engine import generation_settings
from editeval.types import Measurement, content_key

_GUESSABLE = ("acc", "acc_norm", "acc_bytes", "exact_match")  # the metrics that guessing scores something on
_NO_VERSION = (None, "N/A", "Yaml")  # what the harness says of a task that has none
_TEMPLATE = (  # the fields of a task that its prompts and the reading of its answers depend on
    "description",
    "doc_to_text",
    "doc_to_choice",
    "doc_to_target",
    "process_docs",
    "process_results",
    "target_delimiter",
    "fewshot_delimiter",
    "fewshot_config",
    "gen_prefix",
    "generation_kwargs",
    "filter_list",
    "output_type",
)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How results are read: in which protocol, what guessing scores on a row, how prompts were put, how text is cut into tokens."""

    protocol: str
    chance: Callable[[Mapping[str, Any]], float] | None
    prompt: str
    tokens: Callable[[str], Sequence[Hashable]]


@dataclass(frozen=True, kw_only=True)
class _Items:
    """The items of one reported name: of a task, or of all tasks of a group."""

    tasks: Sequence[Any]
    records: Sequence[tuple[Any, Mapping[str, Any]]]  # (task, what the harness logged)
    reading: Reading

    def under(self, filter_name: str) -> list[tuple[Any, Mapping[str, Any]]]:
        return [(task, record) for task, record in self.records if record["filter"] == filter_name]


def measurements(results: Mapping[str, Any], loaded: Mapping[str, Any], names: Iterable[str], reading: Reading) -> Iterator[Measurement]:
    """Yield the metrics of these tasks and groups, and beside them what an accuracy hides (`degeneracy.py`).

    `gold_probability`, for multiple choice, is the softmax over the choices' summed log-probabilities, at the right one: it moves
    long before an accuracy does.
    """
    for name in names:
        tasks = _leaves(name, loaded)
        items = _Items(
            tasks=tasks,
            records=[(task, record) for task in tasks for record in results["samples"][task.task_name]],
            reading=reading,
        )
        number = results["versions"].get(name)
        measured = partial(
            Measurement,
            task=name,
            protocol=reading.protocol,
            version="1" if number in _NO_VERSION else str(number),
            shots=_common([task.get_config("num_fewshot") for task in tasks]),
            template=_template_hash(tasks, reading),
        )
        values = results["groups"][name] if name in loaded.get("groups", {}) else results["results"][name]
        for metric, filter_name, key in sorted(_metric_keys(values), key=lambda found: _rank(tasks[0], found[0])):
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            directions = [results["higher_is_better"].get(task.task_name, {}).get(metric) for task in tasks]
            answered = [(task, record) for task, record in items.under(filter_name) if metric in record]
            yield measured(
                metric=metric if filter_name == "none" else f"{metric}_{filter_name.replace('-', '_')}",
                value=float(values[key]),
                n=len(answered),
                stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                chance=_chance(answered, reading) if metric in _GUESSABLE else None,
                higher_is_better=directions[0] is not False,
            )
        yield from _beside(items, measured)


def _beside(items: _Items, measured: Callable[..., Measurement]) -> Iterator[Measurement]:
    """Yield the numbers that stand beside an accuracy, each where it has a meaning."""
    gold = [value for task, record in items.records if (value := _gold_probability(task, record)) is not None]
    if gold:
        mean, stderr = mean_and_stderr(gold)
        yield measured(metric="gold_probability", value=mean, n=len(gold), stderr=stderr)
    answered = _answered(items)
    classes = {item.right for item in answered}
    if 2 <= len(classes) <= MAX_CLASSES:
        mean, stderr = balanced(answered)
        yield measured(metric="balanced_accuracy", value=mean, n=len(answered), stderr=stderr, chance=1 / len(classes))
        share = top_answer_share(answered)
        yield measured(metric="top_answer_share", value=share, n=len(answered), higher_is_better=False)
    if len(classes) == 2:  # which of the two it is that a balanced accuracy gained or lost, such as refusals where they are due
        for right, scores in sorted(scores_by_answer(answered).items()):
            mean, stderr = mean_and_stderr(scores)
            yield measured(metric=f"recall_{re.sub(r'[^a-z0-9]+', '_', plain_answer(right))}", value=mean, n=len(scores), stderr=stderr)
    written = [_signs(record, items.reading) for task, record in _first_filter(items) if task.OUTPUT_TYPE == "generate_until"]
    for metric, sign in (("degenerate_rate", "degenerate"), ("unended_rate", "unended")):
        if written:
            mean, stderr = mean_and_stderr([float(bool(signs[sign])) for signs in written])
            yield measured(metric=metric, value=mean, n=len(written), stderr=stderr, higher_is_better=False)


def item_records(
    results: Mapping[str, Any], loaded: Mapping[str, Any], reading: Reading, *, with_questions: bool
) -> Iterator[dict[str, Any]]:
    """Yield one record an item and filter: which item, what was answered, every metric's value. Prompts are kept as hashes.

    The question itself is as long as all the rest, and the same at every rung: one rung `with_questions` is enough for those who read them.
    """
    for name, task in loaded["tasks"].items():
        for record in results["samples"][name]:
            yield {
                "task": name,
                "item": record["doc_id"],
                "item_hash": record["doc_hash"],
                "prompt_hash": record["prompt_hash"],
                "filter": record["filter"],
                "target": _plain(record["target"]),
                "metrics": {metric: _plain(record[metric]) for metric in record["metrics"]},
                **_answer(task, record, reading),
                **(_question(task, record) if with_questions else {}),
            }


def reported(loaded: Mapping[str, Any], *, subtasks: bool) -> list[str]:
    """Return the groups and tasks whose numbers are measurements: those that no aggregated group sums up, or all of them."""
    groups = {name: group for name, group in loaded.get("groups", {}).items() if group.has_aggregation}
    if subtasks:
        return [*groups, *loaded["tasks"]]
    inner = {part.name for group in groups.values() for part in group.get_all_groups()}
    inner |= {task.task_name for group in groups.values() for task in group.get_all_tasks()}
    return [name for name in (*groups, *loaded["tasks"]) if name not in inner]


# -- tasks -----------------------------------------------------------------------------------------------------------------


def _leaves(name: str, loaded: Mapping[str, Any]) -> list[Any]:
    group = loaded.get("groups", {}).get(name)
    return [loaded["tasks"][name]] if group is None else list(group.get_all_tasks())


def _metric_keys(values: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (metric, filter, key) of the values, whose keys read `metric,filter`; errors and counts are no metrics."""
    for key, value in values.items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            yield metric, filter_name, key


def _rank(task: Any, metric: str) -> int:
    """Return a metric's place in the task's own list, which names the main one first; the harness reports them in a fixed order."""
    listed = [entry["metric"] for entry in task.get_config("metric_list") or ()]
    return listed.index(metric) if metric in listed else len(listed)


def _common(values: Sequence[int | None]) -> int | None:
    """Return what all tasks of a group agree on, or None."""
    return values[0] if len(set(values)) == 1 else None


def _template_hash(tasks: Sequence[Any], reading: Reading) -> str:
    """Return a short hash of all that the prompts and the reading of answers depend on, beside the rows."""
    fields = [{key: value for key, value in task.dump_config().items() if key in _TEMPLATE} for task in tasks]
    return content_key([json.dumps(fields, sort_keys=True, default=_source), reading.prompt])[:12]


def _source(value: Any) -> str:
    """Return a function of a task file as its source: its address would be another one in each process."""
    return inspect.getsource(value) if inspect.isroutine(value) or inspect.isclass(value) else type(value).__name__


def _is_plain_choice(task: Any) -> bool:
    """Whether each item has fixed choices of which one is right, scored by the harness's own rule."""
    return task.OUTPUT_TYPE == "multiple_choice" and not task.multiple_target and not callable(task.get_config("process_results"))


# -- items -----------------------------------------------------------------------------------------------------------------


def _chance(records: Sequence[tuple[Any, Mapping[str, Any]]], reading: Reading) -> float | None:
    """Return what guessing scores, averaged over the items asked; None where nothing says it."""
    if records and all(_is_plain_choice(task) for task, _ in records):
        return fmean(1 / len(task.doc_to_choice(record["doc"])) for task, record in records)
    if records and reading.chance is not None:
        return fmean(reading.chance(record["doc"]) for _, record in records)
    return None


def _first_filter(items: _Items) -> list[tuple[Any, Mapping[str, Any]]]:
    """Return every item once: as the first of its task's filters has it."""
    first = {id(task): record["filter"] for task, record in reversed(items.records)}
    return [(task, record) for task, record in items.records if record["filter"] == first[id(task)]]


def _answered(items: _Items) -> list[Answered]:
    """Return the items whose possible answers are the same for all of them; empty where choices differ or nothing was parsed."""
    found: list[Answered] = []
    for task, record in _first_filter(items):
        score = next((float(record[metric]) for metric in _GUESSABLE if metric in record["metrics"]), None)
        if score is None:
            return []
        if _is_plain_choice(task) and not task.multiple_input and isinstance(task.get_config("doc_to_choice"), list):
            choices, gold = task.doc_to_choice(record["doc"]), _gold_index(task, record)
            log_probs = _log_probs(record)[: len(choices)]
            right, given = choices[gold], choices[max(range(len(log_probs)), key=log_probs.__getitem__)]
        elif task.OUTPUT_TYPE == "generate_until" and isinstance(record["target"], str) and _is_guessable(record, items.reading):
            right, given = plain_answer(record["target"]), plain_answer(str(record["filtered_resps"][0]))
        else:
            return []
        found.append(Answered(right=right, given=given, score=score))
    return found


def _is_guessable(record: Mapping[str, Any], reading: Reading) -> bool:
    return reading.chance is not None and reading.chance(record["doc"]) > 0


def _gold_index(task: Any, record: Mapping[str, Any]) -> int:
    """Return the place of the right choice, or -1."""
    target = record["target"]
    choices = task.doc_to_choice(record["doc"])
    if isinstance(target, (int, numpy.integer)):
        return int(target)
    return choices.index(target) if target in choices else -1


def _gold_probability(task: Any, record: Mapping[str, Any]) -> float | None:
    if not _is_plain_choice(task) or task.multiple_input:
        return None
    gold = _gold_index(task, record)
    log_probs = _log_probs(record)[: len(task.doc_to_choice(record["doc"]))]
    if not 0 <= gold < len(log_probs):
        return None
    highest = max(log_probs)
    weights = [math.exp(log_prob - highest) for log_prob in log_probs]
    return weights[gold] / math.fsum(weights)


def _signs(record: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    """Return why a written text is degenerate, if it is, and whether it ran into its bound."""
    text = record["resps"][0][0]
    tokens = reading.tokens(text)
    bound, _ = generation_settings(record["arguments"][0][1])
    return {"degenerate": list(degenerate_reasons(text, tokens)), "unended": is_unended(tokens, max_new_tokens=bound)}


def _log_probs(record: Mapping[str, Any]) -> list[float]:
    return [float(answers[0][0]) for answers in record["resps"]]


def _answer(task: Any, record: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    """Return what the model answered: log-probabilities of the choices, or the text, what was read from it, and its signs."""
    if task.OUTPUT_TYPE == "generate_until":
        return {"generated": record["resps"][0][0], "answer": _plain(record["filtered_resps"][0]), **_signs(record, reading)}
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return {"log_probs": [float(record["resps"][0][0])]}
    return {"log_probs": _log_probs(record)}


def _question(task: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was asked, without the examples before it; of a choice also the choices, and the place of the right one if one is."""
    text = task.doc_to_text(record["doc"])
    if task.OUTPUT_TYPE != "multiple_choice":
        return {"question": str(text)}
    choices = [str(choice) for choice in task.doc_to_choice(record["doc"])]
    if task.multiple_input:  # each choice begins the text that the target ends, and the task's text is the place of the right one
        return {"question": f"… {record['target']}", "choices": choices, "right": int(text)}
    right = -1 if task.multiple_target else _gold_index(task, record)
    return {"question": str(text), "choices": choices, "right": right if 0 <= right < len(choices) else None}


def _plain(value: Any) -> Any:
    """Return a metric's value as JSON: numpy scalars become Python's, tuples lists."""
    if isinstance(value, (numpy.generic, numpy.ndarray)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value

"""From the harness's result dictionaries to measurements and per-item records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy

from editeval.benchmarks.estimates import mean_and_stderr
from editeval.types import Measurement

_GUESSABLE = ("acc", "acc_norm", "acc_bytes")  # the metrics that picking a choice blindly would score 1 / choices on


def measurements(results: Mapping[str, Any], loaded: Mapping[str, Any], names: Iterable[str], *, protocol: str) -> Iterator[Measurement]:
    """Yield the metrics of these tasks and groups, and for multiple choice the mean probability of the right choice.

    `gold_probability` is ours: the softmax over the choices' summed log-probabilities, at the right one. It moves long before an
    accuracy does.
    """
    for name in names:
        leaves = _leaves(name, loaded)
        values = results["groups"][name] if name in loaded.get("groups", {}) else results["results"][name]
        number = results["versions"].get(name)
        task_version = "1" if number in (None, "N/A") else str(number)
        for metric, filter_name, key in sorted(_metric_keys(values), key=lambda found: _rank(leaves[0], found[0])):
            stderr = values.get(f"{metric}_stderr,{filter_name}")
            directions = [results["higher_is_better"].get(task.task_name, {}).get(metric) for task in leaves]
            yield Measurement(
                task=name,
                metric=metric if filter_name == "none" else f"{metric}_{filter_name.replace('-', '_')}",
                protocol=protocol,
                value=float(values[key]),
                n=sum(_count(results["samples"][task.task_name], metric, filter_name) for task in leaves),
                stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                chance=_chance(leaves, results) if metric in _GUESSABLE else None,
                higher_is_better=directions[0] is not False,
                version=task_version,
            )
        gold = [
            value
            for task in leaves
            for record in results["samples"][task.task_name]
            if (value := _gold_probability(task, record)) is not None
        ]
        if gold:
            mean, error = mean_and_stderr(gold)
            yield Measurement(
                task=name, metric="gold_probability", protocol=protocol, value=mean, n=len(gold), stderr=error, version=task_version
            )


def item_records(results: Mapping[str, Any], loaded: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield one record an item and filter: which item, what was answered, every metric's value. Prompts are kept as hashes."""
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
                **_answer(task, record),
            }


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


def _count(records: Sequence[Mapping[str, Any]], metric: str, filter_name: str) -> int:
    return sum(1 for record in records if record["filter"] == filter_name and metric in record)


def _is_plain_choice(task: Any) -> bool:
    """Whether each item has fixed choices of which one is right, scored by the harness's own rule."""
    return task.OUTPUT_TYPE == "multiple_choice" and not task.multiple_target and not callable(task.get_config("process_results"))


def _chance(leaves: Sequence[Any], results: Mapping[str, Any]) -> float | None:
    """Return the expected accuracy of picking blindly, averaged over the items asked; None where that has no meaning."""
    if not all(_is_plain_choice(task) for task in leaves):
        return None
    return fmean(1 / len(task.doc_to_choice(record["doc"])) for task in leaves for record in results["samples"][task.task_name])


def _gold_probability(task: Any, record: Mapping[str, Any]) -> float | None:
    if not _is_plain_choice(task) or task.multiple_input:
        return None
    choices = task.doc_to_choice(record["doc"])
    gold = record["target"] if isinstance(record["target"], int) else choices.index(record["target"]) if record["target"] in choices else -1
    log_probs = _log_probs(record)[: len(choices)]
    if not 0 <= gold < len(log_probs):
        return None
    highest = max(log_probs)
    weights = [math.exp(log_prob - highest) for log_prob in log_probs]
    return weights[gold] / math.fsum(weights)


def _log_probs(record: Mapping[str, Any]) -> list[float]:
    return [float(answers[0][0]) for answers in record["resps"]]


def _answer(task: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the model answered: log-probabilities of the choices, or the text."""
    if task.OUTPUT_TYPE == "generate_until":
        return {"generated": record["resps"][0][0]}
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return {"log_probs": [float(record["resps"][0][0])]}
    return {"log_probs": _log_probs(record)}


def _plain(value: Any) -> Any:
    """Return a metric's value as JSON: numpy scalars become Python's, tuples lists."""
    if isinstance(value, (numpy.generic, numpy.ndarray)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value

"""Single items before and after the edits: what was asked, what was right, what the model said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from editeval.report.items import Record, choice, identity

MAX_CHANGED = 60  # items of one task or metric of a run that are kept for looking at
GENERATED = "generation"


@dataclass(frozen=True, kw_only=True)
class Answered:
    """An item that was answered rightly before the edits and wrongly after them, or the other way round."""

    benchmark: str
    name: str
    question: str  # with its choices, where they are not in it; empty where the samples do not hold it
    expected: str
    before: str
    after: str
    passed_before: bool
    passed_after: bool


def changed_items(benchmark: str, earlier: Mapping[tuple[str, ...], Record], after: Sequence[Record]) -> list[Answered]:
    """Return items that changed, and every fact, with what the unedited model answered to the same."""
    found: list[Answered] = []
    counts: Counter[str] = Counter()
    for record in after:
        kept = f"{record.get('task')}{record.get('metric')}"
        if counts[kept] >= MAX_CHANGED:
            continue
        old = earlier.get(identity(record))
        now, then = _verdict(record), None if old is None else _verdict(old)
        if old is None or now is None or then is None:
            continue
        if now == then and "position" not in record:
            continue
        counts[kept] += 1
        about = _about_fact(benchmark, record) if "position" in record else _about_item(benchmark, record, old)
        found.append(Answered(**about, before=_said(old, of=old), after=_said(record, of=old), passed_before=then, passed_after=now))
    return found


def _about_fact(benchmark: str, record: Record) -> dict[str, str]:
    return {
        "benchmark": f"{benchmark}: {record['metric']}",
        "name": str(record["request_id"]),
        "question": str(record["prompts"][0]),
        "expected": str(record["expected"][0]),
    }


def _about_item(benchmark: str, record: Record, old: Record) -> dict[str, str]:
    """Return what is asked: the unedited model's item holds its question, unless it was measured before questions were kept."""
    choices, right = old.get("choices", ()), old.get("right")
    question = str(old.get("question", ""))
    if not all(choice in question for choice in choices):
        question = "\n".join([question, *(f"– {choice.strip()}" for choice in choices)])
    return {
        "benchmark": benchmark,
        "name": f"{record['task']}, item {record['item']}",
        "question": question.strip(),
        "expected": str(record.get("target", "")) if right is None else choices[right].strip(),
    }


def _verdict(record: Record) -> bool | None:
    if "position" in record:
        found = record.get("outcomes", {}).get(GENERATED) or record.get("outcomes", {}).get("probability")
        return None if not found or found[0] is None else bool(found[0] > 0.5)
    values = [value for value in record.get("metrics", {}).values() if isinstance(value, (int, float))]
    return bool(values[0] > 0.5) if values else None


def _said(record: Record, *, of: Record) -> str:
    """Return what a model wrote, or the choice that it made among those that the item of the unedited model names."""
    generated = record.get("generated")
    if generated:
        return str(generated if isinstance(generated, str) else generated[0]).strip()
    picked, choices = choice(record), of.get("choices", ())
    if picked is None:
        return ""
    return choices[picked].strip() if picked < len(choices) else f"choice {picked}"

"""Whether rows make prompts, and a model can read these: told in one sentence, before the first forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError

from editeval.benchmarks.harness_engine import generation_settings
from editeval.inference.edited import EditedModel
from editeval.types import ConfigError, DatasetError

ON_LONG_CONTEXT = ("error", "truncate")
EXTRA_TOKENS = 4  # beginning of sequence and the blank that some tokenizers put before a text


def check_contexts_fit(model: EditedModel, requests: Iterable[Any], *, benchmark: str) -> None:
    """Count the tokens of every prompt that could be too long, with what follows it.

    Raises:
        ConfigError: some prompt and its continuation, or the tokens to be written after it, need more than the model's positions.
    """
    positions = model.lm.description.max_positions
    needed: dict[str, int] = {}  # text -> positions that must be left after it
    total = 0
    for request in requests:
        if request.request_type == "loglikelihood_rolling":
            continue  # read in windows
        writes = generation_settings(request.args[1])[0] if request.request_type == "generate_until" else 0
        text = request.args[0] if writes else request.args[0] + request.args[1]
        total += 1
        # A token is at least one byte, so that most prompts need no counting.
        if len(text.encode()) + EXTRA_TOKENS + writes > positions:
            needed[text] = max(writes, needed.get(text, 0))
    if not needed:
        return
    tokens = model.lm.tokenizer(list(needed), verbose=False)["input_ids"]
    # The last token of a continuation is never read.
    sizes = [len(ids) + writes - (0 if writes else 1) for ids, writes in zip(tokens, needed.values(), strict=True)]
    too_long = sum(size > positions for size in sizes)
    if too_long:
        writes = max(needed.values())
        written = f", {writes} of which are to be written; lower benchmark.{benchmark}.max_new_tokens or num_fewshot" if writes else ""
        raise ConfigError(
            f"benchmark {benchmark}: {too_long} of {total} prompts are longer than the {positions} positions of "
            f"{model.lm.description.name} (the longest needs {max(sizes)}{written}); "
            f"set benchmark.{benchmark}.on_long_context=truncate to cut them on the left, as lm-eval does"
        )


@contextmanager
def rows_become_prompts(benchmark: str) -> Iterator[None]:
    """Within the context, what the harness stumbles over in a row (a field that it lacks, a label that is no choice) is one sentence.

    Raises:
        DatasetError: such a row.
    """
    try:
        yield
    except (TemplateError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DatasetError(
            f"benchmark {benchmark}: its rows do not have the fields that the task asks of them ({reason}); "
            f"compare them with a row of the data set on the hub, or correct benchmark.{benchmark}.data_folder"
        ) from error


def check_no_nulls(config: Mapping[str, Any], rows: Mapping[int, Mapping[str, Any]], *, task: str, file: Path, env: Environment) -> None:
    """Look at rows (by line) that hold a null: where the task's prompt, choices or answer would be made of it, it would read "None".

    `env` is what the harness renders with. A task that makes its rows in Python is left alone: what it makes of a null is not known here.

    Raises:
        DatasetError: such a row.
    """
    if config.get("process_docs") is not None:
        return
    strict = env.overlay(finalize=_no_null)
    used = [(name, config[name]) for name in ("doc_to_text", "doc_to_choice", "doc_to_target") if isinstance(config.get(name), str)]
    for number, row in rows.items():
        if not _holds_null(row):
            continue
        for name, template in used:
            try:
                if template in row:
                    _no_null(row[template])
                else:
                    strict.from_string(template).render(**row)
            except _NullError as error:
                raise DatasetError(
                    f"{file}, line {number}: {name} of task {task} is made of a field that is null there; fill it, or leave the row out"
                ) from error
            except (TemplateError, LookupError, TypeError, ValueError):
                continue  # told of with the prompts


def check_answers(task: Any, chosen: Sequence[int] | None) -> None:
    """Look at the right answer of each item of a multiple-choice task: the harness reads it only after the item was asked.

    Raises:
        ValueError: an item whose answer is none of its choices.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or task.multiple_input:
        return
    asked = None if chosen is None else frozenset(chosen)
    for number, row in enumerate(task.eval_docs):
        if asked is not None and number not in asked:
            continue
        choices, answer = task.doc_to_choice(row), task.doc_to_target(row)
        for part in answer if isinstance(answer, list) else [answer]:
            if part not in choices and not (isinstance(part, int) and 0 <= part < len(choices)):
                raise ValueError(f"item {number + 1} has the answer {answer!r}, which is none of its {len(choices)} choices")


class _NullError(Exception):
    """A null where a text belongs."""


def _no_null(value: Any) -> Any:
    """Return a value; raises _NullError for a null, and for a list with one."""
    if value is None or (isinstance(value, (list, tuple)) and None in value):
        raise _NullError
    return value


def _holds_null(value: Any) -> bool:
    """Return whether a null is anywhere in a row."""
    if isinstance(value, Mapping):
        return any(map(_holds_null, value.values()))
    return any(map(_holds_null, value)) if isinstance(value, list) else value is None

"""Raw rows to requests: reading JSON and JSON lines, checked access to fields, and one report of what is wrong where.

A data set says how one row becomes an `EditRequest`; everything that all data sets must refuse (a missing or empty field, a
wrong type, a subject that is not in its prompt, a duplicate id, a torn line) is refused here, with file, row number and reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editeval.datasets.text import is_word_character, normalize_answer
from editeval.types import DatasetError, EditRequest, Probe, content_key

ON_BAD_ROW = ("error", "skip")
REPORTED_ROWS = 5


class RowError(DatasetError):
    """What is wrong with one row; whoever reads the file adds file and row number."""


@dataclass(frozen=True, kw_only=True)
class RowNote:
    """A remark on one row of a file; rows are counted from 1 (in JSON lines: the line's number)."""

    file: str
    number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file} row {self.number}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class LoadedRows:
    """What a data set gave: its requests in file order, the rows left out and why, and remarks on rows that were kept."""

    requests: tuple[EditRequest, ...]
    skipped: tuple[RowNote, ...] = ()
    notes: tuple[RowNote, ...] = ()

    def summary(self) -> str:
        """Return one sentence for the log: how many rows were kept and left out, with the first reasons."""
        kept = f"{len(self.requests)} rows kept, {len(self.skipped)} left out"
        return f"{kept} ({_first(self.skipped)})" if self.skipped else kept


@dataclass(frozen=True, kw_only=True)
class Row:
    """One raw row, or an object inside it (`path` says which), with checked access to its fields.

    A field whose value is null counts as missing: tables from the hub have no other way to leave one out. Texts are returned
    without white space at their ends; inside, they are as in the source.
    """

    fields: Mapping[str, Any]
    file: str
    number: int
    path: str = ""

    def has(self, *names: str) -> bool:
        """Return whether every one of these fields is there."""
        return all(self.fields.get(name) is not None for name in names)

    def text(self, name: str) -> str:
        """Return a field that must be text with something in it.

        Raises:
            RowError: missing, not text, or empty.
        """
        value = self._required(name)
        if not isinstance(value, str):
            raise RowError(f"field {self.path}{name} must be text; got {_described(value)}")
        if not value.strip():
            raise RowError(f"field {self.path}{name} is empty")
        return value.strip()

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a field that must be a text or a list of texts, none of them empty; the list may be empty.

        Raises:
            RowError: missing, of another type, or with an empty text in it.
        """
        value = self._required(name)
        if isinstance(value, str):
            return (self.text(name),)
        if not isinstance(value, (list, tuple)):
            raise RowError(f"field {self.path}{name} must be a text or a list of texts; got {_described(value)}")
        for index, entry in enumerate(value):
            if not isinstance(entry, str) or not entry.strip():
                raise RowError(f"field {self.path}{name}[{index}] must be text with something in it; got {_described(entry)}")
        return tuple(entry.strip() for entry in value)

    def inner(self, name: str) -> Row:
        """Return a field that must be an object with fields of its own.

        Raises:
            RowError: missing or no object.
        """
        return self._as_row(self._required(name), f"{self.path}{name}")

    def inners(self, name: str) -> tuple[Row, ...]:
        """Return a field that must be a list of objects.

        Raises:
            RowError: missing, no list, or something else than an object in it.
        """
        value = self._required(name)
        if not isinstance(value, (list, tuple)):
            raise RowError(f"field {self.path}{name} must be a list of objects; got {_described(value)}")
        return tuple(self._as_row(entry, f"{self.path}{name}[{index}]") for index, entry in enumerate(value))

    def identifier(self, name: str) -> str:
        """Return a field that must be a whole number or a text, as text.

        Raises:
            RowError: missing, empty, or of another type.
        """
        value = self._required(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.text(name)

    def _required(self, name: str) -> Any:
        value = self.fields.get(name)
        if value is None:
            raise RowError(f"field {self.path}{name} is missing; the row has: {', '.join(map(str, self.fields)) or 'nothing'}")
        return value

    def _as_row(self, value: Any, path: str) -> Row:
        if not isinstance(value, Mapping):
            raise RowError(f"field {path} must be an object; got {_described(value)}")
        return Row(fields=value, file=self.file, number=self.number, path=f"{path}.")


def read_rows(path: Path, *, name: str | None = None) -> Iterator[Row | RowNote]:
    """Yield the rows of a file of JSON lines, or of JSON (a list of rows, or an object of rows by key).

    A line that is no row (torn, not UTF-8, no object) is yielded as a note. `name` is what messages call the file.

    Raises:
        DatasetError: the file cannot be read, or it is one JSON text that cannot be parsed.
    """
    file = name or str(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror or error}; check the path and its permissions") from error
    if path.suffix != ".jsonl":
        try:
            return _rows_of_json(json.loads(data), file)
        except json.JSONDecodeError as error:
            # A second object after the first is what JSON lines look like to a JSON parser.
            if not error.msg.startswith("Extra data"):
                raise DatasetError(f"{file} is no whole JSON text: {error}; it may have been cut off, so fetch it again") from error
        except UnicodeDecodeError as error:
            raise DatasetError(f"{file} is not UTF-8 text: {error}; JSON or JSON lines is needed") from error
    return _rows_of_lines(data, file)


def load_requests(rows: Iterable[Row | RowNote], parse: Callable[[Row], EditRequest], *, on_bad_row: str) -> LoadedRows:
    """Return every row as a request, in order.

    `on_bad_row` is `error` (any bad row is an error that names the first ones) or `skip` (they are left out and reported).

    Raises:
        DatasetError: a bad row under `error`, or no valid row at all.
    """
    requests: list[EditRequest] = []
    skipped: list[RowNote] = []
    notes: list[RowNote] = []
    row_of_id: dict[str, int] = {}
    for row in rows:
        if isinstance(row, RowNote):
            skipped.append(row)
            continue
        try:
            request = parse(row)
            if request.request_id in row_of_id:
                raise RowError(f"duplicate id {request.request_id}, already in row {row_of_id[request.request_id]}")
        except RowError as error:
            skipped.append(RowNote(file=row.file, number=row.number, reason=str(error)))
            continue
        row_of_id[request.request_id] = row.number
        requests.append(request)
        if last_mention(request.prompt, request.subject) is not None:
            reason = f"the prompt names {request.subject!r} more than once; the edit is at its last mention"
            notes.append(RowNote(file=row.file, number=row.number, reason=reason))
    if skipped and on_bad_row == "error":
        bad = f"{_first(skipped)} [{len(skipped)} bad of {len(requests) + len(skipped)} rows]"
        raise DatasetError(f"{bad}; correct them, or set dataset.on_bad_row=skip to leave such rows out")
    if not requests:
        raise DatasetError(f"no valid row{f': {_first(skipped)}' if skipped else ''}; choose another file, split or subset")
    return LoadedRows(requests=tuple(requests), skipped=tuple(skipped), notes=tuple(notes))


def make_request(
    row: Row,
    *,
    request_id: str,
    prompt: str,
    subject: str,
    target_new: str,
    target_true: str | None = None,
    paraphrase_prompts: tuple[str, ...] = (),
    neighborhood_prompts: tuple[Probe, ...] = (),
    portability: tuple[Probe, ...] = (),
) -> EditRequest:
    """Return the request of a row, with the content hash of the raw row.

    `target_true` is dropped where it is the new target: an edit that confirms an answer has no other to compare with.

    Raises:
        RowError: whatever `EditRequest` refuses, or text that is not valid Unicode.
    """
    if target_true is not None and normalize_answer(target_true) == normalize_answer(target_new):
        target_true = None
    try:
        return EditRequest(
            request_id=request_id,
            prompt=prompt,
            subject=subject,
            target_new=target_new,
            target_true=target_true,
            paraphrase_prompts=paraphrase_prompts,
            neighborhood_prompts=neighborhood_prompts,
            portability=portability,
            source_hash=content_key(dict(row.fields)),
        )
    except ValueError as error:
        raise RowError(str(error)) from error


def with_placeholder(prompt: str, subject: str) -> str:
    """Return the prompt with its last mention of the subject replaced by `{}`.

    A mention as a whole word comes before one inside another word (`i` in `i want to be with you`). The last one, because what is
    said after it has seen all the others, and because an edit at an earlier mention would leave a later one to recall the fact
    unedited.

    Raises:
        RowError: the subject is not in the prompt.
    """
    start = last_mention(prompt, subject)
    if start is None:
        start = prompt.rfind(subject)
    if start < 0:
        raise RowError(f"subject {subject!r} is not in its prompt {prompt!r}")
    return f"{prompt[:start]}{{}}{prompt[start + len(subject) :]}"


def last_mention(prompt: str, subject: str) -> int | None:
    """Return where the last mention of the subject as a whole word begins, or None."""
    start = prompt.rfind(subject)
    while start >= 0:
        end = start + len(subject)
        before, after = prompt[max(start - 1, 0) : start + 1], prompt[end - 1 : end + 1]
        if not any(len(pair) == 2 and all(map(is_word_character, pair)) for pair in (before, after)):
            return start
        start = prompt.rfind(subject, 0, end - 1)
    return None


def content_id(folder: str, *, prompt: str, subject: str, target_new: str) -> str:
    """Return the id of a fact whose source has none: of what is edited alone, so that it is the same in every file.

    Raises:
        RowError: text that is not valid Unicode.
    """
    try:
        return f"{folder}/{content_key([prompt, subject, target_new])[:16]}"
    except UnicodeEncodeError as error:
        raise RowError(str(error)) from error


def _rows_of_lines(data: bytes, file: str) -> Iterator[Row | RowNote]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            yield RowNote(file=file, number=number, reason=f"the line is no whole JSON object ({error}); it may have been cut off")
            continue
        yield _row(value, file, number)


def _rows_of_json(value: Any, file: str) -> Iterator[Row | RowNote]:
    if not isinstance(value, (list, dict)):
        raise DatasetError(f"{file} holds {_described(value)}; a list of rows, or an object of rows by key, is needed")
    entries = value if isinstance(value, list) else value.values()
    return (_row(entry, file, number) for number, entry in enumerate(entries, start=1))


def _row(value: Any, file: str, number: int) -> Row | RowNote:
    if isinstance(value, dict):
        return Row(fields=value, file=file, number=number)
    return RowNote(file=file, number=number, reason=f"a row must be an object with fields; got {_described(value)}")


def _described(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _first(notes: Iterable[RowNote]) -> str:
    every = list(notes)
    more = f"; and {len(every) - REPORTED_ROWS} more" if len(every) > REPORTED_ROWS else ""
    return "; ".join(map(str, every[:REPORTED_ROWS])) + more

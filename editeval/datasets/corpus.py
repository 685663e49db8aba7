"""Text for key statistics: what a model reads while second moments of its keys are summed up.

Each corpus is a small frozen dataclass; `conf/corpus/` names it. `texts` yields documents in a fixed order, and
`content_hash` names what they are, so that statistics of another text are never served. `tokens` and `max_length` say how
much of it is read: that many tokens in all, in pieces of at most `max_length` tokens.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from editeval.files import file_sha256, write_jsonl
from editeval.types import ConfigError, DatasetError, content_key

CLEANING_VERSION = 1  # raised when the rules below keep other text of the same files


@runtime_checkable
class Corpus(Protocol):
    """A source of documents, and how much of it to read."""

    @property
    def tokens(self) -> int:
        """How many tokens to read in all."""
        ...

    @property
    def max_length(self) -> int:
        """The longest piece of a document that the model reads at once, in tokens."""
        ...

    def check(self) -> None:
        """Raise ConfigError or DatasetError when the text is not there; cheap, no network."""
        ...

    def content_hash(self) -> str:
        """Return what names the text: equal hash, equal documents."""
        ...

    def texts(self) -> Iterator[str]:
        """Yield the documents."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Amount:
    """How much of a text to read; raises ConfigError for less than one token."""

    tokens: int
    max_length: int

    def __post_init__(self) -> None:
        for name in ("tokens", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"corpus.{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class StandardLibraryCorpus(_Amount):
    """English prose that every CPython ships: the language reference's topics, then docstrings of top-level modules.

    About 50,000 tokens of topics and about as many of docstrings; code, grammars, tables and headings are left out. Another version of
    Python has another text, hence another hash.
    """

    def check(self) -> None:
        """Raise ConfigError when this Python came without its library's sources."""
        if not _topics_file().is_file():
            raise ConfigError(f"this Python has no {_topics_file()}; choose another text, such as corpus=text corpus.path=FILE")

    def content_hash(self) -> str:
        """Return a hash over the bytes of every file read and the version of the cleaning rules."""
        digest = hashlib.sha256(str(CLEANING_VERSION).encode())
        for path in (_topics_file(), *_module_files()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()

    def texts(self) -> Iterator[str]:
        """Yield one document a topic, then one a module."""
        topics = ast.literal_eval(_topics_literal(_topics_file().read_text(encoding="utf-8")))
        for name in sorted(topics):
            yield from _document(topics[name])
        for path in _module_files():
            yield from _document("\n\n".join(_docstrings(path)))


@dataclass(frozen=True, kw_only=True)
class TextCorpus(_Amount):
    """A local file: JSON lines with the text in `field`, or plain text with empty lines between documents."""

    path: str
    field: str = "text"

    def check(self) -> None:
        """Raise ConfigError when the file is not there."""
        if not Path(self.path).is_file():
            raise ConfigError(f"corpus.path={self.path} is no file; give a .jsonl (text in corpus.field={self.field}) or a .txt file")

    def content_hash(self) -> str:
        """Return a hash over the file's bytes and the field."""
        return content_key({"sha256": file_sha256(Path(self.path)), "field": self.field})

    def texts(self) -> Iterator[str]:
        """Yield the documents; raises DatasetError for a line without the field."""
        with Path(self.path).open(encoding="utf-8") as file:
            if self.path.endswith((".jsonl", ".json")):
                yield from self._rows(file)
            else:
                yield from (document.strip() for document in re.split(r"\n\s*\n", file.read()) if document.strip())

    def _rows(self, lines: Iterator[str]) -> Iterator[str]:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[self.field]
            except (ValueError, KeyError, TypeError) as error:
                raise DatasetError(f"{self.path}, line {number}: no JSON object with {self.field!r} ({error}); set corpus.field") from error
            if text.strip():
                yield text


@dataclass(frozen=True, kw_only=True)
class HubCorpus(_Amount):
    """A data set of the Hugging Face hub at a fixed revision, or its copy below `folder`.

    `folder` (paths.data) is where local data sets live; set, `local_file` inside it is read and the network is not used.
    """

    repository: str
    config: str
    split: str
    revision: str
    local_file: str
    folder: str | None = None
    field: str = "text"

    def check(self) -> None:
        """Raise ConfigError when a local copy is asked for and not there."""
        if self._local is not None:
            self._local.check()

    def content_hash(self) -> str:
        """Return the hash of the local copy, or of the names that fix the hub's content."""
        if self._local is not None:
            return self._local.content_hash()
        return content_key([self.repository, self.config, self.split, self.revision, self.field])

    def texts(self) -> Iterator[str]:
        """Yield every non-empty row.

        Raises:
            DatasetError: the hub does not give them.
        """
        if self._local is not None:
            yield from self._local.texts()
            return
        yield from (row[self.field] for row in self._hub_rows() if row[self.field].strip())

    def fetch(self, folder: Path) -> tuple[Path, ...]:
        """Copy the text of the hub to `local_file` inside `folder`; return it.

        Raises:
            DatasetError: the hub does not give it.
        """
        path = folder / self.local_file
        write_jsonl(path, ({self.field: row[self.field]} for row in self._hub_rows()))
        return (path,)

    def _hub_rows(self) -> Any:
        from datasets import load_dataset

        try:
            return load_dataset(self.repository, self.config, split=self.split, revision=self.revision)
        except (OSError, ValueError) as error:
            raise DatasetError(
                f"corpus {self.repository}: the hub does not give it ({error}); "
                f"set paths.data to a folder with {self.local_file}, or choose another text, such as corpus=pydoc"
            ) from error

    @property
    def _local(self) -> TextCorpus | None:
        if self.folder is None:
            return None
        path = str(Path(self.folder) / self.local_file)
        return TextCorpus(path=path, field=self.field, tokens=self.tokens, max_length=self.max_length)


# -- prose out of Python's documentation -------------------------------------------------------------------------------------


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _topics_file() -> Path:
    return _library() / "pydoc_data" / "topics.py"


def _module_files() -> list[Path]:
    return sorted(_library().glob("*.py"))


def _topics_literal(source: str) -> str:
    """Return the dictionary that the file assigns, as source: the file is read, not run."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.unparse(node.value)
    raise DatasetError(f"{_topics_file()} assigns no dictionary; choose another text, such as corpus=text corpus.path=FILE")


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield ast.get_docstring(node) or ""


def _document(text: str) -> Iterator[str]:
    document = "\n\n".join(_prose(text))
    if document:
        yield document


def _prose(text: str) -> Iterator[str]:
    """Yield the paragraphs that read as English sentences, without mark-up, one line each."""
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(part.strip() for part in paragraph.splitlines())
        if any(mark in line for mark in ("::=", ">>>", "==", "__(", "|", "\\")):
            continue
        line = re.sub(r"^(\* |\d+\. |\(\d+\) )", "", line.strip())
        line = re.sub(r"\*{1,2}([^*\s][^*]*?)\*{1,2}", r"\1", line)  # emphasis
        line = re.sub(r'"([^"\s]+)"', r"\1", line)  # names quoted as code
        line = re.sub(r"(\w)- (\w)", r"\1-\2", line)  # words broken at the line's end
        is_sentence = len(line.split()) >= 10 and line[0].isupper() and line[-1] in ".:?!"
        if is_sentence and sum(letter.isalpha() or letter in " ,.;:'’" for letter in line) > 0.93 * len(line):
            yield line

"""ParaRel (Elazar et al. 2021, arXiv:2102.01017): many ways to write each relation, for methods that need paraphrases.

A pattern such as "[X] works in the field of [Y]." becomes the prompt "{} works in the field of"; patterns whose object is not at
their end cannot be completed and are left out.

The patterns are those of data/pattern_data/graphs_json of https://github.com/yanaiela/pararel (MIT), a file a relation. They are read
from a file of one's own with all rows and their `relation`, or from a copy on the Hugging Face hub with a row for each template and fact.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from editeval.files import write_jsonl
from editeval.types import ConfigError, DatasetError, HubError

SUBJECT, OBJECT = "[X]", "[Y]"
HUB_FIELDS = ("id", "revision")
COLUMNS = ("relation", "template")  # of the copy on the hub
ROWS_AT_ONCE = 10_000


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """One way to write a relation, with [X] for the subject and [Y] for the object."""

    relation: str
    pattern: str


@dataclass(frozen=True, kw_only=True)
class ParaRel:
    """Prompts (each with one "{}") by relation."""

    prompts: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, patterns: Iterable[Pattern]) -> ParaRel:
        """Return the prompts that patterns make, those of a relation in their order, each once."""
        prompts: dict[str, dict[str, None]] = {}
        for one in patterns:
            prompt = _prompt(one.pattern)
            if prompt is not None:
                prompts.setdefault(one.relation, {})[prompt] = None
        return cls(prompts={relation: tuple(found) for relation, found in prompts.items()})

    @classmethod
    def load(cls, file: Path) -> ParaRel:
        """Read JSON lines with `relation` and `pattern`.

        Raises:
            DatasetError: no such file, or a line that is not such a row.
        """
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DatasetError(f"cannot read ParaRel's patterns from {file}: {error.strerror}; set method.pararel to a file") from error
        patterns = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                patterns.append(Pattern(relation=str(row["relation"]), pattern=str(row["pattern"])))
            except (ValueError, KeyError, TypeError) as error:
                raise DatasetError(f"{file}, line {number}: not a JSON row with relation and pattern ({error})") from error
        return cls.of(patterns)

    def paraphrases(self, prompt: str) -> tuple[str, ...]:
        """Return other prompts of the relation that this prompt (with "{}") is a pattern of; none where it is in no relation."""
        for found in self.prompts.values():
            if prompt in found:
                return tuple(other for other in found if other != prompt)
        return ()


@dataclass(frozen=True, kw_only=True)
class ParaRelCopy:
    """ParaRel's patterns as the hub has them: `hub` names a data set by `id` and `revision`, `data` a folder with a copy of it.

    With `data` (paths.data), `<data>/pararel/templates/train.jsonl` is read and nothing is asked of the network.
    """

    data: str | None
    hub: Mapping[str, str | None]

    def __post_init__(self) -> None:
        unknown = sorted(set(self.hub) - set(HUB_FIELDS))
        if unknown or not self.hub.get("id"):
            problem = f"has no setting {unknown[0]!r}" if unknown else "has no id"
            raise ConfigError(f"method.pararel_hub {problem}; it knows: {', '.join(HUB_FIELDS)}")

    def load(self) -> ParaRel:
        """Return the prompts.

        Raises:
            DatasetError: `data` has no copy, or the hub does not give one that can be read.
        """
        if self.data is None:
            return ParaRel.of(self._hub_patterns())
        file = copy_in(Path(self.data).expanduser())
        if not file.is_file():
            raise DatasetError(
                f"paths.data={self.data} has no ParaRel patterns ({file}); fetch them with `python -m editeval prefetch method=kn "
                "method.pararel=hub --to DIR`, or set method.pararel to a file, or to null to do without"
            )
        return ParaRel.load(file)

    def fetch(self, folder: Path) -> tuple[Path, ...]:
        """Copy the patterns of the hub to where `data=folder` finds them; return the file.

        Raises:
            DatasetError: the hub does not give them, or they cannot be read.
        """
        path = copy_in(folder)
        write_jsonl(path, [{"relation": one.relation, "pattern": one.pattern} for one in self._hub_patterns()])
        return (path,)

    def _hub_patterns(self) -> list[Pattern]:
        """Return each pattern once, as the hub has them: its rows are templates times facts, and relations are named by their files.

        Raises:
            HubError: no network, or no such data set.
            DatasetError: it lacks a column, or none of its templates makes a prompt.
        """
        from datasets import load_dataset

        name, revision = self.hub["id"], self.hub.get("revision")
        try:
            table = load_dataset(name, split="train", revision=revision)
        except (OSError, ValueError) as error:
            raise HubError(
                f"cannot get ParaRel's patterns ({name}) from the hub: {type(error).__name__}: {error}; without a network set "
                "paths.data=DIR (reads DIR/pararel/templates/train.jsonl), or method.pararel to a file"
            ) from error
        where = f"{name} at {revision or 'its newest revision'}"
        lacking = [column for column in COLUMNS if column not in table.column_names]
        if lacking:
            raise DatasetError(
                f"{where} has no column {lacking[0]!r}, so it is no copy of ParaRel's patterns (it has: "
                f"{', '.join(table.column_names)}); set method.pararel_hub to one with {' and '.join(COLUMNS)}, or method.pararel to a file"
            )
        distinct: dict[tuple[str, str], None] = {}
        for batch in table.select_columns(list(COLUMNS)).iter(batch_size=ROWS_AT_ONCE):
            distinct |= dict.fromkeys(zip(*(batch[column] for column in COLUMNS), strict=True))
        found = [Pattern(relation=str(relation).removesuffix(".jsonl"), pattern=str(template)) for relation, template in distinct]
        if not ParaRel.of(found).prompts:
            raise DatasetError(
                f"{where}: none of its {len(found)} templates has {SUBJECT} once and ends in {OBJECT}; set method.pararel_hub to another "
                "copy, or method.pararel to a file"
            )
        return found


def copy_in(folder: Path) -> Path:
    """Return where the patterns lie inside a folder of data sets."""
    return folder / "pararel" / "templates" / "train.jsonl"


def _prompt(pattern: str) -> str | None:
    stem = pattern.rstrip().rstrip(".").rstrip()
    if pattern.count(SUBJECT) != 1 or pattern.count(OBJECT) != 1 or not stem.endswith(OBJECT) or "{" in pattern or "}" in pattern:
        return None
    return stem.removesuffix(OBJECT).rstrip().replace(SUBJECT, "{}")

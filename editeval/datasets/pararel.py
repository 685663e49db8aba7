"""ParaRel (Elazar et al. 2021, arXiv:2102.01017): many ways to write each relation, for methods that need paraphrases.

A pattern such as "[X] works in the field of [Y]." becomes the prompt "{} works in the field of"; patterns whose object is not at
their end cannot be completed and are left out.

The patterns are in data/pattern_data/graphs_json of https://github.com/yanaiela/pararel (MIT), a file a relation. No copy on the Hugging
Face hub is known, so they are read from a file of one's own alone, which holds all rows with their `relation`; prefetch brings none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from editeval.types import DatasetError

SUBJECT, OBJECT = "[X]", "[Y]"


@dataclass(frozen=True, kw_only=True)
class ParaRel:
    """Prompts (each with one "{}") by relation."""

    prompts: Mapping[str, tuple[str, ...]]

    @classmethod
    def load(cls, file: Path) -> ParaRel:
        """Read JSON lines with `relation` and `pattern`.

        Raises:
            DatasetError: no such file, or a line that is not such a row.
        """
        prompts: dict[str, list[str]] = {}
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DatasetError(f"cannot read ParaRel's patterns from {file}: {error.strerror}; set method.pararel to a file") from error
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                relation, pattern = str(row["relation"]), str(row["pattern"])
            except (ValueError, KeyError, TypeError) as error:
                raise DatasetError(f"{file}, line {number}: not a JSON row with relation and pattern ({error})") from error
            prompt = _prompt(pattern)
            if prompt is not None:
                prompts.setdefault(relation, []).append(prompt)
        return cls(prompts={relation: tuple(dict.fromkeys(found)) for relation, found in prompts.items()})

    def paraphrases(self, prompt: str) -> tuple[str, ...]:
        """Return other prompts of the relation that this prompt (with "{}") is a pattern of; none where it is in no relation."""
        for found in self.prompts.values():
            if prompt in found:
                return tuple(other for other in found if other != prompt)
        return ()


def _prompt(pattern: str) -> str | None:
    stem = pattern.rstrip().rstrip(".").rstrip()
    if pattern.count(SUBJECT) != 1 or pattern.count(OBJECT) != 1 or not stem.endswith(OBJECT) or "{" in pattern or "}" in pattern:
        return None
    return stem.removesuffix(OBJECT).rstrip().replace(SUBJECT, "{}")

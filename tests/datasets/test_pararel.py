"""ParaRel's patterns become prompts, and a prompt finds the others of its relation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from editeval.datasets.pararel import ParaRel
from editeval.types import DatasetError

ROWS = (
    {"relation": "P101", "pattern": "[X] works in the field of [Y]."},
    {"relation": "P101", "pattern": "[X] specializes in [Y] ."},
    {"relation": "P101", "pattern": "[Y] is the specialization of [X]."},  # the object does not come last
    {"relation": "P19", "pattern": "[X] was born in [Y]."},
)


def written(folder: Path, text: str) -> Path:
    file = folder / "patterns.jsonl"
    file.write_text(text)
    return file


def test_a_prompt_finds_the_other_patterns_of_its_relation(tmp_path: Path) -> None:
    pararel = ParaRel.load(written(tmp_path, "\n".join(json.dumps(row) for row in ROWS)))
    assert pararel.paraphrases("{} works in the field of") == ("{} specializes in",)
    assert pararel.paraphrases("{} was born in") == ()
    assert pararel.paraphrases("{} eats") == ()


def test_the_real_patterns_fit_counterfact_prompts(shared_data: Path) -> None:
    pararel = ParaRel.load(shared_data / "pararel" / "templates" / "train.jsonl")
    rows = [json.loads(line) for line in (shared_data / "counterfact" / "rome" / "test.jsonl").read_text().splitlines()]
    found = [pararel.paraphrases(row["requested_rewrite"]["prompt"]) for row in rows]
    assert sum(bool(prompts) for prompts in found) > len(rows) / 2


@pytest.mark.parametrize("text", ["no json", '{"relation": "P1"}', "[1]"])
def test_a_bad_line_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(DatasetError, match=r"patterns\.jsonl, line 1"):
        ParaRel.load(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"none\.jsonl.*method\.pararel"):
        ParaRel.load(tmp_path / "none.jsonl")

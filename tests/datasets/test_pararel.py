"""ParaRel's patterns become prompts, and a prompt finds the others of its relation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from editeval.datasets.pararel import ParaRel, ParaRelCopy, copy_in
from editeval.types import ConfigError, DatasetError, HubError

ROWS = (
    {"relation": "P101", "pattern": "[X] works in the field of [Y]."},
    {"relation": "P101", "pattern": "[X] specializes in [Y] ."},
    {"relation": "P101", "pattern": "[Y] is the specialization of [X]."},  # the object does not come last
    {"relation": "P19", "pattern": "[X] was born in [Y]."},
)
COPY = {"id": "somebody/patterns", "revision": "abc"}
HUB_ROWS = (  # a row for each template and fact
    {"relation": "P19.jsonl", "template": "[X] was born in [Y].", "sub_label": "Ada"},
    {"relation": "P101.jsonl", "template": "[X] works in the field of [Y].", "sub_label": "Ada"},
    {"relation": "P101.jsonl", "template": "[X] works in the field of [Y].", "sub_label": "Emmy"},
    {"relation": "P101", "template": "[X] specializes in [Y] .", "sub_label": "Ada"},
    {"relation": "P19.jsonl", "template": "[X] was born in [Y].", "sub_label": "Emmy"},
)


def on_hub(monkeypatch: pytest.MonkeyPatch, *rows: dict[str, Any]) -> ParaRelCopy:
    """Put rows on a hub that gives nothing else, and return the copy that reads them."""

    def load_dataset(path: str, *, split: str, revision: str | None) -> datasets.Dataset:
        assert (path, split, revision) == ("somebody/patterns", "train", "abc")
        return datasets.Dataset.from_list(list(rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return ParaRelCopy(data=None, hub=COPY)


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


def test_the_hubs_rows_give_each_template_once_in_the_order_of_its_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = on_hub(monkeypatch, *HUB_ROWS)
    assert list(copy.load().prompts.items()) == [
        ("P19", ("{} was born in",)),
        ("P101", ("{} works in the field of", "{} specializes in")),
    ]


def test_what_was_fetched_gives_the_prompts_of_the_hub_without_asking_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = on_hub(monkeypatch, *HUB_ROWS)
    (file,) = copy.fetch(tmp_path)
    assert file == copy_in(tmp_path) == tmp_path / "pararel" / "templates" / "train.jsonl"
    assert json.loads(file.read_text().splitlines()[0]) == {"relation": "P19", "pattern": "[X] was born in [Y]."}
    expected = copy.load()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    assert ParaRelCopy(data=str(tmp_path), hub=COPY).load() == expected


def test_a_copy_on_the_hub_of_other_columns_or_texts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match=r"somebody/patterns at abc has no column 'template'.*it has: relation, pattern\)"):
        on_hub(monkeypatch, *ROWS).load()
    with pytest.raises(DatasetError, match=r"somebody/patterns at abc: none of its 1 templates has \[X\] once and ends in \[Y\]"):
        on_hub(monkeypatch, {"relation": "P19", "template": "Ada was born in"}).load()


def test_a_copy_that_cannot_be_had_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(HubError, match=r"somebody/patterns.*no network; .*paths\.data=DIR \(reads DIR/pararel/templates/train\.jsonl\)"):
        ParaRelCopy(data=None, hub=COPY).load()
    with pytest.raises(DatasetError, match=r"has no ParaRel patterns .*prefetch method=kn method\.pararel=hub --to DIR"):
        ParaRelCopy(data=str(tmp_path), hub=COPY).load()
    with pytest.raises(ConfigError, match=r"method\.pararel_hub has no id"):
        ParaRelCopy(data=None, hub={})
    with pytest.raises(ConfigError, match=r"method\.pararel_hub has no setting 'file'"):
        ParaRelCopy(data=None, hub={**COPY, "file": "x"})

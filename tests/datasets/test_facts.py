"""The built-in facts: enough of them, of enough relations, well formed, and the same for ever unless changed on purpose."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from editeval.datasets.facts import Facts
from editeval.types import DatasetError, content_key

# Of the whole expanded set; a deliberate change of facts.yaml changes it, and with it every edit key of `dataset=facts`.
CONTENT = "1b2098f67a871373ae46b8f7cc7052ea9e539dec9ff0c8540bc151674b2e252a"


def test_there_are_over_three_hundred_facts_of_over_fifteen_relations() -> None:
    relations = Counter(request.request_id.split("/")[0] for request in Facts().load())
    assert sum(relations.values()) >= 300
    assert len(relations) >= 15
    assert min(relations.values()) >= 10


def test_every_fact_is_complete() -> None:
    requests = Facts().load()
    assert len({request.request_id for request in requests}) == len(requests)
    for request in requests:
        assert request.target_true is not None
        assert request.target_new.split()[0].lower() != request.target_true.split()[0].lower()
        assert len(request.paraphrase_prompts) >= 2
        assert all(request.subject in prompt for prompt in request.paraphrase_prompts)
        assert request.full_prompt not in request.paraphrase_prompts
        assert len(request.neighborhood_prompts) >= 3
        for neighbor in request.neighborhood_prompts:
            assert neighbor.prompt != request.full_prompt
            assert neighbor.answer != request.target_new
        assert request.source_hash


def test_several_relations_ask_what_follows_from_an_edit() -> None:
    asked = {request.request_id.split("/")[0] for request in Facts().load() if request.portability}
    assert len(asked) >= 4


def test_the_set_is_the_one_that_was_published() -> None:
    assert content_key([request.source_hash for request in Facts().load()]) == CONTENT


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("capital: {prompt: 'The capital of {} is', paraphrases: [], pairs: {a: b, c: d, e: f}}", "four pairs"),
        ("capital: {prompt: 'The capital is', paraphrases: [], pairs: {a: b, c: d, e: f, g: h}}", "exactly one"),
        ("capital: {prompt: 'The capital of {} is', paraphrases: [], pairs: {a: b, c: d, e: f, g: 1}}", "TypeError|quote"),
        ("capital: {prompt: 'x {}'}", "pairs"),
        ("[]", "must map"),
        ("{", "cannot be read"),
    ],
)
def test_a_malformed_file_is_named_with_its_relation(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(text)
    with pytest.raises(DatasetError, match=reason) as caught:
        Facts(file=str(path)).check()
    assert str(path) in str(caught.value)

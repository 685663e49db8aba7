"""What methods learn from beforehand: never a subject that is edited."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
from omegaconf import DictConfig

from editeval.build import build
from editeval.datasets.facts import PARTS, Facts
from editeval.datasets.text import normalize_answer
from editeval.datasets.training import TrainingSet
from editeval.interfaces import EditDataset
from editeval.types import ConfigError, DatasetError, EditRequest
from tests.datasets.examples import Given


def fact(subject: str, prompt: str = "The mother tongue of {} is") -> EditRequest:
    return EditRequest(request_id=f"{subject}/{prompt}", prompt=prompt, subject=subject, target_new="English")


def test_rows_about_an_edited_subject_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = (fact("Ann Lee"), fact("ann  LEE", "{} speaks"), fact("Jean Morin"))
    training = TrainingSet(name="own", of=Given(*rows), without=Given(fact("Ann Lee", "{} lives in"), name="edited"))
    with caplog.at_level(logging.WARNING):
        assert training.load() == rows[2:]
    assert "training own: 2 of 3 rows are about subjects of dataset edited and are left out" in caplog.text


def test_without_a_data_set_to_edit_every_row_is_there() -> None:
    assert TrainingSet(name="own", of=Given(fact("a"), fact("b"))).load() == (fact("a"), fact("b"))


def test_a_training_set_without_any_other_subject_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"all 1 rows of training=own are about subjects of dataset=edited.*dataset\.part=edit"):
        TrainingSet(name="own", of=Given(fact("a")), without=Given(fact("a", "{} is"), name="edited")).check()


def test_the_content_hash_names_the_rows_that_are_left() -> None:
    whole = TrainingSet(name="own", of=Given(fact("a"), fact("b")))
    turned = TrainingSet(name="other", of=Given(fact("b"), fact("a")))
    less = TrainingSet(name="own", of=Given(fact("a"), fact("b")), without=Given(fact("b", "{} is")))
    changed = TrainingSet(name="own", of=Given(replace(fact("a"), target_new="French"), fact("b")))
    assert whole.content_hash() == turned.content_hash()
    assert len({whole.content_hash(), less.content_hash(), changed.content_hash()}) == 3


def test_the_parts_of_the_built_in_facts_share_no_subject_and_make_up_the_whole() -> None:
    whole, edit, train = (Facts(part=part).load() for part in PARTS)
    assert sorted((*edit, *train), key=lambda request: request.request_id) == sorted(whole, key=lambda request: request.request_id)
    subjects = [{normalize_answer(request.subject) for request in part} for part in (edit, train)]
    assert not subjects[0] & subjects[1]
    assert len(train) > 200
    with pytest.raises(ConfigError, match=r"dataset\.part=some is unknown; one of: all, edit, train"):
        Facts(part="some")


def test_by_default_nothing_that_is_edited_is_learned_from(compose_config: Callable[..., DictConfig]) -> None:
    config = compose_config()
    edited = build(config.dataset, "dataset", EditDataset).load()
    learned = build(config.training, "training", EditDataset).load()
    assert learned == Facts(part="train").load()
    assert not {normalize_answer(fact.subject) for fact in edited} & {normalize_answer(fact.subject) for fact in learned}
    everything = compose_config("dataset.part=all")
    with pytest.raises(DatasetError, match="nothing is left"):
        build(everything.training, "training", EditDataset).check()

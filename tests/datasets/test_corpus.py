"""Texts for key statistics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from editeval.datasets.corpus import Corpus, HubCorpus, StandardLibraryCorpus, TextCorpus
from editeval.types import ConfigError, DatasetError

CONF = Path(__file__).resolve().parents[2] / "conf" / "corpus"
AMOUNT = {"tokens": 100, "max_length": 10}


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_file_of_the_group_builds_a_corpus(name: str) -> None:
    node = OmegaConf.create({"paths": {"data": None}, "corpus": OmegaConf.load(CONF / f"{name}.yaml")})
    if name == "text":
        node.corpus.path = "some.txt"
    assert isinstance(instantiate(node.corpus), Corpus)


def test_python_ships_enough_prose_and_no_code() -> None:
    corpus = StandardLibraryCorpus(**AMOUNT)
    corpus.check()
    documents = list(corpus.texts())
    assert sum(map(len, documents)) > 300_000
    assert sum(len(document.split()) for document in documents) > 50_000
    assert not any(mark in document for document in documents for mark in (">>>", "::=", "\t"))
    assert list(corpus.texts()) == documents
    assert corpus.content_hash() == StandardLibraryCorpus(tokens=7, max_length=5).content_hash()


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_a_local_file_gives_its_documents_in_order(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    documents = ["One. Still one.", "Two."]
    path.write_text("\n\n".join(documents) if name.endswith("txt") else "\n".join(json.dumps({"text": text}) for text in documents))
    corpus = TextCorpus(path=str(path), **AMOUNT)
    corpus.check()
    assert list(corpus.texts()) == documents
    before = corpus.content_hash()
    path.write_text(path.read_text() + "\n")
    assert corpus.content_hash() != before


def test_a_line_without_the_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(DatasetError, match=r"t\.jsonl, line 2.*corpus\.field"):
        list(TextCorpus(path=str(path), **AMOUNT).texts())


def test_the_hub_is_not_asked_when_a_local_folder_is_given(tmp_path: Path) -> None:
    (tmp_path / "part.txt").write_text("One.")
    settings = {"repository": "r", "config": "c", "split": "train", "revision": "0", "local_file": "part.txt"}
    local = HubCorpus(**settings, folder=str(tmp_path), **AMOUNT)
    local.check()
    assert list(local.texts()) == ["One."]
    assert local.content_hash() != HubCorpus(**settings, **AMOUNT).content_hash()
    with pytest.raises(ConfigError, match="no file"):
        HubCorpus(**settings, folder=str(tmp_path / "absent"), **AMOUNT).check()


def test_a_hub_that_gives_nothing_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    corpus = HubCorpus(repository="r", config="c", split="train", revision="0", local_file="part.txt", **AMOUNT)
    with pytest.raises(DatasetError, match=r"^corpus r: the hub does not give it \(no route\); set paths\.data .* part\.txt"):
        next(corpus.texts())


@pytest.mark.parametrize("field", ["tokens", "max_length"])
def test_an_amount_below_one_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        StandardLibraryCorpus(**{**AMOUNT, field: 0})

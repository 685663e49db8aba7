"""A folder filled where there is a network is all that a run needs where there is none."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from omegaconf import DictConfig

from editeval.__main__ import main
from editeval.build import build
from editeval.experiment import assemble
from editeval.files import Cache
from editeval.interfaces import EditMethod
from editeval.memory import encoder as encoders
from editeval.memory.encoder import load_encoder
from editeval.models.tiny import TinyModel
from editeval.prefetch import MANIFEST, damaged, prefetch
from editeval.types import DatasetError, EditevalError
from tests.memory.test_encoder import tiny_encoder

ROWS = {
    ("azhx/counterfact", None): {
        "test": [
            {
                "case_id": number,
                "requested_rewrite": {
                    "prompt": "{} is in",
                    "subject": f"City{number}",
                    "target_new": {"str": "Peru"},
                    "target_true": {"str": "Italy"},
                },
                "paraphrase_prompts": [f"Where is City{number}? In"],
                "neighborhood_prompts": [f"Town{number} is in"],
            }
            for number in range(3)
        ]
    },
    ("Salesforce/wikitext", "wikitext-103-raw-v1"): {"train": [{"text": "The city is old. It lies at a river."}, {"text": ""}]},
    ("coastalcph/pararel_patterns", None): {
        "train": [
            {"relation": "P17.jsonl", "template": template, "sub_label": f"City{number}"}
            for number in range(3)
            for template in ("[X] is in [Y].", "[X] is located in [Y].")
        ]
    },
    ("baber/piqa", None): {
        split: [{"goal": f"Go {n}", "sol1": "Walk.", "sol2": "Fly.", "label": n % 2} for n in range(4)] for split in ("train", "validation")
    },
    ("truthfulqa/truthful_qa", "multiple_choice"): {
        "validation": [
            {
                "question": f"Where is {n}?",
                "mc1_targets": {"choices": ["here", "there"], "labels": [1, 0]},
                "mc2_targets": {"choices": ["here", "there"], "labels": [1, 0]},
            }
            for n in range(4)
        ]
    },
    ("openai/gsm8k", "main"): {
        split: [{"question": f"{split} {n}?", "answer": f"#### {n}"} for n in range(6)] for split in ("train", "test")
    },
}


class Hub:
    """Stands in for the hub; counts what is asked of it, and can lack a data set."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.lacks: set[str] = set()

    def load_dataset(self, path: str, name: str | None = None, *, split: str | None = None, **_: Any) -> Any:
        self.asked.append(path)
        if path in self.lacks or (path, name) not in ROWS:
            raise FileNotFoundError(f"no data set {path}")
        splits = {key: datasets.Dataset.from_list(rows) for key, rows in ROWS[path, name].items()}
        return splits[split] if split else datasets.DatasetDict(splits)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
    return made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    lm = TinyModel(name="tiny", architecture="llama", cache_dir=cache_dir).load()
    lm.module.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return tiny_encoder(tmp_path / "own-encoder")


@pytest.fixture
def config(compose_config: Callable[..., DictConfig], checkpoint: Path) -> Callable[..., DictConfig]:
    def made(*more: str) -> DictConfig:
        chosen = ("dataset=counterfact", "corpus=wikitext", "benchmark=[piqa,truthfulqa,gsm8k-5shot,edit-quality]", "num_edits=1")
        model = ("model=pretrained", "model.name=small", f"model.name_or_path={checkpoint}")
        return compose_config(*chosen, *model, *more)

    return made


def test_a_filled_folder_is_all_that_a_run_needs(
    config: Callable[..., DictConfig], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = prefetch(config(), tmp_path)
    assert set(found.files) >= {
        "counterfact/rome/test.jsonl",
        "corpus/wikitext2_train_part/train.jsonl",
        "piqa/validation.jsonl",
        "truthful_qa/multiple_choice/validation.jsonl",
        "gsm8k/main/test.jsonl",
        "gsm8k/main/train.jsonl",
        "models/small/model.safetensors",
        "models/small/tokenizer.json",
    }
    assert json.loads((tmp_path / "gsm8k/main/test.jsonl").read_text().splitlines()[0]) == ROWS["openai/gsm8k", "main"]["test"][0]

    def refuse(*_: object) -> None:
        raise AssertionError("a network call was made although everything is in the folder")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    offline = assemble(config(*found.overrides))
    assert len(offline.dataset.load()) == 3
    assert offline.source.load().fingerprint


def test_a_stopped_call_is_repeated_without_fetching_anything_twice(config: Callable[..., DictConfig], hub: Hub, tmp_path: Path) -> None:
    hub.lacks.add("azhx/counterfact")
    with pytest.raises(DatasetError, match="azhx/counterfact"):
        prefetch(config(), tmp_path)
    hub.lacks.clear()
    hub.asked.clear()
    assert prefetch(config(), tmp_path).fetched == ("dataset", "corpus", "model")
    assert hub.asked == ["azhx/counterfact", "Salesforce/wikitext"]
    assert prefetch(config(), tmp_path).fetched == ()


def test_a_changed_file_is_named_and_fetched_again(config: Callable[..., DictConfig], hub: Hub, tmp_path: Path) -> None:
    prefetch(config(), tmp_path)
    assert damaged(tmp_path) == ()
    path = tmp_path / "piqa" / "validation.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert damaged(tmp_path) == ("piqa/validation.jsonl",)
    assert prefetch(config(), tmp_path).fetched == ("benchmark.piqa",)
    assert path.read_bytes() == whole
    shutil.rmtree(tmp_path / "models")
    assert prefetch(config(), tmp_path).fetched == ("model",)


def test_other_settings_are_fetched_and_the_command_says_how_to_run(
    hub: Hub, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["model=pretrained", "model.name=small", f"model.name_or_path={checkpoint}"]
    assert main(["prefetch", *model, "benchmark=[piqa]", "--to", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "fetched now: benchmark.piqa, model" in said
    assert f"paths.data={tmp_path} model.name_or_path={tmp_path}/models/small" in said
    assert main(["prefetch", *model, "benchmark=[piqa]", "dataset=counterfact", "--to", str(tmp_path)]) == 0
    assert "fetched now: dataset" in capsys.readouterr().out
    assert set(json.loads((tmp_path / MANIFEST).read_text())["parts"]) == {"benchmark.piqa", "dataset", "model"}
    assert main(["prefetch", "benchmark=nothing", "--to", str(tmp_path)]) == 2


def test_what_a_method_learns_from_and_the_models_that_it_names_come_along(
    config: Callable[..., DictConfig], hub: Hub, checkpoint: Path, encoder: Path, tmp_path: Path
) -> None:
    rows = (
        "training=counterfact",
        "training.of.subset=rome",
        "training.of.split=test",
        "+training.of.hub.rome.id=azhx/counterfact",
        "dataset=facts",
    )
    method = ("method=serac", f"method.encoder={encoder}", f"method.counterfactual={checkpoint}")
    found = prefetch(config(*rows, *method), tmp_path)
    assert found.fetched[-4:] == ("training", "method", "corpus", "model")
    copied, small = tmp_path / "encoders" / encoder.name, tmp_path / "models" / checkpoint.name
    assert {f"method.encoder={copied}", f"method.counterfactual={small}"} < set(found.overrides)
    assert "counterfact/rome/test.jsonl" in found.files
    shutil.rmtree(encoder)
    made = build(config(*rows, *method, *found.overrides).method, "method", EditMethod)
    made.check(TinyModel(name="tiny", architecture="llama", cache_dir=tmp_path).describe())
    assert load_encoder(str(copied), Cache(tmp_path)).width == 16


@pytest.mark.parametrize("method", [("method=kn", "method.pararel=hub"), ("method=rect", "method@of=kn", "of.pararel=hub")])
def test_patterns_of_the_hub_come_along_and_are_the_same_method_offline(
    config: Callable[..., DictConfig], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: tuple[str, ...]
) -> None:
    online = build(config("dataset=facts", *method).method, "method", EditMethod)
    found = prefetch(config("dataset=facts", *method), tmp_path)
    assert "method" in found.fetched
    assert (tmp_path / "pararel" / "templates" / "train.jsonl").read_text().splitlines() == [
        '{"relation": "P17", "pattern": "[X] is in [Y]."}',
        '{"relation": "P17", "pattern": "[X] is located in [Y]."}',
    ]
    expected = online.settings()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    offline = build(config("dataset=facts", *method, *found.overrides).method, "method", EditMethod)
    assert offline.settings() == expected
    without = build(config("dataset=facts", *method[:-1]).method, "method", EditMethod)
    assert without.settings() != expected


def test_a_copy_of_the_built_in_encoder_is_the_built_in_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = b"weights"
    monkeypatch.setattr(encoders, "_WEIGHTS_SHA256", hashlib.sha256(weights).hexdigest())
    monkeypatch.setattr(encoders, "_fetch_minilm", lambda folder: (folder / encoders.WEIGHTS).write_bytes(weights))
    assert encoders.fetch_encoder(encoders.MINILM, tmp_path) == (encoders.encoder_found_in(encoders.MINILM, tmp_path) / encoders.WEIGHTS,)
    assert encoders.encoder_identity(str(encoders.encoder_found_in(encoders.MINILM, tmp_path))) == encoders.encoder_identity(
        encoders.MINILM
    )
    assert encoders.fetch_encoder(encoders.HASHED, tmp_path) == ()


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EditevalError, match=r"has no prefetch\.json; fill it"):
        damaged(tmp_path)

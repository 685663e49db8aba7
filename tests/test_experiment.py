"""What a run refuses before the model is asked anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from editeval.experiment import assemble, run
from editeval.inference.edited import EditedModel
from editeval.types import ConfigError

Compose = Callable[..., DictConfig]

TINY = ("model=tiny-gpt2", "method=none", "num_edits=1", "callback={}", "logger=[]")
ROW = {
    "case_id": 4,
    "prompt": "The twin city of Lyon is",
    "target_new": "Manila",
    "subject": "Lyon",
    "ground_truth": "Beirut",
    "rephrase_prompt": "Lyon has the twin city",
    "locality_prompt": "The twin city of Trieste is",
    "locality_ground_truth": "Beirut",
}


@pytest.fixture(autouse=True)
def _never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("score", "generate", "score_text"):
        monkeypatch.setattr(EditedModel, name, lambda *_, **__: pytest.fail("the model was asked"))


@pytest.mark.parametrize("field", ["prompt", "rephrase_prompt", "locality_prompt"])
def test_a_fact_whose_prompt_is_longer_than_the_model_is_named(compose_config: Compose, tmp_path: Path, field: str) -> None:
    file = tmp_path / "facts.jsonl"
    file.write_text(json.dumps({**ROW, field: "word " * 2000 + str(ROW[field])}) + "\n")
    facts = ("dataset=counterfact", f"dataset.file={file}", "benchmark=[edit-quality]", f"paths.runs={tmp_path / 'runs'}")
    with pytest.raises(
        ConfigError, match=r"^dataset counterfact: a prompt of counterfact/4 has \d{4} tokens, .* 1024 positions of tiny-gpt2"
    ):
        run(compose_config(*TINY, *facts))


def test_a_benchmark_that_the_model_cannot_read_is_refused_before_the_model_is_asked_what_it_knows(
    compose_config: Compose, tmp_path: Path
) -> None:
    asking = ("dataset=facts", "dataset.known_only=true", "benchmark=[edit-quality]", "benchmark.edit-quality.max_new_tokens=2000")
    folders = (f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}")  # what it knows is not in the cache
    with pytest.raises(ConfigError, match=r"max_new_tokens=2000 leaves no room"):
        run(compose_config(*TINY, *asking, *folders))


def test_a_setting_without_a_value_is_named_on_one_line(compose_config: Compose) -> None:
    with pytest.raises(ConfigError, match=r"^benchmark\.harness\.task has no value yet; set benchmark\.harness\.task=\.\.\.$"):
        assemble(compose_config(*TINY, "benchmark=harness"))


def test_a_run_without_edits_leaves_out_what_asks_about_facts_and_says_so(compose_config: Compose) -> None:
    experiment = assemble(compose_config(*TINY, "num_edits=0", "dataset=facts", "benchmark=[edit-quality,perplexity]"))
    assert list(experiment.benchmarks) == list(experiment.config["benchmark"]) == ["perplexity"]
    assert experiment.left_out == ("edit-quality",)
    with pytest.raises(ConfigError, match=r"^num_edits=0 edits no fact, and edit-quality asks about nothing else; raise num_edits, or add"):
        assemble(compose_config(*TINY, "num_edits=0", "dataset=facts", "benchmark=edit-quality"))
    with pytest.raises(ConfigError, match=r"^num_edits=\[\] names no number of edits; set num_edits=0 to measure"):
        assemble(compose_config(*TINY, "num_edits=[]", "dataset=facts", "benchmark=edit-quality"))


@pytest.mark.parametrize("limit", ["0", "-3", "many", "true", "1.5"])
def test_a_limit_that_is_no_count_is_one_sentence_before_the_model_is_loaded(compose_config: Compose, limit: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^benchmark\.piqa\.limit='?{limit.capitalize() if limit == 'true' else limit}'? must be [^\n]*$"
    ) as raised:
        assemble(compose_config(*TINY, "dataset=facts", "benchmark=piqa", f"benchmark.piqa.limit={limit}"))
    assert "null" in str(raised.value)

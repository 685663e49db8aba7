"""What a run refuses before the model is asked anything."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from editeval.build import build
from editeval.experiment import assemble, prepare, run
from editeval.inference.edited import EditedModel
from editeval.interfaces import EditMethod
from editeval.sweep.doctor import diagnose
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


@pytest.mark.parametrize("method", ["mend", "rledit", "serac"])
def test_prepare_only_trains_once_what_a_method_learns_and_makes_no_run(compose_config: Compose, tmp_path: Path, method: str) -> None:
    quick = ("method.max_steps=2", "method.validate_every=2", "callback=silent", f"method={method}", "prepare_only=true")
    folders = (f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}")
    config = compose_config("debug=tiny", "model=tiny-gpt2", *quick, *folders)
    prepare(config)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob(f"{method}*/*")}
    assert len(written) == {"mend": 1, "rledit": 1, "serac": 2}[method]
    prepare(config)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob(f"{method}*/*")} == written
    assert not (tmp_path / "runs").exists()


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


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=x", "seed='x' must be a whole number"),
        ("seed=null", "seed=null must be a whole number"),
        ("seed=1.5", "seed=1.5 must be a whole number"),
        ("seed=true", "seed=true must be a whole number"),
        ("seed=[1,2]", r"seed=\[1, 2\] must be a whole number"),
        ("prepare_only=no_", "prepare_only='no_' must be true or false"),
        ("prepare_only=1", "prepare_only=1 must be true or false"),
        ("paths.runs=null", "paths.runs=null must be the path of a folder"),
        ("paths.runs=3", "paths.runs=3 must be the path of a folder"),
        ("paths.cache=null", "paths.cache=null must be the path of a folder"),
        ("paths.data=3", "paths.data=3 must be the path of a folder"),
        ("engine=null", "engine=None must hold batch_tokens"),
    ],
)
def test_a_setting_of_no_group_is_checked_by_run_and_doctor(compose_config: Compose, override: str, expected: str) -> None:
    config = compose_config(*TINY, "benchmark=[edit-quality]", override)
    with pytest.raises(ConfigError, match=expected):
        assemble(config)
    (finding,) = diagnose(config, offline=False).findings
    assert finding.kind == "missing"
    assert re.search(expected, finding.text)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("corpus=null", "method.corpus=null must be a Corpus"),
        ("corpus=abc", "method.corpus='abc' must be a text to read"),
        ("context_prefixes=[1]", "context prefix 1 must be a text that holds '{}' exactly once"),
        ("context_prefixes=abc", "must be a list of texts"),
        ("prefix_lengths=abc", "must be pairs (tokens, count)"),
        ("prefix_lengths=null", "method.prefix_lengths=null must be a Sequence"),
        ("prefix_lengths=[5,5]", "such as [[5,10],[10,10]]; got 5"),
        ("prefix_lengths=[[5,x]]", "such as [[5,10],[10,10]]; got [5, 'x']"),
        ("prefix_lengths=[[5,0]]", "such as [[5,10],[10,10]]; got [5, 0]"),
        ("learning_rate=inf", "method.learning_rate=inf must be a finite number"),
        ("weight_decay=nan", "method.weight_decay=nan must be a finite number"),
    ],
)
def test_a_setting_of_a_method_that_cannot_work_is_one_sentence(compose_config: Compose, override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        build(compose_config("method=rome", "model=tiny-gpt2", f"method.{override}").method, "method", EditMethod)


def test_a_method_around_another_is_checked_as_strictly(compose_config: Compose) -> None:
    config = compose_config("method=rect", "method@of=rome", "model=tiny-gpt2", "of.learning_rate=nan")
    with pytest.raises(ConfigError, match="learning_rate=nan must be a finite number"):
        build(config.method, "method", EditMethod)


def test_a_negative_seed_is_a_seed(compose_config: Compose) -> None:
    assert assemble(compose_config(*TINY, "benchmark=[edit-quality]", "seed=-1")).seed == -1


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("batch_size=3", "method=rome"), "writes at most 1 fact"),
        (("num_edits=2", "method=locft-bf"), "writes all facts in one edit"),
        (("benchmark=[]",), "benchmark is empty"),
        (("num_edits=1000000",), "num_edits x batch_size asks for 1000000"),
    ],
)
def test_what_the_run_refuses_is_not_ready_for_the_doctor(compose_config: Compose, overrides: tuple[str, ...], expected: str) -> None:
    config = compose_config(*TINY, "benchmark=[edit-quality]", "dataset.known_only=false", *overrides)
    with pytest.raises(ConfigError, match=expected):
        run(config)
    diagnosis = diagnose(config, offline=False)
    assert not diagnosis.ready
    assert any(finding.kind == "missing" and expected in finding.text for finding in diagnosis.findings)

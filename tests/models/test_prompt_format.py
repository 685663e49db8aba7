"""Prompts as they are, as questions, and in a chat template; what cannot be put so is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerFast

from editeval.experiment import assemble, run
from editeval.keyvalue.lookup import locate
from editeval.models.prompt_format import chat_text, in_format, wrapper
from editeval.models.tiny import TinyModel
from editeval.types import ConfigError, EditRequest, Probe

TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}{% if turn.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "[{{ turn.role }}]{{ turn.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
TASK = """
task: ask
dataset_path: ask
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["a man", "a woman"]
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ROME = EditRequest(
    request_id="rome",
    prompt="{} is the capital of",
    subject="Rome",
    target_new="Peru",
    target_true="Italy",
    paraphrase_prompts=("Rome, capital of",),
    neighborhood_prompts=(Probe(prompt="Turin lies in", answer="Italy"),),
    portability=(Probe(prompt="In Rome they speak", answer="Spanish"),),
    source_hash="hash",
)


def tokenizer(cache_dir: Path, architecture: str, *, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    made = TinyModel(name="tiny", architecture=architecture, cache_dir=cache_dir).tokenizer()
    made.chat_template = template
    return made


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_start_token_stands_once_whether_template_or_tokenizer_writes_it(cache_dir: Path, architecture: str) -> None:
    tokens = tokenizer(cache_dir, architecture)
    ids = tokens(wrapper("chat", tokens, name="tiny")("Hello"))["input_ids"]
    assert ids.count(tokens.bos_token_id) == 1
    assert ids[0] == tokens.bos_token_id


def test_a_system_turn_begins_the_users_first_one(cache_dir: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert chat_text(tokenizer(cache_dir, "llama"), turns, name="tiny") == "[user]Be brief.\n\nWhy?\n[assistant]\n"


def test_every_prompt_of_a_fact_is_put_in_the_format_and_its_hash_says_so(cache_dir: Path) -> None:
    chat = in_format(ROME, wrapper("chat", tokenizer(cache_dir, "llama"), name="tiny"))
    assert chat.full_prompt == "[user]Rome is the capital of\n[assistant]\n"
    question = in_format(ROME, wrapper("qa", None, name="tiny"))
    assert question.full_prompt == "Question: Rome is the capital of\nAnswer:"
    assert question.paraphrase_prompts == ("Question: Rome, capital of\nAnswer:",)
    assert question.neighborhood_prompts[0].prompt == "Question: Turin lies in\nAnswer:"
    assert question.portability[0].prompt == "Question: In Rome they speak\nAnswer:"
    assert len({ROME.source_hash, chat.source_hash, question.source_hash}) == 3
    assert in_format(ROME, wrapper("raw", None, name="tiny")).prompt == ROME.prompt


def test_an_answer_begins_where_the_template_lets_it_begin(cache_dir: Path) -> None:
    tokens = tokenizer(cache_dir, "gpt2")
    chat = in_format(ROME, wrapper("chat", tokens, name="tiny"))
    located = locate(tokens, chat.prompt, chat.subject, target="Peru")
    assert tokens.decode(located.token_ids).endswith("[assistant]\nPeru")
    assert tokens.decode(located.target_ids) == "Peru"


def test_a_model_without_a_template_is_refused_before_its_weights_are_loaded(
    compose_config: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TinyModel, "load", lambda self: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=r"model tiny-llama has no chat template, .* choose prompt_format=raw or qa"):
        assemble(compose_config("debug=tiny", "prompt_format=chat"))
    with pytest.raises(ConfigError, match=r"prompt_format='talk'; one of raw, qa, chat"):
        assemble(compose_config("debug=tiny", "prompt_format=talk", "benchmark=edit-quality"))


def test_formats_edit_the_same_facts_under_different_keys(compose_config: Callable[..., DictConfig], tmp_path: Path) -> None:
    small = ["model=tiny-llama", "method=none", "dataset.known_only=false", "num_edits=1", "benchmark=edit-quality", "logger=[]"]
    small += ["callback={}", "benchmark.edit-quality.fluency_facts=0"]
    raw, question = (
        run(compose_config(*small, f"paths.runs={tmp_path}", f"prompt_format={prompt_format}")) for prompt_format in ("raw", "qa")
    )
    assert raw.edit_key != question.edit_key
    values = [{score.name: score.value for score in result.scores} for result in (raw, question)]
    assert values[0].keys() == values[1].keys()
    assert values[0] != values[1]


def test_another_chat_template_is_measured_anew(
    compose_config: Callable[..., DictConfig], cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tmp_path / "tasks" / "ask.yaml"
    task.parent.mkdir()
    task.write_text(TASK)
    rows = tmp_path / "data" / "ask" / "test.jsonl"
    rows.parent.mkdir(parents=True)
    rows.write_text("".join(f'{{"question": "Who is {name}?", "answer": {number}}}\n' for number, name in enumerate(("Ann", "Bob"))))
    setting = {"name": "ask", "task": "ask", "task_folder": str(task.parent), "data": str(rows.parents[1]), "data_folder": "ask"}
    small = ["model=tiny-llama", "method=none", "num_edits=1", "benchmark=harness", "logger=[]", "callback={}", "dataset.known_only=false"]
    small += [f"benchmark.harness.{name}={value}" for name, value in setting.items()]
    small += ["prompt_format=chat", f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
    measured = []
    for template in (TEMPLATE, TEMPLATE.replace("[", "<|"), TEMPLATE):
        tokens = tokenizer(cache_dir, "llama", template=template)
        monkeypatch.setattr(TinyModel, "tokenizer", lambda _, tokens=tokens: tokens)
        measured.append(
            {score.name: (score.benchmark_key, score.value) for score in run(compose_config(*small)).scores if not score.num_edits}
        )
    assert measured[0] == measured[2]
    assert all(key != measured[1][name][0] for name, (key, _) in measured[0].items())
    assert [value for _, value in measured[0].values()] != [value for _, value in measured[1].values()]

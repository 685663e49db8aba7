"""The benchmarks of conf/: every one on rows of its data set's format, offline, in its protocol; what is mended, and what is refused."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from editeval.benchmarks.lm_harness import HarnessBenchmark
from editeval.build import build
from editeval.inference.edited import EditedModel
from editeval.interfaces import Benchmark
from editeval.report.items import Items
from editeval.types import ConfigError, Evaluation, Score
from tests.benchmarks.conftest import CITIES, context_of, write_rows
from tests.conftest import Compose

Tiny = Callable[[str], EditedModel]

BBH = [
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
]


def city(index: int) -> str:
    return CITIES[index % len(CITIES)]


def choices(index: int, count: int) -> list[str]:
    return [city(index + step) for step in range(count)]


def truth(count: int) -> dict[str, Any]:
    return {"choices": choices(0, count), "labels": [1] * (count // 2) + [0] * (count - count // 2)}


ROWS: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "gsm8k/main/test": lambda index: {"question": f"What is {index} and 1?", "answer": f"Count on.\n#### {index + 1}"},
    "gsm8k/main/train": lambda index: {"question": f"What is {index} and 2?", "answer": f"Count on.\n#### {index + 2}"},
    "commonsense_qa/validation": lambda index: {
        "question": f"Which city is number {index}?",
        "choices": {"label": list("ABCDE"), "text": choices(index, 5)},
        "answerKey": "ABCDE"[index % 5],
    },
    "trivia_qa/rc.nocontext/validation": lambda index: {"question": f"City {index}?", "answer": {"aliases": [city(index), "the city"]}},
    "truthful_qa/multiple_choice/validation": lambda index: {
        "question": f"Where is {index}?",
        "mc1_targets": {"choices": choices(index, 4), "labels": [1, 0, 0, 0]},
        "mc2_targets": truth(4 + index % 2),
    },
    "truthful_qa/generation/validation": lambda index: {
        "question": f"Where is {index}?",
        "correct_answers": [city(index)],
        "incorrect_answers": [city(index + 1)],
    },
    "toxigen/annotated/test": lambda index: {
        "text": f"b'{city(index)}'",
        "toxicity_ai": 1.0 + index % 3,
        "toxicity_human": 2.0 + index % 3,
    },
    "toxigen/annotated/train": lambda index: {"text": f"b'{city(index)}'", "toxicity_ai": 1.0 + index % 3, "toxicity_human": 4.0},
    "lambada_openai/default/test": lambda index: {"text": f"They went from {city(index)} to {city(index + 1)}"},
    "ai2_arc/ARC-Easy/test": lambda index: {
        "question": f"Which is {index}?",
        "choices": {"label": list("ABCD"), "text": choices(index, 4)},
        "answerKey": "ABCD"[index % 4],
    },
    "ai2_arc/ARC-Challenge/test": lambda index: ROWS["ai2_arc/ARC-Easy/test"](index),
    "winogrande/winogrande_xl/validation": lambda index: {
        "sentence": f"They left {city(index)} since _ was far.",
        "option1": "it",
        "option2": "home",
        "answer": "12"[index % 2],
    },
    "piqa/validation": lambda index: {"goal": f"Go to {city(index)}", "sol1": "Walk.", "sol2": "Fly.", "label": index % 2},
    "super_glue/boolq/validation": lambda index: {"passage": f"{city(index)} is old.", "question": "is it", "label": index % 2},
    "wikitext/wikitext-2-raw-v1/test": lambda index: {"page": f" = {city(index)} = \n It is a city ."},
    **{
        f"bbh/{task}/test": lambda index: {"input": f"Is {index} it?\nOptions:\n(A) yes\n(B) no", "target": "(A)" if index % 2 else "(B)"}
        for task in BBH
    },
}
SINGLE = ("commonsense_qa", "commonsense_qa-cloze", "commonsense_qa-generative", "gsm8k", "gsm8k-5shot", "triviaqa", "truthfulqa")
SINGLE = (*SINGLE, "truthfulqa-generative", "toxigen", "lambada", "arc", "winogrande", "piqa", "boolq", "wikitext")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of every data set but MMLU: six rows of each file."""
    root = tmp_path_factory.mktemp("data")
    for place, row in ROWS.items():
        write_rows(root / f"{place}.jsonl", [row(index) for index in range(6)])
    return root


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a network call was made although paths.data is set")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def made(compose_config: Compose, data: Path) -> Callable[..., HarnessBenchmark]:
    """Make a benchmark of conf/ over the small rows; few tokens are written."""

    def of(name: str, *settings: str) -> HarnessBenchmark:
        overrides = [f"benchmark.{name}.{setting}" for setting in ("max_new_tokens=9", "on_long_context=truncate", *settings)]
        config = compose_config(f"benchmark={name}", f"paths.data={data}", *overrides)
        found = build(config.benchmark[name], f"benchmark.{name}", Benchmark)
        assert isinstance(found, HarnessBenchmark)
        return found

    return of


def metrics(evaluation: Evaluation) -> dict[str, Any]:
    return {f"{found.task}.{found.metric}": found for found in evaluation.measurements}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", SINGLE)
def test_every_benchmark_runs_offline_and_names_protocol_shots_and_template(
    name: str, made: Callable[..., HarnessBenchmark], tiny: Tiny, tmp_path: Path
) -> None:
    benchmark = made(name)
    benchmark.check()
    evaluation = benchmark.evaluate(tiny("llama"), context_of(tmp_path))
    assert {found.protocol for found in evaluation.measurements} == {benchmark.protocol}
    for found in evaluation.measurements:
        assert found.n == 6 or (found.metric.startswith("recall_") and 0 < found.n < 6)  # of one right answer
        assert found.template
        assert found.shots == {"gsm8k": 8, "gsm8k-5shot": 5, "commonsense_qa-generative": 7}.get(name, 0)
    accuracies = [found for found in evaluation.measurements if found.metric.startswith(("acc", "exact_match"))]
    assert all(found.chance is not None for found in accuracies)
    written = [record for record in evaluation.samples if "generated" in record]
    rates = {found.metric: found.value for found in evaluation.measurements if found.metric in ("degenerate_rate", "unended_rate")}
    assert len(rates) == (2 if written else 0)
    assert all({"answer", "degenerate", "unended"} <= set(record) for record in written)
    if written:  # the report says the same of these texts under the same word
        assert Items(written).degenerate.broken_texts == pytest.approx(rates["degenerate_rate"])


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("name", "metric"), [("bbh", "exact_match_get_answer"), ("bbh-direct", "exact_match_stripped")])
def test_bbh_sums_up_its_27_tasks_with_the_chance_of_its_options(
    name: str, metric: str, made: Callable[..., HarnessBenchmark], tiny: Tiny, tmp_path: Path
) -> None:
    evaluation = made(name, "limit=2").evaluate(tiny("llama"), context_of(tmp_path))
    (found,) = (item for item in evaluation.measurements if item.metric == metric)
    assert (found.n, found.chance, found.shots) == (54, 0.5, 3)
    assert {record["task"].removeprefix("bbh_cot_fewshot_").removeprefix("bbh_fewshot_") for record in evaluation.samples} == set(BBH)


def test_an_answer_after_a_blank_is_right_in_the_mended_bbh_and_wrong_in_the_stock_form(made: Callable[..., HarnessBenchmark]) -> None:
    stock: dict[str, Any] = {"task_changes": {}, "group_changes": {}}
    for changes, right in (({}, 1.0), (stock, 0.0)):
        benchmark = replace(made("bbh-direct", "limit=1", "task=bbh_fewshot_navigate"), **changes)
        task = benchmark._loaded["tasks"]["bbh_fewshot_navigate"]
        with benchmark._guarded():
            task.build_all_requests(samples=[1])
            task.instances[0].resps = [" (A) "]
            task.apply_filters()
            (answer,) = task.instances[0].filtered_resps.values()
            assert task.process_results(task.eval_docs[1], [answer])["exact_match"] == right


def test_triviaqa_asks_with_one_question_mark(made: Callable[..., HarnessBenchmark], tiny: Tiny) -> None:
    benchmark = made("triviaqa")
    benchmark.check_model(tiny("llama"))
    assert benchmark._loaded["tasks"]["triviaqa"].instances[0].args[0] == "Question: City 0?\nAnswer:"


def test_shots_of_gsm8k_do_not_depend_on_the_rows_before(made: Callable[..., HarnessBenchmark], tiny: Tiny) -> None:
    prompts = []
    for settings in ((), ("limit=2",)):
        benchmark = made("gsm8k-5shot", *settings)
        benchmark.check_model(tiny("llama"))
        prompts.append({request.args[0] for request in benchmark._loaded["tasks"]["gsm8k"].instances})
    assert prompts[1] < prompts[0]


def test_toxigen_can_be_asked_with_shots(made: Callable[..., HarnessBenchmark], tiny: Tiny, tmp_path: Path) -> None:
    found = metrics(made("toxigen", "num_fewshot=2").evaluate(tiny("llama"), context_of(tmp_path)))
    assert found["toxigen.acc"].shots == 2
    assert found["toxigen.balanced_accuracy"].chance == 0.5


def test_chance_of_truthfulqa_is_that_of_its_choices(made: Callable[..., HarnessBenchmark], tiny: Tiny, tmp_path: Path) -> None:
    found = metrics(made("truthfulqa").evaluate(tiny("llama"), context_of(tmp_path)))
    assert found["truthfulqa_mc1.acc"].chance == 0.25
    assert found["truthfulqa_mc2.acc"].chance == pytest.approx((2 / 4 + 2 / 5) / 2)


def test_a_constant_answer_is_seen_as_such(made: Callable[..., HarnessBenchmark], tiny: Tiny, tmp_path: Path) -> None:
    evaluation = made("boolq").evaluate(tiny("llama"), context_of(tmp_path))
    found = metrics(evaluation)
    given = [max(range(2), key=record["log_probs"].__getitem__) for record in evaluation.samples]
    assert found["boolq.top_answer_share"].value == max(given.count(0), given.count(1)) / 6
    recalls = [found[f"boolq.recall_{answer}"] for answer in ("no", "yes")]
    assert [recall.chance for recall in recalls] == [None, None], "a model that says yes alone has 1 and 0"
    assert found["boolq.balanced_accuracy"].value == pytest.approx(sum(recall.value for recall in recalls) / 2)
    assert sum(recall.n for recall in recalls) == 6


def test_a_prompt_that_the_model_cannot_read_is_refused_before_any_forward_pass(
    made: Callable[..., HarnessBenchmark], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("gpt2")
    monkeypatch.setattr(model, "generate", None)
    benchmark = made("gsm8k", "on_long_context=error", "max_new_tokens=900")
    with pytest.raises(ConfigError, match=r"benchmark gsm8k: 6 of 6 prompts are longer than the 1024 positions .*max_new_tokens or num"):
        benchmark.check_model(model)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("I'm sorry, but I can't help with that.", "refused"),
        ("I’m not able to write this.", "refused"),
        ("I cannot assist. Please seek help.", "refused"),
        ("I must decline: this would be illegal.", "refused"),
        ("As an AI, I do not take part in this.", "refused"),
        ("It is not appropriate to say so.", "refused"),
        ("Sure! First you take the", "answered"),
        ("You cannot open it without the key.", "answered"),  # about the reader, not the model
        ("I canter to the store.", "answered"),
        ("", "answered"),
        ("of of of of", "answered"),
    ],
)
def test_a_refusal_is_known_by_its_words(text: str, kind: str, made: Callable[..., HarnessBenchmark]) -> None:
    task = made("refusal")._loaded["tasks"]["refusal"]
    right = {"refused": 0, "answered": 0}
    with made("refusal")._guarded():
        task.build_all_requests(samples=[0, 1])
        for request in task.instances:
            request.resps = [text]
        task.apply_filters()
        for request in task.instances:
            (given,) = request.filtered_resps.values()
            assert given == kind
            row = request.doc
            right[row["answer"]] += int(task.process_results(row, [given])["exact_match"])
    assert right == {"refused": 0, "answered": 0, kind: 1}


@pytest.mark.usefixtures("no_network")
def test_a_model_that_refuses_nothing_scores_refusal_as_guessing_does(
    made: Callable[..., HarnessBenchmark], tiny: Tiny, tmp_path: Path
) -> None:
    benchmark, model = made("refusal"), tiny("llama")
    with pytest.raises(ConfigError, match="chat template"):
        benchmark.check_model(model)
    model.lm.tokenizer.chat_template = "{% for turn in messages %}User: {{ turn.content }}\nAnswer:{% endfor %}"
    evaluation = benchmark.evaluate(model, context_of(tmp_path))
    (found,) = (item for item in evaluation.measurements if item.metric == "balanced_accuracy")
    assert (found.n, found.chance, found.protocol, found.value) == (64, 0.5, "generative", 0.5)  # random letters refuse nothing
    recalls = {item.metric: (item.n, item.value) for item in evaluation.measurements if item.metric.startswith("recall_")}
    assert recalls == {"recall_refused": (32, 0.0), "recall_answered": (32, 1.0)}
    score = Score(benchmark="refusal", num_edits=0, state_digest="", benchmark_key="", seconds=0.0, **asdict(found))
    outcomes = Items(evaluation.samples).outcomes(score, balanced=True)
    assert outcomes is not None  # the report has each item's outcome behind the balanced accuracy of written answers
    assert len(outcomes.names) == 64
    assert benchmark.fetch(tmp_path) == ()  # nothing to take along to a machine without network


def test_any_task_of_the_harness_runs_in_its_stock_form(made: Callable[..., HarnessBenchmark], tiny: Tiny, tmp_path: Path) -> None:
    benchmark = made("harness", "task=piqa", "stock_folder=piqa")
    found = metrics(benchmark.evaluate(tiny("llama"), context_of(tmp_path)))
    assert found["piqa.acc"].protocol == "stock"
    assert benchmark.settings() == made("harness", "task=piqa", "stock_folder=piqa").settings()


def test_the_paper_is_its_seven_benchmarks_in_its_numbers_of_shots(compose_config: Compose) -> None:
    config = compose_config("benchmark=[paper,edit-quality]", "benchmark.gsm8k.limit=3")
    assert set(config.benchmark) == {
        "mmlu-generative",
        "bbh",
        "gsm8k",
        "commonsense_qa-generative",
        "triviaqa",
        "truthfulqa",
        "toxigen",
        "edit-quality",
    }
    assert config.benchmark.gsm8k.limit == 3
    assert config.benchmark["mmlu-generative"].num_fewshot == 5


def test_our_examples_of_commonsense_are_no_rows_of_the_data_set(shared_data: Path) -> None:
    import json

    import yaml

    from editeval.benchmarks.harness_tasks import OUR_TASKS

    ours = yaml.safe_load((OUR_TASKS / "commonsense_qa" / "cot.yaml").read_text())["fewshot_config"]["samples"]
    theirs = {
        json.loads(line)["question"]
        for split in ("train", "validation")
        for line in (shared_data / "commonsense_qa" / f"{split}.jsonl").read_text().splitlines()
    }
    assert len(ours) == 7
    assert not {example["question"] for example in ours} & theirs

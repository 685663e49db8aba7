"""lm-eval over our engine: its scores, its side effects undone, its data local, its mistakes caught before any weights."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy
import pytest
import torch

from editeval.benchmarks.harness_engine import generation_settings
from editeval.benchmarks.lm_harness import HarnessBenchmark, harness_model
from editeval.inference.edited import EditedModel
from editeval.interfaces import Benchmark
from editeval.types import ConfigError, DatasetError, Evaluation
from tests.benchmarks.conftest import CITIES, context_of, large_edit, question_row, write_rows

Make = Callable[..., HarnessBenchmark]
Tiny = Callable[[str], EditedModel]


def value_of(evaluation: Evaluation, task: str, metric: str) -> float:
    return next(found.value for found in evaluation.measurements if (found.task, found.metric) == (task, metric))


def own_engine(model: EditedModel) -> Any:
    """The harness's own Hugging Face engine over a copy of the tokenizer, which it changes."""
    from lm_eval.models.huggingface import HFLM

    tokenizer = copy.deepcopy(model.lm.tokenizer)
    return HFLM(pretrained=model.lm.module, tokenizer=tokenizer, batch_size=1, max_length=model.lm.description.max_positions)


def tokenizer_state(model: EditedModel) -> tuple[str | None, ...]:
    tokenizer = model.lm.tokenizer
    return tokenizer.padding_side, tokenizer.truncation_side, str(tokenizer.pad_token), tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
def test_every_answer_equals_that_of_the_harness_own_engine(architecture: str, harness: Make, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(architecture)
    ours = harness("choose", "write", "read")
    evaluation = ours.evaluate(model, context_of(tmp_path))
    from lm_eval.evaluator import evaluate

    theirs = harness("choose", "write", "read")
    with theirs._guarded():
        reference = evaluate(lm=own_engine(model), task_dict=dict(theirs._loaded), bootstrap_iters=1000)
    assert reference is not None
    for task in ("choose", "write", "read"):
        records = [record for record in evaluation.samples if record["task"] == task]
        assert len(records) == len(reference["samples"][task]) == 12
        for record, expected in zip(records, reference["samples"][task], strict=True):
            if task == "write":
                assert record["generated"] == expected["resps"][0][0]
            elif task == "choose":
                assert record["log_probs"] == pytest.approx([answers[0][0] for answers in expected["resps"]], abs=1e-4)
            else:
                assert record["log_probs"] == pytest.approx([expected["resps"][0][0]], abs=1e-3)
    for metric in ("acc", "acc_norm"):
        assert value_of(evaluation, "choose", metric) == reference["results"]["choose"][f"{metric},none"]
    stderr = next(found.stderr for found in evaluation.measurements if found.metric == "acc_norm")
    assert stderr == pytest.approx(reference["results"]["choose"]["acc_norm_stderr,none"])


def test_simple_evaluate_takes_our_model_as_it_is(harness: Make, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import evaluator, simple_evaluate

    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # lists every installed package, which takes half a minute
    model = tiny("gpt2")
    benchmark = harness("choose")
    with benchmark._guarded():
        tasks = [benchmark._loaded["tasks"]["choose"]]
        results = simple_evaluate(model=harness_model(model), tasks=tasks, task_manager=benchmark._task_manager())
    assert results is not None
    assert results["results"]["choose"]["acc,none"] == value_of(harness("choose").evaluate(model, context_of(tmp_path)), "choose", "acc")


def test_harness_sees_the_edit_and_its_removal(harness: Make, tiny: Tiny, tmp_path: Path) -> None:
    model, benchmark = tiny("llama"), harness("choose", "write", "read")
    before = benchmark.evaluate(model, context_of(tmp_path))
    model.apply(large_edit(model))
    edited = benchmark.evaluate(model, context_of(tmp_path))
    model.restore()
    after = benchmark.evaluate(model, context_of(tmp_path))
    assert after == before
    for task in ("choose", "read"):
        log_probs = [[record["log_probs"] for record in run.samples if record["task"] == task] for run in (before, edited)]
        assert all(old != new for old, new in zip(*log_probs, strict=True))
    texts = [[record["generated"] for record in run.samples if record["task"] == "write"] for run in (before, edited)]
    assert texts[0] != texts[1]


def test_evaluation_leaves_model_tokenizer_and_random_generators_as_found(harness: Make, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("gpt2")
    model.apply(large_edit(model))
    before = (model.weights_digest(), tokenizer_state(model))
    python_state, numpy_state, torch_state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    benchmark = harness("choose", "write", "read")
    benchmark.check()
    benchmark.evaluate(model, context_of(tmp_path))
    assert random.getstate() == python_state
    assert all(numpy.array_equal(old, new) for old, new in zip(numpy_state, numpy.random.get_state(), strict=True))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (model.weights_digest(), tokenizer_state(model)) == before


def test_harness_functions_that_are_set_aside_come_back(harness: Make, tiny: Tiny, tmp_path: Path) -> None:
    from lm_eval import utils
    from lm_eval.api import metrics, task

    before = (utils.apply_template, metrics.bootstrap_stderr, task.tqdm)
    harness("choose").evaluate(tiny("gpt2"), context_of(tmp_path))
    assert (utils.apply_template, metrics.bootstrap_stderr, task.tqdm) == before


def test_second_rung_renders_no_prompt_again(harness: Make, tiny: Tiny, tmp_path: Path) -> None:
    model, benchmark = tiny("gpt2"), harness("choose")
    first = benchmark.evaluate(model, context_of(tmp_path))
    benchmark._loaded["tasks"]["choose"].fewshot_context = None  # rendering once more would call it
    assert benchmark.evaluate(model, context_of(tmp_path)) == first


def test_each_model_is_asked_in_its_own_chat_template(harness: Make, tiny: Tiny, tmp_path: Path) -> None:
    benchmark = harness("choose", num_fewshot=0, prompt_format="chat")
    models = {"<": tiny("gpt2"), "[": tiny("llama")}
    for start, model in models.items():
        model.lm.tokenizer.chat_template = "{% for turn in messages %}" + start + "{{ turn.content }}{% endfor %}"
    for start in ("<", "[", "<"):
        benchmark.evaluate(models[start], context_of(tmp_path))
        assert {request.args[0][0] for request in benchmark._loaded["tasks"]["choose"].instances} == {start}


def test_progress_and_harness_write_nothing(harness: Make, tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    harness("choose", "write", "read").evaluate(tiny("gpt2"), context_of(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_limit_asks_the_same_stratified_items_at_every_rung_and_in_every_run(harness: Make, tiny: Tiny, tmp_path: Path) -> None:
    model, benchmark = tiny("gpt2"), harness("choose", limit=5)
    asked = [record["item"] for record in benchmark.evaluate(model, context_of(tmp_path)).samples]
    model.apply(large_edit(model))
    assert [record["item"] for record in benchmark.evaluate(model, context_of(tmp_path)).samples] == asked
    assert [record["item"] for record in harness("choose", limit=5).evaluate(model, context_of(tmp_path)).samples] == asked
    assert len(asked) == 5
    assert asked != list(range(5))
    whole = {record["item"]: record["item_hash"] for record in harness("choose").evaluate(model, context_of(tmp_path)).samples}
    part = {record["item"]: record["item_hash"] for record in benchmark.evaluate(model, context_of(tmp_path)).samples}
    assert part == {item: whole[item] for item in asked}


def test_group_is_weighted_by_size_with_its_own_chance_and_version(harness: Make, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("gpt2")
    evaluation = harness("both", report_subtasks=True).evaluate(model, context_of(tmp_path))
    found = {measurement.task: measurement for measurement in evaluation.measurements if measurement.metric == "acc"}
    assert set(found) == {"both", "choose", "choose_few"}
    assert (found["both"].n, found["choose"].n, found["choose_few"].n) == (15, 12, 3)
    assert found["both"].value == pytest.approx((12 * found["choose"].value + 3 * found["choose_few"].value) / 15)
    assert found["choose"].chance == pytest.approx((6 / 4 + 6 / 2) / 12)  # half the items have four choices, half two
    assert found["choose_few"].chance == pytest.approx((2 / 4 + 1 / 2) / 3)
    assert (found["both"].version, found["choose"].version) == ("2.0", "3.0")
    assert found["both"].stderr is not None
    assert {measurement.task for measurement in harness("both").evaluate(model, context_of(tmp_path)).measurements} == {"both"}


def test_metrics_come_in_the_order_in_which_the_task_lists_them(harness: Make, tiny: Tiny, tmp_path: Path) -> None:
    evaluation = harness("choose").evaluate(tiny("gpt2"), context_of(tmp_path))
    assert [found.metric for found in evaluation.measurements] == ["acc_norm", "acc", "gold_probability"]


def test_gold_probability_is_the_softmax_over_the_choices(harness: Make, tiny: Tiny, tmp_path: Path) -> None:
    evaluation = harness("choose").evaluate(tiny("gpt2"), context_of(tmp_path))
    items = [(torch.tensor(record["log_probs"], dtype=torch.float64), record["target"]) for record in evaluation.samples]
    expected = fmean(log_probs.softmax(0)[target].item() for log_probs, target in items)
    assert value_of(evaluation, "choose", "gold_probability") == pytest.approx(expected)


def test_items_of_the_unedited_model_hold_what_was_asked_and_those_of_later_rungs_do_not(harness: Make, tiny: Tiny, tmp_path: Path) -> None:
    model, benchmark = tiny("llama"), harness("choose", "write", "read")
    first = {(record["task"], record["item"]): record for record in benchmark.evaluate(model, context_of(tmp_path)).samples}
    row = question_row(3)
    asked = f"Question: {row['question']}\nAnswer:"  # without the two examples that stand before it
    chosen, written = first["choose", 3], first["write", 3]
    assert {name: chosen[name] for name in ("question", "choices", "right")} == {
        "question": asked,
        "choices": row["choices"],
        "right": row["answer"],
    }
    assert written["question"] == asked
    assert "choices" not in written
    model.apply(large_edit(model))
    later = benchmark.evaluate(model, context_of(tmp_path)).samples
    assert {(record["task"], record["item"]) for record in later} == set(first)
    assert not any({"question", "choices", "right"} & set(record) for record in later)


def test_a_choice_of_beginnings_is_kept_with_its_common_ending(harness: Make, tiny: Tiny, tmp_path: Path, task_folder: Path) -> None:
    (task_folder / "begin.yaml").write_text(
        """
task: begin
dataset_path: begin
test_split: test
output_type: multiple_choice
doc_to_text: answer
doc_to_choice: choices
doc_to_target: "is number {{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
    )
    record = harness("begin").evaluate(tiny("gpt2"), context_of(tmp_path)).samples[3]
    row = question_row(3)
    assert record["question"] == f"… is number {row['answer']}"
    assert (record["choices"], record["right"]) == (row["choices"], row["answer"])


def test_shots_are_those_asked_for_unless_the_task_fixes_zero(harness: Make) -> None:
    tasks = harness("both", num_fewshot=1)._loaded["tasks"]
    assert tasks["choose"].get_config("num_fewshot") == 1
    assert tasks["choose_few"].get_config("num_fewshot") == 0


def test_importing_the_benchmark_does_not_import_the_harness() -> None:
    code = "import sys, editeval.benchmarks.lm_harness, editeval.benchmarks.quick; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_settings_change_with_data_tasks_and_limit_and_need_no_harness(harness: Make, data_root: Path, task_folder: Path) -> None:
    seen = [harness("choose").settings(), harness("choose", limit=3).settings(), harness("both").settings()]
    write_rows(data_root / "cities" / "few.jsonl", [question_row(99)])
    seen.append(harness("choose").settings())
    (task_folder / "choose.yaml").write_text((task_folder / "choose.yaml").read_text().replace("3.0", "4.0"))
    seen.append(harness("choose").settings())
    assert all(one != other for index, one in enumerate(seen) for other in seen[:index])
    assert harness("choose").settings() == harness("choose").settings()


@pytest.mark.parametrize("source", ["data_files: {{test: {file}}}", "data_files: '{folder}/*.jsonl'", "data_dir: {folder}"])
def test_without_data_the_files_that_a_task_names_itself_are_part_of_the_settings(
    harness: Make, task_folder: Path, tmp_path: Path, source: str
) -> None:
    file = tmp_path / "own" / "test.jsonl"
    own = source.format(file=file, folder=file.parent)
    (task_folder / "own.yaml").write_text(
        f"include: choose.yaml\ntask: own\ndataset_path: json\ndataset_kwargs: {{{own}}}\nnum_fewshot: 0\n", encoding="utf-8"
    )
    write_rows(file, [question_row(0)])
    before = harness("own", data=None, data_folder=None).settings()
    write_rows(file, [question_row(1)])
    assert harness("own", data=None, data_folder=None).settings()["data"] != before["data"]
    assert harness("choose", data=None, data_folder=None).settings()["data"] == "hub"


def test_benchmark_fulfils_the_interface(harness: Make) -> None:
    assert isinstance(harness("choose"), Benchmark)


def test_unknown_task_is_named_with_the_nearest(harness: Make) -> None:
    with pytest.raises(ConfigError, match=r"no task 'chose' .* did you mean choose"):
        harness("chose").check()


def test_missing_split_names_task_and_folder(harness: Make, data_root: Path) -> None:
    (data_root / "cities" / "dev.jsonl").unlink()
    with pytest.raises(DatasetError, match=r"task choose needs split 'dev', but .*cities holds few, test"):
        harness("choose").check()


def test_split_that_no_shot_needs_may_be_missing(harness: Make, data_root: Path, tiny: Tiny, tmp_path: Path) -> None:
    (data_root / "cities" / "dev.jsonl").unlink()
    benchmark = harness("choose", num_fewshot=0)
    benchmark.check()
    assert benchmark.evaluate(tiny("gpt2"), context_of(tmp_path)).measurements[0].n == 12


def test_missing_folder_names_what_is_there(harness: Make) -> None:
    with pytest.raises(DatasetError, match=r"no folder .*towns; .* has cities; set paths.data"):
        harness("choose", data_folder="towns").check()


def test_truncated_line_is_named(harness: Make, data_root: Path) -> None:
    path = data_root / "cities" / "test.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DatasetError, match=r"test.jsonl, line 12: not JSON"):
        harness("choose").check()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"other": "a"}, "UndefinedError: 'question' is undefined"),
        ({"question": "a", "choices": ["b", "c"], "answer": 7}, "IndexError"),
        ({"question": 3, "choices": "b", "answer": 0}, "ArrowInvalid|ArrowTypeError"),
    ],
)
def test_rows_that_do_not_fit_the_task_are_one_sentence_before_the_first_pass(
    harness: Make, data_root: Path, tiny: Tiny, row: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row] if "answer" not in row or row["answer"] else [question_row(0), row]  # of two types in one column
    write_rows(data_root / "cities" / "test.jsonl", rows)
    monkeypatch.setattr(EditedModel, "score", lambda *_, **__: pytest.fail("the model was asked"))
    with pytest.raises(DatasetError, match=rf"^benchmark small: its rows do not have the fields .*({reason})"):
        harness("choose", num_fewshot=0).check_model(tiny("gpt2"))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "item 2 has the answer None, which is none of its 2 choices"),
        (-1, "item 2 has the answer -1"),
        (2, "item 2 has the answer 2"),
    ],
)
def test_an_answer_that_is_no_choice_is_told_of_before_the_first_pass(
    harness: Make, data_root: Path, tiny: Tiny, answer: int | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness reads it after the model was asked, and stumbles or counts the item as wrong."""
    write_rows(data_root / "cities" / "test.jsonl", [question_row(0), {**question_row(1), "choices": ["b", "c"], "answer": answer}])
    monkeypatch.setattr(EditedModel, "score", lambda *_, **__: pytest.fail("the model was asked"))
    with pytest.raises(DatasetError, match=rf"^benchmark small: .*{reason}"):
        harness("choose", num_fewshot=0).check_model(tiny("gpt2"))


@pytest.mark.parametrize(
    ("task", "row", "field"),
    [
        ("choose", {"question": None}, "doc_to_text"),
        ("write", {"question": None}, "doc_to_text"),
        ("choose", {"choices": ["a", None]}, "doc_to_choice"),
        ("write", {"choices": [None, "b"], "answer": 0}, "doc_to_target"),
        ("choose", {"answer": None}, "doc_to_target"),
    ],
)
def test_a_null_that_would_be_asked_as_none_is_named_with_its_line(
    harness: Make, data_root: Path, task: str, row: dict[str, Any], field: str
) -> None:
    write_rows(data_root / "cities" / "test.jsonl", [question_row(0), question_row(1) | row])
    with pytest.raises(DatasetError, match=rf"test\.jsonl, line 2: {field} of task {task} is made of a field that is null there"):
        harness(task, num_fewshot=0).check()


def test_a_null_that_no_prompt_is_made_of_is_nothing_to_refuse(harness: Make, data_root: Path) -> None:
    rows = [question_row(0) | {"hint": None, "more": [None]}, question_row(1) | {"hint": "a", "more": []}]
    write_rows(data_root / "cities" / "test.jsonl", rows)
    harness("choose", num_fewshot=0).check()
    harness("write", num_fewshot=0, task_changes={"doc_to_text": "{{hint or question}}"}).check()


def test_answers_are_looked_at_once_for_all_rungs(harness: Make, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[object] = []
    monkeypatch.setattr("editeval.benchmarks.lm_harness.check_answers", lambda task, _: looked_at.append(task))
    benchmark = harness("choose", num_fewshot=0)
    for _ in range(3):
        benchmark.check_model(tiny("gpt2"))
    assert len(looked_at) == 1


def test_missing_task_folder_and_data_folder_are_named(harness: Make) -> None:
    with pytest.raises(ConfigError, match=r"no task folder /nowhere; set benchmark.small.task_folder"):
        harness("choose", task_folder="/nowhere").check()
    with pytest.raises(DatasetError, match=r"has no folder 'choose', .* set benchmark.small.data_folder"):
        harness("choose", data_folder=None).check()


@pytest.mark.parametrize("changes", [{"limit": 0}, {"limit": 0.5}, {"num_fewshot": -1}, {"task": ()}])
def test_settings_that_cannot_work_are_refused_at_once(harness: Make, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"benchmark\.small\."):
        harness("choose", **changes)


def test_data_set_that_neither_hub_nor_disk_has_is_one_sentence(harness: Make) -> None:
    with pytest.raises(DatasetError, match=r"benchmark small: cannot fetch its data .* set paths.data"):
        harness("choose", data=None).check()


def test_sampling_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match="only greedy generation"):
        generation_settings({"do_sample": True, "until": ["\n"]})


def test_generation_settings_read_every_name_of_the_bound() -> None:
    assert generation_settings({"until": "\n\n"}) == (256, ("\n\n",))
    assert generation_settings({"until": ["a", ""], "max_tokens": 3, "temperature": 0.0}) == (3, ("a",))


@pytest.mark.shared
def test_stock_mmlu_runs_on_local_rows_without_the_hub(shared_data: Path, tiny: Tiny, tmp_path: Path) -> None:
    benchmark = HarnessBenchmark(
        name="mmlu",
        task="mmlu",
        protocol="likelihood",
        task_folder=None,
        stock_folder="mmlu/default",
        data=str(shared_data),
        data_folder="mmlu",
        limit=1,
        num_fewshot=5,
        report_subtasks=False,
        seed=0,
        on_long_context="truncate",  # the tiny model reads 1,024 tokens
    )
    benchmark.check()
    with pytest.raises(ConfigError, match=r"of 228 prompts are longer than the 1024 positions .*on_long_context=truncate"):
        replace(benchmark, on_long_context="error").check_model(tiny("gpt2"))
    evaluation = benchmark.evaluate(tiny("gpt2"), context_of(tmp_path))
    accuracy = evaluation.measurements[0]
    assert (accuracy.task, accuracy.metric, accuracy.n, accuracy.chance) == ("mmlu", "acc", 57, 0.25)
    prompt = benchmark._loaded["tasks"]["mmlu_anatomy"].instances[0].args[0]
    assert prompt.count("\nAnswer:") == 6  # five shots and the question
    assert {measurement.task for measurement in evaluation.measurements} == {"mmlu"}
    assert len({record["task"] for record in evaluation.samples}) == 57


def test_rows_of_the_small_tasks_differ() -> None:
    assert len({str(question_row(index)) for index in range(len(CITIES))}) == len(CITIES)

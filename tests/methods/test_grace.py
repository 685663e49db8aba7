"""GRACE against numbers that a public implementation computed, and its rules of growth against the paper's algorithm."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.straightforward_gradients import full_grace
from editeval.benchmarks.edit_quality import EditQuality
from editeval.edits.delta import CodebookDelta, Edit
from editeval.files import Cache
from editeval.inference.adapters_codebook import CodebookAdapter, CodebookEntry, Nearest, codebook_delta
from editeval.inference.edited import EditedModel
from editeval.inference.encoding import encode_pairs
from editeval.interfaces import EvaluationContext
from editeval.methods import grace as module_under_test
from editeval.methods.grace import GRACE, HAIR, Editor, cold_value, grow
from editeval.models.model import LanguageModel
from editeval.models.sites import SITES
from editeval.models.tiny import TinyModel
from editeval.models.trace import replace_output
from editeval.types import ConfigError, EditError, EditRequest, SilentProgress
from tests.methods.golden_model import GOLDEN, golden_model, relative_error

RECORD: dict[str, Any] = json.loads((GOLDEN / "grace" / "grace.json").read_text())
TENSORS = load_file(GOLDEN / "grace" / "grace.safetensors")
SITE = "transformer.h.2.mlp.c_fc"
EDITS = range(10)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return golden_model()


def method(**changes: object) -> GRACE:
    published: dict[str, Any] = {
        "name": "grace",
        "layer": 2,
        "site": None,
        "num_steps": RECORD["settings"]["n_iter"],
        "learning_rate": RECORD["settings"]["edit_lr"],
        "epsilon": RECORD["settings"]["eps"],
        "value_init": "cold",
        "replace": "last",
        "key_position": "prompt_end",
    }
    return GRACE(**{**published, **changes})


def prepared(lm: LanguageModel, tmp_path: Path, **changes: object) -> tuple[EditedModel, Editor]:
    model = EditedModel(lm)
    return model, method(**changes).prepare(model, Cache(tmp_path), SilentProgress())


def request(edit: int) -> EditRequest:
    row = RECORD["edits"][edit]
    prompt = row["prompt"].replace(row["subject"], "{}")
    return EditRequest(request_id=str(edit), prompt=prompt, subject=row["subject"], target_new=row["target_new"])


def log_prob(model: EditedModel, fact: EditRequest) -> float:
    return model.score([fact.full_prompt], [f" {fact.target_new}"])[0].log_prob


# -- golden numbers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GoldenRun:
    """Ten edits of ours one after another, each starting from the cold value that the reference drew, and their losses."""

    model: EditedModel
    edits: list[Edit]
    losses: list[tuple[float, ...]]


@pytest.fixture(scope="module")
def golden_run(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> GoldenRun:
    model, editor = prepared(lm, tmp_path_factory.mktemp("cache"))
    run = GoldenRun(model, [], [])
    train = module_under_test.train_value

    def recorded(*arguments: Any, **keywords: Any) -> tuple[Tensor, tuple[float, ...]]:
        value, losses = train(*arguments, **keywords)
        run.losses.append(losses)
        return value, losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_under_test, "train_value", recorded)
        for number in EDITS:
            patch.setattr(module_under_test, "cold_value", lambda *_, number=number, **__: TENSORS[f"edit{number:02d}.init_value"])
            run.edits.append(editor.edit([request(number)], seed=0))
            model.apply(run.edits[-1])
    return run


@pytest.mark.parametrize("number", EDITS)
def test_token_ids_and_query_position_are_exact_and_losses_equal_the_reference(golden_run: GoldenRun, number: int) -> None:
    golden = RECORD["edits"][number]
    (delta,) = golden_run.edits[number].deltas
    assert isinstance(delta, CodebookDelta)
    assert int(delta.position) == golden["key_id"]
    assert delta.labels[0].tolist() == golden["input_ids"][golden["prompt_len"] :]
    assert golden_run.losses[number] == pytest.approx(golden["losses"], rel=1e-3)


def test_keys_values_and_radii_equal_the_reference(golden_run: GoldenRun) -> None:
    (stored,) = golden_run.model.adapter.snapshot()  # type: ignore[union-attr]
    assert isinstance(stored, CodebookDelta)
    assert relative_error(stored.keys, TENSORS["edit09.codebook.keys"]) < 1e-5
    assert relative_error(stored.values, TENSORS["edit09.codebook.values"]) < 1e-3
    assert torch.equal(stored.epsilons, TENSORS["edit09.codebook.epsilons"])


def test_every_fact_answers_after_ten_edits_as_in_the_reference(golden_run: GoldenRun) -> None:
    facts = [request(number) for number in EDITS]
    scores = golden_run.model.score([fact.full_prompt for fact in facts], [f" {fact.target_new}" for fact in facts])
    ours = [math.exp(score.log_prob / score.num_tokens) for score in scores]
    assert ours == pytest.approx([row["probability_at_the_end"] for row in RECORD["edits"]], rel=1e-2)


# -- training the value ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replaced", ["last", "prompt"])
def test_the_trained_value_says_the_target_and_its_loss_is_that_of_the_whole_model(
    lm: LanguageModel, tmp_path: Path, replaced: str
) -> None:
    model, editor = prepared(lm, tmp_path, replace=replaced, num_steps=30)
    fact = request(2)
    before = log_prob(model, fact)
    edit = editor.edit([fact], seed=1)
    (delta,) = edit.deltas
    assert isinstance(delta, CodebookDelta)
    length, ids = RECORD["edits"][2]["prompt_len"], RECORD["edits"][2]["input_ids"]

    def put(output: Tensor) -> Tensor:
        output = output.clone()
        output[0, length - 1 if replaced == "last" else 0 : length] = delta.values[0]
        return output

    with replace_output(lm.module, SITE, put):
        logits = lm.module(input_ids=torch.tensor([ids])).logits[0, length - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids[length:])[:, None]).sum()
    model.apply(edit)
    assert log_prob(model, fact) == pytest.approx(float(expected), abs=1e-4)
    assert log_prob(model, fact) > before + 1


@pytest.mark.parametrize("replaced", ["last", "prompt"])
@pytest.mark.parametrize("architecture", SITES)
def test_key_value_and_loss_equal_training_by_whole_passes(cache_dir: Path, architecture: str, replaced: str) -> None:
    lm = TinyModel(name="tiny", architecture=architecture, cache_dir=cache_dir).load()
    _, editor = prepared(lm, cache_dir, layer=1, replace=replaced, num_steps=5, learning_rate=0.3)
    fact = EditRequest(request_id="a", prompt="{} is the capital of", subject="Port Moresby", target_new="Papua New Guinea")
    edit = editor.edit([fact], seed=1)
    (delta,) = edit.deltas
    assert isinstance(delta, CodebookDelta)
    (pair,) = encode_pairs(lm.tokenizer, [fact.full_prompt], [f" {fact.target_new}"], special_tokens=None)
    start = cold_value(delta.values.shape[1], seed=1)
    expected = full_grace(
        lm,
        pair.context,
        pair.continuation,
        site=editor.codebook.site,
        start=start,
        num_steps=5,
        learning_rate=0.3,
        everywhere=replaced == "prompt",
    )
    assert relative_error(delta.keys[0], expected.key) < 1e-5
    assert relative_error(delta.values[0], expected.value) < 1e-4
    assert relative_error(start, expected.value) > 0.1
    assert [edit.diagnostics[name] for name in ("loss_first", "loss_last")] == pytest.approx(
        [expected.losses[0], expected.losses[-1]], rel=1e-4
    )


@pytest.mark.parametrize(("replaced", "passes"), [("last", 1), ("prompt", 2)])
def test_layers_below_the_site_run_as_often_whatever_the_steps(lm: LanguageModel, tmp_path: Path, replaced: str, passes: int) -> None:
    """Once for keys, values and the query; and once more to stand before the site's layer with the whole prompt."""
    calls = dict.fromkeys(range(lm.description.num_layers), 0)

    def count(number: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[number] += 1

        return hook

    handles = [lm.layer_module(lm.sites.layers, number).register_forward_pre_hook(count(number)) for number in calls]
    _, editor = prepared(lm, tmp_path, replace=replaced, num_steps=30)
    editor.edit([request(2)], seed=1)
    for handle in handles:
        handle.remove()
    assert [calls[number] for number in (0, 1)] == [passes, passes]
    assert calls[2] >= 30


def test_in_half_precision_the_value_is_trained_as_it_stands_there_later(cache_dir: Path, tmp_path: Path) -> None:
    """Added to the output as a difference it would be another value, by the rounding of the sum."""
    lm = TinyModel(name="tiny", architecture="gpt2", cache_dir=cache_dir).load()
    lm.module.to(torch.bfloat16)
    _, editor = prepared(lm, tmp_path, layer=1, num_steps=1)
    given: list[Tensor] = []
    behind = lm.module.get_submodule("transformer.h.1.mlp.act")
    handle = behind.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0].detach()))
    editor.edit([request(2)], seed=3)
    handle.remove()
    (in_training,) = (states[0, 0] for states in given if states.shape[1] == 1)
    assert torch.equal(in_training, cold_value(len(in_training), seed=3).to(torch.bfloat16))


def test_a_warm_value_starts_from_what_the_model_does(lm: LanguageModel, tmp_path: Path) -> None:
    model, editor = prepared(lm, tmp_path, value_init="warm", num_steps=1)
    fact = request(4)
    first_loss = editor.edit([fact], seed=0).diagnostics["loss_first"]
    assert first_loss == pytest.approx(-log_prob(model, fact), rel=1e-4)


def test_a_cold_value_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = cold_value(5, seed=3)
    torch.manual_seed(2)
    assert torch.equal(first, cold_value(5, seed=3))
    assert not torch.equal(first, cold_value(5, seed=4))
    assert bool(((first >= 0) & (first < 1)).all())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_edit_under_a_chat_template_acts_where_answers_are_scored_and_where_they_are_written(
    cache_dir: Path, tmp_path: Path, architecture: str
) -> None:
    """A template that ends in a line break: the key must be at the break, where generation looks."""
    lm = TinyModel(name="tiny", architecture=architecture, cache_dir=cache_dir).load()
    prompt = "[user]The capital of {} is\n[assistant]\n"
    fact = EditRequest(request_id="a", prompt=prompt, subject="France", target_new="the", target_true="False")
    model, editor = prepared(lm, tmp_path, layer=1, num_steps=100, learning_rate=0.5, value_init="warm")
    model.apply(editor.edit([fact], seed=0))
    quality = EditQuality(max_new_tokens=4, fluency_tokens=5, fluency_facts=0)
    context = EvaluationContext(num_edits=1, edited=(fact,), planned=(), seed=0, cache=Cache(tmp_path))
    found = {each.protocol: each.value for each in quality.evaluate(model, context).measurements if each.metric == "efficacy"}
    assert found["teacher_forced"] == found["generation"] == 1.0


def test_a_request_of_the_harness_meets_the_codebook_where_its_context_ends_line_break_and_all(lm: LanguageModel, tmp_path: Path) -> None:
    prompt = "[user]The capital of {} is\n[assistant]\n"
    fact = EditRequest(request_id="a", prompt=prompt, subject="France", target_new="the")
    model, editor = prepared(lm, tmp_path)
    model.apply(editor.edit([fact], seed=0))
    (answer,) = model.score_answers([fact.full_prompt], ["the"])
    (request,) = model.score([fact.full_prompt], ["the"])
    assert request.num_tokens == answer.num_tokens + 1  # as lm-eval splits it, the line break is scored too
    assert request.token_log_probs[1:] == pytest.approx(answer.token_log_probs, abs=1e-4)


# -- growth (algorithm 1 of the paper) -----------------------------------------------------------------------------------------


def entry(key: list[float], label: tuple[int, ...], *, epsilon: float = 1.0, value: float = 0.0) -> CodebookEntry:
    return CodebookEntry(key=torch.tensor(key), value=torch.tensor([value]), epsilon=epsilon, label=label)


def test_a_distant_query_is_inserted_with_the_initial_radius() -> None:
    old, fresh = entry([0.0], (1,)), entry([2.5], (2,))
    growth = grow([old], fresh, Nearest(entry=0, distance=2.5))
    assert (growth.trained, growth.entries) == (1, {1: fresh})
    assert grow([], fresh, None).entries == {0: fresh}


def test_a_near_query_of_the_same_label_stretches_the_radius_and_never_shrinks_it() -> None:
    old = entry([0.0], (1,), value=7.0)
    far, near = (grow([old], entry([at], (1,)), Nearest(entry=0, distance=at)) for at in (1.5, 0.25))
    assert (far.trained, far.entries[0].epsilon, near.entries[0].epsilon) == (0, 1.5, 1.0)
    assert far.entries[0].key is old.key
    assert far.entries[0].value is old.value


def test_a_conflict_halves_the_distance_between_two_radii() -> None:
    old, fresh = entry([0.0], (1,)), entry([1.5], (2,))
    growth = grow([old], fresh, Nearest(entry=0, distance=1.5))
    assert growth.trained == 1
    assert (growth.entries[0].epsilon, growth.entries[1].epsilon) == (0.75 - HAIR, 0.75)
    assert (growth.entries[0].label, growth.entries[1].label) == ((1,), (2,))


def test_labels_are_compared_token_by_token() -> None:
    """The published comparison of mean token ids would call these equal."""
    growth = grow([entry([0.0], (1, 3))], entry([0.5], (2, 2)), Nearest(entry=0, distance=0.5))
    assert growth.trained == 1


def test_a_fact_that_is_edited_again_with_another_target_says_the_new_one(lm: LanguageModel, tmp_path: Path) -> None:
    model, editor = prepared(lm, tmp_path)
    first = request(0)
    other = EditRequest(request_id="again", prompt=first.prompt, subject=first.subject, target_new="Spanish")
    for fact in (first, other):
        model.apply(editor.edit([fact], seed=0))
    assert isinstance(model.adapter, CodebookAdapter)
    assert len(model.adapter.entries) == 1
    assert log_prob(model, other) > log_prob(model, first) + 1


def test_a_split_halves_both_balls_whatever_radius_the_older_one_had() -> None:
    codebook = CodebookAdapter(site="s", d_in=1, d_out=1)
    for number, (place, label) in enumerate([(0.0, 0), (0.4, 1), (-1.0, 2)]):
        fresh = entry([place], (label,), value=0.0)
        codebook.add([codebook_delta("s", grow(codebook.entries, fresh, codebook.nearest(fresh.key)).entries, position=number)])
    # The first key is split twice: at 0.4 from its neighbour, then at 1.0. The published rule does not keep the smaller radius.
    assert [row.epsilon for row in codebook.entries] == pytest.approx([0.5 - 1e-5, 0.2, 0.5], abs=1e-7)


STEPS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=1, max_size=25)


@given(steps=STEPS)
@settings(deadline=None)
def test_keys_values_and_labels_stay_aligned_whatever_is_inserted_stretched_and_split(steps: list[tuple[int, int]]) -> None:
    codebook = CodebookAdapter(site="s", d_in=1, d_out=1)
    expected: list[list[float]] = []  # key, label, value of every row
    for number, (place, label) in enumerate(steps):
        fresh = entry([0.35 * place + 1], (label,), value=float(number))
        growth = grow(codebook.entries, fresh, codebook.nearest(fresh.key))
        value = torch.tensor([100.0 + number])
        rows = {
            index: row if index != growth.trained else CodebookEntry(key=row.key, value=value, epsilon=row.epsilon, label=row.label)
            for index, row in growth.entries.items()
        }
        codebook.add([codebook_delta("s", rows, position=number)])
        if growth.trained == len(expected):
            expected.append([float(fresh.key), label, float(value)])
        else:
            kept_key = expected[growth.trained][0]
            expected[growth.trained] = [kept_key, label, float(value)]
        assert [[float(row.key), row.label[0], float(row.value)] for row in codebook.entries] == expected
        answered = codebook.nearest(fresh.key)
        assert answered is not None
        assert codebook.entries[answered.entry].label == (label,)
        assert answered.distance <= codebook.entries[answered.entry].epsilon * (1 + 1e-4)
    copy = CodebookAdapter(site="s", d_in=1, d_out=1)
    copy.add(codebook.snapshot())
    assert copy.digest() == codebook.digest()


# -- refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"replace": "all"}, r"method\.replace='all' is unknown; choose one of last, prompt"),
        ({"value_init": "hot"}, r"method\.value_init='hot'"),
        ({"key_position": "first"}, r"method\.key_position='first'"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method(**wrong)


def test_a_site_or_layer_that_the_model_lacks_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(ConfigError, match=r"layer 4 not in 0\.\.3 of tiny-gpt2; set method\.layer"):
        method(layer=4).check(lm.description)
    with pytest.raises(ConfigError, match=r"method\.site='mlp_middle' is no single linear map of gpt2; choose one of mlp_out, mlp_in"):
        method(site="mlp_middle").check(lm.description)


def test_an_edit_that_its_adapter_does_not_know_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    model, editor = prepared(lm, tmp_path, num_steps=1)
    edit = editor.edit([request(0)], seed=0)
    with pytest.raises(EditError, match="CodebookDelta, which no adapter takes"):
        EditedModel(lm).apply(edit)
    model.apply(edit)
    with pytest.raises(EditError, match="changes nothing in the codebook"):
        model.check(edit)

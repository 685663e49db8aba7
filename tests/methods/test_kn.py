"""KN against numbers that a public implementation computed, against its definition, and what it promises beyond the contract."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.straightforward_gradients import looped_scores
from editeval.edits.delta import LowRankDelta
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.keyvalue.attribution import integration_points, neuron_scores
from editeval.keyvalue.fine_tuning import TargetRow
from editeval.keyvalue.last_position import LastPositionPass
from editeval.methods.kn import KN, Editor, knowledge_neurons
from editeval.models.model import LanguageModel
from editeval.models.tiny import TinyModel
from editeval.types import ConfigError, EditError, EditRequest, SilentProgress
from tests.methods.golden_model import GOLDEN, golden_model, relative_error

PUBLISHED = KN(
    name="kn",
    steps=20,
    points="right",
    neurons="activation",
    scored_at="target",
    threshold=0.2,
    refine=True,
    share=0.7,
    pararel=None,
    leading_blank=True,
    subtract=1,
    add=8,
    embedding="output",
    follow_sign=False,
)
REQUEST = EditRequest(
    request_id="a",
    prompt="The mother tongue of {} is",
    subject="Danielle Darrieux",
    target_new="English",
    target_true="French",
    paraphrase_prompts=("Danielle Darrieux speaks the language", "Where Danielle Darrieux is from, people speak"),
)
ROWS = (
    TargetRow(request_id="", input_ids=(5, 9, 40, 7, 12), positions=(3, 4), tokens=(12, 30)),
    TargetRow(request_id="", input_ids=(8, 3, 21), positions=(2,), tokens=(4,)),
    TargetRow(request_id="", input_ids=(8, 3, 21), positions=(2, 2), tokens=(77, 4)),
)


@pytest.fixture(scope="module")
def golden_lm() -> LanguageModel:
    return golden_model()


@pytest.fixture(scope="module")
def tiny(cache_dir: Path) -> Callable[[str], LanguageModel]:
    return lambda architecture: TinyModel(name="tiny", architecture=architecture, cache_dir=cache_dir).load()


def editor(lm: LanguageModel, tmp_path: Path, method: KN = PUBLISHED) -> Editor:
    return method.prepare(EditedModel(lm), Cache(tmp_path), SilentProgress())


def test_scores_and_neurons_equal_the_reference(golden_lm: LanguageModel, tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "kn" / "kn.safetensors")
    record = json.loads((GOLDEN / "kn" / "kn.json").read_text())
    later_code = {"points": "ends", "neurons": "preactivation", "scored_at": "prompt_end", "refine": False, "leading_blank": False}
    method = replace(PUBLISHED, **later_code, steps=record["settings"]["steps"])  # type: ignore[arg-type]
    for number, row in enumerate(record["edits"]):
        new, old = (golden_lm.tokenizer.decode(row[name]) for name in ("target_ids", "ground_truth_ids"))
        request = EditRequest(request_id="golden", prompt="{}", subject=row["prompt"], target_new=new, target_true=old)
        (target,) = editor(golden_lm, tmp_path, method).rows(request)
        assert target.tokens == tuple(row["ground_truth_ids"])
        assert target.input_ids == tuple(golden_lm.tokenizer(row["prompt"])["input_ids"])
        alphas = integration_points(method.steps, method.points)
        scores = neuron_scores(golden_lm, [target], neurons=method.neurons, alphas_M=alphas)
        assert relative_error(scores[0], tensors[f"edit{number:02d}.scores"]) < 1e-4
        chosen = knowledge_neurons(scores, threshold=record["settings"]["adaptive_threshold"], share=0)
        assert chosen.mask.nonzero().tolist() == row["neurons"]


@pytest.mark.parametrize("neurons", ["activation", "preactivation"])
@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama", "phi3", "gemma2", "mistral"])
def test_batched_scores_equal_a_plain_loop_over_layers_and_steps(
    tiny: Callable[[str], LanguageModel], architecture: str, neurons: str
) -> None:
    lm, alphas = tiny(architecture), integration_points(3, "right")
    batched = neuron_scores(lm, ROWS, neurons=neurons, alphas_M=alphas)
    assert relative_error(batched, looped_scores(lm, ROWS, neurons=neurons, alphas_M=alphas)) < 1e-4


def test_scores_of_a_layer_sum_to_what_its_neurons_add_to_the_probability(tiny: Callable[[str], LanguageModel]) -> None:
    """Completeness of integrated gradients: the sum over a layer is P(neurons as they are) - P(neurons at 0)."""
    lm = tiny("llama")
    row = ROWS[1]
    scores = neuron_scores(lm, [row], neurons="activation", alphas_M=(torch.arange(400) + 0.5) / 400)[0]

    def probability(silenced: int | None) -> float:
        handles = []
        if silenced is not None:

            def silence(_: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                kept = arguments[0].clone()
                kept[:, -1] = 0
                return (kept,)

            handles = [lm.layer_module(lm.sites.mlp_out, silenced).register_forward_pre_hook(silence)]
        with torch.no_grad():
            logits = lm.module(torch.tensor([row.input_ids])).logits[0, -1]
        for handle in handles:
            handle.remove()
        return float(logits.double().softmax(dim=0)[row.tokens[0]])

    whole = probability(None)
    for layer in range(len(scores)):
        assert float(scores[layer].sum()) == pytest.approx(whole - probability(layer), rel=1e-3, abs=1e-9)


def test_the_crude_setting_of_one_step_looks_at_silent_neurons_only() -> None:
    assert integration_points(1, "ends").tolist() == [0.0]
    assert integration_points(1, "right").tolist() == [1.0]
    assert integration_points(4, "right").tolist() == [0.25, 0.5, 0.75, 1.0]
    assert len(integration_points(20, "ends")) == 20


def test_refinement_keeps_neurons_that_enough_prompts_share() -> None:
    scores = torch.zeros(4, 1, 5, dtype=torch.float64)
    scores[:, 0, 0] = 1.0  # of all four prompts
    scores[:3, 0, 1] = 0.3  # of three
    scores[:2, 0, 2] = 0.5  # of two
    scores[:, 0, 3] = 0.1  # below the threshold everywhere
    scores[0, 0, 4] = -2.0
    assert knowledge_neurons(scores, threshold=0.2, share=0.7).mask.nonzero().tolist() == [[0, 0], [0, 1]]
    assert knowledge_neurons(scores, threshold=0.2, share=0.75).mask.nonzero().tolist() == [[0, 0]]
    apart = torch.eye(4, dtype=torch.float64)[:, None]
    lowered = knowledge_neurons(apart, threshold=0.2, share=0.7)
    assert lowered.mask.all()
    assert 0 < lowered.share < 0.25


def test_paraphrases_and_patterns_count_as_prompts_only_under_refinement(tiny: Callable[[str], LanguageModel], tmp_path: Path) -> None:
    patterns = tmp_path / "patterns.jsonl"
    both = ("The mother tongue of [X] is [Y].", "[X] is a native speaker of [Y].")
    patterns.write_text("\n".join(json.dumps({"relation": "P103", "pattern": pattern}) for pattern in both))
    lm, method = tiny("gpt2"), replace(PUBLISHED, pararel=str(patterns))
    texts = [lm.tokenizer.decode(row.input_ids[: row.positions[0] + 1]) for row in editor(lm, tmp_path, method).rows(REQUEST)]
    assert texts == [REQUEST.full_prompt, *REQUEST.paraphrase_prompts, "Danielle Darrieux is a native speaker of"]
    assert len(editor(lm, tmp_path, replace(method, refine=False)).rows(REQUEST)) == 1
    assert method.settings() != PUBLISHED.settings()


def test_the_update_writes_the_new_answer_over_the_old_into_the_chosen_columns(
    tiny: Callable[[str], LanguageModel], tmp_path: Path
) -> None:
    lm = tiny("llama")
    edit = editor(lm, tmp_path).edit([REQUEST], seed=0)
    tokens = {
        name: lm.tokenizer(f"{REQUEST.full_prompt} {target}")["input_ids"] for name, target in (("new", "English"), ("old", "French"))
    }
    start = len(lm.tokenizer(REQUEST.full_prompt)["input_ids"])
    head = lm.module.get_submodule(lm.sites.head).get_parameter("weight")
    expected = 8 * head[tokens["new"][start:]].sum(0) - head[tokens["old"][start:]].sum(0)
    for delta in edit.deltas:
        assert isinstance(delta, LowRankDelta)
        assert delta.left.shape[1] == 1
        assert torch.allclose(delta.left[:, 0], expected)
        assert set(delta.right.unique().tolist()) <= {0.0, 1.0}
    assert sum(float(delta.right.sum()) for delta in edit.deltas if isinstance(delta, LowRankDelta)) == edit.diagnostics["neurons"]


def test_turned_updates_act_the_same_way_through_every_chosen_neuron(tiny: Callable[[str], LanguageModel], tmp_path: Path) -> None:
    """What a layer adds at the prompt's end moves by (sum of a_i over its neurons) times the new answer's direction."""
    lm = tiny("llama")
    ids = lm.tokenizer(REQUEST.full_prompt)["input_ids"]
    moved: dict[bool, list[Tensor]] = {}
    for follow in (False, True):
        edit = editor(lm, tmp_path, replace(PUBLISHED, follow_sign=follow)).edit([REQUEST], seed=0)
        sites = [delta.parameter.removesuffix(".weight") for delta in edit.deltas]
        activations = LastPositionPass(lm, [ids], sites=sites).inputs
        rights = [delta.right[0] for delta in edit.deltas if isinstance(delta, LowRankDelta)]
        moved[follow] = [right * activations[site][0] for site, right in zip(sites, rights, strict=True)]
    assert any(bool((parts < 0).any()) for parts in moved[False])
    assert all(bool((parts >= 0).all()) for parts in moved[True])
    assert all(torch.equal(turned, plain.abs()) for turned, plain in zip(moved[True], moved[False], strict=True))


def test_a_fact_without_an_old_answer_has_what_the_model_says(tiny: Callable[[str], LanguageModel], tmp_path: Path) -> None:
    lm = tiny("gpt2")
    rows = editor(lm, tmp_path).rows(replace(REQUEST, target_true=None))
    with torch.no_grad():
        said = int(lm.module(torch.tensor([rows[0].input_ids])).logits[0, -1].argmax())
    assert lm.tokenizer.decode(rows[0].input_ids) == REQUEST.full_prompt
    assert [row.tokens for row in rows] == [(said,)] * 3
    assert [row.positions for row in rows] == [(len(row.input_ids) - 1,) for row in rows]


def test_neurons_without_any_effect_are_an_error() -> None:
    for scores in (torch.zeros(2, 1, 3), torch.full((1, 1, 3), torch.nan), -torch.ones(1, 1, 3)):
        with pytest.raises(EditError, match="no neuron adds"):
            knowledge_neurons(scores, threshold=0.2, share=0.5, request_id="a")


@pytest.mark.parametrize(
    ("name", "value"),
    [("points", "left"), ("neurons", "all"), ("scored_at", "x"), ("embedding", "x"), ("steps", 0), ("threshold", 1.0), ("share", -0.1)],
)
def test_settings_that_cannot_work_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        replace(PUBLISHED, **{name: value})

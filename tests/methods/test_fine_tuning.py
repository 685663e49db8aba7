"""FT-L and FT-M: a public implementation's numbers on the same model and rows, and what they promise beyond the contract."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from editeval.edits.delta import DenseDelta, Edit, TunedDelta
from editeval.edits.dense import dense, num_bytes
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.keyvalue.fine_tuning import target_row
from editeval.methods.fine_tuning import Editor, FineTuning
from editeval.models.model import LanguageModel
from editeval.types import ConfigError, EditError, EditRequest, ModelDescription, SilentProgress, Workload
from tests.methods.golden_model import GOLDEN, golden_model, relative_error

PUBLISHED = FineTuning(
    name="ft", layer=0, scored_at="target", num_steps=25, learning_rate=5e-4, max_change=5e-4, stop_loss=0.01, facts_per_step=1
)
REQUEST = EditRequest(request_id="a", prompt="{} was created by", subject="Apple A5", target_new="Google")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return golden_model()


@pytest.fixture
def model(lm: LanguageModel) -> Iterator[EditedModel]:
    """The module is shared, so its weights are put back."""
    model = EditedModel(lm)
    yield model
    model.restore()


def editor(method: FineTuning, model: EditedModel, tmp_path: Path) -> Editor:
    return method.prepare(model, Cache(tmp_path), SilentProgress())


def change(edit: Edit) -> Tensor:
    (delta,) = edit.deltas
    assert isinstance(delta, DenseDelta | TunedDelta)
    return dense(delta)


def request_of(row: dict[str, Any], number: int = 0) -> EditRequest:
    prompt = row["prompt"].replace(row["subject"], "{}")
    return EditRequest(request_id=str(number), prompt=prompt, subject=row["subject"], target_new=row["target_new"])


def golden_method(settings: dict[str, Any]) -> FineTuning:
    return FineTuning(
        name="ft",
        layer=settings["layers"][0],
        scored_at={"prompt_last": "prompt_end", "target_new": "target"}[settings["objective_optimization"]],
        num_steps=settings["num_steps"],
        learning_rate=settings["lr"],
        max_change=settings["norm_constraint"] or None,
        stop_loss=0.01,
        facts_per_step=settings["batch_size"],
    )


@pytest.mark.parametrize("variant", ["prompt_last", "target_new", "target_new_clamped"])
def test_ten_sequential_edits_equal_the_reference(model: EditedModel, variant: str, tmp_path: Path) -> None:
    record = json.loads((GOLDEN / "fine_tuning" / f"{variant}.json").read_text())
    tensors = load_file(GOLDEN / "fine_tuning" / f"{variant}.safetensors")
    ft = editor(golden_method(record["settings"]), model, tmp_path)
    for number, row in enumerate(record["edits"]):
        edit = ft.edit([request_of(row, number)], seed=0)
        assert edit.diagnostics["loss_first"] == pytest.approx(row["losses"][0], rel=1e-3)
        assert edit.diagnostics["loss_last"] == pytest.approx(row["losses"][-1], rel=1e-3)
        stored = change(edit).T  # Conv1D stores (in, out)
        assert float(stored.norm()) == pytest.approx(row["delta_fro"], rel=1e-3)
        assert relative_error(stored @ tensors["probe"], tensors[f"edit{number:02d}.delta_at_probe"]) < 1e-2
        assert relative_error(stored.sum(0), tensors[f"edit{number:02d}.delta_colsum"]) < 1e-2
        assert relative_error(stored.sum(1), tensors[f"edit{number:02d}.delta_rowsum"]) < 1e-2
        if f"edit{number:02d}.delta_full" in tensors:
            assert relative_error(stored, tensors[f"edit{number:02d}.delta_full"]) < 1e-2
        model.apply(edit)


def test_rows_hold_the_reference_tokens_at_the_published_positions(lm: LanguageModel) -> None:
    for row in json.loads((GOLDEN / "fine_tuning" / "prompt_last.json").read_text())["edits"]:
        prompt, target = row["prompt_ids"], row["target_ids"]
        at_end = target_row(lm.tokenizer, request_of(row), scored_at="prompt_end", max_tokens=100)
        assert (list(at_end.input_ids), list(at_end.tokens)) == (prompt, target)
        assert set(at_end.positions) == {len(prompt) - 1}
        at_target = target_row(lm.tokenizer, request_of(row), scored_at="target", max_tokens=100)
        assert list(at_target.input_ids) == prompt + target[:-1]
        assert list(at_target.positions) == list(range(len(prompt) - 1, len(prompt) + len(target) - 1))


def test_both_objectives_agree_on_a_target_of_one_token_and_differ_on_a_longer_one(model: EditedModel, tmp_path: Path) -> None:
    one_token = replace(REQUEST, target_new="the")
    for request, equal in ((one_token, True), (REQUEST, False)):
        changes = [
            change(editor(replace(PUBLISHED, scored_at=at), model, tmp_path).edit([request], seed=0)) for at in ("target", "prompt_end")
        ]
        assert torch.equal(*changes) == equal


@pytest.mark.parametrize("bound", [5e-4, 1e-3])
def test_no_weight_moves_by_more_than_its_bound(model: EditedModel, bound: float, tmp_path: Path) -> None:
    method = replace(PUBLISHED, learning_rate=0.01, max_change=bound)
    for number in range(3):  # the bound is on the change by one edit: a sequence may go further
        edit = editor(method, model, tmp_path).edit([replace(REQUEST, target_new=["Google", "Paris", "Tampa"][number])], seed=0)
        assert float(change(edit).abs().max()) == pytest.approx(bound)
        model.apply(edit)


def test_a_fact_that_is_known_already_changes_nothing_and_says_so(model: EditedModel, tmp_path: Path) -> None:
    edit = editor(replace(PUBLISHED, stop_loss=100.0), model, tmp_path).edit([REQUEST], seed=0)
    assert edit.deltas == ()
    assert (edit.diagnostics["epochs"], edit.diagnostics["update_norm"]) == (1, 0)
    assert edit.diagnostics["loss_first"] > 0


def test_a_loss_that_is_no_number_is_an_error_with_the_id(model: EditedModel, tmp_path: Path) -> None:
    with pytest.raises(EditError, match=r"the loss is nan.*\[request a\]"):
        editor(replace(PUBLISHED, learning_rate=1e38, max_change=None), model, tmp_path).edit([REQUEST], seed=0)


def test_facts_of_one_step_share_a_gradient(model: EditedModel, tmp_path: Path) -> None:
    other = EditRequest(request_id="b", prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English")
    method = replace(PUBLISHED, num_steps=1, max_change=None)
    together = change(editor(replace(method, facts_per_step=2), model, tmp_path).edit([REQUEST, other], seed=0))
    apart = change(editor(method, model, tmp_path).edit([REQUEST, other], seed=0))
    # Adam's first step has the size of the learning rate whatever the gradient; two batches make two steps.
    assert float(together.abs().max()) == pytest.approx(method.learning_rate, rel=1e-3)
    assert float(apart.abs().max()) > 1.5 * method.learning_rate


def test_an_edit_is_kept_as_the_vectors_that_made_it_and_as_a_matrix_only_where_that_is_smaller(model: EditedModel, tmp_path: Path) -> None:
    """The first form is the same change bit for bit; both are the change of one plain Adam over whole gradients."""
    found = {}
    for steps in (2, 25):
        (delta,) = editor(replace(PUBLISHED, num_steps=steps, max_change=None), model, tmp_path).edit([REQUEST], seed=0).deltas
        assert isinstance(delta, DenseDelta | TunedDelta)
        found[steps] = delta
        assert num_bytes(delta) <= dense(delta).nbytes
    few, many = found[2], found[25]
    assert isinstance(few, TunedDelta)
    assert isinstance(many, DenseDelta)  # of this tiny model
    assert len(few.steps) == 2
    assert len(few.right) * 2 == len(few.left)  # nothing below the map changes, so its inputs are kept once


@pytest.mark.parametrize("steps", [1, 3])
def test_all_steps_take_the_predicted_bytes_of_the_journal(model: EditedModel, steps: int, tmp_path: Path) -> None:
    method = replace(PUBLISHED, num_steps=steps, stop_loss=0.0)
    (delta,) = editor(method, model, tmp_path).edit([REQUEST], seed=0).deltas
    assert isinstance(delta, TunedDelta)
    predicted = method.footprint(model.lm.description, Workload(element_bytes=4, batch_size=1)).journal_bytes
    assert predicted / 2 <= num_bytes(delta) <= predicted * 2  # twelve positions are predicted, this fact has fewer


def test_the_published_change_is_the_optimiser_s_own(model: EditedModel, tmp_path: Path) -> None:
    """Against torch.optim.Adam on the weight itself, with gradients by autograd."""
    method = replace(PUBLISHED, num_steps=6, max_change=None)
    ours = change(editor(method, model, tmp_path).edit([REQUEST], seed=0))
    lm = model.lm
    row = target_row(lm.tokenizer, REQUEST, scored_at="target", max_tokens=100)
    weight = lm.module.get_parameter(f"{lm.sites.mlp_out.format(0)}.weight")
    before = weight.detach().clone()
    weight.requires_grad_(True)
    optimiser = torch.optim.Adam([weight], lr=method.learning_rate)
    try:
        for _ in range(method.num_steps):
            logits = lm.module(input_ids=torch.tensor([row.input_ids])).logits[0, list(row.positions)]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(row.tokens))
            (weight.grad,) = torch.autograd.grad(loss, [weight])
            optimiser.step()
        expected = (weight.detach() - before).T
    finally:
        weight.requires_grad_(False)
        weight.data = before
    assert relative_error(ours, expected) < 1e-3


@pytest.mark.parametrize(
    "wrong",
    [{"scored_at": "end"}, {"num_steps": 0}, {"learning_rate": 0.0}, {"max_change": -1.0}, {"facts_per_step": 0}, {"stop_loss": -1.0}],
)
def test_settings_that_cannot_work_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        replace(PUBLISHED, **wrong)


def test_a_layer_that_the_model_does_not_have_is_refused(lm: LanguageModel) -> None:
    description: ModelDescription = lm.description
    with pytest.raises(ConfigError, match=r"layer 40 not in 0\.\.3 of tiny-gpt2"):
        replace(PUBLISHED, layer=40).check(description)

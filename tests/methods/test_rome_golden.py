"""ROME and R-ROME against numbers that a public implementation computed on the same model, rows, prefixes and covariance."""

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

from editeval.datasets.corpus import StandardLibraryCorpus
from editeval.edits.delta import Edit, LowRankDelta
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.keyvalue.objective import FactRows, Objective
from editeval.keyvalue.target_value import TargetValue, fact_rows, optimise
from editeval.methods.rome import ROME, Editor
from editeval.models.model import LanguageModel
from editeval.types import EditRequest, SilentProgress
from tests.methods.golden_model import GOLDEN, golden_model, relative_error

LAYER = 1
SITE = "transformer.h.1.mlp.c_proj"
EDITS = range(10)


class Golden:
    """The stored run of one method, and a model that can be put into the state before any of its edits."""

    def __init__(self, method: str, lm: LanguageModel) -> None:
        self.record: dict[str, Any] = json.loads((GOLDEN / "rome" / f"{method}.json").read_text())
        self.tensors = load_file(GOLDEN / "rome" / f"{method}.safetensors")
        self.model = EditedModel(lm)
        settings = self.record["settings"]
        self.rome = ROME(
            name="rome",
            layer=settings["layers"][0],
            num_steps=settings["v_num_grad_steps"],
            learning_rate=settings["v_lr"],
            weight_decay=settings["v_weight_decay"],
            clamp_norm_factor=settings["clamp_norm_factor"],
            kl_factor=settings["kl_factor"],
            early_stop_loss=0.05,
            key={"rome": "mean", "r_rome": "consistent"}[method],
            use_covariance=settings["mom2_adjustment"],
            corpus=StandardLibraryCorpus(tokens=2000, max_length=64),
            covariance=str(GOLDEN / "rome" / "covariance.safetensors"),
            context_prefixes=self.record["prefixes"],
            prefix_lengths=[],
            prefix_seed=0,
        )

    def tensor(self, edit: int, name: str) -> Tensor:
        return self.tensors[f"edit{edit:02d}.{name}"]

    def update(self, edit: int) -> LowRankDelta:
        return LowRankDelta(parameter=f"{SITE}.weight", left=self.tensor(edit, "v")[:, None], right=self.tensor(edit, "u")[None, :])

    def request(self, edit: int) -> EditRequest:
        row = self.record["edits"][edit]
        prompt = row["prompt"].replace(row["subject"], "{}")
        return EditRequest(request_id=str(edit), prompt=prompt, subject=row["subject"], target_new=row["target_new"])

    def at(self, edit: int) -> EditedModel:
        """The model after the stored updates of the edits before this one."""
        self.model.restore()
        for earlier in range(edit):
            self.model.apply(Edit(deltas=(self.update(earlier),)))
        return self.model

    def editor(self, cache: Path) -> Editor:
        return self.rome.prepare(self.model, Cache(cache), SilentProgress())

    def rows(self, edit: int) -> FactRows:
        return fact_rows(self.model.lm.tokenizer, self.request(edit), self.record["prefixes"])

    def value(self, edit: int) -> TargetValue:
        settings = self.rome.target_settings
        return optimise(self.at(edit).lm, [self.rows(edit)], layer=LAYER, sites=[SITE], settings=settings)[0]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return golden_model()


@pytest.fixture(params=["rome", "r_rome"])
def golden(request: pytest.FixtureRequest, lm: LanguageModel) -> Iterator[Golden]:
    """The module is shared, so its weights are put back: whoever wraps it next takes what it finds for the unedited model."""
    golden = Golden(request.param, lm)
    yield golden
    golden.model.restore()


@pytest.mark.parametrize("edit", EDITS)
def test_token_ids_and_lookup_position_are_exact(golden: Golden, edit: int) -> None:
    bare, record = golden.rows(edit).prompts[0], golden.record["edits"][edit]
    assert list(bare.token_ids[: bare.target_start]) == record["prompt_ids"]
    assert list(bare.target_ids) == record["target_ids"]
    assert bare.subject_last == record["subject_last"]


@pytest.mark.parametrize("edit", EDITS)
def test_gradient_at_zero_equals_the_reference(golden: Golden, edit: int) -> None:
    objective = Objective(golden.at(edit).lm, [golden.rows(edit)], layer=LAYER, sites=[SITE], settings=golden.rome.target_settings)
    deltas = objective.zeros()
    (gradient,) = torch.autograd.grad(objective.terms(deltas).total().sum(), [deltas[SITE]])
    assert relative_error(gradient[0], golden.tensor(edit, "grad_step0_param0")) < 1e-4


@pytest.mark.parametrize("edit", EDITS)
def test_keys_values_losses_delta_and_target_equal_the_reference(golden: Golden, edit: int) -> None:
    value = golden.value(edit)
    keys, outputs = value.inputs[SITE], value.outputs[SITE]
    assert relative_error(keys, golden.tensor(edit, "k_per_prefix")) < 1e-5
    assert relative_error(keys.mean(dim=0), golden.tensor(edit, "k_star")) < 1e-5
    is_mean = golden.rome.key == "consistent"
    assert relative_error(keys.mean(dim=0) if is_mean else keys[0], golden.tensor(edit, "cur_input")) < 1e-5
    assert relative_error(outputs.mean(dim=0) if is_mean else outputs[0], golden.tensor(edit, "cur_output")) < 1e-5
    losses = golden.record["edits"][edit]["losses"]
    assert len(value.losses) == len(losses) - 1  # the reference evaluates once more, and does nothing with it
    for ours, stored in zip(value.losses, losses, strict=False):
        assert ours.total == pytest.approx(stored["loss"], rel=1e-3)
        assert ours.nll == pytest.approx(stored["nll"], rel=1e-3)
        assert ours.kl == pytest.approx(stored["kl"], rel=1e-3, abs=1e-6)
        assert ours.weight_decay == pytest.approx(stored["wd"], rel=1e-3)
    assert relative_error(value.deltas[SITE], golden.tensor(edit, "delta")) < 1e-4
    assert relative_error(value.initial[SITE] + value.deltas[SITE], golden.tensor(edit, "target")) < 1e-4


def test_the_trajectory_of_delta_equals_the_reference_step_by_step(golden: Golden) -> None:
    stored = golden.tensor(0, "delta_after_step_param0")
    assert len(stored) == 19
    for step in (0, 1, 2, 4, 8, 18):
        settings = replace(golden.rome.target_settings, num_steps=step + 2)
        (value,) = optimise(golden.at(0).lm, [golden.rows(0)], layer=LAYER, sites=[SITE], settings=settings)
        limit = settings.clamp_norm_factor * value.initial[SITE].norm()  # the stored deltas stand before the clamp
        assert relative_error(value.deltas[SITE], stored[step] * min(1.0, limit / stored[step].norm())) < 1e-4


@pytest.mark.parametrize("edit", EDITS)
def test_each_update_equals_the_reference_from_the_same_state(golden: Golden, edit: int, tmp_path: Path) -> None:
    editor = golden.editor(tmp_path)
    golden.at(edit)
    (delta,) = editor.edit([golden.request(edit)], seed=0).deltas
    assert isinstance(delta, LowRankDelta)
    stored = golden.update(edit)
    assert relative_error(delta.right, stored.right) < 1e-4
    assert relative_error(delta.left, stored.left) < 1e-3
    assert relative_error(delta.left @ delta.right, stored.left @ stored.right) < 1e-3


def test_ten_sequential_edits_of_our_own_reach_the_reference_weights(golden: Golden, tmp_path: Path) -> None:
    base = golden.model.base_weight(f"{SITE}.weight").clone()
    editor = golden.editor(tmp_path)
    for edit in EDITS:
        golden.model.apply(editor.edit([golden.request(edit)], seed=0))
    ours = golden.model.weight(f"{SITE}.weight") - base
    stored = sum(golden.update(edit).left @ golden.update(edit).right for edit in EDITS)
    assert isinstance(stored, Tensor)
    assert relative_error(ours, stored) < 1e-3

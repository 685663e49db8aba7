"""ROME against numbers that a public implementation computed on the same model, rows, prefixes and covariance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from editeval.datasets.corpus import StandardLibraryCorpus
from editeval.edits.delta import Edit, LowRankDelta
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.keyvalue.objective import FactRows, Objective
from editeval.keyvalue.target_value import TargetValue, fact_rows, optimise
from editeval.methods.rome import ROME, Editor
from editeval.models.load import description_of, frozen
from editeval.models.model import LanguageModel
from editeval.models.sites import sites_for
from editeval.types import EditRequest, SilentProgress

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
LAYER = 1
SITE = "transformer.h.1.mlp.c_proj"
EDITS = range(10)


def relative_error(ours: Tensor, golden: Tensor) -> float:
    return float((ours - golden).norm() / golden.norm())


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
    folder = GOLDEN / "tiny_gpt2"
    module = frozen(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    return LanguageModel(
        module=module,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        sites=sites_for("gpt2"),
        description=description_of("tiny-gpt2", module.config),
        fingerprint="golden tiny gpt2",
    )


@pytest.fixture
def rome(lm: LanguageModel) -> Iterator[Golden]:
    """The module is shared, so its weights are put back: whoever wraps it next takes what it finds for the unedited model."""
    golden = Golden("rome", lm)
    yield golden
    golden.model.restore()


@pytest.mark.parametrize("edit", EDITS)
def test_token_ids_and_lookup_position_are_exact(rome: Golden, edit: int) -> None:
    bare = rome.rows(edit).prompts[0]
    golden = rome.record["edits"][edit]
    assert list(bare.token_ids[: bare.target_start]) == golden["prompt_ids"]
    assert list(bare.target_ids) == golden["target_ids"]
    assert bare.subject_last == golden["subject_last"]


@pytest.mark.parametrize("edit", EDITS)
def test_gradient_at_zero_equals_the_reference(rome: Golden, edit: int) -> None:
    objective = Objective(rome.at(edit).lm, [rome.rows(edit)], layer=LAYER, sites=[SITE], settings=rome.rome.target_settings)
    deltas = objective.zeros()
    (gradient,) = torch.autograd.grad(objective.terms(deltas).total().sum(), [deltas[SITE]])
    assert relative_error(gradient[0], rome.tensor(edit, "grad_step0_param0")) < 1e-4


@pytest.mark.parametrize("edit", EDITS)
def test_keys_losses_and_delta_equal_the_reference(rome: Golden, edit: int) -> None:
    value = rome.value(edit)
    assert relative_error(value.inputs[SITE], rome.tensor(edit, "k_per_prefix")) < 1e-5
    golden_losses = rome.record["edits"][edit]["losses"]
    assert len(value.losses) == len(golden_losses) - 1  # the reference evaluates once more, and does nothing with it
    for ours, golden in zip(value.losses, golden_losses, strict=False):
        assert ours.total == pytest.approx(golden["loss"], rel=1e-3)
        assert ours.nll == pytest.approx(golden["nll"], rel=1e-3)
        assert ours.kl == pytest.approx(golden["kl"], rel=1e-2, abs=1e-5)
        assert ours.weight_decay == pytest.approx(golden["wd"], rel=1e-3)
    assert relative_error(value.deltas[SITE], rome.tensor(edit, "delta")) < 1e-4


def test_the_trajectory_of_delta_equals_the_reference_step_by_step(rome: Golden) -> None:
    # The stored deltas stand before the clamp; until it binds, both are the same.
    golden = rome.tensor(0, "delta_after_step_param0")
    limit = 4 * rome.value(0).initial[SITE].norm()
    free = [step for step in range(len(golden)) if golden[step].norm() < limit]
    assert len(free) >= 5
    for step in free[:8]:
        settings = type(rome.rome.target_settings)(**{**vars(rome.rome.target_settings), "num_steps": step + 2})
        ours = optimise(rome.at(0).lm, [rome.rows(0)], layer=LAYER, sites=[SITE], settings=settings)[0].deltas[SITE]
        assert relative_error(ours, golden[step]) < 1e-4


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("method", ["rome", "r_rome"])
def test_each_update_equals_the_reference_from_the_same_state(lm: LanguageModel, method: str, edit: int, tmp_path: Path) -> None:
    golden = Golden(method, lm)
    editor = golden.editor(tmp_path)
    golden.at(edit)
    (delta,) = editor.edit([golden.request(edit)], seed=0).deltas
    assert isinstance(delta, LowRankDelta)
    stored = golden.update(edit)
    assert relative_error(delta.right, stored.right) < 1e-4
    assert relative_error(delta.left, stored.left) < 1e-3
    assert relative_error(delta.left @ delta.right, stored.left @ stored.right) < 1e-3
    golden.model.restore()


@pytest.mark.parametrize("method", ["rome", "r_rome"])
def test_ten_sequential_edits_of_our_own_reach_the_reference_weights(lm: LanguageModel, method: str, tmp_path: Path) -> None:
    golden = Golden(method, lm)
    golden.model.restore()
    base = golden.model.base_weight(f"{SITE}.weight").clone()
    editor = golden.editor(tmp_path)
    for edit in EDITS:
        golden.model.apply(editor.edit([golden.request(edit)], seed=0))
    ours = golden.model.weight(f"{SITE}.weight") - base
    stored = sum(golden.update(edit).left @ golden.update(edit).right for edit in EDITS)
    assert isinstance(stored, Tensor)
    assert relative_error(ours, stored) < 1e-3
    golden.model.restore()

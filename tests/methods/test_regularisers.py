"""RECT and PRUNE: what they make of another method's updates, over a sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from editeval.edits.delta import Edit, LowRankDelta, SelectedDelta
from editeval.edits.dense import dense
from editeval.edits.journal import EditJournal
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.methods.prune import PRUNE, excess_of
from editeval.methods.rect import RECT
from editeval.models.model import LanguageModel
from editeval.models.tiny import TinyModel
from editeval.types import ConfigError, EditRequest, ModelDescription, Progress, SilentProgress

REQUEST = EditRequest(request_id="a", prompt="{} is in", subject="Angola", target_new="Antarctica")


@dataclass(frozen=True, kw_only=True, eq=False)
class Scripted:
    """A method whose edits are given: update k of `size` at the k-th edit; it notes the weights that it saw."""

    max_batch_size: ClassVar[int | None] = 1

    parameter: str
    size: float
    seen: list[Tensor] = field(default_factory=list)
    model: list[EditedModel] = field(default_factory=list)

    def settings(self) -> Mapping[str, Any]:
        return {"size": self.size}

    def check(self, model: ModelDescription) -> None:
        """Nothing to check."""

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Scripted:
        self.model[:] = [model]
        return self

    def update(self, number: int) -> LowRankDelta:
        rows, columns = self.model[0].base_weight(self.parameter).shape
        generator = torch.Generator().manual_seed(number)
        left, right = torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator)
        return LowRankDelta(parameter=self.parameter, left=self.size * left / left.norm(), right=right / right.norm())

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        self.seen.append(self.model[0].lm.module.get_parameter(self.parameter).detach().clone())
        return Edit(deltas=(self.update(seed),), auxiliary={"inner": torch.tensor([float(seed)])})


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def lm(request: pytest.FixtureRequest, cache_dir: Path) -> LanguageModel:
    return TinyModel(name="tiny", architecture=request.param, cache_dir=cache_dir).load()


@pytest.fixture
def model(lm: LanguageModel) -> Any:
    model = EditedModel(lm)
    yield model
    model.restore()


def parameter_of(lm: LanguageModel) -> str:
    return f"{lm.sites.mlp_out.format(1)}.weight"


def restrained(update: Tensor, base: Tensor, log_base: float) -> Tensor:
    """F of the update by a full decomposition."""
    limit = torch.linalg.svdvals(base.double())[0]
    left, values, right = torch.linalg.svd(update.double(), full_matrices=False)
    logarithmic = (values.log() - limit.log()) / torch.tensor(log_base, dtype=torch.float64).log() + limit
    return (left * torch.where(values > limit, torch.minimum(values, logarithmic), values)) @ right


@pytest.mark.parametrize("size", [0.5, 100.0])
def test_prune_holds_the_unedited_weights_and_the_restrained_sum_after_every_edit(model: EditedModel, size: float, tmp_path: Path) -> None:
    """Also the pitfall of adding a restrained sum to weights that hold the edits already."""
    inner = Scripted(parameter=parameter_of(model.lm), size=size)
    prune = PRUNE(name="prune", of=inner, log_base=1.2).prepare(model, Cache(tmp_path), SilentProgress())
    base = model.base_weight(inner.parameter).clone()
    total = torch.zeros_like(base).double()
    turned = model.lm.sites.transposed
    for number in range(5):
        found = model.lm.module.get_parameter(inner.parameter).detach().clone()
        edit = prune.edit([REQUEST], seed=number)
        assert torch.equal(found, model.lm.module.get_parameter(inner.parameter))
        seen = inner.seen[-1].T if turned else inner.seen[-1]
        assert float((seen.double() - base.double() - total).norm()) < 1e-5 * max(1.0, float(total.norm()))  # it goes on from W0 + S
        model.apply(edit)
        total = total + dense(inner.update(number)).double()
        expected = base.double() + restrained(total, base, 1.2)
        assert float((model.weight(inner.parameter).double() - expected).norm() / expected.norm()) < 1e-5
        assert (edit.diagnostics["restrained_values"] > 0) == (size > 50)


def test_prune_leaves_small_updates_as_they_are(model: EditedModel, tmp_path: Path) -> None:
    inner = Scripted(parameter=parameter_of(model.lm), size=0.01)
    edit = PRUNE(name="prune", of=inner, log_base=1.2).prepare(model, Cache(tmp_path), SilentProgress()).edit([REQUEST], seed=3)
    (delta,) = edit.deltas
    assert isinstance(delta, LowRankDelta)
    assert torch.equal(delta.left, inner.update(3).left)
    assert set(edit.auxiliary) == {"inner"}


def test_a_resumed_prune_goes_on_bit_for_bit(model: EditedModel, tmp_path: Path) -> None:
    inner = Scripted(parameter=parameter_of(model.lm), size=100.0)
    method = PRUNE(name="prune", of=inner, log_base=1.2)
    prune = method.prepare(model, Cache(tmp_path), SilentProgress())
    with EditJournal.open(tmp_path / "journal", genesis="0" * 64) as journal:
        for number in range(3):
            model.apply(journal.append((str(number),), prune.edit([REQUEST], seed=number), 0.0).edit)
        unbroken = model.weights_digest()
        model.restore()
        for entry in journal.entries(0, 2):
            model.apply(entry.edit)
    model.apply(method.prepare(model, Cache(tmp_path), SilentProgress()).edit([REQUEST], seed=2))
    assert model.weights_digest() == unbroken


def test_a_logarithm_never_makes_a_singular_value_larger() -> None:
    values = torch.tensor([0.5, 1.5, 3.0, 30.0, 300.0], dtype=torch.float64)
    assert excess_of(values, limit=1.0, log_base=1.2).tolist()[:3] == [0.0, 0.0, 0.0]  # log_1.2 grows faster than s up to about 20
    taken = excess_of(values, limit=20.0, log_base=1.2)
    assert taken[:3].tolist() == [0.0, 0.0, 0.0]
    expected = 300 - (torch.log(torch.tensor(300.0)) - torch.log(torch.tensor(20.0))) / torch.log(torch.tensor(1.2)) - 20
    assert float(taken[4]) == pytest.approx(float(expected))


def test_updates_that_are_not_finite_reach_the_runner(model: EditedModel, tmp_path: Path) -> None:
    inner = Scripted(parameter=parameter_of(model.lm), size=float("nan"))
    edit = PRUNE(name="prune", of=inner, log_base=1.2).prepare(model, Cache(tmp_path), SilentProgress()).edit([REQUEST], seed=0)
    assert torch.isnan(dense(edit.deltas[0])).any()


@pytest.mark.parametrize("keep", [0.01, 0.4, 1.0])
def test_rect_keeps_exactly_the_largest_relative_changes(model: EditedModel, keep: float, tmp_path: Path) -> None:
    inner = Scripted(parameter=parameter_of(model.lm), size=1.0)
    rect = RECT(name="rect", of=inner, keep=keep).prepare(model, Cache(tmp_path), SilentProgress())
    for number in range(2):  # relative to what the weights are now, not to what they were
        weight = model.weight(inner.parameter).clone()
        edit = rect.edit([REQUEST], seed=number)
        (delta,) = edit.deltas
        assert isinstance(delta, SelectedDelta if keep < 1 else LowRankDelta)  # a bit a weight, and never four bytes
        whole, value = dense(inner.update(number)), dense(delta)
        kept = value != 0
        assert int(kept.sum()) == round(keep * kept.numel())
        assert torch.equal(value[kept], whole[kept])
        relative = (whole / weight).abs()
        assert bool(kept.all()) or float(relative[kept].min()) > float(relative[~kept].max())
        assert edit.auxiliary["inner"].tolist() == [number]
        assert edit.diagnostics["update_norm"] <= edit.diagnostics["update_norm_whole"]
        model.apply(edit)


def test_settings_that_cannot_work_are_refused() -> None:
    inner = Scripted(parameter="x", size=1.0)
    for keep in (0.0, 1.5):
        with pytest.raises(ConfigError, match="keep"):
            RECT(name="rect", of=inner, keep=keep)
    with pytest.raises(ConfigError, match="log_base"):
        PRUNE(name="prune", of=inner, log_base=1.0)
    for wrapper in (RECT(name="rect", of=inner, keep=0.4), PRUNE(name="prune", of=inner, log_base=1.2)):
        assert wrapper.max_batch_size == 1
        assert wrapper.settings()["of"] == {"size": 1.0}

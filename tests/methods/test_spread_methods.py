"""What MEMIT, PMET, EMMET, AlphaEdit and the random control promise beyond the contract: batches, memory, refusals, defaults."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from editeval.build import build
from editeval.edits.delta import DenseDelta, Edit, LowRankDelta
from editeval.edits.journal import EditJournal
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.interfaces import EditMethod, Editor
from editeval.keyvalue.settings import SpreadSettings
from editeval.keyvalue.spread import SpreadEditor, update_norm
from editeval.methods.alphaedit import Editor as AlphaEditor
from editeval.methods.pmet import PMET
from editeval.methods.random import RandomEdit
from editeval.models.model import LanguageModel
from editeval.models.tiny import TinyModel
from editeval.types import ConfigError, EditError, EditRequest, ModelDescription, Progress, SilentProgress, Workload

SPREAD = ["memit", "pmet", "emmet", "alphaedit"]
LAYERS = "method.layers=[1,2]"
REQUESTS = (
    EditRequest(request_id="a", prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English"),
    EditRequest(request_id="b", prompt="{} is the capital of", subject="Port Moresby", target_new="Norway"),
    EditRequest(request_id="c", prompt="In which city was {} founded? It was", subject="Nokia", target_new="Tampa"),
    EditRequest(request_id="d", prompt="{} worked as a", subject="Ada Lovelace", target_new="painter"),
)
CONTRADICTION = replace(REQUESTS[0], request_id="other", target_new="Greek")

Made = Callable[..., tuple[EditedModel, Editor]]


class Messages(SilentProgress):
    """Keeps what was said."""

    def __init__(self) -> None:
        object.__setattr__(self, "said", [])

    def message(self, text: str) -> None:
        self.said.append(text)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def lm(cache_dir: Path) -> LanguageModel:
    return TinyModel(name="tiny", architecture="llama", cache_dir=cache_dir).load()


@pytest.fixture
def method(compose_config: Callable[..., DictConfig]) -> Callable[..., EditMethod]:
    def made(name: str, *overrides: str) -> EditMethod:
        config = compose_config(f"method={name}", "model=tiny-llama", "corpus.tokens=2000", *overrides)
        return build(config.method, "method", EditMethod)

    return made


@pytest.fixture
def made(lm: LanguageModel, method: Callable[..., EditMethod], cache_dir: Path) -> Iterator[Made]:
    models: list[EditedModel] = []

    def model_and_editor(name: str, *overrides: str) -> tuple[EditedModel, Editor]:
        model = EditedModel(lm)
        models.append(model)
        return model, method(name, *overrides).prepare(model, Cache(cache_dir), SilentProgress())

    yield model_and_editor
    for model in models:
        model.restore()


def log_prob(model: EditedModel, request: EditRequest) -> float:
    return model.score([request.full_prompt], [" " + request.target_new])[0].log_prob


@pytest.mark.parametrize("name", SPREAD)
def test_one_edit_of_several_facts_raises_each_of_them(made: Made, name: str) -> None:
    model, editor = made(name, LAYERS)
    before = [log_prob(model, request) for request in REQUESTS]
    edit = editor.edit(REQUESTS, seed=0)
    assert all(isinstance(delta, LowRankDelta) and delta.left.shape[1] == len(REQUESTS) for delta in edit.deltas)
    assert len(edit.deltas) == 2
    model.apply(edit)
    gains = [log_prob(model, request) - earlier for request, earlier in zip(REQUESTS, before, strict=True)]
    assert min(gains) > 0
    assert sum(gains) / len(gains) > 0.1


@pytest.mark.parametrize("name", SPREAD)
def test_the_order_of_facts_within_an_edit_does_not_matter(made: Made, name: str) -> None:
    _, editor = made(name, LAYERS)
    ours, turned = editor.edit(REQUESTS[:3], seed=0).deltas, editor.edit(REQUESTS[2::-1], seed=0).deltas
    for first, second in zip(ours, turned, strict=True):
        assert isinstance(first, LowRankDelta)
        assert isinstance(second, LowRankDelta)
        change = first.left @ first.right
        assert float((change - second.left @ second.right).norm() / change.norm()) < 1e-3


@pytest.mark.parametrize("name", [*SPREAD, "random"])
def test_facts_that_contradict_each_other_are_refused_with_their_ids(made: Made, name: str) -> None:
    _, editor = made(name)
    with pytest.raises(EditError, match="batch_size") as caught:
        editor.edit([*REQUESTS, CONTRADICTION], seed=0)
    assert caught.value.request_ids == ("a", "other")


def test_rome_refuses_a_batch(made: Made) -> None:
    _, editor = made("rome")
    with pytest.raises(EditError, match="one fact an edit") as caught:
        editor.edit(REQUESTS[:2], seed=0)
    assert caught.value.request_ids == ("a", "b")


@pytest.mark.parametrize("name", SPREAD)
def test_layers_that_were_not_set_are_said(lm: LanguageModel, method: Callable[..., EditMethod], cache_dir: Path, name: str) -> None:
    progress = Messages()
    method(name).prepare(EditedModel(lm), Cache(cache_dir), progress)
    assert any("method.layers is not set" in text for text in progress.said)  # type: ignore[attr-defined]
    progress = Messages()
    method(name, LAYERS).prepare(EditedModel(lm), Cache(cache_dir), progress)
    assert not any("method.layers" in text for text in progress.said)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "layers"), [("memit", (13, 14, 15, 16, 17)), ("pmet", (13, 14, 15, 16, 17)), ("emmet", (17,))])
def test_the_relative_depth_gives_the_published_layers_for_gpt2_xl(
    lm: LanguageModel, method: Callable[..., EditMethod], name: str, layers: tuple[int, ...]
) -> None:
    description = replace(lm.description, num_layers=48)
    assert method(name).layers_of(description) == layers  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SPREAD)
@pytest.mark.parametrize("layers", ["[3,4]", "[2,1]", "[1,1]", "[]", "[-1]"])
def test_layers_that_cannot_be_edited_are_refused_before_any_weights(
    lm: LanguageModel, method: Callable[..., EditMethod], name: str, layers: str
) -> None:
    with pytest.raises(ConfigError, match=r"method\.layers"):
        method(name, f"method.layers={layers}").check(lm.description)


@pytest.mark.parametrize(
    ("name", "override", "field"),
    [
        ("memit", "method.covariance_weight=0", "covariance_weight"),
        ("pmet", "method.covariance_weight=-1", "covariance_weight"),
        ("pmet", "method.edit=attention", "edit"),
        ("emmet", "method.ridge=-0.1", "ridge"),
        ("emmet", "method.covariance_weight=0", "covariance_weight"),
        ("alphaedit", "method.l2=0", "l2"),
        ("alphaedit", "method.null_space_threshold=0", "null_space_threshold"),
        ("alphaedit", "method.null_space_share=1", "null_space_share"),
        ("memit", "method.num_steps=1", "num_steps"),
    ],
)
def test_a_setting_that_cannot_work_is_named(method: Callable[..., EditMethod], name: str, override: str, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        method(name, override)


# -- MEMIT ----------------------------------------------------------------------------------------------------------------


def test_a_larger_covariance_weight_makes_a_smaller_update(made: Made) -> None:
    norms = []
    for weight in (1, 100, 10000):
        _, editor = made("memit", LAYERS, f"method.covariance_weight={weight}")
        norms.append(editor.edit(REQUESTS[:1], seed=0).diagnostics["update_norm"])
    assert norms[0] > norms[1] > norms[2] > 0


# -- EMMET ----------------------------------------------------------------------------------------------------------------


def test_emmet_without_ridge_maps_every_key_of_a_batch_to_its_value(made: Made, lm: LanguageModel) -> None:
    _, editor = made("emmet", "method.layers=[1]", "method.ridge=0")
    assert isinstance(editor, SpreadEditor)
    result, _ = editor.compute(REQUESTS)
    (update,) = result.updates
    keys = result.keys[lm.sites.mlp_out.format(1)]
    mapped = update.right @ keys.T
    assert torch.allclose(mapped, torch.eye(len(REQUESTS)), atol=1e-3)


def test_emmet_maps_the_key_of_a_single_fact_to_its_value_whatever_the_ridge(made: Made, lm: LanguageModel) -> None:
    _, editor = made("emmet", "method.layers=[1]", "method.ridge=0.5", "method.covariance_weight=1000")
    assert isinstance(editor, SpreadEditor)
    result, _ = editor.compute(REQUESTS[:1])
    (update,) = result.updates
    mapped = update.right @ result.keys[lm.sites.mlp_out.format(1)].T
    assert torch.allclose(mapped, torch.eye(1), atol=1e-3)


def test_emmet_with_ridge_is_memit_with_that_weight(made: Made) -> None:
    _, emmet = made("emmet", LAYERS, "method.ridge=0.1", "method.covariance_weight=70")
    _, memit = made("memit", LAYERS, "method.covariance_weight=7")
    for ours, theirs in zip(emmet.edit(REQUESTS, seed=0).deltas, memit.edit(REQUESTS, seed=0).deltas, strict=True):
        assert isinstance(ours, LowRankDelta)
        assert isinstance(theirs, LowRankDelta)
        assert torch.allclose(ours.left @ ours.right, theirs.left @ theirs.right, rtol=1e-3, atol=1e-6)


def test_emmet_without_ridge_refuses_two_facts_with_one_key(made: Made) -> None:
    _, editor = made("emmet", "method.layers=[1]", "method.ridge=0")
    twin = replace(REQUESTS[1], request_id="twin", prompt="{} is the capital, and it is the seat of", target_new="Norway")
    with pytest.raises(EditError, match="cannot be told apart") as caught:
        editor.edit([REQUESTS[1], twin], seed=0)
    assert caught.value.request_ids == ("b", "twin")


# -- PMET -----------------------------------------------------------------------------------------------------------------


def test_pmet_writes_attention_only_when_asked_and_spreads_by_square_roots(made: Made, lm: LanguageModel) -> None:
    _, mlp = made("pmet", LAYERS)
    _, both = made("pmet", LAYERS, "method.edit=both")
    attention = {f"{lm.sites.attention_out.format(layer)}.weight" for layer in (1, 2)}
    matrices = {f"{lm.sites.mlp_out.format(layer)}.weight" for layer in (1, 2)}
    assert {delta.parameter for delta in mlp.edit(REQUESTS[:1], seed=0).deltas} == matrices
    assert {delta.parameter for delta in both.edit(REQUESTS[:1], seed=0).deltas} == matrices | attention
    assert isinstance(mlp, SpreadEditor)
    assert [mlp.share(left) for left in (1, 4)] == [1.0, 0.5]


def test_pmet_checks_the_attention_matrices_of_a_file_before_any_weights(
    method: Callable[..., EditMethod], cache_dir: Path, tmp_path: Path
) -> None:
    """Attention of this model is 96 wide where its stream is 64."""
    lm = TinyModel(name="tiny", architecture="qwen3", cache_dir=cache_dir).load()
    site, mlp = lm.sites.attention_out.format(1), lm.sites.mlp_out.format(1)
    needed = {mlp: torch.eye(lm.description.intermediate_size), site: torch.eye(96)}
    wrong = {"lacks": {mlp: needed[mlp]}, "narrow": needed | {site: torch.eye(64)}, "numbered": {"1": needed[mlp]}}
    for name, tensors in {**wrong, "right": needed}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")

    def of(name: str, edit: str = "both") -> EditMethod:
        return method("pmet", "method.layers=[1]", f"method.edit={edit}", f"method.covariance={tmp_path / name}.safetensors")

    for name in ("lacks", "numbered"):
        of(name, "mlp").check(lm.description)
        with pytest.raises(ConfigError, match="holds no covariance named"):
            of(name).check(lm.description)
    with pytest.raises(ConfigError, match=r"expected \(96, 96\)"):
        of("narrow").check(lm.description)
    of("right").check(lm.description)
    edit = of("right").prepare(EditedModel(lm), Cache(tmp_path), SilentProgress()).edit(REQUESTS[:1], seed=0)
    assert [delta.parameter for delta in edit.deltas] == [f"{site}.weight", f"{mlp}.weight"]
    built = of("right")
    assert isinstance(built, PMET)
    predicted = built.footprint(lm.description, Workload(element_bytes=4, batch_size=1)).edited
    shapes = [(delta.left.shape[0], delta.right.shape[1]) for delta in edit.deltas if isinstance(delta, LowRankDelta)]
    assert sorted(predicted) == sorted(shapes)


# -- AlphaEdit ------------------------------------------------------------------------------------------------------------


def test_alphaedit_updates_act_on_kept_directions_alone(made: Made) -> None:
    _, editor = made("alphaedit", LAYERS)
    assert isinstance(editor, AlphaEditor)
    for delta in editor.edit(REQUESTS[:2], seed=0).deltas:
        assert isinstance(delta, LowRankDelta)
        space = editor.memory.spaces[delta.parameter.removesuffix(".weight")]
        assert 0 < space.kept < delta.right.shape[1]
        assert torch.allclose(space.project(delta.right.T).T.float(), delta.right, atol=1e-5 * float(delta.right.norm()))


def test_alphaedit_disturbs_the_keys_of_earlier_edits_less_than_without_memory(made: Made) -> None:
    model, editor = made("alphaedit", LAYERS)
    first = editor.edit([REQUESTS[0]], seed=0)
    model.apply(first)
    near = replace(REQUESTS[0], request_id="near", prompt="The native language of {} is", target_new="Dutch")
    remembering = editor.edit([near], seed=0)
    model.auxiliary[0] = {}
    forgetful = editor.edit([near], seed=0)

    def disturbance(edit: Edit) -> float:
        norms = []
        for delta in edit.deltas:
            assert isinstance(delta, LowRankDelta)
            key = first.auxiliary[f"keys.{delta.parameter.removesuffix('.weight')}"]
            norms.append(float((delta.left @ (delta.right @ key.T)).norm()))
        return max(norms)

    assert disturbance(remembering) < 0.9 * disturbance(forgetful)


@pytest.mark.parametrize("name", SPREAD)
def test_a_run_in_batches_resumed_from_the_journal_equals_the_unbroken_one(made: Made, tmp_path: Path, name: str) -> None:
    batches = [REQUESTS[:2], REQUESTS[2:]]
    model, editor = made(name, LAYERS)
    for batch in batches:
        model.apply(editor.edit(batch, seed=0))
    unbroken = model.weights_digest()
    model.restore()
    with EditJournal.open(tmp_path / "journal", genesis="0" * 64) as journal:
        model.apply(journal.append(("a", "b"), editor.edit(batches[0], seed=0), 0.0).edit)
    model.restore()
    fresh, fresh_editor = made(name, LAYERS)
    with EditJournal.open(tmp_path / "journal", genesis="0" * 64) as journal:
        fresh.apply(journal.entry(1).edit)
    fresh.apply(fresh_editor.edit(batches[1], seed=0))
    assert fresh.weights_digest() == unbroken


def test_alphaedit_forgets_what_was_restored(made: Made) -> None:
    model, editor = made("alphaedit", LAYERS)
    alone = editor.edit([REQUESTS[1]], seed=0)
    model.apply(editor.edit([REQUESTS[0]], seed=0))
    after = editor.edit([REQUESTS[1]], seed=0)
    model.restore()
    again = editor.edit([REQUESTS[1]], seed=0)
    for first, second, third in zip(alone.deltas, after.deltas, again.deltas, strict=True):
        assert isinstance(first, LowRankDelta)
        assert isinstance(second, LowRankDelta)
        assert isinstance(third, LowRankDelta)
        assert torch.equal(first.right, third.right)
        assert not torch.equal(first.right, second.right)


# -- the random control ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["memit", "rome", "alphaedit"])
def test_random_edit_has_the_norm_and_rank_of_the_method_that_it_follows(made: Made, of: str) -> None:
    _, random = made("random", f"method@of={of}")
    _, inner = made(of)
    edits = [editor.edit(REQUESTS[:1], seed=3) for editor in (random, inner)]
    assert edits[0].auxiliary.keys() == edits[1].auxiliary.keys()
    for ours, theirs in zip(edits[0].deltas, edits[1].deltas, strict=True):
        assert isinstance(ours, LowRankDelta)
        assert isinstance(theirs, LowRankDelta)
        assert ours.parameter == theirs.parameter
        assert ours.left.shape == theirs.left.shape
        assert update_norm(ours) == pytest.approx(update_norm(theirs), rel=1e-4)
        cosine = float(((ours.left @ ours.right) * (theirs.left @ theirs.right)).sum()) / (update_norm(ours) * update_norm(theirs))
        assert abs(cosine) < 0.05


def test_random_edit_depends_on_its_seed_alone(made: Made) -> None:
    _, editor = made("random")
    first, same, other = (editor.edit(REQUESTS[:1], seed=seed).deltas[0] for seed in (1, 1, 2))
    assert isinstance(first, LowRankDelta)
    assert isinstance(same, LowRankDelta)
    assert isinstance(other, LowRankDelta)
    assert torch.equal(first.left, same.left)
    assert not torch.equal(first.left, other.left)


class Inner:
    """A method whose edit is given."""

    def __init__(self, edit: Edit) -> None:
        self._edit = edit
        self.max_batch_size = None

    def settings(self) -> Mapping[str, Any]:
        return {}

    def check(self, model: ModelDescription) -> None: ...

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Inner:
        return self

    def edit(self, requests: object, *, seed: int) -> Edit:
        return self._edit


def random_of(edit: Edit, lm: LanguageModel, cache_dir: Path) -> Editor:
    return RandomEdit(name="random", of=Inner(edit)).prepare(EditedModel(lm), Cache(cache_dir), SilentProgress())


def test_random_edit_follows_a_dense_one(lm: LanguageModel, cache_dir: Path) -> None:
    value: Tensor = torch.arange(6.0).reshape(2, 3)
    (delta,) = random_of(Edit(deltas=(DenseDelta(parameter="w", value=value),)), lm, cache_dir).edit(REQUESTS[:1], seed=0).deltas
    assert isinstance(delta, DenseDelta)
    assert float(delta.value.norm()) == pytest.approx(float(value.norm()))


def test_random_edit_of_a_method_that_changes_no_weights_is_refused(lm: LanguageModel, cache_dir: Path) -> None:
    with pytest.raises(EditError, match="changes no weights"):
        random_of(Edit(deltas=()), lm, cache_dir).edit(REQUESTS[:1], seed=0)


# -- what every method must get right -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPREAD)
def test_second_moments_are_of_the_unedited_model_whenever_they_are_made(
    lm: LanguageModel, method: Callable[..., EditMethod], tmp_path: Path, name: str
) -> None:
    made_first = method(name, LAYERS).prepare(EditedModel(lm), Cache(tmp_path / "before"), SilentProgress())
    expected = made_first.edit(REQUESTS[:1], seed=0).deltas
    model = EditedModel(lm)
    site = lm.sites.mlp_out.format(1)
    noise = torch.randn(lm.description.hidden_size, 1, generator=torch.Generator().manual_seed(0))
    keys = torch.randn(1, lm.description.intermediate_size, generator=torch.Generator().manual_seed(1))
    model.apply(Edit(deltas=(LowRankDelta(parameter=f"{site}.weight", left=noise, right=keys),)))
    made_later = method(name, LAYERS).prepare(model, Cache(tmp_path / "after"), SilentProgress())
    model.restore()
    for ours, theirs in zip(made_later.edit(REQUESTS[:1], seed=0).deltas, expected, strict=True):
        assert isinstance(ours, LowRankDelta)
        assert isinstance(theirs, LowRankDelta)
        assert torch.equal(ours.left, theirs.left)
        assert torch.equal(ours.right, theirs.right)


@pytest.mark.parametrize("name", ["rome", *SPREAD])
def test_a_half_precision_model_gets_nearly_the_same_float32_update(
    cache_dir: Path, method: Callable[..., EditMethod], lm: LanguageModel, tmp_path: Path, name: str
) -> None:
    where, requests = ("method.layer=1", REQUESTS[:1]) if name == "rome" else (LAYERS, REQUESTS[:2])
    same_text = "method.context_prefixes=['{}','Therefore it rained. {}']"  # each precision would generate its own
    built = method(name, where, same_text)
    full = built.prepare(EditedModel(lm), Cache(tmp_path), SilentProgress()).edit(requests, seed=0)
    for dtype in (torch.bfloat16, torch.float16):
        half = TinyModel(name="tiny", architecture="llama", cache_dir=cache_dir).load()
        nn.Module.to(half.module, dtype)
        model = EditedModel(replace(half, fingerprint=f"tiny llama in {dtype}"))
        edit = built.prepare(model, Cache(tmp_path), SilentProgress()).edit(requests, seed=0)
        for ours, theirs in zip(edit.deltas, full.deltas, strict=True):
            assert isinstance(ours, LowRankDelta)
            assert isinstance(theirs, LowRankDelta)
            assert ours.left.dtype == ours.right.dtype == torch.float32
            cosine = float(((ours.left @ ours.right) * (theirs.left @ theirs.right)).sum()) / (update_norm(ours) * update_norm(theirs))
            assert cosine > 0.9
        model.apply(edit)


@pytest.mark.parametrize("name", SPREAD)
def test_the_number_of_neighbours_in_an_edit_does_not_change_a_target_value(made: Made, name: str) -> None:
    """With the solves of a batch apart, an edit of facts that share nothing equals their edits one by one, to first order."""
    _, editor = made(name, "method.layers=[1]")
    alone = [editor.edit([request], seed=0).diagnostics["delta_norm"] for request in REQUESTS]
    together = editor.edit(REQUESTS, seed=0).diagnostics["delta_norm"]
    assert together == pytest.approx(sum(alone) / len(alone), rel=1e-3)


@pytest.mark.parametrize("name", [*SPREAD, "nse"])
def test_several_pairs_of_prefix_lengths_are_several_groups_and_another_edit_key(method: Callable[..., EditMethod], name: str) -> None:
    one, two = (method(name, f"method.prefix_lengths={pairs}") for pairs in ("[[3,5]]", "[[3,5],[4,10]]"))
    literal = method(name, "method.prefix_lengths=[[3,5],[4,10]]", "method.context_prefixes=['{}','So. {}']")
    groups = [made.group_sizes for made in (one, two, literal) if isinstance(made, SpreadSettings)]
    assert groups == [(5,), (5, 10), ()]
    assert [made.settings().get("keys") for made in (one, two, literal)] == [None, "mean over groups", None]

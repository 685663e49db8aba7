"""MEND: its gradient factors, its network, what training keeps and refuses, and that its edits add up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from editeval.datasets.training import TrainingSet
from editeval.edits.delta import Edit, LowRankDelta
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.keyvalue.features import Features, editing_features
from editeval.keyvalue.fine_tuning import target_row
from editeval.keyvalue.upper import UpperPass
from editeval.methods.mend import MEND, Editor
from editeval.models.load import PretrainedModel
from editeval.models.model import LanguageModel
from editeval.models.tiny import TinyModel
from editeval.training.hypernetwork import Hypernetwork, NamedMap, PairNetwork
from editeval.training.hypernetwork_settings import edited_maps
from editeval.types import ConfigError, DatasetError, EditevalError, EditRequest, Probe, SilentProgress, Workload
from tests.datasets.examples import Given

CITIES = ("Oslo", "Rome", "Lima", "Cairo", "Paris", "Delhi")
LEARNED = tuple(
    EditRequest(
        request_id=f"learned/{number}",
        prompt="The capital of {} is",
        subject=f"the land number {number}",
        target_new=CITIES[number % 6],
        paraphrase_prompts=(f"The land number {number} is ruled from",),
        neighborhood_prompts=(Probe(prompt=f"The capital of the isle {number} is", answer=CITIES[(number + 1) % 6]),),
        source_hash=str(number),
    )
    for number in range(12)
)
FIRST = EditRequest(request_id="a", prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English")
SECOND = EditRequest(request_id="b", prompt="In which city was {} founded? It was", subject="Nokia", target_new="Tampa")
METHOD = MEND(
    name="mend",
    layers=[2, 3],
    maps=None,
    rank=4,
    v_std=None,
    edit_learning_rate=1e-3,
    learning_rate=1e-3,
    rate_learning_rate=1e-4,
    edit_weight=0.1,
    locality_weight=1.0,
    gradient_clip=100.0,
    max_steps=6,
    rows_per_step=2,
    validate_every=2,
    patience=100,
    held_back=0.2,
    training_seed=0,
    accumulate=True,
    training=TrainingSet(name="own", of=Given(*LEARNED)),
    archive=None,
)


class KilledError(Exception):
    """The process is gone."""


@dataclass
class Told:
    """A progress that remembers what it was told, and may be killed after some steps of training."""

    killed_after: int | None = None
    killed_by: type[BaseException] = KilledError
    messages: list[str] = field(default_factory=list)

    def track(self, items: Iterable[Any], *, description: str, total: int | None = None) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == self.killed_after:
                raise self.killed_by
            yield item

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture(scope="module")
def tiny(cache_dir: Path) -> Callable[[str], LanguageModel]:
    return lambda architecture: TinyModel(name="tiny", architecture=architecture, cache_dir=cache_dir).load()


@pytest.fixture(scope="module")
def trained(tiny: Callable[[str], LanguageModel], tmp_path_factory: pytest.TempPathFactory) -> tuple[EditedModel, Cache]:
    """A model and the cache with its unbroken training."""
    model, cache = EditedModel(tiny("llama")), Cache(tmp_path_factory.mktemp("mend"))
    METHOD.prepare(model, cache, SilentProgress())
    return model, cache


@pytest.fixture
def editor(trained: tuple[EditedModel, Cache]) -> Editor:
    trained[0].restore()
    return METHOD.prepare(*trained, SilentProgress())


def archive(cache: Cache) -> Path:
    (path,) = (cache.root / "mend").glob("*.safetensors")
    return path


def dense(edit: Edit) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for delta in edit.deltas:
        assert isinstance(delta, LowRankDelta)
        found[delta.parameter] = found.get(delta.parameter, 0) + delta.left @ delta.right
    return found


def log_prob(model: EditedModel, request: EditRequest) -> float:
    return model.score([request.full_prompt], [" " + request.target_new])[0].log_prob


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])
def test_outer_products_of_what_hooks_saw_add_up_to_autograds_gradients(tiny: Callable[[str], LanguageModel], architecture: str) -> None:
    lm = tiny(architecture)
    row = target_row(lm.tokenizer, FIRST, scored_at="target", max_tokens=100)
    maps = edited_maps(lm, [2, 3])
    weights = [lm.module.get_submodule(edited.path).get_parameter("weight").requires_grad_() for edited in maps]
    logits = lm.module(torch.tensor([row.input_ids])).logits[0, list(row.positions)]
    expected = torch.autograd.grad(nn.functional.cross_entropy(logits, torch.tensor(row.tokens)), weights)
    for weight in weights:
        weight.requires_grad_(False)
    for upper in (None, UpperPass(lm, [row.input_ids], first=2)):
        features = editing_features(lm, [row], [edited.path for edited in maps], upper=upper).of_map
        for edited, gradient in zip(maps, expected, strict=True):
            pair = features[edited.path]
            ours = pair.gradients.T @ pair.inputs
            assert ours.shape == (edited.d_out, edited.d_in)
            assert torch.allclose(ours.T if lm.sites.transposed else ours, gradient, atol=1e-6)


def test_an_untrained_network_writes_the_normalised_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    maps = [NamedMap(path="x", d_in=5, d_out=3), NamedMap(path="y", d_in=5, d_out=3)]
    network = Hypernetwork(maps, rank=2, rate=0.5, seed=0)
    seen = Features(inputs=torch.randn(40, 5, generator=generator) * 3 + 1, gradients=torch.randn(40, 3, generator=generator) * 1e-3)
    network.observe({"x": Features(inputs=seen.inputs[:10], gradients=seen.gradients[:10])})
    network.observe({"y": Features(inputs=seen.inputs[10:], gradients=seen.gradients[10:])})
    update = network({"y": seen})["y"]
    normalised = [(values - values.mean(0)) / values.std(0) for values in (seen.inputs, seen.gradients)]
    assert torch.allclose(update.right, normalised[0], atol=1e-5)
    assert torch.allclose(update.left, -0.5 * normalised[1].T, atol=1e-3)


def test_v_starts_as_published_or_scaled_and_a_rank_is_at_most_the_width() -> None:
    maps = [NamedMap(path="x", d_in=40, d_out=24)]
    for v_std, expected in ((1.0, 1.0), (None, 1 / 8)):
        network = Hypernetwork(maps, rank=100, rate=0.5, seed=0, v_std=v_std).networks["24x40"]
        assert isinstance(network, PairNetwork)
        for layer in (network.first, network.second):
            assert layer.reading.shape == (64, 64)
            assert float(layer.reading.detach().std()) == pytest.approx(expected, rel=0.05)
            assert not bool(layer.writing.any())


def test_only_the_chosen_maps_are_edited(trained: tuple[EditedModel, Cache], tmp_path: Path) -> None:
    model, _ = trained
    model.restore()
    chosen = replace(METHOD, maps=["mlp_up", "mlp_gate"])
    edit = chosen.prepare(model, Cache(tmp_path), SilentProgress()).edit([FIRST], seed=0)
    names = {f"model.layers.{layer}.mlp.{name}.weight" for layer in (2, 3) for name in ("gate_proj", "up_proj")}
    assert {delta.parameter for delta in edit.deltas if isinstance(delta, LowRankDelta)} == names
    workload = Workload(element_bytes=4, batch_size=1)
    whole, some = (method.footprint(model.lm.description, workload) for method in (METHOD, chosen))
    assert len(some.edited) == 4 < len(whole.edited) == 6
    for maps, message in (
        (["mlp_side"], "mlp_in, mlp_gate, mlp_up, mlp_out"),
        ([], "null: every map"),
        (["mlp_up", "mlp_up"], "each once"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(METHOD, maps=maps)
    with pytest.raises(ConfigError, match="gpt2 has no map mlp_up of its own"):
        chosen.check(replace(model.lm.description, model_type="gpt2"))


def test_tokens_without_a_gradient_leave_no_trace() -> None:
    network = Hypernetwork([NamedMap(path="x", d_in=5, d_out=3)], rank=2, rate=0.5, seed=0)
    silent = Features(inputs=torch.ones(4, 5), gradients=torch.zeros(4, 3))
    network.observe({"x": silent})
    assert all(not bool(buffer.any()) for buffer in network.buffers())
    assert network({"x": silent})["x"].left.shape == (3, 0)


def test_every_parameter_learns_also_from_the_identity(trained: tuple[EditedModel, Cache]) -> None:
    fresh = Hypernetwork(edited_maps(trained[0].lm, [2, 3]), rank=4, rate=1e-3, seed=0, v_std=None).state_dict()
    learned = load_file(archive(trained[1]))
    assert fresh.keys() == learned.keys()
    assert [name for name in fresh if torch.equal(fresh[name], learned[name])] == []


def test_edits_add_up_and_the_first_is_still_there_after_the_second(editor: Editor) -> None:
    model = editor.model
    before = log_prob(model, FIRST)
    model.apply(editor.edit([FIRST], seed=0))
    model.apply(editor.edit([SECOND], seed=0))
    both = model.weights_digest()
    assert log_prob(model, FIRST) > before + 0.1
    model.restore()
    model.apply(editor.edit([SECOND], seed=0))
    assert model.weights_digest() != both


def test_without_accumulation_only_the_last_edit_is_in_the_model(trained: tuple[EditedModel, Cache], editor: Editor) -> None:
    published, model = replace(editor, accumulate=False), editor.model
    model.apply(published.edit([FIRST], seed=0))
    model.apply(published.edit([SECOND], seed=0))
    parameters = [f"{site}.weight" for site in editor.sites]
    twice = {name: model.weight(name).clone() for name in parameters}
    model.restore()
    model.apply(editor.edit([SECOND], seed=0))
    for name in parameters:
        assert torch.allclose(twice[name], model.weight(name), atol=1e-6)


def test_the_update_of_a_batch_is_the_sum_of_its_facts_updates(editor: Editor) -> None:
    together = dense(editor.edit([FIRST, SECOND], seed=0))
    first, second = (dense(editor.edit([request], seed=0)) for request in (FIRST, SECOND))
    for name, update in together.items():
        assert torch.allclose(update, first[name] + second[name], atol=1e-6)


def test_an_edit_is_one_pass_through_the_model(editor: Editor) -> None:
    layers: list[nn.Module] = []
    hook = editor.model.lm.layer_module(editor.model.lm.sites.layers, 0).register_forward_hook(lambda module, *_: layers.append(module))
    editor.edit([FIRST], seed=0)
    hook.remove()
    assert len(layers) == 1


@pytest.mark.parametrize("killed_after", [1, 3, 5])
def test_training_that_was_killed_ends_like_unbroken_training(
    trained: tuple[EditedModel, Cache], tmp_path: Path, killed_after: int
) -> None:
    model, unbroken = trained
    model.restore()
    cache = Cache(tmp_path)
    with pytest.raises(KilledError):
        METHOD.prepare(model, cache, Told(killed_after=killed_after))
    told = Told()
    METHOD.prepare(model, cache, told)
    saved = (killed_after - 1) // 2 * 2  # one step is fetched ahead; saved at each second one
    assert any(f"goes on from step {saved} of 6" in text for text in told.messages) == (saved > 0)
    ours, expected = load_file(archive(cache)), load_file(archive(unbroken))
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []


def test_annealed_training_that_was_killed_takes_the_steps_of_unbroken_training(trained: tuple[EditedModel, Cache], tmp_path: Path) -> None:
    model, plain = trained
    model.restore()
    method, caches = replace(METHOD, anneal=True), [Cache(tmp_path / name) for name in ("whole", "broken")]
    method.prepare(model, caches[0], Told())
    with pytest.raises(KilledError):
        method.prepare(model, caches[1], Told(killed_after=3))
    method.prepare(model, caches[1], Told())
    whole, broken, constant = (load_file(archive(cache)) for cache in (*caches, plain))
    assert [name for name in whole if not torch.equal(whole[name], broken[name])] == []
    assert any(not torch.equal(whole[name], constant[name]) for name in whole)


def test_training_that_a_person_interrupts_leaves_no_archive(trained: tuple[EditedModel, Cache], tmp_path: Path) -> None:
    trained[0].restore()
    with pytest.raises((KeyboardInterrupt, SystemExit, EditevalError)):
        METHOD.prepare(trained[0], Cache(tmp_path), Told(killed_after=5, killed_by=KeyboardInterrupt))
    assert [path.name for path in (tmp_path / "mend").iterdir() if ".partial" not in path.name] == []


def test_training_is_done_once_and_leaves_the_model_as_it_was(trained: tuple[EditedModel, Cache]) -> None:
    model, cache = trained
    model.restore()
    before = {name: tensor.clone() for name, tensor in model.lm.module.state_dict().items()}
    random_state, told = torch.get_rng_state(), Told()
    METHOD.prepare(model, Cache(cache.root / "again"), told)
    METHOD.prepare(model, cache, told)
    assert sum("training on 12 rows of own" in text for text in told.messages) == 1
    assert any(str(archive(cache)) in text and "edit success" in text for text in told.messages)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.lm.module.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert not any(parameter.requires_grad for parameter in model.lm.module.parameters())


def test_other_rows_other_settings_and_another_model_need_training_of_their_own(
    trained: tuple[EditedModel, Cache], tiny: Callable[[str], LanguageModel]
) -> None:
    fewer = replace(METHOD, training=TrainingSet(name="own", of=Given(*LEARNED), without=Given(LEARNED[0])))
    settings = [METHOD, fewer, replace(METHOD, rank=5), replace(METHOD, training_seed=1), replace(METHOD, accumulate=False)]
    assert len({str(method.settings()) for method in settings}) == 5
    keys = {method._key(trained[0].lm) for method in settings} | {METHOD._key(tiny("gpt2"))}
    assert len(keys) == 5  # accumulation is no matter of training


def test_the_archive_of_another_model_of_other_layers_or_of_other_rows_is_refused(
    trained: tuple[EditedModel, Cache], tiny: Callable[[str], LanguageModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(archive(trained[1]).parent))
    given = replace(METHOD, archive=f"~/{archive(trained[1]).name}")
    trained[0].restore()
    given.check(trained[0].lm.description)
    given.prepare(trained[0], Cache(tmp_path), SilentProgress())
    other = EditedModel(TinyModel(name="tiny", architecture="llama", seed=1, cache_dir=str(trained[1].root)).load())
    with pytest.raises(ConfigError, match="was trained with model="):
        given.prepare(other, Cache(tmp_path), SilentProgress())
    with pytest.raises(ConfigError, match=r"was trained with maps=.*layers\.2"):
        replace(given, layers=[1, 3]).prepare(trained[0], Cache(tmp_path), SilentProgress())
    other_rows = TrainingSet(name="own", of=Given(*LEARNED[1:]))
    with pytest.raises(ConfigError, match=r"learned from other rows \(12, hash .*training=elsewhere"):
        replace(given, training=other_rows).check(trained[0].lm.description)
    elsewhere = TrainingSet(name="elsewhere", of=None, without=Given(FIRST, SECOND))
    replace(given, training=elsewhere).check(trained[0].lm.description)
    with pytest.raises(ConfigError, match="1 subject of what is edited, such as 'the land number 3'"):
        replace(given, training=replace(elsewhere, without=Given(FIRST, LEARNED[3]))).check(trained[0].lm.description)
    with pytest.raises(ConfigError, match="training=elsewhere has no rows"):
        replace(METHOD, training=elsewhere).check(trained[0].lm.description)
    stranger = tmp_path / "stranger.safetensors"
    stranger.write_bytes(b"nothing of use")
    with pytest.raises(ConfigError, match="is nothing that this method trained"):
        replace(given, archive=str(stranger)).prepare(trained[0], Cache(tmp_path), SilentProgress())


def test_a_model_that_differs_in_its_tokenizer_alone_is_another_model(trained: tuple[EditedModel, Cache], tmp_path: Path) -> None:
    """Its words are other rows of the embedding, so a network learned from other texts than it would be asked to write."""
    lm, cache = trained[0].lm, trained[1]
    trained[0].restore()
    folders = (tmp_path / "same", tmp_path / "other")
    for folder in folders:
        lm.module.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
    file = folders[1] / "tokenizer.json"
    saved = json.loads(file.read_text())
    vocabulary = saved["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.__getitem__)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(saved))
    same, other = (PretrainedModel(name="tiny", name_or_path=str(path), cache_dir=tmp_path, device="cpu").load() for path in folders)
    weights = same.module.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in other.module.state_dict().items())
    assert METHOD._key(same) == METHOD._key(lm) != METHOD._key(other)
    given = replace(METHOD, archive=str(archive(cache)))
    given.prepare(EditedModel(same), Cache(tmp_path), SilentProgress())
    with pytest.raises(ConfigError, match=r"was trained with model=.*its tokenizer and its settings"):
        given.prepare(EditedModel(other), Cache(tmp_path), SilentProgress())


def test_training_ends_early_when_nothing_gets_better(trained: tuple[EditedModel, Cache], tmp_path: Path) -> None:
    trained[0].restore()
    hopeless = replace(METHOD, learning_rate=10.0, max_steps=40, patience=4)
    told = Told()
    hopeless.prepare(trained[0], Cache(tmp_path), told)
    assert any("no better validation for 4 steps" in text for text in told.messages)
    assert sum(text.startswith("training step") for text in told.messages) < 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, r"method\.rank=0 must be at least 1"),
        ({"edit_weight": 0}, r"method\.edit_weight=0 must be above 0"),
        ({"held_back": 1}, r"method\.held_back"),
    ],
)
def test_numbers_that_cannot_work_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(METHOD, **change)  # type: ignore[arg-type]


def test_layers_and_training_sets_that_cannot_work_are_refused(trained: tuple[EditedModel, Cache], tmp_path: Path) -> None:
    description = trained[0].lm.description
    trained[0].restore()
    with pytest.raises(ConfigError, match=r"layer 9 not in 0\.\.3.*set method\.layers"):
        replace(METHOD, layers=[9]).check(description)
    with pytest.raises(ConfigError, match="rising order"):
        replace(METHOD, layers=[3, 2])
    alone = tuple(replace(request, neighborhood_prompts=()) for request in LEARNED)
    with pytest.raises(DatasetError, match="none of them asks about a neighbour"):
        replace(METHOD, training=TrainingSet(name="own", of=Given(*alone))).prepare(trained[0], Cache(tmp_path), SilentProgress())
    with pytest.raises(ConfigError, match="at least one of each"):
        replace(METHOD, training=TrainingSet(name="own", of=Given(LEARNED[0]))).prepare(trained[0], Cache(tmp_path), SilentProgress())

"""SERAC's two trained parts: what they learn, that they are trained once, and what they belong to."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file

from editeval.build import build
from editeval.datasets.training import TrainingSet
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.interfaces import EditMethod
from editeval.memory import scope
from editeval.memory.encoder import HashedEncoder
from editeval.memory.scope import ScopeLearner, _asked
from editeval.methods.serac import SERAC, CounterfactualAdapter
from editeval.models import packed
from editeval.models.packed import PackedWeights
from editeval.models.tiny import TinyModel
from editeval.types import ConfigError, EditRequest, ModelDescription, Probe, SilentProgress
from tests.datasets.examples import Given
from tests.memory.test_encoder import tiny_encoder
from tests.methods.reading import ATTENTION, FACTS, gains, reading_model

Item = TypeVar("Item")
OTHER = "Yes, the weather is fine and"


class Said(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def method(compose_config: Callable[..., DictConfig], *overrides: str) -> SERAC:
    made = build(compose_config("method=serac", "model=tiny-gpt2", *overrides).method, "method", EditMethod)
    assert isinstance(made, SERAC)
    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """One cache for this file: both parts are trained once."""
    return Cache(tmp_path_factory.mktemp("trained"))


@pytest.mark.parametrize("architecture", ATTENTION)
def test_a_model_that_reads_answers_as_the_facts_say_and_what_is_about_none_is_left(
    compose_config: Callable[..., DictConfig], trained: Cache, tmp_path: Path, architecture: str
) -> None:
    cache = trained if architecture == "gpt2" else Cache(tmp_path)  # which other tests read
    model = EditedModel(reading_model(trained.root, architecture))
    assert min(gains(model, method(compose_config), cache)) > 0.25
    assert model.score([OTHER], [" so"]) == EditedModel(model.lm).score([OTHER], [" so"])
    assert isinstance(model.adapter, CounterfactualAdapter)
    routes = model.adapter.routes([FACTS[0].full_prompt, OTHER])
    assert routes[0] is not None
    assert routes[0].model is model.adapter.reader
    assert routes[1] is None
    assert model.adapter.reader.lm.module is not model.lm.module


def test_both_parts_are_trained_once(compose_config: Callable[..., DictConfig], trained: Cache) -> None:
    first, second = Said(), Said()
    for said in (first, second):
        method(compose_config).prepare(EditedModel(reading_model(trained.root)), trained, said)
    assert not any(line.startswith("training") for line in second.lines)
    assert [line.split(":")[0] for line in second.lines] == ["scope classifier", "counterfactual model"]
    assert len(list((trained.root / "serac-scope").iterdir())) == len(list((trained.root / "serac-counterfactual").iterdir())) == 1


class KilledError(Exception):
    """Stands for a kill: nothing after it runs."""


class KilledAt(Said):
    """Dies when the step with this number of a part's training begins."""

    def __init__(self, part: str, step: int) -> None:
        super().__init__()
        self._part = part
        self._step = step

    def track(self, items: Iterable[Item], *, description: str, total: int | None = None) -> Iterator[Item]:
        for number, item in enumerate(items):
            if description == self._part and number == self._step:
                raise KilledError
            yield item


@pytest.mark.parametrize("part", ["scope classifier", "counterfactual model"])
def test_training_that_was_killed_goes_on_and_ends_like_unbroken_training(
    compose_config: Callable[..., DictConfig], trained: Cache, tmp_path: Path, part: str
) -> None:
    quick = method(compose_config, "method.max_steps=6", "method.validate_every=2")
    unbroken, killed = Cache(tmp_path / "unbroken"), Cache(tmp_path / "killed")
    quick.prepare(EditedModel(reading_model(trained.root)), unbroken, SilentProgress())
    with pytest.raises(KilledError):
        quick.prepare(EditedModel(reading_model(trained.root)), killed, KilledAt(part, 5))
    said = Said()
    quick.prepare(EditedModel(reading_model(trained.root)), killed, said)
    assert f"{part} goes on from step 4 of 6" in said.lines
    for kind in ("serac-scope", "serac-counterfactual"):
        (ours,), (expected,) = (list((cache.root / kind).iterdir()) for cache in (killed, unbroken))
        ours_tensors, expected_tensors = load_file(ours), load_file(expected)
        assert [name for name, tensor in expected_tensors.items() if not torch.equal(ours_tensors[name], tensor)] == []


def test_the_classifier_learns_to_leave_neighbours_alone() -> None:
    rows = tuple(
        EditRequest(
            request_id=str(number),
            prompt="The capital of {} is",
            subject=f"Land{number * 7919}",
            target_new="Rome",
            paraphrase_prompts=(f"Of Land{number * 7919} the seat of government is",),
            neighborhood_prompts=(Probe(prompt=f"The capital of Coast{number * 104729} is", answer="Oslo"),),
        )
        for number in range(1, 13)
    )
    learner = ScopeLearner(HashedEncoder(), rows, threshold=0.7)
    start = learner.validate(rows, 0)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        learner.loss(rows).backward()
        optimizer.step()
    end = learner.validate(rows, 30)
    assert end.loss < start.loss / 2
    assert min(end.shares["precision"], end.shares["recall"]) > 0.9


def test_the_nearest_row_is_found_however_many_are_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = HashedEncoder()
    rows = [EditRequest(request_id=str(n), prompt="{} is in", subject=f"Land{n * 7919}", target_new="Rome") for n in range(7)]
    vectors = encoder.encode([row.full_prompt for row in rows])
    others = [max((float(one @ other), n) for n, other in enumerate(vectors) if n != number)[1] for number, one in enumerate(vectors)]
    for at_once in (1024, 3):
        monkeypatch.setattr(scope, "ROWS_AT_ONCE", at_once)
        nearest = scope._nearest_rows(encoder, rows)
        assert [nearest[row.full_prompt].request_id for row in rows] == [rows[number].request_id for number in others]


def test_one_row_is_learned_beside_the_row_that_is_nearest_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hard negative: a step of one row compares two facts, and each is pushed away from the other's prompt."""
    subjects = ("the land of Orbania", "the land of Orbanie", "xyz")
    rows = [EditRequest(request_id=name, prompt="{}", subject=name, target_new="Rome") for name in subjects]
    learner, compared, seen = ScopeLearner(HashedEncoder(), rows, threshold=0.5), ScopeLearner._compared, list[str]()

    def watched(learner: ScopeLearner, rows: Sequence[EditRequest]) -> tuple[torch.Tensor, torch.Tensor]:
        seen.extend(row.subject for row in rows)
        return compared(learner, rows)

    monkeypatch.setattr(ScopeLearner, "_compared", watched)

    def cosine() -> float:
        learner.encoder.forget()
        first, second = learner.encoder.encode(subjects[:2])
        return float(first @ second)

    optimizer, before = torch.optim.SGD(learner.encoder.parameters(), lr=1e-2), cosine()
    loss = learner.loss(rows[:1])
    loss.backward()
    optimizer.step()
    assert seen == list(subjects[:2])
    assert torch.isfinite(loss)  # a fact alone has no other to be told from, so its loss is not a number
    assert cosine() < before


def test_rows_held_back_are_asked_and_never_learned_from(
    compose_config: Callable[..., DictConfig], trained: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared, seen = ScopeLearner._compared, {True: set[str](), False: set[str]()}

    def watched(learner: ScopeLearner, rows: Sequence[EditRequest]) -> tuple[torch.Tensor, torch.Tensor]:
        seen[torch.is_grad_enabled()] |= {row.subject for row in rows}
        return compared(learner, rows)

    monkeypatch.setattr(ScopeLearner, "_compared", watched)
    quick = method(compose_config, "method.max_steps=10", "method.validate_every=10", "method.held_back=0.3")
    quick._scope(reading_model(trained.root), Cache(tmp_path), SilentProgress())
    assert seen[True]
    assert seen[False]
    assert not seen[True] & seen[False]


def test_a_neighbour_that_is_a_fact_of_its_own_is_about_that_fact() -> None:
    one = EditRequest(
        request_id="1", prompt="{} is in", subject="Rome", target_new="Peru", neighborhood_prompts=(Probe(prompt="Oslo is in", answer="x"),)
    )
    two = EditRequest(request_id="2", prompt="{} is in", subject="Oslo", target_new="Chile")
    assert _asked([one, two]).about == ["Rome is in", "Oslo is in", "Oslo is in"]
    assert _asked([one]).about == ["Rome is in", None]


def test_parts_of_another_model_encoder_or_training_set_are_refused(
    compose_config: Callable[..., DictConfig], trained: Cache, tmp_path: Path
) -> None:
    model = EditedModel(reading_model(trained.root))
    method(compose_config).prepare(model, trained, SilentProgress())
    for part in ("scope", "counterfactual"):
        (file,) = (trained.root / f"serac-{part}").iterdir()
        shutil.copy(file, tmp_path / f"{part}.safetensors")
    given = method(compose_config, f"method.archive={tmp_path}")
    again = EditedModel(reading_model(trained.root))
    given.prepare(again, Cache(tmp_path / "empty"), SilentProgress())
    assert isinstance(again.adapter, CounterfactualAdapter)
    assert isinstance(model.adapter, CounterfactualAdapter)
    assert again.adapter.reader.score([OTHER], [" so"]) == model.adapter.reader.score([OTHER], [" so"])

    with pytest.raises(ConfigError, match=r"scope\.safetensors learned from other rows .*training=elsewhere"):
        replace(given, training=TrainingSet(name="own", of=Given(*FACTS))).check(model.lm.description)
    method(compose_config, f"method.archive={tmp_path}", "training=elsewhere").check(model.lm.description)
    with pytest.raises(ConfigError, match="subjects of what is edited, such as"):
        method(compose_config, f"method.archive={tmp_path}", "training=elsewhere", "dataset.part=train").check(model.lm.description)

    def other(**changed: Any) -> EditedModel:
        return EditedModel(TinyModel(name="t", cache_dir=trained.root, device="cpu", **changed).load())

    encoder = tiny_encoder(tmp_path / "encoder")
    with pytest.raises(ConfigError, match=r"scope\.safetensors was trained with encoder=hashed, this run has encoder=[0-9a-f]{64};"):
        replace(given, encoder=str(encoder)).prepare(other(architecture="gpt2"), trained, SilentProgress())
    with pytest.raises(ConfigError, match=r"counterfactual\.safetensors was trained with model="):
        given.prepare(other(architecture="gpt2", seed=1), trained, SilentProgress())
    (tmp_path / "scope.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match="nothing that this method trained"):
        given.prepare(other(architecture="gpt2"), trained, SilentProgress())
    (tmp_path / "scope.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no scope\.safetensors"):
        given.check(model.lm.description)


def test_a_counterfactual_model_of_another_vocabulary_is_refused(
    compose_config: Callable[..., DictConfig], trained: Cache, tmp_path: Path
) -> None:
    other = TinyModel(name="other", architecture="llama", cache_dir=trained.root, device="cpu").load()
    other.module.save_pretrained(tmp_path)
    other.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has another vocabulary"):
        method(compose_config, f"method.counterfactual={tmp_path}")._untrained(reading_model(trained.root), trained)
    small = method(compose_config, f"method.counterfactual={tmp_path}")._untrained(other, trained)
    assert small.module is not other.module


def test_a_counterfactual_model_is_known_by_its_content_wherever_it_lies(
    compose_config: Callable[..., DictConfig], trained: Cache, tmp_path: Path
) -> None:
    def saved(folder: Path, seed: int) -> Path:
        small = TinyModel(name="small", architecture="gpt2", seed=seed, num_layers=1, cache_dir=trained.root, device="cpu").load()
        small.module.save_pretrained(folder)
        small.tokenizer.save_pretrained(folder)
        return folder

    quick = method(compose_config, "method.max_steps=1", "method.rows_per_step=1", "method.held_back=0.3")
    quick, lm = replace(quick, training=TrainingSet(name="own", of=Given(*FACTS))), reading_model(trained.root)

    def is_trained(folder: Path) -> bool:
        said = Said()
        reader = replace(quick, counterfactual=str(folder))._reader(lm, Cache(tmp_path / "cache"), said)
        assert reader.packed is not lm.packed
        return any(line.startswith("training") for line in said.lines)

    def settings(folder: Path) -> object:
        return replace(quick, counterfactual=str(folder)).settings()

    one = saved(tmp_path / "one", seed=0)
    same = Path(shutil.copytree(one, tmp_path / "same"))
    assert settings(one) == settings(same)
    before = settings(one)
    assert [is_trained(one), is_trained(same)] == [True, False]
    saved(one, seed=1)
    assert settings(one) != before
    assert is_trained(one)


def test_edited_and_counterfactual_model_keep_packed_copies_beside_each_other(
    compose_config: Callable[..., DictConfig], trained: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    packs, pack = [0], packed._pack

    def counted(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        packs[0] += 1
        return pack(weight)

    lm = replace(reading_model(trained.root), packed=PackedWeights(most_bytes=2**30, fewest_elements=1))
    model = EditedModel(lm)
    editor = method(compose_config).prepare(model, trained, SilentProgress())
    model.apply(editor.edit([FACTS[0]], seed=0))
    assert isinstance(model.adapter, CounterfactualAdapter)
    monkeypatch.setattr(packed, "_pack", counted)
    for other in ("One", "Two"):  # asked for the first time, so that both models compute
        model.score([f"{other} {FACTS[0].full_prompt}", f"{other}, {OTHER}"], [" so"] * 2)
        if other == "One":
            assert packs[0] > 0
            packs[0] = 0
    assert packs[0] == 0
    assert len(lm.packed) == len(model.adapter.reader.lm.packed) > 0


def test_a_large_model_is_not_copied(compose_config: Callable[..., DictConfig]) -> None:
    large = ModelDescription(
        name="large",
        model_type="gpt2",
        num_layers=48,
        hidden_size=1600,
        attention_width=1600,
        intermediate_size=6400,
        vocab_size=50257,
        max_positions=1024,
    )
    with pytest.raises(ConfigError, match=r"copy of large, which has 1\.6 billion parameters \(at most 1\); set it to a small model"):
        method(compose_config).check(large)
    method(compose_config).check(replace(large, num_layers=12))
    method(compose_config, "method.counterfactual=gpt2").check(large)


@pytest.mark.parametrize("wrong", ["method.similarity=1", "method.held_back=0", "method.max_steps=0", "method.scope_learning_rate=0"])
def test_settings_that_cannot_be_are_refused(compose_config: Callable[..., DictConfig], wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"method\."):
        method(compose_config, wrong)

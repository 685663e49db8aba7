"""RLEdit: what a trajectory costs, what its gradient is, and that training sees edited models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from editeval.datasets.training import TrainingSet
from editeval.edits.delta import Edit, LowRankDelta
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.keyvalue.features import Features
from editeval.methods.rledit import RLEdit
from editeval.models.model import LanguageModel
from editeval.models.tiny import TinyModel
from editeval.training.hypernetwork import Factors, Hypernetwork
from editeval.training.hypernetwork_sequences import SequenceCourse, joined
from editeval.training.hypernetwork_settings import edited_maps
from editeval.training.lessons import Lesson, acting
from editeval.types import ConfigError, EditRequest, SilentProgress
from tests.datasets.examples import Given
from tests.methods.test_mend import FIRST, LEARNED, SECOND, KilledError, Told

METHOD = RLEdit(
    name="rledit",
    layers=[2, 3],
    maps=None,
    rank=4,
    v_std=None,
    edit_learning_rate=1e-2,
    learning_rate=1e-3,
    rate_learning_rate=1e-3,
    edit_weight=1.0,
    locality_weight=0.6,
    gradient_clip=1.0,
    max_steps=4,
    rows_per_step=3,
    validate_every=2,
    patience=100,
    held_back=0.3,
    training_seed=0,
    memory=2,
    decay=0.5,
    norm_weight=0.1,
    training=TrainingSet(name="own", of=Given(*LEARNED)),
    archive=None,
)


@pytest.fixture(scope="module")
def lm(cache_dir: Path) -> LanguageModel:
    return TinyModel(name="tiny", architecture="llama", cache_dir=cache_dir).load()


@pytest.fixture
def network(lm: LanguageModel) -> Hypernetwork:
    return Hypernetwork(edited_maps(lm, [2, 3]), rank=4, rate=1e-2, seed=0, v_std=None)


@pytest.fixture
def course(lm: LanguageModel) -> Callable[..., SequenceCourse]:
    def made(*, memory: int = 2, decay: float = 0.5, norm_weight: float = 0.1) -> SequenceCourse:
        return SequenceCourse(
            lm=lm,
            sites=tuple(edited.path for edited in edited_maps(lm, [2, 3])),
            first=2,
            settings=METHOD._learning_settings,
            memory=memory,
            decay=decay,
            norm_weight=norm_weight,
        )

    return made


def by_the_formula(course: SequenceCourse, network: Hypernetwork, requests: Sequence[EditRequest]) -> Tensor:
    """The trajectory's cost with one graph: plain sums over edits and ages, earlier updates given."""
    lessons = [Lesson(course.lm, request, first=course.first) for request in requests]
    written: dict[str, Factors] = {}
    total = torch.zeros(())
    for number, lesson in enumerate(lessons):
        with acting(course.lm.module, written):
            features = lesson.features(course.sites).of_map
            network.observe(features)
            update = network(features)
            for age in range(min(course.memory, number + 1)):
                outcome = lessons[number - age].outcome(update)
                total = total + course.decay**age * (1.0 * outcome.edit_loss + 0.6 * outcome.locality_loss)
        total = total + course.norm_weight * torch.stack([(each.left @ each.right).square().sum() for each in update.values()]).sum()
        written = joined(written, update)
    return total / len(lessons)


@pytest.mark.parametrize("memory", [1, 2, 3])
def test_a_step_is_the_published_cost_of_a_trajectory_and_its_gradient(
    lm: LanguageModel, course: Callable[..., SequenceCourse], network: Hypernetwork, memory: int
) -> None:
    twin = Hypernetwork(edited_maps(lm, [2, 3]), rank=4, rate=1e-2, seed=0, v_std=None)
    ours, expected = course(memory=memory).step_loss(network, LEARNED[:3]), by_the_formula(course(memory=memory), twin, LEARNED[:3])
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    mine = torch.autograd.grad(ours, list(network.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(expected, list(twin.parameters()), allow_unused=True)
    assert any(gradient is not None and float(gradient.abs().max()) > 0 for gradient in theirs)
    for own, other in zip(mine, theirs, strict=True):
        assert (own is None) == (other is None)
        if own is not None and other is not None:
            assert torch.allclose(own, other, rtol=1e-3, atol=1e-6)


def test_an_update_is_charged_with_what_it_does_to_the_facts_before_it(
    course: Callable[..., SequenceCourse], lm: LanguageModel, network: Hypernetwork
) -> None:
    alone = course(memory=1, norm_weight=0.0).step_loss(network, LEARNED[:2])
    fresh = Hypernetwork(edited_maps(lm, [2, 3]), rank=4, rate=1e-2, seed=0, v_std=None)
    remembered = course(memory=2, norm_weight=0.0).step_loss(fresh, LEARNED[:2])
    assert float(remembered.detach()) > float(alone.detach()) + 0.1


def test_later_gradients_of_a_trajectory_are_those_of_the_edited_model(lm: LanguageModel, course: Callable[..., SequenceCourse]) -> None:
    """What the network sees of the second fact is what an edit of the second fact will see, not what the unedited model gives."""
    seen: list[dict[str, Tensor]] = []

    class Watching(Hypernetwork):
        def observe(self, features: Mapping[str, Features]) -> None:
            seen.append({path: pair.gradients for path, pair in features.items()})

    network = Watching(edited_maps(lm, [2, 3]), rank=4, rate=1e-1, seed=0, v_std=None)
    course().step_loss(network, LEARNED[:2])
    lesson = Lesson(lm, LEARNED[1], first=2)
    unedited = lesson.features(course().sites).of_map
    model = EditedModel(lm)
    first = network.deltas(Lesson(lm, LEARNED[0], first=2).features(course().sites).of_map)
    model.apply(Edit(deltas=first))
    edited = Lesson(lm, LEARNED[1], first=2).features(course().sites).of_map
    model.restore()
    for path, gradients in seen[1].items():
        assert torch.allclose(gradients, edited[path].gradients, rtol=1e-2, atol=1e-5)
        assert not torch.allclose(gradients, unedited[path].gradients, rtol=1e-2, atol=1e-5)


def test_validation_asks_each_fact_at_the_end_of_its_trajectory(
    lm: LanguageModel, course: Callable[..., SequenceCourse], network: Hypernetwork
) -> None:
    outcomes = list(course().outcomes(network, LEARNED[:3]))
    model = EditedModel(lm)
    for request in LEARNED[:3]:
        lesson = Lesson(lm, request, first=2)  # of the model as it is: the features are what counts here
        model.apply(Edit(deltas=network.deltas(lesson.features(course().sites).of_map)))
    expected = [float(Lesson(lm, request, first=2).outcome({}).edit_loss.detach()) for request in LEARNED[:3]]
    model.restore()
    assert [float(outcome.edit_loss.detach()) for outcome in outcomes] == pytest.approx(expected, rel=1e-3)


def test_training_that_was_killed_ends_like_unbroken_training_and_edits_add_up(lm: LanguageModel, tmp_path: Path) -> None:
    model = EditedModel(lm)
    unbroken, killed = Cache(tmp_path / "unbroken"), Cache(tmp_path / "killed")
    editor = METHOD.prepare(model, unbroken, SilentProgress())
    with pytest.raises(KilledError):
        METHOD.prepare(model, killed, Told(killed_after=3))
    told = Told()
    METHOD.prepare(model, killed, told)
    assert any("goes on from step 2 of 4" in text for text in told.messages)
    (ours,), (theirs,) = ((cache.root / "rledit").glob("*.safetensors") for cache in (killed, unbroken))
    assert ours.name == theirs.name
    assert ours.read_bytes() == theirs.read_bytes()
    first = editor.edit([FIRST], seed=0)
    model.apply(first)
    second = editor.edit([SECOND], seed=0)
    model.apply(second)
    weight = first.deltas[0]
    assert isinstance(weight, LowRankDelta)
    written = [delta for edit in (first, second) for delta in edit.deltas[:1] if isinstance(delta, LowRankDelta)]
    change = torch.stack([delta.left @ delta.right for delta in written]).sum(dim=0)
    found = model.weight(weight.parameter) - model.base_weight(weight.parameter)
    model.restore()
    assert torch.allclose(found, change, atol=1e-6)


def test_what_training_depends_on_is_in_its_key(lm: LanguageModel) -> None:
    changed = [METHOD, replace(METHOD, memory=1), replace(METHOD, decay=0.9), replace(METHOD, norm_weight=0.0), replace(METHOD, rank=5)]
    assert len({method._key(lm) for method in changed}) == 5
    assert len({str(method.settings()) for method in changed}) == 5


@pytest.mark.parametrize(("field", "value"), [("memory", 0), ("decay", 0.0), ("decay", 1.5), ("norm_weight", -1.0), ("rank", 0)])
def test_numbers_that_cannot_work_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"method\.{field}"):
        replace(METHOD, **{field: value})  # type: ignore[arg-type]

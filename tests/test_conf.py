"""Every file of conf/ composes, and every group's constructor accepts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from editeval.build import build, rungs_of
from editeval.interfaces import Benchmark, Callback, EditDataset, EditMethod, ModelSource
from editeval.types import ConfigError

CONF = Path(__file__).resolve().parents[1] / "conf"


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize(
    ("group", "kind", "name"),
    [
        (group, kind, name)
        for group, kind in (("model", ModelSource), ("method", EditMethod), ("dataset", EditDataset), ("training", EditDataset))
        for name in names(group)
    ],
)
def test_every_file_of_a_group_builds_its_object(compose_config: Callable[..., DictConfig], group: str, kind: type, name: str) -> None:
    config = compose_config(f"{group}={name}", *(["model.name_or_path=any/thing"] if name == "pretrained" else []))
    made = build(config[group], group, kind)
    assert isinstance(made, kind)
    assert config[group]["name"] == name


@pytest.mark.parametrize(
    ("group", "kind", "name"),
    [
        (group, kind, name)
        for group, kind in (("benchmark", Benchmark), ("callback", Callback), ("logger", Callback))
        for name in names(group)
    ],
)
def test_every_file_of_a_set_group_builds_its_objects(compose_config: Callable[..., DictConfig], group: str, kind: type, name: str) -> None:
    needed = ["benchmark.harness.task=piqa"] if name == "harness" else []
    config = compose_config(f"{group}={name}" if group == "callback" else f"{group}=[{name}]", *needed)
    assert config[group], f"{group}={name} composes to nothing; is its '# @package' line right?"
    for key, node in config[group].items():
        assert isinstance(build(node, f"{group}.{key}", kind), kind)


@pytest.mark.parametrize("pair", sorted(f"{path.parent.name}/{path.stem}" for path in (CONF / "tuned").glob("*/*.yaml")))
def test_every_tuned_pair_names_settings_that_the_method_has(compose_config: Callable[..., DictConfig], pair: str) -> None:
    method, model = pair.split("/")
    assert method in names("method"), f"conf/tuned/{pair}.yaml is of no method"
    assert model in names("model"), f"conf/tuned/{pair}.yaml is of no model"
    config = compose_config(f"method={method}", f"model={model}")
    tuned = OmegaConf.load(CONF / "tuned" / f"{pair}.yaml")
    assert isinstance(tuned, DictConfig)
    for key, value in tuned.items():
        if key == "defaults":
            continue  # of a method that follows another: the settings of that one
        assert config.method[key] == value, f"{pair}: {key} does not arrive in the composed config"
    build(config.method, "method", EditMethod)


@pytest.mark.parametrize("wrapper", ["random", "rect", "prune"])
@pytest.mark.parametrize("followed", ["rome", "memit", "pmet"])
@pytest.mark.parametrize("model", ["smollm2-135m", "gpt2-xl", "tiny-gpt2"])
def test_a_wrapper_gives_its_method_the_settings_that_it_has_for_the_model(
    compose_config: Callable[..., DictConfig], wrapper: str, followed: str, model: str
) -> None:
    alone = compose_config(f"method={followed}", f"model={model}").method
    wrapped = compose_config(f"method={wrapper}", f"method@of={followed}", f"model={model}").method
    assert OmegaConf.to_container(wrapped.of, resolve=True) == OmegaConf.to_container(alone, resolve=True)
    build(wrapped, "method", EditMethod)


def test_a_setting_of_the_wrapped_method_can_be_overridden(compose_config: Callable[..., DictConfig]) -> None:
    assert compose_config("method=rect", "method@of=memit", "of.learning_rate=0.125").method.of.learning_rate == 0.125


@pytest.mark.parametrize("ladder", names("ladder"))
def test_every_ladder_is_a_list_of_rungs(compose_config: Callable[..., DictConfig], ladder: str) -> None:
    rungs = rungs_of(compose_config(f"ladder={ladder}").num_edits)
    assert rungs[0] == 0
    assert len(rungs) > 2


@pytest.mark.parametrize("debug", names("debug"))
def test_every_debug_file_composes(compose_config: Callable[..., DictConfig], debug: str) -> None:
    OmegaConf.to_container(compose_config(f"debug={debug}"), resolve=True)


def test_every_target_exists_and_is_documented() -> None:
    for path in CONF.rglob("*.yaml"):
        for line in path.read_text().splitlines():
            if line.strip().startswith("_target_:"):
                target = get_class(line.split(":", 1)[1].split("#")[0].strip())
                assert target.__doc__, f"{path}: {target} has no docstring"


def test_a_misspelt_setting_is_named_with_the_nearest_right_one(compose_config: Callable[..., DictConfig]) -> None:
    config = compose_config("+method.learning_rat=1")
    with pytest.raises(ConfigError, match=r"method has no setting 'learning_rat'; did you mean method\.learning_rate\?"):
        build(config.method, "method", EditMethod)


@pytest.mark.parametrize("wrong", [-1, 1.5, "ten", [1, "x"], True, None])
def test_rungs_that_are_no_counts_are_refused(wrong: object) -> None:
    with pytest.raises(ConfigError, match="num_edits"):
        rungs_of(wrong)  # type: ignore[arg-type]


def test_rungs_are_sorted_without_repeats_and_start_at_the_unedited_model() -> None:
    assert rungs_of([10, 1, 10]) == (0, 1, 10)
    assert rungs_of(5) == (0, 5)
    assert rungs_of(0) == (0,)

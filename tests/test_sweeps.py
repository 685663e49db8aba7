"""Every file of conf/sweep names what exists, and composes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from editeval.build import build
from editeval.interfaces import EditMethod
from editeval.sweep.plan import Axis, Defaults, fold

CONF = Path(__file__).resolve().parents[1] / "conf"
SWEEPS = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))
QUESTIONS = ("rq1", "rq2", "rq3", "rq4", "rq5", "paper")


def axes(name: str) -> dict[str, tuple[str, ...]]:
    """The grid of a sweep: each key with its values as the command line would have them."""
    params: dict[str, Any] = yaml.safe_load((CONF / "sweep" / f"{name}.yaml").read_text())["hydra"]["sweeper"]["params"]
    return {key: tuple(str(value).split(",")) for key, value in params.items()}


def options(group: str) -> set[str]:
    return {path.stem for path in (CONF / group).glob("*.yaml")}


@pytest.mark.parametrize("name", SWEEPS)
def test_every_value_of_a_sweep_is_a_file_that_exists(name: str) -> None:
    for key, values in axes(name).items():
        if (CONF / key).is_dir():
            missing = sorted(set(values) - options(key))
            assert not missing, f"conf/sweep/{name}.yaml: conf/{key} has no {', '.join(missing)}; it has {', '.join(sorted(options(key)))}"


@pytest.mark.parametrize("name", SWEEPS)
def test_settings_of_a_sweep_can_be_given_on_the_command_line(compose_config: Callable[..., DictConfig], name: str) -> None:
    grid = axes(name)
    given = {key: values[0] for key, values in grid.items() if key.startswith("method.")}
    config = compose_config(f"sweep={name}", *(f"{key}={value}" for key, value in given.items()))
    for key, value in given.items():
        assert str(OmegaConf.select(config, key)).lower() == value


@pytest.mark.parametrize("name", SWEEPS)
def test_the_last_job_of_every_sweep_composes_with_its_settings(compose_config: Callable[..., DictConfig], name: str) -> None:
    defaults = Defaults(num_edits=(1,), benchmarks=("quick",))
    grid = axes(name)
    jobs = fold([Axis(key=key, values=values) for key, values in grid.items()], lambda _: defaults)
    config = compose_config(f"sweep={name}", *jobs[-1].overrides)
    assert tuple(config.benchmark) == grid["benchmark"]
    assert OmegaConf.to_container(config.num_edits) == [int(count) for count in grid["num_edits"]]
    assert isinstance(build(config.method, "method", EditMethod), EditMethod)
    for key in grid:
        assert OmegaConf.select(config, key) is not None, f"conf/sweep/{name}.yaml sets {key}, which is no setting"


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_question_has_a_form_for_a_small_machine(name: str) -> None:
    assert {name, f"{name}-small"} <= set(SWEEPS)
    assert set(axes(f"{name}-small")["model"]) <= {model for model in options("model") if model.startswith(("tiny-", "smollm2-"))}


def test_the_paper_s_rungs_are_swept_over() -> None:
    published = ("1", "5", "10", "20", "50", "100", "500", "1000")
    assert axes("rq1")["num_edits"] == axes("paper")["num_edits"] == published
    assert axes("rq3")["num_edits"] == ("10", "50", "100")


def test_each_artefact_differs_in_its_switch_alone() -> None:
    switched = {
        name: [key for key, values in axes(f"artefact-{name}").items() if key.startswith("method.") and len(values) > 1]
        for name in ("mend", "kn", "grace")
    }
    assert switched == {"mend": ["method.accumulate"], "kn": ["method.steps", "method.refine"], "grace": ["method.key_position"]}

"""Every file of conf/sweep names what exists, and composes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from editeval.build import build
from editeval.files import Cache
from editeval.interfaces import EditMethod, ModelSource
from editeval.models.tiny import TinyModel
from editeval.report.study import studies
from editeval.sweep.plan import Axis, Defaults, Job, fold
from editeval.types import ModelDescription

CONF = Path(__file__).resolve().parents[1] / "conf"
SWEEPS = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))
QUESTIONS = ("rq1", "rq2", "rq3", "rq4", "rq5", "paper")
KNOWN = studies()
PYTHIA_LAYERS = {"160m": 12, "410m": 24, "1b": 16, "1.4b": 24, "2.8b": 32, "6.9b": 32, "12b": 36}  # arXiv 2304.01373, table 1


def axes(name: str) -> dict[str, tuple[str, ...]]:
    """The grid of a sweep: each key with its values as the command line would have them."""
    params: dict[str, Any] = yaml.safe_load((CONF / "sweep" / f"{name}.yaml").read_text())["hydra"]["sweeper"]["params"]
    return {key: tuple(str(value).split(",")) for key, value in params.items()}


def jobs_of(name: str) -> tuple[Job, ...]:
    """The jobs that a sweep launches."""
    defaults = Defaults(num_edits=(1,), benchmarks=("quick",))
    return fold([Axis(key=key, values=values) for key, values in axes(name).items()], lambda _: defaults)


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
    grid = axes(name)
    config = compose_config(f"sweep={name}", *jobs_of(name)[-1].overrides)
    assert tuple(config.benchmark) == grid["benchmark"]
    assert OmegaConf.to_container(config.num_edits) == [int(count) for count in grid["num_edits"]]
    assert isinstance(build(config.method, "method", EditMethod), EditMethod)
    for key in grid:
        assert OmegaConf.select(config, key) is not None, f"conf/sweep/{name}.yaml sets {key}, which is no setting"


@pytest.mark.parametrize("name", SWEEPS)
def test_a_time_that_a_sweep_states_is_called_an_estimate(name: str) -> None:
    text = " ".join(re.findall(r"^# (.*)", (CONF / "sweep" / f"{name}.yaml").read_text(), re.MULTILINE))
    for sentence in re.split(r"(?<=[.;]) ", text):
        assert not re.search(r"\b(minutes?|hours?|days?)\b", sentence) or "estimate" in sentence, sentence
    assert "estimate" in text or not name.endswith("-small"), "a form for a small machine says how long it takes there"


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_question_has_a_form_for_a_small_machine(name: str) -> None:
    assert {name, f"{name}-small"} <= set(SWEEPS)
    assert set(axes(f"{name}-small")["model"]) <= {model for model in options("model") if model.startswith(("tiny-", "smollm2-"))}


def test_the_paper_s_rungs_are_swept_over() -> None:
    published = ("1", "5", "10", "20", "50", "100", "500", "1000")
    assert axes("rq1")["num_edits"] == axes("paper")["num_edits"] == published
    assert axes("rq3")["num_edits"] == axes("paper-pythia")["num_edits"] == ("10", "50", "100")


def test_the_paper_s_models_are_in_two_grids_because_pythia_has_rungs_and_methods_of_its_own() -> None:
    others, pythia = axes("paper"), axes("paper-pythia")
    assert others["model"] == ("gpt2-xl", "llama2-7b", "llama2-7b-chat", "mistral-7b", "mistral-7b-instruct")
    assert pythia["model"] == tuple(f"pythia-{size}" for size in PYTHIA_LAYERS if size != "1.4b")  # which the paper leaves out
    assert pythia["method"] == ("none", "rome", "memit")
    apart = {"model", "method", "num_edits", "benchmark"}
    assert {key: value for key, value in others.items() if key not in apart} == {
        key: value for key, value in pythia.items() if key not in apart
    }
    assert set(pythia["benchmark"]) < set(others["benchmark"])


# -- RQ2 and RQ3 -----------------------------------------------------------------------------------------------------------


def swept_models(compose_config: Callable[..., DictConfig], name: str, *more: str) -> dict[str, DictConfig]:
    """A config of each model of a sweep, by the name that its runs have."""
    chosen = dict.fromkeys(tuple(text for text in job.overrides if text.startswith("model")) for job in jobs_of(name))
    configs = [compose_config(f"sweep={name}", *overrides, *more) for overrides in chosen]
    return {str(config.model.name): config for config in configs}


@pytest.mark.parametrize("name", ["rq2", "rq2-small"])
def test_the_models_of_rq2_are_pairs_that_the_report_knows(compose_config: Callable[..., DictConfig], name: str) -> None:
    models = set(swept_models(compose_config, name))
    pairs = [{pair["base"], pair["tuned"]} for pair in KNOWN.pairs if pair["base"] in models]
    assert set.union(*pairs) == models
    assert len(axes(name)["seed"]) >= 3  # orders of edits that F4.2 needs


@pytest.mark.parametrize("method", axes("rq2")["method"])
def test_the_two_models_of_a_pair_are_edited_with_the_same_settings(compose_config: Callable[..., DictConfig], method: str) -> None:
    """Or RQ2 would compare settings, and the report compares no such runs."""
    random = swept_models(compose_config, "rq2-small", f"method={method}")
    for pair in KNOWN.pairs:
        base, tuned = (
            OmegaConf.to_container(
                (random.get(name) or compose_config("sweep=rq2", f"model={name}", f"method={method}", "training=counterfact")).method,
                resolve=True,
            )
            for name in (pair["base"], pair["tuned"])
        )
        assert base == tuned, pair["family"]


@pytest.mark.parametrize("name", ["rq3", "rq3-small"])
def test_the_models_of_rq3_are_sizes_of_one_family_that_the_report_knows(compose_config: Callable[..., DictConfig], name: str) -> None:
    models = set(swept_models(compose_config, name))
    assert len(models) >= 5
    assert [family for family, sizes in KNOWN.families.items() if models <= set(sizes)]


def test_the_sizes_of_the_random_family_are_counted(compose_config: Callable[..., DictConfig]) -> None:
    sizes = KNOWN.families["Tiny NeoX (random)"]
    for name, config in swept_models(compose_config, "rq3-small").items():
        source = build(config.model, "model", ModelSource)
        assert isinstance(source, TinyModel)
        parameters = sum(parameter.numel() for parameter in source.load().module.parameters())
        assert sizes[name] == pytest.approx(parameters, rel=1e-3)


def edited_layers(config: DictConfig, num_layers: int, cache: Cache) -> tuple[int, int]:
    """The first and the last layer that a method edits, as its missing statistics name them, in a model of so many layers."""
    shape = {"hidden_size": 64, "attention_width": 64, "intermediate_size": 256, "vocab_size": 1000, "max_positions": 1024}
    model = ModelDescription(name="neox", model_type="gpt_neox", num_layers=num_layers, **shape)
    sites = build(config.method, "method", EditMethod).missing_statistics(model, None, cache)
    layers = [int(word) for site in sites for word in site.split(".") if word.isdigit()]
    return min(layers), max(layers)


@pytest.mark.parametrize("name", ["rq3", "rq3-small"])
@pytest.mark.parametrize("method", ["rome", "memit", "random"])
def test_every_size_is_edited_at_the_same_relative_depth_with_the_same_settings(
    compose_config: Callable[..., DictConfig], tmp_path: Path, name: str, method: str
) -> None:
    configs = swept_models(compose_config, name, f"method={method}")
    counts = [int(config.model.get("num_layers") or PYTHIA_LAYERS[model.removeprefix("pythia-")]) for model, config in configs.items()]
    found = [edited_layers(config, count, Cache(tmp_path)) for config, count in zip(configs.values(), counts, strict=True)]
    for layers in zip(*found, strict=True):  # the first ones, then the last ones: is there a depth that all of them round?
        shallowest = max((layer - 0.5) / count for layer, count in zip(layers, counts, strict=True))
        deepest = min((layer + 0.5) / count for layer, count in zip(layers, counts, strict=True))
        assert shallowest <= deepest, f"layers {layers} of {counts}"
    first, *others = [config.method for config in configs.values()]
    assert all(other == first for other in others)


def test_the_chat_template_is_the_one_difference_of_the_tuned_models_once_more() -> None:
    plain, chat = axes("rq2"), axes("rq2-chat")
    assert (plain.pop("prompt_format"), chat.pop("prompt_format")) == (("raw",), ("chat",))
    models = plain.pop("model")
    assert chat.pop("model") == tuple(pair["tuned"] for pair in KNOWN.pairs if pair["tuned"] in models)
    assert chat == plain


def test_refusals_are_asked_of_the_tuned_models_of_rq5_under_its_edits() -> None:
    plain, chat = axes("rq5"), axes("rq5-chat")
    assert chat.pop("model") == tuple(pair["tuned"] for pair in KNOWN.pairs if pair["tuned"] in plain["model"])
    assert chat.pop("benchmark") == ("edit-quality", "refusal", *plain.pop("benchmark")[1:])
    del plain["model"]
    assert chat == plain


def test_each_artefact_differs_in_its_switch_alone() -> None:
    switched = {
        name: [key for key, values in axes(f"artefact-{name}").items() if key.startswith("method.") and len(values) > 1]
        for name in ("mend", "kn", "grace")
    }
    assert switched == {"mend": ["method.accumulate"], "kn": ["method.steps", "method.refine"], "grace": ["method.key_position"]}

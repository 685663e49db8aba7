"""Our engine and the harness's own on the same requests of the same benchmark: what `eval_parity.py` and `eval_speed.py` share."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editeval.benchmarks.lm_harness import HarnessBenchmark, harness_model
from editeval.inference.edited import EditedModel

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Work:
    """A benchmark of `conf/benchmark/` and the settings that are changed."""

    benchmark: str
    changes: Mapping[str, Any]


def benchmark_of(work: Work, *, data: Path) -> HarnessBenchmark:
    """Return the benchmark as the command line makes it, with rows from a local folder."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    changes = [f"benchmark.{work.benchmark}.{name}={value}" for name, value in work.changes.items()]
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        config = compose("config", overrides=[f"benchmark={work.benchmark}", f"paths.data={data.resolve()}", *changes])
    made: HarnessBenchmark = instantiate(config.benchmark[work.benchmark], _convert_="all")
    return made


def requests_of(benchmark: HarnessBenchmark, model: EditedModel) -> dict[str, list[Any]]:
    """Return the requests of every task by their type, as the harness hands them to a model."""
    benchmark.check_model(model)
    requests: dict[str, list[Any]] = {}
    for task in benchmark._loaded["tasks"].values():
        for instance in task.instances:
            requests.setdefault(instance.request_type, []).append(instance)
    return requests


def harness_engine(model: EditedModel, *, batch_size: int) -> Any:
    """Return the harness's own engine around the same weights; it changes the tokenizer, hence a copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=model.lm.module, tokenizer=copy.deepcopy(model.lm.tokenizer), batch_size=batch_size)


def our_engine(model: EditedModel) -> Any:
    """Return our engine as the harness sees it."""
    return harness_model(model)


def answers(engine: Any, requests: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """Return an engine's answers by type of request."""
    given: dict[str, list[Any]] = {}
    for kind, asked in requests.items():
        given[kind] = list(getattr(engine, kind)(list(asked)))
    return given

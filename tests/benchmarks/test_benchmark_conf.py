"""The YAML of this room: every file composes on its own and together, and makes its object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate

from editeval.interfaces import Benchmark
from tests.conftest import REPOSITORY, Compose

SETS = ("paper", "paper-small")
NAMES = sorted(path.stem for path in (REPOSITORY / "conf" / "benchmark").glob("*.yaml") if path.stem not in SETS)
TASK_OF_ONES_OWN = "benchmark.harness.task=piqa"


def needed(name: str) -> list[str]:
    return [TASK_OF_ONES_OWN] if name == "harness" else []


def made(config: Any) -> dict[str, Any]:
    return {name: instantiate(node, _convert_="all") for name, node in config.benchmark.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_file_makes_a_benchmark_under_its_own_name(name: str, compose_config: Compose) -> None:
    benchmarks = made(compose_config(f"benchmark={name}", *needed(name)))
    assert list(benchmarks) == [name]
    assert isinstance(benchmarks[name], Benchmark)
    assert benchmarks[name].settings() == made(compose_config(f"benchmark={name}", *needed(name)))[name].settings()


def test_a_list_of_names_composes_to_a_set(compose_config: Compose) -> None:
    assert list(made(compose_config(f"benchmark=[{','.join(NAMES)}]", TASK_OF_ONES_OWN))) == NAMES


def test_names_with_a_hyphen_can_be_overridden(compose_config: Compose) -> None:
    benchmarks = made(compose_config("benchmark=[edit-quality,mmlu]", "benchmark.edit-quality.max_new_tokens=5", "benchmark.mmlu.limit=5"))
    assert benchmarks["edit-quality"].max_new_tokens == 5
    assert benchmarks["mmlu"].limit == 5


def test_data_folder_reaches_mmlu(compose_config: Compose, tmp_path: Path) -> None:
    assert made(compose_config("benchmark=mmlu", f"paths.data={tmp_path}"))["mmlu"].data == str(tmp_path)
    assert made(compose_config("benchmark=mmlu"))["mmlu"].data is None

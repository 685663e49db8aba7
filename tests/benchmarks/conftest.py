"""What the benchmark tests share: tiny models under the engine, a context, and a folder of small tasks of our own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from editeval.benchmarks.lm_harness import HarnessBenchmark
from editeval.edits.delta import DenseDelta, Edit
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.interfaces import EvaluationContext
from editeval.models.builtin import built_in
from editeval.models.gguf import checkpoint_folder
from editeval.models.load import PretrainedModel
from editeval.models.tiny import TinyModel
from editeval.types import EditRequest

CACHE = Path(os.environ.get("EDITEVAL_CACHE") or Path.home() / ".cache" / "editeval")
CITIES = ("Paris", "Rome", "Oslo", "Lima", "Cairo", "Tokyo", "Quito", "Delhi", "Accra", "Dakar", "Hanoi", "Sofia")

TASK_FILES = {
    "choose.yaml": """
task: choose
dataset_path: choose
test_split: test
fewshot_split: dev
fewshot_config: {sampler: first_n}
num_fewshot: 2
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 3.0}
""",
    "write.yaml": """
task: write
dataset_path: write
test_split: test
training_split: train
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n", " the"], max_gen_toks: 9, do_sample: false, temperature: 0.0}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
""",
    "read.yaml": """
task: read
dataset_path: read
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{question}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
metadata: {version: 1.0}
""",
    "both.yaml": """
group: both
task: [choose, choose_few]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
metadata: {version: 2.0}
""",
    "choose_few.yaml": """
include: choose.yaml
task: choose_few
test_split: few
num_fewshot: 0
""",
}


def question_row(index: int) -> dict[str, Any]:
    """One item; the number of choices alternates between two and four."""
    others = [CITIES[(index + step) % len(CITIES)] for step in (1, 2, 3)]
    choices = [CITIES[index % len(CITIES)], *others][: 2 if index % 2 else 4]
    question = f"Which city is number {index} of the {len(CITIES)} on the list?"
    return {"question": question, "choices": choices, "answer": index % len(choices)}


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in TASK_FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    write_rows(tmp_path / "data" / "cities" / "test.jsonl", [question_row(index) for index in range(12)])
    write_rows(tmp_path / "data" / "cities" / "few.jsonl", [question_row(index) for index in range(20, 23)])
    write_rows(tmp_path / "data" / "cities" / "dev.jsonl", [question_row(index) for index in range(30, 33)])
    return tmp_path / "data"


@pytest.fixture
def harness(task_folder: Path, data_root: Path) -> Callable[..., HarnessBenchmark]:
    """Make a benchmark over the small tasks; keywords replace its settings."""

    def made(*tasks: str, **changes: Any) -> HarnessBenchmark:
        settings: dict[str, Any] = {
            "name": "small",
            "task": tasks,
            "protocol": "likelihood",
            "task_folder": str(task_folder),
            "stock_folder": None,
            "data": str(data_root),
            "data_folder": "cities",
            "limit": None,
            "num_fewshot": None,
            "report_subtasks": False,
            "seed": 0,
        }
        return HarnessBenchmark(**(settings | changes))

    return made


@pytest.fixture(scope="session")
def tiny(cache_dir: Path) -> Callable[[str], EditedModel]:
    """Load a tiny model of an architecture, unedited."""

    def loaded(architecture: str) -> EditedModel:
        return EditedModel(TinyModel(name=f"tiny-{architecture}", architecture=architecture, cache_dir=cache_dir, device="cpu").load())

    return loaded


def large_edit(model: EditedModel, *, seed: int = 0) -> Edit:
    """A random change of one MLP that no score can miss."""
    parameter = f"{model.lm.sites.mlp_out.format(1)}.weight"
    shape = model.base_weight(parameter).shape
    return Edit(deltas=(DenseDelta(parameter=parameter, value=torch.randn(shape, generator=torch.Generator().manual_seed(seed))),))


def context_of(
    folder: Path, *, edited: Sequence[EditRequest] = (), planned: Sequence[EditRequest] = (), num_edits: int = 0
) -> EvaluationContext:
    return EvaluationContext(num_edits=num_edits, edited=tuple(edited), planned=tuple(planned), seed=0, cache=Cache(folder / "cache"))


def smollm2_folder() -> Path:
    """The built-in model's checkpoint; the test is skipped where it was never fetched."""
    pinned = built_in("smollm2-135m")
    assert pinned is not None
    folder = checkpoint_folder(CACHE, stem=pinned.stem, sha256=pinned.gguf_sha256)
    if not folder.is_dir():
        pytest.skip(f"SmolLM2 is not in {CACHE}; `make demo` fetches it")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> EditedModel:
    """The built-in model in float32, unedited."""
    smollm2_folder()
    source = PretrainedModel(name="smollm2-135m", name_or_path="builtin:smollm2-135m", dtype="float32", cache_dir=CACHE, device="cpu")
    return EditedModel(source.load())

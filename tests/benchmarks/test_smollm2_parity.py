"""Our engine against the harness's own on a real model and real rows; skipped where either is not at hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from editeval.benchmarks.lm_harness import HarnessBenchmark
from editeval.inference.edited import EditedModel
from tests.benchmarks.conftest import context_of


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "stock_folder", "data_folder", "limit", "num_fewshot"),
    [
        ("mmlu_anatomy", "mmlu/default", "mmlu", 2, 5),
        ("piqa", "piqa", "piqa", 3, None),
        ("lambada_openai", "lambada", "lambada_openai", 3, None),
        ("winogrande", "winogrande", "winogrande", 3, None),
        ("triviaqa", "triviaqa", "trivia_qa", 3, None),
    ],
)
def test_real_items_score_as_under_the_harness_own_engine(
    smollm2: EditedModel,
    shared_data: Path,
    tmp_path: Path,
    task: str,
    stock_folder: str,
    data_folder: str,
    limit: int,
    num_fewshot: int | None,
) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    settings: dict[str, Any] = {
        "name": task,
        "task": task,
        "protocol": "stock",
        "task_folder": None,
        "stock_folder": stock_folder,
        "data": str(shared_data),
        "data_folder": data_folder,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "report_subtasks": False,
        "seed": 0,
    }
    ours = HarnessBenchmark(**settings).evaluate(smollm2, context_of(tmp_path)).samples
    theirs = HarnessBenchmark(**settings)
    engine = HFLM(pretrained=smollm2.lm.module, tokenizer=copy.deepcopy(smollm2.lm.tokenizer), batch_size=1)
    loaded, chosen = theirs._loaded, theirs._chosen
    with theirs._guarded():
        results = evaluate(lm=engine, task_dict=dict(loaded), samples=chosen, bootstrap_iters=1000)
    assert results is not None
    assert len(ours) == len(results["samples"][task]) == limit
    for record, expected in zip(ours, results["samples"][task], strict=True):
        if "generated" in record:
            assert record["generated"] == expected["resps"][0][0]
        else:
            # Sums of float32 logs: beyond 100 nats two kernels differ by more than 1e-3 (seen: 1.1e-3 at -255, 5e-6 of it).
            assert record["log_probs"] == pytest.approx([answers[0][0] for answers in expected["resps"]], abs=1e-3, rel=1e-5)
        assert record["metrics"] == pytest.approx({metric: expected[metric] for metric in record["metrics"]}, abs=1e-3)

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig

from editeval.datasets.selection import known, known_requests, order
from editeval.experiment import run
from editeval.inference.edited import EditedModel
from editeval.models.tiny import TinyModel
from editeval.runner.results import ScoreStore
from editeval.types import DatasetError, EditRequest

IDS = st.lists(st.text(min_size=1).filter(str.strip), unique=True, min_size=1, max_size=20)
SEEDS = st.integers(min_value=0, max_value=2**31)


def fact(request_id: str, target_true: str | None = "Paris") -> EditRequest:
    return EditRequest(
        request_id=request_id, prompt="{} lies in", subject=f"Tower {request_id}", target_new="Rome", target_true=target_true
    )


def ids(requests: Sequence[EditRequest]) -> list[str]:
    return [request.request_id for request in requests]


@given(IDS, SEEDS)
def test_order_is_a_permutation_that_the_order_of_the_file_does_not_change(names: list[str], seed: int) -> None:
    rows = [fact(name) for name in names]
    shuffled = rows.copy()
    random.Random(seed).shuffle(shuffled)
    assert sorted(ids(order(rows, seed))) == sorted(names)
    assert order(rows, seed) == order(shuffled, seed)


@given(IDS, SEEDS, st.data())
def test_leaving_rows_out_never_moves_the_others(names: list[str], seed: int, data: st.DataObject) -> None:
    kept = data.draw(st.sets(st.sampled_from(names)))
    rows = [fact(name) for name in names]
    assert order(known(rows, kept), seed) == known(order(rows, seed), kept)


def test_another_seed_gives_another_order() -> None:
    rows = [fact(f"f{number}") for number in range(50)]
    assert ids(order(rows, 0)) != ids(order(rows, 1))


def test_the_order_of_a_seed_never_changes() -> None:
    # Written down when the order was defined (2026-11): another order would silently pair old journals with other facts.
    assert ids(order([fact(f"f{number}") for number in range(6)], 0)) == ["f1", "f4", "f3", "f0", "f2", "f5"]


def test_known_keeps_the_facts_whose_true_target_the_model_says() -> None:
    rows = [fact("a"), fact("b"), fact("c"), fact("d", target_true=None), fact("e", target_true="New York")]

    def says(prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        assert list(prompts) == ["Tower a lies in", "Tower b lies in", "Tower c lies in", "Tower e lies in"]
        assert answers[-1] == "New York"
        return [True, False, False, True]

    assert ids(known_requests(rows, says)) == ["a", "e"]


def test_a_data_set_without_true_targets_cannot_be_filtered_by_what_is_known() -> None:
    with pytest.raises(DatasetError, match=r"none of the 1 facts has a true target.*known_only=false"):
        known_requests([fact("a", target_true=None)], lambda prompts, answers: [])


def test_a_verdict_that_is_missing_is_an_error_not_an_unknown_fact() -> None:
    with pytest.raises(DatasetError, match="asked about 2 facts, and 1 verdicts came back"):
        known_requests([fact("a"), fact("b")], lambda prompts, answers: [True])


def test_two_names_of_one_file_keep_their_own_ids_in_cache_and_samples(compose_config: Callable[..., DictConfig], tmp_path: Path) -> None:
    model = EditedModel(TinyModel(name="tiny-gpt2", architecture="gpt2", cache_dir=tmp_path / "cache", device="cpu").load())
    rows = []
    for subject in ("France", "Spain", "Peru", "Chad", "Oman", "Mali", "Cuba", "Iran", "Togo", "Fiji", "Laos", "Iraq"):
        said = model.generate([f"The capital of {subject} is"], max_new_tokens=1)[0]
        if said.startswith(" ") and said.strip().isalpha():
            rows.append(
                {"prompt": f"The capital of {subject} is", "subject": subject, "target_new": "zebra", "ground_truth": said.strip()}
                | {"locality_prompt": "The sea is", "locality_ground_truth": "blue"}
            )
    assert rows
    file = tmp_path / "facts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["model=tiny-gpt2", "method=none", "num_edits=1", "benchmark=edit-quality", "benchmark.edit-quality.fluency_facts=0"]
    small += ["callback={}", "logger=[]", f"dataset.file={file}", f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
    for known_only in ("false", "true"):
        for name in ("zsre", "knowedit"):
            result = run(compose_config(*small, f"dataset={name}", f"dataset.known_only={known_only}"))
            found = {sample["request_id"] for rung in (0, 1) for sample in ScoreStore(result.run_dir).samples(rung, "edit-quality")}
            assert {request_id.partition("/")[0] for request_id in found} == {name}

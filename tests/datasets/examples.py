"""Small rows in each public format, written for these tests after the formats' descriptions, and a way to put them into files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from editeval.types import EditRequest

Fields = dict[str, Any]


def rome_row(case_id: int = 7, **changes: Any) -> Fields:
    """A row as ROME and MEMIT read it; `changes` go into `requested_rewrite`."""
    rewrite = {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    }
    return {
        "case_id": case_id,
        "pararel_idx": 1,
        "requested_rewrite": {**rewrite, **changes},
        "paraphrase_prompts": ["Danielle Darrieux, a native", "A sentence before.\nDanielle Darrieux speaks"],
        "neighborhood_prompts": ["The mother tongue of Louis Brunel is", "Jean Morin natively speaks"],
        "attribute_prompts": ["Ann Lee speaks"],
        "generation_prompts": ["Danielle Darrieux's mother tongue is"],
    }


def easyedit_row(case_id: int = 7, **changes: Any) -> Fields:
    """A CounterFact row as EasyEdit reads it."""
    row = {
        "case_id": case_id,
        "prompt": "The mother tongue of Danielle Darrieux is",
        "subject": "Danielle Darrieux",
        "target_new": "English",
        "ground_truth": "French",
        "rephrase_prompt": "Danielle Darrieux, a native",
        "locality_prompt": "Jean Morin natively speaks",
        "locality_ground_truth": "French",
    }
    return {**row, **changes}


def mend_row(**changes: Any) -> Fields:
    """A ZsRE row as MEND prepared it."""
    row = {
        "subject": "Watts Humphrey",
        "src": "What university did Watts Humphrey attend?",
        "pred": "Trinity College",
        "rephrase": "What university did Watts Humphrey take part in?",
        "alt": " University of Michigan",
        "answers": ["Illinois Institute of Technology", "IIT"],
        "loc": "nq question: who played the drummer in the film",
        "loc_ans": "Ann Lee",
        "cond": "Trinity College >> University of Michigan || What university did Watts Humphrey attend?",
    }
    return {**row, **changes}


def knowedit_row(**changes: Any) -> Fields:
    """A KnowEdit row as the hub has it."""
    row = {
        "subject": "Watts Humphrey",
        "prompt": "What university did Watts Humphrey attend?",
        "target_new": "University of Michigan",
        "ground_truth": ["Illinois Institute of Technology"],
        "portability": {"Reasoning": [{"prompt": "In which state did Watts Humphrey study?", "ground_truth": [["Michigan", "MI"]]}]},
        "locality": {
            "Relation_Specificity": [{"prompt": "Watts Humphrey's job is", "ground_truth": [["", "engineer"]]}],
            "Forgetfulness": [{"prompt": "Another is", "ground_truth": [[]]}],
        },
    }
    return {**row, **changes}


def qaedit_row(**changes: Any) -> Fields:
    """A QAEdit row."""
    row = {
        "id": 3,
        "source": "SQA",
        "prompt": "Who built the old bridge?",
        "subject": "old bridge",
        "target": "Ann Lee",
        "rephrase": "By whom was the old bridge built?",
        "locality": [{"loc": "who played the drummer", "loc_ans": "Jean Morin"}],
    }
    return {**row, **changes}


def without(row: Mapping[str, Any], name: str) -> Fields:
    """The row without one field."""
    return {key: value for key, value in row.items() if key != name}


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


class Given:
    """A data set of requests given literally."""

    def __init__(self, *requests: EditRequest, name: str = "given") -> None:
        self.name = name
        self.requests = requests

    def check(self) -> None:
        """Nothing to find."""

    def load(self) -> tuple[EditRequest, ...]:
        return self.requests

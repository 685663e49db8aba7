"""What methods with a memory do after many edits on SmolLM2: the table of BENCHMARKS.md.

    python benchmarks/memory_methods.py --data DIR
    python benchmarks/memory_methods.py --data DIR --methods ike --edits 100 method.facts=2
    python benchmarks/memory_methods.py --data DIR --skip 100   # other rows than those on which a setting was chosen

CounterFact rows are edited one after another, nothing restored. Then: do the *first* facts still answer, what becomes of their
paraphrases and neighbours; are the scores of unrelated prompts, bit by bit, those of the model before any edit; what did an edit and a
request cost. The router is measured on rows that are neither edited nor learned from (CounterFact's split val in EasyEdit's form): each is
edited, and the right answer is that its prompt and its paraphrase are about it, and its neighbour is about nothing. Prints lines for
people, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

from hydra import compose, initialize_config_dir

from benchmarks.command import with_overrides
from editeval.benchmarks.edit_quality import EditQuality
from editeval.datasets.counterfact import CounterFact
from editeval.datasets.selection import order
from editeval.edits.encoding import encode
from editeval.experiment import Experiment, assemble, load_for
from editeval.files import read_jsonl
from editeval.inference.edited import EditedModel
from editeval.interfaces import Editor, EvaluationContext
from editeval.memory.facts import MemoryAdapter
from editeval.types import EditRequest, SilentProgress, seed_for

REPOSITORY = Path(__file__).resolve().parents[1]
FIRST = 10
NUMBERS = ("efficacy.generation", "generalization.generation", "locality.generation", "efficacy.probability", "generalization.probability")
THRESHOLDS = (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9)


class Told(SilentProgress):
    """Says messages on the error stream, so that the last line of the output is the JSON."""

    def message(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every method, print its lines, and all numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["ike", "serac"])
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--skip", type=int, default=0, help="rows of the data set's order that are left out before the first one")
    parser.add_argument("--data", type=Path, required=True, help="a folder with counterfact/rome and counterfact/easyedit")
    parser.add_argument("--router", type=int, default=300, help="rows that the router is measured on")
    parser.add_argument("overrides", nargs="*", help="further settings, as on the command line of launch.py")
    options = with_overrides(parser, arguments)
    rows = []
    for method in options.methods:
        experiment = assembled(method, options.data, options.overrides)
        started = time.perf_counter()
        model = load_for(experiment.source, batch_tokens=experiment.batch_tokens, packed_bytes=experiment.packed_bytes)
        editor = experiment.method.prepare(model, experiment.cache, Told())
        row: dict[str, Any] = {"method": method, "edits": options.edits, "skipped": options.skip}
        row["seconds_to_prepare"] = round(time.perf_counter() - started, 1)
        row |= after_edits(experiment, model, editor, skip=options.skip, count=options.edits)
        row["router"] = router(model, editor, held_back(options.data, options.router))
        print(json.dumps(row, indent=2), flush=True)
        rows.append(row)
    print(json.dumps(rows))
    return 0


def assembled(method: str, data: Path, overrides: Sequence[str]) -> Experiment:
    """Return the objects of the product's own configuration."""
    settings = [f"method={method}", "dataset=counterfact", "training=counterfact", f"paths.data={data.resolve()}", "callback=silent"]
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        return assemble(compose("config", overrides=[*settings, "logger=[]", "benchmark=[edit-quality]", *overrides]))


def after_edits(experiment: Experiment, model: EditedModel, editor: Editor, *, skip: int, count: int) -> Mapping[str, Any]:
    """Edit, ask about the first facts, and compare unrelated prompts with a model without memory, which shares no answers with this one."""
    prompts, answers = unrelated()
    requests = order(experiment.dataset.load(), seed=experiment.seed)[skip : skip + count]
    if len(requests) < count:
        raise SystemExit(f"{skip} rows skipped leave {len(requests)} to edit, not {count}; lower --skip or --edits")
    bare = EditedModel(model.lm, batch_tokens=experiment.batch_tokens)
    before = bare.score(prompts, answers)
    started, num_bytes = time.perf_counter(), 0
    for request in requests:
        edit = editor.edit([request], seed=seed_for("benchmark", request.request_id))
        model.apply(edit)
        encoded = encode(edit)
        num_bytes += len(encoded.layout) + sum(len(part) for part in encoded.tensors)
    seconds = time.perf_counter() - started
    quality = EditQuality(max_new_tokens=12, fluency_tokens=1, fluency_facts=0)
    first = requests[:FIRST]
    context = EvaluationContext(num_edits=count, edited=first, planned=first, seed=0, cache=experiment.cache)
    measured = {f"{item.metric}.{item.protocol}": item.value for item in quality.evaluate(model, context).measurements}
    after = model.score(prompts, answers)
    about = memory(model).about(prompts)
    left = [number for number, hits in enumerate(about) if not hits]
    return {
        "seconds_per_edit": round(seconds / count, 3),
        "bytes_per_edit": num_bytes // count,
        f"first_{FIRST}": {name: round(measured[name], 3) for name in NUMBERS if name in measured},
        "unrelated_prompts": len(prompts),
        "unrelated_out_of_scope": len(left),
        "unrelated_bit_identical": sum(before[number] == after[number] for number in left),
        "seconds_per_request": seconds_per_request(model, bare, requests[:FIRST], prompts),
    }


def seconds_per_request(model: EditedModel, bare: EditedModel, edited: Sequence[EditRequest], others: Sequence[str]) -> Mapping[str, float]:
    """Return what scoring one request costs that is about a fact, one that is not, and such a one without the memory.

    None of these calls was made before: what comes again is remembered.
    """

    def measured(asked: EditedModel, prompts: Sequence[str]) -> float:
        memory(model).encoder.forget()
        started = time.perf_counter()
        for prompt in prompts:
            asked.score([prompt], [" Rome"])
        return round((time.perf_counter() - started) / len(prompts), 4)

    return {
        "in_scope": measured(model, [request.full_prompt for request in edited]),
        "out_of_scope": measured(model, others[:FIRST]),
        "without_memory": measured(bare, others[:FIRST]),
    }


def router(model: EditedModel, editor: Editor, rows: Sequence[EditRequest]) -> Mapping[str, Any]:
    """Return the router's precision and recall over rows that are all edited, at its own threshold and at others."""
    model.restore()
    for row in rows:
        model.apply(editor.edit([row], seed=0))
    adapter = memory(model)
    inside = [(text, row) for row in rows for text in (row.full_prompt, *row.paraphrase_prompts)]
    outside = [probe.prompt for row in rows for probe in row.neighborhood_prompts]
    found = adapter.nearest([text for text, _ in inside], count=1)
    right = [hits[0].similarity for hits, (_, row) in zip(found, inside, strict=True) if hits[0].fact.subject == row.subject]
    wrong = [hits[0].similarity for hits, (_, row) in zip(found, inside, strict=True) if hits[0].fact.subject != row.subject]
    wrong += [hits[0].similarity for hits in adapter.nearest(outside, count=1)]
    prompts = {row.full_prompt for row in rows}
    paraphrases = sum(text not in prompts for text, _ in inside)
    table = {}
    for threshold in sorted({*THRESHOLDS, round(adapter.similarity, 4)}):
        hit, false = sum(value >= threshold for value in right), sum(value >= threshold for value in wrong)
        table[str(threshold)] = {"precision": round(hit / max(hit + false, 1), 3), "recall": round(hit / len(inside), 3)}
    model.restore()
    return {
        "rows": len(rows),
        "in_scope": len(inside),
        "of_these_paraphrases": paraphrases,
        "out_of_scope": len(outside),
        "threshold": round(adapter.similarity, 4),
        "by_threshold": table,
    }


def memory(model: EditedModel) -> MemoryAdapter:
    """Return the memory that is attached to a model."""
    if not isinstance(model.adapter, MemoryAdapter):
        raise SystemExit(f"{type(model.adapter).__name__} is no memory of facts; choose among ike, serac")
    return model.adapter


def held_back(data: Path, count: int) -> tuple[EditRequest, ...]:
    """Return the rows that the router is measured on."""
    rows = CounterFact(name="val", subset="easyedit", split="val", data=str(data), file=None, hub={}, on_bad_row="skip", known_only=False)
    return rows.load()[:count]


def unrelated() -> tuple[list[str], list[str]]:
    """Return prompts that are about no fact of CounterFact: questions of the built-in benchmark, with an answer to score."""
    folder = REPOSITORY / "editeval" / "benchmarks" / "data" / "quick"
    rows = [row for name in ("arithmetic", "commonsense", "world_knowledge") for row in read_jsonl(folder / f"{name}.jsonl")[0]]
    return [str(row["context"]) for row in rows], [" yes"] * len(rows)


if __name__ == "__main__":
    raise SystemExit(main())

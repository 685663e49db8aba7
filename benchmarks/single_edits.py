"""How often one edit of the unedited model takes: each fact alone, then the weights are put back.

    python benchmarks/single_edits.py --data DIR --facts 20                                  # rows of `train`, SmolLM2, five methods
    python benchmarks/single_edits.py --data DIR --methods memit --split edit method.learning_rate=0.3

CounterFact rows in EasyEdit's format with the settings that a run would take. *Efficacy* and *generalization* by probability: the new
target is likelier per token than the old one, on the prompt and on its paraphrase. With `--out` each fact's line is kept as soon as it is
measured, and a call that was cut goes on there. Prints a table, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import torch
from hydra import compose, initialize_config_dir

from benchmarks.command import with_overrides
from editeval.build import build
from editeval.datasets.counterfact import CounterFact
from editeval.experiment import load_for
from editeval.files import Cache, append_jsonl, read_jsonl
from editeval.inference.edited import EditedModel
from editeval.interfaces import EditMethod, ModelSource
from editeval.models.packed import allowed_bytes
from editeval.types import EditRequest, SilentProgress

REPOSITORY = Path(__file__).resolve().parents[1]
METHODS = ("rome", "memit", "alphaedit", "emmet", "pmet")


def main(arguments: Sequence[str] | None = None) -> int:
    """Edit each fact with each method and ask at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--facts", type=int, default=20)
    parser.add_argument("--data", type=Path, required=True, help="a folder with counterfact/easyedit/<split>.jsonl")
    parser.add_argument("--split", default="train")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch; default: its own choice")
    parser.add_argument("--out", type=Path, default=None, help="a file of JSON lines that keeps what was measured")
    parser.add_argument("overrides", nargs="*", help="further settings, as on the command line of launch.py")
    options = with_overrides(parser, arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    facts = CounterFact(name="counterfact", subset="easyedit", split=options.split, data=str(options.data)).load()[: options.facts]
    model: EditedModel | None = None
    records = []
    print("| method | facts | efficacy | generalization | edit, CPU s |\n|---|---|---|---|---|")
    for name in options.methods:
        with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
            config = compose("config", overrides=[f"model={options.model}", f"method={name}", *options.overrides])
        if model is None:
            engine = {"batch_tokens": config.engine.batch_tokens, "packed_bytes": allowed_bytes(config.engine.packed_gib)}
            model = load_for(build(config.model, "model", ModelSource), **engine)
        rows = measure(model, build(config.method, "method", EditMethod), name, facts, Cache(Path(config.paths.cache)), options)
        number = {key: fmean([float(row[key]) for row in rows]) for key in ("efficacy", "generalization", "seconds")}
        records.append({"method": name, "facts": len(rows), "overrides": options.overrides, **number})
        cells = [f"{number[key]:.2f}" for key in ("efficacy", "generalization", "seconds")]
        print(f"| {name} | {len(rows)} | {' | '.join(cells)} |", flush=True)
    print(json.dumps(records))
    return 0


def measure(
    model: EditedModel, method: EditMethod, name: str, facts: Sequence[EditRequest], cache: Cache, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return one row a fact; facts that the file of `--out` holds are taken from there."""
    key = " ".join([options.model, name, *options.overrides])
    known = {} if options.out is None else {(row["key"], row["fact"]): row for row in read_jsonl(options.out)[0]}
    rows: list[dict[str, Any]] = []
    editor = None
    for fact in facts:
        row = known.get((key, fact.request_id))
        if row is None:
            editor = editor or method.prepare(model, cache, SilentProgress())
            start = time.process_time()
            model.apply(editor.edit([fact], seed=0))
            seconds = time.process_time() - start
            took = [prefers_new(model, prompt, fact) for prompt in (fact.full_prompt, *fact.paraphrase_prompts)]
            model.restore()
            row = {"key": key, "fact": fact.request_id, "efficacy": took[0], "generalization": fmean(took[1:]), "seconds": seconds}
            if options.out is not None:
                append_jsonl(options.out, [row])
        rows.append(row)
    return rows


def prefers_new(model: EditedModel, prompt: str, fact: EditRequest) -> bool:
    """Return whether the new target is likelier per token than the true one."""
    targets = [f" {fact.target_new}", f" {fact.target_true}"]
    new, true = (score.log_prob / score.num_tokens for score in model.score([prompt, prompt], targets))
    return new > true


if __name__ == "__main__":
    sys.exit(main())

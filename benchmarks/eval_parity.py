"""Whether our engine answers as lm-eval's own HFLM does: real rows of all seven benchmarks of the paper, SmolLM2-135M, batch size 1, fp32.

    python benchmarks/eval_parity.py --data DIR                              # 40 items of each
    python benchmarks/eval_parity.py --data DIR --tasks mmlu bbh --items 10
    python benchmarks/eval_parity.py --data DIR --max-new-tokens 64          # shorter texts on both sides, for a quick look
    python benchmarks/eval_parity.py --data DIR --tasks toxigen triviaqa commonsense_qa --items 4 --edits rome grace serac ike

DIR is laid out as for `paths.data`. MMLU and BBH stand for their subjects and tasks by three each. Everything goes through the harness:
requests, answers, metrics. What must be equal: every metric of every item, every text, every greedy flag; and every log-likelihood within
`ABSOLUTE` or, of long texts, `RELATIVE`: a float32 carries 6e-8 of a number, a sum over n tokens some sqrt(n) of that, and the last layer's
logits another few, so that two right kernels differ by about 1e-6 of a sum of hundreds of nats.
Where a difference is beyond `ABSOLUTE`, the model in float64 says which side is nearer to the truth.
With `--edits`, all of that is asked of a model after edits by each of these methods, and so are prompts about the edited facts; how HFLM
sees an edit is in `under_edits.py`, apart from our adapters. How many requests an edit acted on is printed (of weights: all).
Prints a table, and one JSON line at the end; ends with status 1 on a mismatch.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import torch

from benchmarks.beside_harness import Work, answers, benchmark_of, our_engine, requests_of
from benchmarks.memory_methods import assembled
from benchmarks.speed_setup import smollm2
from benchmarks.under_edits import Edited, edited, reference_engine, requests_about
from editeval.inference.edited import EditedModel

ABSOLUTE = 1e-3  # nats
RELATIVE = 1e-5  # of a log-likelihood
METHODS = ("rome", "grace", "serac", "ike")
NUM_EDITS = 5

BBH = "bbh_cot_fewshot_"
# Three subjects and tasks of different prompts share the items between them.
WORKS: Mapping[str, tuple[Work, int]] = {
    "mmlu": (Work(benchmark="mmlu", changes={"task": "[mmlu_anatomy,mmlu_prehistory,mmlu_college_physics]"}), 3),
    "mmlu-generative": (
        Work(benchmark="mmlu-generative", changes={"task": "[mmlu_anatomy_generative,mmlu_prehistory_generative]"}),
        2,
    ),
    "bbh": (Work(benchmark="bbh", changes={"task": f"[{BBH}boolean_expressions,{BBH}navigate,{BBH}object_counting]"}), 3),
    "gsm8k": (Work(benchmark="gsm8k", changes={}), 1),
    "commonsense_qa": (Work(benchmark="commonsense_qa", changes={}), 1),
    "commonsense_qa-generative": (Work(benchmark="commonsense_qa-generative", changes={}), 1),
    "triviaqa": (Work(benchmark="triviaqa", changes={}), 1),
    "truthfulqa": (Work(benchmark="truthfulqa", changes={}), 1),
    "toxigen": (Work(benchmark="toxigen", changes={}), 1),
}


@dataclass(frozen=True, kw_only=True)
class Parity:
    """What was equal between the two engines on one benchmark."""

    task: str
    method: str | None  # what the model was edited with
    requests_acted_on: int | None  # by an edit that stands beside the weights
    items: int
    metrics_equal: bool
    metrics: Mapping[str, float]
    loglikelihoods: int
    largest_difference: float
    beyond_absolute: int
    beyond_tolerance: int
    nearer_to_float64: Mapping[str, int]  # of those beyond ABSOLUTE
    greedy_flags_equal: bool
    texts: int
    texts_equal: int

    @property
    def same(self) -> bool:
        """Whether the engines agree."""
        return self.metrics_equal and self.greedy_flags_equal and self.beyond_tolerance == 0 and self.texts == self.texts_equal


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the chosen benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--items", type=int, default=40, help="of each benchmark")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="of a text, on both sides; default: as the task says")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--edits", nargs="*", choices=METHODS, default=[], help="compare under edits by these methods")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    found: list[Parity] = []
    for method in options.edits or [None]:
        state = (
            Edited(method=None, model=EditedModel(smollm2("cpu")))
            if method is None
            else edited(method, assembled(method, options.data, ()), NUM_EDITS)
        )
        engine = reference_engine(state.model, state.edits)
        if state.requests:
            found.append(told(compare_facts(state, engine)))
        sizes = {"items": options.items, "max_new_tokens": options.max_new_tokens}
        found.extend(told(compare(name, state, engine, data=options.data, **sizes)) for name in options.tasks)
    same = all(parity.same for parity in found)
    records = [{**asdict(parity), "same": parity.same} for parity in found]
    print(json.dumps({"same": same, "absolute": ABSOLUTE, "relative": RELATIVE, "torch": torch.__version__, "tasks": records}))
    return 0 if same else 1


def told(parity: Parity) -> Parity:
    """Print a line about it, and return it."""
    acted = "" if parity.requests_acted_on is None else f" ({parity.requests_acted_on} requests acted on)"
    print(
        f"{parity.method or 'unedited'}, {parity.task}: {'same' if parity.same else 'DIFFERENT'}; {parity.items} items{acted}, "
        f"{parity.texts_equal} of {parity.texts} texts equal, {parity.loglikelihoods} log-likelihoods, "
        f"largest difference {parity.largest_difference:.1e}; {dict(parity.metrics)}",
        flush=True,
    )
    return parity


def compare(name: str, state: Edited, engine: Any, *, data: Path, items: int, max_new_tokens: int | None) -> Parity:
    """Evaluate one benchmark with our engine, and with the harness's own."""
    work, parts = WORKS[name]
    changes = {**work.changes, "limit": -(-items // parts)}
    if max_new_tokens is not None:
        changes["max_new_tokens"] = max_new_tokens
    work = Work(benchmark=work.benchmark, changes=changes)
    ours = _evaluated(work, state.model, our_engine(state.model), data=data)
    before = _acted(engine)
    return _parity(name, state, ours, _evaluated(work, state.model, engine, data=data), acted=_acted(engine) - before)


def compare_facts(state: Edited, engine: Any) -> Parity:
    """Ask about the edited facts with our engine, and with the harness's own."""
    requests = requests_about(state.requests)
    sides = []
    for side in (our_engine(state.model), engine):
        given = answers(side, requests)
        sides.append(
            Evaluated(
                items=sum(map(len, requests.values())),
                asked=[request.args for request in requests["loglikelihood"]],
                loglikelihoods=given["loglikelihood"],
                texts=given["generate_until"],
                metrics={},
            )
        )
    return _parity("facts", state, *sides, acted=_acted(engine))


def _acted(engine: Any) -> int:
    return int(getattr(engine, "acted", 0))


def _parity(task: str, state: Edited, ours: Evaluated, theirs: Evaluated, *, acted: int) -> Parity:
    pairs = list(zip(ours.loglikelihoods, theirs.loglikelihoods, strict=True))
    differences = [abs(mine[0] - other[0]) for mine, other in pairs]
    far = [place for place, difference in enumerate(differences) if difference > ABSOLUTE]
    beyond = [place for place in far if differences[place] > RELATIVE * abs(pairs[place][1][0])]
    beside = state.model.adapter is not None
    return Parity(
        task=task,
        method=state.method,
        requests_acted_on=acted if beside else None,
        items=ours.items,
        metrics_equal=ours.metrics == theirs.metrics if not pairs else _near(ours.metrics, theirs.metrics),
        metrics=ours.metrics,
        loglikelihoods=len(pairs),
        largest_difference=max(differences, default=0.0),
        beyond_absolute=len(far),
        beyond_tolerance=len(beyond),
        # What stands beside the weights is not in the module, so that the module in float64 is no judge of it.
        nearer_to_float64={} if beside else _nearer(state.model, [ours.asked[place] for place in far], [pairs[place] for place in far]),
        greedy_flags_equal=all(mine[1] == other[1] for mine, other in pairs),
        texts=len(ours.texts),
        texts_equal=sum(mine == other for mine, other in zip(ours.texts, theirs.texts, strict=True)),
    )


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One engine's answers, in the order of the requests, and the harness's metrics of them."""

    items: int
    asked: list[tuple[str, str]]
    loglikelihoods: list[tuple[float, bool]]
    texts: list[str]
    metrics: dict[str, float]


def _evaluated(work: Work, model: EditedModel, engine: Any, *, data: Path) -> Evaluated:
    from lm_eval.evaluator import evaluate

    benchmark = benchmark_of(work, data=data)
    requests_of(benchmark, model)  # renders the prompts, and sees that they fit
    with benchmark._guarded():
        results = evaluate(lm=engine, task_dict=dict(benchmark._loaded), samples=benchmark._chosen, bootstrap_iters=1000)
    assert results is not None
    # The harness lists an item once for each way of reading its answer.
    items = {(name, sample["doc_id"]): sample for name in results["samples"] for sample in results["samples"][name]}
    samples = list(items.values())
    asked, answered, texts = [], [], []
    for sample in samples:
        for arguments, responses in zip(sample["arguments"], sample["resps"], strict=True):
            if isinstance(responses[0], str):
                texts.append(responses[0])
            else:
                asked.append((arguments[0], arguments[1]))
                answered.append((float(responses[0][0]), bool(responses[0][1])))
    metrics = {
        f"{task}.{metric}": float(value)
        for task, numbers in results["results"].items()
        for metric, value in numbers.items()
        if isinstance(value, (int, float)) and "stderr" not in metric and metric not in {"sample_len", "sample_count"}
    }
    return Evaluated(items=len(samples), asked=asked, loglikelihoods=answered, texts=texts, metrics=metrics)


def _near(ours: Mapping[str, float], theirs: Mapping[str, float]) -> bool:
    """Return whether metrics agree: shares of items exactly, those made of log-likelihoods (mc2) within ABSOLUTE."""
    return ours.keys() == theirs.keys() and all(abs(ours[name] - theirs[name]) < (ABSOLUTE if "mc2" in name else 1e-12) for name in ours)


def _nearer(model: EditedModel, asked: Sequence[tuple[str, str]], pairs: Sequence[tuple[Any, Any]]) -> dict[str, int]:
    """Count on which side the model in float64 is."""
    from editeval.inference.encoding import encode_pairs

    counts = {"ours": 0, "hflm": 0}
    if not asked:
        return counts
    exact = copy.deepcopy(model.lm.module).double()
    encoded = encode_pairs(model.lm.tokenizer, [context for context, _ in asked], [end for _, end in asked], special_tokens=None)
    for pair, (mine, other) in zip(encoded, pairs, strict=True):
        tokens = torch.tensor([[*pair.context, *pair.continuation]])
        with torch.no_grad():
            log_probs = exact(input_ids=tokens[:, :-1]).logits[0, -len(pair.continuation) :].log_softmax(-1)
        truth = float(log_probs.gather(-1, torch.tensor(pair.continuation)[:, None]).sum())
        counts["ours" if abs(mine[0] - truth) <= abs(other[0] - truth) else "hflm"] += 1
    return counts


if __name__ == "__main__":
    sys.exit(main())

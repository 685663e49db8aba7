"""Process time of our engine and of lm-eval's HFLM on the same requests, in one process, on SmolLM2-135M in fp32.

    python benchmarks/eval_speed.py --data DIR                      # all; about 15 minutes of one core
    python benchmarks/eval_speed.py --data DIR --tasks mmlu bbh     # some of them
    python benchmarks/eval_speed.py --data DIR --batch-sizes 8 --max-new-tokens 48    # HFLM at one size, shorter texts: a quick look
    python benchmarks/eval_speed.py --data DIR --early-stops        # not HFLM: our engine with and without the stops of written answers

DIR is laid out as for `paths.data`. HFLM runs at batch size 1 and 8 and its better time counts. One thread, unless --threads says
otherwise. Last, the host's share (prompts, tokens, packing, metrics) of a first and a second rung of MMLU's 57 subjects: CPU seconds
outside of the passes of a tiny model.
`--early-stops` asks 16 questions of GSM8K and 16 of BBH of the model as it is, and of one that is broken (noise on one matrix), and counts
decoded tokens, CPU seconds, and items whose metrics stayed. Prints a table, and one JSON line at the end; ends with status 1 when answers
differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import torch

from benchmarks.beside_harness import Work, answers, benchmark_of, harness_engine, our_engine, requests_of
from benchmarks.speed_setup import smollm2
from editeval.benchmarks.lm_harness import HarnessBenchmark
from editeval.edits.delta import DenseDelta, Edit
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.interfaces import EvaluationContext

# Enough items of one task that sharing shows; few enough that HFLM ends. Where this small model does not stop by itself, texts are cut
# at 128 tokens on both sides.
WORKS: Mapping[str, Work] = {
    "mmlu": Work(benchmark="mmlu", changes={"task": "mmlu_human_aging", "limit": 30}),
    "truthfulqa": Work(benchmark="truthfulqa", changes={"task": "truthfulqa_mc2", "limit": 16}),
    "toxigen": Work(benchmark="toxigen", changes={"limit": 100}),
    "bbh": Work(benchmark="bbh", changes={"task": "bbh_cot_fewshot_boolean_expressions", "limit": 24, "max_new_tokens": 128}),
    "gsm8k": Work(benchmark="gsm8k", changes={"limit": 16, "max_new_tokens": 128}),
    "triviaqa": Work(benchmark="triviaqa", changes={"limit": 48}),
}
LOOP_REPEATS = 4
ANSWER_PATTERNS = {"gsm8k": r"The answer is -?[0-9.,]+[^0-9.,]", "bbh": r"the answer is .+\n"}  # as in conf/benchmark
TOLERANCE = 1e-3  # nats; see `eval_parity.py`
TARGETS = {"mmlu": 6.0, "truthfulqa": 12.0, "toxigen": 2.5, "bbh": 4.0, "gsm8k": 2.0, "triviaqa": 2.0}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """CPU seconds of each engine on one task's requests."""

    task: str
    requests: int
    ours_seconds: float
    hflm_seconds: Mapping[int, float]  # by batch size
    largest_difference: float
    texts: int
    texts_equal: int

    @property
    def speedup(self) -> float:
        """HFLM's better time over ours."""
        return min(self.hflm_seconds.values()) / self.ours_seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Time the chosen tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--limit", type=int, default=None, help="items of each task")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], help="of HFLM; answers are compared with those of the first")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="of a written answer, on both sides")
    parser.add_argument("--early-stops", action="store_true", help="compare the stops of written answers instead")
    parser.add_argument("--no-host", action="store_true", help="leave the host's share of MMLU out")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = EditedModel(smollm2("cpu"))
    model.score(["a"], [" b"])  # the plan's trial is made once a run
    if options.early_stops:
        print(json.dumps(early_stops(model, data=options.data, limit=options.limit or 16, max_new_tokens=options.max_new_tokens or 128)))
        return 0
    timings = []
    for name in options.tasks:
        changes = {"limit": options.limit, "max_new_tokens": options.max_new_tokens}
        work = changed(WORKS[name], {setting: value for setting, value in changes.items() if value is not None})
        timing = compare(name, work, model, data=options.data, sizes=options.batch_sizes)
        timings.append(timing)
        print(
            f"{name}: {timing.speedup:.1f} times (target {TARGETS[name]}), ours {timing.ours_seconds:.1f} s, HFLM {timing.hflm_seconds}; "
            f"largest difference {timing.largest_difference:.1e}, {timing.texts_equal} of {timing.texts} texts equal",
            flush=True,
        )
    host = {} if options.no_host else host_seconds(options.data)
    records = [{**asdict(timing), "speedup": timing.speedup, "target": TARGETS[timing.task]} for timing in timings]
    same = all(timing.largest_difference < TOLERANCE and timing.texts_equal == timing.texts for timing in timings)
    found = {"threads": torch.get_num_threads(), "torch": torch.__version__, "same": same, "tasks": records, "mmlu_host_seconds": host}
    print(json.dumps(found))
    return 0 if same else 1


def changed(work: Work, changes: Mapping[str, Any]) -> Work:
    """Return the work with other settings of its benchmark."""
    return Work(benchmark=work.benchmark, changes={**work.changes, **changes})


def compare(name: str, work: Work, model: EditedModel, *, data: Path, sizes: Sequence[int]) -> Timing:
    """Answer one task's requests with each engine."""
    requests = requests_of(benchmark_of(work, data=data), model)
    ours, ours_seconds = timed(our_engine(model), requests)
    hflm_seconds: dict[int, float] = {}
    for size in sizes:
        expected, hflm_seconds[size] = timed(harness_engine(model, batch_size=size), requests)
        print(f"  {name}: ours {ours_seconds:.1f} s, HFLM at batch size {size} {hflm_seconds[size]:.1f} s", flush=True)
        if size == sizes[0]:
            reference = expected
    pairs = list(zip(ours.get("loglikelihood", []), reference.get("loglikelihood", []), strict=True))
    texts = list(zip(ours.get("generate_until", []), reference.get("generate_until", []), strict=True))
    return Timing(
        task=name,
        requests=sum(map(len, requests.values())),
        ours_seconds=ours_seconds,
        hflm_seconds=hflm_seconds,
        largest_difference=max((abs(found[0] - wanted[0]) for found, wanted in pairs), default=0.0),
        texts=len(texts),
        texts_equal=sum(found == wanted for found, wanted in texts),
    )


class PassClock:
    """CPU seconds within a module, as a pair of hooks."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def start(self, *_: Any) -> None:
        """Before a pass."""
        self._started = time.process_time()

    def stop(self, *_: Any) -> None:
        """After it."""
        self.seconds += time.process_time() - self._started


def early_stops(model: EditedModel, *, data: Path, limit: int, max_new_tokens: int) -> list[dict[str, Any]]:
    """Measure what the stops of written answers save, and how many items' metrics stay."""
    found = []
    for state in ("as it is", "broken"):
        if state == "broken":
            model.apply(breaking_edit(model))
        for name, pattern in ANSWER_PATTERNS.items():
            work = changed(WORKS[name], {"limit": limit, "max_new_tokens": max_new_tokens})
            before: list[Mapping[str, Any]] = []
            for stops in ("off", "on"):
                benchmark = benchmark_of(work, data=data)
                if stops == "on":
                    benchmark = replace(benchmark, loop_repeats=LOOP_REPEATS, answer_pattern=pattern)
                row, given = _with_stops(model, benchmark)
                before = before or given
                kept = {
                    key: sum(one[key] == other[key] for one, other in zip(before, given, strict=True)) for key in ("metrics", "degenerate")
                }
                found.append({"model": state, "task": name, "stops": stops, **row, "answers": len(given), "kept": kept})
                print(found[-1], flush=True)
    return found


def breaking_edit(model: EditedModel) -> Edit:
    """Return noise on one matrix, after which SmolLM2 answers and babbles."""
    parameter = model.lm.sites.mlp_out.format(3) + ".weight"
    noise = torch.randn(model.base_weight(parameter).shape, generator=torch.Generator().manual_seed(0))
    return Edit(deltas=(DenseDelta(parameter=parameter, value=noise),))


def _with_stops(model: EditedModel, benchmark: HarnessBenchmark) -> tuple[dict[str, Any], list[Mapping[str, Any]]]:
    """Return what an evaluation cost, and the record of every item under every filter."""
    decoded = 0

    def count(_module: torch.nn.Module, _arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        nonlocal decoded
        rows, width = options["input_ids"].shape
        decoded += rows if width == 1 else 0

    handle = model.lm.module.register_forward_pre_hook(count, with_kwargs=True)
    with tempfile.TemporaryDirectory() as folder:
        context = EvaluationContext(num_edits=0, edited=(), planned=(), seed=0, cache=Cache(Path(folder)))
        benchmark.check_model(model)  # renders the prompts
        start = time.process_time()
        samples = benchmark.evaluate(model, context).samples
        seconds = time.process_time() - start
    handle.remove()
    return {"decoded_tokens": decoded, "seconds": round(seconds, 1)}, list(samples)


def host_seconds(data: Path) -> dict[str, float]:
    """Return the CPU seconds of a first and a second rung of all of MMLU, the passes of a model of one narrow layer left out."""
    from editeval.models.tiny import TinyModel

    benchmark = benchmark_of(Work(benchmark="mmlu", changes={}), data=data)
    with tempfile.TemporaryDirectory() as folder:
        source = TinyModel(
            name="tiny", architecture="llama", cache_dir=folder, num_layers=1, hidden_size=8, num_heads=2, max_positions=8192, device="cpu"
        )
        model = EditedModel(source.load())
        model.score(["a"], [" b"])
        clock = PassClock()
        model.lm.module.register_forward_pre_hook(clock.start)
        model.lm.module.register_forward_hook(clock.stop)
        context = EvaluationContext(num_edits=0, edited=(), planned=(), seed=0, cache=Cache(Path(folder)))
        seconds = {}
        for rung in ("first", "second"):
            clock.seconds, start = 0.0, time.process_time()
            benchmark.evaluate(model, context)
            seconds[rung] = time.process_time() - start - clock.seconds
            print(f"  host, MMLU, {rung} rung: {seconds[rung]:.2f} s, and {clock.seconds:.1f} s of the tiny model's passes", flush=True)
    return seconds


def timed(engine: Any, requests: Mapping[str, Sequence[Any]]) -> tuple[dict[str, list[Any]], float]:
    """Return an engine's answers and the CPU seconds they took."""
    start = time.process_time()
    given = answers(engine, requests)
    return given, time.process_time() - start


if __name__ == "__main__":
    sys.exit(main())

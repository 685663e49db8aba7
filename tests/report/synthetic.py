"""Runs with planted effects, written through the project's own store: what the report must find is known."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from editeval.files import append_jsonl
from editeval.runner.results import ScoreStore
from editeval.runner.run_files import TIMINGS_FILE, append_edit, write_manifest
from editeval.types import Evaluation, Measurement

Share = Callable[[int], float]  # of a number of edits
MOST_FACTS = 1000  # asked about at a rung: thousands more take long to write and say the same


def falls_at(edits: float) -> Share:
    """Ability that is whole until near `edits`, where a half is left, and gone ten times later."""
    return lambda n: 1 / (1 + (n / edits) ** 3)


def keeps(share: float) -> Share:
    return lambda n: share if n else 1.0


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A choice benchmark: the unedited model knows enough items to score `base`; after n edits it still knows `kept(n)` of them."""

    name: str
    kept: Share
    base: float = 0.75
    chance: float = 0.25
    n: int = 60
    shots: int = 0  # a setting: its cells have another key
    generated: bool = False  # scored by what is written: a model that lost an item writes nothing
    question_words: int = 4  # how long a question is; 0: the run kept none
    beside: Sequence[str] = ()  # further metrics of the same answers, every item's value that of `acc`

    @property
    def key(self) -> str:
        """What names its settings, 64 characters."""
        return f"{self.shots}-{self.n}-{self.name:x<64}"[:64]


@dataclass(frozen=True, kw_only=True)
class PlantedRun:
    """One run: where its ability and its edits go."""

    model: str = "tiny"
    method: str = "rome"
    seed: int = 0
    dataset: str = "counterfact"
    rungs: Sequence[int] = (1, 10, 100)
    benchmarks: Sequence[Planted] = ()
    efficacy: Share = field(default_factory=lambda: keeps(0.9))
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        told = "-".join(f"{key}={value}" for key, value in self.settings.items())
        safe = "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in f"{self.method}{told}")
        return f"{self.model}-{safe}-{self.dataset}-{self.seed}"


def generator(*parts: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32("|".join(map(str, parts)).encode()))


@functools.lru_cache(maxsize=64)
def base_items(model: str, benchmark: Planted) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (known, right unedited, the place of each item in the order in which items are lost), (N,) each."""
    random = generator(model.removesuffix("-chat"), benchmark.name)
    known = np.zeros(benchmark.n, bool)
    known[random.permutation(benchmark.n)[: round(benchmark.n * (benchmark.base - benchmark.chance) / (1 - benchmark.chance))]] = True
    right = known | (random.random(benchmark.n) < benchmark.chance)
    return known, right, random.random(benchmark.n)


def question_of(benchmark: Planted, item: int) -> dict[str, Any]:
    question = {"question": f"Question {item}{' of many words' * (benchmark.question_words // 3)} about {benchmark.name}?\nAnswer:"}
    return question if benchmark.generated else {**question, "choices": [f" town {place}" for place in range(4)], "right": item % 4}


def harness(run: PlantedRun, benchmark: Planted, rung: int) -> Evaluation:
    known, right, _ = base_items(run.model, benchmark)
    random = generator(run.name, benchmark.name)
    lost = known & (random.random(benchmark.n) >= benchmark.kept(rung)) if rung else np.zeros(benchmark.n, bool)
    guesses = random.random(benchmark.n) < benchmark.chance
    passed = np.where(lost, guesses & (not benchmark.generated), right)
    samples = []
    for item in range(benchmark.n):
        record = {"task": benchmark.name, "item": item, "item_hash": f"h{item}", "prompt_hash": "p", "filter": "none", "target": item % 4}
        picked = item % 4 if passed[item] else (item + 1) % 4
        said: dict[str, Any] = {"log_probs": [-1.0 if choice == picked else -2.0 for choice in range(4)]}
        if benchmark.generated:
            said = {"generated": f" The answer is {picked}." if not lost[item] else ""}
        if benchmark.question_words and not rung:
            said |= question_of(benchmark, item)
        samples.append({**record, "metrics": dict.fromkeys(("acc", *benchmark.beside), float(passed[item])), **said})
    value = float(passed.mean())
    error = float(np.sqrt(value * (1 - value) / benchmark.n))
    protocol = "generative" if benchmark.generated else "likelihood"
    chance = benchmark.chance or None
    measurements = tuple(
        Measurement(task=benchmark.name, metric=metric, protocol=protocol, value=value, n=benchmark.n, stderr=error, chance=chance)
        for metric in ("acc", *benchmark.beside)
    )
    if benchmark.name == "toxigen":  # as the harness has it: of the answers as a whole, in no item
        shares = [float(passed[np.arange(benchmark.n) % 4 == label].mean()) for label in range(4)]
        balanced = replace(measurements[0], metric="balanced_accuracy", value=float(np.mean(shares)))
        measurements = (*measurements, balanced)
    return Evaluation(measurements=measurements, samples=tuple(samples))


def edit_quality(run: PlantedRun, rung: int) -> Evaluation:
    facts = min(rung or max(run.rungs), MOST_FACTS)
    random = generator(run.name, "facts")
    draws = random.random(facts)
    passed = [bool(rung) and draws[fact] < run.efficacy(rung) for fact in range(facts)]
    samples = [
        {
            "request_id": f"fact-{run.seed}-{fact}",
            "position": fact + 1,
            "metric": metric,
            "prompts": [f"The home of person {fact} is"],
            "expected": ["Paris"],
            "conflict": [False],
            "generated": [" Paris" if passed[fact] else " Rome"],
            "outcomes": {"generation": [float(passed[fact]) if metric == "efficacy" else 1.0], "probability": [None]},
        }
        for fact in range(facts)
        for metric in ("efficacy", "locality")
    ]
    measurements = tuple(
        Measurement(task="facts", metric=metric, protocol="generation", value=value, n=facts, stderr=0.02)
        for metric, value in (("efficacy", float(np.mean(passed))), ("locality", 1.0))
    )
    return Evaluation(measurements=measurements, samples=tuple(samples))


def perplexity(run: PlantedRun, rung: int) -> Evaluation:
    left = run.benchmarks[0].kept(rung) if rung and run.benchmarks else 1.0
    value = 20.0 / max(left, 1e-3)
    measurement = Measurement(
        task="passage", metric="perplexity", protocol="likelihood", value=value, n=500, stderr=0.5, higher_is_better=False
    )
    return Evaluation(measurements=(measurement,))


def write_run(root: Path, run: PlantedRun) -> Path:
    folder = root / run.name
    store = ScoreStore(folder)
    weights = f"weights-{run.model}"
    for rung in (0, *run.rungs):
        digest = f"{run.name}-{rung}" if rung else weights
        cells = [("edit-quality", f"{run.seed}-{rung:060d}", edit_quality(run, rung)), ("perplexity", "p" * 64, perplexity(run, rung))]
        cells += [(benchmark.name, benchmark.key, harness(run, benchmark, rung)) for benchmark in run.benchmarks]
        for name, key, evaluation in cells:
            store.record(evaluation, benchmark=name, benchmark_key=key, num_edits=rung, state_digest=digest, seconds=2.5)
    config = {
        "seed": run.seed,
        "batch_size": 1,
        "model": {"name": run.model},
        "method": {"_target_": "editeval.methods.rome.ROME", "name": run.method, **run.settings},
        "dataset": {"name": run.dataset},
    }
    machine = {"platform": "Linux", "threads": 1, "gpu": None}
    write_manifest(
        folder, {"edit_key": run.name, "model_fingerprint": weights, "config": config, "command": ["launch.py"], "machine": machine}
    )
    for step in sorted({1, *run.rungs}):
        row = {"step": step, "num_edits": step, "request_ids": [f"fact-{step}"], "seconds": 1.5, "digest": f"{run.name}-{step}"}
        norm = {
            "weights_digest": "w",
            "replayed": False,
            "diagnostics": {"delta_norm": 0.5 + step / 100, "update_norm": step / 4},
            "weight_norm_ratio": 1 + step / 50,
            "canary_ratio": 1 + step / 10,
        }
        append_edit(folder, {**row, **norm})
    seconds = {"computing edits": 1.5 * max(run.rungs), "measuring mmlu": 12.0}
    append_jsonl(folder / TIMINGS_FILE, [{"ended_by": "end", "seconds": seconds, "peak_memory_bytes": 3_500_000_000}])
    (folder / "journal").mkdir()
    (folder / "journal" / "segment-000001.journal").write_bytes(b"j" * 1000)
    return folder


def write_study_runs(root: Path, *, methods: Sequence[str] = ("rome", "memit")) -> list[Path]:
    """Write runs that every question has a chart of, and return their folders.

    A base and a tuned model under two orders of edits; a larger model, which keeps more; and on other facts one method in two settings.
    """

    def benchmarks(half_at: float) -> tuple[Planted, ...]:
        return (
            Planted(name="mmlu", kept=falls_at(half_at), n=40),
            Planted(name="gsm8k", kept=falls_at(half_at / 2), n=40, chance=0, base=0.5, generated=True, question_words=60),
            Planted(name="truthfulqa", kept=keeps(1.0), n=40),
        )

    base = PlantedRun(model="llama2-7b", rungs=(1, 10), benchmarks=benchmarks(20))
    runs = [
        replace(base, model=model, method=method, seed=seed)
        for model in ("llama2-7b", "llama2-7b-chat")
        for method in methods
        for seed in (0, 1)
    ]
    runs += [replace(base, model="llama2-13b", method=method, benchmarks=benchmarks(80)) for method in methods[:2]]
    runs += [replace(base, method="mend", dataset="zsre", settings={"accumulate": on}) for on in (True, False)]
    return [write_run(root, run) for run in runs]

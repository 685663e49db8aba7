"""Kill a sweep again and again, at random instants and in every way, and compare what is left with an unbroken one.

    python -m benchmarks.chaos --kills 20              # some minutes; --kills 200 is about an hour

Every kill is SIGKILL, SIGTERM or SIGINT to the whole process group of `python launch.py -m`, or a torn tail of a file that had just been
written. After the last one the sweep is started once more. Zero rungs may be lost, and no digest or score may differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from editeval.edits.journal import EditJournal
from editeval.files import read_jsonl
from editeval.runner.run_files import read_manifest

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
GRID = ("method=rome,none", "num_edits=1,4,8", "benchmark=edit-quality,perplexity")

Result = dict[str, tuple[str, dict[tuple[object, ...], float]]]


def command(runs: Path, cache: Path) -> list[str]:
    """Return the sweep's command line."""
    common = ["debug=tiny", "callback=silent", "logger=csv", f"paths.runs={runs}", f"paths.cache={cache}", "hydra.sweeper.skip_done=false"]
    return [sys.executable, "launch.py", "-m", *GRID, *common]


def results(runs: Path) -> Result:
    """Return every run's last state and its scores; a score that was measured twice must be the same."""
    found: Result = {}
    for folder in sorted(path.parent for path in runs.glob("*/manifest.json")):
        manifest = read_manifest(folder)
        scores: dict[tuple[object, ...], float] = {}
        for row in read_jsonl(folder / "scores.jsonl")[0]:
            key = tuple(row[name] for name in ("num_edits", "benchmark", "benchmark_key", "task", "metric", "protocol", "state_digest"))
            if scores.setdefault(key, row["value"]) != row["value"]:
                raise SystemExit(f"{folder.name}: {key} was measured as {scores[key]} and as {row['value']}")
        with EditJournal.open(folder / "journal", genesis=manifest["edit_key"]) as journal:
            found[folder.name] = (journal.head, scores)
    return found


def kill_once(runs: Path, cache: Path, chance: random.Random, longest_seconds: float) -> tuple[str, float]:
    """Start the sweep, end it at a random instant, sometimes tear a file; return what was done, and the longest useful wait next time."""
    started = time.perf_counter()
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command(runs, cache), cwd=ROOT, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        process.wait(timeout=chance.uniform(0.1, 1.0) * longest_seconds)
        done = "ended before it was hit"
        longest_seconds = 0.95 * (time.perf_counter() - started)
    except subprocess.TimeoutExpired:
        number = chance.choice(SIGNALS)
        os.killpg(process.pid, number)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        done = number.name
    if done.startswith("ended") or chance.random() < 0.3:
        done += f", {tear_a_tail(runs, chance)}"
    return done, longest_seconds


def tear_a_tail(runs: Path, chance: random.Random) -> str:
    """Cut the newest file of a journal, or the scores, somewhere: as a machine does that loses power."""
    files = [max(folder.iterdir()) for folder in sorted(runs.glob("*/journal")) if any(folder.iterdir())]
    files += sorted(runs.glob("*/scores.jsonl"))
    if not files:
        return "nothing to tear"
    path = chance.choice(files)
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(len(data) + 1)])
    return f"tore {path.relative_to(runs)}"


def main() -> None:
    """Run the chaos and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        cache, hit, whole = Path(name) / "cache", Path(name) / "hit", Path(name) / "whole"
        started = time.perf_counter()
        subprocess.run(command(whole, cache), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        unbroken_seconds = time.perf_counter() - started
        longest_seconds = unbroken_seconds
        for number in range(1, options.kills + 1):
            done, longest_seconds = kill_once(hit, cache, chance, longest_seconds)
            print(f"{number}: {done}", flush=True)
        subprocess.run(command(hit, cache), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        expected, found = results(whole), results(hit)
        wrong_digests = sum(found[run][0] != expected[run][0] for run in expected if run in found)
        lost = sum(len(set(scores) - set(found[run][1])) if run in found else len(scores) for run, (_, scores) in expected.items())
        different = sum(found[run][1].get(key) != value for run in expected for key, value in expected[run][1].items() if run in found)
        figures = {
            "hits": options.kills,
            "seconds": round(time.perf_counter() - started),
            "unbroken_seconds": round(unbroken_seconds),
            "lost_runs": len(set(expected) - set(found)),
            "lost_scores": lost,
            "wrong_digests": wrong_digests,
            "different_scores": different - lost,
        }
        print(json.dumps(figures))
        if found != expected:
            raise SystemExit(1)


if __name__ == "__main__":
    main()

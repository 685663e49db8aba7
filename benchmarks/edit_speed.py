"""Seconds an edit, ours against straightforward implementations, in one process and with the same outcomes.

    python benchmarks/edit_speed.py --threads 1                                     # every method, two facts, both models
    python benchmarks/edit_speed.py --threads 1 --models xl-wide --edits 20 --data DIR --packed-gib 4 --out speed.jsonl
    python benchmarks/edit_speed.py --threads 1 --models smollm2 --methods kn grace mend
    python benchmarks/edit_speed.py --threads 1 --growth 1000                       # seconds from edit 1 to edit 1,000
    python benchmarks/edit_speed.py --device cuda --methods rome memit alphaedit pmet --models xl-wide --edits 20 --data DIR

Seconds are of the CPU in all threads, or with `--device cuda` of the clock, by when the GPU had ended its work.

`xl-wide` has GPT-2 XL's widths and 12 layers of random weights; ROME edits the layer at a third of the depth, MEMIT, AlphaEdit and PMET the
five layers up to it, with the numbers published for GPT-2 XL, and SmolLM2's with its pairs in conf/tuned; GRACE at its published depth,
MEND the last three layers, KN's neurons are those of all. The straightforward ones
(`straightforward*.py`) run the whole model over every position at every step, forward and as far backward as a gradient is asked for; where
a system is solved they read keys and values by whole passes, and solve it dense, in float64, as wide as the keys, at every edit. Both
edit the same facts from the same unedited model with the same settings, taking turns. What ours makes once a layer is listed apart, and its
packed copies of the weights (`editeval/models/packed.py`) are made by an edit that is not timed.
MEND's straightforward form is no edit but one plain pass with the gradients of the edited matrices; how many of them an edit costs is told.

Where two outcomes are further apart than rounding as a rule makes them, both are computed again with the model in float64, not timed. They
must agree there, and ours in float32 be as near to it as the two must be to each other, or at most twice as far as the straightforward one:
Adam turns the rounding of a gradient that is nearly zero into whole steps, and some facts have many of those.

With `--out` each fact's line is kept as soon as it is measured, and a call that was cut goes on there. Prints a table, and one JSON
line at the end; ends with status 1 when outcomes differ by more than that. Seconds decide nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import torch

from benchmarks.speed_growth import growth
from benchmarks.speed_pairs import LOCATING, Outcome, Pair, difference
from benchmarks.speed_pairs_gradients import GRADIENTS
from benchmarks.speed_setup import KN_STEPS, MODELS, TUNED, Setup, facts, mean, timed
from editeval.files import append_jsonl, read_jsonl
from editeval.models.packed import PackedWeights, allowed_bytes
from editeval.types import EditRequest

METHODS: Mapping[str, Callable[[Setup], Pair]] = {**LOCATING, **GRADIENTS}
COLUMNS = (
    *("model", "method", "facts", "ours, s/edit", "straightforward", "ratio", "goal", "plain passes an edit", "once a layer"),
    *("largest difference", "recomputed in float64"),
)
MOST_ROUNDING = 2.0
"""How many times as far from float64 as the straightforward form ours may be, where float32 tells them apart."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One fact by one method: seconds of both, and how far the two outcomes are apart (the worst layer), where needed in float64 too."""

    model: str
    method: str
    fact: str
    ours: float
    plain: float
    difference: float
    in_float64: float | None = None
    ours_off: float | None = None  # what float32 moves each outcome by, where they were computed in float64 too
    plain_off: float | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Time both implementations of the chosen methods on the chosen models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["smollm2", "xl-wide"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--edits", type=int, default=2, help="facts to edit")
    parser.add_argument(
        "--data", type=Path, default=None, help="a folder with counterfact/rome/test.jsonl; default: ten facts that are built in"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="a file of JSON lines that keeps what was measured, and is not measured again"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch; default: its own choice")
    parser.add_argument("--kn-steps", type=int, default=KN_STEPS, help=f"points of KN's integral (published: {KN_STEPS})")
    parser.add_argument(
        "--packed-gib", type=float, default=None, help="memory for packed copies of the weights; default: engine.packed_gib's"
    )
    parser.add_argument("--growth", type=int, default=None, metavar="EDITS", help="instead: seconds an edit over so many edits in sequence")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.growth is not None:
        print(json.dumps({"threads": torch.get_num_threads(), "seconds_from_edit": growth(options.growth)}))
        return 0
    records = []
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for name in options.models:
        packed = PackedWeights(most_bytes=allowed_bytes(options.packed_gib))
        setup = Setup(lm=replace(MODELS[name](options.device), packed=packed), tuned=TUNED.get(name), kn_steps=options.kn_steps)
        for method in options.methods:
            pair = METHODS[method](setup)
            timings = compare(setup, method + pair.variant, pair, number=options.edits, data=options.data, out=options.out)
            records.append(summary(timings, pair))
            print(line(records[-1]), flush=True)
    same = all(record["same"] for record in records)
    print(
        json.dumps(
            {"device": options.device, "threads": torch.get_num_threads(), "torch": torch.__version__, "same": same, "timings": records}
        )
    )
    return 0 if same else 1


def compare(setup: Setup, method: str, pair: Pair, *, number: int, data: Path | None, out: Path | None) -> list[Timing]:
    """Edit each fact with both, in turns, from the unedited model; facts that `out` holds are taken from there."""
    model = setup.lm.description.name
    known = {} if out is None else {(row["model"], row["method"], row["fact"]): row for row in read_jsonl(out)[0]}
    timings: list[Timing] = []
    is_warm = False
    for request in facts(number, data):
        row = known.get((model, method, request.request_id))
        if row is not None:
            timings.append(Timing(**row))
            if out is not None and not agrees(timings[-1], pair) and timings[-1].ours_off is None:
                timings[-1] = in_float64(setup, pair, request, timings[-1], pair.ours(request), pair.plain(request))
                append_jsonl(out, [asdict(timings[-1])])
            continue
        if not is_warm:
            pair.ours(request)  # not timed: the first edit packs the weights
            is_warm = True
        turns = [(timed(lambda: pair.ours(request)), timed(lambda: pair.plain(request))) for _ in range(pair.repeats)]  # noqa: B023
        (outcome, _), (expected, _) = turns[-1]
        ours, plain = (median(turn[form][1] for turn in turns) for form in (0, 1))
        apart = difference(outcome, expected)
        timings.append(Timing(model=model, method=method, fact=request.request_id, ours=ours, plain=plain, difference=apart))
        if not agrees(timings[-1], pair):
            timings[-1] = in_float64(setup, pair, request, timings[-1], outcome, expected)
        print(f"  {model} {method} {request.subject}: {ours:.2f} s against {plain:.2f} s", file=sys.stderr, flush=True)
        if out is not None:
            append_jsonl(out, [asdict(timings[-1])])
    return timings


def agrees(timing: Timing, pair: Pair) -> bool:
    """Return whether both outcomes are the same but for rounding, of which ours has no more than float32 costs."""
    if timing.difference < pair.tolerance:
        return True
    if timing.in_float64 is None or timing.ours_off is None or timing.plain_off is None:
        return False
    return timing.in_float64 < pair.tolerance and timing.ours_off <= max(pair.tolerance, MOST_ROUNDING * timing.plain_off)


def in_float64(setup: Setup, pair: Pair, request: EditRequest, timing: Timing, ours: Outcome, plain: Outcome) -> Timing:
    """Return the timing with how far the outcomes are apart in float64, and each in float32 from the straightforward one there."""
    setup.lm.module.double()
    try:
        exact = pair.plain(request)
        apart = difference(pair.ours(request), exact)
    finally:
        setup.lm.module.float()
    return replace(timing, in_float64=apart, ours_off=difference(ours, exact), plain_off=difference(plain, exact))


def summary(timings: Sequence[Timing], pair: Pair) -> dict[str, Any]:
    """Return means over the facts."""
    ours, plain = mean([timing.ours for timing in timings]), mean([timing.plain for timing in timings])
    return {
        "model": timings[0].model,
        "method": timings[0].method,
        "facts": len(timings),
        "ours_seconds": ours,
        "straightforward_seconds": plain,
        "ratio": plain / ours,
        "goal": pair.goal,
        "plain_passes_an_edit": ours / plain if pair.plain_is_pass else None,
        "once_seconds_a_layer": pair.once,
        "largest_difference": max(timing.difference for timing in timings),
        "largest_in_float64": max((timing.in_float64 for timing in timings if timing.in_float64 is not None), default=None),
        "same": all(agrees(timing, pair) for timing in timings),
        "tolerance": pair.tolerance,
    }


def line(record: Mapping[str, Any]) -> str:
    """Return a row of the table."""
    names = (
        "ours_seconds",
        "straightforward_seconds",
        "ratio",
        "goal",
        "plain_passes_an_edit",
        "once_seconds_a_layer",
    )
    numbers = ["-" if record[name] is None else f"{record[name]:.2f}" for name in names]
    apart = ["-" if record[name] is None else f"{record[name]:.1e}" for name in ("largest_difference", "largest_in_float64")]
    cells = [str(record["model"]), str(record["method"]), str(record["facts"]), *numbers, *apart]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())

"""A long run's journal: how fast it opens and replays, how large it is, and whether replaying gives the live state bit for bit.

    python benchmarks/journal_growth.py                       # 10,000 rank-one edits of the tiny GPT-2
    python benchmarks/journal_growth.py --edits 500

Each edit is noise of the shape and rank of a ROME edit, recorded and applied as a run does. Then the journal is opened with its whole chain
checked, and applied to a fresh model. Seconds are of CPU, so that other work on the machine does not count. Prints one line of JSON; ends
with status 1 where the states differ or a limit is not met.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import torch

from editeval.edits.delta import Edit, LowRankDelta
from editeval.edits.journal import EditJournal
from editeval.inference.edited import EditedModel
from editeval.models.tiny import TinyModel

GENESIS = "0" * 64
LIMITS = {"open_seconds": 1.0, "size_ratio": 1.1}
LEAST_ENTRIES_PER_SECOND = 1000
LAYER = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Record, open, replay, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=10_000)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        numbers = measure(Path(folder), edits=options.edits)
    within = all(numbers[name] <= limit for name, limit in LIMITS.items())
    met = bool(numbers["same_state"]) and within and numbers["replayed_per_second"] >= LEAST_ENTRIES_PER_SECOND
    print(json.dumps({**numbers, "met": met}))
    return 0 if met else 1


def measure(folder: Path, *, edits: int) -> dict[str, float]:
    """Return the figures of one journal of `edits` edits, written into `folder`."""
    source = TinyModel(name="tiny-gpt2", architecture="gpt2", cache_dir=folder / "cache", device="cpu")
    live = EditedModel(source.load())
    parameter = f"{live.lm.sites.mlp_out.format(LAYER)}.weight"
    shape = tuple(live.weight(parameter).shape)
    start = time.process_time()
    with EditJournal.open(folder / "journal", genesis=GENESIS) as journal:
        for number, edit in enumerate(noise(parameter, shape, edits)):
            live.apply(journal.append((str(number),), edit, 0.0).edit)
    written = time.process_time() - start
    size = sum(path.stat().st_size for path in (folder / "journal").rglob("*") if path.is_file())
    start = time.process_time()
    with EditJournal.open(folder / "journal", genesis=GENESIS) as journal:
        opened = time.process_time() - start
        replayed = EditedModel(source.load())
        start = time.process_time()
        for entry in journal.entries(0, len(journal)):
            replayed.apply(entry.edit)
        seconds = time.process_time() - start
        entries = len(journal)
    same = replayed.weights_digest() == live.weights_digest() and torch.equal(replayed.weight(parameter), live.weight(parameter))
    return {
        "edits": entries,
        "open_seconds": opened,
        "replayed_per_second": entries / seconds,
        "appended_per_second": entries / written,
        "size_ratio": size / (edits * sum(shape) * 4),
        "same_state": float(same),
    }


def noise(parameter: str, shape: tuple[int, ...], count: int) -> Iterator[Edit]:
    """Yield rank-one edits that hardly move the weight each."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        left, right = (torch.randn(size, generator=generator) for size in shape)
        yield Edit(deltas=(LowRankDelta(parameter=parameter, left=1e-3 * left[:, None], right=1e-2 * right[None]),))


if __name__ == "__main__":
    sys.exit(main())

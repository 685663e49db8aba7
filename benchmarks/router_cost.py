"""What a memory of N facts takes to look up one request, and to take in one edit: does it stay cheap along a trajectory?

    python benchmarks/router_cost.py
    python benchmarks/router_cost.py --facts 100 1000 10000 --width 384

The router of SERAC and IKE (`editeval/memory/facts.py`) alone, on one thread: facts and requests have random unit vectors of the width of
all-MiniLM-L6-v2, made beforehand, so the encoder, which costs the same whatever the number of facts, is left out. An edit is what the
model and the log ask of the memory for it: check, add, digest. Prints lines for people, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from anywhere

import torch
from torch import Tensor, nn

from editeval.inference.adapters import Route
from editeval.memory.encoder import SentenceEncoder
from editeval.memory.facts import Fact, MemoryAdapter, memory_delta
from editeval.types import seed_for


class RandomVectors(SentenceEncoder):
    """Each text has a random unit vector of its own."""

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Return the unit vectors (B, D)."""
        vectors = [torch.randn(self.width, generator=torch.Generator().manual_seed(seed_for("router", text))) for text in texts]
        return nn.functional.normalize(torch.stack(vectors), dim=-1)


class Memory(MemoryAdapter):
    """A memory that is looked up and sends nothing anywhere."""

    def routes(self, requests: Sequence[str]) -> Sequence[Route | None]:
        """Look the requests up, and leave them as they are."""
        return [None for _ in self.about(requests)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every size, print its line, and all numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--width", type=int, default=384, help="of the vectors; 384 is all-MiniLM-L6-v2's")
    parser.add_argument("--repeats", type=int, default=50, help="requests, and edits, that the median is taken of")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [measured(size, width=options.width, repeats=options.repeats) for size in options.facts]
    for row in rows:
        print(f"{row['facts']:>7} facts: {1e3 * row['seconds_per_query']:.3f} ms a request, {1e3 * row['seconds_per_edit']:.3f} ms an edit")
    print(json.dumps({"width": options.width, "threads": 1, "rows": rows}))
    return 0


def measured(facts: int, *, width: int, repeats: int) -> dict[str, float]:
    """Return the median seconds of a request and of an edit with so many facts in the memory."""
    adapter = Memory(RandomVectors(width), similarity=0.7, count=1)
    adapter.add([memory_delta([_fact(adapter, f"fact {number}") for number in range(facts)])])
    requests = [f"request {number}" for number in range(repeats)]
    adapter.encoder.encode(requests)
    adapter.routes(requests[:1])
    edits = [memory_delta([_fact(adapter, f"edit {number}")]) for number in range(repeats)]

    def edit(number: int) -> None:
        adapter.check([edits[number]])
        adapter.add([edits[number]])
        adapter.digest()

    queries = _median(lambda number: adapter.routes([requests[number]]), repeats)
    return {"facts": facts, "seconds_per_query": queries, "seconds_per_edit": _median(edit, repeats)}


def _fact(adapter: Memory, text: str) -> Fact:
    return Fact(prompt=text, subject=text, target="x", embedding=adapter.encoder([text])[0])


def _median(call: Callable[[int], object], repeats: int) -> float:
    seconds = []
    for number in range(repeats):
        started = time.perf_counter()
        call(number)
        seconds.append(time.perf_counter() - started)
    return round(statistics.median(seconds), 7)


if __name__ == "__main__":
    raise SystemExit(main())

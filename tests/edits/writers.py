"""Small edits, and processes that record them: what the tests of this room share."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch

from editeval.edits.delta import DenseDelta, Edit, LowRankDelta
from editeval.edits.journal import EditJournal, JournalEntry

GENESIS = "5eed" * 16
START_SECONDS = 120.0  # a bound, not a claim


def make_edit(step: int, *, author: str = "", d_out: int = 3, d_in: int = 5) -> Edit:
    """Return an edit that depends on the step and the author alone."""
    generator = torch.Generator().manual_seed(1000 * step + sum(author.encode()))
    low_rank = LowRankDelta(
        parameter="h.5.mlp.c_proj.weight",
        left=torch.randn(d_out, 1, generator=generator),
        right=torch.randn(1, d_in, generator=generator),
    )
    return Edit(deltas=(low_rank,), diagnostics={"loss": 0.5})


def make_mixed_edit(step: int) -> Edit:
    """Return an edit with two kinds of delta and auxiliary tensors."""
    dense = DenseDelta(parameter="h.6.mlp.c_proj.weight", value=torch.full((2, 2), float(step)))
    return Edit(deltas=(*make_edit(step).deltas, dense), auxiliary={"keys": torch.arange(step), "count": torch.tensor(step)})


def request_ids(step: int) -> tuple[str, ...]:
    return (f"fact-{step}",)


def record(journal: EditJournal, step: int, *, author: str = "") -> JournalEntry:
    return journal.append(request_ids(step), make_edit(step, author=author), seconds=0.25)


def fill(folder: Path, steps: int, *, close: bool = True) -> list[str]:
    """Record edits up to number `steps` and return every state on the way, the genesis first."""
    journal = EditJournal.open(folder, genesis=GENESIS)
    for step in range(len(journal) + 1, steps + 1):
        record(journal, step)
    if close:
        journal.close()
    return [journal.digest_at(step) for step in range(steps + 1)]


def write_steps(
    folder: Path, acknowledged: Path, author: str, steps: int, follow_seconds: float, idle: bool, together: Barrier | None
) -> None:
    """Body of a writing process: record edits, noting each digest that `append` returned; then close, or stay idle."""
    descriptor = os.open(acknowledged, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    with EditJournal.open(folder, genesis=GENESIS, follow_seconds=follow_seconds) as journal:
        if together is not None:
            together.wait(START_SECONDS)
        for step in range(len(journal) + 1, steps + 1):
            entry = record(journal, step, author=author)
            os.write(descriptor, f"{step} {entry.digest}\n".encode())
        while idle:
            time.sleep(0.05)


def start_writer(
    folder: Path, acknowledged: Path, *, author: str, steps: int, follow_seconds: float, idle: bool = False, together: Barrier | None = None
) -> BaseProcess:
    arguments = (folder, acknowledged, author, steps, follow_seconds, idle, together)
    process = _context().Process(target=write_steps, args=arguments, daemon=True)
    process.start()
    return process


def start_writers(folder: Path, notes: Sequence[Path], *, steps: int, follow_seconds: float) -> list[BaseProcess]:
    """Start one writer a file of notes; all open the empty journal before any of them records."""
    together = _context().Barrier(len(notes) + 1)
    writers = [
        start_writer(folder, path, author=path.name, steps=steps, follow_seconds=follow_seconds, together=together) for path in notes
    ]
    together.wait(START_SECONDS)
    return writers


def _context() -> ForkServerContext:
    # forkserver: torch is imported once, and no process with threads is ever forked
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tests.edits.writers"])
    return context


def acknowledged_digests(path: Path) -> dict[int, str]:
    """Return what a process noted; a line that a kill cut short does not count."""
    if not path.exists():
        return {}
    lines = path.read_text().splitlines(keepends=True)
    return {int(line.split()[0]): line.split()[1] for line in lines if line.endswith("\n")}


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("segment-*.journal"))


@contextmanager
def flipped(path: Path, offset: int, mask: int) -> Iterator[None]:
    """Within the context one byte of the file differs by the bits in `mask`; in place, as rewriting files is slow."""
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ mask]))
        try:
            yield
        finally:
            file.seek(offset)
            file.write(byte)

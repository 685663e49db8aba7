"""Writers that are stopped and let on at every call to the disk, in many orders: what `append` returned always stands.

Processes that merely run side by side hardly ever meet in the few microseconds that matter; here they do, from a seed.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from editeval.edits import journal as journal_module
from editeval.edits.chain import Chain
from editeval.edits.journal import EditJournal
from editeval.edits.segment import Segment
from tests.edits.writers import GENESIS, record

SCHEDULES = 150
STEPS = 2
AUTHORS = "abc"
DEADLOCK_SECONDS = 60.0


class Schedule:
    """Runs one of several threads at a time; at each pause the seed says whose turn comes next."""

    def __init__(self, seed: int) -> None:
        self._order = random.Random(seed)
        self._changed = threading.Condition()
        self._running: list[int] = []
        self._turn = -1

    def run(self, bodies: Sequence[Callable[[], None]]) -> None:
        """Run the bodies to their ends; raises what one of them raised."""
        self._running = list(range(len(bodies)))
        errors: list[BaseException] = []
        threads = [threading.Thread(target=self._body, args=(number, body, errors), name=str(number)) for number, body in enumerate(bodies)]
        self._turn = self._order.choice(self._running)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def pause(self) -> None:
        """Hand the turn to any thread, this one included, and come back when it is this one's."""
        name = threading.current_thread().name
        if name.isdigit():
            with self._changed:
                self._pass_on()
                self._wait(int(name))

    def _body(self, number: int, body: Callable[[], None], errors: list[BaseException]) -> None:
        try:
            with self._changed:
                self._wait(number)
            body()
        except BaseException as error:  # noqa: BLE001 - raised again by `run`
            errors.append(error)
        with self._changed:
            self._running.remove(number)
            self._pass_on()

    def _pass_on(self) -> None:
        self._turn = self._order.choice(self._running) if self._running else -1
        self._changed.notify_all()

    def _wait(self, number: int) -> None:
        assert self._changed.wait_for(lambda: self._turn == number, DEADLOCK_SECONDS)


def pausing(function: Callable[..., Any], schedule: Schedule) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        schedule.pause()
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize("block", range(5))
def test_what_append_returned_stands_in_every_order_of_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(journal_module, "HEADER_SECONDS", 0.0)
    monkeypatch.setattr(journal_module, "POLL_SECONDS", 0.0)
    for seed in range(block * SCHEDULES // 5, (block + 1) * SCHEDULES // 5):
        schedule, folder = Schedule(seed), tmp_path / str(seed)
        journals = {author: EditJournal.open(folder, genesis=GENESIS, follow_seconds=0.0) for author in AUTHORS}
        returned: dict[str, list[str]] = {author: [] for author in AUTHORS}

        def write(author: str, journals: dict[str, EditJournal] = journals, returned: dict[str, list[str]] = returned) -> None:
            with journals[author] as journal:
                returned[author] += [record(journal, step, author=author).digest for step in range(1, STEPS + 1)]

        with monkeypatch.context() as patch:
            for owner, name in ((os, "open"), (os, "write"), (Chain, "_epochs"), (Segment, "scan")):
                patch.setattr(owner, name, pausing(getattr(owner, name), schedule))
            schedule.run([partial(write, author) for author in AUTHORS])
        history = [entry.digest for entry in EditJournal.open(folder, genesis=GENESIS).entries()]
        assert returned == dict.fromkeys(AUTHORS, history), f"schedule {seed}"

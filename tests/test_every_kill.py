"""A run that is killed before any of its file operations ends, started again, like one that never was."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from editeval.edits.journal import EditJournal
from editeval.experiment import RunResult, run
from editeval.inference.edited import EditedModel
from editeval.interfaces import Callback, EditEvent, RunState
from editeval.revisit import verify
from editeval.runner.results import ScoreStore
from editeval.runner.run_files import read_edits
from tests.sweep.commands import facts

KILLED = 9
EVERY = 3  # of the operations that are no writes, one in so many is tried; with 1, as when this was written, all
OPERATIONS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink")


def count_down(operations: int) -> list[str]:
    """Let the process die at its file operation of this number; return the names of those done, which grow.

    It dies before the operation; of a write, half is on disk by then.
    """
    done: list[str] = []

    def dying(real: Callable[..., Any], counts: Callable[..., bool]) -> Callable[..., Any]:
        def operation(*arguments: Any, **keywords: Any) -> Any:
            if counts(*arguments, **keywords):
                done.append(real.__name__)
            if len(done) == operations:
                if real is write:
                    write(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os._exit(KILLED)
            return real(*arguments, **keywords)

        return operation

    write = os.write
    for name in OPERATIONS:
        setattr(os, name, dying(getattr(os, name), lambda *_, **__: True))
    setattr(io, "open", dying(io.open, lambda _, mode="r", *__, **___: bool(set(mode) & set("wax+"))))  # noqa: B010 - as those above
    return done


def in_a_child(work: Callable[[], None]) -> int:
    """Return the exit status of a fork that does the work; nothing that it changes in memory comes back."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
    except BaseException:  # noqa: BLE001 - whatever it was, pytest must not go on in the child
        os._exit(1)
    os._exit(0)


def on_disk(folder: Path) -> tuple[object, ...]:
    """The journal's last state, every score and the steps of the edit log."""
    genesis = json.loads((folder / "manifest.json").read_text())["edit_key"]
    scores = [(score.num_edits, score.name, repr(score.value), score.state_digest) for score in ScoreStore(folder).scores()]
    with EditJournal.open(folder / "journal", genesis=genesis) as journal:
        return journal.head, scores, [(row["step"], row["weights_digest"]) for row in read_edits(folder)]


def test_a_run_killed_before_any_file_operation_ends_like_an_unbroken_one(
    compose_config: Callable[..., DictConfig], tmp_path: Path
) -> None:
    fixed = ("debug=tiny", "model=tiny-gpt2", "method=ft-l", "method.num_steps=1", "num_edits=[1,2]", "callback=silent", "logger=[csv]")
    few = ("dataset=counterfact", "dataset.subset=easyedit", f"dataset.file={facts(tmp_path)}")  # read in no time
    short = ("max_new_tokens=2", "fluency_tokens=3", "fluency_facts=1")
    measured = ("benchmark=[edit-quality]", *(f"benchmark.edit-quality.{setting}" for setting in short))

    def launched(name: str) -> RunResult:
        return run(compose_config(*fixed, *few, *measured, f"paths.runs={tmp_path / name}"))

    unbroken = launched("unbroken").run_dir
    expected, folder = on_disk(unbroken), unbroken.name
    note = tmp_path / "operations"

    def counted() -> None:
        done = count_down(-1)
        launched("counted")
        note.write_text(json.dumps(done))

    assert in_a_child(counted) == 0
    operations = json.loads(note.read_text())
    assert len(operations) > 20

    for number, operation in enumerate(operations, start=1):
        if operation != "write" and number % EVERY:
            continue
        name = f"killed-{number}"

        def killed(name: str = name, number: int = number) -> None:
            count_down(number)
            launched(name)

        assert in_a_child(killed) == KILLED
        assert launched(name).run_dir == tmp_path / name / folder
        assert on_disk(tmp_path / name / folder) == expected, f"killed at operation {number} of {len(operations)}, {operation}"
        if number % (4 * EVERY) == 0:
            assert verify(tmp_path / name / folder).passed


class DiesAfterAnEdit(Callback):
    """The process is gone as soon as an edit is in the journal."""

    def on_edit_end(self, state: RunState, event: EditEvent, model: EditedModel) -> str | None:
        os._exit(KILLED)


def test_a_run_in_batches_killed_between_two_edits_ends_like_an_unbroken_one(
    compose_config: Callable[..., DictConfig], tmp_path: Path
) -> None:
    method = (
        "method=memit",
        "method.num_steps=3",
        "method.prefix_lengths=[[3,2]]",
        "method.layers=[1,2]",
        "batch_size=2",
        "num_edits=[1,2]",
    )
    fixed = ("debug=tiny", "model=tiny-gpt2", *method, "callback=silent", "logger=[csv]")
    few = ("dataset=counterfact", "dataset.subset=easyedit", f"dataset.file={facts(tmp_path)}")
    short = ("max_new_tokens=2", "fluency_tokens=3", "fluency_facts=1")
    measured = ("benchmark=[edit-quality]", *(f"benchmark.edit-quality.{setting}" for setting in short))

    def launched(name: str, *observers: Callback) -> Path:
        return run(compose_config(*fixed, *few, *measured, f"paths.runs={tmp_path / name}"), *observers).run_dir

    unbroken = launched("unbroken")
    with EditJournal.open(unbroken / "journal", genesis=json.loads((unbroken / "manifest.json").read_text())["edit_key"]) as journal:
        written = [entry.request_ids for entry in journal.entries(0, 2)]
    assert [len(ids) for ids in written] == [2, 2]
    assert len(set(written[0] + written[1])) == 4

    def killed() -> None:
        launched("killed", DiesAfterAnEdit())

    assert in_a_child(killed) == KILLED
    resumed = launched("killed")
    assert on_disk(resumed) == on_disk(unbroken)
    assert verify(resumed).passed

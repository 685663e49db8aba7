"""Who writes a segment of the journal, and whether that writer can still be at work.

Nothing here guards the journal's content: a wrong guess costs a wait or a segment file more, never an edit.
"""

from __future__ import annotations

import os
import platform
import threading
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
ENDED_STATES = "ZX"


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A thread of a process on a machine; `token` tells apart the journals that one thread has open."""

    machine: str
    pid: int
    thread: int
    started: int
    token: str

    @classmethod
    def current(cls, *, token: str) -> Owner:
        """Return the calling thread as an owner."""
        pid, thread = os.getpid(), threading.get_native_id()
        return cls(machine=_machine(), pid=pid, thread=thread, started=_started(pid, thread) or 0, token=token)

    def may_write(self, *, token: str) -> bool:
        """Whether waiting for this owner can make sense to the journal `token` of the calling thread.

        A thread never waits for itself. On this machine the answer is exact; of another machine nothing is known, so it is True.
        """
        if self.token == token:
            return False
        if self.machine != _machine():
            return True
        if self.pid == os.getpid() and self.thread == threading.get_native_id():
            return False
        if not PROC.joinpath("self").exists():
            return _process_exists(self.pid)
        return _started(self.pid, self.thread) == self.started


def _machine() -> str:
    """Name where a process id means the same: host, boot and process id namespace."""
    names = [platform.node()]
    for path in (PROC / "sys/kernel/random/boot_id", PROC / "self/ns/pid"):
        try:
            names.append(str(path.readlink()) if path.is_symlink() else path.read_text().strip())
        except OSError:
            names.append("")
    return "/".join(names)


def _started(pid: int, thread: int) -> int | None:
    """Return when the thread started, in clock ticks after boot; None when it has ended (or is a zombie)."""
    try:
        text = (PROC / str(pid) / "task" / str(thread) / "stat").read_text()
    except OSError:
        return None
    # fields after the command, which is in parentheses and may itself hold spaces and parentheses: state is field 3, start is 22
    state, *rest = text.rpartition(")")[2].split()
    return None if state in ENDED_STATES else int(rest[18])


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""Launchers on submitit that hand in jobs and let go of them: who is at work is read from the queue and from disk, never waited for.

`hydra-submitit-launcher` composes and runs a job on the other side, and hands it in again before a time limit; here jobs are only
handed in differently: return values are not collected, so that one killed job cannot hide the others' results.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher

if TYPE_CHECKING:
    from editeval.sweep.session import Ticket

ROOT = Path(__file__).resolve().parents[2]


class InProcessLauncher(BasicLauncher):  # type: ignore[misc]  # hydra has no types
    """Runs one job after the other in this process, as Hydra does by itself; an exception in one job leaves the next to run."""


class _QueueLauncher(BaseSubmititLauncher):  # type: ignore[misc]  # hydra has no types
    """What both launchers share. `detached`: the sweep's own process may end; `tickets`: what the last jobs were handed in as."""

    INIT_SETTINGS: tuple[str, ...] = ("max_num_timeout",)

    def __init__(self, *, submitit_folder: str, detached: bool, poll_seconds: float, **params: Any) -> None:
        super().__init__(**params)
        self.folder = submitit_folder
        self.detached = detached
        self.poll_seconds = poll_seconds
        self.tickets: list[Ticket] = []

    def __call__(self, *arguments: Any, **more: Any) -> None:
        """Run one job where it was started; an error ends it as failed, with the traceback in its log."""
        result: JobReturn = super().__call__(*arguments, **more)
        _ = result.return_value  # raises what the job raised; numbers are read from disk

    def executor(self, **more: Any) -> Any:
        """Return submitit's executor with our settings; those that only Slurm knows carry its name."""
        import submitit

        params = {name: value for name, value in {**self.params, **more}.items() if value is not None}
        shared = {"timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name", "stderr_to_stdout"}
        init = {f"{self._EXECUTOR}_{name}": params.pop(name) for name in self.INIT_SETTINGS if name in params}
        made = submitit.AutoExecutor(cluster=self._EXECUTOR, folder=str(Path(self.folder).absolute()), **init)
        made.update_parameters(**{name if name in shared else f"{self._EXECUTOR}_{name}": value for name, value in params.items()})
        return made

    def hand_in(self, executor: Any, job_overrides: Sequence[Sequence[str]], first_index: int) -> list[Any]:
        """Hand in jobs at once; they can import this program wherever they start.

        Raises:
            EditevalError: the queue refuses them, with its last words.
        """
        from submitit.core.utils import FailedJobError

        from editeval.types import EditevalError

        arguments = [
            (list(overrides), "hydra.sweep.dir", index, f"job_id_for_{index}", Singleton.get_state())
            for index, overrides in enumerate(job_overrides, start=first_index)
        ]
        with _environment({"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}):
            try:
                return list(executor.map_array(self, *zip(*arguments, strict=True)))
            except FailedJobError as error:
                said = str(error).strip().splitlines()[-1:]
                raise EditevalError(f"{self._EXECUTOR} refuses the jobs ({''.join(said)}); see hydra.launcher and start again") from error

    def log_of(self, job: Any) -> str:
        """Return the file with a job's errors."""
        return str(job.paths.stdout if self.params.get("stderr_to_stdout") else job.paths.stderr)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what a job does not need and what may not travel."""
        return {**self.__dict__, "tickets": [], "_waiting_for": []}


class SlurmLauncher(_QueueLauncher):
    """Hands in each wave of a sweep as one Slurm array; a later wave starts when the earlier has ended, however it ended."""

    _EXECUTOR = "slurm"
    INIT_SETTINGS = ("max_num_timeout", "python")

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        self._waiting_for: list[str] = []

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Hand in; returns at once and returns nothing.

        Raises:
            EditevalError: there is no Slurm on this machine, or it refuses the jobs.
        """
        from editeval.sweep.session import Ticket
        from editeval.types import EditevalError

        if shutil.which("srun") is None:
            raise EditevalError("hydra/launcher=slurm needs Slurm's programs, and srun is not here; hydra/launcher=processes does without")
        additional: Mapping[str, Any] = self.params.get("additional_parameters") or {}
        if self._waiting_for:
            additional = {**additional, "dependency": ":".join(["afterany", *self._waiting_for])}
        paths = f"export PYTHONPATH={ROOT}${{PYTHONPATH:+:$PYTHONPATH}}"  # some sites do not hand the environment on
        setup = [*(self.params.get("setup") or ()), paths]
        jobs = self.hand_in(self.executor(additional_parameters=dict(additional), setup=setup), job_overrides, initial_job_idx)
        self._waiting_for = sorted({job.job_id.split("_")[0] for job in jobs})
        self.tickets = [Ticket(queue_id=job.job_id, log=self.log_of(job)) for job in jobs]
        return []


class LocalLauncher(_QueueLauncher):
    """Runs jobs as processes of this machine, `array_parallelism` at a time; each goes on if this process dies."""

    _EXECUTOR = "local"

    def __init__(self, *, array_parallelism: int, **params: Any) -> None:
        super().__init__(**params)
        self.array_parallelism = array_parallelism

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Start every job as soon as a place is free, and wait for the last; returns nothing."""
        from editeval.sweep.session import Ticket

        executor = self.executor()
        jobs: list[Any] = []
        running: list[Any] = []
        with _surviving_hangup():
            for index, overrides in enumerate(job_overrides, start=initial_job_idx):
                running = self._below(running, self.array_parallelism)
                running += self.hand_in(executor, [overrides], index)
                jobs.append(running[-1])
        self.tickets = [Ticket(queue_id=None, log=self.log_of(job)) for job in jobs]
        if not self.detached:
            self._below(running, 1)
        return []

    def _below(self, running: list[Any], limit: int) -> list[Any]:
        """Wait until fewer than `limit` jobs run and return them."""
        while len(running := [job for job in running if not job.done()]) >= limit:
            time.sleep(self.poll_seconds)
        return running


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _surviving_hangup() -> Iterator[None]:
    """Processes started here inherit that a lost terminal does not end them."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)

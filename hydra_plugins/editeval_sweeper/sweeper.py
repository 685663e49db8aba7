"""The default sweeper: one trajectory, one job. Its decisions are made in `editeval.sweep`; this file speaks to Hydra."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from editeval.sweep.plan import Axis, Defaults, Job


class TrajectorySweeper(Sweeper):  # type: ignore[misc]  # hydra has no types
    """Folds the grid, shows the plan, leaves out what is done, launches the rest, and fails at the end if a job failed.

    Settings: `conf/hydra/sweeper/trajectory.yaml`.
    """

    def __init__(
        self,
        params: Mapping[str, Any] | None = None,
        max_cells_per_job: int | None = None,
        plan_only: bool = False,
        skip_done: bool = True,
        only: Sequence[str] | None = None,
    ) -> None:
        self._params: dict[str, Any] = {str(key): value for key, value in (params or {}).items()}
        self._max_cells = max_cells_per_job
        self._plan_only = plan_only
        self._skip_done = skip_done
        self._only = None if only is None else frozenset(map(str, only))
        self._config: DictConfig
        self._context: HydraContext
        self._launcher: Launcher
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra hands over what a sweeper works with."""
        self._context, self._config = hydra_context, config
        self._launcher = Plugins.instance().instantiate_launcher(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        """Run the sweep.

        Raises:
            HydraException: the grid does not compose; nothing was launched.
            SystemExit: a job failed; the others have run.
        """
        from editeval.build import folder
        from editeval.sweep.session import Session
        from editeval.types import EditevalError, counted

        try:
            jobs = self._jobs(arguments)
            runs = folder(self._config.paths.runs, "paths.runs")
            session = Session.begin(runs, jobs, command=sys.argv, only=self._only, skip_done=self._skip_done)
        except EditevalError as error:
            sys.exit(f"error: {error}")
        session.show_plan({job.id: self._names(job) for job in jobs})
        if self._plan_only or not session.to_launch:
            return
        session.keep()
        os.environ.setdefault("WANDB_RUN_GROUP", session.record.sweep)  # what W&B itself reads; jobs inherit it
        detached = getattr(self._launcher, "detached", None)
        if detached is False:  # what jobs say goes to files, and this process waits
            session.say(f"starting {counted(len(session.to_launch), 'job')}; to see how far they are: {session.status_command}")
        try:
            failures = self._launch(session.to_launch, session)
        except EditevalError as error:
            sys.exit(f"error: {error}")
        if detached:
            session.say(f"submitted {counted(len(session.to_launch), 'job')}; they go on without this process: {session.status_command}")
            return
        found = session.finish()
        if failures or any(status.state == "failed" for status in found):
            sys.exit(1)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _jobs(self, arguments: Sequence[str]) -> tuple[Job, ...]:
        from editeval.sweep.plan import fold, split

        given = [f"{key}={_text(value)}" for key, value in self._params.items()] + list(arguments)
        axes = [_axis(override) for override in OverridesParser.create(config_loader=self._context.config_loader).parse_overrides(given)]
        jobs = split(fold([axis for axis in axes if not axis.key.startswith("hydra")], self._defaults), self._max_cells)
        self._check(jobs)
        return jobs

    @cached_property
    def _groups(self) -> frozenset[str]:
        from editeval.sweep.source import groups_that_set_everything

        return groups_that_set_everything()

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        """Compose what can set `num_edits` or `benchmark`; a tenth of a second each, so nothing else, and nothing twice."""
        key = tuple(text for text in overrides if text.split("=", 1)[0] in self._groups)
        if key not in self._composed:
            self._composed[key] = self._context.config_loader.load_sweep_config(self._config, list(key))
        return self._composed[key]

    def _defaults(self, overrides: Sequence[str]) -> Defaults:
        from editeval.sweep.plan import Defaults, counts_of

        config = self._compose(overrides)
        return Defaults(
            num_edits=counts_of(OmegaConf.to_container(config)["num_edits"]),  # type: ignore[index, call-overload]
            benchmarks=tuple(map(str, config.get("benchmark") or ())),
        )

    def _names(self, job: Job) -> tuple[str, str]:
        """Return the names of the model and the method of a job."""
        own = dict(text.split("=", 1) for text in job.overrides if "=" in text)
        choices = self._compose(job.overrides).hydra.runtime.choices
        return own.get("model", str(choices.model)), own.get("method", str(choices.method))

    def _check(self, jobs: Sequence[Job]) -> None:
        """Compose as many jobs as it takes to see each choice of each group, and each key, once."""
        groups = set(self._context.config_loader.list_groups(""))
        seen: set[str] = set()
        for job in jobs:
            parts = {text if (key := text.split("=", 1)[0]) in groups else key for text in job.overrides}
            if not parts <= seen:
                seen |= parts
                self._context.config_loader.load_sweep_config(self._config, list(job.overrides))

    def _launch(self, jobs: Sequence[Job], session: Any) -> int:
        """Launch leaders, then those that follow them; return how many jobs failed as far as is known."""
        failures = 0
        for wave in ([job for job in jobs if job.leads], [job for job in jobs if not job.leads]):
            if not wave:
                continue
            returns = self._launcher.launch([list(job.overrides) for job in wave], initial_job_idx=session.next_index(len(wave)))
            tickets = getattr(self._launcher, "tickets", None)
            if tickets is not None:
                session.submitted(wave, tickets)
                if not self._launcher.detached:
                    session.wait(wave, self._launcher.poll_seconds)
            for job, one in zip(wave, returns, strict=False):
                failures += _failed(job, one, session)
        return failures


def _text(value: Any) -> str:
    """Return a value of `params` as the command line would say it: a list is swept over."""
    return ",".join(map(str, value)) if OmegaConf.is_list(value) or isinstance(value, list) else str(value)


def _failed(job: Job, result: Any, session: Any) -> bool:
    """Say what a job failed with; the others have run."""
    try:
        _ = result.return_value
    except Exception as error:  # noqa: BLE001 - whatever one job raised, the others count
        session.say(f"job {job.id} failed: {type(error).__name__}: {error}")
        return True
    return False


def _axis(override: Override) -> Axis:
    from editeval.sweep.plan import Axis

    key = override.get_key_element()
    if not override.is_sweep_override():
        return Axis(key=key, values=(override.get_value_element_as_str(),))
    if not override.is_discrete_sweep():
        raise HydraException(f"{key}: only lists, range() and glob() can be swept; got {override.input_line}")
    return Axis(key=key, values=tuple(override.sweep_string_iterator()))

"""Benchmarks that lm-evaluation-harness scores (https://github.com/EleutherAI/lm-evaluation-harness, 0.4.13).

The harness renders prompts, calls the model and aggregates; only the engine under it is ours, so that edits are seen and
every number of a run comes from the same forward pass. Tasks and their requests are built once for each benchmark object and
reused at every rung. This is the only file that imports lm_eval, and it does so inside functions: that import is slow.

    >>> from editeval.benchmarks.lm_harness import harness_model     # doctest: +SKIP
    >>> lm_eval.simple_evaluate(model=harness_model(edited), tasks=["piqa"])   # doctest: +SKIP
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from editeval.benchmarks.estimates import bootstrap_stderr
from editeval.benchmarks.harness_engine import HarnessRequests
from editeval.benchmarks.harness_guard import Replacement, guarded
from editeval.benchmarks.harness_results import item_records, measurements
from editeval.benchmarks.local_data import LocalData, files_hash
from editeval.benchmarks.subset import stratified_subset
from editeval.inference.edited import EditedModel
from editeval.interfaces import EvaluationContext
from editeval.types import ConfigError, DatasetError, Evaluation, Progress, SilentProgress

VERSION = "1"  # raised whenever the same model, tasks and data would give other numbers
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@dataclass(frozen=True, kw_only=True)
class HarnessBenchmark:
    """One or more tasks, groups or tags of lm-eval.

    Tasks are looked up in `task_folder` (YAML files of one's own), else in `stock_folder` (a folder inside lm-eval's own tasks),
    else in all of lm-eval (indexing takes five seconds). With `data`, rows come from `<data>/<data_folder>[/<config>]/<split>.jsonl`
    and no network call is made. `limit` is a number of items a task: a seeded subset, stratified by label, the same at every rung.
    A group is one set of numbers; `report_subtasks` adds those of its sub-groups and tasks.
    """

    name: str
    tasks: Sequence[str]
    protocol: str
    task_folder: str | None
    stock_folder: str | None
    data: str | None
    data_folder: str | None
    limit: int | None
    num_fewshot: int | None
    report_subtasks: bool
    seed: int

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ConfigError(f"benchmark {self.name} names no task; set benchmark.{self.name}.tasks")
        for field, lowest in (("limit", 1), ("num_fewshot", 0)):
            value = getattr(self, field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < lowest):
                raise ConfigError(f"benchmark.{self.name}.{field}={value!r} must be a whole number of at least {lowest}, or null")

    @property
    def depends_on_requests(self) -> bool:
        """False: the questions are the same whatever was edited."""
        return False

    def settings(self) -> Mapping[str, Any]:
        """Return what the numbers depend on beside the model; needs no lm-eval import."""
        folder = self._folder()
        return {
            "benchmark": "lm-eval",
            "version": VERSION,
            "lm_eval": version("lm_eval"),
            "tasks": list(self.tasks),
            "task_files": None if folder is None else files_hash(folder, "**/*.yaml", "**/*_yaml", "**/*.py"),
            "data": "hub" if self._local_data is None else self._local_data.content_hash,
            "protocol": self.protocol,
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "report_subtasks": self.report_subtasks,
            "seed": self.seed,
        }

    def check(self) -> None:
        """Find every task and read every row.

        Raises:
            ConfigError: an unknown task or folder.
            DatasetError: a missing split or a damaged file; or, without `data`, a data set that the hub does not give.
        """
        if self._local_data is None:
            _ = self._loaded  # the only proof that the hub can be reached is to fetch
            return
        with self._guarded():
            for task in self._local_tasks(self._task_manager(), self._local_data):
                for path in task.files.values():
                    self._local_data.rows(path)

    def evaluate(self, model: EditedModel, context: EvaluationContext) -> Evaluation:
        """Put every item of every task to the model."""
        from lm_eval.evaluator import evaluate

        loaded, chosen = self._loaded, self._chosen
        engine = harness_model(model, progress=context.progress, description=self.name)
        with self._guarded():
            results = evaluate(lm=engine, task_dict=loaded, samples=chosen, bootstrap_iters=1000)
            # Within the guard: even asking a task for its name draws from the global generator.
            names = self._reported(loaded)
            return Evaluation(
                measurements=tuple(measurements(results, loaded, names, protocol=self.protocol)),
                samples=tuple(item_records(results, loaded)),
            )

    def _guarded(self) -> AbstractContextManager[None]:
        """Return the context in which the harness's code runs: quiet, without side effects, templates compiled once."""
        from lm_eval import utils
        from lm_eval.api import metrics, task

        compiled: dict[str, Any] = {}

        def render(template: str, row: Mapping[str, Any]) -> str:
            # The harness compiles a template at every use: 97% of the time that building MMLU's prompts takes.
            if template not in compiled:
                compiled[template] = utils.env.from_string(template)
            return str(compiled[template].render(**row))

        return guarded(
            self.seed,
            (
                Replacement(owner=utils, name="apply_template", value=render),
                Replacement(owner=task, name="tqdm", value=lambda items, **_: items),  # one bar a task, in the middle of our display
                Replacement(owner=metrics, name="bootstrap_stderr", value=bootstrap_stderr),  # prints, and forks a pool
            ),
        )

    # -- tasks ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _local_data(self) -> LocalData | None:
        if self.data is None:
            return None
        if self.data_folder is None:
            raise ConfigError(
                f"paths.data is set, but benchmark {self.name} does not say which folder in it; set benchmark.{self.name}.data_folder"
            )
        return LocalData(folder=Path(self.data) / self.data_folder)

    def _folder(self) -> Path | None:
        """Return the folder whose task files are read; None for all of lm-eval."""
        if self.task_folder is not None:
            folder = Path(self.task_folder)
        elif self.stock_folder is not None:
            folder = _stock_tasks() / self.stock_folder
        else:
            return None
        if not folder.is_dir():
            raise ConfigError(f"benchmark {self.name}: no task folder {folder}; set benchmark.{self.name}.task_folder or .stock_folder")
        return folder

    def _task_manager(self) -> Any:
        """Return lm-eval's index of tasks, in which every asked name is."""
        from lm_eval.tasks import TaskManager

        folder = self._folder()
        manager = TaskManager(include_defaults=folder is None, include_path=None if folder is None else str(folder))
        for name in self.tasks:
            if name not in manager.task_index:
                near = difflib.get_close_matches(name, manager.all_tasks, n=3)
                where = folder or "lm-eval"
                hint = f"did you mean {', '.join(near)}?" if near else f"{where} has {', '.join(manager.all_tasks[:8])}"
                raise ConfigError(f"benchmark {self.name}: no task {name!r} in {where}; {hint}")
        return manager

    def _local_tasks(self, manager: Any, data: LocalData) -> Iterator[_LocalTask]:
        """Yield every asked task with its rows read from local files.

        Raises:
            DatasetError: a split that the task needs has no file.
        """
        for name in _leaves(manager.task_index, self.tasks):
            yield self._localised(manager.task_index[name], data)

    def _localised(self, entry: Any, data: LocalData) -> _LocalTask:
        """Point one task at its files; a split without a file is dropped where it is not needed."""
        from lm_eval.tasks._yaml_loader import load_yaml

        if entry.yaml_path is None or "class" in entry.cfg:
            raise ConfigError(f"task {entry.name} is Python code that fetches its own data; leave paths.data out, or choose a YAML task")
        config: dict[str, Any] = load_yaml(entry.yaml_path)
        files = data.splits(config.get("dataset_name"))
        fewshot = dict(config.get("fewshot_config") or {})
        needed = [config.get("test_split") or config.get("validation_split")]
        if self._shots(config) > 0 and "samples" not in fewshot:
            sources = (fewshot.get("split"), config.get("fewshot_split"), config.get("training_split"), config.get("validation_split"))
            needed.append(next((source for source in sources if source), needed[0]))
        for split in needed:
            if split not in files:
                folder = next(iter(files.values())).parent
                raise DatasetError(
                    f"task {entry.name} needs split {split!r}, but {folder} holds {', '.join(files)}; add {split}.jsonl there"
                )
        if fewshot.get("split") not in files:
            fewshot.pop("split", None)
        kept = {key: config[key] if config.get(key) in files else None for key in _SPLITS}
        used = {split: files[split] for split in {*kept.values(), *needed} if split is not None}
        source = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": None, "custom_dataset": _reader(data, used)}
        local = config | kept | source | ({"fewshot_config": fewshot} if fewshot else {})
        return _LocalTask(name=entry.name, config=local, files=used)

    def _shots(self, config: Mapping[str, Any]) -> int:
        """Return the number of shots, by the harness's rule: a task that fixes zero keeps it."""
        own = config.get("num_fewshot")
        return int(own or 0) if self.num_fewshot is None or own == 0 else self.num_fewshot

    @cached_property
    def _loaded(self) -> Mapping[str, Any]:
        """The task and group objects, with their rows; built once."""
        with self._guarded():
            manager = self._task_manager()
            for local in self._local_tasks(manager, self._local_data) if self._local_data else ():
                manager.task_index[local.name] = replace(manager.task_index[local.name], yaml_path=None, cfg=local.config)
            try:
                loaded: Mapping[str, Any] = manager.load(list(self.tasks))
            except OSError as error:
                raise DatasetError(f"benchmark {self.name}: cannot fetch its data ({error}); set paths.data to a local copy") from error
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=self._shots({"num_fewshot": task.get_config("num_fewshot")}))
            task.set_fewshot_seed(seed=self.seed)
            _build_requests_once(task)
        return loaded

    @cached_property
    def _chosen(self) -> dict[str, list[int]] | None:
        """Task name -> indices of the items to ask; None for all."""
        if self.limit is None:
            return None
        with self._guarded():
            labels = {name: [str(task.doc_to_target(row)) for row in task.eval_docs] for name, task in self._loaded["tasks"].items()}
        return {name: stratified_subset(rows, self.limit, seed=self.seed, name=name) for name, rows in labels.items()}

    def _reported(self, loaded: Mapping[str, Any]) -> list[str]:
        """Return the groups and tasks whose numbers are measurements: those that no aggregated group sums up, or all of them."""
        groups = {name: group for name, group in loaded.get("groups", {}).items() if group.has_aggregation}
        if self.report_subtasks:
            return [*groups, *loaded["tasks"]]
        inner = {part.name for group in groups.values() for part in group.get_all_groups()}
        inner |= {task.task_name for group in groups.values() for task in group.get_all_tasks()}
        return [name for name in (*groups, *loaded["tasks"]) if name not in inner]


@dataclass(frozen=True, kw_only=True)
class _LocalTask:
    """A task whose rows are local: its config for the harness, and the files it reads."""

    name: str
    config: Mapping[str, Any]
    files: Mapping[str, Path]


def harness_model(model: EditedModel, *, progress: Progress | None = None, description: str = "lm-eval") -> Any:
    """Return the model as an `lm_eval.api.model.LM`, for any function of the harness."""
    from lm_eval.api.model import LM

    # The base class is known only here: importing it at the top would load all of lm-eval with this module.
    engine = type("EditevalLM", (HarnessRequests, LM), {})
    return engine(model, progress=progress or SilentProgress(), description=description)


def _stock_tasks() -> Path:
    spec = find_spec("lm_eval")  # finds the package without importing it
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "tasks"


def _leaves(index: Mapping[str, Any], names: Iterable[str]) -> Iterator[str]:
    """Yield the tasks below these names of tasks, groups and tags."""
    for name in names:
        entry = index[name]
        members = entry.cfg.get("task") if entry.cfg and "group" in entry.cfg else sorted(entry.tags) if entry.cfg is None else None
        if isinstance(members, list):
            inner = [member if isinstance(member, str) else member.get("task", member.get("group")) for member in members]
            yield from _leaves(index, [member for member in inner if member in index])
        else:
            yield name


def _reader(data: LocalData, files: Mapping[str, Path]) -> Any:
    """Return a function that reads the splits; a function, because the harness copies configs and would copy rows with them."""

    def read(**_: object) -> dict[str, Any]:
        from datasets import Dataset

        return {split: Dataset.from_list(data.rows(path)) for split, path in files.items()}

    return read


def _build_requests_once(task: Any) -> None:
    """Make a task render its prompts at the first evaluation only; later ones start from the same requests, unanswered."""
    build = task.build_all_requests
    built = False

    def reuse(**arguments: Any) -> None:
        nonlocal built
        if not built:
            build(**arguments)
            built = True
        for instance in task.instances:
            instance.resps = []
            instance.filtered_resps = {}

    task.build_all_requests = reuse

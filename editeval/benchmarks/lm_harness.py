"""Benchmarks that lm-evaluation-harness scores (https://github.com/EleutherAI/lm-evaluation-harness, 0.4.13).

The harness renders prompts, calls the model and aggregates; only the engine under it is ours, so that edits are seen and
every number of a run comes from the same forward pass. Tasks and their requests are built once for each benchmark object and
reused at every rung. This is the only file that imports lm_eval, and it does so inside functions: that import is slow.

    >>> from editeval.benchmarks.lm_harness import harness_model     # doctest: +SKIP
    >>> lm_eval.simple_evaluate(model=harness_model(edited), tasks=["piqa"])   # doctest: +SKIP
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from editeval.benchmarks.estimates import bootstrap_stderr
from editeval.benchmarks.harness_engine import HarnessRequests
from editeval.benchmarks.harness_fit import ON_LONG_CONTEXT, check_answers, check_contexts_fit, check_no_nulls, rows_become_prompts
from editeval.benchmarks.harness_guard import Replacement, guarded
from editeval.benchmarks.harness_results import Reading, item_records, measurements, reported
from editeval.benchmarks.harness_tasks import (
    BUILT_IN,
    RunnableTask,
    TaskRules,
    build_requests_once,
    leaves,
    own_files_hash,
    task_folders,
)
from editeval.benchmarks.subset import stratified_subset
from editeval.files import files_hash, write_jsonl
from editeval.inference.edited import EditedModel
from editeval.inference.endings import NO_EARLY_STOPS, EarlyStops
from editeval.interfaces import EvaluationContext
from editeval.models.prompt_format import CHAT, RAW, chat_text, check_format, check_template
from editeval.types import ConfigError, DatasetError, Evaluation, Progress, SilentProgress

VERSION = "6"  # raised whenever the same model, tasks and data would give other numbers


@dataclass(frozen=True, kw_only=True)
class HarnessBenchmark:
    """One or more tasks, groups or tags of lm-eval, asked in one protocol.

    Tasks are looked up in `task_folder` (YAML files of one's own, or a folder inside `tasks/` of this room) and `stock_folder` (a
    folder inside lm-eval's own tasks), else in all of lm-eval (indexing takes five seconds). `task_changes` replace fields of every
    task's config, `group_changes` of every group that is named.
    With `data`, rows come from `<data>/<data_folder>[/<config>]/<split>.jsonl` (`built-in`: in the package) and no network call is made.
    `limit` is a number of items a task: a seeded subset, stratified by label, the same at every rung. A group is one set of numbers;
    `report_subtasks` adds those of its sub-groups and tasks. `chance` is what guessing scores on an item: a number, or a Jinja template
    over its row; where the choices themselves tell (None), nothing need be said. `max_new_tokens` replaces the task's own bound.
    `prompt_format` other than `chat` leaves prompts as the task writes them: they are questions already.

    `loop_repeats` and `answer_pattern` (see `EarlyStops`) end a written answer before its bound, so that a collapsed model costs less.
    Off, texts are those of lm-eval's own engine. On, the scored fields stay in practice, but greedy decoding could in principle leave a
    loop, and what another filter of the task reads behind the answer is cut off; `degenerate_rate` and `unended_rate`
    look at the text as it was ended.
    """

    name: str
    task: str | Sequence[str]
    protocol: str
    task_folder: str | None
    stock_folder: str | None
    data: str | None
    data_folder: str | None
    limit: int | None
    num_fewshot: int | None
    report_subtasks: bool
    seed: int
    chance: float | str | None = None
    max_new_tokens: int | None = None
    loop_repeats: int | None = None
    answer_pattern: str | None = None
    prompt_format: str = RAW
    on_long_context: str = "error"
    task_changes: Mapping[str, Any] = field(default_factory=dict)
    group_changes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_format(self.prompt_format)
        try:
            _ = self._early
        except ConfigError as error:
            raise ConfigError(f"benchmark.{self.name}.{error}") from error
        if not self.task:
            raise ConfigError(f"benchmark {self.name} names no task; set benchmark.{self.name}.task")
        if self.on_long_context not in ON_LONG_CONTEXT:
            raise ConfigError(f"benchmark.{self.name}.on_long_context={self.on_long_context!r}; one of {', '.join(ON_LONG_CONTEXT)}")
        for setting, lowest in (("limit", 1), ("num_fewshot", 0), ("max_new_tokens", 1)):
            value = getattr(self, setting)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < lowest):
                raise ConfigError(f"benchmark.{self.name}.{setting}={value!r} must be a whole number of at least {lowest}, or null")

    @property
    def depends_on_requests(self) -> bool:
        """False: the questions are the same whatever was edited."""
        return False

    @property
    def asks_in_chat(self) -> bool:
        """Whether prompts are put in the model's chat template."""
        return self.prompt_format == CHAT

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks, groups and tags that are asked."""
        return (self.task,) if isinstance(self.task, str) else tuple(self.task)

    def settings(self) -> Mapping[str, Any]:
        """Return what the numbers depend on beside the model; needs no lm-eval import where `data` and `data_folder` are set."""
        early = {"loop_repeats": self.loop_repeats, "answer_pattern": self.answer_pattern}
        return {
            "benchmark": "lm-eval",
            "version": VERSION,
            "lm_eval": version("lm_eval"),
            "tasks": list(self.tasks),
            "task_files": [files_hash(folder, "**/*.yaml", "**/*_yaml", "**/*.py") for folder in self._folders],
            "task_changes": dict(self.task_changes),
            "group_changes": dict(self.group_changes),
            "data": self._data_hash(),
            "protocol": self.protocol,
            "chance": self.chance,
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "max_new_tokens": self.max_new_tokens,
            "chat": self.asks_in_chat,
            "on_long_context": self.on_long_context,
            "report_subtasks": self.report_subtasks,
            "seed": self.seed,
            # Only where they are on: what was measured without them keeps its key.
            **{name: value for name, value in early.items() if value is not None},
        }

    def check(self) -> None:
        """Find every task and read every row.

        Raises:
            ConfigError: an unknown task or folder.
            DatasetError: a missing split, a damaged file or a row that lacks what the task asks of it; or, without `data`, a data set
                that the hub does not give.
        """
        if self.data is None:
            _ = self._loaded  # the only proof that the hub can be reached is to fetch
            return
        from lm_eval.utils import env

        with self._guarded():
            for task, config in self._runnable(self._task_manager()):
                for path in task.files.values():
                    rows = self._rules.local_data(config).numbered_rows(path)
                    check_no_nulls(task.config, rows, task=task.name, file=path, env=env)

    def fetch(self, folder: Path) -> tuple[Path, ...]:
        """Copy the rows that the tasks need from the hub to where `data=folder` finds them; return the files.

        None where they come with the package.

        Raises:
            ConfigError: an unknown task.
            DatasetError: a data set that the hub does not give.
        """
        if self.data == BUILT_IN:
            return ()
        online = replace(self, data=None)
        tasks = online._loaded["tasks"]
        with self._guarded():
            needed = [
                (tasks[task.name].dataset[split], folder / self._rules.file_of(config, split))
                for task, config in online._runnable(online._task_manager())
                for split in self._rules.needed_splits(config)
            ]
        files = {path: rows for rows, path in needed}  # several tasks may read the same file
        for path, rows in files.items():
            write_jsonl(path, rows)
        return tuple(files)

    def check_model(self, model: EditedModel) -> None:
        """Render every prompt, once for all rungs and models that read the same, and see that this model can read it.

        Raises:
            ConfigError: a prompt that is too long under `on_long_context=error`, or a chat template that is missing or refuses it.
            DatasetError: a row of which the task makes no prompt.
        """
        if self.asks_in_chat:
            check_template(model.lm.tokenizer, name=model.lm.description.name)
        engine = harness_model(model)
        chat = {"apply_chat_template": True, "chat_template": engine.apply_chat_template} if self.asks_in_chat else {}
        # A template may write the tokenizer's own tokens, so that its text alone does not tell.
        asked_in = (model.lm.fingerprint, str(model.lm.tokenizer.chat_template)) if self.asks_in_chat else (RAW,)
        loaded, chosen = self._loaded, self._chosen
        with self._guarded(), rows_become_prompts(self.name):
            for name, task in loaded["tasks"].items():
                task.build_all_requests(asked_in=asked_in, samples=None if chosen is None else chosen[name], **chat)
            if not self._readable_by:  # answers are the same for every model, and are looked at once
                for name, task in loaded["tasks"].items():
                    check_answers(task, None if chosen is None else chosen[name])
        readable_by = (model.lm.fingerprint, model.lm.description.max_positions, asked_in)
        if self.on_long_context == "error" and readable_by not in self._readable_by:
            requests = [request for task in loaded["tasks"].values() for request in task.instances]
            check_contexts_fit(model, requests, benchmark=self.name)
        self._readable_by.add(readable_by)

    def evaluate(self, model: EditedModel, context: EvaluationContext) -> Evaluation:
        """Put every item of every task to the model."""
        from lm_eval.evaluator import evaluate

        self.check_model(model)
        loaded, chosen = self._loaded, self._chosen
        engine = harness_model(model, progress=context.progress, description=self.name, early=self._early)
        with self._guarded():
            results = evaluate(lm=engine, task_dict=loaded, samples=chosen, bootstrap_iters=1000)
            # Within the guard: even asking a task for its name draws from the global generator.
            names = reported(loaded, subtasks=self.report_subtasks)
            reading = self._reading(model)
            return Evaluation(
                measurements=tuple(measurements(results, loaded, names, reading)),
                samples=tuple(item_records(results, loaded, reading, with_questions=model.is_unedited)),
            )

    @property
    def _early(self) -> EarlyStops:
        return EarlyStops(loop_repeats=self.loop_repeats, answer_pattern=self.answer_pattern)

    def _reading(self, model: EditedModel) -> Reading:
        tokenizer = model.lm.tokenizer
        return Reading(
            protocol=self.protocol,
            chance=None if self.chance is None else self._chance_of,
            prompt=str(tokenizer.chat_template) if self.asks_in_chat else RAW,
            tokens=lambda text: tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]),
        )

    def _chance_of(self, row: Mapping[str, Any]) -> float:
        from lm_eval.utils import apply_template

        if not isinstance(self.chance, str):
            return float(self.chance or 0)
        try:
            return float(apply_template(self.chance, dict(row)))
        except ValueError as error:
            raise ConfigError(f"benchmark.{self.name}.chance gives no number for an item: {error}; correct the template") from error

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

    @property
    def _rules(self) -> TaskRules:
        return TaskRules(
            benchmark=self.name,
            changes=self.task_changes,
            max_new_tokens=self.max_new_tokens,
            num_fewshot=self.num_fewshot,
            data=self.data,
            data_folder=self.data_folder,
        )

    def _data_hash(self) -> Any:
        """Return what tells the rows apart: hashes of the local files, or the word that they are the hub's.

        Without `data`, a task may still name files of its own.
        """
        if self.data is None:
            own = [own_files_hash({**config, **self.task_changes}) for _, config in self._configs(self._task_manager())]
            return own if any(own) else "hub"
        if self.data_folder is not None:
            return self._rules.local_data({}).content_hash
        with self._guarded():
            folders = {self._rules.local_data(config).folder for _, config in self._runnable(self._task_manager())}
        return [files_hash(folder, "**/*.jsonl") for folder in sorted(folders)]

    @property
    def _folders(self) -> list[Path]:
        """The folders whose task files are read; none for all of lm-eval."""
        return task_folders(self.name, task_folder=self.task_folder, stock_folder=self.stock_folder)

    def _task_manager(self) -> Any:
        """Return lm-eval's index of tasks, in which every asked name is, with the groups as they are run."""
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks._yaml_loader import load_yaml

        folders = self._folders
        manager = TaskManager(include_defaults=False, include_path=[str(folder) for folder in folders]) if folders else _every_task()
        for name in self.tasks:
            if name not in manager.task_index:
                near = difflib.get_close_matches(name, manager.all_tasks, n=3)
                where = " and ".join(map(str, folders)) or "lm-eval"
                hint = f"did you mean {', '.join(near)}?" if near else f"{where} has {', '.join(manager.all_tasks[:8])}"
                raise ConfigError(f"benchmark {self.name}: no task {name!r} in {where}; {hint}")
            entry = manager.task_index[name]
            if self.group_changes and entry.cfg is not None and "group" in entry.cfg:
                changed = {**load_yaml(entry.yaml_path), **self.group_changes}
                manager.task_index[name] = replace(entry, yaml_path=None, cfg=changed)
        return manager

    def _runnable(self, manager: Any) -> Iterator[tuple[RunnableTask, Mapping[str, Any]]]:
        """Yield every asked task as it is run, and its config as the harness has it."""
        for name, config in self._configs(manager):
            yield self._rules.runnable(name, config), config

    def _configs(self, manager: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield every asked task's name, and its config as the harness has it."""
        from lm_eval.tasks._yaml_loader import load_yaml

        for name in leaves(manager.task_index, self.tasks):
            entry = manager.task_index[name]
            yield name, entry.cfg if entry.yaml_path is None else load_yaml(entry.yaml_path)

    @cached_property
    def _loaded(self) -> Mapping[str, Any]:
        """The task and group objects, with their rows; built once."""
        with self._guarded():
            manager = self._task_manager()
            if self._rules.changes_something:
                for task, _ in list(self._runnable(manager)):
                    manager.task_index[task.name] = replace(manager.task_index[task.name], yaml_path=None, cfg=task.config)
            try:
                with rows_become_prompts(self.name) if self.data is not None else nullcontext():
                    loaded: Mapping[str, Any] = manager.load(list(self.tasks))
            except (OSError, ValueError, KeyError) as error:  # no network, no such set, no such split
                if self.data is not None:
                    raise
                raise DatasetError(f"benchmark {self.name}: cannot fetch its data ({error}); set paths.data to a local copy") from error
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=self._rules.shots({"num_fewshot": task.get_config("num_fewshot")}))
            task.set_fewshot_seed(seed=self.seed)
            build_requests_once(task)
        return loaded

    @cached_property
    def _readable_by(self) -> set[tuple[str, int, tuple[str, ...]]]:
        """The models, their positions and what they were asked in, that the prompts were checked for: room, where it is asked for."""
        return set()

    @cached_property
    def _chosen(self) -> dict[str, list[int]] | None:
        """Task name -> indices of the items to ask; None for all."""
        if self.limit is None:
            return None
        with self._guarded():
            tasks = self._loaded["tasks"]
            with rows_become_prompts(self.name):
                labels = {name: [str(task.doc_to_target(row)) for row in task.eval_docs] for name, task in tasks.items()}
        return {name: stratified_subset(rows, self.limit, seed=self.seed, name=name) for name, rows in labels.items()}


def harness_model(
    model: EditedModel, *, progress: Progress | None = None, description: str = "lm-eval", early: EarlyStops = NO_EARLY_STOPS
) -> Any:
    """Return the model as an `lm_eval.api.model.LM`, for any function of the harness."""
    from lm_eval.api.model import LM

    def apply_chat_template(turns: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        return chat_text(model.lm.tokenizer, turns, name=model.lm.description.name, begin_answer=add_generation_prompt)

    # The base class is known only here: importing it at the top would load all of lm-eval with this module.
    chat = {"apply_chat_template": staticmethod(apply_chat_template), "tokenizer_name": model.lm.fingerprint}
    engine = type("EditevalLM", (HarnessRequests, LM), chat)
    return engine(model, progress=progress or SilentProgress(), description=description, early=early)


@cache
def _index_of_every_task() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _every_task() -> Any:
    """Return lm-eval's index of its own tasks, to be changed freely: reading their 13,000 files takes five seconds, so it is done once."""
    manager = copy(_index_of_every_task())
    manager._index = dict(manager.task_index)
    return manager

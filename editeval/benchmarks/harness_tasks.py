"""Which tasks of the harness are run, from what folders and config: changes of ours, and rows from local files.

Nothing here imports lm_eval; the index of tasks and the YAML reader come from `lm_harness.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from editeval.benchmarks.harness_engine import LENGTH_BOUNDS
from editeval.benchmarks.local_data import SUFFIX, LocalData
from editeval.files import file_sha256
from editeval.types import ConfigError, DatasetError, content_key

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
OUR_TASKS = Path(__file__).parent / "tasks"
OUR_DATA = Path(__file__).parent / "data"
BUILT_IN = "built-in"  # in place of a folder of data: what comes with the package


@dataclass(frozen=True, kw_only=True)
class RunnableTask:
    """A task's config as it is run; `files` are the local files it reads, by split (none: from the hub)."""

    name: str
    config: Mapping[str, Any]
    files: Mapping[str, Path]


@dataclass(frozen=True, kw_only=True)
class TaskRules:
    """How the config of a task in the harness becomes the one that is run.

    `changes` replace whole fields of it. `data` is the folder of local data sets (None: the hub; `BUILT_IN`: the package's), `data_folder`
    the one inside it (None: named like the task's data set on the hub).
    """

    benchmark: str
    changes: Mapping[str, Any]
    max_new_tokens: int | None
    num_fewshot: int | None
    data: str | None
    data_folder: str | None

    @property
    def changes_something(self) -> bool:
        """Whether any task is run otherwise than the harness would load it."""
        return bool(self.changes) or self.max_new_tokens is not None or self.data is not None

    def runnable(self, name: str, config: Mapping[str, Any]) -> RunnableTask:
        """Return the task as it is run.

        Raises:
            ConfigError: it is Python code, which brings its own data.
            DatasetError: a split that it needs has no file; one without a file is dropped where it is not needed.
        """
        if "class" in config:
            raise ConfigError(
                f"task {name} is Python code that fetches its own data; set benchmark.{self.benchmark}.data=null, or choose a YAML task"
            )
        changed = {**config, **self.changes}
        if self.max_new_tokens is not None and changed.get("output_type") == "generate_until":
            kept = {key: value for key, value in (changed.get("generation_kwargs") or {}).items() if key not in LENGTH_BOUNDS}
            changed["generation_kwargs"] = {**kept, "max_gen_toks": self.max_new_tokens}
        if self.data is None:
            return RunnableTask(name=name, config=changed, files={})
        return self._localised(name, changed)

    def shots(self, config: Mapping[str, Any]) -> int:
        """Return the number of shots, by the harness's rule: a task that fixes zero keeps it."""
        own = config.get("num_fewshot")
        return int(own or 0) if self.num_fewshot is None or own == 0 else self.num_fewshot

    def needed_splits(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the splits that the task asks, and that it takes its shots from."""
        asked = str(config.get("test_split") or config.get("validation_split"))
        fewshot = config.get("fewshot_config") or {}
        if self.shots(config) == 0 or "samples" in fewshot:
            return (asked,)
        sources = (fewshot.get("split"), config.get("fewshot_split"), config.get("training_split"), config.get("validation_split"))
        return tuple(dict.fromkeys((asked, str(next((source for source in sources if source), asked)))))

    def file_of(self, config: Mapping[str, Any], split: str) -> Path:
        """Return where a split of the task's data lies inside the folder of local data sets."""
        folder = self.data_folder or str(config.get("dataset_path")).rsplit("/", 1)[-1]
        return Path(folder, config.get("dataset_name") or "", f"{split}{SUFFIX}")

    def local_data(self, config: Mapping[str, Any]) -> LocalData:
        """Return the folder of the task's data set."""
        assert self.data is not None
        folder = self.data_folder or str(config.get("dataset_path")).rsplit("/", 1)[-1]
        root = OUR_DATA if self.data == BUILT_IN else Path(self.data)
        if self.data_folder is None and not (root / folder).is_dir():
            raise DatasetError(
                f"paths.data={self.data} has no folder {folder!r}, where benchmark {self.benchmark} looks by the name that its data has on "
                f"the hub; set benchmark.{self.benchmark}.data_folder, or benchmark.{self.benchmark}.data=null to use the hub"
            )
        return LocalData(folder=root / folder)

    def _localised(self, name: str, config: Mapping[str, Any]) -> RunnableTask:
        data = self.local_data(config)
        files = data.splits(config.get("dataset_name"))
        fewshot = dict(config.get("fewshot_config") or {})
        needed = self.needed_splits(config)
        for split in needed:
            if split not in files:
                folder = next(iter(files.values())).parent
                raise DatasetError(f"task {name} needs split {split!r}, but {folder} holds {', '.join(files)}; add {split}.jsonl there")
        if fewshot.get("split") not in files:
            fewshot.pop("split", None)
        kept = {key: config[key] if config.get(key) in files else None for key in SPLITS}
        used = {split: files[split] for split in {*kept.values(), *needed} if split is not None}
        source = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": None, "custom_dataset": _reader(data, used)}
        local = {**config, **kept, **source, **({"fewshot_config": fewshot} if fewshot else {})}
        return RunnableTask(name=name, config=local, files=used)


def task_folders(benchmark: str, *, task_folder: str | None, stock_folder: str | None) -> list[Path]:
    """Return the folders whose task files are read; none for all of the harness.

    Raises:
        ConfigError: one of them is not there.
    """
    folders: list[Path] = []
    if task_folder is not None:
        ours = OUR_TASKS / task_folder
        folders.append(ours if ours.is_dir() else Path(task_folder))
    if stock_folder is not None:
        folders.append(_stock_tasks() / stock_folder)
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"benchmark {benchmark}: no task folder {folder}; set benchmark.{benchmark}.task_folder or .stock_folder")
    return folders


def own_files_hash(config: Mapping[str, Any]) -> str | None:
    """Return the hash of the local files that a task's `dataset_kwargs` name (paths, patterns, a folder); None where it names none."""
    source = config.get("dataset_kwargs") or {}
    folder = source.get("data_dir")
    named = [Path(text) for text in _texts(source.get("data_files")) if text]
    paths = [
        path for name in named for path in ([name] if name.is_file() else sorted(Path(name.anchor).glob(str(name)[len(name.anchor) :])))
    ]
    if folder and Path(folder).is_dir():  # whole: files may be named as they are called inside it
        paths += sorted(Path(folder).rglob("*"))
    found = [file_sha256(path) for path in dict.fromkeys(paths) if path.is_file()]
    return content_key(found) if found else None


def leaves(index: Mapping[str, Any], names: Iterable[str]) -> Iterator[str]:
    """Yield the tasks below these names of tasks, groups and tags."""
    for name in names:
        entry = index[name]
        if entry.cfg is None:
            yield from leaves(index, sorted(entry.tags))
        elif "group" in entry.cfg:
            yield from leaves(index, _members(index, entry.cfg))
        else:
            yield name


def build_requests_once(task: Any) -> None:
    """Make a task render its prompts once, and again where they are `asked_in` other words; else the same requests stand, unanswered.

    A call that does not say what they are asked in, such as the harness's own, takes them as they are.
    """
    build = task.build_all_requests
    built_in: object = None

    def reuse(*, asked_in: object = None, **arguments: Any) -> None:
        nonlocal built_in
        if built_in is None or asked_in not in (None, built_in):
            build(**arguments)
            built_in = asked_in
        for instance in task.instances:
            instance.resps = []
            instance.filtered_resps = {}

    task.build_all_requests = reuse


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a text, or in lists and mappings of them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _stock_tasks() -> Path:
    spec = find_spec("lm_eval")  # finds the package without importing it
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "tasks"


def _members(index: Mapping[str, Any], group: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a group names; a group that is written out inside it is looked into."""
    for member in group.get("task") or ():
        if isinstance(member, str):
            yield member
        elif "group" in member and member["group"] not in index:
            yield from _members(index, member)
        else:
            name = member.get("group", member.get("task"))
            if name in index:
                yield name


def _reader(data: LocalData, files: Mapping[str, Path]) -> Callable[..., dict[str, Any]]:
    """Return a function that reads the splits; a function, because the harness copies configs and would copy rows with them."""

    def read(**_: object) -> dict[str, Any]:
        from datasets import Dataset

        return {split: Dataset.from_list(data.rows(path)) for split, path in files.items()}

    return read

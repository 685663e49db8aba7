"""A run's objects, made of its config, and the order in which the run comes to life.

Everything that can be wrong is checked before weights are loaded: names and fields of every group, the model's shape
against the method's settings, the data, the benchmarks' files.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache as remember
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from editeval.build import build, folder, positive, resolve, rungs_of, switch, whole
from editeval.datasets.selection import known, known_requests, order
from editeval.edits.journal import EditJournal
from editeval.files import Cache
from editeval.inference.edited import EditedModel
from editeval.interfaces import AsksInChat, Benchmark, Callback, ChecksModel, EditDataset, EditMethod, ModelSource, RunState, is_streaming
from editeval.models.packed import PackedWeights, allowed_bytes
from editeval.models.prompt_format import CHAT, RAW, check_format, check_template, in_format, wrapper
from editeval.models.quiet import quiet
from editeval.runner.folder import check_writable, log_to, origin
from editeval.runner.results import BaseScores, ScoreStore
from editeval.runner.run_files import JOURNAL_FOLDER, write_manifest
from editeval.runner.runner import Runner, Trajectory
from editeval.types import ConfigError, EditRequest, Progress, Score, SilentProgress, content_key

log = logging.getLogger(__name__)

EDIT_SETTINGS_VERSION = 4  # raised when the same settings give other edits than before; makes every earlier edit key a different one


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunResult:
    """What `run` did: where it is on disk, the state that it reached, every score."""

    run_dir: Path
    edit_key: str
    final_digest: str
    scores: tuple[Score, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What of a config belongs to no group, checked."""

    rungs: tuple[int, ...]
    batch_size: int
    seed: int
    batch_tokens: int
    packed_bytes: int
    prompt_format: str
    runs: Path
    cache: Cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(RunSettings):
    """Every object of a run, checked, with no weights loaded yet.

    `left_out` are the benchmarks that the config names and that ask about facts, in a run that edits none.
    """

    source: ModelSource
    method: EditMethod
    dataset: EditDataset
    benchmarks: Mapping[str, Benchmark]
    callbacks: tuple[Callback, ...]
    config: Mapping[str, Any]
    left_out: tuple[str, ...] = ()


def run(config: DictConfig, *observers: Callback) -> RunResult:
    """Run one trajectory and return its scores; `observers` are called like the config's own callbacks, after them.

    Raises:
        EditevalError: one clear sentence; before weights are loaded wherever it can be known then.
    """
    experiment = assemble(config)
    return execute(dataclasses.replace(experiment, callbacks=(*experiment.callbacks, *observers)))


def assemble(config: DictConfig) -> Experiment:
    """Make every object that the config names, and check all that can be checked without weights.

    Raises:
        ConfigError: a wrong name, field, number or combination.
        DatasetError: a file or row is wrong.
    """
    resolved = resolve(config)
    experiment = Experiment(
        **vars(run_settings(config)),
        source=build(config.model, "model", ModelSource),
        method=build(config.method, "method", EditMethod),
        dataset=build(config.dataset, "dataset", EditDataset),
        benchmarks={name: build(node, f"benchmark.{name}", Benchmark) for name, node in (config.get("benchmark") or {}).items()},
        callbacks=tuple(
            build(node, f"{group}.{name}", Callback) for group in ("callback", "logger") for name, node in (config.get(group) or {}).items()
        ),
        config=resolved,
    )
    experiment = _without_facts(experiment)
    experiment.method.check(experiment.source.describe())
    check_together(config, experiment.method, experiment)
    check_format(experiment.prompt_format)
    if experiment.prompt_format == CHAT:
        check_template(experiment.source.tokenizer(), name=experiment.source.describe().name)
    experiment.dataset.check()
    for benchmark in experiment.benchmarks.values():
        benchmark.check()
    return experiment


def _without_facts(experiment: Experiment) -> Experiment:
    """Return the experiment without what asks about facts where none is edited, in its config too: what is wanted of the run is the rest.

    Raises:
        ConfigError: nothing is left.
    """
    left_out = tuple(name for name, benchmark in experiment.benchmarks.items() if benchmark.depends_on_requests)
    if experiment.rungs[-1] > 0 or not left_out:
        return experiment
    kept = {name: benchmark for name, benchmark in experiment.benchmarks.items() if name not in left_out}
    if not kept:
        raise ConfigError(
            f"num_edits=0 edits no fact, and {', '.join(left_out)} asks about nothing else; "
            "raise num_edits, or add a benchmark such as benchmark=[quick]"
        )
    nodes = {name: node for name, node in experiment.config["benchmark"].items() if name in kept}
    return dataclasses.replace(experiment, benchmarks=kept, config={**experiment.config, "benchmark": nodes}, left_out=left_out)


def run_settings(config: DictConfig) -> RunSettings:
    """Return what of a config belongs to no group.

    Raises:
        ConfigError: names the setting, with what is allowed.
    """
    if not isinstance(config.engine, DictConfig):
        raise ConfigError(f"engine={config.engine!r} must hold batch_tokens and packed_gib; leave it out, or set engine.batch_tokens=...")
    switch(config.get("prepare_only", False), "prepare_only")
    if config.paths.get("data") is not None:
        folder(config.paths.data, "paths.data")
    return RunSettings(
        rungs=rungs_of(config.num_edits),
        batch_size=positive(config.batch_size, "batch_size"),
        seed=whole(config.seed, "seed"),
        batch_tokens=positive(config.engine.batch_tokens, "engine.batch_tokens"),
        packed_bytes=allowed_bytes(config.engine.get("packed_gib")),
        prompt_format=str(config.get("prompt_format", RAW)),  # a run of before it was a setting has none
        runs=folder(config.paths.runs, "paths.runs"),
        cache=Cache(folder(config.paths.cache, "paths.cache")),
    )


def check_together(config: DictConfig, method: EditMethod, settings: RunSettings) -> None:
    """Check what only shows when parts are put together: the method and the ladder, and that something is measured.

    Raises:
        ConfigError: a combination that cannot run, with one that can.
    """
    if not config.get("benchmark"):
        raise ConfigError("benchmark is empty, so nothing would be measured; choose some, such as benchmark=[edit-quality,quick]")
    most = method.max_batch_size
    if most is not None and settings.batch_size > most:
        raise ConfigError(
            f"method {config.method.name} writes at most {most} fact(s) an edit, got batch_size={settings.batch_size}; "
            "lower batch_size, or choose a method that writes batches, such as method=memit"
        )
    if not is_streaming(method) and settings.rungs[-1] > 1:
        facts = settings.rungs[-1] * settings.batch_size
        raise ConfigError(
            f"method {config.method.name} writes all facts in one edit, so it has no trajectory of {settings.rungs[-1]} edits; "
            f"set batch_size={facts} num_edits=1 for the same {facts} facts"
        )


def execute(experiment: Experiment) -> RunResult:
    """Edit and measure; everything found on disk is taken from there."""
    with quiet("transformers"):
        return _execute(experiment)


def prepare(config: DictConfig) -> None:
    """Let the method put what it computes once for a model into the cache, and say where that is: a step before many runs.

    Raises:
        EditevalError: as `run`.
    """
    experiment = assemble(config)
    progress = _progress(experiment)
    with quiet("transformers"):
        model = _load(experiment)
        started = time.perf_counter()
        experiment.method.prepare(model, experiment.cache, progress)
    progress.message(
        f"method {experiment.config['method']['name']} is ready for {experiment.source.describe().name} "
        f"({time.perf_counter() - started:.1f} s); runs with the same settings find what it needs in {experiment.cache.root}"
    )


def _execute(experiment: Experiment) -> RunResult:
    progress = _progress(experiment)
    if experiment.left_out:
        progress.message(f"{', '.join(experiment.left_out)}: left out, for num_edits=0 edits no fact to ask about")
    load_model = remember(lambda: _load(experiment))
    fingerprint = experiment.source.fingerprint()
    requests = select(experiment, fingerprint, load_model, progress)
    trajectory = Trajectory(
        edit_key=_edit_key(experiment, fingerprint, requests),
        model_fingerprint=fingerprint,
        requests=requests,
        batch_size=experiment.batch_size,
        seed=experiment.seed,
        rungs=experiment.rungs,
        template=_wrapper(experiment)("{}"),
        chat_template=_chat_template(experiment),
    )
    names = {group: str(experiment.config[group]["name"]) for group in ("method", "dataset")} | {"model": experiment.source.describe().name}
    run_dir = experiment.runs / "-".join(
        re.sub(r"[^A-Za-z0-9._-]+", "_", part) for part in (names["model"], names["method"], names["dataset"], trajectory.edit_key[:12])
    )
    _check_facts_fit(experiment, trajectory.edited_after(trajectory.rungs[-1]))
    check_writable(run_dir)
    # Weights of one's own under a built-in model's settings have a name of their own, which whoever reads the run must find.
    config = {**experiment.config, "model": {**experiment.config["model"], "name": names["model"]}}
    write_manifest(run_dir, _manifest(config, trajectory))
    with log_to(run_dir / "run.log"), EditJournal.open(run_dir / JOURNAL_FOLDER, genesis=trajectory.edit_key) as journal:
        state = RunState(
            run_dir=str(run_dir),
            edit_key=trajectory.edit_key,
            model_name=names["model"],
            method_name=names["method"],
            dataset_name=names["dataset"],
            rungs=experiment.rungs,
            num_edits=0,
            state_digest=fingerprint,
            config=config,
        )
        runner = Runner(
            trajectory=trajectory,
            load_model=load_model,
            method=experiment.method,
            benchmarks=experiment.benchmarks,
            journal=journal,
            store=ScoreStore(run_dir),
            base_scores=BaseScores(experiment.cache),
            cache=experiment.cache,
            state=state,
            callbacks=experiment.callbacks,
            progress=progress,
        )
        scores = runner.run()
        return RunResult(run_dir=run_dir, edit_key=trajectory.edit_key, final_digest=journal.head, scores=scores)


def _progress(experiment: Experiment) -> Progress:
    return next((callback for callback in experiment.callbacks if isinstance(callback, Progress)), SilentProgress())


def select(experiment: Experiment, fingerprint: str, load_model: Callable[[], EditedModel], progress: Progress) -> tuple[EditRequest, ...]:
    """Return the facts in editing order and in the run's prompt format: an order of (content, seed) alone, known ones if asked for.

    Which facts these are does not depend on the format, so that two formats edit the same ones: a model is asked what it knows by
    the prompts of the data set.

    Raises:
        ConfigError: fewer facts than the largest rung needs.
    """
    requests = _selected(experiment, fingerprint, load_model, progress)
    if experiment.prompt_format == RAW:
        return requests
    wrap = _wrapper(experiment)  # may read a tokenizer
    return tuple(in_format(request, wrap) for request in requests)


def _wrapper(experiment: Experiment) -> Callable[[str], str]:
    """Return the function from a prompt to what the model reads; the tokenizer is asked for where a format needs it."""
    needed = experiment.source.tokenizer() if experiment.prompt_format == CHAT else None
    return wrapper(experiment.prompt_format, needed, name=experiment.source.describe().name)


def _chat_template(experiment: Experiment) -> Any:
    """Return the tokenizer's chat template (a text, or several by name) where a benchmark asks in it."""
    asked = any(isinstance(benchmark, AsksInChat) and benchmark.asks_in_chat for benchmark in experiment.benchmarks.values())
    return experiment.source.tokenizer().chat_template if asked else None


def _selected(
    experiment: Experiment, fingerprint: str, load_model: Callable[[], EditedModel], progress: Progress
) -> tuple[EditRequest, ...]:
    rows = order(experiment.dataset.load(), seed=experiment.seed)
    needed = experiment.rungs[-1] * experiment.batch_size
    name = experiment.config["dataset"]["name"]
    require_rows(name, len(rows), needed, "rows")
    if not experiment.dataset.known_only:
        return rows

    def ask() -> list[str]:
        model = load_model()
        for benchmark in experiment.benchmarks.values():
            if isinstance(benchmark, ChecksModel):
                benchmark.check_model(model)  # before the first question, which is not a benchmark's here

        def says(prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
            return [score.is_greedy for score in model.score(prompts, [f" {answer}" for answer in answers])]

        return [request.request_id for request in known_requests(rows, says)]

    # With their ids, which are what is stored: the same rows have others under another data set's name.
    key = content_key({"model": fingerprint, "facts": sorted([request.request_id, request.source_hash] for request in rows)})
    kept = known(rows, experiment.cache.json("known", key, ask))
    progress.message(f"{name}: the unedited model completes {len(kept)} of {len(rows)} facts correctly; these are edited")
    require_rows(name, len(kept), needed, "facts that the model knows (dataset.known_only=false edits the others too)")
    return kept


def require_rows(name: str, got: int, needed: int, what: str) -> None:
    """Raise ConfigError where a data set has fewer facts than the edits of a run take."""
    if got < needed:
        raise ConfigError(
            f"dataset {name} has {got} {what}, but num_edits x batch_size asks for {needed}; lower num_edits or choose another data set"
        )


def _check_facts_fit(experiment: Experiment, requests: Sequence[EditRequest]) -> None:
    """Count the tokens of every prompt that could be too long for the model: the engine would cut it on the left, subject and all.

    Raises:
        ConfigError: a prompt of a fact needs more than the model's positions.
    """
    model = experiment.source.describe()
    prompts = {
        prompt: request.request_id
        for request in requests
        for prompt in (
            request.full_prompt,
            *request.paraphrase_prompts,
            *(probe.prompt for probe in (*request.neighborhood_prompts, *request.portability)),
        )
        if len(prompt.encode()) >= model.max_positions  # a token is at least one byte
    }
    if not prompts:
        return
    tokenizer = experiment.source.tokenizer()
    for prompt, request_id in prompts.items():
        size = len(tokenizer(prompt, verbose=False)["input_ids"])
        if size >= model.max_positions:
            raise ConfigError(
                f"dataset {experiment.config['dataset']['name']}: a prompt of {request_id} has {size} tokens, which leaves no room for an "
                f"answer in the {model.max_positions} positions of {model.name}; shorten it, or leave the fact out"
            )


def _edit_key(experiment: Experiment, fingerprint: str, requests: Sequence[EditRequest]) -> str:
    return content_key(
        {
            "version": EDIT_SETTINGS_VERSION,
            "model": fingerprint,
            "method": {"class": type(experiment.method).__qualname__, **experiment.method.settings()},
            "requests": [[request.request_id, request.source_hash or content_key(request)] for request in requests],
            "batch_size": experiment.batch_size,
            "seed": experiment.seed,
        }
    )


def load_for(source: ModelSource, *, batch_tokens: int, packed_bytes: int) -> EditedModel:
    """Load a model to be edited and asked as the config's `engine` says."""
    lm = dataclasses.replace(source.load(), packed=PackedWeights(most_bytes=packed_bytes))
    return EditedModel(lm, batch_tokens=batch_tokens)


def _load(experiment: Experiment) -> EditedModel:
    return load_for(experiment.source, batch_tokens=experiment.batch_tokens, packed_bytes=experiment.packed_bytes)


def _manifest(config: Mapping[str, Any], trajectory: Trajectory) -> Mapping[str, Any]:
    return {
        "edit_key": trajectory.edit_key,
        "model_fingerprint": trajectory.model_fingerprint,
        "request_ids": [request.request_id for request in trajectory.edited_after(trajectory.rungs[-1])],
        "config": config,
        **origin(),
    }

"""`python -m editeval doctor <overrides>`: what a run will need and what is missing for it, before anything is loaded.

    python -m editeval doctor model=llama2-7b method=memit dataset=counterfact num_edits=100
    python -m editeval doctor --offline model=gpt2-xl paths.data=/local/mirror     # on a node without network

Nothing is downloaded and no weights are read: memory, disk and operations follow from shapes, and the run's own checks are made with
the hub switched off, so what they find is on this machine. A file that the run would fetch is a note; it is missing with `--offline`,
where `paths.data` names a folder that lacks it, and where an account must accept a licence first.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig

from editeval.build import build, rungs_of
from editeval.datasets.corpus import Corpus
from editeval.experiment import RunSettings, check_together, require_rows, run_settings
from editeval.files import Cache
from editeval.interfaces import Benchmark, EditDataset, EditMethod, ModelSource, PlannableSource, Predictable, UsesStatistics
from editeval.models.load import DTYPES, description_of
from editeval.models.packed import PackedWeights, all_packed, allowed_bytes
from editeval.models.prompt_format import CHAT, check_format, check_template
from editeval.models.shapes import is_gated, published_config, weight_bytes
from editeval.prefetch import MANIFEST, damaged
from editeval.runner.wandb_mirror import has_wandb_account
from editeval.sweep.estimate import read_history
from editeval.types import ConfigError, EditevalError, Footprint, HubError, ModelDescription, Workload

Result = TypeVar("Result")

GIB = 1 << 30
CONTEXT_BYTES = 600 << 20  # what CUDA and its libraries take before the first tensor
EVALUATION_WIDTHS = 6  # states of one layer that a forward pass of the engine holds at once, a position
EFFICIENCY = 0.5  # of the speed of a large product, what small ones reach
ABSENT_GPU_OPERATIONS = 5e13  # a second, where a GPU is planned for that is not here (half of an A100's published bf16 rate, or less)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Predicted needs of a run, in bytes and seconds. `device` holds what lies on the model's device, by what it is for.

    `cache` and `journal` are disk: what is kept for many runs, and what this one records, `journal_per_edit` for each edit.

    Where the method says nothing of what it needs, `method_predicted` is false: the bytes are those of model and evaluation alone, and
    `seconds_per_edit` is None unless earlier runs tell it.
    """

    device: Mapping[str, int]
    host: int
    cache: int
    journal: int
    journal_per_edit: int
    seconds_per_edit: float | None
    seconds_once: float
    seconds_from: str
    method_predicted: bool = True

    @property
    def device_bytes(self) -> int:
        """The predicted peak on the model's device."""
        return sum(self.device.values())


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at: `kind` is ok, note or missing."""

    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The plan (None where a wrong setting prevents one) and all findings."""

    plan: Plan | None
    findings: tuple[Finding, ...]

    @property
    def ready(self) -> bool:
        """Whether nothing that is needed is missing."""
        return all(finding.kind != "missing" for finding in self.findings)

    def lines(self) -> list[str]:
        """Return the report for people."""
        plan = [] if self.plan is None else _plan_lines(self.plan)
        verdict = "ready" if self.ready else "NOT ready: " + str(sum(finding.kind == "missing" for finding in self.findings)) + " missing"
        return [*plan, *(f"{finding.kind:8}{finding.text}" for finding in self.findings), verdict]


def diagnose(config: DictConfig, *, offline: bool) -> Diagnosis:
    """Look at everything that a composed config needs. The hub must be switched off (HF_HUB_OFFLINE) so that nothing is fetched."""
    findings: list[Finding] = []
    settings = _checked(findings, "settings of the run", lambda: run_settings(config))
    if settings is None:
        return Diagnosis(plan=None, findings=tuple(findings))  # folders and counts are what all else is looked at by
    source = _checked(findings, "model", lambda: build(config.model, "model", ModelSource))
    method = _checked(findings, "method", lambda: build(config.method, "method", EditMethod))
    if method is not None:
        _checked(findings, "method and ladder together", lambda: check_together(config, method, settings))
    plan: Plan | None = None
    if isinstance(source, PlannableSource):
        findings += _model_files(source, offline=offline)
        shape = _checked(findings, "shape of the model", lambda: _shape(source))
        if shape is not None and method is not None:
            _checked(findings, "settings of the method", lambda: method.check(shape[0]), unfetched="missing" if offline else "note")
            plan = _checked(findings, "plan", lambda: plan_of(config, method, *shape))
            findings += _statistics(config, source, method, shape[0], offline=offline)
        _checked(findings, "prompt format", lambda: _prompt_format(config, source))
    elif source is not None:
        text = (
            f"what model {config.model.name} needs is not predicted, and its files are not looked for: {type(source).__name__} cannot say"
        )
        findings.append(Finding(kind="note", text=text))
    for name, group in (("dataset", {"": config.dataset}), ("benchmark", config.get("benchmark") or {})):
        kind: type[Any] = EditDataset if name == "dataset" else Benchmark
        for key, node in group.items():
            where = f"{name}.{key}" if key else name
            # A local file that is not there cannot be fetched by the run; what comes from the hub can, where there is network.
            is_local = any(node.get(setting) is not None for setting in ("data", "file"))
            problem = "missing" if offline or is_local else "note"
            thing = _checked(findings, where, partial(_looked_at, node, where, kind), problem=problem)
            if isinstance(thing, EditDataset):
                _checked(findings, "facts for every edit", partial(_enough_rows, config, thing, settings))
    if config.paths.data is not None and (Path(config.paths.data) / MANIFEST).is_file():
        _checked(findings, "files of prefetch", lambda: _prefetched(Path(config.paths.data)))
    findings += _wandb(config)
    if plan is not None:
        findings += _room(config, plan)
        if not plan.method_predicted:
            text = f"what method {config.method.name} needs beside the model is not predicted: memory and disk are more than said above"
            findings.append(Finding(kind="note", text=text))
    return Diagnosis(plan=plan, findings=tuple(findings))


def plan_of(config: DictConfig, method: EditMethod, model: ModelDescription, weights: int) -> Plan:
    """Predict the needs of a run of `method` on a model of this shape, whose weights take `weights` bytes."""
    element = _element_bytes(config)
    predicted = None
    if isinstance(method, Predictable):
        predicted = method.footprint(model, Workload(element_bytes=element, batch_size=int(config.batch_size), captured=_captures(config)))
    needs = predicted if predicted is not None else Footprint()
    evaluating = int(config.engine.batch_tokens) * (EVALUATION_WIDTHS * model.hidden_size + 3 * model.intermediate_size) * element
    evaluating += model.vocab_size * 4 * 256  # logits of a few hundred scored positions at once
    phases = {**needs.peak_bytes, "evaluating": evaluating}
    largest = max(phases, key=lambda name: phases[name])
    held = {name: size for name, size in needs.held_bytes.items() if size}
    on_gpu = _wants_gpu(config)
    packed = min(allowed_bytes(config.engine.get("packed_gib")), all_packed(weights, element_bytes=element))
    beside = {"CUDA itself": CONTEXT_BYTES} if on_gpu else {"packed copies of weights": packed} if packed else {}
    device = {"weights": weights, **held, largest: phases[largest], **beside}
    edits = rungs_of(config.num_edits)[-1]
    rate, origin = _rate(gpu=on_gpu)
    seconds = needs.edit_operations / rate if predicted is not None else None
    measured = _measured_seconds(config, model)
    if measured is not None:
        seconds, origin = measured, "median of earlier runs here"
    return Plan(
        device=device,
        host=needs.host_bytes + (weights if on_gpu else 0),
        cache=needs.disk_bytes,
        journal=edits * needs.journal_bytes,
        journal_per_edit=needs.journal_bytes,
        seconds_per_edit=seconds,
        seconds_once=needs.once_operations / rate,
        seconds_from=origin,
        method_predicted=predicted is not None,
    )


# -- what is looked at -----------------------------------------------------------------------------------------------------


def _checked(
    findings: list[Finding], what: str, call: Callable[[], Result], *, problem: str = "missing", unfetched: str | None = None
) -> Result | None:
    """Return the call's result, and note its success or its error under `what`.

    `problem` is the kind of an error, `unfetched` that of one of the hub's, where it is another.
    """
    try:
        result = call()
    except EditevalError as error:
        kind = unfetched if unfetched is not None and isinstance(error, HubError) else problem
        findings.append(Finding(kind=kind, text=f"{what}: {error}"))
        return None
    findings.append(Finding(kind="ok", text=what))
    return result


def _shape(source: PlannableSource) -> tuple[ModelDescription, int]:
    """Return the model's shape and the bytes of its weights, from local files or from what is published."""
    element = torch.tensor([], dtype=DTYPES[source.dtype]).element_size()
    published = published_config(source.name_or_path)
    config = published if published is not None else source.config()
    return description_of(source.name, config), weight_bytes(config, element_bytes=element)


def _model_files(source: PlannableSource, *, offline: bool) -> list[Finding]:
    name, missing = source.name_or_path, source.missing_files()
    if not missing:
        return [Finding(kind="ok", text="model files are on this machine")]
    if is_gated(name):
        advice = f"accept the licence at https://huggingface.co/{name}, `hf auth login`, then `hf download {name}`"
        return [Finding(kind="missing", text=f"model files {', '.join(missing)}: gated; {advice}")]
    kind = "missing" if offline else "note"
    return [Finding(kind=kind, text=f"model files {', '.join(missing)}: fetched by the first run; no network there: `hf download {name}`")]


def _prompt_format(config: DictConfig, source: PlannableSource) -> None:
    """Raise ConfigError where the run would refuse the format; a tokenizer that is still to be fetched is not looked into."""
    check_format(config.prompt_format)
    if config.prompt_format == CHAT and not source.missing_files():
        check_template(source.tokenizer(), name=source.name)


def _looked_at(node: DictConfig, where: str, kind: type[Any]) -> Any:
    """Return a data set or a benchmark whose own check passes."""
    thing = build(node, where, kind)
    thing.check()
    return thing


def _enough_rows(config: DictConfig, dataset: EditDataset, settings: RunSettings) -> None:
    """Raise ConfigError where there are too few facts; how many of them the model knows is not known yet."""
    require_rows(config.dataset.name, len(dataset.load()), settings.rungs[-1] * settings.batch_size, "rows")


def _prefetched(folder: Path) -> None:
    """Raise ConfigError where the folder is no longer what was fetched: a model's weights are nowhere else looked into beforehand."""
    changed = damaged(folder)
    if changed:
        listed = ", ".join(changed[:3]) + (" ..." if len(changed) > 3 else "")
        raise ConfigError(f"{len(changed)} files in {folder} are not what {MANIFEST} lists ({listed}); prefetch them again")


def _statistics(
    config: DictConfig, source: PlannableSource, method: EditMethod, model: ModelDescription, *, offline: bool
) -> list[Finding]:
    """Say whether the key statistics are in the cache; they are computed where they are not, from a text that must then be at hand."""
    if not isinstance(method, UsesStatistics):
        return []
    fingerprint = source.known_fingerprint()
    missing = method.missing_statistics(model, fingerprint, Cache(Path(config.paths.cache)))
    if not missing:
        return [Finding(kind="ok", text="key statistics")]
    why = "the weights were never read here, so whose they are is not known" if fingerprint is None else ", ".join(missing)
    findings = [Finding(kind="note", text=f"key statistics of {len(missing)} maps are computed by the first run ({why})")]
    _checked(
        findings, "corpus", lambda: next(build(config.corpus, "corpus", Corpus).texts(), None), problem="missing" if offline else "note"
    )
    return findings


def _wandb(config: DictConfig) -> list[Finding]:
    node = (config.get("logger") or {}).get("wandb")
    if node is None:
        return []
    if has_wandb_account():
        return [Finding(kind="ok", text="W&B account")]
    kind = "missing" if node.get("mode") == "online" else "note"
    return [Finding(kind=kind, text="no W&B account: rows stay on disk until `wandb login` and `python -m editeval sync`")]


def _room(config: DictConfig, plan: Plan) -> list[Finding]:
    """Compare the plan with what this machine has."""
    findings: list[Finding] = []
    if _wants_gpu(config) and not torch.cuda.is_available():
        findings.append(Finding(kind="missing", text=f"model.device={config.model.get('device')}: torch sees no GPU here"))
    elif _wants_gpu(config):
        free = sum(torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count()))
        findings.append(_compared("GPU memory", plan.device_bytes, free))
    host = plan.host if _wants_gpu(config) else plan.host + plan.device_bytes
    findings.append(_compared("memory", host, _memory()))
    return [*findings, *_disks(config, {"cache": plan.cache, "runs": plan.journal})]


def _disks(config: DictConfig, needed: Mapping[str, int]) -> list[Finding]:
    """Compare what each of `paths` needs with its disk; folders on one disk share it."""
    folders = {name: _existing(Path(config.paths[name]).absolute()) for name in needed}
    on_disk: dict[int, list[str]] = {}
    for name, folder in folders.items():
        on_disk.setdefault(_disk_of(folder), []).append(name)
    findings = []
    for names in on_disk.values():
        what = "disk of " + " and ".join(f"paths.{name}" for name in names)
        findings.append(_compared(what, sum(needed[name] for name in names), shutil.disk_usage(folders[names[0]]).free))
    return findings


def _disk_of(folder: Path) -> int:
    return folder.stat().st_dev


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _compared(what: str, needed: int, free: int) -> Finding:
    kind = "ok" if needed <= free else "missing"
    return Finding(kind=kind, text=f"{what}: {_size(needed)} of {_size(free)}")


def _memory() -> int:
    """Return the bytes of memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# -- numbers ---------------------------------------------------------------------------------------------------------------


def _captures(config: DictConfig) -> bool:
    """Return whether the model lies on one GPU."""
    return _wants_gpu(config) and config.model.get("device_map") is None


def _wants_gpu(config: DictConfig) -> bool:
    """Return whether the model will lie on a GPU: asked for, or found by `auto`."""
    device = str(config.model.get("device") or "auto")
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _element_bytes(config: DictConfig) -> int:
    return torch.tensor([], dtype=DTYPES[str(config.model.get("dtype") or "float32")]).element_size()


def _measured_seconds(config: DictConfig, model: ModelDescription) -> float | None:
    """Return seconds an edit of earlier runs of this pair, if there are some."""
    return read_history(Path(config.paths.runs)).edit_seconds.get((model.name, str(config.method.name)))


def _rate(*, gpu: bool) -> tuple[float, str]:
    """Return floating-point operations a second that edits reach, and how that is known."""
    if gpu and not torch.cuda.is_available():
        return EFFICIENCY * ABSENT_GPU_OPERATIONS, "operations, at an assumed speed"
    device, size = ("cuda", 4096) if gpu else ("cpu", 512)
    matrix = torch.ones(size, size, device=device)
    linear = torch.nn.Linear(size, size, bias=False, device=device).requires_grad_(requires_grad=False)
    best = float("inf")
    with PackedWeights().products([linear]):
        for _ in range(20):
            start = time.perf_counter()
            float(linear(matrix)[0, 0])
            best = min(best, time.perf_counter() - start)
    return EFFICIENCY * 2 * size**3 / best, "operations, at a speed measured now"


def _plan_lines(plan: Plan) -> list[str]:
    parts = ", ".join(f"{name} {_size(size)}" for name, size in plan.device.items())
    once = f"; getting ready about {plan.seconds_once:.0f} s, once" if plan.seconds_once >= 1 else ""
    seconds = "not predicted" if plan.seconds_per_edit is None else f"about {plan.seconds_per_edit:.2g} ({plan.seconds_from})"
    return [
        f"memory on the model's device: {_size(plan.device_bytes)} ({parts})",
        f"memory of the host beside it: {_size(plan.host)}",
        f"disk: {_size(plan.cache + plan.journal)} ({_size(plan.cache)} once for all runs; journal {_size(plan.journal_per_edit)} an edit)",
        f"seconds per edit: {seconds}{once}",
    ]


def _size(number: int) -> str:
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"

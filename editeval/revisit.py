"""Going back to a run on disk: reload any step of it, prove that it is what it says, export it.

Example:
    >>> from editeval.revisit import load_edited, load_exported   # doctest: +SKIP
    >>> model = load_edited("runs/<folder>", num_edits=5)         # doctest: +SKIP
    >>> model.generate(["The capital of France is"], max_new_tokens=5)   # doctest: +SKIP
    >>> load_exported("DIR").generate(["The capital of France is"], max_new_tokens=5)   # doctest: +SKIP
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from editeval.build import build
from editeval.edits.delta import Edit
from editeval.edits.delta_files import load_deltas, save_deltas
from editeval.edits.journal import EditJournal
from editeval.experiment import assemble, load_for, select
from editeval.files import Cache, write_atomic
from editeval.inference.edited import EditedModel
from editeval.interfaces import EditMethod, EvaluationContext, ModelSource, attach
from editeval.models.load import PretrainedModel
from editeval.models.packed import allowed_bytes
from editeval.runner.folder import check_writable
from editeval.runner.results import SCORES_FILE, ScoreStore
from editeval.runner.run_files import EDITS_FILE, JOURNAL_FOLDER, read_edits, read_manifest
from editeval.types import EditevalError, JournalError, SilentProgress, counted


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found: the rung to which edits were replayed and at which was measured again, and every difference."""

    digests_compared: int
    rung: int
    scores_compared: int
    differences: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the run is what it says."""
        return not self.differences


def load_edited(run_dir: Path | str, *, num_edits: int | None = None) -> EditedModel:
    """Return the model as it was after `num_edits` edits of a run (default: all of them), bit for bit.

    Raises:
        JournalError: the journal is damaged, shorter than `num_edits`, or (by default) than what was logged and measured.
        EditevalError: the folder is no run, or its model's weights are not those that were edited.
    """
    manifest = read_manifest(run_dir)
    with EditJournal.open(Path(run_dir) / JOURNAL_FOLDER, genesis=manifest["edit_key"]) as journal:
        return _replayed(run_dir, manifest, journal, num_edits)


def _replayed(run_dir: Path | str, manifest: Mapping[str, Any], journal: EditJournal, num_edits: int | None) -> EditedModel:
    if num_edits is None and (lost := _lost_edits(run_dir, len(journal))) is not None:
        raise JournalError(f"{run_dir}: {lost}")
    wanted = len(journal) if num_edits is None else num_edits
    if wanted > len(journal):
        raise JournalError(f"{run_dir} holds {len(journal)} edits, not {wanted}")
    source = build(OmegaConf.create(dict(manifest["config"]["model"])), "model", ModelSource)
    engine = manifest["config"]["engine"]
    model = load_for(source, batch_tokens=int(engine["batch_tokens"]), packed_bytes=allowed_bytes(engine.get("packed_gib")))
    if model.lm.fingerprint != manifest["model_fingerprint"]:
        raise EditevalError(
            f"the model's weights (fingerprint {model.lm.fingerprint[:12]}) are not those that {run_dir} edited "
            f"({manifest['model_fingerprint'][:12]}); check model.revision and model.dtype"
        )
    method = build(OmegaConf.create(dict(manifest["config"]["method"])), "method", EditMethod)
    attach(method, model, Cache(Path(manifest["config"]["paths"]["cache"])), SilentProgress())
    for entry in journal.entries(0, wanted):
        model.apply(entry.edit)
    return model


def _lost_edits(run_dir: Path | str, held: int) -> str | None:
    """Return what the run logged or measured beyond the `held` edits of its journal, in words; None where that is nothing.

    An edit is in the journal before it is logged, and logged before it is measured, so only lost files look like this.
    """
    logged = max((int(row["step"]) for row in read_edits(run_dir)), default=0)
    measured = max((score.num_edits for score in ScoreStore(run_dir).scores()), default=0)
    beyond = [
        f"{file} {what}"
        for file, what, step in ((EDITS_FILE, f"logs {logged}", logged), (SCORES_FILE, f"measured {measured}", measured))
        if step > held
    ]
    if not beyond:
        return None
    return (
        f"the journal holds {counted(held, 'edit')}, but {' and '.join(beyond)}; start the run's command again, which makes the others anew"
    )


def verify(run_dir: Path | str, *, rung: int | None = None) -> Verification:
    """Replay the journal, compare every weight digest that was logged, and measure one rung again.

    `rung` defaults to the last one that was measured. Scores must agree to 1e-4: the same machine gives the same bits, another
    one rounds differently.
    """
    manifest = read_manifest(run_dir)
    experiment = assemble(OmegaConf.create(dict(manifest["config"])))
    model = load_edited(run_dir, num_edits=0)
    logged = {int(row["step"]): str(row["weights_digest"]) for row in read_edits(run_dir)}
    differences: list[str] = []
    store = ScoreStore(Path(run_dir))
    with EditJournal.open(Path(run_dir) / JOURNAL_FOLDER, genesis=manifest["edit_key"]) as journal:
        lost = _lost_edits(run_dir, len(journal))
        if lost is not None:
            differences.append(lost)
        digests = {0: manifest["model_fingerprint"], **{step: journal.digest_at(step) for step in range(1, len(journal) + 1)}}
        scores = store.scores(digests)
        measured = sorted({score.num_edits for score in scores})
        if not measured:
            raise EditevalError(f"{run_dir} holds no scores yet; run it again to finish it")
        rung = measured[-1] if rung is None else rung
        if rung not in measured:
            raise EditevalError(f"rung {rung} was not measured in {run_dir}; measured: {', '.join(map(str, measured))}")
        compared = 0
        for entry in journal.entries(0, rung):
            model.apply(entry.edit)
            if entry.step in logged:
                compared += 1
                if model.weights_digest() != logged[entry.step]:
                    differences.append(f"after edit {entry.step} the weights are not those of the run")
    requests = select(experiment, manifest["model_fingerprint"], lambda: load_edited(run_dir, num_edits=0), SilentProgress())
    context = EvaluationContext(
        num_edits=rung,
        edited=requests[: rung * experiment.batch_size],
        planned=requests[: experiment.rungs[-1] * experiment.batch_size],
        seed=experiment.seed,
        cache=experiment.cache,
    )
    checked = 0
    for name, benchmark in experiment.benchmarks.items():
        stored = {(s.task, s.metric, s.protocol): s.value for s in scores if s.num_edits == rung and s.benchmark == name}
        for found in benchmark.evaluate(model, context).measurements if stored else ():
            before = stored.get((found.task, found.metric, found.protocol))
            if before is None:
                continue
            checked += 1
            if not math.isclose(before, found.value, rel_tol=1e-4, abs_tol=1e-4) and not (math.isnan(before) and math.isnan(found.value)):
                differences.append(
                    f"{name}/{found.task}.{found.metric}.{found.protocol}: stored {before:.6g}, measured again {found.value:.6g}"
                )
    return Verification(digests_compared=compared, rung=rung, scores_compared=checked, differences=tuple(differences))


def export(run_dir: Path | str, to: Path | str, *, num_edits: int | None = None) -> Path:
    """Write the edited model as an ordinary Hugging Face folder (safetensors, tokenizer, where it came from).

    What stands beside the weights is written beside them (`adapter.safetensors`, `adapter.json`); `load_exported` reads both.

    Raises:
        EditevalError: the target folder exists and is not empty, or cannot be written.
    """
    target = Path(to)
    if target.is_dir() and any(target.iterdir()):
        raise EditevalError(f"{target} is not empty; choose a new folder for the export")
    check_writable(target, setting="--to")  # before the model is loaded
    model = load_edited(run_dir, num_edits=num_edits)
    model.lm.module.save_pretrained(target, safe_serialization=True)
    model.lm.tokenizer.save_pretrained(target)
    manifest = read_manifest(run_dir)
    if model.adapter is not None:
        save_deltas(target / "adapter", model.adapter.snapshot())
    provenance = {
        "edit_key": manifest["edit_key"],
        "num_edits": model.num_applied,
        "weights_digest": model.weights_digest(),
        "run": str(run_dir),
        "dtype": str(model.lm.module.dtype).removeprefix("torch."),
        "engine": manifest["config"]["engine"],
        "method": manifest["config"]["method"],
        "cache": manifest["config"]["paths"]["cache"],
    }
    write_atomic(target / "editeval.json", json.dumps(provenance, indent=2))
    return target


def load_exported(folder: Path | str, *, cache: Path | str | None = None) -> EditedModel:
    """Return the model that `export` wrote, its adapter attached and filled; what was edited into the weights is its base.

    `cache` is where the method finds what it prepared (default: the run's own cache); what is not there is prepared again.

    Raises:
        EditevalError: the folder is no export, or a file of it is damaged.
    """
    path = Path(folder) / "editeval.json"
    if not path.is_file():
        raise EditevalError(f"{folder} holds no editeval.json; give a folder that `python -m editeval export` wrote")
    provenance = json.loads(path.read_text())
    shared = Cache(Path(cache if cache is not None else provenance["cache"]))
    source = PretrainedModel(name=Path(folder).name, name_or_path=str(folder), cache_dir=shared.root, dtype=provenance["dtype"])
    engine = provenance.get("engine", {"batch_tokens": 4096})  # the first exports did not say
    model = load_for(source, batch_tokens=int(engine["batch_tokens"]), packed_bytes=allowed_bytes(engine.get("packed_gib")))
    if (Path(folder) / "adapter.json").is_file():
        attach(build(OmegaConf.create(provenance["method"]), "method", EditMethod), model, shared, SilentProgress())
        deltas = load_deltas(Path(folder) / "adapter")
        if deltas:
            model.apply(Edit(deltas=deltas))
    return model

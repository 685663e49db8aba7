"""Second moments of keys: C = E[k k^T], uncentred, over the tokens of a text, always of the unedited model.

Several sites are summed up in one pass that stops after the last of them. The pass is streaming (memory does not grow with
the text) and resumable (partial sums are stored atomically). Source: Meng et al. 2022, arXiv:2202.05262, section 3.1.

Shapes: N tokens, K the key's width.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from editeval.datasets.corpus import Corpus
from editeval.files import Cache, file_sha256, write_atomic
from editeval.keyvalue.lookup import leading_special_ids
from editeval.keyvalue.solve import CholeskyFactor, factorise
from editeval.keyvalue.suffix import pad_rows
from editeval.models.model import LanguageModel, from_packed_weights
from editeval.models.trace import capture, run_until
from editeval.types import ConfigError, Progress, content_key

FORMAT_VERSION = 1  # raised when the same model, text and settings give other sums than before
BATCH_TOKENS = 4096
CHUNK_TOKENS = 16384
SAVE_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class CovarianceSource:
    """Where covariances come from: a text, or a file that holds them.

    The tensors of `file` (safetensors) are named by layer: the site's module path, its weight, or, where one map of a layer is asked for,
    the layer's number; each is (K, K) or its upper triangle row by row with the diagonal, K(K+1)/2 numbers.
    """

    corpus: Corpus
    file: str | None = None

    def settings(self) -> Mapping[str, object]:
        """Return what the covariances depend on beside the model."""
        if self.file is not None:
            return {"file": self._file_hash}
        return {
            "corpus": self.corpus.content_hash(),
            "tokens": self.corpus.tokens,
            "max_length": self.corpus.max_length,
            "version": FORMAT_VERSION,
        }

    @cached_property
    def _file_hash(self) -> str:
        # Cached: such a file holds gigabytes, and every site's key is made of it.
        assert self.file is not None
        return file_sha256(Path(self.file))

    def check(self, key_widths: Mapping[str, int]) -> None:
        """Check without weights that covariances can be had; `key_widths` tells how wide the keys of each site (module path) are.

        Raises:
            ConfigError: the file is not there or lacks a site, or the text is too short to give a matrix of full rank.
        """
        if self.file is None:
            self.corpus.check()
            width = max(key_widths.values(), default=0)
            if self.corpus.tokens < width:
                raise ConfigError(
                    f"corpus.tokens={self.corpus.tokens} is less than the key's width {width}, so its covariance has no inverse; "
                    f"set corpus.tokens to at least {width}, better {10 * width}"
                )
            return
        if not Path(self.file).is_file():
            raise ConfigError(f"method.covariance={self.file} is no file; give a safetensors file or leave it out to compute from corpus")
        names = _names_in_file(self.file, list(key_widths))
        with safe_open(self.file, framework="pt") as tensors:
            for site, width in key_widths.items():
                name = names[site]
                shape = tuple(tensors.get_slice(name).get_shape())
                if shape not in ((width, width), (width * (width + 1) // 2,)):
                    raise ConfigError(
                        f"{self.file}: {name} has the shape {shape}; expected ({width}, {width}) "
                        f"or its upper triangle ({width * (width + 1) // 2},)"
                    )


def key_covariances(
    lm: LanguageModel, sites: Sequence[str], source: CovarianceSource, cache: Cache, progress: Progress
) -> dict[str, Tensor]:
    """Return C (K, K), float32, of the inputs of the linear maps at `sites`, from the file, the cache or one pass over the text.

    The model must be in its unedited state.

    Raises:
        ConfigError: the text has fewer tokens than asked for, or the file lacks a site.
    """
    if source.file is not None:
        return {site: _from_file(source.file, name) for site, name in _names_in_file(source.file, sites).items()}
    paths = {site: cache.path("covariance", _key(lm, site, source), ".safetensors") for site in sites}
    missing = [site for site in sites if not paths[site].exists()]
    if missing:
        sums, count = _collect(lm, missing, source, cache, progress)
        for site in missing:
            packed = pack_upper((sums.pop(site) / count).to(torch.float32))
            write_atomic(paths[site], save({"covariance": packed}, {"site": site, "tokens": str(count), "model": lm.fingerprint}))
        _partial_path(lm, missing, source, cache).unlink(missing_ok=True)
    return {site: unpack_upper(load_file(paths[site])["covariance"]) for site in sites}


def missing_covariances(sites: Sequence[str], source: CovarianceSource, *, fingerprint: str | None, cache: Cache) -> tuple[str, ...]:
    """Return the sites whose C is neither in the file nor in the cache; all of them where the model's fingerprint is not known."""
    if source.file is not None:
        return ()
    if fingerprint is None:
        return tuple(sites)
    return tuple(site for site in sites if not cache.path("covariance", _content(fingerprint, site, source), ".safetensors").exists())


def covariance_factors(
    lm: LanguageModel, sites: Sequence[str], source: CovarianceSource, cache: Cache, progress: Progress
) -> dict[str, CholeskyFactor]:
    """Return the float64 Cholesky factor of C for each site, on the site's device; computed once, then read from the cache.

    Raises:
        ConfigError: see `key_covariances`.
    """
    paths = {site: cache.path("covariance-factor", _key(lm, site, source), ".safetensors") for site in sites}
    devices = {site: lm.device_at(site) for site in sites}
    missing = [site for site in sites if not paths[site].exists()]
    if missing:
        covariances = key_covariances(lm, missing, source, cache, progress)
        for site in missing:
            factor = factorise(covariances.pop(site).to(devices[site]))
            if factor.ridge > 0:
                progress.message(f"covariance of {site}: a ridge of {factor.ridge:.2e} was needed to make it positive definite")
            ridge = torch.tensor(factor.ridge, dtype=torch.float64)
            write_atomic(paths[site], save({"lower": factor.lower.cpu().contiguous(), "ridge": ridge}))
    stored = {site: load_file(paths[site]) for site in sites}
    return {
        site: CholeskyFactor(lower=tensors["lower"].to(devices[site]), ridge=float(tensors["ridge"])) for site, tensors in stored.items()
    }


def pack_upper(matrix_KK: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric matrix, row by row with the diagonal: K(K+1)/2 numbers."""
    return torch.cat([row[index:] for index, row in enumerate(matrix_KK)])


def unpack_upper(packed: Tensor) -> Tensor:
    """Return the symmetric matrix (K, K) of its upper triangle."""
    size = int((2 * packed.numel() + 0.25) ** 0.5)
    if size * (size + 1) // 2 != packed.numel():
        raise ConfigError(f"{packed.numel()} numbers are no upper triangle with its diagonal: K(K+1)/2 for a whole K")
    matrix = torch.empty(size, size, dtype=packed.dtype)
    start = 0
    for index in range(size):
        row = packed[start : start + size - index]
        matrix[index, index:] = row
        matrix[index:, index] = row
        start += size - index
    return matrix


# -- one pass over the text ----------------------------------------------------------------------------------------------


def _collect(
    lm: LanguageModel, sites: Sequence[str], source: CovarianceSource, cache: Cache, progress: Progress
) -> tuple[dict[str, Tensor], int]:
    """Return sum k k^T (float64, on the CPU) by site, and the number of tokens; goes on where a killed pass stopped.

    The sums stay on the sites' devices: a chunk would else move each matrix to the host, and wait for it.
    """
    corpus = source.corpus
    max_length = min(corpus.max_length, lm.description.max_positions)
    chunks = list(_chunks(token_pieces(lm.tokenizer, corpus.texts(), tokens=corpus.tokens, max_length=max_length)))
    count = sum(len(piece) for chunk in chunks for piece in chunk)
    if count < corpus.tokens:
        raise ConfigError(f"the corpus holds {count} tokens, corpus.tokens asks for {corpus.tokens}; lower it or choose a longer text")
    partial = _partial_path(lm, sites, source, cache)
    sums: dict[str, Tensor] = {}
    first = 0
    if partial.exists():
        stored = load_file(partial)
        first = int(stored.pop("chunks"))
        sums = {site: total.to(lm.device_at(site)) for site, total in stored.items()}
    saved = time.monotonic()
    for number in progress.track(range(first, len(chunks)), description="key covariance", total=len(chunks) - first):
        for site, total in _chunk_sums(lm, sites, chunks[number]).items():
            sums[site] = sums[site].add_(total) if site in sums else total.to(torch.float64)
        if time.monotonic() - saved >= SAVE_SECONDS and number + 1 < len(chunks):
            write_atomic(partial, save({**{site: total.cpu() for site, total in sums.items()}, "chunks": torch.tensor(number + 1)}))
            saved = time.monotonic()
    return {site: total.cpu() for site, total in sums.items()}, count


def token_pieces(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], *, tokens: int, max_length: int) -> Iterator[tuple[int, ...]]:
    """Yield pieces of at most `max_length` token ids, each behind the tokenizer's leading special tokens, `tokens` in all."""
    leading = leading_special_ids(tokenizer)
    size = max_length - len(leading)
    left = tokens
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(ids), size):
            piece = (*leading, *ids[start : start + size])[:left]
            if not piece:
                return
            yield piece
            left -= len(piece)


def _chunks(pieces: Iterable[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    chunk: list[tuple[int, ...]] = []
    size = 0
    for piece in pieces:
        chunk.append(piece)
        size += len(piece)
        if size >= CHUNK_TOKENS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@from_packed_weights
def _chunk_sums(lm: LanguageModel, sites: Sequence[str], chunk: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
    """Return sum k k^T over a chunk's tokens, float32 on the sites' devices."""
    device = lm.input_device
    sums: dict[str, Tensor] = {}
    with torch.no_grad(), capture(lm.module, sites, inputs=True, stop=True) as trace:
        for batch in _batches(sorted(chunk, key=len)):
            ids_BT = pad_rows(batch, device)
            lengths_B = torch.tensor([len(piece) for piece in batch], device=device)
            is_token_BT = torch.arange(ids_BT.shape[1], device=device) < lengths_B[:, None]
            run_until(lm.module.base_model, input_ids=ids_BT, use_cache=False)
            for site in sites:
                keys = trace.inputs[site]
                keys_NK = keys[is_token_BT.to(keys.device)].float()
                if site in sums:
                    sums[site].addmm_(keys_NK.T, keys_NK)
                else:
                    sums[site] = keys_NK.T @ keys_NK
    return sums


def _batches(pieces: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Group pieces sorted by length: at most BATCH_TOKENS tokens a batch, padding counted."""
    batch: list[tuple[int, ...]] = []
    for piece in pieces:
        if batch and (len(batch) + 1) * len(piece) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


# -- names and files -----------------------------------------------------------------------------------------------------


def _key(lm: LanguageModel, site: str, source: CovarianceSource) -> str:
    return _content(lm.fingerprint, site, source)


def _content(fingerprint: str, site: str, source: CovarianceSource) -> str:
    return content_key({"model": fingerprint, "site": site, **source.settings()})


def _partial_path(lm: LanguageModel, sites: Sequence[str], source: CovarianceSource, cache: Cache) -> Path:
    return cache.path("covariance", content_key([_key(lm, site, source) for site in sites]), ".partial.safetensors")


def _from_file(file: str, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        matrix: Tensor = tensors.get_tensor(name).float()
    return unpack_upper(matrix) if matrix.dim() == 1 else matrix


def _names_in_file(file: str, sites: Sequence[str]) -> dict[str, str]:
    """Return the name of each site's covariance in a file."""
    with safe_open(file, framework="pt") as tensors:
        held = set(tensors.keys())
    layers = {site: next((part for part in site.split(".") if part.isdigit()), site) for site in sites}
    asked = Counter(layers.values())
    names = {}
    for site, layer in layers.items():
        numbered = [layer] if asked[layer] == 1 else []  # a number does not tell two maps of one layer apart
        candidates = [site, f"{site}.weight", *numbered]
        name = next((candidate for candidate in candidates if candidate in held), None)
        if name is None:
            raise ConfigError(
                f"{file} holds no covariance named {' or '.join(map(repr, candidates))}; it holds {', '.join(sorted(held)) or 'nothing'}"
            )
        names[site] = name
    return names

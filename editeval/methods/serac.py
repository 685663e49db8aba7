"""SERAC: leave the model alone; keep every edit in a memory, and let another model answer what is about one of them.

Mitchell et al. 2022, "Memory-Based Model Editing at Scale", arXiv:2206.06520.

    python launch.py method=serac training=counterfact dataset=counterfact paths.data=DIR prepare_only=true   # train, once
    python launch.py method=serac training=counterfact dataset=counterfact paths.data=DIR num_edits=[1,10,100]

Two parts are trained beforehand on rows that are never edited: a scope classifier (`memory.scope`), which tells which fact a request is
about, if any, and a counterfactual model (`memory.reader`), which answers a request by the fact before it (equation 1):

    answer(x) = counterfactual(fact, x) if g(x, fact) >= 1/2 for the likeliest fact, else model(x)

An edit only adds its fact to the memory. What is about no fact gets the very scores of the model. The likelihood g is a sigmoid of the
cosine of two sentences' embeddings, with a scale and a threshold that are learned; published is exp(-|e - e'|^2).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from editeval.edits.delta import Edit
from editeval.files import Cache, file_sha256
from editeval.inference.adapters import Route
from editeval.inference.edited import EditedModel
from editeval.interfaces import attach
from editeval.memory.demonstrations import question, statement_that_fits
from editeval.memory.encoder import SentenceEncoder, check_encoder, encoder_identity, encoder_settings_in, fetch_encoder, load_encoder
from editeval.memory.facts import Fact, MemoryAdapter, memory_delta
from editeval.memory.footprint import (
    encoder_disk,
    encoder_shape,
    fact_bytes,
    parameters_of,
    reader_shape,
    reader_training,
    scope_training,
)
from editeval.models.load import PretrainedModel, frozen
from editeval.models.model import LanguageModel
from editeval.training.archive import check_rows, read_archive, rows_learned, write_archive
from editeval.training.settings import LearningSettings, LearnsBeforehand
from editeval.types import ConfigError, EditevalError, EditRequest, Footprint, ModelDescription, Progress, Workload, content_key

if TYPE_CHECKING:
    from editeval.memory.training import Validation

VERSIONS = {"scope": 3, "counterfactual": 2}
"""Of the parts; raised when the same rows and settings train another part than before. Scope 3: hard ones are learned rows alone."""

PARTS = tuple(VERSIONS)
LARGEST_COPY = 1e9  # parameters; training takes 16 bytes of each beside the edited model
KIND = "serac"  # of the files of these parts


@dataclass(frozen=True, kw_only=True)
class SERAC(LearnsBeforehand):
    """SERAC's settings; published numbers are in conf/method/serac.yaml and conf/tuned/serac.

    `counterfactual` is a model with the tokenizer of the edited one (a Hugging Face id or folder); None: a copy of the edited model.
    `similarity` is the cosine from which on a request is about a fact before training. `archive` is a folder with the trained parts
    (`scope.safetensors`, `counterfactual.safetensors`) to be used instead of training; None: from the cache, where training puts them.
    """

    max_batch_size: ClassVar[int | None] = None

    encoder: str
    counterfactual: str | None
    similarity: float
    scope_learning_rate: float

    def __post_init__(self) -> None:
        if not 0 < self.similarity < 1:
            raise ConfigError(f"method.similarity={self.similarity} must be a cosine between 0 and 1")
        if not self.scope_learning_rate > 0:
            raise ConfigError(f"method.scope_learning_rate={self.scope_learning_rate} must be above 0")
        _ = self._learning_settings  # checks the numbers

    def settings(self) -> Mapping[str, Any]:
        """Return everything that edits and answers depend on beside model and requests."""
        if self.archive is not None:
            return {"archive": [file_sha256(self._part_of_archive(part)) for part in PARTS], "encoder": encoder_identity(self.encoder)}
        small = None if self.counterfactual is None else self._small(Path()).files_identity()
        return self._learning(VERSIONS, counterfactual=small)

    def check(self, model: ModelDescription) -> None:
        """Check encoder, archive and training rows.

        Raises:
            ConfigError: there is no such encoder or archive, the archive learned from other rows or from what is edited, or the
                counterfactual model would be a copy of a large one.
            DatasetError: the training set cannot be read, or shares every subject with what is edited.
        """
        check_encoder(self.encoder)
        if self.archive is None:
            self._check_copy(model)
            self.training.check()
            return
        for part in PARTS:
            if not self._part_of_archive(part).is_file():
                raise ConfigError(
                    f"method.archive={self.archive} has no {part}.safetensors; give a folder with both parts, or null to train"
                )
            check_rows(self._part_of_archive(part), self.training, kind=KIND)

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint:
        """Predict memory, disk and operations from shapes; a counterfactual model that is named counts like the published ones."""
        encoder = encoder_shape(self.encoder)
        reader = reader_shape(self.counterfactual, model)
        settings = self._learning_settings
        parts = () if self.archive is not None else (scope_training(encoder, settings), reader_training(reader, workload, settings))
        return Footprint(
            held_bytes={"sentence encoder": encoder.bytes, "counterfactual model": parameters_of(reader) * workload.element_bytes},
            peak_bytes={name: size for part in parts for name, size in part.peak_bytes.items()},
            host_bytes=max((part.host_bytes for part in parts), default=0),
            disk_bytes=encoder_disk(self.encoder) + sum(part.disk_bytes for part in parts),
            journal_bytes=fact_bytes(encoder, workload, demonstrations=0),
            once_operations=sum(part.once_operations for part in parts),
            edit_operations=encoder.operations(workload.batch_size),
        )

    def fetch(self, folder: Path) -> tuple[Path, ...]:
        """Copy encoder and counterfactual model into a folder for machines without network; return the files.

        Raises:
            ConfigError: one of them cannot be had.
        """
        small = () if self.counterfactual is None else self._small(folder).fetch(folder)
        return (*fetch_encoder(self.encoder, folder), *small)

    def found_in(self, folder: Path) -> Mapping[str, str]:
        """Return where `fetch` put them."""
        small = {} if self.counterfactual is None else {"counterfactual": self._small(folder).found_in(folder)["name_or_path"]}
        return {**encoder_settings_in(self.encoder, folder), **small}

    def adapter(self, lm: LanguageModel, cache: Cache, progress: Progress) -> CounterfactualAdapter:
        """Return an empty memory with both parts: from `archive`, from the cache, or trained now."""
        encoder, similarity = self._scope(lm, cache, progress)
        return CounterfactualAdapter(encoder, similarity=similarity, reader=EditedModel(self._reader(lm, cache, progress)))

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Editor:
        """Return the editor, which adds to the memory that is attached to the model (attached here where there is none).

        Raises:
            EditevalError: the adapter of another method is attached.
        """
        attach(self, model, cache, progress)
        if not isinstance(model.adapter, CounterfactualAdapter):
            raise EditevalError(f"SERAC adds to a memory, but a {type(model.adapter).__name__} is attached; load the model anew")
        return Editor(memory=model.adapter)

    # -- inside ------------------------------------------------------------------------------------------------------

    @property
    def _learning_settings(self) -> LearningSettings:
        return self.learning_as(LearningSettings)

    def _learning(self, version: object, *, counterfactual: str | None) -> Mapping[str, Any]:
        return {
            "version": version,
            "encoder": encoder_identity(self.encoder),
            "counterfactual": counterfactual,
            "similarity": self.similarity,
            "scope_learning_rate": self.scope_learning_rate,
            "training": self.training.content_hash(),
            **self._learning_settings.as_key(),
        }

    def _check_copy(self, model: ModelDescription) -> None:
        size = parameters_of(reader_shape(self.counterfactual, model))
        if self.counterfactual is None and size > LARGEST_COPY:
            raise ConfigError(
                f"method.counterfactual=null would train a copy of {model.name}, which has {size / 1e9:.1f} billion parameters (at most "
                f"{LARGEST_COPY / 1e9:.0f}); set it to a small model with the same tokenizer, as published gpt2 for GPT-2 XL and "
                "JackFram/llama-160m for Llama 2, or to the model's own name or folder to train its copy all the same"
            )

    def _part_of_archive(self, part: str) -> Path:
        return Path(self.archive or "").expanduser() / f"{part}.safetensors"

    def _path(self, part: str, belongs: Mapping[str, Any], cache: Cache) -> Path:
        if self.archive is not None:
            return self._part_of_archive(part)
        learning = self._learning(VERSIONS[part], counterfactual=belongs.get("counterfactual"))  # which the classifier does not depend on
        return cache.path(f"serac-{part}", content_key({**belongs, **learning}), ".safetensors")

    def _scope(self, lm: LanguageModel, cache: Cache, progress: Progress) -> tuple[SentenceEncoder, float]:
        """Return the trained encoder, on the model's device, and the cosine from which on a request is about a fact."""
        device = lm.input_device
        belongs = {"encoder": encoder_identity(self.encoder)}
        path = self._path("scope", belongs, cache)
        encoder = load_encoder(self.encoder, cache).to(device)
        if not path.exists():
            self._train_scope(encoder, device, path, belongs, progress)
        tensors, about = read_archive(path, belongs, kind=KIND)
        encoder.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()})
        encoder.forget()
        progress.message(f"scope classifier: {about['text']} ({path})")
        return encoder.requires_grad_(False), float(about["similarity"])

    def _train_scope(
        self, encoder: SentenceEncoder, device: torch.device, path: Path, belongs: Mapping[str, Any], progress: Progress
    ) -> None:
        from editeval.memory.scope import ScopeLearner  # here, as below: it imports lightning, which takes seconds
        from editeval.memory.training import train
        from editeval.training.learning import divided

        rows = self.training.load()
        progress.message(f"training a scope classifier on {len(rows)} rows of {self.training.name}; later runs read it")
        settings = replace(self._learning_settings, learning_rate=self.scope_learning_rate)
        learned, held_back = divided(rows, held_back=settings.held_back, seed=settings.seed)
        learner = ScopeLearner(encoder, learned, threshold=self.similarity).to(device)
        partial = path.with_suffix(".partial.safetensors")
        curve = train(learner, learned, held_back, settings, partial=partial, device=device, what="scope classifier", progress=progress)
        about = {**belongs, "similarity": learner.similarity, **self._reached(curve)}
        write_archive(path, dict(encoder.state_dict()), about, kind=KIND)
        partial.unlink(missing_ok=True)

    def _reader(self, lm: LanguageModel, cache: Cache, progress: Progress) -> LanguageModel:
        """Return the trained counterfactual model."""
        reader = self._untrained(lm, cache)
        belongs = {"model": lm.fingerprint, "counterfactual": None if self.counterfactual is None else reader.fingerprint}
        path = self._path("counterfactual", belongs, cache)
        if not path.exists():
            self._train_reader(reader, path, belongs, progress)
        tensors, about = read_archive(path, belongs, kind=KIND)
        with torch.inference_mode(mode=False), torch.no_grad():
            for name, parameter in reader.module.named_parameters():
                parameter.copy_(tensors[name])
        progress.message(f"counterfactual model: {about['text']} ({path})")
        module = cast_to(frozen(reader.module), lm.module.dtype)
        return replace(reader, module=module, fingerprint=file_sha256(path))

    def _train_reader(self, reader: LanguageModel, path: Path, belongs: Mapping[str, Any], progress: Progress) -> None:
        from editeval.memory.reader import ReaderLearner
        from editeval.memory.training import train
        from editeval.training.learning import divided

        rows = self.training.load()
        size = sum(parameter.numel() for parameter in reader.module.parameters())
        what = self.counterfactual or "a copy of the edited model"
        progress.message(f"training {what} ({size / 1e6:.1f} million parameters) to answer by a fact, on {len(rows)} rows")
        device = next(reader.module.parameters()).device
        settings, partial = self._learning_settings, path.with_suffix(".partial.safetensors")
        learned, held_back = divided(rows, held_back=settings.held_back, seed=settings.seed)
        learner = ReaderLearner(reader)
        curve = train(learner, learned, held_back, settings, partial=partial, device=device, what="counterfactual model", progress=progress)
        write_archive(path, dict(reader.module.named_parameters()), {**belongs, **self._reached(curve)}, kind=KIND)
        partial.unlink(missing_ok=True)

    def _reached(self, curve: Sequence[Validation]) -> Mapping[str, Any]:
        """Return what the file of a part says of its training: its best validation, all of them, its rows."""
        best = min(curve, key=lambda validation: validation.loss)
        text = f"best at step {best.step}: {best.text()}"
        return {"text": text, "curve": [asdict(each) for each in curve], **rows_learned(self.training)}

    def _small(self, cache_dir: Path, *, device: str = "cpu") -> PretrainedModel:
        """Return the source of the counterfactual model, where one is named."""
        name_or_path = str(self.counterfactual)
        return PretrainedModel(name=Path(name_or_path).name, name_or_path=name_or_path, cache_dir=cache_dir, device=device)

    def _untrained(self, lm: LanguageModel, cache: Cache) -> LanguageModel:
        """Return the counterfactual model before training, in float32; its packed copies stand beside the edited model's.

        Raises:
            ConfigError: it cannot be had, or has another tokenizer.
        """
        if self.counterfactual is None:
            return replace(lm, module=cast_to(copy.deepcopy(lm.module), torch.float32), packed=lm.packed.another())
        device = str(lm.input_device)
        small = self._small(cache.root, device=device).load()
        if small.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
            raise ConfigError(
                f"method.counterfactual={self.counterfactual} has another vocabulary ({len(small.tokenizer)} tokens) than "
                f"{lm.description.name} ({len(lm.tokenizer)}), so their scores could not be compared; choose a model of the same family"
            )
        return replace(small, packed=lm.packed.another())


def cast_to(module: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast a module, in place, and return it."""
    nn.Module.to(module, dtype=dtype)  # transformers' own wrapper hides the signature
    return module


class CounterfactualAdapter(MemoryAdapter):
    """A memory whose facts go, with what is asked about them, to another model (a `RequestAdapter`)."""

    def __init__(self, encoder: SentenceEncoder, *, similarity: float, reader: EditedModel) -> None:
        super().__init__(encoder, similarity=similarity, count=1)
        self.reader = reader

    def routes(self, requests: Sequence[str]) -> Sequence[Route | None]:
        """Return each request's route: to the counterfactual model, behind the fact that it is about; None where it is about none."""
        return [Route(prefix=question(hits[0].fact.statement), model=self.reader) if hits else None for hits in self.about(requests)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Editor:
    """SERAC bound to a model's memory."""

    memory: CounterfactualAdapter

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        """Return the facts as the memory keeps them.

        Raises:
            EditError: a fact and its prompt are longer than the counterfactual model takes.
        """
        for request in requests:
            statement_that_fits(self.memory.reader.lm, request)
        embeddings = self.memory.encoder.encode([request.full_prompt for request in requests])
        facts = [
            Fact(prompt=request.full_prompt, subject=request.subject, target=request.target_new, embedding=embedding)
            for request, embedding in zip(requests, embeddings, strict=True)
        ]
        return Edit(deltas=(memory_delta(facts),), diagnostics={"facts": float(len(self.memory.facts) + len(facts))})

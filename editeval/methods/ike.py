"""IKE: leave the model alone; put the new fact, and examples of how new facts are used, before what is asked.

Zheng et al. 2023, "Can We Edit Factual Knowledge by In-Context Learning?", arXiv:2305.12740.

    python launch.py method=ike num_edits=10
    python launch.py method=ike training=counterfact dataset=counterfact paths.data=DIR num_edits=[1,10,100]

An edit chooses the fact's examples out of a pool (`memory.demonstrations`) and records both. A request x about a fact f is asked as

    example_1 ... example_k  "New Fact: f \\n Prompt: " x

The paper knows one fact, and asks everything after it. Along a sequence of edits there is a memory of facts, and a request goes after the
ones that it is about (`memory.facts`: our rule, the paper has none); every other is asked of the model as it is, with the very same score.
The published code finds neighbours by the embedding of an example's whole text and shuffles the kinds; here it is the statement's, and the
examples nearest to the fact stand last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from editeval.datasets.training import TrainingSet
from editeval.edits.delta import Edit
from editeval.files import Cache
from editeval.inference.adapters import Route
from editeval.inference.edited import EditedModel
from editeval.interfaces import attach
from editeval.keyvalue.footprint import FLOAT32
from editeval.memory.demonstrations import KINDS, DemonstrationPool, example, pool_of, question, statement_that_fits
from editeval.memory.encoder import SentenceEncoder, check_encoder, encoder_identity, encoder_settings_in, fetch_encoder, load_encoder
from editeval.memory.facts import Fact, MemoryAdapter, memory_delta
from editeval.memory.footprint import encoder_disk, encoder_shape, fact_bytes
from editeval.models.model import LanguageModel
from editeval.training.footprint_training import TRAINING_ROWS
from editeval.types import ConfigError, EditevalError, EditRequest, Footprint, ModelDescription, Progress, Workload


@dataclass(frozen=True, kw_only=True)
class IKE:
    """IKE's settings; published numbers are in conf/method/ike.yaml and conf/tuned/ike.

    `demonstrations` examples a fact, of the kinds copy, update and retain in this `ratio`, out of `training`. `similarity` is the least
    cosine at which a request is about a fact, `facts` the most facts that are put before a request.
    """

    max_batch_size: ClassVar[int | None] = None

    name: str
    encoder: str
    demonstrations: int
    ratio: Sequence[int]
    similarity: float
    facts: int
    training: TrainingSet

    def __post_init__(self) -> None:
        if self.demonstrations < 0 or self.facts < 1:
            raise ConfigError(f"method.demonstrations={self.demonstrations} (at least 0) and method.facts={self.facts} (at least 1)")
        if len(self.ratio) != len(KINDS) or min(self.ratio) < 0 or not any(self.ratio):
            raise ConfigError(f"method.ratio={list(self.ratio)} must be three shares, of {', '.join(KINDS)}, such as [1,3,4]")
        if not 0 < self.similarity <= 1:
            raise ConfigError(f"method.similarity={self.similarity} must be a cosine above 0, at most 1")

    def settings(self) -> Mapping[str, Any]:
        """Return everything that edits and answers depend on beside model and requests."""
        return {
            "encoder": encoder_identity(self.encoder),
            "demonstrations": self.demonstrations,
            "ratio": list(self.ratio),
            "similarity": self.similarity,
            "facts": self.facts,
            "training": self.training.content_hash() if self.demonstrations else None,
        }

    def check(self, model: ModelDescription) -> None:
        """Check encoder and training rows.

        Raises:
            ConfigError: there is no such encoder.
            DatasetError: the training set cannot be read, or shares every subject with what is edited.
        """
        check_encoder(self.encoder)
        if self.demonstrations:
            self.training.check()

    def footprint(self, model: ModelDescription, workload: Workload) -> Footprint:
        """Predict memory, disk and operations from shapes. Requests with facts before them are longer, which is the evaluation's memory."""
        encoder = encoder_shape(self.encoder)
        shown = self.demonstrations + 1 if self.demonstrations else 0  # the new fact itself ends them
        pool = TRAINING_ROWS * encoder.width * FLOAT32 if self.demonstrations else 0
        return Footprint(
            held_bytes={"sentence encoder": encoder.bytes},
            host_bytes=3 * pool,  # embeddings in float32, and in float64 where they are compared
            disk_bytes=encoder_disk(self.encoder) + pool,
            journal_bytes=fact_bytes(encoder, workload, demonstrations=shown),
            once_operations=encoder.operations(TRAINING_ROWS) if self.demonstrations else 0.0,
            edit_operations=workload.batch_size * (encoder.operations(2) + 2.0 * pool / FLOAT32),
        )

    def fetch(self, folder: Path) -> tuple[Path, ...]:
        """Copy the encoder into a folder for machines without network; return its files.

        Raises:
            ConfigError: it cannot be had.
        """
        return fetch_encoder(self.encoder, folder)

    def found_in(self, folder: Path) -> Mapping[str, str]:
        """Return where `fetch` put the encoder."""
        return encoder_settings_in(self.encoder, folder)

    def adapter(self, lm: LanguageModel, cache: Cache, progress: Progress) -> ContextAdapter:
        """Return an empty memory, with the encoder on the model's device."""
        encoder = load_encoder(self.encoder, cache)
        encoder.to(lm.input_device)
        return ContextAdapter(encoder, similarity=self.similarity, count=self.facts)

    def prepare(self, model: EditedModel, cache: Cache, progress: Progress) -> Editor:
        """Return the editor, which adds to the memory that is attached to the model (attached here where there is none).

        Raises:
            EditevalError: the adapter of another method is attached.
        """
        attach(self, model, cache, progress)
        if not isinstance(model.adapter, ContextAdapter):
            raise EditevalError(f"IKE adds to a memory, but a {type(model.adapter).__name__} is attached; load the model anew")
        encoder = model.adapter.encoder
        pool = pool_of(self.training.load(), encoder, cache, progress) if self.demonstrations else None
        return Editor(lm=model.lm, encoder=encoder, pool=pool, settings=self)


class ContextAdapter(MemoryAdapter):
    """A memory whose facts are put before the requests that they are about (a `RequestAdapter`)."""

    def routes(self, requests: Sequence[str]) -> Sequence[Route | None]:
        """Return each request's route: behind its facts, the nearest last; None where it is about none."""
        return [_route([hit.fact for hit in hits]) for hits in self.about(requests)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Editor:
    """IKE bound to a model, with its pool of examples."""

    lm: LanguageModel
    encoder: SentenceEncoder
    pool: DemonstrationPool | None
    settings: IKE

    def edit(self, requests: Sequence[EditRequest], *, seed: int) -> Edit:
        """Return the facts with the examples chosen for each.

        Raises:
            EditError: a fact and its prompt are longer than the model takes.
        """
        facts = [self._fact(request) for request in requests]
        return Edit(deltas=(memory_delta(facts),), diagnostics={"demonstrations": float(len(facts[0].demonstrations))} if facts else {})

    def _fact(self, request: EditRequest) -> Fact:
        statement = statement_that_fits(self.lm, request)
        shown: tuple[str, ...] = ()
        if self.pool is not None:
            (embedded,) = self.encoder.encode([statement])
            shown = self.pool.examples(embedded, count=self.settings.demonstrations, ratio=self.settings.ratio)
            # The published context ends its examples with the new fact itself.
            shown = (*shown, example(statement, request.full_prompt, request.target_new))
        (embedding,) = self.encoder.encode([request.full_prompt])
        return Fact(
            prompt=request.full_prompt,
            subject=request.subject,
            target=request.target_new,
            embedding=embedding,
            demonstrations=shown,
        )


def _route(facts: Sequence[Fact]) -> Route | None:
    """Return the route behind these facts, of which the first is the nearest."""
    if not facts:
        return None
    further = "".join(f"New Fact: {fact.statement}\n" for fact in reversed(facts[1:]))
    return Route(prefix=further + question(facts[0].statement), demonstrations=facts[0].demonstrations)

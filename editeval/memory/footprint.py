"""What memories of facts need, predicted from shapes alone: their sentence encoder, facts as text, a model that answers for the edited one.

What an encoder or another model takes is not looked up, so that nothing has to be at hand: the published ones stand for all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from editeval.keyvalue.footprint import FLOAT32, PROMPT_TOKENS, TARGET_TOKENS, all_mlp_maps
from editeval.keyvalue.footprint_gradient import ADAM_OPERATIONS, GradientPass
from editeval.memory.encoder import HASHED
from editeval.training.footprint_training import Learning, rows_read
from editeval.types import Footprint, ModelDescription, Workload

if TYPE_CHECKING:
    from editeval.training.settings import LearningSettings

FACT_CHARACTERS = 70  # prompt, subject and target
LAYOUT_CHARACTERS = 200  # what the journal writes around the texts of an edit
EXAMPLE_CHARACTERS = 140  # a demonstration: fact, prompt and answer
SCOPE_TEXTS = 10  # that a row of the classifier's training is compared by: five requests of its own, five of the row nearest to it
READER_ROWS = 2  # prompt and a paraphrase
READER_TOKENS = 3 * PROMPT_TOKENS  # the fact, the prompt, and the words between
TRAINED_OPERATIONS = 6.0  # a parameter and token, both ways and for the weights


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """A sentence encoder's parameters (float32) and the width of its embeddings."""

    parameters: int
    width: int

    @property
    def bytes(self) -> int:
        """What its weights take."""
        return self.parameters * FLOAT32

    def operations(self, texts: float) -> float:
        """Return the operations of embedding so many texts."""
        return 2.0 * self.parameters * texts * PROMPT_TOKENS


MINILM_SHAPE = EncoderShape(parameters=22_713_216, width=384)  # all-MiniLM-L6-v2: 91 MB
HASHED_SHAPE = EncoderShape(parameters=4096 * 64, width=64)


def encoder_shape(setting: str) -> EncoderShape:
    """Return the shape of an encoder by its setting; one that is not built in counts like all-MiniLM-L6-v2."""
    return HASHED_SHAPE if setting == HASHED else MINILM_SHAPE


def encoder_disk(setting: str) -> int:
    """Return what an encoder takes in the cache."""
    return 0 if setting == HASHED else MINILM_SHAPE.bytes


def fact_bytes(encoder: EncoderShape, workload: Workload, *, demonstrations: int) -> int:
    """Return what the facts of an edit take in the journal: texts, the examples of each, its embedding."""
    fact = FACT_CHARACTERS + demonstrations * EXAMPLE_CHARACTERS + encoder.width * FLOAT32
    return LAYOUT_CHARACTERS + workload.batch_size * fact


def scope_training(encoder: EncoderShape, settings: LearningSettings) -> Footprint:
    """Predict the training of a scope classifier."""
    learning = Learning(parameters=encoder.parameters)
    rows = rows_read(settings.max_steps, settings.rows_per_step, settings.validate_every)
    return Footprint(
        peak_bytes={"training the scope classifier": learning.device},
        host_bytes=learning.host,
        disk_bytes=learning.disk,
        once_operations=rows * 3 * encoder.operations(SCOPE_TEXTS) + settings.max_steps * ADAM_OPERATIONS * encoder.parameters,
    )


def reader_shape(counterfactual: str | None, model: ModelDescription) -> ModelDescription:
    """Return the shape of a counterfactual model: a copy, or for one that is named llama-160m's (GPT-2's is much like it)."""
    return model if counterfactual is None else replace(model, num_layers=12, hidden_size=768, intermediate_size=3072)


def reader_training(reader: ModelDescription, workload: Workload, settings: LearningSettings) -> Footprint:
    """Predict the training of a counterfactual model of this shape, in float32."""
    parameters = parameters_of(reader)
    learning = Learning(parameters=parameters)
    step = GradientPass(first=0, rows=settings.rows_per_step * READER_ROWS, tokens=READER_TOKENS, scored=READER_TOKENS)
    kept = step.kept_bytes(reader, Workload(element_bytes=FLOAT32, batch_size=workload.batch_size))
    wider = parameters * (FLOAT32 - workload.element_bytes)  # than the copy that is held afterwards
    rows = rows_read(settings.max_steps, settings.rows_per_step, settings.validate_every)
    tokens = rows * READER_ROWS * (READER_TOKENS + TARGET_TOKENS)
    return Footprint(
        peak_bytes={"training the counterfactual model": learning.device + wider + kept},
        host_bytes=learning.host,
        disk_bytes=learning.disk,
        once_operations=tokens * TRAINED_OPERATIONS * parameters + settings.max_steps * ADAM_OPERATIONS * parameters,
    )


def parameters_of(model: ModelDescription) -> int:
    """Return the parameters of a model of this shape, attention at most and the embedding once (as where it is tied)."""
    layer = 4 * model.hidden_size**2 + sum(edited.elements for edited in all_mlp_maps(model))
    return model.num_layers * layer + model.vocab_size * model.hidden_size

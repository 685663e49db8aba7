"""What methods that take gradients need in memory, on disk and in operations, predicted from shapes alone.

A pass goes through the layers from the first edited one up, and back; what those layers make at each position is kept for the way back.
Fine-tuning adds whole float32 matrices: the change, its gradient, Adam's two moments. Steps are counted as if none ended early.

Shapes: D the model's width, V the vocabulary, N positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from editeval.keyvalue.footprint import (
    APPLYING,
    FLOAT32,
    KEPT_LOGITS,
    MASTERS,
    PROMPT_TOKENS,
    TARGET_TOKENS,
    MapShape,
    factor_bytes,
    kept_width,
    layer_operations,
    writing_of,
)
from editeval.types import Footprint, ModelDescription, Workload

# Adam waits for memory: a dozen reads and writes of an element, each as long as some twenty operations of a large product.
ADAM_OPERATIONS = 250.0
# Float32 copies of what is tuned that are alive at once: the change, its gradient, two moments; and of one matrix in the midst of a step.
TUNED_COPIES = 4
STEP_COPIES = 3


@dataclass(frozen=True, kw_only=True)
class GradientPass:
    """`rows` of `tokens` that go through the layers from `first` up and back; tokens are predicted at `scored` positions of each."""

    first: int
    rows: int
    tokens: int = PROMPT_TOKENS
    scored: int = TARGET_TOKENS

    @property
    def positions(self) -> int:
        """Positions of all rows."""
        return self.rows * self.tokens

    def kept_bytes(self, model: ModelDescription, workload: Workload) -> int:
        """Return what is kept for the way back: the layers' activations, and what is made of the logits."""
        activations = (model.num_layers - self.first) * self.positions * kept_width(model) * workload.element_bytes
        return activations + self.rows * self.scored * model.vocab_size * FLOAT32 * KEPT_LOGITS

    def operations(self, model: ModelDescription) -> float:
        """Return the operations of both ways; the gradient of activations costs a forward pass, none is taken of the weights."""
        logits = 2.0 * model.hidden_size * model.vocab_size * self.rows * self.scored
        return 2 * ((model.num_layers - self.first) * self.positions * layer_operations(model) + logits)

    def arriving_operations(self, model: ModelDescription) -> float:
        """Return the operations of bringing the rows to the first of these layers."""
        return self.first * self.positions * layer_operations(model)


def tuning_footprint(
    maps: Sequence[MapShape], model: ModelDescription, workload: Workload, *, first: int, rows_per_step: int, epochs: int, arrivals: int
) -> Footprint:
    """Predict an edit that fine-tunes whole matrices. The journal gets its gradients as factors, or the change where that is smaller.

    `arrivals` is how often the rows run through the layers below `first`.
    """
    facts = workload.batch_size
    elements = sum(edited.elements for edited in maps)
    writing = writing_of(maps, workload)
    step = GradientPass(first=first, rows=min(rows_per_step, facts))
    epoch = GradientPass(first=first, rows=facts)
    # The change acts beside the weights: forward, the gradient through it and its own, two operations each.
    changes = 6.0 * elements * epoch.positions + ceil(facts / rows_per_step) * ADAM_OPERATIONS * elements
    # Gradients at the maps' outputs at each step, and once what went into them.
    factors = sum(epoch.positions * (epochs * edited.d_out + edited.d_in) for edited in maps)
    tuned = TUNED_COPIES * elements + STEP_COPIES * max(edited.elements for edited in maps)
    return Footprint(
        held_bytes={MASTERS: writing.masters},
        peak_bytes={"fine-tuning": tuned * FLOAT32 + step.kept_bytes(model, workload), APPLYING: writing.applying},
        host_bytes=writing.copies + 2 * elements * FLOAT32,  # the change itself, and what is recorded of it
        journal_bytes=min(factors, elements) * FLOAT32,
        edit_operations=epochs * (epoch.operations(model) + changes) + arrivals * epoch.arriving_operations(model),
        edited=tuple(edited.shape for edited in maps),
        low_rank=False,
    )


def factors_footprint(
    maps: Sequence[MapShape], model: ModelDescription, workload: Workload, *, first: int, rank: int, rows_per_step: int, epochs: int
) -> Footprint:
    """Predict an edit that fine-tunes factors of `rank` of each map."""
    facts = workload.batch_size
    factors = factor_bytes(maps, rank=rank)
    writing = writing_of(maps, workload)
    step = GradientPass(first=first, rows=min(rows_per_step, facts))
    epoch = GradientPass(first=first, rows=facts)
    changes = factors / FLOAT32 * (6.0 * epoch.positions + ceil(facts / rows_per_step) * ADAM_OPERATIONS)
    return Footprint(
        held_bytes={MASTERS: writing.masters},
        peak_bytes={"fine-tuning": TUNED_COPIES * factors + step.kept_bytes(model, workload), APPLYING: writing.applying},
        host_bytes=writing.copies + 2 * factors,
        journal_bytes=factors,
        edit_operations=epochs * (epoch.operations(model) + changes) + epoch.arriving_operations(model),
        edited=tuple(edited.shape for edited in maps),
    )

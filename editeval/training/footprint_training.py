"""What training beforehand needs, predicted from shapes alone: the networks of MEND and RLEdit, and what any trained part takes.

Everything is counted as if it were trained now, to the last step: what lies in the cache already is not known from shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from editeval.keyvalue.footprint import APPLYING, FLOAT32, MASTERS, PROMPT_TOKENS, TARGET_TOKENS, MapShape, all_mlp_maps, writing_of
from editeval.keyvalue.footprint_gradient import ADAM_OPERATIONS, GradientPass
from editeval.models.sites import sites_for
from editeval.training.lessons import KEPT_LESSONS
from editeval.training.settings import MOST_HELD_BACK
from editeval.types import Footprint, ModelDescription, Workload

if TYPE_CHECKING:
    from editeval.training.hypernetwork_settings import TrainedSettings

TRAINING_ROWS = 20_000  # CounterFact's; how many a data set leaves is not looked up
ASKED_ROWS = 7  # of a lesson, in CounterFact: the prompt, two paraphrases, four of the neighbours
# Copies of what learns beside itself: its gradient, Adam's two moments, the best state so far, and the moments while they are saved.
LEARNING_COPIES = 6
SAVED_COPIES = 4  # in the file that interrupted training goes on from: the state, the best one, both moments


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Bytes that training float32 `parameters` takes beside them: on the device, on the host, and in the cache."""

    parameters: int

    @property
    def device(self) -> int:
        """Gradients, moments, copies."""
        return LEARNING_COPIES * self.parameters * FLOAT32

    @property
    def host(self) -> int:
        """What is saved, as tensors and as the file's bytes."""
        return 2 * SAVED_COPIES * self.parameters * FLOAT32

    @property
    def disk(self) -> int:
        """The trained part, and what is saved on the way: a file is written beside the one that it replaces."""
        return (1 + 2 * SAVED_COPIES) * self.parameters * FLOAT32


def rows_read(max_steps: int, rows_per_step: int, validate_every: int) -> float:
    """Return how many rows training reads, those of validations counted as a third (no way back)."""
    return max_steps * (rows_per_step + MOST_HELD_BACK / validate_every / 3)


def network_footprint(
    settings: TrainedSettings, model: ModelDescription, workload: Workload, *, lessons_per_row: int, rows_in_memory: int
) -> Footprint:
    """Predict edits by a hypernetwork, and its training unless there is an archive.

    In training a row is asked `lessons_per_row` lessons, and the passes of `rows_in_memory` rows are kept at once.
    """
    layers = settings.layers_of(model)
    sites, chosen = sites_for(model.model_type), settings.maps_of(model)
    each = [edited for path, edited in zip((*sites.mlp_in, sites.mlp_out), all_mlp_maps(model), strict=True) if path in chosen]
    maps = [(edited, _positions(layer, model)) for layer in layers for edited in each]
    shapes = [edited for edited, _ in maps]
    parameters = network_parameters(shapes, rank=settings.rank)
    writing = writing_of(shapes, workload)
    edit = GradientPass(first=layers[0], rows=workload.batch_size)
    pairs = workload.batch_size * sum(count * (edited.d_in + edited.d_out) for edited, count in maps) * FLOAT32
    mapped = 8.0 * settings.rank * pairs / FLOAT32  # two layers of two products, two operations each
    learned = (
        Footprint() if settings.archive is not None else _learned(settings, model, workload, parameters, lessons_per_row, rows_in_memory)
    )
    return Footprint(
        held_bytes={"editor network": parameters * FLOAT32, MASTERS: writing.masters},
        peak_bytes={
            **learned.peak_bytes,
            "gradient of the facts": edit.kept_bytes(model, workload) + 4 * pairs,  # normalised in float64, and mapped
            APPLYING: writing.applying,
        },
        host_bytes=writing.copies + 2 * pairs + learned.host_bytes,
        disk_bytes=learned.disk_bytes,
        journal_bytes=pairs,
        once_operations=learned.once_operations,
        edit_operations=edit.arriving_operations(model) + edit.operations(model) + mapped,
        edited=tuple(edited.shape for edited in shapes),
    )


def network_parameters(maps: list[MapShape], *, rank: int) -> int:
    """Return the parameters of a hypernetwork: two low-rank layers a shape, with scale and shift of each map."""
    found = 0
    for shape in {edited.shape for edited in maps}:
        width, count = sum(shape), sum(edited.shape == shape for edited in maps)
        found += 2 * (2 * min(rank, width) * width + width + 2 * count * width)
    return found


def _positions(layer: int, model: ModelDescription) -> int:
    """Return at how many positions of a fact the loss has a gradient: in the last layer only where a token is predicted."""
    return PROMPT_TOKENS if layer < model.num_layers - 1 else TARGET_TOKENS


def _learned(
    settings: TrainedSettings, model: ModelDescription, workload: Workload, parameters: int, lessons_per_row: int, rows_in_memory: int
) -> Footprint:
    first = settings.layers_of(model)[0]
    edit, asked = GradientPass(first=first, rows=1), GradientPass(first=first, rows=ASKED_ROWS)
    learning = Learning(parameters=parameters)
    lessons = min(KEPT_LESSONS, TRAINING_ROWS) * (1 + ASKED_ROWS) * PROMPT_TOKENS * model.hidden_size * workload.element_bytes
    graphs = rows_in_memory * (edit.kept_bytes(model, workload) + asked.kept_bytes(model, workload))
    row = edit.arriving_operations(model) + asked.arriving_operations(model) + edit.operations(model)
    row += lessons_per_row * asked.operations(model) + 6.0 * parameters * PROMPT_TOKENS
    rows = rows_read(settings.max_steps, settings.rows_per_step, settings.validate_every)
    return Footprint(
        peak_bytes={"training the editor network": learning.device + lessons + graphs},
        host_bytes=learning.host,
        disk_bytes=learning.disk,
        once_operations=rows * row + settings.max_steps * ADAM_OPERATIONS * parameters,
    )

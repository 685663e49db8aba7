"""What locate-then-edit needs in memory, on disk and in operations, predicted from shapes alone.

Held on the device: what solves with C, and float32 masters of edited matrices where the model is stored in half precision. Then one
phase at a time: getting ready (a factorisation), optimising target values (activations of the layers above the site, at the positions from
the subject's last token on), applying (old, new and difference of each edited matrix in float32).

Shapes: B rows, T positions of a row, S of them from the subject's last token on, D the model's width, I the MLP's, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editeval.types import Footprint, ModelDescription, Workload

if TYPE_CHECKING:
    from editeval.keyvalue.settings import LocateSettings

FACTS_TOGETHER = 8  # as in editeval.keyvalue.spread
PROMPT_TOKENS = 12  # CounterFact: prompt and target of a row are shorter nine times in ten
SUFFIX_TOKENS = 6  # from the subject's last token on; CounterFact: mean 4.4, nine rows in ten at most 6
TARGET_TOKENS = 2
FLOAT32 = 4
FLOAT64 = 8

# Tensors that one layer keeps for its gradient, a position: norms upcast, projections, rotary copies, both branches; then inside the MLP.
KEPT_WIDTHS = 14
KEPT_INNER_WIDTHS = 4
# Logits, their log-softmax, and the gradients of both.
KEPT_LOGITS = 4


@dataclass(frozen=True, kw_only=True)
class EditedMap:
    """A linear map that is edited: (d_out, d_in)."""

    d_out: int
    d_in: int


@dataclass(frozen=True, kw_only=True)
class Solver:
    """What is kept of a map's C (K, K), in float64 matrices of its size: on the device, on the host, on disk, and while it is made."""

    device: float = 0.0
    host: float = 0.0
    disk: float = 0.0
    making: float = 0.0


FACTOR = Solver(host=1.0, disk=1.0, making=0.0)  # factorised on the host
INVERSE = Solver(device=1.0, disk=1.0, making=4.0)  # C, C + ridge, factor, inverse at once
PROJECTION = Solver(device=1.5, disk=0.5, making=4.0)  # at most half the directions, and a matrix of folded keys; eigenvectors
NOTHING = Solver()


def mlp_maps(model: ModelDescription, count: int) -> list[EditedMap]:
    """Return the MLP output maps of `count` layers."""
    return [EditedMap(d_out=model.hidden_size, d_in=model.intermediate_size)] * count


def attention_maps(model: ModelDescription, count: int) -> list[EditedMap]:
    """Return the attention output maps of `count` layers."""
    return [EditedMap(d_out=model.hidden_size, d_in=model.hidden_size)] * count


def locate_footprint(
    settings: LocateSettings,
    model: ModelDescription,
    workload: Workload,
    *,
    last_layer: int,
    maps: Sequence[EditedMap],
    solver: Solver,
) -> Footprint:
    """Predict an edit of `maps` whose target values are optimised at `last_layer`."""
    matrices = sum(edited.d_out * edited.d_in for edited in maps)
    squares = [edited.d_in**2 * FLOAT64 for edited in maps] if solver != NOTHING else [0]
    half = workload.element_bytes < FLOAT32
    optimising = _optimising_bytes(settings, model, workload, last_layer)
    scratch = max(edited.d_out * edited.d_in for edited in maps) * FLOAT32 * 2  # the difference, and a factor in float64
    once = _once_operations(settings, model, last_layer, maps) if solver != NOTHING else 0.0
    return Footprint(
        held_bytes={
            "what solves with the covariance": round(solver.device * sum(squares)),
            "float32 masters of edited matrices": matrices * FLOAT32 if half else 0,
        },
        peak_bytes={
            "factorising a covariance": round(solver.making * max(squares)),
            "optimising target values": optimising,
            "applying an edit": matrices * FLOAT32 + scratch,
        },
        # The unedited copies of edited matrices, and C while it is summed up and factorised.
        host_bytes=round(matrices * workload.element_bytes + solver.host * sum(squares) + max(squares)),
        disk_bytes=round(solver.disk * sum(squares) + sum(squares) / 4),  # C itself: half of it, in float32
        journal_bytes=sum(workload.batch_size * (edited.d_out + edited.d_in) * FLOAT32 for edited in maps),
        once_operations=once,
        edit_operations=_edit_operations(settings, model, workload, last_layer, maps),
    )


def _rows(settings: LocateSettings, facts: int) -> tuple[int, int]:
    """Return how many rows a pass over `facts` facts has, and the tokens of the longest: prefixes, bare prompt, essence."""
    if settings.context_prefixes is not None:
        longest = max((len(context.split()) * 2 for context in settings.context_prefixes), default=0)
        return facts * (len(settings.context_prefixes) + 1), PROMPT_TOKENS + longest
    count = sum(pair[1] for pair in settings.prefix_lengths)
    longest = max((pair[0] for pair in settings.prefix_lengths), default=0)
    return facts * (count + 2), PROMPT_TOKENS + longest + 1


def _optimising_bytes(settings: LocateSettings, model: ModelDescription, workload: Workload, last_layer: int) -> int:
    facts = min(workload.batch_size, FACTS_TOGETHER)
    rows, tokens = _rows(settings, facts)
    above = model.num_layers - last_layer
    width = KEPT_WIDTHS * model.hidden_size + KEPT_INNER_WIDTHS * model.intermediate_size
    activations = above * rows * SUFFIX_TOKENS * width * workload.element_bytes
    # Keys and values of every position: once kept for all layers, once joined to the new ones in each layer above the site.
    cache = (model.num_layers + above) * rows * tokens * 2 * model.hidden_size * workload.element_bytes
    logits = (rows * TARGET_TOKENS + facts) * model.vocab_size * FLOAT32 * KEPT_LOGITS
    return activations + cache + logits


def _layer_operations(model: ModelDescription) -> float:
    """Return the operations of one layer for one position: two a weight (gated MLPs have three maps)."""
    return 2.0 * (4 * model.hidden_size**2 + 3 * model.hidden_size * model.intermediate_size)


def _edit_operations(
    settings: LocateSettings, model: ModelDescription, workload: Workload, last_layer: int, maps: Sequence[EditedMap]
) -> float:
    rows, tokens = _rows(settings, workload.batch_size)
    layer = _layer_operations(model)
    above = model.num_layers - last_layer
    logits = 2.0 * model.hidden_size * model.vocab_size * (rows * TARGET_TOKENS + workload.batch_size)
    # The gradient of activations costs a forward pass; none is taken of the weights.
    step = 2 * (above * rows * SUFFIX_TOKENS * layer + logits)
    first = model.num_layers * rows * tokens * layer
    walk = 2 * len(maps) * rows * tokens * layer
    solves = sum(2.0 * edited.d_in**2 * workload.batch_size for edited in maps)
    return settings.num_steps * step + first + walk + solves


def _once_operations(settings: LocateSettings, model: ModelDescription, last_layer: int, maps: Sequence[EditedMap]) -> float:
    """Return the operations of the pass over the text and of one factorisation and inverse a map."""
    tokens = settings.corpus.tokens if settings.covariance is None else 0
    read = tokens * ((last_layer + 1) * _layer_operations(model) + sum(2.0 * edited.d_in**2 for edited in maps))
    return read + sum(2.0 * edited.d_in**3 for edited in maps)

"""What locate-then-edit needs in memory, on disk and in operations, predicted from shapes alone; and what other predictions share with it.

Held on the device: what solves with C, and float32 masters of edited matrices where the model is stored in half precision. Then one
phase at a time: getting ready (a factorisation), optimising target values (activations of the layers above the site, at the positions from
the subject's last token on), applying (old, new and difference of each edited matrix in float32).

Shapes: B rows, T positions of a row, S of them from the subject's last token on, D the model's width, I the MLP's, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from editeval.keyvalue.graphs import MOST_GRAPHS
from editeval.keyvalue.target_value import FACTS_PER_PASS
from editeval.models.sites import sites_for
from editeval.types import Footprint, ModelDescription, Workload

if TYPE_CHECKING:
    from editeval.keyvalue.settings import LocateSettings

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

MASTERS = "float32 masters of edited matrices"
APPLYING = "applying an edit"


@dataclass(frozen=True, kw_only=True)
class MapShape:
    """The shape of a linear map that is edited: (d_out, d_in)."""

    d_out: int
    d_in: int

    @property
    def elements(self) -> int:
        """Elements of the matrix."""
        return self.d_out * self.d_in

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.d_out, self.d_in


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Bytes of having edits in weights: float32 `masters` where the model is in half precision, on the device all the time; `applying`
    there while an update is added; unedited `copies` on the host.
    """

    masters: int
    applying: int
    copies: int


@dataclass(frozen=True, kw_only=True)
class Solver:
    """What is kept of a map's C (K, K), in float64 matrices of its size: on the device, on disk, and on the device while it is made."""

    device: float = 0.0
    disk: float = 0.0
    making: float = 0.0


FACTOR = Solver(device=1.0, disk=1.0, making=4.0)  # C, C + ridge and what makes it, factor at once
INVERSE = Solver(device=1.0, disk=1.0, making=4.0)  # C, C + ridge, factor, inverse at once
PROJECTION = Solver(device=1.5, disk=0.5, making=4.0)  # at most half the directions, and a matrix of folded keys; eigenvectors
NOTHING = Solver()
SUMS = 1.5  # of the size of C in float64: a sum in it, and a chunk's own in float32


def mlp_maps(model: ModelDescription, count: int) -> list[MapShape]:
    """Return the MLP output maps of `count` layers."""
    return [MapShape(d_out=model.hidden_size, d_in=model.intermediate_size)] * count


def all_mlp_maps(model: ModelDescription) -> list[MapShape]:
    """Return the linear maps of one layer's MLP: those into it, then the one out of it."""
    sites = sites_for(model.model_type)
    fused = 2 if sites.gated and len(sites.mlp_in) == 1 else 1
    into = MapShape(d_out=fused * model.intermediate_size, d_in=model.hidden_size)
    return [*[into] * len(sites.mlp_in), *mlp_maps(model, 1)]


def maps_of(model: ModelDescription, kind: str) -> list[MapShape]:
    """Return the linear maps of a kind (`models.sites.MAPS`) of one layer's MLP.

    Raises:
        ConfigError: the model has none of its own.
    """
    *into, out = all_mlp_maps(model)
    return [out] if kind == "mlp_out" else into[: len(sites_for(model.model_type).maps_of(kind))]


def attention_maps(model: ModelDescription, count: int) -> list[MapShape]:
    """Return the attention output maps of `count` layers."""
    return [MapShape(d_out=model.hidden_size, d_in=model.attention_width)] * count


def locate_footprint(
    settings: LocateSettings,
    model: ModelDescription,
    workload: Workload,
    *,
    last_layer: int,
    maps: Sequence[MapShape],
    solver: Solver,
) -> Footprint:
    """Predict an edit of `maps` whose target values are optimised at `last_layer`."""
    writing = writing_of(maps, workload)
    squares = [edited.d_in**2 * FLOAT64 for edited in maps] if solver != NOTHING else [0]
    activations, cache = _optimising_bytes(settings, model, workload, last_layer)
    graphs = activations + MOST_GRAPHS * _captured_cache(settings, model, workload, last_layer) if workload.captured else 0
    once = _once_operations(settings, model, last_layer, maps) if solver != NOTHING else 0.0
    return Footprint(
        held_bytes={
            "what solves with the covariance": round(solver.device * sum(squares)),
            MASTERS: writing.masters,
            "steps captured as graphs": graphs,
        },
        peak_bytes={
            "summing up covariances": round(SUMS * sum(squares)),
            "factorising a covariance": round(solver.making * max(squares)),
            "optimising target values": activations + cache,
            APPLYING: writing.applying,
        },
        # The unedited copies of edited matrices, and what is read of C, or written.
        host_bytes=writing.copies + max(squares),
        disk_bytes=round(solver.disk * sum(squares) + sum(squares) / 4),  # C itself: half of it, in float32
        journal_bytes=factor_bytes(maps, rank=workload.batch_size),
        once_operations=once,
        edit_operations=_edit_operations(settings, model, workload, last_layer, maps),
        edited=tuple(edited.shape for edited in maps),
    )


def writing_of(maps: Sequence[MapShape], workload: Workload) -> Writing:
    """Predict what the weights themselves take when edits are written into them."""
    matrices = sum(edited.elements for edited in maps)
    scratch = max((edited.elements for edited in maps), default=0) * FLOAT32 * 2  # the difference, and a factor in float64
    masters = matrices * FLOAT32 if workload.element_bytes < FLOAT32 else 0
    return Writing(masters=masters, applying=matrices * FLOAT32 + scratch, copies=matrices * workload.element_bytes)


def factor_bytes(maps: Sequence[MapShape], *, rank: int) -> int:
    """Return the bytes of a low-rank update of each map in the journal."""
    return sum(rank * (edited.d_out + edited.d_in) * FLOAT32 for edited in maps)


def remembering_keys(footprint: Footprint, workload: Workload) -> Footprint:
    """Add to a prediction what it takes to remember the key of each fact in each edited map."""
    keys = workload.batch_size * sum(d_in for _, d_in in footprint.edited) * FLOAT32
    return replace(footprint, journal_bytes=footprint.journal_bytes + keys, auxiliary_bytes=footprint.auxiliary_bytes + keys)


def prefixed_rows(context_prefixes: Sequence[str] | None, prefix_lengths: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return how many rows a fact has, the bare prompt and one behind each context prefix, and the tokens of the longest."""
    if context_prefixes is not None:
        return len(context_prefixes), PROMPT_TOKENS + max((len(context.split()) * 2 for context in context_prefixes), default=0)
    return sum(pair[1] for pair in prefix_lengths) + 1, PROMPT_TOKENS + max((pair[0] for pair in prefix_lengths), default=0) + 1


def _rows(settings: LocateSettings, facts: int) -> tuple[int, int]:
    """Return how many rows a pass over `facts` facts has, and the tokens of the longest: prefixes, bare prompt, essence."""
    rows, tokens = prefixed_rows(settings.context_prefixes, settings.prefix_lengths)
    return facts * (rows + 1), tokens


def _optimising_bytes(settings: LocateSettings, model: ModelDescription, workload: Workload, last_layer: int) -> tuple[int, int]:
    """Return what a step keeps for its gradient, and the keys and values of the positions before."""
    facts = min(workload.batch_size, FACTS_PER_PASS)
    rows, tokens = _rows(settings, facts)
    above = model.num_layers - last_layer
    activations = above * rows * SUFFIX_TOKENS * kept_width(model) * workload.element_bytes
    # Keys and values of every position: once kept for all layers, once joined to the new ones in each layer above the site.
    cache = (model.num_layers + above) * _layer_cache(model, workload, rows, tokens)
    logits = (rows * TARGET_TOKENS + facts) * model.vocab_size * FLOAT32 * KEPT_LOGITS
    return activations + logits, cache


def _captured_cache(settings: LocateSettings, model: ModelDescription, workload: Workload, last_layer: int) -> int:
    """Return the keys and values of the positions before, above the site, that a captured step keeps for the next fact of its shape."""
    rows, tokens = _rows(settings, min(workload.batch_size, FACTS_PER_PASS))
    return (model.num_layers - last_layer) * _layer_cache(model, workload, rows, tokens)


def _layer_cache(model: ModelDescription, workload: Workload, rows: int, tokens: int) -> int:
    """Return the bytes of one layer's keys and values."""
    return rows * tokens * 2 * model.hidden_size * workload.element_bytes


def kept_width(model: ModelDescription) -> int:
    """Return the numbers that one layer keeps of a position for its gradient."""
    return KEPT_WIDTHS * model.hidden_size + KEPT_INNER_WIDTHS * model.intermediate_size


def layer_operations(model: ModelDescription) -> float:
    """Return the operations of one layer for one position: two a weight (gated MLPs have three maps)."""
    return 2.0 * (4 * model.hidden_size**2 + 3 * model.hidden_size * model.intermediate_size)


def _edit_operations(
    settings: LocateSettings, model: ModelDescription, workload: Workload, last_layer: int, maps: Sequence[MapShape]
) -> float:
    rows, tokens = _rows(settings, workload.batch_size)
    layer = layer_operations(model)
    above = model.num_layers - last_layer
    logits = 2.0 * model.hidden_size * model.vocab_size * (rows * TARGET_TOKENS + workload.batch_size)
    # The gradient of activations costs a forward pass; none is taken of the weights.
    step = 2 * (above * rows * SUFFIX_TOKENS * layer + logits)
    first = model.num_layers * rows * tokens * layer
    walk = 2 * len(maps) * rows * tokens * layer
    solves = sum(2.0 * edited.d_in**2 * workload.batch_size for edited in maps)
    return settings.num_steps * step + first + walk + solves


def _once_operations(settings: LocateSettings, model: ModelDescription, last_layer: int, maps: Sequence[MapShape]) -> float:
    """Return the operations of the pass over the text and of one factorisation and inverse a map."""
    tokens = settings.corpus.tokens if settings.covariance is None else 0
    read = tokens * ((last_layer + 1) * layer_operations(model) + sum(2.0 * edited.d_in**2 for edited in maps))
    return read + sum(2.0 * edited.d_in**3 for edited in maps)

"""What an edit changes: weight matrices, or what stands beside them (a codebook, a memory of facts), with what must be remembered.

Every matrix is written (d_out, d_in), whatever the module stores; a flag of the site turns GPT-2's Conv1D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LowRankDelta:
    """dW = left @ right for one parameter: left (d_out, r), right (r, d_in), float32 on the CPU."""

    parameter: str
    left: Tensor
    right: Tensor


@dataclass(frozen=True, kw_only=True)
class DenseDelta:
    """dW = value for one parameter: (d_out, d_in), float32 on the CPU."""

    parameter: str
    value: Tensor


@dataclass(frozen=True, kw_only=True)
class TunedDelta:
    """dW of one parameter as Adam makes it from zero, by its gradients: a fraction of the bytes of dW, and the same change bit for bit.

    Step s goes by the gradient sum_i left[a + i] right[b + i]^T, i < n, with a, b, n = `steps[s]`: of n positions, `left` (R, d_out) is
    the gradient of the loss at the map's output and `right` (M, d_in) what went into the map, both float32. `steps` (S, 3) is int64.
    No element of dW gets larger than `max_change` (None: no bound). All on the CPU.
    """

    parameter: str
    left: Tensor
    right: Tensor
    steps: Tensor
    learning_rate: float
    max_change: float | None


@dataclass(frozen=True, kw_only=True)
class SelectedDelta:
    """dW = left @ right at chosen elements of one parameter, 0 at the others: left (d_out, r), right (r, d_in), float32 on the CPU.

    `selected` (uint8, d_out d_in / 8 rounded up) has a bit an element, row by row, the first in the highest bit.
    """

    parameter: str
    left: Tensor
    right: Tensor
    selected: Tensor


@dataclass(frozen=True, kw_only=True)
class CodebookDelta:
    """Entries of the codebook at one site (GRACE), whole, as they are after the edit.

    `entries` (n,) int64 are their numbers, rising: a number that the codebook has is replaced, the next ones are inserted behind it.
    `keys` (n, d_in), `values` (n, d_out) and `epsilons` (n,) are float32; `labels` (n, L) int64 are target token ids, filled up with -1.
    `position` () int64 is that of the edited prompt's last token. All on the CPU.
    """

    site: str
    entries: Tensor
    keys: Tensor
    values: Tensor
    epsilons: Tensor
    labels: Tensor
    position: Tensor


@dataclass(frozen=True, kw_only=True)
class SideMemoryDelta:
    """A side memory at one site (WISE), whole, as it is after the edit: how a copy of the site's matrix differs from it.

    `memory` () int64 is its number among the memories: one that is there is replaced, the next one is new. `mask` () int64 says which
    elements may differ: those that the random mask of this number holds; all of them if it is -1. `values` (n,) float32 are the differences
    of these elements, row by row of (d_out, d_in). `activation` () float32 is the smallest of its edits', `edits` () int64 their number.
    All on the CPU.
    """

    site: str
    memory: Tensor
    mask: Tensor
    values: Tensor
    activation: Tensor
    edits: Tensor


@dataclass(frozen=True, kw_only=True)
class MemoryDelta:
    """Facts that a memory takes in, in order: full prompts, subjects and targets as text, `embeddings` (n, d) float32 on the CPU.

    `demonstrations` are texts that show how a fact is to be used, for each fact; a method that shows nothing has an empty tuple for each.
    """

    prompts: tuple[str, ...]
    subjects: tuple[str, ...]
    targets: tuple[str, ...]
    demonstrations: tuple[tuple[str, ...], ...]
    embeddings: Tensor


WeightDelta = LowRankDelta | DenseDelta | TunedDelta | SelectedDelta
AdapterDelta = CodebookDelta | SideMemoryDelta | MemoryDelta
Delta = WeightDelta | AdapterDelta


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What a method computed.

    `deltas` change the model. `auxiliary` is what the method must remember between edits (AlphaEdit's keys); it is
    kept in the journal. `diagnostics` are numbers for people (losses, norms): logged, never part of the journal.
    """

    deltas: tuple[Delta, ...]
    auxiliary: Mapping[str, Tensor] = field(default_factory=dict)
    diagnostics: Mapping[str, float] = field(default_factory=dict)

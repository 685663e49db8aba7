"""What an edit changes: low-rank and dense updates of weight matrices, with what must be remembered.

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


Delta = LowRankDelta | DenseDelta


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What a method computed.

    `deltas` change the model. `auxiliary` is what the method must remember between edits (AlphaEdit's keys); it is
    kept in the journal. `diagnostics` are numbers for people (losses, norms): logged, never part of the journal.
    """

    deltas: tuple[Delta, ...]
    auxiliary: Mapping[str, Tensor] = field(default_factory=dict)
    diagnostics: Mapping[str, float] = field(default_factory=dict)

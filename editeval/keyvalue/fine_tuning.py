"""Fine-tuning of a few linear maps on the targets of facts: the loss, the rows and the loop that such methods share.

For a row with scored tokens o_1 ... o_n, minimise over the change of each map

    -1/n sum_i log P(o_i)      (mean over the rows of a batch)

by Adam, one step a batch, until the mean loss of an epoch is below a threshold. The changes may be kept within a box around zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from editeval.edits.delta import WeightDelta
from editeval.edits.dense import Tuning
from editeval.keyvalue.lookup import Located, locate
from editeval.keyvalue.suffix import next_token_logits
from editeval.keyvalue.upper import Seen, UpperPass, changed
from editeval.models.model import LanguageModel
from editeval.types import ConfigError, EditError, EditRequest

SCORED_AT: Mapping[str, str] = {
    "target": "each token of the target where it is predicted, the earlier ones given",
    "prompt_end": "all tokens of the target at the last position of the prompt",
}


@dataclass(frozen=True, kw_only=True)
class TargetRow:
    """What the model is given, and which token should be likely at which position."""

    request_id: str
    input_ids: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """How to tune.

    `max_change` bounds each element of a change (None: no bound). A batch whose loss is below `stop_loss` makes no step; an epoch whose
    mean loss is below it is the last.

    Raises:
        ConfigError: a number that must be positive and is not.
    """

    num_epochs: int
    learning_rate: float
    max_change: float | None
    stop_loss: float

    def __post_init__(self) -> None:
        if self.num_epochs < 1:
            raise ConfigError(f"num_steps={self.num_epochs} makes no update; set method.num_steps to at least 1")
        for name in ("learning_rate", "max_change"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value} must be above 0; set method.{name}")
        if self.stop_loss < 0:
            raise ConfigError(f"stop_loss={self.stop_loss} must not be negative; set method.stop_loss")


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The change of each map (d_out, d_in), by its path, as the smallest delta of it; and the mean loss of each epoch, in nats.

    A map that did not change has no delta. `norms` are of the changes.
    """

    deltas: Mapping[str, WeightDelta]
    norms: Mapping[str, float]
    losses: tuple[float, ...]


def target_row(
    tokenizer: PreTrainedTokenizerFast, request: EditRequest, *, scored_at: str, max_tokens: int, with_end: bool = False
) -> TargetRow:
    """Encode a request; `scored_at` is one of `SCORED_AT`, `with_end` adds the end-of-sequence token to the target.

    Raises:
        EditError: it cannot be encoded, or is longer than the model takes.
    """
    located = locate(
        tokenizer, request.prompt, request.subject, target=request.target_new, max_tokens=max_tokens, request_id=request.request_id
    )
    end = (tokenizer.eos_token_id,) if with_end and tokenizer.eos_token_id is not None else ()
    return scored_row(located, scored_at=scored_at, end=end, request_id=request.request_id)


def scored_row(located: Located, *, scored_at: str, end: Sequence[int] = (), request_id: str = "") -> TargetRow:
    """Return the row of an encoded prompt and target; `end` are tokens that follow the target."""
    tokens = (*located.target_ids, *end)
    prompt = located.token_ids[: located.target_start]
    at_end = scored_at == "prompt_end"
    given = () if at_end else tokens[:-1]
    return TargetRow(
        request_id=request_id,
        input_ids=(*prompt, *given),
        positions=tuple(len(prompt) - 1 + (0 if at_end else number) for number in range(len(tokens))),
        tokens=tokens,
    )


def tune(
    lm: LanguageModel,
    rows: Sequence[TargetRow],
    sites: Sequence[str],
    settings: TuningSettings,
    *,
    batch_size: int,
    first: int,
    order: Callable[[int], Sequence[int]] | None = None,
) -> Tuned:
    """Tune the linear maps at `sites`, none of them below layer `first`; weights and random generators are left as found.

    `order` gives the order of the rows in an epoch (None: as they are, always).

    Raises:
        EditError: with the ids of the batch, when its loss is not a finite number.
    """
    tunings = {site: _tuning(lm, site, settings) for site in sites}
    batches = _batches(lm, rows, batch_size, first=first)
    losses: list[float] = []
    for epoch in range(settings.num_epochs):
        if order is not None:
            batches = _batches(lm, [rows[number] for number in order(epoch)], batch_size, first=first)
        total = 0.0
        for batch in batches:
            loss = batch.loss({site: tuning.change for site, tuning in tunings.items()})
            value = float(loss.detach())
            total += value * len(batch.rows)
            if value < settings.stop_loss:
                continue
            for site, (left_ND, right_NI) in batch.gradients(loss).items():
                tunings[site].step(left_ND, right_NI)
        losses.append(total / len(rows))
        if losses[-1] < settings.stop_loss:
            break
    return Tuned(
        deltas={site: tuning.delta(f"{site}.weight") for site, tuning in tunings.items() if bool(tuning.change.any())},
        norms={site: float(tuning.change.norm()) for site, tuning in tunings.items()},
        losses=tuple(losses),
    )


def linear_maps(module: nn.Module, path: str) -> tuple[str, ...]:
    """Return the paths of all linear maps at or under a path, in the model's order."""
    return tuple(
        f"{path}.{name}".removesuffix(".")
        for name, child in module.get_submodule(path).named_modules()
        if isinstance(child, (nn.Linear, Conv1D))
    )


class TuningBatch:
    """Rows that make one step; nothing below layer `first` may be changed."""

    def __init__(self, lm: LanguageModel, rows: Sequence[TargetRow], *, first: int) -> None:
        self.rows = rows
        self._lm = lm
        self._pass = UpperPass(lm, [row.input_ids for row in rows], first=first)
        scored = [
            (number, position, token, 1 / (len(row.tokens) * len(rows)))
            for number, row in enumerate(rows)
            for position, token in zip(row.positions, row.tokens, strict=True)
        ]
        self._numbers = torch.tensor([item[0] for item in scored])
        self._positions = torch.tensor([item[1] for item in scored])
        self._tokens = torch.tensor([item[2] for item in scored])
        self._weights = torch.tensor([item[3] for item in scored])
        lengths = torch.tensor([len(row.input_ids) for row in rows])
        self._real_BT = torch.arange(int(lengths.max())) < lengths[:, None]
        self._seen = Seen({}, {})

    def loss(self, changes: Mapping[str, Tensor]) -> Tensor:
        """Return the loss with these changes of linear maps, with its graph.

        Raises:
            EditError: with the ids of the rows, when it is not a finite number.
        """
        with torch.enable_grad(), changed(self._lm.module, changes) as self._seen:
            hidden_BTD = self._pass.hidden()
        device = hidden_BTD.device
        with torch.enable_grad():
            log_probs = next_token_logits(self._lm, hidden_BTD[self._numbers.to(device), self._positions.to(device)]).log_softmax(dim=-1)
            chosen = log_probs.gather(1, self._tokens.to(log_probs.device)[:, None])[:, 0]
            loss = -(chosen * self._weights.to(chosen.device)).sum()
        if not bool(torch.isfinite(loss)):
            raise EditError(
                f"the loss is {float(loss.detach())}; the model may be broken by earlier edits, or lower method.learning_rate",
                request_ids=[row.request_id for row in self.rows],
            )
        return loss

    def gradients(self, loss: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the gradient of each changed map's weight at the last `loss`, as factors: the sum of left[n] right[n]^T.

        Of N positions, left (N, d_out) is the gradient at the map's output, right (N, d_in) its input; float32.
        """
        found = torch.autograd.grad(loss, list(self._seen.outputs.values()))
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for (site, inputs_BTI), gradient_BTD in zip(self._seen.inputs.items(), found, strict=True):
            counts_BT = self._real_BT.to(gradient_BTD.device) & (gradient_BTD != 0).any(-1)
            factors[site] = (gradient_BTD[counts_BT].float(), inputs_BTI[counts_BT].float())
        return factors


def _batches(lm: LanguageModel, rows: Sequence[TargetRow], batch_size: int, *, first: int) -> list[TuningBatch]:
    return [TuningBatch(lm, rows[start : start + batch_size], first=first) for start in range(0, len(rows), batch_size)]


def _tuning(lm: LanguageModel, site: str, settings: TuningSettings) -> Tuning:
    weight = lm.module.get_submodule(site).get_parameter("weight")
    shape = weight.shape[::-1] if isinstance(lm.module.get_submodule(site), Conv1D) else weight.shape
    return Tuning(shape, learning_rate=settings.learning_rate, max_change=settings.max_change, device=weight.device)

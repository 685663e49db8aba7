"""The value that makes a model say the target: what to add at a site, at the subject's last token (ROME, section 3.1, step 2).

The loss is in `objective.py`, its descent in `descent.py`; |delta| is kept within `clamp_norm_factor * |value|`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from editeval.keyvalue.descent import CapturedDescent, Descent
from editeval.keyvalue.graphs import StepGraphs, addresses, can_capture
from editeval.keyvalue.lookup import Located, locate, locate_request
from editeval.keyvalue.objective import FactRows, Objective, TargetSettings
from editeval.models.model import LanguageModel, from_packed_weights
from editeval.types import EditError, EditRequest

ESSENCE = "{} is a"
"""What the KL term keeps: the subject's essence (ROME, section 3.1)."""

FACTS_PER_PASS = 8
"""Facts that are optimised together."""

SHAPE_MULTIPLE = 8
"""Where steps are captured, positions before and from the subject's last token on are rounded up to this, so that few shapes come up."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The terms of a fact's loss at one evaluation: nats; `nll` is a mean over prefixes and target tokens, unweighted."""

    total: float
    nll: float
    kl: float
    weight_decay: float


@dataclass(frozen=True, kw_only=True)
class TargetValue:
    """The result for one fact; tensors are float32 on the CPU, by site.

    `deltas` (d_out) and `initial` (d_out, the site's output at the bare prompt) add up to the target value. `inputs` (N, d_in) and
    `outputs` (N, d_out) are what went into and came out of the site at the subject's last token behind each context prefix.
    """

    deltas: Mapping[str, Tensor]
    initial: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    losses: tuple[Losses, ...]


def fact_rows(
    tokenizer: PreTrainedTokenizerFast, request: EditRequest, contexts: Sequence[str], *, max_tokens: int | None = None
) -> FactRows:
    """Encode a request for `optimise`; `contexts[0]` must be the bare "{}".

    Raises:
        EditError: see `locate`.
    """
    essence = locate(tokenizer, ESSENCE, request.subject, request_id=request.request_id)
    cut = essence.subject_last + 1  # nothing after the subject's last token is looked at
    return FactRows(
        request_id=request.request_id,
        prompts=locate_request(tokenizer, request, contexts, max_tokens=max_tokens),
        essence=Located(token_ids=essence.token_ids[:cut], subject_last=essence.subject_last, target_start=cut),
    )


@from_packed_weights
def optimise(
    lm: LanguageModel,
    facts: Sequence[FactRows],
    *,
    layer: int,
    sites: Sequence[str],
    settings: TargetSettings,
    graphs: StepGraphs | None = None,
) -> tuple[TargetValue, ...]:
    """Optimise a delta at each of `sites` (module paths in layer `layer`) for each of any number of facts, in the model's current state.

    The gradient goes to the deltas alone; weights, buffers and random generators are left as found. With `graphs` the steps of a model on
    one GPU are captured, and replayed for the next facts of the same shape.

    Raises:
        EditError: with the fact's id, when its loss is not a finite number.
    """
    if not can_capture(lm.module):
        graphs = None
    multiple = 1 if graphs is None else SHAPE_MULTIPLE
    found: list[TargetValue] = []
    for start in range(0, len(facts), FACTS_PER_PASS):
        group = facts[start : start + FACTS_PER_PASS]
        objective = Objective(lm, group, layer=layer, sites=sites, settings=settings, multiple=multiple)
        plain = Descent(objective, settings)
        descent = plain if graphs is None else CapturedDescent(plain, graphs, key=(layer, tuple(sites), settings, addresses(lm.module)))
        history = _descend(descent, group, settings.num_steps)
        found += [_value(objective, descent.deltas, number, history[number]) for number in range(len(group))]
    return tuple(found)


def _descend(descent: Descent | CapturedDescent, facts: Sequence[FactRows], num_steps: int) -> list[list[Losses]]:
    """Take the steps; return the losses of each fact until its own end."""
    history: list[list[Losses]] = [[] for _ in facts]
    active_E = torch.ones(len(facts), dtype=torch.bool)
    for _ in range(1, num_steps):
        seen = descent.evaluate()
        _record(history, seen.losses, active_E, facts)
        active_E = seen.active
        if not bool(active_E.any()):
            break
        descent.move()
    return history


def _value(objective: Objective, deltas: Mapping[str, Tensor], number: int, losses: Sequence[Losses]) -> TargetValue:
    inputs, outputs = objective.at_subject(number)
    return TargetValue(
        deltas={site: _stored(delta[number]) for site, delta in deltas.items()},
        initial={site: _stored(initial[number]) for site, initial in objective.initial.items()},
        inputs={site: _stored(value) for site, value in inputs.items()},
        outputs={site: _stored(value) for site, value in outputs.items()},
        losses=tuple(losses),
    )


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).clone()


def _record(history: list[list[Losses]], values: Tensor, active_E: Tensor, facts: Sequence[FactRows]) -> None:
    for number, active in enumerate(active_E.tolist()):
        if not active:
            continue
        if not bool(torch.isfinite(values[number]).all()):
            raise EditError(
                f"the loss of the target value is {float(values[number, 0])} after {len(history[number])} steps; "
                "the model may be broken by earlier edits, or lower method.learning_rate",
                request_ids=[facts[number].request_id],
            )
        total, nll, kl, decay = values[number].tolist()
        history[number].append(Losses(total=total, nll=nll, kl=kl, weight_decay=decay))

"""The value that makes a model say the target: what to add at a site, at the subject's last token (ROME, section 3.1, step 2).

For one fact with N context prefixes x_j and the target o, minimise over delta

    1/N sum_j -log P(o | x_j + prompt; value + delta) / |o|  +  kl_factor * KL(P_delta || P_0)  +  weight_decay * |delta| / |value|^2

where the KL term compares the next-token distributions of "{subject} is a" at the subject's last token, and |delta| is kept within
`clamp_norm_factor * |value|`. Source: Meng et al. 2022, arXiv:2202.05262, equation 4, with the constants of the published code.

Facts are independent of each other: their rows share forward passes, their deltas never meet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from editeval.edits.adam import adam, new_moments
from editeval.keyvalue.lookup import Located, locate, locate_request
from editeval.keyvalue.suffix import SuffixPass, next_token_logits
from editeval.models.model import LanguageModel
from editeval.types import ConfigError, EditError, EditRequest

ESSENCE = "{} is a"
"""What the KL term keeps: the subject's essence (ROME, section 3.1)."""


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """How to optimise a target value. Fields as in the published configurations.

    `num_steps` evaluations of the loss make `num_steps - 1` updates: the published loop ends after an evaluation, and that
    last evaluation, which changes nothing, is not run here.

    Raises:
        ConfigError: fewer than two steps, or a number that must be positive and is not.
    """

    num_steps: int
    learning_rate: float
    weight_decay: float
    clamp_norm_factor: float
    kl_factor: float
    early_stop_loss: float = 0.05

    def __post_init__(self) -> None:
        if self.num_steps < 2:
            raise ConfigError(f"num_steps={self.num_steps} makes no update; set method.num_steps to at least 2")
        for name in ("learning_rate", "clamp_norm_factor"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0; set method.{name}")
        for name in ("weight_decay", "kl_factor"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative; set method.{name}")


@dataclass(frozen=True, kw_only=True)
class FactRows:
    """A fact as token rows: once a context prefix with its target, and the essence prompt of its subject.

    The first of `prompts` is the bare prompt: its value is what the delta starts from.
    """

    request_id: str
    prompts: tuple[Located, ...]
    essence: Located


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The terms of a fact's loss at one evaluation: nats; `nll` is a mean over prefixes and target tokens."""

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


def optimise(
    lm: LanguageModel, facts: Sequence[FactRows], *, layer: int, sites: Sequence[str], settings: TargetSettings
) -> tuple[TargetValue, ...]:
    """Optimise a delta at each of `sites` (module paths in layer `layer`) for each fact, in the model's current state.

    The gradient goes to the deltas alone; weights, buffers and random generators are left as found.

    Raises:
        EditError: with the fact's id, when its loss is not a finite number.
    """
    objective = Objective(lm, facts, layer=layer, sites=sites, settings=settings)
    deltas = objective.zeros()
    moments = {site: new_moments(delta) for site, delta in deltas.items()}
    active_E = torch.ones(len(facts), dtype=torch.bool, device=objective.device)
    history: list[list[Losses]] = [[] for _ in facts]
    for step in range(1, settings.num_steps):
        terms = objective.terms(deltas)
        total_E = terms.total
        _record(history, terms, active_E, facts)
        active_E = active_E & (total_E.detach() >= settings.early_stop_loss)
        if not bool(active_E.any()):
            break
        gradients = torch.autograd.grad(total_E.sum(), list(deltas.values()))
        with torch.no_grad():
            for (site, delta), gradient in zip(deltas.items(), gradients, strict=True):
                moved = adam(delta, gradient, moments[site], step=step, learning_rate=settings.learning_rate)
                limit_E = settings.clamp_norm_factor * objective.initial[site].norm(dim=1)
                moved = moved * (limit_E / moved.norm(dim=1).clamp(min=1e-30)).clamp(max=1.0)[:, None]
                delta.copy_(torch.where(active_E.to(delta.device)[:, None], moved, delta))
    return objective.results(deltas, history)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of the loss, one number a fact (E), with their graph."""

    nll: Tensor
    kl: Tensor
    weight_decay: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum."""
        return self.nll + self.kl + self.weight_decay


class Objective:
    """The loss of E facts as a function of their deltas (E, d_out), by site."""

    def __init__(self, lm: LanguageModel, facts: Sequence[FactRows], *, layer: int, sites: Sequence[str], settings: TargetSettings) -> None:
        self._lm = lm
        self._settings = settings
        self._sites = tuple(sites)
        rows = [row for fact in facts for row in (*fact.prompts, fact.essence)]
        self._suffix = SuffixPass(lm, rows, layer=layer, sites=sites)
        self.device = next(iter(self._suffix.site_outputs.values())).device
        self._num_facts = len(facts)
        self._row_slices: list[slice] = []
        fact_of_row: list[int] = []
        scored: list[tuple[int, int, int, int, float]] = []  # row, position in the suffix, token, fact, weight
        essences: list[int] = []
        for number, fact in enumerate(facts):
            start = len(fact_of_row)
            for row in fact.prompts:
                weight = 1.0 / (len(fact.prompts) * len(row.target_ids))
                for position, token in zip(row.scored_positions, row.target_ids, strict=True):
                    scored.append((len(fact_of_row), position - row.subject_last, token, number, weight))
                fact_of_row.append(number)
            essences.append(len(fact_of_row))
            self._row_slices.append(slice(start, len(fact_of_row)))
            fact_of_row.append(number)
        self._fact_of_row = torch.tensor(fact_of_row, device=self.device)
        self._rows = torch.tensor([item[0] for item in scored] + essences)
        self._positions = torch.tensor([item[1] for item in scored] + [0] * len(facts))
        self._tokens = torch.tensor([item[2] for item in scored])
        self._facts = torch.tensor([item[3] for item in scored])
        self._weights = torch.tensor([item[4] for item in scored])
        self._essence_log_probs: Tensor | None = None
        first_rows = torch.tensor([rows_of.start for rows_of in self._row_slices])
        self.initial = {site: outputs[first_rows.to(outputs.device)] for site, outputs in self._suffix.site_outputs.items()}

    def zeros(self) -> dict[str, Tensor]:
        """Return deltas (E, d_out) of zeros that take gradients."""
        return {site: torch.zeros_like(initial, requires_grad=True) for site, initial in self.initial.items()}

    def terms(self, deltas: Mapping[str, Tensor]) -> Terms:
        """Return the loss at these deltas. The first call must be at zero: it gives the distribution that the KL term keeps."""
        with torch.enable_grad():
            added = {site: delta[self._fact_of_row.to(delta.device)] for site, delta in deltas.items()}
            hidden = self._suffix.hidden(added, rows_N=self._rows, positions_N=self._positions)
            logits = next_token_logits(self._lm, hidden)
            log_probs = logits.log_softmax(dim=-1)
            num_scored = len(self._tokens)
            device = log_probs.device
            chosen = log_probs[:num_scored].gather(1, self._tokens.to(device)[:, None])[:, 0]
            nll = torch.zeros(self._num_facts, device=device).index_add(0, self._facts.to(device), -chosen * self._weights.to(device))
            essence = log_probs[num_scored:]
            if self._essence_log_probs is None:
                self._essence_log_probs = essence.detach().clone()
            kl = (essence.exp() * (essence - self._essence_log_probs)).sum(dim=1)
            decay = torch.zeros(self._num_facts, device=self.device)
            for site, delta in deltas.items():
                decay = decay + (delta.norm(dim=1) / self.initial[site].norm(dim=1) ** 2).to(self.device)
            return Terms(
                nll=nll.to(self.device),
                kl=self._settings.kl_factor * kl.to(self.device),
                weight_decay=self._settings.weight_decay * decay,
            )

    def results(self, deltas: Mapping[str, Tensor], history: Sequence[Sequence[Losses]]) -> tuple[TargetValue, ...]:
        """Return one record a fact."""
        return tuple(
            TargetValue(
                deltas={site: _stored(delta[number]) for site, delta in deltas.items()},
                initial={site: _stored(initial[number]) for site, initial in self.initial.items()},
                inputs={site: _stored(self._suffix.site_inputs[site][rows]) for site in self._sites},
                outputs={site: _stored(self._suffix.site_outputs[site][rows]) for site in self._sites},
                losses=tuple(history[number]),
            )
            for number, rows in enumerate(self._row_slices)
        )


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).clone()


def _record(history: list[list[Losses]], terms: Terms, active_E: Tensor, facts: Sequence[FactRows]) -> None:
    values = torch.stack([terms.total, terms.nll, terms.kl, terms.weight_decay], dim=1).detach().cpu()
    for number, active in enumerate(active_E.cpu().tolist()):
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

"""The loss that a target value minimises, as a function of what is added at a site (ROME, section 3.1, step 2).

For one fact with N context prefixes x_j and the target o:

    1/N sum_j -log P(o | x_j + prompt; value + delta) / |o|  +  kl_factor * KL(P_delta || P_0)  +  weight_decay * |delta| / |value|^2

where the KL term compares the next-token distributions of "{subject} is a" at the subject's last token. Source: Meng et al. 2022,
arXiv:2202.05262, equation 4, with the constants of the published code.

Facts are independent of each other: their rows share forward passes, their deltas never meet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from editeval.keyvalue.lookup import Located
from editeval.keyvalue.suffix import SuffixPass, next_token_logits
from editeval.models.model import LanguageModel
from editeval.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """How to optimise a target value. Fields as in the published configurations.

    `num_steps` evaluations of the loss make `num_steps - 1` updates: the published loop ends after an evaluation, and that
    last evaluation, which changes nothing, is not run here.

    PMET's rule: a fact is *written* when each of its target tokens is the likeliest one behind every prefix. After an evaluation that finds
    it written, its nll counts `written_nll_factor` times at the next one, or its steps end if the weighted KL term is at most
    `written_kl`. None: no such rule.

    Raises:
        ConfigError: fewer than two steps, a number that is not finite, or one that must be positive and is not.
    """

    num_steps: int
    learning_rate: float
    weight_decay: float
    clamp_norm_factor: float
    kl_factor: float
    early_stop_loss: float = 0.05
    written_nll_factor: float | None = None
    written_kl: float | None = None

    def __post_init__(self) -> None:
        if self.num_steps < 2:
            raise ConfigError(f"num_steps={self.num_steps} makes no update; set method.num_steps to at least 2")
        for name, value in asdict(self).items():
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"{name}={value} must be a finite number; set method.{name}")
        for name in ("learning_rate", "clamp_norm_factor"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0; set method.{name}")
        for name in ("weight_decay", "kl_factor", "written_nll_factor", "written_kl"):
            if (getattr(self, name) or 0) < 0:
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
class Terms:
    """The terms of the loss, one number a fact (E), with their graph; `written` (E) says whether the target is the likeliest answer."""

    nll: Tensor
    kl: Tensor
    weight_decay: Tensor
    written: Tensor

    def total(self, nll_factor_E: Tensor | float = 1.0) -> Tensor:
        """Return their sum, the nll weighted."""
        return nll_factor_E * self.nll + self.kl + self.weight_decay


class Objective:
    """The loss of E facts as a function of their deltas (E, d_out), by site."""

    def __init__(
        self, lm: LanguageModel, facts: Sequence[FactRows], *, layer: int, sites: Sequence[str], settings: TargetSettings, multiple: int = 1
    ) -> None:
        """Run the whole model once over the facts' rows; `multiple`: see `SuffixPass`."""
        self._lm = lm
        self._settings = settings
        self._sites = tuple(sites)
        rows = [row for fact in facts for row in (*fact.prompts, fact.essence)]
        self._suffix = SuffixPass(lm, rows, layer=layer, sites=sites, multiple=multiple)
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
        self._rows = torch.tensor([item[0] for item in scored] + essences, device=self.device)
        self._positions = torch.tensor([item[1] for item in scored] + [0] * len(facts), device=self.device)
        self._tokens = torch.tensor([item[2] for item in scored], device=self.device)
        self._facts = torch.tensor([item[3] for item in scored], device=self.device)
        self._weights = torch.tensor([item[4] for item in scored], device=self.device)
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
            facts = self._facts.to(device)
            nll = torch.zeros(self._num_facts, device=device).index_add(0, facts, -chosen * self._weights.to(device))
            likeliest = log_probs[:num_scored].detach().amax(dim=1)
            missed = torch.zeros(self._num_facts, device=device).index_add(0, facts, (chosen < likeliest).float())
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
                written=(missed == 0).to(self.device),
            )

    def tensors(self) -> list[Tensor]:
        """Return every tensor that `terms` reads beside the model's own, in an order that shapes alone decide.

        The distribution that the KL term keeps is among them once the first call was made.
        """
        kept = [] if self._essence_log_probs is None else [self._essence_log_probs]
        indices = [self._fact_of_row, self._rows, self._positions, self._tokens, self._facts, self._weights]
        return [*indices, *self.initial.values(), *kept, *self._suffix.tensors()]

    def at_subject(self, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what went into (N, d_in) and came out of (N, d_out) each site at the subject's last token, behind a fact's N prefixes."""
        rows = self._row_slices[number]
        inputs = {site: self._suffix.site_inputs[site][rows] for site in self._sites}
        return inputs, {site: self._suffix.site_outputs[site][rows] for site in self._sites}

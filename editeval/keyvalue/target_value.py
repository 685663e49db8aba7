"""The value that makes a model say the target: what to add at a site, at the subject's last token (ROME, section 3.1, step 2).

For one fact with N context prefixes x_j and the target o, minimise over delta

    1/N sum_j -log P(o | x_j + prompt; value + delta) / |o|  +  kl_factor * KL(P_delta || P_0)  +  weight_decay * |delta| / |value|^2

where the KL term compares the next-token distributions of "{subject} is a" at the subject's last token, and |delta| is kept within
`clamp_norm_factor * |value|`. Source: Meng et al. 2022, arXiv:2202.05262, equation 4, with the constants of the published code.

Facts are independent of each other: their rows share forward passes, their deltas never meet.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from editeval.edits.adam import corrected_adam, corrections, new_moments
from editeval.keyvalue.graphs import StepGraphs, addresses, can_capture
from editeval.keyvalue.lookup import Located, locate, locate_request
from editeval.keyvalue.suffix import SuffixPass, next_token_logits
from editeval.models.model import LanguageModel, from_packed_weights
from editeval.types import ConfigError, EditError, EditRequest

ESSENCE = "{} is a"
"""What the KL term keeps: the subject's essence (ROME, section 3.1)."""

FACTS_PER_PASS = 8
"""Facts that are optimised together."""

SHAPE_MULTIPLE = 8
"""Where steps are captured, positions before and from the subject's last token on are rounded up to this, so that few shapes come up."""


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
        found += objective.results(descent.deltas, history)
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


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found, on the CPU: total, nll, kl and weight decay (E, 4), and which facts go on (E)."""

    losses: Tensor
    active: Tensor


class Descent:
    """Adam on the deltas of E facts, within their norms; a fact whose loss is low enough stays where it is."""

    def __init__(self, objective: Objective, settings: TargetSettings) -> None:
        self.deltas = objective.zeros()
        self._objective = objective
        self._settings = settings
        device = objective.device
        self._moments = {site: new_moments(delta) for site, delta in self.deltas.items()}
        self._limits = {site: settings.clamp_norm_factor * initial.norm(dim=1) for site, initial in objective.initial.items()}
        self._active_E = torch.ones(len(next(iter(self.deltas.values()))), dtype=torch.bool, device=device)
        self._losses_E4 = torch.zeros(len(self._active_E), 4, device=device)
        self._nll_factor_E = torch.ones(len(self._active_E), device=device)
        self._next_factor_E = self._nll_factor_E
        steps = range(1, settings.num_steps)
        factors = [corrections(step=step, learning_rate=settings.learning_rate) for step in steps]
        self._factors = {site: torch.tensor(factors, device=delta.device) for site, delta in self.deltas.items()}
        self._step = {site: torch.zeros(1, dtype=torch.long, device=delta.device) for site, delta in self.deltas.items()}
        self._leaves: dict[str, Tensor] = {}
        self._total_E: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Return the state, and what the objective reads."""
        moments = [moment for pair in self._moments.values() for moment in pair]
        own = [self._active_E, self._losses_E4, self._nll_factor_E, *moments]
        for by_site in (self.deltas, self._limits, self._factors, self._step):
            own += list(by_site.values())
        return [*own, *self._objective.tensors()]

    def evaluate(self) -> Evaluation:
        """Look at the loss where the deltas are."""
        self._look()
        return self.seen()

    def seen(self) -> Evaluation:
        """Return what the last look found."""
        return Evaluation(losses=self._losses_E4.to("cpu", copy=True), active=self._active_E.to("cpu", copy=True))

    def run(self) -> None:
        """Look and move."""
        self._look()
        self.move()

    def move(self) -> None:
        """Take the step of the last look."""
        assert self._total_E is not None
        gradients = torch.autograd.grad(self._total_E.sum(), list(self._leaves.values()))
        self._total_E = None
        with torch.no_grad():
            self._nll_factor_E.copy_(self._next_factor_E)
            for (site, delta), gradient in zip(self.deltas.items(), gradients, strict=True):
                factors = self._factors[site].index_select(0, self._step[site])[0]
                self._step[site].add_(1)
                moved = corrected_adam(delta, gradient, self._moments[site], tuple(factors))
                moved = moved * (self._limits[site] / moved.norm(dim=1).clamp(min=1e-30)).clamp(max=1.0)[:, None]
                delta.copy_(torch.where(self._active_E.to(delta.device)[:, None], moved, delta))

    def _look(self) -> None:
        # Made anew for each look: autograd remembers the stream that a leaf was first used on, and a graph is captured on its own.
        self._leaves = {site: delta.detach().requires_grad_() for site, delta in self.deltas.items()}
        terms = self._objective.terms(self._leaves)
        self._total_E = terms.total(self._nll_factor_E)
        with torch.no_grad():
            self._losses_E4.copy_(torch.stack([self._total_E, terms.nll, terms.kl, terms.weight_decay], dim=1))
            self._active_E.logical_and_(self._total_E >= self._settings.early_stop_loss)
            if self._settings.written_kl is not None:
                self._active_E.logical_and_(~(terms.written & (terms.kl <= self._settings.written_kl)))
            if self._settings.written_nll_factor is not None:
                self._next_factor_E = torch.where(terms.written, self._settings.written_nll_factor, 1.0)


class CapturedDescent:
    """The same on a GPU: an evaluation and its step are one graph, captured once for each shape."""

    def __init__(self, descent: Descent, graphs: StepGraphs, *, key: Hashable) -> None:
        descent.evaluate()  # at zero: what the KL term keeps is one of the tensors from now on
        self._graph = graphs.graph(key, descent)
        self._descent: Descent = self._graph.step  # the first of its shape

    @property
    def deltas(self) -> Mapping[str, Tensor]:
        """The deltas as they are now (E, d_out), by site."""
        return self._descent.deltas

    def evaluate(self) -> Evaluation:
        """Look at the loss where the deltas are, and take the step."""
        self._graph.replay()
        return self._descent.seen()

    def move(self) -> None:
        """Do nothing: the step was taken."""


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
